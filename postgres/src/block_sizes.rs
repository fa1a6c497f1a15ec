//! The sizes that a server is compiled for and that are the same for all of its life: of a page, of a page of WAL, of one file
//! of a large relation.
//!
//! Nearly everybody has the usual ones. Programs of other sizes do not start a cluster: better to know that before its files
//! are restored than after.

use std::fmt;

use crate::control_file::ControlFile;

/// What a cluster has and its programs must be built for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Bytes in a page (`BLCKSZ`).
    pub page_bytes: u32,
    /// Pages in one file of a relation (`RELSEG_SIZE`).
    pub file_pages: u32,
    /// Bytes in a page of WAL (`XLOG_BLCKSZ`).
    pub wal_page_bytes: u32,
}

impl BlockSizes {
    /// Those of the cluster whose control file this is.
    pub fn of(control: &ControlFile) -> Self {
        Self {
            page_bytes: control.block_size,
            file_pages: control.relation_segment_blocks,
            wal_page_bytes: control.wal_block_size,
        }
    }

    /// The options of PostgreSQL's `configure` that make programs for them.
    pub fn configure_options(&self) -> String {
        let file_bytes = u64::from(self.file_pages) * u64::from(self.page_bytes);
        let file = match file_bytes >> 30 {
            gib if gib << 30 == file_bytes && gib > 0 => format!("--with-segsize={gib}"),
            _ => format!("--with-segsize-blocks={}", self.file_pages),
        };
        let [page, wal_page] = [self.page_bytes, self.wal_page_bytes].map(|bytes| bytes >> 10);
        format!("--with-blocksize={page} --with-wal-blocksize={wal_page} {file}")
    }
}

impl fmt::Display for BlockSizes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { page_bytes, file_pages, wal_page_bytes } = self;
        write!(
            f,
            "pages of {page_bytes} bytes, {file_pages} of them in a file, and pages of WAL of {wal_page_bytes} bytes"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_built_by_the_options_that_are_named() {
        let options = |page_bytes, file_pages, wal_page_bytes| {
            BlockSizes { page_bytes, file_pages, wal_page_bytes }.configure_options()
        };
        assert_eq!(
            options(8192, 131_072, 8192),
            "--with-blocksize=8 --with-wal-blocksize=8 --with-segsize=1"
        );
        assert_eq!(
            options(32_768, 131_072, 65_536),
            "--with-blocksize=32 --with-wal-blocksize=64 --with-segsize=4"
        );
        assert_eq!(
            options(1024, 64, 16_384),
            "--with-blocksize=1 --with-wal-blocksize=16 --with-segsize-blocks=64"
        );
    }
}
