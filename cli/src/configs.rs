//! Reads configuration files: every problem by its path, unknown keys with a suggestion.

use std::ops::Range;
use std::path::Path;

use proto::near::distance;
use proto::{Action, Code, Failure};
use serde::de::DeserializeOwned;
use toml::de::{DeArray, DeTable, DeValue};

/// Problems of one file that are told at once.
const PROBLEMS_MAX: usize = 50;

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

/// Parses a configuration from its text. The error says what is wrong and where, every unknown key and every wrong value at once.
pub(crate) fn parse<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let mut table = DeTable::parse(text).map_err(|error| told(text, "", &error))?;
    // Where each begins, and what it is.
    let mut problems: Vec<(usize, String)> = Vec::new();
    let mut taken: Vec<String> = Vec::new();
    while problems.len() < PROBLEMS_MAX {
        let deserializer = toml::Deserializer::from(table.clone());
        let error = match serde_path_to_error::deserialize(deserializer) {
            Ok(config) if problems.is_empty() => return Ok(config),
            Ok(_) => break,
            Err(error) => error,
        };
        let message = error.inner().message();
        let missing =
            message.strip_prefix("missing field `").map(|rest| rest.trim_end_matches('`'));
        // It is there, and was told already: its value is wrong, or its name.
        let is_told = missing.is_some_and(|name| taken.iter().any(|taken| taken == name));
        if !is_told {
            let path = error.path().to_string();
            let place = if path == "." { String::new() } else { format!("{path}: ") };
            let begins = error.inner().span().map_or(0, |span| span.start);
            problems.push((begins, told(text, &place, error.inner())));
        }
        taken.extend(suggestion(message).map(str::to_owned));
        // What is wrong is taken out, so that the next look meets the next problem; with what is missing, the table around it.
        match error.inner().span().and_then(|span| take_out(table.get_mut(), &span)) {
            Some(name) => taken.push(name),
            None => break,
        }
    }
    problems.sort();
    let problems: Vec<String> = problems.into_iter().map(|(_, told)| told).collect();
    Err(problems.join("; "))
}

/// Takes out the entry whose key or value stands there, or the item of an array, and names the entry.
fn take_out(table: &mut DeTable<'_>, span: &Range<usize>) -> Option<String> {
    let mut entries = table.iter();
    let found = entries.find(|(key, value)| key.span() == *span || value.span() == *span);
    if let Some(name) = found.map(|(key, _)| key.get_ref().to_string()) {
        table.remove(name.as_str());
        return Some(name);
    }
    table.iter_mut().find_map(|(key, value)| match value.get_mut() {
        DeValue::Table(below) => take_out(below, span),
        DeValue::Array(items) if items.iter().any(|item| item.span() == *span) => {
            let mut others = DeArray::new();
            items
                .iter()
                .filter(|item| item.span() != *span)
                .for_each(|item| others.push(item.clone()));
            *items = others;
            Some(key.get_ref().to_string())
        }
        DeValue::Array(items) => items.iter_mut().find_map(|item| match item.get_mut() {
            DeValue::Table(below) => take_out(below, span),
            _ => None,
        }),
        _ => None,
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
    fn every_wrong_entry_is_told_at_once_with_its_place() {
        let text = "\
name = \"w1\"
site = \"fra1\"
state_dir = \"/var/lib/pgmuster\"
colour = \"red\"
broker = { url = \"file:/u\", prot = 1 }
sandbox = { directory = \"/tmp\" }
[slots]
routine = \"many\"
[[repositories]]
nmae = \"main\"
";
        let error = parse::<WorkerConfig>(text).unwrap_err();
        let parts =
            ["line 4", "`colour`", "line 5", "`prot`", "line 8", "slots.routine", "line 10"];
        let places =
            parts.map(|part| error.find(part).unwrap_or_else(|| panic!("{part}: {error}")));
        assert!(places.is_sorted(), "in the order of the file: {error}");
        assert!(error.ends_with("Did you mean `name`?"), "{error}");
        // The name is there, under another.
        assert!(!error.contains("missing field"), "{error}");
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
