//! How PostgreSQL 14 to 18 lay out their log in pages and records (`access/xlog_internal.h`, `access/xlogrecord.h`), for those
//! who read it: one that follows a backup's segments strictly, and one that searches single segments and takes what it can.

pub(crate) const SHORT_PAGE_HEADER: usize = 24;
pub(crate) const LONG_PAGE_HEADER: usize = 40;
/// Bits of a page's `xlp_info`.
pub(crate) const FIRST_IS_CONTINUED: u16 = 0x0001;
pub(crate) const LONG_HEADER: u16 = 0x0002;
pub(crate) const RECORD_HEADER: usize = 24;
/// `XLogRecordMaxSize`, the largest record a server writes.
pub(crate) const LARGEST_RECORD: usize = 1020 * 1024 * 1024;

pub(crate) const RMGR_XLOG: u8 = 0;
pub(crate) const RMGR_TABLESPACE: u8 = 5;
/// The bits of a record's `info` that belong to its resource manager.
pub(crate) const OPERATION: u8 = 0xf0;
pub(crate) const XLOG_SWITCH: u8 = 0x40;
pub(crate) const TABLESPACE_CREATE: u8 = 0x00;

pub(crate) const BLOCK_DATA_SHORT: u8 = 255;
pub(crate) const BLOCK_DATA_LONG: u8 = 254;
pub(crate) const BLOCK_ORIGIN: u8 = 253;
pub(crate) const BLOCK_TOPLEVEL_XID: u8 = 252;

/// Bytes of a record, field by field, in the byte order of this machine, which is the server's.
pub(crate) struct Fields<'a> {
    pub(crate) rest: &'a [u8],
}

impl Fields<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    pub(crate) fn skip(&mut self, n_bytes: usize) -> Option<()> {
        self.rest = self.rest.get(n_bytes..)?;
        Some(())
    }

    pub(crate) fn u8(&mut self) -> Option<u8> {
        self.take::<1>().map(|[byte]| byte)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    pub(crate) fn i64(&mut self) -> Option<i64> {
        self.take().map(i64::from_ne_bytes)
    }
}

/// Bytes in a page of the segment whose beginning this is; `None` where none begins.
pub(crate) fn page_size(segment: &[u8]) -> Option<usize> {
    let header = segment.get(..LONG_PAGE_HEADER)?;
    let size = u32_at(header, 36) as usize;
    let sound = size.is_power_of_two()
        && (1024..=65536).contains(&size)
        && segment.len().is_multiple_of(size);
    (sound && u16_at(header, 2) & LONG_HEADER != 0).then_some(size)
}

pub(crate) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_ne_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]))
}

pub(crate) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(std::array::from_fn(|i| bytes[at + i]))
}
