//! The fleet as people see it: facts from the catalog, judged by policy, worst first.

use std::collections::{BTreeMap, HashMap};

use policy::fleet::{counted, fleet_sentence};
use policy::state::{BackupFact, ClusterFacts, Judgement, Objectives, ProofFact, judge_cluster};
use proto::failure::{Action, Code, Failure};
use proto::job::{JobKind, JobState};
use proto::{BackupId, ClusterName};

use crate::api::types::{BackupView, ClusterView, ProofView, StatusView};
use crate::api::view;
use crate::catalog::backups::{self, Backup, ProofRow};
use crate::catalog::clusters::{self, Cluster};
use crate::catalog::jobs::{self, Job};
use crate::catalog::workers::{self, Worker};
use crate::core::Core;
use crate::error::Result;
use crate::metrics::{ClusterMoment, Moment};

/// A cluster with everything that is known of it.
struct Known {
    cluster: Cluster,
    judgement: Judgement,
    backup: Option<Backup>,
    proofs: Vec<ProofRow>,
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
        let open = open.remove(&cluster.name).unwrap_or_default();
        let eligible_workers = eligible(&cluster.name, &workers, now_ms);
        known.push(Known { cluster, judgement, backup, proofs, open, eligible_workers });
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
        problem: problem(cluster),
        has_repository: cluster.repository.is_some(),
        backup: backup.map(|backup| BackupFact { stopped_at_ms: backup.outcome.stopped_at_ms }),
        proofs: proofs
            .iter()
            .map(|row| ProofFact {
                at_ms: row.proof.at_ms,
                level: row.proof.level_asked,
                passed: row.proof.passed,
                recovery_time_ms: row.proof.recovery_time_ms(),
                tables: row.proof.tables,
            })
            .collect(),
        backup_failure: last.filter(|job| job.state != JobState::Succeeded).map(|job| {
            job.failure.clone().unwrap_or_else(|| {
                let reason = job.reason.clone().unwrap_or_else(|| job.state.to_string());
                Failure::new(Code::DeadlineExceeded, Action::Retry, reason)
            })
        }),
    }
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
    let Known { cluster, judgement, backup, proofs, open, .. } = known;
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
        backup: backup.map(|backup| backup_view(backup, proofs.into_iter().next())),
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
    let proof =
        known.proofs.iter().filter(|row| row.proof.passed).max_by_key(|row| row.proof.at_ms);
    let bytes = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let facts = known.backup.as_ref().map(|backup| &backup.outcome);
    ClusterMoment {
        cluster: known.cluster.name.to_string(),
        state: known.judgement.state,
        registered_s: known.cluster.registered_at_ms / 1_000,
        contact_s: known.cluster.seen_at_ms.unwrap_or(0) / 1_000,
        backup_s: facts.map_or(0, |facts| facts.stopped_at_ms / 1_000),
        proof_s: proof.map_or(0, |row| row.proof.at_ms / 1_000),
        proof_level: proof.map_or(0, |row| i64::from(row.proof.level_asked.number())),
        size_bytes: facts.map_or(0, |facts| bytes(facts.size_bytes)),
        stored_bytes: facts.map_or(0, |facts| bytes(facts.stored_bytes)),
        eligible_workers: known.eligible_workers,
    }
}
