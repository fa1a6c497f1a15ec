//! Proving a backup: restore it where nothing can be harmed, boot it, ask it, measure everything, leave nothing behind.

mod dump;
mod heartbeat;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use postgres::checks::{Assertion, CheckOptions, CheckReport, Origin, run_checks};
use postgres::process::Isolation;
use postgres::sandbox::{Sandbox, SandboxOptions, SandboxRoom};
use postgres::short_place::ShortPlace;
use postgres::{Environment, Target};
use proto::backup::Forbidden;
use proto::proof::{
    BrokenWal, CheckOutcome, PITR, Phase, ProofAssertion, ProofCheck, ProofRecovery,
};
use proto::wal::History;
use proto::words::{count, duration};
use proto::{
    Action, BackupId, BackupKind, Code, Failure, Heartbeat, Proof, ProofLevel, WorkerName,
};
use repository::Backup;

use crate::beyond::Beyond;
use crate::context::{JobContext, blocking};
use crate::engines::native;
use crate::restoring::{self, Destination};
use crate::{clock, jobs, programs};

/// Checks without which nothing is said of their level: whoever could not look there did not reach it.
const DECIDING_CHECKS: [&str; 3] = ["stop_position", "tables_readable", "row_counts"];
/// The most that a job keeps of its time for what comes after the last assertion: to remove the sandbox, to tell.
const TELLING_MAX: Duration = Duration::from_mins(5);

/// Where and by whom a proof is made.
#[derive(Debug, Clone)]
pub struct Workshop<'a> {
    /// Who makes it.
    pub worker: WorkerName,
    /// The directory of sandboxes.
    pub directory: &'a Path,
    /// Further directories with PostgreSQL's programs.
    pub bin_dirs: Vec<std::path::PathBuf>,
    /// Threads that decompress; 0 means half the cores.
    pub processes: u32,
    /// What must be true of what was restored, for L6.
    pub assertions: Vec<Assertion>,
}

/// What was found, in the making.
struct Findings {
    phases: Vec<Phase>,
    checks: Vec<ProofCheck>,
    assertions: Vec<ProofAssertion>,
    size_bytes: u64,
    report: Option<CheckReport>,
    isolation: String,
    level_reached: Option<ProofLevel>,
    recovery: Option<ProofRecovery>,
    broken_wal: Option<BrokenWal>,
    heartbeat_at_ms: Option<i64>,
}

impl Findings {
    fn phase(&mut self, name: &str, since: Instant, counts_as_recovery: bool) {
        self.timed(name, since.elapsed(), counts_as_recovery);
    }

    fn timed(&mut self, name: &str, duration: Duration, counts_as_recovery: bool) {
        let duration_ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
        self.phases.push(Phase { name: name.to_owned(), duration_ms, counts_as_recovery });
    }

    fn check(&mut self, name: &str, level: ProofLevel, result: &Result<String, Failure>) {
        let (outcome, detail) = match result {
            Ok(detail) => (CheckOutcome::Passed, detail.clone()),
            Err(failure) => (CheckOutcome::Failed, failure.to_string()),
        };
        self.checks.push(ProofCheck { name: name.to_owned(), level, outcome, detail });
    }
}

fn damaged(message: String) -> Failure {
    Failure::new(Code::ObjectDamaged, Action::FixData, message)
        .with_hint("Keep older backups, take a new one at once, and look at the store.")
}

/// A failure that says something about the backup, and is part of the record; any other failure is one of this attempt,
/// and proves nothing either way.
fn blames_the_backup(failure: &Failure) -> bool {
    matches!(
        failure.code,
        Code::ObjectMissing
            | Code::ObjectDamaged
            | Code::SandboxFailed
            | Code::StopPositionMissed
            | Code::ProofFailed
            | Code::WalMissing
    )
}

/// Makes a proof. A backup that turns out to be broken is an `Ok` with `passed == false`; an error means that nothing
/// could be found out.
pub async fn prove(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    backup: &Backup,
    level: ProofLevel,
) -> Result<Proof, Failure> {
    prove_to(cx, workshop, backup, level, Moment { beyond: None, heartbeats: &[] }).await
}

/// How far a copy is to go, and what is known of what it must have then.
#[derive(Debug)]
pub struct Moment<'a> {
    /// A moment behind the end of the backup, to which archived WAL is replayed.
    pub beyond: Option<&'a mut Beyond>,
    /// Heartbeats of the cluster: the copy must have those before its moment, and none behind it.
    pub heartbeats: &'a [Heartbeat],
}

/// The same, to a moment.
pub async fn prove_to(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    backup: &Backup,
    level: ProofLevel,
    moment: Moment<'_>,
) -> Result<Proof, Failure> {
    let mut findings = Findings {
        phases: Vec::new(),
        checks: Vec::new(),
        assertions: Vec::new(),
        size_bytes: backup.counts().bytes,
        report: None,
        isolation: String::new(),
        level_reached: None,
        recovery: None,
        broken_wal: None,
        heartbeat_at_ms: None,
    };
    match climb(cx, workshop, backup, level, moment, &mut findings).await {
        Err(failure) if !blames_the_backup(&failure) => return Err(failure),
        // It is in the findings already.
        Ok(()) | Err(_) => {}
    }
    // The record is signed and stored as it is.
    for check in &mut findings.checks {
        check.detail = telemetry::scrub(&check.detail).into_owned();
    }
    for assertion in &mut findings.assertions {
        assertion.answer = telemetry::scrub(&assertion.answer).into_owned();
    }
    let facts = backup.facts();
    let report = findings.report.as_ref();
    // The server that a dump was loaded into has an identifier of its own.
    let system_identifier = report
        .filter(|_| facts.logical.is_none())
        .map_or(facts.system_identifier, |r| r.system_identifier);
    let (cluster, worker) = (facts.cluster.clone(), workshop.worker.clone());
    Ok(Proof {
        kind: facts.kind(),
        at_ms: clock::now_ms(),
        level_reached: findings.level_reached.map(|reached| reached.min(ProofLevel::L5)),
        passed: findings.level_reached >= Some(level),
        server_version_num: report.map(|r| r.server_version_num),
        reached_lsn: report.and_then(|r| r.reached_lsn),
        tables: report.map_or(0, |r| r.tables),
        rows: report.map_or(0, |r| r.rows),
        tables_exact: report.map_or(0, |r| r.tables_exact),
        tables_bounded: report.map_or(0, |r| r.tables_bounded),
        phases: findings.phases,
        size_bytes: findings.size_bytes,
        checks: findings.checks,
        isolation: findings.isolation,
        recovery: findings.recovery,
        broken_wal: findings.broken_wal,
        heartbeat_at_ms: findings.heartbeat_at_ms,
        assertions: (level == ProofLevel::L6).then_some(findings.assertions),
        lacks: facts
            .logical
            .iter()
            .flat_map(|logical| &logical.failed)
            .map(|one| one.database.to_string())
            .collect(),
        ..Proof::of(backup.id(), backup.lineage(), cluster, system_identifier, worker, level)
    })
}

async fn climb(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    backup: &Backup,
    level: ProofLevel,
    moment: Moment<'_>,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let started = Instant::now();
    let inventory = cx
        .step_with("inventory", |step| async move {
            let inventory = cx.until_stopped(backup.check_inventory()).await??;
            step.figure("packs", inventory.packs);
            if let Some(object) = inventory.missing.first().or(inventory.wrong_size.first()) {
                let count = inventory.missing.len() + inventory.wrong_size.len();
                return Err(damaged(format!(
                    "{count} of {} packs are missing or have the wrong size, {object} first",
                    inventory.packs
                )));
            }
            Ok(format!("{} packs are there with their sizes", inventory.packs))
        })
        .await;
    findings.phase("inventory", started, false);
    findings.check("inventory", ProofLevel::L1, &inventory);
    inventory?;
    let logical = backup.facts().logical.as_ref();
    let contents = match logical {
        Some(logical) => Some(dump::list(cx, workshop, backup, logical, findings).await?),
        None => None,
    };
    findings.level_reached = Some(ProofLevel::L1);
    if level == ProofLevel::L2 {
        let started = Instant::now();
        let decrypted = cx
            .step_with("decrypt", |step| async move {
                let options = repository::CheckOptions {
                    processes: native::processes(workshop.processes),
                    cancel: cx.cancel.clone(),
                    ..repository::CheckOptions::default()
                };
                let read = backup.check_decrypt(options).await;
                let read = read.map_err(|error| stopped_or(cx, error))?;
                step.figure("frames", read.frames);
                if let Some((object, reason)) = read.damaged.first() {
                    return Err(damaged(format!(
                        "{} objects are damaged, {object} first: {reason}",
                        read.damaged.len()
                    )));
                }
                Ok(format!("{} frames were decrypted, decompressed and checked", read.frames))
            })
            .await;
        findings.phase("decrypt", started, false);
        findings.check("decrypt", ProofLevel::L2, &decrypted);
        decrypted?;
        findings.level_reached = Some(ProofLevel::L2);
    }
    if level < ProofLevel::L3 {
        return Ok(());
    }
    match logical.zip(contents.as_ref()) {
        Some(dump) => dump::in_sandbox(cx, workshop, backup, level, dump, findings).await,
        None => in_sandbox(cx, workshop, backup, level, moment, findings).await,
    }
}

/// The room of the server that an attempt starts.
pub(crate) async fn room(cx: &JobContext, directory: &Path) -> Result<SandboxRoom, Failure> {
    let name = format!("pgmuster-proof-{}", cx.spec.attempt);
    Ok(SandboxRoom::create(directory, &name, None).await?)
}

/// L3 and above: restore, boot, check, destroy. A restore decrypts and checks every frame, so it includes L2.
async fn in_sandbox(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    backup: &Backup,
    level: ProofLevel,
    moment: Moment<'_>,
    findings: &mut Findings,
) -> Result<(), Failure> {
    let Moment { mut beyond, heartbeats } = moment;
    let facts = backup.facts();
    let binaries = cx.until_stopped(programs::of(backup, &workshop.bin_dirs)).await??;
    let made = beyond.as_deref_mut().and_then(Beyond::take_room);
    let room = match made {
        Some(room) => room,
        None => room(cx, workshop.directory).await?,
    };
    let beyond = beyond.as_deref();

    let started = Instant::now();
    let destination = Destination {
        data_directory: room.data_directory(),
        tablespaces: facts
            .tablespaces
            .iter()
            .map(|space| (space.oid, room.tablespaces().join(space.oid.to_string())))
            .collect(),
        delta: false,
        believe_cache: false,
        recovery: None,
        keep_archiving: true,
    };
    let restored = cx
        .step_with("restore", |step| async move {
            let done = restoring::restore(cx, backup, &destination, workshop.processes).await?;
            step.figure("written_bytes", done.size_bytes);
            step.figure("fetched_bytes", done.fetched_bytes);
            Ok(restoring::numbers(&done))
        })
        .await;
    findings.phase("restore", started, true);
    findings.check("restore", ProofLevel::L2, &restored);
    restored?;
    findings.level_reached = Some(ProofLevel::L2);

    let options = SandboxOptions {
        settings: facts.settings.clone(),
        timeout: Duration::from_millis(cx.spec.deadline_ms),
        cancel: cx.cancel.clone(),
        beyond: beyond.map(Beyond::of_sandbox),
        ..SandboxOptions::new(facts.stop_lsn, facts.timeline, facts.system_identifier)
    };
    let mut broken_wal = None;
    let booted = cx
        .step("boot", async {
            Sandbox::boot(&binaries, room, options).await.map_err(|error| match beyond {
                None => stopped_or(cx, error),
                Some(beyond) => {
                    let fell = beyond.fell(error, facts);
                    broken_wal = fell.broken;
                    stopped_or(cx, fell.failure)
                }
            })
        })
        .await;
    findings.broken_wal = broken_wal;
    let told = booted.as_ref().map_err(Clone::clone).map(|sandbox| {
        format!("replay ended at {}, the backup at {}", sandbox.replay_end(), facts.stop_lsn)
    });
    findings.check("consistent_start", ProofLevel::L3, &told);
    let mut sandbox = booted?;
    if let (Some(beyond), Some(went)) = (beyond, sandbox.went()) {
        let reached_lsn = sandbox.replay_end();
        let evidence = format!("{}: {}, at {reached_lsn}", beyond.asked, went.evidence);
        findings.check("target_reached", ProofLevel::L3, &Ok(evidence));
        findings.recovery = Some(ProofRecovery {
            target: beyond.asked.clone(),
            timeline: beyond.plan.outcome.timeline,
            reached_lsn,
            last_commit: went.last_commit,
            evidence: telemetry::scrub(&went.evidence).into_owned(),
            replayed_bytes: reached_lsn.0.saturating_sub(facts.start_lsn.0),
        });
    }
    let phases = sandbox.phases();
    findings.timed("start", phases.start, true);
    findings.timed("replay", phases.replay, true);
    findings.timed("open", phases.open, true);
    findings.isolation = isolated(&sandbox);

    let target = Target::parse(&sandbox.url("postgres"), &Environment::default())?;
    let origin =
        Origin::Copy { system_identifier: facts.system_identifier, stop_lsn: facts.stop_lsn };
    let own = History { timeline: facts.timeline, entries: Vec::new() };
    let restored = heartbeat::Restored {
        system_identifier: facts.system_identifier,
        history: beyond.map_or(&own, |beyond| beyond.plan.way.history()),
        backup_end: facts.stop_lsn,
        beyond: beyond.map(|beyond| (&beyond.to, beyond.asked.as_str())),
        reached: sandbox.replay_end(),
        next_transaction: sandbox.next_transaction(),
    };
    let seen = heartbeat::look(cx, &target, heartbeats, restored, findings);
    let report = match Box::pin(seen).await {
        Ok(()) => look_into(cx, workshop, &target, level, origin, backup, findings).await,
        Err(failure) => Err(failure),
    };
    let unfit = if depends_on_the_end(&report, level) { sandbox.unfit().await } else { None };
    let destroyed = cx_free_step(cx, sandbox).await;
    if let Some(error) = unfit {
        return Err(error.into());
    }
    let report = report?;
    if let Some(reached) = report.level_reached() {
        findings.level_reached = Some(reached.min(level));
    }
    findings.checks.extend(report.checks.iter().cloned());
    findings.assertions.clone_from(&report.assertions);
    findings.report = Some(report);
    destroyed
}

fn isolated(sandbox: &Sandbox) -> String {
    match sandbox.isolation() {
        Isolation::Namespaces { .. } => "no TCP, network namespace without interfaces".to_owned(),
        Isolation::None(reason) => format!("no TCP; no network namespace ({reason})"),
    }
}

/// Whether what ended the server decides about what was found: a server that this machine killed says nothing about its
/// backup. Damage that was seen before is damage, however the server ended.
fn depends_on_the_end(report: &Result<CheckReport, Failure>, level: ProofLevel) -> bool {
    match report {
        Ok(report) => report.level_reached() < Some(level) && !report.saw_damage,
        Err(_) => true,
    }
}

/// Ends the sandbox whatever happened to the job: its room must be gone before the job says that it ended.
async fn cx_free_step(cx: &JobContext, sandbox: Sandbox) -> Result<(), Failure> {
    let destroyed = sandbox.destroy().await.map(drop).map_err(Failure::from);
    cx.check().and(destroyed)
}

/// The reason of the stop, when that is why something ended early.
fn stopped_or(cx: &JobContext, error: impl Into<Failure>) -> Failure {
    if cx.cancel.is_cancelled() { cx.stopped() } else { error.into() }
}

/// The failure of a job whose proof did not reach the level it was asked for. Of its backup it needs to know what was not counted.
pub fn shortfall(proof: &Proof, forbidden: Option<&Forbidden>) -> Option<Failure> {
    if proof.passed {
        return None;
    }
    let Lack { what, action, hint } = lack(proof, forbidden);
    let (backup, asked): (BackupId, _) = (proof.backup, proof.asked());
    let reached = match standing(proof) {
        Some(level) => format!("is proved at {level}, {asked} was asked"),
        None => format!("reached {} of {asked}", reached(proof)),
    };
    let message = format!("backup {backup} of {} {reached}: {what}", proof.cluster);
    Some(Failure::new(Code::ProofFailed, action, message).with_hint(hint))
}

/// The level that a restore showed, whatever was asked for.
fn standing(proof: &Proof) -> Option<ProofLevel> {
    proof.proved().filter(|level| *level >= ProofLevel::L3)
}

fn reached(proof: &Proof) -> String {
    proof.level().map_or("nothing".to_owned(), |level| level.to_string())
}

/// What keeps a proof from the level that it was asked for.
struct Lack {
    what: String,
    action: Action,
    hint: String,
}

fn lack(proof: &Proof, forbidden: Option<&Forbidden>) -> Lack {
    let ended = |outcome| proof.checks.iter().filter(move |check| check.outcome == outcome);
    if let Some(first) = ended(CheckOutcome::Failed).next() {
        return Lack {
            what: format!("{} failed ({})", first.name, first.detail),
            action: Action::FixData,
            hint:
                "Keep older backups, take a new one at once, and look at the checks of this proof."
                    .to_owned(),
        };
    }
    if let Some(what) = unmet(proof) {
        let unanswered = unanswered(proof).map_or(String::new(), |what| format!("; {what}"));
        return Lack {
            what: what + &unanswered,
            action: Action::FixData,
            hint: "Ask the cluster itself: what is wrong there was backed up as it was. Where it is right there, take a new backup at \
                   once; where the assertion is wrong, correct it in the worker's configuration."
                .to_owned(),
        };
    }
    // Nothing below the assertions is missing, or they are not what the proof lacks first.
    if proof.level_reached >= Some(ProofLevel::L5)
        && let Some(what) = unanswered(proof)
    {
        return Lack {
            what,
            action: Action::FixConfig,
            hint: "Nothing is said against the backup: every check before them passed. Each answer says why. A query, a database's name or \
                   a right is corrected in the worker's configuration, which is then restarted; a library or a locale may be missing on this \
                   machine, or time, which the job's deadline and within_s of the assertions give."
                .to_owned(),
        };
    }
    let decides = |check: &&ProofCheck| DECIDING_CHECKS.contains(&check.name.as_str());
    let blind = ended(CheckOutcome::Skipped).find(decides);
    let what = blind.map_or("a check could not look".to_owned(), |check| {
        format!("{} could not look ({})", check.name, check.detail)
    });
    let hint = match forbidden.filter(|_| blind.is_some_and(|check| check.name == "row_counts")) {
        Some(forbidden) => format!(
            "The backup is as good; what its role may not read was not counted, so nothing could be compared: {} The next backup then \
             counts every table.",
            forbidden.cure()
        ),
        None => {
            "The checks that were skipped say what they need; L5 needs a backup with a census of every database.".to_owned()
        }
    };
    Lack { what, action: Action::FixConfig, hint }
}

/// The assertions that do not hold, with what each answered; `None` when all do.
fn unmet(proof: &Proof) -> Option<String> {
    let (unmet, is_one) = answers(proof, CheckOutcome::Failed)?;
    let (noun, verb) = if is_one { ("assertion", "does") } else { ("assertions", "do") };
    Some(format!("{noun} {unmet} {verb} not hold"))
}

/// The assertions that could not be asked, with the reason of each; `None` when all could.
fn unanswered(proof: &Proof) -> Option<String> {
    let (unanswered, is_one) = answers(proof, CheckOutcome::Skipped)?;
    let noun = if is_one { "assertion" } else { "assertions" };
    Some(format!("{noun} {unanswered} could not be asked"))
}

/// The assertions that ended so, with what each answered, and whether it is one; `None` when there is none.
fn answers(proof: &Proof, outcome: CheckOutcome) -> Option<(String, bool)> {
    let asked = proof.assertions.iter().flatten();
    let such: Vec<String> = asked
        .filter(|assertion| assertion.outcome == outcome)
        .map(|assertion| format!("{} ({})", assertion.name, assertion.answer))
        .collect();
    (!such.is_empty()).then(|| (such.join(", "), such.len() == 1))
}

/// One sentence for people: what was proved, how long it took, how much there was.
pub fn sentence(proof: &Proof) -> String {
    let asked = proof.asked();
    if proof.passed && proof.level_reached < Some(ProofLevel::L3) {
        let (cluster, backup) = (&proof.cluster, proof.backup);
        return format!(
            "backup {backup} of {cluster} passed {}: it was looked at, and not restored",
            reached(proof)
        );
    }
    let Some(level) = standing(proof) else {
        return format!(
            "{} is NOT proved: it reached {} of {asked}",
            proof.cluster,
            reached(proof)
        );
    };
    let less = if proof.passed { String::new() } else { format!(", not {asked} as asked") };
    let took = duration(i64::try_from(proof.recovery_time_ms()).unwrap_or(i64::MAX));
    let what = match proof.level_reached {
        Some(ProofLevel::L5) if proof.rows == 1 => "matches",
        Some(ProofLevel::L5) => "match",
        _ if proof.rows == 1 => "was read",
        _ => "were read",
    };
    let (moment, replayed) = match &proof.recovery {
        None => ("", String::new()),
        Some(recovery) => {
            let commit =
                recovery.last_commit.map_or(String::new(), |at| format!(", last commit {at}"));
            (PITR, format!(" and replayed to {}{commit}", recovery.reached_lsn))
        }
    };
    let heartbeat = proof.heartbeat_at_ms.and_then(|ms| Timestamp::from_millisecond(ms).ok());
    let heartbeat = heartbeat.map_or(String::new(), |at| format!("; heartbeat of {at} seen"));
    let asserted = match proof.assertions_that(CheckOutcome::Passed) {
        0 => String::new(),
        1 => ", 1 assertion holds".to_owned(),
        several => format!(", {several} assertions hold"),
    };
    let unasked = match proof.assertions_that(CheckOutcome::Skipped) {
        0 => String::new(),
        n => format!(", {} could not be asked", count(n, "assertion")),
    };
    let without = match proof.lacks.as_slice() {
        [] => String::new(),
        [one] => format!(" without database {one}"),
        several => format!(" without databases {}", several.join(", ")),
    };
    let mut said = format!(
        "{}{without} is PROVED ({level}{moment}){less}: restored{replayed} in {took}, {}, {} {what}{asserted}{unasked}{heartbeat}",
        proof.cluster,
        count(proof.tables, "table"),
        count(proof.rows, "row")
    );
    if proof.kind == BackupKind::Logical {
        said.push_str("; of a dump, which says nothing of the server's own files and WAL");
    }
    said
}

/// When assertions must leave off, so that the job still has the time to tell what the checks before them found.
fn ask_until(cx: &JobContext) -> Option<tokio::time::Instant> {
    let kept = (Duration::from_millis(cx.spec.deadline_ms) / 10).min(TELLING_MAX);
    cx.ends_at()?.checked_sub(kept)
}

/// L4 to L6: looks into what runs in a sandbox.
async fn look_into(
    cx: &JobContext,
    workshop: &Workshop<'_>,
    target: &Target,
    level: ProofLevel,
    origin: Origin,
    backup: &Backup,
    findings: &mut Findings,
) -> Result<CheckReport, Failure> {
    let started = Instant::now();
    let report = cx
        .step_with("check", |step| async move {
            let options = CheckOptions {
                job: jobs::session_owner(cx.spec.attempt),
                level,
                origin,
                census: backup.facts().census.as_ref(),
                assertions: &workshop.assertions,
                every_row_in_indexes: true,
                ask_until: ask_until(cx),
                deadline: None,
                cancel: cx.cancel.clone(),
            };
            let report =
                run_checks(target, &options).await.map_err(|error| stopped_or(cx, error))?;
            step.figure("tables", report.tables);
            step.figure("rows", report.rows);
            Ok(report)
        })
        .await;
    findings.phase("check", started, false);
    report
}

/// Removes what dead workers left in the directory of sandboxes.
pub async fn sweep(directory: Arc<Path>) {
    let swept = blocking(move || {
        ShortPlace::sweep();
        Ok(postgres::sandbox::sweep(&directory)?)
    });
    let swept = swept.await;
    match swept {
        Ok(rooms) => {
            for room in rooms {
                tracing::info!(path = %room.path.display(), processes = room.n_processes, "Removed what a dead worker left");
            }
        }
        Err(failure) => tracing::warn!(%failure, "Failed to look for what dead workers left"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_assertion_that_could_not_be_asked_is_named_with_its_reason() {
        let skipped = |level_reached| {
            let (backup, lineage) =
                (BackupId::mint(1, [1; 10]), proto::LineageId::mint(1, [2; 10]));
            let (cluster, worker) = ("orders".parse().unwrap(), "w".parse().unwrap());
            let identifier = proto::SystemIdentifier(1);
            let assertion = ProofAssertion {
                name: "near".to_owned(),
                database: "shop".parse().unwrap(),
                outcome: CheckOutcome::Skipped,
                answer: "could not load library".to_owned(),
                duration_ms: 1,
            };
            let looked = ProofCheck {
                name: "stop_position".to_owned(),
                level: ProofLevel::L3,
                outcome: CheckOutcome::Passed,
                detail: String::new(),
            };
            let proof = Proof {
                level_reached: Some(level_reached),
                checks: vec![looked],
                assertions: Some(vec![assertion]),
                ..Proof::of(backup, lineage, cluster, identifier, worker, ProofLevel::L6)
            };
            shortfall(&proof, None).unwrap()
        };
        let failure = skipped(ProofLevel::L5);
        assert_eq!((failure.code, failure.action), (Code::ProofFailed, Action::FixConfig));
        let told = "is proved at L5, L6 was asked: assertion near (could not load library) could not be asked";
        assert!(failure.message.ends_with(told), "{failure}");
        let hint = failure.hint;
        assert!(hint.contains("within_s") && !hint.contains("census"), "{hint}");
        let below = skipped(ProofLevel::L4);
        assert!(below.message.ends_with("a check could not look"), "{below}");
    }

    #[test]
    fn a_level_is_proved_in_every_sentence_and_what_was_not_counted_is_named_with_its_cure() {
        let (backup, lineage) = (BackupId::mint(1, [1; 10]), proto::LineageId::mint(1, [2; 10]));
        let identifier = proto::SystemIdentifier(1);
        let check = |outcome| ProofCheck {
            name: "row_counts".to_owned(),
            level: ProofLevel::L5,
            outcome,
            detail: "0 tables have the rows they must have".to_owned(),
        };
        let of = |level_reached, outcome| Proof {
            level_reached: Some(level_reached),
            checks: vec![check(outcome)],
            ..Proof::of(
                backup,
                lineage,
                "orders".parse().unwrap(),
                identifier,
                "w".parse().unwrap(),
                ProofLevel::L5,
            )
        };
        let blind = of(ProofLevel::L4, CheckOutcome::Skipped);
        assert_eq!(blind.proved(), Some(ProofLevel::L4));
        let said = sentence(&blind);
        assert!(said.starts_with("orders is PROVED (L4), not L5 as asked: restored in "), "{said}");
        let first = "public.orders in shop".to_owned();
        let forbidden = Forbidden { role: "backup".to_owned(), tables: 1, first };
        let failure = shortfall(&blind, Some(&forbidden)).unwrap();
        let told = format!("{failure} {}", failure.hint);
        assert!(
            told.contains("is proved at L4, L5 was asked: row_counts could not look"),
            "{told}"
        );
        assert!(told.contains("GRANT pg_read_all_data TO \"backup\";"), "{told}");
        assert!(!told.contains("NOT proved"), "{told}");
        assert!(!shortfall(&blind, None).unwrap().hint.contains("GRANT"));

        let wrong = of(ProofLevel::L4, CheckOutcome::Failed);
        assert_eq!((wrong.proved(), wrong.speaks_against()), (None, true));
        assert_eq!(sentence(&wrong), "orders is NOT proved: it reached L4 of L5");
        let failure = shortfall(&wrong, Some(&forbidden)).unwrap();
        assert!(failure.message.contains("reached L4 of L5: row_counts failed"), "{failure}");
        let low = of(ProofLevel::L2, CheckOutcome::Skipped);
        assert_eq!(sentence(&low), "orders is NOT proved: it reached L2 of L5");
    }

    #[test]
    fn how_long_a_restore_took_is_rounded_as_everywhere() {
        let (backup, lineage) = (BackupId::mint(1, [1; 10]), proto::LineageId::mint(1, [2; 10]));
        let (cluster, worker) = ("orders".parse().unwrap(), "w".parse().unwrap());
        let identifier = proto::SystemIdentifier(1);
        let phase = |duration_ms| Phase {
            name: "restore".to_owned(),
            duration_ms,
            counts_as_recovery: true,
        };
        let of = Proof::of(backup, lineage, cluster, identifier, worker, ProofLevel::L4).reached();
        for (ms, said) in [(5_210, "5.2 s"), (31_400, "31 s"), (65_000, "1m05s")] {
            let proof = Proof { phases: vec![phase(ms)], ..of.clone() };
            let said = format!("orders is PROVED (L4): restored in {said}, ");
            assert!(sentence(&proof).starts_with(&said), "{}", sentence(&proof));
        }
    }

    #[test]
    fn a_job_keeps_time_to_tell_what_it_found_before_its_assertions() {
        let kept = |deadline_ms| {
            let spec = proto::message::Spec {
                schema: 1,
                job: proto::JobId::mint(1, [1; 10]),
                attempt: proto::AttemptId::mint(1, [2; 10]),
                predecessor: None,
                cluster: "orders".parse().unwrap(),
                system_identifier: None,
                task: proto::Task::Analyze(proto::job::Analyze::default()),
                deadline_ms,
                traceparent: None,
            };
            let cx = JobContext::new(spec, Arc::new(|_| {}));
            let until = ask_until(&cx)?;
            Some(cx.ends_at()? - until)
        };
        assert_eq!(kept(60_000), Some(Duration::from_secs(6)));
        assert_eq!(kept(24 * 3_600_000), Some(TELLING_MAX));
        // A proof without a coordinator has no end.
        let _ = kept(u64::MAX);
    }

    #[test]
    fn damage_that_was_seen_stands_whatever_ended_the_server() {
        let report = |outcome, saw_damage| {
            let check = |name: &str, level, outcome| ProofCheck {
                name: name.to_owned(),
                level,
                outcome,
                detail: String::new(),
            };
            Ok(CheckReport {
                checks: vec![
                    check("stop_position", ProofLevel::L3, CheckOutcome::Passed),
                    check("tables_readable", ProofLevel::L4, outcome),
                ],
                server_version_num: 180_000,
                system_identifier: proto::SystemIdentifier(1),
                reached_lsn: Some(proto::Lsn(1)),
                tables: 1,
                rows: 1,
                tables_exact: 0,
                tables_bounded: 0,
                saw_damage,
                assertions: Vec::new(),
            })
        };
        let (passed, failed) = (CheckOutcome::Passed, CheckOutcome::Failed);
        assert!(!depends_on_the_end(&report(failed, true), ProofLevel::L4), "pages were broken");
        assert!(depends_on_the_end(&report(failed, false), ProofLevel::L4), "nobody saw anything");
        assert!(!depends_on_the_end(&report(passed, false), ProofLevel::L4), "all was seen");
        let broken_off = Failure::new(Code::ServerUnreachable, Action::Retry, "it is gone");
        assert!(depends_on_the_end(&Err(broken_off), ProofLevel::L4));
    }
}
