//! The first part of a backup: the server enters backup mode, and the files turn out to be its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use postgres::control_file::ControlFile;
use postgres::files::{LocalFiles, RemoteFiles, RemoteOptions, ServerFiles};
use postgres::{BackupOptions, BackupSession, Purpose, connect_maintenance, settings, standby};
use proto::backup::Setting;
use proto::{Action, Code, Failure};
use repository::{Repository, paths};

use super::access::{Access, access};
use super::copy::{at_most, processes};
use crate::config::{BackupConfig, GivenBy};
use crate::context::{JobContext, blocking};
use crate::jobs::session_owner;
use crate::places::Cluster;

/// A server that can be backed up, before anything was changed there.
pub(super) struct Ready {
    pub(super) server: postgres::ServerIdentity,
    pub(super) files: Arc<dyn ServerFiles>,
    pub(super) settings: Vec<Setting>,
    pub(super) settings_files: Vec<PathBuf>,
    /// How old the content of a standby may be.
    pub(super) lag_s: u64,
}

impl Drop for Ready {
    fn drop(&mut self) {
        self.files.close();
    }
}

/// Sessions that read files at once: one for each thread of the copy, and one for the WAL.
pub(super) fn sessions(config: &BackupConfig, asked: Option<u32>) -> usize {
    let asked = asked.and_then(|asked| usize::try_from(asked).ok());
    at_most(processes(config.processes), asked) + 1
}

/// Asks the server who it is and whether a backup can work there at all. Where its files are read over connections, there
/// will be at most `sessions_max` of them.
pub(super) async fn ready(
    cx: &JobContext,
    cluster: &Cluster,
    repository: &Repository,
    config: &BackupConfig,
    sessions_max: usize,
) -> Result<Ready, Failure> {
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
        .with_hint(match cluster.config.given_by {
            GivenBy::Up => "It is another server than before: give it a name of its own, --name NAME, or the URL of the one that is meant.",
            _ => "Point the cluster's connection at the right server, or give the new server a name of its own.",
        }));
    }
    settings::require_for_backup(&session).await?;
    let files: Arc<dyn ServerFiles> = match access(cluster, &server, &session).await? {
        Access::Here(directory) => Arc::new(LocalFiles::new(directory)),
        Access::Remote => {
            let options = RemoteOptions {
                job: session_owner(cx.spec.attempt),
                sessions_max,
                cancel: cx.cancel.clone(),
            };
            Arc::new(RemoteFiles::of(&session, &cluster.target, &server, options).await?)
        }
    };
    refuse_inside(&files, repository).await?;
    let mut lag_s = 0;
    if server.in_recovery {
        lag_s = standby::lag_s(&session).await?;
        refuse_stale(cluster, lag_s, config.standby_lag_max_s)?;
        same_timeline(&files, &server).await?;
    }
    let settings = settings::kept(&session).await?;
    let settings_files = settings::files_outside(&session).await?;
    session.close().await;
    Ok(Ready { server, files, settings, settings_files, lag_s })
}

/// A repository inside the data directory, or inside what the server has in a tablespace, would be lost with it, and each backup would hold those before it.
async fn refuse_inside(
    files: &Arc<dyn ServerFiles>,
    repository: &Repository,
) -> Result<(), Failure> {
    let Some((data, store)) = files.here().zip(repository.store().directory()) else {
        return Ok(());
    };
    let (data, store) = (data.to_owned(), store.to_owned());
    blocking(move || {
        // Where that cannot be seen, what is to be read or written there says why.
        let Ok(Some(servers)) = paths::in_server(&store, &data) else { return Ok(()) };
        let what = format!("the repository {} lies inside {servers}", store.display());
        Err(Failure::new(Code::DataDirectoryShape, Action::FixConfig, what).with_hint(
            "It would be lost with the server, and be in every backup. Move it elsewhere, at best to another machine or a bucket.",
        ))
    })
    .await
}

/// A backup of a standby that has fallen behind would pass for one of today.
pub(in crate::engines) fn refuse_stale(
    cluster: &Cluster,
    lag_s: u64,
    max_s: u32,
) -> Result<(), Failure> {
    if max_s == 0 || lag_s <= u64::from(max_s) {
        return Ok(());
    }
    let what = format!(
        "{} is a standby that may be {lag_s} s behind its primary, more than the {max_s} s allowed",
        cluster.config.name
    );
    let limit = match cluster.config.given_by {
        GivenBy::File => "; backup.standby_lag_max_s in the worker's configuration is the limit",
        GivenBy::Up | GivenBy::Backup => ", or back up its primary",
    };
    Err(Failure::new(Code::StandbyBehind, Action::Retry, what).with_hint(format!(
        "Look at pg_stat_wal_receiver and pg_last_xact_replay_timestamp() there{limit}."
    )))
}

/// Makes sure that what a standby replays is of the timeline its control file names.
pub(super) async fn same_timeline(
    files: &Arc<dyn ServerFiles>,
    server: &postgres::ServerIdentity,
) -> Result<(), Failure> {
    let (files, timeline) = (Arc::clone(files), server.timeline);
    blocking(move || Ok(standby::require_timeline(&*files, timeline)?)).await
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
    if ready.files.here().is_none() {
        same_server(cluster, ready, &session)?;
    }
    let (control, _) = read_control(&ready.files).await?;
    agree(cluster, &control, &session, &ready.files.place(Path::new("")))?;
    Ok(session)
}

/// The control file, with the bytes whose checksum was right.
pub(super) async fn read_control(
    files: &Arc<dyn ServerFiles>,
) -> Result<(ControlFile, Vec<u8>), Failure> {
    let files = Arc::clone(files);
    blocking(move || Ok(ControlFile::read_in(&*files)?)).await
}

/// Each session that reads files is with the server that was asked first. The backup must be of that one, too.
fn same_server(cluster: &Cluster, ready: &Ready, session: &BackupSession) -> Result<(), Failure> {
    if session.started().server.started_at_ms == ready.server.started_at_ms {
        return Ok(());
    }
    let what = format!(
        "the server of {} was restarted as the backup began, or its connection leads to several servers",
        cluster.config.name
    );
    Err(Failure::new(Code::BackupSessionLost, Action::Retry, what)
        .with_hint("Give the cluster a connection that leads to one server."))
}

/// A stale mount, a snapshot or another server's directory shows here: its control file knows nothing of the checkpoint
/// the backup starts from.
fn agree(
    cluster: &Cluster,
    control: &ControlFile,
    session: &BackupSession,
    directory: &Path,
) -> Result<(), Failure> {
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
    .with_hint(match cluster.config.given_by {
        GivenBy::File => {
            "The directory is not the one the server writes: look for a stale mount or a copy. Where the server is on another \
             host, files = \"remote\" in the cluster's section has its files read over connections."
        }
        GivenBy::Up | GivenBy::Backup => {
            "The directory is not the one the server writes: look for a stale mount or a copy, and run this on the server's own host."
        }
    }))
}

#[cfg(test)]
mod tests {
    use repository::store::directory::DirectoryStore;
    use repository::{Encryption, InitOptions};

    use super::*;

    #[tokio::test]
    async fn a_repository_inside_the_data_directory_or_a_tablespace_is_refused() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name);
        for directory in ["data/inside", "data/pg_tblspc", "space/PG_15_202209061"] {
            std::fs::create_dir_all(at(directory)).unwrap();
        }
        std::os::unix::fs::symlink(at("space"), at("data/pg_tblspc/16384")).unwrap();
        std::os::unix::fs::symlink(at("data"), at("alias")).unwrap();
        let files: Arc<dyn ServerFiles> = Arc::new(LocalFiles::new(at("data")));
        for (directory, is_inside) in [
            ("data-2", false),
            ("repository", false),
            ("space-2", false),
            ("data/inside/x", true),
            ("alias/y", true),
            ("space/repository", false),
            ("space/PG_15_202209061/x", true),
        ] {
            let store = Arc::new(DirectoryStore::new(at(directory)));
            let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
            let repository = Repository::init(store, options).await.unwrap().repository;
            let refused = refuse_inside(&files, &repository).await.map_err(|failure| failure.code);
            let expected = if is_inside { Err(Code::DataDirectoryShape) } else { Ok(()) };
            assert_eq!(refused, expected, "{directory}");
        }
    }
}
