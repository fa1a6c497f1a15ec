//! The checks of a proof against servers that are healthy, and against servers broken in known ways.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod servers;

use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::path::PathBuf;
use std::time::Duration;

use postgres::census::{CensusOptions, finish_census, take_census};
use postgres::checks::{Assertion, CheckOptions, CheckReport, Origin, run_checks};
use postgres::instance::StopMode;
use postgres::table_files::TableFiles;
use postgres::wal::Segment;
use postgres::wal_changes::WalChanges;
use postgres::{BackupOptions, BackupSession};
use proto::backup::Census;
use proto::proof::{CheckOutcome, ProofLevel};
use proto::{Lsn, SystemIdentifier};
use servers::{Server, job, shown};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

servers::on_each_major! {
    a_healthy_server_passes_every_check,
    an_empty_server_is_healthy,
    missing_rows_tables_and_databases_are_found,
    rows_within_the_bounds_are_accepted_and_beyond_them_not,
    a_canary_that_did_not_commit_is_found,
    a_damaged_page_is_found_by_its_checksum,
    a_damaged_page_of_an_index_is_found_by_its_checksum,
    a_missing_file_is_found,
    missing_toast_is_found_without_checksums,
    a_disordered_index_is_found_without_checksums,
    a_row_missing_in_an_index_is_found_when_asked,
    event_triggers_do_not_fire,
    the_wrong_cluster_and_a_missed_stop_position_are_found,
    another_collation_version_is_no_damage,
    a_database_that_the_census_could_not_see_is_not_called_compared,
    a_missing_library_is_no_damage,
    a_table_that_cannot_be_read_here_is_not_called_read,
    a_closed_database_is_read_too,
    without_amcheck_the_proof_says_so,
    code_of_an_index_that_finds_nothing_is_no_damage,
    a_server_that_dies_in_the_checks_is_a_finding,
    assertions_are_asked_read_only_within_their_time,
    assertions_read_everything_and_reach_nothing_else,
    assertions_that_there_is_no_time_for_are_skipped,
}

const PAGE: u64 = 8192;

/// What the census of a backup of this server says, and where the backup ended.
struct Backup {
    census: Census,
    stop_lsn: Lsn,
    system_identifier: SystemIdentifier,
}

async fn back_up(server: &Server) -> Backup {
    let options = BackupOptions {
        job: job(),
        label: "checks".to_owned(),
        slot_name: "pgmuster_checks".to_owned(),
        fast: true,
        system_identifier: None,
        start_deadline: None,
        cancel: CancellationToken::new(),
    };
    let target = server.target("postgres");
    let mut backup =
        BackupSession::begin(&target, &options).await.unwrap_or_else(|e| panic!("{}", shown(&e)));
    let options = CensusOptions {
        job: job(),
        deadline: Instant::now() + Duration::from_mins(1),
        table_limit: Duration::from_secs(10),
        cancel: CancellationToken::new(),
    };
    let draft = take_census(&target, &options, &TableFiles::default()).await.unwrap();
    let stopped = backup.stop(&CancellationToken::new()).await.unwrap();
    let started = backup.started().clone();
    let size = started.server.wal_segment_size;
    let mut changes = WalChanges::new(started.server.version, started.start_lsn);
    let last = Segment::ending_at(stopped.stop_lsn, started.timeline, size);
    let mut segment = Segment::containing(started.start_lsn, started.timeline, size);
    while segment != last.next() {
        let bytes = std::fs::read(server.wal_directory().join(segment.file_name(size))).unwrap();
        changes.feed(segment.start(size), &bytes).unwrap();
        segment = segment.next();
    }
    let census =
        finish_census(&target, &options, draft, Some(&changes), stopped.stop_lsn).await.unwrap();
    backup.finish().await;
    // What a restore does at its end: the control file then holds a position after the stop.
    server.run("postgres", &["CHECKPOINT"]).await;
    Backup {
        census,
        stop_lsn: stopped.stop_lsn,
        system_identifier: started.server.system_identifier,
    }
}

impl Backup {
    fn options(&self) -> CheckOptions<'_> {
        CheckOptions {
            job: job(),
            level: ProofLevel::L5,
            origin: Origin::Copy {
                system_identifier: self.system_identifier,
                stop_lsn: self.stop_lsn,
            },
            census: Some(&self.census),
            assertions: &[],
            every_row_in_indexes: false,
            ask_until: None,
            deadline: Some(Instant::now() + Duration::from_mins(2)),
            cancel: CancellationToken::new(),
        }
    }

    async fn check(&self, server: &Server) -> CheckReport {
        self.check_with(server, &self.options()).await
    }

    async fn check_with(&self, server: &Server, options: &CheckOptions<'_>) -> CheckReport {
        run_checks(&server.target("postgres"), options)
            .await
            .unwrap_or_else(|e| panic!("{}", shown(&e)))
    }
}

fn outcome(report: &CheckReport, name: &str) -> (CheckOutcome, String) {
    let check = report
        .checks
        .iter()
        .find(|check| check.name == name)
        .unwrap_or_else(|| panic!("no check {name}"));
    (check.outcome, check.detail.clone())
}

#[track_caller]
fn assert_failed(report: &CheckReport, name: &str, what: &str) {
    let (outcome, detail) = outcome(report, name);
    assert!(
        outcome == CheckOutcome::Failed && detail.contains(what),
        "{name}: {outcome:?} {detail}"
    );
}

#[track_caller]
fn assert_healthy(report: &CheckReport) {
    let bad: Vec<_> = report.failed().collect();
    assert!(bad.is_empty(), "{bad:#?}");
    assert_eq!(report.level_reached(), Some(ProofLevel::L5), "{:#?}", report.checks);
}

/// Something of everything.
const CONTENT: &[&str] = &[
    "CREATE TABLE orders (id int PRIMARY KEY, note text, n int GENERATED ALWAYS AS (id * 2) STORED)",
    "INSERT INTO orders SELECT g, 'note ' || g FROM generate_series(1, 5000) g",
    "CREATE INDEX ON orders (note)",
    "CREATE INDEX ON orders USING hash (note)",
    "CREATE INDEX ON orders USING brin (id)",
    "CREATE TABLE documents (id int, body text)",
    "INSERT INTO documents SELECT h, (SELECT string_agg(md5(g::text || h::text), '') FROM generate_series(1, 300) g) \
     FROM generate_series(1, 20) h",
    "CREATE TABLE parts (id int) PARTITION BY HASH (id)",
    "CREATE TABLE part_0 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
    "CREATE TABLE part_1 PARTITION OF parts FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
    "INSERT INTO parts SELECT generate_series(1, 100)",
    "CREATE UNLOGGED TABLE unlogged AS SELECT 1 AS id",
    "CREATE MATERIALIZED VIEW filled AS SELECT * FROM orders WHERE id < 10",
    "CREATE MATERIALIZED VIEW unfilled AS SELECT 1 AS id WITH NO DATA",
    "CREATE SEQUENCE numbers",
    "CREATE FOREIGN DATA WRAPPER nowhere",
    "CREATE SERVER nowhere FOREIGN DATA WRAPPER nowhere",
    "CREATE FOREIGN TABLE far (id int) SERVER nowhere",
    r#"CREATE TABLE "a'b ""c"" \d; -- é" AS SELECT generate_series(1, 3) AS id"#,
    "CREATE DATABASE second",
];

async fn filled(major: u32) -> Server {
    let server = Server::start(major, &[]).await;
    server.run("postgres", CONTENT).await;
    server.run("second", &["CREATE TABLE t AS SELECT generate_series(1, 42) AS id"]).await;
    server
}

async fn a_healthy_server_passes_every_check(major: u32) {
    let server = filled(major).await;
    let backup = back_up(&server).await;
    let options = CheckOptions { every_row_in_indexes: true, ..backup.options() };
    let report = backup.check_with(&server, &options).await;
    assert_healthy(&report);
    for check in &report.checks {
        assert_eq!(check.outcome, CheckOutcome::Passed, "{check:?}");
    }
    assert_eq!(report.server_version_num / 10_000, major);
    assert_eq!((report.tables_exact, report.tables_bounded), (7, 0));
    assert!(report.rows >= 5000 + 20 + 100 + 9 + 3 + 42, "{}", report.rows);
    assert!(report.reached_lsn >= Some(backup.stop_lsn));

    // Checking again finds our own extensions in place and is as content.
    assert_healthy(&backup.check(&server).await);
    let lower = CheckOptions { level: ProofLevel::L4, ..backup.options() };
    let report = backup.check_with(&server, &lower).await;
    assert_eq!(report.level_reached(), Some(ProofLevel::L4));
    assert!(report.checks.iter().all(|check| check.level <= ProofLevel::L4));
}

async fn an_empty_server_is_healthy(major: u32) {
    let server = Server::start(major, &[]).await;
    let backup = back_up(&server).await;
    let report = backup.check(&server).await;
    assert_healthy(&report);
    assert_eq!((report.tables, report.rows), (0, 0));

    let blind = CheckOptions { census: None, ..backup.options() };
    let report = backup.check_with(&server, &blind).await;
    assert_eq!(
        report.level_reached(),
        Some(ProofLevel::L4),
        "without a census there is nothing to compare with"
    );
    assert_eq!(report.failed().count(), 0);
}

async fn missing_rows_tables_and_databases_are_found(major: u32) {
    let server = filled(major).await;
    let backup = back_up(&server).await;
    server
        .run(
            "postgres",
            &["DELETE FROM orders WHERE id = 17", "DROP TABLE documents", "DROP DATABASE second"],
        )
        .await;
    let report = backup.check(&server).await;
    assert_failed(
        &report,
        "row_counts",
        "public.orders in postgres has 4999 rows, 5000 were there",
    );
    assert_failed(&report, "relations_present", "table public.documents in postgres is missing");
    assert_failed(&report, "relations_present", "database second is missing");
    assert_eq!(report.level_reached(), Some(ProofLevel::L4));
}

async fn rows_within_the_bounds_are_accepted_and_beyond_them_not(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run("postgres", &["CREATE TABLE t AS SELECT generate_series(1, 10) AS id"]).await;
    let mut backup = back_up(&server).await;
    backup.census.databases[0].tables[0].drift = Some((2, 3));
    for (change, good) in [
        ("SELECT 1", true),
        ("INSERT INTO t VALUES (1), (2), (3)", true),
        ("INSERT INTO t VALUES (4)", false),
        ("DELETE FROM t WHERE ctid IN (SELECT ctid FROM t LIMIT 6)", true),
        ("DELETE FROM t WHERE ctid IN (SELECT ctid FROM t LIMIT 1)", false),
    ] {
        server.run("postgres", &[change]).await;
        let report = backup.check(&server).await;
        assert_eq!(report.failed().count() == 0, good, "{change}: {:#?}", report.checks);
        assert_eq!((report.tables_exact, report.tables_bounded), (0, 1));
    }
    // Nothing bounds the only table: nothing was compared.
    backup.census.databases[0].tables[0].drift = None;
    let report = backup.check(&server).await;
    let (outcome, detail) = outcome(&report, "row_counts");
    assert!(
        outcome == CheckOutcome::Skipped && detail.contains("how many rows 1 table had"),
        "{detail}"
    );
    assert_eq!((report.level_reached(), report.failed().count()), (Some(ProofLevel::L4), 0));
}

async fn a_canary_that_did_not_commit_is_found(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut backup = back_up(&server).await;
    let session = server.session("postgres").await;
    session.run("begin", "BEGIN").await.unwrap();
    let id: String =
        session.one("assign", "SELECT pg_current_xact_id()::text", &[]).await.unwrap().get(0);
    session.run("end", "ROLLBACK").await.unwrap();
    backup.census.canary = Some(id);
    assert_failed(&backup.check(&server).await, "canary", "aborted");
    backup.census.canary = Some("4000000000".to_owned());
    assert_failed(&backup.check(&server).await, "canary", "4000000000");
}

/// Where the main fork of a relation is on disk.
async fn file_of(server: &Server, relation: &str) -> PathBuf {
    let session = server.session("postgres").await;
    let sql = format!("SELECT pg_relation_filepath('{relation}')");
    let path: String = session.one("ask", &sql, &[]).await.unwrap().get(0);
    session.close().await;
    server.instance.data_directory().join(path)
}

/// Changes a page of a relation behind the server's back.
async fn damage(server: &mut Server, relation: &str, page: u64, change: impl FnOnce(&mut [u8])) {
    let path = file_of(server, relation).await;
    server.run("postgres", &["CHECKPOINT"]).await;
    server.instance.stop(StopMode::Fast).await.unwrap();
    let mut file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
    let mut bytes = vec![0; usize::try_from(PAGE).unwrap()];
    file.seek(SeekFrom::Start(page * PAGE)).unwrap();
    file.read_exact(&mut bytes).unwrap();
    change(&mut bytes);
    file.seek(SeekFrom::Start(page * PAGE)).unwrap();
    file.write_all(&bytes).unwrap();
    drop(file);
    server.instance.start().await.unwrap();
}

async fn a_damaged_page_is_found_by_its_checksum(major: u32) {
    let mut server = filled(major).await;
    let backup = back_up(&server).await;
    damage(&mut server, "orders", 3, |page| page[5000] ^= 0x40).await;
    let report = backup.check(&server).await;
    assert_failed(&report, "page_checksums", "public.orders");
    assert_failed(&report, "tables_readable", "public.orders");
    // Everything else was still looked at.
    assert_eq!(outcome(&report, "collations").0, CheckOutcome::Passed);
    assert_eq!(report.level_reached(), Some(ProofLevel::L3));
}

async fn a_damaged_page_of_an_index_is_found_by_its_checksum(major: u32) {
    let mut server = filled(major).await;
    let backup = back_up(&server).await;
    damage(&mut server, "orders_note_idx1", 2, |page| page[6000] ^= 0x01).await;
    let report = backup.check(&server).await;
    assert_failed(&report, "page_checksums", "orders_note_idx1");
}

async fn a_missing_file_is_found(major: u32) {
    let mut server = filled(major).await;
    let backup = back_up(&server).await;
    let path = file_of(&server, "documents").await;
    server.instance.stop(StopMode::Fast).await.unwrap();
    std::fs::remove_file(path).unwrap();
    server.instance.start().await.unwrap();
    let report = backup.check(&server).await;
    assert_failed(&report, "tables_readable", "public.documents in postgres");
    assert_failed(
        &report,
        "row_counts",
        "public.documents in postgres could not be counted, 20 rows were there",
    );
}

async fn missing_toast_is_found_without_checksums(major: u32) {
    let mut server = Server::with(major, &[], |options| options.checksums = false).await;
    server.run("postgres", CONTENT).await;
    let backup = back_up(&server).await;
    let report = backup.check(&server).await;
    assert_healthy(&report);
    assert_eq!(outcome(&report, "page_checksums").0, CheckOutcome::Skipped);
    // The first chunk's line pointer becomes unused. Neither a count of rows nor amcheck of the table sees that.
    let table = server.number("SELECT 'documents'::regclass::oid::int8").await;
    damage(&mut server, &format!("pg_toast.pg_toast_{table}"), 0, |page| page[24..28].fill(0))
        .await;
    assert_failed(&backup.check(&server).await, "tables_readable", "public.documents in postgres");
}

async fn a_disordered_index_is_found_without_checksums(major: u32) {
    let mut server = Server::with(major, &[], |options| options.checksums = false).await;
    server.run("postgres", CONTENT).await;
    let backup = back_up(&server).await;
    // The line pointers of two entries of the first leaf change places; a count by sequential scan sees nothing of it.
    damage(&mut server, "orders_pkey", 1, |page| {
        let (a, b) = page.split_at_mut(24 + 4 * 20);
        a[24 + 4 * 10..24 + 4 * 11].swap_with_slice(&mut b[..4]);
    })
    .await;
    let report = backup.check(&server).await;
    assert_failed(&report, "amcheck_indexes", "public.orders_pkey in postgres");
    assert_eq!(outcome(&report, "row_counts").0, CheckOutcome::Passed);
}

async fn a_row_missing_in_an_index_is_found_when_asked(major: u32) {
    let server = filled(major).await;
    let backup = back_up(&server).await;
    let off_and_on = |on: bool| {
        format!(
            "UPDATE pg_index SET indisready = {on} WHERE indexrelid = 'orders_note_idx'::regclass"
        )
    };
    server
        .run(
            "postgres",
            &[
                "DELETE FROM orders WHERE id = 1",
                &off_and_on(false),
                "INSERT INTO orders (id, note) VALUES (1, 'not indexed')",
                &off_and_on(true),
            ],
        )
        .await;
    assert_healthy(&backup.check(&server).await);
    let options = CheckOptions { every_row_in_indexes: true, ..backup.options() };
    assert_failed(
        &backup.check_with(&server, &options).await,
        "amcheck_indexes",
        "public.orders_note_idx in postgres",
    );
}

fn assertion(name: &str, sql: &str) -> Assertion {
    Assertion {
        name: name.to_owned(),
        database: "postgres".parse().unwrap(),
        sql: sql.to_owned(),
        within: Duration::from_secs(30),
    }
}

/// A question that nobody lives to hear the answer of.
const ENDLESS: &str =
    "SELECT count(*) = 0 FROM pg_class a, pg_class b, pg_class c, pg_class d, pg_class e";

async fn assertions_are_asked_read_only_within_their_time(major: u32) {
    let server = filled(major).await;
    server
        .run(
            "postgres",
            &[
                "CREATE FUNCTION public.writes() RETURNS boolean LANGUAGE sql AS \
                 'INSERT INTO public.orders (id) VALUES (0) RETURNING true'",
                "CREATE FUNCTION public.stays() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN LOOP \
                 BEGIN LOOP NULL; END LOOP; EXCEPTION WHEN query_canceled THEN END; END LOOP; END $$",
                "CREATE FUNCTION public.raises() RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN RAISE 'note'; END $$",
            ],
        )
        .await;
    let backup = back_up(&server).await;
    let holds = assertion("holds", "SELECT count(*) = 5000 FROM public.orders; -- all");
    let elsewhere = Assertion {
        database: "second".parse().unwrap(),
        ..assertion("elsewhere", "SELECT max(id) = 42 FROM public.t")
    };
    let sound = [holds.clone(), elsewhere.clone()];
    let options = CheckOptions { level: ProofLevel::L6, assertions: &sound, ..backup.options() };
    let report = backup.check_with(&server, &options).await;
    assert_eq!(report.level_reached(), Some(ProofLevel::L6), "{:#?}", report.checks);
    let told = report.assertions.iter().find(|asked| asked.name == "elsewhere").unwrap();
    assert_eq!((told.answer.as_str(), told.database.as_str()), ("true", "second"));
    // Whoever asks for less is not told of them, and nothing that was asked is no L6.
    let less = CheckOptions { level: ProofLevel::L5, ..options.clone() };
    assert_healthy(&backup.check_with(&server, &less).await);
    let none = CheckOptions { assertions: &[], ..options.clone() };
    assert_healthy(&backup.check_with(&server, &none).await);

    let late = |name: &str, sql: &str| Assertion {
        within: Duration::from_millis(100),
        ..assertion(name, sql)
    };
    let nowhere =
        Assertion { database: "nowhere".parse().unwrap(), ..assertion("nowhere", "SELECT true") };
    let wrong = [
        (assertion("false", "SELECT count(*) = 4 FROM public.orders"), "false"),
        (assertion("null", "SELECT NULL::boolean"), "NULL"),
        (assertion("no_row", "SELECT true FROM public.orders WHERE id < 0"), "no row"),
        (assertion("rows", "SELECT true FROM public.orders"), "more than one row"),
        (assertion("many", "SELECT generate_series(1, 1000000000000) > 0"), "more than one row"),
        (
            assertion("errs", "SELECT 1 / (id - id) = 0 FROM public.orders"),
            "error 22012 (division_by_zero)",
        ),
        (
            assertion("text", "SELECT bool_and(note::bigint > 0) FROM public.orders"),
            "error 22P02 (invalid_text_representation)",
        ),
        (assertion("raises", "SELECT public.raises()"), "error P0001 (raise_exception)"),
    ];
    let unasked = [
        (assertion("typo", "SELEKT true"), "syntax error"),
        (assertion("constant", "SELECT 'one'::int = 1"), "error 22P02"),
        (assertion("number", "SELECT 1"), "its column is of type int4, not boolean"),
        (assertion("columns", "SELECT true, true"), "it has 2 columns, not one"),
        (assertion("parameter", "SELECT $1::boolean"), "it has parameters"),
        (assertion("two", "SELECT true; SELECT true"), "cannot insert multiple commands"),
        (assertion("leaves", "COMMIT"), "it has 0 columns"),
        (
            assertion("table", "SELECT bool_and(('note' || id)::regclass > 0) FROM public.orders"),
            "error 42P01 (syntax_error_or_access_rule_violation)",
        ),
        (assertion("unqualified", "SELECT count(*) > 0 FROM orders"), "does not exist"),
        (
            assertion("deletes", "DELETE FROM public.orders WHERE id = 1 RETURNING true"),
            "cannot execute DELETE in a read-only transaction",
        ),
        (
            assertion("writes", "SELECT public.writes()"),
            "cannot execute INSERT in a read-only transaction",
        ),
        (late("stays", "SELECT public.stays()"), "no answer within 100ms"),
        (
            assertion(
                "lets_itself_write",
                "SELECT set_config('transaction_read_only', 'off', false) = 'off'",
            ),
            "transaction read-write mode must be set before any query",
        ),
        (late("late", ENDLESS), "no answer within 100ms"),
        (nowhere, "database \"nowhere\" does not exist"),
    ];
    let both = wrong.iter().chain(&unasked);
    let mut asked: Vec<Assertion> = both.map(|(assertion, _)| assertion.clone()).collect();
    asked.extend([holds, elsewhere]);
    let all = CheckOptions { assertions: &asked, ..options.clone() };
    let report = backup.check_with(&server, &all).await;
    assert_eq!(report.level_reached(), Some(ProofLevel::L5), "{:#?}", report.checks);
    assert!(report.saw_damage);
    for (outcome, group) in [(CheckOutcome::Failed, &wrong[..]), (CheckOutcome::Skipped, &unasked)]
    {
        for (assertion, why) in group {
            let told = report.assertions.iter().find(|asked| asked.name == assertion.name).unwrap();
            assert!(told.outcome == outcome && told.answer.contains(why), "{why}: {told:?}");
            assert!(!told.answer.contains("note"), "a row's value: {told:?}");
        }
    }
    assert_eq!(report.assertions.len(), asked.len(), "{:#?}", report.assertions);
    // What could not be asked says nothing against the data.
    let asked: Vec<Assertion> = unasked.into_iter().map(|(assertion, _)| assertion).collect();
    let mute = CheckOptions { assertions: &asked, ..options };
    let report = backup.check_with(&server, &mute).await;
    assert_healthy(&report);
    assert!(!report.saw_damage, "{:#?}", report.assertions);
    assert_eq!(server.number("SELECT count(*) FROM public.orders").await, 5000);
}

async fn assertions_read_everything_and_reach_nothing_else(major: u32) {
    let server = filled(major).await;
    let ran = server.wal_directory().join("../ran");
    let program = format!("touch {}", ran.display());
    let runs = |name: &str, more: &str| {
        format!(
            "CREATE FUNCTION public.{name}() RETURNS boolean LANGUAGE plpgsql {more} AS \
             $$ BEGIN COPY (SELECT 1) TO PROGRAM '{program}'; RETURN true; END $$"
        )
    };
    let (runs, runs_as_owner) = (runs("runs", ""), runs("runs_as_owner", "SECURITY DEFINER"));
    let statements = [
        runs.as_str(),
        runs_as_owner.as_str(),
        "CREATE VIEW public.calls AS SELECT public.runs() AS good",
        "CREATE SCHEMA hidden",
        "CREATE TABLE hidden.t AS SELECT 1 AS id",
        "ALTER TABLE hidden.t ENABLE ROW LEVEL SECURITY",
        "REVOKE ALL ON SCHEMA hidden FROM PUBLIC",
        "REVOKE CONNECT ON DATABASE second FROM PUBLIC",
        "ALTER DATABASE second CONNECTION LIMIT 0",
        "ALTER DATABASE second SET statement_timeout = 1",
    ];
    server.run("postgres", &statements).await;
    let has_file_fdw =
        server.number("SELECT count(*) FROM pg_available_extensions WHERE name = 'file_fdw'").await;
    let mut reaches = vec![
        (assertion("view", "SELECT good FROM public.calls"), "SQLSTATE 42501"),
        (assertion("owner", "SELECT public.runs_as_owner()"), "SQLSTATE 42501"),
        (
            assertion("file", "SELECT pg_read_file('postgresql.conf') IS NOT NULL"),
            "permission denied for function pg_read_file",
        ),
        (assertion("far", "SELECT count(*) > 0 FROM public.far"), "has no handler"),
    ];
    if has_file_fdw == 1 {
        let files = [
            "CREATE EXTENSION file_fdw",
            "CREATE SERVER files FOREIGN DATA WRAPPER file_fdw",
            &format!(
                "CREATE FOREIGN TABLE public.program (line text) SERVER files OPTIONS (program '{program}')"
            ),
        ];
        server.run("postgres", &files).await;
        let program = assertion("program", "SELECT count(*) = 0 FROM public.program");
        reaches.push((program, "has no handler"));
    }
    let backup = back_up(&server).await;
    let mut asked: Vec<Assertion> =
        reaches.iter().map(|(assertion, _)| assertion.clone()).collect();
    asked.push(assertion("hidden", "SELECT count(*) = 1 FROM hidden.t"));
    asked.push(Assertion {
        database: "second".parse().unwrap(),
        ..assertion("closed", "SELECT count(*) = 42 FROM public.t")
    });
    let options = CheckOptions { level: ProofLevel::L6, assertions: &asked, ..backup.options() };
    let report = backup.check_with(&server, &options).await;
    assert!(!ran.exists(), "a program of this machine was run");
    for told in &report.assertions {
        match reaches.iter().find(|(assertion, _)| assertion.name == told.name) {
            Some((_, why)) => {
                let refused = told.outcome == CheckOutcome::Skipped && told.answer.contains(why);
                assert!(refused, "{why}: {told:?}");
            }
            None => assert_eq!(told.outcome, CheckOutcome::Passed, "{told:?}"),
        }
    }
    assert_eq!(report.assertions.len(), asked.len(), "{:#?}", report.assertions);
}

async fn assertions_that_there_is_no_time_for_are_skipped(major: u32) {
    let server = filled(major).await;
    let backup = back_up(&server).await;
    let asked = [assertion("long", ENDLESS), assertion("next", "SELECT true")];
    let asked = asked.map(|assertion| Assertion { within: Duration::from_hours(1), ..assertion });
    let options = CheckOptions {
        level: ProofLevel::L6,
        assertions: &asked,
        ask_until: Some(Instant::now() + Duration::from_secs(5)),
        ..backup.options()
    };
    let report = backup.check_with(&server, &options).await;
    assert_healthy(&report);
    assert!(!report.saw_damage);
    let told = report.assertions.iter().map(|asked| asked.outcome);
    assert!(told.eq([CheckOutcome::Skipped; 2]), "{:?}", report.assertions);
    assert!(report.assertions[0].answer.contains("time"), "{:?}", report.assertions);
}

async fn event_triggers_do_not_fire(major: u32) {
    let server = filled(major).await;
    server
        .run(
            "postgres",
            &[
                "CREATE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'it fired'; END $$",
                "CREATE EVENT TRIGGER refuse ON ddl_command_start EXECUTE FUNCTION refuse()",
            ],
        )
        .await;
    let backup = back_up(&server).await;
    let report = backup.check(&server).await;
    assert_healthy(&report);
    assert_eq!(outcome(&report, "amcheck_indexes").0, CheckOutcome::Passed, "{:#?}", report.checks);
}

async fn the_wrong_cluster_and_a_missed_stop_position_are_found(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut backup = back_up(&server).await;
    backup.stop_lsn = Lsn(backup.stop_lsn.0 + (1 << 40));
    backup.system_identifier = SystemIdentifier(7);
    let report = backup.check(&server).await;
    assert_failed(&report, "stop_position", &format!("the backup ends at {}", backup.stop_lsn));
    assert_failed(&report, "system_identifier", "instead of 7");
    assert_eq!(report.level_reached(), None);
}

async fn another_collation_version_is_no_damage(major: u32) {
    let server = filled(major).await;
    let mut backup = back_up(&server).await;
    for database in &mut backup.census.databases {
        "libc 1.0".clone_into(&mut database.collation);
    }
    let report = backup.check(&server).await;
    let (collations, detail) = outcome(&report, "collations");
    assert_eq!(collations, CheckOutcome::Skipped);
    assert!(detail.contains("libc 1.0"), "{detail}");
    let (indexes, detail) = outcome(&report, "amcheck_indexes");
    assert!(indexes == CheckOutcome::Skipped && detail.contains("orders_note_idx"), "{detail}");
    assert_eq!(
        report.level_reached(),
        Some(ProofLevel::L5),
        "two machines differ, the backup is sound"
    );
}

async fn a_database_that_the_census_could_not_see_is_not_called_compared(major: u32) {
    let server = filled(major).await;
    let mut backup = back_up(&server).await;
    assert!(backup.census.unseen.is_empty(), "{:?}", backup.census.unseen);
    backup.census.unseen.push("late".to_owned());
    let report = backup.check(&server).await;
    let (rows, detail) = outcome(&report, "row_counts");
    assert!(rows == CheckOutcome::Skipped && detail.contains("database late"), "{detail}");
    assert_eq!((report.level_reached(), report.failed().count()), (Some(ProofLevel::L4), 0));
}

async fn a_missing_library_is_no_damage(major: u32) {
    let server = filled(major).await;
    server
        .run(
            "postgres",
            &[
                "CREATE FUNCTION lost() RETURNS int LANGUAGE c AS '$libdir/plpgsql', 'plpgsql_call_handler'",
                "UPDATE pg_proc SET probin = '$libdir/not_installed_here' WHERE proname = 'lost'",
            ],
        )
        .await;
    let backup = back_up(&server).await;
    let asked = [assertion("sound", "SELECT true"), assertion("lost", "SELECT public.lost() = 1")];
    let options = CheckOptions { level: ProofLevel::L6, assertions: &asked, ..backup.options() };
    let report = backup.check_with(&server, &options).await;
    let told = report.assertions.iter().map(|asked| asked.outcome);
    assert!(told.eq([CheckOutcome::Passed, CheckOutcome::Skipped]), "{:?}", report.assertions);
    assert!(!report.saw_damage, "{:#?}", report.checks);
    let (libraries, detail) = outcome(&report, "extensions_load");
    assert!(
        libraries == CheckOutcome::Skipped && detail.contains("not_installed_here"),
        "{detail}"
    );
    assert_eq!(report.level_reached(), Some(ProofLevel::L5));
}

async fn a_table_that_cannot_be_read_here_is_not_called_read(major: u32) {
    let server = filled(major).await;
    server
        .run(
            "postgres",
            &[
                "CREATE EXTENSION hstore SCHEMA public",
                "CREATE TABLE pairs AS SELECT hstore('a', 'b') AS pair",
                "UPDATE pg_proc SET probin = '$libdir/not_installed_here' WHERE proname = 'hstore_out'",
            ],
        )
        .await;
    let backup = back_up(&server).await;
    let report = backup.check(&server).await;
    let (readable, detail) = outcome(&report, "tables_readable");
    assert_eq!(readable, CheckOutcome::Skipped, "{detail}");
    for told in ["public.pairs in postgres", "not_installed_here"] {
        assert!(detail.contains(told), "{detail}");
    }
    assert_eq!((report.level_reached(), report.failed().count()), (Some(ProofLevel::L3), 0));
}

async fn a_closed_database_is_read_too(major: u32) {
    let server = filled(major).await;
    server.run("postgres", &["ALTER DATABASE second ALLOW_CONNECTIONS false"]).await;
    let backup = back_up(&server).await;
    let tables_of = async || {
        let report = backup.check(&server).await;
        assert_healthy(&report);
        report.tables
    };
    let closed = tables_of().await;
    server.run("postgres", &["ALTER DATABASE second ALLOW_CONNECTIONS true"]).await;
    assert_eq!(closed, tables_of().await);
}

async fn without_amcheck_the_proof_says_so(major: u32) {
    let server = filled(major).await;
    // A function of its name stands in the way of the extension.
    server
        .run(
            "postgres",
            &[
                "CREATE SCHEMA pgmuster_checks",
                "CREATE FUNCTION pgmuster_checks.bt_index_check(regclass) RETURNS void LANGUAGE sql AS ''",
            ],
        )
        .await;
    let backup = back_up(&server).await;
    let report = backup.check(&server).await;
    for check in ["amcheck_tables", "amcheck_indexes"] {
        let (outcome, detail) = outcome(&report, check);
        assert_eq!(outcome, CheckOutcome::Skipped, "{check}: {detail}");
        assert!(detail.contains("postgres without extension amcheck"), "{check}: {detail}");
    }
    assert_eq!((report.level_reached(), report.failed().count()), (Some(ProofLevel::L5), 0));
}

async fn code_of_an_index_that_finds_nothing_is_no_damage(major: u32) {
    let server = filled(major).await;
    server
        .run(
            "postgres",
            &[
                "CREATE TABLE rates AS SELECT 1 AS id",
                "CREATE FUNCTION rated(int) RETURNS int IMMUTABLE LANGUAGE plpgsql \
                 AS 'BEGIN RETURN (SELECT count(*) FROM rates); END'",
                "CREATE TABLE goods AS SELECT generate_series(1, 10) AS id",
                // From 17 on the index is built with the search_path that the check has, too.
                "ALTER FUNCTION rated(int) SET search_path = public",
                "CREATE INDEX goods_rated ON goods (rated(id))",
                "ALTER FUNCTION rated(int) RESET search_path",
            ],
        )
        .await;
    let backup = back_up(&server).await;
    let options = CheckOptions { every_row_in_indexes: true, ..backup.options() };
    let report = backup.check_with(&server, &options).await;
    let (indexes, detail) = outcome(&report, "amcheck_indexes");
    assert_eq!(indexes, CheckOutcome::Skipped, "{detail}");
    assert!(detail.contains("rows of public.goods_rated in postgres"), "{detail}");
    assert_eq!((report.level_reached(), report.failed().count()), (Some(ProofLevel::L5), 0));
}

async fn a_server_that_dies_in_the_checks_is_a_finding(major: u32) {
    let mut server = filled(major).await;
    let backup = back_up(&server).await;
    let holder = server.session("second").await;
    holder.run("lock", "BEGIN; LOCK TABLE t IN ACCESS EXCLUSIVE MODE").await.unwrap();
    let target = server.target("postgres");
    let options = backup.options();
    let (report, ()) = tokio::join!(run_checks(&target, &options), async {
        // The last database is being read, and everything of the first has been.
        let waiting =
            "SELECT count(*) FROM pg_locks WHERE NOT granted AND mode = 'AccessShareLock'";
        server.until(waiting, 1).await;
        server.instance.stop(StopMode::Immediate).await.unwrap();
    });
    let report = report.unwrap_or_else(|e| panic!("{}", shown(&e)));
    assert_failed(&report, "tables_readable", "public.t in second");
    assert_failed(&report, "canary", "transaction");
    assert_eq!(report.level_reached(), Some(ProofLevel::L3));
}
