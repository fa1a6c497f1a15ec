//! The unbroken line of a cluster's WAL in the archive, followed segment by segment.

use postgres::recovery::Way;
use postgres::wal_position::WalPosition;
use proto::message::{WalAncestor, WalWaiting};
use proto::wal::{History, Segment};
use proto::{LineageId, Lsn, Timeline};
use repository::{Error, Repository, WalInventory};

/// Segments that one look goes on by; the next look goes on from there.
const SEGMENTS_MAX: usize = 256;
/// How long a full segment may be missing before the archive is looked at as a whole: it may have later ones.
const MISSING_MS: i64 = 10_000;
/// How often at most that is done.
const SURVEY_EVERY_MS: i64 = 30_000;

/// What the archive has of one timeline, as it was seen last.
#[derive(Debug)]
pub(super) struct Line {
    lineage: LineageId,
    timeline: Timeline,
    pub(super) from: Lsn,
    pub(super) to: Lsn,
    pub(super) missing: Option<Segment>,
    pub(super) segment_size: u32,
    pub(super) ancestors: Vec<WalAncestor>,
    /// The next segment, and since when it has been full.
    waiting: Option<(Segment, i64)>,
    surveyed_at_ms: i64,
}

impl Line {
    /// Looks at the whole archive of a lineage; `None` when it has nothing of the timeline.
    pub(super) async fn survey(
        repository: &Repository,
        lineage: LineageId,
        timeline: Timeline,
        now_ms: i64,
    ) -> Result<Option<Self>, Error> {
        let archive = repository.list_wal(lineage).await?;
        Ok(Self::newest(&archive, lineage, timeline, now_ms))
    }

    /// The newest unbroken stretch along the history of a timeline, as far as that is known.
    fn newest(
        archive: &WalInventory,
        lineage: LineageId,
        timeline: Timeline,
        now_ms: i64,
    ) -> Option<Self> {
        let own = archive.timelines.get(&timeline)?;
        let (segment_size, newest) = (own.segment_size, own.runs.last()?.last);
        let unknown = || History { timeline, entries: Vec::new() };
        let history = own.history.clone().unwrap_or_else(unknown);
        let ancestors = history
            .entries
            .iter()
            .map(|entry| WalAncestor { timeline: entry.timeline, left_at: entry.switched_at });
        let ancestors = ancestors.collect();
        let way = Way::of_timeline(history, segment_size);
        let is_there = |segment: Segment| {
            let wal = archive.timelines.get(&segment.timeline);
            wal.is_some_and(|wal| wal.segment_size == segment_size && wal.has(segment))
        };
        let first = way.line_ending_with(newest.number, is_there);
        let oldest =
            archive.timelines.values().filter_map(|wal| wal.runs.first()).map(|run| run.from);
        let is_oldest = oldest.min() >= Some(first.start(segment_size));
        let missing = first.number.checked_sub(1).filter(|_| !is_oldest);
        Some(Self {
            lineage,
            timeline,
            from: first.start(segment_size),
            to: newest.end(segment_size),
            missing: missing.map(|number| way.segment(number)),
            segment_size,
            ancestors,
            waiting: None,
            surveyed_at_ms: now_ms,
        })
    }

    /// Goes on along the segments that came since.
    pub(super) async fn go_on(
        &mut self,
        repository: &Repository,
        server: &WalPosition,
        now_ms: i64,
    ) -> Result<(), Error> {
        for _ in 0..SEGMENTS_MAX {
            let next = self.next();
            // The server still writes it.
            if next.end(self.segment_size) > server.lsn {
                self.waiting = None;
                return Ok(());
            }
            if repository.has_wal(self.lineage, next.name(self.segment_size)).await? {
                self.to = next.end(self.segment_size);
                self.waiting = None;
                continue;
            }
            let since = self.waiting.filter(|(segment, _)| *segment == next);
            let since_ms = since.map_or(now_ms, |(_, since_ms)| since_ms);
            self.waiting = Some((next, since_ms));
            if now_ms - since_ms >= MISSING_MS && now_ms - self.surveyed_at_ms >= SURVEY_EVERY_MS {
                self.jump(repository, since_ms, now_ms).await?;
            }
            return Ok(());
        }
        Ok(())
    }

    /// Goes on behind a gap, when the archive has something there.
    async fn jump(
        &mut self,
        repository: &Repository,
        since_ms: i64,
        now_ms: i64,
    ) -> Result<(), Error> {
        self.surveyed_at_ms = now_ms;
        let again = Self::survey(repository, self.lineage, self.timeline, now_ms).await?;
        if let Some(line) = again.filter(|line| line.to > self.to) {
            *self = line;
            self.waiting = Some((self.next(), since_ms));
        }
        Ok(())
    }

    /// The segment in which the server goes on, or the first that is missing.
    pub(super) fn next(&self) -> Segment {
        Segment::containing(self.to, self.timeline, self.segment_size)
    }

    /// Whole segments of the server that are not in the archive.
    pub(super) fn waiting(&self, server: &WalPosition) -> Option<WalWaiting> {
        let (next, since_ms) = self.waiting?;
        let writes = Segment::containing(server.lsn, self.timeline, self.segment_size);
        let segments = writes.number.saturating_sub(next.number);
        let segment = next.name(self.segment_size);
        (segments > 0).then_some(WalWaiting { segment, since_ms, segments })
    }

    pub(super) fn is_of(&self, timeline: Timeline) -> bool {
        self.timeline == timeline
    }
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
                segment_size: 1 << 20,
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
        let line = Line::newest(archive, lineage, Timeline(timeline), 0)?;
        Some((line.from.0 / MIB, line.to.0 / MIB, line.missing.map(|gap| gap.number)))
    }

    #[test]
    fn the_newest_line_begins_behind_the_newest_gap() {
        assert_eq!(line(&archive(&[(1, &[(3, 5)], "")]), 1), Some((3, 6, None)));
        assert_eq!(
            line(&archive(&[(1, &[(3, 3), (5, 5), (8, 9)], "")]), 1),
            Some((8, 10, Some(7)))
        );
        assert_eq!(line(&archive(&[(1, &[], "")]), 1), None);
        assert_eq!(line(&archive(&[(1, &[(3, 3)], "")]), 2), None);
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
}
