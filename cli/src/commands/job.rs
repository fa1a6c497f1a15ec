//! `job …`: look at jobs, follow them, stop them.

use std::time::Duration;

use coordinator::api::types::{AttemptView, JobList, JobView, TraceView};
use proto::{Action, Code, Failure, JobId};

use crate::args::{JobCommand, JobRef, Output};
use crate::client::Client;
use crate::exit::Exit;
use crate::{environment, follow, output};

/// Columns of the waterfall.
const WATERFALL_COLUMNS: i64 = 40;
/// Time between two steps that is told as such: shorter than this share of the whole, nobody looks for it.
const BETWEEN_MIN_SHARE: i64 = 100;
/// What such time is called.
const BETWEEN: &str = "(between steps)";

/// `job …`.
pub(crate) async fn run(
    client: &Client,
    command: JobCommand,
    format: Output,
) -> Result<Exit, Failure> {
    match command {
        JobCommand::List { cluster, state, limit } => {
            let of = cluster.as_ref().map_or(String::new(), |name| format!("&cluster={name}"));
            let state = state.map_or(String::new(), |state| format!("&state={state}"));
            let query = format!("?limit={limit}{of}{state}");
            let list: JobList = client.get(&format!("/v1/jobs{query}")).await?;
            if let Some(cluster) = cluster.filter(|_| list.jobs.is_empty()) {
                super::cluster::known(client, &cluster).await?;
            }
            output::show(format, &list.jobs, |jobs| table(jobs));
        }
        JobCommand::Show { job } => {
            let view: JobView =
                client.get(&format!("/v1/jobs/{}", find(client, job).await?)).await?;
            output::show(format, &view, details);
        }
        JobCommand::Watch { job, timeout } => {
            let job = find(client, job).await?;
            let interrupted = follow::interrupted();
            let view = tokio::select! {
                view = follow::wait(client, job, Duration::from_secs(timeout), true) => view?,
                () = interrupted => return Ok(Exit::Interrupted),
            };
            follow::report(&view, format);
            return Ok(follow::ended(&view));
        }
        JobCommand::Trace { job } => {
            let job = find(client, job).await?;
            let trace: TraceView = client.get(&format!("/v1/jobs/{job}/trace")).await?;
            output::show(format, &trace, waterfall);
        }
        JobCommand::Cancel { job } => {
            let job = find(client, job).await?;
            let view: JobView = client.post(&format!("/v1/jobs/{job}/cancel"), &()).await?;
            output::show(format, &view, |view| format!("{} {}", view.id, view.state.told()));
        }
        JobCommand::Retry { job, waiting } => {
            let job = find(client, job).await?;
            let view: JobView = client.post(&format!("/v1/jobs/{job}/retry"), &()).await?;
            return follow::after_order(client, view, &waiting, format).await;
        }
    }
    Ok(Exit::Ok)
}

async fn find(client: &Client, job: JobRef) -> Result<JobId, Failure> {
    match job {
        JobRef::Id(id) => Ok(id),
        JobRef::Last => {
            let list: JobList = client.get("/v1/jobs?limit=1").await?;
            list.jobs.first().map(|job| job.id).ok_or_else(|| {
                Failure::new(Code::JobUnknown, Action::FixConfig, "there is no job yet")
                    .with_hint("Order one: pgmuster backup CLUSTER.")
            })
        }
    }
}

fn table(jobs: &[JobView]) -> String {
    let now_ms = environment::now_ms();
    let rows = jobs.iter().map(|job| {
        let took = job.started_at_ms.map(|start| job.ended_at_ms.unwrap_or(now_ms) - start);
        let why = job.failure.as_ref().map(ToString::to_string).or_else(|| job.reason.clone());
        vec![
            job.id.to_string(),
            job.cluster.to_string(),
            job.kind.to_string(),
            job.state.to_string(),
            output::ago(now_ms, Some(job.submitted_at_ms)),
            took.map_or_else(|| "-".to_owned(), output::duration),
            why.unwrap_or_default(),
        ]
    });
    output::table(&["JOB", "CLUSTER", "KIND", "STATE", "ORDERED", "TOOK", "WHY"], rows.collect())
}

fn details(view: &JobView) -> String {
    let mut lines = vec![
        format!("job {}: {}", view.id, follow::result_line(view)),
        format!("  state        {}", view.state),
        format!("  lane         {}", view.lane),
        format!("  ordered by   {}", view.requested_by),
        format!("  attempts     {} of {}", view.attempts_used, view.attempts_max),
    ];
    if let Some(worker) = &view.worker {
        lines.push(format!("  worker       {worker}"));
    }
    if let Some(failure) = &view.failure {
        lines.push(format!("  failure      {failure}"));
        lines.extend(output::details(failure));
        lines.push(format!("  hint         {}", failure.hint));
    }
    for next in &view.followed_by {
        lines.push(format!("  followed by  {next}"));
    }
    lines.push(format!("  trace        {}", view.traceparent));
    lines.join("\n")
}

fn waterfall(trace: &TraceView) -> String {
    let job = &trace.job;
    let (kind, did) = (job.kind.as_str().replace('_', " "), job.state.told());
    let mut lines = vec![format!("{kind} of {} {did}; trace {}", job.cluster, trace.trace_id)];
    for attempt in &trace.attempts {
        let worker =
            attempt.worker.as_ref().map_or(String::new(), |worker| format!(" on {worker}"));
        let waited = attempt.granted_at_ms.map_or(0, |granted| granted - job.submitted_at_ms);
        lines.push(format!(
            "attempt {}{worker}: {}, granted {} after the order",
            attempt.id,
            attempt.state,
            output::duration(waited)
        ));
        lines.extend(steps(attempt));
    }
    lines.join("\n")
}

fn steps(attempt: &AttemptView) -> Vec<String> {
    let now_ms = environment::now_ms();
    let end = |step: &proto::Step| step.ended_at_ms.unwrap_or(now_ms);
    let first = attempt.steps.iter().map(|step| step.started_at_ms).min().unwrap_or(0);
    let last = attempt.steps.iter().map(end).max().unwrap_or(first);
    let whole = (last - first).max(1);
    let columns = |ms: i64| usize::try_from(ms * WATERFALL_COLUMNS / whole).unwrap_or(0);
    let bar = |from: i64, to: i64| {
        let (before, bar) = (columns(from - first), columns(to - from).max(1));
        let rest = usize::try_from(WATERFALL_COLUMNS).unwrap_or(0).saturating_sub(before) + 1;
        let bar = format!("{}{:<rest$}", " ".repeat(before), "█".repeat(bar));
        format!("{bar} {:>8}", output::duration(to - from))
    };
    let mut rows: Vec<(&str, String)> = Vec::new();
    let mut told_to = first;
    for step in &attempt.steps {
        let began = step.started_at_ms;
        if (began - told_to) * BETWEEN_MIN_SHARE >= whole {
            rows.push((BETWEEN, bar(told_to, began)));
        }
        told_to = told_to.max(end(step));
        let figures: Vec<String> =
            step.figures.iter().map(|(name, value)| figure(name, *value)).collect();
        let state = match (step.failed, step.ended_at_ms) {
            (true, _) => " FAILED",
            (false, None) => " running",
            (false, Some(_)) => "",
        };
        let line = format!("{}{state}  {}", bar(began, end(step)), figures.join(", "));
        rows.push((&step.name, line));
    }
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter()
        .map(|(name, line)| format!("  {name:<width$} {line}").trim_end().to_owned())
        .collect()
}

fn figure(name: &str, value: u64) -> String {
    match name.strip_suffix("_bytes") {
        Some(what) => format!("{what} {}", output::bytes(value)),
        None => format!("{} {value}", name.replace('_', " ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn time_that_no_step_took_is_told_where_it_passed() {
        let step = |number: u32, name: &str, from: i64, to: i64| json!({"number": number, "name": name, "span_id": "", "started_at_ms": from, "ended_at_ms": to});
        let told = |of: &[Value]| -> Vec<String> {
            let attempt = serde_json::from_value(json!({
                "id": "018bcfe5-6800-7101-8101-010101010101", "state": "succeeded", "reason": null, "queue": "",
                "worker": null, "predecessor": null, "span_id": "", "created_at_ms": 1, "granted_at_ms": 1,
                "started_at_ms": 1, "ended_at_ms": 9, "failure": null, "steps": of,
            }));
            steps(&attempt.unwrap())
        };
        let name = |line: &String| line.trim_start().split("  ").next().unwrap().to_owned();
        let lines = told(&[
            step(1, "connect", 1_000, 2_000),
            step(2, "copy", 2_009, 6_000),
            // While the one before runs.
            step(3, "summaries", 3_000, 5_000),
            step(4, "commit", 9_000, 11_000),
        ]);
        let names: Vec<String> = lines.iter().map(name).collect();
        assert_eq!(names[3], BETWEEN, "{lines:#?}");
        assert!(lines[3].ends_with("3.0 s"), "{lines:#?}");
        assert_eq!(lines.len(), 5, "what is short is not told: {lines:#?}");
    }
}
