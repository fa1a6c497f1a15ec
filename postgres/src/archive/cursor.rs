//! Numbers and strings of an archive's head and contents, of which the end may not be there yet.

use super::{Entry, Section};

/// One string at most: a statement is shorter than what the server takes in one message.
const STRING_BYTES_MAX: i64 = 1 << 30;

/// Why nothing was read.
pub(super) enum Stop {
    /// There is more to come.
    Short,
    /// It is no archive, or none that is known here.
    Wrong(String),
}

pub(super) type Read<T> = Result<T, Stop>;

/// What the head says of the rest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Head {
    /// Of version 1.
    pub(super) minor: u8,
    /// Bytes of a number, without its sign.
    pub(super) number_bytes: usize,
    /// Bytes of a position.
    pub(super) offset_bytes: usize,
    /// How many entries follow.
    pub(super) entries: u32,
}

/// Reads forward; what was read in vain is read again from its beginning when there is more.
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
    number_bytes: usize,
}

impl<'a> Cursor<'a> {
    pub(super) fn new(rest: &'a [u8], number_bytes: usize) -> Self {
        Self { rest, number_bytes }
    }

    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    fn take(&mut self, bytes: usize) -> Read<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(Stop::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    fn byte(&mut self) -> Read<u8> {
        Ok(self.take(1)?[0])
    }

    fn number(&mut self) -> Read<i64> {
        self.take(self.number_bytes + 1).map(number)
    }

    fn string(&mut self) -> Read<Option<&'a [u8]>> {
        match self.number()? {
            ..0 => Ok(None),
            bytes if bytes > STRING_BYTES_MAX => {
                Err(Stop::Wrong(format!("a text of {bytes} bytes in the contents")))
            }
            bytes => self.take(usize::try_from(bytes).unwrap_or(usize::MAX)).map(Some),
        }
    }

    fn text(&mut self) -> Read<String> {
        Ok(String::from_utf8_lossy(self.string()?.unwrap_or_default()).into_owned())
    }

    pub(super) fn head(&mut self) -> Read<Head> {
        let wrong = |what: String| Err(Stop::Wrong(what));
        if self.take(5)? != b"PGDMP" {
            return wrong("it does not begin as an archive does".to_owned());
        }
        let (major, minor, _) = (self.byte()?, self.byte()?, self.byte()?);
        if major != 1 || !(14..=16).contains(&minor) {
            return wrong(format!("version {major}.{minor} of the format is not known"));
        }
        let (number_bytes, offset_bytes) = (self.byte()?.into(), self.byte()?.into());
        if !(2..=8).contains(&number_bytes) || !(2..=8).contains(&offset_bytes) {
            return wrong(format!("numbers of {number_bytes} and {offset_bytes} bytes"));
        }
        self.number_bytes = number_bytes;
        let format = self.byte()?;
        let compression = if minor < 15 { self.number()? } else { self.byte()?.into() };
        if (format, compression) != (1, 0) {
            return wrong(format!("format {format} with compression {compression}"));
        }
        // When it was made.
        for _ in 0..7 {
            self.number()?;
        }
        // Of which database, on which server, by which pg_dump.
        for _ in 0..3 {
            self.string()?;
        }
        let entries = self.number()?;
        let entries = u32::try_from(entries)
            .map_err(|_| Stop::Wrong(format!("contents of {entries} entries")))?;
        Ok(Head { minor, number_bytes, offset_bytes, entries })
    }

    pub(super) fn entry(&mut self, head: Head) -> Read<Entry> {
        let id = self.number()?;
        let id = u32::try_from(id)
            .ok()
            .filter(|id| *id > 0)
            .ok_or_else(|| Stop::Wrong(format!("an entry of the number {id}")))?;
        let has_data = self.number()? != 0;
        // Its numbers in the dumped database's own catalogue.
        for _ in 0..2 {
            self.string()?;
        }
        let name = self.string()?.unwrap_or_default().to_vec();
        let kind = self.text()?;
        let section = match self.number()? {
            2 => Some(Section::PreData),
            3 => Some(Section::Data),
            4 => Some(Section::PostData),
            _ => None,
        };
        // How it is made and how it is dropped.
        for _ in 0..2 {
            self.string()?;
        }
        let has_rows = self.string()?.is_some_and(|copy| !copy.is_empty());
        let schema = self.string()?.filter(|schema| !schema.is_empty()).map(<[u8]>::to_vec);
        // Tablespace and access method.
        for _ in 0..2 {
            self.string()?;
        }
        if head.minor >= 16 {
            self.number()?;
        }
        // Owner; whether it had OIDs.
        for _ in 0..2 {
            self.string()?;
        }
        let mut needs = Vec::new();
        while let Some(need) = self.string()? {
            let need = std::str::from_utf8(need).ok().and_then(|text| text.trim().parse().ok());
            needs.push(need.ok_or_else(|| Stop::Wrong("an entry needs no number".to_owned()))?);
        }
        // Where its block is: not known while it was written.
        self.take(1 + head.offset_bytes)?;
        Ok(Entry { id, kind, name, schema, section, has_data, has_rows, needs })
    }
}

/// A sign, then the number with its lowest byte first.
pub(super) fn number(bytes: &[u8]) -> i64 {
    let (sign, bytes) = bytes.split_at(1);
    let mut whole = [0; 8];
    whole[..bytes.len()].copy_from_slice(bytes);
    // No number of an archive is as large as the sign of this one.
    let number = i64::from_le_bytes(whole) & i64::MAX;
    if sign == [0] { number } else { -number }
}
