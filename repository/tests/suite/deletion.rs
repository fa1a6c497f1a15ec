//! What must not be deleted although somebody's clock or turn was unlucky, and what must not stand in the way of a deletion
//! for ever.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{Bench, DAY_MS, NOW_MS, Tree, collect_options, noise};
use crate::interrupted::{Interrupted, Turn};
use async_trait::async_trait;
use bytes::Bytes;
use proto::{BackupId, LineageId};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Listed, PutOutcome, Store, StoreError};
use repository::{
    CheckOptions, CollectOptions, CollectPlan, Collected, Error, Reason, Repository, Wish,
};

fn wish() -> Wish {
    Wish { by: "tester".into(), why: "to see it go".into(), at_ms: NOW_MS }
}

fn tree() -> Arc<Tree> {
    Arc::new(Tree::new().file("one", noise(1, 40_000)).file("two", noise(2, 40_000)))
}

async fn is_sound(repository: &Repository, lineage: LineageId, backup: BackupId) -> bool {
    let backup = repository.open_backup(lineage, backup).await.unwrap();
    backup.check_inventory().await.unwrap().is_sound()
        && backup.check_decrypt(CheckOptions::default()).await.unwrap().is_sound()
}

async fn plan(bench: &Bench, now_ms: i64) -> CollectPlan {
    bench.repository.plan_collection(bench.lineage, &collect_options(now_ms)).await.unwrap()
}

async fn collect(bench: &Bench, now_ms: i64) -> Result<Collected, Error> {
    let options = collect_options(now_ms);
    bench.repository.plan_collection(bench.lineage, &options).await?.collect(&options).await
}

async fn refused(bench: &Bench, backup: BackupId, why: &str) {
    let error = bench.repository.forget(bench.lineage, backup, &wish()).await.unwrap_err();
    assert!(matches!(&error, Error::Wanted { reason, .. } if reason.contains(why)), "{error}");
}

/// A proof of a backup that was booted.
async fn prove(bench: &Bench, backup: BackupId) {
    prove_with(bench, backup, serde_json::json!({})).await;
}

/// The same, with these fields in the place of those of a proof that passed.
async fn prove_with(bench: &Bench, backup: BackupId, fields: serde_json::Value) {
    let mut proof = serde_json::json!({
        "backup": backup, "lineage": bench.lineage, "cluster": "orders", "system_identifier": "7",
        "worker": "w", "at_ms": 1, "level_asked": "L4", "level_reached": "L4", "passed": true,
        "phases": [], "size_bytes": 1, "tables": 1, "rows": 1, "tables_exact": 0,
        "tables_bounded": 0, "checks": [],
    });
    proof.as_object_mut().unwrap().extend(fields.as_object().unwrap().clone());
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
    let listed: Vec<BackupId> =
        listed.iter().filter_map(repository::AttemptSummary::backup).collect();
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

/// What somebody asserts of the content says nothing against the backup: whatever was answered, every version protects the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_in_which_an_assertion_is_false_stays_the_newest_proved_one() {
    let bench = Bench::new().await;
    let first = bench.back_up(&tree(), NOW_MS).await.backup;
    bench.back_up(&tree(), NOW_MS + 1_000).await;
    let proved = [Reason::Wanted, Reason::NewestProved];
    for outcome in ["failed", "skipped"] {
        let asked = serde_json::json!({
            "level_asked": "L5", "level_reached": "L5", "passed": false,
            "assertions": [{
                "name": "orders", "database": "shop", "outcome": outcome, "answer": "false",
                "duration_ms": 1,
            }],
        });
        prove_with(&bench, first, asked).await;
        assert_eq!(plan(&bench, NOW_MS).await.backups[0].stays, proved, "{outcome}");
        refused(&bench, first, "the newest one that was proved").await;
    }
    // A check that failed does.
    let broken = serde_json::json!({
        "passed": false,
        "checks": [{ "name": "row_counts", "level": "L5", "outcome": "failed", "detail": "" }],
    });
    prove_with(&bench, first, broken).await;
    assert_eq!(plan(&bench, NOW_MS).await.backups[0].stays, [Reason::Wanted]);
}

/// For a month every new backup fails its proof. The last good one stays, however much is given up around it, and is whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_last_backup_that_was_proved_outlives_a_month_of_backups_that_fail() {
    let bench = Bench::new().await;
    let tree = tree();
    let mut backups = Vec::new();
    for day in 0..33_u64 {
        tree.write("one", 0, &noise(10 + day, 20_000));
        let summary = bench.back_up(&tree, NOW_MS + DAY_MS * day.cast_signed()).await;
        if day < 2 {
            prove(&bench, summary.backup).await;
        } else {
            let broken = serde_json::json!({
                "level_reached": "L3", "passed": false,
                "checks": [{ "name": "checksums", "level": "L4", "outcome": "failed", "detail": "" }],
            });
            prove_with(&bench, summary.backup, broken).await;
        }
        backups.push(summary.backup);
    }
    let (good, newest) = (backups[1], backups[32]);
    refused(&bench, good, "the newest one that was proved").await;
    refused(&bench, newest, "the newest one").await;
    for backup in backups.iter().filter(|backup| ![good, newest].contains(backup)) {
        bench.repository.forget(bench.lineage, *backup, &wish()).await.unwrap();
    }
    refused(&bench, good, "the newest one that was proved").await;
    let now_ms = NOW_MS + 60 * DAY_MS;
    let plan = plan(&bench, now_ms).await;
    let stays: Vec<&[Reason]> = plan.backups.iter().map(|judged| &judged.stays[..]).collect();
    assert_eq!(stays.iter().filter(|stays| stays.is_empty()).count(), 31, "{stays:?}");
    assert!(matches!(collect(&bench, now_ms).await.unwrap(), Collected::Done(_)));
    for backup in [good, newest] {
        assert!(is_sound(&bench.repository, bench.lineage, backup).await);
    }
    refused(&bench, good, "the newest one that was proved").await;
}

/// The manifest of the newest backup, which was proved before, cannot be read. It stops the collection until it is given up.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_manifest_can_be_given_up_also_of_the_newest_backup() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let tree = tree();
    let mut backups = Vec::new();
    for n in 0..3 {
        tree.write("one", 0, &noise(10 + n, 20_000));
        backups.push(bench.back_up(&tree, NOW_MS + 1_000 * n.cast_signed()).await.backup);
    }
    prove(&bench, backups[2]).await;
    // What is no proof is in nobody's way.
    let large = format!("lineages/{lineage}/backups/{}/proof.2", backups[2]);
    repository.store().put(&large, vec![0; 5 << 20].into()).await.unwrap();
    assert_eq!(plan(&bench, NOW_MS).await.backups[2].stays.last(), Some(&Reason::NewestProved));
    repository.forget(lineage, backups[0], &wish()).await.unwrap();
    let error = repository.forget_damaged(lineage, backups[2].into(), &wish()).await.unwrap_err();
    assert!(matches!(error, Error::Wanted { .. }), "{error}");
    let key = format!("lineages/{lineage}/backups/{}/manifest", backups[2]);
    let mut bytes = repository.store().get(&key, 1 << 20).await.unwrap().to_vec();
    bytes[200] ^= 1;
    repository.store().put(&key, bytes.into()).await.unwrap();
    let now_ms = NOW_MS + 2 * DAY_MS;
    let error = collect(&bench, now_ms).await.unwrap_err();
    assert!(matches!(&error, Error::Damaged { key: named, .. } if *named == key), "{error}");
    let compared = async |with: BackupId, is_newest: bool| {
        let begun = bench.begin(now_ms).await;
        assert_eq!((begun.predecessor(), begun.predecessor_is_newest()), (Some(with), is_newest));
        repository.abort(lineage, begun.id(), "tester", "it was a look", now_ms).await.unwrap();
    };
    compared(backups[1], false).await;
    repository.forget_damaged(lineage, backups[2].into(), &wish()).await.unwrap();
    compared(backups[1], false).await;
    // It is nobody's newest any more: the one before it takes its place.
    let plan = plan(&bench, now_ms).await;
    let stays: Vec<&[Reason]> = plan.backups.iter().map(|judged| &judged.stays[..]).collect();
    let newest = [Reason::Wanted, Reason::Newest];
    assert!(stays.contains(&&newest[..]) && stays.len() == 3, "{stays:?}");
    assert!(matches!(collect(&bench, now_ms).await.unwrap(), Collected::Done(_)));
    assert!(is_sound(repository, lineage, backups[1]).await);
    assert_eq!(collect(&bench, now_ms).await.unwrap(), Collected::Nothing);
    compared(backups[1], false).await;
    let next = bench.back_up(&tree, now_ms).await;
    assert_eq!(bench.restore(&next).await, tree.expected());
    compared(next.backup, true).await;
}

/// Nor does a verdict that the store refuses stop the next backup: it is compared with the one before.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verdict_that_the_store_refuses_holds_up_no_backup() {
    let bench = Bench::new().await;
    let tree = tree();
    let first = bench.back_up(&tree, NOW_MS).await.backup;
    let second = bench.back_up(&tree, NOW_MS + 1_000).await.backup;
    let papers = bench.store_path().join(format!("lineages/{}/backups", bench.lineage));
    let closed = std::os::unix::fs::PermissionsExt::from_mode(0o000);
    std::fs::set_permissions(papers.join(second.to_string()).join("verdict"), closed).unwrap();
    let begun = bench.begin(NOW_MS + 2_000).await;
    assert_eq!(begun.predecessor(), Some(first));
    assert_eq!(begun.passed_over()[0].backup, second);
    assert!(!begun.predecessor_is_newest());
    let next = bench.back_up(&tree, NOW_MS + 3_000).await;
    assert_eq!(bench.restore(&next).await, tree.expected());
    let begun = bench.begin(NOW_MS + 4_000).await;
    assert_eq!((begun.predecessor(), begun.passed_over()[0].backup), (Some(next.backup), second));
    assert!(begun.predecessor_is_newest(), "what stays unreadable came before it");
}

/// An intent and a list that a clock years ahead dated are as old as they are far away.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_wrong_clock_dated_does_not_stay_for_ever() {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Interrupted::new(&directory.path().join("repository")));
    let bench = Bench::over(directory, Arc::<Interrupted>::clone(&store)).await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let tree = tree();
    let first = bench.back_up(&tree, NOW_MS).await.backup;
    tree.write("one", 0, &noise(3, 20_000));
    bench.back_up(&tree, NOW_MS + 1_000).await;
    repository.forget(lineage, first, &wish()).await.unwrap();
    // A collector with such a clock dies when it has deleted something.
    let ahead = collect_options(2 * NOW_MS);
    let its_plan = repository.plan_collection(lineage, &ahead).await.unwrap();
    store.after(6, None);
    its_plan.collect(&ahead).await.unwrap_err();
    store.after(-1, None);
    let now_ms = NOW_MS + 4 * DAY_MS;
    assert_eq!(plan(&bench, now_ms).await.lists.len(), 1);
    let open = bench.begin(2 * NOW_MS).await;
    let dead = CollectOptions { lists_for_ms: Some(3 * DAY_MS), ..collect_options(now_ms) };
    let planned = repository.plan_collection(lineage, &dead).await.unwrap();
    let Collected::Done(done) = planned.collect(&dead).await.unwrap() else { panic!() };
    assert_eq!(done.aborted, [open.id()]);
    assert_eq!(plan(&bench, now_ms).await.lists, []);
}

/// A store of which one call fails, and only that one.
#[derive(Debug)]
struct FailsOnce {
    inner: DirectoryStore,
    /// Calls before it; negative when none fails.
    left: AtomicI64,
    forbids: bool,
    deletes: AtomicUsize,
}

impl FailsOnce {
    fn call(&self, operation: &'static str, key: &str) -> Result<(), StoreError> {
        if self.left.fetch_sub(1, Ordering::SeqCst) != 0 {
            return Ok(());
        }
        let (key, source) = (key.to_owned(), "once".into());
        Err(if self.forbids {
            StoreError::Forbidden { operation, key, source }
        } else {
            StoreError::Unavailable { operation, key, source }
        })
    }
}

#[async_trait]
impl Layer for FailsOnce {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.call("get", key)?;
        self.inner.get(key, limit_bytes).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.call("put", key)?;
        self.inner.put(key, bytes).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        self.call("put", key)?;
        self.inner.put_if_absent(key, bytes).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.call("list", prefix)?;
        self.inner.list(prefix).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.deletes.fetch_add(1, Ordering::SeqCst);
        self.call("delete", key)?;
        self.inner.delete(key).await
    }
}

/// One call of a collection fails, each in turn. Where nothing can be deleted any more for it, its list does not stay; where a
/// deletion was not answered, it does.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_that_failed_leaves_its_list_only_when_a_deletion_may_come_late() {
    let (mut failed, mut stayed, mut deleted) = ([0; 2], [0; 2], 0);
    for forbids in [false, true] {
        for n in 0.. {
            let directory = tempfile::tempdir().unwrap();
            let store = Arc::new(FailsOnce {
                inner: DirectoryStore::new(directory.path().join("repository")),
                left: (-1).into(),
                forbids,
                deletes: 0.into(),
            });
            let bench = Bench::over(directory, Arc::<FailsOnce>::clone(&store)).await;
            let tree = tree();
            let first = bench.back_up(&tree, NOW_MS).await.backup;
            tree.write("one", 0, &noise(3, 20_000));
            bench.back_up(&tree, NOW_MS + 1_000).await;
            bench.repository.forget(bench.lineage, first, &wish()).await.unwrap();
            bench.begin(NOW_MS).await;
            let how = collect_options(NOW_MS + 2 * DAY_MS);
            let planned = bench.repository.plan_collection(bench.lineage, &how).await.unwrap();
            store.deletes.store(0, Ordering::SeqCst);
            store.left.store(n, Ordering::SeqCst);
            let ended = planned.collect(&how).await;
            let happened = store.left.swap(-1, Ordering::SeqCst) < 0;
            if !happened {
                assert!(n > 12, "{n} calls");
                break;
            }
            // What is read in vain may be read again, or cost nothing.
            let Err(error) = ended else { continue };
            let lists = plan(&bench, NOW_MS + 2 * DAY_MS).await.lists;
            let error = error.to_string();
            let unanswered = !forbids && error.starts_with("delete ");
            // Or it is the end of the list itself that cannot be written.
            let is_its_end = error.ends_with("/done");
            assert!(
                lists.is_empty() || unanswered || is_its_end,
                "call {n}, {forbids}: {error}: {lists:?}"
            );
            failed[usize::from(forbids)] += 1;
            stayed[usize::from(forbids)] += usize::from(!lists.is_empty() && !is_its_end);
            deleted += usize::from(store.deletes.load(Ordering::SeqCst) > 0);
        }
    }
    assert!(failed.iter().all(|times| *times > 8) && deleted > 4, "{failed:?} {deleted}");
    assert!(stayed[0] > 1 && stayed[1] == 0, "{stayed:?}");
}

/// Backups that share nearly everything are much, however few their bytes; a single one is not for its number.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_backups_are_much_whatever_their_bytes() {
    let bench = Bench::new().await;
    let tree = Arc::new(Tree::new().file("base", noise(1, 2_000_000)));
    let mut backups = Vec::new();
    for n in 0..8 {
        tree.put("small", vec![n; 100], Some(8192));
        backups.push(bench.back_up(&tree, NOW_MS + 1_000 * i64::from(n)).await.backup);
    }
    let now_ms = NOW_MS + 2 * DAY_MS;
    for (n, is_large) in [(0, false), (1, true), (2, true)] {
        bench.repository.forget(bench.lineage, backups[n], &wish()).await.unwrap();
        let plan = plan(&bench, now_ms).await;
        assert!(plan.delete.bytes < plan.keep.bytes / 5, "{:?} {:?}", plan.delete, plan.keep);
        assert_eq!(plan.is_large(), is_large, "{n}");
    }
}

/// A store that answers nobody who asks whether a backup is gone until all have asked, and counts listings.
#[derive(Debug)]
struct Together {
    inner: Arc<dyn Store>,
    all: tokio::sync::Barrier,
    lists: AtomicUsize,
}

#[async_trait]
impl Layer for Together {
    fn inner(&self) -> &dyn Store {
        self.inner.as_ref()
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        if key.ends_with("/gone") {
            self.all.wait().await;
        }
        self.inner.get(key, limit_bytes).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.lists.fetch_add(1, Ordering::SeqCst);
        self.inner.list(prefix).await
    }
}

/// Years of backups that were collected are left as verdicts. Whoever looks for one to restore passes them all at once, and
/// with one listing, be they gone by a collection or only given up.
#[tokio::test]
async fn what_was_collected_makes_nobody_wait_for_one_answer_after_the_other() {
    const COLLECTED: usize = 5;
    let bench = Bench::new().await;
    let tree = tree();
    let mut backups = Vec::new();
    for number in 0..=COLLECTED {
        let at_ms = NOW_MS + 1_000 * i64::try_from(number).unwrap();
        backups.push(bench.back_up(&tree, at_ms).await.backup);
    }
    let newest = backups.pop().unwrap();
    for backup in &backups {
        bench.repository.forget(bench.lineage, *backup, &wish()).await.unwrap();
    }
    let later_ms = NOW_MS + 5 * DAY_MS;
    assert!(matches!(collect(&bench, later_ms).await.unwrap(), Collected::Done(_)));
    let store = Arc::new(Together {
        inner: Arc::clone(bench.repository.store()),
        all: tokio::sync::Barrier::new(COLLECTED),
        lists: AtomicUsize::default(),
    });
    let repository =
        Repository::open(Arc::<Together>::clone(&store), Some(&bench.key)).await.unwrap();
    let lineage = bench.lineage;
    for deletes_note in [false, true] {
        if deletes_note {
            let key = format!("lineages/{lineage}/backups/{}/gone", backups[0]);
            bench.repository.store().delete(&key).await.unwrap();
        }
        store.lists.store(0, Ordering::SeqCst);
        let found = repository.find_backups(lineage);
        let found = tokio::time::timeout(Duration::from_mins(1), found).await.unwrap().unwrap();
        assert_eq!(store.lists.load(Ordering::SeqCst), 1, "{deletes_note}");
        assert!(found.lost.is_empty(), "{:?}", found.lost);
        let found: Vec<_> =
            found.readable.iter().filter_map(repository::AttemptSummary::backup).collect();
        assert_eq!(found, [newest]);
        if !deletes_note {
            let options = collect_options(later_ms);
            let plan = repository.plan_collection(lineage, &options);
            let plan = tokio::time::timeout(Duration::from_mins(1), plan).await.unwrap().unwrap();
            assert_eq!(plan.backups.len(), 1);
        }
    }
}
