//! Reads configuration files: every problem by its path, unknown keys with a suggestion.

use std::path::Path;

use proto::{Action, Code, Failure};
use serde::de::DeserializeOwned;

/// Reads a configuration; `problems` adds what its own check finds.
pub(crate) fn read<T: DeserializeOwned>(
    path: &Path,
    problems: impl Fn(&T) -> Vec<String>,
) -> Result<T, Failure> {
    let wrong = |what: String| {
        Failure::new(Code::ConfigInvalid, Action::FixConfig, format!("{}: {what}", path.display()))
            .with_hint("deploy/config/ holds complete, commented examples.")
    };
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let config = parse(&text).map_err(&wrong)?;
    let problems = problems(&config);
    if problems.is_empty() { Ok(config) } else { Err(wrong(problems.join("; "))) }
}

/// Parses a configuration from its text. The error says where.
pub(crate) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let deserializer = toml::Deserializer::parse(text).map_err(|error| told(text, "", &error))?;
    serde_path_to_error::deserialize(deserializer).map_err(|error| {
        let path = error.path().to_string();
        let place = if path == "." { String::new() } else { format!("{path}: ") };
        told(text, &place, error.inner())
    })
}

/// An error without the line it is in, which `Display` would print and which may hold a secret.
fn told(text: &str, place: &str, error: &toml::de::Error) -> String {
    let at = error.span().map_or_else(String::new, |span| position(text, span.start));
    let what = without_value(error.message());
    match suggestion(&what) {
        Some(meant) => format!("{at}{place}{what}. Did you mean `{meant}`?"),
        None => format!("{at}{place}{what}"),
    }
}

/// Line and column of a byte, counted from 1, columns in characters.
fn position(text: &str, byte: usize) -> String {
    let before = text.get(..byte).unwrap_or(text);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    format!("line {line}, column {column}: ")
}

/// Serde's message without the text it found: "invalid type: string \"hunter2\", expected a map".
fn without_value(message: &str) -> String {
    match (message.split_once("string \""), message.rsplit_once("\", expected ")) {
        (Some((before, _)), Some((_, expected))) if before.starts_with("invalid ") => {
            format!("{before}a text, expected {expected}")
        }
        _ => message.to_owned(),
    }
}

/// The expected key that is nearest to an unknown one, from serde's message: "unknown field `a`, expected one of `b`, `c`".
fn suggestion(message: &str) -> Option<&str> {
    let (unknown, expected) =
        message.strip_prefix("unknown field `")?.split_once("`, expected ")?;
    expected
        .split('`')
        .skip(1)
        .step_by(2)
        .map(|candidate| (distance(unknown, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.len().max(unknown.len()) / 2)
        .min()
        .map(|(_, candidate)| candidate)
}

/// Edits that turn one text into the other (Levenshtein 1965).
fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != *y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use worker::config::WorkerConfig;

    use super::*;

    #[test]
    fn an_unknown_key_is_named_with_its_place_and_what_was_meant() {
        let text = r#"
            name = "w1"
            site = "fra1"
            state_dir = "/var/lib/pgmuster"
            broker = { url = "file:/u" }
            sandbox = { directry = "/tmp" }
        "#;
        let error = parse::<WorkerConfig>(text).unwrap_err();
        assert!(error.contains("sandbox"), "{error}");
        assert!(error.contains("Did you mean `directory`?"), "{error}");
    }

    #[test]
    fn a_secret_in_the_wrong_place_is_not_repeated() {
        for broker in ["{ url = \"amqp://u:hunter2@h\" }", "\"amqp://u:hunter2@h\""] {
            let text =
                format!("name = \"w1\"\nsite = \"s\"\nstate_dir = \"/s\"\nbroker = {broker}\n");
            let error = parse::<WorkerConfig>(&text).unwrap_err();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_broken_line_is_told_by_its_number_and_not_repeated() {
        let text = "name = \"w1\"\n[broker]\nurl = \"ämqp://u:hunter2@h\" oops\n";
        let error = parse::<WorkerConfig>(text).unwrap_err();
        assert!(error.starts_with("line 3, column "), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
        let open = "name = \"w1\"\npassword = \"hunter2\n";
        let error = parse::<WorkerConfig>(open).unwrap_err();
        assert!(error.starts_with("line "), "{error}");
        assert!(!error.contains("hunter2"), "{error}");
    }
}
