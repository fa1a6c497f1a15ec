//! `repo init` and `repo list` as a person runs them: the key comes first and stays secret, nothing is made twice, and only
//! its key opens a repository.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn pgmuster(arguments: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_pgmuster");
    // Nothing of a store's or coordinator's settings comes from whoever runs the tests.
    Command::new(program).args(arguments).env_clear().output().unwrap()
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!(
        "{}\n--- stdout\n{}--- stderr\n{}",
        output.status,
        text(&output.stdout),
        text(&output.stderr)
    )
}

#[track_caller]
fn refused(output: &Output, exit: i32, code: &str) {
    assert_eq!(output.status.code(), Some(exit), "{}", said(output));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.starts_with(&format!("error: {code}: ")), "{}", said(output));
    assert!(stderr.contains("hint: "), "{}", said(output));
    assert!(output.stdout.is_empty(), "{}", said(output));
}

fn init(url: &str, key: &Path) -> Output {
    pgmuster(&["repo", "init", url, "--key", key.to_str().unwrap()])
}

fn list(url: &str, key: &Path) -> Output {
    pgmuster(&["repo", "list", url, "--key", key.to_str().unwrap(), "-o", "json"])
}

#[test]
fn a_repository_is_made_once_and_opened_by_its_key_alone() {
    let place = tempfile::tempdir().unwrap();
    let (key, directory) = (place.path().join("key"), place.path().join("repository"));
    let url = format!("file://{}", directory.display());

    let made = init(&url, &key);
    assert!(made.status.success(), "{}", said(&made));
    let mode = std::fs::metadata(&key).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600, "nobody else reads the key");
    let sheet = String::from_utf8(made.stdout).unwrap();
    let secret = std::fs::read_to_string(&key).unwrap();
    let secret = secret.split_whitespace().last().unwrap();
    assert!(sheet.contains(&url) || sheet.contains(&directory.display().to_string()), "{sheet}");
    assert!(!String::from_utf8_lossy(&made.stderr).contains(secret), "talk may be logged");
    let listed = list(&url, &key);
    assert!(listed.status.success(), "{}", said(&listed));
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "[]");

    // The same place once more: refused, and the second key, which opens nothing, is not left.
    let other = place.path().join("other");
    refused(&init(&url, &other), 7, "REPOSITORY_EXISTS");
    assert!(!other.exists(), "a key that opens nothing is in the way");
    assert!(list(&url, &key).status.success(), "the repository is what it was");

    // A key is never overwritten, whatever the place.
    let elsewhere = format!("file://{}", place.path().join("elsewhere").display());
    let before = std::fs::read(&key).unwrap();
    refused(&init(&elsewhere, &key), 7, "STATE_CONFLICT");
    assert_eq!(std::fs::read(&key).unwrap(), before);
    assert!(!place.path().join("elsewhere").exists(), "nothing was made without its key");

    // Another repository's key, a damaged one, none.
    assert!(init(&elsewhere, &other).status.success());
    refused(&list(&url, &other), 11, "KEY_WRONG");
    let damaged = place.path().join("damaged");
    std::fs::write(&damaged, "no key at all\n").unwrap();
    std::fs::set_permissions(&damaged, std::fs::Permissions::from_mode(0o600)).unwrap();
    refused(&list(&url, &damaged), 11, "KEY_WRONG");
    refused(&list(&url, &place.path().join("none")), 2, "CONFIG_INVALID");
    let absent = format!("file://{}", place.path().join("absent").display());
    refused(&list(&absent, &key), 6, "REPOSITORY_MISSING");
    let no_bucket = list("s3:///prefix", &key);
    refused(&no_bucket, 2, "REQUEST_INVALID");
    assert!(said(&no_bucket).contains("it names no bucket"), "{}", said(&no_bucket));
}

#[test]
fn what_is_missing_for_a_socket_or_a_passphrase_is_said_plainly() {
    let place = tempfile::tempdir().unwrap();
    let (key, directory) = (place.path().join("key"), place.path().join("repository"));
    let (url, key_path) = (format!("file://{}", directory.display()), key.to_str().unwrap());
    assert!(init(&url, &key).status.success());
    let socket = place.path().join("no such directory/sock");
    let serve = ["wal", "serve", socket.to_str().unwrap(), "--repository", &url, "--key", key_path];
    let served = pgmuster(&serve);
    refused(&served, 2, "CONFIG_INVALID");
    let missing = socket.parent().unwrap().display();
    let plain = format!("there is no directory {missing}");
    assert!(said(&served).contains(&plain), "{}", said(&served));
    let add = ["repo", "key", "add", &url, "--key", key_path, "--new-passphrase", "open sesame"];
    let added = pgmuster(&add);
    refused(&added, 2, "CONFIG_INVALID");
    assert!(said(&added).contains("or - to type it"), "{}", said(&added));
    assert!(!said(&added).contains("sesame"), "{}", said(&added));
    // Whoever adds one is told how it opens the repository, in a command that does.
    let passphrase = place.path().join("passphrase");
    std::fs::write(&passphrase, "correct horse battery staple again\n").unwrap();
    std::fs::set_permissions(&passphrase, std::fs::Permissions::from_mode(0o600)).unwrap();
    let reference = format!("file:{}", passphrase.display());
    let added = pgmuster(&[&add[..7], &[&reference]].concat());
    assert!(added.status.success(), "{}", said(&added));
    let check = format!("`pgmuster repo key check {url} --passphrase {reference}`");
    assert!(said(&added).contains(&check), "{}", said(&added));
}

#[test]
fn a_repository_for_a_single_writer_says_so_and_is_collected_by_somebody_alone() {
    let place = tempfile::tempdir().unwrap();
    let (key, directory) = (place.path().join("key"), place.path().join("repository"));
    let url = format!("file://{}", directory.display());
    let key_path = key.to_str().unwrap();
    let made = pgmuster(&["repo", "init", &url, "--key", key_path, "--single-writer"]);
    assert!(made.status.success(), "{}", said(&made));
    let config = std::fs::read_to_string(directory.join("config")).unwrap();
    assert!(
        config.contains(r#""write":["single-writer"]"#),
        "older programs would write: {config}"
    );
    let listed = list(&url, &key);
    assert!(listed.status.success(), "{}", said(&listed));
    assert_eq!(String::from_utf8_lossy(&listed.stdout).trim(), "[]");
    assert!(String::from_utf8_lossy(&listed.stderr).contains("degraded"), "{}", said(&listed));
    let gc = ["repo", "gc", &url, "--key", key_path];
    refused(&pgmuster(&gc), 7, "STATE_CONFLICT");
    let planned = pgmuster(&[&gc[..], &["--plan"]].concat());
    assert!(planned.status.success(), "{}", said(&planned));
    let collected = pgmuster(&[&gc[..], &["--alone"]].concat());
    assert!(collected.status.success(), "{}", said(&collected));
}

#[test]
fn the_key_is_on_disk_before_there_is_a_repository_that_needs_it() {
    let place = tempfile::tempdir().unwrap();
    // The key cannot be written: then nothing may be made that only it would open.
    let key = place.path().join("no such directory/key");
    let directory = place.path().join("repository");
    let url = format!("file://{}", directory.display());
    refused(&init(&url, &key), 2, "CONFIG_INVALID");
    let config = directory.join("config");
    assert!(!config.exists(), "a repository without a key was made");
    // And what the look at the place left behind is not in the way.
    let key = place.path().join("key");
    let made = init(&url, &key);
    assert!(made.status.success(), "{}", said(&made));
    assert!(config.exists(), "the file whose absence was looked at is the one that counts");
}

/// Every file below a directory, and its bytes.
fn content(at: &Path, found: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in std::fs::read_dir(at).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            content(&path, found);
        } else {
            found.insert(path.clone(), std::fs::read(path).unwrap());
        }
    }
}

/// A later program wrote there. Whatever this one is asked for, it says so, what to do, and leaves everything as it is.
#[test]
fn a_repository_of_a_later_program_is_refused_by_every_command_and_stays_as_it_is() {
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name).display().to_string();
    let (main, other) = (format!("file://{}", at("main")), format!("file://{}", at("other")));
    let (key, new) = (at("key"), at("new.key"));
    init(&main, Path::new(&key));
    let made = pgmuster(&["repo", "copy", &main, &other, "--key", &key]);
    assert!(made.status.success(), "{}", said(&made));
    std::fs::write(at("segment"), "").unwrap();
    let (segment, into, fetched) = (at("segment"), at("into"), at("fetched"));
    let id = "01a204d8-6ebc-7d03-9f25-5ecb5b99e2db";
    let server = "host=127.0.0.1 port=1 user=nobody";
    let commands: &[&[&str]] = &[
        &["repo", "list", &main],
        &["repo", "check", &main],
        &["repo", "gc", &main],
        &["repo", "gc", &main, "--plan"],
        &["repo", "delete", &main, id],
        &["repo", "delete", &main, id, "--damaged"],
        &["repo", "undelete", &main, id],
        &["repo", "hold", &main, id],
        &["repo", "release", &main, id],
        &["repo", "copy", &main, &other],
        &["repo", "copy", &other, &main],
        &["repo", "key", "list", &main],
        &["repo", "key", "add", &main, "--new-key", &new],
        &["repo", "key", "rotate", &main, "--new-key", &new],
        &["repo", "key", "retire", &main, "open"],
        &["repo", "key", "check", &main],
        &["backups", "delete", id, "--repository", &main],
        &["backups", "undelete", id, "--repository", &main],
        &["backups", "hold", id, "--repository", &main],
        &["backups", "release", id, "--repository", &main],
        &["recovery", "windows", &main],
        &["restore", "--repository", &main, "--into", &into],
        &["restore", "--repository", &main, "--into", &into, "--to", "latest"],
        &["backup", "orders", "--server", server, "--repository", &main],
        &["wal", "push", &segment, "--repository", &main, "--cluster", "orders"],
    ];
    let config = place.path().join("main/config");
    let whole = std::fs::read_to_string(&config).unwrap();
    for (from, to, what) in [
        (r#""format":1"#, r#""format":2"#, "it has format 2, and this program reads up to 1"),
        (r#""read":[]"#, r#""read":["sealed-notes"]"#, r#"reading it needs "sealed-notes""#),
    ] {
        let later = whole.replace(from, to);
        assert_ne!(later, whole);
        std::fs::write(&config, later).unwrap();
        let (mut before, mut after) = (BTreeMap::new(), BTreeMap::new());
        content(place.path(), &mut before);
        for command in commands {
            let output = pgmuster(&[command, &["--key", key.as_str()][..]].concat());
            refused(&output, 5, "REPOSITORY_VERSION");
            assert!(said(&output).contains(what), "{command:?}: {}", said(&output));
            assert!(said(&output).contains("at least as new"), "{command:?}: {}", said(&output));
        }
        // 200 is what PostgreSQL takes for no end of its log.
        let get = ["wal", "get", "000000010000000000000001", &fetched, "--repository", &main];
        let output = pgmuster(&[&get[..], &["--cluster", "orders", "--key", &key]].concat());
        assert_eq!(output.status.code(), Some(200), "{}", said(&output));
        assert!(said(&output).contains(what), "{}", said(&output));
        content(place.path(), &mut after);
        assert_eq!(after.keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
        assert!(after == before, "some of it was changed");
    }
    std::fs::write(&config, whole).unwrap();
    assert!(list(&main, Path::new(&key)).status.success());
}
