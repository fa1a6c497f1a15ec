//! Which units of a stretch have to be read, where it is known what of the file changed.

use std::ops::Range;

use crate::limits::SHARD_UNITS;

const WORD: usize = u64::BITS as usize;
const WORDS: usize = SHARD_UNITS as usize / WORD;

/// Units of one stretch, counted from its beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Needed([u64; WORDS]);

impl Needed {
    pub(super) const NOTHING: Self = Self([0; WORDS]);

    /// The units that `ranges` of the file touch, in the stretch of `length` bytes at `start`.
    pub(super) fn touched_by(
        ranges: &[Range<u64>],
        start: u64,
        length: u64,
        unit_bytes: u32,
    ) -> Self {
        let mut needed = Self::NOTHING;
        let unit_bytes = u64::from(unit_bytes);
        let end = start + length;
        let first = ranges.partition_point(|range| range.end <= start);
        for range in ranges[first..].iter().take_while(|range| range.start < end) {
            let (from, to) = (range.start.max(start) - start, range.end.min(end) - start);
            if from < to {
                for unit in from / unit_bytes..to.div_ceil(unit_bytes) {
                    needed.add(usize::try_from(unit).unwrap_or(usize::MAX));
                }
            }
        }
        needed
    }

    fn add(&mut self, unit: usize) {
        if let Some(word) = self.0.get_mut(unit / WORD) {
            *word |= 1 << (unit % WORD);
        }
    }

    /// Whether a unit has to be read.
    pub(super) fn contains(&self, unit: usize) -> bool {
        self.0.get(unit / WORD).is_none_or(|word| word & (1 << (unit % WORD)) != 0)
    }

    /// Those among the first `units` that have to be read, where they lie side by side together.
    pub(super) fn runs(&self, units: usize) -> impl Iterator<Item = Range<usize>> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = (at..units).find(|unit| self.contains(*unit))?;
            at = (start..units).find(|unit| !self.contains(*unit)).unwrap_or(units);
            Some(start..at)
        })
    }

    /// Whether none has to be.
    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_unit_that_is_touched_by_one_byte_is_needed() {
        let units = |ranges: &[(u64, u64)]| {
            let ranges: Vec<_> = ranges.iter().map(|(start, end)| *start..*end).collect();
            let needed = Needed::touched_by(&ranges, 2 << 20, 2 << 20, 8192);
            (0..256).filter(|unit| needed.contains(*unit)).collect::<Vec<_>>()
        };
        let start = 2 << 20;
        assert!(units(&[]).is_empty());
        let around = [(0, start), (start + (2 << 20), u64::MAX)];
        assert!(units(&around).is_empty(), "its neighbours");
        assert_eq!(units(&[(0, start + 1)]), [0]);
        assert_eq!(units(&[(start + 8191, start + 8193)]), [0, 1]);
        assert_eq!(units(&[(start + 8192, start + 8192)]), [0; 0], "an empty range");
        assert_eq!(units(&[(start + 63 * 8192, start + 65 * 8192)]), [63, 64]);
        assert_eq!(units(&[(start + 255 * 8192, u64::MAX)]), [255]);
        assert_eq!(units(&[(0, u64::MAX)]).len(), 256);
    }

    proptest! {
        #[test]
        fn a_unit_is_needed_exactly_when_a_range_holds_a_byte_of_it(
            edges in prop::collection::btree_set(0_u64..3000, 0..20),
            start in 0_u64..4,
            length in 1_u64..=1024,
        ) {
            // Small units, so that ranges of every kind meet them: begun, filled, crossed, between two.
            let edges: Vec<u64> = edges.into_iter().collect();
            let ranges: Vec<Range<u64>> =
                edges.chunks_exact(2).map(|pair| pair[0]..pair[1]).collect();
            let start = start * 1024;
            let needed = Needed::touched_by(&ranges, start, length, 4);
            for unit in 0..256_u64 {
                let (from, to) = (start + unit * 4, (start + unit * 4 + 4).min(start + length));
                let touched = (from..to).any(|at| ranges.iter().any(|range| range.contains(&at)));
                prop_assert_eq!(needed.contains(usize::try_from(unit).unwrap()), touched);
            }
        }
    }
}
