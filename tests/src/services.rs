//! Where the real services are: the only place of the tests that reads the environment.
//!
//! `tests/services` starts them and names them in these variables; nothing here starts anything.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};

/// The broker of the run, `amqp://user:password@host:port` without a vhost: take one of your own from
/// [`crate::Vhost::create`].
pub fn amqp() -> anyhow::Result<String> {
    variable("PGMUSTER_TEST_AMQP")
}

/// RabbitMQ's management API, `http://host:port`.
pub fn amqp_management() -> anyhow::Result<String> {
    variable("PGMUSTER_TEST_AMQP_MANAGEMENT")
}

/// The S3 server, `http://host:port`: take a bucket of your own from [`crate::Bucket::create`].
pub fn s3() -> anyhow::Result<String> {
    variable("PGMUSTER_TEST_S3")
}

/// The programs of one PostgreSQL major: 14, 15 and 18 always, 16 and 17 in a long run.
pub fn postgres_bin(major: u32) -> anyhow::Result<PathBuf> {
    variable(&format!("PGMUSTER_TEST_PG_BIN_{major}")).map(PathBuf::from)
}

/// The pooler that must be noticed when it stands between a worker and its server.
pub fn pgbouncer() -> anyhow::Result<PathBuf> {
    variable("PGMUSTER_TEST_PGBOUNCER").map(PathBuf::from)
}

/// Whether this is `./tests/run --long`.
pub fn long_run() -> bool {
    optional("PGMUSTER_TEST_LONG").is_some()
}

/// The folder where `tests/run` left what cargo says about the workspace; absent when a test runs alone.
pub fn facts() -> Option<PathBuf> {
    optional("PGMUSTER_TEST_FACTS").map(PathBuf::from)
}

/// By this variable `tests/services strays` knows what a test left running; absent when a test runs alone.
pub fn mark() -> Option<(&'static str, String)> {
    const NAME: &str = "PGMUSTER_TEST_MARK";
    optional(NAME).map(|value| (NAME, value))
}

/// The `pgmuster` program of this build.
pub fn pgmuster() -> anyhow::Result<PathBuf> {
    let path = match optional("PGMUSTER_TEST_BINARY") {
        Some(path) => PathBuf::from(path),
        None => beside_the_tests("pgmuster")?,
    };
    if !path.is_file() {
        bail!("{} is not built; run ./tests/run, or cargo build -p cli", path.display());
    }
    Ok(path)
}

/// This folder of the checkout, where the scripts are.
pub(crate) fn scripts() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Test programs lie in `target/debug/deps`, the programs themselves one level up.
fn beside_the_tests(name: &str) -> anyhow::Result<PathBuf> {
    let test = std::env::current_exe().context("find the test's own program")?;
    let folder = test.ancestors().nth(2).context("find the folder above the test's program")?;
    Ok(folder.join(name))
}

fn variable(name: &str) -> anyhow::Result<String> {
    optional(name)
        .with_context(|| format!("{name} is not set; run ./tests/run, which starts the services"))
}

fn optional(name: &str) -> Option<String> {
    #[expect(clippy::disallowed_methods, reason = "the one place of the tests for this")]
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
