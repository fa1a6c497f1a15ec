//! Reading columns, and writing values, the same way everywhere.

use std::fmt::Display;
use std::str::FromStr;

use serde::Serialize;
use serde::de::DeserializeOwned;
use sqlx::Row as _;
use sqlx::any::AnyRow;

use crate::error::{Error, Result};

/// Every query error, before its transaction's name is known.
impl From<sqlx::Error> for Error {
    fn from(source: sqlx::Error) -> Self {
        Self::Catalog { doing: "read", source }
    }
}

/// A row whose columns are read by name into the types of the program.
pub(crate) struct Row(pub(crate) AnyRow);

impl Row {
    pub(super) fn stored(
        &self,
        column: &'static str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Error {
        let called = ["id", "name"].iter().find_map(|key| self.0.try_get(*key).ok());
        let row = called.unwrap_or_else(|| "a row".to_owned());
        Error::Stored { column, row, source: Box::new(source) }
    }

    pub(crate) fn text(&self, column: &'static str) -> Result<String> {
        self.0.try_get(column).map_err(|source| self.stored(column, source))
    }

    pub(crate) fn maybe_text(&self, column: &'static str) -> Result<Option<String>> {
        self.0.try_get(column).map_err(|source| self.stored(column, source))
    }

    pub(crate) fn number(&self, column: &'static str) -> Result<i64> {
        self.0.try_get(column).map_err(|source| self.stored(column, source))
    }

    pub(crate) fn maybe_number(&self, column: &'static str) -> Result<Option<i64>> {
        self.0.try_get(column).map_err(|source| self.stored(column, source))
    }

    pub(crate) fn flag(&self, column: &'static str) -> Result<bool> {
        Ok(self.number(column)? != 0)
    }

    pub(crate) fn parsed<T>(&self, column: &'static str) -> Result<T>
    where
        T: FromStr,
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        self.text(column)?.parse().map_err(|source: T::Err| self.stored(column, source))
    }

    pub(crate) fn maybe_parsed<T>(&self, column: &'static str) -> Result<Option<T>>
    where
        T: FromStr,
        T::Err: std::error::Error + Send + Sync + 'static,
    {
        let text = self.maybe_text(column)?;
        text.map(|text| text.parse())
            .transpose()
            .map_err(|source: T::Err| self.stored(column, source))
    }

    pub(crate) fn json<T: DeserializeOwned>(&self, column: &'static str) -> Result<T> {
        serde_json::from_str(&self.text(column)?).map_err(|source| self.stored(column, source))
    }

    pub(crate) fn maybe_json<T: DeserializeOwned>(
        &self,
        column: &'static str,
    ) -> Result<Option<T>> {
        let text = self.maybe_text(column)?;
        text.map(|text| serde_json::from_str(&text))
            .transpose()
            .map_err(|source| self.stored(column, source))
    }
}

/// A value as JSON text.
pub(crate) fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).expect("values of the program serialise to JSON")
}

/// A value as JSON text, or NULL.
pub(crate) fn maybe_json<T: Serialize>(value: Option<&T>) -> Option<String> {
    value.map(json)
}

/// A value as text, or NULL.
pub(crate) fn maybe_text<T: Display>(value: Option<&T>) -> Option<String> {
    value.map(ToString::to_string)
}
