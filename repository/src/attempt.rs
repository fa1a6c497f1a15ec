//! Beginning and ending an attempt. The order of the steps here is what keeps collected garbage and new backups apart;
//! FORMAT.md section "Commit protocol" says why.

use std::collections::HashSet;

use proto::{AttemptId, BackupId, LineageId};

use crate::error::Error;
use crate::layout;
use crate::limits::{CONDEMNED_BYTES_MAX, MANIFEST_BYTES_MAX};
use crate::manifest::Root;
use crate::note;
use crate::pack;
use crate::record::{Condemned, Intent, Outcome, Verdict};
use crate::repository::Repository;
use crate::store::{PutOutcome, StoreError};
use crate::{hex, reader::Backup};

/// An attempt that has begun: its intent is in the repository, and what it may re-use is chosen.
#[derive(Debug)]
pub struct Attempt {
    pub(crate) repository: Repository,
    pub(crate) lineage: LineageId,
    pub(crate) intent: Intent,
    pub(crate) predecessor: Option<Backup>,
}

/// How an attempt that was to be aborted ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Aborted {
    /// It is aborted, now or before.
    Aborted(Verdict),
    /// It was committed before: it is a backup and stays one.
    Committed(Verdict),
}

/// Which of the two lists is read first. Only one order is right; the other exists so that a test can show what it costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Order {
    CondemnedFirst,
    #[cfg(test)]
    PredecessorFirst,
}

impl Repository {
    /// Begins an attempt: writes its intent, reads what is condemned, then chooses the backup to compare with. An
    /// attempt is begun once; a second begin of the same id is refused.
    pub async fn begin(&self, lineage: LineageId, intent: Intent) -> Result<Attempt, Error> {
        self.begin_in_order(lineage, intent, Order::CondemnedFirst).await
    }

    async fn begin_in_order(
        &self,
        lineage: LineageId,
        intent: Intent,
        order: Order,
    ) -> Result<Attempt, Error> {
        self.check_writable()?;
        self.identity(lineage).await?;
        let attempt = intent.attempt;
        let key = layout::of_attempt(lineage, attempt, "intent");
        let bytes = note::write(&self.keys, &key, &intent)?;
        if self.store.put_if_absent(&key, bytes).await? == PutOutcome::Exists {
            return Err(Error::AttemptExists { attempt });
        }
        let predecessor = match order {
            Order::CondemnedFirst => {
                let condemned = self.condemned(lineage).await?;
                let candidates = self.candidates(lineage).await?;
                self.choose_predecessor(lineage, candidates, &condemned).await?
            }
            #[cfg(test)]
            Order::PredecessorFirst => {
                let candidates = self.candidates(lineage).await?;
                let condemned = self.condemned(lineage).await?;
                self.choose_predecessor(lineage, candidates, &condemned).await?
            }
        };
        Ok(Attempt { repository: self.clone(), lineage, intent, predecessor })
    }

    /// The packs on every list that is not done with.
    async fn condemned(&self, lineage: LineageId) -> Result<HashSet<String>, Error> {
        let prefix = layout::condemned(lineage);
        let objects = self.store.list(&prefix).await?;
        let mut packs = HashSet::new();
        for object in &objects {
            let Some(run) = object.key.strip_suffix("/condemned") else { continue };
            let done = format!("{run}/done");
            if objects.iter().any(|other| other.key == done) {
                continue;
            }
            match self.store.get(&object.key, CONDEMNED_BYTES_MAX).await {
                Ok(bytes) => {
                    packs.extend(note::read::<Condemned>(&self.keys, &object.key, &bytes)?.packs)
                }
                // Retired since it was listed: everything on it is deleted, and a predecessor chosen from now on
                // does not need it.
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(packs)
    }

    /// Committed backups that nobody wants gone, newest first.
    async fn candidates(&self, lineage: LineageId) -> Result<Vec<BackupId>, Error> {
        let backups = self.list_backups(lineage).await?;
        let wanted = backups.iter().rev().filter(|backup| !backup.forgotten);
        Ok(wanted.filter_map(crate::lineage::AttemptSummary::backup).collect())
    }

    /// The newest candidate that can be read and none of whose packs is condemned. One that cannot be read costs time,
    /// never a backup: the next older one is taken, or everything is stored anew.
    async fn choose_predecessor(
        &self,
        lineage: LineageId,
        candidates: Vec<BackupId>,
        condemned: &HashSet<String>,
    ) -> Result<Option<Backup>, Error> {
        for candidate in candidates {
            match self.open_backup(lineage, candidate).await {
                Ok(backup) => {
                    let doomed =
                        backup.root.packs.keys().any(|pack| condemned.contains(&pack.to_string()));
                    if !doomed {
                        return Ok(Some(backup));
                    }
                }
                Err(
                    error @ (Error::Missing { .. } | Error::Damaged { .. } | Error::Version { .. }),
                ) => {
                    tracing::warn!(
                        backup.id = %candidate,
                        "Backup {candidate} cannot be compared with: {error}",
                    );
                }
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Ends an attempt that is not to become a backup. Competes with its COMMIT: the first verdict stays.
    pub async fn abort(
        &self,
        lineage: LineageId,
        attempt: AttemptId,
        by: &str,
        why: &str,
        now_ms: i64,
    ) -> Result<Aborted, Error> {
        let outcome = Outcome::Abort { why: why.to_owned() };
        let verdict = Verdict { attempt, outcome, by: by.to_owned(), at_ms: now_ms };
        let stands = self.put_verdict(lineage, verdict).await?;
        Ok(match stands.outcome {
            Outcome::Abort { .. } => Aborted::Aborted(stands),
            Outcome::Commit { .. } => Aborted::Committed(stands),
        })
    }

    /// Puts a verdict and returns the one that stands.
    async fn put_verdict(&self, lineage: LineageId, verdict: Verdict) -> Result<Verdict, Error> {
        let key = layout::of_attempt(lineage, verdict.attempt, "verdict");
        let bytes = note::write(&self.keys, &key, &verdict)?;
        match self.store.put_if_absent(&key, bytes).await? {
            PutOutcome::Created => Ok(verdict),
            PutOutcome::Exists => {
                self.verdict(lineage, verdict.attempt).await?.ok_or(Error::Missing { key })
            }
        }
    }

    /// Stores a manifest and reads it back: what is committed is what the store has.
    pub(crate) async fn put_manifest(&self, root: &Root) -> Result<(u64, String), Error> {
        let (lineage, attempt) = (root.head.lineage, root.head.attempt);
        let key = layout::of_attempt(lineage, attempt, "manifest");
        let bytes = root.seal(&self.keys)?;
        let damaged = |reason| Error::damaged(&key, reason);
        let digest = pack::digest_of(&bytes).ok_or_else(|| damaged("it has no digest"))?;
        let size_bytes = bytes.len() as u64;
        self.store.put(&key, bytes).await?;
        let stored = self.store.get(&key, MANIFEST_BYTES_MAX).await.map_err(Error::needed)?;
        if pack::digest_of(&stored) != Some(digest) || stored.len() as u64 != size_bytes {
            return Err(damaged("it was read back with other bytes than were written"));
        }
        let reopened = Root::open(&self.keys, lineage, attempt.into(), &key, stored.into())?;
        if *reopened != *root {
            return Err(damaged("it was read back with another meaning than was written"));
        }
        Ok((size_bytes, hex::encode(&digest)))
    }

    /// The last step: COMMIT, unless an ABORT was first.
    pub(crate) async fn put_commit(
        &self,
        lineage: LineageId,
        verdict: Verdict,
    ) -> Result<Verdict, Error> {
        let ours = verdict.clone();
        let stands = self.put_verdict(lineage, verdict).await?;
        match stands.outcome {
            Outcome::Abort { why } => {
                Err(Error::CommitRefused { attempt: stands.attempt, by: stands.by, why })
            }
            // A commit that is not ours would mean two writers of one attempt, which its intent rules out.
            Outcome::Commit { .. } if stands.outcome == ours.outcome => Ok(stands),
            Outcome::Commit { .. } => Err(Error::CommitRefused {
                attempt: stands.attempt,
                by: stands.by,
                why: "another writer committed the same attempt".into(),
            }),
        }
    }
}

impl Attempt {
    /// The attempt's id.
    pub fn id(&self) -> AttemptId {
        self.intent.attempt
    }

    /// Its lineage.
    pub fn lineage(&self) -> LineageId {
        self.lineage
    }

    /// The backup it is compared with, and whose bytes it may refer to.
    pub fn predecessor(&self) -> Option<BackupId> {
        self.predecessor.as_ref().map(Backup::id)
    }

    /// What the predecessor says about its source.
    pub fn predecessor_facts(&self) -> Option<&proto::BackupFacts> {
        self.predecessor.as_ref().map(Backup::facts)
    }
}
