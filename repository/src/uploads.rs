//! Uploads that nobody will complete: what a writer that was killed leaves in a store that keeps parts.

use proto::LineageId;

use crate::error::Error;
use crate::layout;
use crate::repository::Repository;

impl Repository {
    /// Ends the uploads of attempts that are over, and returns how many there were. While an attempt is open nothing is
    /// ended: no name of an upload tells whose it is.
    ///
    /// The uploads are listed before the attempts: each belongs to an attempt whose intent was there before it, so when no
    /// attempt is open afterwards, each of them is of one that can never commit, or has.
    pub(crate) async fn end_dead_uploads(&self, lineage: LineageId) -> Result<usize, Error> {
        let keys = self.store.uploads(&layout::lineage(lineage)).await?;
        if keys.is_empty() {
            return Ok(0);
        }
        let attempts = self.list_attempts(lineage).await?;
        if attempts.iter().any(|attempt| attempt.verdict.is_none()) {
            return Ok(0);
        }
        Ok(self.store.abort_uploads(&keys).await?)
    }
}
