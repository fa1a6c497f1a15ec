//! Restores over something: what is right stays and is not fetched, everything else becomes what the backup says, nothing
//! outside is touched, and whatever interrupts a restore, the next one goes on.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions, Permissions};
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::common::{Bench, NOW_MS, Node, Tree, look, noise};
use async_trait::async_trait;
use bytes::Bytes;
use proto::Code;
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Store, StoreError};
use repository::{
    Addition, Backup, Error, Existing, Progress, RestoreOptions, RestorePlan, RestoreSummary,
    RestoreTarget,
};

const MARKER: &str = "pgmuster-restore-incomplete";
/// Restored last.
const LAST: &str = "backup_label";
const LARGE: usize = 12 << 20;

/// A large file in shards, small ones beside each other, holes, links, odd sizes.
fn varied() -> Tree {
    let mut tree = Tree::new()
        .directory("base")
        .directory("base/1")
        .directory("empty")
        .directory("pg_wal")
        .file("base/1/large", noise(1, LARGE))
        .file("base/1/odd", noise(2, 123_457))
        .file("base/1/nothing", "")
        .file("base/1/zeros", vec![0; 100_000])
        .file("base/1/holes", [noise(3, 65_536), vec![0; 65_536], noise(4, 30_000)].concat())
        .file("conf", "a = b\n");
    for number in 0..60 {
        tree = tree.file(format!("base/1/small{number:02}"), noise(100 + number, 8192));
    }
    tree.links.push((b"base/link".to_vec(), b"1/odd".to_vec()));
    tree
}

fn replacing(directory: &Path) -> RestoreTarget {
    let spare = BTreeSet::from([b"spared".to_vec()]);
    RestoreTarget {
        existing: Existing::Replace { spare, believe_cache: false },
        ..resuming(directory)
    }
}

fn resuming(directory: &Path) -> RestoreTarget {
    RestoreTarget {
        directory: directory.to_owned(),
        wal_directory: Some(b"pg_wal".to_vec()),
        ..RestoreTarget::default()
    }
}

/// The same, where the page cache may answer for the disk.
fn believing(directory: &Path) -> RestoreTarget {
    let Existing::Replace { spare, .. } = replacing(directory).existing else { unreachable!() };
    RestoreTarget {
        existing: Existing::Replace { spare, believe_cache: true },
        ..resuming(directory)
    }
}

async fn restore(backup: &Backup, target: RestoreTarget) -> Result<RestoreSummary, Error> {
    backup.restore_plan(target).await?.restore(RestoreOptions::default()).await
}

/// Names, content, links and modes.
fn state(root: &Path) -> BTreeMap<Vec<u8>, (Node, u32)> {
    use std::os::unix::ffi::OsStrExt as _;
    let nodes = look(root).into_iter().map(|(path, node)| {
        let at = root.join(std::ffi::OsStr::from_bytes(&path));
        let mode = fs::symlink_metadata(at).unwrap().mode();
        (path, (node, mode))
    });
    nodes.collect()
}

/// What would show that somebody wrote, without opening anything.
fn stamps(root: &Path) -> Vec<(PathBuf, [i64; 4])> {
    let mut stamps = Vec::new();
    let mut left = vec![root.to_owned()];
    while let Some(place) = left.pop() {
        for entry in fs::read_dir(place).unwrap() {
            let entry = entry.unwrap();
            let metadata = entry.metadata().unwrap();
            if metadata.is_dir() {
                left.push(entry.path());
            }
            let ctime = [metadata.ctime(), metadata.ctime_nsec()];
            let figures = [metadata.ino(), metadata.len()].map(u64::cast_signed);
            stamps.push((entry.path(), [ctime[0], ctime[1], figures[0], figures[1]]));
        }
    }
    stamps.sort();
    stamps
}

fn write_at(path: &Path, offset: u64, bytes: &[u8]) {
    OpenOptions::new().write(true).open(path).unwrap().write_all_at(bytes, offset).unwrap();
}

/// What a plan says it will fetch, and what is right.
async fn compared(plan: &RestorePlan) -> (u64, u64) {
    let compared = plan.compare(&RestoreOptions::default()).await.unwrap();
    (compared.fetch_bytes, compared.reused_bytes)
}

struct House {
    bench: Bench,
    backup: Backup,
    directory: PathBuf,
    whole: BTreeMap<Vec<u8>, (Node, u32)>,
    first: RestoreSummary,
}

impl House {
    /// A backup, and a good restore of it.
    async fn new() -> Self {
        let bench = Bench::new().await;
        let summary = bench.back_up(&Arc::new(varied()), NOW_MS).await;
        let backup = bench.open(&summary).await;
        let directory = bench.directory.path().join("data");
        let first = restore(&backup, resuming(&directory)).await.unwrap();
        assert_eq!(first.reused_bytes, 0);
        let whole = state(&directory);
        Self { bench, backup, directory, whole, first }
    }

    fn at(&self, path: &str) -> PathBuf {
        self.directory.join(path)
    }

    async fn mend(&self) -> RestoreSummary {
        let plan = self.backup.restore_plan(replacing(&self.directory)).await.unwrap();
        let before = stamps(&self.directory);
        let (fetch_bytes, reused_bytes) = compared(&plan).await;
        assert_eq!(stamps(&self.directory), before, "a plan touches nothing");
        let done = plan.restore(RestoreOptions::default()).await.unwrap();
        assert_eq!((done.fetched_bytes, done.reused_bytes), (fetch_bytes, reused_bytes));
        assert_eq!(state(&self.directory), self.whole);
        done
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_or_a_key_is_never_taken_for_something_that_is_in_the_way() {
    let house = House::new().await;
    // One that the restore has never heard of.
    let other = Bench::new().await;
    let refused = async |precious: &Path| {
        let failed = restore(&house.backup, replacing(&house.directory)).await.unwrap_err();
        let told = failed.to_string();
        assert!(matches!(failed, Error::TargetPrecious { .. }), "{told}");
        assert!(told.contains(&precious.display().to_string()), "{told}");
        assert!(precious.exists());
    };

    for place in ["empty/deep/er", "top"] {
        fs::create_dir_all(house.at(place).parent().unwrap()).unwrap();
        fs::rename(other.store_path(), house.at(place)).unwrap();
        refused(&house.at(place)).await;
        fs::rename(house.at(place), other.store_path()).unwrap();
    }
    let key = house.at("base/1/k");
    fs::write(&key, format!("# comments\n{}", other.key_text)).unwrap();
    refused(&key).await;
    fs::write(&key, "no key").unwrap();
    house.mend().await;
    assert!(!key.exists(), "what is neither is in the way");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_caller_adds_is_there_before_the_directory_looks_complete() {
    let house = House::new().await;
    let into = house.bench.directory.path().join("added");
    let adding = |fails: bool| {
        let write = move |directory: &Path| {
            // All else is there; the last file, without which no server starts, is not.
            assert!(directory.join(MARKER).exists() && directory.join("base/1/large").exists());
            assert!(!directory.join(LAST).exists());
            fs::write(directory.join("conf"), "a = c\n")?;
            fs::write(directory.join("signal"), "")?;
            if fails { Err(std::io::Error::other("no room")) } else { Ok(()) }
        };
        let names = BTreeSet::from([b"conf".to_vec(), b"signal".to_vec()]);
        let addition = Some(Addition { names, write: Arc::new(write) });
        RestoreTarget { addition, ..resuming(&into) }
    };
    let failed = restore(&house.backup, adding(true)).await.unwrap_err();
    assert!(matches!(failed, Error::Target { .. }), "{failed:?}");
    assert!(into.join(MARKER).exists() && !into.join(LAST).exists());
    // Whoever adds nothing does not know the names that are there.
    let stranger = restore(&house.backup, resuming(&into)).await.unwrap_err();
    assert!(matches!(stranger, Error::TargetNotEmpty { .. }), "{stranger:?}");
    restore(&house.backup, adding(false)).await.unwrap();
    assert!(!into.join(MARKER).exists() && into.join(LAST).exists());
    assert_eq!(fs::read_to_string(into.join("conf")).unwrap(), "a = c\n");
    assert_eq!(fs::read(into.join("signal")).unwrap(), b"");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_directory_that_is_right_only_wal_and_the_last_files_are_fetched() {
    let house = House::new().await;
    let done = house.mend().await;
    assert!(done.fetched_bytes < 300_000, "{done:?}");
    assert!(done.reused_bytes > LARGE as u64, "{done:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_damaged_directory_becomes_the_backup_again_and_only_what_differs_is_fetched() {
    let house = House::new().await;
    let at = |path: &str| house.at(path);
    let outside = house.bench.directory.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("small00"), "precious").unwrap();
    fs::write(outside.join("file"), noise(2, 123_457)).unwrap();

    // Pages flipped without a trace in size or times; one bit in the last, short unit.
    for path in ["base/1/large", "base/1/odd"] {
        let file = File::open(at(path)).unwrap();
        let times = fs::FileTimes::new().set_modified(file.metadata().unwrap().modified().unwrap());
        write_at(&at(path), 100_000, b"flipped");
        write_at(&at(path), fs::metadata(at(path)).unwrap().len() - 1, b"!");
        file.set_times(times).unwrap();
    }
    // Shorter, longer, gone, filled, emptied.
    let cut = |path: &str, length| {
        OpenOptions::new().write(true).open(at(path)).unwrap().set_len(length).unwrap();
    };
    cut("base/1/small01", 5000);
    cut("base/1/small02", 0);
    cut("base/1/small03", 20_000);
    fs::remove_file(at("base/1/small04")).unwrap();
    write_at(&at("base/1/zeros"), 50_000, b"no");
    write_at(&at("base/1/holes"), 70_000, b"no hole");
    write_at(&at("base/1/holes"), 0, &[0; 8192]);
    fs::write(at("base/1/nothing"), "something").unwrap();
    // Something else under the name.
    fs::remove_file(at("base/1/small05")).unwrap();
    fs::create_dir_all(at("base/1/small05/deep/er")).unwrap();
    fs::write(at("base/1/small05/deep/er/file"), "x").unwrap();
    fs::remove_file(at("base/1/odd")).unwrap();
    symlink(outside.join("file"), at("base/1/odd")).unwrap();
    fs::remove_dir(at("empty")).unwrap();
    symlink(&outside, at("empty")).unwrap();
    fs::remove_file(at("base/link")).unwrap();
    symlink("1/small00", at("base/link")).unwrap();
    fs::remove_file(at("conf")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        at("conf"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();
    // A second name elsewhere: what is written here must not be seen there.
    fs::hard_link(at("base/1/small06"), outside.join("linked")).unwrap();
    write_at(&at("base/1/small06"), 0, b"linked");
    // Modes, one of them in the way.
    fs::set_permissions(at("base/1/small07"), Permissions::from_mode(0o000)).unwrap();
    fs::set_permissions(at("base/1/small08"), Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(at("base/1"), Permissions::from_mode(0o555)).unwrap();
    // Names that the backup does not have.
    fs::write(at("pg_wal/000000010000000000000077"), noise(5, 1000)).unwrap();
    fs::create_dir_all(at("extra/of")).unwrap();
    fs::write(at("extra/of/somebody"), "x").unwrap();
    symlink(&outside, at("extra/of/link")).unwrap();
    fs::set_permissions(at("extra/of"), Permissions::from_mode(0o500)).unwrap();
    fs::write(at("pgmuster-restore-incomplete.new"), "half").unwrap();

    let plan = house.backup.restore_plan(replacing(&house.directory)).await.unwrap();
    let foreign: Vec<_> = plan
        .foreign
        .iter()
        .map(|foreign| (foreign.path.strip_prefix(&house.directory).unwrap(), foreign.names))
        .collect();
    let expected =
        [("base/1/small05", 4), ("empty", 1), ("extra", 4), ("pg_wal/000000010000000000000077", 1)];
    assert_eq!(foreign, expected.map(|(path, names)| (Path::new(path), names)));
    let done = house.mend().await;
    assert!(done.fetched_bytes < house.first.fetched_bytes / 3, "{done:?}");
    assert!(done.reused_bytes > LARGE as u64 - 20_000, "{done:?}");
    assert_eq!(fs::read(outside.join("small00")).unwrap(), b"precious");
    assert_eq!(fs::read(outside.join("file")).unwrap(), noise(2, 123_457));
    assert_eq!(&fs::read(outside.join("linked")).unwrap()[..6], b"linked");
    assert_eq!(fs::read_dir(&outside).unwrap().count(), 3);
    let holes = fs::metadata(at("base/1/holes")).unwrap();
    assert!(holes.blocks() * 512 < holes.len(), "zeros are holes: {holes:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_spared_or_came_after_the_plan_is_not_removed() {
    let house = House::new().await;
    fs::write(house.at("spared"), "stays").unwrap();
    fs::write(house.at("known"), "goes").unwrap();
    let plan = house.backup.restore_plan(replacing(&house.directory)).await.unwrap();
    assert_eq!(plan.foreign.len(), 1);
    fs::write(house.at("base/new"), "nobody was asked about this").unwrap();
    let before = state(&house.directory);
    let error = plan.restore(RestoreOptions::default()).await.unwrap_err();
    assert!(error.to_string().contains("base/new was put there since"), "{error}");
    assert_eq!(proto::Failure::from(error).code, Code::TargetNotEmpty);
    assert_eq!(state(&house.directory), before);
    fs::remove_file(house.at("base/new")).unwrap();
    restore(&house.backup, replacing(&house.directory)).await.unwrap();
    assert_eq!(fs::read(house.at("spared")).unwrap(), b"stays");
    fs::remove_file(house.at("spared")).unwrap();
    assert_eq!(state(&house.directory), house.whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_that_is_not_to_be_replaced_is_refused_as_ever() {
    let house = House::new().await;
    let error = house.backup.restore_plan(resuming(&house.directory)).await.unwrap_err();
    assert!(error.to_string().contains("it is not empty"), "{error}");
    assert_eq!(state(&house.directory), house.whole);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn mapped_directories_are_mended_where_they_are() {
    let bench = Bench::new().await;
    let tree = Tree::new()
        .directory("pg_tblspc")
        .directory("pg_tblspc/16400")
        .directory("pg_tblspc/16400/PG_15")
        .file("pg_tblspc/16400/PG_15/1", noise(1, 3 << 20))
        .file("x", "x");
    let summary = bench.back_up(&Arc::new(tree), NOW_MS).await;
    let backup = bench.open(&summary).await;
    let (data, space) = (bench.directory.path().join("data"), bench.directory.path().join("space"));
    let mapping = BTreeMap::from([(b"pg_tblspc/16400".to_vec(), space.clone())]);
    let over = |target: RestoreTarget| RestoreTarget { mapping: mapping.clone(), ..target };
    restore(&backup, over(RestoreTarget { wal_directory: None, ..resuming(&data) })).await.unwrap();
    let (in_data, in_space) = (state(&data), state(&space));
    write_at(&space.join("PG_15/1"), 9000, b"damage");
    fs::write(space.join("PG_15/2"), "not in the backup").unwrap();
    // What a cluster of another version has in the same place is nobody's to remove.
    fs::create_dir(space.join("PG_14")).unwrap();
    fs::write(space.join("PG_14/1"), "theirs").unwrap();
    // A directory where the link belongs holds files that are nobody's copies.
    fs::remove_file(data.join("pg_tblspc/16400")).unwrap();
    fs::create_dir_all(data.join("pg_tblspc/16400/PG_15")).unwrap();
    fs::write(data.join("pg_tblspc/16400/PG_15/1"), "x").unwrap();
    let target = over(RestoreTarget { wal_directory: None, ..replacing(&data) });
    let plan = backup.restore_plan(target).await.unwrap();
    let foreign: Vec<_> = plan.foreign.iter().map(|foreign| foreign.path.clone()).collect();
    assert_eq!(foreign, [data.join("pg_tblspc/16400"), space.join("PG_15/2")]);
    let done = plan.restore(RestoreOptions::default()).await.unwrap();
    assert!(done.reused_bytes >= (3 << 20) - 8192, "{done:?}");
    assert_eq!(fs::read_to_string(space.join("PG_14/1")).unwrap(), "theirs");
    fs::remove_dir_all(space.join("PG_14")).unwrap();
    assert_eq!((state(&data), state(&space)), (in_data, in_space));

    let inside = BTreeMap::from([(b"pg_tblspc/16400".to_vec(), data.join("pg_tblspc/in"))]);
    let target = RestoreTarget { mapping: inside, wal_directory: None, ..replacing(&data) };
    let error = backup.restore_plan(target).await.unwrap_err();
    assert!(error.to_string().contains("lies in the other"), "{error}");
}

/// When reads of packs begin to fail.
#[derive(Debug, Clone, Copy)]
enum Failure {
    /// After so many.
    After(u64),
    /// Only the first one of much file content, and only when so many bytes of the others were written.
    Once { written_bytes: u64 },
}

/// A store whose reads of packs fail.
#[derive(Debug)]
struct Failing {
    inner: DirectoryStore,
    failure: Failure,
    armed: AtomicBool,
    reads: AtomicU64,
    progress: Arc<Progress>,
}

impl Failing {
    async fn fails(&self, range: &Range<u64>) -> bool {
        match self.failure {
            _ if !self.armed.load(Ordering::SeqCst) => false,
            Failure::After(reads) => self.reads.fetch_add(1, Ordering::SeqCst) >= reads,
            Failure::Once { written_bytes } => {
                // Shards are read in blocks of a MiB.
                let first = range.end - range.start > 2 << 20
                    && self.reads.fetch_add(1, Ordering::SeqCst) == 0;
                let waits = async {
                    while self.progress.snapshot().bytes_read < written_bytes {
                        tokio::time::sleep(Duration::from_millis(1)).await;
                    }
                };
                if first {
                    tokio::time::timeout(Duration::from_mins(1), waits).await.unwrap();
                }
                first
            }
        }
    }
}

#[async_trait]
impl Layer for Failing {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        if self.fails(&range).await {
            return Err(StoreError::NotFound { key: key.to_owned() });
        }
        self.inner.get_range(key, range).await
    }
}

/// Restores from a store that fails. `None`: it did.
async fn interrupted(
    house: &House,
    target: RestoreTarget,
    failure: Failure,
) -> Option<RestoreSummary> {
    let progress = Arc::new(Progress::default());
    let store = Arc::new(Failing {
        inner: DirectoryStore::new(house.bench.store_path()),
        failure,
        armed: AtomicBool::new(false),
        reads: AtomicU64::new(0),
        progress: Arc::clone(&progress),
    });
    let shared: Arc<dyn Store> = Arc::clone(&store) as Arc<dyn Store>;
    let repository = repository::Repository::open(shared, Some(&house.bench.key)).await.unwrap();
    let backup = repository.open_backup(house.bench.lineage, house.backup.id()).await.unwrap();
    let plan = backup.restore_plan(target).await.unwrap();
    store.armed.store(true, Ordering::SeqCst);
    let options = RestoreOptions { progress, ..RestoreOptions::default() };
    match plan.restore(options).await {
        Ok(done) => Some(done),
        Err(Error::Missing { .. }) => None,
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_interrupted_at_any_read_goes_on() {
    let house = House::new().await;
    let mut reads = 0;
    loop {
        // Into nothing, and over something that is damaged.
        let fresh = house.at(&format!("../fresh{reads}"));
        let one = interrupted(&house, resuming(&fresh), Failure::After(reads)).await;
        for path in ["base/1/large", "base/1/small40"] {
            write_at(&house.at(path), 0, b"damage");
        }
        fs::write(house.at("foreign"), "x").unwrap();
        let other = interrupted(&house, replacing(&house.directory), Failure::After(reads)).await;
        for (done, directory, over) in [
            (one, &fresh, resuming(&fresh)),
            (other, &house.directory, replacing(&house.directory)),
        ] {
            assert_eq!(directory.join(MARKER).exists(), done.is_none(), "{reads}");
            if done.is_none() {
                assert!(!directory.join("late_control").exists(), "{reads}: it would start");
                // As a crash leaves it: pages that never reached the disk, a page of something else, a size of before.
                for (path, offset) in [("base/1/large", 300_000), ("base/1/odd", 0)] {
                    if let Ok(file) = OpenOptions::new().write(true).open(directory.join(path)) {
                        file.write_all_at(&[0; 4096], offset).unwrap();
                        file.write_all_at(&noise(9, 512), offset + 9000).unwrap();
                        file.set_len(200_000).unwrap();
                    }
                }
                restore(&house.backup, over).await.unwrap();
            }
            assert_eq!(state(directory), house.whole, "{reads}");
        }
        fs::remove_dir_all(&fresh).unwrap();
        if one.is_some() && other.is_some() {
            break;
        }
        reads += 1;
    }
    assert!(reads > 5, "{reads}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_an_interrupted_restore_has_written_is_not_fetched_again() {
    let house = House::new().await;
    let fresh = house.at("../fresh");
    // Everything but one request of 4 MiB.
    let failure = Failure::Once { written_bytes: LARGE as u64 - (4 << 20) };
    assert_eq!(interrupted(&house, resuming(&fresh), failure).await, None);
    let plan = house.backup.restore_plan(resuming(&fresh)).await.unwrap();
    assert!(plan.resumes);
    let done = plan.restore(RestoreOptions::default()).await.unwrap();
    assert!(done.fetched_bytes < house.first.fetched_bytes / 2, "{done:?} {:?}", house.first);
    assert_eq!(state(&fresh), house.whole);
}

/// Bytes that this process had the kernel read from disks so far.
fn read_from_disk() -> u64 {
    let io = fs::read_to_string("/proc/self/io").unwrap();
    io.lines().find_map(|line| line.strip_prefix("read_bytes: ")).unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_directory_is_compared_as_its_disk_has_it_unless_the_cache_may_answer() {
    let house = House::new().await;
    // What is in memory anyway is on no disk: /tmp may be, /var/tmp outlives a boot.
    let place = tempfile::Builder::new().prefix("pgmuster-").tempdir_in("/var/tmp").unwrap();
    let directory = place.path().join("data");
    restore(&house.backup, resuming(&directory)).await.unwrap();
    let large = LARGE as u64;
    let look = async |target: RestoreTarget| {
        let plan = house.backup.restore_plan(target).await.unwrap();
        // All of it is in memory now.
        fs::read(directory.join("base/1/large")).unwrap();
        let before = read_from_disk();
        let (_, reused_bytes) = compared(&plan).await;
        assert!(reused_bytes > large - 20_000, "{reused_bytes}");
        (plan.resumes, read_from_disk() - before)
    };
    let (_, read) = look(replacing(&directory)).await;
    assert!(read >= large, "the disk may say something else than memory: {read} bytes read");
    let (_, read) = look(believing(&directory)).await;
    assert!(read < large / 4, "memory may answer: {read} bytes read");
    // What an interrupted restore could not write may be right in memory.
    fs::remove_file(directory.join("base/1/small40")).unwrap();
    assert_eq!(interrupted(&house, believing(&directory), Failure::After(1)).await, None);
    let (resumes, read) = look(believing(&directory)).await;
    assert!(resumes && read >= large, "memory answered after an interruption: {read} bytes read");
}
