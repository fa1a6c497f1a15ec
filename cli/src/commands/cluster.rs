//! `cluster …`.

use coordinator::api::types::ClusterView;
use policy::recovery_time::RecoveryTime;
use proto::message::{HeartbeatSetup, WalStanding};
use proto::{ClusterName, Failure, ProofLevel};

use crate::args::{ClusterCommand, Output};
use crate::client::Client;
use crate::commands::archiving::Seen;
use crate::commands::recovery::{self, Behind};
use crate::commands::{archiving, backups, order};
use crate::exit::Exit;
use crate::{environment, output};

/// `cluster …`.
pub(crate) async fn run(
    client: &Client,
    command: ClusterCommand,
    format: Output,
) -> Result<Exit, Failure> {
    match command {
        ClusterCommand::List => {
            let clusters: Vec<ClusterView> = client.get("/v1/clusters").await?;
            output::show(format, &clusters, |rows| table(rows, environment::now_ms()));
        }
        ClusterCommand::Show { cluster } => {
            let view: ClusterView = client.get(&format!("/v1/clusters/{cluster}")).await?;
            let behind = recovery::behind_gap(client, &view).await;
            output::show(format, &view, |view| details(view, behind, environment::now_ms()));
        }
        ClusterCommand::EnableWal(args) => return order::enable_wal(client, args, format).await,
    }
    Ok(Exit::Ok)
}

/// Makes sure that the coordinator knows a cluster: a list about one that it does not know would be empty and say nothing.
pub(crate) async fn known(client: &Client, cluster: &ClusterName) -> Result<(), Failure> {
    client.get::<ClusterView>(&format!("/v1/clusters/{cluster}")).await.map(drop)
}

/// Clusters as rows.
pub(crate) fn table(clusters: &[ClusterView], now_ms: i64) -> String {
    let rows = clusters.iter().map(|cluster| {
        let backup = cluster.backup.as_ref();
        vec![
            cluster.name.to_string(),
            cluster.state.to_string(),
            output::ago(now_ms, backup.map(|backup| backup.facts.stopped_at_ms)),
            backup.map_or_else(|| "-".to_owned(), |backup| backups::proved(backup, now_ms)),
            cluster.recoverable_to_at_ms.map_or_else(
                || "-".to_owned(),
                |point| output::duration(now_ms.saturating_sub(point)),
            ),
            cluster.recovery_time.map_or_else(|| "not measured".to_owned(), recovery_time),
            cluster.reason.clone(),
        ]
    });
    output::table(
        &["CLUSTER", "STATE", "LAST BACKUP", "PROOF", "RPO", "RTO", "WHY"],
        rows.collect(),
    )
}

fn details(view: &ClusterView, behind: Option<Behind>, now_ms: i64) -> String {
    let mut lines = vec![format!("{} is {}: {}", view.name, view.state, view.reason)];
    let mut row = |name: &str, value: String| lines.push(format!("  {name:<12} {value}"));
    let text = |value: Option<String>| value.unwrap_or_else(|| "-".to_owned());
    row("site", text(view.site.as_ref().map(ToString::to_string)));
    row("worker", text(view.worker.as_ref().map(ToString::to_string)));
    row("seen", output::ago(now_ms, view.seen_at_ms));
    row(
        "server",
        text(
            view.server_version_num
                .map(|num| format!("PostgreSQL {}.{}", num / 10_000, num % 10_000)),
        ),
    );
    row("identifier", text(view.system_identifier.map(|id| id.to_string())));
    row(
        "repository",
        match (&view.repository, &view.repository_location) {
            (Some(name), Some(place)) => format!("{name} ({place})"),
            (name, _) => text(name.clone()),
        },
    );
    if let Some(backup) = &view.backup {
        row(
            "backup",
            format!("{} {}", backup.id, output::ago(now_ms, Some(backup.facts.stopped_at_ms))),
        );
        for proof in backup.proof.iter().chain(&backup.other_proof) {
            row("proof", worker::proving::sentence(&proof.record));
        }
    }
    let up_to =
        |point: i64| format!("up to {}, {}", output::time(point), output::ago(now_ms, Some(point)));
    let (proved, unproved) = (view.recoverable_to_at_ms, view.unproved_to_at_ms);
    if unproved.is_some() || proved.is_some() {
        row("recoverable", proved.map_or_else(|| "nothing is proved".to_owned(), up_to));
    }
    if let Some(unproved) = unproved
        && proved.is_none_or(|proved| proved < unproved)
    {
        row("not proved", up_to(unproved));
    }
    if let Some(backup) = &view.backup {
        let mut time = view.recovery_time.map(recovery_phases);
        // The recovery point is told from what is proved.
        let proof = backup.proof.as_ref().and_then(|proof| proof.record.proved());
        if proof < Some(ProofLevel::L3)
            && let Some(time) = &mut time
        {
            time.push_str("; from the newest backup, which is not proved");
        }
        row(
            "recovery",
            time.unwrap_or_else(|| "not measured: no proof restored it yet".to_owned()),
        );
    }
    let promised = [("RPO", view.rpo_objective_ms), ("RTO", view.rto_objective_ms)];
    let promised = promised.into_iter().filter_map(|(name, ms)| Some((name, ms?)));
    let promised = promised.map(|(name, ms)| format!("{name} {}", policy::words::span(ms)));
    let promised: Vec<String> = promised.collect();
    if !promised.is_empty() {
        row("objectives", promised.join(", "));
    }
    if let Some(setup) = &view.archive {
        let said = archiving::said(&view.name, setup, Seen::of(view.wal.as_ref(), behind), now_ms);
        row("archiving", [said.what, said.cure].join(". ").trim_end_matches(['.', ' ']).to_owned());
    }
    if let Some(setup) = &view.heartbeats {
        row("heartbeat", heartbeats(setup, view.heartbeat_at_ms));
    }
    if let Some(wal) = &view.wal {
        row("wal", archive(wal));
    }
    for job in &view.open_jobs {
        row("open job", format!("{} {} {}", job.id, job.kind, job.state));
    }
    lines.join("\n")
}

/// How long a recovery would take; `> 40 s` where a part of it was not measured.
fn recovery_time(time: RecoveryTime) -> String {
    match time.total_ms() {
        Some(total_ms) => milliseconds(total_ms),
        None => format!("> {}", milliseconds(time.at_least_ms())),
    }
}

/// A sentence for a plan: what the cluster's newest backup and the WAL since would take, not exactly what is planned.
pub(crate) fn time_of_recovery(view: &ClusterView) -> String {
    let name = &view.name;
    match view.recovery_time {
        Some(time) => {
            format!("To recover {name} to its newest moment takes {}.", recovery_phases(time))
        }
        None => format!("How long it takes was not measured: no proof restored {name} yet."),
    }
}

fn recovery_phases(time: RecoveryTime) -> String {
    let (size, restore) = (output::bytes(time.size_bytes), milliseconds(time.restore_ms));
    let start = milliseconds(time.start_ms);
    let files = format!("restore of {size} {restore}, start {start}");
    let wal = match (time.wal_bytes, time.replay_ms) {
        (0, _) => String::new(),
        (bytes, Some(ms)) => {
            format!(", {} of archived WAL {}", output::bytes(bytes), milliseconds(ms))
        }
        (bytes, None) => {
            format!(
                ", and {} of archived WAL, which pgmuster verify --to latest would measure",
                output::bytes(bytes)
            )
        }
    };
    format!("{}: {files}{wal}", recovery_time(time))
}

fn milliseconds(ms: u64) -> String {
    output::duration(i64::try_from(ms).unwrap_or(i64::MAX))
}

fn heartbeats(setup: &HeartbeatSetup, last_at_ms: Option<i64>) -> String {
    let last =
        last_at_ms.map_or("none yet".to_owned(), |at_ms| format!("last {}", output::time(at_ms)));
    match &setup.problem {
        None => format!("every {} s, {last}", setup.every_s),
        Some(problem) => {
            let cured = [problem.to_string(), problem.hint.clone()].join(". ");
            format!("not made: {} ({last})", cured.trim_end_matches(['.', ' ']))
        }
    }
}

fn archive(wal: &WalStanding) -> String {
    let archived = format!(
        "archived from {} to {} on timeline {}, the server is at {}",
        wal.line_from, wal.archived_to, wal.timeline, wal.server_lsn
    );
    let waiting = wal.waiting.map(|w| format!("{} missing from {} on", w.segments, w.segment));
    let gap = wal.gap.map(|gap| format!("{gap} is missing before"));
    let conflict = wal.conflict.map(|c| format!("another server wrote {} too", c.segment));
    let parts: Vec<String> =
        [Some(archived), waiting, gap, conflict].into_iter().flatten().collect();
    parts.join("; ")
}
