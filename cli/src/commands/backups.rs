//! `backups …`: what the coordinator knows of backups, and wishes for one, which only its repository and key can take.

use std::collections::BTreeSet;
use std::time::Duration;

use coordinator::api::types::BackupView;
use proto::near::did_you_mean;
use proto::proof::{CheckOutcome, PITR};
use proto::{Action, BackupId, ClusterName, Code, Failure, Proof, ProofLevel};

use crate::args::{BackupAt, BackupRef, BackupsCommand, Output};
use crate::backup_ref::Known;
use crate::client::Client;
use crate::commands::repo::{self, Deed, Named};
use crate::exit::Exit;
use crate::opener::Opener;
use crate::{environment, hints, output};

/// `backups …`.
pub(crate) async fn run(
    client: impl Fn() -> Result<Client, Failure>,
    command: BackupsCommand,
    format: Output,
) -> Result<Exit, Failure> {
    match command {
        BackupsCommand::List { cluster } => {
            let client = &client()?;
            let query =
                cluster.as_ref().map_or(String::new(), |cluster| format!("?cluster={cluster}"));
            let backups: Vec<BackupView> = client.get(&format!("/v1/backups{query}")).await?;
            if let Some(cluster) = cluster.filter(|_| backups.is_empty()) {
                super::cluster::known(client, &cluster).await?;
            }
            output::show(format, &backups, |rows| table(rows));
        }
        BackupsCommand::Show { backup } => {
            output::show(format, &find(&client()?, None, &backup).await?, details);
        }
        BackupsCommand::Delete { at, why, damaged } => {
            wish(client, at, Deed::Delete { damaged }, why).await?;
        }
        BackupsCommand::Undelete { at, why } => wish(client, at, Deed::Undelete, why).await?,
        BackupsCommand::Hold { at, why } => wish(client, at, Deed::Hold, why).await?,
        BackupsCommand::Release { at } => wish(client, at, Deed::Release, String::new()).await?,
    }
    Ok(Exit::Ok)
}

/// Backups of a cluster, or of all, that the coordinator is asked for at once.
const LISTED_MAX: usize = 1000;

/// The backup that is meant by what was typed, as the coordinator knows it.
async fn find(
    client: &Client,
    cluster: Option<&ClusterName>,
    typed: &BackupRef,
) -> Result<BackupView, Failure> {
    let of = cluster.map_or_else(String::new, |cluster| format!("&cluster={cluster}"));
    let backups: Vec<BackupView> =
        client.get(&format!("/v1/backups?limit={LISTED_MAX}{of}")).await?;
    let known: Vec<Known> = backups.iter().map(known).collect();
    let of = cluster.map(|cluster| format!("{cluster}, as the catalog knows it,"));
    let place = of.as_deref().unwrap_or("the catalog");
    let backup = typed.among(&known, place);
    let backup = backup.map_err(|failure| elsewhere_too(failure, &backups))?;
    let ids: Vec<String> = backups.iter().map(|view| view.id.to_string()).collect();
    let found = backups.iter().find(|view| view.id == backup).cloned();
    found.ok_or_else(|| {
        let meant = did_you_mean(&backup.to_string(), ids.iter().map(String::as_str));
        let message = format!("{place} has no backup {backup}{meant}");
        elsewhere_too(Failure::new(Code::BackupUnknown, Action::FixConfig, message), &backups)
    })
}

/// The id of the backup of a cluster that is meant. Whether there is one that is named by its whole id says who is asked to use it.
pub(crate) async fn meant(
    client: &Client,
    cluster: &ClusterName,
    typed: &BackupRef,
) -> Result<BackupId, Failure> {
    match typed {
        BackupRef::Id(id) => Ok(*id),
        _ => find(client, Some(cluster), typed).await.map(|view| view.id),
    }
}

fn known(view: &BackupView) -> Known {
    Known {
        id: view.id,
        cluster: view.cluster.clone(),
        at_ms: Some(view.facts.stopped_at_ms),
        is_wanted: view.gone_at_ms.is_none(),
        is_proved: view.proof.as_ref().is_some_and(|proof| is_proved(&proof.record)),
    }
}

/// As a repository judges which backup is the newest proved one: it was booted, and nothing that was checked was wrong.
fn is_proved(proof: &Proof) -> bool {
    let failed = proof.checks.iter().any(|check| check.outcome == CheckOutcome::Failed);
    !failed && proof.level_reached >= Some(ProofLevel::L3)
}

/// What the coordinator does not know, its repository may.
fn elsewhere_too(failure: Failure, backups: &[BackupView]) -> Failure {
    if failure.code != Code::BackupUnknown {
        return failure;
    }
    let places: BTreeSet<&str> =
        backups.iter().map(|view| view.facts.repository.as_str()).collect();
    let place = match Vec::from_iter(places).as_slice() {
        [one] => hints::quoted(one),
        _ => "URL".to_owned(),
    };
    failure.with_hint(format!(
        "`pgmuster backups list` shows the newest; `pgmuster repo list {place} --key FILE` asks the repository itself."
    ))
}

/// Writes a wish beside a backup, as `repo` does.
async fn wish(
    client: impl Fn() -> Result<Client, Failure>,
    at: BackupAt,
    deed: Deed,
    why: String,
) -> Result<(), Failure> {
    let BackupAt { backup, repository, opener } = at;
    match (repository, Opener::read_if_any(&opener)?) {
        (Some(url), Some(opener)) => {
            let repository = Named { url, opener }.open().await?;
            repo::wish(&repository, &backup, deed, why).await
        }
        _ => Err(elsewhere(client, &backup, deed).await),
    }
}

/// What is said where the repository was not: where the backup is, and what to type.
async fn elsewhere(
    client: impl Fn() -> Result<Client, Failure>,
    backup: &BackupRef,
    deed: Deed,
) -> Failure {
    let verb = deed.verb();
    let type_this = |backup: &str, repository: &str| {
        format!("pgmuster backups {verb} {backup} --repository {repository} --key FILE")
    };
    let found = async { find(&client()?, None, backup).await };
    match found.await {
        Ok(BackupView { id, cluster, facts, .. }) => {
            let repository = &facts.repository;
            let what = format!(
                "backup {id} of {cluster} is in {repository}, and the coordinator has no key to it"
            );
            // An URL may have characters that mean something to a shell.
            let typed = type_this(&id.to_string(), &format!("'{repository}'"));
            Failure::new(Code::RequestInvalid, Action::FixConfig, what)
                .with_hint(format!("Type `{typed}`."))
        }
        Err(failure) => {
            let id = match backup {
                BackupRef::Id(id) => id.to_string(),
                _ => "BACKUP".to_owned(),
            };
            let hint = format!(
                "{} Whoever has the repository and its key needs no coordinator: `{}`.",
                failure.hint,
                type_this(&id, "URL")
            );
            failure.with_hint(hint)
        }
    }
}

fn table(backups: &[BackupView]) -> String {
    let now_ms = environment::now_ms();
    let rows = backups.iter().map(|backup| {
        vec![
            backup.id.to_string(),
            backup.cluster.to_string(),
            backup.facts.kind().to_string(),
            output::ago(now_ms, Some(backup.facts.stopped_at_ms)),
            output::bytes(backup.facts.size_bytes),
            output::bytes(backup.facts.stored_bytes),
            match backup.gone_at_ms {
                Some(at_ms) => format!("gone {}", output::ago(now_ms, Some(at_ms))),
                None => proved(backup, now_ms),
            },
        ]
    });
    output::table(
        &["BACKUP", "CLUSTER", "KIND", "TAKEN", "SIZE", "STORED", "PROOF"],
        rows.collect(),
    )
}

/// What its proofs show, in a few words: of the backup alone, and of archived WAL behind it.
pub(crate) fn proved(backup: &BackupView, now_ms: i64) -> String {
    let Some(proof) = backup.proof.as_ref().map(|proof| &proof.record) else {
        return "-".to_owned();
    };
    let other = backup.other_proof.as_ref().map(|proof| &proof.record);
    let replayed = |proof: &&Proof| proof.recovery.is_some();
    let along = Some(proof).filter(replayed).or(other.filter(replayed));
    let told = Some(proof).into_iter().chain(other).find(|proof| proof.recovery.is_none());
    let told = told.unwrap_or(proof);
    let ago = |proof: &Proof| output::ago(now_ms, Some(proof.at_ms));
    let level = told.level().map_or("none".to_owned(), |level| level.to_string());
    let verdict = if told.speaks_against() { "FAILED" } else { "passed" };
    match along {
        Some(along) if along.recovery == told.recovery => {
            format!("{level}{PITR} {verdict} {}", ago(told))
        }
        Some(along) => format!("{level} {verdict} {}, {PITR} {}", ago(told), ago(along)),
        None => format!("{level} {verdict} {}", ago(told)),
    }
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
    if let Some(changes) = &facts.silent_changes {
        let units = output::count(changes.units, "unit");
        lines.push(format!(
            "  silent       {units} had changed though times and sizes of the files had not (SILENT_CHANGE), in {}",
            changes.names()
        ));
    }
    if let Some(forbidden) = &facts.forbidden {
        let (who, cure) = (forbidden.sentence(), forbidden.cure());
        lines.push(format!("  not counted  {who}, so no proof compares these: {cure}"));
    }
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
        for failed in &logical.failed {
            let name = &failed.database;
            lines.push(format!("  not in it    {name}, which could not be dumped: {}", failed.why));
        }
        for skipped in &logical.skipped {
            lines.push(format!("  not in it    {}: {}", skipped.database, skipped.why));
        }
    }
    for copy in &backup.copies {
        let (copied, checked) = (output::time(copy.copied_at_ms), output::time(copy.checked_at_ms));
        lines.push(format!("  copy         {}, repository {}", copy.place, copy.repository));
        lines.push(format!("    copied at {copied}, all of it there at {checked}, by {}", copy.by));
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
        for asked in proof.record.assertions.iter().flatten() {
            let outcome = match asked.outcome {
                CheckOutcome::Passed => "passed",
                CheckOutcome::Failed => "failed",
                CheckOutcome::Skipped => "could not be asked",
            };
            lines.push(format!(
                "    L6 {:<22} {outcome}: {} in {}, after {:.2} s",
                asked.name,
                asked.answer,
                asked.database,
                Duration::from_millis(asked.duration_ms).as_secs_f64()
            ));
        }
    }
    if let Some(other) = &backup.other_proof {
        lines.push(format!("  proof        {}", worker::proving::sentence(&other.record)));
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use proto::backup::SilentChanges;
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

    #[test]
    fn what_no_time_had_told_is_shown_with_its_files() {
        let silent = include_str!("../../../proto/tests/golden/outcome.backup.silent_changes.json");
        let text = shown(silent);
        let line = "  silent       3 units had changed though times and sizes of the files had not (SILENT_CHANGE), in \
                    base/5/16384, base/5/2619";
        assert!(text.lines().any(|shown| shown == line), "{text}");

        let files: Vec<String> =
            (0..SilentChanges::FILES_NAMED_MAX).map(|n| format!("base/5/{n}")).collect();
        let mut many: Value = serde_json::from_str(silent).unwrap();
        many["backup"]["silent_changes"]["files"] = json!(files);
        let text = shown(&many.to_string());
        assert!(text.ends_with("base/5/14, base/5/15 and perhaps others"), "{text}");
    }

    #[test]
    fn a_proof_that_replayed_wal_is_shown_beside_the_one_that_went_further() {
        let outcome: Value =
            serde_json::from_str(include_str!("../../../proto/tests/golden/outcome.backup.json"))
                .unwrap();
        let job = "018bcfe5-6800-7101-8101-010101010101";
        let view = |proof: &Value, other: &Value| -> BackupView {
            let view = json!({
                "id": outcome["backup"]["backup"], "cluster": "orders", "job": job, "worker": "w1", "facts": outcome["backup"],
                "proof": proof, "other_proof": other,
            });
            serde_json::from_value(view).unwrap()
        };
        let record = include_str!("../../../proto/tests/golden/proof.json");
        let alone: Value = serde_json::from_str(record).unwrap();
        let mut along = alone.clone();
        (along["level_asked"], along["level_reached"]) = (json!("L4"), json!("L4"));
        along["at_ms"] = json!(1_700_000_100_000_i64 + 3_600_000);
        along["recovery"] = json!({
            "target": "the end of the WAL", "timeline": 1, "reached_lsn": "0/3000200", "evidence": "", "replayed_bytes": 1,
        });
        let [alone, along] = [alone, along].map(|record| json!({"job": job, "record": record}));
        let now_ms = 1_700_000_100_000 + 7_200_000;
        let both = "L5 passed 2h00m ago, +PITR 1h00m ago";
        assert_eq!(proved(&view(&alone, &along), now_ms), both);
        assert_eq!(proved(&view(&along, &alone), now_ms), both);
        let one = |proof| proved(&view(proof, &Value::Null), now_ms);
        assert_eq!(one(&alone), "L5 passed 2h00m ago");
        assert_eq!(one(&along), "L4+PITR passed 1h00m ago");
        let text = details(&view(&along, &alone));
        assert!(text.contains("PROVED (L5): ") && text.contains("PROVED (L4+PITR): "), "{text}");
    }

    #[test]
    fn copies_are_shown_with_their_places_and_how_old_the_word_of_them_is() {
        let outcome: Value =
            serde_json::from_str(include_str!("../../../proto/tests/golden/outcome.backup.json"))
                .unwrap();
        let copy = json!({
            "place": "s3://second/prefix?region=eu-north-1", "repository": "018bcfe5-6800-7101-8101-020202020202",
            "by": "ops@desk", "copied_at_ms": 0, "checked_at_ms": 86_400_000, "told_by": "s3://first/prefix",
        });
        let view = json!({
            "id": outcome["backup"]["backup"], "cluster": "orders", "job": "018bcfe5-6800-7101-8101-010101010101",
            "worker": "w1", "facts": outcome["backup"], "proof": null, "copies": [copy],
        });
        let text = details(&serde_json::from_value(view).unwrap());
        let said = "  copy         s3://second/prefix?region=eu-north-1, repository \
                    018bcfe5-6800-7101-8101-020202020202\n    copied at 1970-01-01T00:00:00Z, all of it there at \
                    1970-01-02T00:00:00Z, by ops@desk";
        assert!(text.contains(said), "{text}");
    }
}
