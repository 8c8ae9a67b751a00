//! Another look at the blocks that were found bad before. A place that reads well again (a file system was repaired, a pack is back)
//! or is gone (its pack was pruned) leaves the quarantine. One that is still bad stays there, so that nobody refers to it; when the
//! block was stored anew since, it is healed and hurts nobody.

use super::super::error::{Error, Result};
use super::super::pack;
use super::super::quarantine::{Bad, Quarantine};
use super::places::Places;
use super::{Hurts, Verify, VerifyReport, as_damage};

/// What became of a bad place.
enum Now {
    Gone,
    Sound,
    Healed,
    Lost,
}

impl Verify<'_> {
    /// Looks at every place in quarantine.
    pub(super) fn look_at_known(&mut self, report: &mut VerifyReport) -> Result<()> {
        let mut damaged = Vec::new();
        let records = Quarantine::records(self.repo.store(), &mut damaged)?;
        for error in damaged {
            if let Error::Corrupt { object, .. } = &error {
                self.worthless.push(object.clone());
            }
            self.damaged(error, Hurts::new())?;
        }
        for (object, record) in records {
            self.options.go_on()?;
            let before = record.blocks.len();
            let mut kept = Vec::new();
            for bad in record.blocks {
                match self.look_at(&bad)? {
                    Now::Gone => {}
                    Now::Sound => report.sound_again += 1,
                    Now::Healed => {
                        report.healed += 1;
                        kept.push(bad);
                    }
                    Now::Lost => {
                        let what = format!("block {}: {}", bad.id, bad.what);
                        self.lost.insert(bad.id, (pack::name(bad.pack), what));
                        kept.push(bad);
                    }
                }
            }
            if kept.len() < before {
                let store = self.repo.store();
                let written = Quarantine::add(store, &kept).and_then(|()| store.delete(&[object]));
                self.note("blocks that are sound stay in quarantine", written);
            }
        }
        Ok(())
    }

    fn look_at(&self, bad: &Bad) -> Result<Now> {
        let places = match self.repo.index().locate_all(bad.id) {
            Ok(places) => places,
            // A damaged run may have it.
            Err(error) => {
                as_damage(error)?;
                return self.read_anywhere(bad);
            }
        };
        let mut there = false;
        for (location, _) in places.iter().filter(|(place, _)| place.pack == bad.pack) {
            there = true;
            match Places::new(self.repo, None).read(&[(bad.id, *location)]) {
                Ok(found) if found.is_empty() => return Ok(Now::Sound),
                Ok(_) | Err(Error::NotFound { .. } | Error::Io { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if there {
            self.read_anywhere(bad)
        } else {
            Ok(Now::Gone)
        }
    }

    fn read_anywhere(&self, bad: &Bad) -> Result<Now> {
        match self.repo.read_block(bad.id) {
            Ok(_) => Ok(Now::Healed),
            Err(Error::Corrupt { .. } | Error::Io { .. }) => Ok(Now::Lost),
            Err(error) => Err(error),
        }
    }
}
