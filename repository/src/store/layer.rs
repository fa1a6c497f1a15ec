//! A store that stands before another one and changes some of its verbs.

use std::ops::Range;
use std::path::Path;

use async_trait::async_trait;
use bytes::Bytes;

use super::{KeyTest, Listed, PutOutcome, Store, StoreError, Upload};

/// What a layer changes; every verb that it does not write anew goes through as it is. Each layer is a [`Store`].
///
/// What is staged is held in memory, so that it passes through `put_if_absent` of every layer.
///
/// One that counts or refuses calls of `list` has to say what `list_directories` and `has_behind` do: they do not pass through
/// `list`.
#[async_trait]
pub trait Layer: Send + Sync + std::fmt::Debug {
    /// The store behind it.
    fn inner(&self) -> &dyn Store;
    /// As [`Store::describe`].
    fn describe(&self) -> String {
        self.inner().describe()
    }
    /// As [`Store::directory`].
    fn directory(&self) -> Option<&Path> {
        self.inner().directory()
    }
    /// As [`Store::get`].
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.inner().get(key, limit_bytes).await
    }
    /// As [`Store::get_range`].
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.inner().get_range(key, range).await
    }
    /// As [`Store::size`].
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.inner().size(key).await
    }
    /// As [`Store::put`].
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.inner().put(key, bytes).await
    }
    /// As [`Store::put_if_absent`].
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        self.inner().put_if_absent(key, bytes).await
    }
    /// As [`Store::upload`].
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.inner().upload(key).await
    }
    /// As [`Store::list`].
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.inner().list(prefix).await
    }
    /// As [`Store::has_behind`].
    async fn has_behind(
        &self,
        prefix: &str,
        after: &str,
        is_wanted: KeyTest,
    ) -> Result<bool, StoreError> {
        self.inner().has_behind(prefix, after, is_wanted).await
    }
    /// As [`Store::list_directories`].
    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.inner().list_directories(prefix).await
    }
    /// As [`Store::free_bytes`].
    async fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        self.inner().free_bytes().await
    }
    /// As [`Store::delete`].
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        self.inner().delete(key).await
    }
    /// As [`Store::uploads`].
    async fn uploads(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.inner().uploads(prefix).await
    }
    /// As [`Store::abort_uploads`].
    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError> {
        self.inner().abort_uploads(keys).await
    }
}

#[async_trait]
impl<L: Layer> Store for L {
    fn describe(&self) -> String {
        Layer::describe(self)
    }
    fn directory(&self) -> Option<&Path> {
        Layer::directory(self)
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        Layer::get(self, key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        Layer::get_range(self, key, range).await
    }
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        Layer::size(self, key).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        Layer::put(self, key, bytes).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        Layer::put_if_absent(self, key, bytes).await
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        Layer::upload(self, key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        Layer::list(self, prefix).await
    }
    async fn has_behind(
        &self,
        prefix: &str,
        after: &str,
        is_wanted: KeyTest,
    ) -> Result<bool, StoreError> {
        Layer::has_behind(self, prefix, after, is_wanted).await
    }
    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        Layer::list_directories(self, prefix).await
    }
    async fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        Layer::free_bytes(self).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        Layer::delete(self, key).await
    }
    async fn uploads(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        Layer::uploads(self, prefix).await
    }
    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError> {
        Layer::abort_uploads(self, keys).await
    }
}
