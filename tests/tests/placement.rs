//! Two hosts in one site: each job reaches the host that can do it, and what nobody can do says why.

use std::time::Duration;

use anyhow::ensure;
use postgres::instance::InstanceOptions;
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup};

const LATER: Duration = Duration::from_mins(1);

#[tokio::test(flavor = "multi_thread")]
async fn each_job_reaches_the_host_that_has_the_cluster() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let (orders, billing) = tokio::try_join!(
        Cluster::start(15, InstanceOptions::default()),
        Cluster::start(18, InstanceOptions::default()),
    )?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("host-a", "orders", orders.url()))?;
    fleet.start_worker(&WorkerSetup::of("host-b", "billing", billing.url()))?;

    let jobs =
        [("orders", "host-a"), ("billing", "host-b"), ("orders", "host-a"), ("billing", "host-b")];
    for (cluster, host) in jobs {
        let job = fleet.order(&["maintain", cluster, "--task", "analyze"])?;
        let view = fleet.await_state(job, &["succeeded", "failed"], LATER)?;
        ensure!(view["state"] == "succeeded", "{view}\n{}", fleet.said());
        ensure!(view["worker"] == host, "{cluster} ran on {}: {view}", view["worker"]);
    }

    // With its host gone, a job waits and says for what; it runs when the host is back.
    fleet.worker("host-b")?.kill()?;
    let job = fleet.order(&["maintain", "billing", "--task", "analyze"])?;
    let waiting = tests::eventually("the job to say why it waits", LATER, || {
        let view = fleet.job(job)?;
        let reason = view["reason"].as_str().unwrap_or_default().to_owned();
        ensure!(view["state"] == "waiting" && reason.contains("host-b"), "{view}");
        Ok(Some(reason))
    })?;
    ensure!(waiting.contains("silent"), "{waiting}");
    fleet.start_worker(&WorkerSetup::of("host-b", "billing", billing.url()))?;
    let view = fleet.await_state(job, &["succeeded", "failed", "missed"], LATER)?;
    ensure!(view["state"] == "succeeded", "{view}\n{}", fleet.said());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_does_not_wait_behind_a_full_worker() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    // Backups stand still for ever: all they do is to fill slots.
    let setup = WorkerSetup::of("w1", "orders", cluster.url()).failing_at("connect=pause");
    fleet.start_worker(&setup)?;
    let first = fleet.order(&["backup", "orders"])?;
    fleet.await_state(first, &["running"], LATER)?;
    let second = fleet.order(&["backup", "orders"])?;
    // Another backup of the same cluster waits for the first one, and says so.
    let reason = tests::eventually("the second backup to say why it waits", LATER, || {
        let view = fleet.job(second)?;
        Ok(view["reason"].as_str().filter(|_| view["state"] == "waiting").map(str::to_owned))
    })?;
    ensure!(!reason.is_empty());
    for job in [second, first] {
        fleet.expect(&["job", "cancel", &job.to_string()])?;
        fleet.await_state(job, &["cancelled"], LATER)?;
    }
    Ok(())
}
