//! What a backup sees of the files of tables, for its census: a table whose files are what they were at the backup before has
//! the rows that it had then, and need not be counted once more.
//!
//! That follows from three things. The earlier count was exact at the earlier stop position, which says that no transaction
//! that had written to the table was open ([`census`](crate::census)). The files were listed after the checkpoint that this
//! backup starts from, so whatever was written to the table before that checkpoint has changed them. And whatever was written
//! after it is in the WAL of this backup, which the census reads.
//!
//! All of it holds for a server that ran on since the earlier backup. One that was started since may have been set back, with its
//! files, to a time when a transaction was open that the count saw ended; and on a standby the redo position may lie before
//! the earlier stop. Then everything is counted ([`may_take_over`]).
//!
//! Whether files are what they were is the copy's to say, by times, sizes and inodes, or by summaries of the WAL from the start of the
//! earlier backup to the start of this one. So that a table cannot be mistaken for ever, a count is taken over for 15 to 30 days,
//! the same table always for the same time.

use std::collections::{HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use proto::Lsn;
use proto::backup::{BackupFacts, Census, CountedFile};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::identity::ServerIdentity;
use crate::relation::{Fork, RelationFile};

/// A count is taken over for at least so long, and for less than twice as long.
const TAKEN_OVER_MS: i64 = 15 * 24 * 3600 * 1000;

/// A count of the backup before, for a table of the same file and size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Earlier {
    pub(crate) rows: u64,
    pub(crate) file: CountedFile,
}

/// The main forks of a cluster's relations, by the path of their first segment.
#[derive(Debug, Default)]
pub struct TableFiles {
    /// Bytes at the scan, all segments.
    bytes: HashMap<String, u64>,
    /// Counts that hold where the files turn out to be unchanged.
    earlier: HashMap<String, Earlier>,
    /// Nothing before it is missing in a file that the copy saw.
    since: Lsn,
    now_ms: i64,
    seen: Mutex<Seen>,
    news: Notify,
    ended: CancellationToken,
}

/// What the copy said.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// Files that are not what they were.
    pub(crate) changed: HashSet<String>,
    /// All files were looked at. `Some(false)` when times and sizes turned out to be wrong about some: then nothing is
    /// taken over.
    pub(crate) ended: Option<bool>,
}

/// Whether counts of an earlier backup may hold for a server at all.
pub fn may_take_over(earlier: &BackupFacts, server: &ServerIdentity, start: Lsn) -> bool {
    !server.in_recovery && server.started_at_ms < earlier.started_at_ms && earlier.stop_lsn <= start
}

impl TableFiles {
    /// `files` are the relation files of a scan that followed the checkpoint at `since`: path, size. `before` is the census
    /// of the backup that the copy compares with.
    pub fn new<'a>(
        files: impl Iterator<Item = (&'a str, RelationFile, u64)>,
        before: Option<&Census>,
        since: Lsn,
        now_ms: i64,
    ) -> Self {
        let mut bytes: HashMap<String, u64> = HashMap::new();
        for (path, file, size) in files {
            if let Some(first) = first_segment(path, file) {
                *bytes.entry(first.to_owned()).or_default() += size;
            }
        }
        let mut earlier = HashMap::new();
        let databases = before.map_or(&[][..], |census| &census.databases);
        for table in databases.iter().flat_map(|database| &database.tables) {
            let (Some(file), Some(rows), Some((0, 0))) = (&table.file, table.rows, table.drift)
            else {
                continue;
            };
            // A segment that is gone is no file that changed.
            let same_size = bytes.get(&file.path) == Some(&file.size_bytes);
            if same_size && !is_due(file, now_ms) {
                earlier.insert(file.path.clone(), Earlier { rows, file: file.clone() });
            }
        }
        Self { bytes, earlier, since, now_ms, ..Self::default() }
    }

    /// The copy found a file that is not what it was, or that was not there.
    pub fn changed(&self, path: &str, file: RelationFile) {
        let Some(first) = first_segment(path, file) else { return };
        if self.earlier.contains_key(first) {
            self.tell(|seen| seen.changed.insert(first.to_owned()));
        }
    }

    /// The copy has looked at every file. Without `trusted`, some were not what their times and sizes say.
    pub fn end(&self, trusted: bool) {
        self.tell(|seen| seen.ended = Some(trusted));
        self.ended.cancel();
    }

    fn tell<T>(&self, what: impl FnOnce(&mut Seen) -> T) {
        what(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner));
        self.news.notify_one();
    }

    /// What was said since this was last asked.
    pub(crate) fn seen(&self) -> Seen {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        Seen { changed: std::mem::take(&mut seen.changed), ended: seen.ended }
    }

    /// Waits until more was said than when this was last waited for, and by a pause longer while there may be still more.
    /// One may wait at a time.
    pub(crate) async fn news(&self, pause: Duration) {
        self.news.notified().await;
        let _ = tokio::time::timeout(pause, self.ended.cancelled()).await;
    }

    /// The count that holds for a table if nobody says that its files changed.
    pub(crate) fn earlier(&self, path: Option<&str>) -> Option<Earlier> {
        self.earlier.get(path?).cloned()
    }

    /// The position from which on the WAL says what changed in a table whose files did not.
    pub(crate) fn since(&self) -> Lsn {
        self.since
    }

    /// What is to be remembered of a table that was counted now.
    pub(crate) fn counted(&self, path: Option<&str>) -> Option<CountedFile> {
        let path = path?;
        let size_bytes = *self.bytes.get(path)?;
        Some(CountedFile { path: path.to_owned(), size_bytes, counted_at_ms: self.now_ms })
    }
}

/// Whether a table is to be counted again, whatever its files say.
fn is_due(file: &CountedFile, now_ms: i64) -> bool {
    // FNV-1a (draft-eastlake-fnv): the same for a table on every host and in every version.
    let hash = file.path.bytes().fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let spread = i64::try_from(hash % TAKEN_OVER_MS.unsigned_abs()).unwrap_or(0);
    let age_ms = now_ms.saturating_sub(file.counted_at_ms);
    // A count of the future was made by another clock.
    age_ms < 0 || age_ms >= TAKEN_OVER_MS + spread
}

/// The path of a relation's first segment, for a segment of its main fork.
fn first_segment(path: &str, file: RelationFile) -> Option<&str> {
    match (file.fork, file.segment) {
        (Fork::Main, 0) => Some(path),
        (Fork::Main, _) => path.rsplit_once('.').map(|(first, _)| first),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proto::backup::{DatabaseCensus, TableCount};

    use super::*;

    const DAY_MS: i64 = 24 * 3600 * 1000;

    fn table(path: &str, drift: Option<(u64, u64)>, size_bytes: u64) -> TableCount {
        let file = CountedFile { path: path.to_owned(), size_bytes, counted_at_ms: 0 };
        TableCount {
            schema: "s".to_owned(),
            table: path.to_owned(),
            rows: Some(7),
            drift,
            file: Some(file),
        }
    }

    fn census(tables: Vec<TableCount>) -> Census {
        let database = DatabaseCensus {
            database: "d".parse().unwrap(),
            collation: String::new(),
            extensions: Vec::new(),
            relations: Vec::new(),
            tables,
        };
        Census { canary: None, databases: vec![database], unseen: Vec::new() }
    }

    fn files(before: &Census, now_ms: i64) -> TableFiles {
        let scanned = ["base/5/1", "base/5/1.1", "base/5/1_vm", "base/5/2", "base/5/3"];
        let scanned = scanned.into_iter().map(|path| {
            let name = path.rsplit_once('/').unwrap().1;
            (path, RelationFile::parse(name).unwrap(), 100)
        });
        TableFiles::new(scanned, Some(before), Lsn(9), now_ms)
    }

    fn held(files: &TableFiles) -> Vec<&str> {
        let mut held: Vec<&str> = files.earlier.keys().map(String::as_str).collect();
        held.sort_unstable();
        held
    }

    #[test]
    fn only_exact_counts_of_files_of_the_same_size_are_taken_over() {
        let exact = Some((0, 0));
        let before = census(vec![
            table("base/5/1", exact, 200),
            table("base/5/2", Some((0, 1)), 100),
            table("base/5/3", exact, 200), // its second segment is gone
            table("base/5/4", exact, 100),
        ]);
        assert_eq!(held(&files(&before, DAY_MS)), ["base/5/1"]);
    }

    #[test]
    fn any_segment_and_no_other_fork_tells_that_a_table_changed() {
        let files = files(&census(vec![table("base/5/1", Some((0, 0)), 200)]), DAY_MS);
        files.changed("base/5/1_vm", RelationFile::parse("1_vm").unwrap());
        files.changed("base/5/2", RelationFile::parse("2").unwrap());
        assert!(files.seen().changed.is_empty());
        files.changed("base/5/1.1", RelationFile::parse("1.1").unwrap());
        assert_eq!(files.seen().changed, HashSet::from(["base/5/1".to_owned()]));
    }

    #[test]
    fn every_table_is_counted_again_within_thirty_days_and_not_all_on_one_day() {
        let due = |path: &str| {
            let before = census(vec![table(path, Some((0, 0)), 0)]);
            let file = before.databases[0].tables[0].file.clone().unwrap();
            (0..40).find(|day| is_due(&file, day * DAY_MS)).unwrap()
        };
        let days: HashSet<i64> = (0..500).map(|n| due(&format!("base/5/{n}"))).collect();
        assert!(days.iter().all(|day| (15..=30).contains(day)), "{days:?}");
        assert!(days.len() > 10, "{days:?}");
        let file = CountedFile { path: "x".to_owned(), size_bytes: 0, counted_at_ms: 2 };
        assert!(is_due(&file, 1), "a count of the future");
    }
}
