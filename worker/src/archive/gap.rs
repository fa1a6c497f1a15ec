//! Whether a file that the archive does not have is missing, or its log just ends before it.
//!
//! A server takes "there is no such file" for the end of its log and goes into service with what it has, so this looks for
//! whatever shows that there was more: later segments, and the histories of the timelines that came after.

use std::path::{Path, PathBuf};

use postgres::wal::{is_whole, read_history};
use proto::wal::{History, SegmentName};
use proto::{Action, Code, Failure, Timeline, WalFileName};
use repository::{Identity, Repository, WalAbsence};

use super::{Server, verify};
use crate::context::blocking;

/// A question of a server.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked<'a> {
    pub(super) repository: &'a Repository,
    pub(super) identity: &'a Identity,
    pub(super) file: &'a WalFileName,
    /// Where the server wants it.
    pub(super) to: &'a Path,
    pub(super) server: Option<Server>,
}

impl Asked<'_> {
    /// What shows that a file is missing that the archive did not have a moment ago. `None` when it is certain that the log
    /// ends before it; also when the server has the file itself, as a backup brings its WAL along: it looks into its own
    /// `pg_wal` when it hears that there is none.
    pub(super) async fn why_missing(&self) -> Result<Option<Failure>, Failure> {
        match *self.file {
            WalFileName::Segment(name) => self.segment_is_missing(name).await,
            WalFileName::History(timeline) => self.history_is_missing(timeline).await,
            WalFileName::Partial(_) | WalFileName::BackupLabel(..) => Ok(None),
        }
    }

    async fn segment_is_missing(&self, name: SegmentName) -> Result<Option<Failure>, Failure> {
        let (repository, lineage) = (self.repository, self.identity.lineage);
        let absence = repository.wal_absence(lineage, name).await?;
        let shown = match absence {
            WalAbsence::Collected { below } => {
                format!("where `repo gc` deleted the WAL before {below}, which no backup needed")
            }
            WalAbsence::Gap => "which has later segments of this timeline".to_owned(),
            WalAbsence::End => {
                // A promoted standby had replayed the old timeline up to the position where it left it, whoever archived
                // that.
                let histories = repository.wal_histories_after(lineage, name.timeline).await?;
                let Some(size) = self.segment_size().await? else { return Ok(None) };
                let Some(segment) = name.segment(size) else { return Ok(None) };
                let end = segment.end(size);
                let shows = |one: &&History| one.shows(name.timeline, end);
                let Some(history) = histories.iter().find(shows) else { return Ok(None) };
                format!(
                    "whose history of timeline {} shows that timeline {} went on behind it",
                    history.timeline, name.timeline
                )
            }
        };
        if self.has_own_segment(name).await? {
            return Ok(None);
        }
        if let WalAbsence::Collected { .. } = absence {
            return Ok(Some(self.failure(&shown).with_hint(
                "This data directory is older than every backup that is left, and the archive leads nowhere from it. Restore a \
                 backup of `pgmuster repo list URL --key FILE` and recover from there; a standby is made anew.",
            )));
        }
        Ok(Some(self.failure(&shown).with_hint(
            "`pgmuster recovery windows URL --key FILE` shows what can be recovered. Archive the segment with `pgmuster wal push` if a server \
             still has it in pg_wal, the one that wrote it or one that followed it; else recover to a position before it.",
        )))
    }

    /// A timeline whose files are there has a history that a server has to see, or it would never come there. Not the first,
    /// which has none, and not those that the server has reached without it.
    async fn history_is_missing(&self, timeline: Timeline) -> Result<Option<Failure>, Failure> {
        let reached = self.server.map_or(Timeline(1), |server| server.timeline);
        if timeline <= reached {
            return Ok(None);
        }
        let (repository, lineage) = (self.repository, self.identity.lineage);
        let shown = if repository.has_wal_of(lineage, timeline).await? {
            "which has other files of this timeline".to_owned()
        } else {
            // Servers give the numbers of timelines one after the other.
            let histories = repository.wal_histories_after(lineage, timeline).await?;
            let Some(later) = histories.first() else { return Ok(None) };
            format!("which has the history of timeline {}", later.timeline)
        };
        let directory = self.directory();
        if blocking(move || Ok(read_history(&directory, timeline)?.is_some())).await? {
            return Ok(None);
        }
        Ok(Some(self.failure(&shown).with_hint(
            "A server that does not see it never recovers to that timeline. Archive it with `pgmuster wal push` if a server still \
             has it in pg_wal, or put it into pg_wal of the one that recovers.",
        )))
    }

    fn failure(&self, shown: &str) -> Failure {
        let Self { file, identity, .. } = self;
        let what = format!("{file} is missing in the archive of {}, {shown}", identity.cluster);
        Failure::new(Code::WalMissing, Action::FixData, what)
    }

    async fn has_own_segment(&self, name: SegmentName) -> Result<bool, Failure> {
        let own = self.to.with_file_name(self.file.to_string());
        let system_identifier = self.identity.system_identifier;
        blocking(move || {
            let Ok(content) = std::fs::read(own) else { return Ok(false) };
            let start = u32::try_from(content.len())
                .ok()
                .and_then(|size| Some((name.segment(size)?, size)));
            Ok(verify(name, &content, system_identifier, None).is_ok()
                && start.is_some_and(|(segment, size)| is_whole(&content, segment.start(size))))
        })
        .await
    }

    /// Bytes of a segment, as the server says, else the archive; `None` when nobody has a segment.
    async fn segment_size(&self) -> Result<Option<u32>, Failure> {
        if let Some(server) = self.server {
            return Ok(Some(server.segment_size));
        }
        let inventory = self.repository.list_wal(self.identity.lineage).await?;
        let mut sizes = inventory.timelines.values().map(|wal| wal.segment_size);
        Ok(sizes.find(|size| *size > 0))
    }

    /// The server's `pg_wal`.
    pub(super) fn directory(&self) -> PathBuf {
        match self.to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        }
    }
}
