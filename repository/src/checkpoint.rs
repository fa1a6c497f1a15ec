//! Checkpoints: what an attempt has stored so far, so that the backup after an interrupted one need not store it again.
//!
//! A checkpoint is a hint. No backup needs one, and none is believed about the source: data is read and hashed as ever, and
//! only where it is what the checkpoint knows of the same place is the frame that is there referred to.

use std::cmp::Reverse;
use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use proto::failure::chain;
use proto::{AttemptId, BackupId, LineageId, RepositoryId};
use serde::{Deserialize, Serialize};

use crate::again::again;
use crate::attempt::Doomed;
use crate::collect::CollectOptions;
use crate::error::Error;
use crate::judge::is_older;
use crate::key::Keys;
use crate::layout;
use crate::limits::MANIFEST_BYTES_MAX;
use crate::lineage::{AttemptSummary, Seen};
use crate::manifest::{
    self, Packs, RootShard, check_format, decode_packs, decode_shards, encode_body, encode_shards,
};
use crate::pack::{ObjectType, PackId, PackRecord};
use crate::reader::MetadataReader;
use crate::repository::Repository;
use crate::shard::PackTable;
use crate::store::StoreError;
use crate::wire::{Decoder, Encoder, Malformed};

/// Interrupted attempts that are looked at, the newest first: one that got far counts though a night of short ones followed.
const INTERRUPTED_MAX: usize = 32;
/// Of them, those that are taken over from at once: each is walked beside the new entries.
const TAKEN_OVER_MAX: usize = 4;
/// Checkpoints of one attempt that are tried. There are two when its writer died between putting one and deleting the other.
const NUMBERS_MAX: usize = 3;

/// Whose checkpoint it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CheckpointHead {
    pub(crate) format: u32,
    pub(crate) repository: RepositoryId,
    pub(crate) lineage: LineageId,
    pub(crate) attempt: AttemptId,
    pub(crate) number: u32,
    /// Program and version.
    pub(crate) writer: String,
    /// When it was made by the writer's clock, Unix milliseconds.
    pub(crate) at_ms: i64,
}

/// A checkpoint, opened.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Checkpoint {
    pub(crate) head: CheckpointHead,
    /// Packs that the store had acknowledged: those of content, and those in which the shards are.
    pub(crate) packs: Arc<Packs>,
    /// Entries in order, as far as the attempt had got. Places and shards in other packs than these tell nothing.
    pub(crate) shards: Vec<RootShard>,
}

impl Checkpoint {
    pub(crate) fn encode(&self) -> Result<(Vec<u8>, Vec<u8>), Error> {
        let head = serde_json::to_vec(&self.head)
            .map_err(|error| Error::Bug(format!("write a checkpoint: {error}")))?;
        let mut table = PackTable::default();
        // Also those that no shard lies in.
        let all: BTreeSet<&PackId> = self.packs.keys().collect();
        for pack in all {
            table.index(*pack);
        }
        let mut body = Encoder::default();
        encode_shards(&self.shards, &mut table, &mut body);
        Ok((head, encode_body(&table, &self.packs, body)?))
    }

    pub(crate) fn decode(head: &[u8], body: &[u8]) -> Result<Self, String> {
        let head = serde_json::from_slice(head).map_err(|error| error.to_string())?;
        let lists = || {
            let mut from = Decoder::new(body);
            let (ids, packs) = decode_packs(&mut from)?;
            let shards = decode_shards(&ids, &mut from)?;
            from.end()?;
            Ok((Arc::new(packs), shards))
        };
        let (packs, shards) =
            lists().map_err(|Malformed(what)| format!("its {what} cannot be read"))?;
        Ok(Self { head, packs, shards })
    }

    /// The bytes of the object.
    pub(crate) fn seal(&self, keys: &Keys) -> Result<Bytes, Error> {
        let id = *self.head.attempt.as_bytes();
        manifest::seal(keys, self.head.lineage, ObjectType::Checkpoint, id, self.encode()?)
    }

    fn open(
        keys: &Keys,
        lineage: LineageId,
        attempt: AttemptId,
        number: u32,
        bytes: Vec<u8>,
    ) -> Result<Arc<Self>, Error> {
        let key = layout::checkpoint(lineage, attempt, number);
        let (kind, id) = (ObjectType::Checkpoint, *attempt.as_bytes());
        let (head, body) = manifest::open(keys, lineage, kind, id, &key, bytes)?;
        let opened = Self::decode(&head, &body).map_err(|reason| Error::damaged(&key, reason))?;
        let head = &opened.head;
        let own = head.repository == keys.repository
            && head.lineage == lineage
            && head.attempt == attempt
            && head.number == number;
        if !own {
            return Err(Error::damaged(key, "its head belongs to another checkpoint"));
        }
        check_format(&key, head.format)?;
        Ok(Arc::new(opened))
    }
}

/// The numbers of an attempt's checkpoints, by the names of its objects; the last one first.
pub(crate) fn numbers(names: &[String]) -> Vec<u32> {
    let numbers = names.iter().filter_map(|name| name.strip_prefix("checkpoint.")?.parse().ok());
    let mut numbers: Vec<u32> = numbers.collect();
    numbers.sort_unstable_by_key(|number| Reverse(*number));
    numbers
}

/// An attempt that did not become a backup, and may have stored what the next one needs.
#[derive(Debug)]
pub(crate) struct Interrupted {
    pub(crate) attempt: AttemptId,
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) reader: Arc<MetadataReader>,
    /// Packs of content that may be referred to. They are there, nobody is about to delete them, and none is known to be
    /// damaged.
    pub(crate) packs: Packs,
    /// Something of its metadata could not be read: nothing more of it is asked for.
    lost: AtomicBool,
}

impl Interrupted {
    /// The bytes of the packs that may be referred to.
    pub(crate) fn bytes(&self) -> u64 {
        self.packs.values().map(|pack| pack.size_bytes).sum()
    }

    /// The one that got furthest first, and of the others those that have what none before them has.
    fn furthest_first(mut all: Vec<Self>) -> Vec<Self> {
        all.sort_by_key(|one| Reverse(one.bytes()));
        let mut chosen: Vec<Self> = Vec::new();
        for one in all {
            let is_new = |pack: &PackId| !chosen.iter().any(|other| other.packs.contains_key(pack));
            if chosen.len() < TAKEN_OVER_MAX && one.packs.keys().any(is_new) {
                chosen.push(one);
            }
        }
        chosen
    }

    pub(crate) fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// What was read of it, or nothing where that is not to be had: it costs storage, never the backup.
    pub(crate) fn told<T>(&self, read: Result<Option<T>, Error>) -> Result<Option<T>, Error> {
        match read {
            // If it is the store that is gone, whatever else is asked for will tell.
            Err(error @ (Error::Damaged { .. } | Error::Missing { .. } | Error::Store(_))) => {
                if !self.lost.swap(true, Ordering::Relaxed) {
                    tracing::warn!(
                        "The rest of what attempt {} had stored is stored again: {error}",
                        self.attempt
                    );
                }
                Ok(None)
            }
            read => read,
        }
    }
}

impl Repository {
    /// The last checkpoint of an attempt that can be believed.
    pub(crate) async fn last_checkpoint(
        &self,
        lineage: LineageId,
        attempt: AttemptId,
        numbers: &[u32],
    ) -> Result<Option<Arc<Checkpoint>>, Error> {
        for number in numbers.iter().take(NUMBERS_MAX) {
            let key = layout::checkpoint(lineage, attempt, *number);
            let read = again(|| async {
                match self.store.get(&key, MANIFEST_BYTES_MAX).await {
                    Ok(bytes) => {
                        let opened =
                            Checkpoint::open(&self.keys, lineage, attempt, *number, bytes.into());
                        opened.map(Some)
                    }
                    // The next one took its place since it was listed, or its attempt is over.
                    Err(StoreError::NotFound { .. }) => Ok(None),
                    Err(error) => Err(Error::needed(error)),
                }
            });
            match read.await {
                Ok(None) => {}
                Ok(found) => return Ok(found),
                Err(error) => {
                    let error = self.of_one_object(error).await?;
                    tracing::warn!("{key} counts for nothing: failed to {}", chain(&error));
                }
            }
        }
        Ok(None)
    }

    /// Of these attempts without a COMMIT, the one that stored the most that is there and may be referred to, and others that stored
    /// something else. To be called after `condemned` was read, as for a predecessor: what a collector condemned since that look
    /// it spares for this attempt, whose intent it sees.
    pub(crate) async fn choose_interrupted(
        &self,
        lineage: LineageId,
        mut attempts: Vec<(AttemptId, Vec<u32>)>,
        condemned: &Doomed,
        spoilt: &BTreeSet<PackId>,
    ) -> Result<Vec<Arc<Interrupted>>, Error> {
        if attempts.is_empty() || condemned.all {
            return Ok(Vec::new());
        }
        let listed = self.list_packs(lineage).await?;
        let may_be_used = |record: &PackRecord| {
            listed.get(&record.id) == Some(&record.size_bytes)
                && !spoilt.contains(&record.id)
                && !condemned.packs.contains(&record.id.to_string())
        };
        attempts.sort_unstable_by(|a, b| b.cmp(a));
        let mut chosen: Vec<Interrupted> = Vec::new();
        for (attempt, numbers) in attempts.into_iter().take(INTERRUPTED_MAX) {
            let Some(checkpoint) = self.last_checkpoint(lineage, attempt, &numbers).await? else {
                continue;
            };
            let (content, metadata): (Vec<_>, Vec<_>) =
                checkpoint.packs.values().partition(|record| record.kind == ObjectType::Data);
            // Without its shards it tells nothing, and one that got less far may tell more.
            if !metadata.into_iter().all(may_be_used) {
                continue;
            }
            let records = content.into_iter().filter(|record| may_be_used(record));
            let packs: HashMap<_, _> = records.map(|record| (record.id, record.clone())).collect();
            let reader = MetadataReader::new(self, lineage, Arc::clone(&checkpoint.packs));
            let (reader, lost) = (Arc::new(reader), AtomicBool::new(false));
            chosen.push(Interrupted { attempt, checkpoint, reader, packs, lost });
            chosen = Interrupted::furthest_first(chosen);
        }
        Ok(chosen.into_iter().map(Arc::new).collect())
    }
}

/// An attempt with checkpoints, as a collection sees it.
#[derive(Debug)]
pub(crate) struct Checkpointed {
    attempt: AttemptId,
    numbers: Vec<u32>,
    end: End,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// It is being written, or its writer died.
    Open,
    Aborted,
    Committed,
    /// Its verdict cannot be read.
    Unknown,
}

impl Checkpointed {
    /// Those of these attempts that have checkpoints, the newest first.
    pub(crate) fn among(attempts: &[Seen]) -> Vec<Self> {
        let checkpointed = attempts.iter().filter_map(|seen| {
            let numbers = numbers(&seen.names);
            let end = match &seen.summary {
                Ok(AttemptSummary { verdict: None, .. }) => End::Open,
                Ok(summary) if summary.backup().is_some() => End::Committed,
                Ok(_) => End::Aborted,
                Err(_) => End::Unknown,
            };
            let is_one = !numbers.is_empty();
            is_one.then_some(Self { attempt: seen.attempt, numbers, end })
        });
        let mut checkpointed: Vec<Self> = checkpointed.collect();
        checkpointed.sort_unstable_by_key(|one| Reverse(one.attempt));
        checkpointed
    }
}

/// What a collection does with what interrupted attempts left.
#[derive(Debug, Default)]
pub(crate) struct LeftBehind {
    /// Packs that the next backup may take over.
    pub(crate) packs: HashSet<PackId>,
    /// Checkpoints that no backup will read, by their keys.
    pub(crate) spent: Vec<String>,
}

impl Repository {
    /// What stays for the next backup for a while: what attempts stored that were begun after the newest backup. A courtesy:
    /// whoever takes it over looks himself whether it is there and condemned.
    pub(crate) async fn left_behind(
        &self,
        lineage: LineageId,
        attempts: Vec<Checkpointed>,
        newest: Option<BackupId>,
        options: &CollectOptions,
    ) -> Result<LeftBehind, Error> {
        let mut left = LeftBehind::default();
        let mut looked_at = 0;
        for Checkpointed { attempt, numbers, end } in attempts {
            let may_be_next = matches!(end, End::Open | End::Aborted)
                && newest.is_none_or(|newest| BackupId::from(attempt) > newest)
                && looked_at < INTERRUPTED_MAX;
            if may_be_next {
                looked_at += 1;
                if let Some(last) = self.last_checkpoint(lineage, attempt, &numbers).await?
                    && !is_older(last.head.at_ms, options.now_ms, options.grace_ms)
                {
                    left.packs.extend(last.packs.keys());
                    continue;
                }
            }
            // The writer of an open one may live, and deletes them itself.
            if matches!(end, End::Aborted | End::Committed) {
                let keys =
                    numbers.iter().map(|number| layout::checkpoint(lineage, attempt, *number));
                left.spent.extend(keys);
            }
        }
        Ok(left)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn garbage_never_panics(bytes: Vec<u8>) {
            let _ = Checkpoint::decode(b"{}", &bytes);
        }
    }

    #[test]
    fn the_last_number_comes_first() {
        let names = ["checkpoint.9", "intent", "checkpoint.10", "checkpoint.x"].map(str::to_owned);
        assert_eq!(numbers(&names), [10, 9]);
    }
}
