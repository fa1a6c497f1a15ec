//! Proofs of logical backups on real servers: what they show, what they blame on the dump, and what on the machine.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use house::dumps::{dump, dump_with, programs, quick, scope, stands_still};
use house::{DATA, House, eventually, run_sql, session};
use postgres::instance::InstanceOptions;
use proto::job::BackupOutcome;
use proto::proof::CheckOutcome;
use proto::{Action, BackupKind, Code, Failure, Proof, ProofLevel};
use repository::store::directory::DirectoryStore;
use repository::{KeyFile, Repository};
use worker::proving;

const ODD: &str = "it's \"odd\" é/..";

async fn prove(
    house: &House,
    outcome: &BackupOutcome,
    level: ProofLevel,
) -> Result<Proof, Failure> {
    let repository = house.reopened().await;
    let backup = repository.open_backup(outcome.lineage, outcome.backup).await.unwrap();
    house.prove_as(&house.cx(), &backup, level).await
}

fn outcome_of(proof: &Proof, name: &str) -> CheckOutcome {
    let check = proof.checks.iter().find(|check| check.name == name);
    check.unwrap_or_else(|| panic!("no check {name}: {:#?}", proof.checks)).outcome
}

/// Databases with whatever a dump brings along that could act by itself, or reach outside.
async fn fill(house: &House) -> PathBuf {
    let outside = house.place.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    house.sql(DATA).await;
    house.sql("CREATE ROLE \"own'er\" LOGIN PASSWORD 'secret'").await;
    house.sql("CREATE ROLE reader; GRANT reader TO \"own'er\"").await;
    house.sql("ALTER ROLE postgres SET search_path = nowhere").await;
    house.sql(&format!("CREATE TABLESPACE fast LOCATION '{}'", outside.display())).await;
    let quoted = postgres::quote::identifier(ODD);
    house.sql(&format!("CREATE DATABASE {quoted} OWNER \"own'er\" TABLESPACE fast")).await;
    house.sql(&format!("ALTER DATABASE {quoted} SET default_transaction_read_only = on")).await;
    let url = format!("{}?options=-cdefault_transaction_read_only%3Doff", house.server.url(ODD));
    let content = "
        CREATE SCHEMA shop AUTHORIZATION \"own'er\";
        CREATE TABLE shop.sale (id bigint, at date, PRIMARY KEY (id, at)) PARTITION BY RANGE (at);
        CREATE TABLE shop.sale_25 PARTITION OF shop.sale FOR VALUES FROM ('2025-01-01') TO ('2026-01-01');
        CREATE TABLE shop.sale_26 PARTITION OF shop.sale FOR VALUES FROM ('2026-01-01') TO ('2027-01-01') TABLESPACE pg_default;
        INSERT INTO shop.sale SELECT g, '2025-12-01'::date + g % 60 FROM generate_series(1, 5000) g;
        CREATE TABLE shop.item (id int PRIMARY KEY, note text CHECK (note <> ''));
        INSERT INTO shop.item SELECT g, 'note ' || g FROM generate_series(1, 300) g;
        ALTER TABLE shop.item OWNER TO \"own'er\";
        GRANT SELECT ON shop.item TO reader;
        CREATE EXTENSION pg_trgm SCHEMA shop;
        CREATE INDEX ON shop.item USING gin (note shop.gin_trgm_ops);
        SELECT lo_from_bytea(4711, decode(repeat('00ff10', 5000), 'hex'));
        CREATE MATERIALIZED VIEW shop.total AS SELECT count(*) FROM shop.sale;
        CREATE PUBLICATION everything FOR ALL TABLES;
        CREATE SUBSCRIPTION far CONNECTION 'host=/nowhere dbname=x' PUBLICATION p WITH (connect = false);
        CREATE FUNCTION shop.no() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'nobody changes anything here'; END $$;
        CREATE EVENT TRIGGER no ON ddl_command_start EXECUTE FUNCTION shop.no();";
    run_sql(&url, content).await;
    outside
}

fn names_in(directory: &Path) -> Vec<std::ffi::OsString> {
    let mut names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    names
}

async fn all_of_a_dump_is_proved(major: u32) {
    let house = quick(major).await;
    let outside = fill(&house).await;
    let outcome = dump(&house, &scope(&[], &[])).await.unwrap();
    let before = names_in(&outside);

    let proof = prove(&house, &outcome, ProofLevel::L5).await.unwrap();
    assert!(proof.passed, "{:#?}", proof.checks);
    assert_eq!(proof.level_reached, Some(ProofLevel::L5));
    assert_eq!((proof.kind, proof.reached_lsn), (BackupKind::Logical, None));
    assert_eq!(proof.system_identifier, outcome.system_identifier);
    assert_eq!(proof.server_version_num.unwrap() / 10_000, major);
    // orders, empty, the odd one; two partitions and item: exactly as they were counted.
    assert_eq!((proof.tables_exact, proof.tables_bounded), (6, 0), "{proof:#?}");
    assert!(proof.rows >= 50_003 + 5_300, "{proof:#?}");
    for check in ["contents", "restored", "tables_readable", "row_counts", "extensions_present"] {
        assert_eq!(outcome_of(&proof, check), CheckOutcome::Passed, "{check}: {:#?}", proof.checks);
    }
    for check in ["stop_position", "page_checksums", "canary"] {
        assert!(
            !proof.checks.iter().any(|found| found.name == check),
            "{check} has no meaning here"
        );
    }
    assert!(proof.isolation.contains("no TCP"), "{}", proof.isolation);
    assert!(proof.recovery_time_ms() > 0);
    let sentence = proving::sentence(&proof);
    assert!(sentence.contains("PROVED (L5)"), "{sentence}");
    assert!(sentence.contains("nothing of the server's own files and WAL"), "{sentence}");
    assert_eq!(names_in(&outside), before, "a tablespace was made outside the room");

    let looked = prove(&house, &outcome, ProofLevel::L2).await.unwrap();
    assert!(looked.passed, "{:#?}", looked.checks);
    let names: Vec<&str> = looked.checks.iter().map(|check| check.name.as_str()).collect();
    assert_eq!(names, ["inventory", "contents", "decrypt"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg15_all_of_a_dump_is_loaded_and_counted_and_none_of_it_acts() {
    all_of_a_dump_is_proved(15).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pg18_all_of_a_dump_is_loaded_and_counted_and_none_of_it_acts() {
    all_of_a_dump_is_proved(18).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asserted_of_a_cluster_is_asked_of_its_loaded_dump() {
    let mut house = quick(15).await;
    house.sql(DATA).await;
    let outcome = dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    house.sql("DELETE FROM public.orders").await;
    house.assert_of_postgres(&[("all-there", "SELECT count(*) = 50000 FROM public.orders")]);
    let proof = prove(&house, &outcome, ProofLevel::L6).await.unwrap();
    assert!(proof.passed, "{:#?}", proof.checks);
    assert_eq!(proof.level(), Some(ProofLevel::L6));

    house.assert_of_postgres(&[
        ("all-there", "SELECT count(*) = 50000 FROM public.orders"),
        ("none", "SELECT count(*) = 0 FROM public.orders"),
        ("errs", "SELECT 1 / (id - id) = 0 FROM public.orders"),
        ("writes", "DELETE FROM public.orders WHERE id = 1 RETURNING true"),
        ("late", house::ENDLESS),
    ]);
    let proof = prove(&house, &outcome, ProofLevel::L6).await.unwrap();
    assert_eq!((proof.passed, proof.level()), (false, Some(ProofLevel::L5)));
    assert_eq!(house::unmet(&proof), ["none", "errs"]);
    assert_eq!(house::unasked(&proof), ["writes", "late"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_damaged_frame_of_a_dump_fails_its_proof() {
    let house = quick(15).await;
    // Longer than the stretch of which a table of contents is the beginning.
    let long = "CREATE TABLE public.long AS SELECT repeat(md5(g::text), 32) FROM generate_series(1, 20000) g";
    house.sql(long).await;
    let outcome = dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    let packs = house.place.path().join("repository/lineages");
    let packs = packs.join(outcome.lineage.to_string()).join("packs");
    let mut largest = (0, PathBuf::new());
    for directory in std::fs::read_dir(packs).unwrap() {
        for pack in std::fs::read_dir(directory.unwrap().path()).unwrap() {
            let pack = pack.unwrap();
            largest = largest.max((pack.metadata().unwrap().len(), pack.path()));
        }
    }
    let mut bytes = std::fs::read(&largest.1).unwrap();
    let late = bytes.len() * 4 / 5;
    bytes[late] ^= 1;
    std::fs::write(&largest.1, bytes).unwrap();

    for level in [ProofLevel::L2, ProofLevel::L5] {
        let proof = prove(&house, &outcome, level).await.unwrap();
        assert!(!proof.passed, "{:#?}", proof.checks);
        assert_eq!(proof.level_reached, Some(ProofLevel::L1), "{:#?}", proof.checks);
        let failed = if level == ProofLevel::L2 { "decrypt" } else { "restored" };
        assert_eq!(outcome_of(&proof, failed), CheckOutcome::Failed);
        let failure = proving::shortfall(&proof, None).unwrap();
        assert_eq!((failure.code, failure.action), (Code::ProofFailed, Action::FixData));
        assert!(failure.message.contains("packs/"), "it names the object: {failure}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_that_a_dump_does_not_bring_back_fail_its_proof() {
    let house = quick(15).await;
    house.sql(DATA).await;
    // A whole archive, and every program is content.
    let script = "exec $REAL \"$@\" --exclude-table-data=public.orders";
    let bin_dirs = programs(&house, "forgetful", script);
    let whole = scope(&["postgres"], &[]);
    let outcome = dump_with(&house, &house.cx(), &whole, &bin_dirs).await.unwrap();
    let proof = prove(&house, &outcome, ProofLevel::L5).await.unwrap();
    assert_eq!((proof.passed, proof.level_reached), (false, Some(ProofLevel::L4)));
    let check = proof.checks.iter().find(|check| check.name == "row_counts").unwrap();
    assert!(check.detail.contains("orders in postgres has 0 rows, 50000 were there"), "{check:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_extension_that_the_machine_lacks_is_named_and_not_held_against_the_dump() {
    let settings = |place: &Path| {
        let share = place.join("share/extension");
        std::fs::create_dir_all(&share).unwrap();
        std::fs::write(
            share.join("only_there.control"),
            "default_version = '1.0'\nrelocatable = true\n",
        )
        .unwrap();
        let sql = "CREATE FUNCTION only_there() RETURNS int LANGUAGE sql RETURN 1;\n";
        std::fs::write(share.join("only_there--1.0.sql"), sql).unwrap();
        vec![(
            "extension_control_path".to_owned(),
            format!("{}:$system", place.join("share").display()),
        )]
    };
    let place = tempfile::tempdir().unwrap();
    let options = InstanceOptions {
        fsync: false,
        settings: settings(place.path()),
        ..InstanceOptions::default()
    };
    let house = House::new(18, options).await;
    house.sql("CREATE DATABASE shop").await;
    run_sql(&house.server.url("shop"), "CREATE EXTENSION only_there").await;
    let outcome = dump(&house, &scope(&["shop"], &[])).await.unwrap();
    let failure = prove(&house, &outcome, ProofLevel::L3).await.unwrap_err();
    assert_eq!((failure.code, failure.action), (Code::SandboxUnfit, Action::RetryElsewhere));
    assert!(failure.message.contains("only_there of database shop"), "{failure}");
    assert!(failure.hint.contains("neither proved nor blamed"), "{failure:?}");
    // What needs no server is shown all the same.
    assert!(prove(&house, &outcome, ProofLevel::L2).await.unwrap().passed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_role_that_went_away_while_the_dump_was_taken_fails_the_proof() {
    let house = quick(15).await;
    house.sql("CREATE ROLE gone").await;
    house.sql("CREATE DATABASE aa").await;
    let url = house.server.url("aa");
    run_sql(&url, "CREATE TABLE public.t (x int); CREATE TABLE public.u (x int)").await;
    run_sql(&url, "ALTER TABLE public.u OWNER TO gone").await;
    let holder = session(&url).await;
    holder.run("lock", "BEGIN; LOCK TABLE public.t").await.unwrap();
    let changing = async {
        // pg_dump has read who owns what by now; the roles themselves are dumped after this database.
        stands_still(&house).await;
        run_sql(&url, "ALTER TABLE public.u OWNER TO postgres; DROP ROLE gone").await;
        holder.close().await;
    };
    let all = scope(&["aa"], &[]);
    let (outcome, ()) = tokio::join!(dump(&house, &all), changing);
    let outcome = outcome.unwrap();
    let proof = prove(&house, &outcome, ProofLevel::L3).await.unwrap();
    assert_eq!((proof.passed, proof.level_reached), (false, Some(ProofLevel::L1)));
    let check = proof.checks.iter().find(|check| check.name == "restored").unwrap();
    assert!(check.detail.contains("role \"gone\" does not exist"), "{check:?}");
    assert!(!check.detail.contains("Command was"), "{check:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_proof_of_a_dump_leaves_neither_a_server_nor_a_room() {
    let house = quick(15).await;
    house.sql(DATA).await;
    let outcome = dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    let repository = house.reopened().await;
    let backup = repository.open_backup(outcome.lineage, outcome.backup).await.unwrap();
    let cx = house.cx();
    let stopping = async {
        let loads =
            async || cx.steps().iter().any(|step| step.name == "restore postgres").then_some(());
        eventually("a database is loaded", Duration::from_mins(1), loads).await;
        cx.stop(Failure::new(Code::Cancelled, Action::Abandon, "told to stop"));
    };
    let (ended, ()) = tokio::join!(house.prove_as(&cx, &backup, ProofLevel::L5), stopping);
    let failure = ended.unwrap_err();
    assert_eq!((failure.code, failure.message.as_str()), (Code::Cancelled, "told to stop"));
    let sandbox = house.place.path().join("sandbox");
    let works_there = |entry: std::fs::DirEntry| {
        std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd.starts_with(&sandbox))
    };
    let left = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    assert_eq!(left.filter_map(|entry| works_there(entry).then_some(())).count(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dumps_that_an_earlier_program_stored_are_proved_by_todays() {
    let house = quick(15).await;
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../repository/tests/golden/v1-dump");
    let key = std::fs::read_to_string(golden.join("repository.key")).unwrap();
    let key: KeyFile = key.parse().unwrap();
    let store = Arc::new(DirectoryStore::new(golden.join("repository")));
    let repository = Repository::open(store, Some(&key)).await.unwrap();
    let lineages = repository.list_lineages().await.unwrap();
    let lineage = lineages.iter().find(|row| row.kind == BackupKind::Logical).unwrap().lineage;
    let backups = repository.list_backups(lineage).await.unwrap();
    assert_eq!(backups.len(), 2);
    for (summary, rows) in backups.iter().zip([3_007, 3_008]) {
        let backup = repository.open_backup(lineage, summary.backup().unwrap()).await.unwrap();
        let proof = house.prove_as(&house.cx(), &backup, ProofLevel::L5).await.unwrap();
        assert!(proof.passed, "{:#?}", proof.checks);
        assert_eq!((proof.tables_exact, proof.rows), (3, rows), "{proof:#?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_index_that_no_dump_brings_back_is_not_missed() {
    let house = quick(15).await;
    house.sql("CREATE TABLE public.t (x int); INSERT INTO public.t VALUES (1), (1)").await;
    house.sql("CREATE INDEX ON public.t (x)").await;
    let holder = session(&house.server.url("postgres")).await;
    let failed =
        holder.run("index", "CREATE UNIQUE INDEX CONCURRENTLY broken ON public.t (x)").await;
    failed.unwrap_err();
    holder.close().await;
    let left = "SELECT count(*) FROM pg_index WHERE NOT indisvalid";
    assert_eq!(house.number(left).await, 1);
    let outcome = dump(&house, &scope(&["postgres"], &[])).await.unwrap();
    let backup = house.repository.open_backup(outcome.lineage, outcome.backup).await.unwrap();
    let census = &backup.facts().census.as_ref().unwrap().databases[0];
    assert_eq!(census.relations, [('i', 1), ('r', 1)]);
    let proof = prove(&house, &outcome, ProofLevel::L5).await.unwrap();
    assert!(proof.passed, "{:#?}", proof.checks);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_view_that_was_filled_from_afar_stays_empty_and_the_dump_is_proved() {
    let house = quick(15).await;
    house.sql("CREATE TABLE public.near AS SELECT generate_series(1, 20) AS x").await;
    let socket = house.server.socket_directory().display();
    house.sql("CREATE DATABASE shop").await;
    let url = house.server.url("shop");
    let fill = format!(
        "CREATE EXTENSION postgres_fdw;
         CREATE SERVER far FOREIGN DATA WRAPPER postgres_fdw OPTIONS (host '{socket}', dbname 'postgres');
         CREATE USER MAPPING FOR postgres SERVER far OPTIONS (user 'postgres');
         CREATE FOREIGN TABLE public.far (x int) SERVER far OPTIONS (table_name 'near');
         CREATE VIEW public.through AS SELECT x FROM public.far;
         CREATE TABLE public.own AS SELECT 1 AS x;
         CREATE MATERIALIZED VIEW public.copy_of_far AS SELECT x FROM public.through;
         CREATE MATERIALIZED VIEW public.copy_of_copy AS SELECT count(*) FROM public.copy_of_far;
         CREATE MATERIALIZED VIEW public.copy_of_own AS SELECT x FROM public.own;"
    );
    run_sql(&url, &fill).await;
    let outcome = dump(&house, &scope(&["shop"], &[])).await.unwrap();
    let proof = prove(&house, &outcome, ProofLevel::L5).await.unwrap();
    assert!(proof.passed, "{:#?}", proof.checks);
    let check = proof.checks.iter().find(|check| check.name == "restored").unwrap();
    assert!(
        check.detail.ends_with("stay empty, because a sandbox reaches nothing: 2"),
        "{check:?}"
    );
}
