//! Heartbeats in real servers: where one is made, what is known of it, and what a server says of one it may have.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod servers;

use std::time::Duration;

use postgres::connect::{Purpose, connect};
use postgres::heartbeat::Beat;
use postgres::instance::StopMode;
use proto::Heartbeat;
use servers::{Server, job, shown};

servers::on_each_major! {
    a_heartbeat_needs_no_rights_and_is_known_by_where_and_when_it_committed,
    a_heartbeat_is_made_only_where_it_comes_into_an_archive,
}

const ARCHIVING: [(&str, &str); 3] =
    [("archive_mode", "on"), ("archive_command", "true"), ("archive_timeout", "60")];

/// One made by a role that may do nothing.
async fn beat(server: &Server) -> Beat {
    let purpose = Purpose::work(&job(), Duration::from_secs(5), Duration::from_secs(5));
    let session = connect(&server.target_of("nobody", "postgres"), &purpose).await;
    let session = session.unwrap_or_else(|e| panic!("{}", shown(&e)));
    let beat = session.beat().await.unwrap_or_else(|e| panic!("{}", shown(&e)));
    session.close().await;
    beat
}

async fn made(server: &Server) -> Heartbeat {
    match beat(server).await {
        Beat::Made(heartbeat) => heartbeat,
        other => panic!("{other:?}"),
    }
}

async fn a_heartbeat_needs_no_rights_and_is_known_by_where_and_when_it_committed(major: u32) {
    let server = Server::start(major, &ARCHIVING).await;
    server.run("postgres", &["CREATE ROLE nobody LOGIN"]).await;
    let now_ms = "SELECT floor(extract(epoch FROM clock_timestamp()) * 1000)::int8";
    let before_ms = server.number(now_ms).await;
    let first = made(&server).await;
    let second = made(&server).await;
    let after_ms = server.number(now_ms).await;
    assert_eq!(first.timeline, proto::Timeline(1));
    assert_eq!(first.system_identifier, second.system_identifier);
    assert!(first.transaction < second.transaction);
    assert!(first.begun_lsn < first.ended_lsn && first.ended_lsn <= second.begun_lsn);
    let times = [first.begun_at_ms, first.ended_at_ms, second.begun_at_ms, second.ended_at_ms];
    assert!(times.is_sorted() && before_ms <= times[0] && times[3] <= after_ms, "{times:?}");
    // It is on disk: a server that crashes now still has it.
    let session = server.session("postgres").await;
    let sql = "SELECT (pg_current_wal_flush_lsn() >= $1::text::pg_lsn)";
    let begun = second.begun_lsn.to_string();
    let flushed: bool = session.one("ask", sql, &[&begun]).await.unwrap().get(0);
    assert!(flushed);

    // What is restored has it or not; what the restored server itself did since says nothing of that.
    let undone: String = {
        session.run("begin", "BEGIN").await.unwrap();
        let row = session.one("ask", "SELECT pg_current_xact_id()::text", &[]).await.unwrap();
        session.run("undo", "ROLLBACK").await.unwrap();
        row.get(0)
    };
    let undone = Heartbeat { transaction: undone.parse().unwrap(), ..second };
    let has = async |heartbeat: &Heartbeat, next| {
        session.has_heartbeat(heartbeat, next).await.unwrap_or_else(|e| panic!("{}", shown(&e)))
    };
    let is_there = Some(true);
    assert_eq!(has(&second, second.transaction + 1).await, is_there);
    let gone = Some(false);
    assert_eq!(has(&second, second.transaction).await, gone, "the server gave that out itself");
    assert_eq!(has(&undone, u64::MAX).await, gone, "it did not commit");
    let future = Heartbeat { transaction: second.transaction + 1_000_000, ..second };
    assert_eq!(has(&future, second.transaction + 1).await, gone);
    session.close().await;
}

async fn a_heartbeat_is_made_only_where_it_comes_into_an_archive(major: u32) {
    let mut server = Server::start(major, &ARCHIVING).await;
    server
        .run(
            "postgres",
            &[
                "CREATE ROLE nobody LOGIN",
                "ALTER ROLE nobody SET default_transaction_read_only = on",
                "ALTER ROLE nobody SET synchronous_commit = off",
            ],
        )
        .await;
    made(&server).await;
    let next = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text::int8";
    for (name, value, wanted) in
        [("archive_timeout", "0", Beat::NeverArchived), ("archive_mode", "off", Beat::NotHere)]
    {
        server.instance.set(&[(name, value)]).unwrap();
        server.instance.restart().await.unwrap();
        let before = server.number(next).await;
        assert_eq!(beat(&server).await, wanted);
        assert_eq!(server.number(next).await, before, "nothing was written");
    }
    server.instance.set(&ARCHIVING).unwrap();
    server.instance.restart().await.unwrap();
    made(&server).await;
    // The same server as a standby.
    server.instance.stop(StopMode::Fast).await.unwrap();
    std::fs::write(server.instance.data_directory().join("standby.signal"), "").unwrap();
    server.instance.start().await.unwrap();
    assert_eq!(beat(&server).await, Beat::NotHere);
}
