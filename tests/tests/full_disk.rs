//! Disks that are really full: the worker runs in a mount namespace of its own, where the repository and the directory for
//! restores are small file systems in memory.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, ensure};
use postgres::instance::InstanceOptions;
use rustix::process::{getgid, getuid};
use tests::fleet::text;
use tests::{Cluster, Finished, Fleet, Place, Vhost, WorkerSetup};

/// A restored cluster has about a thousand files and needs some 60 MiB.
const MOUNTS: &str = r#"
    place=$1 uid=$2 gid=$3; shift 3
    mount -t tmpfs -o mode=700,size=192m,nr_inodes=4000 restores "$place/restore"
    mkdir "$place/small"
    mount -t tmpfs -o mode=700,size=48m backups "$place/small"
    cp -a "$place/repository/." "$place/small"
    mount --bind "$place/small" "$place/repository"
    exec unshare --user "--map-user=$uid" "--map-group=$gid" -- "$@"
"#;

/// Whoever may make a user namespace may mount in it.
const UNSHARE: [&str; 5] = ["unshare", "--user", "--map-root-user", "--mount", "--"];

/// The same worker with small disks. A second namespace gives the program its user back.
fn with_small_disks<'a>(fleet: &Fleet, setup: WorkerSetup<'a>) -> anyhow::Result<WorkerSetup<'a>> {
    let [unshare, options @ ..] = UNSHARE;
    let tried = Command::new(unshare).args(options).arg("true").output()?;
    ensure!(tried.status.success(), "this machine allows no user namespaces: {tried:?}");
    let shell = ["sh", "-euc", MOUNTS, "sh"];
    let place = fleet.path("");
    let place = text(&place)?.trim_end_matches('/').to_owned();
    let user = [getuid().as_raw().to_string(), getgid().as_raw().to_string()];
    let fixed = UNSHARE.iter().chain(&shell).map(|&part| part.to_owned());
    Ok(WorkerSetup { under: fixed.chain([place]).chain(user).collect(), ..setup })
}

/// Leaves no more than `room` bytes on the file system of this new file.
fn fill(path: &Path, room: u64) -> anyhow::Result<()> {
    let mut file = File::create(path)?;
    let chunk = vec![0; 256 * 1024];
    let error = loop {
        if let Err(error) = file.write_all(&chunk) {
            break error;
        }
    };
    ensure!(error.kind() == ErrorKind::StorageFull, "{error}");
    let length = file.metadata()?.len();
    Ok(file.set_len(length.saturating_sub(room))?)
}

/// Every file of a directory, whatever is in it.
fn files_below(directory: &Path) -> anyhow::Result<BTreeSet<PathBuf>> {
    let mut files = BTreeSet::new();
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files.append(&mut files_below(&entry.path())?);
        } else {
            files.insert(entry.path());
        }
    }
    Ok(files)
}

fn says(done: &Finished, exit: i32, code: &str) -> anyhow::Result<()> {
    ensure!(done.code() == exit, "exit code {exit} is expected: {done}");
    ensure!(done.stderr.contains(code), "{code} is expected: {done}");
    ensure!(done.stderr.contains("hint: Make room"), "the hint is to make room: {done}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn full_disks_are_told_harm_nothing_and_are_gone_on_from() -> anyhow::Result<()> {
    let vhost = Vhost::create()?;
    let cluster = Cluster::start(15, InstanceOptions::default()).await?;
    let mut fleet = Fleet::prepare(&vhost.url(), "", Place::Directory)?;
    fleet.start_coordinator()?;
    let setup = with_small_disks(&fleet, WorkerSetup::of("w1", "orders", cluster.url()))?;
    fleet.start_worker(&setup)?;
    // What the worker sees, seen from here.
    let root = PathBuf::from(format!("/proc/{}/root", fleet.worker("w1")?.id()));
    let seen = |name: &str| -> anyhow::Result<PathBuf> {
        Ok(root.join(fleet.path(name).strip_prefix("/")?))
    };
    let (restores, repository) = (seen("restore")?, seen("repository")?);
    let in_repository = || -> anyhow::Result<usize> {
        let url = format!("file://{}", repository.display());
        let key = fleet.path("repository.key");
        let rows = fleet.json(&["repo", "list", &url, "--key", text(&key)?, "-o", "json"])?;
        Ok(rows.as_array().map_or(0, Vec::len))
    };
    fleet.expect(&["backup", "orders", "--wait"])?;
    ensure!(in_repository()? == 1 && fleet.backups()? == 0, "the worker writes to its own disk");

    // The restore does not fit: known before anything is written.
    let into = fleet.path("restore/again");
    let restore = ["restore", "orders", "--into", text(&into)?, "--wait"];
    fill(&restores.join("filler"), 4 << 20)?;
    let done = fleet.run(&restore)?;
    says(&done, 5, "TARGET_FULL")?;
    ensure!(!restores.join("again").exists(), "nothing was written: {done}");
    std::fs::remove_file(restores.join("filler"))?;

    // There is room for the bytes and none for the files: known when it happens.
    std::fs::create_dir(restores.join("files"))?;
    for number in 0..3_700 {
        File::create(restores.join(format!("files/{number}")))?;
    }
    let done = fleet.run(&restore)?;
    says(&done, 5, "TARGET_FULL")?;
    ensure!(restores.join("again").exists(), "it had begun: {done}");
    ensure!(!restores.join("again/global/pg_control").exists(), "half of it does not start");
    std::fs::remove_dir_all(restores.join("files"))?;
    fleet.expect(&restore).context("the same command goes on")?;
    ensure!(restores.join("again/global/pg_control").exists());

    // The repository has no room for any backup: known before anything is written.
    let objects = files_below(&repository)?;
    fill(&repository.join("filler"), 512 << 10)?;
    let done = fleet.run(&["backup", "orders", "--wait"])?;
    says(&done, 5, "TARGET_FULL")?;
    ensure!(done.stderr.contains("bytes are needed and "), "with numbers: {done}");
    std::fs::remove_file(repository.join("filler"))?;
    ensure!(files_below(&repository)? == objects, "nothing was written");
    cluster.is_left_alone().await?;

    // The repository is full in the middle of a backup.
    cluster
        .run(
            "CREATE TABLE public.noise AS
             SELECT g, md5(g::text) || md5((-g)::text) AS noise FROM generate_series(1, 150000) g",
        )
        .await?;
    fill(&repository.join("filler"), 2 << 20)?;
    let done = fleet.run(&["backup", "orders", "--wait"])?;
    says(&done, 8, "STORE_UNAVAILABLE")?;
    let said = fleet.said();
    ensure!(said.contains("this one may find no room"), "the worker saw it coming: {said}");
    ensure!(done.stderr.contains("find room for "), "the page names these words: {done}");
    cluster.is_left_alone().await?;
    ensure!(in_repository()? == 1, "the backup before is still there, and no other");
    // Where the file system knows files without a name, the folder is not there.
    let unfinished = std::fs::read_dir(repository.join(".uploads")).into_iter().flatten().count();
    ensure!(unfinished == 0, "{unfinished} half-written objects are left");
    let other = fleet.path("restore/other");
    fleet
        .expect(&["restore", "orders", "--into", text(&other)?, "--wait"])
        .context("and it still restores")?;

    std::fs::remove_file(repository.join("filler"))?;
    let proved = fleet.expect(&["backup", "orders", "--verify", "5", "--wait"])?;
    ensure!(proved.contains("orders is PROVED (L5)"), "{proved}");
    ensure!(in_repository()? == 2);
    Ok(())
}
