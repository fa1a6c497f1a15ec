//! Receiving from the twin, and settling what was received.

use std::fmt;
use std::sync::Arc;

use tokio::sync::Notify;

use super::Client;
use super::hub::{ConsumerId, Next, Tag};
use crate::message::Verdict;
use crate::{Delivery, Settled};

/// A consumer of one queue; leaves it when dropped.
pub(crate) struct Consumer {
    client: Arc<Client>,
    id: ConsumerId,
    wake: Arc<Notify>,
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Consumer {
    pub(super) fn new(client: Arc<Client>, queue: &str, prefetch: u16) -> Self {
        let wake = Arc::new(Notify::new());
        let id = client.hub.consume(client.id, queue, prefetch, wake.clone());
        Self { client, id, wake }
    }

    pub(crate) async fn next(&mut self) -> Option<Delivery> {
        loop {
            if matches!(*self.client.link.borrow(), crate::Link::Closed) {
                return None;
            }
            match self.client.hub.next(self.id) {
                Next::Message { tag, message, redelivered, exchange, routing_key, deaths } => {
                    return Some(Delivery {
                        body: message.body.clone(),
                        message_id: message.message_id.clone(),
                        kind: message.kind.clone(),
                        headers: message.headers.clone(),
                        redelivered,
                        exchange,
                        routing_key,
                        deaths,
                        settler: crate::message::Settler::Memory(Settler {
                            client: self.client.clone(),
                            consumer: self.id,
                            tag,
                            settled: false,
                        }),
                    });
                }
                Next::Wait => self.wake.notified().await,
            }
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.client.hub.detach(self.id);
    }
}

/// Settles one delivery of the twin.
pub(crate) struct Settler {
    client: Arc<Client>,
    consumer: ConsumerId,
    tag: Tag,
    settled: bool,
}

impl fmt::Debug for Settler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settler").field("tag", &self.tag).finish_non_exhaustive()
    }
}

impl Settler {
    pub(crate) fn settle(mut self, verdict: Verdict) -> Settled {
        self.settled = true;
        self.client.hub.settle(self.consumer, self.tag, verdict)
    }
}

impl Drop for Settler {
    fn drop(&mut self) {
        if !self.settled {
            let _: Settled = self.client.hub.settle(self.consumer, self.tag, Verdict::Requeue);
        }
    }
}
