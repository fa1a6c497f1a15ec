//! A file of this host that is read once, and does not take the page cache from the server.
//!
//! What was in memory before is read there and stays; what only the backup needed is dropped behind it. Where the kernel or
//! the file system cannot do that, its pages stay until the kernel wants the memory: dropping them by hand
//! (`POSIX_FADV_DONTNEED`) would drop the server's working set with them.

use std::cell::{Cell, RefCell};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::sync::LazyLock;

use rustix::fs::{Advice, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};

use super::ServerFile;
use super::local::nanoseconds;
use crate::relation::fill;

/// `RWF_DONTCACHE`: the pages that a read brings in are dropped behind it.
const DROP_BEHIND: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
/// The first Linux that is asked for it. 6.14 and 6.15 know the flag; as they were released they did not look again, with the
/// page locked, whether somebody had just written to it.
const DROPS_SINCE: (u32, u32) = (6, 16);

/// A read that is gone on from ends at a multiple of this: what is dropped behind it are whole folios, so that one of which
/// a part is still to come would be read twice, and reading ahead begun anew. Larger ones come late in a stretch, if ever.
const FOLIO_BYTES: u64 = 256 << 10;

static KERNEL_DROPS: LazyLock<bool> = LazyLock::new(|| {
    let system = rustix::system::uname();
    system.release().to_str().is_ok_and(drops_behind)
});

/// Whether a release of Linux is asked to drop pages.
fn drops_behind(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= DROPS_SINCE,
        _ => false,
    }
}

/// A file that is read once.
#[derive(Debug)]
pub(super) struct OnceFile {
    file: File,
    /// Whether pages are dropped behind a read, until a read says otherwise.
    drops: Cell<bool>,
    /// What will be read next, from where to where.
    next: Cell<(u64, u64)>,
    /// What a read took along of that.
    along: RefCell<Along>,
}

/// Bytes that were read beyond what was asked for.
#[derive(Debug, Default)]
struct Along {
    buffer: Vec<u8>,
    /// Which of the buffer are still to be given out.
    left: Range<usize>,
    /// Where the first of them is in the file.
    offset: u64,
}

impl Along {
    /// Gives out what begins at `offset`, each byte once: who reads a page again wants to see it as it is now.
    fn take(&mut self, buffer: &mut [u8], offset: u64) -> usize {
        if offset != self.offset {
            return 0;
        }
        let length = buffer.len().min(self.left.len());
        let end = self.left.start + length;
        buffer[..length].copy_from_slice(&self.buffer[self.left.start..end]);
        self.left.start = end;
        self.offset += length as u64;
        length
    }
}

impl OnceFile {
    pub(super) fn new(file: File) -> Self {
        // Only advice: a file system that does not know it reads just as well.
        let _ = fadvise(&file, 0, None, Advice::Sequential);
        let (drops, next, along) = (Cell::new(*KERNEL_DROPS), Cell::default(), RefCell::default());
        Self { file, drops, next, along }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut along = self.along.borrow_mut();
        let taken = along.take(buffer, offset);
        if taken > 0 {
            return Ok(taken);
        }
        if self.drops.get() {
            let (asked, end) = (buffer.len(), offset.saturating_add(buffer.len() as u64));
            if (offset..end).contains(&along.offset) {
                // What was taken along is older than what this read gives out.
                along.left = 0..0;
            }
            let more = self.more(offset, end);
            if more > 0 {
                along.left = 0..0;
                if along.buffer.len() < more {
                    along.buffer.resize(more, 0);
                }
            }
            let mut parts = [IoSliceMut::new(buffer), IoSliceMut::new(&mut along.buffer[..more])];
            match preadv2(&self.file, &mut parts, offset, DROP_BEHIND) {
                // A file system, or a filter of system calls, that does not know it.
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::PERM) => {
                    self.drops.set(false);
                }
                read => {
                    let read = read?;
                    if more > 0 {
                        (along.left, along.offset) = (0..read.saturating_sub(asked), end);
                    }
                    // A page that is read again takes nothing along.
                    let (from, to) = self.next.get();
                    self.next.set((from.max(end), to));
                    return Ok(read.min(asked));
                }
            }
        }
        self.file.read_at(buffer, offset)
    }

    /// How much of what will be read next a read takes along.
    fn more(&self, offset: u64, end: u64) -> usize {
        let (from, to) = self.next.get();
        if offset < from || end >= to {
            return 0;
        }
        let whole = end.checked_next_multiple_of(FOLIO_BYTES).unwrap_or(end).min(to);
        usize::try_from(whole - end).unwrap_or(0)
    }

    /// The whole file, but no more than `limit_bytes` of it.
    pub(super) fn read_whole(&self, limit_bytes: u64) -> io::Result<Vec<u8>> {
        let limit = usize::try_from(limit_bytes).unwrap_or(usize::MAX);
        let (mut bytes, mut filled) = (Vec::new(), 0);
        loop {
            let size = usize::try_from(self.file.metadata()?.len()).unwrap_or(usize::MAX);
            // One byte more than there should be, to see the end.
            let room = size.max(2 * filled).saturating_add(1).min(limit);
            bytes.resize(room, 0);
            filled += self.read_full_at(&mut bytes[filled..], filled as u64)?;
            if filled < room || room == limit {
                bytes.truncate(filled);
                return Ok(bytes);
            }
        }
    }
}

impl ServerFile for OnceFile {
    fn read_full_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        fill(buffer, offset, |part, at| self.read_at(part, at))
    }

    fn advise(&self, offset: u64, length: u64) {
        self.next.set((offset, offset.saturating_add(length)));
        // What advice brings in is not dropped behind the read. Where that is done, the kernel alone reads ahead: it drops
        // those pages, too.
        if let Some(length) = NonZeroU64::new(length).filter(|_| !self.drops.get()) {
            let _ = fadvise(&self.file, offset, Some(length), Advice::WillNeed);
        }
    }

    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        let file = self.file.metadata().ok()?;
        let changed = nanoseconds(file.mtime(), file.mtime_nsec());
        Some((changed, nanoseconds(file.ctime(), file.ctime_nsec())))
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use super::*;

    /// Neither whole pages nor whole steps.
    const BYTES: usize = (9 << 20) + 100;
    const STEP: usize = 512 << 10;

    fn content() -> Vec<u8> {
        let mut bytes = (0_u8..251).collect::<Vec<_>>().repeat(BYTES.div_ceil(251));
        bytes.truncate(BYTES);
        bytes
    }

    /// A file that is on disk and, where it is not memory that it lies on, not in memory.
    fn on_disk(place: &Path) -> PathBuf {
        let path = place.join("file");
        std::fs::write(&path, content()).unwrap();
        let file = File::open(&path).unwrap();
        file.sync_all().unwrap();
        fadvise(&file, 0, None, Advice::DontNeed).unwrap();
        path
    }

    /// Bytes of a file that are in memory.
    fn resident(path: &Path) -> u64 {
        let options = ["--bytes", "--noheadings", "--output", "RES"];
        let told = Command::new("fincore").args(options).arg(path).output().unwrap();
        assert!(told.status.success(), "{told:?}");
        String::from_utf8(told.stdout).unwrap().trim().parse().unwrap()
    }

    fn read_in_steps(file: &OnceFile) -> Vec<u8> {
        let mut bytes = vec![0; BYTES];
        // Begun inside a page, as after a file that filled a part of a frame.
        let (first, rest) = bytes.split_at_mut(STEP - 8192 - 10);
        let mut at = file.read_full_at(first, 0).unwrap();
        for part in rest.chunks_mut(STEP) {
            at += file.read_full_at(part, at as u64).unwrap();
        }
        assert_eq!(at, BYTES);
        bytes
    }

    /// Whether kernel and file system drop pages behind a read, in the words of this test.
    fn can_drop(path: &Path) -> bool {
        let (file, mut byte) = (File::open(path).unwrap(), [0]);
        let read = preadv2(&file, &mut [IoSliceMut::new(&mut byte)], 0, DROP_BEHIND);
        read.is_ok() && *KERNEL_DROPS
    }

    #[test]
    fn what_only_a_backup_reads_leaves_memory_and_what_was_there_stays() {
        let place = tempfile::tempdir().unwrap();
        let path = on_disk(place.path());
        let before = resident(&path);
        let can_drop = can_drop(&path);
        let file = OnceFile::new(File::open(&path).unwrap());
        assert!(read_in_steps(&file) == content(), "other bytes");
        assert_eq!(file.drops.get(), can_drop);
        if can_drop {
            assert_eq!((before, resident(&path)), (0, 0));
        }
        file.advise(0, BYTES as u64);
        assert!(read_in_steps(&file) == content(), "other bytes, read in whole folios");
        if can_drop {
            assert_eq!(resident(&path), 0);
        }

        // Somebody else needs the middle of it.
        let middle = File::open(&path).unwrap();
        middle.read_exact_at(&mut vec![0; 4 << 20], 1 << 20).unwrap();
        let warm = resident(&path);
        assert!(warm >= 4 << 20, "{warm}");
        assert!(read_in_steps(&file) == content(), "other bytes");
        assert!(resident(&path) >= 4 << 20, "{} of {warm} bytes stayed", resident(&path));
    }

    #[test]
    fn where_pages_cannot_be_dropped_the_same_bytes_are_read() {
        let place = tempfile::tempdir().unwrap();
        let plain = OnceFile::new(File::open(on_disk(place.path())).unwrap());
        plain.drops.set(false);
        assert!(read_in_steps(&plain) == content(), "other bytes");

        // A file system that refuses to, and tells no size either.
        let version = Path::new("/proc/version");
        let refused = OnceFile::new(File::open(version).unwrap());
        let text = std::fs::read(version).unwrap();
        assert_eq!(refused.read_whole(1 << 20).unwrap(), text);
        assert!(!refused.drops.get(), "it is not asked again");
        assert_eq!(refused.read_whole(10).unwrap(), text[..10]);
    }

    #[test]
    fn a_read_takes_along_the_rest_of_its_folio_and_no_more_than_is_needed_next() {
        let place = tempfile::tempdir().unwrap();
        let path = on_disk(place.path());
        let file = OnceFile::new(File::open(&path).unwrap());
        let folio = usize::try_from(FOLIO_BYTES).unwrap();
        assert_eq!(file.more(0, 8192), 0, "nobody said that anything more is needed");
        file.advise(FOLIO_BYTES, 2 * FOLIO_BYTES - 10);
        for (from, to, more) in [
            (0, 8192, 0),
            (folio - 1, folio + 10, 0),
            (folio, folio + 10, folio - 10),
            (folio, 2 * folio, 0),
            (2 * folio, 2 * folio + 1, folio - 11),
            (2 * folio, 3 * folio - 10, 0),
            (2 * folio, 4 * folio, 0),
        ] {
            assert_eq!(file.more(from as u64, to as u64), more, "{from} to {to}");
        }

        // What is read again is read from the file, wherever it came from at first.
        file.advise(0, BYTES as u64);
        let mut bytes = vec![0; 4 * 8192];
        for part in [0..8192, 8192..4 * 8192] {
            file.read_full_at(&mut bytes[part.clone()], part.start as u64).unwrap();
        }
        assert!(bytes == content()[..4 * 8192], "other bytes");
        let changed = File::options().write(true).open(&path).unwrap();
        changed.write_all_at(&vec![255; 4 * 8192], 0).unwrap();
        for page in 0..4 {
            let page = page * 8192..(page + 1) * 8192;
            file.read_full_at(&mut bytes[page.clone()], page.start as u64).unwrap();
        }
        assert!(bytes.iter().all(|byte| *byte == 255), "a page as it was");
        let goes_on = file.along.borrow().offset;
        assert!(goes_on == 4 * 8192 || !file.drops.get(), "{goes_on}");

        // So is what was taken along, once a read has passed over it.
        changed.write_all_at(&[254; 8192], 4 * 8192).unwrap();
        let mut over = vec![0; 5 * 8192];
        file.read_full_at(&mut over, 0).unwrap();
        file.read_full_at(&mut bytes[..8192], 4 * 8192).unwrap();
        assert!(over[4 * 8192..] == bytes[..8192] && bytes[0] == 254, "a page as it was");

        // A file that became shorter ends where it does now.
        changed.set_len(100_000).unwrap();
        let short = OnceFile::new(File::open(&path).unwrap());
        short.advise(0, BYTES as u64);
        assert_eq!(short.read_full_at(&mut vec![0; 8192], 0).unwrap(), 8192);
        assert_eq!(short.read_full_at(&mut vec![0; BYTES], 8192).unwrap(), 100_000 - 8192);
        assert_eq!(short.read_full_at(&mut [0; 10], 100_000).unwrap(), 0);
    }

    #[test]
    fn what_is_needed_next_is_fetched_ahead_only_where_it_would_stay_anyway() {
        let place = tempfile::tempdir().unwrap();
        let path = on_disk(place.path());
        let before = resident(&path);
        let file = OnceFile::new(File::open(&path).unwrap());
        file.drops.set(true);
        file.advise(1 << 20, 4 << 20);
        assert_eq!(resident(&path), before);
        file.drops.set(false);
        file.advise(1 << 20, 0);
        assert_eq!(resident(&path), before, "up to the end, says the system of nothing");
        file.advise(1 << 20, 4 << 20);
        // The kernel fetches it in its own time.
        let bound = std::time::Instant::now() + std::time::Duration::from_secs(30);
        while resident(&path) < before.max(4 << 20) {
            assert!(std::time::Instant::now() < bound, "{} bytes after 30 s", resident(&path));
        }
        if before == 0 {
            assert!(resident(&path) < 6 << 20, "{} bytes", resident(&path));
        }
    }

    #[test]
    fn a_whole_file_is_read_to_its_end_or_to_the_limit() {
        let place = tempfile::tempdir().unwrap();
        let file = OnceFile::new(File::open(on_disk(place.path())).unwrap());
        let whole = content();
        for limit in [0, 1, BYTES - 1, BYTES, BYTES + 1, usize::MAX] {
            let read = file.read_whole(limit as u64).unwrap();
            assert!(read == whole[..limit.min(BYTES)], "{limit}");
        }
    }

    #[test]
    fn only_kernels_that_look_twice_are_asked_to_drop_pages() {
        for release in ["6.16", "6.16-rc1", "6.18.44-fc-v669", "7.0.0-1-amd64", "10.1"] {
            assert!(drops_behind(release), "{release}");
        }
        for release in
            ["6.15.9", "6.14.0-37-generic", "5.19.17", "6.1.0-13-amd64", "6", "", "six.x"]
        {
            assert!(!drops_behind(release), "{release}");
        }
    }
}
