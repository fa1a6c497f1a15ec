//! `status`: which clusters can be recovered, and which cannot, and why.

use coordinator::api::types::StatusView;
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
        format!("{}\n{}\n\n{table}", status.sentence, counted.join(" · "))
    });
    let findings = status.clusters.iter().any(|cluster| cluster.state.is_finding());
    Ok(if findings { Exit::Findings } else { Exit::Ok })
}
