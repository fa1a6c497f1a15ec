//! A copy that finds something at its target: damage, somebody else's proof, another copy at work, an end that was put to it.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{self, Bench, NOW_MS, Tree, copy_options, noise};
use crate::interrupted::{Interrupted, Turn};
use bytes::Bytes;
use proto::BackupId;
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::store::probe::Capabilities;
use repository::{
    CheckLevel, CopyOutcome, Error, Mirror, Repository, ScrubOptions, ScrubReport, Unlock, Wish,
};
use tokio::runtime::Handle;

fn wish() -> Wish {
    Wish { by: "tester".into(), why: String::new(), at_ms: NOW_MS }
}

fn at(place: &Path) -> Arc<dyn Store> {
    Arc::new(DirectoryStore::new(place))
}

/// A repository with some backups, of which each has much of the one before.
async fn source(backups: u64) -> (Bench, Arc<Tree>, Vec<BackupId>) {
    let bench = Bench::new().await;
    let tree = Arc::new(Tree::new().file("one", noise(1, 200_000)).file("two", noise(2, 200_000)));
    let mut made = Vec::new();
    for n in 0..backups {
        tree.write("one", 0, &noise(10 + n, 20_000));
        made.push(bench.back_up(&tree, NOW_MS + 1_000 * n.cast_signed()).await.backup);
    }
    (bench, tree, made)
}

async fn mirror(bench: &Bench, store: Arc<dyn Store>) -> Mirror {
    let found = async |_: &dyn Store| Ok(Capabilities::default());
    let mut mirror =
        bench.repository.mirror(store, Unlock::KeyFile(&bench.key), false, found).await.unwrap();
    mirror.copy_lineage(bench.lineage).await.unwrap();
    mirror
}

/// Copies these into a directory, as a program does that has just been started.
async fn copy(bench: &Bench, place: &Path, backups: &[BackupId]) -> Vec<CopyOutcome> {
    let mut mirror = mirror(bench, at(place)).await;
    let mut outcomes = Vec::new();
    for backup in backups {
        outcomes.push(
            mirror.copy(bench.lineage, *backup, &copy_options(NOW_MS)).await.unwrap().outcome,
        );
    }
    outcomes
}

async fn open(bench: &Bench, place: &Path) -> Repository {
    Repository::open(at(place), Some(&bench.key)).await.unwrap()
}

/// What both sides have.
fn objects(root: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut objects = BTreeMap::new();
    for path in common::files_below(root) {
        let name = path.strip_prefix(root).unwrap().to_owned();
        if !(name.ends_with("intent") || name.ends_with("config") || name.starts_with("probe")) {
            objects.insert(name, std::fs::read(path).unwrap());
        }
    }
    objects
}

/// The packs of a directory, largest first.
fn packs(root: &Path) -> Vec<PathBuf> {
    let mut packs = common::files_below(root);
    packs.retain(|path| path.to_str().unwrap().contains("/packs/"));
    packs.sort_by_key(|path| std::cmp::Reverse(path.metadata().unwrap().len()));
    packs
}

fn flip(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(path, bytes).unwrap();
}

/// Damage of every kind at the target is seen by the next copy, or by a check and then by it, and is repaired.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_brings_back_what_is_damaged_at_its_target() {
    use CopyOutcome::{Copied, Present, Repaired};
    let (bench, tree, mut backups) = source(2).await;
    let place = tempfile::tempdir().unwrap();
    let place = place.path();
    assert_eq!(copy(&bench, place, &backups).await, [Copied, Copied]);
    let whole = objects(&bench.store_path());
    let manifest =
        place.join(format!("lineages/{}/backups/{}/manifest", bench.lineage, backups[1]));
    let spoil: [fn(&Path); 3] = [
        flip,
        |path| std::fs::write(path, "").unwrap(),
        |path| std::fs::remove_file(path).unwrap(),
    ];
    for spoil in spoil {
        spoil(&manifest);
        assert_eq!(copy(&bench, place, &backups).await, [Present, Repaired]);
        assert!(objects(place) == whole);
    }

    // Rot in file content is found by a check, which marks it.
    flip(&packs(place)[0]);
    let mut report = ScrubReport::default();
    let marking =
        ScrubOptions { mark: Some("tester".into()), ..ScrubOptions::new(CheckLevel::Read, NOW_MS) };
    open(&bench, place).await.scrub(&marking, &mut report).await.unwrap();
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    let repaired = copy(&bench, place, &backups).await;
    assert!(repaired.contains(&Repaired), "{repaired:?}");
    assert!(objects(place) == whole, "the mark is gone, too");

    // Metadata that a new backup shares is read before the backup is one of the target.
    for pack in packs(place) {
        if std::fs::read(&pack).unwrap()[9] == 2 {
            flip(&pack);
        }
    }
    tree.write("two", 0, &noise(99, 10_000));
    backups.push(bench.back_up(&tree, NOW_MS + 9_000).await.backup);
    assert_eq!(copy(&bench, place, &backups[2..]).await, [Copied]);
    let copied = open(&bench, place).await.open_backup(bench.lineage, backups[2]).await.unwrap();
    let mut restored = common::restore(&copied).await.unwrap();
    restored.retain(|path, _| path == b"one" || path == b"two");
    assert_eq!(restored, tree.expected());
}

/// A proof says something of the bytes that were restored: that of the source takes nothing back that was found at the target.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_proof_says_nothing_of_a_copy_elsewhere() {
    let (bench, _, backups) = source(3).await;
    let place = tempfile::tempdir().unwrap();
    copy(&bench, place.path(), &backups).await;
    let target = open(&bench, place.path()).await;
    let prove = async |repository: &Repository, backup: BackupId, outcome: &str| {
        let proof = serde_json::json!({
            "backup": backup, "lineage": bench.lineage, "cluster": "orders", "system_identifier": "7",
            "worker": "w", "at_ms": 1, "level_asked": "L4", "level_reached": "L4", "passed": outcome == "passed",
            "phases": [], "size_bytes": 1, "tables": 1, "rows": 1, "tables_exact": 0, "tables_bounded": 0,
            "checks": [{"name": "x", "level": "L4", "outcome": outcome, "detail": ""}],
        });
        let signed = serde_json::json!({ "payload": proof.to_string(), "signature": outcome });
        let bytes = Bytes::from(signed.to_string());
        repository.add_proof(bench.lineage, backup, bytes).await.unwrap();
    };
    prove(&target, backups[0], "passed").await;
    prove(&target, backups[1], "failed").await;
    prove(&bench.repository, backups[1], "passed").await;
    copy(&bench, place.path(), &backups).await;
    assert_eq!(target.list_proofs(bench.lineage, backups[1]).await.unwrap().len(), 1);
    let refused = target.forget(bench.lineage, backups[0], &wish()).await.unwrap_err();
    assert!(
        matches!(&refused, Error::Wanted { reason, .. } if reason.contains("newest one that was proved")),
        "{refused}"
    );
}

/// Two copies meet: before each call of one the other does all of its work, and the first one dies soon after. Nothing that
/// the other brought is missing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_dies_takes_nothing_away_that_another_brought() {
    let (bench, _, backups) = source(1).await;
    let bench = Arc::new(bench);
    for dies_after in 0..3 {
        for calls in 0.. {
            let place = tempfile::tempdir().unwrap();
            copy(&bench, place.path(), &backups).await;
            let cut = std::fs::File::options().write(true).open(&packs(place.path())[0]).unwrap();
            cut.set_len(100).unwrap();
            let store = Arc::new(Interrupted::new(place.path()));
            let mut slow = mirror(&bench, Arc::<Interrupted>::clone(&store) as _).await;
            let had_its_turn = Arc::new(AtomicBool::new(false));
            let turn: Turn = Box::pin({
                let (store, bench, backups) = (store.clone(), bench.clone(), backups.clone());
                let (place, had_its_turn) = (place.path().to_owned(), had_its_turn.clone());
                async move {
                    // The compiler does not see that a copy may change its thread, as a turn may.
                    let copied = copy(&bench, &place, &backups);
                    tokio::task::block_in_place(|| Handle::current().block_on(copied));
                    had_its_turn.store(true, Ordering::SeqCst);
                    store.after(dies_after, None);
                }
            });
            store.after(calls, Some(turn));
            let _ = slow.copy(bench.lineage, backups[0], &copy_options(NOW_MS)).await;
            assert!(objects(place.path()) == objects(&bench.store_path()), "{calls}, {dies_after}");
            if !had_its_turn.load(Ordering::SeqCst) {
                assert!(calls > 5, "{calls}");
                break;
            }
        }
    }
}

/// A copy that was killed is aborted at the target like a dead backup. The next copies say so, and go on with the others.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_was_aborted_at_its_target_is_told_and_fails_no_other() {
    let (bench, _, backups) = source(2).await;
    let place = tempfile::tempdir().unwrap();
    let store = Arc::new(Interrupted::new(place.path()));
    let mut dies = mirror(&bench, Arc::<Interrupted>::clone(&store) as _).await;
    store.after(5, None);
    dies.copy(bench.lineage, backups[0], &copy_options(NOW_MS)).await.unwrap_err();
    assert!(!store.is_left(), "it died there");
    let target = open(&bench, place.path()).await;
    target
        .abort(bench.lineage, backups[0].into(), "a collector", "it was old", NOW_MS)
        .await
        .unwrap();
    for second in [CopyOutcome::Copied, CopyOutcome::Present] {
        let outcomes = copy(&bench, place.path(), &backups).await;
        assert_eq!(outcomes, [CopyOutcome::Aborted, second]);
    }
}

/// Whether a mirror is for one program at a time follows from its own store.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_is_for_a_single_writer_when_its_own_store_needs_that() {
    let (bench, _, backups) = source(1).await;
    let mut repository = bench.repository.clone();
    for single_writer in [true, false] {
        let place = tempfile::tempdir().unwrap().keep();
        let found = async |_: &dyn Store| Ok(Capabilities::default());
        let unlock = Unlock::KeyFile(&bench.key);
        let mut made = repository.mirror(at(&place), unlock, single_writer, found).await.unwrap();
        made.copy_lineage(bench.lineage).await.unwrap();
        let copied = made.copy(bench.lineage, backups[0], &copy_options(NOW_MS)).await.unwrap();
        assert_eq!(copied.outcome, CopyOutcome::Copied);
        assert_eq!(made.target().is_single_writer(), single_writer);
        repository = open(&bench, &place).await;
        assert_eq!(repository.is_single_writer(), single_writer);
    }
}
