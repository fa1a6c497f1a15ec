//! The working threads of a copy: each reads stretches of files straight into its frame, drops what did not change,
//! and compresses and seals the rest into its own pack. Nothing is handed from thread to thread but results.

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError, SendTimeoutError, Sender};

use super::assemble::Event;
use super::needed::Needed;
use super::previous::{Begun, Old, OldUnit, OldUnits};
use super::source::{InMemory, Source, SourceFile};
use super::stream::{PackStream, Uploads};
use crate::detect::{Detection, ZERO};
use crate::entry::{Extent, Place, SourceEntry, push_extent};
use crate::error::{Error, show};
use crate::limits::FRAME_BYTES;
use crate::pack::{Codec, Compressor, FrameRef, ObjectType, PackId};
use crate::progress::Progress;
use crate::stop::Stop;

/// A stretch of a file that is to be read.
pub(super) struct Job {
    pub(super) seq: u64,
    pub(super) entry: Arc<SourceEntry>,
    pub(super) unit_bytes: u32,
    /// Which stretch, counted from 0.
    pub(super) piece: u64,
    pub(super) start: u64,
    pub(super) length: u64,
    /// The predecessor's file, when its units have the same size.
    pub(super) old: Option<Old>,
    /// The same file in interrupted backups, under the same condition.
    pub(super) begun: Vec<Begun>,
    /// Units that differ from the predecessor's; all may where that is not known.
    pub(super) needed: Option<Needed>,
    /// The units that would have to be read if it were not its turn to be read whole; `None` where it is not.
    pub(super) its_turn: Option<Needed>,
    /// Its file has not changed, says its inode.
    pub(super) claims_unchanged: bool,
    /// What was read already, of a stream.
    pub(super) read: Option<Stretch>,
}

/// A stretch of a stream in memory.
pub(super) struct Stretch {
    pub(super) bytes: Bytes,
    /// Given back when the stretch is dropped: only so many are in memory at once.
    #[expect(dead_code, reason = "it is held, and given back when it is dropped")]
    pub(super) room: Room,
}

/// Room for one stretch of a stream.
pub(super) struct Room(Receiver<()>);

impl Room {
    /// Waits until there is room for another one, or for the end.
    pub(super) fn wait(
        taken: &Sender<()>,
        back: &Receiver<()>,
        stop: &Stop,
    ) -> Result<Self, Error> {
        loop {
            match taken.send_timeout((), IDLE) {
                Ok(()) => return Ok(Self(back.clone())),
                Err(SendTimeoutError::Timeout(())) => stop.check()?,
                Err(SendTimeoutError::Disconnected(())) => return Err(Error::Cancelled),
            }
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        let _ = self.0.try_recv();
    }
}

/// Stretches that may be waiting for their frame to be sealed, counted by number. Beyond it a small frame is sealed:
/// the assembler must not wait for ever, nor keep everything that comes behind.
const LAG: u64 = 256;
/// How long a thread without work keeps an unsealed frame.
const IDLE: Duration = Duration::from_millis(20);
/// The frame that is being filled: its place is not known yet.
const OPEN: FrameRef = FrameRef {
    pack: PackId([0; 16]),
    number: u32::MAX,
    offset: 0,
    stored_bytes: 0,
    raw_bytes: 0,
    codec: Codec::Raw,
};

pub(super) struct Copier<'a> {
    source: &'a dyn Source,
    stop: &'a Stop,
    progress: &'a Progress,
    detection: Detection,
    spoilt: Arc<BTreeSet<PackId>>,
    stream: PackStream,
    compressor: Compressor,
    events: &'a Sender<(u64, Event)>,
    frame: Vec<u8>,
    filled: usize,
    waiting: VecDeque<Copied>,
}

/// A stretch that was read.
#[derive(Debug)]
pub(super) struct Copied {
    seq: u64,
    pub(super) extents: Vec<Extent>,
    pub(super) hashes: Vec<u8>,
    /// Bytes that were there.
    pub(super) bytes: u64,
    /// Fewer than at the scan.
    pub(super) short: bool,
    /// The shard that describes it already, when nothing changed.
    pub(super) unchanged: Option<crate::shard::ShardRef>,
}

impl<'a> Copier<'a> {
    pub(super) fn new(
        source: &'a dyn Source,
        uploads: &'a Arc<Uploads>,
        detection: Detection,
        spoilt: Arc<BTreeSet<PackId>>,
        level: i32,
        events: &'a Sender<(u64, Event)>,
    ) -> Result<Self, Error> {
        let mut compressor = Compressor::new(level)
            .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
        // The frame is authenticated as a whole, and its length is known.
        compressor
            .set_parameter(zstd::zstd_safe::CParameter::ChecksumFlag(false))
            .map_err(|error| Error::Bug(format!("zstd cannot be set up: {error}")))?;
        Ok(Self {
            source,
            stop: &uploads.stop,
            progress: &uploads.progress,
            detection,
            spoilt,
            stream: PackStream::new(Arc::clone(uploads), ObjectType::Data),
            compressor,
            events,
            frame: vec![0; FRAME_BYTES],
            filled: 0,
            waiting: VecDeque::new(),
        })
    }

    pub(super) fn run(mut self, jobs: &Receiver<Job>) -> Result<(), Error> {
        loop {
            let job = match jobs.recv_timeout(IDLE) {
                Ok(job) => job,
                Err(RecvTimeoutError::Timeout) => {
                    self.stop.check()?;
                    self.seal()?;
                    self.release()?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => break,
            };
            self.stop.check()?;
            if self.waiting.front().is_some_and(|oldest| oldest.seq + LAG < job.seq) {
                self.seal()?;
                self.release()?;
            }
            self.copy(&job)?;
        }
        self.seal()?;
        self.release()?;
        self.stream.close()
    }

    fn copy(&mut self, job: &Job) -> Result<(), Error> {
        let failed = |source| Error::Source { path: show(&job.entry.path), source };
        let mut file: Box<dyn SourceFile> = if let Some(stretch) = &job.read {
            Box::new(InMemory { bytes: stretch.bytes.clone(), start: job.start })
        } else if let Some(bytes) = &job.entry.content {
            Box::new(InMemory { bytes: bytes.clone(), start: 0 })
        } else if let Some(file) = self.source.open(&job.entry).map_err(failed)? {
            file
        } else {
            self.progress.add_vanished();
            return self.send(job.seq, Event::Vanished);
        };
        let unit_bytes = job.unit_bytes as usize;
        let units = usize::try_from(job.length.div_ceil(u64::from(job.unit_bytes))).unwrap_or(0);
        // Before the predecessor's units, which may have to come from far away.
        advise(file.as_mut(), job, units);
        let old = match &job.old {
            Some(old) => old.units(job.piece, self.stop)?,
            None => None,
        };
        let known: Vec<OldUnit> = old.iter().flat_map(OldUnits::units).collect();
        let mut stored = Vec::with_capacity(job.begun.len());
        for begun in &job.begun {
            stored.push((begun, begun.units(job.piece, self.stop)?));
        }
        let units = usize::try_from(job.length.div_ceil(u64::from(job.unit_bytes))).unwrap_or(0);
        let copied = Copied {
            seq: job.seq,
            extents: Vec::new(),
            hashes: Vec::with_capacity(units * ZERO.len()),
            bytes: 0,
            short: false,
            unchanged: None,
        };
        // It waits among the others from the start, so that sealing a frame halfway finds it.
        self.waiting.push_back(copied);
        // Units that are not what they were, and such as are but lie in a damaged pack.
        let (mut changed, mut lost) = (0_u64, 0_u64);
        let (mut taken_over, mut reread) = (0, 0);
        let (mut done, mut unread) = (0_u64, 0_u64);
        // The next unit.
        let mut number = 0;
        while done < job.length {
            if let Some(unit) = self.not_needed(job, &known, number) {
                let copied = self.last()?;
                copied.hashes.extend_from_slice(&unit.hash);
                push_extent(&mut copied.extents, 1, unit.place, job.unit_bytes);
                done += unit.bytes as u64;
                unread += unit.bytes as u64;
                number += 1;
                continue;
            }
            let to_next = (number + 1..units)
                .find(|number| self.not_needed(job, &known, *number).is_some())
                .map(|next| (next - number) as u64 * u64::from(job.unit_bytes));
            let left = to_next.unwrap_or(job.length - done);
            if (FRAME_BYTES - self.filled)
                < usize::try_from(left).unwrap_or(usize::MAX).min(unit_bytes)
            {
                self.seal()?;
            }
            let room = FRAME_BYTES - self.filled;
            let wanted = match usize::try_from(left) {
                Ok(left) if left <= room => left,
                _ => room - room % unit_bytes,
            };
            let start = self.filled;
            let got = read(file.as_mut(), job.start + done, &mut self.frame[start..start + wanted])
                .map_err(failed)?;
            let copied = self.waiting.back_mut().ok_or_else(misplaced)?;
            let mut keep = start;
            for at in (start..start + got).step_by(unit_bytes) {
                let end = (at + unit_bytes).min(start + got);
                let hash = self.detection.hash(&self.frame[at..end]);
                copied.hashes.extend_from_slice(&hash);
                let is_same = |unit: &&OldUnit| unit.bytes == end - at && unit.hash == hash;
                if job.its_turn.is_some_and(|touched| !touched.contains(number))
                    && known.get(number).is_some()
                {
                    reread += (end - at) as u64;
                }
                let unit = number;
                let same = known.get(unit).filter(is_same);
                number += 1;
                changed += u64::from(same.is_none());
                let here = same.filter(|unit| !unit.is_in(&self.spoilt));
                lost += u64::from(same.is_some() && here.is_none());
                let place = match here {
                    Some(unit) => unit.place,
                    None if hash == ZERO => None,
                    None => {
                        let there = stored.iter().find_map(|(begun, units)| {
                            let place = units.get(unit).filter(is_same)?.place?;
                            begun.has(place).then_some(place)
                        });
                        if there.is_some() {
                            taken_over += (end - at) as u64;
                            there
                        } else {
                            if keep != at {
                                self.frame.copy_within(at..end, keep);
                            }
                            let offset = u32::try_from(keep).unwrap_or(u32::MAX);
                            keep += end - at;
                            Some(Place { frame: OPEN, offset })
                        }
                    }
                };
                push_extent(&mut copied.extents, 1, place, job.unit_bytes);
            }
            self.filled = keep;
            done += got as u64;
            if got < wanted {
                break;
            }
        }
        self.progress.add_bytes(done);
        self.progress.add_read(file.fetched_bytes().unwrap_or(done - unread));
        self.progress.add_taken_over(taken_over);
        self.progress.add_reread(reread);
        self.progress.add_skipped(unread);
        let listed = (job.entry.mtime_ns, job.entry.ctime_ns);
        // Whoever wrote to it since it was listed has done so openly.
        if job.claims_unchanged && file.changed_at_ns().is_none_or(|now| now == listed) {
            self.progress.add_silent_changes(&job.entry.path, changed);
        }
        let copied = self.last()?;
        copied.bytes = done;
        copied.short = done < job.length;
        if changed + lost == 0
            && let Some(old) = &old
            && old.bytes == done
        {
            copied.unchanged.clone_from(&old.reference);
        }
        self.release()
    }

    /// The stretch that is being read.
    fn last(&mut self) -> Result<&mut Copied, Error> {
        self.waiting.back_mut().ok_or_else(misplaced)
    }

    /// The unit that the predecessor has in this place, when that need not be read to be taken over.
    fn not_needed<'u>(
        &self,
        job: &Job,
        known: &'u [OldUnit],
        number: usize,
    ) -> Option<&'u OldUnit> {
        let needed = job.needed.as_ref()?;
        let left = job.length.checked_sub(number as u64 * u64::from(job.unit_bytes))?;
        let bytes = left.min(u64::from(job.unit_bytes));
        known
            .get(number)
            .filter(|unit| !needed.contains(number) && unit.bytes as u64 == bytes)
            .filter(|unit| !unit.is_in(&self.spoilt))
    }

    /// Compresses and seals what was gathered.
    fn seal(&mut self) -> Result<(), Error> {
        if self.filled == 0 {
            return Ok(());
        }
        let frame = self.stream.append(&self.frame[..self.filled], Some(&mut self.compressor))?;
        self.stream.roll()?;
        self.filled = 0;
        for copied in &mut self.waiting {
            for extent in &mut copied.extents {
                if let Some(place) = &mut extent.place
                    && place.frame == OPEN
                {
                    place.frame = frame;
                }
            }
        }
        Ok(())
    }

    /// Hands out the stretches that wait for nothing.
    fn release(&mut self) -> Result<(), Error> {
        let open = |copied: &Copied| {
            copied
                .extents
                .iter()
                .rev()
                .any(|extent| extent.place.is_some_and(|place| place.frame == OPEN))
        };
        while self.waiting.front().is_some_and(|copied| !open(copied)) {
            if let Some(copied) = self.waiting.pop_front() {
                self.send(copied.seq, Event::Copied(Box::new(copied)))?;
            }
        }
        Ok(())
    }

    fn send(&self, seq: u64, event: Event) -> Result<(), Error> {
        self.events.send((seq, event)).map_err(|_| Error::Cancelled)
    }
}

fn misplaced() -> Error {
    Error::Bug("a stretch lost its place".into())
}

/// Tells what of the stretch will be read, as far as that is known yet.
fn advise(file: &mut dyn SourceFile, job: &Job, units: usize) {
    let Some(needed) = &job.needed else { return file.advise(job.start, job.length) };
    let unit_bytes = u64::from(job.unit_bytes);
    for run in needed.runs(units) {
        let (from, to) = (run.start as u64 * unit_bytes, run.end as u64 * unit_bytes);
        file.advise(job.start + from, to.min(job.length) - from);
    }
}

/// One read; only the end of the file makes it short.
fn read(file: &mut dyn SourceFile, offset: u64, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        match file.read_at(offset, buffer) {
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Ok(got) => return Ok(got.min(buffer.len())),
            Err(error) => return Err(error),
        }
    }
}
