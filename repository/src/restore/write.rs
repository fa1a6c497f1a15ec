//! Doing a restore: one thread walks the manifest and says what is wanted, the others open frames and write.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::BytesMut;
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::fetch::{Fetched, Fetcher, TargetFile};
use super::target::{self, MARKER};
use super::tree::Tree;
use super::{RestoreOptions, RestoreSummary, RestoreTarget};
use crate::entry::{Body, Content, Entry, FileBody};
use crate::error::Error;
use crate::layout;
use crate::limits::SHARD_UNITS;
use crate::manifest::RootShard;
use crate::progress::Progress;
use crate::reader::Backup;
use crate::stop::Stop;

/// Requests in flight or waiting for a thread, beside one a thread.
const REQUESTS: usize = 8;
/// Files a thread keeps open.
const OPEN_FILES: usize = 32;
/// How often a thread without work looks whether it should end.
const IDLE: std::time::Duration = std::time::Duration::from_millis(50);

pub(super) fn run(
    backup: &Backup,
    target: &RestoreTarget,
    options: &RestoreOptions,
    stop: &Arc<Stop>,
) -> Result<RestoreSummary, Error> {
    // An attempt that was given up for lost may still be at it.
    let mut locks = vec![Tree::lock(&target.directory)?];
    for elsewhere in target.mapping.values() {
        locks.push(Tree::lock(elsewhere)?);
    }
    target::prepare(&target.directory, backup)?;
    for elsewhere in target.mapping.values() {
        target::prepare(elsewhere, backup)?;
    }
    let tree = Tree::open(&target.directory, target.mapping.clone().into_iter())?;
    tree.mark(MARKER, target::marker_text(backup).as_bytes())?;
    let progress = &options.progress;
    let mut walk = Walk {
        backup,
        target,
        tree: &tree,
        stop,
        progress,
        next_id: 0,
        directories: Vec::new(),
        late_modes: Vec::new(),
        links: Vec::new(),
    };
    let root = &backup.root;
    let mut wal = Vec::new();
    if let Some(directory) = &target.wal_directory {
        wal = stop.wait(backup.wal_entries())?;
        for entry in &mut wal {
            entry.path = [directory, &b"/"[..], &entry.path].concat();
        }
    }
    walk.phase(options.processes, |walk, fetcher| {
        walk.shards(&root.shards, fetcher)?;
        for entry in wal {
            walk.entry(entry, fetcher)?;
        }
        Ok(())
    })?;
    walk.make_links()?;
    tree.sync()?;
    // Only now what makes the directory look complete.
    walk.phase(1, |walk, fetcher| walk.shards(&root.late, fetcher))?;
    walk.make_links()?;
    for (path, mode) in &walk.late_modes {
        tree.set_file_mode(path, *mode)?;
    }
    for (path, mode) in walk.directories.iter().rev() {
        tree.set_directory_mode(path, *mode)?;
    }
    tree.sync()?;
    tree.unmark(MARKER)?;
    drop(locks);
    let counted = progress.snapshot();
    Ok(RestoreSummary {
        files: counted.files,
        bytes: counted.bytes,
        fetched_bytes: counted.bytes_stored,
    })
}

struct Walk<'a> {
    backup: &'a Backup,
    target: &'a RestoreTarget,
    tree: &'a Tree,
    stop: &'a Arc<Stop>,
    progress: &'a Arc<Progress>,
    next_id: u64,
    /// Modes that are set when nothing more is written into them.
    directories: Vec<(Vec<u8>, u32)>,
    late_modes: Vec<(Vec<u8>, u32)>,
    /// Links that are made when nothing more is written, so that nothing can be written through them.
    links: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Walk<'_> {
    /// Runs `work` on this thread with writers beside it, and waits until everything it wanted is written.
    fn phase(
        &mut self,
        processes: usize,
        work: impl FnOnce(&mut Self, &mut Fetcher<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        let processes = processes.max(1);
        let requests = processes + REQUESTS;
        let (ready, fetched) = crossbeam_channel::bounded(requests);
        let (backup, tree, stop, progress) = (self.backup, self.tree, self.stop, self.progress);
        std::thread::scope(|scope| {
            for n in 0..processes {
                let fetched = fetched.clone();
                let spawned = std::thread::Builder::new()
                    .name(format!("restore-{n}"))
                    .spawn_scoped(scope, move || {
                        let writer = Writer {
                            backup,
                            tree,
                            stop,
                            progress,
                            open: VecDeque::new(),
                            content: Vec::new(),
                        };
                        if let Err(error) = writer.run(&fetched) {
                            stop.fail(error);
                        }
                    });
                if let Err(source) = spawned {
                    stop.fail(Error::Target { path: "a thread for the restore".into(), source });
                }
            }
            drop(fetched);
            let mut fetcher = Fetcher::new(backup, stop, progress, ready, requests);
            let wanted = work(self, &mut fetcher).and_then(|()| fetcher.flush());
            if let Err(error) = wanted {
                stop.fail(error);
            }
            // The writers end when the last request has been answered.
            drop(fetcher);
        });
        stop.check().map_err(|_| stop.cause())
    }

    fn make_links(&mut self) -> Result<(), Error> {
        for (path, points_to) in self.links.drain(..) {
            self.tree.make_symlink(&path, &points_to)?;
        }
        Ok(())
    }

    fn shards(&mut self, shards: &[RootShard], fetcher: &mut Fetcher<'_>) -> Result<(), Error> {
        for shard in shards {
            for entry in self.stop.wait(self.backup.reader.entries(&shard.shard))? {
                self.entry(entry, fetcher)?;
            }
        }
        Ok(())
    }

    fn entry(&mut self, entry: Entry, fetcher: &mut Fetcher<'_>) -> Result<(), Error> {
        let Entry { path, mode, body } = entry;
        match body {
            Body::Directory => {
                match self.target.mapping.get(&path) {
                    Some(elsewhere) => {
                        self.links.push((path.clone(), elsewhere.as_os_str().as_bytes().to_vec()));
                    }
                    None => self.tree.make_directory(&path)?,
                }
                self.directories.push((path, mode));
            }
            Body::Symlink { target } => self.links.push((path, target)),
            Body::File(file) => self.file(path, mode, &file, fetcher)?,
        }
        Ok(())
    }

    fn file(
        &mut self,
        path: Vec<u8>,
        mode: u32,
        file: &FileBody,
        fetcher: &mut Fetcher<'_>,
    ) -> Result<(), Error> {
        self.next_id += 1;
        if super::tree::is_set_late(mode) {
            self.late_modes.push((path.clone(), mode));
        }
        let target =
            Arc::new(TargetFile { id: self.next_id, path, mode, size_bytes: file.size_bytes });
        // Made here even when writers will come: an empty or all-zero file has none.
        drop(self.tree.open_file(&target.path, mode, file.size_bytes)?);
        match &file.content {
            Content::Inline(extents) => {
                fetcher.want(&target, file.unit_bytes, extents, 0)?;
            }
            Content::Shards(shards) => {
                let mut offset = 0;
                for shard in shards {
                    let whole = u64::from(SHARD_UNITS) * u64::from(file.unit_bytes);
                    let bytes = (file.size_bytes - offset).min(whole);
                    let extents = self.stop.wait(self.backup.reader.extents(
                        shard,
                        file.unit_bytes,
                        bytes,
                    ))?;
                    offset = fetcher.want(&target, file.unit_bytes, &extents, offset)?;
                }
            }
        }
        self.progress.add_files(1);
        self.progress.add_bytes(file.size_bytes);
        Ok(())
    }
}

struct Writer<'a> {
    backup: &'a Backup,
    tree: &'a Tree,
    stop: &'a Stop,
    progress: &'a Progress,
    open: VecDeque<(u64, File)>,
    content: Vec<u8>,
}

impl Writer<'_> {
    fn run(mut self, fetched: &Receiver<Fetched>) -> Result<(), Error> {
        let mut unpacker = zstd::bulk::Decompressor::new()
            .map_err(|error| Error::Bug(format!("zstd cannot be started: {error}")))?;
        loop {
            match fetched.recv_timeout(IDLE) {
                Ok(request) => self.request(request, &mut unpacker)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
            self.stop.check()?;
        }
    }

    fn request(
        &mut self,
        request: Fetched,
        unpacker: &mut zstd::bulk::Decompressor<'_>,
    ) -> Result<(), Error> {
        let Fetched { start, bytes, uses, permit } = request;
        // Ours alone unless the store keeps a copy.
        let mut bytes = bytes.try_into_mut().unwrap_or_else(|shared| BytesMut::from(&shared[..]));
        for wanted in uses {
            let frame = wanted.frame;
            let damaged =
                |reason| Error::damaged(layout::pack(self.backup.lineage(), frame.pack), reason);
            let from = usize::try_from(frame.offset - start)
                .map_err(|_| damaged("a frame lies outside"))?;
            let stored = bytes
                .get_mut(from..from + frame.stored_bytes as usize)
                .ok_or_else(|| damaged("a frame lies outside"))?;
            let cipher = self.backup.reader.cipher(frame.pack)?;
            let mut content = std::mem::take(&mut self.content);
            cipher.open(&frame, stored, unpacker, &mut content).map_err(damaged)?;
            for write in &wanted.writes {
                let from = write.frame_offset as usize;
                let part = content
                    .get(from..from + write.length as usize)
                    .ok_or_else(|| damaged("a stretch lies outside its frame"))?;
                self.write(&write.file, write.file_offset, part)?;
            }
            self.content = content;
        }
        drop(permit);
        Ok(())
    }

    fn write(&mut self, file: &TargetFile, offset: u64, part: &[u8]) -> Result<(), Error> {
        let found = self.open.iter().position(|(id, _)| *id == file.id);
        let at = if let Some(at) = found {
            at
        } else {
            if self.open.len() >= OPEN_FILES {
                self.open.pop_front();
            }
            self.open
                .push_back((file.id, self.tree.open_file(&file.path, file.mode, file.size_bytes)?));
            self.open.len() - 1
        };
        let handle = &self.open[at].1;
        handle.write_all_at(part, offset).map_err(|error| self.tree.failed(&file.path, error))?;
        self.progress.add_read(part.len() as u64);
        Ok(())
    }
}
