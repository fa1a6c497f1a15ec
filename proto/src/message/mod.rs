//! The messages of the job protocol. `schema` is 1 in all of them; fields are only ever added.
//!
//! Ticket → claim → grant or denial → reports. Tickets are unsigned doorbells; everything that has an effect is
//! [signed](crate::envelope::Signed).

mod claim;
mod control;
mod holdings;
mod pulse;
mod report;
mod wal;

use serde::{Deserialize, Serialize};

pub use claim::{Claim, ClaimMessage, Decline, DeclineReason, Nonce};
pub use control::{Beacon, Cancel, Control, Denial, DenialReason, Grant, Revoked, Spec};
pub use holdings::Holdings;
pub use pulse::{
    ClusterOffer, HeartbeatSetup, Offers, Pulse, RepositoryAway, RepositoryLook, RepositoryOffer,
    RunningAttempt, Slots,
};
pub use report::{Report, ReportBody};
pub use wal::{
    ArchiveSetup, WalAncestor, WalBacklog, WalConflict, WalEnd, WalGap, WalStanding, WalWaiting,
};

use crate::{AttemptId, ClusterName, JobId, JobKind, Lane};

/// The schema number this program writes.
pub const SCHEMA: u32 = 1;

/// "There is work": small, short-lived, worth nothing by itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ticket {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The job.
    pub job: JobId,
    /// The attempt that a claim would start. Duplicates of a ticket name the same one.
    pub attempt: AttemptId,
    /// What kind of work.
    pub kind: JobKind,
    /// Which lane it came through.
    pub lane: Lane,
    /// For whom.
    pub cluster: ClusterName,
    /// After this a claim is not worth sending, Unix milliseconds by the coordinator's clock.
    pub not_after_ms: i64,
}
