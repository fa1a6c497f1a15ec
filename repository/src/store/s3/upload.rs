//! An object that is sent in parts: a few at a time, so memory stays flat, and complete only when the store says so or
//! the object itself proves it.

use std::fmt;
use std::sync::Arc;

use async_trait::async_trait;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::answer::Answer;
use super::conditional::{self, Owner};
use super::{NO_SUCH_UPLOAD, Pauses, S3Store, WRITE_ID, write_id};
use crate::store::{PutOutcome, Store, StoreError, Upload};

/// Parts of one upload on their way at the same time.
const PARTS_IN_FLIGHT: usize = 4;

/// S3 refuses smaller parts, the last one excepted.
const PART_BYTES_MIN: usize = 5 * 1024 * 1024;

/// S3's limit.
const PARTS_MAX: i32 = 10_000;

/// What may come next.
enum State {
    /// Another part, or the end.
    Open,
    /// The end: the last part was a short one.
    Ended,
    /// Nothing: a part is missing, because it failed or because its caller did not wait for it.
    Broken(&'static str),
}

/// Where an upload may become an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Wherever its key is, in the place of another one too.
    Any,
    /// Only where there is none.
    Absent,
}

pub(super) struct S3Upload {
    store: S3Store,
    key: String,
    write_id: String,
    /// There is something to abort while this is set.
    upload_id: Option<String>,
    /// The store may have begun an upload whose id we never heard: it would stay for ever.
    unheard: bool,
    /// A first part so small that it must be the last: it goes as one plain object.
    held: Option<Bytes>,
    in_flight: JoinSet<Result<CompletedPart, StoreError>>,
    done: Vec<CompletedPart>,
    parts: i32,
    size: u64,
    state: State,
}

impl S3Upload {
    pub(super) fn new(store: S3Store, key: &str) -> Self {
        Self {
            store,
            key: key.to_owned(),
            write_id: write_id(),
            upload_id: None,
            unheard: false,
            held: None,
            in_flight: JoinSet::new(),
            done: Vec::new(),
            parts: 0,
            size: 0,
            state: State::Open,
        }
    }

    fn refused(&self, why: impl Into<String>) -> StoreError {
        StoreError::Unavailable {
            operation: "upload",
            key: self.key.clone(),
            source: why.into().into(),
        }
    }

    /// The upload's id; the first call starts the upload. Repeated by hand, because each time that no answer is heard
    /// may have begun an upload of its own.
    async fn start(&mut self) -> Result<String, StoreError> {
        if let Some(upload_id) = &self.upload_id {
            return Ok(upload_id.clone());
        }
        let mut pauses = Pauses::new(&self.store.inner.limits);
        let mut attempt = 1;
        loop {
            let answer = match self.start_once().await {
                Ok(Some(upload_id)) => {
                    self.upload_id = Some(upload_id.clone());
                    return Ok(upload_id);
                }
                Ok(None) => {
                    self.unheard = true;
                    return Err(self.refused("the store began an upload and did not name it"));
                }
                Err(answer) => answer,
            };
            self.unheard |= answer.may_have_happened();
            if !answer.passes() || attempt == self.store.inner.limits.attempts {
                return Err(answer.into_error("upload", &self.key, &self.store.inner.bucket));
            }
            attempt += 1;
            pauses.pause().await;
        }
    }

    async fn start_once(&self) -> Result<Option<String>, Answer> {
        let store = &self.store;
        store
            .client()
            .create_multipart_upload()
            .bucket(&store.inner.bucket)
            .key(store.full_key(&self.key))
            .metadata(WRITE_ID, &self.write_id)
            .customize()
            .config_override(store.patience(0, false))
            .send()
            .await
            .map(|created| created.upload_id.filter(|id| !id.is_empty()))
            .map_err(|error| Answer::of(&error))
    }

    /// Waits until at most `most` parts are on their way.
    async fn settle_to(&mut self, most: usize) -> Result<(), StoreError> {
        loop {
            let ended = if self.in_flight.len() > most {
                self.in_flight.join_next().await
            } else {
                self.in_flight.try_join_next()
            };
            match ended {
                None => return Ok(()),
                Some(Ok(Ok(part))) => self.done.push(part),
                Some(Ok(Err(error))) => {
                    self.state = State::Broken("a part of it failed");
                    return Err(error);
                }
                Some(Err(join)) => {
                    self.state = State::Broken("a part of it failed");
                    return Err(self.refused(join.to_string()));
                }
            }
        }
    }

    async fn complete_once(&self, upload_id: &str, place: Place) -> Result<bool, Answer> {
        let store = &self.store;
        let parts = CompletedMultipartUpload::builder().set_parts(Some(self.done.clone())).build();
        // Joining the parts may take the store longer than a plain answer.
        let mut patience = store.patience(0, false);
        patience.set_timeout_config(Some(
            aws_sdk_s3::config::timeout::TimeoutConfig::builder()
                .connect_timeout(store.inner.limits.connect)
                .operation_attempt_timeout(store.inner.limits.answer * 4)
                .build(),
        ));
        store
            .client()
            .complete_multipart_upload()
            .bucket(&store.inner.bucket)
            .key(store.full_key(&self.key))
            .upload_id(upload_id)
            .multipart_upload(parts)
            .set_if_none_match((place == Place::Absent).then(|| "*".to_owned()))
            .customize()
            .config_override(patience)
            .send()
            .await
            // A success says what it made; an empty 200 is none.
            .map(|completed| completed.e_tag().is_some_and(|tag| !tag.is_empty()))
            .map_err(|error| Answer::of(&error))
    }

    async fn complete_parts(
        &mut self,
        upload_id: &str,
        place: Place,
    ) -> Result<PutOutcome, StoreError> {
        self.settle_to(0).await?;
        self.done.sort_unstable_by_key(CompletedPart::part_number);
        let deadline = Instant::now() + self.store.inner.limits.settle;
        let mut pauses = Pauses::new(&self.store.inner.limits);
        // Whether an attempt may have made the object although we did not hear so.
        let mut unheard = false;
        loop {
            let answer = match self.complete_once(upload_id, place).await {
                Ok(true) => return Ok(PutOutcome::Created),
                Ok(false) => None,
                Err(answer) => Some(answer),
            };
            unheard |= answer.as_ref().is_none_or(Answer::may_have_happened);
            // Where somebody's object is there, it does not matter any more who ended the upload.
            let is_taken = place == Place::Absent
                && answer.as_ref().is_some_and(|answer| {
                    answer.is_precondition() || answer.code == NO_SUCH_UPLOAD
                });
            let failed = |answer: Option<Answer>| match answer {
                Some(answer) if answer.code == NO_SUCH_UPLOAD => {
                    self.refused(format!("somebody else ended the upload: {answer}"))
                }
                Some(answer) => answer.into_error("upload", &self.key, &self.store.inner.bucket),
                None => self.refused("the store answered without saying what it made"),
            };
            let again = match &answer {
                None => true,
                // Gone: completed by a request whose answer we did not hear, or ended by somebody else.
                Some(answer) if answer.code == NO_SUCH_UPLOAD => false,
                Some(answer) if answer.passes() || is_taken => true,
                Some(_) => return Err(failed(answer)),
            };
            match conditional::owner(&self.store, &self.key, &self.write_id, self.size).await {
                Ok(Owner::Ours) => return Ok(PutOutcome::Created),
                Ok(Owner::Somebody) if is_taken => return Ok(PutOutcome::Exists),
                Ok(Owner::Unmarked) if is_taken && !unheard => return Ok(PutOutcome::Exists),
                Ok(_) if !again => return Err(failed(answer)),
                Ok(_) => {}
                Err(asked) if asked.passes() => {}
                Err(asked) => return Err(failed(Some(asked))),
            }
            if Instant::now() >= deadline {
                return Err(failed(answer));
            }
            pauses.pause().await;
        }
    }

    /// Completes it, and ends what else was begun under its key.
    async fn complete_at(&mut self, place: Place) -> Result<PutOutcome, StoreError> {
        if let State::Broken(why) = self.state {
            return Err(self.refused(why));
        }
        let upload_id = self.upload_id.clone().ok_or_else(|| self.refused("nothing was sent"))?;
        let outcome = self.complete_parts(&upload_id, place).await?;
        if outcome == PutOutcome::Created {
            self.upload_id = None;
        }
        // The object is there; what else was begun under its key costs money and nothing more.
        if std::mem::take(&mut self.unheard)
            && let Err(error) = sweep(&self.store, &self.key).await
        {
            tracing::warn!("An upload of {} may have been left behind: {error}", self.key);
        }
        Ok(outcome)
    }

    /// Sends a part that may be the last one.
    async fn send_part(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.state = State::Broken("a part of it was given up");
        let upload_id = self.start().await?;
        self.settle_to(PARTS_IN_FLIGHT - 1).await?;
        // Beside this upload's own: the memory of a part is given back when the part has arrived, not before.
        let memory = Arc::clone(&self.store.inner.parts);
        let permit =
            memory.acquire_owned().await.map_err(|error| self.refused(error.to_string()))?;
        let (store, key) = (self.store.clone(), self.key.clone());
        self.parts += 1;
        self.size += bytes.len() as u64;
        let number = self.parts;
        self.state = if bytes.len() < PART_BYTES_MIN { State::Ended } else { State::Open };
        self.in_flight.spawn(async move {
            let sent = send(&store, &key, &upload_id, number, bytes).await;
            drop(permit);
            sent
        });
        Ok(())
    }
}

/// An object that was sent and has no name yet: an upload of one part.
pub struct Sent(Box<S3Upload>);

impl fmt::Debug for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Sent({})", self.0.key)
    }
}

impl Sent {
    /// Returns when all of it has arrived.
    pub(super) async fn send(store: &S3Store, key: &str, bytes: Bytes) -> Result<Self, StoreError> {
        let mut upload = Box::new(S3Upload::new(store.clone(), key));
        let sent = upload.send_part(bytes).await;
        // Others may send the same at this moment: what was begun without our hearing of it is left to a collection.
        upload.unheard = false;
        sent?;
        upload.settle_to(0).await?;
        Ok(Self(upload))
    }

    /// Ends the upload.
    pub(crate) async fn discard(self) {
        let key = self.0.key.clone();
        if let Err(error) = self.0.abort().await {
            tracing::debug!(key, %error, "left an upload behind");
        }
    }

    pub(super) fn is_for(&self, key: &str) -> bool {
        self.0.key == key
    }

    /// As [`Store::put_if_absent`].
    pub(super) async fn put_if_absent(mut self) -> Result<PutOutcome, StoreError> {
        let outcome = self.0.complete_at(Place::Absent).await?;
        if outcome == PutOutcome::Exists {
            self.discard().await;
        }
        Ok(outcome)
    }
}

#[async_trait]
impl Upload for S3Upload {
    async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        match self.state {
            State::Open => {}
            State::Ended => return Err(self.refused("a part of less than 5 MiB is the last one")),
            State::Broken(why) => return Err(self.refused(why)),
        }
        if self.parts == PARTS_MAX {
            return Err(self.refused(format!("an object has at most {PARTS_MAX} parts")));
        }
        if bytes.is_empty() && self.parts > 0 {
            return Ok(());
        }
        if self.parts == 0 && bytes.len() < PART_BYTES_MIN {
            self.parts = 1;
            self.held = Some(bytes);
            self.state = State::Ended;
            return Ok(());
        }
        self.send_part(bytes).await
    }

    async fn complete(mut self: Box<Self>) -> Result<(), StoreError> {
        if self.upload_id.is_none() && !matches!(self.state, State::Broken(_)) {
            let whole = self.held.take().unwrap_or_default();
            return self.store.put(&self.key, whole).await;
        }
        self.complete_at(Place::Any).await.map(|_| ())
    }

    async fn abort(mut self: Box<Self>) -> Result<(), StoreError> {
        // A part that arrives after the abort would stay behind: first no part is on its way any more.
        self.in_flight.shutdown().await;
        let (upload_id, unheard) = (self.upload_id.take(), std::mem::take(&mut self.unheard));
        end(&self.store, &self.key, upload_id, unheard).await
    }
}

impl Drop for S3Upload {
    /// Best effort: an upload that is left behind here is found by [`Store::abort_uploads`].
    fn drop(&mut self) {
        let (upload_id, unheard) = (self.upload_id.take(), self.unheard);
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        if upload_id.is_none() && !unheard {
            return;
        }
        let (store, key) = (self.store.clone(), std::mem::take(&mut self.key));
        let mut in_flight = std::mem::take(&mut self.in_flight);
        runtime.spawn(async move {
            in_flight.shutdown().await;
            if let Err(error) = end(&store, &key, upload_id, unheard).await {
                tracing::debug!(key, %error, "left an upload behind");
            }
        });
    }
}

/// Ends an upload, and those under the same key that may have begun without our hearing of it.
async fn end(
    store: &S3Store,
    key: &str,
    upload_id: Option<String>,
    unheard: bool,
) -> Result<(), StoreError> {
    if let Some(upload_id) = upload_id {
        store.abort_upload(key, &upload_id).await?;
    }
    if unheard { sweep(store, key).await } else { Ok(()) }
}

/// Ends every upload under a key that is nobody's but ours.
async fn sweep(store: &S3Store, key: &str) -> Result<(), StoreError> {
    store.abort_uploads(&[key.to_owned()]).await.map(|_| ())
}

async fn send(
    store: &S3Store,
    key: &str,
    upload_id: &str,
    number: i32,
    bytes: Bytes,
) -> Result<CompletedPart, StoreError> {
    let patience = store.patience(bytes.len() as u64, true);
    let sent = store
        .client()
        .upload_part()
        .bucket(&store.inner.bucket)
        .key(store.full_key(key))
        .upload_id(upload_id)
        .part_number(number)
        .body(ByteStream::from(bytes))
        .customize()
        .config_override(patience)
        .send()
        .await
        .map_err(|error| store.failed("upload", key, &error))?;
    Ok(CompletedPart::builder()
        .part_number(number)
        .set_e_tag(sent.e_tag)
        .set_checksum_crc32(sent.checksum_crc32)
        .set_checksum_crc32_c(sent.checksum_crc32_c)
        .set_checksum_crc64_nvme(sent.checksum_crc64_nvme)
        .set_checksum_sha1(sent.checksum_sha1)
        .set_checksum_sha256(sent.checksum_sha256)
        .build())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::{
        CONDEMNED_BYTES_MAX, MANIFEST_BYTES_MAX, PACK_BYTES_MAX, PART_BYTES, PROOF_BYTES_MAX,
    };

    #[test]
    fn no_object_of_the_format_comes_near_the_parts_that_s3_allows() {
        let archived = crate::wal::object::OBJECT_BYTES_MAX;
        let of_all_kinds =
            [PACK_BYTES_MAX, MANIFEST_BYTES_MAX, CONDEMNED_BYTES_MAX, PROOF_BYTES_MAX, archived];
        const { assert!(PART_BYTES >= PART_BYTES_MIN) };
        for bytes in of_all_kinds {
            let parts = bytes.div_ceil(PART_BYTES as u64);
            assert!(parts * 10 < u64::from(PARTS_MAX.unsigned_abs()), "{bytes} bytes: {parts}");
        }
    }
}
