//! Waiting for a condition, with a bound. The tests have no other way to wait.

use std::fmt::Display;
use std::time::{Duration, Instant};

use anyhow::bail;

/// How often a condition is looked at: often enough not to slow a test, seldom enough not to load two cores.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Looks until `check` gives something. After `bound` it fails, saying what did not happen and what was seen last.
///
/// A `check` that fails is looked at again: whatever is being waited for may not answer yet.
pub fn eventually<T>(
    what: impl Display,
    bound: Duration,
    mut check: impl FnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        let seen = check();
        if let Ok(Some(value)) = seen {
            return Ok(value);
        }
        if start.elapsed() >= bound {
            return too_late(&what, bound, seen);
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// [`eventually`] for conditions that have to be awaited.
pub async fn eventually_async<T>(
    what: impl Display,
    bound: Duration,
    mut check: impl AsyncFnMut() -> anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        // A check that hangs must not outlast the bound either.
        let left = bound.saturating_sub(start.elapsed()).max(LOOK_EVERY);
        let seen = match tokio::time::timeout(left, check()).await {
            Ok(seen) => seen,
            Err(_) => Err(anyhow::anyhow!("the last look did not end")),
        };
        if let Ok(Some(value)) = seen {
            return Ok(value);
        }
        if start.elapsed() >= bound {
            return too_late(&what, bound, seen);
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn too_late<T>(
    what: &dyn Display,
    bound: Duration,
    seen: anyhow::Result<Option<T>>,
) -> anyhow::Result<T> {
    match seen {
        Err(error) => Err(error.context(format!("{what} did not happen within {bound:?}"))),
        Ok(_) => bail!("{what} did not happen within {bound:?}"),
    }
}
