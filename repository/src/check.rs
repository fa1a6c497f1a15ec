//! Looking after stored backups: is everything there (L1), and does every frame open (L2)?
//!
//! Checks report what they find and repair nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use proto::LineageId;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::entry::{Body, Content, Entry, Extent};
use crate::error::Error;
use crate::layout;
use crate::limits::{FRAME_BYTES_MAX, SHARD_UNITS, TAG_LENGTH};
use crate::manifest::Root;
use crate::pack::{FrameRef, HEADER_BYTES, PackId, PackRecord, TAIL_BYTES, Tail, undigested_bytes};
use crate::progress::Progress;
use crate::reader::Backup;
use crate::repository::Repository;
use crate::stop::Stop;

/// What of a backup is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory {
    /// Packs it needs.
    pub packs: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Objects that are not there.
    pub missing: Vec<String>,
    /// Objects with another size than the manifest says.
    pub wrong_size: Vec<String>,
}

impl Inventory {
    /// Everything is there and has its size.
    pub fn is_sound(&self) -> bool {
        self.missing.is_empty() && self.wrong_size.is_empty()
    }
}

/// What opening every frame of a backup has shown.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DecryptReport {
    /// Packs looked through.
    pub packs: u64,
    /// Frames opened.
    pub frames: u64,
    /// Bytes read from the store.
    pub bytes: u64,
    /// What is wrong: object and reason, sorted.
    pub damaged: Vec<(String, String)>,
}

impl DecryptReport {
    /// Nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.damaged.is_empty()
    }
}

/// How a check runs.
#[derive(Debug, Clone)]
pub struct CheckOptions {
    /// Packs looked at in parallel.
    pub processes: usize,
    /// Counters to be read while it runs.
    pub progress: Arc<Progress>,
    /// Ends it early.
    pub cancel: CancellationToken,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { processes: 2, progress: Arc::default(), cancel: CancellationToken::new() }
    }
}

impl Repository {
    /// Looks for every pack of a manifest in one listing.
    pub(crate) async fn inventory(&self, root: &Root) -> Result<Inventory, Error> {
        let lineage = root.head.lineage;
        let listed = self.store.list(&layout::packs(lineage)).await?;
        let sizes: HashMap<&str, u64> =
            listed.iter().map(|object| (object.key.as_str(), object.size_bytes)).collect();
        let mut inventory =
            Inventory { packs: 0, bytes: 0, missing: Vec::new(), wrong_size: Vec::new() };
        for record in root.packs.values() {
            inventory.packs += 1;
            inventory.bytes += record.size_bytes;
            let key = layout::pack(lineage, record.id);
            match sizes.get(key.as_str()) {
                None => inventory.missing.push(key),
                Some(size) if *size != record.size_bytes => inventory.wrong_size.push(key),
                Some(_) => {}
            }
        }
        inventory.missing.sort();
        inventory.wrong_size.sort();
        Ok(inventory)
    }

    /// Reads a pack and holds it against the digest its manifest remembers. `None` when it is right, else what is wrong.
    pub(crate) async fn wrong_digest(
        &self,
        lineage: LineageId,
        record: &PackRecord,
    ) -> Result<Option<String>, Error> {
        let key = layout::pack(lineage, record.id);
        let end = record.size_bytes.saturating_sub(undigested_bytes());
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < end {
            let range = at..end.min(at + DIGEST_REQUEST_BYTES);
            at = range.end;
            match self.store.get_range(&key, range).await.map_err(Error::needed) {
                Ok(bytes) => hasher.update(&bytes),
                Err(Error::Damaged { reason, .. }) => return Ok(Some(format!("{key}: {reason}"))),
                Err(Error::Missing { .. }) => return Ok(Some(format!("{key} is missing"))),
                Err(error) => return Err(error),
            };
        }
        let right = *hasher.finalize().as_bytes() == record.digest;
        Ok((!right).then(|| format!("the bytes of {key} are not those that were written")))
    }
}

/// Bytes of a pack in memory while it is held against its digest.
const DIGEST_REQUEST_BYTES: u64 = 2 << 20;

impl Backup {
    /// L1: every pack is there and has its size. One listing, nothing is read.
    pub async fn check_inventory(&self) -> Result<Inventory, Error> {
        self.repository.inventory(&self.root).await
    }

    /// L2: every byte of every pack is read and has the digest the manifest remembers, every frame opens and unpacks, and
    /// everything the manifest refers to is exactly where it says. A damaged object is reported and does not end the check.
    pub async fn check_decrypt(&self, options: CheckOptions) -> Result<DecryptReport, Error> {
        let stop = Arc::new(Stop::new(&options.cancel, Handle::current()));
        let guard = stop.token().clone().drop_guard();
        let backup = self.clone();
        let report = tokio::task::spawn_blocking(move || check(&backup, &options, &stop))
            .await
            .unwrap_or_else(|gone| Err(Error::Bug(format!("the check ended: {gone}"))));
        drop(guard);
        report
    }
}

/// Frames that shards refer to, by pack.
type Referred = HashMap<PackId, Vec<FrameRef>>;

fn check(backup: &Backup, options: &CheckOptions, stop: &Stop) -> Result<DecryptReport, Error> {
    let mut report = DecryptReport::default();
    let mut referred = Referred::new();
    match refer(backup, stop, &mut referred) {
        Ok(()) => {}
        Err(Error::Damaged { key, reason }) => report.damaged.push((key, reason)),
        Err(Error::Missing { key }) => report.damaged.push((key, "it is missing".into())),
        Err(error) => return Err(error),
    }
    let mut records: Vec<&PackRecord> = backup.root.packs.values().collect();
    records.sort_by_key(|record| record.id);
    let left = Mutex::new((records.into_iter(), report));
    let locked = || left.lock().unwrap_or_else(PoisonError::into_inner);
    std::thread::scope(|scope| {
        for n in 0..options.processes.max(1) {
            let (referred, locked) = (&referred, &locked);
            let work = move || {
                loop {
                    let Some(record) = locked().0.next() else { return };
                    match check_pack(backup, record, referred.get(&record.id), options, stop) {
                        Ok(found) => {
                            let report = &mut locked().1;
                            report.packs += 1;
                            report.frames += found.frames;
                            report.bytes += found.bytes;
                            report.damaged.extend(found.damaged);
                        }
                        Err(error) => return stop.fail(error),
                    }
                }
            };
            if let Err(source) =
                std::thread::Builder::new().name(format!("check-{n}")).spawn_scoped(scope, work)
            {
                stop.fail(Error::Target { path: "a thread for the check".into(), source });
            }
        }
    });
    stop.check().map_err(|_| stop.cause())?;
    let mut report = left.into_inner().unwrap_or_else(PoisonError::into_inner).1;
    report.damaged.sort();
    report.damaged.dedup();
    Ok(report)
}

/// Reads every shard and notes which frames they name. Also holds the totals against the manifest's.
fn refer(backup: &Backup, stop: &Stop, referred: &mut Referred) -> Result<(), Error> {
    let root = &backup.root;
    let mut bytes = 0;
    for shard in root.shards.iter().chain(&root.late) {
        refer_frame(referred, shard.shard.frame);
        shard.shard.twin().into_iter().for_each(|twin| refer_frame(referred, twin));
        for entry in stop.wait(backup.reader.entries(&shard.shard))? {
            bytes += refer_entry(backup, stop, &entry, referred)?;
        }
        stop.wait(backup.reader.hashes(&shard.shard))?;
    }
    for shard in &root.wal {
        refer_frame(referred, shard.shard.frame);
        for entry in stop.wait(backup.reader.entries(&shard.shard))? {
            refer_entry(backup, stop, &entry, referred)?;
        }
    }
    if bytes != root.head.counts.bytes {
        let key = layout::of_backup(backup.lineage(), backup.id(), "manifest");
        let reason = format!(
            "it counts {} bytes of files, and its shards hold {bytes}",
            root.head.counts.bytes
        );
        return Err(Error::damaged(key, reason));
    }
    Ok(())
}

fn refer_entry(
    backup: &Backup,
    stop: &Stop,
    entry: &Entry,
    referred: &mut Referred,
) -> Result<u64, Error> {
    let Body::File(file) = &entry.body else { return Ok(0) };
    match &file.content {
        Content::Inline(extents) => refer_extents(referred, extents),
        Content::Shards(shards) => {
            let whole = u64::from(SHARD_UNITS) * u64::from(file.unit_bytes);
            let mut left = file.size_bytes;
            for shard in shards {
                refer_frame(referred, shard.frame);
                shard.twin().into_iter().for_each(|twin| refer_frame(referred, twin));
                let bytes = left.min(whole);
                refer_extents(
                    referred,
                    &stop.wait(backup.reader.extents(shard, file.unit_bytes, bytes))?,
                );
                left -= bytes;
            }
        }
    }
    Ok(file.size_bytes)
}

fn refer_extents(referred: &mut Referred, extents: &[Extent]) {
    for place in extents.iter().filter_map(|extent| extent.place) {
        refer_frame(referred, place.frame);
    }
}

fn refer_frame(referred: &mut Referred, frame: FrameRef) {
    let frames = referred.entry(frame.pack).or_default();
    // Neighbours usually name the same frame.
    if frames.last() != Some(&frame) {
        frames.push(frame);
    }
}

/// Bytes asked for at once.
const REQUEST_BYTES: u64 = 8 << 20;

fn check_pack(
    backup: &Backup,
    record: &PackRecord,
    referred: Option<&Vec<FrameRef>>,
    options: &CheckOptions,
    stop: &Stop,
) -> Result<DecryptReport, Error> {
    let mut report = DecryptReport::default();
    match open_pack(backup, record, referred, options, stop, &mut report) {
        Ok(()) => {}
        Err(Error::Damaged { key, reason }) => report.damaged.push((key, reason)),
        Err(Error::Missing { key }) => report.damaged.push((key, "it is missing".into())),
        Err(error) => return Err(error),
    }
    Ok(report)
}

fn open_pack(
    backup: &Backup,
    record: &PackRecord,
    referred: Option<&Vec<FrameRef>>,
    options: &CheckOptions,
    stop: &Stop,
    report: &mut DecryptReport,
) -> Result<(), Error> {
    let key = layout::pack(backup.lineage(), record.id);
    let damaged = |reason: &str| Error::damaged(&key, reason);
    let store = &backup.repository.store;
    let size = stop.wait(async { store.size(&key).await.map_err(Error::needed) })?;
    if size != record.size_bytes {
        return Err(damaged(&format!(
            "it has {size} bytes, and the manifest says {}",
            record.size_bytes
        )));
    }
    let get = |range: std::ops::Range<u64>| {
        let length = range.end - range.start;
        let bytes =
            stop.wait(async { store.get_range(&key, range).await.map_err(Error::needed) })?;
        options.progress.add_stored(length);
        Ok::<Vec<u8>, Error>(bytes.into())
    };
    let tail_start =
        size.checked_sub(TAIL_BYTES as u64).ok_or_else(|| damaged("it is too short"))?;
    let tail_bytes = get(tail_start..size)?;
    let tail = Tail::parse(&tail_bytes).map_err(damaged)?;
    let table_start = tail_start
        .checked_sub(u64::from(tail.table_bytes))
        .filter(|start| *start >= HEADER_BYTES as u64)
        .ok_or_else(|| damaged("its trailer contradicts itself"))?;
    let sealed_table = get(table_start..tail_start)?;
    let cipher = backup.reader.cipher(record.id)?;
    let frames =
        tail.frames(&cipher, record.id, size, &mut sealed_table.clone()).map_err(damaged)?;

    let mut hasher = blake3::Hasher::new();
    hasher.update(&get(0..HEADER_BYTES as u64)?);
    let mut unpacker = zstd::bulk::Decompressor::new()
        .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
    let mut content = Vec::new();
    let mut rest = frames.as_slice();
    while let Some(first) = rest.first() {
        if rest.iter().any(|frame| frame.stored_bytes > FRAME_BYTES_MAX + TAG_LENGTH) {
            return Err(damaged("a frame is larger than the format allows"));
        }
        let count = rest
            .iter()
            .take_while(|frame| frame.end() - first.offset <= REQUEST_BYTES)
            .count()
            .max(1);
        let (request, behind) = rest.split_at(count);
        let end = request.last().map_or(first.end(), FrameRef::end);
        let mut bytes = get(first.offset..end)?;
        hasher.update(&bytes);
        report.bytes += bytes.len() as u64;
        for frame in request {
            let from = usize::try_from(frame.offset - first.offset)
                .map_err(|_| damaged("a frame lies outside"))?;
            let stored = bytes
                .get_mut(from..from + frame.stored_bytes as usize)
                .ok_or_else(|| damaged("a frame lies outside"))?;
            cipher.open(frame, stored, &mut unpacker, &mut content).map_err(damaged)?;
            report.frames += 1;
            options.progress.add_bytes(content.len() as u64);
        }
        rest = behind;
    }
    hasher.update(&sealed_table);
    let digested = tail_bytes.len() - usize::try_from(undigested_bytes()).unwrap_or(0);
    hasher.update(&tail_bytes[..digested]);
    if *hasher.finalize().as_bytes() != record.digest || tail.digest != record.digest {
        return Err(damaged("its bytes do not have the digest the manifest remembers"));
    }
    let known = |frame: &FrameRef| frames.get(frame.number as usize) == Some(frame);
    if !referred.into_iter().flatten().all(known) {
        return Err(damaged("the manifest refers to a frame that is not in it"));
    }
    Ok(())
}
