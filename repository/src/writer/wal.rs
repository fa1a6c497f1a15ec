//! WAL that a backup brings along, stored while the files are still being copied.

use std::io::{self, Read};
use std::sync::{Arc, Mutex, PoisonError};

use super::assemble::ShardWriter;
use super::stream::{PackStream, Uploads, joined};
use crate::entry::{
    Belief, Body, Content, Entry, Extent, FileBody, Place, Stamp, check_path, push_extent,
};
use crate::error::Error;
use crate::limits::{FRAME_BYTES, SHARD_UNITS, UNIT_BYTES_MAX};
use crate::manifest::RootShard;
use crate::pack::{Compressor, ObjectType, PackRecord};

/// Adds WAL to a backup. Clones add to the same backup, from any task.
#[derive(Debug, Clone)]
pub struct WalWriter {
    pub(super) uploads: Arc<Uploads>,
    pub(super) stored: Arc<Mutex<Vec<WalStored>>>,
    pub(super) level: i32,
}

/// One segment in the repository.
#[derive(Debug)]
pub(super) struct WalStored {
    name: String,
    bytes: u64,
    extents: Vec<Extent>,
    record: PackRecord,
}

impl WalWriter {
    /// Stores one segment or history file in a pack of its own. When this returns, it is durable in the repository
    /// (and part of the backup once that is committed). Returns its size.
    pub async fn add(&self, name: &str, content: impl Read + Send + 'static) -> Result<u64, Error> {
        if name.contains('/') {
            return Err(Error::entry(name.as_bytes(), "it is not a file name"));
        }
        check_path(name.as_bytes()).map_err(|reason| Error::entry(name.as_bytes(), reason))?;
        let (this, owned) = (self.clone(), name.to_owned());
        let stored = tokio::task::spawn_blocking(move || this.store(&owned, content))
            .await
            .map_err(|gone| Error::Bug(format!("storing WAL ended: {gone}")))?;
        // What stopped it may have happened to the files beside it: whoever learns of the end first tells why.
        let (bytes, extents, task) = stored.map_err(|error| match error {
            Error::Cancelled => self.uploads.stop.cause(),
            error => error,
        })?;
        let record = match task {
            Some(task) => match joined(task).await {
                Ok(record) => record,
                Err(_) => return Err(self.uploads.stop.cause()),
            },
            None => return Err(Error::entry(name.as_bytes(), "it is empty")),
        };
        let stored = WalStored { name: name.to_owned(), bytes, extents, record };
        self.stored.lock().unwrap_or_else(PoisonError::into_inner).push(stored);
        Ok(bytes)
    }

    fn store(
        &self,
        name: &str,
        mut content: impl Read,
    ) -> Result<(u64, Vec<Extent>, Option<super::stream::PackTask>), Error> {
        let failed = |source: io::Error| Error::Source { path: name.to_owned(), source };
        let mut compressor = Compressor::new(self.level)
            .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
        let mut stream = PackStream::new(Arc::clone(&self.uploads), ObjectType::Wal);
        let mut frame = vec![0; FRAME_BYTES];
        let mut extents = Vec::new();
        let mut bytes = 0_u64;
        loop {
            let filled = fill(&mut content, &mut frame).map_err(failed)?;
            if filled == 0 {
                break;
            }
            let place = stream.append(&frame[..filled], Some(&mut compressor))?;
            let units = u32::try_from(filled.div_ceil(UNIT_BYTES_MAX as usize)).unwrap_or(u32::MAX);
            push_extent(
                &mut extents,
                units,
                Some(Place { frame: place, offset: 0 }),
                UNIT_BYTES_MAX,
            );
            bytes += filled as u64;
            self.uploads.progress.add_read(filled as u64);
        }
        Ok((bytes, extents, stream.end()?))
    }
}

fn fill(content: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match content.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(more) => filled += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Describes the stored WAL in shards. Returns them, the packs, and the number of files. A file that was added twice (the
/// caller could not know whether the first time worked) counts once, the later one.
pub(super) fn describe(
    mut stored: Vec<WalStored>,
    writer: &mut ShardWriter,
) -> Result<(Vec<RootShard>, Vec<PackRecord>, u64), Error> {
    stored.reverse();
    stored.sort_by(|a, b| a.name.cmp(&b.name));
    stored.dedup_by(|later, first| later.name == first.name);
    let mut entries = Vec::with_capacity(stored.len());
    let mut records = Vec::with_capacity(stored.len());
    let files = stored.len() as u64;
    for wal in stored {
        let stamp = Stamp {
            scanned_bytes: wal.bytes,
            mtime_ns: 0,
            ctime_ns: 0,
            inode: 0,
            device: 0,
            belief: Belief::Racy,
        };
        let mut shards = Vec::new();
        for piece in pieces(&wal.extents) {
            shards.push(writer.extents(&piece, &[])?);
        }
        let body = FileBody {
            size_bytes: wal.bytes,
            stamp,
            unit_bytes: UNIT_BYTES_MAX,
            content: Content::Shards(shards),
        };
        entries.push(Entry { path: wal.name.into_bytes(), mode: 0o600, body: Body::File(body) });
        records.push(wal.record);
    }
    let mut shards = Vec::new();
    for entries in entries.chunks(crate::limits::SHARD_ENTRIES) {
        shards.push(writer.entries(entries, &[])?);
    }
    Ok((shards, records, files))
}

/// Cuts extents into stretches of a shard's units.
fn pieces(extents: &[Extent]) -> Vec<Vec<Extent>> {
    let mut pieces = Vec::new();
    let (mut piece, mut room) = (Vec::new(), SHARD_UNITS);
    for extent in extents {
        let mut rest = *extent;
        while rest.units > 0 {
            let units = rest.units.min(room);
            piece.push(Extent { units, place: rest.place });
            rest.units -= units;
            rest.place = rest
                .place
                .map(|place| Place { offset: place.offset + units * UNIT_BYTES_MAX, ..place });
            room -= units;
            if room == 0 {
                pieces.push(std::mem::take(&mut piece));
                room = SHARD_UNITS;
            }
        }
    }
    if !piece.is_empty() {
        pieces.push(piece);
    }
    pieces
}
