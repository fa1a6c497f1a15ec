//! The unbroken line of a cluster's WAL in the archive, as a look at the whole archive shows it.

use postgres::recovery::Way;
use proto::message::{WalAncestor, WalGap};
use proto::wal::{History, Segment};
use proto::{LineageId, Lsn, Timeline};
use repository::WalInventory;

/// Gaps that are told of one archive, the newest ones.
const GAPS_MAX: usize = 8;

/// What the archive has of one timeline.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    pub(super) lineage: LineageId,
    pub(super) timeline: Timeline,
    pub(super) from: Lsn,
    pub(super) to: Lsn,
    /// What is missing before it, though the archive has something older.
    pub(super) missing: Option<Segment>,
    /// The gaps before it, by position.
    pub(super) gaps: Vec<WalGap>,
    pub(super) segment_size: u32,
    pub(super) ancestors: Vec<WalAncestor>,
    /// Whether the archive has anything of the timeline. Otherwise the line is empty, and begins where the server was seen.
    pub(super) is_rooted: bool,
}

impl Line {
    /// The newest unbroken stretch along the history of a timeline, as far as that is known, for a server that was seen at
    /// `server`. `None` when nothing is archived at all.
    pub(super) fn newest(
        archive: &WalInventory,
        lineage: LineageId,
        timeline: Timeline,
        server: Lsn,
    ) -> Option<Self> {
        let own = archive.timelines.get(&timeline).cloned().unwrap_or_default();
        let sizes = archive.timelines.values().map(|wal| wal.segment_size);
        let segment_size = [own.segment_size].into_iter().chain(sizes).find(|size| *size > 0)?;
        let is_rooted = own.history.is_some() || !own.runs.is_empty();
        let history = own.history.unwrap_or(History { timeline, entries: Vec::new() });
        // As long as nothing of it is archived, the timeline begins with the segment in which it left the one before.
        let begins = history.entries.last().map_or(server, |entry| entry.switched_at);
        let next = own.runs.last().map_or_else(
            || Segment::containing(begins, timeline, segment_size),
            |newest| newest.last.next(),
        );
        let ancestors = history
            .entries
            .iter()
            .map(|entry| WalAncestor { timeline: entry.timeline, left_at: entry.switched_at });
        let ancestors = ancestors.collect();
        let way = Way::of_timeline(history, segment_size);
        let is_there = |segment: Segment| archive.has(segment, segment_size);
        let first = way.line_ending_with(next.number, is_there);
        let oldest =
            archive.timelines.values().filter_map(|wal| wal.runs.first()).map(|run| run.from);
        let oldest = oldest.min();
        let is_oldest = oldest >= Some(first.start(segment_size));
        let missing = first.number.checked_sub(1).filter(|_| is_rooted && !is_oldest);
        let oldest = oldest.filter(|_| missing.is_some());
        let oldest = oldest.map_or(first.number, |lsn| lsn.0 / u64::from(segment_size));
        let gaps = gaps(&way, first.number, oldest, is_there);
        let missing = missing.map(|number| match gaps.last() {
            Some(gap) => gap.from.0 / u64::from(segment_size),
            None => number,
        });
        Some(Self {
            lineage,
            timeline,
            from: first.start(segment_size),
            to: next.start(segment_size),
            missing: missing.map(|number| way.segment(number)),
            gaps,
            segment_size,
            ancestors,
            is_rooted,
        })
    }

    /// The way along which it was found.
    pub(super) fn way(&self, archive: &WalInventory) -> Way {
        let own = archive.timelines.get(&self.timeline).and_then(|wal| wal.history.clone());
        let none = || History { timeline: self.timeline, entries: Vec::new() };
        Way::of_timeline(own.unwrap_or_else(none), self.segment_size)
    }

    /// The line as it is after the whole archive was looked at again. When that began, this line led to `known_to` at least:
    /// what came since is not in `found` and yet archived, what is not in `found` before that is gone.
    pub(super) fn renewed(self, found: Self, known_to: Lsn) -> Self {
        if self.lineage != found.lineage || found.to < known_to {
            return found;
        }
        if !self.is_rooted && !found.is_rooted {
            return self;
        }
        Self { to: found.to.max(self.to), ..found }
    }

    /// The segment in which the server goes on, or the first that is missing.
    pub(super) fn next(&self) -> Segment {
        Segment::containing(self.to, self.timeline, self.segment_size)
    }

    /// Leaves out a segment, and what lies before it: it is not there, whatever is there of its name.
    pub(super) fn begin_behind(&mut self, segment: Segment) {
        let (from, to) = (segment.start(self.segment_size), segment.end(self.segment_size));
        match self.gaps.last_mut() {
            Some(last) if last.to == from => last.to = to,
            _ => self.gaps.push(WalGap {
                segment: segment.name(self.segment_size),
                segment_bytes: self.segment_size,
                line_from: self.from,
                from,
                to,
                last_end: None,
            }),
        }
        let above = self.gaps.len().saturating_sub(GAPS_MAX);
        self.gaps.drain(..above);
        self.from = to;
        self.to = self.to.max(self.from);
        self.missing = Some(segment);
    }

    /// Whether it may turn out before long that more is archived than the line shows.
    pub(super) fn is_doubtful(&self) -> bool {
        self.missing.is_some() || (self.timeline.0 > 1 && self.ancestors.is_empty())
    }
}

/// What is missing on a way before the segment `behind`, back to the oldest one that there is of any timeline.
fn gaps(
    way: &Way,
    mut behind: u64,
    oldest: u64,
    is_there: impl Fn(Segment) -> bool,
) -> Vec<WalGap> {
    let size = way.segment_size();
    let start = |number: u64| way.segment(number).start(size);
    let mut gaps = Vec::new();
    while gaps.len() < GAPS_MAX {
        let mut missing = behind;
        while missing > oldest && !is_there(way.segment(missing - 1)) {
            missing -= 1;
        }
        if missing <= oldest || missing == behind {
            break;
        }
        let before = way.line_ending_with(missing, &is_there).number;
        gaps.push(WalGap {
            segment: way.segment(missing).name(size),
            segment_bytes: size,
            line_from: start(before),
            from: start(missing),
            to: start(behind),
            last_end: None,
        });
        behind = before;
    }
    gaps.reverse();
    gaps
}

#[cfg(test)]
mod tests {
    use repository::{TimelineWal, WalRun};

    use super::*;

    const MIB: u64 = 1 << 20;

    /// A timeline, the first and last segments of its runs, and its history.
    type Archived<'a> = (u32, &'a [(u64, u64)], &'a str);

    /// An archive of segments of 1 MiB.
    fn archive(timelines: &[Archived<'_>]) -> WalInventory {
        let mut archive = WalInventory::default();
        for (timeline, runs, history) in timelines {
            let timeline = Timeline(*timeline);
            let run = |(first, last): &(u64, u64)| WalRun {
                first: Segment { timeline, number: *first },
                last: Segment { timeline, number: *last },
                from: Lsn(first * MIB),
                to: Lsn((last + 1) * MIB),
            };
            let history = History::parse(timeline, history).ok().filter(|_| timeline.0 > 1);
            let wal = TimelineWal {
                segment_size: if runs.is_empty() { 0 } else { 1 << 20 },
                runs: runs.iter().map(run).collect(),
                history: history.filter(|history| !history.entries.is_empty()),
                ..TimelineWal::default()
            };
            archive.timelines.insert(timeline, wal);
        }
        archive
    }

    /// Where the newest line begins and ends, and what is missing before it, in segments.
    fn line(archive: &WalInventory, timeline: u32) -> Option<(u64, u64, Option<u64>)> {
        let lineage = LineageId::mint(1, [1; 10]);
        let line = Line::newest(archive, lineage, Timeline(timeline), Lsn(9 * MIB + 5))?;
        Some((line.from.0 / MIB, line.to.0 / MIB, line.missing.map(|gap| gap.number)))
    }

    #[test]
    fn the_newest_line_begins_behind_the_newest_gap() {
        assert_eq!(line(&archive(&[(1, &[(3, 5)], "")]), 1), Some((3, 6, None)));
        assert_eq!(
            line(&archive(&[(1, &[(3, 3), (5, 5), (8, 9)], "")]), 1),
            Some((8, 10, Some(6)))
        );
        assert_eq!(line(&archive(&[(1, &[], "")]), 1), None);
    }

    #[test]
    fn every_gap_is_told_by_its_first_segment_and_with_the_line_before_it() {
        let gaps = |archive: &WalInventory, timeline: u32| -> Vec<(u64, u64, u64, String)> {
            let lineage = LineageId::mint(1, [1; 10]);
            let line = Line::newest(archive, lineage, Timeline(timeline), Lsn(20 * MIB)).unwrap();
            let mib = |lsn: Lsn| lsn.0 / MIB;
            let gap = |gap: &WalGap| {
                (mib(gap.line_from), mib(gap.from), mib(gap.to), gap.segment.to_string())
            };
            line.gaps.iter().map(gap).collect()
        };
        let name = |timeline: u32, number: u64| format!("{timeline:08X}{:08X}{number:08X}", 0);
        let torn = archive(&[(1, &[(3, 3), (5, 6), (9, 9)], "")]);
        assert_eq!(gaps(&torn, 1), [(3, 4, 5, name(1, 4)), (5, 7, 9, name(1, 7))]);
        assert_eq!(gaps(&archive(&[(1, &[(3, 9)], "")]), 1), []);
        let history = format!("1\t{}\tx\n", Lsn(5 * MIB + 100));
        let left = archive(&[(1, &[(2, 3), (7, 8)], ""), (2, &[(6, 6), (8, 8)], &history)]);
        assert_eq!(gaps(&left, 2), [(2, 4, 6, name(1, 4)), (6, 7, 8, name(2, 7))]);
        assert_eq!(gaps(&left, 1), [(2, 4, 7, name(1, 4))]);
    }

    #[test]
    fn a_line_leads_across_a_promotion() {
        let history = format!("1\t{}\tno recovery target specified\n", Lsn(5 * MIB + 100));
        let both = archive(&[(1, &[(2, 2), (4, 7)], ""), (2, &[(5, 6)], &history)]);
        assert_eq!(line(&both, 2), Some((4, 7, Some(3))));
        assert_eq!(line(&both, 1), Some((4, 8, Some(3))));
        // Nobody knows where the timeline came from: its own segments count.
        let alone = archive(&[(1, &[(3, 4)], ""), (2, &[(5, 5)], "")]);
        assert_eq!(line(&alone, 2), Some((5, 6, Some(4))));
    }

    #[test]
    fn a_timeline_of_which_nothing_is_archived_begins_where_it_left_the_other() {
        let history = format!("1\t{}\tno recovery target specified\n", Lsn(5 * MIB + 100));
        let promoted = |runs| archive(&[(1, runs, ""), (2, &[], &history)]);
        assert_eq!(line(&promoted(&[(2, 5)]), 2), Some((2, 5, None)));
        assert_eq!(line(&promoted(&[(2, 3)]), 2), Some((5, 5, Some(4))), "the last is missing");
        // Nobody knows where it left: it begins where the server was seen, and leads on from nothing.
        assert_eq!(line(&archive(&[(1, &[(2, 5)], "")]), 2), Some((9, 9, None)));
    }

    #[test]
    fn a_line_is_renewed_by_what_is_there_and_keeps_what_came_since() {
        let lineage = LineageId::mint(1, [1; 10]);
        let line = |from: u64, to: u64, missing: Option<u64>| Line {
            lineage,
            timeline: Timeline(1),
            from: Lsn(from),
            to: Lsn(to),
            missing: missing.map(|number| Segment { timeline: Timeline(1), number }),
            gaps: Vec::new(),
            segment_size: 1 << 20,
            ancestors: Vec::new(),
            is_rooted: true,
        };
        let renewed = |found: Line| line(1, 9, None).renewed(found, Lsn(7));
        assert_eq!(renewed(line(1, 8, None)), line(1, 9, None));
        assert_eq!(renewed(line(1, 10, None)), line(1, 10, None));
        assert_eq!(renewed(line(4, 8, None)), line(4, 9, None), "the oldest was deleted");
        assert_eq!(renewed(line(4, 8, Some(3))), line(4, 9, Some(3)), "one was deleted");
        assert_eq!(renewed(line(1, 6, None)), line(1, 6, None), "the newest was deleted");
        assert_eq!(
            line(4, 9, Some(3)).renewed(line(1, 9, None), Lsn(9)),
            line(1, 9, None),
            "filled"
        );
        let empty = |at| Line { is_rooted: false, ..line(at, at, None) };
        assert_eq!(
            empty(3).renewed(empty(5), Lsn(3)),
            empty(3),
            "it waits since it was first seen"
        );
        assert_eq!(empty(3).renewed(line(1, 4, None), Lsn(3)), line(1, 4, None));
    }
}
