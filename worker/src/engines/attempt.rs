//! What of an attempt in a repository is the same for all engines: how it is written, its beginning, and its giving up.

use std::sync::Arc;
use std::time::Duration;

use proto::job::Backup;
use proto::{BackupKind, Failure, LineageId, SystemIdentifier};
use repository::{Aborted, Intent, Progress, Repository, WriteOptions};

use super::native::{at_most, processes};
use crate::clock;
use crate::config::BackupConfig;
use crate::context::JobContext;

/// Marking a failed attempt as aborted is a courtesy to the next one; it must not hold up the report.
const ABORT_MAX: Duration = Duration::from_secs(10);

/// How a backup is written, as far as it was ordered or configured. An order can only ask for less.
pub(super) fn as_ordered(
    cx: &JobContext,
    task: &Backup,
    config: &BackupConfig,
    progress: &Arc<Progress>,
) -> WriteOptions {
    WriteOptions {
        processes: at_most(
            processes(config.processes),
            task.processes.and_then(|asked| usize::try_from(asked).ok()),
        ),
        nice: config.nice,
        level: task.compression_level.unwrap_or(config.compression_level),
        reread_within: config.reread_within(),
        checkpoint_every: Duration::from_secs(config.checkpoint_s.into()),
        progress: Arc::clone(progress),
        cancel: cx.cancel.clone(),
        ..WriteOptions::default()
    }
}

/// Where an attempt begins.
pub(super) struct Beginning<'a> {
    pub(super) repository: &'a Repository,
    /// Who works on it, for people.
    pub(super) by: &'a str,
    pub(super) kind: BackupKind,
}

impl Beginning<'_> {
    /// Writes the intent; whatever the attempt before this one still does, it can no longer commit.
    pub(super) async fn begin(
        &self,
        cx: &JobContext,
        identifier: SystemIdentifier,
    ) -> Result<repository::Attempt, Failure> {
        let now_ms = clock::now_ms();
        let (repository, cluster) = (self.repository, &cx.spec.cluster);
        let free_bytes = repository.require_room(0).await?;
        let identity =
            repository.find_or_mint_lineage_of(self.kind, cluster, identifier, now_ms).await?;
        if let Some(predecessor) = cx.spec.predecessor {
            let why = format!("attempt {} follows it", cx.spec.attempt);
            let aborted =
                repository.abort(identity.lineage, predecessor, self.by, &why, now_ms).await?;
            if let Aborted::Committed(_) = aborted {
                tracing::info!(attempt = %predecessor, "The attempt before this one committed after all");
            }
        }
        let intent = Intent {
            attempt: cx.spec.attempt,
            follows: cx.spec.predecessor,
            by: self.by.to_owned(),
            began_at_ms: now_ms,
        };
        match repository.begin(identity.lineage, intent).await {
            Ok(attempt) => {
                self.tell_little_room(cx, free_bytes, &attempt);
                Ok(attempt)
            }
            Err(error @ repository::Error::AttemptExists { .. }) => Err(error.into()),
            Err(error) => {
                // The intent may stand already; an open one would hold back the collection of garbage.
                let failure = error.into();
                self.give_up(cx, identity.lineage, &failure).await;
                Err(failure)
            }
        }
    }

    /// Says when what the backup before had to store would not fit again. That does not end this one, which stores what
    /// changed and no more, however much that is.
    fn tell_little_room(
        &self,
        cx: &JobContext,
        free_bytes: Option<u64>,
        attempt: &repository::Attempt,
    ) {
        let before = attempt.predecessor_counts().map(|counts| counts.stored_bytes);
        if let (Some(free), Some(before)) = (free_bytes, before)
            && free < before
        {
            tracing::warn!(
                cluster.name = %cx.spec.cluster,
                "{free} bytes are free in {}, and the backup before stored {before}: this one may find no room",
                self.repository.describe(),
            );
        }
    }

    /// Writes ABORT for an attempt that has failed.
    pub(super) async fn give_up(&self, cx: &JobContext, lineage: LineageId, failure: &Failure) {
        let text = failure.to_string();
        let why = telemetry::scrub(&text);
        let abort = self.repository.abort(lineage, cx.spec.attempt, self.by, &why, clock::now_ms());
        match tokio::time::timeout(ABORT_MAX, abort).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "Failed to mark the attempt as aborted"),
            Err(_) => {
                tracing::warn!("The repository did not answer when the attempt was to be aborted");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proto::message::Spec;
    use proto::{AttemptId, JobId, Task};

    use super::*;

    #[test]
    fn an_order_is_written_as_it_asks_and_never_with_more_than_is_allowed() {
        let spec = Spec {
            schema: 1,
            job: JobId::mint(1, [1; 10]),
            attempt: AttemptId::mint(1, [1; 10]),
            predecessor: None,
            cluster: "orders".parse().unwrap(),
            system_identifier: None,
            task: Task::Backup(Backup::default()),
            deadline_ms: 1,
            traceparent: None,
        };
        let cx = JobContext::new(spec, Arc::new(|_| {}));
        let config =
            BackupConfig { processes: 4, nice: 7, compression_level: 5, ..BackupConfig::default() };
        let written = |task: Backup| {
            let options = as_ordered(&cx, &task, &config, &Arc::default());
            (options.processes, options.nice, options.level)
        };
        assert_eq!(written(Backup::default()), (4, 7, 5));
        let less = Backup { processes: Some(3), compression_level: Some(1), ..Backup::default() };
        assert_eq!(written(less), (3, 7, 1));
        assert_eq!(written(Backup { processes: Some(9), ..Backup::default() }), (4, 7, 5));
    }
}
