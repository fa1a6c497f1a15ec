//! The worker's sign of life, at a fixed pace and whenever a slot becomes free.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proto::message::{Pulse, SCHEMA};
use tokio_util::sync::CancellationToken;

use crate::shared::Shared;
use crate::{clock, offers};

/// How often at least. The coordinator's lease is several times this.
pub(crate) const PULSE_EVERY: Duration = Duration::from_secs(3);
/// How long the first pulse waits for the first look.
const FIRST_LOOK_MAX: Duration = Duration::from_secs(5);
/// How often the offers are looked at for changes: a server that is down shows after that.
const OFFERS_EVERY: Duration = Duration::from_secs(10);
/// Which programs are installed is looked at every so many times.
const MAJORS_EVERY: u64 = 30;
/// Offers are repeated every so many pulses, in case one was lost on its way.
const REPEAT_OFFERS: u64 = 20;

/// Looks at the servers again and again; a server that hangs delays the next look and no pulse.
pub(crate) async fn look_around(shared: Arc<Shared>) {
    for look in 0_u64.. {
        let known = shared.offered.borrow().as_ref().map(|offers| offers.postgres_majors.clone());
        let known = known.filter(|_| !look.is_multiple_of(MAJORS_EVERY));
        let offers = offers::look(&shared, known).await;
        let changed = shared.offered.send_if_modified(|offered| {
            let changed = offered.as_ref() != Some(&offers);
            *offered = Some(offers);
            changed
        });
        if changed {
            shared.offers_due.store(true, Ordering::SeqCst);
            shared.pulse_now.notify_one();
        }
        tokio::time::sleep(OFFERS_EVERY).await;
    }
}

/// Pulses until `stop` fires; the last pulse says that the worker drains. The first one waits for the first look, so
/// that a new boot does not seem to serve nothing.
pub(crate) async fn beat(shared: Arc<Shared>, stop: CancellationToken) {
    let mut looked = shared.offered.subscribe();
    // A hung server must not keep a worker from being seen at all.
    let _ = tokio::time::timeout(FIRST_LOOK_MAX, looked.wait_for(Option::is_some)).await;
    let mut seq: u64 = 0;
    loop {
        seq += 1;
        let due = shared.offers_due.swap(false, Ordering::SeqCst);
        let with_offers = due || seq.is_multiple_of(REPEAT_OFFERS);
        let offered = shared.offered.borrow().clone();
        let wal = shared.standings.due(with_offers);
        let heartbeats = shared.heartbeats.untold();
        let pulse = Pulse {
            schema: SCHEMA,
            worker: shared.config.name.clone(),
            site: shared.config.site.clone(),
            boot: shared.boot,
            seq,
            at_ms: clock::now_ms(),
            every_ms: u32::try_from(PULSE_EVERY.as_millis()).unwrap_or(u32::MAX),
            slots: shared.slots.free(),
            draining: shared.drain.is_cancelled(),
            running: shared.attempts.running(),
            offers: offered.filter(|_| with_offers),
            wal,
            holdings: shared.held.due(due),
            heartbeats,
        };
        let body = shared.outbound.sign(&pulse);
        if !shared.outbound.pulse(format!("{}.{seq}", shared.boot), body).await {
            shared.standings.not_told(&pulse.wal);
            shared.held.not_told(&pulse.holdings);
            shared.heartbeats.not_told(pulse.heartbeats);
            if with_offers {
                shared.offers_due.store(true, Ordering::SeqCst);
            }
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PULSE_EVERY) => {}
            () = shared.slots.given_back() => {}
            () = shared.pulse_now.notified() => {}
        }
    }
}
