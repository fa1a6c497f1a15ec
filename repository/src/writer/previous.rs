//! The predecessor, walked beside the new entries: what it knew about each path and each unit. So is what a backup that was
//! interrupted had stored.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use crate::checkpoint::Interrupted;
use crate::detect::Hash;
use crate::entry::{Body, Content, Entry, Extent, FileBody, Place, path_order};
use crate::error::Error;
use crate::limits::{HASH_BYTES, SHARD_UNITS};
use crate::manifest::RootShard;
use crate::pack::PackId;
use crate::reader::{Backup, MetadataReader};
use crate::shard::ShardRef;
use crate::stop::Stop;

/// One entry shard of the predecessor, with its hashes once somebody needs them.
#[derive(Debug)]
pub(super) struct OldShard {
    pub(super) reference: ShardRef,
    pub(super) entries: Vec<Entry>,
    /// For each entry, the place of its first hash.
    first_hashes: Vec<usize>,
    reader: Arc<MetadataReader>,
    hashes: Mutex<Option<Arc<Vec<u8>>>>,
}

impl OldShard {
    fn load(
        reference: &ShardRef,
        reader: &Arc<MetadataReader>,
        stop: &Stop,
    ) -> Result<Self, Error> {
        let entries = stop.wait(reader.entries(reference))?;
        let mut next = 0;
        let mut first_hashes = Vec::with_capacity(entries.len());
        for entry in &entries {
            first_hashes.push(next);
            next += inline_units(entry) * HASH_BYTES;
        }
        Ok(Self {
            reference: reference.clone(),
            entries,
            first_hashes,
            reader: Arc::clone(reader),
            hashes: Mutex::default(),
        })
    }

    /// The hashes of the units of an entry that are described inline; empty when there are none.
    pub(super) fn inline_hashes(&self, entry: usize, stop: &Stop) -> Result<Vec<u8>, Error> {
        let length = inline_units(&self.entries[entry]) * HASH_BYTES;
        if length == 0 {
            return Ok(Vec::new());
        }
        let mut kept = self.hashes.lock().unwrap_or_else(PoisonError::into_inner);
        let all = match &*kept {
            Some(all) => Arc::clone(all),
            None => {
                Arc::clone(kept.insert(Arc::new(stop.wait(self.reader.hashes(&self.reference))?)))
            }
        };
        drop(kept);
        let first = self.first_hashes[entry];
        Ok(all.get(first..first + length).unwrap_or_default().to_vec())
    }
}

fn inline_units(entry: &Entry) -> usize {
    match &entry.body {
        Body::File(FileBody { content: Content::Inline(extents), .. }) => {
            extents.iter().map(|extent| extent.units as usize).sum()
        }
        _ => 0,
    }
}

/// One path of the predecessor.
#[derive(Debug, Clone)]
pub(super) struct Old {
    pub(super) shard: Arc<OldShard>,
    pub(super) index: usize,
}

impl Old {
    pub(super) fn entry(&self) -> &Entry {
        &self.shard.entries[self.index]
    }

    pub(super) fn file(&self) -> Option<&FileBody> {
        match &self.entry().body {
            Body::File(file) => Some(file),
            _ => None,
        }
    }

    /// Whether the shard that tells of the `piece`-th stretch is one of those that can be read: an interrupted copy refers to
    /// such of its predecessor, too.
    pub(super) fn tells_of(&self, piece: u64) -> bool {
        match self.file().map(|file| &file.content) {
            Some(Content::Inline(_)) => true,
            Some(Content::Shards(shards)) => usize::try_from(piece)
                .ok()
                .and_then(|piece| shards.get(piece))
                .is_some_and(|shard| self.shard.reader.knows(shard.frame.pack)),
            None => false,
        }
    }

    /// What was known about the `piece`-th stretch of the file, if anything.
    pub(super) fn units(&self, piece: u64, stop: &Stop) -> Result<Option<OldUnits>, Error> {
        let Some(file) = self.file() else { return Ok(None) };
        let piece_bytes = u64::from(file.unit_bytes) * u64::from(SHARD_UNITS);
        let start = piece.saturating_mul(piece_bytes);
        if start >= file.size_bytes {
            return Ok(None);
        }
        let bytes = (file.size_bytes - start).min(piece_bytes);
        let units = match &file.content {
            Content::Inline(extents) => OldUnits {
                extents: extents.clone(),
                hashes: self.shard.inline_hashes(self.index, stop)?,
                bytes,
                unit_bytes: file.unit_bytes,
                reference: None,
            },
            Content::Shards(shards) => {
                let Some(reference) =
                    usize::try_from(piece).ok().and_then(|piece| shards.get(piece))
                else {
                    return Ok(None);
                };
                let reader = &self.shard.reader;
                OldUnits {
                    extents: stop.wait(reader.extents(reference, file.unit_bytes, bytes))?,
                    hashes: stop.wait(reader.hashes(reference))?,
                    bytes,
                    unit_bytes: file.unit_bytes,
                    reference: Some(reference.clone()),
                }
            }
        };
        Ok(Some(units))
    }
}

/// A file that an interrupted backup had stored, as far as it had got.
#[derive(Debug, Clone)]
pub(super) struct Begun {
    pub(super) old: Old,
    pub(super) by: Arc<Interrupted>,
}

impl Begun {
    /// What was stored of the `piece`-th stretch, as far as that is to be had.
    pub(super) fn units(&self, piece: u64, stop: &Stop) -> Result<Vec<OldUnit>, Error> {
        if self.by.is_lost() || !self.old.tells_of(piece) {
            return Ok(Vec::new());
        }
        let units = self.by.told(self.old.units(piece, stop))?;
        Ok(units.iter().flat_map(OldUnits::units).collect())
    }

    /// Whether a place of it may be referred to.
    pub(super) fn has(&self, place: Place) -> bool {
        self.by.packs.contains_key(&place.frame.pack)
    }
}

/// What was known about a stretch of a file.
#[derive(Debug)]
pub(super) struct OldUnits {
    extents: Vec<Extent>,
    hashes: Vec<u8>,
    pub(super) bytes: u64,
    unit_bytes: u32,
    pub(super) reference: Option<ShardRef>,
}

/// One unit that was known.
#[derive(Debug, Clone, Copy)]
pub(super) struct OldUnit {
    pub(super) bytes: usize,
    pub(super) hash: Hash,
    /// `None`: it is zero.
    pub(super) place: Option<Place>,
}

impl OldUnit {
    /// Whether it lies in one of these packs.
    pub(super) fn is_in(&self, packs: &BTreeSet<PackId>) -> bool {
        self.place.is_some_and(|place| packs.contains(&place.frame.pack))
    }
}

impl OldUnits {
    /// Units in order, from the first.
    pub(super) fn units(&self) -> impl Iterator<Item = OldUnit> {
        let places = self.extents.iter().flat_map(|extent| {
            (0..extent.units).map(|number| {
                let place = extent.place?;
                Some(Place { offset: place.offset + number * self.unit_bytes, ..place })
            })
        });
        let hashes = self.hashes.chunks_exact(HASH_BYTES);
        let mut left = self.bytes;
        places.zip(hashes).map_while(move |(place, hash)| {
            let bytes = left.min(u64::from(self.unit_bytes));
            left -= bytes;
            let bytes = usize::try_from(bytes).ok().filter(|bytes| *bytes > 0)?;
            Some(OldUnit { bytes, hash: hash.try_into().ok()?, place })
        })
    }
}

/// What new entries are held against.
pub(super) enum Known {
    /// The predecessor.
    Backup(Backup),
    /// What was stored of a backup that was interrupted.
    Interrupted(Arc<Interrupted>),
}

impl Known {
    fn shards(&self) -> &[RootShard] {
        match self {
            Self::Backup(backup) => &backup.root.shards,
            Self::Interrupted(interrupted) => &interrupted.checkpoint.shards,
        }
    }

    fn reader(&self) -> &Arc<MetadataReader> {
        match self {
            Self::Backup(backup) => &backup.reader,
            Self::Interrupted(interrupted) => &interrupted.reader,
        }
    }
}

/// Walks what is known in order, a shard at a time.
pub(super) struct Walk {
    known: Known,
    next_shard: usize,
    current: Option<Old>,
}

impl Walk {
    pub(super) fn new(known: Known) -> Self {
        Self { known, next_shard: 0, current: None }
    }

    /// What is known of `path`. Paths are asked for in ascending order.
    pub(super) fn find(&mut self, path: &[u8], stop: &Stop) -> Result<Option<Old>, Error> {
        loop {
            if self.current.is_none() && !self.load(path, stop)? {
                return Ok(None);
            }
            let Some(old) = &mut self.current else { return Ok(None) };
            while old.index < old.shard.entries.len() {
                match path_order(&old.entry().path, path) {
                    std::cmp::Ordering::Less => old.index += 1,
                    std::cmp::Ordering::Equal => return Ok(Some(old.clone())),
                    std::cmp::Ordering::Greater => return Ok(None),
                }
            }
            self.current = None;
        }
    }

    /// Loads the next shard that may hold `path`.
    fn load(&mut self, path: &[u8], stop: &Stop) -> Result<bool, Error> {
        let shards = self.known.shards();
        while shards
            .get(self.next_shard + 1)
            .is_some_and(|after| path_order(&after.first_path, path).is_le())
        {
            self.next_shard += 1;
        }
        let Some(root) = shards.get(self.next_shard) else { return Ok(false) };
        self.next_shard += 1;
        let shard = Arc::new(OldShard::load(&root.shard, self.known.reader(), stop)?);
        self.current = Some(Old { shard, index: 0 });
        Ok(true)
    }
}
