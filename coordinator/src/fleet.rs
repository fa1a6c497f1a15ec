//! The fleet as people see it: facts from the catalog, judged by policy, worst first.

use std::collections::{BTreeMap, HashMap};

use policy::broken::in_the_way;
use policy::fleet::{counted, fleet_sentence};
use policy::placement::{Candidate, Placed};
use policy::reach::BackupEnd;
use policy::recoverable::{Reach, RecoveryPoint, Source};
use policy::recovery_time::{Begins, Measured, RecoveryTime, recovery_time};
use policy::state::{BackupFact, ClusterFacts, Judgement, Objectives, Undumped, judge_cluster};
use proto::copies::BackupCopy;
use proto::failure::{Action, Code, Failure};
use proto::job::{BackupOutcome, JobKind, JobState, Task};
use proto::message::{ClusterOffer, RepositoryAway, RepositoryLook};
use proto::proof::CheckOutcome;
use proto::{BackupId, BackupKind, ClusterName, Heartbeat, ProofLevel};

use crate::api::types::{BackupView, ClusterView, NobodyMay, ProofView, StatusView};
use crate::api::view;
use crate::catalog::backups::{self, Backup, ProofRow, Shown, Worth};
use crate::catalog::clusters::{self, Cluster};
use crate::catalog::heartbeats;
use crate::catalog::jobs::{self, Job};
use crate::catalog::workers::{self, Worker};
use crate::core::Core;
use crate::error::Result;
use crate::metrics::{ClusterMoment, Moment};
use crate::{dispatcher, proofs, restores};

/// For so long a worker that is silent still has the word about its directory: it may be restarting.
const WRITER_SILENT_MS: i64 = 600_000;

/// A cluster with everything that is known of it.
struct Known {
    cluster: Cluster,
    objectives: Objectives,
    judgement: Judgement,
    backup: Option<Backup>,
    proofs: Vec<ProofRow>,
    reach: Reach,
    time: Option<RecoveryTime>,
    open: Vec<Job>,
    eligible_workers: i64,
    /// What its worker says of it, while that lives.
    offer: Option<ClusterOffer>,
    /// The newest one that was heard of; only where one cluster is looked at.
    heartbeat: Option<Heartbeat>,
}

async fn look(core: &Core, only: Option<&ClusterName>) -> Result<Vec<Known>> {
    let now_ms = core.now_ms();
    let mut db = core.catalog.read().await?;
    let all = match only {
        Some(name) => clusters::get(&mut db, name).await?.into_iter().collect(),
        None => clusters::list(&mut db).await?,
    };
    let named = only.map(ClusterName::as_str).unwrap_or_default();
    let newest = backups::newest(&mut db, named).await?.into_iter();
    let mut newest: HashMap<ClusterName, Backup> =
        newest.map(|backup| (backup.cluster.clone(), backup)).collect();
    let dumps = backups::newest_dumps(&mut db, named).await?.into_iter();
    let mut undumped: HashMap<ClusterName, Undumped> =
        dumps.filter_map(|dump| Some((dump.cluster.clone(), undumped(&dump)?))).collect();
    let mut proofs: HashMap<BackupId, Vec<ProofRow>> = HashMap::new();
    for row in backups::newest_proofs(&mut db, named).await? {
        proofs.entry(row.proof.backup).or_default().push(row);
    }
    let mut sources: HashMap<ClusterName, Vec<Backup>> = HashMap::new();
    for backup in backups::sources(&mut db, named).await? {
        sources.entry(backup.cluster.clone()).or_default().push(backup);
    }
    let robbed = backups::robbed(&mut db, named).await?;
    let mut last_backup: BTreeMap<ClusterName, Job> = jobs::last_ended(&mut db, JobKind::Backup)
        .await?
        .into_iter()
        .map(|j| (j.cluster.clone(), j))
        .collect();
    let mut restored: HashMap<ClusterName, Measured> = HashMap::new();
    // They come newest first.
    for restore in jobs::restored(&mut db, named).await? {
        if let Some(measured) = restores::measured(&restore) {
            restored.entry(restore.job.cluster).or_insert(measured);
        }
    }
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
        let sources = sources.get(&cluster.name).map_or(&[][..], Vec::as_slice);
        let of = |backup: &Backup| proofs.get(&backup.id).map_or(&[][..], Vec::as_slice);
        let looked_at: BTreeMap<BackupId, &Backup> =
            sources.iter().chain(&backup).map(|backup| (backup.id, backup)).collect();
        let measured = looked_at.values().flat_map(|backup| of(backup));
        let measured = measured.filter_map(|row| proofs::measured(&row.proof));
        let measured: Vec<Measured> =
            measured.chain(restored.get(&cluster.name).copied()).collect();
        let wal = cluster.wal.as_ref();
        let time =
            backup.as_ref().and_then(|backup| recovery_time(&begins(backup), wal, &measured));
        let recovered: Vec<Source> =
            sources.iter().map(|backup| source(backup, of(backup))).collect();
        let away = repository_away(&cluster, backup.as_ref(), &workers, now_ms);
        let reach = match &away {
            Some(away) if away.is_gone() => Reach::default(),
            _ => Reach::of(&recovered, wal, &cluster.broken_wal),
        };
        let proofs = backup.as_ref().and_then(|b| proofs.remove(&b.id)).unwrap_or_default();
        let last = last_backup.remove(&cluster.name);
        let offer = offered(&cluster, &workers, now_ms);
        let facts = ClusterFacts {
            is_robbed: robbed.contains(&cluster.name),
            repository_away: away,
            undumped: undumped.remove(&cluster.name),
            backlog: offer.as_ref().and_then(|offer| offer.archive.as_ref()?.backlog),
            ..facts(&cluster, backup.as_ref(), &proofs, last.as_ref(), reach, time)
        };
        let objectives = core.config.objectives.of(&cluster.name);
        let judgement = judge_cluster(&facts, &objectives, now_ms);
        let open = open.remove(&cluster.name).unwrap_or_default();
        let eligible_workers = eligible(&cluster.name, &workers, now_ms);
        let heartbeat = match only {
            Some(name) => heartbeats::newest(&mut db, name).await?,
            None => None,
        };
        known.push(Known {
            cluster,
            objectives,
            judgement,
            backup,
            proofs,
            reach,
            time,
            open,
            eligible_workers,
            offer,
            heartbeat,
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

/// What the worker that announced a cluster last says of it, while it lives.
fn offered(cluster: &Cluster, workers: &[Worker], now_ms: i64) -> Option<ClusterOffer> {
    let worker = workers
        .iter()
        .find(|worker| Some(&worker.name) == cluster.worker.as_ref() && worker.is_alive(now_ms))?;
    let offers = worker.offers.as_ref()?;
    offers.clusters.iter().find(|offer| offer.name == cluster.name).cloned()
}

/// That nobody finds the repository of a cluster, as its workers said last. What a worker says weighs as much as it can see:
///
/// - One that lives and finds the repository outweighs all that do not, and nothing else does. It finds it where its last look found
///   the lineage of the backup; where it does not know yet whose backups are meant, also if it looked into the same place, and that is a
///   bucket, which is the same for all, or it took the backup there. Who has not looked, cannot, or is of a version that does not
///   tell, finds nothing.
/// - Of a directory another host may have one of that name, or none. The worker that took the backup there has the word while it is
///   heard of, and for as long after that as an outage is nobody's news. When it is silent for longer, whoever lives is asked; but
///   what it said was gone is gone, because nobody who sees that place has found it since.
/// - Of a bucket the living have the word, and what one says is gone, is.
/// - When nobody lives, what was said last stands.
fn repository_away(
    cluster: &Cluster,
    backup: Option<&Backup>,
    workers: &[Worker],
    now_ms: i64,
) -> Option<RepositoryAway> {
    let mut all = Vec::new();
    for worker in workers {
        let offers = worker.offers.iter().flat_map(|offers| &offers.clusters);
        all.extend(offers.filter(|offer| offer.name == cluster.name).map(|offer| (worker, offer)));
    }
    let anybody_lives = all.iter().any(|(worker, _)| worker.is_alive(now_ms));
    let heard: Vec<_> =
        all.iter().filter(|(worker, _)| worker.is_alive(now_ms) || !anybody_lives).collect();
    if heard.iter().any(|(worker, offer)| finds(worker, offer, backup)) {
        return None;
    }
    if let Some((writer, offer)) = all.iter().find(|(worker, _)| wrote(worker, backup))
        && backup.is_some_and(is_in_a_directory)
    {
        let away = offer.repository_away.as_ref();
        let is_heard = writer.is_heard(now_ms, WRITER_SILENT_MS) || !anybody_lives;
        if is_heard || away.is_some_and(RepositoryAway::is_gone) {
            return away.cloned();
        }
    }
    let away = heard.into_iter().filter_map(|(_, offer)| offer.repository_away.as_ref());
    away.max_by_key(|away| (away.is_gone(), away.since_ms)).cloned()
}

/// Whether what a worker says it found is the repository of the backup that a cluster is judged by.
fn finds(worker: &Worker, offer: &ClusterOffer, backup: Option<&Backup>) -> bool {
    let Some(RepositoryLook::Found { lineages }) = &offer.repository_look else { return false };
    let Some(backup) = backup else { return true };
    if let Some(lineages) = lineages {
        return lineages.contains(&backup.outcome.lineage);
    }
    is_in_place_of(worker, offer, backup)
        && (wrote(worker, Some(backup)) || !is_in_a_directory(backup))
}

/// Whether the repository that a worker has for a cluster is where a backup is; how it is reached is no part of that.
fn is_in_place_of(worker: &Worker, offer: &ClusterOffer, backup: &Backup) -> bool {
    let place =
        |url: &str| url.split('?').next().unwrap_or_default().trim_end_matches('/').to_owned();
    let mut repositories = worker.offers.iter().flat_map(|offers| &offers.repositories);
    repositories
        .find(|repository| Some(&repository.name) == offer.repository.as_ref())
        .is_some_and(|found| place(&found.location) == place(&backup.outcome.repository))
}

fn wrote(worker: &Worker, backup: Option<&Backup>) -> bool {
    backup.is_some_and(|backup| backup.worker == worker.name)
}

fn is_in_a_directory(backup: &Backup) -> bool {
    backup.outcome.repository.starts_with("file:")
}

/// What policy judges by.
fn facts(
    cluster: &Cluster,
    backup: Option<&Backup>,
    proofs: &[ProofRow],
    last: Option<&Job>,
    reach: Reach,
    recovery_time: Option<RecoveryTime>,
) -> ClusterFacts {
    ClusterFacts {
        registered_at_ms: cluster.registered_at_ms,
        seen_at_ms: cluster.seen_at_ms,
        contact_since_ms: cluster.contact_since_at_ms,
        problem: problem(cluster),
        has_repository: cluster.repository.is_some(),
        backup: backup.map(|backup| BackupFact {
            stopped_at_ms: backup.outcome.stopped_at_ms,
            part_of: part_of(backup),
            bad_pages: backup.outcome.bad_pages,
            silent_changes: silent_changes(&backup.outcome),
        }),
        proofs: proofs::facts(proofs),
        backup_failure: last.filter(|job| speaks_against(job, backup)).map(|job| {
            job.failure.clone().unwrap_or_else(|| {
                let reason = job.reason.clone().unwrap_or_else(|| job.state.to_string());
                Failure::new(Code::DeadlineExceeded, Action::Retry, reason)
            })
        }),
        backup_end: backup.and_then(backup_end),
        recoverable: reach.proved,
        recovery_time,
        wal: cluster.wal.clone(),
        broken_wal: backup
            .and_then(backup_end)
            .and_then(|end| in_the_way(&cluster.broken_wal, &end, cluster.wal.as_ref()).copied()),
        ..ClusterFacts::default()
    }
}

fn silent_changes(outcome: &BackupOutcome) -> u64 {
    outcome.silent_changes.as_ref().map_or(0, |changes| changes.units)
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
        start_lsn: outcome.start_lsn,
        stop_lsn: outcome.stop_lsn,
        wal_to: outcome.wal_to.unwrap_or(outcome.stop_lsn),
        stopped_at_ms: outcome.recovers_to_ms(),
    })
}

/// How many databases a dump has that leaves out others.
fn part_of(backup: &Backup) -> Option<u64> {
    let databases = backup.outcome.logical.as_ref().map_or(0, |logical| logical.databases);
    (backup.worth == Worth::Part).then_some(databases)
}

/// What a dump lacks because it could not be dumped.
fn undumped(dump: &Backup) -> Option<Undumped> {
    let failed = &dump.outcome.logical.as_ref()?.failed;
    let databases = failed.iter().map(|failed| failed.database.to_string()).collect();
    Some(Undumped { databases, why: failed.first()?.why.clone() })
}

/// What a recovery can begin with, and what its proofs replayed.
fn source(backup: &Backup, proofs: &[ProofRow]) -> Source {
    let replays = proofs.iter().filter_map(|row| proofs::replay(&row.proof, backup));
    Source {
        recovers_to_ms: backup.outcome.recovers_to_ms(),
        end: backup_end(backup),
        replays: replays.collect(),
        is_proved: backup.shown == Shown::Proved,
    }
}

fn begins(backup: &Backup) -> Begins {
    Begins {
        kind: backup.outcome.kind(),
        size_bytes: backup.outcome.size_bytes,
        end: backup_end(backup),
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
    let Known {
        cluster,
        objectives,
        judgement,
        backup,
        proofs,
        reach,
        time,
        open,
        offer,
        heartbeat,
        ..
    } = known;
    let (archive, heartbeats) = offer.map_or((None, None), |o| (o.archive, o.heartbeat));
    let at_ms = |point: Option<RecoveryPoint>| point.map(|point| point.at_ms);
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
        recoverable_to_at_ms: at_ms(reach.proved),
        unproved_to_at_ms: at_ms(reach.on_paper),
        recovery_time: time,
        rpo_objective_ms: objectives.recovery_point_max_ms,
        rto_objective_ms: objectives.recovery_time_max_ms,
        wal: cluster.wal,
        broken_wal: cluster.broken_wal,
        archive,
        heartbeats,
        heartbeat_at_ms: heartbeat.map(|heartbeat| heartbeat.begun_at_ms),
        backup: backup.map(|backup| backup_view(backup, &proofs)),
        open_jobs: open.into_iter().map(view::job_alone).collect(),
    }
}

/// A backup with what its proofs, newest first, show.
pub(crate) fn backup_view(backup: Backup, proofs: &[ProofRow]) -> BackupView {
    BackupView {
        id: backup.id,
        cluster: backup.cluster,
        job: backup.job,
        worker: backup.worker,
        facts: backup.outcome,
        gone_at_ms: backup.gone_at_ms,
        copies: newest_of_each_place(backup.copies),
        proof: proofs::telling(proofs).cloned().map(proof_view),
        other_proof: proofs::other(proofs).cloned().map(proof_view),
    }
}

/// Several repositories may know of copies in one place: whoever saw it last is right.
fn newest_of_each_place(mut copies: Vec<BackupCopy>) -> Vec<BackupCopy> {
    copies.sort_by(|a, b| a.place.cmp(&b.place).then(b.checked_at_ms.cmp(&a.checked_at_ms)));
    copies.dedup_by(|later, first| later.place == first.place);
    copies
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
    let names: Vec<ClusterName> = known.iter().map(|one| one.cluster.name.clone()).collect();
    let warnings = core.config.objectives.unknown(&names);
    let workers = workers::list(&mut *core.catalog.read().await?).await?;
    let nobody_may = nobody_may(&known, &workers, core.now_ms());
    let clusters = known.into_iter().map(cluster_view).collect();
    Ok(StatusView { sentence, states, clusters, warnings, nobody_may, at_ms: core.now_ms() })
}

/// The jobs that wait because no worker may do them: nothing will come of them until somebody starts one that may, or allows it. A
/// cluster that is paused has its jobs wait on purpose.
fn nobody_may(known: &[Known], workers: &[Worker], now_ms: i64) -> Vec<NobodyMay> {
    let workers: Vec<Candidate> =
        workers.iter().map(|worker| dispatcher::candidate(worker, &[], now_ms)).collect();
    let mut found = Vec::new();
    for Known { cluster, open, .. } in known.iter().filter(|known| !known.cluster.paused) {
        let mut of_kind: BTreeMap<(JobKind, String), u64> = BTreeMap::new();
        let waits = |job: &&Job| matches!(job.state, JobState::Queued | JobState::Waiting);
        for job in open.iter().filter(waits) {
            if let Placed::Nobody { reason } =
                dispatcher::placed_among(&workers, Some(cluster), job)
            {
                *of_kind.entry((job.kind(), reason)).or_default() += 1;
            }
        }
        found.extend(of_kind.into_iter().map(|((kind, reason), jobs)| NobodyMay {
            cluster: cluster.name.clone(),
            kind,
            jobs,
            reason,
        }));
    }
    found
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
    let telling = proofs::telling(&known.proofs);
    let assertions_that = |outcome| telling.map_or(0, |row| row.proof.assertions_that(outcome));
    let proofs = [telling, proofs::other(&known.proofs)];
    let proofs = proofs.into_iter().flatten();
    // Both of one proof: an alert compares them.
    let proved = proofs.filter_map(|row| Some((row.proof.proved()?, row.proof.at_ms)));
    let proved = proved.filter(|(level, _)| *level >= ProofLevel::L3).max();
    let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
    let facts = known.backup.as_ref().map(|backup| &backup.outcome);
    let waiting = known.cluster.wal.as_ref().and_then(|wal| wal.waiting);
    let backlog = known.offer.as_ref().and_then(|offer| offer.archive.as_ref()?.backlog);
    ClusterMoment {
        recovery_point_s: known.reach.proved.map_or(0, |point| point.at_ms / 1_000),
        unproved_point_s: known.reach.on_paper.map_or(0, |point| point.at_ms / 1_000),
        recovery_time_s: known.time.and_then(|time| time.total_ms()).map(in_seconds),
        rpo_objective_s: known.objectives.recovery_point_max_ms.map(|ms| ms / 1_000),
        rto_objective_s: known.objectives.recovery_time_max_ms.map(|ms| ms / 1_000),
        wal_waiting: waiting.map_or(0, |waiting| number(waiting.segments)),
        wal_ready: backlog.map_or(0, |backlog| number(backlog.segments)),
        pg_wal_bytes: backlog.map_or(0, |backlog| number(backlog.pg_wal_bytes)),
        cluster: known.cluster.name.to_string(),
        state: known.judgement.state,
        registered_s: known.cluster.registered_at_ms / 1_000,
        contact_s: known.cluster.seen_at_ms.unwrap_or(0) / 1_000,
        backup_s: facts.map_or(0, |facts| facts.stopped_at_ms / 1_000),
        proof_s: proved.map_or(0, |(_, at_ms)| at_ms / 1_000),
        proof_level: proved.map_or(0, |(level, _)| i64::from(level.number())),
        assertions_failed: number(assertions_that(CheckOutcome::Failed)),
        assertions_unasked: number(assertions_that(CheckOutcome::Skipped)),
        size_bytes: facts.map_or(0, |facts| number(facts.size_bytes)),
        stored_bytes: facts.map_or(0, |facts| number(facts.stored_bytes)),
        silent_changes: facts.map_or(0, |facts| number(silent_changes(facts))),
        eligible_workers: known.eligible_workers,
    }
}

/// Rounded up: what takes a moment is not nothing.
fn in_seconds(ms: u64) -> i64 {
    i64::try_from(ms.div_ceil(1_000)).unwrap_or(i64::MAX)
}
