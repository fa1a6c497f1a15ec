//! The names in a directory, in two pieces of memory instead of one for each: there may be a million of them.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt as _;

/// Names in a directory.
#[derive(Debug, Clone, Default)]
pub(crate) struct Names {
    bytes: Vec<u8>,
    /// Where each is.
    spans: Vec<Range<usize>>,
}

impl Names {
    pub(crate) fn push(&mut self, name: &OsStr) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(name.as_bytes());
        self.spans.push(start..self.bytes.len());
    }

    /// Puts them in order, each once: a directory that changes while it is read may tell a name twice.
    pub(crate) fn sort(&mut self) {
        let Self { bytes, spans } = self;
        spans.sort_unstable_by(|a, b| bytes[a.clone()].cmp(&bytes[b.clone()]));
        spans.dedup_by(|a, b| bytes[a.clone()] == bytes[b.clone()]);
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &OsStr> {
        self.spans.iter().map(|span| OsStr::from_bytes(&self.bytes[span.clone()]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_sorted_and_once() {
        let mut names = Names::default();
        for name in ["b", "", "a.b", "ab", "b", "a"] {
            names.push(name.as_ref());
        }
        names.push(OsStr::from_bytes(b"\xff"));
        names.sort();
        let sorted: Vec<&[u8]> = names.iter().map(OsStr::as_bytes).collect();
        assert_eq!(sorted, [&b""[..], b"a", b"a.b", b"ab", b"b", b"\xff"]);
    }
}
