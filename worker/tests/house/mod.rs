//! A server with data, a repository beside it, and a worker's engine between them: what the tests of this crate share.

#![expect(dead_code, reason = "each test binary uses a part of this")]

pub(crate) mod dumps;

use std::fmt::Display;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions};
use postgres::{Environment, Purpose, Target, connect};
use proto::job::{self, BackupOutcome, RestoreOutcome};
use proto::message::Spec;
use proto::proof::CheckOutcome;
use proto::{AttemptId, Failure, JobId, Lsn, ProofLevel, Task};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Store, StoreError, Upload};
use repository::{Backup, Encryption, InitOptions, KeyFile, Repository, store};
use rustix::process::Signal;
use tempfile::TempDir;
use worker::config::{AssertionConfig, FilesConfig, WorkerConfig};
use worker::context::JobContext;
use worker::engines::native::{BackupRequest, back_up};
use worker::places::Places;
use worker::proving::{self, Workshop};
use worker::restoring::{self, Destination};

pub(crate) const NOW_MS: i64 = 1_790_000_000_000;

/// PostgreSQL for sizes of which there are no packages: `tests/large-pages` says which.
pub(crate) const LARGE_PAGES: &str = "LARGE_PAGES";

/// The programs of a major version, or of an unusual build.
pub(crate) fn bin_dir(build: impl Display) -> PathBuf {
    let name = format!("PGMUSTER_TEST_PG_BIN_{build}");
    #[expect(clippy::disallowed_methods, reason = "where the services of the suite are")]
    let dir = std::env::var(&name);
    dir.unwrap_or_else(|_| panic!("{name} is not set: run ./tests/run, which starts the services"))
        .into()
}

/// A question that nobody lives to hear the answer of.
pub(crate) const ENDLESS: &str =
    "SELECT count(*) = 0 FROM pg_class a, pg_class b, pg_class c, pg_class d, pg_class e";

/// The names of the assertions that do not hold.
pub(crate) fn unmet(proof: &proto::Proof) -> Vec<&str> {
    ended(proof, CheckOutcome::Failed)
}

/// The names of the assertions that could not be asked.
pub(crate) fn unasked(proof: &proto::Proof) -> Vec<&str> {
    ended(proof, CheckOutcome::Skipped)
}

fn ended(proof: &proto::Proof, outcome: CheckOutcome) -> Vec<&str> {
    let asked = proof.assertions.iter().flatten();
    let such = asked.filter(|assertion| assertion.outcome == outcome);
    such.map(|assertion| assertion.name.as_str()).collect()
}

/// A server with data, an empty repository, and everything a worker would have resolved.
pub(crate) struct House {
    pub(crate) place: TempDir,
    pub(crate) server: Instance,
    pub(crate) repository: Repository,
    pub(crate) key_file: String,
    pub(crate) config: WorkerConfig,
    pub(crate) places: Places,
    pub(crate) attempts: std::cell::Cell<u64>,
}

impl House {
    pub(crate) async fn new(build: impl Display, options: InstanceOptions) -> Self {
        let place = tempfile::tempdir().unwrap();
        let binaries = Binaries::at(&bin_dir(build)).await.unwrap();
        let mut server =
            Instance::create(&binaries, &place.path().join("pg"), options).await.unwrap();
        server.start().await.unwrap();
        let connection = server.url("postgres");
        Self::around(place, server, &connection).await
    }

    /// The same around a server that is there already; `connection` leads to what is to be backed up.
    pub(crate) async fn around(place: TempDir, server: Instance, connection: &str) -> Self {
        let url = format!("file://{}/repository", place.path().display());
        let store = store::open(&url, &store::Credentials::default()).await.unwrap();
        let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
        let created = Repository::init(store, options).await.unwrap();
        let key_file = created.key_file.unwrap().to_string();
        let config = format!(
            r#"
            name = "w1"
            site = "here"
            state_dir = "{place}/state"
            broker = {{ url = "file:/nowhere" }}
            sandbox = {{ directory = "{place}/sandbox", postgres_bin_dirs = ["{bin}"] }}
            backup = {{ processes = 2 }}
            [[clusters]]
            name = "orders"
            connection = "{connection}"
            "#,
            place = place.path().display(),
            bin = server.binaries().directory().display(),
        );
        let config: WorkerConfig = toml::from_str(&config).unwrap();
        let places = places_of(&config);
        Self {
            place,
            server,
            repository: created.repository,
            key_file,
            config,
            places,
            attempts: std::cell::Cell::new(0),
        }
    }

    /// Has another server of the same cluster backed up from now on.
    pub(crate) fn reconnect(&mut self, connection: &str) {
        connection.clone_into(&mut self.config.clusters[0].connection);
        self.places = places_of(&self.config);
    }

    /// Has the server's files read over connections, as from another host.
    pub(crate) fn read_over_connections(&mut self) {
        self.config.clusters[0].files = FilesConfig::Remote;
        self.places = places_of(&self.config);
    }

    /// Asserts this of the database `postgres` in proofs, each within a second.
    pub(crate) fn assert_of_postgres(&mut self, assertions: &[(&str, &str)]) {
        let asserted = assertions.iter().map(|(name, sql)| AssertionConfig {
            name: (*name).to_owned(),
            database: "postgres".parse().unwrap(),
            sql: (*sql).to_owned(),
            within_s: 1,
        });
        self.config.clusters[0].assertions = asserted.collect();
        assert_eq!(self.config.problems(), Vec::<String>::new());
    }

    pub(crate) fn read_locally(&mut self) {
        self.config.clusters[0].files = FilesConfig::Local;
        self.places = places_of(&self.config);
    }

    pub(crate) fn cx(&self) -> JobContext {
        let number = self.attempts.get() + 1;
        self.attempts.set(number);
        let random = [u8::try_from(number).unwrap(); 10];
        JobContext::new(
            Spec {
                schema: 1,
                job: JobId::mint(1_790_000_000_000 + number, random),
                attempt: AttemptId::mint(1_790_000_000_000 + number, random),
                predecessor: None,
                cluster: "orders".parse().unwrap(),
                system_identifier: None,
                task: Task::Backup(job::Backup { fast_checkpoint: true, ..job::Backup::default() }),
                deadline_ms: 600_000,
                traceparent: None,
            },
            Arc::new(|_| {}),
        )
    }

    pub(crate) async fn back_up_as(&self, cx: &JobContext) -> Result<BackupOutcome, Failure> {
        self.back_up_of(cx, job::Backup::default()).await
    }

    /// The same, with what an order asked for.
    pub(crate) async fn back_up_of(
        &self,
        cx: &JobContext,
        task: job::Backup,
    ) -> Result<BackupOutcome, Failure> {
        let task = job::Backup { fast_checkpoint: true, ..task };
        let request = BackupRequest {
            cluster: self.places.cluster(&"orders".parse().unwrap())?,
            repository: &self.repository,
            config: &self.config.backup,
            by: "w1",
            task: &task,
        };
        back_up(cx, request).await
    }

    pub(crate) async fn back_up(&self) -> BackupOutcome {
        self.back_up_as(&self.cx()).await.unwrap()
    }

    /// Opens the repository as a stranger would who has its key file and nothing else.
    pub(crate) async fn reopened(&self) -> Repository {
        let key: KeyFile = self.key_file.parse().unwrap();
        let url = format!("file://{}/repository", self.place.path().display());
        let store = store::open(&url, &store::Credentials::default()).await.unwrap();
        Repository::open(store, Some(&key)).await.unwrap()
    }

    /// Puts a store in front of the repository that takes packs only while its gate is open.
    pub(crate) async fn with_gate(&mut self) -> Arc<Gated> {
        let inner = DirectoryStore::new(self.place.path().join("repository"));
        let gated = Arc::new(Gated { inner, open: tokio::sync::watch::Sender::new(false) });
        let key: KeyFile = self.key_file.parse().unwrap();
        let as_store: Arc<dyn Store> = Arc::<Gated>::clone(&gated);
        self.repository = Repository::open(as_store, Some(&key)).await.unwrap();
        gated
    }

    /// Takes a backup, and has the server write `segments` segments of WAL once files are copied.
    pub(crate) async fn back_up_while_wal_is_written(
        &self,
        segments: u32,
    ) -> Result<BackupOutcome, Failure> {
        let cx = self.cx();
        let writing = async {
            copies(&cx).await;
            for _ in 0..segments {
                self.sql("INSERT INTO public.empty VALUES (1)").await;
                self.sql("SELECT pg_switch_wal()").await;
            }
        };
        let both = async { tokio::join!(self.back_up_as(&cx), writing).0 };
        let ended = tokio::time::timeout(Duration::from_mins(2), Box::pin(both)).await;
        ended.expect("the backup ends by itself")
    }

    pub(crate) async fn prove(&self, level: ProofLevel) -> proto::Proof {
        let repository = self.reopened().await;
        let backup = restoring::find(&repository, None, None, None).await.unwrap();
        self.prove_as(&self.cx(), &backup, level).await.unwrap()
    }

    /// Proves one backup; whatever comes of it, nothing is left of the sandbox.
    pub(crate) async fn prove_as(
        &self,
        cx: &JobContext,
        backup: &Backup,
        level: ProofLevel,
    ) -> Result<proto::Proof, Failure> {
        let sandbox = self.place.path().join("sandbox");
        let workshop = Workshop {
            worker: "w1".parse().unwrap(),
            directory: &sandbox,
            // Where these are of other sizes than the server's own, they are passed over.
            bin_dirs: vec![
                bin_dir(backup.facts().server_version_num / 10_000),
                self.server.binaries().directory().to_owned(),
            ],
            processes: 2,
            assertions: self.config.clusters[0].assertions(),
        };
        let proof = Box::pin(proving::prove(cx, &workshop, backup, level)).await;
        let left: Vec<_> = std::fs::read_dir(&sandbox)
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name.to_string_lossy().starts_with("pgmuster-proof"))
            .collect();
        assert!(left.is_empty(), "the sandbox left {left:?}");
        proof
    }

    /// Restores a backup with the repository and its key alone.
    pub(crate) async fn restore(&self, outcome: &BackupOutcome, directory: &Path) -> Destination {
        self.restore_and_tell(outcome, directory).await.0
    }

    /// The same, with what is told of it.
    pub(crate) async fn restore_and_tell(
        &self,
        outcome: &BackupOutcome,
        directory: &Path,
    ) -> (Destination, RestoreOutcome) {
        let repository = self.reopened().await;
        let backup = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
        let destination = Destination::below(directory, backup.facts());
        let done = restoring::restore(&self.cx(), &backup, &destination, 2).await.unwrap();
        (destination, done)
    }

    pub(crate) async fn sql(&self, statements: &str) {
        run_sql(&self.server.url("postgres"), statements).await;
    }

    pub(crate) async fn number(&self, query: &str) -> i64 {
        number(&self.server.url("postgres"), query).await
    }
}

fn places_of(config: &WorkerConfig) -> Places {
    let none = |_: &_| Err(Failure::bug("this configuration has no secrets"));
    Places::resolve(config, &Environment::default(), &none).unwrap()
}

/// A directory that takes packs only while its gate is open, as a store that has stopped answering does.
#[derive(Debug)]
pub(crate) struct Gated {
    inner: DirectoryStore,
    pub(crate) open: tokio::sync::watch::Sender<bool>,
}

impl Gated {
    async fn pass(&self, key: &str) {
        if key.contains("/packs/") {
            self.open.subscribe().wait_for(|open| *open).await.unwrap();
        }
    }
}

#[async_trait]
impl Layer for Gated {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.pass(key).await;
        self.inner.put(key, bytes).await
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.pass(key).await;
        self.inner.upload(key).await
    }
}

pub(crate) async fn session(url: &str) -> postgres::Session {
    let target = Target::parse(url, &Environment::default()).unwrap();
    let purpose = Purpose {
        application_name: "test".to_owned(),
        read_only: false,
        statement_timeout: Duration::ZERO,
        lock_timeout: Duration::ZERO,
    };
    connect(&target, &purpose).await.unwrap()
}

pub(crate) async fn run_sql(url: &str, statements: &str) {
    let session = session(url).await;
    session.run("prepare the test", statements).await.unwrap();
    session.close().await;
}

pub(crate) async fn number(url: &str, query: &str) -> i64 {
    let session = session(url).await;
    let row = session.one("look", query, &[]).await.unwrap();
    let number = row.get(0);
    session.close().await;
    number
}

pub(crate) const DATA: &str = "
    CREATE TABLE public.orders (id bigint PRIMARY KEY, note text);
    INSERT INTO public.orders SELECT g, md5(g::text) FROM generate_series(1, 50000) g;
    CREATE TABLE public.empty (id int);
    CREATE TABLE public.\"Odd \"\"name\"\"\" (x int);
    INSERT INTO public.\"Odd \"\"name\"\"\" VALUES (1), (2), (3);
    CREATE UNLOGGED TABLE public.fleeting AS SELECT g FROM generate_series(1, 1000) g;
";

pub(crate) fn leftovers() -> &'static str {
    "SELECT (SELECT count(*) FROM pg_replication_slots)
          + (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')
          + (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%')"
}

pub(crate) async fn nothing_is_left_on(house: &House) {
    nothing_is_left_at(&house.server.url("postgres")).await;
}

/// Neither on a primary nor on a standby.
pub(crate) async fn nothing_is_left_at(url: &str) {
    // Sessions end in their own time once their sockets are closed.
    let left = async || (number(url, leftovers()).await == 0).then_some(());
    eventually("no slot, lock or session of ours is on the server", Duration::from_secs(10), left)
        .await;
}

/// Looks until there is something, and fails when there is nothing within the bound.
pub(crate) async fn eventually<T>(
    what: &str,
    bound: Duration,
    check: impl AsyncFn() -> Option<T>,
) -> T {
    let looking = async {
        let mut looks = tokio::time::interval(Duration::from_millis(20));
        loop {
            looks.tick().await;
            if let Some(found) = check().await {
                return found;
            }
        }
    };
    let found = tokio::time::timeout(bound, looking).await;
    found.unwrap_or_else(|_| panic!("not so within {bound:?}: {what}"))
}

/// Resolves when the backup has begun to copy files.
pub(crate) async fn copies(cx: &JobContext) {
    while !cx.steps().iter().any(|step| step.name == "copy") {
        tokio::task::yield_now().await;
    }
}

/// A directory for the socket of a server: its path is short.
pub(crate) fn sockets() -> TempDir {
    tempfile::Builder::new().prefix("pgm").tempdir_in("/tmp").unwrap()
}

/// Starts a restored directory as an administrator would. The socket's directory lives as long as the server.
pub(crate) async fn start_plainly(
    directory: &Path,
    build: impl Display,
) -> ((postgres::process::Running, TempDir), String) {
    let sockets = sockets();
    let of_sockets = format!("unix_socket_directories={}", sockets.path().display());
    let directory = directory.to_str().unwrap();
    let arguments =
        ["-D", directory, "-c", &of_sockets, "-c", "listen_addresses=", "-c", "fsync=off"];
    let url = format!("postgres://postgres@/postgres?host={}", sockets.path().display());
    let log = sockets.path().join("log");
    let running = serve(build, &arguments.map(str::to_owned), &log, &url).await;
    ((running, sockets), url)
}

/// Starts a server and waits until it answers at `url`.
pub(crate) async fn serve(
    build: impl Display,
    arguments: &[String],
    log: &Path,
    url: &str,
) -> postgres::process::Running {
    let running = spawn(build, "postgres", arguments, log).await;
    let target = Target::parse(url, &Environment::default()).unwrap();
    let purpose = Purpose::ask(&JobId::mint(1, [1; 10]));
    let answers = async || connect(&target, &purpose).await.ok().map(drop);
    let what = format!("the server answers; its log is {}", log.display());
    eventually(&what, Duration::from_secs(30), answers).await;
    running
}

/// Starts a program of PostgreSQL that ends with the value returned.
pub(crate) async fn spawn(
    build: impl Display,
    program: &str,
    arguments: &[String],
    log: &Path,
) -> postgres::process::Running {
    let binaries = Binaries::at(&bin_dir(build)).await.unwrap();
    let log = std::fs::File::options().append(true).create(true).open(log).unwrap();
    binaries.program(program).unwrap().args(arguments).spawn(log).await.unwrap()
}

/// What must end by itself.
pub(crate) async fn within_limit<T>(work: impl Future<Output = T>) -> T {
    let ended = tokio::time::timeout(Duration::from_mins(2), Box::pin(work)).await;
    ended.expect("it ends by itself")
}

/// Runs a backup, and something else when it has begun to copy, while nobody asks how the backup goes: what it has given to
/// threads goes on, the rest waits.
pub(crate) async fn back_up_and_meanwhile(
    house: &House,
    meanwhile: impl Future<Output = ()>,
) -> Failure {
    let cx = house.cx();
    let mut backup = Box::pin(house.back_up_as(&cx));
    tokio::select! {
        ended = &mut backup => panic!("the backup ended before it copied: {ended:?}"),
        () = copies(&cx) => {}
    }
    meanwhile.await;
    backup.await.unwrap_err()
}

/// Makes a standby of `primary` in `directory` that streams from it, and starts it. It answers at the URL.
pub(crate) async fn standby_of(
    primary: &Instance,
    directory: &Path,
    settings: &[&str],
) -> ((postgres::process::Running, TempDir), String) {
    standby_at(&primary.url("postgres"), primary.binaries().major(), directory, settings).await
}

/// The same for any server.
pub(crate) async fn standby_at(
    upstream: &str,
    major: u32,
    directory: &Path,
    settings: &[&str],
) -> ((postgres::process::Running, TempDir), String) {
    copy_of(upstream, major, directory).await;
    std::fs::write(directory.join("standby.signal"), "").unwrap();
    let sockets = sockets();
    // A client library of the system may be older than the server, and know less than the server's own tool writes.
    let socket = text(upstream, "SELECT current_setting('unix_socket_directories')").await;
    let conninfo = format!("primary_conninfo=host={socket} user=postgres");
    let settings = [&[conninfo.as_str()], settings].concat();
    let arguments = standby_arguments(directory, sockets.path(), &settings);
    let url = format!("postgres://postgres@/postgres?host={}", sockets.path().display());
    let running = serve(major, &arguments, &sockets.path().join("log"), &url).await;
    ((running, sockets), url)
}

pub(crate) fn standby_arguments(
    directory: &Path,
    sockets: &Path,
    settings: &[&str],
) -> Vec<String> {
    let of_sockets = format!("unix_socket_directories={}", sockets.display());
    let mut arguments = vec!["-D".to_owned(), directory.to_str().unwrap().to_owned()];
    for setting in [&[of_sockets.as_str()], settings].concat() {
        arguments.extend(["-c".to_owned(), setting.to_owned()]);
    }
    arguments
}

/// A copy of a server by its own tool.
pub(crate) async fn copy_of(upstream: &str, major: u32, directory: &Path) {
    let program = Binaries::at(&bin_dir(major)).await.unwrap().program("pg_basebackup").unwrap();
    let program = program
        .args(["--checkpoint=fast", "--no-sync", "--pgdata"])
        .arg(directory)
        .args(["--dbname", upstream]);
    let cancel = tokio_util::sync::CancellationToken::new();
    program.run(Duration::from_mins(2), &cancel).await.unwrap();
}

/// Replays a data directory to the same record and no further, opens it, and shuts it down, so that everything is on disk.
/// Nobody connects: a query prunes pages.
pub(crate) async fn replay(directory: &Path, build: impl Display, end: Lsn, restore_command: &str) {
    std::fs::write(directory.join("recovery.signal"), "").unwrap();
    let (sockets, end) = (sockets(), format!("recovery_target_lsn={end}"));
    let command = format!("restore_command={restore_command}");
    let settings = [
        end.as_str(),
        command.as_str(),
        "recovery_target_inclusive=off",
        "recovery_target_action=promote",
        "recovery_target_timeline=current",
        "hot_standby=off",
        "autovacuum=off",
        "fsync=off",
    ];
    let log = sockets.path().join("log");
    let arguments = standby_arguments(directory, sockets.path(), &settings);
    let mut running = spawn(build, "postgres", &arguments, &log).await;
    let said = || std::fs::read_to_string(&log).unwrap();
    let open = async || {
        let text = said();
        assert!(!text.contains("FATAL") && !text.contains("PANIC"), "{text}");
        text.contains("ready to accept connections").then_some(())
    };
    eventually("the copy is replayed and open", Duration::from_mins(2), open).await;
    assert!(said().contains("recovery stopping before WAL location"), "{}", said());
    running.signal(Signal::INT).unwrap();
    running.wait().await.unwrap();
}

/// Waits until a standby has replayed what its primary has written by now.
pub(crate) async fn caught_up(primary: &str, standby: &str) {
    // A record of ours: the position of the last one may lie behind what was sent.
    let sql = "SELECT pg_logical_emit_message(true, 'test', 'here')::text";
    let written = text(primary, sql).await;
    let replayed = format!("SELECT (pg_last_wal_replay_lsn() >= '{written}')::int4::int8");
    let so_far = async || (number(standby, &replayed).await == 1).then_some(());
    eventually("the standby has replayed everything", Duration::from_mins(1), so_far).await;
}

pub(crate) async fn text(url: &str, query: &str) -> String {
    let session = session(url).await;
    let row = session.one("look", query, &[]).await.unwrap();
    let text = row.get(0);
    session.close().await;
    text
}
