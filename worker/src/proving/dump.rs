//! The part of a proof that is a dump's own: it is loaded into an empty server instead of being booted.
//!
//! Such a proof shows that everything in the dump can be restored without an error, and that what comes back is what was counted
//! when it was taken. It says nothing of the dumped server's own files and WAL: a dump has none of them.

use std::path::Path;
use std::time::{Duration, Instant};

use postgres::binaries::Binaries;
use postgres::checks::Origin;
use postgres::clients::{Clients, server_to_load_into};
use postgres::globals;
use postgres::sandbox::{EmptyOptions, Sandbox};
use postgres::version::ServerVersion;
use postgres::{Environment, Target};
use proto::backup::LogicalFacts;
use proto::{Action, Code, Failure, ProofLevel};
use repository::Backup;

use super::{
    Findings, Workshop, blames_the_backup, cx_free_step, depends_on_the_end, isolated, look_into,
    stopped_or,
};
use crate::context::JobContext;
use crate::engines::native;
use crate::engines::pg_dump::{Contents, Rehearsal, contents, rehearse, was_killed};

/// Versions of the server that a dump is loaded into, which is its own server's where that understands the `pg_restore` that reads
/// the dump, and of `pg_dump`.
fn versions(backup: &Backup, logical: &LogicalFacts) -> (ServerVersion, ServerVersion) {
    let writer = ServerVersion(logical.client_version_num);
    (server_to_load_into(ServerVersion(backup.facts().server_version_num), writer), writer)
}

/// The least that every proof of a dump does: `pg_restore` finds the table of contents of each database.
pub(super) async fn list(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    backup: &Backup,
    logical: &LogicalFacts,
    findings: &mut Findings,
) -> Result<Contents, Failure> {
    let started = Instant::now();
    let listed = cx
        .step("contents", async {
            let (server, writer) = versions(backup, logical);
            let clients = Clients::find(server.max(writer), &workshop.bin_dirs).await?;
            contents(cx, backup, &clients, logical).await.map_err(|failure| match failure.code {
                Code::DumpFailed => {
                    was_killed(&failure).unwrap_or_else(|| super::damaged(failure.message))
                }
                _ => failure,
            })
        })
        .await;
    findings.phase("contents", started, false);
    let count = logical.databases.len();
    let told = listed.as_ref().map_err(Clone::clone);
    let told =
        told.map(|_| format!("{count} dumps have a table of contents, and the roles are whole"));
    findings.check("contents", ProofLevel::L1, &told);
    listed
}

/// L3 and above: an empty server, everything loaded into it, checks, and nothing is left. Loading reads every byte of every
/// dump, so it includes L2.
pub(super) async fn in_sandbox(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    backup: &Backup,
    level: ProofLevel,
    (logical, contents): (&LogicalFacts, &Contents),
    findings: &mut Findings,
) -> Result<(), Failure> {
    let major = versions(backup, logical).0.major();
    let binaries = Binaries::find(major, &workshop.bin_dirs).await?;
    let jobs = u32::try_from(native::processes(workshop.processes)).unwrap_or(1);
    let room = super::room(cx, workshop.directory).await?;
    has_room(room.path(), backup, logical, jobs).await?;
    let template = logical.databases.iter().find(|dump| dump.database.as_str() == "template1");
    let options = EmptyOptions {
        superuser: globals::superuser(&contents.globals),
        encoding: template.map_or("UTF8", |dump| &dump.encoding).to_owned(),
        sessions: jobs,
        timeout: Duration::from_millis(cx.spec.deadline_ms),
        cancel: cx.cancel.clone(),
    };
    let booted = cx.step("boot", async {
        Sandbox::empty(&binaries, room, options).await.map_err(|error| stopped_or(cx, error))
    });
    let sandbox = booted.await?;
    findings.timed("start", sandbox.phases().start, true);
    findings.isolation = isolated(&sandbox);
    let mut sandbox = sandbox;
    let climbed =
        in_server(cx, workshop, backup, level, (logical, contents, jobs), &sandbox, findings);
    let climbed = climbed.await;
    // A server that this machine ended says nothing about the dump, whatever was made of that.
    let in_doubt = match &climbed {
        Ok(report) => depends_on_the_end(&Ok(report.clone()), level),
        Err(failure) => blames_the_backup(failure) || failure.code == Code::BackupSessionLost,
    };
    let unfit = if in_doubt { sandbox.unfit().await } else { None };
    let destroyed = cx_free_step(cx, sandbox).await;
    if let Some(error) = unfit {
        return Err(error.into());
    }
    let report = climbed?;
    if let Some(reached) = report.level_reached() {
        findings.level_reached = Some(reached.min(level));
    }
    findings.checks.extend(report.checks.iter().cloned());
    findings.assertions.clone_from(&report.assertions);
    findings.report = Some(report);
    destroyed
}

async fn in_server(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    backup: &Backup,
    level: ProofLevel,
    (logical, contents, jobs): (&LogicalFacts, &Contents, u32),
    sandbox: &Sandbox,
    findings: &mut Findings,
) -> Result<postgres::checks::CheckReport, Failure> {
    let started = Instant::now();
    let target = Target::parse(&sandbox.url("postgres"), &Environment::default())?;
    let (server, writer) = versions(backup, logical);
    let clients = Clients::find_to_load(server, writer, &workshop.bin_dirs).await?;
    let placed = globals::placed(&contents.globals, |number| sandbox.tablespace_place(number))?;
    let rehearsal = Rehearsal {
        target: target.clone(),
        clients: &clients,
        globals: &placed,
        extensions: &contents.extensions,
        jobs,
        scratch: sandbox.scratch(),
    };
    let loaded = rehearse(cx, backup, logical, rehearsal).await;
    findings.phase("restore", started, true);
    let told = loaded.as_ref().map_err(Clone::clone).map(|done| {
        let (roles, spaces) = (done.roles, done.tablespaces);
        let mut told = format!(
            "{roles} roles, {spaces} tablespaces and {} databases were restored without an error",
            done.databases
        );
        if done.views_left > 0 {
            told.extend([
                "; materialised views that show foreign tables stay empty, because a sandbox reaches nothing: ",
                &done.views_left.to_string(),
            ]);
        }
        told
    });
    findings.check("restored", ProofLevel::L3, &told);
    loaded?;
    findings.level_reached = Some(ProofLevel::L3);

    look_into(cx, workshop, &target, level, Origin::Dump, backup, findings).await
}

/// Refuses to begin what would not fit: the databases as large as they were, and beside them the largest dump of which a file is
/// needed.
async fn has_room(
    room: &Path,
    backup: &Backup,
    logical: &LogicalFacts,
    jobs: u32,
) -> Result<(), Failure> {
    let (mut needed, mut largest) = (0_u64, 0);
    for dump in &logical.databases {
        let size = backup.file_content(dump.file.as_bytes()).await?.size_bytes();
        let loaded = if dump.server_bytes > 0 { dump.server_bytes } else { size };
        needed = needed.saturating_add(loaded);
        if jobs > 1 && dump.layout.is_none() {
            largest = size.max(largest);
        }
    }
    needed = needed.saturating_add(largest);
    let failed = |error: rustix::io::Errno| {
        let error = std::io::Error::from(error);
        Failure::bug(format!("failed to ask for the room at {}: {error}", room.display()))
    };
    let space = rustix::fs::statvfs(room).map_err(failed)?;
    fits(room, needed, space.f_bavail.saturating_mul(space.f_frsize))
}

fn fits(room: &Path, needed: u64, free: u64) -> Result<(), Failure> {
    if needed <= free {
        return Ok(());
    }
    let place = room.parent().unwrap_or(room).display();
    let message = format!(
        "the databases of the dump need about {needed} bytes, the file system of {place} has {free} free"
    );
    Err(Failure::new(Code::TargetFull, Action::RetryElsewhere, message).with_hint(
        "Give the file system of sandbox.directory more room, or let a worker elsewhere prove.",
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_proof_that_would_fill_the_disk_does_not_begin() {
        let room = Path::new("/sandboxes/room");
        assert!(fits(room, 10, 10).is_ok());
        let failure = fits(room, 11, 10).unwrap_err();
        assert_eq!((failure.code, failure.action), (Code::TargetFull, Action::RetryElsewhere));
        assert!(!blames_the_backup(&failure));
        assert!(
            failure.message.contains("11 bytes, the file system of /sandboxes has 10"),
            "{failure}"
        );
    }
}
