//! What happened, read from the write-ahead log itself: commits, restore points and checkpoints, each with its time and
//! position; and tablespaces that replay will make.
//!
//! A segment is read on its own, so that a long log can be searched from its end. A record that begins in it and goes on in the
//! next one is read when the next one is at hand. Deliberately not here: what a commit changed (that is `wal_changes`).

use jiff::Timestamp;
use proto::Lsn;

use crate::crc32c::crc32c;
use crate::error::Error;
use crate::wal_layout::{
    BLOCK_DATA_LONG, BLOCK_DATA_SHORT, BLOCK_ORIGIN, BLOCK_TOPLEVEL_XID, FIRST_IS_CONTINUED,
    Fields, LARGEST_RECORD, LONG_HEADER, LONG_PAGE_HEADER, OPERATION, RECORD_HEADER,
    RMGR_TABLESPACE, RMGR_XLOG, SHORT_PAGE_HEADER, TABLESPACE_CREATE, XLOG_SWITCH, page_size,
    u16_at, u32_at, u64_at,
};

const RMGR_TRANSACTION: u8 = 1;
const XLOG_CHECKPOINT_SHUTDOWN: u8 = 0x00;
const XLOG_CHECKPOINT_ONLINE: u8 = 0x10;
const XLOG_RESTORE_POINT: u8 = 0x70;
const TRANSACTION_OPERATION: u8 = 0x70;
const COMMIT: u8 = 0x00;
const ABORT: u8 = 0x20;
const COMMIT_PREPARED: u8 = 0x30;
const ABORT_PREPARED: u8 = 0x40;
/// What follows the time of a commit, by bits: only what stands before the id of a prepared transaction.
const HAS_INFO: u8 = 0x80;
const HAS_DATABASE: u32 = 1;
const HAS_SUBTRANSACTIONS: u32 = 1 << 1;
const HAS_RELATIONS: u32 = 1 << 2;
const HAS_INVALIDATIONS: u32 = 1 << 3;
const HAS_PREPARED: u32 = 1 << 4;
const HAS_DROPPED_STATISTICS: u32 = 1 << 8;
/// Where the time of a checkpoint stands in its record, in every version we know.
const CHECKPOINT_TIME: usize = 64;
/// Bytes of a restore point's name, its end included.
const RESTORE_POINT_NAME: usize = 64;

/// Microseconds from 1970 to the server's 2000.
const EPOCH_US: i64 = 946_684_800_000_000;

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A transaction committed. Its id without the epoch; zero where it had none.
    Commit(u32),
    /// A transaction was rolled back.
    Abort(u32),
    /// Somebody named this position.
    RestorePoint(String),
    /// A checkpoint began at this time; its record was written later.
    Checkpoint,
}

/// Something that happened, when, and where its record is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Moment {
    /// What.
    pub event: Event,
    /// By the clock of the server that wrote it.
    pub at: Timestamp,
    /// Where its record begins.
    pub start: Lsn,
    /// Where the next record may begin.
    pub end: Lsn,
}

impl Moment {
    /// Whether a server that recovers to a time looks at this one: the ends of transactions and nothing else.
    pub fn ends_transaction(&self) -> bool {
        matches!(self.event, Event::Commit(_) | Event::Abort(_))
    }
}

/// A tablespace that was made. Whoever replays this makes it again, at the same place, and removes first what is in the
/// directory of its version there (`create_tablespace_directories` in `src/backend/commands/tablespace.c`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewTablespace {
    /// Its number.
    pub oid: u32,
    /// Where; empty for one inside the data directory.
    pub location: Vec<u8>,
    /// Where its record begins.
    pub start: Lsn,
}

/// What one segment says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentMoments {
    /// In the order of the log.
    pub moments: Vec<Moment>,
    /// The end of the last whole record: in a full segment near or behind its end, in the last one of a log where the log ends.
    pub end: Lsn,
    /// Where that record begins; `None` when no whole one begins in the segment.
    pub last: Option<Lsn>,
    /// In the order of the log.
    pub tablespaces: Vec<NewTablespace>,
    /// The record that goes on in the next segment may make a tablespace, too: the next segment was needed and not given.
    pub may_make_one_more: bool,
}

/// Reads the segment that starts at `segment_start`. `following` is the next one, for the record that goes on there.
pub fn read(
    major: u32,
    segment_start: Lsn,
    bytes: &[u8],
    following: Option<&[u8]>,
) -> Result<SegmentMoments, Error> {
    let page_size = page_size(bytes).ok_or_else(|| Error::WalFormat {
        at: segment_start,
        what: "the segment has no long page header".to_owned(),
    })?;
    let mut reader = Reader {
        major,
        record: Vec::new(),
        start: segment_start,
        end: segment_start,
        previous: None,
        skip: 0,
        moments: Vec::new(),
        tablespaces: Vec::new(),
    };
    let pages = bytes.chunks_exact(page_size);
    let own = pages.len();
    let following = following.unwrap_or_default().chunks_exact(page_size);
    for (number, page) in pages.chain(following).enumerate() {
        if number >= own && reader.record.is_empty() {
            break;
        }
        let page_start = Lsn(segment_start.0 + (number * page_size) as u64);
        if !reader.page(page_start, page, number == 0, number >= own) {
            break;
        }
    }
    Ok(SegmentMoments {
        may_make_one_more: reader.may_make_a_tablespace(),
        moments: reader.moments,
        end: reader.end,
        last: reader.previous,
        tablespaces: reader.tablespaces,
    })
}

struct Reader {
    major: u32,
    /// The beginning of a record that is not complete yet.
    record: Vec<u8>,
    start: Lsn,
    end: Lsn,
    previous: Option<Lsn>,
    /// Bytes of a record of the segment before that are still to come.
    skip: usize,
    moments: Vec<Moment>,
    tablespaces: Vec<NewTablespace>,
}

impl Reader {
    /// Reads one page; `false` when the log, or what is wanted of it, ends there.
    fn page(&mut self, page_start: Lsn, page: &[u8], is_first: bool, is_following: bool) -> bool {
        // A page of the file's former life: this part was never written.
        if u64_at(page, 8) != page_start.0 {
            return false;
        }
        let flags = u16_at(page, 2);
        let continued = flags & FIRST_IS_CONTINUED != 0;
        let rest = u32_at(page, 16) as usize;
        if is_first {
            self.skip = if continued { rest } else { 0 };
        }
        let pending = self.missing();
        let fits = match (self.skip, self.record.is_empty()) {
            (0, true) => !continued,
            (0, false) => continued && rest == pending,
            (skip, _) => continued && rest == skip,
        };
        if !fits {
            return false;
        }
        let mut offset =
            if flags & LONG_HEADER == 0 { SHORT_PAGE_HEADER } else { LONG_PAGE_HEADER };
        let at = |offset: usize| Lsn(page_start.0 + offset as u64);
        while offset < page.len() {
            if self.skip > 0 {
                let taken = self.skip.min(page.len() - offset);
                offset += taken;
                self.skip -= taken;
                continue;
            }
            if self.record.is_empty() {
                // Records are aligned, so at least their length always fits on the page.
                offset = offset.next_multiple_of(8);
                if is_following {
                    return false;
                }
                if offset >= page.len() {
                    break;
                }
                let length = u32_at(page, offset) as usize;
                if !(RECORD_HEADER..=LARGEST_RECORD).contains(&length) {
                    return false;
                }
                self.start = at(offset);
                self.record.extend_from_slice(&page[offset..offset + 4]);
                offset += 4;
            }
            let taken = self.missing().min(page.len() - offset);
            self.record.extend_from_slice(&page[offset..offset + taken]);
            offset += taken;
            if self.missing() == 0 {
                let record = std::mem::take(&mut self.record);
                let end = at(offset.next_multiple_of(8).min(page.len()));
                if !self.read_record(&record, end) {
                    return false;
                }
            }
        }
        true
    }

    fn missing(&self) -> usize {
        let Some(length) = self.record.get(..4) else { return 4 - self.record.len() };
        (u32_at(length, 0) as usize).saturating_sub(self.record.len())
    }

    /// Whether the record that is not complete is one that makes a tablespace, as far as that can be seen.
    fn may_make_a_tablespace(&self) -> bool {
        !self.record.is_empty()
            && self.record.get(16..18).is_none_or(|kind| {
                kind[0] & OPERATION == TABLESPACE_CREATE && kind[1] == RMGR_TABLESPACE
            })
    }

    /// `false` when it is no record of this log, or ends what is written in this segment.
    fn read_record(&mut self, record: &[u8], end: Lsn) -> bool {
        let previous = Lsn(u64_at(record, 8));
        if self.previous.is_some_and(|before| before != previous) || previous >= self.start {
            return false;
        }
        let (info, manager) = (record[16], record[17]);
        let wanted = match manager {
            RMGR_XLOG => matches!(
                info & OPERATION,
                XLOG_CHECKPOINT_SHUTDOWN
                    | XLOG_CHECKPOINT_ONLINE
                    | XLOG_RESTORE_POINT
                    | XLOG_SWITCH
            ),
            RMGR_TRANSACTION => true,
            RMGR_TABLESPACE => info & OPERATION == TABLESPACE_CREATE,
            _ => false,
        };
        if wanted && !is_sound(record) {
            return false;
        }
        self.previous = Some(self.start);
        self.end = end;
        if manager == RMGR_XLOG && info & OPERATION == XLOG_SWITCH {
            return false;
        }
        if manager == RMGR_TABLESPACE {
            self.tablespaces.extend(new_tablespace(record, self.start).filter(|_| wanted));
        } else if wanted && let Some((event, at)) = event(self.major, record) {
            self.moments.push(Moment { event, at, start: self.start, end });
        }
        true
    }
}

fn new_tablespace(record: &[u8], start: Lsn) -> Option<NewTablespace> {
    let mut fields = Fields { rest: main_data(record)? };
    let oid = fields.u32()?;
    let location = fields.rest.split(|byte| *byte == 0).next()?.to_vec();
    Some(NewTablespace { oid, location, start })
}

fn event(major: u32, record: &[u8]) -> Option<(Event, Timestamp)> {
    let (info, manager) = (record[16], record[17]);
    let data = main_data(record)?;
    match (manager, info & OPERATION) {
        (RMGR_XLOG, XLOG_CHECKPOINT_SHUTDOWN | XLOG_CHECKPOINT_ONLINE) => {
            let mut fields = Fields { rest: data.get(CHECKPOINT_TIME..)? };
            Some((Event::Checkpoint, Timestamp::from_second(fields.i64()?).ok()?))
        }
        (RMGR_XLOG, XLOG_RESTORE_POINT) => {
            let mut fields = Fields { rest: data };
            let at = time(fields.i64()?)?;
            let name = fields.rest.get(..RESTORE_POINT_NAME).unwrap_or(fields.rest);
            let name = name.split(|byte| *byte == 0).next()?;
            Some((Event::RestorePoint(String::from_utf8_lossy(name).into_owned()), at))
        }
        (RMGR_TRANSACTION, _) => {
            let operation = info & TRANSACTION_OPERATION;
            let committed = match operation {
                COMMIT | COMMIT_PREPARED => true,
                ABORT | ABORT_PREPARED => false,
                _ => return None,
            };
            let at = time(Fields { rest: data }.i64()?)?;
            let xid = match operation {
                COMMIT | ABORT => u32_at(record, 4),
                _ => prepared(major, info, data).unwrap_or(0),
            };
            Some((if committed { Event::Commit(xid) } else { Event::Abort(xid) }, at))
        }
        _ => None,
    }
}

/// The id of a prepared transaction in the record that ended it: behind all the lists that the record may have.
fn prepared(major: u32, info: u8, data: &[u8]) -> Option<u32> {
    if info & HAS_INFO == 0 {
        return None;
    }
    let mut fields = Fields { rest: data };
    fields.i64()?;
    let has = fields.u32()?;
    if has & HAS_DATABASE != 0 {
        fields.skip(8)?;
    }
    let statistic = if major >= 18 { 16 } else { 12 };
    for (bit, size) in [
        (HAS_SUBTRANSACTIONS, 4),
        (HAS_RELATIONS, 12),
        (HAS_DROPPED_STATISTICS, statistic),
        (HAS_INVALIDATIONS, 16),
    ] {
        if has & bit != 0 {
            let count = fields.u32()? as usize;
            fields.skip(count.checked_mul(size)?)?;
        }
    }
    if has & HAS_PREPARED == 0 { None } else { fields.u32() }
}

/// What a record without block references says: headers come first, then the data they announce.
fn main_data(record: &[u8]) -> Option<&[u8]> {
    let mut fields = Fields { rest: record.get(RECORD_HEADER..)? };
    loop {
        let length = match fields.u8()? {
            BLOCK_DATA_SHORT => usize::from(fields.u8()?),
            BLOCK_DATA_LONG => fields.u32()? as usize,
            BLOCK_ORIGIN => {
                fields.skip(2)?;
                continue;
            }
            BLOCK_TOPLEVEL_XID => {
                fields.skip(4)?;
                continue;
            }
            _ => return None,
        };
        return fields.rest.get(..length);
    }
}

/// Whether the record's checksum is right: the data first, then the header before the checksum.
fn is_sound(record: &[u8]) -> bool {
    let crc = crc32c([&record[RECORD_HEADER..], &record[..RECORD_HEADER - 4]]);
    crc == u32_at(record, RECORD_HEADER - 4)
}

fn time(since_2000_us: i64) -> Option<Timestamp> {
    Timestamp::from_microsecond(since_2000_us.checked_add(EPOCH_US)?).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Lsn = Lsn(0x100_0000);
    const PAGE: usize = 1024;

    /// A log of whole pages that holds the records, one behind the other.
    fn log(records: &[(u8, u8, u32, Vec<u8>)], pages: usize) -> Vec<u8> {
        let mut stream: Vec<(Vec<u8>, usize)> = Vec::new();
        let mut bytes = vec![0; pages * PAGE];
        let mut at = LONG_PAGE_HEADER;
        let mut previous = 0_u64;
        for number in 0..pages {
            let header = &mut bytes[number * PAGE..];
            let flags = if number == 0 { LONG_HEADER } else { 0 };
            header[2..4].copy_from_slice(&flags.to_ne_bytes());
            let address = START.0 + (number * PAGE) as u64;
            header[8..16].copy_from_slice(&address.to_ne_bytes());
            if number == 0 {
                header[36..40].copy_from_slice(&u32::try_from(PAGE).unwrap().to_ne_bytes());
            }
        }
        for (manager, info, xid, data) in records {
            at = at.next_multiple_of(8);
            if at.is_multiple_of(PAGE) {
                at += SHORT_PAGE_HEADER;
            }
            let mut record = vec![0; RECORD_HEADER];
            record.push(BLOCK_DATA_LONG);
            record.extend(u32::try_from(data.len()).unwrap().to_ne_bytes());
            record.extend(data);
            let length = u32::try_from(record.len()).unwrap();
            record[..4].copy_from_slice(&length.to_ne_bytes());
            record[4..8].copy_from_slice(&xid.to_ne_bytes());
            record[8..16].copy_from_slice(&previous.to_ne_bytes());
            record[16..18].copy_from_slice(&[*info, *manager]);
            let crc = crc32c([&record[RECORD_HEADER..], &record[..20]]);
            record[20..24].copy_from_slice(&crc.to_ne_bytes());
            previous = START.0 + at as u64;
            let mut rest = &record[..];
            while !rest.is_empty() {
                if at.is_multiple_of(PAGE) {
                    bytes[at + 2] |= u8::try_from(FIRST_IS_CONTINUED).unwrap();
                    bytes[at + 16..at + 20]
                        .copy_from_slice(&u32::try_from(rest.len()).unwrap().to_ne_bytes());
                    at += SHORT_PAGE_HEADER;
                }
                let taken = rest.len().min(PAGE - at % PAGE);
                bytes[at..at + taken].copy_from_slice(&rest[..taken]);
                at += taken;
                rest = &rest[taken..];
            }
            stream.push((record, at));
        }
        bytes
    }

    fn commit(xid: u32, at_us: i64) -> (u8, u8, u32, Vec<u8>) {
        (RMGR_TRANSACTION, COMMIT, xid, (at_us - EPOCH_US).to_ne_bytes().to_vec())
    }

    fn other(length: usize) -> (u8, u8, u32, Vec<u8>) {
        (10, 0, 9, vec![7; length])
    }

    fn at(us: i64) -> Timestamp {
        Timestamp::from_microsecond(us).unwrap()
    }

    #[test]
    fn what_happened_is_told_with_its_time() {
        let mut point = (5_000_000 - EPOCH_US).to_ne_bytes().to_vec();
        point.extend(b"before_release\0rest");
        let mut checkpoint = vec![0; CHECKPOINT_TIME];
        checkpoint.extend(6_i64.to_ne_bytes());
        // Database, two subtransactions, one dropped statistic; then the prepared transaction.
        let mut two_phase = (7_000_000 - EPOCH_US).to_ne_bytes().to_vec();
        let has = HAS_DATABASE | HAS_SUBTRANSACTIONS | HAS_DROPPED_STATISTICS | HAS_PREPARED;
        two_phase.extend(has.to_ne_bytes());
        two_phase.extend([0; 8]);
        two_phase.extend(2_u32.to_ne_bytes());
        two_phase.extend([0; 8]);
        two_phase.extend(1_u32.to_ne_bytes());
        two_phase.extend([0; 12]);
        two_phase.extend(77_u32.to_ne_bytes());
        let log = log(
            &[
                commit(700, 4_000_000),
                (RMGR_XLOG, XLOG_RESTORE_POINT, 0, point),
                other(2000),
                (RMGR_XLOG, XLOG_CHECKPOINT_ONLINE, 0, checkpoint),
                (RMGR_TRANSACTION, COMMIT_PREPARED | HAS_INFO, 0, two_phase),
                (RMGR_TRANSACTION, ABORT, 701, (8_000_000 - EPOCH_US).to_ne_bytes().to_vec()),
            ],
            8,
        );
        let read = read(15, START, &log, None).unwrap();
        let told: Vec<(Event, Timestamp)> =
            read.moments.iter().map(|moment| (moment.event.clone(), moment.at)).collect();
        let expected = vec![
            (Event::Commit(700), at(4_000_000)),
            (Event::RestorePoint("before_release".to_owned()), at(5_000_000)),
            (Event::Checkpoint, at(6_000_000)),
            (Event::Commit(77), at(7_000_000)),
            (Event::Abort(701), at(8_000_000)),
        ];
        assert_eq!(told, expected);
        assert_eq!(read.moments[0].start, Lsn(START.0 + 40));
        assert_eq!(read.end, read.moments[4].end);
    }

    #[test]
    fn a_tablespace_that_replay_will_make_is_told_also_across_two_segments() {
        let create = |length: usize| {
            let mut data = 16_390_u32.to_ne_bytes().to_vec();
            data.extend(vec![b'x'; length]);
            data.push(0);
            (RMGR_TABLESPACE, TABLESPACE_CREATE, 9, data)
        };
        let dropped = (RMGR_TABLESPACE, 0x10, 9, vec![0; 4]);
        // The last record ends in the first page, or has its beginning there: all of its header, or 8 bytes of it.
        for (before, told, may) in [(500, 2, false), (800, 1, true), (864, 1, true)] {
            let records = [create(3), dropped.clone(), other(before), create(100)];
            let whole = log(&records, 2);
            let (first, second) = whole.split_at(PAGE);
            let alone = read(15, START, first, None).unwrap();
            assert_eq!((alone.tablespaces.len(), alone.may_make_one_more), (told, may), "{before}");
            assert_eq!(alone.tablespaces[0].oid, 16_390);
            assert_eq!(alone.tablespaces[0].location, b"xxx");
            assert_eq!(alone.tablespaces[0].start, Lsn(START.0 + 40));
            let both = read(15, START, first, Some(second)).unwrap();
            assert_eq!((both.tablespaces.len(), both.may_make_one_more), (2, false), "{before}");
            assert_eq!(both.tablespaces[1].location, vec![b'x'; 100]);
        }
        let [long, short] = [other(800), other(2000)].map(|record| log(&[record], 3));
        let first = |log: &[u8]| read(15, START, &log[..PAGE], None).unwrap().may_make_one_more;
        assert!(!first(&long) && !first(&short), "another record that goes on makes none");
    }

    #[test]
    fn a_record_that_goes_on_in_the_next_segment_is_read_with_it_and_not_twice() {
        // What lies across the cut: a commit, of which 8 bytes are before it; and then a big record.
        for (length, of_the_first) in [(900, 2), (960, 1)] {
            let records = [
                commit(700, 4_000_000),
                other(length),
                commit(701, 5_000_000),
                commit(702, 6_000_000),
            ];
            let whole = log(&records, 4);
            let (first, second) = whole.split_at(PAGE);
            let alone = read(15, START, first, None).unwrap();
            assert_eq!(alone.moments.len(), 1);
            assert_eq!(read(15, START, &whole, None).unwrap().moments.len(), 3);
            let beyond = read(15, START, first, Some(second)).unwrap();
            assert_eq!(beyond.moments.len(), of_the_first, "the others are the next segment's");
            assert!(beyond.end > alone.end, "what lies across the cut is whole now");
        }
    }

    #[test]
    fn what_is_no_record_of_this_log_ends_it() {
        let mut log = log(&[commit(700, 4_000_000), commit(701, 5_000_000)], 2);
        let whole = read(15, START, &log, None).unwrap();
        assert_eq!(whole.moments.len(), 2);
        let second = usize::try_from(whole.moments[1].start.0 - START.0).unwrap();
        log[second + RECORD_HEADER + 6] ^= 1;
        let cut = read(15, START, &log, None).unwrap();
        assert_eq!((cut.moments.len(), cut.end), (1, whole.moments[0].end));
        log[8] ^= 1;
        assert!(read(15, START, &log, None).unwrap().moments.is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in proptest::collection::vec(any::<u8>(), 2 * PAGE), flags: u16, skip in 0_u32..3000) {
            bytes[2..4].copy_from_slice(&(flags | LONG_HEADER).to_ne_bytes());
            bytes[8..16].copy_from_slice(&START.0.to_ne_bytes());
            bytes[16..20].copy_from_slice(&skip.to_ne_bytes());
            bytes[36..40].copy_from_slice(&u32::try_from(PAGE).unwrap().to_ne_bytes());
            bytes[40..44].copy_from_slice(&60_u32.to_ne_bytes());
            let _ = read(15, START, &bytes, Some(&bytes));
        }
    }
}
