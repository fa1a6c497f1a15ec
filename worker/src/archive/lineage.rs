//! Into which lineage a server archives, and out of which it recovers.

use proto::near::did_you_mean;
use proto::{Action, BackupKind, ClusterName, Code, Failure, LineageId, SystemIdentifier};
use repository::{Identity, Repository};
use serde::{Deserialize, Serialize};

use crate::clock;

/// Whose WAL it is, as somebody said.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whose {
    /// This lineage.
    Lineage(LineageId),
    /// The one lineage of this cluster that has the server's system identifier.
    Cluster(ClusterName),
    /// The same, and somebody says that the repository may never have seen this cluster: its first WAL begins its lineage.
    New(ClusterName),
}

impl Whose {
    /// Finds the lineage to read from. Without a system identifier, the cluster must have one lineage only.
    pub(super) async fn find(
        &self,
        repository: &Repository,
        system_identifier: Option<SystemIdentifier>,
    ) -> Result<Identity, Failure> {
        match self {
            Self::Lineage(lineage) => named(repository, *lineage, system_identifier).await,
            Self::Cluster(cluster) | Self::New(cluster) => {
                let known = known(repository, cluster, system_identifier).await?;
                choose(repository, cluster, known, system_identifier).await
            }
        }
    }

    /// The same for a server that archives. A cluster that the repository has never seen gets its lineage, the same that its
    /// first backup would make, if it may be new; any other is refused: its name may be a slip, and what is archived under a
    /// name that nobody restores is lost.
    pub(super) async fn find_or_mint(
        &self,
        repository: &Repository,
        system_identifier: Option<SystemIdentifier>,
    ) -> Result<Identity, Failure> {
        let (Self::New(cluster), Some(server)) = (self, system_identifier) else {
            return self.find(repository, system_identifier).await;
        };
        let known = known(repository, cluster, system_identifier).await?;
        if known.is_empty() {
            return Ok(repository.find_or_mint_lineage(cluster, server, clock::now_ms()).await?);
        }
        choose(repository, cluster, known, system_identifier).await
    }
}

async fn named(
    repository: &Repository,
    lineage: LineageId,
    system_identifier: Option<SystemIdentifier>,
) -> Result<Identity, Failure> {
    let identity = repository.identity(lineage).await?;
    if !identity.kind.is_physical() {
        let what = format!(
            "lineage {lineage} holds logical backups of cluster {}, and such a lineage has no WAL",
            identity.cluster
        );
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what)
            .with_hint("`pgmuster repo list URL --key FILE` shows the lineages; --cluster finds the right one."));
    }
    match system_identifier {
        Some(server) if server != identity.system_identifier => Err(another(&identity, server)),
        _ => Ok(identity),
    }
}

/// The lineages of a cluster that has this system identifier; if there are none, or nobody knows that identifier, all of
/// the cluster. Only that has to look at what is not the cluster's.
async fn known(
    repository: &Repository,
    cluster: &ClusterName,
    system_identifier: Option<SystemIdentifier>,
) -> Result<Vec<Identity>, Failure> {
    if let Some(server) = system_identifier {
        let own = repository.lineages_of(BackupKind::Physical, cluster, server).await?;
        if !own.is_empty() {
            return Ok(own);
        }
    }
    let mut all = repository.list_lineages().await?;
    all.retain(|identity| identity.cluster == *cluster && identity.kind.is_physical());
    Ok(all)
}

async fn choose(
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
            let there = repository.list_lineages().await?;
            let names = there.iter().map(|identity| identity.cluster.as_str());
            let meant = did_you_mean(cluster.as_str(), names);
            let what = format!("{place} has no lineage of cluster {cluster}{meant}");
            Err(Failure::new(Code::ClusterUnknown, Action::FixConfig, what).with_hint(
                "Correct --cluster: `pgmuster repo list URL --key FILE` shows the clusters there are. A new one begins with its first \
                 backup, with `pgmuster cluster enable-wal`, or with `wal push --new`.",
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
