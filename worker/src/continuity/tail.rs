//! The part of the log that is not archived yet, where its files are at hand: whether anything committed in it.
//!
//! After a segment was switched, an idle server writes a few records of its own that nobody would miss. They are no reason to
//! take its last transaction for lost.

use std::fs::File;
use std::path::{Path, PathBuf};

use postgres::relation::read_full_at;
use postgres::wal_moments;
use proto::Lsn;
use proto::wal::Segment;

use super::line::Line;
use crate::context::blocking;

/// The longest part that is looked at. A server that wrote more is not idle.
const BYTES_MAX: u64 = 64 << 10;
/// The largest pages of a log.
const PAGE_BYTES_MAX: u64 = 64 << 10;

/// Whether it is certain that no transaction ended between the end of the archive's line and `until`. `pg_wal` is where the server
/// keeps its segments, if that is at hand; `major` its version.
pub(super) async fn is_idle(pg_wal: Option<PathBuf>, major: u32, line: &Line, until: Lsn) -> bool {
    // An archive that is ahead says nothing of what this server wrote.
    let Some(written) = until.0.checked_sub(line.to.0) else { return false };
    if written == 0 || written > BYTES_MAX {
        return written == 0;
    }
    // Without the files it is not known.
    let Some(pg_wal) = pg_wal else { return false };
    let (next, segment_size) = (line.next(), line.segment_size);
    let look = move || Ok(holds_no_end(&pg_wal, next, segment_size, until, major));
    blocking(look).await.unwrap_or(false)
}

fn holds_no_end(
    pg_wal: &Path,
    segment: Segment,
    segment_size: u32,
    until: Lsn,
    major: u32,
) -> bool {
    let start = segment.start(segment_size);
    let length = until.0.saturating_sub(start.0).next_multiple_of(PAGE_BYTES_MAX);
    let look = || {
        let path = pg_wal.join(segment.file_name(segment_size));
        let mut bytes = vec![0; usize::try_from(length.min(u64::from(segment_size))).ok()?];
        let read = read_full_at(&File::open(path).ok()?, &mut bytes, 0).ok()?;
        bytes.truncate(read);
        let said = wal_moments::read(major, start, &bytes, None).ok()?;
        // What was committed without waiting for the disk may not be in the file yet.
        Some(said.end >= until && !said.moments.iter().any(wal_moments::Moment::ends_transaction))
    };
    look().unwrap_or(false)
}
