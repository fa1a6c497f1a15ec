//! The store contract, kept by every store we have, on the real thing: a directory, and a bucket of the S3 server that
//! `tests/run` starts. Faults are in `faults.rs`.

use std::sync::Arc;

use repository::store::directory::DirectoryStore;
use repository::store::probe::{Capabilities, probe};
use repository::store::s3::Checksums;
use repository::store::{Credentials, Store, StoreError, contract};
use repository::{Change, Encryption, Error, InitOptions, KeyFile, Keyring, Repository, Unlock};
use secrecy::SecretString;

use crate::lab::{bucket, client, endpoint, impatient, open};

#[tokio::test]
async fn a_directory_conforms() {
    let directory = tempfile::tempdir().expect("a directory");
    contract::conforms(&DirectoryStore::new(directory.path().join("not-yet"))).await;
}

#[tokio::test]
async fn s3_conforms() {
    contract::conforms(&open(&bucket("conforms").await).await).await;
}

#[tokio::test]
async fn s3_conforms_in_a_bucket_of_its_own_with_checksums_and_small_pages() {
    let mut options = bucket("always").await;
    options.prefix.clear();
    options.checksums = Checksums::Always;
    options.limits.page_keys = 7;
    let store = &open(&options).await;
    contract::keeps_what_was_put(store).await;
    contract::says_what_is_missing(store).await;
    contract::first_create_wins(store).await;
    contract::lists_by_prefix_in_order(store).await;
    contract::lists_more_than_a_page(store).await;
    contract::uploads_of_every_size(store).await;
    contract::ends_only_the_uploads_named(store).await;
}

#[tokio::test]
async fn s3_passes_the_probe_and_is_left_clean() {
    let options = bucket("probed").await;
    let store = open(&options).await;
    let found = probe(&store).await.expect("probe");
    assert_eq!(
        found,
        Capabilities {
            races_with_one_winner: 3,
            list_after_put: true,
            list_after_delete: true,
            deletes: true,
            ends_uploads: true,
            // SeaweedFS 4.48 lets several uploads of a race win, as a rule.
            completes_if_absent: found.completes_if_absent,
        }
    );
    assert_eq!(store.list("").await.expect("list"), []);
    let uploads = client()
        .list_multipart_uploads()
        .bucket(&options.bucket)
        .send()
        .await
        .expect("list uploads");
    assert!(uploads.uploads().is_empty(), "the probe left an upload");
}

/// Two stores in one bucket do not see each other.
#[tokio::test]
async fn a_prefix_is_a_world_of_its_own() {
    let mut options = bucket("prefix").await;
    let one = open(&options).await;
    options.prefix = "some/wher".to_owned();
    let other = open(&options).await;
    one.put("config", "one".into()).await.expect("put");
    assert_eq!(other.list("").await.expect("list"), []);
    other.put("config", "other".into()).await.expect("put");
    assert_eq!(one.get("config", 10).await.expect("get"), "one");
    assert_eq!(one.list("").await.expect("list").len(), 1);
}

#[tokio::test]
async fn a_url_opens_each_store() {
    let options = bucket("url").await;
    let credentials = Credentials {
        access_key_id: Some("AK".to_owned()),
        secret_access_key: Some(SecretString::from("SKSKSKSK")),
        ..Credentials::default()
    };
    let url = format!("s3://{}/deep/down?endpoint={}", options.bucket, endpoint());
    let store = repository::store::open(&url, &credentials).await.expect("open");
    assert_eq!(store.describe(), url);
    store.put("config", "x".into()).await.expect("put");
    let head = client().head_object().bucket(&options.bucket).key("deep/down/config").send().await;
    assert_eq!(head.expect("the object").content_length(), Some(1));

    let directory = tempfile::tempdir().expect("a directory");
    let url = format!("file://{}", directory.path().display());
    let store = repository::store::open(&url, &Credentials::default()).await.expect("open");
    store.put("config", "x".into()).await.expect("put");
    assert!(directory.path().join("config").is_file());
    repository::store::open("ftp://x", &Credentials::default()).await.expect_err("no such store");
}

/// An abandoned upload leaves no parts behind, without anybody's sweep.
#[tokio::test]
async fn a_dropped_upload_is_ended_in_the_background() {
    let options = bucket("dropped").await;
    let store = open(&options).await;
    let mut upload = store.upload("pack").await.expect("begin");
    for seed in 0..3 {
        upload.part(contract::sample(seed, 5 << 20)).await.expect("part");
    }
    let uploads = async || {
        let listed = client().list_multipart_uploads().bucket(&options.bucket).send().await;
        listed.expect("list uploads").uploads().len()
    };
    assert_eq!(uploads().await, 1);
    drop(upload);
    let ended = async {
        while uploads().await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), ended)
        .await
        .expect("the upload is ended");
}

/// The wrong secret, refused by the server that checks it: the code is told, the secret is not.
#[tokio::test]
async fn wrong_credentials_are_forbidden_by_every_verb() {
    let mut options = bucket("secret").await;
    let good = open(&options).await;
    good.put("config", "x".into()).await.expect("put");
    let pair = options.credentials.as_mut().expect("credentials");
    pair.secret_access_key = SecretString::from("TOPSECRET");
    let store = open(&options).await;
    let refusals = [
        store.put("a", "x".into()).await.err(),
        store.put_if_absent("a", "x".into()).await.err(),
        store.get("config", 10).await.err(),
        store.get_range("config", 0..1).await.err(),
        store.list("").await.err(),
        store.delete("config").await.err(),
        store.size("config").await.err(),
        store.abort_uploads(&["config".to_owned()]).await.err(),
    ];
    for (at, refusal) in refusals.into_iter().enumerate() {
        let Some(refusal @ StoreError::Forbidden { .. }) = refusal else {
            panic!("{at}: {refusal:?}")
        };
        let text = format!("{refusal}: {:?}", std::error::Error::source(&refusal));
        assert!(!format!("{text} {refusal:?} {store:?}").contains("TOPSECRET"), "{text}");
        // The answer to HEAD has no body, hence no code.
        assert!(
            text.contains("SignatureDoesNotMatch") || at == 6 && text.contains("403"),
            "{at}: {text}"
        );
    }
    assert_eq!(good.get("config", 10).await.expect("get"), "x", "nothing was deleted");
}

/// (Its administrator writing to a missing bucket creates it on this server, so that refusal is injected elsewhere.)
#[tokio::test]
async fn a_missing_bucket_is_named_by_every_verb_that_reads() {
    let mut options = bucket("gone").await;
    options.bucket.push_str("-not");
    let store = open(&options).await;
    for (at, refusal) in [
        store.get("a", 10).await.err(),
        store.get_range("a", 0..1).await.err(),
        store.get_range("a", 0..0).await.err(),
        store.size("a").await.err(),
        store.list("").await.err(),
        store.list_directories("").await.err(),
    ]
    .into_iter()
    .enumerate()
    {
        let Some(StoreError::NoStore { reason }) = refusal else { panic!("{at}: {refusal:?}") };
        assert!(reason.contains(&options.bucket) && reason.contains("create it"), "{at}: {reason}");
    }
}

#[tokio::test]
async fn an_endpoint_that_does_not_answer_is_unavailable() {
    let mut options = bucket("nobody").await;
    options.limits = impatient();
    for endpoint in ["http://127.0.0.1:1", "http://no-such-host.invalid"] {
        options.endpoint = Some(endpoint.to_owned());
        let refused = open(&options).await.put_if_absent("a", "x".into()).await;
        assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "{endpoint}: {refused:?}");
    }
}

/// Two people on two hosts, really at once: the answers of the server decide.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_rotations_at_once_on_s3_one_is_heard() {
    let options = bucket("keys").await;
    let store = || async { Arc::new(open(&options).await) as Arc<dyn Store> };
    let init = InitOptions { encryption: Encryption::KeyFile, now_ms: 1 };
    let created = Repository::init(store().await, init).await.expect("init");
    let mut key: KeyFile = created.key_file.expect("a key").parse().expect("a key file");
    for round in 0..5 {
        // Both have looked before either begins.
        let open = async || {
            let unlock = Unlock::KeyFile(&key);
            Keyring::open(store().await, unlock).await.expect("open")
        };
        let (ours, theirs) = (open().await, open().await);
        let rotate = |ring: Keyring, by: &str| {
            let by = by.to_owned();
            async move {
                let new = ring.new_key_file(&by).expect("a new key");
                let done = ring.rotate(&new, &Change { by, at_ms: round }).await;
                let file: KeyFile = new.recovery_sheet.parse().expect("a key file");
                (done, file)
            }
        };
        let (one, two) = tokio::join!(rotate(ours, "one"), rotate(theirs, "two"));
        let heard = [&one, &two].into_iter().filter(|(done, _)| done.is_ok()).count();
        assert_eq!(heard, 1, "round {round}: {one:?} {two:?}");
        let (won, lost) = if one.0.is_ok() { (one, two) } else { (two, one) };
        let refused = lost.0.expect_err("it lost");
        assert!(matches!(refused, Error::KeyChange { .. }), "round {round}: {refused}");
        for (file, opens) in [(&won.1, true), (&lost.1, false), (&key, false)] {
            let opened = Repository::open(store().await, Some(file)).await;
            assert_eq!(opened.is_ok(), opens, "round {round}: {file:?}: {opened:?}");
        }
        key = won.1;
    }
    assert_eq!(store().await.list("keys/").await.expect("list").len(), 1);
}
