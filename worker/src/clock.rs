//! The worker's only source of time and chance.

use std::time::{SystemTime, UNIX_EPOCH};

use proto::message::Nonce;
use rustix::rand::{GetRandomFlags, getrandom};

/// Unix time in milliseconds.
pub(crate) fn now_ms() -> i64 {
    #[expect(clippy::disallowed_methods, reason = "the worker's one clock")]
    let since_epoch = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX)
}

/// Bytes nobody can guess, from the kernel.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())
            .expect("the kernel's random numbers need no permission and no memory");
    }
    bytes
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
