//! The residual on its way from the snapshot to the repository: kept at local speed in memory up to a limit, then in a file
//! without a name. Nothing of it outlives the process.

use std::fs::File;
use std::ops::{ControlFlow, Deref};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result};

use crate::copy::Piece;
use crate::qmp::export::unnamed_file;
use crate::units::Extent;

/// So much is kept in memory.
const MEMORY: usize = 64 << 20;
/// The largest piece that is handed on at once.
const PIECE: u64 = 1 << 20;

/// Where the bytes of a piece are.
#[derive(Clone, Copy)]
enum Place {
    Zeros,
    Memory(usize),
    File(u64),
}

/// Pieces of disks in the order that they came.
pub(super) struct Spool {
    entries: Vec<(usize, Extent, Place)>,
    memory: Vec<u8>,
    file: File,
    filled: u64,
}

impl Spool {
    /// An empty spool whose file, if it needs one, is in this directory.
    pub(super) fn new(directory: &Path) -> Result<Self> {
        let file = unnamed_file(directory)
            .with_context(|| format!("create a spool in {}", directory.display()))?;
        Ok(Self {
            entries: Vec::new(),
            memory: Vec::new(),
            file,
            filled: 0,
        })
    }

    /// Keeps a piece.
    pub(super) fn put(&mut self, disk: usize, extent: Extent, data: Option<&[u8]>) -> Result<()> {
        let place = match data {
            None => Place::Zeros,
            Some(data) if self.memory.len() + data.len() <= MEMORY => {
                self.memory.extend_from_slice(data);
                Place::Memory(self.memory.len() - data.len())
            }
            Some(data) => {
                self.file
                    .write_all_at(data, self.filled)
                    .context("write to the spool")?;
                self.filled += data.len() as u64;
                Place::File(self.filled - data.len() as u64)
            }
        };
        self.entries.push((disk, extent, place));
        Ok(())
    }

    /// How many bytes of disks it holds.
    pub(super) fn bytes(&self) -> u64 {
        self.entries
            .iter()
            .map(|(_, extent, _)| extent.length)
            .sum()
    }

    /// Hands all of it on; it stays, and may be handed on again.
    pub(super) fn hand_on(
        &self,
        give: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        for (disk, extent, place) in self.entries.iter().copied() {
            let data: Option<Box<dyn Deref<Target = [u8]> + Send>> = match place {
                Place::Zeros => None,
                Place::Memory(at) => {
                    let length = usize::try_from(extent.length).context("a piece too long")?;
                    Some(Box::new(self.memory[at..at + length].to_vec()))
                }
                Place::File(at) => {
                    anyhow::ensure!(extent.length <= PIECE, "a piece of {} bytes", extent.length);
                    let mut bytes = vec![0; usize::try_from(extent.length)?];
                    self.file
                        .read_exact_at(&mut bytes, at)
                        .context("read the spool")?;
                    Some(Box::new(bytes))
                }
            };
            if give(Piece { disk, extent, data }).is_break() {
                return Ok(ControlFlow::Break(()));
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}
