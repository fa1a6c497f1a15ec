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
    output::show(format, &status, |status| {
        let counted: Vec<String> =
            status.states.iter().map(|row| format!("{} {}", row.clusters, row.state)).collect();
        let mut text = status.sentence.clone();
        if !status.clusters.is_empty() {
            text.push_str(&format!("\n{}\n\n", counted.join(" · ")));
            text.push_str(&cluster::table(&status.clusters, status.at_ms));
        }
        text
    });
    let findings = status.clusters.iter().any(|cluster| cluster.state.is_finding());
    Ok(if findings { Exit::Findings } else { Exit::Ok })
}
