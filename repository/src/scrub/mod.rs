//! Looking after a whole repository: from a listing alone down to every frame of every pack.
//!
//! It repairs nothing. What it finds wrong in a pack of file content it marks, if it may, so that the next backup stores
//! that content again (`marks`). Of one backup: `check`.

mod keys;
mod names;
mod notes;
mod packs;
mod survey;
mod wal;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proto::{AttemptId, BackupId, ClusterName, LineageId};
use tokio_util::sync::CancellationToken;

use self::names::{Name, Part};
use self::survey::Needed;
use crate::collect::{Amount, Open};
use crate::error::Error;
use crate::layout;
use crate::pack::PackId;
use crate::progress::Progress;
use crate::record::Identity;
use crate::repository::Repository;
use crate::slice::Slice;
use crate::store::Listed;

pub use self::wal::WalAmount;

/// How deep a check of a repository goes. Each level includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckLevel {
    /// By listing, and by the verdicts and manifests that say what must be there.
    Inventory,
    /// Every note is authentic, and the metadata of every backup opens and is consistent.
    Manifest,
    /// The packs of the slice have the digests that their manifests remember.
    Read,
    /// Every frame of the slice's packs opens and unpacks, and everything referred to is in it.
    Decrypt,
}

/// How a repository is checked.
#[derive(Debug, Clone)]
pub struct ScrubOptions {
    /// How deep.
    pub level: CheckLevel,
    /// Which packs are read; listings, notes and metadata are looked at whole each time.
    pub slice: Slice,
    /// Only the lineages of this cluster; nothing outside them is looked at then.
    pub cluster: Option<ClusterName>,
    /// Who checks: stands in the marks of damaged packs. `None` writes nothing into the repository.
    pub mark: Option<String>,
    /// The checker's clock, Unix milliseconds.
    pub now_ms: i64,
    /// An attempt that is open for longer is named.
    pub open_for_ms: i64,
    /// Packs read in parallel.
    pub processes: usize,
    /// Counters to be read while it runs.
    pub progress: Arc<Progress>,
    /// Bytes of packs that are to be read, as far as it is known.
    pub to_read: Arc<AtomicU64>,
    /// Ends it early.
    pub cancel: CancellationToken,
}

/// An attempt that is open for two days is dead, or its verdict is gone.
const OPEN_FOR_MS: i64 = 48 * 3_600_000;

impl ScrubOptions {
    /// Everything at this level, two packs at a time, marking nothing.
    pub fn new(level: CheckLevel, now_ms: i64) -> Self {
        Self {
            level,
            slice: Slice::WHOLE,
            cluster: None,
            mark: None,
            now_ms,
            open_for_ms: OPEN_FOR_MS,
            processes: 2,
            progress: Arc::default(),
            to_read: Arc::default(),
            cancel: CancellationToken::new(),
        }
    }

    /// Whether a pack is read.
    fn reads(&self, pack: PackId) -> bool {
        self.level >= CheckLevel::Read && self.slice.has(pack)
    }
}

/// What a check of a repository has found.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct ScrubReport {
    /// What was looked at.
    pub lineages: Vec<ScrubbedLineage>,
    /// What is wrong.
    pub damaged: Vec<Damage>,
    /// Objects that are not of this format.
    pub foreign: Vec<String>,
    /// Why damaged packs were not marked, though they should have been.
    pub not_marked: Option<String>,
}

impl ScrubReport {
    /// Nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty()
    }
}

/// What was looked at of one lineage.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ScrubbedLineage {
    /// The lineage.
    pub lineage: LineageId,
    /// Its cluster; unknown when its identity cannot be read.
    pub cluster: Option<ClusterName>,
    /// Backups whose manifest was opened.
    pub backups: u64,
    /// What they need.
    pub needed: Amount,
    /// Packs that no backup needs: garbage, or of a backup that is being written.
    pub unreferenced: Amount,
    /// Packs that were read.
    pub read: Amount,
    /// Frames that were opened.
    pub frames: u64,
    /// Files of the WAL archive.
    pub wal: WalAmount,
    /// Attempts that have been open for too long.
    pub open: Vec<Open>,
    /// Lists of collections that have not finished.
    pub interrupted: Vec<String>,
}

/// One object that is not what it must be.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Damage {
    /// Its key.
    pub object: String,
    /// What is wrong with it.
    pub what: String,
    /// The lineage it belongs to.
    pub lineage: Option<LineageId>,
    /// The cluster of that lineage.
    pub cluster: Option<ClusterName>,
    /// Backups that need it, and may not restore whole.
    pub backups: Vec<BackupId>,
}

/// What is wrong with which object. Only the first thing that was found wrong with each.
type Faults = BTreeMap<String, String>;

fn blame(faults: &mut Faults, object: impl Into<String>, what: impl Into<String>) {
    faults.entry(object.into()).or_insert_with(|| what.into());
}

/// The objects of one lineage, as they were listed.
#[derive(Debug, Default)]
struct Found {
    identity: Option<u64>,
    attempts: BTreeMap<AttemptId, BTreeMap<String, u64>>,
    packs: HashMap<PackId, u64>,
    marks: BTreeSet<PackId>,
    /// Runs of collectors: their objects' names and sizes.
    runs: BTreeMap<String, BTreeMap<String, u64>>,
    /// Files of the WAL archive, by their names below it.
    wal: BTreeMap<String, u64>,
    /// Notes that say below which segment WAL may have been deleted, and their sizes.
    floors: BTreeMap<String, u64>,
    /// Notes of copies, by their last names, and their sizes.
    copies: BTreeMap<String, u64>,
}

impl Repository {
    /// Checks every lineage, one after the other. Damage is told in `report`, which holds what was found so far also when
    /// this fails: when the store does not answer, or a listing is not whole.
    ///
    /// Holds in memory the listing (some 200 bytes an object), of one lineage 200 bytes a pack, 24 a shard and 16 a frame of
    /// the slice, and for each process one request of 8 MiB.
    pub async fn scrub(
        &self,
        options: &ScrubOptions,
        report: &mut ScrubReport,
    ) -> Result<(), Error> {
        let mut faults = Faults::new();
        let listed = until(options, self.look_around(options, report, &mut faults)).await;
        report.damaged.extend(faults.into_iter().map(|(object, what)| Damage {
            object,
            what,
            lineage: None,
            cluster: None,
            backups: Vec::new(),
        }));
        for (lineage, found) in listed? {
            self.scrub_lineage(lineage, found, options, report).await?;
        }
        Ok(())
    }

    /// Lists everything and sorts it by lineage.
    async fn look_around(
        &self,
        options: &ScrubOptions,
        report: &mut ScrubReport,
        faults: &mut Faults,
    ) -> Result<BTreeMap<LineageId, Found>, Error> {
        let objects = match &options.cluster {
            None => self.store.list("").await?,
            Some(cluster) => self.list_cluster(cluster, faults).await?,
        };
        let mut lineages: BTreeMap<LineageId, Found> = BTreeMap::new();
        let mut to_read = 0;
        for Listed { key, size_bytes } in objects {
            let (lineage, part) = match names::parse(&key) {
                Name::Top => continue,
                Name::Foreign => {
                    report.foreign.push(key);
                    continue;
                }
                Name::Of(lineage, part) => (lineage, part),
            };
            let found = lineages.entry(lineage).or_default();
            match part {
                Part::Identity => found.identity = Some(size_bytes),
                Part::Attempt(attempt, name) => {
                    found.attempts.entry(attempt).or_default().insert(name, size_bytes);
                }
                Part::Pack(pack) => {
                    to_read += if options.reads(pack) { size_bytes } else { 0 };
                    found.packs.insert(pack, size_bytes);
                }
                Part::Mark(pack) => {
                    found.marks.insert(pack);
                }
                Part::Run(run, name) => {
                    found.runs.entry(run).or_default().insert(name, size_bytes);
                }
                Part::Wal(place) => {
                    let is_read = options.reads(wal::slice_id(&place));
                    to_read += if is_read { size_bytes } else { 0 };
                    found.wal.insert(place, size_bytes);
                }
                Part::Floor(place) => {
                    found.floors.insert(place, size_bytes);
                }
                Part::Copies(name) => {
                    found.copies.insert(name, size_bytes);
                }
                Part::Pin => {}
            }
        }
        options.to_read.store(to_read, Ordering::Relaxed);
        if options.cluster.is_none() {
            self.look_at_keys(faults).await?;
        }
        Ok(lineages)
    }

    /// The objects of every lineage that is, or was, of a cluster.
    async fn list_cluster(
        &self,
        cluster: &ClusterName,
        faults: &mut Faults,
    ) -> Result<Vec<Listed>, Error> {
        let mut objects = Vec::new();
        for name in self.store.list_directories(layout::LINEAGES).await? {
            let Ok(lineage) = name.parse::<LineageId>() else { continue };
            match self.identity(lineage).await {
                Ok(identity) if identity.cluster == *cluster => {
                    objects.append(&mut self.store.list(&layout::lineage(lineage)).await?);
                }
                Ok(_) | Err(Error::LineageUnknown { .. }) => {}
                // It may be the one that was asked for.
                Err(Error::Damaged { key, reason }) => blame(faults, key, reason),
                Err(error) => return Err(error),
            }
        }
        Ok(objects)
    }

    async fn scrub_lineage(
        &self,
        lineage: LineageId,
        found: Found,
        options: &ScrubOptions,
        report: &mut ScrubReport,
    ) -> Result<(), Error> {
        let mut row = ScrubbedLineage {
            lineage,
            cluster: None,
            backups: 0,
            needed: Amount::default(),
            unreferenced: Amount::default(),
            read: Amount::default(),
            frames: 0,
            wal: wal::amount(&found.wal),
            open: Vec::new(),
            interrupted: Vec::new(),
        };
        let (mut faults, mut needed) = (Faults::new(), Needed::default());
        let mut ended = {
            let mut survey = survey::Survey {
                repository: self,
                options,
                lineage,
                found: &found,
                row: &mut row,
                faults: &mut faults,
                needed: &mut needed,
            };
            until(options, survey.run()).await
        };
        let needed = Arc::new(needed);
        if ended.is_ok() && options.level >= CheckLevel::Read {
            let read = packs::read(self, lineage, options, &needed, &faults).await;
            row.read = read.read;
            row.frames = read.frames;
            ended = read.ended;
            let marked = self.follow(lineage, options, &needed, &found, &read.seen).await;
            for (pack, what) in read.seen.wrong {
                blame(&mut faults, layout::pack(lineage, pack), what);
            }
            match marked {
                Ok(()) => {}
                Err(error) => {
                    let why = proto::failure::chain(&error);
                    report.not_marked.get_or_insert(why);
                }
            }
        }
        if ended.is_ok() && options.level >= CheckLevel::Read {
            ended =
                until(options, wal::read(self, lineage, options, &found.wal, &mut faults)).await;
        }
        for (object, what) in faults {
            let backups = match names::parse(&object) {
                Name::Of(_, Part::Pack(pack)) => needed.by(pack),
                Name::Of(_, Part::Attempt(attempt, name))
                    if name == "manifest" || name == "verdict" =>
                {
                    vec![attempt.into()]
                }
                _ => Vec::new(),
            };
            let (lineage, cluster) = (Some(lineage), row.cluster.clone());
            report.damaged.push(Damage { object, what, lineage, cluster, backups });
        }
        report.lineages.push(row);
        ended
    }

    /// Marks what reading showed to be damaged, and takes the mark from what opened whole.
    async fn follow(
        &self,
        lineage: LineageId,
        options: &ScrubOptions,
        needed: &Needed,
        found: &Found,
        seen: &packs::SeenPacks,
    ) -> Result<(), Error> {
        let Some(by) = &options.mark else { return Ok(()) };
        for (pack, why) in &seen.wrong {
            // Nothing refers to the WAL of another backup, and writers read metadata before they refer to it.
            if needed.is_content(*pack) {
                let mark =
                    crate::record::Mark { by: by.clone(), why: why.clone(), at_ms: options.now_ms };
                self.mark(lineage, *pack, &mark).await?;
            }
        }
        for pack in &found.marks {
            let gone = !found.packs.contains_key(pack) && !needed.has(*pack);
            if seen.right.contains(pack) || gone {
                self.unmark(lineage, *pack).await?;
            }
        }
        Ok(())
    }
}

/// Whether an identity belongs where it stands.
fn is_own(repository: &Repository, identity: &Identity, lineage: LineageId) -> bool {
    let Identity { cluster, system_identifier, generation, kind, .. } = identity;
    let (cluster, id) = (cluster.as_str(), system_identifier.0);
    identity.lineage == lineage
        && repository.keys.lineage_id(*kind, cluster, id, *generation) == lineage
}

/// Work, or its end when the check is cancelled.
async fn until<T>(
    options: &ScrubOptions,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        biased;
        () = options.cancel.cancelled() => Err(Error::Cancelled),
        done = work => done,
    }
}
