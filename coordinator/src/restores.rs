//! What restores measured that were no proofs: how fast files are restored where people restore them.

use policy::recovery_time::Measured;
use proto::BackupKind;
use proto::job::{Outcome, Task};

use crate::catalog::jobs::Restored;

/// What a restore measured; `None` when it found something in place that it did not have to write. How long a server takes to start
/// is left to proofs: here it waits at a moment that somebody chose, and may replay to there for hours.
pub(crate) fn measured(restored: &Restored) -> Option<Measured> {
    let Restored { job, restore_ms } = restored;
    let (Task::Restore(task), Some(Outcome::Restore(outcome))) = (&job.task, &job.outcome) else {
        return None;
    };
    if task.delta || outcome.planned_only || outcome.reused_bytes > 0 {
        return None;
    }
    Some(Measured {
        // A dump is not restored by a job.
        kind: BackupKind::Physical,
        at_ms: job.ended_at_ms?,
        restored_bytes: outcome.size_bytes,
        restore_ms: u64::try_from(*restore_ms).ok()?,
        start_ms: None,
        replayed: None,
    })
}
