//! A small fleet of real processes: one coordinator, any number of workers, throwaway clusters, a repository.
//!
//! Written as a person would set it up: configuration files, `pgmuster` commands, nothing else.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail};
use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use postgres::{Environment, Purpose, Session, Target, connect};
use proto::JobId;
use serde_json::Value;
use tempfile::TempDir;
use tokio_util::sync::CancellationToken;

use crate::{Bucket, Finished, Pgmuster, eventually, services};

/// Bound of one command, a backup with its proof included.
const COMMAND_MAX: Duration = Duration::from_secs(150);
/// Bound of everything that should take a moment.
pub const SOON: Duration = Duration::from_mins(1);

/// Where the backups of a fleet go.
#[derive(Debug)]
pub enum Place {
    /// A directory of this machine.
    Directory,
    /// A bucket of the run's S3 server.
    S3(Bucket),
}

/// The fleet. Dropping it kills its processes.
#[derive(Debug)]
pub struct Fleet {
    place: TempDir,
    amqp: String,
    catalog: String,
    repository: Place,
    coordinator: Option<Pgmuster>,
    workers: BTreeMap<String, Pgmuster>,
    /// How long a ticket lives, milliseconds.
    pub ticket_ms: u32,
    /// Whether the coordinator orders a backup behind WAL that is missing, or cannot be replayed.
    pub backup_behind_gaps: bool,
    /// A port of this machine at which the coordinator listens, too.
    pub tcp_port: Option<u16>,
}

/// A worker as its configuration will say it.
#[derive(Debug, Clone)]
pub struct WorkerSetup<'a> {
    /// Its name.
    pub name: &'a str,
    /// The clusters it serves: name and connection.
    pub clusters: Vec<(&'a str, String)>,
    /// Variables of its environment.
    pub environment: Vec<(&'a str, String)>,
    /// Further lines of its configuration, before the tables.
    pub lines: &'a str,
    /// What starts it, when it is not started directly: see [`Pgmuster::start_under`].
    pub under: Vec<String>,
    /// Whether it may load dumps into its sandboxes.
    pub loads_dumps: bool,
    /// Further lines of the configuration of each of its clusters.
    pub cluster_lines: &'a str,
}

impl<'a> WorkerSetup<'a> {
    /// A worker that serves one cluster.
    pub fn of(name: &'a str, cluster: &'a str, connection: String) -> Self {
        let clusters = vec![(cluster, connection)];
        let (environment, under) = (Vec::new(), Vec::new());
        Self { name, clusters, environment, lines: "", under, loads_dumps: true, cluster_lines: "" }
    }

    /// The same, failing on purpose at a step: `copy=abort`.
    #[must_use]
    pub fn failing_at(mut self, failpoint: impl Into<String>) -> Self {
        self.environment.push(("PGMUSTER_FAILPOINT", failpoint.into()));
        self
    }
}

impl Fleet {
    /// A directory, a repository and a signing key; nothing runs yet. `catalog` is a URL, or empty for SQLite.
    pub fn prepare(amqp: &str, catalog: &str, repository: Place) -> anyhow::Result<Self> {
        let place = tempfile::Builder::new().prefix("fleet").tempdir_in("/tmp")?;
        let catalog = match catalog {
            "" => format!("sqlite:{}/catalog.sqlite", place.path().display()),
            url => url.to_owned(),
        };
        let (amqp, workers) = (amqp.to_owned(), BTreeMap::new());
        let fleet = Self {
            place,
            amqp,
            catalog,
            repository,
            coordinator: None,
            workers,
            ticket_ms: 3_000,
            backup_behind_gaps: true,
            tcp_port: None,
        };
        fleet.write("signing.key", "AQIDBAUGBwgJCgsMDQ4PEBESExQVFhcYGRobHB0eHyA=\n")?;
        fleet.write("amqp.url", &fleet.amqp)?;
        fleet.write("s3.id", "AK")?;
        fleet.write("s3.secret", "SKSKSKSK")?;
        for directory in ["restore", "sandbox"] {
            std::fs::create_dir(fleet.path(directory))?;
        }
        let key = fleet.path("repository.key");
        let made = fleet.run(&["repo", "init", &fleet.repository_url(), "--key", text(&key)?])?;
        if made.code() != 0 {
            bail!("repo init: {made}");
        }
        Ok(fleet)
    }

    /// Below the fleet's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn write(&self, name: &str, content: &str) -> anyhow::Result<PathBuf> {
        let path = self.path(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600))?;
        Ok(path)
    }

    /// The `archive_command` of a server that is `orders`: straight into the repository.
    pub fn archive_command(&self) -> anyhow::Result<String> {
        Ok(format!(
            "'{}' wal push \"%p\" --new --repository '{}' --key '{}' --cluster orders",
            services::pgmuster()?.display(),
            self.repository_url(),
            self.path("repository.key").display()
        ))
    }

    /// The repository, as commands take it.
    pub fn repository_url(&self) -> String {
        match &self.repository {
            Place::Directory => format!("file://{}/repository", self.place.path().display()),
            Place::S3(bucket) => format!(
                "s3://{}/backups?endpoint={}&region=us-east-1&path-style=true",
                bucket.name(),
                bucket.endpoint()
            ),
        }
    }

    /// Starts the coordinator and waits until it answers.
    pub fn start_coordinator(&mut self) -> anyhow::Result<()> {
        let place = self.place.path().display();
        let config = format!(
            r#"
            signing_key = "file:{place}/signing.key"
            [catalog]
            url = "{catalog}"
            [broker]
            url = "file:{place}/amqp.url"
            [listen]
            socket = "{place}/c.sock"
            {tcp}
            [timing]
            lease_ms = 8000
            patience_ms = 20000
            beacon_ms = 500
            ticket_ms = {ticket_ms}
            leader_ms = 2000
            [jobs]
            retry_first_ms = 200
            retry_max_ms = 2000
            backup_behind_gaps = {behind_gaps}
            "#,
            catalog = self.catalog,
            ticket_ms = self.ticket_ms,
            behind_gaps = self.backup_behind_gaps,
            tcp = self.tcp_port.map_or(String::new(), |port| format!("tcp = \"127.0.0.1:{port}\"")),
        );
        let config = self.write("coordinator.toml", &config)?;
        self.coordinator = Some(Pgmuster::start(&["coordinator", "--config", text(&config)?])?);
        let answered = eventually("the coordinator to answer", SOON, || {
            let status = self.run(&["status", "-o", "json"])?;
            Ok(matches!(status.code(), 0 | 3).then_some(()))
        });
        answered.with_context(|| self.said())
    }

    /// Enrols a worker, starts it and waits until its clusters are announced.
    pub fn start_worker(&mut self, setup: &WorkerSetup<'_>) -> anyhow::Result<()> {
        let config = self.configure(setup)?;
        if !self.path(&format!("{}/identity.json", setup.name)).exists() {
            let token = self.expect(&["worker", "token", setup.name, "fra1"])?;
            let token = self.write(&format!("{}.token", setup.name), &token)?;
            self.expect(&[
                "worker",
                "enroll",
                "--config",
                text(&config)?,
                "--enroll-token",
                text(&token)?,
            ])?;
        }
        let arguments = ["worker", "--config", text(&config)?];
        let program = Pgmuster::start_under(&setup.under, &arguments, |command| {
            command.envs(setup.environment.iter().map(|(name, value)| (*name, value.as_str())));
        })?;
        self.workers.insert(setup.name.to_owned(), program);
        let announced = eventually("the worker to announce its clusters", SOON, || {
            let workers = self.json(&["doctor", "-o", "json"])?;
            let alive = workers.as_array().into_iter().flatten().any(|finding| {
                finding["what"] == format!("worker {}", setup.name) && finding["good"] == true
            });
            let clusters = self.json(&["cluster", "list", "-o", "json"])?;
            let known = |name: &str| {
                clusters.as_array().into_iter().flatten().any(|row| row["name"] == name)
            };
            Ok((alive && setup.clusters.iter().all(|(name, _)| known(name))).then_some(()))
        });
        announced.with_context(|| self.said())
    }

    /// Writes a worker's configuration.
    pub fn configure(&self, setup: &WorkerSetup<'_>) -> anyhow::Result<PathBuf> {
        let place = self.place.path().display();
        let bins: Vec<String> = [15, 18]
            .into_iter()
            .map(|major| services::postgres_bin(major).map(|dir| format!("\"{}\"", dir.display())))
            .collect::<anyhow::Result<_>>()?;
        let mut config = format!(
            r#"
            name = "{name}"
            site = "fra1"
            state_dir = "{place}/{name}"
            {lines}
            [broker]
            url = "file:{place}/amqp.url"
            [allow]
            restore_roots = ["{place}/restore"]
            load_dumps = {loads_dumps}
            [sandbox]
            directory = "{place}/sandbox"
            postgres_bin_dirs = [{bins}]
            [[repositories]]
            name = "main"
            url = "{url}"
            key = "file:{place}/repository.key"
            "#,
            name = setup.name,
            lines = setup.lines,
            loads_dumps = setup.loads_dumps,
            bins = bins.join(", "),
            url = self.repository_url(),
        );
        if let Place::S3(_) = self.repository {
            write!(
                config,
                "access_key_id = \"file:{place}/s3.id\"\n\
                 secret_access_key = \"file:{place}/s3.secret\"\n"
            )?;
        }
        for (name, connection) in &setup.clusters {
            write!(
                config,
                "[[clusters]]\nname = \"{name}\"\nconnection = \"{connection}\"\nrepository = \"main\"\n{}\n",
                setup.cluster_lines
            )?;
        }
        self.write(&format!("{}.toml", setup.name), &config)
    }

    /// A worker's process.
    pub fn worker(&mut self, name: &str) -> anyhow::Result<&mut Pgmuster> {
        self.workers.get_mut(name).with_context(|| format!("there is no worker {name}"))
    }

    /// The coordinator's process.
    pub fn coordinator(&mut self) -> anyhow::Result<&mut Pgmuster> {
        self.coordinator.as_mut().context("there is no coordinator")
    }

    /// Starts a command against this fleet, to be watched while it runs.
    pub fn start(&self, arguments: &[&str]) -> anyhow::Result<Pgmuster> {
        let socket = self.path("c.sock");
        let arguments: Vec<&str> = ["--coordinator", text(&socket)?]
            .into_iter()
            .chain(arguments.iter().copied())
            .collect();
        Pgmuster::start_with(&arguments, |command| {
            command.env("AWS_ACCESS_KEY_ID", "AK").env("AWS_SECRET_ACCESS_KEY", "SKSKSKSK");
        })
    }

    /// Runs a command against this fleet.
    pub fn run(&self, arguments: &[&str]) -> anyhow::Result<Finished> {
        self.start(arguments)?.wait(COMMAND_MAX).with_context(|| self.said())
    }

    /// One request to the coordinator's socket, as a program makes it that is not ours. Gives status and body.
    pub fn http(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> anyhow::Result<(u16, String)> {
        let mut stream = self.ask(method, path, headers, body)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        let (head, text) = answer.split_once("\r\n\r\n").context("find the answer's body")?;
        let status = head.split(' ').nth(1).context("find the answer's status")?.parse()?;
        Ok((status, text.to_owned()))
    }

    /// The same without waiting for the answer, which comes on the stream.
    pub fn ask(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &str,
    ) -> anyhow::Result<UnixStream> {
        let mut stream = UnixStream::connect(self.path("c.sock"))?;
        stream.set_read_timeout(Some(SOON))?;
        let headers = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n"));
        let headers: String = headers.collect();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nhost: coordinator\r\nconnection: close\r\n{headers}\
             content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        )?;
        Ok(stream)
    }

    /// One figure of the coordinator's `/metrics`, named as it stands there, labels included; 0 before it is first
    /// counted.
    pub fn metric(&self, name: &str) -> anyhow::Result<f64> {
        let (status, page) = self.http("GET", "/metrics", &[], "")?;
        anyhow::ensure!(status == 200, "{status}: {page}");
        let value = page.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.map_or(Ok(0.0), str::parse)?)
    }

    /// Runs a command that must succeed; gives what it printed.
    pub fn expect(&self, arguments: &[&str]) -> anyhow::Result<String> {
        let done = self.run(arguments)?;
        if done.code() != 0 {
            bail!("pgmuster {}: {done}\n{}", arguments.join(" "), self.said());
        }
        Ok(done.stdout.trim().to_owned())
    }

    /// Runs a command and reads what it printed as JSON, whatever its exit code.
    pub fn json(&self, arguments: &[&str]) -> anyhow::Result<Value> {
        let done = self.run(arguments)?;
        serde_json::from_str(&done.stdout).with_context(|| format!("{arguments:?}: {done}"))
    }

    /// Orders something; gives the job's id.
    pub fn order(&self, arguments: &[&str]) -> anyhow::Result<JobId> {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["-o", "json"]).collect();
        let job = self.json(&arguments)?;
        let id = job["id"].as_str().with_context(|| format!("{arguments:?}: {job}"))?;
        Ok(id.parse()?)
    }

    /// A job as the coordinator shows it.
    pub fn job(&self, job: JobId) -> anyhow::Result<Value> {
        self.json(&["job", "show", &job.to_string(), "-o", "json"])
    }

    /// Waits until a job is in one of these states.
    pub fn await_state(
        &self,
        job: JobId,
        states: &[&str],
        bound: Duration,
    ) -> anyhow::Result<Value> {
        let reached = eventually(format!("job {job} to be {states:?}"), bound, || {
            let view = self.job(job)?;
            let state = view["state"].as_str().unwrap_or_default();
            Ok(states.contains(&state).then_some(view.clone()))
        });
        reached.with_context(|| format!("{:?}\n{}", self.job(job), self.said()))
    }

    /// Waits until a job's running step has this name.
    pub fn await_step(&self, job: JobId, step: &str) -> anyhow::Result<()> {
        let reached = eventually(format!("job {job} to reach {step}"), SOON, || {
            let trace = self.json(&["job", "trace", &job.to_string(), "-o", "json"])?;
            let attempts = trace["attempts"].as_array().cloned().unwrap_or_default();
            let running = attempts.iter().any(|attempt| {
                let steps = attempt["steps"].as_array().cloned().unwrap_or_default();
                steps.last().is_some_and(|last| last["name"] == step)
            });
            Ok(running.then_some(()))
        });
        reached.with_context(|| self.said())
    }

    /// Backups in the repository, asked of the repository itself.
    pub fn backups(&self) -> anyhow::Result<usize> {
        let key = self.path("repository.key");
        let rows = self.json(&[
            "repo",
            "list",
            &self.repository_url(),
            "--key",
            text(&key)?,
            "-o",
            "json",
        ])?;
        Ok(rows.as_array().map_or(0, Vec::len))
    }

    /// What is left in the directory of sandboxes.
    pub fn sandboxes(&self) -> anyhow::Result<Vec<String>> {
        let entries = std::fs::read_dir(self.path("sandbox"))?;
        let names = entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
        let names: Vec<String> = names.collect::<anyhow::Result<_>>()?;
        Ok(names.into_iter().filter(|name| name.starts_with("pgmuster-proof-")).collect())
    }

    /// Everything the processes have said, for a failing test to show.
    pub fn said(&self) -> String {
        let mut text = String::new();
        let all = self.coordinator.iter().map(|program| ("coordinator", program));
        for (name, program) in all.chain(self.workers.iter().map(|(n, p)| (n.as_str(), p))) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "=== {name}\n{}", program.said());
        }
        text
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> anyhow::Result<&str> {
    path.to_str().context("a path of the test is no UTF-8")
}

/// A running throwaway cluster with some data.
#[derive(Debug)]
pub struct Cluster {
    /// The server.
    pub server: Instance,
    _place: TempDir,
}

impl Cluster {
    /// Makes one of this major version. Its data is a few thousand rows, so that a proof has something to count.
    pub async fn start(major: u32, options: InstanceOptions) -> anyhow::Result<Self> {
        let place = tempfile::Builder::new().prefix("pg").tempdir_in("/tmp")?;
        let binaries = Binaries::at(&services::postgres_bin(major)?).await?;
        let options = InstanceOptions { fsync: false, ..options };
        let mut server = Instance::create(&binaries, &place.path().join("pg"), options).await?;
        server.start().await?;
        let cluster = Self { server, _place: place };
        cluster
            .run(
                "CREATE TABLE public.items (id int PRIMARY KEY, note text);
                 INSERT INTO public.items SELECT g, md5(g::text) FROM generate_series(1, 5000) g;
                 CREATE TABLE public.parts (id int) PARTITION BY RANGE (id);
                 CREATE TABLE public.parts_1 PARTITION OF public.parts FOR VALUES FROM (0) TO (1000);
                 INSERT INTO public.parts SELECT g FROM generate_series(0, 999) g;",
            )
            .await?;
        Ok(cluster)
    }

    /// A standby of it, which streams and has sockets of its own.
    pub async fn standby(&self) -> anyhow::Result<Self> {
        let place = tempfile::Builder::new().prefix("pg").tempdir_in("/tmp")?;
        let (binaries, of) = (self.server.binaries(), place.path().join("pg"));
        let options = InstanceOptions { fsync: false, ..InstanceOptions::default() };
        let mut server = Instance::create(binaries, &of, options).await?;
        let data = server.data_directory();
        std::fs::remove_dir_all(&data)?;
        let copy = binaries.program("pg_basebackup")?.args(["--checkpoint=fast", "--no-sync"]);
        let copy = copy.args(["--dbname", &self.url(), "--pgdata"]).arg(&data);
        copy.run(SOON, &CancellationToken::new()).await?;
        std::fs::write(data.join("standby.signal"), "")?;
        let (sockets, port) = (self.server.socket_directory().display(), self.server.port());
        let primary = format!("host={sockets} port={port} user=postgres");
        server.set(&[("primary_conninfo", &primary)])?;
        server.start().await?;
        Ok(Self { server, _place: place })
    }

    /// Starts a copy of it, as from a snapshot of its volume, with settings of its own: the same cluster on the same timeline,
    /// which goes its own way from here on.
    pub async fn fork(&mut self, settings: &[(&str, &str)]) -> anyhow::Result<Self> {
        let place = tempfile::Builder::new().prefix("pg").tempdir_in("/tmp")?;
        let options = InstanceOptions { fsync: false, ..InstanceOptions::default() };
        let binaries = self.server.binaries();
        let mut server = Instance::create(binaries, &place.path().join("pg"), options).await?;
        self.server.stop(StopMode::Fast).await?;
        let data = server.data_directory();
        std::fs::remove_dir_all(&data)?;
        let from = self.server.data_directory();
        let copied = std::process::Command::new("cp").arg("-a").args([&from, &data]).status()?;
        anyhow::ensure!(copied.success(), "copy {}: {copied}", from.display());
        self.server.start().await?;
        server.set(settings)?;
        server.start().await?;
        Ok(Self { server, _place: place })
    }

    /// Makes one that also takes anybody's TCP connections on the loopback interface: for a catalog.
    pub async fn start_with_tcp(major: u32) -> anyhow::Result<Self> {
        let hba = vec!["host all all 127.0.0.1/32 trust".to_owned()];
        let options = InstanceOptions { tcp_port: Some(0), hba, ..InstanceOptions::default() };
        Self::start(major, options).await
    }

    /// The URL of a database of it over TCP, without a password.
    pub fn tcp_url(&self, database: &str) -> anyhow::Result<String> {
        let url = self.server.tcp_url("postgres", "", database);
        let url = url.context("this cluster has no TCP port")?;
        Ok(url.replace("postgresql://postgres:@", "postgres://postgres@"))
    }

    /// How to connect.
    pub fn url(&self) -> String {
        self.server.url("postgres")
    }

    async fn session(&self) -> anyhow::Result<Session> {
        self.session_in("postgres").await
    }

    async fn session_in(&self, database: &str) -> anyhow::Result<Session> {
        let target = Target::parse(&self.server.url(database), &Environment::default())?;
        let purpose = Purpose {
            application_name: "story".to_owned(),
            read_only: false,
            statement_timeout: Duration::ZERO,
            lock_timeout: Duration::ZERO,
        };
        Ok(connect(&target, &purpose).await?)
    }

    /// Runs statements.
    pub async fn run(&self, statements: &str) -> anyhow::Result<()> {
        self.run_in("postgres", statements).await
    }

    /// Runs statements in another database than `postgres`.
    pub async fn run_in(&self, database: &str, statements: &str) -> anyhow::Result<()> {
        let session = self.session_in(database).await?;
        session.run("prepare the story", statements).await?;
        session.close().await;
        Ok(())
    }

    /// Makes a spread checkpoint take long: a backup that waits for one stands in `start_backup` until the story says
    /// `CHECKPOINT`.
    pub async fn holds_checkpoints_up(&self) -> anyhow::Result<()> {
        self.run("ALTER SYSTEM SET checkpoint_timeout = '30s'").await?;
        self.run("SELECT pg_reload_conf()").await?;
        self.run("CREATE TABLE public.dirt AS SELECT g FROM generate_series(1, 100000) g").await
    }

    /// Asks for a number.
    pub async fn number(&self, query: &str) -> anyhow::Result<i64> {
        let session = self.session().await?;
        let number = session.one("look", query, &[]).await?.get(0);
        session.close().await;
        Ok(number)
    }

    /// Asks for a text.
    pub async fn text(&self, query: &str) -> anyhow::Result<String> {
        let session = self.session().await?;
        let text = session.one("look", query, &[]).await?.get(0);
        session.close().await;
        Ok(text)
    }

    /// Waits until no slot, lock or session of ours is on the server, and no backup runs.
    pub async fn is_left_alone(&self) -> anyhow::Result<()> {
        const QUERY: &str = "
            SELECT (SELECT count(*) FROM pg_replication_slots)
                 + (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')
                 + (SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'pgmuster/%')";
        crate::eventually_async("the server to be left alone", SOON, || async {
            Ok((self.number(QUERY).await? == 0).then_some(()))
        })
        .await
    }
}
