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
/// How often the offers are looked at for changes.
const OFFERS_EVERY: Duration = Duration::from_secs(30);

/// Pulses until `stop` fires; the last pulse says that the worker drains.
pub(crate) async fn beat(shared: Arc<Shared>, stop: CancellationToken) {
    let mut seq = 0;
    let mut offered = None;
    let mut looked_at: Option<tokio::time::Instant> = None;
    loop {
        if looked_at.is_none_or(|at| at.elapsed() >= OFFERS_EVERY) {
            let offers = offers::look(&shared).await;
            looked_at = Some(tokio::time::Instant::now());
            if offered.as_ref() != Some(&offers) {
                shared.offers_due.store(true, Ordering::SeqCst);
                offered = Some(offers);
            }
        }
        let with_offers = shared.offers_due.swap(false, Ordering::SeqCst);
        seq += 1;
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
            offers: offered.clone().filter(|_| with_offers),
        };
        let body = shared.outbound.sign(&pulse);
        if !shared.outbound.pulse(format!("{}.{seq}", shared.boot), body).await && with_offers {
            shared.offers_due.store(true, Ordering::SeqCst);
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(PULSE_EVERY) => {}
            () = shared.slots.given_back() => {}
            () = shared.pulse_now.notified() => {}
        }
    }
}
