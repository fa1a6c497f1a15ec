//! A check of a whole repository: each pack is read once, in one slice; damage is told with the backups that need it; and
//! what was found damaged is stored again by the next backup.

#![expect(clippy::unwrap_used, reason = "helpers of tests: what cannot be set up has failed")]

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{self, Bench, DAY_MS, NOW_MS, SharedTree, Tree, noise};
use async_trait::async_trait;
use bytes::Bytes;
use proto::{Action, Code, Failure};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Listed, Store, StoreError};
use repository::{
    CheckLevel, CheckOptions, Error, Repository, ScrubOptions, ScrubReport, Slice, Source,
    SourceEntry, WriteOptions,
};

fn options(level: CheckLevel) -> ScrubOptions {
    ScrubOptions::new(level, NOW_MS + 30 * DAY_MS)
}

fn marking(level: CheckLevel) -> ScrubOptions {
    ScrubOptions { mark: Some("tester".into()), ..options(level) }
}

async fn scrub(repository: &Repository, options: &ScrubOptions) -> ScrubReport {
    let mut report = ScrubReport::default();
    repository.scrub(options, &mut report).await.unwrap();
    report
}

fn tree() -> Arc<Tree> {
    let tree = Tree::new().directory("d").file("d/a", noise(1, 30_000));
    Arc::new(tree.file("d/large", noise(2, 300_000)).file("d/zeros", vec![0; 40_000]))
}

/// The packs of a type, which stands in their header.
fn packs(bench: &Bench, kind: u8) -> Vec<PathBuf> {
    let mut packs = common::files_below(&bench.store_path());
    packs.retain(|path| path.to_str().unwrap().contains("/packs/"));
    packs.retain(|path| std::fs::read(path).unwrap()[9] == kind);
    packs
}

fn rot(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

fn named(report: &ScrubReport) -> Vec<&str> {
    report.damaged.iter().map(|damage| damage.object.as_str()).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_several_backups_need_is_read_once() {
    let bench = Bench::new().await;
    let tree = tree();
    for (n, seed) in (0..4).zip(10..) {
        bench.back_up(&tree, NOW_MS + n).await;
        tree.write("d/a", 9_000, &noise(seed, 100));
    }
    for level in
        [CheckLevel::Inventory, CheckLevel::Manifest, CheckLevel::Read, CheckLevel::Decrypt]
    {
        let report = scrub(&bench.repository, &options(level)).await;
        assert!(report.is_sound() && report.foreign.is_empty(), "{report:#?}");
        let [row] = report.lineages.as_slice() else { panic!("{report:#?}") };
        assert_eq!((row.backups, row.cluster.as_ref().unwrap().as_str()), (4, "orders"));
        assert_eq!(row.unreferenced.packs, 0);
        let all = [1, 2, 3].map(|kind| packs(&bench, kind).len() as u64);
        assert_eq!(row.needed.packs, all.iter().sum::<u64>());
        if level >= CheckLevel::Read {
            assert_eq!(row.read, row.needed, "each once");
        } else {
            assert_eq!(row.read.packs, 0);
        }
        assert_eq!(row.frames > 0, level == CheckLevel::Decrypt);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_slices_together_read_everything_and_one_of_them_finds_the_damage() {
    let bench = Bench::new().await;
    let tree = tree();
    for (n, seed) in (0..5).zip(10..) {
        bench.back_up(&tree, NOW_MS + n).await;
        tree.write("d/a", 9_000, &noise(seed, 100));
    }
    let rotten = packs(&bench, 1).pop().unwrap();
    rot(&rotten);
    let (mut read, mut needed, mut finders) = (0, 0, 0);
    for n in 1..=3 {
        let slice = Slice::new(n, 3).unwrap();
        let report =
            scrub(&bench.repository, &ScrubOptions { slice, ..options(CheckLevel::Decrypt) }).await;
        read += report.lineages[0].read.packs;
        needed = report.lineages[0].needed.packs;
        for damage in &report.damaged {
            assert!(rotten.to_str().unwrap().ends_with(&damage.object), "{damage:?}");
            assert!(!damage.backups.is_empty());
            finders += 1;
        }
    }
    assert_eq!((read, finders), (needed, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_check_found_damaged_is_stored_again_by_the_next_backup() {
    let bench = Bench::new().await;
    let tree = tree();
    let first = bench.back_up(&tree, NOW_MS).await;
    let of_first = packs(&bench, 1);
    tree.write("d/a", 9_000, b"changed");
    let second = bench.back_up(&tree, NOW_MS + 1).await;
    let (sound, originals): (Vec<_>, Vec<_>) =
        of_first.iter().map(|pack| (pack.clone(), std::fs::read(pack).unwrap())).unzip();
    // What both refer to.
    for pack in &of_first {
        rot(pack);
    }
    // Nobody has looked: the damage is inherited.
    let third = bench.back_up(&tree, NOW_MS + 2).await;
    assert_eq!(third.predecessor, Some(second.backup));
    common::restore(&bench.open(&third).await).await.unwrap_err();

    let report = scrub(&bench.repository, &marking(CheckLevel::Read)).await;
    assert_eq!(report.damaged.len(), of_first.len(), "{report:#?}");
    let all = [first.backup, second.backup, third.backup];
    assert!(report.damaged.iter().any(|damage| damage.backups == all), "{report:#?}");
    assert_eq!(report.not_marked, None);
    // One that reads nothing remembers.
    let later = scrub(&bench.repository, &options(CheckLevel::Inventory)).await;
    assert_eq!(named(&later), named(&report));
    assert!(later.damaged[0].what.contains("an earlier check of tester"), "{later:#?}");

    // Files whose times say that nothing changed are read as well, and what is sound is not stored again.
    let fourth = bench.back_up(&tree, NOW_MS + 3).await;
    assert_eq!(fourth.predecessor, Some(third.backup));
    assert_eq!(bench.restore(&fourth).await, tree.expected());
    assert!(fourth.packs_reused > 0, "{fourth:?}");
    let checked = bench.open(&fourth).await.check_decrypt(CheckOptions::default()).await.unwrap();
    assert!(checked.is_sound(), "{checked:?}");
    let fifth = bench.back_up(&tree, NOW_MS + 4).await;
    assert!(fifth.counts.stored_bytes < fourth.counts.stored_bytes / 2, "once is enough");
    assert_eq!(bench.restore(&fifth).await, tree.expected());

    // Somebody brings the packs back: the marks go, and nothing is damaged any more.
    for (pack, original) in sound.iter().zip(originals) {
        std::fs::write(pack, original).unwrap();
    }
    assert!(scrub(&bench.repository, &marking(CheckLevel::Decrypt)).await.is_sound());
    assert!(scrub(&bench.repository, &options(CheckLevel::Inventory)).await.is_sound());
    assert_eq!(bench.restore(&third).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mark_on_what_is_sound_costs_storage_and_no_backup() {
    let bench = Bench::new().await;
    let tree = tree();
    let first = bench.back_up(&tree, NOW_MS).await;
    // Of metadata, as whoever may write there can leave one, or a check whose store answered wrongly that day.
    let marks = bench.store_path().join(format!("lineages/{}/damaged", bench.lineage));
    std::fs::create_dir(&marks).unwrap();
    for pack in packs(&bench, 2) {
        std::fs::write(marks.join(pack.file_name().unwrap()), "no note").unwrap();
    }
    let second = bench.back_up(&tree, NOW_MS + 1).await;
    assert_eq!((second.predecessor, second.packs_reused), (None, 0));
    assert_eq!(bench.restore(&second).await, tree.expected());
    let third = bench.back_up(&tree, NOW_MS + 2).await;
    assert_eq!(third.predecessor, Some(second.backup));
    assert_eq!(bench.restore(&first).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_was_begun_before_the_damage_was_found_does_not_count() {
    let bench = Bench::new().await;
    let tree = tree();
    bench.back_up(&tree, NOW_MS).await;
    let attempt = bench.begin(NOW_MS + 1).await;
    assert!(attempt.predecessor().is_some());
    let continuity = Some("here".to_owned());
    let mut writer = attempt.write(WriteOptions { continuity, ..WriteOptions::default() }).unwrap();
    let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(&tree)));
    writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await.unwrap();
    let late = vec![SourceEntry::bytes("backup_label", 0o600, "START")];
    let written = writer.finish(source, late, common::facts()).await.unwrap();
    for pack in packs(&bench, 1) {
        rot(&pack);
    }
    assert!(!scrub(&bench.repository, &marking(CheckLevel::Read)).await.is_sound());
    let refused = written.commit(NOW_MS + 2).await.unwrap_err();
    assert!(matches!(&refused, Error::Incomplete { reason, .. } if reason.contains("damaged")));
    assert_eq!(Failure::from(refused).action, Action::Retry);
    let again = bench.back_up(&tree, NOW_MS + 3).await;
    assert_eq!(bench.restore(&again).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_odd_is_named_and_what_is_lost_is_damage() {
    let bench = Bench::new().await;
    let tree = tree();
    let first = bench.back_up(&tree, NOW_MS).await;
    let open = bench.begin(NOW_MS + 1).await;
    let path = |rest: &str| bench.store_path().join(rest);
    std::fs::write(path("readme"), "not ours").unwrap();
    let report = scrub(&bench.repository, &options(CheckLevel::Decrypt)).await;
    assert!(report.is_sound(), "{report:#?}");
    assert_eq!(report.foreign, ["readme"]);
    assert_eq!(report.lineages[0].open.len(), 1);
    assert_eq!(report.lineages[0].open[0].attempt, open.id());
    // What has just begun is not worth a word.
    let early = ScrubOptions { now_ms: NOW_MS + DAY_MS, ..options(CheckLevel::Inventory) };
    assert!(scrub(&bench.repository, &early).await.lineages[0].open.is_empty());

    // A lineage without its identity is not listed: nobody would miss its backups.
    let identity = path(&format!("lineages/{}/identity", bench.lineage));
    let bytes = std::fs::read(&identity).unwrap();
    std::fs::remove_file(&identity).unwrap();
    assert!(bench.repository.list_lineages().await.unwrap().is_empty());
    let report = scrub(&bench.repository, &options(CheckLevel::Inventory)).await;
    assert_eq!(named(&report), [format!("lineages/{}/identity", bench.lineage)]);
    assert_eq!(report.lineages[0].backups, 1, "they are looked at all the same");
    std::fs::write(&identity, bytes).unwrap();

    // A pack that is gone, and the backup that needs it.
    let gone = packs(&bench, 3).pop().unwrap();
    std::fs::remove_file(gone).unwrap();
    let report = scrub(&bench.repository, &options(CheckLevel::Inventory)).await;
    let [damage] = report.damaged.as_slice() else { panic!("{report:#?}") };
    assert_eq!(
        (damage.what.as_str(), damage.backups.as_slice()),
        ("it is missing", &[first.backup][..])
    );
    assert_eq!(damage.cluster.as_ref().unwrap().as_str(), "orders");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_cluster_that_was_asked_for_is_looked_at() {
    let bench = Bench::new().await;
    bench.back_up(&tree(), NOW_MS).await;
    std::fs::write(bench.store_path().join("readme"), "not ours").unwrap();
    let of = |cluster: &str| ScrubOptions {
        cluster: Some(cluster.parse().unwrap()),
        ..options(CheckLevel::Read)
    };
    let report = scrub(&bench.repository, &of("orders")).await;
    assert_eq!((report.lineages.len(), report.foreign.len()), (1, 0));
    assert!(scrub(&bench.repository, &of("billing")).await.lineages.is_empty());
}

/// A directory in which a verb fails from some moment on.
#[derive(Debug)]
struct Failing {
    inner: DirectoryStore,
    lists: AtomicBool,
    reads: AtomicBool,
}

fn fails(switch: &AtomicBool, key: &str) -> Result<(), StoreError> {
    if !switch.load(Ordering::SeqCst) {
        return Ok(());
    }
    let source = "a page of it did not come".into();
    Err(StoreError::Unavailable { operation: "list", key: key.into(), source })
}

#[async_trait]
impl Layer for Failing {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        fails(&self.reads, key)?;
        self.inner.get_range(key, range).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let listed = self.inner.list(prefix).await?;
        fails(&self.lists, prefix)?;
        Ok(listed)
    }
    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let names = self.inner.list_directories(prefix).await?;
        fails(&self.lists, prefix)?;
        Ok(names)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_does_not_answer_is_an_error_and_no_damage() {
    let bench = Bench::new().await;
    bench.back_up(&tree(), NOW_MS).await;
    let failing = Arc::new(Failing {
        inner: DirectoryStore::new(bench.store_path()),
        lists: false.into(),
        reads: false.into(),
    });
    let store: Arc<dyn Store> = Arc::<Failing>::clone(&failing);
    let repository = Repository::open(store, Some(&bench.key)).await.unwrap();
    let ended = async |options: &ScrubOptions| {
        let mut report = ScrubReport::default();
        let error = repository.scrub(options, &mut report).await.unwrap_err();
        assert!(report.is_sound(), "nothing is called missing or damaged: {report:#?}");
        error
    };
    failing.lists.store(true, Ordering::SeqCst);
    for cluster in [None, Some("orders".parse().unwrap())] {
        let options = ScrubOptions { cluster, ..marking(CheckLevel::Inventory) };
        let failure = Failure::from(ended(&options).await);
        assert_eq!((failure.code, failure.action), (Code::StoreUnavailable, Action::Retry));
    }
    failing.lists.store(false, Ordering::SeqCst);
    failing.reads.store(true, Ordering::SeqCst);
    for level in [CheckLevel::Manifest, CheckLevel::Read, CheckLevel::Decrypt] {
        assert!(matches!(ended(&marking(level)).await, Error::Store(_)));
    }
    // And a check that is cancelled says so.
    let cancelled = options(CheckLevel::Decrypt);
    cancelled.cancel.cancel();
    assert!(matches!(ended(&cancelled).await, Error::Cancelled));
    failing.reads.store(false, Ordering::SeqCst);
    assert!(scrub(&repository, &options(CheckLevel::Decrypt)).await.is_sound());
}
