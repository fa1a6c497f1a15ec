//! The first thread of a copy: walks the new entries beside the predecessor's and decides what is read.

use std::collections::{BTreeSet, HashSet};
use std::io::{self, Read};
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};

use super::Source;
use super::assemble::{Event, Shape};
use super::copy::{Job, Room, Stretch};
use super::needed::Needed;
use super::previous::{Begun, Known, Old, Walk};
use crate::checkpoint::Interrupted;
use crate::detect::spread;
use crate::entry::{
    Belief, Body, Content, Entry, FileBody, SourceEntry, SourceKind, Stamp, path_order,
};
use crate::error::Error;
use crate::limits::{INLINE_UNITS, SHARD_UNITS, UNIT_BYTES_MAX, UNIT_BYTES_MIN};
use crate::pack::PackId;
use crate::progress::Progress;
use crate::stop::Stop;

/// What may be taken over without being read.
#[derive(Debug, Clone)]
pub(super) struct Trust {
    /// The same stamp claims that a file is the same: node and timeline are the predecessor's.
    pub(super) comparable: bool,
    /// Files that claim so may be.
    pub(super) stamps: bool,
    /// What somebody says did not change may be.
    pub(super) changes: bool,
    pub(super) reread: Reread,
    /// Files that may not be.
    pub(super) read_again: HashSet<Vec<u8>>,
    /// Packs that nothing is taken over from.
    pub(super) spoilt: Arc<BTreeSet<PackId>>,
    /// What is in no backup and may be taken over where what is read is the same.
    pub(super) interrupted: Vec<Arc<Interrupted>>,
}

impl Trust {
    fn reaches_spoilt(&self, file: &FileBody) -> bool {
        match &file.content {
            Content::Inline(extents) => extents
                .iter()
                .filter_map(|extent| extent.place)
                .any(|place| self.spoilt.contains(&place.frame.pack)),
            Content::Shards(shards) => {
                shards.iter().any(|shard| shard.reaches(self.spoilt.as_ref()))
            }
        }
    }
}

/// The share of unchanged stretches that is read all the same: those whose number lies in a window that moves round once
/// in the time that [`WriteOptions::reread_within`](super::WriteOptions::reread_within) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reread {
    from: u32,
    share: u64,
}

impl Reread {
    const WHOLE: u64 = 1 << 32;
    pub(super) const NOTHING: Self = Self { from: 0, share: 0 };

    pub(super) fn since(from: u32, elapsed_ms: i64, round: Duration) -> Self {
        let round_ms = round.as_millis().max(1);
        let elapsed_ms = u128::try_from(elapsed_ms).unwrap_or(0).min(round_ms);
        // Rounded up, so that frequent backups cannot add up to less than a round.
        let share = (elapsed_ms * u128::from(Self::WHOLE)).div_ceil(round_ms);
        Self { from, share: u64::try_from(share).unwrap_or(Self::WHOLE) }
    }

    /// Where the next backup begins.
    pub(super) fn next(self) -> u32 {
        u32::try_from((u64::from(self.from) + self.share) % Self::WHOLE).unwrap_or(0)
    }

    fn covers(self, path: &[u8], piece: u64) -> bool {
        u64::from(spread(path, piece).wrapping_sub(self.from)) < self.share
    }
}

/// The planner's ends of the channels.
pub(super) struct Outlets {
    /// One unit for every event that the assembler has not put away.
    pub(super) credits: Sender<()>,
    pub(super) jobs: Sender<Job>,
    pub(super) events: Sender<(u64, Event)>,
}

/// What the planner needs besides the entries.
pub(super) struct Planner<'a> {
    pub(super) source: &'a dyn Source,
    pub(super) walk: Option<Walk>,
    /// Beside it.
    begun: Vec<(Walk, Arc<Interrupted>)>,
    pub(super) trust: Trust,
    pub(super) stop: &'a Stop,
    pub(super) progress: &'a Progress,
    pub(super) outlets: &'a Outlets,
    /// Room for stretches of streams.
    rooms: (Sender<()>, Receiver<()>),
    next: u64,
}

impl<'a> Planner<'a> {
    pub(super) fn new(
        source: &'a dyn Source,
        walk: Option<Walk>,
        trust: Trust,
        stop: &'a Stop,
        progress: &'a Progress,
        outlets: &'a Outlets,
        stretches_max: usize,
    ) -> Self {
        let rooms = crossbeam_channel::bounded(stretches_max);
        let begun = trust.interrupted.iter().map(|interrupted| {
            (Walk::new(Known::Interrupted(Arc::clone(interrupted))), Arc::clone(interrupted))
        });
        let begun = begun.collect();
        Self { source, walk, begun, trust, stop, progress, outlets, rooms, next: 0 }
    }

    pub(super) fn run(
        mut self,
        entries: impl Iterator<Item = io::Result<SourceEntry>>,
    ) -> Result<(), Error> {
        let mut before: Option<Vec<u8>> = None;
        for entry in entries {
            self.stop.check()?;
            let entry = entry
                .map_err(|source| Error::Source { path: "the list of files".into(), source })?;
            entry.check()?;
            if before.as_ref().is_some_and(|before| path_order(before, &entry.path).is_ge()) {
                return Err(Error::entry(
                    &entry.path,
                    "the list of files is not in order, or names it twice",
                ));
            }
            before = Some(entry.path.clone());
            self.entry(entry)?;
        }
        Ok(())
    }

    fn entry(&mut self, entry: SourceEntry) -> Result<(), Error> {
        let old = match &mut self.walk {
            Some(walk) => walk.find(&entry.path, self.stop)?,
            None => None,
        };
        let body = match &entry.kind {
            SourceKind::File => return self.file(entry, old),
            SourceKind::Stream => return self.stream(&entry, old.as_ref()),
            SourceKind::Directory => Body::Directory,
            SourceKind::Symlink { target } => Body::Symlink { target: target.clone() },
        };
        let entry = Entry { path: entry.path, mode: entry.mode, body };
        self.event(Event::Entry { entry, old, shape: Shape::Whole })
    }

    /// What interrupted backups had stored of a file.
    fn begun(&mut self, path: &[u8]) -> Result<Vec<Begun>, Error> {
        let mut found = Vec::new();
        for (walk, by) in &mut self.begun {
            if !by.is_lost()
                && let Some(old) = by.told(walk.find(path, self.stop))?
            {
                found.push(Begun { old, by: Arc::clone(by) });
            }
        }
        Ok(found)
    }

    fn file(&mut self, mut entry: SourceEntry, old: Option<Old>) -> Result<(), Error> {
        let stamp = entry.stamp();
        let reread = self.trust.reread;
        let known = old.as_ref().and_then(Old::file);
        let is_on_disk = entry.content.is_none();
        let may_skip = is_on_disk && !self.trust.read_again.contains(&entry.path);
        let claimed = known.filter(|file| is_on_disk && self.looks_the_same(file, stamp));
        let claimed = claimed.map(|file| file.stamp.belief);
        let believed = claimed.filter(|_| may_skip && self.trust.stamps);
        let trusted = matches!(believed, Some(Belief::Read | Belief::Told));
        if !trusted {
            self.source.changed(&entry);
        }
        let mut begun = self.begun(&entry.path)?;
        // Times and size say it all, where they may be believed.
        let goes_on = may_skip && !trusted && self.trust.changes && known.is_some();
        let told = entry.changes.take().filter(|_| goes_on);
        let named = known.or(begun.first().and_then(|begun| begun.old.file()));
        let unit_bytes = unit_bytes(&entry, named, told.is_some());
        let spared = |file| told.as_ref().is_some_and(|ranges| spare(ranges, &entry, file));
        if let Some(file) = known.filter(|file| trusted || spared(file)) {
            let pieces = match &file.content {
                Content::Inline(_) => 1,
                Content::Shards(shards) => shards.len() as u64,
            };
            if !(0..pieces).any(|piece| reread.covers(&entry.path, piece))
                && !self.trust.reaches_spoilt(file)
            {
                self.progress.add_files(1);
                self.progress.add_bytes(file.size_bytes);
                self.progress.add_skipped(file.size_bytes);
                let stamp = not_as_read(stamp, believed);
                let body = Body::File(FileBody { stamp, ..file.clone() });
                let entry = Entry { path: entry.path, mode: entry.mode, body };
                return self.event(Event::Entry { entry, old, shape: Shape::Whole });
            }
        }
        let units = entry.size_bytes.div_ceil(u64::from(unit_bytes));
        let inline = units <= u64::from(INLINE_UNITS);
        let content =
            if inline { Content::Inline(Vec::new()) } else { Content::Shards(Vec::new()) };
        let pieces = if inline { 1 } else { units.div_ceil(u64::from(SHARD_UNITS)) };
        // What is read to its end, because all of it is due, is what its times say.
        let all_due = (0..pieces).all(|piece| reread.covers(&entry.path, piece));
        let changes = told.as_ref().filter(|_| !all_due);
        let is_read = all_due || changes.is_none() && !trusted;
        let stamp = if is_read { stamp } else { not_as_read(stamp, believed) };
        let body = Body::File(FileBody { size_bytes: 0, stamp, unit_bytes, content });
        let head = Entry { path: entry.path.clone(), mode: entry.mode, body };
        self.event(Event::Entry { entry: head, old: old.clone(), shape: Shape::Pieces(pieces) })?;
        let entry = Arc::new(entry);
        let piece_bytes = u64::from(unit_bytes) * u64::from(SHARD_UNITS);
        // Only units of the same size can be compared.
        let has_such_units =
            |old: &Old| old.file().is_some_and(|file| file.unit_bytes == unit_bytes);
        let comparable = old.filter(has_such_units);
        begun.retain(|begun| has_such_units(&begun.old));
        for piece in 0..pieces {
            let start = piece * piece_bytes;
            let length = (entry.size_bytes - start).min(piece_bytes);
            let is_due = reread.covers(&entry.path, piece);
            let touched = |ranges: &Vec<_>| Needed::touched_by(ranges, start, length, unit_bytes);
            let needed = changes.filter(|_| !is_due).map(touched);
            let its_turn = match &told {
                _ if !is_due => None,
                Some(ranges) => Some(touched(ranges)),
                None => trusted.then_some(Needed::NOTHING),
            };
            if (trusted && !is_due || needed.is_some_and(|needed| needed.is_empty()))
                && let Some(reference) =
                    comparable.as_ref().and_then(|old| kept(old, start, length))
                && !reference.reaches(self.trust.spoilt.as_ref())
            {
                self.progress.add_bytes(length);
                self.progress.add_skipped(length);
                self.event(Event::Kept { reference, bytes: length })?;
                continue;
            }
            let seq = self.number()?;
            let job = Job {
                seq,
                entry: Arc::clone(&entry),
                unit_bytes,
                piece,
                start,
                length,
                old: comparable.clone(),
                begun: begun.clone(),
                needed,
                its_turn,
                claims_unchanged: claimed == Some(Belief::Read) && comparable.is_some(),
                read: None,
            };
            self.outlets.jobs.send(job).map_err(|_| Error::Cancelled)?;
        }
        Ok(())
    }

    /// Reads a stream here, because it has one reader only, and gives its stretches to the others. At most so many of them
    /// as there are rooms are in memory.
    fn stream(&mut self, entry: &SourceEntry, old: Option<&Old>) -> Result<(), Error> {
        let failed = |source| Error::Source { path: crate::error::show(&entry.path), source };
        let opened = self.source.stream(entry, self.stop.token()).map_err(failed)?;
        let Some(mut content) = opened else {
            self.progress.add_vanished();
            return Ok(());
        };
        let unit_bytes = UNIT_BYTES_MAX;
        let piece_bytes = u64::from(unit_bytes) * u64::from(SHARD_UNITS);
        let has_such_units =
            |old: &Old| old.file().is_some_and(|file| file.unit_bytes == unit_bytes);
        let comparable = old.cloned().filter(has_such_units);
        let mut stored = self.begun(&entry.path)?;
        stored.retain(|begun| has_such_units(&begun.old));
        let shared = Arc::new(entry.clone());
        let (mut piece, mut begun, mut ended) = (0, false, false);
        let capacity = usize::try_from(piece_bytes).unwrap_or_default();
        while !ended {
            self.stop.check()?;
            let room = Room::wait(&self.rooms.0, &self.rooms.1, self.stop)?;
            let mut bytes = Vec::with_capacity(capacity);
            let read =
                content.by_ref().take(piece_bytes).read_to_end(&mut bytes).map_err(failed)?;
            // Only the end makes a stretch short.
            ended = (read as u64) < piece_bytes;
            let units = (read as u64).div_ceil(u64::from(unit_bytes));
            if !begun {
                begun = true;
                let inline = ended && units <= u64::from(INLINE_UNITS);
                let content =
                    if inline { Content::Inline(Vec::new()) } else { Content::Shards(Vec::new()) };
                let stamp = entry.stamp();
                let body = Body::File(FileBody { size_bytes: 0, stamp, unit_bytes, content });
                let head = Entry { path: entry.path.clone(), mode: entry.mode, body };
                self.event(Event::Entry { entry: head, old: old.cloned(), shape: Shape::Stream })?;
            }
            // Nothing behind a last stretch that was full; an empty stream has one all the same, that of an empty file.
            if read == 0 && piece > 0 {
                break;
            }
            let seq = self.number()?;
            let job = Job {
                seq,
                entry: Arc::clone(&shared),
                unit_bytes,
                piece,
                start: piece * piece_bytes,
                length: read as u64,
                old: comparable.clone(),
                begun: stored.clone(),
                needed: None,
                its_turn: None,
                claims_unchanged: false,
                read: Some(Stretch { bytes: Bytes::from(bytes), room }),
            };
            self.outlets.jobs.send(job).map_err(|_| Error::Cancelled)?;
            piece += 1;
        }
        self.event(Event::Ended { pieces: piece })
    }

    /// Whether the file is what it was, as far as its inode tells.
    fn looks_the_same(&self, known: &FileBody, stamp: Stamp) -> bool {
        self.trust.comparable
            && stamp == Stamp { belief: stamp.belief, ..known.stamp }
            && stamp.belief != Belief::Racy
            // A file that was shorter than at its scan was changing.
            && known.size_bytes == known.stamp.scanned_bytes
    }

    fn number(&mut self) -> Result<u64, Error> {
        self.outlets.credits.send(()).map_err(|_| Error::Cancelled)?;
        let seq = self.next;
        self.next += 1;
        Ok(seq)
    }

    fn event(&mut self, event: Event) -> Result<(), Error> {
        let seq = self.number()?;
        self.outlets.events.send((seq, event)).map_err(|_| Error::Cancelled)
    }
}

/// Whether a file that changed in these ranges is, to its end, what is known of it. One that was shorter than at its scan is
/// described as what it was there.
fn spare(ranges: &[Range<u64>], entry: &SourceEntry, known: &FileBody) -> bool {
    entry.size_bytes == known.size_bytes
        && known.size_bytes == known.stamp.scanned_bytes
        && ranges.iter().all(|range| range.is_empty() || range.start >= entry.size_bytes)
}

/// The stamp of a file of which not all was read. `believed` is what the predecessor says of the same times and size, where it has them.
///
/// Where it has not, there was a write since, of which nobody may have told yet: a backup that believed the times would never have it.
/// Where it could not believe them itself for that reason, this one was told of that write, and there was none after it.
fn not_as_read(stamp: Stamp, believed: Option<Belief>) -> Stamp {
    let belief = match (stamp.belief, believed) {
        (Belief::Racy, _) => Belief::Racy,
        (_, Some(Belief::Read)) => Belief::Read,
        (_, Some(Belief::Ahead | Belief::Told)) => Belief::Told,
        (_, Some(Belief::Racy) | None) => Belief::Ahead,
    };
    Stamp { belief, ..stamp }
}

/// The shard of the stretch of `length` bytes at `start`, if there was one of that length.
fn kept(old: &Old, start: u64, length: u64) -> Option<crate::shard::ShardRef> {
    let file = old.file()?;
    let piece_bytes = u64::from(file.unit_bytes) * u64::from(SHARD_UNITS);
    let there = file.size_bytes.saturating_sub(start).min(piece_bytes);
    match &file.content {
        Content::Shards(shards) if there == length => {
            shards.get(usize::try_from(start / piece_bytes).ok()?).cloned()
        }
        _ => None,
    }
}

/// Small units store fewer bytes after random changes, large ones cost less metadata; the largest files pay the most
/// for metadata. A size stays with its file until another file takes the name; whose changes are known `goes_on`.
fn unit_bytes(entry: &SourceEntry, known: Option<&FileBody>, goes_on: bool) -> u32 {
    let fresh = match entry.block_size {
        None => UNIT_BYTES_MAX,
        Some(block_size) => {
            let by_size = match entry.size_bytes {
                0..0x2000_0000 => UNIT_BYTES_MIN,
                0x2000_0000..=0x4000_0000 => 2 * UNIT_BYTES_MIN,
                _ => UNIT_BYTES_MAX,
            };
            by_size.max(block_size)
        }
    };
    match known {
        Some(known)
            if (goes_on
                || known.stamp.inode == entry.inode && known.stamp.device == entry.device)
                && known.unit_bytes >= entry.block_size.unwrap_or(UNIT_BYTES_MIN) =>
        {
            known.unit_bytes
        }
        _ => fresh,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_unit_is_a_number_of_whole_pages_and_stays_as_long_as_it_is() {
        for block_size in [1, 2, 4, 8, 16, 32].map(|kib: u32| kib << 10) {
            for size_bytes in [0, 1 << 20, 0x2000_0000, 0x4000_0001] {
                let entry = SourceEntry {
                    size_bytes,
                    block_size: Some(block_size),
                    ..SourceEntry::bytes("base/1/2", 0o600, Vec::new())
                };
                for known in [None, Some(8), Some(16), Some(32)] {
                    let known = known.map(|kib: u32| FileBody {
                        size_bytes,
                        stamp: entry.stamp(),
                        unit_bytes: kib << 10,
                        content: Content::Inline(Vec::new()),
                    });
                    let unit = unit_bytes(&entry, known.as_ref(), false);
                    assert!(unit.is_multiple_of(block_size), "{block_size} {size_bytes} {unit}");
                    assert!((UNIT_BYTES_MIN..=UNIT_BYTES_MAX).contains(&unit));
                    if let Some(known) = known.filter(|known| known.unit_bytes >= block_size) {
                        assert_eq!(unit, known.unit_bytes);
                    }
                }
            }
        }
    }

    #[test]
    fn everything_is_read_again_once_within_the_days_that_are_asked_for() {
        let day_ms = 24 * 3600 * 1000;
        for days in [1_u32, 7, 30, 365] {
            let round = Duration::from_hours(24 * u64::from(days));
            let mut from = 7;
            let mut unread: Vec<u64> = (0..20_000).collect();
            let (all, mut least) = (unread.len(), usize::MAX);
            for _ in 0..days {
                let reread = Reread::since(from, day_ms, round);
                let before = unread.len();
                unread.retain(|piece| !reread.covers(b"base/1/2", *piece));
                least = least.min(before - unread.len());
                from = reread.next();
            }
            assert!(unread.is_empty(), "{days} days: {unread:?}");
            let share = all / days as usize;
            assert!(least > share / 3, "the load is spread over {days} days: {least} of {share}");
        }
    }

    #[test]
    fn no_time_rereads_nothing_and_much_time_everything() {
        let covered =
            |reread: Reread| (0..1000).filter(|piece| reread.covers(b"x", *piece)).count();
        let since = |elapsed_ms| Reread::since(5, elapsed_ms, Duration::from_hours(30 * 24));
        assert_eq!(covered(since(0)), 0);
        assert_eq!(covered(since(-9)), 0);
        assert_eq!(covered(since(i64::MAX)), 1000);
        assert_eq!(covered(Reread::since(5, 1, Duration::ZERO)), 1000, "no round takes no time");
        assert_eq!(covered(Reread::NOTHING), 0);
    }
}
