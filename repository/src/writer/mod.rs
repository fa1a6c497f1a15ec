//! Writing a backup: files through a pipeline of threads, WAL beside them, then the manifest, then the verdict.
//!
//! ```text
//! plan (1) ──jobs──▶ copy (processes) ──results──▶ assemble (1)
//!    └──────────── what is not read ────────────────▶┘      each with its own pack on its way into the store
//! ```
//!
//! A backup exists when [`Written::commit`] says so and not a moment before. Every way out but that one leaves packs that
//! no backup names. The next attempt takes over what a checkpoint tells of them; a later collection of garbage deletes the rest.

mod assemble;
mod checkpoints;
mod copy;
mod needed;
mod plan;
mod previous;
mod source;
mod stream;
mod wal;

use std::collections::{HashMap, HashSet};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use proto::backup::Census;
use proto::{AttemptId, BackupFacts, BackupId, LineageId};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use self::assemble::{Assembled, Assembler, ShardWriter};
use self::checkpoints::Checkpoints;
use self::copy::Copier;
use self::plan::{Outlets, Planner, Reread, Trust};
use self::previous::{Known, Walk};
pub use self::source::{Source, SourceFile};
use self::stream::Uploads;
use self::wal::WalStored;
pub use self::wal::WalWriter;
use crate::attempt::Attempt;
use crate::detect::Detection;
use crate::entry::SourceEntry;
use crate::error::Error;
use crate::layout;
use crate::limits::PACK_BYTES;
use crate::manifest::{Counts, FORMAT, Head, Root};
use crate::pack::{PackId, PackRecord};
use crate::progress::Progress;
use crate::reader::Backup;
use crate::record::{Outcome, Verdict};
use crate::repository::Repository;
use crate::stop::Stop;

/// How a backup is written.
#[derive(Debug, Clone)]
pub struct WriteOptions {
    /// Threads that read, compress and seal.
    pub processes: usize,
    /// How much lower than the caller's the priority of those threads is, 0 to 19 as for nice(1). Linux derives their I/O
    /// priority from it where the process has none of its own (`ionice`).
    pub nice: u8,
    /// zstd's level.
    pub level: i32,
    /// Read every file, whatever its times and its changes say.
    pub full_read: bool,
    /// Files that are read again whatever their times and changes say: something is known to be wrong with them.
    pub read_again: HashSet<Vec<u8>>,
    /// In such a time everything that is taken over unread is read once all the same, a share of it by each backup: what its
    /// times or its changes did not tell is found then.
    pub reread_within: Duration,
    /// Names the node, file system and timeline the files are on. Files are skipped by their times only when the
    /// predecessor has an equal one; `None` reads everything.
    pub continuity: Option<String>,
    /// How often it writes down what it has stored, so that the attempt after it need not store that again if it is
    /// interrupted; less often the longer it takes, and also after every GiB. What is quicker than this and smaller does not.
    pub checkpoint_every: Duration,
    /// A pack is ended when it has grown past this.
    pub pack_bytes: u64,
    /// Counters to be read while it runs.
    pub progress: Arc<Progress>,
    /// Ends it early.
    pub cancel: CancellationToken,
}

impl Default for WriteOptions {
    fn default() -> Self {
        Self {
            processes: 2,
            nice: 0,
            level: 3,
            full_read: false,
            read_again: HashSet::new(),
            reread_within: Duration::from_hours(30 * 24),
            continuity: None,
            checkpoint_every: Duration::from_mins(1),
            pack_bytes: PACK_BYTES,
            progress: Arc::default(),
            cancel: CancellationToken::new(),
        }
    }
}

/// Parts in memory at once beside those the threads are filling.
const PARTS_MAX: usize = 3;
/// Results that may wait for their turn; bounds the memory of everything between plan and assembly.
const CREDITS: usize = 1024;
/// Jobs that wait for a thread.
const JOBS: usize = 64;
/// Stretches of a stream, 8 MiB each, in memory beside those the threads are working on.
const STRETCHES_AHEAD: usize = 2;

/// A backup being written. Dropping it ends its threads and throws its unfinished packs away.
#[derive(Debug)]
pub struct BackupWriter {
    repository: Repository,
    attempt: Attempt,
    options: WriteOptions,
    stop: Arc<Stop>,
    uploads: Arc<Uploads>,
    wal: Arc<Mutex<Vec<WalStored>>>,
    shards: Option<ShardWriter>,
    files: Option<Assembled>,
    reread: Reread,
}

/// A backup that is complete in the repository and not committed.
#[derive(Debug)]
pub struct Written {
    repository: Repository,
    lineage: LineageId,
    attempt: AttemptId,
    root: Arc<Root>,
    predecessor: Option<BackupId>,
    by: String,
    manifest_bytes: u64,
    manifest_blake3: String,
    counts: Counts,
    vanished: u64,
    newest_ms: Option<i64>,
    /// The last checkpoint, which nobody needs once this is a backup.
    checkpoint: Option<u32>,
}

/// A committed backup, for reports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupSummary {
    /// The backup.
    pub backup: BackupId,
    /// Its lineage.
    pub lineage: LineageId,
    /// The backup it was compared with.
    pub predecessor: Option<BackupId>,
    /// How much it is.
    pub counts: Counts,
    /// Packs of earlier backups it refers to.
    pub packs_reused: u64,
    /// Files that vanished while it ran.
    pub vanished: u64,
    /// Bytes of its manifest.
    pub manifest_bytes: u64,
}

impl Attempt {
    /// Starts writing. Must be called inside a tokio runtime, which then carries the uploads.
    pub fn write(self, options: WriteOptions) -> Result<BackupWriter, Error> {
        let repository = self.repository.clone();
        let stop = Arc::new(Stop::new(&options.cancel, Handle::current()));
        let uploads = Arc::new(Uploads::new(
            Arc::clone(&repository.store),
            Arc::clone(&repository.keys),
            self.lineage,
            Arc::clone(&stop),
            Arc::clone(&options.progress),
            PARTS_MAX + options.processes,
            options.pack_bytes,
        ));
        let reread = match &self.predecessor {
            Some(old) => {
                let elapsed_ms = self.intent.began_at_ms.saturating_sub(old.root.head.began_at_ms);
                Reread::since(old.root.head.reread_from, elapsed_ms, options.reread_within)
            }
            None => Reread::NOTHING,
        };
        Ok(BackupWriter {
            repository,
            attempt: self,
            options,
            stop,
            shards: Some(ShardWriter::new(&uploads)?),
            uploads,
            wal: Arc::default(),
            files: None,
            reread,
        })
    }
}

impl BackupWriter {
    /// The attempt being written.
    pub fn attempt(&self) -> &Attempt {
        &self.attempt
    }

    /// What the predecessor counted. It is large where there are many tables, and not kept here any longer.
    pub fn take_predecessors_census(&mut self) -> Option<Census> {
        let old = self.attempt.predecessor.as_mut()?;
        Arc::make_mut(&mut old.root).head.facts.census.take()
    }

    /// Threads that copy.
    pub fn processes(&self) -> usize {
        self.options.processes
    }

    /// Takes WAL while (or before, or after) the files are copied, until [`BackupWriter::finish`] is called.
    pub fn wal(&self) -> WalWriter {
        WalWriter {
            uploads: Arc::clone(&self.uploads),
            stored: Arc::clone(&self.wal),
            level: self.options.level,
        }
    }

    /// Whether a file whose times and size are the predecessor's may be taken over unread.
    pub fn trusts_stamps(&self) -> bool {
        self.compares_stamps() && !self.options.full_read
    }

    /// Whether times and inodes mean what they meant to the predecessor.
    fn compares_stamps(&self) -> bool {
        let old = self.attempt.predecessor.as_ref();
        let continuity = old.and_then(|old| old.root.head.continuity.as_ref());
        continuity.is_some() && continuity == self.options.continuity.as_ref()
    }

    /// Copies the source: every entry once, in the order of [`path_order`](crate::path_order), a directory before what
    /// is in it. To be called once. When it fails, no thread of it is left and its uploads are ended.
    pub async fn copy<I>(&mut self, source: Arc<dyn Source>, entries: I) -> Result<(), Error>
    where
        I: IntoIterator<Item = io::Result<SourceEntry>>,
        I::IntoIter: Send + 'static,
    {
        if self.files.is_some() {
            return Err(Error::Bug("the files of a backup are copied once".into()));
        }
        let predecessor = self.attempt.predecessor.clone();
        let trust = Trust {
            comparable: self.compares_stamps(),
            stamps: self.trusts_stamps(),
            changes: !self.options.full_read,
            reread: self.reread,
            read_again: self.options.read_again.clone(),
            spoilt: Arc::clone(&self.attempt.spoilt),
            interrupted: self.attempt.interrupted.clone(),
        };
        let processes = self.options.processes;
        let checkpoints = Checkpoints::new(
            Arc::clone(&self.uploads),
            self.attempt.id(),
            self.attempt.intent.began_at_ms,
            self.options.checkpoint_every,
            self.attempt.interrupted.clone(),
        );
        let entries = entries.into_iter();
        let files = self
            .pipeline(source, entries, predecessor, trust, processes, Some(checkpoints))
            .await?;
        self.files = Some(files);
        Ok(())
    }

    /// Stores the entries that are read last (and restored last), describes the WAL, stores the manifest and reads it
    /// back. None of `late` may be gone. The backup does not exist before [`Written::commit`].
    pub async fn finish(
        mut self,
        source: Arc<dyn Source>,
        late: Vec<SourceEntry>,
        facts: BackupFacts,
    ) -> Result<Written, Error> {
        let files = self
            .files
            .take()
            .ok_or_else(|| Error::Bug("a backup is finished before its files".into()))?;
        let (reread, read_again) = (Reread::NOTHING, HashSet::new());
        // It is compared with nothing.
        let spoilt = Arc::default();
        let trust = Trust {
            comparable: false,
            stamps: false,
            changes: false,
            reread,
            read_again,
            spoilt,
            interrupted: Vec::new(),
        };
        let mut late = late;
        late.sort_by(|a, b| crate::entry::path_order(&a.path, &b.path));
        let late_names: Vec<String> =
            late.iter().map(|entry| crate::error::show(&entry.path)).collect();
        let late = self.pipeline(source, late.into_iter().map(Ok), None, trust, 1, None).await?;
        if late.vanished > 0 {
            return Err(Error::Source {
                path: late_names.join(", "),
                source: io::Error::new(io::ErrorKind::NotFound, "one of these is gone"),
            });
        }
        let stored = std::mem::take(&mut *self.wal.lock().unwrap_or_else(PoisonError::into_inner));
        let mut shards = self.shards.take().ok_or_else(ended)?;
        let described = tokio::task::spawn_blocking(move || {
            let described = wal::describe(stored, &mut shards)?;
            shards.close()?;
            Ok(described)
        })
        .await
        .unwrap_or_else(|gone| Err(Error::Bug(format!("describing WAL ended: {gone}"))));
        let (wal, wal_records, wal_files) = match described {
            Ok(described) => described,
            Err(error) => return Err(self.failed(error).await),
        };
        let mut records = self.uploads.settle().await?;
        records.extend(wal_records);
        let root = self.root(files, late, wal, wal_files, records, facts)?;
        let (root, stored) = {
            let repository = self.repository.clone();
            let root = Arc::new(root);
            let stored = repository.put_manifest(&root).await?;
            (root, stored)
        };
        Ok(Written {
            repository: self.repository.clone(),
            lineage: root.head.lineage,
            attempt: root.head.attempt,
            predecessor: root.head.predecessor,
            root: Arc::clone(&root),
            by: self.attempt.intent.by.clone(),
            manifest_bytes: stored.0,
            manifest_blake3: stored.1,
            counts: root.head.counts,
            vanished: self.options.progress.snapshot().vanished,
            newest_ms: self.attempt.newest_ms,
            checkpoint: self.uploads.last_checkpoint(),
        })
    }

    fn root(
        &self,
        files: Assembled,
        late: Assembled,
        wal: Vec<crate::manifest::RootShard>,
        wal_files: u64,
        records: Vec<PackRecord>,
        facts: BackupFacts,
    ) -> Result<Root, Error> {
        let added: HashMap<PackId, PackRecord> =
            records.into_iter().map(|record| (record.id, record)).collect();
        let old = self.attempt.predecessor.as_ref();
        let interrupted = &self.attempt.interrupted;
        let references =
            files.shards.iter().chain(&late.shards).chain(&wal).map(|root| &root.shard);
        let mut packs = HashMap::new();
        for id in assemble::reached(references) {
            let record = added
                .get(&id)
                .or_else(|| old.and_then(|old| old.root.packs.get(&id)))
                .or_else(|| interrupted.iter().find_map(|interrupted| interrupted.packs.get(&id)))
                .ok_or_else(|| Error::Bug(format!("pack {id} is needed and was never stored")))?;
            packs.insert(id, record.clone());
        }
        let counts = Counts {
            files: files.counts.files + late.counts.files,
            directories: files.counts.directories + late.counts.directories,
            symlinks: files.counts.symlinks + late.counts.symlinks,
            bytes: files.counts.bytes + late.counts.bytes,
            stored_bytes: added.values().map(|record| record.size_bytes).sum(),
            packs_added: packs.keys().filter(|id| added.contains_key(id)).count() as u64,
            packs: packs.len() as u64,
            wal_files,
        };
        let head = Head {
            format: FORMAT,
            repository: self.repository.id(),
            lineage: self.attempt.lineage,
            attempt: self.attempt.id(),
            predecessor: self.attempt.predecessor(),
            writer: concat!("pgmuster ", env!("CARGO_PKG_VERSION")).to_owned(),
            began_at_ms: self.attempt.intent.began_at_ms,
            continuity: self.options.continuity.clone(),
            reread_from: self.reread.next(),
            counts,
            facts,
        };
        Ok(Root { head, packs: Arc::new(packs), shards: files.shards, late: late.shards, wal })
    }

    /// Runs plan, copy and assembly on threads of their own and waits for all of them.
    async fn pipeline(
        &mut self,
        source: Arc<dyn Source>,
        entries: impl Iterator<Item = io::Result<SourceEntry>> + Send + 'static,
        predecessor: Option<Backup>,
        trust: Trust,
        processes: usize,
        mut checkpoints: Option<Checkpoints>,
    ) -> Result<Assembled, Error> {
        let mut shards = self.shards.take().ok_or_else(ended)?;
        let uploads = Arc::clone(&self.uploads);
        let threads = Threads {
            processes: processes.max(1),
            nice: self.options.nice,
            level: self.options.level,
            lineage: self.attempt.lineage,
        };
        // If the caller drops this future, the threads find out at their next step.
        let guard = self.stop.token().clone().drop_guard();
        let done = tokio::task::spawn_blocking(move || {
            let done = run_threads(
                &uploads,
                source.as_ref(),
                entries,
                predecessor,
                trust,
                threads,
                (&mut shards, checkpoints.as_mut()),
            );
            done.map(|assembled| (assembled, shards))
        })
        .await
        .unwrap_or_else(|gone| Err(Error::Bug(format!("the copy ended: {gone}"))));
        match done {
            Ok((assembled, shards)) => {
                guard.disarm();
                self.shards = Some(shards);
                Ok(assembled)
            }
            Err(error) => Err(self.failed(error).await),
        }
    }

    /// Ends everything after a failure; returns what really happened.
    async fn failed(&mut self, error: Error) -> Error {
        self.shards = None;
        self.stop.fail(error);
        match self.uploads.settle().await {
            Err(cause) if !matches!(cause, Error::Cancelled) => cause,
            _ => self.stop.cause(),
        }
    }
}

impl Drop for BackupWriter {
    fn drop(&mut self) {
        self.stop.token().cancel();
    }
}

fn ended() -> Error {
    Error::Bug("a backup is written on after it failed".into())
}

/// The threads of one copy.
#[derive(Debug, Clone, Copy)]
struct Threads {
    processes: usize,
    nice: u8,
    level: i32,
    lineage: LineageId,
}

fn run_threads(
    uploads: &Arc<Uploads>,
    source: &dyn Source,
    entries: impl Iterator<Item = io::Result<SourceEntry>> + Send,
    predecessor: Option<Backup>,
    trust: Trust,
    threads: Threads,
    (shards, checkpoints): (&mut ShardWriter, Option<&mut Checkpoints>),
) -> Result<Assembled, Error> {
    let stop = uploads.stop.as_ref();
    let progress = uploads.progress.as_ref();
    let (credits, put_away) = crossbeam_channel::bounded(CREDITS);
    let (events, results) = crossbeam_channel::bounded(CREDITS);
    let (jobs, work) = crossbeam_channel::bounded(JOBS);
    let assembled = std::thread::scope(|scope| {
        let mut running = Vec::with_capacity(threads.processes + 1);
        for n in 0..threads.processes {
            let (work, events) = (work.clone(), events.clone());
            let spoilt = Arc::clone(&trust.spoilt);
            // The ends of the channels outlive the work: whoever finds nobody there must not be the first to tell of an end,
            // which then has no cause.
            let body = move || {
                guarded(stop, || {
                    step_back(threads.nice);
                    let detection = Detection(uploads.keys.detection(threads.lineage));
                    let level = threads.level;
                    Copier::new(source, uploads, detection, spoilt, level, &events)?.run(&work)
                });
            };
            running.push(spawn(scope, stop, format!("copy-{n}"), body));
        }
        drop(work);
        let walk = predecessor.map(|backup| Walk::new(Known::Backup(backup)));
        let stretches_max = threads.processes + STRETCHES_AHEAD;
        running.push(spawn(scope, stop, "plan".to_owned(), move || {
            let outlets = Outlets { credits, jobs, events };
            guarded(stop, || {
                Planner::new(source, walk, trust, stop, progress, &outlets, stretches_max)
                    .run(entries)
            });
        }));
        let mut assembled = None;
        guarded(stop, || {
            let assembler = Assembler::new(stop, progress, shards, checkpoints);
            assembled = Some(assembler.run(&results, &put_away)?);
            Ok(())
        });
        // Whoever still sends finds nobody listening and ends.
        drop((results, put_away));
        // The scope waits for their work only; this waits until they are gone. A panic was caught where it happened.
        for thread in running.into_iter().flatten() {
            let _ = thread.join();
        }
        assembled
    });
    stop.check()?;
    assembled.ok_or(Error::Cancelled)
}

/// Lowers the priority of the calling thread alone: on Linux a priority belongs to a thread. Everybody may do that.
fn step_back(nice: u8) {
    let thread = rustix::thread::gettid();
    let lowered = rustix::process::getpriority_process(Some(thread)).and_then(|now| {
        rustix::process::setpriority_process(Some(thread), now.saturating_add(i32::from(nice)))
    });
    if let Err(error) = lowered {
        tracing::debug!(%error, "The priority of a thread stays as it was");
    }
}

fn spawn<'scope>(
    scope: &'scope std::thread::Scope<'scope, '_>,
    stop: &Stop,
    name: String,
    body: impl FnOnce() + Send + 'scope,
) -> Option<std::thread::ScopedJoinHandle<'scope, ()>> {
    let spawned = std::thread::Builder::new().name(name).spawn_scoped(scope, body);
    spawned
        .map_err(|source| {
            stop.fail(Error::Source { path: "a thread for the copy".into(), source });
        })
        .ok()
}

/// Runs one thread's work; its failure, or a panic in the caller's code, ends the others.
fn guarded(stop: &Stop, work: impl FnOnce() -> Result<(), Error>) {
    match catch_unwind(AssertUnwindSafe(work)) {
        Ok(Ok(())) => {}
        Ok(Err(error)) => stop.fail(error),
        Err(_) => stop.fail(Error::Bug("a thread of the copy panicked".into())),
    }
}

impl Written {
    /// How much it is.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// What was written, to be looked at before it is a backup: everything is read from the store.
    pub fn read_back(&self) -> Backup {
        Backup::new(self.repository.clone(), Arc::clone(&self.root))
    }

    /// Makes it a backup, unless somebody aborted the attempt first, or a pack it needs is not in the store any more.
    /// `now_ms` stands in the verdict. It comes behind every backup that was there when it began, also where a clock was wrong.
    pub async fn commit(self, now_ms: i64) -> Result<BackupSummary, Error> {
        let order_ms = self.newest_ms.map(|newest| newest.saturating_add(1));
        let order_ms = order_ms.filter(|order_ms| *order_ms > now_ms);
        self.repository.require_all(&self.root).await?;
        let outcome = Outcome::Commit {
            manifest_bytes: self.manifest_bytes,
            manifest_blake3: self.manifest_blake3.clone(),
            counts: self.counts,
        };
        let verdict = Verdict {
            attempt: self.attempt,
            outcome,
            by: self.by.clone(),
            at_ms: now_ms,
            order_ms,
        };
        self.repository.put_commit(self.lineage, verdict).await?;
        if let Some(number) = self.checkpoint {
            let key = layout::checkpoint(self.lineage, self.attempt, number);
            // A collection takes what is left.
            if let Err(error) = self.repository.store.delete(&key).await {
                tracing::debug!("{key} stays until a collection: {error}");
            }
        }
        Ok(BackupSummary {
            backup: self.attempt.into(),
            lineage: self.lineage,
            predecessor: self.predecessor,
            counts: self.counts,
            packs_reused: self.counts.packs.saturating_sub(self.counts.packs_added),
            vanished: self.vanished,
            manifest_bytes: self.manifest_bytes,
        })
    }
}
