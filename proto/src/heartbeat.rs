//! A commit that a worker makes in a server from time to time, so that a restored server can be asked for it.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{ClusterName, LineageId, Lsn, SystemIdentifier, Timeline};

/// One heartbeat: a transaction of which it is known between which positions of the log it committed, and between which
/// moments. The positions and the moments are the server's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heartbeat {
    /// Whose.
    pub system_identifier: SystemIdentifier,
    /// The timeline that the server wrote.
    pub timeline: Timeline,
    /// The transaction, as `pg_current_xact_id` numbers it.
    pub transaction: u64,
    /// The record of its commit begins here or later.
    pub begun_lsn: Lsn,
    /// The record of its commit ends here or earlier, and was on disk when this was read.
    pub ended_lsn: Lsn,
    /// It committed then or later; Unix milliseconds.
    pub begun_at_ms: i64,
    /// It had committed by then, or within the same millisecond.
    pub ended_at_ms: i64,
}

impl Heartbeat {
    /// When it committed, as people are told.
    pub fn at(&self) -> Timestamp {
        Timestamp::from_millisecond(self.begun_at_ms).unwrap_or_default()
    }
}

/// A heartbeat of one of a worker's clusters.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterHeartbeat {
    /// Whose.
    pub cluster: ClusterName,
    /// It.
    pub heartbeat: Heartbeat,
}

/// Heartbeats that came into an archive, for a proof: a sample where there are many.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ArchivedHeartbeats {
    /// Whose archive.
    pub lineage: LineageId,
    /// Oldest first, in the order in which they were told.
    pub known: Vec<Heartbeat>,
}
