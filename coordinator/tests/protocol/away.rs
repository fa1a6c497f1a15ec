//! Who has the word about a repository that is gone: of several workers, of which some are silent or have not looked.

use coordinator::api::types::ClusterView;
use policy::ClusterState::{Broken, Proved};
use proto::message::{RepositoryAway, RepositoryLook};
use proto::{Action, Code, Failure, LineageId, Proof, ProofLevel};

use crate::archive::{prove_again, reach, show, take_backup_into};
use crate::support::{Fleet, START, Worker, eventually, proof_of};

/// Says that its repository is gone.
fn gone(worker: &mut Worker) {
    let failure = Failure::new(Code::RepositoryMissing, Action::Retry, "no");
    let place = "its place".to_owned();
    worker.repository_away = Some(RepositoryAway { place, since_ms: START, failure });
    worker.repository_look = Some(RepositoryLook::Failed);
}

/// Says how its last look ended, and nothing else.
fn looked(worker: &mut Worker, look: Option<RepositoryLook>) {
    (worker.repository_away, worker.repository_look) = (None, look);
}

/// That it found a repository with the `n`-th lineage of all; the first is that of the backup.
#[expect(clippy::unnecessary_wraps, reason = "what an offer says")]
fn found(n: u8) -> Option<RepositoryLook> {
    Some(RepositoryLook::Found { lineages: Some(vec![LineageId::mint(1, [n; 10])]) })
}

/// A pulse with offers after a while of the coordinator's time.
async fn tell(fleet: &Fleet, worker: &mut Worker, after_ms: i64) -> ClusterView {
    fleet.hand.advance(after_ms);
    let now_ms = fleet.clock.now_ms();
    worker.pulse_with(Some(worker.offers())).await;
    eventually("the offers are heard", || async {
        let view = show(fleet).await;
        (view.seen_at_ms == Some(now_ms)).then_some(view)
    })
    .await
}

/// A proved backup that `w1` took, and another worker of the same cluster; both may be silent for three minutes.
async fn two_workers(repository: &str) -> (Fleet, Worker, Worker) {
    let fleet = Fleet::new().await;
    let mut w1 = Worker::new(&fleet, "w1").await;
    w1.every_ms = 60_000;
    let backup = take_backup_into(&fleet, &mut w1, repository).await;
    let proof = proof_of(backup, ProofLevel::L4).reached();
    prove_again(&fleet, &mut w1, Proof { at_ms: START, ..proof }).await;
    let mut w2 = Worker::new(&fleet, "w2").await;
    w2.every_ms = 60_000;
    (w1.location, w2.location) = (repository.to_owned(), repository.to_owned());
    (fleet, w1, w2)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bucket_that_one_says_is_gone_is_gone_until_somebody_finds_it() {
    let (fleet, mut w1, mut w2) = two_workers("s3://backups").await;
    gone(&mut w1);
    assert_eq!(tell(&fleet, &mut w1, 1_000).await.state, Broken, "an older worker says nothing");
    for (look, says) in [
        (None, "is older"),
        (Some(RepositoryLook::NotYet), "has not looked"),
        (Some(RepositoryLook::Failed), "cannot look"),
        (found(2), "found another repository"),
    ] {
        looked(&mut w2, look);
        let view = tell(&fleet, &mut w2, 1_000).await;
        assert_eq!((view.state, reach(&view)), (Broken, (None, None)), "it {says}");
    }
    for look in [found(1), Some(RepositoryLook::Found { lineages: None })] {
        looked(&mut w2, look);
        assert_eq!(tell(&fleet, &mut w2, 1_000).await.state, Proved);
        looked(&mut w2, Some(RepositoryLook::NotYet));
        assert_eq!(tell(&fleet, &mut w2, 1_000).await.state, Broken);
    }
    // A bucket of another name says nothing of this one.
    w2.location = "s3://others?region=eu".to_owned();
    looked(&mut w2, Some(RepositoryLook::Found { lineages: None }));
    assert_eq!(tell(&fleet, &mut w2, 1_000).await.state, Broken);
    w2.location = "s3://backups/?region=eu".to_owned();
    assert_eq!(tell(&fleet, &mut w2, 1_000).await.state, Proved);
    // The other way round, and the one that took the backup is long silent.
    looked(&mut w1, found(1));
    assert_eq!(tell(&fleet, &mut w1, 1_000).await.state, Proved);
    gone(&mut w2);
    assert_eq!(tell(&fleet, &mut w2, 1_000).await.state, Proved);
    assert_eq!(tell(&fleet, &mut w2, 400_000).await.state, Broken, "who finds it is silent");
}

/// A host may have another directory of that name, or none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_directory_its_writer_has_the_word_and_a_silent_one_against_nobody_who_finds_it() {
    let (fleet, mut w1, mut w2) = two_workers("file:///backups").await;
    gone(&mut w2);
    let view = tell(&fleet, &mut w2, 1_000).await;
    assert_eq!((view.state, reach(&view).0), (Proved, Some(START)), "it never had it");
    assert_eq!(tell(&fleet, &mut w2, 500_000).await.state, Proved, "the writer may be restarting");
    assert_eq!(tell(&fleet, &mut w2, 200_000).await.state, Broken, "nobody who lives finds it");
    assert_eq!(tell(&fleet, &mut w1, 1_000).await.state, Proved);

    gone(&mut w1);
    assert_eq!(tell(&fleet, &mut w1, 1_000).await.state, Broken);
    for after_ms in [1_000, 700_000] {
        for look in [None, found(2), Some(RepositoryLook::Found { lineages: None })] {
            looked(&mut w2, look);
            assert_eq!(tell(&fleet, &mut w2, after_ms).await.state, Broken, "that is another one");
        }
        // Both have it mounted.
        looked(&mut w2, found(1));
        let view = tell(&fleet, &mut w2, after_ms).await;
        assert_eq!((view.state, reach(&view).0), (Proved, Some(START)));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_worker_that_begins_anew_or_cannot_look_has_not_seen_what_was_gone() {
    let (fleet, mut w1, _) = two_workers("s3://backups").await;
    gone(&mut w1);
    assert_eq!(tell(&fleet, &mut w1, 1_000).await.state, Broken);
    w1.restart();
    for look in [RepositoryLook::NotYet, RepositoryLook::Failed] {
        looked(&mut w1, Some(look));
        let view = tell(&fleet, &mut w1, 1_000).await;
        assert!(view.reason.contains("repository its place is gone since"), "{}", view.reason);
    }
    looked(&mut w1, found(1));
    assert_eq!(tell(&fleet, &mut w1, 1_000).await.state, Proved);
    looked(&mut w1, Some(RepositoryLook::Failed));
    assert_eq!(tell(&fleet, &mut w1, 1_000).await.state, Proved, "an outage of a moment");
}
