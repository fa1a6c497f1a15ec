//! What is remembered of what workers tell about an archive.
//!
//! Several may tell about one cluster, late, and by clocks of their own. What they tell is put into the coordinator's time, the
//! newer wins, and what was known before along the same line stays known.

use proto::Lsn;
use proto::message::{WalStanding, WalWaiting};

use crate::reach::{is_foreign, is_on_the_way};

/// What is to be remembered after a worker told `told`; `None` when that is older than what is known. `told_at_ms` is when it
/// said so by its own clock, Unix milliseconds like `now_ms`. What was not renewed for `silence_max_ms` gives way to anything.
pub fn hear(
    before: Option<&WalStanding>,
    told: &WalStanding,
    told_at_ms: i64,
    now_ms: i64,
    silence_max_ms: i64,
) -> Option<WalStanding> {
    let mut standing = in_our_time(told, told_at_ms, now_ms);
    let Some(before) = before else { return Some(standing) };
    let same_lineage = before.lineage == standing.lineage;
    let is_fresh = i128::from(now_ms).abs_diff(i128::from(before.at_ms))
        <= u128::try_from(silence_max_ms).unwrap_or(0);
    // A server that was left behind by a promotion, or a worker that repeats itself.
    let is_past = if same_lineage && before.timeline != standing.timeline {
        standing.timeline < before.timeline
    } else {
        standing.at_ms <= before.at_ms
    };
    if is_fresh && is_past {
        return None;
    }
    if goes_on(before, &standing) {
        let known = before.safe_at_ms.filter(|safe| *safe <= standing.at_ms);
        standing.safe_at_ms = standing.safe_at_ms.max(known);
    }
    if let (Some(waiting), Some(earlier)) = (&mut standing.waiting, before.waiting)
        && same_lineage
        && waiting.segment == earlier.segment
    {
        waiting.since_ms = waiting.since_ms.min(earlier.since_ms);
    }
    Some(standing)
}

/// The same by our clock. A message takes a while, so a worker's clock is never taken for behind where that would make anything
/// seem safe that is not; and nothing is later than now.
fn in_our_time(told: &WalStanding, told_at_ms: i64, now_ms: i64) -> WalStanding {
    let shift_ms = now_ms.saturating_sub(told_at_ms);
    let at_ms = told.at_ms.min(told_at_ms).saturating_add(shift_ms);
    let earlier = |safe_ms: i64| {
        let age_ms = told.at_ms.saturating_sub(safe_ms).max(0);
        safe_ms.saturating_add(shift_ms.min(0)).min(at_ms.saturating_sub(age_ms))
    };
    let waits = |waiting: WalWaiting| WalWaiting {
        since_ms: waiting.since_ms.saturating_add(shift_ms).min(at_ms),
        ..waiting
    };
    WalStanding {
        at_ms,
        safe_at_ms: told.safe_at_ms.map(earlier),
        waiting: told.waiting.map(waits),
        ..told.clone()
    }
}

/// Whether everything that the archive had before lies on the line that it has now.
fn goes_on(before: &WalStanding, now: &WalStanding) -> bool {
    let Lsn(to) = before.archived_to;
    before.lineage == now.lineage
        && !is_foreign(before)
        && !is_foreign(now)
        && (now.line_from.0..=now.archived_to.0).contains(&to)
        && is_on_the_way(before.timeline, before.archived_to, now)
}

#[cfg(test)]
mod tests {
    use proto::message::WalAncestor;
    use proto::{LineageId, Timeline};

    use super::*;

    const SILENCE_MAX_MS: i64 = 120_000;

    fn standing(at_ms: i64) -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: LineageId::mint(1, [1; 10]),
            at_ms,
            timeline: Timeline(1),
            ancestors: Vec::new(),
            server_lsn: Lsn(950),
            line_from: Lsn(100),
            archived_to: Lsn(900),
            safe_at_ms: Some(at_ms - 10_000),
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    /// By a worker whose clock is right, told at once.
    fn heard(before: &WalStanding, told: &WalStanding) -> Option<WalStanding> {
        let now_ms = told.at_ms.max(before.at_ms) + 1_000;
        hear(Some(before), told, now_ms, now_ms, SILENCE_MAX_MS)
    }

    #[test]
    fn what_is_older_is_ignored_until_what_is_known_is_old() {
        let known = standing(1_000_000);
        assert!(heard(&known, &standing(1_005_000)).is_some());
        assert_eq!(heard(&known, &known), None, "the same again");
        assert_eq!(heard(&known, &standing(900_000)), None);
        let left = WalStanding { timeline: Timeline(2), ..known.clone() };
        assert_eq!(heard(&left, &standing(1_100_000)), None, "a server that was left behind");
        assert!(heard(&left, &standing(1_119_001)).is_some(), "nobody else speaks any more");
        let promoted = WalStanding { timeline: Timeline(2), ..standing(999_000) };
        assert!(heard(&known, &promoted).is_some());
        // Our own clock was set back.
        let told = standing(10_000);
        assert!(hear(Some(&known), &told, 10_000, 10_000, SILENCE_MAX_MS).is_some());
    }

    #[test]
    fn what_was_safe_stays_so_along_the_line_and_nowhere_else() {
        let safe = |change: &dyn Fn(&mut WalStanding)| {
            let known = standing(1_000_000);
            let mut told = WalStanding { safe_at_ms: None, ..standing(1_005_000) };
            change(&mut told);
            heard(&known, &told).unwrap().safe_at_ms
        };
        assert_eq!(safe(&|_| {}), Some(990_000), "a worker that has just started");
        assert_eq!(safe(&|told| told.safe_at_ms = Some(5)), Some(990_000));
        assert_eq!(safe(&|told| told.archived_to = Lsn(899)), None, "something was lost");
        assert_eq!(safe(&|told| told.line_from = Lsn(901)), None, "behind a gap");
        assert_eq!(safe(&|told| told.server_lsn = Lsn(899)), None, "not the server's own");
        assert_eq!(safe(&|told| told.lineage = LineageId::mint(1, [2; 10])), None);
        let promoted = |told: &mut WalStanding, left_at| {
            told.timeline = Timeline(2);
            told.ancestors = vec![WalAncestor { timeline: Timeline(1), left_at: Lsn(left_at) }];
        };
        assert_eq!(safe(&|told| promoted(told, 900)), Some(990_000));
        assert_eq!(safe(&|told| promoted(told, 899)), None, "some of it is on a branch");
        assert_eq!(safe(&|told| told.timeline = Timeline(2)), None, "nobody knows from where");
    }

    #[test]
    fn a_workers_clock_makes_nothing_safer_than_it_is() {
        let by = |ahead_ms: i64| {
            let told = WalStanding {
                waiting: Some(WalWaiting {
                    segment: "000000010000000000000003".parse().unwrap(),
                    since_ms: 970_000 + ahead_ms,
                    segments: 1,
                }),
                ..standing(1_000_000 + ahead_ms)
            };
            let heard = hear(None, &told, 1_002_000 + ahead_ms, 1_002_000, SILENCE_MAX_MS).unwrap();
            (heard.at_ms, heard.safe_at_ms.unwrap(), heard.waiting.unwrap().since_ms)
        };
        assert_eq!(by(0), (1_000_000, 990_000, 970_000));
        assert_eq!(by(86_400_000), (1_000_000, 990_000, 970_000), "a day ahead");
        // Behind, or long on its way: only that it lives is believed of it.
        assert_eq!(by(-600_000), (1_000_000, 390_000, 970_000));
        // It was set right between the look and the message.
        let ahead = standing(90_000_000);
        let right = hear(None, &ahead, 1_000_000, 1_000_000, SILENCE_MAX_MS).unwrap();
        assert_eq!((right.at_ms, right.safe_at_ms), (1_000_000, Some(990_000)));
        // What a clock said before it was set right is forgotten, not kept for a day.
        let wrong = WalStanding { safe_at_ms: Some(90_000_000), ..standing(1_000_000) };
        let told = WalStanding { safe_at_ms: None, ..standing(1_005_000) };
        assert_eq!(heard(&wrong, &told).unwrap().safe_at_ms, None);
        let odd = WalStanding { safe_at_ms: Some(i64::MAX), ..standing(i64::MAX) };
        assert_eq!(hear(None, &odd, 5_000, 7_000, SILENCE_MAX_MS).unwrap().safe_at_ms, Some(7_000));
    }

    #[test]
    fn a_worker_that_starts_anew_does_not_make_a_segment_wait_for_less() {
        let segment = "000000010000000000000003".parse().unwrap();
        let waiting = |since_ms| Some(WalWaiting { segment, since_ms, segments: 1 });
        let known = WalStanding { waiting: waiting(900_000), ..standing(1_000_000) };
        let told = WalStanding { waiting: waiting(1_004_000), ..standing(1_005_000) };
        assert_eq!(heard(&known, &told).unwrap().waiting.unwrap().since_ms, 900_000);
    }
}
