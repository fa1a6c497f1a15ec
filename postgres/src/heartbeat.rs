//! Heartbeats: a transaction that changes nothing, of which it is known afterwards where in the log it committed, and when; and
//! asking a restored server for it.
//!
//! It is a logical message, which any role may write, and which leaves nothing in the server but its record in the log. Whether
//! a copy has it, the copy's own record of transactions says.

use proto::{Heartbeat, Lsn, SystemIdentifier, Timeline};

use crate::error::Error;
use crate::session::Session;

/// The clock is read before the position: whatever lies behind that position was written later than this moment.
const BEFORE: &str = "\
-- pgmuster: before a heartbeat
SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::int8 AS begun_at_ms,
       CASE WHEN pg_is_in_recovery() THEN NULL ELSE pg_current_wal_insert_lsn()::text END AS begun_lsn,
       CASE WHEN pg_is_in_recovery() THEN NULL
            ELSE ('x' || substr(pg_walfile_name(pg_current_wal_insert_lsn()), 1, 8))::bit(32)::int4 END AS timeline,
       (SELECT system_identifier FROM pg_control_system()) AS system_identifier,
       current_setting('archive_mode') <> 'off' AS archives,
       (SELECT setting::int4 FROM pg_settings WHERE name = 'archive_timeout') AS archive_timeout_s";
/// The transaction ends with the statement, and waits for the disk: a session of ours has `synchronous_commit = local`. What a
/// crash takes away again would be missed for ever.
const BEAT: &str = "\
-- pgmuster: heartbeat
SELECT pg_current_xact_id()::text, pg_logical_emit_message(true, 'pgmuster', 'heartbeat')::text";
const AFTER: &str = "\
-- pgmuster: after a heartbeat
SELECT pg_current_wal_insert_lsn()::text AS ended_lsn,
       floor(extract(epoch FROM clock_timestamp()) * 1000)::int8 AS ended_at_ms";

/// What came of a heartbeat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// It was made.
    Made(Heartbeat),
    /// The server is a standby, which commits nothing, or archives nothing.
    NotHere,
    /// With `archive_timeout = 0` it would lie in a segment that an idle server never hands over; nothing was written.
    NeverArchived,
}

impl Session {
    /// Makes a heartbeat, where one would come into an archive. Takes no lock.
    pub async fn beat(&self) -> Result<Beat, Error> {
        let what = "make a heartbeat";
        let before = self.one(what, BEFORE, &[]).await?;
        let (begun_lsn, timeline): (Option<&str>, Option<i32>) =
            (before.get("begun_lsn"), before.get("timeline"));
        let (Some(begun_lsn), Some(timeline), true) = (begun_lsn, timeline, before.get("archives"))
        else {
            return Ok(Beat::NotHere);
        };
        if before.get::<_, i32>("archive_timeout_s") == 0 {
            return Ok(Beat::NeverArchived);
        }
        let made = self.one(what, BEAT, &[]).await?;
        let after = self.one(what, AFTER, &[]).await?;
        let odd = |answer: &str| Error::Answer { what: what.to_owned(), answer: answer.to_owned() };
        let position = |text: &str| text.parse::<Lsn>().map_err(|_| odd(text));
        let transaction: &str = made.get(0);
        Ok(Beat::Made(Heartbeat {
            system_identifier: SystemIdentifier(
                before.get::<_, i64>("system_identifier").cast_unsigned(),
            ),
            timeline: Timeline(timeline.cast_unsigned()),
            transaction: transaction.parse().map_err(|_| odd(transaction))?,
            begun_lsn: position(begun_lsn)?,
            ended_lsn: position(after.get("ended_lsn"))?,
            begun_at_ms: before.get("begun_at_ms"),
            ended_at_ms: after.get("ended_at_ms"),
        }))
    }

    /// Whether a restored server has a heartbeat. `next_transaction` is the first that the server has given out itself: that number
    /// and those behind it say nothing of what was restored. `None` when it has forgotten what became of a transaction so old: no row
    /// is left that would need to know.
    pub async fn has_heartbeat(
        &self,
        heartbeat: &Heartbeat,
        next_transaction: u64,
    ) -> Result<Option<bool>, Error> {
        if heartbeat.transaction >= next_transaction {
            return Ok(Some(false));
        }
        let sql = "SELECT pg_xact_status($1::text::xid8)";
        let transaction = heartbeat.transaction.to_string();
        let row = self.one("look for a heartbeat", sql, &[&transaction]).await?;
        Ok(row.get::<_, Option<&str>>(0).map(|status| status == "committed"))
    }
}
