//! When a server was first seen behind a position of its log: since then whatever lies before that can be archived.

use std::collections::VecDeque;

use proto::Lsn;

use crate::clock::Seen;

/// Positions that are remembered: hours at the usual pace. Beyond that every second one is forgotten: what lies between is taken
/// for younger than it is, and yet for hours old.
const POSITIONS_MAX: usize = 4_096;

/// Where a server was seen when.
#[derive(Debug, Default)]
pub(super) struct Passed {
    /// Ascending.
    positions: VecDeque<(Lsn, Seen)>,
}

impl Passed {
    /// Notes where the server is now.
    pub(super) fn note(&mut self, lsn: Lsn, now: Seen) {
        match self.positions.back() {
            Some((last, _)) if *last == lsn => return,
            // It was set back.
            Some((last, _)) if *last > lsn => self.positions.clear(),
            _ => {}
        }
        if self.positions.len() >= POSITIONS_MAX {
            let mut number = 0;
            self.positions.retain(|_| {
                number += 1;
                number % 2 == 1
            });
        }
        self.positions.push_back((lsn, now));
    }

    /// Since when at least the server has been at `lsn` or behind it; `None` while it is not. What lies before is forgotten.
    pub(super) fn since(&mut self, lsn: Lsn) -> Option<Seen> {
        let before = self.positions.partition_point(|(seen, _)| *seen < lsn);
        let (_, since) = self.positions.get(before)?;
        let since = *since;
        self.positions.drain(..before);
        Some(since)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(ms: i64) -> Seen {
        Seen::test(ms, ms)
    }

    fn since(passed: &mut Passed, lsn: u64) -> Option<i64> {
        passed.since(Lsn(lsn)).map(|seen| seen.at_ms)
    }

    #[test]
    fn a_position_is_passed_since_the_server_was_first_seen_behind_it() {
        let mut passed = Passed::default();
        for (ms, lsn) in [(10, 100), (20, 200), (30, 200), (40, 350)] {
            passed.note(Lsn(lsn), at(ms));
        }
        assert_eq!(since(&mut passed, 100), Some(10));
        assert_eq!(since(&mut passed, 101), Some(20));
        assert_eq!(since(&mut passed, 300), Some(40));
        assert_eq!(since(&mut passed, 351), None);
        passed.note(Lsn(50), at(50));
        assert_eq!(since(&mut passed, 50), Some(50), "it was set back");
    }

    #[test]
    fn a_long_outage_is_remembered_within_bounds_and_since_its_beginning() {
        let mut passed = Passed::default();
        for ms in 0..100_000_i64 {
            passed.note(Lsn(ms.unsigned_abs()), at(ms));
            assert_eq!(passed.since(Lsn(0)).map(|seen| seen.at_ms), Some(0));
        }
        assert!(passed.positions.len() <= POSITIONS_MAX);
        assert!((50_000..98_000).contains(&since(&mut passed, 50_000).unwrap()));
    }
}
