//! What should go: how much of each pack is live, by the index and the mark, and which packs are deleted or repacked for it.
//!
//! Of several copies of a block one counts as live. It is not one in a pack whose own list cannot be read, when there is another:
//! before a copy goes, the pack is opened that has the one that stays. Nothing is given up that the index merely does not know: the packs decide
//! what exists, so a pack is compared with its own list first.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};

use super::super::block::Location;
use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId, SessionId};
use super::super::look::Present;
use super::super::pack;
use super::super::quarantine::{Bad, Quarantine};
use super::super::repo::Repository;
use super::PruneReport;
use super::mark::Mark;

/// Packs of fewer bytes are merged when there are several.
const SMALL: u64 = 16 << 20;
/// So many small packs are worth merging.
const SMALL_PACKS: usize = 4;
/// So many blocks of a pack that is not there tell whether it is needed: few that are not look as if they were.
const SAMPLE: usize = 1024;
/// So many blocks that the index does not know are looked for among all references at most.
const UNKNOWN: usize = 4 << 20;

/// The packs there are, past any cache.
pub(super) fn list(repo: &Repository) -> Result<HashSet<ObjectId>> {
    let names = repo.store().list_fresh("packs/")?;
    let id = |name: &String| name.rsplit('/').next()?.parse().ok();
    Ok(names.iter().filter_map(id).collect())
}

/// What others may use of a block's locations.
pub(super) struct Sound<'a> {
    pub(super) packs: &'a HashSet<ObjectId>,
    pub(super) condemned: &'a HashSet<ObjectId>,
    pub(super) quarantine: &'a Quarantine,
    /// Packs whose lists cannot be read: their copies count when there are no others.
    pub(super) weak: &'a HashSet<ObjectId>,
}

impl Sound<'_> {
    pub(super) fn has(&self, id: BlockId, location: &Location) -> bool {
        self.packs.contains(&location.pack)
            && !self.condemned.contains(&location.pack)
            && !self.quarantine.has(id, location.pack)
    }

    /// The copy that counts as live.
    pub(super) fn chosen<'b>(
        &self,
        id: BlockId,
        locations: impl IntoIterator<Item = &'b Location>,
    ) -> Option<&'b Location> {
        let sound = locations
            .into_iter()
            .filter(|location| self.has(id, location));
        sound.min_by_key(|location| {
            let is_weak = self.weak.contains(&location.pack);
            (is_weak, location.pack, location.offset)
        })
    }
}

/// How much of a pack is live.
#[derive(Debug, Clone, Copy, Default)]
struct Usage {
    live: u64,
    bytes: u64,
    /// Entries that the index has of it.
    entries: u64,
    /// It has blocks that were found bad and that nobody needs: as long as it is there they are told of.
    rotten: bool,
    /// It has blocks that are needed and bad everywhere: what is live in it cannot be copied.
    lost: bool,
}

impl Usage {
    fn is_small(&self) -> bool {
        self.bytes < SMALL
    }

    fn is_worth_repacking(&self) -> bool {
        self.live * 2 < self.bytes || (self.rotten && !self.lost)
    }
}

/// What is to be done.
#[derive(Default)]
pub(super) struct Plan {
    /// Packs without anything live.
    pub(super) dead: Vec<ObjectId>,
    /// Packs to be repacked, the best first, each with its live bytes.
    pub(super) repack: Vec<(ObjectId, u64)>,
    /// Packs that the index names and that are not there, and of which nothing is needed.
    pub(super) missing: HashSet<ObjectId>,
    /// Packs that are not there although they are needed: the index goes on naming them, so that who reads finds out, and who
    /// backs up reads their blocks again.
    pub(super) lost: HashSet<ObjectId>,
    /// Packs whose lists cannot be read, and of which other copies count.
    pub(super) weak: HashSet<ObjectId>,
}

/// Makes the plan for the packs that were listed before everything was marked.
pub(super) fn make(
    repo: &Repository,
    mark: &Mark<'_>,
    packs: &HashSet<ObjectId>,
    max_repack: u64,
    report: &mut PruneReport,
) -> Result<Plan> {
    let before = report.clone();
    let mut weak = HashSet::new();
    let (mut census, mut plan, partly) = loop {
        *report = before.clone();
        let mut census = Census::new(repo, mark, packs);
        census.count(&weak)?;
        let (mut plan, partly) = census.sort(report)?;
        let going = plan.dead.iter().chain(partly.iter().map(|(pack, _)| pack));
        let more = census.find_weak(going)?;
        // Each time some are found that were not known; there are only so many.
        if more.is_subset(&weak) {
            plan.weak = weak;
            break (census, plan, partly);
        }
        weak.extend(more);
    };
    census.refuse_what_is_needed()?;
    plan.dead.sort_unstable();
    plan.repack = choose(&partly, max_repack);
    let chosen: HashSet<ObjectId> = plan.repack.iter().map(|(pack, _)| *pack).collect();
    for (pack, usage) in partly {
        if !chosen.contains(&pack) && usage.live < usage.bytes {
            report.kept_partly_dead.add(usage.bytes);
        }
    }
    // A pack is there before the index names it: what is not there now is lost.
    let mut present = Present::default();
    let mut gone = HashMap::new();
    for (pack, needed) in std::mem::take(&mut census.unlisted) {
        if !present.has(repo, pack)? {
            gone.insert(pack, needed);
        }
    }
    plan.lost = census.lost(&gone)?;
    for pack in &plan.lost {
        let error = Error::corrupt(pack::name(*pack), "it is missing, and is needed");
        report.damaged.push(error.to_string());
    }
    plan.missing = gone.into_keys().collect();
    plan.missing.retain(|pack| !plan.lost.contains(pack));
    Ok(plan)
}

/// Puts all that lost packs should hold into quarantine: who backs up must neither refer to it there nor take it for stored.
pub(super) fn quarantine(repo: &Repository, lost: &HashSet<ObjectId>) -> Result<()> {
    if lost.is_empty() {
        return Ok(());
    }
    let mut bad = Vec::new();
    repo.index().sweep(&mut |id, locations| {
        let places = locations.iter().filter(|place| lost.contains(&place.pack));
        bad.extend(places.map(|place| Bad {
            id,
            pack: place.pack,
            what: "its pack is missing".to_owned(),
        }));
        Ok(())
    })?;
    repo.quarantine(&bad)
}

/// Which packs to repack: those with the most dead bytes for each byte that is copied.
fn choose(partly: &[(ObjectId, Usage)], max_repack: u64) -> Vec<(ObjectId, u64)> {
    let small = partly.iter().filter(|(_, usage)| usage.is_small());
    let merge = small.count() >= SMALL_PACKS;
    let mut worth: Vec<&(ObjectId, Usage)> = partly
        .iter()
        .filter(|(_, usage)| usage.is_worth_repacking() || (merge && usage.is_small()))
        .collect();
    worth.sort_by_key(|(pack, usage)| {
        let dead = u128::from(usage.bytes - usage.live);
        (Reverse((dead << 32) / u128::from(usage.live.max(1))), *pack)
    });
    let mut left = max_repack;
    let mut chosen = Vec::new();
    for (pack, usage) in worth {
        if let Some(rest) = left.checked_sub(usage.live) {
            left = rest;
            chosen.push((*pack, usage.live));
        }
    }
    chosen
}

/// What becomes of a pack.
enum Fate {
    Stays,
    Dead,
    Partly,
}

struct Census<'a> {
    repo: &'a Repository,
    mark: &'a Mark<'a>,
    packs: &'a HashSet<ObjectId>,
    usage: HashMap<ObjectId, Usage>,
    /// Packs that the index names and the list does not, each with blocks that may be needed and have no other sound copy.
    unlisted: HashMap<ObjectId, Vec<BlockId>>,
    /// Blocks that may be needed and that the index does not know, with the pack that has them.
    unknown: HashMap<BlockId, ObjectId>,
    /// For packs with needed blocks of which copies elsewhere count: the packs that have those.
    relies_on: HashMap<ObjectId, HashSet<ObjectId>>,
    /// Packs that were opened and whose lists cannot be read.
    unreadable: HashSet<ObjectId>,
}

impl<'a> Census<'a> {
    fn new(repo: &'a Repository, mark: &'a Mark<'a>, packs: &'a HashSet<ObjectId>) -> Self {
        Self {
            repo,
            mark,
            packs,
            usage: HashMap::new(),
            unlisted: HashMap::new(),
            unknown: HashMap::new(),
            relies_on: HashMap::new(),
            unreadable: HashSet::new(),
        }
    }

    /// Sorts the packs by what could become of them: the dead ones, and those of which a part is live.
    fn sort(&mut self, report: &mut PruneReport) -> Result<(Plan, Vec<(ObjectId, Usage)>)> {
        let mut plan = Plan::default();
        let mut partly = Vec::new();
        for pack in self.packs {
            let usage = self.usage.get(pack).copied().unwrap_or_default();
            if usage.live > 0 && !usage.is_small() && !usage.is_worth_repacking() {
                continue;
            }
            match self.inspect(*pack, usage, report)? {
                Fate::Stays => {}
                Fate::Dead => plan.dead.push(*pack),
                Fate::Partly => partly.push((*pack, usage)),
            }
        }
        Ok((plan, partly))
    }

    /// Packs whose lists cannot be read, of those whose copies count: where another copy is about to go, and those that were met.
    fn find_weak<'b>(
        &self,
        going: impl Iterator<Item = &'b ObjectId>,
    ) -> Result<HashSet<ObjectId>> {
        let relied_on: HashSet<ObjectId> = self.relies_on.values().flatten().copied().collect();
        let mut weak: HashSet<ObjectId> =
            relied_on.intersection(&self.unreadable).copied().collect();
        let before_they_go: HashSet<ObjectId> = going
            .filter_map(|pack| self.relies_on.get(pack))
            .flatten()
            .copied()
            .collect();
        for pack in before_they_go {
            match pack::open(self.repo.store(), &pack::name(pack)) {
                Ok(_) => {}
                Err(Error::Corrupt { .. } | Error::NotFound { .. }) => {
                    weak.insert(pack);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(weak)
    }

    /// Counts what is live in each pack.
    fn count(&mut self, weak: &HashSet<ObjectId>) -> Result<()> {
        let quarantine = Quarantine::read(self.repo.store())?;
        let condemned = HashSet::new();
        let sound = Sound {
            packs: self.packs,
            condemned: &condemned,
            quarantine: &quarantine,
            weak,
        };
        let Self {
            repo,
            mark,
            usage,
            unlisted,
            relies_on,
            packs,
            ..
        } = self;
        repo.index().sweep(&mut |id, locations| {
            let live = mark.has(id);
            let chosen = sound.chosen(id, locations);
            for location in locations {
                if !packs.contains(&location.pack) {
                    let needed = unlisted.entry(location.pack).or_default();
                    if live && chosen.is_none() && needed.len() < SAMPLE {
                        needed.push(id);
                    }
                    continue;
                }
                let length = location.length();
                let usage = usage.entry(location.pack).or_default();
                usage.bytes += length;
                usage.entries += 1;
                usage.rotten |= !live && quarantine.has(id, location.pack);
                usage.lost |= live && chosen.is_none();
                match chosen {
                    _ if !live => {}
                    Some(chosen) if chosen != location => {
                        let others = relies_on.entry(location.pack).or_default();
                        others.insert(chosen.pack);
                    }
                    // Where no copy is sound, each may be the one that can still be read.
                    _ => usage.live += length,
                }
            }
            Ok(())
        })
    }

    /// Looks into a pack that could go.
    fn inspect(&mut self, pack: ObjectId, usage: Usage, report: &mut PruneReport) -> Result<Fate> {
        let object = pack::name(pack);
        let index = match pack::open(self.repo.store(), &object) {
            Ok(index) => index,
            Err(error @ Error::Corrupt { .. }) => {
                // Whose it is cannot be told, and what the index does not know of it neither.
                let nobodys = usage.entries > 0 && usage.live == 0 && !self.mark.any_session();
                if nobodys {
                    return Ok(Fate::Dead);
                }
                self.unreadable.insert(pack);
                report.kept_damaged.add(usage.bytes);
                report.damaged.push(error.to_string());
                return Ok(Fate::Stays);
            }
            Err(error) => return Err(error),
        };
        let owner = index.label.split(' ').next().unwrap_or_default();
        let alive = owner
            .parse::<SessionId>()
            .is_ok_and(|session| self.mark.is_alive(session));
        if alive {
            if usage.live == 0 {
                report
                    .kept_for_sessions
                    .add(self.repo.store().size(&object)?);
            }
            return Ok(Fate::Stays);
        }
        if u64::try_from(index.entries.len()).ok() != Some(usage.entries) {
            for (id, _) in &index.entries {
                if !self.mark.has(*id) {
                    continue;
                }
                let known = self.repo.index().locate_all(*id)?;
                // Neither where nothing stands against it, nor here.
                let is_known = known.iter().any(|(location, excluded)| {
                    location.pack == pack || (!excluded && self.packs.contains(&location.pack))
                });
                if !is_known {
                    self.unknown.insert(*id, pack);
                }
            }
        }
        Ok(match usage.live {
            0 => Fate::Dead,
            _ => Fate::Partly,
        })
    }

    /// Which of the packs that are not there hold blocks that certainly are needed.
    fn lost(&self, gone: &HashMap<ObjectId, Vec<BlockId>>) -> Result<HashSet<ObjectId>> {
        let among: HashSet<BlockId> = gone.values().flatten().copied().collect();
        if among.is_empty() {
            return Ok(HashSet::new());
        }
        let needed = self.mark.certainly(&among)?;
        let is_needed = |ids: &&Vec<BlockId>| ids.iter().any(|id| needed.contains(id));
        let lost = gone.iter().filter(|(_, ids)| is_needed(ids));
        Ok(lost.map(|(pack, _)| *pack).collect())
    }

    /// An index that lacks needed blocks must not decide what goes.
    fn refuse_what_is_needed(&self) -> Result<()> {
        if self.unknown.is_empty() {
            return Ok(());
        }
        let refuse = |id: &BlockId| {
            let pack = self.unknown.get(id).map(|pack| pack::name(*pack));
            let pack = pack.unwrap_or_default();
            Err(Error::corrupt(
                "the index",
                format!(
                    "block {id} of {pack} is needed and not in it: the index must be rebuilt first"
                ),
            ))
        };
        if self.unknown.len() > UNKNOWN {
            return self.unknown.keys().next().map_or(Ok(()), refuse);
        }
        let among: HashSet<BlockId> = self.unknown.keys().copied().collect();
        let needed = self.mark.certainly(&among)?;
        // Who refers to it may have stored it anew since the packs were listed.
        self.repo.index().refresh()?;
        let mut present = Present::default();
        for id in &needed {
            let mut is_stored = false;
            for (location, excluded) in self.repo.index().locate_all(*id)? {
                is_stored |= !excluded && present.has(self.repo, location.pack)?;
            }
            if !is_stored {
                return refuse(id);
            }
        }
        Ok(())
    }
}
