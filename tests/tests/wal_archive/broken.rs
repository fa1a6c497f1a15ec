//! A backup that is taken while the archive takes nothing: it needs none of it, and its cluster is told all the same.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup, eventually};

use super::options;

/// What waits for the archive is late after half a minute.
const LATER: Duration = Duration::from_mins(2);

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_restores_to_its_end_alone_while_its_archive_takes_nothing() -> anyhow::Result<()>
{
    let settings = [("archive_mode", "on"), ("archive_command", "false")];
    let server = Cluster::start(15, options(&settings, Some(1))).await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    server.run("INSERT INTO public.items VALUES (-1, 'the last')").await?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    server.run("SELECT pg_switch_wal()").await?;

    // Nothing was archived, and the copy reaches the end of its backup with every row.
    let archived = "SELECT archived_count FROM pg_stat_archiver";
    ensure!(server.number(archived).await? == 0, "something was archived");
    for lineage in std::fs::read_dir(fleet.path("repository/lineages"))? {
        let wal = lineage?.path().join("wal");
        ensure!(!wal.exists(), "{} is there", wal.display());
    }
    let proved = fleet.expect(&["verify", "orders", "--level", "5", "--wait"])?;
    ensure!(proved.contains("orders is PROVED (L5)"), "{proved}");

    // It is no more than that: what is committed since is lost with the server.
    let reason = eventually("the archive to be told", LATER, || {
        let orders = fleet.json(&["cluster", "show", "orders", "-o", "json"])?;
        let reason = orders["reason"].as_str().unwrap_or_default().to_owned();
        Ok((orders["state"] == "AT_RISK").then_some(reason))
    })
    .with_context(|| fleet.said())?;
    ensure!(reason.starts_with("its WAL is not archived: its server keeps "), "{reason}");
    let status = fleet.run(&["status"])?;
    ensure!(status.code() == 3 && status.stdout.contains("is not archived"), "{status}");
    Ok(())
}
