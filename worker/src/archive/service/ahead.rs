//! Segments that are stored before the server asks for that.
//!
//! A server hands over one segment and waits until it is stored, then the next. So while it waits for one, the ones that
//! follow and that it has marked as ready are read, checked, compressed and sealed, each on a core of its own. They are *stored*
//! one after the other: an archive that has a segment and not the one before it has a gap, for everybody who looks at that
//! moment, and for ever when the server is lost in it. So only what follows without a break on the same timeline is begun,
//! and each waits for the very one before it and fails with it.
//!
//! What was stored ahead counts when the server asks for it, if the file still is the one that was read and the repository of
//! that moment has it. Else it is done again, and that is what is told.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use proto::wal::SegmentName;
use proto::{Action, Code, Failure, WalFileName};
use repository::Repository;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::super::lineage::Whose;
use super::super::push::{self, Pushed};
use super::tasks::Tasks;
use crate::context::blocking;

/// Memory for segments that nobody has asked for yet. Each is held twice, as it is and sealed.
const MEMORY_MIB: usize = 96;
/// How many may be stored, or be about to be, that the server has not asked for yet.
const WINDOW: usize = 16;
/// A server that asks for nothing for so long is forgotten.
const KEPT: Duration = Duration::from_mins(10);

/// What is done ahead for all servers of a host.
#[derive(Debug)]
pub(super) struct Ahead {
    lines: Mutex<BTreeMap<Log, SharedLine>>,
    /// In MiB.
    memory: Arc<Semaphore>,
    tasks: Tasks,
}

/// Whose log, and the directory that has it.
type Log = (Whose, PathBuf);
type SharedLine = Arc<tokio::sync::Mutex<Line>>;

/// The log of one server.
#[derive(Debug)]
struct Line {
    /// What was asked for last, and what follows.
    uploads: BTreeMap<SegmentName, Upload>,
    /// What was asked for last failed: nothing is done ahead of what may fail again.
    fails: bool,
    asked_at: Instant,
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
    pub(super) fn of(tasks: Tasks) -> Self {
        Self { lines: Mutex::default(), memory: Arc::new(Semaphore::new(MEMORY_MIB)), tasks }
    }

    /// As [`push`](fn@super::super::push), with what was done ahead, and does more of it.
    pub(super) async fn push(
        self: &Arc<Self>,
        repository: &Arc<Repository>,
        whose: &Whose,
        path: &Path,
    ) -> Result<Pushed, Failure> {
        let WalFileName::Segment(name) = push::name_of(path)? else {
            // Few and small, and the server has an order of its own for them.
            return push::push(repository, whose, path).await;
        };
        let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
        let source = Source { repository: Arc::clone(repository), whose: whose.clone(), directory };
        let line = self.line(&source);
        let (mut stored, was_ahead) = self.stored(&line, &source, name).await?;
        if was_ahead && !counts(&stored, repository, name, path).await {
            stored = self.stored(&line, &source, name).await?.0;
        }
        line.lock().await.fails = stored.is_err();
        stored.map(|(pushed, _)| pushed)
    }

    fn line(&self, source: &Source) -> SharedLine {
        let mut lines = lock(&self.lines);
        let line = lines.entry((source.whose.clone(), source.directory.clone()));
        Arc::clone(line.or_insert_with(|| {
            let line = Line { uploads: BTreeMap::new(), fails: false, asked_at: Instant::now() };
            Arc::new(tokio::sync::Mutex::new(line))
        }))
    }

    /// What came of a segment, and whether it was begun before it was asked for.
    async fn stored(
        self: &Arc<Self>,
        line: &SharedLine,
        source: &Source,
        name: SegmentName,
    ) -> Result<(Result<(Pushed, Stamp), Failure>, bool), Failure> {
        let (upload, was_ahead) = {
            let (this, line, source) = (Arc::clone(self), Arc::clone(line), source.clone());
            blocking(move || Ok(this.begin(&mut line.blocking_lock(), &source, name))).await?
        };
        let stored = upload.clone().await;
        let mut line = line.lock().await;
        if line.uploads.get(&name).is_some_and(|known| known.ptr_eq(&upload)) {
            line.uploads.remove(&name);
        }
        Ok((stored, was_ahead))
    }

    /// The upload of a segment, and whether it was begun before; and those that follow on their way.
    fn begin(&self, line: &mut Line, source: &Source, name: SegmentName) -> (Upload, bool) {
        line.asked_at = Instant::now();
        let known = line.uploads.get(&name).cloned();
        let was_ahead = known.is_some();
        let upload = known.unwrap_or_else(|| self.upload(source, name, None, None));
        if was_ahead {
            line.uploads.retain(|later, _| *later > name);
        } else {
            // Whatever is there waits for another one.
            line.uploads.clear();
        }
        line.uploads.insert(name, upload.clone());
        if !line.fails {
            self.go_on(line, source, name, upload.clone());
        }
        (upload, was_ahead)
    }

    /// Begins what follows a segment.
    fn go_on(&self, line: &mut Line, source: &Source, name: SegmentName, upload: Upload) {
        let size = std::fs::metadata(source.directory.join(name.to_string()));
        let size = size.ok().and_then(|file| u32::try_from(file.len()).ok()).unwrap_or(0);
        let Some(mut segment) = (size > 0).then(|| name.segment(size)).flatten() else { return };
        let mut before = upload;
        for _ in 0..WINDOW {
            segment = segment.next();
            let next = segment.name(size);
            if let Some(known) = line.uploads.get(&next) {
                before = known.clone();
                continue;
            }
            let mib = (2 * size).div_ceil(1 << 20);
            if !is_marked(&source.directory, next, size) {
                break;
            }
            let Ok(memory) = Arc::clone(&self.memory).try_acquire_many_owned(mib) else { break };
            let upload = self.upload(source, next, Some(before), Some(memory));
            line.uploads.insert(next, upload.clone());
            before = upload;
        }
    }

    /// Begins to store a segment, which waits for the one before it and then is stored, or fails with it.
    fn upload(
        &self,
        source: &Source,
        name: SegmentName,
        before: Option<Upload>,
        memory: Option<OwnedSemaphorePermit>,
    ) -> Upload {
        let (source, path) = (source.clone(), source.directory.join(name.to_string()));
        let tasks = self.tasks.clone();
        let storing = self.tasks.spawn(async move {
            let unreadable = |error: io::Error| {
                let what = format!("failed to look at {}: {error}", path.display());
                Failure::new(Code::SourceUnreadable, Action::FixData, what)
                    .with_hint("Run the service as the server's user.")
            };
            let stamp = Stamp::of(&path).await.map_err(unreadable)?;
            let mut ready = push::ready(&source.repository, &source.whose, &path).await?;
            if let Some(before) = before {
                ready = ready.stage(&source.repository).await;
                let before = before.await;
                let goes_on =
                    before.and_then(|_| if tasks.are_closing() { Err(ends()) } else { Ok(()) });
                if let Err(failure) = goes_on {
                    ready.discard().await;
                    return Err(failure);
                }
            }
            let pushed = ready.store(&source.repository).await?;
            drop(memory);
            Ok((pushed, stamp))
        });
        let stored = async move {
            storing.await.map_or_else(
                |gone| Err(Failure::bug(format!("the storing of a WAL file ended: {gone}"))),
                |stored| stored.unwrap_or_else(|| Err(ends())),
            )
        };
        stored.boxed().shared()
    }

    /// Forgets servers that do not ask any more.
    pub(super) fn sweep(&self) {
        lock(&self.lines)
            .retain(|_, line| line.try_lock().map_or(true, |line| line.asked_at.elapsed() < KEPT));
    }

    /// How many segments of a server are on their way, or stored and not asked for.
    #[cfg(test)]
    pub(super) fn begun(&self) -> usize {
        let lines = lock(&self.lines);
        lines.values().map(|line| line.try_lock().map_or(0, |line| line.uploads.len())).sum()
    }
}

/// Whether the server has marked a segment as ready to be archived.
fn is_marked(directory: &Path, name: SegmentName, size: u32) -> bool {
    let marked = directory.join("archive_status").join(format!("{name}.ready"));
    let file = std::fs::metadata(directory.join(name.to_string()));
    marked.exists() && file.is_ok_and(|file| file.len() == u64::from(size))
}

/// Whether what was stored ahead is what the server asks to be stored now, where it asks for it.
async fn counts(
    stored: &Result<(Pushed, Stamp), Failure>,
    repository: &Repository,
    name: SegmentName,
    path: &Path,
) -> bool {
    let Ok((pushed, stamp)) = stored else { return false };
    Stamp::of(path).await.ok() == Some(*stamp)
        && repository.has_wal(pushed.identity.lineage, name).await.unwrap_or(false)
}

/// Nobody hears this: whoever asks finds no service, and does the work himself.
fn ends() -> Failure {
    let what = "the WAL service ended before this file was stored";
    Failure::new(Code::WalServiceAway, Action::Retry, what)
        .with_hint("It is stored when it is asked for.")
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
