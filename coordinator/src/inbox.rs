//! Messages in: one loop a queue, while this coordinator leads. A message is settled after what it says was written:
//! whatever happens in between, it comes again, and the second time is harmless.

use std::time::Duration;

use broker::{Consumer, Delivery};
use tokio_util::sync::CancellationToken;

use crate::core::Core;
use crate::error::{Error, Result};
use crate::{claims, pulses, reports};

/// Messages in hand per queue.
const PREFETCH: u16 = 64;
/// Pulses that are taken in one transaction.
const PULSES_MAX: usize = 64;
/// The pause before a message is given back because the catalog did not answer.
const CATALOG_PAUSE: Duration = Duration::from_millis(500);

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Handled {
    /// It is written, or there was nothing to write.
    Done,
    /// It is not believed or not understood: to the dead letters.
    Refused,
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
        let handled = match inbox {
            Inbox::Claims => claims::handle(core, epoch, &delivery.body).await,
            Inbox::Reports => reports::handle(core, epoch, &delivery.body).await,
        };
        settle(delivery, handled).await?;
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

/// Reads the dead letters: counted and told, so that none lies there unseen.
pub(crate) async fn run_dead(core: &Core, over: &CancellationToken) -> Result<()> {
    let mut consumer = core.broker.consume(proto::topology::DEAD, PREFETCH);
    while let Some(delivery) = next(&mut consumer, over).await {
        core.metrics.dead_letter();
        let death = delivery.deaths.first();
        let queue = death.map_or("an unknown queue", |death| death.queue.as_str());
        let reason = death.map_or("unknown", |death| death.reason.as_str());
        tracing::warn!(message.id = %delivery.message_id, queue, reason,
            "Message {} ({}) died in {queue}: {reason}", delivery.message_id, delivery.kind);
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

async fn settle(delivery: Delivery, handled: Result<Handled>) -> Result<()> {
    match handled {
        Ok(Handled::Done) => {
            // Stale: it comes again, and is recognised.
            let _ = delivery.ack().await;
            Ok(())
        }
        Ok(Handled::Refused) => {
            let _ = delivery.reject().await;
            Ok(())
        }
        // What the catalog holds cannot be read: the same message would fail for ever.
        Err(error @ Error::Stored { .. }) => {
            tracing::error!("Failed to {}", telemetry::redact::scrub_error(&error));
            let _ = delivery.reject().await;
            Ok(())
        }
        Err(error) => {
            let pause = pause_or_end(error).await;
            let _ = delivery.requeue().await;
            pause
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
