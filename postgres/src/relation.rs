//! Relation files: what their names mean, and how one is read while the server writes to it.
//!
//! A live file may be read in the middle of a write. A page that looks bad is therefore read again,
//! and counts as damaged only when it stays the same and was last changed before the backup began:
//! any other page comes back whole from the WAL of the backup. Damaged pages are reported and
//! returned as they are; dropping or repairing them is nobody's business here.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use proto::Lsn;

use crate::files::{ServerFile, ServerFiles};
use crate::page::{self, PageState};

/// Pauses before a suspicious page is read again. A write takes microseconds; one that waits for a
/// slow disk may take tenths of a second.
const RE_READS: [Duration; 5] = [
    Duration::ZERO,
    Duration::from_millis(1),
    Duration::from_millis(5),
    Duration::from_millis(25),
    Duration::from_millis(250),
];
/// After so many damaged pages in one file there is no more waiting: the file is broken, and a
/// gigabyte of broken pages must not take an hour.
const PATIENCE_PAGES: usize = 64;
/// A page may be changed later than the backup's start by no more WAL than this. The bound tells a
/// damaged header (a random position) from a true one; no backup outlives so much WAL.
const PLAUSIBLE_WAL_BYTES: u64 = 1 << 46;

/// A part of a relation that has files of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Fork {
    /// The rows or index entries.
    Main,
    /// Free space map.
    FreeSpace,
    /// Visibility map.
    Visibility,
    /// What an unlogged relation is reset to after a crash.
    Init,
}

/// The name of a relation file: `16384`, `16384.1`, `16384_fsm`, `16384_vm.2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelationFile {
    /// The relation's number on disk (`relfilenode`), not its OID.
    pub filenode: u32,
    /// Which part.
    pub fork: Fork,
    /// Which stretch of it, from 0.
    pub segment: u32,
}

impl fmt::Display for RelationFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fork = match self.fork {
            Fork::Main => "",
            Fork::FreeSpace => "_fsm",
            Fork::Visibility => "_vm",
            Fork::Init => "_init",
        };
        write!(f, "{}{fork}", self.filenode)?;
        if self.segment > 0 { write!(f, ".{}", self.segment) } else { Ok(()) }
    }
}

impl RelationFile {
    /// Reads a file name. `None` for everything else that lies beside relations.
    pub fn parse(name: &str) -> Option<Self> {
        let (stem, segment) = match name.split_once('.') {
            Some((stem, digits)) => (stem, number(digits)?),
            None => (name, 0),
        };
        let (digits, fork) = match stem.split_once('_') {
            None => (stem, Fork::Main),
            Some((digits, "fsm")) => (digits, Fork::FreeSpace),
            Some((digits, "vm")) => (digits, Fork::Visibility),
            Some((digits, "init")) => (digits, Fork::Init),
            Some(_) => return None,
        };
        Some(Self { filenode: number(digits)?, fork, segment })
    }

    /// Whether `name` is a temporary relation's: `t<process>_<relation>[_fork][.segment]`. They
    /// belong to a session that a restored server does not have.
    pub fn is_temporary(name: &str) -> bool {
        let parse = || {
            let (process, rest) = name.strip_prefix('t')?.split_once('_')?;
            (process.bytes().all(|b| b.is_ascii_digit()) && !process.is_empty()).then_some(())?;
            Self::parse(rest)
        };
        parse().is_some()
    }

    /// The number of the file's first block inside its fork.
    pub fn first_block(self, segment_blocks: u32) -> Option<u32> {
        self.segment.checked_mul(segment_blocks)
    }
}

/// A positive number without leading zeros, as the server writes it.
fn number(digits: &str) -> Option<u32> {
    let plain = digits.bytes().all(|b| b.is_ascii_digit()) && !digits.starts_with('0');
    if plain { digits.parse().ok() } else { None }
}

/// What is needed to judge the pages of one cluster during one backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRules {
    /// Bytes in a page.
    pub block_size: u32,
    /// Blocks in a segment of a large relation.
    pub segment_blocks: u32,
    /// Whether pages carry checksums; without them only the header is judged.
    pub checksums: bool,
    /// Redo position of the checkpoint the backup starts from.
    pub backup_start: Lsn,
}

/// A relation file that is being read for a backup.
#[derive(Debug)]
pub struct RelationReader {
    file: Box<dyn ServerFile>,
    rules: PageRules,
    first_block: u32,
    bad_blocks: Vec<u32>,
    torn_pages: u64,
}

impl RelationReader {
    /// When content and inode of the file were last changed, nanoseconds; `None` where nobody tells.
    pub fn changed_at_ns(&self) -> Option<(i64, i64)> {
        self.file.changed_at_ns()
    }

    /// Bytes that came from the file so far, where they may be others than those that were asked for.
    pub fn fetched_bytes(&self) -> Option<u64> {
        self.file.fetched_bytes()
    }

    /// Opens a file of a server, `size_bytes` long when it was listed. `None` when it is gone: its relation was dropped, and the
    /// WAL of the backup says so.
    pub fn open_in(
        files: &dyn ServerFiles,
        path: &Path,
        size_bytes: u64,
        name: RelationFile,
        rules: PageRules,
    ) -> io::Result<Option<Self>> {
        let Some(file) = files.open(path, size_bytes)? else { return Ok(None) };
        let impossible =
            || io::Error::new(io::ErrorKind::InvalidData, "segment number is too large");
        let first_block = name.first_block(rules.segment_blocks).ok_or_else(impossible)?;
        Ok(Some(Self { file, rules, first_block, bad_blocks: Vec::new(), torn_pages: 0 }))
    }

    /// These bytes will be read next. A hint.
    pub fn advise(&self, offset: u64, length: u64) {
        self.file.advise(offset, length);
    }

    /// Fills `buffer` from `offset` on, which must be a multiple of the page size, and returns how
    /// many bytes the file had: fewer than asked for means that it ends there now. A last page that
    /// is only partly there is legal and not judged.
    pub fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let block_size = self.rules.block_size as usize;
        if !offset.is_multiple_of(block_size as u64) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "offset inside a page"));
        }
        let mut length = self.file.read_full_at(buffer, offset)?;
        let in_file = u32::try_from(offset / block_size as u64).map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidInput, "offset beyond any relation")
        })?;
        let mut suspects: Vec<u32> = Vec::new();
        for (index, page) in (0_u32..).zip(buffer[..length].chunks_exact(block_size)) {
            if !self.is_acceptable(page, in_file + index) {
                suspects.push(index);
            }
        }
        if !suspects.is_empty() {
            self.read_again(offset, buffer, &mut length, suspects)?;
        }
        Ok(length)
    }

    /// Blocks of this file, from 0, that were damaged when they were read; sorted, each once.
    pub fn bad_blocks(&self) -> &[u32] {
        &self.bad_blocks
    }

    /// Pages that were caught in the middle of a write and are whole in the end, or will be after
    /// replay.
    pub fn torn_pages(&self) -> u64 {
        self.torn_pages
    }

    /// Whether a page may go into the backup without a second look.
    fn is_acceptable(&mut self, page: &[u8], block: u32) -> bool {
        match self.judge(page, block) {
            Judgement::Sound => true,
            Judgement::Replayed => {
                self.torn_pages += 1;
                true
            }
            Judgement::Suspicious => false,
        }
    }

    fn judge(&self, page: &[u8], block: u32) -> Judgement {
        let number = self.first_block.wrapping_add(block);
        let state = page::inspect(page, number, self.rules.checksums);
        if state.is_sound() {
            return Judgement::Sound;
        }
        // A page that claims to be new has no position; otherwise the WAL of the backup holds a
        // full image of every page that was changed since its start.
        let since = page::lsn(page).0.checked_sub(self.rules.backup_start.0);
        let claims_new = state == PageState::BadHeader && page::lsn(page) == Lsn::INVALID;
        match since {
            Some(bytes) if bytes < PLAUSIBLE_WAL_BYTES && !claims_new => Judgement::Replayed,
            _ => Judgement::Suspicious,
        }
    }

    /// Reads the suspicious pages again, all of them after each pause, and writes down those that
    /// stay as they are.
    fn read_again(
        &mut self,
        offset: u64,
        buffer: &mut [u8],
        length: &mut usize,
        mut suspects: Vec<u32>,
    ) -> io::Result<()> {
        let block_size = self.rules.block_size as usize;
        let in_file = u32::try_from(offset / block_size as u64).unwrap_or(u32::MAX);
        let mut fresh = vec![0; block_size];
        for pause in RE_READS {
            if self.bad_blocks.len() >= PATIENCE_PAGES && !pause.is_zero() {
                break;
            }
            std::thread::sleep(pause);
            let mut still = Vec::new();
            for index in suspects {
                let start = index as usize * block_size;
                let n_bytes = self.file.read_full_at(&mut fresh, offset + start as u64)?;
                if n_bytes < block_size {
                    // Truncated meanwhile: the file ends here, and the WAL says so.
                    *length = (*length).min(start + n_bytes);
                    buffer[start..start + n_bytes].copy_from_slice(&fresh[..n_bytes]);
                    continue;
                }
                let page = &mut buffer[start..start + block_size];
                let changed = page != fresh.as_slice();
                page.copy_from_slice(&fresh);
                match self.judge(&fresh, in_file + index) {
                    Judgement::Sound | Judgement::Replayed => self.torn_pages += 1,
                    // Somebody is writing it right now, so its change is in the WAL of the backup.
                    Judgement::Suspicious if changed => self.torn_pages += 1,
                    Judgement::Suspicious => still.push(index),
                }
            }
            suspects = still;
            if suspects.is_empty() {
                return Ok(());
            }
        }
        let end = u32::try_from(*length / block_size).unwrap_or(u32::MAX);
        for index in suspects.into_iter().filter(|index| *index < end) {
            let block = in_file + index;
            if let Err(position) = self.bad_blocks.binary_search(&block) {
                self.bad_blocks.insert(position, block);
            }
        }
        Ok(())
    }
}

enum Judgement {
    Sound,
    /// Bad as it stands, and changed since the backup began: replay puts a full image over it.
    Replayed,
    Suspicious,
}

/// Reads until the buffer is full or the file ends.
pub fn read_full_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    fill(buffer, offset, |part, at| file.read_at(part, at))
}

/// The same by any way to read, which is given what is left of the buffer and where that begins.
pub(crate) fn fill(
    buffer: &mut [u8],
    offset: u64,
    mut read: impl FnMut(&mut [u8], u64) -> io::Result<usize>,
) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match read(&mut buffer[filled..], offset + filled as u64) {
            Ok(0) => break,
            Ok(n_bytes) => filled += n_bytes,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_mean_what_the_server_means() {
        let file = |filenode, fork, segment| Some(RelationFile { filenode, fork, segment });
        assert_eq!(RelationFile::parse("16384"), file(16384, Fork::Main, 0));
        assert_eq!(RelationFile::parse("16384.12"), file(16384, Fork::Main, 12));
        assert_eq!(RelationFile::parse("16384_fsm"), file(16384, Fork::FreeSpace, 0));
        assert_eq!(RelationFile::parse("16384_vm.3"), file(16384, Fork::Visibility, 3));
        assert_eq!(RelationFile::parse("4294967295_init"), file(u32::MAX, Fork::Init, 0));
        for name in ["16384", "16384.12", "16384_fsm", "16384_vm.3", "4294967295_init"] {
            assert_eq!(RelationFile::parse(name).unwrap().to_string(), name);
        }
        for other in [
            "",
            "0",
            "01",
            "4294967296",
            "1.",
            "1.0",
            "1.01",
            "1_",
            "1_xyz",
            "1_fsm_vm",
            "+1",
            "PG_VERSION",
            "pg_filenode.map",
            "t3_16384",
            "1.1.1",
            "1_vm.",
            "1 ",
            "pg_internal.init",
        ] {
            assert_eq!(RelationFile::parse(other), None, "{other}");
        }
    }

    #[test]
    fn temporary_relations_are_told_from_everything_else() {
        for name in ["t3_16384", "t3_16384.1", "t12_16384_fsm", "t0_1_vm.2"] {
            assert!(RelationFile::is_temporary(name), "{name}");
        }
        for name in ["t", "t_1", "t3", "t3_", "t3_x", "t3_16384_tmp", "3_16384", "tx_1", "t-1_2"] {
            assert!(!RelationFile::is_temporary(name), "{name}");
        }
    }
}
