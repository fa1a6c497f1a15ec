//! The memory that segments are read into. It is used again: for the kernel, memory that is new to a process is more work than
//! what is read into it.

use std::io::{self, Read};
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;

/// What is kept for the next segments at most.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// What nobody uses at the moment.
static FREE: Mutex<Free> = Mutex::new(Free { buffers: Vec::new(), was_used: false });

struct Free {
    buffers: Vec<Vec<u8>>,
    /// Since the last [`sweep`].
    was_used: bool,
}

/// Goes back to the others when nobody holds the bytes any more.
struct Buffer(Vec<u8>);

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut free = lock();
        let kept: usize = free.buffers.iter().map(Vec::capacity).sum();
        if kept + self.0.capacity() <= KEPT_BYTES_MAX {
            free.buffers.push(std::mem::take(&mut self.0));
        }
    }
}

/// Reads to the end of what is about `size` bytes long.
pub(super) fn read(mut from: impl Read, size: usize) -> io::Result<Bytes> {
    let free = {
        let mut free = lock();
        free.was_used = true;
        let fits = free.buffers.iter().position(|buffer| buffer.capacity() >= size);
        fits.map(|at| free.buffers.swap_remove(at))
    };
    let mut content = free.unwrap_or_else(|| Vec::with_capacity(size));
    content.clear();
    let mut buffer = Buffer(content);
    from.read_to_end(&mut buffer.0)?;
    Ok(Bytes::from_owner(buffer))
}

/// Gives the memory back when nothing was read since this was called last.
pub(super) fn sweep() {
    let mut free = lock();
    if !std::mem::take(&mut free.was_used) {
        free.buffers = Vec::new();
    }
}

fn lock() -> std::sync::MutexGuard<'static, Free> {
    FREE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_used_again_and_shows_nothing_of_what_it_had_before() {
        let first = read(&[1; 4096][..], 4096).unwrap();
        let held = first.slice(1..);
        let at = first.as_ptr();
        drop(first);
        assert_ne!(read(&[2; 4096][..], 4096).unwrap().as_ptr(), at, "somebody holds a part of it");
        assert_eq!(held, [1; 4095][..]);
        drop(held);
        // Other tests read, too.
        let again: Vec<Bytes> = (0..8).map(|_| read(&[3; 10][..], 10).unwrap()).collect();
        assert!(again.iter().all(|content| *content == [3; 10][..]));
    }
}
