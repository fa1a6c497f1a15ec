//! The entries of a scan in little memory: a server may have millions of files, and a backup keeps the list of them until the last
//! one is copied. What neighbours share is kept once, and a relation file has a number for a name.

use super::{EntryKind, ScanEntry};
use crate::files::Stat;
use crate::relation::RelationFile;

/// Entries that are allocated together: they never move, and are given back together.
const BLOCK: usize = 4096;

/// The entries of a scan, in their order.
#[derive(Debug, Clone, Default)]
pub struct Entries {
    blocks: Vec<Vec<Listed>>,
    places: Vec<Place>,
    /// Of what is no relation file.
    names: Vec<Box<str>>,
}

#[derive(Debug, Clone, Copy)]
struct Listed {
    size: u64,
    mtime_ns: i64,
    ctime_ns: i64,
    inode: u64,
    kind: EntryKind,
    /// Number of its directory and file system.
    place: u32,
    /// Number of its name; of a relation file the kind is all of that.
    name: u32,
    mode: u16,
}

/// What entries that stand together have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Place {
    directory: Box<str>,
    device: u64,
}

impl Entries {
    pub(super) fn push(&mut self, path: &str, kind: EntryKind, stat: &Stat) {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        let is_same = |place: &Place| &*place.directory == directory && place.device == stat.device;
        if !self.places.last().is_some_and(is_same) {
            self.places.push(Place { directory: directory.into(), device: stat.device });
        }
        if !matches!(kind, EntryKind::Relation(_)) {
            self.names.push(name.into());
        }
        let listed = Listed {
            size: if kind == EntryKind::Directory { 0 } else { stat.size },
            mtime_ns: stat.mtime_ns,
            ctime_ns: stat.ctime_ns,
            inode: stat.inode,
            kind,
            place: last(&self.places),
            name: last(&self.names),
            // Permission bits are twelve.
            mode: u16::try_from(stat.mode & 0o7777).unwrap_or_default(),
        };
        match self.blocks.last_mut() {
            Some(block) if block.len() < BLOCK => block.push(listed),
            _ => {
                let mut block = Vec::with_capacity(BLOCK);
                block.push(listed);
                self.blocks.push(block);
            }
        }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.listed().count()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// All of them, in their order.
    pub fn iter(&self) -> impl Iterator<Item = ScanEntry> + '_ {
        self.listed().map(|listed| listed.entry(&self.places, &self.names))
    }

    /// The relation files: directory, name, bytes.
    pub fn relations(&self) -> impl Iterator<Item = (&str, RelationFile, u64)> {
        self.listed().filter_map(|listed| match listed.kind {
            EntryKind::Relation(file) => {
                Some((&*self.places[listed.place as usize].directory, file, listed.size))
            }
            _ => None,
        })
    }

    /// Bytes of all files.
    pub fn total_bytes(&self) -> u64 {
        self.listed().map(|listed| listed.size).sum()
    }

    fn listed(&self) -> impl Iterator<Item = &Listed> {
        self.blocks.iter().flatten()
    }
}

impl IntoIterator for Entries {
    type Item = ScanEntry;
    type IntoIter = Box<dyn Iterator<Item = ScanEntry> + Send>;

    /// Gives their memory back on the way.
    fn into_iter(self) -> Self::IntoIter {
        let Self { blocks, places, names } = self;
        let listed = blocks.into_iter().flatten();
        Box::new(listed.map(move |listed| listed.entry(&places, &names)))
    }
}

impl Listed {
    fn entry(&self, places: &[Place], names: &[Box<str>]) -> ScanEntry {
        let Place { directory, device } = &places[self.place as usize];
        let slash = if directory.is_empty() { "" } else { "/" };
        let path = match self.kind {
            EntryKind::Relation(file) => format!("{directory}{slash}{file}"),
            _ => format!("{directory}{slash}{}", names[self.name as usize]),
        };
        ScanEntry {
            path,
            kind: self.kind,
            size: self.size,
            mode: self.mode.into(),
            mtime_ns: self.mtime_ns,
            ctime_ns: self.ctime_ns,
            inode: self.inode,
            device: *device,
        }
    }
}

/// The number of the last of some things.
fn last<T>(all: &[T]) -> u32 {
    u32::try_from(all.len().saturating_sub(1)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::files::Kind;

    /// A file with properties of its own.
    fn stat(number: u64) -> Stat {
        Stat {
            kind: Kind::File,
            size: number * 8192,
            mode: 0o100_600,
            mtime_ns: i64::try_from(number).unwrap() << 32,
            ctime_ns: i64::try_from(number).unwrap() << 33,
            inode: number,
            device: 7 + number % 2,
        }
    }

    fn relation(name: &str) -> EntryKind {
        EntryKind::Relation(RelationFile::parse(name).unwrap())
    }

    #[test]
    fn an_entry_comes_out_as_it_was_put_in() {
        let wanted = [
            ("PG_VERSION", EntryKind::Plain),
            ("base", EntryKind::Directory),
            ("base/5", EntryKind::Directory),
            ("base/5/1259", relation("1259")),
            ("base/5/1259.12", relation("1259.12")),
            ("base/5/1259_fsm", relation("1259_fsm")),
            ("base/5/1259_vm.3", relation("1259_vm.3")),
            ("base/5/4294967295_init", relation("4294967295_init")),
            ("base/5/PG_VERSION", EntryKind::Plain),
            ("global/pg_control", EntryKind::ControlFile),
            ("pgmuster_external/etc/pg_hba.conf", EntryKind::External),
        ];
        let mut entries = Entries::default();
        for (number, (path, kind)) in (0..).zip(wanted) {
            entries.push(path, kind, &stat(number));
        }
        let expected: Vec<ScanEntry> = (0..)
            .zip(wanted)
            .map(|(number, (path, kind))| {
                let stat = stat(number);
                ScanEntry {
                    path: path.to_owned(),
                    kind,
                    size: if kind == EntryKind::Directory { 0 } else { stat.size },
                    mode: 0o600,
                    mtime_ns: stat.mtime_ns,
                    ctime_ns: stat.ctime_ns,
                    inode: stat.inode,
                    device: stat.device,
                }
            })
            .collect();
        assert_eq!(entries.iter().collect::<Vec<_>>(), expected);
        assert_eq!(entries.len(), wanted.len());
        assert_eq!(entries.total_bytes(), expected.iter().map(|entry| entry.size).sum::<u64>());
        let relations: Vec<_> = entries
            .relations()
            .map(|(directory, file, size)| (format!("{directory}/{file}"), size))
            .collect();
        let theirs = expected.iter().filter(|e| matches!(e.kind, EntryKind::Relation(_)));
        assert_eq!(relations, theirs.map(|e| (e.path.clone(), e.size)).collect::<Vec<_>>());
        assert_eq!(entries.into_iter().collect::<Vec<_>>(), expected);
    }

    /// Bytes that a list takes, without what the allocator adds.
    fn memory_bytes(entries: &Entries) -> usize {
        let Entries { blocks, places, names } = entries;
        blocks.capacity() * size_of::<Vec<Listed>>()
            + blocks.iter().map(Vec::capacity).sum::<usize>() * size_of::<Listed>()
            + places.capacity() * size_of::<Place>()
            + places.iter().map(|place| place.directory.len()).sum::<usize>()
            + names.capacity() * size_of::<Box<str>>()
            + names.iter().map(|name| name.len()).sum::<usize>()
    }

    #[test]
    fn a_million_files_take_less_than_sixty_four_megabytes() {
        let mut entries = Entries::default();
        for database in 0..1000 {
            let directory = format!("base/{}", 16_384 + database);
            entries.push(&directory, EntryKind::Directory, &stat(1));
            for number in 0..997 {
                let name = format!("{}_vm", 20_000 + number);
                entries.push(&format!("{directory}/{name}"), relation(&name), &stat(2));
            }
            for name in ["PG_VERSION", "pg_filenode.map"] {
                entries.push(&format!("{directory}/{name}"), EntryKind::Plain, &stat(2));
            }
        }
        assert_eq!(entries.len(), 1_000_000);
        assert_eq!(size_of::<Listed>(), 56);
        let bytes = memory_bytes(&entries);
        assert!(bytes < 64_000_000, "{bytes}");
    }
}
