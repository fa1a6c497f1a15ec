//! What the archive of a lineage has, and what can be recovered with it. Pure: a listing and the histories go in.

use std::collections::BTreeMap;

use proto::wal::{History, Segment, SegmentName, WalFileName};
use proto::{Lsn, Timeline};

/// The archive of one lineage.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct WalInventory {
    /// What it has of each timeline.
    pub timelines: BTreeMap<Timeline, TimelineWal>,
    /// Files that cannot be read, and why: histories, and segments that would have told a size.
    pub damaged: Vec<(WalFileName, String)>,
    /// Content that was refused because its name was taken, by the names it came under, each once.
    pub conflicts: Vec<WalFileName>,
    /// Bytes in the store.
    pub stored_bytes: u64,
}

/// What the archive has of one timeline.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TimelineWal {
    /// Bytes in a segment; 0 while there is none.
    pub segment_size: u32,
    /// Its segments in unbroken runs, ascending. Between two of them is a gap.
    pub runs: Vec<WalRun>,
    /// Segments that a promotion left unfinished. They serve nobody by themselves.
    pub partials: Vec<SegmentName>,
    /// Where it came from. Timeline 1 came from nowhere; of any other one without it nothing is known.
    pub history: Option<History>,
    /// Labels that backups left.
    pub labels: usize,
}

/// Segments of one timeline, one behind the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalRun {
    /// The first.
    pub first: Segment,
    /// The last.
    pub last: Segment,
    /// Where the first begins.
    pub from: Lsn,
    /// Where the last ends.
    pub to: Lsn,
}

/// WAL that is not there, though what lies behind it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalGap {
    /// Of which timeline.
    pub timeline: Timeline,
    /// Recoverable before this position.
    pub from: Lsn,
    /// And from a backup that begins after this one.
    pub to: Lsn,
}

/// How far replay gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalReach {
    /// Everything before this position is there.
    pub to: Lsn,
    /// The timeline of the last segment that is there; the one that was asked for, if none is.
    pub timeline: Timeline,
    /// The segment that is not there, with the timeline it would be looked for on.
    pub missing: Segment,
    /// Something of the line lies behind the missing segment: a gap, and not merely the end.
    pub is_gap: bool,
}

/// Why a stretch of WAL cannot be replayed from the archive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WalMissing {
    /// Nobody knows where the timeline came from.
    #[error("find {}: without it nobody knows where timeline {timeline} begins", proto::wal::history_file_name(*timeline))]
    History {
        /// The timeline.
        timeline: Timeline,
    },
    /// No segment tells how large segments are.
    #[error("find a WAL segment of timeline {timeline} or of those it came from")]
    Empty {
        /// The timeline.
        timeline: Timeline,
    },
    /// A segment is not there.
    #[error("find WAL segment {name}, which holds {from}: everything before {from} is there")]
    Segment {
        /// Its name.
        name: SegmentName,
        /// The first byte that cannot be replayed.
        from: Lsn,
    },
}

/// A timeline on the way to another, and the bytes that are its own.
#[derive(Debug, Clone, Copy)]
struct Leg {
    timeline: Timeline,
    /// Where it begins; the segment around this position begins as a copy of its ancestor's.
    from: Lsn,
    /// Where the next one begins.
    to: Lsn,
}

impl TimelineWal {
    /// Whether a segment is there.
    pub fn has(&self, segment: Segment) -> bool {
        self.run_of(segment.number).is_some()
    }

    fn run_of(&self, number: u64) -> Option<&WalRun> {
        let behind = self.runs.partition_point(|run| run.first.number <= number);
        self.runs[..behind].last().filter(|run| number <= run.last.number)
    }

    /// Where its last segment ends.
    pub fn end(&self) -> Option<Lsn> {
        self.runs.last().map(|run| run.to)
    }

    /// Takes in a segment. Segments come in the order of their names, and `false` says that one has no place among those of
    /// this size.
    pub(super) fn add(&mut self, name: SegmentName) -> bool {
        let size = self.segment_size;
        let Some(segment) = name.segment(size) else { return false };
        match self.runs.last_mut() {
            Some(run) if run.last.next() == segment => {
                run.last = segment;
                run.to = segment.end(size);
            }
            _ => self.runs.push(WalRun {
                first: segment,
                last: segment,
                from: segment.start(size),
                to: segment.end(size),
            }),
        }
        true
    }
}

impl WalInventory {
    /// Every gap within a timeline, by timeline and position.
    pub fn gaps(&self) -> Vec<WalGap> {
        let gaps = self.timelines.iter().flat_map(|(timeline, wal)| {
            wal.runs.windows(2).map(|pair| WalGap {
                timeline: *timeline,
                from: pair[0].to,
                to: pair[1].from,
            })
        });
        gaps.collect()
    }

    /// Whether everything needed to replay from `from` up to `to` along the history of `timeline` is there. The error names
    /// the first thing that is not.
    pub fn covers(&self, timeline: Timeline, from: Lsn, to: Lsn) -> Result<(), WalMissing> {
        if to <= from {
            return Ok(());
        }
        let (legs, size) = self.way(self.history(timeline)?)?;
        match self.walk(&legs, size, from, to) {
            None => Ok(()),
            Some(missing) => {
                let from = missing.start(size).max(from);
                Err(WalMissing::Segment { name: missing.name(size), from })
            }
        }
    }

    /// How far replay from `from` gets along the history of `timeline`.
    pub fn reach(&self, timeline: Timeline, from: Lsn) -> Result<WalReach, WalMissing> {
        self.reach_along(self.history(timeline)?, from)
    }

    /// How far replay from `from` gets along a history. One without ancestors is enough for what was written on the timeline
    /// itself, whether or not anybody knows where it came from.
    pub fn reach_along(&self, history: &History, from: Lsn) -> Result<WalReach, WalMissing> {
        let (legs, size) = self.way(history)?;
        let timeline = history.timeline;
        let known = |leg: &Leg| {
            self.timelines.get(&leg.timeline).and_then(TimelineWal::end).map(|end| end.min(leg.to))
        };
        let end = legs.iter().filter_map(known).max().unwrap_or(from).max(from);
        let gap = self.walk(&legs, size, from, end);
        let to = gap.map_or(end, |missing| missing.start(size).max(from));
        let missing = gap.unwrap_or_else(|| {
            let segment = Segment::containing(end, timeline, size);
            Segment { timeline: newest_at(&legs, end).unwrap_or(timeline), ..segment }
        });
        // The last byte that is there lies before the position.
        let last = Lsn(to.0.saturating_sub(1));
        let reached = if to > from { newest_at(&legs, last) } else { None };
        Ok(WalReach { to, timeline: reached.unwrap_or(timeline), missing, is_gap: gap.is_some() })
    }

    fn history(&self, timeline: Timeline) -> Result<&History, WalMissing> {
        const FIRST: &History = &History::FIRST;
        let known = self.timelines.get(&timeline).and_then(|wal| wal.history.as_ref());
        match known {
            Some(history) => Ok(history),
            None if timeline == FIRST.timeline => Ok(FIRST),
            None => Err(WalMissing::History { timeline }),
        }
    }

    /// The timelines of a history, and the size of their segments.
    fn way(&self, history: &History) -> Result<(Vec<Leg>, u32), WalMissing> {
        let timeline = history.timeline;
        let mut from = Lsn(0);
        let mut legs = Vec::with_capacity(history.entries.len() + 1);
        for entry in &history.entries {
            legs.push(Leg { timeline: entry.timeline, from, to: entry.switched_at });
            from = entry.switched_at;
        }
        legs.push(Leg { timeline, from, to: Lsn(u64::MAX) });
        let sizes = legs.iter().rev().filter_map(|leg| self.timelines.get(&leg.timeline));
        let size = sizes.map(|wal| wal.segment_size).find(|size| *size > 0);
        size.map(|size| (legs, size)).ok_or(WalMissing::Empty { timeline })
    }

    /// The first segment between two positions that no timeline on the way has.
    fn walk(&self, legs: &[Leg], size: u32, from: Lsn, to: Lsn) -> Option<Segment> {
        let last = Segment::ending_at(to, Timeline(1), size).number;
        let mut number = Segment::containing(from, Timeline(1), size).number;
        while number <= last && to > from {
            let segment = Segment { timeline: Timeline(1), number };
            // What is needed of it ends where the segment does, or the stretch.
            let needed_to = segment.end(size).min(to);
            // A server looks on the newest timeline that has begun by then, and then on older ones. A timeline's segment
            // holds what its ancestors wrote before it began, and nothing of the line after the next one began.
            let holds = |leg: &&Leg| {
                let begins = Segment::containing(leg.from, leg.timeline, size).number <= number;
                let wal = self.timelines.get(&leg.timeline).filter(|wal| wal.segment_size == size);
                begins && needed_to <= leg.to && wal.is_some_and(|wal| wal.run_of(number).is_some())
            };
            let Some(leg) = legs.iter().rev().find(holds) else {
                let last = Lsn(needed_to.0.saturating_sub(1));
                let timeline = newest_at(legs, last).unwrap_or(segment.timeline);
                return Some(Segment { timeline, number });
            };
            // Within a run and before the timeline's end nothing has to be looked up again.
            let run = self.timelines.get(&leg.timeline).and_then(|wal| wal.run_of(number));
            let whole_to = Segment::containing(leg.to, leg.timeline, size).number;
            let sure = run.map_or(number, |run| run.last.number).min(whole_to.saturating_sub(1));
            number = number.max(sure) + 1;
        }
        None
    }
}

/// The newest timeline that has begun at a position.
fn newest_at(legs: &[Leg], lsn: Lsn) -> Option<Timeline> {
    legs.iter().rev().find(|leg| leg.from <= lsn).map(|leg| leg.timeline)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// An archive of segments of 1 MiB: the segments of each timeline, and its history.
    fn archive(timelines: &[(u32, &[u64], &str)]) -> WalInventory {
        let mut inventory = WalInventory::default();
        for (timeline, numbers, history) in timelines {
            let timeline = Timeline(*timeline);
            let mut wal = TimelineWal { segment_size: 1 << 20, ..TimelineWal::default() };
            for number in *numbers {
                assert!(wal.add(Segment { timeline, number: *number }.name(1 << 20)));
            }
            if !history.is_empty() {
                wal.history = Some(History::parse(timeline, history).unwrap());
            }
            inventory.timelines.insert(timeline, wal);
        }
        inventory
    }

    fn missing(inventory: &WalInventory, timeline: u32, from: u64, to: u64) -> String {
        match inventory.covers(Timeline(timeline), Lsn(from), Lsn(to)) {
            Ok(()) => String::new(),
            Err(WalMissing::Segment { name, .. }) => name.to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_gap_is_told_and_nothing_is_covered_through_it() {
        let inventory = archive(&[(1, &[3, 4, 7, 8], "")]);
        let gap = WalGap { timeline: Timeline(1), from: Lsn(5 * MIB), to: Lsn(7 * MIB) };
        assert_eq!(inventory.gaps(), [gap]);
        assert_eq!(missing(&inventory, 1, 3 * MIB, 5 * MIB), "");
        assert_eq!(missing(&inventory, 1, 3 * MIB, 5 * MIB + 1), "000000010000000000000005");
        assert_eq!(missing(&inventory, 1, 2 * MIB, 4 * MIB), "000000010000000000000002");
        assert_eq!(missing(&inventory, 1, 7 * MIB + 5, 9 * MIB), "");
        assert_eq!(missing(&inventory, 1, 7 * MIB, 9 * MIB + 1), "000000010000000000000009");
        let reach = |from| inventory.reach(Timeline(1), Lsn(from)).unwrap();
        let before = reach(3 * MIB + 9);
        assert_eq!((before.to, before.is_gap), (Lsn(5 * MIB), true));
        assert_eq!(before.missing.number, 5);
        let after = reach(7 * MIB);
        assert_eq!((after.to, after.is_gap, after.missing.number), (Lsn(9 * MIB), false, 9));
        let nowhere = reach(5 * MIB + 7);
        assert_eq!((nowhere.to, nowhere.is_gap), (Lsn(5 * MIB + 7), true));
        let beyond = reach(20 * MIB + 7);
        assert_eq!(
            (beyond.to, beyond.is_gap, beyond.missing.number),
            (Lsn(20 * MIB + 7), false, 20)
        );
    }

    #[test]
    fn the_way_leads_across_timelines_and_never_along_an_abandoned_one() {
        // Timeline 10 left timeline 1 in the middle of segment 5; timeline 1 went on for a while.
        let history = format!("1\t{}\tno recovery target specified\n", Lsn(5 * MIB + 100));
        let inventory = archive(&[(1, &[3, 4, 5, 6, 7], ""), (10, &[5, 6], &history)]);
        assert_eq!(missing(&inventory, 10, 3 * MIB, 7 * MIB), "");
        assert_eq!(missing(&inventory, 10, 3 * MIB, 7 * MIB + 1), "0000000A0000000000000007");
        assert_eq!(missing(&inventory, 1, 3 * MIB, 8 * MIB), "");
        let reach = inventory.reach(Timeline(10), Lsn(3 * MIB)).unwrap();
        assert_eq!((reach.to, reach.timeline), (Lsn(7 * MIB), Timeline(10)));
        assert_eq!(reach.missing, Segment { timeline: Timeline(10), number: 7 });

        // The new timeline's first segment is not there: the old one's serves up to the promotion and not beyond.
        let inventory = archive(&[(1, &[3, 4, 5, 6, 7], ""), (10, &[6], &history)]);
        assert_eq!(missing(&inventory, 10, 3 * MIB, 5 * MIB + 100), "");
        assert_eq!(missing(&inventory, 10, 3 * MIB, 5 * MIB + 101), "0000000A0000000000000005");
        assert!(inventory.reach(Timeline(10), Lsn(3 * MIB)).unwrap().is_gap);

        // Nothing of the new timeline but its history.
        let inventory = archive(&[(1, &[3, 4, 5, 6, 7], ""), (10, &[], &history)]);
        let reach = inventory.reach(Timeline(10), Lsn(3 * MIB)).unwrap();
        assert_eq!((reach.to, reach.timeline), (Lsn(5 * MIB + 100), Timeline(1)));
        assert_eq!((reach.missing.timeline, reach.is_gap), (Timeline(10), false));
    }

    #[test]
    fn a_timeline_without_its_history_leads_nowhere() {
        let inventory = archive(&[(1, &[3], ""), (2, &[3], "")]);
        assert_eq!(
            inventory.covers(Timeline(2), Lsn(3 * MIB), Lsn(4 * MIB)),
            Err(WalMissing::History { timeline: Timeline(2) })
        );
        let nothing = WalInventory::default();
        assert_eq!(
            nothing.covers(Timeline(1), Lsn(0), Lsn(1)),
            Err(WalMissing::Empty { timeline: Timeline(1) })
        );
        assert_eq!(nothing.covers(Timeline(1), Lsn(1), Lsn(1)), Ok(()));
    }

    #[test]
    fn segments_follow_each_other_over_the_ends_of_their_names() {
        let mut wal = TimelineWal { segment_size: 64 << 20, ..TimelineWal::default() };
        for (high, low) in [(0, 0x3e), (0, 0x3f), (1, 0)] {
            assert!(wal.add(SegmentName { timeline: Timeline(1), high, low }));
        }
        assert_eq!(wal.runs.len(), 1);
        assert!(!wal.add(SegmentName { timeline: Timeline(1), high: 1, low: 0x40 }));
    }
}
