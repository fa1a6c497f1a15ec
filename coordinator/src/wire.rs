//! Messages out: what is said to workers and to other coordinators. What comes in is read where it is decided on.
//!
//! Nothing here is the only word: a grant is sent again when the claim comes again, a cancel is repeated by the
//! beacon, a wake only makes things faster. So a message that could not be sent is logged, not queued.

use broker::{Publish, PublishError, Published};
use proto::WorkerName;
use proto::envelope::{Signable, Signed};
use proto::message::{Beacon, Control};
use proto::topology;

use crate::catalog::row::json;
use crate::chance;
use crate::core::Core;

/// What a ticket's message says that it is.
pub(crate) const TICKET: &str = "ticket";
/// The header that carries the trace context.
pub(crate) const TRACEPARENT: &str = "traceparent";
/// How long an answer or a beacon is worth anything, milliseconds.
const CONTROL_MS: u64 = 60_000;

/// Says something to one worker, signed.
pub(crate) async fn control(core: &Core, worker: &WorkerName, message: &Control) {
    signed_control(core, worker, json(&core.key.sign(message))).await;
}

/// Says something to one worker that was signed before: the same bytes once more.
pub(crate) async fn signed_control(core: &Core, worker: &WorkerName, body: String) {
    let id = chance::id(core.now_ms());
    let publish = Publish::new(topology::CONTROL, worker.as_str(), Control::CONTEXT, id, body)
        .expiring(CONTROL_MS);
    match core.broker.publish(publish).await {
        Ok(Published::Routed) => {}
        Ok(Published::Unroutable) => {
            tracing::warn!(worker = %worker, "Worker {worker} has no control queue: it does not hear the coordinator");
        }
        Err(error) => log_unsent(&error),
    }
}

/// Says something to every worker, signed.
pub(crate) async fn beacon(core: &Core, message: &Beacon) {
    let signed: Signed<Beacon> = core.key.sign(message);
    let id = chance::id(message.at_ms);
    let publish = Publish::new(topology::BEACON, "", Beacon::CONTEXT, id, json(&signed))
        .transient()
        .optional()
        .expiring(CONTROL_MS);
    if let Err(error) = core.broker.publish(publish).await {
        log_unsent(&error);
    }
}

/// Wakes the other coordinators.
pub(crate) async fn wake(core: &Core) {
    let id = chance::id(core.now_ms());
    let publish = Publish::new(topology::WAKE, "", "wake", id, "{}").transient().optional();
    if let Err(error) = core.broker.publish(publish).await {
        log_unsent(&error);
    }
}

fn log_unsent(error: &PublishError) {
    tracing::warn!("Failed to {}", proto::failure::chain(error));
}
