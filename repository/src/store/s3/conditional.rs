//! Create-if-absent: the one write that decides something, so the one whose outcome is never guessed.
//!
//! Every attempt of one call carries the same write id. Whatever comes back that is not a plain success, the object
//! itself is asked whose it is; only an object with our write id is ours.

use aws_sdk_s3::primitives::ByteStream;
use bytes::Bytes;
use tokio::time::Instant;

use super::answer::Answer;
use super::{Pauses, S3Store, WRITE_ID, write_id};
use crate::store::{PutOutcome, Store, StoreError};

/// Whose object stands under a key.
pub(super) enum Owner {
    Nobody,
    Ours,
    Somebody,
    /// There is an object without a write id: written by other means, or the store forgets metadata.
    Unmarked,
}

pub(super) async fn put_if_absent(
    store: &S3Store,
    key: &str,
    bytes: Bytes,
) -> Result<PutOutcome, StoreError> {
    let write_id = write_id();
    let deadline = Instant::now() + store.inner.limits.settle;
    let mut pauses = Pauses::new(&store.inner.limits);
    // Whether an attempt may have created the object although we did not hear so.
    let mut unheard = false;
    loop {
        let mut answer = match put_once(store, key, bytes.clone(), &write_id).await {
            Ok(()) => return Ok(PutOutcome::Created),
            Err(answer) => answer,
        };
        if !answer.is_precondition() && !answer.passes() {
            return Err(answer.into_error("create", key, &store.inner.bucket));
        }
        unheard |= answer.may_have_happened();
        match owner(store, key, &write_id, bytes.len() as u64).await {
            Ok(Owner::Ours) => return Ok(PutOutcome::Created),
            Ok(Owner::Somebody) => return Ok(PutOutcome::Exists),
            Ok(Owner::Unmarked) => return unmarked(store, key, &bytes, unheard).await,
            Ok(Owner::Nobody) => {}
            Err(asked) if asked.passes() => answer = asked,
            Err(asked) => return Err(asked.into_error("create", key, &store.inner.bucket)),
        }
        if Instant::now() >= deadline {
            return Err(answer.into_error("create", key, &store.inner.bucket));
        }
        pauses.pause().await;
    }
}

/// One request, never repeated below us.
async fn put_once(store: &S3Store, key: &str, bytes: Bytes, write_id: &str) -> Result<(), Answer> {
    let patience = store.patience(bytes.len() as u64, false);
    store
        .client()
        .put_object()
        .bucket(&store.inner.bucket)
        .key(store.full_key(key))
        .if_none_match("*")
        .metadata(WRITE_ID, write_id)
        .body(ByteStream::from(bytes))
        .customize()
        .config_override(patience)
        .send()
        .await
        .map(|_| ())
        .map_err(|error| Answer::of(&error))
}

pub(super) async fn owner(
    store: &S3Store,
    key: &str,
    write_id: &str,
    size: u64,
) -> Result<Owner, Answer> {
    let head = match store.head(key).await {
        Ok(head) => head,
        Err(answer) if answer.looks_missing() => return Ok(Owner::Nobody),
        Err(answer) => return Err(answer),
    };
    let same_size =
        head.content_length().and_then(|length| u64::try_from(length).ok()) == Some(size);
    Ok(match head.metadata().and_then(|metadata| metadata.get(WRITE_ID)) {
        Some(found) if found == write_id && same_size => Owner::Ours,
        Some(_) => Owner::Somebody,
        None => Owner::Unmarked,
    })
}

/// An object without a write id is somebody else's if we heard every answer, or if its bytes are not ours; otherwise
/// nobody can tell.
async fn unmarked(
    store: &S3Store,
    key: &str,
    bytes: &Bytes,
    unheard: bool,
) -> Result<PutOutcome, StoreError> {
    if !unheard || store.size(key).await? != bytes.len() as u64 {
        return Ok(PutOutcome::Exists);
    }
    if store.get(key, bytes.len() as u64).await? != *bytes {
        return Ok(PutOutcome::Exists);
    }
    Err(StoreError::Unavailable {
        operation: "create",
        key: key.to_owned(),
        source: "the answer was lost, and the object that is there has the same bytes but no write id, so it cannot be \
                 told whose it is; the store does not keep user metadata"
            .into(),
    })
}
