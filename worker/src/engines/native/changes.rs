//! Which pages changed since the backup before, where the server can tell: then a file whose times and sizes are not what they
//! were is not read whole. What stands in the way of that is a fact of the backup and no failure: files are read whole then.

use std::ops::Range;
use std::sync::Arc;

use postgres::changed_blocks::{ChangedBlocks, FileShape};
use postgres::files::ServerFiles;
use postgres::scan::{EntryKind, ScanEntry};
use postgres::wal::{HISTORY_LIMIT_BYTES, History, history_file_name};
use postgres::wal_summaries::{Earlier, Unusable, changed_blocks};
use proto::backup::{Reading, SummariesUsed};
use proto::{Failure, Timeline};

use super::begin::Ready;
use super::kept::Kept;
use crate::context::{JobContext, blocking};
use crate::jobs::session_owner;
use crate::places::Cluster;

/// What is known of the pages that changed.
#[derive(Debug)]
pub(crate) struct PageChanges {
    known: Option<Known>,
    /// Why nothing is.
    why_not: Option<String>,
}

#[derive(Debug)]
struct Known {
    blocks: ChangedBlocks,
    summaries: SummariesUsed,
    shape: FileShape,
}

impl PageChanges {
    /// Nothing is known, for people to read why.
    pub(super) fn unknown(why: impl Into<String>) -> Self {
        Self { known: None, why_not: Some(why.into()) }
    }

    /// Asks a server in backup mode, and looks after the backup meanwhile.
    pub(super) async fn ask(
        cx: &JobContext,
        cluster: &Cluster,
        ready: &Ready,
        kept: Kept<'_>,
        earlier: Earlier,
    ) -> Result<Self, Failure> {
        let started = kept.session.started().clone();
        let asking = async {
            let history = history(&ready.files, started.timeline, earlier.timeline()).await?;
            let job = session_owner(cx.spec.attempt);
            changed_blocks(&cluster.target, &job, &started, &earlier, &history).await
        };
        let watched = kept.beside(|| (), async { Ok(Box::pin(asking).await) });
        let asked = tokio::select! {
            biased;
            () = cx.cancel.cancelled() => return Err(cx.stopped()),
            asked = watched => asked?,
        };
        match asked {
            Ok((blocks, summaries)) => {
                let (block_size, segment) =
                    (ready.server.block_size, ready.server.relation_segment_size);
                let segment_blocks = segment / u64::from(block_size.max(1));
                let shape = FileShape {
                    block_size,
                    segment_blocks: u32::try_from(segment_blocks).unwrap_or(u32::MAX),
                };
                let known = Known { blocks, summaries, shape };
                Ok(Self { known: Some(known), why_not: None })
            }
            Err(Unusable::Off) => Ok(Self::unknown(Unusable::Off.to_string())),
            Err(why) => {
                tracing::warn!(
                    cluster.name = %cx.spec.cluster,
                    "Files that changed are read whole, which costs time and no more: {why}"
                );
                Ok(Self::unknown(why.to_string()))
            }
        }
    }

    /// How many summaries there were.
    pub(super) fn summaries(&self) -> u64 {
        self.known.as_ref().map_or(0, |known| known.summaries.count)
    }

    /// What is to be remembered of how files were read.
    pub(super) fn reading(
        &self,
        server_started_at_ms: i64,
        progress: &repository::Progress,
    ) -> Reading {
        let done = progress.snapshot();
        Reading {
            server_started_at_ms,
            read_bytes: done.bytes_read,
            unread_bytes: done.bytes_skipped,
            summaries: self.known.as_ref().map(|known| known.summaries.clone()),
            whole_files: self.why_not.clone(),
            silent_changes: progress.silent_changes(),
        }
    }

    /// Where a file may differ from what the backup before has, if that is known.
    pub(super) fn of(&self, entry: &ScanEntry) -> Option<Vec<Range<u64>>> {
        let EntryKind::Relation(file) = entry.kind else { return None };
        let known = self.known.as_ref()?;
        known.blocks.in_file(&entry.path, file, entry.size, known.shape)
    }
}

/// The history of a server's timeline, which nobody needs who stays on it.
async fn history(
    files: &Arc<dyn ServerFiles>,
    timeline: Timeline,
    before: Timeline,
) -> Result<History, Unusable> {
    let alone = History { timeline, entries: Vec::new() };
    if timeline == before {
        return Ok(alone);
    }
    let files = Arc::clone(files);
    let name = history_file_name(timeline);
    let read = blocking(move || {
        let path = std::path::Path::new("pg_wal").join(name);
        let read = files.read(&path, HISTORY_LIMIT_BYTES);
        Ok(read.map_err(|source| files.unreadable(&path, source))?)
    });
    let text = read.await.ok().flatten().and_then(|bytes| String::from_utf8(bytes).ok());
    let history = text.and_then(|text| History::parse(timeline, &text).ok());
    history.ok_or(Unusable::Unfit("the history of the server's timeline could not be read"))
}
