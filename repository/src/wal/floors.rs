//! What says that archived WAL may have been deleted, so that nobody takes what is missing there for the end of the log.
//!
//! Each timeline has a floor of its own, which stands behind the last file of that timeline that a collection deleted. Behind
//! it nothing was ever deleted, so a timeline that is younger than the collection ends where it ends, also when older ones had
//! come further by then. That something is there under a name counts, whoever wrote it.

use std::collections::BTreeMap;

use proto::wal::SegmentName;
use proto::{LineageId, Timeline};

use super::archive::{Place, of_place};
use crate::error::Error;
use crate::record::Floor;
use crate::repository::{Repository, create};
use crate::store::{Listed, StoreError};
use crate::{layout, note};

/// The floors of an archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Floors {
    /// Before which rank files of any timeline may have been deleted, as earlier programs said it.
    of_all: u64,
    of: BTreeMap<Timeline, u64>,
}

impl Floors {
    /// Those among the objects of an archive.
    pub(super) fn among<'a>(places: impl Iterator<Item = &'a Place>) -> Self {
        let mut floors = Self::default();
        for place in places {
            if let Place::Floor(timeline, rank) = place {
                floors.raise(*timeline, *rank);
            }
        }
        floors
    }

    pub(super) fn raise(&mut self, timeline: Option<Timeline>, rank: u64) {
        let floor = match timeline {
            Some(timeline) => self.of.entry(timeline).or_default(),
            None => &mut self.of_all,
        };
        *floor = rank.max(*floor);
    }

    /// Before which rank files of a timeline may have been deleted; 0 when none was.
    pub(super) fn rank(&self, timeline: Timeline) -> u64 {
        self.of.get(&timeline).copied().unwrap_or(0).max(self.of_all)
    }

    pub(super) fn is_below(&self, name: SegmentName) -> bool {
        name.rank() < self.rank(name.timeline)
    }

    /// Each of them, the one of all timelines first.
    fn each(&self) -> impl Iterator<Item = (Option<Timeline>, u64)> {
        let of_all = (self.of_all > 0).then_some((None, self.of_all));
        of_all.into_iter().chain(self.of.iter().map(|(timeline, rank)| (Some(*timeline), *rank)))
    }

    fn has(&self, timeline: Option<Timeline>, rank: u64) -> bool {
        let floor = match timeline {
            Some(timeline) => self.of.get(&timeline).copied().unwrap_or(0),
            None => self.of_all,
        };
        rank <= floor
    }

    /// Whether nothing of `others` says more.
    pub(super) fn cover(&self, others: &Self) -> bool {
        others.each().all(|(timeline, rank)| self.has(timeline, rank))
    }
}

impl Repository {
    /// Says durably what may have been deleted, and lets go of what said less. Idempotent: of several floors of a timeline the
    /// highest counts. `Ok` means that whoever lists them from now on sees them.
    pub(super) async fn raise_floors(
        &self,
        lineage: LineageId,
        wanted: &Floors,
        by: &str,
        why: &str,
        at_ms: i64,
    ) -> Result<(), Error> {
        let key = |timeline, rank| layout::wal(lineage) + &layout::wal_floor(timeline, rank);
        for (timeline, rank) in wanted.each() {
            let key = key(timeline, rank);
            let floor = Floor { by: by.to_owned(), why: why.to_owned(), at_ms };
            create(self.store.as_ref(), &key, note::write(&self.keys, &key, &floor)?).await?;
        }
        let places = self.list_places_of_floors(lineage).await?;
        let floors = Floors::among(places.iter());
        if let Some((timeline, rank)) =
            wanted.each().find(|(timeline, rank)| !floors.has(*timeline, *rank))
        {
            let reason = format!(
                "it does not list {}, which was just stored: what is deleted now would look like the end of the log",
                key(timeline, rank)
            );
            return Err(StoreError::Unsuitable { reason }.into());
        }
        for place in places {
            if let Place::Floor(timeline, rank) = place
                && floors.has(timeline, rank + 1)
            {
                self.store.delete(&key(timeline, rank)).await?;
            }
        }
        Ok(())
    }

    /// What a collection may have deleted.
    pub(super) async fn list_floors(&self, lineage: LineageId) -> Result<Floors, Error> {
        Ok(Floors::among(self.list_places_of_floors(lineage).await?.iter()))
    }

    async fn list_places_of_floors(&self, lineage: LineageId) -> Result<Vec<Place>, Error> {
        let prefix = layout::wal(lineage);
        let floors = self.store.list(&format!("{prefix}{}", layout::WAL_FLOORS)).await?;
        let place = |object: Listed| of_place(object.key.strip_prefix(&prefix)?);
        Ok(floors.into_iter().filter_map(place).collect())
    }
}
