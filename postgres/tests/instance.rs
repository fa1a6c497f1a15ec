//! Throwaway clusters on real servers: they start, they stop, and above all they never outlive
//! their owner.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test that cannot go on ends there")]

#[path = "throwaway/owners.rs"]
mod owners;
mod throwaway;

use std::path::Path;
use std::time::Duration;

use owners::{owned_directory, owner_process, processes_in, wait_for};
use postgres::Error;
use postgres::binaries::Binaries;
use postgres::block_sizes::BlockSizes;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use postgres::process::{DeathSignal, Program};
use throwaway::{binaries, cluster, connect, text};
use tokio_util::sync::CancellationToken;

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_lives_through_stops_restarts_and_crashes() {
    for major in [15, 18] {
        let (mut instance, _directory) = cluster(major, &[("work_mem", "5MB")]).await;
        let client = connect(&instance.url("postgres")).await;
        assert_eq!(text(&client, "SHOW work_mem").await, "5MB");
        assert_eq!(text(&client, "SHOW listen_addresses").await, "");
        assert_eq!(text(&client, "SHOW wal_segment_size").await, "1MB");
        assert_eq!(text(&client, "SHOW data_checksums").await, "on");
        client.batch_execute("CREATE TABLE t AS SELECT 41 + 1 AS n").await.unwrap();

        instance.kill9();
        assert!(processes_in(&instance.data_directory()).is_empty());
        instance.set(&[("work_mem", "6MB")]).unwrap();
        instance.start().await.unwrap();
        assert!(instance.log_tail().contains("ready to accept connections"));
        let client = connect(&instance.url("postgres")).await;
        assert_eq!(text(&client, "SELECT n FROM t").await, "42");
        assert_eq!(text(&client, "SHOW work_mem").await, "6MB");

        instance.stop(StopMode::Immediate).await.unwrap();
        assert!(!instance.is_running());
        instance.restart().await.unwrap();
        let data = instance.data_directory();
        drop(instance);
        assert!(processes_in(&data).is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_start_says_why() {
    let (mut instance, _directory) = cluster(15, &[]).await;
    instance.set(&[("shared_preload_libraries", "no_such_library")]).unwrap();
    let error = instance.restart().await.unwrap_err();
    assert!(error.to_string().contains("no_such_library"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn checksums_and_tcp_are_as_asked_for() {
    let directory = tempfile::tempdir().unwrap();
    for (major, checksums) in [(15, false), (18, false), (18, true)] {
        let options = InstanceOptions {
            checksums,
            tcp_port: Some(0),
            fsync: false,
            ..InstanceOptions::default()
        };
        let place = directory.path().join(format!("{major}-{checksums}"));
        let binaries = binaries(major).await;
        let mut instance = Instance::create(&binaries, &place, options).await.unwrap();
        instance.start().await.unwrap();
        let client = connect(&instance.url("postgres")).await;
        let shown = text(&client, "SHOW data_checksums").await;
        assert_eq!(shown, if checksums { "on" } else { "off" });
        client.batch_execute("CREATE ROLE guest LOGIN PASSWORD 'a:b/c'").await.unwrap();
        let url = instance.tcp_url("guest", "a:b/c", "postgres").unwrap();
        assert_eq!(text(&connect(&url).await, "SELECT current_user").await, "guest");
        let wrong = instance.tcp_url("guest", "wrong", "postgres").unwrap();
        assert!(tokio_postgres::connect(&wrong, tokio_postgres::NoTls).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_owner_leaves_no_server_and_no_busy_backend() {
    if let Some(directory) = owned_directory() {
        let options = InstanceOptions { fsync: false, ..InstanceOptions::default() };
        let binaries = binaries(15).await;
        let mut instance = Instance::create(&binaries, &directory, options).await.unwrap();
        instance.start().await.unwrap();
        // A statement that looks at neither clients nor postmaster, and would run for hours.
        let client = connect(&instance.url("postgres")).await;
        let busy =
            "SELECT count(*) FROM generate_series(1, 1000000) a, generate_series(1, 1000000) b";
        let _statement = tokio::spawn(async move { client.batch_execute(busy).await });
        let watcher = connect(&instance.url("postgres")).await;
        let active = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%series%' AND pid <> pg_backend_pid()";
        while text(&watcher, active).await != "1" {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        std::fs::write(directory.join("busy"), "").unwrap();
        std::future::pending::<()>().await;
    }
    let directory = tempfile::tempdir().unwrap();
    let mut owner =
        owner_process("a_killed_owner_leaves_no_server_and_no_busy_backend", directory.path());
    wait_for("the owner's server", || directory.path().join("busy").exists());
    let data = directory.path().join("data");
    assert!(processes_in(&data).len() >= 5, "{:?}", processes_in(&data));
    owner.kill().unwrap();
    owner.wait().unwrap();
    wait_for("the end of the server", || processes_in(&data).is_empty());
}

#[test]
fn a_server_outlives_the_thread_that_asked_for_it() {
    // The parent-death signal follows the thread that forked, not the process.
    let thread = std::thread::spawn(|| {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let sleeper = runtime.block_on(async {
            let null = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
            Program::new("sleep").arg("600").spawn(null).await.unwrap()
        });
        let pid = sleeper.pid().unwrap();
        wait_for("the program to start", || is_asleep(pid));
        (sleeper, runtime, std::fs::read_link("/proc/thread-self").unwrap())
    });
    let (mut sleeper, _runtime, thread) = thread.join().unwrap();
    wait_for("the thread's end", || !Path::new("/proc").join(&thread).exists());
    // A signal, had there been one, would have woken it up.
    assert!(is_asleep(sleeper.pid().unwrap()));
    assert_eq!(sleeper.ended().unwrap(), None);
}

/// Whether the process is `sleep`, waiting, with no signal on its way.
fn is_asleep(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let has = |line: &str| status.contains(line);
    has("Name:\tsleep") && has("State:\tS") && has("SigPnd:\t0000000000000000")
}

#[tokio::test]
async fn programs_are_bounded_in_time_and_told_apart_by_their_ends() {
    let never = CancellationToken::new();
    let patience = Duration::from_secs(20);
    let error = Program::new("sh").args(["-c", "echo first >&2; echo reason >&2; exit 3"]);
    let error = error.run(patience, &never).await.unwrap_err().to_string();
    assert!(error.contains("exit code 3") && error.contains("reason"), "{error}");

    let error = Program::new("sleep").arg("600").run(Duration::from_millis(50), &never).await;
    assert!(matches!(error, Err(Error::Deadline { .. })), "{error:?}");

    let cancel = CancellationToken::new();
    cancel.cancel();
    let error = Program::new("sleep").arg("600").run(patience, &cancel).await;
    assert!(matches!(error, Err(Error::Cancelled { .. })), "{error:?}");

    let output = Program::new("cat").stdin("héllo").run(patience, &never).await.unwrap();
    assert_eq!(output.stdout_text(), "héllo");

    let output =
        Program::new("head").args(["-c", "9000000", "/dev/zero"]).run(patience, &never).await;
    let output = output.unwrap();
    assert!(output.truncated && output.stdout.len() == 4 << 20, "{}", output.stdout.len());

    let error = Program::new("/no/such/program").run(patience, &never).await.unwrap_err();
    assert!(error.to_string().contains("program"), "{error}");
}

#[tokio::test]
async fn children_inherit_neither_secrets_nor_the_group() {
    let program = Program::new("env").env("PGDATA", "/x");
    let output = program.run(Duration::from_secs(20), &CancellationToken::new()).await.unwrap();
    let text = output.stdout_text();
    let mut names: Vec<&str> = text.lines().filter_map(|line| line.split('=').next()).collect();
    names.sort_unstable();
    assert_eq!(names, ["LC_ALL", "PATH", "PGDATA", "TZ"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_program_ends_its_whole_group() {
    let directory = tempfile::tempdir().unwrap();
    let null = std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap();
    let script = "sleep 600 & sleep 600 & wait";
    let shell = Program::new("sh").args(["-c", script]).directory(directory.path());
    let running = shell.death_signal(DeathSignal::Kill).spawn(null).await.unwrap();
    wait_for("the shell's children", || processes_in(directory.path()).len() == 3);
    drop(running);
    wait_for("their end", || processes_in(directory.path()).is_empty());
}

#[tokio::test]
async fn the_programs_of_every_version_are_found_in_configured_directories() {
    for major in [15, 18] {
        let wanted = binaries(major).await;
        let parent = wanted.directory().parent().unwrap().to_owned();
        let other = binaries(if major == 15 { 18 } else { 15 }).await.directory().to_owned();
        let found = Binaries::find(major, &[other, parent.clone()]).await.unwrap();
        assert_eq!(found.directory(), parent.join("bin"));
        assert_eq!(found.version_num() / 10_000, major);
        assert!(found.path("initdb").is_ok());
        let Err(Error::BinariesMissing { package, .. }) = found.path("pg_no_such_program") else {
            panic!("it is there")
        };
        assert_eq!(package, format!("postgresql-{major}"));
    }
}

#[tokio::test]
async fn programs_tell_what_they_are_built_for_and_are_no_use_for_other_clusters() {
    let usual = BlockSizes { page_bytes: 8192, file_pages: 131_072, wal_page_bytes: 8192 };
    for major in [14, 15, 18] {
        let wanted = binaries(major).await;
        assert_eq!(wanted.block_sizes().await.unwrap(), usual, "{major}");
        let directory = wanted.directory().to_owned();
        let directories = [directory.clone()];
        let found = Binaries::find_for(major, &directories, usual).await.unwrap();
        assert_eq!(found.directory(), directory);
        let needed = BlockSizes { page_bytes: 32_768, ..usual };
        let error = Binaries::find_for(major, &directories, needed).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!(
                "find programs of PostgreSQL {major} for pages of 32768 bytes, 131072 of them in a file, and pages of WAL of \
                 8192 bytes: those in {} are built for pages of 8192 bytes, 131072 of them in a file, and pages of WAL of \
                 8192 bytes",
                directory.display()
            )
        );
    }
    let missing = Binaries::find_for(99, &[], usual).await.unwrap_err();
    assert!(matches!(missing, Error::BinariesMissing { major: 99, .. }), "{missing}");
}
