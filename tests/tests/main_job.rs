//! The main job, end to end: a person orders a backup, RabbitMQ carries it, a worker takes it and stores it in S3, restores
//! it in a sandbox and proves it; then the repository and its key alone bring everything back.

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use serde_json::Value;
use tests::fleet::{SOON, text};
use tests::{Bucket, Cluster, Fleet, Place, Vhost, WorkerSetup, eventually};

/// Ordered, queued, taken, stored, restored, proved.
async fn story(catalog: &str, major: u32) -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(major, InstanceOptions::default()).await?;
    let bucket = Bucket::create().await?;
    let mut fleet = Fleet::prepare(&vhost.url(), catalog, Place::S3(bucket.clone()))?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;

    let first = fleet.expect(&["backup", "orders", "--verify", "5", "--wait"])?;
    ensure!(first.contains("orders is PROVED (L5)"), "{first}\n{}", fleet.said());
    let status = fleet.expect(&["status"])?;
    ensure!(status.contains("PROVED"), "{status}");
    cluster.is_left_alone().await?;
    ensure!(fleet.sandboxes()?.is_empty(), "a sandbox is left: {:?}", fleet.sandboxes()?);
    ensure!(!bucket.keys("backups/").await?.is_empty(), "nothing is in the bucket");

    cluster
        .run("INSERT INTO public.items SELECT g, 'new' FROM generate_series(5001, 5100) g")
        .await?;
    let second = fleet.expect(&["backup", "orders", "--verify", "5", "--wait"])?;
    ensure!(second.contains("orders is PROVED (L5)"), "{second}");
    let backups = fleet.json(&["backups", "list", "orders", "-o", "json"])?;
    let stored = |row: usize| backups[row]["facts"]["stored_bytes"].as_u64();
    ensure!(stored(0) < stored(1), "the second backup stores less: {backups}");
    ensure!(backups[0]["facts"]["compared_with"] == backups[1]["id"], "{backups}");

    let trace = fleet.expect(&["job", "trace", "@last"])?;
    for step in ["inventory", "restore", "boot", "check", "store_proof"] {
        ensure!(trace.contains(step), "the waterfall has no step {step}:\n{trace}");
    }

    let analyzed = fleet.expect(&["maintain", "orders", "--task", "analyze", "--wait"])?;
    ensure!(analyzed.contains("Analyzed"), "{analyzed}");
    let fresh = cluster
        .number("SELECT count(*) FROM pg_stats WHERE tablename = 'parts' AND schemaname = 'public'")
        .await?;
    ensure!(fresh > 0, "the partitioned parent has statistics now");
    let plan = fleet.expect(&["maintain", "orders", "--task", "vacuum", "--plan"])?;
    ensure!(!plan.is_empty(), "a plan prints itself");

    let through_the_queue = fleet.path("restore/orders");
    let restore = ["restore", "orders", "--into", text(&through_the_queue)?];
    let plan = fleet.expect(&[&restore[..], &["--plan"]].concat())?;
    ensure!(plan.contains("To recover orders to its newest moment takes"), "{plan}");
    fleet.expect(&[&restore[..], &["--wait"]].concat())?;
    ensure!(through_the_queue.join("backup_label").exists(), "no data directory was restored");

    giving_up(&fleet, &backups)?;
    disaster(&fleet, major)
}

/// The older backup can be given up, the newest cannot; a plan of the collection says what will become of it.
fn giving_up(fleet: &Fleet, backups: &Value) -> anyhow::Result<()> {
    let (key, url) = (fleet.path("repository.key"), fleet.repository_url());
    let id = |row: usize| backups[row]["id"].as_str().unwrap_or_default().to_owned();
    let delete = |backup: &str| fleet.run(&["repo", "delete", &url, backup, "--key", text(&key)?]);
    let refused = delete(&id(0))?;
    ensure!(refused.code() == 7 && refused.stderr.contains("it is the newest one"), "{refused}");
    let done = delete(&id(1))?;
    ensure!(done.code() == 0, "{done}");
    let hold = fleet.run(&["repo", "hold", &url, &id(1), "--key", text(&key)?])?;
    ensure!(hold.code() == 7 && hold.stderr.contains("it was given up by"), "{hold}");
    let gc =
        |more: &str| fleet.json(&["repo", "gc", &url, "--key", text(&key)?, "-o", "json", more]);
    for rows in [gc("--plan")?, gc("--confirm-large")?] {
        let row = &rows[0];
        let given_up = &row["backups"][0];
        ensure!(given_up["backup"] == id(1) && given_up["given_up"] == true, "{rows}");
        ensure!(given_up["stays"][0]["grace"]["until_ms"].is_i64(), "{rows}");
        ensure!(row["delete"]["packs"] == 0 && row["keep"]["packs"].as_u64() > Some(1), "{rows}");
    }
    Ok(())
}

/// The coordinator, the worker, the broker and the server are gone: the repository and its key are left.
fn disaster(fleet: &Fleet, major: u32) -> anyhow::Result<()> {
    let (into, key) = (fleet.path("rescued"), fleet.path("repository.key"));
    let url = fleet.repository_url();
    let arguments = ["restore", "--repository", &url, "--key", text(&key)?, "--into", text(&into)?];
    let plan = fleet.expect(&[&arguments[..], &["--plan"]].concat())?;
    ensure!(plan.contains("recovers to"), "{plan}");
    ensure!(plan.contains("How long it takes only a coordinator knows"), "{plan}");
    ensure!(!into.exists(), "a plan writes nothing");
    fleet.expect(&arguments)?;
    let version = std::fs::read_to_string(into.join("PG_VERSION")).context("no data directory")?;
    ensure!(version.trim() == major.to_string(), "{version}");
    let again = fleet.run(&arguments)?;
    ensure!(again.code() == 5, "a restore over a restored directory is refused: {again}");
    ensure!(again.stderr.contains("TARGET_NOT_EMPTY"), "{again}");
    Ok(())
}

/// Copied by hand, with the repository and its key: the coordinator learns it from the repository, by way of the worker.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_made_by_hand_is_shown_with_its_backup() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let setup = WorkerSetup::of("w1", "orders", cluster.url());
    fleet.start_worker(&setup)?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    let backups = fleet.json(&["backups", "list", "orders", "-o", "json"])?;
    let id = backups[0]["id"].as_str().context("a backup has an id")?.to_owned();
    let shown = fleet.expect(&["backups", "show", &id])?;
    ensure!(!shown.contains("copied at"), "{shown}");

    let (key, url) = (fleet.path("repository.key"), fleet.repository_url());
    let place = format!("file://{}", text(&fleet.path("copy"))?);
    let copy = ["repo", "copy", &url, "--key", text(&key)?, &place];
    let copied = fleet.expect(&copy)?;
    ensure!(copied.contains("copied"), "{copied}");
    let listed = fleet.json(&["repo", "list", &url, "--key", text(&key)?, "-o", "json"])?;
    ensure!(listed[0]["copies"][0]["place"] == place, "{listed}");
    // A worker looks when it begins, and every ten minutes.
    let known = |fleet: &mut Fleet, of: &str, is_there: &dyn Fn(&Value) -> bool| {
        fleet.worker("w1")?.kill()?;
        fleet.start_worker(&setup)?;
        let shown = eventually(of, SOON, || {
            let shown = fleet.json(&["backups", "show", &id, "-o", "json"])?;
            Ok(is_there(&shown["copies"]).then(|| shown["copies"][0].clone()))
        });
        shown.with_context(|| fleet.said())
    };
    let first = known(&mut fleet, "the copy to be shown", &|copies| copies[0].is_object())?;
    ensure!(first["place"] == place && first["told_by"] == url, "{first}");
    ensure!(first["repository"].is_string() && first["by"].is_string(), "{first}");
    ensure!(first["copied_at_ms"] == first["checked_at_ms"], "{first}");
    let shown = fleet.expect(&["backups", "show", &id])?;
    ensure!(shown.contains(&format!("  copy         {place}, repository ")), "{shown}");
    ensure!(shown.contains("copied at 20"), "{shown}");

    // Looked after once more.
    ensure!(fleet.expect(&copy)?.contains("was there"), "it is copied");
    let later = |copies: &Value| copies[0]["checked_at_ms"] != first["checked_at_ms"];
    let second = known(&mut fleet, "the copy to be looked after", &later)?;
    ensure!(second["copied_at_ms"] == first["copied_at_ms"], "{first} {second}");
    let check = fleet.expect(&["repo", "check", &url, "--key", text(&key)?])?;
    ensure!(!check.contains("copies/"), "{check}");

    // Whoever gives it up there is heard by the next copy.
    fleet.expect(&["backup", "orders", "--wait"])?;
    fleet.expect(&copy)?;
    fleet.expect(&["repo", "delete", &place, &id, "--key", text(&key)?])?;
    ensure!(fleet.expect(&copy)?.contains("was given up there"), "it is given up");
    let none = |copies: &Value| copies.is_null();
    known(&mut fleet, "the copy not to be claimed any more", &none)?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_catalog_in_sqlite() -> anyhow::Result<()> {
    story("", 15).await
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_catalog_in_postgresql() -> anyhow::Result<()> {
    let catalog = Cluster::start_with_tcp(15).await?;
    catalog.run("CREATE DATABASE catalog").await?;
    story(&catalog.tcp_url("catalog")?, 18).await
}

#[test]
fn embedded_in_one_process() -> anyhow::Result<()> {
    let done = tests::Pgmuster::run(&["demo", "--scale", "1", "--major", "15"])?;
    ensure!(done.code() == 0, "{done}");
    ensure!(done.stdout.starts_with("demo is PROVED (L5): restored in "), "{done}");
    ensure!(done.stderr.contains("every row is as it was"), "{done}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn up_proves_the_readers_own_server_and_stops() -> anyhow::Result<()> {
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let home = tempfile::Builder::new().prefix("up").tempdir_in("/tmp")?;
    let home_text = text(home.path())?;
    let url = cluster.url();
    for _ in 0..2 {
        let done = tests::Pgmuster::run(&["up", "--once", "--home", home_text, &url])?;
        ensure!(done.code() == 0, "{done}");
        ensure!(done.stdout.contains("main is PROVED (L5)"), "{done}");
    }
    cluster.is_left_alone().await?;
    ensure!(home.path().join("recovery-sheet.txt").exists(), "there is no recovery sheet");
    let refused = tests::Pgmuster::run(&[
        "up",
        "--once",
        "--home",
        home_text,
        "postgres://nobody@127.0.0.1:1/x",
    ])?;
    ensure!(refused.code() == 8, "{refused}");
    ensure!(refused.stderr.contains("SERVER_UNREACHABLE"), "{refused}");

    // A role that may not ask where the files are has them read over connections, without being told to.
    cluster
        .run(
            "CREATE ROLE backup LOGIN REPLICATION IN ROLE pg_read_all_data;
             GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO backup",
        )
        .await?;
    let url = url.replace("postgres@", "backup@");
    let home = tempfile::Builder::new().prefix("up").tempdir_in("/tmp")?;
    let up = ["up", "--once", "--home", text(home.path())?, &url];
    let refused = tests::Pgmuster::run(&up)?;
    ensure!(refused.code() == 5 && refused.stderr.contains("PERMISSION_DENIED"), "{refused}");
    ensure!(refused.stderr.contains("pg_read_all_settings"), "{refused}");
    let grants = refused.stderr.split_once("read over connections: ");
    let grants = grants.and_then(|(_, rest)| rest.lines().next()).context("the grants")?;
    ensure!(std::fs::read_dir(home.path())?.next().is_none(), "it has begun: {refused}");
    cluster.run(grants).await?;
    let done = tests::Pgmuster::run(&up)?;
    ensure!(done.code() == 0 && done.stdout.contains("main is PROVED (L5)"), "{done}");
    ensure!(done.stderr.contains("whose files are read over connections"), "{done}");
    cluster.is_left_alone().await
}
