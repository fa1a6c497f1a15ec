//! How long maintenance may wait and work, and how it ended.

use std::time::Duration;

use postgres::Session;
use tokio::time::Instant;

use crate::error::Error;

/// What bounds an execution. All three hold at once; whichever comes first wins.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long one table may wait for its lock; then it is skipped. At least 1 ms.
    pub lock_timeout: Duration,
    /// How long one table may take; then its statement is cancelled and the table is skipped.
    pub table_timeout: Duration,
    /// When everything must have stopped. What was not reached is listed as skipped.
    pub deadline: Option<Instant>,
}

impl Default for Limits {
    /// 2 s for a lock, an hour for a table, no end.
    fn default() -> Self {
        Self {
            lock_timeout: Duration::from_secs(2),
            table_timeout: Duration::from_secs(3_600),
            deadline: None,
        }
    }
}

impl Limits {
    /// When the table that begins at `now` must have ended.
    pub(crate) fn table_deadline(&self, now: Instant) -> Instant {
        let own = now + self.table_timeout;
        self.deadline.map_or(own, |all| own.min(all))
    }

    pub(crate) fn is_over(&self, now: Instant) -> bool {
        self.deadline.is_some_and(|deadline| now >= deadline)
    }

    /// Sets the server's own timeouts, which hold even when this process dies. Numbers only, no text.
    pub(crate) async fn apply(&self, session: &Session) -> Result<(), Error> {
        // Zero would mean "wait for ever".
        let milliseconds = |limit: Duration| limit.as_millis().clamp(1, i32::MAX as u128);
        let sql = format!(
            "SET lock_timeout = {}; SET statement_timeout = {}",
            milliseconds(self.lock_timeout),
            milliseconds(self.table_timeout),
        );
        Ok(session.run("set the limits of the session", &sql).await?)
    }
}

/// How an execution ended. Work that was done stays done in every case.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Every table of the plan was done or skipped for a reason of its own.
    Complete,
    /// The caller cancelled.
    Cancelled,
    /// The deadline passed.
    Deadline,
}
