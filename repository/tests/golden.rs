//! A repository that an earlier program wrote must stay readable for ever.
//!
//! `tests/golden/v1` was written by `write_golden_repository` below. A new format gets a new directory; an existing one is
//! never written again: were this test to need other bytes, every repository in the world would. `GOLDEN` holds their
//! digests, so that none is written again by accident, and `reader.rs` reads them with another program.

#![expect(clippy::unwrap_used, reason = "helpers of tests: what cannot be set up has failed")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Bench, NOW_MS, Tree, noise};
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::{CheckOptions, KeyFile, Repository};

/// Every golden repository, with the digest of its files. Lines are added; a line that is here stays as it is.
const GOLDEN: [(&str, &str); 1] =
    [("v1", "1c3658efc92b12e9369b417bcb36b854f01c177ec8e724e06dfaf8f40f4da7cf")];

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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_repository_of_format_1_can_be_read() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let key = std::fs::read_to_string(golden.join("repository.key")).unwrap();
    check(&golden.join("repository"), &key).await;
}

/// What is written today passes the same test. With `PGMUSTER_WRITE_GOLDEN=DIRECTORY` it stays there, to be checked in.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_written_today_is_such_a_repository() {
    let (bench, key) = write_golden_repository().await;
    check(&bench.store_path(), &key).await;
    if let Some(place) = std::env::var_os("PGMUSTER_WRITE_GOLDEN") {
        let place = Path::new(&place);
        for file in common::files_below(&bench.store_path()) {
            let to = place.join("repository").join(file.strip_prefix(bench.store_path()).unwrap());
            std::fs::create_dir_all(to.parent().unwrap()).unwrap();
            std::fs::copy(&file, &to).unwrap();
        }
        std::fs::write(place.join("repository.key"), key).unwrap();
    }
}
