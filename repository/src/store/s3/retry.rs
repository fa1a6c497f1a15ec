//! What the SDK repeats on its own account: which answers beside those it knows, and how many in all. When a store is
//! ill, a fleet that asks again and again keeps it so.

use aws_sdk_s3::config::interceptors::InterceptorContext;
use aws_sdk_s3::config::retry::{ClassifyRetry, RetryAction, RetryPartition, TokenBucket};

use super::answer::GARBLED;

/// Repetitions that an open store may have ahead of its successes: enough for every request in flight to be unlucky
/// several times.
const RETRIES_AHEAD: usize = 100;
/// Repetitions that a success earns. Below one, so that requests never double for long, and above what a third of all
/// requests failing takes.
const RETRIES_EARNED: f32 = 0.75;
/// Repetitions that a second earns, so that a store that answers again is found out.
const RETRIES_A_SECOND: f32 = 1.0;

/// One budget for each open store: a broken one does not use up that of a healthy one.
pub(super) fn budget(description: &str) -> RetryPartition {
    let bucket = TokenBucket::builder()
        .capacity(RETRIES_AHEAD)
        .retry_cost(1)
        .throttling_retry_cost(1)
        .timeout_retry_cost(1)
        .success_reward(RETRIES_EARNED)
        .refill_rate(RETRIES_A_SECOND)
        .build();
    RetryPartition::custom(description.to_owned()).token_bucket(bucket).build()
}

/// Finds answers that pass and that the SDK takes for final.
#[derive(Debug)]
pub(super) struct Passing;

impl ClassifyRetry for Passing {
    fn classify_retry(&self, context: &InterceptorContext) -> RetryAction {
        let Some(response) = context.response() else { return RetryAction::NoActionIndicated };
        let garbled = || {
            let text = String::from_utf8_lossy(response.body().bytes().unwrap_or_default());
            GARBLED.iter().any(|code| text.contains(&format!("<Code>{code}</Code>")))
        };
        match response.status().as_u16() {
            429 => RetryAction::throttling_error(),
            408 => RetryAction::transient_error(),
            400 if garbled() => RetryAction::transient_error(),
            _ => RetryAction::NoActionIndicated,
        }
    }

    fn name(&self) -> &'static str {
        "answers that pass"
    }
}
