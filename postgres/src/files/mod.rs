//! A server's files, wherever they are read: from this host's own file system, or over connections to the server.
//!
//! Paths are relative to the data directory; absolute ones name the server's settings files outside of it. Everything
//! here blocks: call it on a thread that may wait, never on one that serves the runtime.

mod listing;
mod local;
mod names;
mod once;
mod remote;

use std::ffi::OsString;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};

pub use self::local::LocalFiles;
pub(crate) use self::names::Names;
pub use self::remote::{RemoteFiles, RemoteOptions, require_remote_rights};
use crate::Error;
use crate::process::Result;
use crate::roots::Roots;
use crate::scan::{Scan, ScanOptions};

/// The files of one server. What is gone is `None` and no failure: a running server removes files.
pub trait ServerFiles: Debug + Send + Sync {
    /// The data directory, where this process can look at it itself.
    fn here(&self) -> Option<&Path>;

    /// A path as people find it.
    fn place(&self, path: &Path) -> PathBuf;

    /// Opens a file to be read at any offset. `size_bytes` is what is known of its size.
    fn open(&self, path: &Path, size_bytes: u64) -> io::Result<Option<Box<dyn ServerFile>>>;

    /// Reads a whole file, but no more than `limit_bytes` of it.
    fn read(&self, path: &Path, limit_bytes: u64) -> io::Result<Option<Vec<u8>>>;

    /// The names in a directory, in no order.
    fn names(&self, directory: &Path) -> io::Result<Option<Vec<OsString>>>;

    /// What of the data directory belongs into a backup.
    fn scan(&self, options: &ScanOptions) -> Result<Scan>;

    /// Looks whether the directories of a scan are still in their places. Call it after the last file was copied.
    fn verify(&self, roots: &Roots) -> Result<()>;

    /// The error for a file that could not be read.
    fn unreadable(&self, path: &Path, source: io::Error) -> Error;

    /// Ends whatever reading holds open on the server; who still reads gets an error.
    fn close(&self) {}
}

/// A file of a server that is being read.
pub trait ServerFile: Debug + Send {
    /// Reads until the buffer is full or the file ends.
    fn read_full_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// These bytes will be read next. A hint.
    fn advise(&self, offset: u64, length: u64) {
        let _ = (offset, length);
    }

    /// When content and inode were last changed, nanoseconds; `None` where nobody tells.
    fn changed_at_ns(&self) -> Option<(i64, i64)> {
        None
    }

    /// Bytes that came from the file so far, where they may be others than those that were asked for.
    fn fetched_bytes(&self) -> Option<u64> {
        None
    }
}

/// What a file system says of a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    pub(crate) kind: Kind,
    pub(crate) size: u64,
    pub(crate) mode: u32,
    pub(crate) mtime_ns: i64,
    pub(crate) ctime_ns: i64,
    /// Zero, like the device, where nobody tells.
    pub(crate) inode: u64,
    pub(crate) device: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    File,
    Directory,
    Link,
    /// A socket, pipe or device.
    Special,
}

/// A data directory as a scan walks it.
pub(crate) trait Tree {
    /// Where people find it.
    fn source(&self, path: &str) -> PathBuf;

    /// The names in a directory, in no order.
    fn names(&self, path: &str) -> io::Result<Option<Names>>;

    /// A directory's files are looked at no more.
    fn forget(&self, path: &str) {
        let _ = path;
    }

    /// What a name itself is.
    fn look(&self, path: &str) -> io::Result<Option<Stat>>;

    /// What a name leads to. A link that leads nowhere is an error.
    fn follow(&self, path: &str) -> io::Result<Stat>;

    /// What a link says.
    fn link(&self, path: &str) -> io::Result<Option<PathBuf>>;

    /// Whether the link of a tablespace is there now, whatever it leads to.
    fn has_link(&self, path: &str) -> io::Result<bool>;

    /// Tells one directory from all others, whatever name leads to it.
    fn directory(&self, path: &str, stat: &Stat) -> Directory;

    /// A settings file outside the data directory, under the name it shall have.
    fn settings_file(&self, path: &Path) -> io::Result<SettingsFile>;

    /// What an absolute path leads to.
    fn outside(&self, path: &Path) -> io::Result<Stat>;

    /// The error for a name that could not be looked at.
    fn unreadable(&self, path: &Path, source: io::Error) -> Error;
}

/// The identity of a directory.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Directory {
    /// Device and inode.
    Inode(u64, u64),
    /// Its path on the server, where nothing else is told.
    Path(PathBuf),
}

/// What a settings file turned out to be.
pub(crate) enum SettingsFile {
    /// It lies in the data directory and is an entry of its own.
    Inside,
    Outside {
        named: PathBuf,
        stat: Stat,
    },
}
