//! Which exchanges, queues and bindings there are, with the arguments that correctness needs.
//!
//! Arguments are fixed for ever: a queue cannot be declared anew with others. So only what must hold on every broker
//! (RabbitMQ 3.10 to 4.x) is one; what an operator may tune is a policy and does not appear here.

use std::time::Duration;

use proto::topology::{self, TicketQueue};
use proto::{Lane, SiteName, WorkerName};

/// After this long without a consumer a worker's or coordinator's own queue goes away.
const UNUSED: Duration = Duration::from_mins(10);
/// How long a heartbeat is worth reading.
const PULSE_TTL: Duration = Duration::from_secs(30);
/// How long a control message is worth reading.
const CONTROL_TTL: Duration = Duration::from_mins(5);
/// How long waking a coordinator is worth the trouble.
const WAKE_TTL: Duration = Duration::from_mins(1);
/// A message that failed this often is poison. Generous: up to RabbitMQ 4.2 every lost connection counts as a failure.
const DELIVERY_LIMIT: u32 = 100;
/// For the queue of dead letters, behind which there is nothing: RabbitMQ 4 would drop them after 20 deliveries.
const NO_DELIVERY_LIMIT: u32 = 1_000_000;

/// How an exchange chooses queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExchangeKind {
    /// Those bound with exactly this routing key.
    Direct,
    /// All.
    Fanout,
    /// Those bound with a matching pattern: words between dots, `*` for one, `#` for any number.
    Topic,
}

/// A durable exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Exchange {
    /// Its name.
    pub name: String,
    /// How it chooses.
    pub kind: ExchangeKind,
}

/// How a queue keeps messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum QueueKind {
    /// Replicated on a majority of the cluster's nodes.
    Quorum {
        /// How often a message may be handed back before it is a dead letter.
        delivery_limit: u32,
    },
    /// On one node.
    Classic,
}

/// A durable queue.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Queue {
    /// Its name.
    pub name: String,
    /// How it keeps messages.
    pub kind: QueueKind,
    /// It goes away, with its messages, after this long without a consumer.
    pub expires: Option<Duration>,
    /// Messages expire after this long.
    pub message_ttl: Option<Duration>,
    /// Above this many the oldest messages are dropped.
    pub max_length: Option<u32>,
    /// Where messages go that were rejected, expired, pushed out or delivered too often.
    pub dead_letter_exchange: Option<String>,
}

impl Queue {
    /// A classic queue without bounds.
    pub fn classic(name: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            kind: QueueKind::Classic,
            expires: None,
            message_ttl: None,
            max_length: None,
            dead_letter_exchange: None,
        }
    }

    /// A quorum queue whose dead letters go to [`topology::DEAD`].
    pub fn quorum(name: impl Into<String>) -> Self {
        Self {
            kind: QueueKind::Quorum { delivery_limit: DELIVERY_LIMIT },
            dead_letter_exchange: Some(topology::DEAD.to_owned()),
            ..Self::classic(name)
        }
    }
}

/// That a queue gets messages from an exchange.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    /// From here
    pub exchange: String,
    /// to there,
    pub queue: String,
    /// for this routing key or pattern.
    pub routing_key: String,
}

/// A set of exchanges, queues and bindings that one party needs. Declaring it twice, or by both sides, is harmless.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Declaration {
    /// The exchanges.
    pub exchanges: Vec<Exchange>,
    /// The queues.
    pub queues: Vec<Queue>,
    /// The bindings.
    pub bindings: Vec<Binding>,
}

impl Declaration {
    /// What a coordinator needs whoever the workers are.
    pub fn coordinator() -> Self {
        Self::common().exchange(topology::WAKE, ExchangeKind::Fanout)
    }

    /// The two ticket queues any worker of a site reads.
    pub fn site(site: &SiteName) -> Self {
        let mut all = Self::common();
        for lane in Lane::ALL {
            let tickets = TicketQueue::Site(site.clone(), lane);
            let queue = Queue::quorum(tickets.to_string());
            all = all.bound(queue, topology::JOBS, &tickets.routing_key());
        }
        all
    }

    /// What one worker needs: its own ticket queues, its control queue, and those of its site.
    pub fn worker(worker: &WorkerName, site: &SiteName) -> Self {
        let mut all = Self::site(site);
        for lane in Lane::ALL {
            let tickets = TicketQueue::Worker(worker.clone(), lane);
            let queue = Queue {
                expires: Some(UNUSED),
                dead_letter_exchange: Some(topology::DEAD.to_owned()),
                ..Queue::classic(tickets.to_string())
            };
            all = all.bound(queue, topology::JOBS, &tickets.routing_key());
        }
        let control = Queue {
            expires: Some(UNUSED),
            message_ttl: Some(CONTROL_TTL),
            max_length: Some(1000),
            ..Queue::classic(topology::control_queue(worker))
        };
        let name = control.name.clone();
        all.bound(control, topology::CONTROL, worker.as_str()).binding(topology::BEACON, &name, "")
    }

    /// The queue on which one coordinator is woken by the others.
    pub fn wake(coordinator: &WorkerName) -> Self {
        let queue = Queue {
            expires: Some(UNUSED),
            message_ttl: Some(WAKE_TTL),
            max_length: Some(10),
            ..Queue::classic(topology::wake_queue(coordinator))
        };
        Self::default().exchange(topology::WAKE, ExchangeKind::Fanout).bound(
            queue,
            topology::WAKE,
            "",
        )
    }

    /// What both sides declare, so that either may start first and nobody's message finds no queue.
    fn common() -> Self {
        let dead = Queue {
            kind: QueueKind::Quorum { delivery_limit: NO_DELIVERY_LIMIT },
            ..Queue::classic(topology::DEAD)
        };
        let pulse = Queue {
            message_ttl: Some(PULSE_TTL),
            max_length: Some(10_000),
            ..Queue::classic(topology::PULSE)
        };
        Self::default()
            .exchange(topology::DEAD, ExchangeKind::Fanout)
            .exchange(topology::JOBS, ExchangeKind::Topic)
            .exchange(topology::CLAIMS, ExchangeKind::Direct)
            .exchange(topology::REPORTS, ExchangeKind::Direct)
            .exchange(topology::PULSE, ExchangeKind::Direct)
            .exchange(topology::CONTROL, ExchangeKind::Direct)
            .exchange(topology::BEACON, ExchangeKind::Fanout)
            .bound(dead, topology::DEAD, "")
            .bound(Queue::quorum(topology::CLAIMS), topology::CLAIMS, topology::CLAIMS)
            .bound(Queue::quorum(topology::REPORTS), topology::REPORTS, topology::REPORTS)
            .bound(pulse, topology::PULSE, topology::PULSE)
    }

    /// With another exchange.
    #[must_use]
    pub fn exchange(mut self, name: &str, kind: ExchangeKind) -> Self {
        self.exchanges.push(Exchange { name: name.to_owned(), kind });
        self
    }

    /// With another queue, bound to an exchange.
    #[must_use]
    pub fn bound(self, queue: Queue, exchange: &str, routing_key: &str) -> Self {
        let name = queue.name.clone();
        self.queue(queue).binding(exchange, &name, routing_key)
    }

    /// With another queue.
    #[must_use]
    pub fn queue(mut self, queue: Queue) -> Self {
        self.queues.push(queue);
        self
    }

    /// With another binding.
    #[must_use]
    pub fn binding(mut self, exchange: &str, queue: &str, routing_key: &str) -> Self {
        let (exchange, queue) = (exchange.to_owned(), queue.to_owned());
        self.bindings.push(Binding { exchange, queue, routing_key: routing_key.to_owned() });
        self
    }

    /// The same, with queues that expire doing so after another while. For tests: everybody who declares a queue
    /// must say the same.
    #[must_use]
    pub fn expiring_after(mut self, unused: Duration) -> Self {
        for queue in &mut self.queues {
            queue.expires = queue.expires.map(|_| unused);
        }
        self
    }

    /// The part that concerns one queue.
    pub(crate) fn about(&self, queue: &str) -> Self {
        let bindings: Vec<Binding> =
            self.bindings.iter().filter(|binding| binding.queue == queue).cloned().collect();
        let queues: Vec<Queue> = self.queues.iter().filter(|q| q.name == queue).cloned().collect();
        let needed = |exchange: &Exchange| {
            bindings.iter().any(|binding| binding.exchange == exchange.name)
                || queues.iter().any(|q| q.dead_letter_exchange.as_ref() == Some(&exchange.name))
        };
        let exchanges = self.exchanges.iter().filter(|e| needed(e)).cloned().collect();
        Self { exchanges, queues, bindings }
    }

    /// Takes over what `other` says; of two that say different things under one name, the later one holds.
    pub(crate) fn merge(&mut self, other: &Self) {
        fn add<T: Clone>(to: &mut Vec<T>, from: &[T], same: impl Fn(&T, &T) -> bool) {
            for one in from {
                match to.iter_mut().find(|there| same(there, one)) {
                    Some(there) => there.clone_from(one),
                    None => to.push(one.clone()),
                }
            }
        }
        add(&mut self.exchanges, &other.exchanges, |a, b| a.name == b.name);
        add(&mut self.queues, &other.queues, |a, b| a.name == b.name);
        add(&mut self.bindings, &other.bindings, |a, b| a == b);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site() -> SiteName {
        "fra1".parse().expect("a name")
    }

    fn worker() -> WorkerName {
        "db1".parse().expect("a name")
    }

    #[test]
    fn every_binding_joins_what_is_declared_beside_it() {
        for declaration in [
            Declaration::coordinator(),
            Declaration::site(&site()),
            Declaration::worker(&worker(), &site()),
            Declaration::wake(&worker()),
        ] {
            for binding in &declaration.bindings {
                assert!(
                    declaration.exchanges.iter().any(|e| e.name == binding.exchange),
                    "{binding:?}"
                );
                assert!(declaration.queues.iter().any(|q| q.name == binding.queue), "{binding:?}");
            }
            for queue in &declaration.queues {
                if let Some(dead) = &queue.dead_letter_exchange {
                    assert!(declaration.exchanges.iter().any(|e| e.name == *dead), "{queue:?}");
                }
            }
        }
    }

    #[test]
    fn merging_what_is_there_adds_nothing() {
        let mut all = Declaration::worker(&worker(), &site());
        let before = all.clone();
        all.merge(&Declaration::site(&site()));
        assert_eq!(all, before);
        all.merge(&Declaration::coordinator());
        assert_eq!(all.exchanges.len(), before.exchanges.len() + 1);
        all.merge(&Declaration::worker(&worker(), &site()).expiring_after(Duration::from_secs(1)));
        assert_eq!(all.queues.len(), before.queues.len());
        let control = topology::control_queue(&worker());
        let later = all.queues.iter().find(|queue| queue.name == control).expect("a queue");
        assert_eq!(later.expires, Some(Duration::from_secs(1)));
    }
}
