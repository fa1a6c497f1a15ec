//! Opening a committed backup and reading its metadata: shards and detection hashes. File content is fetched by `restore`.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::{BackupFacts, BackupId, LineageId};

use crate::again::again;
use crate::entry::{Body, Entry, Extent};
use crate::error::Error;
use crate::hex;
use crate::key::Keys;
use crate::layout;
use crate::limits::MANIFEST_BYTES_MAX;
use crate::lineage::NOTES_IN_FLIGHT;
use crate::manifest::{Counts, Packs, Root};
use crate::pack::{FrameRef, ObjectType, PackCipher, PackId, PackRecord, digest_of};
use crate::record::{Outcome, Verdict};
use crate::repository::Repository;
use crate::shard::{self, ShardRef};
use crate::store::Store;
use crate::wire::Malformed;

/// A committed backup whose manifest was read and checked.
#[derive(Debug, Clone)]
pub struct Backup {
    pub(crate) repository: Repository,
    pub(crate) root: Arc<Root>,
    pub(crate) reader: Arc<MetadataReader>,
}

/// A WAL segment or history file that a backup brought along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalFile {
    /// Its file name.
    pub name: String,
    /// Its size.
    pub size_bytes: u64,
}

impl Repository {
    /// Opens a committed backup: its verdict, and the manifest that the verdict means.
    pub async fn open_backup(&self, lineage: LineageId, backup: BackupId) -> Result<Backup, Error> {
        match self.verdict(lineage, backup.into()).await? {
            Some(verdict) => self.open_committed(lineage, &verdict).await,
            None => Err(Error::BackupUnknown { lineage, backup }),
        }
    }

    /// What several committed backups say of themselves, in the order given: a few manifests are read at the same time, and
    /// none is kept. One that cannot be read fails them all.
    pub async fn read_facts(
        &self,
        lineage: LineageId,
        backups: Vec<BackupId>,
    ) -> Result<Vec<(BackupId, BackupFacts)>, Error> {
        let read = backups.into_iter().map(|backup| async move {
            let opened = self.open_backup(lineage, backup).await?;
            Ok::<_, Error>((backup, opened.facts().clone()))
        });
        // Collected first: a stream of borrowing futures is not general enough for a spawned caller.
        let read: Vec<_> = read.collect();
        stream::iter(read).buffered(NOTES_IN_FLIGHT).try_collect().await
    }

    /// The same when its verdict was read already.
    pub(crate) async fn open_committed(
        &self,
        lineage: LineageId,
        verdict: &Verdict,
    ) -> Result<Backup, Error> {
        let backup: BackupId = verdict.attempt.into();
        let Outcome::Commit { manifest_bytes, manifest_blake3, .. } = &verdict.outcome else {
            return Err(Error::BackupUnknown { lineage, backup });
        };
        let key = layout::of_backup(lineage, backup, "manifest");
        let root = again(|| async {
            let bytes = self.store.get(&key, MANIFEST_BYTES_MAX).await.map_err(Error::needed)?;
            let meant = bytes.len() as u64 == *manifest_bytes
                && digest_of(&bytes).is_some_and(|digest| hex::encode(&digest) == *manifest_blake3);
            if !meant {
                return Err(Error::damaged(&key, "it is not the manifest that the verdict means"));
            }
            Root::open(&self.keys, lineage, backup, &key, bytes.into())
        })
        .await?;
        Ok(Backup::new(self.clone(), root))
    }
}

impl Backup {
    pub(crate) fn new(repository: Repository, root: Arc<Root>) -> Self {
        let reader = MetadataReader::new(&repository, root.head.lineage, Arc::clone(&root.packs));
        Self { repository, root, reader: Arc::new(reader) }
    }

    /// Its id: that of the attempt that wrote it.
    pub fn id(&self) -> BackupId {
        self.root.head.attempt.into()
    }

    /// The lineage it belongs to.
    pub fn lineage(&self) -> LineageId {
        self.root.head.lineage
    }

    /// What it says about its source.
    pub fn facts(&self) -> &BackupFacts {
        &self.root.head.facts
    }

    /// How much it is.
    pub fn counts(&self) -> Counts {
        self.root.head.counts
    }

    /// The backup it was compared with. Not needed to restore it.
    pub fn predecessor(&self) -> Option<BackupId> {
        self.root.head.predecessor
    }

    /// The token its writer gave: see `CopyOptions::continuity`.
    pub fn continuity(&self) -> Option<&str> {
        self.root.head.continuity.as_deref()
    }

    /// The WAL it brought along, by name.
    pub async fn wal_files(&self) -> Result<Vec<WalFile>, Error> {
        let entries = self.wal_entries().await?;
        let sizes = entries.into_iter().map(|entry| match entry.body {
            Body::File(file) => WalFile {
                name: String::from_utf8_lossy(&entry.path).into_owned(),
                size_bytes: file.size_bytes,
            },
            _ => WalFile { name: String::from_utf8_lossy(&entry.path).into_owned(), size_bytes: 0 },
        });
        Ok(sizes.collect())
    }

    pub(crate) async fn wal_entries(&self) -> Result<Vec<Entry>, Error> {
        let mut entries = Vec::new();
        for root in &self.root.wal {
            entries.append(&mut self.reader.entries(&root.shard).await?);
        }
        Ok(entries)
    }
}

/// Reads frames of metadata packs. Packs are read in blocks, of which a few are kept: what is needed next usually stands
/// right behind what was needed last.
pub(crate) struct MetadataReader {
    store: Arc<dyn Store>,
    keys: Arc<Keys>,
    lineage: LineageId,
    packs: Arc<Packs>,
    ciphers: Mutex<HashMap<PackId, Arc<PackCipher>>>,
    blocks: Mutex<Blocks>,
}

impl fmt::Debug for MetadataReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MetadataReader")
    }
}

const BLOCK_BYTES: u64 = 1 << 20;
/// Blocks kept: enough for the shards, the hashes and the extents of a walk over three packs at once.
const BLOCKS_MAX: usize = 24;

#[derive(Default)]
struct Blocks {
    kept: HashMap<(PackId, u64), Bytes>,
    order: VecDeque<(PackId, u64)>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // What these hold is valid between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl MetadataReader {
    /// Reads what these packs hold.
    pub(crate) fn new(repository: &Repository, lineage: LineageId, packs: Arc<Packs>) -> Self {
        Self {
            store: Arc::clone(&repository.store),
            keys: Arc::clone(&repository.keys),
            lineage,
            packs,
            ciphers: Mutex::default(),
            blocks: Mutex::default(),
        }
    }

    /// Whether a pack is one of those it reads.
    pub(crate) fn knows(&self, pack: PackId) -> bool {
        self.packs.contains_key(&pack)
    }

    pub(crate) fn record(&self, pack: PackId) -> Result<&PackRecord, Error> {
        self.packs
            .get(&pack)
            .ok_or_else(|| self.damaged(pack, "a shard names it and the manifest does not"))
    }

    fn damaged(&self, pack: PackId, reason: &str) -> Error {
        Error::damaged(layout::pack(self.lineage, pack), reason)
    }

    /// The opened key of a pack.
    pub(crate) fn cipher(&self, pack: PackId) -> Result<Arc<PackCipher>, Error> {
        if let Some(cipher) = lock(&self.ciphers).get(&pack) {
            return Ok(Arc::clone(cipher));
        }
        let cipher = self
            .record(pack)?
            .cipher(&self.keys, self.lineage)?
            .ok_or_else(|| self.damaged(pack, "its key in the manifest does not open"))?;
        let cipher = Arc::new(cipher);
        lock(&self.ciphers).insert(pack, Arc::clone(&cipher));
        Ok(cipher)
    }

    async fn block(&self, record: &PackRecord, number: u64) -> Result<Bytes, Error> {
        let place = (record.id, number);
        if let Some(block) = lock(&self.blocks).kept.get(&place) {
            return Ok(block.clone());
        }
        let start = number * BLOCK_BYTES;
        let range = start..(start + BLOCK_BYTES).min(record.size_bytes);
        let key = layout::pack(self.lineage, record.id);
        let block = self.store.get_range(&key, range).await.map_err(Error::needed)?;
        let mut blocks = lock(&self.blocks);
        if blocks.kept.insert(place, block.clone()).is_none() {
            blocks.order.push_back(place);
        }
        while blocks.order.len() > BLOCKS_MAX {
            if let Some(oldest) = blocks.order.pop_front() {
                blocks.kept.remove(&oldest);
            }
        }
        Ok(block)
    }

    /// The content of one metadata frame.
    async fn frame(&self, frame: &FrameRef) -> Result<Vec<u8>, Error> {
        again(|| async {
            let read = self.frame_in_blocks(frame).await;
            if read.is_err() {
                self.drop_blocks(frame);
            }
            read
        })
        .await
    }

    /// Forgets the blocks that a frame stands in: their bytes are not to be trusted.
    fn drop_blocks(&self, frame: &FrameRef) {
        let mut blocks = lock(&self.blocks);
        for number in frame.offset / BLOCK_BYTES..=frame.end() / BLOCK_BYTES {
            let place = (frame.pack, number);
            if blocks.kept.remove(&place).is_some() {
                blocks.order.retain(|kept| *kept != place);
            }
        }
    }

    async fn frame_in_blocks(&self, frame: &FrameRef) -> Result<Vec<u8>, Error> {
        let record = self.record(frame.pack)?;
        if record.kind != ObjectType::Metadata || frame.end() > record.size_bytes {
            return Err(self.damaged(frame.pack, "a reference into it cannot be right"));
        }
        let mut stored = Vec::with_capacity(frame.stored_bytes as usize);
        let mut at = frame.offset;
        while at < frame.end() {
            let block = self.block(record, at / BLOCK_BYTES).await?;
            let from = usize::try_from(at % BLOCK_BYTES).unwrap_or(usize::MAX);
            let wanted = usize::try_from(frame.end() - at).unwrap_or(usize::MAX);
            let here = block.get(from..).unwrap_or_default();
            let here = &here[..here.len().min(wanted)];
            if here.is_empty() {
                return Err(self.damaged(frame.pack, "it is shorter than the manifest says"));
            }
            stored.extend_from_slice(here);
            at += here.len() as u64;
        }
        let cipher = self.cipher(frame.pack)?;
        let mut unpacker = zstd::bulk::Decompressor::new()
            .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
        let mut out = Vec::new();
        cipher
            .open(frame, &mut stored, &mut unpacker, &mut out)
            .map_err(|reason| self.damaged(frame.pack, reason))?;
        Ok(out)
    }

    fn malformed(&self, shard: &ShardRef, what: Malformed) -> Error {
        self.damaged(shard.frame.pack, &format!("the {} of a shard cannot be read", what.0))
    }

    /// The entries of an entry shard.
    pub(crate) async fn entries(&self, shard: &ShardRef) -> Result<Vec<Entry>, Error> {
        let bytes = self.frame(&shard.frame).await?;
        shard::decode_entries(&bytes).map_err(|what| self.malformed(shard, what))
    }

    /// The extents of `bytes` bytes of a file, from an extent shard.
    pub(crate) async fn extents(
        &self,
        shard: &ShardRef,
        unit_bytes: u32,
        bytes: u64,
    ) -> Result<Vec<Extent>, Error> {
        let content = self.frame(&shard.frame).await?;
        shard::decode_extents(&content, unit_bytes, bytes)
            .map_err(|what| self.malformed(shard, what))
    }

    /// The detection hashes of a shard's units.
    pub(crate) async fn hashes(&self, shard: &ShardRef) -> Result<Vec<u8>, Error> {
        match shard.twin() {
            Some(twin) => self.frame(&twin).await,
            None => Ok(Vec::new()),
        }
    }
}
