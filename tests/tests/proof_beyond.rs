//! Proofs that go beyond the end of their backup, along archived WAL, to a moment that is chosen or left to chance; and restores to one,
//! ordered over the queue.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::binaries::Binaries;
use postgres::instance::InstanceOptions;
use postgres::{Environment, Purpose, Target, connect};
use proto::JobId;
use serde_json::Value;
use tests::fleet::text;
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup, eventually, eventually_async, services};
use tokio_util::sync::CancellationToken;

/// A loaded machine archives a segment within that.
const LATER: Duration = Duration::from_mins(2);

fn orders(fleet: &Fleet) -> anyhow::Result<Value> {
    fleet.json(&["cluster", "show", "orders", "-o", "json"])
}

/// The newest proof of the newest backup.
fn proof(fleet: &Fleet) -> anyhow::Result<Value> {
    Ok(orders(fleet)?["backup"]["proof"]["record"].clone())
}

/// Commits a row, ends the segment it is in, and waits until that is archived. Gives its name, and a moment before the commit.
async fn archived_row(server: &Cluster) -> anyhow::Result<(String, String)> {
    let text =
        "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let before = server.text(text).await?;
    server.run("INSERT INTO public.parts VALUES (1)").await?;
    let segment = server.text("SELECT pg_walfile_name(pg_switch_wal())").await?;
    let archived =
        format!("SELECT count(*) FROM pg_stat_archiver WHERE last_archived_wal >= '{segment}'");
    eventually_async("the segment to be archived", LATER, async || {
        Ok((server.number(&archived).await? > 0).then_some(()))
    })
    .await?;
    Ok((segment, before))
}

/// A server that archives, and a coordinator.
async fn archiving(vhost: &Vhost) -> anyhow::Result<(Cluster, Fleet)> {
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
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let push = format!(
        "'{}' wal push \"%p\" --repository '{}' --key '{}' --cluster orders",
        services::pgmuster()?.display(),
        fleet.repository_url(),
        fleet.path("repository.key").display()
    );
    let push = push.replace('\'', "''");
    server.run(&format!("ALTER SYSTEM SET archive_command = '{push}'")).await?;
    server.run("SELECT pg_reload_conf()").await?;
    fleet.start_coordinator()?;
    Ok((server, fleet))
}

/// What a proof says that was refused, or failed.
fn refused(fleet: &Fleet, arguments: &[&str], what: &str) -> anyhow::Result<()> {
    let arguments = [&["verify", "orders", "--wait"], arguments].concat();
    let done = fleet.run(&arguments)?;
    let said = done.to_string();
    ensure!(done.code() != 0 && said.contains(what), "{arguments:?}: {said}\n{}", fleet.said());
    ensure!(fleet.sandboxes()?.is_empty(), "a sandbox is left");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proof_goes_to_a_moment_and_says_when_wal_does_not_lead_there() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let (server, mut fleet) = archiving(&vhost).await?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    let (damaged, _) = archived_row(&server).await?;
    let (_, moment) = archived_row(&server).await?;
    archived_row(&server).await?;

    // A moment that was chosen: what was committed before it is there, and nothing else.
    let told = fleet.expect(&["verify", "orders", "--to", &moment, "--level", "4", "--wait"])?;
    ensure!(told.contains("orders is PROVED (L4+PITR): restored and replayed to "), "{told}");
    let chosen = proof(&fleet)?;
    let evidence = chosen["recovery"]["evidence"].as_str().unwrap_or_default();
    ensure!(evidence.starts_with("recovery stopping before commit of transaction "), "{chosen}");
    let commit = chosen["recovery"]["last_commit"].as_str().context("it saw a commit")?;
    ensure!(commit < moment.as_str(), "{chosen}");
    let one = chosen["rows"].as_u64().context("rows were read")?;
    // All there is, which is two rows more. Now it is known how fast WAL is replayed.
    fleet.expect(&["verify", "orders", "--to", "latest", "--wait"])?;
    let latest = proof(&fleet)?;
    ensure!(latest["level_reached"] == "L4" && latest["rows"] == one + 2, "{latest}");
    ensure!(latest["recovery"]["last_commit"].as_str() > Some(moment.as_str()), "{latest}");
    let view = orders(&fleet)?;
    ensure!(view["state"] == "PROVED" && view["recovery_time"]["replay_ms"].is_u64(), "{view}");
    // Any moment.
    fleet.expect(&["verify", "orders", "--to", "random", "--wait"])?;
    let any = proof(&fleet)?;
    let target = any["recovery"]["target"].as_str().unwrap_or_default();
    ensure!(target.ends_with(", chosen by chance"), "{any}");
    ensure!((one - 1..=one + 2).contains(&any["rows"].as_u64().unwrap_or_default()), "{any}");

    // What cannot be reached is refused before anything is restored, and says nothing about the backup.
    refused(&fleet, &["--to", "F/0"], "RECOVERY_TARGET_UNREACHABLE")?;
    refused(&fleet, &["--to", "latest", "--level", "5"], "choose level 3 or 4")?;
    // Nor does a tablespace that replay would make where it always was.
    let space = tempfile::tempdir()?;
    let place = space.path().display();
    server.run(&format!("CREATE TABLESPACE shelf LOCATION '{place}'")).await?;
    server.run("DROP TABLESPACE shelf").await?;
    archived_row(&server).await?;
    refused(&fleet, &["--to", "latest"], "DATA_DIRECTORY_SHAPE")?;
    let left: Vec<_> = std::fs::read_dir(space.path())?.collect();
    ensure!(left.is_empty(), "the proof wrote outside its room: {left:?}");
    ensure!(orders(&fleet)?["state"] == "PROVED", "{}", orders(&fleet)?);

    // A segment that is damaged on the way does.
    let lineage = view["backup"]["facts"]["lineage"].as_str().context("a lineage")?;
    let object = format!("repository/lineages/{lineage}/wal/{}/{damaged}", &damaged[..8]);
    let object = fleet.path(&object);
    let mut bytes = std::fs::read(&object)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::remove_file(&object)?;
    std::fs::write(&object, bytes)?;
    refused(&fleet, &["--to", "latest"], "PROOF_FAILED")?;
    let view = orders(&fleet)?;
    ensure!(view["state"] == "BROKEN", "{view}");
    ensure!(view["recoverable_to_at_ms"].is_null(), "no other backup is proved: {view}");
    Ok(())
}

/// A worker that dies at a step of this job.
fn dies(
    fleet: &mut Fleet,
    setup: &WorkerSetup<'_>,
    at: &str,
    order: &[&str],
) -> anyhow::Result<JobId> {
    fleet.start_worker(&setup.clone().failing_at(format!("{at}=abort")))?;
    let job = fleet.order(order)?;
    let died = eventually(format!("the worker to die at {at}"), LATER, || {
        Ok(fleet.worker(setup.name)?.has_ended()?.then_some(()))
    });
    died.with_context(|| fleet.said())?;
    Ok(job)
}

/// What a recovery came to must be the moment, by the server's own words.
fn arrived(reached: &Value, moment: &str) -> anyhow::Result<()> {
    let evidence = reached["evidence"].as_str().unwrap_or_default();
    ensure!(evidence.starts_with("recovery stopping before commit of transaction "), "{reached}");
    let commit = reached["last_commit"].as_str().context("it saw a commit")?;
    ensure!(commit < moment, "{reached}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moment_that_is_ordered_is_reached_though_the_worker_dies_on_the_way()
-> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let (server, mut fleet) = archiving(&vhost).await?;
    let first = WorkerSetup::of("w1", "orders", server.url());
    fleet.start_worker(&first)?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    archived_row(&server).await?;
    let (_, moment) = archived_row(&server).await?;
    archived_row(&server).await?;
    fleet.worker("w1")?.kill()?;

    // It dies while the server stands at the moment. Another one, which has no cluster, does it again.
    let order = ["verify", "orders", "--to", &moment, "--level", "4"];
    let job = dies(&mut fleet, &first, "check", &order)?;
    let second = WorkerSetup { clusters: Vec::new(), ..WorkerSetup::of("w2", "", String::new()) };
    fleet.start_worker(&second)?;
    let view = fleet.await_state(job, &["succeeded", "failed", "lost"], LATER)?;
    ensure!(view["state"] == "succeeded" && view["attempts_used"] == 2, "{view}\n{}", fleet.said());
    let record = proof(&fleet)?;
    ensure!(record["worker"] == "w2", "{record}");
    arrived(&record["recovery"], &moment)?;
    fleet.worker("w2")?.kill()?;

    // A restore is bound to its host: its worker dies with it, comes back and goes on.
    let into = fleet.path("restore/moment");
    let order = [
        &["restore", "orders", "--on", "w1", "--into", text(&into)?, "--to", &moment][..],
        &["--start", "--port", "5433"],
    ]
    .concat();
    let job = dies(&mut fleet, &first, "restore", &order)?;
    fleet.start_worker(&first)?;
    let view = fleet.await_state(job, &["succeeded", "failed", "lost"], LATER)?;
    ensure!(view["state"] == "succeeded" && view["attempts_used"] == 2, "{view}\n{}", fleet.said());
    arrived(&view["outcome"]["restore"]["recovery"]["reached"], &moment)?;
    // Of the three rows that were added, the one before the moment.
    let there = Target::parse(&server.url().replace(":5432/", ":5433/"), &Environment::default())?;
    let purpose = Purpose {
        application_name: "story".to_owned(),
        read_only: true,
        statement_timeout: Duration::ZERO,
        lock_timeout: Duration::ZERO,
    };
    let session = connect(&there, &purpose).await?;
    let query = "SELECT count(*) FROM public.parts WHERE id = 1";
    let rows: i64 = session.one("look", query, &[]).await?.get(0);
    session.close().await;
    let binaries = Binaries::at(&services::postgres_bin(15)?).await?;
    let stop = binaries.program("pg_ctl")?.args(["stop", "-s", "-w", "-m", "immediate", "-D"]);
    stop.arg(&into).run(LATER, &CancellationToken::new()).await?;
    ensure!(rows == 2, "{rows} rows");
    ensure!(!into.join("pgmuster-restore-incomplete").exists());
    // What the dead left is gone, and nothing of theirs runs.
    ensure!(fleet.sandboxes()?.is_empty(), "{:?}", fleet.sandboxes()?);
    server.is_left_alone().await
}
