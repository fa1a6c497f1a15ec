//! Have a server archive its WAL into its cluster's repository.

use serde::{Deserialize, Serialize};

use crate::LineageId;
use crate::wal::SegmentName;

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
