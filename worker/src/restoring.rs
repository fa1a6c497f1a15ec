//! Restoring a backup: find it, say what would be done, do it. Needs a repository and nothing else.
//!
//! The result is a data directory that a server of the right version starts from: `backup_label` tells it where to begin,
//! the WAL of the backup is in `pg_wal`, tablespaces are linked to where they were put. `tablespace_map` is left out on
//! purpose: a server that finds one recreates the links of the source.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use proto::job::RestoreOutcome;
use proto::{
    Action, BackupFacts, BackupId, ClusterName, Code, Failure, Progress, SystemIdentifier,
};
use repository::{Backup, Repository, RestoreOptions, RestorePlan, RestoreTarget};

use crate::context::JobContext;
use crate::engines::native;

/// How long an attempt waits for the one before it to leave the target: that one has two minutes to clean up once it is
/// told to stop.
const PREDECESSOR_MAX: Duration = Duration::from_mins(3);
/// How often the progress of a restore is told.
const TELL_EVERY: Duration = Duration::from_millis(500);

/// Where the parts of a backup go.
#[derive(Debug, Clone)]
pub struct Destination {
    /// The data directory.
    pub data_directory: PathBuf,
    /// Each tablespace of the source by its OID. One that is not named goes to `DIRECTORY-tablespaces/OID`.
    pub tablespaces: BTreeMap<u32, PathBuf>,
}

impl Destination {
    /// A data directory with every tablespace beside it.
    pub fn below(directory: &Path, facts: &BackupFacts) -> Self {
        Self { data_directory: directory.to_owned(), tablespaces: BTreeMap::new() }.complete(facts)
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

    fn target(&self) -> RestoreTarget {
        let link = |(oid, place): (&u32, &PathBuf)| {
            (format!("pg_tblspc/{oid}").into_bytes(), place.clone())
        };
        RestoreTarget {
            directory: self.data_directory.clone(),
            mapping: self.tablespaces.iter().map(link).collect(),
            wal_directory: Some(b"pg_wal".to_vec()),
        }
    }
}

/// Finds a backup by what is known: its id, or the newest of a cluster.
pub async fn find(
    repository: &Repository,
    cluster: Option<&ClusterName>,
    system_identifier: Option<SystemIdentifier>,
    backup: Option<BackupId>,
) -> Result<Backup, Failure> {
    let mut lineages = repository.list_lineages().await?;
    lineages.retain(|identity| {
        cluster.is_none_or(|cluster| identity.cluster == *cluster)
            && system_identifier.is_none_or(|id| identity.system_identifier == id)
    });
    let place = repository.describe();
    let unknown = |what: String, hint: &str| {
        Failure::new(Code::BackupUnknown, Action::FixConfig, what).with_hint(hint)
    };
    if let (None, None) = (cluster, backup) {
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
    let mut newest: Option<(i64, BackupId, proto::LineageId)> = None;
    for identity in &lineages {
        for summary in repository.list_readable_backups(identity.lineage).await? {
            let (Some(id), Some(at_ms)) = (summary.backup(), summary.committed_at_ms()) else {
                continue;
            };
            // Whoever names one that was given up gets it, while it is there.
            let meant = match backup {
                Some(wanted) => wanted == id,
                None => !repository.is_given_up(identity.lineage, &summary).await?,
            };
            if !meant {
                continue;
            }
            newest = newest.max(Some((at_ms, id, identity.lineage)));
        }
    }
    match (newest, backup) {
        (Some((_, id, lineage)), _) => Ok(repository.open_backup(lineage, id).await?),
        (None, Some(id)) => Err(unknown(
            format!("{place} holds no committed backup {id}"),
            "pgmuster backups list shows what there is.",
        )),
        (None, None) => {
            let whose = cluster.map_or(String::new(), |cluster| format!(" of {cluster}"));
            Err(unknown(
                format!("{place} holds no committed backup{whose}"),
                "Take one: pgmuster backup CLUSTER.",
            ))
        }
    }
}

/// Says what a restore would do, and whether it could. Touches nothing.
pub async fn plan(backup: &Backup, destination: &Destination) -> Result<RestoreOutcome, Failure> {
    let plan = backup.restore_plan(destination.target()).await?;
    let (files, size_bytes) = (plan.files, plan.bytes);
    let lines = lines(backup, destination, &plan);
    plan.check()?;
    Ok(RestoreOutcome {
        planned_only: true,
        plan: lines,
        ..outcome(backup, destination, files, size_bytes, 0)
    })
}

/// Restores. What an interrupted restore of the same backup left is cleared first; everything else in the target is
/// refused. An attempt that follows another one waits until that one has left the target.
pub async fn restore(
    cx: &JobContext,
    backup: &Backup,
    destination: &Destination,
    processes: u32,
) -> Result<RestoreOutcome, Failure> {
    let target = destination.target();
    // A person who restores to where another restore is running wants to be told at once.
    if cx.spec.predecessor.is_some() {
        let waits = || {
            let step = "wait for the attempt before".to_owned();
            cx.progress(Progress { step, done: 0, total: None, unit: "bytes".to_owned() });
        };
        match target.wait_until_free(PREDECESSOR_MAX, &cx.cancel, waits).await {
            Err(_) if cx.cancel.is_cancelled() => return Err(cx.stopped()),
            waited => waited?,
        }
    }
    let plan = backup.restore_plan(target).await?;
    plan.check()?;
    let total = plan.bytes;
    let counters = Arc::new(repository::Progress::default());
    let options = RestoreOptions {
        processes: native::processes(processes),
        progress: Arc::clone(&counters),
        cancel: cx.cancel.clone(),
    };
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
            Ok(outcome(backup, destination, done.files, done.bytes, done.fetched_bytes))
        }
        Err(_) if cx.cancel.is_cancelled() => Err(cx.stopped()),
        Err(error) => Err(error.into()),
    }
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

fn outcome(
    backup: &Backup,
    destination: &Destination,
    files: u64,
    size_bytes: u64,
    fetched_bytes: u64,
) -> RestoreOutcome {
    RestoreOutcome {
        backup: backup.id(),
        directory: destination.data_directory.display().to_string(),
        files,
        size_bytes,
        fetched_bytes,
        stop_lsn: backup.facts().stop_lsn,
        planned_only: false,
        plan: Vec::new(),
    }
}

fn lines(backup: &Backup, destination: &Destination, plan: &RestorePlan) -> Vec<String> {
    let facts = backup.facts();
    let (major, minor) = (facts.server_version_num / 10_000, facts.server_version_num % 10_000);
    let mut lines = vec![
        format!("restore backup {} of {} (PostgreSQL {major}.{minor})", backup.id(), facts.cluster),
        format!(
            "write {} files and {} directories, {} bytes, below {}",
            plan.files,
            plan.directories,
            plan.bytes,
            destination.data_directory.display()
        ),
        format!("fetch {} packs, {} bytes at most", plan.inventory.packs, plan.inventory.bytes),
    ];
    if plan.resumes {
        lines.push("clear what an interrupted restore of the same backup left there".to_owned());
    }
    for (oid, place) in &destination.tablespaces {
        lines.push(format!("put tablespace {oid} into {}", place.display()));
    }
    for place in &plan.places {
        lines.push(format!(
            "need {} bytes at {}, where {} are free",
            place.needed_bytes,
            place.directory.display(),
            place.available_bytes
        ));
    }
    lines.push(format!("a server started there recovers to {} and opens", facts.stop_lsn));
    lines
}
