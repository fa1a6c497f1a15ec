//! Up to when everything that had committed is archived.
//!
//! A server is asked again and again which transactions are over and where its log is. Whatever was committed at one of these
//! moments lies before the position of that moment; and as long as the server's snapshot stays the same nothing commits, however
//! much it writes otherwise. So an idle server's archive does not grow older.

use std::collections::VecDeque;

use proto::Lsn;

use crate::clock::Seen;

/// Moments that are remembered: hours at the usual pace. Beyond that every second one is forgotten, which makes what is known
/// less fine and never wrong.
const MOMENTS_MAX: usize = 4_096;

/// Moments at which the same had committed.
#[derive(Debug)]
struct Moment {
    snapshot: String,
    /// Behind all of it.
    lsn: Lsn,
    last: Seen,
}

/// What a server had committed when, as far as that is not archived yet.
#[derive(Debug, Default)]
pub(super) struct Commits {
    /// Oldest first.
    moments: VecDeque<Moment>,
}

impl Commits {
    /// Notes what the server showed when it was asked, which was `now` or later; all that is over lies before `lsn`.
    pub(super) fn note(&mut self, now: Seen, snapshot: &str, lsn: Lsn) {
        if let Some(last) = self.moments.back_mut()
            && last.snapshot == snapshot
        {
            last.last = now;
            last.lsn = last.lsn.min(lsn);
            return;
        }
        if self.moments.len() >= MOMENTS_MAX {
            let mut number = 0;
            self.moments.retain(|_| {
                number += 1;
                number % 2 == 0
            });
        }
        self.moments.push_back(Moment { snapshot: snapshot.to_owned(), lsn, last: now });
    }

    /// The newest moment of which everything committed lies before `archived_to`; `None` when none does that is remembered.
    pub(super) fn safe_at(&mut self, archived_to: Lsn) -> Option<Seen> {
        let safe = self.moments.iter().rposition(|moment| moment.lsn <= archived_to)?;
        self.moments.drain(..safe);
        self.moments.front().map(|moment| moment.last)
    }

    /// Nothing of what was noted counts any more, as after a promotion.
    pub(super) fn forget(&mut self) {
        self.moments.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(commits: &mut Commits, at_ms: i64, snapshot: &str, lsn: u64) {
        commits.note(Seen::test(at_ms, at_ms), snapshot, Lsn(lsn));
    }

    fn safe_at(commits: &mut Commits, archived_to: u64) -> Option<i64> {
        commits.safe_at(Lsn(archived_to)).map(|seen| seen.at_ms)
    }

    #[test]
    fn what_is_archived_is_safe_up_to_the_last_moment_before_it() {
        let mut commits = Commits::default();
        assert_eq!(safe_at(&mut commits, u64::MAX), None);
        for (at_ms, snapshot, lsn) in [(10, "a", 100), (20, "b", 200), (30, "c", 300)] {
            note(&mut commits, at_ms, snapshot, lsn);
        }
        assert_eq!(safe_at(&mut commits, 99), None);
        assert_eq!(safe_at(&mut commits, 100), Some(10));
        assert_eq!(safe_at(&mut commits, 299), Some(20));
        assert_eq!(safe_at(&mut commits, 299), Some(20), "asked again");
        assert_eq!(safe_at(&mut commits, 1_000), Some(30));
        commits.forget();
        assert_eq!(safe_at(&mut commits, 1_000), None);
    }

    #[test]
    fn an_idle_server_stays_safe_though_its_log_goes_on() {
        let mut commits = Commits::default();
        note(&mut commits, 10, "a", 100);
        note(&mut commits, 20, "b", 150);
        for at_ms in 21..1_000 {
            // Checkpoints and the like.
            note(&mut commits, at_ms, "b", 150 + at_ms.unsigned_abs());
        }
        assert_eq!(safe_at(&mut commits, 160), Some(999));
        note(&mut commits, 1_000, "c", 5_000);
        assert_eq!(safe_at(&mut commits, 160), Some(999));
        assert_eq!(safe_at(&mut commits, 149), None, "an archive that went back is believed");
        // It turns out that what was written since holds no commit.
        note(&mut commits, 1_010, "c", 150);
        assert_eq!(safe_at(&mut commits, 160), Some(1_010));
    }

    #[test]
    fn a_long_outage_is_remembered_within_bounds() {
        let mut commits = Commits::default();
        for at_ms in 0..100_000_i64 {
            note(&mut commits, at_ms, &at_ms.to_string(), at_ms.unsigned_abs());
        }
        assert!(commits.moments.len() <= MOMENTS_MAX);
        let safe = safe_at(&mut commits, 99_000).unwrap();
        assert!((90_000..=99_000).contains(&safe), "{safe}");
    }
}
