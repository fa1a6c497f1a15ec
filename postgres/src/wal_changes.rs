//! Which tables changed rows between two positions, and whether a tablespace came or went, read from the write-ahead log
//! itself.
//!
//! The server's statistics cannot answer that: sessions report them late, without a bound when a long transaction follows,
//! and they can be reset. The WAL of a backup passes through the worker anyway, and holds every change exactly once.
//!
//! Decodes record headers and block references only. Checks page addresses and the chain of records, not their CRC: a
//! damaged segment is found when it is stored and when it is replayed.

use std::collections::HashMap;

use proto::Lsn;

use crate::error::Error;
use crate::version::ServerVersion;
use crate::wal_layout::{
    BLOCK_DATA_LONG, BLOCK_DATA_SHORT, BLOCK_ORIGIN, BLOCK_TOPLEVEL_XID, FIRST_IS_CONTINUED,
    Fields, LARGEST_RECORD, LONG_HEADER, LONG_PAGE_HEADER, OPERATION, RECORD_HEADER,
    RMGR_TABLESPACE, RMGR_XLOG, SHORT_PAGE_HEADER, TABLESPACE_CREATE, XLOG_SWITCH, page_size,
    u16_at, u32_at, u64_at,
};

const RMGR_HEAP2: u8 = 9;
const RMGR_HEAP: u8 = 10;
const TABLESPACE_DROP: u8 = 0x10;
const HEAP_OPERATION: u8 = 0x70;
const HEAP_INSERT: u8 = 0x00;
const HEAP_DELETE: u8 = 0x10;
const HEAP2_MULTI_INSERT: u8 = 0x50;

const LARGEST_BLOCK_ID: u8 = 32;
const BLOCK_HAS_IMAGE: u8 = 0x10;
const BLOCK_SAME_RELATION: u8 = 0x80;
const IMAGE_HAS_HOLE: u8 = 0x01;

/// Row changes of one table. Updates do not count: they keep the number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RowChanges {
    /// Rows inserted, whether or not their transactions committed.
    pub inserted: u64,
    /// Rows deleted, whether or not their transactions committed.
    pub deleted: u64,
    /// Where the last of these changes begins.
    pub last: Lsn,
}

/// Reads the segments of a backup in order, each exactly once, and remembers which tables changed.
pub struct WalChanges {
    version: ServerVersion,
    start: Lsn,
    /// Everything before this position has been read.
    position: Lsn,
    record: Vec<u8>,
    record_start: Lsn,
    previous: Lsn,
    tables: HashMap<(u32, u32), RowChanges>,
    tablespaces_changed: bool,
}

impl WalChanges {
    /// Begins at `start`, the start position of a backup, which is the beginning of a record.
    pub fn new(version: ServerVersion, start: Lsn) -> Self {
        Self {
            version,
            start,
            position: start,
            record: Vec::new(),
            record_start: start,
            previous: Lsn::INVALID,
            tables: HashMap::new(),
            tablespaces_changed: false,
        }
    }

    /// Reads the next segment: the whole file, which begins at `segment_start`. The first is the one that holds the start
    /// position. The last may end in bytes of an older life of the file: reading stops where the chain of records does.
    pub fn feed(&mut self, segment_start: Lsn, bytes: &[u8]) -> Result<(), Error> {
        let end = Lsn(segment_start.0 + bytes.len() as u64);
        if !(segment_start <= self.position && self.position < end) {
            return Err(self.wrong(format!("the segment at {segment_start} is not the next one")));
        }
        let page_size = page_size(bytes)
            .ok_or_else(|| self.wrong("the segment has no long page header".to_owned()))?;
        while self.position < end {
            let offset = usize_of(self.position.0 - segment_start.0);
            let page = &bytes[offset - offset % page_size..][..page_size];
            match self.read_page(page, offset % page_size)? {
                Page::Full => {}
                // After a switch the rest of the segment is empty.
                Page::Switch => self.position = end,
                // The end of what was written when the file was read; a later segment after this would be a gap.
                Page::End => break,
            }
        }
        Ok(())
    }

    /// Everything before this position was read, as whole records.
    pub fn read_to(&self) -> Lsn {
        if self.record.is_empty() { self.position } else { self.record_start }
    }

    /// The changes of a table from `from` on, when everything from there to `until` was read: `None` when it was not, and so
    /// nothing is known. A table that changed after `from` is told with its changes since the start of the reading.
    pub fn of_table(
        &self,
        database: u32,
        file_node: u32,
        from: Lsn,
        until: Lsn,
    ) -> Option<RowChanges> {
        if from < self.start || self.read_to() < until {
            return None;
        }
        let changes = self.tables.get(&(database, file_node)).copied().unwrap_or_default();
        Some(if changes.last < from { RowChanges::default() } else { changes })
    }

    /// A tablespace was created or dropped in what was read. Replay repeats it at the tablespace's path on the machine that
    /// replays, which is not where a restore put the files. Also true for one after the stop position of the backup, when
    /// its segment was read whole; what was not read ([`Self::read_to`]) says nothing.
    pub const fn tablespaces_changed(&self) -> bool {
        self.tablespaces_changed
    }

    fn wrong(&self, what: String) -> Error {
        Error::WalFormat { at: self.position, what }
    }

    /// Reads what is left of one page.
    fn read_page(&mut self, page: &[u8], mut offset: usize) -> Result<Page, Error> {
        let page_start = Lsn(self.position.0 - offset as u64);
        let address = u64_at(page, 8);
        if address != page_start.0 {
            // A page of the file's former life: this part was not written yet.
            return if offset == 0 {
                Ok(Page::End)
            } else {
                Err(self.wrong("the page has another address".to_owned()))
            };
        }
        let flags = u16_at(page, 2);
        let header = if flags & LONG_HEADER == 0 { SHORT_PAGE_HEADER } else { LONG_PAGE_HEADER };
        if offset == 0 {
            let continues = flags & FIRST_IS_CONTINUED != 0;
            if continues == self.record.is_empty() {
                return Err(self.wrong("a record does not continue where it should".to_owned()));
            }
            if continues && u32_at(page, 16) as usize != self.missing() {
                return Err(self.wrong("a record continues with another length".to_owned()));
            }
        }
        offset = offset.max(header);
        while offset < page.len() {
            if self.record.is_empty() {
                offset = offset.next_multiple_of(8);
                // Records are aligned, so at least their length always fits on the page.
                if offset >= page.len() {
                    break;
                }
                let length = u32_at(page, offset) as usize;
                self.position = Lsn(page_start.0 + offset as u64);
                if length == 0 {
                    return Ok(Page::End);
                }
                if !(RECORD_HEADER..=LARGEST_RECORD).contains(&length) {
                    return Err(self.wrong(format!("a record of {length} bytes")));
                }
                self.record_start = self.position;
            }
            let wanted =
                if self.record.is_empty() { u32_at(page, offset) as usize } else { self.missing() };
            let taken = wanted.min(page.len() - offset);
            self.record.extend_from_slice(&page[offset..offset + taken]);
            offset += taken;
            // As the server counts: a record ends where the next one could begin.
            self.position = Lsn(page_start.0 + offset.next_multiple_of(8).min(page.len()) as u64);
            if self.missing() == 0 {
                let record = std::mem::take(&mut self.record);
                let more = self.read_record(&record);
                self.record = record;
                self.record.clear();
                if more? == Next::Segment {
                    return Ok(Page::Switch);
                }
            }
        }
        self.position = Lsn(page_start.0 + page.len() as u64);
        Ok(Page::Full)
    }

    fn missing(&self) -> usize {
        let Some(length) = self.record.get(..4) else { return 4 - self.record.len() };
        u32_at(length, 0) as usize - self.record.len()
    }

    fn read_record(&mut self, record: &[u8]) -> Result<Next, Error> {
        let previous = Lsn(u64_at(record, 8));
        if self.previous != Lsn::INVALID && previous != self.previous {
            return Err(
                self.wrong(format!("the record at {} has another predecessor", self.record_start))
            );
        }
        self.previous = self.record_start;
        let (info, manager) = (record[16], record[17]);
        match manager {
            RMGR_XLOG if info & OPERATION == XLOG_SWITCH => return Ok(Next::Segment),
            RMGR_TABLESPACE if matches!(info & OPERATION, TABLESPACE_CREATE | TABLESPACE_DROP) => {
                self.tablespaces_changed = true;
            }
            RMGR_HEAP if matches!(info & HEAP_OPERATION, HEAP_INSERT | HEAP_DELETE) => {
                let (table, _) = self.first_block(record)?;
                let changes = self.changes(table);
                if info & HEAP_OPERATION == HEAP_INSERT {
                    changes.inserted += 1;
                } else {
                    changes.deleted += 1;
                }
            }
            RMGR_HEAP2 if info & HEAP_OPERATION == HEAP2_MULTI_INSERT => {
                let (table, main_data) = self.first_block(record)?;
                let rows = main_data
                    .get(2..4)
                    .ok_or_else(|| self.wrong("a multi-insert without a count".to_owned()))?;
                let rows = u64::from(u16_at(rows, 0));
                self.changes(table).inserted += rows;
            }
            _ => {}
        }
        Ok(Next::Record)
    }

    fn changes(&mut self, table: (u32, u32)) -> &mut RowChanges {
        let last = self.record_start;
        let changes = self.tables.entry(table).or_default();
        changes.last = last;
        changes
    }

    /// The table (database, file node) of a record's first block, and the record's main data.
    fn first_block<'a>(&self, record: &'a [u8]) -> Result<((u32, u32), &'a [u8]), Error> {
        self.try_first_block(record)
            .ok_or_else(|| self.wrong("a record's block references are cut short".to_owned()))
    }

    fn try_first_block<'a>(&self, record: &'a [u8]) -> Option<((u32, u32), &'a [u8])> {
        let mut fields = Fields { rest: record.get(RECORD_HEADER..)? };
        let mut table = None;
        let mut data_length = 0;
        // Headers come first, then the data they announce; they end where only that data is left.
        while fields.rest.len() > data_length {
            match fields.u8()? {
                BLOCK_DATA_SHORT => {
                    let length = usize::from(fields.u8()?);
                    return Some((table?, record.get(record.len().checked_sub(length)?..)?));
                }
                BLOCK_DATA_LONG => {
                    let length = fields.u32()? as usize;
                    return Some((table?, record.get(record.len().checked_sub(length)?..)?));
                }
                BLOCK_ORIGIN => {
                    fields.u16()?;
                }
                BLOCK_TOPLEVEL_XID => {
                    fields.u32()?;
                }
                block_id if block_id <= LARGEST_BLOCK_ID => {
                    let flags = fields.u8()?;
                    data_length += usize::from(fields.u16()?);
                    if flags & BLOCK_HAS_IMAGE != 0 {
                        data_length += usize::from(fields.u16()?);
                        fields.u16()?;
                        let image = fields.u8()?;
                        if self.is_compressed(image) && image & IMAGE_HAS_HOLE != 0 {
                            fields.u16()?;
                        }
                    }
                    if flags & BLOCK_SAME_RELATION == 0 {
                        fields.u32()?;
                        let relation = (fields.u32()?, fields.u32()?);
                        table.get_or_insert(relation);
                    }
                    fields.u32()?;
                }
                _ => return None,
            }
        }
        Some((table?, &[]))
    }

    /// `BKPIMAGE_*` bits: one bit for "compressed" in 14, one for each method since 15.
    fn is_compressed(&self, image: u8) -> bool {
        image & if self.version.major() < 15 { 0x02 } else { 0x04 | 0x08 | 0x10 } != 0
    }
}

/// How a page ended.
enum Page {
    Full,
    Switch,
    End,
}

#[derive(PartialEq)]
enum Next {
    Record,
    Segment,
}

fn usize_of(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_segment_that_is_not_the_next_one_is_an_error() {
        let mut changes = WalChanges::new(ServerVersion(150_000), Lsn(0x100_0028));
        assert!(changes.feed(Lsn(0x200_0000), &[0; 8192]).is_err());
        assert_eq!(changes.of_table(1, 1, Lsn(0x100_0028), Lsn(0x100_0030)), None);
    }

    /// The first segment's first page, which holds the one record: `payload` after its header.
    fn page_with(manager: u8, info: u8, payload: &[u8]) -> Vec<u8> {
        let mut page = vec![0; 8192];
        page[2..4].copy_from_slice(&LONG_HEADER.to_ne_bytes());
        page[8..16].copy_from_slice(&0x100_0000_u64.to_ne_bytes());
        page[36..40].copy_from_slice(&8192_u32.to_ne_bytes());
        let length = u32::try_from(RECORD_HEADER + payload.len()).unwrap();
        page[40..44].copy_from_slice(&length.to_ne_bytes());
        page[56..58].copy_from_slice(&[info, manager]);
        page[64..64 + payload.len()].copy_from_slice(payload);
        page
    }

    fn read(page: &[u8]) -> (WalChanges, Result<(), Error>) {
        let mut changes = WalChanges::new(ServerVersion(150_000), Lsn(0x100_0028));
        let result = changes.feed(Lsn(0x100_0000), page);
        (changes, result)
    }

    #[test]
    fn a_tablespace_that_came_or_went_is_told() {
        for (manager, info, changed) in [
            (RMGR_TABLESPACE, TABLESPACE_CREATE, true),
            (RMGR_TABLESPACE, TABLESPACE_DROP, true),
            (RMGR_TABLESPACE, 0x20, false),
            (RMGR_XLOG, TABLESPACE_DROP, false),
        ] {
            let (changes, result) = read(&page_with(manager, info, &[BLOCK_DATA_SHORT, 0]));
            result.unwrap();
            assert_eq!(changes.tablespaces_changed(), changed, "{manager} {info:#x}");
            assert_eq!(changes.read_to(), Lsn(0x100_0048), "{manager} {info:#x}");
        }
    }

    #[test]
    fn main_data_longer_than_its_record_is_an_error() {
        for payload in [&[BLOCK_DATA_SHORT, 255][..], &[BLOCK_DATA_LONG, 255, 255, 255, 255]] {
            let (_, result) = read(&page_with(RMGR_HEAP, HEAP_INSERT, payload));
            assert!(matches!(result, Err(Error::WalFormat { .. })), "{result:?}");
        }
        // A multi-insert whose main data ends before its count.
        let mut payload = vec![0, 0, 0, 0];
        payload.extend([0; 16]);
        payload.extend([BLOCK_DATA_SHORT, 3, 0, 0, 0]);
        let (_, result) = read(&page_with(RMGR_HEAP2, HEAP2_MULTI_INSERT, &payload));
        assert!(matches!(result, Err(Error::WalFormat { .. })), "{result:?}");
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 8192), flags: u16) {
            bytes[2..4].copy_from_slice(&(flags | LONG_HEADER).to_ne_bytes());
            bytes[8..16].copy_from_slice(&0x100_0000_u64.to_ne_bytes());
            bytes[36..40].copy_from_slice(&8192_u32.to_ne_bytes());
            // A plausible first record: heap, so that its block references are read.
            bytes[40..44].copy_from_slice(&200_u32.to_ne_bytes());
            bytes[56..58].copy_from_slice(&[0, RMGR_HEAP]);
            let mut changes = WalChanges::new(ServerVersion(150_000), Lsn(0x100_0028));
            let _ = changes.feed(Lsn(0x100_0000), &bytes);
        }
    }
}
