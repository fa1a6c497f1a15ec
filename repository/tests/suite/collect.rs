//! Forgetting and collecting, with the production code: what is wanted stays, whoever is interrupted wherever.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::common::{self, Bench, DAY_MS, NOW_MS, Tree, collect_options, noise};
use crate::interrupted::{Interrupted, Turn};
use crate::lab;
use crate::stepped::{Acting, Memory, alone};
use async_trait::async_trait;
use bytes::Bytes;
use proto::{BackupId, LineageId};
use repository::store::layer::Layer;
use repository::store::{PutOutcome, Store, StoreError, Upload};
use repository::{
    BackupSummary, CheckOptions, CollectOptions, CollectPlan, Collected, Error, Pin, Reason,
    Repository, RestoreOptions, RestoreTarget, Wish, WriteOptions,
};

fn wish(at_ms: i64) -> Wish {
    Wish { by: "tester".into(), why: "to see it go".into(), at_ms }
}

fn tree() -> Arc<Tree> {
    let tree = Tree::new().directory("base").file("base/1", noise(1, 300_000));
    Arc::new(tree.file("base/2", noise(2, 200_000)).file("base/3", vec![7; 50_000]))
}

/// Three backups, each with something of its own and much in common.
async fn three(bench: &Bench, tree: &Arc<Tree>) -> [BackupSummary; 3] {
    let first = bench.back_up(tree, NOW_MS).await;
    tree.write("base/1", 0, &noise(3, 100_000));
    let second = bench.back_up(tree, NOW_MS + 1_000).await;
    tree.write("base/2", 8192, &noise(4, 100_000));
    let third = bench.back_up(tree, NOW_MS + 2_000).await;
    [first, second, third]
}

async fn is_sound(repository: &Repository, lineage: LineageId, backup: BackupId) -> bool {
    let backup = repository.open_backup(lineage, backup).await.unwrap();
    backup.check_inventory().await.unwrap().is_sound()
        && backup.check_decrypt(CheckOptions::default()).await.unwrap().is_sound()
}

async fn collect(
    repository: &Repository,
    lineage: LineageId,
    now_ms: i64,
) -> Result<Collected, Error> {
    let options = collect_options(now_ms);
    repository.plan_collection(lineage, &options).await?.collect(&options).await
}

/// Why a backup stays; empty when it goes.
fn stays(plan: &CollectPlan, backup: BackupId) -> &[Reason] {
    &plan.backups.iter().find(|judged| judged.backup == backup).unwrap().stays
}

/// Nothing is left that a second collection would delete, and no list.
async fn is_clean(repository: &Repository, lineage: LineageId, now_ms: i64) -> bool {
    let plan = repository.plan_collection(lineage, &collect_options(now_ms)).await.unwrap();
    let lists = repository.store().list(&format!("lineages/{lineage}/gc/")).await.unwrap();
    // A backup that went left its verdict and the wish, and neither manifest nor proof.
    let goes = plan.backups.iter().any(|judged| judged.stays.is_empty());
    let papers = repository.store().list(&format!("lineages/{lineage}/backups/")).await.unwrap();
    let proofs = papers.iter().filter(|paper| paper.key.contains("/proof.")).count();
    plan.delete.packs == 0 && lists.is_empty() && !goes && proofs == 0
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_only_forgotten_backups_need_goes_and_nothing_else() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let tree = tree();
    let [first, second, third] = three(&bench, &tree).await;
    let now_ms = NOW_MS + 10_000;

    // With nothing forgotten there is nothing to do.
    assert_eq!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Nothing);

    repository.forget(lineage, first.backup, &wish(now_ms)).await.unwrap();
    repository.forget(lineage, second.backup, &wish(now_ms)).await.unwrap();
    let plan = repository.plan_collection(lineage, &collect_options(now_ms)).await.unwrap();
    let at_ms = now_ms + DAY_MS;
    for backup in [first.backup, second.backup] {
        assert_eq!(stays(&plan, backup), [Reason::Grace { until_ms: at_ms }]);
    }
    assert_eq!(stays(&plan, third.backup), [Reason::Wanted, Reason::Newest]);
    assert_eq!(plan.delete.packs, 0);

    let plan = repository.plan_collection(lineage, &collect_options(at_ms)).await.unwrap();
    assert!(plan.delete.packs > 0 && plan.keep.packs > 0 && plan.is_large());
    // What two share that both go is nobody's alone.
    let alone: u64 = plan.backups.iter().map(|judged| judged.alone.unwrap().bytes).sum();
    let own = |backup| plan.backups.iter().find(|judged| judged.backup == backup).unwrap().alone;
    assert!(own(first.backup).unwrap().bytes > 0 && own(third.backup).unwrap().bytes > 0);
    assert!(alone < plan.delete.bytes + plan.keep.bytes);
    let Collected::Done(done) = collect(repository, lineage, at_ms).await.unwrap() else {
        panic!()
    };
    assert_eq!((done.deleted, done.spared.packs), (plan.delete, 0));
    assert!(is_clean(repository, lineage, at_ms).await);
    assert!(matches!(
        repository.open_backup(lineage, first.backup).await,
        Err(Error::Missing { .. })
    ));
    let gone = repository.add_proof(lineage, first.backup, Bytes::from_static(b"late")).await;
    assert!(matches!(gone, Err(Error::Missing { .. })), "{gone:?}");
    assert_eq!(bench.restore(&third).await, tree.expected());

    // The next backup is compared with the one that stayed.
    let fourth = bench.back_up(&tree, at_ms).await;
    assert_eq!(fourth.predecessor, Some(third.backup));
    assert_eq!(bench.restore(&fourth).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_needed_cannot_be_forgotten() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let [first, second, third] = three(&bench, &tree()).await;
    let refused = async |backup, part: &str| {
        let error = repository.forget(lineage, backup, &wish(NOW_MS)).await.unwrap_err();
        assert!(error.to_string().contains(part), "{error}");
    };
    refused(third.backup, "it is the newest one").await;
    repository.hold(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    refused(first.backup, "it is held").await;
    repository.release(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let error = repository.hold(lineage, first.backup, &wish(NOW_MS)).await.unwrap_err();
    assert!(error.to_string().contains("it was given up by"), "{error}");
    let proof = |level: &str, outcome: &str| {
        let check =
            serde_json::json!({"name": "x", "level": level, "outcome": outcome, "detail": ""});
        let proof = serde_json::json!({
            "backup": second.backup, "lineage": lineage, "cluster": "orders", "system_identifier": "7",
            "worker": "w", "at_ms": 1, "level_asked": "L5", "level_reached": level, "passed": false,
            "phases": [], "size_bytes": 1, "tables": 1, "rows": 1, "tables_exact": 0,
            "tables_bounded": 0, "checks": [check],
        });
        let signed = serde_json::json!({ "payload": proof.to_string(), "signature": "" });
        Bytes::from(signed.to_string())
    };
    let prove = async |level: &str, outcome: &str| {
        repository.add_proof(lineage, second.backup, proof(level, outcome)).await.unwrap();
    };
    // One that was never booted is not proved; one that could not look further takes nothing back.
    prove("L4", "passed").await;
    prove("L3", "skipped").await;
    prove("L1", "passed").await;
    refused(second.backup, "it is the newest one that was proved").await;
    // A check that found something wrong does.
    prove("L2", "failed").await;
    prove("L1", "passed").await;
    repository.forget(lineage, second.backup, &wish(NOW_MS)).await.unwrap();
}

/// A wish that whoever wrote it had no key for deletes nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_forged_wish_deletes_nothing() {
    let bench = Bench::new().await;
    let [first, ..] = three(&bench, &tree()).await;
    let key = format!("lineages/{}/backups/{}/forget", bench.lineage, first.backup);
    let forged = br#"{"by":"me","why":"","at_ms":0}"#;
    let forged = [&forged[..], b"\n", &[b'0'; 64], b"\n"].concat();
    bench.repository.store().put(&key, forged.into()).await.unwrap();
    let plan = bench
        .repository
        .plan_collection(bench.lineage, &collect_options(NOW_MS * 2))
        .await
        .unwrap();
    assert_eq!((plan.delete.packs, stays(&plan, first.backup)), (0, &[Reason::NotBelieved][..]));
    // It is in nobody's way: a real one stands beside it, and both are taken back.
    let (repository, lineage) = (&bench.repository, bench.lineage);
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let plan = repository.plan_collection(lineage, &collect_options(NOW_MS * 2)).await.unwrap();
    assert_eq!(stays(&plan, first.backup), []);
    repository.remember(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let plan = repository.plan_collection(lineage, &collect_options(NOW_MS * 2)).await.unwrap();
    assert_eq!((plan.delete.packs, stays(&plan, first.backup)), (0, &[Reason::Wanted][..]));
}

/// A bench and its store, in which somebody may have a turn.
async fn interruptible() -> (Arc<Interrupted>, Bench) {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Interrupted::new(&directory.path().join("repository")));
    let bench = Bench::over(directory, Arc::<Interrupted>::clone(&store)).await;
    (store, bench)
}

/// Collects what a dead collector left, whose list is retired because somebody knows that it is dead.
async fn finish(repository: &Repository, lineage: LineageId, now_ms: i64) {
    let dead = CollectOptions { lists_for_ms: Some(0), ..collect_options(now_ms) };
    let plan = repository.plan_collection(lineage, &dead).await.unwrap();
    plan.collect(&dead).await.unwrap();
}

/// A collector dies at every call it makes, in turn; whatever it left, the next one finishes and loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_dies_anywhere_harms_nothing_and_the_next_one_finishes() {
    for deletes_first in [false, true] {
        Box::pin(die_anywhere(deletes_first)).await;
    }
}

async fn die_anywhere(deletes_first: bool) {
    let mut calls = 0;
    loop {
        let (store, bench) = interruptible().await;
        let (repository, lineage) = (&bench.repository, bench.lineage);
        let tree = tree();
        let [first, second, third] = three(&bench, &tree).await;
        repository.add_proof(lineage, first.backup, Bytes::from_static(b"?")).await.unwrap();
        repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
        let now_ms = NOW_MS + 2 * DAY_MS;

        store.deletes_first.store(deletes_first, Ordering::SeqCst);
        store.after(calls, None);
        let ended = collect(repository, lineage, now_ms).await;
        let finished = store.is_left();
        store.after(-1, None);
        assert_eq!(ended.is_ok(), finished, "{calls}: {ended:?}");
        for backup in [second.backup, third.backup] {
            assert!(is_sound(repository, lineage, backup).await, "after {calls} calls");
        }
        finish(repository, lineage, now_ms).await;
        assert!(is_clean(repository, lineage, now_ms).await, "after {calls} calls");
        let next = bench.back_up(&tree, now_ms).await;
        assert_eq!(bench.restore(&next).await, tree.expected());
        if finished {
            assert!(calls > 15, "it was interrupted at {calls} places only");
            return;
        }
        calls += 1;
    }
}

/// Before every call that a backup makes, in turn, its predecessor is forgotten and a collector does all of its work.
/// The backup is aborted, or it is sound; it is never a backup with a hole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_between_any_two_calls_of_a_backup_leaves_no_hole() {
    let (mut calls, mut aborted, mut committed) = (0, 0, 0);
    loop {
        let (store, bench) = interruptible().await;
        let (repository, lineage) = (bench.repository.clone(), bench.lineage);
        let tree = tree();
        three(&bench, &tree).await;
        let other = bench.beside().await;
        let now_ms = NOW_MS + 4 * DAY_MS;
        let turn: Turn = Box::pin(async move {
            // With a newer one that shares nothing, every older backup can be forgotten.
            let strange = Arc::new(Tree::new().file("other", noise(77, 50_000)));
            other.back_up(&strange, NOW_MS + 2_500).await;
            let backups = other.repository.list_backups(lineage).await.unwrap();
            for old in &backups[..backups.len() - 1] {
                let old = old.backup().unwrap();
                // Refused when our own backup became the newest one in the meantime, or was it already.
                let _ = other.repository.forget(lineage, old, &wish(NOW_MS)).await;
            }
            // What is open is old to this collector.
            collect(&other.repository, lineage, now_ms).await.unwrap();
        });
        store.after(calls, Some(turn));
        let options = WriteOptions { continuity: Some("here".into()), ..WriteOptions::default() };
        let ended = bench.back_up_with(&tree, NOW_MS + 3_000, options).await;
        if store.is_left() {
            assert!(calls > 15 && aborted > 5 && committed > 1, "{calls} {aborted} {committed}");
            return;
        }
        match ended {
            Ok(summary) => {
                committed += 1;
                assert!(is_sound(&repository, lineage, summary.backup).await, "{calls} calls");
                assert_eq!(bench.restore(&summary).await, tree.expected());
            }
            Err(error) => {
                aborted += 1;
                // Told as what it is: aborted, or something vanished under it.
                assert!(
                    matches!(
                        error,
                        Error::CommitRefused { .. }
                            | Error::Missing { .. }
                            | Error::Incomplete { .. }
                    ),
                    "{calls}: {error:?}"
                );
            }
        }
        calls += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_being_written_postpones_a_collection_until_it_is_old() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let [first, ..] = three(&bench, &tree()).await;
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let began_ms = NOW_MS + DAY_MS;
    let open = bench.begin(began_ms).await;
    let now_ms = began_ms + DAY_MS;
    let plan = repository.plan_collection(lineage, &collect_options(now_ms)).await.unwrap();
    assert_eq!(plan.open[0].attempt, open.id());
    let postponed = collect(repository, lineage, now_ms).await.unwrap();
    assert_eq!(postponed, Collected::Postponed { open: plan.open });
    let never = CollectOptions { patience_ms: None, ..collect_options(NOW_MS * 2) };
    let plan = repository.plan_collection(lineage, &never).await.unwrap();
    assert!(matches!(plan.collect(&never).await.unwrap(), Collected::Postponed { .. }));
    let Collected::Done(done) = collect(repository, lineage, began_ms + 2 * DAY_MS).await.unwrap()
    else {
        panic!()
    };
    assert_eq!(done.aborted, [open.id()]);
    assert!(is_clean(repository, lineage, began_ms + 2 * DAY_MS).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_manifest_that_cannot_be_read_stops_the_collection_until_it_is_forgotten() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let [first, second, _] = three(&bench, &tree()).await;
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let key = format!("lineages/{lineage}/backups/{}/manifest", second.backup);
    let whole = repository.store().get(&key, 1 << 20).await.unwrap();
    repository.store().put(&key, whole.slice(..whole.len() - 1)).await.unwrap();
    let now_ms = NOW_MS + 2 * DAY_MS;
    let error = collect(repository, lineage, now_ms).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    // Nor does one that is lost, and that nobody wanted gone, make garbage of what it refers to.
    repository.store().delete(&key).await.unwrap();
    let error = collect(repository, lineage, now_ms).await.unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let sound = repository.forget_damaged(lineage, first.backup.into(), &wish(NOW_MS)).await;
    assert!(matches!(sound, Err(Error::Wanted { .. })), "{sound:?}");
    repository.forget_damaged(lineage, second.backup.into(), &wish(now_ms)).await.unwrap();
    // Also what was given up stops it, until its day is over.
    let error = collect(repository, lineage, now_ms).await.unwrap_err();
    assert!(matches!(error, Error::Missing { .. }), "{error}");
    let now_ms = now_ms + DAY_MS;
    assert!(matches!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Done(_)));
    assert!(is_clean(repository, lineage, now_ms).await);
}

/// A verdict that cannot be believed stops the collection, for nobody knows what it was; giving that attempt up ends it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_verdict_stops_the_collection_until_it_is_given_up() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let tree = tree();
    let [first, second, third] = three(&bench, &tree).await;
    let key = format!("lineages/{lineage}/backups/{}/verdict", second.backup);
    let whole = repository.store().get(&key, 1 << 20).await.unwrap();
    repository.store().put(&key, whole.slice(1..)).await.unwrap();
    // Others can be given up meanwhile; nothing is deleted.
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let now_ms = NOW_MS + 2 * DAY_MS;
    let error = collect(repository, lineage, now_ms).await.unwrap_err();
    assert!(matches!(&error, Error::Damaged { key: named, .. } if *named == key), "{error}");
    repository.forget_damaged(lineage, second.backup.into(), &wish(now_ms)).await.unwrap();
    let error = collect(repository, lineage, now_ms).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
    let now_ms = now_ms + DAY_MS;
    assert!(matches!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Done(_)));
    assert!(is_clean(repository, lineage, now_ms).await);
    assert_eq!(bench.restore(&third).await, tree.expected());
}

/// An intent that cannot be read is one all the same: it postpones, and can be aborted.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_intent_postpones_a_collection_and_can_be_aborted() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let [first, ..] = three(&bench, &tree()).await;
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let open = bench.begin(NOW_MS).await.id();
    let key = format!("lineages/{lineage}/backups/{open}/intent");
    repository.store().put(&key, "rotten".into()).await.unwrap();
    let now_ms = NOW_MS + 2 * DAY_MS;
    let never = CollectOptions { patience_ms: None, ..collect_options(now_ms) };
    let plan = repository.plan_collection(lineage, &never).await.unwrap();
    assert!(plan.open[0].attempt == open && plan.open[0].by.contains("damaged"), "{plan:?}");
    assert!(matches!(plan.collect(&never).await.unwrap(), Collected::Postponed { .. }));
    let Collected::Done(done) = collect(repository, lineage, now_ms).await.unwrap() else {
        panic!()
    };
    assert_eq!(done.aborted, [open]);
    assert!(is_clean(repository, lineage, now_ms).await);
}

/// A list of a collector that may only be slow is retired by nobody, whatever has become of what is on it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_list_of_another_collector_stays_until_somebody_says_that_it_is_dead() {
    let (store, bench) = interruptible().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let [first, ..] = three(&bench, &tree()).await;
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let now_ms = NOW_MS + 2 * DAY_MS;
    let plan = repository.plan_collection(lineage, &collect_options(now_ms)).await.unwrap();
    store.after(4, None);
    plan.collect(&collect_options(now_ms)).await.unwrap_err();
    store.after(-1, None);
    for _ in 0..2 {
        collect(repository, lineage, now_ms + DAY_MS).await.unwrap();
    }
    let plan = repository.plan_collection(lineage, &collect_options(now_ms)).await.unwrap();
    let [list] = &plan.lists[..] else { panic!("{:?}", plan.lists) };
    assert!(list.packs > 0 && list.backups == 1, "{list:?}");
    assert_eq!((list.by.as_deref(), list.at_ms), (Some("tester"), Some(now_ms)));
    let younger =
        CollectOptions { lists_for_ms: Some(DAY_MS + 1), ..collect_options(now_ms + DAY_MS) };
    repository.plan_collection(lineage, &younger).await.unwrap().collect(&younger).await.unwrap();
    assert!(!is_clean(repository, lineage, now_ms).await);
    let older = CollectOptions { lists_for_ms: Some(DAY_MS), ..collect_options(now_ms + DAY_MS) };
    repository.plan_collection(lineage, &older).await.unwrap().collect(&older).await.unwrap();
    assert!(is_clean(repository, lineage, now_ms).await);
}

/// Who has a turn while two collectors are at work: one call of a collector, or all that somebody else does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Who {
    One,
    Other,
    /// Takes the deletion of the first backup back, or gives the second one up as well.
    Wisher,
    /// Begins to read the first backup.
    Reader,
}

/// What the wisher does.
#[derive(Debug, Clone, Copy)]
enum Second {
    Thoughts,
    Forgotten,
}

/// A repository in which two collectors find the same to delete.
struct Meeting {
    memory: Memory,
    bench: Bench,
    backups: [BackupId; 3],
    tree: Arc<Tree>,
}

/// What came of it.
#[derive(Debug, Default)]
struct Met {
    /// Steps of each collector.
    steps: [usize; 2],
    kept: usize,
    refused: usize,
    protected: usize,
    warned: usize,
    late: usize,
}

impl Meeting {
    async fn new() -> Self {
        let bench = Bench::new().await;
        let tree = Tree::new().file("a", noise(1, 40_000)).file("b", noise(2, 40_000));
        let tree = Arc::new(tree);
        let first = bench.back_up(&tree, NOW_MS).await;
        tree.write("a", 0, &noise(3, 20_000));
        let second = bench.back_up(&tree, NOW_MS + 1_000).await;
        tree.write("b", 0, &noise(4, 20_000));
        let third = bench.back_up(&tree, NOW_MS + 2_000).await;
        let (repository, lineage) = (&bench.repository, bench.lineage);
        repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
        let memory = Memory::of(&bench.store_path());
        let backups = [first, second, third].map(|summary| summary.backup);
        Self { memory, bench, backups, tree }
    }

    /// Two collectors, the wisher and the reader, in the order of these turns; whoever has not ended then goes on to its end, in
    /// the order of [`Who`]. Whoever was promised something has it, then and after every later collection. `writes`: a backup is
    /// taken when these turns are over.
    async fn meet(&self, second: Second, turns: &[Who], writes: bool) -> Met {
        let (lineage, now_ms) = (self.bench.lineage, NOW_MS + 2 * DAY_MS);
        let memory = self.memory.copy();
        let open = || {
            let opened = Repository::open(Arc::<Memory>::clone(&memory), Some(&self.bench.key));
            alone(opened).unwrap()
        };
        let [one, other, wishing, reading] = [open(), open(), open(), open()];
        let ([first, next, third], wish, pin) = (self.backups, wish(NOW_MS), pin(now_ms));
        let mut collectors = [&one, &other].map(|by| Acting::new(collect(by, lineage, now_ms)));
        let mut wisher = Acting::new(async {
            match second {
                Second::Thoughts => wishing.remember(lineage, first, &wish).await,
                Second::Forgotten => wishing.forget(lineage, next, &wish).await,
            }
        });
        let mut reader = Acting::new(reading.open_pinned(lineage, first, &pin));
        for who in turns {
            match who {
                Who::One => drop(collectors[0].step()),
                Who::Other => drop(collectors[1].step()),
                Who::Wisher => wisher.end(),
                Who::Reader => reader.end(),
            }
        }
        let repository = open();
        let newer = if writes {
            let intent = self.bench.intent(now_ms);
            let written =
                common::back_up(&repository, lineage, intent, &self.tree, WriteOptions::default());
            Some(written.await.unwrap().backup)
        } else {
            None
        };
        collectors.iter_mut().for_each(Acting::end);
        wisher.end();
        reader.end();
        let mut met = Met { steps: collectors.each_ref().map(|by| by.steps), ..Met::default() };
        for ended in collectors.map(Acting::ended) {
            // What it was about to read the other one has deleted.
            let was_slower = matches!(&ended, Err(Error::Missing { .. }));
            assert!(ended.is_ok() || was_slower, "{turns:?}: {ended:?}");
        }
        let mut promised = vec![third];
        promised.extend(newer);
        match (second, wisher.ended()) {
            (Second::Thoughts, Ok(())) => {
                met.kept += 1;
                promised.extend([first, next]);
            }
            (Second::Thoughts, Err(Error::Wanted { .. })) => {
                met.refused += 1;
                promised.push(next);
            }
            (Second::Forgotten, Ok(())) => {}
            (_, Err(error)) => panic!("{turns:?}: {error:?}"),
        }
        let pinned = match reader.ended() {
            Ok(pinned) if pinned.unprotected().is_none() => {
                met.protected += 1;
                promised.push(first);
                Some(pinned)
            }
            Ok(pinned) => {
                met.warned += 1;
                Some(pinned)
            }
            Err(Error::Missing { .. }) => {
                met.late += 1;
                None
            }
            Err(error) => panic!("{turns:?}: {error:?}"),
        };
        for backup in &promised {
            assert!(is_sound(&repository, lineage, *backup).await, "{turns:?}: {backup}");
        }
        if let Some(pinned) = pinned {
            pinned.release().await;
        }
        collect(&repository, lineage, now_ms).await.unwrap();
        assert!(is_clean(&repository, lineage, now_ms).await, "{turns:?}");
        assert!(is_sound(&repository, lineage, third).await, "{turns:?}");
        met
    }
}

/// Two collectors through the production code, call by call. One stands still after any number of its calls, the other one
/// after any number of its own; in between somebody changes a wish, and then somebody begins to read.
async fn two_collectors_stand_still_anywhere(second: Second) -> Met {
    let meeting = Meeting::new().await;
    let (mut one, mut all) = (0, Met::default());
    loop {
        let mut other = 0;
        all.steps = loop {
            let turns: Vec<Who> = std::iter::repeat_n(Who::One, one)
                .chain([Who::Wisher])
                .chain(std::iter::repeat_n(Who::Other, other))
                .chain([Who::Reader])
                .collect();
            let met = meeting.meet(second, &turns, (one + other) % 7 == 0).await;
            all.kept += met.kept;
            all.refused += met.refused;
            all.protected += met.protected;
            all.warned += met.warned;
            all.late += met.late;
            if other >= met.steps[1] {
                break met.steps;
            }
            other += 1;
        };
        if one >= all.steps[0] {
            return all;
        }
        one += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_collectors_that_stand_still_anywhere_take_nothing_that_was_taken_back_or_is_read() {
    let met = Box::pin(two_collectors_stand_still_anywhere(Second::Thoughts)).await;
    assert!(met.steps[0] > 15 && met.kept > 100 && met.refused > 100, "{met:?}");
    assert!(met.protected > 100 && met.warned > 100 && met.late > 10, "{met:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_collectors_whose_lists_differ_delete_nothing_that_is_wanted() {
    let met = Box::pin(two_collectors_stand_still_anywhere(Second::Forgotten)).await;
    assert!(met.steps[0] > 15 && met.protected > 100 && met.late > 10, "{met:?}");
}

/// The same in orders drawn by chance, in which they change places at every call.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_collectors_in_any_order_of_their_calls_keep_what_they_promised() {
    let meeting = Meeting::new().await;
    let mut met = Met::default();
    for seed in 0..150 {
        let mut chance = noise(seed, 80);
        let [wishes, reads] = [chance[0], chance[1]].map(|at| usize::from(at) % chance.len());
        let mut turns: Vec<Who> = chance
            .drain(..)
            .map(|chance| if chance % 2 == 0 { Who::One } else { Who::Other })
            .collect();
        turns.insert(wishes, Who::Wisher);
        turns.insert(reads, Who::Reader);
        let second = if seed % 2 == 0 { Second::Thoughts } else { Second::Forgotten };
        let one = meeting.meet(second, &turns, seed % 5 == 0).await;
        met.kept += one.kept;
        met.protected += one.protected;
        met.late += one.late;
    }
    assert!(met.kept > 5 && met.protected > 20 && met.late > 10, "{met:?}");
}

/// A collection that is interrupted by its person ends what it began, and leaves no list behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_collection_leaves_no_list() {
    let (store, bench) = interruptible().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let [first, ..] = three(&bench, &tree()).await;
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let how = collect_options(NOW_MS + 2 * DAY_MS);
    let plan = repository.plan_collection(lineage, &how).await.unwrap();
    let cancel = how.cancel.clone();
    store.after(3, Some(Box::pin(async move { cancel.cancel() })));
    assert!(matches!(plan.collect(&how).await.unwrap_err(), Error::Cancelled));
    let lists = repository.store().list(&format!("lineages/{lineage}/gc/")).await.unwrap();
    assert!(lists.iter().any(|list| list.key.ends_with("/done")), "{lists:?}");
    assert!(is_sound(repository, lineage, first.backup).await, "nothing of it was deleted");
    collect(repository, lineage, how.now_ms).await.unwrap();
    assert!(is_clean(repository, lineage, how.now_ms).await);
}

/// Before each call of a collection the deletion is taken back. Who is told that the backup stays has it whole, then and
/// after every later collection; who is told anything else is told why.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_deletion_taken_back_before_any_call_of_a_collection_holds_or_is_refused() {
    let (mut calls, mut kept, mut refused) = (0, 0, 0);
    loop {
        let (store, bench) = interruptible().await;
        let (repository, lineage) = (&bench.repository, bench.lineage);
        let [first, ..] = three(&bench, &tree()).await;
        repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
        let other = bench.beside().await;
        let told = Arc::new(Mutex::new(None));
        let turn: Turn = Box::pin({
            let told = Arc::clone(&told);
            async move {
                let ended = other.repository.remember(lineage, first.backup, &wish(NOW_MS)).await;
                *told.lock().unwrap() = Some(ended);
            }
        });
        let now_ms = NOW_MS + 2 * DAY_MS;
        store.after(calls, Some(turn));
        collect(repository, lineage, now_ms).await.unwrap();
        if store.is_left() {
            assert!(calls > 20 && kept > 10 && refused > 5, "{calls} {kept} {refused}");
            return;
        }
        // What a collection that has ended did not delete, no later one deletes.
        collect(repository, lineage, now_ms).await.unwrap();
        let told = told.lock().unwrap().take().unwrap();
        match told {
            Ok(()) => {
                kept += 1;
                assert!(is_sound(repository, lineage, first.backup).await, "{calls} calls");
            }
            Err(Error::Wanted { reason, .. }) => {
                refused += 1;
                assert!(reason.contains("deleted") || reason.contains("may be deleting"));
                match repository.open_backup(lineage, first.backup).await {
                    Ok(_) => assert!(is_sound(repository, lineage, first.backup).await),
                    Err(error) => assert!(matches!(error, Error::Missing { .. }), "{error}"),
                }
            }
            Err(error) => panic!("{calls}: {error:?}"),
        }
        calls += 1;
    }
}

fn pin(at_ms: i64) -> Pin {
    Pin { by: "reader".into(), why: "restore".into(), at_ms }
}

/// Restores as a reader with a pin does; says whether it was told that it is protected.
async fn restore_pinned(
    repository: &Repository,
    lineage: LineageId,
    backup: BackupId,
    into: &std::path::Path,
) -> (bool, Result<(), Error>) {
    let pinned = match repository.open_pinned(lineage, backup, &pin(NOW_MS + 2 * DAY_MS)).await {
        Ok(pinned) => pinned,
        Err(error) => return (false, Err(error)),
    };
    let protected = pinned.unprotected().is_none();
    let target = RestoreTarget { directory: into.to_owned(), ..RestoreTarget::default() };
    let restored = async {
        pinned.restore_plan(target).await?.restore(RestoreOptions::default()).await?;
        Ok(())
    };
    let restored = restored.await;
    pinned.release().await;
    (protected, restored)
}

/// Before each call of a restore of a backup that was given up, a collector does all of its work. The restore that believes
/// itself protected is whole; any other is whole or fails, and never leaves anything that looks whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_at_any_call_of_a_restore_takes_nothing_from_under_it() {
    let (mut calls, mut whole, mut failed) = (0, 0, 0);
    loop {
        let (store, bench) = interruptible().await;
        let (repository, lineage) = (&bench.repository, bench.lineage);
        let tree = tree();
        let first = bench.back_up(&tree, NOW_MS).await;
        let expected = tree.expected();
        tree.write("base/1", 0, &noise(3, 300_000));
        bench.back_up(&tree, NOW_MS + 1_000).await;
        repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
        let other = bench.beside().await;
        let turn: Turn = Box::pin(async move {
            collect(&other.repository, lineage, NOW_MS + 2 * DAY_MS).await.unwrap();
        });
        let place = tempfile::tempdir().unwrap();
        let into = place.path().join("data");
        store.after(calls, Some(turn));
        let (protected, ended) = restore_pinned(repository, lineage, first.backup, &into).await;
        let finished = store.is_left();
        match ended {
            Ok(()) => {
                whole += 1;
                let restored = common::look(&into);
                let same = |(path, node)| restored.get(path) == Some(node);
                assert!(expected.iter().all(same), "{calls}");
            }
            Err(error) => {
                failed += 1;
                assert!(!protected, "{calls}: {error}");
                assert!(matches!(error, Error::Missing { .. }), "{calls}: {error}");
                assert!(!into.exists() || into.join("pgmuster-restore-incomplete").exists());
            }
        }
        let pins = repository.store().list(&format!("lineages/{lineage}/pins/")).await.unwrap();
        assert_eq!(pins, []);
        if finished {
            assert!(calls > 8 && whole > 5 && failed > 0, "{calls} {whole} {failed}");
            return;
        }
        calls += 1;
    }
}

/// The other way round: before each call of a collection somebody begins to read the backup, and reads it after the
/// collection ended. Who was told that it is protected has it whole.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_begins_before_any_call_of_a_collection_keeps_what_it_was_promised() {
    let (mut calls, mut protected, mut warned, mut late) = (0, 0, 0, 0);
    loop {
        let (store, bench) = interruptible().await;
        let (repository, lineage) = (&bench.repository, bench.lineage);
        let [first, ..] = three(&bench, &tree()).await;
        repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
        let now_ms = NOW_MS + 2 * DAY_MS;
        let other = bench.beside().await;
        let began = Arc::new(Mutex::new(None));
        let turn: Turn = Box::pin({
            let began = Arc::clone(&began);
            async move {
                let opened =
                    other.repository.open_pinned(lineage, first.backup, &pin(now_ms)).await;
                *began.lock().unwrap() = Some(opened);
            }
        });
        store.after(calls, Some(turn));
        collect(repository, lineage, now_ms).await.unwrap();
        if store.is_left() {
            assert!(protected > 10 && warned > 5 && late > 1, "{protected} {warned} {late}");
            return;
        }
        let began = began.lock().unwrap().take().unwrap();
        match began {
            Ok(pinned) if pinned.unprotected().is_none() => {
                protected += 1;
                assert!(is_sound(repository, lineage, first.backup).await, "{calls} calls");
                let plan =
                    repository.plan_collection(lineage, &collect_options(now_ms)).await.unwrap();
                let by =
                    Reason::Pinned { by: "reader".into(), why: "restore".into(), at_ms: now_ms };
                assert_eq!(stays(&plan, first.backup), [by]);
                pinned.release().await;
                collect(repository, lineage, now_ms).await.unwrap();
                assert!(is_clean(repository, lineage, now_ms).await, "{calls} calls");
            }
            Ok(_) => warned += 1,
            Err(Error::Missing { .. }) => late += 1,
            Err(error) => panic!("{calls}: {error:?}"),
        }
        calls += 1;
    }
}

/// The pin of a reader that died counts for a week, also by a clock that is wrong, and then goes with its backup.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_readers_pin_is_let_go_for_its_age() {
    let bench = Bench::new().await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let [first, ..] = three(&bench, &tree()).await;
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let now_ms = NOW_MS + 2 * DAY_MS;
    drop(repository.open_pinned(lineage, first.backup, &pin(now_ms)).await.unwrap());
    // One from years ahead, and one that nobody with the key wrote.
    drop(repository.open_pinned(lineage, first.backup, &pin(now_ms * 2)).await.unwrap());
    let forged = format!("lineages/{lineage}/pins/{}/forged", first.backup);
    repository.store().put(&forged, "{}".into()).await.unwrap();
    let plan =
        repository.plan_collection(lineage, &collect_options(now_ms + 6 * DAY_MS)).await.unwrap();
    assert!(matches!(stays(&plan, first.backup), [Reason::Pinned { .. }]));
    assert_eq!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Nothing);
    let now_ms = now_ms + 7 * DAY_MS;
    assert!(matches!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Done(_)));
    let pins = repository.store().list(&format!("lineages/{lineage}/pins/")).await.unwrap();
    assert_eq!(pins.iter().map(|pin| &pin.key).collect::<Vec<_>>(), [&forged]);
}

/// A store whose credentials may read and nothing else.
#[derive(Debug)]
struct ReadOnly(Arc<dyn Store>);

fn forbidden(key: &str) -> StoreError {
    StoreError::Forbidden { operation: "put", key: key.to_owned(), source: "read only".into() }
}

#[async_trait]
impl Layer for ReadOnly {
    fn inner(&self) -> &dyn Store {
        self.0.as_ref()
    }
    async fn put(&self, key: &str, _: Bytes) -> Result<(), StoreError> {
        Err(forbidden(key))
    }
    async fn put_if_absent(&self, key: &str, _: Bytes) -> Result<PutOutcome, StoreError> {
        Err(forbidden(key))
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        Err(forbidden(key))
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        Err(forbidden(key))
    }
    async fn abort_uploads(&self, _: &[String]) -> Result<usize, StoreError> {
        Ok(0)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_that_may_not_write_restores_without_a_pin_and_says_so() {
    let bench = Bench::new().await;
    let tree = tree();
    let backup = bench.back_up(&tree, NOW_MS).await.backup;
    let store: Arc<dyn Store> = Arc::new(ReadOnly(Arc::clone(bench.repository.store())));
    let reader = Repository::open(store, Some(&bench.key)).await.unwrap();
    let pinned = reader.open_pinned(bench.lineage, backup, &pin(NOW_MS)).await.unwrap();
    assert!(pinned.unprotected().unwrap().contains("read only"), "{pinned:?}");
    assert!(common::restore(&pinned).await.unwrap().len() > tree.expected().len());
    pinned.release().await;
}

/// The same on S3: forged wishes, an open backup, a collector that dies at each of its calls and another that finishes, a
/// reader with its pin.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn collections_on_s3_are_as_safe_as_in_a_directory() {
    let store: Arc<dyn Store> = Arc::new(lab::open(&lab::bucket("collect").await).await);
    let store = Arc::new(Interrupted::over(store));
    let bench = Bench::over(tempfile::tempdir().unwrap(), Arc::<Interrupted>::clone(&store)).await;
    let (repository, lineage) = (&bench.repository, bench.lineage);
    let tree = Arc::new(Tree::new().file("a", noise(1, 40_000)).file("b", noise(2, 40_000)));
    let mut last = bench.back_up(&tree, NOW_MS).await;
    let (mut calls, mut interrupted) = (0_i64, 0);
    let now_ms = NOW_MS + 2 * DAY_MS;
    loop {
        tree.write("a", 0, &noise(10 + calls.unsigned_abs(), 40_000));
        let next = bench.back_up(&tree, NOW_MS + calls + 1).await;
        repository.forget(lineage, last.backup, &wish(NOW_MS)).await.unwrap();
        store.after(calls, None);
        let ended = collect(repository, lineage, now_ms).await;
        let finished = store.is_left();
        store.after(-1, None);
        assert_eq!(ended.is_ok(), finished, "{calls}: {ended:?}");
        assert!(is_sound(repository, lineage, next.backup).await, "after {calls} calls");
        finish(repository, lineage, now_ms).await;
        assert!(is_clean(repository, lineage, now_ms).await, "after {calls} calls");
        last = next;
        if finished {
            assert!(interrupted > 4, "it was interrupted at {interrupted} places only");
            break;
        }
        // A directory has its turn at every call, above. Here each round looks at more attempts than the one before, so the
        // steps grow faster than that.
        calls += 5 + calls / 2;
        interrupted += 1;
    }
    tree.write("b", 0, &noise(5, 40_000));
    let newest = bench.back_up(&tree, NOW_MS + 10_000).await;
    let forget = format!("lineages/{lineage}/backups/{}/forget", last.backup);
    repository.store().put(&forget, "forged".into()).await.unwrap();
    assert_eq!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Nothing);
    repository.forget(lineage, last.backup, &wish(NOW_MS)).await.unwrap();
    let pinned = repository.open_pinned(lineage, last.backup, &pin(now_ms)).await.unwrap();
    assert_eq!(pinned.unprotected(), None);
    assert_eq!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Nothing);
    pinned.release().await;
    let open = bench.begin(now_ms).await;
    let postponed = collect(repository, lineage, now_ms).await.unwrap();
    assert!(matches!(postponed, Collected::Postponed { open: of } if of[0].attempt == open.id()));
    let late = now_ms + 2 * DAY_MS;
    assert!(matches!(collect(repository, lineage, late).await.unwrap(), Collected::Done(_)));
    assert!(is_clean(repository, lineage, late).await);
    assert_eq!(bench.restore(&newest).await, tree.expected());
}
