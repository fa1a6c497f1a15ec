//! A backup from its first question to its verdict.

use std::collections::HashSet;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use postgres::census::{CensusDraft, CensusOptions, finish_census, take_census};
use postgres::control_file::{CONTROL_FILE_PATH, ControlFile};
use postgres::relation::PageRules;
use postgres::scan::{Entries, EntryKind, Scan, ScanEntry, ScanOptions};
use postgres::table_files::{TableFiles, may_take_over};
use postgres::wal::WalOrigin;
use postgres::wal_changes::WalChanges;
use postgres::wal_summaries::Earlier;
use postgres::{BackupSession, Stopped};
use proto::backup::{BackupFacts, Census, Reading, Tablespace};
use proto::job::{Backup, BackupOutcome};
use proto::wal::Segment;
use proto::{Action, BackupKind, Code, Failure, Lsn, Progress, Timeline};
use repository::{BackupWriter, Repository, SourceEntry, SourceKind, WriteOptions};

use super::begin::{Ready, enter, read_control, ready, same_timeline, sessions};
use super::changes::PageChanges;
use super::hold::Hold;
use super::kept::Kept;
use super::source::{BAD_PAGES_NAMED_MAX, DataDirectory, Found};
use super::wal::WalCollector;
use crate::clock;
use crate::config::BackupConfig;
use crate::context::{JobContext, StepHandle, blocking};
use crate::engines::attempt::{Beginning, as_ordered};
use crate::jobs::session_owner;
use crate::places::Cluster;

/// One table's count may hold its snapshot no longer.
const TABLE_COUNT_MAX: Duration = Duration::from_mins(1);

/// What is to be backed up, where to, how.
#[derive(Debug, Clone, Copy)]
pub struct BackupRequest<'a> {
    /// The source.
    pub cluster: &'a Cluster,
    /// The destination.
    pub repository: &'a Repository,
    /// The worker's settings.
    pub config: &'a BackupConfig,
    /// Who does it, for people: worker and boot.
    pub by: &'a str,
    /// The job's parameters.
    pub task: &'a Backup,
}

/// Takes a backup. When this fails the server is out of backup mode and nothing is committed; when it was dropped in the
/// middle, the closed sessions see to the first and the missing verdict to the second.
pub async fn back_up(
    cx: &JobContext,
    request: BackupRequest<'_>,
) -> Result<BackupOutcome, Failure> {
    let ready = cx
        .step_with("connect", |step| async move {
            let sessions = sessions(request.config, request.task.processes);
            let ready = ready(cx, request.cluster, request.repository, request.config, sessions).await?;
            if ready.files.here().is_none() {
                step.figure("remote_sessions", sessions as u64);
                tracing::info!(
                    cluster.name = %cx.spec.cluster,
                    "The server's files are read over {sessions} connections at most; the free space of its pg_wal cannot be \
                     looked at, backup.wal_held_max_bytes alone is the limit"
                );
            }
            if ready.server.in_recovery {
                step.figure("standby_lag_s", ready.lag_s);
            }
            Ok(ready)
        })
        .await?;
    let attempt = cx
        .step_with("begin", |step| {
            let (request, ready) = (&request, &ready);
            async move {
                let identifier = ready.server.system_identifier;
                let attempt = beginning(request).begin(cx, identifier).await?;
                let damaged = attempt.passed_over().len() as u64;
                if damaged > 0 {
                    step.figure("damaged_backups", damaged);
                }
                Ok(attempt)
            }
        })
        .await?;
    let lineage = attempt.lineage();
    let result = Box::pin(from_attempt(cx, &request, &ready, attempt)).await;
    // Whatever was in the middle of something says "cancelled" when it is told to stop; why it was told is for us to say.
    let result = result.map_err(|failure| match failure.code {
        Code::Cancelled if cx.cancel.is_cancelled() => cx.stopped(),
        _ => failure,
    });
    if let Err(failure) = &result {
        beginning(&request).give_up(cx, lineage, failure).await;
    }
    result
}

fn beginning<'a>(request: &BackupRequest<'a>) -> Beginning<'a> {
    let BackupRequest { repository, by, .. } = *request;
    Beginning { repository, by, kind: BackupKind::Physical }
}

async fn from_attempt(
    cx: &JobContext,
    request: &BackupRequest<'_>,
    ready: &Ready,
    attempt: repository::Attempt,
) -> Result<BackupOutcome, Failure> {
    let started_at_ms = clock::now_ms();
    let fast = request.task.fast_checkpoint;
    let mut session = cx.step("start_backup", enter(cx, request.cluster, ready, fast)).await?;
    let progress = Arc::new(repository::Progress::default());
    let timeline = session.started().timeline;
    let predecessor = attempt.predecessor_facts();
    let read_again = known_bad(predecessor);
    let read_all = why_read_all(request.task, predecessor, attempt.predecessor_is_newest());
    let (server, start) = (&session.started().server, session.started().start_lsn);
    let server_started_at_ms = server.started_at_ms;
    let may_take_over = predecessor.is_some_and(|facts| may_take_over(facts, server, start));
    let earlier = match read_all {
        Some(why) => Err(why.to_owned()),
        None => Earlier::of(predecessor, session.started()).map_err(|why| why.to_string()),
    };
    let mut writer = attempt.write(WriteOptions {
        full_read: read_all.is_some(),
        read_again,
        // Times and inodes mean something only where this process sees them itself.
        continuity: ready.files.here().map(|_| format!("{} timeline {timeline}", node_name())),
        ..as_ordered(cx, request.task, request.config, &progress)
    })?;
    let takes_over_counts = may_take_over && writer.trusts_stamps();
    let mut wal = collector(&session, ready, &writer);
    let hold = Hold::new(ready.files.here(), ready.server.wal_segment_size, request.config);
    // The slot was reserved at the checkpoint before the one that started the backup; that WAL is not needed.
    session.advance(wal.stored_until()).await?;
    hold.beside(&session, wal.store_history()).await?;
    let changes = match earlier {
        Err(why) => PageChanges::unknown(why),
        Ok(earlier) => {
            let kept = Kept { session: &mut session, wal: &mut wal, hold: &hold };
            let asking = |step: StepHandle| async move {
                let asked = PageChanges::ask(cx, request.cluster, ready, kept, earlier);
                let changes = Box::pin(asked).await?;
                step.figure("summaries", changes.summaries());
                Ok(changes)
            };
            cx.step_with("summaries", asking).await?
        }
    };
    let changes = Arc::new(changes);

    let mut copied = cx
        .step_with("copy", |step| {
            let (writer, progress) = (&mut writer, &*progress);
            let kept = Kept { session: &mut session, wal: &mut wal, hold: &hold };
            let before = Before { takes_over_counts, changes: &changes };
            async move {
                let copying = copy(cx, request, ready, (writer, progress), kept, before);
                let copied = Box::pin(copying).await?;
                let done = progress.snapshot();
                step.figure("files", done.files);
                step.figure("read_bytes", done.bytes_read);
                step.figure("unread_bytes", done.bytes_skipped);
                step.figure("reread_bytes", done.bytes_reread);
                step.figure("stored_bytes", done.bytes_stored);
                step.figure("taken_over_bytes", done.bytes_taken_over);
                step.figure("vanished_files", done.vanished);
                step.figure("silent_changes", done.silent_changes);
                if let Some(changes) = progress.silent_changes() {
                    tracing::warn!(
                        cluster.name = %cx.spec.cluster,
                        "SILENT_CHANGE: {} units of files had changed although times and sizes of the files had not, in {}; \
                         they are in this backup, and earlier ones have what was there before. Look for storage that lost \
                         writes, or for a copy that kept the times; the next backup reads everything",
                        changes.units,
                        changes.names(),
                    );
                }
                step.figure("bad_pages", copied.files.found().bad_page_count);
                step.figure("threads", writer.processes() as u64);
                if let Some(limit) = copied.files.rate_limit_bytes() {
                    step.figure("rate_limit_bytes", limit);
                }
                Ok(copied)
            }
        })
        .await?;
    let stopping_at_ms = clock::now_ms();
    let stopped = cx.step("stop_backup", stop(cx, &mut session)).await?;
    let stopped_at_ms = clock::now_ms();
    let census = cx
        .step_with("store_wal", |step| {
            let (wal, stopped, counted) = (&mut wal, &stopped, copied.counted.take());
            let tablespaces = &copied.tablespaces;
            let hold = &hold;
            async move {
                if ready.server.in_recovery {
                    wal.end_at(stopped.stop_lsn);
                }
                while hold.beside(&session, wal.store_one_through(stopped.stop_lsn)).await? {
                    session.advance(wal.stored_until()).await?;
                }
                step.figure("wal_bytes", wal.bytes());
                // The slot held all of it until now; had the session been lost, files might have been recycled under us.
                session.check().await?;
                if ready.server.in_recovery {
                    same_timeline(&ready.files, &session.started().server).await?;
                }
                let same = Box::pin(same_tablespaces(&session, wal.changes(), tablespaces));
                hold.beside(&session, same).await?;
                session.finish().await;
                Ok(finish_counting(cx, request, counted, wal, stopped).await)
            }
        })
        .await?;

    let found = copied.files.found();
    let reading = changes.reading(server_started_at_ms, &progress);
    let forbidden = census.as_ref().and_then(|census| census.forbidden.clone());
    let changed_files = reading.sentence();
    let facts = facts(
        cx,
        ready,
        &copied.control,
        (timeline, copied.start_lsn),
        (started_at_ms, stopped_at_ms),
        &stopped,
        census,
        &found,
        &copied.tablespaces,
        reading,
    );
    let written = cx
        .step("write_manifest", async {
            // Restored last, in this order: until they are there, no server starts from the copy.
            let label = stopped.backup_label.clone().into_bytes();
            let mut control_bytes = copied.control_bytes;
            if ready.server.in_recovery {
                control_bytes = ControlFile::with_recovery_end(&control_bytes, stopped.stop_lsn)
                    .map_err(Failure::bug)?;
            }
            let late = vec![
                SourceEntry::bytes("backup_label", 0o600, label),
                SourceEntry::bytes(CONTROL_FILE_PATH, 0o600, control_bytes),
            ];
            Ok(writer.finish(copied.files.clone(), late, facts).await?)
        })
        .await?;
    let summary = cx.step("commit", async { Ok(written.commit(clock::now_ms()).await?) }).await?;
    Ok(BackupOutcome {
        backup: summary.backup,
        lineage: summary.lineage,
        repository: request.repository.describe(),
        system_identifier: ready.server.system_identifier,
        server_version_num: ready.server.version.0,
        timeline,
        start_lsn: copied.start_lsn,
        stop_lsn: stopped.stop_lsn,
        wal_to: (!ready.server.in_recovery).then(|| {
            let size = ready.server.wal_segment_size;
            Segment::ending_at(stopped.stop_lsn, timeline, size).end(size)
        }),
        started_at_ms,
        // What commits while it stops may lie behind its end: whoever asks up to when it leads is told the earlier time.
        stopped_at_ms: stopping_at_ms,
        holds_to_ms: stopped.replayed_to_ms,
        ended_at_ms: Some(stopped_at_ms),
        files: summary.counts.files,
        size_bytes: summary.counts.bytes,
        read_bytes: progress.snapshot().bytes_read,
        stored_bytes: summary.counts.stored_bytes,
        taken_over_bytes: progress.snapshot().bytes_taken_over,
        reread_bytes: progress.snapshot().bytes_reread,
        reread_by_ms: reread_by(request.config, started_at_ms, progress.snapshot().bytes_skipped),
        wal_bytes: wal.bytes(),
        bad_pages: found.bad_page_count,
        silent_changes: progress.silent_changes(),
        forbidden,
        compared_with: summary.predecessor,
        changed_files: summary.predecessor.map(|_| changed_files),
        logical: None,
    })
}

/// By when what a backup took over unread will have been read, if backups go on.
fn reread_by(config: &BackupConfig, started_at_ms: i64, unread_bytes: u64) -> Option<i64> {
    let within_ms = i64::try_from(config.reread_within().as_millis()).unwrap_or(i64::MAX);
    (unread_bytes > 0).then(|| started_at_ms.saturating_add(within_ms))
}

/// What is known from the backup before.
#[derive(Debug, Clone, Copy)]
struct Before<'a> {
    /// Whether what it counted may hold.
    takes_over_counts: bool,
    /// What changed since.
    changes: &'a Arc<PageChanges>,
}

/// What the copy leaves for the rest.
struct Copied {
    files: Arc<DataDirectory>,
    counted: Option<CensusDraft>,
    control: ControlFile,
    control_bytes: Vec<u8>,
    start_lsn: Lsn,
    /// As they were when the files were listed.
    tablespaces: Vec<Tablespace>,
}

fn collector(session: &BackupSession, ready: &Ready, writer: &BackupWriter) -> WalCollector {
    let (started, server) = (session.started(), &ready.server);
    let origin = WalOrigin {
        major: server.version.major(),
        system_identifier: server.system_identifier,
        segment_size: server.wal_segment_size,
    };
    let changes = WalChanges::new(server.version, started.start_lsn);
    let files = Arc::clone(&ready.files);
    WalCollector::new(files, origin, started.timeline, started.start_lsn, writer.wal(), changes)
}

/// The files in which the predecessor found bad pages: a backup that does not read them again would not say so.
fn known_bad(predecessor: Option<&BackupFacts>) -> HashSet<Vec<u8>> {
    let bad = predecessor.map_or(&[][..], |facts| &facts.bad_pages);
    bad.iter().map(|page| page.path.clone().into_bytes()).collect()
}

/// Why every file is read, whatever its times say and the server tells, for people.
fn why_read_all(
    task: &Backup,
    predecessor: Option<&BackupFacts>,
    is_newest: bool,
) -> Option<&'static str> {
    let reading = predecessor.and_then(|facts| facts.reading.as_ref());
    if task.full_read {
        Some("everything was to be read")
    } else if reading.is_some_and(|reading| reading.silent_changes.is_some()) {
        // Times that were wrong about one file are believed of none, until everything was read and nothing of the kind was found.
        Some("the backup before found files that had changed though their times and sizes had not")
    } else if predecessor.is_some() && !is_newest {
        Some("a newer backup cannot be compared with, and may have found what no time tells")
    } else if predecessor.is_some_and(|facts| facts.bad_pages.len() >= BAD_PAGES_NAMED_MAX) {
        // Any file may have one.
        Some("the backup before found more damaged pages than it names")
    } else {
        None
    }
}

/// The time by the clock that stamps the files: the starting checkpoint has just written the control file. On a network
/// file system that clock is another host's.
fn stamped_now_ns(directory: Option<&Path>) -> i64 {
    let now_ns = clock::now_ms().saturating_mul(1_000_000);
    let Some(directory) = directory else { return now_ns };
    let written_ns = std::fs::metadata(directory.join(CONTROL_FILE_PATH)).map_or(now_ns, |file| {
        file.ctime().saturating_mul(1_000_000_000).saturating_add(file.ctime_nsec())
    });
    now_ns.min(written_ns)
}

/// Copies the files and counts the rows, while the session is watched and the WAL is stored. The control file comes last.
async fn copy(
    cx: &JobContext,
    request: &BackupRequest<'_>,
    ready: &Ready,
    (writer, progress): (&mut BackupWriter, &repository::Progress),
    kept: Kept<'_>,
    before: Before<'_>,
) -> Result<Copied, Failure> {
    let start_lsn = kept.session.started().start_lsn;
    let control = read_control(&ready.files).await?.0;
    let scanned_at_ns = stamped_now_ns(ready.files.here());
    let scanned = kept.hold.beside(kept.session, walk(ready, &control)).await?;
    for warning in &scanned.warnings {
        tracing::warn!(cluster.name = %cx.spec.cluster, "{warning}");
    }
    let rules = PageRules {
        block_size: control.block_size,
        segment_blocks: control.relation_segment_blocks,
        checksums: control.has_checksums(),
        backup_start: start_lsn,
    };
    let total = scanned.entries.total_bytes();
    let tablespaces = scanned.tablespaces.iter().filter(|space| !space.in_place);
    let tablespaces = tablespaces
        .map(|space| Tablespace { oid: space.oid, location: space.location.display().to_string() });
    let tablespaces = tablespaces.collect();
    let limit = match (request.config.rate_limit_bytes, request.task.rate_limit_bytes) {
        (Some(allowed), asked) => Some(at_most(allowed, asked)),
        (None, asked) => asked,
    };
    let Scan { entries: listed, outside, roots, .. } = scanned;
    let relations = listed.relations();
    let counted = writer.take_predecessors_census().filter(|_| before.takes_over_counts);
    let tables = TableFiles::new(relations, counted.as_ref(), start_lsn, clock::now_ms());
    drop(counted);
    let tables = Arc::new(tables);
    let (server_files, changes) = (Arc::clone(&ready.files), Arc::clone(before.changes));
    let files = DataDirectory::new(server_files, outside, rules, limit, Arc::clone(&tables));
    let files = Arc::new(files);
    let entries = entries(listed, control.block_size, scanned_at_ns, changes);
    let counted = {
        let copying = async {
            writer.copy(files.clone(), entries).await.map_err(|error| stopped_or(cx, error))?;
            tables.end(progress.snapshot().silent_changes == 0);
            Ok(())
        };
        let work = async { tokio::try_join!(copying, count(cx, request, &tables)) };
        let tell = || {
            let done = progress.snapshot().bytes;
            cx.progress(Progress {
                step: "copy".to_owned(),
                done,
                total: Some(total.max(done)),
                unit: "bytes".to_owned(),
            });
        };
        tokio::select! {
            biased;
            () = cx.cancel.cancelled() => return Err(cx.stopped()),
            done = kept.beside(tell, work) => done?.1,
        }
    };
    let server_files = Arc::clone(&ready.files);
    blocking(move || Ok(server_files.verify(&roots)?)).await?;
    let (control, control_bytes) = read_control(&ready.files).await?;
    Ok(Copied { files, counted, control, control_bytes, start_lsn, tablespaces })
}

async fn walk(ready: &Ready, control: &ControlFile) -> Result<Scan, Failure> {
    let options = ScanOptions {
        data_directory: ready.files.place(Path::new("")),
        major: ready.server.version.major(),
        catalog_version: control.catalog_version,
        settings_files: ready.settings_files.clone(),
    };
    let files = Arc::clone(&ready.files);
    blocking(move || Ok(files.scan(&options)?)).await
}

/// The scan in the words of the repository; the order is the same. The control file is not among them: it comes last.
fn entries(
    listed: Entries,
    block_size: u32,
    scanned_at_ns: i64,
    changes: Arc<PageChanges>,
) -> impl Iterator<Item = io::Result<SourceEntry>> + Send + 'static {
    let copied = listed.into_iter().filter(|entry| entry.kind != EntryKind::ControlFile);
    copied.map(move |entry| {
        let changes = changes.of(&entry);
        Ok(SourceEntry { changes, ..source_entry(entry, block_size, scanned_at_ns) })
    })
}

fn source_entry(entry: ScanEntry, block_size: u32, scanned_at_ns: i64) -> SourceEntry {
    let is_relation = matches!(entry.kind, EntryKind::Relation(_));
    let kind = match entry.kind {
        EntryKind::Directory => SourceKind::Directory,
        EntryKind::Relation(_)
        | EntryKind::ControlFile
        | EntryKind::Plain
        | EntryKind::External => SourceKind::File,
    };
    SourceEntry {
        path: entry.path.into_bytes(),
        kind,
        mode: entry.mode,
        size_bytes: entry.size,
        mtime_ns: entry.mtime_ns,
        ctime_ns: entry.ctime_ns,
        inode: entry.inode,
        device: entry.device,
        scanned_at_ns,
        block_size: is_relation.then_some(block_size),
        content: None,
        changes: None,
    }
}

/// The files of a tablespace that came after the scan are not in the copy, and replay would make its directory where the
/// server has it. The backup's own WAL tells. Where it could not be read, the server is asked what there is now, which
/// does not tell of a tablespace that was created and dropped again since: replay makes its directory and removes it, and
/// a proof refuses to replay that.
async fn same_tablespaces(
    session: &BackupSession,
    changes: Option<&WalChanges>,
    copied: &[Tablespace],
) -> Result<(), Failure> {
    let changed = if let Some(changes) = changes {
        changes.tablespaces_changed()
    } else {
        let mut now = session.tablespaces().await?;
        now.sort_by_key(|space| space.oid);
        !now.iter().map(|space| space.oid).eq(copied.iter().map(|space| space.oid))
    };
    if !changed {
        return Ok(());
    }
    let what = "a tablespace was created or dropped while the backup ran";
    Err(Failure::new(Code::DataDirectoryShape, Action::Retry, what)
        .with_hint("Nothing is to be done: the next attempt sees the tablespaces as they are now."))
}

/// Counts the rows of every table whose files changed, when the configuration wants it. Without a census the backup is as good, and its
/// proofs end one level lower.
async fn count(
    cx: &JobContext,
    request: &BackupRequest<'_>,
    tables: &TableFiles,
) -> Result<Option<CensusDraft>, Failure> {
    if request.config.census_s == 0 {
        return Ok(None);
    }
    match take_census(&request.cluster.target, &census_options(cx, request), tables).await {
        Ok(draft) => Ok(Some(draft)),
        Err(_) if cx.cancel.is_cancelled() => Err(cx.stopped()),
        Err(error) => {
            let why = proto::failure::chain(&error);
            tracing::warn!(cluster.name = %cx.spec.cluster, "There is no census of this backup: {why}");
            Ok(None)
        }
    }
}

async fn finish_counting(
    cx: &JobContext,
    request: &BackupRequest<'_>,
    draft: Option<CensusDraft>,
    wal: &WalCollector,
    stopped: &Stopped,
) -> Option<Census> {
    let target = &request.cluster.target;
    let options = census_options(cx, request);
    match finish_census(target, &options, draft?, wal.changes(), stopped.stop_lsn).await {
        Ok(census) => Some(census),
        Err(error) => {
            let why = proto::failure::chain(&error);
            tracing::warn!(cluster.name = %cx.spec.cluster, "There is no census of this backup: {why}");
            None
        }
    }
}

fn census_options(cx: &JobContext, request: &BackupRequest<'_>) -> CensusOptions {
    CensusOptions {
        job: session_owner(cx.spec.attempt),
        deadline: tokio::time::Instant::now() + Duration::from_secs(request.config.census_s.into()),
        table_limit: TABLE_COUNT_MAX,
        cancel: cx.cancel.clone(),
    }
}

async fn stop(cx: &JobContext, session: &mut BackupSession) -> Result<Stopped, Failure> {
    session.check().await?;
    session.stop(&cx.cancel).await.map_err(|error| stopped_or(cx, error))
}

#[expect(clippy::too_many_arguments, reason = "every part of the backup has its say here")]
fn facts(
    cx: &JobContext,
    ready: &Ready,
    control: &ControlFile,
    (timeline, start_lsn): (Timeline, Lsn),
    (started_at_ms, stopped_at_ms): (i64, i64),
    stopped: &Stopped,
    census: Option<Census>,
    found: &Found,
    tablespaces: &[Tablespace],
    reading: Reading,
) -> BackupFacts {
    BackupFacts {
        cluster: cx.spec.cluster.clone(),
        system_identifier: ready.server.system_identifier,
        server_version_num: ready.server.version.0,
        catalog_version: control.catalog_version,
        block_size: control.block_size,
        wal_segment_size: control.wal_segment_size,
        data_checksums: control.has_checksums(),
        timeline,
        start_lsn,
        stop_lsn: stopped.stop_lsn,
        started_at_ms,
        stopped_at_ms,
        backup_label: stopped.backup_label.clone(),
        tablespace_map: stopped.tablespace_map.clone(),
        tablespaces: tablespaces.to_vec(),
        settings: ready.settings.clone(),
        census,
        bad_pages: found.bad_pages.clone(),
        reading: Some(reading),
        logical: None,
    }
}

/// The reason of the stop, when that is why something ended early.
fn stopped_or(cx: &JobContext, error: impl Into<Failure>) -> Failure {
    if cx.cancel.is_cancelled() { cx.stopped() } else { error.into() }
}

/// Threads for a configured number; half the cores when it is 0.
pub(crate) fn processes(configured: u32) -> usize {
    match usize::try_from(configured) {
        Ok(n) if n > 0 => n,
        _ => std::thread::available_parallelism().map_or(1, |cores| cores.get().div_ceil(2)),
    }
}

/// What a job gets: a job can only ask for less than the configuration gives.
pub(in crate::engines) fn at_most<T: Ord + Copy>(allowed: T, asked: Option<T>) -> T {
    asked.map_or(allowed, |asked| asked.min(allowed))
}

/// Inode numbers mean something on one host only.
fn node_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
