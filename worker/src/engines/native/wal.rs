//! The WAL of a backup: stored segment by segment while the files are copied, so that the server may let go of it.
//!
//! From the segment of the start position to the one of the stop position, no gap, on one timeline. Each segment is read
//! once: the same bytes go to the repository and to the census.

use std::path::Path;
use std::sync::Arc;

use bytes::{Buf as _, Bytes};
use postgres::files::ServerFiles;
use postgres::wal::{HISTORY_LIMIT_BYTES, Segment, WalOrigin, history_file_name};
use postgres::wal_changes::WalChanges;
use proto::{Action, Code, Failure, Lsn, Timeline};
use repository::WalWriter;

use crate::context::blocking;

/// Collects the WAL of one backup.
pub(crate) struct WalCollector {
    files: Arc<dyn ServerFiles>,
    origin: WalOrigin,
    next: Segment,
    writer: WalWriter,
    changes: Option<WalChanges>,
    bytes: u64,
    /// What follows is not the log's.
    end: Option<Lsn>,
}

impl WalCollector {
    /// Begins with the segment that holds `start`.
    pub(crate) fn new(
        files: Arc<dyn ServerFiles>,
        origin: WalOrigin,
        timeline: Timeline,
        start: Lsn,
        writer: WalWriter,
        changes: WalChanges,
    ) -> Self {
        let next = Segment::containing(start, timeline, origin.segment_size);
        Self { files, origin, next, writer, changes: Some(changes), bytes: 0, end: None }
    }

    /// Stores the next segment if it is complete at `written`, a position the server has flushed. `false` when it is not.
    pub(crate) async fn store_one(&mut self, written: Lsn) -> Result<bool, Failure> {
        if self.next.end(self.origin.segment_size) > written {
            return Ok(false);
        }
        self.store_next().await?;
        Ok(true)
    }

    /// Everything before this position is stored.
    pub(crate) fn stored_until(&self) -> Lsn {
        self.next.start(self.origin.segment_size)
    }

    /// Stores the next segment of those up to the one that holds the byte before `stop`. `false` when all are stored.
    pub(crate) async fn store_one_through(&mut self, stop: Lsn) -> Result<bool, Failure> {
        let last = Segment::ending_at(stop, self.next.timeline, self.origin.segment_size);
        if self.next.number > last.number {
            return Ok(false);
        }
        self.store_next().await?;
        Ok(true)
    }

    /// The log ends at `end`, in the middle of a segment that the server may still be writing: a standby cannot switch to
    /// another one. Zeroes are stored for what follows, so that replay ends there, whatever the file held before.
    pub(crate) fn end_at(&mut self, end: Lsn) {
        self.end = Some(end);
    }

    /// Stores the history of the timeline, which a restore needs to know where it came from.
    pub(crate) async fn store_history(&mut self) -> Result<(), Failure> {
        let timeline = self.next.timeline;
        if timeline.0 <= 1 {
            return Ok(());
        }
        let name = history_file_name(timeline);
        let files = Arc::clone(&self.files);
        let path = Path::new("pg_wal").join(&name);
        let read = blocking(move || {
            let read = files.read(&path, HISTORY_LIMIT_BYTES);
            read.map_err(|error| files.unreadable(&path, error).into())
        });
        // The server removes it together with the old timeline's last segment; a restore to this timeline's own positions
        // does without.
        if let Some(bytes) = read.await? {
            self.writer.add(&name, std::io::Cursor::new(bytes)).await?;
        }
        Ok(())
    }

    /// What the WAL says about tables that changed, for the census.
    pub(crate) fn changes(&self) -> Option<&WalChanges> {
        self.changes.as_ref()
    }

    /// Bytes of WAL stored, before compression.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    async fn store_next(&mut self) -> Result<(), Failure> {
        let size = self.origin.segment_size;
        let name = self.next.file_name(size);
        let bytes = self.read_next(name.clone()).await?;
        if let Some(changes) = &mut self.changes
            && let Err(error) = changes.feed(self.next.start(size), &bytes)
        {
            // The copy does not depend on it: the census then knows less.
            tracing::warn!(%error, "The changes in WAL segment {name} are not understood");
            self.changes = None;
        }
        self.bytes += u64::from(size);
        self.writer.add(&name, bytes.reader()).await?;
        self.next = self.next.next();
        Ok(())
    }

    async fn read_next(&self, name: String) -> Result<Bytes, Failure> {
        let (origin, segment, files) = (self.origin, self.next, Arc::clone(&self.files));
        let end = self.end;
        blocking(move || {
            let size = origin.segment_size as usize;
            let Some(mut bytes) = origin.read(&*files, segment)? else {
                return Err(gone(format!(
                    "WAL segment {name}, which the backup needs, is gone from {}",
                    files.place(Path::new("pg_wal")).display()
                )));
            };
            if let Some(end) = end {
                let kept = end.0.saturating_sub(segment.start(origin.segment_size).0);
                let kept = usize::try_from(kept).unwrap_or(size).min(size);
                bytes[kept..].fill(0);
            }
            Ok(bytes.into())
        })
        .await
    }
}

fn gone(message: String) -> Failure {
    Failure::new(Code::WalMissing, Action::Retry, message).with_hint(
        "The backup's replication slot holds it; look for a script that deletes from pg_wal, and at \
         max_slot_wal_keep_size.",
    )
}
