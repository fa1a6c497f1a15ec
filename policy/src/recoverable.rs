//! Up to when a cluster can be recovered by what was proved: from which of its backups, and how far WAL leads on from there.
//!
//! A backup that nobody restored is no promise, however new it is. So a recovery point counts from the backups that a proof
//! restored and none found wrong since; what the others would give is kept apart, as what is only on paper.

use proto::ProofLevel;
use proto::message::WalStanding;

use crate::broken::{BrokenStretch, Replay, in_the_way};
use crate::reach::{BackupEnd, is_ahead, leads_on, recovery_point};
use crate::state::ProofFact;

/// What a proof must have shown for its backup to count: restored, and its end was reached.
const RESTORED: ProofLevel = ProofLevel::L3;

/// A backup that something can be recovered from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// What had committed by then a restore of it alone brings back, Unix milliseconds.
    pub recovers_to_ms: i64,
    /// Where WAL leads on from; `None` for a logical backup, from which nothing leads on.
    pub end: Option<BackupEnd>,
    /// Recoveries that began with it.
    pub replays: Vec<Replay>,
    /// A proof restored it, and none found it wrong since.
    pub is_proved: bool,
}

/// Up to when a cluster can be recovered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecoveryPoint {
    /// What had committed by then is not lost, Unix milliseconds.
    pub at_ms: i64,
    /// Whether an unbroken line leads from there to where the archive of its server is.
    pub leads_on: bool,
}

/// The same by what was proved, and on paper.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Reach {
    /// From backups that are proved.
    pub proved: Option<RecoveryPoint>,
    /// From all that are not known to be bad.
    pub on_paper: Option<RecoveryPoint>,
}

impl Reach {
    /// From these backups, none of which is known to be bad.
    pub fn of(sources: &[Source], wal: Option<&WalStanding>, broken: &[BrokenStretch]) -> Self {
        let proved = sources.iter().filter(|source| source.is_proved);
        Self { proved: furthest(proved, wal, broken), on_paper: furthest(sources, wal, broken) }
    }
}

/// Whether proofs of one backup, in any order, make it one to recover from: it was restored, and nothing was found wrong since.
pub fn is_proved(proofs: &[ProofFact]) -> bool {
    let is_restored = proofs.iter().any(|proof| proof.passed && proof.level >= RESTORED);
    is_restored && !is_found_bad(proofs)
}

/// Whether a proof of a backup found something wrong, and none since that looked as closely found it right.
pub fn is_found_bad(proofs: &[ProofFact]) -> bool {
    standing_failure(proofs).is_some()
}

/// The newest proof of a backup that found something wrong and stands. One of a lower level does not lift it; nor does one of the
/// backup alone where the failure was seen in a copy that had replayed more, because that may be where it came from, or along another
/// timeline.
pub fn standing_failure(proofs: &[ProofFact]) -> Option<&ProofFact> {
    let stands = |failed: &&ProofFact| {
        let lifts = |later: &ProofFact| {
            later.passed
                && later.at_ms > failed.at_ms
                && later.level >= failed.level
                && failed.replayed_to.is_none_or(|failed| {
                    later.replayed_to.is_some_and(|later| later.includes(failed))
                })
        };
        !failed.passed && !proofs.iter().any(lifts)
    };
    proofs.iter().filter(stands).max_by_key(|failed| failed.at_ms)
}

/// How far the best of several backups leads; `None` without any. WAL that is known to be broken ends every line through it.
pub fn furthest<'a>(
    sources: impl IntoIterator<Item = &'a Source>,
    wal: Option<&WalStanding>,
    broken: &[BrokenStretch],
) -> Option<RecoveryPoint> {
    let points = sources.into_iter().map(|source| point_of(source, wal, broken));
    points.max_by_key(|point| (point.at_ms, point.leads_on))
}

fn point_of(source: &Source, wal: Option<&WalStanding>, broken: &[BrokenStretch]) -> RecoveryPoint {
    let Some(end) = &source.end else {
        return RecoveryPoint { at_ms: source.recovers_to_ms, leads_on: false };
    };
    let counts = |replay: &&Replay| {
        wal.is_none_or(|wal| replay.is_past_of(wal) && replay.is_still_there(end, wal))
            && !broken.iter().any(|stretch| replay.goes_through(stretch))
    };
    let seen = source.replays.iter().filter(counts).filter_map(|replay| replay.last_commit_ms);
    let seen_ms = seen.max().map_or(source.recovers_to_ms, |to| to.max(source.recovers_to_ms));
    if in_the_way(broken, end, wal).is_some() {
        return RecoveryPoint { at_ms: seen_ms, leads_on: false };
    }
    RecoveryPoint {
        at_ms: recovery_point(end, wal).max(seen_ms),
        leads_on: wal.is_some_and(|wal| leads_on(end, wal) || is_ahead(end, wal)),
    }
}

#[cfg(test)]
mod tests {
    use proto::message::WalAncestor;
    use proto::{LineageId, Lsn, Timeline};

    use super::*;
    use crate::state::ReplayedTo;

    const SAFE_MS: i64 = 90_000;

    fn proof(at_ms: i64, level: ProofLevel, passed: bool) -> ProofFact {
        ProofFact {
            at_ms,
            level,
            passed,
            recovery_time_ms: 0,
            tables: 0,
            replayed_to: None,
            unmet: 0,
            unasked: 0,
        }
    }

    #[test]
    fn a_failure_stands_until_a_proof_that_looks_as_closely_passes() {
        let (l1, l4, l5) = (ProofLevel::L1, ProofLevel::L4, ProofLevel::L5);
        let failed = [proof(1, l5, true), proof(2, l4, false)];
        assert!(is_found_bad(&failed));
        let looked = [&failed[..], &[proof(3, l1, true)]].concat();
        assert!(
            is_found_bad(&looked) && !is_proved(&looked),
            "objects that are there prove nothing"
        );
        assert!(is_proved(&[&failed[..], &[proof(3, l4, true)]].concat()));
        assert!(is_proved(&[proof(2, l4, true), proof(1, l5, true), proof(0, l4, false)]));
    }

    #[test]
    fn a_failure_after_replay_is_lifted_by_one_that_replays_as_much() {
        let l4 = ProofLevel::L4;
        let along = |timeline, at_ms, to, passed| ProofFact {
            replayed_to: Some(ReplayedTo { timeline: Timeline(timeline), lsn: Lsn(to) }),
            ..proof(at_ms, l4, passed)
        };
        let replayed = |at_ms, to, passed| along(1, at_ms, to, passed);
        let failed = [proof(1, l4, true), replayed(2, 500, false)];
        assert!(is_found_bad(&failed));
        let and = |later: ProofFact| is_found_bad(&[&failed[..], &[later]].concat());
        assert!(and(proof(3, ProofLevel::L5, true)), "it did not look behind the backup");
        assert!(and(replayed(3, 499, true)));
        assert!(!and(replayed(3, 500, true)));
        assert!(and(along(2, 3, 900, true)), "it may have left that timeline before");
        assert!(!is_found_bad(&[proof(1, l4, false), replayed(2, 500, true)]));
    }

    fn lineage(n: u8) -> LineageId {
        LineageId::mint(1, [n; 10])
    }

    /// The archive's line begins at 100 and is at 900.
    fn wal() -> WalStanding {
        WalStanding {
            cluster: "orders".parse().unwrap(),
            lineage: lineage(1),
            at_ms: 100_000,
            timeline: Timeline(1),
            ancestors: Vec::new(),
            server_lsn: Lsn(950),
            line_from: Lsn(100),
            archived_to: Lsn(900),
            safe_at_ms: Some(SAFE_MS),
            waiting: None,
            gap: None,
            gaps: Vec::new(),
            conflict: None,
        }
    }

    /// A backup that ended at a position, at ten times as many milliseconds.
    fn source(stop: u64) -> Source {
        let recovers_to_ms = i64::try_from(stop * 10).unwrap();
        let end = BackupEnd {
            lineage: lineage(1),
            timeline: Timeline(1),
            start_lsn: Lsn(stop - 50),
            stop_lsn: Lsn(stop),
            wal_to: Lsn(stop),
            stopped_at_ms: recovers_to_ms,
        };
        Source { recovers_to_ms, end: Some(end), replays: Vec::new(), is_proved: true }
    }

    /// One that a proof replayed along a timeline to a position, where the last commit was as old as one of a backup there.
    fn replayed(source: &Source, timeline: u32, to: u64) -> Source {
        let end = source.end.unwrap();
        let replay = Replay {
            lineage: end.lineage,
            timeline: Timeline(timeline),
            from: end.start_lsn,
            to: Lsn(to),
            last_commit_ms: Some(i64::try_from(to * 10).unwrap()),
            at_ms: 1_000,
        };
        Source { replays: vec![replay], ..source.clone() }
    }

    fn on(timeline: u32, source: Source) -> Source {
        let end = source.end.map(|end| BackupEnd { timeline: Timeline(timeline), ..end });
        Source { end, ..source }
    }

    fn of(n: u8, source: Source) -> Source {
        Source { end: source.end.map(|end| BackupEnd { lineage: lineage(n), ..end }), ..source }
    }

    fn reaches(at_ms: i64) -> RecoveryPoint {
        RecoveryPoint { at_ms, leads_on: true }
    }

    fn ends(at_ms: i64) -> RecoveryPoint {
        RecoveryPoint { at_ms, leads_on: false }
    }

    fn point(sources: &[Source], wal: Option<&WalStanding>) -> Option<RecoveryPoint> {
        furthest(sources, wal, &[])
    }

    #[test]
    fn an_older_backup_reaches_as_far_as_the_line_does() {
        assert_eq!(point(&[source(200)], Some(&wal())), Some(reaches(SAFE_MS)));
        assert_eq!(point(&[source(300), source(200)], Some(&wal())), Some(reaches(SAFE_MS)));
        assert_eq!(point(&[], Some(&wal())), None);
        // Nothing is archived: each ends where it ends.
        assert_eq!(point(&[source(200), source(300)], None), Some(ends(3_000)));
        let dump = Source { end: None, ..source(400) };
        assert_eq!(point(&[dump], Some(&wal())), Some(ends(4_000)), "nothing leads on from a dump");
    }

    #[test]
    fn what_is_not_proved_reaches_on_paper_only() {
        let unproved = Source { is_proved: false, ..source(400) };
        let reach = Reach::of(&[unproved.clone(), source(200)], None, &[]);
        assert_eq!((reach.proved, reach.on_paper), (Some(ends(2_000)), Some(ends(4_000))));
        assert_eq!(Reach::of(&[unproved], None, &[]).proved, None);
    }

    #[test]
    fn wal_that_was_found_broken_ends_every_line_through_it() {
        let stretch = BrokenStretch {
            lineage: lineage(1),
            timeline: Timeline(1),
            from: Lsn(500),
            to: Lsn(600),
            at_ms: 2_000,
        };
        let point = |sources: &[Source]| furthest(sources, Some(&wal()), &[stretch]);
        assert_eq!(point(&[source(200)]), Some(ends(2_000)));
        assert_eq!(point(&[source(200), source(649)]), Some(ends(6_490)), "it begins in there");
        assert_eq!(point(&[source(200), source(650)]), Some(reaches(SAFE_MS)), "it begins behind");
        // What a proof saw before counts as far as it does not need that stretch.
        assert_eq!(point(&[replayed(&source(200), 1, 500)]), Some(ends(5_000)));
        assert_eq!(point(&[replayed(&source(200), 1, 501)]), Some(ends(2_000)));
        let reach = Reach::of(&[source(200)], Some(&wal()), &[stretch]);
        assert_eq!(reach.on_paper, Some(ends(2_000)), "that is known whatever is proved");
    }

    #[test]
    fn behind_a_gap_a_reach_ends_with_the_backup_before_it() {
        let gap = WalStanding { line_from: Lsn(500), ..wal() };
        assert_eq!(point(&[source(400), source(200)], Some(&gap)), Some(ends(4_000)));
        let seen = replayed(&source(400), 1, 440);
        assert_eq!(point(&[seen], Some(&gap)), Some(ends(4_400)), "a proof went so far");
        assert_eq!(point(&[source(500), source(400)], Some(&gap)), Some(reaches(SAFE_MS)));
    }

    #[test]
    fn what_was_replayed_on_a_branch_that_was_left_does_not_count() {
        let ancestor = WalAncestor { timeline: Timeline(1), left_at: Lsn(420) };
        let gap = WalStanding {
            line_from: Lsn(500),
            timeline: Timeline(2),
            ancestors: vec![ancestor],
            ..wal()
        };
        let reach = |timeline, to| point(&[replayed(&source(400), timeline, to)], Some(&gap));
        assert_eq!(reach(1, 420), Some(ends(4_200)));
        assert_eq!(reach(1, 440), Some(ends(4_000)), "the server left before that");
        assert_eq!(reach(2, 440), Some(ends(4_400)));
        assert_eq!(reach(3, 440), Some(ends(4_000)), "a branch that is not the server's");
    }

    #[test]
    fn what_was_replayed_does_not_count_when_the_archive_has_lost_it() {
        let lost = |to| WalStanding { archived_to: Lsn(to), safe_at_ms: None, ..wal() };
        let seen = replayed(&source(400), 1, 600);
        let reach =
            |source: &Source, wal: &WalStanding| point(std::slice::from_ref(source), Some(wal));
        assert_eq!(reach(&seen, &lost(600)), Some(reaches(6_000)));
        assert_eq!(reach(&seen, &lost(599)), Some(reaches(4_000)), "its end was deleted");
        // The end of what a backup brought along is not the archive's.
        let brought = |wal_to| {
            let end = seen.end.map(|end| BackupEnd { wal_to: Lsn(wal_to), ..end });
            Source { end, ..seen.clone() }
        };
        assert_eq!(reach(&brought(600), &lost(500)), Some(reaches(6_000)));
        assert_eq!(reach(&brought(599), &lost(500)), Some(reaches(4_000)));
        // A server was promoted, and its archive has nothing of the new timeline yet.
        let ancestors = vec![WalAncestor { timeline: Timeline(1), left_at: Lsn(620) }];
        let promoted = WalStanding { timeline: Timeline(2), ancestors, ..lost(600) };
        let on_the_way = replayed(&source(400), 1, 610);
        assert_eq!(reach(&on_the_way, &promoted), Some(reaches(6_100)));
    }

    #[test]
    fn a_backup_of_another_history_reaches_no_further_than_its_end() {
        assert_eq!(point(&[of(2, source(400))], Some(&wal())), Some(ends(4_000)));
        assert_eq!(point(&[of(2, source(400)), source(200)], Some(&wal())), Some(reaches(SAFE_MS)));
        let foreign = WalStanding { server_lsn: Lsn(800), ..wal() };
        let point = point(&[source(400)], Some(&foreign)).unwrap();
        assert_eq!(point.at_ms, 4_000, "another server archives there");
    }

    #[test]
    fn of_several_timelines_only_those_on_the_way_of_the_server_count() {
        let ancestors = [(1, 600), (2, 700)].map(|(timeline, left_at)| WalAncestor {
            timeline: Timeline(timeline),
            left_at: Lsn(left_at),
        });
        let promoted =
            WalStanding { timeline: Timeline(3), ancestors: ancestors.to_vec(), ..wal() };
        let point = |sources: &[Source]| point(sources, Some(&promoted));
        assert_eq!(point(&[source(200)]), Some(reaches(SAFE_MS)), "two promotions ago");
        assert_eq!(point(&[on(2, source(650))]), Some(reaches(SAFE_MS)));
        assert_eq!(point(&[on(3, source(800))]), Some(reaches(SAFE_MS)));
        assert_eq!(point(&[source(601)]), Some(ends(6_010)), "on the branch that was left");
        assert_eq!(point(&[on(2, source(701))]), Some(ends(7_010)));
        assert_eq!(
            point(&[source(601), source(200)]),
            Some(reaches(SAFE_MS)),
            "the older one leads on"
        );
    }

    #[test]
    fn a_backup_that_the_archive_has_not_reached_yet_leads_on() {
        let point = point(&[source(901)], Some(&wal()));
        assert_eq!(point, Some(reaches(9_010)), "it has just been taken");
    }

    #[test]
    fn a_restore_proves_until_something_is_found_wrong() {
        use ProofLevel::{L1, L2, L3, L5};
        assert!(!is_proved(&[]));
        assert!(!is_proved(&[proof(1, L2, true)]), "nobody restored it");
        assert!(is_proved(&[proof(1, L3, true)]));
        assert!(is_proved(&[proof(2, L1, true), proof(1, L5, true)]), "only looked at since");
        assert!(!is_proved(&[proof(1, L5, true), proof(2, L1, false)]), "an object is gone");
        assert!(!is_proved(&[proof(3, L3, true), proof(2, L5, false), proof(1, L5, true)]));
        assert!(is_proved(&[proof(3, L5, true), proof(2, L5, false), proof(1, L3, true)]));
        assert!(is_found_bad(&[proof(2, L5, false), proof(1, L5, true)]));
    }
}
