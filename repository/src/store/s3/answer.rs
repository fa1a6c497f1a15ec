//! What an S3 server answered when it did not do what it was asked, in words of ours: classified once, and flattened to
//! text that holds neither a secret nor an SDK type.

use std::error::Error;
use std::fmt;
use std::time::SystemTime;

use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::primitives::{DateTime, DateTimeFormat};

use super::{READ, SIZE};
use crate::store::StoreError;

/// S3's codes for a request whose bytes were changed on the way.
pub(super) const GARBLED: [&str; 2] = ["BadDigest", "XAmzContentSHA256Mismatch"];

/// The longest text taken from a server.
const TEXT_CHARS: usize = 300;

/// A refusal, a failure, or that nothing came back.
#[derive(Debug, Clone)]
pub(super) struct Answer {
    /// The HTTP status; 0 when there was no answer.
    pub(super) status: u16,
    /// S3's code (`NoSuchKey`), empty when there was none.
    pub(super) code: String,
    /// Whether the request may have reached the server.
    sent: bool,
    /// The region that the server named, when it sent us elsewhere.
    region: Option<String>,
    text: String,
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Error for Answer {}

impl Answer {
    pub(super) fn of<E>(error: &SdkError<E, HttpResponse>) -> Self
    where
        E: ProvideErrorMetadata + Error + 'static,
    {
        let sent = !matches!(error, SdkError::ConstructionFailure(_));
        let Some(response) = error.raw_response() else {
            return Self { status: 0, code: String::new(), sent, region: None, text: chain(error) };
        };
        let header = |name: &str| response.headers().get(name).map(ToOwned::to_owned);
        let status = response.status().as_u16();
        let (code, message) = match error {
            SdkError::ServiceError(service) => {
                let meta = service.err().meta();
                (meta.code().unwrap_or_default(), meta.message().map(ToOwned::to_owned))
            }
            _ => ("", Some(chain(error))),
        };
        let mut text = match (code, message) {
            ("", None) => "the store gave no reason".to_owned(),
            ("", Some(message)) => message,
            (code, None) => code.to_owned(),
            (code, Some(message)) => format!("{code}: {message}"),
        };
        text = match header("x-amz-request-id") {
            Some(id) => format!("{} (HTTP {status}, request {})", clean(&text), clean(&id)),
            None => format!("{} (HTTP {status})", clean(&text)),
        };
        if code == "RequestTimeTooSkewed" {
            text.push_str(&skew(header("date").as_deref()));
        }
        Self { status, code: code.to_owned(), sent, region: header("x-amz-bucket-region"), text }
    }

    /// Whether the request may have been carried out although this came back instead of a success. A success that could
    /// not be read to its end is none, and it was carried out.
    pub(super) fn may_have_happened(&self) -> bool {
        self.sent && (self.status < 300 || self.status >= 500 || self.status == 408)
    }

    /// Whether the same request may succeed a little later.
    pub(super) fn passes(&self) -> bool {
        self.may_have_happened() && !self.is_full() && self.status != 501
            || matches!(self.status, 409 | 429)
            || matches!(self.code.as_str(), "RequestTimeout" | "SlowDown" | "Throttling" | "ThrottlingException")
            // The SDK measures the skew from this answer and signs the next request with it.
            || self.code == "RequestTimeTooSkewed"
            || GARBLED.contains(&self.code.as_str())
    }

    /// Whether a condition of the request did not hold.
    pub(super) fn is_precondition(&self) -> bool {
        // The completion of an upload may begin to answer before it knows.
        self.status == 412 || self.code == "PreconditionFailed"
    }

    /// Whether the object is missing, as far as an answer without a body (to HEAD) can tell: it may be the bucket, or no
    /// S3 at all.
    pub(super) fn looks_missing(&self) -> bool {
        self.status == 404 && self.code != "NoSuchBucket"
    }

    fn is_full(&self) -> bool {
        self.status == 507
            || self.code.contains("Quota")
            || self.code.contains("StorageFull")
            || self.code == "InsufficientStorage"
    }

    /// The error for the caller.
    pub(super) fn into_error(self, operation: &'static str, key: &str, bucket: &str) -> StoreError {
        let key = key.to_owned();
        if self.is_full() {
            return StoreError::Full { key, source: self.into() };
        }
        match (self.status, self.code.as_str()) {
            (404, "NoSuchBucket") => StoreError::NoStore {
                reason: format!(
                    "there is no bucket {bucket}; create it, or correct the URL of the repository: {self}"
                ),
            },
            // Only a store that says so: the 404 of some other web server says nothing about the object.
            (404, "NoSuchKey") => StoreError::NotFound { key },
            (301 | 307, _)
            | (_, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
                let elsewhere = self.region.as_ref().map_or_else(
                    || "name the region it is in".to_owned(),
                    |region| format!("use region={}", clean(region)),
                );
                StoreError::Unsuitable {
                    reason: format!(
                        "bucket {bucket} is in another region or at another endpoint; {elsewhere}: {self}"
                    ),
                }
            }
            // Of reading a range alone: it begins behind the object's end.
            (416, _) => StoreError::Short { key, source: self.into() },
            (501, _) => StoreError::Unsuitable {
                reason: format!(
                    "the store cannot {operation} in the way a repository needs: {self}"
                ),
            },
            (403, "AccessDenied") if matches!(operation, READ | SIZE) => {
                let reason = format!(
                    "{self}; without the right to list the bucket S3 says this of a missing object, too"
                );
                StoreError::Forbidden { operation, key, source: reason.into() }
            }
            (401 | 403, _) | (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") => {
                StoreError::Forbidden { operation, key, source: self.into() }
            }
            _ => StoreError::Unavailable { operation, key, source: self.into() },
        }
    }
}

/// How far the clocks are apart, as far as the server's `Date` tells.
fn skew(date: Option<&str>) -> String {
    let theirs = date
        .and_then(|date| DateTime::from_str(date, DateTimeFormat::HttpDate).ok())
        .and_then(|date| SystemTime::try_from(date).ok());
    let cure = "set the clock (NTP) of the machine that is wrong";
    match theirs.map(|theirs| (theirs.duration_since(now()), now().duration_since(theirs))) {
        Some((Ok(behind), _)) => {
            format!(
                "; the clock of this machine is {} s behind the store's: {cure}",
                behind.as_secs()
            )
        }
        Some((_, Ok(ahead))) => {
            format!(
                "; the clock of this machine is {} s ahead of the store's: {cure}",
                ahead.as_secs()
            )
        }
        _ => format!("; the clocks of this machine and of the store differ: {cure}"),
    }
}

#[expect(
    clippy::disallowed_methods,
    reason = "the only clock of this store: to name a skew in an error text"
)]
fn now() -> SystemTime {
    SystemTime::now()
}

/// An error and its causes on one line, without repetitions.
pub(super) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(cause) = below {
        let more = cause.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        below = cause.source();
    }
    clean(&text)
}

/// Text of a server made fit for a log line.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(TEXT_CHARS).collect()
}
