//! A bucket of one's own on the run's S3 server.
//!
//! Buckets are not removed: they go with the server at the end of the run.

use anyhow::Context as _;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::Credentials;

use crate::{rabbit::unique, services};

/// The keys that `tests/services` gives the S3 server.
pub const ACCESS_KEY: &str = "AK";
/// The secret half.
pub const SECRET_KEY: &str = "SKSKSKSK";
/// Any region will do; clients insist on one.
pub const REGION: &str = "us-east-1";

/// An empty bucket that no other test uses.
#[derive(Debug, Clone)]
pub struct Bucket {
    name: String,
    endpoint: String,
}

impl Bucket {
    /// Creates it.
    pub async fn create() -> anyhow::Result<Self> {
        let bucket = Self { name: format!("test-{}", unique()?), endpoint: services::s3()? };
        let client = bucket.client();
        client.create_bucket().bucket(&bucket.name).send().await.context("create a bucket")?;
        Ok(bucket)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The server's address, `http://host:port`.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The same bucket reached through another port of this machine: a proxy's.
    #[must_use]
    pub fn through(&self, port: u16) -> Self {
        Self { name: self.name.clone(), endpoint: format!("http://127.0.0.1:{port}") }
    }

    /// A client of the test's own, to look at and to damage what the program stored.
    pub fn client(&self) -> Client {
        let credentials = Credentials::new(ACCESS_KEY, SECRET_KEY, None, None, "tests");
        let config = aws_sdk_s3::Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .region(Region::new(REGION))
            .endpoint_url(&self.endpoint)
            .credentials_provider(credentials)
            .force_path_style(true)
            .build();
        Client::from_conf(config)
    }

    /// The keys of everything below a prefix, in order.
    pub async fn keys(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        let mut pages = self
            .client()
            .list_objects_v2()
            .bucket(&self.name)
            .prefix(prefix)
            .into_paginator()
            .send();
        let mut keys = Vec::new();
        while let Some(page) = pages.next().await {
            let page = page.context("list the bucket")?;
            keys.extend(
                page.contents().iter().filter_map(|object| object.key().map(str::to_owned)),
            );
        }
        Ok(keys)
    }
}
