//! Segments that are stored before the server asks for that.
//!
//! A server hands over one segment and waits until it is stored, then the next. So while it waits for one, the next ones
//! that it has marked as ready are read, checked, compressed and sealed, each on a core of its own. They are *stored* one
//! after the other, in the server's order: an archive that has a segment and not the one before it has a gap, for everybody
//! who looks at that moment, and for ever when the server is lost in it.
//!
//! What was stored ahead counts when the server asks for it, and only if the file is the one that was read. What failed ahead
//! is done again then, and that is what is told.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use proto::{Action, Code, Failure, WalFileName};
use repository::Repository;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::super::lineage::Whose;
use super::super::push::{self, Pushed};
use crate::context::blocking;

/// Memory for segments that nobody has asked for yet. Each is held twice, as it is and sealed.
const MEMORY_MIB: usize = 96;
/// How many may be stored, or be about to be, that the server has not asked for yet.
const WINDOW: usize = 16;
/// How many names of a long list are kept in mind. A list is read again when they are used up.
const NAMES_MAX: usize = 1_000;

/// What is done ahead for all servers of a host.
#[derive(Debug)]
pub(super) struct Ahead {
    lines: Mutex<BTreeMap<(Whose, PathBuf), Arc<Mutex<Line>>>>,
    /// In MiB.
    memory: Arc<Semaphore>,
}

impl Default for Ahead {
    fn default() -> Self {
        Self { lines: Mutex::default(), memory: Arc::new(Semaphore::new(MEMORY_MIB)) }
    }
}

/// The log of one server.
#[derive(Debug, Default)]
struct Line {
    uploads: BTreeMap<String, Upload>,
    /// The one that was begun last: the next one waits for it.
    last: Option<Upload>,
    /// Segments that the server has marked, from the oldest on.
    marked: VecDeque<String>,
}

/// A file on its way, and what it was when it was read.
type Upload = Shared<BoxFuture<'static, Result<(Pushed, Stamp), Failure>>>;

/// Whose files, and where they are.
#[derive(Debug, Clone)]
struct Source {
    repository: Arc<Repository>,
    whose: Whose,
    directory: PathBuf,
}

impl Ahead {
    /// As [`push`](super::super::push), with what was done ahead, and does more of it.
    pub(super) async fn push(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        whose: &Whose,
        path: &Path,
    ) -> Result<Pushed, Failure> {
        let file = push::name_of(path)?;
        let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
        let line = {
            let mut lines = lock(&self.lines);
            Arc::clone(lines.entry((whose.clone(), directory.clone())).or_default())
        };
        let source = Source { repository: Arc::clone(repository), whose: whose.clone(), directory };
        let (upload, was_ahead) = {
            let (this, line, source) = (Arc::clone(self), Arc::clone(&line), source.clone());
            blocking(move || Ok(this.begin(&mut lock(&line), &source, &file))).await?
        };
        let stored = upload.clone().await;
        lock(&line).forget(&file.to_string(), &upload);
        match stored {
            Ok((pushed, stamp)) if !was_ahead || Stamp::of(path).await.ok() == Some(stamp) => {
                Ok(pushed)
            }
            // It failed when nobody waited for it, or is another file by now.
            _ if was_ahead => {
                begin(&source, &file.to_string(), None, None).await.map(|(pushed, _)| pushed)
            }
            stored => stored.map(|(pushed, _)| pushed),
        }
    }

    /// The upload of a file, whether it was begun before, and the next ones on their way.
    fn begin(&self, line: &mut Line, source: &Source, file: &WalFileName) -> (Upload, bool) {
        let name = file.to_string();
        if line.marked.is_empty() {
            line.marked = marked(&source.directory);
        }
        line.drop_useless(&name);
        let known = line.uploads.get(&name).cloned();
        let was_ahead = known.is_some();
        let upload = known.unwrap_or_else(|| {
            let upload = begin(source, &name, None, None);
            line.uploads.insert(name.clone(), upload.clone());
            if line.uploads.len() == 1 {
                line.last = Some(upload.clone());
            }
            upload
        });
        while line.uploads.len() < WINDOW
            && let Some(next) = line.marked.front()
        {
            // What is older than the file that is asked for now comes when it is asked for.
            let is_next = *next > name && !line.uploads.contains_key(next);
            let size = std::fs::metadata(source.directory.join(next)).map(|file| file.len());
            if let (true, Ok(size)) = (is_next, size) {
                let mib = u32::try_from(2 * size.div_ceil(1 << 20)).unwrap_or(u32::MAX);
                let memory = Arc::clone(&self.memory).try_acquire_many_owned(mib);
                let Ok(memory) = memory else { break };
                let upload = begin(source, next, line.last.clone(), Some(memory));
                line.uploads.insert(next.clone(), upload.clone());
                line.last = Some(upload);
            }
            line.marked.pop_front();
        }
        (upload, was_ahead)
    }
}

impl Line {
    /// What failed is begun again when it is asked for; what is older than the file `asked` for now was asked for before, or is
    /// not wanted any more.
    fn drop_useless(&mut self, asked: &str) {
        self.uploads.retain(|name, upload| match upload.peek() {
            None => true,
            Some(Ok(_)) => name.as_str() >= asked,
            Some(Err(_)) => false,
        });
    }

    fn forget(&mut self, name: &str, upload: &Upload) {
        if self.uploads.get(name).is_some_and(|known| known.ptr_eq(upload)) {
            self.uploads.remove(name);
        }
    }
}

/// Begins to store a file, which waits for the one before it and then is stored, or fails with it.
fn begin(
    source: &Source,
    name: &str,
    before: Option<Upload>,
    memory: Option<OwnedSemaphorePermit>,
) -> Upload {
    let (source, path) = (source.clone(), source.directory.join(name));
    let storing = tokio::spawn(async move {
        let unreadable = |error: io::Error| {
            let what = format!("failed to look at {}: {error}", path.display());
            Failure::new(Code::SourceUnreadable, Action::FixData, what)
        };
        let stamp = Stamp::of(&path).await.map_err(unreadable)?;
        let ready = push::ready(&source.repository, &source.whose, &path).await?;
        if let Some(before) = before {
            before.await?;
        }
        let pushed = ready.store(&source.repository).await?;
        // Nobody opened it for this file: it may have gone, and something else lie in its place.
        source.repository.check_there().await?;
        drop(memory);
        Ok((pushed, stamp))
    });
    let stored = async move {
        storing.await.unwrap_or_else(|gone| {
            Err(Failure::bug(&format!("the storing of a WAL file ended: {gone}")))
        })
    };
    stored.boxed().shared()
}

/// The segments that a server has marked as ready to be archived, from the oldest on. Other files are few and small, and the
/// server asks for them in an order of its own.
fn marked(directory: &Path) -> VecDeque<String> {
    let entries = std::fs::read_dir(directory.join("archive_status")).into_iter().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            let name = name.strip_suffix(".ready")?;
            matches!(name.parse(), Ok(WalFileName::Segment(_))).then(|| name.to_owned())
        })
        .collect();
    names.sort_unstable();
    names.truncate(NAMES_MAX);
    names.into()
}

/// What tells one file, and one content of it, from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    async fn of(path: &Path) -> io::Result<Self> {
        let file = tokio::fs::metadata(path).await?;
        Ok(Self {
            device: file.dev(),
            inode: file.ino(),
            size: file.size(),
            modified: (file.mtime(), file.mtime_nsec()),
            changed: (file.ctime(), file.ctime_nsec()),
        })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
