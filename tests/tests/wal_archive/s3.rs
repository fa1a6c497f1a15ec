//! The same archive in a bucket, which a server reaches over a network that is slow, silent or cut.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, ensure};
use postgres::instance::{Instance, StopMode};
use proto::Timeline;
use tests::{Bucket, Pgmuster, Proxy, bucket, services};

use super::{
    ROWS, SOON, command, copy, eventually_async, execute, fails, make, number, opens, options,
    recover, text, timeline, work,
};

/// A repository in a bucket, and its key.
struct Far {
    place: tempfile::TempDir,
    bucket: Bucket,
}

impl Far {
    async fn create() -> anyhow::Result<Self> {
        let far = Self { place: tempfile::tempdir()?, bucket: Bucket::create().await? };
        let made = Self::start(&["repo", "init", &far.url(), "--key", &far.key()])?.wait(SOON)?;
        ensure!(made.code() == 0, "{made}");
        Ok(far)
    }

    fn proxy(&self) -> anyhow::Result<Proxy> {
        let port = self.bucket.endpoint().rsplit(':').next().context("a port")?.parse()?;
        Proxy::to(port)
    }

    fn url(&self) -> String {
        Self::url_of(&self.bucket)
    }

    fn url_through(&self, proxy: &Proxy) -> String {
        Self::url_of(&self.bucket.through(proxy.port()))
    }

    fn url_of(bucket: &Bucket) -> String {
        let (name, endpoint, region) = (bucket.name(), bucket.endpoint(), bucket::REGION);
        format!("s3://{name}/r?endpoint={endpoint}&path-style=true&region={region}")
    }

    fn key(&self) -> String {
        self.place.path().join("key").display().to_string()
    }

    fn socket(&self) -> String {
        self.place.path().join("wal.sock").display().to_string()
    }

    fn start(words: &[&str]) -> anyhow::Result<Pgmuster> {
        Pgmuster::start_with(words, |command| {
            command
                .env("AWS_ACCESS_KEY_ID", bucket::ACCESS_KEY)
                .env("AWS_SECRET_ACCESS_KEY", bucket::SECRET_KEY);
        })
    }

    /// A command of a server, which has no credentials of its own.
    fn command(&self, words: &[&str], proxy: &Proxy) -> anyhow::Result<String> {
        let (url, key) = (format!("'{}'", self.url_through(proxy)), self.key());
        let of = ["--repository", &url, "--key", &key, "--cluster", "orders"].map(str::to_owned);
        let (id, secret) = (bucket::ACCESS_KEY, bucket::SECRET_KEY);
        let command = command(words, &of)?;
        Ok(format!("env AWS_ACCESS_KEY_ID={id} AWS_SECRET_ACCESS_KEY={secret} {command}"))
    }

    fn serve(&self, proxy: &Proxy) -> anyhow::Result<Pgmuster> {
        let (url, key) = (self.url_through(proxy), self.key());
        let words = ["wal", "serve", &self.socket(), "--repository", &url, "--key", &key];
        let mut service = Self::start(&words)?;
        service.wait_for_line("Answers at", SOON)?;
        Ok(service)
    }
}

/// A restored data directory whose server is started by hand; it ends with this.
struct ByHand {
    programs: PathBuf,
    directory: PathBuf,
}

impl ByHand {
    /// Starts the server as an administrator does, with these variables. Says whether it takes connections.
    fn starts(&self, variables: &[(&str, &str)]) -> anyhow::Result<bool> {
        let log = self.directory.join("start.log");
        let mut start = Command::new(self.programs.join("pg_ctl"));
        start.args(["start", "-s", "-w", "-t", "60", "-l"]).arg(log).arg("-D").arg(&self.directory);
        for name in ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"] {
            start.env_remove(name);
        }
        Ok(start.envs(variables.iter().copied()).status()?.success())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("start.log")).unwrap_or_default()
    }
}

impl Drop for ByHand {
    fn drop(&mut self) {
        let mut stop = Command::new(self.programs.join("pg_ctl"));
        let _ = stop.args(["stop", "-s", "-m", "immediate", "-D"]).arg(&self.directory).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_recovers_out_of_a_bucket_with_the_credentials_that_it_is_given()
-> anyhow::Result<()> {
    let far = Far::create().await?;
    let proxy = far.proxy()?;
    let push = far.command(&["push", "%p", "--new"], &proxy)?;
    let settings = [("archive_mode", "on"), ("archive_command", push.as_str())];
    let mut primary =
        make(15, &far.place.path().join("primary"), options(&settings, Some(1))).await?;
    primary.start().await?;
    execute(&primary, &["CREATE TABLE t (n int, pad text)"]).await?;
    let (server, url, key) = (primary.url("postgres"), far.url(), far.key());
    let backup = ["backup", "orders", "--server", &server, "--repository", &url, "--key", &key];
    let taken = Far::start(&backup)?.wait(SOON)?;
    ensure!(taken.code() == 0, "{taken}");
    work(&primary, 1).await?;
    let rows = number(&primary, ROWS).await?;
    let position = text(&primary, "SELECT pg_current_wal_insert_lsn()::text").await?;
    work(&primary, 1).await?;
    primary.stop(StopMode::Fast).await?;

    // It is where the first one was, and takes up its settings.
    let directory = far.place.path().join("restored");
    let into = directory.display().to_string();
    let restore = ["restore", "--repository", &url, "--key", &key, "--into", &into];
    let done = Far::start(&[&restore[..], &["--to", &position]].concat())?.wait(SOON)?;
    ensure!(done.code() == 0, "{done}");
    let auto = std::fs::read_to_string(directory.join("postgresql.auto.conf"))?;
    let command = auto.lines().rfind(|line| line.starts_with("restore_command"));
    let command = command.context("it has a restore_command")?;
    ensure!(command.contains(&url) && !command.contains(bucket::SECRET_KEY), "{command}");
    let restored = ByHand { programs: services::postgres_bin(15)?, directory };
    // Without them nothing is known of the archive, which is no end of it.
    let nobody = [("AWS_EC2_METADATA_DISABLED", "true"), ("HOME", "/nowhere")];
    let settings = restored.directory.join("postgresql.auto.conf");
    std::fs::write(&settings, auto.replace(" wal get ", " wal get --deadline 1 "))?;
    ensure!(!restored.starts(&nobody)?, "{}", restored.log());
    ensure!(restored.log().contains("exit code 200"), "{}", restored.log());
    ensure!(restored.directory.join("recovery.signal").exists(), "{}", restored.log());
    std::fs::write(&settings, &auto)?;
    let (id, secret) = (bucket::ACCESS_KEY, bucket::SECRET_KEY);
    let given = [("AWS_ACCESS_KEY_ID", id), ("AWS_SECRET_ACCESS_KEY", secret)];
    ensure!(restored.starts(&given)?, "{}", restored.log());
    eventually_async("the end of the recovery", SOON, async || {
        let recovering = text(&primary, "SELECT pg_is_in_recovery()::text").await?;
        Ok((recovering == "false").then_some(()))
    })
    .await
    .with_context(|| restored.log())?;
    ensure!(number(&primary, ROWS).await? == rows, "{}", restored.log());
    let reached = restored.log().contains("recovery stopping after WAL location (LSN)");
    ensure!(reached, "{}", restored.log());
    Ok(())
}

/// How many files a server has been given in its life.
fn fetched(server: &Instance) -> anyhow::Result<usize> {
    let log = std::fs::read_to_string(server.log_path())?;
    Ok(log.matches("restored log file").count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_away_silent_or_slow_loses_no_segment_and_ends_no_recovery()
-> anyhow::Result<()> {
    let far = Far::create().await?;
    let (base, proxy) = (far.place.path().join("base"), far.proxy()?);
    let push = far.command(&["push", "%p", "--new", "--deadline", "5"], &proxy)?;
    // A command that ends so takes the server's archiver with it, as a program that is not there does.
    let installed = far.place.path().join("installed");
    let push = format!("test -e {} || exit 127; {push}", installed.display());
    let settings = [("archive_mode", "on"), ("archive_command", push.as_str())];
    let primary = far.place.path().join("primary");
    let mut primary = make(15, &primary, options(&settings, Some(1))).await?;
    primary.start().await?;
    execute(&primary, &["CREATE TABLE t (n int, pad text)", "SELECT pg_switch_wal()"]).await?;
    primary.stop(StopMode::Fast).await?;
    let log = std::fs::read_to_string(primary.log_path())?;
    ensure!(log.contains("archive command failed with exit code 127"), "{log}");
    copy(&primary.data_directory(), &base)?;
    std::fs::write(&installed, "")?;
    proxy.cut();
    primary.start().await?;
    work(&primary, 2).await?;
    let failed = "SELECT failed_count FROM pg_stat_archiver";
    eventually_async("a segment that cannot be archived", SOON, async || {
        Ok((number(&primary, failed).await? > 0).then_some(()))
    })
    .await?;
    proxy.heal();
    work(&primary, 1).await?;
    let rows = number(&primary, ROWS).await?;
    // The server archives what is left before it ends.
    primary.stop(StopMode::Fast).await?;

    // Without any of it, a recovery does not even begin.
    let server = far.place.path().join("restored");
    let mut server = make(15, &server, options(&[], Some(1))).await?;
    let impatient = far.command(&["get", "%f", "%p", "--deadline", "1"], &proxy)?;
    let get = far.command(&["get", "%f", "%p"], &proxy)?;
    let settings = [("restore_command", impatient.as_str()), ("hot_standby", "off")];
    recover(&mut server, &base, "recovery.signal", &settings)?;
    proxy.cut();
    fails(&mut server, "the store is away").await?;
    proxy.stall();
    fails(&mut server, "the store is silent").await?;
    // A slow one gives all there is,
    server.set(&[("restore_command", &get)])?;
    proxy.slow();
    let before = proxy.forwarded_bytes();
    ensure!(opens(&mut server).await?, "{}", server.log_tail());
    ensure!(number(&server, ROWS).await? == rows);
    server.stop(StopMode::Fast).await?;
    ensure!(timeline(&server)? == Timeline(2));
    let needed = proxy.forwarded_bytes() - before;
    // and one that falls silent in the middle of it ends nothing: the next start goes on from there.
    let patient = far.command(&["get", "%f", "%p", "--deadline", "5"], &proxy)?;
    let settings = [("restore_command", patient.as_str()), ("hot_standby", "off")];
    proxy.heal();
    proxy.stall_after(needed / 2);
    recover(&mut server, &base, "recovery.signal", &settings)?;
    let before = fetched(&server)?;
    fails(&mut server, "the store falls silent").await?;
    ensure!(fetched(&server)? > before, "it had begun: {}", server.log_tail());

    // The same through a service, which is there when the store is not.
    let proxy = far.proxy()?;
    let service = far.serve(&proxy)?;
    let socket = far.socket();
    let through = ["--socket", &socket, "--cluster", "orders"].map(str::to_owned);
    let impatient = command(&["get", "%f", "%p", "--deadline", "1"], &through)?;
    server.set(&[("restore_command", &impatient)])?;
    proxy.cut();
    fails(&mut server, "the store is away behind the service").await?;
    proxy.stall();
    fails(&mut server, "the store is silent behind the service").await?;
    server.set(&[("restore_command", &command(&["get", "%f", "%p"], &through)?)])?;
    proxy.slow();
    ensure!(opens(&mut server).await?, "{}\n{}", server.log_tail(), service.said());
    ensure!(number(&server, ROWS).await? == rows);
    server.stop(StopMode::Fast).await?;
    ensure!(timeline(&server)? == Timeline(2));
    Ok(())
}
