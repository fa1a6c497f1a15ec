//! What proofs show of their backups, and of archived WAL.

use policy::broken::{self, BrokenStretch, Replay};
use policy::recoverable::{is_found_bad, is_proved, standing_failure};
use policy::recovery_time::{Measured, Replayed};
use policy::state::{ProofFact, ReplayedTo};
use proto::BackupId;
use proto::proof::{CheckOutcome, Proof, ProofLevel};

use crate::catalog::backups::{self, Backup, ProofRow, Shown, Worth};
use crate::catalog::clusters;
use crate::catalog::{Catalog, Tx, TxFuture, jobs};
use crate::error::{Error, Result};

/// What a proof shows of its backup: the level that is proved, or the one at which it speaks against it; when nothing is proved, it
/// shows nothing.
pub(crate) fn fact(row: &ProofRow) -> Option<ProofFact> {
    let proof = &row.proof;
    let speaks_against = proof.speaks_against();
    let found_wrong = proof.checks.iter().any(|check| check.outcome == CheckOutcome::Failed);
    let level = if speaks_against { proof.asked() } else { proof.proved()? };
    Some(ProofFact {
        at_ms: proof.at_ms,
        level,
        passed: !speaks_against,
        recovery_time_ms: proof.recovery_time_ms(),
        tables: proof.tables,
        replayed_to: proof
            .recovery
            .as_ref()
            .map(|recovery| ReplayedTo { timeline: recovery.timeline, lsn: recovery.reached_lsn }),
        unmet: if found_wrong { 0 } else { proof.assertions_that(CheckOutcome::Failed) },
        unasked: proof.assertions_that(CheckOutcome::Skipped),
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
        kind: proof.kind,
        at_ms: proof.at_ms,
        restored_bytes: proof.size_bytes,
        restore_ms: took("restore"),
        start_ms: Some(took("start") + own_replay_ms + took("open")),
        replayed,
    })
}

/// The recovery along archived WAL that a proof of a backup was seen to end.
pub(crate) fn replay(proof: &Proof, backup: &Backup) -> Option<Replay> {
    let recovery = proof.recovery.as_ref().filter(|_| proof.passed)?;
    Some(Replay {
        lineage: proof.lineage,
        timeline: recovery.timeline,
        from: backup.outcome.start_lsn,
        to: recovery.reached_lsn,
        last_commit_ms: recovery.last_commit.map(|at| at.as_millisecond().min(proof.at_ms)),
        at_ms: proof.at_ms,
    })
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

/// The newest proof that passed of the other sort than the one to show: where that one replayed archived WAL behind the backup, one
/// of the backup alone, which goes further; else one that replayed.
pub(crate) fn other(proofs: &[ProofRow]) -> Option<&ProofRow> {
    if is_found_bad(&facts(proofs)) {
        return None;
    }
    let replayed = |row: &ProofRow| row.proof.recovery.is_some();
    let shown = telling(proofs).map(replayed)?;
    proofs.iter().find(|row| replayed(row) != shown && row.proof.proved() >= Some(ProofLevel::L3))
}

/// Those of a backup's proofs of which a later one says all that they do.
pub(crate) fn outdone(rows: &[ProofRow]) -> impl Iterator<Item = &ProofRow> {
    rows.iter().filter(|row| rows.iter().any(|later| says_as_much(later, row)))
}

fn says_as_much(later: &ProofRow, row: &ProofRow) -> bool {
    let what = |row: &ProofRow| {
        let fact = fact(row).map(|fact| (fact.level, fact.passed, fact.unmet, fact.unasked));
        let restored = row.proof.level_reached >= Some(ProofLevel::L3);
        (fact, restored, row.proof.passed)
    };
    let is_along = match (&later.proof.recovery, &row.proof.recovery) {
        (_, None) => true,
        (None, Some(_)) => false,
        (Some(later), Some(earlier)) => {
            later.timeline == earlier.timeline
                && later.reached_lsn >= earlier.reached_lsn
                && later.replayed_bytes >= earlier.replayed_bytes
        }
    };
    (later.proof.at_ms, later.id) > (row.proof.at_ms, row.id)
        && what(later) == what(row)
        && is_along
}

/// Writes what the proofs of a backup say of it now, and lets those rest that say nothing any more.
async fn judge(tx: &mut Tx<'_>, backup: BackupId) -> Result<()> {
    let rows = backups::telling_proofs(tx.db(), backup).await?;
    for row in outdone(&rows) {
        backups::tells_nothing(tx, row.id).await?;
    }
    backups::show(tx, backup, shown(&rows)).await
}

/// Takes in a proof of a cluster's backup: what it shows of the backup, and of the archived WAL behind it.
pub(crate) async fn take_in(
    tx: &mut Tx<'_>,
    row: &ProofRow,
    cluster: &proto::ClusterName,
    now_ms: i64,
) -> Result<()> {
    let proof = &row.proof;
    backups::put_proof(tx, row, cluster, now_ms).await?;
    judge(tx, proof.backup).await?;
    if proof.recovery.is_none() && proof.broken_wal.is_none() {
        return Ok(());
    }
    let Some(known) = clusters::get(tx.db(), cluster).await? else { return Ok(()) };
    let found = proof.broken_wal.as_ref().map(|broken| BrokenStretch {
        lineage: proof.lineage,
        timeline: broken.timeline,
        from: broken.from,
        to: broken.to,
        at_ms: proof.at_ms,
    });
    let backup = backups::get(tx.db(), proof.backup).await?;
    let replay = backup.and_then(|backup| replay(proof, &backup));
    let broken = broken::after(known.broken_wal, found, replay.as_ref(), known.wal.as_ref());
    clusters::wal_is_broken(tx, cluster, &broken).await
}

/// Judges what an earlier program recorded: before this one, or as the leader beside it. Repeated, it finds nothing to do but what
/// cannot be read: that is told, counts for nothing, and is in the way of nothing else.
pub(crate) async fn judge_former(catalog: &Catalog) -> Result<()> {
    for (record, why) in judge_readable(catalog).await? {
        let why = telemetry::redact::scrub_error(&why);
        tracing::warn!(
            record,
            "Record {record} of the catalog counts for nothing: failed to {why}"
        );
    }
    Ok(())
}

/// The same; the ids of what cannot be read are returned.
pub(crate) async fn judge_readable(catalog: &Catalog) -> Result<Vec<(String, Error)>> {
    let mut unread = Vec::new();
    let mut after = String::new();
    loop {
        let some = backups::unjudged(&mut *catalog.read().await?, &after).await?;
        let one: ForOne = |tx, id| Box::pin(judge_one(tx, id));
        unread.append(&mut each(catalog, "judge_former", &some, one).await?);
        let Some(last) = some.into_iter().next_back() else { break };
        after = last;
    }
    let mut after = (i64::MIN, String::new());
    loop {
        let some = backups::not_taken_in(&mut *catalog.read().await?, &after).await?;
        let ids: Vec<String> = some.iter().map(|(_, id)| id.clone()).collect();
        let one: ForOne = |tx, id| Box::pin(take_in_one(tx, id));
        unread.append(&mut each(catalog, "take_in_former", &ids, one).await?);
        let Some(last) = some.into_iter().next_back() else { break };
        after = last;
    }
    Ok(unread)
}

type ForOne = for<'t, 'e> fn(&'t mut Tx<'e>, &'t str) -> TxFuture<'t, ()>;

/// Does it for each of these records, in one transaction where all can be read; else each alone, and those that cannot are returned.
async fn each(
    catalog: &Catalog,
    name: &'static str,
    ids: &[String],
    one: ForOne,
) -> Result<Vec<(String, Error)>> {
    let all_of = async |ids: &[String]| {
        catalog
            .transact(name, move |tx| {
                Box::pin(async move {
                    for id in ids {
                        one(tx, id).await?;
                    }
                    Ok(())
                })
            })
            .await
    };
    let mut unread = Vec::new();
    match all_of(ids).await {
        Err(Error::Stored { .. }) => {}
        done => return done.map(|()| unread),
    }
    for id in ids {
        match all_of(std::slice::from_ref(id)).await {
            Err(error @ Error::Stored { .. }) => unread.push((id.clone(), error)),
            done => done?,
        }
    }
    Ok(unread)
}

async fn judge_one(tx: &mut Tx<'_>, id: &str) -> Result<()> {
    let Some(Backup { id, job, outcome, .. }) = backups::by_text(tx.db(), id).await? else {
        return Ok(());
    };
    let job = jobs::get(tx.db(), job).await?;
    let worth = Worth::of(&outcome, job.as_ref().map(|job| &job.task));
    backups::weigh(tx, id, worth).await?;
    judge(tx, id).await
}

async fn take_in_one(tx: &mut Tx<'_>, id: &str) -> Result<()> {
    let Some((row, cluster)) = backups::proof_by_text(tx.db(), id).await? else { return Ok(()) };
    take_in(tx, &row, &cluster, row.proof.at_ms).await
}

#[cfg(test)]
mod tests {
    use proto::proof::{BrokenWal, Phase, ProofAssertion, ProofCheck, ProofRecovery};
    use proto::{AttemptId, JobId, LineageId, Lsn, SystemIdentifier, Timeline};

    use super::*;

    fn row(asked: ProofLevel, reached: Option<ProofLevel>, outcome: CheckOutcome) -> ProofRow {
        let check = ProofCheck {
            name: "row_counts".to_owned(),
            level: asked,
            outcome,
            detail: String::new(),
        };
        let (lineage, worker) = (LineageId::mint(1, [1; 10]), "w1".parse().unwrap());
        let (backup, cluster) = (BackupId::mint(1, [1; 10]), "orders".parse().unwrap());
        let proof = Proof {
            at_ms: 1,
            level_reached: reached,
            passed: reached == Some(asked),
            checks: vec![check],
            ..Proof::of(backup, lineage, cluster, SystemIdentifier(1), worker, asked)
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
    fn an_assertion_that_does_not_hold_fails_a_proof_of_its_level() {
        use ProofLevel::{L5, L6};
        let asserted = |outcome| {
            let mut row = row(L5, Some(L5), CheckOutcome::Passed);
            let (name, database) = ("a".to_owned(), "shop".parse().unwrap());
            let answer = String::new();
            let assertion = ProofAssertion { name, database, outcome, answer, duration_ms: 1 };
            row.proof.assertions = Some(vec![assertion]);
            row.proof.passed = outcome == CheckOutcome::Passed;
            row
        };
        let shows = |row: &ProofRow| fact(row).map(|fact| (fact.level, fact.passed));
        assert_eq!(shows(&asserted(CheckOutcome::Passed)), Some((L6, true)));
        let unasked = asserted(CheckOutcome::Skipped);
        assert_eq!(shows(&unasked), Some((L5, true)), "a library is missing");
        let told = |row: &ProofRow| fact(row).map(|fact| (fact.unmet, fact.unasked));
        assert_eq!(told(&unasked), Some((0, 1)));
        assert_eq!(shown(&[unasked]), Shown::Proved, "it says nothing against the data");
        let failed = asserted(CheckOutcome::Failed);
        assert_eq!(shows(&failed), Some((L6, false)));
        assert_eq!(told(&failed), Some((1, 0)));
        assert_eq!(shown(&[failed]), Shown::Bad);
    }

    #[test]
    fn archived_wal_that_broke_is_held_against_no_backup() {
        use CheckOutcome::Failed;
        use ProofLevel::{L2, L4};
        let mut broken = row(L4, Some(L2), Failed);
        assert_eq!(shown(&[broken.clone()]), Shown::Bad);
        broken.proof.broken_wal = Some(BrokenWal {
            target: "the end of the WAL".to_owned(),
            timeline: Timeline(1),
            from: Lsn(5),
            to: Lsn(6),
        });
        let shows = fact(&broken).map(|fact| (fact.level, fact.passed));
        assert_eq!(shows, Some((L2, true)), "it was restored, and more is not known");
        assert_eq!(shown(&[broken]), Shown::None);
    }

    #[test]
    fn what_later_proofs_say_as_well_rests_and_nothing_else() {
        use CheckOutcome::{Failed, Passed};
        use ProofLevel::{L1, L4, L5};
        let at = |at_ms: i64, mut row: ProofRow| {
            row.id = AttemptId::mint(u64::try_from(at_ms).unwrap(), [1; 10]);
            row.proof.at_ms = at_ms;
            row
        };
        let along = |reached, replayed_bytes, mut row: ProofRow| {
            row.proof.recovery = Some(ProofRecovery {
                target: "the end of the WAL".to_owned(),
                timeline: Timeline(1),
                reached_lsn: Lsn(reached),
                last_commit: None,
                evidence: String::new(),
                replayed_bytes,
            });
            row
        };
        let passed = || row(L5, Some(L5), Passed);
        let rows = [
            at(1, passed()),
            at(2, passed()),
            at(3, row(L4, Some(L4), Passed)),
            at(4, row(L5, Some(L4), Failed)),
            at(5, row(L5, Some(L1), Failed)),
            at(6, along(900, 10, row(L4, Some(L4), Passed))),
            at(7, along(500, 20, row(L4, Some(L4), Passed))),
            at(8, along(800, 15, row(L4, Some(L4), Passed))),
            at(9, along(800, 15, row(L4, Some(L4), Passed))),
            at(10, row(L1, Some(L1), Passed)),
        ];
        let rests: Vec<i64> = outdone(&rows).map(|row| row.proof.at_ms).collect();
        // The fourth restored it and the fifth did not; nothing came as far as the sixth or replayed as much as the seventh.
        assert_eq!(rests, [1, 3, 8]);
        let left: Vec<ProofRow> =
            rows.iter().filter(|row| !rests.contains(&row.proof.at_ms)).cloned().collect();
        assert_eq!(shown(&left), shown(&rows));
        let ids = |rows: &[ProofRow]| telling(rows).map(|row| row.id);
        assert_eq!(ids(&left), ids(&rows));
    }

    #[test]
    fn one_that_replayed_wal_hides_none_that_went_further_and_the_other_way_round() {
        use CheckOutcome::{Failed, Passed};
        use ProofLevel::{L1, L4, L5};
        let along = {
            let mut row = row(L4, Some(L4), Passed);
            row.proof.recovery = Some(ProofRecovery {
                target: "the end of the WAL".to_owned(),
                timeline: Timeline(1),
                reached_lsn: Lsn(900),
                last_commit: None,
                evidence: String::new(),
                replayed_bytes: 1,
            });
            row
        };
        let (alone, looked) = (row(L5, Some(L5), Passed), row(L1, Some(L1), Passed));
        let both = |rows: &[&ProofRow]| {
            let rows: Vec<ProofRow> = rows.iter().map(|row| (*row).clone()).collect();
            let level = |row: &ProofRow| (row.proof.level_asked, row.proof.recovery.is_some());
            (telling(&rows).map(level), other(&rows).map(level))
        };
        let (of_alone, of_along) = (Some((L5, false)), Some((L4, true)));
        assert_eq!(both(&[&along, &looked, &alone]), (of_along, of_alone));
        assert_eq!(both(&[&alone, &along]), (of_alone, of_along));
        assert_eq!(both(&[&looked, &along]), (of_along, None));
        let failed = row(L5, Some(L1), Failed);
        assert_eq!(both(&[&failed, &along, &alone]), (of_alone, None), "it stands alone");
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
        assert_eq!((found.restored_bytes, found.restore_ms, found.start_ms), (7, 20, Some(54_300)));
        proof.recovery = Some(ProofRecovery {
            target: "the end of the WAL".to_owned(),
            timeline: Timeline(1),
            reached_lsn: Lsn(9),
            last_commit: None,
            evidence: String::new(),
            replayed_bytes: 8,
        });
        let found = measured(&proof).unwrap();
        assert_eq!(found.start_ms, Some(50_300), "what it replayed is told apart");
        assert_eq!(found.replayed, Some(Replayed { bytes: 8, duration_ms: 4_000 }));
        proof.level_reached = Some(L2);
        assert_eq!(measured(&proof), None, "it did not start");
    }
}
