//! Waiting for a job, and showing how far it is.

use std::time::{Duration, Instant};

use coordinator::api::types::JobView;
use indicatif::{ProgressBar, ProgressStyle};
use proto::job::{BackupOutcome, EnableWalOutcome, JobState, LostWal, Outcome, RestoreOutcome};
use proto::{ClusterName, Failure, JobId, Task};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::args::{Output, Waiting};
use crate::client::Client;
use crate::exit::Exit;
use crate::output;

/// One long poll asks the coordinator to wait this long.
const POLL_S: u64 = 20;
/// Before a coordinator that did not answer is asked again.
const PAUSE: Duration = Duration::from_secs(1);

/// Waits until a job is over or `limit` passed; returns the job as it is then, or was last known. The first request fails
/// at once; later ones are tried again until the limit: a coordinator may be restarted while its jobs run.
pub(crate) async fn wait(
    client: &Client,
    job: JobId,
    limit: Duration,
    shown: bool,
) -> Result<JobView, Failure> {
    let started = Instant::now();
    let bar = shown.then(bar);
    let mut said = String::new();
    let mut view: JobView = client.get(&format!("/v1/jobs/{job}")).await?;
    let mut silent: Option<Failure> = None;
    loop {
        if let Some(bar) = &bar {
            let now = state_line(&view);
            match (output::is_watched(), view.progress.as_ref()) {
                (true, Some(progress)) => {
                    bar.set_length(progress.total.unwrap_or(0));
                    bar.set_position(progress.done);
                }
                (true, None) => bar.set_position(0),
                // How it ended tells whoever waits for it.
                (false, _) if now != said && !view.state.is_final() => output::talk(&now),
                (false, _) => {}
            }
            bar.set_message(now.clone());
            said = now;
        } else if view.state == JobState::Waiting && view.reason.is_some() {
            // Who only waits for the end is told at least why nothing begins.
            let now = state_line(&view);
            if now != said {
                output::talk(&now);
                said = now;
            }
        }
        let left = limit.saturating_sub(started.elapsed());
        if view.state.is_final() || left.is_zero() {
            if let Some(bar) = bar {
                bar.finish_and_clear();
            }
            if let Some(failure) = silent {
                output::talk(&format!(
                    "The waiting ended without an answer, the job was last seen {}: {failure}",
                    view.state
                ));
            }
            return Ok(view);
        }
        // Progress does not change the version: a watched job is looked at more often.
        let wait_s = if shown { 1 } else { POLL_S.min(left.as_secs().max(1)) };
        let path = format!("/v1/jobs/{job}?after_version={}&wait_s={wait_s}", view.version);
        match client.get_waiting(&path, Duration::from_secs(wait_s)).await {
            Ok(next) => {
                view = next;
                silent = None;
            }
            Err(failure) if Exit::of(&failure) == Exit::Unreachable => {
                if silent.is_none() {
                    output::talk(&format!("{failure}; asking again until it answers"));
                }
                silent = Some(failure);
                tokio::time::sleep(PAUSE.min(limit.saturating_sub(started.elapsed()))).await;
            }
            Err(failure) => return Err(failure),
        }
    }
}

fn bar() -> ProgressBar {
    if !output::is_watched() {
        return ProgressBar::hidden();
    }
    let style = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {percent:>3} %")
        .expect("the template is a constant");
    let bar = ProgressBar::new(0).with_style(style);
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn state_line(view: &JobView) -> String {
    let step = view.progress.as_ref().map_or(String::new(), |p| format!(", {}", p.step));
    let reason = view.reason.as_ref().map_or(String::new(), |reason| format!(": {reason}"));
    format!("{} {} {}{step}{reason}", view.kind, view.cluster, view.state)
}

/// After an order: waits as asked, then prints the job.
pub(crate) async fn after_order(
    client: &Client,
    view: JobView,
    waiting: &Waiting,
    format: Output,
) -> Result<Exit, Failure> {
    if !(waiting.wait || waiting.watch) {
        output::show(format, &view, |view| {
            format!("{} ({} of {}, {})", view.id, view.kind, view.cluster, view.state)
        });
        output::talk(&format!("Follow it with: pgmuster job watch {}", view.id));
        return Ok(Exit::Ok);
    }
    let mut current = view.id;
    let interrupted = interrupted();
    let ended = tokio::select! {
        ended = to_the_end(client, &mut current, waiting, format) => Some(ended),
        () = interrupted => None,
    };
    ended.unwrap_or_else(|| {
        output::talk(&format!(
            "Detached; the job goes on. Stop it with: pgmuster job cancel {current}"
        ));
        Ok(Exit::Interrupted)
    })
}

/// Waits for a job and those that follow it, within one limit for all; `current` is the one that is waited for.
async fn to_the_end(
    client: &Client,
    current: &mut JobId,
    waiting: &Waiting,
    format: Output,
) -> Result<Exit, Failure> {
    let (started, limit) = (Instant::now(), Duration::from_secs(waiting.timeout));
    let mut before = Exit::Ok;
    loop {
        let left = limit.saturating_sub(started.elapsed());
        let view = wait(client, *current, left, waiting.watch).await?;
        report(&view, format);
        // What was ordered together is waited for together: a backup and its proof.
        match view.followed_by.first() {
            Some(next) if view.state == JobState::Succeeded => {
                before = ended(&view);
                *current = *next;
            }
            // A proof that stays above the pages does not take back what the backup found.
            _ => return Ok(Some(ended(&view)).filter(|exit| *exit != Exit::Ok).unwrap_or(before)),
        }
    }
}

/// The exit code of a job that was waited for. An archive that waits for a restart is set up, and does not work yet; a backup
/// tells what is wrong with the server's pages.
pub(crate) fn ended(view: &JobView) -> Exit {
    match (Exit::of_job(view.state, view.failure.as_ref()), &view.outcome) {
        (Exit::Ok, Some(Outcome::EnableWal(done)))
            if !done.planned_only && !done.restart_for.is_empty() =>
        {
            Exit::Findings
        }
        (Exit::Ok, Some(Outcome::Backup(done))) => found(done),
        (Exit::Ok, Some(Outcome::Restore(done))) => restored(done),
        (exit, _) => exit,
    }
}

/// The exit code of a backup that was taken.
pub(crate) fn found(done: &BackupOutcome) -> Exit {
    let lacks = done.logical.as_ref().is_some_and(|logical| !logical.failed.is_empty());
    if done.bad_pages > 0 || done.silent_changes.is_some() || lacks {
        Exit::Findings
    } else {
        Exit::Ok
    }
}

/// The exit code of a restore that was done.
pub(crate) fn restored(done: &RestoreOutcome) -> Exit {
    let reached = done.recovery.as_ref().and_then(|recovery| recovery.reached.as_ref());
    if reached.is_some_and(|reached| reached.stays_down) { Exit::Findings } else { Exit::Ok }
}

/// Resolves at Ctrl-C or SIGTERM. Listens from the call on, not only from the first poll.
pub(crate) fn interrupted() -> impl Future<Output = ()> {
    let listen = || -> std::io::Result<_> {
        Ok((signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?))
    };
    let signals: std::io::Result<(Signal, Signal)> = listen();
    async move {
        // Without a handler a signal ends the program by itself.
        let Ok((mut interrupt, mut terminate)) = signals else {
            return std::future::pending().await;
        };
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    }
}

/// Prints a job that was waited for.
pub(crate) fn report(view: &JobView, format: Output) {
    output::show(format, view, result_line);
    if format == Output::Table
        && let Some(failure) = &view.failure
    {
        output::failure(failure);
    }
}

/// A backup in one line; of a logical one also what is not in it.
pub(crate) fn backed_up(cluster: &ClusterName, done: &BackupOutcome, took_ms: i64) -> String {
    let (size, mut stored) = (output::bytes(done.size_bytes), output::bytes(done.stored_bytes));
    stored.push_str(" stored");
    if done.taken_over_bytes > 0 {
        let bytes = output::bytes(done.taken_over_bytes);
        stored.extend([", ", &bytes, " taken over from an interrupted backup"]);
    }
    let (took, backup) = (output::duration(took_ms), done.backup);
    let Some(logical) = &done.logical else {
        let (files, read) = (output::count(done.files, "file"), output::bytes(done.read_bytes));
        let wal = output::and_wal(done.wal_bytes);
        let mut line = format!(
            "Backed up {cluster} ({files}, {size}{wal}) in {took}: {read} read, {stored}; backup {backup}"
        );
        if done.bad_pages > 0 {
            let pages = output::count(done.bad_pages, "page");
            line.extend(["; ", &pages, " with a wrong checksum (PAGE_CHECKSUM)"]);
        }
        if let Some(changes) = &done.silent_changes {
            let units = output::count(changes.units, "unit");
            line.extend([
                "; ",
                &units,
                " of files had changed though times and sizes had not (SILENT_CHANGE)",
            ]);
        }
        if let Some(forbidden) = &done.forbidden {
            let (who, cure) = (forbidden.sentence(), forbidden.cure());
            line.extend(["; rows that no proof compares: ", &who, " (", &cure, ")"]);
        }
        return line;
    };
    let databases = output::count(logical.databases, "database");
    let mut line =
        format!("Dumped {databases} of {cluster} ({size}) in {took}: {stored}; backup {backup}");
    for failed in &logical.failed {
        line.extend([
            "; database ",
            failed.database.as_str(),
            " could not be dumped: ",
            &failed.why,
        ]);
    }
    for skipped in &logical.skipped {
        line.extend(["; not ", skipped.database.as_str(), ": ", &skipped.why]);
    }
    if !logical.role_passwords {
        line.push_str("; roles without passwords");
    }
    line
}

/// What came of setting up the archive of WAL.
fn archives(cluster: &ClusterName, done: &EnableWalOutcome) -> String {
    // What was set, as far as anything was; the last sentence of the plan is about what follows.
    let set = done.plan.split_last().map_or(&[][..], |(_, set)| set);
    let set = if set.is_empty() { String::new() } else { set.join("\n") + "\n" };
    match done.seen {
        _ if done.planned_only => done.plan.join("\n"),
        Some(seen) => format!(
            "{set}{cluster} archives its WAL: segment {} was in the repository after {}{}",
            seen.segment,
            output::duration(i64::try_from(seen.after_ms).unwrap_or(i64::MAX)),
            done.lost.map_or_else(String::new, |lost| lost_before(cluster, lost))
        ),
        None => format!(
            "{set}PENDING RESTART: restart the server of {cluster} for {}, then run this again; nothing is archived before",
            done.restart_for.join(" and ")
        ),
    }
}

/// What is missing before the first segment, what that costs and who cures it.
fn lost_before(cluster: &ClusterName, lost: LostWal) -> String {
    let LostWal { first, last, segments, backup, recoverable_to_ms } = lost;
    let missing = match segments {
        1 => format!("segment {first} is not in the archive"),
        _ => format!("{segments} segments from {first} to {last} are not in the archive"),
    };
    let from = recoverable_to_ms
        .map_or_else(|| format!("where the WAL behind backup {backup} breaks off"), output::time);
    format!(
        "\n{missing}: no moment between {from} and the end of the next backup can be recovered.\n\
         The coordinator orders that backup within a minute, unless jobs.backup_behind_gaps is off; by hand: pgmuster backup {cluster} --verify 5"
    )
}

/// Whether maintenance was only to be planned.
fn is_plan(task: &Task) -> bool {
    match task {
        Task::Analyze(task) => task.plan_only,
        Task::Vacuum(task) => task.plan_only,
        _ => false,
    }
}

/// The plan of maintenance.
fn planned(plan: &[String], cluster: &ClusterName, databases: u64) -> String {
    if plan.is_empty() {
        return format!("Nothing to do in {} of {cluster}", output::count(databases, "database"));
    }
    plan.join("\n")
}

/// A job's result in one line.
pub(crate) fn result_line(view: &JobView) -> String {
    let took_ms = view.started_at_ms.zip(view.ended_at_ms).map_or(0, |(start, end)| end - start);
    let took = output::duration(took_ms);
    match (&view.state, &view.outcome) {
        (JobState::Succeeded, Some(Outcome::Backup(done))) => {
            backed_up(&view.cluster, done, took_ms)
        }
        (_, Some(Outcome::VerifyRestore(done))) => worker::proving::sentence(&done.proof),
        (JobState::Succeeded, Some(Outcome::Restore(done))) if done.planned_only => {
            done.plan.join("\n")
        }
        (JobState::Succeeded, Some(Outcome::Restore(done))) => format!(
            "Restored backup {} of {} into {} in {took}: {}; {}{}",
            done.backup,
            view.cluster,
            done.directory,
            output::restored(done),
            output::recovered(done),
            output::not_taken(done)
        ),
        (JobState::Succeeded, Some(Outcome::Analyze(done))) if is_plan(&view.task) => {
            planned(&done.plan, &view.cluster, done.databases)
        }
        (JobState::Succeeded, Some(Outcome::Analyze(done))) => format!(
            "Analyzed {} in {} of {} in {took}, {} skipped",
            output::count(done.analyzed, "table"),
            output::count(done.databases, "database"),
            view.cluster,
            done.skipped.len()
        ),
        (JobState::Succeeded, Some(Outcome::Vacuum(done))) if is_plan(&view.task) => {
            planned(&done.plan, &view.cluster, done.databases)
        }
        (JobState::Succeeded, Some(Outcome::Vacuum(done))) => format!(
            "Vacuumed {} in {} of {} in {took}, {} skipped",
            output::count(done.vacuumed.len() as u64, "table"),
            output::count(done.databases, "database"),
            view.cluster,
            done.skipped.len()
        ),
        (JobState::Succeeded, Some(Outcome::EnableWal(done))) => archives(&view.cluster, done),
        (state, _) => {
            // Its failure is told beside it.
            let reason = view.reason.as_ref().filter(|_| view.failure.is_none());
            let reason = reason.map_or(String::new(), |why| format!(": {why}"));
            let (kind, did) = (view.kind.as_str().replace('_', " "), state.told());
            format!("{kind} of {} {did}{reason} ({})", view.cluster, view.id)
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// A job that ended with this outcome.
    fn succeeded(outcome: &str) -> JobView {
        let outcome: Value = serde_json::from_str(outcome).unwrap();
        let id = "018bcfe5-6800-7101-8101-010101010101";
        serde_json::from_value(json!({
            "id": id, "cluster": "orders", "kind": "backup", "task": {"backup": {}}, "lane": "urgent", "state": "succeeded",
            "reason": null, "version": 3, "requested_by": "ops", "submitted_at_ms": 1, "not_before_at_ms": 1,
            "not_after_at_ms": null, "started_at_ms": 1, "ended_at_ms": 2, "attempts_used": 1, "attempts_max": 1,
            "worker": "w1", "attempt": id, "progress": null, "failure": null, "outcome": outcome, "verify": null,
            "follows": null, "followed_by": [], "retry_of": null, "traceparent": "",
        }))
        .unwrap()
    }

    #[test]
    fn a_backup_that_found_what_no_time_had_told_ends_with_findings_and_says_so() {
        let silent = include_str!("../../proto/tests/golden/outcome.backup.silent_changes.json");
        let view = succeeded(silent);
        assert_eq!(ended(&view), Exit::Findings);
        let line = result_line(&view);
        let said = "; 3 units of files had changed though times and sizes had not (SILENT_CHANGE)";
        assert!(line.starts_with("Backed up orders") && line.ends_with(said), "{line}");

        let view = succeeded(include_str!("../../proto/tests/golden/outcome.backup.json"));
        assert_eq!(ended(&view), Exit::Ok);
        assert!(!result_line(&view).contains("SILENT_CHANGE"));
    }

    #[test]
    fn a_job_without_an_outcome_is_told_in_a_plain_sentence() {
        let done = succeeded(include_str!("../../proto/tests/golden/outcome.backup.json"));
        for (state, said) in [
            (JobState::Failed, "backup of orders failed ("),
            (JobState::Cancelled, "backup of orders was cancelled ("),
            (JobState::Running, "backup of orders is running ("),
        ] {
            let view = JobView { state, outcome: None, ..done.clone() };
            assert!(result_line(&view).starts_with(said), "{}", result_line(&view));
        }
    }

    #[test]
    fn a_backup_and_its_restore_say_the_same_numbers_with_wal_apart() {
        let backup = include_str!("../../proto/tests/golden/outcome.backup.json");
        let mut restore: Value =
            serde_json::from_str(include_str!("../../proto/tests/golden/outcome.restore.wal.json"))
                .unwrap();
        restore["restore"]["files"] = json!(1_001);
        restore["restore"]["size_bytes"] = json!(31_000_000 + 16_777_216);
        let numbers = "1,000 files, 29.6 MiB, and 16.0 MiB of WAL";
        for outcome in [backup, &restore.to_string()] {
            let line = result_line(&succeeded(outcome));
            assert!(line.contains(numbers), "{line}");
        }
    }
}
