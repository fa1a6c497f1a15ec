//! S3 as it is on a bad day: answers that are lost, late, cut or wrong, with the real server behind a proxy. What is
//! checked is always both: what the caller was told, and what is in the bucket.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use proto::{Code, Failure};
use repository::store::contract::sample;
use repository::store::probe::Capabilities;
use repository::store::s3::{S3Options, S3Store};
use repository::store::{PutOutcome, Staged, Store, StoreError};
use repository::{Encryption, InitOptions, Repository};

use crate::lab::{bucket, client, endpoint, impatient, open};
use crate::proxy::{Canned, Fault, Proxy, refusal};

const MIB: usize = 1 << 20;

/// A store behind a proxy, and the same one without.
struct Lab {
    proxy: Proxy,
    store: S3Store,
    direct: S3Store,
    options: S3Options,
}

async fn lab(test: &str) -> Lab {
    let mut options = bucket(test).await;
    options.limits = impatient();
    let direct = open(&options).await;
    let proxy = Proxy::start().await;
    options.endpoint = Some(proxy.url.clone());
    let store = open(&options).await;
    Lab { proxy, store, direct, options }
}

fn cause(error: &StoreError) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

impl Lab {
    fn puts(&self) -> usize {
        self.proxy.requests().iter().filter(|request| request.starts_with("PUT")).count()
    }

    async fn uploads_in_progress(&self) -> usize {
        let listed = client().list_multipart_uploads().bucket(&self.options.bucket).send().await;
        listed.expect("list uploads").uploads().len()
    }
}

// Create-if-absent.

/// The write happened, its answer did not arrive, and an SDK's blind retry would read 412 as "somebody else".
#[tokio::test]
async fn a_created_object_whose_answer_was_lost_is_ours() {
    let lab = lab("lost").await;
    for (at, fault) in [
        Fault::LoseAnswer,
        Fault::CarryOutAndAnswer(refusal(500, "InternalError")),
        Fault::CarryOutAndAnswer(refusal(503, "SlowDown")),
        Fault::CarryOutAndAnswer(refusal(412, "PreconditionFailed")),
        Fault::CarryOutAndAnswer(refusal(409, "ConditionalRequestConflict")),
        Fault::CarryOutAndAnswer(Canned {
            status: 504,
            headers: &[],
            body: "<html>gateway</html>".to_owned(),
        }),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("verdict-{at}");
        lab.proxy.inject("PUT", "verdict", 1, fault.clone());
        let outcome = lab.store.put_if_absent(&key, sample(1, 300)).await;
        assert_eq!(outcome.expect("create"), PutOutcome::Created, "{fault:?}");
        assert!(lab.direct.get(&key, 300).await.expect("get") == sample(1, 300));
        assert_eq!(lab.puts(), 1, "{fault:?}: it was ours at the first look");
        assert_eq!(
            lab.store.put_if_absent(&key, sample(1, 300)).await.expect("create"),
            PutOutcome::Exists
        );
        lab.proxy.requests();
    }
    assert!(lab.proxy.is_spent());
}

/// The same with somebody else's object there, even one of the same bytes: never "created".
#[tokio::test]
async fn a_lost_refusal_is_still_a_refusal() {
    let lab = lab("refused").await;
    for (at, fault) in [
        Fault::LoseAnswer,
        Fault::CarryOutAndAnswer(refusal(500, "InternalError")),
        Fault::CarryOutAndAnswer(refusal(409, "ConditionalRequestConflict")),
        Fault::CutRequest(200),
        Fault::Hang,
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("verdict-{at}");
        assert_eq!(
            lab.direct.put_if_absent(&key, sample(1, 300)).await.expect("create"),
            PutOutcome::Created
        );
        lab.proxy.inject("PUT", "verdict", 1, fault.clone());
        let outcome = lab.store.put_if_absent(&key, sample(1, 300)).await;
        assert_eq!(outcome.expect("create"), PutOutcome::Exists, "{fault:?}");
    }
    assert!(lab.proxy.is_spent());
}

/// 409 is "ask again", not "exists"; a request that never arrived whole is sent again.
#[tokio::test]
async fn a_write_that_did_not_happen_is_repeated() {
    let lab = lab("again").await;
    for (at, fault) in [
        Fault::Answer(refusal(409, "ConditionalRequestConflict")),
        Fault::Answer(refusal(409, "OperationAborted")),
        Fault::Answer(refusal(500, "InternalError")),
        Fault::Answer(refusal(503, "SlowDown")),
        Fault::Answer(refusal(429, "TooManyRequests")),
        // The SDK learns the skew from the first answer.
        Fault::Answer(refusal(403, "RequestTimeTooSkewed")),
        Fault::CutRequest(1),
        Fault::CutRequest(100_000),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("verdict-{at}");
        lab.proxy.inject("PUT", "verdict", 2, fault.clone());
        let outcome = lab.store.put_if_absent(&key, sample(1, 300)).await;
        assert_eq!(outcome.expect("create"), PutOutcome::Created, "{fault:?}");
        assert_eq!(lab.puts(), 3, "{fault:?}");
    }
    assert!(lab.proxy.is_spent());
}

/// When neither the write nor the question is answered, the outcome stays unknown: an error, after a bounded time.
#[tokio::test]
async fn an_unknown_outcome_is_asked_for_and_never_guessed() {
    let lab = lab("unknown").await;
    // The question fails a few times only: the answer is found.
    lab.proxy.inject("PUT", "one", 1, Fault::LoseAnswer);
    lab.proxy.inject("HEAD", "one", 6, Fault::Answer(refusal(503, "SlowDown")));
    assert_eq!(
        lab.store.put_if_absent("one", "x".into()).await.expect("create"),
        PutOutcome::Created
    );

    // The question is never answered.
    lab.proxy.inject("PUT", "two", usize::MAX, Fault::LoseAnswer);
    lab.proxy.inject("HEAD", "two", usize::MAX, Fault::Answer(refusal(503, "SlowDown")));
    let began = Instant::now();
    let outcome = lab.store.put_if_absent("two", "x".into()).await;
    assert!(matches!(outcome, Err(StoreError::Unavailable { .. })), "{outcome:?}");
    assert!(began.elapsed() >= Duration::from_secs(3), "gave up before the time was over");
    assert!(began.elapsed() < Duration::from_secs(30), "took {:?}", began.elapsed());
}

/// A refusal that asking again cannot change is told at once.
#[tokio::test]
async fn a_final_refusal_ends_a_create() {
    let lab = lab("final").await;
    lab.proxy.inject("PUT", "x", 1, Fault::Answer(refusal(403, "AccessDenied")));
    let refused = lab.store.put_if_absent("x", "x".into()).await;
    assert!(matches!(refused, Err(StoreError::Forbidden { .. })), "{refused:?}");
    lab.proxy.inject("PUT", "x", 1, Fault::Answer(refusal(501, "NotImplemented")));
    let refused = lab.store.put_if_absent("x", "x".into()).await;
    assert!(matches!(refused, Err(StoreError::Unsuitable { .. })), "{refused:?}");
    assert_eq!(lab.puts(), 2);
}

/// A store that forgets metadata: where every answer was heard it can be told who won; where one was lost it is said.
#[tokio::test]
async fn without_metadata_a_lost_answer_stays_open() {
    let lab = lab("unmarked").await;
    lab.proxy.inject("HEAD", "", usize::MAX, Fault::StripHeader("x-amz-meta-"));
    assert_eq!(
        lab.store.put_if_absent("a", "ours".into()).await.expect("create"),
        PutOutcome::Created
    );
    assert_eq!(
        lab.store.put_if_absent("a", "ours".into()).await.expect("create"),
        PutOutcome::Exists
    );

    lab.proxy.inject("PUT", "", 1, Fault::LoseAnswer);
    assert_eq!(
        lab.store.put_if_absent("a", "other".into()).await.expect("create"),
        PutOutcome::Exists
    );

    lab.proxy.inject("PUT", "", 1, Fault::LoseAnswer);
    let open = lab.store.put_if_absent("b", "ours".into()).await.expect_err("nobody can tell");
    assert!(cause(&open).contains("does not keep user metadata"), "{open:?}");
}

// Reading.

#[tokio::test]
async fn a_body_that_breaks_off_or_stalls_is_fetched_again() {
    let lab = lab("body").await;
    let bytes = sample(1, 300_000);
    lab.direct.put("object", bytes.clone()).await.expect("put");
    for fault in
        [Fault::CutBody(0), Fault::CutBody(100_000), Fault::StallBody(0), Fault::StallBody(200_000)]
    {
        lab.proxy.inject("GET", "object", 2, fault.clone());
        assert!(lab.store.get("object", 1 << 20).await.expect("get") == bytes, "{fault:?}");
        lab.proxy.inject("GET", "object", 1, fault.clone());
        let got = lab.store.get_range("object", 1000..250_000).await.expect("range");
        assert!(got == bytes[1000..250_000], "{fault:?}");
    }
    assert!(lab.proxy.is_spent());
}

#[tokio::test]
async fn a_body_that_never_comes_whole_is_an_error_in_time() {
    let mut lab = lab("never").await;
    lab.options.limits.answer = Duration::from_secs(1);
    let store = open(&lab.options).await;
    lab.direct.put("object", sample(1, 300_000)).await.expect("put");
    for fault in
        [Fault::CutBody(1000), Fault::StallBody(1000), Fault::Drip(Duration::from_millis(100))]
    {
        lab.proxy.inject("GET", "object", 3, fault.clone());
        let began = Instant::now();
        let refused = store.get("object", 1 << 20).await.expect_err("no whole body came");
        assert!(cause(&refused).contains("3 times"), "{fault:?}: {refused:?}");
        assert!(began.elapsed() < Duration::from_secs(15), "{fault:?} took {:?}", began.elapsed());
    }
    assert!(lab.proxy.is_spent());
}

/// The limit holds before a byte of the body is read.
#[tokio::test]
async fn a_huge_object_is_refused_by_its_head() {
    let lab = lab("huge").await;
    lab.direct.put("object", sample(1, 300_000)).await.expect("put");
    lab.proxy.inject("GET", "object", 1, Fault::StallBody(0));
    let refused = lab.store.get("object", 299_999).await.expect_err("too large");
    assert!(cause(&refused).contains("300000"), "{refused:?}");
    assert_eq!(lab.proxy.requests().len(), 1, "waited for the body, and asked again");
}

/// A cache or a server that ignores the range: whatever came is not taken for what was asked, and asked for again.
#[tokio::test]
async fn another_range_than_asked_for_is_refused() {
    let lab = lab("range").await;
    lab.direct.put("object", "0123456789".into()).await.expect("put");
    for (status, headers) in [
        (200, &[][..]),
        (206, &[("content-range", "bytes 0-3/10")][..]),
        (206, &[("content-range", "bytes 2-4/10")][..]),
        (206, &[][..]),
    ] {
        let other = Fault::Answer(Canned { status, headers, body: "0123".to_owned() });
        lab.proxy.inject("GET", "object", 3, other.clone());
        let refused =
            lab.store.get_range("object", 2..6).await.expect_err("not what was asked for");
        assert!(cause(&refused).contains("were asked for"), "{refused:?}");
        lab.proxy.inject("GET", "object", 1, other);
        let got = lab.store.get_range("object", 2..6).await.expect("the next answer is right");
        assert_eq!(got, "2345");
    }
    assert!(lab.proxy.is_spent());
}

// Staged: sent before its turn, and put by completing the upload where there is nothing.

async fn stage(lab: &Lab, key: &str) -> Staged {
    let found =
        Capabilities { completes_if_absent: true, ends_uploads: true, ..Capabilities::default() };
    let staged = lab.store.stage(key, sample(1, MIB), &found).await.expect("stage");
    assert!(matches!(staged, Staged::Sent(_)), "{staged:?}");
    staged
}

#[tokio::test]
async fn what_was_staged_is_ours_or_somebody_elses_whatever_is_heard_of_it() {
    let lab = lab("staged").await;
    for (at, fault) in [
        Fault::LoseAnswer,
        Fault::CarryOutAndAnswer(refusal(500, "InternalError")),
        Fault::CarryOutAndAnswer(refusal(412, "PreconditionFailed")),
        Fault::CarryOutAndAnswer(Canned { status: 200, headers: &[], body: String::new() }),
        Fault::Answer(refusal(409, "ConditionalRequestConflict")),
        Fault::Answer(refusal(503, "SlowDown")),
        Fault::CutRequest(100),
    ]
    .into_iter()
    .enumerate()
    {
        let (ours, theirs) = (format!("ours-{at}"), format!("theirs-{at}"));
        let (staged, late) = (stage(&lab, &ours).await, stage(&lab, &theirs).await);
        lab.direct.put_if_absent(&theirs, sample(2, MIB)).await.expect("put");
        lab.proxy.inject("POST", "uploadId=", 1, fault.clone());
        let outcome = lab.store.put_staged_if_absent(&ours, staged).await;
        assert_eq!(outcome.expect("put"), PutOutcome::Created, "{fault:?}");
        assert!(lab.direct.get(&ours, 1 << 30).await.expect("get") == sample(1, MIB), "{fault:?}");
        lab.proxy.inject("POST", "uploadId=", 1, fault.clone());
        let outcome = lab.store.put_staged_if_absent(&theirs, late).await;
        assert_eq!(outcome.expect("put"), PutOutcome::Exists, "{fault:?}");
        assert!(lab.direct.get(&theirs, 1 << 30).await.expect("get") == sample(2, MIB));
    }
    assert!(lab.proxy.is_spent());
    assert_eq!(lab.uploads_in_progress().await, 0);
}

#[tokio::test]
async fn what_was_staged_and_ended_by_somebody_is_not_there_and_not_said_to_be() {
    let lab = lab("ended").await;
    let staged = stage(&lab, "wal").await;
    assert_eq!(lab.direct.abort_uploads(&["wal".to_owned()]).await.expect("abort"), 1);
    let put = lab.store.put_staged_if_absent("wal", staged).await;
    assert!(matches!(put, Err(StoreError::Unavailable { .. })), "{put:?}");
    assert!(matches!(lab.direct.size("wal").await, Err(StoreError::NotFound { .. })));

    let staged = stage(&lab, "wal").await;
    let elsewhere = lab.store.put_staged_if_absent("other", staged).await;
    assert!(matches!(elsewhere, Err(StoreError::Unsuitable { .. })), "{elsewhere:?}");
}

// Uploads.

async fn three_parts(lab: &Lab, key: &str) -> (Result<(), StoreError>, Bytes) {
    let mut whole = Vec::new();
    let mut upload = lab.store.upload(key).await.expect("begin");
    for seed in 0..3 {
        let part = sample(seed, 5 * MIB);
        whole.extend_from_slice(&part);
        if let Err(error) = upload.part(part).await {
            return (Err(error), whole.into());
        }
    }
    (upload.complete().await, whole.into())
}

/// The parts were joined, whatever was said about it; and where it was said although they were not, it is asked again.
#[tokio::test]
async fn the_end_of_an_upload_is_settled_by_the_object() {
    let lab = lab("complete").await;
    let error_in_200 = Canned { status: 200, ..refusal(200, "InternalError") };
    let empty_200 = Canned { status: 200, headers: &[], body: String::new() };
    for (at, fault) in [
        Fault::LoseAnswer,
        Fault::CarryOutAndAnswer(refusal(500, "InternalError")),
        Fault::CarryOutAndAnswer(error_in_200.clone()),
        Fault::CarryOutAndAnswer(empty_200.clone()),
        Fault::CarryOutAndAnswer(refusal(404, "NoSuchUpload")),
        Fault::Answer(error_in_200),
        Fault::Answer(empty_200),
        Fault::Answer(refusal(503, "SlowDown")),
        Fault::CutRequest(300),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("pack-{at}");
        lab.proxy.inject("POST", "uploadId=", 1, fault.clone());
        let (completed, whole) = three_parts(&lab, &key).await;
        completed.unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        assert!(lab.direct.get(&key, 1 << 30).await.expect("get") == whole, "{fault:?}");
    }
    assert!(lab.proxy.is_spent());
    assert_eq!(lab.uploads_in_progress().await, 0);
}

/// An answer that only looks like a success is none, however often it comes.
#[tokio::test]
async fn an_upload_that_is_never_joined_fails() {
    let lab = lab("phantom").await;
    for fault in [
        Fault::Answer(Canned { status: 200, ..refusal(200, "InternalError") }),
        Fault::Answer(Canned { status: 200, headers: &[], body: String::new() }),
        Fault::Answer(refusal(404, "NoSuchUpload")),
        Fault::Answer(refusal(400, "InvalidPart")),
    ] {
        lab.proxy.inject("POST", "uploadId=", usize::MAX, fault.clone());
        let (completed, _) = three_parts(&lab, "pack").await;
        let refused = completed.expect_err("nothing was joined");
        assert!(matches!(refused, StoreError::Unavailable { .. }), "{fault:?}: {refused:?}");
        assert!(matches!(lab.direct.size("pack").await, Err(StoreError::NotFound { .. })));
        lab.proxy.forgive();
    }
}

/// An older object of the same size under the key does not pass for ours.
#[tokio::test]
async fn an_upload_is_not_proved_by_somebody_elses_object() {
    let lab = lab("impostor").await;
    lab.direct.put("pack", sample(9, 15 * MIB)).await.expect("put");
    lab.proxy.inject("POST", "uploadId=", 1, Fault::Answer(refusal(404, "NoSuchUpload")));
    let (completed, _) = three_parts(&lab, "pack").await;
    completed.expect_err("the object that is there is not this upload's");
}

#[tokio::test]
async fn parts_survive_a_bad_line() {
    let lab = lab("parts").await;
    lab.proxy.inject("POST", "?uploads", 2, Fault::Answer(refusal(503, "SlowDown")));
    for (at, (times, fault)) in [
        (2, Fault::Answer(refusal(503, "SlowDown"))),
        (2, Fault::CutRequest(3 * MIB)),
        (2, Fault::LoseAnswer),
        (2, Fault::CarryOutAndAnswer(refusal(500, "InternalError"))),
        (1, Fault::Hang),
    ]
    .into_iter()
    .enumerate()
    {
        let key = format!("pack-{at}");
        lab.proxy.inject("PUT", "partNumber=2", times, fault.clone());
        let (completed, whole) = three_parts(&lab, &key).await;
        completed.unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        assert!(lab.direct.get(&key, 1 << 30).await.expect("get") == whole, "{fault:?}");
    }
    assert!(lab.proxy.is_spent());
}

/// An upload whose beginning was not answered is begun again, and the first one does not stay behind: neither when the
/// second one is completed, nor when everything fails.
#[tokio::test]
async fn an_upload_that_began_twice_is_ended_twice() {
    let lab = lab("twice").await;
    for fault in [
        Fault::LoseAnswer,
        Fault::CarryOutAndAnswer(refusal(500, "InternalError")),
        Fault::CutBody(10),
    ] {
        lab.proxy.inject("POST", "?uploads", 2, fault.clone());
        let (completed, whole) = three_parts(&lab, "pack").await;
        completed.unwrap_or_else(|error| panic!("{fault:?}: {error:?}"));
        assert!(lab.direct.get("pack", 1 << 30).await.expect("get") == whole, "{fault:?}");
        assert_eq!(lab.uploads_in_progress().await, 0, "{fault:?}");
    }
    lab.proxy.inject("POST", "?uploads", usize::MAX, Fault::LoseAnswer);
    let mut upload = lab.store.upload("never").await.expect("begin");
    upload.part(sample(1, 5 * MIB)).await.expect_err("its id was never heard");
    assert_eq!(lab.uploads_in_progress().await, 4);
    upload.abort().await.expect("abort");
    assert_eq!(lab.uploads_in_progress().await, 0);
}

/// A part that fails for good fails the upload: it can no longer be completed, and its parts are thrown away.
#[tokio::test]
async fn a_part_that_fails_for_good_fails_the_upload() {
    let lab = lab("broken").await;
    lab.proxy.inject(
        "PUT",
        "partNumber=1",
        usize::MAX,
        Fault::Answer(refusal(507, "InsufficientStorage")),
    );
    let (completed, _) = three_parts(&lab, "pack").await;
    let refused = completed.expect_err("part 1 is not there");
    assert!(matches!(refused, StoreError::Full { .. }), "{refused:?}");
    assert!(matches!(lab.direct.size("pack").await, Err(StoreError::NotFound { .. })));
    let ended = async {
        while lab.uploads_in_progress().await > 0 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("the upload is ended");
}

/// Whoever goes on although a part failed, or did not wait for a part, does not get an object with a hole.
#[tokio::test]
async fn an_upload_with_a_hole_cannot_be_completed() {
    let lab = lab("hole").await;
    let part = sample(1, 5 * MIB);
    lab.proxy.inject("PUT", "partNumber=2", 1, Fault::Answer(refusal(403, "AccessDenied")));
    let mut upload = lab.store.upload("failed").await.expect("begin");
    let mut told = false;
    for _ in 0..8 {
        told |= upload.part(part.clone()).await.is_err();
    }
    assert!(told, "the failure of part 2 is told before the end");
    upload.complete().await.expect_err("part 2 is missing");

    lab.proxy.inject("PUT", "partNumber", 4, Fault::Hang);
    let mut upload = lab.store.upload("given-up").await.expect("begin");
    for _ in 0..4 {
        upload.part(part.clone()).await.expect("part");
    }
    let given_up =
        tokio::time::timeout(Duration::from_millis(100), upload.part(part.clone())).await;
    assert!(given_up.is_err(), "part 5 has to wait");
    upload.part(part.clone()).await.expect_err("part 5 was given up");
    upload.complete().await.expect_err("part 5 is missing");
    assert_eq!(lab.direct.list("").await.expect("list"), []);
}

/// Memory: with the store standing still, a few parts are taken and the next one waits; over all uploads together, too.
#[tokio::test]
async fn a_standing_store_holds_the_writers_back() {
    let mut lab = lab("bounded").await;
    lab.options.limits.answer = Duration::from_mins(1);
    let store = open(&lab.options).await;
    lab.proxy.inject("PUT", "partNumber", usize::MAX, Fault::Hang);
    let part = sample(1, 5 * MIB);
    let mut uploads = Vec::new();
    for (key, takes) in [("one", 4), ("two", 2), ("three", 0)] {
        let mut upload = store.upload(key).await.expect("begin");
        for _ in 0..takes {
            upload.part(part.clone()).await.expect("part");
        }
        let more = tokio::time::timeout(Duration::from_secs(1), upload.part(part.clone())).await;
        assert!(more.is_err(), "{key}: more than {takes} parts are held in memory");
        uploads.push(upload);
    }
    for upload in uploads {
        upload.abort().await.expect("abort");
    }
    assert_eq!(lab.uploads_in_progress().await, 0);
    lab.proxy.forgive();
    let (completed, _) = three_parts(&lab, "after").await;
    completed.expect("what was aborted holds nothing back");
}

// Everything else.

/// Every third request is answered 503: all verbs still work, and the requests do not multiply.
#[tokio::test]
async fn slow_down_is_obeyed() {
    let lab = lab("slowdown").await;
    lab.proxy.inject_every(3, Fault::Answer(refusal(503, "SlowDown")));
    for n in 0..20_u64 {
        let key = format!("object-{n}");
        lab.store.put(&key, sample(n, 1000)).await.expect("put");
        assert!(lab.store.get(&key, 1000).await.expect("get") == sample(n, 1000));
        assert_eq!(lab.store.size(&key).await.expect("size"), 1000);
    }
    assert_eq!(lab.store.list("").await.expect("list").len(), 20);
    for n in 0..20 {
        lab.store.delete(&format!("object-{n}")).await.expect("delete");
    }
    assert_eq!(lab.store.list("").await.expect("list"), []);
    let sent = lab.proxy.requests().len();
    assert!(sent <= 2 * 82, "{sent} requests for 82");
}

/// A listing in which a page fails is repeated or an error, never a shorter listing.
#[tokio::test]
async fn a_listing_is_whole_or_an_error() {
    let mut lab = lab("pages").await;
    lab.options.limits.page_keys = 3;
    let store = open(&lab.options).await;
    for n in 0..10 {
        lab.direct.put(&format!("object-{n}"), "x".into()).await.expect("put");
    }
    for fault in [Fault::Answer(refusal(503, "SlowDown")), Fault::CutBody(300), Fault::LoseAnswer] {
        lab.proxy.inject("GET", "continuation-token", 1, fault.clone());
        assert_eq!(store.list("").await.expect("list").len(), 10, "{fault:?}");
    }
    let truncated =
        "<ListBucketResult><IsTruncated>true</IsTruncated></ListBucketResult>".to_owned();
    lab.proxy.inject(
        "GET",
        "continuation-token",
        1,
        Fault::Answer(Canned { status: 200, headers: &[], body: truncated }),
    );
    store.list("").await.expect_err("a page without a way on");
    lab.proxy.inject(
        "GET",
        "continuation-token",
        usize::MAX,
        Fault::Answer(refusal(403, "AccessDenied")),
    );
    let refused = store.list("").await;
    assert!(matches!(refused, Err(StoreError::Forbidden { .. })), "{refused:?}");
}

/// What a server says about the configuration becomes the cure.
#[tokio::test]
async fn refusals_are_told_apart() {
    let lab = lab("told").await;
    let told = async |canned: Canned| {
        lab.proxy.inject("PUT", "x", usize::MAX, Fault::Answer(canned));
        let error = lab.store.put("x", "x".into()).await.expect_err("refused");
        lab.proxy.forgive();
        let text = cause(&error);
        (error, text)
    };
    for (status, code) in
        [(507, "InsufficientStorage"), (403, "QuotaExceeded"), (507, "XMinioStorageFull")]
    {
        let (error, text) = told(refusal(status, code)).await;
        assert!(matches!(error, StoreError::Full { .. }) && text.contains(code), "{error:?}");
    }
    let (error, text) = told(refusal(403, "AccessDenied")).await;
    assert!(
        matches!(error, StoreError::Forbidden { .. })
            && text.contains("AccessDenied: injected (HTTP 403"),
        "{text}"
    );
    let (error, text) = told(refusal(403, "InvalidAccessKeyId")).await;
    assert!(
        matches!(error, StoreError::Forbidden { .. }) && text.contains("InvalidAccessKeyId"),
        "{text}"
    );

    let elsewhere = Canned {
        headers: &[("x-amz-bucket-region", "eu-north-1")],
        ..refusal(301, "PermanentRedirect")
    };
    let (error, text) = told(elsewhere).await;
    assert!(
        matches!(error, StoreError::Unsuitable { .. }) && text.contains("use region=eu-north-1"),
        "{text}"
    );

    let skewed = Canned {
        headers: &[("date", "Mon, 01 Jan 2001 00:00:00 GMT")],
        ..refusal(403, "RequestTimeTooSkewed")
    };
    let (error, text) = told(skewed).await;
    assert!(matches!(error, StoreError::Forbidden { .. }), "{error:?}");
    assert!(
        text.contains("RequestTimeTooSkewed") && text.contains("s ahead of the store's"),
        "{text}"
    );

    lab.proxy.inject("GET", "x", 1, Fault::Answer(refusal(403, "AccessDenied")));
    let refused = lab.store.get("x", 10).await.expect_err("refused");
    assert!(matches!(refused, StoreError::Forbidden { .. }), "{refused:?}");
    assert!(cause(&refused).contains("right to list the bucket"), "{refused:?}");

    let (error, text) = told(refusal(404, "NoSuchBucket")).await;
    assert!(matches!(error, StoreError::NoStore { .. }) && text.contains("create it"), "{text}");

    let (_, text) =
        told(Canned { status: 502, headers: &[], body: "<html>\n bad gateway</html>".to_owned() })
            .await;
    assert!(text.contains("HTTP 502"), "{text}");
}

/// Whoever looks for a repository is told that it is gone when the store says that its bucket is, and only then: what may not be
/// read, or does not answer, may be there.
#[tokio::test]
async fn a_repository_goes_with_its_bucket_and_not_with_the_right_to_read_it() {
    let lab = lab("gone").await;
    let options = InitOptions { encryption: Encryption::Off, now_ms: 1 };
    Repository::init(Arc::new(lab.direct.clone()), options).await.expect("make a repository");
    let store: Arc<dyn Store> = Arc::new(lab.store.clone());
    let opened = async || {
        let opened = Repository::open(Arc::clone(&store), None).await;
        opened.map(drop).map_err(|error| Failure::from(error).code)
    };
    assert_eq!(opened().await, Ok(()));
    for (status, code, told) in [
        (404, "NoSuchBucket", Code::RepositoryMissing),
        (404, "NoSuchKey", Code::RepositoryMissing),
        (403, "AccessDenied", Code::StoreForbidden),
        (404, "NoSuchWebsite", Code::StoreUnavailable),
    ] {
        lab.proxy.inject("GET", "", usize::MAX, Fault::Answer(refusal(status, code)));
        assert_eq!(opened().await, Err(told), "{code}");
        lab.proxy.forgive();
    }
    assert_eq!(opened().await, Ok(()));
}

/// The 404 of some other web server, or of a proxy that lost its way, does not make an object missing.
#[tokio::test]
async fn only_s3_itself_says_that_an_object_is_missing() {
    let lab = lab("lostway").await;
    lab.direct.put("x", "x".into()).await.expect("put");
    for method in ["GET", "HEAD", "DELETE"] {
        let page = Canned { status: 404, headers: &[], body: String::new() };
        lab.proxy.inject(method, "x", usize::MAX, Fault::Answer(page));
    }
    for refused in [
        lab.store.get("x", 10).await.err(),
        lab.store.get_range("x", 0..1).await.err(),
        lab.store.size("x").await.err(),
        lab.store.delete("x").await.err(),
    ] {
        assert!(matches!(refused, Some(StoreError::Unavailable { .. })), "{refused:?}");
    }
    assert_eq!(
        lab.store.put_if_absent("x", "x".into()).await.ok(),
        None,
        "neither created nor somebody else's"
    );
}

/// Without checksums, as servers that imitate S3 need it: no header they do not know, no body coding, a plain length.
#[tokio::test]
async fn another_endpoint_gets_plain_requests() {
    let lab = lab("plain").await;
    let (completed, _) = three_parts(&lab, "pack").await;
    completed.expect("upload");
    lab.store.put("x", sample(1, 1000)).await.expect("put");
    lab.store.put_if_absent("y", sample(1, 1000)).await.expect("create");
    let heads = lab.proxy.heads();
    assert_eq!(heads.len(), 7);
    for head in heads.iter().map(|head| head.to_ascii_lowercase()) {
        for unknown in [
            "x-amz-checksum",
            "x-amz-sdk-checksum",
            "x-amz-trailer",
            "aws-chunked",
            "transfer-encoding",
            "expect:",
        ] {
            assert!(!head.contains(unknown), "{unknown} in {head}");
        }
        assert!(
            head.contains("\r\ncontent-length: ")
                || head.starts_with("post /") && head.contains("?uploads"),
            "{head}"
        );
    }
}

/// A delete that is forbidden is an error, once; a delete of what is gone is not.
#[tokio::test]
async fn deleting_is_honest() {
    let lab = lab("delete").await;
    lab.direct.put("x", "x".into()).await.expect("put");
    lab.proxy.inject("DELETE", "x", 1, Fault::Answer(refusal(403, "AccessDenied")));
    let refused = lab.store.delete("x").await;
    assert!(matches!(refused, Err(StoreError::Forbidden { .. })), "{refused:?}");
    assert_eq!(lab.proxy.requests().len(), 1, "no storm of errors");
    lab.proxy.inject("DELETE", "x", 1, Fault::LoseAnswer);
    lab.store.delete("x").await.expect("delete");
    assert!(matches!(lab.direct.size("x").await, Err(StoreError::NotFound { .. })));
    lab.proxy.inject("DELETE", "x", 1, Fault::Answer(refusal(404, "NoSuchKey")));
    lab.store.delete("x").await.expect("delete again");
}

/// Connections are used again: a handshake for each call would dominate small objects.
#[tokio::test]
async fn connections_are_kept() {
    let lab = lab("kept").await;
    for n in 0..20_u64 {
        let key = format!("object-{n}");
        lab.store.put_if_absent(&key, sample(n, 100)).await.expect("create");
        lab.store.put(&key, sample(n, 100)).await.expect("put");
        lab.store.get(&key, 100).await.expect("get");
    }
    assert!(
        lab.proxy.connections() <= 3,
        "{} connections for 60 requests",
        lab.proxy.connections()
    );
    assert!(endpoint().starts_with("http://"), "the server behind is the real one");
}
