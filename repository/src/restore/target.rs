//! Looking before leaping: what a backup's entries ask for, and what is where they would go.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::marker::{MARKER, MARKER_DRAFT, Unfinished};
use super::tree::{Tree, split};
use super::{Existing, Foreign, Place, RestorePlan, RestoreTarget};
use crate::entry::{Body, Entry, check_path, path_order};
use crate::error::{Error, show};
use crate::key::KeyFile;
use crate::layout;
use crate::reader::Backup;
use crate::room;
use crate::stop::Stop;

/// What a restore asks for, and what is there already.
#[derive(Debug)]
pub(super) struct Survey {
    pub(super) files: u64,
    pub(super) directories: u64,
    pub(super) bytes: u64,
    pub(super) places: Vec<Place>,
    pub(super) resumes: bool,
    /// Every name of the backup, when something is there to be compared with it.
    pub(super) reuses: Option<Contents>,
    pub(super) foreign: Vec<Foreign>,
}

/// Looks at what is asked for and at what is there. While another restore writes there, nobody can say.
pub(super) fn survey(
    backup: &Backup,
    target: &RestoreTarget,
    stop: &Stop,
) -> Result<Survey, Error> {
    let quiet = || target.roots().try_for_each(|(_, directory)| Tree::must_be_free(directory));
    quiet()?;
    // One that began meanwhile makes names come and go.
    see(backup, target, stop).or_else(|error| quiet().and(Err(error)))
}

fn see(backup: &Backup, target: &RestoreTarget, stop: &Stop) -> Result<Survey, Error> {
    for (path, elsewhere) in &target.mapping {
        check_path(path).map_err(|reason| Error::entry(path, reason))?;
        if !elsewhere.is_absolute() {
            return Err(Error::entry(
                path,
                format!("it is mapped to {}, which is not absolute", elsewhere.display()),
            ));
        }
    }
    super::places::require_apart(target, backup.repository.store.directory())?;
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
        places: Vec::new(),
        resumes: false,
        reuses: None,
        foreign: Vec::new(),
    };
    let mut is_anything_there = false;
    for (prefix, directory) in target.roots() {
        let mut found = look(directory, prefix, backup, target, Some(&contents))?;
        survey.resumes |= found.resumes;
        is_anything_there |= found.resumes || found.is_anything_there;
        survey.foreign.append(&mut found.foreign);
        let needed_bytes = contents.bytes.get(prefix).copied().unwrap_or(0);
        let (device, free_bytes) = room::free(directory)
            .map_err(|source| Error::Target { path: directory.display().to_string(), source })?;
        survey.places.push(Place {
            directory: directory.to_owned(),
            needed_bytes,
            available_bytes: free_bytes.saturating_add(found.held_bytes),
            device,
        });
    }
    if is_anything_there {
        survey.reuses = Some(contents);
    }
    Ok(survey)
}

/// Looks again, when nobody else can write any more, whether the target is what the plan found.
pub(super) fn look_again(planned: &RestorePlan) -> Result<(), Error> {
    let (backup, target) = (&planned.backup, &planned.target);
    let known: HashSet<&[u8]> = planned.foreign.iter().map(|foreign| &*foreign.name).collect();
    for (prefix, directory) in target.roots() {
        let found = look(directory, prefix, backup, target, planned.reuses.as_deref())?;
        let news = found.foreign.iter().find(|foreign| !known.contains(&*foreign.name));
        let emptied = planned.reuses.is_none() && (found.is_anything_there || found.resumes);
        if news.is_some() || emptied {
            let what = news.map_or("something".to_owned(), |new| new.path.display().to_string());
            return Err(Error::TargetNotEmpty {
                target: directory.display().to_string(),
                reason: format!("{what} was put there since the restore was planned"),
            });
        }
    }
    Ok(())
}

/// Every name of the backup: for telling ours from others', and for refusing what cannot be a tree.
#[derive(Debug, Default)]
pub(super) struct Contents {
    files: u64,
    directories: HashSet<Vec<u8>>,
    /// By their hashes: there may be millions of files.
    others: HashSet<NameHash>,
    /// Bytes by the mapped directory they go to; the empty path is the target itself.
    bytes: HashMap<Vec<u8>, u64>,
}

/// Stands for a path. No two have ever been found to have the same.
type NameHash = [u8; 16];

fn name_hash(path: &[u8]) -> NameHash {
    let mut hash = NameHash::default();
    blake3::Hasher::new().update(path).finalize_xof().fill(&mut hash);
    hash
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
        if entry.path == MARKER.as_bytes() || entry.path == MARKER_DRAFT.as_bytes() {
            return refuse("it has the name of the marker");
        }
        let fresh = match &entry.body {
            Body::Directory => self.directories.insert(entry.path.clone()),
            Body::Symlink { .. } => self.others.insert(name_hash(&entry.path)),
            Body::File(file) => {
                self.files += 1;
                *self.bytes.entry(place_of(&entry.path, target)).or_default() += file.size_bytes;
                self.others.insert(name_hash(&entry.path))
            }
        };
        if fresh { Ok(()) } else { refuse("it is there twice") }
    }

    /// Whether a directory, or something else, is what the backup has under a name.
    fn has(&self, path: &[u8], is_directory: bool) -> bool {
        if is_directory {
            self.directories.contains(path)
        } else {
            self.others.contains(&name_hash(path))
        }
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
    /// An unfinished restore of this backup; where everything may be replaced, of any.
    resumes: bool,
    is_anything_there: bool,
    /// Room taken by what is there and will be used again, or given back.
    held_bytes: u64,
    foreign: Vec<Foreign>,
}

/// Looks into a directory that is to receive files, and refuses what must not be touched.
fn look(
    directory: &Path,
    prefix: &[u8],
    backup: &Backup,
    target: &RestoreTarget,
    contents: Option<&Contents>,
) -> Result<Found, Error> {
    let refuse = |reason: String| {
        Err(Error::TargetNotEmpty { target: directory.display().to_string(), reason })
    };
    let failed = |source| Error::Target { path: directory.display().to_string(), source };
    let metadata = match fs::metadata(directory) {
        Ok(metadata) if metadata.is_dir() => metadata,
        Ok(_) => return refuse("it is not a directory".into()),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::default()),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            return refuse("it is not a directory".into());
        }
        Err(error) => return Err(failed(error)),
    };
    let marker = Unfinished::find(directory)?;
    let ours = marker == Some(Some(Unfinished::of(backup)));
    if !ours && matches!(target.existing, Existing::Resume) {
        if marker.is_some() {
            return refuse("it holds an unfinished restore of another backup".into());
        }
        let mut names = fs::read_dir(directory).map_err(failed)?;
        // A marker that was not finished is the first thing that is ever written.
        let alien =
            names.find(|name| !matches!(name, Ok(name) if name.file_name() == MARKER_DRAFT));
        return if alien.is_some() {
            refuse("it is not empty".into())
        } else {
            Ok(Found::default())
        };
    }
    refuse_precious(directory, directory, &metadata)?;
    let device = metadata.dev();
    let mut walk = Look { target, contents, found: Found::default() };
    walk.found.resumes = marker.is_some();
    walk.directory(directory, prefix, device)?;
    walk.found.foreign.sort_by(|a, b| path_order(&a.name, &b.name));
    match walk.found.foreign.first() {
        Some(foreign) if matches!(target.existing, Existing::Resume) => {
            refuse(format!("beside an unfinished restore it holds {}", foreign.path.display()))
        }
        _ => Ok(walk.found),
    }
}

/// A walk through what is there. Links are not followed.
struct Look<'a> {
    target: &'a RestoreTarget,
    contents: Option<&'a Contents>,
    found: Found,
}

impl Look<'_> {
    fn directory(&mut self, directory: &Path, prefix: &[u8], device: u64) -> Result<(), Error> {
        for found in names(directory)? {
            let (name, place, metadata) = what_is(directory, found)?;
            if [MARKER, MARKER_DRAFT].iter().any(|marker| name == marker.as_bytes()) {
                continue;
            }
            let path = match prefix {
                b"" => name,
                _ => [prefix, &name].join(&b'/'),
            };
            if self.target.spares(&path) || self.is_beside(prefix, &path) {
                continue;
            }
            self.found.is_anything_there = true;
            // Of a file with a second name elsewhere, nothing is given back.
            if metadata.nlink() == 1 || metadata.is_dir() {
                self.found.held_bytes += metadata.blocks() * 512;
            }
            let is_directory = metadata.is_dir();
            // Where a mapped directory is in the backup, there is a link to it.
            let belongs = if self.target.mapping.contains_key(&path) {
                !is_directory
            } else {
                self.contents.is_some_and(|contents| contents.has(&path, is_directory))
            };
            if !belongs && self.target.adds(&path) {
                continue;
            }
            if !belongs {
                refuse_precious(directory, &place, &metadata)?;
                let bytes = if is_directory { 0 } else { metadata.len() };
                let mut foreign = Foreign { name: path, path: place.clone(), names: 1, bytes };
                if is_directory {
                    self.weigh(&place, device, &mut foreign)?;
                }
                self.found.foreign.push(foreign);
            } else if is_directory {
                self.directory(&place, &path, metadata.dev())?;
            }
        }
        Ok(())
    }

    /// Whether a name stands beside the backup's in a directory that others may use too: the directory of a tablespace holds one
    /// directory for each version of the server, and those of other clusters are nobody's to remove.
    fn is_beside(&self, prefix: &[u8], path: &[u8]) -> bool {
        matches!(self.target.existing, Existing::Replace { .. })
            && self.target.mapping.contains_key(prefix)
            && !self
                .contents
                .is_some_and(|contents| contents.has(path, true) || contents.has(path, false))
    }

    /// Counts what is in a foreign directory. Another file system in it is nothing that a restore may empty.
    fn weigh(&mut self, directory: &Path, device: u64, into: &mut Foreign) -> Result<(), Error> {
        let its_device = fs::symlink_metadata(directory).map(|metadata| metadata.dev());
        let failed = |source| Error::Target { path: directory.display().to_string(), source };
        if its_device.map_err(failed)? != device {
            return Err(Error::TargetNotEmpty {
                target: directory.display().to_string(),
                reason: "another file system is mounted there, and it is not in the backup".into(),
            });
        }
        for found in names(directory)? {
            let (_, place, metadata) = what_is(directory, found)?;
            refuse_precious(directory, &place, &metadata)?;
            into.names += 1;
            if metadata.nlink() == 1 {
                self.found.held_bytes += metadata.blocks() * 512;
            }
            if metadata.is_dir() {
                self.weigh(&place, device, into)?;
            } else {
                into.bytes += metadata.len();
            }
        }
        Ok(())
    }
}

/// Refuses what a restore would remove, and nobody could bring back: a repository, whichever it is and under whatever name it
/// is mounted there, and the key of one.
fn refuse_precious(target: &Path, place: &Path, metadata: &fs::Metadata) -> Result<(), Error> {
    let what = if metadata.is_dir() {
        layout::is_repository(place).then_some("the repository")
    } else if metadata.is_file() {
        KeyFile::is_in(place, metadata.len()).then_some("the key of a repository")
    } else {
        None
    };
    what.map_or(Ok(()), |what| {
        Err(Error::TargetPrecious {
            target: target.display().to_string(),
            what: format!("{what} {}", place.display()),
        })
    })
}

/// What is in a directory, in no order.
fn names(directory: &Path) -> Result<fs::ReadDir, Error> {
    fs::read_dir(directory)
        .map_err(|source| Error::Target { path: directory.display().to_string(), source })
}

/// A name that was found in a directory, where it is, what it is itself.
fn what_is(
    directory: &Path,
    found: io::Result<fs::DirEntry>,
) -> Result<(Vec<u8>, PathBuf, fs::Metadata), Error> {
    let failed = |source| Error::Target { path: directory.display().to_string(), source };
    let found = found.map_err(failed)?;
    let metadata = found.metadata().map_err(failed)?;
    Ok((found.file_name().into_vec(), found.path(), metadata))
}
