//! Reads an archive as it passes by, in pieces of any length.

use std::collections::HashMap;

use super::cursor::{Cursor, Head, Stop, number};
use super::{Archive, Block, Contents};
use crate::error::Error;

/// How the rows of a table end, behind the end of its last row.
const ROWS_END: &[u8] = b"\\.\n\n\n";
/// How many ends of lines that has.
const ROWS_END_LINES: u64 = 3;
/// The end of the last row, and the end of the rows.
const TAIL_BYTES: usize = ROWS_END.len() + 1;
/// The longest thing of known length that may come in two parts: a kind and a number.
const PARTIAL_BYTES: usize = 10;

/// An archive of which a part has been read.
#[derive(Debug, Default)]
pub struct Reader {
    state: State,
    /// What of head or contents, or of a number, is not there as a whole yet.
    partial: Vec<u8>,
    head: Option<Head>,
    contents: Contents,
    /// Of each entry with a block: whether it has rows, and whether the block has been seen.
    expected: HashMap<u32, Expected>,
    blocks: Vec<Block>,
    block: Open,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum State {
    #[default]
    Contents,
    /// A block begins, or the archive is at its end.
    Between,
    /// A large object begins, or the objects are at their end.
    Object,
    /// The length of a piece.
    Length,
    /// Bytes of a piece.
    Piece(u64),
}

#[derive(Debug, Clone, Copy)]
struct Expected {
    has_rows: bool,
    seen: bool,
}

/// The block that is being read.
#[derive(Debug, Default, Clone, Copy)]
struct Open {
    id: u32,
    bytes: u64,
    has_objects: bool,
    has_rows: bool,
    /// Bytes of rows.
    content: u64,
    lines: u64,
    tail: [u8; TAIL_BYTES],
}

impl Reader {
    /// Nothing has been read.
    pub fn new() -> Self {
        Self::default()
    }

    /// What the archive says that it holds, as soon as that has been read.
    pub fn contents(&self) -> Option<&Contents> {
        (self.state != State::Contents).then_some(&self.contents)
    }

    /// Reads on. After an error nothing more can be read.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if self.state != State::Contents {
            return self.blocks(bytes);
        }
        self.partial.extend_from_slice(bytes);
        let read = self.read_contents()?;
        self.partial.drain(..read);
        if self.state == State::Contents {
            return Ok(());
        }
        let rest = std::mem::take(&mut self.partial);
        self.blocks(&rest)
    }

    /// There is no more of it: all that it says it holds must have been read, and nothing else.
    pub fn end(self) -> Result<Archive, Error> {
        match self.state {
            State::Contents => return wrong("it ends within its contents"),
            State::Between if self.partial.is_empty() => {}
            State::Between => return wrong("it ends where a block begins"),
            _ => return wrong(format!("it ends within the data of entry {}", self.block.id)),
        }
        match self.expected.iter().filter(|(_, expected)| !expected.seen).map(|(id, _)| id).min() {
            None => Ok(Archive { contents: self.contents, blocks: self.blocks }),
            Some(id) => wrong(format!("it has no data of entry {id}")),
        }
    }

    /// Reads what is there of head and contents, and says how much that was.
    fn read_contents(&mut self) -> Result<usize, Error> {
        let mut read = 0;
        loop {
            let mut cursor = Cursor::new(&self.partial[read..], self.number_bytes());
            let got = match self.head {
                None => cursor.head().map(|head| self.head = Some(head)),
                Some(head) => cursor.entry(head).map(|entry| self.contents.entries.push(entry)),
            };
            let now = self.partial.len() - cursor.left();
            match got {
                Ok(()) => {}
                Err(Stop::Short) => return Ok(read),
                Err(Stop::Wrong(what)) => return wrong(what),
            }
            self.contents.bytes += (now - read) as u64;
            read = now;
            let entries = self.head.map_or(0, |head| head.entries);
            if self.contents.entries.len() as u64 == u64::from(entries) {
                let with_data = self.contents.entries.iter().filter(|entry| entry.has_data);
                self.expected = with_data
                    .map(|entry| (entry.id, Expected { has_rows: entry.has_rows, seen: false }))
                    .collect();
                self.state = State::Between;
                return Ok(read);
            }
        }
    }

    fn number_bytes(&self) -> usize {
        self.head.map_or(4, |head| head.number_bytes)
    }

    fn blocks(&mut self, mut bytes: &[u8]) -> Result<(), Error> {
        while !bytes.is_empty() {
            match self.state {
                State::Contents => return wrong("a block before the contents"),
                State::Between => {
                    let Some(read) = self.part(&mut bytes, 2 + self.number_bytes()) else { break };
                    self.begin(read[0], number(&read[1..2 + self.number_bytes()]))?;
                }
                State::Object => {
                    let Some(object) = self.number(&mut bytes) else { break };
                    if object == 0 {
                        self.finish()?;
                    } else {
                        self.state = State::Length;
                    }
                }
                State::Length => {
                    let Some(length) = self.number(&mut bytes) else { break };
                    match u64::try_from(length) {
                        Ok(0) if self.block.has_objects => self.state = State::Object,
                        Ok(0) => self.finish()?,
                        Ok(length) => self.state = State::Piece(length),
                        Err(_) => {
                            let id = self.block.id;
                            return wrong(format!("{length} bytes in the data of entry {id}"));
                        }
                    }
                }
                State::Piece(left) => {
                    let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
                    let (piece, rest) = bytes.split_at(here);
                    bytes = rest;
                    self.block.read(piece);
                    let left = left - here as u64;
                    self.state = if left == 0 { State::Length } else { State::Piece(left) };
                }
            }
        }
        Ok(())
    }

    /// The next so many bytes, when they are there.
    fn part(&mut self, bytes: &mut &[u8], length: usize) -> Option<[u8; PARTIAL_BYTES]> {
        let wanted = length - self.partial.len();
        let (taken, rest) = bytes.split_at(wanted.min(bytes.len()));
        *bytes = rest;
        let mut whole = [0; PARTIAL_BYTES];
        if self.partial.is_empty() && taken.len() == length {
            whole[..length].copy_from_slice(taken);
        } else {
            self.partial.extend_from_slice(taken);
            if self.partial.len() < length {
                return None;
            }
            whole[..length].copy_from_slice(&self.partial);
            self.partial.clear();
        }
        self.block.bytes += length as u64;
        Some(whole)
    }

    fn number(&mut self, bytes: &mut &[u8]) -> Option<i64> {
        let length = 1 + self.number_bytes();
        self.part(bytes, length).map(|read| number(&read[..length]))
    }

    fn begin(&mut self, kind: u8, id: i64) -> Result<(), Error> {
        let entry = u32::try_from(id).ok().and_then(|id| Some((id, self.expected.get_mut(&id)?)));
        let Some((id, expected)) = entry else {
            return wrong(format!("it has data of entry {id}, which has none by its contents"));
        };
        if std::mem::replace(&mut expected.seen, true) {
            return wrong(format!("it has the data of entry {id} twice"));
        }
        let has_objects = match kind {
            1 => false,
            3 => true,
            other => return wrong(format!("data of kind {other} for entry {id}")),
        };
        let bytes = self.block.bytes;
        let has_rows = expected.has_rows;
        self.block = Open { id, bytes, has_objects, has_rows, ..Open::default() };
        self.state = if has_objects { State::Object } else { State::Length };
        Ok(())
    }

    fn finish(&mut self) -> Result<(), Error> {
        let block = std::mem::take(&mut self.block);
        let rows = if block.has_rows { Some(block.rows()?) } else { None };
        self.blocks.push(Block { id: block.id, bytes: block.bytes, rows });
        self.state = State::Between;
        Ok(())
    }
}

impl Open {
    fn read(&mut self, piece: &[u8]) {
        self.bytes += piece.len() as u64;
        if !self.has_rows {
            return;
        }
        self.content += piece.len() as u64;
        // A line end within a value is written as two other characters.
        self.lines += memchr::memchr_iter(b'\n', piece).count() as u64;
        if let Some(tail) = piece.last_chunk() {
            self.tail = *tail;
        } else {
            self.tail.rotate_left(piece.len());
            self.tail[TAIL_BYTES - piece.len()..].copy_from_slice(piece);
        }
    }

    /// How many rows there were, one on each line.
    fn rows(&self) -> Result<u64, Error> {
        let is_empty = self.content == ROWS_END.len() as u64;
        if &self.tail[1..] == ROWS_END && (is_empty || self.tail[0] == b'\n') {
            return Ok(self.lines - ROWS_END_LINES);
        }
        wrong(format!("the rows of entry {} do not end as they should", self.id))
    }
}

fn wrong<T>(what: impl Into<String>) -> Result<T, Error> {
    Err(Error::Archive { what: what.into() })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::archive::Section;

    /// Taken by `pg_dump` 15.
    fn stored(path: &str) -> Vec<u8> {
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../repository/tests/golden");
        std::fs::read(golden.join("v1-dump/content").join(path)).unwrap()
    }

    fn read(pieces: &[&[u8]]) -> Result<Archive, Error> {
        let mut reader = Reader::new();
        for piece in pieces {
            reader.push(piece)?;
        }
        reader.end()
    }

    #[test]
    fn contents_blocks_and_rows_of_an_archive_are_known_to_the_byte() {
        let bytes = stored("1/shop.dump");
        let archive = read(&[&bytes]).unwrap();
        let blocks: u64 = archive.blocks.iter().map(|block| block.bytes).sum();
        assert_eq!(archive.contents.bytes + blocks, bytes.len() as u64);
        let rows = |name: &str| {
            let entry = archive.contents.entries.iter().find(|entry| {
                entry.table() == Some(("public", name)) && entry.section == Some(Section::Data)
            });
            let id = entry.unwrap().id;
            archive.blocks.iter().find(|block| block.id == id).unwrap().rows
        };
        assert_eq!((rows("sale_25"), rows("sale_26")), (Some(1_550), Some(1_450)));
        let objects = archive.contents.entries.iter().find(|entry| entry.kind == "BLOBS").unwrap();
        assert!(archive.blocks.iter().any(|block| (block.id, block.rows) == (objects.id, None)));
        let small = read(&[&stored("1/a%2Fb%20%C3%A9.dump")]).unwrap();
        assert_eq!(small.blocks.iter().map(|block| block.rows).collect::<Vec<_>>(), [Some(7)]);
    }

    #[test]
    fn an_archive_that_was_cut_anywhere_is_not_whole() {
        let bytes = stored("1/a%2Fb%20%C3%A9.dump");
        for length in 0..bytes.len() {
            assert!(read(&[&bytes[..length]]).is_err(), "{length} of {} bytes", bytes.len());
        }
        let more = [&bytes[..], b"\x01"].concat();
        assert!(read(&[&more]).is_err());
        let end = bytes.len() - 5;
        for at in end - ROWS_END.len()..end {
            let mut wrong = bytes.clone();
            wrong[at] ^= 1;
            assert!(read(&[&wrong]).is_err(), "the end of the rows is another at {at}");
        }
    }

    proptest! {
        #[test]
        fn it_does_not_matter_how_an_archive_is_cut_into_pieces(mut cuts in prop::collection::vec(0_usize..104_292, 0..40)) {
            let bytes = stored("1/shop.dump");
            cuts.extend([0, bytes.len()]);
            cuts.sort_unstable();
            let pieces: Vec<&[u8]> = cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect();
            prop_assert_eq!(read(&pieces).unwrap(), read(&[&bytes]).unwrap());
        }

        #[test]
        fn what_is_no_archive_neither_panics_nor_takes_memory(at in 0_usize..1284, with in any::<u8>()) {
            let mut bytes = stored("1/a%2Fb%20%C3%A9.dump");
            bytes[at] = with;
            let _ = read(&[&bytes]);
        }
    }
}
