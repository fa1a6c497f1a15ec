//! What a service does beside its answers, so that it ends with the service and not with the process.

use std::time::Duration;

use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Tasks of one service. Every copy is the same.
#[derive(Debug, Clone, Default)]
pub(super) struct Tasks {
    running: TaskTracker,
    /// Nothing new is begun.
    closing: CancellationToken,
    /// Nobody waits any more.
    abandoned: CancellationToken,
}

impl Tasks {
    /// Runs something beside what is asked. It gives nothing when nobody waited for its end.
    pub(super) fn spawn<T: Send + 'static>(
        &self,
        work: impl Future<Output = T> + Send + 'static,
    ) -> JoinHandle<Option<T>> {
        let abandoned = self.abandoned.clone();
        self.running.spawn(async move { abandoned.run_until_cancelled_owned(work).await })
    }

    /// Whether what has not begun should not begin any more.
    pub(super) fn are_closing(&self) -> bool {
        self.closing.is_cancelled()
    }

    /// Does something that is of no use any more once nothing new is begun.
    pub(super) async fn unless_closing<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        self.closing.run_until_cancelled(work).await
    }

    /// Begins nothing more, waits for what was begun, and gives up what takes longer.
    pub(super) async fn end(&self, within: Duration) {
        self.closing.cancel();
        self.running.close();
        if tokio::time::timeout(within, self.running.wait()).await.is_err() {
            let left = self.running.len();
            tracing::warn!("The WAL service ends and gives up {left} files that are on their way");
            self.abandoned.cancel();
            self.running.wait().await;
        }
    }

    #[cfg(test)]
    pub(super) fn running(&self) -> usize {
        self.running.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_waits_for_what_was_begun_and_not_for_ever() {
        let tasks = Tasks::default();
        let (go_on, waits) = tokio::sync::oneshot::channel::<()>();
        let done = tasks.spawn(async move { waits.await.is_ok() });
        let ending = tokio::spawn({
            let tasks = tasks.clone();
            async move { tasks.end(Duration::from_mins(5)).await }
        });
        tasks.closing.cancelled().await;
        assert!(!ending.is_finished());
        go_on.send(()).unwrap();
        assert_eq!(done.await.unwrap(), Some(true));
        ending.await.unwrap();

        let tasks = Tasks::default();
        let never = tasks.spawn(std::future::pending::<()>());
        tasks.end(Duration::from_millis(10)).await;
        assert_eq!((never.await.unwrap(), tasks.running()), (None, 0));
    }
}
