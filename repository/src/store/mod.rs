//! Where objects are kept: a small set of verbs, the same for a directory and for S3.
//!
//! A store knows keys and bytes. It does not know what an object means, and it never retries something that could
//! happen twice with a different result: `put_if_absent` finds out who won instead.

use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

/// What went wrong in a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no object with this key.
    #[error("find {key}")]
    NotFound {
        /// The key.
        key: String,
    },
    /// The store refused the credentials or the operation.
    #[error("get permission to {operation} {key}")]
    Forbidden {
        /// The verb.
        operation: &'static str,
        /// The key.
        key: String,
        /// What the store said.
        #[source]
        source: Cause,
    },
    /// There is no room left in the store.
    #[error("find room for {key}")]
    Full {
        /// The key.
        key: String,
        /// What the store said.
        #[source]
        source: Cause,
    },
    /// Anything else, after the retries that were safe.
    #[error("{operation} {key}")]
    Unavailable {
        /// The verb.
        operation: &'static str,
        /// The key.
        key: String,
        /// What the store said.
        #[source]
        source: Cause,
    },
    /// The store's configuration cannot work.
    #[error("use the store: {reason}")]
    Unsuitable {
        /// Why, and what to do.
        reason: String,
    },
}

/// The error below a [`StoreError`].
pub type Cause = Box<dyn std::error::Error + Send + Sync>;

/// How a conditional put ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PutOutcome {
    /// The object is there with exactly our bytes, put by us (also when the store's first answer was lost).
    Created,
    /// Somebody else's object was there first. Nothing was changed.
    Exists,
}

/// One row of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The whole key.
    pub key: String,
    /// Bytes of the object.
    pub size_bytes: u64,
}

/// An object that is being written in parts. Nothing is visible before [`Upload::complete`]; dropping or aborting
/// leaves nothing behind that a later sweep could not see.
#[async_trait]
pub trait Upload: Send {
    /// Adds the next part. Parts are at least 5 MiB, the last one excepted; the call returns when the part is
    /// accepted for sending, and at most a few parts are in flight (so memory stays bounded).
    async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError>;
    /// Makes the object visible and durable.
    async fn complete(self: Box<Self>) -> Result<(), StoreError>;
    /// Throws the parts away.
    async fn abort(self: Box<Self>) -> Result<(), StoreError>;
}

/// The verbs. Keys are relative (`config`, `lineages/…/packs/…`), of `[A-Za-z0-9._/-]`, never beginning with `/`, never
/// with a `.` component. Every call is bounded in time.
#[async_trait]
pub trait Store: Send + Sync + std::fmt::Debug {
    /// For people: `s3://bucket/prefix` or `file:///path`, without secrets.
    fn describe(&self) -> String;
    /// The whole object, refused when it is larger than `limit_bytes`.
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError>;
    /// Exactly the bytes `range` of the object; a shorter object is an error.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError>;
    /// The object's size.
    async fn size(&self, key: &str) -> Result<u64, StoreError>;
    /// Writes an object whose name nobody else uses (overwriting is harmless because the bytes are the same).
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError>;
    /// Writes the object only if there is none: the one operation that decides anything. Atomic among all hosts.
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError>;
    /// Starts an object that is too large for one call.
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError>;
    /// Every object below `prefix`, sorted by key.
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError>;
    /// Deletes an object; deleting what is not there succeeds.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;
    /// Ends uploads below `prefix` that nobody completes. Returns how many there were. Only uploads whose key is in
    /// `keys` (those of dead attempts) are touched.
    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError>;
}
