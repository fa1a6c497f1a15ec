//! Silent attempts: an expired lease makes a suspect, evidence makes it lost. Also the beacon, which tells workers
//! that the coordinator lives and what must stop.

use std::collections::HashMap;

use policy::lease::{Lease, Seen, Sweep, Verdict};
use proto::job::{JobState, Lane, Outcome, Probe, ProbeOutcome, Task};
use proto::message::{Beacon, Revoked, SCHEMA};
use tokio_util::sync::CancellationToken;

use crate::catalog::Tx;
use crate::catalog::attempts::{self, Attempt, AttemptState};
use crate::catalog::events::{self, Event};
use crate::catalog::jobs::{self, Job};
use crate::catalog::workers::{self, Worker};
use crate::core::Core;
use crate::error::Result;
use crate::settle::{Ending, Settled, end, new_job};
use crate::wire;

/// A probe ends itself after this long, milliseconds.
const PROBE_MS: i64 = 60_000;
/// Revoked attempts on one beacon.
const REVOKED_MAX: usize = 1_000;

/// Since when this coordinator has been hearing its workers without a break. A break is a broken link, and also a
/// stretch in which this process itself did not run: pulses that came meanwhile have expired.
#[derive(Debug, Default)]
pub(crate) struct Listening {
    since_at_ms: Option<i64>,
    last_look_at_ms: Option<i64>,
}

impl Listening {
    /// A look, at least every `every_ms` while all is well.
    pub(crate) fn look(&mut self, up: bool, every_ms: i64, now_ms: i64) -> Option<i64> {
        let stalled =
            self.last_look_at_ms.is_some_and(|last| now_ms - last > every_ms.saturating_mul(3));
        self.last_look_at_ms = Some(now_ms);
        if !up {
            self.since_at_ms = None;
        } else if stalled || self.since_at_ms.is_none() {
            self.since_at_ms = Some(now_ms);
        }
        self.since_at_ms
    }
}

/// Looks at all leases again and again until the term ends.
pub(crate) async fn run(core: &Core, epoch: i64, over: &CancellationToken) -> Result<()> {
    let every_ms = (i64::from(core.config.timing.lease_ms) / 4).clamp(250, 5_000);
    let mut listening = Listening::default();
    let mut storm = Storm::default();
    loop {
        let now_ms = core.now_ms();
        let since = listening.look(core.broker_up(), every_ms, now_ms);
        let settled = sweep(core, epoch, since, &mut storm).await?;
        for one in &settled {
            one.tell(core);
        }
        tokio::select! {
            () = over.cancelled() => return Ok(()),
            () = core.clock.sleep_until(now_ms + every_ms) => {}
        }
    }
}

/// A storm that goes on.
#[derive(Debug, Default)]
struct Storm {
    since_at_ms: Option<i64>,
}

async fn sweep(
    core: &Core,
    epoch: i64,
    listening_since: Option<i64>,
    storm: &mut Storm,
) -> Result<Vec<Settled>> {
    let now_ms = core.now_ms();
    let policy = core.config.lease_policy();
    let granted = {
        let mut db = core.catalog.read().await?;
        attempts::granted(&mut db).await?
    };
    if granted.is_empty() || listening_since.is_none() {
        return Ok(Vec::new());
    }
    let leases: Vec<Lease> = granted
        .iter()
        .filter(|attempt| attempt.state == AttemptState::Running)
        .map(|attempt| Lease {
            attempt: attempt.id,
            until_at_ms: attempt.lease_until_at_ms.unwrap_or(0),
        })
        .collect();
    let (suspects, raised) = match policy.sweep(&leases, listening_since, now_ms) {
        Sweep::CutOff => return Ok(Vec::new()),
        Sweep::Suspects(suspects) => {
            storm.since_at_ms = None;
            (suspects, None)
        }
        Sweep::Storm { reason, .. } => {
            let first = storm.since_at_ms.is_none();
            let since = *storm.since_at_ms.get_or_insert(now_ms);
            if now_ms - since < policy.patience_ms {
                (Vec::new(), first.then_some(reason))
            } else {
                // It lasted: these workers are really silent. From here on each is judged by its own evidence.
                let floor = listening_since.unwrap_or(now_ms) + policy.lease_ms;
                let expired = leases.iter().filter(|lease| lease.until_at_ms.max(floor) <= now_ms);
                (expired.map(|lease| lease.attempt).collect(), None)
            }
        }
    };
    if let Some(reason) = &raised {
        core.metrics.lease_storm();
        tracing::error!("{reason}");
    }
    let nothing_to_judge = granted.iter().all(|attempt| attempt.state != AttemptState::Suspect);
    if suspects.is_empty() && raised.is_none() && nothing_to_judge {
        return Ok(Vec::new());
    }
    let (suspects, raised) = (&suspects, &raised);
    let settled = core
        .catalog
        .lead(epoch, "reap", move |tx| {
            Box::pin(async move {
                if let Some(reason) = raised {
                    let event = Event {
                        at_ms: now_ms,
                        name: "lease_storm".to_owned(),
                        message: reason.clone(),
                        ..Event::default()
                    };
                    events::add(tx, &event).await?;
                }
                let mut settled = Vec::new();
                let workers = workers::list(tx.db()).await?;
                let workers: HashMap<_, _> =
                    workers.into_iter().map(|worker| (worker.name.clone(), worker)).collect();
                for mut attempt in attempts::granted(tx.db()).await? {
                    if suspects.contains(&attempt.id) && attempt.state == AttemptState::Running {
                        attempt.state = AttemptState::Suspect;
                        attempt.suspect_at_ms = Some(now_ms);
                        attempts::update(tx, &attempt).await?;
                    }
                    if attempt.state == AttemptState::Suspect {
                        settled.extend(judge(tx, core, attempt, &workers, now_ms).await?);
                    }
                }
                Ok(settled)
            })
        })
        .await?;
    core.doorbell.notify_one();
    core.job_changed();
    Ok(settled)
}

/// Judges one suspect: ends it, or says why not yet, and begins a probe when one could say more.
async fn judge(
    tx: &mut Tx<'_>,
    core: &Core,
    mut attempt: Attempt,
    workers: &HashMap<proto::WorkerName, Worker>,
    now_ms: i64,
) -> Result<Option<Settled>> {
    let Some(mut job) = jobs::get(tx.db(), attempt.job).await? else { return Ok(None) };
    let probe_job = match attempt.probe {
        Some(probe) => jobs::get(tx.db(), probe).await?,
        None => None,
    };
    let probe = probe_job.as_ref().and_then(answer);
    let disowned_by = attempt
        .worker
        .as_ref()
        .and_then(|name| workers.get(name))
        .filter(|worker| {
            // Its own process speaks and does not list it any more, or another one came after it.
            let silent =
                worker.boot == attempt.boot && worker.seen_at_ms >= attempt.lease_until_at_ms;
            let gone = attempt.boot.is_some_and(|boot| worker.is_former(boot));
            worker.is_alive(now_ms) && (silent || gone)
        })
        .map(|worker| worker.name.as_str());
    let seen = Seen { disowned_by, probe };
    let suspect_at_ms = attempt.suspect_at_ms.unwrap_or(now_ms);
    let verdict = core.config.lease_policy().judge(attempt.kind, suspect_at_ms, &seen, now_ms);
    let ending = match verdict {
        Verdict::Lost { reason } => Ending::Lost { reason },
        Verdict::Finished { reason } => Ending::Succeeded { outcome: None, reason: Some(reason) },
        Verdict::Wait { reason, probe } => {
            let open = probe_job.as_ref().is_some_and(|job| !job.state.is_final());
            let rested = attempt
                .probe_at_ms
                .is_none_or(|at_ms| now_ms - at_ms >= i64::from(core.config.timing.lease_ms));
            if probe && !open && rested {
                begin_probe(tx, core, &job, &mut attempt, now_ms).await?;
            }
            attempt.reason = Some(reason.clone());
            attempts::update(tx, &attempt).await?;
            if job.reason.as_ref() != Some(&reason) {
                job.reason = Some(reason);
                jobs::update(tx, &job).await?;
            }
            return Ok(None);
        }
    };
    if let Some(mut probe) =
        probe_job.filter(|probe| !probe.state.is_final() && probe.started_at_ms.is_none())
    {
        if let Some(open) = probe.attempt {
            crate::settle::withdraw(
                tx,
                open,
                AttemptState::Superseded,
                "nobody needs the answer",
                now_ms,
            )
            .await?;
        }
        let reason = "nobody needs the answer any more".to_owned();
        crate::settle::finish(&mut probe, JobState::Cancelled, Some(reason), now_ms);
        jobs::update(tx, &probe).await?;
    }
    end(tx, &core.config, now_ms, job, attempt, ending).await.map(Some)
}

fn answer(probe: &Job) -> Option<&ProbeOutcome> {
    match &probe.outcome {
        Some(Outcome::Probe(outcome)) => Some(outcome),
        _ => None,
    }
}

/// Sends somebody to look: any worker that reaches the cluster or its repository, rather not the silent one. For a
/// job that was asked to stop, it also ends the attempt's sessions.
async fn begin_probe(
    tx: &mut Tx<'_>,
    core: &Core,
    job: &Job,
    attempt: &mut Attempt,
    now_ms: i64,
) -> Result<()> {
    let terminate = job.state == JobState::Cancelling;
    let task = Task::Probe(Probe { attempt: attempt.id, terminate });
    let mut probe =
        new_job(&core.config, job.cluster.clone(), task, Lane::Urgent, "reaper", now_ms);
    probe.probe_of = Some(attempt.id);
    probe.rather_not.clone_from(&attempt.worker);
    probe.attempts_max = 1;
    probe.deadline_ms = PROBE_MS;
    probe.not_after_at_ms = Some(now_ms + core.config.lease_policy().patience_ms);
    jobs::insert(tx, &probe).await?;
    attempt.probe = Some(probe.id);
    attempt.probe_at_ms = Some(now_ms);
    Ok(())
}

/// Shows every worker that the coordinator lives, and what must stop, until the term ends.
pub(crate) async fn run_beacon(core: &Core, epoch: i64, over: &CancellationToken) -> Result<()> {
    let every_ms = i64::from(core.config.timing.beacon_ms);
    loop {
        let now_ms = core.now_ms();
        if core.broker_up() {
            let beacon = Beacon {
                schema: SCHEMA,
                epoch: u64::try_from(epoch).unwrap_or(0),
                boot: core.boot,
                at_ms: now_ms,
                revoked: revoked(core, now_ms).await?,
            };
            wire::beacon(core, &beacon).await;
        }
        tokio::select! {
            () = over.cancelled() => return Ok(()),
            () = core.clock.sleep_until(now_ms + every_ms) => {}
        }
    }
}

async fn revoked(core: &Core, now_ms: i64) -> Result<Vec<Revoked>> {
    let mut db = core.catalog.read().await?;
    let mut revoked: Vec<Revoked> = Vec::new();
    for job in jobs::in_state(&mut db, JobState::Cancelling).await? {
        let Some(open) = job.attempt else { continue };
        if let Some(attempt) = attempts::get(&mut db, open).await?
            && let Some(token) = attempt.token
        {
            revoked.push(Revoked { attempt: attempt.id, token: u64::try_from(token).unwrap_or(0) });
        }
    }
    let wrong = core.wrongly_listed(now_ms);
    revoked.extend(wrong.into_iter().map(|(attempt, token)| Revoked { attempt, token }));
    revoked.truncate(REVOKED_MAX);
    Ok(revoked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_broken_link_and_a_stalled_process_both_begin_the_lease_anew() {
        let mut listening = Listening::default();
        assert_eq!(listening.look(true, 10, 1_000), Some(1_000));
        assert_eq!(listening.look(true, 10, 1_010), Some(1_000));
        assert_eq!(listening.look(false, 10, 1_020), None);
        assert_eq!(listening.look(true, 10, 1_030), Some(1_030));
        assert_eq!(listening.look(true, 10, 1_060), Some(1_030));
        assert_eq!(listening.look(true, 10, 1_091), Some(1_091), "nobody looked for 31 ms");
    }
}
