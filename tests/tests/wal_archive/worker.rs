//! One worker for two clusters, each with a repository of its own: one socket, and nothing of the one comes to the other.

use anyhow::{Context as _, ensure};
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup};

use super::{Archive, NOT_KNOWN, SOON, command, eventually_async, options, run};

async fn archiving(socket: &str, cluster: &str) -> anyhow::Result<Cluster> {
    let whose = ["--socket", socket, "--cluster", cluster].map(str::to_owned);
    let push = command(&["push", "%p"], &whose)?;
    let settings = [("archive_mode", "on"), ("archive_command", push.as_str())];
    Cluster::start(15, options(&settings, Some(1))).await
}

/// Ends a segment, and waits until the server has it archived.
async fn archived(server: &Cluster) -> anyhow::Result<String> {
    server.run("INSERT INTO public.items VALUES (-1, 'more') ON CONFLICT DO NOTHING").await?;
    server.run("SELECT pg_create_restore_point('more')").await?;
    let name = server.text("SELECT pg_walfile_name(pg_switch_wal())").await?;
    let done = format!("SELECT count(*) FROM pg_stat_archiver WHERE last_archived_wal >= '{name}'");
    let is_done = async || Ok((server.number(&done).await? > 0).then_some(()));
    eventually_async(&format!("{name} to be archived"), SOON, is_done).await?;
    Ok(name)
}

#[tokio::test(flavor = "multi_thread")]
async fn two_clusters_with_a_repository_each_archive_through_one_worker() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let socket = fleet.path("w1/wal.sock").display().to_string();
    let other = Archive::create()?;
    // They start while nobody answers, and keep what they write.
    let orders = archiving(&socket, "orders").await?;
    let billing = archiving(&socket, "billing").await?;
    let lines = format!(
        "[[repositories]]\nname = \"other\"\nurl = \"{}\"\nkey = \"file:{}\"\n\
         [[clusters]]\nname = \"billing\"\nconnection = \"{}\"\nrepository = \"other\"\n",
        other.url(),
        other.key(),
        billing.url()
    );
    fleet.start_coordinator()?;
    let setup = WorkerSetup::of("w1", "orders", orders.url());
    fleet.start_worker(&WorkerSetup { lines: &lines, ..setup })?;
    let (mut name, mut same) = (archived(&orders).await?, archived(&billing).await?);
    // Both have files of these names, whatever each of them wrote before.
    while name != same {
        if name < same {
            name = archived(&orders).await?;
        } else {
            same = archived(&billing).await?;
        }
    }

    let key = std::fs::read_to_string(fleet.path("repository.key"))?.parse()?;
    let store = repository::store::directory::DirectoryStore::new(fleet.path("repository"));
    let main = repository::Repository::open(std::sync::Arc::new(store), Some(&key)).await?;
    let file = name.parse().context("the name of a segment")?;
    for (repository, cluster, server) in
        [(main, "orders", &orders), (other.open().await?, "billing", &billing)]
    {
        let lineages = repository.list_lineages().await?;
        let clusters: Vec<&str> = lineages.iter().map(|one| one.cluster.as_str()).collect();
        ensure!(clusters == [cluster], "{clusters:?}");
        let id = server.text("SELECT system_identifier::text FROM pg_control_system()").await?;
        ensure!(lineages[0].system_identifier.to_string() == id, "{lineages:?}");
        let archive = repository.list_wal(lineages[0].lineage).await?;
        ensure!(archive.gaps().is_empty() && archive.conflicts.is_empty(), "{archive:?}");
        let stored = repository.fetch_wal(lineages[0].lineage, &file).await?;
        let stored = stored.with_context(|| format!("{name} is in the archive of {cluster}"))?;
        // The server's own copy may have been recycled, the service gives what is in this cluster's archive.
        let place = tempfile::tempdir()?;
        let words = ["wal", "get", &name, "segment", "--socket", &socket, "--cluster", cluster];
        let got = run(place.path(), words.map(str::to_owned).into_iter())?;
        ensure!(got.code() == 0, "{got}\n{}", fleet.said());
        ensure!(std::fs::read(place.path().join("segment"))? == stored, "of another cluster");
    }
    // Under the other one's name a server is refused, and a lineage alone does not say in which repository it is.
    let data = orders.server.data_directory();
    let wrong =
        ["wal", "push", &format!("pg_wal/{name}"), "--socket", &socket, "--cluster", "billing"];
    let refused = run(&data, wrong.map(str::to_owned).into_iter())?;
    ensure!(
        refused.code() != 0 && refused.stderr.contains("SYSTEM_IDENTIFIER_MISMATCH"),
        "{refused}"
    );
    let lineage = other.lineage().await?.to_string();
    let words = ["wal", "get", &name, "x", "--socket", &socket, "--lineage", &lineage];
    let unclear = run(&data, words.map(str::to_owned).into_iter())?;
    ensure!(
        unclear.code() == NOT_KNOWN && unclear.stderr.contains("several repositories"),
        "{unclear}"
    );
    Ok(())
}
