//! Whose a segment of the archive is. Its name says nothing of that: a clone of a server archives under the same names.
//!
//! Two things tell: the server's own file, as long as it has that, and what it says of its archiving where the file is not at hand.
//! Its word is taken against a segment, and never for one that is not there.

use std::fs::{File, Metadata};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use proto::wal::{SegmentName, WalFileName};
use proto::{Failure, LineageId};
use repository::{Error, Repository, WalDigest};

use crate::context::blocking;

/// Whose content the archive has under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owner {
    /// There is none.
    Nobody,
    /// The server that is followed wrote it.
    Server,
    /// Nothing speaks against the server, and nothing for it.
    Presumed,
    /// Another one did: this is not what the server's own file has.
    Differs(WalDigest),
    /// Another one did, as the server's own was refused.
    Another,
    /// The server has not said yet that it archived it, or it cannot be read.
    Unclear,
}

impl Owner {
    /// Looks at a segment that the server has filled. `pg_wal` is where it keeps its own, if that is at hand; `archived` what it
    /// says that it archived last.
    pub(super) async fn of(
        repository: &Repository,
        lineage: LineageId,
        name: SegmentName,
        pg_wal: Option<&Path>,
        archived: Option<WalFileName>,
    ) -> Result<Self, Failure> {
        let there = match repository.wal_digest(lineage, name).await {
            Ok(Some(there)) => there,
            Ok(None) => return Ok(Self::Nobody),
            Err(Error::Damaged { .. }) => return Ok(Self::Unclear),
            Err(error) => return Err(error.into()),
        };
        let own = match pg_wal.map(|directory| directory.join(name.to_string())) {
            Some(path) => blocking(move || Ok(digest(&path))).await?,
            None => None,
        };
        Ok(match own {
            Some(own) if own == there => Self::Server,
            Some(_) => Self::Differs(there),
            None if archived.is_some_and(|last| has_come_to(last, name)) => Self::Server,
            None if repository.has_wal_conflict(lineage, name).await? => match archived {
                Some(_) => Self::Another,
                // After a crash a server does not remember what it archived.
                None => Self::Unclear,
            },
            None if archived.is_none() => Self::Presumed,
            None => Self::Unclear,
        })
    }

    /// Whether what is there ends the line of what the server wrote.
    pub(super) fn is_in_the_way(self) -> bool {
        self.is_another() || self == Self::Unclear
    }

    /// Whether another server's content is there.
    pub(super) fn is_another(self) -> bool {
        matches!(self, Self::Another | Self::Differs(_))
    }

    /// Whether it still is what was seen to differ from the server's own. Of that the server's word says nothing: it says the same of
    /// a segment that it was made to pass over.
    pub(super) async fn still_differs(
        self,
        repository: &Repository,
        lineage: LineageId,
        name: SegmentName,
    ) -> Result<bool, Failure> {
        let Self::Differs(seen) = self else { return Ok(false) };
        match repository.wal_digest(lineage, name).await {
            Ok(there) => Ok(there == Some(seen)),
            Err(Error::Damaged { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

/// Of the server's own file. `None` when it is not there, also when the server takes it for a later segment meanwhile.
fn digest(path: &Path) -> Option<WalDigest> {
    digest_as(&File::open(path).ok()?, path)
}

/// Of a file that was opened, if it still has its name when it has been read.
fn digest_as(file: &File, path: &Path) -> Option<WalDigest> {
    let which = |file: &Metadata| (file.dev(), file.ino());
    let opened = which(&file.metadata().ok()?);
    let digest = WalDigest::read(file).ok()?;
    let now = std::fs::metadata(path).ok()?;
    (which(&now) == opened).then_some(digest)
}

/// Whether a server that archived `last` last, and has files archived in their order, has archived a segment.
fn has_come_to(last: WalFileName, name: SegmentName) -> bool {
    let last = match last {
        WalFileName::Segment(last)
        | WalFileName::Partial(last)
        | WalFileName::BackupLabel(last, _) => last,
        // Before everything else of its timeline.
        WalFileName::History(timeline) => SegmentName { timeline, high: 0, low: 0 },
    };
    last >= name
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_the_server_took_for_another_segment_meanwhile_says_nothing() {
        let place = tempfile::tempdir().unwrap();
        let (path, later) = (place.path().join("4"), place.path().join("9"));
        std::fs::write(&path, "four").unwrap();
        let opened = || File::open(&path).unwrap();
        let four = WalDigest::read(&b"four"[..]).unwrap();
        assert_eq!(digest_as(&opened(), &path), Some(four));
        let file = opened();
        std::fs::rename(&path, &later).unwrap();
        assert_eq!(digest_as(&file, &path), None);
        assert_eq!(digest(&path), None);
        std::fs::write(&path, "four").unwrap();
        let file = File::open(&later).unwrap();
        assert_eq!(digest_as(&file, &path), None, "it is another file");
        assert_eq!(digest(&path), Some(four));
    }

    #[test]
    fn a_server_says_how_far_it_has_archived() {
        let has =
            |last: &str, name: &str| has_come_to(last.parse().unwrap(), name.parse().unwrap());
        let name = "000000020000000000000006";
        for (last, expected) in [
            ("000000020000000000000006", true),
            ("000000020000000000000007", true),
            ("000000020000000100000000", true),
            ("000000020000000000000006.00000028.backup", true),
            ("000000020000000000000005", false),
            ("00000002.history", false),
            ("000000010000000000000006.partial", false),
            ("000000010000000000000009", false),
            ("00000003.history", true),
        ] {
            assert_eq!(has(last, name), expected, "{last}");
        }
    }
}
