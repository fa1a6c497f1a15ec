//! What is looked after while a backup waits or copies: its session, the limits, and the WAL, which is stored as it is written.

use std::future::Future;

use postgres::BackupSession;
use proto::Failure;
use tokio_util::sync::CancellationToken;

use super::hold::{Hold, LOOK_EVERY};
use super::wal::WalCollector;

/// A backup whose server is in backup mode.
pub(super) struct Kept<'a> {
    pub(super) session: &'a mut BackupSession,
    pub(super) wal: &'a mut WalCollector,
    pub(super) hold: &'a Hold,
}

impl Kept<'_> {
    /// Does `work`, and meanwhile looks at the server, each time after `tell`, and stores what it has written. A failure of either
    /// ends both.
    pub(super) async fn beside<T>(
        self,
        tell: impl Fn(),
        work: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        // The looking ends between two rounds, never inside one: a segment that was half stored would be stored and counted
        // twice.
        let done = CancellationToken::new();
        let work = async {
            let worked = work.await;
            done.cancel();
            worked
        };
        let (worked, ()) = tokio::try_join!(work, self.look(tell, &done))?;
        Ok(worked)
    }

    async fn look(self, tell: impl Fn(), done: &CancellationToken) -> Result<(), Failure> {
        let Self { session, wal, hold } = self;
        let mut ticks = tokio::time::interval(LOOK_EVERY);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = done.cancelled() => return Ok(()),
                _ = ticks.tick() => {}
            }
            tell();
            let standing = hold.look(session).await?;
            // Segment by segment, so that a slow repository holds back as little WAL as it can.
            while hold.beside(session, wal.store_one(standing.current_lsn)).await? {
                session.advance(wal.stored_until()).await?;
            }
        }
    }
}
