//! Receiving. A task holds the channel and builds it anew whenever anything is odd: an error, an end of the stream, a
//! channel that is closed. lapin's own consumers may otherwise wait for ever on a channel that is gone.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use futures::{FutureExt, StreamExt};
use lapin::Acker;
use lapin::Channel;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions,
    BasicRejectOptions,
};
use lapin::types::{FieldTable, ShortString};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::connection::{Connected, Role};
use super::{Owner, Shared, declare, table};
use crate::chance::back_off;
use crate::message::Verdict;
use crate::{Delivery, Error, Settled};

const FIRST_BACK_OFF: Duration = Duration::from_millis(50);
/// A consumer that worked this long was a good one.
const HELD: Duration = Duration::from_secs(10);
/// How often to look whether the channel is still there.
const LOOK: Duration = Duration::from_secs(1);
const TAG: &str = "pgmuster";

/// The user's end of a consumer; the task ends with it.
pub(crate) struct Consumer {
    queue: String,
    deliveries: mpsc::Receiver<Delivery>,
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
    limit: Duration,
}

impl fmt::Debug for Consumer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Consumer").field("queue", &self.queue).finish_non_exhaustive()
    }
}

impl Consumer {
    pub(super) fn start(owner: Arc<Owner>, queue: &str, prefetch: u16) -> Self {
        let prefetch = prefetch.max(1);
        let shared = &owner.shared;
        let stop = shared.stop.child_token();
        let limit = shared.options.answer_limit;
        let tasks = shared.tasks.clone();
        let (sender, deliveries) = mpsc::channel(usize::from(prefetch));
        let receiving =
            Receiving { owner, queue: queue.to_owned(), prefetch, sender, stop: stop.clone() };
        let task = Some(tasks.spawn(receiving.run()));
        Self { queue: queue.to_owned(), deliveries, stop, task, limit }
    }

    pub(crate) async fn next(&mut self) -> Option<Delivery> {
        loop {
            let delivery = self.deliveries.recv().await?;
            // Fetched over a channel that is gone since: RabbitMQ has taken it back already.
            match &delivery.settler {
                crate::message::Settler::Rabbit(settler) if settler.is_stale() => {}
                _ => return Some(delivery),
            }
        }
    }

    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        self.deliveries.close();
        while let Some(delivery) = self.deliveries.recv().await {
            let _: Settled = delivery.requeue().await;
        }
        if let Some(task) = self.task.take() {
            // It has limits of its own for everything it waits for.
            let _: Result<_, _> = timeout(self.limit * 2, task).await;
        }
    }
}

impl Drop for Consumer {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The task's end.
struct Receiving {
    owner: Arc<Owner>,
    queue: String,
    prefetch: u16,
    sender: mpsc::Sender<Delivery>,
    stop: CancellationToken,
}

impl Receiving {
    async fn run(self) {
        let shared = self.owner.shared.clone();
        let mut connections = shared.connections[Role::Consume.index()].subscribe();
        let mut failures = 0;
        let mut last: Option<Arc<Connected>> = None;
        loop {
            let connected = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                connected = connections.wait_for(Option::is_some) => match connected {
                    Ok(connected) => connected.clone(),
                    Err(_) => return,
                },
            };
            let Some(connected) = connected else { continue };
            // On a new connection everything was just declared. On one that had us before, the queue may be gone.
            let again = last.as_ref().is_some_and(|last| last.is(&connected));
            let since = Instant::now();
            let ended = tokio::select! {
                biased;
                () = self.stop.cancelled() => return,
                begun = self.begin(&shared, &connected, again) => match begun {
                    Ok((channel, consumer)) => self.receive(channel, consumer).await,
                    Err(error) => Err(error),
                },
            };
            let Err(error) = ended else { return };
            if since.elapsed() > HELD {
                failures = 0;
            }
            tracing::warn!(%error, queue = self.queue, failures, "receiving was interrupted");
            last = Some(connected);
            let wait = back_off(failures, FIRST_BACK_OFF, shared.options.longest_back_off);
            failures = failures.saturating_add(1);
            tokio::select! {
                () = self.stop.cancelled() => return,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    async fn begin(
        &self,
        shared: &Shared,
        connected: &Connected,
        again: bool,
    ) -> Result<(Channel, lapin::Consumer), Error> {
        if again {
            declare::all(shared, connected, &shared.remembered().about(&self.queue)).await?;
        }
        let channel = connected.channel(shared).await?;
        // Before the first message, or lapin would buffer the whole queue.
        let qos = channel.basic_qos(self.prefetch, BasicQosOptions { global: false });
        shared.limited("limit what is fetched", qos).await?;
        let consuming = channel.basic_consume(
            table::short(&self.queue)?,
            ShortString::from(TAG),
            BasicConsumeOptions::default(),
            FieldTable::default(),
        );
        let doing = format!("receive from queue {:?}", self.queue);
        let consumer = shared.limited(&doing, consuming).await?;
        Ok((channel, consumer))
    }

    /// Passes messages on until the user ends it (`Ok`) or the channel does.
    async fn receive(&self, channel: Channel, mut consumer: lapin::Consumer) -> Result<(), Error> {
        let shared = &self.owner.shared;
        let doing = || format!("receive from queue {:?}", self.queue);
        let mut look = tokio::time::interval(LOOK);
        loop {
            let received = tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                received = consumer.next() => received,
                _ = look.tick() => {
                    if channel.status().connected() {
                        continue;
                    }
                    None
                }
            };
            let delivery = match received {
                Some(Ok(received)) => self.delivery(&channel, received),
                Some(Err(error)) => return Err(shared.error(&doing(), &error)),
                None => {
                    let cause = "the broker ended it".to_owned();
                    return Err(Error::Refused { doing: doing(), cause });
                }
            };
            tokio::select! {
                biased;
                () = self.stop.cancelled() => break,
                // Full only while messages of a channel that is gone lie there unread.
                room = self.sender.reserve() => match room {
                    Ok(room) => room.send(delivery),
                    Err(_) => break,
                },
            }
        }
        let cancel = channel.basic_cancel(ShortString::from(TAG), BasicCancelOptions::default());
        if let Err(error) = shared.limited("stop receiving", cancel).await {
            tracing::debug!(%error, queue = self.queue, "the consumer ends with its channel");
        }
        while let Some(Some(Ok(received))) = consumer.next().now_or_never() {
            let _: Settled = self.delivery(&channel, received).requeue().await;
        }
        Ok(())
    }

    fn delivery(&self, channel: &Channel, received: lapin::message::Delivery) -> Delivery {
        let lapin::message::Delivery {
            exchange,
            routing_key,
            redelivered,
            properties,
            data,
            acker,
            ..
        } = received;
        let headers = properties.headers().clone().unwrap_or_default();
        let text =
            |text: &Option<ShortString>| text.as_ref().map(ToString::to_string).unwrap_or_default();
        Delivery {
            body: data.into(),
            message_id: text(properties.message_id()),
            kind: text(properties.kind()),
            headers: table::texts(&headers),
            redelivered,
            exchange: exchange.into(),
            routing_key: routing_key.into(),
            deaths: table::deaths(&headers),
            settler: crate::message::Settler::Rabbit(Settler {
                acker: Some(acker),
                channel: channel.clone(),
                runtime: Handle::current(),
                limit: self.owner.shared.options.answer_limit,
                owner: self.owner.clone(),
            }),
        }
    }
}

/// Settles one delivery. Keeps its channel open: a channel that closes takes its deliveries back.
pub(crate) struct Settler {
    acker: Option<Acker>,
    channel: Channel,
    runtime: Handle,
    limit: Duration,
    owner: Arc<Owner>,
}

impl fmt::Debug for Settler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settler").field("acker", &self.acker).finish_non_exhaustive()
    }
}

impl Settler {
    pub(crate) async fn settle(mut self, verdict: Verdict) -> Settled {
        let Some(acker) = self.acker.take() else { return Settled::Stale };
        match timeout(self.limit, tell(&acker, verdict)).await {
            Ok(Ok(true)) => Settled::Done,
            // Told too late, to nobody, or perhaps not at all.
            Ok(Ok(false) | Err(_)) | Err(_) => Settled::Stale,
        }
    }

    fn is_stale(&self) -> bool {
        !self.acker.as_ref().is_some_and(Acker::usable)
    }
}

impl Drop for Settler {
    fn drop(&mut self) {
        let Some(acker) = self.acker.take().filter(Acker::usable) else { return };
        let (channel, owner, limit) = (self.channel.clone(), self.owner.clone(), self.limit);
        self.runtime.spawn(async move {
            // Untold, the message comes back when its channel closes, which dropping these makes sure of.
            let _: Result<lapin::Result<bool>, _> =
                timeout(limit, tell(&acker, Verdict::Requeue)).await;
            drop((channel, owner));
        });
    }
}

async fn tell(acker: &Acker, verdict: Verdict) -> lapin::Result<bool> {
    match verdict {
        Verdict::Ack => acker.ack(BasicAckOptions { multiple: false }).await,
        Verdict::Requeue => acker.nack(BasicNackOptions { multiple: false, requeue: true }).await,
        Verdict::Reject => acker.reject(BasicRejectOptions { requeue: false }).await,
    }
}
