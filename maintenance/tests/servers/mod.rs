//! Real servers for this crate's tests: a throwaway instance of each major version, and ways to get in each other's way.

#![expect(dead_code, reason = "each test binary uses a part of this")]

use std::future::Future;
use std::time::Duration;

use postgres::binaries::Binaries;
use postgres::connect::{Purpose, connect};
use postgres::instance::{Instance, InstanceOptions};
use postgres::{Session, Target};
use proto::JobId;
use tempfile::TempDir;
use tokio::time::Instant;

/// How long anything that the server does by itself may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(30);

/// Names that break whoever puts names into SQL without care.
pub(crate) const HOSTILE: [&str; 8] = [
    "plain",
    "Upper Case",
    "quo\"te",
    "x\"; DROP TABLE victim; --",
    "new\nline",
    "it's; $$ \\ %s {}",
    "dot.dot",
    // 63 bytes, the most a name can have.
    "éééééééééééééééééééééééééééééé123",
];

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

#[expect(
    clippy::disallowed_methods,
    reason = "the one place of these tests that reads the environment"
)]
fn service(name: &str) -> String {
    std::env::var(name)
        .unwrap_or_else(|_| panic!("{name}: run ./tests/run, which starts the services"))
}

/// A running throwaway server. Its tables are the test's alone: autovacuum is off unless a test switches it on, and so
/// are the background writer and checkpoints by the clock. VACUUM passes by a page that somebody has pinned, and each
/// of these pins the pages it writes: a few dead rows of 30,000 would stay, seldom and rightly.
pub(crate) struct Server {
    pub(crate) instance: Instance,
    pub(crate) major: u32,
    _directory: TempDir,
}

impl Server {
    pub(crate) async fn start(major: u32, settings: &[(&str, &str)]) -> Self {
        let binaries =
            Binaries::at(service(&format!("PGMUSTER_TEST_PG_BIN_{major}"))).await.unwrap();
        let directory = tempfile::tempdir().unwrap();
        let quiet =
            [("autovacuum", "off"), ("bgwriter_lru_maxpages", "0"), ("checkpoint_timeout", "1h")];
        let owned = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let mut all = quiet.map(owned).to_vec();
        for (name, value) in settings {
            all.retain(|(known, _)| known != name);
            all.push(((*name).to_owned(), (*value).to_owned()));
        }
        let options = InstanceOptions { settings: all, fsync: false, ..InstanceOptions::default() };
        let mut instance =
            Instance::create(&binaries, &directory.path().join("i"), options).await.unwrap();
        instance.start().await.unwrap();
        Self { instance, major, _directory: directory }
    }

    /// A session as a job opens it: `search_path` pinned, limits set by the execution.
    pub(crate) async fn session(&self) -> Session {
        self.session_of("postgres").await
    }

    pub(crate) async fn session_of(&self, role: &str) -> Session {
        let target = Target::on_socket(
            self.instance.socket_directory(),
            self.instance.port(),
            role,
            "postgres",
        );
        let job = JobId::mint(1_700_000_000_000, [7; 10]);
        let purpose = Purpose::work(&job, Duration::ZERO, Duration::from_secs(2));
        connect(&target, &purpose).await.unwrap()
    }

    /// Runs statements with `public` in the search path, each in a transaction of its own.
    pub(crate) async fn run(&self, statements: &[&str]) {
        let session = self.other().await;
        for statement in statements {
            let done = session.run("prepare the test", statement).await;
            done.unwrap_or_else(|e| panic!("{statement}: {}", proto::failure::chain(&e)));
        }
        session.close().await;
    }

    /// Another session of the test's own.
    pub(crate) async fn other(&self) -> Session {
        let session = self.session().await;
        session
            .run("look into public", "SET search_path = public; SET lock_timeout = 0")
            .await
            .unwrap();
        session
    }

    pub(crate) async fn number(&self, sql: &str) -> i64 {
        let session = self.other().await;
        let row = session.one("ask", sql, &[]).await;
        let number = row.unwrap_or_else(|e| panic!("{sql}: {}", proto::failure::chain(&e))).get(0);
        session.close().await;
        number
    }

    /// Waits until a query returns `wanted`.
    pub(crate) async fn until(&self, sql: &str, wanted: i64) {
        wait_for(sql, async || self.number(sql).await == wanted).await;
    }
}

/// Waits for a condition, and fails with its name when it does not come.
pub(crate) async fn wait_for<F: Future<Output = bool>>(what: &str, condition: impl Fn() -> F) {
    let deadline = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < deadline, "waited in vain for: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A function for an expression index that sleeps when the setting `test.slow` is `on`: it makes ANALYZE slow.
pub(crate) const SLOW: [&str; 4] = [
    "CREATE FUNCTION slow(i int) RETURNS int IMMUTABLE LANGUAGE plpgsql AS $$ BEGIN \
     IF pg_catalog.current_setting('test.slow', true) = 'on' THEN PERFORM pg_catalog.pg_sleep(0.05); END IF; \
     RETURN i; END $$",
    "CREATE TABLE slowly (i int)",
    "CREATE INDEX slowly_slow ON slowly (slow(i))",
    "INSERT INTO slowly SELECT generate_series(1, 2000)",
];
