//! What a cluster is judged by when its archive is not looked at, and when its newest backup is bad.

use std::collections::BTreeMap;

use coordinator::api::types::{ClusterView, StatusView, SubmitRequest};
use policy::ClusterState;
use proto::job::{
    JobKind, Restore, RestoreOutcome, RestoreTarget, Task, VerifyRestore, VerifyRestoreOutcome,
};
use proto::message::{Holdings, ReportBody, RepositoryAway, WalStanding};
use proto::proof::{BrokenWal, Phase, Proof, ProofLevel, ProofRecovery};
use proto::{
    Action, ArchivedHeartbeats, BackupId, ClusterHeartbeat, Code, Failure, Heartbeat, JobState,
    LineageId, Lsn, Outcome, Step, SystemIdentifier, Timeline,
};

use crate::support::{
    Fleet, START, Work, Worker, backup_outcome, backup_request, eventually, orders, proof_of,
};

/// What a worker saw, by its own clock.
fn standing(at_ms: i64) -> WalStanding {
    WalStanding {
        cluster: orders(),
        lineage: LineageId::mint(1, [1; 10]),
        at_ms,
        timeline: Timeline(1),
        ancestors: Vec::new(),
        server_lsn: Lsn(9),
        line_from: Lsn(1),
        archived_to: Lsn(8),
        safe_at_ms: Some(at_ms - 100),
        waiting: None,
        gap: None,
        gaps: Vec::new(),
        conflict: None,
    }
}

pub(crate) async fn show(fleet: &Fleet) -> ClusterView {
    fleet.get("/v1/clusters/orders").await
}

/// A pulse after a while of the coordinator's time.
async fn pulse(fleet: &Fleet, worker: &mut Worker, after_ms: i64) -> ClusterView {
    fleet.hand.advance(after_ms);
    let now_ms = fleet.clock.now_ms();
    worker.pulse().await;
    eventually("the pulse is heard", || async {
        let view = show(fleet).await;
        (view.seen_at_ms == Some(now_ms)).then_some(view)
    })
    .await
}

async fn take_backup(fleet: &Fleet, worker: &mut Worker, verify: bool) -> BackupId {
    let verify = verify.then_some(ProofLevel::L5);
    back_up(fleet, worker, SubmitRequest { verify, ..backup_request() }, "file:///backups").await
}

pub(crate) async fn take_backup_into(
    fleet: &Fleet,
    worker: &mut Worker,
    repository: &str,
) -> BackupId {
    back_up(fleet, worker, backup_request(), repository).await
}

async fn back_up(
    fleet: &Fleet,
    worker: &mut Worker,
    request: SubmitRequest,
    repository: &str,
) -> BackupId {
    let job = fleet.submit(&request).await;
    let ticket = worker.ticket().await;
    let mut work = worker.take(&ticket).await;
    let Outcome::Backup(mut outcome) = backup_outcome(ticket.attempt) else { unreachable!() };
    outcome.stopped_at_ms = fleet.clock.now_ms();
    repository.clone_into(&mut outcome.repository);
    let outcome = Box::new(Outcome::Backup(outcome));
    worker.end(&mut work, ReportBody::Succeeded { outcome, steps: vec![] }).await;
    fleet.until_state(job.id, JobState::Succeeded).await;
    ticket.attempt.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_archive_that_nobody_looks_at_is_at_risk_while_a_worker_speaks() {
    use ClusterState::{AtRisk, Proved, Unknown};
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let backup = take_backup(&fleet, &mut w1, true).await;
    prove(&fleet, &mut w1, backup, true).await;
    // By the worker's clock, which stands still in these tests, it has just been seen.
    w1.wal = vec![standing(START)];
    let view = pulse(&fleet, &mut w1, 1).await;
    assert_eq!(view.wal.map(|wal| wal.at_ms), view.seen_at_ms, "in the coordinator's time");
    w1.wal.clear();
    let mut states = Vec::new();
    for _ in 0..5 {
        states.push(pulse(&fleet, &mut w1, 30_000).await.state);
    }
    assert_eq!(states, [Proved, Proved, Proved, Proved, AtRisk]);
    // After an outage of everything the worker has a while to look.
    fleet.hand.advance(600_000);
    assert_eq!(show(&fleet).await.state, Unknown);
    assert_eq!(pulse(&fleet, &mut w1, 1).await.state, Proved);
    w1.wal = vec![standing(START)];
    let view = pulse(&fleet, &mut w1, 50_000).await;
    assert_eq!(view.wal.map(|wal| wal.at_ms), view.seen_at_ms);
    assert_eq!(view.recoverable_to_at_ms, Some(START), "and nothing seems safer than it was");
}

/// Takes the proof that was ordered with a backup, and tells how it ended.
async fn prove(fleet: &Fleet, worker: &mut Worker, backup: BackupId, passed: bool) {
    let ticket = worker.any_ticket().await;
    let mut work = worker.take(&ticket).await;
    let proof = Proof {
        at_ms: fleet.clock.now_ms(),
        level_reached: Some(if passed { ProofLevel::L5 } else { ProofLevel::L1 }),
        passed,
        phases: [("restore", 500), ("start", 100), ("replay", 20), ("open", 30), ("check", 9_000)]
            .map(|(name, duration_ms)| Phase {
                name: name.to_owned(),
                duration_ms,
                counts_as_recovery: true,
            })
            .to_vec(),
        size_bytes: 500,
        ..proof_of(backup, ProofLevel::L5)
    };
    tell(fleet, worker, &mut work, proof).await;
}

/// Tells how a proof ended.
async fn tell(fleet: &Fleet, worker: &mut Worker, work: &mut Work, proof: Proof) {
    let outcome = Box::new(Outcome::VerifyRestore(VerifyRestoreOutcome { proof }));
    worker.end(work, ReportBody::Succeeded { outcome, steps: vec![] }).await;
    fleet.until_state(work.spec.job, JobState::Succeeded).await;
}

/// Orders a proof of its own, and tells how it ended.
pub(crate) async fn prove_again(fleet: &Fleet, worker: &mut Worker, proof: Proof) {
    let (backup, level) = (Some(proof.backup), proof.level_asked);
    let task = Task::VerifyRestore(VerifyRestore { backup, level, to: None, heartbeats: None });
    fleet.submit(&SubmitRequest::new(orders(), task)).await;
    let ticket = worker.any_ticket().await;
    let mut work = worker.take(&ticket).await;
    tell(fleet, worker, &mut work, proof).await;
}

/// Restores a backup of a thousand bytes in so many milliseconds; `reused` of them were in place.
async fn restore(
    fleet: &Fleet,
    worker: &mut Worker,
    backup: BackupId,
    duration_ms: i64,
    reused: u64,
) {
    let directory = "orders".parse().unwrap();
    let target = RestoreTarget { root: "/restore".to_owned(), directory };
    let task = Task::Restore(Restore { backup: Some(backup), ..Restore::at(target) });
    fleet.submit(&SubmitRequest::new(orders(), task)).await;
    let ticket = worker.any_ticket().await;
    let mut work = worker.take(&ticket).await;
    // Its clock is an hour ahead.
    let started_at_ms = fleet.clock.now_ms() + 3_600_000;
    let step = Step {
        number: 1,
        name: "restore".to_owned(),
        span_id: "0123456789abcdef".to_owned(),
        started_at_ms,
        ended_at_ms: Some(started_at_ms + duration_ms),
        failed: false,
        figures: BTreeMap::new(),
    };
    let outcome = RestoreOutcome {
        backup,
        directory: "/restore/orders".to_owned(),
        files: 1,
        size_bytes: 1_000,
        wal_files: 0,
        wal_bytes: 0,
        fetched_bytes: 1_000 - reused,
        reused_bytes: reused,
        stop_lsn: Lsn(1),
        planned_only: false,
        plan: vec![],
        recovery: None,
        archiving_stopped: false,
        settings_apart: None,
    };
    let outcome = Box::new(Outcome::Restore(outcome));
    worker.end(&mut work, ReportBody::Succeeded { outcome, steps: vec![step] }).await;
    fleet.until_state(work.spec.job, JobState::Succeeded).await;
}

pub(crate) fn reach(view: &ClusterView) -> (Option<i64>, Option<i64>) {
    (view.recoverable_to_at_ms, view.unproved_to_at_ms)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_a_proved_backup_is_something_to_recover_from() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let first = take_backup(&fleet, &mut w1, true).await;
    let view = show(&fleet).await;
    assert_eq!(reach(&view), (None, Some(START)));
    assert_eq!(view.recovery_time, None, "nothing is measured");
    assert!(view.reason.ends_with("not proved yet: no backup of it is proved"), "{}", view.reason);
    prove(&fleet, &mut w1, first, true).await;
    let view = show(&fleet).await;
    assert_eq!(reach(&view), (Some(START), Some(START)));
    // The backup has twice the bytes that the proof restored.
    let total_ms = |view: &ClusterView| view.recovery_time.unwrap().total_ms();
    assert_eq!(total_ms(&view), Some(1_150));
    let estimate = "pgmuster_recovery_time_estimate_seconds{cluster=\"orders\"}";
    assert_eq!(fleet.metric(estimate).await, Some(2.0));

    // A restore of as many bytes takes longer, where people restore.
    fleet.hand.advance(250);
    restore(&fleet, &mut w1, first, 2_000, 0).await;
    let view = show(&fleet).await;
    assert_eq!(total_ms(&view), Some(2_150), "the proof measured how long a server takes to start");
    // One that found files in place measures nothing, and hides nothing.
    fleet.hand.advance(250);
    restore(&fleet, &mut w1, first, 5, 999).await;
    assert_eq!(total_ms(&show(&fleet).await), Some(2_150));

    // A newer one changes nothing before it is proved.
    fleet.hand.advance(500);
    let second = take_backup(&fleet, &mut w1, true).await;
    let view = show(&fleet).await;
    assert_eq!(reach(&view), (Some(START), Some(START + 1_000)));
    assert!(view.reason.ends_with("not proved yet: proved reach ends 1 s ago"), "{}", view.reason);
    prove(&fleet, &mut w1, second, false).await;
    let view = show(&fleet).await;
    assert_eq!(view.state, ClusterState::Broken);
    assert_eq!(reach(&view), (Some(START), Some(START)), "from the one before");
    let metric = "pgmuster_recovery_point_timestamp_seconds{cluster=\"orders\"}";
    let at_s = fleet.metric(metric).await.map(|at_s| format!("{at_s}"));
    assert_eq!(at_s, Some(format!("{}", START / 1_000)));

    // WAL leads on from it to where the archive is.
    w1.wal = vec![WalStanding { safe_at_ms: Some(START + 500), ..standing(START + 600) }];
    let view = pulse(&fleet, &mut w1, 1).await;
    assert_eq!(reach(&view), (Some(START + 500), Some(START + 500)));
    assert_eq!(total_ms(&view), None, "nobody measured how fast WAL is replayed");
    assert_eq!(fleet.metric(estimate).await, None);
}

fn heartbeat(n: u64) -> Heartbeat {
    Heartbeat {
        system_identifier: SystemIdentifier(42),
        timeline: Timeline(1),
        transaction: 700 + n,
        begun_lsn: Lsn(n),
        ended_lsn: Lsn(n + 1),
        begun_at_ms: START,
        ended_at_ms: START + 1,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proof_is_told_of_the_heartbeats_that_were_archived_and_of_no_others() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let backup = take_backup(&fleet, &mut w1, false).await;
    let stranger = Heartbeat { system_identifier: SystemIdentifier(43), ..heartbeat(4) };
    let told = [heartbeat(3), heartbeat(7), heartbeat(8), stranger];
    let of = |cluster: &str, heartbeat| ClusterHeartbeat {
        cluster: cluster.parse().unwrap(),
        heartbeat,
    };
    w1.heartbeats = told.map(|heartbeat| of("orders", heartbeat)).to_vec();
    w1.heartbeats.push(of("not-served", heartbeat(5)));
    // The archive is at 8. The same is told twice, as after a lost answer.
    w1.wal = vec![standing(START)];
    pulse(&fleet, &mut w1, 1).await;
    let view = pulse(&fleet, &mut w1, 1).await;
    assert_eq!(view.heartbeat_at_ms, Some(START));
    // What an order claims to know is worth nothing.
    let lineage = LineageId::mint(1, [9; 10]);
    let claimed = ArchivedHeartbeats { lineage, known: vec![heartbeat(1)] };
    let known = asked_for(&fleet, &mut w1, backup, Some(claimed)).await.unwrap();
    assert_eq!(known.lineage, standing(START).lineage);
    assert_eq!(known.known, [heartbeat(3), heartbeat(7)]);
}

/// Which heartbeats a proof is told of that is ordered now. It passes.
async fn asked_for(
    fleet: &Fleet,
    worker: &mut Worker,
    backup: BackupId,
    heartbeats: Option<ArchivedHeartbeats>,
) -> Option<ArchivedHeartbeats> {
    let level = ProofLevel::L3;
    let task = VerifyRestore { backup: Some(backup), level, to: None, heartbeats };
    let task = Task::VerifyRestore(task);
    fleet.submit(&SubmitRequest::new(orders(), task)).await;
    let ticket = worker.any_ticket().await;
    let mut work = worker.take(&ticket).await;
    let Task::VerifyRestore(task) = work.spec.task.clone() else { unreachable!() };
    let proof = Proof { at_ms: fleet.clock.now_ms(), ..proof_of(backup, level) };
    tell(fleet, worker, &mut work, proof).await;
    task.heartbeats
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_heartbeat_that_was_archived_is_asked_for_until_its_server_does_not_have_it() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let backup = take_backup(&fleet, &mut w1, false).await;
    let of = |heartbeat| ClusterHeartbeat { cluster: orders(), heartbeat };
    w1.wal = vec![standing(START)];
    pulse(&fleet, &mut w1, 1).await;
    // The archive has them before they are told, but for the last one.
    w1.heartbeats = [3, 5, 7, 8].map(|n| of(heartbeat(n))).to_vec();
    w1.wal.clear();
    pulse(&fleet, &mut w1, 1).await;
    w1.heartbeats.clear();
    let seen = |at_ms, server, archived_to| {
        let (server_lsn, archived_to) = (Lsn(server), Lsn(archived_to));
        vec![WalStanding { server_lsn, archived_to, safe_at_ms: None, ..standing(at_ms) }]
    };
    // Its end is deleted, and the worker sees that.
    w1.wal = seen(START + 1, 9, 4);
    assert_eq!(pulse(&fleet, &mut w1, 1).await.wal.unwrap().archived_to, Lsn(4));
    let known = asked_for(&fleet, &mut w1, backup, None).await.unwrap();
    assert_eq!(known.known, [3, 5, 7].map(heartbeat));
    // The server is set back to a snapshot of its disks.
    w1.wal = seen(START + 2, 7, 4);
    pulse(&fleet, &mut w1, 1).await;
    let known = asked_for(&fleet, &mut w1, backup, None).await.unwrap();
    assert_eq!(known.known, [3, 5, 7].map(heartbeat), "what tells that may have been on its way");
    w1.wal = seen(START + 70_000, 7, 4);
    pulse(&fleet, &mut w1, 70_000).await;
    let known = asked_for(&fleet, &mut w1, backup, None).await.unwrap();
    assert_eq!(known.known, [3, 5].map(heartbeat));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_promise_for_a_cluster_that_nobody_knows_is_told_with_the_status() {
    let promised = serde_json::from_str(r#"{"clusters": {"ordres": {"rpo": "1min"}}}"#);
    let fleet = Fleet::promising(promised.unwrap()).await;
    let status: StatusView = fleet.get("/v1/status").await;
    assert_eq!(status.warnings, Vec::<String>::new(), "no cluster is known yet");
    let _w1 = Worker::new(&fleet, "w1").await;
    let status: StatusView = fleet.get("/v1/status").await;
    let told = "objectives.clusters.ordres: no cluster of this name is known; did you mean orders?";
    assert_eq!(status.warnings, [told]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_is_held_against_what_is_promised_for_it() {
    let promised = serde_json::from_str(
        r#"{"rpo": "1h", "rto": "30min", "clusters": {"orders": {"rpo": "1min"}}}"#,
    );
    let fleet = Fleet::promising(promised.unwrap()).await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let backup = take_backup(&fleet, &mut w1, true).await;
    prove(&fleet, &mut w1, backup, true).await;
    let view = show(&fleet).await;
    assert_eq!(view.state, ClusterState::Proved);
    assert_eq!((view.rpo_objective_ms, view.rto_objective_ms), (Some(60_000), Some(1_800_000)));
    let mut states = Vec::new();
    for _ in 0..3 {
        states.push(pulse(&fleet, &mut w1, 24_000).await.state);
    }
    assert_eq!(states, [ClusterState::Proved, ClusterState::Proved, ClusterState::Broken]);
    pulse(&fleet, &mut w1, 48_000).await;
    let status: StatusView = fleet.get("/v1/status").await;
    assert_eq!(
        status.sentence,
        "The only cluster is not proved recoverable to target: orders is BROKEN (a disaster now would lose 2 min, \
         the objective is 1 min: its WAL is not archived)."
    );
    let metric = async |name: &str| fleet.metric(&format!("{name}{{cluster=\"orders\"}}")).await;
    assert_eq!(metric("pgmuster_rpo_objective_seconds").await, Some(60.0));
    assert_eq!(metric("pgmuster_rto_objective_seconds").await, Some(1_800.0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_that_a_proof_could_not_replay_ends_the_line_until_a_recovery_gets_past_it() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let backup = take_backup(&fleet, &mut w1, true).await;
    prove(&fleet, &mut w1, backup, true).await;
    let along = START + 500;
    w1.wal = vec![WalStanding { safe_at_ms: Some(along), ..standing(START + 600) }];
    let view = pulse(&fleet, &mut w1, 1_000).await;
    assert_eq!((view.state, reach(&view)), (ClusterState::Proved, (Some(along), Some(along))));

    let proof = |broken_wal, recovery| {
        let reached = Proof { at_ms: fleet.clock.now_ms(), ..proof_of(backup, ProofLevel::L4) };
        Proof { broken_wal, recovery, ..reached.reached() }
    };
    let broken = BrokenWal {
        target: "the end of the WAL".to_owned(),
        timeline: Timeline(1),
        from: Lsn(5),
        to: Lsn(6),
    };
    let failed =
        Proof { level_reached: Some(ProofLevel::L2), passed: false, ..proof(Some(broken), None) };
    prove_again(&fleet, &mut w1, failed).await;
    let view = show(&fleet).await;
    assert_eq!((view.state, reach(&view)), (ClusterState::Broken, (Some(START), Some(START))));
    assert!(view.reason.starts_with("archived WAL at 0/5 of timeline 1"), "{}", view.reason);
    // The backup alone was never in doubt.
    fleet.hand.advance(1_000);
    let plain = proof(None, None);
    prove_again(&fleet, &mut w1, plain).await;
    let view = show(&fleet).await;
    assert_eq!((view.state, reach(&view).0), (ClusterState::Broken, Some(START)));

    let replayed = |to| {
        let recovery = ProofRecovery {
            target: format!("position {}", Lsn(to)),
            timeline: Timeline(1),
            reached_lsn: Lsn(to),
            last_commit: None,
            evidence: String::new(),
            replayed_bytes: 4,
        };
        proof(None, Some(recovery))
    };
    prove_again(&fleet, &mut w1, replayed(5)).await;
    assert_eq!(show(&fleet).await.state, ClusterState::Broken, "it ended before");
    prove_again(&fleet, &mut w1, replayed(6)).await;
    let view = show(&fleet).await;
    assert_eq!((view.state, reach(&view)), (ClusterState::Proved, (Some(along), Some(along))));
    assert!(view.broken_wal.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_gone_from_its_repository_is_no_recovery_source() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let first = take_backup(&fleet, &mut w1, true).await;
    prove(&fleet, &mut w1, first, true).await;
    fleet.hand.advance(1_000);
    let second = take_backup(&fleet, &mut w1, true).await;
    prove(&fleet, &mut w1, second, true).await;
    let later = START + 1_000;
    assert_eq!(reach(&show(&fleet).await), (Some(later), Some(later)));

    let held = |repository: &str, server: u64, backups: &[BackupId]| {
        let server = SystemIdentifier(server);
        vec![Holdings::new(orders(), repository.to_owned(), server, START, backups.to_vec())]
    };
    // It had been looked before the backups were recorded, for all that is known.
    w1.holdings = held("file:///backups", 42, &[]);
    assert_eq!(reach(&pulse(&fleet, &mut w1, 59_000).await).0, Some(later));
    // What is held of another server says nothing.
    w1.holdings = held("file:///backups", 43, &[]);
    assert_eq!(reach(&pulse(&fleet, &mut w1, 5_000).await).0, Some(later));

    w1.holdings = held("file:///backups", 42, &[first]);
    let view = pulse(&fleet, &mut w1, 5_000).await;
    assert_eq!(reach(&view), (Some(START), Some(START)));
    assert_eq!(view.backup.unwrap().id, first, "it is judged by what is left");
    let events = fleet.events("backups_gone").await;
    let says = format!("1 backup of orders not in file:///backups, or given up, {second} first");
    assert_eq!(events.into_iter().map(|event| event.message).collect::<Vec<_>>(), [says]);
    w1.holdings = held("file:///backups", 42, &[]);
    let view = pulse(&fleet, &mut w1, 5_000).await;
    assert_eq!((view.state, reach(&view)), (ClusterState::Broken, (None, None)));
    assert!(view.reason.contains("none of its backups"), "{}", view.reason);
    w1.holdings = held("file:///backups", 42, &[first, second]);
    let view = pulse(&fleet, &mut w1, 5_000).await;
    assert_eq!(reach(&view).0, Some(later), "somebody took that back");
}

/// Hosts may have directories of one name, and there is one bucket of a name.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_directory_only_the_worker_that_wrote_there_can_say_what_is_gone() {
    for (repository, is_shared) in [("file:///backups", false), ("s3://backups", true)] {
        let fleet = Fleet::new().await;
        let mut w1 = Worker::new(&fleet, "w1").await;
        let backup = take_backup_into(&fleet, &mut w1, repository).await;
        prove_again(&fleet, &mut w1, proof_of(backup, ProofLevel::L4).reached()).await;
        let none =
            Holdings::new(orders(), repository.to_owned(), SystemIdentifier(42), START, vec![]);
        // The same cluster, from the host to which it failed over.
        let mut w2 = Worker::new(&fleet, "w2").await;
        w2.holdings = vec![none.clone()];
        let left = (!is_shared).then_some(START);
        assert_eq!(reach(&pulse(&fleet, &mut w2, 65_000).await).0, left, "{repository}");
        w1.holdings = vec![none];
        assert_eq!(reach(&pulse(&fleet, &mut w1, 5_000).await).0, None, "{repository}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_looks_elsewhere_has_what_it_finds_there() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let backup = take_backup(&fleet, &mut w1, true).await;
    prove(&fleet, &mut w1, backup, true).await;
    let held = |backups: &[BackupId]| {
        let (repository, server) = ("file:///elsewhere".to_owned(), SystemIdentifier(42));
        vec![Holdings::new(orders(), repository, server, START, backups.to_vec())]
    };
    let mut w2 = Worker::new(&fleet, "w2").await;
    w2.holdings = held(&[]);
    assert_eq!(reach(&pulse(&fleet, &mut w2, 65_000).await).0, Some(START), "it never had it");
    // The URL of its repository was changed: to one that is moved there, or to another one.
    w1.holdings = held(&[backup]);
    assert_eq!(reach(&pulse(&fleet, &mut w1, 5_000).await).0, Some(START));
    w1.holdings = held(&[]);
    let view = pulse(&fleet, &mut w1, 5_000).await;
    assert_eq!((view.state, reach(&view)), (ClusterState::Broken, (None, None)));
    assert!(view.reason.contains("none of its backups"), "{}", view.reason);
    w1.holdings = held(&[backup]);
    assert_eq!(reach(&pulse(&fleet, &mut w1, 5_000).await).0, Some(START));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_that_is_gone_recovers_nothing_and_an_outage_takes_no_claim_away() {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    let backup = take_backup(&fleet, &mut w1, true).await;
    prove(&fleet, &mut w1, backup, true).await;
    fleet.hand.advance(300_000);
    let away = |code| {
        let (place, failure) =
            ("file:///backups".to_owned(), Failure::new(code, Action::Retry, "no"));
        Some(RepositoryAway { place, since_ms: START, failure })
    };
    let told = async |worker: &mut Worker, away: Option<RepositoryAway>| {
        worker.repository_away = away;
        fleet.hand.advance(1_000);
        let now_ms = fleet.clock.now_ms();
        worker.pulse_with(Some(worker.offers())).await;
        eventually("the offers are heard", || async {
            let view = show(&fleet).await;
            (view.seen_at_ms == Some(now_ms)).then_some(view)
        })
        .await
    };
    let view = told(&mut w1, away(Code::StoreUnavailable)).await;
    assert_eq!((view.state, reach(&view).0), (ClusterState::AtRisk, Some(START)));
    let says =
        "nobody can look into its repository file:///backups since 5 min: STORE_UNAVAILABLE: no";
    assert_eq!(view.reason, says);
    let view = told(&mut w1, away(Code::RepositoryMissing)).await;
    assert_eq!((view.state, reach(&view)), (ClusterState::Broken, (None, None)));
    assert_eq!(
        view.reason,
        "it cannot be recovered: its repository file:///backups is gone since 5 min"
    );
    // Another host has a directory of that name.
    let mut w2 = Worker::new(&fleet, "w2").await;
    assert_eq!(told(&mut w2, None).await.state, ClusterState::Broken);
    fleet.hand.advance(600_000);
    assert_eq!(show(&fleet).await.state, ClusterState::Broken, "nobody lives: that was said last");
    let view = told(&mut w1, None).await;
    assert_eq!((view.state, reach(&view).0), (ClusterState::Proved, Some(START)));
    told(&mut w2, away(Code::RepositoryMissing)).await;
    assert_eq!(show(&fleet).await.state, ClusterState::Proved, "the one that wrote there finds it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_whose_clock_is_ahead_makes_nothing_seem_safer() {
    const AHEAD: i64 = 3_600_000;
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    fleet.submit(&backup_request()).await;
    let ticket = w1.ticket().await;
    let mut work = w1.take(&ticket).await;
    let Outcome::Backup(mut outcome) = backup_outcome(ticket.attempt) else { unreachable!() };
    (outcome.started_at_ms, outcome.stopped_at_ms) = (START + AHEAD, START + AHEAD);
    let outcome = Box::new(Outcome::Backup(outcome));
    w1.end(&mut work, ReportBody::Succeeded { outcome, steps: vec![] }).await;
    fleet.until_state(work.spec.job, JobState::Succeeded).await;
    let backup = ticket.attempt.into();
    assert_eq!(reach(&show(&fleet).await).1, Some(START), "of now, and not of later");

    let passed = proof_of(backup, ProofLevel::L4).reached();
    prove_again(&fleet, &mut w1, Proof { at_ms: START + AHEAD, ..passed.clone() }).await;
    assert_eq!(show(&fleet).await.state, ClusterState::Proved);
    // What another finds a moment later is later.
    fleet.hand.advance(1);
    let failed = Proof { passed: false, level_reached: None, at_ms: START + 1, ..passed };
    prove_again(&fleet, &mut w1, failed).await;
    let view = show(&fleet).await;
    assert_eq!((view.state, reach(&view)), (ClusterState::Broken, (None, None)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_is_ordered_behind_wal_that_cannot_be_replayed() {
    // Also where nobody tells how the archive stands.
    for wal in [vec![standing(START)], vec![]] {
        let fleet = Fleet::new().await;
        let mut w1 = Worker::new(&fleet, "w1").await;
        let backup = take_backup(&fleet, &mut w1, true).await;
        prove(&fleet, &mut w1, backup, true).await;
        w1.wal = wal;
        assert!(pulse(&fleet, &mut w1, 10_001).await.open_jobs.is_empty());
        let broken = BrokenWal {
            target: "the end of the WAL".to_owned(),
            timeline: Timeline(1),
            from: Lsn(5),
            to: Lsn(6),
        };
        let at_ms = fleet.clock.now_ms();
        let proof = proof_of(backup, ProofLevel::L4);
        prove_again(&fleet, &mut w1, Proof { at_ms, broken_wal: Some(broken), ..proof }).await;
        pulse(&fleet, &mut w1, 10_001).await;
        let ticket = w1.any_ticket().await;
        assert_eq!(ticket.kind, JobKind::Backup);
    }
}
