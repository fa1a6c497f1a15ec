//! What people get wrong, and what the world does to them: each a clear error with a code, a hint and an exit code, and
//! nothing left behind.

use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use tests::fleet::text;
use tests::{Cluster, Finished, Fleet, Pgmuster, Place, Pooler, Vhost, WorkerSetup, eventually};

const LATER: Duration = Duration::from_mins(1);

fn says(done: &Finished, exit: i32, code: &str) -> anyhow::Result<()> {
    ensure!(done.code() == exit, "exit code {exit} is expected: {done}");
    ensure!(done.stderr.contains(code), "{code} is expected: {done}");
    ensure!(done.stderr.contains("hint: "), "there is no hint: {done}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_orders_are_refused_with_a_code_a_hint_and_an_exit_code() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;

    says(&fleet.run(&["backup", "nowhere"])?, 6, "CLUSTER_UNKNOWN")?;
    says(&fleet.run(&["job", "show", "01a204d8-6ebc-7d03-9f25-5ecb5b99e2db"])?, 6, "JOB_UNKNOWN")?;
    says(&fleet.run(&["verify", "orders", "--wait"])?, 6, "BACKUP_UNKNOWN")?;
    says(
        &fleet.run(&["restore", "orders", "--into", "/etc/x", "--wait"])?,
        5,
        "TARGET_OUTSIDE_ROOTS",
    )?;
    let sneaky = fleet.path("restore/../../etc/x");
    says(&fleet.run(&["restore", "orders", "--into", text(&sneaky)?])?, 2, "REQUEST_INVALID")?;
    let done = fleet.run(&[
        "maintain",
        "orders",
        "--task",
        "analyze",
        "--database",
        "no such",
        "--wait",
    ])?;
    says(&done, 2, "REQUEST_INVALID")?;
    ensure!(fleet.run(&["backup"])?.code() == 2, "an incomplete command line is a usage error");

    fleet.expect(&["backup", "orders", "--wait"])?;
    let target = fleet.path("restore/full");
    std::fs::create_dir(&target)?;
    std::fs::write(target.join("precious"), "data")?;
    let done = fleet.run(&["restore", "orders", "--into", text(&target)?, "--wait"])?;
    says(&done, 5, "TARGET_NOT_EMPTY")?;
    ensure!(std::fs::read_to_string(target.join("precious"))? == "data", "it is still there");
    let live = cluster.server.data_directory();
    let key = fleet.path("repository.key");
    let url = fleet.repository_url();
    let arguments = ["restore", "--repository", &url, "--key", text(&key)?, "--into", text(&live)?];
    says(&fleet.run(&arguments)?, 5, "TARGET_NOT_EMPTY")?;
    ensure!(
        cluster.number("SELECT count(*) FROM public.items").await? == 5_000,
        "the live server lives"
    );

    let other = fleet.path("other.key");
    fleet.expect(&[
        "repo",
        "init",
        &format!("file://{}", fleet.path("other").display()),
        "--key",
        text(&other)?,
    ])?;
    let arguments =
        ["restore", "--repository", &url, "--key", text(&other)?, "--into", "/tmp/never"];
    let done = fleet.run(&arguments)?;
    ensure!(done.code() != 0 && done.stderr.contains("KEY_WRONG"), "{done}");
    let absent = format!("file://{}", fleet.path("absent").display());
    let done = fleet.run(&["repo", "list", &absent, "--key", text(&key)?])?;
    says(&done, 6, "REPOSITORY_MISSING")?;
    // A coordinator gives nothing up; it says where the backup is.
    let backups = fleet.json(&["backups", "list", "orders", "-o", "json"])?;
    let id = backups[0]["id"].as_str().unwrap_or_default();
    let done = fleet.run(&["backups", "delete", id])?;
    says(&done, 2, "REQUEST_INVALID")?;
    let there = format!("pgmuster backups delete {id} --repository '{url}' --key FILE");
    ensure!(done.stderr.contains(&there), "{done}");
    for list in [&["backups", "list", "nowhere"][..], &["job", "list", "--cluster", "nowhere"]] {
        says(&fleet.run(list)?, 6, "CLUSTER_UNKNOWN")?;
    }

    // As if it were no longer mounted, and as if its keys were lost: nobody could restore from there.
    let place = fleet.path("repository");
    std::fs::rename(&place, fleet.path("elsewhere"))?;
    for order in [&["backup", "orders", "--wait"], &["verify", "orders", "--wait"]] {
        says(&fleet.run(order)?, 6, "REPOSITORY_MISSING")?;
    }
    ensure!(!place.exists(), "another repository was begun there");
    std::fs::rename(fleet.path("elsewhere"), &place)?;
    std::fs::rename(place.join("keys"), fleet.path("keys"))?;
    let done = fleet.run(&["verify", "orders", "--wait"])?;
    ensure!(done.code() != 0 && done.stderr.contains("KEY_WRONG"), "{done}");
    std::fs::rename(fleet.path("keys"), place.join("keys"))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_says_every_problem_and_what_was_meant() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    let config = fleet.configure(&WorkerSetup::of("w1", "orders", "service=orders".to_owned()))?;
    fleet.expect(&["config", "check", text(&config)?])?;
    let shown = fleet.expect(&["config", "show", text(&config)?, "--origin"])?;
    ensure!(shown.contains("default slots.routine = 2"), "{shown}");
    ensure!(shown.contains("file    name = \"w1\""), "{shown}");
    let good = std::fs::read_to_string(&config)?;
    std::fs::write(&config, good.replace("restore_roots", "restore_rots"))?;
    let done = fleet.run(&["config", "check", text(&config)?])?;
    says(&done, 2, "CONFIG_INVALID")?;
    ensure!(done.stderr.contains("Did you mean `restore_roots`?"), "{done}");
    let done = Pgmuster::run(&["worker", "--config", text(&config)?])?;
    says(&done, 2, "CONFIG_INVALID")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_coordinator_that_is_not_there_is_told_as_such() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    says(&fleet.run(&["status"])?, 8, "COORDINATOR_UNREACHABLE")?;
    let done = fleet.run(&["doctor"])?;
    ensure!(done.code() == 3, "{done}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broker_that_comes_later_is_waited_for() -> anyhow::Result<()> {
    let mut rabbit = tests::Rabbit::start()?;
    rabbit.stop()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&rabbit.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    rabbit.start_again()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    fleet.expect(&["maintain", "orders", "--task", "analyze", "--wait"])?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_role_without_rights_is_told_the_exact_grant() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    cluster.run("CREATE ROLE weak LOGIN; GRANT pg_read_all_settings TO weak").await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let connection =
        cluster.url().replace("postgres@", "weak@").replace("user=postgres", "user=weak");
    fleet.start_worker(&WorkerSetup::of("w1", "orders", connection))?;
    let done = fleet.run(&["backup", "orders", "--wait"])?;
    ensure!(done.code() != 0, "{done}");
    ensure!(done.stderr.contains("PERMISSION_DENIED"), "{done}");
    let cure = done.stderr.contains("GRANT") || done.stderr.contains("ALTER ROLE");
    ensure!(cure, "the cure is a statement: {done}");
    cluster.is_left_alone().await?;
    ensure!(fleet.backups()? == 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_before_the_server_is_refused_and_leaves_nothing() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let pooler = Pooler::start(&cluster.server, "transaction")?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    // One address, behind which the server stands, and then the pooler.
    let (door, server) = (fleet.path("door"), &cluster.server);
    std::fs::create_dir(&door)?;
    let socket = door.join(".s.PGSQL.6543");
    let behind_it = |other: &std::path::Path| {
        drop(std::fs::remove_file(&socket));
        std::os::unix::fs::symlink(other, &socket)
    };
    let straight = server.socket_directory().join(format!(".s.PGSQL.{}", server.port()));
    let connection = format!("host={} port=6543 user=postgres dbname=postgres", door.display());
    let setup = WorkerSetup::of("w1", "orders", connection);
    behind_it(&straight)?;
    fleet.start_worker(&setup)?;

    // The worker finds it when it begins.
    behind_it(&pooler.socket())?;
    let done = fleet.run(&["backup", "orders", "--wait"])?;
    says(&done, 5, "POOLER_DETECTED")?;
    ensure!(done.stderr.contains("straight to the server"), "the cure is told: {done}");
    ensure!(fleet.backups()? == 0);

    // It knows before it begins: the job is not given out, and whoever waits for it is told why.
    fleet.worker("w1")?.kill()?;
    fleet.start_worker(&setup)?;
    eventually("the new worker to tell what it found", LATER, || {
        let doctor = fleet.run(&["doctor"])?;
        ensure!(doctor.code() == 3 && doctor.stdout.contains("POOLER_DETECTED"), "{doctor}");
        Ok(Some(()))
    })?;
    let mut command = fleet.start(&["backup", "orders", "--wait"])?;
    let told = command.wait_for_line("POOLER_DETECTED", LATER).with_context(|| fleet.said())?;
    ensure!(told.contains("worker w1 cannot use orders"), "{told}");

    // Its own connections to the server end with the pooler; what would be left after that is ours.
    drop(pooler);
    cluster.is_left_alone().await?;
    behind_it(&straight)?;
    fleet.worker("w1")?.kill()?;
    fleet.start_worker(&setup)?;
    let done = command.wait(LATER)?;
    ensure!(done.code() == 0, "the waiting job runs by itself: {done}\n{}", fleet.said());
    ensure!(fleet.backups()? == 1);
    cluster.is_left_alone().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_repository_fails_the_proof_and_is_remembered() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;
    let pack = largest_file(&fleet.path("repository"))?.context("the repository is empty")?;
    let mut bytes = std::fs::read(&pack)?;
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::set_permissions(&pack, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    std::fs::write(&pack, bytes)?;
    let done = fleet.run(&["verify", "orders", "--level", "5", "--wait"])?;
    ensure!(done.code() == 1, "{done}\n{}", fleet.said());
    ensure!(done.stdout.contains("NOT proved"), "{done}");
    ensure!(done.stderr.contains("PROOF_FAILED"), "{done}");
    ensure!(fleet.sandboxes()?.is_empty(), "{:?}", fleet.sandboxes()?);
    let status = fleet.run(&["status"])?;
    ensure!(status.code() == 3, "a failed proof is a finding: {status}");
    Ok(())
}

fn largest_file(directory: &std::path::Path) -> anyhow::Result<Option<std::path::PathBuf>> {
    let mut largest = None;
    let mut open = vec![directory.to_owned()];
    while let Some(directory) = open.pop() {
        for entry in std::fs::read_dir(directory)? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            if metadata.is_dir() {
                open.push(entry.path());
            } else {
                largest = largest.max(Some((metadata.len(), entry.path())));
            }
        }
    }
    Ok(largest.map(|(_, path)| path))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_is_cancelled_on_evidence_and_can_be_tried_again() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let setup = WorkerSetup::of("w1", "orders", cluster.url());
    fleet.start_worker(&setup.clone().failing_at("copy=pause"))?;
    let job = fleet.order(&["backup", "orders"])?;
    fleet.await_step(job, "copy")?;
    fleet.expect(&["job", "cancel", &job.to_string()])?;
    fleet.await_state(job, &["cancelled"], LATER)?;
    cluster.is_left_alone().await?;
    fleet.worker("w1")?.kill()?;
    fleet.start_worker(&setup)?;
    fleet.expect(&["job", "retry", &job.to_string(), "--wait"])?;
    ensure!(fleet.backups()? == 1);
    Ok(())
}
