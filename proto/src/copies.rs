//! Copies of backups in another place, as whoever copied them left word. It is as old as it says: what became of them since is known
//! when somebody copies again.

use serde::{Deserialize, Serialize};

use crate::{BackupId, RepositoryId};

/// Copies of one cluster's backups in one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Copies {
    /// Where, without secrets.
    pub place: String,
    /// The repository there.
    pub repository: RepositoryId,
    /// Who copied there last, for people.
    pub by: String,
    /// Which, in the order of their ids.
    pub backups: Vec<CopiedBackup>,
}

/// One of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CopiedBackup {
    /// The backup.
    pub backup: BackupId,
    /// When it was copied, by the clock of whoever did; Unix milliseconds.
    pub copied_at_ms: i64,
    /// When all of it was there last, by the names and sizes of its packs and the bytes of its manifest.
    pub checked_at_ms: i64,
}

/// A copy of one backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupCopy {
    /// Where, without secrets.
    pub place: String,
    /// The repository there.
    pub repository: RepositoryId,
    /// Who copied there last, for people.
    pub by: String,
    /// When it was copied; Unix milliseconds.
    pub copied_at_ms: i64,
    /// When all of it was there last; see [`CopiedBackup`].
    pub checked_at_ms: i64,
    /// The repository whose word this is.
    pub told_by: String,
}

impl Copies {
    /// What this says of each backup, when it is found in a repository.
    pub fn each(&self, told_by: &str) -> impl Iterator<Item = (BackupId, BackupCopy)> {
        self.backups.iter().map(|copied| {
            let copy = BackupCopy {
                place: self.place.clone(),
                repository: self.repository,
                by: self.by.clone(),
                copied_at_ms: copied.copied_at_ms,
                checked_at_ms: copied.checked_at_ms,
                told_by: told_by.to_owned(),
            };
            (copied.backup, copy)
        })
    }
}
