//! Proofs that go beyond the end of their backup, along archived WAL, to a moment that is chosen or left to chance; and restores to one,
//! ordered over the queue.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use postgres::binaries::Binaries;
use postgres::instance::InstanceOptions;
use postgres::{Environment, Purpose, Target, connect};
use proto::{JobId, Lsn};
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

/// A server whose segments are of 1 MiB, archived for each of these clusters as soon as it has a backup, and a coordinator.
async fn archiving(clusters: &[&str]) -> anyhow::Result<(Cluster, Vhost, Fleet)> {
    let settings = [("archive_mode", "on"), ("archive_command", "false"), ("autovacuum", "off")];
    let options = InstanceOptions {
        wal_segment_size_mb: Some(1),
        settings: settings.map(|(name, value)| (name.to_owned(), value.to_owned())).to_vec(),
        ..InstanceOptions::default()
    };
    let server = Cluster::start(15, options).await?;
    let vhost = Vhost::create()?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let (program, key) = (services::pgmuster()?, fleet.path("repository.key"));
    let push = |cluster: &&str| {
        format!(
            "'{}' wal push \"%p\" --repository '{}' --key '{}' --cluster {cluster}",
            program.display(),
            fleet.repository_url(),
            key.display()
        )
    };
    let push = clusters.iter().map(push).collect::<Vec<_>>().join(" && ").replace('\'', "''");
    server.run(&format!("ALTER SYSTEM SET archive_command = '{push}'")).await?;
    server.run("SELECT pg_reload_conf()").await?;
    // The stories say themselves when a backup is taken.
    fleet.backup_behind_gaps = false;
    fleet.start_coordinator()?;
    Ok((server, vhost, fleet))
}

/// Ends the segment that the server writes, and waits until it is archived. Gives its name.
async fn archived(server: &Cluster) -> anyhow::Result<String> {
    let segment = server.text("SELECT pg_walfile_name(pg_switch_wal())").await?;
    let archived =
        format!("SELECT count(*) FROM pg_stat_archiver WHERE last_archived_wal >= '{segment}'");
    eventually_async("the segment to be archived", LATER, async || {
        Ok((server.number(&archived).await? > 0).then_some(()))
    })
    .await?;
    Ok(segment)
}

/// Commits a row, ends the segment it is in, and waits until that is archived. Gives its name, a moment before the commit and the
/// position behind it.
async fn archived_row(server: &Cluster) -> anyhow::Result<(String, String, Lsn)> {
    let text =
        "SELECT to_char(clock_timestamp() AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')";
    let before = server.text(text).await?;
    server.run("INSERT INTO public.parts VALUES (1)").await?;
    let behind = server.text("SELECT pg_current_wal_insert_lsn()::text").await?.parse()?;
    Ok((archived(server).await?, before, behind))
}

/// The same without any transaction.
async fn goes_on(server: &Cluster) -> anyhow::Result<()> {
    server.text("SELECT pg_logical_emit_message(false, 'story', 'goes on')::text").await?;
    archived(server).await.map(drop)
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
    let (server, _vhost, mut fleet) = archiving(&["orders"]).await?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    let (damaged, _, first) = archived_row(&server).await?;
    let (_, moment, second) = archived_row(&server).await?;
    let (last, _, third) = archived_row(&server).await?;

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
    ensure!(latest["heartbeat_at_ms"].is_null(), "nobody asked for heartbeats: {latest}");
    ensure!(latest["level_reached"] == "L4" && latest["rows"] == one + 2, "{latest}");
    ensure!(latest["recovery"]["last_commit"].as_str() > Some(moment.as_str()), "{latest}");
    let view = orders(&fleet)?;
    ensure!(view["state"] == "PROVED" && view["recovery_time"]["replay_ms"].is_u64(), "{view}");
    // Any moment.
    fleet.expect(&["verify", "orders", "--to", "random", "--wait"])?;
    let any = proof(&fleet)?;
    let target = any["recovery"]["target"].as_str().unwrap_or_default();
    ensure!(target.ends_with(", chosen by chance"), "{any}");
    let asked = target.strip_prefix("position ").and_then(|text| text.split(',').next());
    let asked: Lsn = asked.context("a position")?.parse()?;
    let reached: Lsn = any["recovery"]["reached_lsn"].as_str().context("a position")?.parse()?;
    ensure!(asked <= reached, "{any}");
    let committed = [first, second, third].into_iter().filter(|behind| *behind <= reached);
    let rows = one - 1 + committed.count() as u64;
    ensure!(
        any["rows"] == rows,
        "{rows} rows were there, behind {first}, {second}, {third}: {any}"
    );

    // What cannot be reached is refused before anything is restored, and says nothing about the backup.
    refused(&fleet, &["--to", "F/0"], "RECOVERY_TARGET_UNREACHABLE")?;
    refused(&fleet, &["--to", "latest", "--level", "5"], "choose level 3 or 4")?;

    // A segment that is damaged on the way does not either: the backup alone is as good as before. But nothing leads beyond
    // that segment, whichever backup it begins with.
    let stopped = view["backup"]["facts"]["stopped_at_ms"].clone();
    for (segment, to) in [(&damaged, moment.as_str()), (&last, "latest")] {
        let lineage = view["backup"]["facts"]["lineage"].as_str().context("a lineage")?;
        let object = format!("repository/lineages/{lineage}/wal/{}/{segment}", &segment[..8]);
        let object = fleet.path(&object);
        let whole = std::fs::read(&object)?;
        replace(&object, &rotten(&whole))?;
        refused(&fleet, &["--to", to], "PROOF_FAILED")?;
        let failed = orders(&fleet)?;
        let broken = &failed["broken_wal"][0];
        let position = format!("0/{:X}", u64::from_str_radix(&segment[16..], 16)? << 20);
        ensure!(failed["state"] == "BROKEN" && broken["from"] == position.as_str(), "{failed}");
        let reach = &failed["recoverable_to_at_ms"];
        ensure!(reach.as_i64() < view["recoverable_to_at_ms"].as_i64(), "{failed}");
        // Of the newest segment it is known how far a proof came before.
        ensure!(segment == &last || *reach == stopped, "{stopped}: {failed}");
        // Nothing that does not go through it says otherwise.
        fleet.expect(&["verify", "orders", "--level", "4", "--wait"])?;
        ensure!(orders(&fleet)?["state"] == "BROKEN", "{}", orders(&fleet)?);
        replace(&object, &whole)?;
        fleet.expect(&["verify", "orders", "--to", to, "--wait"])?;
        let mended = orders(&fleet)?;
        ensure!(mended["state"] == "PROVED" && mended["broken_wal"].is_null(), "{mended}");
    }

    // Nor does a tablespace say anything that replay would make where it always was.
    let space = tempfile::tempdir()?;
    let place = space.path().display();
    server.run(&format!("CREATE TABLESPACE shelf LOCATION '{place}'")).await?;
    server.run("DROP TABLESPACE shelf").await?;
    archived_row(&server).await?;
    refused(&fleet, &["--to", "latest"], "DATA_DIRECTORY_SHAPE")?;
    let left: Vec<_> = std::fs::read_dir(space.path())?.collect();
    ensure!(left.is_empty(), "the proof wrote outside its room: {left:?}");
    ensure!(orders(&fleet)?["state"] == "PROVED", "{}", orders(&fleet)?);
    Ok(())
}

/// The same with one bit that is not as it was.
fn rotten(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    bytes
}

fn replace(object: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    std::fs::remove_file(object)?;
    Ok(std::fs::write(object, bytes)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_moment_behind_a_segment_that_only_the_backup_has_blames_no_backup() -> anyhow::Result<()>
{
    let (server, _vhost, mut fleet) = archiving(&["orders"]).await?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    // Only the backup itself has its last segment, which ends where it does, and in what follows no transaction ends.
    let view = orders(&fleet)?;
    let lineage = view["backup"]["facts"]["lineage"].as_str().context("a lineage")?;
    let next = server.text("SELECT pg_walfile_name(pg_current_wal_insert_lsn())").await?;
    for _ in 0..2 {
        goes_on(&server).await?;
    }
    let wal = fleet.path(&format!("repository/lineages/{lineage}/wal/{}", &next[..8]));
    for entry in std::fs::read_dir(&wal)? {
        let entry = entry?;
        if *entry.file_name().to_string_lossy() < *next {
            std::fs::remove_file(entry.path())?;
        }
    }
    refused(&fleet, &["--to", "2100-01-01T00:00:00Z"], "no transaction that ended later is there")?;
    let view = orders(&fleet)?;
    ensure!(view["state"] == "TAKEN" && view["backup"]["proof"].is_null(), "{view}");
    fleet.expect(&["verify", "orders", "--to", "latest", "--wait"])?;
    ensure!(orders(&fleet)?["state"] == "PROVED", "{}", orders(&fleet)?);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_proofs_go_beyond_at_once_and_what_ends_them_leaves_nothing() -> anyhow::Result<()> {
    let (server, _vhost, mut fleet) = archiving(&["orders", "twin"]).await?;
    let go = fleet.path("go");
    let w1 = WorkerSetup {
        clusters: ["orders", "twin"].map(|name| (name, server.url())).to_vec(),
        ..WorkerSetup::of("w1", "orders", server.url())
    };
    let held = w1.clone().failing_at(format!("boot=hold:{}", go.display()));
    fleet.start_worker(&held)?;
    for cluster in ["orders", "twin"] {
        fleet.expect(&["backup", cluster, "--wait"])?;
    }
    goes_on(&server).await?;
    let order = |cluster| fleet.order(&["verify", cluster, "--to", "latest"]);
    let jobs = [order("orders")?, order("twin")?];
    for job in jobs {
        fleet.await_step(job, "boot")?;
    }
    let rooms: Vec<_> =
        fleet.sandboxes()?.iter().map(|room| fleet.path("sandbox").join(room)).collect();
    ensure!(rooms.len() == 2 && rooms.iter().all(|room| room.join("s/wal.sock").exists()));

    // What a killed worker left is gone when its next life works, and that makes both proofs again.
    fleet.worker("w1")?.kill()?;
    fleet.start_worker(&held)?;
    for job in jobs {
        fleet.await_step(job, "boot")?;
    }
    eventually("the rooms of the killed worker to be gone", LATER, || {
        Ok((!rooms.iter().any(|room| room.exists())).then_some(()))
    })?;
    std::fs::write(&go, "")?;
    for job in jobs {
        fleet.await_state(job, &["succeeded"], LATER)?;
    }

    // A store that goes when the server is about to ask for WAL ends the proof, and says nothing about the backup.
    let before = proof(&fleet)?;
    std::fs::remove_file(&go)?;
    let job = fleet.order(&["verify", "orders", "--to", "latest"])?;
    fleet.await_step(job, "boot")?;
    let (there, away) = (fleet.path("repository"), fleet.path("away"));
    std::fs::rename(&there, &away)?;
    std::fs::write(&go, "")?;
    let failed = fleet.await_state(job, &["failed"], LATER)?;
    std::fs::rename(&away, &there)?;
    ensure!(failed["failure"]["code"] != "PROOF_FAILED", "{failed}");
    let view = orders(&fleet)?;
    ensure!(view["state"] == "PROVED" && proof(&fleet)? == before, "{view}");
    ensure!(view["broken_wal"].is_null() && fleet.sandboxes()?.is_empty(), "{view}");
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
    let (server, _vhost, mut fleet) = archiving(&["orders"]).await?;
    let space = tempfile::tempdir()?;
    let mut oids = Vec::new();
    for name in ["shelf", "rack"] {
        let place = space.path().join(name);
        std::fs::create_dir(&place)?;
        let place = place.display();
        server.run(&format!("CREATE TABLESPACE {name} LOCATION '{place}'")).await?;
        let oid = format!("SELECT oid::text FROM pg_tablespace WHERE spcname = '{name}'");
        oids.push(server.text(&oid).await?);
    }
    let [shelf, rack] = &oids[..] else { bail!("{oids:?}") };
    server.run("CREATE TABLE public.racked TABLESPACE rack AS SELECT 1 AS n").await?;
    server.run("CREATE TABLE public.shelved TABLESPACE shelf AS SELECT 1 AS n").await?;
    let first = WorkerSetup::of("w1", "orders", server.url());
    fleet.start_worker(&first)?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    server.run("INSERT INTO public.shelved VALUES (2)").await?;
    archived_row(&server).await?;
    let (_, moment, _) = archived_row(&server).await?;
    server.run("INSERT INTO public.shelved VALUES (3)").await?;
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

    // A restore is bound to its host: its worker dies with it, comes back and goes on. One tablespace goes where the order says.
    let (into, own) = (fleet.path("restore/moment"), fleet.path("restore/own/shelf"));
    let asked = format!("{shelf}={}", own.display());
    let order = [
        &["restore", "orders", "--on", "w1", "--into", text(&into)?, "--to", &moment][..],
        &["--tablespace", &asked, "--start", "--port", "5433"],
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
    let query = "SELECT (SELECT max(n) FROM public.shelved), (SELECT max(n) FROM public.racked)";
    let newest = session.one("look", query, &[]).await?;
    let newest: [i32; 2] = [newest.get(0), newest.get(1)];
    let place = async |oid: &str| -> anyhow::Result<String> {
        let query = format!("SELECT pg_tablespace_location({oid})");
        Ok(session.one("look", &query, &[]).await?.get(0))
    };
    let places = [place(shelf).await?, place(rack).await?];
    session.close().await;
    let binaries = Binaries::at(&services::postgres_bin(15)?).await?;
    let stop = binaries.program("pg_ctl")?.args(["stop", "-s", "-w", "-m", "immediate", "-D"]);
    stop.arg(&into).run(LATER, &CancellationToken::new()).await?;
    ensure!(rows == 2, "{rows} rows");
    // The other goes beside the directory, not to where the source still has it.
    let beside = fleet.path("restore/moment-tablespaces").join(rack);
    let expected = [own.canonicalize()?, beside.canonicalize()?];
    ensure!(
        newest == [2, 1] && places.each_ref().map(Path::new) == expected,
        "{newest:?} {places:?}"
    );
    ensure!(!into.join("pgmuster-restore-incomplete").exists());
    // What the dead left is gone, and nothing of theirs runs.
    ensure!(fleet.sandboxes()?.is_empty(), "{:?}", fleet.sandboxes()?);
    server.is_left_alone().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_places_tablespaces_below_restore_roots_and_nowhere_else() -> anyhow::Result<()> {
    let (server, _vhost, mut fleet) = archiving(&["orders"]).await?;
    let space = tempfile::tempdir()?;
    let place = space.path().display();
    server.run(&format!("CREATE TABLESPACE shelf LOCATION '{place}'")).await?;
    let oid = server.text("SELECT oid::text FROM pg_tablespace WHERE spcname = 'shelf'").await?;
    server.run("CREATE TABLE public.shelved TABLESPACE shelf AS SELECT 1 AS n").await?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", server.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    let (into, own) = (fleet.path("restore/placed"), fleet.path("restore/own/shelf"));
    let restore = |asked: &[String]| -> anyhow::Result<Vec<String>> {
        let mut order: Vec<String> =
            ["restore", "orders", "--wait", "--into", text(&into)?].map(str::to_owned).to_vec();
        for asked in asked {
            order.extend(["--tablespace".to_owned(), asked.clone()]);
        }
        Ok(order)
    };
    let to = |path: &Path| format!("{oid}={}", path.display());

    for (asked, code, words) in [
        (
            vec![to(&fleet.path("elsewhere"))],
            "TARGET_OUTSIDE_ROOTS",
            "elsewhere is below no restore root",
        ),
        (vec![to(&into.join("pg_tblspc/1"))], "REQUEST_INVALID", "would go to"),
        (vec![to(&own), to(&own.join("in"))], "REQUEST_INVALID", "twice"),
        (
            vec![format!("99={}", own.display())],
            "REQUEST_INVALID",
            &format!("has no tablespace 99; it has {oid} ({place})"),
        ),
    ] {
        let order = restore(&asked)?;
        let order: Vec<&str> = order.iter().map(String::as_str).collect();
        let done = fleet.run(&order)?;
        let said = done.to_string();
        ensure!(done.code() != 0 && said.contains(code), "{asked:?}: {said}");
        ensure!(said.contains(words), "{asked:?}: {said}");
        ensure!(!into.exists() && !own.exists(), "{asked:?} wrote something");
    }

    let order = restore(&[to(&own)])?;
    let mut order: Vec<&str> = order.iter().map(String::as_str).collect();
    order.push("--plan");
    let plan = fleet.expect(&order)?;
    let line = format!("put tablespace {oid} into {}", own.display());
    ensure!(plan.contains(&line) && !into.exists(), "{line}: {plan}");
    order.pop();
    fleet.expect(&order)?;
    let link = std::fs::read_link(into.join("pg_tblspc").join(&oid))?;
    ensure!(link == own.canonicalize()?, "{}", link.display());
    ensure!(
        std::fs::read_dir(&own)?.next().is_some()
            && !fleet.path("restore/placed-tablespaces").exists()
    );
    // Mended where it is.
    order.push("--delta");
    fleet.expect(&order)?;
    server.is_left_alone().await
}
