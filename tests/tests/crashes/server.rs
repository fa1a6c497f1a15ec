//! The server goes, or the backup's session on it: the attempt is lost with it, and the job goes where the name leads then.

use std::os::unix::fs::symlink;

use anyhow::ensure;
use postgres::instance::InstanceOptions;
use proto::JobId;
use serde_json::Value;
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup, eventually_async};

use super::LATER;

/// Orders a backup whose worker waits at the beginning of a step until `go` is there.
fn held_at(fleet: &mut Fleet, url: &str, step: &str, go: &str) -> anyhow::Result<JobId> {
    let held = format!("{step}=hold:{}", fleet.path(go).display());
    fleet.start_worker(&WorkerSetup::of("w1", "orders", url.to_owned()).failing_at(held))?;
    let job = fleet.order(&["backup", "orders"])?;
    fleet.await_step(job, step)?;
    Ok(job)
}

/// Lets it go on. Its first attempt fails for its session and commits nothing, its second one succeeds.
fn second_succeeds(fleet: &Fleet, job: JobId, go: &str) -> anyhow::Result<Value> {
    let before = fleet.backups()?;
    std::fs::write(fleet.path(go), "")?;
    let view = fleet.await_state(job, &["succeeded", "failed", "lost"], LATER)?;
    let said = || format!("{view}\n{}", fleet.said());
    ensure!(view["state"] == "succeeded" && view["attempts_used"] == 2, "{}", said());
    let trace = fleet.json(&["job", "trace", &job.to_string(), "-o", "json"])?;
    let code = &trace["attempts"][0]["failure"]["code"];
    ensure!(code == "BACKUP_SESSION_LOST", "{trace}");
    ensure!(fleet.backups()? == before + 1, "{}", said());
    Ok(view)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_whose_session_or_server_is_lost_is_made_where_the_name_leads()
-> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let mut primary = Cluster::start(15, InstanceOptions::default()).await?;
    let standby = primary.standby().await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    // A name for whichever server is the primary, as a resolver would have it.
    let name = fleet.path("name");
    symlink(primary.server.socket_directory(), &name)?;
    let url = format!("postgres://postgres@/postgres?host={}", name.display());

    // The session ends exactly when backup mode shall, and the server goes on.
    let job = held_at(&mut fleet, &url, "stop_backup", "stop")?;
    let ours = "application_name LIKE 'pgmuster/%'";
    let end = format!("SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE {ours}");
    ensure!(primary.number(&end).await? > 0, "the backup has a session");
    second_succeeds(&fleet, job, "stop")?;
    primary.is_left_alone().await?;
    fleet.worker("w1")?.kill()?;

    // The primary dies while it is copied. What it had committed is on its standby, which takes over.
    let job = held_at(&mut fleet, &url, "copy", "copy")?;
    primary.run("INSERT INTO public.items VALUES (-1, 'the last one')").await?;
    let last = "SELECT count(*) FROM public.items WHERE id = -1";
    eventually_async("the standby to have the last row", LATER, async || {
        Ok((standby.number(last).await? == 1).then_some(()))
    })
    .await?;
    primary.server.kill9();
    standby.run("SELECT pg_promote(true, 60)").await?;
    std::fs::remove_file(&name)?;
    symlink(standby.server.socket_directory(), &name)?;
    let view = second_succeeds(&fleet, job, "copy")?;
    ensure!(view["outcome"]["backup"]["timeline"] == 2, "{view}");
    standby.is_left_alone().await?;

    fleet.expect(&["verify", "orders", "--level", "5", "--wait"])?;
    let orders = fleet.json(&["cluster", "show", "orders", "-o", "json"])?;
    let (facts, proof) = (&orders["backup"]["facts"], &orders["backup"]["proof"]["record"]);
    ensure!(orders["state"] == "PROVED" && facts["timeline"] == 2, "{orders}");
    // The row of the dead primary's last moment among them.
    ensure!(proof["passed"] == true && proof["rows"] == 5000 + 1000 + 1, "{orders}");
    Ok(())
}
