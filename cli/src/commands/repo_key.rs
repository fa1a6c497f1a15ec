//! `repo key …`: the keys of a repository. What may be done to them is decided in `repository`.

use std::path::Path;

use proto::{Action, Code, Failure};
use repository::{Change, GuessCost, Keyring, KeyringReport, Slot};

use crate::args::{KeyCommand, NewKeyArgs, Output, RepositoryAt};
use crate::commands::repo;
use crate::exit::Exit;
use crate::opener::{self, Opener};
use crate::{environment, hints, output};

/// `repo key …`.
pub(crate) async fn run(command: KeyCommand, format: Output) -> Result<Exit, Failure> {
    match command {
        KeyCommand::List(at) => show(&open(&at).await?.report().await?, format),
        KeyCommand::Check(at) => {
            let report = open(&at).await?.report().await?;
            show(&report, format);
            if !report.is_sound() {
                return Ok(Exit::Findings);
            }
        }
        KeyCommand::Add { at, new, label } => {
            let keyring = put_in(&at, &new, &label, false).await?;
            output::talk(&format!(
                "Added. Check what you keep of it: `pgmuster repo key check {} {}`.",
                hints::quoted(&keyring.repository().describe()),
                opens(&new)
            ));
        }
        KeyCommand::Rotate { at, new, label } => {
            let keyring = put_in(&at, &new, &label, true).await?;
            output::talk(&format!(
                "Key {} is retired. Give the new one to every worker before it starts again.",
                keyring.opener()
            ));
        }
        KeyCommand::Retire { at, id } => {
            let keyring = open(&at).await?;
            keyring.retire(&id, &change()).await?;
            output::talk(&format!(
                "Key {id} is retired; {} opens the repository.",
                keyring.opener()
            ));
        }
    }
    Ok(Exit::Ok)
}

/// How what was added is given to a command.
fn opens(new: &NewKeyArgs) -> String {
    match (&new.new_key, &new.new_passphrase) {
        (Some(path), _) => format!("--key {}", hints::quoted(&path.display().to_string())),
        (None, reference) => {
            let reference = reference.as_deref().unwrap_or("-");
            format!("--passphrase {}", hints::quoted(reference))
        }
    }
}

fn change() -> Change {
    Change { by: repo::who(), at_ms: environment::now_ms() }
}

async fn open(at: &RepositoryAt) -> Result<Keyring, Failure> {
    let opener = Opener::read(&at.opener)?;
    Ok(Keyring::open(repo::open_store(&at.url).await?, opener.unlock()).await?)
}

fn show(report: &KeyringReport, format: Output) {
    output::show(format, report, |report| {
        let now_ms = environment::now_ms();
        let row = |key: &Slot| {
            let state = match (key.findings.as_slice(), key.opened) {
                ([], true) => "opened the repository just now".to_owned(),
                ([], false) => "as it was written".to_owned(),
                (findings, _) => findings.join("; "),
            };
            vec![
                key.id.clone(),
                key.recipient.clone().unwrap_or_default(),
                key.label.clone(),
                output::ago(now_ms, key.added_at_ms),
                key.added_by.clone().unwrap_or_default(),
                state,
            ]
        };
        let head = ["KEY", "KIND", "LABEL", "ADDED", "BY", "STATE"];
        let table = output::table(&head, report.keys.iter().map(row).collect());
        let findings = report.findings.iter().map(|finding| format!("\n{finding}"));
        table + &findings.collect::<String>()
    });
}

/// Adds a key, for the one that opens the repository or beside it, and prints its sheet. A key file is on disk before it is a
/// key of the repository.
async fn put_in(
    at: &RepositoryAt,
    new: &NewKeyArgs,
    label: &str,
    instead: bool,
) -> Result<Keyring, Failure> {
    if let Some(path) = &new.new_key {
        repo::refuse_existing(path)?;
    }
    let keyring = open(at).await?;
    let recipient = match (&new.new_key, &new.new_passphrase) {
        (Some(path), None) => {
            let recipient = keyring.new_key_file(label)?;
            let text = recipient.key_file.as_ref();
            write(path, text.ok_or_else(|| Failure::bug("a key file has no text"))?)?;
            recipient
        }
        (None, Some(reference)) => {
            let passphrase = opener::passphrase(reference)?;
            keyring.new_passphrase(&passphrase, GuessCost::default(), label).await?
        }
        _ => return Err(Failure::bug("a new key is either a file or a passphrase")),
    };
    let change = change();
    let done = if instead {
        keyring.rotate(&recipient, &change).await
    } else {
        keyring.add(&recipient, &change).await
    };
    match (done, new.new_key.as_deref()) {
        (Ok(()), _) => {}
        (Err(error @ repository::Error::Store(_)), Some(path)) => {
            return Err(repo::keep(
                error,
                &[path],
                "`pgmuster repo key list URL --key FILE` does not name it",
            ));
        }
        (Err(refused), path) => {
            path.into_iter().for_each(repo::remove_unused);
            return Err(refused.into());
        }
    }
    output::data(&recipient.recovery_sheet);
    Ok(keyring)
}

/// Writes a key file and reads it again: what is on disk is the key that is added.
fn write(path: &Path, text: &str) -> Result<(), Failure> {
    repo::write_secret(path, text.as_bytes())?;
    if std::fs::read(path).is_ok_and(|there| there == text.as_bytes()) {
        return Ok(());
    }
    let message = format!("{} does not hold what was written to it", path.display());
    Err(Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
        .with_hint("Choose a file on a disk that keeps what it is given."))
}
