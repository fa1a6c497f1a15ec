//! One valid object of each kind, under keys that are always the same.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use proto::{AttemptId, BackupFacts, LineageId, Lsn, RepositoryId, SystemIdentifier, Timeline};

use crate::checkpoint::{Checkpoint, CheckpointHead};
use crate::entry::{Belief, Body, Content, Entry, Extent, FileBody, Place, Stamp};
use crate::key::{KeyFile, Keys, MasterKey};
use crate::manifest::{Counts, FORMAT, Head, Root, RootShard};
use crate::pack::{
    BOUND_BYTES, Codec, Compressor, FrameRef, ObjectType, PackBuilder, PackCipher, PackId,
    PackRecord, WRAPPED_BYTES, bound_header,
};
use crate::recipient::KeyObject;
use crate::shard::{self, ShardRef};
use crate::wal::object::{HEAD_BYTES, Head as ArchivedHead, object_id};

pub(super) const REPOSITORY: RepositoryId = RepositoryId(uuid::Uuid::from_bytes([1; 16]));
pub(super) const PACK: PackId = PackId([7; 16]);
const METADATA: PackId = PackId([8; 16]);
const WAL: PackId = PackId([9; 16]);

pub(super) const CONFIG: &[u8] = br#"{"magic":"pgmuster-repository","format":1,"repository":"01010101-0101-0101-0101-010101010101","created_at_ms":1,"features":{"read":[],"write":[],"delete":[]}}"#;
pub(super) const VERDICT: &[u8] = br#"{"attempt":"01010101-0101-0101-0101-010101010101","verdict":"COMMIT","manifest_bytes":1513,"manifest_blake3":"f224","counts":{"files":7,"directories":2,"symlinks":1,"bytes":578224,"stored_bytes":131139,"packs_added":5,"packs":5,"wal_files":1},"by":"worker-1","at_ms":1}"#;
const OPEN_KEY: &[u8] = br#"{"magic":"pgmuster-wrapped-key-1","recipient":"open","wrapped":"2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a2a"}"#;

fn master() -> MasterKey {
    let object = KeyObject::parse(OPEN_KEY).expect("it is valid");
    object.bare().expect("it is valid")
}

pub(super) fn keys() -> &'static Keys {
    static KEYS: LazyLock<Keys> = LazyLock::new(|| master().keys(REPOSITORY));
    &KEYS
}

pub(super) fn lineage() -> LineageId {
    keys().lineage_id(proto::BackupKind::Physical, "orders", 7, 0)
}

/// A key file, the master key wrapped for it, and the same key in the clear.
pub(super) fn key_objects() -> (&'static KeyFile, &'static [u8], &'static [u8]) {
    static MADE: LazyLock<(KeyFile, Vec<u8>)> = LazyLock::new(|| {
        let file = KeyFile::generate();
        let wrapped = KeyObject::for_file(&master(), &file, REPOSITORY).expect("AES-GCM seals");
        (file, wrapped.to_bytes())
    });
    (&MADE.0, &MADE.1, OPEN_KEY)
}

pub(super) fn note(key: &str, line: &[u8]) -> Vec<u8> {
    let code = keys().note_code(key, line);
    [line, b"\n", code.to_hex().as_bytes(), b"\n"].concat()
}

/// A pack's cipher, and its header with the wrapped key.
pub(super) fn cipher() -> (&'static PackCipher, &'static [u8]) {
    static MADE: LazyLock<(PackCipher, Vec<u8>)> = LazyLock::new(|| {
        let bound: [u8; BOUND_BYTES] =
            bound_header(keys(), lineage(), ObjectType::Data, PACK.0, [3; 32]);
        let (cipher, wrapped) =
            PackCipher::create(keys(), ObjectType::Data, bound).expect("AES-GCM seals");
        (cipher, [&bound[..], &wrapped].concat())
    });
    (&MADE.0, &MADE.1)
}

fn content() -> Vec<u8> {
    b"one row after the other, ".repeat(40)
}

fn claim(number: u32, raw_bytes: usize, text: &[u8]) -> Vec<u8> {
    let raw_bytes = u32::try_from(raw_bytes).unwrap_or(u32::MAX);
    [&number.to_be_bytes()[..], &raw_bytes.to_be_bytes(), &[Codec::Zstd.code()], text].concat()
}

/// Number, length and codec of a frame, and its compressed content.
pub(super) fn packed_frame() -> Vec<u8> {
    let content = content();
    let packed = zstd::bulk::compress(&content, 3).expect("zstd compresses");
    claim(5, content.len(), &packed)
}

/// The same, sealed.
pub(super) fn sealed_frame() -> Vec<u8> {
    let mut bytes = packed_frame();
    let raw_bytes = u32::try_from(content().len()).unwrap_or(u32::MAX);
    let tag = cipher().0.seal(5, Codec::Zstd, raw_bytes, &mut bytes[9..]);
    bytes.extend_from_slice(&tag.expect("AES-GCM seals"));
    bytes
}

/// A whole pack of four frames, two of them compressed.
pub(super) fn container() -> &'static Vec<u8> {
    static MADE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let mut compressor = Compressor::new(3).expect("zstd can be started");
        let mut builder = PackBuilder::new(keys(), lineage(), ObjectType::Data, PACK.0)
            .expect("a pack can be begun");
        for (length, compressor) in
            [(1000, None), (700, Some(&mut compressor)), (0, None), (1, None)]
        {
            builder.append(&content()[..length], compressor).expect("a frame can be added");
        }
        builder.finish().expect("a pack can be ended").0.to_vec()
    });
    &MADE
}

/// Where [`archived`] lies.
pub(super) const PLACE: &str = "00000001/000000010000000000000001";
/// Content that a frame of it holds; a writer's are larger.
pub(super) const ARCHIVED_FRAME_BYTES: usize = 300;

/// A file of the WAL archive, which its head describes: the head, and the content behind it.
pub(super) fn archived_plain() -> Vec<u8> {
    let content = content();
    [&ArchivedHead::of(&content).encode()[..], &content].concat()
}

/// A head and content, sealed as a file of the archive whether they fit each other or not.
pub(super) fn archived(plain: &[u8]) -> Vec<u8> {
    let mut compressor = Compressor::new(3).expect("zstd can be started");
    let mut builder = PackBuilder::new(keys(), lineage(), ObjectType::Archive, object_id(PLACE))
        .expect("a container can be begun");
    let (head, content) = plain.split_at(plain.len().min(HEAD_BYTES));
    builder.append(head, None).expect("a frame can be added");
    for (number, frame) in content.chunks(ARCHIVED_FRAME_BYTES).enumerate() {
        let compressor = (number % 2 == 0).then_some(&mut compressor);
        builder.append(frame, compressor).expect("a frame can be added");
    }
    builder.finish().expect("a container can be ended").0.to_vec()
}

/// Bytes of the frames that [`table`] describes.
pub(super) const FRAMES_BYTES: usize = 100 + 16 + 5000;

/// The rows of three frames.
pub(super) fn table() -> Vec<u8> {
    let mut rows = Vec::new();
    for (stored, raw, codec) in [(100_u32, 84_u32, 0), (16, 0, 0), (5000, 16 << 20, 1)] {
        rows.extend_from_slice(&stored.to_be_bytes());
        rows.extend_from_slice(&raw.to_be_bytes());
        rows.push(codec);
    }
    rows
}

fn frame(pack: PackId, number: u32, raw_bytes: u32) -> FrameRef {
    let offset = 144 + u64::from(number) * 5000;
    FrameRef { pack, number, offset, stored_bytes: 5000, raw_bytes, codec: Codec::Zstd }
}

fn reference(number: u32, units: u32, twin: bool, packs: &[PackId]) -> ShardRef {
    ShardRef {
        frame: frame(METADATA, number, 6000),
        twin_stored_bytes: if twin { units * 8 + 16 } else { 0 },
        units,
        packs: packs.into(),
    }
}

fn file(path: &str, size_bytes: u64, unit_bytes: u32, content: Content) -> Entry {
    let stamp = Stamp {
        scanned_bytes: size_bytes,
        mtime_ns: -5,
        ctime_ns: 1_700_000_000_000_000_000,
        inode: 9,
        device: 1,
        belief: Belief::Ahead,
    };
    let body = Body::File(FileBody { size_bytes, stamp, unit_bytes, content });
    Entry { path: path.into(), mode: 0o600, body }
}

fn place(number: u32, offset: u32) -> Place {
    Place { frame: frame(PACK, number, 1 << 20), offset }
}

/// A shard of entries of every kind.
pub(super) fn entries() -> Vec<u8> {
    let inline = Content::Inline(vec![
        Extent { units: 2, place: Some(place(0, 77)) },
        Extent { units: 1, place: None },
        Extent { units: 1, place: Some(place(3, 0)) },
    ]);
    let large = Content::Shards(vec![
        reference(2, 256, true, &[METADATA, PACK]),
        reference(4, 44, true, &[METADATA]),
    ]);
    let directory = |path: &str| Entry { path: path.into(), mode: 0o700, body: Body::Directory };
    let link = Body::Symlink { target: b"../elsewhere".to_vec() };
    let entries = [
        directory("base"),
        file("base/1", 3 * 8192 + 1, 8192, inline),
        file("base/2", 300 * 32_768 - 1, 32_768, large),
        file("base/3", 0, 16_384, Content::Inline(Vec::new())),
        directory("base/a"),
        directory("base/a/b"),
        directory("base/a.b"),
        Entry { path: b"link\xff".to_vec(), mode: 0o777, body: link },
    ];
    shard::encode_entries(&entries).0
}

/// What [`extents`] describes, in units of 8 KiB.
pub(super) const EXTENTS_BYTES: u64 = 255 * 8192 + 1;

/// A shard of extents.
pub(super) fn extents() -> Vec<u8> {
    let extents = [
        Extent { units: 100, place: Some(place(0, 0)) },
        Extent { units: 50, place: None },
        Extent { units: 105, place: Some(place(1, 8192)) },
        Extent { units: 1, place: Some(place(0, 500_000)) },
    ];
    shard::encode_extents(&extents).0
}

/// Head and body of a manifest.
pub(super) fn manifest() -> &'static (Vec<u8>, Vec<u8>) {
    static MADE: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
        let record = |id, kind| PackRecord {
            id,
            kind,
            size_bytes: 50_000_000,
            digest: [1; 32],
            salt: [2; 32],
            wrapped: [3; WRAPPED_BYTES],
        };
        let root = |first: &str, number, units, twin, packs: &[PackId]| RootShard {
            first_path: first.into(),
            shard: reference(number, units, twin, packs),
        };
        let root = Root {
            head: head(),
            packs: Arc::new(HashMap::from([
                (PACK, record(PACK, ObjectType::Data)),
                (METADATA, record(METADATA, ObjectType::Metadata)),
                (WAL, record(WAL, ObjectType::Wal)),
            ])),
            shards: vec![
                root("PG_VERSION", 0, 31, true, &[METADATA, PACK]),
                root("base/1", 2, 0, false, &[METADATA]),
            ],
            late: vec![root("backup_label", 6, 1, true, &[PACK, METADATA])],
            wal: vec![root("000000010000000000000001", 8, 0, false, &[METADATA, WAL])],
        };
        root.encode().expect("a manifest can be written")
    });
    &MADE
}

/// Head and body of a checkpoint.
pub(super) fn checkpoint() -> &'static (Vec<u8>, Vec<u8>) {
    static MADE: LazyLock<(Vec<u8>, Vec<u8>)> = LazyLock::new(|| {
        let (manifest_head, body) = manifest();
        let root = Root::decode(manifest_head, body).expect("it is valid");
        let head = CheckpointHead {
            format: FORMAT,
            repository: REPOSITORY,
            lineage: lineage(),
            attempt: root.head.attempt,
            number: 3,
            writer: "pgmuster".into(),
            at_ms: 1,
        };
        let Root { packs, shards, .. } = root;
        Checkpoint { head, packs, shards }.encode().expect("a checkpoint can be written")
    });
    &MADE
}

fn head() -> Head {
    let facts = BackupFacts {
        cluster: "orders".parse().expect("it is a name"),
        system_identifier: SystemIdentifier(7),
        server_version_num: 150_018,
        catalog_version: 202_209_061,
        block_size: 8192,
        wal_segment_size: 16 << 20,
        data_checksums: true,
        timeline: Timeline(1),
        start_lsn: Lsn(0x100_0000),
        stop_lsn: Lsn(0x200_0000),
        started_at_ms: 1,
        stopped_at_ms: 2,
        backup_label: "START WAL LOCATION: 0/1000000".into(),
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        settings: Vec::new(),
        census: None,
        bad_pages: Vec::new(),
        reading: None,
        logical: None,
    };
    Head {
        format: FORMAT,
        repository: REPOSITORY,
        lineage: lineage(),
        attempt: AttemptId::mint(1, [1; 10]),
        predecessor: None,
        writer: "pgmuster".into(),
        began_at_ms: 1,
        continuity: Some("here".into()),
        reread_from: 0,
        counts: Counts::default(),
        facts,
    }
}
