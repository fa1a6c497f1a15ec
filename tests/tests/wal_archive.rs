//! A server's log goes into the archive by its own `archive_command` and comes back by its `restore_command`, the program
//! being both; and nothing that goes wrong on the way makes a recovery end early.

#[path = "wal_archive/broken.rs"]
mod broken;
#[path = "wal_archive/killed.rs"]
mod killed;
#[path = "wal_archive/s3.rs"]
mod s3;
#[path = "wal_archive/service.rs"]
mod service;
#[path = "wal_archive/worker.rs"]
mod worker;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, bail, ensure};
use postgres::binaries::Binaries;
use postgres::control_file::ControlFile;
use postgres::instance::{Instance, InstanceOptions, StopMode};
use proto::{BackupKind, LineageId, Timeline};
use repository::store::directory::DirectoryStore;
use repository::{KeyFile, Repository, WalInventory};
use tests::{Bucket, Finished, Pgmuster, Proxy, bucket, eventually_async, services};

const SOON: Duration = Duration::from_mins(1);
/// `wal get` does not know.
const NOT_KNOWN: i32 = 200;

/// A repository in a directory, and its key.
struct Archive {
    place: tempfile::TempDir,
}

impl Archive {
    fn create() -> anyhow::Result<Self> {
        let archive = Self { place: tempfile::tempdir()? };
        let made = Pgmuster::run(&["repo", "init", &archive.url(), "--key", &archive.key()])?;
        ensure!(made.code() == 0, "{made}");
        Ok(archive)
    }

    fn path(&self) -> PathBuf {
        self.place.path().join("repository")
    }

    fn url(&self) -> String {
        format!("file://{}", self.path().display())
    }

    fn key(&self) -> String {
        self.place.path().join("key").display().to_string()
    }

    fn of(&self, cluster: &str) -> Vec<String> {
        ["--repository", &self.url(), "--key", &self.key(), "--cluster", cluster]
            .map(str::to_owned)
            .to_vec()
    }

    /// Runs `wal push` or `wal get` as a server would: in its data directory.
    fn run(&self, server: &Path, cluster: &str, words: &[&str]) -> anyhow::Result<Finished> {
        let words = ["wal"].iter().chain(words).map(|&word| word.to_owned());
        run(server, words.chain(self.of(cluster)))
    }

    async fn open(&self) -> anyhow::Result<Repository> {
        let key: KeyFile = std::fs::read_to_string(self.key())?.parse()?;
        let store = std::sync::Arc::new(DirectoryStore::new(self.path()));
        Ok(Repository::open(store, Some(&key)).await?)
    }

    async fn lineage(&self) -> anyhow::Result<LineageId> {
        let all = self.open().await?.list_lineages().await?;
        ensure!(all.len() == 1, "one cluster has one lineage: {all:?}");
        Ok(all[0].lineage)
    }

    async fn inventory(&self) -> anyhow::Result<WalInventory> {
        Ok(self.open().await?.list_wal(self.lineage().await?).await?)
    }

    /// Where a file of the archive is kept.
    async fn object(&self, file: &str) -> anyhow::Result<PathBuf> {
        let lineage = self.lineage().await?;
        Ok(self.path().join(format!("lineages/{lineage}/wal/{}/{file}", &file[..8])))
    }
}

fn run(server: &Path, words: impl Iterator<Item = String>) -> anyhow::Result<Finished> {
    let words: Vec<String> = words.collect();
    Pgmuster::start_with(&words, |command| {
        command.current_dir(server);
    })?
    .wait(SOON)
}

/// A command of PostgreSQL's configuration that calls the program.
fn command(words: &[&str], of: &[String]) -> anyhow::Result<String> {
    let program = services::pgmuster()?.display().to_string();
    let words = words.iter().map(|&word| word.to_owned());
    Ok([program, "wal".to_owned()]
        .into_iter()
        .chain(words)
        .chain(of.iter().cloned())
        .collect::<Vec<_>>()
        .join(" "))
}

fn options(settings: &[(&str, &str)], segment_mib: Option<u32>) -> InstanceOptions {
    let mut all = vec![
        ("wal_level", "replica"),
        ("max_wal_size", "1GB"),
        ("autovacuum", "off"),
        ("wal_keep_size", "256MB"),
        ("wal_retrieve_retry_interval", "100ms"),
    ];
    all.extend(settings);
    let settings = all.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned()));
    InstanceOptions {
        settings: settings.collect(),
        wal_segment_size_mb: segment_mib,
        fsync: false,
        ..InstanceOptions::default()
    }
}

async fn make(major: u32, place: &Path, options: InstanceOptions) -> anyhow::Result<Instance> {
    let binaries = Binaries::at(services::postgres_bin(major)?).await?;
    Ok(Instance::create(&binaries, place, options).await?)
}

async fn client(server: &Instance) -> anyhow::Result<tokio_postgres::Client> {
    let (client, connection) =
        tokio_postgres::connect(&server.url("postgres"), tokio_postgres::NoTls).await?;
    tokio::spawn(connection);
    Ok(client)
}

async fn execute(server: &Instance, statements: &[&str]) -> anyhow::Result<()> {
    let client = client(server).await?;
    for statement in statements {
        client.simple_query(statement).await.with_context(|| (*statement).to_owned())?;
    }
    Ok(())
}

async fn number(server: &Instance, query: &str) -> anyhow::Result<i64> {
    Ok(client(server).await?.query_one(query, &[]).await?.get(0))
}

async fn text(server: &Instance, query: &str) -> anyhow::Result<String> {
    Ok(client(server).await?.query_one(query, &[]).await?.get(0))
}

const ROWS: &str = "SELECT count(*) FROM t";

/// Rows in `batches` transactions, each of which fills a segment that is then left.
async fn work(server: &Instance, batches: usize) -> anyhow::Result<()> {
    let client = client(server).await?;
    for _ in 0..batches {
        let rows = "INSERT INTO t SELECT n, repeat('x', 100) FROM generate_series(1, 1000) n";
        client.simple_query(rows).await?;
        client.simple_query("SELECT pg_switch_wal()").await?;
    }
    Ok(())
}

fn copy(from: &Path, to: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(to) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            bail!("remove {}: {error}", to.display())
        }
        _ => {}
    }
    let done = std::process::Command::new("cp").arg("-a").args([from, to]).status()?;
    ensure!(done.success(), "copy {} to {}: {done}", from.display(), to.display());
    Ok(())
}

/// Makes `server` a restored copy of `base` that recovers with `restore`, as PostgreSQL's own signal file says.
fn recover(
    server: &mut Instance,
    base: &Path,
    signal: &str,
    settings: &[(&str, &str)],
) -> anyhow::Result<()> {
    let data = server.data_directory();
    copy(base, &data)?;
    // Only the archive has the log.
    for entry in std::fs::read_dir(data.join("pg_wal"))? {
        let path = entry?.path();
        if path.is_file() {
            std::fs::remove_file(path)?;
        }
    }
    std::fs::write(data.join(signal), "")?;
    server.set(settings)?;
    Ok(())
}

/// Starts a server and waits until its recovery has ended one way or the other: whether it takes work.
async fn opens(server: &mut Instance) -> anyhow::Result<bool> {
    if server.start().await.is_err() {
        return Ok(false);
    }
    let asked = "SELECT pg_is_in_recovery()::text";
    eventually_async("the end of the recovery", SOON, async || {
        if !server.is_running() {
            return Ok(Some(false));
        }
        Ok((text(server, asked).await? == "false").then_some(true))
    })
    .await
    .with_context(|| server.log_tail())
}

fn timeline(server: &Instance) -> anyhow::Result<Timeline> {
    Ok(ControlFile::read(&server.data_directory())?.timeline)
}

/// A cluster that archived a few segments after a copy of it was made, and stopped.
struct Scene {
    place: tempfile::TempDir,
    archive: Archive,
    primary: Instance,
    rows: i64,
}

impl Scene {
    async fn create(major: u32, segment_mib: u32, batches: usize) -> anyhow::Result<Self> {
        let (place, archive) = (tempfile::tempdir()?, Archive::create()?);
        let push = command(&["push", "%p", "--new"], &archive.of("orders"))?;
        let settings = [("archive_mode", "on"), ("archive_command", push.as_str())];
        let primary = place.path().join("primary");
        let mut primary = make(major, &primary, options(&settings, Some(segment_mib))).await?;
        primary.start().await?;
        execute(&primary, &["CREATE TABLE t (n int, pad text)"]).await?;
        primary.stop(StopMode::Fast).await?;
        copy(&primary.data_directory(), &place.path().join("base"))?;
        primary.start().await?;
        work(&primary, batches).await?;
        let rows = number(&primary, ROWS).await?;
        // The server archives what is left before it ends.
        primary.stop(StopMode::Fast).await?;
        Ok(Self { place, archive, primary, rows })
    }

    fn base(&self) -> PathBuf {
        self.place.path().join("base")
    }

    async fn restored(&self, major: u32, segment_mib: u32) -> anyhow::Result<Instance> {
        make(major, &self.place.path().join("restored"), options(&[], Some(segment_mib))).await
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_replays_to_the_last_row_and_its_successor_along_the_new_timeline()
-> anyhow::Result<()> {
    let scene = Scene::create(15, 1, 6).await?;
    let inventory = scene.archive.inventory().await?;
    ensure!(inventory.gaps().is_empty() && inventory.damaged.is_empty(), "{inventory:?}");
    ensure!(inventory.timelines[&Timeline(1)].segment_size == 1 << 20, "{inventory:?}");

    let mut restored = scene.restored(15, 1).await?;
    let of = scene.archive.of("orders");
    let (get, push) =
        (command(&["get", "%f", "%p"], &of)?, command(&["push", "%p", "--new"], &of)?);
    let settings = [
        ("restore_command", get.as_str()),
        ("archive_mode", "on"),
        ("archive_command", push.as_str()),
        ("hot_standby", "off"),
    ];
    recover(&mut restored, &scene.base(), "recovery.signal", &settings)?;
    ensure!(opens(&mut restored).await?, "{}", restored.log_tail());
    ensure!(number(&restored, ROWS).await? == scene.rows);
    work(&restored, 2).await?;
    let rows = number(&restored, ROWS).await?;
    restored.stop(StopMode::Fast).await?;
    ensure!(timeline(&restored)? == Timeline(2));

    let inventory = scene.archive.inventory().await?;
    let history = &inventory.timelines[&Timeline(2)].history;
    ensure!(history.is_some() && inventory.conflicts.is_empty(), "{inventory:?}");
    recover(&mut restored, &scene.base(), "recovery.signal", &settings)?;
    ensure!(opens(&mut restored).await?, "{}", restored.log_tail());
    ensure!(number(&restored, ROWS).await? == rows, "timeline 2 has {rows} rows");
    restored.stop(StopMode::Fast).await?;
    ensure!(timeline(&restored)? == Timeline(3));

    // The old primary, which nobody stopped for good, writes other WAL than its successor under no name of it.
    ensure!(scene.archive.inventory().await?.conflicts.is_empty());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn large_segments_of_a_late_timeline_cross_the_end_of_their_names() -> anyhow::Result<()> {
    let (place, archive) = (tempfile::tempdir()?, Archive::create()?);
    let push = command(&["push", "%p", "--new"], &archive.of("orders"))?;
    let settings = [("archive_mode", "on"), ("archive_command", push.as_str())];
    let mut primary = make(18, &place.path().join("primary"), options(&settings, Some(64))).await?;
    primary.set(&[("min_wal_size", "128MB")])?;
    let reset = services::postgres_bin(18)?.join("pg_resetwal");
    let data = primary.data_directory();
    let done = std::process::Command::new(reset)
        .args(["-l", "0000000A000000000000003D", "-D"])
        .arg(&data)
        .output()?;
    ensure!(done.status.success(), "{done:?}");
    // The reset forgot the settings that the log depends on.
    primary.start().await?;
    primary.stop(StopMode::Fast).await?;
    copy(&data, &place.path().join("base"))?;
    primary.start().await?;
    execute(&primary, &["CREATE TABLE t (n int, pad text)"]).await?;
    work(&primary, 3).await?;
    let rows = number(&primary, ROWS).await?;
    primary.stop(StopMode::Fast).await?;

    let inventory = archive.inventory().await?;
    let wal = &inventory.timelines[&Timeline(10)];
    ensure!(wal.segment_size == 64 << 20 && wal.runs.len() == 1, "{inventory:?}");
    archive.object("0000000A0000000100000000").await?.metadata().context("the next name")?;

    let get = command(&["get", "%f", "%p"], &archive.of("orders"))?;
    let settings =
        [("restore_command", get.as_str()), ("archive_mode", "off"), ("hot_standby", "off")];
    recover(&mut primary, &place.path().join("base"), "recovery.signal", &settings)?;
    ensure!(opens(&mut primary).await?, "{}", primary.log_tail());
    ensure!(number(&primary, ROWS).await? == rows);
    Ok(())
}

/// Starts a recovery that must fail, and looks whether it really has not ended.
async fn fails(server: &mut Instance, what: &str) -> anyhow::Result<String> {
    ensure!(!opens(server).await?, "{what}: the server opened");
    let log = server.log_tail();
    let control = ControlFile::read(&server.data_directory())?;
    ensure!(log.contains("FATAL"), "{what}: {log}");
    ensure!(control.timeline == Timeline(1), "{what}: {control:?}");
    ensure!(server.data_directory().join("recovery.signal").exists(), "{what}: {log}");
    Ok(log)
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_but_the_certain_end_of_the_log_ends_a_recovery() -> anyhow::Result<()> {
    let scene = Scene::create(15, 1, 4).await?;
    let archive = &scene.archive;
    let mut server = scene.restored(15, 1).await?;
    let of = archive.of("orders");
    let get = command(&["get", "%f", "%p", "--deadline", "2"], &of)?;
    let settings = [("restore_command", get.as_str()), ("hot_standby", "off")];
    recover(&mut server, &scene.base(), "recovery.signal", &settings)?;

    let inventory = archive.inventory().await?;
    let run = inventory.timelines[&Timeline(1)].runs[0];
    let name = |back: u64| {
        let segment = proto::wal::Segment { number: run.last.number - back, ..run.last };
        segment.file_name(1 << 20)
    };
    let (middle, next) = (archive.object(&name(2)).await?, archive.object(&name(1)).await?);
    let whole = std::fs::read(&middle)?;

    let away = archive.place.path().join("away");
    std::fs::rename(archive.path(), &away)?;
    let log = fails(&mut server, "the repository is away").await?;
    ensure!(log.contains("exit code 200"), "{log}");
    std::fs::create_dir(archive.path())?;
    fails(&mut server, "the repository's mount point is empty").await?;
    std::fs::remove_dir(archive.path())?;
    std::fs::rename(&away, archive.path())?;

    let mut changed = whole.clone();
    changed[whole.len() / 2] ^= 1;
    std::fs::write(&middle, changed)?;
    let log = fails(&mut server, "a segment is changed").await?;
    ensure!(log.contains("OBJECT_DAMAGED"), "{log}");
    std::fs::write(&middle, &whole[..whole.len() / 3])?;
    fails(&mut server, "a segment is cut").await?;
    std::fs::copy(&next, &middle)?;
    fails(&mut server, "another segment lies there").await?;
    std::fs::remove_file(&middle)?;
    let log = fails(&mut server, "a segment is deleted in the middle").await?;
    ensure!(log.contains("WAL_MISSING"), "{log}");
    std::fs::write(&middle, &whole)?;
    // Nothing is left of the timeline but the word that it may have been collected.
    let timeline = middle.parent().context("the timeline's directory")?;
    let (floor, aside) = (timeline.with_file_name("floor"), timeline.with_file_name("aside"));
    std::fs::rename(timeline, &aside)?;
    std::fs::create_dir(&floor)?;
    let rank = run.last.next().name(1 << 20).rank();
    std::fs::write(floor.join(format!("{rank:016X}")), "whatever it says")?;
    let log = fails(&mut server, "all of it was collected").await?;
    ensure!(log.contains("`repo gc` deleted the WAL before"), "{log}");
    std::fs::remove_dir_all(&floor)?;
    std::fs::rename(&aside, timeline)?;

    for (what, wrong) in [
        ("there is no such option", "--kye"),
        ("the key is not there", "--key /nowhere --passphrase"),
    ] {
        let wrong = get.replace("--key", wrong);
        server.set(&[("restore_command", &wrong)])?;
        fails(&mut server, what).await?;
    }
    let other = Archive::create()?;
    server.set(&[("restore_command", &get.replace(&archive.key(), &other.key()))])?;
    let log = fails(&mut server, "the key is another's").await?;
    ensure!(log.contains("KEY_WRONG"), "{log}");
    server.set(&[("restore_command", &get.replace("--cluster orders", "--cluster others"))])?;
    fails(&mut server, "the cluster is another").await?;

    server.set(&[("restore_command", get.as_str())])?;
    ensure!(opens(&mut server).await?, "{}", server.log_tail());
    ensure!(number(&server, ROWS).await? == scene.rows, "nothing was lost on the way");
    Ok(())
}

/// A second server that follows the scene's primary by streaming, and archives as `archive_mode` says.
async fn standby(scene: &Scene, archive_mode: &str) -> anyhow::Result<Instance> {
    let mut standby = make(15, &scene.place.path().join("standby"), options(&[], Some(1))).await?;
    let push = command(&["push", "%p", "--new"], &scene.archive.of("orders"))?;
    let sockets = scene.primary.socket_directory().display();
    let primary = format!("host={sockets} port={} user=postgres", scene.primary.port());
    let settings = [
        ("primary_conninfo", primary.as_str()),
        ("archive_mode", archive_mode),
        ("archive_command", push.as_str()),
    ];
    recover(&mut standby, &scene.base(), "standby.signal", &settings)?;
    standby.start().await.context(standby.log_tail())?;
    Ok(standby)
}

/// Promotes a standby that has replayed all that its primary wrote. The end of the old timeline.
async fn promote(standby: &Instance, primary: &Instance) -> anyhow::Result<()> {
    let end = text(primary, "SELECT pg_current_wal_lsn()::text").await?;
    let has = format!("SELECT (pg_last_wal_replay_lsn() >= '{end}')::text");
    eventually_async(format!("the standby at {end}"), SOON, async || {
        Ok((text(standby, &has).await? == "true").then_some(()))
    })
    .await?;
    execute(standby, &["SELECT pg_promote()"]).await
}

/// Hides a file of the archive until it is shown again.
struct Hidden(PathBuf);

impl Hidden {
    fn hide(object: PathBuf) -> anyhow::Result<Self> {
        std::fs::rename(&object, object.with_extension("hidden"))?;
        Ok(Self(object))
    }

    fn show(self) -> anyhow::Result<()> {
        Ok(std::fs::rename(self.0.with_extension("hidden"), &self.0)?)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_not_archived_before_a_promotion_is_missing_and_no_end() -> anyhow::Result<()> {
    let mut scene = Scene::create(15, 1, 3).await?;
    let of = scene.archive.of("orders");
    // The primary cannot archive any more; its standby streams all the same, and is promoted when the primary is gone.
    scene.primary.set(&[("archive_command", "false")])?;
    scene.primary.start().await?;
    let mut standby = standby(&scene, "on").await?;
    work(&scene.primary, 3).await?;
    execute(&scene.primary, &["INSERT INTO t VALUES (0, 'last')"]).await?;
    promote(&standby, &scene.primary).await?;
    scene.primary.kill9();
    work(&standby, 2).await?;
    let rows = number(&standby, ROWS).await?;
    standby.stop(StopMode::Fast).await?;

    let get = command(&["get", "%f", "%p", "--deadline", "2"], &of)?;
    let settings = [("restore_command", get.as_str()), ("hot_standby", "off")];
    let mut server = scene.restored(15, 1).await?;
    recover(&mut server, &scene.base(), "recovery.signal", &settings)?;
    let inventory = scene.archive.inventory().await?;
    let run = inventory.timelines[&Timeline(1)].runs[0];
    let history = inventory.timelines[&Timeline(2)].history.as_ref().context("a history")?;
    let fork =
        proto::wal::Segment::containing(history.entries[0].switched_at, Timeline(1), 1 << 20);
    ensure!(fork.number > run.last.number + 2, "{inventory:?}");
    let log = fails(&mut server, "the end of the old timeline was never archived").await?;
    let missing = run.last.next().file_name(1 << 20);
    ensure!(log.contains("WAL_MISSING") && log.contains(&missing), "{log}");

    // What the promoted standby still has closes the gap.
    for number in run.last.number + 1..fork.number {
        let name = proto::wal::Segment { number, ..run.last }.file_name(1 << 20);
        let path = format!("pg_wal/{name}");
        let done = scene.archive.run(&standby.data_directory(), "orders", &["push", &path])?;
        ensure!(done.code() == 0, "{done}");
    }
    ensure!(opens(&mut server).await?, "{}", server.log_tail());
    ensure!(number(&server, ROWS).await? == rows);
    server.stop(StopMode::Fast).await?;

    // Without its history nobody finds the new timeline, and the old one ends long before it.
    let hidden = Hidden::hide(scene.archive.object("00000002.history").await?)?;
    recover(&mut server, &scene.base(), "recovery.signal", &settings)?;
    let log = fails(&mut server, "the history of the newest timeline is gone").await?;
    ensure!(log.contains("WAL_MISSING") && log.contains("00000002.history"), "{log}");
    // The server's own is as good.
    let own = |server: &Instance| server.data_directory().join("pg_wal/00000002.history");
    std::fs::copy(own(&standby), own(&server))?;
    ensure!(opens(&mut server).await?, "{}", server.log_tail());
    ensure!(number(&server, ROWS).await? == rows);
    hidden.show()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_branch_that_a_promotion_abandoned_is_not_replayed() -> anyhow::Result<()> {
    let mut scene = Scene::create(15, 1, 2).await?;
    scene.primary.start().await?;
    let mut standby = standby(&scene, "always").await?;
    eventually_async("a segment that both have archived", SOON, async || {
        let both = "SELECT archived_count + failed_count FROM pg_stat_archiver";
        Ok((number(&standby, both).await? > 0).then_some(()))
    })
    .await?;
    execute(&scene.primary, &["INSERT INTO t VALUES (0, 'common')"]).await?;
    let before = text(&scene.primary, "SELECT pg_current_wal_lsn()::text").await?;
    let rows = number(&scene.primary, ROWS).await?;
    promote(&standby, &scene.primary).await?;
    // It comes to archive that there is a new timeline, and nothing of it.
    let history = scene.archive.object("00000002.history").await?;
    eventually_async("the new history in the archive", SOON, async || {
        Ok(history.exists().then_some(()))
    })
    .await?;
    standby.kill9();
    // The old primary, which heard of nothing, goes on.
    work(&scene.primary, 3).await?;
    scene.primary.stop(StopMode::Fast).await?;

    let get = command(&["get", "%f", "%p", "--deadline", "2"], &scene.archive.of("orders"))?;
    let settings = [("restore_command", get.as_str()), ("hot_standby", "off")];
    let mut server = scene.restored(15, 1).await?;
    recover(&mut server, &scene.base(), "recovery.signal", &settings)?;
    let log = fails(&mut server, "the new timeline was never archived").await?;
    ensure!(log.contains("WAL_MISSING") && log.contains("left timeline 1 at"), "{log}");

    // What both have in common can be recovered,
    let target = [("recovery_target_lsn", before.as_str()), ("recovery_target_action", "promote")];
    recover(&mut server, &scene.base(), "recovery.signal", &[&settings[..], &target].concat())?;
    ensure!(opens(&mut server).await?, "{}", server.log_tail());
    ensure!(number(&server, ROWS).await? == rows);
    server.stop(StopMode::Fast).await?;
    // and all of the new timeline once its server has archived it.
    standby.start().await?;
    work(&standby, 2).await?;
    let rows = number(&standby, ROWS).await?;
    standby.stop(StopMode::Fast).await?;
    server.set(&[("recovery_target_lsn", "")])?;
    recover(&mut server, &scene.base(), "recovery.signal", &settings)?;
    ensure!(opens(&mut server).await?, "{}", server.log_tail());
    ensure!(number(&server, ROWS).await? == rows);
    let inventory = scene.archive.inventory().await?;
    ensure!(inventory.conflicts.is_empty(), "{inventory:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_hangs_or_is_gone_is_no_end_of_the_log_and_no_end_of_waiting()
-> anyhow::Result<()> {
    let (place, bucket) = (tempfile::tempdir()?, Bucket::create().await?);
    let port: u16 = bucket.endpoint().rsplit(':').next().context("a port")?.parse()?;
    let proxy = Proxy::to(port)?;
    let url = |bucket: &Bucket| {
        let endpoint = bucket.endpoint().replace(':', "%3A");
        format!(
            "s3://{}/r?endpoint={endpoint}&path-style=true&region={}",
            bucket.name(),
            bucket::REGION
        )
    };
    let (straight, through) = (url(&bucket), url(&bucket.through(proxy.port())));
    let key = place.path().join("key").display().to_string();
    let s3 = |words: &[&str]| {
        Pgmuster::start_with(words, |command| {
            command
                .current_dir(place.path())
                .env("AWS_ACCESS_KEY_ID", bucket::ACCESS_KEY)
                .env("AWS_SECRET_ACCESS_KEY", bucket::SECRET_KEY);
        })?
        .wait(SOON)
    };
    let made = s3(&["repo", "init", &straight, "--key", &key])?;
    ensure!(made.code() == 0, "{made}");
    let mut server = make(15, &place.path().join("i"), options(&[], Some(1))).await?;
    server.start().await?;
    let first = text(&server, "SELECT pg_walfile_name(pg_current_wal_lsn())").await?;
    execute(&server, &["SELECT pg_switch_wal()"]).await?;
    server.stop(StopMode::Fast).await?;
    let wal = server.data_directory().join("pg_wal").join(&first).display().to_string();
    let push = |url: &str| {
        s3(&[
            "wal",
            "push",
            "--new",
            &wal,
            "--repository",
            url,
            "--key",
            &key,
            "--cluster",
            "c",
            "--deadline",
            "1",
        ])
    };
    let get = |url: &str, file: &str, more: &[&str]| {
        let words =
            ["wal", "get", file, "fetched", "--repository", url, "--key", &key, "--cluster", "c"];
        s3(&[&words, more].concat())
    };
    for stall in [true, false] {
        if stall {
            proxy.stall();
        } else {
            proxy.cut();
        }
        let pushed = push(&through)?;
        ensure!((1..=125).contains(&pushed.code()), "stalled {stall}: {pushed}");
        let got = get(&through, &first, &["--deadline", "1"])?;
        ensure!(got.code() == NOT_KNOWN, "stalled {stall}: {got}");
    }
    proxy.heal();
    let pushed = push(&through)?;
    ensure!(pushed.code() == 0, "{pushed}");
    let got = get(&through, &first, &[])?;
    ensure!(got.code() == 0, "{got}");
    ensure!(std::fs::read(place.path().join("fetched"))? == std::fs::read(&wal)?);
    let last = get(&straight, "0000000100000000000000FF", &[])?;
    ensure!(last.code() == 1 && last.stderr.is_empty(), "a certain end is quiet: {last}");
    let gap = get(&straight, "000000010000000000000001", &[])?;
    ensure!(gap.code() == if first.ends_with("01") { 0 } else { NOT_KNOWN }, "{gap}");

    // A standby survives an outage, and only a standby.
    proxy.cut();
    let outage = ["--standby", "--deadline", "1"];
    let got = get(&through, &first, &outage)?;
    ensure!(got.code() == NOT_KNOWN, "{got}");
    std::fs::write(place.path().join("standby.signal"), "")?;
    let got = get(&through, &first, &outage)?;
    ensure!(got.code() == 1 && got.stderr.contains("A standby asks again"), "{got}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_outlives_an_outage_of_its_archive() -> anyhow::Result<()> {
    let mut scene = Scene::create(15, 1, 2).await?;
    let mut standby = scene.restored(15, 1).await?;
    let of = scene.archive.of("orders");
    let get = command(&["get", "%f", "%p", "--standby", "--deadline", "1"], &of)?;
    recover(&mut standby, &scene.base(), "standby.signal", &[("restore_command", &get)])?;
    standby.start().await.context(standby.log_tail())?;
    let has = async |rows: i64| {
        eventually_async(format!("{rows} rows on the standby"), SOON, async || {
            Ok((number(&standby, ROWS).await? == rows).then_some(()))
        })
        .await
    };
    has(scene.rows).await?;
    let away = scene.archive.place.path().join("away");
    std::fs::rename(scene.archive.path(), &away)?;
    eventually_async("the outage in the standby's log", SOON, async || {
        Ok(standby.log_tail().contains("A standby asks again").then_some(()))
    })
    .await?;
    std::fs::rename(&away, scene.archive.path())?;
    scene.primary.start().await?;
    work(&scene.primary, 2).await?;
    has(number(&scene.primary, ROWS).await?).await?;
    ensure!(text(&standby, "SELECT pg_is_in_recovery()::text").await? == "true");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_a_server_wrote_whole_is_archived_and_only_by_that_cluster() -> anyhow::Result<()>
{
    let (place, archive) = (tempfile::tempdir()?, Archive::create()?);
    let mut first = make(15, &place.path().join("a"), options(&[], Some(1))).await?;
    let mut other = make(15, &place.path().join("b"), options(&[], Some(1))).await?;
    let mut names = Vec::new();
    for server in [&mut first, &mut other] {
        server.start().await?;
        names.push(text(server, "SELECT pg_walfile_name(pg_current_wal_lsn())").await?);
        execute(server, &["SELECT pg_switch_wal()", "CREATE TABLE t ()", "SELECT pg_switch_wal()"])
            .await?;
        server.stop(StopMode::Fast).await?;
    }
    let (ours, theirs) = (first.data_directory(), other.data_directory());
    let name = names[0].as_str();
    let push = |server: &Path, path: &str| archive.run(server, "orders", &["push", path]);
    let refused = |server: &Path, path: &str, code: &str| {
        let done = push(server, path)?;
        ensure!((1..=125).contains(&done.code()) && done.stderr.contains(code), "{path}: {done}");
        Ok(done)
    };

    // Killed at any point, and again: nothing is lost and nothing is wrong.
    for step in ["wal_read", "wal_store", "wal_stored"] {
        let words = ["wal", "push", "--new", &format!("pg_wal/{name}")].map(str::to_owned);
        let words: Vec<String> = words.into_iter().chain(archive.of("orders")).collect();
        let killed = Pgmuster::start_with(&words, |command| {
            command.current_dir(&ours).env("PGMUSTER_FAILPOINT", format!("{step}=abort"));
        })?
        .wait(SOON)?;
        ensure!(killed.status.code().is_none(), "{step}: {killed}");
    }
    let again = push(&ours, &format!("pg_wal/{name}"))?;
    ensure!(again.code() == 0 && again.stderr.contains("archived before"), "{again}");

    // A slip in the name of a cluster begins no other one.
    let slip = archive.run(&ours, "ordrs", &["push", &format!("pg_wal/{name}")])?;
    ensure!(slip.code() == 6 && slip.stderr.contains("did you mean orders?"), "{slip}");
    archive.lineage().await?;

    // Another cluster, under any name of it.
    refused(&theirs, &format!("pg_wal/{}", names[1]), "SYSTEM_IDENTIFIER_MISMATCH")?;
    std::fs::write(
        theirs.join("pg_wal/00000002.history"),
        "1\t0/1500000\tno recovery target specified\n",
    )?;
    refused(&theirs, "pg_wal/00000002.history", "SYSTEM_IDENTIFIER_MISMATCH")?;

    // Files that are not what their names say.
    let whole = std::fs::read(ours.join("pg_wal").join(name))?;
    let next = proto::wal::Segment::parse(name, 1 << 20).context("a segment")?.next();
    let next = next.file_name(1 << 20);
    std::fs::create_dir(ours.join("odd"))?;
    for (odd, content) in [
        (next.clone(), whole.clone()),
        (name.to_owned(), whole[..whole.len() / 2].to_vec()),
        (name.to_owned(), Vec::new()),
        (format!("{next}.partial"), whole.clone()),
        ("00000002.history".to_owned(), Vec::new()),
        ("00000002.history".to_owned(), b"2\t0/1500000\tx\n".to_vec()),
        ("RECOVERYXLOG".to_owned(), whole.clone()),
        (name.to_lowercase() + "x", whole.clone()),
    ] {
        std::fs::write(ours.join("odd").join(&odd), content)?;
        refused(&ours, &format!("odd/{odd}"), "WAL_REFUSED")?;
    }
    ensure!(push(&ours, "pg_wal/archive_status")?.code() != 0);

    // Other content under the same name: kept aside, and what is stored stays.
    let mut diverged = whole.clone();
    *diverged.last_mut().context("a byte")? ^= 1;
    std::fs::write(ours.join("odd").join(name), &diverged)?;
    let conflict = refused(&ours, &format!("odd/{name}"), "WAL_CONFLICT")?;
    ensure!(conflict.stderr.contains(&format!("conflicts/{name}/1")), "{conflict}");
    let got = archive.run(&ours, "orders", &["get", name, "pg_wal/RECOVERYXLOG"])?;
    ensure!(got.code() == 0 && std::fs::read(ours.join("pg_wal/RECOVERYXLOG"))? == whole, "{got}");

    // Killed before what was fetched has its name: what is left is what the server itself sweeps when it starts.
    let words = ["wal", "get", name, "pg_wal/RECOVERYXLOG"].map(str::to_owned);
    let words: Vec<String> = words.into_iter().chain(archive.of("orders")).collect();
    let in_wal = || -> anyhow::Result<BTreeSet<String>> {
        let entries = std::fs::read_dir(ours.join("pg_wal"))?;
        Ok(entries
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<std::io::Result<_>>()?)
    };
    let before = in_wal()?;
    let killed = Pgmuster::start_with(&words, |command| {
        command.current_dir(&ours).env("PGMUSTER_FAILPOINT", "wal_written=abort");
    })?
    .wait(SOON)?;
    ensure!(killed.status.code().is_none(), "{killed}");
    let left: Vec<String> = in_wal()?.difference(&before).cloned().collect();
    ensure!(left.len() == 1 && left[0].starts_with("xlogtemp."), "{left:?}");

    // An unfinished segment serves nobody under the plain name.
    let partial = format!("{next}.partial");
    std::fs::copy(ours.join("pg_wal").join(&next), ours.join("odd").join(&partial))?;
    let done = push(&ours, &format!("odd/{partial}"))?;
    ensure!(done.code() == 0, "{done}");
    let got = archive.run(&ours, "orders", &["get", &next, "pg_wal/RECOVERYXLOG"])?;
    ensure!(got.code() == 1, "{got}");

    // A timeline without a history, as the server's first one.
    let got =
        archive.run(&ours, "orders", &["get", "00000002.history", "pg_wal/RECOVERYHISTORY"])?;
    ensure!(got.code() == 1, "{got}");

    // A segment that a backup brought along and the archive lacks is the server's own, if it is whole.
    let last = format!("{}{:08X}", &next[..16], 0xff);
    let mut later = whole.clone();
    later[8..16].copy_from_slice(&(0xff_u64 << 20).to_ne_bytes());
    std::fs::write(ours.join("odd").join(&last), later)?;
    let done = push(&ours, &format!("odd/{last}"))?;
    ensure!(done.code() == 0, "{done}");
    let got = archive.run(&ours, "orders", &["get", &next, "pg_wal/RECOVERYXLOG"])?;
    ensure!(got.code() == 1, "{got}");
    let brought = ours.join("pg_wal").join(&next);
    let mut cut = std::fs::read(&brought)?;
    let end = cut.iter().rposition(|byte| *byte != 0).context("a record")?;
    cut[end - 16..].fill(0);
    std::fs::write(&brought, cut)?;
    let got = archive.run(&ours, "orders", &["get", &next, "pg_wal/RECOVERYXLOG"])?;
    ensure!(got.code() == NOT_KNOWN && got.stderr.contains("WAL_MISSING"), "{got}");

    // What is rotten of another cluster stands in nobody's way.
    let theirs_first = format!("pg_wal/{}", names[1]);
    let done = archive.run(&theirs, "others", &["push", "--new", &theirs_first])?;
    ensure!(done.code() == 0, "{done}");
    let (repository, others) = (archive.open().await?, "others".parse()?);
    let system_identifier = ControlFile::read(&theirs)?.system_identifier;
    let kind = BackupKind::Physical;
    let [rotten] = &repository.lineages_of(kind, &others, system_identifier).await?[..] else {
        bail!("another lineage")
    };
    let identity = archive.path().join(format!("lineages/{}/identity", rotten.lineage));
    let sound = std::fs::read(&identity)?;
    std::fs::write(&identity, &sound[..sound.len() - 1])?;
    ensure!(push(&ours, &format!("pg_wal/{name}"))?.code() == 0);
    let got = archive.run(&ours, "orders", &["get", name, "pg_wal/RECOVERYXLOG"])?;
    ensure!(got.code() == 0, "{got}");
    std::fs::write(&identity, sound)?;

    // A lineage of logical backups has no WAL.
    let dumps = repository
        .find_or_mint_lineage_of(BackupKind::Logical, &others, system_identifier, 1)
        .await?
        .lineage
        .to_string();
    let of = [&archive.of("others")[..4], &["--lineage".to_owned(), dumps]].concat();
    let asked = |words: &[&str]| {
        run(&theirs, words.iter().map(|&word| word.to_owned()).chain(of.iter().cloned()))
    };
    let pushed = asked(&["wal", "push", &format!("pg_wal/{}", names[1])])?;
    ensure!(pushed.code() == 2 && pushed.stderr.contains("has no WAL"), "{pushed}");
    let got = asked(&["wal", "get", name, "x"])?;
    ensure!(got.code() == NOT_KNOWN && got.stderr.contains("has no WAL"), "{got}");
    Ok(())
}

#[test]
fn a_question_that_is_asked_wrongly_is_never_answered() -> anyhow::Result<()> {
    let (place, archive) = (tempfile::tempdir()?, Archive::create()?);
    let of = archive.of("orders");
    let all: Vec<&str> = of.iter().map(String::as_str).collect();
    let name = "000000010000000000000001";
    for words in [
        vec!["wal"],
        vec!["wal", "gte", name, "x"],
        vec!["wal", "get"],
        vec!["wal", "get", "no-name", "x"],
        vec!["wal", "get", name, "x", "--deadline", "0"],
        vec!["wal", "get", name, "x", "--lineage", "x"],
        vec!["--log", "a=b=c", "wal", "get", name, "x"],
        vec!["wal", "get", name, "x"],
    ] {
        let words: Vec<&str> =
            if words.contains(&name) { [words, all.clone()].concat() } else { words };
        let asked = run(place.path(), words.iter().map(|&word| word.to_owned()))?;
        // The repository has never heard of the cluster.
        ensure!(asked.code() == NOT_KNOWN, "{words:?}: {asked}");
    }
    for (key, what) in [("/nowhere", "absent"), ("/", "a directory"), ("/etc/passwd", "no key")] {
        let words = [
            "wal",
            "get",
            name,
            "x",
            "--repository",
            &archive.url(),
            "--key",
            key,
            "--cluster",
            "c",
        ];
        let asked = run(place.path(), words.iter().map(|&word| word.to_owned()))?;
        ensure!(asked.code() == NOT_KNOWN, "the key is {what}: {asked}");
    }
    // No name and no value makes another command of it, and other commands end as ever.
    let asked = archive.run(place.path(), "push", &["get", name, "x", "--deadline", "1"])?;
    ensure!(asked.code() == NOT_KNOWN, "the cluster is called push: {asked}");
    for (words, code) in [
        (vec!["wal", "push", name, "--kye", "x"], 2),
        (vec!["--log", "push", "wal", "get", name, "--kye", "x"], NOT_KNOWN),
        (vec!["cluster", "show", "wal", "--coordinator", "http://127.0.0.1:9"], 2),
    ] {
        let asked = run(place.path(), words.iter().map(|&word| word.to_owned()))?;
        ensure!(asked.code() == code, "{words:?}: {asked}");
    }
    Ok(())
}
