//! The WAL archive: what is stored once comes back as it was or not at all, and what is there is told exactly.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::common::{Bench, NOW_MS, noise};
use async_trait::async_trait;
use bytes::Bytes;
use proto::wal::{History, Segment, WalFileName};
use proto::{Code, Failure, Lsn, SystemIdentifier, Timeline};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Listed, PutOutcome, Store, StoreError};
use repository::{
    CheckLevel, Error, Repository, ScrubOptions, ScrubReport, WalAbsence, WalDigest, WalGap,
    WalStored,
};

const MIB: u64 = 1 << 20;

fn file(name: &str) -> WalFileName {
    name.parse().unwrap()
}

/// A segment of 1 MiB that half compresses.
fn content(seed: u64) -> Bytes {
    let mut bytes = noise(seed, 1 << 20);
    bytes[1 << 19..].fill(0);
    bytes.into()
}

fn path(bench: &Bench, place: &str) -> PathBuf {
    bench.store_path().join(format!("lineages/{}/wal/{place}", bench.lineage))
}

async fn store(bench: &Bench, name: &str, content: Bytes) -> Result<WalStored, Error> {
    bench.repository.store_wal(bench.lineage, &file(name), content).await
}

async fn fetch(bench: &Bench, name: &str) -> Result<Option<Bytes>, Error> {
    bench.repository.fetch_wal(bench.lineage, &file(name)).await
}

#[tokio::test]
async fn the_same_content_again_succeeds_and_other_content_is_refused_and_kept_aside() {
    let bench = Bench::new().await;
    let name = "0000000A00000000000000FF";
    assert_eq!(fetch(&bench, name).await.unwrap(), None);
    assert_eq!(store(&bench, name, content(1)).await.unwrap(), WalStored::Created);
    assert_eq!(store(&bench, name, content(1)).await.unwrap(), WalStored::AlreadyThere);
    for _ in 0..2 {
        let error = store(&bench, name, content(2)).await.unwrap_err();
        assert!(error.to_string().contains(&format!("conflicts/{name}/1")), "{error}");
        assert_eq!(Failure::from(error).code, Code::WalConflict);
    }
    assert_eq!(fetch(&bench, name).await.unwrap(), Some(content(1)));
    for seed in 3..=10 {
        let error = store(&bench, name, content(seed)).await.unwrap_err();
        let kept = if seed < 10 {
            format!("/{}", seed - 1)
        } else {
            "8 others were kept before it".to_owned()
        };
        assert!(error.to_string().contains(&kept), "{error}");
    }
    let inventory = bench.repository.list_wal(bench.lineage).await.unwrap();
    assert_eq!(inventory.conflicts, [file(name)]);
    assert_eq!(std::fs::read_dir(path(&bench, "conflicts").join(name)).unwrap().count(), 8);
    // Whoever holds a content knows it again without reading the object.
    let digest = |seed| WalDigest::read(content(seed).as_ref()).unwrap();
    let segment = name.parse().unwrap();
    assert_eq!(bench.repository.wal_digest(bench.lineage, segment).await.unwrap(), Some(digest(1)));
    assert_ne!(digest(1), digest(2));
    assert!(bench.repository.has_wal_conflict(bench.lineage, segment).await.unwrap());
    let other = "0000000A0000000100000000".parse().unwrap();
    assert_eq!(bench.repository.wal_digest(bench.lineage, other).await.unwrap(), None);
    assert!(!bench.repository.has_wal_conflict(bench.lineage, other).await.unwrap());
}

#[tokio::test]
async fn writers_at_the_same_time_have_one_winner_and_the_others_hear_of_it() {
    let bench = Bench::new().await;
    let writers = (0..6).map(|writer| {
        let (repository, lineage) = (bench.repository.clone(), bench.lineage);
        let name = file("000000010000000000000001");
        tokio::spawn(async move {
            (writer % 2, repository.store_wal(lineage, &name, content(writer % 2)).await)
        })
    });
    let mut told = Vec::new();
    for writer in writers.collect::<Vec<_>>() {
        told.push(writer.await.unwrap());
    }
    let there = fetch(&bench, "000000010000000000000001").await.unwrap().unwrap();
    for (seed, told) in told {
        assert_eq!(told.is_ok(), there == content(seed), "{seed}: {told:?}");
    }
}

#[tokio::test]
async fn what_is_changed_cut_swapped_or_of_another_lineage_is_never_served() {
    let bench = Bench::new().await;
    let names = ["000000010000000000000001", "000000010000000000000002"];
    for (seed, name) in (1..).zip(names) {
        store(&bench, name, content(seed)).await.unwrap();
    }
    store(&bench, names[0], content(9)).await.unwrap_err();
    let [first, second] = names.map(|name| path(&bench, &format!("00000001/{name}")));
    let whole = std::fs::read(&first).unwrap();
    let refused = async |what: &str| {
        let error = fetch(&bench, names[0]).await.unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{what}: {error}");
        // Nor is it taken for durable when the server sends it again.
        store(&bench, names[0], content(1)).await.unwrap_err();
    };
    for at in [0, 9, 50, 100, 144, 180, 250, whole.len() / 2, whole.len() - 30, whole.len() - 1] {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        std::fs::write(&first, changed).unwrap();
        refused(&format!("byte {at} is changed")).await;
    }
    for length in [0, 1, 150, 200, whole.len() - 1] {
        std::fs::write(&first, &whole[..length]).unwrap();
        refused(&format!("cut to {length} bytes")).await;
    }
    std::fs::copy(&second, &first).unwrap();
    refused("another segment").await;
    std::fs::copy(path(&bench, &format!("conflicts/{}/1", names[0])), &first).unwrap();
    refused("what was refused before").await;
    std::fs::write(&first, &whole).unwrap();
    assert_eq!(fetch(&bench, names[0]).await.unwrap(), Some(content(1)));

    let other = bench
        .repository
        .find_or_mint_lineage(&"other".parse().unwrap(), SystemIdentifier(8), NOW_MS)
        .await
        .unwrap();
    let there = bench.store_path().join(format!("lineages/{}/wal/00000001", other.lineage));
    std::fs::create_dir_all(&there).unwrap();
    std::fs::copy(&first, there.join(names[0])).unwrap();
    let error = bench.repository.fetch_wal(other.lineage, &file(names[0])).await.unwrap_err();
    assert!(matches!(error, Error::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn an_unfinished_segment_never_stands_for_the_whole_one() {
    let bench = Bench::new().await;
    let name = "000000010000000000000005";
    store(&bench, &format!("{name}.partial"), content(1)).await.unwrap();
    assert_eq!(fetch(&bench, name).await.unwrap(), None);
    assert_eq!(fetch(&bench, &format!("{name}.partial")).await.unwrap(), Some(content(1)));
    let inventory = bench.repository.list_wal(bench.lineage).await.unwrap();
    let wal = &inventory.timelines[&Timeline(1)];
    assert!(wal.runs.is_empty() && wal.partials.len() == 1, "{inventory:?}");
    let segment = Segment { timeline: Timeline(1), number: 4 }.name(1 << 20);
    let absence = async || bench.repository.wal_absence(bench.lineage, segment).await.unwrap();
    assert_eq!(absence().await, WalAbsence::End);
    store(&bench, "000000010000000000000005", content(1)).await.unwrap();
    assert_eq!(absence().await, WalAbsence::Gap);
}

#[tokio::test]
async fn nothing_is_missing_for_certain_where_the_repository_is_not() {
    let bench = Bench::new().await;
    let name = "000000010000000000000001";
    assert_eq!(fetch(&bench, name).await.unwrap(), None);
    let (here, away) = (bench.store_path(), bench.directory.path().join("away"));
    std::fs::rename(&here, &away).unwrap();
    fetch(&bench, name).await.unwrap_err();
    let segment = Segment { timeline: Timeline(1), number: 1 }.name(1 << 20);
    bench.repository.wal_absence(bench.lineage, segment).await.unwrap_err();
    bench.repository.list_wal(bench.lineage).await.unwrap_err();
    // A mount point without what is to be mounted there.
    std::fs::create_dir(&here).unwrap();
    fetch(&bench, name).await.unwrap_err();
    bench.repository.list_wal(bench.lineage).await.unwrap_err();
}

#[tokio::test]
async fn the_inventory_tells_runs_gaps_sizes_and_where_timelines_were_left() {
    let bench = Bench::new().await;
    for name in [
        "000000010000000000000FFE",
        "000000010000000000000FFF",
        "000000010000000100000000",
        "000000010000000100000002",
        "0000000A0000000100000000",
        "0000000A0000000100000001",
    ] {
        store(&bench, name, content(7)).await.unwrap();
    }
    let history = "1\t1/80000\tno recovery target specified\n";
    store(&bench, "0000000A.history", history.into()).await.unwrap();
    store(&bench, "000000010000000000000FFE.00000028.backup", "label".into()).await.unwrap();
    let inventory = bench.repository.list_wal(bench.lineage).await.unwrap();
    assert_eq!(inventory.damaged, []);
    let first = &inventory.timelines[&Timeline(1)];
    let runs: Vec<_> = first.runs.iter().map(|run| (run.from.0 / MIB, run.to.0 / MIB)).collect();
    assert_eq!((first.segment_size, runs), (1 << 20, vec![(0xffe, 0x1001), (0x1002, 0x1003)]));
    let has = |timeline, number| {
        let segment = Segment { timeline: Timeline(timeline), number };
        (inventory.has(segment, 1 << 20), inventory.has(segment, 1 << 24))
    };
    assert_eq!(has(1, 0x1000), (true, false));
    assert_eq!(has(1, 0x1001), (false, false));
    assert_eq!(has(10, 0x1001), (true, false));
    let gap = |from, to| WalGap { timeline: Timeline(1), from: Lsn(from), to: Lsn(to) };
    assert_eq!(inventory.gaps(), [gap(0x1001 * MIB, 0x1002 * MIB)]);
    let ancestor = (Timeline(1), Lsn(0x1_0008_0000));
    assert!(inventory.shows(ancestor.0, ancestor.1));

    // A segment that is deleted is a gap; one that is damaged hides nobody's size; a history that is damaged is told.
    std::fs::remove_file(path(&bench, "00000001/000000010000000000000FFF")).unwrap();
    for place in ["00000001/000000010000000000000FFE", "0000000A/0000000A.history"] {
        let mut bytes = std::fs::read(path(&bench, place)).unwrap();
        bytes[150] ^= 1;
        std::fs::write(path(&bench, place), bytes).unwrap();
    }
    let inventory = bench.repository.list_wal(bench.lineage).await.unwrap();
    assert_eq!(inventory.timelines[&Timeline(1)].runs.len(), 3);
    assert_eq!(inventory.gaps().len(), 2);
    let mut damaged: Vec<_> = inventory.damaged.iter().map(|(file, _)| file.to_string()).collect();
    damaged.sort();
    assert_eq!(damaged, ["000000010000000000000FFE", "0000000A.history"]);
    assert!(!inventory.shows(ancestor.0, ancestor.1));
}

#[tokio::test]
async fn a_check_reads_the_archive_too() {
    let bench = Bench::new().await;
    let name = "000000010000000000000001";
    store(&bench, name, content(1)).await.unwrap();
    store(&bench, name, content(2)).await.unwrap_err();
    let checked = async |level| {
        let mut report = ScrubReport::default();
        bench.repository.scrub(&ScrubOptions::new(level, NOW_MS), &mut report).await.unwrap();
        report
    };
    let report = checked(CheckLevel::Decrypt).await;
    assert!(report.is_sound() && report.foreign.is_empty(), "{report:?}");
    assert_eq!(report.lineages[0].wal.files, 2);

    let place = path(&bench, &format!("00000001/{name}"));
    let whole = std::fs::read(&place).unwrap();
    let found = async |level| {
        let report = checked(level).await;
        report.damaged.iter().any(|damage| place.ends_with(&damage.object))
    };
    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    std::fs::write(&place, changed).unwrap();
    assert!(found(CheckLevel::Read).await && found(CheckLevel::Decrypt).await);
    // An object that is sound in itself and lies at another's place needs the key to be found.
    std::fs::copy(path(&bench, &format!("conflicts/{name}/1")), &place).unwrap();
    assert!(!found(CheckLevel::Read).await && found(CheckLevel::Decrypt).await);
}

/// A directory that is too large to be listed.
#[derive(Debug)]
struct Endless(DirectoryStore);

#[async_trait]
impl Layer for Endless {
    fn inner(&self) -> &dyn Store {
        &self.0
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        // Those are few.
        if prefix.ends_with("/wal/floor/") {
            return self.0.list(prefix).await;
        }
        let source = "it never ends".into();
        Err(StoreError::Unavailable { operation: "list", key: prefix.to_owned(), source })
    }
}

#[tokio::test]
async fn whether_there_is_more_is_told_without_a_list_of_all_there_is() {
    let bench = Bench::new().await;
    for name in [
        "00000001000000000000000F",
        "00000001000000000000000F.00000028.backup",
        "00000001000000000000000F.partial",
        "000000010000000000000010.partial",
    ] {
        store(&bench, name, content(1)).await.unwrap();
    }
    let endless = Endless(DirectoryStore::new(bench.store_path()));
    let endless = Repository::open(Arc::new(endless), Some(&bench.key)).await.unwrap();
    for (number, expected) in
        [(0x0e, WalAbsence::Gap), (0x0f, WalAbsence::End), (0x10, WalAbsence::End)]
    {
        let segment = Segment { timeline: Timeline(1), number }.name(1 << 20);
        let told = endless.wal_absence(bench.lineage, segment).await.unwrap();
        assert_eq!(told, expected, "{segment}");
    }
    for (timeline, any) in [(1, true), (2, false)] {
        let told = endless.has_wal_of(bench.lineage, Timeline(timeline)).await.unwrap();
        assert_eq!(told, any, "timeline {timeline}");
    }
}

#[tokio::test]
async fn the_histories_of_later_timelines_are_read_or_nothing_is_certain() {
    let bench = Bench::new().await;
    for (name, text) in
        [("00000002.history", "1\t0/500000\tx\n"), ("0000000A.history", "2\t0/900000\tx\n")]
    {
        store(&bench, name, text.into()).await.unwrap();
    }
    let after = async |timeline| {
        let histories = bench.repository.wal_histories_after(bench.lineage, Timeline(timeline));
        let timelines =
            |all: Vec<History>| all.iter().map(|one| one.timeline.0).collect::<Vec<_>>();
        histories.await.map(timelines)
    };
    assert_eq!(after(1).await.unwrap(), [2, 10]);
    assert_eq!(after(2).await.unwrap(), [10]);
    assert_eq!(after(10).await.unwrap(), [0; 0]);
    let object = path(&bench, "0000000A/0000000A.history");
    let sound = std::fs::read(&object).unwrap();
    std::fs::write(&object, &sound[..sound.len() - 1]).unwrap();
    after(2).await.unwrap_err();
    assert_eq!(after(10).await.unwrap(), [0; 0]);
    std::fs::rename(bench.store_path(), bench.directory.path().join("away")).unwrap();
    after(10).await.unwrap_err();
}

/// A directory whose answer to a conditional put is lost, after it was or was not carried out.
#[derive(Debug)]
struct Unheard {
    store: DirectoryStore,
    is_carried_out: Arc<AtomicBool>,
}

#[async_trait]
impl Layer for Unheard {
    fn inner(&self) -> &dyn Store {
        &self.store
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        if self.is_carried_out.load(Ordering::SeqCst) {
            self.store.put_if_absent(key, bytes).await?;
        }
        let source = "the line is cut".into();
        Err(StoreError::Unavailable { operation: "put", key: key.to_owned(), source })
    }
}

#[tokio::test]
async fn an_answer_that_was_lost_is_a_success_only_when_the_content_is_there() {
    let bench = Bench::new().await;
    let is_carried_out = Arc::new(AtomicBool::new(false));
    let store = Unheard {
        store: DirectoryStore::new(bench.store_path()),
        is_carried_out: Arc::clone(&is_carried_out),
    };
    let cut = Repository::open(Arc::new(store), Some(&bench.key)).await.unwrap();
    let name = file("000000010000000000000001");
    let error = cut.store_wal(bench.lineage, &name, content(1)).await.unwrap_err();
    assert_eq!(Failure::from(error).code, Code::StoreUnavailable);
    is_carried_out.store(true, Ordering::SeqCst);
    cut.store_wal(bench.lineage, &name, content(1)).await.unwrap();
    assert_eq!(fetch(&bench, &name.to_string()).await.unwrap(), Some(content(1)));
    let error = cut.store_wal(bench.lineage, &name, content(2)).await.unwrap_err();
    assert!(matches!(error, Error::WalConflict { .. } | Error::Store(_)), "{error}");
}
