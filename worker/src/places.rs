//! The clusters and repositories of a worker, with their secrets resolved.

use std::collections::BTreeMap;
use std::sync::Arc;

use async_trait::async_trait;
use postgres::{Environment, Target};
use proto::{Action, ClusterName, Code, Failure, SecretRef};
use repository::{KeyFile, Repository, Unlock, store};
use secrecy::{ExposeSecret as _, SecretString};
use tokio::sync::Mutex;

use crate::archive::Whose;
use crate::archive::service::{OpenArchive, another_repository};
use crate::config::{ClusterConfig, RepositoryConfig, WorkerConfig};

/// Turns a reference into the secret; given by whoever may read the environment.
pub type Resolve<'a> = &'a dyn Fn(&SecretRef) -> Result<SecretString, Failure>;

/// What a worker can reach.
#[derive(Debug)]
pub struct Places {
    clusters: BTreeMap<ClusterName, Cluster>,
    repositories: BTreeMap<String, RepositoryPlace>,
}

/// A cluster and how to log in there.
#[derive(Debug)]
pub struct Cluster {
    /// Its section of the configuration.
    pub config: ClusterConfig,
    /// Where and as whom.
    pub target: Target,
}

/// A repository and what opens it.
#[derive(Debug)]
pub struct RepositoryPlace {
    /// Its section of the configuration.
    pub config: RepositoryConfig,
    opener: Opener,
    credentials: store::Credentials,
    kept: Mutex<Option<Arc<Repository>>>,
}

/// What opens a repository. Whether it does is known when the repository is first needed.
#[derive(Debug)]
enum Opener {
    KeyFile(SecretString),
    Passphrase(SecretString),
}

impl Places {
    /// Resolves every secret of the configuration.
    pub fn resolve(
        config: &WorkerConfig,
        environment: &Environment,
        resolve: Resolve<'_>,
    ) -> Result<Self, Failure> {
        let mut clusters = BTreeMap::new();
        for cluster in &config.clusters {
            let mut target = Target::parse(&cluster.connection, environment)?;
            if target.has_inline_password() {
                return Err(Failure::new(
                    Code::ConfigInvalid,
                    Action::FixConfig,
                    format!("clusters.{}.connection holds a password", cluster.name),
                )
                .with_hint(
                    "Put it into a file and say password = \"file:/path\", or use .pgpass.",
                ));
            }
            if let Some(password) = &cluster.password {
                target = target.with_password(resolve(password)?);
            }
            clusters.insert(cluster.name.clone(), Cluster { config: cluster.clone(), target });
        }
        let mut repositories = BTreeMap::new();
        for repository in &config.repositories {
            let credentials = match (&repository.access_key_id, &repository.secret_access_key) {
                (Some(id), Some(secret)) => store::Credentials {
                    access_key_id: Some(resolve(id)?.expose_secret().to_owned()),
                    secret_access_key: Some(resolve(secret)?),
                    ..store::Credentials::default()
                },
                _ => store::Credentials::default(),
            };
            let opener = match (&repository.key, &repository.passphrase) {
                (Some(key), None) => Opener::KeyFile(resolve(key)?),
                (None, Some(passphrase)) => Opener::Passphrase(resolve(passphrase)?),
                _ => return Err(Failure::bug("a repository has either a key or a passphrase")),
            };
            let place = RepositoryPlace {
                config: repository.clone(),
                opener,
                credentials,
                kept: Mutex::default(),
            };
            repositories.insert(repository.name.clone(), place);
        }
        Ok(Self { clusters, repositories })
    }

    /// Every cluster.
    pub fn clusters(&self) -> impl Iterator<Item = &Cluster> {
        self.clusters.values()
    }

    /// The cluster of this name.
    pub fn cluster(&self, name: &ClusterName) -> Result<&Cluster, Failure> {
        self.clusters.get(name).ok_or_else(|| {
            Failure::new(
                Code::ClusterUnknown,
                Action::RetryElsewhere,
                format!("this worker does not serve {name}"),
            )
            .with_hint("Add it to [[clusters]] of a worker's configuration.")
        })
    }

    /// Every repository, opened or not.
    pub fn repositories(&self) -> impl Iterator<Item = &RepositoryPlace> {
        self.repositories.values()
    }

    /// The repository for a cluster, opened for one job: see [`RepositoryPlace::open`].
    pub async fn repository_for(&self, cluster: &ClusterName) -> Result<Repository, Failure> {
        self.place_for(cluster)?.open().await
    }

    /// Where the backups of a cluster go: what its section names; for a cluster of another worker, the only one there is.
    pub fn place_for(&self, cluster: &ClusterName) -> Result<&RepositoryPlace, Failure> {
        let named = self.clusters.get(cluster).and_then(|c| c.config.repository.as_deref());
        let place = match named {
            Some(name) => self.repositories.get(name),
            None if self.repositories.len() == 1 => self.repositories.values().next(),
            None => None,
        };
        place.ok_or_else(|| {
            Failure::new(
                Code::ConfigInvalid,
                Action::RetryElsewhere,
                format!("this worker does not know the repository of {cluster}"),
            )
            .with_hint("Name it in the cluster's section: repository = \"main\".")
        })
    }
}

/// The archives of WAL of a worker.
#[async_trait]
impl OpenArchive for Arc<Places> {
    async fn open(&self, whose: Whose, named: Option<String>) -> Result<Repository, Failure> {
        let place = match (whose, &named) {
            (Whose::Cluster(cluster) | Whose::New(cluster), _) => {
                self.cluster(&cluster)?;
                self.place_for(&cluster)?
            }
            (Whose::Lineage(_), None) if self.repositories.len() == 1 => {
                self.repositories().next().ok_or_else(|| Failure::bug("one is the first"))?
            }
            (Whose::Lineage(lineage), None) => {
                let what = format!(
                    "this worker has several repositories, and lineage {lineage} may be in each"
                );
                return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what)
                    .with_hint("Name the repository as well, or the cluster."));
            }
            (Whose::Lineage(_), Some(named)) => {
                let same = self.repositories().find(|place| place.config.url == *named);
                same.ok_or_else(|| another_repository(named))?
            }
        };
        match named {
            Some(named) if named != place.config.url => Err(another_repository(&named)),
            _ => place.open().await,
        }
    }

    fn has_written_down(&self, cluster: &ClusterName) -> bool {
        self.clusters.contains_key(cluster)
    }
}

impl RepositoryPlace {
    /// Opens the repository as a restore would that has nothing else: with its key, from what is in the store now. A job
    /// that went on with what another one had opened would not notice that the store is no longer mounted, or that no key
    /// opens it any more.
    pub async fn open(&self) -> Result<Repository, Failure> {
        let key: KeyFile;
        let unlock = match &self.opener {
            Opener::KeyFile(text) => {
                key = text.expose_secret().parse().map_err(|error| {
                    let name = &self.config.name;
                    let message = format!("repositories.{name}.key: failed to {error}");
                    Failure::new(Code::KeyWrong, Action::FixConfig, message)
                        .with_hint("Give the key file that was written when the key was made.")
                })?;
                Unlock::KeyFile(&key)
            }
            Opener::Passphrase(passphrase) => Unlock::Passphrase(passphrase),
        };
        let store = store::open(&self.config.url, &self.credentials)
            .await
            .map_err(repository::Error::from)?;
        Ok(Repository::open_with(store, unlock).await?)
    }

    /// The same, opened once, for whoever looks at it again and again and decides nothing.
    pub(crate) async fn kept(&self) -> Result<Arc<Repository>, Failure> {
        let mut kept = self.kept.lock().await;
        if let Some(repository) = kept.as_ref() {
            return Ok(Arc::clone(repository));
        }
        let repository = Arc::new(self.open().await?);
        *kept = Some(Arc::clone(&repository));
        Ok(repository)
    }

    /// What was kept does not answer as it should: the next one who asks opens what is there now.
    pub(crate) async fn let_go(&self, repository: &Arc<Repository>) {
        let mut kept = self.kept.lock().await;
        if kept.as_ref().is_some_and(|kept| Arc::ptr_eq(kept, repository)) {
            *kept = None;
        }
    }
}
