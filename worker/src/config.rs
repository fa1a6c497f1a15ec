//! A worker's configuration: who it is, what it serves, and what it may be asked to do.
//!
//! The file is the worker's own law: a job can only ask for less. It holds no secret, only references to them. This
//! module parses and checks; it opens nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use camino::Utf8PathBuf;
use postgres::checks::Assertion;
use proto::job::RATE_LIMIT_MIN_BYTES;
use proto::{ClusterName, DatabaseName, Failure, JobKind, SecretRef, SiteName, WorkerName};
use serde::{Deserialize, Serialize};

/// Everything in `worker.toml`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WorkerConfig {
    /// The worker's name, unique in the fleet. `pgmuster worker enroll` ties it to a key.
    pub name: WorkerName,
    /// The site whose queues it serves.
    pub site: SiteName,
    /// Where it keeps its identity and reports that could not be delivered yet. Nothing in it is needed after the worker
    /// died.
    pub state_dir: Utf8PathBuf,
    /// How to reach RabbitMQ.
    pub broker: BrokerConfig,
    /// How much it does at once.
    #[serde(default)]
    pub slots: SlotsConfig,
    /// What it may do at all.
    #[serde(default)]
    pub allow: AllowConfig,
    /// Where restores and proofs happen.
    pub sandbox: SandboxConfig,
    /// How backups are made.
    #[serde(default)]
    pub backup: BackupConfig,
    /// How servers on this host reach the archive of WAL.
    #[serde(default)]
    pub archive: ArchiveConfig,
    /// Where backups live.
    #[serde(default)]
    pub repositories: Vec<RepositoryConfig>,
    /// The clusters it serves.
    #[serde(default)]
    pub clusters: Vec<ClusterConfig>,
}

/// How to reach RabbitMQ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerConfig {
    /// `amqps://user@host/vhost` without a password, or where the whole URL is: `file:/etc/pgmuster/amqp.url`.
    pub url: String,
}

/// How much runs at once.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SlotsConfig {
    /// Jobs at once, 1 to 64. Urgent jobs may use these too.
    pub routine: u32,
    /// Further jobs at once for people who wait, 1 to 16.
    pub urgent: u32,
}

impl Default for SlotsConfig {
    fn default() -> Self {
        Self { routine: 2, urgent: 1 }
    }
}

/// What the worker may do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AllowConfig {
    /// Kinds of jobs.
    pub kinds: Vec<JobKind>,
    /// Directories below which `restore` jobs may write. None: no restore jobs.
    pub restore_roots: Vec<Utf8PathBuf>,
    /// Whether proofs may load dumps. Loading runs what is in a dump as a superuser of the sandbox's server: whoever may make a
    /// function in a dumped database can have a program started under the account of that server.
    pub load_dumps: bool,
}

impl Default for AllowConfig {
    fn default() -> Self {
        Self { kinds: JobKind::ALL.to_vec(), restore_roots: Vec::new(), load_dumps: false }
    }
}

/// Where proofs happen.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SandboxConfig {
    /// A directory with room for the largest cluster. Everything below `DIRECTORY/pgmuster-proof-*` is the worker's to
    /// remove.
    pub directory: Utf8PathBuf,
    /// Further directories with `postgres` in them (`/opt/pg/17/bin`); Debian's are found by themselves.
    #[serde(default)]
    pub postgres_bin_dirs: Vec<Utf8PathBuf>,
}

/// How backups are made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BackupConfig {
    /// Threads that compress and seal; 0 means half the cores, at least one.
    pub processes: u32,
    /// zstd level, -7 to 19.
    pub compression_level: i32,
    /// How much lower than the worker's own the priority of those threads is, 0 to 19 as for nice(1): the server goes first.
    /// Linux derives their I/O priority from it, `(nice + 20) / 5` of best effort, which ends at 7; of the schedulers of disks
    /// BFQ heeds that, and behind the others [`rate_limit_bytes`](Self::rate_limit_bytes) is what spares the disk.
    ///
    /// Everything else keeps the worker's priority. WAL that is stored late fills the server's disk; listing the files is
    /// short; rows are counted by the server's own processes. And both run on threads that serve other work afterwards: a
    /// thread may lower its priority, and without a right not raise it again.
    pub nice: u8,
    /// Bytes a second that are read from the server's files, at least 1 MiB; unlimited when absent. WAL is not counted: the
    /// server waits for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit_bytes: Option<u64>,
    /// How long counting rows for the census of a backup may take, seconds; 0 counts nothing (proofs then end at L4).
    pub census_s: u32,
    /// How often a backup writes down what it has stored, seconds: so much work is lost at most when it is interrupted, or 3 %
    /// of what was done, if that is more. It does so after every GiB, too. 0 means whenever something new is stored.
    pub checkpoint_s: u32,
    /// Days, 1 to 365, within which what backups take over unread is read once all the same, a share of it by each: what times
    /// of files and WAL summaries did not tell is found then.
    pub reread_days: u32,
    /// How much WAL a backup may make the server keep, bytes, at least 64 MiB. A repository that takes WAL more slowly
    /// than the server writes it ends the backup here. Four segments are always allowed.
    pub wal_held_max_bytes: u64,
    /// The backup also ends when less than this is free on the file system of `pg_wal` and it holds back more than four
    /// segments. Absent: 5 % of that file system, at least 1 GiB and at most 16 GiB. 0 switches it
    /// off.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wal_free_min_bytes: Option<u64>,
    /// A standby whose content may be older than this many seconds is not backed up: a backup of it would be taken for one of
    /// today. 0 takes any.
    pub standby_lag_max_s: u32,
    /// A dump that reads one database for longer than this, seconds, is told, with what its snapshot keeps vacuum from removing
    /// on the whole server. 0 tells nothing.
    pub dump_warn_s: u32,
    /// A dump that reads one database for longer than this, seconds, is ended, and nothing is committed. 0 lets it run.
    pub dump_max_s: u32,
}

impl Default for BackupConfig {
    fn default() -> Self {
        Self {
            processes: 0,
            compression_level: 3,
            nice: 10,
            rate_limit_bytes: None,
            census_s: 600,
            checkpoint_s: 60,
            reread_days: 30,
            wal_held_max_bytes: 64 << 30,
            wal_free_min_bytes: None,
            standby_lag_max_s: 3_600,
            dump_warn_s: 4 * 3_600,
            dump_max_s: 0,
        }
    }
}

impl BackupConfig {
    /// How many days of re-reading there may be.
    pub const REREAD_DAYS: std::ops::RangeInclusive<u32> = 1..=365;
    /// What is said of any other number.
    pub const REREAD_DAYS_ARE: &str =
        "1 to 365; a backup with --full-read reads everything at once";

    /// Within which time everything is read again.
    pub(crate) fn reread_within(&self) -> Duration {
        Duration::from_hours(24 * u64::from(self.reread_days))
    }
}

/// How servers on this host reach the archive of WAL.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ArchiveConfig {
    /// The socket at which `pgmuster wal push --socket` and `wal get --socket` find this worker; `wal.sock` in `state_dir` when
    /// absent. A worker without clusters has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<Utf8PathBuf>,
}

/// A repository.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RepositoryConfig {
    /// What clusters call it by.
    pub name: String,
    /// `file:///path` or `s3://bucket/prefix`, with `?endpoint=…&region=…&path-style=true` for other S3 servers.
    pub url: String,
    /// Where the repository's key file is. Either this or a passphrase.
    #[serde(default)]
    pub key: Option<SecretRef>,
    /// Where a passphrase of the repository is.
    #[serde(default)]
    pub passphrase: Option<SecretRef>,
    /// S3 access key id; the standard AWS chain when absent.
    #[serde(default)]
    pub access_key_id: Option<SecretRef>,
    /// S3 secret access key.
    #[serde(default)]
    pub secret_access_key: Option<SecretRef>,
}

impl RepositoryConfig {
    /// What opens it on a command line: the option, and its reference.
    pub(crate) fn opener(&self) -> Result<(&'static str, &SecretRef), Failure> {
        match (&self.key, &self.passphrase) {
            (Some(key), _) => Ok(("--key", key)),
            (None, Some(passphrase)) => Ok(("--passphrase", passphrase)),
            (None, None) => Err(Failure::bug("a repository has either a key or a passphrase")),
        }
    }
}

/// A cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ClusterConfig {
    /// What people call it.
    pub name: ClusterName,
    /// URL, `key=value` connection string, or `service=NAME`. Without a password in it.
    pub connection: String,
    /// Where the password is; `.pgpass`, peer and certificates need none.
    #[serde(default)]
    pub password: Option<SecretRef>,
    /// Its data directory as this worker sees it; what the server says when absent. One that is named here is never read
    /// over connections instead.
    #[serde(default)]
    pub data_directory: Option<Utf8PathBuf>,
    /// How its files are read.
    #[serde(default)]
    pub files: FilesConfig,
    /// The repository its backups go to.
    #[serde(default)]
    pub repository: Option<String>,
    /// Labels for policies and selectors.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Kinds of jobs for this cluster; all that the worker may do when absent.
    #[serde(default)]
    pub kinds: Option<Vec<JobKind>>,
    /// Every so many seconds, 5 to 3600, the worker commits a transaction in it that changes nothing, so that proofs can ask a
    /// restored server for it. None when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub heartbeat_s: Option<u32>,
    /// What must be true of its content in a proof of level 6. Queries stand here and nowhere else: none travels with a job.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub assertions: Vec<AssertionConfig>,
    /// Where all this comes from, for hints that say how to change it.
    #[serde(skip)]
    pub given_by: GivenBy,
}

/// Where the settings of a cluster come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum GivenBy {
    /// From its section of a worker's configuration.
    #[default]
    File,
    /// From the arguments of `pgmuster up`.
    Up,
    /// From the arguments of `pgmuster backup --server`.
    Backup,
}

impl ClusterConfig {
    /// What must be true of a restored server of this cluster.
    pub fn assertions(&self) -> Vec<Assertion> {
        let assertions = self.assertions.iter().map(|assertion| Assertion {
            name: assertion.name.clone(),
            database: assertion.database.clone(),
            sql: assertion.sql.clone(),
            within: Duration::from_secs(assertion.within_s.into()),
        });
        assertions.collect()
    }
}

/// A query that must answer true on a restored server.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AssertionConfig {
    /// What it is called in proofs: 1 to 40 letters, digits, `-` and `_`, unique in the cluster.
    pub name: String,
    /// The database in which it is asked.
    pub database: DatabaseName,
    /// One query that answers with exactly one row of one boolean column. It runs in the sandbox's server as a role that reads
    /// everything and is no superuser, in a transaction that is read-only and rolled back, with `search_path = pg_catalog`: tables
    /// are written with their schema.
    pub sql: String,
    /// How long it may take, 1 to 86400 seconds.
    #[serde(default = "AssertionConfig::within_s")]
    pub within_s: u32,
}

impl AssertionConfig {
    /// Five minutes.
    fn within_s() -> u32 {
        300
    }

    fn is_named(&self) -> bool {
        let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
        (1..=40).contains(&self.name.len()) && self.name.bytes().all(allowed)
    }
}

/// Assertions of one cluster: a proof tells of each.
const ASSERTIONS_MAX: usize = 100;
/// Seconds that one assertion may take.
const WITHIN_S: std::ops::RangeInclusive<u32> = 1..=86_400;

/// Seconds between two heartbeats: fewer would be work, more would say little.
const HEARTBEAT_S: std::ops::RangeInclusive<u32> = 5..=3_600;

/// How the files of a cluster are read for a physical backup.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FilesConfig {
    /// By this worker itself where it can, else over connections where the role may.
    #[default]
    Auto,
    /// By this worker itself.
    Local,
    /// Over connections to the server.
    Remote,
}

impl WorkerConfig {
    /// Every problem that can be seen without opening anything; empty when there is none.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut require = |holds: bool, problem: String| {
            if !holds {
                problems.push(problem);
            }
        };
        require((1..=64).contains(&self.slots.routine), "slots.routine: 1 to 64".to_owned());
        require((1..=16).contains(&self.slots.urgent), "slots.urgent: 1 to 16".to_owned());
        require(self.state_dir.is_absolute(), "state_dir: an absolute path".to_owned());
        require(
            self.archive.socket.as_ref().is_none_or(|socket| socket.is_absolute()),
            "archive.socket: an absolute path".to_owned(),
        );
        require(
            self.sandbox.directory.is_absolute(),
            "sandbox.directory: an absolute path".to_owned(),
        );
        require(
            (-7..=19).contains(&self.backup.compression_level),
            "backup.compression_level: -7 to 19".to_owned(),
        );
        require(
            self.backup.wal_held_max_bytes >= 64 << 20,
            "backup.wal_held_max_bytes: at least 67108864 (64 MiB)".to_owned(),
        );
        require(self.backup.nice <= 19, "backup.nice: 0 to 19".to_owned());
        require(
            self.backup.rate_limit_bytes.is_none_or(|limit| limit >= RATE_LIMIT_MIN_BYTES),
            format!("backup.rate_limit_bytes: at least {RATE_LIMIT_MIN_BYTES} (1 MiB)"),
        );
        require(self.backup.processes <= 256, "backup.processes: 0 to 256".to_owned());
        require(
            BackupConfig::REREAD_DAYS.contains(&self.backup.reread_days),
            format!("backup.reread_days: {}", BackupConfig::REREAD_DAYS_ARE),
        );
        for root in &self.allow.restore_roots {
            require(
                root.is_absolute() && root.components().count() > 1,
                format!("allow.restore_roots: {root}: an absolute path that is not /"),
            );
        }
        let url = &self.broker.url;
        let is_url = url.starts_with("amqp://") || url.starts_with("amqps://");
        let authority = url.split('/').nth(2).unwrap_or_default();
        let user = authority.rsplit_once('@').map_or("", |(user, _)| user);
        if is_url && user.contains(':') {
            require(
                false,
                "broker.url holds a password; put the whole URL into a file and write file:/path"
                    .to_owned(),
            );
        } else {
            require(
                is_url || url == "memory" || url.parse::<SecretRef>().is_ok(),
                "broker.url: amqp://, amqps://, or a reference (file:, env: or exec:)".to_owned(),
            );
        }
        let mut repositories = BTreeSet::new();
        for repository in &self.repositories {
            let name = &repository.name;
            require(
                repositories.insert(name.as_str()),
                format!("repositories: {name} is there twice"),
            );
            require(
                repository.url.starts_with("file:///") || repository.url.starts_with("s3://"),
                format!("repositories.{name}.url: file:///path or s3://bucket/prefix"),
            );
            require(
                repository.key.is_some() != repository.passphrase.is_some(),
                format!("repositories.{name}: either key or passphrase"),
            );
            require(
                repository.access_key_id.is_some() == repository.secret_access_key.is_some(),
                format!("repositories.{name}: access_key_id and secret_access_key go together"),
            );
        }
        let mut clusters = BTreeSet::new();
        for cluster in &self.clusters {
            let name = &cluster.name;
            require(clusters.insert(name.as_str()), format!("clusters: {name} is there twice"));
            if let Some(repository) = &cluster.repository {
                require(
                    repositories.contains(repository.as_str()),
                    format!("clusters.{name}.repository: there is no repository {repository:?}"),
                );
            }
            require(
                cluster.files != FilesConfig::Remote || cluster.data_directory.is_none(),
                format!("clusters.{name}: data_directory has no meaning with files = \"remote\""),
            );
            require(
                cluster.heartbeat_s.is_none_or(|every| HEARTBEAT_S.contains(&every)),
                format!(
                    "clusters.{name}.heartbeat_s: {} to {}; without it there are no heartbeats",
                    HEARTBEAT_S.start(),
                    HEARTBEAT_S.end()
                ),
            );
            require(
                cluster.assertions.len() <= ASSERTIONS_MAX,
                format!("clusters.{name}.assertions: at most {ASSERTIONS_MAX}"),
            );
            let mut asserted = BTreeSet::new();
            for assertion in &cluster.assertions {
                let called = &assertion.name;
                let place = format!("clusters.{name}.assertions");
                require(
                    assertion.is_named(),
                    format!("{place}: {called:?}: a name is 1 to 40 letters, digits, - and _"),
                );
                require(asserted.insert(called), format!("{place}: {called:?} is there twice"));
                require(
                    !assertion.sql.trim().is_empty(),
                    format!("{place}: {called:?}: sql is empty"),
                );
                require(
                    WITHIN_S.contains(&assertion.within_s),
                    format!("{place}: {called:?}: within_s: 1 to 86400"),
                );
            }
        }
        problems
    }

    /// Where servers on this host find the archive.
    pub fn wal_socket(&self) -> Utf8PathBuf {
        self.archive.socket.clone().unwrap_or_else(|| self.state_dir.join("wal.sock"))
    }

    /// The cluster of this name.
    pub fn cluster(&self, name: &ClusterName) -> Option<&ClusterConfig> {
        self.clusters.iter().find(|cluster| cluster.name == *name)
    }

    /// Whether the configuration allows this kind of job for this cluster. Kinds that run for clusters of other workers
    /// (proofs, restores, probes) need no entry of the cluster.
    pub fn allows(&self, kind: JobKind, cluster: &ClusterName) -> bool {
        self.allow.kinds.contains(&kind)
            && self
                .cluster(cluster)
                .and_then(|cluster| cluster.kinds.as_ref())
                .is_none_or(|kinds| kinds.contains(&kind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAMPLE: &str = r#"
        name = "w1"
        site = "fra1"
        state_dir = "/var/lib/pgmuster"
        [broker]
        url = "file:/etc/pgmuster/amqp.url"
        [sandbox]
        directory = "/var/tmp"
        [[repositories]]
        name = "main"
        url = "file:///srv/repo"
        key = "file:/etc/pgmuster/main.key"
        [[clusters]]
        name = "orders"
        connection = "service=orders"
        repository = "main"
        kinds = ["backup"]
    "#;

    #[test]
    fn defaults_are_right_and_a_cluster_may_allow_less() {
        let config: WorkerConfig = toml::from_str(SAMPLE).unwrap();
        assert_eq!(config.problems(), Vec::<String>::new());
        let orders = "orders".parse().unwrap();
        assert!(config.allows(JobKind::Backup, &orders));
        assert!(!config.allows(JobKind::Vacuum, &orders));
        assert!(config.allows(JobKind::VerifyRestore, &"elsewhere".parse().unwrap()));
    }

    #[test]
    fn a_repository_is_opened_by_a_key_or_a_passphrase() {
        let key = r#"key = "file:/etc/pgmuster/main.key""#;
        let passphrase = r#"passphrase = "env:PASSPHRASE""#;
        for (given, problems) in [
            (key.to_owned(), 0),
            (passphrase.to_owned(), 0),
            (format!("{key}\n{passphrase}"), 1),
            (String::new(), 1),
        ] {
            let config: WorkerConfig = toml::from_str(&SAMPLE.replace(key, &given)).unwrap();
            let found = config.problems();
            assert_eq!(found.len(), problems, "{given}: {found:?}");
            assert!(found.iter().all(|problem| problem.contains("either key or passphrase")));
        }
    }

    #[test]
    fn everything_is_read_again_within_a_day_to_a_year() {
        for (days, is_right) in [(0, false), (1, true), (365, true), (366, false)] {
            let given = format!("{SAMPLE}[backup]\nreread_days = {days}");
            let problems = toml::from_str::<WorkerConfig>(&given).unwrap().problems();
            assert_eq!(problems.is_empty(), is_right, "{days}: {problems:?}");
            assert!(problems.iter().all(|problem| problem.contains("--full-read")), "{problems:?}");
        }
        let config: WorkerConfig = toml::from_str(SAMPLE).unwrap();
        assert_eq!(config.backup.reread_within(), Duration::from_hours(720));
    }

    #[test]
    fn assertions_have_a_name_a_database_and_a_query() {
        let parse = |assertions: &str| {
            let given = SAMPLE.replace("kinds =", &format!("assertions = [{assertions}]\nkinds ="));
            toml::from_str::<WorkerConfig>(&given)
        };
        let one = r#"{ name = "Rows_are-there", database = "shop", sql = "SELECT true" }"#;
        let config = parse(one).unwrap();
        assert_eq!(config.problems(), Vec::<String>::new());
        let asserted = config.clusters[0].assertions();
        assert_eq!(asserted[0].within, Duration::from_mins(5));
        assert!(parse(&one.replace("sql", "query = 1, sql")).is_err());
        assert!(parse(&one.replace("shop", "")).is_err());
        let wrong = [
            one.to_owned(),
            one.replace("Rows_are-there", "a b").replace("SELECT true", " \\n"),
            one.replace("sql", "within_s = 0, sql"),
        ];
        let problems = parse(&wrong.join(", ")).unwrap().problems();
        let told = ["a name is 1 to 40", "sql is empty", "is there twice", "within_s: 1 to 86400"];
        assert_eq!(problems.len(), told.len(), "{problems:?}");
        for (problem, what) in problems.iter().zip(told) {
            assert!(problem.starts_with("clusters.orders.assertions: "), "{problem}");
            assert!(problem.contains(what), "{problem}: {what}");
        }
        let many: Vec<String> =
            (0..=ASSERTIONS_MAX).map(|n| one.replace("Rows_are-there", &format!("a{n}"))).collect();
        assert_eq!(parse(&many.join(", ")).unwrap().problems().len(), 1);
    }

    #[test]
    fn all_problems_are_told_at_once() {
        let broken = SAMPLE.replace("\"/var/tmp\"", "\"relative\"").replace(
            "repository = \"main\"",
            "repository = \"mian\"\ndata_directory = \"/data\"\nfiles = \"remote\"\nheartbeat_s = 0",
        );
        let problems = toml::from_str::<WorkerConfig>(&broken).unwrap().problems();
        assert_eq!(problems.len(), 4, "{problems:?}");
        assert!(problems[1].contains("mian"));
        assert!(problems[2].contains("data_directory"));
        assert!(problems[3].contains("heartbeat_s: 5 to 3600"));
    }
}
