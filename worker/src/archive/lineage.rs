//! Into which lineage a server archives, and out of which it recovers.

use proto::{Action, ClusterName, Code, Failure, LineageId, SystemIdentifier};
use repository::{Identity, Repository};

use crate::clock;

/// Whose WAL it is, as somebody said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Whose {
    /// This lineage.
    Lineage(LineageId),
    /// The one lineage of this cluster that has the server's system identifier.
    Cluster(ClusterName),
}

impl Whose {
    /// Finds the lineage to read from. Without a system identifier, the cluster must have one lineage only.
    pub(super) async fn find(
        &self,
        repository: &Repository,
        system_identifier: Option<SystemIdentifier>,
    ) -> Result<Identity, Failure> {
        let (cluster, all) = match self {
            Self::Lineage(lineage) => {
                let identity = repository.identity(*lineage).await?;
                return match system_identifier {
                    Some(server) if server != identity.system_identifier => {
                        Err(another(&identity, server))
                    }
                    _ => Ok(identity),
                };
            }
            Self::Cluster(cluster) => (cluster, of_cluster(repository, cluster).await?),
        };
        choose(repository, cluster, all, system_identifier)
    }

    /// The same for a server that archives. The first WAL of a cluster that the repository has never seen mints its
    /// lineage, the same that its first backup would.
    pub(super) async fn find_or_mint(
        &self,
        repository: &Repository,
        system_identifier: Option<SystemIdentifier>,
    ) -> Result<Identity, Failure> {
        if let (Self::Cluster(cluster), Some(server)) = (self, system_identifier)
            && of_cluster(repository, cluster).await?.is_empty()
        {
            return Ok(repository.find_or_mint_lineage(cluster, server, clock::now_ms()).await?);
        }
        self.find(repository, system_identifier).await
    }
}

async fn of_cluster(
    repository: &Repository,
    cluster: &ClusterName,
) -> Result<Vec<Identity>, Failure> {
    let mut all = repository.list_lineages().await?;
    // A lineage of logical backups has no WAL.
    all.retain(|identity| identity.cluster == *cluster && identity.kind.is_physical());
    Ok(all)
}

fn choose(
    repository: &Repository,
    cluster: &ClusterName,
    mut all: Vec<Identity>,
    system_identifier: Option<SystemIdentifier>,
) -> Result<Identity, Failure> {
    let place = repository.describe();
    let known = all.clone();
    all.retain(|identity| {
        system_identifier.is_none_or(|server| identity.system_identifier == server)
    });
    match (all.pop(), all.is_empty()) {
        (Some(identity), true) => Ok(identity),
        (Some(last), false) => {
            all.push(last);
            let ids: Vec<String> = all.iter().map(|row| row.lineage.to_string()).collect();
            let what =
                format!("{cluster} has {} lineages in {place}: {}", ids.len(), ids.join(", "));
            Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what)
                .with_hint("Say which one with --lineage ID."))
        }
        (None, _) => {
            if let (Some(identity), Some(server)) = (known.first(), system_identifier) {
                return Err(another(identity, server));
            }
            let what = format!("there is no lineage of cluster {cluster} in {place}");
            Err(Failure::new(Code::BackupUnknown, Action::FixConfig, what).with_hint(
                "`pgmuster repo list URL --key FILE` shows the clusters there are; the first backup of one, or its first \
                 WAL, makes its lineage.",
            ))
        }
    }
}

fn another(identity: &Identity, server: SystemIdentifier) -> Failure {
    let what = format!(
        "the server has system identifier {server}, and lineage {} of cluster {} belongs to {}",
        identity.lineage, identity.cluster, identity.system_identifier
    );
    Failure::new(Code::SystemIdentifierMismatch, Action::FixConfig, what).with_hint(
        "Two clusters never share a lineage: correct the cluster's name, or the lineage, in archive_command and restore_command.",
    )
}
