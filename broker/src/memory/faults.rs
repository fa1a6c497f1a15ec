//! Breaking one client's link on purpose.

use std::fmt;
use std::sync::Arc;

use tokio::time::Instant;

use super::Client;
use crate::{Error, Link};

/// The means to break one client's link. Other clients of the same broker notice what they would notice in life.
#[derive(Clone)]
pub struct MemoryFaults {
    client: Arc<Client>,
}

impl fmt::Debug for MemoryFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryFaults").field("client", &self.client.id).finish_non_exhaustive()
    }
}

impl MemoryFaults {
    pub(super) fn new(client: Arc<Client>) -> Self {
        Self { client }
    }

    /// The next `count` messages arrive, and their senders do not learn of it.
    pub fn lose_answers(&self, count: u32) {
        self.client.hub.faults(self.client.id, |faults| faults.lose_answers = count);
    }

    /// The next `count` messages get lost, and their senders do not learn of it.
    pub fn lose_messages(&self, count: u32) {
        self.client.hub.faults(self.client.id, |faults| faults.lose_messages = count);
    }

    /// The next `count` messages this client receives come twice.
    pub fn duplicate_deliveries(&self, count: u32) {
        self.client.hub.faults(self.client.id, |faults| faults.duplicate_deliveries = count);
    }

    /// The link is gone: what was not settled goes back, and nothing passes until [`restore`](Self::restore).
    pub fn cut(&self) {
        self.client.hub.cut(self.client.id);
        let cause = Error::Unreachable {
            address: "memory".to_owned(),
            cause: "the link was cut".to_owned(),
        };
        self.client.link.send_if_modified(|link| {
            let cut = !matches!(link, Link::Closed | Link::Connecting { .. });
            if cut {
                *link = Link::Connecting { since: Instant::now(), last_error: Some(cause) };
            }
            cut
        });
    }

    /// The link is back: declarations are repeated and consumers go on.
    pub fn restore(&self) {
        if matches!(*self.client.link.borrow(), Link::Closed) {
            return;
        }
        self.client.hub.restore(self.client.id);
        self.client.link.send_replace(Link::Up);
    }

    /// The broker takes no messages from this client until [`unblock`](Self::unblock).
    pub fn block(&self) {
        self.client.link.send_if_modified(|link| {
            let up = link.is_up();
            if up {
                *link = Link::Blocked { since: Instant::now(), reason: "memory alarm".to_owned() };
            }
            up
        });
    }

    /// The broker takes messages again.
    pub fn unblock(&self) {
        self.client.link.send_if_modified(|link| {
            let blocked = matches!(link, Link::Blocked { .. });
            if blocked {
                *link = Link::Up;
            }
            blocked
        });
    }
}
