//! The files of a running server as the repository reads them: page by page where there are pages, with their checksums
//! looked at in the same pass.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use postgres::files::{ServerFile, ServerFiles};
use postgres::relation::{PageRules, RelationFile, RelationReader};
use postgres::table_files::TableFiles;
use proto::backup::BadPage;
use repository::{Source, SourceEntry, SourceFile};

use super::rate::RateLimit;

/// How many bad pages are named one by one; more are only counted.
pub(crate) const BAD_PAGES_NAMED_MAX: usize = 1_000;

/// Where each entry of a scan is read.
#[derive(Debug)]
pub(crate) struct DataDirectory {
    files: Arc<dyn ServerFiles>,
    /// Files that are not where their paths say.
    outside: HashMap<String, PathBuf>,
    rules: PageRules,
    limit: Option<Arc<RateLimit>>,
    tables: Arc<TableFiles>,
    found: Arc<Mutex<Found>>,
}

/// What reading brought to light.
#[derive(Debug, Default, Clone)]
pub(crate) struct Found {
    /// Pages that failed their checksum, at most [`BAD_PAGES_NAMED_MAX`] of them.
    pub(crate) bad_pages: Vec<BadPage>,
    /// All of them.
    pub(crate) bad_page_count: u64,
}

impl DataDirectory {
    /// `outside` is the scan's; `rate_limit_bytes` is how much may be read in a second; `tables` is told which files changed.
    pub(crate) fn new(
        files: Arc<dyn ServerFiles>,
        outside: HashMap<String, PathBuf>,
        rules: PageRules,
        rate_limit_bytes: Option<u64>,
        tables: Arc<TableFiles>,
    ) -> Self {
        let limit = RateLimit::new(rate_limit_bytes).map(Arc::new);
        Self { files, outside, rules, limit, tables, found: Arc::default() }
    }

    /// How much of it may be read in a second, where that is limited.
    pub(crate) fn rate_limit_bytes(&self) -> Option<u64> {
        self.limit.as_ref().map(|limit| limit.bytes_per_s())
    }

    /// What was found so far; complete once every file is closed.
    pub(crate) fn found(&self) -> Found {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Source for DataDirectory {
    fn changed(&self, entry: &SourceEntry) {
        if let Ok(path) = std::str::from_utf8(&entry.path)
            && let Some(relation) = relation_of(entry, path)
            // Whose times changed and none of whose pages did, by all that the WAL tells, has the rows that it had.
            && entry.changes.as_ref().is_none_or(|ranges| !ranges.is_empty())
        {
            self.tables.changed(path, relation);
        }
    }

    fn open(&self, entry: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        let name = std::str::from_utf8(&entry.path)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let path = self.outside.get(name).map_or(Path::new(name), PathBuf::as_path);
        let named = |error: io::Error| {
            let place = self.files.place(path);
            io::Error::new(error.kind(), format!("{}: {error}", place.display()))
        };
        let (files, size) = (&*self.files, entry.size_bytes);
        if let Some(relation) = relation_of(entry, name) {
            let reader = RelationReader::open_in(files, path, size, relation, self.rules);
            return Ok(reader.map_err(named)?.map(|reader| -> Box<dyn SourceFile> {
                Box::new(Relation {
                    path: name.to_owned(),
                    reader,
                    limit: self.limit.clone(),
                    found: Arc::clone(&self.found),
                })
            }));
        }
        let file = files.open(path, size).map_err(named)?;
        Ok(file.map(|file| -> Box<dyn SourceFile> {
            Box::new(Plain { file, limit: self.limit.clone() })
        }))
    }
}

/// The relation whose file an entry is: those have pages.
fn relation_of(entry: &SourceEntry, path: &str) -> Option<RelationFile> {
    entry.block_size?;
    RelationFile::parse(path.rsplit('/').next()?)
}

/// Waits until a read of `buffer` is in time.
fn pace(limit: Option<&Arc<RateLimit>>, buffer: &[u8]) {
    if let Some(limit) = limit {
        limit.pace(buffer.len());
    }
}

struct Plain {
    file: Box<dyn ServerFile>,
    limit: Option<Arc<RateLimit>>,
}

impl SourceFile for Plain {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        pace(self.limit.as_ref(), buffer);
        self.file.read_full_at(buffer, offset)
    }

    fn advise(&mut self, offset: u64, length: u64) {
        self.file.advise(offset, length);
    }

    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        self.file.changed_at_ns()
    }

    fn fetched_bytes(&self) -> Option<u64> {
        self.file.fetched_bytes()
    }
}

struct Relation {
    path: String,
    reader: RelationReader,
    limit: Option<Arc<RateLimit>>,
    found: Arc<Mutex<Found>>,
}

impl SourceFile for Relation {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        pace(self.limit.as_ref(), buffer);
        self.reader.read_at(offset, buffer)
    }

    fn advise(&mut self, offset: u64, length: u64) {
        self.reader.advise(offset, length);
    }

    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        self.reader.changed_at_ns()
    }

    fn fetched_bytes(&self) -> Option<u64> {
        self.reader.fetched_bytes()
    }
}

impl Drop for Relation {
    fn drop(&mut self) {
        let bad = self.reader.bad_blocks();
        if bad.is_empty() {
            return;
        }
        let mut found = self.found.lock().unwrap_or_else(PoisonError::into_inner);
        found.bad_page_count += bad.len() as u64;
        let room = BAD_PAGES_NAMED_MAX.saturating_sub(found.bad_pages.len());
        let named =
            bad.iter().take(room).map(|block| BadPage { path: self.path.clone(), block: *block });
        found.bad_pages.extend(named);
    }
}

#[cfg(test)]
mod tests {
    use std::ffi::OsString;
    use std::fs::{File, FileTimes};
    use std::time::Duration;

    use postgres::files::LocalFiles;
    use postgres::roots::Roots;
    use postgres::scan::{Scan, ScanOptions};
    use proto::Lsn;

    use super::*;

    const BYTES: usize = 8192;

    /// A relation and a plain file below a directory, read through `files`.
    fn both(
        directory: &Path,
        files: Arc<dyn ServerFiles>,
        rate_limit_bytes: Option<u64>,
    ) -> (DataDirectory, [SourceEntry; 2]) {
        let rules = PageRules {
            block_size: 8192,
            segment_blocks: 131_072,
            checksums: true,
            backup_start: Lsn(1),
        };
        let tables = Arc::new(TableFiles::new([].into_iter(), None, Lsn(1), 1));
        let source = DataDirectory::new(files, HashMap::new(), rules, rate_limit_bytes, tables);
        let entries = [("16384", Some(8192)), ("plain", None)].map(|(name, block_size)| {
            std::fs::write(directory.join(name), vec![0; BYTES]).unwrap();
            let entry = SourceEntry::bytes(name, 0o600, Vec::new());
            SourceEntry { size_bytes: BYTES as u64, block_size, ..entry }
        });
        (source, entries)
    }

    #[test]
    fn an_open_file_tells_when_it_was_changed_by_now() {
        let directory = tempfile::tempdir().unwrap();
        let files = Arc::new(LocalFiles::new(directory.path()));
        let (source, entries) = both(directory.path(), files, None);
        for entry in &entries {
            let path = directory.path().join(std::str::from_utf8(&entry.path).unwrap());
            let open = source.open(entry).unwrap().unwrap();
            let before = open.changed_at_ns().unwrap();
            let file = File::options().write(true).open(path).unwrap();
            let later = file.metadata().unwrap().modified().unwrap() + Duration::from_mins(1);
            file.set_times(FileTimes::new().set_modified(later)).unwrap();
            let after = open.changed_at_ns().unwrap();
            assert!(before.0 < after.0 && before.1 <= after.1, "{before:?} {after:?}");
        }
    }

    #[test]
    fn every_read_is_taken_from_the_rate_limit() {
        let directory = tempfile::tempdir().unwrap();
        let files = Arc::new(LocalFiles::new(directory.path()));
        let (source, entries) = both(directory.path(), files, Some(100 * BYTES as u64));
        let limit = source.limit.clone().unwrap();
        for entry in &entries {
            let mut open = source.open(entry).unwrap().unwrap();
            let before = limit.due();
            assert_eq!(open.read_at(0, &mut [1; BYTES]).unwrap(), BYTES);
            let put_off = limit.due() - before;
            assert!(put_off >= Duration::from_millis(10), "{put_off:?}");
        }
    }

    /// A hint: of which file, where it begins, how long it is.
    type Hint = (PathBuf, u64, u64);

    /// Files of this host, with the hints that were given about them.
    #[derive(Debug)]
    struct Heard {
        inner: LocalFiles,
        hints: Arc<Mutex<Vec<Hint>>>,
    }

    #[derive(Debug)]
    struct HeardFile {
        inner: Box<dyn ServerFile>,
        path: PathBuf,
        hints: Arc<Mutex<Vec<Hint>>>,
    }

    impl ServerFiles for Heard {
        fn here(&self) -> Option<&Path> {
            self.inner.here()
        }
        fn place(&self, path: &Path) -> PathBuf {
            self.inner.place(path)
        }
        fn open(&self, path: &Path, size_bytes: u64) -> io::Result<Option<Box<dyn ServerFile>>> {
            let opened = self.inner.open(path, size_bytes)?;
            Ok(opened.map(|inner| -> Box<dyn ServerFile> {
                let (path, hints) = (path.to_owned(), Arc::clone(&self.hints));
                Box::new(HeardFile { inner, path, hints })
            }))
        }
        fn read(&self, path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>> {
            self.inner.read(path, limit_bytes)
        }
        fn names(&self, directory: &Path) -> io::Result<Option<Vec<OsString>>> {
            ServerFiles::names(&self.inner, directory)
        }
        fn scan(&self, options: &ScanOptions) -> Result<Scan, postgres::Error> {
            self.inner.scan(options)
        }
        fn verify(&self, roots: &Roots) -> Result<(), postgres::Error> {
            self.inner.verify(roots)
        }
        fn unreadable(&self, path: &Path, source: io::Error) -> postgres::Error {
            ServerFiles::unreadable(&self.inner, path, source)
        }
    }

    impl ServerFile for HeardFile {
        fn read_full_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
            self.inner.read_full_at(buffer, offset)
        }
        fn advise(&self, offset: u64, length: u64) {
            self.hints.lock().unwrap().push((self.path.clone(), offset, length));
        }
    }

    #[test]
    fn a_hint_of_what_is_read_next_reaches_the_servers_files() {
        let directory = tempfile::tempdir().unwrap();
        let hints = Arc::default();
        let heard = Heard { inner: LocalFiles::new(directory.path()), hints: Arc::clone(&hints) };
        let (source, entries) = both(directory.path(), Arc::new(heard), None);
        for entry in &entries {
            let mut open = source.open(entry).unwrap().unwrap();
            open.advise(2 << 20, 8192);
            assert_eq!(open.read_at(0, &mut [1; BYTES]).unwrap(), BYTES);
        }
        let wanted = ["16384", "plain"].map(|name| (PathBuf::from(name), 2 << 20, 8192));
        assert_eq!(*hints.lock().unwrap(), wanted);
    }
}
