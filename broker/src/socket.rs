//! A Unix socket that is its owner's alone, for what this process answers on its own host: the coordinator's API, the WAL
//! service. Deliberately not here: what is said over it.

use std::fs::Permissions;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

/// A socket in its place.
#[derive(Debug)]
pub struct PrivateSocket {
    /// Who connects is taken here.
    pub listener: UnixListener,
    /// Of the socket: another process may take the place later.
    pub inode: u64,
}

impl PrivateSocket {
    /// Binds a socket that nobody else can open, not even for a moment: it is made in a private directory and moved into place.
    ///
    /// What a dead process left there is replaced. A socket that somebody listens on ([`io::ErrorKind::AddrInUse`]) and
    /// anything that is no socket ([`io::ErrorKind::AlreadyExists`]) are not touched. Must be called inside a tokio runtime.
    pub async fn bind(path: &Path) -> io::Result<Self> {
        if UnixStream::connect(path).await.is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "another process answers there"));
        }
        match std::fs::symlink_metadata(path) {
            Ok(there) if !there.file_type().is_socket() => {
                let what = "a file lies there that is no socket";
                return Err(io::Error::new(io::ErrorKind::AlreadyExists, what));
            }
            _ => {}
        }
        let parent = path.parent().unwrap_or(Path::new("/"));
        // Mode 0700, which the socket inside inherits no matter what the umask is. A short name, as the path of a socket is.
        let private = tempfile::Builder::new().prefix(".").rand_bytes(3).tempdir_in(parent)?;
        let inside = private.path().join("s");
        let listener = UnixListener::bind(&inside)?;
        std::fs::set_permissions(&inside, Permissions::from_mode(0o600))?;
        let inode = std::fs::metadata(&inside)?.ino();
        std::fs::rename(&inside, path)?;
        Ok(Self { listener, inode })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_what_a_dead_process_left_is_replaced() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("s.sock");
        let first = PrivateSocket::bind(&path).await.unwrap();
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let taken = PrivateSocket::bind(&path).await.unwrap_err();
        assert_eq!(taken.kind(), io::ErrorKind::AddrInUse);
        drop(first);
        let second = PrivateSocket::bind(&path).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().ino(), second.inode);
        let left: Vec<_> = std::fs::read_dir(place.path()).unwrap().collect();
        assert_eq!(left.len(), 1, "{left:?}");
    }

    #[tokio::test]
    async fn what_is_no_socket_is_left_alone() {
        let place = tempfile::tempdir().unwrap();
        let (file, link) = (place.path().join("precious"), place.path().join("link"));
        std::fs::write(&file, "precious").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        for path in [&file, &link, &place.path().to_owned()] {
            let refused = PrivateSocket::bind(path).await.unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists, "{}", path.display());
        }
        assert_eq!(std::fs::read_to_string(&file).unwrap(), "precious");
        assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    }
}
