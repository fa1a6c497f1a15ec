//! Restoring a backup: find it, say what would be done, do it. Needs a repository and nothing else.
//!
//! The result is a data directory that a server of the right version starts from: `backup_label` tells it where to begin,
//! the WAL of the backup is in `pg_wal`, tablespaces are linked to where they were put. `tablespace_map` is left out on
//! purpose: a server that finds one recreates the links of the source.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use postgres::recovery::RecoverySettings;
use postgres::scan::EXTERNAL_ROOT;
use proto::failure::chain;
use proto::job::RestoreOutcome;
use proto::near::did_you_mean;
use proto::words::{count, grouped};
use proto::{
    Action, BackupFacts, BackupId, BackupKind, ClusterName, Code, Failure, LineageId, Progress,
    SystemIdentifier,
};
use repository::{
    Addition, AttemptSummary, Backup, Backups, Comparison, Existing, Foreign, Identity, Lineages,
    Lost, Pin, Pinned, Repository, RestoreOptions, RestorePlan, RestoreTarget,
};

use crate::context::JobContext;
use crate::engines::native;
use crate::reuse;

/// How long an attempt waits for the one before it to leave the target: that one has two minutes to clean up once it is
/// told to stop.
const PREDECESSOR_MAX: Duration = Duration::from_mins(3);
/// Names that a restore removes and its plan tells one by one; more are counted.
const FOREIGN_NAMED_MAX: usize = 100;
/// What a copy is kept from, as a recovery says it, too.
pub(crate) const STOPS_ARCHIVING: &str =
    "set archive_mode = off, so that the copy does not write into the source's archive";
/// Tablespaces that are named where one is asked for that the backup does not have.
const TABLESPACES_NAMED_MAX: usize = 20;
/// How often the progress of a restore is told.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Where the parts of a backup go.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The data directory.
    pub data_directory: PathBuf,
    /// Each tablespace of the source by its OID. One that is not named goes to `DIRECTORY-tablespaces/OID`.
    pub tablespaces: BTreeMap<u32, PathBuf>,
    /// Whether the target may be the data directory of a stopped server of the same cluster, whose files are then used
    /// where they are right and changed or removed where they are not.
    pub delta: bool,
    /// Of what a delta restore finds, the page cache is believed and the disk is not read.
    pub believe_cache: bool,
    /// What takes its server beyond the end of the backup.
    pub recovery: Option<RecoverySettings>,
    /// A server that runs there may archive as the source did. Otherwise it is kept from that: it would write into the source's
    /// own archive. Where it recovers, `recovery` says so.
    pub keep_archiving: bool,
}

impl Destination {
    /// A data directory with every tablespace beside it.
    pub fn below(directory: &Path, facts: &BackupFacts) -> Self {
        Self {
            data_directory: directory.to_owned(),
            tablespaces: BTreeMap::new(),
            delta: false,
            believe_cache: false,
            recovery: None,
            keep_archiving: false,
        }
        .complete(facts)
    }

    /// Names a place for every tablespace that has none yet.
    #[must_use]
    pub fn complete(mut self, facts: &BackupFacts) -> Self {
        let mut beside = self.data_directory.clone().into_os_string();
        beside.push("-tablespaces");
        let beside = PathBuf::from(beside);
        for space in &facts.tablespaces {
            let place = || beside.join(space.oid.to_string());
            self.tablespaces.entry(space.oid).or_insert_with(place);
        }
        self
    }

    /// Refuses a place for a tablespace that the backup does not have: most likely its OID is another one.
    fn check(&self, backup: &Backup) -> Result<(), Failure> {
        let known = &backup.facts().tablespaces;
        let is_known = |oid: &u32| known.iter().any(|space| space.oid == *oid);
        let Some(unknown) = self.tablespaces.keys().find(|oid| !is_known(oid)) else {
            return Ok(());
        };
        let names = known.iter().take(TABLESPACES_NAMED_MAX);
        let mut names: Vec<String> =
            names.map(|space| format!("{} ({})", space.oid, space.location)).collect();
        match known.len() - names.len() {
            _ if known.is_empty() => names.push("none".to_owned()),
            0 => {}
            more => names.push(format!("{more} more")),
        }
        let id = backup.id();
        let what = format!("backup {id} has no tablespace {unknown}; it has {}", names.join(", "));
        Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(
            "Give the OIDs of this backup's tablespaces: with --plan a restore names them and where each goes.",
        ))
    }

    /// Whether a server that runs there is kept from archiving, though the source did.
    fn stops_archiving(&self, facts: &BackupFacts) -> bool {
        let mode = facts.settings.iter().find(|setting| setting.name == "archive_mode");
        self.recovery.is_none()
            && !self.keep_archiving
            && mode.is_some_and(|setting| setting.value != "off")
    }

    fn target(&self, existing: Existing, facts: &BackupFacts) -> RestoreTarget {
        let link = |(oid, place): (&u32, &PathBuf)| {
            (format!("pg_tblspc/{oid}").into_bytes(), place.clone())
        };
        RestoreTarget {
            directory: self.data_directory.clone(),
            mapping: self.tablespaces.iter().map(link).collect(),
            wal_directory: Some(b"pg_wal".to_vec()),
            existing,
            addition: self.addition(facts),
        }
    }

    /// What is written beside the files of the backup.
    fn addition(&self, facts: &BackupFacts) -> Option<Addition> {
        let names = postgres::recovery::own_names();
        let Some(settings) = self.recovery.clone() else {
            let write = Arc::new(postgres::recovery::stop_archiving);
            return self.stops_archiving(facts).then_some(Addition { names, write });
        };
        let major = major(facts);
        let write = Arc::new(move |directory: &Path| {
            let change = settings.write(directory, major)?;
            for line in &change.removed {
                tracing::info!("Removed from {}: {line}", postgres::recovery::SETTINGS_FILE);
            }
            for name in &change.overruled {
                tracing::info!("{name} in postgresql.conf no longer counts");
            }
            Ok(())
        });
        Some(Addition { names, write })
    }
}

/// Finds a physical backup by what is known: its id, or the newest of a cluster.
pub async fn find(
    repository: &Repository,
    cluster: Option<&ClusterName>,
    system_identifier: Option<SystemIdentifier>,
    backup: Option<BackupId>,
) -> Result<Backup, Failure> {
    let kind = BackupKind::Physical;
    let Located { lineage, backup, .. } =
        locate(repository, kind, cluster, system_identifier, backup).await?;
    Ok(repository.open_backup(lineage, backup).await?)
}

/// The same for whoever reads for a while: no collection of garbage takes it away until it is released.
pub async fn find_pinned(
    repository: &Repository,
    cluster: Option<&ClusterName>,
    system_identifier: Option<SystemIdentifier>,
    backup: Option<BackupId>,
    pin: &Pin,
) -> Result<Pinned, Failure> {
    let kind = BackupKind::Physical;
    find_pinned_of(kind, repository, cluster, system_identifier, backup, pin).await
}

/// The same for either kind. A backup of the other kind is refused.
pub async fn find_pinned_of(
    kind: BackupKind,
    repository: &Repository,
    cluster: Option<&ClusterName>,
    system_identifier: Option<SystemIdentifier>,
    backup: Option<BackupId>,
    pin: &Pin,
) -> Result<Pinned, Failure> {
    let Located { lineage, backup, .. } =
        locate(repository, kind, cluster, system_identifier, backup).await?;
    Ok(repository.open_pinned(lineage, backup, pin).await?)
}

/// The same for a proof, which may be of either kind: the backup that was named, or else the one that its cluster is judged by,
/// the newest physical one and where there is none the newest dump.
pub async fn find_pinned_to_prove(
    repository: &Repository,
    cluster: Option<&ClusterName>,
    system_identifier: Option<SystemIdentifier>,
    backup: Option<BackupId>,
    pin: &Pin,
) -> Result<Pinned, Failure> {
    let mut kind = BackupKind::Physical;
    if let Some(backup) = backup
        && let Some(named) = named(repository, backup).await?
    {
        kind = named.kind;
    }
    let find = |kind| find_pinned_of(kind, repository, cluster, system_identifier, backup, pin);
    match find(kind).await {
        Err(none) if backup.is_none() && none.code == Code::BackupUnknown => {
            let unknown = |failure: &Failure| failure.code == Code::BackupUnknown;
            find(BackupKind::Logical)
                .await
                .map_err(|other| if unknown(&other) { none } else { other })
        }
        found => found,
    }
}

/// Why a backup is not put back the way that was asked for.
fn other_kind(found: BackupKind, backup: BackupId) -> Failure {
    let (message, hint) = match found {
        BackupKind::Logical => (
            format!("backup {backup} is a logical one: dumps, from which no server starts"),
            format!(
                "Load it into a server: `pgmuster restore --repository URL --key FILE --backup {backup} --into-server postgres://…`."
            ),
        ),
        BackupKind::Physical => (
            format!("backup {backup} is a physical one: files, which are not loaded into a server"),
            format!(
                "Restore it into a directory: `pgmuster restore --repository URL --key FILE --backup {backup} --into DIR`."
            ),
        ),
    };
    Failure::new(Code::RequestInvalid, Action::FixConfig, message).with_hint(hint)
}

/// Whose a backup is.
struct Named {
    lineage: LineageId,
    kind: BackupKind,
    cluster: ClusterName,
    system_identifier: SystemIdentifier,
}

/// Looks for one backup. What else the repository holds may be damaged, and the identity of its lineage, too.
async fn named(repository: &Repository, backup: BackupId) -> Result<Option<Named>, Failure> {
    let Some(lineage) = repository.lineage_of_backup(backup).await? else { return Ok(None) };
    Ok(Some(match repository.identity(lineage).await {
        Ok(Identity { kind, cluster, system_identifier, .. }) => {
            Named { lineage, kind, cluster, system_identifier }
        }
        Err(error) => {
            tracing::warn!("The backup itself is asked whose it is: failed to {}", chain(&error));
            let opened = repository.open_backup(lineage, backup).await?;
            let BackupFacts { cluster, system_identifier, logical, .. } = opened.facts().clone();
            let kind = if logical.is_some() { BackupKind::Logical } else { BackupKind::Physical };
            Named { lineage, kind, cluster, system_identifier }
        }
    }))
}

/// Where the backup is that is meant.
pub(crate) struct Located {
    pub(crate) lineage: LineageId,
    /// The one that was named, or the newest that nobody gave up.
    pub(crate) backup: BackupId,
    /// Those before it, oldest first, given up or not. None where one was named.
    pub(crate) older: Vec<AttemptSummary>,
}

pub(crate) async fn locate(
    repository: &Repository,
    kind: BackupKind,
    cluster: Option<&ClusterName>,
    system_identifier: Option<SystemIdentifier>,
    backup: Option<BackupId>,
) -> Result<Located, Failure> {
    let place = repository.describe();
    let is_meant = |name: &ClusterName, id: SystemIdentifier| {
        cluster.is_none_or(|cluster| name == cluster)
            && system_identifier.is_none_or(|wanted| id == wanted)
    };
    // Whoever names one that was given up gets it, while it is there.
    if let Some(backup) = backup {
        return match named(repository, backup).await? {
            None => Err(no_backup(repository, backup).await),
            Some(Named { cluster: whose, system_identifier: of, .. }) if !is_meant(&whose, of) => {
                let what = format!("backup {backup} is one of {whose}, system identifier {of}");
                let hint = "`pgmuster backups list` shows whose backups there are.";
                Err(Failure::new(Code::BackupUnknown, Action::FixConfig, what).with_hint(hint))
            }
            Some(Named { lineage, kind: found, .. }) if found == kind => {
                Ok(Located { lineage, backup, older: Vec::new() })
            }
            Some(Named { kind: found, .. }) => Err(other_kind(found, backup)),
        };
    }
    let Lineages { readable: mut lineages, unreadable } = repository.find_lineages().await?;
    let known: BTreeSet<ClusterName> = lineages.iter().map(|row| row.cluster.clone()).collect();
    lineages.retain(|identity| is_meant(&identity.cluster, identity.system_identifier));
    for (lineage, why) in unreadable {
        if cluster.is_none() {
            return Err(Failure::from(why)
                .with_hint("Say which cluster is meant, or which backup with --backup ID."));
        }
        tracing::warn!("Lineage {lineage} is left out: failed to {}", chain(&why));
    }
    if cluster.is_none() {
        let mut names: Vec<&ClusterName> = lineages.iter().map(|row| &row.cluster).collect();
        names.sort();
        names.dedup();
        if names.len() > 1 {
            let names: Vec<&str> = names.into_iter().map(ClusterName::as_str).collect();
            return Err(Failure::new(
                Code::RequestInvalid,
                Action::FixConfig,
                format!("{place} holds backups of {} clusters: {}", names.len(), names.join(", ")),
            )
            .with_hint("Say which cluster, or which backup with --backup ID."));
        }
    }
    let mut newest: Option<(i64, Located)> = None;
    let mut unknown_newer = None;
    for identity in lineages.iter().filter(|identity| identity.kind == kind) {
        let lineage = identity.lineage;
        let Backups { readable: mut older, lost } = repository.find_backups(lineage).await?;
        let mut last = None;
        while let Some(summary) = older.pop() {
            if let (Some(backup), Some(at_ms)) = (summary.backup(), summary.committed_at_ms())
                && !repository.is_given_up(lineage, &summary).await?
            {
                last = Some((at_ms, Located { lineage, backup, older }));
                break;
            }
        }
        for Lost { backup, why } in lost {
            tracing::warn!("Backup {backup} is left out: failed to {}", chain(&why));
            // What cannot be read now may be read later, and be the one that is meant.
            let is_newer = last.as_ref().is_none_or(|(_, last)| backup > last.backup);
            if matches!(why, repository::Error::Store(_)) && is_newer {
                unknown_newer = Some((backup, why));
            }
        }
        let order = |found: &(i64, Located)| (found.0, found.1.backup, found.1.lineage);
        if last.as_ref().map(order) > newest.as_ref().map(order) {
            newest = last;
        }
    }
    if let Some((backup, why)) = unknown_newer {
        let failure = Failure::from(why);
        let message = format!("{}: nobody knows whether {backup} is the newest", failure.message);
        return Err(Failure { message, ..failure }.with_hint(
            "Make that object readable, or name the backup to be restored with --backup ID.",
        ));
    }
    if let Some((_, newest)) = newest {
        return Ok(newest);
    }
    let whose = cluster.map_or(String::new(), |cluster| format!(" of {cluster}"));
    let (what, engine) = match kind {
        BackupKind::Physical => ("committed", ""),
        BackupKind::Logical => ("committed logical", " --engine pg_dump"),
    };
    // Whoever names one may have lost everything else, and the name may be a slip.
    let (hint, meant) = match cluster {
        Some(name) if known.contains(name) => (
            format!(
                "`pgmuster backups list {name}` shows what there is; `pgmuster backup {name}{engine}` takes one."
            ),
            String::new(),
        ),
        Some(name) => (
            format!(
                "`pgmuster backups list` says whose backups there are; `pgmuster backup {name}{engine}` takes one."
            ),
            did_you_mean(name.as_str(), known.iter().map(ClusterName::as_str)),
        ),
        None => (format!("Take one: `pgmuster backup CLUSTER{engine}`."), String::new()),
    };
    let what = format!("{place} holds no {what} backup{whose}{meant}");
    Err(Failure::new(Code::BackupUnknown, Action::FixConfig, what).with_hint(hint))
}

/// Says of a backup that is not there what became of it, or which one was probably meant.
pub async fn no_backup(repository: &Repository, backup: BackupId) -> Failure {
    let place = repository.describe();
    let message = if matches!(repository.was_deleted(backup).await, Ok(true)) {
        format!("backup {backup} was given up, and is deleted from {place}")
    } else {
        // It is a help: where it cannot be had there is none.
        let there = there(repository).await.unwrap_or_default();
        let meant = did_you_mean(&backup.to_string(), there.iter().map(String::as_str));
        format!("{place} holds no committed backup {backup}{meant}")
    };
    Failure::new(Code::BackupUnknown, Action::FixConfig, message)
        .with_hint("`pgmuster backups list` shows what there is.")
}

/// The ids of all backups that nobody gave up.
async fn there(repository: &Repository) -> Result<Vec<String>, repository::Error> {
    let mut ids = Vec::new();
    for identity in repository.find_lineages().await?.readable {
        let held = repository.held_by_name(identity.lineage).await?;
        ids.extend(held.iter().map(ToString::to_string));
    }
    Ok(ids)
}

/// Says what a restore would do, and whether it could. Touches nothing, but reads whatever may be used again.
pub async fn plan(
    cx: &JobContext,
    backup: &Backup,
    destination: &Destination,
    processes: u32,
) -> Result<RestoreOutcome, Failure> {
    destination.check(backup)?;
    let existing = reuse::examine(destination, backup.facts().system_identifier)?;
    let plan = backup.restore_plan(destination.target(existing, backup.facts())).await?;
    let (files, size_bytes) = (plan.files, plan.bytes);
    let mut compared = None;
    if plan.reuses() {
        let options = options(cx, processes);
        compared = Some(match plan.compare(&options).await {
            Err(_) if cx.cancel.is_cancelled() => return Err(cx.stopped()),
            compared => compared?,
        });
    }
    let lines = lines(backup, destination, &plan, compared);
    plan.check()?;
    let Comparison { reused_bytes, fetch_bytes } = compared.unwrap_or_default();
    Ok(RestoreOutcome {
        planned_only: true,
        plan: lines,
        reused_bytes,
        ..outcome(backup, destination, files, size_bytes, fetch_bytes)
    })
}

fn options(cx: &JobContext, processes: u32) -> RestoreOptions {
    RestoreOptions {
        processes: native::processes(processes),
        progress: Arc::default(),
        cancel: cx.cancel.clone(),
    }
}

/// Restores. What an interrupted restore of the same backup left is gone on with; everything else in the target is refused,
/// unless it may be used again. An attempt that follows another one waits until that one has left the target.
pub async fn restore(
    cx: &JobContext,
    backup: &Backup,
    destination: &Destination,
    processes: u32,
) -> Result<RestoreOutcome, Failure> {
    destination.check(backup)?;
    // A person who restores to where another restore is running wants to be told at once.
    if cx.spec.predecessor.is_some() {
        let waits = || {
            let step = "wait for the attempt before".to_owned();
            cx.progress(Progress { step, done: 0, total: None, unit: "bytes".to_owned() });
        };
        let target = destination.target(Existing::Resume, backup.facts());
        match target.wait_until_free(PREDECESSOR_MAX, &cx.cancel, waits).await {
            Err(_) if cx.cancel.is_cancelled() => return Err(cx.stopped()),
            waited => waited?,
        }
    }
    let (existing, lock) = reuse::occupy(destination, backup.facts().system_identifier)?;
    let plan = backup.restore_plan(destination.target(existing, backup.facts())).await?;
    plan.check()?;
    let total = plan.bytes;
    let options = options(cx, processes);
    let counters = Arc::clone(&options.progress);
    let tell = async {
        let mut ticks = tokio::time::interval(TELL_EVERY);
        loop {
            ticks.tick().await;
            let done = counters.snapshot().bytes;
            let unit = "bytes".to_owned();
            cx.progress(Progress { step: "restore".to_owned(), done, total: Some(total), unit });
        }
    };
    let restored = tokio::select! {
        restored = plan.restore(options) => restored,
        () = tell => return Err(Failure::bug("the progress of a restore ended before the restore")),
    };
    match restored {
        Ok(done) => {
            private(&destination.data_directory)?;
            drop(lock);
            let outcome = outcome(backup, destination, done.files, done.bytes, done.fetched_bytes);
            let settings_apart = settings_apart(&destination.data_directory);
            Ok(RestoreOutcome { reused_bytes: done.reused_bytes, settings_apart, ..outcome })
        }
        Err(_) if cx.cancel.is_cancelled() => Err(cx.stopped()),
        Err(error) => Err(error.into()),
    }
}

/// Where the settings are of a server that has none in its data directory, as Debian's packages make them.
fn settings_apart(directory: &Path) -> Option<String> {
    let apart = directory.join(EXTERNAL_ROOT);
    let is_without = !directory.join("postgresql.conf").exists();
    (is_without && apart.is_dir()).then(|| apart.display().to_string())
}

/// A server refuses a data directory that others may enter.
fn private(directory: &Path) -> Result<(), Failure> {
    let mode = std::fs::Permissions::from_mode(0o700);
    std::fs::set_permissions(directory, mode).map_err(|error| {
        let message = format!("failed to make {} private: {error}", directory.display());
        Failure::new(Code::TargetUnwritable, Action::FixConfig, message)
            .with_hint("The directory must belong to the user who restores.")
    })
}

/// How many of the files that a restore writes, and of their bytes, are WAL.
fn wal_among(backup: &Backup, files: u64, bytes: u64) -> (u64, u64) {
    let counts = backup.counts();
    (counts.wal_files.min(files), bytes.saturating_sub(counts.bytes))
}

fn outcome(
    backup: &Backup,
    destination: &Destination,
    files: u64,
    size_bytes: u64,
    fetched_bytes: u64,
) -> RestoreOutcome {
    let (wal_files, wal_bytes) = wal_among(backup, files, size_bytes);
    RestoreOutcome {
        backup: backup.id(),
        directory: destination.data_directory.display().to_string(),
        files,
        size_bytes,
        wal_files,
        wal_bytes,
        fetched_bytes,
        reused_bytes: 0,
        stop_lsn: backup.facts().stop_lsn,
        planned_only: false,
        plan: Vec::new(),
        recovery: None,
        archiving_stopped: destination.stops_archiving(backup.facts()),
        settings_apart: None,
    }
}

/// WAL that comes with a backup, told apart from its files as everywhere.
fn and_wal(files: u64, bytes: u64) -> String {
    if files == 0 {
        return String::new();
    }
    format!(", and {} of WAL, {}", count(files, "file"), count(bytes, "byte"))
}

/// What was restored, in numbers.
pub(crate) fn numbers(done: &RestoreOutcome) -> String {
    let (wal_files, wal_bytes) = (done.wal_files, done.wal_bytes);
    let (files, bytes) = (done.files - wal_files, done.size_bytes - wal_bytes);
    let wal = and_wal(wal_files, wal_bytes);
    format!("{}, {}{wal}", count(files, "file"), count(bytes, "byte"))
}

fn lines(
    backup: &Backup,
    destination: &Destination,
    plan: &RestorePlan,
    compared: Option<Comparison>,
) -> Vec<String> {
    let facts = backup.facts();
    let (major, minor) = (facts.server_version_num / 10_000, facts.server_version_num % 10_000);
    let (wal_files, wal_bytes) = wal_among(backup, plan.files, plan.bytes);
    let mut lines = vec![
        format!("restore backup {} of {} (PostgreSQL {major}.{minor})", backup.id(), facts.cluster),
        format!(
            "write {} in {}, {}{}, below {}",
            count(plan.files - wal_files, "file"),
            match plan.directories {
                1 => "1 directory".to_owned(),
                n => format!("{} directories", grouped(n)),
            },
            count(plan.bytes - wal_bytes, "byte"),
            and_wal(wal_files, wal_bytes),
            destination.data_directory.display()
        ),
    ];
    let (packs, bytes) = (plan.inventory.packs, plan.inventory.bytes);
    lines.push(match compared {
        Some(Comparison { reused_bytes: reused, fetch_bytes: fetched }) => {
            let (fetched, reused) = (count(fetched, "byte"), count(reused, "byte"));
            format!("fetch {fetched}; {reused} on disk are right already")
        }
        None => format!("fetch {}, {} at most", count(packs, "pack"), count(bytes, "byte")),
    });
    if plan.resumes {
        lines.push("go on with an interrupted restore".to_owned());
    }
    lines.extend(removals(&plan.foreign));
    if destination.delta {
        for (oid, place) in reuse::left_alone(destination) {
            let place = place.display();
            lines.push(format!(
                "leave {place} alone, where tablespace {oid} is now; --tablespace {oid}={place} would use it again"
            ));
        }
    }
    for (oid, place) in &destination.tablespaces {
        lines.push(format!("put tablespace {oid} into {}", place.display()));
    }
    for place in &plan.places {
        lines.push(format!(
            "need {} at {}, where {} are free",
            count(place.needed_bytes, "byte"),
            place.directory.display(),
            grouped(place.available_bytes)
        ));
    }
    if destination.stops_archiving(facts) {
        lines.push(STOPS_ARCHIVING.to_owned());
    }
    // Where it goes beyond, its own plan says where.
    if destination.recovery.is_none() {
        lines.push(format!("a server started there recovers to {} and opens", facts.stop_lsn));
    }
    lines
}

fn major(facts: &BackupFacts) -> u32 {
    facts.server_version_num / 10_000
}

/// What goes because the backup does not have it.
fn removals(foreign: &[Foreign]) -> Vec<String> {
    let line = |foreign: &Foreign| match foreign.names {
        1 => format!("remove {}, {}", foreign.path.display(), count(foreign.bytes, "byte")),
        names => {
            let inside = count(names - 1, "name");
            let (path, bytes) = (foreign.path.display(), count(foreign.bytes, "byte"));
            format!("remove {path} and {inside} in it, {bytes}")
        }
    };
    let mut lines: Vec<String> = foreign.iter().take(FOREIGN_NAMED_MAX).map(line).collect();
    let rest = foreign.get(FOREIGN_NAMED_MAX..).unwrap_or_default();
    if !rest.is_empty() {
        let names: u64 = rest.iter().map(|foreign| foreign.names).sum();
        let bytes: u64 = rest.iter().map(|foreign| foreign.bytes).sum();
        lines.push(format!("remove {} more names, {}", grouped(names), count(bytes, "byte")));
    }
    lines
}
