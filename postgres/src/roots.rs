//! The directories a server's files lie in, remembered to be looked at again: whether they are still the same ones.
//!
//! A file system that is unmounted, or mounted over, while it is being copied leaves files that are simply not there any more,
//! which looks like tables that were dropped. Looks at directories only, and never into one.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use crate::Error;
use crate::process::Result;

/// The data directory, the directory of each tablespace, and directories right below the data directory that lie on
/// another file system.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Roots {
    /// In the order they were met: the data directory comes first.
    places: Vec<Place>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    path: PathBuf,
    device: u64,
    inode: u64,
    /// Whether the server may remove it while it is copied.
    may_vanish: bool,
}

impl Roots {
    pub(crate) fn of(data_directory: &Path) -> io::Result<Self> {
        let mut roots = Self::default();
        roots.remember(data_directory, &std::fs::metadata(data_directory)?, false);
        Ok(roots)
    }

    /// `metadata` is that of the directory itself, where `path` is a link to one. `may_vanish` says that the server may drop
    /// it, as it does with the links of tablespaces.
    pub(crate) fn remember(&mut self, path: &Path, metadata: &Metadata, may_vanish: bool) {
        let (device, inode) = (metadata.dev(), metadata.ino());
        self.places.push(Place { path: path.to_owned(), device, inode, may_vanish });
    }

    /// Whether a directory lies on another file system than the data directory.
    pub(crate) fn is_elsewhere(&self, metadata: &Metadata) -> bool {
        self.places.first().is_some_and(|root| root.device != metadata.dev())
    }

    /// Looks whether the same directories lie in the same places as when they were scanned. Call it after the last file was
    /// copied. Blocking, a few system calls.
    pub fn verify(&self) -> Result<()> {
        self.places.iter().try_for_each(Place::verify)
    }
}

impl Place {
    fn verify(&self) -> Result<()> {
        let changed = |what: &str| {
            Err(Error::Shape {
                path: self.path.clone(),
                what: format!(
                    "{what} while it was being copied, so that files of it may be missing in the copy"
                ),
                cure: "Mount its file system again and keep it mounted, then take another backup."
                    .to_owned(),
            })
        };
        match std::fs::metadata(&self.path) {
            Ok(now) if (now.dev(), now.ino()) == (self.device, self.inode) => Ok(()),
            Ok(_) => changed("another directory was put in its place"),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A dropped tablespace takes its link along; the link to an unmounted one stays.
                let is_gone = std::fs::symlink_metadata(&self.path).is_err();
                if self.may_vanish && is_gone { Ok(()) } else { changed("it went away") }
            }
            Err(source) => Err(Error::io("look at", &self.path, source)),
        }
    }
}
