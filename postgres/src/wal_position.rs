//! Where a server writes its log, and which transactions had committed then: in one question.

use proto::{Lsn, Timeline, WalFileName};

use crate::error::Error;
use crate::session::Session;

/// The snapshot of a statement is taken before its functions are called: whatever it shows as committed lies before the position.
const POSITION: &str = "\
-- pgmuster: wal position
SELECT pg_current_snapshot()::text AS snapshot,
       CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn()::text END AS lsn,
       CASE WHEN pg_is_in_recovery() THEN NULL
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int4 END AS timeline,
       current_setting('archive_mode') <> 'off' AS archives,
       (SELECT last_archived_wal FROM pg_stat_archiver) AS archived";

/// Where a server that writes is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalPosition {
    /// Which transactions are over, as `pg_current_snapshot` says it: as long as it stays the same, nothing commits.
    pub snapshot: String,
    /// Behind everything that had committed by then.
    pub lsn: Lsn,
    /// The timeline it writes.
    pub timeline: Timeline,
    /// Whether it archives at all.
    pub archives: bool,
    /// The file that it archived last, as it says; absent when it says nothing, as after a crash.
    pub archived: Option<WalFileName>,
}

impl Session {
    /// Where the server is; `None` while it is a standby, which writes no log of its own.
    pub async fn wal_position(&self) -> Result<Option<WalPosition>, Error> {
        let what = "ask the server for its position";
        let row = self.one(what, POSITION, &[]).await?;
        let (lsn, timeline): (Option<String>, Option<i32>) = (row.get("lsn"), row.get("timeline"));
        let (Some(lsn), Some(timeline)) = (lsn, timeline) else { return Ok(None) };
        let lsn = lsn.parse().map_err(|_| Error::Answer { what: what.to_owned(), answer: lsn })?;
        Ok(Some(WalPosition {
            snapshot: row.get("snapshot"),
            lsn,
            timeline: Timeline(timeline.cast_unsigned()),
            archives: row.get("archives"),
            archived: row.get::<_, Option<&str>>("archived").and_then(|name| name.parse().ok()),
        }))
    }
}
