//! Lineages and what is in them: finding, minting, listing.

use std::collections::BTreeMap;

use futures::{StreamExt, stream};
use proto::failure::chain;
use proto::{AttemptId, BackupId, BackupKind, ClusterName, LineageId, SystemIdentifier};

use crate::again::again;
use crate::error::Error;
use crate::layout;
use crate::limits::NOTE_BYTES_MAX;
use crate::manifest::Counts;
use crate::note;
use crate::record::{Identity, Intent, Outcome, Verdict};
use crate::repository::Repository;
use crate::store::{Listed, PutOutcome, StoreError};
use crate::wishes;

/// Attempts whose notes are read at the same time: a lineage of years has thousands, each a round trip or two away.
pub(crate) const NOTES_IN_FLIGHT: usize = 16;

/// What is known of one attempt from its small objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttemptSummary {
    /// The attempt.
    pub attempt: AttemptId,
    /// Its intent, while it is open: nobody needs it afterwards.
    pub intent: Option<Intent>,
    /// Its end; `None` while it is open.
    pub verdict: Option<Verdict>,
    /// Somebody wants it gone and nobody took that back: a collector may delete it.
    pub forgotten: bool,
    /// What the names of those wishes end with: see [`crate::wishes`].
    pub(crate) forgets: Vec<String>,
    /// Somebody wants it kept.
    pub held: bool,
    /// Number of proofs.
    pub proofs: u32,
    /// Its manifest is there. A backup that was deleted has none.
    pub has_manifest: bool,
}

/// An attempt by the names of its objects, and what these say if they can be read.
pub(crate) struct Seen {
    pub(crate) attempt: AttemptId,
    pub(crate) names: Vec<String>,
    pub(crate) summary: Result<AttemptSummary, Error>,
}

/// Who has backups here.
#[derive(Debug, Default)]
pub struct Lineages {
    /// Every lineage whose identity can be read, by id.
    pub readable: Vec<Identity>,
    /// The others, and why: nobody knows whose they are.
    pub unreadable: Vec<(LineageId, Error)>,
}

/// The backups of a lineage.
#[derive(Debug, Default)]
pub struct Backups {
    /// Oldest first: those with a COMMIT that can be read and a manifest.
    pub readable: Vec<AttemptSummary>,
    /// What was a backup, or may have been, and is none that can be read, by id. What was given up is not here.
    pub lost: Vec<Lost>,
}

/// A backup that cannot be read.
#[derive(Debug)]
pub struct Lost {
    /// Which.
    pub backup: BackupId,
    /// What is wrong with its verdict, or which object is not there.
    pub why: Error,
}

impl AttemptSummary {
    /// Its name as a backup, if it is one.
    pub fn backup(&self) -> Option<BackupId> {
        match self.verdict.as_ref()?.outcome {
            Outcome::Commit { .. } => Some(self.attempt.into()),
            Outcome::Abort { .. } => None,
        }
    }

    /// How much it is, if it is a backup.
    pub fn counts(&self) -> Option<&Counts> {
        match &self.verdict.as_ref()?.outcome {
            Outcome::Commit { counts, .. } => Some(counts),
            Outcome::Abort { .. } => None,
        }
    }

    /// When it was committed, Unix milliseconds.
    pub fn committed_at_ms(&self) -> Option<i64> {
        self.backup().and(self.verdict.as_ref()).map(|verdict| verdict.at_ms)
    }
}

/// Whether an attempt has an object of this name, or a numbered one.
pub(crate) fn has(names: &[String], wanted: &str) -> bool {
    names.iter().any(|name| {
        name == wanted || name.strip_prefix(wanted).is_some_and(|rest| rest.starts_with('.'))
    })
}

pub(crate) fn backups(mut attempts: Vec<AttemptSummary>) -> Vec<AttemptSummary> {
    attempts.retain(|attempt| attempt.backup().is_some() && attempt.has_manifest);
    let order_ms = |attempt: &AttemptSummary| attempt.verdict.as_ref().map(Verdict::order_ms);
    attempts.sort_by_key(|attempt| (order_ms(attempt), attempt.attempt));
    attempts
}

impl Repository {
    /// The lineage of a cluster's physical backups, minted when this is the first contact. Idempotent by (cluster, system
    /// identifier); workers that mint at the same time get the same one. `now_ms` is stored in a new identity.
    pub async fn find_or_mint_lineage(
        &self,
        cluster: &ClusterName,
        system_identifier: SystemIdentifier,
        now_ms: i64,
    ) -> Result<Identity, Error> {
        self.find_or_mint_lineage_of(BackupKind::Physical, cluster, system_identifier, now_ms).await
    }

    /// The same for either kind: each has lineages of its own, so that nothing that is said of one lineage (what is compared
    /// with, what is the newest, what is kept) ever mixes the two.
    pub async fn find_or_mint_lineage_of(
        &self,
        kind: BackupKind,
        cluster: &ClusterName,
        system_identifier: SystemIdentifier,
        now_ms: i64,
    ) -> Result<Identity, Error> {
        if let Some(newest) = self.lineages_of(kind, cluster, system_identifier).await?.pop() {
            return Ok(newest);
        }
        let _minting = self.minting.lock().await;
        match self.lineages_of(kind, cluster, system_identifier).await?.pop() {
            Some(newest) => Ok(newest),
            None => self.mint(kind, cluster, system_identifier, 0, now_ms).await,
        }
    }

    /// The lineages of either kind of backups of a cluster with this system identifier, the newest last. Their ids follow from
    /// that, so nobody else's identity is read.
    pub async fn lineages_of(
        &self,
        kind: BackupKind,
        cluster: &ClusterName,
        system_identifier: SystemIdentifier,
    ) -> Result<Vec<Identity>, Error> {
        let mut all = Vec::new();
        // Generations are minted one after the other, so the first gap ends the search.
        for generation in 0..u32::MAX {
            let id = system_identifier.0;
            let lineage = self.keys.lineage_id(kind, cluster.as_str(), id, generation);
            match self.identity(lineage).await {
                Ok(identity) => all.push(identity),
                Err(Error::LineageUnknown { .. }) => break,
                Err(error) => return Err(error),
            }
        }
        Ok(all)
    }

    /// A new lineage for a cluster that has one, of the same name and system identifier.
    pub async fn mint_next_lineage(
        &self,
        previous: &Identity,
        now_ms: i64,
    ) -> Result<Identity, Error> {
        let Identity { kind, cluster, system_identifier, generation, .. } = previous;
        self.mint(*kind, cluster, *system_identifier, generation + 1, now_ms).await
    }

    async fn mint(
        &self,
        kind: BackupKind,
        cluster: &ClusterName,
        system_identifier: SystemIdentifier,
        generation: u32,
        now_ms: i64,
    ) -> Result<Identity, Error> {
        let lineage = self.keys.lineage_id(kind, cluster.as_str(), system_identifier.0, generation);
        let identity = Identity {
            lineage,
            cluster: cluster.clone(),
            system_identifier,
            generation,
            kind,
            created_at_ms: now_ms,
        };
        let key = layout::identity(lineage);
        let bytes = note::write(&self.keys, &key, &identity)?;
        match self.store.put_if_absent(&key, bytes).await? {
            PutOutcome::Created => Ok(identity),
            PutOutcome::Exists => self.identity(lineage).await,
        }
    }

    /// Who a lineage is.
    pub async fn identity(&self, lineage: LineageId) -> Result<Identity, Error> {
        let key = layout::identity(lineage);
        match self.read_note(&key).await? {
            Some(identity) => Ok(identity),
            None => Err(Error::LineageUnknown { lineage }),
        }
    }

    /// Every lineage. A directory without an identity is none; one whose identity cannot be read hides no other.
    pub async fn find_lineages(&self) -> Result<Lineages, Error> {
        let mut found = Lineages::default();
        for lineage in self.lineage_directories().await? {
            match self.identity(lineage).await {
                Ok(identity) => found.readable.push(identity),
                Err(Error::LineageUnknown { .. }) => {}
                Err(error) => {
                    found.unreadable.push((lineage, self.of_one_object(error).await?));
                }
            }
        }
        Ok(found)
    }

    /// The same without those that cannot be read, which are told in the log.
    pub async fn list_lineages(&self) -> Result<Vec<Identity>, Error> {
        let Lineages { readable, unreadable } = self.find_lineages().await?;
        for (lineage, why) in unreadable {
            tracing::warn!("Lineage {lineage} is left out: failed to {}", chain(&why));
        }
        Ok(readable)
    }

    async fn lineage_directories(&self) -> Result<Vec<LineageId>, Error> {
        let names = self.store.list_directories(layout::LINEAGES).await?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Where an attempt is. Nothing is read but names, so nothing that is damaged hides it.
    pub async fn lineage_of(&self, attempt: AttemptId) -> Result<Option<LineageId>, Error> {
        self.lineage_with(attempt, |names| !names.is_empty()).await
    }

    /// The same of a backup that was not deleted.
    pub async fn lineage_of_backup(&self, backup: BackupId) -> Result<Option<LineageId>, Error> {
        let is_there = |names: &[String]| has(names, "verdict") && has(names, "manifest");
        self.lineage_with(backup.into(), is_there).await
    }

    async fn lineage_with(
        &self,
        attempt: AttemptId,
        is_there: impl Fn(&[String]) -> bool,
    ) -> Result<Option<LineageId>, Error> {
        for lineage in self.lineage_directories().await? {
            if is_there(&self.names_of(lineage, attempt).await?) {
                return Ok(Some(lineage));
            }
        }
        Ok(None)
    }

    /// An error of one object, while the store answers for others. That it answers for none is passed on.
    pub(crate) async fn of_one_object(&self, error: Error) -> Result<Error, Error> {
        match &error {
            Error::Store(_) if self.store.size(layout::CONFIG).await.is_err() => Err(error),
            _ => Ok(error),
        }
    }

    /// Every attempt of a lineage, oldest first: backups, aborted and open ones. One that cannot be read fails the list.
    pub async fn list_attempts(&self, lineage: LineageId) -> Result<Vec<AttemptSummary>, Error> {
        self.look(lineage).await?.into_iter().map(|seen| seen.summary).collect()
    }

    /// The same with those that cannot be read.
    pub(crate) async fn look(&self, lineage: LineageId) -> Result<Vec<Seen>, Error> {
        let names = self.names_of_attempts(lineage).await?;
        let seen = names.into_iter().map(|(attempt, names)| async move {
            let summary = self.summarise(lineage, attempt, &names).await;
            Seen { attempt, names, summary }
        });
        Ok(stream::iter(seen).buffered(NOTES_IN_FLIGHT).collect().await)
    }

    /// The last names of the objects of one attempt.
    pub(crate) async fn names_of(
        &self,
        lineage: LineageId,
        attempt: AttemptId,
    ) -> Result<Vec<String>, Error> {
        let prefix = layout::of_attempt(lineage, attempt, "");
        let objects = self.store.list(&prefix).await?;
        let name = |object: Listed| object.key.strip_prefix(&prefix).map(str::to_owned);
        Ok(objects.into_iter().filter_map(name).collect())
    }

    /// The objects of every attempt, by their last names.
    pub(crate) async fn names_of_attempts(
        &self,
        lineage: LineageId,
    ) -> Result<BTreeMap<AttemptId, Vec<String>>, Error> {
        let prefix = layout::backups(lineage);
        let mut names: BTreeMap<AttemptId, Vec<String>> = BTreeMap::new();
        for object in self.store.list(&prefix).await? {
            let Some((attempt, name)) =
                object.key.strip_prefix(&prefix).and_then(|rest| rest.split_once('/'))
            else {
                continue;
            };
            let Ok(attempt) = attempt.parse() else { continue };
            names.entry(attempt).or_default().push(name.to_owned());
        }
        Ok(names)
    }

    async fn summarise(
        &self,
        lineage: LineageId,
        attempt: AttemptId,
        names: &[String],
    ) -> Result<AttemptSummary, Error> {
        let has = |wanted: &str| has(names, wanted);
        let forgets: Vec<String> = wishes::forgets(names).map(str::to_owned).collect();
        let proofs = names.iter().filter(|name| name.starts_with("proof.")).count();
        let verdict = if has("verdict") { self.verdict(lineage, attempt).await? } else { None };
        let intent = if verdict.is_none() && has("intent") {
            self.read_note(&layout::of_attempt(lineage, attempt, "intent")).await?
        } else {
            None
        };
        Ok(AttemptSummary {
            attempt,
            intent,
            verdict,
            forgotten: !forgets.is_empty(),
            forgets,
            held: wishes::is_held(names),
            proofs: u32::try_from(proofs).unwrap_or(u32::MAX),
            has_manifest: has("manifest"),
        })
    }

    /// The backups of a lineage, oldest first: attempts with a COMMIT verdict and a manifest. One whose verdict cannot be
    /// read fails the list.
    pub async fn list_backups(&self, lineage: LineageId) -> Result<Vec<AttemptSummary>, Error> {
        Ok(backups(self.list_attempts(lineage).await?))
    }

    /// The same where an object that cannot be read stands in the way of no other: for whoever looks for one to restore.
    pub async fn find_backups(&self, lineage: LineageId) -> Result<Backups, Error> {
        let seen = self.look(lineage).await?.into_iter().map(|seen| self.found(lineage, seen));
        // Collected first: a stream of borrowing futures is not general enough for a spawned caller.
        let seen: Vec<_> = seen.collect();
        let mut found = stream::iter(seen).buffered(NOTES_IN_FLIGHT);
        let (mut readable, mut lost) = (Vec::new(), Vec::new());
        while let Some(found) = found.next().await {
            match found? {
                Some(Ok(summary)) => readable.push(summary),
                Some(Err(one)) => lost.push(one),
                None => {}
            }
        }
        Ok(Backups { readable: backups(readable), lost })
    }

    /// The backups of a lineage that are there and that nobody gave up, oldest first, for whoever knows which were committed: by the
    /// names of what is there, in one listing. An attempt that was aborted at its end is among them, and one that cannot be read.
    pub async fn held_by_name(&self, lineage: LineageId) -> Result<Vec<BackupId>, Error> {
        let mut held = Vec::new();
        for (attempt, names) in self.names_of_attempts(lineage).await? {
            if !(has(&names, "verdict") && has(&names, "manifest")) {
                continue;
            }
            let backup = attempt.into();
            // Only wishes are read.
            let ends: Vec<String> = wishes::forgets(&names).map(str::to_owned).collect();
            if self.forgotten_by(lineage, backup, &ends).await?.is_none() {
                held.push(backup);
            }
        }
        Ok(held)
    }

    /// An attempt that can be read, or a backup that is lost; `None` of one that was deleted, as every one is in the end.
    async fn found(
        &self,
        lineage: LineageId,
        Seen { attempt, names, summary }: Seen,
    ) -> Result<Option<Result<AttemptSummary, Lost>>, Error> {
        let backup = attempt.into();
        let why = match summary {
            Ok(summary) if summary.backup().is_none() || summary.has_manifest => {
                return Ok(Some(Ok(summary)));
            }
            Ok(_) => Error::Missing { key: layout::of_attempt(lineage, attempt, "manifest") },
            Err(error) => self.of_one_object(error).await?,
        };
        // One without a verdict is no backup yet.
        let is_lost = has(&names, "verdict")
            && !matches!(self.may_be_deleted(lineage, backup, &names).await, Ok(true));
        Ok(is_lost.then_some(Err(Lost { backup, why })))
    }

    /// The same without those that cannot be read, which are told in the log.
    pub async fn list_readable_backups(
        &self,
        lineage: LineageId,
    ) -> Result<Vec<AttemptSummary>, Error> {
        let Backups { readable, lost } = self.find_backups(lineage).await?;
        for Lost { backup, why } in lost {
            tracing::warn!("Backup {backup} is left out: failed to {}", chain(&why));
        }
        Ok(readable)
    }

    /// The end of an attempt, if it has one.
    pub async fn verdict(
        &self,
        lineage: LineageId,
        attempt: AttemptId,
    ) -> Result<Option<Verdict>, Error> {
        let key = layout::of_attempt(lineage, attempt, "verdict");
        let verdict: Option<Verdict> = self.read_note(&key).await?;
        match verdict {
            Some(verdict) if verdict.attempt != attempt => {
                Err(Error::damaged(key, "it is the verdict of another attempt"))
            }
            verdict => Ok(verdict),
        }
    }

    /// A note, or `None` when there is no such object.
    pub(crate) async fn read_note<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
    ) -> Result<Option<T>, Error> {
        again(|| async {
            match self.store.get(key, NOTE_BYTES_MAX).await {
                Ok(bytes) => note::read(&self.keys, key, &bytes).map(Some),
                Err(StoreError::NotFound { .. }) => Ok(None),
                Err(error) => Err(error.into()),
            }
        })
        .await
    }
}
