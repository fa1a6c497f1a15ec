//! References to secrets: configuration says where a secret is, never what it is.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

/// Where a secret is: `file:/path`, `env:NAME` or `exec:/program arg …` (split at spaces, no shell).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretRef {
    /// The file's content without its last line break.
    File(String),
    /// The value of an environment variable.
    Env(String),
    /// What a program prints, without its last line break: program and arguments.
    Exec(Vec<String>),
}

/// A text that is no reference. The text itself is not repeated: it may be the secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "read a reference to a secret: write file:/path, env:NAME or exec:/program, never the secret itself"
)]
pub struct SecretRefError;

impl FromStr for SecretRef {
    type Err = SecretRefError;

    fn from_str(text: &str) -> Result<Self, SecretRefError> {
        match text.split_once(':') {
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.to_owned())),
            Some(("env", name)) if !name.is_empty() => Ok(Self::Env(name.to_owned())),
            Some(("exec", command)) if command.starts_with('/') => {
                Ok(Self::Exec(command.split_whitespace().map(str::to_owned).collect()))
            }
            _ => Err(SecretRefError),
        }
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => write!(f, "file:{path}"),
            Self::Env(name) => write!(f, "env:{name}"),
            Self::Exec(words) => write!(f, "exec:{}", words.join(" ")),
        }
    }
}

impl Serialize for SecretRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for SecretRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_written_in_place_is_refused_and_not_repeated() {
        let error = "hunter2".parse::<SecretRef>().unwrap_err();
        assert!(!error.to_string().contains("hunter2"));
        assert!("exec:relative".parse::<SecretRef>().is_err());
        for good in ["file:/k", "env:KEY", "exec:/bin/cat /k"] {
            assert_eq!(good.parse::<SecretRef>().unwrap().to_string(), good);
        }
    }
}
