//! The crate's one source of chance: spreads reconnects, so that a fleet does not come back all at once. Nothing
//! that must be hard to guess comes from here.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

/// The wait before the next try: doubles from `first` up to `longest`, then a random half of it is taken off.
pub(crate) fn back_off(tries: u32, first: Duration, longest: Duration) -> Duration {
    let full = first.saturating_mul(1 << tries.min(16)).min(longest);
    let half = full / 2;
    half + half.mul_f64(fraction())
}

/// A number from 0 to 1, different at every call.
fn fraction() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    f64::from(u32::try_from(random >> 32).unwrap_or(u32::MAX)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_to_the_longest_and_differ() {
        let first = Duration::from_millis(100);
        let longest = Duration::from_secs(10);
        for (tries, full) in [(0, 100), (1, 200), (3, 800), (7, 10_000), (40, 10_000)] {
            let full = Duration::from_millis(full);
            let wait = back_off(tries, first, longest);
            assert!(wait >= full / 2 && wait <= full, "try {tries}: {wait:?}");
        }
        let waits: Vec<Duration> = (0..20).map(|_| back_off(9, first, longest)).collect();
        assert!(waits.iter().any(|wait| *wait != waits[0]), "{waits:?}");
    }
}
