//! `up`: the whole product for one server, from nothing to a proved backup.

use std::collections::BTreeMap;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use coordinator::api::types::{ClusterView, JobView, SubmitRequest};
use postgres::{Environment, Purpose, Target, connect_maintenance};
use proto::{Action, ClusterName, Code, Failure, JobId, ProofLevel, Task};
use worker::config::{ClusterConfig, FilesConfig, GivenBy};
use worker::engines::native::{self, Access};
use worker::places::Cluster;

use crate::args::Up;
use crate::commands::archiving::{self, Seen};
use crate::commands::recovery;
use crate::embedded::{self, Embedded, Served};
use crate::exit::Exit;
use crate::{environment, follow, output};

/// Where servers of this machine have their sockets.
const SOCKET_DIRECTORIES: [&str; 2] = ["/var/run/postgresql", "/tmp"];
/// How often its state is looked at, which is told when it changes.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// The first backup and its proof may take this long before `up` stops watching them.
const FIRST_MAX: Duration = Duration::from_hours(7 * 24);

/// `up [URL]`.
pub(crate) async fn run(args: Up) -> Result<Exit, Failure> {
    let home = args.home.clone().unwrap_or_else(environment::home);
    let home = std::path::absolute(&home).map_err(|error| {
        let message = format!("{}: {error}", home.display());
        Failure::new(Code::RequestInvalid, Action::FixConfig, message)
    })?;
    embedded::require_free(&home).await?;
    let connection = match &args.url {
        Some(url) => url.clone(),
        None => local_server()?,
    };
    let server = look(&args, &connection).await?;
    output::talk(&format!("  server      {server}"));
    let served = Served {
        name: args.name.clone(),
        connection,
        data_directory: args.data_directory.clone(),
        bin_dirs: Vec::new(),
        restore_roots: vec![home.join("restore")],
    };
    let interrupted = follow::interrupted();
    tokio::pin!(interrupted);
    output::about(embedded::repository_in(&home));
    let whole = Embedded::start(&home, &served).await?;
    output::talk(&format!("  state       {}", home.display()));
    if whole.is_new {
        output::talk(&format!(
            "  key         {}, and {}, the same for paper: print it and keep it elsewhere, without any key every backup is lost",
            home.join("repository.key").display(),
            home.join("recovery-sheet.txt").display()
        ));
    }
    let ended = tokio::select! {
        ended = first_proof(&whole, &args) => ended,
        () = &mut interrupted => {
            output::talk("Interrupted; clearing up. What is stored already is stored.");
            whole.stop().await;
            return Ok(Exit::Interrupted);
        }
    };
    // A proof that fell short takes nothing from the backup that is there, nor from what can be ordered now.
    let first = match ended {
        Ok(first) if !args.once && first.has_backup => first,
        ended => {
            whole.stop().await;
            return ended.map(|first| first.exit);
        }
    };
    if first.exit != Exit::Ok {
        output::talk(&format!(
            "  The backup is there, and its proof fell short. This goes on: when the cause is cured, run pgmuster verify {}.",
            args.name
        ));
    }
    output::talk(&format!(
        "  Another terminal can order now: pgmuster --coordinator {} status (or backup, verify, restore). Ctrl-C stops.",
        home.join("coordinator.sock").display()
    ));
    tokio::select! {
        () = &mut interrupted => {}
        () = tell_states(&whole, &args.name) => {}
    }
    output::talk("Stopping");
    whole.stop().await;
    output::talk(&format!(
        "Stopped: nothing is backed up or proved until pgmuster up runs again. Everything is kept in {}.",
        home.display()
    ));
    Ok(Exit::Ok)
}

/// Backs the cluster up, proves the backup, and says so and what its WAL adds.
async fn first_proof(whole: &Embedded, args: &Up) -> Result<First, Failure> {
    let first = back_up_and_prove(whole, &args.name, args.level).await?;
    let cluster = cluster(whole, &args.name).await?;
    if first.exit == Exit::Ok
        && let Some(proof) = cluster.backup.as_ref().and_then(|backup| backup.proof.as_ref())
    {
        output::data(&worker::proving::sentence(&proof.record));
    }
    if let Some(setup) = cluster.archive.as_ref().filter(|_| first.has_backup) {
        let behind = recovery::behind_gap(&whole.client, &cluster).await;
        let (seen, now_ms) = (Seen::of(cluster.wal.as_ref(), behind), environment::now_ms());
        let said = archiving::said(&args.name, setup, seen, now_ms);
        output::talk(&format!("  archiving   {}", said.what));
        if !said.cure.is_empty() {
            output::talk(&format!("              {}", said.cure));
        }
    }
    Ok(first)
}

async fn cluster(whole: &Embedded, name: &ClusterName) -> Result<ClusterView, Failure> {
    whole.client.get(&format!("/v1/clusters/{name}")).await
}

/// Tells whenever the cluster comes into another state, and why: a gap in its archive, for one. For ever.
async fn tell_states(whole: &Embedded, name: &ClusterName) {
    let mut before = None;
    loop {
        if let Ok(ClusterView { state, reason, .. }) = cluster(whole, name).await
            && before.replace(state).is_some_and(|before| before != state)
        {
            output::talk(&format!("  status      {name} is {state}: {reason}"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// How the first backup and its proof ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct First {
    /// The last of the two that there was.
    pub(crate) exit: Exit,
    /// The backup is there, whatever its proof says.
    pub(crate) has_backup: bool,
}

/// Orders a backup and its proof, and shows both.
pub(crate) async fn back_up_and_prove(
    whole: &Embedded,
    cluster: &ClusterName,
    level: ProofLevel,
) -> Result<First, Failure> {
    announced(whole, cluster).await?;
    let task = Task::Backup(proto::job::Backup { fast_checkpoint: true, ..Default::default() });
    let request = SubmitRequest {
        verify: Some(level),
        attempts_max: Some(1),
        ..SubmitRequest::new(cluster.clone(), task)
    };
    let backup: JobView = whole.client.post("/v1/jobs", &request).await?;
    let mut view = follow::wait(&whole.client, backup.id, FIRST_MAX, true).await?;
    tell(&view);
    let has_backup = view.state == proto::JobState::Succeeded;
    while view.state == proto::JobState::Succeeded
        && let Some(next) = view.followed_by.first().copied()
    {
        view = follow::wait(&whole.client, next, FIRST_MAX, true).await?;
        tell(&view);
    }
    Ok(First { exit: Exit::of_job(view.state, view.failure.as_ref()), has_backup })
}

fn tell(view: &JobView) {
    output::talk(&format!(
        "  {:<11} {}",
        view.kind.as_str().replace('_', " "),
        follow::result_line(view)
    ));
    if let Some(failure) = &view.failure {
        output::failure(failure);
    }
}

/// Waits until the worker has announced the cluster; it does so within a moment of its start.
async fn announced(whole: &Embedded, cluster: &ClusterName) -> Result<(), Failure> {
    for _ in 0..300 {
        let clusters: Vec<ClusterView> = whole.client.get("/v1/clusters").await?;
        if clusters.iter().any(|view| view.name == *cluster) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(Failure::bug("the worker in this process did not announce its cluster"))
}

/// Asks the server who it is and whether its files can be read, before anything is made.
async fn look(args: &Up, connection: &str) -> Result<String, Failure> {
    let target = Target::parse(connection, &Environment::of_process())?;
    let now_ms = u64::try_from(environment::now_ms()).unwrap_or(0);
    let purpose = Purpose::ask(&JobId::mint(now_ms, repository::random()));
    let session = connect_maintenance(&target, &purpose).await?;
    let server = session.identity().await?;
    let config = ClusterConfig {
        name: args.name.clone(),
        connection: String::new(),
        password: None,
        data_directory: args
            .data_directory
            .clone()
            .and_then(|directory| camino::Utf8PathBuf::from_path_buf(directory).ok()),
        files: FilesConfig::Auto,
        repository: None,
        labels: BTreeMap::new(),
        kinds: None,
        heartbeat_s: None,
        assertions: Vec::new(),
        given_by: GivenBy::Up,
    };
    let access = native::access(&Cluster { config, target }, &server, &session).await?;
    session.close().await;
    if let Access::Here(directory) = &access {
        readable(directory)?;
    }
    let version = server.version.0;
    Ok(format!("PostgreSQL {}.{} {access}", version / 10_000, version % 10_000))
}

fn readable(directory: &Path) -> Result<(), Failure> {
    std::fs::read_dir(directory.join("base")).map(drop).map_err(|error| {
        let message = format!("failed to read {}: {error}", directory.display());
        Failure::new(Code::DataDirectoryUnreadable, Action::FixConfig, message)
            .with_hint("Run pgmuster on the database's host as the server's user.")
    })
}

/// The one server of this machine.
fn local_server() -> Result<String, Failure> {
    let sockets = sockets();
    match sockets.as_slice() {
        [(directory, port)] => {
            Ok(format!("host={} port={port} dbname=postgres", directory.display()))
        }
        [] => Err(Failure::new(
            Code::ServerUnreachable,
            Action::FixConfig,
            "no PostgreSQL server has a socket in /var/run/postgresql or /tmp",
        )
        .with_hint("Start one, or give its URL: pgmuster up postgres://user@host/postgres. pgmuster demo needs none.")),
        many => {
            let list: Vec<String> = many
                .iter()
                .map(|(directory, port)| format!("host={} port={port}", directory.display()))
                .collect();
            Err(Failure::new(
                Code::RequestInvalid,
                Action::FixConfig,
                format!("this machine has {} servers: {}", many.len(), list.join("; ")),
            )
            .with_hint("Say which: pgmuster up 'host=… port=… dbname=postgres'."))
        }
    }
}

/// Sockets of servers on this machine: directory and port, the system's directory first.
pub(crate) fn sockets() -> Vec<(PathBuf, u16)> {
    SOCKET_DIRECTORIES.into_iter().flat_map(|directory| sockets_in(Path::new(directory))).collect()
}

/// Sockets in one directory, by port. Lock files and what else has such a name do not count.
fn sockets_in(directory: &Path) -> Vec<(PathBuf, u16)> {
    let Ok(entries) = std::fs::read_dir(directory) else { return Vec::new() };
    let port = |entry: std::fs::DirEntry| {
        let name = entry.file_name();
        let port = name.to_str()?.strip_prefix(".s.PGSQL.")?.parse().ok()?;
        entry.file_type().is_ok_and(|kind| kind.is_socket()).then_some(port)
    };
    let mut ports: Vec<u16> = entries.flatten().filter_map(port).collect();
    ports.sort_unstable();
    ports.into_iter().map(|port| (directory.to_owned(), port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sockets_are_servers() {
        let place = tempfile::tempdir().unwrap();
        let socket =
            |name: &str| std::os::unix::net::UnixListener::bind(place.path().join(name)).unwrap();
        let _open = [socket(".s.PGSQL.5433"), socket(".s.PGSQL.5432"), socket("other")];
        for name in [".s.PGSQL.5434", ".s.PGSQL.5432.lock"] {
            std::fs::write(place.path().join(name), "").unwrap();
        }
        let found: Vec<u16> = sockets_in(place.path()).into_iter().map(|(_, port)| port).collect();
        assert_eq!(found, [5432, 5433]);
    }
}
