//! `repo init` and `repo list`: what needs a repository and nothing else.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use proto::{Action, Code, Failure, SecretRef};
use repository::{Encryption, InitOptions, KeyFile, Repository, store};
use secrecy::ExposeSecret as _;
use serde::Serialize;

use crate::args::{Output, RepoCommand};
use crate::exit::Exit;
use crate::{environment, output, secrets};

/// One backup, as the repository itself tells.
#[derive(Debug, Serialize)]
struct Row {
    cluster: String,
    system_identifier: String,
    backup: String,
    committed_at_ms: Option<i64>,
    proofs: u32,
}

/// `repo …`.
pub(crate) async fn run(command: RepoCommand, format: Output) -> Result<Exit, Failure> {
    match command {
        RepoCommand::Init { url, key } => {
            let sheet = init(&url, &key).await?;
            output::data(&sheet);
            output::talk(&format!(
                "The key is in {}. Print this sheet and put it where the server's fire does not reach it.",
                key.display()
            ));
        }
        RepoCommand::List { url, key } => {
            let rows = list(&open(&url, &key).await?).await?;
            output::show(format, &rows, |rows| {
                let now_ms = environment::now_ms();
                let row = |row: &Row| {
                    vec![
                        row.cluster.clone(),
                        row.system_identifier.clone(),
                        row.backup.clone(),
                        output::ago(now_ms, row.committed_at_ms),
                        row.proofs.to_string(),
                    ]
                };
                let head = ["CLUSTER", "SYSTEM IDENTIFIER", "BACKUP", "COMMITTED", "PROOFS"];
                output::table(&head, rows.iter().map(row).collect())
            });
        }
    }
    Ok(Exit::Ok)
}

/// Opens a repository with a key file and, for S3, the standard AWS credentials.
pub(crate) async fn open(url: &str, key: &Path) -> Result<Repository, Failure> {
    let text = secrets::resolve(&SecretRef::File(key.display().to_string()))?;
    let key: KeyFile = text.expose_secret().parse().map_err(|error| {
        let message = format!("{}: failed to {error}", key.display());
        Failure::new(Code::KeyWrong, Action::FixConfig, message)
            .with_hint("Give the key file that was written when the repository was made.")
    })?;
    let store = open_store(url).await?;
    Ok(Repository::open(store, Some(&key)).await?)
}

async fn open_store(url: &str) -> Result<std::sync::Arc<dyn store::Store>, Failure> {
    let store = store::open(url, &store::Credentials::default()).await;
    Ok(store.map_err(repository::Error::from)?)
}

/// Makes a repository, returns the recovery sheet. The key is on disk before the repository is in its store: a crash in
/// between leaves a key that opens nothing, never a repository that nothing opens.
pub(crate) async fn init(url: &str, key: &Path) -> Result<String, Failure> {
    if key.exists() {
        let message = format!("{} exists already", key.display());
        return Err(Failure::new(Code::StateConflict, Action::FixConfig, message)
            .with_hint("A key is never overwritten: give another path."));
    }
    let store = open_store(url).await?;
    let found = store::probe::probe(store.as_ref()).await.map_err(repository::Error::from)?;
    tracing::info!(?found, "Probed {}", store.describe());
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: environment::now_ms() };
    let mut new = Repository::prepare(store, options)?;
    let text = new.key_file.take().ok_or_else(|| Failure::bug("a new repository has no key"))?;
    let sheet = std::mem::take(&mut new.recovery_sheet);
    write_secret(key, text.as_bytes())?;
    match new.create(Some(found)).await {
        Ok(_) => Ok(sheet.to_string()),
        Err(error @ repository::Error::RepositoryExists { .. }) => {
            // Certainly not its key.
            if let Err(error) = std::fs::remove_file(key) {
                tracing::warn!("The unused key {} was not removed: {error}", key.display());
            }
            Err(error.into())
        }
        Err(error) => {
            let mut failure = Failure::from(error);
            failure.message.push_str("; keep the key ");
            failure.message.push_str(&key.display().to_string());
            failure.message.push_str(" until it is known that no repository was made");
            Err(failure)
        }
    }
}

/// Writes a new file that only its owner can read.
pub(crate) fn write_secret(path: &Path, content: &[u8]) -> Result<(), Failure> {
    let write = || {
        let mut file =
            std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        let written = file.write_all(content).and_then(|()| file.sync_all()).and_then(|()| {
            // The name must last as well.
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            std::fs::File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        });
        // Half a secret would be in the way of the whole one.
        written.inspect_err(|_| drop(std::fs::remove_file(path)))
    };
    let written: std::io::Result<()> = write();
    written.map_err(|error| {
        let message = format!("failed to write {}: {error}", path.display());
        Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
            .with_hint("Choose a directory this user may write to.")
    })
}

async fn list(repository: &Repository) -> Result<Vec<Row>, Failure> {
    let mut rows = Vec::new();
    for identity in repository.list_lineages().await? {
        for summary in repository.list_backups(identity.lineage).await? {
            rows.push(Row {
                cluster: identity.cluster.to_string(),
                system_identifier: identity.system_identifier.to_string(),
                backup: summary.attempt.to_string(),
                committed_at_ms: summary.committed_at_ms(),
                proofs: summary.proofs,
            });
        }
    }
    Ok(rows)
}
