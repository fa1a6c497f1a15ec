//! `pg_dump`'s custom format, as far as one has to know it to say of an archive whether it is whole, how many rows it has of
//! which table, and where they are: versions 1.14 to 1.16, which PostgreSQL 14 to 18 write, without compression of its own.
//!
//! Head, contents, then for each entry with data one block: its kind, the entry's number, and pieces behind their lengths up to a
//! length of zero; a block of large objects has an object's number before each such row of pieces. Nothing in a block
//! depends on where it stands: head and contents with some of the blocks behind them are an archive again, of which
//! `pg_restore` loads what a list names.
//!
//! Deliberately not here: writing such a thing, and what its statements mean. Who loads is `pg_restore`.

mod cursor;
mod part;
mod phases;
mod reader;

pub use part::{Part, Settled};
pub use phases::Phase;
pub use reader::Reader;

/// What an archive says that it holds.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Contents {
    /// Bytes of head and contents; the first block begins there.
    pub bytes: u64,
    /// In the archive's order, which is the one in which things can be made.
    pub entries: Vec<Entry>,
}

/// One line of the contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Its number, from 1.
    pub id: u32,
    /// `TABLE`, `TABLE DATA`, `INDEX`, …
    pub kind: String,
    /// The name in the dumped database's encoding. Of what belongs to something, as a comment does: kind and name of that.
    pub name: Vec<u8>,
    /// The schema's name, for what is in one.
    pub schema: Option<Vec<u8>>,
    /// Which part of a restore it belongs to; none for what goes with the entry before it.
    pub section: Option<Section>,
    /// Whether the archive has a block for it.
    pub has_data: bool,
    /// Whether its data are rows in the text format of `COPY`.
    pub has_rows: bool,
    /// What must be there first.
    pub needs: Vec<u32>,
}

/// The parts of a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    /// Definitions of what rows need.
    PreData,
    /// Rows, large objects, positions of sequences.
    Data,
    /// Indexes, constraints, triggers.
    PostData,
}

/// The data of one entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    /// Of which entry.
    pub id: u32,
    /// All of it, with what stands before the first piece.
    pub bytes: u64,
    /// How many rows it has, where it has rows.
    pub rows: Option<u64>,
}

/// A whole archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Archive {
    /// What it says that it holds.
    pub contents: Contents,
    /// One behind the other, from the end of the contents to that of the archive.
    pub blocks: Vec<Block>,
}

impl Entry {
    /// Schema and name of the table whose rows it has.
    pub fn table(&self) -> Option<(&str, &str)> {
        let schema = std::str::from_utf8(self.schema.as_deref()?).ok()?;
        let name = std::str::from_utf8(&self.name).ok()?;
        self.has_rows.then_some((schema, name))
    }
}
