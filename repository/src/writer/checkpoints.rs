//! Checkpoints of a running copy: every so often what it has stored is written down beside its intent, so that the attempt
//! after an interrupted one need not store it again.
//!
//! One is on its way at a time, beside the copy. That one cannot be stored is told and harms nothing.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use proto::{AttemptId, LineageId};

use super::stream::Uploads;
use crate::checkpoint::{Checkpoint, CheckpointHead, Interrupted};
use crate::error::Error;
use crate::layout;
use crate::manifest::{FORMAT, Packs, RootShard};
use crate::pack::{ObjectType, PackId};
use crate::shard::ShardRef;

/// So many bytes are worth a checkpoint whatever the time.
const WORTH_BYTES: u64 = 1 << 30;
/// And this part of what was done already: each checkpoint ends a pack of metadata, and a long backup shall not have thousands.
const WORTH_PART: u32 = 32;

/// Writes down what a copy has stored.
#[derive(Debug)]
pub(super) struct Checkpoints {
    uploads: Arc<Uploads>,
    attempt: AttemptId,
    /// By the writer's clock, Unix milliseconds, when `began`.
    began_at_ms: i64,
    began: Instant,
    every: Duration,
    /// What it takes over is part of what it has.
    interrupted: Vec<Arc<Interrupted>>,
    last: Instant,
    last_bytes: u64,
    number: u32,
}

impl Checkpoints {
    pub(super) fn new(
        uploads: Arc<Uploads>,
        attempt: AttemptId,
        began_at_ms: i64,
        every: Duration,
        interrupted: Vec<Arc<Interrupted>>,
    ) -> Self {
        let began = Instant::now();
        let (last, last_bytes, number) = (began, 0, 0);
        Self { uploads, attempt, began_at_ms, began, every, interrupted, last, last_bytes, number }
    }

    /// Whether it is time. There must be something new, and the one before must have arrived.
    pub(super) fn are_due(&self) -> bool {
        let all = self.uploads.content_bytes();
        let new = all - self.last_bytes;
        let is_much = new >= WORTH_BYTES.max(all / u64::from(WORTH_PART));
        let is_long = self.last.elapsed() >= self.every.max(self.began.elapsed() / WORTH_PART);
        new > 0 && (is_much || is_long) && !self.uploads.is_checkpointing()
    }

    /// Whether one is worth while when everything is copied and the rest may take long.
    pub(super) fn are_due_at_the_end(&self) -> bool {
        let is_long = self.began.elapsed() >= self.every;
        let is_much = self.uploads.content_bytes() >= WORTH_BYTES;
        let has_content = !self.uploads.begun(ObjectType::Data).is_empty();
        has_content && (self.number > 0 || is_long || is_much)
    }

    /// Writes down these shards once what they stand in is stored, and at the end also what they describe. Returns at once.
    pub(super) fn put(&mut self, shards: Vec<RootShard>, is_end: bool) {
        let mut first = self.uploads.begun(ObjectType::Metadata);
        if is_end {
            first.append(&mut self.uploads.begun(ObjectType::Data));
        }
        self.last = Instant::now();
        self.last_bytes = self.uploads.content_bytes();
        self.number += 1;
        let elapsed_ms = i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX);
        let draft = Draft {
            attempt: self.attempt,
            number: self.number,
            at_ms: self.began_at_ms.saturating_add(elapsed_ms),
            shards,
            first,
            interrupted: self.interrupted.clone(),
        };
        self.uploads.checkpointing(draft.store(Arc::clone(&self.uploads)));
    }
}

/// A checkpoint that waits for packs.
struct Draft {
    attempt: AttemptId,
    number: u32,
    at_ms: i64,
    shards: Vec<RootShard>,
    first: Vec<PackId>,
    interrupted: Vec<Arc<Interrupted>>,
}

impl Draft {
    async fn store(self, uploads: Arc<Uploads>) {
        let (attempt, number) = (self.attempt, self.number);
        let last = uploads.last_checkpoint();
        match self.put(&uploads).await {
            Ok(()) => uploads.has_checkpoint(number),
            // The end has a cause, and whoever fills the packs knows it.
            Err(Error::Cancelled) => return,
            Err(error) => {
                let error = proto::failure::chain(&error);
                tracing::warn!(
                    error,
                    "Attempt {attempt} goes on without a new checkpoint: were it interrupted now, what it stored since \
                     the last one would be stored again"
                );
                return;
            }
        }
        // Also those since the last one that are said not to have been stored: who knows.
        for before in last.unwrap_or(1)..number {
            let before = layout::checkpoint(uploads.lineage, attempt, before);
            // A collection takes what is left.
            if let Err(error) = uploads.store.delete(&before).await {
                tracing::debug!("{before} stays until a collection: {error}");
            }
        }
    }

    async fn put(self, uploads: &Uploads) -> Result<(), Error> {
        let stored = uploads.once_stored(&self.first).await?;
        let key = layout::checkpoint(uploads.lineage, self.attempt, self.number);
        let (keys, lineage) = (Arc::clone(&uploads.keys), uploads.lineage);
        let sealing = tokio::task::spawn_blocking(move || {
            self.checkpoint(keys.repository, lineage, &stored).seal(&keys)
        });
        let gone = |gone| Err(Error::Bug(format!("sealing a checkpoint ended: {gone}")));
        uploads.store.put(&key, sealing.await.unwrap_or_else(gone)?).await?;
        Ok(())
    }

    /// What is stored of it: packs of content that the shards reach, and the shards whose packs are there.
    fn checkpoint(
        self,
        repository: proto::RepositoryId,
        lineage: LineageId,
        stored: &Packs,
    ) -> Checkpoint {
        let is_metadata = |pack: &PackId| {
            stored.get(pack).is_some_and(|record| record.kind == ObjectType::Metadata)
        };
        let mut reached: HashSet<PackId> = HashSet::new();
        let mut shards = Vec::with_capacity(self.shards.len());
        for RootShard { first_path, shard } in self.shards {
            reached.extend(shard.packs.iter().copied());
            if is_metadata(&shard.frame.pack) {
                // Which packs it reaches stands in the list of packs; here are only those that are there.
                let packs = [shard.frame.pack].into();
                shards.push(RootShard { first_path, shard: ShardRef { packs, ..shard } });
            }
        }
        let record = |pack: &PackId| {
            let taken_over = || self.interrupted.iter().find_map(|one| one.packs.get(pack));
            stored.get(pack).or_else(taken_over)
        };
        let packs: Packs = reached
            .iter()
            .filter_map(record)
            .filter(|record| matches!(record.kind, ObjectType::Data | ObjectType::Metadata))
            .map(|record| (record.id, record.clone()))
            .collect();
        let head = CheckpointHead {
            format: FORMAT,
            repository,
            lineage,
            attempt: self.attempt,
            number: self.number,
            writer: concat!("pgmuster ", env!("CARGO_PKG_VERSION")).to_owned(),
            at_ms: self.at_ms,
        };
        Checkpoint { head, packs: Arc::new(packs), shards }
    }
}
