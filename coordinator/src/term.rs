//! Leading: one coordinator at a time decides. A term begins with an election, lasts while the leader's row is
//! renewed, and ends at the first sign of another leader. Every write of a term carries its epoch.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::core::Core;
use crate::error::{Error, Result};
use crate::inbox::{self, Inbox};
use crate::{dispatcher, gaps, proofs, reaper};

/// The pause before something that failed because of the catalog is begun anew.
const PAUSE: Duration = Duration::from_secs(1);

/// Stands for election again and again, and leads when elected, until `stop`.
pub(crate) async fn run(core: Arc<Core>, stop: CancellationToken) {
    let leader_ms = i64::from(core.config.timing.leader_ms);
    let every_ms = leader_ms / 3;
    // A restarted coordinator takes its own row back at once; later, a row of the same name is somebody else's.
    let mut anew = true;
    while !stop.is_cancelled() {
        let now_ms = core.now_ms();
        let name = core.config.name.as_str();
        match core.catalog.elect(name, anew, now_ms, now_ms + leader_ms).await {
            Ok(Some(epoch)) => {
                tracing::info!(epoch, "Coordinator {name} leads in epoch {epoch}");
                lead(&core, epoch, &stop).await;
                tracing::info!(epoch, "Coordinator {name} no longer leads");
            }
            Ok(None) => {}
            Err(error) => tracing::error!("Failed to {}", telemetry::redact::scrub_error(&error)),
        }
        anew = false;
        tokio::select! {
            () = stop.cancelled() => {}
            () = core.clock.sleep_until(now_ms + every_ms) => {}
        }
    }
}

async fn lead(core: &Arc<Core>, epoch: i64, stop: &CancellationToken) {
    let over = stop.child_token();
    core.set_epoch(epoch);
    let mut tasks = JoinSet::new();
    for duty in Duty::ALL {
        let (core, over) = (Arc::clone(core), over.clone());
        tasks.spawn(async move { perform(&core, epoch, duty, &over).await });
    }
    core.doorbell.notify_one();
    renew(core, epoch, &over).await;
    over.cancel();
    core.set_epoch(0);
    while tasks.join_next().await.is_some() {}
    if stop.is_cancelled() {
        // Step down, so that the next one need not wait.
        let _ = core.catalog.renew_leader(epoch, 0).await;
    }
}

/// Renews the leader's row until the term is over.
async fn renew(core: &Core, epoch: i64, over: &CancellationToken) {
    let leader_ms = i64::from(core.config.timing.leader_ms);
    let mut until_at_ms = core.now_ms() + leader_ms;
    loop {
        let now_ms = core.now_ms();
        tokio::select! {
            () = over.cancelled() => return,
            () = core.clock.sleep_until(now_ms + leader_ms / 3) => {}
        }
        let now_ms = core.now_ms();
        match core.catalog.renew_leader(epoch, now_ms + leader_ms).await {
            Ok(()) => until_at_ms = now_ms + leader_ms,
            Err(Error::StaleEpoch { .. }) => return,
            Err(error) => {
                tracing::error!("Failed to {}", telemetry::redact::scrub_error(&error));
                if now_ms >= until_at_ms {
                    return;
                }
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// What a leader does all the time, and once, when it begins.
#[derive(Debug, Clone, Copy)]
enum Duty {
    Dispatch,
    Claims,
    Reports,
    Pulses,
    DeadLetters,
    Reap,
    Beacon,
    Gaps,
    Judge,
}

impl Duty {
    const ALL: [Self; 9] = [
        Self::Dispatch,
        Self::Claims,
        Self::Reports,
        Self::Pulses,
        Self::DeadLetters,
        Self::Reap,
        Self::Beacon,
        Self::Gaps,
        Self::Judge,
    ];
}

/// Performs one duty until the term is over; begins it anew when the catalog failed.
async fn perform(core: &Core, epoch: i64, duty: Duty, over: &CancellationToken) {
    while !over.is_cancelled() {
        let done: Result<()> = match duty {
            Duty::Dispatch => dispatcher::run(core, epoch, over).await,
            Duty::Claims => inbox::run(core, epoch, Inbox::Claims, over).await,
            Duty::Reports => inbox::run(core, epoch, Inbox::Reports, over).await,
            Duty::Pulses => inbox::run_pulses(core, epoch, over).await,
            Duty::DeadLetters => inbox::run_dead(core, epoch, over).await,
            Duty::Reap => reaper::run(core, epoch, over).await,
            Duty::Beacon => reaper::run_beacon(core, epoch, over).await,
            Duty::Gaps => gaps::run(core, over).await,
            // The leader before may have been of an earlier version.
            Duty::Judge => proofs::judge_former(&core.catalog).await,
        };
        match done {
            Ok(()) => return,
            Err(Error::StaleEpoch { .. }) => over.cancel(),
            Err(error) => {
                tracing::error!("Failed to {}", telemetry::redact::scrub_error(&error));
                tokio::select! {
                    () = over.cancelled() => {}
                    () = tokio::time::sleep(PAUSE) => {}
                }
            }
        }
    }
}

/// Rings the doorbell whenever another coordinator took an order.
pub(crate) async fn listen_for_wakes(core: Arc<Core>, stop: CancellationToken) {
    let queue = proto::topology::wake_queue(&core.config.name);
    let mut consumer = core.broker.consume(&queue, 8);
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            delivery = consumer.next() => match delivery {
                Some(delivery) => {
                    let _ = delivery.ack().await;
                    core.doorbell.notify_one();
                    core.job_changed();
                }
                None => break,
            },
        }
    }
    consumer.stop().await;
}
