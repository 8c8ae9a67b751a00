//! How open blocks of a disk are read: runs that are worth it are asked for zeros first, the rest is read in groups.

use std::ops::ControlFlow;

use anyhow::Result;

use crate::bitmap::blocks::BlockSet;
use crate::copy::Piece;
use crate::nbd::{Client, ReadOptions};
use crate::units::{BlockRun, BlockSize, Extent};

/// A run of at least this many blocks is worth asking the block status for.
const WORTH_ASKING: u64 = 16;
/// The most blocks that are asked for at once.
const WINDOW: u64 = 4096;
/// The spans of runs that are read together.
const GROUP: usize = 4096;

/// How the open blocks of a disk are read.
pub(super) struct Reading<'a> {
    pub(super) block_size: BlockSize,
    pub(super) options: ReadOptions,
    pub(super) permit: &'a (dyn Fn(u64) -> ControlFlow<()> + Sync),
}

impl Reading<'_> {
    /// Reads the open blocks of a disk in order. What the block status calls zero is not read, but handed on as zeros.
    pub(super) fn read_open(
        &self,
        client: &mut Client,
        disk: usize,
        size: u64,
        open: &BlockSet,
        give: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        let mut group: Vec<Extent> = Vec::new();
        for run in open.runs_from(0, WINDOW) {
            let extent = self.block_size.run_extent(run, size);
            if run.count < WORTH_ASKING {
                group.push(extent);
            } else {
                let zeros = self.zeros(client, run, size)?;
                let mut at = run.first;
                for zero in zeros {
                    if zero.first > at {
                        let data = BlockRun {
                            first: at,
                            count: zero.first - at,
                        };
                        group.push(self.block_size.run_extent(data, size));
                    }
                    at = zero.end();
                    let extent = self.block_size.run_extent(zero, size);
                    if (self.permit)(0).is_break()
                        || give(Piece {
                            disk,
                            extent,
                            data: None,
                        })
                        .is_break()
                    {
                        return Ok(ControlFlow::Break(()));
                    }
                }
                if at < run.end() {
                    let data = BlockRun {
                        first: at,
                        count: run.end() - at,
                    };
                    group.push(self.block_size.run_extent(data, size));
                }
            }
            let bytes: u64 = group.iter().map(|extent| extent.length).sum();
            if (group.len() >= GROUP || bytes >= WINDOW * self.block_size.bytes())
                && self
                    .read(client, disk, std::mem::take(&mut group), give)?
                    .is_break()
            {
                return Ok(ControlFlow::Break(()));
            }
        }
        self.read(client, disk, group, give)
    }

    /// The whole blocks of a run that read as zeros.
    fn zeros(&self, client: &mut Client, run: BlockRun, size: u64) -> Result<Vec<BlockRun>> {
        let mut zeros = Vec::new();
        let within = self.block_size.run_extent(run, size);
        client.zero_extents(within, &mut |extent| {
            let first = extent.offset.div_ceil(self.block_size.bytes());
            let end = if extent.end() >= size {
                self.block_size.blocks(size)
            } else {
                extent.end() / self.block_size.bytes()
            };
            if end > first {
                zeros.push(BlockRun {
                    first,
                    count: end - first,
                });
            }
            ControlFlow::Continue(())
        })?;
        Ok(zeros)
    }

    fn read(
        &self,
        client: &mut Client,
        disk: usize,
        extents: Vec<Extent>,
        give: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<ControlFlow<()>> {
        if extents.is_empty() {
            return Ok((self.permit)(0));
        }
        let summary = client.read_all(
            extents,
            self.options,
            &|bytes| (self.permit)(bytes),
            &mut |done| {
                let data =
                    done.data
                        .map(|buffer| -> Box<dyn std::ops::Deref<Target = [u8]> + Send> {
                            Box::new(buffer)
                        });
                give(Piece {
                    disk,
                    extent: done.extent,
                    data,
                })
            },
        )?;
        Ok(if summary.stopped {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    }
}
