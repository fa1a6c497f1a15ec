//! Keeping a replay out of directories that are somebody else's.
//!
//! A server that replays the making of a tablespace makes it at the very place where the first server had it, and removes what
//! it finds there. Where that server still runs on the same host, these are its files. The file is looked at before it is
//! handed over, because afterwards nothing can stop the replay.

use std::ffi::OsStr;
use std::fmt;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use bytes::Bytes;
use jiff::Timestamp;
use postgres::wal::{Segment, SegmentHeader};
use postgres::wal_moments::{self, Moment, NewTablespace, SegmentMoments};
use proto::{Action, Code, Failure, Lsn};
use serde::{Deserialize, Serialize};

use super::{Server, data_directory};
use crate::context::blocking;

/// Where a recovery ends, as far as whoever began it knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub enum Until {
    /// Nothing from this position on is replayed.
    Position(Lsn),
    /// Nothing behind the first record that begins at this position or later is.
    Record(Lsn),
    /// Nothing from the first end of a transaction after this time on is.
    Time(Timestamp),
}

impl Until {
    /// Whether the recovery has ended when it comes to a record.
    fn comes_before(self, space: &NewTablespace, moments: &[Moment]) -> bool {
        match self {
            Self::Position(until) => until <= space.start,
            // Between two records there are others that nobody looked for: only one that is known tells.
            Self::Record(at) => {
                moments.iter().any(|moment| at <= moment.start && moment.start < space.start)
            }
            Self::Time(time) => moments.iter().any(|moment| {
                moment.ends_transaction() && moment.at > time && moment.start < space.start
            }),
        }
    }
}

impl fmt::Display for Until {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Position(position) => position.fmt(f),
            Self::Record(position) => write!(f, "{position}+"),
            Self::Time(time) => time.fmt(f),
        }
    }
}

impl From<Until> for String {
    fn from(until: Until) -> Self {
        until.to_string()
    }
}

impl TryFrom<String> for Until {
    type Error = UntilError;

    fn try_from(text: String) -> Result<Self, UntilError> {
        text.parse()
    }
}

/// A text that is neither a position nor a time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("write a position (0/3000148) or a time with its zone (2026-11-27T09:30:00Z)")]
pub struct UntilError;

impl FromStr for Until {
    type Err = UntilError;

    fn from_str(text: &str) -> Result<Self, UntilError> {
        if let Some(position) = text.strip_suffix('+') {
            return position.parse().map(Self::Record).map_err(|_| UntilError);
        }
        let time = || text.parse().map(Self::Time).map_err(|_| UntilError);
        text.parse().map_or_else(|_| time(), |position| Ok(Self::Position(position)))
    }
}

/// Refuses a segment whose replay would remove files that the server which asks did not write. `said` is what the segment says of
/// itself, where that is known; `next` has the one behind it, if there is one; `to` is where the server wants it; nothing behind `until`
/// will be replayed.
pub(super) async fn protect(
    segment: Segment,
    content: &Bytes,
    said: Option<SegmentMoments>,
    next: impl Future<Output = Result<Option<Bytes>, Failure>>,
    server: Server,
    to: &Path,
    until: Option<Until>,
) -> Result<(), Failure> {
    let mut said = match said {
        Some(said) => said,
        None => look(segment, content.clone(), None, server).await?,
    };
    // Without the next one, the record cannot be replayed either.
    if said.may_make_one_more
        && let Some(next) = next.await?
    {
        said = look(segment, content.clone(), Some(next), server).await?;
    }
    let SegmentMoments { moments, tablespaces, .. } = &mut said;
    tablespaces.retain(|space| until.is_none_or(|until| !until.comes_before(space, moments)));
    if said.tablespaces.is_empty() {
        return Ok(());
    }
    let directory = data_directory(to);
    let major = server.major.or_else(|| Some(SegmentHeader::parse(content).ok()?.major()));
    let version = format!("PG_{}_{}", major.unwrap_or_default(), server.catalog_version);
    blocking(move || {
        let outside = said.tablespaces.iter().find(|space| !space.location.is_empty());
        if let Some(space) = outside
            && postgres::sandbox::is_room_of(&directory)
        {
            return Err(leaves_its_room(space));
        }
        let foreign = said.tablespaces.iter().find_map(|space| {
            occupied(&directory, space, &version).map(|occupied| refusal(space, &occupied))
        });
        foreign.map_or(Ok(()), Err)
    })
    .await
}

/// What a segment says of itself to the server that will replay it, as far as it says it without the next one.
pub(super) async fn look(
    segment: Segment,
    content: Bytes,
    next: Option<Bytes>,
    server: Server,
) -> Result<SegmentMoments, Failure> {
    let (start, major) = (segment.start(server.segment_size), server.major.unwrap_or_default());
    blocking(move || Ok(wal_moments::read(major, start, &content, next.as_deref())?)).await
}

/// The directory that replay would empty, if something is in it and the server does not call it its own already, as one does
/// that replays the same log again.
fn occupied(data_directory: &Path, space: &NewTablespace, version: &str) -> Option<PathBuf> {
    if space.location.is_empty() {
        return None;
    }
    let location = Path::new(OsStr::from_bytes(&space.location));
    let link = data_directory.join("pg_tblspc").join(space.oid.to_string());
    if fs::read_link(link).is_ok_and(|target| target == location) {
        return None;
    }
    let directory = location.join(version);
    let is_free = match fs::read_dir(&directory) {
        Ok(mut names) => names.next().is_none(),
        Err(error) => error.kind() == ErrorKind::NotFound,
    };
    (!is_free).then_some(directory)
}

/// A proof writes nowhere but in its own room.
fn leaves_its_room(space: &NewTablespace) -> Failure {
    let location = String::from_utf8_lossy(&space.location);
    let what = format!(
        "the log makes tablespace {} at {location} (position {}), and a proof does not write there",
        space.oid, space.start
    );
    Failure::new(Code::DataDirectoryShape, Action::FixConfig, what)
        .with_hint("Take another backup, which holds the tablespace, or prove an earlier moment.")
}

fn refusal(space: &NewTablespace, occupied: &Path) -> Failure {
    let location = String::from_utf8_lossy(&space.location);
    let what = format!(
        "the log makes tablespace {} at {location} (position {}), and replaying that would remove the files that are in {}",
        space.oid,
        space.start,
        occupied.display()
    );
    Failure::new(Code::DataDirectoryShape, Action::FixConfig, what).with_hint(format!(
        "If a server uses {location}, recover on another host, or to before that: pgmuster restore … --to {} --before. If none does any \
         more, move what is in it away, leave {location} empty, and start this server again.",
        space.start
    ))
}

#[cfg(test)]
mod tests {
    use postgres::wal_moments::Event;

    use super::*;

    #[test]
    fn what_lies_behind_the_end_of_the_recovery_is_in_nobodys_way() {
        let space = NewTablespace { oid: 1, location: b"/x".to_vec(), start: Lsn(100) };
        let ended = |at: &str, start: u64| Moment {
            event: Event::Commit(7),
            at: at.parse().unwrap(),
            start: Lsn(start),
            end: Lsn(start + 8),
        };
        let moments = [ended("2026-11-27T09:00:00Z", 50), ended("2026-11-27T10:00:00Z", 150)];
        let before = |until: &str| until.parse::<Until>().unwrap().comes_before(&space, &moments);
        assert!(before("0/64") && !before("0/65"));
        assert!(before("0/32+"), "a record at that position ends it");
        assert!(before("0/2F+"), "and so does the first one behind a position inside another");
        assert!(!before("0/33+"), "the record itself may be the first");
        assert!(before("2026-11-27T08:59:59Z"), "a commit before the record ends it");
        assert!(!before("2026-11-27T09:00:00Z"), "the next commit comes after the record");
        assert!("soon".parse::<Until>().is_err());
        let time = Until::Time("2026-11-27T09:00:00.5Z".parse().unwrap());
        assert_eq!(time.to_string().parse(), Ok(time));
        let record = Until::Record(Lsn(50));
        assert_eq!(record.to_string().parse(), Ok(record));
    }

    #[test]
    fn only_files_that_are_not_the_servers_own_are_in_the_way() {
        let place = tempfile::tempdir().unwrap();
        let (data, location) = (place.path().join("data"), place.path().join("space"));
        fs::create_dir_all(data.join("pg_tblspc")).unwrap();
        let space = NewTablespace {
            oid: 16_390,
            location: location.as_os_str().as_bytes().to_vec(),
            start: Lsn(7),
        };
        let in_place = NewTablespace { location: Vec::new(), ..space.clone() };
        let look = |space: &NewTablespace| occupied(&data, space, "PG_15_202209061");
        assert_eq!(look(&space), None, "nothing is there");
        let versioned = location.join("PG_15_202209061");
        fs::create_dir_all(&versioned).unwrap();
        assert_eq!(look(&space), None, "an empty directory loses nothing");
        fs::create_dir_all(versioned.join("5")).unwrap();
        assert_eq!(look(&space), Some(versioned));
        assert_eq!(occupied(&data, &space, "PG_16_202307071"), None, "another version's stay");
        assert_eq!(look(&in_place), None);
        std::os::unix::fs::symlink(&location, data.join("pg_tblspc/16390")).unwrap();
        assert_eq!(look(&space), None, "the server's own, made when it replayed this before");
        let said = refusal(&space, Path::new("/x"));
        assert!(said.hint.contains("--to 0/7 --before"), "{}", said.hint);
    }
}
