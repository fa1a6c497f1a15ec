//! What is on disk already, unit by unit: what is right stays, zeros are made here, everything else is wanted.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
use rustix::fs::{Advice, fadvise};

use super::fetch::{TargetFile, Wanted};
use super::tree::Tree;
use crate::detect::{Detection, is_zero};
use crate::entry::{Extent, Place};
use crate::error::{Error, show};
use crate::limits::{FRAME_BYTES, HASH_BYTES};
use crate::progress::Progress;
use crate::stop::Stop;

/// A stretch of a file that may be right already.
#[derive(Debug)]
pub(super) struct Piece {
    pub(super) file: Arc<TargetFile>,
    pub(super) unit_bytes: u32,
    /// Where it begins.
    pub(super) offset: u64,
    pub(super) bytes: u64,
    pub(super) extents: Vec<Extent>,
    /// Of its units, in order. Without them, only zeros can be told.
    pub(super) hashes: Vec<u8>,
    /// Bytes of the file that were there before; what is behind them is zero and no merit.
    pub(super) there_bytes: u64,
}

impl Piece {
    /// The units in order: where each begins, its bytes, where the backup has it.
    fn units(&self) -> impl Iterator<Item = (u64, u32, Option<Place>)> {
        let places = self.extents.iter().flat_map(|extent| {
            (0..extent.units).map(|unit| {
                extent.place.map(|place| Place {
                    frame: place.frame,
                    offset: place.offset + unit * self.unit_bytes,
                })
            })
        });
        let unit_bytes = u64::from(self.unit_bytes);
        (0_u64..).zip(places).map(move |(number, place)| {
            let start = number * unit_bytes;
            let bytes = self.bytes.saturating_sub(start).min(unit_bytes);
            (self.offset + start, u32::try_from(bytes).unwrap_or(self.unit_bytes), place)
        })
    }

    /// Everything of it that is in a frame: what to want when nothing is there.
    pub(super) fn wanted(&self) -> Vec<Wanted> {
        let mut wanted = Vec::new();
        let mut done = 0;
        for extent in &self.extents {
            let whole = u64::from(extent.units) * u64::from(self.unit_bytes);
            let bytes = whole.min(self.bytes.saturating_sub(done));
            if let Some(place) = extent.place {
                wanted.push(Wanted {
                    file: Arc::clone(&self.file),
                    offset: self.offset + done,
                    bytes: u32::try_from(bytes).unwrap_or(u32::MAX),
                    place,
                });
            }
            done += bytes;
        }
        wanted
    }
}

/// One thread that compares.
pub(super) struct Comparer<'a> {
    pub(super) tree: &'a Tree,
    pub(super) stop: &'a Stop,
    pub(super) progress: &'a Progress,
    pub(super) detection: Detection,
    /// Whether it may write zeros; else it only looks.
    pub(super) writes: bool,
    /// Whether the page cache may answer for the disk. Where a restore was interrupted, it never does: what could not be
    /// written may be right in memory, and whoever was told so is gone.
    pub(super) believes_cache: bool,
    pub(super) wants: Sender<Vec<Wanted>>,
}

impl Comparer<'_> {
    pub(super) fn run(self, pieces: &Receiver<Piece>) -> Result<(), Error> {
        let mut open: Option<(u64, File)> = None;
        let mut buffer = vec![0; FRAME_BYTES];
        for piece in pieces {
            self.stop.check()?;
            let file = match open.take() {
                Some((id, file)) if id == piece.file.id => file,
                _ => {
                    let file = self.tree.read_file(&piece.file.path, self.writes)?;
                    if !self.believes_cache {
                        // Only advice, which leaves alone what is yet to be written: that is synced in the end.
                        let _ = fadvise(&file, 0, None, Advice::DontNeed);
                    }
                    file
                }
            };
            let wanted = self.piece(&piece, &file, &mut buffer)?;
            open = Some((piece.file.id, file));
            if !wanted.is_empty() {
                self.wants.send(wanted).map_err(|_| Error::Cancelled)?;
            }
        }
        Ok(())
    }

    fn piece(&self, piece: &Piece, file: &File, buffer: &mut [u8]) -> Result<Vec<Wanted>, Error> {
        let mut wanted: Vec<Wanted> = Vec::new();
        // Zeros to be made: where, how many.
        let mut zeros = (piece.offset, 0);
        let mut hashes = piece.hashes.chunks_exact(HASH_BYTES);
        let units: Vec<_> = piece.units().collect();
        for together in units.chunks(buffer.len() / piece.unit_bytes as usize) {
            let Some((start, ..)) = together.first() else { continue };
            let length: usize = together.iter().map(|(_, bytes, _)| *bytes as usize).sum();
            let read = fill(file, *start, &mut buffer[..length]);
            if let Err(error) = &read {
                // A disk that cannot read may still be able to write: what is there is fetched.
                tracing::warn!(
                    file.path = %show(&piece.file.path), file.offset = start, error = %error,
                    "A stretch on disk cannot be read and is restored"
                );
            }
            let mut rest = &buffer[..length];
            for (offset, bytes, place) in together {
                let (unit, others) = rest.split_at(*bytes as usize);
                rest = others;
                let right = match (place, hashes.next()) {
                    _ if read.is_err() => false,
                    (None, _) => is_zero(unit),
                    (Some(_), Some(hash)) => self.detection.hash(unit) == hash,
                    (Some(_), None) => false,
                };
                match place {
                    _ if right => {
                        let there = piece.there_bytes.saturating_sub(*offset);
                        self.progress.add_skipped(there.min(u64::from(*bytes)));
                    }
                    Some(place) => want(&mut wanted, piece, *offset, *bytes, *place),
                    None if zeros.0 + zeros.1 == *offset => zeros.1 += u64::from(*bytes),
                    None => {
                        self.clear(piece, file, zeros)?;
                        zeros = (*offset, u64::from(*bytes));
                    }
                }
            }
        }
        self.clear(piece, file, zeros)?;
        Ok(wanted)
    }

    fn clear(&self, piece: &Piece, file: &File, (offset, length): (u64, u64)) -> Result<(), Error> {
        if !self.writes || length == 0 {
            return Ok(());
        }
        self.tree.clear(&piece.file.path, file, offset, length)
    }
}

/// Wants a unit, together with the one before where that is its neighbour in file and frame.
fn want(wanted: &mut Vec<Wanted>, piece: &Piece, offset: u64, bytes: u32, place: Place) {
    if let Some(last) = wanted.last_mut()
        && last.offset + u64::from(last.bytes) == offset
        && last.place.frame == place.frame
        && last.place.offset + last.bytes == place.offset
    {
        last.bytes += bytes;
        return;
    }
    wanted.push(Wanted { file: Arc::clone(&piece.file), offset, bytes, place });
}

/// Reads a stretch; what is behind the end of the file is zero.
fn fill(file: &File, offset: u64, buffer: &mut [u8]) -> std::io::Result<()> {
    let mut filled = 0;
    while filled < buffer.len() {
        match file.read_at(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(got) => filled += got,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    buffer[filled..].fill(0);
    Ok(())
}
