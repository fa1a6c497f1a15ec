//! Which backups of a cluster its repository has, as a worker saw it.

use serde::{Deserialize, Serialize};

use crate::copies::Copies;
use crate::{BackupId, ClusterName, SystemIdentifier};

/// The backups that are there. One that was recorded before and is not among them is gone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    /// Whose.
    pub cluster: ClusterName,
    /// Where they are, as the outcome of each backup names it.
    pub repository: String,
    /// Of which server.
    pub system_identifier: SystemIdentifier,
    /// Before it was looked; worker's clock, Unix milliseconds.
    pub at_ms: i64,
    /// Backups that are committed and that nobody gave up.
    pub backups: Vec<BackupId>,
    /// Nothing is said of backups whose id is lower: there are more than are told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<BackupId>,
    /// Copies of them in other places, as far as their repository knows; absent from programs that do not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copies: Option<Vec<Copies>>,
}

impl Holdings {
    /// Backups that are told of one cluster.
    pub const BACKUPS_MAX: usize = 1_000;

    /// Of these backups as many as are told, the newest.
    pub fn new(
        cluster: ClusterName,
        repository: String,
        system_identifier: SystemIdentifier,
        at_ms: i64,
        mut backups: Vec<BackupId>,
    ) -> Self {
        backups.sort_unstable();
        let too_many = backups.len().saturating_sub(Self::BACKUPS_MAX);
        backups.drain(..too_many);
        let from = backups.first().copied().filter(|_| too_many > 0);
        Self { cluster, repository, system_identifier, at_ms, backups, from, copies: None }
    }

    /// The same with those of these copies that are of a backup which is told.
    #[must_use]
    pub fn with_copies(mut self, mut copies: Vec<Copies>) -> Self {
        for place in &mut copies {
            place.backups.retain(|copied| self.backups.binary_search(&copied.backup).is_ok());
        }
        copies.retain(|place| !place.backups.is_empty());
        self.copies = Some(copies);
        self
    }

    /// How much is told, in backups.
    pub fn told(&self) -> usize {
        let copied = self.copies.iter().flatten().map(|place| place.backups.len());
        self.backups.len() + copied.sum::<usize>()
    }

    /// Whether a backup that was there before is gone.
    pub fn lack(&self, backup: BackupId) -> bool {
        self.from.is_none_or(|from| backup >= from) && !self.backups.contains(&backup)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::RepositoryId;
    use crate::copies::CopiedBackup;

    #[test]
    fn of_too_many_backups_the_oldest_are_left_in_peace() {
        let id = |n: usize| BackupId::mint(u64::try_from(n).unwrap(), [1; 10]);
        let of = |n: usize| {
            let there = (1..=n).rev().map(id).collect();
            let repository = "file:///backups".to_owned();
            Holdings::new("orders".parse().unwrap(), repository, SystemIdentifier(1), 1, there)
        };
        let few = of(10);
        assert!(few.lack(id(0)) && few.lack(id(11)) && !few.lack(id(1)) && !few.lack(id(10)));
        let many = of(Holdings::BACKUPS_MAX + 5);
        assert_eq!(many.backups.len(), Holdings::BACKUPS_MAX);
        assert!(!many.lack(id(1)) && !many.lack(id(5)) && !many.lack(id(6)));
        assert!(many.lack(id(Holdings::BACKUPS_MAX + 6)));
    }

    #[test]
    fn copies_are_told_of_the_backups_that_are() {
        let id = |n: u64| BackupId::mint(n, [1; 10]);
        let copied = |n| CopiedBackup { backup: id(n), copied_at_ms: 1, checked_at_ms: 2 };
        let copies = |place: &str, of: &[u64]| Copies {
            place: place.to_owned(),
            repository: RepositoryId::mint(1, [2; 10]),
            by: "ops@desk".to_owned(),
            backups: of.iter().copied().map(copied).collect(),
        };
        let repository = "file:///backups".to_owned();
        let there = vec![id(2), id(3)];
        let of =
            Holdings::new("orders".parse().unwrap(), repository, SystemIdentifier(1), 1, there);
        assert_eq!((of.told(), &of.copies), (2, &None));
        let of = of.with_copies(vec![copies("s3://a", &[1, 2, 3, 4]), copies("s3://b", &[1])]);
        assert_eq!((of.told(), of.copies), (4, Some(vec![copies("s3://a", &[2, 3])])));
    }
}
