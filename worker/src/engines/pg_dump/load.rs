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
use proto::backup::{DatabaseDump, LogicalFacts};
use proto::{Action, Code, DatabaseName, Failure, Progress};
use repository::Backup;
use serde::Serialize;

use super::children::feed;
use super::lists::{Head, List, full, private_file};
use super::parallel::Parallel;
use super::{GLOBALS, read_text};
use crate::context::JobContext;
use crate::jobs::session_owner;

/// What is kept of `pg_restore`'s output; it says nothing when all goes well.
pub(super) const SAID_BYTES: usize = 64 << 10;
/// What is looked at of a list of contents, whose first lines are about the dump as a whole.
const LIST_BYTES: usize = 64 << 10;
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
    /// Only these schemas of the one database.
    pub schemas: Vec<String>,
    /// Only these tables of the one database: definition, defaults and rows.
    pub tables: Vec<String>,
    /// Databases that may be dropped on the server before they are restored.
    pub overwrite: Vec<DatabaseName>,
    /// Everything belongs to whoever restores, and nobody else is granted anything.
    pub no_owner: bool,
    /// Sessions at once.
    pub jobs: u32,
    /// The directory of private files, which vanish by themselves: lists and contents; where several sessions load a part of a
    /// dump, or a dump whose layout was not stored, all of it.
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

/// A plan; what it says is what [`load`] does.
#[derive(Debug)]
pub struct LoadPlan {
    clients: Clients,
    globals: Vec<String>,
    loads: Vec<(DatabaseDump, How)>,
    /// For people, one line a step.
    pub lines: Vec<String>,
}

impl LoadPlan {
    /// What is told when nothing but the plan was asked for.
    pub fn only(self, backup: &Backup) -> LoadOutcome {
        LoadOutcome {
            backup: backup.id(),
            databases: self.loads.iter().map(|(dump, _)| dump.database.clone()).collect(),
            size_bytes: 0,
            roles_created: 0,
            roles_kept: Vec::new(),
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
    /// Bytes of their dumps.
    pub size_bytes: u64,
    /// Roles that were created.
    pub roles_created: u64,
    /// Roles that were there and were left as they are.
    pub roles_kept: Vec<String>,
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
    let mut globals = Vec::new();
    if request.databases.is_empty() {
        globals = statements(&read_text(&backup.file_content(GLOBALS.as_bytes()).await?).await?)?;
        lines.push(globals_line(&session, &globals).await?);
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
        let how = how(cx, request, &dump, is_there).await?;
        if is_part(request) {
            cx.until_stopped(has_parts(backup, request, &clients, &dump)).await??;
        }
        let size = backup.file_content(dump.file.as_bytes()).await?.size_bytes();
        lines.push(line(request, &dump, how, size));
        loads.push((dump, how));
    }
    if loads.iter().any(|(dump, _)| is_spooled(request, dump)) {
        lines.push(format!(
            "put each dump into a private file below {} while it is restored by {} sessions",
            request.scratch.display(),
            request.jobs
        ));
    }
    Ok(LoadPlan { clients, globals, loads, lines })
}

fn chosen(logical: &LogicalFacts, request: &LoadRequest) -> Result<Vec<DatabaseDump>, Failure> {
    let names: Vec<&str> = logical.databases.iter().map(|dump| dump.database.as_str()).collect();
    let refuse = |message: String| {
        Err(Failure::new(Code::RequestInvalid, Action::FixConfig, message)
            .with_hint(format!("The backup has: {}.", names.join(", "))))
    };
    for name in request.databases.iter().chain(&request.overwrite) {
        if !logical.databases.iter().any(|dump| dump.database == *name) {
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

/// Makes sure that a dump has everything that was named: `pg_restore` takes what it does not find for nothing to be done.
async fn has_parts(
    backup: &Backup,
    request: &LoadRequest,
    clients: &Clients,
    dump: &DatabaseDump,
) -> Result<(), Failure> {
    let schemas = request.schemas.iter().map(|name| ("schema", name));
    let tables = request.tables.iter().map(|name| ("table", name));
    for (kind, name) in schemas.chain(tables) {
        let mut program = clients.pg_restore().arg("--list").arg(format!("--{kind}={name}"));
        if kind == "table" {
            let within = request.schemas.iter().map(|schema| format!("--schema={schema}"));
            program = program.args(within);
        }
        let content = backup.file_content(dump.file.as_bytes()).await?;
        let what = format!("database {}", dump.database);
        let list = feed(&what, &program, content.stream(), LIST_BYTES).await?;
        let is_entry = |line: &str| !line.is_empty() && !line.starts_with(';');
        if !list.lines().any(is_entry) {
            let what = format!("the dump of database {} has no {kind} {name}", dump.database);
            let hint = "Nothing was changed. Names are as in the catalogue, without quotes; a table's is without its schema, \
                        which --schema names.";
            return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(hint));
        }
    }
    Ok(())
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
        return Ok(if is_part(request) { How::CreatePlain } else { How::Create });
    }
    if request.overwrite.contains(name) {
        return Ok(How::Replace);
    }
    let purpose = Purpose::ask(&session_owner(cx.spec.attempt));
    let session = connect(&request.target.with_database(name.as_str()), &purpose).await?;
    let in_the_way = if is_part(request) {
        session.relations_in_the_way(&request.schemas, &request.tables).await?
    } else {
        session.some_relations().await?
    };
    session.close().await;
    if in_the_way.is_empty() {
        return Ok(How::Fill);
    }
    let what = in_the_way.join(", ");
    let hint = if is_part(request) {
        "Rename or drop them there, or restore the database under another server and move the rows."
            .to_owned()
    } else {
        format!("Nothing was changed. To drop the database there first: --overwrite {name}.")
    };
    Err(Failure::new(
        Code::TargetNotEmpty,
        Action::FixConfig,
        format!("database {name} on {} has {what}", request.target),
    )
    .with_hint(hint))
}

fn line(request: &LoadRequest, dump: &DatabaseDump, how: How, size: u64) -> String {
    let DatabaseDump { database, .. } = dump;
    let what = match (&request.schemas[..], &request.tables[..]) {
        ([], []) => format!("all of it, {size} bytes"),
        ([], tables) => format!(
            "tables {} with defaults and rows, without indexes, constraints and triggers",
            tables.join(", ")
        ),
        (schemas, []) => format!("schemas {}", schemas.join(", ")),
        (schemas, tables) => format!(
            "tables {} of schemas {} with defaults and rows, without indexes, constraints and triggers",
            tables.join(", "),
            schemas.join(", ")
        ),
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

/// Does what the plan says. A database that fails is left as far as it came when it was created here, and untouched when it
/// was there and one session restores.
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
    for (dump, how) in &plan.loads {
        let step = format!("restore {}", dump.database);
        let loading = one(cx, backup, request, &plan.clients, dump, *how, Afar::Read);
        outcome.size_bytes += cx.step(&step, loading).await?.bytes;
        outcome.databases.push(dump.database.clone());
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
    /// Of its dump.
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
    dump: &DatabaseDump,
    how: How,
    afar: Afar,
) -> Result<Loaded, Failure> {
    let name = dump.database.as_str();
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
    let login = Login::new(&request.target, &application_name(&session_owner(cx.spec.attempt)))?;
    let login = login.writing();
    let create = matches!(how, How::Create | How::Replace);
    let loads_into = |database: &str| {
        let program = login.apply(clients.pg_restore()).args(["--exit-on-error", "--no-password"]);
        narrowed(request, program.arg(format!("--dbname={}", libpq::database(database))))
    };
    let then = loads_into(name);
    let first = if create {
        loads_into(&maintenance).arg("--create")
    } else if request.jobs <= 1 {
        then.clone().arg("--single-transaction")
    } else {
        then.clone()
    };
    run(cx, backup, request, dump, (first, then), afar).await
}

/// The same program for what was asked for.
fn narrowed(request: &LoadRequest, mut program: Program) -> Program {
    if request.no_owner {
        program = program.args(["--no-owner", "--no-privileges"]);
    }
    let schemas = request.schemas.iter().map(|schema| format!("--schema={schema}"));
    let tables = request.tables.iter().map(|table| format!("--table={table}"));
    program.args(schemas).args(tables)
}

/// Whether a file of the whole dump is needed: `pg_restore` seeks in it for several sessions.
fn is_spooled(request: &LoadRequest, dump: &DatabaseDump) -> bool {
    request.jobs > 1 && (is_part(request) || dump.layout.is_none())
}

/// Runs `pg_restore`: `first` for all of it or for what comes first, `then` for what comes behind.
async fn run(
    cx: &JobContext,
    backup: &Backup,
    request: &LoadRequest,
    dump: &DatabaseDump,
    (first, then): (Program, Program),
    afar: Afar,
) -> Result<Loaded, Failure> {
    let content = backup.file_content(dump.file.as_bytes()).await?;
    let what = format!("database {}", dump.database);
    let total = content.size_bytes();
    let told = |done: u64| {
        let (step, unit) = ("restore".to_owned(), "bytes".to_owned());
        cx.progress(Progress { step, done, total: Some(total), unit });
    };
    let restoring = async {
        let beside = dump.layout.as_ref().filter(|_| request.jobs > 1 && !is_part(request));
        let head = match (beside, afar) {
            (None, Afar::Read) => None,
            (Some(_), _) | (_, Afar::Left) => Some(Head::read(&content).await?),
        };
        let leave = match (&head, afar) {
            (Some(head), Afar::Left) => head.contents.filled_from_afar(),
            (None, _) | (_, Afar::Read) => BTreeSet::new(),
        };
        let left_empty = leave.len();
        let (jobs, scratch, what) = (request.jobs, request.scratch.as_path(), what.as_str());
        if let (Some(layout), Some(head)) = (beside, &head) {
            let (content, leave) = (&content, &leave);
            let load = Parallel { what, content, head, layout, leave, jobs, scratch, first, then };
            Box::pin(load.load(told)).await?;
            return Ok(left_empty);
        }
        // It lives as long as the program.
        let list = head.filter(|_| left_empty > 0).map(|head| {
            let entries = head.contents.entries.iter().map(|entry| entry.id);
            List::of(entries.filter(|id| !leave.contains(id)), scratch)
        });
        let list = list.transpose()?;
        let program = list.iter().fold(first, |program, list| list.apply(program));
        let mut done = 0;
        let counted = content.stream().inspect(|piece| {
            if let Ok(piece) = piece {
                done += piece.len() as u64;
                told(done);
            }
        });
        if jobs <= 1 {
            let mut counted = std::pin::pin!(counted);
            feed(what, &program, counted.as_mut(), SAID_BYTES).await?;
            // What is left when pg_restore has all that it needs was stored all the same, and is to be sound.
            while !is_part(request)
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
                "The lines are pg_restore's. Roles that the server lacks: restore the whole cluster, or add --no-owner. A \
                 database that was created half may be restored again with --overwrite NAME.",
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
