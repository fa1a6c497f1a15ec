//! Write-ahead log files: the header of a segment, and histories on disk. Their names are `proto`'s.
//!
//! Deliberately not here: what the records say (that is `wal_changes`), and how segments are
//! fetched or stored.

use std::fs::File;
use std::io;
use std::path::Path;

use proto::{Lsn, SystemIdentifier, Timeline};

pub use proto::wal::{History, HistoryEntry, Segment, WalFileName, history_file_name};

use crate::Error;
use crate::files::ServerFiles;
use crate::process::Result;

/// The long header at the start of every segment (`SizeOfXLogLongPHD`).
pub const SEGMENT_HEADER_BYTES: usize = 40;
/// Marks a long header (`XLP_LONG_HEADER`).
const LONG_HEADER: u16 = 0x0002;
/// Longest history file that is read: one line a promotion, about 60 bytes each.
pub const HISTORY_LIMIT_BYTES: u64 = 1 << 20;

/// What the first page of a segment says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Version of the log's layout; changes with every major version of PostgreSQL.
    pub magic: u16,
    /// Timeline of the page: the name's, or an earlier one where a promotion copied the segment.
    pub timeline: Timeline,
    /// Where the segment starts.
    pub address: Lsn,
    /// Which cluster wrote it.
    pub system_identifier: SystemIdentifier,
    /// Bytes in a segment.
    pub segment_size: u32,
    /// Bytes in a page of the log.
    pub block_size: u32,
}

impl SegmentHeader {
    /// Reads the first bytes of a segment. The error says what is wrong with them.
    pub fn parse(bytes: &[u8]) -> std::result::Result<Self, String> {
        let Some(header) = bytes.first_chunk::<SEGMENT_HEADER_BYTES>() else {
            return Err(format!("it is too short: {} bytes", bytes.len()));
        };
        let u16_at = |at: usize| u16::from_ne_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| {
            u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        };
        let u64_at = |at: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&header[at..at + 8]);
            u64::from_ne_bytes(word)
        };
        let magic = u16_at(0);
        if major_of_magic(magic).is_none() {
            return Err(format!(
                "it does not begin like a segment of PostgreSQL 14 to 18: {magic:04X}"
            ));
        }
        if u16_at(2) & LONG_HEADER == 0 {
            return Err("its first page lacks the segment's header".to_owned());
        }
        Ok(Self {
            magic,
            timeline: Timeline(u32_at(4)),
            address: Lsn(u64_at(8)),
            system_identifier: SystemIdentifier(u64_at(24)),
            segment_size: u32_at(32),
            block_size: u32_at(36),
        })
    }

    /// The major version that writes such segments.
    pub fn major(&self) -> u32 {
        major_of_magic(self.magic).unwrap_or(0)
    }
}

fn major_of_magic(magic: u16) -> Option<u32> {
    Some(match magic {
        0xD10D => 14,
        0xD110 => 15,
        0xD113 => 16,
        0xD116 => 17,
        0xD118 => 18,
        _ => return None,
    })
}

/// Whether a segment that begins at `start` was written to its end: its last page is of this segment, or it was left by a
/// switch, behind which everything is zero. A file that the server prepared and did not fill is neither.
pub fn is_whole(content: &[u8], start: Lsn) -> bool {
    const SWITCH_BYTES: usize = 24;
    const XLOG_SWITCH: u8 = 0x40;
    let Ok(header) = SegmentHeader::parse(content) else { return false };
    let word = |at: usize| content.get(at..at + 8).and_then(|word| word.try_into().ok());
    let last_page = content.len().checked_sub(header.block_size as usize);
    let address = last_page.and_then(|page| word(page + 8)).map(u64::from_ne_bytes);
    if last_page.is_some_and(|page| address == Some(start.0 + page as u64)) {
        return true;
    }
    // The switch is the last thing that is not zero. One that lies across two pages is not recognised.
    let Some(last) = content.iter().rposition(|byte| *byte != 0) else { return false };
    let end = (last + 1).next_multiple_of(8);
    let record = end.checked_sub(SWITCH_BYTES).and_then(|begin| content.get(begin..end));
    record.is_some_and(|record| {
        record[..4] == u32::try_from(SWITCH_BYTES).unwrap_or(0).to_ne_bytes()
            && record[16..18] == [XLOG_SWITCH, 0]
    })
}

/// Whose log a segment must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WalOrigin {
    /// Major version of the server.
    pub major: u32,
    /// The cluster.
    pub system_identifier: SystemIdentifier,
    /// Bytes in a segment.
    pub segment_size: u32,
}

impl WalOrigin {
    /// Holds the first bytes of a segment against its name and its cluster. A file that the server
    /// has prepared for later use still has the header of an earlier segment, and is refused here.
    /// The error says what does not fit.
    pub fn verify(&self, segment: Segment, bytes: &[u8]) -> std::result::Result<(), String> {
        let header = SegmentHeader::parse(bytes)?;
        let address = segment.start(self.segment_size);
        if header.major() != self.major {
            return Err(format!("PostgreSQL {} wrote it, not {}", header.major(), self.major));
        }
        if header.system_identifier != self.system_identifier {
            return Err(format!(
                "the cluster with system identifier {} wrote it, not {}",
                header.system_identifier, self.system_identifier
            ));
        }
        if header.segment_size != self.segment_size {
            return Err(format!(
                "it is of a log with segments of {} bytes, not {}",
                header.segment_size, self.segment_size
            ));
        }
        if header.address != address {
            return Err(format!("it starts at {}, its name says {address}", header.address));
        }
        // The first segment of a timeline begins as a copy of the last of the one before, headers
        // included.
        if header.timeline.0 == 0 || header.timeline > segment.timeline {
            return Err(format!(
                "it is of timeline {}, its name says {}",
                header.timeline, segment.timeline
            ));
        }
        Ok(())
    }

    /// Reads a segment from `pg_wal` and holds its size and header against its name. `None` when it
    /// is not there, or no more when it was read: the server may give the file another name at any time.
    ///
    /// The caller knows from the server that the segment is complete: the file has its full size
    /// from the beginning.
    pub fn read(&self, files: &dyn ServerFiles, segment: Segment) -> Result<Option<Vec<u8>>> {
        let path = Path::new("pg_wal").join(segment.file_name(self.segment_size));
        let failed = |source: io::Error| files.unreadable(&path, source);
        let size = u64::from(self.segment_size);
        let Some(content) = files.read(&path, size + 1).map_err(failed)? else { return Ok(None) };
        let wrong = |what| Error::Content { name: files.place(&path).display().to_string(), what };
        if content.len() as u64 != size {
            let length = content.len();
            return Err(wrong(format!("it has {length} bytes, not {size}")));
        }
        self.verify(segment, &content).map_err(wrong)?;
        // A file whose header still fits after the reading was not recycled under us.
        let header = files.read(&path, SEGMENT_HEADER_BYTES as u64).map_err(failed)?;
        Ok(header.is_some_and(|now| self.verify(segment, &now).is_ok()).then_some(content))
    }
}

/// Reads the history of `timeline` in `directory` (`pg_wal`). Timeline 1 has none and needs none;
/// `None` when the file is missing.
pub fn read_history(directory: &Path, timeline: Timeline) -> Result<Option<History>> {
    if timeline.0 <= 1 {
        return Ok(Some(History { timeline, entries: Vec::new() }));
    }
    let path = directory.join(history_file_name(timeline));
    let read = || {
        let mut text = String::new();
        let mut file = io::Read::take(File::open(&path)?, HISTORY_LIMIT_BYTES);
        io::Read::read_to_string(&mut file, &mut text).map(|_| text)
    };
    match read() {
        Ok(text) => match History::parse(timeline, &text) {
            Ok(history) => Ok(Some(history)),
            Err(error) => {
                Err(Error::Content { name: history_file_name(timeline), what: error.what })
            }
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(Error::io("read", &path, source)),
    }
}
