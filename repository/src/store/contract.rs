//! What every store promises, as checks that any store can be put through; `conforms` runs them all. They panic with a
//! sentence. Faults are not injected here.

#![expect(clippy::panic, reason = "a broken promise ends the test that runs the suite")]

use std::collections::BTreeSet;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;

use super::probe::Capabilities;
use super::{KeyTest, Listed, PutOutcome, Store, StoreError};

const MIB: usize = 1024 * 1024;

/// All parts of the contract. The store has nothing below `contract/` yet.
pub async fn conforms(store: &dyn Store) {
    keeps_what_was_put(store).await;
    refuses_what_was_not_asked_for(store).await;
    says_what_is_missing(store).await;
    keeps_odd_keys_apart(store).await;
    refuses_keys_that_are_none(store).await;
    first_create_wins(store).await;
    one_of_eight_creators_wins(store).await;
    shows_nothing_of_what_is_staged(store).await;
    lists_by_prefix_in_order(store).await;
    finds_what_is_behind_a_key(store).await;
    lists_more_than_a_page(store).await;
    deletes_once_and_again(store).await;
    uploads_of_every_size(store).await;
    shows_an_upload_only_when_complete(store).await;
    uploads_in_the_place_of_another(store).await;
    uploads_side_by_side(store).await;
    uploads_64_mib(store).await;
    ends_only_the_uploads_named(store).await;
}

/// Bytes that differ from place to place and from seed to seed, so that a swap or a shift is seen.
pub fn sample(seed: u64, len: usize) -> Bytes {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut bytes = Vec::with_capacity(len + 8);
    while bytes.len() < len {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(len);
    bytes.into()
}

async fn get(store: &dyn Store, key: &str) -> Bytes {
    store.get(key, 1 << 30).await.unwrap_or_else(|error| panic!("{key}: {error:?}"))
}

async fn keys(store: &dyn Store, prefix: &str) -> Vec<String> {
    let listed = store.list(prefix).await.unwrap_or_else(|error| panic!("{prefix}: {error:?}"));
    listed.into_iter().map(|object| object.key).collect()
}

fn is_missing<T: std::fmt::Debug>(result: &Result<T, StoreError>) -> bool {
    matches!(result, Err(StoreError::NotFound { .. }))
}

/// What was put comes back: whole, by range, and its size; again after it was put again.
pub async fn keeps_what_was_put(store: &dyn Store) {
    for (key, len) in [
        ("contract/kept/empty", 0),
        ("contract/kept/small", 10),
        ("contract/kept/large", 3 * MIB + 7),
    ] {
        let bytes = sample(len as u64, len);
        for _ in 0..2 {
            store.put(key, bytes.clone()).await.expect("put");
            assert_eq!(store.size(key).await.expect("size"), len as u64, "size of {key}");
            assert!(get(store, key).await == bytes, "bytes of {key}");
            for range in [0..len, 0..len / 2, len / 2..len, len..len, 0..0] {
                let got = store.get_range(key, range.start as u64..range.end as u64).await;
                assert!(got.expect("range") == bytes[range.clone()], "bytes {range:?} of {key}");
            }
        }
    }
}

/// An object over the limit, and a range that is none, are errors, and not "missing"; a range beyond the end says so.
pub async fn refuses_what_was_not_asked_for(store: &dyn Store) {
    let key = "contract/refused";
    store.put(key, sample(1, 100)).await.expect("put");
    store.get(key, 100).await.expect("exactly the limit");
    for short in [0..101, 99..101, 100..101, 200..300, 200..200, 0..u64::MAX] {
        let refused = store.get_range(key, short.clone()).await;
        assert!(matches!(refused, Err(StoreError::Short { .. })), "{short:?}: {refused:?}");
    }
    for limit in [0, 99] {
        let refused = store.get(key, limit).await;
        assert!(matches!(refused, Err(StoreError::Large { .. })), "{refused:?}");
    }
    #[expect(
        clippy::reversed_empty_ranges,
        reason = "a range from a damaged object may be anything"
    )]
    let refused = store.get_range(key, 60..40).await;
    assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "{refused:?}");
}

/// Reading what is not there is `NotFound`, also beside and below what is there; listing it finds nothing.
pub async fn says_what_is_missing(store: &dyn Store) {
    store.put("contract/here/it-is", sample(1, 10)).await.expect("put");
    for key in [
        "contract/nowhere/at-all",
        "contract/here/it-i",
        "contract/here/it-is-not",
        "contract/here",
    ] {
        assert!(is_missing(&store.get(key, 10).await), "get {key}");
        assert!(is_missing(&store.get_range(key, 0..1).await), "range of {key}");
        assert!(is_missing(&store.get_range(key, 0..0).await), "empty range of {key}");
        assert!(is_missing(&store.size(key).await), "size of {key}");
    }
    assert_eq!(keys(store, "contract/nowhere/").await, Vec::<String>::new());
}

/// Keys that a careless store would fold, decode or cut are objects of their own.
pub async fn keeps_odd_keys_apart(store: &dyn Store) {
    let long = format!("contract/odd/{}/{}", "l".repeat(200), "x".repeat(200));
    let odd: Vec<String> =
        ["case", "Case", "CASE", "a.b", "a..b", "a-b", "a_b", "-", "_", "--x", "0", "00", "x.tmp"]
            .iter()
            .map(|name| format!("contract/odd/{name}"))
            .chain([long])
            .collect();
    for (seed, key) in (0..).zip(&odd) {
        store.put(key, sample(seed, 32)).await.unwrap_or_else(|error| panic!("{key}: {error:?}"));
    }
    for (seed, key) in (0..).zip(&odd) {
        assert!(get(store, key).await == sample(seed, 32), "{key} holds something else");
    }
    let sorted: BTreeSet<String> = odd.into_iter().collect();
    assert_eq!(keys(store, "contract/odd/").await, sorted.into_iter().collect::<Vec<_>>());
}

/// What is not a key is refused before anything is touched: a damaged object must not lead out of the repository.
pub async fn refuses_keys_that_are_none(store: &dyn Store) {
    for key in [
        "",
        "/etc/passwd",
        "contract/../../x",
        "contract//x",
        "contract/./x",
        "contract/x/",
        "contract/ä",
        ".x",
    ] {
        let refused = store.put(key, sample(1, 1)).await;
        assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "put {key:?}: {refused:?}");
        let refused = store.get(key, 1).await;
        assert!(matches!(refused, Err(StoreError::Unavailable { .. })), "get {key:?}: {refused:?}");
        assert!(store.put_if_absent(key, sample(1, 1)).await.is_err(), "create {key:?}");
        assert!(store.delete(key).await.is_err(), "delete {key:?}");
        assert!(store.upload(key).await.is_err(), "upload {key:?}");
    }
}

/// The second create loses and changes nothing, also with the same bytes, also over a plain put.
pub async fn first_create_wins(store: &dyn Store) {
    let key = "contract/created/one";
    let (ours, theirs) = (sample(1, 300), sample(2, 300));
    assert_eq!(store.put_if_absent(key, ours.clone()).await.expect("create"), PutOutcome::Created);
    assert_eq!(store.put_if_absent(key, theirs.clone()).await.expect("create"), PutOutcome::Exists);
    assert_eq!(store.put_if_absent(key, ours.clone()).await.expect("create"), PutOutcome::Exists);
    assert!(get(store, key).await == ours, "the loser changed the object");

    let plain = "contract/created/plain";
    store.put(plain, ours.clone()).await.expect("put");
    assert_eq!(store.put_if_absent(plain, ours.clone()).await.expect("create"), PutOutcome::Exists);
    assert_eq!(store.put_if_absent(plain, theirs).await.expect("create"), PutOutcome::Exists);
    assert!(get(store, plain).await == ours, "the loser changed the object");
}

/// Exactly one of eight wins, ten times, and the object is the winner's.
pub async fn one_of_eight_creators_wins(store: &dyn Store) {
    for round in 0..10_u64 {
        let key = format!("contract/raced/{round}");
        let outcomes =
            join_all((0..8).map(|racer| store.put_if_absent(&key, sample(racer, 100)))).await;
        let winners: Vec<u64> = (0..)
            .zip(outcomes)
            .filter(|(_, outcome)| matches!(outcome, Ok(PutOutcome::Created)) || outcome.is_err())
            .map(|(racer, outcome)| outcome.map(|_| racer).expect("create"))
            .collect();
        let [winner] = winners[..] else { panic!("round {round}: {winners:?} believe they won") };
        assert!(
            get(store, &key).await == sample(winner, 100),
            "round {round}: not the winner's bytes"
        );
    }
}

/// What is staged is seen when it is put and not before, loses to what was put meanwhile, and is gone when it is dropped.
pub async fn shows_nothing_of_what_is_staged(store: &dyn Store) {
    let [key, taken, dropped] =
        ["ours", "taken", "dropped"].map(|key| format!("contract/staged/{key}"));
    let (ours, theirs) = (sample(1, 3 * MIB + 1), sample(2, 300));
    let found =
        Capabilities { completes_if_absent: true, ends_uploads: true, ..Capabilities::default() };
    let stage = async |key| store.stage(key, ours.clone(), &found).await.expect("stage");
    let staged = stage(&key).await;
    let late = stage(&taken).await;
    drop(stage(&dropped).await);
    assert_eq!(keys(store, "contract/staged/").await, [""; 0], "staged is not put");
    store.put(&taken, theirs.clone()).await.expect("put");
    let outcome = store.put_staged_if_absent(&taken, late).await;
    assert_eq!(outcome.expect("create"), PutOutcome::Exists);
    assert!(get(store, &taken).await == theirs, "the loser changed the object");
    let outcome = store.put_staged_if_absent(&key, staged).await;
    assert_eq!(outcome.expect("create"), PutOutcome::Created);
    assert!(get(store, &key).await == ours, "not what was staged");
    assert_eq!(keys(store, "contract/staged/").await, [key, taken]);
    assert!(store.stage("contract/../staged", ours, &found).await.is_err(), "this is no key");
}

/// A prefix is plain text; rows come in byte order with their sizes; directories are named once.
pub async fn lists_by_prefix_in_order(store: &dyn Store) {
    let all = ["a", "a-b", "a.b", "a0", "b/1", "b/10", "b/2", "b/c/d/e", "bb"];
    for (len, key) in all.iter().enumerate() {
        store.put(&format!("contract/listed/{key}"), sample(1, len)).await.expect("put");
    }
    for prefix in ["", "a", "b", "b/", "b/1", "b/c/", "b/c/d", "bb", "c"] {
        let mut expected: Vec<Listed> = (0..)
            .zip(all)
            .filter(|(_, key)| key.starts_with(prefix))
            .map(|(size_bytes, key)| Listed { key: format!("contract/listed/{key}"), size_bytes })
            .collect();
        expected.sort_by(|a, b| a.key.cmp(&b.key));
        let listed = store.list(&format!("contract/listed/{prefix}")).await.expect("list");
        assert_eq!(listed, expected, "below {prefix:?}");
    }
    let directories = store.list_directories("contract/listed/").await.expect("list directories");
    assert_eq!(directories, ["b"]);
    let directories = store.list_directories("contract/listed/b/").await.expect("list directories");
    assert_eq!(directories, ["c"]);
    let directories = store.list_directories("contract/nowhere/").await.expect("list directories");
    assert_eq!(directories, [""; 0]);
}

/// What is behind a key is found wherever it lies, and nothing else.
pub async fn finds_what_is_behind_a_key(store: &dyn Store) {
    let all = ["a", "a-b", "a.b", "a0", "b/1", "b/10", "b/2", "b/c/d/e", "bb"];
    for key in all {
        store.put(&format!("contract/behind/{key}"), sample(1, 1)).await.expect("put");
    }
    let has = async |prefix: &str, after: &str, is_wanted: KeyTest| {
        let [prefix, after] = [prefix, after].map(|text| format!("contract/behind/{text}"));
        store.has_behind(&prefix, &after, is_wanted).await.expect("look behind")
    };
    for prefix in ["", "a", "b/", "b/c/", "bb", "c"] {
        for after in ["", "a", "a.b", "a0", "b/10", "b/2", "b/z", "bb"] {
            let expected = all.iter().any(|key| key.starts_with(prefix) && *key > after);
            let found = has(prefix, after, |_| true).await;
            assert_eq!(found, expected, "behind {after:?} below {prefix:?}");
        }
    }
    assert!(has("", "", |key| key.ends_with("/bb")).await);
    assert!(has("", "b/10", |key| key.ends_with("/2")).await);
    assert!(!has("", "b/2", |key| key.ends_with("/2")).await);
    assert!(!has("", "", |key| key.ends_with("/3")).await);
}

/// More objects than any page has rows, each listed once; more directories, too.
pub async fn lists_more_than_a_page(store: &dyn Store) {
    let expected: Vec<String> = (0..1_050).map(|n| format!("contract/paged/{n:04}/x")).collect();
    futures::stream::iter(&expected)
        .for_each_concurrent(16, |key| async move {
            store.put(key, Bytes::from_static(b"x")).await.expect("put");
        })
        .await;
    assert_eq!(keys(store, "contract/paged/").await, expected);
    let directories = store.list_directories("contract/paged/").await.expect("list directories");
    assert_eq!(directories, (0..1_050).map(|n| format!("{n:04}")).collect::<Vec<_>>());
}

/// A deleted object is gone at once from every verb; deleting it again is fine; its neighbours stay.
pub async fn deletes_once_and_again(store: &dyn Store) {
    let [key, next, below] =
        ["contract/deleted/it", "contract/deleted/it-not", "contract/deleted/other/it"];
    for key in [key, next, below] {
        store.put(key, sample(1, 10)).await.expect("put");
    }
    for _ in 0..2 {
        store.delete(key).await.expect("delete");
        assert!(is_missing(&store.get(key, 10).await));
        assert!(is_missing(&store.size(key).await));
        assert_eq!(keys(store, "contract/deleted/").await, [next, below]);
    }
    store.delete("contract/never/was").await.expect("delete what never was");
    store.delete(below).await.expect("delete");
    assert_eq!(store.put_if_absent(key, sample(2, 10)).await.expect("create"), PutOutcome::Created);
    assert_eq!(keys(store, "contract/deleted/").await, [key, next]);
}

async fn upload(store: &dyn Store, key: &str, parts: impl IntoIterator<Item = Bytes>) -> Bytes {
    let mut whole = Vec::new();
    let mut upload = store.upload(key).await.expect("begin an upload");
    for part in parts {
        whole.extend_from_slice(&part);
        upload.part(part).await.unwrap_or_else(|error| panic!("part of {key}: {error:?}"));
    }
    upload.complete().await.unwrap_or_else(|error| panic!("complete {key}: {error:?}"));
    whole.into()
}

/// Uploads without a part, with a short one, with exactly the least, with a short last one.
pub async fn uploads_of_every_size(store: &dyn Store) {
    for (name, sizes) in [
        ("none", vec![]),
        ("zero", vec![0]),
        ("short", vec![17]),
        ("least", vec![5 * MIB]),
        ("tail", vec![5 * MIB, 1]),
        ("empty-tail", vec![5 * MIB, 0]),
        ("several", vec![6 * MIB, 6 * MIB, 3]),
    ] {
        let key = format!("contract/sizes/{name}");
        let whole =
            upload(store, &key, (0..).zip(&sizes).map(|(seed, len)| sample(seed, *len))).await;
        assert_eq!(store.size(&key).await.expect("size"), whole.len() as u64, "{name}");
        assert!(get(store, &key).await == whole, "{name}: other bytes");
    }
}

/// An upload that is complete takes the place of what has its name, however large that is.
pub async fn uploads_in_the_place_of_another(store: &dyn Store) {
    let key = "contract/place";
    for sizes in [vec![17], vec![5 * MIB, 1], vec![3]] {
        let whole =
            upload(store, key, (7..).zip(&sizes).map(|(seed, len)| sample(seed, *len))).await;
        assert!(get(store, key).await == whole, "{sizes:?}: other bytes");
    }
}

/// No verb sees an upload before it is complete; after abort or drop none ever does.
pub async fn shows_an_upload_only_when_complete(store: &dyn Store) {
    for end in ["complete", "abort", "drop"] {
        let key = format!("contract/shown/{end}");
        let mut upload = store.upload(&key).await.expect("begin an upload");
        upload.part(sample(1, 5 * MIB)).await.expect("part");
        upload.part(sample(2, 5 * MIB)).await.expect("part");
        assert!(is_missing(&store.get(&key, 1 << 30).await), "seen too early");
        assert_eq!(keys(store, &key).await, [""; 0], "listed too early");
        match end {
            "complete" => upload.complete().await.expect("complete"),
            "abort" => upload.abort().await.expect("abort"),
            _ => drop(upload),
        }
        if end == "complete" {
            assert_eq!(store.size(&key).await.expect("size"), 10 * MIB as u64);
        } else {
            assert!(is_missing(&store.size(&key).await), "{end} left an object");
            assert_eq!(keys(store, &key).await, [""; 0], "{end} left a row");
        }
    }
    let aborted = ["contract/shown/abort".to_owned()];
    assert_eq!(store.abort_uploads(&aborted).await.expect("abort uploads"), 0, "abort left parts");
}

/// Several uploads at once do not mix.
pub async fn uploads_side_by_side(store: &dyn Store) {
    let wholes = join_all((0..4_u64).map(|n| async move {
        let parts = (0..3_u64).map(move |part| sample(n * 10 + part, 5 * MIB + 1));
        upload(store, &format!("contract/beside/{n}"), parts).await
    }))
    .await;
    for (n, whole) in wholes.iter().enumerate() {
        assert!(
            get(store, &format!("contract/beside/{n}")).await == whole,
            "upload {n} is mixed up"
        );
    }
}

/// A whole pack in eight parts, read back across the seams.
pub async fn uploads_64_mib(store: &dyn Store) {
    let key = "contract/pack";
    let whole = upload(store, key, (0..8).map(|seed| sample(seed, 8 * MIB))).await;
    assert_eq!(keys(store, key).await, [key]);
    assert_eq!(store.size(key).await.expect("size"), 64 * MIB as u64);
    for seam in 1..8 {
        let range = seam * 8 * MIB - 1000..seam * 8 * MIB + 1000;
        let got = store.get_range(key, range.start as u64..range.end as u64).await.expect("range");
        assert!(got == whole[range], "bytes around seam {seam}");
    }
    assert!(get(store, key).await == whole, "other bytes");
}

/// `abort_uploads` ends what it is told to end and nothing beside it. A store that keeps unfinished uploads without
/// their names counts 0 and ends none.
pub async fn ends_only_the_uploads_named(store: &dyn Store) {
    let [dead, living] = ["contract/ended/a", "contract/ended/ab"];
    let mut uploads = Vec::new();
    for key in [dead, living] {
        let mut upload = store.upload(key).await.expect("begin an upload");
        for seed in 0..2 {
            upload.part(sample(seed, 5 * MIB)).await.expect("part");
        }
        uploads.push(upload);
    }
    let open = store.uploads("contract/ended/").await.expect("list uploads");
    let ended = store.abort_uploads(&[dead.to_owned(), "contract/ended/none".to_owned()]).await;
    let ended = ended.expect("abort uploads");
    if ended == 0 {
        assert_eq!(open, [""; 0], "what is listed can be ended");
    } else {
        assert_eq!(open, [dead, living]);
        assert_eq!(store.uploads("contract/ended/").await.expect("list uploads"), [living]);
    }
    assert!(ended <= 1, "{ended} uploads ended");
    let completed: Vec<bool> = join_all(uploads.into_iter().map(super::Upload::complete))
        .await
        .iter()
        .map(Result::is_ok)
        .collect();
    assert_eq!(completed, [ended == 0, true]);
    assert_eq!(is_missing(&store.size(dead).await), ended == 1);
    assert_eq!(store.size(living).await.expect("size"), 10 * MIB as u64);
    let keys = [dead.to_owned(), living.to_owned()];
    assert_eq!(store.abort_uploads(&keys).await.expect("abort uploads"), 0, "something is left");
    assert_eq!(store.uploads("contract/ended/").await.expect("list uploads"), [""; 0]);
    assert_eq!(store.abort_uploads(&[]).await.expect("abort no uploads"), 0);
}
