//! What people and retention wish for a backup: that it goes (`forget`), that it stays (`hold`).
//!
//! A wish is an object beside the backup; what follows from it is the collector's affair. The two exclude each other:
//! each is written first and looks for the other afterwards, so of two at the same time at most one stands.

use proto::envelope::Signed;
use proto::failure::chain;
use proto::proof::CheckOutcome;
use proto::{BackupId, LineageId, Proof, ProofLevel};

use crate::error::Error;
use crate::layout;
use crate::lineage::AttemptSummary;
use crate::note;
use crate::record::Wish;
use crate::repository::Repository;
use crate::store::{PutOutcome, StoreError};

const FORGET: &str = "forget";
const HOLD: &str = "hold";

impl Repository {
    /// Gives a backup up: it is nobody's predecessor any more, and a collector may delete it. Refused for the newest
    /// backup, the newest proved one, and one that is held. Idempotent: the first wish stands.
    pub async fn forget(
        &self,
        lineage: LineageId,
        backup: BackupId,
        wish: &Wish,
    ) -> Result<(), Error> {
        let refuse =
            |reason: &str| Err(Error::Wanted { what: FORGET, backup, reason: reason.to_owned() });
        self.check_writable()?;
        let backups = self.list_backups(lineage).await?;
        let Some(summary) = backups.iter().find(|other| other.backup() == Some(backup)) else {
            return Err(Error::BackupUnknown { lineage, backup });
        };
        if summary.held {
            return refuse("it is held");
        }
        if backups.last().and_then(AttemptSummary::backup) == Some(backup) {
            return refuse("it is the newest one");
        }
        if self.newest_proved(lineage, &backups).await? == Some(backup) {
            return refuse("it is the newest one that was proved");
        }
        let key = layout::of_backup(lineage, backup, FORGET);
        let put = self.store.put_if_absent(&key, note::write(&self.keys, &key, wish)?).await?;
        if put == PutOutcome::Exists {
            // Somebody else's, which may be followed already: it is not ours to take back.
            let there: Option<Wish> = self.read_note(&key).await?;
            return if there.is_some() { Ok(()) } else { refuse("ask again") };
        }
        if self.has(&layout::of_backup(lineage, backup, HOLD)).await? {
            self.store.delete(&key).await?;
            return refuse("somebody held it at the same moment");
        }
        Ok(())
    }

    /// Keeps a backup from being forgotten until the hold is released. Refused for one that is forgotten: its packs may be
    /// gone at any moment. Idempotent.
    pub async fn hold(
        &self,
        lineage: LineageId,
        backup: BackupId,
        wish: &Wish,
    ) -> Result<(), Error> {
        self.check_writable()?;
        let backups = self.list_backups(lineage).await?;
        let Some(summary) = backups.iter().find(|other| other.backup() == Some(backup)) else {
            return Err(Error::BackupUnknown { lineage, backup });
        };
        let forgotten =
            || Err(Error::Wanted { what: HOLD, backup, reason: "it is forgotten".to_owned() });
        if summary.forgotten {
            return forgotten();
        }
        let key = layout::of_backup(lineage, backup, HOLD);
        let put = self.store.put_if_absent(&key, note::write(&self.keys, &key, wish)?).await?;
        if self.has(&layout::of_backup(lineage, backup, FORGET)).await? {
            if put == PutOutcome::Created {
                self.store.delete(&key).await?;
            }
            return forgotten();
        }
        Ok(())
    }

    /// Ends a hold. Idempotent.
    pub async fn release(&self, lineage: LineageId, backup: BackupId) -> Result<(), Error> {
        self.check_writable()?;
        Ok(self.store.delete(&layout::of_backup(lineage, backup, HOLD)).await?)
    }

    /// Whether a backup was given up by somebody who has the key.
    pub async fn is_given_up(
        &self,
        lineage: LineageId,
        summary: &AttemptSummary,
    ) -> Result<bool, Error> {
        match summary.backup() {
            Some(backup) if summary.forgotten => {
                Ok(self.forgotten_by(lineage, backup).await?.is_some())
            }
            _ => Ok(false),
        }
    }

    /// Who wanted a backup gone, when and why; `None` when nobody did, or when that cannot be read or believed: a wish that
    /// is in doubt deletes nothing, and stands in nobody's way.
    pub(crate) async fn forgotten_by(
        &self,
        lineage: LineageId,
        backup: BackupId,
    ) -> Result<Option<Wish>, Error> {
        let key = layout::of_backup(lineage, backup, FORGET);
        match self.read_note(&key).await {
            Err(error @ (Error::Damaged { .. } | Error::Store(StoreError::Forbidden { .. }))) => {
                tracing::warn!("{key} counts for nothing: failed to {}", chain(&error));
                Ok(None)
            }
            other => other,
        }
    }

    /// The newest of these backups that was restored and booted, and that no check has found anything wrong with since.
    /// Whose signature a proof has is not looked at: whoever may write here can delete as well.
    pub(crate) async fn newest_proved(
        &self,
        lineage: LineageId,
        backups: &[AttemptSummary],
    ) -> Result<Option<BackupId>, Error> {
        for summary in backups.iter().rev().filter(|summary| summary.proofs > 0) {
            let Some(backup) = summary.backup() else { continue };
            let mut proved = false;
            for stored in self.list_proofs(lineage, backup).await? {
                let proof = serde_json::from_slice::<Signed<Proof>>(&stored.bytes);
                let Some(proof) = proof.ok().and_then(|proof| proof.unverified().ok()) else {
                    continue;
                };
                // One that could not look says nothing against an earlier one.
                if proof.checks.iter().any(|check| check.outcome == CheckOutcome::Failed) {
                    proved = false;
                } else if proof.level_reached >= Some(ProofLevel::L3) {
                    proved = true;
                }
            }
            if proved {
                return Ok(Some(backup));
            }
        }
        Ok(None)
    }

    async fn has(&self, key: &str) -> Result<bool, Error> {
        match self.store.size(key).await {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
