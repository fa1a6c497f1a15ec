//! Packs on their way into the store: a thread fills one, a task of the runtime uploads it part by part behind it.
//!
//! A pack that is not closed is never completed: dropping a stream throws its unfinished pack away.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use proto::LineageId;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;

use crate::chance;
use crate::error::Error;
use crate::key::Keys;
use crate::layout;
use crate::limits::{PACK_BYTES, PART_BYTES};
use crate::pack::{Compressor, FrameRef, ObjectType, PackBuilder, PackRecord};
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
    /// Parts in memory at once, over all packs.
    parts: Arc<Semaphore>,
    tasks: Mutex<Vec<PackTask>>,
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
    ) -> Self {
        let parts = Arc::new(Semaphore::new(parts_max));
        Self { store, keys, lineage, stop, progress, parts, tasks: Mutex::default() }
    }

    fn keep(&self, task: PackTask) {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(task);
    }

    /// Waits until every pack is stored or thrown away. The records of the stored ones, or the first failure.
    pub(super) async fn settle(&self) -> Result<Vec<PackRecord>, Error> {
        let tasks = std::mem::take(&mut *self.tasks.lock().unwrap_or_else(PoisonError::into_inner));
        let mut records = Vec::with_capacity(tasks.len());
        let mut failed = None;
        for task in tasks {
            match joined(task).await {
                Ok(record) => records.push(record),
                Err(error) => failed = failed.or(Some(error)),
            }
        }
        match failed {
            None => Ok(records),
            Some(error) => {
                self.stop.fail(error);
                Err(self.stop.cause())
            }
        }
    }

    fn permit(&self) -> Result<OwnedSemaphorePermit, Error> {
        let parts = Arc::clone(&self.parts);
        self.stop.wait(async { parts.acquire_owned().await.map_err(|_| Error::Cancelled) })
    }
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
        if self.open.as_ref().is_some_and(|open| open.builder.is_full(PACK_BYTES)) {
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
        let (sender, parts) = mpsc::channel(1);
        let shared = Arc::clone(uploads);
        let task = uploads.stop.runtime().spawn(async move {
            let stored = store_pack(&shared, &key, parts).await;
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
