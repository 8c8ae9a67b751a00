//! The changed extents since the last point, whatever of them has been copied ahead already.

use std::ops::ControlFlow;

use anyhow::Result;
use serde::Serialize;

use super::Runner;
use super::pass::pending_names;
use crate::bitmap::blocks::BlockSet;
use crate::bitmap::track::Tracked;
use crate::qmp::export::Listening;
use crate::units::{BlockRun, Extent};
use crate::vm::Hold;

/// What changed on a disk.
#[derive(Debug, Clone, Serialize)]
pub struct Changed {
    /// Its key.
    pub disk: String,
    /// Bytes.
    pub size: u64,
    /// Why all of it counts as changed, when it does.
    pub whole: Option<String>,
    /// Whole blocks, in order.
    pub extents: Vec<Extent>,
}

impl Runner {
    /// Rotates, so that the changes so far can be read, and reads them.
    pub fn changed(&mut self) -> Result<Vec<Changed>> {
        let mut hold = self.hold()?;
        self.rotate(&mut hold, false)?;
        let listening = Listening::place(&hold.monitor, self.vm.state.directory(), &self.run);
        let read = self.read_changed(&mut hold, &listening);
        hold.release()?;
        read
    }

    fn read_changed(&self, hold: &mut Hold, listening: &Listening) -> Result<Vec<Changed>> {
        self.serve(hold, listening, self.disks.len(), true)?;
        let mut all = Vec::new();
        for (index, disk) in self.disks.iter().enumerate() {
            let tracked = self.tracked(&disk.key)?;
            let changed = self.changed_blocks(hold, listening, index, &tracked)?;
            let block_size = self.repo.block_size();
            let extents = changed
                .runs()
                .map(|run| block_size.run_extent(run, tracked.size));
            all.push(Changed {
                disk: disk.key.clone(),
                size: tracked.size,
                whole: tracked.whole.and(tracked.doubt.clone()),
                extents: extents.collect(),
            });
        }
        Ok(all)
    }

    fn changed_blocks(
        &self,
        hold: &mut Hold,
        listening: &Listening,
        index: usize,
        tracked: &Tracked,
    ) -> Result<BlockSet> {
        let block_size = self.repo.block_size();
        // What was copied ahead is no longer in a bitmap, but changed all the same.
        let (_, mut changed) = self.session.proofs(tracked, block_size)?;
        if tracked.whole.is_some() {
            changed.insert(BlockRun {
                first: 0,
                count: changed.blocks(),
            });
        }
        let pending = pending_names(tracked);
        let mut client = self.connect(hold, listening, index, &tracked.key, &pending)?;
        let whole = Extent {
            offset: 0,
            length: tracked.size,
        };
        for (_, name) in &pending {
            client.dirty_extents(name, whole, &mut |extent| {
                changed.insert(block_size.cover(extent));
                ControlFlow::Continue(())
            })?;
        }
        client.disconnect()?;
        Ok(changed)
    }
}
