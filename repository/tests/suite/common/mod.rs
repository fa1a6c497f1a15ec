//! What the tests of this crate share: sources in memory, repositories in temporary directories, a look at trees.
//!
//! Nothing here stands in for the repository: stores are real directories, and what is restored is read from disk.

#![expect(unreachable_pub, reason = "what tests share")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]
#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::option_option,
    reason = "small numbers chosen here; a file is as scanned, gone, or something else"
)]

pub mod dumps;

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use proto::{AttemptId, BackupFacts, LineageId, Lsn, SystemIdentifier, Timeline};
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::{
    Attempt, Backup, BackupSummary, CollectOptions, CopyOptions, Encryption, Error, InitOptions,
    Intent, KeyFile, Repository, RestoreOptions, RestoreTarget, Source, SourceEntry, SourceFile,
    SourceKind, WriteOptions, path_order,
};
use tokio_util::sync::CancellationToken;

pub const SECOND: i64 = 1_000_000_000;
pub const NOW_MS: i64 = 1_700_000_000_000;
pub const DAY_MS: i64 = 24 * 3600 * 1000;

/// A collection by people who are patient for a day, and for two with what is being written.
pub fn collect_options(now_ms: i64) -> CollectOptions {
    CollectOptions {
        by: "tester".into(),
        now_ms,
        grace_ms: DAY_MS,
        patience_ms: Some(2 * DAY_MS),
        pins_for_ms: 7 * DAY_MS,
        lists_for_ms: None,
        cancel: CancellationToken::new(),
    }
}

/// A copy in two threads.
pub fn copy_options(now_ms: i64) -> CopyOptions {
    CopyOptions {
        by: "copier".into(),
        now_ms,
        processes: 2,
        progress: Arc::default(),
        cancel: CancellationToken::new(),
    }
}

/// One file of a [`Tree`].
#[derive(Debug, Clone)]
pub struct TestFile {
    pub content: Vec<u8>,
    pub mtime_ns: i64,
    pub inode: u64,
    pub block_size: Option<u32>,
    /// What the reader finds instead of the content, when that differs from the scan.
    pub at_read: Option<Option<Vec<u8>>>,
    /// When it was changed as told to whoever reads it, which may be after the scan; `None` where nobody tells.
    pub changed_at_read_ns: Option<i64>,
    /// What is known of its changes.
    pub changes: Option<Vec<Range<u64>>>,
}

/// A source in memory that counts what is read from it.
#[derive(Debug, Default)]
pub struct Tree {
    pub directories: Vec<Vec<u8>>,
    pub links: Vec<(Vec<u8>, Vec<u8>)>,
    pub files: Mutex<BTreeMap<Vec<u8>, TestFile>>,
    pub reads: AtomicU64,
    pub opened: Mutex<Vec<Vec<u8>>>,
    /// What was to be read next, said before it was.
    pub advised: Mutex<Vec<(Vec<u8>, Range<u64>)>>,
    pub scanned_at_ns: i64,
    pub fail_at: Option<Vec<u8>>,
}

impl Tree {
    pub fn new() -> Self {
        Self { scanned_at_ns: 1000 * SECOND, ..Self::default() }
    }

    pub fn directory(mut self, path: &str) -> Self {
        self.directories.push(path.into());
        self
    }

    pub fn file(self, path: impl Into<Vec<u8>>, content: impl Into<Vec<u8>>) -> Self {
        self.put(path, content, Some(8192));
        self
    }

    pub fn put(
        &self,
        path: impl Into<Vec<u8>>,
        content: impl Into<Vec<u8>>,
        block_size: Option<u32>,
    ) {
        let path = path.into();
        let inode =
            path.iter().fold(7, |inode, byte| (inode * 31 + u64::from(*byte)) & 0xffff_ffff);
        let file = TestFile {
            content: content.into(),
            mtime_ns: SECOND,
            inode,
            block_size,
            at_read: None,
            changed_at_read_ns: None,
            changes: None,
        };
        self.files.lock().unwrap().insert(path, file);
    }

    pub fn change(&self, path: &str, change: impl FnOnce(&mut TestFile)) {
        change(self.files.lock().unwrap().get_mut(path.as_bytes()).unwrap());
    }

    /// Changes content and stamps, as a write does.
    pub fn write(&self, path: &str, at: usize, bytes: &[u8]) {
        self.change(path, |file| {
            file.content[at..at + bytes.len()].copy_from_slice(bytes);
            file.mtime_ns += SECOND;
        });
    }

    pub fn entries(&self) -> Vec<SourceEntry> {
        let mut entries: Vec<SourceEntry> = self
            .directories
            .iter()
            .map(|path| SourceEntry::directory(path.clone(), 0o700))
            .collect();
        for (path, target) in &self.links {
            entries.push(SourceEntry::symlink(path.clone(), target.clone()));
        }
        for (path, file) in self.files.lock().unwrap().iter() {
            entries.push(SourceEntry {
                path: path.clone(),
                kind: SourceKind::File,
                mode: 0o600,
                size_bytes: file.content.len() as u64,
                mtime_ns: file.mtime_ns,
                ctime_ns: file.mtime_ns,
                inode: file.inode,
                device: 1,
                scanned_at_ns: self.scanned_at_ns,
                block_size: file.block_size,
                content: None,
                changes: file.changes.clone(),
            });
        }
        entries.sort_by(|a, b| path_order(&a.path, &b.path));
        entries
    }

    pub fn bytes_read(&self) -> u64 {
        self.reads.swap(0, Ordering::Relaxed)
    }

    /// What a restore of it must look like.
    pub fn expected(&self) -> BTreeMap<Vec<u8>, Node> {
        let mut nodes = BTreeMap::new();
        for path in &self.directories {
            nodes.insert(path.clone(), Node::Directory);
        }
        for (path, target) in &self.links {
            nodes.insert(path.clone(), Node::Link(target.clone()));
        }
        for (path, file) in self.files.lock().unwrap().iter() {
            match &file.at_read {
                None => nodes.insert(path.clone(), Node::File(file.content.clone())),
                Some(None) => None,
                Some(Some(other)) => {
                    let length = other.len().min(file.content.len());
                    nodes.insert(path.clone(), Node::File(other[..length].to_vec()))
                }
            };
        }
        nodes
    }
}

pub struct SharedTree(pub Arc<Tree>);

impl Source for SharedTree {
    fn open(&self, entry: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        let tree = &self.0;
        tree.opened.lock().unwrap().push(entry.path.clone());
        if tree.fail_at.as_ref() == Some(&entry.path) {
            return Err(io::Error::other("the disk is broken"));
        }
        let files = tree.files.lock().unwrap();
        let Some(file) = files.get(&entry.path) else { return Ok(None) };
        if file.at_read == Some(None) {
            return Ok(None);
        }
        Ok(Some(Box::new(OpenFile { path: entry.path.clone(), tree: Arc::clone(tree) })))
    }
}

struct OpenFile {
    path: Vec<u8>,
    tree: Arc<Tree>,
}

impl SourceFile for OpenFile {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let files = self.tree.files.lock().unwrap();
        let file = &files[&self.path];
        // Whoever judges pages must be given whole ones.
        let (block, end) = (file.block_size.unwrap_or(1) as usize, offset as usize + buffer.len());
        assert!((offset as usize).is_multiple_of(block), "inside a page: {offset}");
        assert!(end.is_multiple_of(block) || end >= file.content.len(), "inside a page: {end}");
        let content = file.at_read.as_ref().and_then(Option::as_ref).unwrap_or(&file.content);
        let rest = content.get(offset as usize..).unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        self.tree.reads.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }

    fn advise(&mut self, offset: u64, length: u64) {
        let said = (self.path.clone(), offset..offset + length);
        self.tree.advised.lock().unwrap().push(said);
    }

    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        let changed = self.tree.files.lock().unwrap()[&self.path].changed_at_read_ns?;
        Some((changed, changed))
    }
}

/// A name in a restored tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Node {
    Directory,
    File(Vec<u8>),
    Link(Vec<u8>),
}

/// Reads a directory as it is on disk.
pub fn look(root: &Path) -> BTreeMap<Vec<u8>, Node> {
    use std::os::unix::ffi::OsStrExt;
    fn walk(at: &Path, root: &Path, nodes: &mut BTreeMap<Vec<u8>, Node>) {
        for entry in std::fs::read_dir(at).unwrap() {
            let entry = entry.unwrap();
            let path = entry.path();
            let name = path.strip_prefix(root).unwrap().as_os_str().as_bytes().to_vec();
            let kind = entry.file_type().unwrap();
            if kind.is_dir() {
                nodes.insert(name, Node::Directory);
                walk(&path, root, nodes);
            } else if kind.is_symlink() {
                nodes.insert(
                    name,
                    Node::Link(std::fs::read_link(&path).unwrap().as_os_str().as_bytes().to_vec()),
                );
            } else {
                nodes.insert(name, Node::File(std::fs::read(&path).unwrap()));
            }
        }
    }
    let mut nodes = BTreeMap::new();
    walk(root, root, &mut nodes);
    nodes
}

/// Bytes that do not compress, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.finalize_xof().fill(&mut bytes);
    bytes
}

pub fn facts() -> BackupFacts {
    BackupFacts {
        cluster: "orders".parse().unwrap(),
        system_identifier: SystemIdentifier(7),
        server_version_num: 150_018,
        catalog_version: 202_209_061,
        block_size: 8192,
        wal_segment_size: 16 << 20,
        data_checksums: true,
        timeline: Timeline(1),
        start_lsn: Lsn(0x100_0000),
        stop_lsn: Lsn(0x200_0000),
        started_at_ms: NOW_MS,
        stopped_at_ms: NOW_MS + 1000,
        backup_label: "START WAL LOCATION: 0/1000000".into(),
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        settings: Vec::new(),
        census: None,
        bad_pages: Vec::new(),
        reading: None,
        logical: None,
    }
}

/// A repository in a temporary directory with one lineage.
pub struct Bench {
    pub directory: tempfile::TempDir,
    pub repository: Repository,
    pub key: KeyFile,
    pub key_text: String,
    pub lineage: LineageId,
    next: AtomicU64,
}

impl Bench {
    pub async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> =
            Arc::new(DirectoryStore::new(directory.path().join("repository")));
        Self::over(directory, store).await
    }

    pub async fn over(directory: tempfile::TempDir, store: Arc<dyn Store>) -> Self {
        let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
        let created = Repository::init(store, options).await.unwrap();
        let key_text = created.key_file.unwrap().to_string();
        let key = key_text.parse().unwrap();
        let repository = created.repository;
        let identity = repository
            .find_or_mint_lineage(&"orders".parse().unwrap(), SystemIdentifier(7), NOW_MS)
            .await
            .unwrap();
        let next = AtomicU64::new(0);
        Self { directory, repository, key, key_text, lineage: identity.lineage, next }
    }

    /// Another program on the same repository.
    pub async fn beside(&self) -> Self {
        let store: Arc<dyn Store> = Arc::new(DirectoryStore::new(self.store_path()));
        Self {
            directory: tempfile::tempdir().unwrap(),
            repository: Repository::open(store, Some(&self.key)).await.unwrap(),
            key: self.key_text.parse().unwrap(),
            key_text: self.key_text.clone(),
            lineage: self.lineage,
            next: AtomicU64::new(100),
        }
    }

    /// A copy of the repository in another place, which goes on with the same names.
    pub async fn forked(&self) -> Self {
        self.forked_over(|to| Arc::new(DirectoryStore::new(to))).await
    }

    /// The same, reached through another store.
    pub async fn forked_over(&self, store: impl FnOnce(&Path) -> Arc<dyn Store>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let to = directory.path().join("repository");
        for file in files_below(&self.store_path()) {
            let copy = to.join(file.strip_prefix(self.store_path()).unwrap());
            std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
            std::fs::copy(&file, copy).unwrap();
        }
        let store = store(&to);
        Self {
            directory,
            repository: Repository::open(store, Some(&self.key)).await.unwrap(),
            key: self.key_text.parse().unwrap(),
            key_text: self.key_text.clone(),
            lineage: self.lineage,
            next: self.next.load(Ordering::Relaxed).into(),
        }
    }

    pub fn store_path(&self) -> std::path::PathBuf {
        self.directory.path().join("repository")
    }

    pub fn intent(&self, at_ms: i64) -> Intent {
        let n = self.next.fetch_add(1, Ordering::Relaxed);
        let attempt = AttemptId::mint(at_ms as u64 + n, [n as u8; 10]);
        Intent { attempt, follows: None, by: "worker-1".into(), began_at_ms: at_ms }
    }

    pub async fn begin(&self, at_ms: i64) -> Attempt {
        self.repository.begin(self.lineage, self.intent(at_ms)).await.unwrap()
    }

    pub async fn back_up(&self, tree: &Arc<Tree>, at_ms: i64) -> BackupSummary {
        self.back_up_with(
            tree,
            at_ms,
            WriteOptions { continuity: Some("here".into()), ..WriteOptions::default() },
        )
        .await
        .unwrap()
    }

    pub async fn back_up_with(
        &self,
        tree: &Arc<Tree>,
        at_ms: i64,
        options: WriteOptions,
    ) -> Result<BackupSummary, Error> {
        back_up(&self.repository, self.lineage, self.intent(at_ms), tree, options).await
    }

    /// A small backup that begins in a segment, segments being 1 MiB, and ends with the one behind it.
    pub async fn back_up_from(&self, timeline: u32, segment: u64, at_ms: i64) -> BackupSummary {
        let tree = Arc::new(Tree::new().file("a", noise(segment, 10_000)));
        let facts = BackupFacts {
            wal_segment_size: 1 << 20,
            timeline: Timeline(timeline),
            start_lsn: Lsn((segment << 20) + 0x28),
            stop_lsn: Lsn((segment + 2) << 20),
            ..facts()
        };
        let options = WriteOptions { continuity: Some("here".into()), ..WriteOptions::default() };
        let (repository, lineage) = (&self.repository, self.lineage);
        let done =
            back_up_that_says(repository, lineage, self.intent(at_ms), &tree, options, facts).await;
        done.unwrap()
    }

    /// Archives segments of 1 MiB; each has the content that [`segment`] says.
    pub async fn archive(&self, timeline: u32, numbers: std::ops::RangeInclusive<u64>) {
        for number in numbers {
            self.archive_one(&wal_name(timeline, number), segment(timeline, number)).await.unwrap();
        }
    }

    pub async fn archive_one(
        &self,
        name: &str,
        content: bytes::Bytes,
    ) -> Result<repository::WalStored, Error> {
        self.repository.store_wal(self.lineage, &name.parse().unwrap(), content).await
    }

    pub async fn open(&self, summary: &BackupSummary) -> Backup {
        self.repository.open_backup(self.lineage, summary.backup).await.unwrap()
    }

    /// Restores and returns what is on disk, the late files left out after they were looked at.
    pub async fn restore(&self, summary: &BackupSummary) -> BTreeMap<Vec<u8>, Node> {
        let mut nodes = restore(&self.open(summary).await).await.unwrap();
        assert_eq!(
            nodes.remove(&b"backup_label"[..]),
            Some(Node::File(b"START WAL LOCATION: 0/1000000".to_vec()))
        );
        assert_eq!(nodes.remove(&b"late_control"[..]), Some(Node::File(noise(1, 8192))));
        nodes
    }
}

/// The name of a segment of 1 MiB.
pub fn wal_name(timeline: u32, number: u64) -> String {
    proto::wal::Segment { timeline: Timeline(timeline), number }.file_name(1 << 20)
}

/// What is archived under that name.
pub fn segment(timeline: u32, number: u64) -> bytes::Bytes {
    let mut bytes = vec![0; 1 << 20];
    bytes[..12].copy_from_slice(&[&timeline.to_be_bytes()[..], &number.to_be_bytes()].concat());
    bytes.into()
}

/// A whole backup, with WAL and late files.
pub async fn back_up(
    repository: &Repository,
    lineage: LineageId,
    intent: Intent,
    tree: &Arc<Tree>,
    options: WriteOptions,
) -> Result<BackupSummary, Error> {
    back_up_that_says(repository, lineage, intent, tree, options, facts()).await
}

/// The same with other facts.
pub async fn back_up_that_says(
    repository: &Repository,
    lineage: LineageId,
    intent: Intent,
    tree: &Arc<Tree>,
    options: WriteOptions,
    facts: BackupFacts,
) -> Result<BackupSummary, Error> {
    let committed_at_ms = intent.began_at_ms + 1000;
    let attempt = repository.begin(lineage, intent).await?;
    let mut writer = attempt.write(options)?;
    let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(tree)));
    writer.copy(Arc::clone(&source), tree.entries().into_iter().map(Ok)).await?;
    writer.wal().add("000000010000000000000001", io::Cursor::new(noise(99, 100_000))).await?;
    let late = vec![
        SourceEntry::bytes("backup_label", 0o600, "START WAL LOCATION: 0/1000000"),
        SourceEntry::bytes("late_control", 0o600, noise(1, 8192)),
    ];
    let written = writer.finish(source, late, facts).await?;
    written.commit(committed_at_ms).await
}

pub async fn restore(backup: &Backup) -> Result<BTreeMap<Vec<u8>, Node>, Error> {
    let target = tempfile::tempdir().unwrap();
    let directory = target.path().join("data");
    let plan = backup
        .restore_plan(RestoreTarget { directory: directory.clone(), ..RestoreTarget::default() })
        .await?;
    plan.restore(RestoreOptions::default()).await?;
    Ok(look(&directory))
}

/// Every file below a directory.
pub fn files_below(root: &Path) -> Vec<std::path::PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let mut files: Vec<_> = look(root)
        .into_iter()
        .filter(|(_, node)| matches!(node, Node::File(_)))
        .map(|(path, _)| root.join(std::ffi::OsStr::from_bytes(&path)))
        .collect();
    files.sort();
    files
}
