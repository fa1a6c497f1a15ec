//! Attempts, verdicts, keys and crashes: who may commit, and what is left when somebody does not.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::common::{self, Bench, NOW_MS, SharedTree, Tree, facts, noise};
use async_trait::async_trait;
use bytes::Bytes;
use proto::{Code, Failure, SystemIdentifier};
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::probe::probe;
use repository::store::{PutOutcome, Store, StoreError};
use repository::{
    Aborted, Encryption, Error, Existing, InitOptions, KeyFile, Outcome, Repository,
    RestoreOptions, RestoreTarget, Source, SourceEntry, WriteOptions,
};

fn small_tree() -> Arc<Tree> {
    Arc::new(
        Tree::new().directory("d").file("d/a", noise(1, 50_000)).file("d/b", noise(2, 700_000)),
    )
}

fn source(tree: &Arc<Tree>) -> Arc<dyn Source> {
    Arc::new(SharedTree(Arc::clone(tree)))
}

#[tokio::test]
async fn a_repository_is_made_once_and_opened_with_its_key_only() {
    let bench = Bench::new().await;
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(bench.store_path()));
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let error = Repository::init(Arc::clone(&store), options).await.unwrap_err();
    assert!(matches!(error, Error::RepositoryExists { .. }), "{error}");

    let opened = Repository::open(Arc::clone(&store), Some(&bench.key)).await.unwrap();
    assert_eq!(opened.id(), bench.repository.id());
    let missing = Repository::open(Arc::clone(&store), None).await.unwrap_err();
    assert_eq!(Failure::from(missing).code, Code::KeyWrong);

    let other = Bench::new().await;
    let wrong = Repository::open(store, Some(&other.key)).await.unwrap_err();
    assert_eq!(Failure::from(wrong).code, Code::KeyWrong);

    let empty = tempfile::tempdir().unwrap();
    let nothing: Arc<dyn Store> = Arc::new(DirectoryStore::new(empty.path()));
    let error = Repository::open(nothing, Some(&bench.key)).await.unwrap_err();
    assert_eq!(Failure::from(error).code, Code::RepositoryMissing);
}

#[tokio::test]
async fn a_recovery_sheet_is_enough_to_open_and_no_encryption_needs_none() {
    let place = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(place.path()));
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let created = Repository::init(Arc::clone(&store), options).await.unwrap();
    let key: KeyFile = created.recovery_sheet.parse().unwrap();
    Repository::open(store, Some(&key)).await.unwrap();

    let place = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(place.path()));
    let options = InitOptions { encryption: Encryption::Off, now_ms: NOW_MS };
    let created = Repository::init(Arc::clone(&store), options).await.unwrap();
    assert!(created.key_file.is_none());
    Repository::open(store, None).await.unwrap();
}

#[tokio::test]
async fn a_cluster_keeps_its_lineage_and_a_clone_gets_its_own() {
    let bench = Bench::new().await;
    let find = |name: &str, id| {
        let (repository, name) = (bench.repository.clone(), name.parse().unwrap());
        async move {
            repository.find_or_mint_lineage(&name, SystemIdentifier(id), NOW_MS).await.unwrap()
        }
    };
    let orders = find("orders", 7).await;
    assert_eq!(orders.lineage, bench.lineage);
    // Two workers at the same time mint the same.
    let (one, two) = tokio::join!(find("billing", 9), find("billing", 9));
    assert_eq!(one.lineage, two.lineage);
    assert_ne!(one.lineage, find("billing-copy", 9).await.lineage);
    let next = bench.repository.mint_next_lineage(&orders, NOW_MS + 1).await.unwrap();
    assert_ne!(next.lineage, orders.lineage);
    assert_eq!(find("orders", 7).await, next);
    assert_eq!(bench.repository.list_lineages().await.unwrap().len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attempt_that_was_aborted_cannot_commit_and_is_no_backup() {
    let bench = Bench::new().await;
    let tree = small_tree();
    let intent = bench.intent(NOW_MS);
    let attempt = bench.repository.begin(bench.lineage, intent.clone()).await.unwrap();
    let again = bench.repository.begin(bench.lineage, intent.clone()).await.unwrap_err();
    assert!(matches!(again, Error::AttemptExists { .. }), "{again}");

    let mut writer = attempt.write(WriteOptions::default()).unwrap();
    writer.copy(source(&tree), tree.entries().into_iter().map(Ok)).await.unwrap();
    let written = writer.finish(source(&tree), vec![], facts()).await.unwrap();
    let aborted = bench
        .repository
        .abort(bench.lineage, intent.attempt, "worker-2", "its lease ran out", NOW_MS)
        .await
        .unwrap();
    assert!(matches!(aborted, Aborted::Aborted(_)));
    let refused = written.commit(NOW_MS).await.unwrap_err();
    assert!(
        matches!(&refused, Error::CommitRefused { by, why, .. } if by == "worker-2" && why == "its lease ran out")
    );
    assert_eq!(Failure::from(refused).code, Code::CommitRefused);
    assert_eq!(bench.repository.list_backups(bench.lineage).await.unwrap(), []);
    let attempts = bench.repository.list_attempts(bench.lineage).await.unwrap();
    assert!(matches!(attempts[0].verdict.as_ref().unwrap().outcome, Outcome::Abort { .. }));
    let error =
        bench.repository.open_backup(bench.lineage, intent.attempt.into()).await.unwrap_err();
    assert_eq!(Failure::from(error).code, Code::BackupUnknown);

    // It is nobody's predecessor either.
    let next = bench.back_up(&tree, NOW_MS + 1).await;
    assert_eq!(next.predecessor, None);
    // And the other way round: what is committed stays.
    let late = bench
        .repository
        .abort(bench.lineage, next.backup.into(), "worker-2", "late", NOW_MS)
        .await
        .unwrap();
    assert!(matches!(late, Aborted::Committed(_)));
    assert_eq!(bench.repository.list_backups(bench.lineage).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pack_that_is_gone_or_cut_before_the_verdict_is_no_success() {
    let bench = Bench::new().await;
    let tree = small_tree();
    let first = bench.back_up(&tree, NOW_MS).await;
    for (at_ms, cut) in [(NOW_MS + 1, false), (NOW_MS + 2, true)] {
        let known = common::files_below(&bench.store_path());
        let options = WriteOptions { full_read: true, ..WriteOptions::default() };
        let attempt = bench.begin(at_ms).await;
        let id = attempt.id();
        let mut writer = attempt.write(options).unwrap();
        tree.write("d/a", 0, &noise(at_ms.unsigned_abs(), 9000));
        writer.copy(source(&tree), tree.entries().into_iter().map(Ok)).await.unwrap();
        let written = writer.finish(source(&tree), vec![], facts()).await.unwrap();
        let stored = common::files_below(&bench.store_path());
        let is_new = |path: &&std::path::PathBuf| {
            path.to_str().unwrap().contains("/packs/") && !known.contains(path)
        };
        let pack = stored.iter().find(is_new).unwrap();
        if cut {
            let file = std::fs::File::options().write(true).open(pack).unwrap();
            file.set_len(file.metadata().unwrap().len() - 1).unwrap();
        } else {
            std::fs::remove_file(pack).unwrap();
        }
        let error = written.commit(at_ms).await.unwrap_err();
        assert!(matches!(error, Error::Incomplete { .. }), "{error}");
        let failure = Failure::from(error);
        assert_eq!((failure.code, failure.action), (Code::ObjectMissing, proto::Action::Retry));
        assert_eq!(bench.repository.verdict(bench.lineage, id).await.unwrap(), None);
    }
    let next = bench.back_up(&tree, NOW_MS + 3).await;
    assert_eq!(next.predecessor, Some(first.backup));
    assert_eq!(bench.restore(&next).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_a_commit_and_an_abort_at_the_same_time_exactly_one_wins() {
    let bench = Arc::new(Bench::new().await);
    let tree = small_tree();
    for round in 0..20 {
        let intent = bench.intent(NOW_MS + round);
        let attempt = bench.repository.begin(bench.lineage, intent.clone()).await.unwrap();
        let mut writer = attempt.write(WriteOptions::default()).unwrap();
        writer.copy(source(&tree), tree.entries().into_iter().map(Ok)).await.unwrap();
        let written = writer.finish(source(&tree), vec![], facts()).await.unwrap();
        let other = Arc::clone(&bench);
        let id = intent.attempt;
        let abort = tokio::spawn(async move {
            other.repository.abort(other.lineage, id, "other", "race", NOW_MS).await.unwrap()
        });
        let committed = tokio::spawn(written.commit(NOW_MS)).await.unwrap().is_ok();
        let aborted = matches!(abort.await.unwrap(), Aborted::Aborted(_));
        assert!(committed != aborted, "round {round}: committed {committed}, aborted {aborted}");
        let listed = bench.repository.list_backups(bench.lineage).await.unwrap();
        assert_eq!(listed.iter().any(|backup| backup.attempt == id), committed);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_writer_that_dies_at_any_step_leaves_no_backup_and_hinders_nobody() {
    let bench = Bench::new().await;
    let tree = small_tree();
    let first = bench.back_up(&tree, NOW_MS).await;
    for step in 0..5_i64 {
        let attempt = bench.begin(NOW_MS + 10 + step).await;
        assert_eq!(attempt.predecessor(), Some(first.backup));
        if step == 0 {
            continue;
        }
        let mut writer =
            attempt.write(WriteOptions { full_read: true, ..WriteOptions::default() }).unwrap();
        let wal = writer.wal();
        if step == 1 {
            continue;
        }
        wal.add("000000010000000000000002", io::Cursor::new(noise(4, 200_000))).await.unwrap();
        if step == 2 {
            continue;
        }
        writer.copy(source(&tree), tree.entries().into_iter().map(Ok)).await.unwrap();
        if step == 3 {
            continue;
        }
        let late = vec![SourceEntry::bytes("late", 0o600, "late")];
        drop(writer.finish(source(&tree), late, facts()).await.unwrap());
    }
    assert_eq!(bench.repository.list_backups(bench.lineage).await.unwrap().len(), 1);
    assert_eq!(bench.repository.list_attempts(bench.lineage).await.unwrap().len(), 6);
    let next = bench.back_up(&tree, NOW_MS + 20).await;
    assert_eq!(next.predecessor, Some(first.backup));
    assert_eq!(bench.restore(&next).await, tree.expected());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failing_source_and_a_cancelled_copy_end_cleanly() {
    let bench = Bench::new().await;
    let mut tree =
        (0..200).fold(Tree::new(), |tree, n| tree.file(format!("f{n:03}"), noise(n, 300_000)));
    tree.fail_at = Some(b"f150".to_vec());
    let tree = Arc::new(tree);
    let error = bench.back_up_with(&tree, NOW_MS, WriteOptions::default()).await.unwrap_err();
    assert!(matches!(&error, Error::Source { path, .. } if path == "f150"), "{error}");
    assert_eq!(Failure::from(error).code, Code::SourceUnreadable);

    let options = WriteOptions::default();
    options.cancel.cancel();
    let error = bench.back_up_with(&tree, NOW_MS + 1, options).await.unwrap_err();
    assert!(matches!(error, Error::Cancelled), "{error}");

    // Unfinished packs are not there under any name, and no thread of a copy is left.
    let uploads = bench.store_path().join(".uploads");
    assert!(!uploads.exists() || common::look(&uploads).is_empty());
    let threads = std::fs::read_dir("/proc/self/task")
        .unwrap()
        .filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("comm")).ok());
    let ours: Vec<String> =
        threads.filter(|name| name.starts_with("copy-") || name.starts_with("plan")).collect();
    assert!(ours.is_empty(), "{ours:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wal_that_is_stopped_by_a_failure_beside_it_says_which() {
    let bench = Bench::new().await;
    let mut tree =
        (0..20).fold(Tree::new(), |tree, n| tree.file(format!("f{n:03}"), noise(n, 300_000)));
    tree.fail_at = Some(b"f010".to_vec());
    let tree = Arc::new(tree);
    let attempt = bench.begin(NOW_MS).await;
    let mut writer = attempt.write(WriteOptions::default()).unwrap();
    let wal = writer.wal();
    let mut copying =
        std::pin::pin!(writer.copy(source(&tree), tree.entries().into_iter().map(Ok)));
    // The copy begins, and nobody looks how it ends; the segment has no end but the one the copy makes.
    tokio::select! {
        biased;
        _ = &mut copying => panic!("twenty files are not copied within one look"),
        () = std::future::ready(()) => {}
    }
    let error = wal.add("000000010000000000000002", io::repeat(7)).await.unwrap_err();
    assert!(matches!(&error, Error::Source { path, .. } if path == "f010"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_that_cannot_be_stored_are_refused_by_name() {
    let bench = Bench::new().await;
    let file = |path: &str| SourceEntry::bytes(path, 0o600, "x");
    for (entries, says) in [
        (vec![file("b"), file("a")], "not in order"),
        (vec![file("a"), file("a")], "not in order"),
        (vec![file("../a")], "'..'"),
        (vec![file("/etc/passwd")], "relative"),
        (vec![SourceEntry { block_size: Some(65536), ..file("a") }], "65536"),
        (vec![SourceEntry::symlink("a", "")], "target"),
    ] {
        let attempt = bench.begin(NOW_MS).await;
        let mut writer = attempt.write(WriteOptions::default()).unwrap();
        let error =
            writer.copy(source(&small_tree()), entries.into_iter().map(Ok)).await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert_eq!(Failure::from(error).code, Code::DataDirectoryShape);
    }
    let attempt = bench.begin(NOW_MS).await;
    let writer = attempt.write(WriteOptions::default()).unwrap();
    for name in ["", "a/b", ".."] {
        writer.wal().add(name, io::empty()).await.unwrap_err();
    }
}

/// Whoever has the key can write what no server has: a file behind a link, one that takes the marker's place, one that is there
/// twice. Such a backup is refused as a whole, also where a directory may be changed into it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_that_would_be_written_through_a_link_or_over_the_marker_is_refused() {
    let bench = Bench::new().await;
    let place = tempfile::tempdir().unwrap();
    let outside = place.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    let mut through = Tree::new().file("a/b", "over");
    through.links.push((b"a".to_vec(), outside.as_os_str().as_encoded_bytes().to_vec()));
    for (tree, says) in [
        (through, "a/b: it stands in something that is no directory"),
        (Tree::new().file("a/b", "over"), "it stands in something that is no directory"),
        (Tree::new().file("pgmuster-restore-incomplete", "over"), "it has the name of the marker"),
        (Tree::new().file("late_control", "over"), "it is there twice"),
    ] {
        let summary = bench.back_up(&Arc::new(tree), NOW_MS).await;
        let backup = bench.open(&summary).await;
        let directory = place.path().join("data");
        let fresh = RestoreTarget { directory: directory.clone(), ..RestoreTarget::default() };
        let error = backup.restore_plan(fresh.clone()).await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert!(!directory.exists(), "{says}: something was written");
        // As an earlier restore, or somebody, left it.
        std::fs::create_dir(&directory).unwrap();
        std::os::unix::fs::symlink(&outside, directory.join("a")).unwrap();
        let existing = Existing::Replace { spare: BTreeSet::new(), believe_cache: true };
        let error = backup.restore_plan(RestoreTarget { existing, ..fresh }).await.unwrap_err();
        assert!(error.to_string().contains(says), "{error}");
        assert!(directory.join("a").is_symlink(), "{says}");
        assert_eq!(outside.read_dir().unwrap().count(), 0, "{says}: something was written");
        std::fs::remove_dir_all(&directory).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_late_file_that_is_gone_fails_the_backup() {
    let bench = Bench::new().await;
    let tree = small_tree();
    let attempt = bench.begin(NOW_MS).await;
    let mut writer = attempt.write(WriteOptions::default()).unwrap();
    writer.copy(source(&tree), tree.entries().into_iter().map(Ok)).await.unwrap();
    let control = SourceEntry { content: None, ..SourceEntry::bytes("pg_control", 0o600, "gone") };
    let error = writer.finish(source(&tree), vec![control], facts()).await.unwrap_err();
    assert!(matches!(&error, Error::Source { path, .. } if path.contains("pg_control")), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_of_the_plain_text_is_in_the_store() {
    let bench = Bench::new().await;
    let secret = b"4111-1111-1111-1111 belongs to nobody";
    let tree =
        Tree::new().directory("confidential_name").file("confidential_name/t", secret.to_vec());
    tree.put("confidential_name/u", secret.repeat(5000), Some(8192));
    // Content that does not compress is stored as it is, but sealed.
    tree.put(
        "confidential_name/v",
        [noise(1, 40_000), secret.to_vec(), noise(2, 40_000)].concat(),
        None,
    );
    bench.back_up(&Arc::new(tree), NOW_MS).await;
    for path in common::files_below(&bench.store_path()) {
        let bytes = std::fs::read(&path).unwrap();
        for needle in [&secret[..16], b"confidential_name"] {
            assert!(
                !bytes.windows(needle.len()).any(|window| window == needle),
                "{}",
                path.display()
            );
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_refuses_what_is_not_its_own_and_takes_up_what_it_left() {
    let bench = Bench::new().await;
    let tree = small_tree();
    let summary = bench.back_up(&tree, NOW_MS).await;
    let other = bench.back_up(&tree, NOW_MS + 1).await;
    let backup = bench.open(&summary).await;
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("data");
    let target = RestoreTarget { directory: directory.clone(), ..RestoreTarget::default() };

    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join("mine"), "precious").unwrap();
    let error = backup.restore_plan(target.clone()).await.unwrap_err();
    assert_eq!(Failure::from(error).code, Code::TargetNotEmpty);
    assert_eq!(std::fs::read(directory.join("mine")).unwrap(), b"precious");
    std::fs::remove_file(directory.join("mine")).unwrap();

    // Something put there between plan and restore is not touched either.
    let plan = backup.restore_plan(target.clone()).await.unwrap();
    std::fs::write(directory.join("mine"), "precious").unwrap();
    let error = plan.restore(RestoreOptions::default()).await.unwrap_err();
    assert_eq!(Failure::from(error).code, Code::TargetNotEmpty);
    std::fs::remove_file(directory.join("mine")).unwrap();

    // Cancelled: the marker stays, and a second try goes on and finishes.
    let options = RestoreOptions::default();
    options.cancel.cancel();
    let plan = backup.restore_plan(target.clone()).await.unwrap();
    assert!(matches!(plan.restore(options).await.unwrap_err(), Error::Cancelled));
    let marker = directory.join("pgmuster-restore-incomplete");
    assert!(marker.exists());
    std::fs::create_dir(directory.join("d")).unwrap();
    std::fs::write(directory.join("d/a"), noise(8, 90_000)).unwrap();
    let foreign = bench.open(&other).await.restore_plan(target.clone()).await.unwrap_err();
    assert!(foreign.to_string().contains("another backup"), "{foreign}");
    std::fs::write(directory.join("d/mine"), "precious").unwrap();
    let mixed = backup.restore_plan(target.clone()).await.unwrap_err();
    assert!(mixed.to_string().contains("d/mine"), "{mixed}");
    std::fs::remove_file(directory.join("d/mine")).unwrap();
    let plan = backup.restore_plan(target.clone()).await.unwrap();
    assert!(plan.resumes);
    plan.restore(RestoreOptions::default()).await.unwrap();
    let mut restored = common::look(&directory);
    restored.retain(|path, _| !path.starts_with(b"late") && !path.starts_with(b"backup_label"));
    assert_eq!(restored, tree.expected());
    assert!(!marker.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restore_that_does_not_fit_is_refused_before_anything_is_written() {
    let bench = Bench::new().await;
    let tree = Tree::new();
    // A file of zeros costs nothing to store and everything to restore, as far as a plan can know.
    tree.put("zeros", vec![0; 1 << 20], None);
    let summary = bench.back_up(&Arc::new(tree), NOW_MS).await;
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("data");
    let target = RestoreTarget { directory: directory.clone(), ..RestoreTarget::default() };
    let mut plan = bench.open(&summary).await.restore_plan(target).await.unwrap();
    plan.places[0].available_bytes = 1 << 19;
    let error = plan.restore(RestoreOptions::default()).await.unwrap_err();
    assert!(matches!(error, Error::TargetFull { .. }), "{error}");
    assert!(!directory.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn proofs_are_numbered_and_stored_once() {
    let bench = Bench::new().await;
    let summary = bench.back_up(&small_tree(), NOW_MS).await;
    let add =
        |text: &'static str| bench.repository.add_proof(bench.lineage, summary.backup, text.into());
    assert_eq!(add("one").await.unwrap(), 1);
    assert_eq!(add("two").await.unwrap(), 2);
    assert_eq!(add("one").await.unwrap(), 1);
    let proofs = bench.repository.list_proofs(bench.lineage, summary.backup).await.unwrap();
    assert_eq!(proofs.iter().map(|proof| &proof.bytes[..]).collect::<Vec<_>>(), [b"one", b"two"]);
    assert_eq!(bench.repository.list_backups(bench.lineage).await.unwrap()[0].proofs, 2);
    let open = bench.begin(NOW_MS).await;
    bench.repository.add_proof(bench.lineage, open.id().into(), "x".into()).await.unwrap_err();
}

/// A store that does not answer the create of one name, having done it or not, and counts what is read at once.
#[derive(Debug)]
struct Deaf {
    inner: DirectoryStore,
    name: &'static str,
    does: bool,
    reading: AtomicUsize,
    most: AtomicUsize,
}

impl Deaf {
    fn over(place: &Path, name: &'static str, does: bool) -> Arc<Self> {
        let inner = DirectoryStore::new(place);
        let (reading, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
        Arc::new(Self { inner, name, does, reading, most })
    }
}

#[async_trait]
impl Layer for Deaf {
    fn inner(&self) -> &dyn Store {
        &self.inner
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        let reading = self.reading.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(reading, Ordering::SeqCst);
        // Whoever reads beside this one begins before any of them goes on.
        tokio::task::yield_now().await;
        let got = self.inner.get(key, limit_bytes).await;
        self.reading.fetch_sub(1, Ordering::SeqCst);
        got
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        let deaf = key.ends_with(self.name);
        if deaf && !self.does {
            return Err(unheard(key));
        }
        let outcome = self.inner.put_if_absent(key, bytes).await?;
        if deaf { Err(unheard(key)) } else { Ok(outcome) }
    }
}

fn unheard(key: &str) -> StoreError {
    StoreError::Unavailable {
        operation: "create",
        key: key.to_owned(),
        source: "no answer came".into(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_verdict_whose_answer_was_lost_is_read_and_otherwise_said_to_be_unknown() {
    let bench = Bench::new().await;
    for (does, at_ms) in [(true, NOW_MS), (false, NOW_MS + 1)] {
        let store = Deaf::over(&bench.store_path(), "/verdict", does);
        let repository = Repository::open(store, Some(&bench.key)).await.unwrap();
        let tree = small_tree();
        let intent = bench.intent(at_ms);
        let id = intent.attempt;
        let attempt = repository.begin(bench.lineage, intent).await.unwrap();
        let mut writer = attempt.write(WriteOptions::default()).unwrap();
        writer.copy(source(&tree), tree.entries().into_iter().map(Ok)).await.unwrap();
        let written = writer.finish(source(&tree), vec![], facts()).await.unwrap();
        let committed = written.commit(at_ms).await;
        if does {
            assert_eq!(committed.unwrap().backup, id.into());
        } else {
            let failure = Failure::from(committed.unwrap_err());
            assert_eq!(failure.code, Code::StoreUnavailable);
            assert!(failure.message.contains("COMMIT"), "{failure}");
            assert!(failure.message.contains("may stand"), "{failure}");
        }
    }
    assert_eq!(bench.repository.list_backups(bench.lineage).await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_key_is_in_hand_before_the_repository_is_in_its_store() {
    let place = tempfile::tempdir().unwrap();
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(place.path()));
    let new = Repository::prepare(Arc::clone(&store), options).unwrap();
    let other = Repository::prepare(Arc::clone(&store), options).unwrap();
    assert!(common::files_below(place.path()).is_empty(), "preparing writes nothing");
    let key: KeyFile = new.key_file.as_ref().unwrap().parse().unwrap();
    let sheet = new.recovery_sheet.to_string();
    let restore = format!("restore --repository 'file://{}' --key", place.path().display());
    assert!(sheet.contains(&restore) && sheet.contains(" --into /"), "{sheet}");
    assert!(!format!("{new:?}").contains("pgmuster-key-1"));

    let found = probe(store.as_ref()).await.unwrap();
    let id = new.id();
    let created = new.create(Some(found.clone())).await.unwrap();
    assert_eq!(created.probed(), Some(&found));
    let opened = Repository::open(Arc::clone(&store), Some(&key)).await.unwrap();
    assert_eq!((opened.id(), opened.probed()), (id, Some(&found)));

    let error = other.create(None).await.unwrap_err();
    assert!(matches!(error, Error::RepositoryExists { .. }), "{error}");
    assert_eq!(store.list("keys/").await.unwrap().len(), 1, "the loser leaves no key");
}

#[tokio::test]
async fn a_repository_whose_creation_was_not_answered_is_created() {
    for name in ["config", "keys/open"] {
        let place = tempfile::tempdir().unwrap();
        let store = Deaf::over(place.path(), name, true);
        let options = InitOptions { encryption: Encryption::Off, now_ms: NOW_MS };
        let created = Repository::init(store, options).await.unwrap();
        let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(place.path()));
        assert_eq!(Repository::open(store, None).await.unwrap().id(), created.repository.id());
    }
}

/// Without encryption the key has one name, so a creation that died behind it would be in the way for ever.
#[tokio::test]
async fn a_creation_that_died_is_repeated() {
    let place = tempfile::tempdir().unwrap();
    let options = InitOptions { encryption: Encryption::Off, now_ms: NOW_MS };
    let dies = Deaf::over(place.path(), "config", false);
    Repository::init(dies, options).await.unwrap_err();
    let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(place.path()));
    assert_eq!(store.list("").await.unwrap().len(), 1);
    let created = Repository::init(Arc::clone(&store), options).await.unwrap();
    created
        .repository
        .find_or_mint_lineage(&"orders".parse().unwrap(), SystemIdentifier(7), NOW_MS)
        .await
        .unwrap();
    let opened = Repository::open(store, None).await.unwrap();
    assert_eq!(opened.list_lineages().await.unwrap().len(), 1, "its notes are believed");
}

#[tokio::test]
async fn attempts_are_listed_in_order_with_their_notes_read_side_by_side() {
    let bench = Bench::new().await;
    let mut began = Vec::new();
    for n in 0..40 {
        began.push(bench.begin(NOW_MS + n).await.id());
    }
    let store = Deaf::over(&bench.store_path(), "nothing", true);
    let as_store: Arc<dyn Store> = Arc::<Deaf>::clone(&store);
    let repository = Repository::open(as_store, Some(&bench.key)).await.unwrap();
    let listed = repository.list_attempts(bench.lineage).await.unwrap();
    assert_eq!(listed.iter().map(|attempt| attempt.attempt).collect::<Vec<_>>(), began);
    assert!(listed.iter().all(|attempt| attempt.intent.is_some()));
    assert_eq!(store.most.load(Ordering::SeqCst), 16);
}
