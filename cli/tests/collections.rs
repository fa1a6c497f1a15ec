//! Giving up, taking back, collecting and copying as a person does it: what is said, what it costs, how it ends.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
#![expect(clippy::disallowed_methods, reason = "the program under test reads the real clock, too")]

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use proto::{AttemptId, BackupId, LineageId, SystemIdentifier};
use repository::store::directory::DirectoryStore;
use repository::{
    Encryption, InitOptions, Intent, Repository, Source, SourceEntry, SourceFile, Wish,
    WriteOptions,
};
use serde_json::{Value, json};

const DAY_MS: i64 = 24 * 3_600_000;

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_millis()).unwrap()
}

/// Bytes that do not compress, the same for the same seed.
fn noise(seed: u8) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15 ^ u64::from(seed) << 56;
    let words = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_be_bytes()
    });
    words.take(10_000).flatten().collect()
}

/// A source whose files come with their content.
struct Inline;

impl Source for Inline {
    fn open(&self, _: &SourceEntry) -> io::Result<Option<Box<dyn SourceFile>>> {
        Ok(None)
    }
}

/// A repository in a directory with three backups: each has a file of its own, all but the first share one.
struct Place {
    directory: tempfile::TempDir,
    repository: Repository,
    lineage: LineageId,
    backups: Vec<BackupId>,
}

impl Place {
    async fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Arc::new(DirectoryStore::new(directory.path().join("main")));
        let options = InitOptions { encryption: Encryption::KeyFile, now_ms: 1 };
        let created = Repository::init(store, options).await.unwrap();
        let key = directory.path().join("key");
        std::fs::write(&key, created.key_file.unwrap().as_bytes()).unwrap();
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o600);
        std::fs::set_permissions(&key, mode).unwrap();
        let repository = created.repository;
        let cluster = "orders".parse().unwrap();
        let identity =
            repository.find_or_mint_lineage(&cluster, SystemIdentifier(7), 1).await.unwrap();
        let mut place =
            Self { directory, repository, lineage: identity.lineage, backups: Vec::new() };
        for n in 1..=3 {
            place.back_up(n).await;
        }
        place
    }

    async fn back_up(&mut self, n: u8) {
        let at_ms = now_ms() - 10 * DAY_MS + i64::from(n);
        let attempt = AttemptId::mint(u64::try_from(at_ms).unwrap(), [n; 10]);
        let intent = Intent { attempt, follows: None, by: "w".into(), began_at_ms: at_ms };
        let attempt = self.repository.begin(self.lineage, intent).await.unwrap();
        let mut writer = attempt.write(WriteOptions::default()).unwrap();
        // The first shares nothing with the others.
        let mut entries = vec![Ok(SourceEntry::bytes("own", 0o600, noise(n)))];
        if n > 1 {
            entries.insert(0, Ok(SourceEntry::bytes("common", 0o600, noise(0))));
        }
        writer.copy(Arc::new(Inline), entries).await.unwrap();
        let facts = serde_json::from_value(serde_json::json!({
            "cluster": "orders", "system_identifier": "7", "server_version_num": 150_000, "catalog_version": 1,
            "block_size": 8192, "wal_segment_size": 1_048_576, "data_checksums": true, "timeline": 1,
            "start_lsn": format!("0/{n}00028"), "stop_lsn": format!("0/{n}10000"), "started_at_ms": 1, "stopped_at_ms": 2, "backup_label": "",
        }));
        let written = writer.finish(Arc::new(Inline), vec![], facts.unwrap()).await.unwrap();
        self.backups.push(written.commit(at_ms).await.unwrap().backup);
    }

    fn url(&self, name: &str) -> String {
        format!("file://{}", self.directory.path().join(name).display())
    }

    fn key(&self) -> String {
        self.directory.path().join("key").display().to_string()
    }

    /// `repo VERB URL … --key FILE`.
    fn repo(&self, verb: &str, rest: &[&str]) -> Output {
        self.at("main", verb, rest)
    }

    fn at(&self, name: &str, verb: &str, rest: &[&str]) -> Output {
        let (url, key) = (self.url(name), self.key());
        let arguments = [&["repo", verb, url.as_str()], rest, &["--key", key.as_str()]].concat();
        Command::new(env!("CARGO_BIN_EXE_pgmuster")).args(arguments).env_clear().output().unwrap()
    }

    /// `backups VERB N`-th ….
    fn backups(&self, verb: &str, n: usize, rest: &[&str]) -> Output {
        let backup = self.backups[n].to_string();
        let arguments = [&["backups", verb, backup.as_str()], rest].concat();
        Command::new(env!("CARGO_BIN_EXE_pgmuster")).args(arguments).env_clear().output().unwrap()
    }

    /// The same with the repository and its key.
    fn backups_there(&self, verb: &str, n: usize, rest: &[&str]) -> Output {
        let (url, key) = (self.url("main"), self.key());
        let there = ["--repository", url.as_str(), "--key", key.as_str()];
        self.backups(verb, n, &[&there, rest].concat())
    }

    /// Restores into a directory of its own.
    fn restore(&self, into: &str, rest: &[&str]) -> Output {
        let (url, key) = (self.url("main"), self.key());
        let into = self.directory.path().join(into).display().to_string();
        let fixed = ["restore", "--repository", &url, "--key", &key, "--into", &into];
        let arguments = [&fixed[..], rest].concat();
        Command::new(env!("CARGO_BIN_EXE_pgmuster")).args(arguments).env_clear().output().unwrap()
    }

    /// Gives a backup up as if somebody had done it two days ago.
    async fn forget_long_ago(&self, n: usize) {
        let wish = Wish { by: "t".into(), why: String::new(), at_ms: now_ms() - 2 * DAY_MS };
        self.repository.forget(self.lineage, self.backups[n], &wish).await.unwrap();
    }

    fn papers(&self, n: usize) -> PathBuf {
        let backups = format!("main/lineages/{}/backups/{}", self.lineage, self.backups[n]);
        self.directory.path().join(backups)
    }
}

/// The files of every pack of a lineage.
fn packs(root: &Path, lineage: LineageId) -> Vec<PathBuf> {
    let below = |path: PathBuf| std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    below(root.join(format!("lineages/{lineage}/packs"))).flat_map(below).collect()
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}--- stderr\n{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// Checks how it ended, and returns all it said.
#[track_caller]
fn ends(output: &Output, exit: i32) -> String {
    assert_eq!(output.status.code(), Some(exit), "{}", said(output));
    said(output)
}

#[track_caller]
fn json(output: &Output, exit: i32) -> Value {
    ends(output, exit);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The line of a backup in a table.
#[track_caller]
fn line(text: &str, backup: BackupId) -> String {
    let id = backup.to_string();
    text.lines().find(|line| line.contains(&id)).expect(text).to_owned()
}

#[tokio::test]
async fn a_plan_says_what_goes_what_stays_and_why() {
    let place = Place::new().await;
    let [first, second, third] = place.backups[..] else { panic!() };
    let id = first.to_string();
    ends(&place.repo("delete", &[&third.to_string()]), 7);
    ends(&place.repo("hold", &[&second.to_string()]), 0);
    ends(&place.repo("delete", &[&id]), 0);
    let planned = ends(&place.repo("gc", &["--plan"]), 0);
    assert!(line(&planned, first).contains("given up, goes in 2"), "{planned}");
    assert!(line(&planned, second).contains("wanted, held"), "{planned}");
    assert!(line(&planned, third).contains("the newest"), "{planned}");
    assert!(line(&planned, first).contains("KiB"), "{planned}");

    // It is taken back, given up again, and taken back again.
    for _ in 0..2 {
        let kept = ends(&place.repo("undelete", &[&id]), 0);
        assert!(kept.contains("is whole, and stays"), "{kept}");
        let planned = json(&place.repo("gc", &["--plan", "-o", "json"]), 0);
        assert_eq!(planned[0]["backups"][0]["stays"], serde_json::json!(["wanted"]));
        ends(&place.repo("delete", &[&id]), 0);
    }
    // From a day later on it goes, but not without a second look when that is much.
    ends(&place.repo("undelete", &[&id]), 0);
    place.forget_long_ago(0).await;
    let planned = json(&place.repo("gc", &["--plan", "-o", "json"]), 0);
    assert_eq!(planned[0]["backups"][0]["stays"], serde_json::json!([]));
    let alone = planned[0]["backups"][0]["alone"]["bytes"].as_u64().unwrap();
    assert!(alone > 0 && alone == planned[0]["delete"]["bytes"].as_u64().unwrap());
    let refused = ends(&place.repo("gc", &[]), 5);
    assert!(refused.contains("--confirm-large"), "{refused}");
    assert!(place.papers(0).join("manifest").exists(), "nothing was deleted");
    ends(&place.repo("gc", &["--confirm-large"]), 0);
    assert!(!place.papers(0).join("manifest").exists());
    ends(&place.repo("undelete", &[&id]), 6);
}

#[tokio::test]
async fn a_backup_is_given_up_and_held_by_its_id_where_its_repository_and_key_are_named() {
    let place = Place::new().await;
    let wish = |n: usize| {
        let rows = json(&place.repo("list", &["-o", "json"]), 0);
        let id = place.backups[n].to_string();
        rows.as_array().unwrap().iter().find(|row| row["backup"] == *id).unwrap()["wish"].clone()
    };
    let held = ends(&place.backups_there("hold", 0, &["--why", "an audit"]), 0);
    assert!(held.contains("is held until `pgmuster repo release "), "{held}");
    assert_eq!(wish(0), "held");
    let refused = ends(&place.backups_there("delete", 0, &[]), 7);
    assert!(refused.contains("it is held"), "{refused}");
    ends(&place.backups_there("release", 0, &[]), 0);
    ends(&place.backups_there("delete", 0, &["--why", "too old"]), 0);
    assert_eq!(wish(0), "given up");
    ends(&place.backups_there("undelete", 0, &[]), 0);
    assert_eq!(wish(0), Value::Null);
    let refused = ends(&place.backups_there("delete", 2, &[]), 7);
    assert!(refused.contains("it is the newest one"), "{refused}");
    ends(&place.backups_there("delete", 0, &["--damaged"]), 7);

    // Without them nothing is done; no coordinator is there that could say where it is.
    let told = ends(&place.backups("delete", 0, &[]), 8);
    assert!(told.contains("--repository URL --key FILE"), "{told}");
    // Half of it is an incomplete command line.
    ends(&place.backups("delete", 0, &["--repository", &place.url("main")]), 2);
    ends(&place.backups("delete", 0, &["--key", &place.key()]), 2);
    assert_eq!(wish(0), Value::Null);
}

/// Runs the command of a hint as a person does who pastes it into a shell.
fn pasted(told: &str, beginning: &str) -> Output {
    let commands = told.split('`').skip(1).step_by(2);
    let command = commands.into_iter().find(|command| command.starts_with(beginning)).expect(told);
    let command = command.replacen("pgmuster", env!("CARGO_BIN_EXE_pgmuster"), 1);
    Command::new("/bin/sh").args(["-c", &command]).env_clear().output().unwrap()
}

#[tokio::test]
async fn a_slip_in_a_restore_is_told_with_what_was_meant_and_a_command_that_can_be_pasted() {
    let place = Place::new().await;
    let slip = ends(&place.restore("slip", &["odrers"]), 6);
    assert!(slip.contains("BACKUP_UNKNOWN") && slip.contains("did you mean orders?"), "{slip}");
    let listed = ends(&pasted(&slip, "pgmuster repo list"), 0);
    line(&listed, place.backups[0]);
    // The same of a backup, whose end is mistyped.
    let mut id = place.backups[0].to_string();
    let last = if id.pop() == Some('0') { '1' } else { '0' };
    id.push(last);
    for told in [
        place.restore("slip", &["--backup", &id]),
        place.repo("hold", &[&id]),
        place.repo("copy", &[&place.url("copy"), "--backup", &id]),
    ] {
        let told = ends(&told, 6);
        assert!(told.contains(&format!("did you mean {}?", place.backups[0])), "{told}");
    }
    assert!(!place.directory.path().join("slip").exists());
    // Of two commands that are told, the second one names the repository as the first one does.
    let given_up = ends(&place.repo("delete", &[&place.backups[0].to_string()]), 0);
    ends(&pasted(&given_up, "pgmuster repo gc"), 0);
}

#[tokio::test]
async fn a_backup_is_named_by_the_beginning_of_its_id_and_by_what_it_is() {
    let place = Place::new().await;
    let [first, _, third] = place.backups[..] else { panic!() };
    let ids: Vec<String> = place.backups.iter().map(ToString::to_string).collect();
    // They were begun within one second: the first digits are those of all.
    let several = ends(&place.repo("hold", &[&ids[0][..8]]), 2);
    assert!(ids.iter().all(|id| several.contains(id.as_str())), "{several}");
    let held = ends(&place.repo("hold", &[&ids[0][..30]]), 0);
    assert!(held.contains(&format!("Backup {first} is held until")), "{held}");
    ends(&pasted(&held, "pgmuster repo release"), 0);
    let newest = ends(&place.repo("delete", &["@last"]), 7);
    assert!(newest.contains(&ids[2]) && newest.contains("it is the newest one"), "{newest}");
    let none = ends(&place.restore("proved", &["--backup", "@proved"]), 6);
    assert!(none.contains("no proved backup"), "{none}");
    let restored = ends(&place.restore("last", &["--backup", "@last"]), 0);
    assert!(restored.contains(&format!("Restored backup {third}")), "{restored}");
    let nothing = ends(&place.restore("none", &["--backup", "newest"]), 2);
    assert!(nothing.contains("no backup has such an id"), "{nothing}");
    assert!(!nothing.contains("invalid character"), "{nothing}");
}

#[tokio::test]
async fn whoever_holds_what_was_given_up_or_deleted_is_told_so() {
    let place = Place::new().await;
    ends(&place.backups_there("delete", 0, &["--why", "too old"]), 0);
    let given_up = ends(&place.backups_there("hold", 0, &[]), 7);
    assert!(
        given_up.contains("it was given up by ") && given_up.contains("(too old)"),
        "{given_up}"
    );
    ends(&pasted(&given_up, "pgmuster repo undelete"), 0);
    ends(&place.backups_there("hold", 0, &[]), 0);
    ends(&place.backups_there("release", 0, &[]), 0);
    place.forget_long_ago(0).await;
    ends(&place.repo("gc", &["--confirm-large"]), 0);
    let deleted = ends(&place.backups_there("hold", 0, &[]), 6);
    assert!(deleted.contains("was given up, and is deleted"), "{deleted}");
}

#[tokio::test]
async fn a_damaged_verdict_stops_a_collection_which_says_how_to_go_on() {
    let place = Place::new().await;
    let verdict = place.papers(0).join("verdict");
    std::fs::write(&verdict, "rotten").unwrap();
    let stopped = ends(&place.repo("gc", &[]), 1);
    let id = place.backups[0].to_string();
    assert!(stopped.contains(&id) && stopped.contains("--damaged"), "{stopped}");
    // What is sound is given up in the usual way only.
    ends(&place.repo("delete", &[&place.backups[1].to_string(), "--damaged"]), 7);
    ends(&place.repo("delete", &[&id, "--damaged"]), 0);
    assert!(place.papers(0).join("forget").exists());
}

#[tokio::test]
async fn a_rotten_identity_stands_in_the_way_of_no_other_cluster() {
    let place = Place::new().await;
    let [first, second, _] = place.backups[..] else { panic!() };
    let billing = "billing".parse().unwrap();
    let minted = place.repository.find_or_mint_lineage(&billing, SystemIdentifier(8), 1).await;
    let other = minted.unwrap().lineage;
    let identity =
        |lineage| place.directory.path().join(format!("main/lineages/{lineage}/identity"));
    std::fs::write(identity(other), "rotten").unwrap();
    let (id, copy) = (other.to_string(), place.url("copy"));
    let listed = ends(&place.repo("list", &[]), 9);
    assert!(listed.contains(&id), "{listed}");
    for backup in &place.backups {
        line(&listed, *backup);
    }
    ends(&place.repo("hold", &[&second.to_string()]), 0);
    place.forget_long_ago(0).await;
    ends(&place.repo("copy", &[&copy, "--cluster", "orders"]), 0);
    let copied = ends(&place.repo("copy", &[&copy]), 9);
    assert!(copied.contains(&id) && copied.contains("was there"), "{copied}");
    // Both are told: the one that cannot be collected, and the one that is.
    let collected = ends(&place.repo("gc", &["--confirm-large"]), 1);
    assert!(collected.contains(&identity(other).file_name().unwrap().to_string_lossy()[..]));
    assert!(collected.contains("OBJECT_DAMAGED") || collected.contains("failed: "), "{collected}");
    assert!(!place.papers(0).join("manifest").exists(), "{collected}");
    ends(&place.repo("gc", &["--cluster", "orders"]), 0);
    let unknown = ends(&place.repo("gc", &["--cluster", "billing"]), 6);
    assert!(unknown.contains("1 cannot"), "{unknown}");
    let slip = ends(&place.repo("gc", &["--cluster", "odrers"]), 6);
    assert!(slip.contains("did you mean orders?"), "{slip}");
    ends(&place.restore("newest", &["orders"]), 0);
    // Whose the other one is nobody knows: somebody has to say what is meant.
    let unsaid = ends(&place.restore("unsaid", &[]), 1);
    assert!(unsaid.contains("--backup ID"), "{unsaid}");

    // What is named is found although nobody knows whose lineage it is.
    std::fs::write(identity(place.lineage), "rotten").unwrap();
    ends(&place.restore("named", &["--backup", &second.to_string()]), 0);
    assert!(place.directory.path().join("named/common").exists());
    ends(&place.restore("gone", &["--backup", &first.to_string()]), 6);
}

#[tokio::test]
async fn a_verdict_that_cannot_be_read_stands_in_the_way_of_no_other_backup() {
    let place = Place::new().await;
    let [first, second, third] = place.backups[..] else { panic!() };
    let (id, copy) = (first.to_string(), place.url("copy"));
    let verdict = place.papers(0).join("verdict");
    let whole = std::fs::read(&verdict).unwrap();
    let mut large = whole.clone();
    large.resize(2 << 20, 0);
    std::fs::write(&verdict, large).unwrap();
    let listed = ends(&place.repo("list", &[]), 9);
    assert!(listed.contains(&format!("Backup {first} of orders cannot be used")), "{listed}");
    line(&listed, second);
    line(&listed, third);
    ends(&place.restore("newest", &["orders"]), 0);
    ends(&place.restore("second", &["--backup", &second.to_string()]), 0);
    // It is named where it would be missed.
    let rows = json(&place.repo("copy", &[&copy, "-o", "json"]), 9);
    assert_eq!(
        (&rows[0]["backup"], &rows[0]["failure"]["code"]),
        (&id.into(), &"OBJECT_DAMAGED".into())
    );
    assert_eq!((&rows[1]["outcome"], &rows[2]["outcome"]), (&"copied".into(), &"copied".into()));
    ends(&place.repo("copy", &[&copy, "--newest"]), 0);
    ends(&place.repo("gc", &[]), 1);
    ends(&place.repo("delete", &[&first.to_string(), "--damaged"]), 0);
    ends(&place.repo("copy", &[&copy]), 0);
    // So is one whose manifest was lost.
    let manifest = place.papers(1).join("manifest");
    let kept = std::fs::read(&manifest).unwrap();
    std::fs::remove_file(&manifest).unwrap();
    let lost = ends(&place.repo("copy", &[&copy]), 9);
    assert!(line(&lost, second).contains("OBJECT_MISSING"), "{lost}");
    std::fs::write(&manifest, kept).unwrap();
    std::fs::write(&verdict, whole).unwrap();

    // Where the store refuses the newest, an older one is restored only when it is named.
    let verdict = place.papers(2).join("verdict");
    let mode = std::os::unix::fs::PermissionsExt::from_mode;
    std::fs::set_permissions(&verdict, mode(0o000)).unwrap();
    let refused = ends(&place.restore("refused", &["orders"]), 4);
    assert!(refused.contains(&third.to_string()) && refused.contains("--backup"), "{refused}");
    assert!(!place.directory.path().join("refused").exists());
    ends(&place.restore("older", &["--backup", &second.to_string()]), 0);
    let collected = ends(&place.repo("gc", &[]), 4);
    assert!(collected.contains(&third.to_string()), "{collected}");
}

#[tokio::test]
async fn a_plan_tells_what_would_be_aborted() {
    let place = Place::new().await;
    let at_ms = now_ms() - 3 * DAY_MS;
    let attempt = AttemptId::mint(u64::try_from(at_ms).unwrap(), [9; 10]);
    let intent = Intent { attempt, follows: None, by: "somebody".into(), began_at_ms: at_ms };
    place.repository.begin(place.lineage, intent).await.unwrap();
    place.forget_long_ago(0).await;
    let id = attempt.to_string();
    let planned = ends(&place.repo("gc", &["--plan"]), 0);
    assert!(planned.contains("postponed") && !planned.contains("would be aborted"), "{planned}");
    let planned = ends(&place.repo("gc", &["--plan", "--abort-open"]), 0);
    assert!(planned.contains(&format!("{id} would be aborted")), "{planned}");
    let rows = json(&place.repo("gc", &["--plan", "--abort-open", "-o", "json"]), 0);
    assert_eq!(rows[0]["aborts"][0]["attempt"], id.as_str());
    let done = ends(&place.repo("gc", &["--abort-open", "--confirm-large"]), 0);
    assert!(done.contains(&format!("{id} aborted")), "{done}");
}

#[tokio::test]
async fn a_copy_is_made_taken_up_and_repeated_and_names_what_is_damaged() {
    let mut place = Place::new().await;
    let copy = place.url("copy");
    let outcomes = |rows: &Value| -> Vec<String> {
        rows.as_array().unwrap().iter().map(|row| row["outcome"].to_string()).collect()
    };
    let rows = json(&place.repo("copy", &[&copy, "--newest", "-o", "json"]), 0);
    assert_eq!(outcomes(&rows), [r#""copied""#]);
    let rows = json(&place.repo("copy", &[&copy, "-o", "json"]), 0);
    assert_eq!(outcomes(&rows), [r#""copied""#, r#""copied""#, r#""present""#]);
    let again = ends(&place.repo("copy", &[&copy]), 0);
    assert!(line(&again, place.backups[0]).contains("was there"), "{again}");
    let listed = |name| json(&place.at(name, "list", &["-o", "json"]), 0);
    // They are the same backups, and each side tells of the copies that were made of it.
    let (mut here, there) = (listed("main"), listed("copy"));
    for (row, copied) in here.as_array_mut().unwrap().iter_mut().zip(there.as_array().unwrap()) {
        let copies = std::mem::replace(&mut row["copies"], copied["copies"].clone());
        assert_eq!((&copies[0]["place"], &copied["copies"]), (&copy.clone().into(), &json!([])));
    }
    assert_eq!(here, there);

    // A fourth backup whose content is damaged: named, not copied, and the exit code says so.
    let main = place.directory.path().join("main");
    let before = packs(&main, place.lineage);
    place.back_up(4).await;
    let mut new: Vec<PathBuf> =
        packs(&main, place.lineage).into_iter().filter(|pack| !before.contains(pack)).collect();
    new.sort_by_key(|pack| std::cmp::Reverse(pack.metadata().unwrap().len()));
    let mut bytes = std::fs::read(&new[0]).unwrap();
    bytes[300] ^= 1;
    std::fs::write(&new[0], bytes).unwrap();
    let damaged = ends(&place.repo("copy", &[&copy]), 9);
    let name = new[0].file_name().unwrap().to_str().unwrap();
    assert!(damaged.contains(name) && damaged.contains("OBJECT_DAMAGED"), "{damaged}");
    assert_eq!(json(&place.at("copy", "list", &["-o", "json"]), 0).as_array().unwrap().len(), 3);
    let only = place.backups[3].to_string();
    ends(&place.repo("copy", &[&copy, "--backup", &only]), 1);

    // The copy restores by itself.
    let (url, key) = (place.url("copy"), place.key());
    let into = place.directory.path().join("data").display().to_string();
    let arguments = ["restore", "--repository", &url, "--key", &key, "--into", &into];
    let restored =
        Command::new(env!("CARGO_BIN_EXE_pgmuster")).args(arguments).env_clear().output();
    ends(&restored.unwrap(), 0);
    assert!(place.directory.path().join("data/common").exists());
    let pins = place.directory.path().join(format!("copy/lineages/{}/pins", place.lineage));
    let left = std::fs::read_dir(pins)
        .unwrap()
        .flat_map(|pins| std::fs::read_dir(pins.unwrap().path()).unwrap());
    assert_eq!(left.count(), 0, "the restore's pin is gone");

    // No place for a copy.
    let other = Place::new().await;
    let foreign = other.url("main");
    let key = other.key();
    let refused = ends(&place.repo("copy", &[&foreign, "--to-key", &key]), 7);
    assert!(refused.contains("REPOSITORY_EXISTS"), "{refused}");
    ends(&place.repo("copy", &[&place.url("main")]), 7);
}

/// Archives segments of 1 MiB. The first twelve digits of their names are the timeline and nothing.
async fn archive(place: &Place, timeline: u32, numbers: std::ops::RangeInclusive<u8>) {
    for number in numbers {
        let name = format!("{timeline:08X}00000000{number:08X}").parse().unwrap();
        let content = vec![number; 1 << 20].into();
        place.repository.store_wal(place.lineage, &name, content).await.unwrap();
    }
}

fn wal_get(place: &Place, name: &str) -> Output {
    let (url, key) = (place.url("main"), place.key());
    let to = place.directory.path().join(name);
    let arguments = ["wal", "get", name, to.to_str().unwrap(), "--repository", &url];
    let whose = ["--key", &key, "--cluster", "orders"];
    let arguments = [&arguments[..], &whose].concat();
    Command::new(env!("CARGO_BIN_EXE_pgmuster")).args(arguments).env_clear().output().unwrap()
}

fn windows(place: &Place, name: &str) -> Output {
    let (url, key) = (place.url(name), place.key());
    let arguments = ["recovery", "windows", &url, "--key", &key];
    Command::new(env!("CARGO_BIN_EXE_pgmuster")).args(arguments).env_clear().output().unwrap()
}

#[tokio::test]
async fn wal_that_was_collected_is_never_told_as_the_end_of_the_log() {
    let place = Place::new().await;
    // Backups begin in segments 1, 2 and 3.
    let [first, second, _] = place.backups[..] else { panic!() };
    let nothing = ends(&place.repo("gc", &["--plan"]), 0);
    assert!(!nothing.contains("WAL of orders"), "{nothing}");
    let listed = json(&place.repo("list", &["-o", "json"]), 0);
    let sizes =
        |name: &str| listed.as_array().unwrap().iter().all(|row| row[name].as_u64() > Some(0));
    assert!(sizes("size_bytes") && sizes("stored_bytes"), "{listed}");
    archive(&place, 1, 0..=1).await;
    archive(&place, 2, 1..=4).await;
    let history = "1\t0/100028\tno recovery target specified\n";
    let name = "00000002.history".parse().unwrap();
    place.repository.store_wal(place.lineage, &name, history.into()).await.unwrap();
    let planned = ends(&place.repo("gc", &["--plan"]), 0);
    let said = "in 1 file go, up to segment 000000010000000000000000; ";
    let why = format!("the oldest backup that stays, {first}, begins in 000000010000000000000001.");
    assert!(planned.contains(said) && planned.contains(&why), "{planned}");

    place.forget_long_ago(0).await;
    let planned = json(&place.repo("gc", &["--plan", "-o", "json"]), 0);
    let wal = &planned[0]["wal"];
    assert_eq!(wal["delete"]["files"], 3, "{wal}");
    assert_eq!(wal["last"], "000000020000000000000001");
    assert_eq!(wal["bound"]["before"]["backup"], second.to_string());
    assert_eq!(wal["bound"]["before"]["segment"], "000000010000000000000002");
    let collected = json(&place.repo("gc", &["--confirm-large", "-o", "json"]), 0);
    assert_eq!(collected[0]["wal"]["delete"]["files"], 3);
    assert_eq!(collected[0]["result"], "deleted");

    // What can be recovered begins later, and is told without a gap.
    let told = ends(&windows(&place, "main"), 0);
    assert!(told.contains(&second.to_string()) && !told.contains(&first.to_string()), "{told}");
    assert!(told.contains("0/310000") && !told.contains("missing"), "{told}");

    // Of the first timeline nothing is left; of the second, later segments are.
    for name in ["000000010000000000000001", "000000020000000000000001"] {
        let told = ends(&wal_get(&place, name), 200);
        let below = format!("deleted the WAL before {}0000000000000002", &name[..8]);
        assert!(told.contains(&below) && told.contains("WAL_MISSING"), "{told}");
    }
    ends(&wal_get(&place, "000000010000000000000002"), 1);
    ends(&wal_get(&place, "000000020000000000000005"), 1);
    ends(&wal_get(&place, "00000003.history"), 1);
}

#[tokio::test]
async fn a_copy_brings_the_wal_along_and_tells_what_differs() {
    let place = Place::new().await;
    archive(&place, 1, 1..=3).await;
    let to = place.url("copy");
    let copied = json(&place.repo("copy", &[&to, "-o", "json"]), 0);
    let wal = |rows: &Value| rows.as_array().unwrap().last().unwrap()["wal"].clone();
    assert_eq!(
        (copied.as_array().unwrap().len(), wal(&copied)["sent"]["files"].as_u64()),
        (4, Some(3))
    );
    let again = ends(&place.repo("copy", &[&to]), 0);
    assert!(
        again.lines().any(|line| line.contains("WAL") && line.contains("was there")),
        "{again}"
    );
    assert_eq!(ends(&windows(&place, "copy"), 0), ends(&windows(&place, "main"), 0));

    // Somebody archives into the copy.
    let name = "000000010000000000000002";
    let object = format!("copy/lineages/{}/wal/00000001/{name}", place.lineage);
    std::fs::remove_file(place.directory.path().join(object)).unwrap();
    let key: repository::KeyFile = std::fs::read_to_string(place.key()).unwrap().parse().unwrap();
    let store = Arc::new(DirectoryStore::new(place.directory.path().join("copy")));
    let other = Repository::open(store, Some(&key)).await.unwrap();
    let content = vec![77; 1 << 20].into();
    other.store_wal(place.lineage, &name.parse().unwrap(), content).await.unwrap();
    archive(&place, 1, 4..=4).await;
    let told = ends(&place.repo("copy", &[&to]), 9);
    assert!(
        told.contains("Not all of the WAL of orders is copied") && told.contains(name),
        "{told}"
    );
    assert!(told.contains("WAL_CONFLICT"), "{told}");
    let object = format!("copy/lineages/{}/wal/00000001/000000010000000000000004", place.lineage);
    assert!(place.directory.path().join(object).exists(), "everything else is copied");
}
