//! Tickets, claims, grants and reports, the good and the bad.

use coordinator::api::types::{BackupView, StatusView, SubmitRequest};
use policy::ClusterState;
use proto::envelope::{Credentials, SigningKey};
use proto::failure::{Action, Code, Failure};
use proto::job::{Task, VerifyRestoreOutcome};
use proto::message::{Control, DeclineReason, DenialReason, ReportBody};
use proto::proof::{Phase, Proof, ProofLevel};
use proto::step::Step;
use proto::{AttemptId, BackupId, JobState, Lane, Outcome, SystemIdentifier};

use crate::support::{Fleet, START, Worker, backup_outcome, backup_request, eventually, proof_of};

fn step(number: u32, name: &str, ended: bool) -> Step {
    Step {
        number,
        name: name.to_owned(),
        span_id: format!("{number:016x}"),
        started_at_ms: START,
        ended_at_ms: ended.then_some(START + 5),
        failed: false,
        figures: [("files".to_owned(), 3)].into(),
    }
}

fn proof(backup: BackupId) -> Proof {
    Proof {
        at_ms: START + 10,
        server_version_num: Some(150_018),
        phases: vec![Phase {
            name: "restore".to_owned(),
            duration_ms: 31_000,
            counts_as_recovery: true,
        }],
        size_bytes: 1,
        tables: 212,
        rows: 9,
        tables_exact: 212,
        ..proof_of(backup, ProofLevel::L5).reached()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_ordered_taken_and_proved() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job =
        fleet.submit(&SubmitRequest { verify: Some(ProofLevel::L5), ..backup_request() }).await;
    let ticket = w1.ticket().await;
    assert_eq!((ticket.job, ticket.lane), (job.id, Lane::Urgent));
    let mut work = w1.take(&ticket).await;
    assert_eq!(work.spec.system_identifier, Some(SystemIdentifier(42)));
    assert_eq!(work.spec.predecessor, None);
    assert!(work.spec.traceparent.as_ref().unwrap().contains(&job.id.to_string().replace('-', "")));
    assert_eq!(fleet.job(job.id).await.state, JobState::Running);
    w1.report(&mut work, ReportBody::Started).await;
    w1.report(&mut work, ReportBody::Step(step(1, "copy", false))).await;
    let steps = vec![step(1, "copy", true), step(2, "commit", true)];
    let outcome = Box::new(backup_outcome(ticket.attempt));
    w1.end(&mut work, ReportBody::Succeeded { outcome, steps: steps.clone() }).await;
    let done = fleet.until_state(job.id, JobState::Succeeded).await;
    assert_eq!(done.outcome, Some(backup_outcome(ticket.attempt)));
    assert_eq!(done.followed_by.len(), 1);
    let trace = fleet.trace(job.id).await;
    assert_eq!(trace.attempts.len(), 1);
    assert_eq!(trace.attempts[0].steps, steps);
    assert!(trace.attempts[0].started_at_ms.is_some());

    let ticket = w1.site_ticket().await;
    assert_eq!(ticket.job, done.followed_by[0], "the proof follows by itself, in the site's queue");
    let mut work = w1.take(&ticket).await;
    let Task::VerifyRestore(asked) = &work.spec.task else { panic!("{:?}", work.spec.task) };
    let backup = asked.backup.unwrap();
    let outcome = Outcome::VerifyRestore(VerifyRestoreOutcome { proof: proof(backup) });
    w1.end(&mut work, ReportBody::Succeeded { outcome: Box::new(outcome), steps: vec![] }).await;
    fleet.until_state(ticket.job, JobState::Succeeded).await;
    let status: StatusView = fleet.get("/v1/status").await;
    assert_eq!(status.clusters[0].state, ClusterState::Proved);
    assert_eq!(
        status.sentence,
        "orders is PROVED: restored in 31 s and proved L5 0 s ago, 212 tables."
    );
    let backups: Vec<BackupView> = fleet.get("/v1/backups?cluster=orders").await;
    assert_eq!(backups[0].id, backup);
    assert_eq!(backups[0].proof.as_ref().unwrap().job, ticket.job);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_same_claim_gets_the_same_grant_and_any_other_a_denial() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let mut w2 = Worker::new(&fleet, "w2").await;
    let mut request = backup_request();
    request.worker = Some(w1.name.clone());
    fleet.submit(&request).await;
    let ticket = w1.ticket().await;
    assert_eq!(w2.denied(&ticket, "x").await, DenialReason::NotForYou, "the ticket was for w1");
    w1.send_claim(&w1.claim_of(&ticket, "n1")).await;
    let (first, bytes) = w1.answer().await;
    w1.send_claim(&w1.claim_of(&ticket, "n1")).await;
    let (_, again) = w1.answer().await;
    assert!(matches!(first, Control::Grant(_)));
    assert_eq!(bytes, again, "byte for byte");
    assert_eq!(w1.denied(&ticket, "n2").await, DenialReason::Taken, "a duplicate ticket");
    let mut unknown = ticket.clone();
    unknown.attempt = AttemptId::mint(9, [9; 10]);
    assert_eq!(w1.denied(&unknown, "n3").await, DenialReason::Unknown);
    assert_eq!(fleet.job(ticket.job).await.attempts_used, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_that_is_replayed_after_the_end_earns_nothing() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    w1.succeed(&mut work).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    assert_eq!(w1.denied(&ticket, "n1").await, DenialReason::Taken);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_messages_are_refused_counted_and_change_nothing() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let claim = w1.claim_of(&ticket, "n1");
    // Certified by somebody else.
    let stranger = SigningKey::from_seed(&[99; 32]);
    let key = || SigningKey::from_seed(&[98; 32]);
    let mut identity = w1.credentials.identity().clone();
    identity.key = key().public();
    let forger = Credentials::new(key(), stranger.sign(&identity), stranger.public()).unwrap();
    w1.send_raw_claim(serde_json::to_string(&forger.sign(&claim)).unwrap()).await;
    // Altered after it was signed.
    let signed = serde_json::to_string(&w1.credentials.sign(&claim)).unwrap();
    w1.send_raw_claim(signed.replace("n1", "n2")).await;
    // A good key, in another worker's name.
    let w2 = Worker::new(&fleet, "w2").await;
    w1.send_raw_claim(serde_json::to_string(&w2.credentials.sign(&claim)).unwrap()).await;
    // Not even JSON.
    w1.send_raw_claim("{".to_owned()).await;
    let refused = r#"pgmuster_messages_refused_total{queue="pgmuster.claims"}"#;
    eventually("all four are refused", || async {
        (fleet.metric(refused).await == Some(4.0)).then_some(())
    })
    .await;
    let dead = "pgmuster_queue_dead_lettered_total";
    eventually("none lies unseen", || async {
        (fleet.metric(dead).await == Some(4.0)).then_some(())
    })
    .await;
    assert_eq!(fleet.job(job.id).await.state, JobState::Queued);
    w1.take(&ticket).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_count_for_the_holder_once_and_never_backwards() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let w2 = Worker::new(&fleet, "w2").await;
    let mut request = backup_request();
    request.worker = Some(w1.name.clone());
    let job = fleet.submit(&request).await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    let token = work.grant.token;
    let succeeded = || ReportBody::Succeeded {
        outcome: Box::new(backup_outcome(ticket.attempt)),
        steps: vec![step(1, "copy", true)],
    };
    w1.report_as(&work, 1, token + 1, succeeded()).await;
    w2.report_as(&work, 2, token, succeeded()).await;
    let refused = r#"pgmuster_messages_refused_total{queue="pgmuster.reports"}"#;
    eventually("both are refused", || async {
        (fleet.metric(refused).await == Some(2.0)).then_some(())
    })
    .await;
    assert_eq!(fleet.job(job.id).await.state, JobState::Running, "wrong token, wrong worker");
    // The end of the step overtakes its beginning.
    w1.report_as(&work, 4, token, ReportBody::Step(step(1, "copy", true))).await;
    w1.report_as(&work, 3, token, ReportBody::Step(step(1, "copy", false))).await;
    work.seq = 4;
    w1.end(&mut work, succeeded()).await;
    let done = fleet.until_state(job.id, JobState::Succeeded).await;
    // After the end: the end again, a failure, a step.
    w1.report_as(&work, 5, token, succeeded()).await;
    let failure = Failure::bug("late");
    w1.report_as(&work, 6, token, ReportBody::Failed { failure, outcome: None, steps: vec![] })
        .await;
    w1.report_as(&work, 7, token, ReportBody::Step(step(2, "late", false))).await;
    // A second job's report comes behind them in the queue.
    let next = fleet.submit(&request).await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    w1.succeed(&mut work).await;
    fleet.until_state(next.id, JobState::Succeeded).await;
    let now = fleet.job(job.id).await;
    assert_eq!(now, done, "final is final");
    assert_eq!(fleet.trace(job.id).await.attempts[0].steps, [step(1, "copy", true)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_end_of_a_job_is_understood_even_in_new_words() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let work = w1.take(&ticket).await;
    // A failure with a code of a later version. It is signed as what it is, so it is built by hand.
    let failed = ReportBody::Failed {
        failure: Failure::new(Code::WalMissing, Action::FixData, "x"),
        outcome: None,
        steps: vec![step(1, "copy", true)],
    };
    let report = proto::message::Report {
        schema: 1,
        job: work.spec.job,
        attempt: work.grant.attempt,
        token: work.grant.token,
        worker: w1.name.clone(),
        boot: w1.boot,
        seq: 1,
        at_ms: START,
        body: failed,
    };
    let future = FutureReport(
        serde_json::from_str(
            &serde_json::to_string(&report).unwrap().replace("WAL_MISSING", "SOMETHING_NEW"),
        )
        .unwrap(),
    );
    let body = serde_json::to_string(&w1.credentials.sign(&future)).unwrap();
    let publish = broker::Publish::new("pgmuster.reports", "pgmuster.reports", "report", "m", body);
    let _ = w1.broker.publish(publish).await.unwrap();
    let done = fleet.until_state(job.id, JobState::Failed).await;
    assert_eq!(done.failure.unwrap().message, "SOMETHING_NEW: x");
    assert_eq!(fleet.trace(job.id).await.attempts[0].steps.len(), 1);
}

#[derive(serde::Serialize, serde::Deserialize)]
struct FutureReport(serde_json::Value);

impl proto::envelope::Signable for FutureReport {
    const CONTEXT: &'static str = "report";
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_busy_worker_gets_its_ticket_when_it_has_room() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    w1.decline(&ticket, DeclineReason::Busy).await;
    let waiting = fleet.until_state(job.id, JobState::Waiting).await;
    let waiting = fleet
        .until(job.id, "the reason", |job| {
            job.reason.as_deref() == Some("no urgent slot is free at worker w1")
        })
        .await
        .attempts_used
        .max(waiting.attempts_used);
    assert_eq!(waiting, 0, "a declined ticket costs no attempt");
    w1.pulse().await;
    let again = w1.ticket().await;
    assert_eq!(again.job, job.id);
    assert_ne!(again.attempt, ticket.attempt);
    assert_eq!(w1.denied(&ticket, "n0").await, DenialReason::Taken);
    w1.take(&again).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refused_job_goes_to_the_other_worker_and_then_says_who_refused() {
    let fleet = Fleet::new().await;
    let mut workers = [Worker::new(&fleet, "w1").await, Worker::new(&fleet, "w2").await];
    let job = fleet.backup().await;
    let [w1, w2] = &mut workers;
    let ticket = w1.ticket().await;
    w1.decline(&ticket, DeclineReason::NotAllowed).await;
    let ticket = w2.ticket().await;
    assert_eq!(ticket.job, job.id);
    w2.decline(&ticket, DeclineReason::Unsupported).await;
    fleet
        .until(job.id, "both refused", |j| j.reason.as_deref() == Some("refused by w1 and w2"))
        .await;
    w1.announce(&fleet).await;
    assert_eq!(w1.ticket().await.job, job.id, "it announced itself anew");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn failures_are_retried_by_their_action_with_a_predecessor() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let mut before = None;
    for attempt in 1..=3 {
        let ticket = if attempt == 1 {
            w1.ticket().await
        } else {
            let waiting = fleet.until_state(job.id, JobState::Waiting).await;
            assert!(
                waiting.reason.unwrap().contains("failed with STORE_UNAVAILABLE: tried again in")
            );
            let due = waiting.not_before_at_ms - START;
            fleet.hand.advance(due);
            w1.pulse().await;
            w1.ticket().await
        };
        let mut work = w1.take(&ticket).await;
        assert_eq!(work.spec.predecessor, before);
        before = Some(ticket.attempt);
        w1.fail(
            &mut work,
            Failure::new(Code::StoreUnavailable, Action::Retry, "the bucket is away"),
        )
        .await;
    }
    let failed = fleet.until_state(job.id, JobState::Failed).await;
    assert_eq!(failed.reason.unwrap(), "attempt 3 of 3 failed with STORE_UNAVAILABLE");
    assert_eq!(failed.failure.unwrap().code, Code::StoreUnavailable);
    let status: StatusView = fleet.get("/v1/status").await;
    assert_eq!(status.clusters[0].state, ClusterState::Broken, "{}", status.sentence);

    // A person tries again: a new job, whose first attempt still names the last one.
    let again: coordinator::api::types::JobView =
        fleet.post(&format!("/v1/jobs/{}/retry", job.id), &()).await;
    assert_eq!(again.retry_of, Some(job.id));
    let twice: coordinator::api::types::JobView =
        fleet.post(&format!("/v1/jobs/{}/retry", job.id), &()).await;
    assert_eq!(twice.id, again.id, "asking twice is asking once");
    w1.pulse().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    assert_eq!(work.spec.predecessor, before);
    w1.fail(&mut work, Failure::new(Code::PermissionDenied, Action::FixConfig, "no grant")).await;
    let failed = fleet.until_state(again.id, JobState::Failed).await;
    assert_eq!(failed.attempts_used, 1, "nobody retries what a person must change");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_draining_worker_hands_its_job_back_without_cost() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let mut w2 = Worker::new(&fleet, "w2").await;
    let job = fleet.backup().await;
    let first = w1.ticket().await;
    let mut work = w1.take(&first).await;
    w1.fail(&mut work, Failure::new(Code::WorkerDraining, Action::RetryElsewhere, "stopping"))
        .await;
    let ticket = w2.ticket().await;
    let work = w2.take(&ticket).await;
    assert_eq!(fleet.job(job.id).await.attempts_used, 1);
    assert_eq!(work.spec.predecessor, Some(first.attempt));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_grant_that_came_too_late_costs_no_attempt_and_is_not_repeated_at_once() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    let late = Failure::new(Code::WorkerDraining, Action::Retry, "the grant came too late");
    w1.fail(&mut work, late).await;
    let waiting = fleet.until_state(job.id, JobState::Waiting).await;
    assert_eq!(waiting.attempts_used, 0);
    assert!(waiting.not_before_at_ms > START, "{}", waiting.not_before_at_ms);
    assert_eq!(
        waiting.reason.as_deref(),
        Some("its worker handed it back: the grant came too late")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_ticket_that_nobody_answers_is_sent_again() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    fleet.backup().await;
    let first = w1.ticket().await;
    // It got lost. The worker lives on: its pulses keep coming while the ticket's time passes.
    for _ in 0..10 {
        fleet.hand.advance(600);
        w1.pulse().await;
        w1.heard(&fleet).await;
    }
    let second = w1.ticket().await;
    assert_eq!(second.attempt, first.attempt, "the same attempt, so that one of the two is denied");
    w1.take(&second).await;
    assert_eq!(w1.denied(&first, "n9").await, DenialReason::Taken);
}
