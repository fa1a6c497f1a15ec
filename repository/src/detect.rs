//! Telling changed units from unchanged ones, and zeros from everything else.

use crate::limits::HASH_BYTES;

/// The detection hash of a unit. All zero for a unit of zeros, and for no other.
pub(crate) type Hash = [u8; HASH_BYTES];

pub(crate) const ZERO: Hash = [0; HASH_BYTES];

/// The key under which the units of one lineage are hashed.
pub(crate) struct Detection(pub(crate) zeroize::Zeroizing<[u8; 32]>);

impl Detection {
    pub(crate) fn hash(&self, unit: &[u8]) -> Hash {
        if is_zero(unit) {
            return ZERO;
        }
        let mut short = ZERO;
        short.copy_from_slice(&blake3::keyed_hash(&self.0, unit).as_bytes()[..HASH_BYTES]);
        if short == ZERO { [1; HASH_BYTES] } else { short }
    }
}

/// Whether every byte is zero. The usual unit answers in its first bytes.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    let mut chunks = bytes.chunks_exact(64);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && bytes.chunks_exact(64).remainder().iter().all(|byte| *byte == 0)
}

/// A number for a stretch of a file that stays the same from backup to backup (FNV-1a): where shards are cut and whose
/// turn it is to be read again are decided by it. Nothing secret, nothing adversarial: a bad spread costs time only.
pub(crate) fn spread(path: &[u8], piece: u64) -> u32 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    for byte in path.iter().copied().chain(piece.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    u32::try_from((hash ^ hash >> 29).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        for length in [0, 1, 63, 64, 65, 8192] {
            let mut unit = vec![0; length];
            assert!(is_zero(&unit));
            for at in [0, length / 2, length.saturating_sub(1)] {
                if at < length {
                    unit[at] = 1;
                    assert!(!is_zero(&unit), "{length} {at}");
                    unit[at] = 0;
                }
            }
        }
    }

    #[test]
    fn hashes_depend_on_key_and_content() {
        let one = Detection(zeroize::Zeroizing::new([1; 32]));
        let two = Detection(zeroize::Zeroizing::new([2; 32]));
        assert_eq!(one.hash(&[0; 8192]), ZERO);
        assert_ne!(one.hash(&[5; 8192]), two.hash(&[5; 8192]));
        assert_ne!(one.hash(&[5; 8192]), one.hash(&[5; 8191]));
    }

    #[test]
    fn the_spread_is_even() {
        let mut buckets = [0_u32; 16];
        for oid in 0..16_000 {
            let path = format!("base/{}/{}", 1 + oid / 1000, 16384 + oid);
            buckets[(spread(path.as_bytes(), 0) >> 28) as usize] += 1;
        }
        assert!(buckets.iter().all(|count| (800..1200).contains(count)), "{buckets:?}");
    }
}
