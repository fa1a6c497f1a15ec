//! The one place where the coordinator takes randomness from.

use proto::{AttemptId, JobId};

/// Random bytes from the operating system's generator.
pub(crate) fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).expect("the operating system has randomness");
    bytes
}

/// A random number.
pub(crate) fn number() -> u64 {
    u64::from_le_bytes(bytes())
}

fn unsigned(at_ms: i64) -> u64 {
    u64::try_from(at_ms).unwrap_or(0)
}

/// A fresh job id.
pub(crate) fn job(at_ms: i64) -> JobId {
    JobId::mint(unsigned(at_ms), bytes())
}

/// A fresh attempt id.
pub(crate) fn attempt(at_ms: i64) -> AttemptId {
    AttemptId::mint(unsigned(at_ms), bytes())
}

/// A fresh id for a row of no type of its own, and for messages.
pub(crate) fn id(at_ms: i64) -> String {
    proto::id::v7(unsigned(at_ms), bytes()).to_string()
}
