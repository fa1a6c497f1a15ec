//! Data pages: their checksum, the server's own sanity rules, and the position of their last
//! change.
//!
//! Pure functions over bytes. Which pages to read, and what to do about a bad one, is `relation`'s.

use proto::Lsn;

/// Length of a page's header (`SizeOfPageHeaderData`).
const HEADER_BYTES: usize = 24;
/// Partial sums that run side by side (`N_SUMS`); the layout lets compilers use vector
/// instructions.
const SUMS: usize = 32;
const FNV_PRIME: u32 = 16_777_619;
/// Flags a header may carry (`PD_VALID_FLAG_BITS`).
const VALID_FLAGS: u16 = 0x0007;
/// Starting values of the partial sums, from `checksum_impl.h`.
const BASE_OFFSETS: [u32; SUMS] = [
    0x5B1F_36E9,
    0xB852_5960,
    0x02AB_50AA,
    0x1DE6_6D2A,
    0x79FF_467A,
    0x9BB9_F8A3,
    0x217E_7CD2,
    0x83E1_3D2C,
    0xF8D4_474F,
    0xE39E_B970,
    0x42C6_AE16,
    0x9932_16FA,
    0x7B09_3B5D,
    0x98DA_FF3C,
    0xF718_902A,
    0x0B1C_9CDB,
    0xE58F_764B,
    0x1876_36BC,
    0x5D7B_3BB1,
    0xE73D_E7DE,
    0x92BE_C979,
    0xCCA6_C0B2,
    0x304A_0979,
    0x85AA_43D4,
    0x7831_25BB,
    0x6CA8_EAA2,
    0xE407_EAC6,
    0x4B5C_FC3E,
    0x9FBF_8C76,
    0x15CA_20BE,
    0xF2CA_9FD3,
    0x959B_D756,
];

/// What a page turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageState {
    /// All zero: allocated, never used.
    New,
    /// As the server would accept it.
    Valid,
    /// The stored checksum is not the content's.
    WrongChecksum {
        /// In the header.
        stored: u16,
        /// Of the content, at this block number.
        computed: u16,
    },
    /// The header is impossible: sizes or flags that no server writes, or a page that claims to be
    /// new and is not empty.
    BadHeader,
}

impl PageState {
    /// Whether the server would accept the page.
    pub fn is_sound(self) -> bool {
        matches!(self, Self::New | Self::Valid)
    }
}

/// Judges one page as the server does when it reads it into its buffers (`PageIsVerified`).
///
/// `block` is the number inside the whole relation fork, not inside the file: segment number times
/// blocks per segment plus index. `page` is one whole page.
pub fn inspect(page: &[u8], block: u32, checksums: bool) -> PageState {
    if upper(page) == 0 {
        return if is_zero(page) { PageState::New } else { PageState::BadHeader };
    }
    if checksums {
        let stored = stored_checksum(page);
        let computed = checksum(page, block);
        if stored != computed {
            return PageState::WrongChecksum { stored, computed };
        }
    }
    if header_is_sane(page) { PageState::Valid } else { PageState::BadHeader }
}

/// Position of the WAL record that changed the page last (`pd_lsn`).
pub fn lsn(page: &[u8]) -> Lsn {
    let half = |offset: usize| {
        u32::from_ne_bytes([page[offset], page[offset + 1], page[offset + 2], page[offset + 3]])
    };
    Lsn(u64::from(half(0)) << 32 | u64::from(half(4)))
}

/// The checksum in the page's header.
pub fn stored_checksum(page: &[u8]) -> u16 {
    u16_at(page, 8)
}

/// The checksum the server would write for this content at this block number.
pub fn checksum(page: &[u8], block: u32) -> u16 {
    let mut sums = BASE_OFFSETS;
    let (rows, _) = page.as_chunks::<{ SUMS * 4 }>();
    let mut rows = rows.iter();
    if let Some(first) = rows.next() {
        // The sum is taken as if the checksum's own field were zero.
        let mut row = *first;
        row[8..10].fill(0);
        mix(&mut sums, &row);
    }
    for row in rows {
        mix(&mut sums, row);
    }
    for _ in 0..2 {
        mix(&mut sums, &[0; SUMS * 4]);
    }
    let folded = sums.iter().fold(0, |result, sum| result ^ sum) ^ block;
    u16::try_from(folded % 65_535 + 1).unwrap_or(u16::MAX)
}

/// Whether every byte is zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<16>();
    words.iter().all(|word| u128::from_ne_bytes(*word) == 0) && rest.iter().all(|byte| *byte == 0)
}

#[inline]
fn mix(sums: &mut [u32; SUMS], row: &[u8; SUMS * 4]) {
    let (words, _) = row.as_chunks::<4>();
    for (sum, word) in sums.iter_mut().zip(words) {
        let mixed = *sum ^ u32::from_ne_bytes(*word);
        *sum = mixed.wrapping_mul(FNV_PRIME) ^ (mixed >> 17);
    }
}

fn header_is_sane(page: &[u8]) -> bool {
    let (flags, lower, special) = (u16_at(page, 10), u16_at(page, 12), u16_at(page, 16));
    flags & !VALID_FLAGS == 0
        && usize::from(lower) >= HEADER_BYTES
        && lower <= upper(page)
        && upper(page) <= special
        && usize::from(special) <= page.len()
        && special.is_multiple_of(8)
}

fn upper(page: &[u8]) -> u16 {
    u16_at(page, 14)
}

fn u16_at(page: &[u8], offset: usize) -> u16 {
    u16::from_ne_bytes([page[offset], page[offset + 1]])
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The sizes that PostgreSQL can be built for.
    const SIZES: [u16; 6] = [1 << 10, 2 << 10, 4 << 10, 8 << 10, 16 << 10, 32 << 10];

    fn page_with_header(size: u16) -> Vec<u8> {
        let mut page: Vec<u8> =
            (0..u32::from(size)).map(|i| i.wrapping_mul(31).to_ne_bytes()[0]).collect();
        page[10..18].copy_from_slice(
            &[0_u16, 24, 100, size].iter().flat_map(|v| v.to_ne_bytes()).collect::<Vec<_>>(),
        );
        let sum = checksum(&page, 7);
        page[8..10].copy_from_slice(&sum.to_ne_bytes());
        page
    }

    #[test]
    fn a_page_is_valid_at_its_own_block_number_only() {
        for page in SIZES.map(page_with_header) {
            assert_eq!(inspect(&page, 7, true), PageState::Valid);
            assert!(matches!(inspect(&page, 8, true), PageState::WrongChecksum { .. }));
            assert_eq!(inspect(&page, 8, false), PageState::Valid);
        }
    }

    #[test]
    fn damage_to_any_byte_is_seen() {
        for page in SIZES.map(page_with_header) {
            // All bytes of a page of the usual size, fewer of the larger ones.
            let step = page.len().div_ceil(8192);
            for offset in (0..page.len()).step_by(step).filter(|at| !(14..16).contains(at)) {
                // Sixteen bits of checksum miss one change in 65,536; two in one byte would be no chance.
                let missed = (0..8).filter(|bit| {
                    let mut damaged = page.clone();
                    damaged[offset] ^= 1 << bit;
                    inspect(&damaged, 7, true).is_sound()
                });
                assert!(missed.count() <= 1, "byte {offset} of {}", page.len());
            }
        }
    }

    #[test]
    fn a_new_page_must_be_entirely_zero() {
        for size in SIZES.map(usize::from) {
            let mut page = vec![0; size];
            assert_eq!(inspect(&page, 0, true), PageState::New);
            page[size - 1] = 1;
            assert_eq!(inspect(&page, 0, true), PageState::BadHeader);
            assert_eq!(inspect(&page, 0, false), PageState::BadHeader);
        }
    }

    #[test]
    fn impossible_headers_are_refused_without_checksums() {
        for size in SIZES {
            let impossible =
                [(10, 8_u16), (12, 23), (12, 101), (16, size + 1), (16, size - 4), (16, size + 8)];
            for (offset, value) in impossible {
                let mut page = page_with_header(size);
                page[offset..offset + 2].copy_from_slice(&value.to_ne_bytes());
                assert_eq!(inspect(&page, 7, false), PageState::BadHeader, "{offset} {value}");
            }
        }
    }
}
