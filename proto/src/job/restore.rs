//! Restore a backup into a directory.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use jiff::Timestamp;

use crate::{BackupId, Lsn, Recovery, Timeline, check_archiving};

/// Parameters of a restore.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Restore {
    /// The backup; the newest committed one of the cluster when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupId>,
    /// Where to.
    pub target: RestoreTarget,
    /// Only say what would be done.
    #[serde(default)]
    pub plan_only: bool,
    /// The target may be the data directory of a stopped server of the same cluster: what is right in it is used again, the
    /// rest is changed or removed. Left out when false, so that a worker that does not know it still restores.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub delta: bool,
    /// Go beyond the end of the backup, along archived WAL. Left out when absent, as above.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<Recovery>,
    /// The copy's server may archive as the source does; without this it is kept from that. Only where it recovers, and `recovery` says
    /// so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keep_archiving: bool,
    /// Where tablespaces of the backup go, by their OIDs: below restore roots of the same worker. One that is not named goes
    /// beside the target. Left out when empty.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tablespaces: BTreeMap<u32, RestoreTarget>,
}

impl Restore {
    /// The newest backup, as it is.
    pub fn at(target: RestoreTarget) -> Self {
        Self {
            backup: None,
            target,
            plan_only: false,
            delta: false,
            recovery: None,
            keep_archiving: false,
            tablespaces: BTreeMap::new(),
        }
    }

    /// What contradicts itself, for people.
    pub fn check(&self) -> Result<(), String> {
        check_archiving(self.keep_archiving, self.recovery.is_some())?;
        let tablespaces = self.tablespaces.iter();
        let mut places: Vec<(PathBuf, String)> = tablespaces
            .map(|(oid, target)| (target.path(), format!("tablespace {oid}")))
            .chain([(self.target.path(), "the data directory".to_owned())])
            .collect();
        match meeting(&mut places) {
            None => Ok(()),
            Some([(outer, one), (inner, other)]) => Err(format!(
                "{other} would go to {}, which is or lies in {}, where {one} goes: give each a directory of its own",
                inner.display(),
                outer.display()
            )),
        }
    }

    /// The restore roots that a worker must have for it.
    pub fn roots(&self) -> impl Iterator<Item = &str> {
        [&self.target].into_iter().chain(self.tablespaces.values()).map(|place| place.root.as_str())
    }
}

/// Two directories of which the second is the first or lies in it, each with whose it is, if there are such.
pub fn meeting(places: &mut [(PathBuf, String)]) -> Option<&[(PathBuf, String); 2]> {
    // Whatever lies in a directory comes right behind it, or behind others that lie in it.
    places.sort();
    places.array_windows().find(|[(outer, _), (inner, _)]| inner.starts_with(outer))
}

/// A directory below one of the restore roots a worker announced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreTarget {
    /// The root, exactly as the worker announced it.
    pub root: String,
    /// The directory below it.
    pub directory: RelativePath,
}

impl RestoreTarget {
    /// Where that is, by its name.
    pub fn path(&self) -> PathBuf {
        Path::new(&self.root).join(self.directory.as_str())
    }
}

/// A path that cannot leave the directory it is joined to: components of `A-Z a-z 0-9 . _ -`, none beginning with a dot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct RelativePath(String);

/// Why a text is no [`RelativePath`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "use {0:?} as a relative path: 1 to 512 characters, components of A-Z a-z 0-9 . _ - that do not begin with a dot"
)]
pub struct RelativePathError(String);

impl RelativePath {
    /// The path as text, without a leading or trailing slash.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for RelativePath {
    type Err = RelativePathError;

    fn from_str(text: &str) -> Result<Self, RelativePathError> {
        let component = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
        };
        if text.len() <= 512 && text.split('/').all(component) {
            Ok(Self(text.to_owned()))
        } else {
            Err(RelativePathError(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for RelativePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for RelativePath {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

/// What a restore did, or would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreOutcome {
    /// The backup that was restored.
    pub backup: BackupId,
    /// The directory, absolute.
    pub directory: String,
    /// Files written, WAL that the backup brought along included.
    pub files: u64,
    /// Bytes written.
    pub size_bytes: u64,
    /// How many of those files are WAL: what the backup says of itself leaves them out.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wal_files: u64,
    /// Their bytes.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub wal_bytes: u64,
    /// Bytes fetched from the repository.
    pub fetched_bytes: u64,
    /// Bytes that were right on disk already.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub reused_bytes: u64,
    /// Where recovery will be consistent once a server starts on it.
    pub stop_lsn: Lsn,
    /// True when nothing was written because only the plan was asked for.
    pub planned_only: bool,
    /// The plan, one line a step, for people. Of what was done, what other timelines wrote that was not taken.
    #[serde(default)]
    pub plan: Vec<String>,
    /// How far recovery goes beyond the backup, where that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recovery: Option<RecoveryOutcome>,
    /// A server that runs there archives nothing, though the source did.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub archiving_stopped: bool,
    /// Where the settings files are that the source had outside of its data directory, `postgresql.conf` among them: no server
    /// starts before it finds them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings_apart: Option<String>,
}

/// What a restore that goes beyond its backup knows of its way, and what its server was seen to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecoveryOutcome {
    /// What was asked for, for people.
    pub target: String,
    /// The timeline that recovery follows.
    pub timeline: Timeline,
    /// Segments of WAL that it needs.
    pub segments: u64,
    /// Their bytes.
    pub wal_bytes: u64,
    /// Everything before this position is there.
    pub recoverable_to: Lsn,
    /// The newest commit before that position, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recoverable_to_time: Option<Timestamp>,
    /// What the server was seen to reach; absent when it was not started.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reached: Option<Reached>,
}

/// What a started server said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reached {
    /// What the server does now, for people: open on a timeline, paused, shut down, following.
    pub state: String,
    /// The end of what it replayed.
    pub lsn: Lsn,
    /// The last commit that it replayed, by its own account.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_commit: Option<Timestamp>,
    /// The timeline it is on.
    pub timeline: Timeline,
    /// In the server's own words, why it stopped there.
    pub evidence: String,
    /// From the start of the server until it was there.
    pub duration_ms: u64,
    /// It was to run on and does not, because it has no settings of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub stays_down: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
fn is_zero(count: &u64) -> bool {
    *count == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_place_of_a_restore_is_or_lies_in_another() {
        let place = |path: &str| RestoreTarget {
            root: path[..2].to_owned(),
            directory: path[3..].parse().unwrap(),
        };
        let check = |tablespaces: &[(u32, &str)]| {
            let tablespaces = tablespaces.iter().map(|(oid, path)| (*oid, place(path)));
            let tablespaces = tablespaces.collect();
            Restore { tablespaces, ..Restore::at(place("/r/main")) }.check()
        };
        for apart in [
            &[][..],
            &[(1, "/r/main-1"), (2, "/r/main-1-2"), (3, "/s/main")],
            &[(7, "/r/a/b"), (8, "/r/a/c")],
        ] {
            check(apart).unwrap();
        }
        for (meet, told) in [
            (&[(7, "/r/main")][..], ["tablespace 7", "the data directory"]),
            (&[(7, "/r/main/pg_tblspc/7")], ["tablespace 7", "the data directory"]),
            (&[(7, "/s/a"), (8, "/s/a")], ["tablespace 7", "tablespace 8"]),
            (&[(8, "/s/a-b"), (7, "/s/a/b/c"), (9, "/s/a")], ["tablespace 7", "tablespace 9"]),
        ] {
            let refused = check(meet).unwrap_err();
            assert!(told.iter().all(|name| refused.contains(name)), "{meet:?}: {refused}");
        }
        assert!(check(&[(7, "/r/main")]).unwrap_err().contains("/r/main"));
    }

    #[test]
    fn a_relative_path_cannot_leave_its_root() {
        for bad in [
            "",
            "/",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            ".hidden",
            "a b",
            "a\0",
            "~",
            "a;b",
            "\u{202e}a",
        ] {
            assert!(bad.parse::<RelativePath>().is_err(), "{bad:?}");
        }
        assert_eq!(
            "orders/2026-11-22".parse::<RelativePath>().unwrap().as_str(),
            "orders/2026-11-22"
        );
    }
}
