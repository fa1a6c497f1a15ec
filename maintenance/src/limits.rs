//! How long maintenance may wait and work, and how it ended.

use std::time::Duration;

use postgres::Session;
use tokio::time::Instant;
use tokio_postgres::error::SqlState;

use crate::error::Error;

/// How much later than this process the server itself ends a statement.
const SERVER_GRACE: Duration = Duration::from_secs(10);
/// How long a late cancel request may be on its way.
const STRAY_CANCEL: Duration = Duration::from_millis(100);
/// Requests that one interrupted statement may have caused.
const STRAY_CANCELS: usize = 5;

/// Waits out cancel requests that are still on their way after a statement was interrupted. The protocol does not
/// name the statement a request is meant for: one that comes late ends whatever runs then, so let it be this.
pub(crate) async fn settle(session: &Session) -> Result<(), Error> {
    let sql = format!("SELECT pg_catalog.pg_sleep({})", STRAY_CANCEL.as_secs_f64());
    for _ in 0..STRAY_CANCELS {
        match session.run("wait for late cancel requests", &sql).await {
            Err(error) if error.state() == Some(&SqlState::QUERY_CANCELED) => {}
            outcome => return Ok(outcome?),
        }
    }
    Ok(())
}

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
            table_timeout: Duration::from_hours(1),
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

    /// Sets the server's own timeouts. Numbers only, no text. The one for statements holds when this process cannot
    /// cancel any more, and comes later than its own limit: two cancellations at once would hit two statements.
    pub(crate) async fn apply(&self, session: &Session) -> Result<(), Error> {
        // Zero would mean "wait for ever".
        let milliseconds = |limit: Duration| limit.as_millis().clamp(1, i32::MAX as u128);
        let sql = format!(
            "SET lock_timeout = {}; SET statement_timeout = {}",
            milliseconds(self.lock_timeout),
            milliseconds(self.table_timeout.saturating_add(SERVER_GRACE)),
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
