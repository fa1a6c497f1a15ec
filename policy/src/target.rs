//! Whether a cluster is recoverable to its target: how much of its newest work would be lost now, and how long a recovery
//! would take, beside what was promised. Each sentence has both numbers, and why.

use crate::recoverable::is_proved;
use crate::state::{ClusterFacts, Objectives, trouble};
use crate::words::{duration, span};

/// The share of a promise behind which it is nearly missed: four fifths.
const NEARLY: (i64, i64) = (4, 5);

/// What is certainly missed, as a sentence without a period. What nobody has looked at since the last contact may have gone on,
/// so the recovery point is held against that moment.
pub(crate) fn missed(facts: &ClusterFacts, objectives: &Objectives, now_ms: i64) -> Option<String> {
    let point = objectives.recovery_point_max_ms.and_then(|limit_ms| {
        let seen_at_ms = facts.seen_at_ms.unwrap_or(facts.registered_at_ms).min(now_ms);
        (lost_ms(facts, seen_at_ms) > limit_ms)
            .then(|| point_missed(facts, objectives, limit_ms, now_ms))
    });
    let time = objectives.recovery_time_max_ms.and_then(|limit_ms| {
        let time = facts.recovery_time?;
        let least_ms = milliseconds(time.at_least_ms());
        let at_least = if time.total_ms().is_some() { "" } else { "at least " };
        (least_ms > limit_ms).then(|| {
            format!(
                "{} would take {at_least}{}, the objective is {}",
                recovery(facts),
                duration(least_ms),
                span(limit_ms)
            )
        })
    });
    match (point, time) {
        (Some(point), Some(time)) => Some(format!("{point}; {time}")),
        (point, time) => point.or(time),
    }
}

/// What is one step from being missed.
pub(crate) fn nearly_missed(
    facts: &ClusterFacts,
    objectives: &Objectives,
    now_ms: i64,
) -> Option<String> {
    let nearly = |value_ms: i64, limit_ms: i64| {
        value_ms.saturating_mul(NEARLY.1) > limit_ms.saturating_mul(NEARLY.0)
    };
    if let Some(limit_ms) = objectives.recovery_point_max_ms {
        let lost_ms = lost_ms(facts, now_ms);
        if nearly(lost_ms, limit_ms) {
            let (lost, limit) = (span(lost_ms), span(limit_ms));
            return Some(format!("a disaster now would lose {lost}, the objective is {limit}"));
        }
    }
    let limit_ms = objectives.recovery_time_max_ms?;
    let least_ms = milliseconds(facts.recovery_time?.at_least_ms());
    nearly(least_ms, limit_ms).then(|| {
        let (least, limit) = (duration(least_ms), span(limit_ms));
        format!("{} would take {least}, the objective is {limit}", recovery(facts))
    })
}

/// What the recovery time is about. It begins with the newest backup, the recovery point with those that are proved.
fn recovery(facts: &ClusterFacts) -> &'static str {
    if is_proved(&facts.proofs) {
        "a recovery"
    } else {
        "a recovery from its newest backup, which is not proved,"
    }
}

/// What was promised and not measured: nobody knows whether it is kept.
pub(crate) fn unmeasured(facts: &ClusterFacts, objectives: &Objectives) -> Option<String> {
    let limit = span(objectives.recovery_time_max_ms?);
    match facts.recovery_time {
        None => {
            Some(format!("how long a recovery takes is not measured, the objective is {limit}"))
        }
        Some(time) if time.total_ms().is_none() => Some(format!(
            "a recovery takes {} and the replay of archived WAL, which pgmuster verify --to latest would measure; the objective is {limit}",
            duration(milliseconds(time.at_least_ms()))
        )),
        Some(_) => None,
    }
}

/// How much would have been lost at a moment. Before anything is proved, all since the cluster is known.
fn lost_ms(facts: &ClusterFacts, at_ms: i64) -> i64 {
    let point = facts.recoverable.map_or(facts.registered_at_ms, |point| point.at_ms);
    at_ms.saturating_sub(point)
}

fn point_missed(
    facts: &ClusterFacts,
    objectives: &Objectives,
    limit_ms: i64,
    now_ms: i64,
) -> String {
    let (lost, limit) = (span(lost_ms(facts, now_ms)), span(limit_ms));
    let why = why(facts, objectives, now_ms);
    match facts.recoverable {
        Some(_) => format!("a disaster now would lose {lost}, the objective is {limit}: {why}"),
        None => format!(
            "nothing of it is proved recoverable since it was announced {lost} ago, the objective is {limit}: {why}"
        ),
    }
}

/// Why its recovery point is not newer.
fn why(facts: &ClusterFacts, objectives: &Objectives, now_ms: i64) -> String {
    if let Some(trouble) = trouble(facts, objectives, now_ms) {
        return trouble;
    }
    let leads_on = facts.recoverable.is_some_and(|point| point.leads_on);
    if let Some(failure) = &facts.backup_failure
        && !leads_on
    {
        return format!("its last backup failed: {failure}");
    }
    let is_proved = facts.proofs.iter().any(|proof| proof.passed);
    match () {
        () if facts.backup.is_none() => "no backup has been taken yet",
        () if facts.backup.is_some_and(|backup| backup.part_of.is_some()) => {
            "its newest backup is a dump that leaves out databases"
        }
        () if leads_on => "what was committed since is in no archived segment",
        () if !is_proved => "its newest backup is not proved",
        () if facts.wal.is_none() => "its WAL is not archived",
        () => "archived WAL does not lead on from what is proved",
    }
    .to_owned()
}

fn milliseconds(ms: u64) -> i64 {
    i64::try_from(ms).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use proto::ProofLevel;
    use proto::failure::{Action, Code, Failure};

    use super::*;
    use crate::recoverable::RecoveryPoint;
    use crate::recovery_time::RecoveryTime;
    use crate::state::{BackupFact, ClusterState, ProofFact, judge_cluster};

    const MINUTE: i64 = 60_000;
    const NOW: i64 = 100_000 * MINUTE;

    fn promised() -> Objectives {
        Objectives {
            recovery_point_max_ms: Some(15 * MINUTE),
            recovery_time_max_ms: Some(60 * MINUTE),
            ..Objectives::default()
        }
    }

    fn point(age_ms: i64, leads_on: bool) -> RecoveryPoint {
        RecoveryPoint { at_ms: NOW - age_ms, leads_on }
    }

    fn time(minutes: u64, wal_bytes: u64) -> RecoveryTime {
        RecoveryTime {
            size_bytes: 1,
            restore_ms: minutes * 60_000,
            start_ms: 0,
            wal_bytes,
            replay_ms: None,
            measured_at_ms: NOW,
        }
    }

    /// Proved, recoverable up to a minute ago, within ten minutes.
    fn healthy() -> ClusterFacts {
        ClusterFacts {
            registered_at_ms: NOW - 10_000 * MINUTE,
            seen_at_ms: Some(NOW),
            contact_since_ms: Some(NOW - 10_000 * MINUTE),
            has_repository: true,
            backup: Some(BackupFact {
                stopped_at_ms: NOW - 600 * MINUTE,
                part_of: None,
                bad_pages: 0,
                silent_changes: 0,
            }),
            proofs: vec![ProofFact {
                at_ms: NOW - 500 * MINUTE,
                level: ProofLevel::L5,
                passed: true,
                recovery_time_ms: 600_000,
                tables: 3,
                replayed_to: None,
                unmet: 0,
                unasked: 0,
            }],
            recoverable: Some(point(MINUTE, true)),
            recovery_time: Some(time(10, 0)),
            ..ClusterFacts::default()
        }
    }

    fn judged(change: impl FnOnce(&mut ClusterFacts)) -> (ClusterState, String) {
        let mut facts = healthy();
        change(&mut facts);
        let judgement = judge_cluster(&facts, &promised(), NOW);
        (judgement.state, judgement.reason)
    }

    #[test]
    fn a_promise_is_kept_nearly_missed_and_missed() {
        use ClusterState::{AtRisk, Broken, Proved};
        let lost = |minutes: i64| judged(|f| f.recoverable = Some(point(minutes * MINUTE, true)));
        assert_eq!(lost(12).0, Proved);
        assert_eq!(
            lost(13),
            (AtRisk, "a disaster now would lose 13 min, the objective is 15 min".to_owned())
        );
        assert_eq!(lost(15).0, AtRisk);
        let missed = "a disaster now would lose 16 min, the objective is 15 min: what was committed since is in no archived segment";
        assert_eq!(lost(16), (Broken, missed.to_owned()));
        let takes = |minutes: u64| judged(|f| f.recovery_time = Some(time(minutes, 0)));
        assert_eq!(takes(48).0, Proved);
        assert_eq!(
            takes(49),
            (AtRisk, "a recovery would take 49m00s, the objective is 1 h".to_owned())
        );
        assert_eq!(
            takes(61),
            (Broken, "a recovery would take 1h01m, the objective is 1 h".to_owned())
        );
        let (_, unproved) = judged(|f| {
            f.proofs.clear();
            f.recovery_time = Some(time(61, 0));
        });
        assert_eq!(
            unproved,
            "a recovery from its newest backup, which is not proved, would take 1h01m, the objective is 1 h"
        );
        let nothing = Objectives::default();
        let mut facts = healthy();
        (facts.recoverable, facts.recovery_time) =
            (Some(point(900 * MINUTE, true)), Some(time(900, 0)));
        assert_eq!(judge_cluster(&facts, &nothing, NOW).state, Proved, "nothing was promised");
    }

    #[test]
    fn both_misses_are_told_in_one_sentence() {
        let (state, reason) = judged(|f| {
            (f.recoverable, f.recovery_time) = (Some(point(20 * MINUTE, true)), Some(time(120, 1)));
        });
        assert_eq!(state, ClusterState::Broken);
        assert!(
            reason.starts_with("a disaster now would lose 20 min, the objective is 15 min: "),
            "{reason}"
        );
        assert!(
            reason.ends_with("; a recovery would take at least 2h00m, the objective is 1 h"),
            "{reason}"
        );
    }

    #[test]
    fn the_sentence_says_why_nothing_newer_is_recoverable() {
        let why = |change: &dyn Fn(&mut ClusterFacts)| {
            let (state, reason) = judged(|f| {
                f.recoverable = Some(point(600 * MINUTE, false));
                change(f);
            });
            assert_eq!(state, ClusterState::Broken, "{reason}");
            let reason =
                reason.strip_prefix("a disaster now would lose 10 h, the objective is 15 min: ");
            reason.unwrap().to_owned()
        };
        assert_eq!(why(&|_| {}), "its WAL is not archived");
        assert_eq!(why(&|f| f.proofs.clear()), "its newest backup is not proved");
        let failure = || Failure::new(Code::WalMissing, Action::Retry, "WAL is gone");
        assert_eq!(
            why(&|f| f.backup_failure = Some(failure())),
            "its last backup failed: WAL_MISSING: WAL is gone"
        );
    }

    #[test]
    fn a_cluster_of_which_nothing_is_proved_has_its_promise_from_when_it_was_announced() {
        use ClusterState::{Broken, Pending};
        let after = |minutes: i64| {
            judged(|f| {
                (f.backup, f.proofs, f.recoverable, f.recovery_time) =
                    (None, Vec::new(), None, None);
                f.registered_at_ms = NOW - minutes * MINUTE;
            })
        };
        assert_eq!(after(15).0, Pending);
        assert_eq!(
            after(16),
            (
                Broken,
                "nothing of it is proved recoverable since it was announced 16 min ago, the objective is 15 min: no backup has been taken yet"
                    .to_owned()
            )
        );
    }

    #[test]
    fn what_was_kept_at_the_last_contact_is_unknown_and_what_was_missed_is_missed() {
        let silent = |lost_minutes: i64| {
            judged(|f| {
                f.seen_at_ms = Some(NOW - 30 * MINUTE);
                f.recoverable = Some(point((30 + lost_minutes) * MINUTE, true));
            })
        };
        assert_eq!(silent(15).0, ClusterState::Unknown);
        let (state, reason) = silent(16);
        assert_eq!(state, ClusterState::Broken);
        assert!(reason.starts_with("a disaster now would lose 46 min"), "{reason}");
    }

    #[test]
    fn a_recovery_that_was_not_measured_is_no_promise_kept() {
        use ClusterState::Taken;
        assert_eq!(
            judged(|f| f.recovery_time = None),
            (Taken, "how long a recovery takes is not measured, the objective is 1 h".to_owned())
        );
        let (state, reason) = judged(|f| f.recovery_time = Some(time(10, 1)));
        assert_eq!(state, Taken);
        assert_eq!(
            reason,
            "a recovery takes 10m00s and the replay of archived WAL, which pgmuster verify --to latest would measure; the objective is 1 h"
        );
    }
}
