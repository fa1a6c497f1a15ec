//! Reading one file of a backup as a stream, or parts of it, without a target directory: for what goes into another program.
//! Memory is a few stretches, whatever the file's size; they are read ahead while whoever listens is busy.

use std::collections::HashMap;
use std::ops::Range;

use bytes::{Bytes, BytesMut};
use futures::{Stream, StreamExt, stream};
use tokio_util::task::AbortOnDropHandle;

use crate::again::again;
use crate::entry::{Body, Content, Extent, FileBody};
use crate::error::{Error, show};
use crate::layout;
use crate::limits::SHARD_UNITS;
use crate::manifest::RootShard;
use crate::pack::{FrameRef, ObjectType, PackId};
use crate::reader::Backup;
use crate::shard::ShardRef;

/// Stretches that are fetched and opened at the same time, 8 MiB each.
const STRETCHES_IN_FLIGHT: usize = 3;
/// Frames of one request reach over at most so many bytes.
const REQUEST_BYTES: u64 = 4 << 20;

/// A file in a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredFile {
    /// Its path.
    pub path: Vec<u8>,
    /// Its size.
    pub size_bytes: u64,
}

/// The content of a file of a backup.
#[derive(Debug)]
pub struct FileContent {
    backup: Backup,
    file: FileBody,
}

/// A part of a stretch of a file.
struct Piece {
    stretch: Stretch,
    /// Bytes of the whole stretch.
    bytes: u64,
    /// What of it is wanted.
    wanted: Range<u64>,
}

/// What describes a stretch.
enum Stretch {
    Inline(Vec<Extent>),
    Shard(ShardRef),
}

impl Backup {
    /// Every regular file, without WAL. To be used where the caller knows that there are few.
    pub async fn files(&self) -> Result<Vec<StoredFile>, Error> {
        let mut files = Vec::new();
        for root in &self.root.shards {
            for entry in self.reader.entries(&root.shard).await? {
                if let Body::File(FileBody { size_bytes, .. }) = entry.body {
                    files.push(StoredFile { path: entry.path, size_bytes });
                }
            }
        }
        Ok(files)
    }

    /// One regular file.
    pub async fn file_content(&self, path: &[u8]) -> Result<FileContent, Error> {
        self.content_in(&self.root.shards, path).await
    }

    /// One of the files that a restore writes last. They are few, so that it is found without looking through all others.
    pub async fn late_content(&self, path: &[u8]) -> Result<FileContent, Error> {
        self.content_in(&self.root.late, path).await
    }

    async fn content_in(&self, roots: &[RootShard], path: &[u8]) -> Result<FileContent, Error> {
        for root in roots {
            for entry in self.reader.entries(&root.shard).await? {
                if let (true, Body::File(file)) = (entry.path == path, entry.body) {
                    return Ok(FileContent { backup: self.clone(), file });
                }
            }
        }
        Err(Error::Missing { key: format!("{} in backup {}", show(path), self.id()) })
    }
}

impl FileContent {
    /// How long the file is.
    pub fn size_bytes(&self) -> u64 {
        self.file.size_bytes
    }

    /// Its bytes in order, decrypted and checked. The first error is the last item.
    pub fn stream(&self) -> impl Stream<Item = Result<Bytes, Error>> + Send + use<> {
        let whole = 0..self.file.size_bytes;
        self.parts(std::slice::from_ref(&whole))
    }

    /// The bytes of these parts, one part after the other; what lies behind the file's end is not there.
    pub fn parts(
        &self,
        parts: &[Range<u64>],
    ) -> impl Stream<Item = Result<Bytes, Error>> + Send + use<> {
        let (backup, unit_bytes) = (self.backup.clone(), self.file.unit_bytes);
        let pieces: Vec<Piece> = parts.iter().flat_map(|part| self.pieces(part)).collect();
        let read = move |piece| {
            // Each goes on by itself, whether anybody listens or not.
            let reading = again_piece(backup.clone(), unit_bytes, piece);
            let reading = AbortOnDropHandle::new(tokio::spawn(reading));
            async move { reading.await.unwrap_or_else(|gone| Err(ended(&gone))) }
        };
        stream::iter(pieces).map(read).buffered(STRETCHES_IN_FLIGHT)
    }

    fn pieces(&self, part: &Range<u64>) -> Vec<Piece> {
        let size = self.file.size_bytes;
        let part = part.start..part.end.min(size);
        match &self.file.content {
            // An empty file has one piece all the same.
            Content::Inline(extents) if part.start <= part.end => {
                let stretch = Stretch::Inline(extents.clone());
                vec![Piece { stretch, bytes: size, wanted: part }]
            }
            Content::Inline(_) => Vec::new(),
            Content::Shards(shards) => {
                let whole = u64::from(SHARD_UNITS) * u64::from(self.file.unit_bytes);
                let piece = |(number, shard): (u64, &ShardRef)| {
                    let start = number * whole;
                    let bytes = size.saturating_sub(start).min(whole);
                    let wanted = part.start.max(start)..part.end.min(start + bytes);
                    (wanted.start < wanted.end).then(|| Piece {
                        stretch: Stretch::Shard(shard.clone()),
                        bytes,
                        wanted: wanted.start - start..wanted.end - start,
                    })
                };
                (0..).zip(shards).filter_map(piece).collect()
            }
        }
    }
}

fn ended(gone: &tokio::task::JoinError) -> Error {
    Error::Bug(format!("reading a file ended: {gone}"))
}

async fn again_piece(backup: Backup, unit_bytes: u32, piece: Piece) -> Result<Bytes, Error> {
    let Piece { stretch, bytes, wanted } = piece;
    again(|| async {
        let extents = match &stretch {
            Stretch::Inline(extents) => extents.clone(),
            Stretch::Shard(shard) => backup.reader.extents(shard, unit_bytes, bytes).await?,
        };
        let (extents, kept) = overlapping(extents, unit_bytes, bytes, &wanted);
        let mut read = read_extents(&backup, unit_bytes, extents, kept.end - kept.start).await?;
        let at = |place: u64| usize::try_from(place - kept.start).unwrap_or(usize::MAX);
        read.truncate(at(wanted.end));
        Ok(read.split_off(at(wanted.start).min(read.len())))
    })
    .await
}

/// The extents of a stretch that have something of what is wanted, and what they describe.
fn overlapping(
    extents: Vec<Extent>,
    unit_bytes: u32,
    bytes: u64,
    wanted: &Range<u64>,
) -> (Vec<Extent>, Range<u64>) {
    let mut kept = Vec::new();
    let mut range: Option<Range<u64>> = None;
    let mut start = 0;
    for extent in extents {
        let end = (start + u64::from(extent.units) * u64::from(unit_bytes)).min(bytes);
        if start < wanted.end && wanted.start < end {
            range = Some(range.map_or(start, |range| range.start)..end);
            kept.push(extent);
        }
        start = end;
    }
    (kept, range.unwrap_or(wanted.start..wanted.start))
}

/// Fetches the frames of a stretch and puts its bytes together.
async fn read_extents(
    backup: &Backup,
    unit_bytes: u32,
    extents: Vec<Extent>,
    bytes: u64,
) -> Result<Bytes, Error> {
    let mut frames: Vec<FrameRef> =
        extents.iter().filter_map(|extent| extent.place).map(|place| place.frame).collect();
    frames.sort_unstable_by_key(|frame| (frame.pack, frame.offset));
    frames.dedup();
    let mut stored = Vec::new();
    for request in requests(frames) {
        stored.push((fetch(backup, &request).await?, request));
    }
    let backup = backup.clone();
    // Opening and unpacking keep a processor busy: beside the runtime's threads.
    let put_together = move || {
        let opened = open(&backup, stored)?;
        assemble(&backup, &opened, unit_bytes, &extents, bytes)
    };
    tokio::task::spawn_blocking(put_together).await.unwrap_or_else(|gone| Err(ended(&gone)))
}

/// Joins neighbours.
fn requests(frames: Vec<FrameRef>) -> Vec<Vec<FrameRef>> {
    let mut requests: Vec<Vec<FrameRef>> = Vec::new();
    for frame in frames {
        match requests.last_mut() {
            Some(request)
                if request.last().is_some_and(|last| {
                    last.pack == frame.pack
                        && last.end() == frame.offset
                        && frame.end() - request[0].offset <= REQUEST_BYTES
                }) =>
            {
                request.push(frame);
            }
            _ => requests.push(vec![frame]),
        }
    }
    requests
}

async fn fetch(backup: &Backup, request: &[FrameRef]) -> Result<Bytes, Error> {
    let (Some(first), Some(last)) = (request.first(), request.last()) else {
        return Ok(Bytes::new());
    };
    let record = backup.reader.record(first.pack)?;
    let key = layout::pack(backup.lineage(), first.pack);
    let range: Range<u64> = first.offset..last.end();
    if range.end > record.size_bytes || record.kind != ObjectType::Data {
        return Err(Error::damaged(key, "a reference into it cannot be right"));
    }
    let wanted = range.end - range.start;
    let bytes = backup.repository.store.get_range(&key, range).await.map_err(Error::needed)?;
    if bytes.len() as u64 != wanted {
        let reason = "the store returned another number of bytes than asked for";
        return Err(Error::damaged(key, reason));
    }
    Ok(bytes)
}

type Opened = HashMap<(PackId, u32), Vec<u8>>;

fn open(backup: &Backup, stored: Vec<(Bytes, Vec<FrameRef>)>) -> Result<Opened, Error> {
    let mut unpacker = zstd::bulk::Decompressor::new()
        .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
    let mut opened = Opened::new();
    for (bytes, request) in stored {
        let mut bytes = bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
        for frame in request {
            let damaged =
                |reason| Error::damaged(layout::pack(backup.lineage(), frame.pack), reason);
            let mut sealed = bytes.split_to((frame.stored_bytes as usize).min(bytes.len()));
            let cipher = backup.reader.cipher(frame.pack)?;
            let mut content = Vec::new();
            cipher.open(&frame, &mut sealed, &mut unpacker, &mut content).map_err(damaged)?;
            opened.insert((frame.pack, frame.number), content);
        }
    }
    Ok(opened)
}

fn assemble(
    backup: &Backup,
    opened: &Opened,
    unit_bytes: u32,
    extents: &[Extent],
    bytes: u64,
) -> Result<Bytes, Error> {
    let whole = usize::try_from(bytes).map_err(|_| Error::Bug("a stretch is too long".into()))?;
    let mut content = BytesMut::with_capacity(whole);
    for extent in extents {
        let length = extent.units as usize * unit_bytes as usize;
        let length = length.min(whole - content.len());
        let Some(place) = extent.place else {
            content.resize(content.len() + length, 0);
            continue;
        };
        let from = place.offset as usize;
        let part = opened
            .get(&(place.frame.pack, place.frame.number))
            .and_then(|frame| frame.get(from..from + length));
        let Some(part) = part else {
            let key = layout::pack(backup.lineage(), place.frame.pack);
            return Err(Error::damaged(key, "a stretch lies outside its frame"));
        };
        content.extend_from_slice(part);
    }
    if content.len() != whole {
        let key = layout::of_backup(backup.lineage(), backup.id(), "manifest");
        return Err(Error::damaged(key, "a file has fewer bytes than its entry says"));
    }
    Ok(content.freeze())
}
