//! How far a cluster's archive of WAL is, as a worker saw it.

use serde::{Deserialize, Serialize};

use crate::wal::SegmentName;
use crate::{ClusterName, LineageId, Lsn, Timeline};

/// What a worker saw of one cluster that archives into its repository. Judged by positions alone: what the server says of its own
/// archiving, and whether its `archive_command` succeeded, is no evidence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalStanding {
    /// Whose.
    pub cluster: ClusterName,
    /// Where it is archived.
    pub lineage: LineageId,
    /// When it was looked at; worker's clock, Unix milliseconds.
    pub at_ms: i64,
    /// The timeline that the server writes.
    pub timeline: Timeline,
    /// The timelines it came from, oldest first, as far as the archive knows them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ancestors: Vec<WalAncestor>,
    /// Where the server is.
    pub server_lsn: Lsn,
    /// Where the unbroken line of segments begins that ends at `archived_to`.
    pub line_from: Lsn,
    /// The archive has everything before this position, back to `line_from`.
    pub archived_to: Lsn,
    /// Every transaction that had committed by then is archived; worker's clock, Unix milliseconds. Absent while that is not
    /// known, as after a start of the worker.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub safe_at_ms: Option<i64>,
    /// Whole segments that are not in the archive.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub waiting: Option<WalWaiting>,
    /// The first segment of the newest gap, the one behind which the line begins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gap: Option<SegmentName>,
    /// The newest gaps on the way to where the server is, as far as they are known, by position.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gaps: Vec<WalGap>,
    /// That another server archives under the same name, as far as it shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub conflict: Option<WalConflict>,
}

/// WAL that an archive does not have, though it has what lies before it and behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalGap {
    /// The first segment that is missing.
    pub segment: SegmentName,
    /// Bytes of a segment.
    pub segment_bytes: u32,
    /// Where the unbroken line begins that ends at `from`.
    pub line_from: Lsn,
    /// Recoverable before this position,
    pub from: Lsn,
    /// and, from a backup that begins there, after this one.
    pub to: Lsn,
    /// The last end of a transaction before it, if the last few segments have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_end: Option<WalEnd>,
}

/// The end of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalEnd {
    /// Where its record begins.
    pub at: Lsn,
    /// When, by the server's clock, Unix milliseconds.
    pub at_ms: i64,
}

/// How a server is set up to archive its WAL, by its own words: what to do about it, not whether it works.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArchiveSetup {
    /// `archive_mode` as it is in effect: `off`, `on` or `always`.
    pub mode: String,
    /// Whether there is an `archive_command` or an `archive_library`.
    pub has_command: bool,
    /// Settings of archiving that were changed and wait for a restart of the server.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending_restart: Vec<String>,
    /// The file at which its archiver failed, as long as it has archived none since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failing_at: Option<String>,
    /// What it keeps because that is not archived, where its files are at hand and the oldest of it is late.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<WalBacklog>,
}

/// A timeline that was left for another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalAncestor {
    /// Which.
    pub timeline: Timeline,
    /// Where it was left.
    pub left_at: Lsn,
}

/// Segments that the server has filled and the archive does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalWaiting {
    /// The first of them.
    pub segment: SegmentName,
    /// Since when at least it has been full; worker's clock, Unix milliseconds.
    pub since_ms: i64,
    /// How many there are.
    pub segments: u64,
}

/// A segment of which two servers wrote something else. The archive keeps what came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalConflict {
    /// Which.
    pub segment: SegmentName,
    /// Where it begins.
    pub at: Lsn,
    /// Whether the other server's came first, so that this one's is refused.
    pub is_foreign: bool,
}

/// What a server keeps in `pg_wal` because it is not archived: its own marks, whatever the archive has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalBacklog {
    /// Segments that it has marked as ready.
    pub segments: u64,
    /// Since when the oldest of them is; worker's clock, Unix milliseconds.
    pub since_ms: i64,
    /// Bytes in `pg_wal`.
    pub pg_wal_bytes: u64,
}
