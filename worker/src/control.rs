//! What the coordinator says: grants, denials, cancels and beacons. Nothing is believed without its signature.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use broker::{Broker, Delivery, Settled};
use proto::BootId;
use proto::envelope::{EnvelopeError, Signed};
use proto::message::{Beacon, Control, Grant};
use proto::topology::control_queue;

use crate::attempt;
use crate::claims::{Answer, Handed};
use crate::shared::Shared;

/// How many control messages may be in hand; they are handled at once.
const PREFETCH: u16 = 64;

/// Listens until the broker's consumer ends for good.
pub(crate) async fn listen(shared: Arc<Shared>, broker: Broker) {
    let queue = control_queue(&shared.config.name);
    let mut coordinator = None;
    let mut consumer = broker.consume(&queue, PREFETCH);
    while let Some(delivery) = consumer.next().await {
        if let Err(error) = handle(&shared, &delivery, &mut coordinator) {
            let error = proto::failure::chain(&error);
            tracing::warn!(error, "A control message was not believed");
        }
        // A stale one comes again, and does no harm a second time.
        let _: Settled = delivery.ack().await;
    }
}

fn handle(
    shared: &Arc<Shared>,
    delivery: &Delivery,
    coordinator: &mut Option<BootId>,
) -> Result<(), EnvelopeError> {
    let key = shared.credentials.coordinator();
    let parse = |source| EnvelopeError::Parse { context: "control", source };
    if delivery.kind == "beacon" {
        let signed: Signed<Beacon> = serde_json::from_slice(&delivery.body).map_err(parse)?;
        beacon(shared, &signed.verify(key)?, coordinator);
        return Ok(());
    }
    let signed: Signed<Control> = serde_json::from_slice(&delivery.body).map_err(parse)?;
    match signed.verify(key)? {
        Control::Grant(grant) => granted(shared, grant),
        Control::Denial(denial) => {
            if denial.worker == shared.config.name && denial.boot == shared.boot {
                let nonce = denial.nonce.clone();
                // A denial that nobody waits for has nothing left to say.
                drop(shared.claims.answer(&nonce, Answer::Denial(denial)));
            }
        }
        Control::Cancel(cancel) => shared.attempts.cancel(cancel.attempt, cancel.token),
    }
    Ok(())
}

fn granted(shared: &Arc<Shared>, grant: Box<Grant>) {
    if grant.worker != shared.config.name || grant.boot != shared.boot {
        return;
    }
    let nonce = grant.nonce.clone();
    // A grant that nobody waits for came too late; saying so frees the job at once instead of after its lease.
    if let Handed::Late(Answer::Grant(grant)) = shared.claims.answer(&nonce, Answer::Grant(grant))
        && !shared.attempts.has_seen(grant.attempt, grant.token)
    {
        attempt::hand_back(shared, &grant);
    }
}

fn beacon(shared: &Shared, beacon: &Beacon, coordinator: &mut Option<BootId>) {
    if !shared.beacon(beacon.epoch) {
        return;
    }
    for revoked in &beacon.revoked {
        shared.attempts.cancel(revoked.attempt, revoked.token);
    }
    if coordinator.replace(beacon.boot) != Some(beacon.boot) {
        shared.offers_due.store(true, Ordering::SeqCst);
        shared.pulse_now.notify_one();
    }
}
