//! Whom damage hurts, and whether anybody needs what is damaged: a bad block that nothing refers to is a matter for `prune`.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId, PointId, SessionId};
use super::super::manifest::Manifest;
use super::super::map::{Layer, MapReader, MapRef, Run, RunContent, SEGMENT};
use super::super::pack;
use super::super::session::{self, Root, State};
use super::structure::Unreadable;
use super::{Hurts, Verify};

/// Who needs what is damaged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Need {
    /// Nobody refers to it, or only layers beneath newer ones that hide it: a prune removes it.
    Nobody,
    /// A point or a session needs it, or it cannot be told that none does.
    Somebody,
}

/// All runs of a layer.
fn runs_of(layer: Layer) -> impl Iterator<Item = Result<Run>> {
    let mut stream = Arc::new(layer).stream();
    std::iter::from_fn(move || stream.next_run().transpose())
}

/// What is needed of some blocks.
#[derive(Default)]
struct Needs {
    /// Not everything that may refer to them could be read.
    unknown: bool,
    /// Not needed as far as was looked.
    nobodys: HashSet<BlockId>,
    maps: Vec<MapRef>,
}

impl Needs {
    fn of(&self, id: BlockId) -> Need {
        if !self.unknown && self.nobodys.contains(&id) {
            Need::Nobody
        } else {
            Need::Somebody
        }
    }

    /// Takes in that something was read, or could not be.
    fn note(&mut self, read: Result<()>) -> Result<()> {
        match read {
            Ok(()) => Ok(()),
            Err(Error::Corrupt { .. } | Error::NotFound { .. } | Error::Unsupported(_)) => {
                self.unknown = true;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    fn take(&mut self, runs: impl Iterator<Item = Result<Run>>) -> Result<()> {
        for run in runs {
            if let RunContent::Data(ids) = &run?.content {
                for id in ids.as_slice() {
                    self.nobodys.remove(id);
                }
            }
        }
        Ok(())
    }
}

impl Verify<'_> {
    /// Writes down the bad places that were found, and finds out which blocks cannot be read anywhere.
    pub(super) fn settle(&mut self) -> Result<()> {
        let mut found = std::mem::take(&mut self.found);
        found.sort_unstable_by_key(|bad| (bad.id, bad.pack));
        found.dedup_by_key(|bad| (bad.id, bad.pack));
        if found.is_empty() {
            return Ok(());
        }
        let added = self.repo.quarantine(&found);
        self.note("the bad blocks are not in quarantine", added);
        self.repo.index().refresh()?;
        for bad in found {
            let object = pack::name(bad.pack);
            let what = format!("block {}: {}", bad.id, bad.what);
            match self.repo.read_block(bad.id) {
                Ok(_) => self.elsewhere.push((bad.id, object, what)),
                Err(error @ (Error::Corrupt { .. } | Error::Io { .. })) => {
                    tracing::debug!(%error, "no place has a block");
                    self.lost.insert(bad.id, (object, what));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Names the points that lost blocks hurt, finds maps with holes, and tells what nobody needs. Ended before, it tells what is
    /// damaged all the same.
    pub(super) fn attribute(
        &mut self,
        points: &[Manifest],
        unreadable: BTreeMap<ObjectId, Unreadable>,
    ) -> Result<()> {
        let lost = std::mem::take(&mut self.lost);
        let absent = std::mem::take(&mut self.absent);
        let elsewhere = std::mem::take(&mut self.elsewhere);
        let looked = self.hurts(points, &lost).and_then(|hurts| {
            let mut concerned: HashSet<BlockId> = lost.keys().copied().collect();
            concerned.retain(|id| !hurts.contains_key(id));
            concerned.extend(elsewhere.iter().map(|(id, ..)| *id));
            concerned.extend(unreadable.values().flat_map(|pack| &pack.ids));
            Ok((hurts, self.needs(concerned)?))
        });
        let (mut hurts, needs, interrupted) = match looked {
            Ok((hurts, needs)) => (hurts, needs, false),
            Err(Error::Interrupted) => (HashMap::new(), Needs::default(), true),
            Err(error) => return Err(error),
        };
        for (id, (object, what)) in lost {
            match hurts.remove(&id) {
                Some(hurts) => self.damage(object, &what, hurts),
                // A layer that could not be compared with all that lie over it names it.
                None if absent.contains(&id) && needs.of(id) == Need::Nobody => {}
                None => self.damage_of(object, &what, Hurts::new(), needs.of(id)),
            }
        }
        for (id, object, what) in elsewhere {
            self.damage_of(object, &what, Hurts::new(), needs.of(id));
        }
        for Unreadable { object, what, ids } in unreadable.into_values() {
            // What is in one that the index does not know cannot be told.
            let need = ids.iter().map(|id| needs.of(*id)).max();
            let need = need.unwrap_or(Need::Somebody);
            self.damage_of(object, &what, Hurts::new(), need);
        }
        if interrupted {
            return Err(Error::Interrupted);
        }
        Ok(())
    }

    /// The points that are there and that lost blocks hurt, by block.
    fn hurts(
        &mut self,
        points: &[Manifest],
        lost: &BTreeMap<BlockId, (String, String)>,
    ) -> Result<HashMap<BlockId, Hurts>> {
        let mut hurts: HashMap<BlockId, Hurts> = HashMap::new();
        let mut hurt: HashSet<PointId> = HashSet::new();
        for point in points {
            for disk in &point.disks {
                self.options.go_on()?;
                let who = (point.id, Some(disk.key.clone()));
                let walked = MapReader::open(self.repo, &disk.map).and_then(|map| {
                    for run in map.runs() {
                        if let RunContent::Data(ids) = &run?.content {
                            for id in ids.as_slice().iter().filter(|id| lost.contains_key(id)) {
                                hurts.entry(*id).or_default().insert(who.clone());
                                hurt.insert(point.id);
                            }
                        }
                    }
                    Ok(())
                });
                if let Err(error) = walked {
                    let there = self.that_are_there([who].into())?;
                    if !there.is_empty() {
                        self.damaged(error, there)?;
                    }
                }
            }
        }
        let all = hurt.into_iter().map(|point| (point, None)).collect();
        let there = self.that_are_there(all)?;
        for points in hurts.values_mut() {
            points.retain(|(point, _)| there.contains(&(*point, None)));
        }
        hurts.retain(|_, points| !points.is_empty());
        Ok(hurts)
    }

    /// Who needs some blocks: all points and sessions are looked at, not only the chosen ones.
    fn needs(&self, concerned: HashSet<BlockId>) -> Result<Needs> {
        let mut needs = Needs::default();
        if concerned.is_empty() {
            return Ok(needs);
        }
        needs.nobodys = concerned;
        // Sessions first: what they hold may become a point meanwhile.
        for (id, state) in session::states(self.repo)? {
            self.options.go_on()?;
            if matches!(state, State::Whole) {
                let read = self.session_needs(id, &mut needs);
                needs.note(read)?;
            }
        }
        let points = self.repo.points()?;
        needs.unknown |= !points.damaged.is_empty();
        let disks = points.points.into_iter().flat_map(|point| point.disks);
        needs.maps.extend(disks.map(|disk| disk.map));
        let maps = std::mem::take(&mut needs.maps);
        for map in &maps {
            self.options.go_on()?;
            let read = MapReader::open(self.repo, map).and_then(|map| needs.take(map.runs()));
            needs.note(read)?;
        }
        Ok(needs)
    }

    fn session_needs(&self, id: SessionId, needs: &mut Needs) -> Result<()> {
        // One that is none any more has become a point, or is gone.
        for root in session::roots(self.repo, id)?.unwrap_or_default() {
            match root {
                Root::Maps(maps) => needs.maps.extend(maps),
                Root::Segment(object) => {
                    let segment = Layer::open(self.repo.store_arc(), &object, SEGMENT, None)?;
                    needs.take(runs_of(segment))?;
                }
            }
        }
        Ok(())
    }
}
