//! A store whose conditional writes are not to be trusted, for one program at a time: it looks before it writes, and once
//! more afterwards.
//!
//! Between the look and the write somebody else may come. Nothing here notices that for certain, so what keeps such a
//! repository whole is that nobody else writes to it. Everything that decides nothing passes unchanged.

use std::ops::Range;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{Listed, PutOutcome, Store, StoreError, Upload};

/// A store that is written by one program at a time.
#[derive(Debug)]
pub struct SingleWriter {
    inner: Arc<dyn Store>,
}

impl SingleWriter {
    /// The same store, without its conditional writes.
    pub fn over(inner: Arc<dyn Store>) -> Self {
        Self { inner }
    }
}

#[async_trait]
impl Store for SingleWriter {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.inner.get(key, limit_bytes).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.inner.size(key).await
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.inner.put(key, bytes).await
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        match self.inner.size(key).await {
            Ok(_) => return Ok(PutOutcome::Exists),
            Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        self.inner.put(key, bytes.clone()).await?;
        // Of two that wrote all the same, the one that is read has won.
        let there = self.inner.get(key, self.inner.size(key).await?).await?;
        Ok(if there == bytes { PutOutcome::Created } else { PutOutcome::Exists })
    }

    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.inner.upload(key).await
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.inner.list(prefix).await
    }

    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.inner.list_directories(prefix).await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner.delete(key).await
    }

    async fn uploads(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.inner.uploads(prefix).await
    }

    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError> {
        self.inner.abort_uploads(keys).await
    }
}
