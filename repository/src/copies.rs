//! Word of copies: which backups of a lineage are whole in another place, as a copy found it there last. One note for each place,
//! written by whoever copied into the repository that was copied from. Nothing rests on it.

use std::collections::BTreeMap;

use proto::copies::{CopiedBackup, Copies};
use proto::failure::chain;
use proto::{BackupId, LineageId};

use crate::copy::{CopyOptions, CopyOutcome, Mirror};
use crate::error::Error;
use crate::lineage::has;
use crate::record::Intent;
use crate::repository::Repository;
use crate::{layout, note};

/// Backups of which one note tells, the newest: a note is small.
const TOLD_MAX: usize = 4_096;

/// Places of which a lineage's notes tell: it is sent around with what else is known of a cluster.
const PLACES_MAX: usize = 16;
/// The longest name of a place, and of who copied there, for the same reason.
const NAME_BYTES_MAX: usize = 1_024;

fn is_short(copies: &Copies) -> bool {
    copies.place.len() <= NAME_BYTES_MAX && copies.by.len() <= NAME_BYTES_MAX
}

/// What a copy found of one backup.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Found {
    pub(crate) outcome: CopyOutcome,
    /// Before it was looked.
    pub(crate) at_ms: i64,
}

impl Repository {
    /// Where copies of a lineage's backups are, as far as somebody left word. What cannot be read is told in the log.
    pub async fn copies(&self, lineage: LineageId) -> Result<Vec<Copies>, Error> {
        let mut found = Vec::new();
        for object in self.store.list(&layout::copies(lineage)).await?.iter().take(PLACES_MAX) {
            match self.read_note::<Copies>(&object.key).await {
                Ok(copies) => found.extend(copies.filter(is_short)),
                Err(error) => {
                    let error = self.of_one_object(error).await?;
                    tracing::warn!("{} says nothing: failed to {}", object.key, chain(&error));
                }
            }
        }
        Ok(found)
    }
}

impl Mirror {
    /// Leaves word in the source of what was copied since this was done last: what is whole in the mirror, and that what was given up
    /// there is not there any more. For people; the copies are none the worse when it fails.
    pub async fn leave_word(&mut self, options: &CopyOptions) -> Result<(), Error> {
        while let Some((lineage, found)) = self.untold.first_key_value() {
            self.leave_word_of(*lineage, found, options).await?;
            self.untold.pop_first();
        }
        Ok(())
    }

    async fn leave_word_of(
        &self,
        lineage: LineageId,
        found: &BTreeMap<BackupId, Found>,
        options: &CopyOptions,
    ) -> Result<(), Error> {
        self.source.check_writable()?;
        let (place, repository) = (self.target.describe(), self.target.id());
        let key = layout::copies_in(lineage, &place);
        let former = match self.source.read_note::<Copies>(&key).await {
            // It is written anew.
            Err(Error::Damaged { .. }) => None,
            former => former?,
        };
        let is_first = former.is_none();
        // Another repository may have come to that place, and knows nothing of what the one before had.
        let former = former.filter(|former| former.repository == repository);
        let former = former.into_iter().flat_map(|former| former.backups);
        let mut told: BTreeMap<BackupId, CopiedBackup> =
            former.map(|copied| (copied.backup, copied)).collect();
        // What a collector deleted is nobody's to ask for. What was lost is what its copy is for.
        let there = self.source.names_of_attempts(lineage).await?;
        told.retain(|backup, _| {
            let names = there.get(&(*backup).into());
            names.is_none_or(|names| has(names, "manifest") || !has(names, "gone"))
        });
        for (&backup, &Found { outcome, at_ms }) in found {
            let known = told.remove(&backup);
            let copied_at_ms = match (outcome, known) {
                (CopyOutcome::GivenUp | CopyOutcome::Aborted, _) => continue,
                (CopyOutcome::Copied, _) => at_ms,
                (CopyOutcome::Present | CopyOutcome::Repaired, Some(known)) => known.copied_at_ms,
                (CopyOutcome::Present | CopyOutcome::Repaired, None) => {
                    self.copied_at(lineage, backup).await?.unwrap_or(at_ms)
                }
            };
            told.insert(backup, CopiedBackup { backup, copied_at_ms, checked_at_ms: at_ms });
        }
        if is_first && told.is_empty() {
            return Ok(());
        }
        let backups: Vec<CopiedBackup> = told.into_values().collect();
        let backups = backups[backups.len().saturating_sub(TOLD_MAX)..].to_vec();
        let copies = Copies { place, repository, by: options.by.clone(), backups };
        let bytes = note::write(&self.source.keys, &key, &copies)?;
        Ok(self.source.store.put(&key, bytes).await?)
    }

    /// When a backup of the mirror was copied there, which an earlier program left no word of.
    async fn copied_at(&self, lineage: LineageId, backup: BackupId) -> Result<Option<i64>, Error> {
        let key = layout::of_backup(lineage, backup, "intent");
        match self.target.read_note::<Intent>(&key).await {
            Ok(intent) => Ok(intent.map(|intent| intent.began_at_ms)),
            Err(Error::Damaged { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
