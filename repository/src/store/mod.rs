//! Where objects are kept: a small set of verbs, the same for a directory and for S3.
//!
//! A store knows keys and bytes. It does not know what an object means, and it never retries something that could
//! happen twice with a different result: `put_if_absent` finds out who won instead.

#[doc(hidden)]
pub mod contract;
pub mod directory;
pub mod layer;
pub mod probe;
pub mod s3;
pub mod single;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use secrecy::SecretString;

use self::probe::Capabilities;

/// Opens the store behind a URL: `file:///path` or `s3://bucket/prefix`. Nothing is created or probed.
pub async fn open(url: &str, credentials: &Credentials) -> Result<Arc<dyn Store>, StoreError> {
    match url.split_once("://") {
        Some(("file", path)) if path.starts_with('/') => {
            Ok(Arc::new(directory::DirectoryStore::new(path)))
        }
        Some(("s3", _)) => {
            let options = s3::S3Options::from_url(url, credentials)?;
            Ok(Arc::new(s3::S3Store::open(options).await?))
        }
        _ => {
            let why = "it is neither file:///path nor s3://bucket/prefix".to_owned();
            Err(StoreError::Address { url: url.to_owned(), why })
        }
    }
}

/// How to reach an object store; everything absent is taken from the environment the way the AWS tools do it.
/// A directory needs none of it.
#[derive(Debug, Clone, Default)]
pub struct Credentials {
    /// Access key.
    pub access_key_id: Option<String>,
    /// Its secret.
    pub secret_access_key: Option<SecretString>,
    /// The token of temporary credentials.
    pub session_token: Option<SecretString>,
    /// Region, for example `eu-central-1`.
    pub region: Option<String>,
    /// Another service than AWS: `https://minio.example:9000`.
    pub endpoint: Option<String>,
    /// Put the bucket into the path instead of the host name.
    pub path_style: bool,
}

/// What went wrong in a store.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no object with this key.
    #[error("find {key}")]
    NotFound {
        /// The key.
        key: String,
    },
    /// Nothing that we know has such an address.
    #[error("use {url} as the address of a store: {why}")]
    Address {
        /// What was given.
        url: String,
        /// What it lacks.
        why: String,
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
    /// The object ends before the range that was asked for.
    #[error("read as much of {key} as was asked for")]
    Short {
        /// The key.
        key: String,
        /// The range and the object's size, as far as the store tells.
        #[source]
        source: Cause,
    },
    /// The object is larger than the limit that was given.
    #[error("read {key} within its limit")]
    Large {
        /// The key.
        key: String,
        /// The object's size and the limit.
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
    /// The store is reached and has no such place: its bucket does not exist, or does not any more.
    #[error("find the store: {reason}")]
    NoStore {
        /// Which, and what to do.
        reason: String,
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

/// The bytes of an object that has no name yet: see [`Store::stage`].
#[derive(Debug)]
pub enum Staged {
    /// In memory.
    Held(Bytes),
    /// In a file of a directory's, durable.
    Written(directory::Written),
    /// With an S3 server, as an upload.
    Sent(s3::Sent),
}

/// One row of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The whole key.
    pub key: String,
    /// Bytes of the object.
    pub size_bytes: u64,
}

/// Whether somebody wants an object of this key.
pub type KeyTest = fn(&str) -> bool;

/// An object that is being written in parts. Nothing is visible before [`Upload::complete`]; dropping or aborting
/// leaves nothing behind that a later sweep could not see.
#[async_trait]
pub trait Upload: Send {
    /// Adds the next part. Parts are at least 5 MiB and of one size (some servers insist), the last one excepted; the
    /// call returns when the part is accepted for sending, and at most a few parts are in flight over all uploads of
    /// a store (so memory stays bounded). After an error the upload can only be thrown away.
    async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError>;
    /// Makes the object visible and durable, in the place of one that has the name.
    async fn complete(self: Box<Self>) -> Result<(), StoreError>;
    /// Throws the parts away.
    async fn abort(self: Box<Self>) -> Result<(), StoreError>;
}

/// The verbs. Keys are relative (`config`, `lineages/…/packs/…`), of `[A-Za-z0-9._/-]`, with no component that is empty or
/// begins with `.`; every verb refuses others. No key is a folder of another. Every call is bounded in time. [`contract`]
/// holds every store to this text.
#[async_trait]
pub trait Store: Send + Sync + std::fmt::Debug {
    /// For people: `s3://bucket/prefix` or `file:///path`, without secrets.
    fn describe(&self) -> String;
    /// Where it lies on this host, if it does: a directory that nobody else may write into.
    fn directory(&self) -> Option<&Path> {
        None
    }
    /// The whole object; one that is larger than `limit_bytes` is [`StoreError::Large`].
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError>;
    /// Exactly the bytes `range` of the object; a shorter object is [`StoreError::Short`].
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError>;
    /// The object's size.
    async fn size(&self, key: &str) -> Result<u64, StoreError>;
    /// Writes an object whose name nobody else uses (overwriting is harmless because the bytes are the same).
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError>;
    /// Writes the object only if there is none: the one operation that decides anything. Atomic among all hosts. An
    /// error means that the outcome is unknown: the object may be there, or may still appear. Calling again is not
    /// asking again, since a second call takes the first one's object for somebody else's: read the object instead.
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError>;
    /// Does of a [`Store::put_if_absent`] what decides nothing, for a writer whose objects have an order: several are staged at a
    /// time, and then put one after the other. Nothing is visible, and what is dropped leaves nothing behind that
    /// [`Store::uploads`] would not show. A store that decides only what it was `found` to decide does nothing else.
    async fn stage(
        &self,
        key: &str,
        bytes: Bytes,
        found: &Capabilities,
    ) -> Result<Staged, StoreError> {
        let _ = found;
        check_key("put", key)?;
        Ok(Staged::Held(bytes))
    }
    /// As [`Store::put_if_absent`], with what [`Store::stage`] of this store gave for this key.
    async fn put_staged_if_absent(
        &self,
        key: &str,
        staged: Staged,
    ) -> Result<PutOutcome, StoreError> {
        match staged {
            Staged::Held(bytes) => self.put_if_absent(key, bytes).await,
            Staged::Written(_) | Staged::Sent(_) => Err(staged_elsewhere(key)),
        }
    }
    /// Starts an object that is too large for one call.
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError>;
    /// Every object whose key begins with the text `prefix`, sorted by key. Whole, or an error.
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError>;
    /// Whether there is an object below `prefix` with a key behind `after` that is wanted. Where the store can, it begins
    /// there and ends at the first one.
    async fn has_behind(
        &self,
        prefix: &str,
        after: &str,
        is_wanted: KeyTest,
    ) -> Result<bool, StoreError> {
        let all = self.list(prefix).await?;
        Ok(all.iter().any(|object| object.key.as_str() > after && is_wanted(&object.key)))
    }
    /// The names directly below `prefix` (which ends with `/`) that have objects below them, sorted, without `/`.
    /// Never reads what is below them, so that a large repository can be looked at from above.
    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let below = self.list(prefix).await?;
        let names: BTreeSet<String> = below
            .iter()
            .filter_map(|object| object.key.strip_prefix(prefix)?.split_once('/'))
            .map(|(name, _)| name.to_owned())
            .collect();
        Ok(names.into_iter().collect())
    }
    /// Bytes for which there is room; `None` where the store does not tell.
    async fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        Ok(None)
    }
    /// Deletes an object; deleting what is not there succeeds.
    async fn delete(&self, key: &str) -> Result<(), StoreError>;
    /// The keys below `prefix` that have unfinished uploads, sorted, each once. A store in which an unfinished upload leaves
    /// nothing behind has none.
    async fn uploads(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let _ = prefix;
        Ok(Vec::new())
    }
    /// Ends uploads that nobody completes. Returns how many there were. Only uploads whose key is in `keys` (those of
    /// dead attempts) are touched.
    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError>;
}

fn staged_elsewhere(key: &str) -> StoreError {
    StoreError::Unsuitable { reason: format!("{key} was staged in another store") }
}

/// Whether a key is of the kind described at [`Store`].
pub(crate) fn key_is_legal(key: &str) -> bool {
    key.len() <= 900
        && key
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'/'))
        && key.split('/').all(|component| !component.is_empty() && !component.starts_with('.'))
}

/// Refuses a key that is none before anything is touched: keys come from objects too, and these may be forged.
pub(crate) fn check_key(operation: &'static str, key: &str) -> Result<(), StoreError> {
    if key_is_legal(key) {
        return Ok(());
    }
    Err(StoreError::Unavailable {
        operation,
        key: key.to_owned(),
        source: "this is not a key of a repository".into(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_a_legal_key() {
        for key in ["config", "a/b.c/D_-9", "a..b", "-"] {
            assert!(key_is_legal(key), "{key}");
        }
        for key in [
            "",
            "/a",
            "a/",
            "a//b",
            ".",
            "a/./b",
            "../a",
            "a/.b",
            "a b",
            "ä",
            "a\n",
            &"x".repeat(901),
        ] {
            assert!(!key_is_legal(key), "{key}");
        }
    }
}
