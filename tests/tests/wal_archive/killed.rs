//! Hundreds of segments, pushed by a program and a service that are killed all the time, each by its server and then once more,
//! with the same content or with another one: every segment is there as its server wrote it, and there is no gap at any moment.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail, ensure};
use postgres::instance::StopMode;
use proto::wal::Segment;
use proto::{Timeline, WalFileName};
use repository::store::{self, Credentials};
use repository::{KeyFile, Repository};
use tests::{Bucket, Finished, Pgmuster, bucket};

use super::{SOON, make, options, text};

const SEED: u64 = 20_261_127;
const SEGMENT_BYTES: u32 = 1 << 20;
/// How far ahead of what it hands over a server has filled segments.
const FILLED_AHEAD: u64 = 16;
/// Of so many pushes one is killed.
const ONE_IS_KILLED: u64 = 4;
/// After so many segments the service dies, on average.
const SERVICE_LIVES: u64 = 12;
/// Of so many segments one comes again with another content.
const ONE_IS_FOREIGN: u64 = 5;
const CONFLICT: i32 = 7;

/// What happens next: by chance, and the same chance in every run.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn one_of(&mut self, number: u64) -> bool {
        self.next().is_multiple_of(number)
    }
}

/// Starts the program in a directory.
fn start(words: &[&str], directory: &Path) -> anyhow::Result<Pgmuster> {
    Pgmuster::start_with(words, |command| {
        command
            .current_dir(directory)
            .env("AWS_ACCESS_KEY_ID", bucket::ACCESS_KEY)
            .env("AWS_SECRET_ACCESS_KEY", bucket::SECRET_KEY);
    })
}

/// A repository somewhere, and how commands reach it.
struct Place {
    directory: tempfile::TempDir,
    url: String,
}

impl Place {
    fn create(url: impl FnOnce(&Path) -> String) -> anyhow::Result<Self> {
        let directory = tempfile::tempdir()?;
        let place = Self { url: url(directory.path()), directory };
        let words = ["repo", "init", &place.url, "--key", &place.key()];
        let made = start(&words, place.directory.path())?;
        let made = made.wait(SOON)?;
        ensure!(made.code() == 0, "{made}");
        Ok(place)
    }

    fn key(&self) -> String {
        self.directory.path().join("key").display().to_string()
    }

    fn socket(&self) -> String {
        self.directory.path().join("wal.sock").display().to_string()
    }

    fn serve(&self) -> anyhow::Result<Pgmuster> {
        let (socket, key) = (self.socket(), self.key());
        let words = ["wal", "serve", &socket, "--repository", &self.url, "--key", &key];
        let mut service = start(&words, self.directory.path())?;
        service.wait_for_line("Answers at", SOON)?;
        Ok(service)
    }

    async fn open(&self) -> anyhow::Result<Repository> {
        let credentials = Credentials {
            access_key_id: Some(bucket::ACCESS_KEY.to_owned()),
            secret_access_key: Some(bucket::SECRET_KEY.into()),
            ..Credentials::default()
        };
        let key: KeyFile = std::fs::read_to_string(self.key())?.parse()?;
        Ok(Repository::open(store::open(&self.url, &credentials).await?, Some(&key)).await?)
    }
}

/// The log of a server that has stopped: its one real segment under many numbers, each with something of its own at its end, which
/// the server left empty.
struct Log {
    data: PathBuf,
    real: Vec<u8>,
    first: u64,
    segments: u64,
}

impl Log {
    async fn create(place: &Path, segments: u64) -> anyhow::Result<Self> {
        let mut server = make(15, place, options(&[], Some(1))).await?;
        server.start().await?;
        let real = text(&server, "SELECT pg_walfile_name(pg_current_wal_insert_lsn())").await?;
        super::execute(&server, &["SELECT pg_switch_wal()", "CREATE TABLE t ()"]).await?;
        server.stop(StopMode::Fast).await?;
        let data = server.data_directory();
        let first = Segment::parse(&real, SEGMENT_BYTES).context("a segment")?.number;
        let real = std::fs::read(data.join("pg_wal").join(real))?;
        ensure!(real.ends_with(&[0; 64]), "the server switched at the very end of a segment");
        std::fs::create_dir(data.join("again"))?;
        Ok(Self { data, real, first, segments })
    }

    fn name(number: u64) -> String {
        Segment { timeline: Timeline(1), number }.file_name(SEGMENT_BYTES)
    }

    fn numbers(&self) -> std::ops::Range<u64> {
        self.first..self.first + self.segments
    }

    fn content(&self, number: u64) -> Vec<u8> {
        let mut content = self.real.clone();
        let start = number * u64::from(SEGMENT_BYTES);
        content[8..16].copy_from_slice(&start.to_ne_bytes());
        let end = content.len() - 8;
        content[end..].copy_from_slice(&number.to_ne_bytes());
        content
    }

    /// What another server would have written there: one bit is another.
    fn foreign(&self, number: u64) -> anyhow::Result<Vec<u8>> {
        let mut content = self.content(number);
        // Behind the header, which would tell.
        let at = 40 + usize::try_from(number * 7_919)? % (content.len() - 40);
        content[at] ^= 1 << (number % 8);
        Ok(content)
    }

    /// The server has filled it, and marks it as ready.
    fn fill(&self, number: u64) -> anyhow::Result<()> {
        let (name, wal) = (Self::name(number), self.data.join("pg_wal"));
        std::fs::write(wal.join(&name), self.content(number))?;
        Ok(std::fs::write(wal.join(format!("archive_status/{name}.ready")), "")?)
    }

    /// The server was told that it is archived, and takes its file for a later one.
    fn recycle(&self, number: u64) -> anyhow::Result<()> {
        let (name, wal) = (Self::name(number), self.data.join("pg_wal"));
        std::fs::remove_file(wal.join(format!("archive_status/{name}.ready")))?;
        Ok(std::fs::remove_file(wal.join(&name))?)
    }
}

/// Whoever calls `wal push`, and how often it was killed.
struct Caller<'a> {
    place: &'a Place,
    log: &'a Log,
    chance: Chance,
    /// How long a push takes that lives.
    usual: Duration,
    calls: usize,
    deaths: usize,
}

impl<'a> Caller<'a> {
    fn new(place: &'a Place, log: &'a Log, seed: u64) -> Self {
        let usual = Duration::from_millis(50);
        Self { place, log, chance: Chance(seed), usual, calls: 0, deaths: 0 }
    }

    /// Pushes until a push lives: through the service or without it, as it comes.
    fn push(&mut self, path: &str) -> anyhow::Result<Finished> {
        loop {
            let (key, socket) = (self.place.key(), self.place.socket());
            let mut words = vec!["wal", "push", path, "--new", "--cluster", "orders"];
            words.extend(["--repository", &self.place.url, "--key", &key]);
            if self.chance.one_of(2) {
                words.extend(["--socket", &socket]);
            }
            let (began, is_killed) = (Instant::now(), self.chance.one_of(ONE_IS_KILLED));
            let mut program = start(&words, &self.log.data)?;
            self.calls += 1;
            if !is_killed {
                let done = program.wait(SOON)?;
                self.usual = (self.usual + began.elapsed()) / 2;
                return Ok(done);
            }
            // At any moment of its life; where it has ended before, nobody heard what it said.
            let within = u64::try_from(self.usual.as_micros())?.max(1);
            std::thread::sleep(Duration::from_micros(self.chance.next() % within));
            program.kill()?;
            self.deaths += 1;
        }
    }
}

/// The server: hands over one segment after the other, each until it is told that it is archived, whatever happens to the service.
/// Says which are, and how often the service died.
fn archive(
    mut caller: Caller<'_>,
    archived: &SyncSender<u64>,
) -> anyhow::Result<(usize, usize, usize)> {
    let (log, place) = (caller.log, caller.place);
    let mut service = None;
    let mut services_died = 0;
    for number in log.numbers() {
        let filled = if number == log.first { number } else { number + FILLED_AHEAD };
        for next in filled..=number + FILLED_AHEAD {
            log.fill(next)?;
        }
        if service.is_none() && caller.chance.one_of(2) {
            service = Some(place.serve()?);
        }
        let name = Log::name(number);
        let done = caller.push(&format!("pg_wal/{name}"))?;
        ensure!(done.code() == 0, "{name} is not archived: {done}");
        log.recycle(number)?;
        archived.send(number)?;
        if caller.chance.one_of(SERVICE_LIVES)
            && let Some(mut service) = service.take()
        {
            service.kill()?;
            services_died += 1;
            let repository = tokio::runtime::Handle::current().block_on(place.open())?;
            let runs = tokio::runtime::Handle::current().block_on(runs(&repository))?;
            ensure!(runs.len() == 1, "behind {name} there is a gap: {runs:?}");
        }
    }
    Ok((caller.calls, caller.deaths, services_died))
}

/// What is archived comes again, and some of it from another server. Says which was refused, and how often it was killed.
fn come_again(
    mut caller: Caller<'_>,
    archived: &Receiver<u64>,
) -> anyhow::Result<(BTreeSet<u64>, usize, usize)> {
    let mut refused = BTreeSet::new();
    while let Ok(number) = archived.recv() {
        let is_foreign = caller.chance.one_of(ONE_IS_FOREIGN);
        let log = caller.log;
        let content = if is_foreign { log.foreign(number)? } else { log.content(number) };
        let path = format!("again/{}", Log::name(number));
        std::fs::write(log.data.join(&path), content)?;
        let done = caller.push(&path)?;
        std::fs::remove_file(log.data.join(&path))?;
        match (is_foreign, done.code()) {
            (false, 0) => {}
            (true, CONFLICT) if done.stderr.contains("WAL_CONFLICT") => {
                refused.insert(number);
            }
            _ => bail!(
                "{path}, which is {}: {done}",
                if is_foreign { "foreign" } else { "the same" }
            ),
        }
    }
    Ok((refused, caller.calls, caller.deaths))
}

/// The first and the last number of each run of segments.
async fn runs(repository: &Repository) -> anyhow::Result<Vec<(u64, u64)>> {
    let lineages = repository.list_lineages().await?;
    let [lineage] = &lineages[..] else { bail!("one cluster has one lineage: {lineages:?}") };
    let inventory = repository.list_wal(lineage.lineage).await?;
    let timeline = inventory.timelines.get(&Timeline(1)).context("timeline 1")?;
    Ok(timeline.runs.iter().map(|run| (run.first.number, run.last.number)).collect())
}

/// Pushes so many segments into a repository and looks at what is there then.
#[expect(clippy::print_stdout, reason = "what chance did, for whoever reads the run")]
async fn tell(segments: u64, url: impl FnOnce(&Path) -> String) -> anyhow::Result<()> {
    let place = Place::create(url)?;
    let log = Log::create(&place.directory.path().join("server"), segments).await?;
    let (is_archived, archived) = sync_channel(usize::try_from(segments)?);
    let (by_server, again) = std::thread::scope(|scope| {
        let runtime = tokio::runtime::Handle::current();
        let server = Caller::new(&place, &log, SEED);
        let other = Caller::new(&place, &log, SEED + 1);
        let server = scope.spawn(move || {
            let _runtime = runtime.enter();
            archive(server, &is_archived)
        });
        let again = come_again(other, &archived);
        (server.join(), again)
    });
    let Ok(by_server) = by_server else { bail!("the server's thread is gone") };
    let ((calls, deaths, services), (refused, more_calls, more_deaths)) = (by_server?, again?);
    let (calls, deaths) = (calls + more_calls, deaths + more_deaths);
    println!(
        "seed {SEED}: {segments} segments in {calls} pushes, {deaths} of them killed, and {services} services; {} refused",
        refused.len()
    );
    ensure!(deaths as u64 > segments / 4 && services as u64 >= segments / 60, "too few died");
    ensure!(refused.len() as u64 >= segments / 10, "only {} are foreign", refused.len());

    let repository = place.open().await?;
    let all = log.numbers();
    // What was marked beyond may have been stored ahead.
    let runs = runs(&repository).await?;
    ensure!(runs.len() == 1 && runs[0].0 == all.start && runs[0].1 >= all.end - 1, "{runs:?}");
    let lineage = repository.list_lineages().await?[0].lineage;
    let inventory = repository.list_wal(lineage).await?;
    ensure!(inventory.gaps().is_empty() && inventory.damaged.is_empty(), "{inventory:?}");
    let kept: BTreeSet<String> = inventory.conflicts.iter().map(ToString::to_string).collect();
    ensure!(kept == refused.into_iter().map(Log::name).collect(), "{kept:?}");
    for number in all.start..=runs[0].1 {
        let file: WalFileName = Log::name(number).parse()?;
        let there = repository.fetch_wal(lineage, &file).await?.context("a segment")?;
        ensure!(there == log.content(number), "{file} has another content");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn of_500_segments_under_kills_and_duplicates_none_is_lost_or_foreign() -> anyhow::Result<()>
{
    tell(500, |place| format!("file://{}/repository", place.display())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn of_segments_that_are_pushed_to_s3_under_kills_none_is_lost_or_foreign()
-> anyhow::Result<()> {
    let bucket = Bucket::create().await?;
    let (name, endpoint) = (bucket.name().to_owned(), bucket.endpoint().to_owned());
    let url = format!("s3://{name}/backups?endpoint={endpoint}&region=us-east-1&path-style=true");
    tell(60, |_| url).await
}
