//! `up` and `demo`, told to stop in the middle of what they do: they end with the code of an interruption and leave no
//! process, socket, directory, slot or lock behind.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use rustix::process::{Pid, Signal, kill_process};
use tests::fleet::text;
use tests::{Cluster, Pgmuster, eventually, eventually_async};

/// A job that is told to stop clears up first.
const BOUND: Duration = Duration::from_mins(2);
/// The documented code of an interruption.
const INTERRUPTED: i32 = 130;
/// That of a state which does not allow what was asked.
const STATE_CONFLICT: i32 = 7;

/// Running processes whose command line or directory names this directory.
fn processes(directory: &Path) -> anyhow::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc")? {
        let process = entry?.path();
        // It may end while it is looked at, or belong to somebody else.
        let line = std::fs::read(process.join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        let inside = std::fs::read_link(process.join("cwd"))
            .is_ok_and(|current| current.starts_with(directory));
        if inside || line.contains(text(directory)?) {
            found.push(format!("{}: {line}", process.display()));
        }
    }
    Ok(found)
}

/// Sockets that somebody listens at below this directory.
fn sockets(directory: &Path) -> anyhow::Result<Vec<String>> {
    let open = std::fs::read_to_string("/proc/net/unix")?;
    let inside = open.lines().filter(|line| line.contains(text(directory).unwrap_or("?")));
    Ok(inside.map(str::to_owned).collect())
}

fn nothing_runs(directory: &Path) -> anyhow::Result<()> {
    let (processes, sockets) = (processes(directory)?, sockets(directory)?);
    ensure!(processes.is_empty(), "these still run: {processes:#?}");
    ensure!(sockets.is_empty(), "these are still open: {sockets:#?}");
    Ok(())
}

fn entries(directory: &Path) -> anyhow::Result<Vec<String>> {
    let names = std::fs::read_dir(directory)?;
    names.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

#[test]
fn a_demo_that_is_stopped_leaves_nothing_behind() -> anyhow::Result<()> {
    let place = tempfile::Builder::new().prefix("demo").tempdir_in("/tmp")?;
    let scenes = [
        ("  cluster ", "while its cluster is filled"),
        ("  data ", "while it is backed up"),
        ("  backup ", "while the backup is proved"),
        ("  damage ", "while it is repaired"),
    ];
    for (line, scene) in scenes {
        let arguments =
            ["demo", "--scale", "1", "--major", "15", "--directory", text(place.path())?];
        let mut demo = Pgmuster::start_with(&arguments, |command| {
            command.env("TMPDIR", place.path());
        })?;
        demo.wait_for_line(line, BOUND)?;
        ensure!(!processes(place.path())?.is_empty(), "{scene}: its cluster runs");
        demo.terminate()?;
        let done = demo.wait(BOUND)?;
        ensure!(done.code() == INTERRUPTED, "{scene}: {done}");
        ensure!(done.stderr.contains("Interrupted; clearing up"), "{scene}: {done}");
        let left = entries(place.path())?;
        ensure!(left.is_empty(), "{scene}: it left {left:?}\n{done}");
        nothing_runs(place.path()).context(scene)?;
    }
    Ok(())
}

/// The process that makes checkpoints, standing still: a backup cannot begin until this is dropped.
struct StoppedCheckpointer(Pid);

impl StoppedCheckpointer {
    async fn of(cluster: &Cluster) -> anyhow::Result<Self> {
        let query = "SELECT pid::bigint FROM pg_stat_activity WHERE backend_type = 'checkpointer'";
        let pid = i32::try_from(cluster.number(query).await?)?;
        let pid = Pid::from_raw(pid).context("read the checkpointer's pid")?;
        kill_process(pid, Signal::STOP)?;
        Ok(Self(pid))
    }
}

impl Drop for StoppedCheckpointer {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::CONT);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn up_that_is_stopped_leaves_its_state_and_nothing_else() -> anyhow::Result<()> {
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let home = tempfile::Builder::new().prefix("up").tempdir_in("/tmp")?;
    let url = cluster.url();
    let up = || Pgmuster::start(&["up", "--home", text(home.path())?, &url]);
    let is_over = async || -> anyhow::Result<()> {
        let (socket, sandbox) = (home.path().join("coordinator.sock"), home.path().join("sandbox"));
        ensure!(!socket.exists(), "the socket is left");
        let rooms = if sandbox.exists() { entries(&sandbox)? } else { Vec::new() };
        let rooms: Vec<_> =
            rooms.iter().filter(|name| name.starts_with("pgmuster-proof-")).collect();
        ensure!(rooms.is_empty(), "rooms are left: {rooms:?}");
        nothing_runs(home.path())?;
        cluster.is_left_alone().await
    };

    // In the middle of a backup: the server is asked for a checkpoint that does not come.
    let stopped = StoppedCheckpointer::of(&cluster).await?;
    let program = up()?;
    eventually_async("the backup to wait for its checkpoint", BOUND, || async {
        let query = "SELECT count(*) FROM pg_stat_activity
            WHERE application_name LIKE 'pgmuster/%' AND wait_event LIKE 'Checkpoint%'";
        Ok((cluster.number(query).await? > 0).then_some(()))
    })
    .await
    .with_context(|| program.said())?;
    program.terminate()?;
    let done = program.wait(BOUND)?;
    ensure!(done.code() == INTERRUPTED, "{done}");
    drop(stopped);
    is_over().await.with_context(|| done.to_string())?;

    // In the middle of a proof.
    let program = up()?;
    let room = home.path().join("sandbox");
    eventually("a room for the proof", BOUND, || {
        let rooms = entries(&room)?;
        Ok(rooms.iter().any(|name| name.starts_with("pgmuster-proof-")).then_some(()))
    })
    .with_context(|| program.said())?;
    program.terminate()?;
    let done = program.wait(BOUND)?;
    ensure!(done.code() == INTERRUPTED, "{done}");
    ensure!(!done.stdout.contains("PROVED"), "{done}");
    ensure!(done.stderr.contains("Interrupted; clearing up"), "{done}");
    is_over().await.with_context(|| done.to_string())?;

    // When the first backup is proved, to be told to stop is the usual end.
    let mut program = up()?;
    program.wait_for_line("main is PROVED (L5)", BOUND)?;
    program.wait_for_line("Another terminal can order now", BOUND)?;
    // A second one for the same place says who has it, and the first goes on.
    let second = up()?.wait(BOUND)?;
    ensure!(second.code() == STATE_CONFLICT, "{second}");
    ensure!(second.stderr.starts_with("error: STATE_CONFLICT: pgmuster runs in "), "{second}");
    ensure!(second.stderr.contains("coordinator.sock and serves main"), "{second}");
    program.terminate()?;
    let done = program.wait(BOUND)?;
    ensure!(done.code() == 0, "{done}");
    ensure!(done.stderr.contains("run: pgmuster cluster enable-wal main"), "{done}");
    ensure!(done.stderr.contains("Stopped: nothing is backed up or proved until"), "{done}");
    is_over().await.with_context(|| done.to_string())
}
