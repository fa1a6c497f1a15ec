//! What differs between the two databases: how a transaction begins, how the leader's row is held, which errors pass.
//! Everything else is one SQL text.

use sqlx::{AnyConnection, Error};

/// Which database holds the catalog.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialect {
    Sqlite,
    Postgres,
}

impl Dialect {
    pub(crate) fn of_url(url: &str) -> Option<Self> {
        match url.split_once(':')?.0 {
            "sqlite" => Some(Self::Sqlite),
            "postgres" | "postgresql" => Some(Self::Postgres),
            _ => None,
        }
    }

    /// Settings of a new connection.
    pub(crate) fn set_up(self) -> &'static [&'static str] {
        match self {
            // The writer-ahead log lets readers go on while one writes; FULL keeps what was committed over a power cut.
            Self::Sqlite => &[
                "PRAGMA busy_timeout = 5000",
                "PRAGMA journal_mode = WAL",
                "PRAGMA synchronous = FULL",
            ],
            Self::Postgres => &[
                "SET lock_timeout = '10s'",
                "SET statement_timeout = '30s'",
                "SET idle_in_transaction_session_timeout = '30s'",
            ],
        }
    }

    /// How a transaction that may write begins. SQLite must take its write lock at once: a reader that becomes a
    /// writer is refused without waiting.
    pub(crate) fn begin(self) -> &'static str {
        match self {
            Self::Sqlite => "BEGIN IMMEDIATE",
            Self::Postgres => "BEGIN ISOLATION LEVEL SERIALIZABLE",
        }
    }

    /// Reads the leader's row so that no other coordinator can take over before this transaction ends.
    pub(crate) fn hold_leader(self) -> &'static str {
        match self {
            Self::Sqlite => {
                "-- hold_leader
                 SELECT epoch FROM leader WHERE id = 1 AND epoch = $1"
            }
            Self::Postgres => {
                "-- hold_leader
                 SELECT epoch FROM leader WHERE id = 1 AND epoch = $1 FOR UPDATE"
            }
        }
    }

    /// Whether the same transaction may succeed when it is run again from its beginning.
    pub(crate) fn is_passing(self, error: &Error) -> bool {
        let Error::Database(database) = error else {
            return matches!(error, Error::PoolTimedOut);
        };
        let code = database.code().unwrap_or_default();
        match self {
            // SQLITE_BUSY and SQLITE_LOCKED, with any extension in the higher bits.
            Self::Sqlite => code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 5 | 6)),
            // Serialisation failure, deadlock, lock not available.
            Self::Postgres => matches!(&*code, "40001" | "40P01" | "55P03"),
        }
    }

    /// Whether it is the values themselves that the database refuses, whenever they are written.
    pub(crate) fn is_lasting(self, error: &Error) -> bool {
        let Error::Database(database) = error else {
            return matches!(error, Error::Encode(_) | Error::ColumnDecode { .. });
        };
        let code = database.code().unwrap_or_default();
        match self {
            // SQLITE_TOOBIG, SQLITE_CONSTRAINT, SQLITE_MISMATCH.
            Self::Sqlite => code.parse::<u32>().is_ok_and(|code| matches!(code & 0xff, 18..=20)),
            // Data exceptions (a NUL in a text is one), violated constraints, too large.
            Self::Postgres => ["22", "23", "54"].iter().any(|class| code.starts_with(class)),
        }
    }
}

/// Applies the settings of a new connection.
pub(crate) async fn set_up(dialect: Dialect, connection: &mut AnyConnection) -> Result<(), Error> {
    for statement in dialect.set_up() {
        sqlx::query(*statement).execute(&mut *connection).await?;
    }
    Ok(())
}
