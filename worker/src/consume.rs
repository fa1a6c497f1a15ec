//! Tickets: take one, answer it, run what was granted.
//!
//! One ticket in hand per queue. Whatever the answer is, the ticket is acknowledged within seconds, so a job of six
//! hours never holds a message. While no coordinator shows itself, tickets stay in their queues.

use std::sync::Arc;
use std::time::Duration;

use broker::{Broker, Delivery, Settled};
use proto::Lane;
use proto::message::{Claim, ClaimMessage, Decline, DeclineReason, SCHEMA, Ticket};
use proto::topology::TicketQueue;

use crate::claims::Answer;
use crate::shared::Shared;
use crate::slots::Slot;
use crate::{attempt, clock};

/// A claim is repeated after this long without an answer,
const CLAIM_REPEAT: Duration = Duration::from_secs(5);
/// and given up after so many tries: then the ticket goes back to its queue.
const CLAIM_TRIES: u32 = 4;

/// The queues of a worker: its own and its site's, urgent ones first.
pub(crate) fn queues(shared: &Shared) -> Vec<TicketQueue> {
    let (worker, site) = (&shared.config.name, &shared.config.site);
    Lane::ALL
        .into_iter()
        .flat_map(|lane| {
            [TicketQueue::Worker(worker.clone(), lane), TicketQueue::Site(site.clone(), lane)]
        })
        .collect()
}

/// Serves one queue until the worker drains.
pub(crate) async fn serve(shared: Arc<Shared>, broker: Broker, queue: TicketQueue) {
    let drain = shared.drain.clone();
    while !drain.is_cancelled() {
        tokio::select! {
            () = drain.cancelled() => return,
            () = shared.coordinator_seen() => {}
        }
        let mut consumer = broker.consume(&queue.to_string(), 1);
        loop {
            let delivery = tokio::select! {
                () = drain.cancelled() => break,
                next = consumer.next() => match next {
                    Some(delivery) => delivery,
                    // The broker was closed: there is nothing more to serve.
                    None => return,
                },
            };
            ticket(&shared, delivery).await;
            if !shared.coordinator_is_there() {
                break;
            }
        }
        consumer.stop().await;
    }
}

async fn ticket(shared: &Arc<Shared>, delivery: Delivery) {
    // Stale settlements need no answer: the ticket comes again, and its claim is denied.
    let _: Settled = match answer(shared, &delivery).await {
        Settlement::Ack => delivery.ack().await,
        Settlement::Requeue => delivery.requeue().await,
        Settlement::Reject => delivery.reject().await,
    };
}

/// What becomes of a ticket's message.
enum Settlement {
    Ack,
    Requeue,
    Reject,
}

async fn answer(shared: &Arc<Shared>, delivery: &Delivery) -> Settlement {
    let ticket: Ticket = match serde_json::from_slice(&delivery.body) {
        Ok(ticket) => ticket,
        Err(error) => {
            tracing::warn!(%error, "A message in a ticket queue is no ticket; it goes to the dead letters");
            return Settlement::Reject;
        }
    };
    match accept(shared, &ticket) {
        Err((reason, detail)) => {
            if decline(shared, &ticket, reason, detail).await {
                Settlement::Ack
            } else {
                Settlement::Requeue
            }
        }
        Ok(slot) => match claim(shared, &ticket).await {
            Some(Answer::Grant(grant)) => {
                if shared.drain.is_cancelled() {
                    attempt::hand_back(shared, &grant);
                } else {
                    attempt::start(shared, &grant, slot);
                }
                Settlement::Ack
            }
            Some(Answer::Denial(denial)) => {
                tracing::debug!(attempt = %ticket.attempt, reason = ?denial.reason, "A claim was denied");
                Settlement::Ack
            }
            None => Settlement::Requeue,
        },
    }
}

/// Whether this worker wants the ticket at all, and has room.
fn accept(shared: &Shared, ticket: &Ticket) -> Result<Slot, (DeclineReason, String)> {
    if shared.drain.is_cancelled() {
        return Err((DeclineReason::Draining, "the worker is shutting down".to_owned()));
    }
    if !shared.config.allows(ticket.kind, &ticket.cluster) {
        let detail =
            format!("its configuration does not allow {} for {}", ticket.kind, ticket.cluster);
        return Err((DeclineReason::NotAllowed, detail));
    }
    if ticket.kind.placement() == proto::Placement::Cluster
        && shared.config.cluster(&ticket.cluster).is_none()
    {
        let detail = format!("it does not serve {}", ticket.cluster);
        return Err((DeclineReason::Unsupported, detail));
    }
    shared
        .slots
        .take(ticket.lane)
        .ok_or_else(|| (DeclineReason::Busy, format!("no slot of lane {} is free", ticket.lane)))
}

async fn decline(shared: &Shared, ticket: &Ticket, reason: DeclineReason, detail: String) -> bool {
    let decline = ClaimMessage::Decline(Decline {
        schema: SCHEMA,
        job: ticket.job,
        attempt: ticket.attempt,
        worker: shared.config.name.clone(),
        boot: shared.boot,
        reason,
        detail,
    });
    let body = shared.outbound.sign(&decline);
    shared.outbound.claim(format!("{}.decline.{}", ticket.attempt, shared.boot), body).await
}

async fn claim(shared: &Shared, ticket: &Ticket) -> Option<Answer> {
    let nonce = clock::nonce();
    let claim = ClaimMessage::Claim(Claim {
        schema: SCHEMA,
        job: ticket.job,
        attempt: ticket.attempt,
        worker: shared.config.name.clone(),
        boot: shared.boot,
        nonce: nonce.clone(),
    });
    let body = shared.outbound.sign(&claim);
    let mut waiting = shared.claims.expect(nonce.clone());
    for _ in 0..CLAIM_TRIES {
        shared.outbound.claim(format!("{}.{}", ticket.attempt, nonce.0), body.clone()).await;
        if let Ok(answer) = tokio::time::timeout(CLAIM_REPEAT, &mut waiting.answer).await {
            return answer.ok();
        }
    }
    if let Some(answer) = waiting.last_look() {
        return Some(answer);
    }
    tracing::warn!(attempt = %ticket.attempt, "No coordinator answered a claim; the ticket goes back");
    None
}
