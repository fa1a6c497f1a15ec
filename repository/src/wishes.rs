//! What people and retention wish for a backup: that it goes (`forget`), that it stays (`hold`).
//!
//! A wish is an object beside the backup; what follows from it is the collector's affair. The two exclude each other:
//! each is written first and looks for the other afterwards, so of two at the same time at most one stands.

use proto::envelope::Signed;
use proto::{BackupId, LineageId, Proof};

use crate::error::Error;
use crate::layout;
use crate::lineage::AttemptSummary;
use crate::note;
use crate::record::Wish;
use crate::repository::Repository;
use crate::store::PutOutcome;

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
        self.store.put_if_absent(&key, note::write(&self.keys, &key, wish)?).await?;
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
        if !backups.iter().any(|other| other.backup() == Some(backup)) {
            return Err(Error::BackupUnknown { lineage, backup });
        }
        let key = layout::of_backup(lineage, backup, HOLD);
        let put = self.store.put_if_absent(&key, note::write(&self.keys, &key, wish)?).await?;
        if self.has(&layout::of_backup(lineage, backup, FORGET)).await? {
            if put == PutOutcome::Created {
                self.store.delete(&key).await?;
            }
            let reason = "it is forgotten".to_owned();
            return Err(Error::Wanted { what: HOLD, backup, reason });
        }
        Ok(())
    }

    /// Ends a hold. Idempotent.
    pub async fn release(&self, lineage: LineageId, backup: BackupId) -> Result<(), Error> {
        self.check_writable()?;
        Ok(self.store.delete(&layout::of_backup(lineage, backup, HOLD)).await?)
    }

    /// Who wanted a backup gone, when and why; `None` when nobody did, or when whoever did had not the key.
    pub(crate) async fn forgotten_by(
        &self,
        lineage: LineageId,
        backup: BackupId,
    ) -> Result<Option<Wish>, Error> {
        let key = layout::of_backup(lineage, backup, FORGET);
        match self.read_note(&key).await {
            Err(Error::Damaged { key, reason }) => {
                tracing::warn!("{key} counts for nothing: {reason}");
                Ok(None)
            }
            other => other,
        }
    }

    /// The newest of these backups whose last proof passed. Whose signature a proof has is not looked at: a forged one
    /// can be kept from nobody who may write here.
    pub(crate) async fn newest_proved(
        &self,
        lineage: LineageId,
        backups: &[AttemptSummary],
    ) -> Result<Option<BackupId>, Error> {
        for summary in backups.iter().rev().filter(|summary| summary.proofs > 0) {
            let Some(backup) = summary.backup() else { continue };
            let proofs = self.list_proofs(lineage, backup).await?;
            let passed = proofs.last().is_some_and(|proof| {
                serde_json::from_slice::<Signed<Proof>>(&proof.bytes)
                    .is_ok_and(|proof| proof.unverified().is_ok_and(|proof| proof.passed))
            });
            if passed {
                return Ok(Some(backup));
            }
        }
        Ok(None)
    }

    async fn has(&self, key: &str) -> Result<bool, Error> {
        match self.store.size(key).await {
            Ok(_) => Ok(true),
            Err(crate::store::StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}
