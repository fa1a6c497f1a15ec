//! Proofs: signed statements that a restore of a backup worked. Stored as they are; what they say is not judged here.

use bytes::Bytes;
use proto::failure::chain;
use proto::{BackupId, LineageId};

use crate::error::Error;
use crate::layout;
use crate::limits::{PROOF_BYTES_MAX, PROOFS_MAX};
use crate::record::Outcome;
use crate::repository::Repository;
use crate::store::{PutOutcome, StoreError};

/// One stored proof.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredProof {
    /// Its number, from 1.
    pub number: u32,
    /// The bytes as they were given, with their signature.
    pub bytes: Bytes,
}

impl Repository {
    /// Stores a proof of a committed backup under the next free number. The same bytes are stored once: idempotent by
    /// content.
    pub async fn add_proof(
        &self,
        lineage: LineageId,
        backup: BackupId,
        bytes: Bytes,
    ) -> Result<u32, Error> {
        if bytes.len() as u64 > PROOF_BYTES_MAX {
            return Err(Error::Limit {
                reason: format!("a proof of {} bytes is too large", bytes.len()),
            });
        }
        let verdict = self.verdict(lineage, backup.into()).await?;
        if !verdict.is_some_and(|verdict| matches!(verdict.outcome, Outcome::Commit { .. })) {
            return Err(Error::BackupUnknown { lineage, backup });
        }
        // What was deleted meanwhile must not look proved.
        self.store
            .size(&layout::of_backup(lineage, backup, "manifest"))
            .await
            .map_err(Error::needed)?;
        let stored = self.list_proofs(lineage, backup).await?;
        if let Some(same) = stored.iter().find(|proof| proof.bytes == bytes) {
            return Ok(same.number);
        }
        let next = stored.last().map_or(1, |proof| proof.number + 1);
        for number in next..=PROOFS_MAX {
            let key = layout::of_backup(lineage, backup, &format!("proof.{number}"));
            if self.store.put_if_absent(&key, bytes.clone()).await? == PutOutcome::Created {
                return Ok(number);
            }
        }
        Err(Error::Limit { reason: format!("backup {backup} has {PROOFS_MAX} proofs") })
    }

    /// Every proof of a backup that can be read, in the order of their numbers.
    pub async fn list_proofs(
        &self,
        lineage: LineageId,
        backup: BackupId,
    ) -> Result<Vec<StoredProof>, Error> {
        let prefix = layout::of_backup(lineage, backup, "proof.");
        let mut proofs = Vec::new();
        for object in self.store.list(&prefix).await? {
            let Some(number) =
                object.key.strip_prefix(&prefix).and_then(|number| number.parse().ok())
            else {
                continue;
            };
            match self.store.get(&object.key, PROOF_BYTES_MAX).await {
                Ok(bytes) => proofs.push(StoredProof { number, bytes }),
                // Deleted with its backup since it was listed.
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => {
                    let error = self.of_one_object(error.into()).await?;
                    tracing::warn!("{} says nothing: failed to {}", object.key, chain(&error));
                }
            }
        }
        proofs.sort_by_key(|proof| proof.number);
        Ok(proofs)
    }
}
