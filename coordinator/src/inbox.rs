//! Messages in: one loop a queue, while this coordinator leads. A message is settled after what it says was written:
//! whatever happens in between, it comes again, and the second time is harmless.
//!
//! While the catalog does not take it, a claim or report stays in hand: the broker counts what is handed back, and one
//! that came back too often would be a dead letter although nothing is wrong with it.

use std::time::Duration;

use broker::{Consumer, Delivery};
use proto::envelope::Signable as _;
use proto::message::Report;
use tokio_util::sync::CancellationToken;

use crate::core::Core;
use crate::error::{Error, Result};
use crate::{claims, pulses, reports};

/// Messages in hand per queue.
const PREFETCH: u16 = 64;
/// Pulses that are taken in one transaction.
const PULSES_MAX: usize = 64;
/// The pause before the catalog is asked again.
const CATALOG_PAUSE: Duration = Duration::from_millis(500);

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handled {
    /// It is written, or there was nothing to write.
    Done,
    /// It is not believed or not understood: to the dead letters.
    Refused,
}

/// How a dead letter is marked that a receiver refused.
const REJECTED: &str = "rejected";

/// What became of a message that was tried until the catalog took it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Written {
    Done,
    Refused,
    /// The term ended first.
    Not,
}

/// Which queue a loop reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Inbox {
    Claims,
    Reports,
}

impl Inbox {
    fn queue(self) -> &'static str {
        match self {
            Self::Claims => proto::topology::CLAIMS,
            Self::Reports => proto::topology::REPORTS,
        }
    }
}

/// Refuses a message: counted, logged, dead-lettered.
pub(crate) fn refuse(core: &Core, queue: &'static str, error: &dyn std::error::Error) -> Handled {
    core.metrics.message_refused(queue);
    tracing::warn!(
        queue,
        "Refused a message of {queue}: failed to {}",
        telemetry::redact::scrub_error(error)
    );
    Handled::Refused
}

/// Reads claims or reports until the term ends.
pub(crate) async fn run(
    core: &Core,
    epoch: i64,
    inbox: Inbox,
    over: &CancellationToken,
) -> Result<()> {
    let mut consumer = core.broker.consume(inbox.queue(), PREFETCH);
    while let Some(delivery) = next(&mut consumer, over).await {
        let body = delivery.body.clone();
        match inbox {
            Inbox::Claims => {
                let handle = || claims::handle(core, epoch, &body);
                settle(core, delivery, over, CATALOG_PAUSE, handle).await?;
            }
            Inbox::Reports => {
                let handle = || reports::handle(core, epoch, &body);
                settle(core, delivery, over, CATALOG_PAUSE, handle).await?;
            }
        }
    }
    consumer.stop().await;
    Ok(())
}

/// Reads pulses until the term ends, as many at once as there are.
pub(crate) async fn run_pulses(core: &Core, epoch: i64, over: &CancellationToken) -> Result<()> {
    let mut consumer = core.broker.consume(proto::topology::PULSE, PREFETCH);
    while let Some(first) = next(&mut consumer, over).await {
        let mut batch = vec![first];
        while batch.len() < PULSES_MAX {
            tokio::select! {
                biased;
                more = consumer.next() => match more {
                    Some(more) => batch.push(more),
                    None => break,
                },
                () = std::future::ready(()) => break,
            }
        }
        let bodies: Vec<&[u8]> = batch.iter().map(|delivery| delivery.body.as_ref()).collect();
        let handled = pulses::handle(core, epoch, &bodies).await;
        match handled {
            Ok(()) => {
                for delivery in batch {
                    // A pulse that comes again is older than the next one.
                    let _ = delivery.ack().await;
                }
            }
            Err(error) => {
                for delivery in batch {
                    let _ = delivery.requeue().await;
                }
                pause_or_end(error).await?;
            }
        }
    }
    consumer.stop().await;
    Ok(())
}

/// Reads the dead letters: counted and told, so that none lies there unseen. A report that nobody refused is the only
/// word of what a worker did: it is applied after all.
pub(crate) async fn run_dead(core: &Core, epoch: i64, over: &CancellationToken) -> Result<()> {
    let mut consumer = core.broker.consume(proto::topology::DEAD, PREFETCH);
    while let Some(delivery) = next(&mut consumer, over).await {
        core.metrics.dead_letter();
        let death = delivery.deaths.first();
        let queue = death.map_or("an unknown queue", |death| death.queue.as_str());
        let reason = death.map_or("unknown", |death| death.reason.as_str());
        tracing::warn!(message.id = %delivery.message_id, queue, reason,
            "Message {} ({}) died in {queue}: {reason}", delivery.message_id, delivery.kind);
        if delivery.kind == Report::CONTEXT && reason != REJECTED {
            let body = delivery.body.clone();
            let handle = || reports::handle(core, epoch, &body);
            match until_written(core, over, CATALOG_PAUSE, handle).await? {
                // Refused now, or for ever beyond the catalog: told where it happened, and already a dead letter.
                Written::Done | Written::Refused => {}
                Written::Not => {
                    let _ = delivery.requeue().await;
                    break;
                }
            }
        }
        let _ = delivery.ack().await;
    }
    consumer.stop().await;
    Ok(())
}

async fn next(consumer: &mut Consumer, over: &CancellationToken) -> Option<Delivery> {
    tokio::select! {
        biased;
        () = over.cancelled() => None,
        delivery = consumer.next() => delivery,
    }
}

/// Handles a message and settles it. It is handed back only when the term is over.
async fn settle<F: Future<Output = Result<Handled>>>(
    core: &Core,
    delivery: Delivery,
    over: &CancellationToken,
    pause: Duration,
    handle: impl Fn() -> F,
) -> Result<()> {
    // Stale: it comes again, and is recognised.
    let _ = match until_written(core, over, pause, handle).await {
        Ok(Written::Done) => delivery.ack().await,
        Ok(Written::Refused) => delivery.reject().await,
        Ok(Written::Not) => delivery.requeue().await,
        Err(error) => {
            let _ = delivery.requeue().await;
            return Err(error);
        }
    };
    Ok(())
}

/// Handles a message again and again while the catalog does not answer or cannot write, until the term is over.
async fn until_written<F: Future<Output = Result<Handled>>>(
    core: &Core,
    over: &CancellationToken,
    pause: Duration,
    handle: impl Fn() -> F,
) -> Result<Written> {
    let mut tries = 0u64;
    loop {
        tries += 1;
        match handle().await {
            Ok(Handled::Done) => return Ok(Written::Done),
            Ok(Handled::Refused) => return Ok(Written::Refused),
            Err(error @ Error::StaleEpoch { .. }) => return Err(error),
            // The same message would fail for ever, and nothing behind it would be read.
            Err(error) if core.catalog.fails_for_ever(&error) => {
                tracing::error!("Failed to {}", telemetry::redact::scrub_error(&error));
                return Ok(Written::Refused);
            }
            Err(error) => {
                // At first, and then ever more seldom.
                if tries.is_power_of_two() {
                    tracing::error!(
                        tries,
                        "Failed to {}; the message stays in hand",
                        telemetry::redact::scrub_error(&error)
                    );
                }
            }
        }
        tokio::select! {
            biased;
            () = over.cancelled() => return Ok(Written::Not),
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// A catalog that does not answer is asked again a little later; another leader ends the term.
async fn pause_or_end(error: Error) -> Result<()> {
    if let Error::StaleEpoch { .. } = error {
        return Err(error);
    }
    tracing::error!("Failed to {}", telemetry::redact::scrub_error(&error));
    tokio::time::sleep(CATALOG_PAUSE).await;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use broker::{Broker, Declaration, Publish, Published};
    use proto::envelope::SigningKey;
    use proto::topology;
    use secrecy::SecretString;

    use super::*;
    use crate::catalog::Catalog;
    use crate::clock::Clock;
    use crate::metrics::Metrics;

    #[tokio::test]
    async fn a_report_outlasts_a_catalog_that_cannot_write() {
        let directory = tempfile::tempdir().unwrap();
        let url = format!("sqlite:{}/catalog.sqlite", directory.path().display());
        let text = r#"{"signing_key": "env:KEY", "catalog": {"url": "env:URL"}, "broker": {"url": "memory"}}"#;
        let catalog = Catalog::connect(&SecretString::from(url)).await.unwrap();
        let broker = Broker::memory();
        broker.declare(&[Declaration::coordinator()]).await.unwrap();
        let (clock, _hand) = Clock::manual(1);
        let key = SigningKey::from_seed(&[1; 32]);
        let config = serde_json::from_str(text).unwrap();
        let over = CancellationToken::new();
        let core = Core::new(
            config,
            catalog,
            broker,
            clock,
            key,
            Metrics::new(),
            CancellationToken::new(),
        );
        for id in ["full", "refused", "left"] {
            let report =
                Publish::new(topology::REPORTS, topology::REPORTS, Report::CONTEXT, id, "");
            assert_eq!(core.broker.publish(report).await.unwrap(), Published::Routed);
        }
        let mut reports = core.broker.consume(topology::REPORTS, 1);
        let mut dead = core.broker.consume(topology::DEAD, 1);
        let full = || Error::Catalog { doing: "report", source: sqlx::Error::PoolTimedOut };

        // Longer than a message may be handed back.
        let left = AtomicU32::new(150);
        let handle = || async {
            let down = |left: u32| left.checked_sub(1);
            match left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, down) {
                Ok(_) => Err(full()),
                Err(_) => Ok(Handled::Done),
            }
        };
        let mut next = async || {
            tokio::time::timeout(Duration::from_secs(20), reports.next()).await.unwrap().unwrap()
        };
        let mut delivery = next().await;
        while left.load(Ordering::Relaxed) > 0 {
            assert_eq!(delivery.message_id, "full", "it was not given up");
            settle(&core, delivery, &over, Duration::ZERO, handle).await.unwrap();
            delivery = next().await;
        }
        // What can never be written must not hold up the others: the first dead letter.
        assert_eq!(delivery.message_id, "refused");
        let unreadable = || async {
            let (row, source) = ("one".to_owned(), "it is no task".into());
            Err(Error::Stored { column: "task", row, source })
        };
        settle(&core, delivery, &over, Duration::ZERO, unreadable).await.unwrap();
        let letter = dead.next().await.unwrap();
        assert_eq!(letter.message_id, "refused");
        // A term that ends hands back what it holds.
        let delivery = next().await;
        over.cancel();
        let handle = || async { Err(full()) };
        settle(&core, delivery, &over, CATALOG_PAUSE, handle).await.unwrap();
        let again = next().await;
        assert_eq!((again.message_id.as_str(), again.redelivered), ("left", true));
    }
}
