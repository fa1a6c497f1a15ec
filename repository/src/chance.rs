//! Randomness: the one place of this crate where it comes from.

/// `N` random bytes from the operating system's generator by way of aws-lc.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // Failing here would mean that the process has no randomness at all; going on with zeros would write packs
    // under a key that everybody knows.
    aws_lc_rs::rand::fill(&mut bytes).expect("the system's random generator works");
    bytes
}
