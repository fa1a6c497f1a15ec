//! Understanding the broker's URL, and lapin's errors, without repeating a password.

use std::str::FromStr;

use lapin::uri::AMQPUri;
use secrecy::{ExposeSecret, SecretString};

use crate::Error;

/// Seconds between heartbeats where the URL does not say; a dead peer is noticed after two.
const HEARTBEAT: u16 = 10;

/// What lapin's parser makes of it, with its blind spots mended.
pub(super) fn parse(url: &SecretString) -> Result<AMQPUri, Error> {
    let text = url.expose_secret().trim();
    let wrong = |reason: &str| Error::Url { reason: reason.to_owned() };
    let rest = text
        .strip_prefix("amqp://")
        .or_else(|| text.strip_prefix("amqps://"))
        .ok_or_else(|| wrong("it must begin with amqp:// or amqps://"))?;
    let mut uri = AMQPUri::from_str(text).map_err(|reason| wrong(&reason))?;
    let authority = rest.split(['/', '?', '#']).next().unwrap_or(rest);
    let host = authority.rsplit('@').next().unwrap_or(authority);
    // lapin takes localhost for a host that is missing, and for an IPv6 address.
    if let Some(address) = host.strip_prefix('[').and_then(|host| host.split(']').next()) {
        address.clone_into(&mut uri.authority.host);
    } else if host.is_empty() || host.starts_with(':') {
        return Err(wrong("it names no host"));
    }
    // By the letter "amqp://host/" is the virtual host without a name. Nobody has one.
    if uri.vhost.is_empty() {
        "/".clone_into(&mut uri.vhost);
    }
    uri.query.heartbeat = Some(uri.query.heartbeat.filter(|beat| *beat > 0).unwrap_or(HEARTBEAT));
    Ok(uri)
}

/// What lapin says, without the words around it.
pub(super) fn cause(error: &lapin::Error) -> String {
    match error.kind() {
        lapin::ErrorKind::IOError(error) => error.to_string(),
        lapin::ErrorKind::ProtocolError(error) => error.get_message().to_string(),
        _ => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(url: &str) -> Result<AMQPUri, Error> {
        parse(&SecretString::from(url))
    }

    #[test]
    fn hosts_ports_and_virtual_hosts() {
        for (url, host, port, vhost) in [
            ("amqp://mq.example.org", "mq.example.org", 5672, "/"),
            ("amqps://u:p@mq/", "mq", 5671, "/"),
            ("amqp://u:p@127.0.0.1:25672/%2f", "127.0.0.1", 25672, "/"),
            ("amqp://u:p@127.0.0.1:25672/fleet?heartbeat=5", "127.0.0.1", 25672, "fleet"),
            ("amqp://u:p@[::1]:5673/fleet", "::1", 5673, "fleet"),
            ("amqp://[2001:db8::7]", "2001:db8::7", 5672, "/"),
        ] {
            let uri = parsed(url).expect(url);
            let authority = &uri.authority;
            assert_eq!((authority.host.as_str(), authority.port), (host, port), "{url}");
            assert_eq!(uri.vhost, vhost, "{url}");
        }
    }

    #[test]
    fn heartbeats_cannot_be_switched_off() {
        let beat = |url| parsed(url).expect("a URL").query.heartbeat;
        assert_eq!(beat("amqp://h"), Some(HEARTBEAT));
        assert_eq!(beat("amqp://h?heartbeat=0"), Some(HEARTBEAT));
        assert_eq!(beat("amqp://h?heartbeat=3"), Some(3));
    }

    #[test]
    fn what_is_wrong_is_told_without_the_password() {
        for url in [
            "http://user:hunter2@mq/",
            "user:hunter2@mq",
            "amqp:user:hunter2@mq",
            "amqp://user:hunter2@mq:port/",
            "amqp://user:hunter2@mq/%ff",
            "amqp://user:hunter2@mq/?channel_max=many",
            "amqp://",
            "",
        ] {
            let error = parsed(url).expect_err(url).to_string();
            assert!(error.starts_with("understand the broker's URL: "), "{url}: {error}");
            assert!(!error.contains("hunter2"), "{url}: {error}");
        }
    }
}
