//! What a worker answers to a ticket.

use serde::{Deserialize, Serialize};

use crate::{AttemptId, BootId, JobId, WorkerName};

/// Sixteen random bytes, as hexadecimal text: ties a grant to the claim it answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nonce(pub String);

/// A claim or a refusal. Signed by the worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ClaimMessage {
    /// "I have a free slot for it."
    Claim(Claim),
    /// "Not me, not now."
    Decline(Decline),
}

/// Asks for the grant of an attempt. Idempotent by (attempt, boot, nonce).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The job of the ticket.
    pub job: JobId,
    /// The attempt of the ticket.
    pub attempt: AttemptId,
    /// Who asks; must be the name in the sender's certificate.
    pub worker: WorkerName,
    /// Which life of that worker.
    pub boot: BootId,
    /// Fresh for each claim, repeated when the same claim is sent again.
    pub nonce: Nonce,
}

/// Gives a ticket back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decline {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The job of the ticket.
    pub job: JobId,
    /// The attempt of the ticket.
    pub attempt: AttemptId,
    /// Who declines.
    pub worker: WorkerName,
    /// Which life of that worker.
    pub boot: BootId,
    /// Why.
    pub reason: DeclineReason,
    /// Why, in words.
    #[serde(default)]
    pub detail: String,
}

/// Why a worker gives a ticket back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeclineReason {
    /// No slot is free in this lane.
    Busy,
    /// The worker's configuration does not allow it.
    NotAllowed,
    /// The worker does not know the cluster, kind or repository.
    Unsupported,
    /// The worker is shutting down.
    Draining,
}
