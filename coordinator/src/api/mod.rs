//! The HTTP API: over a Unix socket, where the file's permission is the authentication, and over TCP with tokens.
//!
//! Handlers translate; deciding is done elsewhere. Errors are a [`Failure`] as JSON with a status code, without
//! internals.

mod access;
pub(crate) mod enrol;
mod routes;
pub(crate) mod serve;
pub mod types;
pub(crate) mod view;

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use proto::failure::{Action, Code, Failure};

use crate::error::Error;

/// An error as the API tells it.
#[derive(Debug)]
pub(crate) struct ApiError(Failure);

pub(crate) type ApiResult<T> = Result<T, ApiError>;

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        Self(failure)
    }
}

impl From<Error> for ApiError {
    fn from(error: Error) -> Self {
        if !matches!(error, Error::Refused(_)) {
            tracing::error!("Failed to {}", telemetry::redact::scrub_error(&error));
        }
        Self(Failure::from(&error))
    }
}

impl ApiError {
    /// The request itself is wrong.
    pub(crate) fn invalid(text: impl Into<String>) -> Self {
        Self(Failure::new(Code::RequestInvalid, Action::Abandon, text))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (status(self.0.code), Json(self.0)).into_response()
    }
}

/// The status code of a failure.
fn status(code: Code) -> StatusCode {
    match code {
        Code::RequestInvalid | Code::ConfigInvalid => StatusCode::BAD_REQUEST,
        Code::Unauthorized => StatusCode::UNAUTHORIZED,
        Code::NotAllowed => StatusCode::FORBIDDEN,
        Code::ClusterUnknown | Code::JobUnknown | Code::BackupUnknown | Code::WorkerUnknown => {
            StatusCode::NOT_FOUND
        }
        Code::StateConflict => StatusCode::CONFLICT,
        Code::CatalogUnavailable | Code::BrokerUnreachable => StatusCode::SERVICE_UNAVAILABLE,
        _ => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

/// Bytes as lowercase hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        text.push(char::from_digit(u32::from(byte >> 4), 16).unwrap_or('0'));
        text.push(char::from_digit(u32::from(byte & 15), 16).unwrap_or('0'));
        text
    })
}
