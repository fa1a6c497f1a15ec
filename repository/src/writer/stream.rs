//! Packs on their way into the store: a thread fills one, a task of the runtime uploads it part by part behind it.
//!
//! A pack that is not closed is never completed: dropping a stream throws its unfinished pack away.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use proto::LineageId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinHandle;

use crate::chance;
use crate::error::Error;
use crate::key::Keys;
use crate::layout;
use crate::limits::PART_BYTES;
use crate::manifest::Packs;
use crate::pack::{Compressor, FrameRef, ObjectType, PackBuilder, PackId, PackRecord};
use crate::progress::Progress;
use crate::stop::Stop;
use crate::store::{Store, Upload};

pub(super) type PackTask = JoinHandle<Result<PackRecord, Error>>;

/// What all streams of one writer share.
#[derive(Debug)]
pub(super) struct Uploads {
    pub(super) store: Arc<dyn Store>,
    pub(super) keys: Arc<Keys>,
    pub(super) lineage: LineageId,
    pub(super) stop: Arc<Stop>,
    pub(super) progress: Arc<Progress>,
    /// A pack is ended when it has grown past this.
    pack_bytes: u64,
    /// Parts in memory at once, over all packs.
    parts: Arc<Semaphore>,
    tasks: Mutex<Vec<PackTask>>,
    /// Every pack that was begun.
    begun: Mutex<HashMap<PackId, ObjectType>>,
    /// Those of them that the store has acknowledged.
    stored: watch::Sender<Packs>,
    /// Bytes of those that hold content of files.
    content_bytes: AtomicU64,
    /// The checkpoint on its way, and the last one that arrived; 0 when none has.
    checkpoint: Mutex<Option<JoinHandle<()>>>,
    last_checkpoint: AtomicU32,
}

enum Message {
    Part(Bytes, OwnedSemaphorePermit),
    End(Bytes, OwnedSemaphorePermit, PackRecord),
}

impl Uploads {
    pub(super) fn new(
        store: Arc<dyn Store>,
        keys: Arc<Keys>,
        lineage: LineageId,
        stop: Arc<Stop>,
        progress: Arc<Progress>,
        parts_max: usize,
        pack_bytes: u64,
    ) -> Self {
        Self {
            store,
            keys,
            lineage,
            stop,
            progress,
            pack_bytes,
            parts: Arc::new(Semaphore::new(parts_max)),
            tasks: Mutex::default(),
            begun: Mutex::default(),
            stored: watch::Sender::default(),
            content_bytes: AtomicU64::default(),
            checkpoint: Mutex::default(),
            last_checkpoint: AtomicU32::default(),
        }
    }

    /// Bytes of content that are stored.
    pub(super) fn content_bytes(&self) -> u64 {
        self.content_bytes.load(Ordering::Relaxed)
    }

    /// The packs of one type that were begun so far. Of content and metadata every one is stored in the end, or the backup fails.
    pub(super) fn begun(&self, of: ObjectType) -> Vec<PackId> {
        let begun = lock(&self.begun);
        begun.iter().filter(|(_, kind)| **kind == of).map(|(pack, _)| *pack).collect()
    }

    /// Waits until these packs are stored. All that are by then.
    pub(super) async fn once_stored(&self, packs: &[PackId]) -> Result<Packs, Error> {
        let mut stored = self.stored.subscribe();
        let all = stored.wait_for(|stored| packs.iter().all(|pack| stored.contains_key(pack)));
        tokio::select! {
            biased;
            () = self.stop.token().cancelled() => Err(Error::Cancelled),
            all = all => all.map(|stored| stored.clone()).map_err(|_| Error::Cancelled),
        }
    }

    fn is_stored(&self, record: &PackRecord) {
        if record.kind == ObjectType::Data {
            self.content_bytes.fetch_add(record.size_bytes, Ordering::Relaxed);
        }
        self.stored.send_modify(|stored| {
            stored.insert(record.id, record.clone());
        });
    }

    /// Stores a checkpoint beside everything else, after the one before.
    pub(super) fn checkpointing(&self, store: impl Future<Output = ()> + Send + 'static) {
        let mut last = lock(&self.checkpoint);
        let before = last.take();
        *last = Some(self.stop.runtime().spawn(async move {
            if let Some(before) = before {
                let _ = before.await;
            }
            store.await;
        }));
    }

    /// Whether a checkpoint is on its way.
    pub(super) fn is_checkpointing(&self) -> bool {
        lock(&self.checkpoint).as_ref().is_some_and(|task| !task.is_finished())
    }

    /// Waits for the checkpoint on its way.
    async fn end_checkpointing(&self) {
        let task = lock(&self.checkpoint).take();
        if let Some(task) = task {
            let _ = task.await;
        }
    }

    pub(super) fn has_checkpoint(&self, number: u32) {
        self.last_checkpoint.store(number, Ordering::Relaxed);
    }

    /// The number of the last checkpoint that arrived.
    pub(super) fn last_checkpoint(&self) -> Option<u32> {
        Some(self.last_checkpoint.load(Ordering::Relaxed)).filter(|number| *number > 0)
    }

    fn keep(&self, task: PackTask) {
        lock(&self.tasks).push(task);
    }

    /// Waits until every pack is stored or thrown away, and for the last checkpoint. The records of the stored ones, or the first
    /// failure.
    pub(super) async fn settle(&self) -> Result<Vec<PackRecord>, Error> {
        let tasks = std::mem::take(&mut *lock(&self.tasks));
        let mut records = Vec::with_capacity(tasks.len());
        let mut failed = None;
        for task in tasks {
            match joined(task).await {
                Ok(record) => records.push(record),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        if let Some(error) = failed {
            // Also a checkpoint that waits for what is not coming.
            self.stop.fail(error);
            self.end_checkpointing().await;
            return Err(self.stop.cause());
        }
        self.end_checkpointing().await;
        Ok(records)
    }

    fn permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        let parts = Arc::clone(&self.parts);
        self.stop.wait(async { parts.acquire_owned().await.map_err(|_| Error::Cancelled) })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these hold is valid between any two statements.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) async fn joined(task: PackTask) -> Result<PackRecord, Error> {
    task.await.unwrap_or_else(|gone| Err(Error::Bug(format!("an upload ended: {gone}"))))
}

/// Fills packs of one type, one after the other.
#[derive(Debug)]
pub(super) struct PackStream {
    uploads: Arc<Uploads>,
    kind: ObjectType,
    open: Option<OpenPack>,
}

#[derive(Debug)]
struct OpenPack {
    builder: PackBuilder,
    sender: mpsc::Sender<Message>,
    task: PackTask,
}

impl PackStream {
    pub(super) fn new(uploads: Arc<Uploads>, kind: ObjectType) -> Self {
        Self { uploads, kind, open: None }
    }

    /// Appends a frame, without ending the pack behind it.
    pub(super) fn append(
        &mut self,
        content: &[u8],
        compressor: Option<&mut Compressor>,
    ) -> Result<FrameRef, Error> {
        self.uploads.stop.check()?;
        let open = match &mut self.open {
            Some(open) => open,
            None => self.open.insert(OpenPack::begin(&self.uploads, self.kind)?),
        };
        let frame = open.builder.append(content, compressor)?;
        while let Some(part) = open.builder.take_part() {
            let permit = self.uploads.permit()?;
            open.send(&self.uploads.stop, Message::Part(part, permit))?;
        }
        Ok(frame)
    }

    /// Ends the pack when it has grown large enough.
    pub(super) fn roll(&mut self) -> Result<(), Error> {
        if self.open.as_ref().is_some_and(|open| open.builder.is_full(self.uploads.pack_bytes)) {
            self.close()?;
        }
        Ok(())
    }

    /// Ends the pack. Its upload goes on by itself; [`Uploads::settle`] waits for it.
    pub(super) fn close(&mut self) -> Result<(), Error> {
        if let Some(task) = self.end()? {
            self.uploads.keep(task);
        }
        Ok(())
    }

    /// Ends the pack and hands out the task that stores it.
    pub(super) fn end(&mut self) -> Result<Option<PackTask>, Error> {
        let Some(open) = self.open.take() else { return Ok(None) };
        let permit = self.uploads.permit();
        let OpenPack { builder, sender, task } = open;
        let sent = permit.and_then(|permit| {
            let (last, record) = builder.finish()?;
            let message = Message::End(last, permit, record);
            self.uploads
                .stop
                .wait(async { sender.send(message).await.map_err(|_| Error::Cancelled) })
        });
        match sent {
            Ok(()) => Ok(Some(task)),
            Err(error) => {
                self.uploads.keep(task);
                Err(error)
            }
        }
    }
}

impl Drop for PackStream {
    fn drop(&mut self) {
        if let Some(OpenPack { task, .. }) = self.open.take() {
            // Its sender is gone, so it aborts; settling waits for that.
            self.uploads.keep(task);
        }
    }
}

impl OpenPack {
    fn begin(uploads: &Arc<Uploads>, kind: ObjectType) -> Result<Self, Error> {
        let builder = PackBuilder::new(&uploads.keys, uploads.lineage, kind, chance::random())?;
        let key = layout::pack(uploads.lineage, builder.id());
        lock(&uploads.begun).insert(builder.id(), kind);
        let (sender, parts) = mpsc::channel(1);
        let shared = Arc::clone(uploads);
        let task = uploads.stop.runtime().spawn(async move {
            let stored = store_pack(&shared, &key, parts).await;
            if let Ok(record) = &stored {
                shared.is_stored(record);
            }
            match stored {
                // Everything has ended, or whoever filled this pack gave it up; he knows why, and is about to say so.
                Err(Error::Cancelled) | Ok(_) => stored,
                Err(error) => {
                    // Whoever fills this pack must not go on. The cause is kept there; this only says "ended".
                    shared.stop.fail(error);
                    Err(Error::Cancelled)
                }
            }
        });
        Ok(Self { builder, sender, task })
    }

    fn send(&self, stop: &Stop, message: Message) -> Result<(), Error> {
        stop.wait(async { self.sender.send(message).await.map_err(|_| Error::Cancelled) })
    }
}

async fn store_pack(
    shared: &Uploads,
    key: &str,
    mut parts: mpsc::Receiver<Message>,
) -> Result<PackRecord, Error> {
    let mut upload: Option<Box<dyn Upload>> = None;
    let stored = store_parts(shared, key, &mut parts, &mut upload).await;
    if stored.is_err()
        && let Some(upload) = upload
        && let Err(error) = upload.abort().await
    {
        tracing::warn!("An upload of {key} was not ended: {error}");
    }
    stored
}

async fn store_parts(
    shared: &Uploads,
    key: &str,
    parts: &mut mpsc::Receiver<Message>,
    upload: &mut Option<Box<dyn Upload>>,
) -> Result<PackRecord, Error> {
    loop {
        // The end is looked for between calls of the store and not within them: a call that was given up could still
        // leave a part behind after everything was aborted, and each is bounded in time.
        let message = tokio::select! {
            biased;
            () = shared.stop.token().cancelled() => return Err(Error::Cancelled),
            message = parts.recv() => message.ok_or(Error::Cancelled)?,
        };
        let (bytes, permit, record) = match message {
            Message::Part(bytes, permit) => (bytes, permit, None),
            Message::End(mut bytes, permit, record) => {
                // A long table: the last part is not larger than the others.
                if let Some(upload) = upload.as_mut() {
                    while bytes.len() > PART_BYTES {
                        upload.part(bytes.split_to(PART_BYTES)).await?;
                        shared.progress.add_stored(PART_BYTES as u64);
                    }
                }
                (bytes, permit, Some(record))
            }
        };
        let length = bytes.len() as u64;
        match (record, upload.as_mut()) {
            (None, Some(upload)) => upload.part(bytes).await?,
            (None, None) => upload.insert(shared.store.upload(key).await?).part(bytes).await?,
            // Small enough for one call.
            (Some(record), None) => {
                shared.store.put(key, bytes).await?;
                shared.progress.add_stored(length);
                return Ok(record);
            }
            (Some(record), Some(_)) => {
                if let Some(mut upload) = upload.take() {
                    if let Err(error) = upload.part(bytes).await {
                        let _ = upload.abort().await;
                        return Err(error.into());
                    }
                    upload.complete().await?;
                }
                shared.progress.add_stored(length);
                return Ok(record);
            }
        }
        drop(permit);
        shared.progress.add_stored(length);
    }
}
