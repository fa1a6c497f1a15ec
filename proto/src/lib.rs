//! What travels between coordinator, workers, repository and people: ids, positions, jobs, reports, failures.
//!
//! Pure data and pure functions over it. No I/O, no clock, no tokio, no SQL: whoever needs the time or chance
//! passes it in.

pub mod backup;
pub mod copies;
pub mod envelope;
pub mod failure;
pub mod heartbeat;
pub mod id;
pub mod job;
pub mod lsn;
pub mod message;
pub mod name;
pub mod near;
pub mod proof;
pub mod recovery;
pub mod secret_ref;
pub mod server_files;
pub mod step;
pub mod topology;
pub mod wal;
pub mod words;

pub use backup::{BackupFacts, BackupKind};
pub use failure::{Action, Code, Failure};
pub use heartbeat::{ArchivedHeartbeats, ClusterHeartbeat, Heartbeat};
pub use id::{AttemptId, BackupId, BootId, JobId, LineageId, RepositoryId};
pub use job::{JobKind, JobState, Lane, Outcome, Placement, Task};
pub use lsn::{Lsn, SystemIdentifier, Timeline};
pub use name::{ClusterName, DatabaseName, SiteName, WorkerName};
pub use proof::{Proof, ProofLevel};
pub use recovery::{Recovery, RecoveryTarget, TargetAction, check_archiving};
pub use secret_ref::SecretRef;
pub use step::{Progress, Step};
pub use wal::WalFileName;
