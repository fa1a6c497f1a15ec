//! The standard `OTEL_*` variables, as a value. Whoever owns the process environment passes a lookup in; nobody
//! else reads it, so tests need no process-wide state.

use std::time::Duration;

/// What the environment says about telemetry; every field is `None` or empty where the variable is unset or empty.
///
/// The environment is stronger than the configuration file. Variables of signals that are not exported over OTLP
/// here (metrics, logs) have no field.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Environment {
    /// `OTEL_SDK_DISABLED=true`: export nothing.
    pub disabled: bool,
    /// `OTEL_TRACES_EXPORTER`: `otlp` or `none`.
    pub traces_exporter: Option<String>,
    /// `OTEL_EXPORTER_OTLP_ENDPOINT`: the base URL; `/v1/traces` is appended.
    pub endpoint: Option<String>,
    /// `OTEL_EXPORTER_OTLP_TRACES_ENDPOINT`: the whole URL, used as it is.
    pub traces_endpoint: Option<String>,
    /// `OTEL_EXPORTER_OTLP_TRACES_PROTOCOL`, else `OTEL_EXPORTER_OTLP_PROTOCOL`: only `http/protobuf` is spoken.
    pub protocol: Option<String>,
    /// `OTEL_EXPORTER_OTLP_HEADERS`, then `OTEL_EXPORTER_OTLP_TRACES_HEADERS`, percent-decoded. Often credentials.
    pub headers: Vec<(String, String)>,
    /// `OTEL_EXPORTER_OTLP_TRACES_TIMEOUT`, else `OTEL_EXPORTER_OTLP_TIMEOUT`, milliseconds for one export.
    pub timeout: Option<Duration>,
    /// `OTEL_SERVICE_NAME`.
    pub service_name: Option<String>,
    /// `OTEL_RESOURCE_ATTRIBUTES`, percent-decoded.
    pub resource_attributes: Vec<(String, String)>,
    /// `OTEL_TRACES_SAMPLER`.
    pub sampler: Option<String>,
    /// `OTEL_TRACES_SAMPLER_ARG`.
    pub sampler_argument: Option<String>,
    /// `OTEL_BSP_MAX_QUEUE_SIZE`.
    pub queue_size: Option<usize>,
    /// `OTEL_BSP_MAX_EXPORT_BATCH_SIZE`.
    pub batch_size: Option<usize>,
    /// `OTEL_BSP_SCHEDULE_DELAY`, milliseconds.
    pub schedule_delay: Option<Duration>,
}

impl Environment {
    /// Reads the variables through `lookup`; for a program that is `|name| std::env::var(name).ok()`.
    ///
    /// As the OpenTelemetry specification asks, an empty value counts as unset and a number that does not parse is
    /// ignored.
    pub fn read(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let text = |name: &str| lookup(name).map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let number = |name: &str| text(name).and_then(|v| v.parse::<u64>().ok());
        let millis = |name: &str| number(name).map(Duration::from_millis);
        let size = |name: &str| {
            number(name).and_then(|v| usize::try_from(v).ok()).filter(|size| *size > 0)
        };
        let pairs = |name: &str| text(name).map_or_else(Vec::new, |v| pairs(&v));

        let mut headers = pairs("OTEL_EXPORTER_OTLP_HEADERS");
        headers.extend(pairs("OTEL_EXPORTER_OTLP_TRACES_HEADERS"));
        Self {
            disabled: text("OTEL_SDK_DISABLED").is_some_and(|v| v.eq_ignore_ascii_case("true")),
            traces_exporter: text("OTEL_TRACES_EXPORTER"),
            endpoint: text("OTEL_EXPORTER_OTLP_ENDPOINT"),
            traces_endpoint: text("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"),
            protocol: text("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
                .or_else(|| text("OTEL_EXPORTER_OTLP_PROTOCOL")),
            headers,
            timeout: millis("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT")
                .or_else(|| millis("OTEL_EXPORTER_OTLP_TIMEOUT")),
            service_name: text("OTEL_SERVICE_NAME"),
            resource_attributes: pairs("OTEL_RESOURCE_ATTRIBUTES"),
            sampler: text("OTEL_TRACES_SAMPLER"),
            sampler_argument: text("OTEL_TRACES_SAMPLER_ARG"),
            queue_size: size("OTEL_BSP_MAX_QUEUE_SIZE"),
            batch_size: size("OTEL_BSP_MAX_EXPORT_BATCH_SIZE"),
            schedule_delay: millis("OTEL_BSP_SCHEDULE_DELAY"),
        }
    }
}

/// `a=b,c=d`, percent-encoded values, blanks around each part ignored; a part without a key is skipped.
fn pairs(text: &str) -> Vec<(String, String)> {
    text.split(',')
        .filter_map(|part| part.split_once('='))
        .map(|(key, value)| (key.trim().to_owned(), percent_decode(value.trim())))
        .filter(|(key, _)| !key.is_empty())
        .collect()
}

/// A `%` that does not begin two hexadecimal digits stands for itself.
fn percent_decode(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        let escaped = bytes.get(at + 1..at + 3).filter(|_| bytes[at] == b'%');
        let value = escaped
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .filter(|digits| digits.bytes().all(|digit| digit.is_ascii_hexdigit()))
            .and_then(|digits| u8::from_str_radix(digits, 16).ok());
        decoded.push(value.unwrap_or(bytes[at]));
        at += if value.is_some() { 3 } else { 1 };
    }
    String::from_utf8_lossy(&decoded).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(variables: &[(&str, &str)]) -> Environment {
        Environment::read(|name| {
            variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn an_empty_environment_says_nothing() {
        assert_eq!(read(&[]), Environment::default());
        assert_eq!(
            read(&[("OTEL_EXPORTER_OTLP_ENDPOINT", " "), ("OTEL_BSP_MAX_QUEUE_SIZE", "many")]),
            Environment::default()
        );
    }

    #[test]
    fn the_variable_of_the_signal_wins_over_the_general_one() {
        let environment = read(&[
            ("OTEL_EXPORTER_OTLP_PROTOCOL", "grpc"),
            ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf"),
            ("OTEL_EXPORTER_OTLP_TIMEOUT", "9000"),
            ("OTEL_EXPORTER_OTLP_TRACES_TIMEOUT", "1500"),
            ("OTEL_EXPORTER_OTLP_HEADERS", "a=general, b=kept"),
            ("OTEL_EXPORTER_OTLP_TRACES_HEADERS", "a=Basic%20dXNlcg%3D%3D"),
            ("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=100%,,=lost,team=db%2Cops"),
            ("OTEL_SDK_DISABLED", "TRUE"),
        ]);
        assert_eq!(environment.protocol.as_deref(), Some("http/protobuf"));
        assert_eq!(environment.timeout, Some(Duration::from_millis(1500)));
        let header = |at: usize| (&*environment.headers[at].0, &*environment.headers[at].1);
        assert_eq!(header(0), ("a", "general"));
        assert_eq!(header(2), ("a", "Basic dXNlcg=="));
        let attribute = |at: usize| &*environment.resource_attributes[at].1;
        assert_eq!((attribute(0), attribute(1)), ("100%", "db,ops"));
        assert!(environment.disabled);
    }
}
