//! What a plan reads, and that it agrees with what is shown as recoverable.

use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use proto::backup::BadPage;
use proto::wal::SegmentName;
use proto::{AttemptId, WalFileName};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Listed, Store, StoreError};
use repository::{
    Encryption, InitOptions, Intent, Source, SourceEntry, SourceFile, Wish, WriteOptions,
};

use super::*;
use crate::archive::{Window, recoverable, segment_for_tests};

const MIB: u64 = 1 << 20;

/// A store that writes down what is read from it, and does not answer about one object.
#[derive(Debug)]
struct Written {
    inner: DirectoryStore,
    calls: Mutex<Vec<String>>,
    away: Mutex<Option<String>>,
}

impl Written {
    fn note(&self, verb: &str, key: &str) {
        self.calls.lock().unwrap().push(format!("{verb} {key}"));
    }
}

#[async_trait]
impl Layer for Written {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.note("get", key);
        if self.away.lock().unwrap().as_deref() == Some(key) {
            let (key, source) = (key.to_owned(), "it did not answer".into());
            return Err(StoreError::Unavailable { operation: "read", key, source });
        }
        self.inner.get(key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.note("get", key);
        self.inner.get_range(key, range).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.note("list", prefix);
        self.inner.list(prefix).await
    }
}

struct NoSource;

impl Source for NoSource {
    fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        Ok(None)
    }
}

/// A lineage with backups and an archive, segments being 1 MiB.
struct Place {
    _directory: tempfile::TempDir,
    store: Arc<Written>,
    repository: Repository,
    lineage: LineageId,
    backups: Vec<BackupId>,
}

impl Place {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let inner = DirectoryStore::new(directory.path().join("repository"));
        let store = Arc::new(Written { inner, calls: Mutex::default(), away: Mutex::default() });
        let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
        let shared: Arc<dyn Store> = Arc::clone(&store) as _;
        let repository = Repository::init(shared, options).await.unwrap().repository;
        let cluster = "orders".parse().unwrap();
        let lineage = repository
            .find_or_mint_lineage(&cluster, SystemIdentifier(7), 1)
            .await
            .unwrap()
            .lineage;
        Self { _directory: directory, store, repository, lineage, backups: Vec::new() }
    }

    /// A backup that begins in a segment and ends in it.
    async fn back_up(&mut self, timeline: u32, segment: u64) {
        self.back_up_with(timeline, segment, &[]).await;
    }

    /// The same of a server some of whose pages are wrong.
    async fn back_up_with(&mut self, timeline: u32, segment: u64, bad_pages: &[BadPage]) {
        let number = self.backups.len() as u64 + 1;
        let ended_at_ms = i64::try_from(number).unwrap() * 1_000;
        let facts = serde_json::json!({
            "cluster": "orders", "system_identifier": "7", "server_version_num": 150_018,
            "catalog_version": 1, "block_size": 8192, "wal_segment_size": MIB,
            "data_checksums": true, "timeline": timeline,
            "start_lsn": Lsn(segment * MIB + 40), "stop_lsn": Lsn(segment * MIB + 400),
            "started_at_ms": ended_at_ms, "stopped_at_ms": ended_at_ms, "backup_label": "",
            "bad_pages": bad_pages,
        });
        let attempt = AttemptId::mint(number, [u8::try_from(number).unwrap(); 10]);
        let intent = Intent { attempt, follows: None, by: "w".into(), began_at_ms: ended_at_ms };
        let attempt = self.repository.begin(self.lineage, intent).await.unwrap();
        let continuity = Some("here".into());
        let mut writer =
            attempt.write(WriteOptions { continuity, ..WriteOptions::default() }).unwrap();
        let entry = SourceEntry::bytes("file", 0o600, number.to_string());
        writer.copy(Arc::new(NoSource), vec![Ok(entry)]).await.unwrap();
        let content = segment_for_tests(timeline, segment * MIB, 7);
        let name = wal_name(timeline, segment).to_string();
        writer.wal().add(&name, io::Cursor::new(content)).await.unwrap();
        let facts = serde_json::from_value(facts).unwrap();
        let written = writer.finish(Arc::new(NoSource), vec![], facts).await.unwrap();
        self.backups.push(written.commit(ended_at_ms + 1).await.unwrap().backup);
    }

    async fn archive(&self, timeline: u32, numbers: std::ops::RangeInclusive<u64>) {
        for number in numbers {
            let file = WalFileName::Segment(wal_name(timeline, number));
            let content = segment_for_tests(timeline, number * MIB, 7);
            self.repository.store_wal(self.lineage, &file, content.into()).await.unwrap();
        }
    }

    /// A segment that begins with the end of a transaction, and has nothing else.
    async fn archive_commit(&self, timeline: u32, number: u64, second: i64) {
        let file = WalFileName::Segment(wal_name(timeline, number));
        let mut content = segment_for_tests(timeline, number * MIB, 7);
        let record = commit(second);
        content[40..40 + record.len()].copy_from_slice(&record);
        self.repository.store_wal(self.lineage, &file, content.into()).await.unwrap();
    }

    async fn archive_history(&self, timeline: u32, text: String) {
        let file = WalFileName::History(Timeline(timeline));
        self.repository.store_wal(self.lineage, &file, text.into()).await.unwrap();
    }

    async fn plan(&self, to: Lsn, timeline: Option<u32>) -> Result<BackupId, Failure> {
        self.plan_to(RecoveryTarget::Lsn(to), timeline).await
    }

    async fn plan_to(
        &self,
        to: RecoveryTarget,
        timeline: Option<u32>,
    ) -> Result<BackupId, Failure> {
        let timeline = timeline.map(Timeline);
        let recovery = Recovery { timeline, ..Recovery::to(to) };
        let (backup, plan) = self.planned(&recovery).await?;
        assert!(timeline.is_none_or(|timeline| plan.outcome.timeline == timeline));
        Ok(backup)
    }

    async fn planned(&self, recovery: &Recovery) -> Result<(BackupId, RecoveryPlan), Failure> {
        let wanted = Wanted {
            cluster: None,
            system_identifier: None,
            backup: None,
            rehearses: false,
            recovery,
        };
        let fetching = Fetching {
            program: "/usr/bin/pgmuster".into(),
            from: FetchFrom::Repository(
                "file:///repository".into(),
                ["--key".into(), "file".into()],
            ),
        };
        let pin = Pin { by: "tester".into(), why: "restore".into(), at_ms: 1 };
        let (pinned, plan) = plan(&self.repository, wanted, &fetching, &pin).await?;
        let backup = pinned.id();
        pinned.release().await;
        Ok((backup, plan))
    }

    async fn windows(&self) -> Vec<Window> {
        recoverable(&self.repository, None).await.unwrap().remove(0).windows
    }
}

fn wal_name(timeline: u32, number: u64) -> SegmentName {
    Segment { timeline: Timeline(timeline), number }.name(1 << 20)
}

/// The record of a commit, as `XLogRecord` and `xl_xact_commit` have it. Its second is also the id of its transaction.
fn commit(second: i64) -> Vec<u8> {
    let since_2000_us = (second - 946_684_800) * 1_000_000;
    let mut record = vec![0; 24];
    record[0] = 34;
    record[4..8].copy_from_slice(&u32::try_from(second).unwrap().to_ne_bytes());
    record[17] = 1;
    record.extend([255, 8]);
    record.extend(since_2000_us.to_ne_bytes());
    let crc = !record[24..].iter().chain(&record[..20]).fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82F6_3B78 * (crc & 1)))
    });
    record[20..24].copy_from_slice(&crc.to_ne_bytes());
    record
}

#[tokio::test]
async fn a_plan_lists_once_and_reads_no_more_of_a_backup_than_its_manifest() {
    let mut place = Place::new().await;
    for segment in [2, 6, 8, 10] {
        place.back_up(1, segment).await;
    }
    // One that was given up is passed by.
    let wish = Wish { by: "tester".into(), why: String::new(), at_ms: 1 };
    place.repository.forget(place.lineage, place.backups[2], &wish).await.unwrap();
    place.archive(1, 2..=12).await;
    place.store.calls.lock().unwrap().clear();
    assert_eq!(place.plan(Lsn(5 * MIB), None).await.unwrap(), place.backups[0]);
    let calls = std::mem::take(&mut *place.store.calls.lock().unwrap());
    let count = |wanted: &str| calls.iter().filter(|call| call.ends_with(wanted)).count();
    assert_eq!(count("/backups/"), 1, "{calls:#?}");
    let read = place.backups.iter().map(|backup| count(&format!("{backup}/manifest")));
    // The one that is taken is read again under its pin.
    assert_eq!(read.collect::<Vec<_>>(), [2, 1, 0, 1], "{calls:#?}");
    assert!(!calls.iter().any(|call| call.contains("/packs/")), "{calls:#?}");
}

#[tokio::test]
async fn a_moment_behind_a_backup_behind_which_nothing_is_archived_is_refused() {
    let mut place = Place::new().await;
    place.back_up(1, 2).await;
    let refused = place.plan_to(time(30), None).await.unwrap_err();
    assert_eq!(refused.code, Code::RecoveryTargetUnreachable, "{refused}");
    assert!(refused.message.contains("nothing is there behind the end of the backup"), "{refused}");
    // The segment in which the backup ends came with it.
    place.archive_commit(1, 3, 40).await;
    assert_eq!(place.plan_to(time(30), None).await.unwrap(), place.backups[0]);
}

#[tokio::test]
async fn what_the_servers_disk_did_to_newer_backups_is_recovered_from_before() {
    let bad = [BadPage { path: "base/5/1".to_owned(), block: 3 }];
    let mut place = Place::new().await;
    place.back_up(1, 2).await;
    place.back_up(1, 4).await;
    place.archive(1, 2..=12).await;
    place.back_up_with(1, 6, &bad).await;
    place.back_up_with(1, 8, &bad).await;
    let to = Lsn(11 * MIB);
    assert_eq!(place.plan(to, None).await.unwrap(), place.backups[1]);
    // Where no older one leads on, a damaged one is better than none.
    for segment in 4..=5 {
        let object = format!("lineages/{}/wal/00000001/{}", place.lineage, wal_name(1, segment));
        place.store.inner.delete(&object).await.unwrap();
    }
    assert_eq!(place.plan(to, None).await.unwrap(), place.backups[3]);
}

/// Whatever window is shown, its beginning can be recovered to, with the backup that is shown.
#[tokio::test]
async fn every_window_that_is_shown_can_be_recovered_to() {
    let mut place = Place::new().await;
    // Timeline 2 left the first, and its history is lost; the third came from the first again.
    place.back_up(1, 2).await;
    place.archive(1, 2..=9).await;
    place.back_up(2, 6).await;
    place.archive(2, 6..=8).await;
    place.archive_history(3, format!("1\t{}\tx\n", Lsn(8 * MIB + 100))).await;
    place.archive(3, 8..=12).await;
    place.back_up(3, 9).await;
    // The archive has not the segment that this one brought along.
    place.back_up(3, 13).await;
    place.archive(3, 14..=15).await;
    let windows = place.windows().await;
    let timelines: Vec<u32> = windows.iter().map(|window| window.timeline.0).collect();
    assert_eq!(timelines, [1, 2, 3, 3], "{windows:#?}");
    for Window { timeline, backup, from, to, .. } in windows {
        let planned = place.plan(from, Some(timeline.0)).await.unwrap();
        assert_eq!(planned, backup, "{timeline}");
        assert!(to > from, "{timeline}: {from} {to}");
        place.plan(Lsn(to.0 - 1), Some(timeline.0)).await.unwrap();
    }
    let refused = place.plan(Lsn(9 * MIB), Some(7)).await.unwrap_err();
    assert_eq!(refused.code, Code::RecoveryTargetUnreachable);
    assert!(refused.message.contains("00000007.history"), "{}", refused.message);
}

#[tokio::test]
async fn damage_on_a_branch_keeps_nobody_from_another_way() {
    let mut place = Place::new().await;
    place.back_up(1, 2).await;
    place.archive(1, 2..=9).await;
    place.archive_history(2, format!("1\t{}\tx\n", Lsn(8 * MIB + 100))).await;
    place.archive(2, 8..=12).await;
    let object = format!("lineages/{}/wal/00000001/{}", place.lineage, wal_name(1, 9));
    let damaged = Bytes::from_static(b"no object at all");
    place.store.inner.put(&object, damaged).await.unwrap();
    let file = WalFileName::Segment(wal_name(1, 9));
    place.repository.fetch_wal(place.lineage, &file).await.unwrap_err();
    assert_eq!(place.plan(Lsn(10 * MIB), None).await.unwrap(), place.backups[0]);
    // What it holds is not known, so nobody goes along the other one in silence.
    let latest = |timeline| place.plan_to(RecoveryTarget::Latest, timeline);
    let asked = latest(None).await.unwrap_err();
    assert_eq!(asked.code, Code::RequestInvalid, "{asked:?}");
    assert!(asked.hint.contains("--timeline 1"), "{asked:?}");
    assert_eq!(latest(Some(2)).await.unwrap(), place.backups[0]);
    // A store that is away for a moment says nothing of what it holds.
    *place.store.away.lock().unwrap() = Some(object);
    let away = latest(None).await.unwrap_err();
    assert_eq!((away.code, away.action), (Code::StoreUnavailable, Action::Retry), "{away:?}");
}

/// Timeline 1 goes on for more segments than are looked into, and a transaction ended in one of them; timeline 2 left it before.
async fn long_branch(segment: u64) -> Place {
    let mut place = Place::new().await;
    place.back_up(1, 2).await;
    place.archive(1, 2..=segment - 1).await;
    place.archive_commit(1, segment, 100).await;
    place.archive(1, segment + 1..=39).await;
    place.archive_history(2, format!("1\t{}\tx\n", Lsn(3 * MIB + 100))).await;
    place.archive(2, 3..=3).await;
    place.archive_commit(2, 4, 9_000).await;
    place
}

fn time(second: i64) -> RecoveryTarget {
    RecoveryTarget::Time(Timestamp::from_second(second).unwrap())
}

#[tokio::test]
async fn a_long_load_at_the_end_of_a_branch_hides_when_it_was_written_last() {
    let place = long_branch(4).await;
    for to in [RecoveryTarget::Latest, time(200)] {
        let asked = place.plan_to(to.clone(), None).await.unwrap_err();
        assert_eq!(asked.code, Code::RequestInvalid, "{asked:?}");
        assert!(asked.message.contains("timeline 1 goes on to 0/2800000, and"), "{asked:?}");
        assert_eq!(place.plan_to(to, Some(2)).await.unwrap(), place.backups[0]);
    }
    // Its first transaction is in sight, and later.
    assert_eq!(place.plan_to(time(50), None).await.unwrap(), place.backups[0]);
}

#[tokio::test]
async fn a_long_load_at_the_beginning_of_a_branch_may_hide_what_was_committed_before_a_moment() {
    let place = long_branch(39).await;
    let asked = place.plan_to(time(50), None).await.unwrap_err();
    assert_eq!(asked.code, Code::RequestInvalid, "{asked:?}");
    assert!(asked.message.contains("transactions ended up to 1970-01-01T00:01:40Z"), "{asked:?}");
    assert_eq!(place.plan_to(time(50), Some(2)).await.unwrap(), place.backups[0]);
    // It was over before the other was written.
    assert_eq!(place.plan_to(RecoveryTarget::Latest, None).await.unwrap(), place.backups[0]);
}

#[tokio::test]
async fn a_moment_before_a_timeline_began_is_recovered_to_along_the_one_that_has_it() {
    let mut place = Place::new().await;
    place.back_up(1, 2).await;
    place.archive(1, 2..=7).await;
    place.archive_commit(1, 8, 100).await;
    place.archive(1, 9..=9).await;
    // Timeline 2 begins in the segment that begins with that commit, and with a copy of what was there.
    let left_at = Lsn(8 * MIB + 400);
    place.archive_history(2, format!("1\t{left_at}\tx\n")).await;
    place.archive_commit(2, 8, 100).await;
    place.archive_commit(2, 9, 500).await;
    let planned = async |to: RecoveryTarget, before: bool, timeline: Option<u32>| {
        let timeline = timeline.map(Timeline);
        let recovery = Recovery { before, timeline, ..Recovery::to(to) };
        let (_, plan) = place.planned(&recovery).await.unwrap();
        (plan.outcome.timeline.0, plan.lines.join("\n"))
    };
    let lsn = |byte: u64| RecoveryTarget::Lsn(Lsn(8 * MIB + byte));
    for (to, before) in [
        (RecoveryTarget::Xid(100), true),
        (RecoveryTarget::Xid(100), false),
        (time(50), false),
        (time(100), true),
        (lsn(40), true),
        (lsn(300), true),
        (lsn(40), false),
    ] {
        let (timeline, said) = planned(to.clone(), before, None).await;
        assert_eq!(timeline, 1, "{to} {before}: {said}");
        let why = format!("timeline 2 left timeline 1 at {left_at}, behind that moment");
        assert!(said.contains(&why) && !said.contains("not taken"), "{said}");
        assert_eq!(planned(to, before, Some(2)).await.0, 2, "who names one gets it");
    }
    // What begins at the position itself, or behind it, may be the newer one's.
    for (to, before) in [
        (RecoveryTarget::Xid(500), true),
        (time(100), false),
        (time(200), false),
        (lsn(300), false),
        (lsn(400), true),
        (RecoveryTarget::Latest, false),
    ] {
        assert_eq!(planned(to.clone(), before, None).await.0, 2, "{to} {before}");
    }
    // Without the older one's file, the newer one's has to do.
    let object = format!("lineages/{}/wal/00000001/{}", place.lineage, wal_name(1, 8));
    place.store.inner.delete(&object).await.unwrap();
    assert_eq!(planned(time(50), false, None).await.0, 2);
    place.archive_commit(1, 8, 100).await;
    // What only the older one has is refused, with the way to it.
    place.archive_commit(1, 10, 300).await;
    let refused = place.plan_to(RecoveryTarget::Xid(300), None).await.unwrap_err();
    assert_eq!(refused.code, Code::RecoveryTargetUnreachable, "{refused:?}");
    assert!(refused.hint.contains("--timeline 1 leads there"), "{refused:?}");
}

#[tokio::test]
async fn where_nothing_is_archived_the_latest_moment_is_the_end_of_the_newest_backup() {
    let mut place = Place::new().await;
    place.back_up(1, 2).await;
    place.back_up(1, 4).await;
    let latest = Recovery::to(RecoveryTarget::Latest);
    let (backup, plan) = place.planned(&latest).await.unwrap();
    assert_eq!(backup, place.backups[1]);
    assert_eq!(plan.not_taken.len(), 1, "{:?}", plan.not_taken);
    let said = &plan.not_taken[0];
    let begins = format!("nothing is archived behind backup {backup}: the latest moment");
    assert!(said.starts_with(&begins), "{said}");
    for words in ["1970-01-01T00:00:02Z", "pgmuster cluster enable-wal orders --wait"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    assert!(plan.lines.contains(said), "{:?}", plan.lines);
    let standby = Recovery { standby: true, ..latest.clone() };
    assert!(place.planned(&standby).await.unwrap().1.not_taken.is_empty(), "it streams the rest");
    place.archive(1, 4..=5).await;
    assert!(place.planned(&latest).await.unwrap().1.not_taken.is_empty());
}
