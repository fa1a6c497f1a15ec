//! At which level each mutation of each type of object must be found. Made from FORMAT.md, section 11, and not from what the
//! code happens to find.

use std::ops::Range;

use repository::CheckLevel::{self, Decrypt, Inventory, Manifest, Read};

use crate::laboratory::{Class, Object};
use crate::mutate::{Change, Origin};

/// What a check must say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Expect {
    /// At this level, and not for less, the object is named.
    At(CheckLevel),
    /// There is one more pack that nobody needs.
    Counted,
    /// Nobody can, or need, notice; the reason.
    Unseen(&'static str),
}

#[expect(clippy::match_same_arms, reason = "a rule for each type of object, one behind the other")]
pub(crate) fn expect(object: &Object, change: &Change) -> Expect {
    use Expect::{At, Unseen};
    match (object.class, change) {
        (Class::Manifest { committed: false, .. }, _) => {
            Unseen("nobody reads the manifest of what was aborted")
        }
        (
            Class::Data { needed: false }
            | Class::Metadata { needed: false }
            | Class::Wal { needed: false },
            _,
        ) => Unseen("nobody needs it"),

        // Without the first two no repository opens; the list of keys has the digest of each.
        (Class::Config | Class::Key | Class::OtherKey | Class::Identity, _) => At(Inventory),
        (Class::Keyring { last: true }, Change::Delete) => Unseen("then the list before it counts"),
        (Class::Keyring { .. }, _) => At(Inventory),

        (Class::Verdict { committed: true }, Change::Other { origin: Origin::Fork, bytes })
            if String::from_utf8_lossy(bytes).contains("ABORT") =>
        {
            Unseen("it is authentic, and says that the attempt never became a backup")
        }
        (Class::Verdict { .. }, _) => At(Inventory),
        (Class::Manifest { forgotten: true, .. }, Change::Delete) => {
            Unseen("a collector deletes the manifest of what was given up")
        }
        (Class::Manifest { .. }, _) => At(Inventory),

        (Class::Intent { committed: true }, Change::Delete) => At(Inventory),
        (Class::Intent { committed: false }, Change::Delete) => {
            Unseen("an attempt may be aborted before it has an intent")
        }
        (Class::Wish | Class::Condemned, Change::Delete) => Unseen("it may never have been there"),
        (Class::Intent { .. } | Class::Wish | Class::Condemned, _) => At(Manifest),

        (Class::Proof { last: true }, Change::Delete) => Unseen("it may never have been there"),
        (Class::Proof { last: false }, Change::Delete) => At(Inventory),
        (Class::Proof { .. }, Change::Other { origin: Origin::SameAttempt, .. }) => {
            Unseen("it is a proof of this backup")
        }
        (Class::Proof { .. }, Change::Flip { at }) if !is_signed(&object.bytes, *at) => {
            Unseen("the certificate in a proof is checked by whoever knows the coordinator's key")
        }
        (Class::Proof { .. }, _) => At(Manifest),

        (Class::Archived, Change::Delete) => {
            Unseen("it may never have been there; where later ones are it is a gap")
        }
        // Each is sound in itself, and opens at its own place only.
        (Class::Archived, Change::Other { .. }) => At(Decrypt),
        (Class::Archived, _) => At(Read),
        (Class::Floor, Change::Delete) => Unseen("it may never have been there"),
        (Class::Floor, _) => At(Manifest),

        (_, Change::Delete | Change::Cut { .. } | Change::Extend | Change::Empty) => At(Inventory),
        (_, Change::Other { bytes, .. }) if bytes.len() != object.bytes.len() => At(Inventory),
        // Metadata is opened by every look at the manifest; the rest of its pack has no meaning of its own.
        (Class::Metadata { .. }, change) => match in_frames(&object.bytes, change) {
            0 => At(Read),
            1..8 => Unseen("too little to be sure that it changes anything"),
            _ => At(Manifest),
        },
        _ => At(Read),
    }
}

/// Whether a byte of a proof is under its signature, or the frame around it.
fn is_signed(bytes: &[u8], at: usize) -> bool {
    let text = std::str::from_utf8(bytes).unwrap();
    let certificate = text.find(",\"certificate\":").unwrap();
    at < certificate || at == bytes.len() - 1
}

/// How many bytes of a change lie in the frames of a pack, a flipped bit counting in full.
fn in_frames(bytes: &[u8], change: &Change) -> usize {
    let frames = frames(bytes);
    match change {
        Change::Flip { at } => {
            if frames.contains(at) {
                8
            } else {
                0
            }
        }
        Change::Zero(range) => {
            range.end.min(frames.end).saturating_sub(range.start.max(frames.start))
        }
        _ => frames.len(),
    }
}

/// Where the frames of a container are: between its header and its table, whose length stands in the trailer.
fn frames(bytes: &[u8]) -> Range<usize> {
    let trailer = bytes.len() - 48;
    let table = u32::from_be_bytes(bytes[trailer..trailer + 4].try_into().unwrap());
    144..trailer - table as usize
}
