//! CRC-32C (Castagnoli), a byte at a time: its users are files of 300 bytes and the few records of the log that matter.

/// The checksum of parts that follow each other.
pub(crate) fn crc32c<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> u32 {
    !parts.into_iter().flatten().fold(!0, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            (crc >> 1) ^ (0x82F6_3B78 & (crc & 1).wrapping_neg())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_matches_the_published_check_value() {
        assert_eq!(crc32c([&b"123456789"[..]]), 0xE306_9283);
        assert_eq!(crc32c([&b"1234"[..], b"56789"]), 0xE306_9283);
        assert_eq!(crc32c([]), 0);
    }
}
