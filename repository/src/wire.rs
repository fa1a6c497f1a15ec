//! The binary notation of shards and roots: little numbers, counted bytes. No meaning.

/// Why bytes could not be read: what was being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Malformed(pub(crate) &'static str);

/// Appends to a buffer.
#[derive(Debug, Default)]
pub(crate) struct Encoder {
    bytes: Vec<u8>,
}

impl Encoder {
    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    pub(crate) fn byte(&mut self, value: u8) {
        self.bytes.push(value);
    }

    /// An unsigned number, seven bits a byte, lowest first.
    pub(crate) fn number(&mut self, value: impl Into<u64>) {
        let mut value = value.into();
        while value >= 0x80 {
            self.bytes.push(low_byte(value) | 0x80);
            value >>= 7;
        }
        self.bytes.push(low_byte(value));
    }

    pub(crate) fn count(&mut self, value: usize) {
        self.number(value as u64);
    }

    /// A signed number: zigzag.
    pub(crate) fn signed(&mut self, value: i64) {
        self.number((value.cast_unsigned() << 1) ^ (value >> 63).cast_unsigned());
    }

    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(crate) fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.raw(bytes);
    }
}

fn low_byte(value: u64) -> u8 {
    value.to_le_bytes()[0]
}

/// Reads what an [`Encoder`] wrote, and refuses everything else without allocating for it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Decoder<'a> {
    rest: &'a [u8],
}

impl<'a> Decoder<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    pub(crate) fn byte(&mut self, what: &'static str) -> Result<u8, Malformed> {
        let (&first, rest) = self.rest.split_first().ok_or(Malformed(what))?;
        self.rest = rest;
        Ok(first)
    }

    pub(crate) fn number(&mut self, what: &'static str) -> Result<u64, Malformed> {
        let mut value = 0_u64;
        for shift in (0..64).step_by(7) {
            let byte = self.byte(what)?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(Malformed(what));
            }
            value |= bits << shift;
            if byte < 0x80 {
                // One notation for each number: a longer one is a forgery or a fault.
                return if byte == 0 && shift > 0 { Err(Malformed(what)) } else { Ok(value) };
            }
        }
        Err(Malformed(what))
    }

    pub(crate) fn number_u32(&mut self, what: &'static str) -> Result<u32, Malformed> {
        u32::try_from(self.number(what)?).map_err(|_| Malformed(what))
    }

    pub(crate) fn signed(&mut self, what: &'static str) -> Result<i64, Malformed> {
        let value = self.number(what)?;
        Ok((value >> 1).cast_signed() ^ -(value & 1).cast_signed())
    }

    /// A count of things that take at least `bytes_each` bytes: never more than can still follow.
    pub(crate) fn count(
        &mut self,
        bytes_each: usize,
        what: &'static str,
    ) -> Result<usize, Malformed> {
        let count = usize::try_from(self.number(what)?).map_err(|_| Malformed(what))?;
        if count.checked_mul(bytes_each).is_none_or(|bytes| bytes > self.rest.len()) {
            return Err(Malformed(what));
        }
        Ok(count)
    }

    /// A place in a table of `length`.
    pub(crate) fn index(&mut self, length: usize, what: &'static str) -> Result<usize, Malformed> {
        let index = usize::try_from(self.number(what)?).map_err(|_| Malformed(what))?;
        if index < length { Ok(index) } else { Err(Malformed(what)) }
    }

    pub(crate) fn raw(&mut self, length: usize, what: &'static str) -> Result<&'a [u8], Malformed> {
        let (bytes, rest) = self.rest.split_at_checked(length).ok_or(Malformed(what))?;
        self.rest = rest;
        Ok(bytes)
    }

    pub(crate) fn array<const N: usize>(
        &mut self,
        what: &'static str,
    ) -> Result<[u8; N], Malformed> {
        let (bytes, rest) = self.rest.split_first_chunk().ok_or(Malformed(what))?;
        self.rest = rest;
        Ok(*bytes)
    }

    pub(crate) fn bytes(
        &mut self,
        limit: usize,
        what: &'static str,
    ) -> Result<&'a [u8], Malformed> {
        let length = self.count(1, what)?;
        if length > limit {
            return Err(Malformed(what));
        }
        self.raw(length, what)
    }

    /// Nothing may follow.
    pub(crate) fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed("the end")) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_round_trip(unsigned: u64, signed: i64) {
            let mut encoder = Encoder::default();
            encoder.number(unsigned);
            encoder.signed(signed);
            let bytes = encoder.finish();
            let mut decoder = Decoder::new(&bytes);
            prop_assert_eq!(decoder.number("n"), Ok(unsigned));
            prop_assert_eq!(decoder.signed("s"), Ok(signed));
            prop_assert_eq!(decoder.end(), Ok(()));
        }

        #[test]
        fn garbage_is_refused_or_read_but_never_runs_past_its_end(bytes: Vec<u8>) {
            let mut decoder = Decoder::new(&bytes);
            while decoder.number("n").is_ok() {}
            let _ = decoder.count(4, "c").map(|count| assert!(count * 4 <= bytes.len()));
        }
    }

    #[test]
    fn a_number_has_one_notation() {
        assert_eq!(Decoder::new(&[0x80, 0]).number("n"), Err(Malformed("n")));
        assert_eq!(Decoder::new(&[0xff; 10]).number("n"), Err(Malformed("n")));
        assert_eq!(Decoder::new(&[0]).number("n"), Ok(0));
    }
}
