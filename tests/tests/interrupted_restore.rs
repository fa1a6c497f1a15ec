//! A restore that is killed in the middle, more than once, and goes on; one that begins where another is at it; a damaged directory
//! that is mended by a job.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use tests::fleet::text;
use tests::{Bucket, Cluster, Fleet, Pgmuster, Place, Proxy, Vhost, WorkerSetup, eventually};

const SOON: Duration = Duration::from_mins(1);

/// Whether two directories hold the same, byte for byte.
fn same(one: &Path, other: &Path) -> anyhow::Result<()> {
    let compared =
        Command::new("diff").args(["-r", "--no-dereference"]).args([one, other]).output()?;
    ensure!(compared.status.success(), "{}", String::from_utf8_lossy(&compared.stdout));
    Ok(())
}

fn words(owned: &[String]) -> Vec<&str> {
    owned.iter().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_restore_goes_on_and_a_job_mends_a_damaged_directory() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    cluster
        .run(
            "CREATE TABLE public.noise AS
             SELECT g, md5(g::text) || md5((-g)::text) AS noise FROM generate_series(1, 100000) g",
        )
        .await?;
    let bucket = Bucket::create().await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::S3(bucket.clone()))?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    fleet.expect(&["backup", "orders", "--wait"])?;

    // With the key alone, through a network that stops in the middle.
    let port = bucket.endpoint().rsplit(':').next().and_then(|port| port.parse().ok());
    let port = port.context("the S3 server has a port")?;
    let key = fleet.path("repository.key");
    let restore = |proxy: &Proxy, into: &Path| -> anyhow::Result<Vec<String>> {
        let through = bucket.through(proxy.port());
        let url = fleet.repository_url().replace(bucket.endpoint(), through.endpoint());
        let words = ["restore", "--repository", &url, "--key", text(&key)?, "--into", text(into)?];
        Ok(words.map(str::to_owned).to_vec())
    };
    let whole = fleet.path("whole");
    let proxy = Proxy::to(port)?;
    fleet.expect(&words(&restore(&proxy, &whole)?))?;
    let all_bytes = proxy.forwarded_bytes();
    let (into, marker) = (fleet.path("killed"), "pgmuster-restore-incomplete");
    for part in [3, 1] {
        let proxy = Proxy::to(port)?;
        proxy.stall_after(all_bytes * part / 5);
        let mut restoring = fleet.start(&words(&restore(&proxy, &into)?))?;
        eventually("it waits for the store", SOON, || Ok(proxy.has_stalled().then_some(())))?;
        ensure!(!restoring.has_ended()?, "it cannot have ended: {}", restoring.said());
        // Two at once would write into each other's files.
        let beside = Proxy::to(port)?;
        let second = fleet.run(&words(&restore(&beside, &into)?))?;
        ensure!(
            second.code() == 5
                && second.stderr.contains("TARGET_NOT_EMPTY")
                && second.stderr.contains("another restore is writing there"),
            "{second}"
        );
        restoring.kill()?;
        ensure!(into.join(marker).exists(), "it had begun");
        ensure!(!into.join("global/pg_control").exists(), "half of it does not start");
    }
    let proxy = Proxy::to(port)?;
    let done = fleet.expect(&words(&restore(&proxy, &into)?))?;
    ensure!(!into.join(marker).exists(), "{done}");
    same(&whole, &into)?;

    // Two that begin at the same moment: one of them does it.
    let into = fleet.path("raced");
    let proxy = Proxy::to(port)?;
    let race = restore(&proxy, &into)?;
    let (one, other) = (fleet.start(&words(&race))?, fleet.start(&words(&race))?);
    let ended = [one.wait(SOON)?, other.wait(SOON)?];
    let codes = ended.each_ref().map(tests::Finished::code);
    ensure!(codes == [0, 5] || codes == [5, 0], "{}\n{}", ended[0], ended[1]);
    let refused = if codes[0] == 5 { &ended[0] } else { &ended[1] };
    ensure!(refused.stderr.contains("TARGET_NOT_EMPTY"), "{refused}");
    same(&whole, &into)?;

    // Root's files are of no use to a server, which is told.
    let into = fleet.path("of-root");
    let owned = restore(&proxy, &into)?;
    let keys = [("AWS_ACCESS_KEY_ID", "AK"), ("AWS_SECRET_ACCESS_KEY", "SKSKSKSK")];
    let under = ["unshare", "--user", "--map-root-user", "--"].map(str::to_owned);
    let done = Pgmuster::start_under(&under, &words(&owned), |command| {
        command.envs(keys);
    })?;
    let done = done.wait(SOON)?;
    ensure!(done.code() == 0 && done.stderr.contains("chown -R postgres:"), "{done}");

    // Through the queue.
    let into = fleet.path("restore/orders");
    let job = ["restore", "orders", "--into", text(&into)?, "--wait"];
    fleet.expect(&job)?;
    std::fs::write(into.join("PG_VERSION"), "99\n")?;
    std::fs::write(into.join("base/somebodys"), "data")?;
    let refused = fleet.run(&job)?;
    ensure!(refused.code() == 5 && refused.stderr.contains("TARGET_NOT_EMPTY"), "{refused}");
    let delta = [&job[..], &["--delta"]].concat();
    let plan = fleet.expect(&[&delta[..], &["--plan"]].concat())?;
    ensure!(
        plan.contains("base/somebodys, 4 bytes") && plan.contains("are right already"),
        "{plan}"
    );
    ensure!(into.join("base/somebodys").exists(), "a plan touches nothing");
    let done = fleet.expect(&delta)?;
    ensure!(done.contains("were right already"), "{done}");
    same(&whole, &into)
}
