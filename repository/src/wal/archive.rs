//! Storing, fetching and listing.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use proto::wal::{History, SegmentName, WalFileName, is_segment_size};
use proto::{LineageId, Timeline};

use super::inventory::{TimelineWal, WalInventory};
use super::object::{self, HEAD_END, Head, OBJECT_BYTES_MAX, WalDigest};
use crate::again::again;
use crate::error::Error;
use crate::layout;
use crate::lineage::NOTES_IN_FLIGHT;
use crate::pack::{self, Tail};
use crate::repository::Repository;
use crate::store::probe::Capabilities;
use crate::store::{PutOutcome, Staged, StoreError};

/// The largest history and label that is stored: they have a line for each promotion, and ten lines.
const TEXT_BYTES_MAX: usize = 1 << 20;
/// How many different contents that were refused under one name are kept. More tell nothing new, and whoever sends them
/// sends them for ever.
const CONFLICTS_MAX: u32 = 8;

/// How storing a file ended. Either way it is durable, with the content that was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalStored {
    /// It was not there.
    Created,
    /// The same content was there.
    AlreadyThere,
}

/// A file of the log that was looked at and sealed for its place, and is not stored yet.
#[derive(Debug)]
pub struct SealedWal {
    lineage: LineageId,
    file: WalFileName,
    content: Bytes,
    object: Staged,
}

impl SealedWal {
    /// Gives up what was staged of it.
    pub async fn discard(self) {
        if let Staged::Sent(sent) = self.object {
            sent.discard().await;
        }
    }

    fn key(&self) -> String {
        layout::wal(self.lineage) + &layout::wal_file(&self.file)
    }
}

/// What it means that the archive has not got a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WalAbsence {
    /// Nothing that would have to come after it on its timeline is there: the log ends before it, as far as it was archived.
    End,
    /// Later segments of its timeline are there.
    Gap,
    /// A collection deleted it, or may have, with all of its timeline that begins before `below`.
    Collected {
        /// The first segment of the timeline that no collection deleted.
        below: SegmentName,
    },
}

impl Repository {
    /// Stores a file of the log. Idempotent by name and content: the same again succeeds, other content under a name that
    /// is taken is kept aside and refused with [`Error::WalConflict`]. After success the file is durable.
    ///
    /// Refused before anything is written: segments, also unfinished ones, whose length is none of a segment's, and
    /// histories that are not what their name says.
    pub async fn store_wal(
        &self,
        lineage: LineageId,
        file: &WalFileName,
        content: Bytes,
    ) -> Result<WalStored, Error> {
        let sealed = self.seal_wal(lineage, file, content).await?;
        self.store_sealed_wal(sealed).await
    }

    /// The first half of [`Repository::store_wal`], which costs the time and needs nobody: for callers who have several
    /// files, and want them stored in their order.
    pub async fn seal_wal(
        &self,
        lineage: LineageId,
        file: &WalFileName,
        content: Bytes,
    ) -> Result<SealedWal, Error> {
        self.check_writable()?;
        check(file, &content)?;
        let object = self.seal_archived(lineage, &layout::wal_file(file), content.clone()).await?;
        Ok(SealedWal { lineage, file: *file, content, object: Staged::Held(object) })
    }

    /// Does what of the storing decides nothing, as far as it can be done: for a file that waits for the one before it.
    pub async fn stage_sealed_wal(&self, sealed: SealedWal) -> SealedWal {
        let key = sealed.key();
        let object = match sealed.object {
            Staged::Held(bytes) => {
                let nothing = Capabilities::default();
                let found = self.probed().unwrap_or(&nothing);
                let staged = self.store.stage(&key, bytes.clone(), found).await;
                // It can be put when its turn has come, and is told then if it cannot.
                staged.unwrap_or_else(|error| {
                    tracing::debug!(key, %error, "not stored before its turn");
                    Staged::Held(bytes)
                })
            }
            staged => staged,
        };
        SealedWal { object, ..sealed }
    }

    /// The second half of [`Repository::store_wal`].
    pub async fn store_sealed_wal(&self, sealed: SealedWal) -> Result<WalStored, Error> {
        let key = sealed.key();
        let SealedWal { lineage, file, content, object } = sealed;
        let place = layout::wal_file(&file);
        let outcome = self.store.put_staged_if_absent(&key, object).await;
        match outcome {
            Ok(PutOutcome::Created) => return Ok(WalStored::Created),
            Ok(PutOutcome::Exists) | Err(_) => {}
        }
        // What is there is read to its end: what cannot be read back is not stored, whoever stored it.
        let there = match (self.get_archived(lineage, &place).await, outcome) {
            (Ok(Some(there)), _) => there,
            // Nobody knows whether it was written, or will appear.
            (_, Err(unheard)) => return Err(unheard.into()),
            (Ok(None), Ok(_)) => return Err(Error::Missing { key }),
            (Err(error), Ok(_)) => return Err(error),
        };
        if there == content {
            return Ok(WalStored::AlreadyThere);
        }
        let kept = match self.keep_aside(lineage, &file, &content).await {
            Ok(Some(key)) => format!("it is kept as {key}"),
            Ok(None) => format!("{CONFLICTS_MAX} others were kept before it, it is not"),
            Err(error) => {
                format!("it could not be kept: failed to {}", proto::failure::chain(&error))
            }
        };
        Err(Error::WalConflict { file, lineage, kept })
    }

    /// The content of a file of the archive. `None` only when it is certain that there is no such file: the store said so,
    /// and after that still showed the lineage. It may be stored a moment later.
    pub async fn fetch_wal(
        &self,
        lineage: LineageId,
        file: &WalFileName,
    ) -> Result<Option<Bytes>, Error> {
        match self.get_archived(lineage, &layout::wal_file(file)).await? {
            Some(content) => {
                check(file, &content)?;
                Ok(Some(content))
            }
            // A directory that is not mounted has no files either.
            None => self.identity(lineage).await.map(|_| None),
        }
    }

    /// What it means that the archive has not got a segment. [`WalAbsence::End`] only when that is certain.
    pub async fn wal_absence(
        &self,
        lineage: LineageId,
        segment: SegmentName,
    ) -> Result<WalAbsence, Error> {
        let floors = self.list_floors(lineage).await?;
        if floors.is_below(segment) {
            let below = SegmentName::ranked(segment.timeline, floors.rank(segment.timeline));
            return Ok(WalAbsence::Collected { below });
        }
        let prefix = layout::wal_of(lineage, segment.timeline);
        let after = format!("{prefix}{segment}");
        let is_segment = |key: &str| matches!(file_of(key), Some(WalFileName::Segment(_)));
        if self.store.has_behind(&prefix, &after, is_segment).await? {
            return Ok(WalAbsence::Gap);
        }
        self.identity(lineage).await?;
        Ok(WalAbsence::End)
    }

    /// Whether the archive has a segment; says nothing of its content. `false` only when that is certain.
    pub async fn has_wal(&self, lineage: LineageId, segment: SegmentName) -> Result<bool, Error> {
        let place = layout::wal_file(&WalFileName::Segment(segment));
        match self.store.size(&(layout::wal(lineage) + &place)).await {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => self.identity(lineage).await.map(|_| false),
            Err(error) => Err(Error::needed(error)),
        }
    }

    /// What content the archive has under a segment's name, as the object itself says. `None` only when it is certain that there
    /// is none.
    pub async fn wal_digest(
        &self,
        lineage: LineageId,
        segment: SegmentName,
    ) -> Result<Option<WalDigest>, Error> {
        let place = layout::wal_file(&WalFileName::Segment(segment));
        match self.head_of(lineage, &place).await? {
            Some(head) => Ok(Some(WalDigest(head))),
            None => self.identity(lineage).await.map(|_| None),
        }
    }

    /// Whether other content came under a segment's name, and is kept aside.
    pub async fn has_wal_conflict(
        &self,
        lineage: LineageId,
        segment: SegmentName,
    ) -> Result<bool, Error> {
        let place = layout::wal_conflict(&WalFileName::Segment(segment), 1);
        match self.store.size(&(layout::wal(lineage) + &place)).await {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(Error::needed(error)),
        }
    }

    /// Whether the archive has any file of a timeline. `false` only when that is certain.
    pub async fn has_wal_of(&self, lineage: LineageId, timeline: Timeline) -> Result<bool, Error> {
        let prefix = layout::wal_of(lineage, timeline);
        let has = self.store.has_behind(&prefix, &prefix, |key| file_of(key).is_some()).await?;
        if !has {
            self.identity(lineage).await?;
        }
        Ok(has)
    }

    /// The histories of the timelines after `timeline` that the archive has, oldest first. One that cannot be read fails
    /// them all: whoever asks wants to be certain.
    pub async fn wal_histories_after(
        &self,
        lineage: LineageId,
        timeline: Timeline,
    ) -> Result<Vec<History>, Error> {
        let folders = self.store.list_directories(&layout::wal(lineage)).await?;
        let later: Vec<Timeline> = folders
            .iter()
            .filter_map(|folder| Some(Timeline(u32::from_str_radix(folder, 16).ok()?)))
            .filter(|folder| *folder > timeline)
            .collect();
        let read = stream::iter(later).map(|timeline| async move {
            match self.history_of(lineage, timeline).await? {
                Ok(history) => Ok(history),
                Err(reason) => {
                    let file = layout::wal_file(&WalFileName::History(timeline));
                    Err(Error::damaged(layout::wal(lineage) + &file, reason))
                }
            }
        });
        let histories: Vec<Option<History>> = read.buffered(NOTES_IN_FLIGHT).try_collect().await?;
        self.identity(lineage).await?;
        Ok(histories.into_iter().flatten().collect())
    }

    /// What the archive has, from one listing, the histories, and the head of one segment of each timeline. A timeline
    /// none of whose segments tells how long it is stands there without any, and among the damaged.
    pub async fn list_wal(&self, lineage: LineageId) -> Result<WalInventory, Error> {
        let prefix = layout::wal(lineage);
        let objects = self.store.list(&prefix).await?;
        if objects.is_empty() {
            self.identity(lineage).await?;
        }
        let mut inventory =
            WalInventory { objects: objects.len() as u64, ..WalInventory::default() };
        let mut segments: BTreeMap<Timeline, Vec<SegmentName>> = BTreeMap::new();
        let mut histories = Vec::new();
        for object in &objects {
            let Some(place) = object.key.strip_prefix(&prefix) else { continue };
            match of_place(place) {
                Some(Place::File(file)) => {
                    inventory.stored_bytes += object.size_bytes;
                    let wal = inventory.timelines.entry(file.timeline()).or_default();
                    match file {
                        WalFileName::Segment(name) => {
                            segments.entry(name.timeline).or_default().push(name);
                        }
                        WalFileName::Partial(name) => wal.partials.push(name),
                        WalFileName::History(timeline) => histories.push(timeline),
                        WalFileName::BackupLabel(..) => wal.labels += 1,
                    }
                }
                Some(Place::Conflict(file, _)) => inventory.conflicts.push(file),
                Some(Place::Floor(..)) | None => {}
            }
        }
        // Each is numbered, and the listing is in order.
        inventory.conflicts.dedup();
        let read = stream::iter(histories).map(|timeline| async move {
            Ok::<_, Error>((timeline, self.history_of(lineage, timeline).await?))
        });
        let read: Vec<_> = read.buffered(NOTES_IN_FLIGHT).try_collect().await?;
        for (timeline, history) in read {
            match history {
                Ok(history) => {
                    let wal: &mut TimelineWal = inventory.timelines.entry(timeline).or_default();
                    wal.history = history;
                }
                Err(why) => inventory.damaged.push((WalFileName::History(timeline), why)),
            }
        }
        for (timeline, mut names) in segments {
            names.sort_unstable();
            let size = self.size_of_segments(lineage, &names, &mut inventory.damaged).await?;
            let wal = inventory.timelines.entry(timeline).or_default();
            wal.segment_size = size;
            for name in names {
                if size > 0 && !wal.add(name) {
                    let what = format!("there is no such segment among those of {size} bytes");
                    inventory.damaged.push((WalFileName::Segment(name), what));
                }
            }
        }
        Ok(inventory)
    }

    /// The history of a timeline, `None` if it is gone since it was listed, or why it cannot be read.
    async fn history_of(
        &self,
        lineage: LineageId,
        timeline: Timeline,
    ) -> Result<Result<Option<History>, String>, Error> {
        let file = WalFileName::History(timeline);
        match self.get_archived(lineage, &layout::wal_file(&file)).await {
            Ok(None) => Ok(Ok(None)),
            Ok(Some(content)) => Ok(parse_history(timeline, &content).map(Some)),
            Err(Error::Damaged { reason, .. }) => Ok(Err(reason)),
            Err(error) => Err(error),
        }
    }

    /// How long the segments of a timeline are, said by the first that can be read; 0 when none can. Each is looked at, so
    /// that one that is damaged hides nothing.
    pub(super) async fn size_of_segments(
        &self,
        lineage: LineageId,
        names: &[SegmentName],
        damaged: &mut Vec<(WalFileName, String)>,
    ) -> Result<u32, Error> {
        for name in names {
            let file = WalFileName::Segment(*name);
            match self.head_of(lineage, &layout::wal_file(&file)).await {
                Ok(Some(head)) if is_segment_size(head.bytes) => {
                    return Ok(u32::try_from(head.bytes).unwrap_or(0));
                }
                Ok(Some(head)) => {
                    damaged.push((file, format!("no segment has {} bytes", head.bytes)));
                }
                Ok(None) => {}
                Err(Error::Damaged { reason, .. }) => damaged.push((file, reason)),
                Err(error) => return Err(error),
            }
        }
        Ok(0)
    }

    /// Keeps content whose name is taken. The same content is kept once; `None` when enough is kept.
    async fn keep_aside(
        &self,
        lineage: LineageId,
        file: &WalFileName,
        content: &Bytes,
    ) -> Result<Option<String>, Error> {
        for number in 1..=CONFLICTS_MAX {
            let place = layout::wal_conflict(file, number);
            let key = layout::wal(lineage) + &place;
            if self.put_archived(lineage, &place, content.clone()).await? == PutOutcome::Created {
                return Ok(Some(key));
            }
            match self.get_archived(lineage, &place).await {
                Ok(Some(there)) if there == *content => return Ok(Some(key)),
                // What cannot be read there is in nobody's way.
                Ok(_) | Err(Error::Damaged { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Whether an object of the archive has the digest in its trailer and, on demand, opens at its place. One that is gone
    /// since it was listed is not damaged.
    pub(crate) async fn look_at_archived(
        &self,
        lineage: LineageId,
        place: &str,
        opens: bool,
    ) -> Result<(), Error> {
        if opens {
            return self.get_archived(lineage, place).await.map(drop);
        }
        let key = layout::wal(lineage) + place;
        again(|| async {
            let Some(object) = self.get_object(&key).await? else { return Ok(()) };
            let is_right = blocking(move || {
                let tail = Tail::parse(&object).ok()?;
                (pack::digest_of(&object)? == tail.digest).then_some(())
            });
            let wrong = || Error::damaged(&key, "its bytes do not have the digest in its trailer");
            is_right.await?.ok_or_else(wrong)
        })
        .await
    }

    async fn put_archived(
        &self,
        lineage: LineageId,
        place: &str,
        content: Bytes,
    ) -> Result<PutOutcome, Error> {
        let sealed = self.seal_archived(lineage, place, content).await?;
        Ok(self.store.put_if_absent(&(layout::wal(lineage) + place), sealed).await?)
    }

    async fn seal_archived(
        &self,
        lineage: LineageId,
        place: &str,
        content: Bytes,
    ) -> Result<Bytes, Error> {
        let (keys, bound_to) = (Arc::clone(&self.keys), place.to_owned());
        blocking(move || object::seal(&keys, lineage, &bound_to, &content)).await?
    }

    async fn get_archived(&self, lineage: LineageId, place: &str) -> Result<Option<Bytes>, Error> {
        let key = layout::wal(lineage) + place;
        again(|| async {
            let Some(object) = self.get_object(&key).await? else { return Ok(None) };
            let (keys, place) = (Arc::clone(&self.keys), place.to_owned());
            let opened = blocking(move || object::open(&keys, lineage, &place, object.into()));
            match opened.await? {
                Ok(content) => Ok(Some(content.into())),
                Err(reason) => Err(Error::damaged(&key, reason)),
            }
        })
        .await
    }

    /// An object of the archive as it lies there, if it opens at its place.
    pub(super) async fn get_sealed(
        &self,
        lineage: LineageId,
        place: &str,
    ) -> Result<Option<Bytes>, Error> {
        let key = layout::wal(lineage) + place;
        again(|| async {
            let Some(object) = self.get_object(&key).await? else { return Ok(None) };
            let (keys, place, bytes) = (Arc::clone(&self.keys), place.to_owned(), object.to_vec());
            let opened = blocking(move || object::open(&keys, lineage, &place, bytes).map(drop));
            match opened.await? {
                Ok(()) => Ok(Some(object)),
                Err(reason) => Err(Error::damaged(&key, reason)),
            }
        })
        .await
    }

    async fn get_object(&self, key: &str) -> Result<Option<Bytes>, Error> {
        match self.store.get(key, OBJECT_BYTES_MAX).await {
            Ok(object) => Ok(Some(object)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(Error::needed(error)),
        }
    }

    /// What an object of the archive says of its content, by its first bytes. `None` when there is no such object.
    pub(super) async fn head_of(
        &self,
        lineage: LineageId,
        place: &str,
    ) -> Result<Option<Head>, Error> {
        let key = layout::wal(lineage) + place;
        again(|| async {
            let start = match self.store.get_range(&key, 0..HEAD_END).await {
                Ok(start) => start,
                Err(StoreError::NotFound { .. }) => return Ok(None),
                Err(error) => return Err(Error::needed(error)),
            };
            let head = object::head(&self.keys, lineage, place, &start);
            head.map(Some).map_err(|reason| Error::damaged(&key, reason))
        })
        .await
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work).await.map_err(|gone| Error::Bug(gone.to_string()))
}

/// The file that a key of the archive ends with, if it is one's.
fn file_of(key: &str) -> Option<WalFileName> {
    key.rsplit('/').next()?.parse().ok()
}

/// What a key below the archive means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    File(WalFileName),
    /// Content that was refused under this name, by its number.
    Conflict(WalFileName, u32),
    /// What ranks below may have been deleted, of one timeline or of every one.
    Floor(Option<Timeline>, u64),
}

/// What a name below the archive means. Strict: a second spelling is no name.
pub(crate) fn of_place(place: &str) -> Option<Place> {
    let (folder, rest) = place.split_once('/')?;
    let read = match folder {
        "conflicts" => {
            let (file, number) = rest.split_once('/')?;
            Place::Conflict(file.parse().ok()?, number.parse().ok().filter(|number| *number > 0)?)
        }
        "floor" => {
            let (timeline, rank) = match rest.split_once('/') {
                Some((timeline, rank)) => (Some(u32::from_str_radix(timeline, 16).ok()?), rank),
                None => (None, rest),
            };
            Place::Floor(timeline.map(Timeline), u64::from_str_radix(rank, 16).ok()?)
        }
        _ => Place::File(rest.parse().ok()?),
    };
    let written = match &read {
        Place::File(file) => layout::wal_file(file),
        Place::Conflict(file, number) => layout::wal_conflict(file, *number),
        Place::Floor(timeline, rank) => layout::wal_floor(*timeline, *rank),
    };
    (written == place).then_some(read)
}

/// Whether content can be what a name says, as far as that can be told without knowing PostgreSQL.
fn check(file: &WalFileName, content: &[u8]) -> Result<(), Error> {
    let refused = |reason| Err(Error::WalContent { file: *file, reason });
    let length = content.len();
    match file {
        WalFileName::Segment(name) | WalFileName::Partial(name) => {
            let size = u32::try_from(length).ok().filter(|size| is_segment_size((*size).into()));
            match size.map(|size| name.segment(size)) {
                Some(Some(_)) => Ok(()),
                Some(None) => refused(format!(
                    "it has {length} bytes, and no segment of that size has this name"
                )),
                None => refused(format!("it has {length} bytes, which is no size of a segment")),
            }
        }
        WalFileName::History(_) | WalFileName::BackupLabel(..) if length > TEXT_BYTES_MAX => {
            refused(format!("it has {length} bytes, and at most {TEXT_BYTES_MAX} are expected"))
        }
        WalFileName::History(timeline) => {
            parse_history(*timeline, content).map(|_| ()).or_else(refused)
        }
        WalFileName::BackupLabel(..) if length == 0 => refused("it is empty".to_owned()),
        WalFileName::BackupLabel(..) => Ok(()),
    }
}

fn parse_history(timeline: Timeline, content: &[u8]) -> Result<History, String> {
    let text = std::str::from_utf8(content).map_err(|_| "it is no text".to_owned())?;
    History::parse(timeline, text).map_err(|error| error.what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_has_one_spelling() {
        for name in [
            "0000000A0000000000000005",
            "0000000A0000000000000005.partial",
            "0000000A.history",
            "0000000A0000000000000005.00000028.backup",
        ] {
            let file: WalFileName = name.parse().unwrap();
            assert_eq!(of_place(&layout::wal_file(&file)), Some(Place::File(file)));
            let place = layout::wal_conflict(&file, 7);
            assert_eq!(of_place(&place), Some(Place::Conflict(file, 7)));
        }
        let rank = 0xA_0000_0FFF;
        assert_eq!(of_place("floor/0000000A00000FFF"), Some(Place::Floor(None, rank)));
        let of_one = Some(Place::Floor(Some(Timeline(11)), rank));
        assert_eq!(of_place("floor/0000000B/0000000A00000FFF"), of_one);
        for place in [
            "0000000A0000000000000005",
            "00000001/0000000A0000000000000005",
            "A/0000000A0000000000000005",
            "0000000A/x",
            "conflicts/0000000A.history",
            "conflicts/0000000A.history/0",
            "conflicts/0000000A.history/01",
            "floor/000000010000001",
            "floor/000000010000000a",
            "floor/+000000100000001",
            "floor/B/0000000A00000FFF",
            "floor/0000000b/0000000A00000FFF",
            "floor/0000000B/A00000FFF",
            "floor/0000000B/0000000A/00000FFF",
            "other/0000000A.history",
        ] {
            assert_eq!(of_place(place), None, "{place}");
        }
    }

    #[test]
    fn what_cannot_be_the_file_is_refused() {
        let check = |name: &str, content: &[u8]| check(&name.parse().unwrap(), content).is_ok();
        let mib = vec![0; 1 << 20];
        assert!(check("000000010000000000000FFF", &mib));
        assert!(!check("000000010000000000000FFF", &[mib.clone(), mib.clone()].concat()));
        assert!(!check("000000010000000000000001", &mib[1..]));
        assert!(!check("000000010000000000000001.partial", b""));
        assert!(check("00000002.history", b"1\t0/3000158\tno recovery target specified\n"));
        assert!(!check("00000002.history", b""));
        assert!(!check("00000002.history", b"2\t0/3000158\tx\n"));
        assert!(!check("000000010000000000000001.00000028.backup", b""));
    }
}
