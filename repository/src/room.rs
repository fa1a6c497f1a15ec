//! Whether a store has room for what is to come, where that can be told: a directory's file system knows it, an object store does
//! not.
//!
//! Room that is there now is no promise, since others write meanwhile. Room that is not there is certain, and said before
//! anything is written.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::error::Error;
use crate::repository::Repository;

/// What comes with every backup and every copy: papers, a manifest, what describes the files. None is smaller.
const RESERVE_BYTES: u64 = 1 << 20;

impl Repository {
    /// Refuses what is sure not to fit: `bytes`, and what comes with them. Says what is free, where the store tells.
    pub async fn require_room(&self, bytes: u64) -> Result<Option<u64>, Error> {
        let needed_bytes = bytes.saturating_add(RESERVE_BYTES);
        match self.store.free_bytes().await? {
            Some(free_bytes) if free_bytes < needed_bytes => {
                Err(Error::StoreFull { place: self.describe(), needed_bytes, free_bytes })
            }
            free_bytes => Ok(free_bytes),
        }
    }
}

/// The file system and the free bytes of the nearest directory that exists. One that tells no size is never full.
pub(crate) fn free(directory: &Path) -> io::Result<(u64, u64)> {
    let mut at = directory;
    loop {
        let looked = fs::metadata(at).and_then(|metadata| {
            let space = rustix::fs::statvfs(at)?;
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            Ok((metadata.dev(), if space.f_blocks == 0 { u64::MAX } else { free }))
        });
        match (looked, at.parent()) {
            (Err(error), Some(parent)) if error.kind() == ErrorKind::NotFound => {
                at = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            }
            (looked, _) => return looked,
        }
    }
}
