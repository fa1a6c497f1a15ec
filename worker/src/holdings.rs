//! Which backups of its clusters a worker finds in their repositories: what somebody deleted or gave up must not count as
//! something to recover from.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::future::join_all;
use proto::message::{Holdings, RepositoryAway, RepositoryLook};
use proto::{
    Action, BackupId, BackupKind, ClusterName, Code, Failure, LineageId, SystemIdentifier,
};
use repository::Repository;
use tokio::sync::Semaphore;

use crate::away::Away;
use crate::clock;
use crate::places::{Cluster, RepositoryPlace};
use crate::shared::Shared;

/// How often a repository is looked into.
const LOOK_EVERY: Duration = Duration::from_mins(10);
/// The same while it cannot be, or the server has not said yet who it is.
const LOOK_SOON: Duration = Duration::from_secs(30);
/// One look may take this long.
const LOOK_MAX: Duration = Duration::from_mins(5);
/// Repositories that are looked into at the same time.
const LOOKS_MAX: usize = 4;
/// Backups that are told in one pulse, unless those of one cluster are more.
const TOLD_AT_ONCE_MAX: usize = 2_000;

/// What was seen last.
#[derive(Debug)]
pub(crate) struct Held {
    seen: Mutex<BTreeMap<ClusterName, Seen>>,
    /// Whose repository is not there.
    away: Mutex<BTreeMap<ClusterName, RepositoryAway>>,
    /// How the last look for each ended.
    looked: Mutex<BTreeMap<ClusterName, RepositoryLook>>,
    /// Who may look.
    looks: Arc<Semaphore>,
}

#[derive(Debug)]
struct Seen {
    holdings: Holdings,
    is_told: bool,
}

impl Default for Held {
    fn default() -> Self {
        let looks = Arc::new(Semaphore::new(LOOKS_MAX));
        let (seen, away, looked) = (Mutex::default(), Mutex::default(), Mutex::default());
        Self { seen, away, looked, looks }
    }
}

impl Held {
    fn note(&self, holdings: Holdings) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.insert(holdings.cluster.clone(), Seen { holdings, is_told: false });
    }

    fn note_away(&self, cluster: &ClusterName, told: Option<&RepositoryAway>) {
        let mut away = self.away.lock().unwrap_or_else(PoisonError::into_inner);
        match told {
            Some(told) => away.insert(cluster.clone(), told.clone()),
            None => away.remove(cluster),
        };
    }

    /// Whether the repository of a cluster is not there, as it was looked last.
    pub(crate) fn away(&self, cluster: &ClusterName) -> Option<RepositoryAway> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner).get(cluster).cloned()
    }

    fn note_look(&self, cluster: &ClusterName, look: RepositoryLook) {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        looked.insert(cluster.clone(), look);
    }

    /// How the last look for a cluster ended.
    pub(crate) fn last_look(&self, cluster: &ClusterName) -> RepositoryLook {
        let looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        looked.get(cluster).cloned().unwrap_or(RepositoryLook::NotYet)
    }

    /// What is to be told now; to a coordinator that is `new`, everything, a part with each pulse. It counts as told.
    pub(crate) fn due(&self, is_new: bool) -> Vec<Holdings> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if is_new {
            seen.values_mut().for_each(|seen| seen.is_told = false);
        }
        let (mut due, mut backups) = (Vec::new(), 0);
        for seen in seen.values_mut().filter(|seen| !seen.is_told) {
            backups += seen.holdings.told();
            if backups > TOLD_AT_ONCE_MAX && !due.is_empty() {
                break;
            }
            seen.is_told = true;
            due.push(seen.holdings.clone());
        }
        due
    }

    /// What was told did not get through.
    pub(crate) fn not_told(&self, holdings: &[Holdings]) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for Holdings { cluster, .. } in holdings {
            if let Some(seen) = seen.get_mut(cluster) {
                seen.is_told = false;
            }
        }
    }
}

/// Looks into the repository of every cluster that this worker serves, for ever.
pub(crate) async fn watch(shared: Arc<Shared>) {
    join_all(shared.places.clusters().map(|cluster| watch_one(&shared, cluster))).await;
}

async fn watch_one(shared: &Shared, cluster: &Cluster) {
    let name = &cluster.config.name;
    let Ok(place) = shared.places.place_for(name) else { return };
    let mut offered = shared.offered.subscribe();
    let mut is_failing = false;
    let mut away = Away::default();
    loop {
        // Whose backups they are the server must have said once.
        let known = offered.wait_for(Option::is_some).await.ok().and_then(|offers| {
            let mut clusters = offers.iter().flat_map(|offers| &offers.clusters);
            clusters.find(|offer| offer.name == *name)?.system_identifier
        });
        let looked = look_in_time(shared, place, name, known).await;
        let told = away.heed(&place.config.url, looked.as_ref().map(|_| ()), clock::Seen::now());
        shared.held.note_away(name, told);
        shared.held.note_look(name, shown(&looked));
        let was_failing = std::mem::replace(&mut is_failing, looked.is_err());
        let is_known = matches!(looked, Ok(Some(_)));
        match looked {
            Ok(Some(Looked { holdings, .. })) => shared.held.note(holdings),
            Err(failure) if !was_failing => {
                tracing::warn!(cluster = %name, "Nobody knows which backups there are: {failure}");
            }
            Ok(None) | Err(_) => {}
        }
        tokio::time::sleep(if is_known { LOOK_EVERY } else { LOOK_SOON }).await;
    }
}

/// What a look into a repository found of a cluster.
struct Looked {
    lineages: Vec<LineageId>,
    holdings: Holdings,
}

/// How a look ended, as it is told.
fn shown(looked: &Result<Option<Looked>, Failure>) -> RepositoryLook {
    match looked {
        Ok(looked) => RepositoryLook::Found {
            lineages: looked.as_ref().map(|looked| looked.lineages.clone()),
        },
        Err(_) => RepositoryLook::Failed,
    }
}

/// Without a server, whether there is a repository.
async fn look_in_time(
    shared: &Shared,
    place: &RepositoryPlace,
    cluster: &ClusterName,
    server: Option<SystemIdentifier>,
) -> Result<Option<Looked>, Failure> {
    let _one_of_few = shared.held.looks.acquire().await;
    let looked = async {
        // Anew: of a store that is no longer mounted nothing is said.
        let repository = place.open().await?;
        match server {
            Some(server) => look_at(place, &repository, cluster, server).await.map(Some),
            None => Ok(None),
        }
    };
    let looked = tokio::time::timeout(LOOK_MAX, looked).await;
    looked.unwrap_or_else(|_| {
        let message = format!("its backups are not listed after {} s", LOOK_MAX.as_secs());
        Err(Failure::new(Code::DeadlineExceeded, Action::Retry, message))
    })
}

/// What an opened repository has, if it is still at its place afterwards: one that is no longer mounted looks as if all were gone
/// from it.
async fn look_at(
    place: &RepositoryPlace,
    repository: &Repository,
    cluster: &ClusterName,
    server: SystemIdentifier,
) -> Result<Looked, Failure> {
    let looked = look(repository, cluster, server).await?;
    if place.open().await?.id() != repository.id() {
        let message = "another repository came to its place meanwhile";
        return Err(Failure::new(Code::StoreUnavailable, Action::Retry, message));
    }
    Ok(looked)
}

/// The backups of one server that are there and that nobody gave up, by their names: every worker looks every ten minutes.
async fn look(
    repository: &Repository,
    cluster: &ClusterName,
    server: SystemIdentifier,
) -> Result<Looked, Failure> {
    let at_ms = clock::now_ms();
    let (mut lineages, mut there, mut copies) = (Vec::new(), Vec::<BackupId>::new(), Vec::new());
    for kind in [BackupKind::Physical, BackupKind::Logical] {
        for identity in repository.lineages_of(kind, cluster, server).await? {
            // Whether one can be read is not looked at: what cannot be read now may be read later.
            there.extend(repository.held_by_name(identity.lineage).await?);
            copies.append(&mut repository.copies(identity.lineage).await?);
            lineages.push(identity.lineage);
        }
    }
    let holdings = Holdings::new(cluster.clone(), repository.describe(), server, at_ms, there);
    let holdings = holdings.with_copies(copies);
    Ok(Looked { lineages, holdings })
}

#[cfg(test)]
mod tests {
    use std::io;

    use async_trait::async_trait;
    use bytes::Bytes;
    use postgres::Environment;
    use proto::{AttemptId, LineageId, Lsn};
    use repository::store::directory::DirectoryStore;
    use repository::store::layer::Layer;
    use repository::store::{Store, StoreError};
    use repository::{
        Encryption, InitOptions, Intent, Source, SourceEntry, SourceFile, Wish, WriteOptions,
    };
    use secrecy::SecretString;

    use super::*;
    use crate::config::WorkerConfig;
    use crate::places::Places;

    const SERVER: SystemIdentifier = SystemIdentifier(7);

    struct NoSource;

    impl Source for NoSource {
        fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
            Ok(None)
        }
    }

    async fn back_up(repository: &Repository, lineage: LineageId, n: u8) -> BackupId {
        let facts = serde_json::json!({
            "cluster": "orders", "system_identifier": SERVER, "server_version_num": 150_018,
            "catalog_version": 1, "block_size": 8192, "wal_segment_size": 1 << 20,
            "data_checksums": true, "timeline": 1, "start_lsn": Lsn(1), "stop_lsn": Lsn(2),
            "started_at_ms": n, "stopped_at_ms": n, "backup_label": "",
        });
        let attempt = AttemptId::mint(n.into(), [n; 10]);
        let intent = Intent { attempt, follows: None, by: "w".into(), began_at_ms: n.into() };
        let attempt = repository.begin(lineage, intent).await.unwrap();
        let mut writer = attempt.write(WriteOptions::default()).unwrap();
        let entry = SourceEntry::bytes("file", 0o600, n.to_string());
        writer.copy(Arc::new(NoSource), vec![Ok(entry)]).await.unwrap();
        let facts = serde_json::from_value(facts).unwrap();
        let written = writer.finish(Arc::new(NoSource), vec![], facts).await.unwrap();
        written.commit(i64::from(n) + 1).await.unwrap().backup
    }

    #[tokio::test]
    async fn what_was_given_up_or_deleted_is_not_held() {
        let place = tempfile::tempdir().unwrap();
        let store = Arc::new(DirectoryStore::new(place.path().join("repository")));
        let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
        let repository = Repository::init(store, options).await.unwrap().repository;
        let cluster: ClusterName = "orders".parse().unwrap();
        let identity = repository.find_or_mint_lineage(&cluster, SERVER, 1).await.unwrap();
        let lineage = identity.lineage;
        let held = async || look(&repository, &cluster, SERVER).await.unwrap().holdings.backups;
        assert!(held().await.is_empty());
        let mut backups = Vec::new();
        for n in 1..=4 {
            backups.push(back_up(&repository, lineage, n).await);
        }
        assert_eq!(held().await, backups);
        let wish = Wish { by: "tester".into(), why: String::new(), at_ms: 9 };
        repository.forget(lineage, backups[0], &wish).await.unwrap();
        assert_eq!(held().await, backups[1..]);
        repository.remember(lineage, backups[0], &wish).await.unwrap();
        assert_eq!(held().await, backups, "somebody took that back");
        let directory =
            place.path().join(format!("repository/lineages/{lineage}/backups/{}", backups[1]));
        std::fs::remove_file(directory.join("manifest")).unwrap();
        std::fs::write(directory.with_file_name(backups[2].to_string()).join("verdict"), "x")
            .unwrap();
        let left = held().await;
        assert_eq!(
            left,
            [backups[0], backups[2], backups[3]],
            "what is unreadable may be read later"
        );
        let another = look(&repository, &cluster, SystemIdentifier(8)).await.unwrap();
        assert!(another.holdings.backups.is_empty(), "of another server");
    }

    /// Remembers what was read.
    #[derive(Debug)]
    struct Read {
        inner: DirectoryStore,
        keys: Mutex<Vec<String>>,
    }

    #[async_trait]
    impl Layer for Read {
        fn inner(&self) -> &dyn Store {
            &self.inner
        }
        async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
            self.keys.lock().unwrap().push(key.to_owned());
            self.inner.get(key, limit_bytes).await
        }
    }

    #[tokio::test]
    async fn a_look_reads_no_object_of_a_backup_but_the_wish_to_give_it_up() {
        let place = tempfile::tempdir().unwrap();
        let inner = DirectoryStore::new(place.path().join("repository"));
        let store = Arc::new(Read { inner, keys: Mutex::default() });
        let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
        let repository =
            Repository::init(Arc::<Read>::clone(&store), options).await.unwrap().repository;
        let cluster: ClusterName = "orders".parse().unwrap();
        let identity = repository.find_or_mint_lineage(&cluster, SERVER, 1).await.unwrap();
        let first = back_up(&repository, identity.lineage, 1).await;
        let second = back_up(&repository, identity.lineage, 2).await;
        let read = async || {
            store.keys.lock().unwrap().clear();
            let held = look(&repository, &cluster, SERVER).await.unwrap().holdings.backups;
            let keys = store.keys.lock().unwrap();
            (held, keys.iter().filter(|key| key.contains("/backups/")).cloned().collect::<Vec<_>>())
        };
        assert_eq!(read().await, (vec![first, second], vec![]));
        let wish = Wish { by: "tester".into(), why: String::new(), at_ms: 9 };
        repository.forget(identity.lineage, first, &wish).await.unwrap();
        let (held, keys) = read().await;
        assert_eq!((held, keys.len()), (vec![second], 1), "{keys:?}");
    }

    #[tokio::test]
    async fn a_repository_that_leaves_its_place_in_the_middle_of_a_look_lacks_nothing() {
        let place = tempfile::tempdir().unwrap();
        let root = place.path().join("repository");
        let store = Arc::new(DirectoryStore::new(&root));
        let options = InitOptions { encryption: Encryption::KeyFile, now_ms: 1 };
        let created = Repository::init(store, options).await.unwrap();
        let key = SecretString::from(created.key_file.unwrap().to_string());
        let config = format!(
            "name = \"w\"\nsite = \"s\"\nstate_dir = \"/s\"\nbroker = {{ url = \"file:/u\" }}\n\
             sandbox = {{ directory = \"/tmp\" }}\n\
             [[repositories]]\nname = \"main\"\nurl = \"file://{}\"\nkey = \"file:/k\"\n",
            root.display()
        );
        let config: WorkerConfig = toml::from_str(&config).unwrap();
        let places =
            Places::resolve(&config, &Environment::default(), &|_| Ok(key.clone())).unwrap();
        let cluster: ClusterName = "orders".parse().unwrap();
        let site = places.place_for(&cluster).unwrap();
        let repository = site.open().await.unwrap();
        let identity = repository.find_or_mint_lineage(&cluster, SERVER, 1).await.unwrap();
        let backup = back_up(&repository, identity.lineage, 1).await;
        let held = async || {
            let looked = look_at(site, &repository, &cluster, SERVER).await;
            looked.map(|looked| looked.holdings.backups).map_err(|failure| failure.code)
        };
        assert_eq!(held().await, Ok(vec![backup]));
        // The empty directory on which it was mounted.
        let elsewhere = place.path().join("elsewhere");
        std::fs::rename(&root, &elsewhere).unwrap();
        std::fs::create_dir(&root).unwrap();
        assert_eq!(held().await, Err(Code::RepositoryMissing));
        std::fs::remove_dir(&root).unwrap();
        std::fs::rename(&elsewhere, &root).unwrap();
        assert_eq!(held().await, Ok(vec![backup]), "it was mounted again");
    }

    #[test]
    fn what_was_seen_is_told_once_to_each_coordinator() {
        let held = Held::default();
        let note = |name: &str, n: usize| {
            let id = |n: usize| BackupId::mint(n as u64, [1; 10]);
            let there = (1..=n).map(id).collect();
            held.note(Holdings::new(name.parse().unwrap(), String::new(), SERVER, 1, there));
        };
        let due =
            |is_new| held.due(is_new).iter().map(|one| one.cluster.to_string()).collect::<Vec<_>>();
        note("a", 1_000);
        note("b", 900);
        note("c", 900);
        assert_eq!(due(false), ["a", "b"], "a pulse is small");
        assert_eq!(due(false), ["c"]);
        assert!(due(false).is_empty());
        assert_eq!(due(true), ["a", "b"]);
        let a = held.seen.lock().unwrap()[&"a".parse().unwrap()].holdings.clone();
        held.not_told(&[a]);
        assert_eq!(due(false), ["a", "c"]);
        note("b", 1);
        assert_eq!(due(false), ["b"], "looked at again");
    }
}
