//! The memory that segments are read into. It is used again: for the kernel, memory that is new to a process is more work than
//! what is read into it.

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// What is kept for the next segments at most.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// Of this process.
static BUFFERS: Buffers = Buffers::new();

/// Buffers that nobody uses at the moment.
#[derive(Debug)]
struct Buffers(Mutex<Free>);

#[derive(Debug)]
struct Free {
    buffers: Vec<Vec<u8>>,
    /// Since the last sweep.
    was_used: bool,
}

/// Goes back to the others when nobody holds the bytes any more.
struct Buffer {
    content: Vec<u8>,
    of: &'static Buffers,
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.content
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = self.of.lock();
        let kept: usize = free.buffers.iter().map(Vec::capacity).sum();
        if kept + self.content.capacity() <= KEPT_BYTES_MAX {
            free.buffers.push(std::mem::take(&mut self.content));
        }
    }
}

impl Buffers {
    const fn new() -> Self {
        Self(Mutex::new(Free { buffers: Vec::new(), was_used: false }))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Free> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&'static self, mut from: impl Read, size: usize) -> io::Result<Bytes> {
        let free = {
            let mut free = self.lock();
            free.was_used = true;
            let fits = free.buffers.iter().position(|buffer| buffer.capacity() >= size);
            fits.map(|at| free.buffers.swap_remove(at))
        };
        let mut content = free.unwrap_or_else(|| Vec::with_capacity(size));
        content.clear();
        let mut buffer = Buffer { content, of: self };
        from.read_to_end(&mut buffer.content)?;
        Ok(Bytes::from_owner(buffer))
    }

    fn sweep(&self) {
        let mut free = self.lock();
        if !std::mem::take(&mut free.was_used) {
            free.buffers = Vec::new();
        }
    }
}

/// Reads to the end of what is about `size` bytes long.
pub(super) fn read(from: impl Read, size: usize) -> io::Result<Bytes> {
    BUFFERS.read(from, size)
}

/// Gives the memory back when nothing was read since this was called last.
pub(super) fn sweep() {
    BUFFERS.sweep();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_given_back() {
        static BUFFERS: Buffers = Buffers::new();
        let first = BUFFERS.read(&[1; 4096][..], 4096).unwrap();
        let (at, part) = (first.as_ptr(), first.slice(1..));
        drop(first);
        assert_ne!(BUFFERS.read(&[2; 4096][..], 4096).unwrap().as_ptr(), at, "a part is held");
        assert_eq!(part, [1; 4095][..]);
        drop(part);
        let again: Vec<Bytes> = (0..2).map(|_| BUFFERS.read(&[3; 10][..], 10).unwrap()).collect();
        assert!(again.iter().any(|bytes| bytes.as_ptr() == at), "it was not used again");
        assert!(again.iter().all(|bytes| *bytes == [3; 10][..]), "it shows what was there before");
        drop(again);
        BUFFERS.sweep();
        assert_eq!(BUFFERS.lock().buffers.len(), 2, "it was used");
        BUFFERS.sweep();
        assert_eq!(BUFFERS.lock().buffers.len(), 0);
    }
}
