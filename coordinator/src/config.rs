//! The coordinator's configuration, as it stands in its file. Secrets are references (`file:`, `env:`, `exec:`);
//! whoever starts the coordinator resolves them.

use std::net::SocketAddr;
use std::path::PathBuf;

use policy::{LeasePolicy, RetryPolicy};
use proto::WorkerName;
use proto::secret_ref::SecretRef;
use serde::{Deserialize, Serialize};

use crate::objectives::ObjectivesConfig;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// Name of this coordinator, `coordinator` unless said otherwise: 1 to 63 characters of a-z, 0-9, `-` and `_`.
    /// Each of several coordinators needs a name of its own.
    #[serde(default = "default_name")]
    pub name: WorkerName,
    /// Where the signing key is: a reference to 32 bytes as base64. Workers pin its public half.
    pub signing_key: SecretRef,
    /// What the coordinator remembers, and where.
    pub catalog: CatalogConfig,
    /// How it reaches the workers.
    pub broker: BrokerConfig,
    /// How people and programs reach it.
    #[serde(default)]
    pub listen: ListenConfig,
    /// How long things may take.
    #[serde(default)]
    pub timing: TimingConfig,
    /// Defaults of jobs.
    #[serde(default)]
    pub jobs: JobsConfig,
    /// What is promised for clusters.
    #[serde(default)]
    pub objectives: ObjectivesConfig,
}

/// Where the catalog is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CatalogConfig {
    /// `sqlite:/path/to/catalog.sqlite`, `postgres://user@host/database` without a password, or a reference to a URL.
    pub url: String,
}

/// Where RabbitMQ is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BrokerConfig {
    /// `memory` (everything in one process), `amqp://user@host/vhost` without a password, or a reference to a URL.
    pub url: String,
}

/// Where the API listens.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ListenConfig {
    /// A Unix socket for local use. Whoever may open it (mode 0600) may do everything.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// An address for remote use. Every call needs a token.
    #[serde(default)]
    pub tcp: Option<SocketAddr>,
    /// Listen beyond loopback although this program does not speak TLS there: something in front of it must.
    #[serde(default)]
    pub plaintext_beyond_loopback: bool,
}

/// How long things may take, milliseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TimingConfig {
    /// How long an attempt counts as alive after a pulse of its worker; at least three times as long as the worker lets
    /// pass between two pulses.
    pub lease_ms: u32,
    /// How long a silent attempt may stay without evidence before it counts as lost, unproven.
    pub patience_ms: u32,
    /// How often the coordinator shows that it is alive; workers miss it after 20 seconds.
    pub beacon_ms: u32,
    /// How long a ticket may stay unanswered before it is sent again.
    pub ticket_ms: u32,
    /// How long a leader leads without renewing, and so how long nobody leads after it died.
    pub leader_ms: u32,
}

/// Workers must hear a few beacons before they believe that nobody is there.
const BEACON_MAX_MS: u32 = 6_000;

impl Default for TimingConfig {
    fn default() -> Self {
        Self {
            lease_ms: 60_000,
            patience_ms: 600_000,
            beacon_ms: 5_000,
            ticket_ms: 30_000,
            leader_ms: 10_000,
        }
    }
}

/// Defaults of jobs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobsConfig {
    /// How many attempts a job gets.
    pub attempts_max: u32,
    /// An attempt ends itself after this long, milliseconds.
    pub deadline_ms: u64,
    /// Pause after the first failed attempt, milliseconds; doubles each time.
    pub retry_first_ms: u32,
    /// The longest pause, milliseconds.
    pub retry_max_ms: u32,
    /// Order a backup when WAL is missing in a cluster's archive, or nothing of it leads on from the newest backup.
    pub backup_behind_gaps: bool,
}

impl Default for JobsConfig {
    fn default() -> Self {
        Self {
            attempts_max: 3,
            deadline_ms: 24 * 3_600_000,
            retry_first_ms: 5_000,
            retry_max_ms: 600_000,
            backup_behind_gaps: true,
        }
    }
}

fn default_name() -> WorkerName {
    "coordinator".parse().expect("it is a name")
}

impl Config {
    /// Every problem there is, each a sentence that names its key. Empty when the configuration can be used.
    pub fn validate(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let schemes = ["sqlite", "postgres", "postgresql"];
        check_url("catalog.url", &self.catalog.url, &schemes, &mut problems);
        if self.broker.url != "memory" {
            check_url("broker.url", &self.broker.url, &["amqp", "amqps"], &mut problems);
        }
        if self.listen.socket.is_none() && self.listen.tcp.is_none() {
            problems.push(
                "listen: set socket, tcp or both, or nobody can reach the coordinator".to_owned(),
            );
        }
        if let Some(socket) = &self.listen.socket
            && !socket.is_absolute()
        {
            problems.push(format!("listen.socket: {} must be an absolute path", socket.display()));
        }
        if let Some(tcp) = self.listen.tcp
            && !tcp.ip().is_loopback()
            && !self.listen.plaintext_beyond_loopback
        {
            problems.push(format!(
                "listen.tcp: {tcp} is reachable from other machines, where tokens would travel in plain text; put TLS \
                 in front of a loopback address, or set listen.plaintext_beyond_loopback = true"
            ));
        }
        let t = &self.timing;
        let at_least = |key: &str, value: u32, least: u32, problems: &mut Vec<String>| {
            if value < least {
                problems.push(format!("timing.{key}: {value} is too short, at least {least}"));
            }
        };
        at_least("lease_ms", t.lease_ms, 1_000, &mut problems);
        at_least("beacon_ms", t.beacon_ms, 100, &mut problems);
        if t.beacon_ms > BEACON_MAX_MS {
            problems.push(format!(
                "timing.beacon_ms: {} is too long, at most {BEACON_MAX_MS}: workers would take a live coordinator for dead",
                t.beacon_ms
            ));
        }
        at_least("ticket_ms", t.ticket_ms, 1_000, &mut problems);
        at_least("leader_ms", t.leader_ms, 1_000, &mut problems);
        at_least("patience_ms", t.patience_ms, t.lease_ms, &mut problems);
        if self.jobs.attempts_max == 0 {
            problems.push("jobs.attempts_max: 0 attempts run nothing, at least 1".to_owned());
        }
        if self.jobs.deadline_ms == 0 || i64::try_from(self.jobs.deadline_ms).is_err() {
            problems
                .push(format!("jobs.deadline_ms: {} is no length of time", self.jobs.deadline_ms));
        }
        if self.jobs.retry_first_ms > self.jobs.retry_max_ms {
            problems.push(
                "jobs.retry_first_ms: the first pause is longer than jobs.retry_max_ms".to_owned(),
            );
        }
        problems.extend(self.objectives.problems());
        problems
    }

    /// How long an attempt counts as alive after a pulse of a worker that sends one this often: two may be missed.
    pub(crate) fn lease_ms(&self, every_ms: i64) -> i64 {
        i64::from(self.timing.lease_ms).max(every_ms.saturating_mul(3))
    }

    pub(crate) fn lease_policy(&self) -> LeasePolicy {
        LeasePolicy {
            lease_ms: i64::from(self.timing.lease_ms),
            patience_ms: i64::from(self.timing.patience_ms),
            ..LeasePolicy::default()
        }
    }

    pub(crate) fn retry_policy(&self, attempts_max: u32) -> RetryPolicy {
        RetryPolicy {
            attempts_max,
            pause_first_ms: i64::from(self.jobs.retry_first_ms),
            pause_max_ms: i64::from(self.jobs.retry_max_ms),
        }
    }
}

/// The reference in a setting that may be a URL or a reference to one.
pub fn reference(url: &str) -> Option<SecretRef> {
    url.parse().ok()
}

fn check_url(key: &str, url: &str, schemes: &[&str], problems: &mut Vec<String>) {
    if reference(url).is_some() {
        return;
    }
    let Some((scheme, rest)) = url.split_once(':') else {
        problems.push(format!("{key}: neither a URL nor a reference (file:, env: or exec:)"));
        return;
    };
    if !schemes.contains(&scheme) {
        problems.push(format!("{key}: must begin with {}: or be a reference", schemes.join(":, ")));
    }
    let authority = rest.trim_start_matches('/').split('/').next().unwrap_or_default();
    let user = authority.rsplit_once('@').map(|(user, _)| user);
    if user.is_some_and(|user| user.contains(':')) || rest.contains("password=") {
        problems.push(format!(
            "{key}: holds a password; put the whole URL into a file and write file:/path, or into the environment and write env:NAME"
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        Config {
            name: default_name(),
            signing_key: "file:/key".parse().unwrap(),
            catalog: CatalogConfig { url: "sqlite:/var/lib/pgmuster/catalog.sqlite".to_owned() },
            broker: BrokerConfig { url: "env:AMQP_URL".to_owned() },
            listen: ListenConfig {
                socket: Some("/run/pgmuster.sock".into()),
                ..ListenConfig::default()
            },
            timing: TimingConfig::default(),
            jobs: JobsConfig::default(),
            objectives: ObjectivesConfig::default(),
        }
    }

    #[test]
    fn a_good_configuration_has_no_problems() {
        assert_eq!(config().validate(), Vec::<String>::new());
    }

    #[test]
    fn all_problems_are_told_at_once_and_no_password_is_repeated() {
        let mut bad = config();
        bad.catalog.url = "postgres://u:hunter2@h/d".to_owned();
        bad.broker.url = "http://h".to_owned();
        bad.listen =
            ListenConfig { tcp: Some("0.0.0.0:7700".parse().unwrap()), ..ListenConfig::default() };
        bad.timing.lease_ms = 5;
        bad.timing.beacon_ms = 6_001;
        bad.jobs.attempts_max = 0;
        let problems = bad.validate();
        let keys: Vec<&str> = problems.iter().map(|p| p.split(':').next().unwrap()).collect();
        assert_eq!(
            keys,
            [
                "catalog.url",
                "broker.url",
                "listen.tcp",
                "timing.lease_ms",
                "timing.beacon_ms",
                "jobs.attempts_max"
            ]
        );
        assert!(!problems.join(" ").contains("hunter2"));
    }

    #[test]
    fn an_unknown_key_is_refused() {
        let text = r#"{"signing_key": "file:/k", "catalog": {"url": "sqlite:/c"}, "broker": {"url": "memory"}, "lisen": {}}"#;
        assert!(serde_json::from_str::<Config>(text).unwrap_err().to_string().contains("lisen"));
    }
}
