//! The whole index at one moment, for those who check it: every page of every run is read, and what is sound is handed on in the
//! order of the ids. Nothing is locked, so that a repository that may only be read can be checked.

use std::sync::Arc;

use super::super::block::Location;
use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId};
use super::super::store::Store;
use super::merge::Merged;
use super::run::Run;
use super::{Index, TRIES};

/// The index as it was found.
pub(in crate::image) struct Audit {
    store: Arc<dyn Store>,
    /// Those whose pages are all sound.
    runs: Vec<Arc<Run>>,
    /// One error for each damaged run.
    pub(in crate::image) damaged: Vec<Error>,
}

impl Index {
    /// Reads all of it.
    pub(in crate::image) fn audit(&self) -> Result<Audit> {
        let mut tries = 0;
        'again: loop {
            let snapshot = self.fresh()?;
            let mut damaged: Vec<Error> =
                snapshot.broken.iter().map(Error::repeat_damage).collect();
            let mut runs = Vec::new();
            for run in &snapshot.runs {
                match run.check(&*self.store, &mut |_, _| Ok(())) {
                    Ok(()) => runs.push(Arc::clone(run)),
                    // Merged by another process meanwhile.
                    Err(error) if error.is_not_found() && tries < TRIES => {
                        tries += 1;
                        continue 'again;
                    }
                    Err(error @ Error::Corrupt { .. }) => damaged.push(error),
                    Err(error) => return Err(error),
                }
            }
            return Ok(Audit {
                store: Arc::clone(&self.store),
                runs,
                damaged,
            });
        }
    }

    /// Whether a run names a pack; past any cache.
    pub(in crate::image) fn names(&self, pack: ObjectId) -> Result<bool> {
        Ok(self
            .fresh()?
            .runs
            .iter()
            .any(|run| run.packs.binary_search(&pack).is_ok()))
    }
}

impl Audit {
    /// All entries in the order of the ids, each once.
    pub(in crate::image) fn entries(&self) -> Result<Entries<'_>> {
        Merged::new(&*self.store, &self.runs).map(Entries)
    }
}

/// The entries of sound runs.
pub(in crate::image) struct Entries<'a>(Merged<'a>);

impl Entries<'_> {
    /// The next one.
    pub(in crate::image) fn next(&mut self) -> Result<Option<(BlockId, Location)>> {
        self.0.next()
    }
}
