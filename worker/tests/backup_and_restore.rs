//! The engine without a queue: a running server is backed up, restored with the repository and its key alone, booted,
//! and equal.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use postgres::scan::EXTERNAL_ROOT;
use postgres::{Environment, Purpose, Target, connect};
use proto::job::{Backup, BackupOutcome};
use proto::message::Spec;
use proto::{Action, AttemptId, Code, Failure, JobId, ProofLevel, Task};
use repository::store::directory::DirectoryStore;
use repository::store::{Listed, PutOutcome, Store, StoreError, Upload};
use repository::{Encryption, InitOptions, KeyFile, Outcome, Repository, store};
use tempfile::TempDir;
use worker::config::WorkerConfig;
use worker::context::JobContext;
use worker::engines::native::{BackupRequest, back_up};
use worker::places::Places;
use worker::proving::{self, Workshop};
use worker::restoring::{self, Destination};

const NOW_MS: i64 = 1_790_000_000_000;

fn bin_dir(major: u32) -> PathBuf {
    let name = format!("PGMUSTER_TEST_PG_BIN_{major}");
    #[expect(clippy::disallowed_methods, reason = "where the services of the suite are")]
    let dir = std::env::var(&name);
    dir.unwrap_or_else(|_| panic!("{name} is not set: run ./tests/run, which starts the services"))
        .into()
}

/// A server with data, an empty repository, and everything a worker would have resolved.
struct House {
    place: TempDir,
    server: Instance,
    repository: Repository,
    key_file: String,
    config: WorkerConfig,
    places: Places,
    attempts: std::cell::Cell<u64>,
}

impl House {
    async fn new(major: u32, options: InstanceOptions) -> Self {
        let place = tempfile::tempdir().unwrap();
        let binaries = Binaries::at(&bin_dir(major)).await.unwrap();
        let mut server =
            Instance::create(&binaries, &place.path().join("pg"), options).await.unwrap();
        server.start().await.unwrap();
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
            bin = bin_dir(major).display(),
            connection = server.url("postgres"),
        );
        let config: WorkerConfig = toml::from_str(&config).unwrap();
        let none = |_: &_| Err(Failure::bug("this configuration has no secrets"));
        let places = Places::resolve(&config, &Environment::default(), &none).unwrap();
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

    fn cx(&self) -> JobContext {
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
                task: Task::Backup(Backup { fast_checkpoint: true, ..Backup::default() }),
                deadline_ms: 600_000,
                traceparent: None,
            },
            Arc::new(|_| {}),
        )
    }

    async fn back_up_as(&self, cx: &JobContext) -> Result<BackupOutcome, Failure> {
        let task = Backup { fast_checkpoint: true, ..Backup::default() };
        let request = BackupRequest {
            cluster: self.places.cluster(&"orders".parse().unwrap())?,
            repository: &self.repository,
            config: &self.config.backup,
            by: "w1",
            task: &task,
        };
        back_up(cx, request).await
    }

    async fn back_up(&self) -> BackupOutcome {
        self.back_up_as(&self.cx()).await.unwrap()
    }

    /// Opens the repository as a stranger would who has its key file and nothing else.
    async fn reopened(&self) -> Repository {
        let key: KeyFile = self.key_file.parse().unwrap();
        let url = format!("file://{}/repository", self.place.path().display());
        let store = store::open(&url, &store::Credentials::default()).await.unwrap();
        Repository::open(store, Some(&key)).await.unwrap()
    }

    /// Puts a store in front of the repository that takes packs only while its gate is open.
    async fn with_gate(&mut self) -> Arc<Gated> {
        let inner = DirectoryStore::new(self.place.path().join("repository"));
        let gated = Arc::new(Gated { inner, open: tokio::sync::watch::Sender::new(false) });
        let key: KeyFile = self.key_file.parse().unwrap();
        let as_store: Arc<dyn Store> = Arc::<Gated>::clone(&gated);
        self.repository = Repository::open(as_store, Some(&key)).await.unwrap();
        gated
    }

    /// Takes a backup, and has the server write `segments` segments of WAL once files are copied.
    async fn back_up_while_wal_is_written(&self, segments: u32) -> Result<BackupOutcome, Failure> {
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

    async fn prove(&self, level: ProofLevel) -> proto::Proof {
        let repository = self.reopened().await;
        let backup = restoring::find(&repository, None, None, None).await.unwrap();
        let sandbox = self.place.path().join("sandbox");
        let workshop = Workshop {
            worker: "w1".parse().unwrap(),
            directory: &sandbox,
            bin_dirs: vec![bin_dir(backup.facts().server_version_num / 10_000)],
            processes: 2,
        };
        let proof = proving::prove(&self.cx(), &workshop, &backup, level).await.unwrap();
        let left: Vec<_> = std::fs::read_dir(&sandbox)
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .filter(|name| name.to_string_lossy().starts_with("pgmuster-proof"))
            .collect();
        assert!(left.is_empty(), "the sandbox left {left:?}");
        proof
    }

    async fn sql(&self, statements: &str) {
        run_sql(&self.server.url("postgres"), statements).await;
    }

    async fn number(&self, query: &str) -> i64 {
        number(&self.server.url("postgres"), query).await
    }
}

/// A directory that takes packs only while its gate is open, as a store that has stopped answering does.
#[derive(Debug)]
struct Gated {
    inner: DirectoryStore,
    open: tokio::sync::watch::Sender<bool>,
}

impl Gated {
    async fn pass(&self, key: &str) {
        if key.contains("/packs/") {
            self.open.subscribe().wait_for(|open| *open).await.unwrap();
        }
    }
}

#[async_trait]
impl Store for Gated {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.inner.get(key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.inner.size(key).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.pass(key).await;
        self.inner.put(key, bytes).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        self.inner.put_if_absent(key, bytes).await
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.pass(key).await;
        self.inner.upload(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.inner.list(prefix).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }
    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError> {
        self.inner.abort_uploads(keys).await
    }
}

async fn session(url: &str) -> postgres::Session {
    let target = Target::parse(url, &Environment::default()).unwrap();
    let purpose = Purpose {
        application_name: "test".to_owned(),
        read_only: false,
        statement_timeout: Duration::ZERO,
        lock_timeout: Duration::ZERO,
    };
    connect(&target, &purpose).await.unwrap()
}

async fn run_sql(url: &str, statements: &str) {
    let session = session(url).await;
    session.run("prepare the test", statements).await.unwrap();
    session.close().await;
}

async fn number(url: &str, query: &str) -> i64 {
    let session = session(url).await;
    let row = session.one("look", query, &[]).await.unwrap();
    let number = row.get(0);
    session.close().await;
    number
}

const DATA: &str = "
    CREATE TABLE public.orders (id bigint PRIMARY KEY, note text);
    INSERT INTO public.orders SELECT g, md5(g::text) FROM generate_series(1, 50000) g;
    CREATE TABLE public.empty (id int);
    CREATE TABLE public.\"Odd \"\"name\"\"\" (x int);
    INSERT INTO public.\"Odd \"\"name\"\"\" VALUES (1), (2), (3);
    CREATE UNLOGGED TABLE public.fleeting AS SELECT g FROM generate_series(1, 1000) g;
";

fn leftovers() -> &'static str {
    "SELECT (SELECT count(*) FROM pg_replication_slots)
          + (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')
          + (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%')"
}

async fn nothing_is_left_on(house: &House) {
    // Sessions end in their own time once their sockets are closed.
    let left = async || (house.number(leftovers()).await == 0).then_some(());
    eventually("no slot, lock or session of ours is on the server", Duration::from_secs(10), left)
        .await;
}

/// Looks until there is something, and fails when there is nothing within the bound.
async fn eventually<T>(what: &str, bound: Duration, check: impl AsyncFn() -> Option<T>) -> T {
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
async fn copies(cx: &JobContext) {
    while !cx.steps().iter().any(|step| step.name == "copy") {
        tokio::task::yield_now().await;
    }
}

async fn restores_and_is_proved(major: u32) {
    let house =
        House::new(major, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let outcome = house.back_up().await;
    assert_eq!(outcome.server_version_num / 10_000, major);
    assert!(outcome.stop_lsn > outcome.start_lsn);
    nothing_is_left_on(&house).await;

    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    assert_eq!(proof.level_reached, Some(ProofLevel::L5));
    assert!(proof.reached_lsn.unwrap() >= outcome.stop_lsn);
    assert!(proof.rows >= 50_003, "{proof:#?}");
    assert!(proof.tables_exact >= 3, "{proof:#?}");

    // The same by hand: the repository, its key, an empty directory, and a server.
    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap();
    assert!(directory.join("backup_label").exists());
    let url = start_plainly(&directory, major).await;
    assert_eq!(number(&url.1, "SELECT count(*) FROM public.orders").await, 50_000);
    assert_eq!(number(&url.1, "SELECT sum(x) FROM public.\"Odd \"\"name\"\"\"").await, 6);
    assert_eq!(number(&url.1, "SELECT count(*) FROM public.fleeting").await, 0);
}

/// Starts a restored directory as an administrator would.
async fn start_plainly(directory: &Path, major: u32) -> (postgres::process::Running, String) {
    let sockets = tempfile::Builder::new().prefix("pgm").tempdir_in("/tmp").unwrap().keep();
    let binaries = Binaries::at(&bin_dir(major)).await.unwrap();
    let arguments = [
        "-D".into(),
        directory.as_os_str().to_owned(),
        "-c".into(),
        format!("unix_socket_directories={}", sockets.display()).into(),
        "-c".into(),
        "listen_addresses=".into(),
        "-c".into(),
        "fsync=off".into(),
    ];
    let log = std::fs::File::create(sockets.join("log")).unwrap();
    let running = binaries.program("postgres").unwrap().args(arguments).spawn(log).await.unwrap();
    let url = format!("postgres://postgres@/postgres?host={}", sockets.display());
    let target = Target::parse(&url, &Environment::default()).unwrap();
    let purpose = Purpose::ask(&JobId::mint(1, [1; 10]));
    let answers = async || connect(&target, &purpose).await.ok().map(drop);
    eventually("the restored server answers", Duration::from_secs(30), answers).await;
    (running, url)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_15_restores_and_is_proved() {
    restores_and_is_proved(15).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_18_restores_and_is_proved() {
    restores_and_is_proved(18).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_backup_stores_what_changed_and_restores_alone() {
    // Autovacuum would change pages that nobody wrote to.
    let settings = vec![("autovacuum".to_owned(), "off".to_owned())];
    let options = InstanceOptions { fsync: false, settings, ..InstanceOptions::default() };
    let house = House::new(15, options).await;
    house.sql(DATA).await;
    // Whoever reads a row for the first time, as the census does, marks its page; vacuum has done so for all of them.
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    let first = house.back_up().await;
    house.sql("UPDATE public.orders SET note = 'x' WHERE id = 7").await;
    house.sql("CHECKPOINT").await;
    let second = house.back_up().await;
    assert_eq!(second.compared_with, Some(first.backup));
    assert!(
        second.stored_bytes * 4 < first.stored_bytes,
        "first {} second {}",
        first.stored_bytes,
        second.stored_bytes
    );
    let proof = house.prove(ProofLevel::L5).await;
    assert_eq!(proof.backup, second.backup);
    assert!(proof.passed, "{:#?}", proof.checks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_in_the_middle_fails_the_backup_and_nothing_is_committed() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let pid = house.server.pid().unwrap();
    let unplug = async {
        std::process::Command::new("kill").args(["-QUIT", &pid.to_string()]).status().unwrap();
    };
    let failure = Box::pin(back_up_and_meanwhile(&house, unplug)).await;
    assert!(
        matches!(failure.code, Code::BackupSessionLost | Code::ServerUnreachable),
        "{failure:?}"
    );
    house.server.stop(StopMode::Immediate).await.ok();
    house.server.start().await.unwrap();
    let repository = house.reopened().await;
    let lineages = repository.list_lineages().await.unwrap();
    assert!(repository.list_backups(lineages[0].lineage).await.unwrap().is_empty());
    nothing_is_left_on(&house).await;
    let next = house.back_up().await;
    assert_eq!(next.compared_with, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_backup_leaves_nothing_on_the_server_and_cannot_commit() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let cx = house.cx();
    let stop = cx.clone();
    let canceller = tokio::spawn(async move {
        copies(&stop).await;
        stop.stop(Failure::new(Code::Cancelled, Action::Abandon, "cancelled by the test"));
    });
    let failure = house.back_up_as(&cx).await.unwrap_err();
    canceller.await.unwrap();
    assert_eq!(failure.code, Code::Cancelled);
    nothing_is_left_on(&house).await;
    let repository = house.reopened().await;
    let lineage = repository.list_lineages().await.unwrap()[0].lineage;
    let attempts = repository.list_attempts(lineage).await.unwrap();
    assert_eq!(attempts.len(), 1);
    assert!(attempts[0].verdict.is_some() && attempts[0].backup().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_attempt_of_a_restore_waits_for_the_one_before() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.back_up().await;
    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, None).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    // The restore of the attempt before is still at it.
    std::fs::create_dir(&directory).unwrap();
    let before = std::fs::File::open(&directory).unwrap();
    before.lock().unwrap();

    let first = house.cx();
    let refused = restoring::restore(&first, &backup, &destination, 2).await.unwrap_err();
    assert_eq!(refused.code, Code::TargetNotEmpty, "{refused}");

    let spec = Spec { predecessor: Some(first.spec.attempt), ..(*house.cx().spec).clone() };
    let second = JobContext::new(spec, Arc::new(|_| {}));
    let restore = restoring::restore(&second, &backup, &destination, 2);
    tokio::pin!(restore);
    let waits = async {
        while second.current_progress().is_none_or(|now| !now.step.starts_with("wait")) {
            tokio::task::yield_now().await;
        }
    };
    tokio::select! {
        early = &mut restore => panic!("it ends while the other is there: {early:?}"),
        () = waits => {}
    }
    drop(before);
    restore.await.unwrap();
    assert!(directory.join("backup_label").exists());
}

/// The attempt has its ABORT, and the server nothing of it.
async fn was_given_up(house: &House, failure: &Failure) {
    assert_eq!((failure.code, failure.action), (Code::WalHeld, Action::Retry), "{failure:?}");
    nothing_is_left_on(house).await;
    let repository = house.reopened().await;
    let lineage = repository.list_lineages().await.unwrap()[0].lineage;
    let attempts = repository.list_attempts(lineage).await.unwrap();
    let verdict = attempts.last().unwrap().verdict.as_ref().unwrap();
    let Outcome::Abort { why } = &verdict.outcome else { panic!("{verdict:?}") };
    assert!(why.contains("WAL_HELD"), "{why}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_stands_still_does_not_make_the_server_keep_wal_without_bound() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.config.backup.wal_held_max_bytes = 96 << 20;
    let gated = house.with_gate().await;
    let failure = house.back_up_while_wal_is_written(8).await.unwrap_err();
    assert!(failure.message.contains("more than the 100663296"), "{failure}");
    was_given_up(&house, &failure).await;

    gated.open.send_replace(true);
    house.back_up().await;
    nothing_is_left_on(&house).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_ends_before_it_fills_the_disk_of_pg_wal() {
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    house.config.backup.wal_free_min_bytes = Some(u64::MAX);
    let gated = house.with_gate().await;
    gated.open.send_replace(true);
    house.back_up().await;

    gated.open.send_replace(false);
    let failure = house.back_up_while_wal_is_written(6).await.unwrap_err();
    assert!(failure.message.contains("that stay free"), "{failure}");
    was_given_up(&house, &failure).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_and_settings_outside_the_data_directory_come_back() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    let space = house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let data = house.server.data_directory();
    let hba = house.place.path().join("pg_hba.conf");
    std::fs::copy(data.join("pg_hba.conf"), &hba).unwrap();
    // As private keys are: its owner may only read it.
    std::fs::write(data.join("server.key"), "secret").unwrap();
    std::fs::set_permissions(data.join("server.key"), std::fs::Permissions::from_mode(0o400))
        .unwrap();
    // Included files are settings, too.
    let included = house.place.path().join("conf.d");
    std::fs::create_dir(&included).unwrap();
    std::fs::write(included.join("memory.conf"), "work_mem = '7MB'\n").unwrap();
    house.server.set(&[("include_dir", included.to_str().unwrap())]).unwrap();
    house.server.set(&[("hba_file", hba.to_str().unwrap())]).unwrap();
    house.server.restart().await.unwrap();
    house.sql(DATA).await;
    house.sql(&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", space.display())).await;
    house
        .sql("CREATE TABLE public.far TABLESPACE elsewhere AS SELECT g FROM generate_series(1, 20000) g")
        .await;
    let outcome = house.back_up().await;
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);

    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap();
    let (oid, place) = destination.tablespaces.first_key_value().unwrap();
    let link = std::fs::read_link(directory.join("pg_tblspc").join(oid.to_string())).unwrap();
    assert_eq!(link, *place, "the link leads to the copy and not to production");
    let kept = format!("{EXTERNAL_ROOT}{}", included.join("memory.conf").display());
    assert_eq!(std::fs::read_to_string(directory.join(kept)).unwrap(), "work_mem = '7MB'\n");
    let key = std::fs::metadata(directory.join("server.key")).unwrap();
    assert_eq!(key.permissions().mode() & 0o777, 0o400);
    let (_running, url) = start_plainly(&directory, 15).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.far").await, 20_000);
}

/// Runs a backup, and something else when it has begun to copy, while it waits.
async fn back_up_and_meanwhile(house: &House, meanwhile: impl Future<Output = ()>) -> Failure {
    let cx = house.cx();
    let mut backup = Box::pin(house.back_up_as(&cx));
    tokio::select! {
        ended = &mut backup => panic!("the backup ended before it copied: {ended:?}"),
        () = copies(&cx) => {}
    }
    meanwhile.await;
    backup.await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn tablespaces_that_come_or_vanish_in_the_middle_fail_the_backup() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let space = house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    let create = format!("CREATE TABLESPACE elsewhere LOCATION '{}'", space.display());
    let failure = Box::pin(back_up_and_meanwhile(&house, house.sql(&create))).await;
    assert_eq!((failure.code, failure.action), (Code::DataDirectoryShape, Action::Retry));
    nothing_is_left_on(&house).await;
    house.back_up().await;

    // As when its file system is unmounted: its files look dropped.
    let away = house.place.path().join("away");
    let unmount = async {
        std::fs::rename(&space, &away).unwrap();
        std::fs::create_dir(&space).unwrap();
    };
    let failure = Box::pin(back_up_and_meanwhile(&house, unmount)).await;
    assert_eq!(failure.code, Code::DataDirectoryShape, "{failure}");
    std::fs::remove_dir(&space).unwrap();
    std::fs::rename(&away, &space).unwrap();
    nothing_is_left_on(&house).await;
    let outcome = house.back_up().await;
    assert!(house.prove(ProofLevel::L5).await.passed, "{outcome:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_page_is_told_by_every_backup_until_it_is_gone() {
    use std::os::unix::fs::FileExt as _;
    let options = InstanceOptions { fsync: false, checksums: true, ..InstanceOptions::default() };
    let mut house = House::new(15, options).await;
    house.sql(DATA).await;
    let path = {
        let session = session(&house.server.url("postgres")).await;
        let row =
            session.one("look", "SELECT pg_relation_filepath('public.orders')", &[]).await.unwrap();
        row.get::<_, String>(0)
    };
    house.server.stop(StopMode::Fast).await.unwrap();
    let file = house.server.data_directory().join(&path);
    let file = std::fs::File::options().write(true).open(file).unwrap();
    file.write_all_at(b"rotten", 3 * 8192 + 5000).unwrap();
    house.server.start().await.unwrap();

    // By its times a file need not be read once the backup before has found it unchanged for more than two seconds.
    let changed_at_ms = || {
        let changed = file.metadata().unwrap().modified().unwrap();
        let since = changed.duration_since(std::time::UNIX_EPOCH).unwrap();
        i64::try_from(since.as_millis()).unwrap()
    };
    let until_it_need_not_be_read = async {
        let mut before: Option<(i64, i64)> = None;
        loop {
            let changed = changed_at_ms();
            let outcome = house.back_up().await;
            assert_eq!(outcome.bad_pages, 1);
            let repository = house.reopened().await;
            let found = restoring::find(&repository, None, None, Some(outcome.backup)).await;
            let found = found.unwrap();
            let bad = &found.facts().bad_pages;
            assert_eq!((bad.len(), &bad[0].path, bad[0].block), (1, &path, 3));
            let settled =
                before.is_some_and(|(then, started)| then == changed && started > then + 3_000);
            if settled && changed == changed_at_ms() {
                return;
            }
            before = Some((changed, outcome.started_at_ms));
        }
    };
    tokio::time::timeout(Duration::from_mins(1), Box::pin(until_it_need_not_be_read))
        .await
        .unwrap();

    house.sql("DROP TABLE public.orders; CHECKPOINT").await;
    assert_eq!(house.back_up().await.bad_pages, 0);
}

/// The packs of a lineage.
fn packs(house: &House, lineage: proto::LineageId) -> Vec<PathBuf> {
    let packs = house.place.path().join(format!("repository/lineages/{lineage}/packs"));
    let mut files: Vec<PathBuf> = Vec::new();
    let mut open = vec![packs];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { open.push(path) } else { files.push(path) }
        }
    }
    files
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_after_a_damaged_index_does_not_refer_to_it() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let first = house.back_up().await;
    for pack in packs(&house, first.lineage) {
        let mut bytes = std::fs::read(&pack).unwrap();
        // The type of a pack stands in its header; 2 is metadata.
        if bytes[9] == 2 {
            let middle = bytes.len() / 2;
            bytes[middle] ^= 1;
            std::fs::write(&pack, bytes).unwrap();
        }
    }
    let cx = house.cx();
    let second = house.back_up_as(&cx).await.unwrap();
    assert_eq!(second.compared_with, None, "what is damaged is stored again");
    let steps = cx.steps();
    let began = steps.iter().find(|step| step.name == "begin").unwrap();
    assert_eq!(began.figures["damaged_backups"], 1);
    let proof = house.prove(ProofLevel::L5).await;
    assert_eq!(proof.backup, second.backup);
    assert!(proof.passed, "{:#?}", proof.checks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_after_a_lost_pack_does_not_refer_to_it() {
    let house =
        House::new(15, InstanceOptions { fsync: false, ..InstanceOptions::default() }).await;
    house.sql(DATA).await;
    let first = house.back_up().await;
    let files = packs(&house, first.lineage);
    let largest = files.iter().max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    std::fs::remove_file(largest).unwrap();
    let second = house.back_up().await;
    assert_eq!(second.compared_with, None, "what is lost is stored again");
    let proof = house.prove(ProofLevel::L5).await;
    assert_eq!(proof.backup, second.backup);
    assert!(proof.passed, "{:#?}", proof.checks);
}

/// The largest file below a directory.
fn largest_below(directory: &Path) -> PathBuf {
    let mut largest = (0, PathBuf::new());
    let mut left = vec![directory.to_owned()];
    while let Some(place) = left.pop() {
        for entry in std::fs::read_dir(place).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                left.push(entry.path());
            } else {
                largest = largest.max((metadata.len(), entry.path()));
            }
        }
    }
    largest.1
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_restore_mends_what_a_stopped_server_left_and_keeps_away_from_everything_else() {
    use std::os::unix::fs::FileExt as _;
    // Nobody changes pages but this test.
    let settings = vec![("autovacuum".to_owned(), "off".to_owned())];
    let options = InstanceOptions { fsync: false, settings, ..InstanceOptions::default() };
    let house = House::new(15, options).await;
    house.sql(DATA).await;
    house
        .sql("CREATE TABLE public.still AS SELECT sha512(g::text::bytea) FROM generate_series(1, 60000) g")
        .await;
    let space = house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    house.sql(&format!("CREATE TABLESPACE elsewhere LOCATION '{}'", space.display())).await;
    house
        .sql("CREATE TABLE public.far TABLESPACE elsewhere AS SELECT g FROM generate_series(1, 20000) g")
        .await;
    house.sql("VACUUM (FREEZE)").await;
    house.back_up().await;
    let repository = house.reopened().await;
    let backup = restoring::find(&repository, None, None, None).await.unwrap();
    let directory = house.place.path().join("restored");
    let destination = Destination::below(&directory, backup.facts());
    let first = restoring::restore(&house.cx(), &backup, &destination, 2).await.unwrap();
    let delta = |at: &Path| Destination {
        delta: true,
        data_directory: at.to_owned(),
        ..destination.clone()
    };
    let restore = async |to: &Destination| {
        restoring::restore(&house.cx(), &backup, to, 2).await.map_err(|failure| {
            let plan = (failure.code, failure.to_string());
            assert_eq!(failure.action, Action::FixConfig, "{plan:?}");
            plan
        })
    };

    // Another directory with the same links: what they lead to is the first one's.
    let twin = house.place.path().join("twin");
    let copied = std::process::Command::new("cp").arg("-a").args([&directory, &twin]).status();
    assert!(copied.unwrap().success());
    let (mut running, url) = start_plainly(&directory, 15).await;
    run_sql(&url, "UPDATE public.orders SET note = 'changed' WHERE id <= 700").await;
    run_sql(&url, "CREATE TABLE public.later AS SELECT 1").await;
    run_sql(&url, "CHECKPOINT").await;
    let (code, message) = restore(&delta(&directory)).await.unwrap_err();
    assert_eq!(code, Code::TargetNotEmpty);
    assert!(message.contains("a server that runs there"), "{message}");
    // The same when its lock file was deleted.
    let pid_file = directory.join("postmaster.pid");
    std::fs::rename(&pid_file, house.place.path().join("pid")).unwrap();
    let (_, message) = restore(&delta(&directory)).await.unwrap_err();
    assert!(message.contains("a server that runs there"), "{message}");
    std::fs::rename(house.place.path().join("pid"), &pid_file).unwrap();
    let (_, message) = restore(&delta(&twin)).await.unwrap_err();
    assert!(message.contains("it is a tablespace of the server"), "{message}");
    assert_eq!(number(&url, "SELECT count(*) FROM public.far").await, 20_000, "it went on");

    // Killed, and then its files are damaged.
    running.kill();
    running.wait().await.unwrap();
    let cx = house.cx();
    let mut unplanned = delta(&directory);
    let plan = async || restoring::plan(&cx, &backup, &delta(&directory), 2).await.ok();
    eventually("the killed server's processes are gone", Duration::from_secs(30), plan).await;
    assert!(pid_file.exists(), "it had no time to remove it");
    let damaged = largest_below(&directory.join("base"));
    let file = std::fs::OpenOptions::new().write(true).open(&damaged).unwrap();
    file.write_all_at(&[0xEE; 5000], 8192 * 3).unwrap();
    std::fs::write(directory.join("base/junk"), "junk").unwrap();
    std::fs::remove_file(directory.join("pg_xact/0000")).unwrap();
    let (oid, place) = destination.tablespaces.first_key_value().unwrap();
    let far = std::fs::OpenOptions::new().write(true).open(largest_below(place)).unwrap();
    far.write_all_at(&[0xEE; 5000], 0).unwrap();

    // A tablespace of somebody else's is none of ours, whoever names it.
    let alien = house.place.path().join("alien");
    std::fs::create_dir(&alien).unwrap();
    std::fs::write(alien.join("theirs"), "precious").unwrap();
    unplanned.tablespaces.insert(*oid, alien.clone());
    let (_, message) = restore(&unplanned).await.unwrap_err();
    assert!(message.contains("does not lead to it"), "{message}");

    let plan = restoring::plan(&house.cx(), &backup, &delta(&directory), 2).await.unwrap();
    let junk = format!("remove {}, 4 bytes", directory.join("base/junk").display());
    assert!(plan.plan.contains(&junk), "{:#?}", plan.plan);
    assert!(directory.join("base/junk").exists(), "a plan touches nothing");
    let done = restore(&delta(&directory)).await.unwrap();
    assert_eq!((done.fetched_bytes, done.reused_bytes), (plan.fetched_bytes, plan.reused_bytes));
    assert!(done.fetched_bytes * 2 < first.fetched_bytes, "{done:#?} {first:#?}");
    assert!(!pid_file.exists() && !directory.join("base/junk").exists());
    let (_running, url) = start_plainly(&directory, 15).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders").await, 50_000);
    let later = "SELECT count(*) FROM pg_class WHERE relname = 'later'";
    assert_eq!(number(&url, later).await, 0);
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders WHERE note = 'changed'").await, 0);
    assert_eq!(number(&url, "SELECT count(*) FROM public.far").await, 20_000);
    assert_eq!(number(&url, "SELECT sum(x) FROM public.\"Odd \"\"name\"\"\"").await, 6);

    // Neither another cluster nor what is no data directory.
    let binaries = Binaries::at(&bin_dir(15)).await.unwrap();
    let other_place = house.place.path().join("other");
    let options = InstanceOptions { fsync: false, ..InstanceOptions::default() };
    let mut other = Instance::create(&binaries, &other_place, options).await.unwrap();
    let (code, message) = restore(&delta(&other.data_directory())).await.unwrap_err();
    assert_eq!(code, Code::SystemIdentifierMismatch, "{message}");
    let (_, message) = restore(&delta(&alien)).await.unwrap_err();
    assert!(message.contains("no data directory"), "{message}");
    assert_eq!(std::fs::read_dir(&alien).unwrap().count(), 1);

    // While a restore holds a directory, no server starts there.
    let lock = postgres::occupied::DirectoryLock::take(&other.data_directory()).unwrap();
    // Not as our own child: a server takes the number of its parent for a stale one.
    let mut server = std::process::Command::new("timeout");
    server.arg("30").arg(bin_dir(15).join("postgres")).arg("-D").arg(other.data_directory());
    let refused = server.output().unwrap();
    let refused = String::from_utf8_lossy(&refused.stderr);
    assert!(refused.contains("lock file \"postmaster.pid\" already exists"), "{refused}");
    drop(lock);
    other.start().await.unwrap();
}
