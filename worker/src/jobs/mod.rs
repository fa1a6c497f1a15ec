//! One file per kind of job, and the one place that tells them apart.

mod analyze;
mod backup;
mod databases;
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
    match &cx.spec.task {
        Task::Backup(task) => {
            plain(backup::run(cx, places, &shared.config, task).await.map(Outcome::Backup))
        }
        Task::VerifyRestore(task) => {
            verify_restore::run(cx, places, &shared.config, &shared.credentials, task).await
        }
        Task::Restore(task) => {
            plain(restore::run(cx, places, &shared.config, task).await.map(Outcome::Restore))
        }
        Task::Analyze(task) => plain(analyze::run(cx, places, task).await.map(Outcome::Analyze)),
        Task::Vacuum(task) => plain(vacuum::run(cx, places, task).await.map(Outcome::Vacuum)),
        Task::Probe(task) => plain(probe::run(cx, places, task).await.map(Outcome::Probe)),
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
