//! A disk in memory for the unit tests.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::block::{BlockDevice, Page, SLOT};

/// Clones share the bytes.
#[derive(Clone)]
pub(crate) struct MemoryDisk(Arc<Mutex<Vec<u8>>>);

impl MemoryDisk {
    pub(crate) fn new(size: u64) -> Self {
        Self(Arc::new(Mutex::new(vec![
            0;
            usize::try_from(size).unwrap()
        ])))
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap()
    }

    fn at(slot: u64) -> usize {
        usize::try_from(slot * SLOT).unwrap()
    }
}

impl BlockDevice for MemoryDisk {
    fn size(&self) -> u64 {
        self.lock().len() as u64
    }

    fn read(&mut self, slot: u64, page: &mut Page) -> io::Result<()> {
        let start = Self::at(slot);
        page.0.copy_from_slice(&self.lock()[start..start + 4096]);
        Ok(())
    }

    fn write(&mut self, slot: u64, page: &Page) -> io::Result<()> {
        let start = Self::at(slot);
        self.lock()[start..start + 4096].copy_from_slice(&page.0);
        Ok(())
    }

    fn zero(&mut self, slot: u64, count: u64) -> io::Result<()> {
        self.lock()[Self::at(slot)..Self::at(slot + count)].fill(0);
        Ok(())
    }

    fn discard(&mut self, slot: u64, count: u64) -> io::Result<()> {
        self.zero(slot, count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
