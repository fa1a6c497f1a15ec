//! What a key means: `layout`, read backwards. Strict: a second spelling of a name is no name.

use std::str::FromStr;

use proto::{AttemptId, LineageId};

use crate::marks::pack_of;
use crate::pack::PackId;
use crate::wal;
use crate::{hex, layout};

/// What an object is, by its key.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// `config`, a key, a list of keys, or what a trial of the store left.
    Top,
    /// An object of a lineage.
    Of(LineageId, Part),
    /// Nothing of this format.
    Foreign,
}

/// An object of a lineage.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Identity,
    /// An object of an attempt, by its last name.
    Attempt(AttemptId, String),
    Pack(PackId),
    Mark(PackId),
    /// An object of a collector's run, by its last name.
    Run(String, String),
    /// A file of the WAL archive, or what was refused there, by its name below it.
    Wal(String),
    /// What says before which segment WAL may have been deleted, by its name below the archive.
    Floor(String),
    /// Word of copies in one place, by its last name.
    Copies(String),
    /// A pin, which comes and goes.
    Pin,
}

pub(super) fn parse(key: &str) -> Name {
    if key == layout::CONFIG || key.starts_with("probe/") {
        return Name::Top;
    }
    let is_key = key.strip_prefix(layout::KEYS).is_some_and(|id| !id.contains('/'));
    if is_key || number_of_ring(key).is_some() {
        return Name::Top;
    }
    let of = || {
        let (lineage, rest) = key.strip_prefix(layout::LINEAGES)?.split_once('/')?;
        let lineage = exact(lineage)?;
        Some(Name::Of(lineage, part(lineage, key, rest)?))
    };
    of().unwrap_or(Name::Foreign)
}

/// Which list of keys an object is.
pub(super) fn number_of_ring(key: &str) -> Option<u64> {
    key.strip_prefix(layout::KEYRINGS).and_then(exact).filter(|number| *number > 0)
}

fn part(lineage: LineageId, key: &str, rest: &str) -> Option<Part> {
    if rest == "identity" {
        return Some(Part::Identity);
    }
    let (folder, rest) = rest.split_once('/')?;
    match folder {
        "backups" => {
            let (attempt, name) = rest.split_once('/')?;
            is_of_an_attempt(name).then_some(())?;
            Some(Part::Attempt(exact(attempt)?, name.to_owned()))
        }
        "packs" => {
            let pack = pack_of(rest.split_once('/')?.1)?;
            (layout::pack(lineage, pack) == key).then_some(Part::Pack(pack))
        }
        "damaged" => pack_of(rest).map(Part::Mark),
        "gc" => {
            let (run, name) = rest.split_once('/')?;
            matches!(name, "condemned" | "done").then(|| Part::Run(run.to_owned(), name.to_owned()))
        }
        "wal" => match wal::of_place(rest)? {
            wal::Place::Floor(..) => Some(Part::Floor(rest.to_owned())),
            _ => Some(Part::Wal(rest.to_owned())),
        },
        "copies" => hex::decode::<16>(rest).is_some().then(|| Part::Copies(rest.to_owned())),
        "pins" => Some(Part::Pin),
        _ => None,
    }
}

fn is_of_an_attempt(name: &str) -> bool {
    match name.split_once('.') {
        None => {
            matches!(
                name,
                "intent"
                    | "manifest"
                    | "verdict"
                    | "forget"
                    | "remember"
                    | "hold"
                    | "release"
                    | "gone"
            )
        }
        Some(("hold" | "release", random)) => hex::decode::<16>(random).is_some(),
        Some((kind, number)) => {
            matches!(kind, "proof" | "checkpoint" | "forget" | "remember")
                && exact::<u32>(number).is_some()
        }
    }
}

/// What a text says, if it is the one way to say it.
pub(super) fn exact<T: FromStr + ToString>(text: &str) -> Option<T> {
    text.parse().ok().filter(|value: &T| value.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINEAGE: &str = "f344850e-dec1-80eb-aed8-2fa963848a5f";
    const ATTEMPT: &str = "018bcfe5-6800-7000-8000-000000000000";

    fn of(rest: &str) -> Name {
        parse(&format!("lineages/{LINEAGE}/{rest}"))
    }

    #[test]
    fn every_name_of_the_format_is_known() {
        for key in ["config", "probe/ab/1", "keys/open", "keys/00ff", "keyring/1"] {
            assert_eq!(parse(key), Name::Top, "{key}");
        }
        let lineage: LineageId = LINEAGE.parse().unwrap();
        let attempt: AttemptId = ATTEMPT.parse().unwrap();
        let id = PackId([0xab; 16]);
        for name in [
            "intent",
            "manifest",
            "verdict",
            "proof.1",
            "forget",
            "forget.2",
            "remember",
            "remember.2",
            "hold",
            "hold.000102030405060708090a0b0c0d0e0f",
            "release",
            "release.000102030405060708090a0b0c0d0e0f",
            "gone",
            "checkpoint.7",
        ] {
            let key = layout::of_attempt(lineage, attempt, name);
            assert_eq!(parse(&key), Name::Of(lineage, Part::Attempt(attempt, name.to_owned())));
        }
        assert_eq!(parse(&layout::identity(lineage)), Name::Of(lineage, Part::Identity));
        assert_eq!(parse(&layout::pack(lineage, id)), Name::Of(lineage, Part::Pack(id)));
        assert_eq!(parse(&layout::mark(lineage, id)), Name::Of(lineage, Part::Mark(id)));
        let run = Part::Run("00ff".to_owned(), "condemned".to_owned());
        assert_eq!(parse(&layout::of_run(lineage, "00ff", "condemned")), Name::Of(lineage, run));
        for place in ["0000000A/0000000A00000000000000FF", "conflicts/0000000A.history/1"] {
            let part = Part::Wal(place.to_owned());
            assert_eq!(of(&format!("wal/{place}")), Name::Of(lineage, part));
        }
        for timeline in [None, Some(proto::Timeline(2))] {
            let place = layout::wal_floor(timeline, 0xA_0000_00FF);
            let floor = of(&format!("wal/{place}"));
            assert_eq!(floor, Name::Of(lineage, Part::Floor(place)));
        }
        let copies = layout::copies_in(lineage, "s3://second/place");
        let last = copies.rsplit_once('/').unwrap().1.to_owned();
        assert_eq!(parse(&copies), Name::Of(lineage, Part::Copies(last)));
        assert_eq!(of("pins/a/b"), Name::Of(lineage, Part::Pin));
    }

    #[test]
    fn everything_else_is_foreign() {
        let id = "ab".repeat(16);
        let upper = ATTEMPT.to_uppercase();
        for rest in [
            "identity.old".to_owned(),
            format!("backups/{ATTEMPT}"),
            format!("backups/{ATTEMPT}/manifest.1"),
            format!("backups/{ATTEMPT}/proof.01"),
            format!("backups/{ATTEMPT}/gone.1"),
            format!("backups/{upper}/verdict"),
            format!("packs/{id}"),
            format!("packs/aa/{id}"),
            format!("packs/ab/{id}.bak"),
            "gc/run/other".to_owned(),
            "damaged/x".to_owned(),
            "copies/x".to_owned(),
            format!("copies/{id}/x"),
            "wal/000000010000000000000001".to_owned(),
            "wal/1/000000010000000000000001".to_owned(),
            "x/y".to_owned(),
        ] {
            assert_eq!(of(&rest), Name::Foreign, "{rest}");
        }
        for key in [
            "config.bak",
            "keys/a/b",
            "keyring/01",
            "keyring/0",
            "lineages/x/identity",
            "lineages/identity",
            "x",
        ] {
            assert_eq!(parse(key), Name::Foreign, "{key}");
        }
    }
}
