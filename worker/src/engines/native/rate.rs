//! How fast a backup may read from the server's disks. All threads of one copy share one limit.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Unused time counts for so long: a copy that waited for its store may catch up this much and no more.
const SAVED: Duration = Duration::from_millis(250);

/// Bytes a second that may be read.
#[derive(Debug)]
pub(super) struct RateLimit {
    bytes_per_s: u64,
    /// From when on the next read is in time.
    due: Mutex<Instant>,
}

impl RateLimit {
    /// Bytes a second that may be read.
    pub(super) fn bytes_per_s(&self) -> u64 {
        self.bytes_per_s
    }

    /// From when on the next read is in time.
    #[cfg(test)]
    pub(super) fn due(&self) -> Instant {
        *self.due.lock().unwrap()
    }

    /// `None` for no limit.
    pub(super) fn new(bytes_per_s: Option<u64>) -> Option<Self> {
        bytes_per_s.map(|bytes_per_s| Self { bytes_per_s, due: Mutex::new(Instant::now()) })
    }

    /// Holds the calling thread back until `bytes` more may be read. At the lowest limit that a configuration may ask for, a
    /// read of one frame waits half a second for each thread, so that a copy that is cancelled still ends soon.
    pub(super) fn pace(&self, bytes: usize) {
        let now = Instant::now();
        let pause = {
            let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
            let start = (*due).max(now.checked_sub(SAVED).unwrap_or(now));
            *due = start + cost(bytes, self.bytes_per_s);
            start.saturating_duration_since(now)
        };
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
    }
}

/// How long reading `bytes` takes at a limit.
fn cost(bytes: usize, bytes_per_s: u64) -> Duration {
    let nanos = bytes as u128 * 1_000_000_000 / u128::from(bytes_per_s.max(1));
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_read_puts_the_next_read_off_by_its_cost() {
        assert_eq!(cost(512 << 10, 1 << 20), Duration::from_millis(500));
        assert_eq!(cost(usize::MAX, u64::MAX), Duration::from_secs(1));
        assert_eq!(cost(0, 1), Duration::ZERO);

        let limit = RateLimit::new(Some(1 << 30)).unwrap();
        let before = *limit.due.lock().unwrap();
        limit.pace(1 << 20);
        limit.pace(1 << 20);
        let after = *limit.due.lock().unwrap();
        assert!(after + SAVED >= before + 2 * cost(1 << 20, 1 << 30), "{:?}", after - before);
    }

    #[test]
    fn a_copy_that_waited_catches_up_a_quarter_of_a_second_at_most() {
        let limit = RateLimit::new(Some(1 << 20)).unwrap();
        let long_ago = Instant::now().checked_sub(Duration::from_mins(1)).unwrap();
        *limit.due.lock().unwrap() = long_ago;
        let now = Instant::now();
        limit.pace(1 << 20);
        assert!(*limit.due.lock().unwrap() + SAVED >= now + Duration::from_secs(1));
        assert!(RateLimit::new(None).is_none());
    }
}
