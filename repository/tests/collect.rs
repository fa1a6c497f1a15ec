//! Forgetting and collecting, with the production code: what is wanted stays, whoever is interrupted wherever.
#![expect(clippy::unwrap_used, reason = "a test")]

mod common;

use std::ops::Range;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use common::{Bench, DAY_MS, NOW_MS, Tree, noise};
use proto::{BackupId, LineageId};
use repository::store::directory::DirectoryStore;
use repository::store::{Listed, PutOutcome, Store, StoreError, Upload};
use repository::{
    BackupSummary, CheckOptions, CollectOptions, Collected, Error, Fate, Repository, Wish,
    WriteOptions,
};
use tokio_util::sync::CancellationToken;

type Turn = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A directory store in which somebody else has a turn, or everything fails, from the n-th call on.
struct Interrupted {
    inner: DirectoryStore,
    /// Calls that are left before it happens; negative when it never does.
    left: AtomicI64,
    /// Has its turn in between; `None` lets this call and all after it fail, as for a process that died.
    turn: Mutex<Option<Turn>>,
    dead: AtomicBool,
    /// It dies after a deletion was done and before it heard of it.
    deletes_first: AtomicBool,
}

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupted")
    }
}

impl Interrupted {
    fn new(path: &std::path::Path) -> Self {
        let inner = DirectoryStore::new(path);
        Self {
            inner,
            left: (-1).into(),
            turn: Mutex::default(),
            dead: false.into(),
            deletes_first: false.into(),
        }
    }

    /// After `calls` more calls it happens.
    fn after(&self, calls: i64, turn: Option<Turn>) {
        self.dead.store(false, Ordering::SeqCst);
        *self.turn.lock().unwrap() = turn;
        self.left.store(calls, Ordering::SeqCst);
    }

    /// Whether it has not happened.
    fn is_left(&self) -> bool {
        self.left.swap(-1, Ordering::SeqCst) >= 0
    }

    async fn call(&self) -> Result<(), StoreError> {
        if self.dead.load(Ordering::SeqCst) {
            return Err(dead());
        }
        if self.left.load(Ordering::SeqCst) >= 0 && self.left.fetch_sub(1, Ordering::SeqCst) == 0 {
            let turn = self.turn.lock().unwrap().take();
            let Some(turn) = turn else {
                self.dead.store(true, Ordering::SeqCst);
                return Err(dead());
            };
            turn.await;
        }
        Ok(())
    }
}

fn dead() -> StoreError {
    StoreError::Unavailable { operation: "reach", key: "x".into(), source: "it died".into() }
}

#[async_trait]
impl Store for Interrupted {
    fn describe(&self) -> String {
        self.inner.describe()
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.call().await?;
        self.inner.get(key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.call().await?;
        self.inner.get_range(key, range).await
    }
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.call().await?;
        self.inner.size(key).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.call().await?;
        self.inner.put(key, bytes).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        self.call().await?;
        self.inner.put_if_absent(key, bytes).await
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.call().await?;
        self.inner.upload(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.call().await?;
        self.inner.list(prefix).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        if self.deletes_first.load(Ordering::SeqCst) && !self.dead.load(Ordering::SeqCst) {
            self.inner.delete(key).await?;
        }
        self.call().await?;
        self.inner.delete(key).await
    }
    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError> {
        self.inner.abort_uploads(keys).await
    }
}

fn options(now_ms: i64) -> CollectOptions {
    CollectOptions {
        by: "tester".into(),
        now_ms,
        grace_ms: DAY_MS,
        patience_ms: Some(2 * DAY_MS),
        cancel: CancellationToken::new(),
    }
}

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
    let options = options(now_ms);
    repository.plan_collection(lineage, &options).await?.collect(&options).await
}

/// Nothing is left that a second collection would delete, and no list.
async fn is_clean(repository: &Repository, lineage: LineageId, now_ms: i64) -> bool {
    let plan = repository.plan_collection(lineage, &options(now_ms)).await.unwrap();
    let lists = repository.store().list(&format!("lineages/{lineage}/gc/")).await.unwrap();
    // A backup that went left its verdict and the wish, and neither manifest nor proof.
    let goes = plan.forgotten.iter().any(|(_, fate)| *fate == Fate::Goes);
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
    let plan = repository.plan_collection(lineage, &options(now_ms)).await.unwrap();
    let at_ms = now_ms + DAY_MS;
    let fates = [(first.backup, Fate::GoesAt(at_ms)), (second.backup, Fate::GoesAt(at_ms))];
    assert_eq!((plan.delete.packs, &plan.forgotten[..]), (0, &fates[..]));

    let plan = repository.plan_collection(lineage, &options(at_ms)).await.unwrap();
    assert!(plan.delete.packs > 0 && plan.keep.packs > 0 && plan.is_large());
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
    repository.release(lineage, first.backup).await.unwrap();
    repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let error = repository.hold(lineage, first.backup, &wish(NOW_MS)).await.unwrap_err();
    assert!(error.to_string().contains("it is forgotten"), "{error}");
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
    let plan = bench.repository.plan_collection(bench.lineage, &options(NOW_MS * 2)).await.unwrap();
    assert_eq!((plan.delete.packs, plan.forgotten[0].1), (0, Fate::NotBelieved));
}

/// A collector dies at every call it makes, in turn; whatever it left, the next one finishes and loses nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_dies_anywhere_harms_nothing_and_the_next_one_finishes() {
    for deletes_first in [false, true] {
        die_anywhere(deletes_first).await;
    }
}

async fn die_anywhere(deletes_first: bool) {
    let mut calls = 0;
    loop {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(Interrupted::new(&directory.path().join("repository")));
        let bench = Bench::over(directory, Arc::<Interrupted>::clone(&store)).await;
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
        collect(repository, lineage, now_ms).await.unwrap();
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
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(Interrupted::new(&directory.path().join("repository")));
        let bench = Bench::over(directory, Arc::<Interrupted>::clone(&store)).await;
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
    let plan = repository.plan_collection(lineage, &options(now_ms)).await.unwrap();
    assert_eq!(plan.open[0].attempt, open.id());
    let postponed = collect(repository, lineage, now_ms).await.unwrap();
    assert_eq!(postponed, Collected::Postponed { open: plan.open });
    let never = CollectOptions { patience_ms: None, ..options(NOW_MS * 2) };
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
    repository.store().put(&key, whole.slice(..whole.len() - 1)).await.unwrap();
    repository.forget(lineage, second.backup, &wish(NOW_MS)).await.unwrap();
    assert!(matches!(collect(repository, lineage, now_ms).await.unwrap(), Collected::Done(_)));
}
