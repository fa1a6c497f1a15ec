//! `status`: which clusters can be recovered, and which cannot, and why.

use coordinator::api::types::{NobodyMay, StatusView};
use proto::Failure;

use crate::args::Output;
use crate::client::Client;
use crate::commands::cluster;
use crate::exit::Exit;
use crate::output;

/// `status`.
pub(crate) async fn run(client: &Client, format: Output) -> Result<Exit, Failure> {
    let status: StatusView = client.get("/v1/status").await?;
    for warning in &status.warnings {
        output::talk(&format!("warning: {warning}"));
    }
    output::show(format, &status, |status| {
        let counted: Vec<String> =
            status.states.iter().map(|row| format!("{} {}", row.clusters, row.state)).collect();
        if status.clusters.is_empty() {
            return status.sentence.clone();
        }
        let table = cluster::table(&status.clusters, status.at_ms);
        let stuck: String = status.nobody_may.iter().map(stuck).collect();
        format!("{}\n{}\n\n{table}{stuck}", status.sentence, counted.join(" · "))
    });
    let findings = status.clusters.iter().any(|cluster| cluster.state.is_finding());
    Ok(if findings { Exit::Findings } else { Exit::Ok })
}

/// Jobs from which nothing will come, and what to do about them.
fn stuck(waiting: &NobodyMay) -> String {
    let NobodyMay { cluster, kind, jobs, reason } = waiting;
    let verb = if *jobs == 1 { "waits" } else { "wait" };
    format!(
        "\n\n{} {verb} for a worker that may do {kind} on {cluster}: {reason}.\n  Start or allow one (`kinds` of [allow] and of the cluster in a \
         worker's configuration), or cancel: pgmuster job list --cluster {cluster}",
        output::count(*jobs, "job")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jobs_that_nobody_may_do_are_told_with_what_to_do() {
        let mut waiting = NobodyMay {
            cluster: "orders".parse().unwrap(),
            kind: proto::JobKind::VerifyRestore,
            jobs: 2,
            reason: "no worker that serves orders is allowed to do verify_restore".to_owned(),
        };
        let told = stuck(&waiting);
        let sentence =
            "2 jobs wait for a worker that may do verify_restore on orders: no worker that serves";
        assert!(told.contains(sentence), "{told}");
        assert!(told.ends_with("pgmuster job list --cluster orders"), "{told}");
        waiting.jobs = 1;
        assert!(stuck(&waiting).contains("1 job waits for a worker"), "{}", stuck(&waiting));
    }
}
