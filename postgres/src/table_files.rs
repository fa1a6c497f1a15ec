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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Earlier {
    pub(crate) rows: u64,
    pub(crate) counted: Counted,
}

/// Of a table's file, what is remembered with its count beside the path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) size_bytes: u64,
    pub(crate) counted_at_ms: i64,
}

/// A relation: the number of its directory here, and its own number on disk. There may be millions of them.
pub(crate) type Key = (u32, u32);

/// The main forks of a cluster's relations.
#[derive(Debug, Default)]
pub struct TableFiles {
    directories: HashMap<Box<str>, u32>,
    /// Bytes at the scan, all segments; by key.
    bytes: Vec<(Key, u64)>,
    /// Counts that hold where the files turn out to be unchanged.
    earlier: HashMap<Key, Earlier>,
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
    /// Relations whose files are not what they were.
    pub(crate) changed: HashSet<Key>,
    /// All files were looked at. `Some(false)` when times and sizes turned out to be wrong about some: then nothing is
    /// taken over.
    pub(crate) ended: Option<bool>,
}

/// Whether counts of an earlier backup may hold for a server at all.
pub fn may_take_over(earlier: &BackupFacts, server: &ServerIdentity, start: Lsn) -> bool {
    !server.in_recovery && server.started_at_ms < earlier.started_at_ms && earlier.stop_lsn <= start
}

impl TableFiles {
    /// `files` are the relation files of a scan that followed the checkpoint at `since`: directory, name, size. `before` is the
    /// census of the backup that the copy compares with.
    pub fn new<'a>(
        files: impl Iterator<Item = (&'a str, RelationFile, u64)>,
        before: Option<&Census>,
        since: Lsn,
        now_ms: i64,
    ) -> Self {
        let mut tables = Self { since, now_ms, ..Self::default() };
        for (directory, file, size) in files.filter(|(_, file, _)| file.fork == Fork::Main) {
            let key = (tables.number(directory), file.filenode);
            // Segments of a relation stand near each other, but for others whose numbers begin alike.
            match tables.bytes.last_mut() {
                Some((last, bytes)) if *last == key => *bytes += size,
                _ => tables.bytes.push((key, size)),
            }
        }
        tables.bytes.sort_unstable_by_key(|(key, _)| *key);
        tables.bytes.dedup_by(|(key, bytes), (before, all)| {
            let same = key == before;
            *all += if same { *bytes } else { 0 };
            same
        });
        tables.bytes.shrink_to_fit();
        let databases = before.map_or(&[][..], |census| &census.databases);
        for table in databases.iter().flat_map(|database| &database.tables) {
            let (Some(file), Some(rows), Some((0, 0))) = (&table.file, table.rows, table.drift)
            else {
                continue;
            };
            let Some(key) = tables.key(&file.path) else { continue };
            // A segment that is gone is no file that changed.
            if tables.bytes(key) == Some(file.size_bytes) && !is_due(file, now_ms) {
                let CountedFile { size_bytes, counted_at_ms, .. } = *file;
                let counted = Counted { size_bytes, counted_at_ms };
                tables.earlier.insert(key, Earlier { rows, counted });
            }
        }
        tables
    }

    /// The number of a directory, which it gets when it is first named.
    fn number(&mut self, directory: &str) -> u32 {
        if let Some(number) = self.directories.get(directory) {
            return *number;
        }
        let number = u32::try_from(self.directories.len()).unwrap_or(u32::MAX);
        self.directories.insert(directory.into(), number);
        number
    }

    /// What a path of a relation's first segment stands for.
    fn key(&self, path: &str) -> Option<Key> {
        let (directory, name) = path.rsplit_once('/')?;
        let file = RelationFile::parse(name)?;
        let is_first = file.fork == Fork::Main && file.segment == 0;
        let file = is_first.then_some(file)?;
        Some((*self.directories.get(directory)?, file.filenode))
    }

    fn bytes(&self, key: Key) -> Option<u64> {
        let found = self.bytes.binary_search_by_key(&key, |(key, _)| *key).ok()?;
        Some(self.bytes[found].1)
    }

    /// The copy found a file that is not what it was, or that was not there.
    pub fn changed(&self, path: &str, file: RelationFile) {
        let directory = path.rsplit_once('/').and_then(|(path, _)| self.directories.get(path));
        let Some(directory) = directory.filter(|_| file.fork == Fork::Main) else { return };
        let key = (*directory, file.filenode);
        if self.earlier.contains_key(&key) {
            self.tell(|seen| seen.changed.insert(key));
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

    /// Whether a table's files are among those that changed.
    pub(crate) fn has_changed(&self, path: Option<&str>, seen: &Seen) -> bool {
        path.and_then(|path| self.key(path)).is_some_and(|key| seen.changed.contains(&key))
    }

    /// The count that holds for a table if nobody says that its files changed.
    pub(crate) fn earlier(&self, path: Option<&str>) -> Option<Earlier> {
        self.earlier.get(&self.key(path?)?).copied()
    }

    /// The position from which on the WAL says what changed in a table whose files did not.
    pub(crate) fn since(&self) -> Lsn {
        self.since
    }

    /// What is to be remembered of a table that was counted now.
    pub(crate) fn counted(&self, path: Option<&str>) -> Option<Counted> {
        let size_bytes = self.bytes(self.key(path?)?)?;
        Some(Counted { size_bytes, counted_at_ms: self.now_ms })
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
        Census { canary: None, databases: vec![database], unseen: Vec::new(), forbidden: None }
    }

    fn files(before: &Census, now_ms: i64) -> TableFiles {
        // As sorted names are: 10 stands between the segments of 1.
        let scanned = ["1", "1.1", "10", "1_vm", "1.2", "2", "3"];
        let scanned = scanned.into_iter().map(|name| {
            let size = if name == "1.2" { 0 } else { 100 };
            ("base/5", RelationFile::parse(name).unwrap(), size)
        });
        TableFiles::new(scanned, Some(before), Lsn(9), now_ms)
    }

    fn held(files: &TableFiles) -> Vec<u32> {
        let mut held: Vec<u32> = files.earlier.keys().map(|(_, filenode)| *filenode).collect();
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
        assert_eq!(held(&files(&before, DAY_MS)), [1]);
    }

    #[test]
    fn any_segment_and_no_other_fork_tells_that_a_table_changed() {
        let files = files(&census(vec![table("base/5/1", Some((0, 0)), 200)]), DAY_MS);
        files.changed("base/5/1_vm", RelationFile::parse("1_vm").unwrap());
        files.changed("base/5/2", RelationFile::parse("2").unwrap());
        assert!(files.seen().changed.is_empty());
        files.changed("base/6/1", RelationFile::parse("1").unwrap());
        assert!(files.seen().changed.is_empty(), "of another database");
        files.changed("base/5/1.1", RelationFile::parse("1.1").unwrap());
        let seen = files.seen();
        assert!(files.has_changed(Some("base/5/1"), &seen));
        for other in [None, Some("base/5/2"), Some("base/6/1"), Some("base/5/1_vm")] {
            assert!(!files.has_changed(other, &seen), "{other:?}");
        }
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
