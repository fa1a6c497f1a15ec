//! Collecting garbage: deleting the packs that no wanted backup refers to, and archived WAL that none can use. The
//! collector's half of the commit protocol (FORMAT.md, section 8); its order of steps is what keeps it away from backups that
//! are being written.
//!
//! Nothing here decides which backups are wanted: `judge` does, by what people wish. Any number of collectors may run, and any
//! of them may die at any point; the next one deletes what it left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::failure::chain;
use proto::{AttemptId, BackupId, LineageId};
use tokio_util::sync::CancellationToken;

use crate::attempt::Aborted;
use crate::checkpoint::Checkpointed;
use crate::error::Error;
use crate::judge::{Judged, Roots, is_older};
use crate::limits::CONDEMNED_BYTES_MAX;
use crate::lineage::{AttemptSummary, NOTES_IN_FLIGHT, Seen, has};
use crate::pack::PackId;
use crate::record::{Condemned, Gone};
use crate::repository::Repository;
use crate::scrub::WalAmount;
use crate::store::{Listed, PutOutcome, StoreError};
use crate::wal::{Doomed, WalPlan};
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
    /// A backup is deleted when it was forgotten this long ago: time for whoever is restoring it, and to think again. What
    /// an interrupted backup stored stays as long for the next one. A courtesy; no safety rests on it.
    pub grace_ms: i64,
    /// An attempt that is open for longer is aborted; every other open one postpones the collection. `None` aborts nobody.
    /// A courtesy too.
    pub patience_ms: Option<i64>,
    /// A pin that is older counts no more: its reader died. One that lives on reads without protection.
    pub pins_for_ms: i64,
    /// Lists of other collectors that are older are retired. `None` retires none. No program can know that a collector is
    /// dead and not only slow: whoever sets this says so, and everything rests on it being true.
    pub lists_for_ms: Option<i64>,
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

/// What a collection would do.
#[derive(Debug)]
pub struct CollectPlan {
    repository: Repository,
    lineage: LineageId,
    roots: Roots,
    /// Packs with their bytes.
    garbage: BTreeMap<PackId, u64>,
    goes: Vec<BackupId>,
    doomed_wal: Vec<Doomed>,
    /// Checkpoints that no backup will read, by their keys.
    spent: Vec<String>,
    /// Packs that go.
    pub delete: Amount,
    /// Packs that stay.
    pub keep: Amount,
    /// What of them is in no backup and stays for a while: the next backup takes over what interrupted ones stored.
    pub left_behind: Amount,
    /// What goes of the WAL archive, and why.
    pub wal: WalPlan,
    /// Every backup that is there, and whether and why it stays.
    pub backups: Vec<Judged>,
    /// What is being written, and postpones the collection.
    pub open: Vec<Open>,
    /// What has been open for so long that the collection aborts it.
    pub aborts: Vec<Open>,
    /// Lists of collectors that did not finish, or have not yet. Nothing new is compared with a backup that has packs on one.
    pub lists: Vec<LeftList>,
}

/// A list of condemned packs that is not done with.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LeftList {
    /// Its collection.
    pub run: String,
    /// Who collected; `None` when the list cannot be read.
    pub by: Option<String>,
    /// When, by their clock, Unix milliseconds.
    pub at_ms: Option<i64>,
    /// Packs on it.
    pub packs: u64,
    /// Backups on it.
    pub backups: u64,
}

/// A list and its end.
struct FoundList {
    list: String,
    done: String,
    /// What is on it, unless it is done with.
    left: Option<LeftList>,
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
    /// What was deleted of the WAL archive.
    pub wal: WalAmount,
    /// Backups that are gone.
    pub backups: Vec<BackupId>,
    /// What was needed again by the time it was looked at for the second time.
    pub spared: Amount,
    /// Attempts that were open for too long and are aborted now.
    pub aborted: Vec<AttemptId>,
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
        // Packs and WAL first: what is stored later is not in the list, and cannot be taken for garbage.
        let packs = self.list_packs(lineage).await?;
        let archived = self.list_archived(lineage).await?;
        let mut roots = Roots::new();
        let attempts = self.look_at_all(lineage).await?;
        let (open, aborts) = open_attempts(&attempts, options);
        let checkpointed = Checkpointed::among(&attempts);
        let mut judged = self.judge(lineage, options, None, attempts, &mut roots).await?;
        self.measure(lineage, &mut judged.backups, &packs, &mut roots).await?;
        let newest = judged.backups.iter().map(|judged| judged.backup).max();
        let left = self.left_behind(lineage, checkpointed, newest, options).await?;
        let bound = judged.wal_bound(&roots);
        let (wal, doomed_wal) = self.plan_wal(lineage, &archived, bound).await?;
        let mut plan = CollectPlan {
            repository: self.clone(),
            lineage,
            roots,
            garbage: BTreeMap::new(),
            goes: judged.goes,
            doomed_wal,
            spent: left.spent,
            wal,
            delete: Amount::default(),
            keep: Amount::default(),
            left_behind: Amount::default(),
            backups: judged.backups,
            open,
            aborts,
            lists: self.lists(lineage).await?.into_iter().filter_map(|list| list.left).collect(),
        };
        for (pack, bytes) in packs {
            if judged.packs.contains(&pack) {
                plan.keep.add(bytes);
            } else if left.packs.contains(&pack) {
                plan.keep.add(bytes);
                plan.left_behind.add(bytes);
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

    /// Says what each backup alone refers to. For people: one that goes and cannot be read is left out.
    async fn measure(
        &self,
        lineage: LineageId,
        backups: &mut [Judged],
        packs: &BTreeMap<PackId, u64>,
        roots: &mut Roots,
    ) -> Result<(), Error> {
        let mut users: HashMap<PackId, u32> = HashMap::new();
        for judged in &*backups {
            match self.packs_of(lineage, judged.backup, roots).await {
                Ok(named) => named.iter().for_each(|pack| *users.entry(*pack).or_default() += 1),
                Err(Error::Store(error)) => return Err(error.into()),
                Err(_) => {}
            }
        }
        for judged in backups {
            let Some(needs) = roots.get(&judged.backup) else { continue };
            let mut alone = Amount::default();
            for pack in needs.packs.iter().filter(|pack| users.get(*pack) == Some(&1)) {
                packs.get(pack).into_iter().for_each(|bytes| alone.add(*bytes));
            }
            judged.alone = Some(alone);
        }
        Ok(())
    }

    /// Every pack in the store, with its bytes. Whatever else lies there is not ours to delete.
    pub(crate) async fn list_packs(
        &self,
        lineage: LineageId,
    ) -> Result<BTreeMap<PackId, u64>, Error> {
        let pack = |object: &Listed| {
            let id = PackId(hex::decode(object.key.rsplit_once('/')?.1)?);
            (layout::pack(lineage, id) == object.key).then_some((id, object.size_bytes))
        };
        Ok(self.store.list(&layout::packs(lineage)).await?.iter().filter_map(pack).collect())
    }

    /// What is below `gc/`.
    async fn lists(&self, lineage: LineageId) -> Result<Vec<FoundList>, Error> {
        let prefix = layout::condemned(lineage);
        let objects = self.store.list(&prefix).await?;
        let runs: BTreeSet<&str> = objects
            .iter()
            .filter_map(|object| Some(object.key.strip_prefix(&prefix)?.split_once('/')?.0))
            .collect();
        let has = |key: &str| objects.iter().any(|object| object.key == key);
        let mut lists = Vec::new();
        for run in runs {
            let (list, done) =
                (layout::of_run(lineage, run, "condemned"), layout::of_run(lineage, run, "done"));
            let left = if has(&done) {
                None
            } else {
                let bytes = match self.store.get(&list, CONDEMNED_BYTES_MAX).await {
                    Ok(bytes) => bytes,
                    // Its owner ended since it was listed.
                    Err(StoreError::NotFound { .. }) => continue,
                    Err(error) => return Err(error.into()),
                };
                let run = run.to_owned();
                match note::read::<Condemned>(&self.keys, &list, &bytes) {
                    Ok(Condemned { by, at_ms, packs, backups }) => Some(LeftList {
                        run,
                        by: Some(by),
                        at_ms: Some(at_ms),
                        packs: packs.len() as u64,
                        backups: backups.len() as u64,
                    }),
                    Err(Error::Damaged { .. }) => {
                        Some(LeftList { run, by: None, at_ms: None, packs: 0, backups: 0 })
                    }
                    Err(error) => return Err(error),
                }
            };
            lists.push(FoundList { list, done, left });
        }
        Ok(lists)
    }

    /// Removes checkpoints that are of no use and what retired lists leave, retires those whose collector is said to be dead,
    /// and lets old pins go.
    async fn tidy(
        &self,
        lineage: LineageId,
        options: &CollectOptions,
        spent: &[String],
    ) -> Result<(), Error> {
        for checkpoint in spent {
            self.store.delete(checkpoint).await?;
        }
        // Some stores cannot list uploads, and some credentials may not: everything else goes on.
        if let Err(error) = self.end_dead_uploads(lineage).await {
            let error = chain(&error);
            tracing::warn!(error, "Uploads that nobody completes may be left in the store");
        }
        for FoundList { list, done, left } in self.lists(lineage).await? {
            if let Some(left) = left {
                let is_dead = options.lists_for_ms.is_some_and(|than_ms| {
                    left.at_ms.is_none_or(|at_ms| is_older(at_ms, options.now_ms, than_ms))
                });
                if !is_dead {
                    tracing::info!("{list} is of a collector that did not finish");
                    continue;
                }
                self.store.put(&done, bytes::Bytes::from_static(b"\n")).await?;
            }
            // In this order: a list without its end would count again.
            self.store.delete(&list).await?;
            self.store.delete(&done).await?;
        }
        for pin in self.list_pins(lineage).await? {
            if pin.is_older(options.now_ms, options.pins_for_ms) {
                self.store.delete(&pin.key).await?;
            }
        }
        Ok(())
    }
}

impl CollectPlan {
    /// More than a fifth of what is there would go, of the bytes, or of the backups when it is more than one: somebody should
    /// look twice. WAL does not count where one backup goes, which takes along the WAL up to the next one: where few are kept
    /// and much is written, that is always a large part.
    pub fn is_large(&self) -> bool {
        let (mut delete, mut keep) = (self.delete.bytes, self.keep.bytes);
        if self.goes.len() != 1 {
            delete += self.wal.delete.bytes;
            keep += self.wal.keep.bytes;
        }
        delete > (delete + keep) / 5 || self.goes.len() > (self.backups.len() / 5).max(1)
    }

    /// Does it.
    pub async fn collect(mut self, options: &CollectOptions) -> Result<Collected, Error> {
        let spent = std::mem::take(&mut self.spent);
        let (repository, lineage) = (self.repository.clone(), self.lineage);
        repository.check_alone()?;
        let options = &repository.courtesies(options);
        if options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        let condemns = !(self.garbage.is_empty() && self.goes.is_empty());
        if !condemns && self.doomed_wal.is_empty() {
            repository.tidy(lineage, options, &spent).await?;
            return Ok(Collected::Nothing);
        }
        let run = hex::encode(&chance::random::<16>());
        let list = layout::of_run(lineage, &run, "condemned");
        let condemned = Condemned {
            packs: self.garbage.keys().map(ToString::to_string).collect(),
            backups: self.goes.clone(),
            by: options.by.clone(),
            at_ms: options.now_ms,
        };
        let bytes = note::write(&repository.keys, &list, &condemned)?;
        if bytes.len() as u64 > CONDEMNED_BYTES_MAX {
            return Err(Error::Limit { reason: format!("{} packs at once", self.garbage.len()) });
        }
        let retire = async || {
            if !condemns {
                return Ok(());
            }
            let done = layout::of_run(lineage, &run, "done");
            repository.store.put(&done, bytes::Bytes::from_static(b"\n")).await
        };
        let mut unanswered = false;
        // WAL is on no list: nobody refers to it.
        let listed = if condemns {
            repository.store.put_if_absent(&list, bytes).await
        } else {
            Ok(PutOutcome::Created)
        };
        let ended = match listed {
            Ok(PutOutcome::Created) => self.carry_out(options, &run, &mut unanswered).await,
            Ok(PutOutcome::Exists) => {
                return Err(Error::Bug(format!("{list} was made by somebody else")));
            }
            // It may be there.
            Err(error) => Err(error.into()),
        };
        if unanswered {
            return ended;
        }
        // Nothing of it can be deleted any more, however it ended.
        let retired = retire().await;
        match (&ended, retired) {
            (Ok(_), retired) => retired?,
            (Err(_), Err(error)) => tracing::warn!("{list} stays: failed to {}", chain(&error)),
            (Err(_), Ok(())) => {}
        }
        if let Ok(Collected::Done(_)) = ended {
            repository.tidy(lineage, options, &spent).await?;
        }
        ended
    }

    /// What a collection does once its list is there. `unanswered` says that a deletion may still happen that nobody heard of.
    async fn carry_out(
        mut self,
        options: &CollectOptions,
        run: &str,
        unanswered: &mut bool,
    ) -> Result<Collected, Error> {
        let (repository, lineage) = (self.repository.clone(), self.lineage);
        // From here on every new attempt keeps away from these packs. Those that began before are asked for their end.
        let mut summary = CollectSummary::default();
        let (open, old) = open_attempts(&repository.look_at_all(lineage).await?, options);
        if !open.is_empty() {
            return Ok(Collected::Postponed { open });
        }
        for Open { attempt, .. } in old {
            let why = "it was open for too long when garbage was collected";
            let ended =
                repository.abort(lineage, attempt, &options.by, why, options.now_ms).await?;
            if let Aborted::Aborted(_) = ended {
                summary.aborted.push(attempt);
            }
        }
        // They may have committed, and refer to what was garbage; and a wish may have been taken back.
        let planned = self.goes.iter().copied().collect();
        let attempts = repository.look_at_all(lineage).await?;
        let judged =
            repository.judge(lineage, options, Some(&planned), attempts, &mut self.roots).await?;
        let wal_bound = judged.wal_bound(&self.roots);
        let mut doomed = Vec::new();
        for (pack, bytes) in std::mem::take(&mut self.garbage) {
            if judged.packs.contains(&pack) {
                summary.spared.add(bytes);
            } else {
                doomed.push((layout::pack(lineage, pack), bytes));
            }
        }
        // The papers first: what has lost packs must not look like a backup, to nobody.
        for backup in judged.goes {
            if options.cancel.is_cancelled() {
                break;
            }
            repository.delete_papers(backup, lineage, run, options, unanswered).await?;
            summary.backups.push(backup);
        }
        let stop = options.cancel.child_token();
        let deletions = doomed.into_iter().map(|(key, bytes)| {
            let (store, stop) = (Arc::clone(&repository.store), stop.clone());
            async move {
                if stop.is_cancelled() {
                    return Ok(None);
                }
                let deleted = store.delete(&key).await;
                deleted.map(|()| Some(bytes)).inspect_err(|_| stop.cancel())
            }
        });
        // All that began are heard to their end: a list may be retired only when nothing of it can still be deleted.
        let ended: Vec<Result<Option<u64>, StoreError>> =
            stream::iter(deletions).buffer_unordered(DELETES_IN_FLIGHT).collect().await;
        *unanswered |= ended.iter().any(is_unanswered);
        for deleted in ended {
            deleted?.into_iter().for_each(|bytes| summary.deleted.add(bytes));
        }
        // After the backups that alone needed it. Whoever began to write since the attempts were looked at began after the
        // WAL was listed, and the segments that follow its backup were archived later still.
        summary.wal = repository.delete_wal(lineage, self.doomed_wal, &wal_bound, options).await?;
        if options.cancel.is_cancelled() {
            return Err(Error::Cancelled);
        }
        Ok(Collected::Done(summary))
    }
}

/// The attempts without a verdict: those to wait for, and those that have been open for longer than the patience.
fn open_attempts(attempts: &[Seen], options: &CollectOptions) -> (Vec<Open>, Vec<Open>) {
    let (mut open, mut old) = (Vec::new(), Vec::new());
    for seen in attempts {
        let (by, began_at_ms) = match &seen.summary {
            Ok(AttemptSummary { intent: Some(intent), verdict: None, .. }) => {
                (intent.by.clone(), intent.began_at_ms)
            }
            // An intent that cannot be read is one all the same. To abort it harms nobody but its writer.
            Err(Error::Damaged { key, .. }) if !has(&seen.names, "verdict") => {
                (format!("nobody knows whom: {key} is damaged"), 0)
            }
            _ => continue,
        };
        let is_old = |patience_ms| is_older(began_at_ms, options.now_ms, patience_ms);
        let attempt = Open { attempt: seen.attempt, by, began_at_ms };
        if options.patience_ms.is_some_and(is_old) {
            old.push(attempt);
        } else {
            open.push(attempt);
        }
    }
    (open, old)
}

impl Repository {
    /// Every attempt, damaged or not, but those that an earlier collection deleted. That the store did not answer says nothing
    /// about one, and ends it.
    async fn look_at_all(&self, lineage: LineageId) -> Result<Vec<Seen>, Error> {
        let attempts = self.look(lineage).await?.into_iter().map(|seen| async move {
            let seen = match seen.summary {
                Err(error) if !matches!(error, Error::Damaged { .. }) => return Err(error),
                _ => seen,
            };
            let has = |name| has(&seen.names, name);
            let is_gone = has("verdict")
                && !has("manifest")
                && has("gone")
                && self.is_gone(lineage, seen.attempt.into()).await?;
            Ok((!is_gone).then_some(seen))
        });
        // Collected first: a stream of borrowing futures is not general enough for a spawned caller.
        let attempts: Vec<_> = attempts.collect();
        let looked: Vec<Option<Seen>> =
            stream::iter(attempts).buffered(NOTES_IN_FLIGHT).try_collect().await?;
        Ok(looked.into_iter().flatten().collect())
    }

    /// Deletes what a backup that goes has beside its verdict: its proofs, and then the manifest, without which it is none;
    /// `gone` says beforehand that this is no loss. Oldest proof first: what is left in between must not look better than the
    /// whole. The verdict and the wishes stay: a late request must not be able to make it a backup again.
    async fn delete_papers(
        &self,
        backup: BackupId,
        lineage: LineageId,
        run: &str,
        options: &CollectOptions,
        unanswered: &mut bool,
    ) -> Result<(), Error> {
        let key = layout::of_backup(lineage, backup, "gone");
        let gone = Gone { run: run.to_owned(), by: options.by.clone(), at_ms: options.now_ms };
        self.store.put_if_absent(&key, note::write(&self.keys, &key, &gone)?).await?;
        let proofs = layout::of_backup(lineage, backup, "proof.");
        let mut proofs = self.store.list(&proofs).await?;
        // By number, not by text.
        proofs.sort_by(|a, b| (a.key.len(), &a.key).cmp(&(b.key.len(), &b.key)));
        let manifest = layout::of_backup(lineage, backup, "manifest");
        for key in proofs.into_iter().map(|proof| proof.key).chain([manifest]) {
            let deleted = self.store.delete(&key).await;
            *unanswered |= is_unanswered(&deleted);
            deleted?;
        }
        Ok(())
    }
}

/// A deletion that was neither done nor refused: the request may come late.
fn is_unanswered<T>(deleted: &Result<T, StoreError>) -> bool {
    deleted.as_ref().is_err_and(|error| !matches!(error, StoreError::Forbidden { .. }))
}
