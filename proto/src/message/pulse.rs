//! A worker's sign of life: one batched pulse for everything it runs.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ArchiveSetup, Holdings, WalStanding};
use crate::failure::{Code, Failure};
use crate::step::Progress;
use crate::{
    AttemptId, BootId, ClusterHeartbeat, ClusterName, JobKind, LineageId, SiteName,
    SystemIdentifier, WorkerName,
};

/// One pulse. Signed by the worker.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Pulse {
    /// [`SCHEMA`](super::SCHEMA).
    pub schema: u32,
    /// Who.
    pub worker: WorkerName,
    /// Where.
    pub site: SiteName,
    /// Which life. A pulse with a new one ends the leases of the old.
    pub boot: BootId,
    /// Grows within a boot; older pulses are ignored.
    pub seq: u64,
    /// Worker's clock.
    pub at_ms: i64,
    /// How long until the next one, milliseconds.
    pub every_ms: u32,
    /// Room for more.
    pub slots: Slots,
    /// True while it takes no new work.
    pub draining: bool,
    /// What it runs.
    pub running: Vec<RunningAttempt>,
    /// What it can do. Sent with the first pulse of a boot, on change, and when a new coordinator shows itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub offers: Option<Offers>,
    /// How archives of WAL stand: those that changed, and all of them from time to time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub wal: Vec<WalStanding>,
    /// Which backups there are: those that changed, and all of them from time to time.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holdings: Vec<Holdings>,
    /// Heartbeats it made in its servers since the last pulse.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub heartbeats: Vec<ClusterHeartbeat>,
}

/// Room for more jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slots {
    /// Slots that only urgent jobs may use.
    pub urgent_free: u32,
    /// Slots for routine jobs; urgent ones may use them too.
    pub routine_free: u32,
}

/// An attempt that runs: its lease is renewed by this.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RunningAttempt {
    /// The attempt.
    pub attempt: AttemptId,
    /// The token of its grant.
    pub token: u64,
    /// How far it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// What a worker can do, from its own configuration.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Offers {
    /// The program's version.
    pub version: String,
    /// Kinds of jobs it understands and is allowed.
    pub kinds: Vec<JobKind>,
    /// The clusters it serves.
    pub clusters: Vec<ClusterOffer>,
    /// The repositories it can open.
    pub repositories: Vec<RepositoryOffer>,
    /// Directories below which it may restore.
    pub restore_roots: Vec<String>,
    /// PostgreSQL majors it can boot in a sandbox.
    pub postgres_majors: Vec<u32>,
}

/// A cluster a worker serves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ClusterOffer {
    /// Its name.
    pub name: ClusterName,
    /// Labels for policies and selectors.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// The repository its backups go to; absent when it has none.
    #[serde(default)]
    pub repository: Option<String>,
    /// The server's identifier, when it could be asked.
    #[serde(default)]
    pub system_identifier: Option<SystemIdentifier>,
    /// `server_version_num`, when it could be asked.
    #[serde(default)]
    pub server_version_num: Option<u32>,
    /// Whether the worker can read its files.
    pub files: bool,
    /// Whether it reads them over connections to the server, not itself.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub remote: bool,
    /// What stands in the way, if anything.
    #[serde(default)]
    pub problem: Option<Failure>,
    /// How the server is set up to archive its WAL, when it could be asked; a standby has its primary's WAL.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub archive: Option<ArchiveSetup>,
    /// That its repository could not be looked into for a while.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository_away: Option<RepositoryAway>,
    /// How the last look into its repository ended; absent from programs that do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repository_look: Option<RepositoryLook>,
    /// The heartbeats that this worker makes in it; absent where it makes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat: Option<HeartbeatSetup>,
    /// Whether the worker's configuration asserts something of its content; what it says stays there.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub assertions: bool,
    /// The worker's role, where that is no member of `pg_read_all_data`: what it may not read it does not count, and no proof compares.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reads_little: Option<String>,
}

/// A repository that a worker does not find, or that does not let itself be looked into.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryAway {
    /// Where it should be, without secrets.
    pub place: String,
    /// Since when; worker's clock, Unix milliseconds.
    pub since_ms: i64,
    /// How the looks ended.
    pub failure: Failure,
}

impl RepositoryAway {
    /// Whether its store answers and has none.
    pub fn is_gone(&self) -> bool {
        self.failure.code == Code::RepositoryMissing
    }
}

/// How a worker's last look into the repository of a cluster ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RepositoryLook {
    /// None has ended yet.
    NotYet,
    /// There is one.
    Found {
        /// Those of the cluster in it, which no other repository has but its copies; absent while its server has not said who it
        /// is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lineages: Option<Vec<LineageId>>,
    },
    /// It failed; [`RepositoryAway`] tells how, when that lasts.
    Failed,
}

/// The heartbeats that a worker makes in a server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeartbeatSetup {
    /// How often, seconds.
    pub every_s: u32,
    /// Why the last one was not made, if it was not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<Failure>,
}

/// A repository a worker can open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryOffer {
    /// Its name in the worker's configuration.
    pub name: String,
    /// Where it is, without secrets.
    pub location: String,
}
