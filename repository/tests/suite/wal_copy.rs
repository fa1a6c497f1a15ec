//! The WAL archive in a second store: the same objects, never a gap that the source does not have, whoever is interrupted
//! wherever, whatever is damaged.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use crate::common::{
    self, Bench, DAY_MS, NOW_MS, collect_options, copy_options, segment, wal_name,
};
use crate::interrupted::{Interrupted, Turn};
use async_trait::async_trait;
use bytes::Bytes;
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::probe::Capabilities;
use repository::store::{Listed, Store, StoreError};
use repository::{
    CollectOptions, Collected, Error, Mirror, Repository, Unlock, WalAbsence, WalAmount,
    WalCopySummary, Wish,
};

const LATER_MS: i64 = NOW_MS + 5 * DAY_MS;

fn at(place: &Path) -> Arc<dyn Store> {
    Arc::new(DirectoryStore::new(place))
}

async fn mirror(bench: &Bench, store: Arc<dyn Store>) -> Result<Mirror, Error> {
    let found = async |_: &dyn Store| Ok(Capabilities::default());
    bench.repository.mirror(store, Unlock::KeyFile(&bench.key), false, found).await
}

async fn copy(bench: &Bench, store: Arc<dyn Store>) -> Result<WalCopySummary, Error> {
    mirror(bench, store).await?.copy_wal(bench.lineage, &copy_options(LATER_MS)).await
}

/// Copies backups and WAL.
async fn copy_all(bench: &Bench, place: &Path) -> WalCopySummary {
    let mut mirror = mirror(bench, at(place)).await.unwrap();
    mirror.copy_lineage(bench.lineage).await.unwrap();
    for summary in bench.repository.list_backups(bench.lineage).await.unwrap() {
        mirror
            .copy(bench.lineage, summary.backup().unwrap(), &copy_options(LATER_MS))
            .await
            .unwrap();
    }
    mirror.copy_wal(bench.lineage, &copy_options(LATER_MS)).await.unwrap()
}

async fn open(bench: &Bench, place: &Path) -> Repository {
    Repository::open(at(place), Some(&bench.key)).await.unwrap()
}

fn archive_of(bench: &Bench, root: &Path) -> PathBuf {
    root.join(format!("lineages/{}/wal", bench.lineage))
}

/// The archive below a repository, by names; what says what was collected left out.
fn objects(bench: &Bench, root: &Path) -> BTreeMap<String, Vec<u8>> {
    let root = archive_of(bench, root);
    if !root.exists() {
        return BTreeMap::new();
    }
    let files = common::files_below(&root).into_iter();
    let named =
        files.map(|path| (path.strip_prefix(&root).unwrap().to_str().unwrap().to_owned(), path));
    let archived = named.filter(|(name, _)| !name.starts_with("floor/"));
    archived.map(|(name, path)| (name, std::fs::read(path).unwrap())).collect()
}

async fn serves(bench: &Bench, repository: &Repository, timeline: u32, number: u64) -> bool {
    let file = wal_name(timeline, number).parse().unwrap();
    let there = repository.fetch_wal(bench.lineage, &file).await.unwrap();
    there.is_some_and(|content| content == segment(timeline, number))
}

/// A line over two timelines, and everything else that an archive can have.
async fn some_wal(bench: &Bench) {
    bench.archive(1, 3..=7).await;
    bench.archive(2, 6..=9).await;
    let history = "1\t0/680000\tno recovery target specified\n";
    bench.archive_one("00000002.history", history.into()).await.unwrap();
    bench.archive_one(&wal_name(1, 4), segment(9, 4)).await.unwrap_err();
    bench.archive_one(&format!("{}.00000028.backup", wal_name(1, 5)), "x".into()).await.unwrap();
    bench.archive_one(&format!("{}.partial", wal_name(1, 6)), segment(1, 6)).await.unwrap();
}

async fn forget(repository: &Repository, bench: &Bench, backup: proto::BackupId) {
    let wish = Wish { by: "tester".into(), why: String::new(), at_ms: NOW_MS };
    repository.forget(bench.lineage, backup, &wish).await.unwrap();
}

async fn collect(repository: &Repository, bench: &Bench) -> Collected {
    let how = CollectOptions { patience_ms: None, ..collect_options(LATER_MS) };
    let plan = repository.plan_collection(bench.lineage, &how).await.unwrap();
    plan.collect(&how).await.unwrap()
}

#[tokio::test]
async fn a_copied_archive_has_the_same_objects_and_serves_every_file() {
    let bench = Bench::new().await;
    let place = tempfile::tempdir().unwrap();
    // An archive that is empty is none at the mirror either.
    assert_eq!(copy(&bench, at(place.path())).await.unwrap(), WalCopySummary::default());
    some_wal(&bench).await;
    let source = objects(&bench, &bench.store_path());
    let all = WalAmount {
        files: source.len() as u64,
        bytes: source.values().map(|bytes| bytes.len() as u64).sum(),
    };
    let first = copy(&bench, at(place.path())).await.unwrap();
    assert_eq!(first, WalCopySummary { sent: all, ..WalCopySummary::default() });
    assert!(objects(&bench, place.path()) == source, "the same bytes");
    let there = open(&bench, place.path()).await;
    for (timeline, numbers) in [(1, 3..=7), (2, 6..=9)] {
        for number in numbers {
            assert!(serves(&bench, &there, timeline, number).await);
        }
    }
    let inventory =
        |repository: Repository| async move { repository.list_wal(bench.lineage).await.unwrap() };
    assert_eq!(inventory(there).await, inventory(bench.repository.clone()).await);

    // Twice is nothing; what comes later follows.
    let again = copy(&bench, at(place.path())).await.unwrap();
    assert_eq!(again, WalCopySummary { present: all, ..WalCopySummary::default() });
    bench.archive(2, 10..=10).await;
    let later = copy(&bench, at(place.path())).await.unwrap();
    assert_eq!((later.sent.files, later.present), (1, all));
}

/// A copy dies at each call of its target, in turn, and is repeated. At no moment has the target a gap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_of_wal_that_dies_anywhere_leaves_no_gap_and_is_taken_up() {
    let bench = Bench::new().await;
    some_wal(&bench).await;
    let source = objects(&bench, &bench.store_path());
    let mut calls = 0;
    loop {
        let place = tempfile::tempdir().unwrap();
        let store = Arc::new(Interrupted::new(place.path()));
        store.after(calls, None);
        let ended = copy(&bench, Arc::<Interrupted>::clone(&store) as _).await;
        let finished = store.is_left();
        store.after(-1, None);
        assert_eq!(ended.is_ok(), finished, "{calls}: {ended:?}");
        let there = objects(&bench, place.path());
        if !there.is_empty() {
            let repository = open(&bench, place.path()).await;
            let inventory = repository.list_wal(bench.lineage).await.unwrap();
            assert_eq!((inventory.gaps(), inventory.damaged), (vec![], vec![]), "{calls} calls");
            // The line begins where it does at the source; a timeline never without the one before, nor its history.
            assert!(serves(&bench, &repository, 1, 3).await, "{calls} calls");
            let second = there.keys().any(|name| name.starts_with("00000002/"));
            let first = source.keys().filter(|name| !name.starts_with("00000002/"));
            assert!(!second || first.clone().all(|name| there.contains_key(name)), "{calls}");
            assert!(!second || there.contains_key("00000002/00000002.history"), "{calls}");
        }
        copy(&bench, at(place.path())).await.unwrap();
        assert!(objects(&bench, place.path()) == source, "after {calls} calls");
        if finished {
            assert!(calls > 20, "it was interrupted at {calls} places only");
            return;
        }
        calls += 1;
    }
}

#[tokio::test]
async fn other_content_at_the_mirror_is_told_stays_and_hinders_nothing() {
    let bench = Bench::new().await;
    some_wal(&bench).await;
    let place = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
    mirror.copy_lineage(bench.lineage).await.unwrap();
    let there = open(&bench, place.path()).await;
    let file = wal_name(1, 5).parse().unwrap();
    // As long as the one of the source, once it is sealed.
    there.store_wal(bench.lineage, &file, segment(8, 5)).await.unwrap();
    let name = format!("00000001/{}", wal_name(1, 5));
    let sealed = |root: &Path| std::fs::read(archive_of(&bench, root).join(&name)).unwrap();
    assert_eq!(sealed(place.path()).len(), sealed(&bench.store_path()).len());
    let all = objects(&bench, &bench.store_path()).len() as u64;
    for _ in 0..2 {
        let copied = copy(&bench, at(place.path())).await.unwrap();
        assert_eq!(copied.conflicts, [name.as_str()]);
        assert_eq!(copied.sent.files + copied.present.files, all - 1);
        assert_eq!(there.fetch_wal(bench.lineage, &file).await.unwrap(), Some(segment(8, 5)));
    }
    // The same content that was sealed by somebody else is no conflict.
    let same = wal_name(2, 9).parse().unwrap();
    std::fs::remove_file(archive_of(&bench, place.path()).join(format!("00000002/{same}")))
        .unwrap();
    there.store_wal(bench.lineage, &same, segment(2, 9)).await.unwrap();
    let copied = copy(&bench, at(place.path())).await.unwrap();
    assert_eq!((copied.conflicts.len(), copied.present.files), (1, all - 1));
}

#[tokio::test]
async fn damage_at_the_source_is_told_and_not_copied_and_at_the_mirror_it_is_repaired() {
    let bench = Bench::new().await;
    some_wal(&bench).await;
    let place = tempfile::tempdir().unwrap();
    let name = format!("00000001/{}", wal_name(1, 4));
    let bad = archive_of(&bench, &bench.store_path()).join(&name);
    let whole = std::fs::read(&bad).unwrap();
    let all = objects(&bench, &bench.store_path()).len() as u64;
    let damages = |whole: &[u8]| {
        let flipped = |at: usize| {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 1;
            bytes
        };
        // In its header, its head, its content and its trailer; cut; emptied; another file's.
        let other =
            archive_of(&bench, &bench.store_path()).join(format!("00000001/{}", wal_name(1, 3)));
        vec![
            flipped(70),
            flipped(160),
            flipped(whole.len() - 100),
            flipped(whole.len() - 1),
            whole[..whole.len() - 1].to_vec(),
            whole[..150].to_vec(),
            Vec::new(),
            std::fs::read(other).unwrap(),
        ]
    };
    for bytes in damages(&whole) {
        std::fs::write(&bad, bytes).unwrap();
        let copied = copy(&bench, at(place.path())).await.unwrap();
        let [(told, _)] = &copied.damaged[..] else { panic!("{copied:?}") };
        assert_eq!((told, copied.sent.files + copied.present.files), (&name, all - 1));
        assert!(!archive_of(&bench, place.path()).join(&name).exists());
    }
    std::fs::write(&bad, &whole).unwrap();
    copy(&bench, at(place.path())).await.unwrap();
    let theirs = archive_of(&bench, place.path()).join(&name);
    let mut repaired = 0;
    for bytes in damages(&whole) {
        std::fs::write(&theirs, &bytes).unwrap();
        let copied = copy(&bench, at(place.path())).await.unwrap();
        assert_eq!((copied.conflicts.len(), copied.damaged.len()), (0, 0));
        repaired += copied.sent.files;
        // What has its size and a sound beginning is seen by checks, which read it whole.
        if copied.sent.files == 0 {
            assert_eq!(bytes.len(), whole.len());
            std::fs::write(&theirs, &whole).unwrap();
        }
        assert_eq!(std::fs::read(&theirs).unwrap(), whole);
    }
    assert_eq!(repaired, 6);
}

#[tokio::test]
async fn what_was_collected_on_either_side_is_neither_brought_back_nor_taken_for_the_end() {
    let bench = Bench::new().await;
    bench.archive(1, 3..=6).await;
    bench.archive(2, 7..=12).await;
    let oldest = bench.back_up_from(1, 3, NOW_MS).await;
    let older = bench.back_up_from(2, 8, NOW_MS + 1_000).await;
    let third = bench.back_up_from(2, 10, NOW_MS + 2_000).await;
    let place = tempfile::tempdir().unwrap();
    assert_eq!(copy_all(&bench, place.path()).await.sent.files, 10);
    let there = open(&bench, place.path()).await;

    // The mirror keeps fewer backups than its source.
    forget(&there, &bench, oldest.backup).await;
    assert!(matches!(collect(&there, &bench).await, Collected::Done(done) if done.wal.files == 5));
    let copied = copy_all(&bench, place.path()).await;
    assert_eq!((copied.needless.files, copied.sent.files, copied.present.files), (5, 0, 5));

    // A backup that needs it comes back (as one under a new name would): so does its WAL.
    let again = bench.back_up_from(2, 7, NOW_MS + 3_000).await;
    let copied = copy_all(&bench, place.path()).await;
    assert_eq!((copied.needless.files, copied.sent.files), (4, 1));
    assert!(serves(&bench, &there, 2, 7).await);

    // The source keeps fewer than its mirror.
    bench.back_up_from(2, 10, NOW_MS + 4_000).await;
    for backup in [oldest, older, third, again] {
        forget(&bench.repository, &bench, backup.backup).await;
    }
    let source = collect(&bench.repository, &bench).await;
    assert!(matches!(source, Collected::Done(done) if done.wal.files == 7));
    let copied = copy_all(&bench, place.path()).await;
    assert_eq!((copied.sent.files, copied.present.files, copied.needless.files), (0, 3, 0));
    assert!(serves(&bench, &there, 2, 8).await, "the mirror's own backup needs it");

    // A new mirror, which never had the first timeline, does not take it for ended.
    let new = tempfile::tempdir().unwrap();
    assert_eq!(copy_all(&bench, new.path()).await.sent.files, 3);
    let new = open(&bench, new.path()).await;
    let asked = wal_name(1, 5).parse().unwrap();
    let absence = new.wal_absence(bench.lineage, asked).await.unwrap();
    assert_eq!(absence, WalAbsence::Collected { below: wal_name(1, 7).parse().unwrap() });
}

/// A store that lists a file which is not there, and stores other content under its name once somebody has looked.
#[derive(Debug)]
struct Late {
    inner: DirectoryStore,
    key: String,
    other: Mutex<Option<Bytes>>,
}

#[async_trait]
impl Layer for Late {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let mut listed = self.inner.list(prefix).await?;
        if self.key.starts_with(prefix) && self.other.lock().unwrap().is_some() {
            listed.push(Listed { key: self.key.clone(), size_bytes: 1 });
        }
        Ok(listed)
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let other = if key == self.key { self.other.lock().unwrap().take() } else { None };
        let got = self.inner.get_range(key, range).await;
        if let Some(other) = other {
            self.inner.put(key, other).await?;
        }
        got
    }
}

/// A file that is listed at the mirror and gone when it is compared may be there again, with other content, when it is sent.
#[tokio::test]
async fn only_what_no_reader_accepts_is_replaced_at_the_mirror() {
    let bench = Bench::new().await;
    some_wal(&bench).await;
    let place = tempfile::tempdir().unwrap();
    let asked = wal_name(1, 5).parse().unwrap();
    let other = {
        let elsewhere = tempfile::tempdir().unwrap();
        let mut mirror = mirror(&bench, at(elsewhere.path())).await.unwrap();
        mirror.copy_lineage(bench.lineage).await.unwrap();
        mirror.target().store_wal(bench.lineage, &asked, segment(8, 5)).await.unwrap();
        let name = format!("00000001/{asked}");
        std::fs::read(archive_of(&bench, elsewhere.path()).join(name)).unwrap()
    };
    let key = format!("lineages/{}/wal/00000001/{asked}", bench.lineage);
    let other = Mutex::new(Some(other.into()));
    let late = Arc::new(Late { inner: DirectoryStore::new(place.path()), key, other });
    let copied = copy(&bench, late).await.unwrap();
    assert_eq!(copied.conflicts, [format!("00000001/{asked}")]);
    let there = open(&bench, place.path()).await;
    assert_eq!(there.fetch_wal(bench.lineage, &asked).await.unwrap(), Some(segment(8, 5)));
}

/// Before each call that a copy makes at its source, a collection there does all of its work.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_at_the_source_at_any_call_of_a_copy_harms_no_backup_of_the_mirror() {
    let mut calls = 0;
    loop {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(Interrupted::new(&directory.path().join("repository")));
        let bench = Bench::over(directory, Arc::<Interrupted>::clone(&store)).await;
        bench.archive(1, 3..=8).await;
        bench.back_up_from(1, 6, NOW_MS).await;
        let other = bench.beside().await;
        let turn: Turn = Box::pin(async move {
            let ended = collect(&other.repository, &other).await;
            assert!(matches!(ended, Collected::Done(done) if done.wal.files == 3));
        });
        let place = tempfile::tempdir().unwrap();
        let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
        store.after(calls, Some(turn));
        let copied = mirror.copy_wal(bench.lineage, &copy_options(LATER_MS)).await.unwrap();
        let finished = store.is_left();
        store.after(-1, None);
        assert_eq!((copied.damaged.len(), copied.conflicts.len()), (0, 0), "{calls}");
        let there = open(&bench, place.path()).await;
        for number in 6..=8 {
            assert!(serves(&bench, &there, 1, number).await, "{calls}: {number}");
        }
        if finished {
            assert!(calls > 7, "it had a turn at {calls} places only");
            return;
        }
        calls += 1;
    }
}

#[tokio::test]
async fn a_cancelled_copy_of_wal_ends_between_two_files() {
    let bench = Bench::new().await;
    some_wal(&bench).await;
    let place = tempfile::tempdir().unwrap();
    let mut mirror = mirror(&bench, at(place.path())).await.unwrap();
    let how = copy_options(LATER_MS);
    how.cancel.cancel();
    let ended = mirror.copy_wal(bench.lineage, &how).await.unwrap_err();
    assert!(matches!(ended, Error::Cancelled), "{ended}");
    assert!(objects(&bench, place.path()).is_empty());
}
