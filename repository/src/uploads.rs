//! Uploads that nobody will complete: what a writer that was killed leaves in a store that keeps parts.

use proto::LineageId;

use crate::error::Error;
use crate::layout;
use crate::repository::Repository;
use crate::store::StoreError;

impl Repository {
    /// Ends the uploads of attempts that are over, and those of archived files that are there. Returns how many there were.
    ///
    /// While an attempt is open no upload of an attempt is ended: no name of an upload tells whose it is. They are listed before
    /// the attempts: each belongs to an attempt whose intent was there before it, so when no attempt is open afterwards, each of
    /// them is of one that can never commit, or has. An upload of a file that the archive has can only lose.
    pub(crate) async fn end_dead_uploads(&self, lineage: LineageId) -> Result<usize, Error> {
        let uploads = self.store.uploads(&layout::lineage(lineage)).await?;
        let archive = layout::wal(lineage);
        let (archived, of_attempts): (Vec<String>, Vec<String>) =
            uploads.into_iter().partition(|key| key.starts_with(&archive));
        let mut dead = Vec::new();
        for key in archived {
            match self.store.size(&key).await {
                Ok(_) => dead.push(key),
                Err(StoreError::NotFound { .. }) => {}
                Err(error) => tracing::debug!(key, %error, "its upload is not looked at"),
            }
        }
        if !of_attempts.is_empty() {
            let attempts = self.list_attempts(lineage).await?;
            if attempts.iter().all(|attempt| attempt.verdict.is_some()) {
                dead.extend(of_attempts);
            }
        }
        if dead.is_empty() {
            return Ok(0);
        }
        Ok(self.store.abort_uploads(&dead).await?)
    }
}
