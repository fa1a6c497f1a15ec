//! The files of a running server as the repository reads them: page by page where there are pages, with their checksums
//! looked at in the same pass.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use postgres::files::{ServerFile, ServerFiles};
use postgres::relation::{PageRules, RelationFile, RelationReader};
use postgres::scan::{EntryKind, ScanEntry};
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
    places: HashMap<Vec<u8>, (PathBuf, Option<RelationFile>)>,
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
    /// `rate_limit_bytes` is how much may be read in a second; `tables` is told which files changed.
    pub(crate) fn new(
        files: Arc<dyn ServerFiles>,
        entries: &[ScanEntry],
        rules: PageRules,
        rate_limit_bytes: Option<u64>,
        tables: Arc<TableFiles>,
    ) -> Self {
        let place = |entry: &ScanEntry| {
            let relation = match entry.kind {
                EntryKind::Relation(relation) => Some(relation),
                EntryKind::Plain | EntryKind::External => None,
                EntryKind::Directory | EntryKind::ControlFile => return None,
            };
            Some((entry.path.clone().into_bytes(), (entry.source.clone(), relation)))
        };
        let places = entries.iter().filter_map(place).collect();
        let limit = RateLimit::new(rate_limit_bytes).map(Arc::new);
        Self { files, places, rules, limit, tables, found: Arc::default() }
    }

    /// What was found so far; complete once every file is closed.
    pub(crate) fn found(&self) -> Found {
        self.found.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Source for DataDirectory {
    fn changed(&self, entry: &SourceEntry) {
        if let Some((_, Some(relation))) = self.places.get(&entry.path)
            && let Ok(path) = std::str::from_utf8(&entry.path)
        {
            self.tables.changed(path, *relation);
        }
    }

    fn open(&self, entry: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        let Some((path, relation)) = self.places.get(&entry.path) else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no such entry in the scan"));
        };
        let named = |error: io::Error| {
            let place = self.files.place(path);
            io::Error::new(error.kind(), format!("{}: {error}", place.display()))
        };
        let (files, size) = (&*self.files, entry.size_bytes);
        if let Some(relation) = relation {
            let reader = RelationReader::open_in(files, path, size, *relation, self.rules);
            return Ok(reader.map_err(named)?.map(|reader| -> Box<dyn SourceFile> {
                Box::new(Relation {
                    path: String::from_utf8_lossy(&entry.path).into_owned(),
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

    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        self.file.changed_at_ns()
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

    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        self.reader.changed_at_ns()
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
