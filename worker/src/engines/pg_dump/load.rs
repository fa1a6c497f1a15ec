//! Putting a logical backup, or a part of one, into a server: a plan first, and nothing that is there is overwritten unless
//! it was named.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use futures::StreamExt as _;
use postgres::clients::Clients;
use postgres::connect::application_name;
use postgres::globals::{named, statements};
use postgres::libpq::{self, Login};
use postgres::process::Program;
use postgres::version::ServerVersion;
use postgres::{Purpose, Session, Target, connect, connect_maintenance, quote};
use proto::backup::{DatabaseDump, LogicalFacts, SkippedDatabase};
use proto::words::{count, grouped};
use proto::{Action, Code, DatabaseName, Failure, Progress};
use repository::Backup;
use serde::Serialize;

use super::children::feed;
use super::lists::{Head, List, full, private_file};
use super::parallel::Parallel;
use super::part::{self, Piece};
use super::{GLOBALS, read_text};
use crate::context::JobContext;
use crate::jobs::session_owner;

/// What is kept of `pg_restore`'s output; it says nothing when all goes well.
pub(super) const SAID_BYTES: usize = 64 << 10;
/// The database in which one is while others are dropped and made.
const POSTGRES: &str = "postgres";
/// The same, while that one is.
const TEMPLATE: &str = "template1";

/// What is to be put where.
#[derive(Debug, Clone)]
pub struct LoadRequest {
    /// The server.
    pub target: Target,
    /// Further directories with PostgreSQL's programs.
    pub bin_dirs: Vec<PathBuf>,
    /// Only these databases; all of them, and the roles before them, when empty.
    pub databases: Vec<DatabaseName>,
    /// Only these schemas of the one database, with all that is in them.
    pub schemas: Vec<String>,
    /// Only these tables of the one database, in these schemas where some are named, with all that belongs to them.
    pub tables: Vec<String>,
    /// Databases that may be dropped on the server before they are restored.
    pub overwrite: Vec<DatabaseName>,
    /// Everything belongs to whoever restores, and nobody else is granted anything.
    pub no_owner: bool,
    /// Sessions at once.
    pub jobs: u32,
    /// The directory of private files, which vanish by themselves: lists and contents; where several sessions load a dump whose
    /// layout was not stored, all of it.
    pub scratch: PathBuf,
}

/// What becomes of one database of the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// It is not there: it is made as it was, with its owner, rights and settings.
    Create,
    /// It is not there, and only a part of it is wanted.
    CreatePlain,
    /// It is there and empty, or does not hold what is wanted of the backup.
    Fill,
    /// It is there, and may be dropped.
    Replace,
}

/// One database of a plan.
#[derive(Debug)]
pub(super) struct Load {
    pub(super) dump: DatabaseDump,
    pub(super) how: How,
    /// What is loaded of it, where that is not all.
    pub(super) piece: Option<Piece>,
}

/// A plan; what it says is what [`load`] does.
#[derive(Debug)]
pub struct LoadPlan {
    clients: Clients,
    globals: Vec<String>,
    loads: Vec<Load>,
    /// For people, one line a step.
    pub lines: Vec<String>,
    /// Databases that the backup was to have, where all of it is wanted.
    lacks: Vec<String>,
}

impl LoadPlan {
    fn left_out(&self) -> impl Iterator<Item = String> {
        let pieces = self.loads.iter().filter_map(|load| load.piece.as_ref());
        pieces.flat_map(|piece| piece.left_out.iter().cloned()).chain(self.lacks.iter().cloned())
    }

    /// What is told when nothing but the plan was asked for.
    pub fn only(self, backup: &Backup) -> LoadOutcome {
        LoadOutcome {
            backup: backup.id(),
            databases: self.loads.iter().map(|load| load.dump.database.clone()).collect(),
            size_bytes: 0,
            roles_created: 0,
            roles_kept: Vec::new(),
            left_out: self.left_out().collect(),
            planned_only: true,
            plan: self.lines,
        }
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LoadOutcome {
    /// The backup.
    pub backup: proto::BackupId,
    /// Databases that were restored.
    pub databases: Vec<DatabaseName>,
    /// Bytes of their dumps, as far as they were read.
    pub size_bytes: u64,
    /// Roles that were created.
    pub roles_created: u64,
    /// Roles that were there and were left as they are.
    pub roles_kept: Vec<String>,
    /// What was left out of what was named, and why.
    pub left_out: Vec<String>,
    /// Only the plan was asked for.
    pub planned_only: bool,
    /// The plan.
    pub plan: Vec<String>,
}

/// Says what would be done, or why it cannot be. Changes nothing.
pub async fn plan(
    cx: &JobContext,
    backup: &Backup,
    request: &LoadRequest,
) -> Result<LoadPlan, Failure> {
    let facts = backup.facts();
    let Some(logical) = &facts.logical else {
        return Err(Failure::bug("a physical backup is not loaded into a server"));
    };
    let dumps = chosen(logical, request)?;
    let session = maintenance(cx, request).await?;
    let server = session.identity().await?;
    let writer = ServerVersion(logical.client_version_num);
    let clients = Clients::find_to_load(server.version, writer, &request.bin_dirs).await?;
    let was = ServerVersion(facts.server_version_num);
    let mut lines = vec![format!(
        "restore logical backup {} of {} (PostgreSQL {was}) into PostgreSQL {} at {}",
        backup.id(),
        facts.cluster,
        server.version,
        request.target
    )];
    if server.version.major() < was.major() {
        lines.push(format!(
            "the server is older than the one that was dumped ({was}): what it does not know fails"
        ));
    }
    let (mut globals, mut lacks) = (Vec::new(), Vec::new());
    if request.databases.is_empty() {
        globals = statements(&read_text(&backup.file_content(GLOBALS.as_bytes()).await?).await?)?;
        lines.push(globals_line(&session, &globals).await?);
        lacks.extend(logical.failed.iter().map(lacked));
        lines.extend(lacks.iter().map(|lacked| format!("leave out {lacked}")));
        if !logical.role_passwords {
            lines.push("roles that are created have no passwords: the backup has none".to_owned());
        }
    }
    let there = session.databases(server.version).await?;
    let templates = session.templates().await?;
    session.close().await;
    if let Some(name) = request.overwrite.iter().find(|name| templates.contains(name)) {
        let message =
            format!("database {name} on {} is a template, which cannot be dropped", request.target);
        return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message).with_hint(
            format!(
                "Nothing was changed. Empty it by hand and load it without --overwrite, or first: \
             ALTER DATABASE {} IS_TEMPLATE false.",
                quote::identifier(name.as_str())
            ),
        ));
    }
    let mut loads = Vec::new();
    for dump in dumps {
        let is_there = there.iter().any(|database| database.name == dump.database);
        let (how, piece) = if is_part(request) {
            let (how, piece) = part::choose(cx, backup, request, &dump, is_there).await?;
            (how, Some(piece))
        } else {
            (how(cx, request, &dump, is_there).await?, None)
        };
        let load = Load { dump, how, piece };
        let size = backup.file_content(load.dump.file.as_bytes()).await?.size_bytes();
        lines.push(line(&load, size));
        lines.extend(load.piece.iter().flat_map(|piece| piece.lines.iter().cloned()));
        loads.push(load);
    }
    if loads.iter().any(|load| is_spooled(request, &load.dump)) {
        lines.push(format!(
            "put each dump into a private file below {} while it is restored by {} sessions",
            request.scratch.display(),
            request.jobs
        ));
    }
    Ok(LoadPlan { clients, globals, loads, lines, lacks })
}

fn lacked(failed: &SkippedDatabase) -> String {
    format!("database {}, which could not be dumped: {}", failed.database, failed.why)
}

fn chosen(logical: &LogicalFacts, request: &LoadRequest) -> Result<Vec<DatabaseDump>, Failure> {
    let names: Vec<&str> = logical.databases.iter().map(|dump| dump.database.as_str()).collect();
    let refuse = |message: String| {
        Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
            .with_hint(format!("The backup has: {}.", names.join(", "))))
    };
    for name in request.databases.iter().chain(&request.overwrite) {
        if let Some(failed) = logical.failed.iter().find(|failed| failed.database == *name) {
            return refuse(format!("the backup lacks {}", lacked(failed)));
        }
        if !logical.has(name) {
            return refuse(format!("the backup has no database {name}"));
        }
    }
    let dumps: Vec<DatabaseDump> = logical
        .databases
        .iter()
        .filter(|dump| request.databases.is_empty() || request.databases.contains(&dump.database))
        .cloned()
        .collect();
    if is_part(request) && (request.databases.len() != 1 || !request.overwrite.is_empty()) {
        return refuse(
            "schemas and tables are restored from one database, named with --database, and overwrite none"
                .to_owned(),
        );
    }
    Ok(dumps)
}

fn is_part(request: &LoadRequest) -> bool {
    !request.schemas.is_empty() || !request.tables.is_empty()
}

pub(super) async fn maintenance(
    cx: &JobContext,
    request: &LoadRequest,
) -> Result<Session, Failure> {
    let zero = std::time::Duration::ZERO;
    let purpose = Purpose::work(&session_owner(cx.spec.attempt), zero, zero);
    Ok(connect_maintenance(&request.target, &purpose).await?)
}

async fn globals_line(session: &Session, globals: &[String]) -> Result<String, Failure> {
    let (roles, tablespaces) = named(globals);
    let (roles_kept, spaces_kept) = session.existing_globals(&roles, &tablespaces).await?;
    let mut line = format!(
        "create {} roles and {} tablespaces",
        roles.len() - roles_kept.len(),
        tablespaces.len() - spaces_kept.len()
    );
    if !roles_kept.is_empty() {
        let kept = roles_kept.join(", ");
        line.extend(["; leave these roles as they are: ", &kept]);
    }
    Ok(line)
}

async fn how(
    cx: &JobContext,
    request: &LoadRequest,
    dump: &DatabaseDump,
    is_there: bool,
) -> Result<How, Failure> {
    let name = &dump.database;
    if !is_there {
        return Ok(How::Create);
    }
    if request.overwrite.contains(name) {
        return Ok(How::Replace);
    }
    let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
    let session = connect(&request.target.with_database(name.as_str()), &purpose).await?;
    let in_the_way = session.some_relations().await?;
    session.close().await;
    if in_the_way.is_empty() {
        return Ok(How::Fill);
    }
    let what = in_the_way.join(", ");
    let message = format!("database {name} on {} has {what}", request.target);
    Err(Failure::new(Code::TargetNotEmpty, Action::FixConfig, message).with_hint(format!(
        "Nothing was changed. To drop the database there first: --overwrite {name}."
    )))
}

fn line(load: &Load, size: u64) -> String {
    let Load { dump: DatabaseDump { database, layout, .. }, how, piece } = load;
    let what = match piece {
        None => format!("all of it, {}", count(size, "byte")),
        Some(piece) => {
            let parts = piece.parts(layout.as_ref(), size);
            let bytes: u64 = parts.iter().map(|part| part.end - part.start).sum();
            format!("{}, {} of {}", piece.what, grouped(bytes), count(size, "byte"))
        }
    };
    match how {
        How::Create => format!("create database {database} as it was, and restore {what}"),
        How::CreatePlain => format!("create database {database}, and restore into it {what}"),
        How::Fill => format!(
            "restore into database {database}, which is there, {what}; its owner, rights and settings stay"
        ),
        How::Replace => {
            format!("DROP database {database}, create it as it was, and restore {what}")
        }
    }
}

/// Does what the plan says. Of a database that fails: when it was created as it was, it is left as far as it came; when it was
/// created for a part, it is removed again; when it was there and one session restores, it is untouched.
pub async fn load(
    cx: &JobContext,
    backup: &Backup,
    request: &LoadRequest,
    plan: LoadPlan,
) -> Result<LoadOutcome, Failure> {
    let mut outcome = LoadOutcome {
        backup: backup.id(),
        databases: Vec::new(),
        size_bytes: 0,
        roles_created: 0,
        roles_kept: Vec::new(),
        left_out: plan.left_out().collect(),
        planned_only: false,
        plan: plan.lines.clone(),
    };
    if !plan.globals.is_empty() {
        let session = maintenance(cx, request).await?;
        let run = cx.step("globals", async { Ok(session.run_globals(&plan.globals).await?) });
        let run = run.await?;
        outcome.roles_created = run.roles_created;
        outcome.roles_kept = run.roles_kept;
        session.close().await;
    }
    for load in &plan.loads {
        let database = &load.dump.database;
        let loading = one(cx, backup, request, &plan.clients, load, Afar::Read);
        outcome.size_bytes += cx.step(&format!("restore {database}"), loading).await?.bytes;
        outcome.databases.push(database.clone());
    }
    Ok(outcome)
}

/// What becomes of materialised views that show foreign tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Afar {
    /// They are filled.
    Read,
    /// They stay empty: what they show cannot be reached from here.
    Left,
}

/// One database was restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loaded {
    /// Of its dump, as far as it was read.
    pub(super) bytes: u64,
    /// Materialised views that were left empty.
    pub(super) left_empty: usize,
}

/// Restores one database; its future may be dropped.
pub(super) async fn one(
    cx: &JobContext,
    backup: &Backup,
    request: &LoadRequest,
    clients: &Clients,
    load: &Load,
    afar: Afar,
) -> Result<Loaded, Failure> {
    let Load { dump, how, .. } = load;
    let (how, name) = (*how, dump.database.as_str());
    let login = Login::new(&request.target, &application_name(&session_owner(cx.spec.attempt)))?;
    let login = login.writing();
    // Nobody can drop the database that he is in.
    let session = if how == How::Replace && name == POSTGRES {
        let zero = std::time::Duration::ZERO;
        let purpose = Purpose::work(&session_owner(cx.spec.attempt), zero, zero);
        connect(&request.target.with_database(TEMPLATE), &purpose).await?
    } else {
        maintenance(cx, request).await?
    };
    let maintenance = session.identity().await?.database;
    let quoted = quote::identifier(name);
    if how == How::Replace {
        session.run("drop the database", &format!("DROP DATABASE {quoted}")).await?;
    }
    if how == How::CreatePlain {
        let sql = format!(
            "CREATE DATABASE {quoted} TEMPLATE template0 ENCODING {} LC_COLLATE {} LC_CTYPE {}",
            quote::literal(&dump.encoding),
            quote::literal(&dump.collate),
            quote::literal(&dump.ctype)
        );
        session.run("create the database", &sql).await?;
    }
    session.close().await;
    let create = matches!(how, How::Create | How::Replace);
    let loads_into = |database: &str| {
        let program = login.apply(clients.pg_restore()).args(["--exit-on-error", "--no-password"]);
        let plain = ["--no-owner", "--no-privileges"].into_iter().filter(|_| request.no_owner);
        program.args(plain).arg(format!("--dbname={}", libpq::database(database)))
    };
    let then = loads_into(name);
    let first = if create {
        loads_into(&maintenance).arg("--create")
    } else if request.jobs <= 1 {
        then.clone().arg("--single-transaction")
    } else {
        then.clone()
    };
    let failure = match run(cx, backup, request, load, (first, then), afar).await {
        Ok(loaded) => return Ok(loaded),
        Err(failure) => failure,
    };
    let left = match how {
        How::CreatePlain => removed(cx, request, name).await,
        _ if failure.code != Code::StatementFailed => return Err(failure),
        How::Create | How::Replace => {
            format!("What was created half may be restored again with --overwrite {name}.")
        }
        How::Fill if request.jobs <= 1 => "Nothing of it was kept.".to_owned(),
        How::Fill => {
            "Several sessions load in several transactions: some of it may be there.".to_owned()
        }
    };
    let hint = format!("{} {left}", failure.hint);
    Err(failure.with_hint(hint.trim_start()))
}

/// Removes a database that was made for what could not be loaded into it, and says so.
async fn removed(cx: &JobContext, request: &LoadRequest, name: &str) -> String {
    let drop = format!("DROP DATABASE {} WITH (FORCE)", quote::identifier(name));
    let dropping = async {
        let session = maintenance(cx, request).await?;
        let dropped = session.run("drop the database", &drop).await;
        session.close().await;
        Ok::<_, Failure>(dropped?)
    };
    match dropping.await {
        Ok(()) => format!("Database {name}, which was made for it, was removed again."),
        Err(failure) => format!("Database {name}, which was made for it, is left: {failure}."),
    }
}

/// Whether a file of the whole dump is needed: `pg_restore` seeks in it for several sessions.
fn is_spooled(request: &LoadRequest, dump: &DatabaseDump) -> bool {
    request.jobs > 1 && dump.layout.is_none()
}

/// Runs `pg_restore`: `first` for all of it or for what comes first, `then` for what comes behind.
async fn run(
    cx: &JobContext,
    backup: &Backup,
    request: &LoadRequest,
    Load { dump, piece, .. }: &Load,
    (first, then): (Program, Program),
    afar: Afar,
) -> Result<Loaded, Failure> {
    let content = backup.file_content(dump.file.as_bytes()).await?;
    let what = format!("database {}", dump.database);
    let size = content.size_bytes();
    let layout = dump.layout.as_ref();
    let parts = piece.as_ref().map_or_else(|| part::whole(size), |piece| piece.parts(layout, size));
    let total: u64 = parts.iter().map(|part| part.end - part.start).sum();
    let told = |done: u64| {
        let (step, unit) = ("restore".to_owned(), "bytes".to_owned());
        cx.progress(Progress { step, done, total: Some(total), unit });
    };
    let restoring = async {
        let beside = layout.filter(|_| request.jobs > 1);
        let read = match (piece, beside, afar) {
            (Some(_), _, _) | (None, None, Afar::Read) => None,
            (None, Some(_), _) | (None, _, Afar::Left) => Some(Head::read(&content).await?),
        };
        let head = piece.as_ref().map(|piece| &piece.head).or(read.as_ref());
        let from_afar = match (head, afar) {
            (Some(head), Afar::Left) => head.contents.filled_from_afar(),
            (None, _) | (_, Afar::Read) => BTreeSet::new(),
        };
        let left_empty = from_afar.len();
        let leave = piece.as_ref().map_or(&from_afar, |piece| &piece.leave);
        let (jobs, scratch, what) = (request.jobs, request.scratch.as_path(), what.as_str());
        if let (Some(layout), Some(head)) = (beside, head) {
            let content = &content;
            let load = Parallel { what, content, head, layout, leave, jobs, scratch, first, then };
            Box::pin(load.load(told)).await?;
            return Ok(left_empty);
        }
        // It lives as long as the program.
        let list = head.filter(|_| !leave.is_empty()).map(|head| {
            let entries = head.contents.entries.iter().map(|entry| entry.id);
            List::of(entries.filter(|id| !leave.contains(id)), scratch)
        });
        let list = list.transpose()?;
        let program = list.iter().fold(first, |program, list| list.apply(program));
        let mut done = 0;
        let counted = content.parts(&parts).inspect(|piece| {
            if let Ok(piece) = piece {
                done += piece.len() as u64;
                told(done);
            }
        });
        if jobs <= 1 {
            let mut counted = std::pin::pin!(counted);
            feed(what, &program, counted.as_mut(), SAID_BYTES).await?;
            // What is left when pg_restore has all that it needs was stored all the same, and is to be sound.
            while (piece.is_none() || layout.is_some())
                && let Some(piece) = counted.next().await
            {
                piece?;
            }
            return Ok(left_empty);
        }
        let file = spooled(scratch, counted).await?;
        let program = program.arg(format!("--jobs={jobs}")).arg(file.path());
        feed(what, &program, futures::stream::empty(), SAID_BYTES).await?;
        Ok::<_, Failure>(left_empty)
    };
    let restored = cx.until_stopped(restoring).await?;
    let left_empty = restored.map_err(|failure| match failure.code {
        // What was there may have been changed before it was refused.
        Code::DumpFailed | Code::PermissionDenied => Failure { code: Code::StatementFailed, action: Action::FixConfig, ..failure }
            .with_hint(
                "The lines are pg_restore's. Roles that the server lacks: restore the whole cluster, or add --no-owner.",
            ),
        _ => failure,
    })?;
    Ok(Loaded { bytes: total, left_empty })
}

/// Puts a dump into a private file that vanishes by itself.
async fn spooled(
    directory: &Path,
    content: impl futures::Stream<Item = Result<bytes::Bytes, repository::Error>>,
) -> Result<tempfile::NamedTempFile, Failure> {
    let mut file = private_file(directory, b"")?;
    let mut content = std::pin::pin!(content);
    while let Some(piece) = content.next().await {
        file.write_all(&piece?).map_err(|error| full(directory, &error))?;
    }
    Ok(file)
}
