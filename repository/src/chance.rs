//! Randomness: the one place of this crate where it comes from.

use rustix::rand::{GetRandomFlags, getrandom};

/// `N` random bytes from the kernel. aws-lc's own generator measures the processor's jitter before its first number, some
/// 30 ms of work in each process, and a server starts one for each segment of its log.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        // Failing here would mean that the machine has no randomness at all; going on with zeros would write packs
        // under a key that everybody knows.
        filled += getrandom(&mut bytes[filled..], GetRandomFlags::empty())
            .expect("the kernel's random numbers need no permission and no memory");
    }
    bytes
}
