//! Restoring: first a plan that says what, how much, whether it is all there and whether it fits; then the plan is done.
//!
//! The target holds a marker file from the first write to the last, so that a directory whose restore did not finish is
//! never taken for a good one. What is there already (an unfinished restore, or a directory that may be replaced) is compared
//! unit by unit with the detection hashes, and only what differs is fetched. So nothing has to be remembered for a restore
//! that was interrupted: whatever a crash left is right, or it is fetched again.

mod compare;
mod fetch;
mod marker;
mod places;
mod run;
mod target;
mod tree;
mod walk;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

pub use self::marker::Unfinished;
use crate::check::Inventory;
use crate::error::Error;
use crate::progress::Progress;
use crate::reader::Backup;
use crate::stop::Stop;

/// Where a backup is restored to.
#[derive(Debug, Clone, Default)]
pub struct RestoreTarget {
    /// Becomes the root of the restored tree. Created when missing.
    pub directory: PathBuf,
    /// Directories of the backup whose content goes elsewhere: relative path in the backup to an absolute directory. A
    /// symbolic link stands in their place.
    pub mapping: BTreeMap<Vec<u8>, PathBuf>,
    /// The directory, relative, that receives the WAL the backup brought along; `None` leaves it in the repository.
    pub wal_directory: Option<Vec<u8>>,
    /// What may be there already.
    pub existing: Existing,
    /// What the caller writes there itself.
    pub addition: Option<Addition>,
}

/// Files right below the directory that a restore leaves to its caller: they are written when all else is there and before
/// anything makes the directory look complete, so that no crash leaves one that starts without them.
#[derive(Clone)]
pub struct Addition {
    /// Every name that it makes, changes or removes. What is there under one of them is nobody else's.
    pub names: BTreeSet<Vec<u8>>,
    /// Writes them into the directory. A restore that goes on does it again.
    pub write: Arc<WriteAddition>,
}

/// Writes files into a directory.
pub type WriteAddition = dyn Fn(&Path) -> io::Result<()> + Send + Sync;

impl fmt::Debug for Addition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Addition").field("names", &self.names).finish_non_exhaustive()
    }
}

/// What a restore makes of what is in its target already.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Existing {
    /// An unfinished restore of the same backup goes on. Everything else is refused.
    #[default]
    Resume,
    /// Whatever is there is used where it is right, changed where it is not, and removed where the backup has no such
    /// name. The caller has made sure that it may be.
    Replace {
        /// Names right below the directory that are left alone.
        spare: BTreeSet<Vec<u8>>,
        /// What is in the page cache is believed to be on the disk, too. Without it the disk is read: a restore is often there
        /// because a disk did not keep what it was given.
        believe_cache: bool,
    },
}

/// How often a target that is in use is looked at again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

impl RestoreTarget {
    /// Every directory that receives files, with the path in the backup of what goes there: the root first.
    fn roots(&self) -> impl Iterator<Item = (&[u8], &Path)> {
        let mapped = self.mapping.iter().map(|(path, place)| (path.as_slice(), place.as_path()));
        std::iter::once((&b""[..], self.directory.as_path())).chain(mapped)
    }

    fn spares(&self, path: &[u8]) -> bool {
        matches!(&self.existing, Existing::Replace { spare, .. } if spare.contains(path))
    }

    /// Whether a name that the backup does not have is the caller's addition.
    fn adds(&self, path: &[u8]) -> bool {
        self.addition.as_ref().is_some_and(|addition| addition.names.contains(path))
    }

    /// Waits until no other restore writes into the target, at most `patience`: an attempt that was given up for lost may
    /// need a while to notice it. Whoever restores afterwards makes the plan afterwards, too. `told` is called each time
    /// that the target was found in use.
    pub async fn wait_until_free(
        &self,
        patience: Duration,
        cancel: &CancellationToken,
        told: impl Fn(),
    ) -> Result<(), Error> {
        let busy = || -> Result<bool, Error> {
            let looked = self.roots().map(|(_, directory)| tree::Tree::is_locked(directory));
            looked.reduce(|one, other| Ok(one? || other?)).unwrap_or(Ok(false))
        };
        let waiting = async {
            while busy()? {
                told();
                tokio::select! {
                    () = cancel.cancelled() => return Err(Error::Cancelled),
                    () = tokio::time::sleep(LOOK_AGAIN) => {}
                }
            }
            Ok(())
        };
        tokio::time::timeout(patience, waiting).await.unwrap_or_else(|_| {
            Err(Error::TargetNotEmpty {
                target: self.directory.display().to_string(),
                reason: format!("another restore is still writing there after {patience:?}"),
            })
        })
    }
}

/// How a restore runs.
#[derive(Debug, Clone)]
pub struct RestoreOptions {
    /// Threads that open, decompress and write.
    pub processes: usize,
    /// Counters to be read while it runs.
    pub progress: Arc<Progress>,
    /// Ends it early; the target keeps its marker.
    pub cancel: CancellationToken,
}

impl Default for RestoreOptions {
    fn default() -> Self {
        Self { processes: 2, progress: Arc::default(), cancel: CancellationToken::new() }
    }
}

/// What a restore will do.
#[derive(Debug)]
pub struct RestorePlan {
    backup: Backup,
    target: RestoreTarget,
    /// Files to be written, WAL included.
    pub files: u64,
    /// Directories to be made.
    pub directories: u64,
    /// Bytes to be written.
    pub bytes: u64,
    /// Packs to be read, and what is wrong with them.
    pub inventory: Inventory,
    /// Each file system that is written to.
    pub places: Vec<Place>,
    /// The target holds an unfinished restore, which goes on.
    pub resumes: bool,
    /// What is in the target and not in the backup: it is removed first. Empty unless everything may be replaced.
    pub foreign: Vec<Foreign>,
    /// Every name of the backup, when the target holds something to be compared.
    reuses: Option<Arc<target::Contents>>,
}

/// Something in a target that the backup does not have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Foreign {
    /// Its path as a path of the backup would be.
    name: Vec<u8>,
    /// Where it is.
    pub path: PathBuf,
    /// It and all that is in it.
    pub names: u64,
    /// Bytes of the files among them.
    pub bytes: u64,
}

/// How much of a target is right already.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Bytes that are right on disk.
    pub reused_bytes: u64,
    /// Bytes to be fetched from the repository, neighbours that are fetched along included.
    pub fetch_bytes: u64,
}

/// A directory that receives files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The directory.
    pub directory: PathBuf,
    /// Bytes that go there.
    pub needed_bytes: u64,
    /// Bytes its file system has free, what is there and will be used or removed included. Directories on one file system share it.
    pub available_bytes: u64,
    /// Which file system.
    pub(crate) device: u64,
}

/// What a restore did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestoreSummary {
    /// Files written.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes fetched from the repository.
    pub fetched_bytes: u64,
    /// Bytes that were right on disk already.
    pub reused_bytes: u64,
}

impl Backup {
    /// Looks at everything a restore to `target` needs and touches nothing.
    pub async fn restore_plan(&self, target: RestoreTarget) -> Result<RestorePlan, Error> {
        let inventory = self.check_inventory().await?;
        let stop = Stop::new(&CancellationToken::new(), Handle::current());
        let (backup, wanted) = (self.clone(), target.clone());
        let survey = tokio::task::spawn_blocking(move || target::survey(&backup, &wanted, &stop))
            .await
            .unwrap_or_else(|gone| Err(Error::Bug(format!("planning a restore ended: {gone}"))))?;
        Ok(RestorePlan {
            backup: self.clone(),
            target,
            files: survey.files,
            directories: survey.directories,
            bytes: survey.bytes,
            inventory,
            places: survey.places,
            resumes: survey.resumes,
            foreign: survey.foreign,
            reuses: survey.reuses.map(Arc::new),
        })
    }
}

impl RestorePlan {
    /// Whether the repository has everything and the target has room for it.
    pub fn check(&self) -> Result<(), Error> {
        if let Some(key) = self.inventory.missing.first() {
            return Err(Error::Missing { key: key.clone() });
        }
        if let Some(key) = self.inventory.wrong_size.first() {
            return Err(Error::damaged(key, "it has another size than the manifest says"));
        }
        for place in &self.places {
            let needed_bytes = self
                .places
                .iter()
                .filter(|other| other.device == place.device)
                .map(|other| other.needed_bytes)
                .sum();
            if needed_bytes > place.available_bytes {
                return Err(Error::TargetFull {
                    target: place.directory.display().to_string(),
                    needed_bytes,
                    available_bytes: place.available_bytes,
                });
            }
        }
        Ok(())
    }

    /// Whether the target holds something that may be right already.
    pub fn reuses(&self) -> bool {
        self.reuses.is_some()
    }

    /// Compares what is in the target with the backup and says what would have to be fetched. Reads all of it, touches
    /// nothing.
    pub async fn compare(&self, options: &RestoreOptions) -> Result<Comparison, Error> {
        let (backup, target, options) = (self.backup.clone(), self.target.clone(), options.clone());
        let (cancel, resumes) = (options.cancel.clone(), self.resumes);
        let work = move |stop: &Arc<Stop>| run::compare(&backup, &target, resumes, &options, stop);
        blocking(&cancel, work).await
    }

    /// Restores. On success everything is durable and the marker is gone; on failure the marker stays.
    pub async fn restore(self, options: RestoreOptions) -> Result<RestoreSummary, Error> {
        self.check()?;
        blocking(&options.cancel.clone(), move |stop| run::restore(&self, &options, stop)).await
    }
}

/// Does work that blocks on a thread of its own, until it is done, cancelled, or nobody waits for it any more.
async fn blocking<T: Send + 'static>(
    cancel: &CancellationToken,
    work: impl FnOnce(&Arc<Stop>) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    let stop = Arc::new(Stop::new(cancel, Handle::current()));
    let guard = stop.token().clone().drop_guard();
    let done = tokio::task::spawn_blocking(move || work(&stop))
        .await
        .unwrap_or_else(|gone| Err(Error::Bug(format!("the restore ended: {gone}"))));
    drop(guard);
    done
}
