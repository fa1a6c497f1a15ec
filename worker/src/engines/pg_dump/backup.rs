//! A logical backup from its first question to its verdict.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use postgres::clients::Clients;
use postgres::{Purpose, ServerIdentity, connect_maintenance, settings, standby};
use proto::backup::{BackupFacts, Census, LogicalFacts, Setting, SkippedDatabase};
use proto::job::{Backup, BackupOutcome, LogicalOutcome, PgDump};
use proto::{Action, BackupKind, Code, Failure, Lsn, Progress};
use repository::{BackupWriter, Repository, Written};
use tokio::runtime::Handle;
use tokio::time::Instant;

use super::choice::{Choice, choose};
use super::contents::contents;
use super::snapshots::{self, Ages};
use super::source::{Dumps, Found, SharedDumps};
use super::{GLOBALS, dump_path};
use crate::clock;
use crate::config::BackupConfig;
use crate::context::JobContext;
use crate::engines::attempt::{Beginning, as_ordered};
use crate::engines::native::refuse_stale;
use crate::jobs::session_owner;
use crate::places::Cluster;

/// How often the progress is told.
const TELL_EVERY: Duration = Duration::from_millis(500);
/// `globals.sql` of ten thousand roles has 3 MiB.
const GLOBALS_BYTES_MAX: u64 = 256 << 20;

/// What is to be backed up, where to, how.
#[derive(Debug, Clone, Copy)]
pub struct BackupRequest<'a> {
    /// The source.
    pub cluster: &'a Cluster,
    /// The destination.
    pub repository: &'a Repository,
    /// The worker's settings.
    pub config: &'a BackupConfig,
    /// Further directories with PostgreSQL's programs.
    pub bin_dirs: &'a [PathBuf],
    /// Who does it, for people: worker and boot.
    pub by: &'a str,
    /// The job's parameters.
    pub task: &'a Backup,
    /// Which databases.
    pub scope: &'a PgDump,
}

/// A server that can be dumped.
struct Ready {
    server: ServerIdentity,
    clients: Clients,
    choice: Choice,
    role_passwords: bool,
    catalog_version: u32,
    settings: Vec<Setting>,
    position: Lsn,
    /// Before the databases were listed; of a standby, what it had replayed.
    holds_to_ms: i64,
}

/// Takes a logical backup. When this fails nothing is committed, and no program of it is left; the same when it was dropped
/// in the middle.
pub async fn back_up(
    cx: &JobContext,
    request: BackupRequest<'_>,
) -> Result<BackupOutcome, Failure> {
    let ready = cx.step("connect", ready(cx, &request)).await?;
    let BackupRequest { repository, by, .. } = request;
    let beginning = Beginning { repository, by, kind: BackupKind::Logical };
    let identifier = ready.server.system_identifier;
    let attempt = cx.step("begin", beginning.begin(cx, identifier)).await?;
    let lineage = attempt.lineage();
    let result = Box::pin(from_attempt(cx, &request, ready, attempt)).await;
    let result =
        result.map_err(|failure| if cx.cancel.is_cancelled() { cx.stopped() } else { failure });
    if let Err(failure) = &result {
        beginning.give_up(cx, lineage, failure).await;
    }
    result
}

async fn ready(cx: &JobContext, request: &BackupRequest<'_>) -> Result<Ready, Failure> {
    let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
    let session = connect_maintenance(&request.cluster.target, &purpose).await?;
    let server = session.identity_of(cx.spec.system_identifier).await?;
    let mut holds_to_ms = clock::now_ms();
    if server.in_recovery {
        holds_to_ms = holds_to_ms.min(standby::replayed_to_ms(&session).await?);
        let lag_s = standby::lag_s(&session).await?;
        refuse_stale(request.cluster, lag_s, request.config.standby_lag_max_s)?;
    }
    let clients = Clients::find(server.version, request.bin_dirs).await?;
    let choice = choose(request.scope, session.databases(server.version).await?)?;
    for SkippedDatabase { database, why } in &choice.skipped {
        tracing::info!(database = %database, "Database {database} is not in the backup: {why}");
    }
    let role_passwords = session.may_read_passwords().await?;
    if !role_passwords {
        tracing::warn!(
            "Role {} may not read pg_authid: the backup has the roles without their passwords",
            server.role
        );
    }
    let catalog_version = session.catalog_version().await?;
    let settings = settings::kept(&session).await?;
    let position = session.position().await?;
    session.close().await;
    Ok(Ready {
        server,
        clients,
        choice,
        role_passwords,
        catalog_version,
        settings,
        position,
        holds_to_ms,
    })
}

async fn from_attempt(
    cx: &JobContext,
    request: &BackupRequest<'_>,
    ready: Ready,
    attempt: repository::Attempt,
) -> Result<BackupOutcome, Failure> {
    let started_at_ms = clock::now_ms();
    let progress = Arc::new(repository::Progress::default());
    let options = as_ordered(cx, request.task, request.config, &progress);
    let mut writer = attempt.write(options)?;
    let dumps = Arc::new(dumps(cx, request, &ready));
    cx.step_with("dump", |step| {
        let (writer, dumps, progress) = (&mut writer, &dumps, &*progress);
        async move {
            let ages = Ages::of(request.config);
            let watching = snapshots::watch(cx, dumps, ages, &step);
            tokio::select! {
                done = dump(cx, writer, dumps, progress) => done?,
                failure = watching => return Err(failure),
            }
            dumps.anything()?;
            let done = progress.snapshot();
            step.figure("databases", dumps.lock().dumps.len() as u64);
            step.figure("dropped_databases", dumps.lock().gone.len() as u64);
            step.figure("failed_databases", dumps.lock().failed.len() as u64);
            step.figure("read_bytes", done.bytes_read);
            step.figure("stored_bytes", done.bytes_stored);
            step.figure("taken_over_bytes", done.bytes_taken_over);
            Ok(())
        }
    })
    .await?;
    let stopped_at_ms = clock::now_ms();
    let facts = facts(cx, request, &ready, &dumps, (started_at_ms, stopped_at_ms)).await?;
    let written = cx
        .step("write_manifest", async {
            let source = Arc::new(SharedDumps(Arc::clone(&dumps)));
            Ok(writer.finish(source, Vec::new(), facts.clone()).await?)
        })
        .await?;
    cx.step("read_back", read_back(cx, &written, &ready.clients, &facts)).await?;
    let summary = cx.step("commit", async { Ok(written.commit(clock::now_ms()).await?) }).await?;
    let logical = facts.logical.unwrap_or_else(|| logical_facts(&ready, &dumps));
    Ok(BackupOutcome {
        backup: summary.backup,
        lineage: summary.lineage,
        repository: request.repository.describe(),
        system_identifier: ready.server.system_identifier,
        server_version_num: ready.server.version.0,
        timeline: ready.server.timeline,
        start_lsn: facts.start_lsn,
        stop_lsn: facts.stop_lsn,
        wal_to: None,
        started_at_ms,
        stopped_at_ms,
        holds_to_ms: Some(ready.holds_to_ms),
        ended_at_ms: None,
        files: summary.counts.files,
        size_bytes: summary.counts.bytes,
        read_bytes: progress.snapshot().bytes_read,
        stored_bytes: summary.counts.stored_bytes,
        taken_over_bytes: progress.snapshot().bytes_taken_over,
        reread_bytes: 0,
        reread_by_ms: None,
        wal_bytes: 0,
        bad_pages: 0,
        silent_changes: None,
        forbidden: None,
        compared_with: summary.predecessor,
        changed_files: None,
        logical: Some(LogicalOutcome {
            client_version_num: logical.client_version_num,
            databases: logical.databases.len() as u64,
            role_passwords: logical.role_passwords,
            left_out: logical.left_out,
            skipped: logical.skipped,
            failed: logical.failed,
        }),
    })
}

fn dumps(cx: &JobContext, request: &BackupRequest<'_>, ready: &Ready) -> Dumps {
    let census_s = request.config.census_s;
    let by_path = |database: &postgres::databases::Database| {
        (dump_path(&database.name).into_bytes(), database.clone())
    };
    Dumps {
        target: request.cluster.target.clone(),
        job: session_owner(cx.spec.attempt),
        clients: ready.clients.clone(),
        runtime: Handle::current(),
        databases: ready.choice.dumped.iter().map(by_path).collect(),
        asked: request
            .scope
            .databases
            .iter()
            .filter(|pattern| pattern.is_plain())
            .map(|pattern| pattern.as_str().to_owned())
            .collect(),
        role_passwords: ready.role_passwords,
        count_until: (census_s > 0).then(|| Instant::now() + Duration::from_secs(census_s.into())),
        cancel: cx.cancel.clone(),
        found: Found::default().into(),
    }
}

/// Stores every dump, one after the other, and tells how far it is.
async fn dump(
    cx: &JobContext,
    writer: &mut BackupWriter,
    dumps: &Arc<Dumps>,
    progress: &repository::Progress,
) -> Result<(), Failure> {
    let source = Arc::new(SharedDumps(Arc::clone(dumps)));
    let copying = writer.copy(source, dumps.entries());
    let telling = async {
        let mut ticks = tokio::time::interval(TELL_EVERY);
        loop {
            ticks.tick().await;
            let done = progress.snapshot().bytes;
            let told = dumps.lock().told.clone();
            let (step, unit) = (told.unwrap_or_else(|| "dump".to_owned()), "bytes".to_owned());
            cx.progress(Progress { step, done, total: None, unit });
        }
    };
    tokio::select! {
        done = copying => done.map_err(cause),
        () = telling => Err(Failure::bug("telling the progress of a dump ended before the dump")),
    }
}

/// What a program of ours said travels through the repository as the cause of an error of reading.
fn cause(error: repository::Error) -> Failure {
    if let repository::Error::Source { source, .. } = &error
        && let Some(failure) = source.get_ref().and_then(|inner| inner.downcast_ref::<Failure>())
    {
        return failure.clone();
    }
    error.into()
}

fn logical_facts(ready: &Ready, dumps: &Dumps) -> LogicalFacts {
    let found = dumps.lock();
    let mut databases = found.dumps.clone();
    databases.sort_by(|a, b| a.database.cmp(&b.database));
    let mut skipped = [ready.choice.skipped.clone(), found.gone.clone()].concat();
    skipped.sort_by(|a, b| a.database.cmp(&b.database));
    let mut failed = found.failed.clone();
    failed.sort_by(|a, b| a.database.cmp(&b.database));
    LogicalFacts {
        client_version_num: ready.clients.version().0,
        role_passwords: ready.role_passwords,
        databases,
        skipped,
        left_out: Some(ready.choice.left_out + failed.len() as u64),
        failed,
    }
}

async fn facts(
    cx: &JobContext,
    request: &BackupRequest<'_>,
    ready: &Ready,
    dumps: &Dumps,
    (started_at_ms, stopped_at_ms): (i64, i64),
) -> Result<BackupFacts, Failure> {
    let (databases, mut unseen) = dumps.counted().await;
    unseen.sort_unstable();
    let counted = dumps.count_until.is_some();
    let census = counted.then_some(Census { canary: None, databases, unseen, forbidden: None });
    let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
    let session = connect_maintenance(&request.cluster.target, &purpose).await?;
    let stop_lsn = session.position().await?;
    session.close().await;
    let server = &ready.server;
    Ok(BackupFacts {
        cluster: cx.spec.cluster.clone(),
        system_identifier: server.system_identifier,
        server_version_num: server.version.0,
        catalog_version: ready.catalog_version,
        block_size: server.block_size,
        wal_segment_size: server.wal_segment_size,
        data_checksums: server.data_checksums,
        timeline: server.timeline,
        start_lsn: ready.position,
        stop_lsn,
        started_at_ms,
        stopped_at_ms,
        backup_label: String::new(),
        tablespace_map: String::new(),
        tablespaces: Vec::new(),
        settings: ready.settings.clone(),
        census,
        bad_pages: Vec::new(),
        reading: None,
        logical: Some(logical_facts(ready, dumps)),
    })
}

/// Looks at what the repository has, before it is a backup.
async fn read_back(
    cx: &JobContext,
    written: &Written,
    clients: &Clients,
    facts: &BackupFacts,
) -> Result<(), Failure> {
    match &facts.logical {
        Some(logical) => contents(cx, &written.read_back(), clients, logical).await.map(drop),
        None => Err(Failure::bug("a dump has no list of its databases")),
    }
}

/// A file of moderate size as text.
pub(super) async fn read_text(content: &repository::FileContent) -> Result<String, Failure> {
    if content.size_bytes() > GLOBALS_BYTES_MAX {
        let message = format!("{GLOBALS} has {} bytes", content.size_bytes());
        return Err(Failure::new(Code::ObjectDamaged, Action::FixData, message)
            .with_hint("No cluster has so many roles; keep older backups."));
    }
    let mut bytes = Vec::new();
    let mut pieces = std::pin::pin!(content.stream());
    while let Some(piece) = pieces.next().await {
        bytes.extend_from_slice(&piece?);
    }
    // A cluster may have names in another encoding; they are restored as they can be read.
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}
