//! One of the two connections: made, watched, and made again.

use std::net::{Shutdown, TcpStream};
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use lapin::protocol::{AMQPErrorKind, AMQPHardError, AMQPSoftError};
use lapin::tcp::{OwnedIdentity, OwnedTLSConfig};
use lapin::uri::AMQPScheme;
use lapin::{AsyncTcpStream, Channel, Connection, ConnectionProperties, ErrorKind, Event};
use secrecy::ExposeSecret;
use tokio::time::{Instant, timeout};

use super::{Shared, State, declare, url};
use crate::chance::back_off;
use crate::{Declaration, Error};

/// The wait after the first failure.
const FIRST_BACK_OFF: Duration = Duration::from_millis(100);
/// A connection that held this long was a good one: the next failure is a first one.
const HELD: Duration = Duration::from_secs(10);
/// How often to look whether lapin thinks the connection is gone, in case it did not say so.
const LOOK: Duration = Duration::from_millis(500);
/// How long to wait for a polite end.
const FAREWELL: Duration = Duration::from_secs(1);

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Publish,
    Consume,
}

impl Role {
    pub(super) fn index(self) -> usize {
        match self {
            Self::Publish => 0,
            Self::Consume => 1,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Publish => "publish",
            Self::Consume => "consume",
        }
    }
}

/// A connection that was good when it was made.
pub(super) struct Connected {
    connection: Connection,
    socket: Socket,
}

/// A second handle on the connection's socket. lapin waits without limit for a peer that is there and does not
/// answer, in a thread of its own; closing the socket under it is what ends that.
#[derive(Clone, Default)]
struct Socket(Arc<Mutex<Option<TcpStream>>>);

impl Socket {
    fn set(&self, socket: TcpStream) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(socket);
    }

    fn shut(&self) {
        if let Some(socket) = self.0.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // An error says that it is shut already.
            let _: std::io::Result<()> = socket.shutdown(Shutdown::Both);
        }
    }
}

impl Connected {
    pub(super) async fn channel(&self, shared: &Shared) -> Result<Channel, Error> {
        shared.limited("open a channel", self.connection.create_channel()).await
    }

    /// Whether it is the very same connection.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.socket.0, &other.socket.0)
    }

    async fn end(&self) {
        // Without an answer in time, or on a connection that is gone, the socket is shut all the same.
        let _: Result<lapin::Result<()>, _> =
            timeout(FAREWELL, self.connection.close(200, "OK".into())).await;
        self.socket.shut();
    }
}

/// Keeps one connection up until the client ends.
pub(super) async fn supervise(shared: Arc<Shared>, role: Role) {
    let mut failures = 0;
    while !shared.stop.is_cancelled() {
        let opened = tokio::select! {
            biased;
            () = shared.stop.cancelled() => return,
            opened = open(&shared, role) => opened,
        };
        let error = match opened {
            Ok(connected) => {
                let since = Instant::now();
                let error = serve(&shared, role, Arc::new(connected)).await;
                if since.elapsed() > HELD {
                    failures = 0;
                }
                error
            }
            Err(error) => error,
        };
        if shared.stop.is_cancelled() {
            return;
        }
        tracing::warn!(%error, role = role.as_str(), failures, "the link to RabbitMQ is down");
        shared.set_state(role, State::Down(Some(error)));
        let wait = back_off(failures, FIRST_BACK_OFF, shared.options.longest_back_off);
        failures = failures.saturating_add(1);
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Uses a connection until it ends; why it did.
async fn serve(shared: &Arc<Shared>, role: Role, connected: Arc<Connected>) -> Error {
    // The one listener: lapin deals events out to listeners in turn, it does not repeat them.
    let mut events = Box::pin(connected.connection.events_listener());
    if role == Role::Consume
        && let Err(error) = declare_remembered(shared, &connected).await
    {
        connected.end().await;
        return error;
    }
    shared.connections[role.index()].send_replace(Some(connected.clone()));
    tracing::info!(role = role.as_str(), address = shared.address, "connected to RabbitMQ");
    let mut reason = String::new();
    let mut last_words = None;
    let mut look = tokio::time::interval(LOOK);
    while connected.connection.status().connected() && !shared.stop.is_cancelled() {
        let blocked = connected.connection.status().blocked();
        shared.set_state(role, if blocked { State::Blocked(reason.clone()) } else { State::Up });
        tokio::select! {
            biased;
            () = shared.stop.cancelled() => {}
            event = events.next() => match event {
                Some(Event::ConnectionBlocked(why)) => {
                    tracing::warn!(reason = why, role = role.as_str(), "RabbitMQ blocks publishers");
                    reason = why;
                }
                Some(Event::Error(error)) => {
                    last_words = Some(error);
                    look.tick().await;
                }
                Some(_) => {}
                None => break,
            },
            _ = look.tick() => {}
        }
    }
    shared.connections[role.index()].send_replace(None);
    shared.pool.clear();
    // What it said last may still lie in the stream.
    while last_words.is_none()
        && let Ok(Some(event)) = timeout(Duration::from_millis(10), events.next()).await
    {
        if let Event::Error(error) = event {
            last_words = Some(error);
        }
    }
    connected.end().await;
    Error::Unreachable {
        address: shared.address.clone(),
        cause: last_words
            .map_or_else(|| "the connection ended".to_owned(), |error| url::cause(&error)),
    }
}

/// Repeats all declarations, those included that come in while it does. A refusal is logged and does not keep the
/// link down: the rest may work.
async fn declare_remembered(shared: &Shared, connected: &Connected) -> Result<(), Error> {
    let mut done = Declaration::default();
    loop {
        let wanted = shared.remembered();
        if wanted == done {
            return Ok(());
        }
        match declare::all(shared, connected, &wanted).await {
            Err(error @ (Error::Unreachable { .. } | Error::NoAnswer { .. })) => return Err(error),
            Err(_) | Ok(()) => done = wanted,
        }
    }
}

async fn open(shared: &Shared, role: Role) -> Result<Connected, Error> {
    let limit = shared.options.answer_limit;
    let socket = Socket::default();
    match timeout(limit, connect(shared, role, socket.clone())).await {
        Ok(Ok(connection)) => Ok(Connected { connection, socket }),
        Ok(Err(error)) => {
            socket.shut();
            Err(refusal(shared, &error))
        }
        Err(_) => {
            socket.shut();
            let cause = format!("no answer within {limit:?}");
            Err(Error::Unreachable { address: shared.address.clone(), cause })
        }
    }
}

async fn connect(shared: &Shared, role: Role, socket: Socket) -> lapin::Result<Connection> {
    let options = &shared.options;
    let name = format!("{} {}", options.name, role.as_str());
    let properties = ConnectionProperties::default().with_connection_name(name.as_str().into());
    let tls = OwnedTLSConfig {
        identity: options.identity.as_ref().map(|identity| OwnedIdentity::PKCS8 {
            pem: identity.certificate_pem.clone().into_bytes(),
            key: identity.key_pem.expose_secret().as_bytes().to_vec(),
        }),
        cert_chain: options.ca_pem.clone(),
    };
    let limit = options.answer_limit;
    let runtime = lapin::runtime::default_runtime()?;
    let timed_out = || std::io::Error::from(std::io::ErrorKind::TimedOut);
    Connection::connector(
        shared.uri.clone(),
        runtime,
        // Called on lapin's own thread, which would wait as long as the kernel does.
        async move |uri, runtime| {
            let connected = async {
                let host = uri.authority.host.as_str();
                let addresses: Vec<_> =
                    tokio::net::lookup_host((host, uri.authority.port)).await?.collect();
                let stream = AsyncTcpStream::connect(&runtime, addresses).await?;
                if let AsyncTcpStream::Plain(plain) = &stream {
                    socket.set(TcpStream::from(plain.get_ref().as_fd().try_clone_to_owned()?));
                }
                match uri.scheme {
                    AMQPScheme::AMQP => Ok(stream),
                    AMQPScheme::AMQPS => stream.into_tls(host, tls.as_ref()).await,
                }
            };
            timeout(limit, connected).await.map_err(|_| timed_out())?.map_err(lapin::Error::from)
        },
        properties,
    )
    .await
}

/// Why RabbitMQ would not have us.
fn refusal(shared: &Shared, error: &lapin::Error) -> Error {
    let address = shared.address.clone();
    let cause = url::cause(error);
    let kind = match error.kind() {
        ErrorKind::ProtocolError(error) => Some(error.kind()),
        _ => None,
    };
    match kind {
        Some(AMQPErrorKind::Soft(AMQPSoftError::ACCESSREFUSED)) => {
            let user = shared.uri.authority.userinfo.username.clone();
            Error::LoginRefused { address, user, cause }
        }
        Some(AMQPErrorKind::Hard(AMQPHardError::NOTALLOWED)) => {
            Error::VirtualHost { address, vhost: shared.uri.vhost.clone(), cause }
        }
        _ => Error::Unreachable { address, cause },
    }
}
