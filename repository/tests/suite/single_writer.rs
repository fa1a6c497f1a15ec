//! A repository in a store that does not decide between writers: it works for one program at a time, says so, and deletes
//! only for somebody who says that he is alone.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::sync::Arc;

use crate::common::{NOW_MS, SharedTree, Tree, facts, noise, restore};
use async_trait::async_trait;
use bytes::Bytes;
use proto::{AttemptId, Code, Failure, LineageId, SystemIdentifier};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::probe::{probe, probe_for_a_single_writer};
use repository::store::{PutOutcome, Store, StoreError};
use repository::{
    Aborted, BackupSummary, CollectOptions, Collected, Encryption, Error, InitOptions, Intent,
    KeyFile, Repository, Source, Wish, WriteOptions,
};
use tokio_util::sync::CancellationToken;

const HOUR_MS: i64 = 3_600_000;

/// A directory that takes a condition and does not look at it, as some servers that speak S3 do.
#[derive(Debug)]
struct Careless(DirectoryStore);

#[async_trait]
impl Layer for Careless {
    fn inner(&self) -> &dyn Store {
        &self.0
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        self.0.put(key, bytes).await.map(|()| PutOutcome::Created)
    }
}

fn careless(place: &Path) -> Arc<dyn Store> {
    Arc::new(Careless(DirectoryStore::new(place)))
}

/// Makes a repository for a single writer the way `repo init` does, and opens it as everybody else does.
async fn made(place: &Path) -> (Repository, LineageId) {
    let store = careless(place);
    let refused = probe(store.as_ref()).await.unwrap_err();
    assert!(refused.to_string().contains("--single-writer"), "{refused}");
    let found = probe_for_a_single_writer(Arc::clone(&store)).await.unwrap();
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let new = Repository::prepare(Arc::clone(&store), options).unwrap().for_a_single_writer();
    let key: KeyFile = new.key_file.as_ref().unwrap().parse().unwrap();
    assert!(new.create(Some(found)).await.unwrap().is_single_writer());
    let repository = Repository::open(store, Some(&key)).await.unwrap();
    let identity = repository
        .find_or_mint_lineage(&"orders".parse().unwrap(), SystemIdentifier(7), NOW_MS)
        .await
        .unwrap();
    (repository, identity.lineage)
}

fn intent(n: u8, began_at_ms: i64) -> Intent {
    let attempt = AttemptId::mint(NOW_MS.unsigned_abs(), [n; 10]);
    Intent { attempt, follows: None, by: "worker-1".into(), began_at_ms }
}

async fn back_up(
    repository: &Repository,
    lineage: LineageId,
    tree: &Arc<Tree>,
    n: u8,
) -> Result<BackupSummary, Error> {
    let attempt = repository.begin(lineage, intent(n, NOW_MS)).await?;
    let mut writer = attempt.write(WriteOptions::default())?;
    let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(tree)));
    writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await?;
    writer.finish(source, Vec::new(), facts()).await?.commit(NOW_MS + i64::from(n)).await
}

fn collecting(now_ms: i64) -> CollectOptions {
    let (by, cancel) = ("a test".into(), CancellationToken::new());
    CollectOptions {
        by,
        now_ms,
        grace_ms: 0,
        patience_ms: Some(0),
        pins_for_ms: 0,
        lists_for_ms: None,
        cancel,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_that_does_not_decide_serves_a_single_writer() {
    let place = tempfile::tempdir().unwrap();
    let (repository, lineage) = made(place.path()).await;
    assert!(repository.is_single_writer());
    let tree = Arc::new(Tree::new().file("a", noise(1, 50_000)).file("b", noise(2, 400_000)));
    let first = back_up(&repository, lineage, &tree, 1).await.unwrap();
    tree.write("a", 8192, &noise(3, 8192));
    let second = back_up(&repository, lineage, &tree, 2).await.unwrap();
    assert_eq!(second.predecessor, Some(first.backup));
    assert!(second.packs_reused > 0);
    let backup = repository.open_backup(lineage, second.backup).await.unwrap();
    assert!(restore(&backup).await.unwrap() == tree.expected());

    // What was decided stays decided, although the store would replace it.
    let again = back_up(&repository, lineage, &tree, 1).await.unwrap_err();
    assert!(matches!(again, Error::AttemptExists { .. }), "{again}");
    let aborted = repository.abort(lineage, second.backup.into(), "b", "late", NOW_MS).await;
    assert!(matches!(aborted, Ok(Aborted::Committed(_))), "{aborted:?}");
    let open = repository.begin(lineage, intent(3, NOW_MS)).await.unwrap();
    repository.abort(lineage, open.id(), "b", "first", NOW_MS).await.unwrap();
    let mut writer = open.write(WriteOptions::default()).unwrap();
    let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(&tree)));
    writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await.unwrap();
    let written = writer.finish(source, Vec::new(), facts()).await.unwrap();
    let refused = written.commit(NOW_MS).await.unwrap_err();
    assert!(matches!(refused, Error::CommitRefused { .. }), "{refused}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_of_a_single_writer_goes_late_and_only_for_somebody_who_is_alone() {
    let place = tempfile::tempdir().unwrap();
    let (repository, lineage) = made(place.path()).await;
    let tree = Arc::new(Tree::new().file("a", noise(1, 50_000)));
    let first = back_up(&repository, lineage, &tree, 1).await.unwrap();
    tree.write("a", 0, &noise(2, 50_000));
    back_up(&repository, lineage, &tree, 2).await.unwrap();
    let wish = Wish { by: "somebody".into(), why: String::new(), at_ms: NOW_MS };
    repository.forget(lineage, first.backup, &wish).await.unwrap();
    let packs = async || {
        repository.store().list(&format!("lineages/{lineage}/packs/")).await.unwrap().len()
    };
    let before = packs().await;

    // Too early, whatever the caller's options say: looked at and left.
    let early = collecting(NOW_MS + 71 * HOUR_MS);
    let plan = repository.plan_collection(lineage, &early).await.unwrap();
    assert_eq!(plan.delete.packs, 0);

    let late = collecting(NOW_MS + 72 * HOUR_MS);
    let plan = repository.plan_collection(lineage, &late).await.unwrap();
    assert!(plan.delete.packs > 0);
    let refused = plan.collect(&late).await.unwrap_err();
    assert!(matches!(refused, Error::NotAlone { .. }), "{refused}");
    let failure = Failure::from(refused);
    assert_eq!(failure.code, Code::StateConflict);
    assert!(failure.hint.contains("--alone"), "{failure:?}");
    assert_eq!(packs().await, before);
    assert!(repository.store().list(&format!("lineages/{lineage}/gc/")).await.unwrap().is_empty());

    // An attempt that may still be written postpones it; one of three days ago is ended.
    let alone = repository.clone().alone();
    let began_at_ms = NOW_MS + HOUR_MS;
    repository.begin(lineage, intent(3, began_at_ms)).await.unwrap();
    let plan = alone.plan_collection(lineage, &late).await.unwrap();
    let postponed = plan.collect(&late).await.unwrap();
    assert!(matches!(postponed, Collected::Postponed { .. }), "{postponed:?}");
    assert_eq!(packs().await, before);
    let later = collecting(began_at_ms + 72 * HOUR_MS);
    let plan = alone.plan_collection(lineage, &later).await.unwrap();
    let Collected::Done(done) = plan.collect(&later).await.unwrap() else { panic!("not done") };
    assert_eq!(done.aborted.len(), 1);
    assert!(packs().await < before);
    let left = repository.list_backups(lineage).await.unwrap();
    let backup = left[0].backup().unwrap();
    let backup = repository.open_backup(lineage, backup).await.unwrap();
    assert!(restore(&backup).await.unwrap() == tree.expected());
}
