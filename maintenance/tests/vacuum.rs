//! Estimating bloat, planning and executing VACUUM on real servers.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a helper that fails, fails its test")]

mod servers;

use std::time::Duration;

use maintenance::bloat::{self, TableBloat};
use maintenance::vacuum::{
    self, Bounded, PlanOptions, Statistics, VacuumOptions, VacuumPlan, VacuumResult,
};
use maintenance::{Ended, Limits};
use postgres::{Session, quote};
use servers::{HOSTILE, Server, wait_for};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

servers::on_each_major! {
    bloated_tables_are_found_and_healthy_ones_of_every_shape_are_not,
    vacuuming_removes_the_dead_rows_and_says_that_the_file_stays,
    hostile_names_are_names_and_nothing_else,
    a_lock_is_waited_for_briefly_and_an_exclusive_one_does_not_stop_the_estimate,
    cancelling_ends_within_a_second,
    an_old_snapshot_is_named,
    the_grant_in_the_reason_is_the_one_that_helps,
    bloated_indexes_show,
}

/// 40,000 rows of about 130 bytes, of which the given share lives.
fn bloated(table: &str, one_in: u32) -> Vec<String> {
    vec![
        format!(
            "CREATE TABLE {table} AS SELECT i, repeat('x', 100) AS t FROM generate_series(1, 40000) i"
        ),
        format!("ANALYZE {table}"),
        format!("DELETE FROM {table} WHERE i % {one_in} <> 0"),
    ]
}

/// Runs the statements; their pages are written out then, so that nobody but the VACUUM under test holds one.
async fn prepare(server: &Server, mut statements: Vec<String>) {
    statements.push("CHECKPOINT".to_owned());
    server.run(&statements.iter().map(String::as_str).collect::<Vec<_>>()).await;
}

/// The statistics, once the server has counted what the test did: every table named `bloated…` has dead rows.
async fn counted(session: &Session) -> Statistics {
    wait_for("the counters", async || {
        let tables = bloat::tables(session).await.unwrap();
        tables.iter().filter(|t| t.table.name.starts_with("bloated")).all(|t| t.dead_rows > 0)
    })
    .await;
    vacuum::read(session).await.unwrap()
}

fn default_plan(statistics: &Statistics) -> VacuumPlan {
    vacuum::plan(statistics, &PlanOptions::default())
}

fn quick() -> Limits {
    Limits { lock_timeout: Duration::from_millis(300), ..Limits::default() }
}

async fn execute(session: &Session, plan: &VacuumPlan) -> VacuumResult {
    vacuum::execute(session, plan, &quick(), &mut |_| {}, &CancellationToken::new()).await.unwrap()
}

fn named<'a>(tables: &'a [TableBloat], name: &str) -> &'a TableBloat {
    tables.iter().find(|table| table.table.name == name).unwrap()
}

async fn bloated_tables_are_found_and_healthy_ones_of_every_shape_are_not(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut statements = bloated("bloated", 3);
    // Half of the rows are gone: on pages as full as these, a hair more than twice the need.
    statements.extend(bloated("bloated_by_half", 2));
    let shapes = [
        ("narrow", "SELECT i FROM generate_series(1, 100000) i"),
        ("wide", "SELECT i, repeat('y', 1500) AS t FROM generate_series(1, 4000) i"),
        (
            "mixed",
            "SELECT i % 2 = 0 AS b, i::int2 % 100 AS s, i::int8 AS l, i::text AS t, now() AS w FROM generate_series(1, 30000) i",
        ),
        (
            "nulls",
            "SELECT CASE WHEN i % 3 = 0 THEN i END AS n, CASE WHEN i % 2 = 0 THEN 'text' || i END AS t FROM generate_series(1, 50000) i",
        ),
        (
            "toasted",
            "SELECT i, (SELECT string_agg(md5(i::text || j), '') FROM generate_series(1, 200) j) AS t FROM generate_series(1, 1000) i",
        ),
    ];
    for (name, select) in shapes {
        statements.push(format!("CREATE TABLE {name} AS {select}"));
        statements.push(format!("ANALYZE {name}"));
    }
    statements.push("CREATE TABLE loose (i int, t text) WITH (fillfactor = 40)".to_owned());
    statements.push(
        "INSERT INTO loose SELECT i, repeat('z', 60) FROM generate_series(1, 20000) i".to_owned(),
    );
    statements.push("ANALYZE loose".to_owned());
    statements
        .push("CREATE TABLE unknown AS SELECT i FROM generate_series(1, 100000) i".to_owned());
    statements.push("CREATE TABLE nothing (i int)".to_owned());
    prepare(&server, statements).await;

    let session = server.session().await;
    let statistics = counted(&session).await;
    for name in ["narrow", "wide", "mixed", "nulls", "loose", "toasted"] {
        let ratio = named(&statistics.tables, name).ratio().unwrap();
        assert!((0.7..1.35).contains(&ratio), "{name}: {ratio}");
    }
    let third = named(&statistics.tables, "bloated").ratio().unwrap();
    assert!((2.7..3.5).contains(&third), "{third}");
    let half = named(&statistics.tables, "bloated_by_half").ratio().unwrap();
    assert!((1.9..2.3).contains(&half), "{half}");

    let plan = default_plan(&statistics);
    assert_eq!(plan.items[0].table.name, "bloated", "{plan}");
    let wrong = ["narrow", "wide", "mixed", "nulls", "loose", "toasted", "nothing"];
    assert!(plan.items.iter().all(|item| !wrong.contains(&item.table.name.as_str())), "{plan}");
    assert_eq!(plan.skipped.len(), 1, "{plan}");
    assert!(plan.skipped[0].table.contains("unknown"), "{plan}");
    assert!(plan.skipped[0].reason.starts_with("not estimable"), "{plan}");
}

async fn vacuuming_removes_the_dead_rows_and_says_that_the_file_stays(major: u32) {
    let server = Server::start(major, &[]).await;
    prepare(&server, bloated("bloated", 4)).await;
    let session = server.session().await;
    let plan = default_plan(&counted(&session).await);
    assert_eq!(plan.items.len(), 1, "{plan}");
    assert!(plan.to_string().contains("it does not shrink them. VACUUM FULL"), "{plan}");

    let result = execute(&session, &plan).await;
    assert_eq!(result.ended, Ended::Complete);
    let [done] = &result.vacuumed[..] else { panic!("{result:?}") };
    assert_eq!((done.dead_rows_before, done.dead_rows_after), (30_000, 0), "{done:?}");
    assert_eq!(done.size_after_bytes, done.size_before_bytes, "TRUNCATE is off");
    assert!(done.bloat_ratio > 3.5, "{done:?}");
    let dead = "SELECT count(*) FROM pg_stats WHERE tablename = 'bloated' AND attname = 'i'";
    assert_eq!(server.number(dead).await, 1, "analyzed in the same go");

    // The space is inside the file now; doing it again would win nothing, and the plan says what would.
    let again = default_plan(&vacuum::read(&session).await.unwrap());
    assert!(again.items.is_empty(), "{again}");
    assert!(again.skipped[0].reason.contains("only VACUUM FULL or pg_repack"), "{again}");
}

async fn hostile_names_are_names_and_nothing_else(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut statements = vec!["CREATE TABLE victim (i int)".to_owned()];
    for (at, name) in HOSTILE.iter().enumerate() {
        statements.push(format!("CREATE SCHEMA {}", quote::identifier(name)));
        let table = quote::qualified(name, HOSTILE[HOSTILE.len() - 1 - at]);
        statements.extend(bloated(&table, 4));
    }
    prepare(&server, statements).await;
    let session = server.session().await;
    wait_for("the counters", async || {
        default_plan(&vacuum::read(&session).await.unwrap()).items.len() == HOSTILE.len()
    })
    .await;
    let plan = default_plan(&vacuum::read(&session).await.unwrap());
    let result = execute(&session, &plan).await;
    assert_eq!(result.vacuumed.len(), HOSTILE.len(), "{result:?}");
    assert!(result.vacuumed.iter().all(|done| done.dead_rows_after == 0), "{result:?}");
    assert_eq!(server.number("SELECT count(*) FROM pg_class WHERE relname = 'victim'").await, 1);
}

async fn a_lock_is_waited_for_briefly_and_an_exclusive_one_does_not_stop_the_estimate(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut statements = bloated("bloated_held", 4);
    statements.extend(bloated("bloated_free", 4));
    prepare(&server, statements).await;
    let session = server.session().await;
    let plan = default_plan(&counted(&session).await);
    assert_eq!(plan.items.len(), 2, "{plan}");

    let holder = server.other().await;
    let lock = "BEGIN; LOCK TABLE bloated_held IN ACCESS EXCLUSIVE MODE";
    holder.run("lock", lock).await.unwrap();
    let since = Instant::now();
    let statistics = vacuum::read(&session).await.unwrap();
    assert!(since.elapsed() < Duration::from_secs(1), "reading waited: {:?}", since.elapsed());
    let reason = &default_plan(&statistics).skipped[0].reason;
    assert_eq!(reason, "another session holds it exclusively");

    let result = execute(&session, &plan).await;
    assert_eq!(result.vacuumed.len(), 1, "{result:?}");
    assert!(result.skipped[0].table.contains("bloated_held"));
    assert_eq!(result.skipped[0].reason, "another session holds a lock on it; waited 300 ms");
    assert_eq!(server.number("SELECT count(*) FROM pg_locks WHERE NOT granted").await, 0);
    holder.run("end", "COMMIT").await.unwrap();
}

async fn cancelling_ends_within_a_second(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut statements = bloated("bloated_first", 5);
    statements.extend(bloated("bloated_second", 4));
    prepare(&server, statements).await;
    let session = server.session().await;
    let statistics = counted(&session).await;
    // A tenth of a second of sleep for each unit of cost: this takes minutes.
    let crawl = VacuumOptions {
        cost_delay_ms: Bounded::clamped(u32::MAX),
        cost_limit: Bounded::clamped(0),
        ..VacuumOptions::default()
    };
    let plan = vacuum::plan(&statistics, &PlanOptions { vacuum: crawl, ..PlanOptions::default() });
    let cancel = CancellationToken::new();
    let limits = quick();
    let work = async {
        let result = vacuum::execute(&session, &plan, &limits, &mut |_| {}, &cancel).await.unwrap();
        (result, Instant::now())
    };
    let running = "SELECT count(*) FROM pg_stat_progress_vacuum";
    let canceller = async {
        server.until(running, 1).await;
        cancel.cancel();
        Instant::now()
    };
    let ((result, ended_at), cancelled_at) = tokio::join!(work, canceller);
    assert!(ended_at - cancelled_at < Duration::from_secs(1), "{:?}", ended_at - cancelled_at);
    assert_eq!(result.ended, Ended::Cancelled);
    assert!(result.vacuumed.is_empty(), "{result:?}");
    assert_eq!(result.skipped[0].reason, "interrupted: the job was cancelled");
    assert_eq!(result.skipped[1].reason, "not reached: the job was cancelled");
    server.until(running, 0).await;
}

async fn an_old_snapshot_is_named(major: u32) {
    let server = Server::start(major, &[]).await;
    let reader = server.other().await;
    reader.run("name", "SET application_name = 'the long report'").await.unwrap();
    let snapshot = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class";
    reader.run("take a snapshot", snapshot).await.unwrap();
    prepare(&server, bloated("bloated", 4)).await;
    let session = server.session().await;
    let statistics = counted(&session).await;
    let holder = &statistics.holders[0];
    assert!(holder.holder.contains(&format!("session {}", reader.backend_pid())), "{holder:?}");
    assert!(holder.holder.contains("the long report"), "{holder:?}");
    assert_eq!(default_plan(&statistics).items.len(), 1, "young snapshots pass");

    let strict = PlanOptions { snapshot_age_max: Duration::ZERO, ..PlanOptions::default() };
    let plan = vacuum::plan(&statistics, &strict);
    assert!(plan.items.is_empty(), "{plan}");
    assert!(plan.skipped[0].reason.contains("the long report"), "{plan}");

    // And it is true: a vacuum under that snapshot frees nothing, one after it does.
    let result = execute(&session, &default_plan(&statistics)).await;
    assert_eq!(result.vacuumed[0].dead_rows_after, 30_000, "{result:?}");
    reader.run("end", "COMMIT").await.unwrap();
    let result = execute(&session, &default_plan(&vacuum::read(&session).await.unwrap())).await;
    assert_eq!(result.vacuumed[0].dead_rows_after, 0, "{result:?}");
}

async fn the_grant_in_the_reason_is_the_one_that_helps(major: u32) {
    let server = Server::start(major, &[]).await;
    prepare(&server, bloated("bloated", 4)).await;
    server
        .run(&[
            "CREATE ROLE keeper",
            "CREATE ROLE worker LOGIN",
            "ALTER TABLE bloated OWNER TO keeper",
        ])
        .await;
    let session = server.session_of("worker").await;
    let plan = default_plan(&counted(&session).await);
    assert!(plan.skipped[0].reason.starts_with("not estimable"), "{plan}");
    server.run(&["GRANT pg_read_all_data TO worker"]).await;
    let plan = default_plan(&counted(&session).await);
    let told = plan.skipped[0].reason.strip_prefix("the role lacks the right: ").unwrap();
    let statement = told.split(" (").next().unwrap().to_owned();
    server.run(&[&statement]).await;
    let plan = default_plan(&counted(&session).await);
    let result = execute(&session, &plan).await;
    assert_eq!(result.vacuumed.len(), 1, "{statement}: {result:?}");
    assert_eq!(result.vacuumed[0].dead_rows_after, 0);
}

async fn bloated_indexes_show(major: u32) {
    let server = Server::start(major, &[]).await;
    prepare(&server, bloated("bloated", 5)).await;
    server
        .run(&[
            "CREATE INDEX fresh ON bloated (i)",
            "CREATE TABLE filled (i int, t text)",
            "CREATE INDEX worn ON filled (i)",
            "CREATE INDEX expressed ON filled ((i * 2), t)",
            "INSERT INTO filled SELECT i, 'text ' || i FROM generate_series(1, 60000) i",
            "DELETE FROM filled WHERE i % 6 <> 0",
            "VACUUM ANALYZE filled",
            "VACUUM ANALYZE bloated",
        ])
        .await;
    let session = server.session().await;
    let indexes = bloat::indexes(&session).await.unwrap();
    let ratio = |name: &str| {
        let found = indexes.iter().find(|index| index.index.name == name).unwrap();
        assert!(found.is_valid);
        found.ratio().unwrap_or_else(|| panic!("{name} is not estimable: {found:?}"))
    };
    let fresh = ratio("fresh");
    assert!((0.8..1.3).contains(&fresh), "{fresh}");
    for name in ["worn", "expressed"] {
        assert!(ratio(name) > 3.0, "{name}: {}", ratio(name));
    }
}
