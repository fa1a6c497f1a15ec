//! RabbitMQ, through lapin with its own recovery switched off.
//!
//! Two connections, because a broker that runs out of memory stops reading from those that publish, and with them
//! their acknowledgements: one publishes, the other consumes, declares and settles. Each has a supervisor that
//! connects it again, for ever. Every wait for the broker has a limit.

mod connection;
mod consumer;
mod declare;
mod publisher;
mod table;
mod url;

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lapin::uri::AMQPUri;
use secrecy::SecretString;
use tokio::sync::watch;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use connection::{Connected, Role};
pub(crate) use consumer::{Consumer, Settler};
use publisher::Pool;

use crate::{Declaration, Declared, Depth, Error, Link, Publish, PublishError, Published};

/// How to reach RabbitMQ, and how patient to be.
#[derive(Debug, Clone)]
pub struct RabbitOptions {
    /// `amqp://` or `amqps://user:password@host:port/vhost`.
    pub url: SecretString,
    /// What RabbitMQ's management shows for the connections; ` publish` or ` consume` is appended.
    pub name: String,
    /// PEM of certificate authorities to trust beside the system's.
    pub ca_pem: Option<String>,
    /// The certificate to show to RabbitMQ.
    pub identity: Option<ClientIdentity>,
    /// How long [`Broker::publish`](crate::Broker::publish) may take in all, reconnecting included.
    pub publish_limit: Duration,
    /// How long one try to connect, and one operation on a connection, may take.
    pub answer_limit: Duration,
    /// The longest wait between two tries to connect.
    pub longest_back_off: Duration,
    /// How many messages may be on their way at once; each waits on a channel of its own.
    pub channels: u16,
}

impl RabbitOptions {
    /// The defaults: 5 seconds for everything, a try to connect at least every 5 seconds, 16 channels.
    pub fn new(url: SecretString, name: impl Into<String>) -> Self {
        Self {
            url,
            name: name.into(),
            ca_pem: None,
            identity: None,
            publish_limit: Duration::from_secs(5),
            answer_limit: Duration::from_secs(5),
            longest_back_off: Duration::from_secs(5),
            channels: 16,
        }
    }
}

/// A client certificate.
#[derive(Debug, Clone)]
pub struct ClientIdentity {
    /// PEM of the certificate and what signed it.
    pub certificate_pem: String,
    /// PEM of its key, PKCS#8.
    pub key_pem: SecretString,
}

/// One client of RabbitMQ. Clones are the same client.
#[derive(Clone)]
pub(crate) struct Rabbit {
    owner: Arc<Owner>,
}

impl fmt::Debug for Rabbit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rabbit")
            .field("address", &self.owner.shared.address)
            .finish_non_exhaustive()
    }
}

/// Held by clones, consumers and deliveries; ends everything when the last is gone.
pub(crate) struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

/// What the tasks of one client share.
struct Shared {
    options: RabbitOptions,
    uri: AMQPUri,
    address: String,
    link: watch::Sender<Link>,
    states: Mutex<[State; 2]>,
    connections: [watch::Sender<Option<Arc<Connected>>>; 2],
    remembered: Mutex<Declaration>,
    pool: Pool,
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// How one of the two connections is.
#[derive(Debug, Clone)]
enum State {
    Down(Option<Error>),
    Blocked(String),
    Up,
}

impl Rabbit {
    pub(crate) fn start(options: RabbitOptions) -> Self {
        let parsed = url::parse(&options.url);
        let usable = parsed.is_ok();
        let (uri, last_error) = match parsed {
            Ok(uri) => (uri, None),
            Err(error) => (AMQPUri::default(), Some(error)),
        };
        let shared = Arc::new(Shared {
            address: format!("{}:{}", uri.authority.host, uri.authority.port),
            uri,
            link: watch::Sender::new(Link::Connecting { since: Instant::now(), last_error }),
            states: Mutex::new([State::Down(None), State::Down(None)]),
            connections: [watch::Sender::new(None), watch::Sender::new(None)],
            remembered: Mutex::new(Declaration::default()),
            pool: Pool::new(options.channels),
            stop: CancellationToken::new(),
            tasks: TaskTracker::new(),
            options,
        });
        if usable {
            for role in [Role::Publish, Role::Consume] {
                shared.tasks.spawn(connection::supervise(shared.clone(), role));
            }
        }
        Self { owner: Arc::new(Owner { shared }) }
    }

    pub(crate) fn another(&self, name: &str) -> Self {
        let options = self.owner.shared.options.clone();
        Self::start(RabbitOptions { name: name.to_owned(), ..options })
    }

    pub(crate) fn link(&self) -> watch::Receiver<Link> {
        self.owner.shared.link.subscribe()
    }

    pub(crate) async fn publish(&self, message: Publish) -> Result<Published, PublishError> {
        publisher::publish(&self.owner.shared, message).await
    }

    pub(crate) async fn declare(&self, declarations: &[Declaration]) -> Result<Declared, Error> {
        let shared = &self.owner.shared;
        let mut all = Declaration::default();
        for declaration in declarations {
            all.merge(declaration);
        }
        shared.remember(&all);
        // Looked up after it is remembered: a connection that came in between has repeated it.
        let Some(connected) = shared.connection(Role::Consume) else {
            return shared.open().map(|()| Declared::Later);
        };
        match declare::all(shared, &connected, &all).await {
            Ok(()) => Ok(Declared::Now),
            Err(Error::Unreachable { .. }) => Ok(Declared::Later),
            Err(error) => Err(error),
        }
    }

    pub(crate) fn consume(&self, queue: &str, prefetch: u16) -> Consumer {
        Consumer::start(self.owner.clone(), queue, prefetch)
    }

    pub(crate) async fn depth(&self, queue: &str) -> Result<Option<Depth>, Error> {
        let shared = &self.owner.shared;
        match shared.connection(Role::Consume) {
            Some(connected) => declare::depth(shared, &connected, queue).await,
            None => Err(shared.why_down()),
        }
    }

    pub(crate) async fn close(&self) {
        let shared = &self.owner.shared;
        shared.link.send_replace(Link::Closed);
        shared.stop.cancel();
        shared.tasks.close();
        // The tasks have limits of their own; this one is for those we did not think of.
        if timeout(shared.options.answer_limit, shared.tasks.wait()).await.is_err() {
            tracing::warn!(address = shared.address, "connections were left to end by themselves");
        }
    }
}

impl Shared {
    fn connection(&self, role: Role) -> Option<Arc<Connected>> {
        self.connections[role.index()].borrow().clone()
    }

    fn remember(&self, declaration: &Declaration) {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).merge(declaration);
    }

    fn remembered(&self) -> Declaration {
        self.remembered.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// An error when it was closed.
    fn open(&self) -> Result<(), Error> {
        if self.stop.is_cancelled() { Err(Error::Closed) } else { Ok(()) }
    }

    /// What to say to somebody who needs a connection when there is none.
    fn why_down(&self) -> Error {
        match &*self.link.borrow() {
            Link::Closed => Error::Closed,
            Link::Blocked { reason, .. } => Error::Blocked { reason: reason.clone() },
            Link::Connecting { last_error: Some(error), .. } => error.clone(),
            Link::Connecting { last_error: None, .. } | Link::Up => Error::Unreachable {
                address: self.address.clone(),
                cause: "not connected yet".to_owned(),
            },
        }
    }

    /// Takes note of how one connection is, and tells the link's watchers what follows for the pair.
    fn set_state(&self, role: Role, state: State) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states[role.index()] = state;
        let down = |state: &State| match state {
            State::Down(error) => Some(error.clone()),
            State::Blocked(_) | State::Up => None,
        };
        let [publishing, consuming] = &*states;
        let next = match (down(publishing), down(consuming), publishing) {
            (None, None, State::Blocked(reason)) => {
                Link::Blocked { since: Instant::now(), reason: reason.clone() }
            }
            (None, None, _) => Link::Up,
            (publishing, consuming, _) => Link::Connecting {
                since: Instant::now(),
                last_error: publishing.flatten().or_else(|| consuming.flatten()),
            },
        };
        self.link.send_if_modified(|link| {
            let next = match (&*link, next) {
                (Link::Closed, _) => return false,
                (
                    Link::Connecting { since, last_error: before },
                    Link::Connecting { last_error, .. },
                ) => Link::Connecting {
                    since: *since,
                    last_error: last_error.or_else(|| before.clone()),
                },
                (Link::Blocked { since, .. }, Link::Blocked { reason, .. }) => {
                    Link::Blocked { since: *since, reason }
                }
                (_, next) => next,
            };
            let changed = *link != next;
            *link = next;
            changed
        });
    }

    /// Runs one operation under the limit.
    async fn limited<T>(
        &self,
        doing: &str,
        operation: impl Future<Output = lapin::Result<T>>,
    ) -> Result<T, Error> {
        let limit = self.options.answer_limit;
        match timeout(limit, operation).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(error)) => Err(self.error(doing, &error)),
            Err(_) => Err(Error::NoAnswer { doing: doing.to_owned(), limit }),
        }
    }

    /// A refusal by the broker, or the end of the connection.
    fn error(&self, doing: &str, error: &lapin::Error) -> Error {
        match error.kind() {
            lapin::ErrorKind::ProtocolError(refusal) if error.is_amqp_soft_error() => {
                Error::Refused { doing: doing.to_owned(), cause: refusal.get_message().to_string() }
            }
            _ => Error::Unreachable { address: self.address.clone(), cause: url::cause(error) },
        }
    }
}
