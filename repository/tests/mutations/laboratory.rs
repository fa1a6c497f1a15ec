//! What is spoilt: a repository with two lineages, everything that a repository can hold, another repository, and another
//! history of the same one.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use proto::envelope::{Certificate, Credentials, SigningKey};
use proto::proof::ProofLevel;
use proto::{BackupId, LineageId, Proof, SystemIdentifier, WalFileName};
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::store::probe::Capabilities;
use repository::{
    Aborted, BackupSummary, Change, CollectOptions, Collected, KeyFile, Keyring, Source,
    SourceEntry, Unlock, Wish, WriteOptions,
};
use tokio_util::sync::CancellationToken;

use crate::common::{self, Bench, DAY_MS, NOW_MS, Node, SharedTree, Tree, noise};

/// An object and what it is.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub bytes: Vec<u8>,
    pub class: Class,
}

/// What decides at which level damage must be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    Config,
    /// The key that opens it here.
    Key,
    /// Another one.
    OtherKey,
    Keyring {
        last: bool,
    },
    Identity,
    Intent {
        committed: bool,
    },
    Verdict {
        committed: bool,
    },
    Manifest {
        committed: bool,
        forgotten: bool,
    },
    Proof {
        last: bool,
    },
    Wish,
    Condemned,
    Data {
        needed: bool,
    },
    Metadata {
        needed: bool,
    },
    Wal {
        needed: bool,
    },
    /// A file of the WAL archive, or what was refused there.
    Archived,
    /// What says below which segment WAL may have been deleted.
    Floor,
}

/// A backup and what it restores to.
pub(crate) struct Kept {
    pub lineage: LineageId,
    pub backup: BackupId,
    pub content: BTreeMap<Vec<u8>, Node>,
}

pub(crate) struct Laboratory {
    bench: Bench,
    path: PathBuf,
    pub objects: BTreeMap<String, Object>,
    pub backups: Vec<Kept>,
    /// Files of the WAL archive and their content.
    pub archived: Vec<(LineageId, WalFileName, Bytes)>,
    /// The objects of another repository that was made in the same way.
    pub elsewhere: BTreeMap<String, Vec<u8>>,
    /// The objects of a copy of this repository that went on in another way.
    pub fork: BTreeMap<String, Vec<u8>>,
}

impl Laboratory {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn key(&self) -> KeyFile {
        let text = self.bench.key.text(self.bench.repository.id(), "a test");
        text.parse().unwrap()
    }
}

fn tree(seed: u64) -> Arc<Tree> {
    let tree = Tree::new()
        .directory("base")
        .file("base/few", noise(seed, 20_000))
        // Described by shards of its own.
        .file("base/many", noise(seed + 1, 290_000))
        .file("base/same", "the same everywhere, ".repeat(3_000))
        .file("base/zeros", vec![0; 30_000])
        .file("empty", "");
    Arc::new(tree)
}

fn change(tree: &Tree, seed: u64) {
    tree.write("base/few", 9_000, &noise(seed, 5_000));
    tree.write("base/many", 100_000, &noise(seed + 1, 9_000));
}

async fn keep(bench: &Bench, tree: &Tree, summary: &BackupSummary) -> Kept {
    assert_eq!(bench.restore(summary).await, tree.expected());
    let content = common::restore(&bench.open(summary).await).await.unwrap();
    Kept { lineage: summary.lineage, backup: summary.backup, content }
}

pub(crate) async fn build() -> Laboratory {
    let bench = Bench::new().await;
    let orders = tree(1);
    let first = bench.back_up(&orders, NOW_MS).await;
    let mut backups = vec![keep(&bench, &orders, &first).await];
    let forked = fork(&bench).await;
    // Before there is any garbage: it collects.
    let mut archived = archive(&bench, 100).await;
    change(&orders, 10);
    let second = bench.back_up(&orders, NOW_MS + 1_000).await;
    backups.push(keep(&bench, &orders, &second).await);
    let before_garbage = packs(&bench.store_path());
    let aborted = abort(&bench, &orders, NOW_MS + 2_000).await;
    let garbage: BTreeSet<String> =
        packs(&bench.store_path()).difference(&before_garbage).cloned().collect();
    assert!(garbage.len() >= 3, "{garbage:?}");
    change(&orders, 20);
    let third = bench.back_up(&orders, NOW_MS + 3_000).await;
    backups.push(keep(&bench, &orders, &third).await);
    for (there, here) in forked.1.iter().zip([second.backup, aborted, third.backup]) {
        assert_eq!(*there, here, "the other history has the same names");
    }

    let billing = billing(&bench).await;
    let invoices = tree(5);
    for (n, seed) in (0..2).zip([30, 40]) {
        change(&invoices, seed);
        let summary = billing.back_up(&invoices, NOW_MS + 5_000 + n).await;
        backups.push(keep(&billing, &invoices, &summary).await);
    }

    archived.extend(archive(&billing, 200).await);
    let second_key = add_key(&bench).await;
    let repository = &bench.repository;
    let wish = Wish { by: "tester".into(), why: "to be spoilt".into(), at_ms: NOW_MS };
    repository.forget(bench.lineage, first.backup, &wish).await.unwrap();
    repository.hold(bench.lineage, second.backup, &wish).await.unwrap();
    repository.release(bench.lineage, second.backup, &wish).await.unwrap();
    repository.hold(bench.lineage, second.backup, &wish).await.unwrap();
    for (backup, at_ms) in [(second.backup, 1), (third.backup, 2), (third.backup, 3)] {
        let proof = proof(bench.lineage, backup, at_ms);
        repository.add_proof(bench.lineage, backup, proof).await.unwrap();
    }
    leave_word(&bench, third.backup).await;
    leave_a_collection(&bench).await;

    let other = Bench::new().await;
    archive(&other, 300).await;
    let strange = tree(1);
    for n in 0..2 {
        other.back_up(&strange, NOW_MS + n).await;
        change(&strange, 10);
    }
    let objects = read(&bench.store_path());
    let objects = objects.into_iter().map(|(key, bytes)| {
        let forgotten = key.contains(&first.backup.to_string());
        let committed = !key.contains(&aborted.to_string());
        let class = match class(&key, &bytes, committed, forgotten, !garbage.contains(&key)) {
            Class::Key if key.ends_with(&second_key) => Class::OtherKey,
            class => class,
        };
        (key, Object { bytes, class })
    });
    Laboratory {
        objects: objects.collect(),
        backups,
        archived,
        elsewhere: read(&other.store_path()),
        fork: forked.0,
        path: bench.store_path(),
        bench,
    }
}

fn class(key: &str, bytes: &[u8], committed: bool, forgotten: bool, needed: bool) -> Class {
    let name = key.rsplit_once('/').map_or(key, |(_, name)| name);
    match name {
        "config" => Class::Config,
        _ if key.starts_with("keys/") => Class::Key,
        _ if key.starts_with("keyring/") => Class::Keyring { last: key == "keyring/2" },
        "identity" => Class::Identity,
        "intent" => Class::Intent { committed },
        "verdict" => Class::Verdict { committed },
        "manifest" => Class::Manifest { committed, forgotten },
        "forget" => Class::Wish,
        _ if name.starts_with("hold.") || name.starts_with("release.") => Class::Wish,
        // As little rests on it.
        _ if key.contains("/copies/") => Class::Wish,
        _ if key.contains("/wal/floor/") => Class::Floor,
        _ if key.contains("/wal/") => Class::Archived,
        "condemned" => Class::Condemned,
        // One backup has one proof, the other two.
        "proof.1" => {
            Class::Proof { last: !String::from_utf8_lossy(bytes).contains("\\\"at_ms\\\":2") }
        }
        "proof.2" => Class::Proof { last: true },
        // The type stands in the header.
        _ => match bytes[9] {
            1 => Class::Data { needed },
            2 => Class::Metadata { needed },
            3 => Class::Wal { needed },
            other => panic!("{key} is of type {other}"),
        },
    }
}

/// A copy of the repository as it is, in which the attempts of the same names end otherwise: with other content, with a
/// commit instead of an abort, and the other way round.
async fn fork(bench: &Bench) -> (BTreeMap<String, Vec<u8>>, [BackupId; 3]) {
    let fork = bench.forked().await;
    let tree = tree(1);
    change(&tree, 60);
    let second = fork.back_up(&tree, NOW_MS + 1_000).await;
    change(&tree, 70);
    let third = fork.back_up(&tree, NOW_MS + 2_000).await;
    let aborted = abort(&fork, &tree, NOW_MS + 3_000).await;
    (read(&fork.store_path()), [second.backup, third.backup, aborted])
}

/// Everything of a backup but its commit.
async fn abort(bench: &Bench, tree: &Arc<Tree>, at_ms: i64) -> BackupId {
    let attempt = bench.begin(at_ms).await;
    let id = attempt.id();
    change(tree, 80);
    let mut writer = attempt.write(WriteOptions::default()).unwrap();
    let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(tree)));
    writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await.unwrap();
    let wal = io::Cursor::new(noise(98, 50_000));
    writer.wal().add("000000010000000000000001", wal).await.unwrap();
    let late = vec![SourceEntry::bytes("backup_label", 0o600, "START")];
    drop(writer.finish(source, late, common::facts()).await.unwrap());
    let aborted = bench.repository.abort(bench.lineage, id, "tester", "to be garbage", at_ms);
    assert!(matches!(aborted.await.unwrap(), Aborted::Aborted(_)));
    id.into()
}

/// An archive with every kind of file, of which a collection has taken one. Every backup begins in segment 1.
async fn archive(bench: &Bench, seed: u64) -> Vec<(LineageId, WalFileName, Bytes)> {
    let segment = |seed| {
        let mut bytes = noise(seed, 1 << 20);
        bytes[10_000..].fill(0);
        Bytes::from(bytes)
    };
    let mut files = vec![
        ("000000010000000000000001", segment(seed)),
        ("000000010000000000000002", segment(seed + 1)),
        ("000000020000000000000002.partial", segment(seed + 2)),
        ("00000002.history", "1\t0/1080000\tno recovery target specified\n".into()),
        ("000000010000000000000001.00000028.backup", "START".into()),
    ];
    for (name, content) in &files {
        bench.archive_one(name, content.clone()).await.unwrap();
    }
    bench.archive_one("000000010000000000000002", segment(seed + 3)).await.unwrap_err();
    // As long as the backups say, on a timeline of its own: none of the first one's could be compared with it.
    let old = "000000030000000000000000";
    bench.archive_one(old, vec![0; 16 << 20].into()).await.unwrap();
    if bench.repository.list_backups(bench.lineage).await.unwrap().is_empty() {
        files.push((old, vec![0; 16 << 20].into()));
    } else {
        let options = collecting(NOW_MS);
        let plan = bench.repository.plan_collection(bench.lineage, &options).await.unwrap();
        let ended = plan.collect(&options).await.unwrap();
        assert!(matches!(ended, Collected::Done(done) if done.wal.files == 1));
    }
    files.into_iter().map(|(name, bytes)| (bench.lineage, name.parse().unwrap(), bytes)).collect()
}

fn collecting(now_ms: i64) -> CollectOptions {
    CollectOptions {
        by: "tester".into(),
        now_ms,
        grace_ms: DAY_MS,
        patience_ms: None,
        pins_for_ms: 7 * DAY_MS,
        lists_for_ms: None,
        cancel: CancellationToken::new(),
    }
}

/// A second key, which puts a second list of keys beside the first. Returns its id.
async fn add_key(bench: &Bench) -> String {
    let store = Arc::clone(bench.repository.store());
    let keyring = Keyring::open(store, Unlock::KeyFile(&bench.key)).await.unwrap();
    let new = keyring.new_key_file("the second").unwrap();
    keyring.add(&new, &Change { by: "tester".into(), at_ms: NOW_MS }).await.unwrap();
    new.id().to_owned()
}

/// The same repository, another cluster.
async fn billing(bench: &Bench) -> Bench {
    let mut billing = bench.beside().await;
    let (cluster, system) = ("billing".parse().unwrap(), SystemIdentifier(8));
    let identity = bench.repository.find_or_mint_lineage(&cluster, system, NOW_MS).await.unwrap();
    billing.lineage = identity.lineage;
    billing
}

/// Word of a copy in another place.
async fn leave_word(bench: &Bench, backup: BackupId) {
    let place = tempfile::tempdir().unwrap();
    let store = Arc::new(DirectoryStore::new(place.path().join("copy")));
    let unlock = Unlock::KeyFile(&bench.key);
    let found = async |_: &dyn Store| Ok(Capabilities::default());
    let mut mirror = bench.repository.mirror(store, unlock, false, found).await.unwrap();
    mirror.copy_lineage(bench.lineage).await.unwrap();
    let options = common::copy_options(NOW_MS);
    mirror.copy(bench.lineage, backup, &options).await.unwrap();
    mirror.leave_word(&options).await.unwrap();
}

/// A list of condemned packs whose collector died.
async fn leave_a_collection(bench: &Bench) {
    let options = collecting(NOW_MS + DAY_MS / 2);
    let plan = bench.repository.plan_collection(bench.lineage, &options).await.unwrap();
    let mut run = pin!(plan.collect(&options));
    let lists = bench.store_path().join(format!("lineages/{}/gc", bench.lineage));
    let is_there = std::future::poll_fn(|_| {
        let there = std::fs::read_dir(&lists).into_iter().flatten().flatten();
        let there = there.filter(|run| run.path().join("condemned").exists());
        if there.count() > 0 { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    });
    // The list is the first thing that it writes, and it is looked for at every step of the collector's.
    tokio::select! {
        biased;
        done = &mut run => panic!("the collection was not interrupted: {done:?}"),
        () = is_there => {}
    }
}

fn proof(lineage: LineageId, backup: BackupId, at_ms: i64) -> Bytes {
    let coordinator = SigningKey::from_seed(&[1; 32]);
    let worker = SigningKey::from_seed(&[2; 32]);
    let certificate = Certificate {
        worker: "w1".parse().unwrap(),
        site: "fra1".parse().unwrap(),
        key: worker.public(),
        issued_at_ms: 1,
    };
    let certificate = coordinator.sign(&certificate);
    let credentials = Credentials::new(worker, certificate, coordinator.public()).unwrap();
    let cluster = "orders".parse().unwrap();
    let worker = "w1".parse().unwrap();
    let proof =
        Proof::of(backup, lineage, cluster, SystemIdentifier(7), worker, ProofLevel::L2).reached();
    let proof = Proof { at_ms, size_bytes: 1, ..proof };
    serde_json::to_vec(&credentials.sign(&proof)).unwrap().into()
}

fn packs(root: &Path) -> BTreeSet<String> {
    read(root).into_keys().filter(|key| key.contains("/packs/")).collect()
}

/// Every object by its key.
pub(crate) fn read(root: &Path) -> BTreeMap<String, Vec<u8>> {
    let object = |path: PathBuf| {
        let key = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        let bytes = std::fs::read(&path).unwrap();
        (key, bytes)
    };
    let files = common::files_below(root).into_iter().map(object);
    files.filter(|(key, _)| !key.starts_with('.')).collect()
}

pub(crate) fn copy(from: &Path, to: &Path) {
    for (key, bytes) in read(from) {
        let file = to.join(key);
        std::fs::create_dir_all(file.parent().unwrap()).unwrap();
        std::fs::write(file, bytes).unwrap();
    }
}
