//! The last thread of a copy: puts entries and stretches back into order, cuts them into shards, and stores the shards.
//!
//! Where a shard is cut depends on paths alone, so that one file more or less moves no cut but its own.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::checkpoints::Checkpoints;
use super::copy::Copied;
use super::previous::Old;
use super::stream::{PackStream, Uploads};
use crate::detect::spread;
use crate::entry::{Body, Content, Entry, Extent};
use crate::error::Error;
use crate::limits::{HASH_BYTES, SHARD_ENTRIES};
use crate::manifest::{Counts, RootShard};
use crate::pack::{Compressor, ObjectType, PackId};
use crate::progress::Progress;
use crate::shard::{self, ShardRef};
use crate::stop::Stop;

/// How often it looks whether a checkpoint is due while nothing comes.
const TICK: Duration = Duration::from_millis(200);

/// What the assembler hears, each with its number.
pub(super) enum Event {
    /// An entry; its stretches follow.
    Entry { entry: Entry, old: Option<Old>, shape: Shape },
    /// A stretch that was read.
    Copied(Box<Copied>),
    /// A stretch of a large file that was not read.
    Kept { reference: ShardRef, bytes: u64 },
    /// The file was gone when a stretch of it was to be read.
    Vanished,
    /// The stream has ended after so many stretches.
    Ended { pieces: u64 },
}

/// What follows an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// Nothing: it is complete.
    Whole,
    /// So many stretches of a file.
    Pieces(u64),
    /// Stretches of a stream, and then its end.
    Stream,
}

/// Stores shards with their hashes beside them.
#[derive(Debug)]
pub(super) struct ShardWriter {
    stream: PackStream,
    compressor: Option<CompressorBox>,
}

struct CompressorBox(Compressor);

impl std::fmt::Debug for CompressorBox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Compressor")
    }
}

impl ShardWriter {
    pub(super) fn new(uploads: &Arc<Uploads>) -> Result<Self, Error> {
        let compressor = Compressor::new(3)
            .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
        Ok(Self {
            stream: PackStream::new(Arc::clone(uploads), ObjectType::Metadata),
            compressor: Some(CompressorBox(compressor)),
        })
    }

    fn store(
        &mut self,
        (bytes, mut packs): (Vec<u8>, Vec<PackId>),
        hashes: &[u8],
        units: u32,
    ) -> Result<ShardRef, Error> {
        let frame =
            self.stream.append(&bytes, self.compressor.as_mut().map(|boxed| &mut boxed.0))?;
        let twin_stored_bytes =
            if hashes.is_empty() { 0 } else { self.stream.append(hashes, None)?.stored_bytes };
        self.stream.roll()?;
        if !packs.contains(&frame.pack) {
            packs.push(frame.pack);
        }
        Ok(ShardRef { frame, twin_stored_bytes, units, packs: packs.into() })
    }

    pub(super) fn extents(&mut self, extents: &[Extent], hashes: &[u8]) -> Result<ShardRef, Error> {
        let units = extents.iter().map(|extent| extent.units).sum();
        self.store(shard::encode_extents(extents), hashes, units)
    }

    pub(super) fn entries(&mut self, entries: &[Entry], hashes: &[u8]) -> Result<RootShard, Error> {
        let units = u32::try_from(hashes.len() / HASH_BYTES).unwrap_or(u32::MAX);
        let first_path = entries.first().map(|entry| entry.path.clone()).unwrap_or_default();
        Ok(RootShard {
            first_path,
            shard: self.store(shard::encode_entries(entries), hashes, units)?,
        })
    }

    pub(super) fn close(&mut self) -> Result<(), Error> {
        self.stream.close()
    }
}

/// The shards of one copy, in order, and what is in them.
#[derive(Debug, Default)]
pub(super) struct Assembled {
    pub(super) shards: Vec<RootShard>,
    pub(super) counts: Counts,
    /// Files that were gone.
    pub(super) vanished: u64,
}

/// An entry whose stretches are still coming.
struct Growing {
    entry: Entry,
    old: Option<Old>,
    pieces_left: u64,
    /// Its end has not come yet: the stretches are counted from 0 downwards.
    streams: bool,
    /// It ended early, or is gone: what comes behind does not count.
    ended: bool,
    vanished: bool,
    hashes: Vec<u8>,
}

impl Growing {
    /// Ends a stream: only now is it known how long the file is.
    fn end(&mut self, pieces: u64) -> Result<(), Error> {
        let seen = u64::MAX - self.pieces_left;
        let Body::File(file) = &mut self.entry.body else {
            return Err(Error::Bug("a stream that is no file".into()));
        };
        if !self.streams || self.ended || seen != pieces {
            return Err(Error::Bug(format!("a stream of {pieces} stretches ended after {seen}")));
        }
        file.stamp.scanned_bytes = file.size_bytes;
        self.streams = false;
        self.pieces_left = 0;
        Ok(())
    }
}

/// The hashes of an entry in the shard being gathered.
enum Hashes {
    Here(Vec<u8>),
    /// As in the predecessor; fetched only if the shard is written anew.
    There(Old),
}

pub(super) struct Assembler<'a> {
    stop: &'a Stop,
    progress: &'a Progress,
    writer: &'a mut ShardWriter,
    checkpoints: Option<&'a mut Checkpoints>,
    entries: Vec<Entry>,
    hashes: Vec<Hashes>,
    /// The predecessor's shard that the first gathered entry was in.
    candidate: Option<Old>,
    growing: Option<Growing>,
    done: Assembled,
}

impl<'a> Assembler<'a> {
    pub(super) fn new(
        stop: &'a Stop,
        progress: &'a Progress,
        writer: &'a mut ShardWriter,
        checkpoints: Option<&'a mut Checkpoints>,
    ) -> Self {
        Self {
            stop,
            progress,
            writer,
            checkpoints,
            entries: Vec::new(),
            hashes: Vec::new(),
            candidate: None,
            growing: None,
            done: Assembled::default(),
        }
    }

    pub(super) fn run(
        mut self,
        events: &Receiver<(u64, Event)>,
        credits: &Receiver<()>,
    ) -> Result<Assembled, Error> {
        let mut early: BTreeMap<u64, Event> = BTreeMap::new();
        let mut next = 0;
        loop {
            let heard = events.recv_timeout(TICK);
            self.stop.check()?;
            match heard {
                Ok((seq, event)) => early.insert(seq, event),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => break,
            };
            while let Some(event) = early.remove(&next) {
                next += 1;
                self.event(event)?;
                // The planner may go one further.
                let _ = credits.try_recv();
            }
            if self.checkpoints.as_ref().is_some_and(|checkpoints| checkpoints.are_due()) {
                self.checkpoint(false)?;
            }
        }
        self.stop.check()?;
        if !early.is_empty() {
            return Err(Error::Bug("a stretch of a file got lost".into()));
        }
        self.finish_growing()?;
        self.cut()?;
        if self.checkpoints.as_ref().is_some_and(|checkpoints| checkpoints.are_due_at_the_end()) {
            self.checkpoint(true)?;
        }
        Ok(self.done)
    }

    /// Writes down what is there so far. Shards are cut where they would be without it: what is gathered for the next one is
    /// described once more, in a shard that only the checkpoint refers to.
    fn checkpoint(&mut self, is_end: bool) -> Result<(), Error> {
        let mut shards = self.done.shards.clone();
        let (mut entries, mut all) = (Vec::new(), Vec::new());
        // What was taken over unread is no news.
        for (entry, hashes) in self.entries.iter().zip(&self.hashes) {
            if let (Body::File(_), Hashes::Here(hashes)) = (&entry.body, hashes) {
                entries.push(entry.clone());
                all.extend_from_slice(hashes);
            }
        }
        // So far as it is there, as if it ended there.
        if let Some(Growing { entry, vanished: false, .. }) = &self.growing
            && let Body::File(file) = &entry.body
            && file.size_bytes > 0
            && entries.len() < SHARD_ENTRIES
            && let Content::Shards(_) = &file.content
        {
            entries.push(entry.clone());
        }
        if !entries.is_empty() {
            shards.push(self.writer.entries(&entries, &all)?);
        }
        // What stands in an open pack is in no store.
        self.writer.stream.close()?;
        if let Some(checkpoints) = &mut self.checkpoints {
            checkpoints.put(shards, is_end);
        }
        Ok(())
    }

    fn event(&mut self, event: Event) -> Result<(), Error> {
        match event {
            Event::Entry { entry, old, shape: Shape::Whole } => {
                self.finish_growing()?;
                let hashes = match &old {
                    Some(old) => Hashes::There(old.clone()),
                    None => Hashes::Here(Vec::new()),
                };
                self.gather(entry, old.as_ref(), hashes)
            }
            Event::Entry { entry, old, shape: shape @ (Shape::Pieces(_) | Shape::Stream) } => {
                self.finish_growing()?;
                let (pieces_left, streams) = match shape {
                    Shape::Pieces(pieces) => (pieces, false),
                    Shape::Whole | Shape::Stream => (u64::MAX, true),
                };
                let growing = Growing {
                    entry,
                    old,
                    pieces_left,
                    streams,
                    ended: false,
                    vanished: false,
                    hashes: Vec::new(),
                };
                self.growing = Some(growing);
                Ok(())
            }
            piece => self.piece(piece),
        }
    }

    fn piece(&mut self, event: Event) -> Result<(), Error> {
        let growing =
            self.growing.as_mut().ok_or_else(|| Error::Bug("a stretch without a file".into()))?;
        if let Event::Ended { pieces } = event {
            return growing.end(pieces);
        }
        growing.pieces_left = growing
            .pieces_left
            .checked_sub(1)
            .ok_or_else(|| Error::Bug("a file with too many stretches".into()))?;
        if growing.ended {
            return Ok(());
        }
        let Body::File(file) = &mut growing.entry.body else {
            return Err(Error::Bug("a stretch of what is no file".into()));
        };
        match (event, &mut file.content) {
            (Event::Vanished, _) => {
                growing.ended = true;
                growing.vanished = true;
            }
            (Event::Copied(copied), Content::Inline(extents)) => {
                *extents = copied.extents;
                growing.hashes = copied.hashes;
                file.size_bytes = copied.bytes;
                growing.ended = copied.short;
            }
            (Event::Copied(copied), Content::Shards(shards)) => {
                file.size_bytes += copied.bytes;
                growing.ended = copied.short;
                if copied.bytes > 0 {
                    shards.push(match copied.unchanged {
                        Some(reference) => reference,
                        None => self.writer.extents(&copied.extents, &copied.hashes)?,
                    });
                }
            }
            (Event::Kept { reference, bytes }, Content::Shards(shards)) => {
                file.size_bytes += bytes;
                shards.push(reference);
            }
            (Event::Kept { .. } | Event::Entry { .. } | Event::Ended { .. }, _) => {
                return Err(Error::Bug("a stretch that does not fit its file".into()));
            }
        }
        Ok(())
    }

    fn finish_growing(&mut self) -> Result<(), Error> {
        let Some(growing) = self.growing.take() else { return Ok(()) };
        if growing.streams || growing.pieces_left > 0 {
            return Err(Error::Bug("a file with too few stretches".into()));
        }
        if growing.vanished {
            self.done.vanished += 1;
            return Ok(());
        }
        self.progress.add_files(1);
        self.gather(growing.entry, growing.old.as_ref(), Hashes::Here(growing.hashes))
    }

    fn gather(&mut self, entry: Entry, old: Option<&Old>, hashes: Hashes) -> Result<(), Error> {
        // A 64th of all paths begins a shard; directories do once there is something to cut off.
        let begins = spread(&entry.path, u64::MAX) >> 26 == 0
            || (entry.body == Body::Directory && self.entries.len() >= 32)
            || self.entries.len() >= SHARD_ENTRIES;
        if begins {
            self.cut()?;
        }
        match &entry.body {
            Body::Directory => self.done.counts.directories += 1,
            Body::Symlink { .. } => self.done.counts.symlinks += 1,
            Body::File(file) => {
                self.done.counts.files += 1;
                self.done.counts.bytes += file.size_bytes;
            }
        }
        if self.entries.is_empty() {
            self.candidate = old.cloned();
        }
        self.entries.push(entry);
        self.hashes.push(hashes);
        Ok(())
    }

    /// Ends the shard: refers to the predecessor's when it is the same, and stores it when not.
    fn cut(&mut self) -> Result<(), Error> {
        if self.entries.is_empty() {
            return Ok(());
        }
        let entries = std::mem::take(&mut self.entries);
        let hashes = std::mem::take(&mut self.hashes);
        // Equal places mean equal hashes: a unit keeps its place only when its hash is the same.
        if let Some(old) = self.candidate.take()
            && old.shard.entries == entries
        {
            let first_path = entries.first().map(|entry| entry.path.clone()).unwrap_or_default();
            self.done.shards.push(RootShard { first_path, shard: old.shard.reference.clone() });
            return Ok(());
        }
        let mut all = Vec::new();
        for hashes in hashes {
            match hashes {
                Hashes::Here(hashes) => all.extend_from_slice(&hashes),
                Hashes::There(old) => {
                    all.extend_from_slice(&old.shard.inline_hashes(old.index, self.stop)?);
                }
            }
        }
        let shard = self.writer.entries(&entries, &all)?;
        self.done.shards.push(shard);
        Ok(())
    }
}

/// Packs by their names, for the manifest.
pub(super) fn reached<'a>(references: impl Iterator<Item = &'a ShardRef>) -> HashSet<PackId> {
    references.flat_map(|reference| reference.packs.iter().copied()).collect()
}
