//! Where somebody works: a home directory, programs in `PATH`, variables. Nothing comes from the environment of the tests.

use std::collections::BTreeMap;
use std::fs::Permissions;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use serde_json::Value;
use tests::fleet::text;
use tests::{Cluster, Finished, Pgmuster, services};

/// Bound of one script or runbook.
const RUN_MAX: Duration = Duration::from_mins(2);

/// The desk. A server that was started from it, and still runs, ends with it.
#[derive(Debug)]
pub(crate) struct Desk {
    place: tempfile::TempDir,
    variables: BTreeMap<String, String>,
    servers: Vec<PathBuf>,
}

/// The checkout.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the crate has a parent folder")
}

/// Who may read and write a file.
pub(crate) fn mode(path: &str) -> anyhow::Result<u32> {
    Ok(std::fs::metadata(path)?.permissions().mode() & 0o777)
}

impl Desk {
    /// A home, an empty `TMPDIR`, and in `PATH` the program, PostgreSQL 15 and the system.
    pub(crate) fn new() -> anyhow::Result<Self> {
        let place = tempfile::Builder::new().prefix("desk").tempdir_in("/tmp")?;
        let mut desk = Self { place, variables: BTreeMap::new(), servers: Vec::new() };
        for directory in ["home", "tmp", "bin"] {
            std::fs::create_dir(desk.path(directory))?;
        }
        symlink(services::pgmuster()?, desk.path("bin/pgmuster"))?;
        let postgres = services::postgres_bin(15)?;
        let path = format!("{}:{}:/usr/bin:/bin", desk.at("bin"), postgres.display());
        for (name, value) in [
            ("PATH", path),
            ("HOME", desk.at("home")),
            ("TMPDIR", desk.at("tmp")),
            ("AWS_ACCESS_KEY_ID", tests::bucket::ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", tests::bucket::SECRET_KEY.to_owned()),
        ] {
            desk.set(name, value);
        }
        if let Some((name, value)) = services::mark() {
            desk.set(name, value);
        }
        Ok(desk)
    }

    /// Below the desk's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// The same as text.
    pub(crate) fn at(&self, name: &str) -> String {
        self.path(name).display().to_string()
    }

    /// Sets a variable of everything that is run from now on.
    pub(crate) fn set(&mut self, name: &str, value: impl Into<String>) {
        self.variables.insert(name.to_owned(), value.into());
    }

    /// Takes it away.
    pub(crate) fn unset(&mut self, name: &str) {
        self.variables.remove(name);
    }

    /// What a variable has.
    pub(crate) fn get(&self, name: &str) -> anyhow::Result<&str> {
        self.variables.get(name).map(String::as_str).with_context(|| format!("{name} is not set"))
    }

    /// Names a data directory whose server is started from here.
    pub(crate) fn starts(&mut self, data_directory: PathBuf) {
        self.servers.push(data_directory);
    }

    /// Lets `psql` without arguments mean this server.
    pub(crate) fn sit_at(&mut self, cluster: &Cluster) {
        let socket = cluster.server.socket_directory().display().to_string();
        self.set("PGHOST", socket);
        self.set("PGPORT", cluster.server.port().to_string());
        self.set("PGUSER", "postgres");
        self.set("PGDATABASE", "postgres");
    }

    /// Writes a file; gives its path.
    pub(crate) fn write(&self, name: &str, content: &str, mode: u32) -> anyhow::Result<String> {
        let path = self.path(name);
        std::fs::write(&path, content)?;
        std::fs::set_permissions(&path, Permissions::from_mode(mode))?;
        Ok(text(&path)?.to_owned())
    }

    /// A command with this desk's variables, in its home.
    pub(crate) fn command(&self, words: &[&str]) -> anyhow::Result<Command> {
        let (program, arguments) = words.split_first().context("a program")?;
        let mut command = Command::new(program);
        command.args(arguments).env_clear().envs(&self.variables).current_dir(self.path("home"));
        Ok(command)
    }

    /// Starts a command.
    pub(crate) fn start(&self, words: &[&str]) -> anyhow::Result<Pgmuster> {
        Pgmuster::spawn(self.command(words)?)
    }

    /// Runs a command to its end.
    pub(crate) fn run(&self, words: &[&str]) -> anyhow::Result<Finished> {
        self.start(words)?.wait(RUN_MAX)
    }

    /// The same for one that must succeed; gives what it printed.
    pub(crate) fn expect(&self, words: &[&str]) -> anyhow::Result<String> {
        let done = self.run(words)?;
        ensure!(done.code() == 0, "{}: {done}", words.join(" "));
        Ok(done.stdout.trim().to_owned())
    }

    /// Runs a script of `scripts/backup`.
    pub(crate) fn script(&self, name: &str, arguments: &[&str]) -> anyhow::Result<Finished> {
        let script = root().join("scripts/backup").join(name);
        self.run(&[&[text(&script)?], arguments].concat())
    }

    /// The backups of a repository, oldest first.
    pub(crate) fn backups(&self, url: &str, key: &str) -> anyhow::Result<Vec<Value>> {
        let pgmuster = self.at("bin/pgmuster");
        let listed = self.expect(&[&pgmuster, "repo", "list", url, "--key", key, "-o", "json"])?;
        let mut rows: Vec<Value> = serde_json::from_str(&listed)?;
        rows.sort_by_key(|row| row["committed_at_ms"].as_i64());
        Ok(rows)
    }

    /// Sees to it that nothing is left in `TMPDIR`.
    pub(crate) fn is_tidy(&self) -> anyhow::Result<()> {
        let left: Vec<_> = std::fs::read_dir(self.path("tmp"))?.flatten().collect();
        ensure!(left.is_empty(), "left behind: {left:?}");
        Ok(())
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        for server in self.servers.iter().filter(|place| place.join("postmaster.pid").exists()) {
            let directory = server.display().to_string();
            let _ = self.run(&["pg_ctl", "stop", "-m", "immediate", "-s", "-D", &directory]);
        }
    }
}
