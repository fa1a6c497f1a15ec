//! The sockets of the API.

use std::fs::Permissions;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::middleware;
use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{access, routes};
use crate::core::Core;
use crate::error::{Error, Result};

/// Opens what the configuration asks for, and answers where.
pub(crate) async fn open(
    core: &Arc<Core>,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<(Option<PathBuf>, Option<SocketAddr>)> {
    let listen = &core.config.listen;
    if let Some(path) = &listen.socket {
        let place = path.display().to_string();
        let listener =
            bind_private(path).await.map_err(|source| Error::Listen { place, source })?;
        let router = routes::router()
            .layer(middleware::from_fn(access::over_socket))
            .with_state(Arc::clone(core));
        let over = stop.clone().cancelled_owned();
        tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(over).await {
                tracing::error!("Failed to serve the API's socket: {error}");
            }
        });
    }
    let mut address = None;
    if let Some(tcp) = listen.tcp {
        let failed = |source| Error::Listen { place: tcp.to_string(), source };
        let listener = TcpListener::bind(tcp).await.map_err(failed)?;
        address = Some(listener.local_addr().map_err(failed)?);
        let router = routes::router()
            .layer(middleware::from_fn_with_state(Arc::clone(core), access::over_tcp))
            .with_state(Arc::clone(core));
        let over = stop.clone().cancelled_owned();
        tasks.spawn(async move {
            if let Err(error) = axum::serve(listener, router).with_graceful_shutdown(over).await {
                tracing::error!("Failed to serve the API's address: {error}");
            }
        });
    }
    Ok((listen.socket.clone(), address))
}

/// Binds a socket that nobody else can open, not even for a moment: it is made in a private directory and moved into
/// place. A socket that somebody listens on is not replaced; one that a dead process left behind is.
async fn bind_private(path: &Path) -> io::Result<UnixListener> {
    if UnixStream::connect(path).await.is_ok() {
        return Err(io::Error::new(io::ErrorKind::AddrInUse, "another coordinator listens there"));
    }
    let parent = path.parent().unwrap_or(Path::new("/"));
    // Mode 0700, which the socket inside inherits no matter what the umask is.
    let private = tempfile::Builder::new().prefix(".").tempdir_in(parent)?;
    let inside = private.path().join("s");
    let listener = UnixListener::bind(&inside)?;
    std::fs::set_permissions(&inside, Permissions::from_mode(0o600))?;
    std::fs::rename(&inside, path)?;
    Ok(listener)
}
