//! What the coordinator says to workers. Signed with its key, which workers pin.

use serde::{Deserialize, Serialize};

use super::Nonce;
use crate::{AttemptId, BootId, ClusterName, JobId, SystemIdentifier, Task, WorkerName};

/// A message on a worker's control queue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Control {
    /// The claim won.
    Grant(Box<Grant>),
    /// The claim lost.
    Denial(Denial),
    /// Stop an attempt.
    Cancel(Cancel),
}

/// The right to run one attempt.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Grant {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The attempt.
    pub attempt: AttemptId,
    /// Only this worker may use it,
    pub worker: WorkerName,
    /// only in this life,
    pub boot: BootId,
    /// and only as the answer to this claim.
    pub nonce: Nonce,
    /// Fencing token: grows with every grant of the catalog. Reports carry it.
    pub token: u64,
    /// How long the attempt counts as alive after a pulse, milliseconds.
    pub lease_ms: u32,
    /// The job, parsed separately as a [`Spec`] so that a worker can say which field it did not understand.
    pub spec: serde_json::Value,
}

/// What to do, for whom, until when.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Spec {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The job.
    pub job: JobId,
    /// The attempt.
    pub attempt: AttemptId,
    /// The attempt before this one, which must be aborted in the repository first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub predecessor: Option<AttemptId>,
    /// The cluster.
    pub cluster: ClusterName,
    /// The server must show this identifier; absent at first contact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub system_identifier: Option<SystemIdentifier>,
    /// The work.
    pub task: Task,
    /// The attempt ends itself after this long, milliseconds.
    pub deadline_ms: u64,
    /// W3C trace context of the attempt's span.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub traceparent: Option<String>,
}

/// Why there is no grant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Denial {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The attempt.
    pub attempt: AttemptId,
    /// To whom.
    pub worker: WorkerName,
    /// To which life.
    pub boot: BootId,
    /// The answer to this claim.
    pub nonce: Nonce,
    /// Why.
    pub reason: DenialReason,
}

/// Why a claim was denied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DenialReason {
    /// No such attempt.
    Unknown,
    /// Somebody else has it, or it is over.
    Taken,
    /// The job was cancelled.
    Cancelled,
    /// The cluster is paused, or another job of its class runs.
    Held,
    /// The worker is not one that may run it.
    NotForYou,
}

/// Stop an attempt: finish nothing, undo what can be undone, report `CANCELLED`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cancel {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The attempt.
    pub attempt: AttemptId,
    /// Its token: an older cancel does not hit a newer grant.
    pub token: u64,
}

/// The coordinator's own sign of life, to every worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beacon {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// The leader's epoch: workers ignore smaller ones.
    pub epoch: u64,
    /// Which life of the coordinator: a new one needs everybody's offers again.
    pub boot: BootId,
    /// Coordinator's clock.
    pub at_ms: i64,
    /// Attempts that must stop: cancelled, or no longer theirs.
    #[serde(default)]
    pub revoked: Vec<Revoked>,
}

/// An attempt that must stop.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Revoked {
    /// The attempt.
    pub attempt: AttemptId,
    /// Its token.
    pub token: u64,
}
