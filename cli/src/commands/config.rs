//! `config check` and `config show`.

use std::path::Path;

use coordinator::Config as CoordinatorConfig;
use proto::{Action, Code, Failure};
use worker::config::WorkerConfig;

use crate::args::{ConfigCommand, Output};
use crate::exit::Exit;
use crate::{configs, output};

/// A file's role, told by the sections only one of them has.
enum Role {
    Coordinator(Box<CoordinatorConfig>),
    Worker(Box<WorkerConfig>),
}

/// `config …`.
pub(crate) fn run(command: &ConfigCommand, format: Output) -> Result<Exit, Failure> {
    match command {
        ConfigCommand::Check { files } => {
            let mut failures = Vec::new();
            for file in files {
                match read(file) {
                    Ok(_) => output::talk(&format!("{}: good", file.display())),
                    Err(failure) => failures.push(failure),
                }
            }
            failures.iter().for_each(output::failure);
            Ok(if failures.is_empty() { Exit::Ok } else { Exit::Usage })
        }
        ConfigCommand::Show { file, origin } => {
            let values = match read(file)? {
                Role::Coordinator(config) => toml::Value::try_from(*config),
                Role::Worker(config) => toml::Value::try_from(*config),
            };
            let values = values.map_err(|error| Failure::bug(error.to_string()))?;
            let text = std::fs::read_to_string(file).map_err(|error| unreadable(file, &error))?;
            let written: toml::Table =
                configs::parse(&text).map_err(|what| invalid(file, &what))?;
            if format == Output::Json {
                output::data(&output::json(&values));
            } else if *origin {
                let mut lines = Vec::new();
                origins("", &values, Some(&toml::Value::Table(written)), &mut lines);
                output::data(&lines.join("\n"));
            } else {
                output::data(&toml::to_string(&values).map_err(|e| Failure::bug(e.to_string()))?);
            }
            Ok(Exit::Ok)
        }
    }
}

fn read(file: &Path) -> Result<Role, Failure> {
    let text = std::fs::read_to_string(file).map_err(|error| unreadable(file, &error))?;
    let keys: toml::Table = configs::parse(&text).map_err(|what| invalid(file, &what))?;
    if keys.contains_key("catalog") || keys.contains_key("signing_key") {
        configs::read(file, CoordinatorConfig::validate).map(|c| Role::Coordinator(Box::new(c)))
    } else {
        configs::read(file, WorkerConfig::problems).map(|c| Role::Worker(Box::new(c)))
    }
}

fn unreadable(file: &Path, error: &std::io::Error) -> Failure {
    let message = format!("{}: {error}", file.display());
    Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
        .with_hint("Check the path, and that this user may read it.")
}

fn invalid(file: &Path, what: &str) -> Failure {
    let message = format!("{}: {what}", file.display());
    Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
        .with_hint("deploy/config/ holds complete, commented examples.")
}

/// One line a value: where it comes from, its key, and what it is.
fn origins(
    path: &str,
    value: &toml::Value,
    written: Option<&toml::Value>,
    lines: &mut Vec<String>,
) {
    match value {
        toml::Value::Table(table) => {
            for (key, value) in table {
                let path = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                origins(&path, value, written.and_then(|table| table.get(key)), lines);
            }
        }
        toml::Value::Array(items) if items.iter().any(toml::Value::is_table) => {
            for (index, value) in items.iter().enumerate() {
                let written = written.and_then(|items| items.get(index));
                origins(&format!("{path}[{index}]"), value, written, lines);
            }
        }
        value => {
            let origin = if written.is_some() { "file   " } else { "default" };
            lines.push(format!("{origin} {path} = {value}"));
        }
    }
}
