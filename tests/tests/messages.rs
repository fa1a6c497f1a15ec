//! What travels over RabbitMQ may come twice, late, altered, from somebody else, or not at all: nothing runs twice, nothing
//! is believed that is not signed, and nothing is forgotten.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use proto::envelope::SigningKey;
use proto::message::{Cancel, Control, SCHEMA, Ticket};
use proto::{AttemptId, JobId, JobKind, Lane, topology};
use serde_json::{Value, json};
use tests::{Cluster, Fleet, Place, SOON, Vhost, WorkerSetup, eventually};

const LATER: Duration = Duration::from_mins(2);

/// Waits until the worker has logged so many lines with this text.
fn logged(fleet: &mut Fleet, part: &str, times: usize) -> anyhow::Result<()> {
    let worker = fleet.worker("w1")?;
    eventually(format!("{times} lines with {part:?}"), SOON, || {
        let seen = worker.count_lines(part);
        ensure!(seen <= times, "{seen} lines");
        Ok((seen == times).then_some(()))
    })
    .with_context(|| fleet.said())
}

/// Waits until the coordinator has refused one message of this queue.
fn refused(fleet: &Fleet, queue: &str) -> anyhow::Result<()> {
    let name = format!("pgmuster_messages_refused_total{{queue=\"{queue}\"}}");
    eventually(format!("{name} to be 1"), SOON, || Ok((fleet.metric(&name)? > 0.5).then_some(())))?;
    let seen = fleet.metric(&name)?;
    ensure!((seen - 1.0).abs() < 0.5, "{seen} were refused");
    Ok(())
}

fn containing<'a>(messages: &'a [String], part: &str) -> anyhow::Result<&'a String> {
    let found = messages.iter().find(|message| message.contains(part));
    found.with_context(|| format!("none of {} messages has {part}", messages.len()))
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_that_are_forged_altered_late_or_repeated_change_nothing() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let mut setup = WorkerSetup::of("w1", "orders", cluster.url());
    setup.environment.push(("PGMUSTER_LOG", "info,worker=debug".to_owned()));
    fleet.start_worker(&setup)?;
    let control = vhost.overhear(topology::CONTROL, "w1")?;
    let claims = vhost.overhear(topology::CLAIMS, topology::CLAIMS)?;
    let reports = vhost.overhear(topology::REPORTS, topology::REPORTS)?;
    cluster.holds_checkpoints_up().await?;
    let job = fleet.order(&["backup", "orders", "--spread-checkpoint"])?;
    fleet.await_step(job, "start_backup")?;
    let running = fleet.job(job)?;
    let attempt: AttemptId = running["attempt"].as_str().context("it has an attempt")?.parse()?;

    // Tickets are unsigned: anybody's earns a denial and nothing else. Its own, twice, long after its time; and one that
    // the coordinator never wrote.
    let again = Ticket {
        schema: SCHEMA,
        job,
        attempt,
        kind: JobKind::Backup,
        lane: Lane::Urgent,
        cluster: "orders".parse()?,
        not_after_ms: 0,
    };
    let forged = Ticket {
        job: JobId::mint(1, [7; 10]),
        attempt: AttemptId::mint(1, [7; 10]),
        ..again.clone()
    };
    for ticket in [&again, &again, &forged] {
        let body = serde_json::to_string(ticket)?;
        vhost.publish(topology::JOBS, "worker.w1.urgent", "ticket", &body)?;
    }
    logged(&mut fleet, "A claim was denied", 3)?;
    logged(&mut fleet, "reason=Taken", 2)?;
    logged(&mut fleet, "reason=Unknown", 1)?;
    vhost.publish(topology::JOBS, "worker.w1.urgent", "ticket", "{}")?;
    logged(&mut fleet, "is no ticket", 1)?;

    // The grant once more, as it was: the worker has seen it. Altered, or a cancel by another's key: not believed.
    let said = vhost.heard(&control)?;
    let grant = containing(&said, r#"{\"grant\":"#)?;
    vhost.publish(topology::CONTROL, "w1", "control", grant)?;
    let altered = grant.replace(r#"\"fast_checkpoint\":false"#, r#"\"fast_checkpoint\":true"#);
    ensure!(altered != *grant, "the altered grant is another: {grant}");
    vhost.publish(topology::CONTROL, "w1", "control", &altered)?;
    let signed: Value = serde_json::from_str(grant)?;
    let content: Control = serde_json::from_str(signed["payload"].as_str().context("a payload")?)?;
    let Control::Grant(granted) = content else { anyhow::bail!("it is no grant: {signed}") };
    let cancel = Control::Cancel(Cancel { schema: SCHEMA, attempt, token: granted.token });
    let cancel = serde_json::to_string(&SigningKey::from_seed(&[9; 32]).sign(&cancel))?;
    vhost.publish(topology::CONTROL, "w1", "control", &cancel)?;
    logged(&mut fleet, "A control message was not believed", 2)?;

    // A claim in another's name.
    let claim = vhost.heard(&claims)?.first().context("a claim was sent")?.clone();
    let altered = claim.replace(r#"\"worker\":\"w1\""#, r#"\"worker\":\"w2\""#);
    ensure!(altered != claim, "the altered claim is another: {claim}");
    for body in [&claim, &altered] {
        vhost.publish(topology::CLAIMS, topology::CLAIMS, "claim", body)?;
    }
    refused(&fleet, topology::CLAIMS)?;

    cluster.run("CHECKPOINT").await?;
    let done = fleet.await_state(job, &["succeeded", "failed", "lost", "cancelled"], LATER)?;
    ensure!(done["state"] == "succeeded", "{done}\n{}", fleet.said());
    ensure!(done["attempts_used"] == 1 && done["attempt"] == running["attempt"], "{done}");

    // Every report once more, and its last one altered. They are read in order: when the altered one has been refused,
    // the others have been looked at too.
    let told = vhost.heard(&reports)?;
    let last = containing(&told, r#"{\"succeeded\":"#)?;
    let altered = last.replace(r#"\"size_bytes\":"#, r#"\"size_bytes\":1"#);
    ensure!(altered != *last, "the altered report is another: {last}");
    for body in told.iter().chain([&altered]) {
        vhost.publish(topology::REPORTS, topology::REPORTS, "report", body)?;
    }
    refused(&fleet, topology::REPORTS)?;
    let after = fleet.job(job)?;
    ensure!(after == done, "nothing changed:\n{done}\n{after}");
    // What was refused lies nowhere unseen: no ticket, a claim, a report.
    eventually("three dead letters to be counted", SOON, || {
        Ok((fleet.metric("pgmuster_queue_dead_lettered_total")? > 2.5).then_some(()))
    })?;
    ensure!(fleet.backups()? == 1, "nothing ran twice");
    cluster.is_left_alone().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_that_is_sent_twice_is_one_job() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    let order = |key: &str, cluster: &str| -> anyhow::Result<(u16, Value)> {
        let body = json!({"cluster": cluster, "task": {"backup": {}}}).to_string();
        let (status, body) = fleet.http("POST", "/v1/jobs", &[("idempotency-key", key)], &body)?;
        Ok((status, serde_json::from_str(&body)?))
    };
    let (status, first) = order("night-1", "orders")?;
    ensure!(status == 201, "{status}: {first}");
    let (status, second) = order("night-1", "orders")?;
    ensure!(status == 200 && second["id"] == first["id"], "{status}: {second}");
    let job: JobId = first["id"].as_str().context("it has an id")?.parse()?;
    let done = fleet.await_state(job, &["succeeded", "failed"], LATER)?;
    ensure!(done["state"] == "succeeded", "{done}\n{}", fleet.said());
    let (status, third) = order("night-1", "orders")?;
    ensure!(status == 200 && third["state"] == "succeeded", "also when it is over: {third}");
    let (status, other) = order("night-1", "billing")?;
    ensure!(status == 409 && other["code"] == "STATE_CONFLICT", "another order: {status} {other}");
    let (status, next) = order("night-2", "orders")?;
    ensure!(status == 201 && next["id"] != first["id"], "another night: {status} {next}");
    let job: JobId = next["id"].as_str().context("it has an id")?.parse()?;
    fleet.await_state(job, &["succeeded"], LATER)?;
    ensure!(fleet.backups()? == 2, "each ran once");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ticket_that_went_with_its_queue_is_sent_again() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let setup = WorkerSetup::of("w1", "orders", cluster.url());
    fleet.start_worker(&setup)?;
    let queue = "pgmuster.jobs.worker.w1.urgent";
    let tickets = vhost.overhear(topology::JOBS, "worker.w1.urgent")?;
    // Nobody has missed the worker yet when the ticket is sent.
    fleet.worker("w1")?.kill()?;
    let job = fleet.order(&["backup", "orders"])?;
    eventually("the ticket to be sent", SOON, || {
        Ok((!vhost.heard(&tickets)?.is_empty()).then_some(()))
    })?;
    // Ten minutes of an absent worker, in half a second.
    let policy = format!("policies/{}/short", vhost.name());
    let short = json!({"pattern": "^pgmuster\\.jobs\\.worker\\.", "definition": {"expires": 500},
        "apply-to": "queues"});
    vhost.management().put(&policy, &short)?;
    eventually("the queue to expire", SOON, || Ok(vhost.depth(queue)?.is_none().then_some(())))?;
    vhost.management().delete(&policy)?;
    // What is left of the ticket would be sent to nobody: the job says so.
    eventually("the job to say what it waits for", SOON, || {
        let view = fleet.job(job)?;
        let reason = view["reason"].as_str().unwrap_or_default();
        ensure!(view["state"] == "waiting" && reason.contains("w1"), "{view}");
        Ok(Some(()))
    })
    .with_context(|| fleet.said())?;
    fleet.start_worker(&setup)?;
    let view = fleet.await_state(job, &["succeeded", "failed", "lost", "missed"], LATER)?;
    ensure!(view["state"] == "succeeded", "{view}\n{}", fleet.said());
    ensure!(view["attempts_used"] == 1, "{view}");
    ensure!(fleet.backups()? == 1);
    Ok(())
}
