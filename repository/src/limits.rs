//! The format's limits. A reader checks them before it allocates; a writer never comes near them.

/// Bytes of one unit, at least and at most.
pub(crate) const UNIT_BYTES_MIN: u32 = 8 << 10;
/// See [`UNIT_BYTES_MIN`].
pub(crate) const UNIT_BYTES_MAX: u32 = 32 << 10;
/// A writer seals a frame of file content before it would grow past this. Smaller frames compress worse; larger ones
/// cost memory, and a page fetched on demand would pay for all of its frame.
pub(crate) const FRAME_BYTES: usize = 512 << 10;
/// The largest frame a reader accepts, before compression.
pub(crate) const FRAME_BYTES_MAX: u32 = 16 << 20;
/// Bytes that AES-GCM adds to a frame.
pub(crate) const TAG_BYTES: usize = 16;
/// The same, where lengths in objects are 32 bits.
pub(crate) const TAG_LENGTH: u32 = 16;
/// A writer closes a pack when it has grown past this.
pub(crate) const PACK_BYTES: u64 = 48 << 20;
/// The largest pack a reader accepts.
pub(crate) const PACK_BYTES_MAX: u64 = 1 << 30;
/// Frames in one pack at most: far below what AES-GCM allows under one key.
pub(crate) const PACK_FRAMES_MAX: u32 = 1 << 20;
/// Bytes handed to an upload at once, the last part excepted: object stores want at least 5 MiB, some want all equal.
pub(crate) const PART_BYTES: usize = 8 << 20;
/// Units in a shard of a large file.
pub(crate) const SHARD_UNITS: u32 = 256;
/// A file of at most this many units is described inside its entry, beside its neighbours.
pub(crate) const INLINE_UNITS: u32 = 32;
/// Entries in one shard at most; the usual number is a fraction of this.
pub(crate) const SHARD_ENTRIES: usize = 512;
/// Bytes of a detection hash.
pub(crate) const HASH_BYTES: usize = 8;
/// The same, where lengths in objects are 32 bits.
pub(crate) const HASH_LENGTH: u32 = 8;
/// Bytes of a path.
pub(crate) const PATH_BYTES_MAX: usize = 4096;
/// Bytes of one component of a path.
pub(crate) const NAME_BYTES_MAX: usize = 255;
/// Components of a path.
pub(crate) const PATH_DEPTH_MAX: usize = 64;
/// Bytes of a note (`config`, `identity`, `intent`, `verdict`, …).
pub(crate) const NOTE_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a list of condemned packs.
pub(crate) const CONDEMNED_BYTES_MAX: u64 = 64 << 20;
/// Bytes of a manifest object.
pub(crate) const MANIFEST_BYTES_MAX: u64 = 512 << 20;
/// Bytes of a manifest before compression.
pub(crate) const MANIFEST_RAW_MAX: usize = 1 << 30;
/// Bytes of a proof.
pub(crate) const PROOF_BYTES_MAX: u64 = 4 << 20;
/// Proofs of one backup.
pub(crate) const PROOFS_MAX: u32 = 100_000;
/// Recipients of one repository. Also how many key objects are looked at for a passphrase, each of which may take seconds.
pub(crate) const RECIPIENTS_MAX: usize = 32;
