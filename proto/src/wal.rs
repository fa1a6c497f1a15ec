//! The files of the write-ahead log: their names, and the histories of timelines.
//!
//! Names and text only: what stands in a segment is `postgres`' affair, where one is kept `repository`'s.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

use crate::lsn::{Lsn, ParseError, Timeline};

/// Bytes that two numbers of a segment's name span: the first counts these.
const BYTES_PER_NAME: u64 = 1 << 32;
/// The smallest segments that a cluster can have.
pub const SEGMENT_BYTES_MIN: u32 = 1 << 20;
/// The largest.
pub const SEGMENT_BYTES_MAX: u32 = 1 << 30;

/// Whether a cluster can have segments of this many bytes: a power of two from 1 MiB to 1 GiB.
pub fn is_segment_size(bytes: u64) -> bool {
    bytes.is_power_of_two()
        && (u64::from(SEGMENT_BYTES_MIN)..=u64::from(SEGMENT_BYTES_MAX)).contains(&bytes)
}

/// A segment of the log: a timeline and a number. The number counts segments of one size, so it means nothing without that.
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

    /// Its name.
    pub fn name(self, segment_size: u32) -> SegmentName {
        let per_name = BYTES_PER_NAME / u64::from(segment_size);
        // A log has 2^64 bytes at most, so both halves fit 32 bits.
        let half = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        SegmentName {
            timeline: self.timeline,
            high: half(self.number / per_name),
            low: half(self.number % per_name),
        }
    }

    /// Its file name: 24 hexadecimal digits.
    pub fn file_name(self, segment_size: u32) -> String {
        self.name(segment_size).to_string()
    }

    /// Reads a file name; `None` when it is no segment of this size.
    pub fn parse(name: &str, segment_size: u32) -> Option<Self> {
        name.parse::<SegmentName>().ok()?.segment(segment_size)
    }
}

/// The name of a segment, which means a position only together with the size of segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentName {
    /// The first eight digits.
    pub timeline: Timeline,
    /// The next eight: counts 4 GiB of log.
    pub high: u32,
    /// The last eight: counts segments in them.
    pub low: u32,
}

impl SegmentName {
    /// The segment of this name; `None` when there is no such name among segments of this size.
    pub fn segment(self, segment_size: u32) -> Option<Segment> {
        let per_name = BYTES_PER_NAME / u64::from(segment_size);
        (u64::from(self.low) < per_name).then(|| Segment {
            timeline: self.timeline,
            number: u64::from(self.high) * per_name + u64::from(self.low),
        })
    }

    /// Where it stands in the log, whatever its timeline: the name without the timeline, as one number. Among segments of one
    /// size it grows with the position.
    pub fn rank(self) -> u64 {
        u64::from(self.high) << 32 | u64::from(self.low)
    }

    /// The name of this rank on a timeline.
    pub fn ranked(timeline: Timeline, rank: u64) -> Self {
        let half = |half: u64| u32::try_from(half & u64::from(u32::MAX)).unwrap_or(u32::MAX);
        Self { timeline, high: half(rank >> 32), low: half(rank) }
    }
}

impl fmt::Display for SegmentName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:08X}{:08X}{:08X}", self.timeline.0, self.high, self.low)
    }
}

impl Serialize for SegmentName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SegmentName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

impl FromStr for SegmentName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let read = || {
            let (timeline, rest) = digits(text)?;
            let (high, rest) = digits(rest)?;
            let (low, rest) = digits(rest)?;
            // With segments of 1 MiB there are 4096 in 4 GiB; no other size has more.
            let fits = rest.is_empty()
                && timeline > 0
                && u64::from(low) < BYTES_PER_NAME / u64::from(SEGMENT_BYTES_MIN);
            fits.then_some(Self { timeline: Timeline(timeline), high, low })
        };
        read().ok_or_else(|| ParseError::new("the name of a WAL segment", text))
    }
}

/// The name of a file that belongs into a WAL archive. Needs no segment size to be read; in order of names, the segments of a
/// timeline are in order of positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum WalFileName {
    /// A whole segment.
    Segment(SegmentName),
    /// The last, unfinished segment of a timeline that ended in a promotion. Never to be served under the plain name.
    Partial(SegmentName),
    /// The history of a timeline.
    History(Timeline),
    /// The label that a backup leaves in the archive, with its offset in the segment.
    BackupLabel(SegmentName, u32),
}

impl WalFileName {
    /// The timeline it belongs to.
    pub fn timeline(&self) -> Timeline {
        match self {
            Self::Segment(name) | Self::Partial(name) | Self::BackupLabel(name, _) => name.timeline,
            Self::History(timeline) => *timeline,
        }
    }
}

impl fmt::Display for WalFileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Segment(name) => name.fmt(f),
            Self::Partial(name) => write!(f, "{name}.partial"),
            Self::History(timeline) => write!(f, "{:08X}.history", timeline.0),
            Self::BackupLabel(name, offset) => write!(f, "{name}.{offset:08X}.backup"),
        }
    }
}

impl FromStr for WalFileName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let read = || match text.split_once('.') {
            None => text.parse().ok().map(Self::Segment),
            Some((stem, "partial")) => stem.parse().ok().map(Self::Partial),
            Some((stem, "history")) => match digits(stem)? {
                (timeline, "") if timeline > 0 => Some(Self::History(Timeline(timeline))),
                _ => None,
            },
            Some((stem, rest)) => {
                let (offset, "") = digits(rest.strip_suffix(".backup")?)? else { return None };
                Some(Self::BackupLabel(stem.parse().ok()?, offset))
            }
        };
        read().ok_or_else(|| ParseError::new("the name of a WAL file", text))
    }
}

/// `0000000A.history` for timeline 10.
pub fn history_file_name(timeline: Timeline) -> String {
    WalFileName::History(timeline).to_string()
}

/// Eight upper-case hexadecimal digits and what follows them.
fn digits(text: &str) -> Option<(u32, &str)> {
    let (digits, rest) = text.split_at_checked(8)?;
    let upper = |b: u8| b.is_ascii_digit() || (b'A'..=b'F').contains(&b);
    digits.bytes().all(upper).then_some(())?;
    Some((u32::from_str_radix(digits, 16).ok()?, rest))
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

/// A text that is not the history of its timeline.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read {}: {what}", history_file_name(*timeline))]
pub struct HistoryError {
    /// Whose history it was to be.
    pub timeline: Timeline,
    /// What is wrong with it.
    pub what: String,
}

impl History {
    /// Timeline 1 has no history.
    pub const FIRST: Self = Self { timeline: Timeline(1), entries: Vec::new() };

    /// Reads the text of a history file.
    pub fn parse(timeline: Timeline, text: &str) -> Result<Self, HistoryError> {
        let wrong = |what: String| HistoryError { timeline, what };
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

    /// Where an ancestor ends on the way to this timeline: nothing that it wrote behind that is part of this history. A
    /// server that recovers to a position before the beginning of the timeline it follows writes a history whose positions
    /// go back, so this may be before the place where the ancestor itself was left.
    pub fn end_of(&self, ancestor: Timeline) -> Option<Lsn> {
        let later = self.entries.iter().skip_while(|entry| entry.timeline != ancestor);
        later.map(|entry| entry.switched_at).min()
    }

    /// Whether it shows that an ancestor's log was there up to `end`: a server replayed it that far.
    pub fn shows(&self, ancestor: Timeline, end: Lsn) -> bool {
        self.entries.iter().any(|entry| entry.timeline == ancestor && entry.switched_at >= end)
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
        let segment = SegmentName { timeline: Timeline(10), high: 0, low: 5 };
        for (name, file) in [
            ("0000000A0000000000000005", WalFileName::Segment(segment)),
            ("0000000A0000000000000005.partial", WalFileName::Partial(segment)),
            ("0000000A.history", WalFileName::History(Timeline(10))),
            ("0000000A0000000000000005.00000028.backup", WalFileName::BackupLabel(segment, 0x28)),
        ] {
            assert_eq!(name.parse(), Ok(file));
            assert_eq!(file.to_string(), name);
            assert_eq!(file.timeline(), Timeline(10));
        }
        for name in [
            "0000000A",
            "0000000A.historyx",
            "xlogtemp.123",
            "archive_status",
            "00000000.history",
            "0000000a0000000000000005",
            "0000000A0000000000001000",
            "0000000A0000000000000005.partial.partial",
        ] {
            assert!(name.parse::<WalFileName>().is_err(), "{name}");
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
        assert_eq!(history.end_of(Timeline(1)), Some(Lsn(0x0300_0158)));
        assert_eq!(history.end_of(Timeline(2)), Some(Lsn(0x0500_0000)));
        assert_eq!(history.end_of(Timeline(3)), None);
        for (timeline, bad) in
            [(3, "2\t0/1\tx\n1\t0/2\tx"), (3, "3\t0/1\tx"), (2, ""), (2, "1"), (2, "x\t0/1")]
        {
            assert!(History::parse(Timeline(timeline), bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_history_whose_positions_go_back_ends_an_ancestor_where_it_was_left_last() {
        let text = "1\t0/F00000\tx\n2\t0/B000C8\tx\n";
        let history = History::parse(Timeline(3), text).unwrap();
        assert_eq!(history.end_of(Timeline(1)), Some(Lsn(0x00B0_00C8)));
        // What was there does not become less by that.
        assert!(history.shows(Timeline(1), Lsn(0x00F0_0000)));
        assert!(!history.shows(Timeline(1), Lsn(0x00F0_0001)));
        assert!(!history.shows(Timeline(2), Lsn(0x00B0_00C9)));
        assert!(!history.shows(Timeline(3), Lsn(0)));
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
