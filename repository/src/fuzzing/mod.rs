//! Every parser of stored bytes behind a function that takes any bytes and panics when the parser's answer is wrong.
//!
//! The targets in `repository/fuzz` call these under libFuzzer, the properties below call them in the suite. Not part of
//! the crate: built for tests and with the feature `fuzzing` only.
//!
//! The first byte chooses. Its lowest bit says what the others are: edits of something valid, so that inputs come close
//! to right ones without a corpus, or the bytes themselves. The next bit says whether the input is *forged*, as by somebody
//! without the key, where only what was written may be accepted; or *authentic*, as by a careless writer, where nothing
//! may be believed that could not be. Each returns whether the input was accepted, so that a test can see that right ones
//! are.

mod input;
mod valid;

use std::sync::LazyLock;

use input::{Choice, Input};

use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::entry::{Body, Content, Entry, Extent, check_path, path_order};
use crate::hex;
use crate::key::KeyFile;
use crate::limits::{FRAME_BYTES_MAX, SHARD_ENTRIES, UNIT_BYTES_MAX, UNIT_BYTES_MIN};
use crate::manifest::{FORMAT, Root, RootShard};
use crate::note;
use crate::pack::{self, Codec, FrameRef, HEADER_BYTES, ObjectType, TAIL_BYTES, Tail};
use crate::recipient::{KeyObject, Unlock};
use crate::record::{Condemned, Identity, Intent, Verdict, Wish};
use crate::shard;
use crate::wal::object as wal;

/// Memory that an answer may take beside what grows with its input.
const SMALL_BYTES: usize = 64 << 10;
/// How many times its input an answer may be large: a reference to a pack is a byte there and 16 here.
const TIMES_LARGER: usize = 32;

/// A frame of a pack: the sealed text with its number, codec and length.
pub fn frame(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    let (cipher, _) = valid::cipher();
    let mut unpacker = zstd::bulk::Decompressor::new().expect("zstd can be started");
    let mut out = Vec::new();
    let valid = match input.choice {
        Choice::Forged => valid::sealed_frame(),
        Choice::Authentic => valid::packed_frame(),
    };
    let bytes = input.bytes(&valid);
    let Some((claim, text)) = bytes.split_first_chunk::<9>() else { return false };
    let (number, raw_bytes) = (number_at(claim, 0), number_at(claim, 4));
    let Some(codec) = Codec::from_code(claim[8]) else { return false };
    let mut stored = text.to_vec();
    if input.choice == Choice::Authentic {
        let tag = cipher.seal(number, codec, raw_bytes, &mut stored).expect("AES-GCM seals");
        stored.extend_from_slice(&tag);
    }
    let stored_bytes = u32::try_from(stored.len()).unwrap_or(u32::MAX);
    let frame = FrameRef { pack: valid::PACK, number, offset: 144, stored_bytes, raw_bytes, codec };
    let opened = cipher.open(&frame, &mut stored, &mut unpacker, &mut out);
    assert!(out.capacity() <= FRAME_BYTES_MAX as usize, "{} bytes for a frame", out.capacity());
    if opened.is_err() {
        return false;
    }
    match input.choice {
        Choice::Forged => assert!(bytes == valid, "a frame that nobody sealed was opened"),
        Choice::Authentic => assert_eq!(out.len(), raw_bytes as usize),
    }
    true
}

/// A whole container: header, frames, table, trailer. A forged one gets the digest it needs, which takes no key.
pub fn container(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    if input.choice == Choice::Authentic {
        return table(&input);
    }
    let valid = valid::container();
    let mut bytes = input.bytes(valid);
    if let Some(digested) = bytes.len().checked_sub(40) {
        let digest = blake3::hash(&bytes[..digested]);
        bytes[digested..digested + 32].copy_from_slice(digest.as_bytes());
    }
    let (keys, lineage) = (valid::keys(), valid::lineage());
    let id = valid::PACK.0;
    let opened = pack::open_whole(keys, lineage, ObjectType::Data, id, bytes.clone(), SMALL_BYTES);
    assert!(opened.is_err() || bytes == *valid, "a container that nobody wrote was opened");
    opened.is_ok()
}

/// The table of frames, as a writer with the key could seal it.
fn table(input: &Input<'_>) -> bool {
    let (cipher, bound) = valid::cipher();
    let rows = input.bytes(&valid::table());
    let rows = &rows[..rows.len() / 9 * 9];
    let count = u32::try_from(rows.len() / 9).unwrap_or(u32::MAX);
    let mut bytes = bound.to_vec();
    bytes.resize(HEADER_BYTES + valid::FRAMES_BYTES, 0);
    let mut sealed = rows.to_vec();
    let tag = cipher.seal(pack::TABLE_NUMBER, Codec::Raw, count * 9, &mut sealed);
    sealed.extend_from_slice(&tag.expect("AES-GCM seals"));
    bytes.extend_from_slice(&sealed);
    bytes.extend_from_slice(&(count * 9 + 16).to_be_bytes());
    bytes.extend_from_slice(&count.to_be_bytes());
    bytes.extend_from_slice(blake3::hash(&bytes).as_bytes());
    bytes.extend_from_slice(b"retsumgp");
    let tail = Tail::parse(&bytes).expect("the trailer is as it should be");
    let size_bytes = bytes.len() as u64;
    let Ok(frames) = tail.frames(cipher, valid::PACK, size_bytes, &mut sealed) else {
        return false;
    };
    let mut offset = HEADER_BYTES as u64;
    for (number, frame) in (0..).zip(&frames) {
        assert_eq!((frame.number, frame.offset), (number, offset));
        offset = frame.end();
    }
    assert_eq!(offset, (HEADER_BYTES + valid::FRAMES_BYTES) as u64);
    assert_eq!(size_bytes, offset + rows.len() as u64 + 16 + TAIL_BYTES as u64);
    true
}

/// A file of the WAL archive: its container (forged, with the digest it needs), or head and content as a writer with the key
/// could seal them (authentic). What its first bytes tell is believed of the whole object.
pub fn archived(data: &[u8]) -> bool {
    static VALID: LazyLock<Vec<u8>> = LazyLock::new(|| valid::archived(&valid::archived_plain()));
    let Some(input) = Input::new(data) else { return false };
    let (keys, lineage) = (valid::keys(), valid::lineage());
    let open = |place, bytes: &[u8]| wal::open(keys, lineage, place, bytes.to_vec());
    if input.choice == Choice::Forged {
        let mut bytes = input.bytes(&VALID);
        if let Some(digested) = bytes.len().checked_sub(40) {
            let digest = blake3::hash(&bytes[..digested]);
            bytes[digested..digested + 32].copy_from_slice(digest.as_bytes());
        }
        let told = wal::head(keys, lineage, valid::PLACE, &bytes);
        let end = usize::try_from(wal::HEAD_END).unwrap_or(usize::MAX);
        let is_ours = bytes.get(..end) == VALID.get(..end);
        assert_eq!(told.is_ok(), is_ours, "a head that nobody wrote was believed, or one was not");
        let opened = open(valid::PLACE, &bytes);
        assert!(opened.is_err() || bytes == *VALID, "a file that nobody archived was opened");
        let elsewhere = open("00000001/000000010000000000000002", &bytes);
        assert!(elsewhere.is_err(), "a file was opened under another name");
        return opened.is_ok();
    }
    let plain = input.bytes(&valid::archived_plain());
    let object = valid::archived(&plain);
    let (head, content) = plain.split_at(plain.len().min(wal::HEAD_BYTES));
    let is_right = wal::Head::decode(head) == Some(wal::Head::of(content));
    let told = wal::head(keys, lineage, valid::PLACE, &object);
    assert_eq!(told.ok(), wal::Head::decode(head));
    let opened = open(valid::PLACE, &object);
    assert_eq!(opened.is_ok(), is_right, "the head and the content do not fit, or do");
    assert!(opened.is_err() || opened.as_deref() == Ok(content));
    is_right
}

/// A manifest: its head (forged) or its body (authentic). Both are sealed together, so either means a writer with the key.
pub fn manifest(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    let (valid_head, valid_body) = valid::manifest();
    let (mut head, mut body) = (valid_head.clone(), valid_body.clone());
    let edited = if input.choice == Choice::Forged { &mut head } else { &mut body };
    *edited = input.bytes(edited);
    let Ok(root) = Root::decode(&head, &body) else { return false };
    let lists = [&root.shards, &root.late, &root.wal];
    let weight: usize = lists.iter().flat_map(|list| list.iter()).map(weight_of_shard).sum();
    let weight = weight + root.packs.len() * size_of::<pack::PackRecord>();
    assert!(weight <= SMALL_BYTES + TIMES_LARGER * body.len(), "{weight} bytes of memory");
    let reached =
        lists.iter().flat_map(|list| list.iter()).flat_map(|root| root.shard.packs.iter());
    for pack in reached {
        assert!(root.packs.contains_key(pack), "{pack} is needed and not listed");
    }
    let (head, body) = root.encode().expect("what was read can be written");
    let again = Root::decode(&head, &body).expect("what was written can be read");
    assert_eq!((again.head, again.shards), (root.head, root.shards));
    assert_eq!((again.late, again.wal), (root.late, root.wal));
    true
}

/// A checkpoint: its head (forged) or its body (authentic).
pub fn checkpoint(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    let (valid_head, valid_body) = valid::checkpoint();
    let (mut head, mut body) = (valid_head.clone(), valid_body.clone());
    let edited = if input.choice == Choice::Forged { &mut head } else { &mut body };
    *edited = input.bytes(edited);
    let Ok(read) = Checkpoint::decode(&head, &body) else { return false };
    let weight: usize = read.shards.iter().map(weight_of_shard).sum();
    let weight = weight + read.packs.len() * size_of::<pack::PackRecord>();
    assert!(weight <= SMALL_BYTES + TIMES_LARGER * body.len(), "{weight} bytes of memory");
    let (head, body) = read.encode().expect("what was read can be written");
    let again = Checkpoint::decode(&head, &body).expect("what was written can be read");
    assert_eq!(again, read);
    true
}

fn weight_of_shard(root: &RootShard) -> usize {
    size_of::<RootShard>() + root.first_path.len() + size_of_val(&*root.shard.packs)
}

/// A shard: of entries (forged) or of extents (authentic). Both are sealed.
pub fn shard(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    if input.choice == Choice::Authentic {
        let bytes = input.bytes(&valid::extents());
        let Ok(extents) = shard::decode_extents(&bytes, 8192, valid::EXTENTS_BYTES) else {
            return false;
        };
        assert_extents(&extents, 8192, valid::EXTENTS_BYTES);
        let again =
            shard::decode_extents(&shard::encode_extents(&extents).0, 8192, valid::EXTENTS_BYTES);
        assert_eq!(again, Ok(extents));
        return true;
    }
    let bytes = input.bytes(&valid::entries());
    let Ok(entries) = shard::decode_entries(&bytes) else { return false };
    assert!(entries.len() <= SHARD_ENTRIES);
    let weight: usize = entries.iter().map(weight_of_entry).sum();
    let paths = entries.len() * crate::limits::PATH_BYTES_MAX;
    assert!(weight <= paths + SMALL_BYTES + TIMES_LARGER * bytes.len(), "{weight} bytes of memory");
    for entry in &entries {
        assert_eq!(check_path(&entry.path), Ok(()));
        if let Body::File(file) = &entry.body {
            assert!((UNIT_BYTES_MIN..=UNIT_BYTES_MAX).contains(&file.unit_bytes));
            match &file.content {
                Content::Inline(extents) => {
                    assert_extents(extents, file.unit_bytes, file.size_bytes);
                }
                Content::Shards(shards) => {
                    let units: u64 = shards.iter().map(|shard| u64::from(shard.units)).sum();
                    assert_eq!(units, file.size_bytes.div_ceil(u64::from(file.unit_bytes)));
                }
            }
        }
    }
    assert!(entries.is_sorted_by(|a, b| path_order(&a.path, &b.path).is_lt()));
    assert_eq!(shard::decode_entries(&shard::encode_entries(&entries).0), Ok(entries));
    true
}

fn weight_of_entry(entry: &Entry) -> usize {
    let body = match &entry.body {
        Body::Directory => 0,
        Body::Symlink { target } => target.capacity(),
        Body::File(file) => match &file.content {
            Content::Inline(extents) => extents.capacity() * size_of::<Extent>(),
            Content::Shards(shards) => shards
                .iter()
                .map(|shard| size_of::<shard::ShardRef>() + size_of_val(&*shard.packs))
                .sum(),
        },
    };
    size_of::<Entry>() + entry.path.capacity() + body
}

fn assert_extents(extents: &[Extent], unit_bytes: u32, bytes: u64) {
    let units: u64 = extents.iter().map(|extent| u64::from(extent.units)).sum();
    assert_eq!(units, bytes.div_ceil(u64::from(unit_bytes)));
    let mut left = bytes;
    for extent in extents {
        let here = left.min(u64::from(extent.units) * u64::from(unit_bytes));
        left -= here;
        if let Some(place) = extent.place {
            assert!(u64::from(place.offset) + here <= u64::from(place.frame.raw_bytes));
        }
    }
}

/// A note: the verdict of a backup.
pub fn verdict(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    let (keys, key) = (valid::keys(), "lineages/l/backups/b/verdict");
    match input.choice {
        Choice::Forged => {
            let valid = valid::note(key, valid::VERDICT);
            let bytes = input.bytes(&valid);
            let read = note::read::<Verdict>(keys, key, &bytes);
            assert!(read.is_err() || bytes == valid, "a verdict that nobody gave was believed");
            let elsewhere = note::read::<Verdict>(keys, "lineages/l/backups/c/verdict", &bytes);
            assert!(elsewhere.is_err(), "a verdict was believed of another backup");
            read.is_ok()
        }
        Choice::Authentic => {
            let bytes = valid::note(key, &input.bytes(valid::VERDICT));
            let _ = note::read::<Identity>(keys, key, &bytes);
            let _ = note::read::<Intent>(keys, key, &bytes);
            let _ = note::read::<Condemned>(keys, key, &bytes);
            let _ = note::read::<Wish>(keys, key, &bytes);
            note::read::<Verdict>(keys, key, &bytes).is_ok()
        }
    }
}

/// The config: looked at before a key is there (authentic), believed with its code (forged).
pub fn config(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    let (keys, key) = (valid::keys(), crate::layout::CONFIG);
    let valid = valid::note(key, valid::CONFIG);
    let bytes = input.bytes(&valid);
    let looked = note::read_unchecked::<Config>(key, &bytes);
    let readable = looked.as_ref().is_ok_and(|config| config.check_readable("there").is_ok());
    if let Ok(config) = &looked {
        if readable {
            assert_eq!(config.magic, crate::config::MAGIC);
            assert!((1..=FORMAT).contains(&config.format));
            assert!(config.features.read.is_empty());
        }
        let known = config.features.write.iter().all(|name| name == crate::config::SINGLE_WRITER);
        assert_eq!(config.check_writable("there").is_ok(), known);
    }
    if input.choice == Choice::Authentic {
        return readable;
    }
    let read = note::read::<Config>(keys, key, &bytes);
    assert!(read.is_err() || bytes == valid, "a config that nobody wrote was believed");
    read.is_ok()
}

/// The wrapped master key: for a key file (forged), or in the clear (authentic).
pub fn key_object(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    let repository = valid::REPOSITORY;
    let (file, wrapped, open) = valid::key_objects();
    if input.choice == Choice::Authentic {
        let object = KeyObject::parse(&input.bytes(open));
        return object.is_ok_and(|object| object.bare().is_some());
    }
    let Ok(object) = KeyObject::parse(&input.bytes(wrapped)) else { return false };
    let Ok(master) = object.unseal(&file.id(), Unlock::KeyFile(file), repository) else {
        return false;
    };
    let (ours, theirs) = (valid::keys(), master.keys(repository));
    assert_eq!(ours.note_code("k", b"line"), theirs.note_code("k", b"line"), "another key");
    true
}

/// The text of a key file, as somebody typed it.
pub fn key_file(data: &[u8]) -> bool {
    let Some(input) = Input::new(data) else { return false };
    let (valid_file, wrapped, _) = valid::key_objects();
    let repository = valid::REPOSITORY;
    let text = valid_file.text(repository, "there");
    let typed = input.bytes(text.as_bytes());
    let Ok(file) = String::from_utf8_lossy(&typed).parse::<KeyFile>() else { return false };
    assert!(hex::decode::<16>(&file.id()).is_some());
    if input.is_edited {
        let object = KeyObject::parse(wrapped).expect("it is valid");
        let opened = object.unseal(&file.id(), Unlock::KeyFile(&file), repository);
        assert!(opened.is_ok(), "a key with a wrong digit was taken");
    }
    let again: KeyFile =
        file.text(repository, "there").parse().expect("what was written can be read");
    assert_eq!(again.id(), file.id());
    true
}

fn number_at(bytes: &[u8; 9], at: usize) -> u32 {
    u32::from_be_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    type Parser = fn(&[u8]) -> bool;

    const TARGETS: [(&str, Parser); 10] = [
        ("frame", frame),
        ("container", container),
        ("archived", archived),
        ("manifest", manifest),
        ("checkpoint", checkpoint),
        ("shard", shard),
        ("verdict", verdict),
        ("config", config),
        ("key_object", key_object),
        ("key_file", key_file),
    ];

    #[test]
    fn what_is_valid_is_accepted_by_every_parser() {
        for (name, target) in TARGETS {
            for choice in [1, 3] {
                assert!(target(&[choice]), "{name} refuses what is valid ({choice})");
            }
            assert!(!target(&[0]), "{name} accepts nothing at all");
        }
    }

    #[test]
    fn no_flipped_bit_of_what_is_valid_fools_or_crashes_a_parser() {
        for (_, target) in TARGETS {
            for at in 0..2000_u16 {
                let [high, low] = at.to_be_bytes();
                for choice in [1, 3] {
                    target(&[choice, 0, high, low, 1 << (at % 8)]);
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn no_edit_of_what_is_valid_fools_or_crashes_a_parser(
            choice: u8,
            edits in vec(any::<u8>(), 0..20),
        ) {
            for (_, target) in TARGETS {
                target(&[&[choice | 1][..], &edits].concat());
            }
        }

        #[test]
        fn no_bytes_fool_or_crash_a_parser(choice: u8, bytes in vec(any::<u8>(), 0..600)) {
            for (_, target) in TARGETS {
                target(&[&[choice & !1][..], &bytes].concat());
            }
        }
    }

    /// The same as a parser of something smaller than it says: nothing is allocated for a count that cannot be.
    #[test]
    fn counts_that_cannot_be_are_refused_before_memory_is_taken_for_them() {
        let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
        let (head, _) = valid::manifest();
        assert!(Root::decode(head, &huge).is_err());
        for kind in [1, 2] {
            assert!(shard::decode_entries(&[&[kind][..], &huge].concat()).is_err());
            assert!(shard::decode_entries(&[&[kind, 0][..], &huge].concat()).is_err());
            assert!(shard::decode_entries(&[&[kind, 0, 0][..], &huge].concat()).is_err());
            assert!(shard::decode_extents(&[&[kind, 0, 0][..], &huge].concat(), 8192, 1).is_err());
        }
        let mut tail = [0xff; TAIL_BYTES];
        tail[TAIL_BYTES - 8..].copy_from_slice(b"retsumgp");
        assert!(Tail::parse(&tail).is_err());
        // A frame says how much it is: 4 GiB.
        let claim = [&[2, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 1][..], &[7; 40]].concat();
        assert!(!frame(&claim));
    }

    /// Paths share what they begin with, so a few bytes of a shard can mean thousands in memory.
    #[test]
    fn a_shard_holds_no_more_entries_than_a_writer_puts_into_it() {
        let many = |count: usize| {
            let directory =
                |n| Entry { path: format!("{n:04}").into(), mode: 0o700, body: Body::Directory };
            shard::encode_entries(&(0..count).map(directory).collect::<Vec<_>>()).0
        };
        assert_eq!(shard::decode_entries(&many(SHARD_ENTRIES)).map(|all| all.len()), Ok(512));
        assert!(shard::decode_entries(&many(SHARD_ENTRIES + 1)).is_err());
    }
}
