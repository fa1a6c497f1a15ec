//! The native engine: a physical backup of a running server whose files this process can read.
//!
//! The order of things is what makes it right (PostgreSQL documentation, "Continuous Archiving and PITR", and the server's
//! `basebackup.c`): hold the WAL, enter backup mode, copy, leave backup mode, store the WAL up to the stop position, the
//! control file last, and only then commit. The session that carries all this is watched throughout.

mod begin;
mod copy;
mod hold;
mod rate;
mod source;
mod wal;

use std::path::PathBuf;

use postgres::ServerIdentity;
use postgres::control_file::ControlFile;
use proto::{Action, Code, Failure};

use crate::config::WorkerConfig;
use crate::places::Cluster;

pub(super) use begin::refuse_stale;
pub(super) use copy::at_most;
pub(crate) use copy::processes;
pub use copy::{BackupRequest, back_up};

/// Where to look for PostgreSQL's programs besides the usual places.
pub fn bin_dirs(config: &WorkerConfig) -> Vec<PathBuf> {
    config.sandbox.postgres_bin_dirs.iter().map(|dir| dir.clone().into_std_path_buf()).collect()
}

/// The data directory of a server as this process sees it, after making sure that it is this server's.
pub fn data_directory(cluster: &Cluster, server: &ServerIdentity) -> Result<PathBuf, Failure> {
    let configured =
        cluster.config.data_directory.as_ref().map(|dir| dir.clone().into_std_path_buf());
    let Some(directory) = configured.or_else(|| server.data_directory.clone()) else {
        return Err(Failure::new(
            Code::PermissionDenied,
            Action::FixConfig,
            format!("role {} may not ask the server for its data directory", server.role),
        )
        .with_hint(format!(
            "GRANT pg_read_all_settings TO {}; or set data_directory in the cluster's section.",
            postgres::quote::identifier(&server.role)
        )));
    };
    let control = ControlFile::read(&directory)?;
    if control.system_identifier != server.system_identifier {
        return Err(Failure::new(
            Code::DataDirectoryMismatch,
            Action::FixConfig,
            format!(
                "{} belongs to the cluster with system identifier {}, the server at {} is {}",
                directory.display(),
                control.system_identifier,
                cluster.config.name,
                server.system_identifier
            ),
        )
        .with_hint(
            "Set data_directory in the cluster's section to the directory this server uses.",
        ));
    }
    Ok(directory)
}
