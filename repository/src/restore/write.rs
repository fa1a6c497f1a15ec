//! The threads that open frames, unpack them, and write what is wanted of them where it belongs.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;

use bytes::BytesMut;
use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::fetch::{Fetched, TargetFile};
use super::tree::Tree;
use crate::again::told;
use crate::error::Error;
use crate::layout;
use crate::pack::FrameRef;
use crate::progress::Progress;
use crate::reader::Backup;
use crate::stop::Stop;

/// Files a thread keeps open.
const OPEN_FILES: usize = 32;
/// Bytes of a write from which on the disk shall begin with it at once. Of smaller ones, the file system makes better
/// order at the end.
const EARLY_BYTES: usize = 128 << 10;
/// How often a thread without work looks whether it should end.
const IDLE: std::time::Duration = std::time::Duration::from_millis(50);

/// One thread that writes.
pub(super) struct Writer<'a> {
    backup: &'a Backup,
    tree: &'a Tree,
    stop: &'a Stop,
    progress: &'a Progress,
    open: VecDeque<(u64, File)>,
    content: Vec<u8>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(
        backup: &'a Backup,
        tree: &'a Tree,
        stop: &'a Stop,
        progress: &'a Progress,
    ) -> Self {
        Self { backup, tree, stop, progress, open: VecDeque::new(), content: Vec::new() }
    }

    pub(super) fn run(mut self, fetched: &Receiver<Fetched>) -> Result<(), Error> {
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
            if let Err(reason) = cipher.open(&frame, stored, unpacker, &mut content) {
                let mut stored = self.fetch_again(&frame)?;
                cipher.open(&frame, &mut stored, unpacker, &mut content).map_err(damaged)?;
                told(&damaged(reason));
            }
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

    /// One frame once more: what came before was not what had been stored.
    fn fetch_again(&self, frame: &FrameRef) -> Result<Vec<u8>, Error> {
        let key = layout::pack(self.backup.lineage(), frame.pack);
        let store = &self.backup.repository.store;
        let range = frame.offset..frame.end();
        let again = async { store.get_range(&key, range).await.map_err(Error::needed) };
        Ok(self.stop.wait(again)?.into())
    }

    fn write(&mut self, file: &TargetFile, offset: u64, part: &[u8]) -> Result<(), Error> {
        let found = self.open.iter().position(|(id, _)| *id == file.id);
        let at = if let Some(at) = found {
            at
        } else {
            if self.open.len() >= OPEN_FILES {
                self.open.pop_front();
            }
            let handle = if file.made {
                self.tree.open_file(&file.path)?
            } else {
                self.tree.make_file(&file.path, file.mode, file.size_bytes)?
            };
            self.open.push_back((file.id, handle));
            self.open.len() - 1
        };
        let handle = &self.open[at].1;
        handle.write_all_at(part, offset).map_err(|error| self.tree.failed(&file.path, error))?;
        if part.len() >= EARLY_BYTES {
            // Dirty pages are not dropped, only written: while we go on, and not all of them at the end. Where this is not
            // possible, nothing is lost.
            let length = std::num::NonZeroU64::new(part.len() as u64);
            let _ = rustix::fs::fadvise(handle, offset, length, rustix::fs::Advice::DontNeed);
        }
        self.progress.add_read(part.len() as u64);
        Ok(())
    }
}
