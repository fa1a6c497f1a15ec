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

async fn deliver(
    broker: Broker,
    undelivered: Vec<Spooled>,
    mut receiver: mpsc::Receiver<Spooled>,
    stop: CancellationToken,
    abandon: CancellationToken,
) {
    let mut waiting: VecDeque<Spooled> = undelivered.into();
    loop {
        while let Ok(report) = receiver.try_recv() {
            waiting.push_back(report);
        }
        let Some(report) = waiting.pop_front() else {
            tokio::select! {
                () = abandon.cancelled() => return,
                next = receiver.recv() => match next {
                    Some(report) => waiting.push_back(report),
                    None => return,
                },
                () = stop.cancelled() => match receiver.try_recv() {
                    Ok(report) => waiting.push_back(report),
                    Err(_) => return,
                },
            }
            continue;
        };
        tokio::select! {
            () = abandon.cancelled() => return,
            () = deliver_one(&broker, &report) => {}
        }
        if let Err(error) = Spool::delivered(&report) {
            tracing::warn!(%error, "Failed to forget a delivered report; it will be sent twice");
        }
    }
}

/// Sends one report until the broker confirms it. A report that may be lost is tried once.
async fn deliver_one(broker: &Broker, report: &Spooled) {
    let mut pause = RETRY_FIRST;
    loop {
        let message =
            message(topology::REPORTS, report.message_id.clone(), "report", report.body.clone());
        match broker.publish(message).await {
            Ok(Published::Routed) => return,
            Ok(Published::Unroutable) => {
                tracing::warn!("No coordinator has declared the queue of reports yet");
            }
            Err(error) => {
                tracing::warn!(error = %proto::failure::chain(&error), "Failed to publish a report");
            }
        }
        if !report.must_arrive {
            return;
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_LAST);
    }
}
