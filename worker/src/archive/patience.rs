//! Trying again what may pass, for so long and no longer.

use std::time::Duration;

use proto::{Action, Code, Failure};
use tokio::time::{Instant, sleep, timeout_at};

/// The first pause between two attempts; each is twice the one before.
const PAUSE: Duration = Duration::from_millis(200);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Works until it succeeds, fails in a way that trying again does not help, or `limit` has passed, of which some is spent. The last
/// failure is told.
pub async fn patiently<T>(
    limit: Duration,
    spent: Duration,
    work: impl AsyncFn() -> Result<T, Failure>,
) -> Result<T, Failure> {
    let deadline = Instant::now() + limit.saturating_sub(spent);
    let mut pause = PAUSE;
    let mut last: Option<Failure> = None;
    loop {
        let failure = match timeout_at(deadline, work()).await {
            Ok(Ok(done)) => return Ok(done),
            Ok(Err(failure)) => failure,
            Err(_) => return Err(last.unwrap_or_else(|| too_late(limit))),
        };
        if failure.action != Action::Retry || Instant::now() + pause >= deadline {
            return Err(failure);
        }
        tracing::warn!("Trying again: {failure}");
        last = Some(failure);
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

fn too_late(limit: Duration) -> Failure {
    let what = format!("there was no answer within {} seconds", limit.as_secs());
    Failure::new(Code::DeadlineExceeded, Action::Retry, what)
        .with_hint("Look at the store and the way to it; --deadline gives more time.")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn failure(action: Action) -> Failure {
        Failure::new(Code::StoreUnavailable, action, "x")
    }

    #[tokio::test(start_paused = true)]
    async fn what_may_pass_is_tried_again_until_the_deadline() {
        let asked = AtomicU32::new(0);
        let done = patiently(Duration::from_mins(1), Duration::ZERO, async || {
            match asked.fetch_add(1, Ordering::SeqCst) {
                0..=4 => Err(failure(Action::Retry)),
                _ => Ok(()),
            }
        });
        done.await.unwrap();
        assert_eq!(asked.into_inner(), 6);

        let began = Instant::now();
        let told = patiently(Duration::from_mins(1), Duration::ZERO, async || {
            Err::<(), _>(failure(Action::Retry))
        });
        assert_eq!(told.await.unwrap_err().code, Code::StoreUnavailable);
        assert!(began.elapsed() <= Duration::from_mins(1), "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_pass_is_told_at_once_and_silence_at_the_deadline() {
        let asked = AtomicU32::new(0);
        let told = patiently(Duration::from_mins(1), Duration::ZERO, async || {
            asked.fetch_add(1, Ordering::SeqCst);
            Err::<(), _>(failure(Action::FixData))
        });
        told.await.unwrap_err();
        assert_eq!(asked.into_inner(), 1);

        let began = Instant::now();
        let told = patiently(Duration::from_mins(1), Duration::from_secs(20), async || {
            std::future::pending::<Result<(), Failure>>().await
        });
        let told = told.await.unwrap_err();
        assert_eq!(told.code, Code::DeadlineExceeded);
        assert!(told.message.contains("within 60 seconds"), "{told}");
        assert_eq!(began.elapsed(), Duration::from_secs(40));
    }
}
