//! The first part of a backup: the server enters backup mode, and the files turn out to be its own.

use std::path::{Path, PathBuf};

use postgres::control_file::ControlFile;
use postgres::{BackupOptions, BackupSession, Purpose, connect_maintenance, settings};
use proto::backup::Setting;
use proto::{Action, Code, Failure};

use super::data_directory;
use crate::context::JobContext;
use crate::jobs::session_owner;
use crate::places::Cluster;

/// A server that can be backed up, before anything was changed there.
pub(super) struct Ready {
    pub(super) server: postgres::ServerIdentity,
    pub(super) directory: PathBuf,
    pub(super) settings: Vec<Setting>,
    pub(super) settings_files: Vec<PathBuf>,
}

/// Asks the server who it is and whether a backup can work there at all.
pub(super) async fn ready(cx: &JobContext, cluster: &Cluster) -> Result<Ready, Failure> {
    let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
    let session = connect_maintenance(&cluster.target, &purpose).await?;
    let server = session.identity().await?;
    if let Some(expected) = cx.spec.system_identifier
        && expected != server.system_identifier
    {
        return Err(Failure::new(
            Code::SystemIdentifierMismatch,
            Action::FixConfig,
            format!(
                "the server at {} has system identifier {}, the job is for {expected}",
                cluster.config.name, server.system_identifier
            ),
        )
        .with_hint("Point the cluster's connection at the right server, or give the new server a name of its own."));
    }
    if server.in_recovery {
        return Err(Failure::new(
            Code::ServerSetting,
            Action::RetryElsewhere,
            format!("{} is a standby; engine native backs up primaries", cluster.config.name),
        )
        .with_hint("Point the cluster's connection at the primary."));
    }
    settings::require_for_backup(&session).await?;
    let directory = data_directory(cluster, &server)?;
    let settings = settings::kept(&session).await?;
    let settings_files = settings::files_outside(&session).await?;
    session.close().await;
    Ok(Ready { server, directory, settings, settings_files })
}

/// Enters backup mode, and holds the data directory against what the server says.
pub(super) async fn enter(
    cx: &JobContext,
    cluster: &Cluster,
    ready: &Ready,
    fast: bool,
) -> Result<BackupSession, Failure> {
    let attempt = cx.spec.attempt;
    let options = BackupOptions {
        job: session_owner(attempt),
        label: format!("pgmuster {attempt}"),
        slot_name: format!("pgmuster_{}", attempt.0.simple()),
        fast,
        system_identifier: Some(ready.server.system_identifier),
        start_deadline: None,
        cancel: cx.cancel.clone(),
    };
    let session = match BackupSession::begin(&cluster.target, &options).await {
        Ok(session) => session,
        Err(postgres::Error::Cancelled { .. }) => return Err(cx.stopped()),
        Err(error) => return Err(error.into()),
    };
    let directory = ready.directory.clone();
    let control = crate::context::blocking(move || Ok(ControlFile::read(&directory)?)).await?;
    agree(&control, &session, &ready.directory)?;
    Ok(session)
}

/// A stale mount, a snapshot or another server's directory shows here: its control file knows nothing of the checkpoint
/// the backup starts from.
fn agree(control: &ControlFile, session: &BackupSession, directory: &Path) -> Result<(), Failure> {
    let started = session.started();
    let fits = control.system_identifier == started.server.system_identifier
        && control.redo >= started.start_lsn
        && control.timeline == started.timeline;
    if fits {
        return Ok(());
    }
    Err(Failure::new(
        Code::DataDirectoryMismatch,
        Action::FixConfig,
        format!(
            "{} has its last checkpoint at {} on timeline {}, the server began the backup at {} on timeline {}",
            directory.display(),
            control.redo,
            control.timeline,
            started.start_lsn,
            started.timeline
        ),
    )
    .with_hint("The directory is not the one the server writes: look for a stale mount or a copy."))
}
