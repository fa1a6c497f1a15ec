//! How a client's link to the broker is.

use tokio::time::Instant;

use crate::Error;

/// How the link is.
#[derive(Debug, Clone, PartialEq)]
pub enum Link {
    /// Not usable; tries go on by themselves.
    Connecting {
        /// Since when.
        since: Instant,
        /// Why the last try failed, or why the connection before ended. Holds no secret.
        last_error: Option<Error>,
    },
    /// Everything works, and all declarations were repeated on this connection.
    Up,
    /// The broker takes no messages for now (its memory or disk alarm); receiving and settling go on.
    Blocked {
        /// Since when.
        since: Instant,
        /// What the broker says.
        reason: String,
    },
    /// Closed by [`Broker::close`](crate::Broker::close).
    Closed,
}

impl Link {
    /// Whether messages can be sent and received.
    pub fn is_up(&self) -> bool {
        matches!(self, Self::Up)
    }
}
