//! Segments that are fetched before a recovery asks for them.
//!
//! A server that recovers asks for a segment, replays it, and asks for the next. Meanwhile the next ones are fetched, opened
//! and kept, in memory and in files beside the one that the server wants, which have no name there and go with this process. Nothing but
//! their content is, and what it says: what it may be used for is looked at when the server asks.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use proto::wal::SegmentName;
use proto::{Failure, LineageId, WalFileName};
use repository::Repository;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::super::get::{Found, Prepared};
use super::tasks::Tasks;

/// Memory for segments that nobody has asked for yet.
const MEMORY_MIB: usize = 64;
/// How many segments ahead of a server that asks for one after the other.
const SEGMENTS_MAX: usize = 4;
/// A recovery that asks for nothing for so long has ended, or replays more slowly than anything is fetched.
const KEPT: Duration = Duration::from_mins(1);

#[derive(Debug)]
pub(super) struct ReadAhead {
    lines: Mutex<BTreeMap<(LineageId, PathBuf), Line>>,
    /// In MiB.
    memory: Arc<Semaphore>,
    tasks: Tasks,
}

/// The recovery of one server.
#[derive(Debug)]
struct Line {
    fetches: BTreeMap<SegmentName, Fetch>,
    asked_at: Instant,
}

/// A segment on its way; nothing when it is not there, or could not be fetched.
type Fetch = Shared<BoxFuture<'static, Option<Fetched>>>;

#[derive(Debug, Clone)]
struct Fetched {
    content: Bytes,
    /// Whoever asks takes it.
    prepared: Arc<Mutex<Prepared>>,
    _memory: Arc<OwnedSemaphorePermit>,
}

impl ReadAhead {
    pub(super) fn of(tasks: Tasks) -> Self {
        Self { lines: Mutex::default(), memory: Arc::new(Semaphore::new(MEMORY_MIB)), tasks }
    }

    /// As [`Repository::fetch_wal`] for a server that wants the file at `to`, with what was fetched ahead, and fetches more. Only
    /// content is remembered: that there is none is asked for every time.
    pub(super) async fn fetch(
        &self,
        repository: &Arc<Repository>,
        lineage: LineageId,
        file: &WalFileName,
        to: &Path,
    ) -> Result<Option<Found>, Failure> {
        let WalFileName::Segment(name) = *file else {
            return Ok(repository.fetch_wal(lineage, file).await?.map(Found::from));
        };
        let line = (lineage, to.parent().unwrap_or(Path::new("/")).to_owned());
        let fetch = {
            let mut lines = lock(&self.lines);
            lines.get_mut(&line).and_then(|line| line.fetches.remove(&name))
        };
        let ahead = match fetch {
            Some(fetch) => fetch.await,
            None => None,
        };
        // One that is asked for for the first time may be the only one.
        let segments = if ahead.is_some() { SEGMENTS_MAX } else { 1 };
        let found = match ahead {
            Some(Fetched { content, prepared, _memory: memory }) => {
                // It has its reader, and another one takes its place.
                drop(memory);
                let prepared = std::mem::take(&mut *lock(&prepared));
                Some(Found { content, prepared, next: None })
            }
            None => repository.fetch_wal(lineage, file).await?.map(Found::from),
        };
        let Some(found) = found else { return Ok(None) };
        let next = self.go_on(repository, line, name, found.content.len(), segments);
        let content = async |next: Fetch| next.await.map(|fetched| fetched.content);
        Ok(Some(Found { next: next.map(|next| content(next).boxed()), ..found }))
    }

    /// Fetches the next segments, and drops what is not among them. Gives the first of them.
    fn go_on(
        &self,
        repository: &Arc<Repository>,
        line: (LineageId, PathBuf),
        name: SegmentName,
        bytes: usize,
        segments: usize,
    ) -> Option<Fetch> {
        let size = u32::try_from(bytes).ok()?;
        let segment = name.segment(size)?;
        let wanted: Vec<SegmentName> =
            std::iter::successors(Some(segment.next()), |segment| Some(segment.next()))
                .take(segments)
                .map(|segment| segment.name(size))
                .collect();
        let (lineage, directory) = line.clone();
        let mut lines = lock(&self.lines);
        let line = lines
            .entry(line)
            .or_insert_with(|| Line { fetches: BTreeMap::new(), asked_at: Instant::now() });
        line.asked_at = Instant::now();
        line.fetches.retain(|name, _| wanted.contains(name));
        for name in wanted {
            if line.fetches.contains_key(&name) {
                continue;
            }
            let mib = size.div_ceil(1 << 20);
            let Ok(memory) = Arc::clone(&self.memory).try_acquire_many_owned(mib) else { break };
            let fetch = begin(&self.tasks, repository, lineage, name, directory.clone(), memory);
            line.fetches.insert(name, fetch);
        }
        line.fetches.get(&segment.next().name(size)).cloned()
    }

    /// Drops what was fetched for a server, and says whether there was something.
    pub(super) fn forget(&self, lineage: LineageId, to: &Path) -> bool {
        let line = (lineage, to.parent().unwrap_or(Path::new("/")).to_owned());
        lock(&self.lines).remove(&line).is_some_and(|line| !line.fetches.is_empty())
    }

    /// Forgets what no recovery asks for any more.
    pub(super) fn sweep(&self) {
        lock(&self.lines).retain(|_, line| line.asked_at.elapsed() < KEPT);
    }
}

fn begin(
    tasks: &Tasks,
    repository: &Arc<Repository>,
    lineage: LineageId,
    name: SegmentName,
    directory: PathBuf,
    memory: OwnedSemaphorePermit,
) -> Fetch {
    let repository = Arc::clone(repository);
    let own = tasks.clone();
    let fetching = tasks.spawn(async move {
        let file = WalFileName::Segment(name);
        let fetched = own.unless_closing(repository.fetch_wal(lineage, &file)).await?;
        let content = fetched.unwrap_or_else(|error| {
            tracing::debug!("{name} could not be fetched ahead: {error}");
            None
        })?;
        let prepared = Arc::new(Mutex::new(Prepared::of(&directory, name, &content).await));
        Some(Fetched { content, prepared, _memory: Arc::new(memory) })
    });
    async move { fetching.await.ok().flatten().flatten() }.boxed().shared()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
