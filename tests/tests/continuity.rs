//! Up to when a cluster can be recovered, as `status` says it: never more than the archive really has, also when the server
//! is told that everything is archived.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::binaries::Binaries;
use postgres::instance::InstanceOptions;
use postgres::{Environment, Purpose, Target, connect};
use serde_json::Value;
use tests::fleet::text;
use tests::{
    Cluster, Fleet, Pgmuster, Place, Vhost, WorkerSetup, eventually, eventually_async, services,
};
use tokio_util::sync::CancellationToken;

/// Archives are looked at every few seconds, and judged after half a minute.
const LATER: Duration = Duration::from_mins(2);
/// Within that of the moment when it is full, or was deleted, a segment that is missing is told: it is promised.
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

fn of_small_segments(settings: &[(&str, &str)]) -> InstanceOptions {
    let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
    InstanceOptions {
        wal_segment_size_mb: Some(1),
        settings: settings.iter().map(owned).collect(),
        ..InstanceOptions::default()
    }
}

async fn archives_by(server: &Cluster, command: &str) -> anyhow::Result<()> {
    let command = command.replace('\'', "''");
    server.run(&format!("ALTER SYSTEM SET archive_command = '{command}'")).await?;
    server.run("SELECT pg_reload_conf()").await
}

/// Deletes a segment of the one lineage in the repository.
fn delete_archived(fleet: &Fleet, segment: &str) -> anyhow::Result<()> {
    let mut lineages = std::fs::read_dir(fleet.path("repository/lineages"))?;
    let lineage = lineages.next().context("a lineage")??.path();
    Ok(std::fs::remove_file(lineage.join("wal").join(&segment[..8]).join(segment))?)
}

/// The coordinator and the repository tell of a gap, and of the window before it, in the same positions, names and times.
fn same_in_both_views(fleet: &Fleet, segment: &str) -> anyhow::Result<()> {
    let (url, key) = (fleet.repository_url(), fleet.path("repository.key"));
    let views: [&[&str]; 2] = [&["orders"], &[&url, "--key", text(&key)?]];
    let mut told = Vec::new();
    for view in views {
        let windows = [&["recovery", "windows"], view, &["-o", "json"]].concat();
        let found = fleet.run(&windows)?;
        ensure!(found.code() == 3, "{found}");
        let found: Value = serde_json::from_str(&found.stdout)?;
        let found = if found.is_array() { &found[0] } else { &found };
        let windows = found["windows"].as_array().context("windows")?;
        let mut before = windows.iter().filter(|window| window["missing"] == segment);
        let (window, None) = (before.next().context("a window before the gap")?, before.next())
        else {
            anyhow::bail!("several windows end there: {found}")
        };
        ensure!(window["to_at_ms"].is_i64(), "{found}");
        told.push((window.clone(), found["gaps"].clone()));
    }
    ensure!(told[0] == told[1] && told[0].1[0]["segment"] == segment, "{told:#?}");
    Ok(())
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
    let push = fleet.archive_command()?;
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
    // Of the segments that are missing, the first one is named.
    ensure!(told.contains(&format!("{segment} is missing in its archive")), "{told}");
    let doctor = fleet.run(&["doctor"])?;
    ensure!(doctor.code() == 3 && doctor.stdout.contains(&segment), "{doctor}");
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
    .with_context(|| fleet.said())?;
    // What is mended is no fault any more, and yet told: between which moments nothing can be recovered.
    let doctor = fleet.run(&["doctor"])?;
    let note = doctor.stdout.lines().find(|line| line.contains("archiving of orders"));
    let note = note.context("it tells of archiving")?;
    let nothing = format!("{segment} is missing, and no moment between 2");
    ensure!(doctor.code() == 0 && note.starts_with("note"), "{doctor}");
    ensure!(note.contains(&nothing) && note.ends_with("can be recovered"), "{note}");
    same_in_both_views(&fleet, &segment)?;

    // Somebody deletes one in the middle, which no newer segment shows.
    let mut segments = Vec::new();
    for _ in 0..3 {
        segments.push(writes(&server).await?);
        server.run("SELECT pg_switch_wal()").await?;
    }
    has_archived(&server, &segments[2]).await?;
    let backups = fleet.backups()?;
    delete_archived(&fleet, &segments[1])?;
    let what = format!("WAL segment {} is missing in its archive", segments[1]);
    eventually("the deleted segment to be missed", PROMISED, || {
        let reason = orders(&fleet)?["reason"].as_str().unwrap_or_default().to_owned();
        Ok(reason.starts_with(&what).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))?;
    eventually("a backup behind it", LATER, || Ok((fleet.backups()? > backups).then_some(())))
        .with_context(|| fleet.said())
}

/// A row with the moment of its statement.
const WORK: &str = "INSERT INTO public.moments (at_ms, note)
    VALUES ((extract(epoch FROM clock_timestamp()) * 1000)::int8, repeat('x', 4000))";

/// When the worker asked the server where it is, by the server's clock and log.
fn looks(server: &Cluster) -> anyhow::Result<Vec<i64>> {
    let log = std::fs::read_to_string(server.server.log_path())?;
    let asked = log.lines().filter(|line| line.contains("-- pgmuster: wal position"));
    let at_ms = asked.map(|line| {
        let at = line.split(' ').next().unwrap_or_default();
        at.replace('.', "").parse().with_context(|| line.to_owned())
    });
    at_ms.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_said_to_be_recoverable_is_what_a_restore_brings_back() -> anyhow::Result<()> {
    /// What is promised.
    const FINE_MS: i64 = 5_000;
    let settings = [
        ("archive_mode", "on"),
        ("archive_command", "false"),
        ("autovacuum", "off"),
        ("log_statement", "all"),
        ("log_line_prefix", "%n "),
    ];
    let options = of_small_segments(&settings);
    let server = Cluster::start(18, options).await?;
    let tables =
        "CREATE TABLE public.moments (id int8 GENERATED ALWAYS AS IDENTITY, at_ms int8, note text);
         ALTER TABLE public.moments ALTER note SET STORAGE PLAIN";
    server.run(tables).await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.backup_behind_gaps = false;
    let push = fleet.archive_command()?;
    let stops = fleet.path("stops");
    archives_by(&server, &format!("test ! -e '{}' && {push}", stops.display())).await?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    fleet.expect(&["verify", "orders", "--level", "3", "--wait"])?;

    // It works on and on; in the middle of that its archive stops.
    let story = async {
        let begun_ms = now_ms(&server).await?;
        eventually_async("the recovery point to move on with the work", LATER, async || {
            let point = orders(&fleet)?["recoverable_to_at_ms"].as_i64();
            Ok((point > Some(begun_ms + 2 * FINE_MS)).then_some(()))
        })
        .await?;
        let since = server.text("SELECT clock_timestamp()::text").await?;
        std::fs::write(&stops, "")?;
        let sql = format!(
            "SELECT COALESCE(max(last_failed_wal), '') FROM pg_stat_archiver WHERE last_failed_time > '{since}'"
        );
        eventually_async("the archive to stand still", LATER, async || {
            let failed = server.text(&sql).await?;
            Ok((orders(&fleet)?["wal"]["waiting"]["segment"] == failed).then_some(()))
        })
        .await
    };
    let works = async {
        loop {
            if let Err(error) = server.run(WORK).await {
                return error;
            }
        }
    };
    // One row after the other, until the story is at its end.
    let told = tokio::select! {
        told = story => told,
        failed = works => Err(failed),
    };
    told.with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))?;
    let point = recoverable_to(&fleet)?;

    // The truth: what comes back of it.
    let into = fleet.path("restore/truth");
    let restore = ["restore", "orders", "--into", text(&into)?, "--to", "latest"];
    fleet.expect(&[&restore[..], &["--start", "--port", "5433", "--wait"]].concat())?;
    let there = Target::parse(&server.url().replace(":5432/", ":5433/"), &Environment::default())?;
    let purpose = Purpose {
        application_name: "story".to_owned(),
        read_only: true,
        statement_timeout: Duration::ZERO,
        lock_timeout: Duration::ZERO,
    };
    let session = connect(&there, &purpose).await?;
    let query = "SELECT max(id), count(*) FROM public.moments";
    let newest = session.one("look", query, &[]).await?;
    session.close().await;
    let (newest, rows): (i64, i64) = (newest.get(0), newest.get(1));
    let binaries = Binaries::at(&services::postgres_bin(18)?).await?;
    let stop = binaries.program("pg_ctl")?.args(["stop", "-s", "-w", "-m", "immediate", "-D"]);
    stop.arg(&into).run(LATER, &CancellationToken::new()).await?;
    ensure!(newest == rows, "of the rows up to {newest} there are {rows}");

    // A row's moment is before its commit, and behind the commit of the row before it.
    let moment = async |id: i64| -> anyhow::Result<i64> {
        let query = format!("SELECT at_ms FROM public.moments WHERE id = {id}");
        server.number(&query).await.with_context(|| format!("row {id}"))
    };
    let (back_ms, lost_ms) = (moment(newest).await?, moment(newest + 2).await?);
    ensure!(point < lost_ms, "{} ms too much are promised", point - lost_ms);
    // Between two looks nobody knows what commits.
    let looks = looks(&server)?;
    let next = looks.partition_point(|look_ms| *look_ms <= back_ms);
    let (before, after) = (looks.get(next.wrapping_sub(1)), looks.get(next));
    let pause_ms = after.context("a look")? - before.context("a look")?;
    // They are five seconds apart, and each takes its time where every core is busy.
    ensure!(pause_ms <= 3 * FINE_MS, "{pause_ms} ms between two looks");
    let fine_ms = FINE_MS.max(pause_ms) + 1_000;
    ensure!(back_ms - point <= fine_ms, "{} ms too little are promised", back_ms - point);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clones_directory_says_nothing_of_what_the_server_archived() -> anyhow::Result<()> {
    let settings = [("archive_mode", "on"), ("archive_command", "true"), ("autovacuum", "off")];
    let options = of_small_segments(&settings);
    let mut server = Cluster::start(15, options).await?;
    let clone = server.fork(&settings).await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let push = fleet.archive_command()?;
    archives_by(&server, &push).await?;
    server.run("SELECT pg_switch_wal()").await?;
    let directory = format!("data_directory = \"{}\"", clone.server.data_directory().display());
    let setup = WorkerSetup::of("w1", "orders", server.url());
    fleet.start_worker(&WorkerSetup { cluster_lines: &directory, ..setup })?;
    // Each fills a segment of one name with content of its own.
    let segment = writes(&server).await?;
    while writes(&clone).await? <= segment {
        clone.run("SELECT pg_switch_wal()").await?;
    }
    server.run("SELECT pg_switch_wal()").await?;
    has_archived(&server, &segment).await?;
    eventually_async("the server's own segment to count", LATER, async || {
        let wal = orders(&fleet)?["wal"].clone();
        ensure!(wal["conflict"].is_null(), "the clone's is held against it: {wal}");
        let Some(to) = wal["archived_to"].as_str() else { return Ok(None) };
        let last = format!("SELECT pg_walfile_name('{to}'::pg_lsn)");
        Ok((server.text(&last).await? >= segment).then_some(()))
    })
    .await
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_command_that_is_not_there_or_is_killed_is_told_and_goes_on_by_itself()
-> anyhow::Result<()> {
    let settings = [("archive_mode", "on"), ("archive_command", "false"), ("autovacuum", "off")];
    let orders = Cluster::start(15, of_small_segments(&settings)).await?;
    let billing = Cluster::start(18, of_small_segments(&settings)).await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let (wrong, push) = (fleet.path("wrong"), fleet.archive_command()?);
    // Each of these ends the server's archiver, which counts no failure of them.
    let ends = [("orders", &orders, "exit 127"), ("billing", &billing, "kill -9 $$")];
    for (name, server, end) in &ends {
        let push = push.replace("--cluster orders", &format!("--cluster {name}"));
        let command = format!("if test -e '{}'; then {end}; fi; {push}", wrong.display());
        archives_by(server, &command).await?;
    }
    fleet.start_coordinator()?;
    let setup = WorkerSetup::of("w1", "orders", orders.url());
    let clusters = vec![("orders", orders.url()), ("billing", billing.url())];
    fleet.start_worker(&WorkerSetup { clusters, ..setup })?;
    let failures = "SELECT failed_count FROM pg_stat_archiver";
    for (name, server, _) in &ends {
        let segment = writes(server).await?;
        server.run("SELECT pg_switch_wal()").await?;
        has_archived(server, &segment).await?;
        fleet.expect(&["backup", name, "--wait"])?;
    }
    let look = |name: &str| fleet.json(&["cluster", "show", name, "-o", "json"]);
    let before = [orders.number(failures).await?, billing.number(failures).await?];

    std::fs::write(&wrong, "")?;
    let mut waiting = Vec::new();
    for (_, server, _) in &ends {
        waiting.push(writes(server).await?);
        server.run("SELECT pg_switch_wal()").await?;
    }
    for ((name, server, _), segment) in ends.iter().zip(&waiting) {
        let told = eventually(format!("{name} to be told"), PROMISED, || {
            let told = look(name)?;
            let reason = told["reason"].as_str().unwrap_or_default();
            let is_told = reason.contains("its server keeps 1 segment since");
            Ok((told["state"] == "AT_RISK" && is_told).then_some(told))
        })
        .with_context(|| format!("{:?}\n{}", look(name), fleet.said()))?;
        let reason = told["reason"].as_str().unwrap_or_default();
        let missing = "its WAL does not reach the archive: 1 full segment is missing since";
        ensure!(reason.starts_with(missing) && reason.contains(segment.as_str()), "{reason}");
        let log = std::fs::read_to_string(server.server.log_path())?;
        let end =
            if *name == "orders" { "failed with exit code 127" } else { "terminated by signal 9" };
        ensure!(log.contains(end), "{log}");
    }
    let status = fleet.run(&["status"])?;
    ensure!(status.code() == 3, "{status}");
    ensure!(status.stdout.matches("is AT_RISK").count() == 2, "{status}");
    let after = [orders.number(failures).await?, billing.number(failures).await?];
    ensure!(before == after, "the servers themselves count no failure: {before:?} {after:?}");

    // The command is right again.
    std::fs::remove_file(&wrong)?;
    for ((name, server, _), segment) in ends.iter().zip(&waiting) {
        has_archived(server, segment).await?;
        eventually(format!("{name} to be well again"), LATER, || {
            let told = look(name)?;
            Ok((told["state"] == "TAKEN").then_some(()))
        })
        .with_context(|| format!("{:?}\n{}", look(name), fleet.said()))?;
    }
    Ok(())
}

/// Which segment the server writes, as something in it shows.
async fn writes(server: &Cluster) -> anyhow::Result<String> {
    commit(server).await?;
    server.text("SELECT pg_walfile_name(pg_current_wal_insert_lsn())").await
}

async fn has_archived(server: &Cluster, segment: &str) -> anyhow::Result<()> {
    let done =
        format!("SELECT count(*) FROM pg_stat_archiver WHERE last_archived_wal >= '{segment}'");
    let is_done = async || Ok((server.number(&done).await? > 0).then_some(()));
    eventually_async(&format!("{segment} to be archived"), LATER, is_done).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_under_the_same_name_and_a_store_that_is_away_make_nothing_seem_safe()
-> anyhow::Result<()> {
    let settings = [("archive_mode", "on"), ("archive_command", "true"), ("autovacuum", "off")];
    let options = of_small_segments(&settings);
    let mut server = Cluster::start(15, options).await?;
    let clone = server.fork(&settings).await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    let push = fleet.archive_command()?;
    archives_by(&server, &push).await?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    fleet.expect(&["verify", "orders", "--level", "3", "--wait"])?;
    server.run("SELECT pg_switch_wal()").await?;
    let segment = writes(&server).await?;

    // The worker has asked whether the archive has the segment that the server writes, and it has not.
    let archived_to = |wal: &Value| wal["archived_to"].as_str().map(str::to_owned);
    let is_next = async |wal: &Value| -> anyhow::Result<bool> {
        let Some(to) = archived_to(wal) else { return Ok(false) };
        let next = format!("SELECT pg_walfile_name('{to}'::pg_lsn + 1)");
        Ok(server.text(&next).await? == segment)
    };
    let mut first = None;
    eventually_async("the archive to be looked at again", LATER, async || {
        let wal = orders(&fleet)?["wal"].clone();
        let at_ms = wal["at_ms"].as_i64().context("it was looked at")?;
        if !is_next(&wal).await? {
            return Ok(None);
        }
        Ok((at_ms > *first.get_or_insert(at_ms)).then_some(()))
    })
    .await
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))?;

    // A clone stores its own segment of that name, and then the server fills it.
    while writes(&clone).await? < segment {
        clone.run("SELECT pg_switch_wal()").await?;
    }
    clone.run("SELECT pg_switch_wal()").await?;
    let (file, url) = (format!("pg_wal/{segment}"), fleet.repository_url());
    let key = fleet.path("repository.key").display().to_string();
    let words = ["wal", "push", &file, "--repository", &url, "--key", &key, "--cluster", "orders"];
    let pushed = Pgmuster::start_with(&words, |command| {
        command.current_dir(clone.server.data_directory());
    })?
    .wait(LATER)?;
    ensure!(pushed.code() == 0, "{pushed}");
    let lost = commit(&server).await?;
    server.run("SELECT pg_switch_wal()").await?;
    let what = format!("another server archives under its name: segment {segment} differs");
    eventually("the clone to be told", LATER, || {
        ensure!(recoverable_to(&fleet)? <= lost, "what is refused seems to be safe");
        let orders = orders(&fleet)?;
        let reason = orders["reason"].as_str().unwrap_or_default();
        Ok((orders["state"] == "AT_RISK" && reason.starts_with(&what)).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))?;
    let doctor = fleet.run(&["doctor"])?;
    ensure!(doctor.stdout.contains(&what), "{doctor}");
    ensure!(recoverable_to(&fleet)? <= lost, "what is refused seems to be safe");

    // The clone is gone, and what it wrote: the server is asked for its own again.
    drop(clone);
    delete_archived(&fleet, &segment)?;
    commit(&server).await?;
    server.run("SELECT pg_switch_wal()").await?;
    eventually("its own segment to count", LATER, || {
        Ok((recoverable_to(&fleet)? > lost).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))?;

    // The store is away: the server says what that costs it.
    std::fs::rename(fleet.path("repository"), fleet.path("away"))?;
    commit(&server).await?;
    server.run("SELECT pg_switch_wal()").await?;
    eventually("what the server keeps to be told", LATER, || {
        let orders = orders(&fleet)?;
        let reason = orders["reason"].as_str().unwrap_or_default();
        let is_told = reason.contains("its server keeps 1 segment since");
        Ok((orders["state"] == "AT_RISK" && is_told).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))?;
    ensure!(fleet.metric("pgmuster_wal_ready_segments{cluster=\"orders\"}")? >= 1.0);
    ensure!(fleet.metric("pgmuster_pg_wal_bytes{cluster=\"orders\"}")? >= f64::from(1 << 20));
    std::fs::rename(fleet.path("away"), fleet.path("repository"))?;
    commit(&server).await?;
    server.run("SELECT pg_switch_wal()").await?;
    eventually("nothing to be kept any more", LATER, || {
        let kept = fleet.metric("pgmuster_wal_ready_segments{cluster=\"orders\"}")?;
        Ok((kept == 0.0).then_some(()))
    })
    .with_context(|| format!("{:?}\n{}", orders(&fleet), fleet.said()))
}
