//! Everything a worker says: claims, reports and pulses, signed and published in order.
//!
//! Final reports go through the [spool](crate::spool) and are sent until the broker confirms them, however long that
//! takes. Everything else may be lost: the protocol repeats it or does without.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use broker::{Broker, Publish, Published};
use proto::envelope::{Credentials, Signable};
use proto::topology;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::spool::{Spool, Spooled};

/// How many reports may wait in memory; final ones beyond it wait on disk for the next start.
const QUEUE_MAX: usize = 4_096;
/// How often a report that must arrive is tried before the others get their turn.
const TRIES_IN_FRONT: u32 = 4;
/// Pause before a report is sent again, growing to the second value.
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_LAST: Duration = Duration::from_secs(10);

/// Signs and sends. Cloning shares it.
#[derive(Debug, Clone)]
pub(crate) struct Outbound {
    broker: Broker,
    credentials: Arc<Credentials>,
    reports: mpsc::Sender<Spooled>,
}

impl Outbound {
    /// Starts the task that delivers reports, beginning with those an earlier life left behind. It ends when
    /// `stop` fires and everything was delivered, or at once when `abandon` fires.
    pub(crate) fn start(
        broker: Broker,
        credentials: Arc<Credentials>,
        undelivered: Vec<Spooled>,
        stop: CancellationToken,
        abandon: CancellationToken,
    ) -> (Self, tokio::task::JoinHandle<()>) {
        let (reports, receiver) = mpsc::channel(QUEUE_MAX);
        let task = tokio::spawn(deliver(broker.clone(), undelivered, receiver, stop, abandon));
        (Self { broker, credentials, reports }, task)
    }

    /// Signs content as this worker.
    pub(crate) fn sign<T: Signable>(&self, content: &T) -> Vec<u8> {
        serde_json::to_vec(&self.credentials.sign(content)).expect("signed content is plain JSON")
    }

    /// Hands a report over. A report that may be lost is dropped when the queue is full; a final one is on disk already.
    pub(crate) fn report(&self, report: Spooled) {
        if let Err(error) = self.reports.try_send(report) {
            tracing::warn!(%error, "A report has to wait for the next start of this worker");
        }
    }

    /// Publishes a claim or decline. The caller repeats it when it matters.
    pub(crate) async fn claim(&self, message_id: String, body: Vec<u8>) -> bool {
        let message = message(topology::CLAIMS, message_id, "claim", body);
        match self.broker.publish(message).await {
            Ok(Published::Routed) => true,
            Ok(Published::Unroutable) => {
                tracing::warn!("No coordinator has declared the queue of claims yet");
                false
            }
            Err(error) => {
                tracing::warn!(error = %proto::failure::chain(&error), "Failed to publish a claim");
                false
            }
        }
    }

    /// Publishes a pulse; the next one replaces it.
    pub(crate) async fn pulse(&self, message_id: String, body: Vec<u8>) -> bool {
        let message = message(topology::PULSE, message_id, "pulse", body).transient();
        matches!(self.broker.publish(message).await, Ok(Published::Routed))
    }
}

fn message(exchange: &str, message_id: String, kind: &'static str, body: Vec<u8>) -> Publish {
    Publish::new(exchange, exchange, kind, message_id, body)
}

/// A report that waits, and how often it was tried in vain.
struct Waiting {
    report: Spooled,
    tries: u32,
}

impl Waiting {
    fn new(report: Spooled) -> Self {
        Self { report, tries: 0 }
    }
}

/// Delivers reports in order. One that the broker does not take, for whatever reason, is in nobody's way for long: after
/// [`TRIES_IN_FRONT`] it goes behind the others, and is tried again for ever. News goes in the order in which it comes,
/// before those; it does not cut short the pause after a failure, because it would go to the same broker.
async fn deliver(
    broker: Broker,
    undelivered: Vec<Spooled>,
    mut receiver: mpsc::Receiver<Spooled>,
    stop: CancellationToken,
    abandon: CancellationToken,
) {
    let mut waiting: VecDeque<Waiting> = undelivered.into_iter().map(Waiting::new).collect();
    let mut pause = RETRY_FIRST;
    loop {
        while let Ok(report) = receiver.try_recv() {
            line_up(&mut waiting, report);
        }
        let Some(mut next) = waiting.pop_front() else {
            tokio::select! {
                () = abandon.cancelled() => return,
                next = receiver.recv() => match next {
                    Some(report) => waiting.push_back(Waiting::new(report)),
                    None => return,
                },
                () = stop.cancelled() => match receiver.try_recv() {
                    Ok(report) => waiting.push_back(Waiting::new(report)),
                    Err(_) => return,
                },
            }
            continue;
        };
        let arrived = tokio::select! {
            () = abandon.cancelled() => return,
            arrived = send(&broker, &next.report) => arrived,
        };
        if arrived {
            pause = RETRY_FIRST;
            if let Err(error) = Spool::delivered(&next.report) {
                tracing::warn!(%error, "Failed to forget a delivered report; it will be sent twice");
            }
            continue;
        }
        if !next.report.must_arrive {
            continue;
        }
        next.tries = next.tries.saturating_add(1);
        if next.tries < TRIES_IN_FRONT {
            waiting.push_front(next);
        } else {
            if next.tries == TRIES_IN_FRONT {
                tracing::warn!(
                    message.id = next.report.message_id,
                    "A final report was not taken {TRIES_IN_FRONT} times; it stays on disk and waits behind the others",
                );
            }
            waiting.push_back(next);
        }
        let paused = tokio::time::sleep(pause);
        tokio::pin!(paused);
        loop {
            tokio::select! {
                () = abandon.cancelled() => return,
                () = &mut paused => break,
                // Taken in while nothing is sent, so that the channel does not fill up.
                Some(report) = receiver.recv() => line_up(&mut waiting, report),
            }
        }
        pause = (pause * 2).min(RETRY_LAST);
    }
}

/// Puts news behind the news before it, and before what was tried too often to be waited for.
fn line_up(waiting: &mut VecDeque<Waiting>, report: Spooled) {
    let place = waiting.iter().position(|other| other.tries >= TRIES_IN_FRONT);
    waiting.insert(place.unwrap_or(waiting.len()), Waiting::new(report));
}

/// Sends one report. `true` when the broker has confirmed it.
async fn send(broker: &Broker, report: &Spooled) -> bool {
    let message =
        message(topology::REPORTS, report.message_id.clone(), "report", report.body.clone());
    match broker.publish(message).await {
        Ok(Published::Routed) => return true,
        Ok(Published::Unroutable) => {
            tracing::warn!("No coordinator has declared the queue of reports yet");
        }
        Err(error) => {
            tracing::warn!(error = %proto::failure::chain(&error), "Failed to publish a report");
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use broker::Declaration;
    use proto::AttemptId;

    use super::*;

    #[tokio::test]
    async fn a_report_that_is_not_taken_gets_behind_the_others_and_stays_on_disk() {
        let broker = Broker::memory();
        broker.declare(&[Declaration::coordinator()]).await.unwrap();
        let faults = broker.memory_faults().unwrap();
        let state = tempfile::tempdir().unwrap();
        let spool = Spool::open(state.path()).unwrap();
        let attempt = |n: u8| AttemptId::mint(n.into(), [n; 10]);
        let first = spool.keep(attempt(1), 1, b"1".to_vec()).unwrap();
        let second = spool.keep(attempt(2), 1, b"2".to_vec()).unwrap();
        let names = [&first, &second].map(|report| report.message_id.clone());

        // The broker takes none of the first tries, all of them of the first report.
        faults.lose_messages(TRIES_IN_FRONT);
        let mut arriving = broker.another("coordinator").consume(topology::REPORTS, 8);
        let (sender, receiver) = mpsc::channel(8);
        let (stop, abandon) = (CancellationToken::new(), CancellationToken::new());
        let deliverer = tokio::spawn(deliver(
            broker.clone(),
            vec![first, second],
            receiver,
            stop.clone(),
            abandon.clone(),
        ));
        let mut arrived = Vec::new();
        let delivery = arriving.next().await.unwrap();
        arrived.push(delivery.message_id.clone());
        assert_eq!(delivery.ack().await, broker::Settled::Done);
        let delivery = arriving.next().await.unwrap();
        arrived.push(delivery.message_id.clone());
        assert_eq!(delivery.ack().await, broker::Settled::Done);
        assert_eq!(arrived, [names[1].clone(), names[0].clone()]);

        // One that is never taken is still there when the worker ends.
        faults.lose_messages(u32::MAX);
        let last = spool.keep(attempt(3), 1, b"3".to_vec()).unwrap();
        let name = last.message_id.clone();
        sender.send(last).await.unwrap();
        while sender.capacity() < 8 {
            tokio::task::yield_now().await;
        }
        stop.cancel();
        abandon.cancel();
        deliverer.await.unwrap();
        let left = spool.undelivered().unwrap();
        assert_eq!(left.len(), 1);
        assert_eq!(left[0].message_id, name);
    }

    #[tokio::test]
    async fn news_during_a_pause_keeps_its_order_and_does_not_end_the_pause() {
        const ROOM: usize = 8;
        let broker = Broker::memory();
        broker.declare(&[Declaration::coordinator()]).await.unwrap();
        let faults = broker.memory_faults().unwrap();
        let state = tempfile::tempdir().unwrap();
        let spool = Spool::open(state.path()).unwrap();
        let attempt = |n: u8| AttemptId::mint(n.into(), [n; 10]);
        let report = |n: u8| spool.keep(attempt(n), 1, vec![n]).unwrap();
        let news = [report(2), report(3), report(4)];
        let names = news.each_ref().map(|report| report.message_id.clone());

        faults.lose_messages(u32::MAX);
        let begun = std::time::Instant::now();
        let mut arriving = broker.another("coordinator").consume(topology::REPORTS, 8);
        let (sender, receiver) = mpsc::channel(ROOM);
        let (stop, abandon) = (CancellationToken::new(), CancellationToken::new());
        let first = vec![report(1)];
        let deliverer =
            tokio::spawn(deliver(broker.clone(), first, receiver, stop.clone(), abandon.clone()));
        // The first report is lost; one after the other, the news comes in the pause after that.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        for report in news {
            sender.send(report).await.unwrap();
            while sender.capacity() < ROOM {
                tokio::task::yield_now().await;
            }
        }
        faults.lose_messages(0);
        let mut arrived = Vec::new();
        for _ in 0..4 {
            let delivery = arriving.next().await.unwrap();
            assert!(begun.elapsed() >= RETRY_FIRST, "the pause was cut short");
            if names.contains(&delivery.message_id) {
                arrived.push(delivery.message_id.clone());
            }
            assert_eq!(delivery.ack().await, broker::Settled::Done);
        }
        assert_eq!(arrived, names);
        stop.cancel();
        deliverer.await.unwrap();
    }
}
