//! What stops a maintenance job as a whole. What concerns one table is a reason in the outcome, not an error.

use proto::{Action, Code, Failure};

/// Why maintenance of a database could not be done.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server refused a statement of ours, or is gone.
    #[error(transparent)]
    Server(#[from] postgres::Error),
    /// A standby cannot be maintained: it follows its primary.
    #[error("{what}: the server is a standby")]
    Standby {
        /// What was to be done.
        what: &'static str,
    },
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        match error {
            Error::Server(error) => error.into(),
            Error::Standby { .. } => {
                Self::new(Code::StateConflict, Action::RetryElsewhere, error.to_string()).with_hint(
                    "Maintain the primary; its standbys receive the result with the WAL.",
                )
            }
        }
    }
}
