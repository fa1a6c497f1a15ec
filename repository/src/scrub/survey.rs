//! The part of a check that reads no pack whole: what is there, what the notes and manifests say must be there, and from
//! the level `manifest` on whether the metadata is sound.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, HashMap};

use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::{AttemptId, BackupId, LineageId};

use super::{CheckLevel, Faults, Found, ScrubOptions, ScrubbedLineage, blame, is_own};
use crate::collect::Open;
use crate::error::Error;
use crate::layout;
use crate::limits::{MANIFEST_BYTES_MAX, NOTE_BYTES_MAX, PROOFS_MAX};
use crate::lineage::{NOTES_IN_FLIGHT, has};
use crate::pack::{ObjectType, PackId, PackRecord};
use crate::reader::Backup;
use crate::record::{Identity, Intent, Mark, Outcome, Verdict};
use crate::refer::{Frames, References};
use crate::repository::Repository;
use crate::store::StoreError;

/// What the backups of a lineage need. A pack stands here once, however many backups need it.
#[derive(Debug, Default)]
pub(super) struct Needed {
    backups: Vec<BackupId>,
    packs: BTreeMap<PackId, Need>,
}

#[derive(Debug)]
pub(super) struct Need {
    pub(super) record: PackRecord,
    /// Places in the list of backups.
    by: Vec<u32>,
    pub(super) frames: Frames,
    pub(super) is_marked: bool,
}

impl Needed {
    pub(super) fn by(&self, pack: PackId) -> Vec<BackupId> {
        let by = self.packs.get(&pack).map(|need| need.by.as_slice()).unwrap_or_default();
        by.iter().filter_map(|place| self.backups.get(*place as usize)).copied().collect()
    }

    pub(super) fn has(&self, pack: PackId) -> bool {
        self.packs.contains_key(&pack)
    }

    pub(super) fn is_content(&self, pack: PackId) -> bool {
        self.packs.get(&pack).is_some_and(|need| need.record.kind == ObjectType::Data)
    }

    pub(super) fn packs(&self) -> impl Iterator<Item = &Need> {
        self.packs.values()
    }
}

pub(super) struct Survey<'a> {
    pub(super) repository: &'a Repository,
    pub(super) options: &'a ScrubOptions,
    pub(super) lineage: LineageId,
    pub(super) found: &'a Found,
    pub(super) row: &'a mut ScrubbedLineage,
    pub(super) faults: &'a mut Faults,
    pub(super) needed: &'a mut Needed,
}

impl Survey<'_> {
    pub(super) async fn run(&mut self) -> Result<(), Error> {
        self.identity().await?;
        let keep = (self.options.level >= CheckLevel::Decrypt).then_some(self.options.slice);
        let mut references = References::keeping(keep);
        let verdicts = self.verdicts().await?;
        for (attempt, verdict) in verdicts {
            match verdict {
                None => self.open_attempt(attempt).await?,
                Some(Err(why)) => self.blame(attempt, "verdict", why),
                Some(Ok(Verdict { outcome: Outcome::Abort { .. }, .. })) => {}
                Some(Ok(verdict)) => self.backup(attempt, &verdict, &mut references).await?,
            }
        }
        for (object, what) in references.take_damaged() {
            blame(self.faults, object, what);
        }
        for (pack, need) in &mut self.needed.packs {
            need.frames = references.take(*pack);
        }
        self.packs().await?;
        self.marks().await?;
        for (run, objects) in &self.found.runs {
            if objects.contains_key("condemned") && !objects.contains_key("done") {
                self.row.interrupted.push(layout::of_run(self.lineage, run, "condemned"));
            }
        }
        if self.options.level >= CheckLevel::Manifest {
            self.notes().await?;
        }
        Ok(())
    }

    pub(super) fn blame(&mut self, attempt: AttemptId, name: &str, what: impl Into<String>) {
        blame(self.faults, layout::of_attempt(self.lineage, attempt, name), what);
    }

    async fn identity(&mut self) -> Result<(), Error> {
        let key = layout::identity(self.lineage);
        match self.note::<Identity>(&key, self.found.identity.unwrap_or(0)).await? {
            Ok(Some(identity)) if is_own(self.repository, &identity, self.lineage) => {
                self.row.cluster = Some(identity.cluster);
            }
            Ok(Some(_)) => blame(self.faults, key, "it is the identity of another lineage"),
            Ok(None) => {
                // The first thing of a lineage: whatever stands there without it was there with it.
                let count = self.found.attempts.len();
                let what = format!("it is missing: {count} attempts are not listed without it");
                blame(self.faults, key, what);
            }
            Err(why) => blame(self.faults, key, why),
        }
        Ok(())
    }

    /// Whether an object that was not listed is not there. A listing of many pages sees what was created later and may
    /// have passed what was created before.
    async fn is_absent(&self, attempt: AttemptId, name: &str) -> Result<bool, Error> {
        let key = layout::of_attempt(self.lineage, attempt, name);
        match self.repository.store.size(&key).await {
            Ok(_) => Ok(false),
            Err(StoreError::NotFound { .. }) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads a note that was listed. `Ok(Ok(None))`: it is gone since. `Ok(Err)`: it is not to be believed.
    pub(super) async fn note<T: serde::de::DeserializeOwned>(
        &self,
        key: &str,
        size: u64,
    ) -> Result<Result<Option<T>, String>, Error> {
        if size > NOTE_BYTES_MAX {
            return Ok(Err(format!("it has {size} bytes, more than a note can have")));
        }
        match self.repository.read_note(key).await {
            Ok(note) => Ok(Ok(note)),
            Err(Error::Damaged { reason, .. }) => Ok(Err(reason)),
            Err(error) => Err(error),
        }
    }

    /// Every attempt with its verdict, if it has one.
    async fn verdicts(&self) -> Result<Vec<(AttemptId, Option<Result<Verdict, String>>)>, Error> {
        let verdicts = self.found.attempts.iter().map(|(attempt, names)| async move {
            let Some(size) = names.get("verdict") else { return Ok((*attempt, None)) };
            let key = layout::of_attempt(self.lineage, *attempt, "verdict");
            let verdict = match self.note::<Verdict>(&key, *size).await? {
                Ok(Some(verdict)) if verdict.attempt == *attempt => Ok(verdict),
                Ok(Some(_)) => Err("it is the verdict of another attempt".to_owned()),
                Ok(None) => Err("it is missing".to_owned()),
                Err(why) => Err(why),
            };
            Ok::<_, Error>((*attempt, Some(verdict)))
        });
        // Collected first: a stream of borrowing futures is not general enough for a spawned caller.
        let verdicts: Vec<_> = verdicts.collect();
        stream::iter(verdicts).buffered(NOTES_IN_FLIGHT).try_collect().await
    }

    /// An attempt without a verdict: it is being written, or its writer died, or somebody deleted the verdict.
    async fn open_attempt(&mut self, attempt: AttemptId) -> Result<(), Error> {
        let names = &self.found.attempts[&attempt];
        let Some(size) = names.get("intent") else {
            if self.is_absent(attempt, "intent").await? {
                for name in names.keys() {
                    self.blame(attempt, name, "its attempt has neither intent nor verdict");
                }
            }
            return Ok(());
        };
        let key = layout::of_attempt(self.lineage, attempt, "intent");
        let (by, began_at_ms) = match self.note::<Intent>(&key, *size).await? {
            Ok(Some(intent)) => (intent.by, intent.began_at_ms),
            Ok(None) => return Ok(()),
            Err(why) => {
                blame(self.faults, key, why);
                ("somebody".to_owned(), minted_at_ms(attempt))
            }
        };
        let is_young = began_at_ms.saturating_add(self.options.open_for_ms) > self.options.now_ms;
        if is_young || !self.is_absent(attempt, "verdict").await? {
            return Ok(());
        }
        if names.contains_key("manifest") {
            let what = "it is missing, though the attempt has a manifest: somebody deleted it, or the writer died in \
                        its last step and `repo gc --abort-open` ends the attempt";
            self.blame(attempt, "verdict", what);
        }
        self.row.open.push(Open { attempt, by, began_at_ms });
        Ok(())
    }

    async fn backup(
        &mut self,
        attempt: AttemptId,
        verdict: &Verdict,
        references: &mut References,
    ) -> Result<(), Error> {
        let names = &self.found.attempts[&attempt];
        let list: Vec<String> = names.keys().cloned().collect();
        if !names.contains_key("intent") && self.is_absent(attempt, "intent").await? {
            self.blame(attempt, "intent", "it is missing; no restore needs it");
        }
        if !names.contains_key("manifest") && self.is_absent(attempt, "manifest").await? {
            // A collector deletes the manifest of a backup that was given up, and leaves its verdict.
            if !self.is_given_up(attempt, &list).await? {
                self.blame(attempt, "manifest", "it is missing, and nobody gave the backup up");
            }
            return Ok(());
        }
        if !has(&list, "forget") {
            self.gaps_of_proofs(attempt, &list).await?;
        }
        if let Some(size) = names.get("manifest").filter(|size| **size > MANIFEST_BYTES_MAX) {
            let what = format!("it has {size} bytes, more than a manifest can have");
            self.blame(attempt, "manifest", what);
            return Ok(());
        }
        match self.repository.open_committed(self.lineage, verdict).await {
            Ok(backup) => {
                self.row.backups += 1;
                self.need(&backup);
                if self.options.level >= CheckLevel::Manifest {
                    references.add(&backup).await?;
                }
            }
            Err(Error::Damaged { key, reason }) => blame(self.faults, key, reason),
            Err(Error::Missing { key }) => {
                if !self.is_given_up(attempt, &list).await? {
                    blame(self.faults, key, "it is missing");
                }
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    async fn is_given_up(&self, attempt: AttemptId, names: &[String]) -> Result<bool, Error> {
        self.repository.may_be_deleted(self.lineage, attempt.into(), names).await
    }

    /// Proofs are numbered without a gap, and only with their backup do they go.
    async fn gaps_of_proofs(&mut self, attempt: AttemptId, names: &[String]) -> Result<(), Error> {
        let numbers = names.iter().filter_map(|name| name.strip_prefix("proof.")?.parse().ok());
        let last: u32 = numbers.max().unwrap_or(0);
        for number in 1..last.min(PROOFS_MAX) {
            let name = format!("proof.{number}");
            if !names.contains(&name) && self.is_absent(attempt, &name).await? {
                self.blame(attempt, &name, "it is missing, and a later proof is there");
            }
        }
        Ok(())
    }

    fn need(&mut self, backup: &Backup) {
        let place = u32::try_from(self.needed.backups.len()).unwrap_or(u32::MAX);
        self.needed.backups.push(backup.id());
        for record in backup.root.packs.values() {
            let need = self.needed.packs.entry(record.id).or_insert_with(|| Need {
                record: record.clone(),
                by: Vec::new(),
                frames: Frames::default(),
                is_marked: self.found.marks.contains(&record.id),
            });
            need.by.push(place);
            if need.record != *record {
                let what = format!("it knows pack {} otherwise than another manifest", record.id);
                let key = layout::of_backup(self.lineage, backup.id(), "manifest");
                blame(self.faults, key, what);
            }
        }
    }

    /// Holds the packs that were listed against those that are needed.
    async fn packs(&mut self) -> Result<(), Error> {
        let mut unlisted = Vec::new();
        for need in self.needed.packs.values() {
            let record = &need.record;
            self.row.needed.add(record.size_bytes);
            match self.found.packs.get(&record.id) {
                Some(size) if *size == record.size_bytes => {}
                _ => unlisted.push(record.clone()),
            }
        }
        // Some stores list late: the object itself has the last word.
        let (repository, lineage) = (self.repository, self.lineage);
        let sizes = unlisted.into_iter().map(|record| async move {
            match repository.store.size(&layout::pack(lineage, record.id)).await {
                Ok(size) => Ok((record, Some(size))),
                Err(StoreError::NotFound { .. }) => Ok((record, None)),
                Err(error) => Err(Error::from(error)),
            }
        });
        let sizes: Vec<_> = sizes.collect();
        let sizes: Vec<(PackRecord, Option<u64>)> =
            stream::iter(sizes).buffered(NOTES_IN_FLIGHT).try_collect().await?;
        let mut alive = Alive::new(self.repository, self.lineage);
        for (record, size) in sizes {
            let what = match size {
                Some(size) if size == record.size_bytes => continue,
                Some(size) => {
                    format!("it has {size} bytes, and the manifest says {}", record.size_bytes)
                }
                None if alive.any(self.needed.by(record.id)).await? => "it is missing".to_owned(),
                None => continue,
            };
            blame(self.faults, layout::pack(self.lineage, record.id), what);
        }
        for (pack, size) in &self.found.packs {
            if !self.needed.has(*pack) {
                self.row.unreferenced.add(*size);
                if self.options.reads(*pack) {
                    let to_read = &self.options.to_read;
                    to_read.fetch_sub(*size, std::sync::atomic::Ordering::Relaxed);
                }
            }
        }
        Ok(())
    }

    /// What an earlier check found damaged, and this one does not read, is damaged until somebody reads it.
    async fn marks(&mut self) -> Result<(), Error> {
        for pack in &self.found.marks {
            if !self.needed.has(*pack) || self.options.reads(*pack) {
                continue;
            }
            let mark: Option<Mark> =
                match self.repository.read_note(&layout::mark(self.lineage, *pack)).await {
                    Ok(mark) => mark,
                    Err(Error::Damaged { .. }) => None,
                    Err(error) => return Err(error),
                };
            let what = match mark {
                Some(mark) => format!("an earlier check of {} found: {}", mark.by, mark.why),
                None => "it is marked as damaged".to_owned(),
            };
            blame(self.faults, layout::pack(self.lineage, *pack), what);
        }
        Ok(())
    }
}

/// Which backups are still there while a collector may be at work. Each is looked for once.
pub(super) struct Alive<'a> {
    repository: &'a Repository,
    lineage: LineageId,
    known: HashMap<BackupId, bool>,
}

impl<'a> Alive<'a> {
    pub(super) fn new(repository: &'a Repository, lineage: LineageId) -> Self {
        Self { repository, lineage, known: HashMap::new() }
    }

    pub(super) async fn any(&mut self, backups: Vec<BackupId>) -> Result<bool, Error> {
        for backup in backups {
            if let Entry::Vacant(unknown) = self.known.entry(backup) {
                unknown.insert(is_there(self.repository, self.lineage, backup).await?);
            }
            if self.known.get(&backup) == Some(&true) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether a backup has its manifest, or somebody deleted that whom nobody asked to.
async fn is_there(
    repository: &Repository,
    lineage: LineageId,
    backup: BackupId,
) -> Result<bool, Error> {
    match repository.store.size(&layout::of_backup(lineage, backup, "manifest")).await {
        Ok(_) => Ok(true),
        Err(StoreError::NotFound { .. }) => {
            let names = repository.names_of(lineage, backup.into()).await?;
            Ok(!repository.may_be_deleted(lineage, backup, &names).await?)
        }
        Err(error) => Err(error.into()),
    }
}

/// When an attempt's id was made, Unix milliseconds: the first 48 bits of its UUID.
fn minted_at_ms(attempt: AttemptId) -> i64 {
    attempt.as_bytes()[..6].iter().fold(0_i64, |ms, byte| ms << 8 | i64::from(*byte))
}
