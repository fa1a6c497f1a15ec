//! What proofs show of their backups.

use policy::recoverable::{is_found_bad, is_proved, standing_failure};
use policy::recovery_time::{Measured, Replayed};
use policy::state::ProofFact;
use proto::proof::{CheckOutcome, Proof, ProofLevel};

use crate::catalog::backups::{ProofRow, Shown};

/// What a proof shows. One that fell short only because something could not be looked at, by no fault of the backup, shows what
/// it did reach; when that is nothing, it shows nothing.
pub(crate) fn fact(row: &ProofRow) -> Option<ProofFact> {
    let proof = &row.proof;
    let found_wrong = proof.checks.iter().any(|check| check.outcome == CheckOutcome::Failed);
    let fell_short = !proof.passed && !found_wrong && !proof.checks.is_empty();
    let level = if fell_short { proof.level_reached? } else { proof.level_asked };
    Some(ProofFact {
        at_ms: proof.at_ms,
        level,
        passed: proof.passed || fell_short,
        recovery_time_ms: proof.recovery_time_ms(),
        tables: proof.tables,
    })
}

/// What proofs of one backup say of it together.
pub(crate) fn shown(rows: &[ProofRow]) -> Shown {
    let facts = facts(rows);
    match () {
        () if is_found_bad(&facts) => Shown::Bad,
        () if is_proved(&facts) => Shown::Proved,
        () => Shown::None,
    }
}

/// Facts of every proof that shows something.
pub(crate) fn facts(rows: &[ProofRow]) -> Vec<ProofFact> {
    rows.iter().filter_map(fact).collect()
}

/// What a proof measured of a recovery; `None` when it restored nothing, or not to its end.
pub(crate) fn measured(proof: &Proof) -> Option<Measured> {
    if proof.level_reached < Some(ProofLevel::L3) {
        return None;
    }
    let took = |name: &str| -> u64 {
        let phases = proof.phases.iter().filter(|phase| phase.name == name);
        phases.map(|phase| phase.duration_ms).sum()
    };
    let replay_ms = took("replay");
    let replayed = proof
        .recovery
        .as_ref()
        .map(|recovery| Replayed { bytes: recovery.replayed_bytes, duration_ms: replay_ms });
    let own_replay_ms = if replayed.is_some() { 0 } else { replay_ms };
    Some(Measured {
        at_ms: proof.at_ms,
        restored_bytes: proof.size_bytes,
        restore_ms: took("restore"),
        start_ms: took("start") + own_replay_ms + took("open"),
        replayed,
    })
}

/// The last commit that a proof of one backup was seen to replay, Unix milliseconds.
pub(crate) fn replayed_to_ms(rows: &[ProofRow]) -> Option<i64> {
    let passed = rows.iter().filter(|row| row.proof.passed);
    let commits = passed.filter_map(|row| row.proof.recovery.as_ref()?.last_commit);
    commits.map(jiff::Timestamp::as_millisecond).max()
}

/// The proof to show, of those of a backup, newest first: the newest that restored it, unless something was found wrong since.
/// One that only looked at objects takes nothing away from it.
pub(crate) fn telling(proofs: &[ProofRow]) -> Option<&ProofRow> {
    let facts = facts(proofs);
    if let Some(failed) = standing_failure(&facts) {
        return proofs.iter().find(|row| fact(row).as_ref() == Some(failed));
    }
    let restored = |row: &&ProofRow| row.proof.level_reached >= Some(ProofLevel::L3);
    proofs.iter().find(restored).or(proofs.first())
}

#[cfg(test)]
mod tests {
    use proto::proof::{Phase, ProofCheck, ProofRecovery};
    use proto::{
        AttemptId, BackupId, BackupKind, JobId, LineageId, Lsn, SystemIdentifier, Timeline,
    };

    use super::*;

    fn row(asked: ProofLevel, reached: Option<ProofLevel>, outcome: CheckOutcome) -> ProofRow {
        let check = ProofCheck {
            name: "row_counts".to_owned(),
            level: asked,
            outcome,
            detail: String::new(),
        };
        let proof = Proof {
            backup: BackupId::mint(1, [1; 10]),
            kind: BackupKind::Physical,
            lineage: LineageId::mint(1, [1; 10]),
            cluster: "orders".parse().unwrap(),
            system_identifier: SystemIdentifier(1),
            worker: "w1".parse().unwrap(),
            at_ms: 1,
            level_asked: asked,
            level_reached: reached,
            passed: reached == Some(asked),
            server_version_num: None,
            reached_lsn: None,
            phases: Vec::new(),
            size_bytes: 0,
            tables: 0,
            rows: 0,
            tables_exact: 0,
            tables_bounded: 0,
            checks: vec![check],
            isolation: String::new(),
            recovery: None,
        };
        ProofRow { id: AttemptId::mint(1, [1; 10]), job: JobId::mint(1, [1; 10]), proof }
    }

    #[test]
    fn a_proof_that_could_not_look_everywhere_shows_what_it_reached() {
        use CheckOutcome::{Failed, Passed, Skipped};
        use ProofLevel::{L2, L4, L5};
        let shows = |row: &ProofRow| fact(row).map(|fact| (fact.level, fact.passed));
        assert_eq!(shows(&row(L5, Some(L5), Passed)), Some((L5, true)));
        assert_eq!(shows(&row(L5, Some(L4), Skipped)), Some((L4, true)), "no right to count");
        assert_eq!(shows(&row(L5, Some(L4), Failed)), Some((L5, false)), "it counted, and wrong");
        assert_eq!(shows(&row(L2, None, Skipped)), None);
    }

    #[test]
    fn a_look_at_objects_hides_no_restore_and_a_failure_hides_everything() {
        use CheckOutcome::{Failed, Passed};
        use ProofLevel::{L1, L2, L5};
        let restored = row(L5, Some(L5), Passed);
        let looked = row(L1, Some(L1), Passed);
        let failed = row(L2, Some(L1), Failed);
        let level = |rows: &[&ProofRow]| {
            let rows: Vec<ProofRow> = rows.iter().map(|row| (*row).clone()).collect();
            telling(&rows).map(|row| (row.proof.level_asked, row.proof.passed))
        };
        assert_eq!(level(&[&looked, &restored]), Some((L5, true)));
        assert_eq!(level(&[&failed, &restored]), Some((L2, false)));
        assert_eq!(level(&[&looked]), Some((L1, true)));
        assert_eq!(level(&[]), None);
    }

    #[test]
    fn a_proof_measures_what_it_restored_and_started() {
        use ProofLevel::{L2, L4, L5};
        let phase = |name: &str, duration_ms| Phase {
            name: name.to_owned(),
            duration_ms,
            counts_as_recovery: true,
        };
        let names = ["inventory", "restore", "start", "replay", "open", "check"];
        let mut proof = row(L5, Some(L4), CheckOutcome::Failed).proof;
        proof.phases = names
            .into_iter()
            .zip([1, 20, 300, 4_000, 50_000, 600_000])
            .map(|(name, ms)| phase(name, ms))
            .collect();
        proof.size_bytes = 7;
        let found = measured(&proof).unwrap();
        assert_eq!((found.restored_bytes, found.restore_ms, found.start_ms), (7, 20, 54_300));
        proof.recovery = Some(ProofRecovery {
            target: "the end of the WAL".to_owned(),
            timeline: Timeline(1),
            reached_lsn: Lsn(9),
            last_commit: None,
            evidence: String::new(),
            replayed_bytes: 8,
        });
        let found = measured(&proof).unwrap();
        assert_eq!(found.start_ms, 50_300, "what it replayed is told apart");
        assert_eq!(found.replayed, Some(Replayed { bytes: 8, duration_ms: 4_000 }));
        proof.level_reached = Some(L2);
        assert_eq!(measured(&proof), None, "it did not start");
    }
}
