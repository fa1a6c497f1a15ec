//! A store in an S3 bucket, on AWS or on a server that speaks the same language.
//!
//! The SDK repeats what may be repeated. What decides something is sent by hand ([`conditional`], [`upload`]): each such
//! write carries a random write id in the object's metadata, and whenever an answer is lost or ambiguous the object is
//! asked whose it is. Not here: creating buckets, versions, retention locks.

mod answer;
mod conditional;
mod options;
mod retry;
mod upload;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::ops::{ControlFlow, Range};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use aws_config::BehaviorVersion;
use aws_sdk_s3::Client;
use aws_sdk_s3::config::http::HttpResponse;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{
    Builder, Credentials, Region, RequestChecksumCalculation, ResponseChecksumValidation,
    StalledStreamProtectionConfig,
};
use aws_sdk_s3::error::{ProvideErrorMetadata, SdkError};
use aws_sdk_s3::operation::head_object::HeadObjectOutput;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::MultipartUpload;
use bytes::{Bytes, BytesMut};
use secrecy::ExposeSecret;
use tokio::sync::Semaphore;

use self::answer::{Answer, chain};
pub use self::options::{Checksums, Limits, S3Credentials, S3Options};
pub use self::upload::Sent;
use crate::store::probe::Capabilities;
use crate::store::{
    KeyTest, Listed, PutOutcome, Staged, Store, StoreError, Upload, check_key, staged_elsewhere,
};
use crate::{chance, hex};

/// Where a write id stands in an object's user metadata.
const WRITE_ID: &str = "pgmuster-write-id";

/// S3's code for an upload that was completed, ended, or never begun.
const NO_SUCH_UPLOAD: &str = "NoSuchUpload";

/// How the name of a directory bucket ends.
const DIRECTORY_BUCKET: &str = "--x-s3";

/// The verbs that find out whether an object is there.
const READ: &str = "read";
const SIZE: &str = "find the size of";

/// What is shorter is as soon put as an upload of it is completed.
const STAGED_BYTES_MIN: usize = 256 << 10;

/// How often a body is asked for that breaks off, or that is not the one asked for.
const BODY_ATTEMPTS: u32 = 3;

/// Why the body of an answer is not read.
enum Unwanted {
    /// The object is not as it should be, and will not be so the next time.
    Object(StoreError),
    /// Whoever answered misunderstood; the next answer may be another one.
    Answer(String),
}

/// A bucket, or a part of one. Cheap to clone.
#[derive(Clone)]
pub struct S3Store {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    bucket: String,
    /// Empty, or ending in `/`.
    prefix: String,
    limits: Limits,
    /// A permit for each part on its way.
    parts: Arc<Semaphore>,
    description: String,
}

impl fmt::Debug for S3Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("S3Store").field(&self.inner.description).finish()
    }
}

impl S3Store {
    /// Prepares the store. Nothing is asked of the bucket yet; the AWS chain may be asked for a region.
    pub async fn open(options: S3Options) -> Result<Self, StoreError> {
        options.check()?;
        let description = options.describe();
        let limits = options.limits.clone();

        let mut config = base_config(&options).await?;
        config.set_force_path_style(Some(options.uses_path_style()));
        config.set_endpoint_url(options.endpoint.clone());
        config.set_request_checksum_calculation(Some(if options.uses_checksums() {
            RequestChecksumCalculation::WhenSupported
        } else {
            RequestChecksumCalculation::WhenRequired
        }));
        config.set_response_checksum_validation(Some(if options.uses_checksums() {
            ResponseChecksumValidation::WhenSupported
        } else {
            ResponseChecksumValidation::WhenRequired
        }));
        config.set_retry_config(Some(
            RetryConfig::standard()
                .with_max_attempts(limits.attempts)
                .with_initial_backoff(limits.pause)
                .with_max_backoff(limits.pause * 50),
        ));
        config.set_retry_partition(Some(retry::budget(&description)));
        let mut config = config.retry_classifier(retry::Passing);
        config.set_timeout_config(Some(
            TimeoutConfig::builder()
                .connect_timeout(limits.connect)
                .operation_attempt_timeout(limits.answer)
                .build(),
        ));
        // Bodies are read under limits of our own, and what we send is in memory: the SDK's guess at a stall, which has
        // cut healthy transfers, is not needed.
        config.set_stalled_stream_protection(Some(StalledStreamProtectionConfig::disabled()));

        let prefix =
            if options.prefix.is_empty() { String::new() } else { format!("{}/", options.prefix) };
        let client = Client::from_conf(config.build());
        Ok(Self {
            inner: Arc::new(Inner {
                client,
                bucket: options.bucket,
                prefix,
                parts: Arc::new(Semaphore::new(usize::from(limits.parts.max(1)))),
                limits,
                description,
            }),
        })
    }

    fn full_key(&self, key: &str) -> String {
        format!("{}{key}", self.inner.prefix)
    }

    fn client(&self) -> &Client {
        &self.inner.client
    }

    fn failed<E>(
        &self,
        operation: &'static str,
        key: &str,
        error: &SdkError<E, HttpResponse>,
    ) -> StoreError
    where
        E: ProvideErrorMetadata + std::error::Error + 'static,
    {
        Answer::of(error).into_error(operation, key, &self.inner.bucket)
    }

    /// Settings of one call that sends `bytes`: more time for more bytes, and the SDK's own retries or none.
    fn patience(&self, bytes: u64, retries: bool) -> Builder {
        let mut config = Builder::new();
        config.set_timeout_config(Some(
            TimeoutConfig::builder()
                .connect_timeout(self.inner.limits.connect)
                .operation_attempt_timeout(self.inner.limits.for_bytes(bytes))
                .build(),
        ));
        if !retries {
            config.set_retry_config(Some(RetryConfig::disabled()));
        }
        config
    }

    async fn head(&self, key: &str) -> Result<HeadObjectOutput, Answer> {
        self.client()
            .head_object()
            .bucket(&self.inner.bucket)
            .key(self.full_key(key))
            .send()
            .await
            .map_err(|error| Answer::of(&error))
    }

    /// One object or a part of it. `accept` looks at the answer's length before the body is read.
    async fn fetch(
        &self,
        key: &str,
        range: Option<String>,
        accept: impl Fn(Option<u64>, Option<&str>) -> Result<u64, Unwanted> + Send + Sync,
    ) -> Result<Bytes, StoreError> {
        let mut attempt = 1;
        loop {
            let output = self
                .client()
                .get_object()
                .bucket(&self.inner.bucket)
                .key(self.full_key(key))
                .set_range(range.clone())
                .send()
                .await
                .map_err(|error| self.failed(READ, key, &error))?;
            let length = output.content_length().and_then(|length| u64::try_from(length).ok());
            let why = match accept(length, output.content_range()) {
                Ok(most) => match self.body(output.body, length, most).await {
                    Ok(bytes) => return Ok(bytes),
                    Err(why) => why,
                },
                Err(Unwanted::Answer(why)) => why,
                Err(Unwanted::Object(error)) => return Err(error),
            };
            if attempt == BODY_ATTEMPTS {
                return Err(unreadable(key, format!("{why}, {attempt} times")));
            }
            tracing::debug!(key, attempt, why, "fetching a body again");
            tokio::time::sleep(self.inner.limits.pause * attempt).await;
            attempt += 1;
        }
    }

    /// Reads a body: all of it, in time, and not more than was announced.
    async fn body(
        &self,
        mut body: ByteStream,
        length: Option<u64>,
        most: u64,
    ) -> Result<Bytes, String> {
        let stall = self.inner.limits.stall;
        let whole = self.inner.limits.for_bytes(length.unwrap_or(most)) + stall;
        let read = async {
            let mut first: Option<Bytes> = None;
            let mut rest = BytesMut::new();
            let mut got: u64 = 0;
            while let Some(piece) = tokio::time::timeout(stall, body.next())
                .await
                .map_err(|_elapsed| format!("the body stalled for {stall:?} after {got} bytes"))?
            {
                let piece = piece.map_err(|error| {
                    format!("the body broke off after {got} bytes: {}", chain(&error))
                })?;
                got += piece.len() as u64;
                if got > length.unwrap_or(most) {
                    return Err(format!(
                        "more than the {} bytes expected came",
                        length.unwrap_or(most)
                    ));
                }
                // A body in one piece, which is common, is not copied.
                match first.take() {
                    None if rest.is_empty() => first = Some(piece),
                    held => {
                        if rest.is_empty() {
                            rest.reserve(usize::try_from(length.unwrap_or(got)).unwrap_or(0));
                        }
                        rest.extend_from_slice(&held.unwrap_or_default());
                        rest.extend_from_slice(&piece);
                    }
                }
            }
            match length {
                Some(length) if length != got => {
                    Err(format!("the body broke off after {got} of {length} bytes"))
                }
                _ => Ok(first.unwrap_or_else(|| rest.freeze())),
            }
        };
        tokio::time::timeout(whole, read)
            .await
            .unwrap_or_else(|_elapsed| Err(format!("the body did not arrive within {whole:?}")))
    }

    /// Every page of a listing; `take` refuses a page that lacks what it must have.
    async fn pages(
        &self,
        prefix: &str,
        delimiter: Option<&str>,
        after: Option<&str>,
        mut take: impl FnMut(ListObjectsV2Output) -> Option<ControlFlow<()>> + Send,
    ) -> Result<(), StoreError> {
        if !prefix.is_empty() {
            check_key("list", prefix.trim_end_matches('/'))?;
        }
        let mut token: Option<String> = None;
        loop {
            let page = self
                .client()
                .list_objects_v2()
                .bucket(&self.inner.bucket)
                .prefix(self.full_key(prefix))
                .set_delimiter(delimiter.map(ToOwned::to_owned))
                .set_start_after(after.map(|key| self.full_key(key)))
                .max_keys(i32::from(self.inner.limits.page_keys))
                .set_continuation_token(token.clone())
                .send()
                .await
                .map_err(|error| self.failed("list", prefix, &error))?;
            let more = page.is_truncated() == Some(true);
            let next = page.next_continuation_token().map(ToOwned::to_owned);
            let taken = take(page).ok_or_else(|| broken_listing("list", prefix))?;
            if !more || taken.is_break() {
                return Ok(());
            }
            if next.is_none() || next == token {
                return Err(broken_listing("list", prefix));
            }
            token = next;
        }
    }

    /// A key of the bucket as a key of this store.
    fn relative(&self, full_key: Option<String>) -> Option<String> {
        full_key?.strip_prefix(&self.inner.prefix).map(ToOwned::to_owned)
    }

    /// Every upload in progress below a prefix (of the bucket).
    async fn uploads_below(&self, prefix: &str) -> Result<Vec<MultipartUpload>, StoreError> {
        let mut uploads = Vec::new();
        let mut marker: (Option<String>, Option<String>) = (None, None);
        loop {
            let page = self
                .client()
                .list_multipart_uploads()
                .bucket(&self.inner.bucket)
                .prefix(prefix)
                .set_key_marker(marker.0.clone())
                .set_upload_id_marker(marker.1.clone())
                .send()
                .await
                .map_err(|error| self.failed("list the uploads below", prefix, &error))?;
            let more = page.is_truncated() == Some(true);
            let next = (
                page.next_key_marker().map(ToOwned::to_owned),
                page.next_upload_id_marker().map(ToOwned::to_owned),
            );
            uploads.extend(page.uploads.unwrap_or_default());
            if !more {
                return Ok(uploads);
            }
            if next.0.is_none() || next == marker {
                return Err(broken_listing("list the uploads below", prefix));
            }
            marker = next;
        }
    }

    /// Aborts one upload; that it is already gone is fine.
    async fn abort_upload(&self, key: &str, upload_id: &str) -> Result<(), StoreError> {
        let aborted = self
            .client()
            .abort_multipart_upload()
            .bucket(&self.inner.bucket)
            .key(self.full_key(key))
            .upload_id(upload_id)
            .send()
            .await;
        match aborted {
            Ok(_) => Ok(()),
            Err(error) => {
                let answer = Answer::of(&error);
                if answer.code == NO_SUCH_UPLOAD {
                    Ok(())
                } else {
                    Err(answer.into_error("abort the upload of", key, &self.inner.bucket))
                }
            }
        }
    }
}

#[async_trait]
impl Store for S3Store {
    fn describe(&self) -> String {
        self.inner.description.clone()
    }

    async fn get(&self, key: &str, limit_bytes: u64) -> Result<Bytes, StoreError> {
        check_key(READ, key)?;
        self.fetch(key, None, |length, _| match length {
            Some(length) if length > limit_bytes => {
                let why = format!("{length} bytes, and at most {limit_bytes} are expected");
                let (key, source) = (key.to_owned(), why.into());
                Err(Unwanted::Object(StoreError::Large { key, source }))
            }
            _ => Ok(limit_bytes),
        })
        .await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes, StoreError> {
        check_key(READ, key)?;
        let Some(last) = range.end.checked_sub(1).filter(|last| *last >= range.start) else {
            // HTTP has no word for an empty range.
            let size = self.size(key).await?;
            return if range.start != range.end {
                Err(unreadable(key, format!("bytes {range:?} were asked for")))
            } else if range.end > size {
                Err(short(key, &range, size))
            } else {
                Ok(Bytes::new())
            };
        };
        let wanted = last - range.start + 1;
        let begins = format!("bytes {}-{last}/", range.start);
        self.fetch(key, Some(format!("bytes={}-{last}", range.start)), |length, part| {
            match (length, part) {
                (Some(length), Some(part)) if length == wanted && part.starts_with(&begins) => {
                    Ok(wanted)
                }
                (_, part) => Err(match part.and_then(size_in) {
                    Some(size) if size < range.end => Unwanted::Object(short(key, &range, size)),
                    _ => {
                        let came = part.unwrap_or("something else");
                        Unwanted::Answer(format!("bytes {range:?} were asked for and {came} came"))
                    }
                }),
            }
        })
        .await
    }

    async fn size(&self, key: &str) -> Result<u64, StoreError> {
        check_key(SIZE, key)?;
        let length = match self.head(key).await {
            Ok(head) => head.content_length(),
            // The answer to HEAD has no body, so a missing bucket looks like a missing object: ask again with a verb
            // whose answer says which.
            Err(answer) if answer.looks_missing() => self
                .client()
                .get_object()
                .bucket(&self.inner.bucket)
                .key(self.full_key(key))
                .send()
                .await
                .map_err(|error| self.failed(SIZE, key, &error))?
                .content_length(),
            Err(answer) => {
                return Err(answer.into_error(SIZE, key, &self.inner.bucket));
            }
        };
        length.and_then(|length| u64::try_from(length).ok()).ok_or_else(|| {
            StoreError::Unavailable {
                operation: SIZE,
                key: key.to_owned(),
                source: "the store did not say how large the object is".into(),
            }
        })
    }

    async fn put(&self, key: &str, bytes: Bytes) -> Result<(), StoreError> {
        check_key("write", key)?;
        let patience = self.patience(bytes.len() as u64, true);
        self.client()
            .put_object()
            .bucket(&self.inner.bucket)
            .key(self.full_key(key))
            .body(ByteStream::from(bytes))
            .customize()
            .config_override(patience)
            .send()
            .await
            .map(|_| ())
            .map_err(|error| self.failed("write", key, &error))
    }

    async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, StoreError> {
        check_key("create", key)?;
        conditional::put_if_absent(self, key, bytes).await
    }

    async fn stage(
        &self,
        key: &str,
        bytes: Bytes,
        found: &Capabilities,
    ) -> Result<Staged, StoreError> {
        check_key("create", key)?;
        let may_stage = found.completes_if_absent && found.ends_uploads;
        if !may_stage || bytes.len() < STAGED_BYTES_MIN {
            return Ok(Staged::Held(bytes));
        }
        Ok(Staged::Sent(Sent::send(self, key, bytes).await?))
    }

    async fn put_staged_if_absent(
        &self,
        key: &str,
        staged: Staged,
    ) -> Result<PutOutcome, StoreError> {
        match staged {
            Staged::Sent(sent) if sent.is_for(key) => sent.put_if_absent().await,
            Staged::Held(bytes) => self.put_if_absent(key, bytes).await,
            Staged::Sent(_) | Staged::Written(_) => Err(staged_elsewhere(key)),
        }
    }

    async fn upload(&self, key: &str) -> Result<Box<dyn Upload>, StoreError> {
        check_key("write", key)?;
        Ok(Box::new(upload::S3Upload::new(self.clone(), key)))
    }

    async fn list(&self, prefix: &str) -> Result<Vec<Listed>, StoreError> {
        let mut listed = Vec::new();
        self.pages(prefix, None, None, |page| {
            for object in page.contents.unwrap_or_default() {
                let key = self.relative(object.key)?;
                listed.push(Listed { key, size_bytes: u64::try_from(object.size?).ok()? });
            }
            Some(ControlFlow::Continue(()))
        })
        .await?;
        // Most servers sort; directory buckets and some imitators do not.
        listed.sort_unstable_by(|a, b| a.key.cmp(&b.key));
        Ok(listed)
    }

    async fn has_behind(
        &self,
        prefix: &str,
        after: &str,
        is_wanted: KeyTest,
    ) -> Result<bool, StoreError> {
        let mut has = false;
        // Directory buckets do not sort, and refuse to begin anywhere.
        let sorts = !self.inner.bucket.ends_with(DIRECTORY_BUCKET);
        self.pages(prefix, None, sorts.then_some(after), |page| {
            for object in page.contents.unwrap_or_default() {
                let key = self.relative(object.key)?;
                // Imitators may begin elsewhere.
                has |= key.as_str() > after && is_wanted(&key);
            }
            Some(if has { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        })
        .await?;
        Ok(has)
    }

    async fn list_directories(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let mut names = Vec::new();
        self.pages(prefix, Some("/"), None, |page| {
            for below in page.common_prefixes.unwrap_or_default() {
                let below = self.relative(below.prefix)?;
                names.push(below.strip_prefix(prefix)?.strip_suffix('/')?.to_owned());
            }
            Some(ControlFlow::Continue(()))
        })
        .await?;
        names.sort_unstable();
        Ok(names)
    }

    async fn delete(&self, key: &str) -> Result<(), StoreError> {
        check_key("delete", key)?;
        let deleted = self
            .client()
            .delete_object()
            .bucket(&self.inner.bucket)
            .key(self.full_key(key))
            .send()
            .await;
        match deleted {
            Ok(_) => Ok(()),
            Err(error) => match self.failed("delete", key, &error) {
                StoreError::NotFound { .. } => Ok(()),
                error => Err(error),
            },
        }
    }

    async fn uploads(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        let below = self.full_key(prefix);
        let listed = self.uploads_below(&below).await?;
        let keys: Option<BTreeSet<String>> = listed
            .iter()
            .map(|upload| upload.key()?.strip_prefix(&self.inner.prefix).map(str::to_owned))
            .collect();
        let keys = keys.ok_or_else(|| broken_listing("list the uploads below", &below))?;
        Ok(keys.into_iter().collect())
    }

    async fn abort_uploads(&self, keys: &[String]) -> Result<usize, StoreError> {
        let wanted: HashSet<String> = keys.iter().map(|key| self.full_key(key)).collect();
        if wanted.is_empty() {
            return Ok(0);
        }
        let below = common_prefix(&wanted);
        let mut ended = 0;
        for upload in self.uploads_below(&below).await? {
            let (Some(full_key), Some(upload_id)) = (upload.key(), upload.upload_id()) else {
                return Err(broken_listing("list the uploads below", &below));
            };
            // Others may be writing beside the dead: only what is named is touched.
            if !wanted.contains(full_key) {
                continue;
            }
            let key = full_key.strip_prefix(&self.inner.prefix).unwrap_or(full_key);
            self.abort_upload(key, upload_id).await?;
            ended += 1;
        }
        Ok(ended)
    }
}

fn unreadable(key: &str, why: String) -> StoreError {
    StoreError::Unavailable { operation: READ, key: key.to_owned(), source: why.into() }
}

fn short(key: &str, range: &Range<u64>, size: u64) -> StoreError {
    let source = format!("bytes {} to {} of {size}", range.start, range.end).into();
    StoreError::Short { key: key.to_owned(), source }
}

/// The whole object's size in a `Content-Range`: `bytes 0-9/10`.
fn size_in(part: &str) -> Option<u64> {
    part.rsplit_once('/')?.1.parse().ok()
}

/// The base of the SDK's configuration: region and credentials, given or from the AWS chain.
async fn base_config(options: &S3Options) -> Result<Builder, StoreError> {
    let region = options
        .region
        .clone()
        .or_else(|| options.endpoint.is_some().then(|| "us-east-1".to_owned()))
        .map(Region::new);
    let version = BehaviorVersion::v2026_01_12();
    if let (Some(given), Some(region)) = (&options.credentials, &region) {
        // Everything is given: neither environment nor profiles may interfere.
        return Ok(Builder::new()
            .behavior_version(version)
            .region(region.clone())
            .credentials_provider(credentials(given)));
    }
    let mut loader = aws_config::defaults(version);
    if let Some(region) = region {
        loader = loader.region(region);
    }
    if let Some(given) = &options.credentials {
        loader = loader.credentials_provider(credentials(given));
    }
    let shared = loader.load().await;
    if shared.region().is_none() {
        return Err(StoreError::Unsuitable {
            reason: format!(
                "the region of bucket {} is unknown; add ?region=NAME to the URL or set AWS_REGION",
                options.bucket
            ),
        });
    }
    Ok(Builder::from(&shared))
}

fn credentials(given: &S3Credentials) -> Credentials {
    Credentials::new(
        given.access_key_id.clone(),
        given.secret_access_key.expose_secret(),
        given.session_token.as_ref().map(|token| token.expose_secret().to_owned()),
        None,
        "pgmuster",
    )
}

fn broken_listing(operation: &'static str, prefix: &str) -> StoreError {
    StoreError::Unavailable {
        operation,
        key: prefix.to_owned(),
        source: "the store's listing has a row or a page without what it needs to be continued"
            .into(),
    }
}

/// The longest text that all keys begin with.
fn common_prefix(keys: &HashSet<String>) -> String {
    let mut keys = keys.iter();
    let mut common = keys.next().cloned().unwrap_or_default();
    for key in keys {
        let same = common.bytes().zip(key.bytes()).take_while(|(a, b)| a == b).count();
        common.truncate(same);
    }
    common
}

/// A name for one write, so that it can be recognised afterwards.
fn write_id() -> String {
    hex::encode(&chance::random::<16>())
}

/// Pauses that double, each between half and all of its length.
struct Pauses {
    next: Duration,
    most: Duration,
}

impl Pauses {
    fn new(limits: &Limits) -> Self {
        Self { next: limits.pause, most: limits.pause * 50 }
    }

    async fn pause(&mut self) {
        let [share] = chance::random::<1>();
        tokio::time::sleep(self.next / 2 + self.next / 2 * u32::from(share) / 255).await;
        self.next = (self.next * 2).min(self.most);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_common_prefix() {
        let of = |keys: &[&str]| common_prefix(&keys.iter().map(|key| (*key).to_owned()).collect());
        assert_eq!(of(&["a/b1", "a/b2", "a/bc"]), "a/b");
        assert_eq!(of(&["a/b"]), "a/b");
        assert_eq!(of(&["a", "b"]), "");
    }
}
