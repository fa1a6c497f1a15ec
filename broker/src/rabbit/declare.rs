//! Making exchanges, queues and bindings exist, one after the other, and saying which one the broker will not have.

use lapin::options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions};
use lapin::protocol::{AMQPErrorKind, AMQPSoftError};
use lapin::types::FieldTable;
use lapin::{Channel, ErrorKind};

use super::Shared;
use super::connection::Connected;
use super::table::{arguments, short};
use crate::{Binding, Declaration, Depth, Error, Exchange, ExchangeKind, Queue};

enum Step<'a> {
    Exchange(&'a Exchange),
    Queue(&'a Queue),
    Binding(&'a Binding),
}

/// Declares everything. A refusal does not keep the rest from being declared; the first one is the error.
pub(super) async fn all(
    shared: &Shared,
    connected: &Connected,
    declaration: &Declaration,
) -> Result<(), Error> {
    let mut first_refusal = None;
    let mut channel: Option<Channel> = None;
    let exchanges = declaration.exchanges.iter().map(Step::Exchange);
    let queues = declaration.queues.iter().map(Step::Queue);
    let bindings = declaration.bindings.iter().map(Step::Binding);
    for step in exchanges.chain(queues).chain(bindings) {
        // A refusal closes the channel it is told on.
        let usable = match channel.take().filter(|channel| channel.status().connected()) {
            Some(channel) => channel,
            None => connected.channel(shared).await?,
        };
        match one(shared, &usable, &step).await {
            Ok(()) => channel = Some(usable),
            Err(error @ (Error::Unreachable { .. } | Error::NoAnswer { .. })) => return Err(error),
            Err(error) => {
                tracing::error!(%error, "RabbitMQ refuses a declaration");
                first_refusal.get_or_insert(error);
            }
        }
    }
    first_refusal.map_or(Ok(()), Err)
}

async fn one(shared: &Shared, channel: &Channel, step: &Step<'_>) -> Result<(), Error> {
    match step {
        Step::Exchange(exchange) => {
            let kind = match exchange.kind {
                ExchangeKind::Direct => lapin::ExchangeKind::Direct,
                ExchangeKind::Fanout => lapin::ExchangeKind::Fanout,
                ExchangeKind::Topic => lapin::ExchangeKind::Topic,
            };
            let options = ExchangeDeclareOptions { durable: true, ..Default::default() };
            let declared = channel.exchange_declare(
                short(&exchange.name)?,
                kind,
                options,
                FieldTable::default(),
            );
            let conflict =
                |error: lapin::Error| conflict("exchange", &exchange.name, &error).ok_or(error);
            limited(shared, &format!("declare exchange {:?}", exchange.name), declared, conflict)
                .await
        }
        Step::Queue(queue) => {
            let options = QueueDeclareOptions::durable();
            let declared = channel.queue_declare(short(&queue.name)?, options, arguments(queue));
            let conflict =
                |error: lapin::Error| conflict("queue", &queue.name, &error).ok_or(error);
            let declared = async { declared.await.map(|_| ()) };
            limited(shared, &format!("declare queue {:?}", queue.name), declared, conflict).await
        }
        Step::Binding(Binding { exchange, queue, routing_key }) => {
            let bound = channel.queue_bind(
                short(queue)?,
                short(exchange)?,
                short(routing_key)?,
                QueueBindOptions::default(),
                FieldTable::default(),
            );
            let doing = format!("bind queue {queue:?} to exchange {exchange:?}");
            limited(shared, &doing, bound, Err).await
        }
    }
}

/// One operation under the limit, with a chance to recognise its error.
async fn limited(
    shared: &Shared,
    doing: &str,
    operation: impl Future<Output = lapin::Result<()>>,
    recognise: impl Fn(lapin::Error) -> Result<Error, lapin::Error>,
) -> Result<(), Error> {
    let limit = shared.options.answer_limit;
    match tokio::time::timeout(limit, operation).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(error)) => Err(recognise(error).unwrap_or_else(|error| shared.error(doing, &error))),
        Err(_) => Err(Error::NoAnswer { doing: doing.to_owned(), limit }),
    }
}

fn conflict(what: &'static str, name: &str, error: &lapin::Error) -> Option<Error> {
    is_soft(error, &AMQPSoftError::PRECONDITIONFAILED).then(|| Error::Conflict {
        what,
        name: name.to_owned(),
        cause: super::url::cause(error),
    })
}

/// Whether the broker refused with this code.
fn is_soft(error: &lapin::Error, code: &AMQPSoftError) -> bool {
    match error.kind() {
        ErrorKind::ProtocolError(error) => {
            matches!(error.kind(), AMQPErrorKind::Soft(soft) if soft == code)
        }
        _ => false,
    }
}

/// Asks for a queue without making one.
pub(super) async fn depth(
    shared: &Shared,
    connected: &Connected,
    queue: &str,
) -> Result<Option<Depth>, Error> {
    let channel = connected.channel(shared).await?;
    let options = QueueDeclareOptions::durable().passive();
    let declared = channel.queue_declare(short(queue)?, options, FieldTable::default());
    let limit = shared.options.answer_limit;
    let doing = format!("ask for queue {queue:?}");
    match tokio::time::timeout(limit, declared).await {
        Ok(Ok(queue)) => {
            Ok(Some(Depth { messages: queue.message_count(), consumers: queue.consumer_count() }))
        }
        Ok(Err(error)) if is_soft(&error, &AMQPSoftError::NOTFOUND) => Ok(None),
        Ok(Err(error)) => Err(shared.error(&doing, &error)),
        Err(_) => Err(Error::NoAnswer { doing, limit }),
    }
}
