//! Two data directories, page by page. What a server may change without writing WAL is set aside, as the server's own
//! `wal_consistency_checking` does (`rm_mask`): positions, checksums, hint bits, free space inside a page.
//!
//! Not compared: free space maps, which are not logged at all, and visibility maps, which may lag behind in either copy;
//! both are hints that the server checks before it believes them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};

use postgres::control_file::ControlFile;
use postgres::relation::{Fork, RelationFile};

const TABLESPACES: &str = "pg_tblspc";
const HEADER: usize = 24;
/// So much of two files is in memory at a time: pages of every size fit in.
const PIECE_BYTES: usize = 1 << 20;
/// `HEAP_XACT_MASK`: the bits of a row's `t_infomask` that say how its transactions ended.
const HEAP_XACT_MASK: u16 = 0xfff0;
const HEAP_XMIN_FROZEN: u16 = 0x0300;
const HEAP_XMAX_HINTS: u16 = 0x0c00;
const LINE_NORMAL: u32 = 1;
/// `BTP_LEAF`, and the flags that are hints: `BTP_SPLIT_END`, `BTP_HAS_GARBAGE`.
const BTREE_LEAF: u16 = 1;
const BTREE_HINTS: u16 = (1 << 5) | (1 << 6);

/// What was compared.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub(crate) files: usize,
    pub(crate) pages: usize,
    /// Those of the files that lie in tablespaces.
    pub(crate) in_tablespaces: usize,
}

/// Fails when the relations below two data directories are not the same.
pub(crate) fn same_pages(one: &Path, other: &Path) -> Compared {
    let (left, right) = (relations(one), relations(other));
    let names = |files: &BTreeMap<String, PathBuf>| files.keys().cloned().collect::<BTreeSet<_>>();
    let differ: Vec<_> = names(&left).symmetric_difference(&names(&right)).cloned().collect();
    assert!(differ.is_empty(), "in one of the two only: {differ:?}");
    let mut compared = Compared::default();
    let page_bytes = ControlFile::read(one).unwrap().block_size as usize;
    for (name, path) in left {
        compared.files += 1;
        compared.in_tablespaces += usize::from(name.starts_with(TABLESPACES));
        compared.pages += same_file(&name, page_bytes, &path, &right[&name]);
    }
    compared
}

fn same_file(name: &str, page_bytes: usize, one: &Path, other: &Path) -> usize {
    let (one, other) = (File::open(one).unwrap(), File::open(other).unwrap());
    let (mut left, mut right, mut pages) = (Vec::new(), Vec::new(), 0);
    loop {
        for (file, piece) in [(&one, &mut left), (&other, &mut right)] {
            piece.clear();
            file.take(PIECE_BYTES as u64).read_to_end(piece).unwrap();
        }
        if left.is_empty() && right.is_empty() {
            return pages;
        }
        // A file may have been made longer without a word in the WAL; nothing is on the pages it gained.
        let common = left.len().min(right.len());
        let gained = left[common..].iter().chain(&right[common..]);
        assert!(gained.copied().all(|byte| byte == 0), "{name}: one has more than the other");
        if left[..common] != right[..common] {
            let both = left[..common].chunks_mut(page_bytes).zip(right.chunks_mut(page_bytes));
            for (number, (left, right)) in (pages..).zip(both) {
                same_page(name, number, page_bytes, left, right);
            }
        }
        pages += common / page_bytes;
    }
}

fn same_page(name: &str, number: usize, page_bytes: usize, left: &mut [u8], right: &mut [u8]) {
    if left == right {
        return;
    }
    assert_eq!(left.len(), page_bytes, "{name}: its last page is not whole");
    mask(left);
    mask(right);
    let first = left.iter().zip(right.iter()).position(|(left, right)| left != right);
    if let Some(at) = first {
        let shown = at.saturating_sub(8)..(at + 24).min(page_bytes);
        panic!(
            "{name}, page {number}, byte {at}: {:02x?} and {:02x?}; header {:02x?}",
            &left[shown.clone()],
            &right[shown],
            &left[..HEADER]
        );
    }
}

/// The relation files by their paths; what lies in a tablespace, by the path that leads through its link.
fn relations(root: &Path) -> BTreeMap<String, PathBuf> {
    let mut found = BTreeMap::new();
    let mut open = vec![root.join("base"), root.join("global")];
    for space in root.join(TABLESPACES).read_dir().unwrap() {
        let inside = space.unwrap().path().read_dir().unwrap().map(|entry| entry.unwrap().path());
        // Beside its directory of a version there is what is not of this tablespace, maybe another one.
        open.extend(
            inside.filter(|path| path.file_name().unwrap().as_encoded_bytes().starts_with(b"PG_")),
        );
    }
    while let Some(directory) = open.pop() {
        for entry in directory.read_dir().unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
                continue;
            }
            let file = RelationFile::parse(path.file_name().unwrap().to_str().unwrap());
            if file.is_some_and(|file| matches!(file.fork, Fork::Main | Fork::Init)) {
                let name = path.strip_prefix(root).unwrap().display().to_string();
                found.insert(name, path);
            }
        }
    }
    found
}

fn u16_at(page: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([page[at], page[at + 1]])
}

fn set_u16(page: &mut [u8], at: usize, value: u16) {
    page[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

fn mask(page: &mut [u8]) {
    let (lower, upper, special) = (
        usize::from(u16_at(page, 12)),
        usize::from(u16_at(page, 14)),
        usize::from(u16_at(page, 16)),
    );
    // Position and checksum, the flags (all three are hints), the oldest transaction to prune.
    page[..12].fill(0);
    page[20..24].fill(0);
    if !(HEADER <= lower && lower <= upper && upper <= special && special <= page.len()) {
        return;
    }
    page[lower..upper].fill(0);
    let lines: Vec<usize> = (HEADER..lower).step_by(4).collect();
    match page.len() - special {
        0 => lines.iter().for_each(|line| mask_row(page, *line)),
        16 => mask_btree(page, special, &lines),
        // Sequences have no more to set aside.
        _ => {}
    }
}

/// A row of a table.
fn mask_row(page: &mut [u8], line: usize) {
    let word = u32::from_le_bytes([page[line], page[line + 1], page[line + 2], page[line + 3]]);
    let (offset, flags, length) =
        ((word & 0x7fff) as usize, (word >> 15) & 3, (word >> 17) as usize);
    if length == 0 || offset + length > page.len() {
        return;
    }
    if flags == LINE_NORMAL {
        let infomask = u16_at(page, offset + 20);
        let kept = if infomask & HEAP_XMIN_FROZEN == HEAP_XMIN_FROZEN {
            infomask & !HEAP_XMAX_HINTS
        } else {
            infomask & !HEAP_XACT_MASK
        };
        set_u16(page, offset + 20, kept);
        // The command inside its transaction is of no use after it.
        page[offset + 8..offset + 12].fill(0);
    }
    let end = (offset + length).next_multiple_of(8).min(page.len());
    page[offset + length..end].fill(0);
}

fn mask_btree(page: &mut [u8], special: usize, lines: &[usize]) {
    let flags = u16_at(page, special + 12);
    set_u16(page, special + 12, flags & !BTREE_HINTS);
    // Which vacuum saw the split.
    set_u16(page, special + 14, 0);
    if flags & BTREE_LEAF != 0 {
        for line in lines {
            // Entries are marked dead without a word: bits 15 and 16.
            page[line + 1] &= 0x7f;
            page[line + 2] &= 0xfe;
        }
    }
}
