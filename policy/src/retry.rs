//! Whether a job is tried again after an attempt ended badly, and when.
//!
//! Decides by the failure's action and the number of attempts that were granted; never by its text.

use proto::failure::{Action, Code, Failure};

use crate::words::span;

/// Limits of trying again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// How many attempts one job gets, at least 1.
    pub attempts_max: u32,
    /// Pause after the first failure, milliseconds.
    pub pause_first_ms: i64,
    /// No pause is longer than this, milliseconds.
    pub pause_max_ms: i64,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { attempts_max: 3, pause_first_ms: 5_000, pause_max_ms: 600_000 }
    }
}

/// What happens after an attempt ended without success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Retry {
    /// Another attempt.
    Again {
        /// Not before this long from now, milliseconds.
        pause_ms: i64,
        /// Preferably not on the worker that just failed.
        elsewhere: bool,
        /// False when the attempt did not use up one of the job's: the worker only handed it back.
        counts: bool,
        /// Why, for people.
        reason: String,
    },
    /// The job is over.
    No {
        /// Why, for people.
        reason: String,
    },
}

impl RetryPolicy {
    /// After a worker reported a failure. `attempts` counts the granted ones, this one included; `chance` is any
    /// random number.
    pub fn after_failure(&self, failure: &Failure, attempts: u32, chance: u64) -> Retry {
        if failure.code == Code::WorkerDraining && failure.action.is_retryable() {
            // A worker that hands back what it was granted too late may be granted it too late again: not at once.
            let pause_ms = match failure.action {
                Action::Retry => self.pause_ms(1, chance),
                _ => 0,
            };
            return Retry::Again {
                pause_ms,
                elsewhere: true,
                counts: false,
                reason: format!("its worker handed it back: {}", failure.message),
            };
        }
        let code = failure.code;
        match failure.action {
            Action::Retry | Action::RetryElsewhere if attempts < self.attempts_max => {
                let pause_ms = self.pause_ms(attempts, chance);
                let elsewhere = failure.action == Action::RetryElsewhere;
                let place = if elsewhere { ", on another worker if there is one" } else { "" };
                let left = self.attempts_max - attempts;
                Retry::Again {
                    pause_ms,
                    elsewhere,
                    counts: true,
                    reason: format!(
                        "attempt {attempts} failed with {code}: tried again in {}{place}, {left} left",
                        span(pause_ms)
                    ),
                }
            }
            Action::Retry | Action::RetryElsewhere => Retry::No {
                reason: format!("attempt {attempts} of {} failed with {code}", self.attempts_max),
            },
            Action::FixConfig => {
                Retry::No { reason: format!("{code}: trying again would not help") }
            }
            Action::FixData => {
                Retry::No { reason: format!("{code}: a person must look at the data") }
            }
            Action::Abandon => {
                Retry::No { reason: format!("{code}: there is nothing to try again") }
            }
            Action::ReportBug => {
                Retry::No { reason: format!("{code}: pgmuster broke its own rules") }
            }
        }
    }

    /// After an attempt was declared lost.
    pub fn after_loss(&self, why: &str, attempts: u32, chance: u64) -> Retry {
        if attempts < self.attempts_max {
            let pause_ms = self.pause_ms(attempts, chance);
            Retry::Again {
                pause_ms,
                elsewhere: true,
                counts: true,
                reason: format!(
                    "attempt {attempts} was lost ({why}): tried again in {}",
                    span(pause_ms)
                ),
            }
        } else {
            Retry::No {
                reason: format!("attempt {attempts} of {} was lost: {why}", self.attempts_max),
            }
        }
    }

    /// Doubles with every attempt up to the limit; then chance takes away up to half, so that a fleet that failed
    /// together does not come back together.
    fn pause_ms(&self, attempts: u32, chance: u64) -> i64 {
        let doublings = attempts.saturating_sub(1).min(30);
        let whole = self
            .pause_first_ms
            .saturating_mul(1i64 << doublings)
            .clamp(0, self.pause_max_ms.max(0));
        let half = whole / 2;
        let taken = i64::try_from(chance % (u64::try_from(half).unwrap_or(0) + 1)).unwrap_or(0);
        whole - taken
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn failure(action: Action) -> Failure {
        Failure::new(Code::StoreUnavailable, action, "m")
    }

    #[test]
    fn only_retryable_actions_are_tried_again_and_only_so_often() {
        let policy = RetryPolicy::default();
        let again = |action, attempts| {
            matches!(policy.after_failure(&failure(action), attempts, 0), Retry::Again { .. })
        };
        for (action, expected) in [
            (Action::Retry, true),
            (Action::RetryElsewhere, true),
            (Action::FixConfig, false),
            (Action::FixData, false),
            (Action::Abandon, false),
            (Action::ReportBug, false),
        ] {
            assert_eq!(again(action, 1), expected, "{action:?}");
            assert_eq!(again(action, 2), expected, "{action:?}");
            assert!(!again(action, 3), "{action:?}");
        }
    }

    #[test]
    fn a_handed_back_job_costs_no_attempt() {
        let failure = Failure::new(Code::WorkerDraining, Action::RetryElsewhere, "m");
        let Retry::Again { pause_ms: 0, counts: false, elsewhere: true, .. } =
            RetryPolicy::default().after_failure(&failure, 3, 9)
        else {
            panic!("a drained worker's job must go on")
        };
        let late = Failure::new(Code::WorkerDraining, Action::Retry, "its grant came too late");
        let Retry::Again { pause_ms, counts: false, elsewhere: true, reason } =
            RetryPolicy::default().after_failure(&late, 3, 9)
        else {
            panic!("what nobody began must go on")
        };
        assert!((2_500..=5_000).contains(&pause_ms), "{pause_ms}: no storm of grants");
        assert_eq!(reason, "its worker handed it back: its grant came too late");
    }

    #[test]
    fn the_reason_is_a_sentence_with_numbers() {
        let policy = RetryPolicy::default();
        let Retry::Again { reason, .. } = policy.after_failure(&failure(Action::Retry), 1, 0)
        else {
            panic!()
        };
        assert_eq!(reason, "attempt 1 failed with STORE_UNAVAILABLE: tried again in 5 s, 2 left");
        let Retry::No { reason } = policy.after_loss("worker w1 restarted", 3, 0) else { panic!() };
        assert_eq!(reason, "attempt 3 of 3 was lost: worker w1 restarted");
    }

    proptest! {
        #[test]
        fn pauses_stay_within_half_and_the_whole(attempts in 1u32..200, chance: u64, first in 0i64..1_000_000, max in 0i64..10_000_000) {
            let policy = RetryPolicy { attempts_max: u32::MAX, pause_first_ms: first, pause_max_ms: max };
            let Retry::Again { pause_ms, .. } = policy.after_failure(&failure(Action::Retry), attempts, chance) else {
                return Err(TestCaseError::fail("must be tried again"));
            };
            let whole = first.saturating_mul(1 << attempts.saturating_sub(1).min(30)).min(max);
            prop_assert!(pause_ms <= whole && pause_ms >= whole - whole / 2, "{pause_ms} of {whole}");
        }
    }
}
