//! A second reader, written from FORMAT.md alone in another language, restores what the program wrote, byte by byte, and
//! refuses what is not right. It needs python3, python3-cryptography, python3-zstandard and b3sum (`tests/tools`).

#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use crate::common::{self, NOW_MS, Node, SharedTree, Tree, noise};
use proto::{AttemptId, LineageId, SystemIdentifier};
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::{
    Backup, Encryption, InitOptions, Intent, KeyFile, Outcome, Repository, RestoreOptions,
    RestoreTarget, Source, SourceEntry, WriteOptions,
};

/// The interpreter that Debian's modules belong to, whatever else is in the path.
const PYTHON: &str = "/usr/bin/python3";

/// What a restore leaves under each name: what it is, and its permission bits.
type Restored = BTreeMap<Vec<u8>, (Node, u32)>;

fn look(root: &Path) -> Restored {
    let mut found = Restored::new();
    for (path, node) in common::look(root) {
        let place = root.join(std::ffi::OsStr::from_bytes(&path));
        let mode = fs::symlink_metadata(&place).unwrap().permissions().mode() & 0o7777;
        if node == Node::Directory {
            // So that the temporary directory can be removed.
            fs::set_permissions(&place, fs::Permissions::from_mode(0o700)).unwrap();
        }
        found.insert(path, (node, mode));
    }
    found
}

/// The repository of a test, as a stranger has it: a directory and perhaps a key file.
struct Found {
    store: PathBuf,
    key: Option<PathBuf>,
}

impl Found {
    async fn open(&self) -> Repository {
        let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(&self.store));
        let key: Option<KeyFile> =
            self.key.as_ref().map(|key| fs::read_to_string(key).unwrap().parse().unwrap());
        Repository::open(store, key.as_ref()).await.unwrap()
    }

    fn run(&self, verb: &str, arguments: &[&str]) -> Result<String, String> {
        self.run_script("restore.py", verb, arguments)
    }

    /// What the reader makes of an archived file of a lineage, or why it refuses.
    fn fetch(&self, lineage: LineageId, name: &str) -> Result<Vec<u8>, String> {
        let place = tempfile::tempdir().unwrap();
        let to = place.path().join("file");
        self.run_script("wal.py", "get", &[&lineage.to_string(), name, to.to_str().unwrap()])?;
        Ok(fs::read(&to).unwrap())
    }

    fn run_script(&self, script: &str, verb: &str, arguments: &[&str]) -> Result<String, String> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader").join(script);
        let key = self.key.as_deref().unwrap_or(Path::new("-"));
        let output = Command::new(PYTHON)
            .args(["-B".as_ref(), script.as_os_str(), verb.as_ref()])
            .args([self.store.as_os_str(), key.as_os_str()])
            .args(arguments)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("Traceback"), "the reader broke down, or misses a module: {said}");
        if output.status.success() {
            Ok(String::from_utf8(output.stdout).unwrap())
        } else {
            Err(said)
        }
    }

    /// What the reader makes of a backup, or why it refuses.
    fn restore(&self, backup: &str) -> Result<Restored, String> {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("data");
        self.run("restore", &[backup, directory.to_str().unwrap()])?;
        Ok(look(&directory))
    }
}

/// What the program makes of a backup; its WAL is restored where the backup has a directory for it.
async fn restore(backup: &Backup, wal: bool) -> Restored {
    let place = tempfile::tempdir().unwrap();
    let target = RestoreTarget {
        directory: place.path().join("data"),
        wal_directory: wal.then(|| b"pg_wal".to_vec()),
        ..RestoreTarget::default()
    };
    let plan = backup.restore_plan(target).await.unwrap();
    plan.restore(RestoreOptions::default()).await.unwrap();
    look(&place.path().join("data"))
}

#[test]
fn the_second_reader_has_at_most_400_lines() {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reader/restore.py");
    assert!(fs::read_to_string(script).unwrap().lines().count() <= 400);
}

/// Restores every backup with both and compares; says how many there were.
async fn compare(found: &Found) -> usize {
    let repository = found.open().await;
    let mut listed = Vec::new();
    let mut compared = 0;
    for identity in repository.list_lineages().await.unwrap() {
        let lineage = identity.lineage;
        for attempt in repository.list_attempts(lineage).await.unwrap() {
            let verdict = match attempt.verdict.as_ref().map(|verdict| &verdict.outcome) {
                Some(Outcome::Commit { .. }) => "COMMIT",
                Some(Outcome::Abort { .. }) => "ABORT",
                None => "open",
            };
            let (cluster, attempt_id) = (&identity.cluster, attempt.attempt);
            listed.push(format!("{cluster} {lineage} {attempt_id} {verdict}"));
            let Some(id) = attempt.backup() else {
                let refused = found.restore(&attempt_id.to_string()).unwrap_err();
                assert!(refused.contains("is not a backup"), "{refused}");
                continue;
            };
            let backup = repository.open_backup(lineage, id).await.unwrap();
            let mut theirs = found.restore(&id.to_string()).unwrap();
            let ours = restore(&backup, false).await;
            if ours.contains_key(&b"pg_wal"[..]) {
                assert_same(&restore(&backup, true).await, &theirs);
            } else {
                let wal = backup.wal_files().await.unwrap();
                if !wal.is_empty() {
                    assert_eq!(theirs.remove(&b"pg_wal"[..]), Some((Node::Directory, 0o700)));
                }
                for file in wal {
                    let path = format!("pg_wal/{}", file.name).into_bytes();
                    let wal = (Node::File(noise(99, 100_000)), 0o600);
                    assert!(theirs.remove(&path) == Some(wal), "{}", file.name);
                }
                assert_same(&ours, &theirs);
            }
            compared += 1;
        }
    }
    assert_eq!(found.run("list", &[]).unwrap(), listed.join("\n") + "\n");
    compared
}

/// Fetches every archived file with both and compares; says how many there were.
async fn compare_archives(found: &Found) -> usize {
    let repository = found.open().await;
    let mut compared = 0;
    for identity in repository.list_lineages().await.unwrap() {
        let lineage = identity.lineage;
        let prefix = format!("lineages/{lineage}/wal/");
        let objects = repository.store().list(&prefix).await.unwrap();
        let mut names = Vec::new();
        for object in objects {
            let name = object.key.rsplit_once('/').unwrap().1;
            let Ok(file) = name.parse() else { continue };
            let ours = repository.fetch_wal(lineage, &file).await.unwrap().unwrap();
            assert!(found.fetch(lineage, name).unwrap() == ours, "{name}");
            names.push(name.to_owned());
            compared += 1;
        }
        let listed = found.run_script("wal.py", "list", &[&lineage.to_string()]).unwrap();
        assert_eq!(listed.lines().collect::<Vec<_>>(), names);
    }
    compared
}

/// Says which names differ, and not the megabytes in them.
fn assert_same(ours: &Restored, theirs: &Restored) {
    let differ: Vec<String> = ours
        .keys()
        .chain(theirs.keys())
        .filter(|path| ours.get(*path) != theirs.get(*path))
        .map(|path| path.escape_ascii().to_string())
        .collect();
    assert!(differ.is_empty(), "the two readers disagree on {differ:?}");
}

/// A repository being written.
struct Made {
    place: tempfile::TempDir,
    found: Found,
    repository: Repository,
    backups: u8,
}

impl Made {
    async fn new(encryption: Encryption) -> Self {
        let place = tempfile::tempdir().unwrap();
        let store = place.path().join("repository");
        let options = InitOptions { encryption, now_ms: NOW_MS };
        let opened: Arc<dyn Store> = Arc::new(DirectoryStore::new(&store));
        let created = Repository::init(opened, options).await.unwrap();
        let key = created.key_file.map(|text| {
            let key = place.path().join("repository.key");
            fs::write(&key, text.as_bytes()).unwrap();
            key
        });
        let found = Found { store, key };
        Self { place, found, repository: created.repository, backups: 0 }
    }

    async fn lineage(&self, cluster: &str, system: u64) -> LineageId {
        let system = SystemIdentifier(system);
        let cluster = cluster.parse().unwrap();
        self.repository.find_or_mint_lineage(&cluster, system, NOW_MS).await.unwrap().lineage
    }

    fn intent(&mut self) -> Intent {
        self.backups += 1;
        let began_at_ms = NOW_MS + i64::from(self.backups) * 1000;
        let attempt = AttemptId::mint(began_at_ms.cast_unsigned(), [self.backups; 10]);
        Intent { attempt, follows: None, by: "worker-1".into(), began_at_ms }
    }

    /// Backs a tree up with the given modes, late entries and WAL.
    async fn back_up(
        &mut self,
        lineage: LineageId,
        tree: &Arc<Tree>,
        modes: &[(&str, u32)],
        wal: &[(&str, usize)],
    ) -> proto::BackupId {
        let intent = self.intent();
        let at_ms = intent.began_at_ms;
        let attempt = self.repository.begin(lineage, intent).await.unwrap();
        let continuity = Some("here".to_owned());
        let mut writer =
            attempt.write(WriteOptions { continuity, ..WriteOptions::default() }).unwrap();
        let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(tree)));
        let mut entries = tree.entries();
        for (path, mode) in modes {
            let entry = entries.iter_mut().find(|entry| entry.path == path.as_bytes());
            entry.unwrap().mode = *mode;
        }
        writer.copy(Arc::clone(&source), entries.into_iter().map(Ok)).await.unwrap();
        for (name, length) in wal {
            let content = std::io::Cursor::new(noise(*length as u64, *length));
            writer.wal().add(name, content).await.unwrap();
        }
        let late = vec![
            SourceEntry::bytes("backup_label", 0o600, "START WAL LOCATION: 0/1000000"),
            SourceEntry::directory("late", 0o500),
            SourceEntry::bytes("late/control", 0o440, noise(1, 8192)),
            SourceEntry::bytes("late/large", 0o600, noise(2, 600_000)),
            SourceEntry::symlink("late/link", "control"),
        ];
        let written = writer.finish(source, late, common::facts()).await.unwrap();
        written.commit(at_ms + 500).await.unwrap().backup
    }
}

/// Text that compresses like data does.
fn rows(length: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(length + 64);
    for n in 0_u64.. {
        if bytes.len() >= length {
            break;
        }
        let drawn = n.wrapping_mul(6_364_136_223_846_793_005);
        bytes.extend_from_slice(format!("{:08}|{:04}|open|", drawn >> 40, drawn >> 52).as_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// Everything the format can say of a tree.
fn everything() -> Tree {
    let mut holes = vec![0; 5 << 20];
    holes[3 << 20] = 1;
    let mut tree = Tree::new()
        .directory("base")
        .directory("base/1")
        .directory("base/1.x")
        .directory("closed")
        .directory("empty")
        .directory("pg_tblspc")
        .directory("pg_tblspc/16400")
        .directory("pg_wal")
        .file("PG_VERSION", "15\n")
        .file("base/1/large", rows((5 << 20) + 777))
        .file("base/1/noise", noise(3, (2 << 20) + 3))
        .file("base/1/holes", holes)
        .file("base/1/zeros", vec![0; 3 * 8192 + 1])
        .file("base/1/nothing", vec![])
        .file("base/1/thirty-two-units", rows(32 * 8192))
        .file("base/1/thirty-three-units", rows(32 * 8192 + 1))
        .file("base/1/one-shard", noise(4, 256 * 8192))
        .file("base/1/one-shard-and-a-byte", [vec![0; 256 * 8192], vec![7]].concat())
        .file("base/1/shrinks", rows(4 << 20))
        .file("base/1/shrinks-to-nothing", rows(1 << 20))
        .file("base/1.x/a", "stands behind base/1/*")
        .file(&b"base/1.x/\xff\xfe name\nwith 'odd' \"bytes\" \\"[..], "odd")
        .file("closed/read-only", rows(100))
        .file("pg_tblspc/16400/rows", rows(30_000));
    for n in 0..600 {
        tree = tree.file(format!("base/1/3{n:04}"), rows(n * 37 % 10_000));
    }
    tree.put("base/1/no-pages", noise(5, 100_001), None);
    tree.put("base/1/pages-of-16k", rows(700_000), Some(16 << 10));
    tree.put("base/1/pages-of-32k", rows(700_000), Some(32 << 10));
    tree.change("base/1/shrinks", |file| file.at_read = Some(Some(rows((2 << 20) + 5))));
    tree.change("base/1/shrinks-to-nothing", |file| file.at_read = Some(Some(Vec::new())));
    let mut deep = String::from("deep");
    for _ in 0..62 {
        tree = tree.directory(&deep);
        deep += "/d";
    }
    tree = tree.file(format!("{deep}{}", "e".repeat(254)), "at the end of a long way");
    for (path, target) in
        [("base/link", "1/large"), ("out", "../../etc/passwd"), ("base/1/nowhere", "/no\nwhere")]
    {
        tree.links.push((path.into(), target.into()));
    }
    tree
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_golden_repository_is_restored_alike_by_both_readers() {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut compared = BTreeMap::new();
    for version in fs::read_dir(golden).unwrap() {
        let version = version.unwrap().path();
        let found =
            Found { store: version.join("repository"), key: Some(version.join("repository.key")) };
        let name = version.file_name().unwrap().to_str().unwrap().to_owned();
        compared.insert(name, (compare(&found).await, compare_archives(&found).await));
    }
    let expected = [("v1", (2, 0)), ("v1-dump", (2, 0)), ("v1-wal", (1, 7))];
    let expected = expected.map(|(version, counts)| (version.to_owned(), counts));
    assert_eq!(compared, BTreeMap::from(expected));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_reader_refuses_archived_wal_that_was_changed_moved_or_is_not_there() {
    let made = Made::new(Encryption::KeyFile).await;
    let [lineage, other] = [made.lineage("orders", 7).await, made.lineage("invoices", 8).await];
    let names = ["000000010000000000000001", "000000010000000000000002"];
    for (number, name) in (1..).zip(names) {
        let content = common::segment(1, number);
        made.repository.store_wal(lineage, &name.parse().unwrap(), content).await.unwrap();
    }
    // A lineage that has no backup has an archive all the same.
    assert_eq!(
        (made.found.run("list", &[]), compare_archives(&made.found).await),
        (Ok(String::new()), 2)
    );
    let file = |lineage: LineageId, name: &str| {
        made.found.store.join(format!("lineages/{lineage}/wal/00000001/{name}"))
    };
    let [first, second] = names.map(|name| file(lineage, name));
    let whole = fs::read(&first).unwrap();
    let refused = |what: &str, needle: &str| {
        let reason = made.found.fetch(lineage, names[0]).expect_err(what);
        assert!(reason.contains("failed") && reason.contains(needle), "{what}: {reason}");
    };
    for at in [0, 70, 100, 150, 200, 250, whole.len() - 60, whole.len() - 20, whole.len() - 1] {
        let mut changed = whole.clone();
        changed[at] ^= 1;
        fs::write(&first, changed).unwrap();
        refused(&format!("byte {at} is changed"), "");
    }
    for length in [0, 150, whole.len() - 1] {
        fs::write(&first, &whole[..length]).unwrap();
        refused(&format!("cut to {length} bytes"), "");
    }
    fs::copy(&second, &first).unwrap();
    refused("another segment", "another object");
    fs::write(&first, &whole).unwrap();
    fs::create_dir_all(file(other, names[0]).parent().unwrap()).unwrap();
    fs::copy(&first, file(other, names[0])).unwrap();
    let reason = made.found.fetch(other, names[0]).unwrap_err();
    assert!(reason.contains("another object"), "{reason}");
    fs::remove_file(&first).unwrap();
    refused("deleted", "No such file");
    for name in ["../identity", "00000001.histor", "floor", "000000010000000000000001.bak"] {
        let reason = made.found.fetch(lineage, name).unwrap_err();
        assert!(reason.contains("is not the name of a file"), "{reason}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_the_format_can_hold_is_restored_alike_by_both_readers() {
    let mut made = Made::new(Encryption::KeyFile).await;
    let lineage = made.lineage("orders", 7).await;
    let modes = [
        ("base/1", 0o750),
        ("closed", 0o500),
        ("closed/read-only", 0o400),
        ("PG_VERSION", 0o644),
        ("base/1.x/a", 0o6755),
    ];
    let wal = [
        ("00000002.history", 50),
        ("000000020000000000000001", 9 << 20),
        ("000000020000000000000002", 100_000),
    ];
    let tree = Arc::new(everything());
    made.back_up(lineage, &tree, &modes, &wal).await;

    // Two more that share packs with it: one of changed units, one that stores no file content.
    for file in tree.files.lock().unwrap().values_mut() {
        file.at_read = None;
    }
    for at in [0, 3 << 20, (5 << 20) + 776] {
        tree.write("base/1/large", at, b"X");
    }
    tree.write("base/1/zeros", 8192, b"not zero any more");
    made.back_up(lineage, &tree, &modes, &wal[1..]).await;
    made.back_up(lineage, &tree, &modes, &[]).await;

    // Another lineage, an attempt that was aborted and one that is open.
    let other = made.lineage("invoices", u64::MAX).await;
    let small = Arc::new(Tree::new().file("a", "b"));
    made.back_up(other, &small, &[], &[]).await;
    let intent = made.intent();
    let aborted = made.repository.begin(other, intent).await.unwrap().id();
    made.repository.abort(other, aborted, "test", "to see it", NOW_MS).await.unwrap();
    let intent = made.intent();
    made.repository.begin(other, intent).await.unwrap();
    assert_eq!(compare(&made.found).await, 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repository_without_encryption_is_restored_alike_by_both_readers() {
    let mut made = Made::new(Encryption::Off).await;
    let lineage = made.lineage("orders", 7).await;
    let tree = Arc::new(Tree::new().directory("pg_wal").file("a", rows(100_000)));
    made.back_up(lineage, &tree, &[], &[("000000010000000000000001", 100_000)]).await;
    assert_eq!(compare(&made.found).await, 1);
}

/// Every object of the repository, by what it is.
fn objects(made: &Made, lineage: LineageId, backups: &[String]) -> BTreeMap<String, PathBuf> {
    let mut objects = BTreeMap::new();
    for path in common::files_below(&made.found.store) {
        let key = path.strip_prefix(&made.found.store).unwrap().to_str().unwrap().to_owned();
        let mut name = key.replace(&format!("lineages/{lineage}/"), "");
        for (n, backup) in (1..).zip(backups) {
            name = name.replace(&format!("backups/{backup}"), &format!("backup {n}"));
        }
        objects.insert(name, path);
    }
    objects
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_second_reader_refuses_what_was_changed_moved_or_is_opened_with_a_wrong_key() {
    let mut made = Made::new(Encryption::KeyFile).await;
    let lineage = made.lineage("orders", 7).await;
    let tree = Arc::new(Tree::new().file("a", noise(1, 50_000)));
    let mut backups = Vec::new();
    for at in 0..2 {
        tree.write("a", at * 20_000, b"CHANGED");
        let wal = [("000000010000000000000001", 30_000)];
        backups.push(made.back_up(lineage, &tree, &[], &wal).await.to_string());
    }
    let objects = objects(&made, lineage, &backups);
    let good = made.found.restore(&backups[0]).unwrap();
    let refused = |what: &str, needle: &str| {
        let Err(reason) = made.found.restore(&backups[0]) else {
            panic!("{what}: it was restored")
        };
        assert!(reason.contains(needle), "{what}: {reason}");
    };

    // One bit of each object that the first backup needs.
    let repository = made.found.open().await;
    let id = backups[0].parse().unwrap();
    let needed = repository.open_backup(lineage, id).await.unwrap().counts().packs;
    let (mut packs, mut others) = (Vec::new(), 0);
    for (name, path) in &objects {
        let bytes = fs::read(path).unwrap();
        let is_pack = name.starts_with("packs/");
        // The keyring is for changing keys, and never needed to read.
        if name.starts_with("backup 2") || name.starts_with("keyring/") {
            continue;
        }
        if is_pack {
            // Those that only the second backup names do not matter to the first.
            fs::rename(path, path.with_extension("away")).unwrap();
            let matters = made.found.restore(&backups[0]).is_err();
            fs::rename(path.with_extension("away"), path).unwrap();
            if !matters {
                continue;
            }
            packs.push(name.as_str());
        } else {
            others += 1;
        }
        for (at, bit) in [(0, 0), (bytes.len() / 2, 3), (bytes.len() - 1, 2)] {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << bit;
            fs::write(path, &changed).unwrap();
            refused(&format!("bit {bit} of byte {at} of {name}"), "failed");
        }
        fs::write(path, &bytes[..bytes.len() - 2]).unwrap();
        refused(&format!("{name} without its last two bytes"), "failed");
        fs::write(path, &bytes).unwrap();
    }
    assert_eq!(packs.len() as u64, needed);
    assert_eq!(others, 6, "config, key, identity, intent, manifest, verdict");

    // Two objects that change places: equal in kind, each right where it was.
    for (one, other, needle) in [
        (packs[0], packs[1], "another object"),
        ("backup 1/manifest", "backup 2/manifest", "another object"),
        ("backup 1/verdict", "backup 2/verdict", "the code of"),
        ("backup 1/intent", "backup 1/verdict", "the code of"),
        ("config", "identity", ""),
    ] {
        let (one, other) = (&objects[one], &objects[other]);
        let aside = made.place.path().join("aside");
        let swap = || {
            fs::rename(one, &aside).unwrap();
            fs::rename(other, one).unwrap();
            fs::rename(&aside, other).unwrap();
        };
        swap();
        refused(&format!("{} and {}", one.display(), other.display()), needle);
        swap();
    }

    // Keys that are not the one.
    let key = made.found.key.as_ref().unwrap();
    let text = fs::read_to_string(key).unwrap();
    let line = text.lines().last().unwrap();
    let id = line.split(' ').nth(1).unwrap();
    let strange = Made::new(Encryption::KeyFile).await;
    let strange = fs::read_to_string(strange.found.key.as_ref().unwrap()).unwrap();
    let last = if line.ends_with('0') { "1" } else { "0" };
    let mistyped = format!("{}{last}", &line[..line.len() - 1]);
    for (what, wrong, needle) in [
        ("the key of another repository", strange, "No such file"),
        ("another secret under the same id", forged(id), "does not open"),
        ("a mistyped digit", mistyped, "a digit"),
        ("no key", "# nothing here".to_owned(), "no line with a key"),
    ] {
        fs::write(key, wrong).unwrap();
        refused(what, needle);
    }
    fs::write(key, text).unwrap();
    assert_same(&good, &made.found.restore(&backups[0]).unwrap());
}

/// A key file that has an id and whose check digits fit, but whose secret nobody drew.
fn forged(id: &str) -> String {
    let mut bytes = Vec::new();
    for pair in id.as_bytes().chunks(2) {
        bytes.push(u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap());
    }
    bytes.extend_from_slice(&[0x11; 32]);
    let check = blake3::derive_key("pgmuster repository v1: check digits of a key file", &bytes);
    let check = blake3::Hash::from_bytes(check).to_hex();
    format!("pgmuster-key-1 {id} {} {}", "11".repeat(32), &check[..8])
}
