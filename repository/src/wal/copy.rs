//! The WAL archive of a lineage in its mirror: the same objects under the same names. Each is opened at the source before it is
//! stored, so the mirror never has content that its head does not describe.
//!
//! Timelines one after the other and of each the oldest first, one put after the other: wherever a copy ends, the mirror has
//! what its source had at some time. What a collection deleted on either side is not brought back.

use std::collections::HashMap;

use futures::{StreamExt as _, stream};
use proto::LineageId;
use proto::wal::{SegmentName, WalFileName};

use super::archive::Place;
use super::collect::{Start, WalBound, segment_of};
use super::floors::Floors;
use crate::copy::{CopyOptions, Mirror};
use crate::error::Error;
use crate::layout;
use crate::lineage::{AttemptSummary, NOTES_IN_FLIGHT};
use crate::repository::Repository;
use crate::scrub::WalAmount;
use crate::store::{Listed, PutOutcome};

/// Objects in memory: one is stored while the next ones are read.
const OBJECTS_IN_FLIGHT: usize = 3;

/// What a copy of a lineage's WAL archive did.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct WalCopySummary {
    /// What was sent.
    pub sent: WalAmount,
    /// What was there, with the same content.
    pub present: WalAmount,
    /// What a collection at the mirror deleted, or would: no backup there needs it.
    pub needless: WalAmount,
    /// Files that have other content in the mirror. Both sides stay as they are.
    pub conflicts: Vec<String>,
    /// Files that cannot be read at the source, and why. They are not in the mirror.
    pub damaged: Vec<(String, String)>,
}

/// An object of the source.
#[derive(Debug, Clone)]
struct File {
    place: Place,
    /// Its name below the archive.
    name: String,
    bytes: u64,
}

impl File {
    fn of(prefix: &str, (place, object): (Place, Listed)) -> Option<Self> {
        let name = object.key.strip_prefix(prefix)?.to_owned();
        Some(Self { place, name, bytes: object.size_bytes })
    }

    /// The segment that it belongs to.
    fn segment(&self) -> Option<SegmentName> {
        let (Place::File(file) | Place::Conflict(file, _)) = &self.place else { return None };
        segment_of(file)
    }

    /// Timelines in order, a history before its segments, these before what else has their names.
    fn order(&self) -> (u32, u64, u8) {
        let (file, is_aside) = match &self.place {
            Place::File(file) => (file, false),
            Place::Conflict(file, _) => (file, true),
            Place::Floor(..) => return (0, 0, 0),
        };
        let kind = match file {
            _ if is_aside => 3,
            WalFileName::Segment(_) => 0,
            WalFileName::Partial(_) => 1,
            WalFileName::History(_) | WalFileName::BackupLabel(..) => 2,
        };
        (file.timeline().0, segment_of(file).map_or(0, |name| name.rank() + 1), kind)
    }
}

/// What the mirror has under the name of a file.
enum There {
    Same,
    Other,
    /// Bytes that no reader accepts.
    Broken,
    Nothing,
}

impl Mirror {
    /// Copies the WAL archive of a lineage. Idempotent; what an interrupted copy left is taken up. A file of which one side has
    /// other content, or that cannot be read, is told in the summary and hinders no other.
    pub async fn copy_wal(
        &mut self,
        lineage: LineageId,
        options: &CopyOptions,
    ) -> Result<WalCopySummary, Error> {
        let mut summary = WalCopySummary::default();
        let prefix = layout::wal(lineage);
        let source = self.source.list_archived(lineage).await?.0;
        if source.is_empty() {
            return Ok(summary);
        }
        self.copy_lineage(lineage).await?;
        let there = self.target.list_archived(lineage).await?.0;
        let floors_there = Floors::among(there.iter().map(|(place, _)| place));
        // First: what is missing at the mirror because it was collected here is no end of the log there either.
        let floors = Floors::among(source.iter().map(|(place, _)| place));
        if !floors_there.cover(&floors) {
            let why = format!("it was collected in {}", self.source.describe());
            self.target.raise_floors(lineage, &floors, &options.by, &why, options.now_ms).await?;
        }
        let sizes: HashMap<String, u64> =
            there.into_iter().map(|(_, object)| (object.key, object.size_bytes)).collect();
        let files = source.into_iter().filter_map(|object| File::of(&prefix, object));
        let files = files.filter(|file| !matches!(file.place, Place::Floor(..)));
        let (known, missing): (Vec<File>, Vec<File>) =
            files.partition(|file| sizes.contains_key(&(prefix.clone() + &file.name)));

        let mut wanted = Vec::new();
        let compared = known.into_iter().map(|file| async {
            let size = sizes.get(&(prefix.clone() + &file.name)).copied();
            let there = self.compare(lineage, &file, size).await;
            (file, there)
        });
        // Collected first: a stream of borrowing futures is not general enough for a spawned caller.
        let compared: Vec<_> = compared.collect();
        let mut compared = stream::iter(compared).buffered(NOTES_IN_FLIGHT);
        while let Some((file, there)) = compared.next().await {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            match there {
                Ok(There::Same) => summary.present.add(file.bytes),
                Ok(There::Other) => summary.conflicts.push(file.name),
                // What is not there after all may be there when it is sent: only what no reader accepts is replaced.
                Ok(There::Broken) => wanted.push((file, true)),
                Ok(There::Nothing) => wanted.push((file, false)),
                Err(Error::Damaged { reason, .. }) => summary.damaged.push((file.name, reason)),
                Err(error) => return Err(error),
            }
        }
        // Only what a collection there may have deleted can be needless there.
        let is_below = |file: &File| file.segment().is_some_and(|name| floors_there.is_below(name));
        let needed_from = if missing.iter().any(is_below) {
            self.target.wal_needed_from(lineage).await?
        } else {
            None
        };
        let is_needed = |file: &File| {
            let rank = file.segment().map(SegmentName::rank);
            needed_from.is_none_or(|from| rank.is_none_or(|rank| rank >= from))
        };
        for file in missing {
            if is_below(&file) && !is_needed(&file) {
                summary.needless.add(file.bytes);
            } else {
                wanted.push((file, false));
            }
        }
        wanted.sort_by_cached_key(|(file, _)| (file.order(), file.name.clone()));
        self.send_files(lineage, wanted, &mut summary, options).await?;
        Ok(summary)
    }

    /// Sends files in their order. Those that are to be replaced are there, and no reader accepts them.
    async fn send_files(
        &self,
        lineage: LineageId,
        wanted: Vec<(File, bool)>,
        summary: &mut WalCopySummary,
        options: &CopyOptions,
    ) -> Result<(), Error> {
        let read = wanted.into_iter().map(|(file, replaces)| async move {
            let object = self.source.get_sealed(lineage, &file.name).await;
            (file, replaces, object)
        });
        let read: Vec<_> = read.collect();
        let mut read = stream::iter(read).buffered(OBJECTS_IN_FLIGHT);
        while let Some((file, replaces, object)) = read.next().await {
            if options.cancel.is_cancelled() {
                return Err(Error::Cancelled);
            }
            let object = match object {
                Ok(Some(object)) => object,
                // A collection was here since it was listed.
                Ok(None) => continue,
                Err(Error::Damaged { reason, .. }) => {
                    summary.damaged.push((file.name, reason));
                    continue;
                }
                Err(error) => return Err(error),
            };
            let (key, size) = (layout::wal(lineage) + &file.name, object.len() as u64);
            if replaces {
                // At once: between a deletion and a put it would look like the end of the log.
                self.target.store.put(&key, object).await?;
            } else {
                let put = self.target.store.put_if_absent(&key, object).await;
                if !matches!(put, Ok(PutOutcome::Created)) {
                    // Another copy was faster, or our own answer was lost.
                    match (self.compare(lineage, &file, Some(size)).await?, put) {
                        (There::Same, _) => {}
                        (There::Other, _) => {
                            summary.conflicts.push(file.name);
                            continue;
                        }
                        (_, Err(unheard)) => return Err(unheard.into()),
                        (_, Ok(_)) => return Err(Error::Missing { key }),
                    }
                }
            }
            options.progress.add_stored(size);
            summary.sent.add(size);
        }
        Ok(())
    }

    /// Holds what the mirror has under the name of a file against it, by what their first bytes say of their content; whole
    /// when it has another size. Damage of the source is an error.
    async fn compare(
        &self,
        lineage: LineageId,
        file: &File,
        size: Option<u64>,
    ) -> Result<There, Error> {
        let Some(ours) = self.source.head_of(lineage, &file.name).await? else {
            // A collection was here since it was listed; what is there may be needed there.
            return Ok(There::Same);
        };
        let there = match self.target.head_of(lineage, &file.name).await {
            Ok(Some(theirs)) if theirs != ours => return Ok(There::Other),
            Ok(Some(_)) if size == Some(file.bytes) => return Ok(There::Same),
            Ok(Some(_)) => self.target.get_sealed(lineage, &file.name).await,
            Ok(None) => return Ok(There::Nothing),
            Err(error) => Err(error),
        };
        match there {
            Ok(Some(_)) => Ok(There::Same),
            Ok(None) => Ok(There::Nothing),
            Err(Error::Damaged { .. }) => Ok(There::Broken),
            Err(error) => Err(error),
        }
    }
}

impl Repository {
    /// Below which rank no backup that is there needs WAL; `None` when that is not certain.
    async fn wal_needed_from(&self, lineage: LineageId) -> Result<Option<u64>, Error> {
        let read = async {
            let backups = self.list_backups(lineage).await?;
            let backups = backups.iter().filter_map(AttemptSummary::backup).collect();
            self.read_facts(lineage, backups).await
        };
        match read.await {
            Ok(read) => {
                let starts = read.into_iter().map(|(backup, facts)| (backup, Start::of(&facts)));
                Ok(WalBound::by(starts).rank())
            }
            Err(Error::Damaged { .. } | Error::Missing { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }
}
