//! The notes that nothing but a check reads once they are written: intents of what has ended, wishes, proofs, lists of
//! collectors, marks, word of copies.

use proto::copies::Copies;
use proto::envelope::Signed;
use proto::{AttemptId, Proof};

use super::blame;
use super::survey::Survey;
use crate::error::Error;
use crate::layout;
use crate::limits::{CONDEMNED_BYTES_MAX, PROOF_BYTES_MAX};
use crate::note;
use crate::record::{Condemned, Floor, Gone, Intent, Mark, Wish};
use crate::store::StoreError;

impl Survey<'_> {
    /// Reads every note that the inventory had no use for.
    pub(super) async fn notes(&mut self) -> Result<(), Error> {
        for (attempt, names) in &self.found.attempts {
            for (name, size) in names {
                let key = layout::of_attempt(self.lineage, *attempt, name);
                let kind = name.split_once('.').map_or(name.as_str(), |(kind, _)| kind);
                let wrong = match kind {
                    "intent" => match self.note::<Intent>(&key, *size).await? {
                        Ok(Some(intent)) if intent.attempt != *attempt => {
                            Some("it is the intent of another attempt".to_owned())
                        }
                        other => other.err(),
                    },
                    "forget" | "remember" | "hold" | "release" => {
                        self.note::<Wish>(&key, *size).await?.err()
                    }
                    "gone" => self.note::<Gone>(&key, *size).await?.err(),
                    "proof" => self.proof(*attempt, &key, *size).await?,
                    // Verdicts and manifests were read. Checkpoints are needed by nobody.
                    _ => None,
                };
                if let Some(wrong) = wrong {
                    blame(self.faults, key, wrong);
                }
            }
        }
        for (run, names) in &self.found.runs {
            if let Some(size) = names.get("condemned")
                && let Some(wrong) = self.condemned(run, *size).await?
            {
                let what = format!(
                    "{wrong}; no backup is compared with another while it is there: delete it"
                );
                blame(self.faults, layout::of_run(self.lineage, run, "condemned"), what);
            }
        }
        for (place, size) in &self.found.floors {
            let key = layout::wal(self.lineage) + place;
            if let Some(wrong) = self.note::<Floor>(&key, *size).await?.err() {
                blame(self.faults, key, wrong);
            }
        }
        for (name, size) in &self.found.copies {
            let key = layout::copies(self.lineage) + name;
            if let Some(wrong) = self.note::<Copies>(&key, *size).await?.err() {
                let what =
                    format!("{wrong}; it tells people of copies, and the next copy writes it anew");
                blame(self.faults, key, what);
            }
        }
        for pack in &self.found.marks {
            let key = layout::mark(self.lineage, *pack);
            match self.repository.read_note::<Mark>(&key).await {
                Ok(_) => {}
                Err(Error::Damaged { reason, .. }) => blame(self.faults, key, reason),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A proof was signed by somebody who certainly was who it says, and is of this backup. Whether that somebody was a
    /// worker of ours is known to the coordinator alone.
    async fn proof(
        &self,
        attempt: AttemptId,
        key: &str,
        size: u64,
    ) -> Result<Option<String>, Error> {
        if size > PROOF_BYTES_MAX {
            return Ok(Some(format!("it has {size} bytes, more than a proof can have")));
        }
        let bytes = match self.repository.store.get(key, PROOF_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let proof = match serde_json::from_slice::<Signed<Proof>>(&bytes) {
            Ok(signed) => signed.verify_unchanged().map_err(|error| format!("failed to {error}")),
            Err(error) => Err(format!("it is no signed record: {error}")),
        };
        Ok(match proof {
            Ok(proof) if proof.lineage == self.lineage && proof.backup == attempt.into() => None,
            Ok(_) => Some("it is the proof of another backup".to_owned()),
            Err(why) => Some(why),
        })
    }

    async fn condemned(&self, run: &str, size: u64) -> Result<Option<String>, Error> {
        let key = layout::of_run(self.lineage, run, "condemned");
        if size > CONDEMNED_BYTES_MAX {
            return Ok(Some(format!("it has {size} bytes, more than a list can have")));
        }
        let bytes = match self.repository.store.get(&key, CONDEMNED_BYTES_MAX).await {
            Ok(bytes) => bytes,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        match note::read::<Condemned>(&self.repository.keys, &key, &bytes) {
            Ok(_) => Ok(None),
            Err(Error::Damaged { reason, .. }) => Ok(Some(reason)),
            Err(error) => Err(error),
        }
    }
}
