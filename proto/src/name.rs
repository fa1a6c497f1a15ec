//! Names that people choose. A value of one of these types is valid by construction: it may stand in a queue name,
//! a file name or a label without quoting (database names excepted: those are PostgreSQL's, and are always quoted).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

/// Why a text is not a name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not 1 to 63 characters of `a-z 0-9 - _`, beginning with a letter or digit.
    #[error(
        "use {text:?} as the name of a {what}: 1 to 63 characters of a-z, 0-9, '-' and '_', the first a letter or digit"
    )]
    Plain {
        /// What was to be named.
        what: &'static str,
        /// The text, cut to 80 characters.
        text: String,
    },
    /// Not 1 to 63 bytes without NUL.
    #[error("use {text:?} as the name of a database: 1 to 63 bytes without NUL")]
    Database {
        /// The text, cut to 80 characters.
        text: String,
    },
}

fn plain(text: &str) -> bool {
    let first = text.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let rest =
        text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_".contains(&b));
    first && rest && text.len() <= 63
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident, $what:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
        #[serde(transparent)]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                if plain(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(NameError::Plain { what: $what, text: text.chars().take(80).collect() })
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
            }
        }
    )*};
}

names! {
    /// A PostgreSQL instance as people call it.
    ClusterName, "cluster";
    /// A place with its own job queues.
    SiteName, "site";
    /// A worker process as people call it; unique in the fleet.
    WorkerName, "worker";
}

/// A database inside a cluster: any name PostgreSQL allows. Never part of a path, a command line or SQL text unquoted.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
#[serde(transparent)]
pub struct DatabaseName(String);

impl DatabaseName {
    /// The name as text, unquoted.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DatabaseName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > 63 || text.contains('\0') {
            return Err(NameError::Database { text: text.chars().take(80).collect() });
        }
        Ok(Self(text.to_owned()))
    }
}

impl fmt::Display for DatabaseName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for DatabaseName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_break_a_queue_a_path_or_a_label_are_refused() {
        for bad in [
            "",
            "-a",
            "_a",
            "a.b",
            "a/b",
            "A",
            "a b",
            "ä",
            "a\n",
            "../x",
            "#",
            "*",
            &"a".repeat(64),
        ] {
            assert!(bad.parse::<ClusterName>().is_err(), "{bad:?}");
        }
        for good in ["a", "0", "orders-eu", "orders_2", &"a".repeat(63)] {
            assert_eq!(good.parse::<SiteName>().unwrap().as_str(), good);
        }
    }

    #[test]
    fn database_names_may_hold_every_odd_character_but_nul() {
        assert!("a'b\"c; drop --\n".parse::<DatabaseName>().is_ok());
        assert!("a\0b".parse::<DatabaseName>().is_err());
        assert!("é".repeat(32).parse::<DatabaseName>().is_err());
    }
}
