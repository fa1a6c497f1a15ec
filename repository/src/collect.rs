//! Collecting garbage: deleting the packs that no wanted backup refers to. The collector's half of the commit protocol
//! (FORMAT.md, section 8); its order of steps is what keeps it away from backups that are being written.
//!
//! Nothing here decides which backups are wanted: `forget` and `hold` say so. Any number of collectors may run, and any
//! of them may die at any point; the next one deletes what it left.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::{AttemptId, BackupId, LineageId};
use tokio_util::sync::CancellationToken;

use crate::attempt::Aborted;
use crate::error::Error;
use crate::limits::CONDEMNED_BYTES_MAX;
use crate::lineage::{AttemptSummary, backups};
use crate::pack::PackId;
use crate::record::Condemned;
use crate::repository::Repository;
use crate::store::{Listed, PutOutcome, StoreError};
use crate::{chance, hex, layout, note};

/// Packs that are deleted at the same time.
const DELETES_IN_FLIGHT: usize = 8;

/// How long a backup is forgotten at least, and an attempt open, in a repository for a single writer: whoever should not
/// have been there is gone by then.
const SINGLE_WRITER_MS: i64 = 72 * 3_600_000;

/// How a collection runs.
#[derive(Debug, Clone)]
pub struct CollectOptions {
    /// Who collects, for people.
    pub by: String,
    /// The collector's clock, Unix milliseconds.
    pub now_ms: i64,
    /// A backup is deleted when it was forgotten this long ago: time for whoever is restoring it, and to think again.
    /// A courtesy; no safety rests on it.
    pub grace_ms: i64,
    /// An attempt that is open for longer is aborted; every other open one postpones the collection. `None` aborts nobody.
    /// A courtesy too.
    pub patience_ms: Option<i64>,
    /// Ends it between two deletions.
    pub cancel: CancellationToken,
}

/// A number of packs and their bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Amount {
    /// Packs.
    pub packs: u64,
    /// Bytes.
    pub bytes: u64,
}

impl Amount {
    pub(crate) fn add(&mut self, bytes: u64) {
        self.packs += 1;
        self.bytes += bytes;
    }
}

/// What becomes of a backup that somebody wanted gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// What only it refers to is deleted.
    Goes,
    /// It was forgotten too short a time ago; it goes from then on, Unix milliseconds.
    GoesAt(i64),
    /// It is held.
    Held,
    /// It is the newest, or the newest that was proved.
    Needed,
    /// The wish was not written by anybody who has the key.
    NotBelieved,
}

/// What a collection would do.
#[derive(Debug)]
pub struct CollectPlan {
    repository: Repository,
    lineage: LineageId,
    roots: Roots,
    /// Packs with their bytes.
    garbage: BTreeMap<PackId, u64>,
    /// What goes.
    pub delete: Amount,
    /// What stays.
    pub keep: Amount,
    /// Every backup that somebody wanted gone and that is there.
    pub forgotten: Vec<(BackupId, Fate)>,
    /// What is being written, and postpones the collection.
    pub open: Vec<Open>,
}

/// An attempt without an end.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Open {
    /// The attempt.
    pub attempt: AttemptId,
    /// Who writes it.
    pub by: String,
    /// When it began by the writer's clock, Unix milliseconds.
    pub began_at_ms: i64,
}

/// How a collection ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Collected {
    /// There was nothing to delete.
    Nothing,
    /// Backups are being written that could need what was to go; nothing was deleted.
    Postponed {
        /// Their attempts.
        open: Vec<Open>,
    },
    /// It was done.
    Done(CollectSummary),
}

/// What a collection did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CollectSummary {
    /// What was deleted.
    pub deleted: Amount,
    /// What was needed again by the time it was looked at for the second time.
    pub spared: Amount,
    /// Attempts that were open for too long and are aborted now.
    pub aborted: Vec<AttemptId>,
}

/// The packs of each backup's manifest, which never changes.
type Roots = HashMap<BackupId, Vec<PackId>>;

/// What wanted backups refer to.
struct Wanted {
    packs: HashSet<PackId>,
    forgotten: Vec<(BackupId, Fate)>,
}

impl Repository {
    /// Looks at what no wanted backup refers to. Touches nothing. Fails when anything cannot be read: what a damaged
    /// manifest refers to is unknown, so nothing is garbage until that backup is forgotten.
    pub async fn plan_collection(
        &self,
        lineage: LineageId,
        options: &CollectOptions,
    ) -> Result<CollectPlan, Error> {
        self.check_deletable()?;
        let options = &self.courtesies(options);
        self.identity(lineage).await?;
        // The packs first: one that is stored later is not in the list, and cannot be taken for garbage.
        let packs = self.list_packs(lineage).await?;
        let mut roots = Roots::new();
        let wanted = self.wanted(lineage, options, &mut roots).await?;
        let mut plan = CollectPlan {
            repository: self.clone(),
            lineage,
            roots,
            garbage: BTreeMap::new(),
            delete: Amount::default(),
            keep: Amount::default(),
            forgotten: wanted.forgotten,
            open: self.open_attempts(lineage, options).await?.0,
        };
        for (pack, bytes) in packs {
            if wanted.packs.contains(&pack) {
                plan.keep.add(bytes);
            } else {
                plan.delete.add(bytes);
                plan.garbage.insert(pack, bytes);
            }
        }
        Ok(plan)
    }

    /// The caller's options, with more time where the store does not keep a collector and a writer apart.
    fn courtesies(&self, options: &CollectOptions) -> CollectOptions {
        let mut options = options.clone();
        if self.is_single_writer() {
            options.grace_ms = options.grace_ms.max(SINGLE_WRITER_MS);
            options.patience_ms = options.patience_ms.map(|ms| ms.max(SINGLE_WRITER_MS));
        }
        options
    }

    /// Every pack in the store, with its bytes. Whatever else lies there is not ours to delete.
    async fn list_packs(&self, lineage: LineageId) -> Result<BTreeMap<PackId, u64>, Error> {
        let pack = |object: &Listed| {
            let id = PackId(hex::decode(object.key.rsplit_once('/')?.1)?);
            (layout::pack(lineage, id) == object.key).then_some((id, object.size_bytes))
        };
        Ok(self.store.list(&layout::packs(lineage)).await?.iter().filter_map(pack).collect())
    }

    async fn wanted(
        &self,
        lineage: LineageId,
        options: &CollectOptions,
        roots: &mut Roots,
    ) -> Result<Wanted, Error> {
        let attempts = self.list_attempts(lineage).await?;
        for gone in attempts.iter().filter(|attempt| !attempt.has_manifest) {
            // A manifest that nobody wanted gone is lost: what it refers to is unknown.
            if let Some(backup) = gone.backup()
                && !self.is_given_up(lineage, gone).await?
            {
                let key = layout::of_backup(lineage, backup, "manifest");
                return Err(Error::Missing { key });
            }
        }
        let backups = backups(attempts);
        let needed = [
            backups.last().and_then(AttemptSummary::backup),
            self.newest_proved(lineage, &backups).await?,
        ];
        let mut wanted = Wanted { packs: HashSet::new(), forgotten: Vec::new() };
        for summary in &backups {
            let Some(backup) = summary.backup() else { continue };
            if summary.forgotten {
                let fate = self.fate(lineage, summary, backup, &needed, options).await?;
                wanted.forgotten.push((backup, fate));
                if fate == Fate::Goes {
                    continue;
                }
            }
            let packs = if let Some(packs) = roots.get(&backup) {
                packs
            } else {
                let opened = self.open_backup(lineage, backup).await?;
                let packs = opened.root.packs.keys().copied().collect();
                roots.entry(backup).or_insert(packs)
            };
            wanted.packs.extend(packs);
        }
        Ok(wanted)
    }

    async fn fate(
        &self,
        lineage: LineageId,
        summary: &AttemptSummary,
        backup: BackupId,
        needed: &[Option<BackupId>],
        options: &CollectOptions,
    ) -> Result<Fate, Error> {
        if summary.held {
            return Ok(Fate::Held);
        }
        if needed.contains(&Some(backup)) {
            return Ok(Fate::Needed);
        }
        Ok(match self.forgotten_by(lineage, backup).await? {
            None => Fate::NotBelieved,
            Some(wish) => match wish.at_ms.saturating_add(options.grace_ms) {
                at_ms if at_ms <= options.now_ms => Fate::Goes,
                at_ms => Fate::GoesAt(at_ms),
            },
        })
    }

    /// Retires lists of collectors that died, once all they name is gone, and removes what retired lists leave.
    /// A list whose packs are not gone stays: its owner may only be slow, and a list retired under it would hide from
    /// writers what it is about to delete.
    async fn tidy(&self, lineage: LineageId) -> Result<(), Error> {
        // Some stores cannot list uploads, and some credentials may not: everything else goes on.
        if let Err(error) = self.end_dead_uploads(lineage).await {
            let error = proto::failure::chain(&error);
            tracing::warn!(error, "Uploads that nobody completes may be left in the store");
        }
        let prefix = layout::condemned(lineage);
        let objects = self.store.list(&prefix).await?;
        let runs: HashSet<&str> = objects
            .iter()
            .filter_map(|object| Some(object.key.strip_prefix(&prefix)?.split_once('/')?.0))
            .collect();
        let has = |key: &str| objects.iter().any(|object| object.key == key);
        let mut packs = None;
        for run in runs {
            let (list, done) =
                (layout::of_run(lineage, run, "condemned"), layout::of_run(lineage, run, "done"));
            if !has(&done) {
                let bytes = match self.store.get(&list, CONDEMNED_BYTES_MAX).await {
                    Ok(bytes) => bytes,
                    Err(StoreError::NotFound { .. }) => continue,
                    Err(error) => return Err(error.into()),
                };
                let named = match note::read::<Condemned>(&self.keys, &list, &bytes) {
                    Ok(list) => list.packs,
                    Err(Error::Damaged { key, reason }) => {
                        tracing::warn!("{key} keeps writers from comparing; delete it: {reason}");
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let there = match &packs {
                    Some(there) => there,
                    None => packs.insert(self.list_packs(lineage).await?),
                };
                let is_there = |name: &String| {
                    hex::decode(name).is_some_and(|id| there.contains_key(&PackId(id)))
                };
                if named.iter().any(is_there) {
                    tracing::info!("{list} was left by a collector that did not finish");
                    continue;
                }
                self.store.put(&done, bytes::Bytes::from_static(b"\n")).await?;
            }
            // In this order: a list without its end would count again.
            self.store.delete(&list).await?;
            self.store.delete(&done).await?;
        }
        Ok(())
    }
}

impl CollectPlan {
    /// More than a fifth of what is there would go: somebody should look twice.
    pub fn is_large(&self) -> bool {
        self.delete.bytes > (self.delete.bytes + self.keep.bytes) / 5
    }

    /// Does it.
    pub async fn collect(mut self, options: &CollectOptions) -> Result<Collected, Error> {
        let (repository, lineage) = (self.repository.clone(), self.lineage);
        repository.check_alone()?;
        let options = &repository.courtesies(options);
        if options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let goes = |(_, fate): &(BackupId, Fate)| *fate == Fate::Goes;
        if self.garbage.is_empty() && !self.forgotten.iter().any(goes) {
            repository.tidy(lineage).await?;
            return Ok(Collected::Nothing);
        }
        let run = hex::encode(&chance::random::<16>());
        let list = layout::of_run(lineage, &run, "condemned");
        let packs = self.garbage.keys().map(ToString::to_string).collect();
        let bytes = note::write(&repository.keys, &list, &Condemned { packs })?;
        if bytes.len() as u64 > CONDEMNED_BYTES_MAX {
            return Err(Error::Limit { reason: format!("{} packs at once", self.garbage.len()) });
        }
        if repository.store.put_if_absent(&list, bytes).await? == PutOutcome::Exists {
            return Err(Error::Bug(format!("{list} was made by somebody else")));
        }
        let retire = async || {
            let done = layout::of_run(lineage, &run, "done");
            repository.store.put(&done, bytes::Bytes::from_static(b"\n")).await
        };
        // From here on every new attempt keeps away from these packs. Those that began before are asked for their end.
        let mut summary = CollectSummary::default();
        let (open, old) = repository.open_attempts(lineage, options).await?;
        if !open.is_empty() {
            retire().await?;
            return Ok(Collected::Postponed { open });
        }
        for attempt in old {
            let why = "it was open for too long when garbage was collected";
            let ended =
                repository.abort(lineage, attempt, &options.by, why, options.now_ms).await?;
            if let Aborted::Aborted(_) = ended {
                summary.aborted.push(attempt);
            }
        }
        // They may have committed, and refer to what was garbage.
        let wanted = repository.wanted(lineage, options, &mut self.roots).await?;
        let mut doomed = Vec::new();
        for (pack, bytes) in std::mem::take(&mut self.garbage) {
            if wanted.packs.contains(&pack) {
                summary.spared.add(bytes);
            } else {
                summary.deleted.add(bytes);
                doomed.push(layout::pack(lineage, pack));
            }
        }
        // The papers first: what has lost packs must not look like a backup, to nobody.
        for (backup, fate) in &wanted.forgotten {
            if *fate == Fate::Goes {
                repository.delete_papers((*backup).into(), lineage).await?;
            }
        }
        let deletions = doomed.into_iter().map(|key| {
            let (store, cancel) = (Arc::clone(&repository.store), options.cancel.clone());
            async move {
                if cancel.is_cancelled() {
                    return Err(Error::Cancelled);
                }
                Ok(store.delete(&key).await?)
            }
        });
        stream::iter(deletions).buffer_unordered(DELETES_IN_FLIGHT).try_collect::<()>().await?;
        retire().await?;
        repository.tidy(lineage).await?;
        Ok(Collected::Done(summary))
    }
}

impl Repository {
    /// The attempts without a verdict: those to wait for, and those that have been open for longer than the patience.
    async fn open_attempts(
        &self,
        lineage: LineageId,
        options: &CollectOptions,
    ) -> Result<(Vec<Open>, Vec<AttemptId>), Error> {
        let (mut open, mut old) = (Vec::new(), Vec::new());
        for summary in self.list_attempts(lineage).await? {
            let (Some(intent), None) = (summary.intent, summary.verdict) else { continue };
            let age_ms = options.now_ms.saturating_sub(intent.began_at_ms);
            if options.patience_ms.is_some_and(|patience_ms| age_ms >= patience_ms) {
                old.push(summary.attempt);
            } else {
                let (by, began_at_ms) = (intent.by, intent.began_at_ms);
                open.push(Open { attempt: summary.attempt, by, began_at_ms });
            }
        }
        Ok((open, old))
    }

    /// Deletes what a backup that goes has beside its verdict: its proofs, and then the manifest, without which it is none.
    /// Oldest proof first: what is left in between must not look better than the whole. The verdict and the wish stay: a late
    /// request must not be able to make it a backup again.
    async fn delete_papers(&self, attempt: AttemptId, lineage: LineageId) -> Result<(), Error> {
        let proofs = layout::of_attempt(lineage, attempt, "proof.");
        let mut proofs = self.store.list(&proofs).await?;
        // By number, not by text.
        proofs.sort_by(|a, b| (a.key.len(), &a.key).cmp(&(b.key.len(), &b.key)));
        for proof in proofs {
            self.store.delete(&proof.key).await?;
        }
        Ok(self.store.delete(&layout::of_attempt(lineage, attempt, "manifest")).await?)
    }
}
