//! `backups list` and `backups show`.

use coordinator::api::types::BackupView;
use proto::near::did_you_mean;
use proto::{Action, Code, Failure};

use crate::args::{BackupsCommand, Output};
use crate::client::Client;
use crate::exit::Exit;
use crate::{environment, output};

/// `backups …`.
pub(crate) async fn run(
    client: &Client,
    command: BackupsCommand,
    format: Output,
) -> Result<Exit, Failure> {
    match command {
        BackupsCommand::List { cluster } => {
            let query =
                cluster.as_ref().map_or(String::new(), |cluster| format!("?cluster={cluster}"));
            let backups: Vec<BackupView> = client.get(&format!("/v1/backups{query}")).await?;
            if let Some(cluster) = cluster.filter(|_| backups.is_empty()) {
                super::cluster::known(client, &cluster).await?;
            }
            output::show(format, &backups, |rows| table(rows));
        }
        BackupsCommand::Show { backup } => {
            let backups: Vec<BackupView> = client.get("/v1/backups?limit=1000").await?;
            let ids: Vec<String> = backups.iter().map(|view| view.id.to_string()).collect();
            let found = backups.into_iter().find(|view| view.id == backup).ok_or_else(|| {
                let meant = did_you_mean(&backup.to_string(), ids.iter().map(String::as_str));
                let message = format!("the catalog knows no backup {backup}{meant}");
                Failure::new(Code::BackupUnknown, Action::FixConfig, message)
                    .with_hint("pgmuster backups list shows the newest; pgmuster repo list asks the repository itself.")
            })?;
            output::show(format, &found, details);
        }
    }
    Ok(Exit::Ok)
}

fn table(backups: &[BackupView]) -> String {
    let now_ms = environment::now_ms();
    let rows = backups.iter().map(|backup| {
        let proof = backup.proof.as_ref().map(|proof| &proof.record);
        vec![
            backup.id.to_string(),
            backup.cluster.to_string(),
            backup.facts.kind().to_string(),
            output::ago(now_ms, Some(backup.facts.stopped_at_ms)),
            output::bytes(backup.facts.size_bytes),
            output::bytes(backup.facts.stored_bytes),
            match (backup.gone_at_ms, proof) {
                (Some(at_ms), _) => format!("gone {}", output::ago(now_ms, Some(at_ms))),
                (None, None) => "-".to_owned(),
                (None, Some(proof)) => {
                    let level =
                        proof.level_reached.map_or("none".to_owned(), |level| level.to_string());
                    let verdict = if proof.passed { "passed" } else { "FAILED" };
                    format!("{level} {verdict} {}", output::ago(now_ms, Some(proof.at_ms)))
                }
            },
        ]
    });
    output::table(
        &["BACKUP", "CLUSTER", "KIND", "TAKEN", "SIZE", "STORED", "PROOF"],
        rows.collect(),
    )
}

fn details(backup: &BackupView) -> String {
    let facts = &backup.facts;
    let mut lines = vec![
        format!("{} backup {} of {}", facts.kind(), backup.id, backup.cluster),
        format!("  repository   {}", facts.repository),
        format!(
            "  positions    {} to {} on timeline {}",
            facts.start_lsn, facts.stop_lsn, facts.timeline
        ),
        format!("  files        {}", facts.files),
        format!("  size         {}", output::bytes(facts.size_bytes)),
        format!("  read         {}", output::bytes(facts.read_bytes)),
        format!("  stored       {}", output::bytes(facts.stored_bytes)),
        format!("  WAL          {}", output::bytes(facts.wal_bytes)),
        format!("  bad pages    {}", facts.bad_pages),
        format!("  taken by     {} (job {})", backup.worker, backup.job),
    ];
    if facts.taken_over_bytes > 0 {
        let taken_over = output::bytes(facts.taken_over_bytes);
        lines.push(format!("  taken over   {taken_over} from an interrupted backup"));
    }
    if let Some(by_ms) = facts.reread_by_ms {
        let (reread, by) = (output::bytes(facts.reread_bytes), output::time(by_ms));
        lines.push(format!(
            "  read again   {reread} that nothing said had changed; all that was taken over unread will be by {by}"
        ));
    }
    if let Some(at_ms) = backup.gone_at_ms {
        let since = output::ago(environment::now_ms(), Some(at_ms));
        lines.insert(
            1,
            format!(
                "  gone         seen {since}: the repository has it no more, or somebody gave it up"
            ),
        );
    }
    if let Some(how) = &facts.changed_files {
        lines.push(format!("  changed      files {how}"));
    }
    if let Some(logical) = &facts.logical {
        let (major, minor) =
            (logical.client_version_num / 10_000, logical.client_version_num % 10_000);
        lines.push(format!("  databases    {}, by pg_dump {major}.{minor}", logical.databases));
        if let Some(left_out) = logical.left_out.filter(|left_out| *left_out > 0) {
            let others = output::count(left_out, "other database");
            lines.push(format!("  left out     {others}: this is no backup of the whole cluster"));
        }
        let passwords = if logical.role_passwords { "with" } else { "without" };
        lines.push(format!("  roles        {passwords} passwords"));
        for skipped in &logical.skipped {
            lines.push(format!("  not in it    {}: {}", skipped.database, skipped.why));
        }
    }
    if let Some(proof) = &backup.proof {
        lines.push(format!("  proof        {}", worker::proving::sentence(&proof.record)));
        for check in &proof.record.checks {
            let outcome = format!("{:?}", check.outcome).to_lowercase();
            lines.push(format!(
                "    {} {:<22} {outcome}: {}",
                check.level, check.name, check.detail
            ));
        }
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    /// What is shown of a backup whose worker reported this.
    fn shown(outcome: &str) -> String {
        let outcome: Value = serde_json::from_str(outcome).unwrap();
        let view = json!({
            "id": outcome["backup"]["backup"], "cluster": "orders", "job": "018bcfe5-6800-7101-8101-010101010101",
            "worker": "w1", "facts": outcome["backup"], "proof": null,
        });
        details(&serde_json::from_value(view).unwrap())
    }

    #[test]
    fn what_was_read_again_is_shown_and_by_when_all_will_have_been() {
        let text = shown(include_str!("../../../proto/tests/golden/outcome.backup.reread.json"));
        let line = "  read again   302.7 KiB that nothing said had changed; all that was taken over unread will be by \
                    1970-01-31T00:00:00Z";
        assert!(text.lines().any(|shown| shown == line), "{text}");
        let text = shown(include_str!("../../../proto/tests/golden/outcome.backup.json"));
        assert!(!text.contains("read again"), "{text}");
    }
}
