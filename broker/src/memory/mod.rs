//! The in-process twin: what RabbitMQ does with our messages, as far as our protocol can see it.
//!
//! Everything happens under one lock and at once; time is tokio's, so a test may pause it. It keeps nothing on disk,
//! knows no users, and delivers in the order RabbitMQ would on an idle node.

mod consumer;
mod faults;
mod hub;
mod route;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;

pub(crate) use consumer::{Consumer, Settler};
pub use faults::MemoryFaults;
use hub::{ClientId, Hub};

use crate::{Declaration, Declared, Depth, Error, Link, Publish, PublishError, Published};

/// How long a publisher waits for a link that is cut or blocked.
const PUBLISH_LIMIT: Duration = Duration::from_secs(5);

/// One client of an in-process broker. Clones are the same client.
#[derive(Clone)]
pub(crate) struct Memory {
    client: Arc<Client>,
}

/// Leaves the hub when the last clone, consumer and delivery are gone.
pub(crate) struct Client {
    hub: Arc<Hub>,
    id: ClientId,
    link: watch::Sender<Link>,
}

impl fmt::Debug for Memory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("client", &self.client.id).finish_non_exhaustive()
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.hub.leave(self.id);
    }
}

impl Memory {
    pub(crate) fn new() -> Self {
        Self::join(Arc::new(Hub::default()))
    }

    pub(crate) fn another(&self) -> Self {
        Self::join(self.client.hub.clone())
    }

    fn join(hub: Arc<Hub>) -> Self {
        let id = hub.join();
        Self { client: Arc::new(Client { hub, id, link: watch::Sender::new(Link::Up) }) }
    }

    pub(crate) fn link(&self) -> watch::Receiver<Link> {
        self.client.link.subscribe()
    }

    pub(crate) async fn publish(&self, message: Publish) -> Result<Published, PublishError> {
        let mut link = self.link();
        let id = message.message_id.clone();
        let usable =
            timeout(PUBLISH_LIMIT, link.wait_for(|link| matches!(link, Link::Up | Link::Closed)))
                .await;
        match usable {
            Ok(Ok(link)) if link.is_up() => {}
            Ok(_) => return Err(PublishError::not_sent(&id, Error::Closed)),
            Err(_) => {
                let cause = match &*self.link().borrow() {
                    Link::Blocked { reason, .. } => Error::Blocked { reason: reason.clone() },
                    Link::Connecting { last_error: Some(error), .. } => error.clone(),
                    _ => Error::NoAnswer { doing: "get a link".to_owned(), limit: PUBLISH_LIMIT },
                };
                return Err(PublishError::not_sent(&id, cause));
            }
        }
        self.client.hub.publish(self.client.id, message)
    }

    pub(crate) fn declare(&self, declarations: &[Declaration]) -> Result<Declared, Error> {
        let mut all = Declaration::default();
        for declaration in declarations {
            all.merge(declaration);
        }
        self.client.hub.declare(self.client.id, &all)
    }

    pub(crate) fn consume(&self, queue: &str, prefetch: u16) -> Consumer {
        Consumer::new(self.client.clone(), queue, prefetch)
    }

    pub(crate) fn depth(&self, queue: &str) -> Result<Option<Depth>, Error> {
        match &*self.client.link.borrow() {
            Link::Up | Link::Blocked { .. } => Ok(self.client.hub.depth(queue)),
            Link::Connecting { last_error: Some(error), .. } => Err(error.clone()),
            Link::Connecting { .. } | Link::Closed => Err(Error::Closed),
        }
    }

    pub(crate) fn close(&self) {
        self.client.hub.cut(self.client.id);
        self.client.link.send_replace(Link::Closed);
        self.client.hub.wake_consumers(self.client.id);
    }

    pub(crate) fn faults(&self) -> MemoryFaults {
        MemoryFaults::new(self.client.clone())
    }
}
