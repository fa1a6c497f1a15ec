//! What goes wrong between us and the broker. Texts hold addresses and names, never a password.

use std::time::Duration;

use proto::{Action, Code, Failure};

/// Why something did not work. Comparable and cloneable, because the link keeps the last one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The URL is not one. The text does not repeat it: it may hold a password.
    #[error("understand the broker's URL: {reason}")]
    Url {
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody answers there, or the connection ended.
    #[error("reach RabbitMQ at {address}: {cause}")]
    Unreachable {
        /// Host and port.
        address: String,
        /// What the network or RabbitMQ said.
        cause: String,
    },
    /// Wrong user or password.
    #[error("log in to RabbitMQ at {address} as {user}: {cause}")]
    LoginRefused {
        /// Host and port.
        address: String,
        /// The user.
        user: String,
        /// What RabbitMQ said.
        cause: String,
    },
    /// No such virtual host, or no right to use it.
    #[error("open virtual host {vhost:?} of RabbitMQ at {address}: {cause}")]
    VirtualHost {
        /// Host and port.
        address: String,
        /// The virtual host.
        vhost: String,
        /// What RabbitMQ said.
        cause: String,
    },
    /// An exchange or queue of that name exists with other settings.
    #[error("declare {what} {name:?}, which exists with other settings: {cause}")]
    Conflict {
        /// `queue` or `exchange`.
        what: &'static str,
        /// Its name.
        name: String,
        /// What RabbitMQ said: which setting differs.
        cause: String,
    },
    /// The broker refused an operation for another reason.
    #[error("{doing}: {cause}")]
    Refused {
        /// What was to be done.
        doing: String,
        /// What the broker said.
        cause: String,
    },
    /// No answer in time.
    #[error("{doing} within {limit:?}")]
    NoAnswer {
        /// What was to be done.
        doing: String,
        /// The limit.
        limit: Duration,
    },
    /// The broker takes no messages for now.
    #[error("send while RabbitMQ blocks publishers: {reason}")]
    Blocked {
        /// What it says.
        reason: String,
    },
    /// The broker was closed by its owner.
    #[error("use a link that was closed")]
    Closed,
}

/// Why a message may not have arrived. Either way the same message may be sent again under the same id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    /// It certainly did not arrive.
    #[error("send message {message_id}")]
    NotSent {
        /// The message.
        message_id: String,
        /// Why.
        #[source]
        cause: Error,
    },
    /// It may have arrived: the answer got lost, came too late, or was a refusal by one of several queues.
    #[error("learn whether message {message_id} arrived")]
    Unknown {
        /// The message.
        message_id: String,
        /// Why.
        #[source]
        cause: Error,
    },
}

impl PublishError {
    pub(crate) fn not_sent(message_id: &str, cause: Error) -> Self {
        Self::NotSent { message_id: message_id.to_owned(), cause }
    }

    pub(crate) fn unknown(message_id: &str, cause: Error) -> Self {
        Self::Unknown { message_id: message_id.to_owned(), cause }
    }

    /// Why.
    pub fn cause(&self) -> &Error {
        match self {
            Self::NotSent { cause, .. } | Self::Unknown { cause, .. } => cause,
        }
    }
}

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        let failure = |code, action, hint: String| {
            Self::new(code, action, format!("failed to {error}")).with_hint(hint)
        };
        match error {
            Error::Url { .. } => failure(
                Code::BrokerUnreachable,
                Action::FixConfig,
                "Set the broker's URL like amqps://user:password@rabbit.example.org/vhost.".to_owned(),
            ),
            Error::Unreachable { address, .. } => failure(
                Code::BrokerUnreachable,
                Action::Retry,
                format!("Check that RabbitMQ runs and that this host reaches {address}; we keep trying."),
            ),
            Error::LoginRefused { user, .. } => failure(
                Code::BrokerUnreachable,
                Action::FixConfig,
                format!(
                    "Check user and password: rabbitmqctl authenticate_user {user}. RabbitMQ lets guest in from \
                     its own host only."
                ),
            ),
            Error::VirtualHost { vhost, .. } => failure(
                Code::BrokerUnreachable,
                Action::FixConfig,
                format!(
                    "Create it and grant it: rabbitmqctl add_vhost {vhost}; rabbitmqctl set_permissions -p {vhost} \
                     USER '.*' '.*' '.*'."
                ),
            ),
            Error::Conflict { what, name, .. } => failure(
                Code::BrokerTopology,
                Action::FixConfig,
                match *what {
                    "queue" => format!(
                        "Remove it while it is empty, then restart pgmuster: rabbitmqctl delete_queue {name} \
                         --if-empty."
                    ),
                    _ => format!(
                        "Remove it, then restart pgmuster: rabbitmqadmin delete exchange name={name}."
                    ),
                },
            ),
            Error::Refused { .. } => failure(
                Code::BrokerTopology,
                Action::FixConfig,
                "Check the user's permissions on the virtual host: rabbitmqctl list_permissions -p VHOST.".to_owned(),
            ),
            Error::NoAnswer { .. } => failure(
                Code::BrokerUnreachable,
                Action::Retry,
                "Check RabbitMQ's log and load; we keep trying.".to_owned(),
            ),
            Error::Blocked { .. } => failure(
                Code::BrokerUnreachable,
                Action::Retry,
                "Give RabbitMQ memory or disk space: rabbitmqctl status names the alarm.".to_owned(),
            ),
            Error::Closed => failure(
                Code::BrokerUnreachable,
                Action::Retry,
                "This process is shutting down.".to_owned(),
            ),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::from(&error)
    }
}

impl From<PublishError> for Failure {
    fn from(error: PublishError) -> Self {
        let mut failure = Self::from(error.cause());
        failure.message = format!("failed to {}", proto::failure::chain(&error));
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conflict_names_the_queue_and_the_cure() {
        let failure = Failure::from(Error::Conflict {
            what: "queue",
            name: "pgmuster.pulse".to_owned(),
            cause: "inequivalent arg 'x-message-ttl'".to_owned(),
        });
        assert_eq!((failure.code, failure.action), (Code::BrokerTopology, Action::FixConfig));
        assert!(failure.message.contains("\"pgmuster.pulse\""), "{failure:?}");
        assert!(failure.hint.contains("delete_queue pgmuster.pulse"), "{failure:?}");
    }

    #[test]
    fn a_publish_error_tells_message_and_cause() {
        let cause = Error::Unreachable {
            address: "mq:5672".to_owned(),
            cause: "connection refused".to_owned(),
        };
        let failure = Failure::from(PublishError::not_sent("m-1", cause));
        assert_eq!(
            failure.message,
            "failed to send message m-1: reach RabbitMQ at mq:5672: connection refused"
        );
        assert!(failure.hint.contains("mq:5672"), "{failure:?}");
    }
}
