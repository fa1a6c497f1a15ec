//! Takes a backup with the engine that is asked for.

use proto::Failure;
use proto::job::{Backup, BackupOutcome};

use crate::config::WorkerConfig;
use crate::context::JobContext;
use crate::engines::{native, pg_dump};
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
    let repository = &repository;
    let by = config.name.to_string();
    let by = by.as_str();
    let backup = &config.backup;
    match &task.pg_dump {
        None => {
            let request = native::BackupRequest { cluster, repository, config: backup, by, task };
            native::back_up(cx, request).await
        }
        Some(scope) => {
            let bin_dirs = native::bin_dirs(config);
            let (config, bin_dirs) = (backup, bin_dirs.as_slice());
            let request =
                pg_dump::BackupRequest { cluster, repository, config, bin_dirs, by, task, scope };
            pg_dump::back_up(cx, request).await
        }
    }
}
