//! `repo key …` as a person runs it: no secret in the list of processes, none repeated, and never a repository without a key.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

const WORDS: &str = "correct horse battery staple";

/// One repository, and commands about it.
struct Bench {
    place: tempfile::TempDir,
    url: String,
}

impl Bench {
    fn new() -> Self {
        let place = tempfile::tempdir().unwrap();
        let url = format!("file://{}", place.path().join("repository").display());
        Self { place, url }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// `pgmuster COMMAND… URL ARGUMENTS…`, in the directory of the keys, with the passphrase in a variable and on standard input.
    fn run(&self, command: &[&str], arguments: &[&str]) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pgmuster"))
            .args(command)
            .arg(&self.url)
            .args(arguments)
            .current_dir(self.place.path())
            .env_clear()
            .env("WORDS", WORDS)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A command that reads nothing may be gone before this is written.
        drop(child.stdin.take().unwrap().write_all(format!("{WORDS}\nanother line\n").as_bytes()));
        child.wait_with_output().unwrap()
    }

    #[track_caller]
    fn done(&self, command: &[&str], arguments: &[&str]) -> String {
        let output = self.run(command, arguments);
        assert!(output.status.success(), "{}", said(&output));
        assert!(!said(&output).contains(WORDS), "{}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, command: &[&str], arguments: &[&str], exit: i32, code: &str) -> String {
        let output = self.run(command, arguments);
        assert_eq!(output.status.code(), Some(exit), "{}", said(&output));
        let stderr = String::from_utf8(output.stderr.clone()).unwrap();
        assert!(stderr.starts_with(&format!("error: {code}: ")), "{}", said(&output));
        assert!(stderr.contains("hint: "), "{}", said(&output));
        assert!(output.stdout.is_empty() && !stderr.contains(WORDS), "{}", said(&output));
        stderr
    }

    /// What `repo key check` finds, and how it ends.
    #[track_caller]
    fn check(&self, opener: [&str; 2]) -> (Value, Option<i32>) {
        let output = self.run(&["repo", "key", "check"], &[opener[0], opener[1], "-o", "json"]);
        let report = serde_json::from_slice(&output.stdout);
        assert!(report.is_ok(), "{}", said(&output));
        (report.unwrap(), output.status.code())
    }

    fn lists(&self, opener: [&str; 2]) -> bool {
        self.run(&["repo", "list"], &opener).status.success()
    }
}

fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}\n{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// The id that a key file says.
fn id(key: &Path) -> String {
    let text = std::fs::read_to_string(key).unwrap();
    let line = text.lines().find(|line| line.starts_with("pgmuster-key-1")).unwrap();
    line.split_whitespace().nth(1).unwrap().to_owned()
}

const MAIN: [&str; 2] = ["--key", "main.key"];
const BY_WORDS: [&str; 2] = ["--passphrase", "env:WORDS"];

#[test]
fn the_keys_of_a_repository_from_two_to_one_and_back() {
    let bench = Bench::new();
    let (add, retire) = (&["repo", "key", "add"], &["repo", "key", "retire"]);
    let made = ["--key", "main.key", "--recovery-key", "recovery.key"];
    let sheet = bench.done(&["repo", "init"], &made);
    let recovery = id(&bench.path("recovery.key"));
    assert!(sheet.contains(&recovery) && !sheet.contains(&id(&bench.path("main.key"))), "{sheet}");
    assert_eq!(bench.check(MAIN).1, Some(0));

    // A passphrase, given by reference only.
    let in_place = ["--key", "main.key", "--new-passphrase", WORDS];
    bench.refused(add, &in_place, 2, "CONFIG_INVALID");
    let is_a_key = ["--key", "main.key", "--new-passphrase", "file:recovery.key"];
    bench.refused(add, &is_a_key, 11, "KEY_WRONG");
    std::fs::write(bench.path("short"), "short\n").unwrap();
    let short = ["--key", "main.key", "--new-passphrase", "file:short"];
    bench.refused(add, &short, 7, "STATE_CONFLICT");
    assert_eq!(bench.check(MAIN).0["keys"].as_array().unwrap().len(), 2, "nothing was added");
    let sheet =
        bench.done(add, &["--key", "main.key", "--new-passphrase", "-", "--label", "by heart"]);
    assert!(sheet.contains("--passphrase -") && !sheet.contains("pgmuster-key-1"), "{sheet}");
    for reference in ["env:WORDS", "-", "exec:/bin/sh words"] {
        std::fs::write(bench.path("words"), format!("echo '{WORDS}'\n")).unwrap();
        assert!(bench.lists(["--passphrase", reference]), "{reference}");
    }
    // A command gives a key file as well.
    assert!(bench.lists(["--key", "exec:/bin/cat main.key"]));
    let wrong = bench.refused(
        &["repo", "list"],
        &["--passphrase", "env:PATH_OF_NOTHING"],
        2,
        "CONFIG_INVALID",
    );
    assert!(wrong.contains("PATH_OF_NOTHING"), "{wrong}");
    let wrong = bench.refused(&["repo", "list"], &["--passphrase", "file:short"], 11, "KEY_WRONG");
    assert!(wrong.contains("the passphrase is wrong"), "{wrong}");
    let both = ["--key", "main.key", "--passphrase", "env:WORDS"];
    assert_eq!(bench.run(&["repo", "list"], &both).status.code(), Some(2));
    assert_eq!(bench.run(&["repo", "list"], &[]).status.code(), Some(2));
    // An empty repository: what opens it gets as far as finding nothing.
    let nothing = ["--passphrase", "env:WORDS", "--into", "restored"];
    bench.refused(&["restore", "--repository"], &nothing, 6, "BACKUP_UNKNOWN");

    // Rotate, which needs a path of its own.
    let old = id(&bench.path("main.key"));
    let rotate = ["repo", "key", "rotate"];
    let used = ["--key", "main.key", "--new-key", "recovery.key"];
    bench.refused(&rotate, &used, 7, "STATE_CONFLICT");
    std::fs::copy(bench.path("main.key"), bench.path("old.key")).unwrap();
    let sheet = bench.done(&rotate, &["--key", "main.key", "--new-key", "new.key"]);
    let new = id(&bench.path("new.key"));
    assert!(sheet.contains(&new), "{sheet}");
    let gone = bench.refused(&["repo", "list"], &MAIN, 11, "KEY_WRONG");
    assert!(gone.contains(&old) && gone.contains(&new) && gone.contains(&recovery), "{gone}");
    bench.refused(&rotate, &["--key", "old.key", "--new-key", "late.key"], 11, "KEY_WRONG");
    assert!(!bench.path("late.key").exists(), "a key that opens nothing is in the way");

    // Damage of one is told by name with another in hand.
    let object = bench.path("repository/keys").join(&recovery);
    let sound = std::fs::read(&object).unwrap();
    std::fs::write(&object, &sound[..50]).unwrap();
    let (report, exit) = bench.check(BY_WORDS);
    assert_eq!(exit, Some(3));
    let keys = report["keys"].as_array().unwrap();
    let damaged: Vec<&Value> =
        keys.iter().filter(|key| key["findings"] != serde_json::json!([])).collect();
    assert_eq!((damaged.len(), damaged[0]["id"].as_str()), (1, Some(recovery.as_str())));
    bench.refused(&["repo", "list"], &["--key", "recovery.key"], 1, "OBJECT_DAMAGED");
    std::fs::write(&object, sound).unwrap();

    // Down to one key, and not further.
    let listed = bench.done(&["repo", "key", "list"], &["--key", "new.key"]);
    let words = listed.lines().find(|line| line.contains("by heart")).unwrap();
    let words = words.split_whitespace().next().unwrap();
    bench.refused(retire, &["--key", "new.key", &new], 7, "STATE_CONFLICT");
    bench.refused(
        retire,
        &["--key", "new.key", &old.replace(&old[..4], "zzzz")],
        7,
        "STATE_CONFLICT",
    );
    bench.done(retire, &["--key", "new.key", words]);
    bench.refused(&["repo", "list"], &BY_WORDS, 11, "KEY_WRONG");
    bench.done(retire, &["--key", "new.key", &recovery]);
    let (report, exit) = bench.check(["--key", "new.key"]);
    assert_eq!((exit, report["keys"].as_array().unwrap().len()), (Some(3), 1), "{report}");
    assert!(report["findings"][0].as_str().unwrap().contains("repo key add"), "{report}");
    bench.done(add, &["--key", "new.key", "--new-key", "again.key"]);
    assert_eq!(bench.check(["--key", "again.key"]).1, Some(0));
}

#[test]
fn a_typing_error_in_a_key_is_called_one() {
    let bench = Bench::new();
    bench.done(&["repo", "init"], &MAIN);
    let text = std::fs::read_to_string(bench.path("main.key")).unwrap();
    let digits = text.trim_end().rsplit_once(' ').unwrap().0;
    let last = if digits.ends_with('0') { "1" } else { "0" };
    let typed = text.replace(digits, &format!("{}{last}", &digits[..digits.len() - 1]));
    std::fs::write(bench.path("typed.key"), typed).unwrap();
    let told = bench.refused(&["repo", "list"], &["--key", "typed.key"], 11, "KEY_WRONG");
    assert!(told.contains("a digit is wrong"), "{told}");
}
