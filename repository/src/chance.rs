//! Randomness: the one place of this crate where it comes from.

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// `N` random bytes from the kernel. aws-lc's own generator measures the processor's jitter before its first number, some
/// 30 ms of work in each process, and a server starts one for each segment of its log.
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let mut filled = 0;
    while filled < N {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(more) => filled += more,
            // Early after a start of the machine it waits, and a signal may come meanwhile.
            Err(Errno::INTR) => {}
            // Going on with zeros would write packs under a key that everybody knows.
            Err(error) => unreachable!("the kernel's random numbers need no permission: {error}"),
        }
    }
    bytes
}
