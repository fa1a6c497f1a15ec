//! Begin, keep, stop and lose a backup on real servers.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod servers;

use std::time::Duration;

use postgres::error::Error;
use postgres::instance::StopMode;
use postgres::wal::Segment;
use postgres::{BackupOptions, BackupSession};
use proto::{Code, Failure, SystemIdentifier};
use servers::{Server, job, segments, shown, wait_for};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

servers::on_each_major! {
    a_backup_begins_is_checked_and_stops,
    recycling_in_the_middle_loses_no_wal_until_it_is_let_go,
    a_killed_server_process_is_a_lost_session,
    a_restarted_server_is_a_lost_session,
    losing_the_second_session_does_no_harm,
    the_tablespaces_are_told_to_a_backup_that_gets_no_further_connection,
    dropping_the_session_leaves_nothing_on_the_server,
    a_second_backup_is_told_who_holds_the_lock,
    the_grants_in_the_error_are_the_ones_that_help,
    cancelling_interrupts_a_spread_checkpoint,
    a_standby_ends_its_backup_at_what_it_has_replayed,
    settings_that_prevent_a_backup_are_named,
    a_slot_that_the_server_gave_up_is_noticed,
    an_error_in_the_session_is_noticed_although_the_session_lives,
}

const SLOT: &str = "pgmuster_0011223344";
const LEFT_BEHIND: &str = "SELECT (SELECT count(*) FROM pg_replication_slots) \
     + (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory') \
     + (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%')";

fn options() -> BackupOptions {
    BackupOptions {
        job: job(),
        label: "pgmuster 018bcfe5".to_owned(),
        slot_name: SLOT.to_owned(),
        fast: true,
        system_identifier: None,
        start_deadline: None,
        cancel: CancellationToken::new(),
    }
}

async fn begin(server: &Server) -> BackupSession {
    BackupSession::begin(&server.target("postgres"), &options())
        .await
        .unwrap_or_else(|e| panic!("{}", shown(&e)))
}

async fn refused(server: &Server, options: &BackupOptions) -> Error {
    match BackupSession::begin(&server.target("postgres"), options).await {
        Ok(_) => panic!("the backup began"),
        Err(error) => error,
    }
}

/// Small segments and few of them, so that the server recycles at each checkpoint.
async fn thrifty(major: u32, more: &[(&str, &str)]) -> Server {
    let mut settings =
        vec![("min_wal_size", "2MB"), ("max_wal_size", "4MB"), ("checkpoint_timeout", "1h")];
    settings.extend_from_slice(more);
    Server::with(major, &settings, |options| options.wal_segment_size_mb = Some(1)).await
}

/// Fills and completes some segments, then lets the server remove what it does not need.
async fn churn(server: &Server) {
    for _ in 0..6 {
        server
            .run(
                "postgres",
                &[
                    "CREATE TABLE IF NOT EXISTS churn (t text)",
                    "INSERT INTO churn SELECT repeat('x', 500) FROM generate_series(1, 1000)",
                    "SELECT pg_switch_wal()",
                ],
            )
            .await;
    }
    server.run("postgres", &["CHECKPOINT", "SELECT pg_switch_wal()", "CHECKPOINT"]).await;
}

async fn a_backup_begins_is_checked_and_stops(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut backup = begin(&server).await;
    let started = backup.started().clone();
    assert_eq!(started.timeline.0, 1);
    assert_eq!(started.server.version.major(), major);
    assert!(started.server.checkpoint_lsn >= started.start_lsn);
    assert_eq!(started.server.redo_lsn, started.start_lsn);
    assert!(started.held_from <= started.start_lsn);
    let standing = backup.check().await.unwrap();
    assert_eq!(standing.wal_status, "reserved");
    assert!(standing.current_lsn >= started.start_lsn);

    server.run("postgres", &["CREATE TABLE t AS SELECT generate_series(1, 1000)"]).await;
    let stopped = backup.stop(&CancellationToken::new()).await.unwrap();
    assert!(stopped.stop_lsn > started.start_lsn);
    let start_line = format!("START WAL LOCATION: {}", started.start_lsn);
    assert!(stopped.backup_label.starts_with(&start_line), "{}", stopped.backup_label);
    assert!(stopped.backup_label.contains("LABEL: pgmuster 018bcfe5\n"));
    assert!(stopped.backup_label.contains("START TIMELINE: 1\n"));
    assert_eq!(stopped.tablespace_map, "");

    // The segment with the end of the backup is complete: the server writes to a later one.
    let size = started.server.wal_segment_size;
    let last = Segment::ending_at(stopped.stop_lsn, started.timeline, size);
    let standing = backup.check().await.unwrap();
    assert!(
        standing.current_lsn >= last.end(size),
        "{} is before {}",
        standing.current_lsn,
        last.end(size)
    );
    assert!(segments(&server.wal_directory()).contains(&last.file_name(size)));
    backup.finish().await;
    server.until(LEFT_BEHIND, 0).await;
}

async fn the_tablespaces_are_told_to_a_backup_that_gets_no_further_connection(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut backup = begin(&server).await;
    let place = server.directory.path().join("space");
    std::fs::create_dir(&place).unwrap();
    let create = format!("CREATE TABLESPACE space LOCATION '{}'", place.display());
    server.run("template1", &[&create, "ALTER DATABASE postgres ALLOW_CONNECTIONS false"]).await;
    refused(&server, &options()).await;
    backup.stop(&CancellationToken::new()).await.unwrap();
    let found = backup.tablespaces().await.unwrap_or_else(|e| panic!("{}", shown(&e)));
    let locations: Vec<_> = found.iter().map(|space| space.location.as_str()).collect();
    assert_eq!(locations, [place.to_str().unwrap()]);
    backup.check().await.unwrap();
    backup.finish().await;
}

async fn recycling_in_the_middle_loses_no_wal_until_it_is_let_go(major: u32) {
    let server = thrifty(major, &[]).await;
    let mut backup = begin(&server).await;
    let started = backup.started().clone();
    let size = started.server.wal_segment_size;
    let first = Segment::containing(started.start_lsn, started.timeline, size);
    churn(&server).await;
    let kept = segments(&server.wal_directory());
    assert!(kept.contains(&first.file_name(size)), "{} is gone: {kept:?}", first.file_name(size));

    // All of it is stored, let us say.
    let stored = backup.check().await.unwrap().current_lsn;
    let stored = Segment::containing(stored, started.timeline, size);
    backup.advance(stored.start(size)).await.unwrap();
    assert!(backup.check().await.unwrap().held_from >= stored.start(size));
    // Going back is no error: an error would drop the slot.
    backup.advance(started.start_lsn).await.unwrap();
    backup.check().await.unwrap();
    churn(&server).await;
    let after = segments(&server.wal_directory());
    assert!(
        !after.contains(&first.file_name(size)),
        "{} is still held: {after:?}",
        first.file_name(size)
    );

    // What was not let go is all there, up to the end.
    let stopped = backup.stop(&CancellationToken::new()).await.unwrap();
    churn(&server).await;
    let last = Segment::ending_at(stopped.stop_lsn, started.timeline, size);
    let there = segments(&server.wal_directory());
    let mut segment = stored;
    while segment != last.next() {
        assert!(
            there.contains(&segment.file_name(size)),
            "{} is gone: {there:?}",
            segment.file_name(size)
        );
        segment = segment.next();
    }
    backup.check().await.unwrap();
    backup.finish().await;
    server.until(LEFT_BEHIND, 0).await;
}

fn assert_lost(error: Error) {
    assert!(matches!(error, Error::SessionLost { .. }), "{}", shown(&error));
    assert_eq!(Failure::from(error).code, Code::BackupSessionLost);
}

async fn a_killed_server_process_is_a_lost_session(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut backup = begin(&server).await;
    let kill = format!("SELECT pg_terminate_backend({})", backup.backend_pid());
    server.run("postgres", &[&kill]).await;
    wait_for("the loss to be noticed", async || backup.check().await.is_err()).await;
    assert_lost(backup.check().await.unwrap_err());
    assert_lost(backup.advance(proto::Lsn(u64::MAX >> 8)).await.unwrap_err());
    assert_lost(backup.stop(&CancellationToken::new()).await.unwrap_err());
    drop(backup);
    server.until(LEFT_BEHIND, 0).await;
}

async fn a_restarted_server_is_a_lost_session(major: u32) {
    let mut server = Server::start(major, &[]).await;
    let mut backup = begin(&server).await;
    server.instance.stop(StopMode::Immediate).await.unwrap();
    server.instance.start().await.unwrap();
    assert_lost(backup.check().await.unwrap_err());
    assert_lost(backup.stop(&CancellationToken::new()).await.unwrap_err());
}

async fn losing_the_second_session_does_no_harm(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut backup = begin(&server).await;
    let kill = format!("SELECT pg_terminate_backend({})", backup.watch().backend_pid());
    server.run("postgres", &[&kill]).await;
    wait_for("the connection to close", async || backup.watch().is_closed()).await;
    backup.check().await.unwrap();
    backup.stop(&CancellationToken::new()).await.unwrap();
    backup.finish().await;
    server.until(LEFT_BEHIND, 0).await;
}

async fn dropping_the_session_leaves_nothing_on_the_server(major: u32) {
    let server = Server::start(major, &[]).await;
    let backup = begin(&server).await;
    assert!(server.number(LEFT_BEHIND).await >= 4, "slot, lock and two sessions are there before");
    drop(backup);
    server.until(LEFT_BEHIND, 0).await;
    // And the next backup finds nothing in its way.
    begin(&server).await.finish().await;
}

async fn a_second_backup_is_told_who_holds_the_lock(major: u32) {
    let server = Server::start(major, &[]).await;
    let first = begin(&server).await;
    let error = refused(&server, &options()).await;
    let text = shown(&error);
    assert!(matches!(error, Error::Busy { .. }), "{text}");
    assert!(text.contains(&format!("process {}", first.backend_pid())), "{text}");
    assert!(text.contains("named pgmuster/05060708090a"), "{text}");
    first.check().await.expect("the first is not disturbed");
}

async fn the_grants_in_the_error_are_the_ones_that_help(major: u32) {
    let server = Server::start(major, &[]).await;
    server.run("postgres", &["CREATE ROLE \"Odd \"\" name\" LOGIN"]).await;
    let target = server.target_of("Odd \" name", "postgres");
    let Err(error) = BackupSession::begin(&target, &options()).await else {
        panic!("it began without rights")
    };
    let failure = Failure::from(error);
    assert_eq!(failure.code, Code::PermissionDenied, "{failure}");
    let (start, stop) = if major < 15 {
        ("pg_start_backup(text, boolean, boolean)", "pg_stop_backup(boolean, boolean)")
    } else {
        ("pg_backup_start(text, boolean)", "pg_backup_stop(boolean)")
    };
    let role = "\"Odd \"\" name\"";
    assert_eq!(
        failure.hint,
        format!(
            "ALTER ROLE {role} REPLICATION; GRANT EXECUTE ON FUNCTION pg_catalog.{start} TO {role}; \
             GRANT EXECUTE ON FUNCTION pg_catalog.{stop} TO {role};"
        )
    );
    server.run("postgres", &[&failure.hint]).await;
    let mut backup =
        BackupSession::begin(&target, &options()).await.unwrap_or_else(|e| panic!("{}", shown(&e)));
    backup.check().await.unwrap();
    backup.advance(backup.started().start_lsn).await.unwrap();
    backup.stop(&CancellationToken::new()).await.unwrap();

    let error = backup.switch_wal().await.unwrap_err();
    let failure = Failure::from(error);
    assert_eq!(
        failure.hint,
        format!("GRANT EXECUTE ON FUNCTION pg_catalog.pg_switch_wal() TO {role};")
    );
    backup.check().await.expect("a refused statement does not hurt the backup");
    server.run("postgres", &[&failure.hint]).await;
    backup.switch_wal().await.unwrap();
}

async fn cancelling_interrupts_a_spread_checkpoint(major: u32) {
    let slow = [
        ("checkpoint_timeout", "1h"),
        ("checkpoint_completion_target", "0.9"),
        ("bgwriter_lru_maxpages", "0"),
    ];
    let server = Server::start(major, &slow).await;
    server
        .run(
            "postgres",
            &["CREATE TABLE t AS SELECT repeat('x', 800) FROM generate_series(1, 20000)"],
        )
        .await;
    let waiting = "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%' \
                   AND query LIKE '%backup%' AND state = 'active' AND wait_event = 'CheckpointStart' \
                   OR application_name LIKE 'pgmuster/%' AND wait_event = 'CheckpointDone'";
    let cancel = CancellationToken::new();
    let spread = BackupOptions { fast: false, cancel: cancel.clone(), ..options() };
    let target = server.target("postgres");
    let begun = tokio::spawn(async move { BackupSession::begin(&target, &spread).await.map(drop) });
    server.until(waiting, 1).await;
    cancel.cancel();
    let error = tokio::time::timeout(Duration::from_secs(20), begun)
        .await
        .expect("it hangs")
        .unwrap()
        .unwrap_err();
    assert!(matches!(error, Error::Cancelled { .. }), "{}", shown(&error));
    server.until(LEFT_BEHIND, 0).await;

    let deadline = Some(Instant::now() + Duration::from_secs(2));
    let error =
        refused(&server, &BackupOptions { fast: false, start_deadline: deadline, ..options() })
            .await;
    assert!(matches!(error, Error::Deadline { .. }), "{}", shown(&error));
    server.until(LEFT_BEHIND, 0).await;
}

async fn a_standby_ends_its_backup_at_what_it_has_replayed(major: u32) {
    let mut server = Server::start(major, &[]).await;
    server.run("postgres", &["CREATE TABLE t AS SELECT generate_series(1, 1000)"]).await;
    server.instance.stop(StopMode::Fast).await.unwrap();
    std::fs::write(server.instance.data_directory().join("standby.signal"), "").unwrap();
    server.instance.start().await.unwrap();
    let mut backup = begin(&server).await;
    assert!(backup.started().server.in_recovery);
    let standing = backup.check().await.unwrap();
    assert_eq!(standing.wal_status, "reserved");
    // Letting go works as on a primary, and nothing beyond what was replayed is let go.
    let start = backup.started().start_lsn;
    backup.advance(start).await.unwrap();
    backup.advance(proto::Lsn(standing.current_lsn.0 + 1)).await.unwrap();
    let standing = backup.check().await.unwrap();
    assert!(standing.held_from <= start, "{standing:?}");

    let stopped = backup.stop(&CancellationToken::new()).await.unwrap();
    assert_eq!(stopped.stop_lsn, standing.current_lsn);
    assert!(stopped.stop_lsn > start);
    assert!(stopped.backup_label.contains("BACKUP FROM: standby\n"), "{}", stopped.backup_label);
    backup.finish().await;
    server.until(LEFT_BEHIND, 0).await;
}

async fn settings_that_prevent_a_backup_are_named(major: u32) {
    let mut server = Server::start(major, &[("max_wal_senders", "0")]).await;
    // No WAL sender is needed: the slot is used over SQL.
    begin(&server).await.finish().await;

    server.instance.set(&[("wal_level", "minimal")]).unwrap();
    server.instance.restart().await.unwrap();
    let failure = Failure::from(refused(&server, &options()).await);
    assert_eq!(
        (failure.code, failure.hint.contains("wal_level = 'replica'")),
        (Code::ServerSetting, true),
        "{failure:?}"
    );

    server
        .instance
        .set(&[("wal_level", "replica"), ("max_wal_senders", "5"), ("max_replication_slots", "1")])
        .unwrap();
    server.instance.restart().await.unwrap();
    server.run("postgres", &["SELECT pg_create_physical_replication_slot('theirs')"]).await;
    let failure = Failure::from(refused(&server, &options()).await);
    assert_eq!(
        (failure.code, failure.message.contains("max_replication_slots")),
        (Code::ServerSetting, true),
        "{failure:?}"
    );
    assert_eq!(
        server.number("SELECT count(*) FROM pg_replication_slots").await,
        1,
        "theirs is untouched"
    );
    server.run("postgres", &["SELECT pg_drop_replication_slot('theirs')"]).await;

    let other = Some(SystemIdentifier(1));
    let failure = Failure::from(
        refused(&server, &BackupOptions { system_identifier: other, ..options() }).await,
    );
    assert_eq!(failure.code, Code::SystemIdentifierMismatch, "{failure}");
    begin(&server).await.finish().await;
}

async fn a_slot_that_the_server_gave_up_is_noticed(major: u32) {
    let server = thrifty(major, &[("max_slot_wal_keep_size", "1MB")]).await;
    let mut backup = begin(&server).await;
    churn(&server).await;
    wait_for("the loss to be noticed", async || backup.check().await.is_err()).await;
    let error = backup.check().await.unwrap_err();
    assert!(
        matches!(error, Error::SessionLost { .. } | Error::WalLost { .. }),
        "{}",
        shown(&error)
    );
    assert!(Failure::from(error).action.is_retryable());
    assert!(
        backup.stop(&CancellationToken::new()).await.is_err(),
        "a backup whose WAL is gone must not stop well"
    );
}

async fn an_error_in_the_session_is_noticed_although_the_session_lives(major: u32) {
    let server = Server::start(major, &[]).await;
    let mut backup = begin(&server).await;
    let stored = backup.check().await.unwrap().current_lsn;
    // Hold the session up in the middle of a statement, and let somebody cancel that.
    let blocker = server.session("postgres").await;
    let block = "SET allow_system_table_mods = on; BEGIN; \
                 ALTER VIEW pg_catalog.pg_replication_slots SET (security_barrier = false)";
    blocker.run("block", block).await.unwrap();
    let pid = backup.backend_pid();
    let cancel = format!(
        "SELECT count(pg_cancel_backend(pid)) FROM pg_stat_activity WHERE pid = {pid} AND wait_event_type = 'Lock'"
    );
    let advancing = backup.advance(stored);
    let (advanced, ()) = tokio::join!(advancing, server.until(&cancel, 1));
    assert_lost(advanced.unwrap_err());
    blocker.run("unblock", "ROLLBACK").await.unwrap();
    assert_eq!(
        server.number(&format!("SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")).await,
        1
    );
    assert_lost(backup.check().await.unwrap_err());
    assert_lost(backup.stop(&CancellationToken::new()).await.unwrap_err());
}
