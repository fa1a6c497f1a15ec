//! Where a backup's bytes come from. Implemented by whoever knows the source; this crate sees bytes only.

use std::io::{self, Read};

use bytes::Bytes;
use tokio_util::sync::CancellationToken;

use crate::entry::SourceEntry;

/// A tree of files that can be read. Shared by all threads of a copy.
pub trait Source: Send + Sync {
    /// Opens a file for reading. `None` when it is gone, which is no failure: it leaves the backup. A large file is
    /// opened once for each of its stretches, by several threads at a time.
    fn open(&self, entry: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>>;

    /// A file is not what the predecessor has under its name, as far as times and sizes tell, or nothing may be told by them:
    /// it will be read, but for what its [`changes`](SourceEntry::changes) leave out. Said once for each such file, before it is
    /// opened. Files that are not named here are taken over, or read only to see whether times and sizes can be believed.
    fn changed(&self, entry: &SourceEntry) {
        let _ = entry;
    }

    /// Begins to read a stream; entries of [`SourceKind::Stream`](crate::SourceKind::Stream) are read one after the other,
    /// in their order, each to its end. What ended too early must be an error of a read and never an end. `None` when there
    /// is nothing to be read any more, which is no failure: it leaves the backup. A read that waits must end soon after
    /// `ended` fires: then nobody wants the rest.
    fn stream(
        &self,
        entry: &SourceEntry,
        ended: &CancellationToken,
    ) -> io::Result<Option<Box<dyn Read + Send>>> {
        let _ = (entry, ended);
        Err(io::Error::new(io::ErrorKind::Unsupported, "this source has no streams"))
    }
}

/// An open file of a [`Source`].
pub trait SourceFile: Send {
    /// Reads at `offset`, which is a multiple of the entry's block size, into `buffer`. Fewer bytes than asked for are
    /// returned at the end of the file only.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// When content and inode were last changed, by now, nanoseconds; `None` where nobody tells.
    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        None
    }

    /// Bytes that came from where the file is so far, where they may be others than those that were asked for: all of a small file
    /// when it was opened.
    fn fetched_bytes(&self) -> Option<u64> {
        None
    }

    /// These bytes will be read next. A hint: more may be read, or less.
    fn advise(&mut self, offset: u64, length: u64) {
        let _ = (offset, length);
    }
}

/// Content that came with the entry, or that was read of a stream.
pub(super) struct InMemory {
    pub(super) bytes: Bytes,
    /// Where in the file it begins.
    pub(super) start: u64,
}

impl SourceFile for InMemory {
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = offset
            .checked_sub(self.start)
            .and_then(|offset| usize::try_from(offset).ok())
            .and_then(|offset| self.bytes.get(offset..))
            .unwrap_or_default();
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}
