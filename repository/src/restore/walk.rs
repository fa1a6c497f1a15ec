//! The walk over a backup's entries: makes or takes over what has a name, and tells the others what content it needs.

use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;

use crossbeam_channel::Sender;
use rustix::fs::FileType;

use super::RestoreTarget;
use super::compare::Piece;
use super::fetch::{TargetFile, Wanted};
use super::tree::{Tree, is_set_late};
use crate::entry::{Body, Content, Entry, Extent, FileBody};
use crate::error::Error;
use crate::limits::{HASH_BYTES, SHARD_UNITS};
use crate::manifest::RootShard;
use crate::progress::Progress;
use crate::reader::Backup;
use crate::shard::ShardRef;
use crate::stop::Stop;

/// What a walk does about names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// Makes them: nothing is there.
    Make,
    /// Makes them, and takes over what is there and can be.
    Mend,
    /// Looks at what is there and touches nothing.
    Look,
}

/// Where a walk puts what it finds.
pub(super) struct Outlets {
    pub(super) pieces: Sender<Piece>,
    pub(super) wants: Sender<Vec<Wanted>>,
}

impl Outlets {
    fn put(&self, piece: Piece) -> Result<(), Error> {
        if piece.there_bytes > piece.offset {
            return self.pieces.send(piece).map_err(|_| Error::Cancelled);
        }
        let wanted = piece.wanted();
        if wanted.is_empty() {
            return Ok(());
        }
        self.wants.send(wanted).map_err(|_| Error::Cancelled)
    }
}

pub(super) struct Walk<'a> {
    pub(super) backup: &'a Backup,
    pub(super) target: &'a RestoreTarget,
    pub(super) tree: &'a Tree,
    pub(super) stop: &'a Stop,
    pub(super) progress: &'a Progress,
    pub(super) how: How,
    next_id: u64,
    /// Modes that are set when nothing more is written into them.
    pub(super) directories: Vec<(Vec<u8>, u32)>,
    pub(super) late_modes: Vec<(Vec<u8>, u32)>,
    /// Links that are made when nothing more is written, so that nothing can be written through them.
    links: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What is there of a file of the backup.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Already {
    Nothing,
    /// So many bytes of it, which may be right.
    Bytes(u64),
}

/// The detection hashes of an entry shard, fetched when the first is needed.
struct Hashes<'a> {
    shard: &'a ShardRef,
    fetched: Option<Vec<u8>>,
    /// The units of the entries before.
    before: usize,
}

impl<'a> Walk<'a> {
    pub(super) fn new(
        backup: &'a Backup,
        target: &'a RestoreTarget,
        tree: &'a Tree,
        stop: &'a Stop,
        progress: &'a Progress,
        how: How,
    ) -> Self {
        Self {
            backup,
            target,
            tree,
            stop,
            progress,
            how,
            next_id: 0,
            directories: Vec::new(),
            late_modes: Vec::new(),
            links: Vec::new(),
        }
    }

    pub(super) fn shards(&mut self, shards: &[RootShard], outlets: &Outlets) -> Result<(), Error> {
        for root in shards {
            let shard = &root.shard;
            let mut hashes = Hashes { shard, fetched: None, before: 0 };
            for entry in self.stop.wait(self.backup.reader.entries(shard))? {
                self.entry(entry, Some(&mut hashes), outlets)?;
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        entry: Entry,
        hashes: Option<&mut Hashes<'_>>,
        outlets: &Outlets,
    ) -> Result<(), Error> {
        let Entry { path, mode, body } = entry;
        match body {
            Body::Directory => {
                match self.target.mapping.get(&path) {
                    Some(elsewhere) => {
                        self.link(path.clone(), elsewhere.as_os_str().as_bytes().to_vec())?;
                    }
                    None => self.directory(&path)?,
                }
                self.directories.push((path, mode));
            }
            Body::Symlink { target } => self.link(path, target)?,
            Body::File(file) => self.file(path, mode, &file, hashes, outlets)?,
        }
        Ok(())
    }

    /// WAL: files that are described apart from the others, and of whose units nothing is known.
    pub(super) fn wal(&mut self, entries: Vec<Entry>, outlets: &Outlets) -> Result<(), Error> {
        entries.into_iter().try_for_each(|entry| self.entry(entry, None, outlets))
    }

    pub(super) fn make_links(&mut self) -> Result<(), Error> {
        for (path, points_to) in self.links.drain(..) {
            self.tree.make_symlink(&path, &points_to)?;
        }
        Ok(())
    }

    fn directory(&self, path: &[u8]) -> Result<(), Error> {
        if self.how != How::Make
            && let Some(seen) = self.tree.look(path)?
        {
            match self.how {
                How::Look => return Ok(()),
                _ if seen.kind == FileType::Directory => {
                    return self.tree.enter_directory(path, seen);
                }
                _ => self.tree.remove(path)?,
            }
        }
        if self.how == How::Look { Ok(()) } else { self.tree.make_directory(path) }
    }

    fn link(&mut self, path: Vec<u8>, points_to: Vec<u8>) -> Result<(), Error> {
        if self.how == How::Mend
            && let Some(seen) = self.tree.look(&path)?
        {
            if seen.kind == FileType::Symlink && self.tree.read_link(&path)? == points_to {
                return Ok(());
            }
            self.tree.remove(&path)?;
        }
        self.links.push((path, points_to));
        Ok(())
    }

    /// Looks what is there of a file, takes it over, or takes it away.
    fn already(&self, path: &[u8], mode: u32, file: &FileBody) -> Result<Already, Error> {
        if self.how == How::Make {
            return Ok(Already::Nothing);
        }
        let Some(seen) = self.tree.look(path)? else { return Ok(Already::Nothing) };
        // What has a second name would be changed under that name, too; what is another's would stay another's.
        let usable = seen.kind == FileType::RegularFile && seen.is_ours_alone;
        let there = Already::Bytes(seen.size_bytes.min(file.size_bytes));
        if self.how == How::Look {
            let readable = usable && self.tree.read_file(path, false).is_ok();
            return Ok(if readable { there } else { Already::Nothing });
        }
        if usable && self.tree.keep_file(path, mode, file.size_bytes, seen)? {
            return Ok(there);
        }
        self.tree.remove(path)?;
        Ok(Already::Nothing)
    }

    fn file(
        &mut self,
        path: Vec<u8>,
        mode: u32,
        file: &FileBody,
        hashes: Option<&mut Hashes<'_>>,
        outlets: &Outlets,
    ) -> Result<(), Error> {
        self.next_id += 1;
        if is_set_late(mode) {
            self.late_modes.push((path.clone(), mode));
        }
        let already = self.already(&path, mode, file)?;
        // A small file is made by whoever writes it. An empty one, or one of zeros, is never written.
        let later = matches!(&file.content, Content::Inline(extents) if has_frames(extents));
        let mut made = already != Already::Nothing;
        if !made && !later && self.how != How::Look {
            drop(self.tree.make_file(&path, mode, file.size_bytes)?);
            made = true;
        }
        let there_bytes = match already {
            Already::Nothing => 0,
            Already::Bytes(bytes) => bytes,
        };
        let target = TargetFile { id: self.next_id, path, mode, size_bytes: file.size_bytes, made };
        let target = Arc::new(target);
        let piece = |offset, bytes, extents, hashes| Piece {
            file: Arc::clone(&target),
            unit_bytes: file.unit_bytes,
            offset,
            bytes,
            extents,
            hashes,
            there_bytes,
        };
        match &file.content {
            Content::Inline(extents) => {
                let units = extents.iter().map(|extent| extent.units as usize).sum();
                let known = match hashes {
                    Some(hashes) => hashes.next(units, there_bytes > 0, self)?,
                    None => Vec::new(),
                };
                outlets.put(piece(0, file.size_bytes, extents.clone(), known))?;
            }
            Content::Shards(shards) => {
                let mut offset = 0;
                for shard in shards {
                    let whole = u64::from(SHARD_UNITS) * u64::from(file.unit_bytes);
                    let bytes = (file.size_bytes - offset).min(whole);
                    let reader = &self.backup.reader;
                    let extents = self.stop.wait(reader.extents(shard, file.unit_bytes, bytes))?;
                    let known = if there_bytes > offset {
                        self.stop.wait(reader.hashes(shard))?
                    } else {
                        Vec::new()
                    };
                    outlets.put(piece(offset, bytes, extents, known))?;
                    offset += bytes;
                }
            }
        }
        self.progress.add_files(1);
        self.progress.add_bytes(file.size_bytes);
        Ok(())
    }
}

impl Hashes<'_> {
    /// The hashes of the next `units` units; none when they are not needed.
    fn next(&mut self, units: usize, needed: bool, walk: &Walk<'_>) -> Result<Vec<u8>, Error> {
        let from = self.before * HASH_BYTES;
        self.before += units;
        if !needed {
            return Ok(Vec::new());
        }
        let all = match &mut self.fetched {
            Some(all) => all,
            none => none.insert(walk.stop.wait(walk.backup.reader.hashes(self.shard))?),
        };
        Ok(all.get(from..self.before * HASH_BYTES).unwrap_or_default().to_vec())
    }
}

fn has_frames(extents: &[Extent]) -> bool {
    extents.iter().any(|extent| extent.place.is_some())
}
