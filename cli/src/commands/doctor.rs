//! `doctor`: what this machine has, what the fleet says, and what a configuration can reach.

use std::path::Path;
use std::time::Duration;

use broker::{Broker, RabbitOptions};
use coordinator::api::types::{ClusterView, HealthView, WorkerView};
use postgres::binaries::Binaries;
use postgres::{Environment, Purpose, connect_maintenance};
use proto::backup::grant_reading;
use proto::message::{ArchiveSetup, ClusterOffer};
use proto::{ClusterName, Failure, JobId, SecretRef};
use secrecy::SecretString;
use serde::Serialize;
use worker::config::WorkerConfig;
use worker::engines::native;
use worker::places::Places;

use crate::args::{Doctor, Output};
use crate::client::Client;
use crate::commands::archiving::{self, Seen};
use crate::commands::recovery;
use crate::commands::repo::SINGLE_WRITER;
use crate::exit::Exit;
use crate::{configs, environment, output, secrets};

/// How long RabbitMQ may take to answer.
const BROKER_MAX: Duration = Duration::from_secs(10);

/// One thing that was looked at, or could not be and need not have been.
#[derive(Debug, Default, Serialize)]
struct Finding {
    what: String,
    good: bool,
    /// Nothing is known of it, which is no finding.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    not_looked_at: bool,
    detail: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    hint: String,
}

impl Finding {
    fn mark(&self) -> &'static str {
        match (self.good, self.hint.is_empty()) {
            _ if self.not_looked_at => "--  ",
            (true, true) => "ok  ",
            (true, false) => "note",
            (false, _) => "FAIL",
        }
    }
}

/// `doctor`.
pub(crate) async fn run(
    client: Result<Client, Failure>,
    args: &Doctor,
    format: Output,
) -> Result<Exit, Failure> {
    let mut findings = Vec::new();
    binaries(&mut findings).await;
    for path in &args.config {
        configuration(path, &mut findings).await;
    }
    match client {
        Ok(client) => coordinator(&client, args.config.is_empty(), &mut findings).await,
        Err(failure) => findings.push(bad("coordinator", &failure)),
    }
    output::show(format, &findings, |findings| {
        let row = |finding: &Finding| {
            let hint = match finding.hint.as_str() {
                "" => String::new(),
                hint => format!("\n     {:<26} {hint}", ""),
            };
            format!("{} {:<26} {}{hint}", finding.mark(), finding.what, finding.detail)
        };
        findings.iter().map(row).collect::<Vec<_>>().join("\n")
    });
    let all_good = findings.iter().all(|finding| finding.good);
    Ok(if all_good { Exit::Ok } else { Exit::Findings })
}

fn good(what: impl Into<String>, detail: impl Into<String>) -> Finding {
    Finding { what: what.into(), good: true, detail: detail.into(), ..Finding::default() }
}

fn not_looked_at(what: &str, failure: &Failure) -> Finding {
    Finding { not_looked_at: true, ..good(what, format!("not looked at: {failure}")) }
}

fn bad(what: impl Into<String>, failure: &Failure) -> Finding {
    let detail = failure.to_string();
    Finding { what: what.into(), detail, hint: failure.hint.clone(), ..Finding::default() }
}

async fn binaries(findings: &mut Vec<Finding>) {
    let mut versions = Vec::new();
    for major in 14..=18 {
        if let Ok(found) = Binaries::find(major, &[]).await {
            versions.push(format!("{}.{}", found.major(), found.minor()));
        }
    }
    if versions.is_empty() {
        let what = "no PostgreSQL programs are installed, so nothing can be proved here";
        let failure = Failure::new(proto::Code::BinariesMissing, proto::Action::FixConfig, what)
            .with_hint("Install the server's package, for example apt-get install postgresql-15.");
        findings.push(bad("PostgreSQL programs", &failure));
    } else {
        findings.push(good("PostgreSQL programs", versions.join(", ")));
    }
}

async fn coordinator(client: &Client, required: bool, findings: &mut Vec<Finding>) {
    match client.health().await {
        Err(failure) if required => return findings.push(bad("coordinator", &failure)),
        Err(failure) => return findings.push(not_looked_at("coordinator", &failure)),
        Ok(health) => {
            findings.extend(wellbeing(&health));
            // It knows its workers from the catalog.
            if !health.catalog {
                return;
            }
        }
    }
    // Without them it is still known what each worker says.
    let clusters = client.get::<Vec<ClusterView>>("/v1/clusters").await.unwrap_or_default();
    if let Ok(workers) = client.get::<Vec<WorkerView>>("/v1/workers").await {
        let now_ms = environment::now_ms();
        for worker in workers {
            let seen = output::ago(now_ms, worker.seen_at_ms);
            let detail = format!("site {}, last pulse {seen}", worker.site);
            findings.push(Finding {
                good: worker.alive,
                ..good(format!("worker {}", worker.name), detail)
            });
            for cluster in worker.offers.iter().flat_map(|offers| &offers.clusters) {
                if !worker.alive {
                    // What a dead worker said last is no news of the server.
                    let what = format!("cluster {}", cluster.name);
                    let detail = format!("not known: worker {} was last heard {seen}", worker.name);
                    let hint = format!("Start worker {} again, and look at its log.", worker.name);
                    findings.push(Finding { good: false, hint, ..good(what, detail) });
                    continue;
                }
                let view = clusters.iter().find(|view| view.name == cluster.name);
                let behind = match view {
                    Some(view) => recovery::behind_gap(client, view).await,
                    None => None,
                };
                let seen = Seen::of(view.and_then(|view| view.wal.as_ref()), behind);
                findings.extend(served(worker.name.as_str(), cluster, seen, now_ms));
            }
        }
    }
}

/// What a living worker says of a cluster.
fn served(worker: &str, cluster: &ClusterOffer, seen: Seen<'_>, now_ms: i64) -> Vec<Finding> {
    let what = format!("cluster {}", cluster.name);
    let mut findings = vec![match &cluster.problem {
        Some(failure) => bad(what, failure),
        None if cluster.remote => {
            good(what, format!("served by {worker}, which reads its files over connections"))
        }
        None => good(what, format!("served by {worker}")),
    }];
    if let Some(role) = &cluster.reads_little {
        findings.push(reads_little(&cluster.name, role));
    }
    if let Some(away) = &cluster.repository_away {
        let (place, failure) = (&away.place, &away.failure);
        let since = output::ago(now_ms, Some(away.since_ms));
        let detail = format!("{place}: {failure}; first seen so {since}");
        let (what, hint) = (format!("repository of {}", cluster.name), failure.hint.clone());
        findings.push(Finding { what, detail, hint, ..Finding::default() });
    }
    if let Some(setup) = &cluster.archive {
        findings.push(archives(&cluster.name, setup, seen, now_ms));
    }
    if let Some(problem) = cluster.heartbeat.as_ref().and_then(|setup| setup.problem.as_ref()) {
        findings.push(bad(format!("heartbeats of {}", cluster.name), problem));
    }
    findings
}

/// That a role may not read every table, which hinders no backup.
fn reads_little(cluster: &ClusterName, role: &str) -> Finding {
    let detail = format!(
        "role {role} is no member of pg_read_all_data: a backup does not count the rows of tables that it may not read, and no \
         proof compares these (L5)"
    );
    let hint = format!("{} Later backups then count every table.", grant_reading(role));
    Finding { hint, ..good(format!("rows of {cluster}"), detail) }
}

/// Whether its WAL comes into its archive.
fn archives(cluster: &ClusterName, setup: &ArchiveSetup, seen: Seen<'_>, now_ms: i64) -> Finding {
    let said = archiving::said(cluster, setup, seen, now_ms);
    let what = format!("archiving of {cluster}");
    let (good, detail, hint) = (said.is_good, said.what, said.cure);
    Finding { what, good, detail, hint, ..Finding::default() }
}

/// What a coordinator says of itself, one finding each.
fn wellbeing(health: &HealthView) -> [Finding; 4] {
    let finding = |what: &str, good: bool, yes: &str, no: &str, hint: &str| Finding {
        what: format!("coordinator's {what}"),
        good,
        detail: if good { yes } else { no }.to_owned(),
        hint: if good { String::new() } else { hint.to_owned() },
        ..Finding::default()
    };
    [
        good("coordinator", format!("answers, version {}", health.version)),
        finding(
            "broker",
            health.broker,
            "connected",
            "not connected: no job is given out and no report arrives",
            "Look at RabbitMQ, and at broker.url in the coordinator's configuration.",
        ),
        finding(
            "catalog",
            health.catalog,
            "answers",
            "does not answer: nothing can be ordered or decided",
            "Look at the database in catalog.url of the coordinator's configuration, and at its disk.",
        ),
        finding(
            "leadership",
            health.leader,
            "this coordinator leads",
            "this coordinator does not lead",
            "Right where another coordinator on the same catalog leads: ask that one. Otherwise its log says why not.",
        ),
    ]
}

async fn configuration(path: &Path, findings: &mut Vec<Finding>) {
    let what = path.display().to_string();
    let config: WorkerConfig = match configs::read(path, WorkerConfig::problems) {
        Ok(config) => config,
        Err(failure) => return findings.push(bad(what, &failure)),
    };
    findings.push(good(what, "can be read"));
    findings.push(match broker(&config.broker.url).await {
        Ok(()) => good("RabbitMQ", "answers"),
        Err(failure) => bad("RabbitMQ", &failure),
    });
    let places = match Places::resolve(&config, &Environment::of_process(), &secrets::resolve) {
        Ok(places) => places,
        Err(failure) => return findings.push(bad("secrets", &failure)),
    };
    for place in places.repositories() {
        let what = format!("repository {}", place.config.name);
        findings.push(match place.open().await {
            Ok(repository) if repository.is_single_writer() => {
                good(what, format!("{}, degraded: {SINGLE_WRITER}", repository.describe()))
            }
            Ok(repository) => good(what, repository.describe()),
            Err(failure) => bad(what, &failure),
        });
    }
    let now_ms = u64::try_from(environment::now_ms()).unwrap_or(0);
    let purpose = Purpose::ask(&JobId::mint(now_ms, repository::random()));
    for cluster in places.clusters() {
        let what = format!("cluster {}", cluster.config.name);
        let (mut archiver, mut reader) = (None, None);
        let looked = async {
            let session = connect_maintenance(&cluster.target, &purpose).await?;
            archiver = session.archiver().await?;
            let server = session.identity().await?;
            reader = (!server.reads_all).then(|| server.role.clone());
            postgres::settings::require_for_backup(&session).await?;
            let access = native::access(cluster, &server, &session).await?;
            session.close().await;
            let version = server.version.0;
            let (major, minor) = (version / 10_000, version % 10_000);
            Ok::<String, Failure>(format!("PostgreSQL {major}.{minor} {access}"))
        };
        findings.push(match looked.await {
            Ok(detail) => good(what, detail),
            Err(failure) => bad(what, &failure),
        });
        findings.extend(reader.map(|role| reads_little(&cluster.config.name, &role)));
        if let Some(archiver) = archiver {
            let last = archiver.last_archived;
            let setup = ArchiveSetup {
                mode: archiver.mode,
                has_command: archiver.has_command,
                pending_restart: archiver.pending_restart,
                failing_at: archiver.failing_at,
                backlog: None,
            };
            let seen =
                last.as_ref().map_or(Seen::Nothing, |(file, at_ms)| Seen::Told(file, *at_ms));
            findings.push(archives(&cluster.config.name, &setup, seen, environment::now_ms()));
        }
    }
}

async fn broker(setting: &str) -> Result<(), Failure> {
    let url = match setting.parse::<SecretRef>() {
        Ok(reference) => secrets::resolve(&reference)?,
        Err(_) => SecretString::from(setting.to_owned()),
    };
    let broker = Broker::rabbit(RabbitOptions::new(url, "pgmuster doctor"));
    let answered = broker.wait_up(BROKER_MAX).await;
    broker.close().await;
    Ok(answered?)
}

#[cfg(test)]
mod tests {
    use proto::envelope::SigningKey;
    use proto::message::RepositoryAway;

    use super::*;

    #[test]
    fn a_cluster_is_told_with_its_archive() {
        let setup = ArchiveSetup {
            mode: "off".to_owned(),
            has_command: true,
            pending_restart: vec!["archive_mode".to_owned()],
            failing_at: None,
            backlog: None,
        };
        let offer = |problem, archive| ClusterOffer {
            name: "orders".parse().unwrap(),
            labels: std::collections::BTreeMap::new(),
            repository: None,
            system_identifier: None,
            server_version_num: None,
            files: true,
            remote: false,
            problem,
            archive,
            repository_away: None,
            repository_look: None,
            heartbeat: None,
            assertions: false,
            reads_little: None,
        };
        let found = served("w1", &offer(None, Some(setup)), Seen::Nothing, 1);
        let told: Vec<(&str, bool)> = found.iter().map(|f| (f.what.as_str(), f.good)).collect();
        assert_eq!(told, [("cluster orders", true), ("archiving of orders", false)]);
        assert!(found[1].detail.starts_with("PENDING RESTART"), "{found:?}");
        let down = Failure::new(proto::Code::ServerUnreachable, proto::Action::Retry, "it is down");
        let found = served("w1", &offer(Some(down), None), Seen::Nothing, 1);
        assert!(found.len() == 1 && !found[0].good, "{found:?}");
        let missing =
            Failure::new(proto::Code::RepositoryMissing, proto::Action::FixConfig, "none")
                .with_hint("Check its URL.");
        let place = "s3://backups".to_owned();
        let away = RepositoryAway { place, since_ms: 1, failure: missing };
        let found = served(
            "w1",
            &ClusterOffer { repository_away: Some(away), ..offer(None, None) },
            Seen::Nothing,
            60_001,
        );
        let told: Vec<(&str, bool)> = found.iter().map(|f| (f.what.as_str(), f.good)).collect();
        assert_eq!(told, [("cluster orders", true), ("repository of orders", false)]);
        assert!(found[1].detail.starts_with("s3://backups: REPOSITORY_MISSING: none"), "{found:?}");
        assert_eq!(found[1].hint, "Check its URL.");
        let reads_little = Some("backup".to_owned());
        let found =
            served("w1", &ClusterOffer { reads_little, ..offer(None, None) }, Seen::Nothing, 1);
        let told: Vec<(&str, bool)> = found.iter().map(|f| (f.what.as_str(), f.good)).collect();
        assert_eq!(told, [("cluster orders", true), ("rows of orders", true)], "a note");
        assert!(found[1].hint.contains("GRANT pg_read_all_data TO \"backup\";"), "{found:?}");
    }

    #[test]
    fn what_was_not_looked_at_is_not_called_good_and_is_no_finding() {
        let away =
            Failure::new(proto::Code::CoordinatorUnreachable, proto::Action::Retry, "none answers");
        let unseen = not_looked_at("coordinator", &away);
        assert_eq!((unseen.mark(), unseen.good), ("--  ", true), "{unseen:?}");
        assert_eq!(serde_json::to_value(&unseen).unwrap()["not_looked_at"], true);
        let seen = good("coordinator", "answers");
        assert_eq!(seen.mark(), "ok  ");
        assert!(serde_json::to_value(&seen).unwrap().get("not_looked_at").is_none());
        assert_eq!(bad("coordinator", &away).mark(), "FAIL");
    }

    #[test]
    fn each_part_of_a_coordinator_has_its_own_finding() {
        let sick = HealthView {
            catalog: false,
            broker: true,
            leader: false,
            version: "0.1.0".to_owned(),
            public_key: SigningKey::from_seed(&[7; 32]).public(),
        };
        let found = wellbeing(&sick);
        let marks: Vec<(&str, bool)> = found.iter().map(|f| (f.what.as_str(), f.good)).collect();
        let expected = [
            ("coordinator", true),
            ("coordinator's broker", true),
            ("coordinator's catalog", false),
            ("coordinator's leadership", false),
        ];
        assert_eq!(marks, expected);
        assert!(found.iter().all(|f| f.good == f.hint.is_empty()), "{found:?}");
    }
}
