//! Coordinators that restart, and several on one catalog.

use std::path::PathBuf;

use coordinator::api::types::ClusterView;
use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use proto::JobState;
use proto::message::ReportBody;
use sqlx::Connection as _;

use crate::support::{Fleet, START, Worker, backup_outcome, config, eventually};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_loses_no_job_ticket_grant_or_report() {
    let mut fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    // One job runs, one has a ticket, one waits behind the first.
    let running = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    let behind = fleet.backup().await;
    fleet.until_state(behind.id, JobState::Waiting).await;
    let analyze = proto::Task::Analyze(proto::job::Analyze::default());
    let ticketed = fleet
        .submit(&coordinator::api::types::SubmitRequest::new(crate::support::orders(), analyze))
        .await;
    let unclaimed = w1.ticket().await;
    assert_eq!(unclaimed.job, ticketed.id);
    let before = fleet.handle.take().unwrap();
    before.crash().await;

    // What the worker says meanwhile waits in the broker.
    let outcome = Box::new(backup_outcome(ticket.attempt));
    w1.end(&mut work, ReportBody::Succeeded { outcome, steps: vec![] }).await;
    w1.send_claim(&w1.claim_of(&unclaimed, "n1")).await;
    fleet.start().await;
    fleet.until_state(running.id, JobState::Succeeded).await;
    assert!(matches!(w1.answer().await.0, proto::message::Control::Grant(_)));
    fleet.until_state(ticketed.id, JobState::Running).await;
    w1.pulse().await;
    assert_eq!(w1.ticket().await.job, behind.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_report_that_became_a_dead_letter_unread_is_applied() {
    let mut fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    fleet.handle.take().unwrap().crash().await;
    let outcome = Box::new(backup_outcome(ticket.attempt));
    w1.end(&mut work, ReportBody::Succeeded { outcome, steps: vec![] }).await;
    // Handed back as often as the broker allows: what many restarts of a coordinator would do.
    let hands = fleet.broker.another("hands");
    let mut reports = hands.consume(proto::topology::REPORTS, 1);
    let dead = proto::topology::DEAD;
    while hands.depth(dead).await.unwrap().unwrap().messages == 0 {
        let _ = reports.next().await.unwrap().requeue().await;
    }
    reports.stop().await;
    fleet.start().await;
    let done = fleet.until_state(job.id, JobState::Succeeded).await;
    assert_eq!(done.outcome, Some(backup_outcome(ticket.attempt)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_that_could_not_be_sent_goes_out_when_the_link_is_back() {
    let mut fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    fleet.handle.take().unwrap().shutdown().await;
    // This coordinator's own link is in the test's hand.
    let link = fleet.broker.another("coordinator");
    let faults = link.memory_faults().unwrap();
    let options = coordinator::Options {
        config: fleet.config.clone(),
        catalog_url: fleet.catalog_url.as_str().into(),
        signing_key: proto::envelope::SigningKey::from_seed(&crate::support::SEED),
    };
    let handle = coordinator::Coordinator::start(options, link, fleet.clock.clone()).await.unwrap();
    fleet.handle = Some(handle);
    fleet.wait_until_it_leads().await;
    faults.cut();
    let job = fleet.backup().await;
    fleet.until(job.id, "planned", |job| job.attempt.is_some()).await;
    faults.restore();
    let first = w1.ticket().await;
    assert_eq!(first.job, job.id);
    // The answer of the broker gets lost: the same ticket comes twice, and one claim wins.
    w1.take(&first).await;
    assert_eq!(w1.denied(&first, "n2").await, proto::message::DenialReason::Taken);
}

async fn two_take_turns(fleet: &mut Fleet) {
    let mut w1 = Worker::new(fleet, "w1").await;
    let second = config("c2", fleet.directory.path().join("second.sock"));
    let standby = fleet.another(second).await;
    // An order taken by the one that does not lead wakes the one that does.
    let stream = tokio::net::UnixStream::connect(standby.socket().unwrap()).await.unwrap();
    let body = serde_json::to_string(&crate::support::backup_request()).unwrap();
    let (code, body) = crate::support::http(stream, "POST", "/v1/jobs", Some(body), &[]).await;
    assert_eq!(code.as_u16(), 201, "{body}");
    let ordered: coordinator::api::types::JobView = serde_json::from_str(&body).unwrap();
    let ticket = w1.ticket().await;
    assert_eq!(ticket.job, ordered.id);
    let mut work = w1.take(&ticket).await;
    assert!(fleet.handle().leads() && !standby.leads(), "one leads");

    // The leader goes without a word; the other takes over when its time is up, and nothing runs twice.
    let former = fleet.handle.take().unwrap();
    former.crash().await;
    eventually("the other leads", || async {
        fleet.hand.advance(500);
        standby.leads().then_some(())
    })
    .await;
    fleet.config = config("c2", fleet.directory.path().join("second.sock"));
    fleet.handle = Some(standby);
    w1.pulse().await;
    w1.succeed(&mut work).await;
    let done = fleet.until_state(ordered.id, JobState::Succeeded).await;
    assert_eq!(done.attempts_used, 1);
    assert!(done.ended_at_ms.unwrap() > START);
}

/// The leader before may have been of an earlier version, which does not say what a backup is worth.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_nobody_judged_is_judged_by_the_next_leader() {
    let mut fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    w1.succeed(&mut work).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    fleet.config = config("c2", fleet.directory.path().join("second.sock"));
    let standby = fleet.another(fleet.config.clone()).await;
    sqlx::any::install_default_drivers();
    let mut catalog = sqlx::AnyConnection::connect(&fleet.catalog_url).await.unwrap();
    let forget = "UPDATE backups SET worth = 0, judged = 0";
    assert_eq!(sqlx::query(forget).execute(&mut catalog).await.unwrap().rows_affected(), 1);
    catalog.close().await.unwrap();

    fleet.handle.replace(standby).unwrap().crash().await;
    let unproved = async || -> Option<i64> {
        fleet.get::<ClusterView>("/v1/clusters/orders").await.unproved_to_at_ms
    };
    assert_eq!(unproved().await, None);
    eventually("it is judged", || async {
        fleet.hand.advance(500);
        unproved().await
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_coordinators_take_turns_on_sqlite() {
    two_take_turns(&mut Fleet::new().await).await;
}

#[expect(
    clippy::disallowed_methods,
    reason = "tests are told where the services are by the environment"
)]
fn variable(name: &str) -> String {
    std::env::var(name).expect("run ./tests/run, which starts the services")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_coordinators_take_turns_on_postgres() {
    let binaries = Binaries::at(PathBuf::from(variable("PGMUSTER_TEST_PG_BIN_15"))).await.unwrap();
    let directory = tempfile::Builder::new().prefix("pgm").tempdir_in("/tmp").unwrap();
    let options = InstanceOptions {
        tcp_port: Some(0),
        fsync: false,
        hba: vec!["host all all 127.0.0.1/32 trust".to_owned()],
        ..InstanceOptions::default()
    };
    let mut server =
        Instance::create(&binaries, &directory.path().join("c"), options).await.unwrap();
    server.start().await.unwrap();
    let url = server.tcp_url("postgres", "x", "postgres").unwrap();
    let mut fleet = Fleet::on(tempfile::tempdir().unwrap(), url).await;
    two_take_turns(&mut fleet).await;
    fleet.handle.take().unwrap().shutdown().await;
    server.stop(StopMode::Fast).await.unwrap();
}
