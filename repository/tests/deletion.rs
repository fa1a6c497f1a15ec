//! What must not be deleted although somebody's clock or turn was unlucky.
#![expect(clippy::unwrap_used, reason = "a test")]

mod common;
mod interrupted;

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::{Bench, DAY_MS, NOW_MS, Tree, noise};
use interrupted::{Interrupted, Turn};
use proto::BackupId;
use repository::{CollectOptions, CollectPlan, Error, Reason, Wish};
use tokio_util::sync::CancellationToken;

fn options(now_ms: i64) -> CollectOptions {
    CollectOptions {
        by: "tester".into(),
        now_ms,
        grace_ms: DAY_MS,
        patience_ms: Some(2 * DAY_MS),
        pins_for_ms: 7 * DAY_MS,
        lists_for_ms: None,
        cancel: CancellationToken::new(),
    }
}

fn wish() -> Wish {
    Wish { by: "tester".into(), why: "to see it go".into(), at_ms: NOW_MS }
}

fn tree() -> Arc<Tree> {
    Arc::new(Tree::new().file("one", noise(1, 40_000)).file("two", noise(2, 40_000)))
}

async fn plan(bench: &Bench, now_ms: i64) -> CollectPlan {
    bench.repository.plan_collection(bench.lineage, &options(now_ms)).await.unwrap()
}

async fn refused(bench: &Bench, backup: BackupId, why: &str) {
    let error = bench.repository.forget(bench.lineage, backup, &wish()).await.unwrap_err();
    assert!(matches!(&error, Error::Wanted { reason, .. } if reason.contains(why)), "{error}");
}

/// A proof of a backup that was booted.
async fn prove(bench: &Bench, backup: BackupId) {
    let proof = serde_json::json!({
        "backup": backup, "lineage": bench.lineage, "cluster": "orders", "system_identifier": "7",
        "worker": "w", "at_ms": 1, "level_asked": "L4", "level_reached": "L4", "passed": true,
        "phases": [], "size_bytes": 1, "tables": 1, "rows": 1, "tables_exact": 0,
        "tables_bounded": 0, "checks": [],
    });
    let signed = serde_json::json!({ "payload": proof.to_string(), "signature": "" });
    let bytes = Bytes::from(signed.to_string());
    bench.repository.add_proof(bench.lineage, backup, bytes).await.unwrap();
}

/// One backup was committed by a worker whose clock was a day ahead. Those that follow it are newer all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_clock_that_was_ahead_once_makes_no_later_backup_an_old_one() {
    let bench = Bench::new().await;
    let tree = tree();
    let mut backups = Vec::new();
    for at_ms in [NOW_MS + DAY_MS, NOW_MS, NOW_MS + 10_000] {
        tree.write("one", 0, &noise(at_ms.unsigned_abs(), 20_000));
        let backup = bench.back_up(&tree, at_ms).await.backup;
        prove(&bench, backup).await;
        backups.push(backup);
    }
    let listed = bench.repository.list_backups(bench.lineage).await.unwrap();
    let listed: Vec<BackupId> = listed.iter().filter_map(|summary| summary.backup()).collect();
    assert_eq!(listed, backups);
    refused(&bench, backups[2], "it is the newest one").await;
    bench.repository.forget(bench.lineage, backups[0], &wish()).await.unwrap();
    let plan = plan(&bench, NOW_MS + 2 * DAY_MS).await;
    assert_eq!(plan.backups[2].stays, [Reason::Wanted, Reason::Newest, Reason::NewestProved]);
    // Also the one that is compared with is the last of them.
    let begun = bench.begin(NOW_MS + 20_000).await;
    assert_eq!(begun.predecessor(), Some(backups[2]));
}

/// While one holds a backup, a second one gives it up before some call of the first, and before some later call a third one
/// takes that back and holds it, too. Who was told that it is held can rely on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hold_that_was_acknowledged_stands_whoever_loses_beside_it() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Interrupted::new(&directory.path().join("repository")));
    let bench = Bench::over(directory, Arc::<Interrupted>::clone(&store)).await;
    let lineage = bench.lineage;
    let tree = tree();
    let first = bench.back_up(&tree, NOW_MS).await.backup;
    bench.back_up(&tree, NOW_MS + 1_000).await;
    let (mut first_call, mut lost, mut held) = (0, 0, 0);
    loop {
        let (mut second_call, mut finished) = (0, false);
        while !finished {
            let other = Arc::new(bench.beside().await);
            let told = Arc::new(Mutex::new(None));
            let third: Turn = Box::pin({
                let (other, told) = (Arc::clone(&other), Arc::clone(&told));
                async move {
                    let _ = other.repository.remember(lineage, first, &wish()).await;
                    let ended = other.repository.hold(lineage, first, &wish()).await;
                    *told.lock().unwrap() = Some(ended.is_ok());
                }
            });
            let second: Turn = Box::pin({
                let (other, store) = (Arc::clone(&other), Arc::clone(&store));
                async move {
                    let _ = other.repository.forget(lineage, first, &wish()).await;
                    store.after(second_call, Some(third));
                }
            });
            store.after(first_call, Some(second));
            let ended = bench.repository.hold(lineage, first, &wish()).await;
            finished = store.is_left();
            store.after(-1, None);
            let told = told.lock().unwrap().take();
            lost += i32::from(ended.is_err());
            if ended.is_ok() || told == Some(true) {
                held += 1;
                let gone = other.repository.forget(lineage, first, &wish()).await;
                assert!(gone.is_err(), "{first_call}, {second_call}: {ended:?} {told:?}");
            }
            other.repository.release(lineage, first, &wish()).await.unwrap();
            other.repository.remember(lineage, first, &wish()).await.unwrap();
            second_call += 1;
        }
        // Nobody had a turn: the hold has no more calls.
        if second_call == 1 {
            assert!(first_call > 3 && lost > 3 && held > 3, "{first_call} {lost} {held}");
            return;
        }
        first_call += 1;
    }
}

/// What ends a hold is written, never deleted: a request that arrives late ends no later hold. Those of earlier programs count.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_object_of_a_hold_is_ever_deleted_and_those_of_earlier_programs_count() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let first = bench.back_up(&tree(), NOW_MS).await.backup;
    bench.back_up(&tree(), NOW_MS + 1_000).await;
    let papers = format!("lineages/{lineage}/backups/{first}/");
    repository.store().put(&format!("{papers}hold"), "by an earlier program".into()).await.unwrap();
    for _ in 0..2 {
        refused(&bench, first, "it is held").await;
        let there = repository.store().list(&papers).await.unwrap();
        repository.release(lineage, first, &wish()).await.unwrap();
        let left = repository.store().list(&papers).await.unwrap();
        assert!(there.iter().all(|paper| left.contains(paper)), "{there:?} {left:?}");
        repository.forget(lineage, first, &wish()).await.unwrap();
        repository.remember(lineage, first, &wish()).await.unwrap();
        repository.hold(lineage, first, &wish()).await.unwrap();
    }
    let listed = repository.list_backups(lineage).await.unwrap();
    assert!(listed[0].held && !listed[1].held);
}
