//! The fleet as people see it: facts from the catalog, judged by policy, worst first.

use std::collections::{BTreeMap, HashMap};

use policy::fleet::{counted, fleet_sentence};
use policy::reach::{BackupEnd, recovery_point};
use policy::state::{BackupFact, ClusterFacts, Judgement, Objectives, ProofFact, judge_cluster};
use proto::failure::{Action, Code, Failure};
use proto::job::{JobKind, JobState, Task};
use proto::proof::{CheckOutcome, ProofLevel};
use proto::{BackupId, BackupKind, ClusterName};
use sqlx::AnyConnection;

use crate::api::types::{BackupView, ClusterView, ProofView, StatusView};
use crate::api::view;
use crate::catalog::backups::{self, Backup, ProofRow};
use crate::catalog::clusters::{self, Cluster};
use crate::catalog::jobs::{self, Job};
use crate::catalog::workers::{self, Worker};
use crate::core::Core;
use crate::error::Result;
use crate::metrics::{ClusterMoment, Moment};

/// Backups of one cluster among which one is looked for that is not known to be bad.
const BACKUPS_MAX: i64 = 100;
/// Proofs of one backup that are looked at.
const PROOFS_MAX: i64 = 100;

/// A cluster with everything that is known of it.
struct Known {
    cluster: Cluster,
    judgement: Judgement,
    backup: Option<Backup>,
    proofs: Vec<ProofRow>,
    recoverable_to_at_ms: Option<i64>,
    open: Vec<Job>,
    eligible_workers: i64,
}

async fn look(core: &Core, only: Option<&ClusterName>) -> Result<Vec<Known>> {
    let now_ms = core.now_ms();
    let mut db = core.catalog.read().await?;
    let all = match only {
        Some(name) => clusters::get(&mut db, name).await?.into_iter().collect(),
        None => clusters::list(&mut db).await?,
    };
    let mut newest: HashMap<ClusterName, Backup> =
        backups::newest(&mut db).await?.into_iter().map(|b| (b.cluster.clone(), b)).collect();
    let mut proofs: HashMap<BackupId, Vec<ProofRow>> = HashMap::new();
    for row in backups::newest_proofs(&mut db).await? {
        proofs.entry(row.proof.backup).or_default().push(row);
    }
    let mut last_backup: BTreeMap<ClusterName, Job> = jobs::last_ended(&mut db, JobKind::Backup)
        .await?
        .into_iter()
        .map(|j| (j.cluster.clone(), j))
        .collect();
    let mut open: BTreeMap<ClusterName, Vec<Job>> = BTreeMap::new();
    for state in [JobState::Running, JobState::Cancelling, JobState::Queued, JobState::Waiting] {
        for job in jobs::in_state(&mut db, state).await? {
            if only.is_none_or(|name| job.cluster == *name) {
                open.entry(job.cluster.clone()).or_default().push(job);
            }
        }
    }
    let workers = workers::list(&mut db).await?;
    let mut known = Vec::with_capacity(all.len());
    for cluster in all {
        let backup = newest.remove(&cluster.name);
        let proofs = backup.as_ref().and_then(|b| proofs.remove(&b.id)).unwrap_or_default();
        let last = last_backup.remove(&cluster.name);
        let facts = facts(&cluster, backup.as_ref(), &proofs, last.as_ref());
        let judgement = judge_cluster(&facts, &Objectives::default(), now_ms);
        let recoverable_to_at_ms =
            recoverable_to(&mut db, &cluster, backup.as_ref(), &proofs).await?;
        let open = open.remove(&cluster.name).unwrap_or_default();
        let eligible_workers = eligible(&cluster.name, &workers, now_ms);
        known.push(Known {
            cluster,
            judgement,
            backup,
            proofs,
            recoverable_to_at_ms,
            open,
            eligible_workers,
        });
    }
    known.sort_by(|a, b| {
        a.judgement.state.cmp(&b.judgement.state).then_with(|| a.cluster.name.cmp(&b.cluster.name))
    });
    Ok(known)
}

fn eligible(cluster: &ClusterName, workers: &[Worker], now_ms: i64) -> i64 {
    let serving = workers.iter().filter(|worker| worker.is_alive(now_ms)).filter(|worker| {
        worker.offers.iter().flat_map(|offers| &offers.clusters).any(|offer| offer.name == *cluster)
    });
    i64::try_from(serving.count()).unwrap_or(i64::MAX)
}

/// What policy judges by.
fn facts(
    cluster: &Cluster,
    backup: Option<&Backup>,
    proofs: &[ProofRow],
    last: Option<&Job>,
) -> ClusterFacts {
    ClusterFacts {
        seen_at_ms: cluster.seen_at_ms,
        contact_since_ms: cluster.contact_since_at_ms,
        problem: problem(cluster),
        has_repository: cluster.repository.is_some(),
        backup: backup.map(|backup| BackupFact { stopped_at_ms: backup.outcome.stopped_at_ms }),
        proofs: proofs.iter().filter_map(proof_fact).collect(),
        backup_failure: last.filter(|job| speaks_against(job, backup)).map(|job| {
            job.failure.clone().unwrap_or_else(|| {
                let reason = job.reason.clone().unwrap_or_else(|| job.state.to_string());
                Failure::new(Code::DeadlineExceeded, Action::Retry, reason)
            })
        }),
        backup_end: backup.and_then(backup_end),
        wal: cluster.wal.clone(),
    }
}

/// What a proof shows. One that fell short only because something could not be looked at, by no fault of the backup, shows what
/// it did reach; when that is nothing, it shows nothing.
fn proof_fact(row: &ProofRow) -> Option<ProofFact> {
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

/// The proof to show, of those of a backup, newest first: the newest that restored it, unless something was found wrong since.
/// One that only looked at objects takes nothing away from it.
fn telling(proofs: &[ProofRow]) -> Option<&ProofRow> {
    let restored = |row: &&ProofRow| row.proof.level_reached >= Some(ProofLevel::L3);
    let newest = proofs.first()?;
    Some(proofs.iter().find(restored).filter(|_| newest.proof.passed).unwrap_or(newest))
}

/// Whether a backup job that ended says something about how the cluster is recovered: an order that asked for what does not exist
/// does not, nor one that was cancelled, nor a dump of a cluster that has physical backups.
fn speaks_against(job: &Job, backup: Option<&Backup>) -> bool {
    let is_mistaken = job.failure.as_ref().is_some_and(|f| f.code == Code::RequestInvalid);
    let is_dump = matches!(&job.task, Task::Backup(task) if task.kind() == BackupKind::Logical);
    let has_physical = backup.is_some_and(|b| b.outcome.kind() == BackupKind::Physical);
    let ended_well = matches!(job.state, JobState::Succeeded | JobState::Cancelled);
    !(ended_well || is_mistaken || (is_dump && has_physical))
}

/// Where WAL leads on from; nothing leads on from a dump.
pub(crate) fn backup_end(backup: &Backup) -> Option<BackupEnd> {
    let outcome = &backup.outcome;
    (outcome.kind() == BackupKind::Physical).then_some(BackupEnd {
        lineage: outcome.lineage,
        timeline: outcome.timeline,
        stop_lsn: outcome.stop_lsn,
        wal_to: outcome.wal_to.unwrap_or(outcome.stop_lsn),
        stopped_at_ms: outcome.stopped_at_ms,
    })
}

/// Up to when a cluster can be recovered: from its newest backup, and when that was found bad, from the newest before it that
/// was not.
async fn recoverable_to(
    db: &mut AnyConnection,
    cluster: &Cluster,
    newest: Option<&Backup>,
    proofs: &[ProofRow],
) -> Result<Option<i64>> {
    let Some(newest) = newest else { return Ok(None) };
    if !is_found_bad(proofs) {
        return Ok(Some(recoverable_from(newest, cluster)));
    }
    for backup in backups::list(db, cluster.name.as_str(), BACKUPS_MAX).await? {
        if backup.id == newest.id || backup.outcome.kind() != newest.outcome.kind() {
            continue;
        }
        let proofs = backups::list_proofs(db, "", &backup.id.to_string(), PROOFS_MAX).await?;
        if !is_found_bad(&proofs) {
            return Ok(Some(recoverable_from(&backup, cluster)));
        }
    }
    Ok(None)
}

/// Whether the newest proof of a backup that says anything failed.
fn is_found_bad(proofs: &[ProofRow]) -> bool {
    let newest = proofs.iter().filter_map(proof_fact).max_by_key(|proof| proof.at_ms);
    newest.is_some_and(|proof| !proof.passed)
}

fn recoverable_from(backup: &Backup, cluster: &Cluster) -> i64 {
    let end = backup_end(backup);
    end.map_or(backup.outcome.stopped_at_ms, |end| recovery_point(&end, cluster.wal.as_ref()))
}

/// What its worker says, or that another server answers under its name.
fn problem(cluster: &Cluster) -> Option<Failure> {
    match (cluster.system_identifier, cluster.announced_identifier) {
        (Some(expected), Some(announced)) if expected != announced => Some(
            Failure::new(
                Code::SystemIdentifierMismatch,
                Action::FixConfig,
                format!("{} shows system identifier {announced}, {expected} is expected", cluster.name),
            )
            .with_hint("If the cluster was rebuilt on purpose, adopt the new one: POST /v1/clusters/NAME/adopt."),
        ),
        _ => cluster.problem.clone(),
    }
}

fn cluster_view(known: Known) -> ClusterView {
    let Known { cluster, judgement, backup, proofs, recoverable_to_at_ms, open, .. } = known;
    ClusterView {
        name: cluster.name,
        state: judgement.state,
        reason: judgement.reason,
        site: cluster.site,
        worker: cluster.worker,
        labels: cluster.labels,
        repository: cluster.repository,
        repository_location: cluster.repository_location,
        system_identifier: cluster.system_identifier,
        server_version_num: cluster.server_version_num,
        paused: cluster.paused,
        registered_at_ms: cluster.registered_at_ms,
        seen_at_ms: cluster.seen_at_ms,
        recoverable_to_at_ms,
        wal: cluster.wal,
        backup: backup.map(|backup| backup_view(backup, telling(&proofs).cloned())),
        open_jobs: open.into_iter().map(view::job_alone).collect(),
    }
}

/// A backup with its newest proof.
pub(crate) fn backup_view(backup: Backup, proof: Option<ProofRow>) -> BackupView {
    BackupView {
        id: backup.id,
        cluster: backup.cluster,
        job: backup.job,
        worker: backup.worker,
        facts: backup.outcome,
        proof: proof.map(proof_view),
    }
}

/// A proof as it is shown.
pub(crate) fn proof_view(row: ProofRow) -> ProofView {
    ProofView { job: row.job, record: row.proof }
}

/// Everything in one answer, worst first, with the sentence.
pub(crate) async fn status(core: &Core) -> Result<StatusView> {
    let known = look(core, None).await?;
    let sentence = {
        let named: Vec<(&str, &Judgement)> =
            known.iter().map(|one| (one.cluster.name.as_str(), &one.judgement)).collect();
        fleet_sentence(&named)
    };
    let states = counted(&known.iter().map(|one| &one.judgement).collect::<Vec<_>>());
    let clusters = known.into_iter().map(cluster_view).collect();
    Ok(StatusView { sentence, states, clusters, at_ms: core.now_ms() })
}

/// One cluster.
pub(crate) async fn cluster(core: &Core, name: &ClusterName) -> Result<Option<ClusterView>> {
    Ok(look(core, Some(name)).await?.pop().map(cluster_view))
}

/// What `/metrics` shows of the catalog.
pub(crate) async fn moment(core: &Core) -> Result<Moment> {
    let now_ms = core.now_ms();
    let known = look(core, None).await?;
    let mut db = core.catalog.read().await?;
    let workers = workers::list(&mut db).await?;
    let number = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
    let alive = workers.iter().filter(|worker| worker.is_alive(now_ms));
    let draining = number(alive.clone().filter(|worker| worker.draining).count());
    let alive = number(alive.count());
    Ok(Moment {
        jobs: jobs::counts(&mut db).await?,
        workers_alive: alive - draining,
        workers_silent: number(workers.len()) - alive,
        workers_draining: draining,
        clusters: known.iter().map(cluster_moment).collect(),
        leading: core.epoch().is_some(),
        broker_up: core.broker_up(),
    })
}

fn cluster_moment(known: &Known) -> ClusterMoment {
    let proof = telling(&known.proofs).filter(|row| row.proof.passed);
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let facts = known.backup.as_ref().map(|backup| &backup.outcome);
    let waiting = known.cluster.wal.as_ref().and_then(|wal| wal.waiting);
    ClusterMoment {
        recovery_point_s: known.recoverable_to_at_ms.unwrap_or(0) / 1_000,
        wal_waiting: waiting.map_or(0, |waiting| number(waiting.segments)),
        cluster: known.cluster.name.to_string(),
        state: known.judgement.state,
        registered_s: known.cluster.registered_at_ms / 1_000,
        contact_s: known.cluster.seen_at_ms.unwrap_or(0) / 1_000,
        backup_s: facts.map_or(0, |facts| facts.stopped_at_ms / 1_000),
        proof_s: proof.map_or(0, |row| row.proof.at_ms / 1_000),
        proof_level: proof.map_or(0, |row| i64::from(row.proof.level_asked.number())),
        size_bytes: facts.map_or(0, |facts| number(facts.size_bytes)),
        stored_bytes: facts.map_or(0, |facts| number(facts.stored_bytes)),
        eligible_workers: known.eligible_workers,
    }
}

#[cfg(test)]
mod tests {
    use proto::proof::{Proof, ProofCheck};
    use proto::{AttemptId, JobId, LineageId, SystemIdentifier};

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
        };
        ProofRow { id: AttemptId::mint(1, [1; 10]), job: JobId::mint(1, [1; 10]), proof }
    }

    #[test]
    fn a_proof_that_could_not_look_everywhere_shows_what_it_reached() {
        use CheckOutcome::{Failed, Passed, Skipped};
        use ProofLevel::{L2, L4, L5};
        let fact = |row: &ProofRow| proof_fact(row).map(|fact| (fact.level, fact.passed));
        assert_eq!(fact(&row(L5, Some(L5), Passed)), Some((L5, true)));
        assert_eq!(fact(&row(L5, Some(L4), Skipped)), Some((L4, true)), "no right to count");
        assert_eq!(fact(&row(L5, Some(L4), Failed)), Some((L5, false)), "it counted, and wrong");
        assert_eq!(fact(&row(L2, None, Skipped)), None);
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
}
