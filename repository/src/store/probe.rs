//! Finding out what a store really honours before anything is entrusted to it: many servers that speak S3, and some
//! network file systems, accept a condition and ignore it. It leaves nothing behind and judges no speed.

use std::sync::Arc;

use bytes::Bytes;
use futures::future::{join, join_all};
use serde::{Deserialize, Serialize};

use super::single::SingleWriter;
use super::{PutOutcome, Staged, Store, StoreError};
use crate::{chance, hex};

/// Creators in one race.
const RACERS: u8 = 8;

/// Races that must each have exactly one winner.
const RACES: u8 = 3;

/// So much that a store sends it before its turn.
const STAGED_BYTES: usize = 256 << 10;

/// The least part of an upload that is not its last.
const PART_BYTES: usize = 5 * 1024 * 1024;

/// What a store was seen to honour. That creating is atomic, that ranges are exact and that uploads work is not among
/// it: without these there is no repository (without the first, none but one for a single writer), and [`probe`] fails. A
/// repository keeps it in its config; what is absent there was not seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
#[expect(clippy::struct_excessive_bools, reason = "independent findings, each with a name")]
pub struct Capabilities {
    /// Races of eight creators that had exactly one winner: all that were run; none for a single writer.
    pub races_with_one_winner: u8,
    /// An object is listed as soon as it was put.
    pub list_after_put: bool,
    /// An object is no longer listed once it was deleted; false also when nothing may be deleted.
    pub list_after_delete: bool,
    /// These credentials may delete.
    pub deletes: bool,
    /// Unfinished uploads can be found by key and ended. False for a directory, which needs no such sweep.
    pub ends_uploads: bool,
    /// Races of objects that were sent before their turn with others had exactly one winner. Where this was not seen, nothing is
    /// sent before its turn; false for a directory, where nothing has to be.
    pub completes_if_absent: bool,
}

/// Tries the store below a name of its own, and cleans up whatever the outcome.
pub async fn probe(store: &dyn Store) -> Result<Capabilities, StoreError> {
    probe_for(store, RACES).await
}

/// The same for a repository that one program writes at a time: whether the store decides between several is not tried.
pub async fn probe_for_a_single_writer(store: Arc<dyn Store>) -> Result<Capabilities, StoreError> {
    probe_for(&SingleWriter::over(store), 0).await
}

async fn probe_for(store: &dyn Store, races: u8) -> Result<Capabilities, StoreError> {
    let below = format!("probe/{}", hex::encode(&chance::random::<16>()));
    let found = attempt(store, &below, races).await;
    let swept = sweep(store, &below).await;
    match found {
        Ok(found) if found.deletes => swept.map(|()| found),
        found => found,
    }
}

async fn attempt(store: &dyn Store, below: &str, races: u8) -> Result<Capabilities, StoreError> {
    creates_once(store, below).await?;
    one_creator_wins(store, below, races).await?;
    reads_ranges(store, below).await?;
    let ends_uploads = uploads(store, below).await?;
    // Nothing but speed hangs on it.
    let completes_if_absent = ends_uploads
        && stages(store, below, races).await.unwrap_or_else(|error| {
            tracing::warn!("WAL will not be sent to {} before its turn: {error}", store.describe());
            false
        });

    let key = format!("{below}/listed");
    let is_listed = async || {
        store.list(&format!("{below}/")).await.map(|rows| rows.iter().any(|row| row.key == key))
    };
    store.put(&key, Bytes::from_static(b"listed")).await?;
    let list_after_put = is_listed().await?;
    let deletes = match store.delete(&key).await {
        Ok(()) => true,
        Err(StoreError::Forbidden { .. }) => false,
        Err(error) => return Err(error),
    };
    let list_after_delete = deletes && !is_listed().await?;

    Ok(Capabilities {
        races_with_one_winner: races,
        list_after_put,
        list_after_delete,
        deletes,
        ends_uploads,
        completes_if_absent,
    })
}

/// The second of two creators, one after the other, must lose and change nothing.
async fn creates_once(store: &dyn Store, below: &str) -> Result<(), StoreError> {
    let key = format!("{below}/created");
    let (first, second) = (Bytes::from_static(b"first"), Bytes::from_static(b"second"));
    if store.put_if_absent(&key, first.clone()).await? != PutOutcome::Created {
        return Err(unsuitable(store, "says that a new object existed before"));
    }
    let outcome = store.put_if_absent(&key, second).await?;
    let kept = store.get(&key, 100).await? == first;
    match (outcome, kept) {
        (PutOutcome::Exists, true) => Ok(()),
        (PutOutcome::Created, _) => Err(undecided(
            store,
            "ignores the condition of a write (If-None-Match: *): it let a second writer replace the first one's object, so \
             two attempts could both commit",
        )),
        (PutOutcome::Exists, false) => Err(undecided(
            store,
            "says that a second writer lost, and yet replaced the first one's object",
        )),
    }
}

/// Of creators at the same time exactly one must win.
async fn one_creator_wins(store: &dyn Store, below: &str, races: u8) -> Result<(), StoreError> {
    for race in 0..races {
        let key = format!("{below}/raced.{race}");
        let racers = (0..RACERS).map(|racer| store.put_if_absent(&key, Bytes::from(vec![racer])));
        let mut winners = Vec::new();
        for (racer, outcome) in (0..RACERS).zip(join_all(racers).await) {
            if outcome? == PutOutcome::Created {
                winners.push(racer);
            }
        }
        if winners.len() != 1 || store.get(&key, 1).await? != winners {
            return Err(undecided(
                store,
                &format!(
                    "does not decide between writers at the same time: {} of {RACERS} were told that they created one \
                     object, so two attempts could both commit",
                    winners.len()
                ),
            ));
        }
    }
    Ok(())
}

/// A range must be exactly what was asked for.
async fn reads_ranges(store: &dyn Store, below: &str) -> Result<(), StoreError> {
    let key = format!("{below}/read");
    let bytes = Bytes::from((0..=255).collect::<Vec<u8>>());
    store.put(&key, bytes.clone()).await?;
    for range in [0..256_usize, 0..1, 255..256, 100..200] {
        if store.get_range(&key, range.start as u64..range.end as u64).await? != bytes[range] {
            return Err(unsuitable(
                store,
                "answers a range read with other bytes than those asked for",
            ));
        }
    }
    Ok(())
}

/// An upload must become the object; whether unfinished ones can be ended is told.
async fn uploads(store: &dyn Store, below: &str) -> Result<bool, StoreError> {
    let key = format!("{below}/uploaded");
    let (first, last) = (Bytes::from(vec![1; PART_BYTES]), Bytes::from_static(b"end"));
    let mut upload = store.upload(&key).await?;
    upload.part(first.clone()).await?;
    upload.part(last).await?;
    upload.complete().await?;
    let size = PART_BYTES as u64 + 3;
    if store.size(&key).await? != size
        || store.get_range(&key, size - 4..size).await? != b"\x01end"[..]
    {
        return Err(unsuitable(store, "does not make an upload's parts into the object"));
    }

    let unfinished = format!("{below}/unfinished");
    let mut upload = store.upload(&unfinished).await?;
    upload.part(first).await?;
    let ended = match store.abort_uploads(std::slice::from_ref(&unfinished)).await {
        Ok(ended) => Ok(ended > 0),
        // Not known to the store, or not allowed to these credentials: a lifecycle rule has to do it.
        Err(StoreError::Unsuitable { .. } | StoreError::Forbidden { .. }) => Ok(false),
        Err(error) => Err(error),
    };
    upload.abort().await?;
    ended
}

/// Whether of objects that were sent before their turn and of others, put at the same time, exactly one wins. False where nothing
/// is sent before its turn.
async fn stages(store: &dyn Store, below: &str, races: u8) -> Result<bool, StoreError> {
    let tried =
        Capabilities { completes_if_absent: true, ends_uploads: true, ..Capabilities::default() };
    for race in 0..races {
        let key = format!("{below}/staged.{race}");
        let object = |racer| Bytes::from(vec![racer; STAGED_BYTES]);
        let mut staged = Vec::new();
        for racer in 0..RACERS / 2 {
            staged.push(store.stage(&key, object(racer), &tried).await?);
        }
        if !staged.iter().all(|staged| matches!(staged, Staged::Sent(_))) {
            return Ok(false);
        }
        let staged = staged.into_iter().map(|staged| store.put_staged_if_absent(&key, staged));
        let others = (RACERS / 2..RACERS).map(|racer| store.put_if_absent(&key, object(racer)));
        let mut winners = Vec::new();
        let (staged, others) = join(join_all(staged), join_all(others)).await;
        for (racer, outcome) in (0..RACERS).zip(staged.into_iter().chain(others)) {
            if outcome? == PutOutcome::Created {
                winners.push(racer);
            }
        }
        let [winner] = winners[..] else { return Ok(false) };
        if store.get(&key, STAGED_BYTES as u64).await? != object(winner) {
            return Ok(false);
        }
    }
    Ok(races > 0)
}

/// Deletes what the probe wrote; where deleting is forbidden, what it wrote stays.
async fn sweep(store: &dyn Store, below: &str) -> Result<(), StoreError> {
    for row in store.list(&format!("{below}/")).await? {
        store.delete(&row.key).await?;
    }
    Ok(())
}

/// What it lacks can be lived with where nobody else writes.
fn undecided(store: &dyn Store, what: &str) -> StoreError {
    StoreError::Unsuitable {
        reason: format!(
            "{} {what}; a repository cannot be kept there, except one for a single program at a time \
             (`pgmuster repo init URL --key FILE --single-writer`)",
            store.describe()
        ),
    }
}

fn unsuitable(store: &dyn Store, what: &str) -> StoreError {
    StoreError::Unsuitable {
        reason: format!("{} {what}; a repository cannot be kept there", store.describe()),
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;
    use tokio::sync::Barrier;

    use async_trait::async_trait;

    use super::*;
    use crate::store::directory::DirectoryStore;
    use crate::store::layer::Layer;
    use crate::store::{Listed, Upload};

    /// How a store may betray.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        IgnoresTheCondition,
        LooksThenWrites,
        ReplacesAndDenies,
        IgnoresTheRange,
        LosesTheLastPart,
        ListsLate,
        ListsTheDead,
        MayNotDelete,
    }

    /// A directory with one fault.
    #[derive(Debug)]
    struct Faulty {
        inner: DirectoryStore,
        fault: Fault,
        looked: Barrier,
    }

    impl Faulty {
        async fn look_then_write(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
            let exists = self.inner.size(key).await.is_ok();
            if key.contains("/raced.") {
                // All who race look before the first of them writes.
                self.looked.wait().await;
            }
            if !exists {
                self.inner.put(key, bytes).await?;
            }
            Ok(if exists { PutOutcome::Exists } else { PutOutcome::Created })
        }
    }

    #[async_trait]
    impl Layer for Faulty {
        fn inner(&self) -> &dyn Store {
            &self.inner
        }
        async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
            let length = range.end - range.start;
            let range = if self.fault == Fault::IgnoresTheRange { 0..length } else { range };
            self.inner.get_range(key, range).await
        }
        async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
            match self.fault {
                Fault::IgnoresTheCondition => {
                    self.inner.put(key, bytes).await.map(|()| PutOutcome::Created)
                }
                Fault::ReplacesAndDenies => {
                    let existed = self.inner.size(key).await.is_ok();
                    self.inner.put(key, bytes).await?;
                    Ok(if existed { PutOutcome::Exists } else { PutOutcome::Created })
                }
                Fault::LooksThenWrites => self.look_then_write(key, bytes).await,
                _ => self.inner.put_if_absent(key, bytes).await,
            }
        }
        async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
            let inner = self.inner.upload(key).await?;
            Ok(if self.fault == Fault::LosesTheLastPart {
                Box::new(Forgetful { inner, parts: 0 })
            } else {
                inner
            })
        }
        async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
            let mut rows = self.inner.list(prefix).await?;
            let key = format!("{prefix}listed");
            match self.fault {
                Fault::ListsLate => rows.retain(|row| row.key != key),
                Fault::ListsTheDead if rows.iter().all(|row| row.key != key) => {
                    rows.push(Listed { key, size_bytes: 6 });
                }
                _ => {}
            }
            Ok(rows)
        }
        async fn delete(&self, key: &str) -> Result<(), StoreError> {
            if self.fault == Fault::MayNotDelete {
                return Err(StoreError::Forbidden {
                    operation: "delete",
                    key: key.to_owned(),
                    source: "AccessDenied".into(),
                });
            }
            self.inner.delete(key).await
        }
    }

    struct Forgetful {
        inner: Box<dyn Upload>,
        parts: usize,
    }

    #[async_trait]
    impl Upload for Forgetful {
        async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError> {
            self.parts += 1;
            if self.parts == 1 { self.inner.part(bytes).await } else { Ok(()) }
        }
        async fn complete(self: Box<Self>) -> Result<(), StoreError> {
            self.inner.complete().await
        }
        async fn abort(self: Box<Self>) -> Result<(), StoreError> {
            self.inner.abort().await
        }
    }

    async fn probe_with(fault: Fault) -> (Result<Capabilities, StoreError>, usize) {
        let directory = tempfile::tempdir().unwrap();
        let store = Faulty {
            inner: DirectoryStore::new(directory.path()),
            fault,
            looked: Barrier::new(RACERS.into()),
        };
        let found = probe(&store).await;
        let left = store.inner.list("probe/").await.unwrap().len();
        (found, left)
    }

    #[tokio::test]
    async fn a_directory_passes_and_is_left_clean() {
        let directory = tempfile::tempdir().unwrap();
        let store = DirectoryStore::new(directory.path());
        let found = probe(&store).await.unwrap();
        assert_eq!(
            found,
            Capabilities {
                races_with_one_winner: 3,
                list_after_put: true,
                list_after_delete: true,
                deletes: true,
                ends_uploads: false,
                completes_if_absent: false,
            }
        );
        assert_eq!(store.list("").await.unwrap(), []);
        let stored = serde_json::to_string(&found).unwrap();
        assert_eq!(serde_json::from_str::<Capabilities>(&stored).unwrap(), found);
    }

    #[tokio::test]
    async fn a_store_that_could_commit_twice_or_read_wrong_is_refused() {
        for (fault, says) in [
            (Fault::IgnoresTheCondition, "ignores the condition of a write"),
            (Fault::LooksThenWrites, "8 of 8 were told that they created"),
            (Fault::ReplacesAndDenies, "and yet replaced"),
            (Fault::IgnoresTheRange, "other bytes than those asked for"),
            (Fault::LosesTheLastPart, "does not make an upload's parts into the object"),
        ] {
            let (found, left) = probe_with(fault).await;
            let Err(StoreError::Unsuitable { reason }) = &found else {
                panic!("{fault:?}: {found:?}")
            };
            assert!(reason.contains(says) && reason.starts_with("file://"), "{fault:?}: {reason}");
            assert_eq!(left, 0, "{fault:?} left objects");
        }
    }

    #[tokio::test]
    async fn a_store_that_does_not_decide_will_do_for_a_single_writer() {
        for (fault, is_suitable) in [
            (Fault::IgnoresTheCondition, true),
            (Fault::LooksThenWrites, true),
            (Fault::ReplacesAndDenies, true),
            (Fault::IgnoresTheRange, false),
            (Fault::LosesTheLastPart, false),
        ] {
            let directory = tempfile::tempdir().unwrap();
            let store = Arc::new(Faulty {
                inner: DirectoryStore::new(directory.path()),
                fault,
                looked: Barrier::new(RACERS.into()),
            });
            let found = probe_for_a_single_writer(Arc::<Faulty>::clone(&store)).await;
            assert_eq!(found.as_ref().is_ok(), is_suitable, "{fault:?}: {found:?}");
            if let Ok(found) = found {
                assert_eq!(found.races_with_one_winner, 0, "{fault:?}");
                assert!(
                    !found.completes_if_absent,
                    "{fault:?}: nothing may be sent before its turn"
                );
            }
            assert_eq!(store.inner.list("").await.unwrap(), [], "{fault:?} left objects");
        }
    }

    #[tokio::test]
    async fn a_weakness_that_can_be_lived_with_is_told() {
        let found = async |fault| probe_with(fault).await.0.unwrap();
        assert!(!found(Fault::ListsLate).await.list_after_put);
        assert!(!found(Fault::ListsTheDead).await.list_after_delete);
        let kept = found(Fault::MayNotDelete).await;
        assert!(!kept.deletes && !kept.list_after_delete && kept.list_after_put);
    }
}
