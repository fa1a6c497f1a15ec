//! The same archive through a service that works ahead, and that may die at any moment.

use anyhow::ensure;
use postgres::instance::StopMode;
use proto::Timeline;
use tests::Pgmuster;

use super::{
    Archive, NOT_KNOWN, ROWS, SOON, command, copy, execute, make, number, opens, options, recover,
    work,
};

impl Archive {
    fn socket(&self) -> String {
        self.place.path().join("wal.sock").display().to_string()
    }

    fn serve(&self) -> anyhow::Result<Pgmuster> {
        let (url, key) = (self.url(), self.key());
        let words = ["wal", "serve", &self.socket(), "--repository", &url, "--key", &key];
        let mut service = Pgmuster::start(&words)?;
        service.wait_for_line("Answers at", SOON)?;
        Ok(service)
    }

    /// How a server's command reaches the service, or does without it.
    fn through_service(&self, cluster: &str) -> Vec<String> {
        [vec!["--socket".to_owned(), self.socket()], self.of(cluster)].concat()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_archives_and_recovers_through_a_service_that_dies_and_comes_back()
-> anyhow::Result<()> {
    let (place, archive) = (tempfile::tempdir()?, Archive::create()?);
    let mut service = archive.serve()?;
    let through = archive.through_service("orders");
    let push = command(&["push", "%p", "--new"], &through)?;
    let settings = [("archive_mode", "on"), ("archive_command", push.as_str())];
    let mut primary = make(15, &place.path().join("primary"), options(&settings, Some(1))).await?;
    primary.start().await?;
    execute(&primary, &["CREATE TABLE t (n int, pad text)"]).await?;
    primary.stop(StopMode::Fast).await?;
    copy(&primary.data_directory(), &place.path().join("base"))?;
    primary.start().await?;
    // In the middle of a backlog, so that segments are on their way.
    work(&primary, 20).await?;
    service.kill()?;
    work(&primary, 10).await?;
    let service = archive.serve()?;
    work(&primary, 20).await?;
    let rows = number(&primary, ROWS).await?;
    primary.stop(StopMode::Fast).await?;
    let inventory = archive.inventory().await?;
    ensure!(inventory.gaps().is_empty() && inventory.damaged.is_empty(), "{inventory:?}");
    ensure!(inventory.conflicts.is_empty(), "{inventory:?}");
    ensure!(inventory.timelines[&Timeline(1)].runs.len() == 1, "{inventory:?}");

    let mut restored = make(15, &place.path().join("restored"), options(&[], Some(1))).await?;
    let get = command(&["get", "%f", "%p"], &through)?;
    let settings =
        [("restore_command", get.as_str()), ("archive_mode", "off"), ("hot_standby", "off")];
    recover(&mut restored, &place.path().join("base"), "recovery.signal", &settings)?;
    ensure!(opens(&mut restored).await?, "{}", restored.log_tail());
    ensure!(number(&restored, ROWS).await? == rows);
    restored.stop(StopMode::Fast).await?;
    service.terminate()?;
    let ended = service.wait(SOON)?;
    ensure!(ended.code() == 0, "{ended}");

    // A gap is a gap through a service, too, and nobody takes silence for an end.
    let service = archive.serve()?;
    let last = inventory.timelines[&Timeline(1)].runs[0].last;
    let name = |number| proto::wal::Segment { number, ..last }.file_name(1 << 20);
    let (lost, next, beyond) =
        (name(last.number - 3), name(last.number - 2), name(last.number + 90));
    std::fs::remove_file(archive.object(&lost).await?)?;
    let (socket, data) = (archive.socket(), place.path().join("base"));
    let only = |words: &[&str]| {
        let whose = ["--socket", &socket, "--cluster", "orders"];
        let words = ["wal"].iter().chain(words).chain(&whose);
        super::run(&data, words.map(|&word| word.to_owned()))
    };
    let gap = only(&["get", &lost, "pg_wal/x"])?;
    ensure!(gap.code() == NOT_KNOWN && gap.stderr.contains("WAL_MISSING"), "{gap}");
    let there = only(&["get", &next, "pg_wal/x"])?;
    ensure!(there.code() == 0 && data.join("pg_wal/x").exists(), "{there}");
    let end = only(&["get", &beyond, "pg_wal/x"])?;
    ensure!(end.code() == 1 && end.stderr.is_empty(), "{end}");
    drop(service);
    let silent = only(&["get", &next, "pg_wal/x", "--deadline", "1"])?;
    ensure!(silent.code() == NOT_KNOWN && silent.stderr.contains("WAL_SERVICE_AWAY"), "{silent}");
    let silent = only(&["push", &format!("pg_wal/{next}"), "--deadline", "1"])?;
    ensure!(silent.code() == 8 && silent.stderr.contains("WAL_SERVICE_AWAY"), "{silent}");
    Ok(())
}
