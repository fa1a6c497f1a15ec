//! What this worker can do right now: asked of the servers themselves, not only read from the configuration.

use std::path::PathBuf;
use std::time::Duration;

use futures::future::join_all;
use postgres::binaries::Binaries;
use postgres::{Purpose, connect_maintenance};
use proto::message::{
    ArchiveSetup, ClusterOffer, HeartbeatSetup, Offers, RepositoryOffer, WalBacklog,
};
use proto::{Action, Code, Failure, JobId};

use crate::attempt::scrub_failure;
use crate::context::blocking;
use crate::engines::native::{self, Access};
use crate::places::Cluster;
use crate::shared::Shared;
use crate::{backlog, clock};

/// One server may take this long to say who it is.
const LOOK_MAX: Duration = Duration::from_secs(10);
/// The majors a sandbox may be asked for.
const MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

/// Looks at everything this worker serves. `majors` are those that were found before, where that is not long ago.
pub(crate) async fn look(shared: &Shared, majors: Option<Vec<u32>>) -> Offers {
    let clusters = join_all(shared.places.clusters().map(|cluster| look_at(shared, cluster))).await;
    let bin_dirs = native::bin_dirs(&shared.config);
    Offers {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        kinds: shared.config.allow.kinds.clone(),
        clusters,
        repositories: shared
            .places
            .repositories()
            .map(|place| RepositoryOffer {
                name: place.config.name.clone(),
                location: place.config.url.split('?').next().unwrap_or_default().to_owned(),
            })
            .collect(),
        restore_roots: shared.config.allow.restore_roots.iter().map(ToString::to_string).collect(),
        postgres_majors: match majors {
            Some(majors) => majors,
            None => find_majors(&bin_dirs).await,
        },
    }
}

fn silent(cluster: &proto::ClusterName, what: &str) -> Failure {
    let message = format!("the {what} of {cluster} did not answer within {} s", LOOK_MAX.as_secs());
    Failure::new(Code::ServerUnreachable, Action::Retry, message)
}

async fn find_majors(bin_dirs: &[PathBuf]) -> Vec<u32> {
    let mut found = Vec::new();
    for major in MAJORS {
        if Binaries::find(major, bin_dirs).await.is_ok() {
            found.push(major);
        }
    }
    found
}

async fn look_at(shared: &Shared, cluster: &Cluster) -> ClusterOffer {
    let mut offer = ClusterOffer {
        name: cluster.config.name.clone(),
        labels: cluster.config.labels.clone(),
        repository: cluster.config.repository.clone(),
        system_identifier: None,
        server_version_num: None,
        files: false,
        remote: false,
        problem: None,
        archive: None,
        repository_away: shared.held.away(&cluster.config.name),
        repository_look: Some(shared.held.last_look(&cluster.config.name)),
        heartbeat: cluster.config.heartbeat_s.map(|every_s| HeartbeatSetup {
            every_s,
            problem: shared.heartbeats.problem(&cluster.config.name),
        }),
        assertions: !cluster.config.assertions.is_empty(),
        reads_little: None,
    };
    let asked = tokio::time::timeout(LOOK_MAX, async {
        let purpose = Purpose::ask(&JobId(shared.boot.0));
        let session = connect_maintenance(&cluster.target, &purpose).await?;
        let identity = session.identity().await?;
        let archiver = session.archiver().await?;
        Ok::<_, postgres::Error>((session, identity, archiver))
    });
    match asked.await {
        Ok(Ok((session, identity, archiver))) => {
            offer.archive = archiver.map(|archiver| ArchiveSetup {
                mode: archiver.mode,
                has_command: archiver.has_command,
                pending_restart: archiver.pending_restart,
                failing_at: archiver.failing_at,
                backlog: None,
            });
            offer.system_identifier = Some(identity.system_identifier);
            offer.server_version_num = Some(identity.version.0);
            offer.reads_little = (!identity.reads_all).then(|| identity.role.clone());
            // A dead mount answers nobody.
            let looked =
                tokio::time::timeout(LOOK_MAX, native::access(cluster, &identity, &session)).await;
            match looked.unwrap_or_else(|_| Err(silent(&offer.name, "file system"))) {
                Ok(access) => {
                    offer.files = true;
                    offer.remote = access == Access::Remote;
                    if let (Access::Here(directory), Some(archive)) = (access, &mut offer.archive)
                        && archive.mode != "off"
                    {
                        archive.backlog = backlog(directory).await;
                    }
                }
                Err(failure) => offer.problem = Some(failure),
            }
        }
        Ok(Err(error)) => offer.problem = Some(error.into()),
        Err(_) => {
            offer.problem = Some(silent(&offer.name, "server"));
        }
    }
    scrubbed(offer)
}

/// What waits in `pg_wal`; `None` also when that cannot be seen now.
async fn backlog(directory: PathBuf) -> Option<WalBacklog> {
    let look = blocking(move || Ok(backlog::look(&directory, clock::now_ms()).ok().flatten()));
    tokio::time::timeout(LOOK_MAX, look).await.ok()?.ok()?
}

/// An offer is stored and becomes the reason why a job waits; servers, drivers and poolers quote what they were given.
fn scrubbed(mut offer: ClusterOffer) -> ClusterOffer {
    let heartbeat = offer.heartbeat.iter_mut().filter_map(|heartbeat| heartbeat.problem.as_mut());
    let away = offer.repository_away.iter_mut().map(|away| &mut away.failure);
    offer.problem.iter_mut().chain(heartbeat).chain(away).for_each(scrub_failure);
    offer
}

#[cfg(test)]
mod tests {
    use proto::message::RepositoryAway;

    use super::*;

    #[test]
    fn what_a_server_says_leaves_the_worker_without_secrets() {
        let message = "failed to connect: pooler: bad option in postgresql://app:hunter2@db/shop";
        let problem = Failure::new(Code::ServerUnreachable, Action::Retry, message)
            .with_hint("Try password=hunter2 once more.");
        let repository_away = Some(RepositoryAway {
            place: "s3://backups".to_owned(),
            since_ms: 1,
            failure: problem.clone(),
        });
        let offer = scrubbed(ClusterOffer {
            name: "orders".parse().unwrap(),
            labels: std::collections::BTreeMap::new(),
            repository: None,
            system_identifier: None,
            server_version_num: None,
            files: false,
            remote: false,
            problem: Some(problem.clone()),
            archive: None,
            repository_away,
            repository_look: None,
            heartbeat: Some(HeartbeatSetup { every_s: 60, problem: Some(problem) }),
            assertions: false,
            reads_little: None,
        });
        let told = serde_json::to_string(&offer).unwrap();
        assert!(!told.contains("hunter2"), "{told}");
        assert!(told.contains("pooler") && told.contains("once more"), "{told}");
    }
}
