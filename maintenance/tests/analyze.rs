//! Planning and executing ANALYZE on real servers: what is reached, what is respected, how it stops.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper that fails, fails its test")]

mod servers;

use std::time::Duration;

use maintenance::analyze::{self, AnalyzeOptions, AnalyzePlan, AnalyzeResult, Reason};
use maintenance::{Ended, Error, Limits};
use postgres::{Session, quote};
use servers::{HOSTILE, SLOW, Server, wait_for};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

servers::on_each_major! {
    every_table_is_analyzed_and_partitioned_parents_too,
    hostile_names_are_names_and_nothing_else,
    a_lock_is_waited_for_briefly_and_readers_are_not_held_up,
    an_autovacuum_at_work_is_left_at_work,
    cancelling_ends_within_a_second,
    one_slow_table_does_not_cost_the_others_and_the_deadline_ends_all,
    a_table_dropped_meanwhile_is_skipped_and_a_renamed_one_is_found,
    the_grant_in_the_reason_is_the_one_that_helps,
    nothing_remote_and_nothing_temporary_is_touched,
    a_standby_is_refused,
}

async fn planned(session: &Session) -> AnalyzePlan {
    let statistics = analyze::read(session).await.unwrap();
    analyze::plan(&statistics, &AnalyzeOptions::default())
}

fn quick() -> Limits {
    Limits { lock_timeout: Duration::from_millis(300), ..Limits::default() }
}

async fn execute(session: &Session, plan: &AnalyzePlan, limits: &Limits) -> AnalyzeResult {
    analyze::execute(session, plan, limits, &mut |_| {}, &CancellationToken::new()).await.unwrap()
}

fn reason<'a>(result: &'a AnalyzeResult, table: &str) -> &'a str {
    let found = result.skipped.iter().find(|skip| skip.table.contains(table));
    found.map_or_else(|| panic!("{table} was not skipped: {result:?}"), |skip| &skip.reason)
}

async fn every_table_is_analyzed_and_partitioned_parents_too(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(&[
            "CREATE TABLE plain AS SELECT i FROM generate_series(1, 100) i",
            "CREATE TABLE empty (i int)",
            "CREATE TABLE root (i int, j int) PARTITION BY RANGE (i)",
            "CREATE TABLE middle PARTITION OF root FOR VALUES FROM (0) TO (100) PARTITION BY LIST (j)",
            "CREATE TABLE leaf_a PARTITION OF middle FOR VALUES IN (1)",
            "CREATE TABLE leaf_b PARTITION OF root FOR VALUES FROM (100) TO (200)",
            "INSERT INTO root SELECT i, 1 FROM generate_series(0, 199) i",
            "CREATE MATERIALIZED VIEW seen AS SELECT * FROM plain",
            "CREATE VIEW unseen AS SELECT * FROM plain",
        ])
        .await;
    let session = server.session().await;
    let plan = planned(&session).await;
    assert!(plan.items.iter().all(|item| item.reason == Reason::NeverAnalyzed), "{plan}");

    let mut seen = Vec::new();
    let mut progress = |step: analyze::Progress<'_>| {
        seen.push((step.done, step.total, step.table.map(ToString::to_string)));
    };
    let cancel = CancellationToken::new();
    let result = analyze::execute(&session, &plan, &quick(), &mut progress, &cancel).await.unwrap();
    assert_eq!((result.analyzed, result.ended), (7, Ended::Complete), "{result:?} of {plan}");
    assert!(result.skipped.is_empty(), "{result:?}");
    let total = plan.items.len();
    assert_eq!(seen.first().map(|s| (s.0, s.1)), Some((0, total)));
    assert_eq!(seen.last(), Some(&(total, total, None)));

    // The statistics of a parent are those over its partitions, which nothing but an explicit ANALYZE makes.
    for parent in ["root", "middle"] {
        let sql =
            format!("SELECT count(*) FROM pg_stats WHERE tablename = '{parent}' AND inherited");
        assert_eq!(server.number(&sql).await, 2, "{parent}");
    }
    let leaves = "SELECT count(DISTINCT tablename) FROM pg_stats WHERE tablename LIKE 'leaf%'";
    assert_eq!(server.number(leaves).await, 2);
    let never = "SELECT count(*) FROM pg_class WHERE relkind IN ('r', 'p', 'm') AND reltuples < 0 \
                 AND relnamespace = 'public'::regnamespace";
    assert_eq!(server.number(never).await, 0);

    // A second plan knows that nothing is left to do.
    wait_for("the counters of the first run", async || {
        planned(&session).await.items.iter().all(|item| item.reason == Reason::Unchanged)
    })
    .await;
}

async fn hostile_names_are_names_and_nothing_else(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut statements = vec!["CREATE TABLE victim (i int)".to_owned()];
    for name in HOSTILE {
        assert!(name.len() <= 63);
        let schema = quote::identifier(name);
        statements.push(format!("CREATE SCHEMA {schema}"));
        for table in HOSTILE {
            statements.push(format!("CREATE TABLE {} (i int)", quote::qualified(name, table)));
        }
    }
    server.run(&statements.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let session = server.session().await;
    let plan = planned(&session).await;
    let result = execute(&session, &plan, &quick()).await;
    assert_eq!(result.analyzed, 65, "{result:?}");
    assert_eq!(server.number("SELECT count(*) FROM pg_class WHERE relname = 'victim'").await, 1);
    assert_eq!(plan.to_string().lines().count(), 66, "a name with a line break stays on its line");
}

async fn a_lock_is_waited_for_briefly_and_readers_are_not_held_up(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(&[
            "CREATE TABLE held (i int)",
            "CREATE TABLE changing (i int)",
            "CREATE TABLE free (i int)",
        ])
        .await;
    let holder = server.other().await;
    holder.run("begin", "BEGIN; LOCK TABLE held IN ACCESS EXCLUSIVE MODE").await.unwrap();
    // What CREATE INDEX holds: readers go on, ANALYZE waits.
    holder.run("lock", "LOCK TABLE changing IN SHARE MODE").await.unwrap();

    let session = server.session().await;
    let plan = planned(&session).await;
    let limits = quick();
    let work = execute(&session, &plan, &limits);
    let reader = async {
        let other = server.other().await;
        server.until("SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = 'changing'::regclass", 1).await;
        other.run("set a short limit", "SET lock_timeout = 100").await.unwrap();
        other.run("read while ANALYZE waits", "SELECT * FROM changing").await.unwrap();
    };
    let since = Instant::now();
    let (result, ()) = tokio::join!(work, reader);
    assert!(since.elapsed() < Duration::from_secs(5), "two waits of 300 ms: {:?}", since.elapsed());
    assert_eq!((result.analyzed, result.ended), (1, Ended::Complete));
    for table in ["held", "changing"] {
        assert_eq!(reason(&result, table), "another session holds a lock on it; waited 300 ms");
    }
    let waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted";
    assert_eq!(server.number(waiting).await, 0, "nobody waits for anything any more");
    holder.run("end", "COMMIT").await.unwrap();
}

async fn an_autovacuum_at_work_is_left_at_work(major: u32) {
    // The worker analyzes a table whose index sleeps; without the look at the lock we would cancel it after a second.
    let settings = [
        ("autovacuum", "on"),
        ("autovacuum_naptime", "1s"),
        ("autovacuum_analyze_threshold", "1"),
        ("test.slow", "on"),
    ];
    let server = Server::start(major, &settings).await;
    let mut statements = vec!["SET test.slow = off"];
    statements.extend(SLOW);
    server.run(&statements).await;
    let worker = "SELECT coalesce(max(l.pid), 0)::int8 FROM pg_locks l JOIN pg_stat_activity a USING (pid) \
                  WHERE a.backend_type = 'autovacuum worker' AND l.relation = 'slowly'::regclass \
                  AND l.mode = 'ShareUpdateExclusiveLock' AND l.granted";
    wait_for("an autovacuum worker", async || server.number(worker).await > 0).await;
    let pid = server.number(worker).await;

    let session = server.session().await;
    let plan = planned(&session).await;
    let limits = Limits { lock_timeout: Duration::from_secs(20), ..Limits::default() };
    let since = Instant::now();
    let result = execute(&session, &plan, &limits).await;
    assert!(since.elapsed() < Duration::from_secs(10), "it waited: {:?}", since.elapsed());
    let expected = format!("process {pid} (autovacuum worker) is vacuuming or analyzing it now");
    assert_eq!(reason(&result, "slowly"), expected);
    assert_eq!(server.number(worker).await, pid, "the worker goes on");
}

async fn cancelling_ends_within_a_second(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run(&SLOW).await;
    server.run(&["CREATE TABLE zzz (i int)", "ALTER DATABASE postgres SET test.slow = on"]).await;
    let session = server.session().await;
    let plan = planned(&session).await;
    let cancel = CancellationToken::new();
    let running =
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'ANALYZE%' AND state = 'active'";
    let work = async {
        let limits = quick();
        let result =
            analyze::execute(&session, &plan, &limits, &mut |_| {}, &cancel).await.unwrap();
        (result, Instant::now())
    };
    let canceller = async {
        server.until(running, 1).await;
        cancel.cancel();
        Instant::now()
    };
    let ((result, ended_at), cancelled_at) = tokio::join!(work, canceller);
    assert!(ended_at - cancelled_at < Duration::from_secs(1), "{:?}", ended_at - cancelled_at);
    assert_eq!((result.analyzed, result.ended), (0, Ended::Cancelled), "{result:?}");
    assert_eq!(reason(&result, "slowly"), "interrupted: the job was cancelled");
    assert_eq!(reason(&result, "zzz"), "not reached: the job was cancelled");
    server.until(running, 0).await;
}

async fn one_slow_table_does_not_cost_the_others_and_the_deadline_ends_all(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run(&SLOW).await;
    server.run(&["CREATE TABLE zzz (i int)", "ALTER DATABASE postgres SET test.slow = on"]).await;
    let session = server.session().await;
    let plan = planned(&session).await;

    let limits = Limits { table_timeout: Duration::from_millis(500), ..quick() };
    let result = execute(&session, &plan, &limits).await;
    assert_eq!((result.analyzed, result.ended), (1, Ended::Complete), "{result:?}");
    assert_eq!(reason(&result, "slowly"), "it took longer than 0.5 s and was stopped");

    let deadline = Some(Instant::now() + Duration::from_millis(500));
    let plan = planned(&session).await;
    let slow = plan.items.iter().position(|item| item.table.name == "slowly").unwrap();
    assert_eq!(slow, 0, "never analyzed goes first: {plan}");
    let result = execute(&session, &plan, &Limits { deadline, ..quick() }).await;
    assert_eq!((result.analyzed, result.ended), (0, Ended::Deadline), "{result:?}");
    assert_eq!(reason(&result, "slowly"), "interrupted: the job's time was over");
    assert_eq!(reason(&result, "zzz"), "not reached: the job's time was over");
}

async fn a_table_dropped_meanwhile_is_skipped_and_a_renamed_one_is_found(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run(&["CREATE TABLE gone (i int)", "CREATE TABLE before (i int)"]).await;
    let session = server.session().await;
    let plan = planned(&session).await;
    server
        .run(&[
            "DROP TABLE gone",
            "ALTER TABLE before RENAME TO after",
            "CREATE TABLE before (i int)",
        ])
        .await;
    let result = execute(&session, &plan, &quick()).await;
    assert_eq!((result.analyzed, result.ended), (1, Ended::Complete), "{result:?}");
    assert_eq!(reason(&result, "gone"), "it was dropped meanwhile");
    let analyzed = "SELECT count(*) FROM pg_class WHERE relname = 'after' AND reltuples = 0";
    assert_eq!(server.number(analyzed).await, 1, "the planned table, under its new name");
    let untouched = "SELECT count(*) FROM pg_class WHERE relname = 'before' AND reltuples = -1";
    assert_eq!(server.number(untouched).await, 1);
}

async fn the_grant_in_the_reason_is_the_one_that_helps(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(&[
            "CREATE ROLE \"own\"\"er\"",
            "CREATE ROLE \"main tain\" LOGIN",
            "CREATE TABLE theirs (i int)",
            "ALTER TABLE theirs OWNER TO \"own\"\"er\"",
        ])
        .await;
    let session = server.session_of("main tain").await;
    let plan = planned(&session).await;
    assert!(plan.items.is_empty(), "{plan}");
    let told = plan.skipped[0].reason.strip_prefix("the role lacks the right: ").unwrap();
    let statement = told.split(" (").next().unwrap().to_owned();
    server.run(&[&statement]).await;

    let plan = planned(&session).await;
    let result = execute(&session, &plan, &quick()).await;
    assert_eq!(result.analyzed, 1, "{statement}: {result:?}");
    let analyzed = "SELECT count(*) FROM pg_class WHERE relname = 'theirs' AND reltuples = 0";
    assert_eq!(server.number(analyzed).await, 1);

    // Taken away between plan and work: the server would only warn and go on.
    let revoke = statement.replace("GRANT", "REVOKE").replace(" TO ", " FROM ");
    server.run(&[&revoke]).await;
    let result = execute(&session, &plan, &quick()).await;
    assert_eq!(result.analyzed, 0);
    assert!(reason(&result, "theirs").contains(&statement), "{result:?}");
}

async fn nothing_remote_and_nothing_temporary_is_touched(major: u32) {
    let server = Server::start(major, &[]).await;
    server
        .run(&[
            "CREATE FOREIGN DATA WRAPPER nowhere",
            "CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere",
            "CREATE FOREIGN TABLE remote (i int) SERVER nowhere",
            "CREATE TABLE root (i int) PARTITION BY LIST (i)",
            "CREATE TABLE near PARTITION OF root FOR VALUES IN (1)",
            "CREATE FOREIGN TABLE far PARTITION OF root FOR VALUES IN (2) SERVER nowhere",
        ])
        .await;
    let owner = server.other().await;
    owner.run("make a temporary table", "CREATE TEMPORARY TABLE scratch (i int)").await.unwrap();
    let session = server.session().await;
    let plan = planned(&session).await;
    let result = execute(&session, &plan, &quick()).await;
    assert_eq!(result.analyzed, 1, "{plan}");
    assert!(reason(&result, "remote").starts_with("foreign: "));
    assert!(reason(&result, "\"far\"").starts_with("foreign: "));
    assert!(reason(&result, "root").starts_with("its partition \"public\".\"far\" is foreign"));
    assert!(reason(&result, "scratch").starts_with("temporary: "));
}

async fn a_standby_is_refused(major: u32) {
    let mut server = Server::start(major, &[]).await;
    let directory = server.instance.data_directory();
    server.instance.stop(postgres::instance::StopMode::Fast).await.unwrap();
    std::fs::write(directory.join("standby.signal"), "").unwrap();
    server.instance.start().await.unwrap();
    let session = server.session().await;
    let plan = planned(&session).await;
    let cancel = CancellationToken::new();
    let refused = analyze::execute(&session, &plan, &quick(), &mut |_| {}, &cancel).await;
    let error = refused.unwrap_err();
    assert!(matches!(error, Error::Standby { .. }), "{error}");
    assert_eq!(proto::Failure::from(error).code, proto::Code::StateConflict);
}
