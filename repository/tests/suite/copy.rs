//! Copies in a second store: the same objects, the verdict last, whoever is interrupted wherever, whatever is damaged.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use crate::common::{self, Bench, DAY_MS, NOW_MS, Tree, collect_options, copy_options, noise};
use crate::interrupted::{Interrupted, Turn};
use crate::lab;
use async_trait::async_trait;
use bytes::Bytes;
use proto::copies::{CopiedBackup, Copies};
use proto::{BackupId, LineageId};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::probe::{Capabilities, probe};
use repository::store::{Listed, Store, StoreError};
use repository::{
    BackupSummary, CheckLevel, CollectOptions, Collected, CopyOutcome, CopySummary, Error, Mirror,
    Reason, Repository, ScrubOptions, ScrubReport, Unlock, Wish,
};

fn wish(at_ms: i64) -> Wish {
    Wish { by: "tester".into(), why: String::new(), at_ms }
}

fn tree() -> Arc<Tree> {
    let tree = Tree::new().directory("base").file("base/1", noise(1, 300_000));
    Arc::new(tree.file("base/2", noise(2, 200_000)))
}

/// Two backups that share most.
async fn two(bench: &Bench, tree: &Arc<Tree>) -> [BackupSummary; 2] {
    let first = bench.back_up(tree, NOW_MS).await;
    tree.write("base/1", 0, &noise(3, 100_000));
    [first, bench.back_up(tree, NOW_MS + 1_000).await]
}

fn at(place: &Path) -> Arc<dyn Store> {
    Arc::new(DirectoryStore::new(place))
}

async fn mirror(bench: &Bench, store: Arc<dyn Store>) -> Result<Mirror, Error> {
    let found = async |_: &dyn Store| Ok(Capabilities::default());
    bench.repository.mirror(store, Unlock::KeyFile(&bench.key), false, found).await
}

/// Copies every backup, oldest first.
async fn copy_all(bench: &Bench, store: Arc<dyn Store>) -> Result<Vec<CopySummary>, Error> {
    let mut mirror = mirror(bench, store).await?;
    mirror.copy_lineage(bench.lineage).await?;
    let mut copied = Vec::new();
    for summary in bench.repository.list_backups(bench.lineage).await? {
        let backup = summary.backup().unwrap();
        copied.push(mirror.copy(bench.lineage, backup, &copy_options(NOW_MS + 5_000)).await?);
    }
    Ok(copied)
}

/// Every object of a directory, but what only one side has.
fn objects(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = common::files_below(root).into_iter();
    let named = files.map(|path| (path.strip_prefix(root).unwrap().to_owned(), path));
    // What a dead copy leaves below `probe` means nothing.
    let own = |name: &Path| {
        name.ends_with("intent") || name.ends_with("config") || name.starts_with("probe")
    };
    let shared = named.filter(|(name, _)| !own(name));
    shared.map(|(name, path)| (name, std::fs::read(path).unwrap())).collect()
}

async fn open(bench: &Bench, place: &Path) -> Repository {
    Repository::open(at(place), Some(&bench.key)).await.unwrap()
}

async fn is_whole(repository: &Repository, lineage: LineageId, backup: BackupId) -> bool {
    let backup = repository.open_backup(lineage, backup).await.unwrap();
    backup.check_inventory().await.unwrap().is_sound()
        && backup.check_decrypt(repository::CheckOptions::default()).await.unwrap().is_sound()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_has_the_same_objects_opens_with_the_same_key_and_restores() {
    let bench = Bench::new().await;
    let tree = tree();
    let [first, second] = two(&bench, &tree).await;
    bench.repository.add_proof(bench.lineage, first.backup, "proof".into()).await.unwrap();
    bench.repository.hold(bench.lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let place = tempfile::tempdir().unwrap();
    let target = place.path().join("copy");

    let found = async |store: &dyn Store| probe(store).await;
    let made = bench
        .repository
        .mirror(at(&target), Unlock::KeyFile(&bench.key), false, found)
        .await
        .unwrap();
    assert_eq!(made.target().probed().map(|found| found.races_with_one_winner), Some(3));
    let copied = copy_all(&bench, at(&target)).await.unwrap();
    assert!(copied.iter().all(|one| one.outcome == CopyOutcome::Copied), "{copied:?}");
    // What the first brought is not sent again.
    assert!(copied[1].present.packs > 0, "{copied:?}");

    let (mut source, there) = (objects(&bench.store_path()), objects(&target));
    // A hold is a wish about the source, a proof a statement about it.
    source.retain(|name, _| {
        let name = name.to_str().unwrap();
        !name.contains("/hold.") && !name.contains("/proof.")
    });
    assert_eq!(source.keys().collect::<Vec<_>>(), there.keys().collect::<Vec<_>>());
    assert!(source == there, "the same bytes");
    let repository = open(&bench, &target).await;
    let listed = |repository: Repository| async move {
        let mut listed = repository.list_backups(bench.lineage).await.unwrap();
        for summary in &mut listed {
            (summary.held, summary.proofs) = (false, 0);
        }
        listed
    };
    assert_eq!(listed(repository.clone()).await, listed(bench.repository.clone()).await);
    let backup = repository.open_backup(bench.lineage, second.backup).await.unwrap();
    let mut restored = common::restore(&backup).await.unwrap();
    restored.retain(|path, _| path.starts_with(b"base"));
    assert_eq!(restored, tree.expected());

    // Twice is nothing.
    let again = copy_all(&bench, at(&target)).await.unwrap();
    let nothing = |one: &CopySummary| one.outcome == CopyOutcome::Present && one.sent.packs == 0;
    assert!(again.iter().all(nothing), "{again:?}");
    assert!(objects(&target) == there);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn another_repository_and_the_source_itself_are_no_place_for_a_copy() {
    let (bench, other) = (Bench::new().await, Bench::new().await);
    two(&bench, &tree()).await;
    let before = objects(&other.store_path());
    // It does not even open with our key; nor is it taken when it does.
    mirror(&bench, at(&other.store_path())).await.unwrap_err();
    let found = async |_: &dyn Store| Ok(Capabilities::default());
    let refused = bench
        .repository
        .mirror(at(&other.store_path()), Unlock::KeyFile(&other.key), false, found)
        .await
        .unwrap_err();
    assert!(
        matches!(&refused, Error::NoMirror { reason, .. } if reason.contains("holds repository"))
    );
    assert!(objects(&other.store_path()) == before);
    // By another name it is the same place.
    let link = bench.directory.path().join("link");
    std::os::unix::fs::symlink(bench.store_path(), &link).unwrap();
    for place in [bench.store_path(), link] {
        let refused = mirror(&bench, at(&place)).await.unwrap_err();
        assert!(
            matches!(&refused, Error::NoMirror { reason, .. } if reason.contains("copied from"))
        );
    }
}

/// A copy dies at each call of the target in turn, and is repeated. At no moment is there a backup that is not whole; the
/// end is the same as without the death.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_dies_at_any_call_is_taken_up_by_the_next() {
    let bench = Bench::new().await;
    two(&bench, &tree()).await;
    let mut calls = 0;
    loop {
        let place = tempfile::tempdir().unwrap();
        let store = Arc::new(Interrupted::new(place.path()));
        store.after(calls, None);
        let ended = copy_all(&bench, Arc::<Interrupted>::clone(&store) as _).await;
        let finished = store.is_left();
        store.after(-1, None);
        assert_eq!(ended.is_ok(), finished, "{calls}: {ended:?}");
        if place.path().join("config").exists() {
            let repository = open(&bench, place.path()).await;
            for summary in repository.list_backups(bench.lineage).await.unwrap() {
                let backup = summary.backup().unwrap();
                assert!(is_whole(&repository, bench.lineage, backup).await, "{calls} calls");
            }
        }
        copy_all(&bench, at(place.path())).await.unwrap();
        assert!(objects(place.path()) == objects(&bench.store_path()), "after {calls} calls");
        if finished {
            assert!(calls > 30, "it was interrupted at {calls} places only");
            return;
        }
        calls += 1;
    }
}

/// Before each call that a copy makes at its target, the older backup there is given up, and a collector does all of its
/// work. What is a backup of the target afterwards is whole; a copy that could not be made is made by the next.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_at_any_call_of_a_copy_leaves_no_hole_in_it() {
    let bench = Bench::new().await;
    let lineage = bench.lineage;
    let tree = tree();
    // The second and the third share packs with the first, the newest shares nothing.
    let [first, second] = two(&bench, &tree).await;
    tree.write("base/2", 0, &noise(6, 10_000));
    let third = bench.back_up(&tree, NOW_MS + 2_000).await;
    let strange = Arc::new(Tree::new().file("other", noise(77, 50_000)));
    let newest = bench.back_up(&strange, NOW_MS + 3_000).await;
    let (mut calls, mut copied, mut refused) = (0, 0, 0);
    loop {
        let place = tempfile::tempdir().unwrap();
        let mut plain = mirror(&bench, at(place.path())).await.unwrap();
        plain.copy_lineage(lineage).await.unwrap();
        for backup in [first.backup, newest.backup] {
            plain.copy(lineage, backup, &copy_options(NOW_MS)).await.unwrap();
        }
        let repository = open(&bench, place.path()).await;
        let store = Arc::new(Interrupted::new(place.path()));
        let mut copier = mirror(&bench, Arc::<Interrupted>::clone(&store) as _).await.unwrap();
        let turn: Turn = Box::pin({
            let repository = repository.clone();
            async move {
                repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
                let how = collecting(NOW_MS + 2 * DAY_MS);
                let plan = repository.plan_collection(lineage, &how).await.unwrap();
                plan.collect(&how).await.unwrap();
            }
        });
        store.after(calls, Some(turn));
        let ended = copier.copy(lineage, second.backup, &copy_options(NOW_MS + 2 * DAY_MS)).await;
        let finished = store.is_left();
        store.after(-1, None);
        match ended {
            Ok(_) => copied += 1,
            Err(Error::Incomplete { .. }) => refused += 1,
            Err(error) => panic!("{calls}: {error:?}"),
        }
        for backup in [second.backup, third.backup] {
            plain.copy(lineage, backup, &copy_options(NOW_MS + 2 * DAY_MS)).await.unwrap();
        }
        for summary in repository.list_backups(lineage).await.unwrap() {
            let backup = summary.backup().unwrap();
            assert!(is_whole(&repository, lineage, backup).await, "{calls}: {backup}");
        }
        if finished {
            assert!(calls > 12 && copied > 12 && refused == 0, "{calls} {copied} {refused}");
            return;
        }
        calls += 1;
    }
}

fn collecting(now_ms: i64) -> CollectOptions {
    CollectOptions { patience_ms: None, ..collect_options(now_ms) }
}

/// What is on a list of a collector at the target keeps its name from being given again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_copied_to_a_name_that_is_condemned() {
    let bench = Bench::new().await;
    let lineage = bench.lineage;
    let tree = tree();
    let [first, second] = two(&bench, &tree).await;
    let strange = Arc::new(Tree::new().file("other", noise(77, 50_000)));
    let newest = bench.back_up(&strange, NOW_MS + 3_000).await;
    let place = tempfile::tempdir().unwrap();
    let store = Arc::new(Interrupted::new(place.path()));
    let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
    mirror.copy_lineage(lineage).await.unwrap();
    for backup in [first.backup, newest.backup] {
        mirror.copy(lineage, backup, &copy_options(NOW_MS)).await.unwrap();
    }
    // A collector dies with its list written and one thing deleted.
    let as_store: Arc<dyn Store> = Arc::<Interrupted>::clone(&store);
    let dies = Repository::open(as_store, Some(&bench.key)).await.unwrap();
    dies.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let how = collecting(NOW_MS + 2 * DAY_MS);
    let plan = dies.plan_collection(lineage, &how).await.unwrap();
    store.after(1, None);
    plan.collect(&how).await.unwrap_err();
    let refused = mirror.copy(lineage, second.backup, &copy_options(NOW_MS)).await.unwrap_err();
    assert!(matches!(refused, Error::Condemned { .. }), "{refused}");
    let repository = open(&bench, place.path()).await;
    assert_eq!(repository.verdict(lineage, second.backup.into()).await.unwrap(), None);
    // The copy's intent is there: a collection waits for the copy, and a dead copy is aborted like a dead backup.
    let plan = repository.plan_collection(lineage, &how).await.unwrap();
    assert!(plan.open[0].by.contains("who copies it"), "{:?}", plan.open);
    assert!(matches!(plan.collect(&how).await.unwrap(), Collected::Postponed { .. }));
    // Somebody knows that the collector is dead.
    let dead = CollectOptions { lists_for_ms: Some(0), patience_ms: Some(0), ..how };
    let plan = repository.plan_collection(lineage, &dead).await.unwrap();
    plan.collect(&dead).await.unwrap();
    let ended = mirror.copy(lineage, second.backup, &copy_options(NOW_MS)).await.unwrap();
    assert_eq!(ended.outcome, CopyOutcome::Aborted);
}

/// While a backup is copied it is pinned at the source: a collection there leaves it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_is_copied_is_pinned_at_its_source() {
    let bench = Bench::new().await;
    let lineage = bench.lineage;
    let [first, _] = two(&bench, &tree()).await;
    bench.repository.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let place = tempfile::tempdir().unwrap();
    let store = Arc::new(Interrupted::new(place.path()));
    let mut mirror = mirror(&bench, Arc::<Interrupted>::clone(&store) as _).await.unwrap();
    mirror.copy_lineage(lineage).await.unwrap();
    let source = bench.repository.clone();
    let turn: Turn = Box::pin(async move {
        let how = collecting(NOW_MS + 2 * DAY_MS);
        let plan = source.plan_collection(lineage, &how).await.unwrap();
        let [Reason::Pinned { by, why, .. }] = &plan.backups[0].stays[..] else {
            panic!("{:?}", plan.backups)
        };
        assert_eq!((by.as_str(), why.as_str()), ("copier", "copy"));
        assert_eq!(plan.collect(&how).await.unwrap(), Collected::Nothing);
    });
    store.after(5, Some(turn));
    let now_ms = NOW_MS + 2 * DAY_MS;
    let copied = mirror.copy(lineage, first.backup, &copy_options(now_ms)).await.unwrap();
    assert!(!store.is_left(), "the collector had its turn");
    assert_eq!(copied.outcome, CopyOutcome::Copied);
    let pins = bench.repository.store().list(&format!("lineages/{lineage}/pins/")).await.unwrap();
    assert_eq!(pins, []);
}

/// A damaged pack of the source is named and never copied; the backups that need it are not made at the target, the others
/// are. What is damaged or lost at the target is brought again.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn damage_at_the_source_stays_there_and_damage_at_the_target_is_repaired() {
    let bench = Bench::new().await;
    let lineage = bench.lineage;
    let tree = tree();
    let [first, second] = two(&bench, &tree).await;
    let strange = Arc::new(Tree::new().file("other", noise(77, 50_000)));
    let third = bench.back_up(&strange, NOW_MS + 3_000).await;
    let place = tempfile::tempdir().unwrap();
    let packs = |root: &Path| {
        let mut packs = common::files_below(root);
        packs.retain(|path| path.to_str().unwrap().contains("/packs/"));
        packs.sort_by_key(|path| std::cmp::Reverse(path.metadata().unwrap().len()));
        packs
    };
    // The largest is the first backup's content, to which the second refers.
    let bad = packs(&bench.store_path()).remove(0);
    let whole = std::fs::read(&bad).unwrap();
    for flipped in [200, whole.len() - 20, whole.len() - 1] {
        let mut bytes = whole.clone();
        bytes[flipped] ^= 1;
        std::fs::write(&bad, bytes).unwrap();
        let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
        mirror.copy_lineage(lineage).await.unwrap();
        for backup in [first.backup, second.backup] {
            let error = mirror.copy(lineage, backup, &copy_options(NOW_MS)).await.unwrap_err();
            let name = bad.file_name().unwrap().to_str().unwrap();
            assert!(matches!(&error, Error::Damaged { key, .. } if key.ends_with(name)), "{error}");
        }
        mirror.copy(lineage, third.backup, &copy_options(NOW_MS)).await.unwrap();
    }
    let target = open(&bench, place.path()).await;
    let backups = target.list_backups(lineage).await.unwrap();
    assert_eq!(backups.iter().map(|one| one.backup().unwrap()).collect::<Vec<_>>(), [third.backup]);
    assert!(!packs(place.path()).iter().any(|pack| pack.file_name() == bad.file_name()));

    std::fs::write(&bad, &whole).unwrap();
    copy_all(&bench, at(place.path())).await.unwrap();
    let theirs = packs(place.path());
    std::fs::remove_file(&theirs[0]).unwrap();
    let cut = std::fs::File::options().write(true).open(&theirs[1]).unwrap();
    cut.set_len(100).unwrap();
    let repaired = copy_all(&bench, at(place.path())).await.unwrap();
    assert!(repaired.iter().any(|one| one.outcome == CopyOutcome::Repaired), "{repaired:?}");
    assert_eq!(repaired.iter().map(|one| one.sent.packs).sum::<u64>(), 2);
    assert!(objects(place.path()) == objects(&bench.store_path()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancelled_copy_ends_cleanly_and_what_was_deleted_at_the_target_stays_deleted() {
    let bench = Bench::new().await;
    let lineage = bench.lineage;
    let [first, second] = two(&bench, &tree()).await;
    let place = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
    mirror.copy_lineage(lineage).await.unwrap();
    let how = copy_options(NOW_MS);
    how.cancel.cancel();
    let ended = mirror.copy(lineage, first.backup, &how).await.unwrap_err();
    assert!(matches!(ended, Error::Cancelled), "{ended}");
    assert!(!place.path().join(".uploads").exists(), "nothing unfinished is left");
    copy_all(&bench, at(place.path())).await.unwrap();

    let target = open(&bench, place.path()).await;
    target.forget(lineage, first.backup, &wish(NOW_MS)).await.unwrap();
    let collect = collecting(NOW_MS + 2 * DAY_MS);
    for _ in 0..2 {
        let copied = copy_all(&bench, at(place.path())).await.unwrap();
        assert_eq!(copied[0].outcome, CopyOutcome::GivenUp);
        let plan = target.plan_collection(lineage, &collect).await.unwrap();
        plan.collect(&collect).await.unwrap();
    }
    assert_eq!(target.list_backups(lineage).await.unwrap().len(), 1);
    assert!(is_whole(&target, lineage, second.backup).await);
}

/// A store into whose notes of copies nobody may write for a while.
#[derive(Debug)]
struct Unheard {
    inner: DirectoryStore,
    refuses: AtomicBool,
}

#[async_trait]
impl Layer for Unheard {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        if key.contains("/copies/") && self.refuses.load(Ordering::SeqCst) {
            let (operation, source) = ("write", "it may only be read".into());
            return Err(StoreError::Forbidden { operation, key: key.to_owned(), source });
        }
        self.inner.put(key, bytes).await
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_source_is_told_of_its_copies_and_of_what_became_of_them() {
    let directory = tempfile::tempdir().unwrap();
    let inner = DirectoryStore::new(directory.path().join("repository"));
    let store = Arc::new(Unheard { inner, refuses: AtomicBool::new(true) });
    let bench = Bench::over(directory, Arc::<Unheard>::clone(&store)).await;
    let lineage = bench.lineage;
    let [first, second] = two(&bench, &tree()).await.map(|summary| summary.backup);
    let place = tempfile::tempdir().unwrap();
    let copy = async |now_ms| {
        let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
        mirror.copy_lineage(lineage).await.unwrap();
        for backup in [first, second] {
            mirror.copy(lineage, backup, &copy_options(now_ms)).await.unwrap();
        }
        mirror
    };
    let told = async || bench.repository.copies(lineage).await.unwrap();
    let copies = |backups: &[(BackupId, i64, i64)]| {
        let copied = |&(backup, copied_at_ms, checked_at_ms)| CopiedBackup {
            backup,
            copied_at_ms,
            checked_at_ms,
        };
        let (repository, by) = (bench.repository.id(), "copier".to_owned());
        let place = format!("file://{}", place.path().display());
        vec![Copies { place, repository, by, backups: backups.iter().map(copied).collect() }]
    };
    let (t1, t2, t3, t4) = (NOW_MS + 5_000, NOW_MS + 6_000, NOW_MS + 7_000, NOW_MS + 8_000);

    let mut made = copy(t1).await;
    assert!(made.leave_word(&copy_options(t1)).await.is_err(), "it may not be written to");
    store.refuses.store(false, Ordering::SeqCst);
    assert_eq!(told().await, []);
    made.leave_word(&copy_options(t1)).await.unwrap();
    assert_eq!(told().await, copies(&[(first, t1, t1), (second, t1, t1)]), "it was kept");
    copy(t2).await.leave_word(&copy_options(t2)).await.unwrap();
    assert_eq!(told().await, copies(&[(first, t1, t2), (second, t1, t2)]), "looked after");

    let target = open(&bench, place.path()).await;
    assert_eq!(target.copies(lineage).await.unwrap(), [], "the copy knows of none");
    let options = ScrubOptions::new(CheckLevel::Manifest, t2);
    let mut report = ScrubReport::default();
    bench.repository.scrub(&options, &mut report).await.unwrap();
    assert!(report.is_sound() && report.foreign.is_empty(), "{report:?}");

    // Word that cannot be believed says nothing, is found, and is written anew.
    let word = bench.store_path().join(format!("lineages/{lineage}/copies"));
    let word = common::files_below(&word).remove(0);
    std::fs::write(&word, "{}\n").unwrap();
    assert_eq!(told().await, []);
    let mut report = ScrubReport::default();
    bench.repository.scrub(&options, &mut report).await.unwrap();
    assert!(report.damaged.iter().any(|damage| damage.object.contains("/copies/")), "{report:?}");
    copy(t3).await.leave_word(&copy_options(t3)).await.unwrap();
    assert_eq!(told().await, copies(&[(first, t1, t3), (second, t1, t3)]), "the copy knows when");

    // What was given up there is not claimed, nor what the source itself has no more.
    target.forget(lineage, first, &wish(NOW_MS)).await.unwrap();
    copy(t4).await.leave_word(&copy_options(t4)).await.unwrap();
    assert_eq!(told().await, copies(&[(second, t1, t4)]));
    target.remember(lineage, first, &wish(NOW_MS)).await.unwrap();
    copy(t4).await.leave_word(&copy_options(t4)).await.unwrap();
    assert_eq!(told().await, copies(&[(first, t1, t4), (second, t1, t4)]));
    bench.repository.forget(lineage, first, &wish(NOW_MS)).await.unwrap();
    let collect = collecting(NOW_MS + 2 * DAY_MS);
    let plan = bench.repository.plan_collection(lineage, &collect).await.unwrap();
    plan.collect(&collect).await.unwrap();
    let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
    mirror.copy(lineage, second, &copy_options(t4)).await.unwrap();
    mirror.leave_word(&copy_options(t4)).await.unwrap();
    assert_eq!(told().await, copies(&[(second, t1, t4)]));
}

/// A store with as much room as it is told to have.
#[derive(Debug)]
struct Narrow {
    inner: DirectoryStore,
    free: AtomicU64,
}

#[async_trait]
impl Layer for Narrow {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        Ok(Some(self.free.load(Ordering::SeqCst)))
    }
}

#[tokio::test]
async fn a_copy_for_which_there_is_no_room_sends_no_pack() {
    const RESERVE: u64 = 1 << 20;
    let bench = Bench::new().await;
    let [first, second] = two(&bench, &tree()).await;
    let needed = first.counts.stored_bytes + RESERVE;
    let target = tempfile::tempdir().unwrap();
    let store = Arc::new(Narrow {
        inner: DirectoryStore::new(target.path()),
        free: AtomicU64::new(needed - 1),
    });
    let copy = async || copy_all(&bench, Arc::<Narrow>::clone(&store)).await;
    let packs = || {
        let names = objects(target.path()).into_keys();
        names.filter(|name| name.to_str().unwrap().contains("/packs/")).count() as u64
    };
    let error = copy().await.unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains(&format!("{needed} bytes are needed and {} are free", needed - 1)),
        "{text}"
    );
    assert_eq!(packs(), 0);

    // There is room for the first one and, as far as is known, for nothing after it: only what is missing counts.
    store.free.store(needed, Ordering::SeqCst);
    let copied = copy().await.unwrap();
    assert!(copied.iter().all(|copy| copy.outcome == CopyOutcome::Copied), "{copied:?}");
    assert_eq!(packs(), first.counts.packs_added + second.counts.packs_added);
    store.free.store(0, Ordering::SeqCst);
    let copied = copy().await.unwrap();
    assert!(copied.iter().all(|copy| copy.outcome == CopyOutcome::Present), "{copied:?}");

    // A directory says what its file system does, also before it is there.
    let place = target.path().join("not/yet");
    let told = DirectoryStore::new(&place).free_bytes().await.unwrap().unwrap();
    let space = rustix::fs::statvfs(target.path()).unwrap();
    let (least, most) = (told / 2, told.saturating_mul(2));
    assert!((least..most).contains(&(space.f_bavail * space.f_frsize)), "{told}");
}

/// A store that counts listings of packs and looks at identities.
#[derive(Debug)]
struct Counted {
    inner: DirectoryStore,
    packs: AtomicUsize,
    identities: AtomicUsize,
}

#[async_trait]
impl Layer for Counted {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.identities.fetch_add(key.ends_with("/identity").into(), Ordering::SeqCst);
        self.inner.get(key, limit_bytes).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.packs.fetch_add(prefix.ends_with("/packs/").into(), Ordering::SeqCst);
        self.inner.list(prefix).await
    }
}

#[tokio::test]
async fn a_copy_of_what_is_there_lists_its_packs_once_and_repairs_all_the_same() {
    let bench = Bench::new().await;
    let tree = tree();
    two(&bench, &tree).await;
    let target = tempfile::tempdir().unwrap();
    copy_all(&bench, at(target.path())).await.unwrap();
    let whole = objects(target.path());
    let pack = whole.keys().find(|name| name.to_str().unwrap().contains("/packs/")).unwrap();
    std::fs::remove_file(target.path().join(pack)).unwrap();
    let store = Arc::new(Counted {
        inner: DirectoryStore::new(target.path()),
        packs: AtomicUsize::default(),
        identities: AtomicUsize::default(),
    });
    let mut mirror = mirror(&bench, Arc::<Counted>::clone(&store)).await.unwrap();
    let mut sent = 0;
    for summary in bench.repository.list_backups(bench.lineage).await.unwrap() {
        mirror.copy_lineage(bench.lineage).await.unwrap();
        let backup = summary.backup().unwrap();
        let how = copy_options(NOW_MS + 5_000);
        sent += mirror.copy(bench.lineage, backup, &how).await.unwrap().sent.packs;
    }
    let counted = |counter: &AtomicUsize| counter.load(Ordering::SeqCst);
    assert_eq!((sent, counted(&store.packs), counted(&store.identities)), (1, 1, 1));
    assert!(objects(target.path()) == whole);
}

/// From a directory into S3, from there into another place in S3, and back into a directory: the same objects, also after a
/// copy in S3 died and lost a pack.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_into_s3_and_out_of_it_has_the_same_objects() {
    let bench = Bench::new().await;
    // Packs that take several parts on their way.
    let tree = Arc::new(Tree::new().file("large", noise(1, 20 << 20)).file("small", noise(2, 9)));
    bench.back_up(&tree, NOW_MS).await;
    tree.write("large", 1 << 20, &noise(3, 100_000));
    bench.back_up(&tree, NOW_MS + 1_000).await;
    let mut options = lab::bucket("copy").await;
    let first: Arc<dyn Store> = Arc::new(lab::open(&options).await);
    options.prefix = "else/where".to_owned();
    let second: Arc<dyn Store> = Arc::new(lab::open(&options).await);
    let probed = async |store: &dyn Store| probe(store).await;
    let copy = async |source: &Repository, to: &Arc<dyn Store>| {
        let unlock = Unlock::KeyFile(&bench.key);
        let mut mirror = source.mirror(Arc::clone(to), unlock, false, probed).await?;
        mirror.copy_lineage(bench.lineage).await?;
        let mut outcomes = Vec::new();
        for summary in source.list_backups(bench.lineage).await? {
            let backup = summary.backup().unwrap();
            let copied = mirror.copy(bench.lineage, backup, &copy_options(NOW_MS + 5_000)).await?;
            outcomes.push(copied.outcome);
        }
        Ok::<_, Error>(outcomes)
    };

    let mortal = Arc::new(Interrupted::over(Arc::clone(&first)));
    mortal.after(30, None);
    let interrupted: Arc<dyn Store> = Arc::<Interrupted>::clone(&mortal);
    assert!(copy(&bench.repository, &interrupted).await.is_err(), "it died on its way");
    let done = copy(&bench.repository, &first).await.unwrap();
    assert_eq!(done, [CopyOutcome::Copied; 2]);

    let source = Repository::open(Arc::clone(&first), Some(&bench.key)).await.unwrap();
    let same = source.mirror(Arc::clone(&first), Unlock::KeyFile(&bench.key), false, probed).await;
    assert!(matches!(same, Err(Error::NoMirror { .. })), "{same:?}");
    assert_eq!(copy(&source, &second).await.unwrap(), [CopyOutcome::Copied; 2]);
    let packs = second.list(&format!("lineages/{}/packs/", bench.lineage)).await.unwrap();
    let largest = packs.iter().max_by_key(|pack| pack.size_bytes).unwrap();
    assert!(largest.size_bytes > 8 << 20, "{packs:?}");
    second.delete(&largest.key).await.unwrap();
    let repaired = copy(&source, &second).await.unwrap();
    assert!(repaired.contains(&CopyOutcome::Repaired), "{repaired:?}");

    let source = Repository::open(Arc::clone(&second), Some(&bench.key)).await.unwrap();
    let place = tempfile::tempdir().unwrap();
    let back = at(place.path());
    assert_eq!(copy(&source, &back).await.unwrap(), [CopyOutcome::Copied; 2]);
    let (mut here, there) = (objects(&bench.store_path()), objects(place.path()));
    here.retain(|name, _| !name.to_str().unwrap().contains("/pins/"));
    assert!(here == there, "the same objects");
    assert_eq!(second.uploads("").await.unwrap(), [""; 0], "nothing is left half-way");
}
