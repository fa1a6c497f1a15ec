//! Recovery to every kind of moment along three timelines, on real servers that archive through the program itself. An oracle
//! knows which rows were committed at each moment; a recovered server has these rows, no more and no fewer.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

#[path = "recovery/branches.rs"]
mod branches;
mod house;

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use house::{
    House, LARGE_PAGES, bin_dir, caught_up, copy_of, eventually, number, run_sql, session, text,
};
use postgres::binaries::Binaries;
use postgres::control_file::ControlFile;
use postgres::instance::{InstanceOptions, StopMode};
use postgres::recovery::{Expected, RecoveryServer};
use proto::{Code, Failure, Lsn, RecoveryTarget, TargetAction, Timeline};
use tokio_util::sync::CancellationToken;

const TABLE: &str = "CREATE TABLE public.ledger (id bigint PRIMARY KEY)";

/// What was true when a moment was over.
#[derive(Debug, Clone)]
struct Point {
    rows: BTreeSet<i64>,
    /// The rows before the transaction that made it.
    rows_before: BTreeSet<i64>,
    xid: String,
    lsn: Lsn,
    /// Later than its commit, and earlier than the next.
    time: String,
    name: String,
}

/// The servers that were, the moments that were, and the archive.
struct World {
    house: House,
    /// Of PostgreSQL.
    build: String,
    key: PathBuf,
    /// Where the server is that is written to, if not where the first one was.
    port: Option<u16>,
    rows: BTreeSet<i64>,
    next: i64,
}

fn pgmuster() -> String {
    #[expect(clippy::disallowed_methods, reason = "the program under test")]
    let program = std::env::var("PGMUSTER_TEST_BINARY");
    program.unwrap_or_else(|_| panic!("PGMUSTER_TEST_BINARY is not set: run ./tests/run"))
}

impl World {
    async fn new(build: impl Display, segment_mib: u32) -> Self {
        let settings = [
            ("autovacuum", "off"),
            ("wal_level", "replica"),
            ("max_prepared_transactions", "5"),
            ("archive_mode", "on"),
            ("archive_command", "false"),
            ("checkpoint_timeout", "1h"),
            // Another target in the way of ours, and a command of somebody else's.
            ("recovery_target_name", "of_another_recovery"),
            ("restore_command", "cp /nowhere/%f %p"),
        ];
        let options = InstanceOptions {
            fsync: false,
            wal_segment_size_mb: Some(segment_mib),
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            ..InstanceOptions::default()
        };
        let mut house = House::new(&build, options).await;
        let key = house.place.path().join("repository.key");
        std::fs::write(&key, &house.key_file).unwrap();
        let archive = format!(
            "'{}' wal push \"%p\" --new --repository 'file://{}/repository' --key '{}' --cluster orders",
            pgmuster(),
            house.place.path().display(),
            key.display()
        );
        house.server.set(&[("archive_command", &archive)]).unwrap();
        house.sql("SELECT pg_reload_conf()").await;
        house.sql(TABLE).await;
        let build = build.to_string();
        Self { house, build, key, port: None, rows: BTreeSet::new(), next: 1 }
    }

    fn url(&self) -> String {
        let (server, port) = (&self.house.server, |port: u16| format!(":{port}/"));
        let (first, now) = (port(server.port()), port(self.port.unwrap_or(server.port())));
        server.url("postgres").replace(&first, &now)
    }

    /// Commits a change, among others that are rolled back, and remembers everything about it. Its row comes by a
    /// subtransaction beside one that is rolled back, and every second one is prepared first.
    async fn step(&mut self) -> Point {
        let rows_before = self.rows.clone();
        let id = self.next;
        self.next += 1;
        let session = session(&self.url()).await;
        let run = async |sql: &str| session.run("work", sql).await.unwrap();
        let text =
            async |sql: &str| -> String { session.one("ask", sql, &[]).await.unwrap().get(0) };
        let rolled_back = format!("BEGIN; INSERT INTO public.ledger VALUES (-{id}); ROLLBACK");
        run(&rolled_back).await;
        run("BEGIN").await;
        let xid = text("SELECT pg_current_xact_id()::text").await;
        for (id, end) in [(-id, "ROLLBACK TO"), (id, "RELEASE")] {
            run("SAVEPOINT part").await;
            run(&format!("INSERT INTO public.ledger VALUES ({id})")).await;
            run(&format!("{end} part")).await;
        }
        self.rows.insert(id);
        if id % 4 == 0 {
            run(&format!("DELETE FROM public.ledger WHERE id = {}", id - 2)).await;
            self.rows.remove(&(id - 2));
        }
        if id % 2 == 0 {
            run(&format!("PREPARE TRANSACTION 'step {id}'")).await;
            run(&rolled_back).await;
            run(&format!("COMMIT PREPARED 'step {id}'")).await;
        } else {
            run("COMMIT").await;
        }
        let lsn = text("SELECT pg_current_wal_insert_lsn()::text").await.parse().unwrap();
        let time = text("SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')").await;
        let name = format!("after {id}");
        run(&format!("SELECT pg_create_restore_point('{name}')")).await;
        if id % 3 == 0 {
            run("SELECT pg_switch_wal()").await;
        }
        session.close().await;
        Point { rows: self.rows.clone(), rows_before, xid, lsn, time, name }
    }

    /// `pgmuster restore --repository`, with the arguments of a case.
    fn restore(&self, into: &Path, arguments: &[&str]) -> Output {
        let url = format!("file://{}/repository", self.house.place.path().display());
        let bin = bin_dir(&self.build);
        let path = format!("{}:/usr/local/bin:/usr/bin:/bin", bin.display());
        Command::new(pgmuster())
            .args(["restore", "--repository", &url, "--key", self.key.to_str().unwrap(), "--into"])
            .arg(into)
            .args(arguments)
            .env("PATH", path)
            .output()
            .unwrap()
    }

    /// Recovers in `name` and says which rows are there; the server is stopped again.
    async fn rows_at(&self, name: &str, arguments: &[&str]) -> BTreeSet<i64> {
        let into = self.house.place.path().join(name);
        let done = self.restore(&into, &[arguments, &["--start"]].concat());
        assert!(done.status.success(), "{arguments:?}: {}", said(&done));
        let rows = self.rows_now().await;
        stop(&self.build, &into, "immediate").await;
        std::fs::remove_dir_all(&into).unwrap();
        rows
    }

    async fn rows_now(&self) -> BTreeSet<i64> {
        let session = session(&self.url()).await;
        let sql = "SELECT coalesce(array_agg(id), '{}') FROM public.ledger";
        let rows: Vec<i64> = session.one("look", sql, &[]).await.unwrap().get(0);
        session.close().await;
        rows.into_iter().collect()
    }

    /// A server that takes the place of the one before: it archives into the same lineage, on a timeline of its own.
    async fn succeed(&mut self, name: &str, arguments: &[&str], timeline: u32) -> PathBuf {
        let into = self.house.place.path().join(name);
        let arguments = [arguments, &["--start", "--keep-archiving"]].concat();
        let done = self.restore(&into, &arguments);
        assert!(done.status.success(), "{arguments:?}: {}", said(&done));
        let told = format!("open on timeline {timeline}");
        assert!(String::from_utf8_lossy(&done.stdout).contains(&told), "{}", said(&done));
        // What fetched its WAL ahead is gone, and it knows of none.
        let process = std::fs::read_to_string(into.join("postmaster.pid")).unwrap();
        let process = process.lines().next().unwrap();
        let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap();
        let environment = String::from_utf8_lossy(&environment);
        assert!(!environment.contains("PGMUSTER_WAL_SOCKET"), "{environment}");
        self.rows = self.rows_now().await;
        into
    }

    /// A standby that has replayed everything so far, and streams no more. It will be found where the server is now.
    async fn lagging_standby(&self, name: &str) -> PathBuf {
        let directory = self.house.place.path().join(name);
        copy_of(&self.url(), self.house.server.binaries().major(), &directory).await;
        std::fs::write(directory.join("standby.signal"), "").unwrap();
        let sockets = text(&self.url(), "SELECT current_setting('unix_socket_directories')").await;
        let settings = directory.join("postgresql.auto.conf");
        let before = std::fs::read_to_string(&settings).unwrap();
        let set = |lines: &str| std::fs::write(&settings, format!("{before}{lines}")).unwrap();
        let own = "recovery_target_name = ''\nrestore_command = ''\n";
        set(&format!("{own}primary_conninfo = 'host={sockets} user=postgres'\nport = 5433\n"));
        start(&self.build, &directory).await;
        caught_up(&self.url(), &self.url().replace(":5432/", ":5433/")).await;
        stop(&self.build, &directory, "fast").await;
        set(own);
        directory
    }

    /// Promotes the standby that runs where the server was.
    async fn promote(&mut self, timeline: u32) {
        run_sql(&self.url(), "SELECT pg_promote(true, 60)").await;
        let name = text(&self.url(), "SELECT pg_walfile_name(pg_current_wal_lsn())").await;
        assert_eq!(name[..8], format!("{timeline:08X}"), "{name}");
        self.rows = self.rows_now().await;
    }

    /// Everything that was written is in the archive.
    async fn archived(&self) {
        let session = session(&self.url()).await;
        // There is always something to archive.
        session.run("write", "SELECT pg_create_restore_point('archived')").await.unwrap();
        let sql = "SELECT pg_walfile_name(pg_switch_wal())";
        let name: String = session.one("switch", sql, &[]).await.unwrap().get(0);
        session.close().await;
        let object = format!("wal/{}/{name}", &name[..8]);
        let there = async || {
            let lineages = self.house.place.path().join("repository/lineages");
            let mut lineages = std::fs::read_dir(lineages).unwrap();
            lineages.any(|entry| entry.unwrap().path().join(&object).exists()).then_some(())
        };
        eventually(&format!("{name} is archived"), Duration::from_mins(1), there).await;
    }

    /// The files of the archive.
    fn archived_names(&self) -> BTreeSet<String> {
        let lineages = self.house.place.path().join("repository/lineages");
        let lineage = std::fs::read_dir(lineages).unwrap().next().unwrap().unwrap().path();
        let mut names = BTreeSet::new();
        for timeline in std::fs::read_dir(lineage.join("wal")).unwrap() {
            for file in std::fs::read_dir(timeline.unwrap().path()).unwrap() {
                names.insert(file.unwrap().file_name().into_string().unwrap());
            }
        }
        names
    }

    /// Takes a segment out of the archive, and says how it is put back.
    fn take_out(&self, lsn: Lsn, timeline: u32) -> (PathBuf, Vec<u8>) {
        let name = format!("{timeline:08X}{:08X}{:08X}", lsn.0 >> 32, (lsn.0 & 0xffff_ffff) >> 20);
        let lineages = self.house.place.path().join("repository/lineages");
        let lineage = std::fs::read_dir(lineages).unwrap().next().unwrap().unwrap().path();
        let object = lineage.join(format!("wal/{timeline:08X}/{name}"));
        let content =
            std::fs::read(&object).unwrap_or_else(|e| panic!("{}: {e}", object.display()));
        std::fs::remove_file(&object).unwrap();
        (object, content)
    }

    /// `pgmuster recovery windows` of the repository.
    fn windows(&self) -> Output {
        let url = format!("file://{}/repository", self.house.place.path().display());
        let words = ["recovery", "windows", &url, "--key", self.key.to_str().unwrap()];
        Command::new(pgmuster()).args(words).output().unwrap()
    }

    fn refused(&self, arguments: &[&str], code: &str, words: &[&str]) {
        let into = self.house.place.path().join("refused");
        let refused = self.restore(&into, arguments);
        let text = said(&refused);
        assert!(!refused.status.success(), "{arguments:?}: {text}");
        assert!(text.contains(&format!("error: {code}: ")), "{arguments:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{arguments:?}: {word:?}: {text}");
        }
        assert!(!into.exists(), "{arguments:?} wrote something");
    }
}

/// Where a plan writes as many bytes as the restore then wrote, and that there is room for them.
fn says_its_bytes_and_its_room(planned: &Output, place: &Path, size_bytes: u64) {
    let said = said(planned);
    let number = |text: &str| -> u64 { text.replace(',', "").parse().unwrap() };
    let line = |begin: &str| {
        let found = said.lines().find_map(|line| line.trim_start().strip_prefix(begin));
        found.unwrap_or_else(|| panic!("no line begins with {begin}: {said}"))
    };
    let (files, rest) = line("write ").split_once(" files in ").unwrap();
    let (directories, rest) = rest.split_once(" directories, ").unwrap();
    let (bytes, rest) = rest.split_once(" bytes, and ").unwrap();
    let (_, rest) = rest.split_once(" of WAL, ").unwrap();
    let (wal_bytes, below) = rest.split_once(" bytes, below ").unwrap();
    let bytes = number(bytes) + number(wal_bytes);
    assert_eq!(Path::new(below), place, "{said}");
    assert!(number(files) > 900 && number(directories) > 20, "{said}");
    let (needed, rest) = line("need ").split_once(" bytes at ").unwrap();
    let (at, free) = rest.split_once(", where ").unwrap();
    assert_eq!((Path::new(at), number(needed)), (place, bytes), "{said}");
    let free = number(free.strip_suffix(" are free").unwrap());
    assert!(bytes == size_bytes && size_bytes < free, "{size_bytes}: {said}");
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

async fn stop(build: impl Display, directory: &Path, mode: &str) {
    pg_ctl(build, directory, &["stop", "-m", mode]).await;
}

async fn start(build: impl Display, directory: &Path) {
    let log = directory.join("start.log");
    pg_ctl(build, directory, &["start", "-l", log.to_str().unwrap()]).await;
}

async fn pg_ctl(build: impl Display, directory: &Path, arguments: &[&str]) {
    let binaries = Binaries::at(&bin_dir(build)).await.unwrap();
    let program = binaries.program("pg_ctl").unwrap().args(arguments).args(["-s", "-w", "-D"]);
    let ended = program.arg(directory).run(Duration::from_mins(1), &CancellationToken::new()).await;
    ended.unwrap();
}

/// What each target must give, over three timelines; and along a fourth.
async fn every_moment(major: u32) {
    let mut world = World::new(major, 1).await;
    // Timeline 1: a moment that no backup leads to, a backup, and a line that goes on after the next has left it. A transaction
    // that is prepared all the time.
    let early = world.step().await;
    let in_doubt = "BEGIN; INSERT INTO public.ledger VALUES (0); PREPARE TRANSACTION 'in doubt'";
    world.house.sql(in_doubt).await;
    let backup = world.house.back_up().await;
    let of_backup = world.rows.clone();
    let mut first = Vec::new();
    for _ in 0..4 {
        first.push(world.step().await);
    }
    let place = world.lagging_standby("second").await;
    for _ in 0..2 {
        first.push(world.step().await);
    }
    world.archived().await;
    world.house.server.stop(StopMode::Fast).await.unwrap();

    // Timeline 2 leaves it after the fourth: a standby that had no more is promoted.
    start(major, &place).await;
    world.promote(2).await;
    assert_eq!(world.rows, first[3].rows);
    let mut second = Vec::new();
    for _ in 0..4 {
        second.push(world.step().await);
    }
    world.house.back_up().await;
    for _ in 0..3 {
        second.push(world.step().await);
    }
    world.archived().await;
    stop(major, &place, "fast").await;

    // Timeline 3 leaves that one at its sixth, without it, and begins with the backup of the second timeline: a restore.
    let place =
        world.succeed("third", &["--to", &format!("xid:{}", second[5].xid), "--before"], 3).await;
    assert_eq!(world.rows, second[5].rows_before);
    let mut third = Vec::new();
    for _ in 0..3 {
        third.push(world.step().await);
    }
    run_sql(&world.url(), "COMMIT PREPARED 'in doubt'").await;
    world.rows.insert(0);
    third.push(world.step().await);
    for _ in 0..2 {
        world.house.sql("SELECT pg_create_restore_point('twice')").await;
    }
    world.archived().await;
    stop(major, &place, "fast").await;

    let (xid, name) =
        (|p: &Point| format!("xid:{}", p.xid), |p: &Point| format!("name:{}", p.name));
    let (lsn, time) = (|p: &Point| p.lsn.to_string(), |p: &Point| p.time.clone());
    let before = "--before";
    let cases: Vec<(Vec<String>, &BTreeSet<i64>)> = vec![
        (vec!["latest".into()], &third[3].rows),
        // No transaction ended after it, and restore points show that the server was there.
        (vec![time(&third[3])], &third[3].rows),
        (vec![time(&third[2])], &third[2].rows),
        (vec![lsn(&third[1])], &third[1].rows),
        (vec![xid(&third[1])], &third[1].rows),
        (vec![xid(&third[1]), before.into()], &third[1].rows_before),
        (vec![name(&third[0])], &third[0].rows),
        (vec![time(&second[4])], &second[4].rows),
        (vec![xid(&second[4])], &second[4].rows),
        (vec![name(&second[2])], &second[2].rows),
        (vec![time(&second[0])], &second[0].rows),
        (vec![lsn(&second[1]), before.into()], &second[1].rows),
        (vec![time(&first[0])], &first[0].rows),
        (vec![xid(&first[2])], &first[2].rows),
        (vec![xid(&first[2]), before.into()], &first[2].rows_before),
        (vec![name(&first[1])], &first[1].rows),
        (vec![lsn(&first[1])], &first[1].rows),
        (vec![time(&first[4]), "--timeline".into(), "3".into()], &first[3].rows),
        (vec!["latest".into(), "--timeline".into(), "2".into()], &second[6].rows),
        (vec![time(&second[5]), "--timeline".into(), "2".into()], &second[5].rows),
        (vec!["latest".into(), "--timeline".into(), "1".into()], &first[5].rows),
        (vec![xid(&first[4]), "--timeline".into(), "1".into()], &first[4].rows),
        (vec!["immediate".into(), "--backup".into(), backup.backup.to_string()], &of_backup),
    ];
    assert!(cases.len() >= 20);
    for (number, (arguments, rows)) in cases.iter().enumerate() {
        let mut words = vec!["--to"];
        words.extend(arguments.iter().map(String::as_str));
        let found = world.rows_at(&format!("case-{number}"), &words).await;
        assert_eq!(found, **rows, "{words:?}");
    }

    // A server that pauses at its target waits there, and opens when it is told to.
    let into = world.house.place.path().join("paused");
    let (moment, timeline) = (time(&first[4]), ["--timeline", "1"]);
    let words = [&["--to", &moment, "--action", "pause", "--start"][..], &timeline].concat();
    let done = world.restore(&into, &words);
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains("paused at the target"), "{}", said(&done));
    // It was started again by its own settings, and comes there a second time.
    let is_paused =
        "SELECT CASE WHEN pg_is_in_recovery() THEN pg_get_wal_replay_pause_state() ELSE 'open' END";
    let pauses = async || (text(&world.url(), is_paused).await == "paused").then_some(());
    eventually("the server waits at its target", Duration::from_mins(1), pauses).await;
    assert_eq!(world.rows_now().await, first[4].rows);
    run_sql(&world.url(), "SELECT pg_wal_replay_resume()").await;
    let opens = async || (text(&world.url(), is_paused).await == "open").then_some(());
    eventually("the server opens", Duration::from_mins(1), opens).await;
    assert_eq!(world.rows_now().await, first[4].rows);
    stop(major, &into, "immediate").await;

    // A server that shuts down at its target was there, and is not running.
    let into = world.house.place.path().join("shut-down");
    let words = ["--to", &xid(&second[4]), "--action", "shutdown", "--start"];
    let done = world.restore(&into, &words);
    assert!(done.status.success(), "{}", said(&done));
    assert!(said(&done).contains("shut down at the target"), "{}", said(&done));
    assert!(!into.join("postmaster.pid").exists());
    let settings = into.join("postgresql.auto.conf");
    let auto = std::fs::read_to_string(&settings).unwrap();
    std::fs::write(&settings, auto.replace("= 'shutdown'", "= 'promote'")).unwrap();
    start(major, &into).await;
    assert_eq!(world.rows_now().await, second[4].rows);
    stop(major, &into, "immediate").await;

    let unreachable = "RECOVERY_TARGET_UNREACHABLE";
    world.refused(&["--to", &time(&early)], unreachable, &["ended at"]);
    world.refused(
        &["--to", "2999-01-01T00:00:00Z"],
        unreachable,
        &["recoverable up to", "--to latest"],
    );
    world.refused(&["--to", "xid:999999"], unreachable, &["recoverable up to"]);
    world.refused(&["--to", "name:nowhere"], unreachable, &["recoverable up to"]);
    world.refused(&["--to", "FFFF/0"], unreachable, &["recoverable up to"]);
    world.refused(&["--to", "latest", "--timeline", "9"], unreachable, &["00000009.history"]);
    // When it was that, the cluster was on a timeline that the next one left before.
    let words = ["--timeline 1 has", "--timeline 3 only"];
    world.refused(&["--to", &time(&first[4])], "REQUEST_INVALID", &words);
    world.refused(&["--to", "name:twice"], "REQUEST_INVALID", &["2 times", "--to "]);
    world.refused(&["--to", "xid:2"], "REQUEST_INVALID", &["below 3"]);

    // A gap: what lies behind it cannot be reached, what lies before it can.
    let (object, content) = world.take_out(third[0].lsn, 3);
    let segment = object.file_name().unwrap().to_str().unwrap().to_owned();
    world.refused(&["--to", "latest"], unreachable, &[&segment, "recoverable up to", "gap"]);
    world.refused(&["--to", &time(&third[3])], unreachable, &[&segment]);
    world.refused(&["--to", &xid(&third[3])], unreachable, &[&segment]);
    let place = world.house.place.path().join("planned");
    let planned = world.restore(&place, &["--to", &xid(&second[4]), "--plan"]);
    assert!(planned.status.success(), "{}", said(&planned));
    assert!(said(&planned).contains("segments of WAL"), "{}", said(&planned));
    for words in ["--timeline 1 leads there", "timeline 2 left timeline 1 at"] {
        assert!(said(&planned).contains(words), "{}", said(&planned));
    }
    assert!(!place.exists());
    let done = world.restore(&place, &["--to", &xid(&second[4]), "-o", "json"]);
    let outcome: serde_json::Value = serde_json::from_slice(&done.stdout).unwrap();
    let size_bytes = outcome["size_bytes"].as_u64().unwrap_or_else(|| panic!("{}", said(&done)));
    says_its_bytes_and_its_room(&planned, &place, size_bytes);
    std::fs::remove_dir_all(&place).unwrap();
    let windows = world.windows();
    assert_eq!(windows.status.code(), Some(3), "{}", said(&windows));
    let from = Lsn(third[0].lsn.0 >> 20 << 20);
    let to = Lsn(from.0 + (1 << 20));
    let told = format!(
        "orders: WAL is missing on timeline 3 from {segment}: recoverable before {from} and, from a backup that begins there, after {to}; no moment after "
    );
    let is_told =
        |line: &str| line.starts_with(&told) && line.ends_with(" before another backup is there.");
    assert!(said(&windows).lines().any(is_told), "{told}: {}", said(&windows));
    std::fs::write(&object, content).unwrap();
    let windows = world.windows();
    assert_eq!(windows.status.code(), Some(0), "{}", said(&windows));
    assert!(!said(&windows).contains("WAL is missing"), "{}", said(&windows));

    // A server that is not where it should be is found out, and not left running.
    let into = world.house.place.path().join("lied");
    let done = world.restore(&into, &["--to", &xid(&first[1])]);
    assert!(done.status.success(), "{}", said(&done));
    let auto = std::fs::read_to_string(into.join("postgresql.auto.conf")).unwrap();
    let (right, wrong) = (format!("xid = '{}'", first[1].xid), format!("xid = '{}'", first[0].xid));
    assert!(auto.contains(&right) && auto.contains("archive_mode = 'off'"), "{auto}");
    std::fs::write(into.join("postgresql.auto.conf"), auto.replace(&right, &wrong)).unwrap();
    let expected = Expected {
        target: RecoveryTarget::Xid(first[1].xid.parse().unwrap()),
        before: false,
        timeline: Timeline(3),
        at_least: Lsn(1),
        action: TargetAction::Promote,
        standby: false,
        system_identifier: ControlFile::read(&into).unwrap().system_identifier,
    };
    let binaries = Binaries::at(&bin_dir(major)).await.unwrap();
    let cancel = CancellationToken::new();
    let server = RecoveryServer {
        binaries: &binaries,
        directory: &into,
        environment: &[],
        environment_alone: &[],
        cancel: &cancel,
    };
    let missed = server.recover(&expected).await.unwrap_err();
    assert!(matches!(missed, postgres::Error::RecoveryMissed { .. }), "{missed:?}");
    // One sentence, and what the server said beside it.
    let told = Failure::from(missed);
    assert_eq!(told.code, Code::RecoveryTargetMissed, "{told:?}");
    assert!(!told.message.contains('\n') && !told.message.contains("LOG:"), "{told:?}");
    assert!(told.details.iter().any(|line| line.contains("LOG:")), "{told:?}");
    assert!(!into.join("postmaster.pid").exists(), "it still runs");

    // A standby follows what is archived, and takes over at its end: timeline 4.
    let into = world.house.place.path().join("standby");
    let done = world.restore(&into, &["--standby", "--start", "--keep-archiving"]);
    assert!(done.status.success(), "{}", said(&done));
    assert_eq!(world.rows_now().await, third[3].rows);
    world.promote(4).await;
    assert_eq!(world.rows, third[3].rows);
    let fourth = world.step().await;
    world.archived().await;
    stop(major, &into, "fast").await;
    for (target, timeline, point) in [
        ("latest".to_owned(), "4", &fourth),
        (time(&third[3]), "4", &third[3]),
        (xid(&third[3]), "3", &third[3]),
    ] {
        let words = ["--to", &target, "--timeline", timeline];
        assert_eq!(world.rows_at("fourth", &words).await, point.rows, "{words:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pg15_recovers_to_every_moment_of_three_timelines_and_to_no_other() {
    Box::pin(every_moment(15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pg18_recovers_to_every_moment_of_three_timelines_and_to_no_other() {
    Box::pin(every_moment(18)).await;
}

/// A transaction that is still prepared at the moment, in the segment in which the next timeline leaves the one that has it.
async fn in_doubt_before_a_parting(major: u32) {
    let mut world = World::new(major, 1).await;
    world.house.back_up().await;
    let points = [world.step().await, world.step().await];
    world.archived().await;
    world.house.server.stop(StopMode::Fast).await.unwrap();
    let there = format!("name:{}", points[1].name);
    let place = world.succeed("second", &["--to", &there], 2).await;
    assert_eq!(world.rows, points[1].rows);
    let last = world.step().await;
    world.archived().await;
    stop(major, &place, "fast").await;

    let xid = format!("xid:{}", points[1].xid);
    let cases: [(&[&str], &BTreeSet<i64>); 4] = [
        (&[&xid, "--before"], &points[1].rows_before),
        (&[&points[0].time], &points[0].rows),
        (&[&xid], &points[1].rows),
        (&["latest"], &last.rows),
    ];
    for (arguments, rows) in cases {
        let words = [&["--to"], arguments].concat();
        assert_eq!(world.rows_at("parted", &words).await, *rows, "{words:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pg15_a_transaction_in_doubt_where_a_timeline_was_left_is_recovered_to() {
    Box::pin(in_doubt_before_a_parting(15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pg18_a_transaction_in_doubt_where_a_timeline_was_left_is_recovered_to() {
    Box::pin(in_doubt_before_a_parting(18)).await;
}

/// The WAL of a server that writes it in pages of 64 KiB, over two timelines.
#[tokio::test(flavor = "multi_thread")]
async fn the_wal_of_large_pages_is_archived_and_replayed_to_every_kind_of_moment() {
    let mut world = World::new(LARGE_PAGES, 1).await;
    world.house.back_up().await;
    let mut first = Vec::new();
    for _ in 0..4 {
        first.push(world.step().await);
        // A record over many pages.
        world.house.sql("SELECT pg_logical_emit_message(true, 'large', repeat('w', 300000))").await;
    }
    world.archived().await;
    world.house.server.stop(StopMode::Fast).await.unwrap();

    let place = world.succeed("second", &["--to", &format!("name:{}", first[2].name)], 2).await;
    assert_eq!(world.rows, first[2].rows);
    let second = [world.step().await, world.step().await];
    world.archived().await;
    stop(LARGE_PAGES, &place, "fast").await;

    let xid = format!("xid:{}", first[0].xid);
    let cases: [(&[&str], &BTreeSet<i64>); 5] = [
        (&["latest"], &second[1].rows),
        (&[&second[0].time], &second[0].rows),
        (&[&first[1].lsn.to_string()], &first[1].rows),
        (&[&xid, "--before"], &first[0].rows_before),
        (&["latest", "--timeline", "1"], &first[3].rows),
    ];
    for (number, (arguments, rows)) in cases.into_iter().enumerate() {
        let words = [&["--to"], arguments].concat();
        let found = world.rows_at(&format!("case-{number}"), &words).await;
        assert_eq!(found, *rows, "{words:?}");
    }
}

/// From here on timelines have a letter in their names.
#[tokio::test(flavor = "multi_thread")]
async fn a_promotion_from_timeline_nine_to_ten_is_archived_and_recovered_along() {
    let mut world = World::new(15, 1).await;
    let archive = text(&world.url(), "SHOW archive_command").await;
    world.house.server.set(&[("archive_command", "true")]).unwrap();
    world.house.sql("SELECT pg_reload_conf()").await;
    world.house.server.stop(StopMode::Fast).await.unwrap();
    // As if it had been promoted eight times, and no backup of then were left.
    let reset = bin_dir(15).join("pg_resetwal");
    let data = world.house.server.data_directory();
    let words = ["-l", "000000090000000000000020", "-D"];
    let done = Command::new(reset).args(words).arg(&data).output().unwrap();
    assert!(done.status.success(), "{}", said(&done));
    let ancestor = |n| format!("{n}\t0/{n}00000\tno recovery target specified\n");
    let history: String = (1..=8).map(ancestor).collect();
    std::fs::write(data.join("pg_wal/00000009.history"), history).unwrap();
    std::fs::write(data.join("pg_wal/archive_status/00000009.history.ready"), "").unwrap();
    world.house.server.set(&[("archive_command", &archive)]).unwrap();
    world.house.server.start().await.unwrap();

    world.house.back_up().await;
    let ninth = [world.step().await, world.step().await];
    let place = world.lagging_standby("tenth").await;
    let left = world.step().await;
    world.archived().await;
    world.house.server.stop(StopMode::Fast).await.unwrap();
    start(15, &place).await;
    world.promote(10).await;
    assert_eq!(world.rows, ninth[1].rows);
    let tenth = [world.step().await, world.step().await];
    world.archived().await;
    stop(15, &place, "fast").await;

    let names = world.archived_names();
    for history in ["00000009.history", "0000000A.history"] {
        assert!(names.contains(history), "{names:?}");
    }
    for timeline in ["00000009", "0000000A"] {
        let is_segment = |name: &String| name.starts_with(timeline) && name.len() == 24;
        assert!(names.iter().any(is_segment), "{timeline}: {names:?}");
    }
    let (before, late) = (left.time.as_str(), tenth[0].time.as_str());
    let cases: [(&[&str], &BTreeSet<i64>); 4] = [
        (&["latest"], &tenth[1].rows),
        (&[late], &tenth[0].rows),
        (&["latest", "--timeline", "9"], &left.rows),
        (&[before, "--timeline", "10"], &ninth[1].rows),
    ];
    for (number, (arguments, rows)) in cases.into_iter().enumerate() {
        let words = [&["--to"], arguments].concat();
        let found = world.rows_at(&format!("case-{number}"), &words).await;
        assert_eq!(found, *rows, "{words:?}");
    }
    // And whoever takes its place goes on with the next letter.
    let place = world.succeed("eleventh", &["--to", "latest"], 11).await;
    assert_eq!(world.rows, tenth[1].rows);
    world.archived().await;
    stop(15, &place, "fast").await;
    assert!(world.archived_names().contains("0000000B.history"), "{:?}", world.archived_names());
}

/// A tablespace that came after the backup, on the host on which its server still runs. Segments have the usual size.
async fn beside_the_source(major: u32) {
    let mut world = World::new(major, 16).await;
    let backup = world.house.back_up().await.backup.to_string();
    let space = world.house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let files = || {
        let mut names: Vec<PathBuf> = Vec::new();
        let mut directories = vec![space.clone()];
        while let Some(directory) = directories.pop() {
            for entry in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
                let is_directory = entry.file_type().unwrap().is_dir();
                if is_directory { directories.push(entry.path()) } else { names.push(entry.path()) }
            }
        }
        names.sort();
        names
    };
    let before = world.step().await;
    world.house.sql(&format!("CREATE TABLESPACE extra LOCATION '{}'", space.display())).await;
    world
        .house
        .sql("CREATE TABLE public.elsewhere TABLESPACE extra AS SELECT * FROM public.ledger")
        .await;
    world.step().await;
    world.archived().await;
    let there = files();
    assert!(!there.is_empty());

    let into = world.house.place.path().join("beside");
    // Where the source listens no other can, which is told first.
    let taken = world.restore(&into, &["--to", "latest", "--start"]);
    assert_eq!(taken.status.code(), Some(5), "{}", said(&taken));
    assert!(said(&taken).contains("listen at port 5432") && !into.exists(), "{}", said(&taken));
    let refused = world.restore(&into, &["--to", "latest", "--start", "--port", "5433"]);
    let told = said(&refused);
    assert!(!refused.status.success() && told.contains("RECOVERY_TARGET_MISSED"), "{told}");
    assert!(told.contains("would remove the files"), "{told}");
    let before_it = told.split_once("restore … --to ").unwrap().1.split(' ').next().unwrap();
    assert!(!into.join("postmaster.pid").exists(), "it still runs");
    assert_eq!(files(), there);
    world.house.sql("CHECKPOINT").await;
    world.house.sql("SELECT * FROM public.elsewhere").await;

    // A copy that is started does not write into the archive of its source.
    let settings =
        |into: &Path| std::fs::read_to_string(into.join("postgresql.auto.conf")).unwrap();
    let (quiet, loud) =
        (world.house.place.path().join("quiet"), world.house.place.path().join("loud"));
    let done = world.restore(&quiet, &[]);
    assert!(said(&done).contains("archives nothing"), "{}", said(&done));
    assert!(settings(&quiet).contains("archive_mode = 'off'"));
    // On the timeline of its source it would write other WAL under the same names.
    let refused = world.restore(&loud, &["--keep-archiving"]);
    let told = said(&refused);
    assert_eq!(refused.status.code(), Some(2), "{told}");
    assert!(told.contains("timeline of its source") && told.contains("--to latest"), "{told}");
    assert!(!loud.exists(), "{told}");
    let done = world.restore(&loud, &["--to", "immediate", "--keep-archiving"]);
    assert!(!said(&done).contains("archives nothing"), "{}", said(&done));
    assert!(!settings(&loud).contains("archive_mode = 'off'"));
    assert!(loud.join("recovery.signal").exists(), "it opens on a timeline of its own");

    // A backup that has the tablespace puts it where that was asked for, or beside the directory, and what follows goes there.
    world.house.back_up().await;
    world.house.sql("INSERT INTO public.elsewhere VALUES (777)").await;
    world.archived().await;
    let sql = "SELECT oid::int8 FROM pg_tablespace WHERE spcname = 'extra'";
    let oid = world.house.number(sql).await;
    world.house.server.stop(StopMode::Fast).await.unwrap();
    let there = files();
    let kept = || files().iter().map(|file| std::fs::read(file).unwrap()).collect::<Vec<_>>();
    let content = kept();
    let into = world.house.place.path().join("moved");
    let own = world.house.place.path().join("own");
    let asked = format!("{oid}={}", own.display());
    let beside = world.house.place.path().join("moved-tablespaces").join(oid.to_string());
    for (words, at) in [(vec!["--tablespace", &asked], &own), (Vec::new(), &beside)] {
        let done = world.restore(&into, &[&["--to", "latest", "--start"][..], &words].concat());
        assert!(done.status.success(), "{words:?}: {}", said(&done));
        let location = format!("SELECT pg_tablespace_location({oid})");
        assert_eq!(Path::new(&text(&world.url(), &location).await), at);
        let sql = "SELECT count(*) FROM public.elsewhere WHERE id = 777";
        assert_eq!(number(&world.url(), sql).await, 1, "{words:?}");
        assert_eq!(world.rows_now().await, world.rows);
        stop(major, &into, "immediate").await;
        std::fs::remove_dir_all(&into).unwrap();
        assert!(files() == there && kept() == content, "{words:?}: the source's files changed");
    }

    // To a moment before that, in the same segment, it goes; and all the way once the place is free.
    let name = format!("name:{}", before.name);
    assert_eq!(world.rows_at("earlier", &["--to", &name]).await, before.rows);
    // A server stops at a time when it comes to the end of a transaction: to this one it would come behind the record.
    let late =
        world.restore(&world.house.place.path().join("late"), &["--to", &before.time, "--start"]);
    assert!(said(&late).contains("would remove the files"), "{}", said(&late));
    assert_eq!(world.rows_at("just", &["--to", before_it, "--before"]).await, before.rows);
    assert_eq!(files(), there);
    std::fs::rename(&space, world.house.place.path().join("kept")).unwrap();
    std::fs::create_dir(&space).unwrap();
    let words = ["--to", "latest", "--backup", &backup];
    assert_eq!(world.rows_at("later", &words).await, world.rows);
    assert!(!files().is_empty());
    let repository = world.house.reopened().await;
    let lineage = repository.list_lineages().await.unwrap()[0].lineage;
    let archive = repository.list_wal(lineage).await.unwrap();
    assert!(archive.timelines.values().all(|wal| wal.segment_size == 16 << 20), "{archive:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_beside_its_source_leaves_the_tablespaces_of_the_source_alone() {
    Box::pin(beside_the_source(15)).await;
}
