//! Places where a test can make this process die or stand still: the beginning of each step.
//!
//! Armed once at start, from the environment of the worker's own process, by nobody else. Unarmed, a step pays one load.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

/// What happens when the armed step begins.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Effect {
    /// The process dies at once, like by `kill -9`: nothing is cleaned up, nothing is told.
    Abort,
    /// The step never begins; only a cancel, a deadline or the end of the process ends the wait.
    Pause,
    /// The step begins once this file exists.
    Hold(PathBuf),
}

/// How often the file of a held step is looked for.
const LOOK_EVERY: Duration = Duration::from_millis(20);

static ARMED: OnceLock<(String, Effect)> = OnceLock::new();

/// Arms one step: `STEP=abort`, `STEP=pause` or `STEP=hold:FILE`. The first call counts. `false` for anything else.
pub fn arm(text: &str) -> bool {
    let Some((step, effect)) = text.split_once('=') else { return false };
    let effect = match effect {
        "abort" => Effect::Abort,
        "pause" => Effect::Pause,
        _ => match effect.strip_prefix("hold:") {
            Some(file) => Effect::Hold(PathBuf::from(file)),
            None => return false,
        },
    };
    ARMED.set((step.to_owned(), effect)).is_ok()
}

/// Called when a step begins.
pub(crate) async fn reached(step: &str) {
    let Some((armed, effect)) = ARMED.get() else { return };
    if armed != step {
        return;
    }
    match effect {
        Effect::Abort => std::process::abort(),
        Effect::Pause => std::future::pending().await,
        Effect::Hold(file) => {
            while !tokio::fs::try_exists(file).await.unwrap_or(false) {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        }
    }
}
