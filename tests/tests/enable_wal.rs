//! A server that archives nothing is brought to archive by one command, and by one more when it had to be restarted.

use anyhow::{Context as _, ensure};
use postgres::instance::{InstanceOptions, StopMode};
use tests::{Cluster, Fleet, Place, Vhost, WorkerSetup};

#[tokio::test(flavor = "multi_thread")]
async fn a_server_archives_after_one_command_and_a_restart_and_another_archive_is_not_replaced()
-> anyhow::Result<()> {
    let settings = vec![("autovacuum".to_owned(), "off".to_owned())];
    let options =
        InstanceOptions { settings, wal_segment_size_mb: Some(1), ..InstanceOptions::default() };
    let mut server = Cluster::start(15, options).await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    let enable = ["cluster", "enable-wal", "orders", "--wait"];

    let plan = fleet.expect(&["cluster", "enable-wal", "orders", "--plan"])?;
    let parts = [
        "set archive_mode = 'on'",
        "must be restarted",
        "set archive_command = '",
        "600",
        "(now no command)",
    ];
    for part in parts {
        ensure!(plan.contains(part), "{part} in: {plan}");
    }
    ensure!(server.text("SHOW archive_mode").await? == "off");
    let pending = "SELECT count(*) FROM pg_settings WHERE pending_restart";
    ensure!(server.number(pending).await? == 0, "a plan changes nothing");

    // Twice changes nothing, and says the same.
    for _ in 0..2 {
        let done = fleet.run(&enable)?;
        let pending = "PENDING RESTART: restart the server of orders for archive_mode";
        ensure!(done.code() == 3 && done.stdout.contains(pending), "{done}");
    }
    tests::eventually("everybody to say that a restart is pending", tests::SOON, || {
        let (show, doctor) = (fleet.run(&["cluster", "show", "orders"])?, fleet.run(&["doctor"])?);
        let pending = "PENDING RESTART for archive_mode";
        Ok((show.stdout.contains(pending) && doctor.code() == 3 && doctor.stdout.contains(pending))
            .then_some(()))
    })?;
    server.server.stop(StopMode::Fast).await?;
    server.server.start().await?;
    let said = fleet.expect(&enable)?;
    ensure!(said.contains("orders archives its WAL: segment 00000001"), "{said}");
    ensure!(server.text("SHOW archive_timeout").await? == "10min");
    let command = server.text("SHOW archive_command").await?;
    ensure!(command.contains("w1/wal.sock") && command.contains("--cluster orders"), "{command}");
    let plan = fleet.expect(&["cluster", "enable-wal", "orders", "--plan"])?;
    ensure!(plan.lines().count() == 1 && plan.starts_with("nothing has to be set"), "{plan}");

    // It archives all the while, whatever the next restart changes.
    server.run("ALTER SYSTEM SET wal_level = 'logical'").await?;
    server.run("SELECT pg_reload_conf()").await?;
    tests::eventually("everybody to say that a change waits", tests::SOON, || {
        let (show, doctor) = (fleet.run(&["cluster", "show", "orders"])?, fleet.run(&["doctor"])?);
        let waits = "; a change of wal_level waits for a restart";
        let told = [&show.stdout, &doctor.stdout];
        ensure!(!told.iter().any(|told| told.contains("nothing is archived")), "{show} {doctor}");
        Ok((told.iter().all(|told| told.contains(waits)) && doctor.code() == 0).then_some(()))
    })?;

    // A worker that is killed is not missed: the command opens the repository itself.
    fleet.worker("w1")?.kill()?;
    let archived = server.number("SELECT archived_count FROM pg_stat_archiver").await?;
    server.run("CREATE TABLE public.t AS SELECT 1 AS n").await?;
    server.run("SELECT pg_switch_wal()").await?;
    tests::eventually_async(
        "a segment that is archived without a worker",
        tests::SOON,
        async || {
            let now = server.number("SELECT archived_count FROM pg_stat_archiver").await?;
            Ok((now > archived).then_some(()))
        },
    )
    .await
    .context("archived_count")?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;

    server.run("ALTER SYSTEM SET archive_command = 'cp \"%p\" /nowhere/'").await?;
    server.run("SELECT pg_reload_conf()").await?;
    let refused = fleet.run(&enable)?;
    ensure!(refused.code() == 5 && refused.stderr.contains("--replace"), "{refused}");
    ensure!(refused.stderr.contains("archives by another archive_command"), "{refused}");
    let replace = ["cluster", "enable-wal", "orders", "--replace", "--wait"];
    let said = fleet.expect(&replace)?;
    ensure!(said.contains("orders archives its WAL"), "{said}");
    ensure!(!said.contains("not in the archive"), "no backup leads anywhere yet: {said}");

    // One that says yes and stores nothing: what is lost is named, and the backup that is needed is ordered.
    fleet.expect(&["backup", "orders", "--wait"])?;
    server.run("ALTER SYSTEM SET archive_command = 'test -n ''%f'''").await?;
    server.run("SELECT pg_reload_conf()").await?;
    tests::eventually_async("the server to have read it", tests::SOON, async || {
        Ok(server.text("SHOW archive_command").await?.starts_with("test").then_some(()))
    })
    .await?;
    let mut lost = Vec::new();
    for _ in 0..2 {
        server.run("INSERT INTO public.t VALUES (2)").await?;
        lost.push(server.text("SELECT pg_walfile_name(pg_switch_wal())").await?);
    }
    let believes =
        format!("SELECT count(*) FROM pg_stat_archiver WHERE last_archived_wal >= '{}'", lost[1]);
    tests::eventually_async("the server to believe it", tests::SOON, async || {
        Ok((server.number(&believes).await? > 0).then_some(()))
    })
    .await?;
    let plan = fleet.expect(&["cluster", "enable-wal", "orders", "--replace", "--plan"])?;
    for part in ["(now 'test -n ''%f''')", "stays where that was put"] {
        ensure!(plan.contains(part), "{part} in: {plan}");
    }
    let said = fleet.expect(&replace)?;
    let named =
        format!("2 segments from {} to {} are not in the archive: no moment", lost[0], lost[1]);
    for part in [named.as_str(), "pgmuster backup orders", "set archive_command = '"] {
        ensure!(said.contains(part), "{part} in: {said}");
    }
    let backups = fleet.backups()?;
    tests::eventually("a backup behind the gap", tests::SOON * 6, || {
        Ok((fleet.backups()? > backups).then_some(()))
    })
    .with_context(|| fleet.said())?;
    let refused = fleet.run(&["cluster", "enable-wal", "orders", "--archive-timeout", "5"])?;
    ensure!(refused.code() == 2 && refused.stderr.contains("at least 10"), "{refused}");
    Ok(())
}
