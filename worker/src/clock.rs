//! The worker's only source of time and chance.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use proto::message::Nonce;
pub(crate) use repository::random;

/// Unix time in milliseconds.
pub(crate) fn now_ms() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "the worker's one clock")]
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// When something was seen, by the clock that people read and by one that nobody sets.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen {
    pub(crate) at_ms: i64,
    /// Stands still while the machine does.
    steady_ms: i64,
}

impl Seen {
    pub(crate) fn now() -> Self {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        let steady_ms = i64::try_from(START.elapsed().as_millis()).unwrap_or(i64::MAX);
        Self { at_ms: now_ms(), steady_ms }
    }

    /// How long ago that was, however the clock was set since.
    pub(crate) fn age_ms(self, now: Self) -> i64 {
        now.steady_ms.saturating_sub(self.steady_ms)
    }

    /// When that was by the clock as it is now; never too late, whether the clock was set or the machine stood still.
    pub(crate) fn at_ms_by(self, now: Self) -> i64 {
        self.at_ms.min(now.at_ms.saturating_sub(self.age_ms(now)))
    }

    #[cfg(test)]
    pub(crate) fn test(at_ms: i64, steady_ms: i64) -> Self {
        Self { at_ms, steady_ms }
    }
}

/// A fresh nonce for a claim.
pub(crate) fn nonce() -> Nonce {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(32);
    for byte in random::<16>() {
        write!(text, "{byte:02x}").expect("writing to a String cannot fail");
    }
    Nonce(text)
}
