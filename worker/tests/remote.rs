//! A server whose files are read over connections to it, as from another host: what that backup is, what it needs, and
//! what is left when it fails.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test says what it expects")]

mod house;

use std::io::Read as _;
use std::time::Duration;

use house::{
    DATA, House, copies, eventually, nothing_is_left_on, number, start_plainly, within_limit,
};
use postgres::instance::InstanceOptions;
use proto::{Action, Code, ProofLevel};
use worker::config::FilesConfig;

/// Sessions that have read files.
const READERS: &str = "FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%'
       AND query LIKE '-- pgmuster: read a file%'";

fn quiet() -> InstanceOptions {
    // Autovacuum would change pages that nobody wrote to.
    let settings = vec![("autovacuum".to_owned(), "off".to_owned())];
    InstanceOptions { fsync: false, settings, ..InstanceOptions::default() }
}

async fn filled(major: u32) -> House {
    let mut house = House::new(major, quiet()).await;
    house.sql(DATA).await;
    house.read_over_connections();
    house
}

async fn restores_and_is_proved(major: u32) {
    let mut house = filled(major).await;
    let space = house.place.path().join("space");
    std::fs::create_dir(&space).unwrap();
    house.sql(&format!("CREATE TABLESPACE far LOCATION '{}'", space.display())).await;
    house
        .sql(
            "CREATE TABLE public.far TABLESPACE far AS SELECT g, md5(g::text) FROM generate_series(1, 20000) g;
             CREATE TABLE public.large AS SELECT g, repeat(md5(g::text), 8) AS t FROM generate_series(1, 60000) g",
        )
        .await;
    // Whoever reads a row for the first time, as the census does, marks its page; vacuum has done so for all of them.
    house.sql("VACUUM (FREEZE)").await;
    house.sql("CHECKPOINT").await;
    let cx = house.cx();
    let first = house.back_up_as(&cx).await.unwrap();
    let connect = cx.steps().into_iter().find(|step| step.name == "connect").unwrap();
    assert_eq!(connect.figures.get("remote_sessions"), Some(&3), "{connect:?}");
    assert_eq!(first.bad_pages, 0);
    nothing_is_left_on(&house).await;

    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    let directory = house.place.path().join("restored");
    house.restore(&first, &directory).await;
    let (_running, url) = start_plainly(&directory, major).await;
    assert_eq!(number(&url, "SELECT count(*) FROM public.orders").await, 50_000);
    assert_eq!(number(&url, "SELECT count(*) FROM public.far").await, 20_000);
    assert_eq!(number(&url, "SELECT count(*) FROM public.fleeting").await, 0);

    // Units are compared whoever read them before: over connections, and then by this process itself.
    for local in [false, true] {
        if local {
            house.read_locally();
        }
        house.sql("UPDATE public.orders SET note = 'x' WHERE id = 7").await;
        house.sql("CHECKPOINT").await;
        let next = house.back_up().await;
        assert!(next.compared_with.is_some());
        assert!(
            next.stored_bytes * 4 < first.stored_bytes,
            "local {local}: first {} next {}",
            first.stored_bytes,
            next.stored_bytes
        );
    }
    let proof = house.prove(ProofLevel::L5).await;
    assert!(proof.passed, "{:#?}", proof.checks);
    house.read_over_connections();
    let last = house.back_up().await;
    assert!(
        last.stored_bytes * 4 < first.stored_bytes,
        "{} {}",
        last.stored_bytes,
        first.stored_bytes
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_15_read_over_connections_restores_and_is_proved() {
    Box::pin(restores_and_is_proved(15)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_18_read_over_connections_restores_and_is_proved() {
    Box::pin(restores_and_is_proved(18)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_that_may_not_read_is_told_the_grants_and_they_suffice() {
    let mut house = filled(15).await;
    house
        .sql(
            "CREATE ROLE backup LOGIN REPLICATION;
             GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO backup",
        )
        .await;
    let connection = house.server.url("postgres").replace("postgres@", "backup@");
    assert!(connection.contains("backup@"), "{connection}");
    house.reconnect(&connection);
    let failure = house.back_up_as(&house.cx()).await.unwrap_err();
    assert_eq!((failure.code, failure.action), (Code::PermissionDenied, Action::FixConfig));
    let grants = failure.hint.clone();
    assert_eq!(grants.matches("GRANT EXECUTE ON FUNCTION").count(), 3, "{grants}");
    for function in ["pg_ls_dir", "pg_stat_file", "pg_read_binary_file"] {
        assert!(grants.contains(function), "{grants}");
    }

    // The role may not even ask for the data directory, so this process cannot read it itself; both cures are told.
    house.config.clusters[0].files = FilesConfig::Auto;
    house.reconnect(&connection);
    let failure = house.back_up_as(&house.cx()).await.unwrap_err();
    assert!(failure.hint.contains("pg_read_all_settings"), "{failure:?}");
    assert!(failure.hint.contains(&grants), "{failure:?}");

    house.sql(&grants).await;
    let cx = house.cx();
    house.back_up_as(&cx).await.unwrap();
    assert!(cx.steps().iter().any(|step| step.figures.contains_key("remote_sessions")));
    nothing_is_left_on(&house).await;
    let proof = house.prove(ProofLevel::L4).await;
    assert!(proof.passed, "{:#?}", proof.checks);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_cut_in_the_middle_commit_nothing_and_leave_nothing() {
    let mut house = filled(18).await;
    // Nothing is over before it was cut.
    let gate = house.with_gate().await;
    let cx = house.cx();
    let cut = async {
        copies(&cx).await;
        let ours = "FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%'";
        let read = format!("SELECT count(*) {READERS}");
        let reads = async || (house.number(&read).await > 0).then_some(());
        eventually("files are read", Duration::from_secs(30), reads).await;
        let cut = house.number(&format!("SELECT count(pg_terminate_backend(pid)) {ours}")).await;
        assert!(cut > 2, "{cut}");
    };
    let both = async { tokio::join!(house.back_up_as(&cx), cut).0 };
    let failure = Box::pin(within_limit(both)).await.unwrap_err();
    let expected = [Code::BackupSessionLost, Code::ServerUnreachable, Code::SourceUnreadable];
    assert!(expected.contains(&failure.code), "{failure:?}");
    assert_eq!(failure.action, Action::Retry, "{failure:?}");
    nothing_is_left_on(&house).await;
    let repository = house.reopened().await;
    let lineages = repository.list_lineages().await.unwrap();
    assert!(repository.list_backups(lineages[0].lineage).await.unwrap().is_empty());
    gate.open.send_replace(true);
    assert_eq!(house.back_up().await.compared_with, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reading_session_that_is_cut_is_replaced() {
    let mut house = filled(15).await;
    let data = house.server.data_directory();
    // More than the writers hold in memory, so that reading goes on when the gate opens.
    let mut random = std::fs::File::open("/dev/urandom").unwrap().take(96 << 20);
    std::io::copy(&mut random, &mut std::fs::File::create(data.join("a noise")).unwrap()).unwrap();
    let gate = house.with_gate().await;
    let cx = house.cx();
    let meanwhile = async {
        copies(&cx).await;
        let cut = format!("SELECT count(pg_terminate_backend(pid)) {READERS}");
        let some = async || (house.number(&cut).await > 0).then_some(());
        eventually("a reader is cut", Duration::from_secs(30), some).await;
        gate.open.send_replace(true);
    };
    let both = async { tokio::join!(house.back_up_as(&cx), meanwhile).0 };
    let outcome = Box::pin(within_limit(both)).await.unwrap();
    nothing_is_left_on(&house).await;
    let directory = house.place.path().join("restored");
    house.restore(&outcome, &directory).await;
    assert!(
        std::fs::read(directory.join("a noise")).unwrap()
            == std::fs::read(data.join("a noise")).unwrap()
    );
}
