//! The native engine: a physical backup of a running server whose files this process can read, itself or over connections.
//!
//! The order of things is what makes it right (PostgreSQL documentation, "Continuous Archiving and PITR", and the server's
//! `basebackup.c`): hold the WAL, enter backup mode, copy, leave backup mode, store the WAL up to the stop position, the
//! control file last, and only then commit. The session that carries all this is watched throughout.

mod access;
mod begin;
mod changes;
mod copy;
mod hold;
mod kept;
mod rate;
mod source;
mod wal;

use std::path::PathBuf;

use crate::config::WorkerConfig;

pub use access::{Access, access};
pub(crate) use access::{data_directory, live_directory};
pub(super) use begin::refuse_stale;
pub(super) use copy::at_most;
pub(crate) use copy::processes;
pub use copy::{BackupRequest, back_up};

/// Where to look for PostgreSQL's programs besides the usual places.
pub fn bin_dirs(config: &WorkerConfig) -> Vec<PathBuf> {
    config.sandbox.postgres_bin_dirs.iter().map(|dir| dir.clone().into_std_path_buf()).collect()
}
