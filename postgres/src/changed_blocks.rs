//! Which blocks of which tables and indexes changed, as WAL summaries tell it; put together from several of them.
//!
//! Only main forks. Free space maps are not logged at all. Of visibility maps not every change names its page: depending on the minor version not
//! where a row's record clears a bit, and never yet where a truncation does without checksums. A map that was not read would show rows that are
//! gone to scans that believe it. Both are small.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

use crate::relation::{Fork, RelationFile};

/// Blocks that are kept together: 32 MiB of a relation with pages of 8 KiB cost 512 bytes.
const STRETCH_BLOCKS: u32 = 4096;
const WORD_BLOCKS: u32 = u64::BITS;
const WORDS: usize = (STRETCH_BLOCKS / WORD_BLOCKS) as usize;
/// Memory of one set. In pages of 8 KiB it is enough for changes all over 3 TiB of tables.
const BYTES_MAX: usize = 64 << 20;
/// What a stretch, and a relation that became shorter, take with the trees around them.
const STRETCH_BYTES: usize = 600;
const LENGTH_BYTES: usize = 64;

/// `DEFAULTTABLESPACE_OID` and `GLOBALTABLESPACE_OID`.
const DEFAULT_TABLESPACE: u32 = 1663;
const GLOBAL_TABLESPACE: u32 = 1664;

/// A relation as the log names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RelationName {
    /// OID of its tablespace.
    pub tablespace: u32,
    /// OID of its database; 0 for what belongs to all of them.
    pub database: u32,
    /// Its number on disk. 0 stands for all relations of the database in the tablespace.
    pub filenode: u32,
}

/// There are more changes than are kept in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the changed blocks take more than {} MiB of memory", BYTES_MAX >> 20)]
pub struct TooMany;

/// Blocks that changed in a stretch of the log.
#[derive(Debug, Default)]
pub struct ChangedBlocks {
    /// A bit for each block.
    stretches: BTreeMap<(RelationName, u32), Box<[u64; WORDS]>>,
    /// The fewest blocks that a relation had meanwhile: it was created, dropped or truncated.
    lengths: HashMap<RelationName, u32>,
    /// Tablespace and database: all relations there may be others than before.
    recreated: HashSet<(u32, u32)>,
}

/// How the files of one cluster are cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileShape {
    /// Bytes in a page.
    pub block_size: u32,
    /// Blocks in a file of a large relation.
    pub segment_blocks: u32,
}

impl RelationName {
    /// The relation to which a file belongs, from its path below the data directory.
    pub fn of(path: &str, file: RelationFile) -> Option<Self> {
        let parts: Vec<&str> = path.split('/').collect();
        let (tablespace, database) = match parts[..] {
            ["global", _] => (GLOBAL_TABLESPACE, 0),
            ["base", database, _] => (DEFAULT_TABLESPACE, database.parse().ok()?),
            ["pg_tblspc", tablespace, _, database, _] => {
                (tablespace.parse().ok()?, database.parse().ok()?)
            }
            _ => return None,
        };
        Some(Self { tablespace, database, filenode: file.filenode })
    }
}

impl ChangedBlocks {
    /// A block changed.
    pub fn add_block(&mut self, relation: RelationName, block: u32) -> Result<(), TooMany> {
        let within = block % STRETCH_BLOCKS;
        let stretch = self.stretches.entry((relation, block / STRETCH_BLOCKS));
        let words = stretch.or_insert_with(|| Box::new([0; WORDS]));
        words[(within / WORD_BLOCKS) as usize] |= 1 << (within % WORD_BLOCKS);
        self.fits()
    }

    /// A relation had this many blocks and no more, if only for a moment.
    pub fn add_length(&mut self, relation: RelationName, blocks: u32) -> Result<(), TooMany> {
        if relation.filenode == 0 {
            self.recreated.insert((relation.tablespace, relation.database));
        } else {
            let length = self.lengths.entry(relation).or_insert(blocks);
            *length = blocks.min(*length);
        }
        self.fits()
    }

    fn fits(&self) -> Result<(), TooMany> {
        let lengths = self.lengths.len() + self.recreated.len();
        let bytes = self.stretches.len() * STRETCH_BYTES + lengths * LENGTH_BYTES;
        if bytes > BYTES_MAX { Err(TooMany) } else { Ok(()) }
    }

    /// The bytes of a file that may have changed, ascending and apart, the last of them perhaps beyond its end. `None` where nothing
    /// is known of it: all of it may have.
    pub fn in_file(
        &self,
        path: &str,
        file: RelationFile,
        size_bytes: u64,
        shape: FileShape,
    ) -> Option<Vec<Range<u64>>> {
        let FileShape { block_size, segment_blocks } = shape;
        if file.fork != Fork::Main || !size_bytes.is_multiple_of(u64::from(block_size)) {
            return None;
        }
        let blocks = u32::try_from(size_bytes / u64::from(block_size)).ok()?;
        let first = file.first_block(segment_blocks)?;
        let end = first.checked_add(blocks)?;
        let relation = RelationName::of(path, file)?;
        if blocks > segment_blocks
            || self.recreated.contains(&(relation.tablespace, relation.database))
        {
            return None;
        }
        // What came behind that length since is not what was there before, whether it was written to or not.
        let length = self.lengths.get(&relation).copied().unwrap_or(u32::MAX);
        if length <= first {
            return None;
        }
        let bytes = |block: u32| u64::from(block - first) * u64::from(block_size);
        let mut ranges: Vec<Range<u64>> = Vec::new();
        for block in self.blocks(relation, first..end.min(length)) {
            let range = bytes(block)..bytes(block + 1);
            match ranges.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => ranges.push(range),
            }
        }
        if length < end {
            ranges.push(bytes(length)..size_bytes);
        }
        Some(ranges)
    }

    /// Blocks of a relation that changed, ascending.
    fn blocks(&self, relation: RelationName, within: Range<u32>) -> impl Iterator<Item = u32> {
        let stretches = within.start / STRETCH_BLOCKS..within.end.div_ceil(STRETCH_BLOCKS);
        let found = self.stretches.range((relation, stretches.start)..(relation, stretches.end));
        found
            .flat_map(|((_, stretch), words)| {
                let first = stretch * STRETCH_BLOCKS;
                (0..STRETCH_BLOCKS)
                    .filter(|at| {
                        words[(at / WORD_BLOCKS) as usize] & (1 << (at % WORD_BLOCKS)) != 0
                    })
                    .map(move |at| first + at)
            })
            .filter(move |block| within.contains(block))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: FileShape = FileShape { block_size: 8192, segment_blocks: 1 << 17 };

    fn relation(filenode: u32) -> RelationName {
        RelationName { tablespace: 1663, database: 5, filenode }
    }

    /// As blocks.
    fn changed(set: &ChangedBlocks, name: &str, blocks: u64) -> Option<Vec<(u64, u64)>> {
        let file = RelationFile::parse(name).unwrap();
        let found = set.in_file(&format!("base/5/{name}"), file, blocks * 8192, SHAPE)?;
        Some(found.into_iter().map(|range| (range.start / 8192, range.end / 8192)).collect())
    }

    #[test]
    fn files_have_the_names_that_the_log_gives_their_relations() {
        let of = |path: &str| {
            let name = path.rsplit('/').next().unwrap();
            let relation = RelationName::of(path, RelationFile::parse(name).unwrap())?;
            Some((relation.tablespace, relation.database, relation.filenode))
        };
        assert_eq!(of("base/5/16384.2"), Some((1663, 5, 16384)));
        assert_eq!(of("global/1262"), Some((1664, 0, 1262)));
        assert_eq!(of("pg_tblspc/16400/PG_18_202506291/5/7"), Some((16400, 5, 7)));
        for path in ["7", "base/7", "base/five/7", "pg_tblspc/16400/5/7", "else/5/7"] {
            assert_eq!(of(path), None, "{path}");
        }
    }

    #[test]
    fn blocks_are_told_in_the_file_in_which_they_are() {
        let mut set = ChangedBlocks::default();
        for block in [9, 3, 4, 3, (1 << 17) - 1, 1 << 17, (1 << 17) + 4096] {
            set.add_block(relation(7), block).unwrap();
        }
        assert_eq!(
            changed(&set, "7", 1 << 17),
            Some(vec![(3, 5), (9, 10), ((1 << 17) - 1, 1 << 17)])
        );
        assert_eq!(changed(&set, "7.1", 5000), Some(vec![(0, 1), (4096, 4097)]));
        assert_eq!(changed(&set, "7.1", 4096), Some(vec![(0, 1)]), "it has become shorter since");
        assert_eq!(changed(&set, "7.2", 10), Some(vec![]));
        assert_eq!(changed(&set, "8", 10), Some(vec![]), "nobody wrote to another relation");
    }

    #[test]
    fn behind_the_fewest_blocks_of_a_relation_everything_may_be_new() {
        let mut set = ChangedBlocks::default();
        for (blocks, block) in [(100, 2), (7, 90), (50, 20)] {
            set.add_length(relation(7), blocks).unwrap();
            set.add_block(relation(7), block).unwrap();
        }
        assert_eq!(changed(&set, "7", 200), Some(vec![(2, 3), (7, 200)]));
        assert_eq!(changed(&set, "7", 7), Some(vec![(2, 3)]));
        assert_eq!(changed(&set, "7.1", 10), None, "its files behind the first were gone");
        set.add_length(relation(7), 1 << 17).unwrap();
        set.add_length(relation(8), 1 << 17).unwrap();
        assert_eq!(changed(&set, "8", 1 << 17), Some(vec![]));
        assert_eq!(changed(&set, "8.1", 10), None);
        set.add_length(relation(9), 0).unwrap();
        assert_eq!(changed(&set, "9", 10), None, "it was dropped or created");
    }

    #[test]
    fn of_a_database_that_was_made_anew_nothing_is_known() {
        let mut set = ChangedBlocks::default();
        set.add_length(relation(0), 0).unwrap();
        assert_eq!(changed(&set, "7", 10), None);
        let elsewhere = RelationFile::parse("7").unwrap();
        assert_eq!(set.in_file("base/6/7", elsewhere, 8192, SHAPE), Some(vec![]));
        let path = "pg_tblspc/16400/PG_18_202506291/5/7";
        assert_eq!(set.in_file(path, elsewhere, 8192, SHAPE), Some(vec![]));
    }

    #[test]
    fn of_what_the_log_does_not_tell_nothing_is_known() {
        let set = ChangedBlocks::default();
        for name in ["7_fsm", "7_vm", "7_init"] {
            assert_eq!(changed(&set, name, 1), None, "{name}");
        }
        let file = RelationFile::parse("7").unwrap();
        assert_eq!(set.in_file("base/5/7", file, 8191, SHAPE), None, "no whole pages");
        assert_eq!(set.in_file("elsewhere/7", file, 8192, SHAPE), None);
        assert_eq!(set.in_file("base/5/7", file, ((1 << 17) + 1) * 8192, SHAPE), None);
    }

    #[test]
    fn memory_has_a_bound() {
        let mut set = ChangedBlocks::default();
        let added = (0..).map(|n| set.add_block(relation(n % 1000), n / 1000 * STRETCH_BLOCKS));
        let fit = added.take_while(Result::is_ok).count();
        assert!((90_000..120_000).contains(&fit), "{fit} stretches of 32 MiB");
        let mut set = ChangedBlocks::default();
        let added = (1..=u32::MAX).map(|n| set.add_length(relation(n), 0));
        let fit = added.take_while(Result::is_ok).count();
        assert!((500_000..2_000_000).contains(&fit), "{fit} relations");
    }

    proptest! {
        #[test]
        fn a_block_is_told_exactly_when_it_was_added_or_lies_behind_a_length(
            added in prop::collection::btree_set(0_u32..20_000, 0..60),
            lengths in prop::collection::vec(0_u32..20_000, 0..3),
            segment in 0_u32..4,
            blocks in 0_u32..=5_000,
        ) {
            // Files of 5000 blocks.
            let shape = FileShape { block_size: 8192, segment_blocks: 5_000 };
            let mut set = ChangedBlocks::default();
            for block in &added {
                set.add_block(relation(7), *block).unwrap();
            }
            for length in &lengths {
                set.add_length(relation(7), *length).unwrap();
            }
            let file = RelationFile { filenode: 7, fork: Fork::Main, segment };
            let found = set.in_file("base/5/7", file, u64::from(blocks) * 8192, shape);
            let shortest = lengths.iter().copied().min().unwrap_or(u32::MAX);
            for block in 0..blocks {
                let number = segment * 5_000 + block;
                let at = u64::from(block) * 8192;
                let told = found.as_ref().is_none_or(|ranges| {
                    ranges.iter().any(|range| range.contains(&at))
                });
                let is_new = number >= shortest;
                // Of a file that was gone nothing is known, whatever is in it.
                let gone = shortest <= segment * 5_000;
                prop_assert_eq!(told, gone || is_new || added.contains(&number));
            }
            if let Some(ranges) = &found {
                prop_assert!(ranges.windows(2).all(|two| two[0].end < two[1].start
                    || two[1].start == u64::from(shortest - segment * 5_000) * 8192));
            }
        }
    }
}
