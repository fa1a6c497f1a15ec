//! Beginning and ending an attempt. The order of the steps here is what keeps collected garbage and new backups apart;
//! FORMAT.md section "Commit protocol" says why.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use futures::{StreamExt, TryStreamExt, stream};
use proto::failure::chain;
use proto::{AttemptId, BackupId, LineageId};

use crate::again::again;
use crate::checkpoint::{self, Interrupted};
use crate::error::Error;
use crate::layout;
use crate::limits::{CONDEMNED_BYTES_MAX, MANIFEST_BYTES_MAX};
use crate::lineage::{NOTES_IN_FLIGHT, has};
use crate::manifest::{Counts, Root};
use crate::note;
use crate::pack::{self, ObjectType, PackId, PackRecord};
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
    /// Packs of which a check said that they are damaged: nothing in them is referred to.
    pub(crate) spoilt: Arc<BTreeSet<PackId>>,
    passed_over: Vec<PassedOver>,
    /// What was stored before it and is in no backup: by the attempt that got furthest, and by others.
    pub(crate) interrupted: Vec<Arc<Interrupted>>,
    /// The place of the newest backup that was there when it began: see [`Verdict::order_ms`].
    pub(crate) newest_ms: Option<i64>,
    predecessor_is_newest: bool,
}

/// A committed backup that is not compared with, although it is newer than the one that is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PassedOver {
    /// The backup.
    pub backup: BackupId,
    /// What of it is missing, damaged or not understood.
    pub why: String,
}

/// Damaged backups that are looked at in search of a sound one. When so many are bad, it is quicker to store everything.
const CANDIDATES_MAX: usize = 8;
/// Metadata packs that are read at the same time.
const DIGESTS_IN_FLIGHT: usize = 4;

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
    Right,
    /// The predecessor is chosen before what is condemned is read.
    #[cfg(test)]
    PredecessorBefore,
    /// What an interrupted attempt stored is looked at before what is condemned.
    #[cfg(test)]
    InterruptedBefore,
}

impl Repository {
    /// Begins an attempt: writes its intent, reads what is condemned and what is known to be damaged, then chooses the
    /// backup to compare with. An attempt is begun once; a second begin of the same id is refused.
    pub async fn begin(&self, lineage: LineageId, intent: Intent) -> Result<Attempt, Error> {
        self.begin_in_order(lineage, intent, Order::Right).await
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
        let spoilt = Arc::new(self.marked(lineage).await?);
        let mut passed_over = Vec::new();
        let (predecessor, interrupted, newest) = match order {
            Order::Right => {
                let condemned = self.condemned(lineage).await?;
                let Candidates { backups, mut interrupted, mut deleted, mut newest } =
                    self.candidates(lineage, &mut passed_over).await?;
                let chosen = self
                    .choose_predecessor(lineage, backups, &condemned, &spoilt, &mut passed_over)
                    .await?;
                // What was interrupted before the predecessor was begun is in it, or out of date.
                if let Some(chosen) = &chosen {
                    interrupted.retain(|(attempt, _)| BackupId::from(*attempt) > chosen.id());
                    deleted.retain(|attempt| BackupId::from(*attempt) > chosen.id());
                    for (attempt, verdict) in self.verdicts(lineage, deleted).await? {
                        newest.meet(attempt, &verdict);
                    }
                }
                let interrupted =
                    self.choose_interrupted(lineage, interrupted, &condemned, &spoilt).await?;
                (chosen, interrupted, newest)
            }
            #[cfg(test)]
            Order::InterruptedBefore => {
                let Candidates { interrupted, newest, .. } =
                    self.candidates(lineage, &mut passed_over).await?;
                let nothing = Doomed::default();
                let mut chosen =
                    self.choose_interrupted(lineage, interrupted, &nothing, &spoilt).await?;
                let condemned = self.condemned(lineage).await?;
                let is_doomed = |pack: &PackId| condemned.packs.contains(&pack.to_string());
                chosen.retain(|chosen| !chosen.packs.keys().any(is_doomed));
                (None, chosen, newest)
            }
            #[cfg(test)]
            Order::PredecessorBefore => {
                let Candidates { backups, newest, .. } =
                    self.candidates(lineage, &mut passed_over).await?;
                let condemned = self.condemned(lineage).await?;
                // Without the look at the inventory: a collector may also delete right after it.
                let chosen = match backups.first() {
                    Some(newest) => Some(self.open_backup(lineage, *newest).await?)
                        .filter(|backup| !is_doomed(backup, &condemned)),
                    None => None,
                };
                (chosen, Vec::new(), newest)
            }
        };
        for PassedOver { backup, why } in &passed_over {
            tracing::warn!(
                backup.id = %backup,
                "Backup {backup} cannot be compared with; prove it before you rely on it: {why}",
            );
        }
        let avoided = predecessor
            .iter()
            .flat_map(|backup| backup.root.packs.keys())
            .filter(|pack| spoilt.contains(pack));
        let avoided = avoided.count();
        if avoided > 0 {
            tracing::warn!(
                "{avoided} packs of the predecessor were found damaged: what is in them is stored again",
            );
        }
        for interrupted in &interrupted {
            tracing::info!(
                "What attempt {} stored before it was interrupted is there: {} bytes in {} packs are not stored \
                 again where the files are still the same",
                interrupted.attempt,
                interrupted.bytes(),
                interrupted.packs.len(),
            );
        }
        let predecessor_is_newest =
            predecessor.as_ref().is_some_and(|backup| newest.is(backup.id().into()));
        Ok(Attempt {
            repository: self.clone(),
            lineage,
            intent,
            predecessor,
            spoilt,
            passed_over,
            interrupted,
            newest_ms: newest.known.map(|(order_ms, _)| order_ms),
            predecessor_is_newest,
        })
    }

    /// What stands on lists that are not done with.
    pub(crate) async fn condemned(&self, lineage: LineageId) -> Result<Doomed, Error> {
        let prefix = layout::condemned(lineage);
        let objects = self.store.list(&prefix).await?;
        let mut condemned = Doomed::default();
        for object in &objects {
            let Some(run) = object.key.strip_suffix("/condemned") else { continue };
            let done = format!("{run}/done");
            if objects.iter().any(|other| other.key == done) {
                continue;
            }
            let read = again(|| async {
                let bytes = self.store.get(&object.key, CONDEMNED_BYTES_MAX).await?;
                note::read::<Condemned>(&self.keys, &object.key, &bytes)
            });
            match read.await {
                Ok(list) => {
                    condemned.packs.extend(list.packs);
                    condemned.backups.extend(list.backups);
                }
                // It may name anything.
                Err(Error::Damaged { key, reason }) => {
                    tracing::warn!("Nothing is compared with while {key} is there: {reason}");
                    condemned.all = true;
                }
                // Retired since it was listed: everything on it is deleted, and a predecessor chosen from now on
                // does not need it.
                Err(Error::Store(StoreError::NotFound { .. })) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(condemned)
    }

    /// Committed backups that nobody wants gone, newest first. One whose verdict cannot be read or believed is passed over: an
    /// old object that has rotted must not hold up every later backup.
    async fn candidates(
        &self,
        lineage: LineageId,
        passed_over: &mut Vec<PassedOver>,
    ) -> Result<Candidates, Error> {
        let mut attempts = self.names_of_attempts(lineage).await?;
        let forgotten = |names: &[String]| has(names, "forget");
        let with_checkpoints = attempts.iter().filter(|(_, names)| !forgotten(names));
        let mut interrupted: Vec<(AttemptId, Vec<u32>)> = with_checkpoints
            .map(|(attempt, names)| (*attempt, checkpoint::numbers(names)))
            .filter(|(_, numbers)| !numbers.is_empty())
            .collect();
        // What was given up and is there is no candidate, and may be the newest.
        attempts.retain(|_, names| has(names, "verdict"));
        let is_deleted = |names: &[String]| forgotten(names) && !has(names, "manifest");
        let deleted = attempts.iter().filter(|(_, names)| is_deleted(names));
        let deleted = deleted.map(|(attempt, _)| *attempt).collect();
        attempts.retain(|_, names| !is_deleted(names));
        let verdicts = self.verdicts(lineage, attempts.keys().copied().collect()).await?;
        let (mut found, mut newest) = (Vec::new(), Newest::default());
        for (attempt, verdict) in verdicts {
            newest.meet(attempt, &verdict);
            let forgotten = attempts.get(&attempt).is_some_and(|names| forgotten(names));
            match verdict {
                Ok(Some(verdict)) if matches!(verdict.outcome, Outcome::Commit { .. }) => {
                    interrupted.retain(|(interrupted, _)| *interrupted != attempt);
                    if !forgotten {
                        found.push((verdict.order_ms(), attempt));
                    }
                }
                Ok(_) => {}
                Err(_) if forgotten => {}
                Err(reason) => passed_over.push(PassedOver {
                    backup: attempt.into(),
                    why: format!("its verdict cannot be trusted: {reason}"),
                }),
            }
        }
        found.sort_unstable();
        let backups = found.into_iter().rev().map(|(_, attempt)| attempt.into()).collect();
        Ok(Candidates { backups, interrupted, deleted, newest })
    }

    /// The verdicts of these, or why one cannot be read.
    async fn verdicts(
        &self,
        lineage: LineageId,
        attempts: Vec<AttemptId>,
    ) -> Result<Vec<(AttemptId, Readable)>, Error> {
        let verdicts = attempts.into_iter().map(|attempt| async move {
            let verdict = match self.verdict(lineage, attempt).await {
                Ok(verdict) => Ok(verdict),
                Err(Error::Damaged { reason, .. }) => Err(reason),
                Err(error) => Err(chain(&self.of_one_object(error).await?)),
            };
            Ok::<_, Error>((attempt, verdict))
        });
        stream::iter(verdicts).buffered(NOTES_IN_FLIGHT).try_collect().await
    }

    /// The newest candidate that is sound and none of whose packs is condemned. One that is not costs time, never a
    /// backup: the next older one is taken, or everything is stored anew.
    ///
    /// Metadata is read here and held against its digests, all of it: what nobody reads later, because nothing changed,
    /// is referred to all the same. File content is left to proofs.
    async fn choose_predecessor(
        &self,
        lineage: LineageId,
        candidates: Vec<BackupId>,
        condemned: &Doomed,
        spoilt: &BTreeSet<PackId>,
        passed_over: &mut Vec<PassedOver>,
    ) -> Result<Option<Backup>, Error> {
        let mut looked_at = HashMap::new();
        let mut damaged = 0;
        for candidate in candidates {
            if damaged == CANDIDATES_MAX {
                break;
            }
            let why = match self.open_backup(lineage, candidate).await {
                Ok(backup) if is_doomed(&backup, condemned) => continue,
                Ok(backup) => match self.unsound(&backup, spoilt, &mut looked_at).await? {
                    None => return Ok(Some(backup)),
                    Some(why) => why,
                },
                Err(
                    error @ (Error::Missing { .. } | Error::Damaged { .. } | Error::Version { .. }),
                ) => error.to_string(),
                Err(error) => return Err(error),
            };
            damaged += 1;
            passed_over.push(PassedOver { backup: candidate, why });
        }
        Ok(None)
    }

    /// Why a backup may not be referred to, if so. `looked_at` remembers metadata packs, which backups share.
    async fn unsound(
        &self,
        backup: &Backup,
        spoilt: &BTreeSet<PackId>,
        looked_at: &mut HashMap<PackId, Option<String>>,
    ) -> Result<Option<String>, Error> {
        // Content of a marked pack is stored again; metadata is referred to whole, or not at all.
        let is_metadata = |record: &&PackRecord| record.kind == ObjectType::Metadata;
        if let Some(record) = backup
            .root
            .packs
            .values()
            .filter(is_metadata)
            .find(|record| spoilt.contains(&record.id))
        {
            let key = layout::pack(backup.lineage(), record.id);
            return Ok(Some(format!("a check found {key} damaged")));
        }
        let known = backup.root.packs.keys().find_map(|pack| looked_at.get(pack)?.clone());
        if known.is_some() {
            return Ok(known);
        }
        let inventory = backup.check_inventory().await?;
        if let Some(key) = inventory.missing.first() {
            let others = inventory.missing.len() - 1;
            return Ok(Some(format!("{key} is missing, and {others} other packs")));
        }
        if let Some(key) = inventory.wrong_size.first() {
            return Ok(Some(format!("{key} has another size than was written")));
        }
        let lineage = backup.lineage();
        let unread = backup.root.packs.values().filter(|record| {
            record.kind == ObjectType::Metadata && !looked_at.contains_key(&record.id)
        });
        let reading = unread.map(|record| async move {
            Ok::<_, Error>((record.id, self.wrong_digest(lineage, record).await?))
        });
        let reading: Vec<_> = reading.collect();
        let read: Vec<(PackId, Option<String>)> =
            stream::iter(reading).buffer_unordered(DIGESTS_IN_FLIGHT).try_collect().await?;
        let wrong = read.iter().find_map(|(_, wrong)| wrong.clone());
        looked_at.extend(read);
        Ok(wrong)
    }

    /// Makes sure that what is about to be committed is in the store: whatever deleted a pack since it was stored, or
    /// since it was chosen to be referred to, did so before there was a backup that needs it. What a check found damaged
    /// since the attempt began is as good as gone.
    pub(crate) async fn require_all(&self, root: &Root) -> Result<(), Error> {
        let marked = self.marked(root.head.lineage).await?;
        if let Some(pack) = root.packs.keys().find(|pack| marked.contains(pack)) {
            let key = layout::pack(root.head.lineage, *pack);
            let reason = format!("a check found {key} damaged while the backup was written");
            return Err(Error::Incomplete { attempt: root.head.attempt, reason });
        }
        let inventory = self.inventory(root).await?;
        let unseen: HashSet<&String> =
            inventory.missing.iter().chain(&inventory.wrong_size).collect();
        for record in root.packs.values() {
            let key = layout::pack(root.head.lineage, record.id);
            if !unseen.contains(&key) {
                continue;
            }
            // Some stores list late: the object itself has the last word.
            let reason = match self.store.size(&key).await {
                Ok(size) if size == record.size_bytes => continue,
                Ok(size) => format!("{key} has {size} bytes, not {}", record.size_bytes),
                Err(StoreError::NotFound { .. }) => format!("{key} is not in the store any more"),
                Err(error) => return Err(error.into()),
            };
            return Err(Error::Incomplete { attempt: root.head.attempt, reason });
        }
        Ok(())
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
        let by = by.to_owned();
        let verdict = Verdict { attempt, outcome, by, at_ms: now_ms, order_ms: None };
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
        match self.store.put_if_absent(&key, bytes).await {
            Ok(PutOutcome::Created) => Ok(verdict),
            Ok(PutOutcome::Exists) => {
                self.verdict(lineage, verdict.attempt).await?.ok_or(Error::Missing { key })
            }
            // It may be there all the same. One that is seen stands, ours or not; one that is not seen may still appear.
            Err(source) => match self.verdict(lineage, verdict.attempt).await {
                Ok(Some(stands)) => Ok(stands),
                Ok(None) | Err(_) => Err(Error::VerdictUnknown {
                    attempt: verdict.attempt,
                    word: verdict.outcome.word(),
                    source,
                }),
            },
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
        let reopened = again(|| async {
            let stored = self.store.get(&key, MANIFEST_BYTES_MAX).await.map_err(Error::needed)?;
            if pack::digest_of(&stored) != Some(digest) || stored.len() as u64 != size_bytes {
                return Err(damaged("it was read back with other bytes than were written"));
            }
            Root::open(&self.keys, lineage, attempt.into(), &key, stored.into())
        })
        .await?;
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
        // A backup in a place from which nobody can restore is none.
        self.check_there().await?;
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

/// What a new backup may be compared with, and comes after.
struct Candidates {
    /// Newest first.
    backups: Vec<BackupId>,
    /// What is no backup and has checkpoints, with their numbers.
    interrupted: Vec<(AttemptId, Vec<u32>)>,
    /// Backups that were given up and of which a verdict is left.
    deleted: Vec<AttemptId>,
    newest: Newest,
}

/// A verdict, or why it cannot be read.
type Readable = Result<Option<Verdict>, String>;

/// The last backup of all, also of what was given up.
#[derive(Debug, Clone, Copy, Default)]
struct Newest {
    /// Its place, and which it is.
    known: Option<(i64, AttemptId)>,
    /// The last attempt of which nobody can read whether it is a backup, and in which place.
    unknown: Option<AttemptId>,
}

impl Newest {
    fn meet(&mut self, attempt: AttemptId, verdict: &Readable) {
        match verdict {
            Ok(Some(verdict)) if matches!(verdict.outcome, Outcome::Commit { .. }) => {
                self.known = self.known.max(Some((verdict.order_ms(), attempt)));
            }
            Ok(_) => {}
            Err(_) => self.unknown = self.unknown.max(Some(attempt)),
        }
    }

    /// Whether it is this one. What cannot be read has only the time of its beginning to tell that it came before.
    fn is(&self, attempt: AttemptId) -> bool {
        self.known.is_some_and(|(_, newest)| newest == attempt) && self.unknown < Some(attempt)
    }
}

/// What collectors may be deleting.
#[derive(Debug, Default)]
pub(crate) struct Doomed {
    pub(crate) packs: HashSet<String>,
    backups: HashSet<BackupId>,
    /// A list cannot be read.
    pub(crate) all: bool,
}

/// Whether a collector may be deleting it, or packs of it.
pub(crate) fn is_doomed(backup: &Backup, condemned: &Doomed) -> bool {
    condemned.all
        || condemned.backups.contains(&backup.id())
        || backup.root.packs.keys().any(|pack| condemned.packs.contains(&pack.to_string()))
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

    /// The attempts that were interrupted before it, and of which it takes over what is still the same; the one that got furthest
    /// first.
    pub fn goes_on_from(&self) -> Vec<AttemptId> {
        self.interrupted.iter().map(|interrupted| interrupted.attempt).collect()
    }

    /// Newer backups that could not be compared with, because they are damaged.
    pub fn passed_over(&self) -> &[PassedOver] {
        &self.passed_over
    }

    /// How much the predecessor is, and how much of that it had to store.
    pub fn predecessor_counts(&self) -> Option<Counts> {
        self.predecessor.as_ref().map(|backup| backup.root.head.counts)
    }

    /// Whether the predecessor is the newest backup of all, also of those that were given up or cannot be compared with: what
    /// a newer one found, nobody would know.
    pub fn predecessor_is_newest(&self) -> bool {
        self.predecessor_is_newest
    }

    /// What the predecessor says about its source.
    pub fn predecessor_facts(&self) -> Option<&proto::BackupFacts> {
        self.predecessor.as_ref().map(Backup::facts)
    }
}

#[cfg(test)]
mod tests {
    //! The commit protocol against a collector of garbage that works between any two steps of the writer.

    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use async_trait::async_trait;
    use bytes::Bytes;
    use proto::SystemIdentifier;

    use super::*;
    use crate::entry::SourceEntry;
    use crate::manifest::Packs;
    use crate::repository::{Encryption, InitOptions};
    use crate::store::directory::DirectoryStore;
    use crate::store::layer::Layer;
    use crate::store::{Listed, Store};
    use crate::writer::{Source, SourceFile, WriteOptions, Written};

    /// A directory store that lets a collector run after the writer has looked at one of the two lists and before it
    /// looks at the other.
    #[derive(Debug)]
    struct Interleaved {
        inner: DirectoryStore,
        armed: AtomicBool,
        /// What the collector does to the directory at that moment.
        sweep: Mutex<Vec<Step>>,
        seen: Mutex<Option<&'static str>>,
    }

    #[derive(Debug, Clone)]
    enum Step {
        Put(String, Bytes),
        Delete(String),
    }

    impl Interleaved {
        async fn before_list(&self, prefix: &str) -> Result<(), StoreError> {
            if !self.armed.load(Ordering::SeqCst) {
                return Ok(());
            }
            let list = if prefix.ends_with("/gc/") { "condemned" } else { "backups" };
            let first = *self.seen.lock().unwrap().get_or_insert(list);
            if first != list {
                self.armed.store(false, Ordering::SeqCst);
                let steps = self.sweep.lock().unwrap().clone();
                for step in steps {
                    match step {
                        Step::Put(key, bytes) => self.inner.put(&key, bytes).await?,
                        Step::Delete(key) => self.inner.delete(&key).await?,
                    }
                }
            }
            Ok(())
        }
    }

    #[async_trait]
    impl Layer for Interleaved {
        fn inner(&self) -> &dyn Store {
            &self.inner
        }
        async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
            self.before_list(prefix).await?;
            self.inner.list(prefix).await
        }
        async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
            self.before_list(prefix).await?;
            self.inner.list_directories(prefix).await
        }
    }

    struct NoSource;

    impl Source for NoSource {
        fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
            Ok(None)
        }
    }

    fn facts() -> proto::BackupFacts {
        serde_json::from_value(serde_json::json!({
            "cluster": "c", "system_identifier": "1", "server_version_num": 150_000, "catalog_version": 1,
            "block_size": 8192, "wal_segment_size": 16_777_216, "data_checksums": true, "timeline": 1,
            "start_lsn": "0/1", "stop_lsn": "0/2", "started_at_ms": 1, "stopped_at_ms": 2, "backup_label": "",
        }))
        .unwrap()
    }

    async fn write(attempt: Attempt) -> Result<BackupId, Error> {
        Ok(write_all_but_the_verdict(attempt).await?.commit(3).await?.backup)
    }

    /// It has a checkpoint.
    async fn write_all_but_the_verdict(attempt: Attempt) -> Result<Written, Error> {
        let options = WriteOptions {
            continuity: Some("x".into()),
            checkpoint_every: Duration::ZERO,
            ..WriteOptions::default()
        };
        let mut writer = attempt.write(options)?;
        let content: Vec<u8> = (0..60_000_u32).flat_map(u32::to_be_bytes).collect();
        let entry = SourceEntry::bytes("file", 0o600, content);
        writer.copy(Arc::new(NoSource), vec![Ok(entry)]).await?;
        writer.finish(Arc::new(NoSource), vec![], facts()).await
    }

    fn intent(n: u8) -> Intent {
        Intent {
            attempt: AttemptId::mint(u64::from(n), [n; 10]),
            follows: None,
            by: "w".into(),
            began_at_ms: 1,
        }
    }

    /// An old backup exists. A collector planned before it was committed: its packs are on a list, the list of open
    /// attempts was taken before ours began. Now we begin; and between our two looks somebody forgets the old backup,
    /// and the collector checks once more, deletes the packs and retires its list. Returns what became of our attempt.
    async fn race(order: Order) -> (Repository, LineageId, Result<BackupId, Error>) {
        let (store, repository, lineage) = interleaved().await;
        let old = write(repository.begin(lineage, intent(1)).await.unwrap()).await.unwrap();
        // It has deleted the content and not yet the metadata, so that the writer notices nothing.
        let root = repository.open_backup(lineage, old).await.unwrap().root;
        let forget =
            Step::Put(layout::of_backup(lineage, old, "forget"), Bytes::from_static(b"\n"));
        sweep(&store, &repository, lineage, &root.packs, vec![forget]).await;

        let attempt = repository.begin_in_order(lineage, intent(2), order).await.unwrap();
        assert!(!store.armed.load(Ordering::SeqCst), "the collector had its turn");
        let backup = write(attempt).await;
        (repository, lineage, backup)
    }

    /// The same with the packs of an attempt that was interrupted before its verdict.
    async fn race_for_what_is_left(
        order: Order,
    ) -> (Repository, LineageId, Result<BackupId, Error>) {
        let (store, repository, lineage) = interleaved().await;
        let begun = repository.begin(lineage, intent(1)).await.unwrap();
        let dead = begun.id();
        drop(write_all_but_the_verdict(begun).await.unwrap());
        let checkpoint = repository.last_checkpoint(lineage, dead, &[1]).await.unwrap().unwrap();
        sweep(&store, &repository, lineage, &checkpoint.packs, Vec::new()).await;

        let attempt = repository.begin_in_order(lineage, intent(2), order).await.unwrap();
        assert!(!store.armed.load(Ordering::SeqCst), "the collector had its turn");
        let backup = write(attempt).await;
        (repository, lineage, backup)
    }

    async fn interleaved() -> (Arc<Interleaved>, Repository, LineageId) {
        let place = tempfile::tempdir().unwrap().keep();
        let store = Arc::new(Interleaved {
            inner: DirectoryStore::new(place),
            armed: AtomicBool::new(false),
            sweep: Mutex::default(),
            seen: Mutex::default(),
        });
        let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
        let as_store: Arc<dyn Store> = Arc::<Interleaved>::clone(&store);
        let repository = Repository::init(as_store, options).await.unwrap().repository;
        let identity = repository
            .find_or_mint_lineage(&"c".parse().unwrap(), SystemIdentifier(1), 1)
            .await
            .unwrap();
        (store, repository, identity.lineage)
    }

    /// Condemns the content now, and deletes it when the writer is between its two looks.
    async fn sweep(
        store: &Interleaved,
        repository: &Repository,
        lineage: LineageId,
        packs: &Packs,
        first: Vec<Step>,
    ) {
        let data = packs.values().filter(|record| record.kind == ObjectType::Data);
        let packs: Vec<_> = data.map(|record| record.id).collect();
        assert!(!packs.is_empty());
        let run = format!("{}run-1", layout::condemned(lineage));
        let names = packs.iter().map(ToString::to_string).collect();
        let key = format!("{run}/condemned");
        let list = note::write(
            &repository.keys,
            &key,
            &Condemned { packs: names, ..Condemned::default() },
        )
        .unwrap();
        Store::put(store, &key, list).await.unwrap();
        let mut sweep = first;
        sweep.extend(packs.iter().map(|pack| Step::Delete(layout::pack(lineage, *pack))));
        sweep.push(Step::Put(format!("{run}/done"), Bytes::from_static(b"\n")));
        *store.sweep.lock().unwrap() = sweep;
        store.armed.store(true, Ordering::SeqCst);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_collector_between_the_looks_at_what_is_left_costs_nothing() {
        let (repository, lineage, backup) = race_for_what_is_left(Order::Right).await;
        let backup = repository.open_backup(lineage, backup.unwrap()).await.unwrap();
        assert!(backup.check_inventory().await.unwrap().is_sound());
        assert!(backup.check_decrypt(crate::CheckOptions::default()).await.unwrap().is_sound());
    }

    /// What an interrupted attempt left is chosen after the lists are read, as a predecessor is, and for the same reason.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_looks_at_what_is_left_exchanged_leave_it_to_the_look_before_the_verdict() {
        let (repository, lineage, backup) = race_for_what_is_left(Order::InterruptedBefore).await;
        assert!(matches!(backup, Err(Error::Incomplete { .. })), "{backup:?}");
        assert!(repository.list_backups(lineage).await.unwrap().is_empty());
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_collector_between_the_two_looks_costs_nothing() {
        let (repository, lineage, backup) = race(Order::Right).await;
        let backup = repository.open_backup(lineage, backup.unwrap()).await.unwrap();
        assert!(backup.check_inventory().await.unwrap().is_sound());
        assert!(backup.check_decrypt(crate::CheckOptions::default()).await.unwrap().is_sound());
    }

    /// The reason for the order: the same collector, the looks exchanged, and the manifest names packs that are deleted.
    /// Here the look before the verdict sees it. It would not, had the collector taken its time; that data is lost then is what
    /// tests/model.rs shows.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_looks_exchanged_leave_it_to_the_look_before_the_verdict() {
        let place = race(Order::PredecessorBefore);
        let (repository, lineage, backup) = place.await;
        assert!(matches!(backup, Err(Error::Incomplete { .. })), "{backup:?}");
        assert_eq!(repository.list_backups(lineage).await.unwrap().len(), 1, "the old one only");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_backup_with_a_condemned_pack_is_no_predecessor() {
        let place = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(place.path()));
        let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
        let repository = Repository::init(Arc::clone(&store), options).await.unwrap().repository;
        let identity = repository
            .find_or_mint_lineage(&"c".parse().unwrap(), SystemIdentifier(1), 1)
            .await
            .unwrap();
        let lineage = identity.lineage;
        let old = write(repository.begin(lineage, intent(1)).await.unwrap()).await.unwrap();
        let chosen = |n| {
            let repository = repository.clone();
            async move { repository.begin(lineage, intent(n)).await.unwrap().predecessor() }
        };
        assert_eq!(chosen(2).await, Some(old));
        let pack =
            *repository.open_backup(lineage, old).await.unwrap().root.packs.keys().next().unwrap();
        let key = format!("{}run-1/condemned", layout::condemned(lineage));
        let list = Condemned { packs: vec![pack.to_string()], ..Condemned::default() };
        store.put(&key, note::write(&repository.keys, &key, &list).unwrap()).await.unwrap();
        assert_eq!(chosen(3).await, None);
        store
            .put(&format!("{}run-1/done", layout::condemned(lineage)), Bytes::new())
            .await
            .unwrap();
        assert_eq!(chosen(4).await, Some(old));
        store.put(&layout::of_backup(lineage, old, "forget"), Bytes::new()).await.unwrap();
        assert_eq!(chosen(5).await, None);
    }
}
