//! Log lines: for people or as JSON, on one writer, with secrets taken out of the finished line.
//!
//! The line is scrubbed whole, after formatting: whatever a library puts into a field goes the same way.

use std::borrow::Cow;
use std::io::{self, Write};

use tracing::Subscriber;
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::registry::LookupSpan;

use crate::redact::scrub;

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// One line for a person.
    #[default]
    Human,
    /// One JSON object a line.
    Json,
}

/// The layer that writes log lines to `writer`, scrubbed.
pub(crate) fn layer<S, W>(
    format: LogFormat,
    ansi: bool,
    writer: W,
) -> Box<dyn Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let writer = Scrubbed { inner: writer, colours: ansi && format == LogFormat::Human };
    match format {
        LogFormat::Human => {
            tracing_subscriber::fmt::layer().with_ansi(ansi).with_writer(writer).boxed()
        }
        LogFormat::Json => tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_current_span(true)
            .with_span_list(false)
            .with_writer(writer)
            .boxed(),
    }
}

/// Wraps a writer so that each line is scrubbed before it is written.
struct Scrubbed<W> {
    inner: W,
    colours: bool,
}

impl<'writer, W: MakeWriter<'writer>> MakeWriter<'writer> for Scrubbed<W> {
    type Writer = ScrubbedLine<W::Writer>;

    fn make_writer(&'writer self) -> Self::Writer {
        ScrubbedLine { inner: self.inner.make_writer(), colours: self.colours }
    }
}

/// The formatter hands over a whole line in one call; that is what makes scrubbing it here sound.
struct ScrubbedLine<W> {
    inner: W,
    colours: bool,
}

impl<W: Write> Write for ScrubbedLine<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        self.inner.write_all(printable(&scrub(&text), self.colours).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// One line stays one line, and nobody's text moves the cursor: control characters are written as escapes. With
/// `colours` the formatter's own sequences (`ESC [ … m`) pass.
fn printable(line: &str, colours: bool) -> Cow<'_, str> {
    let body = line.strip_suffix('\n').unwrap_or(line);
    if !body.chars().any(char::is_control) {
        return Cow::Borrowed(line);
    }
    let mut clean = String::with_capacity(line.len() + 16);
    for (at, c) in body.char_indices() {
        if !c.is_control() || (c == '\u{1b}' && colours && is_colour(&body[at + 1..])) {
            clean.push(c);
        } else {
            clean.extend(c.escape_default());
        }
    }
    clean.push('\n');
    Cow::Owned(clean)
}

fn is_colour(after_escape: &str) -> bool {
    let parameters = after_escape.strip_prefix('[').unwrap_or("");
    parameters.trim_start_matches(|c: char| c.is_ascii_digit() || c == ';').starts_with('m')
        && after_escape.starts_with('[')
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::layer::SubscriberExt;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn written(format: LogFormat, log: impl FnOnce()) -> String {
        let lines = Lines::default();
        let target = lines.clone();
        let subscriber =
            tracing_subscriber::registry().with(layer(format, false, move || target.clone()));
        tracing::subscriber::with_default(subscriber, log);
        String::from_utf8(lines.0.lock().unwrap().clone()).unwrap()
    }

    fn leaky() {
        let url = "postgres://backup:hunter2@db1/postgres";
        let error = io::Error::other("connect to host=db1 password='hunter2 x' failed");
        let span = tracing::info_span!("connect", url);
        span.in_scope(|| tracing::warn!(url, password = "hunter2", %error, "Cannot reach {url}"));
    }

    #[test]
    fn no_secret_of_a_field_span_or_message_is_written() {
        for format in [LogFormat::Human, LogFormat::Json] {
            let text = written(format, leaky);
            assert!(!text.contains("hunter2"), "{text}");
            assert!(text.contains("postgres://backup:***@db1/postgres"), "{text}");
        }
    }

    #[test]
    fn a_scrubbed_json_line_is_still_json() {
        let text = written(LogFormat::Json, leaky);
        let line: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(line["password"], "***");
        assert_eq!(line["level"], "WARN");
        assert_eq!(line["message"], "Cannot reach postgres://backup:***@db1/postgres");
    }

    #[test]
    fn a_message_cannot_forge_a_second_line_or_colour_the_terminal() {
        let text = written(LogFormat::Json, || {
            tracing::info!(name = "a\nb\u{1b}[31m", "x\n{{\"level\":\"ERROR\"}}");
        });
        assert_eq!(text.lines().count(), 1, "{text}");
        let text = written(LogFormat::Human, || tracing::info!(name = %"a\u{1b}[31mb", "m"));
        assert!(text.contains("a\\u{1b}[31mb"), "{text:?}");
        let text = written(LogFormat::Human, || tracing::info!(name = %"a\nERROR b", "c\nd"));
        assert_eq!(text.lines().count(), 1, "{text}");
        assert_eq!(
            printable("\u{1b}[2mx\u{1b}[0m \u{1b}[2Jy\n", true),
            "\u{1b}[2mx\u{1b}[0m \\u{1b}[2Jy\n"
        );
    }
}
