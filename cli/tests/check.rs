//! `repo check` as a person and a schedule run it, on the repository that the tests of the format keep.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A copy of a repository with two backups of the cluster `orders`.
struct Place {
    directory: tempfile::TempDir,
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy(&entry.path(), &to);
        } else {
            std::fs::write(to, std::fs::read(entry.path()).unwrap()).unwrap();
        }
    }
}

impl Place {
    fn new() -> Self {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../repository/tests/golden/v1");
        let directory = tempfile::tempdir().unwrap();
        copy(&golden, directory.path());
        let key = directory.path().join("repository.key");
        std::fs::set_permissions(key, std::fs::Permissions::from_mode(0o600)).unwrap();
        Self { directory }
    }

    fn check(&self, arguments: &[&str]) -> Output {
        let url = format!("file://{}", self.directory.path().join("repository").display());
        let key = self.directory.path().join("repository.key");
        let mut program = Command::new(env!("CARGO_BIN_EXE_pgmuster"));
        program.args(["repo", "check", &url, "--key", key.to_str().unwrap()]);
        program.args(arguments).env_clear().output().unwrap()
    }

    /// The packs of file content: their type stands in their header.
    fn packs(&self) -> Vec<PathBuf> {
        fn walk(at: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(at).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    walk(&path, found);
                } else if path.to_str().unwrap().contains("/packs/")
                    && std::fs::read(&path).unwrap()[9] == 1
                {
                    found.push(path);
                }
            }
        }
        let mut found = Vec::new();
        walk(self.directory.path(), &mut found);
        found
    }
}

fn said(output: &Output) -> (Option<i32>, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (output.status.code(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn a_sound_repository_is_said_to_be_sound_at_every_level() {
    let place = Place::new();
    for level in ["inventory", "manifest", "read", "decrypt"] {
        let (code, json, stderr) = said(&place.check(&["--level", level, "-o", "json"]));
        assert_eq!((code, stderr.as_str()), (Some(0), ""), "{json}");
        let report: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(report["sound"], true, "{json}");
        assert_eq!(report["level"], level);
        assert_eq!(report["lineages"][0]["backups"], 2);
    }
    let (code, text, _) = said(&place.check(&[]));
    assert_eq!(code, Some(0));
    assert!(text.contains("orders"), "{text}");
}

#[test]
fn damage_is_told_with_the_backups_that_need_it_and_what_to_do() {
    let place = Place::new();
    let pack = place.packs().pop().unwrap();
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let id = pack.file_name().unwrap().to_str().unwrap();

    let (code, text, _) = said(&place.check(&["--level", "read", "--no-marks"]));
    assert_eq!(code, Some(3), "{text}");
    assert!(text.contains(id) && text.contains("Do not rely on 018bcfe5-"), "{text}");
    assert!(text.contains("may refer to the damaged packs again"), "{text}");
    assert_eq!(said(&place.check(&[])).0, Some(0), "nothing was written");

    // Exactly one day of three finds it, and from then on every check knows.
    let codes: Vec<Option<i32>> = ["1/3", "2/3", "3/3"]
        .into_iter()
        .map(|slice| said(&place.check(&["--level", "read", "--slice", slice, "--no-marks"])).0)
        .collect();
    assert_eq!(codes.iter().filter(|code| **code == Some(3)).count(), 1, "{codes:?}");
    let (code, json, _) = said(&place.check(&["--level", "decrypt", "-o", "json"]));
    assert_eq!(code, Some(3));
    let report: serde_json::Value = serde_json::from_str(&json).unwrap();
    let damaged = report["damaged"].as_array().unwrap();
    assert_eq!(damaged.len(), 1, "{json}");
    assert!(damaged[0]["object"].as_str().unwrap().ends_with(id), "{json}");
    assert_eq!(damaged[0]["cluster"], "orders");
    let (code, text, _) = said(&place.check(&[]));
    assert_eq!(code, Some(3));
    assert!(text.contains("pgmuster backup orders --verify 5"), "{text}");
}

#[test]
fn what_cannot_be_asked_is_refused() {
    let place = Place::new();
    let (code, _, stderr) = said(&place.check(&["--slice", "1/30"]));
    assert_eq!(code, Some(2));
    assert!(stderr.contains("REQUEST_INVALID") && stderr.contains("--level read"), "{stderr}");
    assert_eq!(said(&place.check(&["--level", "read", "--slice", "31/30"])).0, Some(2));
    let (code, _, stderr) = said(&place.check(&["--cluster", "billing"]));
    assert_eq!(code, Some(6));
    assert!(stderr.contains("CLUSTER_UNKNOWN"), "{stderr}");
}
