//! Write-ahead log files: names, the header of a segment, timeline histories.
//!
//! Deliberately not here: what the records say (that is `wal_changes`), and how segments are
//! fetched or stored.

use std::fmt;
use std::fs::File;
use std::io;
use std::path::Path;

use proto::{Lsn, SystemIdentifier, Timeline};

use crate::Error;
use crate::process::Result;
use crate::relation::read_full_at;

/// Bytes that two numbers of a segment's name span: the first counts these.
const BYTES_PER_NAME: u64 = 1 << 32;
/// The long header at the start of every segment (`SizeOfXLogLongPHD`).
pub const SEGMENT_HEADER_BYTES: usize = 40;
/// Marks a long header (`XLP_LONG_HEADER`).
const LONG_HEADER: u16 = 0x0002;
/// Longest history file that is read: one line a promotion, about 60 bytes each.
const HISTORY_LIMIT_BYTES: u64 = 1 << 20;

/// A segment of the log: a timeline and a number. The number counts segments of one size, so it
/// means nothing without that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Segment {
    /// Which history it belongs to.
    pub timeline: Timeline,
    /// Its start divided by the segment size.
    pub number: u64,
}

impl Segment {
    /// The segment that holds the byte at `lsn`.
    pub fn containing(lsn: Lsn, timeline: Timeline, segment_size: u32) -> Self {
        Self { timeline, number: lsn.0 / u64::from(segment_size) }
    }

    /// The segment that holds the byte before `lsn`: the last one needed to replay up to there.
    pub fn ending_at(lsn: Lsn, timeline: Timeline, segment_size: u32) -> Self {
        Self::containing(Lsn(lsn.0.saturating_sub(1)), timeline, segment_size)
    }

    /// All segments needed to replay from `start` up to `stop`; none when nothing lies between.
    pub fn range(
        start: Lsn,
        stop: Lsn,
        timeline: Timeline,
        segment_size: u32,
    ) -> impl Iterator<Item = Self> + Clone {
        let first = Self::containing(start, timeline, segment_size).number;
        let last = Self::ending_at(stop, timeline, segment_size).number;
        let end = if stop > start { last + 1 } else { first };
        (first..end).map(move |number| Self { timeline, number })
    }

    /// Where it starts.
    pub fn start(self, segment_size: u32) -> Lsn {
        Lsn(self.number.saturating_mul(u64::from(segment_size)))
    }

    /// Where the next one starts.
    pub fn end(self, segment_size: u32) -> Lsn {
        self.next().start(segment_size)
    }

    /// The next segment of the same timeline.
    #[must_use]
    pub fn next(self) -> Self {
        Self { number: self.number + 1, ..self }
    }

    /// Its file name: 24 hexadecimal digits.
    pub fn file_name(self, segment_size: u32) -> String {
        let per_name = BYTES_PER_NAME / u64::from(segment_size);
        let (high, low) = (self.number / per_name, self.number % per_name);
        format!("{:08X}{high:08X}{low:08X}", self.timeline.0)
    }

    /// Reads a file name; `None` when it is no segment of this size.
    pub fn parse(name: &str, segment_size: u32) -> Option<Self> {
        let (timeline, rest) = hexadecimal(name)?;
        let ((high, rest), per_name) =
            (hexadecimal(rest)?, BYTES_PER_NAME / u64::from(segment_size));
        let (low, rest) = hexadecimal(rest)?;
        let fits = rest.is_empty() && timeline > 0 && u64::from(low) < per_name;
        fits.then(|| Self {
            timeline: Timeline(timeline),
            number: u64::from(high) * per_name + u64::from(low),
        })
    }
}

/// The files that belong into a WAL archive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WalFile {
    /// A whole segment.
    Segment(Segment),
    /// The last, unfinished segment of a timeline that ended in a promotion. Never to be served
    /// under the plain name.
    Partial(Segment),
    /// The history of a timeline.
    History(Timeline),
    /// The label that a backup leaves in the archive, with its offset in the segment.
    BackupLabel(Segment, u32),
}

impl WalFile {
    /// Reads a file name.
    pub fn parse(name: &str, segment_size: u32) -> Option<Self> {
        match name.split_once('.') {
            None => Segment::parse(name, segment_size).map(Self::Segment),
            Some((stem, "partial")) => Segment::parse(stem, segment_size).map(Self::Partial),
            Some((stem, "history")) => match hexadecimal(stem)? {
                (timeline, "") if timeline > 0 => Some(Self::History(Timeline(timeline))),
                _ => None,
            },
            Some((stem, rest)) => {
                let (offset, "") = hexadecimal(rest.strip_suffix(".backup")?)? else { return None };
                Segment::parse(stem, segment_size).map(|segment| Self::BackupLabel(segment, offset))
            }
        }
    }

    /// The file name.
    pub fn file_name(self, segment_size: u32) -> String {
        match self {
            Self::Segment(segment) => segment.file_name(segment_size),
            Self::Partial(segment) => format!("{}.partial", segment.file_name(segment_size)),
            Self::History(timeline) => history_file_name(timeline),
            Self::BackupLabel(segment, offset) => {
                format!("{}.{offset:08X}.backup", segment.file_name(segment_size))
            }
        }
    }
}

/// `0000000A.history` for timeline 10.
pub fn history_file_name(timeline: Timeline) -> String {
    format!("{:08X}.history", timeline.0)
}

/// Eight upper-case hexadecimal digits and what follows them.
fn hexadecimal(text: &str) -> Option<(u32, &str)> {
    let (digits, rest) = text.split_at_checked(8)?;
    let upper = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    digits.bytes().all(upper).then_some(())?;
    Some((u32::from_str_radix(digits, 16).ok()?, rest))
}

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

    /// Opens a segment in `directory` (`pg_wal`) after checking its size and header. `None` when it
    /// is not there.
    ///
    /// The caller knows from the server that the segment is complete: the file has its full size
    /// from the beginning.
    pub fn open(&self, directory: &Path, segment: Segment) -> Result<Option<File>> {
        let path = directory.join(segment.file_name(self.segment_size));
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::PermissionDenied => crate::scan::unreadable(&path, source),
            _ => Error::io("read", &path, source),
        };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let wrong = |what| Error::Content { name: path.display().to_string(), what };
        let length = file.metadata().map_err(failed)?.len();
        if length != u64::from(self.segment_size) {
            return Err(wrong(format!("it has {length} bytes, not {}", self.segment_size)));
        }
        let mut header = [0; SEGMENT_HEADER_BYTES];
        let n_bytes = read_full_at(&file, &mut header, 0).map_err(failed)?;
        self.verify(segment, &header[..n_bytes]).map_err(wrong)?;
        crate::relation::advise_once(&file);
        Ok(Some(file))
    }
}

/// One line of a timeline's history: the timeline that ended, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HistoryEntry {
    /// The timeline that was left.
    pub timeline: Timeline,
    /// The position at which the next timeline begins.
    pub switched_at: Lsn,
    /// Why, in the server's words.
    pub reason: String,
}

/// The content of a `.history` file: how a timeline came to be, the oldest change first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct History {
    /// The timeline whose history it is.
    pub timeline: Timeline,
    /// Its ancestors.
    pub entries: Vec<HistoryEntry>,
}

impl History {
    /// Reads the text of a history file.
    pub fn parse(timeline: Timeline, text: &str) -> Result<Self> {
        let wrong = |what: String| Error::Content { name: history_file_name(timeline), what };
        let mut entries: Vec<HistoryEntry> = Vec::new();
        for line in text.lines().map(str::trim) {
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let bad = || wrong(format!("the line {line:?} is no entry"));
            let mut words = line.splitn(3, char::is_whitespace).map(str::trim);
            let number: u32 = words.next().and_then(|word| word.parse().ok()).ok_or_else(bad)?;
            let switched_at = words.next().and_then(|word| word.parse().ok()).ok_or_else(bad)?;
            let reason = words.next().unwrap_or_default().to_owned();
            let before = entries.last().map_or(0, |entry| entry.timeline.0);
            if number <= before || number >= timeline.0 {
                return Err(wrong(format!("timeline {number} is out of order")));
            }
            entries.push(HistoryEntry { timeline: Timeline(number), switched_at, reason });
        }
        if entries.is_empty() && timeline.0 > 1 {
            return Err(wrong("it has no entries".to_owned()));
        }
        Ok(Self { timeline, entries })
    }

    /// Reads the history of `timeline` in `directory` (`pg_wal`). Timeline 1 has none and needs
    /// none; `None` when the file is missing.
    pub fn read(directory: &Path, timeline: Timeline) -> Result<Option<Self>> {
        if timeline.0 <= 1 {
            return Ok(Some(Self { timeline, entries: Vec::new() }));
        }
        let path = directory.join(history_file_name(timeline));
        let read = || {
            let mut text = String::new();
            let mut file = io::Read::take(File::open(&path)?, HISTORY_LIMIT_BYTES);
            io::Read::read_to_string(&mut file, &mut text).map(|_| text)
        };
        match read() {
            Ok(text) => Self::parse(timeline, &text).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(Error::io("read", &path, source)),
        }
    }

    /// The timeline that wrote the byte at `lsn`, seen from this history.
    pub fn timeline_at(&self, lsn: Lsn) -> Timeline {
        let entry = self.entries.iter().find(|entry| lsn < entry.switched_at);
        entry.map_or(self.timeline, |entry| entry.timeline)
    }
}

impl fmt::Display for History {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for HistoryEntry { timeline, switched_at, reason } in &self.entries {
            writeln!(f, "{timeline}\t{switched_at}\t{reason}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u32 = 1 << 20;

    #[test]
    fn names_are_the_servers() {
        // SELECT pg_walfile_name('16/B374D848') at segment sizes of 16 MiB, 1 MiB and 1 GiB,
        // timelines 1 and 26.
        let lsn = "16/B374D848".parse().unwrap();
        let name =
            |timeline, size| Segment::containing(lsn, Timeline(timeline), size).file_name(size);
        assert_eq!(name(1, 16 * MIB), "0000000100000016000000B3");
        assert_eq!(name(26, 16 * MIB), "0000001A00000016000000B3");
        assert_eq!(name(1, MIB), "000000010000001600000B37");
        assert_eq!(name(1, 1024 * MIB), "000000010000001600000002");
    }

    #[test]
    fn names_of_other_sizes_and_shapes_are_refused() {
        assert!(Segment::parse("0000000100000016000000B3", 1024 * MIB).is_none());
        for name in [
            "",
            "0000000100000016000000b3",
            "0000000000000016000000B3",
            "0000000100000016000000B",
            "0000000100000016000000B30",
            "0000000100000016000001B3",
            "é000000100000016000000B",
        ] {
            assert!(Segment::parse(name, 16 * MIB).is_none(), "{name}");
        }
    }

    #[test]
    fn every_kind_of_wal_file_is_told_apart() {
        let segment = Segment { timeline: Timeline(10), number: 5 };
        for (name, file) in [
            ("0000000A0000000000000005", WalFile::Segment(segment)),
            ("0000000A0000000000000005.partial", WalFile::Partial(segment)),
            ("0000000A.history", WalFile::History(Timeline(10))),
            ("0000000A0000000000000005.00000028.backup", WalFile::BackupLabel(segment, 0x28)),
        ] {
            assert_eq!(WalFile::parse(name, 16 * MIB), Some(file));
            assert_eq!(file.file_name(16 * MIB), name);
        }
        for name in
            ["0000000A", "0000000A.historyx", "xlogtemp.123", "archive_status", "00000000.history"]
        {
            assert_eq!(WalFile::parse(name, 16 * MIB), None, "{name}");
        }
    }

    #[test]
    fn a_range_ends_before_a_segment_it_does_not_enter() {
        let names = |start, stop| {
            let range = Segment::range(Lsn(start), Lsn(stop), Timeline(1), MIB);
            range.map(|segment| segment.number).collect::<Vec<_>>()
        };
        let mib = u64::from(MIB);
        assert_eq!(names(5 * mib + 40, 7 * mib), [5, 6]);
        assert_eq!(names(5 * mib + 40, 7 * mib + 1), [5, 6, 7]);
        assert_eq!(names(5 * mib, 5 * mib + 1), [5]);
        assert_eq!(names(5 * mib, 5 * mib), [0; 0]);
    }

    #[test]
    fn histories_are_read_as_the_server_writes_them() {
        let text = "1\t0/3000158\tno recovery target specified\n\n# note\n2\t0/5000000\tbefore 2000-01-01 00:00:00+00\n";
        let history = History::parse(Timeline(3), text).unwrap();
        assert_eq!(history.entries.len(), 2);
        assert_eq!(history.timeline_at(Lsn(0x0300_0157)), Timeline(1));
        assert_eq!(history.timeline_at(Lsn(0x0300_0158)), Timeline(2));
        assert_eq!(history.timeline_at(Lsn(0x0500_0000)), Timeline(3));
        for (timeline, bad) in
            [(3, "2\t0/1\tx\n1\t0/2\tx"), (3, "3\t0/1\tx"), (2, ""), (2, "1"), (2, "x\t0/1")]
        {
            assert!(History::parse(Timeline(timeline), bad).is_err(), "{bad:?}");
        }
    }

    proptest! {
        #[test]
        fn names_round_trip(timeline in 1_u32.., lsn: u64, power in 20_u32..=30) {
            let size = 1 << power;
            let segment = Segment::containing(Lsn(lsn), Timeline(timeline), size);
            prop_assert_eq!(Segment::parse(&segment.file_name(size), size), Some(segment));
            prop_assert!(segment.start(size) <= Lsn(lsn));
        }
    }
}
