//! A message on its way out, and on its way in.

use bytes::Bytes;

use crate::{memory, rabbit};

/// A message to send. [`Publish::new`] makes one that must be routed and survives a restart of the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publish {
    /// Where to.
    pub exchange: String,
    /// For which queues, as the exchange understands it.
    pub routing_key: String,
    /// Set by the sender and kept when the same message is sent again.
    pub message_id: String,
    /// What the body is, so that a receiver need not guess.
    pub kind: String,
    /// The content.
    pub body: Bytes,
    /// Whether [`Published::Unroutable`] is told when no queue takes it. Otherwise it vanishes then.
    pub mandatory: bool,
    /// Whether it survives a restart of the broker.
    pub persistent: bool,
    /// How long it may wait in a queue, milliseconds.
    pub expiration_ms: Option<u64>,
    /// Trace context and the like.
    pub headers: Vec<(String, String)>,
}

impl Publish {
    /// A mandatory, persistent message without expiration or headers.
    pub fn new(
        exchange: impl Into<String>,
        routing_key: impl Into<String>,
        kind: impl Into<String>,
        message_id: impl Into<String>,
        body: impl Into<Bytes>,
    ) -> Self {
        Self {
            exchange: exchange.into(),
            routing_key: routing_key.into(),
            message_id: message_id.into(),
            kind: kind.into(),
            body: body.into(),
            mandatory: true,
            persistent: true,
            expiration_ms: None,
            headers: Vec::new(),
        }
    }

    /// The same message, sent whether or not anybody takes it.
    #[must_use]
    pub fn optional(mut self) -> Self {
        self.mandatory = false;
        self
    }

    /// The same message, kept in memory only.
    #[must_use]
    pub fn transient(mut self) -> Self {
        self.persistent = false;
        self
    }

    /// The same message, worthless after this many milliseconds in a queue.
    #[must_use]
    pub fn expiring(mut self, milliseconds: u64) -> Self {
        self.expiration_ms = Some(milliseconds);
        self
    }

    /// The same message with these headers.
    #[must_use]
    pub fn with_headers(mut self, headers: Vec<(String, String)>) -> Self {
        self.headers = headers;
        self
    }
}

/// What became of a message the broker answered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Published {
    /// Every queue it was routed to has it. (One that is not mandatory may have been routed to none.)
    Routed,
    /// It was mandatory and no queue wants it: the receiver is not there.
    Unroutable,
}

/// A message in hand. Settle it; dropped unsettled, it goes back to its queue.
#[derive(Debug)]
pub struct Delivery {
    /// The content.
    pub body: Bytes,
    /// The sender's id for it; empty when there was none.
    pub message_id: String,
    /// What the body is; empty when the sender did not say.
    pub kind: String,
    /// Trace context and the like.
    pub headers: Vec<(String, String)>,
    /// Whether it was delivered before, to anybody.
    pub redelivered: bool,
    /// The exchange it came through last.
    pub exchange: String,
    /// The routing key it came with.
    pub routing_key: String,
    /// Where it died before it came here, newest first.
    pub deaths: Vec<Death>,
    pub(crate) settler: Settler,
}

/// How a delivery is settled. Dropping one that is unsettled hands the message back.
#[derive(Debug)]
pub(crate) enum Settler {
    Memory(memory::Settler),
    Rabbit(rabbit::Settler),
}

/// That a message was rejected, expired, pushed out or delivered too often, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Death {
    /// The queue it died in.
    pub queue: String,
    /// `rejected`, `expired`, `maxlen` or `delivery_limit`.
    pub reason: String,
    /// How often, for this queue and reason.
    pub count: u64,
    /// The exchange it had come through.
    pub exchange: String,
    /// The routing key it had come with.
    pub routing_key: String,
}

/// Whether the broker was told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use]
pub enum Settled {
    /// The answer is on its way to the broker. (It can still get lost with the connection.)
    Done,
    /// Too late: the channel it came through is gone. The message will be delivered again, to somebody.
    Stale,
}

impl Delivery {
    /// It is dealt with.
    pub async fn ack(self) -> Settled {
        self.settle(Verdict::Ack).await
    }

    /// Back to its queue, to be delivered again.
    pub async fn requeue(self) -> Settled {
        self.settle(Verdict::Requeue).await
    }

    /// Nobody can deal with it: to the dead letters, where the queue has that; else it vanishes.
    pub async fn reject(self) -> Settled {
        self.settle(Verdict::Reject).await
    }

    async fn settle(self, verdict: Verdict) -> Settled {
        match self.settler {
            Settler::Memory(settler) => settler.settle(verdict),
            Settler::Rabbit(settler) => settler.settle(verdict).await,
        }
    }
}

/// What a receiver says of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Ack,
    Requeue,
    Reject,
}
