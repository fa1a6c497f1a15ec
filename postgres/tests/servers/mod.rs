//! Real servers for this crate's tests about sessions: a throwaway instance of each major version.

#![expect(dead_code, reason = "each test binary uses a part of this")]

use std::future::Future;
use std::path::Path;
use std::time::Duration;

use postgres::binaries::Binaries;
use postgres::connect::{Purpose, connect};
use postgres::instance::{Instance, InstanceOptions};
use postgres::{Environment, Session, Target};
use proto::JobId;
use tempfile::TempDir;

/// How long anything that the server does by itself may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Makes one test of each function on each major version that the services bring.
macro_rules! on_each_major {
    ($($name:ident),* $(,)?) => {
        $crate::servers::on_each_major!(@ pg14, 14, $($name),*);
        $crate::servers::on_each_major!(@ pg15, 15, $($name),*);
        $crate::servers::on_each_major!(@ pg18, 18, $($name),*);
    };
    (@ $module:ident, $major:literal, $($name:ident),*) => {
        mod $module {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $name() {
                super::$name($major).await;
            })*
        }
    };
}
pub(crate) use on_each_major;

/// A program or service that `tests/services` names.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place of these tests that reads the environment"
)]
pub(crate) fn service(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name}: run ./tests/run, which starts the services"))
}

/// A running throwaway server.
pub(crate) struct Server {
    pub(crate) instance: Instance,
    pub(crate) directory: TempDir,
}

impl Server {
    pub(crate) async fn start(major: u32, settings: &[(&str, &str)]) -> Self {
        Self::with(major, settings, |_| {}).await
    }

    pub(crate) async fn with(
        major: u32,
        settings: &[(&str, &str)],
        adapt: impl FnOnce(&mut InstanceOptions),
    ) -> Self {
        let binaries =
            Binaries::at(service(&format!("PGMUSTER_TEST_PG_BIN_{major}"))).await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let settings = settings
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let mut options = InstanceOptions { settings, fsync: false, ..InstanceOptions::default() };
        adapt(&mut options);
        let mut instance =
            Instance::create(&binaries, &directory.path().join("i"), options).await.unwrap();
        instance.start().await.unwrap();
        Self { instance, directory }
    }

    /// The superuser, over the socket.
    pub(crate) fn target(&self, database: &str) -> Target {
        self.target_of("postgres", database)
    }

    pub(crate) fn target_of(&self, role: &str, database: &str) -> Target {
        Target::on_socket(self.instance.socket_directory(), self.instance.port(), role, database)
    }

    /// A superuser's session of the test's own, which may write.
    pub(crate) async fn session(&self, database: &str) -> Session {
        let session = connect(&self.target(database), &writing())
            .await
            .unwrap_or_else(|e| panic!("{}", shown(&e)));
        session.run("look into public", "SET search_path = public").await.unwrap();
        session
    }

    /// Runs statements, each in a transaction of its own.
    pub(crate) async fn run(&self, database: &str, statements: &[&str]) {
        let session = self.session(database).await;
        for statement in statements {
            session
                .run("prepare the test", statement)
                .await
                .unwrap_or_else(|e| panic!("{statement}: {}", shown(&e)));
        }
        session.close().await;
    }

    /// One number.
    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let session = self.session("postgres").await;
        let number = session
            .one("ask", sql, &[])
            .await
            .unwrap_or_else(|e| panic!("{sql}: {}", shown(&e)))
            .get(0);
        session.close().await;
        number
    }

    /// Waits until a query returns `wanted`.
    pub(crate) async fn until(&self, sql: &str, wanted: i64) {
        wait_for(sql, async || self.number(sql).await == wanted).await;
    }

    pub(crate) fn wal_directory(&self) -> std::path::PathBuf {
        self.instance.data_directory().join("pg_wal")
    }
}

pub(crate) fn writing() -> Purpose {
    Purpose {
        application_name: "test".to_owned(),
        read_only: false,
        statement_timeout: Duration::ZERO,
        lock_timeout: Duration::ZERO,
    }
}

pub(crate) fn job() -> JobId {
    JobId::mint(1_700_000_000_000, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10])
}

pub(crate) fn nobody() -> Environment {
    Environment { user: Some("postgres".to_owned()), ..Environment::default() }
}

pub(crate) fn shown(error: &postgres::Error) -> String {
    proto::failure::chain(error)
}

/// Waits for a condition, and fails with its name when it does not come.
pub(crate) async fn wait_for<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while !condition().await {
        assert!(tokio::time::Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The names of the WAL segments in a directory.
pub(crate) fn segments(directory: &Path) -> Vec<String> {
    let names = std::fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name.len() == 24).collect();
    names.sort();
    names
}
