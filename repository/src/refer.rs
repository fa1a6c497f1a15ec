//! Everything that backups refer to, shard by shard: which frames of which packs must be there, and whether the metadata
//! that says so is sound. Reads metadata packs only; what is in the frames of files is not looked at here.

use std::collections::{BTreeMap, HashMap, HashSet};

use crate::entry::{Body, Content, Entry, Extent, FileBody};
use crate::error::Error;
use crate::layout;
use crate::limits::{HASH_BYTES, SHARD_UNITS};
use crate::manifest::RootShard;
use crate::pack::{FrameRef, PackId};
use crate::reader::Backup;
use crate::shard::ShardRef;
use crate::slice::Slice;

/// What backups of one lineage refer to, gathered over any number of them. A shard that several share is read once.
#[derive(Debug)]
pub(crate) struct References {
    frames: HashMap<PackId, Frames>,
    /// The packs whose frames are kept; `None` keeps none, for whoever only wants to know that the metadata is sound.
    keep: Option<Slice>,
    /// Shards that were walked, and the bytes of the files they describe; `None` when they are damaged.
    walked: HashMap<[u8; 16], Option<u64>>,
    damaged: BTreeMap<String, String>,
}

impl References {
    pub(crate) fn keeping(keep: Option<Slice>) -> Self {
        Self { frames: HashMap::new(), keep, walked: HashMap::new(), damaged: BTreeMap::new() }
    }

    /// The frames of a pack that something refers to.
    pub(crate) fn take(&mut self, pack: PackId) -> Frames {
        self.frames.remove(&pack).unwrap_or_default()
    }

    /// The objects that are damaged, and the first thing that was found wrong with each.
    pub(crate) fn take_damaged(&mut self) -> BTreeMap<String, String> {
        std::mem::take(&mut self.damaged)
    }

    /// Walks one backup. Damage is kept and does not end the walk; an error is a store that did not answer.
    pub(crate) async fn add(&mut self, backup: &Backup) -> Result<(), Error> {
        let root = &backup.root;
        let mut bytes = Some(0_u64);
        for (list, counts) in [(&root.shards, true), (&root.late, true), (&root.wal, false)] {
            let mut before: Option<&[u8]> = None;
            for shard in list {
                if before.is_some_and(|before| {
                    crate::entry::path_order(before, &shard.first_path).is_ge()
                }) {
                    self.blame_manifest(backup, "its shards are not in order".to_owned());
                }
                before = Some(&shard.first_path);
                let here = self.root_shard(backup, shard).await?;
                if counts {
                    bytes = bytes.zip(here).map(|(sum, here)| sum.saturating_add(here));
                }
            }
        }
        let counted = root.head.counts.bytes;
        if let Some(bytes) = bytes.filter(|bytes| *bytes != counted) {
            let what = format!("it counts {counted} bytes of files, and its shards hold {bytes}");
            self.blame_manifest(backup, what);
        }
        Ok(())
    }

    async fn root_shard(
        &mut self,
        backup: &Backup,
        root: &RootShard,
    ) -> Result<Option<u64>, Error> {
        let name = name(&root.shard, &root.first_path);
        if let Some(walked) = self.walked.get(&name) {
            return Ok(*walked);
        }
        let bytes = self.walk(backup, root).await?;
        self.walked.insert(name, bytes);
        Ok(bytes)
    }

    async fn walk(&mut self, backup: &Backup, root: &RootShard) -> Result<Option<u64>, Error> {
        let shard = &root.shard;
        let reach = Reach::of(shard);
        self.refer_shard(backup, shard);
        let Some(entries) = self.sound(backup.reader.entries(shard).await)? else {
            return Ok(None);
        };
        let mut whole = true;
        if entries.first().map(|entry| &entry.path) != Some(&root.first_path) {
            self.blame_shard(
                backup,
                shard,
                "a shard begins with another path than its manifest says",
            );
            whole = false;
        }
        let mut bytes = 0_u64;
        for entry in &entries {
            let Body::File(file) = &entry.body else { continue };
            bytes = bytes.saturating_add(file.size_bytes);
            match &file.content {
                Content::Inline(extents) => {
                    whole &= self.refer_extents(backup, shard, &reach, extents);
                }
                Content::Shards(shards) => {
                    whole &= self.file(backup, shard, &reach, file, shards).await?;
                }
            }
        }
        whole &= self.hashes(backup, shard, inline(&entries)).await?;
        Ok(whole.then_some(bytes))
    }

    /// The shards of a large file; `outer` is the shard that names them.
    async fn file(
        &mut self,
        backup: &Backup,
        outer: &ShardRef,
        reach: &Reach,
        file: &FileBody,
        shards: &[ShardRef],
    ) -> Result<bool, Error> {
        let piece = u64::from(SHARD_UNITS) * u64::from(file.unit_bytes);
        let mut left = file.size_bytes;
        let mut whole = true;
        for shard in shards {
            let bytes = left.min(piece);
            left -= bytes;
            if !shard.packs.iter().all(|pack| reach.0.contains(pack)) {
                self.blame_shard(backup, outer, "a shard reaches packs that its reference hides");
                whole = false;
            }
            let name =
                name(shard, &[&file.unit_bytes.to_be_bytes()[..], &bytes.to_be_bytes()].concat());
            if let Some(walked) = self.walked.get(&name) {
                whole &= walked.is_some();
                continue;
            }
            self.refer_shard(backup, shard);
            let read = backup.reader.extents(shard, file.unit_bytes, bytes).await;
            let sound = match self.sound(read)? {
                Some(extents) => {
                    let placed = self.refer_extents(backup, shard, &Reach::of(shard), &extents);
                    placed & self.hashes(backup, shard, extents.iter()).await?
                }
                None => false,
            };
            self.walked.insert(name, sound.then_some(bytes));
            whole &= sound;
        }
        Ok(whole)
    }

    /// Holds the detection hashes of a shard against its extents: one each, zero exactly for units of zeros.
    async fn hashes(
        &mut self,
        backup: &Backup,
        shard: &ShardRef,
        extents: impl Iterator<Item = &Extent>,
    ) -> Result<bool, Error> {
        if shard.twin().is_none() {
            return Ok(true);
        }
        let Some(hashes) = self.sound(backup.reader.hashes(shard).await)? else {
            return Ok(false);
        };
        let fit = do_hashes_fit(extents, &hashes);
        if !fit {
            self.blame_shard(
                backup,
                shard,
                "the detection hashes of a shard are not those of its units",
            );
        }
        Ok(fit)
    }

    fn refer_shard(&mut self, backup: &Backup, shard: &ShardRef) {
        for frame in [Some(shard.frame), shard.twin()].into_iter().flatten() {
            self.refer(frame);
        }
        if !shard.packs.contains(&shard.frame.pack) {
            self.blame_shard(backup, shard, "the reference to a shard hides its own pack");
        }
    }

    fn refer_extents(
        &mut self,
        backup: &Backup,
        shard: &ShardRef,
        reach: &Reach,
        extents: &[Extent],
    ) -> bool {
        let mut whole = true;
        for place in extents.iter().filter_map(|extent| extent.place) {
            let frame = place.frame;
            let record =
                backup.root.packs.get(&frame.pack).filter(|_| reach.0.contains(&frame.pack));
            if record.is_some_and(|record| frame.end() <= record.size_bytes) {
                self.refer(frame);
            } else {
                self.blame_shard(backup, shard, "a shard refers to a place that is in no pack");
                whole = false;
            }
        }
        whole
    }

    fn refer(&mut self, frame: FrameRef) {
        if self.keep.is_some_and(|slice| slice.has(frame.pack)) {
            self.frames.entry(frame.pack).or_default().push(&frame);
        }
    }

    fn sound<T>(&mut self, read: Result<T, Error>) -> Result<Option<T>, Error> {
        let (key, reason) = match read {
            Ok(value) => return Ok(Some(value)),
            Err(Error::Damaged { key, reason }) => (key, reason),
            Err(Error::Missing { key }) => (key, "it is missing".to_owned()),
            Err(error) => return Err(error),
        };
        self.damaged.entry(key).or_insert(reason);
        Ok(None)
    }

    fn blame_shard(&mut self, backup: &Backup, shard: &ShardRef, what: &str) {
        let key = layout::pack(backup.lineage(), shard.frame.pack);
        self.damaged.entry(key).or_insert_with(|| what.to_owned());
    }

    fn blame_manifest(&mut self, backup: &Backup, what: String) {
        let key = layout::of_backup(backup.lineage(), backup.id(), "manifest");
        self.damaged.entry(key).or_insert(what);
    }
}

/// The packs that a reference to a shard admits to.
struct Reach(HashSet<PackId>);

impl Reach {
    fn of(shard: &ShardRef) -> Self {
        Self(shard.packs.iter().copied().collect())
    }
}

fn inline(entries: &[Entry]) -> impl Iterator<Item = &Extent> {
    entries.iter().flat_map(|entry| match &entry.body {
        Body::File(FileBody { content: Content::Inline(extents), .. }) => extents.as_slice(),
        _ => &[],
    })
}

fn do_hashes_fit<'a>(extents: impl Iterator<Item = &'a Extent>, hashes: &[u8]) -> bool {
    let mut hashes = hashes.chunks_exact(HASH_BYTES);
    for extent in extents {
        for _ in 0..extent.units {
            let is_zero = hashes.next().map(|hash| hash.iter().all(|byte| *byte == 0));
            if is_zero != Some(extent.place.is_none()) {
                return false;
            }
        }
    }
    hashes.next().is_none() && hashes.remainder().is_empty()
}

/// A short name of a reference and of how it is used. Two that are equal are read with the same result.
fn name(shard: &ShardRef, used_as: &[u8]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    for frame in [Some(shard.frame), shard.twin()].into_iter().flatten() {
        hasher.update(&frame.pack.0).update(&frame.offset.to_be_bytes());
        for number in row(&frame) {
            hasher.update(&number.to_be_bytes());
        }
    }
    hasher.update(&shard.units.to_be_bytes());
    hasher.update(&(shard.packs.len() as u64).to_be_bytes());
    for pack in shard.packs.iter() {
        hasher.update(&pack.0);
    }
    hasher.update(used_as);
    let mut name = [0; 16];
    name.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    name
}

/// Frames of one pack: 16 bytes each, each once.
#[derive(Debug, Default)]
pub(crate) struct Frames {
    rows: Vec<[u32; 4]>,
    /// So many from the start are in order and differ.
    tidy: usize,
}

/// Rows that may be gathered before they are put in order for the first time.
const UNTIDY_ROWS: usize = 1024;

impl Frames {
    fn push(&mut self, frame: &FrameRef) {
        let row = row(frame);
        // Neighbours usually name the same frame.
        if self.rows.last() == Some(&row) {
            return;
        }
        self.rows.push(row);
        if self.rows.len() >= UNTIDY_ROWS.max(self.tidy * 2) {
            self.rows.sort_unstable();
            self.rows.dedup();
            self.tidy = self.rows.len();
        }
    }

    /// Nothing readable refers to the pack.
    pub(crate) fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Whether all of them stand in the table of their pack.
    pub(crate) fn are_in(&self, table: &[FrameRef]) -> bool {
        self.rows
            .iter()
            .all(|wanted| table.get(wanted[0] as usize).is_some_and(|frame| row(frame) == *wanted))
    }
}

/// Number, offset, stored length, content length with the codec. A pack is smaller than 4 GiB and a frame than 2 GiB; what
/// is larger fits no table.
fn row(frame: &FrameRef) -> [u32; 4] {
    let offset = u32::try_from(frame.offset).unwrap_or(u32::MAX);
    let content = frame.raw_bytes << 1 | u32::from(frame.codec.code());
    [frame.number, offset, frame.stored_bytes, content]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pack::Codec;

    fn frame(number: u32) -> FrameRef {
        FrameRef {
            pack: PackId([1; 16]),
            number,
            offset: 144 + u64::from(number) * 116,
            stored_bytes: 116,
            raw_bytes: 100,
            codec: Codec::Raw,
        }
    }

    #[test]
    fn many_references_to_a_few_frames_take_the_room_of_a_few() {
        let mut frames = Frames::default();
        for n in 0..100_000 {
            frames.push(&frame(n % 50));
        }
        assert!(frames.rows.len() < 2 * UNTIDY_ROWS, "{}", frames.rows.len());
        let table: Vec<FrameRef> = (0..50).map(frame).collect();
        assert!(frames.are_in(&table));
        assert!(!frames.are_in(&table[..49]));
        let moved: Vec<FrameRef> =
            table.iter().map(|frame| FrameRef { offset: frame.offset + 1, ..*frame }).collect();
        assert!(!frames.are_in(&moved));
    }

    #[test]
    fn hashes_fit_their_units_and_no_others() {
        let place = crate::entry::Place { frame: frame(0), offset: 0 };
        let extents = [Extent { units: 1, place: Some(place) }, Extent { units: 2, place: None }];
        let good = [[1; 8], [0; 8], [0; 8]].concat();
        assert!(do_hashes_fit(extents.iter(), &good));
        assert!(!do_hashes_fit(extents.iter(), &good[..16]));
        assert!(!do_hashes_fit(extents.iter(), &[&good[..], &[0; 8]].concat()));
        assert!(!do_hashes_fit(extents.iter(), &[[1; 8], [0; 8], [1; 8]].concat()));
        assert!(!do_hashes_fit(extents.iter(), &[0; 24]));
    }
}
