//! The catalog's suite: every case on SQLite and on PostgreSQL.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::Arc;

use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use proto::copies::{BackupCopy, CopiedBackup, Copies};
use proto::failure::{Action, Code, Failure};
use proto::job::{
    Analyze, Backup, BackupOutcome, JobState, Lane, LogicalOutcome, PgDump, Restore, RestoreTarget,
    Task,
};
use proto::message::{ClusterOffer, Holdings, WalAncestor, WalStanding};
use proto::proof::{BrokenWal, CheckOutcome, Proof, ProofCheck, ProofLevel};
use proto::step::{Progress, Step};
use proto::{
    AttemptId, BackupId, ClusterHeartbeat, Heartbeat, JobId, LineageId, Lsn, RepositoryId,
    SystemIdentifier, Timeline,
};
use secrecy::SecretString;
use sqlx::migrate::Migrator;
use tokio::sync::Semaphore;

use super::attempts::{self, Attempt, AttemptState};
use super::backups::{self, ProofRow, Shown, Worth};
use super::dialect::Dialect;
use super::jobs::{self, Job};
use super::workers::{self, Worker};
use super::{Catalog, clusters, events, heartbeats, leader, migrations, outbox, pool, row, steps};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::metrics::Metrics;
use crate::proofs;
use crate::settle::new_job;

/// Gives fresh, empty databases.
enum Server {
    Sqlite(tempfile::TempDir),
    Postgres { instance: Box<Instance>, _directory: tempfile::TempDir },
}

impl Server {
    fn sqlite() -> Self {
        Self::Sqlite(tempfile::tempdir().unwrap())
    }

    async fn postgres() -> Self {
        let bin = variable("PGMUSTER_TEST_PG_BIN_15");
        let binaries = Binaries::at(PathBuf::from(bin)).await.unwrap();
        let directory = tempfile::Builder::new().prefix("pgm").tempdir_in("/tmp").unwrap();
        let options =
            InstanceOptions { tcp_port: Some(0), fsync: false, ..InstanceOptions::default() };
        let mut instance =
            Instance::create(&binaries, &directory.path().join("c"), options).await.unwrap();
        instance.start().await.unwrap();
        let admin = catalog(&instance.url("postgres")).await;
        let mut db = admin.read().await.unwrap();
        sqlx::query("ALTER USER postgres PASSWORD 'p'").execute(&mut *db).await.unwrap();
        Self::Postgres { instance: Box::new(instance), _directory: directory }
    }

    /// The URL of a fresh database.
    async fn fresh(&self, name: &str) -> String {
        match self {
            Self::Sqlite(directory) => {
                format!("sqlite:{}/{name}.sqlite", directory.path().display())
            }
            Self::Postgres { instance, .. } => {
                let admin = catalog(&instance.url("postgres")).await;
                let mut db = admin.read().await.unwrap();
                sqlx::query(sqlx::AssertSqlSafe(format!("CREATE DATABASE {name}")))
                    .execute(&mut *db)
                    .await
                    .unwrap();
                instance.tcp_url("postgres", "p", name).unwrap()
            }
        }
    }

    async fn stop(self) {
        if let Self::Postgres { mut instance, .. } = self {
            instance.stop(StopMode::Fast).await.unwrap();
        }
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests are told where the services are by the environment"
)]
fn variable(name: &str) -> String {
    std::env::var(name).expect("run ./tests/run, which starts the services")
}

async fn catalog(url: &str) -> Catalog {
    Catalog::connect(&SecretString::from(url)).await.unwrap()
}

/// Every case, on a database of its own.
async fn every_case(server: Server) {
    macro_rules! cases {
        ($($case:ident),* $(,)?) => {$(
            let url = server.fresh(stringify!($case)).await;
            $case(&url).await;
        )*};
    }
    cases![
        a_catalog_is_opened_twice,
        a_newer_catalog_is_refused,
        one_leads_and_the_others_wait,
        a_stale_epoch_cannot_write,
        epochs_and_tokens_jump_ahead_of_an_old_copy,
        what_fails_leaves_nothing,
        every_column_of_a_job_comes_back,
        every_column_of_an_attempt_comes_back,
        one_attempt_of_a_class_runs,
        no_update_is_lost,
        steps_never_go_backwards,
        a_ticket_is_in_the_outbox_once,
        refusals_are_forgotten_by_worker,
        ready_jobs_come_oldest_first,
        the_last_restores_of_each_cluster_are_found,
        a_cluster_is_recovered_from_few_of_its_backups,
        proofs_are_judged_by_what_they_say,
        a_part_of_a_cluster_is_nothing_to_recover_it_from,
        a_catalog_of_before_is_brought_to_this_version_and_judged,
        what_an_older_coordinator_records_counts_when_it_is_judged,
        a_record_that_cannot_be_read_is_told_and_in_the_way_of_no_other,
        whose_backups_are_all_gone_is_asked_of_each_cluster,
        copies_of_a_backup_are_as_its_repository_said_last,
        heartbeats_are_kept_until_they_are_old_or_overwritten,
        heartbeats_are_held_against_where_their_server_and_its_archive_are,
    ];
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_sqlite() {
    every_case(Server::sqlite()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn on_postgres() {
    every_case(Server::postgres().await).await;
}

fn config() -> Config {
    serde_json::from_str(
        r#"{"signing_key": "file:/k", "catalog": {"url": "sqlite:/c"}, "broker": {"url": "memory"}}"#,
    )
    .unwrap()
}

fn job(task: Task, at_ms: i64) -> Job {
    new_job(&config(), "orders".parse().unwrap(), task, Lane::Urgent, "ann", at_ms)
}

fn backup() -> Task {
    Task::Backup(Backup::default())
}

fn attempt_of(job: &Job, state: AttemptState) -> Attempt {
    Attempt {
        id: crate::chance::attempt(5),
        job: job.id,
        cluster: job.cluster.clone(),
        kind: job.kind(),
        lane: job.lane,
        state,
        reason: None,
        predecessor: Some(crate::chance::attempt(4)),
        queue: "worker.w1.urgent".to_owned(),
        target_worker: Some("w1".parse().unwrap()),
        target_site: None,
        created_at_ms: 5,
        ticket_until_at_ms: 6,
        tickets_sent: 1,
        worker: None,
        boot: None,
        nonce: None,
        token: None,
        grant: None,
        granted_at_ms: None,
        lease_until_at_ms: None,
        listed_at_ms: None,
        progress: None,
        started_at_ms: None,
        ended_at_ms: None,
        suspect_at_ms: None,
        probe: None,
        probe_at_ms: None,
        failure: None,
    }
}

async fn insert(catalog: &Catalog, job: &Job) {
    catalog.transact("test", |tx| Box::pin(jobs::insert(tx, job))).await.unwrap();
}

async fn get(catalog: &Catalog, job: &Job) -> Job {
    let mut db = catalog.read().await.unwrap();
    jobs::get(&mut db, job.id).await.unwrap().unwrap()
}

async fn a_catalog_is_opened_twice(url: &str) {
    let first = catalog(url).await;
    let second = catalog(url).await;
    let wanted = job(backup(), 1);
    insert(&first, &wanted).await;
    assert_eq!(get(&second, &wanted).await.id, wanted.id);
}

async fn a_newer_catalog_is_refused(url: &str) {
    let first = catalog(url).await;
    first
        .transact("test", |tx| {
            Box::pin(async move {
                sqlx::query(
                    "-- a migration of a later version
                     INSERT INTO _sqlx_migrations
                     SELECT 9999, description, installed_on, success, checksum, execution_time FROM _sqlx_migrations LIMIT 1",
                )
                .execute(tx.db())
                .await?;
                Ok(())
            })
        })
        .await
        .unwrap();
    let refused = Catalog::connect(&SecretString::from(url)).await;
    assert!(matches!(refused, Err(Error::Migrate(_))), "{refused:?}");
}

async fn one_leads_and_the_others_wait(url: &str) {
    let (a, b) = (catalog(url).await, catalog(url).await);
    let first = a.elect("a", true, 1_000, 2_000).await.unwrap().unwrap();
    assert_eq!(b.elect("b", true, 1_999, 3_000).await.unwrap(), None, "a's time is not over");
    a.renew_leader(first, 3_000).await.unwrap();
    assert_eq!(b.elect("b", true, 2_500, 3_500).await.unwrap(), None, "a renewed");
    assert_eq!(
        a.elect("a", false, 2_500, 3_500).await.unwrap(),
        None,
        "the same name is not enough later"
    );
    let again = a.elect("a", true, 2_500, 3_500).await.unwrap().unwrap();
    assert!(again > first, "a restarted a takes its own row back, in a new epoch");
    let second = b.elect("b", true, 3_500, 4_500).await.unwrap().unwrap();
    assert!(second > again);
}

async fn a_stale_epoch_cannot_write(url: &str) {
    let (a, b) = (catalog(url).await, catalog(url).await);
    let old = a.elect("a", true, 1_000, 2_000).await.unwrap().unwrap();
    let new = b.elect("b", true, 2_000, 3_000).await.unwrap().unwrap();
    let wanted = job(backup(), 1);
    let wanted = &wanted;
    let written = a.lead(old, "test", |tx| Box::pin(jobs::insert(tx, wanted))).await;
    assert!(matches!(written, Err(Error::StaleEpoch { epoch }) if epoch == old), "{written:?}");
    assert!(a.renew_leader(old, 9_000).await.is_err());
    let mut db = a.read().await.unwrap();
    assert!(jobs::get(&mut db, wanted.id).await.unwrap().is_none());
    drop(db);
    b.lead(new, "test", |tx| Box::pin(jobs::insert(tx, wanted))).await.unwrap();
}

async fn epochs_and_tokens_jump_ahead_of_an_old_copy(url: &str) {
    let catalog = catalog(url).await;
    let epoch = catalog.elect("a", true, 1_790_000_000_000, 0).await.unwrap().unwrap();
    assert!(epoch >= 1_790_000_000_000);
    let token = |epoch| catalog.lead(epoch, "test", |tx| Box::pin(leader::next_token(tx)));
    let first = token(epoch).await.unwrap();
    assert!(first > 1_790_000_000_000);
    assert_eq!(token(epoch).await.unwrap(), first + 1);
    let next = catalog.elect("b", true, 1_790_000_000_000, 0).await.unwrap().unwrap();
    assert_eq!(next, epoch + 1, "and never repeat, even if the clock stands still");
    assert!(token(next).await.unwrap() > first + 1);
}

async fn what_fails_leaves_nothing(url: &str) {
    let catalog = catalog(url).await;
    let wanted = job(backup(), 1);
    let wanted = &wanted;
    let result: Result<()> = catalog
        .transact("test", |tx| {
            Box::pin(async move {
                jobs::insert(tx, wanted).await?;
                Err(Error::Refused(Failure::bug("no")))
            })
        })
        .await;
    assert!(matches!(result, Err(Error::Refused(_))));
    let twice = catalog
        .transact("test", |tx| {
            Box::pin(async move {
                jobs::insert(tx, wanted).await?;
                jobs::insert(tx, wanted).await
            })
        })
        .await;
    assert!(matches!(twice, Err(Error::Catalog { doing: "test", .. })), "{twice:?}");
    let mut db = catalog.read().await.unwrap();
    assert!(jobs::get(&mut db, wanted.id).await.unwrap().is_none());
    drop(db);
    insert(&catalog, wanted).await;
}

async fn every_column_of_a_job_comes_back(url: &str) {
    let catalog = catalog(url).await;
    let mut wanted = job(Task::Analyze(Analyze::default()), 1);
    insert(&catalog, &wanted).await;
    assert_eq!(format!("{:?}", get(&catalog, &wanted).await), format!("{wanted:?}"), "all absent");
    let mut full = job(backup(), 2);
    full.idempotency_key = Some("k".to_owned());
    full.request_digest = Some("d".to_owned());
    full.only_worker = Some("w1".parse().unwrap());
    full.not_after_at_ms = Some(i64::MAX);
    full.verify = Some(ProofLevel::L5);
    full.follows = Some(wanted.id);
    full.retry_of = Some(wanted.id);
    full.probe_of = Some(crate::chance::attempt(1));
    full.last_attempt = Some(crate::chance::attempt(2));
    full.requested_by = "o'brien \u{1f418}".to_owned();
    insert(&catalog, &full).await;
    assert_eq!(format!("{:?}", get(&catalog, &full).await), format!("{full:?}"), "inserted");
    wanted.state = JobState::Waiting;
    wanted.reason = Some("a 'reason'".to_owned());
    wanted.rather_not = Some("w2".parse().unwrap());
    wanted.refused = BTreeSet::from(["w1".parse().unwrap()]);
    wanted.not_before_at_ms = 77;
    wanted.attempts_used = 2;
    wanted.attempt = Some(crate::chance::attempt(3));
    wanted.last_attempt = Some(crate::chance::attempt(3));
    wanted.started_at_ms = Some(-1);
    wanted.ended_at_ms = Some(i64::MAX);
    wanted.cancel_asked_at_ms = Some(8);
    wanted.failure = Some(Failure::new(Code::WalMissing, Action::Retry, "m").with_hint("h"));
    wanted.outcome = Some(proto::Outcome::Analyze(proto::job::AnalyzeOutcome::default()));
    let row = &wanted;
    catalog.transact("test", |tx| Box::pin(jobs::update(tx, row))).await.unwrap();
    wanted.version += 1;
    assert_eq!(format!("{:?}", get(&catalog, &wanted).await), format!("{wanted:?}"), "updated");
}

async fn every_column_of_an_attempt_comes_back(url: &str) {
    let catalog = catalog(url).await;
    let parent = job(backup(), 1);
    let mut wanted = attempt_of(&parent, AttemptState::Ticketed);
    let read = async |id| {
        let mut db = catalog.read().await.unwrap();
        attempts::get(&mut db, id).await.unwrap().unwrap()
    };
    let row = &wanted;
    catalog.transact("test", |tx| Box::pin(attempts::insert(tx, row))).await.unwrap();
    assert_eq!(format!("{:?}", read(wanted.id).await), format!("{wanted:?}"), "all absent");
    wanted.state = AttemptState::Suspect;
    wanted.reason = Some("r".to_owned());
    wanted.tickets_sent = 2;
    wanted.worker = Some("w1".parse().unwrap());
    wanted.boot = Some(proto::BootId::mint(1, [1; 10]));
    wanted.nonce = Some("n".to_owned());
    wanted.token = Some(1 << 60);
    wanted.grant = Some("{}".to_owned());
    wanted.granted_at_ms = Some(1);
    wanted.lease_until_at_ms = Some(2);
    wanted.listed_at_ms = Some(3);
    wanted.progress =
        Some(Progress { step: "copy".to_owned(), done: 1, total: None, unit: "bytes".to_owned() });
    wanted.started_at_ms = Some(4);
    wanted.ended_at_ms = Some(5);
    wanted.suspect_at_ms = Some(6);
    wanted.probe = Some(parent.id);
    wanted.probe_at_ms = Some(7);
    wanted.failure = Some(Failure::bug("m"));
    let row = &wanted;
    catalog.transact("test", |tx| Box::pin(attempts::update(tx, row))).await.unwrap();
    assert_eq!(format!("{:?}", read(wanted.id).await), format!("{wanted:?}"), "all there");
}

async fn one_attempt_of_a_class_runs(url: &str) {
    let catalog = catalog(url).await;
    let parent = job(backup(), 1);
    let put = async |attempt: &Attempt| {
        catalog.transact("test", |tx| Box::pin(attempts::insert(tx, attempt))).await
    };
    put(&attempt_of(&parent, AttemptState::Running)).await.unwrap();
    assert!(
        put(&attempt_of(&parent, AttemptState::Suspect)).await.is_err(),
        "a second of its class"
    );
    put(&attempt_of(&parent, AttemptState::Ticketed)).await.unwrap();
    let other = job(Task::Analyze(Analyze::default()), 1);
    put(&attempt_of(&other, AttemptState::Running)).await.unwrap();
}

async fn no_update_is_lost(url: &str) {
    let (a, b) = (catalog(url).await, catalog(url).await);
    let wanted = job(backup(), 1);
    insert(&a, &wanted).await;
    let id = wanted.id;
    let bump = |catalog: Catalog| {
        tokio::spawn(async move {
            for _ in 0..20 {
                catalog
                    .transact("test", |tx| {
                        Box::pin(async move {
                            let mut row = jobs::get(tx.db(), id).await?.unwrap();
                            row.attempts_used += 1;
                            jobs::update(tx, &row).await
                        })
                    })
                    .await
                    .unwrap();
            }
        })
    };
    let (one, two) = (bump(a.clone()), bump(b.clone()));
    one.await.unwrap();
    two.await.unwrap();
    assert_eq!(get(&a, &wanted).await.attempts_used, 40);
}

async fn steps_never_go_backwards(url: &str) {
    let catalog = catalog(url).await;
    let attempt = crate::chance::attempt(1);
    let step = |ended_at_ms| Step {
        number: 1,
        name: "copy".to_owned(),
        span_id: "00f067aa0ba902b7".to_owned(),
        started_at_ms: 1,
        ended_at_ms,
        failed: false,
        figures: [("files".to_owned(), 3)].into(),
    };
    let (begun, ended) = (&step(None), &step(Some(9)));
    let put = async |seq, step| {
        catalog.transact("test", |tx| Box::pin(steps::put(tx, attempt, seq, step))).await
    };
    put(2, begun).await.unwrap();
    put(5, ended).await.unwrap();
    put(2, begun).await.unwrap();
    put(5, begun).await.unwrap();
    let mut db = catalog.read().await.unwrap();
    assert_eq!(steps::of_attempt(&mut db, attempt).await.unwrap(), [step(Some(9))]);
}

async fn a_ticket_is_in_the_outbox_once(url: &str) {
    let catalog = catalog(url).await;
    let ticket = |urgent, submitted_at_ms| outbox::Outgoing {
        attempt: crate::chance::attempt(submitted_at_ms),
        routing_key: "site.fra1.urgent".to_owned(),
        body: "{}".to_owned(),
        traceparent: "t".to_owned(),
        urgent,
        submitted_at_ms,
    };
    let (routine, urgent) = (&ticket(false, 1), &ticket(true, 2));
    for one in [routine, routine, urgent] {
        catalog.transact("test", |tx| Box::pin(outbox::put(tx, one))).await.unwrap();
    }
    let pending = async || {
        let mut db = catalog.read().await.unwrap();
        outbox::pending(&mut db, 10)
            .await
            .unwrap()
            .into_iter()
            .map(|t| t.attempt)
            .collect::<Vec<_>>()
    };
    assert_eq!(pending().await, [urgent.attempt, routine.attempt], "urgent first");
    catalog.transact("test", |tx| Box::pin(outbox::remove(tx, urgent.attempt))).await.unwrap();
    assert_eq!(pending().await, [routine.attempt]);
}

async fn refusals_are_forgotten_by_worker(url: &str) {
    let catalog = catalog(url).await;
    let mut wanted = job(backup(), 1);
    wanted.refused = ["w1", "w12"].into_iter().map(|name| name.parse().unwrap()).collect();
    insert(&catalog, &wanted).await;
    let name = "w1".parse().unwrap();
    let name = &name;
    catalog.transact("test", |tx| Box::pin(jobs::forget_refusals(tx, name))).await.unwrap();
    assert_eq!(get(&catalog, &wanted).await.refused, BTreeSet::from(["w12".parse().unwrap()]));
}

async fn ready_jobs_come_oldest_first(url: &str) {
    let catalog = catalog(url).await;
    let (first, second, mut later) = (job(backup(), 1), job(backup(), 2), job(backup(), 3));
    later.not_before_at_ms = 100;
    for one in [&second, &later, &first] {
        insert(&catalog, one).await;
    }
    let mut db = catalog.read().await.unwrap();
    let ready: Vec<_> = jobs::ready(&mut db, Lane::Urgent, false, 50)
        .await
        .unwrap()
        .into_iter()
        .map(|j| j.id)
        .collect();
    assert_eq!(ready, [first.id, second.id]);
    assert!(jobs::ready(&mut db, Lane::Routine, false, 50).await.unwrap().is_empty());
    assert_eq!(jobs::next_due(&mut db, 50).await.unwrap(), Some(100));
    assert_eq!(jobs::next_due(&mut db, 100).await.unwrap(), None);
}

/// Those that succeeded and wrote files: no plan, and none of an attempt that was lost.
async fn the_last_restores_of_each_cluster_are_found(url: &str) {
    use AttemptState::{Lost, Succeeded};
    let catalog = catalog(url).await;
    let put = async |cluster: &str, n: i64, state: AttemptState, step: &str| {
        let target =
            RestoreTarget { root: "/restore".to_owned(), directory: "orders".parse().unwrap() };
        let task = Task::Restore(Restore::at(target));
        let cluster = cluster.parse().unwrap();
        let mut job = new_job(&config(), cluster, task, Lane::Urgent, "ann", n);
        job.state = JobState::Succeeded;
        let step = Step {
            number: 1,
            name: step.to_owned(),
            span_id: "00f067aa0ba902b7".to_owned(),
            started_at_ms: 1_000,
            ended_at_ms: Some(1_000 + n),
            failed: false,
            figures: BTreeMap::new(),
        };
        let (job, attempt, step) = (&job, &attempt_of(&job, state), &step);
        let written = catalog.transact("test", |tx| {
            Box::pin(async move {
                jobs::insert(tx, job).await?;
                attempts::insert(tx, attempt).await?;
                steps::put(tx, attempt.id, 1, step).await
            })
        });
        written.await.unwrap();
    };
    for n in 1..=10 {
        put("orders", n * 10, Succeeded, "restore").await;
    }
    put("bills", 55, Succeeded, "restore").await;
    put("orders", 200, Succeeded, "plan").await;
    put("orders", 210, Lost, "restore").await;
    let mut db = catalog.read().await.unwrap();
    let mut took = async |cluster: &str| -> Vec<i64> {
        let restored = jobs::restored(&mut db, cluster).await.unwrap();
        restored.iter().map(|restored| restored.restore_ms).collect()
    };
    assert_eq!(took("").await, [100, 90, 80, 70, 60, 55, 50, 40, 30], "not all of the past");
    assert_eq!(took("bills").await, [55]);
}

fn backup_row(n: u8, at_ms: i64) -> backups::Backup {
    let (attempt, lineage) = (AttemptId::mint(1, [n; 10]), LineageId::mint(1, [1; 10]));
    let outcome = BackupOutcome {
        backup: attempt.into(),
        lineage,
        repository: "file:///backups".to_owned(),
        system_identifier: SystemIdentifier(42),
        server_version_num: 150_018,
        timeline: Timeline(1),
        start_lsn: Lsn(1),
        stop_lsn: Lsn(2),
        wal_to: None,
        started_at_ms: at_ms - 1,
        stopped_at_ms: at_ms,
        holds_to_ms: None,
        ended_at_ms: None,
        files: 10,
        size_bytes: 1_000,
        read_bytes: 1_000,
        stored_bytes: 100,
        taken_over_bytes: 0,
        reread_bytes: 0,
        reread_by_ms: None,
        wal_bytes: 16,
        bad_pages: 0,
        silent_changes: None,
        forbidden: None,
        compared_with: None,
        changed_files: None,
        logical: None,
    };
    backups::Backup {
        id: attempt.into(),
        job: JobId::mint(1, [n; 10]),
        cluster: "orders".parse().unwrap(),
        worker: "w1".parse().unwrap(),
        outcome,
        shown: Shown::None,
        worth: Worth::Whole,
        gone_at_ms: None,
        copies: Vec::new(),
    }
}

fn proof_row(n: u8, at_ms: i64, passed: bool) -> ProofRow {
    let level_reached = Some(if passed { ProofLevel::L5 } else { ProofLevel::L1 });
    let outcome = if passed { CheckOutcome::Passed } else { CheckOutcome::Failed };
    let check = |name: &str| ProofCheck {
        name: name.to_owned(),
        level: ProofLevel::L4,
        outcome,
        detail: r#"quoted: "level_reached":"L5","passed":true"#.to_owned(),
    };
    let (lineage, worker) = (LineageId::mint(1, [1; 10]), "w1".parse().unwrap());
    let (backup, cluster) = (AttemptId::mint(1, [n; 10]).into(), "orders".parse().unwrap());
    let level = ProofLevel::L5;
    let proof = Proof {
        at_ms,
        level_reached,
        passed,
        size_bytes: 1,
        checks: vec![check("tables_readable")],
        ..Proof::of(backup, lineage, cluster, SystemIdentifier(42), worker, level)
    };
    let at = u64::try_from(at_ms).unwrap();
    ProofRow { id: AttemptId::mint(at, [n; 10]), job: JobId::mint(1, [n; 10]), proof }
}

async fn register(catalog: &Catalog, name: &str) {
    let offer = &ClusterOffer {
        name: name.parse().unwrap(),
        labels: BTreeMap::new(),
        repository: Some("main".to_owned()),
        system_identifier: Some(SystemIdentifier(42)),
        server_version_num: None,
        files: true,
        remote: false,
        problem: None,
        archive: None,
        repository_away: None,
        repository_look: None,
        heartbeat: None,
        assertions: false,
        reads_little: None,
    };
    let (worker, site) = (&"w1".parse().unwrap(), &"fra1".parse().unwrap());
    catalog
        .transact("test", |tx| Box::pin(clusters::announce(tx, offer, None, worker, site, 1)))
        .await
        .unwrap();
}

/// All of a day, one an hour after that; and none that its server wrote over.
async fn heartbeats_are_kept_until_they_are_old_or_overwritten(url: &str) {
    const MINUTE_MS: i64 = 60_000;
    let catalog = catalog(url).await;
    let (orders, system) = ("orders".parse().unwrap(), SystemIdentifier(u64::MAX - 1));
    let told = |n: u64, at_ms: i64| ClusterHeartbeat {
        cluster: "orders".parse().unwrap(),
        heartbeat: Heartbeat {
            system_identifier: system,
            timeline: Timeline(1),
            transaction: 700 + n,
            begun_lsn: Lsn(n * 100),
            ended_lsn: Lsn(n * 100 + 50),
            begun_at_ms: at_ms,
            ended_at_ms: at_ms + 1,
        },
    };
    let hear = async |told: &[(ClusterHeartbeat, i64)]| {
        let told = told.to_vec();
        let told = &told;
        let heard = catalog.transact("test", move |tx| {
            Box::pin(async move {
                for (told, now_ms) in told {
                    heartbeats::hear(tx, &[told], *now_ms).await?;
                }
                Ok(())
            })
        });
        heard.await.unwrap();
    };
    let known = async || {
        let mut db = catalog.read().await.unwrap();
        let known = heartbeats::of(&mut db, &orders, system).await.unwrap();
        let known: Vec<Heartbeat> = known.iter().map(|known| known.heartbeat).collect();
        let newest = heartbeats::newest(&mut db, &orders).await.unwrap();
        assert_eq!(newest.as_ref(), known.last());
        known
    };
    // Every ten minutes for 30 hours, and the last one twice.
    let at = |n: i64| (told(n.unsigned_abs(), n * 10 * MINUTE_MS), n * 10 * MINUTE_MS);
    let all: Vec<_> = (1..=180).map(at).chain([at(180)]).collect();
    hear(&all).await;
    let kept: Vec<u64> = known().await.iter().map(|one| one.transaction - 700).collect();
    let hourly = [1, 6, 12, 18, 24, 30];
    assert_eq!(kept[..6], hourly, "the first of each hour");
    assert_eq!(kept[6..], (36..=180).collect::<Vec<u64>>()[..], "all of the last day");

    // Its disks were set back by three hours: what it wrote since is written over.
    let now_ms = 181 * 10 * MINUTE_MS;
    let again = told(162, now_ms);
    hear(&[(again.clone(), now_ms)]).await;
    let kept = known().await;
    assert_eq!(kept.last(), Some(&again.heartbeat));
    assert_eq!(kept[kept.len() - 2].transaction, 861);
    let mut db = catalog.read().await.unwrap();
    let others = heartbeats::of(&mut db, &orders, SystemIdentifier(1)).await.unwrap();
    assert!(others.is_empty(), "of another server");
    drop(db);

    // They were set back by an hour once more, and by now it has written more than it had: what it gave a higher number before is
    // not there any more.
    let later_ms = now_ms + MINUTE_MS;
    let mut after = told(163, later_ms);
    after.heartbeat.transaction = 860;
    hear(&[(after.clone(), later_ms)]).await;
    let numbers: Vec<u64> = known().await.iter().map(|one| one.transaction).collect();
    assert_eq!(numbers[numbers.len() - 2..], [859, 860]);
}

/// What an archive was seen to have is remembered, and what a server does not have any more is not.
async fn heartbeats_are_held_against_where_their_server_and_its_archive_are(url: &str) {
    let catalog = catalog(url).await;
    let (orders, system) = ("orders".parse().unwrap(), SystemIdentifier(u64::MAX - 1));
    let lineage = |n: u8| LineageId::mint(1, [n; 10]);
    // Each is heard at its position; the last one of timeline 1 is behind where it was left.
    let all = [(1, 100), (1, 300), (1, 450), (2, 500), (2, 600), (2, 700)];
    let told = all.map(|(timeline, at)| ClusterHeartbeat {
        cluster: "orders".parse().unwrap(),
        heartbeat: Heartbeat {
            system_identifier: system,
            timeline: Timeline(timeline),
            transaction: at,
            begun_lsn: Lsn(at - 10),
            ended_lsn: Lsn(at),
            begun_at_ms: 1,
            ended_at_ms: 1,
        },
    });
    let told = &told;
    let heard = catalog.transact("test", |tx| {
        Box::pin(async move {
            for told in told {
                let at_ms = i64::try_from(told.heartbeat.transaction).unwrap();
                heartbeats::hear(tx, &[told], at_ms).await?;
            }
            Ok(())
        })
    });
    heard.await.unwrap();
    let wal = |at_ms: i64, server: u64, archived_to: u64| WalStanding {
        cluster: "orders".parse().unwrap(),
        lineage: lineage(1),
        at_ms,
        timeline: Timeline(2),
        ancestors: vec![WalAncestor { timeline: Timeline(1), left_at: Lsn(400) }],
        server_lsn: Lsn(server),
        line_from: Lsn(200),
        archived_to: Lsn(archived_to),
        safe_at_ms: None,
        waiting: None,
        gap: None,
        gaps: Vec::new(),
        conflict: None,
    };
    // Those that are left, and whether each is known to have been archived in the first lineage.
    let after = async |wal: WalStanding| -> Vec<(u64, bool)> {
        let wal = &wal;
        let stood = catalog
            .transact("test", move |tx| Box::pin(heartbeats::stand(tx, system, wal, wal.at_ms)));
        stood.await.unwrap();
        let mut db = catalog.read().await.unwrap();
        let known = heartbeats::of(&mut db, &orders, system).await.unwrap();
        let is_archived = |known: &policy::heartbeats::Known| match known.archived_in {
            Some(archived_in) => {
                assert_eq!(archived_in, lineage(1));
                true
            }
            None => false,
        };
        known.iter().map(|known| (known.heartbeat.transaction, is_archived(known))).collect()
    };
    let nothing = |(_, at)| (at, false);
    let foreign = wal(1_000, 900, 901);
    assert_eq!(after(foreign).await, all.map(nothing), "it has what the server did not write");
    let marked = |archived: &'static [u64], left: usize| {
        all[..left].iter().map(|(_, at)| (*at, archived.contains(at))).collect::<Vec<_>>()
    };
    let seen = after(wal(1_000, 900, 599)).await;
    assert_eq!(seen, marked(&[300, 500], 6), "on the way, and behind where its line begins");
    assert_eq!(after(wal(1_000, 900, 600)).await, marked(&[300, 500, 600], 6));
    // It has lost its end, and another repository is used.
    assert_eq!(after(wal(1_000, 900, 300)).await, marked(&[300, 500, 600], 6));
    let elsewhere = WalStanding { lineage: lineage(2), ..wal(1_000, 900, 650) };
    assert_eq!(after(elsewhere).await, marked(&[300, 500, 600], 6));
    // The server is seen behind heartbeats: those that were heard since may have been made since.
    assert_eq!(after(wal(600, 550, 500)).await, marked(&[300, 500, 600], 6));
    assert_eq!(after(wal(700, 550, 500)).await.len(), 5);
    assert_eq!(after(wal(1_000, 550, 500)).await, marked(&[300, 500], 4));
}

/// Takes in a backup for each number, and the proofs.
async fn record(catalog: &Catalog, backups: std::ops::RangeInclusive<u8>, rows: &[ProofRow]) {
    let cluster = &"orders".parse().unwrap();
    catalog
        .transact("test", |tx| {
            let numbers = backups.clone();
            Box::pin(async move {
                for n in numbers {
                    backups::put(tx, &backup_row(n, i64::from(n) * 10), 1).await?;
                }
                for row in rows {
                    proofs::take_in(tx, row, cluster, 1).await?;
                }
                Ok(())
            })
        })
        .await
        .unwrap();
}

async fn sources(catalog: &Catalog) -> Vec<(i64, Shown)> {
    let mut db = catalog.read().await.unwrap();
    let sources = backups::sources(&mut db, "").await.unwrap();
    sources.iter().map(|row| (row.outcome.stopped_at_ms, row.shown)).collect()
}

/// The newest that nobody proved, and the newest three that are proved; none that is bad.
async fn a_cluster_is_recovered_from_few_of_its_backups(url: &str) {
    let catalog = catalog(url).await;
    for name in ["bills", "orders"] {
        register(&catalog, name).await;
    }
    let mut rows: Vec<ProofRow> = (1..=4).map(|n| proof_row(n, 100, true)).collect();
    rows.extend([proof_row(7, 100, true), proof_row(7, 200, false), proof_row(5, 200, false)]);
    record(&catalog, 1..=7, &rows).await;
    let wanted = [(60, Shown::None), (40, Shown::Proved), (30, Shown::Proved), (20, Shown::Proved)];
    assert_eq!(sources(&catalog).await, wanted);
    let mut db = catalog.read().await.unwrap();
    let told = backups::newest_proofs(&mut db, "").await.unwrap();
    let told: Vec<i64> = told.iter().map(|row| row.proof.at_ms).collect();
    assert_eq!(told, [200, 100, 100, 100, 100], "of the newest, and of three that are proved");
    assert!(backups::sources(&mut db, "bills").await.unwrap().is_empty());
    assert!(backups::newest_proofs(&mut db, "bills").await.unwrap().is_empty());
    assert_eq!(backups::newest(&mut db, "orders").await.unwrap()[0].outcome.stopped_at_ms, 70);
    drop(db);

    // The same comes of a catalog that an earlier program wrote.
    for text in [
        "UPDATE backups SET shown = 'unjudged', worth = 0, judged = 0",
        "UPDATE proofs SET tells = 1",
    ] {
        write(&catalog, text).await;
    }
    assert!(sources(&catalog).await.is_empty());
    catalog.close().await;
    let catalog = self::catalog(url).await;
    assert_eq!(sources(&catalog).await, wanted);
}

async fn write(catalog: &Catalog, text: &str) {
    catalog
        .transact("test", |tx| {
            let text = text.to_owned();
            Box::pin(async move {
                sqlx::query(sqlx::AssertSqlSafe(text)).execute(tx.db()).await?;
                Ok(())
            })
        })
        .await
        .unwrap();
}

/// One that fell short because it could not look says what it reached, also where an earlier program recorded it; and a look at
/// objects lifts no failure, however many come after it.
async fn proofs_are_judged_by_what_they_say(url: &str) {
    let catalog = catalog(url).await;
    register(&catalog, "orders").await;
    let mut short = proof_row(1, 100, false);
    short.proof.level_reached = Some(ProofLevel::L4);
    short.proof.checks[0].outcome = CheckOutcome::Skipped;
    let mut rows = vec![short, proof_row(2, 100, true), proof_row(2, 200, false)];
    for at_ms in 300..370 {
        let mut looked = proof_row(2, at_ms, true);
        (looked.proof.level_asked, looked.proof.level_reached) =
            (ProofLevel::L1, Some(ProofLevel::L1));
        rows.push(looked);
    }
    record(&catalog, 1..=2, &rows).await;
    let wanted = [(10, Shown::Proved)];
    assert_eq!(sources(&catalog).await, wanted);
    let mut db = catalog.read().await.unwrap();
    let told = backups::newest_proofs(&mut db, "").await.unwrap();
    let told: Vec<i64> = told.iter().map(|row| row.proof.at_ms).collect();
    assert_eq!(told, [369, 200, 100, 100], "however many were made");
    drop(db);
    write(&catalog, "UPDATE backups SET shown = 'unjudged', judged = 0").await;
    catalog.close().await;
    let catalog = self::catalog(url).await;
    assert_eq!(sources(&catalog).await, wanted);
}

/// A dump that leaves something out is no backup of the cluster, and stands behind every other.
async fn a_part_of_a_cluster_is_nothing_to_recover_it_from(url: &str) {
    let catalog = catalog(url).await;
    register(&catalog, "orders").await;
    let dump = |n: u8, left_out, scope: PgDump| {
        let mut row = backup_row(n, i64::from(n) * 10);
        row.outcome.logical = Some(LogicalOutcome {
            client_version_num: 150_018,
            databases: 1,
            role_passwords: true,
            left_out,
            skipped: Vec::new(),
            failed: Vec::new(),
        });
        let task = Task::Backup(Backup { pg_dump: Some(scope), ..Backup::default() });
        row.worth = Worth::of(&row.outcome, Some(&task));
        row
    };
    let some = || PgDump { databases: vec!["shop".parse().unwrap()], exclude: Vec::new() };
    let all = PgDump::default;
    let rows = [
        dump(1, Some(0), all()),
        dump(2, Some(3), some()),
        // A worker of before did not say.
        dump(3, None, all()),
        dump(4, None, some()),
        // It leaves out what nobody may connect to.
        dump(5, Some(1), all()),
    ];
    let worths: Vec<Worth> = rows.iter().map(|row| row.worth).collect();
    assert_eq!(worths, [Worth::Dump, Worth::Part, Worth::Dump, Worth::Part, Worth::Part]);
    for parts in [&rows[3..], &rows[..]] {
        catalog
            .transact("test", |tx| {
                Box::pin(async move {
                    for row in parts {
                        backups::put(tx, row, 1).await?;
                    }
                    Ok(())
                })
            })
            .await
            .unwrap();
        let mut db = catalog.read().await.unwrap();
        let newest = backups::newest(&mut db, "").await.unwrap();
        let is_whole = parts.len() > 2;
        assert_eq!(newest[0].outcome.stopped_at_ms, if is_whole { 30 } else { 50 });
        let dumps = backups::newest_dumps(&mut db, "").await.unwrap();
        let dumps: Vec<_> = dumps.iter().map(|dump| dump.outcome.stopped_at_ms).collect();
        assert_eq!(dumps, [50], "whatever it leaves out");
        drop(db);
        let wanted = is_whole.then_some((30, Shown::None));
        assert_eq!(sources(&catalog).await, wanted.into_iter().collect::<Vec<_>>());
    }
}

/// The last migration of a program that did not say what a backup is worth.
const BEFORE: i64 = 7;

/// Records a backup as that program did.
async fn put_as_before(catalog: &Catalog, row: &backups::Backup) {
    catalog
        .transact("test", |tx| {
            Box::pin(async move {
                sqlx::query(
                    "INSERT INTO backups (id, job, cluster, worker, stopped_at_ms, recorded_at_ms, outcome, kind)
                     VALUES ($1, $2, $3, $4, $5, $6, $7, $8)",
                )
                .bind(row.id.to_string())
                .bind(row.job.to_string())
                .bind(row.cluster.as_str())
                .bind(row.worker.as_str())
                .bind(row.outcome.stopped_at_ms)
                .bind(row.outcome.stopped_at_ms)
                .bind(row::json(&row.outcome))
                .bind(row.outcome.kind().as_str())
                .execute(tx.db())
                .await?;
                Ok(())
            })
        })
        .await
        .unwrap();
}

/// Records a proof as that program did.
async fn put_proof_as_before(catalog: &Catalog, row: &ProofRow) {
    catalog
        .transact("test", |tx| {
            Box::pin(async move {
                sqlx::query(
                    "INSERT INTO proofs (id, job, backup, cluster, at_ms, recorded_at_ms, record)
                     VALUES ($1, $2, $3, 'orders', $4, $4, $5)",
                )
                .bind(row.id.to_string())
                .bind(row.job.to_string())
                .bind(row.proof.backup.to_string())
                .bind(row.proof.at_ms)
                .bind(row::json(&row.proof))
                .execute(tx.db())
                .await?;
                Ok(())
            })
        })
        .await
        .unwrap();
}

/// A catalog as that program left it.
async fn catalog_of_before(url: &str) -> Catalog {
    if let Some(path) = url.strip_prefix("sqlite:") {
        std::fs::File::create(path).unwrap();
    }
    sqlx::any::install_default_drivers();
    let dialect = Dialect::of_url(url).unwrap();
    let pool = pool(dialect, &SecretString::from(url), 1).await.unwrap();
    let all = migrations();
    let before = all.iter().filter(|migration| migration.version <= BEFORE).cloned();
    Migrator::with_migrations(before.collect()).run(&pool).await.unwrap();
    let (readers, turn) = (pool.clone(), Arc::new(Semaphore::new(1)));
    Catalog { dialect, readers, writer: pool, turn, metrics: Metrics::new() }
}

async fn a_catalog_of_before_is_brought_to_this_version_and_judged(url: &str) {
    let before = catalog_of_before(url).await;
    write(&before, "INSERT INTO clusters (name, registered_at_ms, labels, paused) VALUES ('orders', 1, '{}', 0)").await;
    // The newest is a dump of one database.
    let some = PgDump { databases: vec!["shop".parse().unwrap()], exclude: Vec::new() };
    let order = job(Task::Backup(Backup { pg_dump: Some(some), ..Backup::default() }), 1);
    insert(&before, &order).await;
    let mut dump = backup_row(4, 40);
    dump.job = order.id;
    dump.outcome.logical = Some(LogicalOutcome {
        client_version_num: 150_018,
        databases: 1,
        role_passwords: true,
        left_out: None,
        skipped: Vec::new(),
        failed: Vec::new(),
    });
    for row in [backup_row(1, 10), backup_row(2, 20), backup_row(3, 30), dump] {
        put_as_before(&before, &row).await;
    }
    for row in [proof_row(1, 100, true), proof_row(2, 100, true), proof_row(2, 200, false)] {
        put_proof_as_before(&before, &row).await;
    }
    before.close().await;

    let catalog = catalog(url).await;
    assert_eq!(sources(&catalog).await, [(30, Shown::None), (10, Shown::Proved)]);
    let mut db = catalog.read().await.unwrap();
    let newest = backups::newest(&mut db, "").await.unwrap();
    assert_eq!((newest[0].outcome.stopped_at_ms, newest[0].worth), (30, Worth::Whole));
    let all = backups::list(&mut db, "", 10).await.unwrap();
    let judged: Vec<_> = all.iter().map(|row| (row.worth, row.shown)).collect();
    let wanted = [
        (Worth::Part, Shown::None),
        (Worth::Whole, Shown::None),
        (Worth::Whole, Shown::Bad),
        (Worth::Whole, Shown::Proved),
    ];
    assert_eq!(judged, wanted);
}

/// An older coordinator leads while this one waits: it records a backup and a proof, and judges in its own way.
async fn what_an_older_coordinator_records_counts_when_it_is_judged(url: &str) {
    let catalog = catalog(url).await;
    register(&catalog, "orders").await;
    record(&catalog, 1..=1, &[proof_row(1, 100, true)]).await;
    put_as_before(&catalog, &backup_row(2, 20)).await;
    let mut on_wal = proof_row(1, 200, false);
    on_wal.proof.broken_wal = Some(BrokenWal {
        target: "the end of the WAL".to_owned(),
        timeline: Timeline(1),
        from: Lsn(5),
        to: Lsn(6),
    });
    put_proof_as_before(&catalog, &on_wal).await;
    write(&catalog, "UPDATE backups SET shown = 'bad' WHERE stopped_at_ms = 10").await;
    assert!(sources(&catalog).await.is_empty(), "what nobody judged is nothing to recover from");
    for _ in 0..2 {
        proofs::judge_former(&catalog).await.unwrap();
        assert_eq!(sources(&catalog).await, [(20, Shown::None), (10, Shown::Proved)]);
        let mut db = catalog.read().await.unwrap();
        let cluster = clusters::get(&mut db, &"orders".parse().unwrap()).await.unwrap().unwrap();
        let broken: Vec<(Lsn, Lsn)> =
            cluster.broken_wal.iter().map(|stretch| (stretch.from, stretch.to)).collect();
        assert_eq!(broken, [(Lsn(5), Lsn(6))]);
    }
}

async fn a_record_that_cannot_be_read_is_told_and_in_the_way_of_no_other(url: &str) {
    let catalog = catalog(url).await;
    register(&catalog, "orders").await;
    for n in 1..=5 {
        put_as_before(&catalog, &backup_row(n, i64::from(n) * 10)).await;
    }
    // The third has two proofs, of which one cannot be read: what that says of it nobody knows.
    let proofs = [(1, 100), (3, 100), (3, 200), (4, 300), (5, 400)];
    let proofs = proofs.map(|(n, at_ms)| proof_row(n, at_ms, true));
    for row in &proofs {
        put_proof_as_before(&catalog, row).await;
    }
    let (backup, unread) = (backup_row(2, 20).id, proofs[1].id);
    for text in [
        format!("UPDATE backups SET outcome = '{{\"backup\":' WHERE id = '{backup}'"),
        format!("UPDATE proofs SET record = '' WHERE id = '{unread}'"),
    ] {
        write(&catalog, &text).await;
    }
    catalog.close().await;

    let catalog = self::catalog(url).await;
    let wanted = [(50, Shown::Proved), (40, Shown::Proved), (10, Shown::Proved)];
    for _ in 0..2 {
        assert_eq!(sources(&catalog).await, wanted);
        let left_out = proofs::judge_readable(&catalog).await.unwrap();
        let ids: Vec<&str> = left_out.iter().map(|(id, _)| id.as_str()).collect();
        let third = backup_row(3, 30).id.to_string();
        let (backup, unread, later) =
            (backup.to_string(), unread.to_string(), proofs[2].id.to_string());
        assert_eq!(ids, [&backup, &third, &unread, &later]);
        let told: Vec<String> = left_out.iter().map(|(_, why)| why.to_string()).collect();
        let says =
            |column: &str, row: &str| format!("read column {column} of {row} in the catalog");
        let why = says("record", &unread);
        assert_eq!(told, [says("outcome", &backup), why.clone(), why.clone(), why]);
    }
}

async fn copies_of_a_backup_are_as_its_repository_said_last(url: &str) {
    let catalog = catalog(url).await;
    register(&catalog, "orders").await;
    record(&catalog, 1..=2, &[]).await;
    let [first, second] = [1, 2].map(|n| backup_row(n, 1).id);
    let copies = |place: &str, of: &[BackupId], checked_at_ms| {
        let copied = |backup| CopiedBackup { backup, copied_at_ms: 5, checked_at_ms };
        let (place, by) = (place.to_owned(), "ops@desk".to_owned());
        let backups = of.iter().copied().map(copied).collect();
        Copies { place, repository: RepositoryId::mint(1, [1; 10]), by, backups }
    };
    let hold = async |repository: &str, copies: Option<Vec<Copies>>| {
        let there = vec![first, second];
        let (cluster, server) = ("orders".parse().unwrap(), SystemIdentifier(42));
        let holdings = Holdings::new(cluster, repository.to_owned(), server, 1, there);
        let holdings = copies.into_iter().fold(holdings, Holdings::with_copies);
        let told = &holdings;
        catalog.transact("test", |tx| Box::pin(super::copies::told(tx, told))).await.unwrap();
        let mut db = catalog.read().await.unwrap();
        let mut rows = backups::list(&mut db, "orders", 10).await.unwrap();
        rows.reverse();
        let of = |row: &backups::Backup| -> Vec<(String, i64, String)> {
            let copy =
                |copy: &BackupCopy| (copy.place.clone(), copy.checked_at_ms, copy.told_by.clone());
            row.copies.iter().map(copy).collect()
        };
        [of(&rows[0]), of(&rows[1])]
    };
    let says = |place: &str, at_ms, by: &str| (place.to_owned(), at_ms, by.to_owned());
    let (a, b) = ("s3://a", "s3://b");
    assert_eq!(hold(a, None).await, [vec![], vec![]]);
    let word = vec![copies(b, &[first, second], 10), copies("s3://c", &[second], 11)];
    let known = [vec![says(b, 10, a)], vec![says(b, 10, a), says("s3://c", 11, a)]];
    assert_eq!(hold(a, Some(word)).await, known);
    assert_eq!(hold(a, None).await, known, "an earlier version tells of none");
    // A worker serves the copy, and that knows of the first as a copy.
    let both = hold(b, Some(vec![copies(a, &[first], 12)])).await;
    assert_eq!(both, [vec![says(b, 10, a), says(a, 12, b)], known[1].clone()]);
    // One was given up there, the other was looked after again.
    let left = hold(a, Some(vec![copies(b, &[second], 20)])).await;
    assert_eq!(left, [vec![says(a, 12, b)], vec![says(b, 20, a)]]);
}

/// PostgreSQL must not read all backups to say of a cluster whether it has any.
async fn whose_backups_are_all_gone_is_asked_of_each_cluster(url: &str) {
    let catalog = catalog(url).await;
    for name in ["bills", "orders"] {
        register(&catalog, name).await;
    }
    record(&catalog, 1..=2, &[]).await;
    let robbed = async |of: &str| {
        let mut db = catalog.read().await.unwrap();
        let robbed = backups::robbed(&mut db, of).await.unwrap();
        robbed.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    write(&catalog, "UPDATE backups SET gone_at_ms = 50 WHERE stopped_at_ms = 20").await;
    assert!(robbed("").await.is_empty(), "one is left");
    write(&catalog, "UPDATE backups SET gone_at_ms = 50").await;
    assert_eq!(robbed("").await, ["orders"], "the other had none");
    assert_eq!(robbed("orders").await, ["orders"]);
    assert!(robbed("bills").await.is_empty());
    if Dialect::of_url(url) == Some(Dialect::Postgres) {
        let text = backups::text_of_robbed();
        let (_, query) = text.split_once('\n').unwrap();
        let plan = sqlx::query(sqlx::AssertSqlSafe(format!("EXPLAIN {query}"))).bind("");
        let mut db = catalog.read().await.unwrap();
        let rows = plan.fetch_all(&mut *db).await.unwrap().into_iter();
        let plan: Vec<String> = rows.map(|row| row::Row(row).text("QUERY PLAN").unwrap()).collect();
        assert!(!plan.iter().any(|step| step.contains("Join")), "{plan:#?}");
    }
}

/// Whatever a look at the fleet reads of its backups is the end of an index.
#[tokio::test]
async fn no_look_at_the_fleet_goes_through_all_backups() {
    let server = Server::sqlite();
    let catalog = catalog(&server.fresh("plans").await).await;
    let mut db = catalog.read().await.unwrap();
    let texts = [
        backups::text_of_sources(),
        backups::text_of_proofs(),
        backups::text_of_robbed(),
        backups::text_of_dumps(),
    ];
    for text in texts {
        let (_, query) = text.split_once('\n').unwrap();
        let plan = format!("EXPLAIN QUERY PLAN {query}");
        let rows = sqlx::query(sqlx::AssertSqlSafe(plan)).bind("").fetch_all(&mut *db).await;
        let steps: Vec<String> =
            rows.unwrap().into_iter().map(|row| row::Row(row).text("detail").unwrap()).collect();
        let scans: Vec<&String> = steps.iter().filter(|step| step.starts_with("SCAN ")).collect();
        let few = |step: &&&String| {
            step.starts_with("SCAN c ") || **step == "SCAN c" || step.contains("looked_at")
        };
        assert_eq!(scans.iter().filter(few).count(), scans.len(), "{steps:#?}");
        // What is looked for in an index is more than whether a backup is gone.
        let ends = steps.iter().filter(|step| step.starts_with("SEARCH ")).all(|step| {
            ["(cluster=?", "(id=?", "(backup=?", "(name=?"].iter().any(|by| step.contains(by))
        });
        assert!(ends, "{steps:#?}");
    }
}

#[tokio::test]
async fn the_file_of_a_catalog_is_its_owners_alone() {
    use std::os::unix::fs::PermissionsExt;

    let Server::Sqlite(directory) = Server::sqlite() else { panic!() };
    let path = directory.path().join("c.sqlite");
    let opened = catalog(&format!("sqlite:{}", path.display())).await;
    insert(&opened, &job(backup(), 1)).await;
    for suffix in ["", "-wal", "-shm"] {
        let file = format!("{}{suffix}", path.display());
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600, "{file}");
    }
}

#[tokio::test]
async fn a_url_of_another_database_is_refused() {
    for url in ["mysql://h/d", "/var/lib/catalog", ""] {
        let refused = Catalog::connect(&SecretString::from(url)).await;
        assert!(matches!(refused, Err(Error::CatalogUrl)), "{url}: {refused:?}");
    }
}

/// Events and workers are read back by the API's tests; here only that odd text survives.
#[tokio::test]
async fn odd_text_survives() {
    let server = Server::sqlite();
    let catalog = catalog(&server.fresh("odd").await).await;
    let event = events::Event {
        at_ms: 1,
        name: "n".to_owned(),
        message: "a'b\"c; DROP TABLE jobs; -- \u{0}\u{202e}".replace('\0', ""),
        ..events::Event::default()
    };
    let row = &event;
    catalog.transact("test", |tx| Box::pin(events::add(tx, row))).await.unwrap();
    let mut db = catalog.read().await.unwrap();
    assert_eq!(events::list(&mut db, 1).await.unwrap()[0].message, event.message);
}

mod lives {
    //! The life of a worker's row: which pulse counts.

    use proto::BootId;
    use proto::envelope::{Certificate, SigningKey};
    use proto::message::{Pulse, Slots};

    use super::{Worker, workers::Life};

    fn certificate(seed: u8, issued_at_ms: i64) -> Certificate {
        Certificate {
            worker: "w1".parse().unwrap(),
            site: "fra1".parse().unwrap(),
            key: SigningKey::from_seed(&[seed; 32]).public(),
            issued_at_ms,
        }
    }

    fn pulse(boot: u8, seq: u64) -> Pulse {
        Pulse {
            schema: 1,
            worker: "w1".parse().unwrap(),
            site: "fra1".parse().unwrap(),
            boot: BootId::mint(u64::from(boot), [boot; 10]),
            seq,
            at_ms: 0,
            every_ms: 1_000,
            slots: Slots { urgent_free: 1, routine_free: 1 },
            draining: false,
            running: Vec::new(),
            offers: None,
            wal: Vec::new(),
            holdings: Vec::new(),
            heartbeats: Vec::new(),
        }
    }

    #[test]
    fn a_late_pulse_of_a_former_boot_is_not_a_new_life() {
        use Life::{New, Past, Same};

        let mut worker = Worker::of_certificate(&certificate(1, 1));
        let lives: Vec<Life> = [(1, 1), (1, 2), (1, 2), (2, 1), (1, 9), (2, 2), (3, 1), (2, 3)]
            .into_iter()
            .map(|(boot, seq)| worker.hear(&pulse(boot, seq), 10))
            .collect();
        assert_eq!(lives, [New, Same, Past, New, Past, Same, New, Past]);
    }

    #[test]
    fn a_forgotten_boot_is_not_a_new_life() {
        let mut worker = Worker::of_certificate(&certificate(1, 1));
        for boot in 10..40 {
            assert_eq!(worker.hear(&pulse(boot, 1), 10), Life::New);
        }
        for boot in 10..39 {
            assert_eq!(worker.hear(&pulse(boot, 2), 10), Life::Past, "boot {boot}");
        }
        assert_eq!(worker.hear(&pulse(1, 1), 10), Life::Past, "older than all that is remembered");
        assert_eq!(worker.hear(&pulse(41, 1), 10), Life::New);
        assert_eq!(worker.hear(&pulse(40, 1), 10), Life::New, "the clock went back a little");
        // A newer certificate: nothing that a former life signed is believed any more.
        assert!(worker.accept(&certificate(1, 2)));
        assert_eq!(worker.hear(&pulse(1, 1), 10), Life::New, "the clock went back far");
        assert_eq!(worker.hear(&pulse(40, 2), 10), Life::Past);
    }

    #[test]
    fn a_replaced_certificate_is_refused() {
        let mut worker = Worker::of_certificate(&certificate(1, 5));
        assert!(worker.accept(&certificate(1, 5)));
        assert!(!worker.accept(&certificate(2, 5)), "another key of the same moment");
        assert!(worker.accept(&certificate(2, 6)), "enrolled anew");
        assert!(!worker.accept(&certificate(1, 5)), "the old one");
    }
}
