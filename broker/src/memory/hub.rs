//! The state of the in-process broker: exchanges, queues, clients, consumers, and what passes between them.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::route;
use crate::message::Verdict;
use crate::{
    Binding, Death, Declaration, Declared, Depth, Error, ExchangeKind, Publish, PublishError,
    Published, Queue, QueueKind, Settled,
};

pub(super) type ClientId = u64;
pub(super) type ConsumerId = u64;
pub(super) type Tag = u64;

/// The broker: one state under one lock, and a task that wakes when something expires.
#[derive(Default)]
pub(super) struct Hub {
    state: Mutex<State>,
    expiry: Arc<Notify>,
}

/// Ordered maps throughout: the same calls give the same deliveries, in every run.
#[derive(Default)]
struct State {
    exchanges: BTreeMap<String, ExchangeKind>,
    bindings: Vec<Binding>,
    queues: BTreeMap<String, QueueState>,
    consumers: BTreeMap<ConsumerId, ConsumerState>,
    clients: BTreeMap<ClientId, ClientState>,
    /// Grows; gives out every id and every position in a queue.
    counter: u64,
    watches_expiry: bool,
}

#[derive(Default)]
struct ClientState {
    cut: bool,
    remembered: Declaration,
    faults: Faults,
}

/// What shall go wrong, and how often still.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) lose_answers: u32,
    pub(super) lose_messages: u32,
    pub(super) duplicate_deliveries: u32,
}

struct QueueState {
    queue: Queue,
    /// In order of position.
    ready: VecDeque<Stored>,
    /// Since when nobody consumes; an expiring queue goes some time after.
    unused_since: Option<Instant>,
    /// The consumer that was served last.
    last_served: ConsumerId,
}

#[derive(Clone)]
struct Stored {
    position: u64,
    message: Arc<Publish>,
    exchange: String,
    routing_key: String,
    expires_at: Option<Instant>,
    redelivered: bool,
    /// How often it was handed back.
    returns: u32,
    deaths: Vec<Death>,
}

struct ConsumerState {
    client: ClientId,
    queue: String,
    prefetch: usize,
    wake: Arc<Notify>,
    /// Fetched, and not yet given out by `next`.
    fetched: VecDeque<Tag>,
    /// Delivered and not settled, those fetched included.
    unsettled: BTreeMap<Tag, Stored>,
    /// False when it was dropped and only its deliveries live on.
    receiving: bool,
}

/// What a consumer gets when it asks.
pub(super) enum Next {
    Message {
        tag: Tag,
        message: Arc<Publish>,
        redelivered: bool,
        exchange: String,
        routing_key: String,
        deaths: Vec<Death>,
    },
    Wait,
}

impl Hub {
    /// Every change leaves the state whole before anything can panic, so a poisoned lock is as good as any.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a change, then hands out what can be handed out.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let result = change(&mut state);
        state.settle_down(Instant::now());
        drop(state);
        self.expiry.notify_one();
        result
    }

    pub(super) fn join(&self) -> ClientId {
        let mut state = self.lock();
        let id = state.next_number();
        state.clients.insert(id, ClientState::default());
        id
    }

    pub(super) fn leave(&self, client: ClientId) {
        self.change(|state| {
            state.hand_back(|consumer| consumer.client == client);
            state.consumers.retain(|_, consumer| consumer.client != client);
            state.clients.remove(&client);
        });
    }

    pub(super) fn faults(&self, client: ClientId, set: impl FnOnce(&mut Faults)) {
        if let Some(client) = self.lock().clients.get_mut(&client) {
            set(&mut client.faults);
        }
    }

    pub(super) fn cut(&self, client: ClientId) {
        self.change(|state| {
            if let Some(client) = state.clients.get_mut(&client) {
                client.cut = true;
            }
            state.hand_back(|consumer| consumer.client == client);
        });
    }

    pub(super) fn restore(&self, client: ClientId) {
        self.change(|state| {
            let Some(state_of_client) = state.clients.get_mut(&client) else { return };
            state_of_client.cut = false;
            let remembered = state_of_client.remembered.clone();
            if let Err(error) = state.declare(&remembered) {
                tracing::warn!(%error, "a declaration could not be repeated");
            }
        });
    }

    pub(super) fn wake_consumers(&self, client: ClientId) {
        for consumer in self.lock().consumers.values() {
            if consumer.client == client {
                consumer.wake.notify_one();
            }
        }
    }

    /// Also the place where the task that watches expiries begins: whoever declares is inside a runtime.
    pub(super) fn declare(
        self: &Arc<Self>,
        client: ClientId,
        declaration: &Declaration,
    ) -> Result<Declared, Error> {
        let (declared, watch) = self.change(|state| {
            let watch = !std::mem::replace(&mut state.watches_expiry, true);
            let Some(client) = state.clients.get_mut(&client) else {
                return (Err(Error::Closed), watch);
            };
            client.remembered.merge(declaration);
            if client.cut {
                return (Ok(Declared::Later), watch);
            }
            (state.declare(declaration).map(|()| Declared::Now), watch)
        });
        if watch {
            tokio::spawn(watch_expiry(Arc::downgrade(self), self.expiry.clone()));
        }
        declared
    }

    pub(super) fn depth(&self, queue: &str) -> Option<Depth> {
        self.change(|state| {
            let queue_state = state.queues.get_mut(queue)?;
            queue_state.unused_since = queue_state.unused_since.map(|_| Instant::now());
            let queue_state = state.queues.get(queue)?;
            Some(Depth {
                messages: u32::try_from(queue_state.ready.len()).unwrap_or(u32::MAX),
                consumers: u32::try_from(state.attached(queue).count()).unwrap_or(u32::MAX),
            })
        })
    }

    pub(super) fn publish(
        &self,
        client: ClientId,
        message: Publish,
    ) -> Result<Published, PublishError> {
        let id = message.message_id.clone();
        let lost = || {
            let cause = "the answer got lost".to_owned();
            Err(PublishError::unknown(&id, Error::Refused { doing: "publish".to_owned(), cause }))
        };
        self.change(|state| {
            let Some(client) = state.clients.get_mut(&client).filter(|client| !client.cut) else {
                return Err(PublishError::not_sent(&id, Error::Closed));
            };
            if take_one(&mut client.faults.lose_messages) {
                return lost();
            }
            let lose_answer = take_one(&mut client.faults.lose_answers);
            let now = Instant::now();
            let mandatory = message.mandatory;
            let stored = Stored {
                position: 0,
                exchange: message.exchange.clone(),
                routing_key: message.routing_key.clone(),
                expires_at: message.expiration_ms.map(|ms| now + Duration::from_millis(ms)),
                redelivered: false,
                returns: 0,
                deaths: Vec::new(),
                message: Arc::new(message),
            };
            let routed =
                state.route(&stored, now).map_err(|cause| PublishError::not_sent(&id, cause))?;
            match (lose_answer, routed) {
                (true, _) => lost(),
                (false, 0) if mandatory => Ok(Published::Unroutable),
                (false, _) => Ok(Published::Routed),
            }
        })
    }

    pub(super) fn consume(
        &self,
        client: ClientId,
        queue: &str,
        prefetch: u16,
        wake: Arc<Notify>,
    ) -> ConsumerId {
        self.change(|state| {
            let id = state.next_number();
            let consumer = ConsumerState {
                client,
                queue: queue.to_owned(),
                prefetch: usize::from(prefetch.max(1)),
                wake,
                fetched: VecDeque::new(),
                unsettled: BTreeMap::new(),
                receiving: true,
            };
            state.consumers.insert(id, consumer);
            id
        })
    }

    pub(super) fn next(&self, consumer: ConsumerId) -> Next {
        let mut state = self.lock();
        let Some(consumer) = state.consumers.get_mut(&consumer) else { return Next::Wait };
        let Some(tag) = consumer.fetched.pop_front() else { return Next::Wait };
        let Some(stored) = consumer.unsettled.get(&tag) else { return Next::Wait };
        Next::Message {
            tag,
            message: stored.message.clone(),
            redelivered: stored.redelivered,
            exchange: stored.exchange.clone(),
            routing_key: stored.routing_key.clone(),
            deaths: stored.deaths.clone(),
        }
    }

    /// The consumer is gone; what it fetched and did not give out goes back, what it gave out may still be settled.
    pub(super) fn detach(&self, id: ConsumerId) {
        self.change(|state| {
            let Some(consumer) = state.consumers.get_mut(&id) else { return };
            consumer.receiving = false;
            let fetched: Vec<Stored> = consumer
                .fetched
                .drain(..)
                .filter_map(|tag| consumer.unsettled.remove(&tag))
                .collect();
            let queue = consumer.queue.clone();
            for stored in fetched {
                state.put_back(&queue, stored, Instant::now());
            }
        });
    }

    pub(super) fn settle(&self, id: ConsumerId, tag: Tag, verdict: Verdict) -> Settled {
        self.change(|state| {
            let Some(consumer) = state.consumers.get_mut(&id) else { return Settled::Stale };
            let Some(stored) = consumer.unsettled.remove(&tag) else { return Settled::Stale };
            let queue = consumer.queue.clone();
            match verdict {
                Verdict::Ack => {}
                Verdict::Requeue => state.put_back(&queue, stored, Instant::now()),
                Verdict::Reject => state.bury(&queue, stored, "rejected", Instant::now()),
            }
            Settled::Done
        })
    }
}

impl State {
    fn next_number(&mut self) -> u64 {
        self.counter += 1;
        self.counter
    }

    fn declare(&mut self, declaration: &Declaration) -> Result<(), Error> {
        let mut first_error = None;
        let conflict = |what, name: &str| Error::Conflict {
            what,
            name: name.to_owned(),
            cause: "it has other arguments".to_owned(),
        };
        for exchange in &declaration.exchanges {
            let kind = self.exchanges.entry(exchange.name.clone()).or_insert(exchange.kind);
            if *kind != exchange.kind {
                first_error.get_or_insert(conflict("exchange", &exchange.name));
            }
        }
        for queue in &declaration.queues {
            let now = Instant::now();
            let there = self.queues.entry(queue.name.clone()).or_insert_with(|| QueueState {
                queue: queue.clone(),
                ready: VecDeque::new(),
                unused_since: Some(now),
                last_served: 0,
            });
            if there.queue == *queue {
                there.unused_since = there.unused_since.map(|_| now);
            } else {
                first_error.get_or_insert(conflict("queue", &queue.name));
            }
        }
        for binding in &declaration.bindings {
            let missing = if self.exchanges.contains_key(&binding.exchange) {
                (!self.queues.contains_key(&binding.queue)).then_some(("queue", &binding.queue))
            } else {
                Some(("exchange", &binding.exchange))
            };
            if let Some((what, name)) = missing {
                first_error.get_or_insert(Error::Refused {
                    doing: format!(
                        "bind queue {:?} to exchange {:?}",
                        binding.queue, binding.exchange
                    ),
                    cause: format!("there is no {what} {name:?}"),
                });
            } else if !self.bindings.contains(binding) {
                self.bindings.push(binding.clone());
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    /// Puts a message into every queue its exchange chooses; how many these were.
    fn route(&mut self, stored: &Stored, now: Instant) -> Result<usize, Error> {
        let Some(kind) = self.exchanges.get(&stored.exchange) else {
            return Err(Error::Refused {
                doing: format!("publish to exchange {:?}", stored.exchange),
                cause: "there is no such exchange".to_owned(),
            });
        };
        let bindings = self.bindings.iter().filter(|binding| binding.exchange == stored.exchange);
        let chosen: Vec<String> = route::queues(*kind, bindings, &stored.routing_key)
            .into_iter()
            .map(str::to_owned)
            .collect();
        for name in &chosen {
            let position = self.next_number();
            let Some(queue) = self.queues.get_mut(name) else { continue };
            let mut copy = Stored { position, ..stored.clone() };
            let by_queue = queue.queue.message_ttl.map(|ttl| now + ttl);
            copy.expires_at = [copy.expires_at, by_queue].into_iter().flatten().min();
            queue.ready.push_back(copy);
            self.trim(name, now);
        }
        Ok(chosen.len())
    }

    /// Back to where it stood.
    fn put_back(&mut self, name: &str, mut stored: Stored, now: Instant) {
        stored.redelivered = true;
        stored.returns += 1;
        let Some(queue) = self.queues.get_mut(name) else { return };
        if let QueueKind::Quorum { delivery_limit } = queue.queue.kind
            && stored.returns > delivery_limit
        {
            return self.bury(name, stored, "delivery_limit", now);
        }
        let at = queue.ready.partition_point(|other| other.position < stored.position);
        queue.ready.insert(at, stored);
        self.trim(name, now);
    }

    /// Drops the oldest above the bound.
    fn trim(&mut self, name: &str, now: Instant) {
        while let Some(queue) = self.queues.get_mut(name)
            && let Some(bound) = queue.queue.max_length
            && queue.ready.len() > usize::try_from(bound).unwrap_or(usize::MAX)
            && let Some(oldest) = queue.ready.pop_front()
        {
            self.bury(name, oldest, "maxlen", now);
        }
    }

    /// To the dead letters of its queue, or to nothing.
    fn bury(&mut self, name: &str, mut stored: Stored, reason: &str, now: Instant) {
        let Some(exchange) =
            self.queues.get(name).and_then(|q| q.queue.dead_letter_exchange.clone())
        else {
            return;
        };
        let before = stored.deaths.iter().position(|d| d.queue == name && d.reason == reason);
        let mut death = match before {
            Some(at) => stored.deaths.remove(at),
            None => Death {
                queue: name.to_owned(),
                reason: reason.to_owned(),
                count: 0,
                exchange: stored.exchange.clone(),
                routing_key: stored.routing_key.clone(),
            },
        };
        death.count += 1;
        stored.deaths.insert(0, death);
        let letter =
            Stored { exchange, expires_at: None, redelivered: false, returns: 0, ..stored };
        // An exchange that does not exist takes the letter with it, as RabbitMQ's default strategy does.
        let _: Result<usize, Error> = self.route(&letter, now);
    }

    /// Everything the chosen consumers have not settled goes back.
    fn hand_back(&mut self, chosen: impl Fn(&ConsumerState) -> bool) {
        let mut back = Vec::new();
        for consumer in self.consumers.values_mut().filter(|consumer| chosen(consumer)) {
            consumer.fetched.clear();
            for stored in std::mem::take(&mut consumer.unsettled).into_values() {
                back.push((consumer.queue.clone(), stored));
            }
        }
        for (queue, stored) in back {
            self.put_back(&queue, stored, Instant::now());
        }
    }

    /// The consumers a queue can deliver to.
    fn attached(&self, queue: &str) -> impl Iterator<Item = (ConsumerId, &ConsumerState)> {
        self.consumers.iter().map(|(id, consumer)| (*id, consumer)).filter(move |(_, consumer)| {
            consumer.receiving
                && consumer.queue == queue
                && self.clients.get(&consumer.client).is_some_and(|client| !client.cut)
        })
    }

    /// Expires what is due, delivers what can be delivered, forgets consumers that are gone.
    fn settle_down(&mut self, now: Instant) {
        self.consumers.retain(|_, consumer| consumer.receiving || !consumer.unsettled.is_empty());
        let names: Vec<String> = self.queues.keys().cloned().collect();
        for name in &names {
            let used = self.attached(name).next().is_some();
            let Some(queue) = self.queues.get_mut(name) else { continue };
            queue.unused_since = if used { None } else { queue.unused_since.or(Some(now)) };
            let gone = queue.queue.expires.zip(queue.unused_since);
            if gone.is_some_and(|(after, since)| since + after <= now) {
                self.queues.remove(name);
                self.bindings.retain(|binding| binding.queue != *name);
            }
        }
        // Dead letters may wake a queue that was done: until nothing moves.
        while names.iter().fold(false, |moved, name| self.deliver(name, now) | moved) {}
    }

    /// As in RabbitMQ, a message expires when it has come to the head of its queue.
    fn expire(&mut self, name: &str, now: Instant) -> bool {
        let mut moved = false;
        while let Some(queue) = self.queues.get_mut(name)
            && queue.ready.front().and_then(|head| head.expires_at).is_some_and(|at| at <= now)
            && let Some(head) = queue.ready.pop_front()
        {
            self.bury(name, head, "expired", now);
            moved = true;
        }
        moved
    }

    /// One message to each consumer in turn, until the queue is empty or every consumer has enough.
    fn deliver(&mut self, name: &str, now: Instant) -> bool {
        let mut moved = self.expire(name, now);
        while let Some(queue) = self.queues.get(name)
            && !queue.ready.is_empty()
        {
            let last = queue.last_served;
            let free: Vec<ConsumerId> = self
                .attached(name)
                .filter(|(_, consumer)| consumer.unsettled.len() < consumer.prefetch)
                .map(|(id, _)| id)
                .collect();
            let Some(chosen) = free.iter().copied().find(|id| *id > last).or(free.first().copied())
            else {
                break;
            };
            self.deliver_to(name, chosen);
            self.expire(name, now);
            moved = true;
        }
        moved
    }

    fn deliver_to(&mut self, name: &str, id: ConsumerId) {
        let tag = self.next_number();
        let Some(queue) = self.queues.get_mut(name) else { return };
        let Some(stored) = queue.ready.pop_front() else { return };
        queue.last_served = id;
        let Some(consumer) = self.consumers.get_mut(&id) else { return };
        let twice = self
            .clients
            .get_mut(&consumer.client)
            .is_some_and(|client| take_one(&mut client.faults.duplicate_deliveries));
        if twice {
            queue.ready.push_front(Stored { redelivered: true, ..stored.clone() });
        }
        consumer.unsettled.insert(tag, stored);
        consumer.fetched.push_back(tag);
        consumer.wake.notify_one();
    }

    /// When something expires next.
    fn next_expiry(&self) -> Option<Instant> {
        let heads = self.queues.values().filter_map(|queue| queue.ready.front()?.expires_at);
        let unused = self
            .queues
            .values()
            .filter_map(|queue| Some(queue.unused_since? + queue.queue.expires?));
        heads.chain(unused).min()
    }
}

/// Whether one of `left` was left, and takes it.
fn take_one(left: &mut u32) -> bool {
    let some = *left > 0;
    *left = left.saturating_sub(1);
    some
}

/// Lives as long as the hub and wakes it when something is due.
async fn watch_expiry(hub: Weak<Hub>, changed: Arc<Notify>) {
    while let Some(due) = hub.upgrade().map(|hub| hub.lock().next_expiry()) {
        match due {
            Some(due) => {
                tokio::select! {
                    () = tokio::time::sleep_until(due) => {
                        if let Some(hub) = hub.upgrade() {
                            hub.lock().settle_down(Instant::now());
                        }
                    }
                    () = changed.notified() => {}
                }
            }
            None => changed.notified().await,
        }
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.expiry.notify_one();
    }
}
