//! The one place where this crate reads the clock. Spans carry real time by nature; nothing is decided by it.

use std::time::{SystemTime, UNIX_EPOCH};

/// Now, for the beginning of a span.
#[expect(
    clippy::disallowed_methods,
    reason = "a span's own timestamps are the real time; no decision depends on them"
)]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}

/// Milliseconds since 1970; 0 for anything before.
pub(crate) fn unix_ms(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}
