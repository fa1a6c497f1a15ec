//! Stores that are not ill but odd: they lack something, forbid something, are full, or hold more than fits on a page.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures::{StreamExt as _, stream};
use proto::{AttemptId, LineageId, SystemIdentifier, WalFileName};
use repository::store::contract;
use repository::store::probe::{Capabilities, probe};
use repository::store::s3::{Checksums, S3Options, S3Store};
use repository::store::{PutOutcome, Staged, Store, StoreError};
use repository::{
    Amount, CollectOptions, Collected, Encryption, Error, InitOptions, Intent, Repository, Source,
    WalStored, WriteOptions,
};
use tokio_util::sync::CancellationToken;

use crate::common::{NOW_MS, SharedTree, Tree, facts, noise};
use crate::lab::{bucket, impatient, open};
use crate::proxy::{Fault, Proxy, refusal};

/// What a probe finds of a store that decides between uploads, which the one of the tests does while nobody races.
fn decides_between_uploads() -> Capabilities {
    Capabilities { completes_if_absent: true, ends_uploads: true, ..Capabilities::default() }
}

/// A new repository, with what a probe found of its store, and a lineage in it.
async fn a_lineage(store: Arc<dyn Store>, found: Option<Capabilities>) -> (Repository, LineageId) {
    let init = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let new = Repository::prepare(store, init).expect("prepare");
    let repository = new.create(found).await.expect("a repository");
    let cluster = "orders".parse().expect("a name");
    let identity = repository.find_or_mint_lineage(&cluster, SystemIdentifier(7), NOW_MS).await;
    let lineage = identity.expect("a lineage").lineage;
    (repository, lineage)
}

fn collecting() -> CollectOptions {
    CollectOptions {
        by: "a test".into(),
        now_ms: NOW_MS,
        grace_ms: 0,
        patience_ms: None,
        pins_for_ms: 0,
        lists_for_ms: None,
        cancel: CancellationToken::new(),
    }
}

async fn proxied(test: &str) -> (Proxy, S3Options, S3Store) {
    let mut options = bucket(test).await;
    options.limits = impatient();
    let direct = open(&options).await;
    let proxy = Proxy::start().await;
    options.endpoint = Some(proxy.url.clone());
    (proxy, options, direct)
}

#[tokio::test]
async fn those_that_meet_a_cluster_at_once_do_not_race_for_its_identity() {
    let (proxy, options, _direct) = proxied("meeting").await;
    let store: Arc<dyn Store> = Arc::new(open(&options).await);
    let init = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let repository = Repository::init(store, init).await.expect("a repository").repository;
    let cluster = "orders".parse().expect("a name");
    let meet = || repository.find_or_mint_lineage(&cluster, SystemIdentifier(7), NOW_MS);
    let met = futures::future::join_all((0..8).map(|_| meet())).await;
    let met: BTreeSet<LineageId> = met.into_iter().map(|it| it.expect("it").lineage).collect();
    assert_eq!(met.len(), 1);
    let is_one = |line: &&String| line.starts_with("PUT") && line.contains("/identity");
    let requests = proxy.requests();
    assert_eq!(requests.iter().filter(is_one).count(), 1, "{requests:?}");
}

/// What the SDK sends by default since 2025 and what many servers refuse.
const NEW_HEADERS: &[&str] =
    &["x-amz-checksum-", "x-amz-sdk-checksum-algorithm", "x-amz-trailer", "aws-chunked"];

#[tokio::test]
async fn a_store_that_knows_no_checksums_is_served_without() {
    let (proxy, mut options, _direct) = proxied("unchecked").await;
    for method in ["PUT", "POST"] {
        let refused = Fault::RefuseHeaders(NEW_HEADERS, refusal(501, "NotImplemented"));
        proxy.inject(method, "", usize::MAX, refused);
    }
    let store = open(&options).await;
    probe(&store).await.expect("nothing it does not know was sent");
    contract::keeps_what_was_put(&store).await;

    options.checksums = Checksums::Always;
    let refused = open(&options).await.put("x", "x".into()).await;
    assert!(matches!(refused, Err(StoreError::Unsuitable { .. })), "{refused:?}");
}

/// With the store's checksums, bytes that change on their way to it are refused by it, and sent again.
#[tokio::test]
async fn with_checksums_a_bit_that_flips_on_the_way_in_is_sent_again() {
    let (proxy, mut options, direct) = proxied("way-in").await;
    options.checksums = Checksums::Always;
    let store = open(&options).await;
    let bytes = contract::sample(1, 10_000);
    proxy.inject("PUT", "", 1, Fault::FlipRequest(5000));
    store.put("x", bytes.clone()).await.expect("put");
    proxy.inject("PUT", "", 1, Fault::FlipRequest(5000));
    store.put_if_absent("y", bytes.clone()).await.expect("create");
    assert!(proxy.is_spent());
    for key in ["x", "y"] {
        assert!(direct.get(key, 10_000).await.expect("get") == bytes, "{key}");
    }
}

#[tokio::test]
async fn a_store_that_ignores_the_condition_is_found_out() {
    let (proxy, options, _direct) = proxied("ignores").await;
    proxy.inject("PUT", "probe/", usize::MAX, Fault::IgnoreCondition);
    let found = probe(&open(&options).await).await;
    let Err(StoreError::Unsuitable { reason }) = &found else { panic!("{found:?}") };
    assert!(reason.contains("ignores the condition of a write"), "{reason}");
}

/// What decides between puts may decide nothing between uploads: then nothing is sent before its turn.
#[tokio::test]
async fn a_store_that_ignores_the_condition_of_an_upload_gets_no_upload_of_wal() {
    let (proxy, options, _direct) = proxied("ignores-late").await;
    let store = open(&options).await;
    proxy.inject("POST", "uploadId=", usize::MAX, Fault::IgnoreCondition);
    let found = probe(&store).await.expect("all else is as it should be");
    assert!(!found.completes_if_absent);
    proxy.forgive();
    let staged = store.stage("x", contract::sample(1, 1 << 20), &found).await.expect("stage");
    assert!(matches!(staged, Staged::Held(_)), "{staged:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_segment_that_waits_for_its_turn_is_with_the_server_already() {
    let options = bucket("turn").await;
    let direct = open(&options).await;
    let found = decides_between_uploads();
    let store: Arc<dyn Store> = Arc::new(direct.clone());
    let (repository, lineage) = a_lineage(store, Some(found)).await;
    let file: WalFileName = "000000010000000000000001".parse().expect("a name");
    let [content, other] = [1, 2].map(|seed| contract::sample(seed, 1 << 20));
    let stage = async |content: &Bytes| {
        let sealed = repository.seal_wal(lineage, &file, content.clone()).await.expect("seal");
        repository.stage_sealed_wal(sealed).await
    };
    let uploads = async || direct.uploads("").await.expect("uploads").len();
    let staged = stage(&content).await;
    assert_eq!(uploads().await, 1);
    assert_eq!(repository.fetch_wal(lineage, &file).await.expect("fetch"), None, "not its turn");
    let stored = repository.store_sealed_wal(staged).await.expect("store");
    assert_eq!(stored, WalStored::Created);
    let stored = repository.store_sealed_wal(stage(&content).await).await.expect("store");
    assert_eq!(stored, WalStored::AlreadyThere);
    let refused = repository.store_sealed_wal(stage(&other).await).await;
    assert!(matches!(refused, Err(Error::WalConflict { .. })), "{refused:?}");
    assert!(repository.fetch_wal(lineage, &file).await.expect("fetch") == Some(content.clone()));
    stage(&content).await.discard().await;
    assert_eq!(uploads().await, 0, "nothing is left");
    // What is only dropped is ended behind its back, as long as the process lives.
    drop(stage(&content).await);
    for _ in 0..1000 {
        if uploads().await == 0 {
            return;
        }
    }
    panic!("what was dropped is still there");
}

/// An upload of a file that came into the archive by other means is dead; one of a file that is not there may be on its way.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collection_ends_the_uploads_of_what_is_archived() {
    let options = bucket("archived").await;
    let direct = open(&options).await;
    let store: Arc<dyn Store> = Arc::new(direct.clone());
    let found = decides_between_uploads();
    let (repository, lineage) = a_lineage(store, None).await;
    let [there, coming] = ["000000010000000000000001", "000000010000000000000002"]
        .map(|name| format!("lineages/{lineage}/wal/00000001/{name}"));
    let bytes = contract::sample(1, 1 << 20);
    let dead = direct.stage(&there, bytes.clone(), &found).await.expect("stage");
    let living = direct.stage(&coming, bytes.clone(), &found).await.expect("stage");
    direct.put_if_absent(&there, bytes.clone()).await.expect("put");
    let options = collecting();
    let plan = repository.plan_collection(lineage, &options).await.expect("plan");
    plan.collect(&options).await.expect("collect");
    assert_eq!(direct.uploads("").await.expect("uploads"), std::slice::from_ref(&coming));
    let outcome = direct.put_staged_if_absent(&there, dead).await;
    assert_eq!(outcome.expect("it is known who was first"), PutOutcome::Exists);
    let outcome = direct.put_staged_if_absent(&coming, living).await.expect("put");
    assert_eq!(outcome, PutOutcome::Created);
    assert!(direct.get(&coming, 1 << 20).await.expect("get") == bytes);
}

/// Asking again makes no room.
#[tokio::test]
async fn a_full_store_is_asked_once() {
    let (proxy, options, _direct) = proxied("full").await;
    let store = open(&options).await;
    for (status, code) in
        [(507, "InsufficientStorage"), (403, "QuotaExceeded"), (507, "XMinioStorageFull")]
    {
        proxy.inject("PUT", "", 2, Fault::Answer(refusal(status, code)));
        let put = store.put("x", "x".into()).await;
        assert!(matches!(put, Err(StoreError::Full { .. })), "{code}: {put:?}");
        let created = store.put_if_absent("y", "y".into()).await;
        assert!(matches!(created, Err(StoreError::Full { .. })), "{code}: {created:?}");
        assert_eq!(proxy.requests().len(), 2, "{code}");
        assert!(proxy.is_spent());
    }
}

/// Credentials that have run out are told as such, whatever status the store has for it, and once.
#[tokio::test]
async fn credentials_that_ran_out_are_forbidden() {
    let (proxy, options, _direct) = proxied("expired").await;
    let store = open(&options).await;
    for (status, code) in [(400, "ExpiredToken"), (403, "ExpiredToken"), (400, "InvalidToken")] {
        proxy.inject("PUT", "x", 1, Fault::Answer(refusal(status, code)));
        let refused = store.put("x", "x".into()).await;
        assert!(matches!(refused, Err(StoreError::Forbidden { .. })), "{code}: {refused:?}");
        assert_eq!(proxy.requests().len(), 1, "{code}");
    }
}

/// Answers that pass, and that not every client takes for such.
#[tokio::test]
async fn answers_that_pass_are_waited_for() {
    let (proxy, options, direct) = proxied("passing").await;
    let store = open(&options).await;
    for (status, code) in [
        (429, "TooManyRequests"),
        (408, "RequestTimeout"),
        (400, "RequestTimeout"),
        (400, "BadDigest"),
        (400, "XAmzContentSHA256Mismatch"),
    ] {
        proxy.inject("PUT", "x", 2, Fault::Answer(refusal(status, code)));
        store.put("x", code.into()).await.unwrap_or_else(|error| panic!("{code}: {error:?}"));
        assert_eq!(direct.get("x", 100).await.expect("get"), code);
        proxy.inject("PUT", code, 2, Fault::Answer(refusal(status, code)));
        let key = format!("{code}-{status}");
        store.put_if_absent(&key, "y".into()).await.unwrap_or_else(|e| panic!("{code}: {e:?}"));
        assert!(proxy.is_spent(), "{code}");
    }
}

/// A store that fails at everything is not asked more and more: the repetitions are used up, and a success earns new ones.
#[tokio::test]
async fn a_store_that_fails_at_everything_is_not_stormed() {
    let (proxy, options, _direct) = proxied("storm").await;
    let store = open(&options).await;
    proxy.inject("PUT", "", usize::MAX, Fault::Answer(refusal(503, "SlowDown")));
    let began = Instant::now();
    let puts = stream::iter(0..300).map(|n| {
        let store = store.clone();
        async move { store.put(&format!("x-{n}"), "x".into()).await.is_err() }
    });
    assert!(puts.buffer_unordered(10).all(|failed| async move { failed }).await);
    let seconds = usize::try_from(began.elapsed().as_secs()).expect("small");
    let sent = proxy.requests().len();
    assert!(sent >= 300 + 50, "{sent} requests: nothing was repeated");
    assert!(sent <= 300 + 100 + seconds + 2, "{sent} requests for 300 in {seconds} s");

    proxy.forgive();
    for n in 0..20 {
        store.put(&format!("x-{n}"), "x".into()).await.expect("put");
    }
    proxy.inject("PUT", "", 3, Fault::Answer(refusal(503, "SlowDown")));
    store.put("x", "x".into()).await.expect("successes have earned it");
}

/// A name that nobody resolves is an outage: it is asked for again and told in time, and is no missing object.
#[tokio::test]
async fn a_name_that_is_not_resolved_is_an_outage_like_any_other() {
    let mut options = bucket("names").await;
    options.limits = impatient();
    options.endpoint = Some("http://store.invalid:8333".to_owned());
    let store = open(&options).await;
    let began = Instant::now();
    let failures = [
        store.get("x", 10).await.expect_err("read"),
        store.size("x").await.expect_err("look"),
        store.list("").await.expect_err("list"),
        store.put("x", "x".into()).await.expect_err("write"),
        store.put_if_absent("x", "x".into()).await.expect_err("create"),
        store.delete("x").await.expect_err("delete"),
    ];
    assert!(began.elapsed() < options.limits.answer * 12, "told in time");
    for failure in failures {
        assert!(matches!(failure, StoreError::Unavailable { .. }), "{failure:?}");
        let said = proto::Failure::from(Error::from(failure));
        assert_eq!(said.code, proto::Code::StoreUnavailable, "{said}");
        assert_eq!(said.action, proto::Action::Retry, "{said}");
    }
}

#[tokio::test]
async fn more_than_a_thousand_keys_come_in_pages() {
    let (proxy, options, direct) = proxied("thousand").await;
    let keys: Vec<String> = (0..1203).map(|n| format!("object-{n:04}")).collect();
    stream::iter(keys.clone())
        .map(|key| {
            let direct = direct.clone();
            async move { direct.put(&key, "x".into()).await.expect("put") }
        })
        .buffer_unordered(16)
        .collect::<()>()
        .await;
    let listed = open(&options).await.list("object-").await.expect("list");
    assert_eq!(listed.into_iter().map(|row| row.key).collect::<Vec<_>>(), keys);
    assert_eq!(proxy.requests().len(), 2);
}

/// Whoever may not delete is told so after a handful of requests. What was condemned stays condemned, and whoever may
/// delete finishes.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_may_not_delete_reclaims_nothing_and_makes_no_storm() {
    let (proxy, options, direct) = proxied("undeletable").await;
    let store: Arc<dyn Store> = Arc::new(open(&options).await);
    let (repository, lineage) = a_lineage(store, None).await;
    // Attempts that ended in ABORT: everything they stored is garbage.
    for n in 0..8 {
        let attempt = AttemptId::mint(NOW_MS.unsigned_abs(), [n; 10]);
        let intent = Intent { attempt, follows: None, by: "worker-1".into(), began_at_ms: NOW_MS };
        let begun = repository.begin(lineage, intent).await.expect("begin");
        let mut writer = begun.write(WriteOptions::default()).expect("write");
        let tree = Arc::new(Tree::new().file("a", noise(u64::from(n), 50_000)));
        let source: Arc<dyn Source> = Arc::new(SharedTree(Arc::clone(&tree)));
        let entries = tree.entries().into_iter().map(Ok);
        writer.copy(Arc::clone(&source), entries).await.expect("copy");
        writer.finish(source, Vec::new(), facts()).await.expect("finish");
        repository.abort(lineage, attempt, "worker-1", "a test", NOW_MS).await.expect("abort");
    }
    let collect = async || {
        let options = collecting();
        let plan = repository.plan_collection(lineage, &options).await.expect("plan");
        assert_eq!((plan.delete.packs, plan.keep), (16, Amount::default()));
        plan.collect(&options).await
    };
    let packs = async || {
        let listed = direct.list(&format!("lineages/{lineage}/packs/")).await.expect("list");
        listed.len()
    };
    proxy.requests();
    proxy.inject("DELETE", "", usize::MAX, Fault::Answer(refusal(403, "AccessDenied")));
    let refused = collect().await;
    let Err(Error::Store(StoreError::Forbidden { key, .. })) = &refused else {
        panic!("{refused:?}")
    };
    assert!(key.contains("/packs/"), "{key}");
    let deletes = proxy.requests().iter().filter(|line| line.starts_with("DELETE")).count();
    assert!((1..=8).contains(&deletes), "{deletes} requests for 16 packs");
    assert_eq!(packs().await, 16);
    let lists = direct.list(&format!("lineages/{lineage}/gc/")).await.expect("list");
    assert_eq!(lists.len(), 2, "its list no longer counts: {lists:?}");

    proxy.forgive();
    let done = collect().await.expect("collect");
    assert!(matches!(&done, Collected::Done(done) if done.deleted.packs == 16), "{done:?}");
    assert_eq!(packs().await, 0);
}
