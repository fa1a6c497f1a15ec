//! The coordinator's clock: the real one, or one that a test moves.
//!
//! Everything that decides by time asks it. Waiting for a moment goes through it too, so that a test which moves the
//! clock wakes whoever waits. (Limits of network calls are real time and do not come from here.)

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

/// What time it is, Unix milliseconds. Clones share it.
#[derive(Debug, Clone)]
pub struct Clock(Source);

#[derive(Debug, Clone)]
enum Source {
    System,
    Manual(watch::Receiver<i64>),
}

/// The hand of a clock made by [`Clock::manual`].
#[derive(Debug, Clone)]
pub struct Hand(Arc<watch::Sender<i64>>);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Self {
        Self(Source::System)
    }

    /// A clock that stands still until its hand is moved.
    pub fn manual(at_ms: i64) -> (Self, Hand) {
        let (sender, receiver) = watch::channel(at_ms);
        (Self(Source::Manual(receiver)), Hand(Arc::new(sender)))
    }

    /// Now.
    #[expect(
        clippy::disallowed_methods,
        reason = "the one place where the coordinator reads the machine's clock"
    )]
    pub fn now_ms(&self) -> i64 {
        match &self.0 {
            Source::System => SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX)),
            Source::Manual(at_ms) => *at_ms.borrow(),
        }
    }

    /// Returns once it is this late. May be dropped and called again.
    pub async fn sleep_until(&self, at_ms: i64) {
        match &self.0 {
            Source::System => loop {
                let left_ms = at_ms.saturating_sub(self.now_ms());
                let Ok(left_ms @ 1..) = u64::try_from(left_ms) else { return };
                // The machine's clock may be set: look again at least every minute.
                tokio::time::sleep(Duration::from_millis(left_ms.min(60_000))).await;
            },
            Source::Manual(now) => {
                let mut now = now.clone();
                if now.wait_for(|now_ms| *now_ms >= at_ms).await.is_err() {
                    // The hand is gone: this clock never moves again.
                    std::future::pending::<()>().await;
                }
            }
        }
    }
}

impl Hand {
    /// Moves the clock forward.
    pub fn advance(&self, by_ms: i64) {
        self.0.send_modify(|now_ms| *now_ms += by_ms);
    }
}
