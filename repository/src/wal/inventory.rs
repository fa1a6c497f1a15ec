//! What the archive of a lineage has. Pure: a listing and the histories go in. Which of it a server needs is `postgres`'
//! affair.

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
    /// Objects in the store, those included that are no files of the log.
    pub objects: u64,
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
    /// Whether a segment of this size is there.
    pub fn has(&self, segment: Segment, segment_size: u32) -> bool {
        let wal = self.timelines.get(&segment.timeline);
        wal.is_some_and(|wal| wal.segment_size == segment_size && wal.has(segment))
    }

    /// Whether a later timeline's history shows that a timeline's log was there up to `end`.
    pub fn shows(&self, timeline: Timeline, end: Lsn) -> bool {
        self.histories().any(|history| history.shows(timeline, end))
    }

    /// Every gap of a timeline, by timeline and position: between two segments, and between its last one and the position
    /// where a later timeline left it.
    pub fn gaps(&self) -> Vec<WalGap> {
        let mut gaps = Vec::new();
        for (timeline, wal) in &self.timelines {
            let gap = |from, to| WalGap { timeline: *timeline, from, to };
            gaps.extend(wal.runs.windows(2).map(|pair| gap(pair[0].to, pair[1].from)));
            let size = wal.segment_size;
            let left = self.histories().flat_map(|history| &history.entries);
            let left = left.filter(|entry| entry.timeline == *timeline);
            // The segment around that position need not be there: the later timeline has its own.
            let last = left
                .map(|entry| {
                    Segment::containing(entry.switched_at, *timeline, size.max(1)).start(size)
                })
                .max();
            if let (Some(end), Some(last)) = (wal.end(), last)
                && end < last
            {
                gaps.push(gap(end, last));
            }
        }
        gaps
    }

    fn histories(&self) -> impl Iterator<Item = &History> {
        self.timelines.values().filter_map(|wal| wal.history.as_ref())
    }
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

    #[test]
    fn what_is_missing_between_segments_and_before_a_later_timeline_is_told() {
        let gap = |timeline, from, to| WalGap {
            timeline: Timeline(timeline),
            from: Lsn(from * MIB),
            to: Lsn(to * MIB),
        };
        let inventory = archive(&[(1, &[3, 4, 7, 8], "")]);
        assert_eq!(inventory.gaps(), [gap(1, 5, 7)]);

        // Timeline 2 left timeline 1 in the middle of segment 12, and timeline 3 where segment 9 began.
        let history = format!("1\t{}\tx\n", Lsn(12 * MIB + 100));
        let earlier = format!("1\t{}\tx\n", Lsn(9 * MIB));
        let archive = |numbers: &[u64]| {
            archive(&[(1, numbers, ""), (2, &[12, 13], &history), (3, &[9, 10], &earlier)])
        };
        assert_eq!(archive(&[3, 4, 7, 8]).gaps(), [gap(1, 5, 7), gap(1, 9, 12)]);
        assert_eq!(archive(&[7, 8, 9, 10, 11]).gaps(), []);
        assert_eq!(archive(&[7, 8, 9, 10, 11, 12, 13]).gaps(), []);
        // Nothing was ever archived of it.
        assert_eq!(archive(&[]).gaps(), []);
        let inventory = archive(&[3]);
        assert!(inventory.shows(Timeline(1), Lsn(12 * MIB)));
        assert!(!inventory.shows(Timeline(1), Lsn(13 * MIB)));
        assert!(!inventory.shows(Timeline(2), Lsn(13 * MIB)));
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
