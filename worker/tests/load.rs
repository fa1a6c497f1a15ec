//! A server that is written to as fast as it can while it is backed up: what is restored is, page by page, what a standby of
//! it has at the same position.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;
mod pages;

use std::io::Read as _;
use std::sync::Arc;
use std::time::Duration;

use house::{
    Gated, House, caught_up, copies, copy_of, nothing_is_left_at, nothing_is_left_on, replay,
    run_sql, spawn, standby_of, within_limit,
};
use postgres::instance::{InstanceOptions, StopMode};
use proto::ProofLevel;

/// More than the writers hold in memory, so that a closed gate holds the readers back as well.
const NOISE_BYTES: u64 = 96 << 20;
/// Tables that are dropped in the middle.
const DOOMED: u32 = 40;

fn options(major: u32) -> InstanceOptions {
    let mut settings = vec![
        // The standby of the comparison reads the log where the server keeps it.
        ("wal_keep_size", "8GB"),
        ("max_prepared_transactions", "4"),
        ("autovacuum_naptime", "1s"),
        ("wal_level", "replica"),
    ];
    if major >= 15 {
        settings.push(("wal_compression", "pglz"));
    }
    let settings = settings.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    InstanceOptions { fsync: false, settings: settings.collect(), ..InstanceOptions::default() }
}

async fn prepare(house: &House) {
    let pgbench = house.server.binaries().program("pgbench").unwrap();
    let socket = house.server.socket_directory();
    let pgbench =
        pgbench.args(["-i", "-q", "-s", "4", "-U", "postgres", "-h"]).arg(socket).arg("postgres");
    let cancel = tokio_util::sync::CancellationToken::new();
    pgbench.run(Duration::from_mins(2), &cancel).await.unwrap();
    house
        .sql(&format!(
            "CREATE TABLE public.shrinks AS SELECT g, repeat('s', 500) AS t FROM generate_series(1, 20000) g;
             CREATE TABLE public.empties AS SELECT * FROM public.shrinks;
             CREATE TABLE public.rewritten AS SELECT * FROM public.shrinks;
             CREATE UNLOGGED TABLE public.fleeting AS SELECT * FROM public.shrinks;
             DO $$ BEGIN FOR i IN 1..{DOOMED} LOOP
                 EXECUTE format('CREATE TABLE public.doomed_%s AS SELECT g, md5(g::text) FROM generate_series(1, 1000) g', i);
             END LOOP; END $$"
        ))
        .await;
}

/// What an application does while its database is copied, beside transactions.
async fn churn(house: &House, major: u32, round: u32) {
    let url = house.server.url("postgres");
    if round == 0 {
        let drops = (1..=DOOMED).map(|i| format!("DROP TABLE public.doomed_{i};"));
        run_sql(&url, &drops.collect::<String>()).await;
        // Until then the server keeps an empty file of each.
        run_sql(&url, "CHECKPOINT").await;
    }
    for statement in [
        format!(
            "CREATE TABLE public.fresh_{round} AS SELECT g, md5(g::text) AS t FROM generate_series(1, 3000) g"
        ),
        format!("CREATE INDEX ON public.fresh_{round} (t)"),
        format!("DELETE FROM public.shrinks WHERE g > {}", 15_000 - 4_000 * round),
        "VACUUM public.shrinks".to_owned(),
        "TRUNCATE public.empties".to_owned(),
        "INSERT INTO public.empties SELECT g, 'again' FROM generate_series(1, 500) g".to_owned(),
        "UPDATE public.rewritten SET t = t || 'x' WHERE g % 3 = 0".to_owned(),
        "VACUUM FULL public.rewritten".to_owned(),
        format!(
            "BEGIN; INSERT INTO public.fresh_{round} VALUES (0, 'prepared'); PREPARE TRANSACTION 'p{round}'"
        ),
        format!(
            "CREATE DATABASE copied_{round}{}",
            if major >= 15 { " STRATEGY file_copy" } else { "" }
        ),
        format!(
            "CREATE DATABASE logged_{round}{}",
            if major >= 15 { " STRATEGY wal_log" } else { "" }
        ),
    ] {
        run_sql(&url, &statement).await;
    }
    if round > 0 {
        run_sql(&url, &format!("DROP DATABASE copied_{}", round - 1)).await;
        run_sql(&url, &format!("COMMIT PREPARED 'p{}'", round - 1)).await;
        run_sql(&url, &format!("DROP TABLE public.fresh_{}", round - 1)).await;
    }
}

/// Keeps the gate shut until the churn is over, or opens it in any case.
async fn churned(house: &House, major: u32, gate: &Arc<Gated>, standby: Option<&str>) {
    for round in 0..3 {
        churn(house, major, round).await;
    }
    if let Some(url) = standby {
        caught_up(&house.server.url("postgres"), url).await;
    }
    gate.open.send_replace(true);
}

/// What is backed up, and how it is read.
#[derive(Clone, Copy, PartialEq)]
enum Source {
    Primary,
    PrimaryOverConnections,
    Standby,
}

async fn equals_a_standby_page_by_page(major: u32, source: Source) {
    let from_standby = source == Source::Standby;
    let mut house = House::new(major, options(major)).await;
    if source == Source::PrimaryOverConnections {
        house.read_over_connections();
    }
    prepare(&house).await;
    // The witness: a copy by the server's own tool, from before, that is replayed by the server alone.
    let witness = house.place.path().join("witness");
    copy_of(&house.server.url("postgres"), major, &witness).await;
    let mut standby = None;
    if from_standby {
        let directory = house.place.path().join("standby");
        let (running, url) = standby_of(&house.server, &directory, &["fsync=off"]).await;
        house.reconnect(&url);
        standby = Some((running, url, directory));
    }
    let data = standby.as_ref().map_or(house.server.data_directory(), |(_, _, at)| at.clone());
    let mut random = std::fs::File::open("/dev/urandom").unwrap().take(NOISE_BYTES);
    let mut noise = std::fs::File::create(data.join("a noise")).unwrap();
    std::io::copy(&mut random, &mut noise).unwrap();

    let arguments = ["-n", "-c", "4", "-T", "300", "-U", "postgres", "-h"].map(str::to_owned);
    let mut arguments = arguments.to_vec();
    arguments
        .extend([house.server.socket_directory().display().to_string(), "postgres".to_owned()]);
    let load = spawn(major, "pgbench", &arguments, &house.place.path().join("pgbench.log")).await;
    let gate = house.with_gate().await;
    let url = standby.as_ref().map(|(_, url, _)| url.clone());
    let cx = house.cx();
    let meanwhile = async {
        copies(&cx).await;
        churned(&house, major, &gate, url.as_deref()).await;
    };
    let both = async { tokio::join!(house.back_up_as(&cx), meanwhile).0 };
    let outcome = Box::pin(within_limit(both)).await.unwrap();
    drop(load);
    let steps = cx.steps();
    let copied = steps.iter().find(|step| step.name == "copy").unwrap();
    assert!(copied.figures["vanished_files"] > 0, "no file went away in the middle: {copied:?}");
    assert_eq!(outcome.bad_pages, 0);
    nothing_is_left_on(&house).await;
    if let Some((_, url, _)) = &standby {
        nothing_is_left_at(url).await;
    }

    // A record must begin where both are to stop.
    house.sql("CHECKPOINT; SELECT pg_switch_wal()").await;
    if let Some((running, url, _)) = standby {
        caught_up(&house.server.url("postgres"), &url).await;
        drop(running);
    }
    house.server.stop(StopMode::Fast).await.unwrap();
    let restored = house.place.path().join("restored");
    house.restore(&outcome, &restored).await;
    let wal = house.server.data_directory().join("pg_wal");
    let command = format!("cp \"{}/%f\" \"%p\"", wal.display());
    replay(&witness, major, outcome.stop_lsn, &command).await;
    // A primary's backup ends with a record behind its end, and needs nothing else. A standby's ends with its last byte:
    // the record at which both stop is the server's.
    let alone = if from_standby { command.as_str() } else { "false" };
    replay(&restored, major, outcome.stop_lsn, alone).await;
    let compared = pages::same_pages(&restored, &witness);
    assert!(compared.pages > 5_000 && compared.files > 500, "{compared:?}");

    // Replay ends a query of a standby that is in its way, so that not every table was counted there.
    let level = if from_standby { ProofLevel::L4 } else { ProofLevel::L5 };
    let proof = within_limit(house.prove(level)).await;
    assert!(proof.passed, "{:#?}", proof.checks);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_under_load_equals_a_standby_page_by_page() {
    let is_long = std::env::var_os("PGMUSTER_TEST_LONG").is_some_and(|value| !value.is_empty());
    let majors: &[u32] = if is_long { &[14, 15, 18] } else { &[15] };
    for major in majors {
        Box::pin(equals_a_standby_page_by_page(*major, Source::Primary)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_read_over_connections_under_load_equals_a_standby_page_by_page() {
    Box::pin(equals_a_standby_page_by_page(18, Source::PrimaryOverConnections)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_standby_under_load_equals_another_page_by_page() {
    Box::pin(equals_a_standby_page_by_page(18, Source::Standby)).await;
}
