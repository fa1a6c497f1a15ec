//! Archived WAL that a proof could not replay: which recoveries need it, and what shows that it is whole again.
//!
//! Such a failure is not one of the backup that the proof began with, and no proof of a backup alone makes it good. It ends the
//! line for every backup that has to be recovered through it, until a recovery got past it. A backup that begins behind it does
//! not need it.

use proto::message::WalStanding;
use proto::{LineageId, Lsn, Timeline};
use serde::{Deserialize, Serialize};

use crate::reach::{BackupEnd, is_on_the_way};

/// Stretches that are remembered of one cluster. Each was found by a proof of its own.
const STRETCHES_MAX: usize = 64;

/// A stretch of WAL that could not be replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct BrokenStretch {
    /// Whose WAL.
    pub lineage: LineageId,
    /// Of which timeline.
    pub timeline: Timeline,
    /// A recovery that gets beyond this position has replayed it.
    pub from: Lsn,
    /// A backup that begins here or later does not need it.
    pub to: Lsn,
    /// When that was seen, Unix milliseconds.
    pub at_ms: i64,
}

/// A recovery along archived WAL that a proof was seen to end where it was to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Replay {
    /// Whose WAL.
    pub lineage: LineageId,
    /// The timeline that it followed.
    pub timeline: Timeline,
    /// Where the WAL of its backup begins.
    pub from: Lsn,
    /// The end of what it replayed.
    pub to: Lsn,
    /// The last commit that it replayed, Unix milliseconds.
    pub last_commit_ms: Option<i64>,
    /// When it ended, Unix milliseconds.
    pub at_ms: i64,
}

impl Replay {
    /// Whether a server went the way of this recovery, as far as its archive tells: what was replayed along a branch that a
    /// server left is no past of that server.
    pub(crate) fn is_past_of(&self, wal: &WalStanding) -> bool {
        wal.lineage != self.lineage || is_on_the_way(self.timeline, self.to, wal)
    }

    /// Whether what it replayed is still there, as far as the end of the archive tells: what an archive has lost since, nobody
    /// replays again. What the backup brought along is there whatever the archive has.
    pub(crate) fn is_still_there(&self, end: &BackupEnd, wal: &WalStanding) -> bool {
        let is_brought = self.timeline == end.timeline && self.to <= end.wal_to;
        let is_lost = wal.lineage == self.lineage
            && wal.timeline == self.timeline
            && self.to > wal.archived_to;
        is_brought || !is_lost
    }

    /// Whether it needed the stretch.
    pub(crate) fn goes_through(&self, stretch: &BrokenStretch) -> bool {
        self.lineage == stretch.lineage && self.from < stretch.to && self.to > stretch.from
    }
}

impl BrokenStretch {
    /// Whether a recovery from a backup to where a server is has to replay this. Where nobody knows where the server is, it does.
    pub fn is_in_the_way(&self, backup: &BackupEnd, wal: Option<&WalStanding>) -> bool {
        self.lineage == backup.lineage && backup.start_lsn < self.to && !self.is_abandoned(wal)
    }

    /// Whether it lies on a branch that the server left, as far as its archive tells.
    pub fn is_abandoned(&self, wal: Option<&WalStanding>) -> bool {
        wal.is_some_and(|wal| {
            wal.lineage != self.lineage || !is_on_the_way(self.timeline, self.from, wal)
        })
    }

    /// Whether a later recovery shows that it can be replayed. One that followed another timeline does where the archive
    /// tells that the timeline came this way.
    fn is_made_good_by(&self, replay: &Replay, wal: Option<&WalStanding>) -> bool {
        let came_this_way = self.timeline == replay.timeline
            || wal.is_some_and(|wal| {
                wal.lineage == self.lineage
                    && wal.timeline == replay.timeline
                    && is_on_the_way(self.timeline, self.from, wal)
            });
        replay.at_ms > self.at_ms && replay.goes_through(self) && came_this_way
    }
}

/// The stretch that a recovery from a backup to where a server is cannot get past, the first one where there are several.
pub fn in_the_way<'a>(
    broken: &'a [BrokenStretch],
    backup: &BackupEnd,
    wal: Option<&WalStanding>,
) -> Option<&'a BrokenStretch> {
    let stretches = broken.iter().filter(|stretch| stretch.is_in_the_way(backup, wal));
    stretches.min_by_key(|stretch| stretch.from)
}

/// What is known to be broken after another proof: the stretch that it found, or what was known before and it did not get
/// past.
pub fn after(
    mut known: Vec<BrokenStretch>,
    found: Option<BrokenStretch>,
    replay: Option<&Replay>,
    wal: Option<&WalStanding>,
) -> Vec<BrokenStretch> {
    if let Some(replay) = replay {
        known.retain(|stretch| !stretch.is_made_good_by(replay, wal));
    }
    if let Some(found) = found {
        let is_same = |stretch: &BrokenStretch| {
            let at = |one: &BrokenStretch| (one.lineage, one.timeline, one.from, one.to);
            at(stretch) == at(&found)
        };
        known.retain(|stretch| !is_same(stretch));
        known.push(found);
    }
    let too_many = known.len().saturating_sub(STRETCHES_MAX);
    known.drain(..too_many);
    known
}

#[cfg(test)]
mod tests {
    use proto::message::WalAncestor;

    use super::*;

    fn lineage() -> LineageId {
        LineageId::mint(1, [1; 10])
    }

    /// A segment from 500 to 600 of a timeline, found at 1 000.
    fn stretch(timeline: u32) -> BrokenStretch {
        BrokenStretch {
            lineage: lineage(),
            timeline: Timeline(timeline),
            from: Lsn(500),
            to: Lsn(600),
            at_ms: 1_000,
        }
    }

    fn replay(timeline: u32, from: u64, to: u64) -> Replay {
        Replay {
            lineage: lineage(),
            timeline: Timeline(timeline),
            from: Lsn(from),
            to: Lsn(to),
            last_commit_ms: None,
            at_ms: 2_000,
        }
    }

    /// The server is on timeline 2, which left the first at 700.
    fn wal() -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: lineage(),
            at_ms: 1,
            timeline: Timeline(2),
            ancestors: vec![WalAncestor { timeline: Timeline(1), left_at: Lsn(700) }],
            server_lsn: Lsn(950),
            line_from: Lsn(100),
            archived_to: Lsn(900),
            safe_at_ms: None,
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    #[test]
    fn only_a_later_recovery_through_it_makes_a_stretch_good() {
        let stands = |replay: Replay, wal: Option<&WalStanding>| {
            !after(vec![stretch(1)], None, Some(&replay), wal).is_empty()
        };
        assert!(!stands(replay(1, 100, 501), None), "the segment was replayed");
        assert!(stands(replay(1, 100, 500), None), "it ended before");
        assert!(stands(replay(1, 600, 900), None), "it began behind");
        assert!(stands(Replay { at_ms: 1_000, ..replay(1, 100, 900) }, None), "not later");
        let elsewhere = Replay { lineage: LineageId::mint(1, [2; 10]), ..replay(1, 100, 900) };
        assert!(stands(elsewhere, None), "other WAL");
        assert!(stands(replay(2, 100, 900), None), "who knows where timeline 2 came from?");
        assert!(!stands(replay(2, 100, 900), Some(&wal())), "it came this way");
        let early = WalAncestor { timeline: Timeline(1), left_at: Lsn(400) };
        let branched = WalStanding { ancestors: vec![early], ..wal() };
        assert!(stands(replay(2, 100, 900), Some(&branched)), "it left before that");
        assert!(!after(vec![stretch(1)], None, None, None).is_empty());
    }

    #[test]
    fn what_is_found_again_is_remembered_once_and_never_without_end() {
        let again = BrokenStretch { at_ms: 3_000, ..stretch(1) };
        assert_eq!(after(vec![stretch(1)], Some(again), None, None), [again]);
        let mut known = Vec::new();
        for n in 0..100 {
            let next = BrokenStretch { from: Lsn(n), ..stretch(1) };
            known = after(known, Some(next), None, None);
        }
        assert_eq!(known.len(), STRETCHES_MAX);
        assert_eq!(known.last().map(|stretch| stretch.from), Some(Lsn(99)));
    }

    #[test]
    fn a_stretch_is_in_the_way_of_backups_before_it_on_the_servers_way() {
        let backup = |start: u64| BackupEnd {
            lineage: lineage(),
            timeline: Timeline(1),
            start_lsn: Lsn(start),
            stop_lsn: Lsn(start + 50),
            wal_to: Lsn(start + 50),
            stopped_at_ms: 1,
        };
        let is =
            |stretch: BrokenStretch, start| stretch.is_in_the_way(&backup(start), Some(&wal()));
        assert!(is(stretch(1), 100) && is(stretch(1), 599), "its own WAL comes from there, too");
        assert!(!is(stretch(1), 600));
        assert!(is(stretch(2), 100));
        assert!(!is(stretch(3), 100), "a branch that is not the server's");
        let abandoned = BrokenStretch { from: Lsn(800), to: Lsn(900), ..stretch(1) };
        assert!(!is(abandoned, 100), "behind where the server left that timeline");
        let later = BrokenStretch { from: Lsn(550), ..stretch(1) };
        let broken = [later, stretch(1)];
        assert_eq!(in_the_way(&broken, &backup(100), Some(&wal())), Some(&stretch(1)));
        assert_eq!(in_the_way(&broken, &backup(100), None), Some(&stretch(1)), "who knows?");
        assert_eq!(in_the_way(&broken, &backup(600), None), None);
    }
}
