//! Have a server archive its WAL into its cluster's repository.

use serde::{Deserialize, Serialize};

use crate::wal::SegmentName;
use crate::{BackupId, LineageId};

/// Parameters of setting up the archive.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EnableWal {
    /// `archive_timeout` at most, seconds, at least 10: an idle server hands over its last transactions after that. 0 leaves the
    /// setting as it is.
    pub archive_timeout_s: u32,
    /// Take the place of another `archive_command` or `archive_library`.
    #[serde(default)]
    pub replace: bool,
    /// Only say what would be done.
    #[serde(default)]
    pub plan_only: bool,
}

impl Default for EnableWal {
    fn default() -> Self {
        Self { archive_timeout_s: 600, replace: false, plan_only: false }
    }
}

/// What was set, and whether it works.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct EnableWalOutcome {
    /// Nothing was changed.
    pub planned_only: bool,
    /// What is done, one sentence each.
    pub plan: Vec<String>,
    /// Settings that wait for a restart of the server. Nothing is archived before.
    pub restart_for: Vec<String>,
    /// The segment that was finished for it and seen in the archive, and where; absent while a restart is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seen: Option<SeenSegment>,
    /// What the archive does not have before that segment.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost: Option<LostWal>,
}

/// A segment that came into the archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeenSegment {
    /// Its name.
    pub segment: SegmentName,
    /// The lineage that has it.
    pub lineage: LineageId,
    /// From the end of the segment until it was seen, milliseconds.
    pub after_ms: u64,
}

/// WAL between the newest backup and a segment that came into the archive, which the archive does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LostWal {
    /// The first segment that is missing.
    pub first: SegmentName,
    /// The last one.
    pub last: SegmentName,
    /// How many are.
    pub segments: u64,
    /// The newest backup, which does not lead beyond them.
    pub backup: BackupId,
    /// Up to when it leads, Unix milliseconds; absent where the last segments before the gap do not say it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recoverable_to_ms: Option<i64>,
}
