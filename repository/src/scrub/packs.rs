//! The part of a check that reads packs whole: each once, however many backups need it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use proto::LineageId;
use tokio::runtime::Handle;

use super::survey::{Alive, Need, Needed};
use super::{CheckLevel, Faults, ScrubOptions};
use crate::check::{Look, share};
use crate::collect::Amount;
use crate::error::Error;
use crate::layout;
use crate::pack::PackId;
use crate::repository::Repository;
use crate::stop::Stop;
use crate::store::StoreError;

/// What reading has shown, as far as it got.
#[derive(Debug)]
pub(super) struct Reading {
    pub(super) read: Amount,
    pub(super) frames: u64,
    pub(super) seen: SeenPacks,
    pub(super) ended: Result<(), Error>,
}

#[derive(Debug, Default)]
pub(super) struct SeenPacks {
    pub(super) wrong: BTreeMap<PackId, String>,
    /// Packs that are marked and are right all the same: somebody brought them back.
    pub(super) right: BTreeSet<PackId>,
}

#[derive(Debug, Default)]
struct Results {
    read: Amount,
    frames: u64,
    seen: SeenPacks,
}

/// Reads the packs of the slice that are there with their sizes.
pub(super) async fn read(
    repository: &Repository,
    lineage: LineageId,
    options: &ScrubOptions,
    needed: &Arc<Needed>,
    faults: &Faults,
) -> Reading {
    let stop = Arc::new(Stop::new(&options.cancel, Handle::current()));
    // If the caller drops this future, the threads find out at their next request.
    let guard = stop.token().clone().drop_guard();
    // What is known to be missing or cut is not read; what is only marked is.
    let wanted = |need: &Need| {
        let id = need.record.id;
        options.reads(id) && !faults.contains_key(&layout::pack(lineage, id))
    };
    let wanted: BTreeSet<PackId> =
        needed.packs().filter(|need| wanted(need)).map(|need| need.record.id).collect();
    let results = Arc::new(Mutex::new(Results::default()));
    let ended = {
        let (repository, options) = (repository.clone(), options.clone());
        let (needed, results) = (Arc::clone(needed), Arc::clone(&results));
        tokio::task::spawn_blocking(move || {
            let progress = &options.progress;
            let look = Look { repository: &repository, lineage, progress, stop: &stop };
            let packs = needed.packs().filter(|need| wanted.contains(&need.record.id));
            share(options.processes, &stop, packs, |need| {
                let record = &need.record;
                let seen = match options.level {
                    CheckLevel::Decrypt => look.open(record, &need.frames)?,
                    _ => look.read(record)?,
                };
                let mut results = results.lock().unwrap_or_else(PoisonError::into_inner);
                results.read.add(record.size_bytes);
                results.frames += seen.frames;
                match seen.wrong {
                    Some(why) => drop(results.seen.wrong.insert(record.id, why)),
                    // A mark may say that a frame does not open, which reading alone does not show.
                    None if need.is_marked
                        && options.level == CheckLevel::Decrypt
                        && !need.frames.is_empty() =>
                    {
                        results.seen.right.insert(record.id);
                    }
                    None => {}
                }
                Ok(())
            })
        })
        .await
        .unwrap_or_else(|gone| Err(Error::Bug(format!("the check ended: {gone}"))))
    };
    guard.disarm();
    let Results { read, frames, mut seen } =
        std::mem::take(&mut *results.lock().unwrap_or_else(PoisonError::into_inner));
    let ended = match collected(repository, lineage, needed, &seen).await {
        Ok(collected) => {
            seen.wrong.retain(|pack, _| !collected.contains(pack));
            ended
        }
        Err(error) => ended.and(Err(error)),
    };
    Reading { read, frames, seen, ended }
}

/// Packs that a collector took away meanwhile, together with every backup that needed them.
async fn collected(
    repository: &Repository,
    lineage: LineageId,
    needed: &Needed,
    seen: &SeenPacks,
) -> Result<BTreeSet<PackId>, Error> {
    let mut collected = BTreeSet::new();
    let mut alive = Alive::new(repository, lineage);
    for pack in seen.wrong.keys() {
        match repository.store.size(&layout::pack(lineage, *pack)).await {
            Ok(_) => continue,
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        if !alive.any(needed.by(*pack)).await? {
            collected.insert(*pack);
        }
    }
    Ok(collected)
}
