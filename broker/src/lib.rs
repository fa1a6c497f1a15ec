//! How messages move between coordinator and workers: over RabbitMQ, or inside one process.
//!
//! Users hold one [`Broker`]. Whether it talks to RabbitMQ ([`Broker::rabbit`]) or to its in-process twin
//! ([`Broker::memory`]) makes no difference to them: one contract suite (`tests/contract.rs`) runs on both.
//!
//! - A **link** connects by itself, for ever, and says how it is: [`Broker::link`].
//! - [`Broker::publish`] has few outcomes and names them all: routed, unroutable, not sent, unknown.
//! - A [`Consumer`] survives lost connections, closed channels and expired queues by itself; what it delivered
//!   before such an event is [`Settled::Stale`] and will come again.
//! - [`Broker::declare`] is remembered, and repeated after every reconnect.
//!
//! The queue is a doorbell: every message may arrive twice, late, or not at all, and the protocol above is built
//! for that. This crate knows the names of the queues and nothing of the jobs in them.

mod chance;
mod consumer;
mod declaration;
mod error;
mod link;
mod memory;
mod message;
mod rabbit;
mod socket;

use std::time::Duration;

use tokio::sync::watch;

pub use consumer::Consumer;
pub use declaration::{Binding, Declaration, Exchange, ExchangeKind, Queue, QueueKind};
pub use error::{Error, PublishError};
pub use link::Link;
pub use memory::MemoryFaults;
pub use message::{Death, Delivery, Publish, Published, Settled};
pub use rabbit::{ClientIdentity, RabbitOptions};
pub use socket::PrivateSocket;

/// A client of the broker. Clones share one link; when the last clone, consumer and delivery are gone, so is the link.
#[derive(Clone, Debug)]
pub struct Broker {
    twin: Twin,
}

#[derive(Clone, Debug)]
enum Twin {
    Memory(memory::Memory),
    Rabbit(rabbit::Rabbit),
}

/// Whether declarations are in force already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Declared {
    /// The broker has them.
    Now,
    /// There is no connection; they are remembered and come first on the next one.
    Later,
}

/// How full a queue is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Depth {
    /// Messages that wait; those delivered and not yet settled do not count.
    pub messages: u32,
    /// Consumers.
    pub consumers: u32,
}

impl Broker {
    /// A broker inside this process. Whoever shall hear each other must share it, by clone or by [`another`](Self::another).
    pub fn memory() -> Self {
        Self { twin: Twin::Memory(memory::Memory::new()) }
    }

    /// A client of RabbitMQ. Returns at once and connects in the background, for ever; must be called inside a
    /// tokio runtime. A wrong URL or password shows in [`link`](Self::link) and [`wait_up`](Self::wait_up).
    pub fn rabbit(options: RabbitOptions) -> Self {
        Self { twin: Twin::Rabbit(rabbit::Rabbit::start(options)) }
    }

    /// Another client of the same broker, with a link and declarations of its own.
    #[must_use]
    pub fn another(&self, name: &str) -> Self {
        let twin = match &self.twin {
            Twin::Memory(memory) => Twin::Memory(memory.another()),
            Twin::Rabbit(rabbit) => Twin::Rabbit(rabbit.another(name)),
        };
        Self { twin }
    }

    /// How the link is, now and from now on.
    pub fn link(&self) -> watch::Receiver<Link> {
        match &self.twin {
            Twin::Memory(memory) => memory.link(),
            Twin::Rabbit(rabbit) => rabbit.link(),
        }
    }

    /// Waits until messages can be sent and received; a blocked link does not count.
    ///
    /// The error is why the last try to connect failed.
    pub async fn wait_up(&self, limit: Duration) -> Result<(), Error> {
        let mut link = self.link();
        let up = tokio::time::timeout(limit, link.wait_for(|link| matches!(link, Link::Up))).await;
        match up {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(_)) => Err(Error::Closed),
            Err(_) => {
                let now = self.link().borrow().clone();
                Err(match now {
                    Link::Up => return Ok(()),
                    Link::Blocked { reason, .. } => Error::Blocked { reason },
                    Link::Connecting { last_error: Some(error), .. } => error,
                    Link::Connecting { last_error: None, .. } => {
                        Error::NoAnswer { doing: "connect".to_owned(), limit }
                    }
                    Link::Closed => Error::Closed,
                })
            }
        }
    }

    /// Sends one message and waits for the broker's answer, no longer than the link's publish timeout.
    ///
    /// Dropping the future leaves the outcome unknown.
    pub async fn publish(&self, message: Publish) -> Result<Published, PublishError> {
        match &self.twin {
            Twin::Memory(memory) => memory.publish(message).await,
            Twin::Rabbit(rabbit) => rabbit.publish(message).await,
        }
    }

    /// Makes exchanges, queues and bindings exist, now and on every later connection.
    ///
    /// Remembered even when the answer is an error: a conflict that is resolved by a person heals at the next
    /// reconnect. All of them are tried; the error is the first.
    pub async fn declare(&self, declarations: &[Declaration]) -> Result<Declared, Error> {
        match &self.twin {
            Twin::Memory(memory) => memory.declare(declarations),
            Twin::Rabbit(rabbit) => rabbit.declare(declarations).await,
        }
    }

    /// Begins to receive from a queue, at most `prefetch` (at least one) unsettled messages at a time.
    ///
    /// Works before the queue exists and before there is a connection: messages come when both do.
    pub fn consume(&self, queue: &str, prefetch: u16) -> Consumer {
        match &self.twin {
            Twin::Memory(memory) => Consumer::memory(memory.consume(queue, prefetch)),
            Twin::Rabbit(rabbit) => Consumer::rabbit(rabbit.consume(queue, prefetch)),
        }
    }

    /// How full a queue is; `None` when it does not exist. To ask counts as use: a queue that somebody keeps asking
    /// for does not expire.
    pub async fn depth(&self, queue: &str) -> Result<Option<Depth>, Error> {
        match &self.twin {
            Twin::Memory(memory) => memory.depth(queue),
            Twin::Rabbit(rabbit) => rabbit.depth(queue).await,
        }
    }

    /// Ends the link: consumers end, unsettled deliveries go back, later publishes fail with [`Error::Closed`].
    pub async fn close(&self) {
        match &self.twin {
            Twin::Memory(memory) => memory.close(),
            Twin::Rabbit(rabbit) => rabbit.close().await,
        }
    }

    /// The means to break this client's link, in tests and simulations; `None` on RabbitMQ.
    pub fn memory_faults(&self) -> Option<MemoryFaults> {
        match &self.twin {
            Twin::Memory(memory) => Some(memory.faults()),
            Twin::Rabbit(_) => None,
        }
    }
}
