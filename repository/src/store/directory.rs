//! A repository in a directory of a local or network file system.
//!
//! An object is written to a file without a name, synced, and linked to its name, so a name either has the whole object or
//! does not exist, and a crash leaves nothing behind; the directory is synced before success is said, also when what is there is
//! somebody else's. File systems that know
//! no files without a name (NFS) get a temporary name below `.uploads/`; what a crash leaves there belongs to nobody. It does not encrypt, cache or retry, and it does not follow what other hosts do: on a
//! network file system the probe at the repository's creation finds out whether `link` can be trusted.
//!
//! What root writes belongs to the owner of the directory that it is written into, or the next worker could neither change nor
//! delete it.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Seek, SeekFrom};
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, fchown};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use bytes::Bytes;
use rustix::fs::{Advice, AtFlags, CWD, Mode, OFlags, RenameFlags, fadvise};
use rustix::io::Errno;

use super::probe::Capabilities;
use super::{
    KeyTest, Listed, PutOutcome, Staged, Store, StoreError, Upload, check_key, staged_elsewhere,
};
use crate::pieces::write_in_pieces;
use crate::{chance, room};

/// Where unfinished objects are that must have a name. Not a valid key, so no object can be there.
const UPLOADS: &str = ".uploads";
/// An object that is longer is content, which nobody reads before its memory is wanted by others; shorter ones are read again
/// soon.
const REMEMBERED_BYTES: u64 = 1 << 20;

/// How often a directory is made whose parent is not there, or not there any more.
const MAKING_TRIES: u32 = 3;

/// A [`Store`] below one directory.
#[derive(Debug, Clone)]
pub struct DirectoryStore {
    root: PathBuf,
    /// Directories whose names are known to be durable.
    durable: Arc<Mutex<HashSet<PathBuf>>>,
    /// Directories that could not be synced after something in them got its name.
    unsynced: Arc<Mutex<HashSet<PathBuf>>>,
}

impl DirectoryStore {
    /// A store below `root`, which need not exist yet: the first object creates it.
    pub fn new(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), durable: Arc::default(), unsynced: Arc::default() }
    }

    fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    /// Runs blocking file work away from the runtime's threads. Once begun it runs to its end, even when the caller
    /// has gone: a half-done step never stays behind.
    async fn blocking<T: Send + 'static>(
        &self,
        operation: &'static str,
        key: &str,
        work: impl FnOnce(&Self, &str) -> io::Result<T> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (store, owned) = (self.clone(), key.to_owned());
        tokio::task::spawn_blocking(move || work(&store, &owned))
            .await
            .unwrap_or_else(|gone| Err(io::Error::other(gone)))
            .map_err(|source| classify(operation, key, source))
    }

    /// Creates the missing directories above `path` and syncs each one's parent, once: also of one that is there, because
    /// whoever is creating it may not have come to that.
    fn create_parents(&self, path: &Path) -> io::Result<()> {
        self.create_parents_within(path, MAKING_TRIES)
    }

    fn create_parents_within(&self, path: &Path, tries: u32) -> io::Result<()> {
        let Some(parent) = path.parent() else { return Ok(()) };
        let known = || self.durable.lock().unwrap_or_else(PoisonError::into_inner);
        match fs::create_dir(parent) {
            // Somebody may remove what was just made; and where nobody can make anything, as in /proc, that is said, too.
            Err(error) if error.kind() == ErrorKind::NotFound && tries > 0 => {
                self.create_parents(parent)?;
                return self.create_parents_within(path, tries - 1);
            }
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // What the repository itself lies in may be closed to us, and is older.
                if parent == self.root
                    || !parent.starts_with(&self.root)
                    || known().contains(parent)
                {
                    return Ok(());
                }
                self.create_parents(parent)?;
            }
            created => {
                created?;
                if let Some((uid, gid)) = heir(parent.parent())? {
                    // Never through a link that the owner puts there meanwhile.
                    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let made = rustix::fs::openat(CWD, parent, flags, Mode::empty())?;
                    unless_forbidden(fchown(made, Some(uid), Some(gid)))?;
                }
            }
        }
        parent.parent().map_or(Ok(()), sync_directory)?;
        known().insert(parent.to_owned());
        Ok(())
    }

    /// Makes the name of an object durable. Until that has worked, the object is not shown.
    fn sync_parent(&self, path: &Path) -> io::Result<()> {
        let Some(parent) = path.parent() else { return Ok(()) };
        let synced = sync_directory(parent);
        let mut unsynced = self.unsynced.lock().unwrap_or_else(PoisonError::into_inner);
        if synced.is_ok() {
            unsynced.remove(parent);
        } else {
            unsynced.insert(parent.to_owned());
        }
        synced
    }

    fn is_unsynced(&self, path: &Path) -> bool {
        let unsynced = self.unsynced.lock().unwrap_or_else(PoisonError::into_inner);
        path.parent().is_some_and(|parent| unsynced.contains(parent))
    }

    /// What is there was perhaps written by somebody who died before its name was durable.
    fn settle_existing(&self, path: &Path) -> io::Result<PutOutcome> {
        self.create_parents(path)?;
        self.sync_parent(path)?;
        Ok(PutOutcome::Exists)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<Temporary> {
        let mut temporary = Temporary::create(self)?;
        write_in_pieces(&mut temporary.file, bytes)?;
        temporary.settle()?;
        Ok(temporary)
    }

    /// Gives the synced temporary file its name, unless the name is taken.
    fn link(&self, temporary: &Temporary, key: &str) -> io::Result<PutOutcome> {
        let path = self.path(key);
        self.create_parents(&path)?;
        match temporary.link(&path) {
            Ok(()) => {}
            // A network file system whose answer was lost sends the call again, and the second one finds the first
            // one's name: it is ours when it is our file.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                let (ours, there) = (temporary.file.metadata()?, fs::symlink_metadata(&path)?);
                if (ours.dev(), ours.ino()) != (there.dev(), there.ino()) {
                    return self.settle_existing(&path);
                }
            }
            Err(error) => return Err(error),
        }
        self.sync_parent(&path)?;
        Ok(PutOutcome::Created)
    }

    /// Gives it its name, whoever had it.
    fn link_or_replace(&self, temporary: Temporary, key: &str) -> io::Result<()> {
        if self.link(&temporary, key)? == PutOutcome::Created {
            return Ok(());
        }
        let path = self.path(key);
        temporary.replace(self, &path)?;
        self.sync_parent(&path)
    }
}

#[async_trait]
impl Store for DirectoryStore {
    fn describe(&self) -> String {
        format!("file://{}", self.root.display())
    }

    fn directory(&self) -> Option<&Path> {
        Some(&self.root)
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        check_key("get", key)?;
        self.blocking("get", key, move |store, key| {
            let path = store.path(key);
            let (file, size) = open_object(&path)?;
            if store.is_unsynced(&path) {
                store.sync_parent(&path)?;
            }
            if size > limit_bytes {
                return Err(io::Error::new(
                    ErrorKind::FileTooLarge,
                    format!("{size} bytes, and at most {limit_bytes} are expected"),
                ));
            }
            let mut bytes = Vec::with_capacity(usize::try_from(size).unwrap_or(0));
            file.take(limit_bytes.saturating_add(1)).read_to_end(&mut bytes)?;
            Ok(bytes.into())
        })
        .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_key("get", key)?;
        self.blocking("get", key, move |store, key| {
            let (mut file, size) = open_object(&store.path(key))?;
            let length = range.end.checked_sub(range.start).ok_or(ErrorKind::InvalidInput)?;
            // The size is checked before memory is taken: ranges come from objects that may be forged.
            if range.end > size {
                return Err(io::Error::new(
                    ErrorKind::UnexpectedEof,
                    format!("bytes {} to {} of {size}", range.start, range.end),
                ));
            }
            file.seek(SeekFrom::Start(range.start))?;
            let mut bytes = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
            file.take(length).read_to_end(&mut bytes)?;
            if bytes.len() as u64 == length {
                Ok(bytes.into())
            } else {
                Err(ErrorKind::UnexpectedEof.into())
            }
        })
        .await
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        check_key("look at", key)?;
        self.blocking("look at", key, |store, key| Ok(open_object(&store.path(key))?.1)).await
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        check_key("put", key)?;
        self.blocking("put", key, move |store, key| {
            let temporary = store.write(&bytes)?;
            store.link_or_replace(temporary, key)
        })
        .await
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        check_key("put", key)?;
        self.blocking("put", key, move |store, key| {
            let path = store.path(key);
            if fs::symlink_metadata(&path).is_ok() {
                return store.settle_existing(&path);
            }
            let temporary = store.write(&bytes)?;
            store.link(&temporary, key)
        })
        .await
    }

    async fn stage(&self, key: &str, bytes: Bytes, _: &Capabilities) -> Result<Staged, StoreError> {
        check_key("put", key)?;
        let written = self.blocking("put", key, move |store, _| {
            let written = store.write(&bytes)?;
            // One with a name would stay behind when this process dies.
            Ok(if written.name.is_some() { Err(bytes) } else { Ok(Written(written)) })
        });
        Ok(written.await?.map_or_else(Staged::Held, Staged::Written))
    }

    async fn put_staged_if_absent(
        &self,
        key: &str,
        staged: Staged,
    ) -> Result<PutOutcome, StoreError> {
        let written = match staged {
            Staged::Written(Written(temporary)) => temporary,
            Staged::Held(bytes) => return self.put_if_absent(key, bytes).await,
            Staged::Sent(_) => return Err(staged_elsewhere(key)),
        };
        check_key("put", key)?;
        self.blocking("put", key, move |store, key| store.link(&written, key)).await
    }

    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        check_key("put", key)?;
        let temporary = self.blocking("put", key, |store, _| Temporary::create(store)).await?;
        Ok(Box::new(DirectoryUpload {
            store: self.clone(),
            key: key.to_owned(),
            temporary: Some(temporary),
        }))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        if !prefix.is_empty() {
            check_key("list", prefix.trim_end_matches('/'))?;
        }
        self.blocking("list", prefix, |store, prefix| {
            let mut found = Vec::new();
            let folder = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
            walk(&store.path(folder), folder, prefix, &mut found)?;
            found.sort_by(|a, b| a.key.cmp(&b.key));
            Ok(found)
        })
        .await
    }

    async fn has_behind(
        &self,
        prefix: &str,
        after: &str,
        is_wanted: KeyTest,
    ) -> Result<bool, StoreError> {
        if !prefix.is_empty() {
            check_key("list", prefix.trim_end_matches('/'))?;
        }
        let after = after.to_owned();
        self.blocking("list", prefix, move |store, prefix| {
            let folder = prefix.rsplit_once('/').map_or("", |(folder, _)| folder);
            has_below(&store.path(folder), folder, prefix, &|key| {
                key > after.as_str() && is_wanted(key)
            })
        })
        .await
    }

    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        if !prefix.is_empty() {
            check_key("list", prefix.trim_end_matches('/'))?;
        }
        self.blocking("list", prefix, |store, prefix| {
            let mut names = Vec::new();
            for entry in read_directory(&store.path(prefix.trim_end_matches('/')))? {
                let name = entry.file_name();
                let Some(name) = name.to_str().filter(|name| *name != UPLOADS) else { continue };
                if entry.file_type()?.is_dir() {
                    names.push(name.to_owned());
                }
            }
            names.sort();
            Ok(names)
        })
        .await
    }

    async fn free_bytes(&self) -> Result<Option<u64>, StoreError> {
        let root = self.root.display().to_string();
        self.blocking("look for room in", &root, |store, _| Ok(Some(room::free(&store.root)?.1)))
            .await
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key("delete", key)?;
        self.blocking("delete", key, |store, key| {
            let path = store.path(key);
            match fs::remove_file(&path) {
                Ok(()) => path.parent().map_or(Ok(()), sync_directory),
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Unfinished objects have no key here, and most have no name either: they go with their process.
    async fn abort_uploads(&self, _keys: &[String]) -> Result<usize, StoreError> {
        Ok(0)
    }
}

/// Where a process finds its own open files, to give one of them a name.
const OWN_FILES: &str = "/proc/self/fd";
/// What other users of the repository's directory may do with an object.
const OBJECT_MODE: u32 = 0o640;

/// The bytes of an object, durable, without its name.
#[derive(Debug)]
pub struct Written(Temporary);

/// A file that is not an object yet, and disappears when it is dropped.
#[derive(Debug)]
struct Temporary {
    file: File,
    /// Below `.uploads/`; `None` where a file needs no name.
    name: Option<PathBuf>,
}

impl Temporary {
    fn create(store: &DirectoryStore) -> io::Result<Self> {
        let temporary = Self::make(store)?;
        if let Some((uid, gid)) = heir(Some(&store.root))? {
            unless_forbidden(fchown(&temporary.file, Some(uid), Some(gid)))?;
        }
        Ok(temporary)
    }

    fn make(store: &DirectoryStore) -> io::Result<Self> {
        let root = &store.root;
        store.create_parents(&root.join(UPLOADS))?;
        if Path::new(OWN_FILES).exists() {
            let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            match rustix::fs::openat(CWD, root, flags, Mode::from_raw_mode(OBJECT_MODE)) {
                Ok(file) => return Ok(Self { file: file.into(), name: None }),
                // A file system, or a kernel, that does not know them.
                Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
                Err(error) => return Err(error.into()),
            }
        }
        let name = unused_name(store)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(OBJECT_MODE).open(&name)?;
        Ok(Self { file, name: Some(name) })
    }

    /// Makes its content durable. What is long leaves memory with that: on a server's own host the server needs it.
    fn settle(&self) -> io::Result<()> {
        self.file.sync_all()?;
        if self.file.metadata()?.len() > REMEMBERED_BYTES {
            // Only advice, and about a file that is ours.
            let _ = fadvise(&self.file, 0, None, Advice::DontNeed);
        }
        Ok(())
    }

    /// Gives it a name that must be free.
    fn link(&self, path: &Path) -> io::Result<()> {
        let Some(name) = &self.name else {
            let own = format!("{OWN_FILES}/{}", self.file.as_raw_fd());
            let linked = rustix::fs::linkat(CWD, own, CWD, path, AtFlags::SYMLINK_FOLLOW);
            return linked.map_err(io::Error::from);
        };
        match fs::hard_link(name, path) {
            // File systems without hard links: the same promise by another call.
            Err(error)
                if matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::PermissionDenied) =>
            {
                rustix::fs::renameat_with(CWD, name, CWD, path, RenameFlags::NOREPLACE)
                    .map_err(io::Error::from)
            }
            other => other,
        }
    }

    /// Puts it in the place of what has the name.
    fn replace(mut self, store: &DirectoryStore, path: &Path) -> io::Result<()> {
        if self.name.is_none() {
            let name = unused_name(store)?;
            self.link(&name)?;
            self.name = Some(name);
        }
        self.name.as_ref().map_or(Ok(()), |name| fs::rename(name, path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // After a rename the name is gone already; after a link this removes the second name.
        if let Some(name) = &self.name {
            let _ = fs::remove_file(name);
        }
    }
}

/// Whom what this process makes in a directory shall belong to, if not to its user.
fn heir(directory: Option<&Path>) -> io::Result<Option<(u32, u32)>> {
    let is_root = rustix::process::geteuid().is_root();
    let Some(directory) = directory.filter(|_| is_root) else { return Ok(None) };
    let owner = fs::metadata(directory)?;
    Ok(heir_of(is_root, owner.uid(), owner.gid()))
}

fn heir_of(is_root: bool, uid: u32, gid: u32) -> Option<(u32, u32)> {
    (is_root && uid != 0).then_some((uid, gid))
}

/// A server of a network file system may not believe our root: then it has made the file somebody's already.
fn unless_forbidden(done: io::Result<()>) -> io::Result<()> {
    done.or_else(
        |error| {
            if error.kind() == ErrorKind::PermissionDenied { Ok(()) } else { Err(error) }
        },
    )
}

/// A path below `.uploads/` that nobody has.
fn unused_name(store: &DirectoryStore) -> io::Result<PathBuf> {
    let name = crate::hex::encode(&chance::random::<16>());
    let path = store.root.join(UPLOADS).join(name);
    store.create_parents(&path)?;
    Ok(path)
}

#[derive(Debug)]
struct DirectoryUpload {
    store: DirectoryStore,
    key: String,
    temporary: Option<Temporary>,
}

impl DirectoryUpload {
    /// Runs one step with the file; a step that fails leaves no file behind.
    async fn step<T: Send + 'static>(
        &mut self,
        work: impl FnOnce(&DirectoryStore, &str, Temporary) -> io::Result<(Option<Temporary>, T)>
        + Send
        + 'static,
    ) -> Result<T, StoreError> {
        let temporary = self.temporary.take();
        let key = self.key.clone();
        let (temporary, done) = self
            .store
            .blocking("put", &key, move |store, key| {
                let temporary =
                    temporary.ok_or_else(|| io::Error::other("the upload failed before"))?;
                work(store, key, temporary)
            })
            .await?;
        self.temporary = temporary;
        Ok(done)
    }
}

#[async_trait]
impl Upload for DirectoryUpload {
    async fn part(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.step(move |_, _, mut temporary| {
            write_in_pieces(&mut temporary.file, &bytes)?;
            Ok((Some(temporary), ()))
        })
        .await
    }

    async fn complete(mut self: Box<Self>) -> Result<(), StoreError> {
        self.step(|store, key, temporary| {
            temporary.settle()?;
            store.link_or_replace(temporary, key)?;
            Ok((None, ()))
        })
        .await
    }

    async fn abort(mut self: Box<Self>) -> Result<(), StoreError> {
        self.temporary = None;
        Ok(())
    }
}

fn sync_directory(path: &Path) -> io::Result<()> {
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    File::open(path)?.sync_all()
}

/// An object and its size. A directory is not one: a key may be tried that others have below them.
fn open_object(path: &Path) -> io::Result<(File, u64)> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(ErrorKind::NotFound.into());
    }
    Ok((file, metadata.len()))
}

/// The entries of a directory; one that does not exist has none.
fn read_directory(path: &Path) -> io::Result<Vec<fs::DirEntry>> {
    match fs::read_dir(path) {
        Ok(entries) => entries.collect(),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

fn walk(path: &Path, key: &str, prefix: &str, found: &mut Vec<Listed>) -> io::Result<()> {
    for entry in read_directory(path)? {
        let Some(below) = key_of(&entry, key) else { continue };
        if entry.file_type()?.is_dir() {
            if below.starts_with(prefix) || prefix.starts_with(&below) {
                walk(&entry.path(), &below, prefix, found)?;
            }
        } else if below.starts_with(prefix) {
            match entry.metadata() {
                Ok(metadata) => found.push(Listed { key: below, size_bytes: metadata.len() }),
                // Deleted since the directory was read.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(())
}

/// Whether a directory has an object that is wanted. It is read no further than to the first.
fn has_below(
    path: &Path,
    key: &str,
    prefix: &str,
    is_wanted: &dyn Fn(&str) -> bool,
) -> io::Result<bool> {
    let entries = match fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    for entry in entries {
        let entry = entry?;
        let Some(below) = key_of(&entry, key) else { continue };
        let has = if entry.file_type()?.is_dir() {
            (below.starts_with(prefix) || prefix.starts_with(&below))
                && has_below(&entry.path(), &below, prefix, is_wanted)?
        } else {
            below.starts_with(prefix) && is_wanted(&below)
        };
        if has {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What an entry of the directory `key` stands for.
fn key_of(entry: &fs::DirEntry, key: &str) -> Option<String> {
    let name = entry.file_name();
    let name = name.to_str().filter(|name| !(key.is_empty() && *name == UPLOADS))?;
    Some(if key.is_empty() { name.to_owned() } else { format!("{key}/{name}") })
}

fn classify(operation: &'static str, key: &str, source: io::Error) -> StoreError {
    let key = key.to_owned();
    match source.kind() {
        ErrorKind::NotFound | ErrorKind::NotADirectory => StoreError::NotFound { key },
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => {
            StoreError::Forbidden { operation, key, source: source.into() }
        }
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
            StoreError::Full { key, source: source.into() }
        }
        // Of reading a range alone.
        ErrorKind::UnexpectedEof => StoreError::Short { key, source: source.into() },
        // Of writing, it is a limit of the file system.
        ErrorKind::FileTooLarge if operation == "get" => {
            StoreError::Large { key, source: source.into() }
        }
        _ => StoreError::Unavailable { operation, key, source: source.into() },
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn what_root_makes_belongs_to_whom_the_directory_belongs() {
        assert_eq!(heir_of(true, 101, 104), Some((101, 104)));
        assert_eq!(heir_of(true, 0, 104), None);
        assert_eq!(heir_of(false, 101, 104), None);
        let forbidden = io::Error::from(ErrorKind::PermissionDenied);
        unless_forbidden(Err(forbidden)).unwrap();
        unless_forbidden(Err(ErrorKind::StorageFull.into())).unwrap_err();
    }

    #[tokio::test]
    async fn where_no_directory_can_be_made_that_is_said() {
        let store = DirectoryStore::new("/proc/repository");
        let outcome = store.put_if_absent("config", Bytes::new()).await;
        assert!(outcome.is_err(), "{outcome:?}");
    }

    /// Bytes of a file that are in memory.
    fn resident(path: &Path) -> u64 {
        let options = ["--bytes", "--noheadings", "--output", "RES"];
        let told = std::process::Command::new("fincore").args(options).arg(path).output().unwrap();
        assert!(told.status.success(), "{told:?}");
        String::from_utf8(told.stdout).unwrap().trim().parse().unwrap()
    }

    #[tokio::test]
    async fn long_objects_do_not_stay_in_memory_when_they_are_stored() {
        let place = tempfile::tempdir().unwrap();
        let store = DirectoryStore::new(place.path());
        let long = Bytes::from(vec![7; 5 << 20]);
        store.put("put", long.clone()).await.unwrap();
        store.put_if_absent("put-if-absent", long.clone()).await.unwrap();
        let mut upload = store.upload("uploaded").await.unwrap();
        upload.part(long.clone()).await.unwrap();
        upload.part(long.slice(..100)).await.unwrap();
        upload.complete().await.unwrap();
        for key in ["put", "put-if-absent", "uploaded"] {
            let path = place.path().join(key);
            let stored = resident(&path);
            // Where the file system is memory itself, nothing can leave it.
            fadvise(File::open(&path).unwrap(), 0, None, Advice::DontNeed).unwrap();
            assert_eq!(stored, resident(&path), "{key}");
        }
        store.put("short", long.slice(..100)).await.unwrap();
        assert!(resident(&place.path().join("short")) > 0);
    }

    #[tokio::test]
    async fn nothing_is_said_to_be_there_before_its_name_is_durable() {
        let place = tempfile::tempdir().unwrap();
        let (key, bytes) = ("folder/below/object", Bytes::from_static(b"x"));
        let first = DirectoryStore::new(place.path());
        first.put(key, bytes.clone()).await.unwrap();
        // To another process everything that it finds may be as young as this.
        let second = DirectoryStore::new(place.path());
        let folder = place.path().join("folder/below");
        // Who cannot open a directory cannot sync it.
        let mode = |mode| fs::set_permissions(&folder, fs::Permissions::from_mode(mode)).unwrap();
        mode(0o300);
        assert!(File::open(&folder).is_err(), "this test does not run as root");
        second.put_if_absent(key, bytes.clone()).await.unwrap_err();
        let temporary = second.write(&bytes).unwrap();
        second.link(&temporary, key).unwrap_err();
        // Nor is it shown to whoever looks whether it is there after all.
        second.get(key, 10).await.unwrap_err();
        mode(0o700);
        second.get(key, 10).await.unwrap();
        assert_eq!(second.put_if_absent(key, bytes).await.unwrap(), PutOutcome::Exists);
        assert_eq!(second.link(&temporary, key).unwrap(), PutOutcome::Exists);
        let durable = second.durable.lock().unwrap();
        assert!(durable.contains(&folder) && durable.contains(&place.path().join("folder")));
    }
}
