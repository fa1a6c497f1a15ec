//! Sending, one message at a time on each channel.
//!
//! lapin attaches a returned message to whichever confirmation comes next, so with two mandatory messages under way
//! on one channel it may accuse the wrong one. With one under way there is no other; the id is compared all the same.

use std::sync::{Arc, Mutex, PoisonError};

use lapin::options::{BasicPublishOptions, ConfirmSelectOptions};
use lapin::{Channel, Confirmation, ErrorKind};
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout_at};

use super::connection::{Connected, Role};
use super::{Shared, table};
use crate::{Error, Link, Publish, PublishError, Published};

/// Channels in confirm mode that wait for work.
pub(super) struct Pool {
    permits: Semaphore,
    idle: Mutex<Vec<Pooled>>,
}

struct Pooled {
    channel: Channel,
    of: Arc<Connected>,
}

impl Pool {
    pub(super) fn new(channels: u16) -> Self {
        Self { permits: Semaphore::new(usize::from(channels.max(1))), idle: Mutex::new(Vec::new()) }
    }

    pub(super) fn clear(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn take(&self) -> Option<Pooled> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()
    }

    fn give_back(&self, pooled: Pooled) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(pooled);
    }
}

pub(super) async fn publish(shared: &Shared, message: Publish) -> Result<Published, PublishError> {
    let limit = shared.options.publish_limit;
    let deadline = Instant::now() + limit;
    let id = message.message_id.as_str();
    let not_sent = |cause| PublishError::not_sent(id, cause);
    let unknown = |cause| PublishError::unknown(id, cause);

    let properties = table::properties(&message).map_err(not_sent)?;
    let exchange = table::short(&message.exchange).map_err(not_sent)?;
    let routing_key = table::short(&message.routing_key).map_err(not_sent)?;
    let Ok(prepared) = timeout_at(deadline, prepare(shared)).await else {
        let cause = match shared.why_down() {
            Error::Unreachable { .. } if shared.link.borrow().is_up() => {
                Error::NoAnswer { doing: "get a free channel".to_owned(), limit }
            }
            cause => cause,
        };
        return Err(not_sent(cause));
    };
    let (_permit, pooled) = prepared.map_err(not_sent)?;

    let options = BasicPublishOptions { mandatory: message.mandatory, immediate: false };
    let sending =
        pooled.channel.basic_publish(exchange, routing_key, options, &message.body, properties);
    // From here on every way out but the good ones drops the channel, which closes it: whatever is still under way
    // on it cannot be taken for somebody else's.
    let doing = "confirm a message";
    let confirmation = match timeout_at(deadline, async { sending.await?.await }).await {
        Ok(Ok(confirmation)) => confirmation,
        Ok(Err(error)) => {
            let cause = shared.error(doing, &error);
            // Nothing but this message is under way here: a channel that the broker closes was closed for it
            // (no such exchange, no right, too large), and it was not taken.
            let unsent = matches!(error.kind(), ErrorKind::InvalidChannelState(_, "basic.publish"));
            let certain = unsent || error.is_amqp_soft_error();
            return Err(if certain { not_sent(cause) } else { unknown(cause) });
        }
        Err(_) => return Err(unknown(Error::NoAnswer { doing: doing.to_owned(), limit })),
    };
    let odd = |cause: &str| Error::Refused { doing: doing.to_owned(), cause: cause.to_owned() };
    let published = match confirmation {
        Confirmation::Ack(None) => Published::Routed,
        Confirmation::Ack(Some(returned)) => {
            let returned_id = returned.properties.message_id().as_ref();
            if returned_id.is_none_or(|returned_id| returned_id.as_str() != id) {
                return Err(unknown(odd("another message was returned")));
            }
            Published::Unroutable
        }
        Confirmation::Nack(_) => return Err(unknown(odd("RabbitMQ could not take it"))),
        Confirmation::NotRequested => return Err(unknown(odd("confirm mode is off"))),
    };
    shared.pool.give_back(pooled);
    Ok(published)
}

/// Waits for a usable link and a turn, and finds or opens a channel.
async fn prepare(shared: &Shared) -> Result<(tokio::sync::SemaphorePermit<'_>, Pooled), Error> {
    let permit = shared.pool.permits.acquire().await.map_err(|_| Error::Closed)?;
    let mut link = shared.link.subscribe();
    loop {
        let up = link.wait_for(|link| matches!(link, Link::Up | Link::Closed)).await;
        if !up.is_ok_and(|link| link.is_up()) {
            return Err(Error::Closed);
        }
        let Some(connected) = shared.connection(Role::Publish) else {
            // It went down this very moment, and the link is about to say so.
            tokio::task::yield_now().await;
            continue;
        };
        while let Some(pooled) = shared.pool.take() {
            if pooled.of.is(&connected) && pooled.channel.status().connected() {
                return Ok((permit, pooled));
            }
        }
        match open(shared, &connected).await {
            Ok(channel) => return Ok((permit, Pooled { channel, of: connected })),
            Err(error) => {
                tracing::debug!(%error, "no channel to publish on");
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        }
    }
}

async fn open(shared: &Shared, connected: &Connected) -> Result<Channel, Error> {
    let channel = connected.channel(shared).await?;
    let select = channel.confirm_select(ConfirmSelectOptions::default());
    shared.limited("switch confirmations on", select).await?;
    Ok(channel)
}
