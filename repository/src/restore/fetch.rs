//! From "this stretch of that file is in this frame" to bytes in memory: gathers frames, joins neighbours into one
//! request, keeps several requests in flight.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::entry::Place;
use crate::error::Error;
use crate::layout;
use crate::pack::{FrameRef, ObjectType, PackId};
use crate::progress::Progress;
use crate::reader::Backup;
use crate::stop::Stop;

/// A file being restored.
#[derive(Debug)]
pub(super) struct TargetFile {
    /// Tells files apart cheaply.
    pub(super) id: u64,
    pub(super) path: Vec<u8>,
    pub(super) mode: u32,
    pub(super) size_bytes: u64,
    /// It is there, with its size; else whoever writes first makes it.
    pub(super) made: bool,
}

/// Consecutive units of a file that have to be fetched.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) file: Arc<TargetFile>,
    /// Where the first one goes.
    pub(super) offset: u64,
    pub(super) bytes: u32,
    pub(super) place: Place,
}

/// Bytes of a frame that go into a file.
#[derive(Debug)]
pub(super) struct Write {
    pub(super) file: Arc<TargetFile>,
    pub(super) file_offset: u64,
    pub(super) frame_offset: u32,
    pub(super) length: u32,
}

/// A frame and everything that is wanted from it now.
#[derive(Debug)]
pub(super) struct Use {
    pub(super) frame: FrameRef,
    pub(super) writes: Vec<Write>,
}

/// Fetched bytes with the frames in them.
pub(super) struct Fetched {
    pub(super) start: u64,
    pub(super) bytes: Bytes,
    pub(super) uses: Vec<Use>,
    /// Memory is given back when the bytes are dropped with this.
    pub(super) permit: OwnedSemaphorePermit,
}

/// Frames of one request reach over at most so many bytes.
const REQUEST_BYTES: u64 = 4 << 20;
/// Bytes between two frames that are fetched along rather than by another request.
const GAP_BYTES: u64 = 128 << 10;
/// Stretches gathered before they are sorted and fetched. More join better; each takes about 60 bytes.
const WRITES_MAX: usize = 32_768;
/// Content gathered before it is fetched, so that the threads are fed early.
const WINDOW_BYTES: u64 = 64 << 20;

/// Gathers what is wanted and sends for it.
pub(super) struct Fetcher<'a> {
    backup: &'a Backup,
    stop: &'a Arc<Stop>,
    progress: &'a Arc<Progress>,
    /// Without it, requests are only counted.
    ready: Option<Sender<Fetched>>,
    memory: Arc<Semaphore>,
    uses: HashMap<(PackId, u32), Use>,
    writes: usize,
    bytes: u64,
}

impl<'a> Fetcher<'a> {
    /// `ready` has room for as many messages as there are requests in flight.
    pub(super) fn new(
        backup: &'a Backup,
        stop: &'a Arc<Stop>,
        progress: &'a Arc<Progress>,
        ready: Option<Sender<Fetched>>,
        requests_max: usize,
    ) -> Self {
        Self {
            backup,
            stop,
            progress,
            ready,
            memory: Arc::new(Semaphore::new(requests_max)),
            uses: HashMap::new(),
            writes: 0,
            bytes: 0,
        }
    }

    /// Does as it is told until nobody wants anything any more.
    pub(super) fn run(mut self, wanted: &Receiver<Vec<Wanted>>) -> Result<(), Error> {
        for wanted in wanted {
            for wanted in wanted {
                self.want(wanted)?;
            }
        }
        self.flush()
    }

    fn want(&mut self, wanted: Wanted) -> Result<(), Error> {
        let Wanted { file, offset, bytes, place } = wanted;
        let used = self
            .uses
            .entry((place.frame.pack, place.frame.number))
            .or_insert_with(|| Use { frame: place.frame, writes: Vec::new() });
        if used.frame != place.frame {
            let key = layout::pack(self.backup.lineage(), place.frame.pack);
            return Err(Error::damaged(key, "the manifest describes a frame in it in two ways"));
        }
        used.writes.push(Write {
            file,
            file_offset: offset,
            frame_offset: place.offset,
            length: bytes,
        });
        self.writes += 1;
        self.bytes += u64::from(bytes);
        if self.writes >= WRITES_MAX || self.bytes >= WINDOW_BYTES {
            self.flush()?;
        }
        Ok(())
    }

    /// Sends for everything gathered. Waits while too much is in memory.
    fn flush(&mut self) -> Result<(), Error> {
        let mut uses: Vec<Use> = self.uses.drain().map(|(_, wanted)| wanted).collect();
        uses.sort_by_key(|wanted| (wanted.frame.pack, wanted.frame.offset));
        self.writes = 0;
        self.bytes = 0;
        let mut request: Vec<Use> = Vec::new();
        for wanted in uses {
            let joins = match (request.first(), request.last()) {
                (Some(first), Some(last)) => {
                    first.frame.pack == wanted.frame.pack
                        && last.frame.end() <= wanted.frame.offset
                        && wanted.frame.offset - last.frame.end() <= GAP_BYTES
                        && wanted.frame.end() - first.frame.offset <= REQUEST_BYTES
                }
                _ => true,
            };
            if !joins {
                self.send(std::mem::take(&mut request))?;
            }
            request.push(wanted);
        }
        if request.is_empty() { Ok(()) } else { self.send(request) }
    }

    fn send(&self, uses: Vec<Use>) -> Result<(), Error> {
        let (Some(first), Some(last)) = (uses.first(), uses.last()) else { return Ok(()) };
        let pack = first.frame.pack;
        let range = first.frame.offset..last.frame.end();
        let record = self.backup.reader.record(pack)?;
        let key = layout::pack(self.backup.lineage(), pack);
        if range.end > record.size_bytes
            || !matches!(record.kind, ObjectType::Data | ObjectType::Wal)
        {
            return Err(Error::damaged(key, "a reference into it cannot be right"));
        }
        let Some(ready) = self.ready.clone() else {
            self.progress.add_stored(range.end - range.start);
            return Ok(());
        };
        let memory = Arc::clone(&self.memory);
        let permit =
            self.stop.wait(async { memory.acquire_owned().await.map_err(|_| Error::Cancelled) })?;
        let stop = Arc::clone(self.stop);
        let store = Arc::clone(&self.backup.repository.store);
        let progress = Arc::clone(self.progress);
        self.stop.runtime().spawn(async move {
            let fetched = tokio::select! {
                biased;
                () = stop.token().cancelled() => return,
                fetched = store.get_range(&key, range.clone()) => fetched,
            };
            match fetched {
                Ok(bytes) if bytes.len() as u64 == range.end - range.start => {
                    progress.add_stored(bytes.len() as u64);
                    // Never full: a permit is held for every message in it.
                    let _ = ready.try_send(Fetched { start: range.start, bytes, uses, permit });
                }
                Ok(_) => stop.fail(Error::damaged(
                    key,
                    "the store returned another number of bytes than asked for",
                )),
                Err(error) => stop.fail(Error::needed(error)),
            }
        });
        Ok(())
    }
}
