//! Looking before leaping: what a backup's entries ask for, and what is where they would go.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::tree::split;
use super::{Place, RestoreTarget};
use crate::entry::{Body, Entry, check_path};
use crate::error::{Error, show};
use crate::layout;
use crate::reader::Backup;
use crate::stop::Stop;

/// Stands in a target that is not finished.
pub(super) const MARKER: &str = "pgmuster-restore-incomplete";

pub(super) fn marker_text(backup: &Backup) -> String {
    format!(
        "An unfinished restore of backup {}.\n\
         Do not start a server here. Restore again, or delete this directory.\n",
        backup.id()
    )
}

/// What a restore asks for.
#[derive(Debug, Default)]
pub(super) struct Survey {
    pub(super) files: u64,
    pub(super) directories: u64,
    pub(super) bytes: u64,
    pub(super) places: Vec<Place>,
    pub(super) resumes: bool,
}

pub(super) fn survey(
    backup: &Backup,
    target: &RestoreTarget,
    stop: &Stop,
) -> Result<Survey, Error> {
    for (path, elsewhere) in &target.mapping {
        check_path(path).map_err(|reason| Error::entry(path, reason))?;
        if !elsewhere.is_absolute() {
            return Err(Error::entry(
                path,
                format!("it is mapped to {}, which is not absolute", elsewhere.display()),
            ));
        }
    }
    let mut contents = Contents::default();
    let root = &backup.root;
    for shard in root.shards.iter().chain(&root.late) {
        for entry in stop.wait(backup.reader.entries(&shard.shard))? {
            contents.add(backup, target, &entry)?;
        }
    }
    if let Some(directory) = &target.wal_directory {
        check_path(directory).map_err(|reason| Error::entry(directory, reason))?;
        for mut entry in stop.wait(backup.wal_entries())? {
            entry.path = [directory, &b"/"[..], &entry.path].concat();
            contents.add(backup, target, &entry)?;
        }
    }
    if let Some(unknown) = target.mapping.keys().find(|path| !contents.directories.contains(*path))
    {
        return Err(Error::entry(unknown, "it is mapped and no directory of this backup"));
    }
    let mut survey = Survey {
        files: contents.files,
        directories: contents.directories.len() as u64,
        bytes: contents.bytes.values().sum(),
        ..Survey::default()
    };
    let mut roots: Vec<(&[u8], &Path)> = vec![(b"", &target.directory)];
    roots.extend(
        target.mapping.iter().map(|(path, elsewhere)| (path.as_slice(), elsewhere.as_path())),
    );
    for (prefix, directory) in roots {
        let found = look(directory, prefix, backup, &contents)?;
        survey.resumes |= found.resumes;
        let needed_bytes = contents.bytes.get(prefix).copied().unwrap_or(0);
        let (device, free_bytes) = free(directory)?;
        survey.places.push(Place {
            directory: directory.to_owned(),
            needed_bytes,
            available_bytes: free_bytes.saturating_add(found.clearable_bytes),
            device,
        });
    }
    Ok(survey)
}

/// Every name of the backup: for telling ours from others', and for refusing what cannot be a tree.
#[derive(Debug, Default)]
struct Contents {
    files: u64,
    directories: HashSet<Vec<u8>>,
    others: HashSet<Vec<u8>>,
    /// Bytes by the mapped directory they go to; the empty path is the target itself.
    bytes: HashMap<Vec<u8>, u64>,
}

impl Contents {
    fn add(&mut self, backup: &Backup, target: &RestoreTarget, entry: &Entry) -> Result<(), Error> {
        let refuse = |reason: &str| {
            let key = layout::of_backup(backup.lineage(), backup.id(), "manifest");
            Err(Error::damaged(key, format!("{}: {reason}", show(&entry.path))))
        };
        let (parent, _) = split(&entry.path);
        if !parent.is_empty() && !self.directories.contains(parent) {
            return refuse("it stands in something that is no directory");
        }
        if entry.path == MARKER.as_bytes() {
            return refuse("it has the name of the marker");
        }
        let fresh = match &entry.body {
            Body::Directory => self.directories.insert(entry.path.clone()),
            Body::Symlink { .. } => self.others.insert(entry.path.clone()),
            Body::File(file) => {
                self.files += 1;
                *self.bytes.entry(place_of(&entry.path, target)).or_default() += file.size_bytes;
                self.others.insert(entry.path.clone())
            }
        };
        if fresh { Ok(()) } else { refuse("it is there twice") }
    }

    fn has(&self, path: &[u8]) -> bool {
        self.directories.contains(path) || self.others.contains(path)
    }
}

/// The mapped directory that a path goes to.
fn place_of(path: &[u8], target: &RestoreTarget) -> Vec<u8> {
    let mut at = split(path).0;
    while !at.is_empty() {
        if target.mapping.contains_key(at) {
            return at.to_vec();
        }
        at = split(at).0;
    }
    Vec::new()
}

#[derive(Debug, Default)]
struct Found {
    resumes: bool,
    clearable_bytes: u64,
}

/// Looks into a directory that is to receive files.
fn look(
    directory: &Path,
    prefix: &[u8],
    backup: &Backup,
    contents: &Contents,
) -> Result<Found, Error> {
    let refuse = |reason: String| {
        Err(Error::TargetNotEmpty { target: directory.display().to_string(), reason })
    };
    let unreadable = |source| Error::Target { path: directory.display().to_string(), source };
    let mut names = match fs::read_dir(directory) {
        Ok(names) => names.peekable(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::default()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            return refuse("it is not a directory".into());
        }
        Err(error) => return Err(unreadable(error)),
    };
    if names.peek().is_none() {
        return Ok(Found::default());
    }
    match fs::read_to_string(directory.join(MARKER)) {
        Ok(text) if text == marker_text(backup) => {}
        Ok(_) => return refuse("it holds an unfinished restore of another backup".into()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return refuse("it is not empty".into());
        }
        Err(error) => return Err(unreadable(error)),
    }
    let mut found = Found { resumes: true, clearable_bytes: 0 };
    let foreign = walk(directory, prefix, contents, &mut found).map_err(unreadable)?;
    match foreign {
        None => Ok(found),
        Some(path) => refuse(format!("beside an unfinished restore it holds {}", path.display())),
    }
}

/// Finds a name that is not the backup's.
fn walk(
    directory: &Path,
    prefix: &[u8],
    contents: &Contents,
    found: &mut Found,
) -> io::Result<Option<PathBuf>> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == MARKER {
            continue;
        }
        let path = match prefix {
            b"" => name.as_bytes().to_vec(),
            _ => [prefix, name.as_bytes()].join(&b'/'),
        };
        if !contents.has(&path) {
            return Ok(Some(entry.path()));
        }
        // Of the entry itself: links are not followed.
        let metadata = entry.metadata()?;
        found.clearable_bytes += metadata.blocks() * 512;
        if metadata.is_dir()
            && let Some(foreign) = walk(&entry.path(), &path, contents, found)?
        {
            return Ok(Some(foreign));
        }
    }
    Ok(None)
}

/// The file system and the free bytes of the nearest directory that exists.
fn free(directory: &Path) -> Result<(u64, u64), Error> {
    let mut at = directory;
    loop {
        let looked = fs::metadata(at).and_then(|metadata| {
            let space = rustix::fs::statvfs(at).map_err(io::Error::from)?;
            Ok((metadata.dev(), space.f_bavail.saturating_mul(space.f_frsize)))
        });
        match (looked, at.parent()) {
            (Ok(found), _) => return Ok(found),
            (Err(error), Some(parent)) if error.kind() == ErrorKind::NotFound => {
                at = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            }
            (Err(source), _) => {
                return Err(Error::Target { path: at.display().to_string(), source });
            }
        }
    }
}

/// Makes the directory, or empties it when it holds an unfinished restore (which the plan has looked through).
pub(super) fn prepare(directory: &Path, backup: &Backup) -> Result<(), Error> {
    let failed = |source| Error::Target { path: directory.display().to_string(), source };
    fs::create_dir_all(directory).map_err(failed)?;
    let marked = match fs::read_to_string(directory.join(MARKER)) {
        Ok(text) => text == marker_text(backup),
        Err(error) if error.kind() == ErrorKind::NotFound => false,
        Err(error) => return Err(failed(error)),
    };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name() == MARKER {
            continue;
        }
        if !marked {
            return Err(Error::TargetNotEmpty {
                target: directory.display().to_string(),
                reason: "something was put there since the restore was planned".into(),
            });
        }
        // remove_dir_all does not follow links.
        let removed = if entry.file_type().map_err(failed)?.is_dir() {
            fs::remove_dir_all(entry.path())
        } else {
            fs::remove_file(entry.path())
        };
        removed
            .map_err(|source| Error::Target { path: entry.path().display().to_string(), source })?;
    }
    Ok(())
}
