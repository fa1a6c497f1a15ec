//! Which databases: names with `*` and `?`.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, de::Error as _};

use crate::DatabaseName;

/// A database's name, in which `*` stands for any characters and `?` for one.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct DatabasePattern(String);

/// Why a text is no [`DatabasePattern`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("use {0:?} as a pattern of databases: 1 to 255 bytes without NUL, at most 8 of them `*`")]
pub struct PatternError(String);

/// Stars in a pattern: each may multiply the time of a match.
const STARS_MAX: usize = 8;

impl DatabasePattern {
    /// Whether it fits a name.
    pub fn fits(&self, name: &DatabaseName) -> bool {
        let pattern: Vec<char> = self.0.chars().collect();
        let name: Vec<char> = name.as_str().chars().collect();
        fits(&pattern, &name)
    }

    /// Whether it can fit one name only.
    pub fn is_plain(&self) -> bool {
        !self.0.contains(['*', '?'])
    }

    /// The pattern as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn fits(pattern: &[char], name: &[char]) -> bool {
    match pattern.split_first() {
        None => name.is_empty(),
        Some(('*', rest)) => (0..=name.len()).any(|skipped| fits(rest, &name[skipped..])),
        Some((first, rest)) => name
            .split_first()
            .is_some_and(|(next, name)| (*first == '?' || first == next) && fits(rest, name)),
    }
}

impl FromStr for DatabasePattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        let stars = text.chars().filter(|&c| c == '*').count();
        if (1..=255).contains(&text.len()) && !text.contains('\0') && stars <= STARS_MAX {
            Ok(Self(text.to_owned()))
        } else {
            Err(PatternError(text.chars().take(80).collect()))
        }
    }
}

impl fmt::Display for DatabasePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl<'de> Deserialize<'de> for DatabasePattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_fits_whole_names() {
        for (pattern, name, expected) in [
            ("shop", "shop", true),
            ("shop", "shop2", false),
            ("shop?", "shop\u{e9}", true),
            ("shop*", "shop", true),
            ("*_test", "a_test_test", true),
            ("*_test", "a_test_", false),
            ("a*b*c", "a-b-b-c", true),
            ("[a]", "a", false),
            ("Shop", "shop", false),
        ] {
            let parsed: DatabasePattern = pattern.parse().unwrap();
            assert_eq!(parsed.fits(&name.parse().unwrap()), expected, "{pattern} and {name}");
        }
        assert!("*".repeat(9).parse::<DatabasePattern>().is_err());
        assert!(
            "".parse::<DatabasePattern>().is_err() && "a\0".parse::<DatabasePattern>().is_err()
        );
    }
}
