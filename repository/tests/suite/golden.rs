//! A repository that an earlier program wrote must stay readable for ever.
//!
//! `tests/golden/v1` was written by `write_golden_repository` below, `v1-wal`, with an archive of WAL, by `write_golden_archive`, and `v1-dump`,
//! with logical backups of what `v1-dump/content` holds, by `write_golden_dumps`. A new format gets a new directory; an existing one is
//! never written again: were this test to need other bytes, every repository in the world would. `GOLDEN` holds their
//! digests, so that none is written again by accident, and `reader.rs` reads them with another program.

#![expect(clippy::unwrap_used, reason = "helpers of tests: what cannot be set up has failed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::common::{self, Bench, NOW_MS, Node, Tree, dumps, noise};
use bytes::Bytes;
use futures::TryStreamExt as _;
use proto::BackupKind;
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::{
    CheckLevel, CheckOptions, CollectOptions, KeyFile, Repository, ScrubOptions, ScrubReport,
    WalAbsence,
};
use tokio_util::sync::CancellationToken;

/// Every golden repository, with the digest of its files. Lines are added; a line that is here stays as it is.
const GOLDEN: [(&str, &str); 3] = [
    ("v1", "1c3658efc92b12e9369b417bcb36b854f01c177ec8e724e06dfaf8f40f4da7cf"),
    ("v1-dump", "576be34ed4a281d2267a97d5f83f9e58b76e41c980bca597757e18ade2eb6561"),
    ("v1-wal", "220fa72c5641943a914aa4489928dcba3ca21709960b46a6a5b74a239b27ff8f"),
];

fn tree(changed: bool) -> Tree {
    let mut tree = Tree::new()
        .directory("base")
        .directory("base/1")
        .file("PG_VERSION", "15\n")
        .file("base/1/empty", "")
        .file("base/1/rows", "one row after the other, ".repeat(20_000))
        .file("base/1/noise", noise(5, 20_000))
        .file("base/1/zeros", vec![0; 50_000]);
    tree.links.push((b"base/link".to_vec(), b"1/rows".to_vec()));
    if changed {
        tree.write("base/1/rows", 100_000, b"CHANGED");
    }
    tree
}

/// Writes what `tests/golden` holds into a directory and returns the text of its key.
async fn write_golden_repository() -> (Bench, String) {
    let bench = Bench::new().await;
    bench.back_up(&Arc::new(tree(false)), NOW_MS).await;
    bench.back_up(&Arc::new(tree(true)), NOW_MS + 1000).await;
    let text = bench.key.text(bench.repository.id(), "tests/golden/v1").to_string();
    (bench, text)
}

/// A segment of 1 MiB, or of several frames.
fn wal(seed: u64, bytes: usize) -> Bytes {
    let mut content = vec![0; bytes];
    content[..5_000].copy_from_slice(&noise(seed, 5_000));
    content[bytes - 70_000..]
        .copy_from_slice(&b"one record after the other ".repeat(2_593)[..70_000]);
    content.into()
}

/// What the archive of `tests/golden/v1-wal` has, by name and content.
fn archived() -> Vec<(&'static str, Bytes)> {
    vec![
        ("000000010000000000000005", wal(5, 1 << 20)),
        ("000000010000000000000005.00000028.backup", "START WAL LOCATION: 0/500028".into()),
        ("000000010000000000000006", wal(6, 1 << 20)),
        ("00000002.history", "1\t0/680000\tno recovery target specified\n".into()),
        ("000000020000000000000006.partial", wal(7, 1 << 20)),
        ("000000020000000000000007", wal(8, 1 << 20)),
        ("000000030000000000000009", wal(9, 16 << 20)),
    ]
}

/// A backup, an archive from whose beginning a collection took two segments, and content that was refused.
async fn write_golden_archive() -> (Bench, String) {
    let bench = Bench::new().await;
    bench.archive(1, 3..=4).await;
    for (name, content) in archived() {
        bench.archive_one(name, content).await.unwrap();
    }
    bench.archive_one("000000010000000000000006", wal(66, 1 << 20)).await.unwrap_err();
    bench.back_up_from(1, 5, NOW_MS).await;
    let options = CollectOptions {
        by: "tests/golden".into(),
        now_ms: NOW_MS,
        grace_ms: 0,
        patience_ms: None,
        pins_for_ms: 0,
        lists_for_ms: None,
        cancel: CancellationToken::new(),
    };
    let plan = bench.repository.plan_collection(bench.lineage, &options).await.unwrap();
    plan.collect(&options).await.unwrap();
    let text = bench.key.text(bench.repository.id(), "tests/golden/v1-wal").to_string();
    (bench, text)
}

/// Two logical backups, of which the second has nearly all of its units from the first.
async fn write_golden_dumps() -> (Bench, String) {
    let bench = Bench::new().await;
    dumps::take_dumps(&bench).await;
    let text = bench.key.text(bench.repository.id(), "tests/golden/v1-dump").to_string();
    (bench, text)
}

async fn check_dumps(store: &Path, key: &str) {
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(store));
    let key: KeyFile = key.parse().unwrap();
    let repository = Repository::open(store, Some(&key)).await.unwrap();
    let lineages = repository.list_lineages().await.unwrap();
    assert_eq!(lineages.len(), 2, "the one of physical backups is another");
    let lineage = lineages.iter().find(|identity| identity.kind == BackupKind::Logical).unwrap();
    let backups = repository.list_backups(lineage.lineage).await.unwrap();
    assert_eq!(backups.len(), dumps::DUMPS.count());
    for (backup, dump) in backups.iter().zip(dumps::DUMPS) {
        let backup = backup.backup().unwrap();
        let backup = repository.open_backup(lineage.lineage, backup).await.unwrap();
        assert!(backup.check_decrypt(CheckOptions::default()).await.unwrap().is_sound());
        assert_eq!(backup.facts(), &dumps::dump_facts(dump));
        // To be loaded, it is read as a stream; to be looked at, it is restored as the files it is.
        let restored = common::restore(&backup).await.unwrap();
        assert_eq!(restored.len(), dumps::FILES.len());
        for path in dumps::FILES {
            let expected = dumps::content(dump, path);
            let stream = backup.file_content(path.as_bytes()).await.unwrap();
            let pieces: Vec<Bytes> = stream.stream().try_collect().await.unwrap();
            assert!(pieces.concat() == expected, "{path} of dump {dump} is another");
            assert!(restored[path.as_bytes()] == Node::File(expected), "{path} of dump {dump}");
        }
    }
    let mut report = ScrubReport::default();
    let options = ScrubOptions::new(CheckLevel::Decrypt, NOW_MS);
    repository.scrub(&options, &mut report).await.unwrap();
    assert!(report.is_sound() && report.foreign.is_empty(), "{report:?}");
}

async fn check_archive(store: &Path, key: &str) {
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(store));
    let key: KeyFile = key.parse().unwrap();
    let repository = Repository::open(store, Some(&key)).await.unwrap();
    let lineage = repository.list_lineages().await.unwrap()[0].lineage;
    for (name, content) in archived() {
        let file = name.parse().unwrap();
        let fetched = repository.fetch_wal(lineage, &file).await.unwrap();
        assert!(fetched == Some(content), "{name}");
    }
    let inventory = repository.list_wal(lineage).await.unwrap();
    assert_eq!((inventory.gaps(), inventory.damaged), (vec![], vec![]));
    assert_eq!(inventory.conflicts, ["000000010000000000000006".parse().unwrap()]);
    let collected = "000000010000000000000004".parse().unwrap();
    let absence = repository.wal_absence(lineage, collected).await.unwrap();
    let below = "000000010000000000000005".parse().unwrap();
    assert_eq!(absence, WalAbsence::Collected { below });
    let mut report = ScrubReport::default();
    let options = ScrubOptions::new(CheckLevel::Decrypt, NOW_MS);
    repository.scrub(&options, &mut report).await.unwrap();
    assert!(report.is_sound() && report.foreign.is_empty(), "{report:?}");
}

async fn check(store: &Path, key: &str) {
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(store));
    let key: KeyFile = key.parse().unwrap();
    let repository = Repository::open(store, Some(&key)).await.unwrap();
    let lineages = repository.list_lineages().await.unwrap();
    assert_eq!(lineages[0].cluster.as_str(), "orders");
    let backups = repository.list_backups(lineages[0].lineage).await.unwrap();
    assert_eq!(backups.len(), 2);
    for (backup, changed) in backups.iter().zip([false, true]) {
        let backup =
            repository.open_backup(lineages[0].lineage, backup.backup().unwrap()).await.unwrap();
        assert!(backup.check_decrypt(CheckOptions::default()).await.unwrap().is_sound());
        assert_eq!(backup.facts(), &common::facts());
        let mut restored = common::restore(&backup).await.unwrap();
        assert!(restored.remove(&b"backup_label"[..]).is_some());
        assert!(restored.remove(&b"late_control"[..]).is_some());
        assert!(restored == tree(changed).expected());
    }
}

/// BLAKE3 over the path, the length and the bytes of every file, in the order of the paths.
fn digest(directory: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    for file in common::files_below(directory) {
        let path = file.strip_prefix(directory).unwrap().to_str().unwrap();
        let bytes = std::fs::read(&file).unwrap();
        for part in [path.as_bytes(), &bytes] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
    }
    hasher.finalize().to_hex().to_string()
}

#[test]
fn no_golden_repository_is_ever_written_again_or_removed() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut found: Vec<(String, String)> = Vec::new();
    for version in std::fs::read_dir(golden).unwrap() {
        let version = version.unwrap();
        found.push((version.file_name().into_string().unwrap(), digest(&version.path())));
    }
    found.sort();
    let expected = GOLDEN.map(|(version, digest)| (version.to_owned(), digest.to_owned()));
    assert_eq!(found, expected, "add a directory for a new format, and never change one");
}

/// A golden repository and the text of its key.
fn golden(version: &str) -> (PathBuf, String) {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(version);
    let key = std::fs::read_to_string(golden.join("repository.key")).unwrap();
    (golden.join("repository"), key)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_repository_of_format_1_can_be_read() {
    let (store, key) = golden("v1");
    check(&store, &key).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_archive_of_wal_of_format_1_can_be_read() {
    let (store, key) = golden("v1-wal");
    check_archive(&store, &key).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_logical_backups_of_format_1_can_be_read() {
    let (store, key) = golden("v1-dump");
    check_dumps(&store, &key).await;
}

/// What is written today passes the same tests. With `PGMUSTER_WRITE_GOLDEN=DIRECTORY` it stays there, to be checked in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_today_is_such_a_repository() {
    let (bench, key) = write_golden_repository().await;
    check(&bench.store_path(), &key).await;
    keep("v1", &bench, &key);
    let (bench, key) = write_golden_archive().await;
    check_archive(&bench.store_path(), &key).await;
    keep("v1-wal", &bench, &key);
    let (bench, key) = write_golden_dumps().await;
    check_dumps(&bench.store_path(), &key).await;
    keep("v1-dump", &bench, &key);
}

fn keep(version: &str, bench: &Bench, key: &str) {
    let Some(place) = std::env::var_os("PGMUSTER_WRITE_GOLDEN") else { return };
    let place = Path::new(&place).join(version);
    for file in common::files_below(&bench.store_path()) {
        let to = place.join("repository").join(file.strip_prefix(bench.store_path()).unwrap());
        std::fs::create_dir_all(to.parent().unwrap()).unwrap();
        std::fs::copy(&file, &to).unwrap();
    }
    std::fs::write(place.join("repository.key"), key).unwrap();
}
