//! The WAL that leads from a backup along a timeline: which segments, from which timeline each, and where it breaks off.
//!
//! A segment in which a timeline began is there twice: as the last of the old timeline, and as the first of the new one, which
//! begins as a copy. A server takes the newest it is told of, so that is the one that has to be there.

use proto::{Lsn, Timeline};

use crate::wal::{History, HistoryEntry, Segment};

/// A backup's WAL and a timeline that begins in it, or in what follows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Way {
    history: History,
    segment_size: u32,
    start: Lsn,
}

/// Why a timeline cannot be reached from a backup.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WayError {
    /// The timeline descends from others.
    #[error(
        "timeline {target} does not descend from timeline {backup}, on which the backup was taken"
    )]
    Stranger {
        /// Where to.
        target: Timeline,
        /// Where from.
        backup: Timeline,
    },
    /// The timeline began before the backup was complete.
    #[error(
        "timeline {target} left timeline {backup} at {left_at}, before the end of the backup at {stop}"
    )]
    Left {
        /// Where to.
        target: Timeline,
        /// Where from.
        backup: Timeline,
        /// Where they part.
        left_at: Lsn,
        /// The end of the backup.
        stop: Lsn,
    },
}

impl Way {
    /// From a backup (its timeline, where its WAL begins, where it ends) along `history`.
    pub fn new(
        history: History,
        backup: Timeline,
        start: Lsn,
        stop: Lsn,
        segment_size: u32,
    ) -> Result<Self, WayError> {
        let target = history.timeline;
        if backup != target {
            let left_at = history.end_of(backup).ok_or(WayError::Stranger { target, backup })?;
            if left_at < stop {
                return Err(WayError::Left { target, backup, left_at, stop });
            }
        }
        Ok(Self { history, segment_size, start })
    }

    /// The whole of a timeline and what it came from, from wherever the log begins.
    pub fn of_timeline(history: History, segment_size: u32) -> Self {
        Self { history, segment_size, start: Lsn(0) }
    }

    /// The timeline it follows.
    pub fn timeline(&self) -> Timeline {
        self.history.timeline
    }

    /// How that timeline came to be.
    pub fn history(&self) -> &History {
        &self.history
    }

    /// The segment of this number that a server on this way reads.
    pub fn segment(&self, number: u64) -> Segment {
        // As a server looks: from the newest timeline back, for one that had begun there.
        let began = |entry: &HistoryEntry| {
            Segment::containing(entry.switched_at, entry.timeline, self.segment_size).number
                <= number
        };
        let entries = &self.history.entries;
        let next = entries.iter().rposition(began).map_or(0, |last| last + 1);
        let timeline = entries.get(next).map_or(self.history.timeline, |entry| entry.timeline);
        Segment { timeline, number }
    }

    /// Every segment from the beginning of the backup to the one that holds the byte before `until`.
    pub fn segments(&self, until: Lsn) -> impl Iterator<Item = Segment> {
        let first = self.start.0 / u64::from(self.segment_size);
        let end = until.0.div_ceil(u64::from(self.segment_size));
        (first..end).map(|number| self.segment(number))
    }

    /// The first segment of the way that `is_there` denies: everything before it can be replayed.
    pub fn breaks_off(&self, is_there: impl Fn(Segment) -> bool) -> Segment {
        let first = self.start.0 / u64::from(self.segment_size);
        let mut segment = self.segment(first);
        while is_there(segment) {
            segment = self.segment(segment.number + 1);
        }
        segment
    }

    /// The first segment of the unbroken line that ends with segment `last`: before it is one that `is_there` denies.
    pub fn line_ending_with(&self, last: u64, is_there: impl Fn(Segment) -> bool) -> Segment {
        let mut first = last;
        while first > 0 && is_there(self.segment(first - 1)) {
            first -= 1;
        }
        self.segment(first)
    }

    /// Bytes of a segment.
    pub fn segment_size(&self) -> u32 {
        self.segment_size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u32 = 1 << 20;

    fn history(timeline: u32, entries: &[(u32, u64)]) -> History {
        let lines: Vec<String> =
            entries.iter().map(|(number, lsn)| format!("{number}\t{}\twhy", Lsn(*lsn))).collect();
        History::parse(Timeline(timeline), &lines.join("\n")).unwrap()
    }

    fn at(segment: u64, byte: u64) -> u64 {
        segment * u64::from(MIB) + byte
    }

    fn way(timeline: u32, entries: &[(u32, u64)]) -> Way {
        let (start, stop) = (Lsn(at(2, 40)), Lsn(at(3, 100)));
        Way::new(history(timeline, entries), Timeline(1), start, stop, MIB).unwrap()
    }

    #[test]
    fn each_segment_is_read_from_the_newest_timeline_that_had_begun() {
        let way = way(5, &[(1, at(4, 10)), (3, at(4, 900)), (4, at(6, 0))]);
        let timelines: Vec<u32> = (2..8).map(|number| way.segment(number).timeline.0).collect();
        assert_eq!(timelines, [1, 1, 4, 4, 5, 5]);
        let names: Vec<u64> = way.segments(Lsn(at(4, 1))).map(|segment| segment.number).collect();
        assert_eq!(names, [2, 3, 4]);
        assert_eq!(way.segments(Lsn(at(4, 0))).count(), 2);
    }

    #[test]
    fn a_history_whose_positions_go_back_is_followed_as_the_server_does() {
        let entries = [(1, at(6, 0)), (2, at(5, 0))];
        let way = way(3, &entries);
        let timelines: Vec<u32> = (3..8).map(|number| way.segment(number).timeline.0).collect();
        assert_eq!(timelines, [1, 1, 3, 3, 3]);
        let (start, stop) = (Lsn(at(5, 0)), Lsn(at(5, 100)));
        let abandoned = Way::new(history(3, &entries), Timeline(1), start, stop, MIB);
        assert!(
            matches!(abandoned, Err(WayError::Left { left_at: Lsn(lsn), .. }) if lsn == at(5, 0))
        );
    }

    #[test]
    fn a_way_breaks_off_where_a_segment_is_missing_on_its_own_timeline() {
        let way = way(2, &[(1, at(4, 10))]);
        // The old timeline's copy of the segment is no substitute.
        let there = |segment: Segment| segment.timeline == Timeline(1) && segment.number <= 4;
        assert_eq!(way.breaks_off(there), Segment { timeline: Timeline(2), number: 4 });
        assert_eq!(way.breaks_off(|segment| segment.number != 5).number, 5);
    }

    #[test]
    fn a_line_goes_back_to_the_segment_that_is_missing() {
        let history = history(2, &[(1, at(4, 10))]);
        let way = Way::of_timeline(history, MIB);
        let there = |numbers: [(u32, u64); 5]| {
            move |segment: Segment| numbers.contains(&(segment.timeline.0, segment.number))
        };
        let all = there([(1, 2), (1, 3), (2, 4), (2, 5), (2, 6)]);
        assert_eq!(way.line_ending_with(6, all), Segment { timeline: Timeline(1), number: 2 });
        // The old timeline's copy of the segment in which the new one began is no substitute.
        let other = there([(1, 2), (1, 3), (1, 4), (2, 5), (2, 6)]);
        assert_eq!(way.line_ending_with(6, other), Segment { timeline: Timeline(2), number: 5 });
        assert_eq!(way.line_ending_with(6, |_| true).number, 0);
    }

    #[test]
    fn a_timeline_that_left_before_the_backup_was_complete_is_refused() {
        let try_way = |timeline, entries: &[(u32, u64)]| {
            Way::new(history(timeline, entries), Timeline(1), Lsn(at(2, 40)), Lsn(at(3, 100)), MIB)
        };
        assert!(try_way(2, &[(1, at(3, 100))]).is_ok());
        let left = try_way(2, &[(1, at(3, 99))]).unwrap_err();
        assert!(matches!(left, WayError::Left { .. }) && left.to_string().contains("timeline 2"));
        let backup =
            Way::new(history(3, &[(1, at(1, 0))]), Timeline(2), Lsn(at(2, 40)), Lsn(at(3, 0)), MIB);
        assert_eq!(
            backup.unwrap_err(),
            WayError::Stranger { target: Timeline(3), backup: Timeline(2) }
        );
    }
}
