//! How the bytes of a fuzzer are read: a choice, and edits of something valid or bytes as they are.

/// Edits that are made at most, so that an input stays close to what is valid.
const EDITS_MAX: usize = 64;

/// Who is meant to have made the input.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Choice {
    /// Somebody without the key.
    Forged,
    /// A writer with the key.
    Authentic,
}

/// One input.
#[derive(Debug, Clone, Copy)]
pub(super) struct Input<'a> {
    pub(super) choice: Choice,
    /// Whether it edits something valid.
    pub(super) is_edited: bool,
    rest: &'a [u8],
}

impl<'a> Input<'a> {
    pub(super) fn new(data: &'a [u8]) -> Option<Self> {
        let (first, rest) = data.split_first()?;
        let choice = if first & 2 == 0 { Choice::Forged } else { Choice::Authentic };
        Some(Self { choice, is_edited: first & 1 == 1, rest })
    }

    /// The bytes that a parser is to see.
    pub(super) fn bytes(&self, valid: &[u8]) -> Vec<u8> {
        if !self.is_edited {
            return self.rest.to_vec();
        }
        let mut bytes = valid.to_vec();
        for edit in self.rest.chunks_exact(4).take(EDITS_MAX) {
            let [what, high, low, value] = *edit else { continue };
            if bytes.is_empty() {
                break;
            }
            let at = usize::from(u16::from_be_bytes([high, low])) % bytes.len();
            match what % 6 {
                0 => bytes[at] ^= value,
                1 => bytes[at] = value,
                2 => bytes.insert(at, value),
                3 => drop(bytes.remove(at)),
                4 => bytes.truncate(at),
                _ => {
                    let end = (at + usize::from(value)).min(bytes.len());
                    bytes.extend_from_within(at..end);
                }
            }
        }
        bytes
    }
}
