//! kill -9 of everybody, in the middle of everything: no backup is lost, none is invented, nothing is left behind.

#[path = "crashes/server.rs"]
mod server;

use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use proto::topology;
use rustix::process::Signal;
use tests::fleet::text;
use tests::{Bucket, Cluster, Fleet, Place, Rabbit, SOON, Vhost, WorkerSetup, services};

/// A job that has to survive somebody's death may take this long.
const LATER: Duration = Duration::from_mins(2);
/// The steps of a backup. A server that summarizes its WAL is asked for that in one more, once there is a backup before.
const BACKUP_STEPS: [&str; 9] = [
    "open_repository",
    "connect",
    "begin",
    "start_backup",
    "copy",
    "stop_backup",
    "store_wal",
    "write_manifest",
    "commit",
];

async fn fleet(amqp: &str, place: Place) -> anyhow::Result<(Fleet, Cluster)> {
    fleet_of(amqp, place, 15, InstanceOptions::default()).await
}

async fn fleet_of(
    amqp: &str,
    place: Place,
    major: u32,
    options: InstanceOptions,
) -> anyhow::Result<(Fleet, Cluster)> {
    let cluster = Cluster::start(major, options).await?;
    let mut fleet = Fleet::prepare(amqp, "", place)?;
    fleet.start_coordinator()?;
    Ok((fleet, cluster))
}

const BACKUP: &[&str] = &["backup", "orders"];

/// The worker dies at the beginning of a step of what was ordered and is started again; the job succeeds all the same, once.
async fn worker_dies_at<'a>(
    fleet: (Fleet, Cluster),
    deaths: impl IntoIterator<Item = (&'a str, &'a [&'a str])>,
    ordered_before: Option<&[&str]>,
) -> anyhow::Result<()> {
    let (mut fleet, cluster) = fleet;
    let setup = WorkerSetup::of("w1", "orders", cluster.url());
    fleet.start_worker(&setup)?;
    if let Some(before) = ordered_before {
        fleet.expect(before)?;
    }
    for (step, order) in deaths {
        let before = fleet.backups()?;
        fleet.worker("w1")?.kill()?;
        fleet.start_worker(&setup.clone().failing_at(format!("{step}=abort")))?;
        let job = fleet.order(order)?;
        let died = tests::eventually(format!("the worker to die at {step}"), LATER, || {
            Ok(fleet.worker("w1")?.has_ended()?.then_some(()))
        });
        died.with_context(|| fleet.said())?;
        fleet.start_worker(&setup)?;
        let view = fleet.await_state(job, &["succeeded", "failed", "lost"], LATER)?;
        ensure!(view["state"] == "succeeded", "{step}: {view}\n{}", fleet.said());
        let expected = before + usize::from(order == BACKUP);
        let after = fleet.backups()?;
        ensure!(after == expected, "{step}: {before} backups became {after}");
        cluster.is_left_alone().await.with_context(|| step.to_owned())?;
        ensure!(fleet.sandboxes()?.is_empty(), "{step}: {:?}", fleet.sandboxes()?);
    }
    let (url, key) = (fleet.repository_url(), fleet.path("repository.key"));
    fleet.expect(&["repo", "check", &url, "--key", text(&key)?, "--level", "decrypt"])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_at_any_step_of_a_backup_loses_and_invents_none() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let fleet = fleet(&vhost.url(), Place::Directory).await?;
    worker_dies_at(fleet, BACKUP_STEPS.map(|step| (step, BACKUP)), None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_at_any_step_of_a_backup_into_s3_loses_and_invents_none()
-> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let place = Place::S3(Bucket::create().await?);
    let settings = vec![("summarize_wal".to_owned(), "on".to_owned())];
    let summarizes = InstanceOptions { settings, ..InstanceOptions::default() };
    let fleet = fleet_of(&vhost.url(), place, 18, summarizes).await?;
    let steps = BACKUP_STEPS.into_iter().chain(["summaries"]);
    worker_dies_at(fleet, steps.map(|step| (step, BACKUP)), None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_at_any_step_of_a_proof_leaves_no_server_behind() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let fleet = fleet(&vhost.url(), Place::Directory).await?;
    let (boots, reads) =
        (["verify", "orders", "--level", "4"], ["verify", "orders", "--level", "2"]);
    let of_booting = ["find", "inventory", "restore", "boot", "check", "store_proof"];
    let deaths = of_booting.map(|step| (step, &boots[..])).into_iter();
    let deaths = deaths.chain([("decrypt", &reads[..])]);
    worker_dies_at(fleet, deaths, Some(&["backup", "orders", "--wait"])).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_killed_while_it_proves_a_dump_leaves_no_server_behind() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let fleet = fleet(&vhost.url(), Place::Directory).await?;
    let before = ["backup", "orders", "--engine", "pg_dump", "--database", "postgres", "--wait"];
    let order = ["verify", "orders", "--level", "4"];
    let deaths = ["restore postgres", "check"].map(|step| (step, &order[..]));
    worker_dies_at(fleet, deaths, Some(&before)).await
}

/// Who dies while a worker goes on.
enum Victim {
    Coordinator,
    Broker(Box<Rabbit>),
}

/// The worker stands still at the beginning of a step; the victim is killed; the worker goes on without it, to its end
/// if it can; the victim comes back. Each backup is made once, by its first attempt.
async fn somebody_else_dies_at(steps: &[&str], mut victim: Victim) -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let amqp = match &victim {
        Victim::Coordinator => vhost.url(),
        Victim::Broker(rabbit) => rabbit.url(),
    };
    let (mut fleet, cluster) = fleet(&amqp, Place::Directory).await?;
    for (done, step) in steps.iter().enumerate() {
        let go = fleet.path(&format!("{step}.go"));
        let held = format!("{step}=hold:{}", go.display());
        fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()).failing_at(held))?;
        let job = fleet.order(&["backup", "orders"])?;
        fleet.await_step(job, step)?;
        match &mut victim {
            Victim::Coordinator => fleet.coordinator()?.kill()?,
            Victim::Broker(rabbit) => rabbit.kill()?,
        }
        std::fs::write(&go, "")?;
        match &mut victim {
            Victim::Coordinator => fleet.start_coordinator()?,
            Victim::Broker(rabbit) => rabbit.start_again()?,
        }
        let view = fleet.await_state(job, &["succeeded", "failed", "lost"], LATER)?;
        ensure!(view["state"] == "succeeded", "{step}: {view}\n{}", fleet.said());
        ensure!(view["attempts_used"] == 1, "{step}: it ran once: {view}");
        ensure!(fleet.backups()? == done + 1, "{step}: {view}");
        cluster.is_left_alone().await.with_context(|| (*step).to_owned())?;
        fleet.worker("w1")?.kill()?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_killed_at_any_step_forgets_nothing() -> anyhow::Result<()> {
    somebody_else_dies_at(&BACKUP_STEPS, Victim::Coordinator).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_killed_at_a_step_runs_nothing_twice() -> anyhow::Result<()> {
    // A node takes its time to die and to come back.
    let steps = if services::long_run() { &BACKUP_STEPS[..] } else { &["copy", "commit"] };
    somebody_else_dies_at(steps, Victim::Broker(Box::new(Rabbit::start()?))).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_waits_outlives_its_coordinator() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let (mut fleet, cluster) = fleet(&vhost.url(), Place::Directory).await?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    cluster.holds_checkpoints_up().await?;
    let mut command = fleet.start(&["backup", "orders", "--spread-checkpoint", "--wait"])?;
    tests::eventually("the backup to begin", SOON, || {
        let trace = fleet.expect(&["job", "trace", "@last"])?;
        Ok(trace.contains("start_backup").then_some(()))
    })?;
    fleet.coordinator()?.kill()?;
    command.wait_for_line("asking again until it answers", SOON)?;
    fleet.start_coordinator()?;
    cluster.run("CHECKPOINT").await?;
    let done = command.wait(LATER).with_context(|| fleet.said())?;
    ensure!(done.code() == 0, "{done}\n{}", fleet.said());
    ensure!(done.stdout.starts_with("Backed up orders"), "{done}");
    ensure!(fleet.backups()? == 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_comes_while_the_coordinator_is_dead_runs_once() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    // It must not expire while its reader sleeps.
    fleet.ticket_ms = 120_000;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    // A worker takes tickets once it has heard a coordinator; what it has done shows that it has.
    fleet.expect(&["maintain", "orders", "--task", "analyze", "--plan", "--wait"])?;
    let tickets = vhost.overhear(topology::JOBS, "worker.w1.urgent")?;
    let claims = vhost.overhear(topology::CLAIMS, topology::CLAIMS)?;
    // It sleeps for a moment that nobody notices: long enough for a ticket to be sent, and for its sender to die.
    fleet.worker("w1")?.signal(Signal::STOP)?;
    let job = fleet.order(&["backup", "orders"])?;
    tests::eventually("the ticket to be sent", SOON, || {
        Ok((!vhost.heard(&tickets)?.is_empty()).then_some(()))
    })?;
    fleet.coordinator()?.kill()?;
    fleet.worker("w1")?.signal(Signal::CONT)?;
    let claimed = tests::eventually("the worker to claim the ticket", SOON, || {
        Ok((!vhost.heard(&claims)?.is_empty()).then_some(()))
    });
    claimed.with_context(|| fleet.said())?;
    ensure!(fleet.backups()? == 0, "nothing runs without a grant");
    fleet.start_coordinator()?;
    let view = fleet.await_state(job, &["succeeded", "failed", "lost"], LATER)?;
    ensure!(view["state"] == "succeeded", "{view}\n{}", fleet.said());
    ensure!(view["attempts_used"] == 1, "it ran once: {view}");
    ensure!(fleet.backups()? == 1);
    cluster.is_left_alone().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_across_the_death_of_the_broker() -> anyhow::Result<()> {
    let mut rabbit = Rabbit::start()?;
    let (mut fleet, cluster) = fleet(&rabbit.url(), Place::Directory).await?;
    let setup = WorkerSetup::of("w1", "orders", cluster.url()).failing_at("stop_backup=pause");
    fleet.start_worker(&setup)?;
    let paused = fleet.order(&["backup", "orders"])?;
    fleet.await_step(paused, "stop_backup")?;
    rabbit.kill()?;
    rabbit.start_again()?;
    // The lease outlived the broker: the attempt still runs, and a cancel still reaches it.
    fleet.expect(&["job", "cancel", &paused.to_string()])?;
    let view = fleet.await_state(paused, &["cancelled", "succeeded", "failed", "lost"], LATER)?;
    ensure!(view["state"] == "cancelled", "{view}\n{}", fleet.said());
    ensure!(view["attempts_used"] == 1, "{view}");
    cluster.is_left_alone().await?;
    ensure!(fleet.backups()? == 0, "a cancelled backup is none");
    fleet.worker("w1")?.kill()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    ensure!(fleet.backups()? == 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_told_to_stop_hands_its_job_back() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let (mut fleet, cluster) = fleet(&vhost.url(), Place::Directory).await?;
    let setup = WorkerSetup::of("w1", "orders", cluster.url());
    fleet.start_worker(&setup.clone().failing_at("copy=pause"))?;
    let job = fleet.order(&["backup", "orders"])?;
    fleet.await_step(job, "copy")?;
    let granted = fleet.job(job)?["attempt"].clone();
    fleet.worker("w1")?.terminate()?;
    fleet.worker("w1")?.wait_for_line("Draining", SOON)?;
    fleet.worker("w1")?.terminate()?;
    tests::eventually("the worker to end", LATER, || {
        Ok(fleet.worker("w1")?.has_ended()?.then_some(()))
    })?;
    cluster.is_left_alone().await?;
    fleet.start_worker(&setup)?;
    let view = fleet.await_state(job, &["succeeded", "failed", "lost"], LATER)?;
    ensure!(view["state"] == "succeeded", "{view}\n{}", fleet.said());
    ensure!(view["attempt"] != granted, "another attempt did it: {view}");
    ensure!(view["attempts_used"] == 1, "one that was handed back does not count: {view}");
    Ok(())
}
