//! kill -9, at every call of the store: of a backup, a restore, a check, a proof, a collection and a push of WAL, on a directory and on S3.
//!
//! The test starts itself as the process that dies. After each death every committed backup is whole, nothing counts as a
//! backup that was not committed, and the next one succeeds; in the end nothing is left behind.
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use crate::common::{self, DAY_MS, NOW_MS, Node, Tree, look, noise};
use crate::lab;
use async_trait::async_trait;
use bytes::Bytes;
use proto::wal::Segment;
use proto::{AttemptId, BackupId, LineageId, SystemIdentifier, Timeline, WalFileName};
use repository::store::layer::Layer;
use repository::store::{Credentials, Listed, PutOutcome, Store, StoreError, Upload};
use repository::{
    CheckOptions, CollectOptions, Collected, Encryption, Error, InitOptions, Intent, KeyFile,
    Repository, RestoreOptions, RestoreTarget, Wish, WriteOptions, store,
};
use rustix::process::{Signal, getpid, kill_process};
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

/// Where the process that dies finds its orders.
const ORDERS: &str = "PGMUSTER_TEST_KILLED";

/// What it does when it dies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
enum Work {
    Backup,
    Restore,
    Check,
    Proof,
    Collect,
    /// A segment, and then another content under its name.
    Push,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Orders {
    work: Work,
    /// Calls of the store that it lives to see answered.
    calls: i64,
    /// Tells apart what is backed up, and when.
    round: u64,
    url: String,
    key: String,
    lineage: LineageId,
    backup: Option<BackupId>,
    into: String,
}

/// A store whose user is killed at a call.
#[derive(Debug, Clone)]
struct Mortal {
    inner: Arc<dyn Store>,
    left: Arc<AtomicI64>,
}

impl Mortal {
    fn call(&self) {
        if self.left.fetch_sub(1, Ordering::SeqCst) <= 0 {
            kill_process(getpid(), Signal::KILL).unwrap();
            // The signal may need a moment; nothing may happen in it.
            loop {
                std::thread::park();
            }
        }
    }
}

#[async_trait]
impl Layer for Mortal {
    fn inner(&self) -> &dyn Store {
        self.inner.as_ref()
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.call();
        self.inner.get(key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.call();
        self.inner.get_range(key, range).await
    }
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.call();
        self.inner.size(key).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.call();
        self.inner.put(key, bytes).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        self.call();
        self.inner.put_if_absent(key, bytes).await
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.call();
        let inner = self.inner.upload(key).await?;
        Ok(Box::new(MortalUpload { inner, store: self.clone() }))
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.call();
        self.inner.list(prefix).await
    }
    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.call();
        self.inner.list_directories(prefix).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.call();
        self.inner.delete(key).await
    }
    async fn uploads(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.call();
        self.inner.uploads(prefix).await
    }
    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError> {
        self.call();
        self.inner.abort_uploads(keys).await
    }
}

struct MortalUpload {
    inner: Box<dyn Upload>,
    store: Mortal,
}

#[async_trait]
impl Upload for MortalUpload {
    async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.store.call();
        self.inner.part(bytes).await
    }
    async fn complete(self: Box<Self>) -> Result<(), StoreError> {
        self.store.call();
        self.inner.complete().await
    }
    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        self.store.call();
        self.inner.abort().await
    }
}

/// What is backed up in a round: some of it is new, some is what it was. Where a backup dies on S3, a pack of it takes several
/// parts.
fn tree(round: u64, url: &str) -> Arc<Tree> {
    let in_parts = url.starts_with("s3:") && url.contains("/backup");
    let new = if in_parts { 9 << 20 } else { 600_000 };
    let tree = Tree::new()
        .directory("base")
        .file("base/1", noise(round, new))
        .file("base/2", noise(7, 300_000))
        .file("base/3", vec![b'x'; 50_000]);
    tree.change("base/1", |file| file.mtime_ns += i64::try_from(round).unwrap() * common::SECOND);
    Arc::new(tree)
}

/// What its restore looks like.
fn expected(round: u64, url: &str) -> BTreeMap<Vec<u8>, Node> {
    let mut nodes = tree(round, url).expected();
    nodes.insert(b"backup_label".into(), Node::File(b"START WAL LOCATION: 0/1000000".into()));
    nodes.insert(b"late_control".into(), Node::File(noise(1, 8192)));
    nodes
}

/// What a server archives in a round: the segment behind the one of the round before.
fn segment(round: u64) -> (WalFileName, Bytes) {
    let name = Segment { timeline: Timeline(1), number: round }.name(1 << 20);
    (WalFileName::Segment(name), noise(round, 1 << 20).into())
}

fn at_ms(round: u64) -> i64 {
    NOW_MS + i64::try_from(round).unwrap() * 60_000
}

fn intent(round: u64, follows: Option<AttemptId>) -> Intent {
    let at_ms = at_ms(round);
    let attempt = AttemptId::mint(u64::try_from(at_ms).unwrap(), [3; 10]);
    Intent { attempt, follows, by: "worker-1".into(), began_at_ms: at_ms }
}

/// As many checkpoints as there can be.
fn write_options() -> WriteOptions {
    let checkpoint_every = Duration::ZERO;
    WriteOptions { continuity: Some("here".into()), checkpoint_every, ..WriteOptions::default() }
}

/// Two days on: what was given up goes, and what is open is dead.
fn collect_options(round: u64) -> CollectOptions {
    CollectOptions {
        by: "tester".into(),
        now_ms: at_ms(round) + 3 * DAY_MS,
        grace_ms: DAY_MS,
        patience_ms: Some(2 * DAY_MS),
        pins_for_ms: 7 * DAY_MS,
        // What was killed is known to be dead.
        lists_for_ms: Some(0),
        cancel: CancellationToken::new(),
    }
}

async fn open(url: &str, key: &str, calls: i64) -> Repository {
    let credentials = Credentials {
        access_key_id: Some("AK".into()),
        secret_access_key: Some("SKSKSKSK".into()),
        ..Credentials::default()
    };
    let inner = store::open(url, &credentials).await.unwrap();
    let key: KeyFile = key.parse().unwrap();
    let mortal = Mortal { inner, left: Arc::new(calls.into()) };
    Repository::open(Arc::new(mortal), Some(&key)).await.unwrap()
}

async fn restore(repository: &Repository, lineage: LineageId, backup: BackupId, into: &Path) {
    let backup = repository.open_backup(lineage, backup).await.unwrap();
    let directory = into.to_owned();
    let target = RestoreTarget { directory, ..RestoreTarget::default() };
    let plan = backup.restore_plan(target).await.unwrap();
    plan.restore(RestoreOptions::default()).await.unwrap();
}

/// The process that dies.
async fn obey(orders: Orders) {
    let repository = open(&orders.url, &orders.key, orders.calls).await;
    let lineage = orders.lineage;
    let backup = || orders.backup.unwrap();
    match orders.work {
        Work::Backup => {
            let (intent, tree) = (intent(orders.round, None), tree(orders.round, &orders.url));
            common::back_up(&repository, lineage, intent, &tree, write_options()).await.unwrap();
        }
        Work::Restore => restore(&repository, lineage, backup(), Path::new(&orders.into)).await,
        Work::Check => {
            let opened = repository.open_backup(lineage, backup()).await.unwrap();
            assert!(opened.check_inventory().await.unwrap().is_sound());
            assert!(opened.check_decrypt(CheckOptions::default()).await.unwrap().is_sound());
        }
        Work::Proof => {
            let proof = Bytes::from(format!("proof of round {}", orders.round));
            repository.add_proof(lineage, backup(), proof).await.unwrap();
        }
        Work::Collect => {
            let options = collect_options(orders.round);
            let plan = repository.plan_collection(lineage, &options).await.unwrap();
            assert!(matches!(plan.collect(&options).await.unwrap(), Collected::Done(_)));
        }
        Work::Push => {
            let (file, content) = segment(orders.round);
            repository.store_wal(lineage, &file, content).await.unwrap();
            let (_, other) = segment(orders.round + 1);
            let refused = repository.store_wal(lineage, &file, other).await.unwrap_err();
            assert!(matches!(refused, Error::WalConflict { .. }), "{refused}");
        }
    }
}

/// How the process ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Killed,
    Done,
}

/// Runs this very test as the process that dies.
fn run(orders: &Orders, test: &str) -> End {
    let done = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("killed::{test}"), "--nocapture"])
        .env(ORDERS, serde_json::to_string(orders).unwrap())
        .output()
        .unwrap();
    match (done.status.success(), done.status.signal()) {
        (true, _) => End::Done,
        (false, Some(9)) => End::Killed,
        _ => panic!("{orders:?}: {}\n{}", done.status, String::from_utf8_lossy(&done.stdout)),
    }
}

/// A repository, what is known to be in it, and the next round.
struct Story {
    test: &'static str,
    url: String,
    key: String,
    repository: Repository,
    lineage: LineageId,
    /// The rounds whose backups are committed, and their backups.
    committed: Vec<(u64, BackupId)>,
    round: u64,
    /// How often a process was killed.
    deaths: usize,
    /// What backups took over from those that were killed.
    taken_over: u64,
    place: tempfile::TempDir,
}

impl Story {
    async fn begin(test: &'static str, url: String) -> Self {
        let credentials = Credentials {
            access_key_id: Some("AK".into()),
            secret_access_key: Some("SKSKSKSK".into()),
            ..Credentials::default()
        };
        let store = store::open(&url, &credentials).await.unwrap();
        let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
        let created = Repository::init(store, options).await.unwrap();
        let repository = created.repository;
        let cluster = "orders".parse().unwrap();
        let identity =
            repository.find_or_mint_lineage(&cluster, SystemIdentifier(7), NOW_MS).await.unwrap();
        Self {
            test,
            url,
            key: created.key_file.unwrap().to_string(),
            repository,
            lineage: identity.lineage,
            committed: Vec::new(),
            round: 0,
            deaths: 0,
            taken_over: 0,
            place: tempfile::tempdir().unwrap(),
        }
    }

    fn orders(&self, work: Work, calls: i64) -> Orders {
        Orders {
            work,
            calls,
            round: self.round,
            url: self.url.clone(),
            key: self.key.clone(),
            lineage: self.lineage,
            backup: self.committed.last().map(|(_, backup)| *backup),
            into: self.place.path().join("restored").display().to_string(),
        }
    }

    async fn die(&mut self, work: Work, calls: i64) -> End {
        let (orders, test) = (self.orders(work, calls), self.test);
        let end = tokio::task::spawn_blocking(move || run(&orders, test)).await.unwrap();
        self.deaths += usize::from(end == End::Killed);
        end
    }

    /// A backup by a process that lives, of the round that follows.
    async fn back_up(&mut self, follows: Option<AttemptId>) {
        self.round += 1;
        self.back_up_tree_of(self.round, follows).await;
    }

    /// The same of what there was to be backed up in an earlier round.
    async fn back_up_tree_of(&mut self, round: u64, follows: Option<AttemptId>) {
        let (intent, tree) = (intent(self.round, follows), tree(round, &self.url));
        let options = write_options();
        let progress = Arc::clone(&options.progress);
        let done = common::back_up(&self.repository, self.lineage, intent, &tree, options).await;
        self.committed.push((round, done.unwrap().backup));
        self.taken_over += progress.snapshot().bytes_taken_over;
    }

    async fn backups(&self) -> Vec<BackupId> {
        let listed = self.repository.list_backups(self.lineage).await.unwrap();
        listed.iter().filter_map(repository::AttemptSummary::backup).collect()
    }

    /// What is said to be there is there, is all of it, and the newest comes back as it was.
    async fn is_whole(&self, moment: &str) {
        let known: Vec<BackupId> = self.committed.iter().map(|(_, backup)| *backup).collect();
        assert_eq!(self.backups().await, known, "{moment}");
        for backup in &known {
            let opened = self.repository.open_backup(self.lineage, *backup).await.unwrap();
            let found = opened.check_inventory().await.unwrap();
            assert!(found.is_sound(), "{moment}: {found:?}");
        }
        let (round, newest) = *self.committed.last().unwrap();
        let into = self.place.path().join("looked");
        restore(&self.repository, self.lineage, newest, &into).await;
        assert!(look(&into) == expected(round, &self.url), "{moment}: another content");
        std::fs::remove_dir_all(&into).unwrap();
    }

    /// A backup dies at a call; the next one, of the same files, follows it. `false` when it lived.
    async fn a_backup_dies(&mut self, calls: i64) -> bool {
        self.back_up(None).await;
        self.round += 1;
        let (round, dead) = (self.round, intent(self.round, None).attempt);
        let end = self.die(Work::Backup, calls).await;
        if self.backups().await.contains(&dead.into()) {
            self.committed.push((round, dead.into()));
        } else {
            assert_eq!(end, End::Killed, "a backup that said it was done is not there");
        }
        self.is_whole(&format!("backup killed at call {calls}")).await;
        self.round += 1;
        self.back_up_tree_of(round, Some(dead)).await;
        self.is_whole(&format!("after a backup that was killed at call {calls}")).await;
        end == End::Killed
    }

    async fn restores_die(&mut self) {
        let (round, _) = *self.committed.last().unwrap();
        let into = self.place.path().join("restored");
        for calls in 0.. {
            let end = self.die(Work::Restore, calls).await;
            if end == End::Done {
                assert!(
                    look(&into) == expected(round, &self.url),
                    "killed {calls} times, and then restored"
                );
                return;
            }
            let there = if into.exists() { look(&into) } else { BTreeMap::new() };
            let marked = there.contains_key(&b"pgmuster-restore-incomplete"[..]);
            assert!(marked || there.is_empty(), "killed at call {calls}: it looks finished");
        }
    }

    /// Work that changes nothing, or adds one object, is repeated until it lives.
    async fn others_die(&mut self, work: Work) {
        for calls in 0.. {
            if self.die(work, calls).await == End::Done {
                self.is_whole(&format!("{work:?}, killed {calls} times")).await;
                return;
            }
        }
    }

    /// A push dies at every call, and the server asks again, for this segment and then for the next one.
    async fn pushes_die(&mut self) {
        for calls in 0.. {
            self.round += 1;
            let (file, content) = segment(self.round);
            let end = self.die(Work::Push, calls).await;
            let fetch = async || self.repository.fetch_wal(self.lineage, &file).await.unwrap();
            let there = fetch().await;
            let is_half = there.as_ref().is_some_and(|there| *there != content);
            assert!(!is_half && (end == End::Killed || there.is_some()), "killed at call {calls}");
            self.repository.store_wal(self.lineage, &file, content.clone()).await.unwrap();
            assert!(fetch().await == Some(content), "pushed again after call {calls}");
            let inventory = self.repository.list_wal(self.lineage).await.unwrap();
            assert_eq!(inventory.timelines[&Timeline(1)].runs.len(), 1, "{inventory:?}");
            if end == End::Done {
                assert!(inventory.conflicts.contains(&file), "{inventory:?}");
                return;
            }
        }
    }

    async fn give_up_the_oldest(&mut self) {
        let (_, oldest) = self.committed.remove(0);
        let wish = Wish { by: "tester".into(), why: String::new(), at_ms: at_ms(self.round) };
        self.repository.forget(self.lineage, oldest, &wish).await.unwrap();
    }

    /// A collection dies at a call. `false` when it lived.
    async fn a_collection_dies(&mut self, calls: i64) -> bool {
        for _ in 0..3 {
            self.back_up(None).await;
        }
        self.give_up_the_oldest().await;
        let end = self.die(Work::Collect, calls).await;
        // What was given up may be gone or not; what is wanted is there.
        let there = self.backups().await;
        for (_, backup) in &self.committed {
            assert!(there.contains(backup), "collection killed at call {calls}");
            let opened = self.repository.open_backup(self.lineage, *backup).await.unwrap();
            let found = opened.check_inventory().await.unwrap();
            assert!(found.is_sound(), "collection killed at call {calls}: {found:?}");
        }
        end == End::Killed
    }

    async fn collect(&self) {
        let options = collect_options(self.round);
        for _ in 0..2 {
            let plan = self.repository.plan_collection(self.lineage, &options).await.unwrap();
            let done = plan.collect(&options).await.unwrap();
            assert!(!matches!(done, Collected::Postponed { .. }), "{done:?}");
        }
    }

    /// Only what belongs to backups is in the store, and every frame of it opens.
    async fn nothing_is_left_behind(&self) {
        let mut needed = 0;
        let store = self.repository.store();
        for backup in self.backups().await {
            let opened = self.repository.open_backup(self.lineage, backup).await.unwrap();
            let found = opened.check_decrypt(CheckOptions::default()).await.unwrap();
            assert!(found.is_sound(), "{found:?}");
            needed = needed.max(opened.counts().packs);
        }
        let prefix = format!("lineages/{}/", self.lineage);
        let listed = store.list(&prefix).await.unwrap();
        let below = |name: &str| listed.iter().filter(|row| row.key.contains(name)).count();
        assert_eq!(below("/gc/"), 0, "lists of dead collectors: {listed:?}");
        assert_eq!(below("/checkpoint."), 0, "checkpoints of dead writers: {listed:?}");
        assert_eq!(store.uploads("").await.unwrap(), [""; 0], "unfinished uploads");
        let options = collect_options(self.round);
        let plan = self.repository.plan_collection(self.lineage, &options).await.unwrap();
        assert_eq!(plan.delete.packs, 0, "packs that nobody needs");
        assert_eq!(below("/packs/") as u64, plan.keep.packs);
        assert!(needed > 0);
    }

    /// The next collector finishes what others left.
    async fn ends_clean(&self) {
        self.collect().await;
        self.is_whole("after a collection").await;
        self.nothing_is_left_behind().await;
    }
}

/// Kills everything everywhere. `place` gives the URL of a new repository by its name.
async fn tell(test: &'static str, place: impl Fn(&str) -> String) {
    let (mut deaths, mut took_over) = (0, 0);
    for calls in 0.. {
        let mut story = Story::begin(test, place(&format!("backup{calls}"))).await;
        let died = story.a_backup_dies(calls).await;
        story.give_up_the_oldest().await;
        story.ends_clean().await;
        deaths += story.deaths;
        took_over += usize::from(story.taken_over > 0);
        if !died {
            break;
        }
    }
    // Those that died when everything was stored, and before the verdict.
    assert!(took_over > 3, "only {took_over} backups took something over");
    for calls in 0.. {
        let mut story = Story::begin(test, place(&format!("collection{calls}"))).await;
        let died = story.a_collection_dies(calls).await;
        story.ends_clean().await;
        deaths += story.deaths;
        if !died {
            break;
        }
    }
    let mut story = Story::begin(test, place("others")).await;
    story.back_up(None).await;
    story.restores_die().await;
    story.others_die(Work::Check).await;
    story.others_die(Work::Proof).await;
    story.ends_clean().await;
    deaths += story.deaths;
    let mut story = Story::begin(test, place("pushes")).await;
    story.pushes_die().await;
    deaths += story.deaths;
    assert!(deaths >= 40, "only {deaths} deaths");
}

/// The orders of this process, when it is the one that dies.
#[expect(clippy::disallowed_methods, reason = "orders come through the environment")]
fn orders() -> Option<Orders> {
    std::env::var(ORDERS).ok().map(|text| serde_json::from_str(&text).unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_any_call_of_a_directory_loses_and_invents_nothing() {
    if let Some(orders) = orders() {
        return obey(orders).await;
    }
    let place = tempfile::tempdir().unwrap();
    let url = |name: &str| format!("file://{}/{name}", place.path().display());
    tell("kill_9_at_any_call_of_a_directory_loses_and_invents_nothing", url).await;
    for repository in std::fs::read_dir(place.path()).unwrap() {
        let uploads = repository.unwrap().path().join(".uploads");
        assert!(!uploads.exists(), "files of dead writers: {}", uploads.display());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn kill_9_at_any_call_of_s3_loses_and_invents_nothing() {
    if let Some(orders) = orders() {
        return obey(orders).await;
    }
    let options = lab::bucket("killed").await;
    let (bucket, endpoint) = (options.bucket, lab::endpoint());
    let url = |name: &str| {
        format!("s3://{bucket}/{name}?endpoint={endpoint}&region=us-east-1&path-style=true")
    };
    tell("kill_9_at_any_call_of_s3_loses_and_invents_nothing", url).await;
}
