//! A store whose conditional writes are not to be trusted, for one program at a time: it looks before it writes, and once
//! more afterwards.
//!
//! Between the look and the write somebody else may come. Nothing here notices that for certain, so what keeps such a
//! repository whole is that nobody else writes to it. Everything that decides nothing passes unchanged.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::layer::Layer;
use super::{PutOutcome, Store, StoreError};

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
impl Layer for SingleWriter {
    fn inner(&self) -> &dyn Store {
        self.inner.as_ref()
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
}
