//! The proof sandbox on real copies: it reaches the end of the backup or refuses, it is inert, and
//! nothing of it stays.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on ends there")]

#[path = "throwaway/owners.rs"]
mod owners;
mod throwaway;

use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use owners::{owned_directory, owner_process, processes_in, wait_for};
use postgres::Error;
use postgres::control_file::ControlFile;
use postgres::instance::Instance;
use postgres::process::{Account, Isolation};
use postgres::recovery::RecoverySettings;
use postgres::sandbox::{
    Beyond, NetworkIsolation, Sandbox, SandboxOptions, SandboxRoom, Swept, sweep,
};
use proto::backup::Setting;
use proto::{Action, Code, Failure, Lsn, RecoveryTarget, SystemIdentifier, TargetAction, Timeline};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;
use throwaway::{binaries, cluster, cluster_in, connect, text};
use tokio_postgres::Client;
use tokio_util::sync::CancellationToken;

const PATIENCE: Duration = Duration::from_mins(2);

/// Header, length and one position, aligned.
const END_OF_BACKUP_RECORD_BYTES: u64 = 40;

/// A copy made by the server's own tool, with its WAL, in a room; and where the backup ends.
async fn copied(instance: &Instance, rooms: &Path) -> (SandboxRoom, SandboxOptions) {
    let room = SandboxRoom::create(rooms, "proof", None).await.unwrap();
    let control = ControlFile::read(&instance.data_directory()).unwrap();
    let program = instance.binaries().program("pg_basebackup").unwrap();
    let url = instance.url("postgres");
    let program = program.args(["-d", &url, "-X", "stream", "-c", "fast", "--no-sync", "-D"]);
    program.arg(room.data_directory()).run(PATIENCE, &CancellationToken::new()).await.unwrap();
    let manifest = std::fs::read_to_string(room.data_directory().join("backup_manifest")).unwrap();
    let (_, end) = manifest.split_once("\"End-LSN\": \"").unwrap();
    let stop_lsn = end.split('"').next().unwrap().parse().unwrap();
    let mut options = SandboxOptions::new(stop_lsn, Timeline(1), control.system_identifier);
    options.timeout = PATIENCE;
    (room, options)
}

/// Copies a data directory by hand, as an engine does, while `meanwhile` runs between start and
/// stop.
async fn copied_by_hand(
    instance: &Instance,
    rooms: &Path,
    meanwhile: &str,
) -> (SandboxRoom, SandboxOptions) {
    let room = SandboxRoom::create(rooms, "proof", None).await.unwrap();
    let control = ControlFile::read(&instance.data_directory()).unwrap();
    let session = connect(&instance.url("postgres")).await;
    text(&session, "SELECT pg_backup_start('by hand', true)").await;
    copy(&instance.data_directory(), &room.data_directory());
    connect(&instance.url("postgres")).await.batch_execute(meanwhile).await.unwrap();
    let sql = "SELECT lsn::text, labelfile FROM pg_backup_stop(false)";
    let row = session.query_one(sql, &[]).await.unwrap();
    let (stop, label): (String, String) = (row.get(0), row.get(1));
    std::fs::write(room.data_directory().join("backup_label"), label).unwrap();
    copy(&instance.data_directory().join("pg_wal"), &room.data_directory().join("pg_wal"));
    let mut options =
        SandboxOptions::new(stop.parse().unwrap(), Timeline(1), control.system_identifier);
    options.timeout = PATIENCE;
    (room, options)
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &target);
        } else if entry.file_type().unwrap().is_file() && entry.file_name() != "postmaster.pid" {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// The titles of a server's processes.
fn titles(data: &Path) -> Vec<String> {
    let lines = processes_in(data).into_iter().filter_map(|pid| {
        let line = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).ok()?;
        Some(line.trim_end_matches(['\0', ' ']).to_owned())
    });
    lines.collect()
}

/// What the processes of a sandbox are called, after `postgres: ` and the cluster's name.
fn server_processes(data: &Path) -> Vec<String> {
    let names = titles(data).into_iter().filter_map(|title| {
        title.split_once("pgmuster-sandbox: ").map(|(_, name)| name.trim().to_owned())
    });
    names.collect()
}

/// TCP and UDP sockets that `pid` could be reached by, in its own network.
fn network_of(pid: u32) -> String {
    let lines = ["tcp", "tcp6", "udp", "udp6"].map(|kind| {
        let table = std::fs::read_to_string(format!("/proc/{pid}/net/{kind}")).unwrap_or_default();
        table.lines().skip(1).collect::<Vec<_>>().join("\n")
    });
    lines.concat()
}

/// Has the server archive a segment, and waits until it has: by then another one would have begun to.
async fn archive_one(client: &Client) {
    // There is always something to archive.
    text(client, "SELECT pg_create_restore_point('archived')").await;
    let name = text(client, "SELECT pg_walfile_name(pg_switch_wal())").await;
    let archived =
        format!("SELECT count(*) FROM pg_stat_archiver WHERE last_archived_wal >= '{name}'");
    let waits = async {
        // The server's answer is the pause.
        while text(client, &archived).await != "1" {}
    };
    tokio::time::timeout(PATIENCE, waits).await.unwrap();
}

/// Boots a copy of a server on which everything would act that can, at the end of its backup or at a moment behind it.
async fn boots_inert(major: u32, goes_beyond: bool, network: NetworkIsolation) {
    // Where the copy would follow a publisher to, and where whoever archives says so.
    let publisher = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    publisher.set_nonblocking(true).unwrap();
    let port = publisher.local_addr().unwrap().port();
    let place = tempfile::tempdir().unwrap();
    let archivers = place.path().join("archivers");
    let archive = format!("pwd >> {}", archivers.display());
    let settings = [
        ("archive_mode", "on"),
        ("archive_command", archive.as_str()),
        ("wal_level", "logical"),
        ("shared_preload_libraries", "auto_explain,pg_prewarm"),
        ("max_connections", "33"),
        // The source itself follows nobody.
        ("max_logical_replication_workers", "0"),
    ];
    let (instance, directory) = cluster(major, &settings).await;
    let client = connect(&instance.url("postgres")).await;
    let traps = [
        "CREATE TABLE t AS SELECT generate_series(1, 5000) i",
        "CREATE UNLOGGED TABLE u AS SELECT 1 AS i",
        // Each of these would act on its own in a copy that boots with what it brought along.
        "ALTER SYSTEM SET listen_addresses = '*'",
        "ALTER SYSTEM SET shared_preload_libraries = 'auto_explain', 'pg_prewarm', 'no_such_library'",
        "ALTER SYSTEM SET archive_mode = 'always'",
        &format!("ALTER SYSTEM SET archive_command = '{archive}'"),
        "ALTER SYSTEM SET recovery_target_action = 'shutdown'",
        "ALTER ROLE postgres SET session_preload_libraries = 'no_such_library'",
        "ALTER DATABASE postgres SET statement_timeout = '1ms'",
        &format!(
            "CREATE SUBSCRIPTION s CONNECTION 'host=127.0.0.1 port={port}' PUBLICATION p \
             WITH (connect = false, slot_name = 's')"
        ),
        "ALTER SUBSCRIPTION s ENABLE",
        "SELECT pg_create_physical_replication_slot('kept', true)",
    ];
    for trap in traps {
        client.batch_execute(trap).await.unwrap();
    }
    if major >= 17 {
        let trigger = "CREATE FUNCTION deny() RETURNS event_trigger LANGUAGE plpgsql AS \
                       $$ BEGIN RAISE EXCEPTION 'no entry'; END $$; \
                       CREATE EVENT TRIGGER deny ON login EXECUTE FUNCTION deny()";
        client.batch_execute(trigger).await.unwrap();
    }
    let (room, mut options) = copied(&instance, &directory.path().join("rooms")).await;
    // A library that is preloaded has a worker of its own.
    let data = instance.data_directory();
    wait_for("the worker of a library", || {
        titles(&data).iter().any(|title| title.contains("autoprewarm leader"))
    });
    options.settings = vec![Setting {
        name: "shared_preload_libraries".into(),
        value: "auto_explain,pg_prewarm,no_such_library".into(),
    }];
    options.preload_libraries = vec!["auto_explain".to_owned(), "pg_prewarm".to_owned()];
    options.network = network;
    // An engine that forgets to leave the slots behind: the copy must not keep them.
    let slot = Path::new("pg_replslot/kept");
    copy(&instance.data_directory().join(slot), &room.data_directory().join(slot));
    let (mut end, mut rows) = (options.stop_lsn, 5000);
    if goes_beyond {
        client.batch_execute("INSERT INTO t VALUES (5001)").await.unwrap();
        end = text(&client, "SELECT pg_create_restore_point('beyond')").await.parse().unwrap();
        archive_one(&client).await;
        rows += 1;
        let wal = instance.data_directory().join("pg_wal");
        let settings = RecoverySettings {
            restore_command: format!("cp {}/%f %p", wal.display()),
            target: RecoveryTarget::Name("beyond".to_owned()),
            before: false,
            timeline: None,
            action: TargetAction::Promote,
            standby: false,
            keep_archiving: false,
            port: None,
        };
        options.beyond = Some(Beyond { settings, at_least: end });
    }
    let room_path = room.path().to_owned();
    let mut sandbox = Sandbox::boot(instance.binaries(), room, options).await.unwrap();

    assert_eq!(sandbox.replay_end(), end, "{}", sandbox.log_tail());
    let evidence = sandbox.went().map(|went| went.evidence.as_str());
    let said =
        evidence.map(|said| said.starts_with("recovery stopping at restore point \"beyond\""));
    assert_eq!(said, goes_beyond.then_some(true), "{evidence:?}");
    assert!(sandbox.is_running());
    assert!(sandbox.phases().start > Duration::ZERO && sandbox.phases().open > Duration::ZERO);
    let copy = connect(&sandbox.url("postgres")).await;
    assert_eq!(text(&copy, "SELECT count(*) FROM public.t").await, rows.to_string());
    assert_eq!(text(&copy, "SELECT count(*) FROM public.u").await, "0");
    assert_eq!(text(&copy, "SELECT count(*) FROM pg_replication_slots").await, "0");
    assert_eq!(text(&copy, "SELECT count(*) FROM pg_subscription WHERE subenabled").await, "1");
    assert_eq!(text(&copy, "SELECT pg_is_in_recovery()").await, "f");
    assert_eq!(text(&copy, "SHOW shared_preload_libraries").await, "auto_explain,pg_prewarm");
    assert_eq!(text(&copy, "SHOW statement_timeout").await, "0");
    assert_eq!(text(&copy, "SHOW max_connections").await, "33");
    let foreign = "SELECT count(*) FROM pg_settings WHERE sourcefile IS NOT NULL AND sourcefile NOT LIKE '%/proof/run/postgresql.conf'";
    assert_eq!(text(&copy, foreign).await, "0");

    // The copy writes, switches and waits for whoever would act on it; nobody is there to do so.
    copy.batch_execute("CREATE TABLE public.made AS SELECT 1").await.unwrap();
    text(&copy, "SELECT pg_switch_wal()").await;
    copy.batch_execute("CHECKPOINT").await.unwrap();
    archive_one(&client).await;
    let mut processes = server_processes(&sandbox.data_directory());
    processes.retain(|name| !name.starts_with("postgres postgres")); // our own session
    processes.sort();
    assert_eq!(processes, ["background writer", "checkpointer", "walwriter"], "{major}");
    let waiting =
        std::fs::read_dir(sandbox.data_directory().join("pg_wal/archive_status")).unwrap();
    let waiting = waiting.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert_eq!(
        waiting
            .filter(|name| Path::new(name).extension().is_some_and(|kind| kind == "ready"))
            .count(),
        0
    );
    assert_eq!(text(&copy, "SHOW archive_mode").await, "off");
    assert_eq!(text(&copy, "SHOW listen_addresses").await, "");
    match sandbox.isolation() {
        Isolation::Namespaces { .. } => {
            assert_eq!(network_of(sandbox.pid().unwrap()), "");
            let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap();
            assert_ne!(namespace("self"), namespace(&sandbox.pid().unwrap().to_string()));
        }
        Isolation::None(reason) => assert!(!reason.is_empty()),
    }
    drop(copy);
    let data = sandbox.data_directory();
    let postmaster = sandbox.pid().unwrap();
    sandbox.destroy().await.unwrap();
    assert!(!room_path.exists() && !data.exists());
    assert!(!Path::new(&format!("/proc/{postmaster}")).exists());
    // The source archived, and nobody else; and nobody came to its publisher.
    let archivers = std::fs::read_to_string(&archivers).unwrap();
    let source = instance.data_directory().canonicalize().unwrap();
    assert!(archivers.lines().all(|line| Path::new(line) == source), "{archivers}");
    let came = publisher.accept().map(|(_, from)| from).unwrap_err();
    assert_eq!(came.kind(), ErrorKind::WouldBlock, "{came}");
}

// Each once on the network of this machine, where it would reach whom it wants to.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_boots_to_the_end_of_its_backup_and_is_inert() {
    Box::pin(boots_inert(15, false, NetworkIsolation::WherePossible)).await;
    Box::pin(boots_inert(18, false, NetworkIsolation::Off)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_goes_beyond_its_backup_is_as_inert() {
    Box::pin(boots_inert(15, true, NetworkIsolation::Off)).await;
    Box::pin(boots_inert(18, true, NetworkIsolation::WherePossible)).await;
}

async fn refused(instance: &Instance, room: SandboxRoom, options: SandboxOptions) -> Error {
    let path = room.path().to_owned();
    let error = Sandbox::boot(instance.binaries(), room, options).await.unwrap_err();
    assert!(!path.exists(), "a refused copy is removed");
    error
}

fn last_segment(room: &SandboxRoom) -> PathBuf {
    let wal = std::fs::read_dir(room.data_directory().join("pg_wal")).unwrap();
    wal.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()).max().unwrap()
}

async fn with_rows(major: u32) -> (Instance, TempDir) {
    let (instance, directory) = cluster(major, &[]).await;
    let client = connect(&instance.url("postgres")).await;
    client.batch_execute("CREATE TABLE t AS SELECT generate_series(1, 5000) i").await.unwrap();
    (instance, directory)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_lacks_the_end_of_its_wal_never_opens() {
    for major in [15, 18] {
        let (instance, directory) = with_rows(major).await;
        let rooms = directory.path().join("rooms");
        let (room, options) = copied(&instance, &rooms).await;
        std::fs::remove_file(last_segment(&room)).unwrap();
        let error = refused(&instance, room, options).await;
        assert!(matches!(&error, Error::Sandbox { .. }), "{error}");

        // The segment is there, and zero from the middle on: found by looking, before any boot.
        let (room, options) = copied(&instance, &rooms).await;
        let last = last_segment(&room);
        let bytes = std::fs::read(&last).unwrap();
        std::fs::write(&last, [&bytes[..100], &vec![0; bytes.len() - 100]].concat()).unwrap();
        let error = refused(&instance, room, options).await;
        let Error::Sandbox { what, .. } = &error else { panic!("{error}") };
        assert!(what.contains("WAL of the backup cannot be read"), "{what}");

        // The record that ends the backup is gone, and the caller believes that it ends before: the
        // server knows better.
        let (room, mut options) = copied(&instance, &rooms).await;
        let last = last_segment(&room);
        let mut bytes = std::fs::read(&last).unwrap();
        options.stop_lsn = Lsn(options.stop_lsn.0 - END_OF_BACKUP_RECORD_BYTES);
        bytes[usize::try_from(options.stop_lsn.0 % (1 << 20)).unwrap()..].fill(0);
        std::fs::write(&last, bytes).unwrap();
        let error = refused(&instance, room, options).await;
        let text = error.to_string();
        assert!(
            text.contains("recovery ended before configured recovery target was reached"),
            "{text}"
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_machine_lacks_is_not_held_against_the_backup() {
    for major in [15, 18] {
        let (instance, directory) = with_rows(major).await;
        let rooms = directory.path().join("rooms");
        let unfit = async |room: SandboxRoom, options: SandboxOptions, line: &str| {
            let error = refused(&instance, room, options).await;
            let Error::SandboxUnfit { evidence, .. } = &error else { panic!("{error}") };
            assert!(evidence.contains(line), "{evidence}");
            let failure = Failure::from(error);
            assert_eq!(
                (failure.code, failure.action),
                (Code::SandboxUnfit, Action::RetryElsewhere)
            );
        };
        // A library that the source has and this machine has not.
        let (room, mut options) = copied(&instance, &rooms).await;
        let name = "shared_preload_libraries".to_owned();
        options.settings.push(Setting { name, value: "not_installed_here".to_owned() });
        options.preload_libraries.push("not_installed_here".to_owned());
        unfit(room, options, "could not access file \"not_installed_here\"").await;

        // More memory than a server can have.
        let (room, mut options) = copied(&instance, &rooms).await;
        options.shared_buffers_mb = u32::MAX;
        unfit(room, options, "postgresql.conf\" contains errors").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_bad_copy_can_cause_is_not_blamed_on_the_machine() {
    for major in [15, 18] {
        let (instance, directory) = with_rows(major).await;
        let rooms = directory.path().join("rooms");
        let bad = async |room: SandboxRoom, options: SandboxOptions, line: &str| {
            let error = refused(&instance, room, options).await;
            assert!(matches!(&error, Error::Sandbox { .. }), "{error}");
            assert!(error.to_string().contains(line), "{error}");
            let failure = Failure::from(error);
            assert_eq!((failure.code, failure.action), (Code::SandboxFailed, Action::FixData));
        };
        let map = |room: &SandboxRoom| room.data_directory().join("global/pg_filenode.map");
        // A file that is not there at all, and one with a mode in which the server may not read it.
        let (room, options) = copied(&instance, &rooms).await;
        std::fs::remove_file(map(&room)).unwrap();
        bad(room, options, "pg_filenode.map").await;
        let (room, options) = copied(&instance, &rooms).await;
        std::fs::set_permissions(map(&room), std::fs::Permissions::from_mode(0o000)).unwrap();
        bad(room, options, "Permission denied").await;

        // A database of another version, of which the server says that its programs do not fit.
        let (room, options) = copied(&instance, &rooms).await;
        std::fs::write(room.data_directory().join("base/1/PG_VERSION"), "9\n").unwrap();
        bad(room, options, "base/1/PG_VERSION says 9").await;

        let (room, options) = copied(&instance, &rooms).await;
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(room.data_directory(), open).unwrap();
        let error = refused(&instance, room, options).await;
        assert!(matches!(&error, Error::Shape { what, .. } if what.contains("0755")), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_the_system_kills_does_not_blame_the_backup() {
    let (instance, directory) = with_rows(15).await;
    let rooms = directory.path().join("rooms");
    // What a system does that is out of memory, to whichever process it likes, and what a server does that stumbles over its
    // data.
    let cases = [
        (Signal::KILL, false, true),
        (Signal::KILL, true, true),
        (Signal::ABORT, false, false),
        (Signal::ABORT, true, false),
    ];
    for (signal, is_postmaster, by_machine) in cases {
        let (room, options) = copied(&instance, &rooms).await;
        let mut sandbox = Sandbox::boot(instance.binaries(), room, options).await.unwrap();
        assert!(sandbox.unfit().await.is_none(), "it runs");
        let copy = connect(&sandbox.url("postgres")).await;
        let backend: i32 = text(&copy, "SELECT pg_backend_pid()").await.parse().unwrap();
        let postmaster = i32::try_from(sandbox.pid().unwrap()).unwrap();
        let killed = if is_postmaster { postmaster } else { backend };
        kill_process(Pid::from_raw(killed).unwrap(), signal).unwrap();
        match sandbox.unfit().await {
            Some(Error::SandboxUnfit { evidence, .. }) if by_machine => {
                assert!(evidence.contains("signal 9"), "{evidence}");
            }
            None if !by_machine => {}
            other => panic!("{signal:?}: {other:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_room_that_was_half_removed_is_found_by_the_next_sweep() {
    let directory = tempfile::tempdir().unwrap();
    let rooms = directory.path().join("rooms");
    let room = SandboxRoom::create(&rooms, "proof", None).await.unwrap();
    let path = room.path().to_owned();
    // Whichever way the removal walks, here it gets stuck.
    for part in ["data", "run", "tablespaces"] {
        let stuck = path.join(part).join("stuck");
        std::fs::create_dir(&stuck).unwrap();
        std::fs::write(stuck.join("file"), "").unwrap();
        std::fs::set_permissions(&stuck, std::fs::Permissions::from_mode(0o500)).unwrap();
    }
    room.remove().unwrap_err();
    assert!(path.exists());
    for part in ["data", "run", "tablespaces"] {
        let stuck = path.join(part).join("stuck");
        if stuck.exists() {
            std::fs::set_permissions(&stuck, std::fs::Permissions::from_mode(0o700)).unwrap();
        }
    }
    assert_eq!(sweep(&rooms).unwrap(), [Swept { path: path.clone(), n_processes: 0 }]);
    assert!(!path.exists());
}

/// Of a room whose path is long the sockets lie elsewhere.
#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_finds_the_sockets_of_a_room_wherever_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let rooms = directory.path().join("r".repeat(120));
    let room = SandboxRoom::create(&rooms, "proof", None).await.unwrap();
    let socket = room.service_socket();
    let sockets = socket.parent().unwrap().to_owned();
    assert!(sockets.starts_with("/tmp") && !sockets.starts_with(&rooms), "{}", sockets.display());
    let owner = std::fs::read(room.path().join("owner")).unwrap();
    let path = room.path().to_owned();
    drop(room);
    assert!(!path.exists() && !sockets.exists());
    // The same as a process leaves it that is killed.
    std::fs::create_dir_all(&path).unwrap();
    std::fs::write(path.join("owner"), owner).unwrap();
    std::fs::create_dir(&sockets).unwrap();
    for left in [socket, sockets.join(".s.PGSQL.5432")] {
        drop(std::os::unix::net::UnixListener::bind(left).unwrap());
    }
    assert_eq!(sweep(&rooms).unwrap(), [Swept { path: path.clone(), n_processes: 0 }]);
    assert!(!path.exists() && !sockets.exists(), "{}", sockets.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_position_that_the_server_did_not_reach_is_an_error() {
    let (instance, directory) = with_rows(15).await;
    // More WAL than the backup needs lies in pg_wal; recovery stops at the end of the backup all
    // the same.
    let more = "INSERT INTO t SELECT generate_series(1, 20000)";
    let (room, mut options) =
        copied_by_hand(&instance, &directory.path().join("rooms"), more).await;
    let client = connect(&instance.url("postgres")).await;
    client.batch_execute(more).await.unwrap();
    let wal = instance.data_directory().join("pg_wal");
    copy(&wal, &room.data_directory().join("pg_wal"));
    let reached = options.stop_lsn;
    options.stop_lsn = Lsn(options.stop_lsn.0 + 10_000);
    let error = refused(&instance, room, options).await;
    let Error::StopPositionMissed { expected, reached: found } = error else { panic!("{error}") };
    assert_eq!((found, expected), (reached, Lsn(reached.0 + 10_000)));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_copy_of_this_cluster_is_refused() {
    let (instance, directory) = with_rows(15).await;
    let rooms = directory.path().join("rooms");
    let shape = |error: Error| match error {
        Error::Shape { what, .. } => what,
        other => panic!("{other}"),
    };
    let (room, options) = copied(&instance, &rooms).await;
    std::fs::remove_file(room.data_directory().join("backup_label")).unwrap();
    assert!(shape(refused(&instance, room, options).await).contains("backup_label is missing"));

    let (room, mut options) = copied(&instance, &rooms).await;
    options.system_identifier = SystemIdentifier(1);
    assert!(shape(refused(&instance, room, options).await).contains("system identifier"));

    let (room, options) = copied(&instance, &rooms).await;
    let path = room.path().to_owned();
    let error = Sandbox::boot(&binaries(18).await, room, options).await.unwrap_err();
    assert!(shape(error).contains("it is of PostgreSQL 15"));
    assert!(!path.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_booted_that_could_write_outside_its_room() {
    let (instance, directory) = with_rows(15).await;
    let rooms = directory.path().join("rooms");
    let outside = directory.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let shape = |error: Error| match error {
        Error::Shape { what, .. } => what,
        other => panic!("{other}"),
    };

    let (room, options) = copied(&instance, &rooms).await;
    symlink(&outside, room.data_directory().join("pg_tblspc/16999")).unwrap();
    assert!(shape(refused(&instance, room, options).await).contains("outside the sandbox"));

    let (room, options) = copied(&instance, &rooms).await;
    symlink("../../../outside", room.data_directory().join("log")).unwrap();
    assert!(shape(refused(&instance, room, options).await).contains("outside the sandbox"));

    for place in
        [outside.display().to_string(), format!("{}/../../outside", rooms.join("proof").display())]
    {
        let (room, options) = copied(&instance, &rooms).await;
        std::fs::write(room.data_directory().join("tablespace_map"), format!("16999 {place}\n"))
            .unwrap();
        assert!(shape(refused(&instance, room, options).await).contains("maps a tablespace"));
    }

    // Created while the backup ran: replay would write into the directory that production uses.
    let client = connect(&instance.url("postgres")).await;
    let create = format!("CREATE TABLESPACE late LOCATION '{}'", outside.display());
    let (room, options) = copied_by_hand(&instance, &rooms, &create).await;
    let error = refused(&instance, room, options).await;
    assert!(error.to_string().starts_with(&format!("use {}", outside.display())), "{error}");
    assert!(shape(error).contains("created while the backup ran"));
    client.batch_execute("DROP TABLESPACE late").await.unwrap();
    assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tablespace_restored_into_the_room_is_used_there() {
    for major in [15, 18] {
        let (instance, directory) = with_rows(major).await;
        let space = directory.path().join("space");
        std::fs::create_dir(&space).unwrap();
        let client = connect(&instance.url("postgres")).await;
        client
            .batch_execute(&format!("CREATE TABLESPACE there LOCATION '{}'", space.display()))
            .await
            .unwrap();
        client
            .batch_execute("CREATE TABLE far TABLESPACE there AS SELECT generate_series(1, 999) i")
            .await
            .unwrap();
        let oid = text(&client, "SELECT oid FROM pg_tablespace WHERE spcname = 'there'").await;
        let room =
            SandboxRoom::create(&directory.path().join("rooms"), "proof", None).await.unwrap();
        let target = room.tablespaces().join(&oid);
        let mapping = format!("{}={}", space.display(), target.display());
        let url = instance.url("postgres");
        let program = instance.binaries().program("pg_basebackup").unwrap();
        let program = program
            .args(["-d", &url, "-c", "fast", "-T", &mapping, "-D"])
            .arg(room.data_directory());
        program.run(PATIENCE, &CancellationToken::new()).await.unwrap();
        let control = ControlFile::read(&instance.data_directory()).unwrap();
        let manifest =
            std::fs::read_to_string(room.data_directory().join("backup_manifest")).unwrap();
        let end = manifest.split_once("\"End-LSN\": \"").unwrap().1.split('"').next().unwrap();
        let options =
            SandboxOptions::new(end.parse().unwrap(), Timeline(1), control.system_identifier);
        let sandbox = Sandbox::boot(instance.binaries(), room, options).await.unwrap();
        let copy = connect(&sandbox.url("postgres")).await;
        assert_eq!(text(&copy, "SELECT count(*) FROM public.far").await, "999");
        let location = text(&copy, &format!("SELECT pg_tablespace_location({oid})")).await;
        assert_eq!(location, target.display().to_string());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_without_the_usual_superuser_is_proved_too() {
    for major in [15, 18] {
        let (instance, directory) = with_rows(major).await;
        let (room, mut options) = copied(&instance, &directory.path().join("rooms")).await;
        options.role = "nobody_of_this_name".to_owned();
        let stop_lsn = options.stop_lsn;
        let sandbox = Sandbox::boot(instance.binaries(), room, options).await.unwrap();
        assert_eq!((sandbox.role(), sandbox.replay_end()), ("postgres", stop_lsn));
        let copy = connect(&sandbox.url("template1")).await;
        assert_eq!(text(&copy, "SELECT current_user").await, "postgres");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_subscribers_copy_has_room_for_its_replication_origins() {
    for major in [15, 18] {
        let name =
            if major >= 18 { "max_active_replication_origins" } else { "max_replication_slots" };
        let (instance, directory) = cluster(major, &[(name, "80")]).await;
        let client = connect(&instance.url("postgres")).await;
        client.batch_execute("CREATE TABLE t (i int)").await.unwrap();
        // What apply workers do, more often than a server has room for by default: commits that
        // carry the origin they came from. Replay has to remember each of them.
        let mut applied = String::new();
        for n in 0..70 {
            write!(
                applied,
                "SELECT pg_replication_origin_create('o{n}'); \
                 SELECT pg_replication_origin_session_setup('o{n}'); \
                 BEGIN; SELECT pg_replication_origin_xact_setup('0/{n:X}', now()); \
                 INSERT INTO t VALUES ({n}); COMMIT; \
                 SELECT pg_replication_origin_session_reset();"
            )
            .unwrap();
        }
        let rooms = directory.path().join("rooms");
        let (room, mut options) = copied_by_hand(&instance, &rooms, &applied).await;
        options.settings = vec![Setting { name: name.to_owned(), value: "80".to_owned() }];
        let sandbox = Sandbox::boot(instance.binaries(), room, options).await.unwrap();
        let copy = connect(&sandbox.url("postgres")).await;
        assert_eq!(text(&copy, "SELECT count(*) FROM public.t").await, "70");
        let remembered = "SELECT count(*) FROM pg_show_replication_origin_status()";
        assert_eq!(text(&copy, remembered).await, "70");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn boots_end_when_they_are_cancelled_or_out_of_time() {
    let (instance, directory) = with_rows(15).await;
    let rooms = directory.path().join("rooms");
    let (room, options) = copied(&instance, &rooms).await;
    options.cancel.cancel();
    let error = refused(&instance, room, options).await;
    assert!(matches!(error, Error::Cancelled { .. }), "{error}");
    let (room, mut options) = copied(&instance, &rooms).await;
    options.timeout = Duration::from_millis(1); // no server starts in less
    let error = refused(&instance, room, options).await;
    assert!(matches!(error, Error::Deadline { .. }), "{error}");
    assert!(processes_in(&rooms).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_of_its_own_is_had_where_it_is_required() {
    let (instance, directory) = with_rows(15).await;
    let (room, mut options) = copied(&instance, &directory.path().join("rooms")).await;
    options.network = NetworkIsolation::Required;
    match (Isolation::probe(None).await, Sandbox::boot(instance.binaries(), room, options).await) {
        (Isolation::Namespaces { .. }, Ok(sandbox)) => {
            assert!(matches!(sandbox.isolation(), Isolation::Namespaces { .. }));
        }
        (Isolation::None(reason), Err(Error::SandboxUnfit { evidence, .. })) => {
            assert_eq!(evidence, reason);
        }
        (found, result) => panic!("{found:?} {result:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_owner_leaves_no_server_and_the_next_sweep_no_room() {
    if let Some(directory) = owned_directory() {
        let instance = cluster_in(&directory.join("source"), 15, &[]).await;
        let (room, mut options) = copied(&instance, &directory.join("rooms")).await;
        options.network = NetworkIsolation::WherePossible;
        let sandbox = Sandbox::boot(instance.binaries(), room, options).await.unwrap();
        let copy = connect(&sandbox.url("postgres")).await;
        text(&copy, "SELECT 1").await;
        drop(instance);
        std::fs::write(directory.join("booted"), "").unwrap();
        std::future::pending::<()>().await;
    }
    let directory = tempfile::tempdir().unwrap();
    let rooms = directory.path().join("rooms");
    let mine = SandboxRoom::create(&rooms, "mine", None).await.unwrap();
    std::fs::create_dir(rooms.join("stranger")).unwrap();
    std::fs::write(rooms.join("stranger/owner"), "somebody\n").unwrap();
    let mut owner = owner_process(
        "a_killed_owner_leaves_no_server_and_the_next_sweep_no_room",
        directory.path(),
    );
    wait_for("the owner's sandbox", || directory.path().join("booted").exists());
    assert!(processes_in(&rooms).len() >= 4);
    assert_eq!(sweep(&rooms).unwrap(), [], "both owners live");
    owner.kill().unwrap();
    owner.wait().unwrap();
    wait_for("the end of the server", || processes_in(&rooms).is_empty());
    let proof = rooms.canonicalize().unwrap().join("proof");
    let swept = sweep(&rooms).unwrap();
    assert_eq!(
        swept
            .iter()
            .map(|it| it.path.canonicalize().unwrap_or(it.path.clone()))
            .collect::<Vec<_>>(),
        [rooms.join("proof")]
    );
    assert!(!proof.exists());
    assert!(mine.data_directory().is_dir() && rooms.join("stranger/owner").is_file());
    mine.remove().unwrap();
    assert_eq!(sweep(&rooms).unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sweep_ends_servers_that_survived_their_owner() {
    // A server that nothing ties to its owner, as where the kernel's signal is not to be had.
    let (mut instance, directory) = cluster(15, &[]).await;
    instance.stop(postgres::instance::StopMode::Fast).await.unwrap();
    let rooms = directory.path().join("rooms");
    let room = SandboxRoom::create(&rooms, "proof", Some(Account::current())).await.unwrap();
    copy(&instance.data_directory(), &room.data_directory());
    let data = room.data_directory();
    let kept = rooms.join("kept");
    std::fs::rename(room.path(), &kept).unwrap();
    drop(room); // Lets go of the lock; the room itself lies elsewhere now.
    let data = kept.join(data.file_name().unwrap());
    std::fs::set_permissions(&data, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut server = std::process::Command::new(instance.binaries().path("postgres").unwrap())
        .args(["-D".as_ref(), data.as_os_str(), "-k".as_ref(), kept.join("s").as_os_str()])
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    wait_for("the server", || processes_in(&kept).len() >= 5);
    let reaper = std::thread::spawn(move || server.wait().unwrap());
    let swept = sweep(&rooms).unwrap();
    let [Swept { path, n_processes }] = &swept[..] else { panic!("{swept:?}") };
    assert_eq!(path, &kept);
    assert!(*n_processes >= 5 && !kept.exists());
    reaper.join().unwrap();
    assert!(processes_in(directory.path()).is_empty());
}
