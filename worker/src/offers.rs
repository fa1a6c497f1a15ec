//! What this worker can do right now: asked of the servers themselves, not only read from the configuration.

use std::time::Duration;

use futures::future::join_all;
use postgres::binaries::Binaries;
use postgres::{Purpose, connect_maintenance};
use proto::message::{ClusterOffer, Offers, RepositoryOffer};
use proto::{Action, Code, Failure, JobId};

use crate::engines::native;
use crate::places::Cluster;
use crate::shared::Shared;

/// One server may take this long to say who it is.
const LOOK_MAX: Duration = Duration::from_secs(10);
/// The majors a sandbox may be asked for.
const MAJORS: std::ops::RangeInclusive<u32> = 14..=18;

/// Looks at everything this worker serves.
pub(crate) async fn look(shared: &Shared) -> Offers {
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
        postgres_majors: majors(&bin_dirs).await,
    }
}

async fn majors(bin_dirs: &[std::path::PathBuf]) -> Vec<u32> {
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
        problem: None,
    };
    let asked = tokio::time::timeout(LOOK_MAX, async {
        let purpose = Purpose::ask(&JobId(shared.boot.0));
        let session = connect_maintenance(&cluster.target, &purpose).await?;
        session.identity().await
    });
    match asked.await {
        Ok(Ok(identity)) => {
            offer.system_identifier = Some(identity.system_identifier);
            offer.server_version_num = Some(identity.version.0);
            match native::data_directory(cluster, &identity) {
                Ok(_) => offer.files = true,
                Err(failure) => offer.problem = Some(failure),
            }
        }
        Ok(Err(error)) => offer.problem = Some(error.into()),
        Err(_) => {
            let message = format!("{} did not answer within {} s", offer.name, LOOK_MAX.as_secs());
            offer.problem = Some(Failure::new(Code::ServerUnreachable, Action::Retry, message));
        }
    }
    offer
}
