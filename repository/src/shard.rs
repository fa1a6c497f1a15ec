//! Shards: the stretches a manifest is cut into, so that an unchanged stretch is one reference.
//!
//! An *entry shard* holds neighbouring entries; a large file's units are described by *extent shards*. Each stands in a
//! frame of a metadata pack; the frame after it holds its detection hashes. Shards name packs by id, never by a place in
//! a manifest, so that a later manifest can refer to them unchanged.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use crate::entry::{
    Belief, Body, Content, Entry, Extent, FileBody, Place, Stamp, check_path, check_target,
    path_order,
};
use crate::limits::{
    FRAME_BYTES_MAX, HASH_BYTES, HASH_LENGTH, INLINE_UNITS, PACK_BYTES_MAX, PATH_BYTES_MAX,
    SHARD_ENTRIES, SHARD_UNITS, TAG_BYTES, TAG_LENGTH, UNIT_BYTES_MAX, UNIT_BYTES_MIN,
};
use crate::pack::{Codec, FrameRef, PackId};
use crate::wire::{Decoder, Encoder, Malformed};

const ENTRIES: u8 = 1;
const EXTENTS: u8 = 2;
const DIRECTORY: u8 = 0;
const FILE_INLINE: u8 = 1;
const SYMLINK: u8 = 2;
const FILE_SHARDS: u8 = 3;

/// Where a shard is, and everything it reaches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShardRef {
    pub(crate) frame: FrameRef,
    /// Bytes in the pack of the frame after it, which holds its detection hashes; 0 when it has none.
    pub(crate) twin_stored_bytes: u32,
    /// Units it describes.
    pub(crate) units: u32,
    /// Every pack that is needed to read what it describes, its own included.
    pub(crate) packs: Arc<[PackId]>,
}

impl ShardRef {
    /// Whether one of these packs is needed to read what it describes.
    pub(crate) fn reaches(&self, packs: &BTreeSet<PackId>) -> bool {
        !packs.is_empty() && self.packs.iter().any(|pack| packs.contains(pack))
    }

    /// The frame of its detection hashes, if it has any.
    pub(crate) fn twin(&self) -> Option<FrameRef> {
        (self.twin_stored_bytes > 0).then(|| FrameRef {
            pack: self.frame.pack,
            number: self.frame.number.saturating_add(1),
            offset: self.frame.end(),
            stored_bytes: self.twin_stored_bytes,
            raw_bytes: self.units.saturating_mul(HASH_LENGTH),
            codec: Codec::Raw,
        })
    }

    pub(crate) fn encode(&self, packs: &mut PackTable, out: &mut Encoder) {
        encode_frame(&self.frame, packs, out);
        out.number(self.twin_stored_bytes);
        out.number(self.units);
        out.count(self.packs.len());
        for pack in self.packs.iter() {
            out.count(packs.index(*pack));
        }
    }

    pub(crate) fn decode(packs: &[PackId], from: &mut Decoder<'_>) -> Result<Self, Malformed> {
        let frame = decode_frame(packs, from)?;
        let twin_stored_bytes = from.number_u32("twin length")?;
        let units = from.number_u32("shard units")?;
        let twin_bytes = u64::from(units) * HASH_BYTES as u64;
        let fits =
            twin_stored_bytes == 0 || u64::from(twin_stored_bytes) == twin_bytes + TAG_BYTES as u64;
        if twin_bytes > u64::from(FRAME_BYTES_MAX) || !fits {
            return Err(Malformed("twin length"));
        }
        let count = from.count(1, "reached packs")?;
        let mut reached = Vec::with_capacity(count);
        for _ in 0..count {
            reached.push(packs[from.index(packs.len(), "reached pack")?]);
        }
        Ok(Self { frame, twin_stored_bytes, units, packs: reached.into() })
    }
}

/// The packs something names, each once, in the order of first mention.
#[derive(Debug, Default)]
pub(crate) struct PackTable {
    packs: Vec<PackId>,
    places: HashMap<PackId, usize>,
}

impl PackTable {
    pub(crate) fn index(&mut self, pack: PackId) -> usize {
        *self.places.entry(pack).or_insert_with(|| {
            self.packs.push(pack);
            self.packs.len() - 1
        })
    }

    pub(crate) fn packs(&self) -> &[PackId] {
        &self.packs
    }
}

fn encode_frame(frame: &FrameRef, packs: &mut PackTable, out: &mut Encoder) {
    out.count(packs.index(frame.pack));
    out.number(frame.number);
    out.number(frame.offset);
    out.number(frame.stored_bytes);
    out.number(u64::from(frame.raw_bytes) << 1 | u64::from(frame.codec.code()));
}

fn decode_frame(packs: &[PackId], from: &mut Decoder<'_>) -> Result<FrameRef, Malformed> {
    let pack = packs[from.index(packs.len(), "frame's pack")?];
    let number = from.number_u32("frame number")?;
    let offset = from.number("frame offset")?;
    let stored_bytes = from.number_u32("frame length")?;
    let raw = from.number("frame content length")?;
    let raw_bytes = u32::try_from(raw >> 1).map_err(|_| Malformed("frame content length"))?;
    let codec = if raw & 1 == 0 { Codec::Raw } else { Codec::Zstd };
    let tag_bytes = TAG_LENGTH;
    let sound = raw_bytes <= FRAME_BYTES_MAX
        && stored_bytes >= tag_bytes
        && stored_bytes <= FRAME_BYTES_MAX + tag_bytes
        && (codec == Codec::Zstd || stored_bytes == raw_bytes + tag_bytes)
        && offset.checked_add(u64::from(stored_bytes)).is_some_and(|end| end <= PACK_BYTES_MAX);
    if sound {
        Ok(FrameRef { pack, number, offset, stored_bytes, raw_bytes, codec })
    } else {
        Err(Malformed("frame"))
    }
}

/// Collects the tables of a shard while its body is written.
#[derive(Debug, Default)]
struct Tables {
    packs: PackTable,
    frames: Vec<FrameRef>,
    places: HashMap<(PackId, u32), usize>,
}

impl Tables {
    fn frame(&mut self, frame: &FrameRef) -> usize {
        *self.places.entry((frame.pack, frame.number)).or_insert_with(|| {
            self.frames.push(*frame);
            self.frames.len() - 1
        })
    }

    fn extents(&mut self, extents: &[Extent], out: &mut Encoder) {
        out.count(extents.len());
        for extent in extents {
            out.number(extent.units);
            match extent.place {
                None => out.number(0_u8),
                Some(place) => {
                    out.count(self.frame(&place.frame) + 1);
                    out.number(place.offset);
                }
            }
        }
    }

    fn finish(mut self, kind: u8, body: &[u8]) -> (Vec<u8>, Vec<PackId>) {
        let mut frames = Encoder::default();
        frames.count(self.frames.len());
        for frame in &self.frames {
            encode_frame(frame, &mut self.packs, &mut frames);
        }
        let mut out = Encoder::default();
        out.byte(kind);
        out.count(self.packs.packs.len());
        for pack in &self.packs.packs {
            out.raw(&pack.0);
        }
        out.raw(&frames.finish());
        out.raw(body);
        (out.finish(), self.packs.packs)
    }
}

/// Writes an entry shard. Returns its bytes and the packs it reaches.
pub(crate) fn encode_entries(entries: &[Entry]) -> (Vec<u8>, Vec<PackId>) {
    let mut tables = Tables::default();
    let mut out = Encoder::default();
    out.count(entries.len());
    let mut before: &[u8] = &[];
    for entry in entries {
        let shared = entry.path.iter().zip(before).take_while(|(a, b)| a == b).count();
        out.byte(match &entry.body {
            Body::Directory => DIRECTORY,
            Body::Symlink { .. } => SYMLINK,
            Body::File(FileBody { content: Content::Inline(_), .. }) => FILE_INLINE,
            Body::File(FileBody { content: Content::Shards(_), .. }) => FILE_SHARDS,
        });
        out.count(shared);
        out.bytes(&entry.path[shared..]);
        out.number(entry.mode);
        match &entry.body {
            Body::Directory => {}
            Body::Symlink { target } => out.bytes(target),
            Body::File(file) => encode_file(file, &mut tables, &mut out),
        }
        before = &entry.path;
    }
    tables.finish(ENTRIES, &out.finish())
}

fn encode_file(file: &FileBody, tables: &mut Tables, out: &mut Encoder) {
    let Stamp { scanned_bytes, mtime_ns, ctime_ns, inode, device, belief } = file.stamp;
    out.number(file.size_bytes);
    out.number(scanned_bytes);
    out.signed(mtime_ns);
    out.signed(ctime_ns);
    out.number(inode);
    out.number(device);
    out.byte(belief.byte());
    out.number(file.unit_bytes);
    match &file.content {
        Content::Inline(extents) => tables.extents(extents, out),
        Content::Shards(shards) => {
            out.count(shards.len());
            for shard in shards {
                shard.encode(&mut tables.packs, out);
            }
        }
    }
}

/// Writes an extent shard. Returns its bytes and the packs it reaches.
pub(crate) fn encode_extents(extents: &[Extent]) -> (Vec<u8>, Vec<PackId>) {
    let mut tables = Tables::default();
    let mut out = Encoder::default();
    tables.extents(extents, &mut out);
    tables.finish(EXTENTS, &out.finish())
}

struct ReadTables {
    packs: Vec<PackId>,
    frames: Vec<FrameRef>,
}

impl ReadTables {
    fn decode(kind: u8, from: &mut Decoder<'_>) -> Result<Self, Malformed> {
        if from.byte("shard kind")? != kind {
            return Err(Malformed("shard kind"));
        }
        // Each once: what is said twice could be said in two ways.
        let count = from.count(16, "packs")?;
        let (mut packs, mut names) = (Vec::with_capacity(count), HashSet::with_capacity(count));
        for _ in 0..count {
            let pack = PackId(from.array("pack id")?);
            if !names.insert(pack) {
                return Err(Malformed("packs, one of which is named twice,"));
            }
            packs.push(pack);
        }
        let count = from.count(5, "frames")?;
        let (mut frames, mut places) = (Vec::with_capacity(count), HashSet::with_capacity(count));
        for _ in 0..count {
            let frame = decode_frame(&packs, from)?;
            if !places.insert((frame.pack, frame.number)) {
                return Err(Malformed("frames, one of which is named twice,"));
            }
            frames.push(frame);
        }
        Ok(Self { packs, frames })
    }

    fn extents(&self, from: &mut Decoder<'_>) -> Result<Vec<Extent>, Malformed> {
        let count = from.count(2, "extents")?;
        let mut extents = Vec::with_capacity(count.min(SHARD_UNITS as usize));
        if count > SHARD_UNITS as usize {
            return Err(Malformed("extents"));
        }
        for _ in 0..count {
            let units = from.number_u32("extent units")?;
            if units == 0 || units > SHARD_UNITS {
                return Err(Malformed("extent units"));
            }
            let place = match from.index(self.frames.len() + 1, "extent's frame")? {
                0 => None,
                n => Some(Place {
                    frame: self.frames[n - 1],
                    offset: from.number_u32("extent offset")?,
                }),
            };
            extents.push(Extent { units, place });
        }
        Ok(extents)
    }
}

/// Whether extents describe exactly `bytes` bytes in units of `unit_bytes`, inside their frames.
pub(crate) fn check_extents(
    extents: &[Extent],
    unit_bytes: u32,
    bytes: u64,
) -> Result<(), Malformed> {
    let mut left = bytes;
    for extent in extents {
        let whole = u64::from(extent.units) * u64::from(unit_bytes);
        // Only the last unit may be short, and no unit may be empty.
        if left <= whole - u64::from(unit_bytes) {
            return Err(Malformed("extents beyond the file's end"));
        }
        let here = whole.min(left);
        if let Some(place) = extent.place
            && u64::from(place.offset) + here > u64::from(place.frame.raw_bytes)
        {
            return Err(Malformed("extent beyond its frame"));
        }
        left -= here;
    }
    if left == 0 { Ok(()) } else { Err(Malformed("extents short of the file's end")) }
}

/// Reads and checks an entry shard.
pub(crate) fn decode_entries(bytes: &[u8]) -> Result<Vec<Entry>, Malformed> {
    let mut from = Decoder::new(bytes);
    let tables = ReadTables::decode(ENTRIES, &mut from)?;
    let count = from.count(4, "entries")?;
    // Paths share what they begin with: bytes alone do not bound the memory that entries take.
    if count > SHARD_ENTRIES {
        return Err(Malformed("entries"));
    }
    let mut entries: Vec<Entry> = Vec::new();
    for _ in 0..count {
        let kind = from.byte("entry kind")?;
        let before = entries.last().map_or(&[][..], |entry| &entry.path);
        let shared = from.index(before.len() + 1, "path")?;
        let rest = from.bytes(PATH_BYTES_MAX, "path")?;
        let path = [&before[..shared], rest].concat();
        check_path(&path).map_err(|_| Malformed("path"))?;
        if !entries.is_empty() && path_order(before, &path).is_ge() {
            return Err(Malformed("order of paths"));
        }
        let mode = from.number_u32("mode")?;
        let body = match kind {
            DIRECTORY => Body::Directory,
            SYMLINK => {
                let target = from.bytes(PATH_BYTES_MAX, "link target")?;
                check_target(target).map_err(|_| Malformed("link target"))?;
                Body::Symlink { target: target.to_vec() }
            }
            FILE_INLINE | FILE_SHARDS => Body::File(decode_file(kind, &tables, &mut from)?),
            _ => return Err(Malformed("entry kind")),
        };
        entries.push(Entry { path, mode, body });
    }
    from.end()?;
    Ok(entries)
}

fn decode_file(
    kind: u8,
    tables: &ReadTables,
    from: &mut Decoder<'_>,
) -> Result<FileBody, Malformed> {
    let size_bytes = from.number("file size")?;
    let stamp = Stamp {
        scanned_bytes: from.number("scanned size")?,
        mtime_ns: from.signed("mtime")?,
        ctime_ns: from.signed("ctime")?,
        inode: from.number("inode")?,
        device: from.number("device")?,
        belief: Belief::of_byte(from.byte("racy")?),
    };
    let unit_bytes = from.number_u32("unit size")?;
    if !unit_bytes.is_power_of_two() || !(UNIT_BYTES_MIN..=UNIT_BYTES_MAX).contains(&unit_bytes) {
        return Err(Malformed("unit size"));
    }
    if size_bytes > i64::MAX.cast_unsigned() {
        return Err(Malformed("file size"));
    }
    let units = size_bytes.div_ceil(u64::from(unit_bytes));
    let content = if kind == FILE_INLINE {
        let extents = tables.extents(from)?;
        if units > u64::from(INLINE_UNITS) {
            return Err(Malformed("inline units"));
        }
        check_extents(&extents, unit_bytes, size_bytes)?;
        Content::Inline(extents)
    } else {
        let count = from.count(8, "shards")?;
        if count as u64 != units.div_ceil(u64::from(SHARD_UNITS)) {
            return Err(Malformed("shards"));
        }
        let mut shards = Vec::with_capacity(count);
        let mut left = units;
        for _ in 0..count {
            let shard = ShardRef::decode(&tables.packs, from)?;
            if u64::from(shard.units) != left.min(u64::from(SHARD_UNITS)) {
                return Err(Malformed("shard units"));
            }
            left -= u64::from(shard.units);
            shards.push(shard);
        }
        Content::Shards(shards)
    };
    Ok(FileBody { size_bytes, stamp, unit_bytes, content })
}

/// Reads an extent shard that describes `bytes` bytes of a file.
pub(crate) fn decode_extents(
    shard: &[u8],
    unit_bytes: u32,
    bytes: u64,
) -> Result<Vec<Extent>, Malformed> {
    let mut from = Decoder::new(shard);
    let tables = ReadTables::decode(EXTENTS, &mut from)?;
    let extents = tables.extents(&mut from)?;
    from.end()?;
    check_extents(&extents, unit_bytes, bytes)?;
    Ok(extents)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(pack: u8, number: u32) -> FrameRef {
        FrameRef {
            pack: PackId([pack; 16]),
            number,
            offset: 144 + u64::from(number),
            stored_bytes: 5000,
            raw_bytes: 1 << 20,
            codec: Codec::Zstd,
        }
    }

    fn file(path: &str, size_bytes: u64, content: Content) -> Entry {
        let stamp = Stamp {
            scanned_bytes: size_bytes,
            mtime_ns: -5,
            ctime_ns: 7,
            inode: 9,
            device: 1,
            belief: Belief::Told,
        };
        let body = FileBody { size_bytes, stamp, unit_bytes: 8192, content };
        Entry { path: path.into(), mode: 0o600, body: Body::File(body) }
    }

    fn entries() -> Vec<Entry> {
        let inline = Content::Inline(vec![
            Extent { units: 2, place: Some(Place { frame: frame(1, 0), offset: 77 }) },
            Extent { units: 1, place: None },
            Extent { units: 1, place: Some(Place { frame: frame(2, 3), offset: 0 }) },
        ]);
        let shard = |units| ShardRef {
            frame: frame(3, units),
            twin_stored_bytes: units * 8 + 16,
            units,
            packs: [PackId([3; 16]), PackId([1; 16])].into(),
        };
        vec![
            Entry { path: b"base".into(), mode: 0o700, body: Body::Directory },
            file("base/1", 3 * 8192 + 1, inline),
            file("base/2", 300 * 8192 - 1, Content::Shards(vec![shard(256), shard(44)])),
            Entry {
                path: b"link".into(),
                mode: 0o777,
                body: Body::Symlink { target: b"/x".into() },
            },
        ]
    }

    #[test]
    fn shards_round_trip() {
        let (bytes, packs) = encode_entries(&entries());
        assert_eq!(decode_entries(&bytes), Ok(entries()));
        let mut packs = packs;
        packs.sort();
        assert_eq!(packs, [PackId([1; 16]), PackId([2; 16]), PackId([3; 16])]);
    }

    #[test]
    fn forged_shards_are_refused() {
        let refuse = |change: &dyn Fn(&mut Vec<Entry>), what| {
            let mut forged = entries();
            change(&mut forged);
            assert_eq!(decode_entries(&encode_entries(&forged).0), Err(Malformed(what)));
        };
        refuse(&|all| all[1].path = b"../etc/passwd".into(), "path");
        refuse(&|all| all[1].path = b"/etc/passwd".into(), "path");
        refuse(&|all| all.swap(1, 2), "order of paths");
        refuse(&|all| all[1].path = b"base".into(), "order of paths");
        refuse(&|all| all[3].body = Body::Symlink { target: vec![] }, "link target");
        let body = |all: &mut Vec<Entry>, change: &dyn Fn(&mut FileBody)| {
            if let Body::File(file) = &mut all[1].body {
                change(file);
            }
        };
        refuse(
            &|all| body(all, &|file| file.size_bytes += 8192),
            "extents short of the file's end",
        );
        refuse(&|all| body(all, &|file| file.size_bytes -= 8192), "extents beyond the file's end");
        refuse(&|all| body(all, &|file| file.unit_bytes = 4096), "unit size");
        refuse(&|all| body(all, &|file| file.unit_bytes = 3 << 13), "unit size");
        refuse(
            &|all| {
                body(all, &|file| {
                    let place = Some(Place { frame: frame(1, 0), offset: (1 << 20) - 1 });
                    file.content = Content::Inline(vec![Extent { units: 4, place }]);
                });
            },
            "extent beyond its frame",
        );
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let _ = decode_entries(&bytes);
            let _ = decode_extents(&bytes, 8192, 100);
        }

        #[test]
        fn damaged_shards_never_panic(at in 0_usize..400, value: u8) {
            let (mut bytes, _) = encode_entries(&entries());
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = decode_entries(&bytes);
        }
    }
}
