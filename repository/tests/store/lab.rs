//! A bucket of its own for each test, on the real S3 server, and the options that reach it.

use std::time::Duration;

use aws_sdk_s3::config::{BehaviorVersion, Credentials, Region};
use repository::store::s3::{Limits, S3Credentials, S3Options, S3Store};
use secrecy::SecretString;

/// The endpoint of the S3 server that `tests/run` started.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place where these tests read the environment"
)]
pub(crate) fn endpoint() -> String {
    std::env::var("PGMUSTER_TEST_S3").expect("run ./tests/run, which starts the services")
}

/// The SDK itself, to look at a bucket from the side.
pub(crate) fn client() -> aws_sdk_s3::Client {
    let config = aws_sdk_s3::Config::builder()
        .behavior_version(BehaviorVersion::v2026_01_12())
        .endpoint_url(endpoint())
        .region(Region::new("us-east-1"))
        .force_path_style(true)
        .credentials_provider(Credentials::new("AK", "SKSKSKSK", None, None, "test"))
        .build();
    aws_sdk_s3::Client::from_conf(config)
}

/// A fresh bucket, and the options that reach it.
pub(crate) async fn bucket(test: &str) -> S3Options {
    let name = format!("{test}-{}", uuid::Uuid::from_bytes(random()).simple());
    client().create_bucket().bucket(&name).send().await.expect("create a bucket");
    let mut options = S3Options::new(name, "some/where");
    options.endpoint = Some(endpoint());
    options.credentials = Some(S3Credentials {
        access_key_id: "AK".to_owned(),
        secret_access_key: SecretString::from("SKSKSKSK"),
        session_token: None,
    });
    options
}

/// Limits for tests that wait for the worst.
pub(crate) fn impatient() -> Limits {
    Limits {
        answer: Duration::from_secs(5),
        stall: Duration::from_secs(1),
        attempts: 4,
        pause: Duration::from_millis(10),
        settle: Duration::from_secs(3),
        bytes_per_second: 1 << 20,
        ..Limits::default()
    }
}

pub(crate) async fn open(options: &S3Options) -> S3Store {
    S3Store::open(options.clone()).await.expect("open the store")
}

fn random() -> [u8; 16] {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).expect("randomness");
    bytes
}
