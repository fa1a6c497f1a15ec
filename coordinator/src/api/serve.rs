//! The sockets of the API.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use axum::middleware;
use broker::PrivateSocket;
use tokio::net::TcpListener;
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
        let bound = PrivateSocket::bind(path).await;
        let listener = bound.map_err(|source| Error::Listen { place, source })?.listener;
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
