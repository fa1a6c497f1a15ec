//! What the tests of this crate share: real servers to work on.

use std::path::Path;

use postgres::binaries::Binaries;
use postgres::instance::{Instance, InstanceOptions};
use tempfile::TempDir;
use tokio_postgres::{Client, NoTls};

/// The programs of a major version that the test run must provide.
pub(crate) async fn binaries(major: u32) -> Binaries {
    optional_binaries(major).await.expect("run ./tests/run, which starts the services")
}

/// The programs of a major version, where the test run provides them.
#[expect(clippy::disallowed_methods, reason = "tests are told of their services by variables")]
pub(crate) async fn optional_binaries(major: u32) -> Option<Binaries> {
    let directory = std::env::var(format!("PGMUSTER_TEST_PG_BIN_{major}")).ok()?;
    let binaries = Binaries::at(directory).await.unwrap();
    assert_eq!(binaries.major(), major);
    Some(binaries)
}

/// A running cluster with small WAL segments, and the directory it lives in.
pub(crate) async fn cluster(major: u32, settings: &[(&str, &str)]) -> (Instance, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    let instance = cluster_in(&directory.path().join("cluster"), major, settings).await;
    (instance, directory)
}

/// The same in a directory that somebody else removes.
pub(crate) async fn cluster_in(place: &Path, major: u32, settings: &[(&str, &str)]) -> Instance {
    let settings = settings.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    let options = InstanceOptions {
        settings: settings.collect(),
        wal_segment_size_mb: Some(1),
        fsync: false,
        ..InstanceOptions::default()
    };
    let mut instance = Instance::create(&binaries(major).await, place, options).await.unwrap();
    instance.start().await.unwrap();
    instance
}

/// A connection, served by a task of its own.
pub(crate) async fn connect(url: &str) -> Client {
    let (client, connection) = tokio_postgres::connect(url, NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// The first column of the first row, as text.
pub(crate) async fn text(client: &Client, sql: &str) -> String {
    for message in client.simple_query(sql).await.unwrap() {
        if let tokio_postgres::SimpleQueryMessage::Row(row) = message {
            return row.get(0).unwrap_or_default().to_owned();
        }
    }
    panic!("no rows: {sql}");
}
