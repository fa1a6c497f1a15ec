//! The restored tree, reached through directory handles: no symbolic link is ever followed, whatever the manifest or
//! another process puts there.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, FlockOperation, Mode, OFlags};

use crate::error::{Error, show};

/// Whether a file gets its mode only when everything is written: when it forbids writing, or when a write would take the
/// set-user-ID or set-group-ID bit away again.
pub(super) fn is_set_late(bits: u32) -> bool {
    bits & 0o200 == 0 || bits & 0o6000 != 0
}

/// Handles kept open besides the root and the mapped directories.
const KEPT_MAX: usize = 64;
/// How often a lock that nobody writes under is tried, and the pause between two tries.
const LOCK_TRIES: u32 = 100;
const LOCK_PAUSE: Duration = Duration::from_millis(5);

#[derive(Debug)]
pub(super) struct Tree {
    root: Arc<OwnedFd>,
    directory: PathBuf,
    mapped: HashMap<Vec<u8>, Arc<OwnedFd>>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    handles: HashMap<Vec<u8>, Arc<OwnedFd>>,
    order: VecDeque<Vec<u8>>,
}

const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::CLOEXEC);

/// The directory part and the name of a checked path.
pub(super) fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|byte| *byte == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (&[], path),
    }
}

fn mode(bits: u32) -> Mode {
    Mode::from_raw_mode(bits & 0o7777)
}

impl Tree {
    /// Opens the target's directories, which exist.
    pub(super) fn open(
        directory: &Path,
        mapping: impl Iterator<Item = (Vec<u8>, PathBuf)>,
    ) -> Result<Self, Error> {
        let root = open_directory(directory)?;
        let mut mapped = HashMap::new();
        for (path, elsewhere) in mapping {
            mapped.insert(path, Arc::new(open_directory(&elsewhere)?));
        }
        Ok(Self {
            root: Arc::new(root),
            directory: directory.to_owned(),
            mapped,
            kept: Mutex::default(),
        })
    }

    pub(super) fn failed(&self, path: &[u8], error: impl Into<io::Error>) -> Error {
        Error::Target {
            path: format!("{}/{}", self.directory.display(), show(path)),
            source: error.into(),
        }
    }

    fn directory(&self, path: &[u8]) -> Result<Arc<OwnedFd>, Error> {
        if path.is_empty() {
            return Ok(Arc::clone(&self.root));
        }
        if let Some(mapped) = self.mapped.get(path) {
            return Ok(Arc::clone(mapped));
        }
        if let Some(handle) =
            self.kept.lock().unwrap_or_else(PoisonError::into_inner).handles.get(path)
        {
            return Ok(Arc::clone(handle));
        }
        let (parent, name) = split(path);
        let parent = self.directory(parent)?;
        let handle = rustix::fs::openat(&parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())
            .map_err(|error| self.failed(path, error))?;
        let handle = Arc::new(handle);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.handles.insert(path.to_vec(), Arc::clone(&handle)).is_none() {
            kept.order.push_back(path.to_vec());
        }
        while kept.order.len() > KEPT_MAX {
            if let Some(oldest) = kept.order.pop_front() {
                kept.handles.remove(&oldest);
            }
        }
        Ok(handle)
    }

    /// Makes a directory only we can enter; its own mode is set at the end.
    pub(super) fn make_directory(&self, path: &[u8]) -> Result<(), Error> {
        let (parent, name) = split(path);
        match rustix::fs::mkdirat(self.directory(parent)?, name, mode(0o700)) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.failed(path, error)),
        }
    }

    pub(super) fn set_directory_mode(&self, path: &[u8], bits: u32) -> Result<(), Error> {
        rustix::fs::fchmod(self.directory(path)?, mode(bits))
            .map_err(|error| self.failed(path, error))
    }

    /// Opens a file for writing, making it first if need be. May be called for one file from several threads: each finds
    /// or gives it the same size.
    pub(super) fn open_file(&self, path: &[u8], bits: u32, size_bytes: u64) -> Result<File, Error> {
        let (parent, name) = split(path);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(self.directory(parent)?, name, flags, mode(0o600))
            .map_err(|error| self.failed(path, error))?;
        let file = File::from(file);
        file.set_len(size_bytes).map_err(|error| self.failed(path, error))?;
        // A file that its owner may not write gets its mode at the end: it is opened again to be written.
        if bits & 0o7777 != 0o600 && !is_set_late(bits) {
            rustix::fs::fchmod(&file, mode(bits)).map_err(|error| self.failed(path, error))?;
        }
        Ok(file)
    }

    /// Sets the mode of a file that was made by [`Self::open_file`].
    pub(super) fn set_file_mode(&self, path: &[u8], bits: u32) -> Result<(), Error> {
        let (parent, name) = split(path);
        rustix::fs::chmodat(self.directory(parent)?, name, mode(bits), AtFlags::empty())
            .map_err(|error| self.failed(path, error))
    }

    /// Makes sure that no other restore writes here, for as long as this value lives.
    pub(super) fn lock(directory: &Path) -> Result<File, Error> {
        let failed = |source| Error::Target { path: directory.display().to_string(), source };
        std::fs::create_dir_all(directory).map_err(failed)?;
        let handle = File::open(directory).map_err(failed)?;
        // Who only looks holds the shared lock for a moment: that is no reason to refuse a restore.
        for _ in 0..LOCK_TRIES {
            if try_flock(&handle, FlockOperation::NonBlockingLockExclusive).map_err(failed)? {
                return Ok(handle);
            }
            if Self::is_locked(directory)? {
                break;
            }
            std::thread::sleep(LOCK_PAUSE);
        }
        Err(Error::TargetNotEmpty {
            target: directory.display().to_string(),
            reason: "another restore is writing there".into(),
        })
    }

    /// Whether a restore writes there now. Any number may look at once.
    pub(super) fn is_locked(directory: &Path) -> Result<bool, Error> {
        let failed = |source| Error::Target { path: directory.display().to_string(), source };
        let handle = match File::open(directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            opened => opened.map_err(failed)?,
        };
        let shared = FlockOperation::NonBlockingLockShared;
        try_flock(&handle, shared).map(|free| !free).map_err(failed)
    }

    pub(super) fn make_symlink(&self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let (parent, name) = split(path);
        rustix::fs::symlinkat(target, self.directory(parent)?, name)
            .map_err(|error| self.failed(path, error))
    }

    /// Writes everything of every file system we wrote to, once.
    pub(super) fn sync(&self) -> Result<(), Error> {
        for handle in std::iter::once(&self.root).chain(self.mapped.values()) {
            rustix::fs::syncfs(handle).map_err(|error| self.failed(b"", error))?;
        }
        Ok(())
    }

    /// Puts `name` into the root and every mapped directory, and makes it durable.
    pub(super) fn mark(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        for handle in std::iter::once(&self.root).chain(self.mapped.values()) {
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(handle, name, flags, mode(0o600))
                .map_err(|error| self.failed(name.as_bytes(), error))?;
            let mut file = File::from(file);
            let written = file.set_len(0).and_then(|()| io::Write::write_all(&mut file, content));
            written
                .and_then(|()| file.sync_all())
                .map_err(|error| self.failed(name.as_bytes(), error))?;
            rustix::fs::fsync(handle).map_err(|error| self.failed(b"", error))?;
        }
        Ok(())
    }

    pub(super) fn unmark(&self, name: &str) -> Result<(), Error> {
        // The root's marker goes last: while it is there, the restore is unfinished.
        for handle in self.mapped.values().chain(std::iter::once(&self.root)) {
            rustix::fs::unlinkat(handle, name, AtFlags::empty())
                .map_err(|error| self.failed(name.as_bytes(), error))?;
            rustix::fs::fsync(handle).map_err(|error| self.failed(b"", error))?;
        }
        Ok(())
    }
}

/// Whether the lock was free; it is held until the handle is closed.
fn try_flock(handle: &File, how: FlockOperation) -> io::Result<bool> {
    match rustix::fs::flock(handle, how) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The one place where a path of the caller's is followed, links and all: it is theirs.
fn open_directory(path: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::openat(CWD, path.as_os_str().as_bytes(), DIRECTORY, Mode::empty())
        .map_err(|error| Error::Target { path: path.display().to_string(), source: error.into() })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use super::*;

    #[test]
    fn one_restore_writes_and_any_number_may_look() {
        let place = tempfile::tempdir().unwrap();
        let directory = place.path().join("restored");
        assert!(!Tree::is_locked(&directory).unwrap());
        assert!(!directory.exists(), "looking makes nothing");
        std::fs::create_dir(&directory).unwrap();
        let other = File::open(&directory).unwrap();
        other.lock_shared().unwrap();
        assert!(!Tree::is_locked(&directory).unwrap(), "the other only looks");
        drop(other);
        let writing = Tree::lock(&directory).unwrap();
        assert!(Tree::is_locked(&directory).unwrap());
        assert!(matches!(Tree::lock(&directory), Err(Error::TargetNotEmpty { .. })));
        drop(writing);
        assert!(!Tree::is_locked(&directory).unwrap());
    }

    #[test]
    fn a_restore_is_not_refused_because_somebody_looks() {
        let place = tempfile::tempdir().unwrap();
        let looking = AtomicBool::new(true);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while looking.load(Ordering::Relaxed) {
                    Tree::is_locked(place.path()).unwrap();
                }
            });
            let refused = (0..500).filter(|_| Tree::lock(place.path()).is_err()).count();
            looking.store(false, Ordering::Relaxed);
            assert_eq!(refused, 0);
        });
    }
}
