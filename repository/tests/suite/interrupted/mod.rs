//! A store that is interrupted: by somebody else's turn, or by death.

#![expect(unreachable_pub, reason = "each test binary uses another part of this")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::Bytes;
use repository::store::directory::DirectoryStore;
use repository::store::layer::Layer;
use repository::store::{Listed, PutOutcome, Store, StoreError, Upload};

pub type Turn = std::pin::Pin<Box<dyn Future<Output = ()> + Send>>;

/// A store in which somebody else has a turn, or everything fails, from the n-th call on.
pub struct Interrupted {
    inner: Arc<dyn Store>,
    /// Calls that are left before it happens; negative when it never does.
    left: AtomicI64,
    /// Has its turn in between; `None` lets this call and all after it fail, as for a process that died.
    turn: Mutex<Option<Turn>>,
    dead: AtomicBool,
    /// It dies after a deletion was done and before it heard of it.
    pub deletes_first: AtomicBool,
}

impl std::fmt::Debug for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Interrupted")
    }
}

impl Interrupted {
    pub fn new(path: &std::path::Path) -> Self {
        Self::over(Arc::new(DirectoryStore::new(path)))
    }

    pub fn over(inner: Arc<dyn Store>) -> Self {
        Self {
            inner,
            left: (-1).into(),
            turn: Mutex::default(),
            dead: false.into(),
            deletes_first: false.into(),
        }
    }

    /// After `calls` more calls it happens.
    pub fn after(&self, calls: i64, turn: Option<Turn>) {
        self.dead.store(false, Ordering::SeqCst);
        *self.turn.lock().unwrap() = turn;
        self.left.store(calls, Ordering::SeqCst);
    }

    /// Whether it has not happened.
    pub fn is_left(&self) -> bool {
        self.left.swap(-1, Ordering::SeqCst) >= 0
    }

    async fn call(&self) -> Result<(), StoreError> {
        if self.dead.load(Ordering::SeqCst) {
            return Err(dead());
        }
        if self.left.load(Ordering::SeqCst) >= 0 && self.left.fetch_sub(1, Ordering::SeqCst) == 0 {
            let turn = self.turn.lock().unwrap().take();
            let Some(turn) = turn else {
                self.dead.store(true, Ordering::SeqCst);
                return Err(dead());
            };
            turn.await;
        }
        Ok(())
    }
}

fn dead() -> StoreError {
    StoreError::Unavailable { operation: "reach", key: "x".into(), source: "it died".into() }
}

#[async_trait]
impl Layer for Interrupted {
    fn inner(&self) -> &dyn Store {
        self.inner.as_ref()
    }
    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        self.call().await?;
        self.inner.get(key, limit_bytes).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.call().await?;
        self.inner.get_range(key, range).await
    }
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        self.call().await?;
        self.inner.size(key).await
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        self.call().await?;
        self.inner.put(key, bytes).await
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        self.call().await?;
        self.inner.put_if_absent(key, bytes).await
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        self.call().await?;
        self.inner.upload(key).await
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        self.call().await?;
        self.inner.list(prefix).await
    }
    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        self.call().await?;
        self.inner.list_directories(prefix).await
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        if self.deletes_first.load(Ordering::SeqCst) && !self.dead.load(Ordering::SeqCst) {
            self.inner.delete(key).await?;
        }
        self.call().await?;
        self.inner.delete(key).await
    }
}
