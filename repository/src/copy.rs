//! Copying backups to a second store. The copy is a mirror: the same repository id, keys and names, so the same key file
//! opens it, and its objects are the same bytes.
//!
//! At the source it is a reader, with a pin for each backup. At the target it is a writer and keeps the writer's order:
//! intent, lists of condemned packs, packs, manifest, verdict. Names are what a writer must never use twice; a copy has no
//! choice, so it stores nothing under a name that is on a list. What is there is not stored again: a copy that was
//! interrupted is taken up by the next one. Wishes and proofs stay where they were made: they say nothing of the other bytes. So
//! does the word of other copies; of this one it is left at the source (`copies`).

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::failure::chain;
use proto::{BackupId, LineageId};
use tokio_util::sync::CancellationToken;

use crate::attempt::Doomed;
use crate::collect::Amount;
use crate::copies::Found;
use crate::error::Error;
use crate::key::Keys;
use crate::limits::{MANIFEST_BYTES_MAX, NOTE_BYTES_MAX, PART_BYTES};
use crate::lineage::has;
use crate::manifest::Root;
use crate::pack::{ObjectType, PackId, PackRecord, TAIL_BYTES, Tail, digest_of, undigested_bytes};
use crate::progress::Progress;
use crate::reader::Backup;
use crate::recipient::Unlock;
use crate::record::{Intent, Outcome, Pin, Verdict};
use crate::repository::{Repository, create};
use crate::store::probe::Capabilities;
use crate::store::single::SingleWriter;
use crate::store::{PutOutcome, Store, StoreError};
use crate::{chance, hex, layout, note, wishes};

/// How a copy runs.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Who copies, for people.
    pub by: String,
    /// The clock, Unix milliseconds.
    pub now_ms: i64,
    /// Packs in flight; each holds a part of 8 MiB in memory, and those the store is sending.
    pub processes: usize,
    /// Counters to be read while it runs.
    pub progress: Arc<Progress>,
    /// Ends it between two parts.
    pub cancel: CancellationToken,
}

/// What became of one backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CopyOutcome {
    /// It is a backup of the target now.
    Copied,
    /// It was there, whole.
    Present,
    /// It was there, and parts of it were not, or were damaged.
    Repaired,
    /// It was given up or deleted at the target; that is the target's affair.
    GivenUp,
    /// An earlier copy of it was aborted at the target, which stands: it cannot be copied there any more.
    Aborted,
}

/// What a copy of one backup did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct CopySummary {
    /// What became of it.
    pub outcome: CopyOutcome,
    /// What was sent.
    pub sent: Amount,
    /// Packs of it that were there.
    pub present: Amount,
}

/// A source and its mirror.
#[derive(Debug)]
pub struct Mirror {
    pub(crate) source: Repository,
    pub(crate) target: Repository,
    /// Packs of the source that are damaged, and how.
    bad: HashMap<PackId, String>,
    /// Metadata packs of the target that were held against their digests.
    sound: HashSet<PackId>,
    /// Lineages that the target is known to have.
    lineages: HashSet<LineageId>,
    /// Packs of the target with their bytes, as they were listed last and sent since.
    packs: HashMap<LineageId, BTreeMap<PackId, u64>>,
    /// What the source has not been told of yet.
    pub(crate) untold: BTreeMap<LineageId, BTreeMap<BackupId, Found>>,
}

impl Repository {
    /// Opens the mirror of this repository in another store, with the same key or another one that the mirror has. Where
    /// nothing is yet it is made: keys first, `config` last, `found` is what a probe saw there. It is for a single writer when
    /// its own store needs that, whatever the source is. Refused where another repository is, and in the store that holds this
    /// one.
    pub async fn mirror(
        &self,
        store: Arc<dyn Store>,
        unlock: Unlock<'_>,
        single_writer: bool,
        probe: impl AsyncFnOnce(&dyn Store) -> Result<Capabilities, StoreError>,
    ) -> Result<Mirror, Error> {
        if is_same(self.store.as_ref(), store.as_ref()).await? {
            let reason = "it is the store that is copied from".to_owned();
            return Err(Error::NoMirror { place: store.describe(), reason });
        }
        match store.size(layout::CONFIG).await {
            Ok(_) => {}
            Err(StoreError::NotFound { .. }) => {
                let found = probe(store.as_ref()).await?;
                if single_writer {
                    let single = SingleWriter::over(Arc::clone(&store));
                    self.create_mirror(&single, single_writer, found).await?;
                } else {
                    self.create_mirror(store.as_ref(), single_writer, found).await?;
                }
            }
            Err(error) => return Err(error.into()),
        }
        let target = Self::open_with(store, unlock).await?;
        let code = |keys: &Keys| keys.note_code(layout::CONFIG, b"");
        if target.id() != self.id() || code(&target.keys) != code(&self.keys) {
            let reason = format!("it holds repository {}, and not {}", target.id(), self.id());
            return Err(Error::NoMirror { place: target.describe(), reason });
        }
        target.check_writable()?;
        Ok(Mirror {
            source: self.clone(),
            target,
            bad: HashMap::new(),
            sound: HashSet::new(),
            lineages: HashSet::new(),
            packs: HashMap::new(),
            untold: BTreeMap::new(),
        })
    }

    async fn create_mirror(
        &self,
        store: &dyn Store,
        single_writer: bool,
        found: Capabilities,
    ) -> Result<(), Error> {
        let mut keys = self.store.list(layout::KEYS).await?;
        keys.append(&mut self.store.list(layout::KEYRINGS).await?);
        for object in keys {
            let bytes = self.store.get(&object.key, NOTE_BYTES_MAX).await.map_err(Error::needed)?;
            if create(store, &object.key, bytes.clone()).await? == PutOutcome::Exists
                && store.get(&object.key, NOTE_BYTES_MAX).await? != bytes
            {
                let reason = format!("another key lies there at {}", object.key);
                return Err(Error::NoMirror { place: store.describe(), reason });
            }
        }
        let config = self.config().mirrored(single_writer, found);
        let bytes = note::write(&self.keys, layout::CONFIG, &config)?;
        // Whoever was first decides; whether it is a mirror of ours is seen when it is opened.
        create(store, layout::CONFIG, bytes).await?;
        Ok(())
    }

    /// An open backup's papers as they are.
    async fn read_papers(&self, opened: &Backup) -> Result<Papers, Error> {
        let (lineage, backup) = (opened.lineage(), opened.id());
        let key = layout::of_backup(lineage, backup, "verdict");
        let verdict_bytes = self.store.get(&key, NOTE_BYTES_MAX).await.map_err(Error::needed)?;
        let verdict: Verdict = note::read(&self.keys, &key, &verdict_bytes)?;
        let key = layout::of_backup(lineage, backup, "manifest");
        let manifest = self.store.get(&key, MANIFEST_BYTES_MAX).await.map_err(Error::needed)?;
        match &verdict.outcome {
            Outcome::Commit { manifest_blake3, .. } if names(manifest_blake3, &manifest) => {}
            _ => return Err(Error::damaged(key, "it changed while it was read")),
        }
        let root = Arc::clone(&opened.root);
        Ok(Papers { lineage, backup, verdict, verdict_bytes, manifest, root })
    }
}

fn names(digest: &str, bytes: &[u8]) -> bool {
    digest_of(bytes).is_some_and(|found| hex::encode(&found) == digest)
}

/// Whether both are the same place, whatever they are called: what is put into one is seen in the other.
async fn is_same(source: &dyn Store, target: &dyn Store) -> Result<bool, Error> {
    let key = format!("probe/{}/same", hex::encode(&chance::random::<16>()));
    target.put(&key, Bytes::from_static(b"same")).await?;
    let seen = match source.size(&key).await {
        Ok(_) => Ok(true),
        Err(StoreError::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    };
    if let Err(error) = target.delete(&key).await {
        tracing::warn!("{key} was not deleted: failed to {}", chain(&error));
    }
    Ok(seen?)
}

/// A backup's papers at the source.
struct Papers {
    lineage: LineageId,
    backup: BackupId,
    verdict: Verdict,
    verdict_bytes: Bytes,
    manifest: Bytes,
    root: Arc<Root>,
}

impl Mirror {
    /// The mirror.
    pub fn target(&self) -> &Repository {
        &self.target
    }

    /// Makes sure that the target has the lineage. Idempotent; nothing is asked twice.
    pub async fn copy_lineage(&mut self, lineage: LineageId) -> Result<(), Error> {
        if self.lineages.contains(&lineage) {
            return Ok(());
        }
        let key = layout::identity(lineage);
        let bytes = self.source.store.get(&key, NOTE_BYTES_MAX).await.map_err(Error::needed)?;
        self.source.identity(lineage).await?;
        create(self.target.store.as_ref(), &key, bytes).await?;
        self.target.identity(lineage).await?;
        self.lineages.insert(lineage);
        Ok(())
    }

    /// Copies one backup. Idempotent; what an interrupted copy left is taken up. An error of the source's objects concerns this
    /// backup only: others may be copied. The source is told by [`Mirror::leave_word`].
    pub async fn copy(
        &mut self,
        lineage: LineageId,
        backup: BackupId,
        options: &CopyOptions,
    ) -> Result<CopySummary, Error> {
        let pin = Pin { by: options.by.clone(), why: "copy".to_owned(), at_ms: options.now_ms };
        let pinned = self.source.open_pinned(lineage, backup, &pin).await?;
        let copied = self.copy_opened(&pinned, options).await;
        pinned.release().await;
        if let Ok(CopySummary { outcome, .. }) = copied {
            let found = Found { outcome, at_ms: options.now_ms };
            self.untold.entry(lineage).or_default().insert(backup, found);
        }
        copied
    }

    async fn copy_opened(
        &mut self,
        opened: &Backup,
        options: &CopyOptions,
    ) -> Result<CopySummary, Error> {
        let (lineage, backup) = (opened.lineage(), opened.id());
        let papers = self.source.read_papers(opened).await?;
        let there = self.target.names_of(lineage, backup.into()).await?;
        let nothing = Amount::default();
        let mut summary =
            CopySummary { outcome: CopyOutcome::Present, sent: nothing, present: nothing };
        let committed = match self.target.verdict(lineage, backup.into()).await? {
            None => false,
            Some(verdict) if !is_ours(&papers, &verdict)? => {
                summary.outcome = CopyOutcome::Aborted;
                return Ok(summary);
            }
            Some(_) => true,
        };
        let has_manifest = has(&there, "manifest");
        let is_gone = !has_manifest && has(&there, "gone");
        if committed && (is_gone || wishes::forgets(&there).next().is_some()) {
            summary.outcome = CopyOutcome::GivenUp;
            return Ok(summary);
        }
        if !committed {
            self.renew_intent(&papers, options).await?;
        }
        // After the intent: either the collector waits for us, or we see its list.
        let condemned = self.target.condemned(lineage).await?;
        let marked = self.target.marked(lineage).await?;
        // A verdict is written on what was seen after the intent. One that stands is only looked after.
        if !committed || !self.packs.contains_key(&lineage) {
            let listed = self.target.list_packs(lineage).await?;
            self.packs.insert(lineage, listed);
        }
        let sent = self.send_packs(&papers, &condemned, &marked, &mut summary, options).await?;
        for pack in marked.iter().filter(|pack| papers.root.packs.contains_key(pack)) {
            self.target.unmark(lineage, *pack).await?;
        }
        if committed {
            let is_same = has_manifest && self.has_same_manifest(&papers).await?;
            if !is_same {
                self.put_manifest(&papers).await?;
            }
            if sent > 0 || !is_same {
                summary.outcome = CopyOutcome::Repaired;
            }
        } else {
            self.put_manifest(&papers).await?;
            let wrong = self.wrong_metadata(&papers).await?;
            if !wrong.is_empty() {
                // What was there is counted already.
                let present = summary.present;
                self.send_packs(&papers, &condemned, &wrong, &mut summary, options).await?;
                summary.present = present;
                self.check_metadata(&papers).await?;
            }
            self.target.require_all(&papers.root).await?;
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let is_ours = self.put_verdict(&papers).await?;
            summary.outcome = if is_ours { CopyOutcome::Copied } else { CopyOutcome::Aborted };
        }
        Ok(summary)
    }

    /// Says that somebody writes here. An intent that an earlier copy left is renewed: it is not dead any more.
    async fn renew_intent(&self, papers: &Papers, options: &CopyOptions) -> Result<(), Error> {
        let attempt = papers.backup.into();
        let key = layout::of_attempt(papers.lineage, attempt, "intent");
        let intent = Intent {
            attempt,
            follows: None,
            by: format!("{}, who copies it", options.by),
            began_at_ms: options.now_ms,
        };
        Ok(self.target.store.put(&key, note::write(&self.target.keys, &key, &intent)?).await?)
    }

    /// Sends the packs that the target has not, or not with their sizes, and those whose bytes there are wrong. Returns how many.
    async fn send_packs(
        &mut self,
        papers: &Papers,
        condemned: &Doomed,
        wrong: &BTreeSet<PackId>,
        summary: &mut CopySummary,
        options: &CopyOptions,
    ) -> Result<u64, Error> {
        let lineage = papers.lineage;
        let there = self.packs.entry(lineage).or_default();
        let mut records: Vec<&PackRecord> = papers.root.packs.values().collect();
        records.sort_by_key(|record| record.id);
        let mut missing = Vec::new();
        for record in records {
            let key = layout::pack(lineage, record.id);
            if condemned.all || condemned.packs.contains(&record.id.to_string()) {
                return Err(Error::Condemned { key, place: self.target.describe() });
            }
            if let Some(reason) = self.bad.get(&record.id) {
                let key = layout::pack(lineage, record.id);
                return Err(Error::damaged(key, reason.clone()));
            }
            match there.get(&record.id) {
                Some(size) if *size == record.size_bytes && !wrong.contains(&record.id) => {
                    summary.present.add(record.size_bytes);
                }
                _ => missing.push((record, key)),
            }
        }
        if !missing.is_empty() {
            let bytes = missing.iter().map(|(record, _)| record.size_bytes).sum();
            self.target.require_room(bytes).await?;
        }
        let (source, target) = (&self.source.store, &self.target.store);
        let sending = missing.into_iter().map(|(record, key)| async move {
            // What is there under its name is replaced and never deleted: another copy may have stored it just now.
            let sent = send(source.as_ref(), target.as_ref(), record, &key, options).await;
            sent.map(|()| record).map_err(|error| (record.id, error).into())
        });
        let mut ended = stream::iter(sending).buffer_unordered(options.processes.max(1));
        let mut sent = 0;
        while let Some(one) = ended.next().await {
            match one {
                Ok(record) => {
                    there.insert(record.id, record.size_bytes);
                    summary.sent.add(record.size_bytes);
                    sent += 1;
                }
                Err(Unsent { pack, error }) => {
                    if let (Some(pack), Error::Damaged { reason, .. }) = (pack, &error) {
                        self.bad.insert(pack, reason.clone());
                    }
                    return Err(error);
                }
            }
        }
        Ok(sent)
    }

    /// Whether the target's manifest has the bytes of the source's. One that a collector deleted since is not ours to replace.
    async fn has_same_manifest(&self, papers: &Papers) -> Result<bool, Error> {
        let key = layout::of_backup(papers.lineage, papers.backup, "manifest");
        match self.target.store.get(&key, MANIFEST_BYTES_MAX).await {
            Ok(stored) => Ok(stored == papers.manifest),
            Err(StoreError::Large { .. }) => Ok(false),
            Err(StoreError::NotFound { .. }) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    async fn put_manifest(&self, papers: &Papers) -> Result<(), Error> {
        let key = layout::of_backup(papers.lineage, papers.backup, "manifest");
        self.target.store.put(&key, papers.manifest.clone()).await?;
        let stored =
            self.target.store.get(&key, MANIFEST_BYTES_MAX).await.map_err(Error::needed)?;
        if stored != papers.manifest {
            return Err(Error::damaged(key, "it was read back with other bytes than were written"));
        }
        Ok(())
    }

    /// Reads the metadata packs at the target, as a writer does before it refers to them: damage that an earlier copy met
    /// since must not be taken over by references to what nobody reads. Those that are wrong are to be sent again.
    async fn wrong_metadata(&mut self, papers: &Papers) -> Result<BTreeSet<PackId>, Error> {
        let unread = papers.root.packs.values().filter(|record| {
            record.kind == ObjectType::Metadata && !self.sound.contains(&record.id)
        });
        let target = &self.target;
        let reading: Vec<_> = unread
            .map(|record| async move {
                let wrong = target.wrong_digest(papers.lineage, record).await?;
                Ok::<_, Error>((record.id, wrong))
            })
            .collect();
        let read: Vec<(PackId, Option<String>)> =
            stream::iter(reading).buffer_unordered(DIGESTS_IN_FLIGHT).try_collect().await?;
        let (sound, wrong): (Vec<_>, Vec<_>) =
            read.into_iter().partition(|(_, wrong)| wrong.is_none());
        self.sound.extend(sound.into_iter().map(|(pack, _)| pack));
        Ok(wrong.into_iter().map(|(pack, _)| pack).collect())
    }

    /// The same when they were sent again.
    async fn check_metadata(&mut self, papers: &Papers) -> Result<(), Error> {
        match self.wrong_metadata(papers).await?.first() {
            None => Ok(()),
            Some(pack) => Err(Error::Incomplete {
                attempt: papers.backup.into(),
                reason: format!(
                    "{} has other bytes than were sent, in {}",
                    layout::pack(papers.lineage, *pack),
                    self.target.describe()
                ),
            }),
        }
    }

    /// Makes the backup one of the target, unless somebody aborted that.
    async fn put_verdict(&self, papers: &Papers) -> Result<bool, Error> {
        let attempt = papers.backup.into();
        let key = layout::of_attempt(papers.lineage, attempt, "verdict");
        let put = self.target.store.put_if_absent(&key, papers.verdict_bytes.clone()).await;
        let source = match put {
            Ok(PutOutcome::Created) => return Ok(true),
            Ok(PutOutcome::Exists) => None,
            Err(error) => Some(error),
        };
        match (self.target.verdict(papers.lineage, attempt).await, source) {
            (Ok(Some(stands)), _) => is_ours(papers, &stands),
            (_, Some(source)) => Err(Error::VerdictUnknown { attempt, word: "COMMIT", source }),
            (Err(error), None) => Err(error),
            (Ok(None), None) => Err(Error::Missing { key }),
        }
    }
}

/// Metadata packs that are read at the same time.
const DIGESTS_IN_FLIGHT: usize = 4;

/// Whether a verdict at the target is that of the source, and not an ABORT.
fn is_ours(papers: &Papers, stands: &Verdict) -> Result<bool, Error> {
    match &stands.outcome {
        Outcome::Abort { .. } => Ok(false),
        outcome if *outcome == papers.verdict.outcome => Ok(true),
        Outcome::Commit { .. } => Err(Error::CommitRefused {
            attempt: stands.attempt,
            by: stands.by.clone(),
            why: "another backup was committed under its name".to_owned(),
        }),
    }
}

/// A pack that was not sent; which one, when the source is to blame.
struct Unsent {
    pack: Option<PackId>,
    error: Error,
}

impl From<(PackId, Error)> for Unsent {
    fn from((pack, error): (PackId, Error)) -> Self {
        Self { pack: Some(pack), error }
    }
}

impl From<StoreError> for Unsent {
    fn from(error: StoreError) -> Self {
        Self { pack: None, error: error.into() }
    }
}

/// Streams one pack. It appears at the target only when what was read has the digest that the manifest remembers.
async fn send(
    source: &dyn Store,
    target: &dyn Store,
    record: &PackRecord,
    key: &str,
    options: &CopyOptions,
) -> Result<(), Error> {
    let mut upload = target.upload(key).await?;
    let read = async {
        let digested = record.size_bytes.saturating_sub(undigested_bytes());
        let mut hasher = blake3::Hasher::new();
        let (mut at, mut tail) = (0, Vec::new());
        while at < record.size_bytes {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let end = record.size_bytes.min(at + PART_BYTES as u64);
            let bytes = source.get_range(key, at..end).await.map_err(Error::needed)?;
            let hashed = usize::try_from(digested.saturating_sub(at)).unwrap_or(usize::MAX);
            hasher.update(&bytes[..hashed.min(bytes.len())]);
            // The trailer may begin in the part before the last.
            tail.extend_from_slice(&bytes[bytes.len().saturating_sub(TAIL_BYTES)..]);
            options.progress.add_stored(bytes.len() as u64);
            upload.part(bytes).await?;
            at = end;
        }
        let wrong = |reason: &str| Err(Error::damaged(key, reason));
        if *hasher.finalize().as_bytes() != record.digest {
            return wrong("its bytes do not have the digest the manifest remembers");
        }
        match Tail::parse(&tail) {
            Ok(tail) if tail.digest == record.digest => Ok(()),
            _ => wrong("its trailer is not the one that was written"),
        }
    };
    let read = read.await;
    let Err(error) = read else {
        return match upload.complete().await {
            Ok(()) => Ok(()),
            // Our own answer was lost: the name has the pack, or it has not.
            Err(error) => match target.size(key).await {
                Ok(size) if size == record.size_bytes => Ok(()),
                _ => Err(error.into()),
            },
        };
    };
    if let Err(error) = upload.abort().await {
        tracing::warn!("An upload of {key} was not ended: failed to {}", chain(&error));
    }
    Err(error)
}
