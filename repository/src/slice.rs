//! A part of all packs, so that a schedule reads everything in as many days as there are parts.

use std::fmt;
use std::str::FromStr;

use crate::pack::PackId;

/// The n-th of m parts. A pack is in the same part for ever, whatever other packs come and go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Slice {
    /// From 1.
    number: u16,
    of: u16,
}

impl Slice {
    /// Everything.
    pub const WHOLE: Self = Self { number: 1, of: 1 };

    /// The `number`-th (from 1) of `of` slices.
    pub fn new(number: u16, of: u16) -> Option<Self> {
        (1 <= number && number <= of).then_some(Self { number, of })
    }

    /// Whether it is everything.
    pub fn is_whole(self) -> bool {
        self.of == 1
    }

    /// Whether a pack belongs to it.
    pub(crate) fn has(self, pack: PackId) -> bool {
        // By a hash of the name, not the name itself: whoever chose names could not choose the part.
        let hash = blake3::hash(&pack.0);
        let place = hash.as_bytes().first_chunk().map_or(0, |bytes| u64::from_be_bytes(*bytes));
        let part = (u128::from(place) * u128::from(self.of)) >> 64;
        part + 1 == u128::from(self.number)
    }
}

impl fmt::Display for Slice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.number, self.of)
    }
}

impl serde::Serialize for Slice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl FromStr for Slice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = || {
            let (number, of) = text.split_once('/')?;
            Self::new(number.parse().ok()?, of.parse().ok()?)
        };
        parse().ok_or_else(|| format!("{text:?} is no slice: write N/M, the N-th of M, from 1"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chance;

    #[test]
    fn every_pack_is_in_exactly_one_slice_and_the_slices_are_alike() {
        let packs: Vec<PackId> = (0..6000).map(|_| PackId(chance::random())).collect();
        for of in [1, 2, 7, 30] {
            let slices: Vec<Slice> = (1..=of).map(|n| Slice::new(n, of).unwrap()).collect();
            let mut sizes = vec![0_usize; usize::from(of)];
            for pack in &packs {
                let homes: Vec<usize> =
                    (0..slices.len()).filter(|n| slices[*n].has(*pack)).collect();
                assert_eq!(homes.len(), 1, "{pack} of {of}");
                sizes[homes[0]] += 1;
            }
            // In thirty slices, seven standard deviations.
            let mean = packs.len() / usize::from(of);
            let even = sizes.iter().all(|size| (mean / 2..=mean * 3 / 2).contains(size));
            assert!(even, "{sizes:?}");
        }
    }

    /// Were this to change, packs would wander between the days of schedules that run.
    #[test]
    fn a_pack_stays_in_its_slice_for_ever() {
        let home =
            |byte: u8| (1..=30).find(|n| Slice::new(*n, 30).unwrap().has(PackId([byte; 16])));
        let homes: Vec<_> = (0..6).filter_map(home).collect();
        assert_eq!(homes, [27, 9, 22, 5, 8, 30]);
    }

    #[test]
    fn what_is_no_slice_is_refused() {
        for good in ["1/1", "30/30", "2/7"] {
            assert_eq!(good.parse::<Slice>().unwrap().to_string(), good);
        }
        for bad in ["", "1", "0/3", "4/3", "1/0", "-1/3", "1/3/5", "a/b", "1/70000"] {
            bad.parse::<Slice>().unwrap_err();
        }
    }
}
