//! What travels between coordinator, workers, repository and people: ids, positions, jobs, reports, failures.
//!
//! Pure data and pure functions over it. No I/O, no clock, no tokio, no SQL: whoever needs the time or chance
//! passes it in.

pub mod backup;
pub mod failure;
pub mod id;
pub mod lsn;
pub mod name;

pub use backup::BackupFacts;
pub use failure::{Action, Code, Failure};
pub use id::{AttemptId, BackupId, BootId, JobId, LineageId, RepositoryId};
pub use lsn::{Lsn, SystemIdentifier, Timeline};
pub use name::{ClusterName, DatabaseName, SiteName, WorkerName};
