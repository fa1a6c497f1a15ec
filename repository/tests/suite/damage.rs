//! Whatever happens to stored bytes: a restore fails or is right. Never wrong bytes, never a panic.

#![expect(clippy::unwrap_used, reason = "helpers of tests: what cannot be set up has failed")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::common::{self, Bench, NOW_MS, Node, Tree, noise};
use proto::{Action, BackupId, Code, Failure};
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::{CheckOptions, Error, KeyFile, Repository};

async fn damaged_bench() -> (Bench, Vec<BackupId>, std::collections::BTreeMap<Vec<u8>, Node>) {
    let bench = Bench::new().await;
    let tree =
        Tree::new().directory("d").file("d/a", noise(1, 30_000)).file("d/b", vec![7; 400_000]);
    let tree = Arc::new(tree.file("d/large", noise(2, 300_000)));
    let first = bench.back_up(&tree, NOW_MS).await;
    tree.write("d/b", 9000, b"changed");
    tree.write("d/large", 200_000, b"changed");
    let second = bench.back_up(&tree, NOW_MS + 1).await;
    let expected = common::restore(&bench.open(&second).await).await.unwrap();
    (bench, vec![first.backup, second.backup], expected)
}

/// Opens the repository afresh and restores a backup.
async fn try_restore(
    store: &Path,
    key: &KeyFile,
    bench: &Bench,
    backup: BackupId,
) -> Result<std::collections::BTreeMap<Vec<u8>, Node>, Error> {
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(store));
    let repository = Repository::open(store, Some(key)).await?;
    let backup = repository.open_backup(bench.lineage, backup).await?;
    common::restore(&backup).await
}

/// Objects without which no restore of a backup can work. (Some packs belong to the older backup alone.)
fn needed(path: &Path, backup: BackupId) -> bool {
    let text = path.to_str().unwrap();
    let of_backup = |name| text.ends_with(&format!("{backup}/{name}"));
    text.ends_with("/config")
        || text.contains("/keys/")
        || of_backup("manifest")
        || of_backup("verdict")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_flipped_bit_cut_end_or_missing_object_gives_wrong_bytes() {
    let (bench, backups, expected) = damaged_bench().await;
    let latest = backups[1];
    let files: Vec<PathBuf> = common::files_below(&bench.store_path());
    assert!(files.len() > 10, "{files:?}");
    let mut refused = 0;
    let mut harmless = 0;
    for file in &files {
        let original = std::fs::read(file).unwrap();
        let mut mutations: Vec<Option<Vec<u8>>> = vec![None, Some(vec![])];
        for share in [1, 4, 7] {
            mutations.push(Some(original[..original.len() * share / 8].to_vec()));
        }
        mutations.push(Some(original[..original.len() - 1].to_vec()));
        mutations.push(Some([&original[..], &[0]].concat()));
        for n in 0..24_usize {
            let mut flipped = original.clone();
            // Header, trailer and an even walk through the middle.
            let at = match n {
                0..8 => n * 20 % original.len(),
                8..16 => original.len() - 1 - ((n - 8) * 13 % original.len()),
                _ => original.len() * (n - 16) / 8,
            };
            flipped[at] ^= 1 << (n % 8);
            mutations.push(Some(flipped));
        }
        for mutation in mutations {
            match &mutation {
                Some(bytes) => std::fs::write(file, bytes).unwrap(),
                None => std::fs::remove_file(file).unwrap(),
            }
            match try_restore(&bench.store_path(), &bench.key, &bench, latest).await {
                Ok(restored) => {
                    assert!(restored == expected, "{}", file.display());
                    harmless += 1;
                }
                Err(_) => refused += 1,
            }
            std::fs::write(file, &original).unwrap();
        }
        if needed(file, latest) {
            std::fs::write(file, b"").unwrap();
            assert!(
                try_restore(&bench.store_path(), &bench.key, &bench, latest).await.is_err(),
                "{}",
                file.display()
            );
            std::fs::write(file, &original).unwrap();
        }
    }
    // Harmless is what the restore of this backup does not read: trailers, the other backup's objects.
    assert!(refused > 150 && refused + harmless > 400, "{refused} refused, {harmless} harmless");
    assert!(
        try_restore(&bench.store_path(), &bench.key, &bench, latest).await.unwrap() == expected
    );
}

/// Flips a bit in the middle of a file.
fn rot(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 4;
    std::fs::write(path, bytes).unwrap();
}

/// Packs of metadata: their type stands in their header.
fn metadata_packs(bench: &Bench) -> Vec<PathBuf> {
    let mut packs = common::files_below(&bench.store_path());
    packs.retain(|path| is_pack(path) && std::fs::read(path).unwrap()[9] == 2);
    packs
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_with_rotten_metadata_poisons_no_later_one() {
    let bench = Bench::new().await;
    let tree = Arc::new(
        Tree::new()
            .directory("d")
            .file("d/a", noise(1, 30_000))
            // Described by shards of its own, which nobody reads while it does not change.
            .file("d/large", noise(2, 600_000)),
    );
    let first = bench.back_up(&tree, NOW_MS).await;
    let of_first = metadata_packs(&bench);
    tree.write("d/a", 9000, b"changed");
    let second = bench.back_up(&tree, NOW_MS + 1).await;
    assert_eq!(second.predecessor, Some(first.backup));
    let of_second: Vec<PathBuf> =
        metadata_packs(&bench).into_iter().filter(|pack| !of_first.contains(pack)).collect();

    // The newest is bad: the one before it is compared with.
    for pack in &of_second {
        rot(pack);
    }
    let attempt = bench.begin(NOW_MS + 2).await;
    assert_eq!(attempt.predecessor(), Some(first.backup));
    let passed: Vec<BackupId> = attempt.passed_over().iter().map(|over| over.backup).collect();
    assert_eq!(passed, [second.backup]);
    let third = bench.back_up(&tree, NOW_MS + 3).await;
    assert_eq!(third.predecessor, Some(first.backup));
    assert_eq!(bench.restore(&third).await, tree.expected());

    // All of them are: everything is stored anew, and nothing bad is referred to.
    for pack in &of_first {
        rot(pack);
    }
    let fourth = bench.back_up(&tree, NOW_MS + 4).await;
    assert_eq!((fourth.predecessor, fourth.packs_reused), (None, 0));
    assert_eq!(bench.restore(&fourth).await, tree.expected());
    let report = bench.open(&fourth).await.check_decrypt(CheckOptions::default()).await.unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(bench.back_up(&tree, NOW_MS + 5).await.predecessor, Some(fourth.backup));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotten_manifest_or_verdict_poisons_no_later_backup() {
    for name in ["manifest", "verdict", "intent"] {
        let bench = Bench::new().await;
        let tree = Arc::new(Tree::new().file("a", noise(1, 30_000)));
        let first = bench.back_up(&tree, NOW_MS).await;
        let second = bench.back_up(&tree, NOW_MS + 1).await;
        let of_second = format!("{}/{name}", second.backup);
        let files = common::files_below(&bench.store_path());
        rot(files.iter().find(|path| path.to_str().unwrap().ends_with(&of_second)).unwrap());
        let third = bench.back_up(&tree, NOW_MS + 2).await;
        // An intent says nothing that a restore or a comparison needs.
        let expected = if name == "intent" { second.backup } else { first.backup };
        assert_eq!(third.predecessor, Some(expected), "{name}");
        assert_eq!(bench.restore(&third).await, tree.expected());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_that_change_places_are_noticed() {
    let (bench, backups, expected) = damaged_bench().await;
    let files: Vec<PathBuf> = common::files_below(&bench.store_path());
    let (mut swapped, mut refused) = (0, 0);
    for one in &files {
        for two in &files {
            let comparable = one.file_name() == two.file_name() || (is_pack(one) && is_pack(two));
            if one >= two || !comparable {
                continue;
            }
            let (a, b) = (std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
            std::fs::write(one, &b).unwrap();
            std::fs::write(two, &a).unwrap();
            swapped += 1;
            match try_restore(&bench.store_path(), &bench.key, &bench, backups[1]).await {
                Ok(restored) => {
                    assert!(restored == expected, "{} {}", one.display(), two.display());
                }
                Err(_) => refused += 1,
            }
            std::fs::write(one, &a).unwrap();
            std::fs::write(two, &b).unwrap();
        }
    }
    assert!(swapped > 10 && refused > 10, "{swapped} swapped, {refused} refused");
    // The newest backup's objects rolled back to the older one's.
    for name in ["manifest", "verdict"] {
        let path = |backup: BackupId| {
            bench.store_path().join(format!("lineages/{}/backups/{backup}/{name}", bench.lineage))
        };
        let original = std::fs::read(path(backups[1])).unwrap();
        std::fs::copy(path(backups[0]), path(backups[1])).unwrap();
        let error =
            try_restore(&bench.store_path(), &bench.key, &bench, backups[1]).await.unwrap_err();
        assert!(matches!(error, Error::Damaged { .. }), "{error}");
        std::fs::write(path(backups[1]), original).unwrap();
    }
}

fn is_pack(path: &Path) -> bool {
    path.to_str().unwrap().contains("/packs/")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_name_every_damaged_pack() {
    let (bench, backups, _) = damaged_bench().await;
    let backup = bench.repository.open_backup(bench.lineage, backups[1]).await.unwrap();
    let packs: Vec<PathBuf> =
        common::files_below(&bench.store_path()).into_iter().filter(|path| is_pack(path)).collect();
    let mut found = 0;
    for pack in &packs {
        let original = std::fs::read(pack).unwrap();
        let id = pack.file_name().unwrap().to_str().unwrap();
        for at in [
            0,
            60,
            100,
            150,
            original.len() / 2,
            original.len() - 60,
            original.len() - 20,
            original.len() - 1,
        ] {
            let mut flipped = original.clone();
            flipped[at] ^= 0x10;
            std::fs::write(pack, &flipped).unwrap();
            let backup = bench.repository.open_backup(bench.lineage, backup.id()).await.unwrap();
            let report = backup.check_decrypt(CheckOptions::default()).await.unwrap();
            // A pack of the first backup alone is not this backup's.
            if let Some((key, _)) = report.damaged.first() {
                assert!(key.ends_with(id), "{report:?}");
                found += 1;
            }
            assert!(backup.check_inventory().await.unwrap().is_sound(), "sizes are right");
        }
        std::fs::write(pack, &original[..original.len() - 1]).unwrap();
        let cut = backup.check_inventory().await.unwrap();
        std::fs::remove_file(pack).unwrap();
        let gone = backup.check_inventory().await.unwrap();
        assert_eq!(cut.wrong_size.len(), gone.missing.len());
        std::fs::write(pack, original).unwrap();
    }
    let needed = backup.check_inventory().await.unwrap().packs;
    assert_eq!(found, needed * 8, "every flip in every pack of the backup");
}

/// A pack that ends early does not come back by asking again: it is damage, and not a store that is out of reach.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_was_cut_is_damage_and_no_outage() {
    let (bench, backups, _) = damaged_bench().await;
    let packs = common::files_below(&bench.store_path()).into_iter().filter(|path| is_pack(path));
    let mut refused = 0;
    for pack in packs {
        let original = std::fs::read(&pack).unwrap();
        for length in [0, 200, original.len() / 2] {
            std::fs::write(&pack, &original[..length]).unwrap();
            let restored = try_restore(&bench.store_path(), &bench.key, &bench, backups[1]).await;
            if let Err(error) = restored {
                assert!(matches!(error, Error::Damaged { .. }), "{}: {error:?}", pack.display());
                let failure = Failure::from(error);
                assert_eq!((failure.code, failure.action), (Code::ObjectDamaged, Action::FixData));
                refused += 1;
            }
        }
        std::fs::write(&pack, original).unwrap();
    }
    assert!(refused >= 6, "{refused}");
}
