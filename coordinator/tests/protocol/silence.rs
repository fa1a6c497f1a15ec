//! Workers that fall silent, restart, or come back late.

use coordinator::api::types::{BackupView, ClusterView, JobList};
use proto::job::{ProbeOutcome, SeenVerdict, Task};
use proto::message::ReportBody;
use proto::{JobId, JobState, Outcome};

use crate::support::{Fleet, Work, Worker, backup_outcome, backup_request, eventually};

/// A worker near enough to look, which serves nothing itself.
async fn witness(fleet: &Fleet) -> Worker {
    Worker::serving(fleet, "w9", &[]).await
}

async fn answer(witness: &mut Worker, work: &mut Work, outcome: ProbeOutcome) {
    let outcome = Box::new(Outcome::Probe(outcome));
    witness.end(work, ReportBody::Succeeded { outcome, steps: vec![] }).await;
}

/// Lets time pass while only the witness speaks, until a probe's ticket can be claimed.
async fn probe(fleet: &Fleet, witness: &mut Worker) -> Work {
    let ticket = loop {
        fleet.hand.advance(200);
        witness.pulse().await;
        witness.heard(fleet).await;
        let jobs: JobList = fleet.get("/v1/jobs?kind=probe&state=queued").await;
        if !jobs.jobs.is_empty() {
            break witness.any_ticket().await;
        }
    };
    witness.take(&ticket).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_attempt_is_lost_on_evidence_and_the_next_one_names_it() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let mut w9 = witness(&fleet).await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let dead = w1.take(&ticket).await;
    drop(w1);

    let mut looking = probe(&fleet, &mut w9).await;
    let Task::Probe(asked) = &looking.spec.task else { panic!("{:?}", looking.spec.task) };
    assert_eq!((asked.attempt, asked.terminate), (ticket.attempt, false));
    let suspected = fleet.job(job.id).await;
    assert_eq!(suspected.state, JobState::Running, "suspected is not lost");
    assert!(suspected.reason.unwrap().starts_with("its worker is silent"));

    answer(
        &mut w9,
        &mut looking,
        ProbeOutcome { sessions: Some(1), terminated: 0, verdict: Some(SeenVerdict::Open) },
    )
    .await;
    let still = "its worker is silent, but the server still shows 1 of its sessions";
    fleet.pass_until_job(job.id, still, |job| job.reason.as_deref() == Some(still)).await;

    let mut looking = probe(&fleet, &mut w9).await;
    answer(
        &mut w9,
        &mut looking,
        ProbeOutcome { sessions: Some(0), terminated: 0, verdict: Some(SeenVerdict::Open) },
    )
    .await;
    let waiting =
        fleet.pass_until_job(job.id, "given up", |job| job.state == JobState::Waiting).await;
    assert!(
        waiting
            .reason
            .unwrap()
            .starts_with("attempt 1 was lost (the server shows no session of it)")
            || waiting.attempts_used == 1
    );
    assert_eq!(fleet.events("attempt_lost").await.len(), 1);

    let mut w2 = Worker::new(&fleet, "w2").await;
    fleet.hand.advance(2_000);
    w2.pulse().await;
    let next = w2.ticket().await;
    let work = w2.take(&next).await;
    assert_eq!(work.spec.predecessor, Some(ticket.attempt));
    assert!(work.grant.token > dead.grant.token);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_nobody_can_look_patience_decides() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    w1.take(&ticket).await;
    let lost = fleet.pass_until_job(job.id, "lost", |job| job.state == JobState::Waiting).await;
    assert!(
        lost.failure.unwrap().message.contains("silent for 20 s, unproven"),
        "{:?}",
        lost.reason
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_speaks_again_keeps_its_attempt() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    fleet.pass_until_job(job.id, "suspected", |job| job.reason.is_some()).await;
    w1.pulse().await;
    fleet
        .until(job.id, "trusted again", |job| {
            job.reason.is_none() && job.state == JobState::Running
        })
        .await;
    w1.succeed(&mut work).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    assert!(fleet.events("attempt_lost").await.is_empty());
}

/// The worker goes on pulsing without the job's attempt, until that is lost, and said to be.
async fn is_lost_as_unlisted(fleet: &Fleet, w1: &mut Worker, job: JobId) {
    while fleet.job(job).await.state == JobState::Running {
        fleet.hand.advance(200);
        w1.pulse().await;
        w1.heard(fleet).await;
    }
    let lost = &fleet.events("attempt_lost").await[0];
    assert_eq!(lost.message, "worker w1 is alive and no longer runs it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_lives_and_no_longer_lists_an_attempt_has_lost_it() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    w1.take(&ticket).await;
    w1.running.clear();
    is_lost_as_unlisted(&fleet, &mut w1, job.id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restarted_worker_has_lost_what_it_does_not_list() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    let former = w1.boot;
    w1.restart();
    w1.announce(&fleet).await;
    let waiting = fleet.until_state(job.id, JobState::Waiting).await;
    assert!(waiting.failure.unwrap().message.contains("worker w1 restarted"));
    fleet.hand.advance(waiting.not_before_at_ms - crate::support::START);
    w1.pulse().await;
    let next = w1.ticket().await;
    assert_ne!(next.attempt, ticket.attempt);

    // The report of the former life was still on its way: the backup exists, and nobody need take another.
    work.grant.boot = former;
    let outcome = Box::new(backup_outcome(ticket.attempt));
    w1.report(&mut work, ReportBody::Succeeded { outcome, steps: vec![] }).await;
    let done = fleet.until_state(job.id, JobState::Succeeded).await;
    assert_eq!(done.outcome, Some(backup_outcome(ticket.attempt)));
    assert_eq!(backups(&fleet).await, 1);
    assert_eq!(w1.denied(&next, "n5").await, proto::message::DenialReason::Taken);
}

/// Three workers, each with a backup of a cluster of its own.
async fn three_at_work(fleet: &Fleet) -> (Vec<(Worker, Work)>, Vec<JobId>) {
    let mut workers = Vec::new();
    let mut jobs = Vec::new();
    for (name, cluster) in [("w1", "a"), ("w2", "b"), ("w3", "c")] {
        let mut worker = Worker::serving(fleet, name, &[cluster]).await;
        let mut request = backup_request();
        request.cluster = cluster.parse().unwrap();
        let job = fleet.submit(&request).await;
        let ticket = worker.ticket().await;
        let work = worker.take(&ticket).await;
        jobs.push(job.id);
        workers.push((worker, work));
    }
    (workers, jobs)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_leases_at_once_are_a_storm_that_is_raised_and_harms_nobody() {
    let fleet = Fleet::new().await;
    let (mut workers, jobs) = three_at_work(&fleet).await;
    fleet
        .pass_until("the storm is told", || async {
            (!fleet.events("lease_storm").await.is_empty()).then_some(())
        })
        .await;
    assert_eq!(fleet.metric("pgmuster_lease_storms_total").await, Some(1.0));
    for job in &jobs {
        let job = fleet.job(*job).await;
        assert_eq!((job.state, job.reason), (JobState::Running, None), "nobody is suspected");
    }
    for (worker, work) in &mut workers {
        worker.succeed(work).await;
    }
    for job in &jobs {
        fleet.until_state(*job, JobState::Succeeded).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_storm_that_lasts_is_judged_one_by_one() {
    let fleet = Fleet::new().await;
    let (_workers, jobs) = three_at_work(&fleet).await;
    for job in jobs {
        fleet.pass_until_job(job, "given up", |job| job.state == JobState::Waiting).await;
    }
    assert_eq!(fleet.events("lease_storm").await.len(), 1, "told once");
    assert_eq!(fleet.events("attempt_lost").await.len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_attempt_that_should_stop_is_ended_on_the_server_first() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let mut w9 = witness(&fleet).await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    w1.take(&ticket).await;
    drop(w1);
    let _: serde_json::Value = fleet.post(&format!("/v1/jobs/{}/cancel", job.id), &()).await;
    let mut looking = probe(&fleet, &mut w9).await;
    let Task::Probe(asked) = &looking.spec.task else { panic!() };
    assert!(asked.terminate);
    answer(&mut w9, &mut looking, ProbeOutcome { sessions: Some(1), terminated: 1, verdict: None })
        .await;
    let mut looking = probe(&fleet, &mut w9).await;
    assert_eq!(fleet.job(job.id).await.state, JobState::Cancelling, "told to end is not ended");
    answer(&mut w9, &mut looking, ProbeOutcome { sessions: Some(0), terminated: 0, verdict: None })
        .await;
    let done =
        fleet.pass_until_job(job.id, "cancelled", |job| job.state == JobState::Cancelled).await;
    assert_eq!(
        done.reason.as_deref(),
        Some("its attempt is gone: the server shows no session of it")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_was_given_up_is_revoked_when_it_shows_up_again() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let work = w1.take(&ticket).await;
    fleet.pass_until_job(job.id, "lost", |job| job.state == JobState::Waiting).await;
    w1.pulse().await;
    w1.heard(&fleet).await;
    fleet.hand.advance(500);
    let beacon = w1.beacon(|beacon| !beacon.revoked.is_empty()).await;
    assert_eq!(
        (beacon.revoked[0].attempt, beacon.revoked[0].token),
        (ticket.attempt, work.grant.token)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_clock_of_leases_stands_still_while_the_coordinator_is_cut_off() {
    let mut fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    // Nobody leads for longer than any lease or patience.
    fleet.handle.take().unwrap().crash().await;
    for _ in 0..300 {
        fleet.hand.advance(100);
    }
    fleet.start().await;
    assert_eq!(fleet.job(job.id).await.state, JobState::Running);
    w1.pulse().await;
    w1.heard(&fleet).await;
    w1.succeed(&mut work).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    eventually("nothing was lost", || async {
        fleet.events("attempt_lost").await.is_empty().then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_only_the_repository_told_of_is_known_once_it_is_reported() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let mut w9 = witness(&fleet).await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    drop(w1);
    let mut looking = probe(&fleet, &mut w9).await;
    let committed =
        ProbeOutcome { sessions: Some(0), terminated: 0, verdict: Some(SeenVerdict::Commit) };
    answer(&mut w9, &mut looking, committed).await;
    let done =
        fleet.pass_until_job(job.id, "finished", |job| job.state == JobState::Succeeded).await;
    assert_eq!(done.outcome, None);
    assert!(done.reason.unwrap().contains("COMMIT"));
    let mut w1 = Worker::undeclared(&fleet, "w1", 1);
    w1.succeed(&mut work).await;
    let known = fleet.until(job.id, "known", |job| job.outcome.is_some()).await;
    assert_eq!(known.outcome, Some(backup_outcome(ticket.attempt)));
    assert_eq!((known.state, known.ended_at_ms), (JobState::Succeeded, done.ended_at_ms));
    assert_eq!(backups(&fleet).await, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_ended_and_runs_on_is_revoked() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    w1.succeed(&mut work).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    let token = work.grant.token;
    let listed = proto::message::RunningAttempt { attempt: ticket.attempt, token, progress: None };
    w1.running.push(listed);
    fleet.hand.advance(30_000);
    // The offers are answered with a change that the test can see: this pulse was taken in.
    w1.clusters.push("seen");
    w1.announce(&fleet).await;
    cluster(&fleet, "seen").await;
    fleet.hand.advance(500);
    let now_ms = fleet.clock.now_ms();
    let beacon = w1.beacon(|beacon| beacon.at_ms >= now_ms).await;
    assert!(beacon.revoked.is_empty(), "it is on its way out");
    w1.clusters.push("again");
    w1.announce(&fleet).await;
    cluster(&fleet, "again").await;
    fleet.hand.advance(500);
    let beacon = w1.beacon(|beacon| !beacon.revoked.is_empty()).await;
    assert_eq!((beacon.revoked[0].attempt, beacon.revoked[0].token), (ticket.attempt, token));
}

/// How many backups the coordinator knows.
async fn backups(fleet: &Fleet) -> usize {
    let all: Vec<BackupView> = fleet.get("/v1/backups").await;
    all.len()
}

/// A cluster, as soon as it is known.
async fn cluster(fleet: &Fleet, name: &str) -> ClusterView {
    let path = format!("/v1/clusters/{name}");
    eventually("the cluster is known", || async {
        let (code, body) = fleet.request("GET", &path, None).await;
        code.is_success().then(|| serde_json::from_str(&body).unwrap())
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_of_a_life_that_is_over_earns_nothing() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    let late = w1.claim_of(&ticket, "n1");
    w1.restart();
    w1.announce(&fleet).await;
    w1.send_claim(&late).await;
    let (answer, _) = w1.answer().await;
    let proto::message::Control::Denial(denial) = answer else { panic!("{answer:?}") };
    assert_eq!(denial.reason, proto::message::DenialReason::NotForYou);
    assert_eq!(fleet.job(job.id).await.attempts_used, 0);
    w1.take(&ticket).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_of_a_life_that_is_over_is_lost_although_it_is_listed() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    w1.take(&ticket).await;
    let listed = w1.running.clone();
    w1.restart();
    w1.running = listed;
    is_lost_as_unlisted(&fleet, &mut w1, job.id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lease_outlasts_two_pulses_that_got_lost() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    w1.every_ms = 30_000;
    w1.announce(&fleet).await;
    let job = fleet.backup().await;
    let ticket = w1.ticket().await;
    w1.take(&ticket).await;
    let granted_at_ms = fleet.clock.now_ms();
    fleet.pass_until_job(job.id, "suspected", |job| job.reason.is_some()).await;
    assert!(fleet.clock.now_ms() - granted_at_ms >= 90_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_seen_through_any_worker_that_serves_it() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let _w2 = Worker::new(&fleet, "w2").await;
    fleet.hand.advance(1_000);
    w1.pulse().await;
    let now_ms = fleet.clock.now_ms();
    eventually("the pulse of the other one counts", || async {
        (cluster(&fleet, "orders").await.seen_at_ms == Some(now_ms)).then_some(())
    })
    .await;
}
