//! Healing: a block is known by its content, so storing the same content once more heals every point that refers to it. Which blocks
//! wait for that is worked out from the quarantine each time; nothing else is written down.

use std::collections::HashSet;

use super::error::{Error, Result};
use super::ids::BlockId;
use super::quarantine::{Bad, Quarantine};
use super::repo::Repository;

impl Repository {
    /// Puts bad places into quarantine that are not in it.
    pub(super) fn quarantine(&self, found: &[Bad]) -> Result<()> {
        if found.is_empty() {
            return Ok(());
        }
        let known = Quarantine::read(self.store())?;
        let mut new: Vec<Bad> = found.to_vec();
        new.retain(|bad| !known.has(bad.id, bad.pack));
        new.sort_unstable_by_key(|bad| (bad.id, bad.pack));
        new.dedup_by_key(|bad| (bad.id, bad.pack));
        Quarantine::add(self.store(), &new)
    }

    /// The blocks that are bad wherever they are stored, as of now. Costs a listing when nothing was found bad. From then on
    /// [`Repository::encode`] takes none of them for known.
    pub fn lost_blocks(&self) -> Result<HashSet<BlockId>> {
        let quarantine = Quarantine::read(self.store())?;
        let ids: HashSet<BlockId> = quarantine.ids().collect();
        if ids.is_empty() {
            return Ok(ids);
        }
        self.index().refresh()?;
        let mut lost = HashSet::new();
        for id in ids {
            match self.index().locate(id) {
                Ok(Some(_)) => {}
                Ok(None) => {
                    lost.insert(id);
                }
                // What a damaged run may hide is read once more.
                Err(error @ Error::Corrupt { .. }) => {
                    tracing::debug!(%error, "a block counts as lost");
                    lost.insert(id);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(lost)
    }
}
