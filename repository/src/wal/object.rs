//! The bytes of one file of the archive: a container of its own, bound to the place it lies at.

use std::cell::Cell;
use std::io;

use bytes::Bytes;
use proto::LineageId;
use proto::wal::SEGMENT_BYTES_MAX;
use zstd::zstd_safe::{CParameter, Strategy};

use crate::error::Error;
use crate::key::Keys;
use crate::limits::TAG_BYTES;
use crate::pack::{
    self, Codec, Compressor, FrameRef, HEADER_BYTES, ObjectType, PackBuilder, PackId, Whole,
};

/// What [`object_id`] derives with.
const ID_CONTEXT: &str = "pgmuster repository v1: place of an archived WAL file";
/// A writer puts this much content into a frame.
const FRAME_BYTES: usize = 4 << 20;
/// The head: length and digest of the content.
pub(crate) const HEAD_BYTES: usize = 8 + 32;
const NO_HEAD: &str = "it does not begin with a head";
/// zstd's level where [`TUNED`] says nothing else.
const LEVEL: i32 = 3;
/// What zstd does differently with WAL than its level says: on ten kinds of WAL it stores as much, nearly twice as fast (ADR 0036).
const TUNED: [CParameter; 4] = [
    CParameter::Strategy(Strategy::ZSTD_fast),
    CParameter::HashLog(14),
    CParameter::MinMatch(5),
    // The frame is authenticated as a whole, and its length is known.
    CParameter::ChecksumFlag(false),
];
/// The largest content a reader accepts: a segment.
pub(crate) const CONTENT_BYTES_MAX: u64 = SEGMENT_BYTES_MAX as u64;
/// The largest object a reader accepts: such content that does not shrink, and what is around it.
pub(crate) const OBJECT_BYTES_MAX: u64 = CONTENT_BYTES_MAX + (1 << 20);
/// How many bytes of an object tell what its content is.
pub(crate) const HEAD_END: u64 = (HEADER_BYTES + HEAD_BYTES + TAG_BYTES) as u64;

thread_local! {
    /// The compressor of this thread's last segment: a new one is fresh memory, which costs more than its work with a frame.
    static COMPRESSOR: Cell<Option<Compressor>> = const { Cell::new(None) };
}

/// What the head of an object says of its content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Head {
    pub(crate) bytes: u64,
    pub(crate) blake3: [u8; 32],
}

impl Head {
    pub(crate) fn of(content: &[u8]) -> Self {
        Self { bytes: content.len() as u64, blake3: blake3::hash(content).into() }
    }

    pub(crate) fn encode(&self) -> [u8; HEAD_BYTES] {
        let mut bytes = [0; HEAD_BYTES];
        bytes[..8].copy_from_slice(&self.bytes.to_be_bytes());
        bytes[8..].copy_from_slice(&self.blake3);
        bytes
    }

    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let (length, blake3) = bytes.split_first_chunk::<8>()?;
        Some(Self { bytes: u64::from_be_bytes(*length), blake3: blake3.try_into().ok()? })
    }
}

/// What tells one content of a file of the log from another: its length and its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalDigest(pub(super) Head);

impl WalDigest {
    /// Of what a reader gives, to its end.
    pub fn read(content: impl io::Read) -> io::Result<Self> {
        let mut hasher = blake3::Hasher::new();
        hasher.update_reader(content)?;
        Ok(Self(Head { bytes: hasher.count(), blake3: hasher.finalize().into() }))
    }
}

/// The id of the object at `place`, a name below the archive. The same content at another place does not open there.
pub(crate) fn object_id(place: &str) -> [u8; 16] {
    let digest = blake3::derive_key(ID_CONTEXT, place.as_bytes());
    let mut id = [0; 16];
    id.copy_from_slice(&digest[..16]);
    id
}

fn compressor() -> io::Result<Compressor> {
    let mut compressor = Compressor::new(LEVEL)?;
    TUNED.into_iter().try_for_each(|parameter| compressor.set_parameter(parameter))?;
    Ok(compressor)
}

/// Compresses and seals.
pub(crate) fn seal(
    keys: &Keys,
    lineage: LineageId,
    place: &str,
    content: &[u8],
) -> Result<Bytes, Error> {
    let mut kept = COMPRESSOR.take();
    let compressor = match &mut kept {
        Some(compressor) => compressor,
        None => kept.insert(
            compressor().map_err(|error| Error::Bug(format!("zstd cannot be set up: {error}")))?,
        ),
    };
    let mut builder = PackBuilder::new(keys, lineage, ObjectType::Archive, object_id(place))?;
    builder.append(&Head::of(content).encode(), None)?;
    // Content and object together are what this takes: a segment may have a gigabyte.
    let mut sealed = Vec::new();
    for frame in content.chunks(FRAME_BYTES) {
        builder.append(frame, Some(compressor))?;
        if let Some(part) = builder.take_part() {
            sealed.extend_from_slice(&part);
        }
    }
    COMPRESSOR.set(kept);
    let (last, _) = builder.finish()?;
    if sealed.is_empty() {
        return Ok(last);
    }
    sealed.extend_from_slice(&last);
    Ok(sealed.into())
}

/// The content of a whole object. The reason is for people.
pub(crate) fn open(
    keys: &Keys,
    lineage: LineageId,
    place: &str,
    object: Vec<u8>,
) -> Result<Vec<u8>, &'static str> {
    let id = object_id(place);
    let limit = usize::try_from(CONTENT_BYTES_MAX).unwrap_or(usize::MAX) + HEAD_BYTES;
    let mut whole = Whole::check(keys, lineage, ObjectType::Archive, id, object, limit)?;
    let lengths = whole.lengths();
    let mut head = [0; HEAD_BYTES];
    if lengths.first() != Some(&HEAD_BYTES) {
        return Err(NO_HEAD);
    }
    whole.open(0, &mut head)?;
    let head = Head::decode(&head).ok_or(NO_HEAD)?;
    let mut content = vec![0; lengths[1..].iter().sum()];
    let mut room = content.as_mut_slice();
    for (number, length) in lengths.into_iter().enumerate().skip(1) {
        let (frame, rest) = room.split_at_mut(length);
        whole.open(number, frame)?;
        room = rest;
    }
    if Head::of(&content) == head {
        Ok(content)
    } else {
        Err("its content is not the one its head describes")
    }
}

/// The head of an object that begins with `bytes`, [`HEAD_END`] of them or more.
pub(crate) fn head(
    keys: &Keys,
    lineage: LineageId,
    place: &str,
    bytes: &[u8],
) -> Result<Head, &'static str> {
    let id = object_id(place);
    let cipher = pack::cipher_of(keys, lineage, ObjectType::Archive, id, bytes)?;
    let mut stored = bytes
        .get(HEADER_BYTES..HEADER_BYTES + HEAD_BYTES + TAG_BYTES)
        .ok_or("it is too short for a head")?
        .to_vec();
    let frame = FrameRef {
        pack: PackId(id),
        number: 0,
        offset: HEADER_BYTES as u64,
        stored_bytes: u32::try_from(stored.len()).unwrap_or(u32::MAX),
        raw_bytes: u32::try_from(HEAD_BYTES).unwrap_or(u32::MAX),
        codec: Codec::Raw,
    };
    let mut unpacker = zstd::bulk::Decompressor::new().map_err(|_| "zstd cannot be started")?;
    let mut head = Vec::new();
    cipher.open(&frame, &mut stored, &mut unpacker, &mut head)?;
    Head::decode(&head).ok_or(NO_HEAD)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::MasterKey;

    const PLACE: &str = "00000001/000000010000000000000001";

    fn setting() -> (Keys, LineageId) {
        let keys = MasterKey::generate().keys(proto::RepositoryId::mint(1, [1; 10]));
        let lineage = keys.lineage_id(proto::BackupKind::Physical, "c", 1, 0);
        (keys, lineage)
    }

    #[test]
    fn content_of_every_length_comes_back_and_its_head_tells_of_it() {
        let (keys, lineage) = setting();
        for length in [1, 41, FRAME_BYTES, FRAME_BYTES + 1, 5 * FRAME_BYTES] {
            let content: Vec<u8> =
                (0..length).map(|at| ((at * at) >> 7).to_le_bytes()[0]).collect();
            let object = seal(&keys, lineage, PLACE, &content).unwrap();
            let head = head(&keys, lineage, PLACE, &object).unwrap();
            assert_eq!(head, Head::of(&content));
            assert!(open(&keys, lineage, PLACE, object.to_vec()).unwrap() == content);
        }
    }

    #[test]
    fn an_object_opens_nowhere_but_at_its_place() {
        let (keys, lineage) = setting();
        let object = seal(&keys, lineage, PLACE, b"content").unwrap();
        for (keys, lineage, place) in [
            (&keys, lineage, "00000001/000000010000000000000002"),
            (&keys, lineage, "conflicts/000000010000000000000001/1"),
            (&keys, keys.lineage_id(proto::BackupKind::Physical, "c", 1, 1), PLACE),
            (&setting().0, lineage, PLACE),
        ] {
            open(keys, lineage, place, object.to_vec()).unwrap_err();
            head(keys, lineage, place, &object).unwrap_err();
        }
    }
}
