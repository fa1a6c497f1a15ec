//! How a server's `archive_command` calls this program. No secret stands in it: keys are named by reference.

use std::path::PathBuf;

use proto::ClusterName;

/// What such a command names.
#[derive(Debug, Clone)]
pub struct Calling {
    /// This program, absolute.
    pub program: PathBuf,
    /// Where a service answers.
    pub socket: PathBuf,
    /// URL, `--key` or `--passphrase`, and its reference, for when none does.
    pub repository: Option<(String, String, String)>,
}

impl Calling {
    /// The `archive_command` of a cluster.
    pub fn push(&self, cluster: &ClusterName) -> String {
        let mut command = format!(
            "{} wal push \"%p\" --cluster {cluster} --socket {}",
            quoted(&self.program.display().to_string()),
            quoted(&self.socket.display().to_string())
        );
        if let Some((url, option, reference)) = &self.repository {
            let (url, reference) = (quoted(url), quoted(reference));
            command.extend([" --repository ", &url, " ", option, " ", &reference]);
        }
        command
    }
}

/// One word of a shell's, in a setting in which the server reads `%` itself.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', "'\\''").replace('%', "%%"))
}
