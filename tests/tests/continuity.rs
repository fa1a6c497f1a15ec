//! Up to when a cluster can be recovered, as `status` says it: never more than the archive really has, also when the server
//! is told that everything is archived.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use serde_json::Value;
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup, eventually, eventually_async, services};

/// Archives are looked at every few seconds, and judged after half a minute.
const LATER: Duration = Duration::from_mins(2);
/// Within that of the moment when it is full, a segment that is missing is told: it is promised.
const PROMISED: Duration = Duration::from_mins(1);

/// By the server's clock, which is this machine's.
async fn now_ms(server: &Cluster) -> anyhow::Result<i64> {
    server.number("SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8").await
}

fn orders(fleet: &Fleet) -> anyhow::Result<Value> {
    fleet.json(&["cluster", "show", "orders", "-o", "json"])
}

fn recoverable_to(fleet: &Fleet) -> anyhow::Result<i64> {
    orders(fleet)?["recoverable_to_at_ms"].as_i64().context("it can be recovered to some moment")
}

/// Commits something, and says by when it was committed.
async fn commit(server: &Cluster) -> anyhow::Result<i64> {
    server.run("INSERT INTO public.parts VALUES (1)").await?;
    now_ms(server).await
}

async fn archives_by(server: &Cluster, command: &str) -> anyhow::Result<()> {
    let command = command.replace('\'', "''");
    server.run(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await?;
    server.run("SELECT pg_reload_conf()").await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_recoverable_is_what_is_archived_and_an_archive_that_lies_is_found_out()
-> anyhow::Result<()> {
    let settings = [("archive_mode", "on"), ("archive_command", "false"), ("autovacuum", "off")];
    let server = Cluster::start(
        15,
        InstanceOptions {
            wal_segment_size_mb: Some(1),
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            ..InstanceOptions::default()
        },
    )
    .await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let push = format!(
        "'{}' wal push \"%p\" --new --repository '{}' --key '{}' --cluster orders",
        services::pgmuster()?.display(),
        fleet.repository_url(),
        fleet.path("repository.key").display()
    );
    let lies = fleet.path("lies");
    archives_by(&server, &format!("test -e '{}' || {push}", lies.display())).await?;
    server.run("SELECT pg_switch_wal()").await?;
    eventually_async("the first segment to be archived", LATER, async || {
        let archived = "SELECT archived_count FROM pg_stat_archiver";
        Ok((server.number(archived).await? > 0).then_some(()))
    })
    .await?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    let unproved = orders(&fleet)?;
    ensure!(unproved["recoverable_to_at_ms"].is_null(), "nobody restored it: {unproved}");
    ensure!(unproved["unproved_to_at_ms"].is_i64(), "{unproved}");
    fleet.expect(&["verify", "orders", "--level", "3", "--wait"])?;
    let of_backup = recoverable_to(&fleet)?;

    // What is archived is recoverable; what is committed and not archived never seems to be.
    let safe = commit(&server).await?;
    ensure!(of_backup < safe && recoverable_to(&fleet)? < safe);
    server.run("SELECT pg_switch_wal()").await?;
    eventually("what is archived to be recoverable", LATER, || {
        Ok((recoverable_to(&fleet)? >= safe).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))?;
    // Nothing commits, and so nothing grows old.
    let idle = now_ms(&server).await?;
    eventually("an idle server to lose nothing", LATER, || {
        Ok((recoverable_to(&fleet)? >= idle).then_some(()))
    })?;
    // It was committed by then: whoever looked at the server just before saw less.
    let lost = commit(&server).await?;

    // The server believes that all is well.
    std::fs::write(&lies, "")?;
    server.run("SELECT pg_switch_wal()").await?;
    let told = eventually("an archive that lies to be found out", PROMISED, || {
        ensure!(recoverable_to(&fleet)? <= lost, "what is lost seems to be safe");
        let orders = orders(&fleet)?;
        Ok((orders["state"] == "AT_RISK").then_some(orders))
    })
    .with_context(|| fleet.said())?;
    let reason = told["reason"].as_str().unwrap_or_default();
    ensure!(reason.contains("does not reach the archive: 1 full segment is missing"), "{reason}");
    let segment = told["wal"]["waiting"]["segment"].as_str().context("a segment")?.to_owned();
    ensure!(reason.contains(&segment), "{reason}");
    let status = fleet.run(&["status"])?;
    ensure!(status.code() == 3 && status.stdout.contains("orders is AT_RISK"), "{status}");
    ensure!(fleet.metric("pgmuster_wal_waiting_segments{cluster=\"orders\"}")? >= 1.0);

    // What comes now is archived behind a gap: only another backup leads on. It goes through the worker.
    let backups = fleet.backups()?;
    let socket = fleet.path("w1").join("wal.sock");
    let push = format!(
        "'{}' wal push \"%p\" --socket '{}' --cluster orders",
        services::pgmuster()?.display(),
        socket.display()
    );
    archives_by(&server, &push).await?;
    std::fs::remove_file(&lies)?;
    commit(&server).await?;
    server.run("SELECT pg_switch_wal()").await?;
    let told = eventually("the gap to be told", LATER, || {
        ensure!(recoverable_to(&fleet)? <= lost, "what is lost seems to be safe");
        let reason = orders(&fleet)?["reason"].as_str().unwrap_or_default().to_owned();
        Ok(reason.contains("take another backup").then_some(reason))
    })
    .with_context(|| fleet.said())?;
    // Of the segments that are missing, the last one is named: from behind it on there is a line again.
    ensure!(told.contains("is missing in its archive"), "{told}");
    // Nobody has to order it.
    eventually("a backup behind the gap", LATER, || Ok((fleet.backups()? > backups).then_some(())))
        .with_context(|| fleet.said())?;
    let safe = commit(&server).await?;
    server.run("SELECT pg_switch_wal()").await?;
    eventually("the gap to be closed", LATER, || {
        let orders = orders(&fleet)?;
        let point = orders["recoverable_to_at_ms"].as_i64().unwrap_or_default();
        Ok((orders["state"] == "TAKEN" && point >= safe).then_some(()))
    })
    .with_context(|| fleet.said())
}
