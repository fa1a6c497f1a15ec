//! From jobs to tickets: plans which job goes where, then sends the tickets.
//!
//! A plan is one transaction: an attempt, its outbox row and the job's new state appear together or not at all.
//! Tickets go out only toward room that a worker announced; what has to wait gets the reason. The outbox is emptied
//! afterwards, one confirmed message at a time; a crash in between repeats a ticket, which is harmless.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use broker::{Declaration, Publish, Published};
use policy::placement::{Candidate, Class, Need, Placed, Served, class_of, place, window};
use proto::job::{JobState, Lane, Task};
use proto::message::{SCHEMA, Slots, Ticket};
use proto::topology::{self, TicketQueue};
use proto::{ClusterName, ProofLevel, WorkerName};
use telemetry::TraceContext;
use tokio_util::sync::CancellationToken;

use crate::catalog::attempts::{self, Attempt, AttemptState};
use crate::catalog::clusters::{self, Cluster};
use crate::catalog::jobs::{self, Job};
use crate::catalog::outbox::{self, Outgoing};
use crate::catalog::workers::{self, Worker};
use crate::catalog::{Tx, row};
use crate::chance;
use crate::core::Core;
use crate::error::{Error, Result};
use crate::settle::{finish, tell_job, withdraw};
use crate::wire;

/// Tickets sent between two looks at the plan.
const BATCH_MAX: i64 = 64;
/// The pause after the broker did not take a ticket.
const SEND_RETRY: Duration = Duration::from_millis(500);

/// A plan is made at least this often, whatever happened to the ring that should have asked for it.
const LOOK_AGAIN: Duration = Duration::from_secs(15);

/// Plans and sends until the term ends.
pub(crate) async fn run(core: &Core, epoch: i64, over: &CancellationToken) -> Result<()> {
    let mut link = core.broker.link();
    loop {
        // What becomes due while this plan is made is due for the next one: both look from the same moment.
        let now_ms = core.now_ms();
        let missed = plan(core, epoch, now_ms).await?;
        for job in &missed {
            tell_job(core, job);
        }
        let all_sent = send(core, epoch).await?;
        let due_at_ms = {
            let mut db = core.catalog.read().await?;
            jobs::next_due(&mut db, now_ms).await?
        };
        let due = async {
            match due_at_ms {
                Some(at_ms) => core.clock.sleep_until(at_ms).await,
                None => std::future::pending().await,
            }
        };
        let send_again = async {
            if all_sent {
                std::future::pending::<()>().await;
            } else {
                tokio::time::sleep(SEND_RETRY).await;
            }
        };
        tokio::select! {
            () = over.cancelled() => return Ok(()),
            () = core.doorbell.notified() => {}
            () = due => {}
            () = send_again => {}
            () = tokio::time::sleep(LOOK_AGAIN) => {}
            changed = link.changed() => if changed.is_err() { return Ok(()) },
        }
    }
}

/// Everything a plan looks at, read in its transaction.
struct Situation {
    now_ms: i64,
    ticket_ms: i64,
    workers: Vec<Candidate>,
    clusters: BTreeMap<ClusterName, Cluster>,
    /// Who holds a class of work on a cluster: running, or with a ticket out.
    holders: HashMap<(ClusterName, Class), Attempt>,
    /// Tickets out, by routing key.
    outstanding: HashMap<String, u32>,
}

impl Situation {
    /// Whether no worker has room in this lane. (A person's job is always looked at: it may overtake a ticket.)
    fn is_full(&self, lane: Lane) -> bool {
        let free = |worker: &Candidate| worker.alive && !worker.draining && worker.free(lane) > 0;
        lane == Lane::Routine && !self.workers.iter().any(free)
    }
}

/// One plan. Answers the jobs that were missed.
async fn plan(core: &Core, epoch: i64, now_ms: i64) -> Result<Vec<Job>> {
    let ticket_ms = i64::from(core.config.timing.ticket_ms);
    core.catalog
        .lead(epoch, "plan", move |tx| {
            Box::pin(async move {
                let missed = miss_overdue(tx, now_ms).await?;
                let mut situation = look(tx, now_ms, ticket_ms).await?;
                repeat_tickets(tx, &mut situation).await?;
                for lane in Lane::ALL {
                    // Without any room, a night's thousand waiting jobs need not be read again at every ring.
                    let unseen = situation.is_full(lane);
                    for job in jobs::ready(tx.db(), lane, unseen, now_ms).await? {
                        plan_one(tx, &mut situation, job).await?;
                    }
                }
                Ok(missed)
            })
        })
        .await
}

async fn miss_overdue(tx: &mut Tx<'_>, now_ms: i64) -> Result<Vec<Job>> {
    let mut missed = jobs::overdue(tx, now_ms).await?;
    for job in &mut missed {
        if let Some(open) = job.attempt {
            withdraw(tx, open, AttemptState::Superseded, "the job's time passed", now_ms).await?;
        }
        let why = job.reason.take().unwrap_or_else(|| "no worker took its ticket".to_owned());
        finish(job, JobState::Missed, Some(format!("nobody began it in time: {why}")), now_ms);
        jobs::update(tx, job).await?;
    }
    Ok(missed)
}

async fn look(tx: &mut Tx<'_>, now_ms: i64, ticket_ms: i64) -> Result<Situation> {
    let granted = attempts::granted(tx.db()).await?;
    let ticketed = attempts::ticketed(tx.db()).await?;
    let workers = workers::list(tx.db()).await?;
    let clusters = clusters::list(tx.db()).await?;
    let mut outstanding = HashMap::new();
    for attempt in &ticketed {
        *outstanding.entry(attempt.queue.clone()).or_insert(0) += 1;
    }
    Ok(Situation {
        now_ms,
        ticket_ms,
        workers: workers.iter().map(|worker| candidate(worker, &granted, now_ms)).collect(),
        clusters: clusters.into_iter().map(|cluster| (cluster.name.clone(), cluster)).collect(),
        holders: ticketed
            .into_iter()
            .chain(granted)
            .map(|attempt| ((attempt.cluster.clone(), class_of(attempt.kind)), attempt))
            .collect(),
        outstanding,
    })
}

/// A worker as placement sees it. What it was granted since its last pulse takes slots it still announced as free.
pub(crate) fn candidate(worker: &Worker, granted: &[Attempt], now_ms: i64) -> Candidate {
    let mut slots = Slots { urgent_free: worker.urgent_free, routine_free: worker.routine_free };
    let since = granted.iter().filter(|attempt| {
        attempt.worker.as_ref() == Some(&worker.name) && attempt.granted_at_ms >= worker.seen_at_ms
    });
    for attempt in since {
        if attempt.lane == Lane::Urgent && slots.urgent_free > 0 {
            slots.urgent_free -= 1;
        } else {
            slots.routine_free = slots.routine_free.saturating_sub(1);
        }
    }
    let offers = worker.offers.as_ref();
    Candidate {
        worker: worker.name.clone(),
        site: worker.site.clone(),
        alive: worker.is_alive(now_ms),
        draining: worker.draining,
        slots,
        kinds: offers.map(|offers| offers.kinds.clone()).unwrap_or_default(),
        clusters: offers
            .iter()
            .flat_map(|offers| &offers.clusters)
            .map(|offer| Served {
                cluster: offer.name.clone(),
                files: offer.files,
                remote: offer.remote,
                assertions: offer.assertions,
                // It becomes the reason that is stored with a job, whatever an older worker has left in it.
                problem: offer
                    .problem
                    .as_ref()
                    .map(|problem| telemetry::scrub(&problem.to_string()).into_owned()),
            })
            .collect(),
        repositories: offers
            .iter()
            .flat_map(|offers| &offers.repositories)
            .map(|repository| repository.name.clone())
            .collect(),
        restore_roots: offers.map(|offers| offers.restore_roots.clone()).unwrap_or_default(),
    }
}

/// Sends tickets again that nobody answered in time; to another queue when the job now belongs elsewhere.
async fn repeat_tickets(tx: &mut Tx<'_>, situation: &mut Situation) -> Result<()> {
    let late: Vec<Attempt> = situation
        .holders
        .values()
        .filter(|attempt| {
            attempt.state == AttemptState::Ticketed
                && attempt.ticket_until_at_ms <= situation.now_ms
        })
        .cloned()
        .collect();
    for mut attempt in late {
        let Some(mut job) = jobs::get(tx.db(), attempt.job).await? else { continue };
        let same = match placed(situation, &job) {
            Placed::Queue { queue, .. } => queue.routing_key() == attempt.queue,
            Placed::Nobody { .. } => false,
        };
        if same {
            attempt.ticket_until_at_ms = situation.now_ms + situation.ticket_ms;
            attempt.tickets_sent += 1;
            attempts::update(tx, &attempt).await?;
            outbox::put(tx, &outgoing(&job, &attempt)).await?;
        } else {
            let reason = "nobody answered its ticket";
            withdraw(tx, attempt.id, AttemptState::Superseded, reason, situation.now_ms).await?;
            release(situation, &attempt);
            job.attempt = None;
            jobs::update(tx, &job).await?;
        }
    }
    Ok(())
}

fn release(situation: &mut Situation, attempt: &Attempt) {
    situation.holders.remove(&(attempt.cluster.clone(), class_of(attempt.kind)));
    if let Some(count) = situation.outstanding.get_mut(&attempt.queue) {
        *count = count.saturating_sub(1);
    }
}

/// Whether a task reads the files of its cluster's server.
fn reads_files(task: &Task) -> bool {
    match task {
        Task::Backup(backup) => backup.kind().is_physical(),
        Task::EnableWal(_) => true,
        Task::VerifyRestore(_)
        | Task::Restore(_)
        | Task::Analyze(_)
        | Task::Vacuum(_)
        | Task::Probe(_) => false,
    }
}

fn placed(situation: &Situation, job: &Job) -> Placed {
    placed_among(&situation.workers, situation.clusters.get(&job.cluster), job)
}

/// Where a job may go, as things are.
pub(crate) fn placed_among(workers: &[Candidate], cluster: Option<&Cluster>, job: &Job) -> Placed {
    let restore_roots = match &job.task {
        Task::Restore(restore) => restore.roots().collect(),
        _ => BTreeSet::new(),
    };
    place(
        &Need {
            kind: job.kind(),
            lane: job.lane,
            cluster: &job.cluster,
            home: cluster.and_then(|cluster| cluster.site.as_ref()),
            repository: cluster.and_then(|cluster| cluster.repository.as_deref()),
            files: reads_files(&job.task),
            assertions: matches!(&job.task, Task::VerifyRestore(proof) if proof.level >= ProofLevel::L6),
            restore_roots,
            only: job.only_worker.as_ref(),
            rather_not: job.rather_not.as_ref(),
            refused: &job.refused,
        },
        workers,
    )
}

/// Gives one job a ticket, or the reason why it has none.
async fn plan_one(tx: &mut Tx<'_>, situation: &mut Situation, mut job: Job) -> Result<()> {
    let paused = situation.clusters.get(&job.cluster).is_some_and(|cluster| cluster.paused);
    if paused && job.probe_of.is_none() {
        let reason = format!("{} is paused", job.cluster);
        return wait(tx, job, reason).await;
    }
    let key = (job.cluster.clone(), class_of(job.kind()));
    if let Some(holder) = situation.holders.get(&key).cloned() {
        let overtakes = job.lane == Lane::Urgent
            && holder.lane == Lane::Routine
            && holder.state == AttemptState::Ticketed;
        if !overtakes {
            let reason = format!(
                "another {} of {} has its turn: job {}",
                holder.kind, holder.cluster, holder.job
            );
            return wait(tx, job, reason).await;
        }
        let reason = format!("urgent job {} goes first", job.id);
        withdraw(tx, holder.id, AttemptState::Superseded, &reason, situation.now_ms).await?;
        if let Some(mut other) = jobs::get(tx.db(), holder.job).await? {
            other.attempt = None;
            other.state = JobState::Waiting;
            other.reason = Some(reason);
            jobs::update(tx, &other).await?;
        }
        release(situation, &holder);
    }
    let (queue, free) = match placed(situation, &job) {
        Placed::Nobody { reason } => return wait(tx, job, reason).await,
        Placed::Queue { queue, free, .. } => (queue, free),
    };
    let routing_key = queue.routing_key();
    let out = situation.outstanding.entry(routing_key.clone()).or_insert(0);
    if window(free, *out) == 0 {
        let reason = match &queue {
            TicketQueue::Site(site, lane) => format!("no {lane} slot is free in site {site}"),
            TicketQueue::Worker(worker, lane) => {
                format!("no {lane} slot is free at worker {worker}")
            }
        };
        return wait(tx, job, reason).await;
    }
    *out += 1;
    let now_ms = situation.now_ms;
    let (target_worker, target_site) = match queue {
        TicketQueue::Site(site, _) => (None, Some(site)),
        TicketQueue::Worker(worker, _) => (Some(worker), None),
    };
    let attempt = Attempt {
        id: chance::attempt(now_ms),
        job: job.id,
        cluster: job.cluster.clone(),
        kind: job.kind(),
        lane: job.lane,
        state: AttemptState::Ticketed,
        reason: None,
        predecessor: job.last_attempt,
        queue: routing_key,
        target_worker,
        target_site,
        created_at_ms: now_ms,
        ticket_until_at_ms: now_ms + situation.ticket_ms,
        tickets_sent: 1,
        worker: None,
        boot: None,
        nonce: None,
        token: None,
        grant: None,
        granted_at_ms: None,
        lease_until_at_ms: None,
        listed_at_ms: None,
        progress: None,
        started_at_ms: None,
        ended_at_ms: None,
        suspect_at_ms: None,
        probe: None,
        probe_at_ms: None,
        failure: None,
    };
    attempts::insert(tx, &attempt).await?;
    outbox::put(tx, &outgoing(&job, &attempt)).await?;
    job.attempt = Some(attempt.id);
    job.state = JobState::Queued;
    job.reason = None;
    jobs::update(tx, &job).await?;
    situation.holders.insert(key, attempt);
    Ok(())
}

/// Stores why a job waits; writes only what is new.
async fn wait(tx: &mut Tx<'_>, mut job: Job, reason: String) -> Result<()> {
    if job.state == JobState::Waiting && job.reason.as_ref() == Some(&reason) {
        return Ok(());
    }
    job.state = JobState::Waiting;
    job.reason = Some(reason);
    jobs::update(tx, &job).await
}

fn outgoing(job: &Job, attempt: &Attempt) -> Outgoing {
    let ticket = Ticket {
        schema: SCHEMA,
        job: job.id,
        attempt: attempt.id,
        kind: job.kind(),
        lane: job.lane,
        cluster: job.cluster.clone(),
        not_after_ms: attempt.ticket_until_at_ms,
    };
    Outgoing {
        attempt: attempt.id,
        routing_key: attempt.queue.clone(),
        body: row::json(&ticket),
        traceparent: TraceContext::of_attempt(job.id, attempt.id).to_string(),
        urgent: job.lane == Lane::Urgent,
        submitted_at_ms: job.submitted_at_ms,
    }
}

/// Empties the outbox; false when the broker did not take everything.
async fn send(core: &Core, epoch: i64) -> Result<bool> {
    let mut homeless = HashSet::new();
    loop {
        let tickets = {
            let mut db = core.catalog.read().await?;
            outbox::pending(&mut db, BATCH_MAX).await?
        };
        if tickets.is_empty() {
            return Ok(true);
        }
        let mut unsent = false;
        for ticket in tickets {
            match send_one(core, &ticket).await {
                Ok(Published::Routed) => sent(core, epoch, &ticket, None).await?,
                Ok(Published::Unroutable) => {
                    // A site's queue is anybody's to declare; a worker's own is gone with its worker.
                    let reason = format!(
                        "queue {}.{} is gone with its worker",
                        topology::JOBS,
                        ticket.routing_key
                    );
                    if homeless.insert(ticket.routing_key.clone())
                        && declare_site(core, &ticket).await
                    {
                        unsent = true;
                    } else {
                        sent(core, epoch, &ticket, Some(&reason)).await?;
                    }
                }
                Err(error) => {
                    tracing::warn!(attempt.id = %ticket.attempt, "Failed to {}", proto::failure::chain(&error));
                    return Ok(false);
                }
            }
        }
        if !unsent && core.epoch() != Some(epoch) {
            return Err(Error::StaleEpoch { epoch });
        }
    }
}

async fn send_one(
    core: &Core,
    ticket: &Outgoing,
) -> std::result::Result<Published, broker::PublishError> {
    let headers = vec![(wire::TRACEPARENT.to_owned(), ticket.traceparent.clone())];
    let publish = Publish::new(
        topology::JOBS,
        ticket.routing_key.as_str(),
        wire::TICKET,
        ticket.attempt.to_string(),
        ticket.body.clone(),
    )
    .expiring(u64::from(core.config.timing.ticket_ms))
    .with_headers(headers);
    core.broker.publish(publish).await
}

async fn declare_site(core: &Core, ticket: &Outgoing) -> bool {
    let mut parts = ticket.routing_key.split('.');
    let (Some("site"), Some(site)) = (parts.next(), parts.next()) else { return false };
    let Ok(site) = site.parse() else { return false };
    core.broker.declare(&[Declaration::site(&site)]).await.is_ok()
}

/// The broker answered for a ticket. When nobody has a queue for it, its worker counts as silent until it speaks
/// again, and the job goes back.
async fn sent(core: &Core, epoch: i64, ticket: &Outgoing, nobody: Option<&str>) -> Result<()> {
    let now_ms = core.now_ms();
    let attempt_id = ticket.attempt;
    core.catalog
        .lead(epoch, "sent", move |tx| {
            Box::pin(async move {
                outbox::remove(tx, attempt_id).await?;
                let Some(reason) = nobody else { return Ok(()) };
                let Some(attempt) = attempts::get(tx.db(), attempt_id).await? else {
                    return Ok(());
                };
                if attempt.state != AttemptState::Ticketed {
                    return Ok(());
                }
                withdraw(tx, attempt.id, AttemptState::Superseded, reason, now_ms).await?;
                if let Some(name) = &attempt.target_worker {
                    silence(tx, name).await?;
                }
                if let Some(mut job) = jobs::get(tx.db(), attempt.job).await?
                    && job.attempt == Some(attempt.id)
                {
                    job.attempt = None;
                    job.state = JobState::Waiting;
                    job.reason = Some(reason.to_owned());
                    jobs::update(tx, &job).await?;
                }
                Ok(())
            })
        })
        .await?;
    core.job_changed();
    Ok(())
}

async fn silence(tx: &mut Tx<'_>, name: &WorkerName) -> Result<()> {
    if let Some(mut worker) = workers::get(tx.db(), name).await? {
        worker.seen_at_ms = None;
        workers::put(tx, &worker).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proto::message::{ClusterOffer, Offers};
    use proto::{Action, Code, Failure};

    use super::*;

    #[test]
    fn the_reason_of_a_job_that_waits_has_no_secrets() {
        let text = "failed to connect: bad option in postgresql://app:hunter2@db/shop";
        let offer = ClusterOffer {
            name: "orders".parse().unwrap(),
            labels: BTreeMap::new(),
            repository: None,
            system_identifier: None,
            server_version_num: None,
            files: false,
            remote: false,
            problem: Some(Failure::new(Code::ServerUnreachable, Action::Retry, text)),
            archive: None,
            repository_away: None,
            repository_look: None,
            heartbeat: None,
            assertions: false,
            reads_little: None,
        };
        let offers = Offers {
            version: "0".to_owned(),
            kinds: Vec::new(),
            clusters: vec![offer],
            repositories: Vec::new(),
            restore_roots: Vec::new(),
            postgres_majors: Vec::new(),
        };
        let worker = Worker {
            name: "w1".parse().unwrap(),
            site: "here".parse().unwrap(),
            public_key: String::new(),
            issued_at_ms: 0,
            boot: None,
            former_boots: Vec::new(),
            seq: 0,
            seen_at_ms: None,
            every_ms: 0,
            urgent_free: 0,
            routine_free: 0,
            draining: false,
            offers: Some(offers),
        };
        let candidate = candidate(&worker, &[], 0);
        let problem = candidate.clusters[0].problem.as_deref().unwrap();
        assert!(problem.contains("bad option") && !problem.contains("hunter2"), "{problem}");
    }
}
