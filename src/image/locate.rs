//! Looking up blocks that come in the order of a disk. What was read in one go lies in one pack in the same order, so once two
//! blocks in a row are neighbours in a pack, its footer answers for those that follow, and the index is asked again only where
//! the order breaks.

use super::block::Location;
use super::error::Result;
use super::ids::BlockId;
use super::pack::{self, PackIndex};
use super::repo::Repository;

/// A footer of more entries is not held in memory.
const ENTRIES: usize = 1 << 17;

/// One reader's place.
pub(super) struct Locator<'a> {
    repo: &'a Repository,
    last: Option<Location>,
    /// A footer, and the entry that is expected next.
    footer: Option<(PackIndex, usize)>,
}

impl<'a> Locator<'a> {
    pub(super) fn new(repo: &'a Repository) -> Self {
        Self {
            repo,
            last: None,
            footer: None,
        }
    }

    /// Where a block is, as [`locate_stored`](super::index::Index::locate_stored) says.
    pub(super) fn locate(&mut self, id: BlockId) -> Result<Location> {
        let index = self.repo.index();
        if let Some((footer, next)) = &mut self.footer
            && let Some((listed, location)) = footer.entries.get(*next)
            && *listed == id
            && !index.is_quarantined(id)?
        {
            *next += 1;
            self.last = Some(*location);
            return Ok(*location);
        }
        let location = index.locate_stored(id)?;
        self.follow(&location);
        self.last = Some(location);
        Ok(location)
    }

    /// Makes ready for the block after this one.
    fn follow(&mut self, location: &Location) {
        let expected = |footer: &PackIndex| {
            let at = |(_, other): &(BlockId, Location)| other.offset <= location.offset;
            footer.entries.partition_point(at)
        };
        if let Some((footer, next)) = &mut self.footer
            && footer.id == location.pack
        {
            *next = expected(footer);
            return;
        }
        let neighbours = self.last.is_some_and(|last| {
            last.pack == location.pack && last.end() == u64::from(location.offset)
        });
        if !neighbours {
            return;
        }
        // A damaged footer answers nothing; the index does.
        if let Ok(footer) = pack::open(self.repo.store(), &pack::name(location.pack))
            && footer.entries.len() <= ENTRIES
        {
            let next = expected(&footer);
            self.footer = Some((footer, next));
        }
    }
}
