//! Takes a physical backup with the engine that fits the cluster.

use proto::Failure;
use proto::job::{Backup, BackupOutcome};

use crate::config::WorkerConfig;
use crate::context::JobContext;
use crate::engines::native::{self, BackupRequest};
use crate::places::Places;

/// Runs a backup.
pub(crate) async fn run(
    cx: &JobContext,
    places: &Places,
    config: &WorkerConfig,
    task: &Backup,
) -> Result<BackupOutcome, Failure> {
    let cluster = places.cluster(&cx.spec.cluster)?;
    let repository = cx.step("open_repository", places.repository_for(&cx.spec.cluster)).await?;
    let by = config.name.to_string();
    let request = BackupRequest { cluster, repository, config: &config.backup, by: &by, task };
    native::back_up(cx, request).await
}
