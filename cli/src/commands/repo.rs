//! `repo …`: what needs a repository and its key and nothing else.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use async_trait::async_trait;
use proto::copies::BackupCopy;
use proto::failure::chain;
use proto::near::did_you_mean;
use proto::{Action, BackupId, BackupKind, ClusterName, Code, Failure, LineageId};
use repository::{
    Backups, Encryption, Identity, InitOptions, Lineages, Lost, Repository, WalAmount, Wish, paths,
    store,
};
use serde::Serialize;
use worker::archive::Whose;
use worker::archive::service::{OpenArchive, another_repository};
use worker::restoring::no_backup;

use crate::args::{BackupRef, OpenerArgs, Output, RepoCommand};
use crate::backup_ref::Known;
use crate::commands::{copy, gc, repo_key};
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, output};

/// One backup, as the repository itself tells.
#[derive(Debug, Serialize)]
struct Row {
    cluster: String,
    system_identifier: String,
    lineage: LineageId,
    kind: BackupKind,
    backup: String,
    committed_at_ms: Option<i64>,
    /// Bytes of its files, as they are restored.
    size_bytes: Option<u64>,
    /// Bytes that it added to the repository.
    stored_bytes: Option<u64>,
    proofs: u32,
    /// Copies of it that it knows of.
    copies: Vec<BackupCopy>,
    /// `given up` or `held`.
    wish: Option<&'static str>,
}

/// What is wrong with a repository for a single writer, as the end of a sentence.
pub(crate) const SINGLE_WRITER: &str =
    "only one program at a time may write to it, because its store does not decide between two";

/// `repo …`.
pub(crate) async fn run(command: RepoCommand, format: Output) -> Result<Exit, Failure> {
    match command {
        RepoCommand::Init { url, key, recovery_key, single_writer } => {
            let sheet = init(&url, &key, recovery_key.as_deref(), single_writer).await?;
            output::data(&sheet);
            output::talk(&kept(&key, recovery_key.as_deref()));
        }
        RepoCommand::Key(command) => return repo_key::run(command, format).await,
        RepoCommand::List(at) => {
            let repository = open(&at.url, &at.opener).await?;
            let (rows, unreadable) = list(&repository).await?;
            if repository.is_single_writer() {
                output::talk(&format!("This repository is degraded: {SINGLE_WRITER}."));
            }
            output::show(format, &rows, |rows| {
                let now_ms = environment::now_ms();
                let row = |row: &Row| {
                    vec![
                        row.cluster.clone(),
                        row.system_identifier.clone(),
                        row.kind.to_string(),
                        row.backup.clone(),
                        output::ago(now_ms, row.committed_at_ms),
                        row.size_bytes.map_or_else(String::new, output::bytes),
                        row.stored_bytes.map_or_else(String::new, output::bytes),
                        row.proofs.to_string(),
                        row.copies.len().to_string(),
                        row.wish.unwrap_or_default().to_owned(),
                    ]
                };
                let head = [
                    "CLUSTER",
                    "SYSTEM IDENTIFIER",
                    "KIND",
                    "BACKUP",
                    "COMMITTED",
                    "SIZE",
                    "STORED",
                    "PROOFS",
                    "COPIES",
                    "WISH",
                ];
                output::table(&head, rows.iter().map(row).collect())
            });
            for line in &unreadable {
                output::talk(line);
            }
            return Ok(if unreadable.is_empty() { Exit::Ok } else { Exit::SomeFailed });
        }
        RepoCommand::Delete { at, backup, why, damaged } => {
            let repository = open(&at.url, &at.opener).await?;
            wish(&repository, &backup, Deed::Delete { damaged }, why).await?;
        }
        RepoCommand::Undelete { at, backup, why } => {
            let repository = open(&at.url, &at.opener).await?;
            wish(&repository, &backup, Deed::Undelete, why).await?;
        }
        RepoCommand::Hold { at, backup, why } => {
            let repository = open(&at.url, &at.opener).await?;
            wish(&repository, &backup, Deed::Hold, why).await?;
        }
        RepoCommand::Release { at, backup } => {
            let repository = open(&at.url, &at.opener).await?;
            wish(&repository, &backup, Deed::Release, String::new()).await?;
        }
        RepoCommand::Check(args) => return super::repo_check::run(args, format).await,
        RepoCommand::Gc {
            at,
            cluster,
            plan,
            confirm_large,
            abort_open,
            drop_pins_older_than,
            drop_lists_older_than,
            alone,
        } => {
            let mut repository = open(&at.url, &at.opener).await?;
            if alone {
                repository = repository.alone();
            }
            if !plan {
                repository.check_alone()?;
            }
            let how = gc::How {
                plan_only: plan,
                confirm_large,
                abort_open,
                pins_for_hours: drop_pins_older_than,
                lists_for_hours: drop_lists_older_than,
            };
            return gc::run(&repository, cluster.as_ref(), how, format).await;
        }
        RepoCommand::Copy(args) => return copy::run(args, format).await,
    }
    Ok(Exit::Ok)
}

/// What is said of the keys of a new repository: what they are, where to keep them, what is lost with them.
fn kept(key: &Path, recovery_key: Option<&Path>) -> String {
    let key = key.display();
    match recovery_key {
        Some(recovery) => format!(
            "The key is in {key}. The recovery key is in {}, and this sheet is the same on paper: it opens every backup when {key} is \
             lost. Keep both away from this machine. Without any key every backup is lost.",
            recovery.display()
        ),
        None => format!(
            "The key is in {key}, and this sheet is the same on paper. Print it and keep it away from this machine: without any key every \
             backup is lost. A second key, to be kept elsewhere: `pgmuster repo key add URL --key FILE --new-key NEW_FILE`."
        ),
    }
}

/// What somebody wishes for a backup.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Deed {
    Delete {
        /// What cannot be used.
        damaged: bool,
    },
    Undelete,
    Hold,
    Release,
}

impl Deed {
    /// The command of `repo` and of `backups`.
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Self::Delete { .. } => "delete",
            Self::Undelete => "undelete",
            Self::Hold => "hold",
            Self::Release => "release",
        }
    }
}

/// Writes a wish beside a backup, and says what follows from it.
pub(crate) async fn wish(
    repository: &Repository,
    backup: &BackupRef,
    deed: Deed,
    why: String,
) -> Result<(), Failure> {
    let backup = meant(repository, None, None, backup).await?;
    let wish = Wish { by: who(), why, at_ms: environment::now_ms() };
    let lineage = async || lineage_of(repository, backup).await;
    let said = match deed {
        Deed::Delete { damaged } => {
            if damaged {
                forget_damaged(repository, backup, &wish).await?;
            } else {
                repository.forget(lineage().await?, backup, &wish).await?;
            }
            "is given up. From tomorrow on, `pgmuster repo gc URL --key FILE` frees its space"
                .to_owned()
        }
        Deed::Undelete => {
            repository.remember(lineage().await?, backup, &wish).await?;
            "is whole, and stays".to_owned()
        }
        Deed::Hold => {
            repository.hold(lineage().await?, backup, &wish).await?;
            format!("is held until `pgmuster repo release URL --key FILE {backup}`")
        }
        Deed::Release => {
            repository.release(lineage().await?, backup, &wish).await?;
            "is not held any more".to_owned()
        }
    };
    output::talk(&format!("Backup {backup} {said}."));
    Ok(())
}

/// Who does this, for people who look at it later.
pub(crate) fn who() -> String {
    let user = environment::variable("USER").unwrap_or_else(|| "somebody".to_owned());
    format!("{user}@{}", rustix::system::uname().nodename().to_string_lossy())
}

async fn lineage_of(repository: &Repository, backup: BackupId) -> Result<LineageId, Failure> {
    match repository.lineage_of_backup(backup).await? {
        Some(lineage) => Ok(lineage),
        None => Err(no_backup(repository, backup).await),
    }
}

/// The backup that is meant by what was typed, of a cluster and kind where they are said. Whether one that is named by its whole id is
/// there turns out when it is used.
pub(crate) async fn meant(
    repository: &Repository,
    cluster: Option<&ClusterName>,
    kind: Option<BackupKind>,
    typed: &BackupRef,
) -> Result<BackupId, Failure> {
    if let BackupRef::Id(id) = typed {
        return Ok(*id);
    }
    let mut lineages = lineages(repository, cluster).await?.readable;
    lineages.retain(|identity| kind.is_none_or(|kind| kind == identity.kind));
    let mut known = Vec::new();
    for Identity { lineage, cluster, .. } in lineages {
        let Backups { readable, lost } = repository.find_backups(lineage).await?;
        let proved = match typed {
            BackupRef::Proved => repository.newest_proved(lineage, &readable).await?,
            _ => None,
        };
        let one = |id, at_ms, is_wanted| Known {
            id,
            cluster: cluster.clone(),
            at_ms,
            is_wanted,
            is_proved: proved == Some(id),
        };
        for summary in &readable {
            let Some(id) = summary.backup() else { continue };
            let is_wanted = !summary.forgotten || !repository.is_given_up(lineage, summary).await?;
            known.push(one(id, summary.committed_at_ms(), is_wanted));
        }
        known.extend(lost.iter().map(|lost| one(lost.backup, None, false)));
    }
    typed.among(&known, &repository.describe())
}

/// How much of a WAL archive, for people.
pub(crate) fn files(amount: WalAmount) -> String {
    let noun = if amount.files == 1 { "file" } else { "files" };
    format!("{} in {} {noun}", output::bytes(amount.bytes), amount.files)
}

/// The lineages of a cluster, or all. Of those that cannot be read nobody knows whose they are: they are told where all are meant.
pub(crate) async fn lineages(
    repository: &Repository,
    cluster: Option<&ClusterName>,
) -> Result<Lineages, Failure> {
    let mut lineages = repository.find_lineages().await?;
    let names: Vec<String> =
        lineages.readable.iter().map(|identity| identity.cluster.to_string()).collect();
    lineages.readable.retain(|identity| cluster.is_none_or(|cluster| *cluster == identity.cluster));
    let unreadable = lineages.unreadable.len();
    let meant = cluster.map_or_else(String::new, |cluster| {
        did_you_mean(cluster.as_str(), names.iter().map(String::as_str))
    });
    if cluster.is_some() {
        for (lineage, why) in lineages.unreadable.drain(..) {
            tracing::warn!("Lineage {lineage} is left out: failed to {}", chain(&why));
        }
    }
    match cluster {
        Some(cluster) if lineages.readable.is_empty() => {
            let known = match unreadable {
                0 => String::new(),
                some => format!(", as far as its lineages can be read: {some} cannot"),
            };
            let message =
                format!("{} has no cluster {cluster}{known}{meant}", repository.describe());
            Err(no_cluster(message))
        }
        _ => Ok(lineages),
    }
}

/// That a repository does not have the cluster that somebody named.
pub(super) fn no_cluster(message: String) -> Failure {
    Failure::new(Code::ClusterUnknown, Action::FixConfig, message)
        .with_hint("`pgmuster repo list URL --key FILE` shows what there is.")
}

/// Gives up what stands in the way of every collection, in whichever lineage it is.
async fn forget_damaged(
    repository: &Repository,
    backup: BackupId,
    wish: &Wish,
) -> Result<(), Failure> {
    let Some(lineage) = repository.lineage_of(backup.into()).await? else {
        return Err(no_backup(repository, backup).await);
    };
    Ok(repository.forget_damaged(lineage, backup.into(), wish).await?)
}

/// A repository that was named on the command line.
#[derive(Debug)]
pub(crate) struct Named {
    pub(crate) url: String,
    pub(crate) opener: Opener,
}

impl Named {
    /// Opens it with what was typed and, for S3, the standard AWS credentials.
    pub(crate) async fn open(&self) -> Result<Repository, Failure> {
        let store = open_store(&self.url).await?;
        let what = format!("opening {}", store.describe());
        let opened = Repository::open_with(store, self.opener.unlock());
        Ok(output::told_when_slow(&what, opened).await?)
    }
}

#[async_trait]
impl OpenArchive for Named {
    async fn open(&self, _: Whose, named: Option<String>) -> Result<Repository, Failure> {
        match named {
            Some(named) if named != self.url => Err(another_repository(&named)),
            _ => self.open().await,
        }
    }
}

/// Opens a repository with what was typed.
pub(crate) async fn open(url: &str, opener: &OpenerArgs) -> Result<Repository, Failure> {
    Named { url: url.to_owned(), opener: Opener::read(opener)? }.open().await
}

pub(crate) async fn open_store(url: &str) -> Result<std::sync::Arc<dyn store::Store>, Failure> {
    let store = store::open(url, &store::Credentials::default()).await;
    Ok(store.map_err(repository::Error::from)?)
}

/// What lies in a directory of a server is lost with it.
pub(crate) fn refuse_in_server(what: &str, place: Option<&Path>) -> Result<(), Failure> {
    // Where that cannot be seen, what is to be written there says why.
    let Some(servers) = place.and_then(|place| paths::servers_around(place).ok().flatten()) else {
        return Ok(());
    };
    let what = format!("{what} would lie inside {servers} of a server");
    Err(Failure::new(Code::DataDirectoryShape, Action::FixConfig, what).with_hint(
        "It would be lost with the server. Give another place, at best on another machine or in a bucket.",
    ))
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
    refuse_in_server("a repository there", store.directory())?;
    for path in &paths {
        refuse_in_server(&format!("the key {}", path.display()), Some(path))?;
    }
    let probed = async {
        if single_writer {
            store::probe::probe_for_a_single_writer(std::sync::Arc::clone(&store)).await
        } else {
            store::probe::probe(store.as_ref()).await
        }
    };
    let what = format!("finding out what {} can do", store.describe());
    let found = output::told_when_slow(&what, probed).await;
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

/// Every backup, and what is said of those that cannot be read.
async fn list(repository: &Repository) -> Result<(Vec<Row>, Vec<String>), Failure> {
    let (mut rows, mut unreadable) = (Vec::new(), Vec::new());
    let lineages = lineages(repository, None).await?;
    for (lineage, why) in lineages.unreadable {
        unreadable.push(format!("Lineage {lineage} cannot be listed: failed to {}", chain(&why)));
    }
    for identity in lineages.readable {
        let backups = repository.find_backups(identity.lineage).await?;
        let told = repository.copies(identity.lineage).await?;
        let place = repository.describe();
        let copies_of = |backup: Option<BackupId>| {
            let copies = told.iter().flat_map(|copies| copies.each(&place));
            copies.filter(|(of, _)| Some(*of) == backup).map(|(_, copy)| copy).collect()
        };
        for Lost { backup, why } in backups.lost {
            let (cluster, why) = (&identity.cluster, chain(&why));
            unreadable
                .push(format!("Backup {backup} of {cluster} cannot be used: failed to {why}"));
        }
        for summary in backups.readable {
            let counts = summary.counts();
            rows.push(Row {
                cluster: identity.cluster.to_string(),
                system_identifier: identity.system_identifier.to_string(),
                lineage: identity.lineage,
                kind: identity.kind,
                backup: summary.attempt.to_string(),
                committed_at_ms: summary.committed_at_ms(),
                size_bytes: counts.map(|counts| counts.bytes),
                stored_bytes: counts.map(|counts| counts.stored_bytes),
                proofs: summary.proofs,
                copies: copies_of(summary.backup()),
                wish: match (summary.held, summary.forgotten) {
                    (true, _) => Some("held"),
                    (false, true) => Some("given up"),
                    (false, false) => None,
                },
            });
        }
    }
    Ok((rows, unreadable))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_new_keys_is_said_what_each_is_and_what_is_lost_without_them() {
        let (key, recovery) = (Path::new("main.key"), Path::new("recovery.key"));
        let both = kept(key, Some(recovery));
        assert!(both.contains("The recovery key is in recovery.key"), "{both}");
        let alone = kept(key, None);
        assert!(alone.contains("--new-key") && !alone.contains("recovery"), "{alone}");
        for said in [both, alone] {
            assert!(said.contains("away from this machine"), "{said}");
            assert!(said.contains("Without any key") || said.contains("without any key"), "{said}");
        }
    }

    #[test]
    fn no_repository_is_made_in_a_directory_of_a_server() {
        let place = tempfile::tempdir().unwrap();
        for directory in ["data/global", "space/PG_15_202209061"] {
            std::fs::create_dir_all(place.path().join(directory)).unwrap();
        }
        std::fs::write(place.path().join("data/global/pg_control"), "").unwrap();
        let refused = |name: &str| {
            refuse_in_server("it", Some(&place.path().join(name))).map_err(|failure| failure.code)
        };
        assert_eq!(refused("repository"), Ok(()));
        assert_eq!(refused("space/repository"), Ok(()), "beside what the server has there");
        assert!(refuse_in_server("it", None).is_ok(), "a bucket");
        for inside in ["data", "data/repository", "data/a/b", "space/PG_15_202209061/x"] {
            assert_eq!(refused(inside), Err(Code::DataDirectoryShape), "{inside}");
        }
    }
}
