//! Bytes that are right in the store and wrong when they arrive: read once more, and only then called damaged.

use std::sync::Arc;

use proto::{AttemptId, LineageId, SystemIdentifier};
use repository::store::Store;
use repository::{
    Backup, BackupSummary, CheckOptions, Encryption, Error, InitOptions, Intent, KeyFile,
    Repository, Source, WriteOptions,
};

use crate::common::{NOW_MS, SharedTree, Tree, facts, noise, restore};
use crate::lab::{bucket, impatient, open};
use crate::proxy::{Fault, Proxy};

/// A repository through a proxy.
struct Line {
    proxy: Proxy,
    store: Arc<dyn Store>,
    repository: Repository,
    key: KeyFile,
    lineage: LineageId,
    tree: Arc<Tree>,
}

async fn line(test: &str) -> Line {
    let mut options = bucket(test).await;
    options.limits = impatient();
    let proxy = Proxy::start().await;
    options.endpoint = Some(proxy.url.clone());
    let store: Arc<dyn Store> = Arc::new(open(&options).await);
    let init = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let created = Repository::init(Arc::clone(&store), init).await.expect("a repository");
    let key = created.key_file.expect("a key").parse().expect("a key");
    let identity = created
        .repository
        .find_or_mint_lineage(&"orders".parse().expect("a name"), SystemIdentifier(7), NOW_MS)
        .await
        .expect("a lineage");
    let tree = Tree::new().directory("base").file("base/1", noise(1, 50_000));
    // More units than an entry holds, so that there are shards of extents, too.
    let tree = Arc::new(tree.file("base/2", noise(2, 700_000)));
    let (repository, lineage) = (created.repository, identity.lineage);
    Line { proxy, store, repository, key, lineage, tree }
}

impl Line {
    async fn back_up(&self, n: u8) -> Result<BackupSummary, Error> {
        let attempt = AttemptId::mint(NOW_MS.unsigned_abs(), [n; 10]);
        let intent = Intent { attempt, follows: None, by: "worker-1".into(), began_at_ms: NOW_MS };
        let attempt = self.repository.begin(self.lineage, intent).await?;
        let mut writer = attempt.write(WriteOptions::default())?;
        let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(&self.tree)));
        writer.copy(Arc::clone(&source), self.tree.entries().into_iter().map(Ok)).await?;
        writer.finish(source, Vec::new(), facts()).await?.commit(NOW_MS + i64::from(n)).await
    }

    /// Opens and restores as whoever has the repository and its key.
    async fn restore(&self, summary: &BackupSummary) -> Result<(), Error> {
        let repository = Repository::open(Arc::clone(&self.store), Some(&self.key)).await?;
        let backup: Backup = repository.open_backup(self.lineage, summary.backup).await?;
        let restored = restore(&backup).await?;
        assert!(restored == self.tree.expected(), "wrong bytes were restored");
        Ok(())
    }

    /// Every read of an object of such a name, so many times.
    fn flip(&self, name: &'static str, times: usize) {
        for at in 0..times {
            self.proxy.inject("GET", name, 1, Fault::FlipBody(40 + at));
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_on_the_way_is_no_damage() {
    let line = line("flipped").await;
    let summary = line.back_up(1).await.expect("a backup");
    // Each kind of object that a restore reads. Packs are data and metadata, and the first read is of metadata.
    for name in ["/config", "/keys/", "/verdict", "/manifest", "/packs/"] {
        line.flip(name, 1);
        line.restore(&summary).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(line.proxy.is_spent(), "{name} was not read");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_in_a_frame_of_content_is_no_damage() {
    let line = line("content").await;
    let summary = line.back_up(1).await.expect("a backup");
    // Which pack is content is not to be seen from outside: each read of a pack in turn meets the fault.
    line.proxy.requests();
    line.restore(&summary).await.expect("restore");
    let requests = line.proxy.requests();
    let reads = requests
        .iter()
        .filter(|request| request.starts_with("GET") && request.contains("/packs/"))
        .filter(|request| !request.contains("list-type"))
        .count();
    assert!(reads >= 2, "{reads}");
    for nth in 0..reads {
        if nth > 0 {
            // A byte that no body has: nothing happens to the reads before.
            line.proxy.inject("GET", "/packs/", nth, Fault::FlipBody(usize::MAX));
        }
        line.proxy.inject("GET", "/packs/", 1, Fault::FlipBody(300));
        line.restore(&summary).await.unwrap_or_else(|error| panic!("read {nth}: {error}"));
        line.proxy.forgive();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_arrives_wrong_twice_is_damaged() {
    let line = line("damaged").await;
    let summary = line.back_up(1).await.expect("a backup");
    for name in ["/verdict", "/manifest", "/packs/"] {
        line.proxy.inject("GET", name, usize::MAX, Fault::FlipBody(40));
        let error = line.restore(&summary).await.expect_err(name);
        assert!(matches!(error, Error::Damaged { .. }), "{name}: {error:?}");
        line.proxy.forgive();
    }
    line.restore(&summary).await.expect("nothing was wrong in the store");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bit_that_flips_is_no_damage_for_writers_and_checks_either() {
    let line = line("writers").await;
    // What is read back before a COMMIT.
    line.flip("/manifest", 1);
    let first = line.back_up(1).await.expect("a backup");
    assert!(line.proxy.is_spent());
    // What is read of the backup to compare with.
    for (n, name) in (2..).zip(["/identity", "/verdict", "/manifest", "/packs/"]) {
        line.flip(name, 1);
        let summary = line.back_up(n).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert!(line.proxy.is_spent(), "{name} was not read");
        assert!(summary.predecessor.is_some(), "{name}: a sound backup was passed over");
    }
    let backup = line.repository.open_backup(line.lineage, first.backup).await.expect("open");
    line.flip("/packs/", 1);
    let report = backup.check_decrypt(CheckOptions::default()).await.expect("check");
    assert!(line.proxy.is_spent() && report.is_sound(), "{report:?}");
    line.proxy.inject("GET", "/packs/", usize::MAX, Fault::FlipBody(40));
    let report = backup.check_decrypt(CheckOptions::default()).await.expect("check");
    assert!(!report.is_sound());
}
