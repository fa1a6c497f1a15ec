//! What an interrupted backup had stored is taken over by the next one, as far as the files are still the same, whoever
//! collects garbage meanwhile and whatever of it is damaged.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::io::{self, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{self, Bench, DAY_MS, NOW_MS, SharedTree, Tree, collect_options, facts, noise};
use crate::interrupted::{Interrupted, Turn};
use async_trait::async_trait;
use bytes::Bytes;
use futures::TryStreamExt as _;
use proto::{AttemptId, LineageId, SystemIdentifier};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Listed, Store, StoreError, Upload};
use repository::{
    BackupSummary, CheckOptions, CollectOptions, Collected, Error, Progress, Repository, Source,
    SourceEntry, SourceFile, WriteOptions,
};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

const MIB: u64 = 1 << 20;
const HOUR_MS: i64 = 3_600_000;

/// What a store was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Asked {
    List(String),
    Stored(String, u64),
    Deleted(String),
}

/// A store that writes down what it is asked for, and refuses names that end so, and reads of some objects.
#[derive(Debug)]
struct Watched {
    inner: Arc<dyn Store>,
    asked: Arc<Mutex<Vec<Asked>>>,
    refused: Mutex<Option<&'static str>>,
    /// Ends of keys.
    unreadable: Mutex<Vec<String>>,
    /// How many small objects were put or deleted: whoever looks while one goes may see less than before and after.
    changes: watch::Sender<u64>,
}

impl Watched {
    fn over(path: &Path) -> Arc<Self> {
        let inner = Arc::new(DirectoryStore::new(path));
        let (unreadable, changes) = (Mutex::default(), watch::Sender::default());
        Arc::new(Self {
            inner,
            asked: Arc::default(),
            refused: Mutex::default(),
            unreadable,
            changes,
        })
    }

    fn may_read(&self, key: &str) -> Result<(), StoreError> {
        if self.unreadable.lock().unwrap().iter().any(|end| key.ends_with(end)) {
            let (key, source) = (key.to_owned(), "it is another's".into());
            return Err(StoreError::Forbidden { operation: "get", key, source });
        }
        Ok(())
    }

    fn refuse(&self, end: Option<&'static str>) {
        *self.refused.lock().unwrap() = end;
    }

    fn take(&self) -> Vec<Asked> {
        std::mem::take(&mut *self.asked.lock().unwrap())
    }
}

#[async_trait]
impl Layer for Watched {
    fn inner(&self) -> &dyn Store {
        self.inner.as_ref()
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.may_read(key)?;
        self.inner.get(key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.may_read(key)?;
        self.inner.get_range(key, range).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.asked.lock().unwrap().push(Asked::List(prefix.to_owned()));
        self.inner.list(prefix).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        if self.refused.lock().unwrap().is_some_and(|end| key.ends_with(end)) {
            let source = "it died".into();
            return Err(StoreError::Unavailable { operation: "put", key: key.into(), source });
        }
        let length = bytes.len() as u64;
        self.inner.put(key, bytes).await?;
        self.asked.lock().unwrap().push(Asked::Stored(key.to_owned(), length));
        self.changes.send_modify(|changes| *changes += 1);
        Ok(())
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        let (inner, asked) = (self.inner.upload(key).await?, Arc::clone(&self.asked));
        Ok(Box::new(WatchedUpload { inner, asked, key: key.to_owned(), bytes: 0 }))
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.asked.lock().unwrap().push(Asked::Deleted(key.to_owned()));
        self.inner.delete(key).await?;
        self.changes.send_modify(|changes| *changes += 1);
        Ok(())
    }
}

struct WatchedUpload {
    inner: Box<dyn Upload>,
    asked: Arc<Mutex<Vec<Asked>>>,
    key: String,
    bytes: u64,
}

#[async_trait]
impl Upload for WatchedUpload {
    async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.bytes += bytes.len() as u64;
        self.inner.part(bytes).await
    }
    async fn complete(self: Box<Self>) -> Result<(), StoreError> {
        self.inner.complete().await?;
        self.asked.lock().unwrap().push(Asked::Stored(self.key, self.bytes));
        Ok(())
    }
    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        self.inner.abort().await
    }
}

/// What checkpoints tell of, as whoever collects garbage sees it.
struct Checkpoints {
    repository: Repository,
    lineage: LineageId,
    runtime: Handle,
    /// To wait for.
    bytes: u64,
    changes: watch::Receiver<u64>,
}

impl Checkpoints {
    async fn tell_of(repository: &Repository, lineage: LineageId) -> u64 {
        let plan = repository.plan_collection(lineage, &collect_options(NOW_MS)).await;
        plan.unwrap().left_behind.bytes
    }

    /// Those of this house, when they tell of so much more than now.
    async fn of(house: &House, more_bytes: u64) -> Self {
        let (repository, lineage) = (house.repository().clone(), house.bench.lineage);
        let bytes = Self::tell_of(&repository, lineage).await + more_bytes;
        let changes = house.store.changes.subscribe();
        Self { repository, lineage, runtime: Handle::current(), bytes, changes }
    }

    /// On a thread of a copy.
    fn wait(&self) {
        let mut changes = self.changes.clone();
        let told = async {
            while Self::tell_of(&self.repository, self.lineage).await < self.bytes {
                changes.changed().await.unwrap();
            }
        };
        let told = async { tokio::time::timeout(Duration::from_mins(1), told).await };
        self.runtime.block_on(told).expect("checkpoints tell of so much within a minute");
    }
}

/// A tree whose reader fails at a file, once checkpoints tell of what was stored before it.
struct FailsAt {
    tree: SharedTree,
    path: &'static [u8],
    checkpoints: Checkpoints,
}

impl Source for FailsAt {
    fn open(&self, entry: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        if entry.path != self.path {
            return self.tree.open(entry);
        }
        self.checkpoints.wait();
        Err(io::Error::other("the disk is gone"))
    }
}

/// As often as there is something new, and small packs.
fn eager() -> WriteOptions {
    WriteOptions {
        processes: 1,
        continuity: Some("here".into()),
        checkpoint_every: Duration::ZERO,
        pack_bytes: MIB,
        ..WriteOptions::default()
    }
}

/// A backup that was made, and what it took.
struct Made {
    summary: BackupSummary,
    taken_over: u64,
    /// Bytes of packs that were sent.
    sent: u64,
    asked: Vec<Asked>,
}

struct House {
    store: Arc<Watched>,
    bench: Bench,
}

impl House {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Watched::over(&directory.path().join("repository"));
        let bench = Bench::over(directory, Arc::<Watched>::clone(&store)).await;
        Self { store, bench }
    }

    fn repository(&self) -> &Repository {
        &self.bench.repository
    }

    async fn abort(&self, attempt: AttemptId) {
        let (repository, lineage) = (self.repository(), self.bench.lineage);
        repository.abort(lineage, attempt, "tester", "it died", NOW_MS).await.unwrap();
    }

    /// A backup that ends when all but its manifest is stored.
    async fn ends_before_its_manifest(&self, tree: &Arc<Tree>, at_ms: i64) -> AttemptId {
        self.store.refuse(Some("/manifest"));
        let intent = self.bench.intent(at_ms);
        let attempt = intent.attempt;
        let (repository, lineage) = (self.repository(), self.bench.lineage);
        let ended = common::back_up(repository, lineage, intent, tree, eager()).await;
        assert!(matches!(ended, Err(Error::Store(_))), "{ended:?}");
        self.store.refuse(None);
        self.abort(attempt).await;
        attempt
    }

    /// A backup whose source fails at a file, when so much is stored and written down.
    async fn ends_at(
        &self,
        tree: &Arc<Tree>,
        path: &'static str,
        bytes: u64,
        at_ms: i64,
    ) -> AttemptId {
        let checkpoints = Checkpoints::of(self, bytes).await;
        let attempt = self.bench.begin(at_ms).await;
        let id = attempt.id();
        let mut writer = attempt.write(eager()).unwrap();
        let shared = SharedTree(Arc::clone(tree));
        let source = FailsAt { tree: shared, path: path.as_bytes(), checkpoints };
        let ended = writer.copy(Arc::new(source), tree.entries().into_iter().map(Ok)).await;
        assert!(matches!(ended, Err(Error::Source { .. })), "{ended:?}");
        self.abort(id).await;
        id
    }

    async fn back_up(&self, tree: &Arc<Tree>, at_ms: i64) -> Made {
        self.store.take();
        let progress = Arc::new(Progress::default());
        let options = WriteOptions { progress: Arc::clone(&progress), ..eager() };
        let summary = self.bench.back_up_with(tree, at_ms, options).await.unwrap();
        let taken_over = progress.snapshot().bytes_taken_over;
        let asked = self.store.take();
        let sent = asked.iter().map(|asked| match asked {
            Asked::Stored(key, bytes) if key.contains("/packs/") => *bytes,
            _ => 0,
        });
        Made { summary, taken_over, sent: sent.sum(), asked }
    }

    async fn is_right(&self, made: &Made, tree: &Tree) {
        assert!(self.bench.restore(&made.summary).await == tree.expected(), "another content");
        let backup = self.bench.open(&made.summary).await;
        let found = backup.check_decrypt(CheckOptions::default()).await.unwrap();
        assert!(found.is_sound(), "{found:?}");
    }

    async fn collect(&self, now_ms: i64) -> Collected {
        let options = collect_options(now_ms);
        let plan = self.repository().plan_collection(self.bench.lineage, &options).await.unwrap();
        plan.collect(&options).await.unwrap()
    }

    async fn checkpoints(&self) -> Vec<String> {
        let prefix = format!("lineages/{}/backups/", self.bench.lineage);
        let listed = self.repository().store().list(&prefix).await.unwrap();
        let keys = listed.into_iter().map(|object| object.key);
        keys.filter(|key| key.contains("/checkpoint.")).collect()
    }

    /// After a backup, one collection is enough for everything that is left of those that were interrupted.
    async fn nothing_is_left(&self, now_ms: i64) {
        self.collect(now_ms).await;
        let options = collect_options(now_ms);
        let plan = self.repository().plan_collection(self.bench.lineage, &options).await.unwrap();
        assert_eq!((plan.delete.packs, plan.left_behind.packs), (0, 0));
        assert_eq!(self.checkpoints().await, [""; 0]);
    }
}

/// Three large files of 3, 3 and 5 MiB in that order and a small one between the last two.
fn tree() -> Arc<Tree> {
    let tree = Tree::new().file("a", noise(1, 3 << 20)).file("b", noise(2, 3 << 20));
    Arc::new(tree.file("c", noise(3, 64 << 10)).file("d", noise(4, 5 << 20)))
}

const TREE: u64 = 11 * MIB + (64 << 10);
/// More than all metadata, WAL and late files of such a backup.
const SMALL: u64 = 400 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_backup_that_broke_off_in_the_middle_only_the_rest_is_stored() {
    let house = House::new().await;
    let tree = tree();
    // 5 MiB are in packs by then; of the second file two thirds, which stand in a shard of their own.
    let dead = house.ends_at(&tree, "c", 5 * MIB, NOW_MS).await;
    assert_eq!(house.bench.begin(NOW_MS + 1).await.goes_on_from(), [dead]);
    let made = house.back_up(&tree, NOW_MS + HOUR_MS).await;
    assert_eq!((made.taken_over, made.summary.packs_reused), (5 * MIB, 5));
    let rest = TREE - 5 * MIB;
    assert!((rest..rest + SMALL).contains(&made.sent), "{} of {rest} bytes", made.sent);
    house.is_right(&made, &tree).await;
    // Its own checkpoints are gone, and those of the dead one at the next collection.
    assert!(house.checkpoints().await.iter().all(|key| key.contains(&dead.to_string())));
    house.nothing_is_left(NOW_MS + 4 * DAY_MS).await;
    house.is_right(&made, &tree).await;
}

/// A source that also waits at a file before.
struct WaitsAt {
    path: &'static [u8],
    checkpoints: Checkpoints,
    then: FailsAt,
}

impl Source for WaitsAt {
    fn open(&self, entry: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        if entry.path == self.path {
            self.checkpoints.wait();
        }
        self.then.open(entry)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_checkpoint_is_left_also_when_another_could_not_be_stored() {
    let house = House::new().await;
    let tree = tree();
    tree.put("e", noise(5, 64 << 10), Some(8192));
    house.store.refuse(Some("/checkpoint.2"));
    let attempt = house.bench.begin(NOW_MS).await;
    let id = attempt.id();
    let mut writer = attempt.write(eager()).unwrap();
    let source = WaitsAt {
        path: b"b",
        checkpoints: Checkpoints::of(&house, 2 * MIB).await,
        then: FailsAt {
            tree: SharedTree(Arc::clone(&tree)),
            path: b"e",
            checkpoints: Checkpoints::of(&house, 8 * MIB).await,
        },
    };
    let ended = writer.copy(Arc::new(source), tree.entries().into_iter().map(Ok)).await;
    assert!(matches!(ended, Err(Error::Source { .. })), "{ended:?}");
    let left = house.checkpoints().await;
    assert!(left.len() == 1 && !left[0].ends_with("/checkpoint.1"), "{left:?}");
    house.store.refuse(None);
    house.abort(id).await;
    let made = house.back_up(&tree, NOW_MS + HOUR_MS).await;
    assert!(made.taken_over >= 8 * MIB, "{}", made.taken_over);
    house.is_right(&made, &tree).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_taken_over_is_read_and_never_believed_for_its_times() {
    let house = House::new().await;
    let tree = tree();
    let first = house.back_up(&tree, NOW_MS).await;
    assert_eq!(first.taken_over, 0);
    // The interrupted backup has seen the second content of two files; the third of one came without a trace in its times.
    tree.write("a", 0, &noise(11, 3 << 20));
    tree.write("d", 0, &noise(12, 5 << 20));
    house.ends_before_its_manifest(&tree, NOW_MS + 1000).await;
    tree.change("a", |file| file.content[..8192].copy_from_slice(&noise(13, 8192)));
    let next = house.back_up(&tree, NOW_MS + 2000).await;
    assert_eq!(next.summary.predecessor, Some(first.summary.backup));
    assert_eq!(next.taken_over, 8 * MIB - 8192, "all but the page that changed");
    assert!(next.sent < SMALL, "{}", next.sent);
    house.is_right(&next, &tree).await;
    // What changed is stored from then on, as of any backup: a third one has nothing to store.
    let third = house.back_up(&tree, NOW_MS + 3000).await;
    assert_eq!((third.taken_over, third.summary.predecessor), (0, Some(next.summary.backup)));
    house.is_right(&third, &tree).await;
    house.nothing_is_left(NOW_MS + 4 * DAY_MS).await;
    house.is_right(&third, &tree).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_several_interrupted_backups_the_one_that_got_furthest_counts_first_and_they_add_up() {
    let house = House::new().await;
    let tree = tree();
    let far = house.ends_before_its_manifest(&tree, NOW_MS).await;
    // A later one gets less far than what it takes over.
    tree.write("a", 0, &noise(11, 3 << 20));
    let short = house.ends_at(&tree, "b", 2 * MIB, NOW_MS + 1000).await;
    assert_eq!(house.bench.begin(NOW_MS + 1500).await.goes_on_from(), [far, short]);
    // One that gets further has what it took over and what it stored.
    let further = house.ends_before_its_manifest(&tree, NOW_MS + 2000).await;
    assert!(house.bench.begin(NOW_MS + 2500).await.goes_on_from().contains(&further));
    let made = house.back_up(&tree, NOW_MS + 3000).await;
    assert_eq!(made.taken_over, TREE);
    assert!(made.sent < SMALL, "{}", made.sent);
    house.is_right(&made, &tree).await;
    house.nothing_is_left(NOW_MS + 4 * DAY_MS).await;
    house.is_right(&made, &tree).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_shorter_attempt_stored_is_taken_over_beside_what_the_farther_one_had() {
    let house = House::new().await;
    let tree = tree();
    let far = house.ends_before_its_manifest(&tree, NOW_MS).await;
    // It stores the first file anew, takes over the second, and dies before the last.
    tree.write("a", 0, &noise(11, 3 << 20));
    let short = house.ends_at(&tree, "d", 2 * MIB, NOW_MS + 1000).await;
    assert_eq!(house.bench.begin(NOW_MS + 1500).await.goes_on_from(), [far, short]);
    // So does one that dies as well, and its checkpoint names what it has of both.
    let other = house.bench.forked().await;
    let made = house.back_up(&tree, NOW_MS + 2000).await;
    assert!(made.taken_over >= TREE - MIB, "{} of {TREE}", made.taken_over);
    assert!(made.sent < MIB + SMALL, "{}", made.sent);
    house.is_right(&made, &tree).await;
    house.nothing_is_left(NOW_MS + 4 * DAY_MS).await;
    house.is_right(&made, &tree).await;

    let attempt = other.begin(NOW_MS + 2000).await;
    let id = attempt.id();
    let mut writer = attempt.write(eager()).unwrap();
    let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(&tree)));
    writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await.unwrap();
    drop(writer.finish(source, Vec::new(), facts()).await.unwrap());
    other.repository.abort(other.lineage, id, "tester", "it died", NOW_MS).await.unwrap();
    let (summary, taken_over) = next(&other, &tree, NOW_MS + 3000).await;
    assert_eq!(taken_over, TREE);
    is_sound(&other, &summary.unwrap(), &tree, "after three").await;
}

/// Streams of 20 MiB, the second of which breaks off at its end, when checkpoints tell of what was stored of both.
struct Streams {
    breaks: Option<Arc<Checkpoints>>,
}

struct BreaksOff(io::Cursor<Vec<u8>>, Option<Arc<Checkpoints>>);

impl Read for BreaksOff {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match (self.0.read(buffer)?, &self.1) {
            (0, Some(checkpoints)) => {
                checkpoints.wait();
                Err(io::Error::other("the program was killed"))
            }
            (read, _) => Ok(read),
        }
    }
}

impl Source for Streams {
    fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        Ok(None)
    }

    fn stream(
        &self,
        entry: &SourceEntry,
        _: &CancellationToken,
    ) -> io::Result<Option<Box<dyn Read + Send>>> {
        let breaks = self.breaks.clone().filter(|_| entry.path == b"second");
        let bytes = noise(u64::from(entry.path[0]), 20 << 20);
        Ok(Some(Box::new(BreaksOff(io::Cursor::new(bytes), breaks))))
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn dumps_that_were_stored_before_one_broke_off_are_not_stored_again() {
    let house = House::new().await;
    let write = async |breaks: Option<Arc<Checkpoints>>| {
        let progress = Arc::new(Progress::default());
        let options = WriteOptions { progress: Arc::clone(&progress), ..eager() };
        let mut writer = house.bench.begin(NOW_MS).await.write(options).unwrap();
        let source = Arc::new(Streams { breaks });
        let entries = ["first", "second"].map(|path| Ok(SourceEntry::stream(path, 0o600)));
        writer.copy(Arc::<Streams>::clone(&source), entries).await?;
        let written = writer.finish(source, Vec::new(), facts()).await?;
        let backup = written.commit(NOW_MS).await?.backup;
        Ok::<_, Error>((backup, progress.snapshot().bytes_taken_over))
    };
    // A stream is read in stretches of 8 MiB: the last one of the second never came.
    let breaks = Arc::new(Checkpoints::of(&house, 36 * MIB).await);
    assert!(matches!(write(Some(breaks)).await, Err(Error::Source { .. })));
    let (backup, taken_over) = write(None).await.unwrap();
    assert_eq!(taken_over, 36 * MIB);
    let backup = house.repository().open_backup(house.bench.lineage, backup).await.unwrap();
    for path in ["first", "second"] {
        let content = backup.file_content(path.as_bytes()).await.unwrap();
        let pieces: Vec<Bytes> = content.stream().try_collect().await.unwrap();
        assert!(pieces.concat() == noise(u64::from(path.as_bytes()[0]), 20 << 20), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quick_backup_pays_nothing_and_a_long_one_leaves_no_checkpoint() {
    let house = House::new().await;
    let tree = tree();
    house.bench.back_up(&tree, NOW_MS).await;
    tree.write("a", 0, &noise(11, 3 << 20));
    house.store.take();
    house.bench.back_up(&tree, NOW_MS + 1000).await;
    let asked = house.store.take();
    let of_checkpoints = |asked: &Asked| match asked {
        Asked::List(key) | Asked::Stored(key, _) | Asked::Deleted(key) => {
            key.contains("/checkpoint")
        }
    };
    assert!(!asked.iter().any(of_checkpoints), "{asked:?}");
    // What is marked, condemned and attempted; the predecessor's packs; what is marked and there at the end.
    let names: Vec<&str> = asked
        .iter()
        .filter_map(|asked| match asked {
            Asked::List(prefix) => prefix.trim_end_matches('/').rsplit('/').next(),
            _ => None,
        })
        .collect();
    assert_eq!(names, ["damaged", "gc", "backups", "packs", "damaged", "packs"]);

    tree.write("a", 0, &noise(12, 3 << 20));
    let asked = house.back_up(&tree, NOW_MS + 2000).await.asked;
    let is_checkpoint =
        |asked: &Asked| matches!(asked, Asked::Stored(key, _) if key.contains("/checkpoint."));
    assert!(asked.iter().any(is_checkpoint), "{asked:?}");
    assert_eq!(house.checkpoints().await, [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_leaves_for_a_day_what_the_next_backup_may_take_over() {
    let house = House::new().await;
    let tree = tree();
    house.ends_before_its_manifest(&tree, NOW_MS).await;
    let options = collect_options(NOW_MS + HOUR_MS);
    let (repository, lineage) = (house.repository(), house.bench.lineage);
    let plan = repository.plan_collection(lineage, &options).await.unwrap();
    assert!(plan.left_behind.bytes > TREE, "{:?}", plan.left_behind);
    assert_eq!(plan.keep, plan.left_behind);
    // WAL and late files are of that attempt alone.
    assert!(plan.delete.packs > 0 && plan.delete.bytes < SMALL, "{:?}", plan.delete);
    assert!(matches!(plan.collect(&options).await.unwrap(), Collected::Done(_)));
    let made = house.back_up(&tree, NOW_MS + 2 * HOUR_MS).await;
    assert_eq!(made.taken_over, TREE);
    house.nothing_is_left(NOW_MS + 3 * HOUR_MS).await;
    house.is_right(&made, &tree).await;

    // One that nobody went on from is garbage like any other a day later.
    tree.write("d", 0, &noise(12, 5 << 20));
    house.ends_before_its_manifest(&tree, NOW_MS + 4 * HOUR_MS).await;
    house.nothing_is_left(NOW_MS + 2 * DAY_MS).await;
    let next = house.back_up(&tree, NOW_MS + 2 * DAY_MS).await;
    assert_eq!(next.taken_over, 0);
    house.is_right(&next, &tree).await;
}

/// Small enough to be made many times.
fn small_tree() -> Arc<Tree> {
    let tree = Tree::new().file("a", noise(1, 400_000)).file("b", noise(2, 300_000));
    Arc::new(tree.file("c", noise(3, 50_000)))
}

fn small_packs() -> WriteOptions {
    WriteOptions { pack_bytes: 200_000, ..eager() }
}

/// A repository in which a backup was interrupted before its verdict, reached through a store in which somebody may have a turn.
async fn with_a_dead_backup(tree: &Arc<Tree>) -> (Arc<Interrupted>, Bench, AttemptId) {
    let directory = tempfile::tempdir().unwrap();
    let store = Arc::new(Interrupted::new(&directory.path().join("repository")));
    let bench = Bench::over(directory, Arc::<Interrupted>::clone(&store)).await;
    let attempt = bench.begin(NOW_MS).await;
    let id = attempt.id();
    let mut writer = attempt.write(small_packs()).unwrap();
    let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(tree)));
    writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await.unwrap();
    drop(writer.finish(source, Vec::new(), facts()).await.unwrap());
    let (repository, lineage) = (&bench.repository, bench.lineage);
    repository.abort(lineage, id, "tester", "it died", NOW_MS).await.unwrap();
    (store, bench, id)
}

/// The backup after it, what it took over, and whether it was one.
async fn next(bench: &Bench, tree: &Arc<Tree>, at_ms: i64) -> (Result<BackupSummary, Error>, u64) {
    let progress = Arc::new(Progress::default());
    // Without checkpoints of its own, which come when they come: it asks for the same every time.
    let checkpoint_every = Duration::from_hours(1);
    let options =
        WriteOptions { progress: Arc::clone(&progress), checkpoint_every, ..small_packs() };
    let ended = bench.back_up_with(tree, at_ms, options).await;
    (ended, progress.snapshot().bytes_taken_over)
}

async fn is_sound(bench: &Bench, summary: &BackupSummary, tree: &Tree, moment: &str) {
    let backup = bench.open(summary).await;
    assert!(backup.check_inventory().await.unwrap().is_sound(), "{moment}");
    let found = backup.check_decrypt(CheckOptions::default()).await.unwrap();
    assert!(found.is_sound(), "{moment}: {found:?}");
    assert!(bench.restore(summary).await == tree.expected(), "{moment}: another content");
}

/// To these collectors what was interrupted is too old to be left, and what is being written is not.
fn late(patience_ms: Option<i64>) -> CollectOptions {
    CollectOptions { patience_ms, ..collect_options(NOW_MS + 3 * DAY_MS) }
}

/// The next backup begins at this moment.
const NEXT_MS: i64 = NOW_MS + 3 * DAY_MS - HOUR_MS;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_between_any_two_calls_of_a_backup_that_takes_over_leaves_no_hole() {
    let tree = small_tree();
    // One that aborts whatever is open, and one that waits for it.
    for patience_ms in [Some(0), None] {
        let (mut calls, mut refused, mut took_over, mut stored) = (0_u32, 0, 0, 0);
        loop {
            let (store, bench, _) = with_a_dead_backup(&tree).await;
            let other = bench.beside().await;
            let turn: Turn = Box::pin(async move {
                let options = late(patience_ms);
                let (repository, lineage) = (&other.repository, other.lineage);
                let plan = repository.plan_collection(lineage, &options).await.unwrap();
                plan.collect(&options).await.unwrap();
            });
            store.after(calls.into(), Some(turn));
            let (ended, taken_over) = next(&bench, &tree, NEXT_MS).await;
            if store.is_left() {
                // What it waits for took over, or had not begun; what it aborts had begun, or not.
                let many = if patience_ms.is_some() { refused } else { took_over };
                let told = format!("{took_over} and {stored} and {refused} of {calls}");
                assert!(many > 10 && stored > 0 && many + stored == calls, "{told}");
                break;
            }
            match ended {
                Ok(summary) => {
                    took_over += u32::from(taken_over > 0);
                    stored += u32::from(taken_over == 0);
                    is_sound(&bench, &summary, &tree, &format!("call {calls}")).await;
                }
                Err(Error::CommitRefused { .. } | Error::Incomplete { .. }) => refused += 1,
                Err(error) => panic!("{calls}: {error:?}"),
            }
            calls += 1;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_takes_over_between_any_two_calls_of_a_collector_loses_nothing() {
    let tree = small_tree();
    let (mut calls, mut took_over, mut stored) = (0, 0, 0);
    loop {
        let (store, bench, _) = with_a_dead_backup(&tree).await;
        let other = bench.beside().await;
        let made = Arc::new(Mutex::new(None));
        let turn: Turn = Box::pin({
            let (made, tree) = (Arc::clone(&made), Arc::clone(&tree));
            async move {
                let done = next(&other, &tree, NEXT_MS).await;
                *made.lock().unwrap() = Some(done);
            }
        });
        store.after(calls, Some(turn));
        let options = late(None);
        let plan = bench.repository.plan_collection(bench.lineage, &options).await.unwrap();
        let collected = plan.collect(&options).await;
        if store.is_left() {
            assert!(took_over > 3 && stored > 3, "{took_over} and {stored} of {calls}");
            return;
        }
        collected.unwrap();
        let (summary, taken_over) = made.lock().unwrap().take().unwrap();
        took_over += u32::from(taken_over > 0);
        stored += u32::from(taken_over == 0);
        is_sound(&bench, &summary.unwrap(), &tree, &format!("call {calls}")).await;
        calls += 1;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_took_over_before_a_collection_commits_in_the_middle_of_it() {
    let tree = small_tree();
    let (mut calls, mut postponed, mut spared) = (0, 0, 0);
    loop {
        let (store, bench, _) = with_a_dead_backup(&tree).await;
        let other = bench.beside().await;
        let attempt = other.begin(NEXT_MS).await;
        let mut writer = attempt.write(small_packs()).unwrap();
        let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(&tree)));
        writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await.unwrap();
        let written = writer.finish(source, late_files(), facts()).await.unwrap();
        let made = Arc::new(Mutex::new(None));
        let turn: Turn = Box::pin({
            let made = Arc::clone(&made);
            async move {
                let done = written.commit(NEXT_MS).await;
                *made.lock().unwrap() = Some(done);
            }
        });
        store.after(calls, Some(turn));
        let options = late(None);
        let plan = bench.repository.plan_collection(bench.lineage, &options).await.unwrap();
        let collected = plan.collect(&options).await;
        if store.is_left() {
            assert!(postponed > 0 && spared > 0, "{postponed} and {spared} of {calls}");
            return;
        }
        match collected.unwrap() {
            Collected::Postponed { .. } => postponed += 1,
            Collected::Done(done) => spared += u32::from(done.spared.packs > 0),
            Collected::Nothing => {}
        }
        let summary = made.lock().unwrap().take().unwrap().unwrap();
        is_sound(&bench, &summary, &tree, &format!("call {calls}")).await;
        calls += 1;
    }
}

fn late_files() -> Vec<SourceEntry> {
    vec![
        SourceEntry::bytes("backup_label", 0o600, "START WAL LOCATION: 0/1000000"),
        SourceEntry::bytes("late_control", 0o600, noise(1, 8192)),
    ]
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_died_anywhere_keeps_no_backup_from_being_sound() {
    let tree = small_tree();
    let (mut calls, mut took_over, mut stored) = (0, 0, 0);
    loop {
        let (store, bench, _) = with_a_dead_backup(&tree).await;
        store.after(calls, None);
        let options = late(None);
        let ended = match bench.repository.plan_collection(bench.lineage, &options).await {
            Ok(plan) => plan.collect(&options).await.map(drop),
            Err(error) => Err(error),
        };
        let finished = store.is_left();
        store.after(-1, None);
        assert_eq!(ended.is_ok(), finished, "{calls}: {ended:?}");
        let (summary, taken_over) = next(&bench, &tree, NEXT_MS).await;
        took_over += u32::from(taken_over > 0);
        stored += u32::from(taken_over == 0);
        is_sound(&bench, &summary.unwrap(), &tree, &format!("call {calls}")).await;
        if finished {
            assert!(took_over > 3 && stored > 3, "{took_over} and {stored} of {calls}");
            return;
        }
        calls += 1;
    }
}

/// The files of a repository below a lineage, by the last parts of their names.
fn files(bench: &Bench, part: &str) -> Vec<PathBuf> {
    let files =
        common::files_below(&bench.store_path().join(format!("lineages/{}", bench.lineage)));
    files.into_iter().filter(|file| file.to_string_lossy().contains(part)).collect()
}

/// The type of a pack stands in its header.
fn packs_of_type(bench: &Bench, kind: u8) -> Vec<PathBuf> {
    let packs = files(bench, "/packs/");
    packs.into_iter().filter(|pack| std::fs::read(pack).unwrap()[9] == kind).collect()
}

fn spoil(file: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(file).unwrap();
    change(&mut bytes);
    std::fs::write(file, bytes).unwrap();
}

/// Whatever is wrong with what an interrupted backup left: the next one is sound, and stores what it cannot take over.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_that_is_wrong_with_what_is_left_harms_the_next_backup() {
    let tree = small_tree();
    let (_, whole, dead) = with_a_dead_backup(&tree).await;
    let next_of = async |bench: &Bench, what: &str| {
        let (summary, taken_over) = next(bench, &tree, NEXT_MS).await;
        is_sound(bench, &summary.unwrap(), &tree, what).await;
        taken_over
    };
    let untouched = whole.forked().await;
    assert_eq!(next_of(&untouched, "nothing is wrong").await, 750_000);

    let length = std::fs::metadata(&files(&whole, "/checkpoint.")[0]).unwrap().len();
    for at in (0..usize::try_from(length).unwrap()).step_by(97) {
        let bench = whole.forked().await;
        spoil(&files(&bench, "/checkpoint.")[0], |bytes| bytes[at] ^= 4);
        assert_eq!(next_of(&bench, &format!("byte {at} of the checkpoint")).await, 0);
    }
    for cut in [0, 1, 143, 200] {
        let bench = whole.forked().await;
        spoil(&files(&bench, "/checkpoint.")[0], |bytes| bytes.truncate(cut));
        assert_eq!(next_of(&bench, &format!("{cut} bytes of the checkpoint")).await, 0);
    }
    // One that is wrong does not hide the one before it.
    let bench = whole.forked().await;
    let checkpoint = files(&bench, "/checkpoint.").remove(0);
    std::fs::write(checkpoint.with_file_name("checkpoint.4000000000"), "newer").unwrap();
    assert_eq!(next_of(&bench, "a newer checkpoint is none").await, 750_000);

    // Metadata that cannot be read, at its place or at all.
    for kind in ["changed", "cut", "gone"] {
        let bench = whole.forked().await;
        for pack in packs_of_type(&bench, 2) {
            match kind {
                "changed" => spoil(&pack, |bytes| bytes[144..].fill(7)),
                "cut" => spoil(&pack, |bytes| bytes.truncate(150)),
                _ => std::fs::remove_file(&pack).unwrap(),
            }
        }
        assert_eq!(next_of(&bench, &format!("metadata is {kind}")).await, 0);
    }
    // A pack of content that is not there, has another size or is marked: the others are taken over.
    for kind in ["gone", "cut", "marked"] {
        let bench = whole.forked().await;
        let pack = packs_of_type(&bench, 1).remove(0);
        match kind {
            "gone" => std::fs::remove_file(&pack).unwrap(),
            "cut" => spoil(&pack, |bytes| bytes.truncate(1000)),
            _ => {
                let name = pack.file_name().unwrap().to_string_lossy();
                let mark = format!("lineages/{}/damaged/{name}", bench.lineage);
                bench.repository.store().put(&mark, Bytes::from_static(b"\n")).await.unwrap();
            }
        }
        let taken_over = next_of(&bench, &format!("a pack of content is {kind}")).await;
        assert!((1..750_000).contains(&taken_over), "{kind}: {taken_over}");
    }
    // What is under the name of another attempt or lineage, or another number, is nobody's.
    let checkpoint = std::fs::read(&files(&whole, "/checkpoint.")[0]).unwrap();
    for (lineage, attempt) in foreign(&whole, dead).await {
        let bench = whole.forked().await;
        std::fs::remove_file(&files(&bench, "/checkpoint.")[0]).unwrap();
        let key = format!("lineages/{lineage}/backups/{attempt}/checkpoint.9");
        bench.repository.store().put(&key, checkpoint.clone().into()).await.unwrap();
        let intent = bench.intent(NEXT_MS);
        let begun = bench.repository.begin(lineage, intent).await.unwrap();
        assert!(begun.goes_on_from().is_empty(), "{key}");
    }
}

/// A store that gives everything but what an interrupted backup left.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_left_and_cannot_be_read_stops_no_backup_and_no_collection() {
    let house = House::new().await;
    let tree = tree();
    let dead = house.ends_before_its_manifest(&tree, NOW_MS).await;
    let end_of = |path: PathBuf| path.file_name().unwrap().to_string_lossy().into_owned();
    let metadata: Vec<_> = packs_of_type(&house.bench, 2).into_iter().map(end_of).collect();
    assert!(!metadata.is_empty());
    let checkpoint = end_of(files(&house.bench, "/checkpoint.").remove(0));
    *house.store.unreadable.lock().unwrap() = vec![format!("{dead}/{checkpoint}")];
    let begun = house.bench.begin(NOW_MS + HOUR_MS).await;
    assert!(begun.goes_on_from().is_empty());
    house.abort(begun.id()).await;
    let options = collect_options(NOW_MS + HOUR_MS);
    house.repository().plan_collection(house.bench.lineage, &options).await.unwrap();

    // Its shards are asked for when the first file is.
    *house.store.unreadable.lock().unwrap() = metadata;
    let begun = house.bench.begin(NOW_MS + 2 * HOUR_MS).await;
    assert_eq!(begun.goes_on_from(), [dead]);
    house.abort(begun.id()).await;
    let made = house.back_up(&tree, NOW_MS + 2 * HOUR_MS).await;
    assert_eq!(made.taken_over, 0);
    house.store.unreadable.lock().unwrap().clear();
    house.is_right(&made, &tree).await;
}

/// Lineages and attempts that a checkpoint is not of.
async fn foreign(bench: &Bench, dead: AttemptId) -> Vec<(LineageId, AttemptId)> {
    let cluster = "others".parse().unwrap();
    let repository = &bench.repository;
    let other = repository.find_or_mint_lineage(&cluster, SystemIdentifier(8), NOW_MS).await;
    let attempt = AttemptId::mint(u64::try_from(NOW_MS).unwrap(), [9; 10]);
    vec![(bench.lineage, attempt), (bench.lineage, dead), (other.unwrap().lineage, dead)]
}

/// A bit of stored content may rot in a pack that is taken over as in any other: a check finds it, and the next backup stores again
/// what was in it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn content_that_rots_is_found_by_a_check_and_then_taken_over_no_more() {
    let tree = small_tree();
    let (_, bench, _) = with_a_dead_backup(&tree).await;
    spoil(&packs_of_type(&bench, 1)[0], |bytes| bytes[5000] ^= 1);
    let (summary, taken_over) = next(&bench, &tree, NEXT_MS).await;
    assert_eq!(taken_over, 750_000);
    let backup = bench.open(&summary.unwrap()).await;
    let found = backup.check_decrypt(CheckOptions::default()).await.unwrap();
    assert_eq!(found.damaged.len(), 1, "{found:?}");
    let mut report = repository::ScrubReport::default();
    let options = repository::ScrubOptions {
        mark: Some("tester".into()),
        ..repository::ScrubOptions::new(repository::CheckLevel::Read, NEXT_MS)
    };
    bench.repository.scrub(&options, &mut report).await.unwrap();
    assert_eq!(report.damaged.len(), 1, "{report:?}");
    let (summary, _) = next(&bench, &tree, NEXT_MS + HOUR_MS).await;
    is_sound(&bench, &summary.unwrap(), &tree, "after a check").await;
}

/// Nobody else's objects are mistaken for what is left, and nothing of the format stands under a name that is none.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_check_of_the_repository_finds_nothing_wrong_with_what_is_left() {
    let tree = small_tree();
    let (_, bench, _) = with_a_dead_backup(&tree).await;
    let summary = bench.back_up(&Arc::new(Tree::new().file("z", "z")), NOW_MS).await;
    let mut report = repository::ScrubReport::default();
    let options = repository::ScrubOptions::new(repository::CheckLevel::Decrypt, NEXT_MS);
    bench.repository.scrub(&options, &mut report).await.unwrap();
    assert!(report.is_sound() && report.foreign.is_empty(), "{report:?}");
    assert_eq!(report.lineages[0].backups, 1);
    assert_eq!(bench.restore(&summary).await.len(), 1);
}
