//! Between our words and AMQP's tables and properties.

use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable, ShortString};

use crate::{Death, Error, Publish, Queue, QueueKind};

/// AMQP's names have at most 255 bytes.
pub(super) fn short(text: &str) -> Result<ShortString, Error> {
    ShortString::try_new(text).map_err(|_| Error::Refused {
        doing: format!("use the name {:?}…", text.chars().take(40).collect::<String>()),
        cause: "a name in AMQP has at most 255 bytes".to_owned(),
    })
}

pub(super) fn properties(message: &Publish) -> Result<BasicProperties, Error> {
    let mut properties = BasicProperties::default()
        .with_message_id(short(&message.message_id)?)
        .with_type(short(&message.kind)?)
        .with_delivery_mode(if message.persistent { 2 } else { 1 });
    if let Some(milliseconds) = message.expiration_ms {
        properties = properties.with_expiration(short(&milliseconds.to_string())?);
    }
    if !message.headers.is_empty() {
        let mut headers = FieldTable::default();
        for (name, value) in &message.headers {
            headers.insert(short(name)?, AMQPValue::LongString(value.as_str().into()));
        }
        properties = properties.with_headers(headers);
    }
    Ok(properties)
}

/// The fixed arguments of a queue. All of them are understood by RabbitMQ 3.10 and by 4.x.
pub(super) fn arguments(queue: &Queue) -> FieldTable {
    let mut table = FieldTable::default();
    let mut text = |name: &str, value: &str| {
        table.insert(name.into(), AMQPValue::LongString(value.into()));
    };
    // Spelled out: a virtual host may have another default.
    text("x-queue-type", if queue.kind == QueueKind::Classic { "classic" } else { "quorum" });
    if let Some(exchange) = &queue.dead_letter_exchange {
        text("x-dead-letter-exchange", exchange);
    }
    match (&queue.kind, &queue.dead_letter_exchange) {
        (QueueKind::Quorum { .. }, Some(_)) => {
            // A dead letter leaves the queue when the next one has it. Needs reject-publish, or is silently not so.
            text("x-dead-letter-strategy", "at-least-once");
            text("x-overflow", "reject-publish");
        }
        (QueueKind::Classic, _) if queue.max_length.is_some() => text("x-overflow", "drop-head"),
        _ => {}
    }
    let milliseconds =
        |duration: std::time::Duration| i64::try_from(duration.as_millis()).unwrap_or(i64::MAX);
    let delivery_limit = match queue.kind {
        QueueKind::Quorum { delivery_limit } => Some(i64::from(delivery_limit)),
        QueueKind::Classic => None,
    };
    for (name, value) in [
        ("x-delivery-limit", delivery_limit),
        ("x-expires", queue.expires.map(milliseconds)),
        ("x-message-ttl", queue.message_ttl.map(milliseconds)),
        ("x-max-length", queue.max_length.map(i64::from)),
    ] {
        if let Some(value) = value {
            table.insert(name.into(), AMQPValue::LongLongInt(value));
        }
    }
    table
}

/// Headers that are texts, whichever way their sender wrote them.
pub(super) fn texts(headers: &FieldTable) -> Vec<(String, String)> {
    let texts = headers.inner().iter();
    texts.filter_map(|(name, value)| Some((name.to_string(), text(value)?))).collect()
}

/// Where a message died, newest first, as RabbitMQ writes it into `x-death`.
pub(super) fn deaths(headers: &FieldTable) -> Vec<Death> {
    let Some(AMQPValue::FieldArray(deaths)) = headers.inner().get("x-death") else {
        return Vec::new();
    };
    let death = |value: &AMQPValue| {
        let AMQPValue::FieldTable(table) = value else { return None };
        let field = |name: &str| table.inner().get(name);
        let routing_key = match field("routing-keys") {
            Some(AMQPValue::FieldArray(keys)) => keys.as_slice().first().and_then(text),
            _ => None,
        };
        Some(Death {
            queue: field("queue").and_then(text)?,
            reason: field("reason").and_then(text)?,
            count: field("count").and_then(number).unwrap_or(1),
            exchange: field("exchange").and_then(text).unwrap_or_default(),
            routing_key: routing_key.unwrap_or_default(),
        })
    };
    deaths.as_slice().iter().filter_map(death).collect()
}

fn text(value: &AMQPValue) -> Option<String> {
    match value {
        AMQPValue::LongString(text) => Some(String::from_utf8_lossy(text.as_bytes()).into_owned()),
        AMQPValue::ShortString(text) => Some(text.to_string()),
        AMQPValue::ByteArray(bytes) => String::from_utf8(bytes.as_slice().to_vec()).ok(),
        _ => None,
    }
}

fn number(value: &AMQPValue) -> Option<u64> {
    match *value {
        AMQPValue::LongLongInt(number) => u64::try_from(number).ok(),
        AMQPValue::LongInt(number) => u64::try_from(number).ok(),
        AMQPValue::LongUInt(number) => Some(u64::from(number)),
        AMQPValue::ShortInt(number) => u64::try_from(number).ok(),
        AMQPValue::ShortUInt(number) => Some(u64::from(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_however_they_were_written() {
        let mut headers = FieldTable::default();
        headers.insert("a".into(), AMQPValue::LongString("long".into()));
        headers.insert("b".into(), AMQPValue::ShortString("short".into()));
        headers.insert("c".into(), AMQPValue::ByteArray(b"bytes".as_slice().into()));
        headers.insert("d".into(), AMQPValue::LongInt(7));
        let read = texts(&headers);
        let read: Vec<(&str, &str)> = read.iter().map(|(n, v)| (n.as_str(), v.as_str())).collect();
        assert_eq!(read, [("a", "long"), ("b", "short"), ("c", "bytes")]);
    }

    #[test]
    fn a_name_that_is_too_long_is_an_error_not_a_panic() {
        assert!(short(&"x".repeat(255)).is_ok());
        assert!(matches!(short(&"x".repeat(256)), Err(Error::Refused { .. })));
    }
}
