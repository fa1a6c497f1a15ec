//! A standby as the source: what is restored is all that it had replayed, and whatever makes it another server ends the backup.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;

use std::path::PathBuf;
use std::time::Duration;

use house::{
    DATA, House, back_up_and_meanwhile, caught_up, copies, eventually, nothing_is_left_at, number,
    run_sql, serve, session, standby_arguments, standby_of, start_plainly,
};
use postgres::control_file::ControlFile;
use postgres::instance::InstanceOptions;
use postgres::process::Running;
use proto::{Action, Code, Failure, ProofLevel};
use rustix::process::Signal;
use tempfile::TempDir;
use worker::restoring;

/// A primary, and a standby of it that is to be backed up.
struct Pair {
    house: House,
    standby: (Running, TempDir),
    url: String,
    directory: PathBuf,
}

impl Pair {
    async fn new(major: u32, settings: &[&str]) -> Self {
        // Nothing but the tests writes; a checkpoint comes when they say so.
        let quiet = [("autovacuum", "off"), ("checkpoint_timeout", "1h"), ("wal_keep_size", "1GB")];
        let quiet = quiet.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let options = InstanceOptions {
            fsync: false,
            settings: quiet.to_vec(),
            ..InstanceOptions::default()
        };
        let mut house = House::new(major, options).await;
        house.sql(DATA).await;
        let directory = house.place.path().join("standby");
        let settings = [&["fsync=off"], settings].concat();
        let (standby, url) = standby_of(&house.server, &directory, &settings).await;
        house.reconnect(&url);
        let pair = Self { house, standby, url, directory };
        pair.caught_up().await;
        pair
    }

    fn primary(&self) -> String {
        self.house.server.url("postgres")
    }

    async fn caught_up(&self) {
        caught_up(&self.primary(), &self.url).await;
    }

    async fn is_proved(&self) {
        let proof = self.house.prove(ProofLevel::L5).await;
        assert!(proof.passed, "{:#?}", proof.checks);
    }

    /// Nothing was committed, and the next attempt may succeed.
    async fn was_given_up(&self, failure: &Failure) {
        assert_eq!(
            (failure.code, failure.action),
            (Code::BackupSessionLost, Action::Retry),
            "{failure:?}"
        );
        let repository = self.house.reopened().await;
        let lineage = repository.list_lineages().await.unwrap()[0].lineage;
        let attempts = repository.list_attempts(lineage).await.unwrap();
        let last = attempts.last().unwrap();
        assert!(last.verdict.is_some() && last.backup().is_none(), "{last:?}");
    }
}

async fn comes_back_with_all_it_had_replayed(major: u32) {
    let pair = Pair::new(major, &[]).await;
    let house = &pair.house;
    // In the middle: rows that the standby has seen and, its buffers being large enough, not written to any file.
    let cx = house.cx();
    let meanwhile = async {
        copies(&cx).await;
        house
            .sql("INSERT INTO public.orders SELECT g, 'late' FROM generate_series(50001, 50777) g")
            .await;
        pair.caught_up().await;
    };
    let (outcome, ()) = tokio::join!(house.back_up_as(&cx), meanwhile);
    let outcome = outcome.unwrap();
    nothing_is_left_at(&pair.url).await;
    assert!(cx.steps().iter().any(|step| step.figures.get("standby_lag_s") == Some(&0)));
    let replayed =
        format!("SELECT (pg_last_wal_replay_lsn() >= '{}')::int4::int8", outcome.stop_lsn);
    assert_eq!(number(&pair.url, &replayed).await, 1);

    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    assert!(proof.reached_lsn.unwrap() >= outcome.stop_lsn);
    assert!(proof.tables_exact >= 2, "{proof:#?}");
    assert!(
        proof
            .checks
            .iter()
            .any(|check| check.name == "canary" && check.detail.contains("committed")),
        "{proof:#?}"
    );

    let directory = house.place.path().join("restored");
    house.restore(&outcome, &directory).await;
    let control = ControlFile::read(&directory).unwrap();
    assert!(control.min_recovery_point >= outcome.stop_lsn, "it cannot open sooner");
    let (_running, url) = start_plainly(&directory, major).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders WHERE note = 'late'").await, 777);
    assert_eq!(number(&url, "SELECT count(*) FROM public.fleeting").await, 0);
    assert_eq!(number(&url, "SELECT pg_is_in_recovery()::int4::int8").await, 0);

    // The next one stores what changed since, though nothing was written in between.
    let second = house.back_up().await;
    assert_eq!(second.compared_with, Some(outcome.backup));
    pair.is_proved().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_of_15_comes_back_with_all_it_had_replayed() {
    Box::pin(comes_back_with_all_it_had_replayed(15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_of_18_comes_back_with_all_it_had_replayed() {
    Box::pin(comes_back_with_all_it_had_replayed(18)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_count_beside_the_newest_open_transaction_is_not_called_exact() {
    let pair = Pair::new(15, &[]).await;
    let house = &pair.house;
    let open = session(&pair.primary()).await;
    // No transaction that has ended is newer: between the ends of the standby's snapshot there is none.
    open.run("begin", "BEGIN").await.unwrap();
    open.run("write", "INSERT INTO public.orders VALUES (50001, 'open')").await.unwrap();
    house.sql("CHECKPOINT").await;
    pair.caught_up().await;
    let outcome = house.back_up().await;
    open.run("commit", "COMMIT").await.unwrap();
    open.close().await;
    let repository = house.reopened().await;
    let found = restoring::find(&repository, None, None, Some(outcome.backup)).await.unwrap();
    let census = found.facts().census.clone().unwrap();
    let mut tables = census.databases.iter().flat_map(|database| &database.tables);
    let orders = tables.find(|count| count.table == "orders").unwrap();
    assert_eq!(orders.drift, None, "{orders:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_standby_that_is_behind_counts_to_what_it_had_replayed() {
    let pair = Pair::new(15, &[]).await;
    let house = &pair.house;
    let now = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::int8";
    let before = number(&pair.primary(), now).await;
    house.sql("INSERT INTO public.empty VALUES (1)").await;
    pair.caught_up().await;
    run_sql(&pair.url, "SELECT pg_wal_replay_pause()").await;
    let behind = number(&pair.primary(), now).await;
    house.sql("INSERT INTO public.empty VALUES (2)").await;
    let cx = house.cx();
    let outcome = house.back_up_as(&cx).await.unwrap();
    let recovers_to_ms = outcome.recovers_to_ms();
    assert!((before..=behind).contains(&recovers_to_ms), "{before} {recovers_to_ms} {behind}");
    // It is as new as it is otherwise, but for what commits while it stops.
    let stop = cx.steps().into_iter().find(|step| step.name == "stop_backup").unwrap();
    assert!(outcome.stopped_at_ms > behind && outcome.stopped_at_ms <= stop.started_at_ms);
    let dump = house::dumps::dump(house, &house::dumps::scope(&[], &[])).await.unwrap();
    assert!(dump.recovers_to_ms() <= behind, "{dump:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_a_standby_ends_where_its_backup_does() {
    let pair = Pair::new(15, &[]).await;
    let house = &pair.house;
    let outcome = house.back_up().await;
    // The same file goes on meanwhile, with rows that are not the backup's.
    house.sql("INSERT INTO public.empty SELECT generate_series(1, 1000)").await;
    pair.caught_up().await;
    let directory = house.place.path().join("restored");
    house.restore(&outcome, &directory).await;
    let segment = postgres::wal::Segment::ending_at(outcome.stop_lsn, outcome.timeline, 16 << 20);
    let bytes = std::fs::read(directory.join("pg_wal").join(segment.file_name(16 << 20))).unwrap();
    assert_eq!(bytes.len(), 16 << 20);
    let end = usize::try_from(outcome.stop_lsn.0 - segment.start(16 << 20).0).unwrap();
    assert!(bytes[end..].iter().all(|byte| *byte == 0), "something follows the end");

    // A copy whose log lacks the last record does not open, where replay was asked for: its control file knows better. (Its
    // label does not here: the copy from which the standby was made began at the same checkpoint, and has its end in the log.)
    let mut cut = bytes.clone();
    cut[end - 32..].fill(0);
    assert_ne!(cut, bytes, "a record ends there");
    std::fs::write(directory.join("pg_wal").join(segment.file_name(16 << 20)), cut).unwrap();
    let (sockets, log) = (house::sockets(), directory.join("log"));
    std::fs::write(directory.join("recovery.signal"), "").unwrap();
    let settings = ["fsync=off", "restore_command=false"];
    let arguments = standby_arguments(&directory, sockets.path(), &settings);
    let mut running = house::spawn(15, "postgres", &arguments, &log).await;
    let ended = tokio::time::timeout(Duration::from_secs(20), running.wait()).await;
    let said = std::fs::read_to_string(&log).unwrap();
    assert!(ended.is_ok_and(|status| !status.unwrap().success()), "{said}");
    assert!(said.contains("WAL ends before consistent recovery point"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_promoted_in_the_middle_ends_its_backup() {
    let pair = Pair::new(15, &[]).await;
    let promote = run_sql(&pair.url, "SELECT pg_promote(true, 60)");
    let failure = Box::pin(back_up_and_meanwhile(&pair.house, promote)).await;
    pair.was_given_up(&failure).await;
    nothing_is_left_at(&pair.url).await;
    // It is a primary now, and is backed up as one.
    run_sql(&pair.url, "CHECKPOINT").await;
    let outcome = pair.house.back_up().await;
    assert_eq!(outcome.timeline.0, 2);
    pair.is_proved().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_that_is_restarted_in_the_middle_ends_its_backup() {
    let mut pair = Pair::new(15, &[]).await;
    let (mut running, sockets) = pair.standby;
    let stop = async {
        running.signal(Signal::INT).unwrap();
        running.wait().await.unwrap();
    };
    let failure = Box::pin(back_up_and_meanwhile(&pair.house, stop)).await;
    let arguments = standby_arguments(&pair.directory, sockets.path(), &["fsync=off"]);
    let running = serve(15, &arguments, &sockets.path().join("log"), &pair.url).await;
    pair.standby = (running, sockets);
    pair.was_given_up(&failure).await;
    nothing_is_left_at(&pair.url).await;
    pair.house.back_up().await;
    pair.is_proved().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_whose_primary_fails_over_in_the_middle_ends_its_backup() {
    // The standby of a standby: it follows when that one is promoted.
    let mut pair = Pair::new(15, &[]).await;
    let below = pair.house.place.path().join("below");
    let (_below, url) = house::standby_at(&pair.url, 15, &below, &["fsync=off"]).await;
    pair.house.reconnect(&url);
    caught_up(&pair.primary(), &url).await;
    let timeline = "SELECT min_recovery_end_timeline::int8 FROM pg_control_recovery()";
    let fail_over = async {
        run_sql(&pair.url, "SELECT pg_promote(true, 60)").await;
        run_sql(&pair.url, "CREATE TABLE public.after AS SELECT 1; CHECKPOINT").await;
        let followed = async || {
            let history = below.join("pg_wal/00000002.history").exists();
            history.then_some(())
        };
        eventually("it follows the new primary", Duration::from_mins(1), followed).await;
    };
    let failure = Box::pin(back_up_and_meanwhile(&pair.house, fail_over)).await;
    pair.was_given_up(&failure).await;
    nothing_is_left_at(&url).await;
    // Once its own files are of the new timeline, it is a source again.
    let settled = async || {
        run_sql(&pair.url, "SELECT pg_switch_wal(); CHECKPOINT").await;
        run_sql(&url, "CHECKPOINT").await;
        (number(&url, timeline).await == 2).then_some(())
    };
    eventually("the standby has a restartpoint of timeline 2", Duration::from_mins(1), settled)
        .await;
    let outcome = pair.house.back_up().await;
    assert_eq!(outcome.timeline.0, 2);
    pair.is_proved().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_without_whole_pages_in_its_log_is_refused_with_the_cure() {
    let pair = Pair::new(15, &[]).await;
    let primary = pair.primary();
    run_sql(&primary, "ALTER SYSTEM SET full_page_writes = off").await;
    run_sql(&primary, "SELECT pg_reload_conf()").await;
    let off = async || {
        run_sql(&primary, "CREATE TABLE IF NOT EXISTS public.more (n int); INSERT INTO public.more VALUES (1); CHECKPOINT").await;
        let sql = "SELECT (NOT full_page_writes)::int4::int8 FROM pg_control_checkpoint()";
        (number(&primary, sql).await == 1).then_some(())
    };
    eventually("the primary writes no whole pages", Duration::from_secs(30), off).await;
    pair.caught_up().await;
    let failure = pair.house.back_up_as(&pair.house.cx()).await.unwrap_err();
    assert_eq!(
        (failure.code, failure.action),
        (Code::ServerSetting, Action::FixConfig),
        "{failure:?}"
    );
    assert!(failure.hint.contains("full_page_writes = on"), "{failure:?}");
    nothing_is_left_at(&pair.url).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_far_behind_is_refused_and_an_idle_one_is_not() {
    let mut pair = Pair::new(18, &[]).await;
    pair.house.config.backup.standby_lag_max_s = 1;
    // Nothing has happened for longer than that, and nothing is missing.
    let idle =
        "SELECT (clock_timestamp() - pg_last_xact_replay_timestamp() > '2 seconds')::int4::int8";
    let is_idle = async || (number(&pair.url, idle).await == 1).then_some(());
    eventually("nothing was written for two seconds", Duration::from_secs(30), is_idle).await;
    pair.house.back_up().await;

    run_sql(&pair.url, "SELECT pg_wal_replay_pause()").await;
    pair.house.sql("INSERT INTO public.empty VALUES (1)").await;
    let refused = async || {
        let failed = pair.house.back_up_as(&pair.house.cx()).await.err()?;
        Some(failed).filter(|failure| failure.code == Code::StandbyBehind)
    };
    let failure = eventually("it is refused", Duration::from_secs(30), refused).await;
    assert_eq!(failure.action, Action::Retry);
    assert!(failure.hint.contains("standby_lag_max_s"), "{failure:?}");
    nothing_is_left_at(&pair.url).await;

    pair.house.config.backup.standby_lag_max_s = 0;
    pair.house.back_up().await;
}
