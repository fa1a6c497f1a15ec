//! What a backup says about one name in the source: its path, what it is, and where its bytes are.
//!
//! Paths are bytes, relative, and checked here, once for everybody: a path that comes out of a manifest can be joined to
//! a directory without looking at it again.

use std::cmp::Ordering;
use std::ops::Range;

use bytes::Bytes;

use crate::error::Error;
use crate::limits::{NAME_BYTES_MAX, PATH_BYTES_MAX, PATH_DEPTH_MAX};
use crate::pack::FrameRef;
use crate::shard::ShardRef;

/// One name of the source as the caller found it in its scan.
#[derive(Debug, Clone)]
pub struct SourceEntry {
    /// Relative to the source's root, components separated by `/`, no empty ones, no `.` or `..`.
    pub path: Vec<u8>,
    /// What it is.
    pub kind: SourceKind,
    /// Permission bits.
    pub mode: u32,
    /// Bytes at the scan; exactly so many are copied, fewer when the file became shorter. 0 for what is not a file, and for
    /// a stream.
    pub size_bytes: u64,
    /// Time of the last change of content, nanoseconds since 1970.
    pub mtime_ns: i64,
    /// Time of the last change of the inode, nanoseconds since 1970.
    pub ctime_ns: i64,
    /// Inode number.
    pub inode: u64,
    /// Device number.
    pub device: u64,
    /// When this entry was looked at, by the clock that stamps the files, nanoseconds since 1970: a file that changed
    /// less than two seconds before counts as changed the next time.
    pub scanned_at_ns: i64,
    /// For files that change in pages: the page's size in bytes. Units are multiples of it.
    pub block_size: Option<u32>,
    /// Content that is not read from the source (`backup_label` and the like).
    pub content: Option<Bytes>,
    /// Bytes that may differ from what the predecessor has under this name, where somebody knows who was told of every write:
    /// ascending and apart. What the predecessor has of the rest is as good as what would be read. What lies behind the end that
    /// the predecessor knows is read in any case. Writes that came after the predecessor was finished may be missing; whatever was
    /// written before that is here, unless the predecessor was told of it.
    pub changes: Option<Vec<Range<u64>>>,
}

/// The kinds of names a backup holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SourceKind {
    /// A regular file.
    File,
    /// A regular file whose content comes as a stream: it is read once, from its beginning to its end, and how long it is
    /// shows at the end.
    Stream,
    /// A directory; its entries follow it.
    Directory,
    /// A symbolic link, stored as one and never followed.
    Symlink {
        /// What it points to, as it stands in the link.
        target: Vec<u8>,
    },
}

impl SourceEntry {
    /// A directory.
    pub fn directory(path: impl Into<Vec<u8>>, mode: u32) -> Self {
        Self {
            path: path.into(),
            kind: SourceKind::Directory,
            mode,
            size_bytes: 0,
            mtime_ns: 0,
            ctime_ns: 0,
            inode: 0,
            device: 0,
            scanned_at_ns: 0,
            block_size: None,
            content: None,
            changes: None,
        }
    }

    /// A symbolic link.
    pub fn symlink(path: impl Into<Vec<u8>>, target: impl Into<Vec<u8>>) -> Self {
        Self { kind: SourceKind::Symlink { target: target.into() }, ..Self::directory(path, 0o777) }
    }

    /// A file whose content is read from [`Source::stream`](crate::Source::stream).
    pub fn stream(path: impl Into<Vec<u8>>, mode: u32) -> Self {
        Self { kind: SourceKind::Stream, ..Self::directory(path, mode) }
    }

    /// A file whose content is given here.
    pub fn bytes(path: impl Into<Vec<u8>>, mode: u32, content: impl Into<Bytes>) -> Self {
        let content = content.into();
        Self {
            kind: SourceKind::File,
            size_bytes: content.len() as u64,
            content: Some(content),
            ..Self::directory(path, mode)
        }
    }
}

/// The order in which entries are given and stored: by component, so a directory comes before everything in it and
/// what is in it stands together. (Plain byte order would put `a.b` between `a` and `a/c`.)
pub fn path_order(a: &[u8], b: &[u8]) -> Ordering {
    let shared = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    let rank = |byte: Option<&u8>| match byte {
        None => 0_u16,
        Some(b'/') => 1,
        Some(&other) => 2 + u16::from(other),
    };
    rank(a.get(shared)).cmp(&rank(b.get(shared)))
}

/// An entry as a manifest holds it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) path: Vec<u8>,
    pub(crate) mode: u32,
    pub(crate) body: Body,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Body {
    Directory,
    Symlink { target: Vec<u8> },
    File(FileBody),
}

/// A file's content and what told it from its other versions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct FileBody {
    /// Bytes that were read.
    pub(crate) size_bytes: u64,
    pub(crate) stamp: Stamp,
    pub(crate) unit_bytes: u32,
    pub(crate) content: Content,
}

/// What must be equal for a file to count as unchanged without being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Bytes at the scan.
    pub(crate) scanned_bytes: u64,
    pub(crate) mtime_ns: i64,
    pub(crate) ctime_ns: i64,
    pub(crate) inode: u64,
    pub(crate) device: u64,
    pub(crate) belief: Belief,
}

/// What the next backup may conclude of a file that has the same times and the same size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Belief {
    /// It is what was read.
    Read,
    /// Nothing: it changed so shortly before the scan that a later change might show the same times.
    Racy,
    /// Nothing: units were taken over unread, and the times may be those of a write of which nobody could tell yet.
    Ahead,
    /// It is what is stored, though units were taken over unread: of every write that the times stand for somebody has told. What is
    /// written without being told of (hint bits) may differ, which is no fault.
    Told,
}

impl Belief {
    pub(crate) fn of_byte(byte: u8) -> Self {
        match byte {
            0 => Self::Read,
            2 => Self::Ahead,
            3 => Self::Told,
            _ => Self::Racy,
        }
    }

    pub(crate) fn byte(self) -> u8 {
        match self {
            Self::Read => 0,
            Self::Racy => 1,
            Self::Ahead => 2,
            Self::Told => 3,
        }
    }
}

/// Where a file's units are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    /// All of them, here.
    Inline(Vec<Extent>),
    /// In shards of their own, 256 units each but the last.
    Shards(Vec<ShardRef>),
}

/// Consecutive units of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) units: u32,
    /// `None`: they are zero.
    pub(crate) place: Option<Place>,
}

/// Where the first unit of an extent begins; the others follow it in the same frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) frame: FrameRef,
    /// Byte in the frame's content.
    pub(crate) offset: u32,
}

/// Appends `units` to a list of extents, joined to the last one where they continue it.
pub(crate) fn push_extent(
    extents: &mut Vec<Extent>,
    units: u32,
    place: Option<Place>,
    unit_bytes: u32,
) {
    if let Some(last) = extents.last_mut() {
        let continues = match (last.place, place) {
            (None, None) => true,
            (Some(before), Some(now)) => {
                before.frame == now.frame
                    && u64::from(before.offset) + u64::from(last.units) * u64::from(unit_bytes)
                        == u64::from(now.offset)
            }
            _ => false,
        };
        if continues {
            last.units += units;
            return;
        }
    }
    extents.push(Extent { units, place });
}

/// Checks a path. The reason is for people.
pub(crate) fn check_path(path: &[u8]) -> Result<(), &'static str> {
    if path.is_empty() || path.len() > PATH_BYTES_MAX {
        return Err("a path has 1 to 4096 bytes");
    }
    if path.contains(&0) {
        return Err("a path has no NUL byte");
    }
    let mut depth = 0;
    for name in path.split(|&byte| byte == b'/') {
        depth += 1;
        if name.is_empty() || name == b"." || name == b".." {
            return Err("a path is relative and has no empty, '.' or '..' component");
        }
        if name.len() > NAME_BYTES_MAX {
            return Err("a component of a path has at most 255 bytes");
        }
    }
    if depth > PATH_DEPTH_MAX { Err("a path has at most 64 components") } else { Ok(()) }
}

/// Checks a link's target: it only has to be one.
pub(crate) fn check_target(target: &[u8]) -> Result<(), &'static str> {
    if target.is_empty() || target.len() > PATH_BYTES_MAX || target.contains(&0) {
        return Err("a link's target has 1 to 4096 bytes without NUL");
    }
    Ok(())
}

impl SourceEntry {
    pub(crate) fn check(&self) -> Result<(), Error> {
        check_path(&self.path).map_err(|reason| Error::entry(&self.path, reason))?;
        if let SourceKind::Symlink { target } = &self.kind {
            check_target(target).map_err(|reason| Error::entry(&self.path, reason))?;
        }
        let in_order = |ranges: &Vec<Range<u64>>| {
            ranges.iter().all(|range| range.start <= range.end)
                && ranges.windows(2).all(|two| two[0].end <= two[1].start)
        };
        if self.changes.as_ref().is_some_and(|changes| !in_order(changes)) {
            return Err(Error::entry(&self.path, "its changes are not in order"));
        }
        match self.block_size {
            Some(size) if !size.is_power_of_two() || size > crate::limits::UNIT_BYTES_MAX => {
                Err(Error::entry(&self.path, format!("pages of {size} bytes are not supported")))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn stamp(&self) -> Stamp {
        let newest = self.mtime_ns.max(self.ctime_ns);
        Stamp {
            scanned_bytes: self.size_bytes,
            mtime_ns: self.mtime_ns,
            ctime_ns: self.ctime_ns,
            inode: self.inode,
            device: self.device,
            belief: if newest.saturating_add(RACY_NS) >= self.scanned_at_ns {
                Belief::Racy
            } else {
                Belief::Read
            },
        }
    }
}

/// File systems stamp with the resolution of a timer tick, network file systems with that of a second.
const RACY_NS: i64 = 2_000_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_stands_right_before_what_is_in_it() {
        let mut paths: Vec<&[u8]> =
            vec![b"a.b", b"a/c", b"a", b"ab", b"a/c/d", b"a/c.d", b"a\x01", b"B"];
        paths.sort_by(|a, b| path_order(a, b));
        let sorted: Vec<&[u8]> =
            vec![b"B", b"a", b"a/c", b"a/c/d", b"a/c.d", b"a\x01", b"a.b", b"ab"];
        assert_eq!(paths, sorted);
    }

    #[test]
    fn paths_that_could_leave_a_directory_are_refused() {
        let long = vec![b'x'; 256];
        let deep = b"a/".repeat(64);
        let bad: [&[u8]; 12] = [
            b"",
            b"/",
            b"/a",
            b"a/",
            b"a//b",
            b".",
            b"..",
            b"a/../b",
            b"a/.",
            b"a\0b",
            &long,
            &[&deep[..], b"a"].concat(),
        ];
        for path in bad {
            assert!(check_path(path).is_err(), "{}", path.escape_ascii());
        }
        for path in [&b"a"[..], b"...", b"a/..b/c.", b"\xff\n", &deep[..127]] {
            assert_eq!(check_path(path), Ok(()), "{}", path.escape_ascii());
        }
    }

    #[test]
    fn a_file_changed_just_before_the_scan_is_racy() {
        let mut entry = SourceEntry::bytes("f", 0o600, "");
        entry.scanned_at_ns = 10_000_000_000;
        entry.mtime_ns = 7_999_999_999;
        assert_eq!(entry.stamp().belief, Belief::Read);
        entry.ctime_ns = 8_000_000_000;
        assert_eq!(entry.stamp().belief, Belief::Racy);
        // A clock that runs ahead is no proof of age.
        entry.ctime_ns = i64::MAX;
        assert_eq!(entry.stamp().belief, Belief::Racy);
    }

    #[test]
    fn a_belief_that_is_not_known_is_none() {
        for byte in 0..=u8::MAX {
            let belief = Belief::of_byte(byte);
            assert_eq!(belief.byte(), if byte < 4 { byte } else { 1 });
            assert_eq!(belief == Belief::Racy, !matches!(byte, 0 | 2 | 3));
        }
    }
}
