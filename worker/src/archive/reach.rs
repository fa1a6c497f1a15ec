//! How far archived WAL leads along a way.

use postgres::recovery::Way;
use proto::wal::Segment;
use repository::WalInventory;

/// Where WAL breaks off.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Reach {
    /// The first segment of the way that is not there: everything before it can be replayed.
    pub(crate) missing: Segment,
    /// Something shows that it was there once: it is a gap and no end.
    pub(crate) is_gap: bool,
}

impl Reach {
    /// Along `way`, with what the archive has and what `is_brought` says is at hand besides.
    pub(crate) fn along(
        way: &Way,
        archive: &WalInventory,
        is_brought: impl Fn(Segment) -> bool,
    ) -> Self {
        let size = way.segment_size();
        let missing = way.breaks_off(|segment| archive.has(segment, size) || is_brought(segment));
        let is_later = archive.timelines.iter().any(|(timeline, wal)| {
            let behind = wal.runs.iter().filter(|run| run.last.number > missing.number);
            let mut numbers =
                behind.flat_map(|run| run.first.number.max(missing.number + 1)..=run.last.number);
            numbers.any(|number| way.segment(number).timeline == *timeline)
        });
        let is_gap = is_later || archive.shows(missing.timeline, missing.end(size));
        Self { missing, is_gap }
    }
}
