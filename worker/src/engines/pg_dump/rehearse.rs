//! Putting a whole logical backup into an empty server that nobody needs, to see that it can be done: everything as it was, and
//! the first thing that does not work ends it.
//!
//! Here is told apart whose fault that is: the dump's, or that of a machine which lacks what the dump needs.

use std::path::PathBuf;

use postgres::clients::Clients;
use postgres::{Target, lacks_for_a_dump};
use proto::backup::{DatabaseDump, LogicalFacts};
use proto::{Action, Code, DatabaseName, Failure};
use repository::Backup;

use super::load::{Afar, How, Load, LoadRequest, maintenance, one};
use crate::context::JobContext;

/// What an empty server has, and a dump may have as well.
const POSTGRES: &str = "postgres";
const TEMPLATE: &str = "template1";

/// Into what, and how.
#[derive(Debug)]
pub struct Rehearsal<'a> {
    /// The empty server, as its superuser.
    pub target: Target,
    /// The programs that load.
    pub clients: &'a Clients,
    /// What makes roles and tablespaces, at places that may be written.
    pub globals: &'a [String],
    /// Extensions that the databases ask for.
    pub extensions: &'a [(DatabaseName, String)],
    /// Sessions at once.
    pub jobs: u32,
    /// Room for lists and contents; for one dump, where more than one session loads one whose layout was not stored.
    pub scratch: PathBuf,
}

/// What was loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rehearsed {
    /// Roles that were created, beside the server's own superuser.
    pub roles: u64,
    /// Tablespaces that were created.
    pub tablespaces: u64,
    /// Databases that were filled.
    pub databases: usize,
    /// Materialised views that stay empty, because they show foreign tables, which cannot be reached from a sandbox.
    pub views_left: usize,
}

/// Loads roles, tablespaces and every database. `PROOF_FAILED` or `OBJECT_DAMAGED`: the backup cannot be restored as it is.
/// `SANDBOX_UNFIT`: this machine cannot say.
pub async fn rehearse(
    cx: &JobContext,
    backup: &Backup,
    logical: &LogicalFacts,
    rehearsal: Rehearsal<'_>,
) -> Result<Rehearsed, Failure> {
    let Rehearsal { target, clients, globals, extensions, jobs, scratch } = rehearsal;
    let request = LoadRequest {
        target,
        bin_dirs: Vec::new(),
        databases: Vec::new(),
        schemas: Vec::new(),
        tables: Vec::new(),
        overwrite: Vec::new(),
        no_owner: false,
        jobs,
        scratch,
    };
    let run = cx
        .step("globals", async {
            let session = maintenance(cx, &request).await?;
            let there = "SELECT name::text FROM pg_available_extensions";
            let there = session.query("list the extensions of this machine", there, &[]).await?;
            let there: Vec<String> = there.iter().map(|row| row.get(0)).collect();
            has_all(extensions, &there)?;
            let run = session.run_globals(globals).await;
            session.close().await;
            run.map_err(of_globals)
        })
        .await?;
    let mut views_left = 0;
    for dump in &logical.databases {
        let how = match dump.database.as_str() {
            TEMPLATE => How::Fill,
            // It is made again as it was.
            POSTGRES => How::Replace,
            _ => How::Create,
        };
        let load = Load { dump: dump.clone(), how, piece: None };
        let loading = one(cx, backup, &request, clients, &load, Afar::Left);
        let loaded = cx.step(&format!("restore {}", dump.database), loading).await;
        views_left += loaded.map_err(|failure| judged(dump, failure))?.left_empty;
    }
    Ok(Rehearsed {
        roles: run.roles_created,
        tablespaces: run.tablespaces_created,
        databases: logical.databases.len(),
        views_left,
    })
}

/// Names everything that is missing at once, before anything was loaded.
fn has_all(wanted: &[(DatabaseName, String)], there: &[String]) -> Result<(), Failure> {
    let missing: Vec<String> = wanted
        .iter()
        .filter(|(_, name)| !there.contains(name))
        .map(|(database, name)| format!("{name} of database {database}"))
        .collect();
    if missing.is_empty() {
        return Ok(());
    }
    let (count, names) = (missing.len(), missing.join(", "));
    Err(unfit(format!("this machine's PostgreSQL lacks {count} extensions: {names}")))
}

/// Somebody ended a program before it could say anything, which says nothing about what it read.
pub fn was_killed(failure: &Failure) -> Option<Failure> {
    failure.message.contains(" ended with signal ").then(|| unfit(failure.message.clone()))
}

fn unfit(message: String) -> Failure {
    Failure::new(Code::SandboxUnfit, Action::RetryElsewhere, message).with_hint(
        "The dump is neither proved nor blamed. Install what is missing for the PostgreSQL of this machine, or let a worker \
         elsewhere prove.",
    )
}

fn of_globals(error: postgres::Error) -> Failure {
    if error.state().is_none() {
        return error.into();
    }
    let said = proto::failure::chain(&error);
    if let Some(lacks) = lacks_for_a_dump(&format!("ERROR:  {said}")) {
        return unfit(format!("roles and tablespaces cannot be made here: this machine {lacks}"));
    }
    Failure::new(
        Code::ProofFailed,
        Action::FixData,
        format!("roles and tablespaces cannot be restored: failed to {said}"),
    )
    .with_hint(CURE)
}

const CURE: &str = "Load the dump by hand to see more: `pgmuster restore --repository URL --key FILE --into-server postgres://…`. Take another one; keep older backups.";

/// The failure of a database that could not be loaded, as a statement about the backup or about this machine.
fn judged(dump: &DatabaseDump, failure: Failure) -> Failure {
    let database = &dump.database;
    match failure.code {
        Code::StatementFailed | Code::PermissionDenied => {}
        Code::TargetFull => {
            return Failure { action: Action::RetryElsewhere, ..failure }
                .with_hint("Give the file system of sandbox.directory more room.");
        }
        _ => return failure,
    }
    if let Some(killed) = was_killed(&failure) {
        return killed;
    }
    let said = &failure.message;
    if let Some(lacks) = lacks_for_a_dump(said) {
        return unfit(format!("database {database} cannot be loaded here: this machine {lacks}"));
    }
    let shown = essence(said);
    // What pg_restore finds wrong by itself, without having asked a server, is wrong with the archive.
    if !["ERROR:", "FATAL:", "connection"].iter().any(|word| said.contains(word)) {
        let message = format!("the dump of database {database} is damaged: {shown}");
        return Failure::new(Code::ObjectDamaged, Action::FixData, message).with_hint(CURE);
    }
    let message = format!("database {database} cannot be restored: {shown}");
    let hint = if said.contains("ERROR:  role \"") && said.contains("\" does not exist") {
        "That role went away while the dump was taken. Take another dump; this one can be loaded with --no-owner."
    } else {
        CURE
    };
    Failure::new(Code::ProofFailed, Action::FixData, message).with_hint(hint)
}

/// What went wrong with what, of all that `pg_restore` said: neither statements nor rows.
fn essence(said: &str) -> String {
    let after =
        |mark: &str| said.lines().find_map(|line| Some(line.split_once(mark)?.1.trim().to_owned()));
    let error = after("error: could not execute query: ").or_else(|| after("error: "));
    let error = error.unwrap_or_else(|| said.lines().last().unwrap_or_default().to_owned());
    match after("from TOC entry ") {
        Some(entry) => format!("{error} (entry {entry})"),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failed(said: &str) -> Failure {
        ended("exit code 1", said)
    }

    fn ended(outcome: &str, said: &str) -> Failure {
        let dump = DatabaseDump {
            database: "shop".parse().unwrap(),
            file: "shop.dump".to_owned(),
            snapshot: "1".to_owned(),
            encoding: "UTF8".to_owned(),
            collate: "C".to_owned(),
            ctype: "C".to_owned(),
            server_bytes: 1,
            layout: None,
        };
        let message = format!("pg_restore of database shop ended with {outcome}: {said}");
        judged(&dump, Failure::new(Code::StatementFailed, Action::FixConfig, message))
    }

    #[test]
    fn what_went_wrong_is_told_without_statements_and_whose_fault_it_is() {
        let query = "pg_restore: while PROCESSING TOC:\n\
                     pg_restore: from TOC entry 215; 1259 16390 TABLE item gone\n\
                     pg_restore: error: could not execute query: ERROR:  role \"gone\" does not exist\n\
                     Command was: ALTER TABLE shop.item OWNER TO gone; -- secret";
        let failure = failed(query);
        assert_eq!(failure.code, Code::ProofFailed);
        assert_eq!(
            failure.message,
            "database shop cannot be restored: ERROR:  role \"gone\" does not exist (entry 215; 1259 16390 TABLE item gone)"
        );
        assert!(failure.hint.contains("--no-owner"), "{failure:?}");

        let cut = failed("pg_restore: error: could not read from input file: end of file");
        assert_eq!(cut.code, Code::ObjectDamaged, "{cut}");
        let lost = failed(
            "pg_restore: error: could not execute query: server closed the connection unexpectedly",
        );
        assert_eq!(lost.code, Code::ProofFailed, "{lost}");
        let full = failed(
            "pg_restore: error: COPY failed for table \"item\": ERROR:  could not extend file \"base/1/2\": No space left on device",
        );
        assert_eq!(full.code, Code::SandboxUnfit, "{full}");
        let killed = ended("signal 9", "");
        assert_eq!(killed.code, Code::SandboxUnfit, "{killed}");
    }

    #[test]
    fn every_missing_extension_is_named() {
        let wanted = ["a", "b", "c"].map(|name| ("shop".parse().unwrap(), name.to_owned()));
        let failure = has_all(&wanted, &["b".to_owned()]).unwrap_err();
        assert_eq!(failure.code, Code::SandboxUnfit);
        let named = "lacks 2 extensions: a of database shop, c of database shop";
        assert!(failure.message.contains(named), "{failure}");
        assert!(has_all(&wanted[1..2], &["b".to_owned()]).is_ok());
    }
}
