//! What of the archive no backup needs any more, and deleting it. FORMAT.md, section 12, says why the rule is safe.
//!
//! Decided by ranks alone: what stands before the segment in which the oldest backup begins goes, on every timeline. Histories
//! stay for ever, because a server asks for them to find its way.

use std::collections::BTreeMap;

use proto::failure::chain;
use proto::wal::{Segment, SegmentName, WalFileName};
use proto::{BackupFacts, BackupId, LineageId, Lsn, Timeline};

use super::archive::{Place, of_place};
use super::floors::Floors;
use crate::collect::CollectOptions;
use crate::error::Error;
use crate::layout;
use crate::repository::Repository;
use crate::scrub::WalAmount;
use crate::store::Listed;

/// Where a backup begins in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Start {
    lsn: Lsn,
    timeline: Timeline,
    segment_bytes: u32,
}

impl Start {
    /// `None` of a logical backup, which needs no WAL.
    pub(crate) fn of(facts: &BackupFacts) -> Option<Self> {
        facts.kind().is_physical().then_some(Self {
            lsn: facts.start_lsn,
            timeline: facts.timeline,
            segment_bytes: facts.wal_segment_size,
        })
    }

    fn segment(self) -> SegmentName {
        Segment::containing(self.lsn, self.timeline, self.segment_bytes).name(self.segment_bytes)
    }
}

/// What decides how much of the archive goes.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum WalBound {
    /// Everything before this segment goes: the oldest backup that stays begins in it.
    Before {
        /// The segment.
        segment: SegmentName,
        /// The backup.
        backup: BackupId,
        /// How long segments are, as every backup says.
        segment_bytes: u32,
    },
    /// Nothing goes: there is no backup that would tell what is needed.
    NoBackup,
    /// Nothing goes: where this backup begins cannot be read, or it needs no WAL though others do.
    Unknown {
        /// The backup.
        backup: BackupId,
    },
    /// Nothing goes: the cluster's segments had another size when this backup was made, so names cannot be compared.
    Sizes {
        /// The backup.
        backup: BackupId,
    },
}

impl WalBound {
    /// By the backups that there will be, oldest first: where each begins, if that could be read.
    pub(crate) fn by(starts: impl Iterator<Item = (BackupId, Option<Start>)>) -> Self {
        let mut oldest: Option<(BackupId, Start)> = None;
        for (backup, start) in starts {
            let Some(start) = start else { return Self::Unknown { backup } };
            oldest = match oldest {
                Some((_, known)) if known.segment_bytes != start.segment_bytes => {
                    return Self::Sizes { backup };
                }
                Some((known_backup, known)) if known.lsn <= start.lsn => {
                    Some((known_backup, known))
                }
                _ => Some((backup, start)),
            };
        }
        oldest.map_or(Self::NoBackup, |(backup, start)| Self::Before {
            segment: start.segment(),
            backup,
            segment_bytes: start.segment_bytes,
        })
    }

    /// What ranks below goes.
    pub(super) fn rank(&self) -> Option<u64> {
        if let Self::Before { segment, .. } = self { Some(segment.rank()) } else { None }
    }
}

/// What a collection would do with the archive of a lineage.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct WalPlan {
    /// What goes.
    pub delete: WalAmount,
    /// What stays.
    pub keep: WalAmount,
    /// Why so much goes and no more.
    pub bound: WalBound,
    /// The last segment of which anything goes.
    pub last: Option<SegmentName>,
    /// Timelines of which nothing goes, though something stands before the bound: none of their segments tells that it has
    /// the size which the backups tell.
    pub untouched: Vec<Timeline>,
}

/// An object of the archive that goes. In order: the oldest first, and of a segment the segment itself last.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Doomed {
    rank: u64,
    timeline: Timeline,
    is_segment: bool,
    key: String,
    bytes: u64,
}

impl Doomed {
    /// The rank of the segment behind the one that it belongs to.
    fn behind(&self, segment_bytes: u32) -> u64 {
        let name = SegmentName::ranked(self.timeline, self.rank);
        let next = name.segment(segment_bytes).map(|segment| segment.next().name(segment_bytes));
        next.map_or(self.rank + 1, SegmentName::rank)
    }
}

/// The archive as it was listed.
#[derive(Debug)]
pub(crate) struct Archived(pub(super) Vec<(Place, Listed)>);

/// The segment that a file belongs to.
pub(super) fn segment_of(file: &WalFileName) -> Option<SegmentName> {
    match file {
        WalFileName::Segment(name)
        | WalFileName::Partial(name)
        | WalFileName::BackupLabel(name, _) => Some(*name),
        WalFileName::History(_) => None,
    }
}

impl Repository {
    /// Lists the archive of a lineage.
    pub(crate) async fn list_archived(&self, lineage: LineageId) -> Result<Archived, Error> {
        let prefix = layout::wal(lineage);
        let named = |object: Listed| Some((of_place(object.key.strip_prefix(&prefix)?)?, object));
        Ok(Archived(self.store.list(&prefix).await?.into_iter().filter_map(named).collect()))
    }

    /// What goes of what was listed, and what stays.
    pub(crate) async fn plan_wal(
        &self,
        lineage: LineageId,
        archived: &Archived,
        bound: WalBound,
    ) -> Result<(WalPlan, Vec<Doomed>), Error> {
        let rank = bound.rank().unwrap_or(0);
        let mut segments: BTreeMap<Timeline, Vec<SegmentName>> = BTreeMap::new();
        for (place, _) in &archived.0 {
            if let Place::File(WalFileName::Segment(name)) = place
                && name.rank() < rank
            {
                segments.entry(name.timeline).or_default().push(*name);
            }
        }
        let mut untouched = Vec::new();
        for (timeline, names) in &segments {
            // What cannot be read is told by checks.
            let size = self.size_of_segments(lineage, names, &mut Vec::new()).await?;
            if !matches!(bound, WalBound::Before { segment_bytes, .. } if segment_bytes == size) {
                untouched.push(*timeline);
            }
        }
        let mut plan = WalPlan {
            delete: WalAmount::default(),
            keep: WalAmount::default(),
            bound,
            last: None,
            untouched,
        };
        let mut doomed = Vec::new();
        for (place, object) in &archived.0 {
            let file = match place {
                Place::File(file) | Place::Conflict(file, _) => file,
                Place::Floor(..) => continue,
            };
            let goes = segment_of(file)
                .filter(|name| name.rank() < rank && !plan.untouched.contains(&name.timeline));
            let Some(name) = goes else {
                plan.keep.add(object.size_bytes);
                continue;
            };
            plan.delete.add(object.size_bytes);
            let is_later =
                |last: SegmentName| (name.rank(), name.timeline) > (last.rank(), last.timeline);
            if plan.last.is_none_or(is_later) {
                plan.last = Some(name);
            }
            doomed.push(Doomed {
                rank: name.rank(),
                timeline: name.timeline,
                is_segment: matches!(place, Place::File(WalFileName::Segment(_))),
                key: object.key.clone(),
                bytes: object.size_bytes,
            });
        }
        doomed.sort_unstable();
        Ok((plan, doomed))
    }

    /// Deletes what was planned and still stands before the bound. One after the other, the oldest first: wherever it ends,
    /// what is left of a line of the log is unbroken. Before anything goes, it is said that it may be gone.
    pub(crate) async fn delete_wal(
        &self,
        lineage: LineageId,
        doomed: Vec<Doomed>,
        bound: &WalBound,
        options: &CollectOptions,
    ) -> Result<WalAmount, Error> {
        let mut deleted = WalAmount::default();
        let WalBound::Before { segment, backup, segment_bytes } = bound else { return Ok(deleted) };
        let rank = segment.rank();
        let goes: Vec<Doomed> = doomed.into_iter().filter(|one| one.rank < rank).collect();
        if goes.is_empty() || options.cancel.is_cancelled() {
            return Ok(deleted);
        }
        let mut floors = Floors::default();
        for one in &goes {
            floors.raise(Some(one.timeline), one.behind(*segment_bytes));
        }
        let why = format!("the oldest backup, {backup}, begins in {segment}");
        self.raise_floors(lineage, &floors, &options.by, &why, options.now_ms).await?;
        for Doomed { key, bytes, is_segment, .. } in goes {
            if options.cancel.is_cancelled() {
                break;
            }
            match self.store.delete(&key).await {
                Ok(()) => deleted.add(bytes),
                // No line of the log is broken by what is no segment of it: it stays, and the next collection tries again.
                Err(error) if !is_segment => {
                    tracing::warn!("{key} stays: failed to {}", chain(&error));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(deleted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn backup(n: u8) -> BackupId {
        proto::AttemptId::mint(u64::from(n), [n; 10]).into()
    }

    fn start(segment: u64, segment_bytes: u32) -> Start {
        Start { lsn: Lsn(segment * MIB + 40), timeline: Timeline(1), segment_bytes }
    }

    fn bound(starts: &[(u8, Option<Start>)]) -> WalBound {
        WalBound::by(starts.iter().map(|(n, start)| (backup(*n), *start)))
    }

    #[test]
    fn the_backup_that_begins_first_decides_whenever_it_was_made() {
        let mib = 1 << 20;
        let starts = [(1, Some(start(9, mib))), (2, Some(start(5, mib))), (3, Some(start(7, mib)))];
        let segment = "000000010000000000000005".parse().unwrap();
        assert_eq!(
            bound(&starts),
            WalBound::Before { segment, backup: backup(2), segment_bytes: mib }
        );
    }

    #[test]
    fn what_is_not_known_of_one_backup_keeps_everything() {
        let mib = 1 << 20;
        assert_eq!(bound(&[]), WalBound::NoBackup);
        let unread = [(1, Some(start(9, mib))), (2, None)];
        assert_eq!(bound(&unread), WalBound::Unknown { backup: backup(2) });
        let resized = [(1, Some(start(9, mib))), (2, Some(start(9, 2 * mib)))];
        assert_eq!(bound(&resized), WalBound::Sizes { backup: backup(2) });
        assert_eq!(bound(&unread).rank(), None);
    }
}
