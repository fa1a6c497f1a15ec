//! The mutations: each object in every way that hardware, people and intruders have, by a seed.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;

use crate::common::noise;
use crate::laboratory::{Class, Laboratory, Object};
use crate::rules::{Expect, expect};

/// What is done to one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Change {
    Flip {
        at: usize,
    },
    Cut {
        to: usize,
    },
    Extend,
    Zero(Range<usize>),
    Empty,
    Delete,
    /// It becomes another object of its type.
    Other {
        origin: Origin,
        bytes: Vec<u8>,
    },
}

/// Where another object comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Origin {
    /// The same attempt.
    SameAttempt,
    /// Another attempt or lineage of this repository.
    Here,
    /// Another repository.
    Elsewhere,
    /// The same key in another history of this repository.
    Fork,
}

/// An object that is written, or taken away.
#[derive(Debug)]
pub(crate) struct Edit {
    pub key: String,
    pub bytes: Option<Vec<u8>>,
    pub expect: Expect,
}

#[derive(Debug)]
pub(crate) struct Mutation {
    pub kind: &'static str,
    pub edits: Vec<Edit>,
}

impl fmt::Display for Mutation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.kind)?;
        for edit in &self.edits {
            let bytes = edit.bytes.as_ref().map(Vec::len);
            write!(f, ", {} with {bytes:?} bytes, to be found: {:?}", edit.key, edit.expect)?;
        }
        Ok(())
    }
}

/// Bits that are flipped in each object, besides one at either end.
const FLIPS: usize = 4;
/// Lengths that each object is cut to.
const CUTS: usize = 3;

pub(crate) fn all(laboratory: &Laboratory) -> Vec<Mutation> {
    let mut mutations = Vec::new();
    for (n, (key, object)) in laboratory.objects.iter().enumerate() {
        for (kind, change) in changes(object, n as u64) {
            mutations.extend(changed(kind, [(key, object, change)]));
        }
    }
    swaps(laboratory, &mut mutations);
    replacements(laboratory, &mut mutations);
    duplicates(laboratory, &mut mutations);
    mutations
}

/// A mutation of changes, unless they change nothing.
fn changed<'a>(
    kind: &'static str,
    changes: impl IntoIterator<Item = (&'a String, &'a Object, Change)>,
) -> Option<Mutation> {
    let edit = |(key, object, change): (&String, &Object, Change)| {
        let expect = expect(object, &change);
        Edit { key: key.clone(), bytes: apply(&object.bytes, change), expect }
    };
    let mut edits = Vec::new();
    for (key, object, change) in changes {
        let edit = edit((key, object, change));
        if edit.bytes.as_ref() == Some(&object.bytes) {
            return None;
        }
        edits.push(edit);
    }
    Some(Mutation { kind, edits })
}

fn apply(bytes: &[u8], change: Change) -> Option<Vec<u8>> {
    let mut bytes = bytes.to_vec();
    match change {
        // Which bit depends on the place.
        Change::Flip { at } => bytes[at] ^= 1 << (at % 8),
        Change::Cut { to } => bytes.truncate(to),
        Change::Extend => bytes.push(0),
        Change::Zero(range) => bytes[range].fill(0),
        Change::Empty => bytes.clear(),
        Change::Delete => return None,
        Change::Other { bytes: other, .. } => bytes = other,
    }
    Some(bytes)
}

fn changes(object: &Object, seed: u64) -> Vec<(&'static str, Change)> {
    let length = object.bytes.len();
    let chance = noise(1000 + seed, 8 * (FLIPS + CUTS));
    let mut places = chance.chunks_exact(8).map(|bytes| {
        let number = u64::from_be_bytes(bytes.try_into().unwrap());
        usize::try_from(number % length as u64).unwrap()
    });
    let mut changes = Vec::new();
    for at in [0, length - 1].into_iter().chain(places.by_ref().take(FLIPS)) {
        changes.push(("a bit flipped", Change::Flip { at }));
    }
    for to in places.by_ref().take(CUTS) {
        changes.push(("cut", Change::Cut { to }));
    }
    changes.push(("cut by a byte", Change::Cut { to: length - 1 }));
    let end = |from: usize| length.min(from + 64);
    changes.push(("a range of zeros", Change::Zero(0..end(0))));
    changes.push(("a range of zeros", Change::Zero(length / 2..end(length / 2))));
    changes.push(("extended", Change::Extend));
    changes.push(("emptied", Change::Empty));
    changes.push(("deleted", Change::Delete));
    changes
}

/// Types whose objects can stand in for each other.
fn kind(class: Class) -> usize {
    match class {
        Class::Config => 0,
        Class::Key | Class::OtherKey => 1,
        Class::Keyring { .. } => 12,
        Class::Identity => 2,
        Class::Intent { .. } => 3,
        Class::Verdict { .. } => 4,
        Class::Manifest { .. } => 5,
        Class::Proof { .. } => 6,
        Class::Wish => 7,
        Class::Condemned => 8,
        Class::Data { .. } => 9,
        Class::Metadata { .. } => 10,
        Class::Wal { .. } => 11,
        Class::Archived => 13,
        Class::Floor => 14,
    }
}

fn attempt(key: &str) -> &str {
    key.rsplit_once('/').map_or(key, |(attempt, _)| attempt)
}

/// Every two objects of one type change places: within a lineage and between the two.
fn swaps(laboratory: &Laboratory, mutations: &mut Vec<Mutation>) {
    let objects: Vec<_> = laboratory.objects.iter().collect();
    for (n, (one_key, one)) in objects.iter().enumerate() {
        for (two_key, two) in &objects[n + 1..] {
            if kind(one.class) != kind(two.class) {
                continue;
            }
            let same_attempt =
                one_key.contains("/backups/") && attempt(one_key) == attempt(two_key);
            let origin = if same_attempt { Origin::SameAttempt } else { Origin::Here };
            let becomes = |other: &Object| Change::Other { origin, bytes: other.bytes.clone() };
            let changes = [(*one_key, *one, becomes(two)), (*two_key, *two, becomes(one))];
            mutations.extend(changed("swapped", changes));
        }
    }
}

/// Each object becomes one of its type from another repository, and the one of its key from another history.
fn replacements(laboratory: &Laboratory, mutations: &mut Vec<Mutation>) {
    let mut strangers: BTreeMap<String, Vec<&Vec<u8>>> = BTreeMap::new();
    for (key, bytes) in &laboratory.elsewhere {
        strangers.entry(type_of(key, bytes)).or_default().push(bytes);
    }
    for (n, (key, object)) in laboratory.objects.iter().enumerate() {
        if let Some(strangers) = strangers.get(&type_of(key, &object.bytes)) {
            let bytes = strangers[n % strangers.len()].clone();
            let change = Change::Other { origin: Origin::Elsewhere, bytes };
            mutations.extend(changed("from another repository", [(key, object, change)]));
        }
        if let Some(bytes) = laboratory.fork.get(key) {
            let change = Change::Other { origin: Origin::Fork, bytes: bytes.clone() };
            mutations.extend(changed("from another history", [(key, object, change)]));
        }
    }
}

fn type_of(key: &str, bytes: &[u8]) -> String {
    match key.split('/').nth(2) {
        Some("packs") => format!("pack of type {}", bytes[9]),
        Some("wal") if !key.contains("/floor/") => "archived".to_owned(),
        _ if key.starts_with("keys/") => "key".to_owned(),
        _ if key.starts_with("keyring/") => "keyring".to_owned(),
        _ => key.rsplit('/').next().unwrap().to_owned(),
    }
}

/// Each object once more under another name: beside itself, and where one of its type could be.
fn duplicates(laboratory: &Laboratory, mutations: &mut Vec<Mutation>) {
    let attempt = "018bcfe5-6800-7000-8000-00000000abcd";
    for (n, (key, object)) in laboratory.objects.iter().enumerate() {
        let mut double = |kind, key: String, expect| {
            let edit = Edit { key, bytes: Some(object.bytes.clone()), expect };
            mutations.push(Mutation { kind, edits: vec![edit] });
        };
        let inventory = Expect::At(repository::CheckLevel::Inventory);
        // Any name below `keys/` is a key's.
        if !matches!(object.class, Class::Key | Class::OtherKey) {
            double("doubled beside itself", format!("{key}.bak"), inventory);
        }
        let mut parts: Vec<&str> = key.split('/').collect();
        let id = format!("{n:032x}");
        match parts.get(2).copied() {
            Some("packs") => {
                parts.truncate(3);
                parts.extend([&id[..2], &id]);
                double("doubled under a pack's name", parts.join("/"), Expect::Counted);
            }
            Some("backups") => {
                parts[3] = attempt;
                double("doubled for another attempt", parts.join("/"), inventory);
            }
            Some("wal") if object.class == Class::Archived => {
                let name = format!("0000000500000000{n:08X}");
                parts.truncate(3);
                parts.extend(["00000005", &name]);
                let decrypt = Expect::At(repository::CheckLevel::Decrypt);
                double("doubled under a segment's name", parts.join("/"), decrypt);
            }
            _ => {}
        }
    }
}
