//! The note that stands in a target from the first write to the last: a directory that holds it is not finished.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::Path;

use proto::{BackupId, SystemIdentifier};

use crate::error::Error;
use crate::reader::Backup;

/// Its name.
pub(super) const MARKER: &str = "pgmuster-restore-incomplete";
/// What it is called until it is whole: a crash leaves no half of one under its own name.
pub(super) const MARKER_DRAFT: &str = "pgmuster-restore-incomplete.new";

const OF: &str = "An unfinished restore of backup ";
const FROM: &str = "of the cluster with system identifier ";
/// A marker is a few lines. What is longer is none of ours.
const BYTES_MAX: usize = 4096;

/// Whose restore was not finished.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unfinished {
    /// The backup.
    pub backup: BackupId,
    /// The cluster it is of.
    pub system_identifier: SystemIdentifier,
}

impl Unfinished {
    pub(super) fn of(backup: &Backup) -> Self {
        Self { backup: backup.id(), system_identifier: backup.facts().system_identifier }
    }

    pub(super) fn text(self) -> String {
        let Self { backup, system_identifier } = self;
        format!(
            "{OF}{backup}\n{FROM}{system_identifier}.\n\
             Do not start a server here. Restore again, or delete this directory.\n"
        )
    }

    fn parse(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let backup = lines.next()?.strip_prefix(OF)?.parse().ok()?;
        let system_identifier =
            lines.next()?.strip_prefix(FROM)?.strip_suffix('.')?.parse().ok()?;
        Some(Self { backup, system_identifier })
    }

    /// The marker in a directory: `None` without one, `Some(None)` when nobody knows what it says.
    #[expect(clippy::option_option, reason = "there is none, it says something, it says nothing")]
    pub(super) fn find(directory: &Path) -> Result<Option<Option<Self>>, Error> {
        let path = directory.join(MARKER);
        let failed = |source| Error::Target { path: path.display().to_string(), source };
        match fs::symlink_metadata(&path) {
            Ok(metadata) if !metadata.is_file() => return Ok(Some(None)),
            Ok(_) => {}
            Err(error) if is_missing(&error) => return Ok(None),
            Err(error) => return Err(failed(error)),
        }
        let bytes = fs::read(&path).map_err(failed)?;
        let text = bytes.get(..bytes.len().min(BYTES_MAX)).unwrap_or_default();
        Ok(Some(Self::parse(&String::from_utf8_lossy(text))))
    }

    /// Whose unfinished restore a directory holds, if one.
    pub fn in_directory(directory: &Path) -> Result<Option<Self>, Error> {
        Self::find(directory).map(Option::flatten)
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_marker_says_whose_it_is_and_half_of_one_says_nothing() {
        let marker = Unfinished {
            backup: BackupId::mint(1_700_000_000_000, [7; 10]),
            system_identifier: SystemIdentifier(7_300_000_000_000_000_001),
        };
        let text = marker.text();
        assert_eq!(Unfinished::parse(&text), Some(marker));
        let place = tempfile::tempdir().unwrap();
        assert_eq!(Unfinished::find(place.path()).unwrap(), None);
        for end in 0..text.find(".\n").unwrap() {
            fs::write(place.path().join(MARKER), &text[..end]).unwrap();
            assert_eq!(Unfinished::find(place.path()).unwrap(), Some(None), "{end}");
        }
    }
}
