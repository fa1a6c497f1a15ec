//! The container of everything sealed: a header, frames, a trailer. Packs and manifests are written in it.
//!
//! Bytes only: a frame's content has no meaning here, and where the bytes go is the caller's affair.

use std::fmt;

use aws_lc_rs::aead::LessSafeKey;
use bytes::Bytes;
use proto::LineageId;
use zeroize::Zeroizing;

use crate::error::Error;
use crate::key::{Class, Keys};
use crate::limits::{FRAME_BYTES_MAX, PACK_FRAMES_MAX, PART_BYTES, TAG_BYTES, TAG_LENGTH};
use crate::wire::{Decoder, Encoder, Malformed};
use crate::{chance, crypto, hex};

const MAGIC: &[u8; 8] = b"pgmuster";
const END_MAGIC: &[u8; 8] = b"retsumgp";
const VERSION: u8 = 1;
const WRAP_CLASS_KEY: u8 = 1;
const CIPHER_AES_256_GCM: u8 = 1;
/// The part of the header that everything is bound to.
pub(crate) const BOUND_BYTES: usize = 96;
/// The bound part and the wrapped key.
pub(crate) const HEADER_BYTES: usize = BOUND_BYTES + WRAPPED_BYTES;
pub(crate) const WRAPPED_BYTES: usize = 32 + TAG_BYTES;
/// After the sealed table: its length, the number of frames, the digest, the closing magic.
pub(crate) const TAIL_BYTES: usize = 4 + 4 + 32 + 8;
/// What the digest does not cover: itself and the closing magic.
const UNDIGESTED_BYTES: usize = 32 + 8;
/// The number of the table, which is no frame.
pub(crate) const TABLE_NUMBER: u32 = u32::MAX;
const TABLE_ROW_BYTES: usize = 9;
const TOO_LARGE: &str = "a frame is larger than the format allows";

/// What a container holds, and so which class of key opens it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum ObjectType {
    /// Content of files.
    Data = 1,
    /// Shards and detection hashes.
    Metadata = 2,
    /// WAL that a backup brought along.
    Wal = 3,
    /// The manifest of an attempt.
    Manifest = 4,
    /// A file of the WAL archive.
    Archive = 5,
    /// What an attempt has stored so far.
    Checkpoint = 6,
}

impl ObjectType {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Data => 1,
            Self::Metadata => 2,
            Self::Wal => 3,
            Self::Manifest => 4,
            Self::Archive => 5,
            Self::Checkpoint => 6,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        let all = [
            Self::Data,
            Self::Metadata,
            Self::Wal,
            Self::Manifest,
            Self::Archive,
            Self::Checkpoint,
        ];
        all.into_iter().find(|kind| kind.code() == code)
    }

    fn class(self) -> Class {
        match self {
            Self::Data | Self::Wal | Self::Archive => Class::Data,
            Self::Metadata | Self::Manifest | Self::Checkpoint => Class::Index,
        }
    }
}

/// The random name of a pack.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackId(pub(crate) [u8; 16]);

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(&self.0))
    }
}

impl fmt::Debug for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackId({self})")
    }
}

/// How a frame's content was made smaller before it was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Codec {
    /// It did not shrink.
    Raw,
    /// One zstd frame.
    Zstd,
}

impl Codec {
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Zstd => 1,
        }
    }

    pub(crate) fn from_code(code: u8) -> Option<Self> {
        [Self::Raw, Self::Zstd].into_iter().find(|codec| codec.code() == code)
    }
}

/// Everything needed to fetch and open one frame, its pack's key excepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct FrameRef {
    pub(crate) pack: PackId,
    pub(crate) number: u32,
    /// Where it begins in the pack.
    pub(crate) offset: u64,
    /// Bytes in the pack, the tag included.
    pub(crate) stored_bytes: u32,
    /// Bytes of its content.
    pub(crate) raw_bytes: u32,
    pub(crate) codec: Codec,
}

impl FrameRef {
    pub(crate) fn end(&self) -> u64 {
        self.offset.saturating_add(u64::from(self.stored_bytes))
    }
}

/// What a manifest remembers of a pack: enough to find, check and open it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct PackRecord {
    pub(crate) id: PackId,
    pub(crate) kind: ObjectType,
    pub(crate) size_bytes: u64,
    pub(crate) digest: [u8; 32],
    pub(crate) salt: [u8; 32],
    pub(crate) wrapped: [u8; WRAPPED_BYTES],
}

impl PackRecord {
    pub(crate) const BYTES_MIN: usize = 16 + 1 + 1 + 32 + 32 + WRAPPED_BYTES;

    pub(crate) fn encode(&self, out: &mut Encoder) {
        out.raw(&self.id.0);
        out.byte(self.kind.code());
        out.number(self.size_bytes);
        out.raw(&self.digest);
        out.raw(&self.salt);
        out.raw(&self.wrapped);
    }

    pub(crate) fn decode(from: &mut Decoder<'_>) -> Result<Self, Malformed> {
        Ok(Self {
            id: PackId(from.array("pack id")?),
            kind: ObjectType::from_code(from.byte("pack type")?).ok_or(Malformed("pack type"))?,
            size_bytes: from.number("pack size")?,
            digest: from.array("pack digest")?,
            salt: from.array("pack salt")?,
            wrapped: from.array("pack key")?,
        })
    }

    pub(crate) fn cipher(
        &self,
        keys: &Keys,
        lineage: LineageId,
    ) -> Result<Option<PackCipher>, Error> {
        let bound = bound_header(keys, lineage, self.kind, self.id.0, self.salt);
        PackCipher::unwrap(keys, self.kind, bound, self.wrapped)
    }
}

pub(crate) fn bound_header(
    keys: &Keys,
    lineage: LineageId,
    kind: ObjectType,
    id: [u8; 16],
    salt: [u8; 32],
) -> [u8; BOUND_BYTES] {
    let mut bytes = [0; BOUND_BYTES];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8] = VERSION;
    bytes[9] = kind.code();
    bytes[10] = WRAP_CLASS_KEY;
    bytes[11] = CIPHER_AES_256_GCM;
    bytes[16..32].copy_from_slice(keys.repository.as_bytes());
    bytes[32..48].copy_from_slice(lineage.as_bytes());
    bytes[48..64].copy_from_slice(&id);
    bytes[64..96].copy_from_slice(&salt);
    bytes
}

/// Seals and opens the frames of one pack.
pub(crate) struct PackCipher {
    key: LessSafeKey,
    bound: [u8; BOUND_BYTES],
}

impl fmt::Debug for PackCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PackCipher")
    }
}

impl PackCipher {
    pub(crate) fn create(
        keys: &Keys,
        kind: ObjectType,
        bound: [u8; BOUND_BYTES],
    ) -> Result<(Self, [u8; WRAPPED_BYTES]), Error> {
        let key: Zeroizing<[u8; 32]> = Zeroizing::new(chance::random());
        let mut wrapped = [0; WRAPPED_BYTES];
        wrapped[..32].copy_from_slice(&*key);
        // The wrapping key belongs to this pack's salt alone, so its one nonce may be zero.
        let wrap = keys.pack_wrap(kind.class(), &bound);
        let tag = crypto::seal(&wrap, [0; 12], &bound, &mut wrapped[..32])?;
        wrapped[32..].copy_from_slice(&tag);
        Ok((Self { key: crypto::key(&key)?, bound }, wrapped))
    }

    /// `None` when the key does not belong to this header.
    fn unwrap(
        keys: &Keys,
        kind: ObjectType,
        bound: [u8; BOUND_BYTES],
        wrapped: [u8; WRAPPED_BYTES],
    ) -> Result<Option<Self>, Error> {
        let mut wrapped = Zeroizing::new(wrapped);
        let wrap = keys.pack_wrap(kind.class(), &bound);
        let Some(key) = crypto::open(&wrap, [0; 12], &bound, &mut *wrapped) else {
            return Ok(None);
        };
        let key: &[u8; 32] =
            key.try_into().map_err(|_| Error::Bug("a pack key of 32 bytes".into()))?;
        Ok(Some(Self { key: crypto::key(key)?, bound }))
    }

    fn nonce(number: u32) -> [u8; 12] {
        let mut nonce = [0; 12];
        nonce[8..].copy_from_slice(&number.to_be_bytes());
        nonce
    }

    /// What a frame is bound to: repository, lineage, type, pack, salt, its number, and how to unpack it.
    fn bound_to(&self, number: u32, codec: Codec, raw_bytes: u32) -> [u8; BOUND_BYTES + 9] {
        let mut bound = [0; BOUND_BYTES + 9];
        bound[..BOUND_BYTES].copy_from_slice(&self.bound);
        bound[BOUND_BYTES..BOUND_BYTES + 4].copy_from_slice(&number.to_be_bytes());
        bound[BOUND_BYTES + 4] = codec.code();
        bound[BOUND_BYTES + 5..].copy_from_slice(&raw_bytes.to_be_bytes());
        bound
    }

    pub(crate) fn seal(
        &self,
        number: u32,
        codec: Codec,
        raw_bytes: u32,
        buffer: &mut [u8],
    ) -> Result<[u8; TAG_BYTES], Error> {
        crypto::seal_with(
            &self.key,
            Self::nonce(number),
            &self.bound_to(number, codec, raw_bytes),
            buffer,
        )
    }

    /// Opens a frame's stored bytes in place and unpacks them into `out`, which is resized to its content. The reason
    /// is for people.
    pub(crate) fn open(
        &self,
        frame: &FrameRef,
        stored: &mut [u8],
        unpacker: &mut zstd::bulk::Decompressor<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), &'static str> {
        if frame.raw_bytes > FRAME_BYTES_MAX {
            return Err(TOO_LARGE);
        }
        // Reused buffers are large enough already; only a larger frame is cleared first.
        out.resize(frame.raw_bytes as usize, 0);
        self.open_to(frame, stored, unpacker, out)
    }

    /// As [`PackCipher::open`], into room that is as long as the frame's content.
    fn open_to(
        &self,
        frame: &FrameRef,
        stored: &mut [u8],
        unpacker: &mut zstd::bulk::Decompressor<'_>,
        out: &mut [u8],
    ) -> Result<(), &'static str> {
        if frame.raw_bytes > FRAME_BYTES_MAX {
            return Err(TOO_LARGE);
        }
        let bound_to = self.bound_to(frame.number, frame.codec, frame.raw_bytes);
        let opened = crypto::open_with(&self.key, Self::nonce(frame.number), &bound_to, stored)
            .ok_or("a frame was changed, or is not the one the manifest means")?;
        let length = match frame.codec {
            Codec::Raw => {
                if let Some(room) = out.get_mut(..opened.len()) {
                    room.copy_from_slice(opened);
                }
                opened.len()
            }
            Codec::Zstd => unpacker
                .decompress_to_buffer(opened, out)
                .map_err(|_| "a frame cannot be decompressed")?,
        };
        if length == out.len() && length == frame.raw_bytes as usize {
            Ok(())
        } else {
            Err("a frame has another length than the manifest says")
        }
    }
}

/// A frame's compressor. One a thread: it keeps its tables.
pub(crate) type Compressor = zstd::bulk::Compressor<'static>;

/// Room behind a part for the frame that completes it.
const PART_ROOM_BYTES: usize = 1 << 20;

/// Writes one container, a part at a time.
pub(crate) struct PackBuilder {
    id: PackId,
    kind: ObjectType,
    cipher: PackCipher,
    salt: [u8; 32],
    wrapped: [u8; WRAPPED_BYTES],
    hasher: blake3::Hasher,
    rows: Vec<(u32, u32, Codec)>,
    /// Bytes of the parts taken so far.
    taken_bytes: u64,
    /// Room that was cleared once; `filled` bytes of it are the next part.
    buffer: Vec<u8>,
    filled: usize,
}

impl fmt::Debug for PackBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PackBuilder({}, {} frames)", self.id, self.rows.len())
    }
}

impl PackBuilder {
    pub(crate) fn new(
        keys: &Keys,
        lineage: LineageId,
        kind: ObjectType,
        id: [u8; 16],
    ) -> Result<Self, Error> {
        let salt = chance::random();
        let bound = bound_header(keys, lineage, kind, id, salt);
        let (cipher, wrapped) = PackCipher::create(keys, kind, bound)?;
        let mut builder = Self {
            id: PackId(id),
            kind,
            cipher,
            salt,
            wrapped,
            hasher: blake3::Hasher::new(),
            rows: Vec::new(),
            taken_bytes: 0,
            buffer: Vec::new(),
            filled: 0,
        };
        builder.append_clear(&bound);
        builder.append_clear(&wrapped);
        Ok(builder)
    }

    pub(crate) fn id(&self) -> PackId {
        self.id
    }

    /// Bytes so far, the trailer not counted.
    pub(crate) fn size_bytes(&self) -> u64 {
        self.taken_bytes + self.filled as u64
    }

    pub(crate) fn is_full(&self, target_bytes: u64) -> bool {
        self.size_bytes() >= target_bytes || self.rows.len() >= PACK_FRAMES_MAX as usize
    }

    /// Room for `more` bytes after the filled ones.
    fn room(&mut self, more: usize) -> &mut [u8] {
        let end = self.filled + more;
        if self.buffer.len() < end {
            // Grows to a whole part at once when the pack is more than small.
            let length =
                if end > PART_BYTES / 8 { end.max(PART_BYTES + PART_ROOM_BYTES) } else { end * 2 };
            if self.buffer.is_empty() {
                // Fresh pages are zero already; resizing would clear them a second time.
                self.buffer = vec![0; length];
            } else {
                self.buffer.resize(length, 0);
            }
        }
        &mut self.buffer[self.filled..end]
    }

    fn append_clear(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
        self.hasher.update(bytes);
        self.filled += bytes.len();
    }

    /// Compresses, seals and appends one frame. With no compressor, or when it does not help, the content is stored
    /// as it is.
    pub(crate) fn append(
        &mut self,
        content: &[u8],
        compressor: Option<&mut Compressor>,
    ) -> Result<FrameRef, Error> {
        let number = u32::try_from(self.rows.len()).unwrap_or(TABLE_NUMBER);
        let raw_bytes = u32::try_from(content.len()).unwrap_or(u32::MAX);
        if number >= PACK_FRAMES_MAX || raw_bytes > FRAME_BYTES_MAX {
            return Err(Error::Bug(format!(
                "frame {number} of {raw_bytes} bytes does not fit a pack"
            )));
        }
        let offset = self.size_bytes();
        let room = self.room(content.len() + TAG_BYTES);
        // One byte less than the content: a frame that does not shrink is an error here, and is stored raw.
        let packed = compressor.and_then(|compressor| {
            let limit = content.len().saturating_sub(1);
            compressor.compress_to_buffer(content, &mut room[..limit]).ok()
        });
        let (length, codec) = if let Some(length) = packed {
            (length, Codec::Zstd)
        } else {
            room[..content.len()].copy_from_slice(content);
            (content.len(), Codec::Raw)
        };
        let tag = self.cipher.seal(
            number,
            codec,
            raw_bytes,
            &mut self.buffer[self.filled..self.filled + length],
        )?;
        let end = self.filled + length;
        self.buffer[end..end + TAG_BYTES].copy_from_slice(&tag);
        self.hasher.update(&self.buffer[self.filled..end + TAG_BYTES]);
        self.filled = end + TAG_BYTES;
        let stored_bytes = u32::try_from(length + TAG_BYTES).unwrap_or(u32::MAX);
        self.rows.push((stored_bytes, raw_bytes, codec));
        Ok(FrameRef { pack: self.id, number, offset, stored_bytes, raw_bytes, codec })
    }

    /// The next part, once there is a whole one: exactly [`PART_BYTES`], since some stores insist that all parts but
    /// the last have one size.
    pub(crate) fn take_part(&mut self) -> Option<Bytes> {
        let rest = self.filled.checked_sub(PART_BYTES)?;
        let mut part =
            std::mem::replace(&mut self.buffer, vec![0; rest.max(PART_BYTES) + PART_ROOM_BYTES]);
        self.buffer[..rest].copy_from_slice(&part[PART_BYTES..self.filled]);
        part.truncate(PART_BYTES);
        self.taken_bytes += PART_BYTES as u64;
        self.filled = rest;
        Some(part.into())
    }

    fn take(&mut self) -> Bytes {
        let mut part = std::mem::take(&mut self.buffer);
        part.truncate(self.filled);
        self.taken_bytes += self.filled as u64;
        self.filled = 0;
        part.into()
    }

    /// Writes the trailer. Returns the last part and what a manifest must remember.
    pub(crate) fn finish(mut self) -> Result<(Bytes, PackRecord), Error> {
        let mut table = Vec::with_capacity(self.rows.len() * TABLE_ROW_BYTES);
        for (stored_bytes, raw_bytes, codec) in &self.rows {
            table.extend_from_slice(&stored_bytes.to_be_bytes());
            table.extend_from_slice(&raw_bytes.to_be_bytes());
            table.push(codec.code());
        }
        let raw_bytes = u32::try_from(table.len()).unwrap_or(u32::MAX);
        let tag = self.cipher.seal(TABLE_NUMBER, Codec::Raw, raw_bytes, &mut table)?;
        table.extend_from_slice(&tag);
        self.append_clear(&table);
        self.append_clear(&u32::try_from(table.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.append_clear(&u32::try_from(self.rows.len()).unwrap_or(u32::MAX).to_be_bytes());
        let digest: [u8; 32] = self.hasher.finalize().into();
        self.append_clear(&digest);
        self.append_clear(END_MAGIC);
        let part = self.take();
        let record = PackRecord {
            id: self.id,
            kind: self.kind,
            size_bytes: self.taken_bytes,
            digest,
            salt: self.salt,
            wrapped: self.wrapped,
        };
        Ok((part, record))
    }
}

/// The fixed end of a container.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tail {
    /// Bytes of the sealed table, which stands before the tail.
    pub(crate) table_bytes: u32,
    pub(crate) frames: u32,
    pub(crate) digest: [u8; 32],
}

impl Tail {
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, &'static str> {
        let bytes = bytes.last_chunk::<TAIL_BYTES>().ok_or("it is too short for a trailer")?;
        let mut from = Decoder::new(bytes);
        let shape = |_| "its trailer has no shape";
        let tail = Self {
            table_bytes: u32::from_be_bytes(from.array("table length").map_err(shape)?),
            frames: u32::from_be_bytes(from.array("frame count").map_err(shape)?),
            digest: from.array("digest").map_err(shape)?,
        };
        if from.array::<8>("magic") != Ok(*END_MAGIC) {
            return Err("its end is cut off or damaged");
        }
        let fits = tail.frames <= PACK_FRAMES_MAX
            && tail.table_bytes as usize == tail.frames as usize * TABLE_ROW_BYTES + TAG_BYTES;
        if fits { Ok(tail) } else { Err("its trailer contradicts itself") }
    }

    /// Opens the sealed table and returns every frame, checked to fill exactly the space between header and table.
    pub(crate) fn frames(
        &self,
        cipher: &PackCipher,
        pack: PackId,
        size_bytes: u64,
        sealed_table: &mut [u8],
    ) -> Result<Vec<FrameRef>, &'static str> {
        let raw_bytes = self.table_bytes - TAG_LENGTH;
        let bound_to = cipher.bound_to(TABLE_NUMBER, Codec::Raw, raw_bytes);
        let table = crypto::open_with(
            &cipher.key,
            PackCipher::nonce(TABLE_NUMBER),
            &bound_to,
            sealed_table,
        )
        .ok_or("its table of frames was changed")?;
        let mut frames = Vec::with_capacity(self.frames as usize);
        let mut offset = HEADER_BYTES as u64;
        for (number, row) in (0..).zip(table.chunks_exact(TABLE_ROW_BYTES)) {
            let mut row = Decoder::new(row);
            let shape = |_| "its table of frames has no shape";
            let stored_bytes = u32::from_be_bytes(row.array("stored").map_err(shape)?);
            let raw_bytes = u32::from_be_bytes(row.array("raw").map_err(shape)?);
            let codec = Codec::from_code(row.byte("codec").map_err(shape)?)
                .ok_or("its table of frames names an unknown codec")?;
            frames.push(FrameRef { pack, number, offset, stored_bytes, raw_bytes, codec });
            offset += u64::from(stored_bytes);
        }
        let expected = size_bytes.checked_sub(u64::from(self.table_bytes) + TAIL_BYTES as u64);
        if expected == Some(offset) { Ok(frames) } else { Err("its frames do not fill it") }
    }
}

/// The cipher of a container that begins with `bytes`, if it is the one that is meant.
pub(crate) fn cipher_of(
    keys: &Keys,
    lineage: LineageId,
    kind: ObjectType,
    id: [u8; 16],
    bytes: &[u8],
) -> Result<PackCipher, &'static str> {
    let header: [u8; HEADER_BYTES] =
        bytes.first_chunk().copied().ok_or("it is too short for a header")?;
    let mut salt = [0; 32];
    salt.copy_from_slice(&header[64..96]);
    let mut wrapped = [0; WRAPPED_BYTES];
    wrapped.copy_from_slice(&header[BOUND_BYTES..]);
    let bound = bound_header(keys, lineage, kind, id, salt);
    if header[..BOUND_BYTES] != bound {
        return Err("its header belongs to another repository, lineage, type, object or version");
    }
    PackCipher::unwrap(keys, kind, bound, wrapped)
        .map_err(|_| "its key cannot be used")?
        .ok_or("its key does not open: the header was changed")
}

/// A whole container in memory whose digest, header and table were checked.
pub(crate) struct Whole {
    cipher: PackCipher,
    frames: Vec<FrameRef>,
    bytes: Vec<u8>,
    unpacker: zstd::bulk::Decompressor<'static>,
}

impl Whole {
    pub(crate) fn check(
        keys: &Keys,
        lineage: LineageId,
        kind: ObjectType,
        id: [u8; 16],
        mut bytes: Vec<u8>,
        content_limit: usize,
    ) -> Result<Self, &'static str> {
        let tail = Tail::parse(&bytes)?;
        let digested = bytes.len() - UNDIGESTED_BYTES;
        if *blake3::hash(&bytes[..digested]).as_bytes() != tail.digest {
            return Err("its bytes do not have the digest in its trailer");
        }
        let cipher = cipher_of(keys, lineage, kind, id, &bytes)?;
        let size_bytes = bytes.len() as u64;
        let table_end = bytes.len() - TAIL_BYTES;
        let table_start = table_end
            .checked_sub(tail.table_bytes as usize)
            .ok_or("its trailer contradicts itself")?;
        let frames =
            tail.frames(&cipher, PackId(id), size_bytes, &mut bytes[table_start..table_end])?;
        let total: u64 = frames.iter().map(|frame| u64::from(frame.raw_bytes)).sum();
        if total > content_limit as u64 {
            return Err("it is larger than the format allows");
        }
        let unpacker = zstd::bulk::Decompressor::new().map_err(|_| "zstd cannot be started")?;
        Ok(Self { cipher, frames, bytes, unpacker })
    }

    /// How long the content of each frame is, in their order.
    pub(crate) fn lengths(&self) -> Vec<usize> {
        self.frames.iter().map(|frame| frame.raw_bytes as usize).collect()
    }

    /// Opens a frame, once, into room that is as long as its content.
    pub(crate) fn open(&mut self, number: usize, out: &mut [u8]) -> Result<(), &'static str> {
        let lies_outside = "a frame lies outside";
        let frame = self.frames.get(number).ok_or(lies_outside)?;
        let start = usize::try_from(frame.offset).map_err(|_| lies_outside)?;
        let stored =
            self.bytes.get_mut(start..start + frame.stored_bytes as usize).ok_or(lies_outside)?;
        self.cipher.open_to(frame, stored, &mut self.unpacker, out)
    }
}

/// A whole small container (a manifest) in memory: checks digest, header, table, and opens every frame in order.
pub(crate) fn open_whole(
    keys: &Keys,
    lineage: LineageId,
    kind: ObjectType,
    id: [u8; 16],
    bytes: Vec<u8>,
    content_limit: usize,
) -> Result<Vec<Vec<u8>>, &'static str> {
    let mut whole = Whole::check(keys, lineage, kind, id, bytes, content_limit)?;
    let lengths = whole.lengths();
    let open = |(number, length)| {
        let mut content = vec![0; length];
        whole.open(number, &mut content).map(|()| content)
    };
    lengths.into_iter().enumerate().map(open).collect()
}

/// The digest of a whole container's bytes, as its trailer and the manifest hold it.
pub(crate) fn digest_of(bytes: &[u8]) -> Option<[u8; 32]> {
    let digested = bytes.len().checked_sub(UNDIGESTED_BYTES)?;
    Some(blake3::hash(&bytes[..digested]).into())
}

/// Whether the end of a container that its digest leaves out is what it must be.
pub(crate) fn ends_with_digest(end: &[u8], digest: &[u8; 32]) -> bool {
    end.strip_prefix(digest) == Some(END_MAGIC)
}

/// How many bytes at the end of a container its digest leaves out.
pub(crate) fn undigested_bytes() -> u64 {
    UNDIGESTED_BYTES as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::MasterKey;

    #[test]
    fn what_does_not_shrink_is_stored_as_it_is() {
        let keys = MasterKey::generate().keys(proto::RepositoryId::mint(1, [1; 10]));
        let lineage = keys.lineage_id(proto::BackupKind::Physical, "c", 1, 0);
        let mut builder = PackBuilder::new(&keys, lineage, ObjectType::Data, [7; 16]).unwrap();
        let mut compressor = Compressor::new(3).unwrap();
        let mut noise = vec![0; 100_000];
        blake3::Hasher::new().finalize_xof().fill(&mut noise);
        let rows = b"0001|open|".repeat(10_000);
        let mut append = |content: &[u8], compresses: bool| {
            let compressor = compresses.then_some(&mut compressor);
            let frame = builder.append(content, compressor).unwrap();
            (frame.codec, frame.stored_bytes as usize - TAG_BYTES)
        };
        assert_eq!(append(&noise, true), (Codec::Raw, noise.len()));
        let (codec, length) = append(&rows, true);
        assert!(codec == Codec::Zstd && length < rows.len() / 10, "{codec:?} {length}");
        // Nor what becomes no shorter.
        assert_eq!(append(b"x", true), (Codec::Raw, 1));
        assert_eq!(append(&rows, false), (Codec::Raw, rows.len()));
        let whole = builder.finish().unwrap().0;
        let read =
            open_whole(&keys, lineage, ObjectType::Data, [7; 16], whole.to_vec(), 1 << 30).unwrap();
        assert!(read == [noise, rows.clone(), b"x".to_vec(), rows]);
    }

    #[test]
    fn all_parts_but_the_last_are_equal_and_make_the_object() {
        let keys = MasterKey::generate().keys(proto::RepositoryId::mint(1, [1; 10]));
        let lineage = keys.lineage_id(proto::BackupKind::Physical, "c", 1, 0);
        let mut builder = PackBuilder::new(&keys, lineage, ObjectType::Data, [7; 16]).unwrap();
        let contents: Vec<Vec<u8>> = (1_u8..)
            .zip([700_001, 5 << 20, 3 << 20, PART_BYTES - TAG_BYTES, FRAME_BYTES_MAX as usize, 1])
            .map(|(byte, length)| vec![byte; length])
            .collect();
        let mut parts = Vec::new();
        for content in &contents {
            let frame = builder.append(content, None).unwrap();
            assert_eq!(frame.end(), builder.size_bytes());
            parts.extend(std::iter::from_fn(|| builder.take_part()));
        }
        assert_eq!(parts.len(), 4);
        assert!(parts.iter().all(|part| part.len() == PART_BYTES));
        let (last, record) = builder.finish().unwrap();
        assert!(last.len() <= PART_BYTES);
        parts.push(last);
        let whole = parts.concat();
        assert_eq!(whole.len() as u64, record.size_bytes);
        assert_eq!(digest_of(&whole), Some(record.digest));
        let read = open_whole(&keys, lineage, ObjectType::Data, [7; 16], whole, 1 << 30).unwrap();
        assert!(read == contents);
    }
}
