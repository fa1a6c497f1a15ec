//! The runbooks, each executed as it is written: its fenced `sh` blocks, in order, in one shell, with the variables that its
//! `env` block names.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use anyhow::{Context as _, ensure};
use postgres::instance::{InstanceOptions, StopMode};
use rustix::process::{Pid, Signal};
use tests::fleet::text;
use tests::{
    Bucket, Cluster, Finished, Fleet, Place, SOON, Vhost, WorkerSetup, bucket, eventually_async,
    services,
};

use crate::desk::{Desk, mode, root};

/// A page of a cluster.
const PAGE: u64 = 8192;

/// A server that archives, a backup of it, and rows since.
struct Production {
    desk: Desk,
    cluster: Cluster,
    url: String,
}

impl Production {
    async fn create() -> anyhow::Result<Self> {
        let desk = Desk::new()?;
        let url = format!("file://{}", desk.at("repository"));
        Self::create_at(desk, url).await
    }

    /// The same with its repository in a bucket.
    async fn create_in(bucket: &Bucket) -> anyhow::Result<Self> {
        let (name, endpoint) = (bucket.name(), bucket.endpoint());
        let url = format!("s3://{name}/r?endpoint={endpoint}&region=us-east-1&path-style=true");
        Self::create_at(Desk::new()?, url).await
    }

    async fn create_at(mut desk: Desk, url: String) -> anyhow::Result<Self> {
        let keys = ["--key", &desk.at("key"), "--recovery-key", &desk.at("recovery.key")];
        desk.expect(&[&["pgmuster", "repo", "init", &url], &keys[..]].concat())?;
        let push = format!(
            "env AWS_ACCESS_KEY_ID={} AWS_SECRET_ACCESS_KEY={} {} wal push %p --new --repository '{url}' --key {} --cluster orders",
            bucket::ACCESS_KEY,
            bucket::SECRET_KEY,
            services::pgmuster()?.display(),
            desk.at("key")
        );
        let settings = [("archive_mode", "on"), ("archive_command", push.as_str())];
        let settings = settings.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let options = InstanceOptions {
            settings: settings.to_vec(),
            wal_segment_size_mb: Some(1),
            ..InstanceOptions::default()
        };
        let cluster = Cluster::start(15, options).await?;
        desk.sit_at(&cluster);
        let from = ["pgmuster", "backup", "orders", "--server", &cluster.url()];
        let to = ["--repository", &url, "--key", &desk.at("key")];
        desk.expect(&[&from[..], &to].concat())?;
        let late = "INSERT INTO public.items SELECT g, 'late' FROM generate_series(5001, 6000) g";
        cluster.run(late).await?;
        Ok(Self { desk, cluster, url })
    }

    /// Waits until all that was written so far is in the archive.
    async fn archived(&self) -> anyhow::Result<()> {
        let last = self.asks("SELECT pg_walfile_name(pg_switch_wal())")?;
        let query =
            format!("SELECT count(*) FROM pg_stat_archiver WHERE last_archived_wal >= '{last}'");
        eventually_async(format!("{last} in the archive"), SOON, async || {
            Ok((self.cluster.number(&query).await? == 1).then_some(()))
        })
        .await
    }

    /// Follows a runbook with the repository, its key and these values.
    fn follow(&self, runbook: &str, values: &[(&str, &str)]) -> anyhow::Result<Finished> {
        let key = self.desk.at("key");
        let of = [("REPOSITORY", self.url.as_str()), ("KEY", key.as_str())];
        follow(&self.desk, runbook, &[&of[..], values].concat())
    }

    /// What `psql` says to a question.
    fn asks(&self, question: &str) -> anyhow::Result<String> {
        self.desk.expect(&["psql", "-AtXc", question])
    }
}

/// What is between the fences of this kind, without the indentation of the list that they are in.
fn blocks(text: &str, kind: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let indented = line.len() - line.trim_start().len();
        if line.trim_start().strip_prefix("```") != Some(kind) {
            continue;
        }
        let inside = lines.by_ref().take_while(|line| line.trim() != "```");
        let inside: Vec<&str> = inside.map(|line| line.get(indented..).unwrap_or("")).collect();
        found.push(inside.join("\n"));
    }
    found
}

/// Follows a runbook to its end. Every command must succeed.
fn follow(desk: &Desk, runbook: &str, values: &[(&str, &str)]) -> anyhow::Result<Finished> {
    let path = root().join("docs/runbooks").join(runbook).with_extension("md");
    let page = std::fs::read_to_string(path)?;
    let names: Vec<String> = blocks(&page, "env")
        .iter()
        .flat_map(|block| block.lines())
        .filter_map(|line| Some(line.split_once('=')?.0.to_owned()))
        .collect();
    let asked: BTreeSet<&str> = names.iter().map(String::as_str).collect();
    let given: BTreeSet<&str> = values.iter().map(|(name, _)| *name).collect();
    ensure!(asked == given, "{runbook}.md asks for {asked:?}, the test gives {given:?}");

    let mut script = "set -eu\n".to_owned();
    let steps = blocks(&page, "sh");
    ensure!(steps.len() > 2, "{runbook}.md has nothing to execute");
    for (number, step) in (1..).zip(&steps) {
        writeln!(script, "echo '=== block {number} of {runbook}.md' >&2\n{step}")?;
    }
    let mut command = desk.command(&["sh", "-c", &script, runbook])?;
    command.envs(values.iter().copied());
    let done = tests::Pgmuster::spawn(command)?.wait(SOON * 2)?;
    ensure!(done.code() == 0, "{runbook}.md: {done}");
    Ok(done)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dropped_table_comes_back_out_of_a_copy() -> anyhow::Result<()> {
    let mut production = Production::create().await?;
    let copy = production.desk.at("copy");
    production.desk.starts(production.desk.path("copy"));
    let mistake = "BEGIN; CREATE TABLE public.mistake AS SELECT txid_current() AS xid; DROP TABLE public.items; COMMIT";
    production.cluster.run(mistake).await?;
    production.cluster.run("CREATE TABLE public.later AS SELECT 1 AS id").await?;
    let moment = format!("xid:{}", production.asks("SELECT xid FROM public.mistake")?);
    let values = [
        ("DATABASE", "postgres"),
        ("TABLE", "public.items"),
        ("MOMENT", moment.as_str()),
        ("COPY", copy.as_str()),
        ("PORT", "6543"),
    ];
    let done = production.follow("dropped-table", &values)?;
    ensure!(done.stdout.contains("recovery stopping before commit of transaction"), "{done}");
    ensure!(production.asks("SELECT count(*) FROM public.items")? == "6000", "{done}");
    ensure!(production.asks("SELECT count(*) FROM public.later")? == "1", "{done}");
    ensure!(!production.desk.path("copy").exists(), "the copy is removed");
    // The copy had a timeline of its own, and archived none of it.
    production.archived().await?;
    let windows = ["pgmuster", "recovery", "windows", &production.url, "-o", "json"];
    let windows =
        production.desk.expect(&[&windows[..], &["--key", &production.desk.at("key")]].concat())?;
    ensure!(!windows.contains("\"timeline\": 2"), "{windows}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_server_is_replaced_with_all_that_was_archived() -> anyhow::Result<()> {
    let mut production = Production::create().await?;
    production.archived().await?;
    production.cluster.server.kill9();
    std::fs::remove_dir_all(production.cluster.server.data_directory())?;
    let new = production.desk.path("new");
    production.desk.starts(new.clone());
    let done =
        production.follow("lost-server", &[("CLUSTER", "orders"), ("PGDATA", text(&new)?)])?;
    ensure!(done.stdout.contains("the server is open on timeline 2"), "{done}");
    ensure!(production.asks("SELECT count(*) FROM public.items")? == "6000", "{done}");
    let key = production.desk.at("key");
    ensure!(production.desk.backups(&production.url, &key)?.len() == 2, "{done}");
    // It archives, as the lost one did.
    production.archived().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupted_page_is_mended_and_nothing_else_is_lost() -> anyhow::Result<()> {
    let mut production = Production::create().await?;
    let path = production.asks("SELECT pg_relation_filepath('public.items')")?;
    let data = production.cluster.server.data_directory();
    production.cluster.server.stop(StopMode::Fast).await?;
    let file = std::fs::File::options().write(true).open(data.join(path))?;
    file.write_all_at(&[0x5a; 512], 3 * PAGE + 1024)?;
    production.cluster.server.start().await?;
    let count = "SELECT count(*) FROM public.items";
    let broken = production.desk.run(&["psql", "-AtXc", count])?;
    ensure!(broken.stderr.contains("invalid page in block 3"), "{broken}");
    production.cluster.run("CREATE TABLE public.later AS SELECT 1 AS id").await?;
    let (key, server) = (production.desk.at("key"), production.cluster.url());
    let backup = ["pgmuster", "backup", "orders", "--server", &server, "--key", &key];
    let backup =
        production.desk.run(&[&backup[..], &["--repository", &production.url]].concat())?;
    ensure!(backup.code() == 3, "whoever orders a backup is told: {backup}");
    ensure!(backup.stdout.contains("; 1 page with a wrong checksum (PAGE_CHECKSUM)"), "{backup}");

    production.desk.starts(data.clone());
    let aside = production.desk.at("aside");
    let values = [("CLUSTER", "orders"), ("PGDATA", text(&data)?), ("ASIDE", aside.as_str())];
    let done = production.follow("corrupted-page", &values)?;
    ensure!(done.stdout.contains("is newer, and holds pages that had wrong checksums"), "{done}");
    ensure!(done.stdout.contains("were right already"), "only what differs is fetched: {done}");
    ensure!(production.asks(count)? == "6000", "{done}");
    ensure!(production.asks("SELECT count(*) FROM public.later")? == "1", "{done}");
    ensure!(!production.desk.path("aside").exists(), "{done}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_key_is_replaced_by_another_one_or_by_a_new_repository() -> anyhow::Result<()> {
    let production = Production::create().await?;
    production.archived().await?;
    let desk = &production.desk;
    let lost = std::fs::read_to_string(desk.path("key"))?;
    let lost = lost.lines().find_map(|line| line.strip_prefix("pgmuster-key-1 "));
    let lost = lost.and_then(|rest| rest.split(' ').next()).context("find the key's id")?;
    std::fs::rename(desk.path("key"), desk.path("stolen"))?;
    let (key, other) = (desk.at("new.key"), desk.at("recovery.key"));
    let (new_key, new_repository) =
        (desk.at("second.key"), format!("file://{}", desk.at("second")));
    let values = [
        ("REPOSITORY", production.url.as_str()),
        ("KEY", key.as_str()),
        ("OTHER", other.as_str()),
        ("LOST", lost),
        ("CLUSTER", "orders"),
        ("NEW_REPOSITORY", new_repository.as_str()),
        ("NEW_KEY", new_key.as_str()),
    ];
    let done = follow(desk, "lost-key", &values)?;
    ensure!(desk.backups(&production.url, &key)?.len() == 1, "{done}");
    let stolen = desk.at("stolen");
    let stolen = desk.run(&["pgmuster", "repo", "list", &production.url, "--key", &stolen])?;
    ensure!(stolen.code() == 11 && stolen.stderr.contains("KEY_WRONG"), "{stolen}");
    ensure!(desk.backups(&new_repository, &format!("{new_key}.recovery"))?.len() == 1, "{done}");
    for sheet in [&key, &new_key] {
        let sheet = format!("{sheet}.sheet");
        ensure!(std::fs::read_to_string(&sheet)?.contains("pgmuster-key-1"), "{sheet}");
        ensure!(mode(&sheet)? == 0o600, "{sheet} can be read by others");
    }
    production.archived().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_for_developers_knows_nothing_of_production() -> anyhow::Result<()> {
    let mut production = Production::create().await?;
    production.cluster.run("CREATE ROLE app LOGIN PASSWORD 'secret'").await?;
    production.cluster.run("CREATE SUBSCRIPTION feed CONNECTION 'host=/nowhere' PUBLICATION p WITH (connect = false)").await?;
    let key = production.desk.at("key");
    let server = production.cluster.url();
    let backup = ["pgmuster", "backup", "orders", "--server", &server, "--key", &key];
    production.desk.expect(&[&backup[..], &["--repository", &production.url]].concat())?;
    production.desk.starts(production.desk.path("clone"));
    let clone = production.desk.at("clone");
    // At an address that nobody's outgoing connection takes.
    let password = production.desk.write("password", "not production's\n", 0o600)?;
    let values = [
        ("CLUSTER", "orders"),
        ("CLONE", clone.as_str()),
        ("PORT", "6543"),
        ("LISTEN", "127.0.0.77"),
        ("DEVELOPERS", "127.0.0.0/8"),
        ("PASSWORD_FILE", password.as_str()),
    ];
    let done = production.follow("clone-for-development", &values)?;
    ensure!(done.stdout.contains("clone of orders | off"), "{done}");
    ensure!(
        done.stdout.contains("ALTER ROLE") && done.stdout.contains("DROP SUBSCRIPTION"),
        "{done}"
    );
    ensure!(!production.desk.path("clone").exists(), "{done}");
    let kept = "SELECT count(*) FROM pg_subscription, pg_authid WHERE rolname = 'app' AND rolpassword IS NOT NULL";
    ensure!(production.asks(kept)? == "1", "production is as it was");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_moves_to_another_major_version_with_every_row() -> anyhow::Result<()> {
    let mut production = Production::create().await?;
    let new = Cluster::start(18, InstanceOptions::default()).await?;
    new.run("DROP TABLE public.items, public.parts").await?;
    let path = production.desk.get("PATH")?;
    let path = format!("{}:{path}", services::postgres_bin(18)?.display());
    production.desk.set("PATH", path);
    let connection = |cluster: &Cluster| {
        let socket = cluster.server.socket_directory().display().to_string();
        format!("host={socket} port={} user=postgres dbname=postgres", cluster.server.port())
    };
    let (from, to) = (connection(&production.cluster), connection(&new));
    let values = [("CLUSTER", "orders"), ("OLD", from.as_str()), ("NEW", to.as_str())];
    let done = production.follow("migration", &values)?;
    ensure!(done.stdout.contains("items|6000"), "{done}");
    ensure!(new.number("SELECT count(*) FROM public.items").await? == 6000, "{done}");
    ensure!(
        new.number("SELECT count(*) FROM pg_stats WHERE tablename = 'items'").await? > 0,
        "{done}"
    );
    // It was only a rehearsal: the old one takes writes again.
    production.cluster.run("INSERT INTO public.items VALUES (0, 'again')").await?;
    new.is_left_alone().await?;
    production.cluster.is_left_alone().await
}

#[tokio::test(flavor = "multi_thread")]
async fn deleted_objects_come_back_from_a_second_copy() -> anyhow::Result<()> {
    let bucket = Bucket::create().await?;
    let production = Production::create_in(&bucket).await?;
    production.archived().await?;
    let (desk, url) = (&production.desk, production.url.as_str());
    let mirror = format!("file://{}", desk.at("mirror"));
    let key = desk.at("key");
    desk.expect(&["pgmuster", "repo", "copy", url, "--key", &key, &mirror])?;
    let keys = bucket.keys("r/lineages/").await?;
    let packs: Vec<&String> = keys.iter().filter(|key| key.contains("/packs/")).collect();
    ensure!(!packs.is_empty(), "{keys:?}");
    for pack in packs {
        bucket.client().delete_object().bucket(bucket.name()).key(pack).send().await?;
    }
    let backup = desk.backups(url, &key)?[0]["backup"].as_str().unwrap_or_default().to_owned();
    let values = [("CLUSTER", "orders"), ("MIRROR", mirror.as_str())];
    let done = production.follow("deleted-objects", &values)?;
    ensure!(done.stdout.contains("it is missing"), "{done}");
    ensure!(done.stdout.contains("was there, repaired"), "{done}");
    ensure!(desk.backups(url, &key)?.len() == 2, "{done}");
    let into = desk.at("restored");
    let restore = ["pgmuster", "restore", "--repository", url, "--key", &key, "--into", &into];
    desk.expect(&[&restore[..], &["--backup", &backup]].concat())?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_takes_over_and_the_old_primary_follows_it() -> anyhow::Result<()> {
    let mut production = Production::create().await?;
    production.archived().await?;
    let (standby, key) = (production.desk.at("standby"), production.desk.at("key"));
    let restore = ["pgmuster", "restore", "--repository", &production.url, "--key", &key];
    let as_standby = ["--into", standby.as_str(), "--standby", "--keep-archiving"];
    production.desk.expect(&[&restore[..], &as_standby[..]].concat())?;
    production.desk.starts(production.desk.path("standby"));
    let log = production.desk.at("standby.log");
    // Not in its settings: whoever is restored from a backup of it would have them.
    let socket = format!("-c unix_socket_directories={standby}");
    let start = ["pg_ctl", "start", "-w", "-s", "-D", &standby, "-l", &log, "-o", &socket];
    production.desk.expect(&start)?;
    let old = production.cluster.server.data_directory();
    production.cluster.server.kill9();

    production.desk.set("PGHOST", &standby);
    production.desk.starts(old.clone());
    let values = [("CLUSTER", "orders"), ("OLD_PGDATA", text(&old)?)];
    let done = production.follow("failover", &values)?;
    ensure!(production.asks("SELECT count(*) FROM public.items")? == "6000", "{done}");
    let primary = production.asks("SELECT timeline_id FROM pg_control_checkpoint()")?;
    ensure!(primary == "2", "{done}");
    production.asks("INSERT INTO public.items VALUES (0, 'on the new primary')")?;
    production.asks("SELECT pg_switch_wal()")?;
    let follows = "SELECT pg_is_in_recovery()::int * count(*) FROM public.items WHERE id = 0";
    eventually_async("the old primary to follow the new one", SOON, async || {
        Ok((production.cluster.number(follows).await? == 1).then_some(()))
    })
    .await
}

/// A program that a runbook has left running, by the file with its process.
struct LeftRunning(PathBuf);

impl Drop for LeftRunning {
    fn drop(&mut self) {
        let process = std::fs::read_to_string(&self.0).ok();
        let process = process.and_then(|text| Pid::from_raw(text.trim().parse().ok()?));
        if let Some(process) = process {
            let _ = rustix::process::kill_process(process, Signal::KILL);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_coordinator_takes_over_workers_and_repository() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    fleet.start_worker(&WorkerSetup::of("w1", "orders", cluster.url()))?;
    let before = fleet.expect(&["backup", "orders", "--verify", "5", "--wait"])?;
    ensure!(before.contains("orders is PROVED"), "{before}");
    fleet.coordinator()?.kill()?;
    fleet.worker("w1")?.kill()?;
    for lost in ["catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm", "signing.key"] {
        std::fs::remove_file(fleet.path(lost)).or_else(|error| match error.kind() {
            std::io::ErrorKind::NotFound => Ok(()),
            _ => Err(error),
        })?;
    }

    let mut desk = Desk::new()?;
    desk.set("PGMUSTER_COORDINATOR", text(&fleet.path("c.sock"))?);
    let place = |name: &str| fleet.path(name).display().to_string();
    let starts = |role: &str, config: &str, process: &str| {
        format!("pgmuster {role} --config {config} >{process}.log 2>&1 & echo $! >{process}")
    };
    let (coordinator, worker) = (place("coordinator.pid"), place("worker.pid"));
    let _left = [&coordinator, &worker].map(|process| LeftRunning(process.into()));
    let (coordinator_config, worker_config) = (place("coordinator.toml"), place("w1.toml"));
    let (url, key, signing_key) =
        (fleet.repository_url(), place("repository.key"), place("signing.key"));
    let token = place("alice.token");
    let values = [
        ("REPOSITORY", url.as_str()),
        ("KEY", key.as_str()),
        ("COORDINATOR_CONFIG", coordinator_config.as_str()),
        ("SIGNING_KEY", signing_key.as_str()),
        ("START_COORDINATOR", &starts("coordinator", &coordinator_config, &coordinator)),
        ("WORKER_CONFIG", worker_config.as_str()),
        ("WORKER", "w1"),
        ("SITE", "fra1"),
        ("STOP_WORKER", "true"),
        ("START_WORKER", &starts("worker", &worker_config, &worker)),
        ("CLUSTER", "orders"),
        ("PERSON", "alice"),
        ("TOKEN_FILE", token.as_str()),
    ];
    let done = follow(&desk, "lost-coordinator", &values)?;
    ensure!(done.stdout.contains("orders is PROVED (L5)"), "{done}");
    ensure!(mode(&signing_key)? == 0o600 && mode(&token)? == 0o600, "{done}");
    let secret = std::fs::read_to_string(&token)?;
    ensure!(secret.trim().len() > 20 && !done.to_string().contains(secret.trim()), "{done}");
    let (status, tokens) = fleet.http("GET", "/v1/tokens", &[], "")?;
    ensure!(status == 200 && tokens.contains("\"alice\""), "{tokens}");
    let backups = desk.backups(&url, &key)?;
    ensure!(backups.len() == 2, "the old backup is there: {backups:?}");
    cluster.is_left_alone().await
}

#[test]
fn no_runbook_is_without_a_test() -> anyhow::Result<()> {
    let tests = include_str!("runbooks.rs");
    let mut pages = 0;
    for entry in std::fs::read_dir(root().join("docs/runbooks"))? {
        let path = entry?.path();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        ensure!(tests.contains(&format!("\"{name}\"")), "nothing executes {name}.md");
        pages += 1;
    }
    ensure!(pages > 0, "there are no runbooks");
    Ok(())
}
