//! What an S3 store is told: where it is, how to get in, and how patient to be; and the `s3://` URL people write.
//!
//! Secrets are never part of the URL: they come as [`S3Credentials`], or from the standard AWS chain.

use std::time::Duration;

use secrecy::SecretString;

use crate::store::{Credentials, StoreError, key_is_legal};

/// Where an S3 store is and how to talk to it. [`S3Options::from_url`] reads the URL form:
///
/// ```text
/// s3://BUCKET[/PREFIX][?endpoint=URL][&region=NAME][&path-style=true|false][&checksums=auto|always|when-required]
/// ```
#[derive(Debug, Clone)]
pub struct S3Options {
    /// The bucket. It must exist: this store never creates one.
    pub bucket: String,
    /// What every key begins with, without `/` at either end; empty for the whole bucket.
    pub prefix: String,
    /// `http(s)://host[:port]` of a server that is not AWS.
    pub endpoint: Option<String>,
    /// The region; without it the AWS chain is asked, and with an endpoint `us-east-1` is assumed.
    pub region: Option<String>,
    /// `http://host/bucket/key` instead of `http://bucket.host/key`; without it, true exactly when there is an endpoint.
    pub path_style: Option<bool>,
    /// Without them, the standard AWS chain: environment, profile, web identity, container, instance.
    pub credentials: Option<S3Credentials>,
    /// Whether the store's own checksums are used on top of ours.
    pub checksums: Checksums,
    /// How patient to be.
    pub limits: Limits,
}

/// A key pair for S3. `Debug` shows no secret.
#[derive(Debug, Clone)]
pub struct S3Credentials {
    /// The public half.
    pub access_key_id: String,
    /// The secret half.
    pub secret_access_key: SecretString,
    /// For temporary credentials.
    pub session_token: Option<SecretString>,
}

/// Whether requests carry S3's additional checksums. Many servers that imitate S3 refuse or garble them; every object of
/// a repository is authenticated by itself, so nothing is lost without them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Checksums {
    /// On AWS always; at another endpoint only when the operation requires one.
    #[default]
    Auto,
    /// On everything that supports them.
    Always,
    /// Only where the operation requires one.
    WhenRequired,
}

/// The bounds of every call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// For a TCP and TLS connection.
    pub connect: Duration,
    /// From sending a request to the answer's head; what is sent adds time at [`Limits::bytes_per_second`].
    pub answer: Duration,
    /// Between two pieces of an answer's body.
    pub stall: Duration,
    /// The slowest line that is still worth waiting for.
    pub bytes_per_second: u32,
    /// How often a request that may be repeated is sent at most.
    pub attempts: u32,
    /// The first pause between two attempts; it doubles up to fifty times this.
    pub pause: Duration,
    /// How long a call keeps asking how a write ended whose answer was lost.
    pub settle: Duration,
    /// Keys in one page of a listing, at most 1000.
    pub page_keys: u16,
    /// Parts on their way at once, over all uploads of this store: what bounds their memory.
    pub parts: u16,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            answer: Duration::from_secs(30),
            stall: Duration::from_secs(30),
            bytes_per_second: 128 * 1024,
            attempts: 8,
            pause: Duration::from_millis(200),
            settle: Duration::from_mins(2),
            page_keys: 1000,
            parts: 6,
        }
    }
}

impl Limits {
    /// The time in which `bytes` must have gone over the line, the answer included.
    pub(super) fn for_bytes(&self, bytes: u64) -> Duration {
        self.answer + Duration::from_secs(bytes / u64::from(self.bytes_per_second.max(1)))
    }
}

impl S3Options {
    /// The options of a bucket on AWS with everything else at its default.
    pub fn new(bucket: impl Into<String>, prefix: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            prefix: prefix.into(),
            endpoint: None,
            region: None,
            path_style: None,
            credentials: None,
            checksums: Checksums::default(),
            limits: Limits::default(),
        }
    }

    /// Reads the URL form. What the URL does not say is taken from `credentials`, then from the defaults.
    pub fn from_url(url: &str, credentials: &Credentials) -> Result<Self, StoreError> {
        let rest =
            url.strip_prefix("s3://").ok_or_else(|| unsuitable("an S3 URL begins with s3://"))?;
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (bucket, prefix) = place.split_once('/').unwrap_or((place, ""));
        if bucket.is_empty() {
            // Not quoted either.
            let (url, why) = ("s3://…".to_owned(), "it names no bucket".to_owned());
            return Err(StoreError::Address { url, why });
        }
        let mut options = Self::new(bucket, prefix.trim_matches('/'));
        options.take(credentials)?;
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let value = decode(value).ok_or_else(|| {
                unsuitable(format!(
                    "the value of the S3 option '{name}' is not percent-encoded text"
                ))
            })?;
            match name {
                "endpoint" => options.endpoint = Some(value.trim_end_matches('/').to_owned()),
                "region" if !value.is_empty() => options.region = Some(value),
                "path-style" => {
                    options.path_style =
                        Some(choice(name, &value, &[("true", true), ("false", false)])?);
                }
                "checksums" => {
                    options.checksums = choice(
                        name,
                        &value,
                        &[
                            ("auto", Checksums::Auto),
                            ("always", Checksums::Always),
                            ("when-required", Checksums::WhenRequired),
                        ],
                    )?;
                }
                _ => {
                    return Err(unsuitable(format!(
                        "the S3 URL has an option '{name}' that does not exist or has no value; there are endpoint, \
                         region, path-style and checksums"
                    )));
                }
            }
        }
        options.check()?;
        Ok(options)
    }

    fn take(&mut self, credentials: &Credentials) -> Result<(), StoreError> {
        self.endpoint =
            credentials.endpoint.as_ref().map(|url| url.trim_end_matches('/').to_owned());
        self.region.clone_from(&credentials.region);
        self.path_style = credentials.path_style.then_some(true);
        self.credentials = match (&credentials.access_key_id, &credentials.secret_access_key) {
            (Some(id), Some(secret)) => Some(S3Credentials {
                access_key_id: id.clone(),
                secret_access_key: secret.clone(),
                session_token: credentials.session_token.clone(),
            }),
            (None, None) => None,
            _ => {
                return Err(unsuitable(
                    "an S3 access key id and its secret are given together, or neither is and the AWS chain is used",
                ));
            }
        };
        Ok(())
    }

    /// Checks what can be checked without a network.
    pub(super) fn check(&self) -> Result<(), StoreError> {
        let bucket_ok = (3..=63).contains(&self.bucket.len())
            && self
                .bucket
                .bytes()
                .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
        if !bucket_ok {
            // Not quoted: what stands here by mistake may be a key pair.
            return Err(unsuitable(
                "the bucket of an S3 URL is 3 to 63 letters, digits, '.', '-' or '_', and credentials are never part of \
                 the URL; write s3://BUCKET/PREFIX",
            ));
        }
        if !self.prefix.is_empty() && !key_is_legal(&self.prefix) {
            return Err(unsuitable(
                "the prefix of an S3 URL is made of letters, digits, '.', '_', '-' and '/', without empty, '.' or '..' \
                 components",
            ));
        }
        let region = self.region.as_deref().unwrap_or_default();
        if !region.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_')) {
            return Err(unsuitable("the S3 region is a name such as eu-central-1"));
        }
        if let Some(endpoint) = &self.endpoint {
            let rest = endpoint
                .strip_prefix("https://")
                .or_else(|| endpoint.strip_prefix("http://"))
                .ok_or_else(|| unsuitable("the S3 endpoint begins with http:// or https://"))?;
            if rest.is_empty() || rest.contains(['@', '?', '#', '&', '%', ' ']) {
                return Err(unsuitable(
                    "the S3 endpoint is http(s)://HOST[:PORT], without credentials or a query",
                ));
            }
        }
        Ok(())
    }

    pub(super) fn uses_path_style(&self) -> bool {
        self.path_style.unwrap_or(self.endpoint.is_some())
    }

    pub(super) fn uses_checksums(&self) -> bool {
        match self.checksums {
            Checksums::Auto => self.endpoint.is_none(),
            Checksums::Always => true,
            Checksums::WhenRequired => false,
        }
    }

    /// The URL that leads to the same place, without what defaults say anyway.
    pub(super) fn describe(&self) -> String {
        let slash = if self.prefix.is_empty() { "" } else { "/" };
        let path_style = self.path_style.map(|path_style| path_style.to_string());
        let query: Vec<String> =
            [("endpoint", &self.endpoint), ("region", &self.region), ("path-style", &path_style)]
                .into_iter()
                .filter_map(|(name, value)| Some(format!("{name}={}", value.as_ref()?)))
                .collect();
        let mark = if query.is_empty() { "" } else { "?" };
        format!("s3://{}{slash}{}{mark}{}", self.bucket, self.prefix, query.join("&"))
    }
}

fn choice<T: Copy>(name: &str, value: &str, among: &[(&str, T)]) -> Result<T, StoreError> {
    among.iter().find(|(word, _)| *word == value).map(|(_, choice)| *choice).ok_or_else(|| {
        let words: Vec<&str> = among.iter().map(|(word, _)| *word).collect();
        unsuitable(format!("the S3 option '{name}' is one of {}", words.join(", ")))
    })
}

/// Undoes percent-encoding.
fn decode(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(if byte == b'%' {
            let high = char::from(rest.next()?).to_digit(16)?;
            let low = char::from(rest.next()?).to_digit(16)?;
            u8::try_from(high * 16 + low).ok()?
        } else {
            byte
        });
    }
    String::from_utf8(bytes).ok()
}

fn unsuitable(reason: impl Into<String>) -> StoreError {
    StoreError::Unsuitable { reason: reason.into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(url: &str) -> S3Options {
        S3Options::from_url(url, &Credentials::default())
            .unwrap_or_else(|error| panic!("{url}: {error}"))
    }

    #[test]
    fn a_url_without_a_bucket_is_told_so() {
        for url in ["s3://", "s3:///", "s3:///prefix", "s3:///KEY:TOPSECRET@x?region=eu-central-1"]
        {
            let error = S3Options::from_url(url, &Credentials::default()).unwrap_err();
            assert!(matches!(error, StoreError::Address { .. }), "{url}: {error}");
            assert!(error.to_string().ends_with("it names no bucket"), "{url}: {error}");
            assert!(!format!("{error} {error:?}").contains("TOPSECRET"), "{url}: {error}");
        }
    }

    #[test]
    fn reads_a_url() {
        let options = parse(
            "s3://backups/fra1/main/?endpoint=http%3A%2F%2Fminio:9000/&region=eu-central-1&path-style=false&checksums=always",
        );
        assert_eq!(options.bucket, "backups");
        assert_eq!(options.prefix, "fra1/main");
        assert_eq!(options.endpoint.as_deref(), Some("http://minio:9000"));
        assert_eq!(options.region.as_deref(), Some("eu-central-1"));
        assert!(!options.uses_path_style());
        assert!(options.uses_checksums());
        let described = options.describe();
        assert_eq!(
            described,
            "s3://backups/fra1/main?endpoint=http://minio:9000&region=eu-central-1&path-style=false"
        );
        assert_eq!(parse(&described).describe(), described, "it leads to the same place");
        assert_eq!(parse("s3://backups").describe(), "s3://backups");
    }

    #[test]
    fn chooses_path_style_and_checksums_by_the_endpoint() {
        let aws = parse("s3://backups");
        assert!(!aws.uses_path_style() && aws.uses_checksums());
        let other = parse("s3://backups/x?endpoint=https://s3.example.org");
        assert!(other.uses_path_style() && !other.uses_checksums());
    }

    #[test]
    fn refuses_what_cannot_work_and_repeats_no_secret() {
        for url in [
            "http://backups",
            "s3://AKIAEXAMPLE:TOPSECRET@backups/x",
            "s3://backups/a//b",
            "s3://backups/../b",
            "s3://backups/a b",
            "s3://backups?secret=TOPSECRET",
            "s3://backups?endpoint=https://user:TOPSECRET@host",
            "s3://backups?endpoint=minio:9000",
            "s3://backups?endpoint=http%3",
            "s3://backups?path-style=TOPSECRET",
            "s3://backups?region=",
            "s3://backups?region=TOP%26SECRET",
        ] {
            let refused = S3Options::from_url(url, &Credentials::default()).expect_err(url);
            assert!(matches!(refused, StoreError::Unsuitable { .. }), "{url}: {refused:?}");
            assert!(!format!("{refused} {refused:?}").contains("TOPSECRET"), "{url}: {refused}");
        }
    }

    #[test]
    fn takes_credentials_whole_and_shows_no_secret() {
        let mut credentials = Credentials {
            access_key_id: Some("AK".to_owned()),
            secret_access_key: Some(SecretString::from("TOPSECRET")),
            session_token: Some(SecretString::from("TOPSECRET")),
            region: Some("eu-west-1".to_owned()),
            endpoint: Some("http://minio:9000/".to_owned()),
            path_style: false,
        };
        let options = S3Options::from_url("s3://backups?region=eu-west-2", &credentials).unwrap();
        assert!(!format!("{options:?}").contains("TOPSECRET"));
        assert_eq!(options.credentials.map(|pair| pair.access_key_id).as_deref(), Some("AK"));
        assert_eq!(options.endpoint.as_deref(), Some("http://minio:9000"));
        assert_eq!(options.region.as_deref(), Some("eu-west-2"), "the URL is nearer");
        assert_eq!(options.path_style, None);

        credentials.secret_access_key = None;
        S3Options::from_url("s3://backups", &credentials).expect_err("half a key pair");
    }
}
