//! `config check` and `config show`.

use std::path::{Path, PathBuf};

use coordinator::Config as CoordinatorConfig;
use proto::{Action, ClusterName, Code, Failure};
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
            let mut good = Vec::new();
            for file in files {
                match read(file) {
                    Ok(role) => {
                        output::talk(&format!("{}: good", file.display()));
                        good.push((file, role));
                    }
                    Err(failure) => failures.push(failure),
                }
            }
            for warning in &warnings(&good) {
                output::talk(warning);
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

/// What is legal and seems to be a slip: a promise for a cluster that is in none of the workers' files that were given too.
fn warnings(files: &[(&PathBuf, Role)]) -> Vec<String> {
    let clusters = files.iter().filter_map(|(_, role)| match role {
        Role::Worker(config) => Some(&config.clusters),
        Role::Coordinator(_) => None,
    });
    let known: Vec<ClusterName> = clusters.flatten().map(|cluster| cluster.name.clone()).collect();
    let mut warnings = Vec::new();
    for (file, role) in files {
        let Role::Coordinator(config) = role else { continue };
        for unknown in config.objectives.unknown(&known) {
            warnings.push(format!("{}: warning: {unknown}", file.display()));
        }
    }
    warnings
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_for_a_cluster_of_no_worker_is_warned_of() {
        let coordinator = "signing_key = \"file:/k\"\ncatalog = { url = \"sqlite:/c\" }\nbroker = { url = \"memory\" }\n\
                           [objectives.clusters.ordres]\nrpo = \"1h\"\n";
        let worker = "name = \"w1\"\nsite = \"s\"\nstate_dir = \"/s\"\nbroker = { url = \"memory\" }\n\
                      sandbox = { directory = \"/tmp\" }\n[[clusters]]\nname = \"orders\"\nconnection = \"service=o\"\n";
        let (at, beside) = (PathBuf::from("c.toml"), PathBuf::from("w.toml"));
        let coordinator = Role::Coordinator(Box::new(configs::parse(coordinator).unwrap()));
        let mut files = vec![(&at, coordinator)];
        assert!(warnings(&files).is_empty(), "nothing is known of any worker");
        files.push((&beside, Role::Worker(Box::new(configs::parse(worker).unwrap()))));
        let told = "c.toml: warning: objectives.clusters.ordres: no cluster of this name is known; did you mean orders?";
        assert_eq!(warnings(&files), [told]);
    }
}
