//! Owners that are to be killed, and what they leave behind.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Waits until `done`, at most a minute.
pub(crate) fn wait_for(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(1);
    while !done() {
        assert!(Instant::now() < deadline, "waited a minute for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Processes whose working directory lies below `directory`: all of a server's do.
pub(crate) fn processes_in(directory: &Path) -> Vec<u32> {
    let directory = directory.canonicalize().unwrap();
    let all = std::fs::read_dir("/proc").unwrap().filter_map(|entry| {
        let entry = entry.ok()?;
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let works_in = std::fs::read_link(entry.path().join("cwd")).ok()?;
        works_in.starts_with(&directory).then_some(pid)
    });
    all.collect()
}

/// This test program again, running only `test`, as the owner of something that is to be killed.
/// `directory` tells the test that it is the owner, see [`owned_directory`].
pub(crate) fn owner_process(test: &str, directory: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env("PGMUSTER_TEST_OWNER", directory)
        .stdout(Stdio::null())
        .stderr(Stdio::inherit())
        .spawn()
        .unwrap()
}

/// The directory given to an [`owner_process`]; nothing in the process that nextest started.
#[expect(clippy::disallowed_methods, reason = "tells the two processes of one test apart")]
pub(crate) fn owned_directory() -> Option<PathBuf> {
    std::env::var("PGMUSTER_TEST_OWNER").ok().map(PathBuf::from)
}
