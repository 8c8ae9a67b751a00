//! Repacking: the live blocks of packs that are mostly dead, or small, are copied into new packs, each checked and re-hashed. The old
//! packs may be condemned when the copies are durable and in the index.

use std::collections::HashSet;

use super::super::block::{NewBlock, decode_entry};
use super::super::bytes::narrow;
use super::super::error::{Error, Result};
use super::super::ids::ObjectId;
use super::super::pack::{self, PackWriter, entry_length};
use super::super::quarantine::Quarantine;
use super::super::repo::{Encoded, Repository};
use super::mark::Mark;
use super::plan::{Plan, Sound};
use super::{PruneReport, Watch};

/// What the packs that are written here are labelled with: never a session's.
const LABEL: &str = "repack";

/// Copies what is live, and gives the packs that nothing needs any more.
pub(super) fn repack(
    repo: &Repository,
    mark: &Mark<'_>,
    packs: &HashSet<ObjectId>,
    plan: &Plan,
    watch: &Watch<'_>,
    report: &mut PruneReport,
) -> Result<Vec<ObjectId>> {
    let chosen = &plan.repack;
    if chosen.is_empty() {
        return Ok(Vec::new());
    }
    watch.begin("repack", chosen.iter().map(|(_, live)| live).sum());
    let quarantine = Quarantine::read(repo.store())?;
    let mut copier = Copier {
        repo,
        mark,
        quarantine: &quarantine,
        packs,
        weak: &plan.weak,
        writer: repo.pack_writer(LABEL),
    };
    let mut emptied = Vec::new();
    for (pack, live) in chosen {
        let done = watch.go_on().and_then(|()| copier.copy(*pack));
        match done {
            Ok(()) => emptied.push(*pack),
            Err(Error::Corrupt { object, what }) => {
                report.kept_damaged.add(*live);
                report.damaged.push(format!("{object} is corrupt: {what}"));
            }
            Err(error) => return give_up(copier.writer, error, report),
        }
        watch.done(*live);
    }
    let stored = copier.writer.stats().stored_bytes;
    match copier.writer.seal() {
        Ok(_) => {
            report.rewritten_bytes = stored;
            Ok(emptied)
        }
        // What was published stays as a second copy, which the next prune takes away.
        Err(Error::NoSpace { .. }) => {
            report.no_room = true;
            Ok(Vec::new())
        }
        Err(error) => Err(error),
    }
}

/// Without room nothing is repacked, but what is dead goes all the same.
fn give_up(writer: PackWriter, error: Error, report: &mut PruneReport) -> Result<Vec<ObjectId>> {
    writer.abandon()?;
    match error {
        Error::NoSpace { .. } => {
            report.no_room = true;
            Ok(Vec::new())
        }
        error => Err(error),
    }
}

struct Copier<'a> {
    repo: &'a Repository,
    mark: &'a Mark<'a>,
    quarantine: &'a Quarantine,
    packs: &'a HashSet<ObjectId>,
    weak: &'a HashSet<ObjectId>,
    writer: PackWriter,
}

impl Copier<'_> {
    /// Copies the live blocks of a pack of which it has the copy that counts.
    fn copy(&mut self, pack: ObjectId) -> Result<()> {
        let object = pack::name(pack);
        let index = pack::open(self.repo.store(), &object)?;
        let condemned = HashSet::new();
        let sound = Sound {
            packs: self.packs,
            condemned: &condemned,
            quarantine: self.quarantine,
            weak: self.weak,
        };
        let mut plain = Vec::new();
        for (id, location) in &index.entries {
            if !self.mark.has(*id) {
                continue;
            }
            let known = self.repo.index().locate_all(*id)?;
            let chosen = sound.chosen(*id, known.iter().map(|(location, _)| location));
            // What the index does not know was looked for among all references before.
            if known.is_empty() || chosen.is_some_and(|chosen| chosen.pack != pack) {
                continue;
            }
            let mut entry = vec![0; entry_length(location)];
            let offset = u64::from(location.offset);
            self.repo.store().get_range(&object, offset, &mut entry)?;
            plain.resize(narrow(u64::from(location.plain)), 0);
            let decoded = decode_entry(self.repo.hasher(), &entry, *id, &mut plain);
            let block = if decoded.is_ok() {
                NewBlock {
                    id: *id,
                    codec: location.codec,
                    plain: location.plain,
                    stored: location.stored,
                    entry,
                }
            } else {
                // Another copy may be sound, and is about to go.
                let plain = self.repo.read_block(*id)?;
                NewBlock::encode(*id, &plain, self.repo.compression())?
            };
            self.writer.put(Encoded::New(block))?;
        }
        Ok(())
    }
}
