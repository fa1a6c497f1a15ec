//! The directories a server's files lie in, remembered to be looked at again: whether they are still the same ones.
//!
//! A file system that is unmounted, or mounted over, while it is being copied leaves files that are simply not there any more,
//! which looks like tables that were dropped. Looks at directories only, and never into one.

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use crate::Error;
use crate::files::Stat;
use crate::process::Result;

/// The data directory, the directory of each tablespace, and directories right below the data directory that lie on
/// another file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// In the order they were met: the data directory comes first.
    places: Vec<Place>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) path: PathBuf,
    device: u64,
    inode: u64,
    /// The server's own directory in a tablespace, which the server may remove while it is copied.
    pub(crate) versioned: Option<String>,
}

impl Roots {
    /// Begins with the data directory. Every `stat` here is that of the directory itself, where `path` is a link to one.
    pub(crate) fn of(path: PathBuf, stat: &Stat) -> Self {
        let mut roots = Self::default();
        roots.remember(path, stat);
        roots
    }

    pub(crate) fn remember(&mut self, path: PathBuf, stat: &Stat) {
        let Stat { device, inode, .. } = *stat;
        self.places.push(Place { path, device, inode, versioned: None });
    }

    /// A tablespace, with the name of the server's own directory in it.
    pub(crate) fn remember_tablespace(&mut self, path: PathBuf, stat: &Stat, versioned: &str) {
        let Stat { device, inode, .. } = *stat;
        self.places.push(Place { path, device, inode, versioned: Some(versioned.to_owned()) });
    }

    /// Whether a directory lies on another file system than the data directory.
    pub(crate) fn is_elsewhere(&self, stat: &Stat) -> bool {
        self.places.first().is_some_and(|root| root.device != stat.device)
    }

    pub(crate) fn places(&self) -> &[Place] {
        &self.places
    }

    /// Looks whether the same directories lie in the same places as when they were scanned. Call it after the last file was
    /// copied. Blocking, a few system calls.
    pub fn verify(&self) -> Result<()> {
        self.places.iter().try_for_each(Place::verify)
    }
}

impl Place {
    fn verify(&self) -> Result<()> {
        let changed = |what: &str| Err(self.changed(what));
        match std::fs::metadata(&self.path) {
            Ok(now) if (now.dev(), now.ino()) == (self.device, self.inode) => Ok(()),
            Ok(_) => changed("another directory was put in its place"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A dropped tablespace takes its link along; the link to an unmounted one stays.
                let is_gone = std::fs::symlink_metadata(&self.path).is_err();
                if self.versioned.is_some() && is_gone { Ok(()) } else { changed("it went away") }
            }
            Err(source) => Err(Error::io("look at", &self.path, source)),
        }
    }

    /// The error for a place that is not what it was.
    pub(crate) fn changed(&self, what: &str) -> Error {
        Error::Shape {
            path: self.path.clone(),
            what: format!(
                "{what} while it was being copied, so that files of it may be missing in the copy"
            ),
            cure: "Mount its file system again and keep it mounted, then take another backup."
                .to_owned(),
        }
    }
}
