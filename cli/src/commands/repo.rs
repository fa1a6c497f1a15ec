//! `repo …`: what needs a repository and its key and nothing else.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use proto::{Action, BackupId, ClusterName, Code, Failure, LineageId};
use repository::{
    Amount, CollectOptions, Collected, Encryption, Fate, InitOptions, Open, Repository, Wish, store,
};
use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::args::{OpenerArgs, Output, RepoCommand};
use crate::commands::repo_key;
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, follow, output};

/// One backup, as the repository itself tells.
#[derive(Debug, Serialize)]
struct Row {
    cluster: String,
    system_identifier: String,
    backup: String,
    committed_at_ms: Option<i64>,
    proofs: u32,
    /// `given up` or `held`.
    wish: Option<&'static str>,
}

/// A backup that was given up is deleted a day later at the earliest: whoever restores it may finish, and whoever sees that
/// it was the wrong one can still restore it.
const FORGOTTEN_FOR_MS: i64 = 24 * 3_600_000;
/// What is wrong with a repository for a single writer, as the end of a sentence.
pub(crate) const SINGLE_WRITER: &str =
    "only one program at a time may write to it, because its store does not decide between two";
/// An attempt that is open for longer is dead.
const OPEN_FOR_MS: i64 = 48 * 3_600_000;

/// `repo …`.
pub(crate) async fn run(command: RepoCommand, format: Output) -> Result<Exit, Failure> {
    match command {
        RepoCommand::Init { url, key, recovery_key, single_writer } => {
            let sheet = init(&url, &key, recovery_key.as_deref(), single_writer).await?;
            output::data(&sheet);
            let (printed, talk) = match &recovery_key {
                Some(recovery) => (recovery, "Keep that file and this sheet of it away from here"),
                None => {
                    (&key, "Print this sheet and put it where the server's fire does not reach it")
                }
            };
            output::talk(&format!("The key is in {}. {talk}.", printed.display()));
            if recovery_key.is_none() {
                output::talk(
                    "It is the only one: `pgmuster repo key add` makes a second one, to be kept elsewhere.",
                );
            }
        }
        RepoCommand::Key(command) => return repo_key::run(command, format).await,
        RepoCommand::List(at) => {
            let repository = open(&at.url, &at.opener).await?;
            let rows = list(&repository).await?;
            if repository.is_single_writer() {
                output::talk(&format!("This repository is degraded: {SINGLE_WRITER}."));
            }
            output::show(format, &rows, |rows| {
                let now_ms = environment::now_ms();
                let row = |row: &Row| {
                    vec![
                        row.cluster.clone(),
                        row.system_identifier.clone(),
                        row.backup.clone(),
                        output::ago(now_ms, row.committed_at_ms),
                        row.proofs.to_string(),
                        row.wish.unwrap_or_default().to_owned(),
                    ]
                };
                let head =
                    ["CLUSTER", "SYSTEM IDENTIFIER", "BACKUP", "COMMITTED", "PROOFS", "WISH"];
                output::table(&head, rows.iter().map(row).collect())
            });
        }
        RepoCommand::Delete { at, backup, why } => {
            let repository = open(&at.url, &at.opener).await?;
            let lineage = lineage_of(&repository, backup).await?;
            repository.forget(lineage, backup, &wish(why)).await?;
            output::talk(&format!(
                "Backup {backup} is given up. From tomorrow on, `pgmuster repo gc` frees its space."
            ));
        }
        RepoCommand::Hold { at, backup, why } => {
            let repository = open(&at.url, &at.opener).await?;
            let lineage = lineage_of(&repository, backup).await?;
            repository.hold(lineage, backup, &wish(why)).await?;
            output::talk(&format!("Backup {backup} is held until `pgmuster repo release`."));
        }
        RepoCommand::Release { at, backup } => {
            let repository = open(&at.url, &at.opener).await?;
            repository.release(lineage_of(&repository, backup).await?, backup).await?;
            output::talk(&format!("Backup {backup} is not held any more."));
        }
        RepoCommand::Gc { at, cluster, plan, confirm_large, abort_open, alone } => {
            let mut repository = open(&at.url, &at.opener).await?;
            if alone {
                repository = repository.alone();
            }
            if !plan {
                repository.check_alone()?;
            }
            let how = How { plan_only: plan, confirm_large, abort_open };
            return collect(&repository, cluster.as_ref(), how, format).await;
        }
        RepoCommand::Check(args) => return super::repo_check::run(args, format).await,
    }
    Ok(Exit::Ok)
}

fn wish(why: String) -> Wish {
    Wish { by: who(), why, at_ms: environment::now_ms() }
}

/// Who does this, for people who look at it later.
pub(crate) fn who() -> String {
    let user = environment::variable("USER").unwrap_or_else(|| "somebody".to_owned());
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

async fn lineage_of(repository: &Repository, backup: BackupId) -> Result<LineageId, Failure> {
    for identity in repository.list_lineages().await? {
        let backups = repository.list_readable_backups(identity.lineage).await?;
        if backups.iter().any(|summary| summary.backup() == Some(backup)) {
            return Ok(identity.lineage);
        }
    }
    let message = format!("{} has no backup {backup}", repository.describe());
    Err(Failure::new(Code::BackupUnknown, Action::FixConfig, message)
        .with_hint("List what there is with `pgmuster repo list`."))
}

/// What became of one lineage, or would.
#[derive(Debug, Serialize)]
struct Collection {
    cluster: String,
    lineage: String,
    delete: Amount,
    keep: Amount,
    given_up: Vec<GivenUp>,
    /// Backups that are being written.
    open: Vec<Open>,
    result: String,
}

#[derive(Debug, Serialize)]
struct GivenUp {
    backup: String,
    fate: Fate,
}

/// What a collection may do.
#[derive(Debug, Clone, Copy)]
struct How {
    plan_only: bool,
    confirm_large: bool,
    abort_open: bool,
}

async fn collect(
    repository: &Repository,
    cluster: Option<&ClusterName>,
    how: How,
    format: Output,
) -> Result<Exit, Failure> {
    let options = CollectOptions {
        by: who(),
        now_ms: environment::now_ms(),
        grace_ms: FORGOTTEN_FOR_MS,
        patience_ms: how.abort_open.then_some(OPEN_FOR_MS),
        cancel: CancellationToken::new(),
    };
    let interrupted = {
        let interrupted = follow::interrupted();
        let cancel = options.cancel.clone();
        tokio::spawn(async move {
            interrupted.await;
            cancel.cancel();
        })
    };
    let mut lineages = repository.list_lineages().await?;
    lineages.retain(|identity| cluster.is_none_or(|cluster| *cluster == identity.cluster));
    if let (true, Some(cluster)) = (lineages.is_empty(), cluster) {
        let message = format!("{} has no cluster {cluster}", repository.describe());
        return Err(Failure::new(Code::ClusterUnknown, Action::FixConfig, message)
            .with_hint("List what there is with `pgmuster repo list`."));
    }
    let (mut rows, mut exit) = (Vec::new(), Exit::Ok);
    for identity in &lineages {
        let mut row = Collection {
            cluster: identity.cluster.to_string(),
            lineage: identity.lineage.to_string(),
            delete: Amount::default(),
            keep: Amount::default(),
            given_up: Vec::new(),
            open: Vec::new(),
            result: String::new(),
        };
        // One lineage that cannot be collected is no reason to leave the others.
        match collect_one(repository, identity.lineage, &options, how, &mut row).await {
            Ok(ended) if exit == Exit::Ok => exit = ended,
            Ok(_) => {}
            Err(failure) => {
                exit = Exit::of(&failure);
                row.result = format!("failed: {failure}");
            }
        }
        rows.push(row);
        if options.cancel.is_cancelled() {
            exit = Exit::Interrupted;
            break;
        }
    }
    interrupted.abort();
    output::show(format, &rows, |rows| {
        let amount =
            |amount: Amount| format!("{} in {} packs", output::bytes(amount.bytes), amount.packs);
        let row = |row: &Collection| {
            let mut said = vec![row.result.clone()];
            said.extend(row.given_up.iter().map(|given_up| {
                format!("{} {}", given_up.backup, fate(given_up.fate, options.now_ms))
            }));
            said.extend(row.open.iter().map(|open| {
                let age = output::ago(options.now_ms, Some(open.began_at_ms));
                format!("{} was begun {age} by {}", open.attempt, open.by)
            }));
            vec![row.cluster.clone(), amount(row.delete), amount(row.keep), said.join("; ")]
        };
        output::table(&["CLUSTER", "DELETE", "KEEP", "RESULT"], rows.iter().map(row).collect())
    });
    Ok(exit)
}

/// Plans the collection of one lineage, and does it if it may.
async fn collect_one(
    repository: &Repository,
    lineage: LineageId,
    options: &CollectOptions,
    how: How,
    row: &mut Collection,
) -> Result<Exit, Failure> {
    let plan = repository.plan_collection(lineage, options).await?;
    (row.delete, row.keep) = (plan.delete, plan.keep);
    let given_up = plan.forgotten.iter();
    row.given_up =
        given_up.map(|(id, fate)| GivenUp { backup: id.to_string(), fate: *fate }).collect();
    row.open.clone_from(&plan.open);
    let postponed =
        "postponed: what is being written may need it (--abort-open ends what died days ago)";
    let (result, exit) = if !plan.open.is_empty() {
        (postponed.to_owned(), if how.plan_only { Exit::Ok } else { Exit::Conflict })
    } else if plan.is_large() && !how.confirm_large {
        let result = "more than a fifth would go: look at it, then --confirm-large";
        (result.to_owned(), if how.plan_only { Exit::Ok } else { Exit::Refused })
    } else if how.plan_only {
        ("planned".to_owned(), Exit::Ok)
    } else {
        match plan.collect(options).await? {
            Collected::Nothing => ("nothing to delete".to_owned(), Exit::Ok),
            Collected::Postponed { open } => {
                row.open = open;
                (postponed.to_owned(), Exit::Conflict)
            }
            Collected::Done(done) => {
                row.delete = done.deleted;
                let aborted: Vec<String> =
                    done.aborted.iter().map(|attempt| format!("; {attempt} aborted")).collect();
                (format!("deleted{}", aborted.concat()), Exit::Ok)
            }
        }
    };
    row.result = result;
    Ok(exit)
}

/// What becomes of a backup that was given up, as the end of a sentence.
fn fate(fate: Fate, now_ms: i64) -> String {
    match fate {
        Fate::Goes => "goes".to_owned(),
        Fate::GoesAt(at_ms) => format!("goes in {}", output::duration(at_ms - now_ms)),
        Fate::Held => "is held".to_owned(),
        Fate::Needed => "is the newest or the newest proved one and stays".to_owned(),
        Fate::NotBelieved => "stays: whoever gave it up had no key".to_owned(),
    }
}

/// Opens a repository with what was typed and, for S3, the standard AWS credentials.
pub(crate) async fn open(url: &str, opener: &OpenerArgs) -> Result<Repository, Failure> {
    let opener = Opener::read(opener)?;
    Ok(Repository::open_with(open_store(url).await?, opener.unlock()).await?)
}

pub(crate) async fn open_store(url: &str) -> Result<std::sync::Arc<dyn store::Store>, Failure> {
    let store = store::open(url, &store::Credentials::default()).await;
    Ok(store.map_err(repository::Error::from)?)
}

/// Makes a repository, returns the recovery sheet: that of the recovery key, if there is one. The keys are on disk before the
/// repository is in its store: a crash in between leaves keys that open nothing, never a repository that nothing opens.
pub(crate) async fn init(
    url: &str,
    key: &Path,
    recovery_key: Option<&Path>,
    single_writer: bool,
) -> Result<String, Failure> {
    let paths: Vec<&Path> = [key].into_iter().chain(recovery_key).collect();
    for path in &paths {
        refuse_existing(path)?;
    }
    let store = open_store(url).await?;
    let found = if single_writer {
        store::probe::probe_for_a_single_writer(std::sync::Arc::clone(&store)).await
    } else {
        store::probe::probe(store.as_ref()).await
    };
    let found = found.map_err(repository::Error::from)?;
    tracing::info!(?found, "Probed {}", store.describe());
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: environment::now_ms() };
    let mut new = Repository::prepare(store, options)?;
    if single_writer {
        new = new.for_a_single_writer();
    }
    let text = new.key_file.take().ok_or_else(|| Failure::bug("a new repository has no key"))?;
    let mut sheet = std::mem::take(&mut new.recovery_sheet);
    write_secret(key, text.as_bytes())?;
    if let Some(path) = recovery_key {
        let second = new.add_key_file("recovery")?;
        let text = second.key_file.take().ok_or_else(|| Failure::bug("a key file has no text"))?;
        sheet = std::mem::take(&mut second.recovery_sheet);
        write_secret(path, text.as_bytes()).inspect_err(|_| remove_unused(key))?;
    }
    match new.create(Some(found)).await {
        Ok(_) => Ok(sheet.to_string()),
        Err(error @ repository::Error::RepositoryExists { .. }) => {
            // Certainly not its keys.
            paths.into_iter().for_each(remove_unused);
            Err(error.into())
        }
        Err(error) => Err(keep(error, &paths, "no repository was made")),
    }
}

/// A key that opens nothing is only in the way.
pub(crate) fn remove_unused(key: &Path) {
    if let Err(error) = std::fs::remove_file(key) {
        tracing::warn!("The unused key {} was not removed: {error}", key.display());
    }
}

/// What is said when it is not known whether a key opens something.
pub(crate) fn keep(error: repository::Error, keys: &[&Path], until: &str) -> Failure {
    let failure = Failure::from(error);
    let keys: Vec<String> = keys.iter().map(|key| key.display().to_string()).collect();
    let keys = keys.join(" and ");
    let message =
        format!("{}; keep the key {keys} until it is known that {until}", failure.message);
    Failure { message, ..failure }
}

pub(crate) fn refuse_existing(key: &Path) -> Result<(), Failure> {
    if !key.exists() {
        return Ok(());
    }
    let message = format!("{} exists already", key.display());
    Err(Failure::new(Code::StateConflict, Action::FixConfig, message)
        .with_hint("A key is never overwritten: give another path."))
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
        for summary in repository.list_readable_backups(identity.lineage).await? {
            rows.push(Row {
                cluster: identity.cluster.to_string(),
                system_identifier: identity.system_identifier.to_string(),
                backup: summary.attempt.to_string(),
                committed_at_ms: summary.committed_at_ms(),
                proofs: summary.proofs,
                wish: match (summary.held, summary.forgotten) {
                    (true, _) => Some("held"),
                    (false, true) => Some("given up"),
                    (false, false) => None,
                },
            });
        }
    }
    Ok(rows)
}
