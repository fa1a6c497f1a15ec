//! A private directory with a short path, for what a server and this program put beside a data directory while they work on it: the
//! path of a socket has some 100 bytes. Whoever dies leaves his, and the next one removes it.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

const ROOT: &str = "/tmp";
/// One that has an owner.
const OWNED: &str = "pgmuster-run-";
/// One that has none yet, and is nobody's to remove.
const NEW: &str = "pgmuster-new-";
/// Locked for as long as the owner lives.
const OWNER: &str = "owner";

/// The directory, which goes with this value.
#[derive(Debug)]
pub struct ShortPlace {
    path: PathBuf,
    owner: File,
}

impl ShortPlace {
    /// Makes one, and removes those of this user whose owners died. Blocking.
    pub fn make() -> io::Result<Self> {
        Self::sweep();
        let private = fs::Permissions::from_mode(0o700);
        let made = tempfile::Builder::new().prefix(NEW).permissions(private).tempdir_in(ROOT)?;
        let owner = File::create_new(made.path().join(OWNER))?;
        flock(&owner, FlockOperation::NonBlockingLockExclusive)?;
        let name = made.path().file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = name.trim_start_matches(NEW);
        let path = Path::new(ROOT).join(format!("{OWNED}{name}"));
        fs::rename(made.path(), &path)?;
        let _ = made.keep();
        Ok(Self { path, owner })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes those of this user whose owners died. Blocking; may be done by several at once.
    pub fn sweep() {
        let user = rustix::process::geteuid().as_raw();
        for entry in fs::read_dir(ROOT).into_iter().flatten().flatten() {
            let path = entry.path();
            let is_one = entry.file_name().to_string_lossy().starts_with(OWNED)
                && entry.metadata().is_ok_and(|found| found.is_dir() && found.uid() == user);
            let Some(owner) = is_one.then(|| File::open(path.join(OWNER)).ok()).flatten() else {
                continue;
            };
            if flock(&owner, FlockOperation::NonBlockingLockExclusive).is_ok() {
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

impl Drop for ShortPlace {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
        let _ = flock(&self.owner, FlockOperation::Unlock);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_dead_owner_left_goes_and_a_living_ones_stays() {
        let living = ShortPlace::make().unwrap();
        assert_eq!(fs::metadata(living.path()).unwrap().permissions().mode() & 0o777, 0o700);
        let dead = std::mem::ManuallyDrop::new(ShortPlace::make().unwrap());
        let (left, owner) = (&dead.path, &dead.owner);
        fs::write(left.join("wal.sock"), "").unwrap();
        ShortPlace::sweep();
        assert!(left.exists() && living.path().exists());
        // As the end of its process does.
        flock(owner, FlockOperation::Unlock).unwrap();
        ShortPlace::sweep();
        assert!(!left.exists() && living.path().exists());
        let path = living.path().to_owned();
        drop(living);
        assert!(!path.exists());
    }
}
