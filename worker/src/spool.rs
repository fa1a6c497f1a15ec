//! Reports on their way out: final ones are on disk before anything else happens and stay there until the broker has
//! confirmed them, across restarts of the worker.
//!
//! A report that arrives twice is harmless (the coordinator applies it by attempt, token and number), so the spool
//! never has to know whether an unconfirmed one arrived.

use std::io;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use proto::AttemptId;

/// The directory of undelivered final reports.
#[derive(Debug, Clone)]
pub(crate) struct Spool {
    directory: PathBuf,
}

/// A report that has to be delivered.
#[derive(Debug, Clone)]
pub(crate) struct Spooled {
    /// Names the message: the same each time it is sent.
    pub(crate) message_id: String,
    /// The signed report.
    pub(crate) body: Vec<u8>,
    /// The file to remove afterwards; absent for reports that are only in memory.
    pub(crate) file: Option<PathBuf>,
    /// Whether it is sent until the broker confirms it.
    pub(crate) must_arrive: bool,
}

impl Spool {
    /// Opens the spool below a worker's state directory.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let directory = state_dir.join("reports");
        std::fs::create_dir_all(&directory)?;
        Ok(Self { directory })
    }

    /// Puts a final report on disk. Returns when it is durable.
    pub(crate) fn keep(&self, attempt: AttemptId, seq: u64, body: Vec<u8>) -> io::Result<Spooled> {
        let message_id = format!("{attempt}.{seq}");
        let file = self.directory.join(format!("{message_id}.json"));
        let mut temporary = tempfile::NamedTempFile::new_in(&self.directory)?;
        temporary.write_all(&body)?;
        temporary.as_file().sync_all()?;
        temporary.persist(&file).map_err(|error| error.error)?;
        std::fs::File::open(&self.directory)?.sync_all()?;
        Ok(Spooled { message_id, body, file: Some(file), must_arrive: true })
    }

    /// What an earlier life of the worker could not deliver, oldest first.
    pub(crate) fn undelivered(&self) -> io::Result<Vec<Spooled>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            let file = entry?.path();
            let Some(message_id) =
                file.file_name().and_then(|name| name.to_str()?.strip_suffix(".json"))
            else {
                continue;
            };
            let message_id = message_id.to_owned();
            let body = std::fs::read(&file)?;
            found.push(Spooled { message_id, body, file: Some(file), must_arrive: true });
        }
        found.sort_by(|a, b| a.message_id.cmp(&b.message_id));
        Ok(found)
    }

    /// Forgets a delivered report.
    pub(crate) fn delivered(report: &Spooled) -> io::Result<()> {
        match &report.file {
            None => Ok(()),
            Some(file) => match std::fs::remove_file(file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                other => other,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_final_report_survives_a_restart_until_it_is_delivered() {
        let state = tempfile::tempdir().unwrap();
        let attempt = AttemptId::mint(1, [7; 10]);
        let spool = Spool::open(state.path()).unwrap();
        spool.keep(attempt, 4, b"{}".to_vec()).unwrap();
        let found = Spool::open(state.path()).unwrap().undelivered().unwrap();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].body, b"{}");
        Spool::delivered(&found[0]).unwrap();
        Spool::delivered(&found[0]).unwrap();
        assert!(spool.undelivered().unwrap().is_empty());
    }
}
