//! A store in memory that lets others have a turn before each call, so that a test can choose the order of the calls of several.

#![expect(unreachable_pub, reason = "each test binary uses another part of this")]
#![expect(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use async_trait::async_trait;
use bytes::Bytes;
use repository::store::{Listed, PutOutcome, Store, StoreError, Upload};

#[derive(Debug, Default)]
pub struct Memory(Arc<Mutex<BTreeMap<String, Bytes>>>);

impl Memory {
    /// With what a directory holds.
    pub fn of(directory: &Path) -> Self {
        let memory = Self::default();
        for file in crate::common::files_below(directory) {
            let key = file.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
            let content = std::fs::read(&file).unwrap();
            memory.0.lock().unwrap().insert(key, content.into());
        }
        memory
    }

    /// Another one with the same objects.
    pub fn copy(&self) -> Arc<Self> {
        let objects = self.0.lock().unwrap().clone();
        Arc::new(Self(Arc::new(Mutex::new(objects))))
    }
}

/// Ready when it is asked for the second time.
async fn turn() {
    let mut had = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut had, true) {
            return Poll::Ready(());
        }
        // Where a runtime asks, it need not be told whose turn it is.
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

#[async_trait]
impl Store for Memory {
    fn describe(&self) -> String {
        "memory".to_owned()
    }
    async fn get(&self, key: &str, _: u64) -> Result<Bytes, StoreError> {
        turn().await;
        let found = self.0.lock().unwrap().get(key).cloned();
        found.ok_or_else(|| StoreError::NotFound { key: key.to_owned() })
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        let whole = self.get(key, u64::MAX).await?;
        Ok(whole.slice(usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap()))
    }
    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        Ok(self.get(key, u64::MAX).await?.len() as u64)
    }
    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        turn().await;
        self.0.lock().unwrap().insert(key.to_owned(), bytes);
        Ok(())
    }
    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        turn().await;
        let mut objects = self.0.lock().unwrap();
        if objects.contains_key(key) {
            return Ok(PutOutcome::Exists);
        }
        objects.insert(key.to_owned(), bytes);
        Ok(PutOutcome::Created)
    }
    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        turn().await;
        let (objects, key) = (Arc::clone(&self.0), key.to_owned());
        Ok(Box::new(Parts { objects, key, bytes: Vec::new() }))
    }
    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        turn().await;
        let objects = self.0.lock().unwrap();
        let below = objects.iter().filter(|(key, _)| key.starts_with(prefix));
        Ok(below
            .map(|(key, bytes)| Listed { key: key.clone(), size_bytes: bytes.len() as u64 })
            .collect())
    }
    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        turn().await;
        self.0.lock().unwrap().remove(key);
        Ok(())
    }
    async fn abort_uploads(&self, _: &[String]) -> Result<usize, StoreError> {
        Ok(0)
    }
}

struct Parts {
    objects: Arc<Mutex<BTreeMap<String, Bytes>>>,
    key: String,
    bytes: Vec<u8>,
}

#[async_trait]
impl Upload for Parts {
    async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        turn().await;
        self.bytes.extend_from_slice(&bytes);
        Ok(())
    }
    async fn complete(self: Box<Self>) -> Result<(), StoreError> {
        turn().await;
        let Self { objects, key, bytes } = *self;
        objects.lock().unwrap().insert(key, bytes.into());
        Ok(())
    }
    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Runs what only waits for its turn, alone.
pub fn alone<T>(work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    loop {
        if let Poll::Ready(done) = work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            return done;
        }
    }
}

/// Somebody's work, which goes on when it is told to.
pub struct Acting<'w, T> {
    work: Option<Pin<Box<dyn Future<Output = T> + 'w>>>,
    ended: Option<T>,
    /// Steps that it took.
    pub steps: usize,
}

impl<'w, T> Acting<'w, T> {
    pub fn new(work: impl Future<Output = T> + 'w) -> Self {
        Self { work: Some(Box::pin(work)), ended: None, steps: 0 }
    }

    /// One call of the store further; what it does at the same time, one call each. `false` when it has ended.
    pub fn step(&mut self) -> bool {
        let Some(work) = &mut self.work else { return false };
        self.steps += 1;
        if let Poll::Ready(ended) = work.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            (self.ended, self.work) = (Some(ended), None);
        }
        true
    }

    /// Goes on to the end.
    pub fn end(&mut self) {
        while self.step() {}
    }

    /// What came of it.
    pub fn ended(self) -> T {
        self.ended.unwrap()
    }
}
