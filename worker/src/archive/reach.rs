//! Where WAL leads from a backup: along which timelines, and how far it is there.

use postgres::recovery::{Way, WayError};
use postgres::wal::{History, Segment, history_file_name};
use proto::{BackupFacts, Lsn, Timeline};
use repository::WalInventory;

/// Why nothing leads from a backup to a timeline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoWay {
    /// The backup is on another timeline, and only the history says how they are related.
    #[error(
        "{} is not in the archive, so nobody knows where timeline {timeline} begins",
        history_file_name(*.timeline)
    )]
    WithoutHistory {
        /// Where to.
        timeline: Timeline,
    },
    /// The history says that they part.
    #[error(transparent)]
    Elsewhere(#[from] WayError),
}

/// The way from the beginning of a backup along a timeline.
pub(crate) fn way_to(
    archive: &WalInventory,
    timeline: Timeline,
    facts: &BackupFacts,
) -> Result<Way, NoWay> {
    let known = archive.timelines.get(&timeline).and_then(|wal| wal.history.clone());
    // Timeline 1 came from nowhere, and nobody needs to know where a backup's own timeline came from.
    let is_known = timeline == Timeline(1) || timeline == facts.timeline;
    let bare = || is_known.then(|| History { timeline, entries: Vec::new() });
    let history = known.or_else(bare).ok_or(NoWay::WithoutHistory { timeline })?;
    let (start, stop, size) = (facts.start_lsn, facts.stop_lsn, facts.wal_segment_size);
    Ok(Way::new(history, facts.timeline, start, stop, size)?)
}

/// Where WAL breaks off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Reach {
    /// Everything before this position is there. Before the end of the backup where the way leaves the backup's timeline in
    /// its last segment and has not its own of it.
    pub(crate) to: Lsn,
    /// The first segment of the way that is not there.
    pub(crate) missing: Segment,
    /// Something shows that it was there once: it is a gap and no end.
    pub(crate) is_gap: bool,
}

impl Reach {
    /// Along the way of a backup, with what the archive has and the WAL up to its end that a backup brings along.
    pub(crate) fn along(way: &Way, archive: &WalInventory, facts: &BackupFacts) -> Self {
        let (size, stop) = (way.segment_size(), facts.stop_lsn);
        let last = Segment::ending_at(stop, facts.timeline, size);
        let is_brought =
            |segment: Segment| segment.timeline == last.timeline && segment.number <= last.number;
        // A standby cannot end its segment: behind the end of the backup there is nothing in it.
        let is_cut =
            |segment: Segment| segment == last && stop < last.end(size) && facts.is_of_standby();
        let is_archived = |segment| archive.has(segment, size);
        let missing = way.breaks_off(|segment| {
            is_archived(segment) || (is_brought(segment) && !is_cut(segment))
        });
        let start = missing.start(size);
        let before = || way.segment(missing.number.saturating_sub(1));
        let to = if is_brought(missing) || (start > stop && !is_archived(before())) {
            stop
        } else {
            start
        };
        let is_later = archive.timelines.iter().any(|(timeline, wal)| {
            let behind = wal.runs.iter().filter(|run| run.last.number > missing.number);
            let mut numbers =
                behind.flat_map(|run| run.first.number.max(missing.number + 1)..=run.last.number);
            numbers.any(|number| way.segment(number).timeline == *timeline)
        });
        let is_gap = is_later || archive.shows(missing.timeline, missing.end(size));
        Self { to, missing, is_gap }
    }
}
