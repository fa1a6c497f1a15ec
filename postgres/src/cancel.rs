//! Cancels what a session is doing, and knows when the server has dealt with that.
//!
//! The protocol does not name the statement that a request is meant for: a request that arrives late ends whatever runs then.
//! The server closes the connection of a request once it has passed it on, so that is what is waited for, as libpq does.

use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;
use tokio_postgres::CancelToken;
use tokio_postgres::tls::MakeTlsConnect;
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::error::{During as _, Error};

/// How long a request may take, from its connection to the server's last word.
const CANCELLING: Duration = Duration::from_secs(2);

/// Where the one server of a session is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    /// A Unix socket.
    Socket(PathBuf),
    /// A host by the name its certificate has, and where to find it.
    Tcp { name: String, host: String, port: u16 },
}

/// Cancels the running statement of a session, over a connection of its own with the same TLS settings.
#[derive(Clone)]
pub struct Canceller {
    token: CancelToken,
    tls: MakeRustlsConnect,
    address: Option<Address>,
}

impl Canceller {
    /// `address` is `None` when the session's server is one of several.
    pub(crate) fn new(
        token: CancelToken,
        tls: MakeRustlsConnect,
        address: Option<Address>,
    ) -> Self {
        Self { token, tls, address }
    }

    /// Asks the server to cancel what the session is doing. Success says that the server has passed the request on, not that
    /// anything was cancelled: a statement that begins after that is safe from it. Where a name or a list of hosts stands for
    /// several servers, success says only that the request was sent.
    pub async fn cancel(&self) -> Result<(), Error> {
        let what = "cancel a statement";
        match timeout(CANCELLING, self.request()).await {
            Ok(outcome) => outcome.during(what),
            Err(_) => Err(Error::Deadline { what: what.to_owned() }),
        }
    }

    async fn request(&self) -> Result<(), tokio_postgres::Error> {
        match &self.address {
            Some(Address::Socket(path)) => {
                if let Ok(stream) = UnixStream::connect(path).await {
                    return self.request_over(stream, "").await;
                }
            }
            Some(Address::Tcp { name, host, port }) => {
                // One of several addresses might be another server, so that is left to the driver, which remembers.
                if let Ok(addresses) = tokio::net::lookup_host((host.as_str(), *port)).await
                    && let [address] = addresses.collect::<Vec<_>>()[..]
                    && let Ok(stream) = TcpStream::connect(address).await
                {
                    return self.request_over(stream, name).await;
                }
            }
            None => {}
        }
        self.token.cancel_query(self.tls.clone()).await
    }

    async fn request_over<S>(&self, stream: S, name: &str) -> Result<(), tokio_postgres::Error>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let mut tls = self.tls.clone();
        let Ok(connect) = MakeTlsConnect::<ToTheEnd<S>>::make_tls_connect(&mut tls, name);
        self.token.cancel_query_raw(ToTheEnd { stream, is_shut: false }, connect).await
    }
}

/// A connection whose shutting down lasts until the other side has closed it too.
struct ToTheEnd<S> {
    stream: S,
    is_shut: bool,
}

impl<S: AsyncRead + Unpin> AsyncRead for ToTheEnd<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for ToTheEnd<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.is_shut {
            // A server that has closed already has nothing left to say either.
            let _ = ready!(Pin::new(&mut self.stream).poll_shutdown(cx));
            self.is_shut = true;
        }
        let mut space = [0; 256];
        loop {
            let mut buffer = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buffer)) {
                Ok(()) if !buffer.filled().is_empty() => {}
                // However it ends: the request was sent, and the server is done with it.
                Ok(()) | Err(_) => return Poll::Ready(Ok(())),
            }
        }
    }
}
