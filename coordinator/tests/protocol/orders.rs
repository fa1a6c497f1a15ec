//! What people order: waiting, cancelling, deadlines, who goes first.

use coordinator::api::types::{ClusterView, JobView, StatusView, SubmitRequest};
use proto::failure::{Action, Code, Failure};
use proto::job::{Analyze, JobKind, Task, VerifyRestore};
use proto::message::{Control, DenialReason, Offers};
use proto::{JobState, Lane, ProofLevel};

use crate::support::{Fleet, Work, Worker, backup_request, eventually, orders};

async fn cancel(fleet: &Fleet, job: &JobView) -> JobView {
    fleet.post(&format!("/v1/jobs/{}/cancel", job.id), &()).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_that_nobody_began_is_cancelled_at_once() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let cancelled = cancel(&fleet, &job).await;
    assert_eq!(cancelled.state, JobState::Cancelled);
    assert_eq!(cancelled.reason.as_deref(), Some("cancelled by local before anybody began it"));
    assert_eq!(cancelled.failure.as_ref().unwrap().code, Code::Cancelled);
    assert_eq!(w1.denied(&ticket, "n1").await, DenialReason::Cancelled);
    assert_eq!(cancel(&fleet, &job).await.version, cancelled.version, "twice is once");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_job_is_cancelled_on_evidence_only() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    assert_eq!(cancel(&fleet, &job).await.state, JobState::Cancelling);
    let (pushed, _) = w1.answer().await;
    let Control::Cancel(pushed) = pushed else { panic!("{pushed:?}") };
    assert_eq!((pushed.attempt, pushed.token), (ticket.attempt, work.grant.token));
    fleet.hand.advance(500);
    w1.beacon(|beacon| beacon.revoked.iter().any(|r| r.attempt == ticket.attempt)).await;
    assert_eq!(fleet.job(job.id).await.state, JobState::Cancelling, "no evidence yet");
    w1.fail(&mut work, Failure::new(Code::Cancelled, Action::Abandon, "stopped")).await;
    let done = fleet.until_state(job.id, JobState::Cancelled).await;
    assert!(done.ended_at_ms.is_some());
}

/// A backup whose first attempt failed like that, and whose second one runs.
async fn in_its_second_attempt(
    fleet: &Fleet,
    w1: &mut Worker,
    failure: Failure,
) -> (JobView, Work) {
    let job = fleet.backup().await;
    w1.pulse().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    w1.fail(&mut work, failure).await;
    let waiting = fleet.until_state(job.id, JobState::Waiting).await;
    fleet.hand.advance(waiting.not_before_at_ms - fleet.clock.now_ms());
    w1.pulse().await;
    let ticket = w1.ticket().await;
    (job, w1.take(&ticket).await)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_job_does_not_show_what_an_earlier_attempt_failed_with() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let away = || Failure::new(Code::StoreUnavailable, Action::Retry, "the bucket is away");
    let ended = |job: JobView| (job.failure.unwrap().code, job.reason.unwrap());

    // While it waits for its second attempt.
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    w1.fail(&mut work, away()).await;
    let waiting = fleet.until_state(job.id, JobState::Waiting).await;
    assert_eq!(waiting.failure.as_ref().unwrap().code, Code::StoreUnavailable);
    let reason = "cancelled by local while nobody worked on it".to_owned();
    assert_eq!(ended(cancel(&fleet, &job).await), (Code::Cancelled, reason));

    // While its second attempt runs.
    let (job, mut work) = in_its_second_attempt(&fleet, &mut w1, away()).await;
    cancel(&fleet, &job).await;
    assert!(matches!(w1.answer().await.0, Control::Cancel(_)));
    w1.fail(&mut work, Failure::new(Code::Cancelled, Action::Abandon, "stopped")).await;
    let done = fleet.until_state(job.id, JobState::Cancelled).await;
    assert_eq!(ended(done), (Code::Cancelled, "its worker stopped it".to_owned()));

    // While its second attempt is silent, until that is gone.
    let (job, _) = in_its_second_attempt(&fleet, &mut w1, away()).await;
    cancel(&fleet, &job).await;
    w1.restart();
    w1.announce(&fleet).await;
    let done = fleet.until_state(job.id, JobState::Cancelled).await;
    let reason = "its attempt is gone: worker w1 restarted".to_owned();
    assert_eq!(ended(done), (Code::Cancelled, reason));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_finished_before_it_could_be_cancelled_is_a_success() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    cancel(&fleet, &job).await;
    w1.succeed(&mut work).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    let (code, failure) = fleet.refused("POST", &format!("/v1/jobs/{}/cancel", job.id), None).await;
    assert_eq!((code, failure.code), (409, Code::StateConflict));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_who_can_is_a_visible_reason_until_somebody_comes() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    w1.clusters = vec!["billing"];
    w1.announce(&fleet).await;
    let job = fleet.backup().await;
    let reason = "no worker of site fra1 serves orders";
    fleet
        .until(job.id, reason, |job| {
            job.reason.as_deref() == Some(reason) && job.state == JobState::Waiting
        })
        .await;
    w1.clusters = vec!["billing", "orders"];
    w1.announce(&fleet).await;
    assert_eq!(w1.ticket().await.job, job.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_without_its_queue_is_a_visible_reason_until_it_is_back() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::undeclared(&fleet, "w1", 1);
    w1.announce(&fleet).await;
    let job = fleet.backup().await;
    fleet
        .until(job.id, "unroutable", |job| {
            job.state == JobState::Waiting
                && job.reason.as_ref().is_some_and(|reason| {
                    reason == "worker w1 is silent"
                        || reason == "queue pgmuster.jobs.worker.w1.urgent is gone with its worker"
                })
        })
        .await;
    let declaration = broker::Declaration::worker(&w1.name, &w1.site);
    w1.broker.declare(&[declaration]).await.unwrap();
    w1.pulse().await;
    assert_eq!(w1.ticket().await.job, job.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_of_a_class_runs_and_the_other_says_behind_whom_it_waits() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let first = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    let second = fleet.backup().await;
    let reason = format!("another backup of orders has its turn: job {}", first.id);
    fleet.until(second.id, &reason, |job| job.reason.as_ref() == Some(&reason)).await;
    let other =
        fleet.submit(&SubmitRequest::new(orders(), Task::Analyze(Analyze::default()))).await;
    assert_eq!(w1.ticket().await.job, other.id, "another class of work need not wait");
    w1.succeed(&mut work).await;
    assert_eq!(w1.ticket().await.job, second.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_goes_before_the_night() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let routine = fleet.submit(&SubmitRequest { lane: Lane::Routine, ..backup_request() }).await;
    let late = w1.ticket().await;
    assert_eq!(late.job, routine.id);
    let urgent = fleet.backup().await;
    let ticket = w1.ticket().await;
    assert_eq!(ticket.job, urgent.id);
    assert_eq!(w1.denied(&late, "n0").await, DenialReason::Taken);
    let mut work = w1.take(&ticket).await;
    w1.succeed(&mut work).await;
    fleet.until_state(urgent.id, JobState::Succeeded).await;
    assert_eq!(w1.ticket().await.job, routine.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn tickets_go_out_only_toward_room() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::undeclared(&fleet, "w1", 1);
    let declaration = broker::Declaration::worker(&w1.name, &w1.site);
    w1.broker.declare(&[declaration]).await.unwrap();
    w1.clusters = vec!["a", "b", "c"];
    w1.slots = proto::message::Slots { urgent_free: 0, routine_free: 2 };
    w1.announce(&fleet).await;
    let mut jobs = Vec::new();
    for name in ["a", "b", "c"] {
        let mut request = backup_request();
        request.cluster = name.parse().unwrap();
        request.lane = Lane::Routine;
        jobs.push(fleet.submit(&request).await.id);
        // Jobs of one moment have no order.
        fleet.hand.advance(1);
    }
    let reason = "no routine slot is free at worker w1";
    fleet.until(jobs[2], reason, |job| job.reason.as_deref() == Some(reason)).await;
    let first = w1.ticket().await;
    let mut work = w1.take(&first).await;
    let second = w1.ticket().await;
    assert_eq!([first.job, second.job], jobs[..2]);
    assert_eq!(fleet.job(jobs[2]).await.state, JobState::Waiting);
    w1.succeed(&mut work).await;
    w1.pulse().await;
    assert_eq!(w1.ticket().await.job, jobs[2]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_whose_time_passed_is_missed_and_says_why() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    w1.clusters.clear();
    let known = fleet.submit(&backup_request()).await;
    cancel(&fleet, &known).await;
    w1.announce(&fleet).await;
    let job =
        fleet.submit(&SubmitRequest { start_within_ms: Some(1_000), ..backup_request() }).await;
    fleet.until_state(job.id, JobState::Waiting).await;
    fleet.hand.advance(1_000);
    let missed = fleet.until_state(job.id, JobState::Missed).await;
    assert_eq!(
        missed.reason.as_deref(),
        Some("nobody began it in time: no worker of site fra1 serves orders")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paused_cluster_is_left_alone() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let early = fleet.backup().await;
    let ticket = w1.ticket().await;
    let _: serde_json::Value = fleet.post("/v1/clusters/orders/pause", &()).await;
    assert_eq!(w1.denied(&ticket, "n1").await, DenialReason::Held);
    fleet.until(early.id, "paused", |job| job.reason.as_deref() == Some("orders is paused")).await;
    let _: serde_json::Value = fleet.post("/v1/clusters/orders/resume", &()).await;
    assert_eq!(w1.ticket().await.job, early.id);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_server_under_a_cluster_s_name_is_told_until_it_is_adopted() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    w1.identifier = proto::SystemIdentifier(43);
    w1.announce(&fleet).await;
    let told = || async {
        let view: ClusterView = fleet.get("/v1/clusters/orders").await;
        view.reason.contains("orders shows system identifier 43, 42 is expected").then_some(())
    };
    eventually("it is told", told).await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let work = w1.take(&ticket).await;
    assert_eq!(work.spec.system_identifier, Some(proto::SystemIdentifier(42)));
    cancel(&fleet, &job).await;
    let adopted: ClusterView = fleet.post("/v1/clusters/orders/adopt", &()).await;
    assert_eq!(adopted.system_identifier, Some(proto::SystemIdentifier(43)));
    assert_eq!(adopted.reason, "no backup has been taken yet");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn jobs_that_no_living_worker_may_do_are_told_by_the_status_until_one_may() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let only_backups = Offers { kinds: vec![JobKind::Backup], ..w1.offers() };
    w1.pulse_with(Some(only_backups)).await;
    let proof = VerifyRestore { backup: None, level: ProofLevel::L5, to: None, heartbeats: None };
    let prove = SubmitRequest::new(orders(), Task::VerifyRestore(proof));
    let told = async || fleet.get::<StatusView>("/v1/status").await.nobody_may;
    for _ in 0..2 {
        fleet.submit(&prove).await;
    }
    let one = eventually("the status tells of both", || async {
        let told = told().await;
        told.first().is_some_and(|row| row.jobs == 2).then_some(told)
    })
    .await;
    assert_eq!(one.len(), 1, "{one:?}");
    assert_eq!((&one[0].cluster, one[0].kind), (&orders(), JobKind::VerifyRestore));
    assert!(one[0].reason.contains("is allowed to do verify_restore"), "{one:?}");
    w1.announce(&fleet).await;
    eventually("nobody waits in vain", || async { told().await.is_empty().then_some(()) }).await;
}
