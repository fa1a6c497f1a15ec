//! Heartbeats: an idle server's recovery point moves on with its archive, a proof sees which of them a restored server has, and
//! what the archive has lost at its end shows.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use serde_json::Value;
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup, eventually, eventually_async};

/// A heartbeat comes every five seconds, and archives are looked at as often.
const LATER: Duration = Duration::from_mins(2);

fn orders(fleet: &Fleet) -> anyhow::Result<Value> {
    fleet.json(&["cluster", "show", "orders", "-o", "json"])
}

/// The newest proof of the newest backup.
fn proof(fleet: &Fleet) -> anyhow::Result<Value> {
    Ok(orders(fleet)?["backup"]["proof"]["record"].clone())
}

async fn set(server: &Cluster, name: &str, value: &str) -> anyhow::Result<()> {
    let value = value.replace('\'', "''");
    server.run(&format!("ALTER SYSTEM SET {name} = '{value}'")).await?;
    server.run("SELECT pg_reload_conf()").await
}

/// A server on which nobody works, archiving into its repository, and a fleet whose worker makes heartbeats in it.
async fn scene(major: u32, archive_timeout: &str) -> anyhow::Result<(Cluster, Fleet, Vhost)> {
    let settings = [
        ("archive_mode", "on"),
        ("archive_command", "false"),
        ("archive_timeout", archive_timeout),
        ("autovacuum", "off"),
    ];
    let server = Cluster::start(
        major,
        InstanceOptions {
            wal_segment_size_mb: Some(1),
            settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
            ..InstanceOptions::default()
        },
    )
    .await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let push = fleet.archive_command()?;
    set(&server, "archive_command", &push).await?;
    // The worker finds an archive when it looks first.
    server.run("SELECT pg_switch_wal()").await?;
    eventually_async("a segment to be archived", LATER, async || {
        let archived = server.number("SELECT archived_count FROM pg_stat_archiver").await?;
        Ok((archived > 0).then_some(()))
    })
    .await?;
    // The stories say themselves when a backup is taken.
    fleet.backup_behind_gaps = false;
    fleet.start_coordinator()?;
    let setup = WorkerSetup::of("w1", "orders", server.url());
    fleet.start_worker(&WorkerSetup { cluster_lines: "heartbeat_s = 5", ..setup })?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    Ok((server, fleet, vhost))
}

/// A moment by the server's clock: as a proof is told, and in milliseconds.
async fn moment(server: &Cluster) -> anyhow::Result<(String, i64)> {
    let text =
        "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let now_ms = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::int8";
    Ok((server.text(text).await?, server.number(now_ms).await?))
}

/// Waits for a heartbeat that was made after `since_ms`, and until the archive has it, however many come meanwhile.
fn await_archived(fleet: &Fleet, since_ms: i64) -> anyhow::Result<()> {
    let made_ms = eventually("a heartbeat", LATER, || {
        let made_ms = orders(fleet)?["heartbeat_at_ms"].as_i64();
        Ok(made_ms.filter(|at_ms| *at_ms > since_ms))
    })
    .with_context(|| fleet.said())?;
    eventually("an idle server's recovery point to move on", LATER, || {
        let safe_ms = orders(fleet)?["unproved_to_at_ms"].as_i64().unwrap_or_default();
        // It committed within that second.
        Ok((safe_ms > made_ms + 1_000).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(fleet), fleet.said()))
}

/// Stops archiving, waits until everybody knows how far it came, takes the last two segments out of the archive, and waits until
/// that is seen. Gives where they were, and what they are.
async fn lose_the_end(server: &Cluster, fleet: &Fleet) -> anyhow::Result<Vec<(PathBuf, Vec<u8>)>> {
    let (since, _) = moment(server).await?;
    set(server, "archive_command", "false").await?;
    eventually_async("the archive to stand still", LATER, async || {
        let sql = format!(
            "SELECT COALESCE(max(last_failed_wal), '') FROM pg_stat_archiver WHERE last_failed_time > '{since}'"
        );
        let failed = server.text(&sql).await?;
        Ok((orders(fleet)?["wal"]["waiting"]["segment"] == failed).then_some(()))
    })
    .await
    .with_context(|| fleet.said())?;
    let lineages = fleet.path("repository/lineages");
    let lineage = std::fs::read_dir(lineages)?.next().context("a lineage")??;
    let files = std::fs::read_dir(lineage.path().join("wal/00000001"))?;
    let files = files.map(|file| Ok(file?.path())).collect::<anyhow::Result<Vec<PathBuf>>>()?;
    let is_segment = |path: &PathBuf| path.file_name().is_some_and(|name| name.len() == 24);
    let mut segments: Vec<PathBuf> = files.into_iter().filter(is_segment).collect();
    segments.sort();
    let mut lost = Vec::new();
    for segment in segments.into_iter().rev().take(2) {
        let content = std::fs::read(&segment)?;
        std::fs::remove_file(&segment)?;
        lost.push((segment, content));
    }
    let first =
        lost.last().and_then(|(path, _)| path.file_name()?.to_str()).context("a segment")?;
    eventually("the loss to be seen", LATER, || {
        Ok((orders(fleet)?["wal"]["waiting"]["segment"] == first).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(fleet), fleet.said()))?;
    Ok(lost)
}

/// What the archive has lost at its end is missing in the latest moment: nothing else shows it. It is held against the archive, not
/// against the backup, until it is there again.
async fn what_is_lost_is_missed(server: &Cluster, fleet: &Fleet) -> anyhow::Result<()> {
    let to_latest = ["verify", "orders", "--to", "latest", "--level", "3", "--wait"];
    fleet.expect(&to_latest)?;
    let latest = proof(fleet)?;
    ensure!(latest["heartbeat_at_ms"].is_i64(), "{latest}");
    // However often the archive is looked at before the proof is made: it was seen to have had more.
    let lost = lose_the_end(server, fleet).await?;
    let done = fleet.run(&to_latest)?;
    let said = done.to_string();
    ensure!(done.code() != 0 && said.contains("PROOF_FAILED"), "{said}\n{}", fleet.said());
    ensure!(said.contains("heartbeat failed") && said.contains("is missing"), "{said}");
    let view = orders(fleet)?;
    ensure!(view["state"] == "BROKEN" && view["broken_wal"][0]["from"].is_string(), "{view}");
    fleet.expect(&["verify", "orders", "--level", "3", "--wait"])?;
    ensure!(orders(fleet)?["state"] == "BROKEN", "the backup alone was never in doubt");
    for (segment, content) in lost {
        std::fs::write(segment, content)?;
    }
    fleet.expect(&to_latest)?;
    let view = orders(fleet)?;
    ensure!(view["broken_wal"].is_null(), "{view}");
    ensure!(fleet.sandboxes()?.is_empty(), "a sandbox is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_server_can_be_recovered_to_any_time_and_its_end_is_known() -> anyhow::Result<()> {
    let (server, fleet, _vhost) = scene(18, "1s").await?;
    let (time, time_ms) = moment(&server).await?;
    // Nobody commits anything, and yet there is a commit behind that time.
    await_archived(&fleet, time_ms)?;
    let told = fleet.expect(&["verify", "orders", "--to", &time, "--level", "3", "--wait"])?;
    ensure!(told.contains("; heartbeat of ") && told.contains(" seen"), "{told}");
    let record = proof(&fleet)?;
    let seen_ms = record["heartbeat_at_ms"].as_i64().context("a heartbeat was seen")?;
    ensure!((time_ms - 60_000..=time_ms).contains(&seen_ms), "{record}");
    let evidence = record["recovery"]["evidence"].as_str().unwrap_or_default();
    ensure!(evidence.starts_with("recovery stopping before commit of transaction "), "{record}");
    let checks = record["checks"].as_array().cloned().unwrap_or_default();
    let check = checks.iter().find(|check| check["name"] == "heartbeat").context("a check")?;
    ensure!(check["outcome"] == "passed" && check["level"] == "L3", "{check}");
    ensure!(check["detail"].as_str().unwrap_or_default().contains("is there, the "), "{check}");
    what_is_lost_is_missed(&server, &fleet).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_heartbeat_that_would_never_be_archived_is_not_made_and_stops_nothing()
-> anyhow::Result<()> {
    let (server, fleet, _vhost) = scene(15, "0").await?;
    let told = eventually("the missing heartbeat to be told", LATER, || {
        let heartbeats = &orders(&fleet)?["heartbeats"];
        let problem = heartbeats["problem"]["message"].as_str();
        ensure!(heartbeats["every_s"] == 5, "{heartbeats}");
        Ok(problem.map(str::to_owned))
    })?;
    ensure!(told.contains("archive_timeout of orders is 0"), "{told}");
    ensure!(orders(&fleet)?["heartbeat_at_ms"].is_null(), "{}", orders(&fleet)?);
    let shown = fleet.expect(&["cluster", "show", "orders"])?;
    ensure!(shown.contains("heartbeat    not made: SERVER_SETTING"), "{shown}");
    let doctor = fleet.run(&["doctor"])?.to_string();
    ensure!(doctor.contains("heartbeats of orders"), "{doctor}");
    fleet.expect(&["backup", "orders", "--wait"])?;

    set(&server, "archive_timeout", "1s").await?;
    let (_, cured_ms) = moment(&server).await?;
    eventually("heartbeats to be made again", LATER, || {
        let view = orders(&fleet)?;
        let is_made = view["heartbeat_at_ms"].as_i64() >= Some(cured_ms);
        Ok((is_made && view["heartbeats"]["problem"].is_null()).then_some(()))
    })
    .with_context(|| fleet.said())?;
    await_archived(&fleet, cured_ms)?;
    what_is_lost_is_missed(&server, &fleet).await
}
