//! Looking after one stored backup: is everything there (L1), and does every frame open (L2)? Of a whole repository:
//! `scrub`.
//!
//! Checks report what they find and repair nothing.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use proto::LineageId;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::again::{again, told};
use crate::error::Error;
use crate::layout;
use crate::limits::{FRAME_BYTES_MAX, TAG_LENGTH};
use crate::manifest::Root;
use crate::pack::{
    FrameRef, HEADER_BYTES, PackRecord, TAIL_BYTES, Tail, ends_with_digest, undigested_bytes,
};
use crate::progress::Progress;
use crate::reader::Backup;
use crate::refer::{Frames, References};
use crate::repository::Repository;
use crate::slice::Slice;
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

    /// The same with the object's name, as a sentence.
    pub(crate) async fn wrong_digest(
        &self,
        lineage: LineageId,
        record: &PackRecord,
    ) -> Result<Option<String>, Error> {
        let fault = self.digest_fault(lineage, record, DIGEST_REQUEST_BYTES, |_| ()).await;
        let key = layout::pack(lineage, record.id);
        match fault {
            Ok(fault) => Ok(fault.map(|why| format!("{key}: {why}"))),
            Err(error) => Ok(Some(format!("{key}: {}", wrong(error)?))),
        }
    }

    /// Reads a pack whole and holds it against the digest its manifest remembers, which also stands at its end. `None` when
    /// it is right, else what is wrong. `on_read` hears of the bytes.
    pub(crate) async fn digest_fault(
        &self,
        lineage: LineageId,
        record: &PackRecord,
        request_bytes: u64,
        on_read: impl Fn(u64),
    ) -> Result<Option<String>, Error> {
        let key = layout::pack(lineage, record.id);
        let read = again(|| self.require_digest(&key, record, request_bytes, &on_read));
        match read.await {
            Ok(()) => Ok(None),
            Err(Error::Damaged { reason, .. }) => Ok(Some(reason)),
            Err(error) => Err(error),
        }
    }

    async fn require_digest(
        &self,
        key: &str,
        record: &PackRecord,
        request_bytes: u64,
        on_read: &impl Fn(u64),
    ) -> Result<(), Error> {
        let get = async |range: std::ops::Range<u64>| {
            let length = range.end - range.start;
            let bytes = self.store.get_range(key, range).await.map_err(Error::needed)?;
            on_read(length);
            Ok::<_, Error>(bytes)
        };
        let end = record.size_bytes.saturating_sub(undigested_bytes());
        let mut hasher = blake3::Hasher::new();
        let mut at = 0;
        while at < end {
            let range = at..end.min(at + request_bytes);
            at = range.end;
            hasher.update(&get(range).await?);
        }
        let right = *hasher.finalize().as_bytes() == record.digest
            && ends_with_digest(&get(end..record.size_bytes).await?, &record.digest);
        if right {
            return Ok(());
        }
        Err(Error::damaged(key, "its bytes are not those that were written"))
    }
}

/// Bytes of a pack in memory while it is held against its digest before a backup.
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

fn check(backup: &Backup, options: &CheckOptions, stop: &Stop) -> Result<DecryptReport, Error> {
    let mut references = References::keeping(Some(Slice::WHOLE));
    stop.wait(references.add(backup))?;
    let damaged = references.take_damaged().into_iter().collect();
    let report = Mutex::new(DecryptReport { damaged, ..DecryptReport::default() });
    let mut records: Vec<&PackRecord> = backup.root.packs.values().collect();
    records.sort_by_key(|record| record.id);
    let packs = records.into_iter().map(|record| (record, references.take(record.id)));
    share(options.processes, stop, packs, |(record, frames)| {
        let look = Look {
            repository: &backup.repository,
            lineage: backup.lineage(),
            progress: &options.progress,
            stop,
        };
        let found = look.open(record, &frames)?;
        let mut report = report.lock().unwrap_or_else(PoisonError::into_inner);
        report.packs += 1;
        report.frames += found.frames;
        report.bytes += found.bytes;
        report.damaged.extend(found.wrong.map(|why| (layout::pack(look.lineage, record.id), why)));
        Ok(())
    })?;
    let mut report = report.into_inner().unwrap_or_else(PoisonError::into_inner);
    report.damaged.sort();
    report.damaged.dedup();
    Ok(report)
}

/// Does each of the items once, several at a time. The first failure ends all of them.
pub(crate) fn share<T>(
    processes: usize,
    stop: &Stop,
    items: impl Iterator<Item = T> + Send,
    work: impl Fn(T) -> Result<(), Error> + Sync,
) -> Result<(), Error> {
    let left = Mutex::new(items);
    let next = || left.lock().unwrap_or_else(PoisonError::into_inner).next();
    std::thread::scope(|scope| {
        for n in 0..processes.max(1) {
            let body = || {
                while stop.check().is_ok() {
                    let Some(item) = next() else { return };
                    if let Err(error) = work(item) {
                        return stop.fail(error);
                    }
                }
            };
            let thread = std::thread::Builder::new().name(format!("check-{n}"));
            if let Err(source) = thread.spawn_scoped(scope, body) {
                stop.fail(Error::Target { path: "a thread for the check".into(), source });
            }
        }
    });
    stop.check().map_err(|_| stop.cause())
}

/// Bytes asked for at once.
const REQUEST_BYTES: u64 = 8 << 20;

/// Looks into packs, one at a time. Holds one request of a pack in memory.
pub(crate) struct Look<'a> {
    pub(crate) repository: &'a Repository,
    pub(crate) lineage: LineageId,
    pub(crate) progress: &'a Progress,
    pub(crate) stop: &'a Stop,
}

/// What was seen of a pack.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) frames: u64,
    pub(crate) bytes: u64,
    /// What is wrong with it.
    pub(crate) wrong: Option<String>,
}

impl Look<'_> {
    /// Reads a pack and holds it against its digest. Needs no data key.
    pub(crate) fn read(&self, record: &PackRecord) -> Result<Seen, Error> {
        let key = layout::pack(self.lineage, record.id);
        let size = self.size(&key);
        let read = size.and_then(|size| {
            if size != record.size_bytes {
                return Err(Error::damaged(&key, other_size(size, record)));
            }
            let count = |bytes| self.progress.add_stored(bytes);
            let read = self.repository.digest_fault(self.lineage, record, REQUEST_BYTES, count);
            self.stop.wait(read)
        });
        let wrong = match read {
            Ok(wrong) => wrong,
            Err(error) => Some(wrong(error)?),
        };
        Ok(Seen { frames: 0, bytes: record.size_bytes, wrong })
    }

    /// Reads a pack, holds it against its digest, opens and unpacks every frame of it, and looks for the frames that
    /// something refers to.
    pub(crate) fn open(&self, record: &PackRecord, referred: &Frames) -> Result<Seen, Error> {
        let mut seen = Seen::default();
        let mut opened = self.open_frames(record, referred, &mut seen);
        if let Err(first @ Error::Damaged { .. }) = &opened {
            seen = Seen::default();
            let second = self.open_frames(record, referred, &mut seen);
            if second.is_ok() {
                told(first);
            }
            opened = second;
        }
        if let Err(error) = opened {
            seen.wrong = Some(wrong(error)?);
        }
        Ok(seen)
    }

    fn size(&self, key: &str) -> Result<u64, Error> {
        let store = &self.repository.store;
        self.stop.wait(async { store.size(key).await.map_err(Error::needed) })
    }

    fn open_frames(
        &self,
        record: &PackRecord,
        referred: &Frames,
        seen: &mut Seen,
    ) -> Result<(), Error> {
        let key = layout::pack(self.lineage, record.id);
        let damaged = |reason: &str| Error::damaged(&key, reason);
        let size = self.size(&key)?;
        if size != record.size_bytes {
            return Err(damaged(&other_size(size, record)));
        }
        let mut get = |range: std::ops::Range<u64>| {
            let length = range.end - range.start;
            let store = &self.repository.store;
            let get = async { store.get_range(&key, range).await.map_err(Error::needed) };
            let bytes = self.stop.wait(get)?;
            seen.bytes += length;
            self.progress.add_stored(length);
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
        let cipher = record
            .cipher(&self.repository.keys, self.lineage)?
            .ok_or_else(|| damaged("its key in the manifest does not open"))?;
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
            for frame in request {
                let from = usize::try_from(frame.offset - first.offset)
                    .map_err(|_| damaged("a frame lies outside"))?;
                let stored = bytes
                    .get_mut(from..from + frame.stored_bytes as usize)
                    .ok_or_else(|| damaged("a frame lies outside"))?;
                cipher.open(frame, stored, &mut unpacker, &mut content).map_err(damaged)?;
                seen.frames += 1;
                self.progress.add_bytes(content.len() as u64);
            }
            rest = behind;
        }
        hasher.update(&sealed_table);
        let digested = tail_bytes.len() - usize::try_from(undigested_bytes()).unwrap_or(0);
        hasher.update(&tail_bytes[..digested]);
        if *hasher.finalize().as_bytes() != record.digest || tail.digest != record.digest {
            return Err(damaged("its bytes do not have the digest the manifest remembers"));
        }
        if !referred.are_in(&frames) {
            return Err(damaged("the manifest refers to a frame that is not in it"));
        }
        Ok(())
    }
}

fn other_size(size: u64, record: &PackRecord) -> String {
    format!("it has {size} bytes, and the manifest says {}", record.size_bytes)
}

/// What an error says about an object; any other error is nobody's damage.
fn wrong(error: Error) -> Result<String, Error> {
    match error {
        Error::Damaged { reason, .. } => Ok(reason),
        Error::Missing { .. } => Ok("it is missing".to_owned()),
        error => Err(error),
    }
}
