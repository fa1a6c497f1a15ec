//! Pulses: workers live, have room, run this and that. A whole batch is one transaction.
//!
//! A pulse renews the leases of what it lists. One of a new boot is the evidence that the boot before is gone: what
//! that one ran, and the new one does not list, is lost at once.

use proto::envelope::{Certificate, Signed};
use proto::message::{Holdings, Pulse, RunningAttempt};
use proto::topology;
use proto::words::count;

use crate::catalog::attempts::{self, Attempt, AttemptState};
use crate::catalog::clusters::Cluster;
use crate::catalog::events::{self, Event};
use crate::catalog::workers::{self, Life, Worker};
use crate::catalog::{Tx, backups, clusters, copies, heartbeats, jobs};
use crate::claims::NotTheSender;
use crate::core::Core;
use crate::error::Result;
use crate::inbox::refuse;
use crate::settle::{Ending, Settled, end};

/// How long an attempt that ended may still be listed.
const WAY_OUT_MS: i64 = 30_000;
/// How long a pulse may be on its way: it is short-lived.
const ON_ITS_WAY_MS: i64 = 60_000;

/// Takes in a batch of messages of the pulse queue. What is not believed is counted and left out.
pub(crate) async fn handle(core: &Core, epoch: i64, bodies: &[&[u8]]) -> Result<()> {
    let pulses: Vec<(Pulse, Certificate)> =
        bodies.iter().filter_map(|body| verified(core, body)).collect();
    if pulses.is_empty() {
        return Ok(());
    }
    let now_ms = core.now_ms();
    let pulses = &pulses;
    let heard = core
        .catalog
        .lead(epoch, "pulses", move |tx| {
            Box::pin(async move {
                let mut heard = Heard::default();
                for (pulse, certificate) in pulses {
                    hear(tx, core, pulse, certificate, now_ms, &mut heard).await?;
                }
                Ok(heard)
            })
        })
        .await?;
    for settled in &heard.settled {
        settled.tell(core);
    }
    for (attempt, token) in heard.wrong {
        core.listed_wrongly(attempt, token, now_ms);
    }
    if heard.progress {
        core.job_changed();
    }
    if heard.room {
        core.doorbell.notify_one();
    }
    Ok(())
}

fn verified(core: &Core, body: &[u8]) -> Option<(Pulse, Certificate)> {
    let signed: Signed<Pulse> = match serde_json::from_slice(body) {
        Ok(signed) => signed,
        Err(error) => {
            refuse(core, topology::PULSE, &error);
            return None;
        }
    };
    match signed.verify_certified(&core.public_key) {
        Ok((pulse, certificate))
            if pulse.worker == certificate.worker && pulse.site == certificate.site =>
        {
            Some((pulse, certificate))
        }
        Ok(_) => {
            refuse(core, topology::PULSE, &NotTheSender);
            None
        }
        Err(error) => {
            refuse(core, topology::PULSE, &error);
            None
        }
    }
}

/// What came of a batch.
#[derive(Default)]
struct Heard {
    settled: Vec<Settled>,
    /// Listed, but over.
    wrong: Vec<(proto::AttemptId, u64)>,
    progress: bool,
    /// There may be room for something that waited.
    room: bool,
}

async fn hear(
    tx: &mut Tx<'_>,
    core: &Core,
    pulse: &Pulse,
    certificate: &Certificate,
    now_ms: i64,
    heard: &mut Heard,
) -> Result<()> {
    let known = workers::get(tx.db(), &pulse.worker).await?;
    let mut worker = known.unwrap_or_else(|| Worker::of_certificate(certificate));
    if !worker.accept(certificate) {
        core.metrics.message_refused(topology::PULSE);
        return Ok(());
    }
    let before = worker.clone();
    let life = worker.hear(pulse, now_ms);
    if life == Life::Past {
        return Ok(());
    }
    heard.room |= life == Life::New
        || pulse.offers.is_some()
        || !before.is_alive(now_ms)
        || worker.routine_free > before.routine_free
        || worker.urgent_free > before.urgent_free
        || worker.draining != before.draining;
    workers::put(tx, &worker).await?;
    announce(tx, pulse, &worker, now_ms).await?;
    if life == Life::New {
        close_former(tx, core, pulse, now_ms, heard).await?;
    }
    for running in &pulse.running {
        renew(tx, core, pulse, running, now_ms, heard).await?;
    }
    Ok(())
}

async fn announce(tx: &mut Tx<'_>, pulse: &Pulse, worker: &Worker, now_ms: i64) -> Result<()> {
    let served = worker.offers.iter().flat_map(|offers| &offers.clusters).map(|offer| &offer.name);
    let served: Vec<_> = served.collect();
    clusters::seen(tx, &served, now_ms).await?;
    if let Some(offers) = &pulse.offers {
        for offer in &offers.clusters {
            let location = offer.repository.as_ref().and_then(|name| {
                offers.repositories.iter().find(|r| r.name == *name).map(|r| r.location.as_str())
            });
            clusters::announce(tx, offer, location, &pulse.worker, &pulse.site, now_ms).await?;
        }
        jobs::forget_refusals(tx, &pulse.worker).await?;
    }
    let mut stand: Vec<Cluster> = Vec::new();
    for standing in pulse.wal.iter().filter(|standing| served.contains(&&standing.cluster)) {
        stand.extend(clusters::archive_stands(tx, standing, pulse.at_ms, now_ms).await?);
    }
    for holdings in pulse.holdings.iter().filter(|holdings| served.contains(&&holdings.cluster)) {
        take_in(tx, pulse, holdings, now_ms).await?;
    }
    let told = pulse.heartbeats.iter().filter(|told| served.contains(&&told.cluster));
    let told: Vec<_> = told.collect();
    heartbeats::hear(tx, &told, now_ms).await?;
    // The archive of a busy server has them before they are told.
    for name in told.iter().map(|told| &told.cluster) {
        if !stand.iter().any(|cluster| cluster.name == *name) {
            stand.extend(clusters::get(tx.db(), name).await?);
        }
    }
    for cluster in &stand {
        if let (Some(server), Some(wal)) = (cluster.system_identifier, &cluster.wal) {
            // The message that told where the server is may have waited on its way.
            let seen_at_ms = wal.at_ms.saturating_sub(ON_ITS_WAY_MS);
            heartbeats::stand(tx, server, wal, seen_at_ms).await?;
        }
    }
    Ok(())
}

/// Which backups a repository has, and which copies of them it knows. A message takes a while, so what was recorded shortly before
/// it was looked, by our clock, may have come after.
async fn take_in(tx: &mut Tx<'_>, pulse: &Pulse, holdings: &Holdings, now_ms: i64) -> Result<()> {
    let age_ms = pulse.at_ms.saturating_sub(holdings.at_ms).max(0);
    let seen_at_ms = now_ms.saturating_sub(age_ms).saturating_sub(ON_ITS_WAY_MS);
    copies::told(tx, holdings).await?;
    let gone = backups::held(tx, holdings, &pulse.worker, seen_at_ms, now_ms).await?;
    let Some(first) = gone.first() else { return Ok(()) };
    let (cluster, repository) = (&holdings.cluster, &holdings.repository);
    let event = Event {
        at_ms: now_ms,
        name: "backups_gone".to_owned(),
        cluster: Some(cluster.to_string()),
        worker: Some(pulse.worker.to_string()),
        message: format!(
            "{} of {cluster} not in {repository}, or given up, {first} first",
            count(gone.len() as u64, "backup")
        ),
        ..Event::default()
    };
    events::add(tx, &event).await
}

/// The worker restarted: what its former boot ran is gone, unless the new one says that it goes on with it.
async fn close_former(
    tx: &mut Tx<'_>,
    core: &Core,
    pulse: &Pulse,
    now_ms: i64,
    heard: &mut Heard,
) -> Result<()> {
    let event = Event {
        at_ms: now_ms,
        name: "worker_started".to_owned(),
        worker: Some(pulse.worker.to_string()),
        message: format!(
            "worker {} of site {} began boot {}",
            pulse.worker, pulse.site, pulse.boot
        ),
        ..Event::default()
    };
    events::add(tx, &event).await?;
    for attempt in attempts::granted_to(tx.db(), &pulse.worker).await? {
        let goes_on = pulse.running.iter().any(|running| running.attempt == attempt.id);
        if attempt.boot == Some(pulse.boot) || goes_on {
            continue;
        }
        let Some(job) = jobs::get(tx.db(), attempt.job).await? else { continue };
        let reason = format!("worker {} restarted", pulse.worker);
        heard
            .settled
            .push(end(tx, &core.config, now_ms, job, attempt, Ending::Lost { reason }).await?);
    }
    Ok(())
}

async fn renew(
    tx: &mut Tx<'_>,
    core: &Core,
    pulse: &Pulse,
    running: &RunningAttempt,
    now_ms: i64,
    heard: &mut Heard,
) -> Result<()> {
    let Some(mut attempt) = attempts::get(tx.db(), running.attempt).await? else { return Ok(()) };
    let same_grant = attempt.boot == Some(pulse.boot)
        && attempt.token.is_some_and(|token| u64::try_from(token) == Ok(running.token));
    if !(attempt.state.is_granted() && same_grant) {
        if is_over(&attempt, now_ms) || !same_grant {
            heard.wrong.push((running.attempt, running.token));
        }
        return Ok(());
    }
    attempt.lease_until_at_ms = Some(now_ms + core.config.lease_ms(i64::from(pulse.every_ms)));
    attempt.listed_at_ms = Some(now_ms);
    if attempt.state == AttemptState::Suspect {
        attempt.state = AttemptState::Running;
        attempt.suspect_at_ms = None;
        attempt.probe = None;
        attempt.probe_at_ms = None;
        attempt.reason = None;
        if let Some(mut job) = jobs::get(tx.db(), attempt.job).await?
            && job.state == proto::JobState::Running
        {
            job.reason = None;
            jobs::update(tx, &job).await?;
        }
    }
    if running.progress.is_some() && running.progress != attempt.progress {
        attempt.progress.clone_from(&running.progress);
        jobs::touch(tx, attempt.job).await?;
        heard.progress = true;
    }
    attempts::update(tx, &attempt).await
}

/// Whether a worker that still runs this attempt must stop. One that succeeded or failed is on its way out, for a while:
/// after that it runs on although its job was told to be over, and may meet the next one of its class.
fn is_over(attempt: &Attempt, now_ms: i64) -> bool {
    match attempt.state {
        AttemptState::Lost
        | AttemptState::Cancelled
        | AttemptState::Declined
        | AttemptState::Superseded => true,
        AttemptState::Succeeded | AttemptState::Failed => {
            attempt.ended_at_ms.is_some_and(|at_ms| now_ms - at_ms > WAY_OUT_MS)
        }
        AttemptState::Ticketed | AttemptState::Running | AttemptState::Suspect => false,
    }
}
