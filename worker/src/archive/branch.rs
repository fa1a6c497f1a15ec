//! Segments of a branch that the server's timeline has left behind.
//!
//! A server looks for a segment on the timeline it follows and then on those this one came from, also behind the position
//! where it left them. When an old primary went on there, these segments are another history: a server that replays them
//! has lost what the new timeline wrote, and nobody hears of it.

use std::path::Path;

use postgres::wal::{History, read_history};
use proto::{Action, Code, Failure, Lsn, Timeline, WalFileName};

use super::gap::Asked;
use crate::context::blocking;

impl Asked<'_> {
    /// Refuses a segment behind the end of its timeline, as the history in the server's `pg_wal` has it: the server puts the
    /// history of the timeline that it follows there before it replays anything. The segment in which the timeline ended
    /// stays as PostgreSQL has it. `is_there` says whether the archive has the segment.
    pub(super) async fn refuse_abandoned(&self, is_there: bool) -> Result<(), Failure> {
        let (WalFileName::Segment(name), Some(server)) = (*self.file, self.server) else {
            return Ok(());
        };
        let Some(segment) = name.segment(server.segment_size) else { return Ok(()) };
        let directory = self.directory();
        let left = blocking(move || newest(&directory, name.timeline)).await?;
        let Some((follower, end)) = left else { return Ok(()) };
        let start = segment.start(server.segment_size);
        // A timeline that ends where a segment does was replayed to its end when the next one is asked for.
        if start < end || (start == end && !is_there) {
            return Ok(());
        }
        let timeline = name.timeline;
        let what = format!(
            "timeline {follower} left timeline {timeline} at {end}, before {name}, and its own segment is not in the archive of {}",
            self.identity.cluster
        );
        Err(Failure::new(Code::WalMissing, Action::FixData, what).with_hint(format!(
            "Archive the segments of timeline {follower} with `pgmuster wal push` if a server still has them in pg_wal, or recover \
             to a position before {end}. If it is timeline {timeline} that you want, choose it with recovery_target_timeline and \
             remove the history of timeline {follower} from pg_wal."
        )))
    }
}

/// The newest timeline whose history is there and comes from `ancestor`, and where it left it.
fn newest(directory: &Path, ancestor: Timeline) -> Result<Option<(Timeline, Lsn)>, Failure> {
    let mut later: Vec<Timeline> = std::fs::read_dir(directory)
        .into_iter()
        .flatten()
        .filter_map(|entry| match entry.ok()?.file_name().to_str()?.parse() {
            Ok(WalFileName::History(timeline)) if timeline > ancestor => Some(timeline),
            _ => None,
        })
        .collect();
    later.sort_unstable();
    for timeline in later.into_iter().rev() {
        let history: Option<History> = read_history(directory, timeline)?;
        if let Some(end) = history.and_then(|history| history.end_of(ancestor)) {
            return Ok(Some((timeline, end)));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_history_that_comes_from_a_timeline_says_where_it_was_left() {
        let place = tempfile::tempdir().unwrap();
        let left = |timeline| newest(place.path(), Timeline(timeline)).unwrap();
        assert_eq!(left(1), None);
        for (name, text) in [
            ("00000002.history", "1\t0/500000\tx\n"),
            ("00000003.history", "1\t0/900000\tx\n"),
            ("00000004.history", "1\t0/900000\tx\n3\t0/800000\tx\n"),
            ("00000005.history.x", "1\t0/1\tx\n"),
            ("000000010000000000000009", ""),
        ] {
            std::fs::write(place.path().join(name), text).unwrap();
        }
        assert_eq!(left(1), Some((Timeline(4), Lsn(0x80_0000))));
        assert_eq!(left(3), Some((Timeline(4), Lsn(0x80_0000))));
        assert_eq!(left(2), None);
        assert_eq!(left(4), None);
        std::fs::write(place.path().join("00000006.history"), "damaged").unwrap();
        newest(place.path(), Timeline(1)).unwrap_err();
    }
}
