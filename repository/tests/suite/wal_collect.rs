//! Collecting archived WAL: what a backup that is there could need stays, whoever is interrupted wherever, and what is gone is
//! never taken for the end of the log.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use crate::common::{self, Bench, DAY_MS, NOW_MS, collect_options, segment, wal_name};
use crate::interrupted::{Interrupted, Turn};
use crate::lab;
use async_trait::async_trait;
use bytes::Bytes;
use proto::Timeline;
use proto::wal::{SegmentName, WalFileName};
use repository::store::layer::Layer;
use repository::store::{Listed, Store, StoreError};
use repository::{
    BackupSummary, CheckLevel, CollectPlan, CollectSummary, Collected, Error, Repository,
    ScrubOptions, ScrubReport, WalAbsence, WalBound, WalStored, Wish,
};

/// Late enough for everything that was given up or left open at [`NOW_MS`].
const LATER_MS: i64 = NOW_MS + 5 * DAY_MS;
const HISTORY: &str = "1\t0/700000\tno recovery target specified\n";

fn name(timeline: u32, number: u64) -> SegmentName {
    wal_name(timeline, number).parse().unwrap()
}

async fn plan(bench: &Bench) -> Result<CollectPlan, Error> {
    bench.repository.plan_collection(bench.lineage, &collect_options(LATER_MS)).await
}

async fn collect(bench: &Bench) -> Result<Collected, Error> {
    plan(bench).await?.collect(&collect_options(LATER_MS)).await
}

async fn done(bench: &Bench) -> CollectSummary {
    match collect(bench).await.unwrap() {
        Collected::Done(done) => done,
        other => panic!("{other:?}"),
    }
}

async fn give_up(bench: &Bench, backup: &BackupSummary) {
    let wish = Wish { by: "tester".into(), why: String::new(), at_ms: NOW_MS };
    bench.repository.forget(bench.lineage, backup.backup, &wish).await.unwrap();
}

/// What is below the archive, by its names there, the notes about it left out.
async fn archived(bench: &Bench) -> Vec<String> {
    let prefix = format!("lineages/{}/wal/", bench.lineage);
    let objects = bench.repository.store().list(&prefix).await.unwrap();
    let names = objects.iter().map(|object| object.key.strip_prefix(&prefix).unwrap().to_owned());
    names.filter(|name| !name.starts_with("floor/")).collect()
}

async fn floors(bench: &Bench) -> Vec<String> {
    let prefix = format!("lineages/{}/wal/floor/", bench.lineage);
    let objects = bench.repository.store().list(&prefix).await.unwrap();
    objects.iter().map(|object| object.key.strip_prefix(&prefix).unwrap().to_owned()).collect()
}

fn floor(timeline: u32, number: u64) -> String {
    format!("{timeline:08X}/{:016X}", name(timeline, number).rank())
}

async fn absence(bench: &Bench, timeline: u32, number: u64) -> WalAbsence {
    let file = WalFileName::Segment(name(timeline, number));
    assert_eq!(bench.repository.fetch_wal(bench.lineage, &file).await.unwrap(), None, "{file}");
    bench.repository.wal_absence(bench.lineage, name(timeline, number)).await.unwrap()
}

async fn has(bench: &Bench, timeline: u32, number: u64) -> bool {
    let file = WalFileName::Segment(name(timeline, number));
    let there = bench.repository.fetch_wal(bench.lineage, &file).await.unwrap();
    there.is_some_and(|content| content == segment(timeline, number))
}

/// Two timelines: the first was left in segment 7 and went on for a while.
async fn two_timelines(bench: &Bench) {
    bench.archive(1, 3..=9).await;
    bench.archive(2, 7..=12).await;
    bench.archive_one("00000002.history", HISTORY.into()).await.unwrap();
    for (timeline, number) in [(1, 4), (2, 8)] {
        let other = segment(9, number);
        bench.archive_one(&wal_name(timeline, number), other).await.unwrap_err();
    }
    let label = format!("{}.00000028.backup", wal_name(1, 5));
    bench.archive_one(&label, "label".into()).await.unwrap();
    bench.archive_one(&format!("{}.partial", wal_name(1, 7)), segment(1, 7)).await.unwrap();
}

#[tokio::test]
async fn wal_before_the_oldest_backup_goes_on_every_timeline_and_all_else_stays() {
    let bench = Bench::new().await;
    two_timelines(&bench).await;
    bench.back_up_from(2, 9, NOW_MS).await;
    // Made later, from further back: the position decides, and not the time.
    let older = bench.back_up_from(1, 5, NOW_MS + 1_000).await;
    bench.back_up_from(2, 10, NOW_MS + 2_000).await;
    let before = archived(&bench).await;

    let planned = plan(&bench).await.unwrap().wal;
    let at = WalBound::Before { segment: name(1, 5), backup: older.backup, segment_bytes: 1 << 20 };
    assert_eq!((planned.bound, planned.last), (at, Some(name(1, 4))));
    assert_eq!((planned.delete.files, planned.keep.files), (3, before.len() as u64 - 3));
    let first = done(&bench).await;
    assert_eq!((first.wal, first.deleted.packs), (planned.delete, 0));
    let gone = |left: &[String]| -> Vec<String> {
        before.iter().filter(|name| !left.contains(name)).cloned().collect()
    };
    let left = archived(&bench).await;
    let conflict = format!("conflicts/{}/1", wal_name(1, 4));
    let file = |number| format!("00000001/{}", wal_name(1, number));
    assert_eq!(gone(&left), [file(3), file(4), conflict]);
    assert_eq!(collect(&bench).await.unwrap(), Collected::Nothing);

    // Given up is not gone: its WAL stays until it is. Then both go at once.
    give_up(&bench, &older).await;
    let early =
        bench.repository.plan_collection(bench.lineage, &collect_options(NOW_MS)).await.unwrap();
    assert_eq!(early.wal.delete.files, 0);
    let second = done(&bench).await;
    assert_eq!((second.backups, second.wal.files), (vec![older.backup], 4 + 1 + 1 + 2 + 1));
    let left = archived(&bench).await;
    let mut expected: Vec<String> = [1, 2]
        .into_iter()
        .flat_map(|timeline| {
            let last = if timeline == 1 { 9 } else { 12 };
            (9..=last).map(move |number| format!("{timeline:08X}/{}", wal_name(timeline, number)))
        })
        .chain(["00000002/00000002.history".to_owned()])
        .collect();
    expected.sort();
    assert_eq!(left, expected);
    assert_eq!(floors(&bench).await, [floor(1, 9), floor(2, 9)]);

    // What is gone is gone, and no end of the log: not even where nothing follows.
    let below = |timeline| WalAbsence::Collected { below: name(timeline, 9) };
    assert_eq!(absence(&bench, 1, 4).await, below(1));
    assert_eq!(absence(&bench, 2, 8).await, below(2));
    assert_eq!(absence(&bench, 1, 10).await, WalAbsence::End);
    // Of a timeline that never was nothing went.
    assert_eq!(absence(&bench, 3, 8).await, WalAbsence::End);
    assert_eq!(absence(&bench, 2, 13).await, WalAbsence::End);
    let inventory = bench.repository.list_wal(bench.lineage).await.unwrap();
    assert_eq!((inventory.gaps(), inventory.damaged), (vec![], vec![]));
    let mut report = ScrubReport::default();
    let how = ScrubOptions::new(CheckLevel::Decrypt, NOW_MS);
    bench.repository.scrub(&how, &mut report).await.unwrap();
    assert!(report.is_sound() && report.foreign.is_empty(), "{report:?}");
}

/// A recovery to an earlier moment goes on before the oldest backup that stays: what its timeline never had is no loss, however
/// far others had come when they were collected.
#[tokio::test]
async fn a_timeline_that_begins_before_what_was_collected_ends_where_it_ends() {
    let bench = Bench::new().await;
    bench.archive(1, 5..=24).await;
    let first = bench.back_up_from(1, 5, NOW_MS).await;
    let second = bench.back_up_from(1, 20, NOW_MS + 1_000).await;
    bench.archive(2, 8..=9).await;
    bench.archive_one("00000002.history", "1\t0/880000\tx\n".into()).await.unwrap();
    give_up(&bench, &first).await;
    assert_eq!(done(&bench).await.wal.files, 15 + 2);
    assert_eq!(floors(&bench).await, [floor(1, 20), floor(2, 10)]);
    let below = |timeline, number| WalAbsence::Collected { below: name(timeline, number) };
    assert_eq!(absence(&bench, 1, 8).await, below(1, 20));
    assert_eq!(absence(&bench, 2, 9).await, below(2, 10));
    assert_eq!(absence(&bench, 2, 10).await, WalAbsence::End);

    // By the same backup, what came since goes too, and is no end either.
    bench.archive(2, 10..=10).await;
    assert_eq!(done(&bench).await.wal.files, 1);
    assert_eq!(absence(&bench, 2, 10).await, below(2, 11));

    // A backup there brings the first two segments along; its server is lost before it has archived any, and after some.
    let third = bench.back_up_from(2, 11, NOW_MS + 2_000).await;
    assert_eq!(absence(&bench, 2, 13).await, WalAbsence::End);
    bench.archive(2, 11..=14).await;
    assert_eq!(absence(&bench, 2, 15).await, WalAbsence::End);
    assert_eq!(collect(&bench).await.unwrap(), Collected::Nothing);

    // A later bound may stand before an earlier one.
    bench.archive(2, 15..=18).await;
    bench.back_up_from(2, 16, NOW_MS + 3_000).await;
    give_up(&bench, &second).await;
    give_up(&bench, &third).await;
    assert_eq!(done(&bench).await.wal.files, 5);
    assert_eq!(floors(&bench).await, [floor(1, 20), floor(2, 16)]);
    assert_eq!(absence(&bench, 2, 15).await, below(2, 16));
    assert_eq!(absence(&bench, 2, 19).await, WalAbsence::End);
    assert!(has(&bench, 1, 20).await && has(&bench, 2, 16).await);

    // What an earlier program wrote is of every timeline.
    let legacy = format!("lineages/{}/wal/floor/{:016X}", bench.lineage, 19);
    bench.repository.store().put(&legacy, "whatever it says".into()).await.unwrap();
    assert_eq!(absence(&bench, 3, 8).await, below(3, 19));
    assert_eq!(absence(&bench, 1, 8).await, below(1, 20));
    assert_eq!(absence(&bench, 2, 19).await, WalAbsence::End);
}

/// A store that answers some calls with less than there is.
#[derive(Debug)]
struct Reluctant {
    inner: Arc<dyn Store>,
    /// Part of the keys that are not listed.
    hides: Mutex<Option<&'static str>>,
    /// End of the keys that are not deleted.
    keeps: Mutex<Option<&'static str>>,
}

#[async_trait]
impl Layer for Reluctant {
    fn inner(&self) -> &dyn Store {
        self.inner.as_ref()
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let mut listed = self.inner.list(prefix).await?;
        let hidden = *self.hides.lock().unwrap();
        listed.retain(|object| hidden.is_none_or(|part| !object.key.contains(part)));
        Ok(listed)
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let kept = *self.keeps.lock().unwrap();
        if kept.is_some_and(|end| key.ends_with(end)) {
            let source = "it is locked".into();
            return Err(StoreError::Forbidden { operation: "delete", key: key.into(), source });
        }
        self.inner.delete(key).await
    }
}

async fn reluctant(bench: &Bench) -> (Arc<Reluctant>, Bench) {
    let mut reluctant = None;
    let copy = bench.forked_over(|to| {
        let inner = Arc::new(repository::store::directory::DirectoryStore::new(to));
        let store = Arc::new(Reluctant { inner, hides: None.into(), keeps: None.into() });
        reluctant = Some(Arc::<Reluctant>::clone(&store));
        store
    });
    let copy = copy.await;
    (reluctant.unwrap(), copy)
}

/// Where a listing comes late, nobody would see what says that WAL was deleted.
#[tokio::test]
async fn nothing_goes_before_everybody_can_see_that_it_may_be_gone() {
    let made = Bench::new().await;
    two_timelines(&made).await;
    made.back_up_from(1, 5, NOW_MS).await;
    let (store, bench) = reluctant(&made).await;
    done(&bench).await;
    let first = [floor(1, 5)];
    assert_eq!(floors(&bench).await, first);
    let older = bench.repository.list_backups(bench.lineage).await.unwrap();
    bench.back_up_from(2, 9, NOW_MS + 1_000).await;
    let wish = Wish { by: "tester".into(), why: String::new(), at_ms: NOW_MS };
    bench.repository.forget(bench.lineage, older[0].backup().unwrap(), &wish).await.unwrap();
    let before = archived(&bench).await;
    *store.hides.lock().unwrap() = Some("/wal/floor/00000002/");
    let error = collect(&bench).await.unwrap_err().to_string();
    assert!(error.contains("does not list") && error.contains(&floor(2, 9)), "{error}");
    *store.hides.lock().unwrap() = None;
    assert_eq!(archived(&bench).await, before);
    assert!(floors(&bench).await.contains(&first[0]), "it said less, and all that can be seen");
    done(&bench).await;
    assert_eq!(floors(&bench).await, [floor(1, 9), floor(2, 9)]);
}

/// What cannot be deleted and is no segment hinders no other; behind a segment nothing goes, or there would be a hole.
#[tokio::test]
async fn one_file_that_cannot_be_deleted_stays_alone_unless_it_is_a_segment() {
    let made = Bench::new().await;
    two_timelines(&made).await;
    made.back_up_from(2, 9, NOW_MS).await;
    for kept in [".partial", ".backup", "/1"] {
        let (store, bench) = reluctant(&made).await;
        *store.keeps.lock().unwrap() = Some(kept);
        done(&bench).await;
        let left = archived(&bench).await;
        let before = |file: &&String| !file.ends_with(kept) && !file.contains(".history");
        let before = left.iter().filter(before).filter(|file| file[9..].len() == 24).count();
        assert_eq!(before, 1 + 4, "{kept}: {left:?}");
        assert!(left.iter().any(|file| file.ends_with(kept)), "{kept}: {left:?}");
        *store.keeps.lock().unwrap() = None;
        done(&bench).await;
        assert_eq!(archived(&bench).await.len(), 6, "{kept}");
    }
    let (store, bench) = reluctant(&made).await;
    *store.keeps.lock().unwrap() = Some("000000010000000000000006");
    collect(&bench).await.unwrap_err();
    assert!(has(&bench, 1, 7).await && has(&bench, 2, 7).await && has(&bench, 2, 8).await);
}

#[tokio::test]
async fn wal_of_which_it_is_not_certain_that_nobody_needs_it_stays() {
    let bench = Bench::new().await;
    bench.archive(1, 3..=9).await;
    let planned = plan(&bench).await.unwrap().wal;
    assert_eq!((planned.bound, planned.delete.files), (WalBound::NoBackup, 0));
    assert_eq!(collect(&bench).await.unwrap(), Collected::Nothing);

    // A timeline whose segments have another size than the backups say, or cannot be read, is not touched.
    let large = vec![0; 2 << 20];
    bench.archive_one("000000020000000000000004", large.into()).await.unwrap();
    bench.archive(3, 4..=4).await;
    let damaged = bench.store_path().join(format!("lineages/{}/wal/00000003", bench.lineage));
    std::fs::write(damaged.join(wal_name(3, 4)), "rotten").unwrap();
    let oldest = bench.back_up_from(1, 8, NOW_MS).await;
    let planned = plan(&bench).await.unwrap().wal;
    assert_eq!(planned.untouched, [Timeline(2), Timeline(3)]);
    assert_eq!((planned.delete.files, planned.last), (5, Some(name(1, 7))));

    // Segments of another size when another backup was made: names cannot be compared.
    let other = bench.back_up(&Arc::new(common::Tree::new()), NOW_MS + 1_000).await;
    let planned = plan(&bench).await.unwrap().wal;
    assert_eq!((planned.bound, planned.last), (WalBound::Sizes { backup: other.backup }, None));
    let newest = bench.back_up_from(1, 9, NOW_MS + 2_000).await;
    give_up(&bench, &other).await;
    assert_eq!(plan(&bench).await.unwrap().wal.delete.files, 5);

    // A backup that cannot be read stops everything; given up, it keeps the WAL until it is gone.
    let manifest = format!("lineages/{}/backups/{}/manifest", bench.lineage, oldest.backup);
    let store = bench.repository.store();
    store.put(&manifest, "rotten".into()).await.unwrap();
    assert!(matches!(plan(&bench).await.unwrap_err(), Error::Damaged { .. }));
    assert!(matches!(collect(&bench).await.unwrap_err(), Error::Damaged { .. }));
    give_up(&bench, &oldest).await;
    let planned = plan(&bench).await.unwrap().wal;
    let unknown = WalBound::Unknown { backup: oldest.backup };
    assert_eq!((planned.bound, planned.delete.files), (unknown, 0));
    let first = done(&bench).await;
    assert_eq!((first.wal.files, first.backups.len()), (0, 2));
    assert!(has(&bench, 1, 3).await && floors(&bench).await.is_empty());
    assert_eq!(done(&bench).await.wal.files, 6);
    let left = bench.open(&newest).await.facts().start_lsn;
    let inventory = bench.repository.list_wal(bench.lineage).await.unwrap();
    assert_eq!(inventory.timelines[&Timeline(1)].runs[0].from.0, left.0 & !0xf_ffff);
}

#[tokio::test]
async fn a_backup_being_written_postpones_a_collection_of_wal_alone() {
    let bench = Bench::new().await;
    bench.archive(1, 3..=9).await;
    bench.back_up_from(1, 8, NOW_MS).await;
    let open = bench.begin(LATER_MS).await;
    let postponed = collect(&bench).await.unwrap();
    assert!(matches!(postponed, Collected::Postponed { open: of } if of[0].attempt == open.id()));
    assert!(has(&bench, 1, 3).await && floors(&bench).await.is_empty());
}

/// What was planned is judged again: a backup that was committed since keeps its WAL.
#[tokio::test]
async fn a_backup_that_was_committed_since_the_plan_keeps_its_wal() {
    let bench = Bench::new().await;
    bench.archive(1, 3..=9).await;
    bench.back_up_from(1, 8, NOW_MS).await;
    let planned = plan(&bench).await.unwrap();
    assert_eq!(planned.wal.delete.files, 5);
    bench.back_up_from(1, 5, NOW_MS + 1_000).await;
    let Collected::Done(done) = planned.collect(&collect_options(LATER_MS)).await.unwrap() else {
        panic!()
    };
    assert_eq!((done.wal.files, floors(&bench).await), (2, vec![floor(1, 5)]));
    for number in 5..=9 {
        assert!(has(&bench, 1, number).await, "{number}");
    }
}

/// WAL counts with its bytes when somebody is to look twice.
#[tokio::test]
async fn much_wal_at_once_is_a_large_collection() {
    let bench = Bench::new().await;
    bench.back_up_from(1, 8, NOW_MS).await;
    assert!(!plan(&bench).await.unwrap().is_large());
    let much = common::noise(1, 1 << 20);
    bench.archive_one(&wal_name(1, 3), much.into()).await.unwrap();
    assert!(plan(&bench).await.unwrap().is_large());
}

/// Where few backups are kept, the WAL of one is more than a fifth of all: that is what retention does every week.
#[tokio::test]
async fn wal_that_goes_with_one_backup_is_no_large_collection_and_with_two_it_is() {
    let bench = Bench::new().await;
    let mut backups = Vec::new();
    for number in 0..11 {
        let at_ms = NOW_MS + 1_000 * i64::try_from(number).unwrap();
        backups.push(bench.back_up_from(1, 3 + number, at_ms).await);
    }
    let much = common::noise(1, 1 << 20);
    bench.archive_one(&wal_name(1, 3), much.into()).await.unwrap();
    assert!(!plan(&bench).await.unwrap().is_large());
    give_up(&bench, &backups[0]).await;
    let planned = plan(&bench).await.unwrap();
    let kept = planned.keep.bytes + planned.wal.keep.bytes;
    assert!(planned.wal.delete.bytes > kept / 5 && !planned.is_large(), "{kept}");
    // Two of eleven are few backups, and their WAL is to be looked at.
    give_up(&bench, &backups[1]).await;
    assert!(plan(&bench).await.unwrap().is_large());
}

/// A copy of a bench and its store, in which somebody may have a turn.
async fn interruptible(bench: &Bench) -> (Arc<Interrupted>, Bench) {
    let mut interrupted = None;
    let copy = bench.forked_over(|to| {
        let store = Arc::new(Interrupted::new(to));
        interrupted = Some(Arc::<Interrupted>::clone(&store));
        store
    });
    let copy = copy.await;
    (interrupted.unwrap(), copy)
}

/// Whatever is left of the archive is one unbroken line that ends where it did, and what is not there is never its end.
async fn is_unbroken(bench: &Bench, what: &str) {
    let inventory = bench.repository.list_wal(bench.lineage).await.unwrap();
    assert_eq!(inventory.gaps(), [], "{what}");
    for number in 3..=12 {
        // Timeline 2 goes on where timeline 1 was left.
        let timeline = if number < 7 { 1 } else { 2 };
        if number >= 9 {
            assert!(has(bench, timeline, number).await, "{what}: {number}");
        } else if !has(bench, timeline, number).await {
            let absence = absence(bench, timeline, number).await;
            let below = name(timeline, 9);
            assert_eq!(absence, WalAbsence::Collected { below }, "{what}: {number}");
        }
    }
    let numbers = [(1, 3..=6), (2, 7..=12)];
    let mut line = Vec::new();
    for (timeline, numbers) in numbers {
        for number in numbers {
            line.push(has(bench, timeline, number).await);
        }
    }
    assert!(line.is_sorted(), "{what}: a hole in {line:?}");
}

/// A collector dies at every call that it makes, in turn.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_of_wal_that_dies_anywhere_leaves_an_unbroken_line() {
    let made = Bench::new().await;
    two_timelines(&made).await;
    let older = made.back_up_from(1, 5, NOW_MS).await;
    made.back_up_from(2, 9, NOW_MS + 1_000).await;
    give_up(&made, &older).await;
    for deletes_first in [false, true] {
        let mut calls = 0;
        loop {
            let (store, bench) = interruptible(&made).await;
            store.deletes_first.store(deletes_first, Ordering::SeqCst);
            store.after(calls, None);
            let ended = collect(&bench).await;
            let finished = store.is_left();
            store.after(-1, None);
            assert_eq!(ended.is_ok(), finished, "{calls}: {ended:?}");
            is_unbroken(&bench, &format!("after {calls} calls")).await;
            collect(&bench).await.unwrap();
            is_unbroken(&bench, &format!("after {calls} calls and another collection")).await;
            assert_eq!(archived(&bench).await.len(), 6, "after {calls} calls");
            let floors = floors(&bench).await;
            assert_eq!(floors, [floor(1, 9), floor(2, 9)], "after {calls} calls");
            if finished {
                assert!(calls > 30, "it was interrupted at {calls} places only");
                break;
            }
            calls += 1;
        }
    }
}

/// Before each call of a collection, servers archive: the next segment, an old one once more; and from a position before the
/// oldest backup, on a timeline of its own, what a backup that begins by then needs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn servers_that_archive_and_backups_that_begin_during_a_collection_lose_nothing() {
    let made = Bench::new().await;
    two_timelines(&made).await;
    made.back_up_from(2, 9, NOW_MS).await;
    let mut calls = 0;
    loop {
        let (store, bench) = interruptible(&made).await;
        let other = bench.beside().await;
        let turn: Turn = Box::pin(async move {
            other.archive(2, 13..=13).await;
            // It is there, or it was just deleted; a server that is told of an error asks again.
            let again = other.archive_one(&wal_name(1, 3), segment(1, 3)).await;
            assert!(matches!(again, Ok(WalStored::AlreadyThere | WalStored::Created)), "{again:?}");
            other.back_up_from(3, 5, NOW_MS + 2_000).await;
            other.archive(3, 5..=6).await;
        });
        store.after(calls, Some(turn));
        let ended = collect(&bench).await.unwrap();
        assert!(matches!(ended, Collected::Done(_)), "{calls}: {ended:?}");
        let finished = store.is_left();
        store.after(-1, None);
        for number in 9..=12 {
            assert!(has(&bench, 2, number).await, "{calls}: {number}");
        }
        if finished {
            assert!(calls > 25, "somebody had a turn at {calls} places only");
            return;
        }
        // Nor does a later one take it, which knows the new backup.
        for _ in 0..2 {
            let needed = [(2, 13), (3, 5), (3, 6)];
            for (timeline, number) in needed {
                assert!(has(&bench, timeline, number).await, "{calls}: {timeline}, {number}");
            }
            collect(&bench).await.unwrap();
        }
        calls += 1;
    }
}

#[tokio::test]
async fn a_cancelled_collection_of_wal_stops_between_two_files() {
    let made = Bench::new().await;
    two_timelines(&made).await;
    made.back_up_from(2, 9, NOW_MS).await;
    let (store, bench) = interruptible(&made).await;
    let how = collect_options(LATER_MS);
    let planned = bench.repository.plan_collection(bench.lineage, &how).await.unwrap();
    let cancel = how.cancel.clone();
    let turn: Turn = Box::pin(async move { cancel.cancel() });
    // In the middle of the deletions, as counted from the end of the plan.
    store.after(14, Some(turn));
    assert!(matches!(planned.collect(&how).await.unwrap_err(), Error::Cancelled));
    let left = archived(&bench).await.len();
    assert!((7..17).contains(&left), "{left}");
    is_unbroken(&bench, "cancelled").await;
}

/// The same on S3: it dies at some of its calls, and the next one finishes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_on_s3_is_collected_as_in_a_directory() {
    let store: Arc<dyn Store> = Arc::new(lab::open(&lab::bucket("collect-wal").await).await);
    let store = Arc::new(Interrupted::over(store));
    let bench = Bench::over(tempfile::tempdir().unwrap(), Arc::<Interrupted>::clone(&store)).await;
    two_timelines(&bench).await;
    bench.back_up_from(2, 9, NOW_MS).await;
    let mut interrupted = 0;
    for calls in (0..).step_by(3) {
        store.after(calls, None);
        let ended = collect(&bench).await;
        let finished = store.is_left();
        store.after(-1, None);
        assert_eq!(ended.is_ok(), finished, "{calls}: {ended:?}");
        is_unbroken(&bench, &format!("after {calls} calls")).await;
        if finished {
            break;
        }
        interrupted += 1;
    }
    assert!(interrupted > 3, "{interrupted}");
    assert_eq!((archived(&bench).await.len(), floors(&bench).await.len()), (6, 2));
}

/// A store that writes down what it is asked for.
#[derive(Debug)]
struct Written(Arc<dyn Store>, Mutex<Vec<String>>);

impl Written {
    fn note(&self, verb: &str, key: &str) {
        self.1.lock().unwrap().push(format!("{verb} {key}"));
    }

    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.1.lock().unwrap())
    }
}

#[async_trait]
impl Layer for Written {
    fn inner(&self) -> &dyn Store {
        self.0.as_ref()
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.note("get", key);
        self.0.get(key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.note("get", key);
        self.0.get_range(key, range).await
    }
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.note("size", key);
        self.0.size(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.note("list", prefix);
        self.0.list(prefix).await
    }
}

/// A standby asks every few seconds for what is not there yet, and a plan is made each day over years of attempts.
#[tokio::test]
async fn a_plan_asks_for_nothing_twice_and_a_missing_segment_costs_few_requests() {
    let bench = Bench::new().await;
    two_timelines(&bench).await;
    for number in 5..9 {
        bench.back_up_from(1, number, NOW_MS).await;
    }
    let written = Arc::new(Written(Arc::clone(bench.repository.store()), Mutex::default()));
    let store: Arc<dyn Store> = Arc::<Written>::clone(&written);
    let repository = Repository::open(store, Some(&bench.key)).await.unwrap();
    written.take();
    let missing = name(2, 13);
    let fetched = repository.fetch_wal(bench.lineage, &WalFileName::Segment(missing)).await;
    assert_eq!(fetched.unwrap(), None);
    let absence = repository.wal_absence(bench.lineage, missing).await.unwrap();
    assert_eq!(absence, WalAbsence::End);
    let asked = written.take();
    assert!(asked.len() <= 5, "{asked:#?}");
    let last = asked.last().unwrap();
    assert!(last.starts_with("get") && last.ends_with("/identity"), "the last word: {asked:#?}");
    let there = WalFileName::Segment(name(2, 12));
    let fetched = repository.fetch_wal(bench.lineage, &there).await.unwrap();
    assert_eq!(fetched, Some(segment(2, 12)));
    assert_eq!(written.take().len(), 1);

    let plan = repository.plan_collection(bench.lineage, &collect_options(LATER_MS)).await.unwrap();
    assert_eq!(plan.wal.delete.files, 3);
    let mut asked = written.take();
    let count = asked.len();
    asked.sort();
    asked.dedup();
    // A verdict is read by whoever opens its backup, too.
    let again = asked.iter().filter(|call| call.ends_with("/verdict")).count();
    assert_eq!(count, asked.len() + again, "{asked:#?}");
}
