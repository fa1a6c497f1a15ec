//! What can go wrong in the coordinator, and how it is told to whoever asked.

use std::io;

use proto::failure::{Action, Code, Failure, chain};

/// A failure of the coordinator itself.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The catalog's database refused or did not answer.
    #[error("{doing} in the catalog")]
    Catalog {
        /// The transaction or query.
        doing: &'static str,
        /// What the database said. Holds no connection string.
        #[source]
        source: sqlx::Error,
    },
    /// The catalog's tables cannot be brought to this program's version, or are newer.
    #[error("bring the catalog to this version of pgmuster")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    /// The URL of the catalog is neither `sqlite:` nor `postgres:`.
    #[error("use this URL as a catalog: it must begin with sqlite: or postgres:")]
    CatalogUrl,
    /// A stored value is not what this program wrote.
    #[error("read column {column} of {row} in the catalog")]
    Stored {
        /// The column.
        column: &'static str,
        /// The id or the name of its row, where that can be read.
        row: String,
        /// Why not.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// Another coordinator leads now: this one's decision was not written.
    #[error("write as the leader of epoch {epoch}: another coordinator leads")]
    StaleEpoch {
        /// The epoch that is over.
        epoch: i64,
    },
    /// The request cannot be fulfilled; nothing was changed.
    #[error(transparent)]
    Refused(#[from] Failure),
    /// A socket cannot be opened.
    #[error("listen on {place}")]
    Listen {
        /// The socket or address.
        place: String,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The configuration is wrong.
    #[error("use the configuration: {}", .0.join("; "))]
    Config(Vec<String>),
}

/// The result of whatever may fail in the coordinator.
pub type Result<T> = std::result::Result<T, Error>;

impl From<&Error> for Failure {
    fn from(error: &Error) -> Self {
        match error {
            Error::Refused(failure) => failure.clone(),
            Error::Catalog { .. } | Error::Migrate(_) => {
                let text = format!("failed to {}", chain(error));
                Failure::new(Code::CatalogUnavailable, Action::Retry, text)
                    .with_hint("Check the catalog's database and its disk; nothing was lost, the request may be repeated.")
            }
            Error::StaleEpoch { .. } => {
                Failure::new(Code::StateConflict, Action::Retry, format!("failed to {error}"))
            }
            Error::Listen { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                let text = format!("failed to {}", chain(error));
                Failure::new(Code::StateConflict, Action::FixConfig, text).with_hint(
                    "What listens there goes on. Stop it first, or give this coordinator another place: listen.socket and listen.tcp of its configuration.",
                )
            }
            Error::CatalogUrl | Error::Listen { .. } | Error::Config(_) => Failure::new(
                Code::ConfigInvalid,
                Action::FixConfig,
                format!("failed to {}", chain(error)),
            ),
            Error::Stored { .. } => Failure::bug(format!("failed to {}", chain(error))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_where_somebody_listens_is_a_conflict_and_no_wrong_configuration() {
        let told = |kind: io::ErrorKind| {
            let (place, source) = ("/run/pgmuster/coordinator.sock".to_owned(), kind.into());
            Failure::from(&Error::Listen { place, source })
        };
        let taken = told(io::ErrorKind::AddrInUse);
        assert_eq!((taken.code, taken.hint.is_empty()), (Code::StateConflict, false), "{taken}");
        assert_eq!(told(io::ErrorKind::NotFound).code, Code::ConfigInvalid);
    }
}
