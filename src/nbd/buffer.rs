//! Buffers that are made once and used again: a pool of at most `limit` buffers of `size` bytes each, so that the
//! memory of a reader is bounded whatever its consumer does. A buffer goes home when it is dropped.
//!
//! The bytes of a recycled buffer are those of its last use: only the reader, which proves that every byte was
//! received or zeroed, hands one out.

use std::{
    ops::{Deref, DerefMut},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

#[derive(Debug, Clone)]
pub(super) struct BufferPool(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    size: usize,
    limit: usize,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<Vec<u8>>,
    lent: usize,
}

impl Shared {
    /// No code can panic while it holds the lock, so a poisoned one is as good.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BufferPool {
    pub(super) fn new(limit: usize, size: usize) -> Self {
        Self(Arc::new(Shared {
            size,
            limit,
            state: Mutex::default(),
            returned: Condvar::new(),
        }))
    }

    pub(super) fn fits(&self, limit: usize, size: usize) -> bool {
        self.0.limit == limit && self.0.size == size
    }

    /// A buffer, when one is free.
    pub(super) fn try_take(&self) -> Option<Buffer> {
        self.lend(&mut self.0.lock())
    }

    /// A buffer, as soon as one is free.
    pub(super) fn take(&self) -> Buffer {
        let mut state = self.0.lock();
        loop {
            if let Some(buffer) = self.lend(&mut state) {
                return buffer;
            }
            state = self
                .0
                .returned
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn lend(&self, state: &mut State) -> Option<Buffer> {
        if state.lent >= self.0.limit {
            return None;
        }
        state.lent += 1;
        let bytes = state.free.pop().unwrap_or_else(|| vec![0; self.0.size]);
        Some(Buffer {
            length: bytes.len(),
            bytes,
            pool: Arc::clone(&self.0),
        })
    }
}

/// Bytes that were read; dropping it lets the reader use the memory for another request.
#[derive(Debug)]
pub struct Buffer {
    bytes: Vec<u8>,
    length: usize,
    pool: Arc<Shared>,
}

impl Buffer {
    pub(super) fn set_length(&mut self, length: usize) {
        self.length = length.min(self.bytes.len());
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[..self.length]
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.lent -= 1;
        state.free.push(std::mem::take(&mut self.bytes));
        drop(state);
        self.pool.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_never_lends_more_than_its_limit() {
        let pool = BufferPool::new(2, 16);
        let one = pool.try_take();
        let two = pool.try_take();
        assert!(one.is_some() && two.is_some());
        assert!(pool.try_take().is_none());
        drop(one);
        assert!(pool.try_take().is_some());
    }

    #[test]
    fn taking_waits_until_another_thread_gives_back() {
        let pool = BufferPool::new(1, 16);
        let lent = pool.take();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| pool.take().len());
            drop(lent);
            assert_eq!(waiter.join().unwrap(), 16);
        });
    }
}
