//! The keys of a repository: adding, rotating, retiring, what is told of damage, and that no order of steps and no crash
//! leaves a repository that nothing opens.

#![expect(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::common::{self, Bench, NOW_MS, Tree, noise};
use crate::stepped::{Memory, alone};
use proto::{Code, Failure};
use repository::store::Store;
use repository::store::directory::DirectoryStore;
use repository::{
    Change, Encryption, Error, GuessCost, InitOptions, KeyFile, Keyring, KeyringReport,
    NewRecipient, Repository, Slot, Unlock,
};
use secrecy::SecretString;

const CHEAP: GuessCost = GuessCost { memory_kib: 64, passes: 1, lanes: 1 };

fn change() -> Change {
    Change { by: "ann".into(), at_ms: NOW_MS }
}

fn store(place: &Path) -> Arc<dyn Store> {
    Arc::new(DirectoryStore::new(place))
}

async fn keyring(place: &Path, key: &KeyFile) -> Keyring {
    Keyring::open(store(place), Unlock::KeyFile(key)).await.unwrap()
}

fn key_of(new: &NewRecipient) -> KeyFile {
    new.key_file.as_ref().unwrap().parse().unwrap()
}

async fn add(keyring: &Keyring, label: &str) -> KeyFile {
    let new = keyring.new_key_file(label).unwrap();
    keyring.add(&new, &change()).await.unwrap();
    key_of(&new)
}

async fn opens(place: &Path, unlock: Unlock<'_>) -> bool {
    Repository::open_with(store(place), unlock).await.is_ok()
}

async fn failure(place: &Path, unlock: Unlock<'_>) -> Failure {
    Repository::open_with(store(place), unlock).await.unwrap_err().into()
}

fn refused(result: Result<(), Error>, reason: &str) {
    let failure = Failure::from(result.unwrap_err());
    assert_eq!(failure.code, Code::StateConflict, "{failure}");
    assert!(failure.message.contains(reason), "{failure}");
}

fn slot<'r>(report: &'r KeyringReport, id: &str) -> &'r Slot {
    report.keys.iter().find(|slot| slot.id == id).unwrap()
}

fn object(place: &Path, id: &str) -> std::path::PathBuf {
    place.join("keys").join(id)
}

#[tokio::test]
async fn a_key_is_added_and_retired_and_only_those_that_stay_open_the_repository() {
    let bench = Bench::new().await;
    let (place, first) = (&bench.store_path(), &bench.key);
    let ring = keyring(place, first).await;
    let alone = ring.report().await.unwrap();
    assert!(alone.findings[0].contains("1 sound key"), "{alone:?}");

    let second = add(&ring, "safe").await;
    let report = ring.report().await.unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(report.keys.len(), 2);
    let (ours, added) = (slot(&report, &first.id()), slot(&report, &second.id()));
    assert!(ours.opened && !added.opened);
    assert_eq!((ours.added_by.as_deref(), added.added_by.as_deref()), (Some("init"), Some("ann")));
    assert_eq!((added.label.as_str(), added.added_at_ms), ("safe", Some(NOW_MS)));
    assert!(
        opens(place, Unlock::KeyFile(first)).await && opens(place, Unlock::KeyFile(&second)).await
    );

    // Not the one that opened it, so never the last; not one that is not there.
    refused(ring.retire(&first.id(), &change()).await, "open it with one that stays");
    refused(ring.retire("00112233445566778899aabbccddeeff", &change()).await, "no such key");
    refused(ring.retire("open", &change()).await, "a new repository");
    assert_eq!(ring.report().await.unwrap(), report, "nothing was changed");

    let other = keyring(place, &second).await;
    other.retire(&first.id(), &change()).await.unwrap();
    other.retire(&first.id(), &change()).await.unwrap();
    let gone = failure(place, Unlock::KeyFile(first)).await;
    assert_eq!(gone.code, Code::KeyWrong);
    for said in [&first.id(), &second.id(), &ring.repository().id().to_string(), "retired"] {
        assert!(gone.message.contains(said), "{said}: {gone}");
    }
    assert!(opens(place, Unlock::KeyFile(&second)).await);
    // Whoever opened it before with the key that is gone changes nothing any more.
    let late = ring.new_key_file("late").unwrap();
    refused(ring.add(&late, &change()).await, "ann retired it");
    refused(ring.retire(&second.id(), &change()).await, "ann retired it");
    assert!(!opens(place, Unlock::KeyFile(&key_of(&late))).await, "a refused key opens nothing");
    assert_eq!(store(place).list("keys/").await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_backup_goes_on_while_its_key_is_rotated_and_the_new_key_restores_it() {
    let bench = Bench::new().await;
    let place = &bench.store_path();
    let tree = Arc::new(Tree::new().file("rows", noise(1, 200_000)));
    let before = bench.back_up(&tree, NOW_MS).await;
    let attempt = bench.begin(NOW_MS + 1).await;

    let ring = keyring(place, &bench.key).await;
    let new = ring.new_key_file("").unwrap();
    ring.rotate(&new, &change()).await.unwrap();
    assert!(!opens(place, Unlock::KeyFile(&bench.key)).await);

    let mut writer = attempt.write(repository::WriteOptions::default()).unwrap();
    let source = || Arc::new(common::SharedTree(Arc::clone(&tree)));
    writer.copy(source(), tree.entries().into_iter().map(Ok)).await.unwrap();
    let written = writer.finish(source(), vec![], common::facts()).await.unwrap();
    let during = written.commit(NOW_MS + 2).await.unwrap();

    let key = key_of(&new);
    let repository = Repository::open(store(place), Some(&key)).await.unwrap();
    for (backup, late_files) in [(before.backup, 2), (during.backup, 0)] {
        let backup = repository.open_backup(bench.lineage, backup).await.unwrap();
        let mut restored = common::restore(&backup).await.unwrap();
        assert_eq!(restored.len(), tree.expected().len() + late_files);
        restored.retain(|path, _| path == b"rows");
        assert_eq!(restored, tree.expected());
    }
}

#[tokio::test]
async fn a_passphrase_opens_the_repository_and_a_wrong_one_is_called_wrong() {
    let bench = Bench::new().await;
    let place = &bench.store_path();
    let (right, wrong) =
        (SecretString::from("six random words"), SecretString::from("Six random words"));
    let none = failure(place, Unlock::Passphrase(&right)).await;
    assert_eq!(none.code, Code::KeyWrong);
    assert!(none.message.contains("it has no passphrase"), "{none}");

    let ring = keyring(place, &bench.key).await;
    let short = ring.new_passphrase(&SecretString::from("ünïcode-11c"), CHEAP, "").await;
    refused(short.map(drop), "11 characters");
    let new = ring.new_passphrase(&right, CHEAP, "by heart").await.unwrap();
    assert!(new.key_file.is_none());
    assert!(
        !new.recovery_sheet.contains("six random words") && new.recovery_sheet.contains(new.id())
    );
    ring.add(&new, &change()).await.unwrap();

    assert!(opens(place, Unlock::Passphrase(&right)).await);
    let failure = failure(place, Unlock::Passphrase(&wrong)).await;
    assert_eq!(failure.code, Code::KeyWrong);
    assert!(failure.message.contains("the passphrase is wrong"), "{failure}");
    assert!(failure.message.contains(new.id()), "{failure}");
    assert!(!failure.message.contains("random"), "{failure}");

    // It rotates like a key file: here into one.
    let by_heart = Keyring::open(store(place), Unlock::Passphrase(&right)).await.unwrap();
    assert_eq!(by_heart.opener(), new.id());
    let cheap = by_heart.report().await.unwrap();
    assert!(slot(&cheap, new.id()).findings[0].contains("1 passes over 64 KiB"), "{cheap:?}");
    let file = by_heart.new_key_file("").unwrap();
    by_heart.rotate(&file, &change()).await.unwrap();
    assert!(!opens(place, Unlock::Passphrase(&right)).await);
    assert!(opens(place, Unlock::KeyFile(&key_of(&file))).await);
    assert!(opens(place, Unlock::KeyFile(&bench.key)).await, "another key is not concerned");
}

/// What this program makes a passphrase cost is what its own check asks for.
#[tokio::test]
async fn the_usual_cost_of_a_guess_is_no_finding() {
    let bench = Bench::new().await;
    let ring = keyring(&bench.store_path(), &bench.key).await;
    let words = SecretString::from("six random words");
    let new = ring.new_passphrase(&words, GuessCost::default(), "").await.unwrap();
    ring.add(&new, &change()).await.unwrap();
    let report = ring.report().await.unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert!(opens(&bench.store_path(), Unlock::Passphrase(&words)).await);
}

#[tokio::test]
async fn a_damaged_key_is_told_by_name_and_is_in_nobodys_way() {
    let bench = Bench::new().await;
    let (place, first) = (&bench.store_path(), &bench.key);
    let ring = keyring(place, first).await;
    let words = SecretString::from("six random words");
    let passphrase = ring.new_passphrase(&words, CHEAP, "").await.unwrap();
    ring.add(&passphrase, &change()).await.unwrap();
    let second = add(&ring, "safe").await;
    let (file, word) = (second.id(), passphrase.id().to_owned());
    let sound = |id: &str| std::fs::read(object(place, id)).unwrap();
    let (file_bytes, word_bytes) = (sound(&file), sound(&word));
    let text = String::from_utf8(word_bytes.clone()).unwrap();

    let hostile = text.replace("\"memory_kib\":64", "\"memory_kib\":4294967295");
    let of_later = text.replace("\"passphrase\"", "\"x25519\"");
    assert!(hostile != text && of_later != text);
    let mut flipped = file_bytes.clone();
    let last_digit = flipped.len() - 4;
    flipped[last_digit] = if flipped[last_digit] == b'0' { b'1' } else { b'0' };
    let cases: [(&str, Vec<u8>, &str); 6] = [
        (&file, flipped, "not what was written"),
        (&file, b"\xff\x00 no JSON".to_vec(), "its object is damaged"),
        (&file, file_bytes[..40].to_vec(), "its object is damaged"),
        (&word, hostile.into_bytes(), "KiB of memory: 8 to 1048576"),
        (&word, word_bytes[..100].to_vec(), "its object is damaged"),
        (&word, of_later.into_bytes(), "not what was written"),
    ];
    for (id, bytes, finding) in cases {
        std::fs::write(object(place, id), bytes).unwrap();
        let ring = keyring(place, first).await;
        let report = ring.report().await.unwrap();
        let damaged = slot(&report, id);
        assert!(damaged.findings.concat().contains(finding), "{finding}: {report:?}");
        let others = report.keys.iter().filter(|key| key.id != *id && key.id != word);
        assert!(others.clone().all(|key| key.findings.is_empty()), "{report:?}");
        // The damaged one says what it is, the others open as if nothing were.
        let damaged_file = id == file;
        assert_eq!(opens(place, Unlock::KeyFile(&second)).await, !damaged_file, "{finding}");
        assert_eq!(opens(place, Unlock::Passphrase(&words)).await, damaged_file, "{finding}");
        if damaged_file {
            let failure = failure(place, Unlock::KeyFile(&second)).await;
            assert_eq!(failure.code, Code::ObjectDamaged);
            assert!(failure.message.contains(&format!("keys/{file}")), "{failure}");
            assert!(failure.hint.contains("another of its keys"), "{failure}");
        }
        std::fs::write(object(place, &file), &file_bytes).unwrap();
        std::fs::write(object(place, &word), &word_bytes).unwrap();
    }

    // Also one that a passphrase meets first.
    let before_all = object(place, "00000000000000000000000000000000");
    std::fs::write(&before_all, "damaged").unwrap();
    assert!(opens(place, Unlock::Passphrase(&words)).await);
    std::fs::remove_file(before_all).unwrap();

    std::fs::remove_file(object(place, &file)).unwrap();
    let report = ring.report().await.unwrap();
    assert!(slot(&report, &file).findings[0].contains("is gone"), "{report:?}");
    ring.retire(&file, &change()).await.unwrap();
    // A damaged list costs no backup and stops nobody who restores; changes wait until it is away.
    let list = place.join("keyring/4");
    let good = std::fs::read(&list).unwrap();
    std::fs::write(&list, "{}\n").unwrap();
    assert!(opens(place, Unlock::KeyFile(first)).await);
    let report = ring.report().await.unwrap();
    assert!(report.findings[0].starts_with("keyring/4: "), "{report:?}");
    let new = ring.new_key_file("").unwrap();
    let failure = Failure::from(ring.add(&new, &change()).await.unwrap_err());
    assert!(failure.message.contains("keyring/4"), "{failure}");
    assert!(!object(place, new.id()).exists(), "a key that is on no list");
    std::fs::write(&list, good).unwrap();
    add(&ring, "").await;
}

/// An object that its recipient's program of a later version wrote is listed, checked against the list, and left alone.
#[tokio::test]
async fn a_recipient_of_a_later_version_is_listed_and_in_nobodys_way() {
    let bench = Bench::new().await;
    let (place, id) = (&bench.store_path(), "0123456789abcdef0123456789abcdef");
    let later = r#"{"magic":"pgmuster-wrapped-key-1","recipient":"x25519","public":"00"}"#;
    std::fs::write(object(place, id), later).unwrap();
    let ring = keyring(place, &bench.key).await;
    let words = SecretString::from("six random words");
    let new = ring.new_passphrase(&words, CHEAP, "").await.unwrap();
    ring.add(&new, &change()).await.unwrap();
    assert!(opens(place, Unlock::Passphrase(&words)).await);
    let report = ring.report().await.unwrap();
    let later = slot(&report, id);
    assert_eq!(later.recipient.as_deref(), Some("x25519"));
    assert!(later.findings[0].contains("on no list"), "{report:?}");
    ring.retire(id, &change()).await.unwrap();
    assert!(!object(place, id).exists());
}

#[tokio::test]
async fn a_repository_without_a_list_of_keys_gets_one_with_its_first_change() {
    let place = tempfile::tempdir().unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/v1");
    let repository = golden.join("repository");
    for path in common::files_below(&repository) {
        let copy = place.path().join(path.strip_prefix(&repository).unwrap());
        std::fs::create_dir_all(copy.parent().unwrap()).unwrap();
        std::fs::copy(&path, copy).unwrap();
    }
    let key = std::fs::read_to_string(golden.join("repository.key")).unwrap();
    let key: KeyFile = key.parse().unwrap();
    let place = place.path();
    assert!(!place.join("keyring").exists());
    let ring = keyring(place, &key).await;
    let report = ring.report().await.unwrap();
    assert_eq!((report.keys.len(), report.keys[0].added_by.as_deref()), (1, None));
    let second = add(&ring, "").await;
    assert_eq!(ring.report().await.unwrap().keys.len(), 2);
    keyring(place, &second).await.retire(&key.id(), &change()).await.unwrap();
    assert!(!opens(place, Unlock::KeyFile(&key)).await);
    assert!(opens(place, Unlock::KeyFile(&second)).await);
}

#[tokio::test]
async fn a_repository_may_be_made_with_two_keys() {
    let place = tempfile::tempdir().unwrap();
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let mut new = Repository::prepare(store(place.path()), options).unwrap();
    let first: KeyFile = new.key_file.as_ref().unwrap().parse().unwrap();
    let second = new.add_key_file("recovery").unwrap();
    let sheet: KeyFile = second.recovery_sheet.parse().unwrap();
    assert_eq!(sheet.id(), key_of(second).id());
    new.create(None).await.unwrap();
    let report = keyring(place.path(), &first).await.report().await.unwrap();
    assert!(report.is_sound(), "{report:?}");
    assert_eq!(slot(&report, &sheet.id()).label, "recovery");
    assert!(opens(place.path(), Unlock::KeyFile(&sheet)).await);
}

#[tokio::test]
async fn a_repository_without_encryption_gets_no_key() {
    let place = tempfile::tempdir().unwrap();
    let options = InitOptions { encryption: Encryption::Off, now_ms: NOW_MS };
    let mut new = Repository::prepare(store(place.path()), options).unwrap();
    refused(new.add_key_file("").map(drop), "not encrypted");
    new.create(None).await.unwrap();
    let ring = Keyring::open(store(place.path()), Unlock::Nothing).await.unwrap();
    let key = ring.new_key_file("").unwrap();
    refused(ring.add(&key, &change()).await, "not encrypted");
    refused(ring.retire("open", &change()).await, "just opened with it");
    assert!(ring.report().await.unwrap().is_sound());
}

type Work<'w> = Pin<Box<dyn Future<Output = Result<(), Error>> + 'w>>;

/// What became of each of two (`None`: it died), and at each step what was chosen of how many.
type Race = ([Option<Result<(), Error>>; 2], Vec<(usize, usize)>);

/// Two at a time, in the order that `choices` says, and then the first choice there is. Each step is a call of the store of one
/// of them; or one of them dies.
fn race(work: [Work<'_>; 2], choices: &[usize], may_die: bool) -> Race {
    let mut context = Context::from_waker(Waker::noop());
    let mut work = work.map(|mut work| {
        // Up to its first call: nothing has happened yet.
        assert!(work.as_mut().poll(&mut context).is_pending());
        Some(work)
    });
    let (mut ended, mut taken) = ([None, None], Vec::new());
    loop {
        let alive: Vec<usize> = (0..2).filter(|n| work[*n].is_some()).collect();
        let options = alive.len() * if may_die { 2 } else { 1 };
        if options == 0 {
            return (ended, taken);
        }
        let chosen = choices.get(taken.len()).copied().unwrap_or(0);
        taken.push((chosen, options));
        let one = alive[chosen % alive.len()];
        if chosen >= alive.len() {
            work[one] = None;
        } else if let Some(future) = &mut work[one]
            && let Poll::Ready(result) = future.as_mut().poll(&mut context)
        {
            (ended[one], work[one]) = (Some(result), None);
        }
    }
}

/// The next choices in order, if any.
fn next(taken: &[(usize, usize)]) -> Option<Vec<usize>> {
    let last = taken.iter().rposition(|(chosen, options)| chosen + 1 < *options)?;
    let mut choices: Vec<usize> = taken[..=last].iter().map(|(chosen, _)| *chosen).collect();
    choices[last] += 1;
    Some(choices)
}

/// What one of two people does, and with which of the two keys there are.
#[derive(Debug, Clone, Copy)]
enum Deed {
    /// Retires the other's key.
    Retire,
    /// Replaces the own key.
    Rotate,
}

/// A repository in memory that two keys open.
fn two_keys() -> (Arc<Memory>, [KeyFile; 2]) {
    let memory = Arc::new(Memory::default());
    let options = InitOptions { encryption: Encryption::KeyFile, now_ms: NOW_MS };
    let mut new = Repository::prepare(Arc::<Memory>::clone(&memory), options).unwrap();
    let first = new.key_file.as_ref().unwrap().parse().unwrap();
    let second = key_of(new.add_key_file("").unwrap());
    alone(new.create(None)).unwrap();
    (memory, [first, second])
}

/// Every order of the calls of two people: whatever they do, and whoever dies where, something opens the repository that may
/// also change its keys; who was told that it is done is right, and who was refused has left nothing.
fn every_order(deeds: [Deed; 2], same_key: bool, may_die: bool) {
    let (memory, keys) = two_keys();
    let with = [0, usize::from(!same_key)];
    let (mut choices, mut races, mut both) = (Vec::new(), 0, 0);
    loop {
        let memory = memory.copy();
        let open = |key: &KeyFile| {
            alone(Keyring::open(Arc::<Memory>::clone(&memory), Unlock::KeyFile(key)))
        };
        let rings = with.map(|with| open(&keys[with]).unwrap());
        let new = [0, 1].map(|n| rings[n].new_key_file("").unwrap());
        let change = change();
        let work: [Work<'_>; 2] = [0, 1].map(|n| -> Work<'_> {
            match deeds[n] {
                Deed::Retire => {
                    let (ring, other, change) = (&rings[n], keys[1 - with[n]].id(), &change);
                    Box::pin(async move { ring.retire(&other, change).await })
                }
                Deed::Rotate => Box::pin(rings[n].rotate(&new[n], &change)),
            }
        });
        let (ended, taken) = race(work, &choices, may_die);
        let told = || format!("{deeds:?} {taken:?}: {ended:?}");

        for n in 0..2 {
            let new_key = key_of(&new[n]);
            match (deeds[n], &ended[n]) {
                (Deed::Retire, Some(Ok(()))) => {
                    assert!(open(&keys[1 - with[n]]).is_err(), "{}", told());
                }
                (Deed::Rotate, Some(Ok(()))) => {
                    assert!(open(&keys[with[n]]).is_err(), "{}", told());
                    // Unless the other one, who may, has retired it since.
                    assert!(open(&new_key).is_ok(), "{}", told());
                }
                (deed, Some(Err(error))) => {
                    assert!(matches!(error, Error::KeyChange { .. }), "{}", told());
                    if matches!(deed, Deed::Rotate) {
                        assert!(open(&new_key).is_err(), "{}", told());
                    }
                }
                (_, None) => {}
            }
        }
        both += usize::from(ended.iter().all(|ended| matches!(ended, Some(Ok(())))));
        let of_new = new.iter().map(key_of);
        let opened: Vec<Keyring> = keys.iter().filter_map(|key| open(key).ok()).collect();
        let opened: Vec<Keyring> =
            opened.into_iter().chain(of_new.filter_map(|key| open(&key).ok())).collect();
        assert!(!opened.is_empty(), "nothing opens it: {}", told());
        let works = opened.iter().any(|ring| {
            let another = ring.new_key_file("").unwrap();
            alone(ring.add(&another, &change)).is_ok()
        });
        assert!(works, "no key may change the keys: {}", told());
        races += 1;
        match next(&taken) {
            Some(more) => choices = more,
            None => break,
        }
    }
    assert!(races > 500, "{deeds:?}: only {races} orders");
    // Two who each retire or replace the key that the other one relies on are never both right.
    let at_odds = matches!(deeds, [Deed::Retire, Deed::Retire]) || same_key;
    assert!(!at_odds || both == 0, "{deeds:?}: both were done in {both} orders");
}

#[test]
fn of_two_who_retire_each_others_keys_at_most_one_is_heard_and_a_key_is_left() {
    every_order([Deed::Retire, Deed::Retire], false, true);
}

#[test]
fn of_two_who_rotate_the_same_key_one_is_heard_and_its_new_key_opens() {
    every_order([Deed::Rotate, Deed::Rotate], true, false);
}

#[test]
fn a_key_that_is_rotated_while_another_one_is_retired_leaves_a_key() {
    every_order([Deed::Rotate, Deed::Retire], false, false);
}

/// The same for one who dies at any call, before or after the other one did the same.
#[test]
fn a_rotation_that_dies_anywhere_leaves_a_key_and_is_in_nobodys_way() {
    let (memory, keys) = two_keys();
    for calls in 0.. {
        let memory = memory.copy();
        let open = |key: &KeyFile| {
            alone(Keyring::open(Arc::<Memory>::clone(&memory), Unlock::KeyFile(key)))
        };
        let ring = open(&keys[0]).unwrap();
        let new = ring.new_key_file("").unwrap();
        let change = change();
        let mut rotation = Box::pin(ring.rotate(&new, &change));
        let mut context = Context::from_waker(Waker::noop());
        let ended = (0..=calls).any(|_| rotation.as_mut().poll(&mut context).is_ready());
        drop(rotation);
        let (old, fresh) = (open(&keys[0]), open(&key_of(&new)));
        assert!(old.is_ok() || fresh.is_ok(), "after {calls} calls nothing opens it");
        let mut own = [old, fresh].into_iter().flatten();
        let works = own.any(|ring| {
            let another = ring.new_key_file("").unwrap();
            alone(ring.add(&another, &change)).is_ok()
        });
        assert!(works, "after {calls} calls neither key may change the keys");
        // The other key finishes or undoes it, as it likes.
        let other = open(&keys[1]).unwrap();
        alone(other.retire(&keys[0].id(), &change)).unwrap();
        let left = alone(other.report()).unwrap();
        for extra in left.keys.iter().filter(|key| !key.findings.is_empty()) {
            assert_eq!(extra.id, new.id(), "after {calls} calls: {left:?}");
            alone(other.retire(&extra.id, &change)).unwrap();
        }
        let left = alone(other.report()).unwrap();
        assert!(left.keys.iter().all(|key| key.findings.is_empty()), "{left:?}");
        assert!(open(&keys[0]).is_err() && open(&keys[1]).is_ok());
        if ended {
            assert!(calls > 6, "a rotation has more steps than {calls}");
            return;
        }
    }
}
