//! The restored tree, reached through directory handles: no symbolic link is ever followed, whatever the manifest or
//! another process puts there.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{AtFlags, CWD, Dir, FallocateFlags, FileType, FlockOperation, Mode, OFlags};
use rustix::io::Errno;

use super::marker::MARKER_DRAFT;
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
    /// `None` for what is not there; then nothing is below it.
    root: Option<Arc<OwnedFd>>,
    directory: PathBuf,
    mapped: HashMap<Vec<u8>, Option<Arc<OwnedFd>>>,
    kept: Mutex<Kept>,
    /// A directory on each file system that is mounted somewhere inside, by its device.
    mounted: Mutex<HashMap<u64, Arc<OwnedFd>>>,
}

/// What stands under a name: the thing itself, never what it points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) kind: FileType,
    /// Permission bits.
    pub(super) mode: u32,
    pub(super) size_bytes: u64,
    /// Whether it is ours alone: no other name leads to it, and it belongs to whoever restores.
    pub(super) is_ours_alone: bool,
    device: u64,
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
    /// Opens the target's directories. Of one that is not there, nothing is seen and nothing can be made in it.
    pub(super) fn open(
        directory: &Path,
        mapping: impl Iterator<Item = (Vec<u8>, PathBuf)>,
    ) -> Result<Self, Error> {
        let root = open_directory(directory)?;
        let mut mapped = HashMap::new();
        for (path, elsewhere) in mapping {
            mapped.insert(path, open_directory(&elsewhere)?.map(Arc::new));
        }
        Ok(Self {
            root: root.map(Arc::new),
            directory: directory.to_owned(),
            mapped,
            kept: Mutex::default(),
            mounted: Mutex::default(),
        })
    }

    /// Where nothing is.
    pub(super) fn nothing() -> Self {
        Self {
            root: None,
            directory: PathBuf::new(),
            mapped: HashMap::new(),
            kept: Mutex::default(),
            mounted: Mutex::default(),
        }
    }

    pub(super) fn failed(&self, path: &[u8], error: impl Into<io::Error>) -> Error {
        Error::Target {
            path: format!("{}/{}", self.directory.display(), show(path)),
            source: error.into(),
        }
    }

    /// The directories that were given: the mapped ones first.
    fn given(&self) -> impl Iterator<Item = &Arc<OwnedFd>> {
        self.mapped.values().flatten().chain(&self.root)
    }

    fn directory(&self, path: &[u8]) -> Result<Arc<OwnedFd>, Error> {
        let given = if path.is_empty() { Some(&self.root) } else { self.mapped.get(path) };
        if let Some(given) = given {
            return given.clone().ok_or_else(|| self.failed(path, Errno::NOENT));
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

    /// What stands under a name. `None` also when something on the way to it is no directory.
    pub(super) fn look(&self, path: &[u8]) -> Result<Option<Seen>, Error> {
        let (parent, name) = split(path);
        let parent = match self.directory(parent) {
            Err(Error::Target { source, .. }) if is_absent(&source) => return Ok(None),
            parent => parent?,
        };
        let stat = match rustix::fs::statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(error) if is_absent(&error.into()) => return Ok(None),
            stat => stat.map_err(|error| self.failed(path, error))?,
        };
        Ok(Some(Seen {
            kind: FileType::from_raw_mode(stat.st_mode),
            mode: stat.st_mode & 0o7777,
            size_bytes: u64::try_from(stat.st_size).unwrap_or(0),
            is_ours_alone: stat.st_nlink == 1 && stat.st_uid == rustix::process::geteuid().as_raw(),
            device: stat.st_dev,
        }))
    }

    /// Makes a directory only we can enter; its own mode is set at the end.
    pub(super) fn make_directory(&self, path: &[u8]) -> Result<(), Error> {
        let (parent, name) = split(path);
        match rustix::fs::mkdirat(self.directory(parent)?, name, mode(0o700)) {
            Ok(()) => Ok(()),
            Err(error) => Err(self.failed(path, error)),
        }
    }

    /// Makes sure that we can work in a directory that was there.
    pub(super) fn enter_directory(&self, path: &[u8], seen: Seen) -> Result<(), Error> {
        if seen.mode & 0o700 != 0o700 {
            let (parent, name) = split(path);
            // Seen to be a directory a moment ago, in a tree where nobody else works.
            rustix::fs::chmodat(
                self.directory(parent)?,
                name,
                mode(seen.mode | 0o700),
                AtFlags::empty(),
            )
            .map_err(|error| self.failed(path, error))?;
        }
        let handle = self.directory(path)?;
        let mut mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        mounted.entry(seen.device).or_insert(handle);
        Ok(())
    }

    pub(super) fn set_directory_mode(&self, path: &[u8], bits: u32) -> Result<(), Error> {
        rustix::fs::fchmod(self.directory(path)?, mode(bits))
            .map_err(|error| self.failed(path, error))
    }

    /// Opens a file for writing, making it first if need be. May be called for one file from several threads: each finds
    /// or gives it the same size.
    pub(super) fn make_file(&self, path: &[u8], bits: u32, size_bytes: u64) -> Result<File, Error> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = self.open_at(path, flags)?;
        file.set_len(size_bytes).map_err(|error| self.failed(path, error))?;
        // A file that its owner may not write gets its mode at the end: it is opened again to be written.
        if bits & 0o7777 != 0o600 && !is_set_late(bits) {
            rustix::fs::fchmod(&file, mode(bits)).map_err(|error| self.failed(path, error))?;
        }
        Ok(file)
    }

    /// Takes over a file that was seen to be there, with its content; gives it size and mode. `false` when that cannot be.
    pub(super) fn keep_file(
        &self,
        path: &[u8],
        bits: u32,
        size_bytes: u64,
        seen: Seen,
    ) -> Result<bool, Error> {
        // What turns out to be no file after all must not make us wait for its other end.
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = self.open_at(path, flags) else { return Ok(false) };
        if seen.size_bytes != size_bytes {
            file.set_len(size_bytes).map_err(|error| self.failed(path, error))?;
        }
        if bits & 0o7777 != seen.mode && !is_set_late(bits) {
            rustix::fs::fchmod(&file, mode(bits)).map_err(|error| self.failed(path, error))?;
        }
        Ok(true)
    }

    /// Opens a file that was made or kept before.
    pub(super) fn open_file(&self, path: &[u8]) -> Result<File, Error> {
        self.open_at(path, OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC)
    }

    /// Opens a file that was seen to be there, to compare it.
    pub(super) fn read_file(&self, path: &[u8], writes: bool) -> Result<File, Error> {
        let how = if writes { OFlags::RDWR } else { OFlags::RDONLY };
        self.open_at(path, how | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC)
    }

    fn open_at(&self, path: &[u8], flags: OFlags) -> Result<File, Error> {
        let (parent, name) = split(path);
        rustix::fs::openat(self.directory(parent)?, name, flags, mode(0o600))
            .map(File::from)
            .map_err(|error| self.failed(path, error))
    }

    /// Makes a stretch of a file read as zeros and gives its room back where the file system can.
    pub(super) fn clear(
        &self,
        path: &[u8],
        file: &File,
        offset: u64,
        length: u64,
    ) -> Result<(), Error> {
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(file, how, offset, length) {
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                let zeros = vec![0; usize::try_from(length).unwrap_or(0)];
                file.write_all_at(&zeros, offset).map_err(|error| self.failed(path, error))
            }
            punched => punched.map_err(|error| self.failed(path, error)),
        }
    }

    /// Sets the mode of a file that was made by [`Self::make_file`] or kept by [`Self::keep_file`].
    pub(super) fn set_file_mode(&self, path: &[u8], bits: u32) -> Result<(), Error> {
        let (parent, name) = split(path);
        rustix::fs::chmodat(self.directory(parent)?, name, mode(bits), AtFlags::empty())
            .map_err(|error| self.failed(path, error))
    }

    /// Removes whatever stands under a name: a directory with all that is in it, a link and not what it points to.
    pub(super) fn remove(&self, path: &[u8]) -> Result<(), Error> {
        let (parent, name) = split(path);
        let parent = self.directory(parent)?;
        match unlink(&parent, name) {
            Ok(()) => Ok(()),
            Err(Errno::ISDIR) => {
                // Handles of what is in it would lead to what is gone.
                *self.kept.lock().unwrap_or_else(PoisonError::into_inner) = Kept::default();
                remove_directory(&parent, name).map_err(|error| self.failed(path, error))
            }
            Err(error) => Err(self.failed(path, error)),
        }
    }

    /// Makes names that were removed from the directory of `path` stay away.
    pub(super) fn sync_parent(&self, path: &[u8]) -> Result<(), Error> {
        let (parent, _) = split(path);
        rustix::fs::fsync(self.directory(parent)?).map_err(|error| self.failed(parent, error))
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
        Err(busy(directory))
    }

    /// Fails when a restore writes there now.
    pub(super) fn must_be_free(directory: &Path) -> Result<(), Error> {
        if Self::is_locked(directory)? { Err(busy(directory)) } else { Ok(()) }
    }

    /// Whether a restore writes there now. Any number may look at once.
    pub(super) fn is_locked(directory: &Path) -> Result<bool, Error> {
        let failed = |source| Error::Target { path: directory.display().to_string(), source };
        let handle = match File::open(directory) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                return Ok(false);
            }
            opened => opened.map_err(failed)?,
        };
        let shared = FlockOperation::NonBlockingLockShared;
        try_flock(&handle, shared).map(|free| !free).map_err(failed)
    }

    /// What a link says.
    pub(super) fn read_link(&self, path: &[u8]) -> Result<Vec<u8>, Error> {
        let (parent, name) = split(path);
        rustix::fs::readlinkat(self.directory(parent)?, name, Vec::new())
            .map(std::ffi::CString::into_bytes)
            .map_err(|error| self.failed(path, error))
    }

    pub(super) fn make_symlink(&self, path: &[u8], target: &[u8]) -> Result<(), Error> {
        let (parent, name) = split(path);
        rustix::fs::symlinkat(target, self.directory(parent)?, name)
            .map_err(|error| self.failed(path, error))
    }

    /// Writes everything of every file system we wrote to, once.
    pub(super) fn sync(&self) -> Result<(), Error> {
        let mounted = self.mounted.lock().unwrap_or_else(PoisonError::into_inner);
        let mut devices = HashSet::new();
        for handle in self.given().chain(mounted.values()) {
            let device = rustix::fs::fstat(handle).map(|stat| stat.st_dev);
            if devices.insert(device.map_err(|error| self.failed(b"", error))?) {
                rustix::fs::syncfs(handle).map_err(|error| self.failed(b"", error))?;
            }
        }
        Ok(())
    }

    /// Puts `name` into the root and every mapped directory, and makes it durable. A crash leaves what was there before, or
    /// all of it.
    pub(super) fn mark(&self, name: &str, content: &[u8]) -> Result<(), Error> {
        let failed = |error: io::Error| self.failed(name.as_bytes(), error);
        for handle in self.root.iter().chain(self.mapped.values().flatten()) {
            let flags = OFlags::WRONLY
                | OFlags::CREATE
                | OFlags::TRUNC
                | OFlags::NOFOLLOW
                | OFlags::CLOEXEC;
            let draft = rustix::fs::openat(handle, MARKER_DRAFT, flags, mode(0o600));
            let mut draft = File::from(draft.map_err(|error| failed(error.into()))?);
            io::Write::write_all(&mut draft, content)
                .and_then(|()| draft.sync_all())
                .and_then(|()| Ok(rustix::fs::renameat(handle, MARKER_DRAFT, handle, name)?))
                .and_then(|()| Ok(rustix::fs::fsync(handle)?))
                .map_err(failed)?;
        }
        Ok(())
    }

    pub(super) fn unmark(&self, name: &str) -> Result<(), Error> {
        // The root's marker goes last: while it is there, the restore is unfinished.
        for handle in self.given() {
            rustix::fs::unlinkat(handle, name, AtFlags::empty())
                .map_err(|error| self.failed(name.as_bytes(), error))?;
            rustix::fs::fsync(handle).map_err(|error| self.failed(b"", error))?;
        }
        Ok(())
    }
}

/// Whether an error says that there is nothing under the name, or that a part of the way is no directory.
fn is_absent(error: &io::Error) -> bool {
    let absent = [Errno::NOENT, Errno::NOTDIR, Errno::LOOP];
    error.raw_os_error().is_some_and(|code| absent.iter().any(|e| e.raw_os_error() == code))
}

/// Removes what is no directory, from a directory that its owner may not write, too: one that stays gets its own mode at the
/// end.
fn unlink(parent: &OwnedFd, name: &[u8]) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(parent, name, AtFlags::empty()) {
        Err(Errno::ACCESS) => {
            rustix::fs::fchmod(parent, mode(0o700))?;
            rustix::fs::unlinkat(parent, name, AtFlags::empty())
        }
        removed => removed,
    }
}

/// Removes a directory and what is in it, following nothing.
fn remove_directory(parent: &OwnedFd, name: &[u8]) -> rustix::io::Result<()> {
    let handle = rustix::fs::openat(parent, name, DIRECTORY | OFlags::NOFOLLOW, Mode::empty())?;
    let mut names = Vec::new();
    for entry in Dir::read_from(&handle)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    for name in names {
        match unlink(&handle, &name) {
            Err(Errno::ISDIR) => remove_directory(&handle, &name)?,
            removed => removed?,
        }
    }
    rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR)
}

fn busy(directory: &Path) -> Error {
    Error::TargetBusy { target: directory.display().to_string() }
}

/// Whether the lock was free; it is held until the handle is closed.
fn try_flock(handle: &File, how: FlockOperation) -> io::Result<bool> {
    match rustix::fs::flock(handle, how) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// The one place where a path of the caller's is followed, links and all: it is theirs.
fn open_directory(path: &Path) -> Result<Option<OwnedFd>, Error> {
    match rustix::fs::openat(CWD, path.as_os_str().as_bytes(), DIRECTORY, Mode::empty()) {
        Ok(handle) => Ok(Some(handle)),
        Err(Errno::NOENT) => Ok(None),
        Err(error) => Err(Error::Target { path: path.display().to_string(), source: error.into() }),
    }
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
        assert!(matches!(Tree::lock(&directory), Err(Error::TargetBusy { .. })));
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
