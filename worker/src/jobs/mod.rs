//! One file per kind of job, and the one place that tells them apart.

mod analyze;
mod backup;
mod databases;
mod enable_wal;
mod probe;
mod restore;
mod vacuum;
mod verify_restore;

use std::sync::Arc;

use proto::{Failure, JobId, Outcome, Task};

use crate::attempt::Ended;
use crate::context::JobContext;
use crate::shared::Shared;

/// Runs the job of this context.
pub(crate) async fn run(shared: &Arc<Shared>, cx: &JobContext) -> Ended {
    let places = &shared.places;
    // Each on the heap: the largest of them would otherwise set the size of all.
    match &cx.spec.task {
        Task::Backup(task) => {
            let work = Box::pin(backup::run(cx, places, &shared.config, task));
            plain(work.await.map(Outcome::Backup))
        }
        Task::VerifyRestore(task) => {
            let (config, credentials) = (&shared.config, &shared.credentials);
            Box::pin(verify_restore::run(cx, places, config, credentials, task)).await
        }
        Task::Restore(task) => {
            let work = Box::pin(restore::run(cx, places, &shared.config, task));
            plain(work.await.map(Outcome::Restore))
        }
        Task::Analyze(task) => {
            let work = Box::pin(analyze::run(cx, places, task));
            plain(work.await.map(Outcome::Analyze))
        }
        Task::Vacuum(task) => {
            let work = Box::pin(vacuum::run(cx, places, task));
            plain(work.await.map(Outcome::Vacuum))
        }
        Task::EnableWal(task) => {
            let work = Box::pin(enable_wal::run(cx, places, &shared.config, task));
            plain(work.await.map(Outcome::EnableWal))
        }
        Task::Probe(task) => {
            let work = Box::pin(probe::run(cx, places, task));
            plain(work.await.map(Outcome::Probe))
        }
    }
}

fn plain(result: Result<Outcome, Failure>) -> Ended {
    Ended { result, found: None }
}

/// The name under which an attempt's sessions show themselves on the server, so that a probe can find them.
pub(crate) fn session_owner(attempt: proto::AttemptId) -> JobId {
    JobId(attempt.0)
}

/// Removes the sandboxes of workers that died.
pub(crate) async fn clean_up_after_the_dead(shared: Arc<Shared>) {
    crate::proving::sweep(shared.config.sandbox.directory.as_std_path().into()).await;
}
