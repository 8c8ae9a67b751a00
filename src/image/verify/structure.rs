//! What can be told without reading blocks: that every block of the points is in the index at a place that its pack lists too.
//!
//! ```text
//! ids that maps show  sorted, a part at a time    |  one after the other against
//! index               merged, in the same order   |  each other
//! footers of packs    a sum over the entries of each, compared with that of the index's entries of the pack
//! ```
//!
//! Where a footer cannot be read, or the sums differ, the places are *loose*: they are read and hashed, which tells.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Mutex;

use super::super::block::Location;
use super::super::condemned::Condemned;
use super::super::error::{Error, Result};
use super::super::ids::{BlockId, ObjectId};
use super::super::index::Audit;
use super::super::pack;
use super::super::quarantine::Bad;
use super::super::repo::Repository;
use super::blocks::{Maps, Parts};
use super::places::{Place, Places, found};
use super::{Hurts, Verify, as_damage, in_parallel, lock};

/// Packs whose footers are held in memory at a time to be compared in detail.
const FOOTERS: usize = 32;
/// Footers that a worker reads at a time.
const CHUNK: usize = 8;
/// Places that a worker reads at a time.
const LOOSE: usize = 64;
/// How often everything is begun again when an index run vanishes.
const TRIES: usize = 3;

/// What a pack lists, or what the index says of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Sum {
    entries: u64,
    sum: u128,
}

impl Sum {
    fn add(&mut self, id: BlockId, location: &Location) {
        let words = id.as_bytes().as_chunks::<16>().0;
        let id = words
            .iter()
            .map(|word| u128::from_le_bytes(*word))
            .fold(0, |sum: u128, word| sum.rotate_left(64) ^ word);
        let place = u128::from(location.offset) << 96
            | u128::from(location.plain) << 64
            | u128::from(location.stored) << 32
            | u128::from(location.codec.to_byte());
        // Odd, so that no bit is lost.
        let mixed = (id ^ place.rotate_left(17)).wrapping_mul(place << 1 | 1);
        self.entries += 1;
        self.sum = self.sum.wrapping_add(mixed);
    }
}

/// A pack that is there.
pub(super) struct PackFile {
    pub(super) size: u64,
    /// `None` when it cannot be read.
    footer: Option<Sum>,
}

/// A pack whose footer cannot be read.
pub(super) struct Unreadable {
    pub(super) object: String,
    pub(super) what: String,
    /// The blocks that the index has in it.
    pub(super) ids: Vec<BlockId>,
}

/// What was found.
#[derive(Default)]
pub(super) struct Structure {
    pub(super) packs: HashMap<ObjectId, PackFile>,
    /// Packs whose footers cannot be read.
    pub(super) unreadable: BTreeMap<ObjectId, Unreadable>,
    /// Places to be read, since nothing vouches for them.
    loose: Vec<Place>,
    /// Distinct blocks that the points need.
    pub(super) blocks: u64,
    /// Entries of the index.
    pub(super) entries: u64,
}

/// A block in a pack that is not there.
pub(super) fn missing(id: BlockId, pack: ObjectId) -> Bad {
    found(id, pack, "the pack is missing")
}

impl Repository {
    /// Whether a pack is lost: not there, though the index names it and nobody is about to delete it.
    pub(super) fn is_missing(&self, pack: ObjectId) -> Result<bool> {
        match self.store().size(&pack::name(pack)) {
            // One that was cut is there, too.
            Ok(_) | Err(Error::Corrupt { .. }) => return Ok(false),
            Err(error) if error.is_not_found() => {}
            // It is there; what is wrong with it is another matter.
            Err(error) if error.is_corrupt() => return Ok(false),
            Err(error) => return Err(error),
        }
        let condemned = match Condemned::read(self.store()) {
            Ok(condemned) => condemned.packs.contains(&pack),
            Err(error) if error.is_corrupt() => false,
            Err(error) => return Err(error),
        };
        Ok(!condemned && self.index().names(pack)?)
    }
}

impl Verify<'_> {
    /// Compares maps, index and packs with each other.
    pub(super) fn structure(&mut self, maps: &Maps) -> Result<Structure> {
        if let Err(error) = Condemned::read(self.repo.store()) {
            self.damaged(error, Hurts::new())?;
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let mut structure = Structure::default();
            // The index first: what it names and is not there was deleted after it was taken out of the index, or is lost.
            let audit = self.repo.index().audit()?;
            self.footers(&mut structure)?;
            match self.compare(&audit, maps, &mut structure) {
                Err(error) if error.is_not_found() && tries < TRIES => continue,
                done => done?,
            }
            for error in audit.damaged {
                self.damaged(error, Hurts::new())?;
            }
            return Ok(structure);
        }
    }

    /// Reads the footers of all packs.
    fn footers(&mut self, structure: &mut Structure) -> Result<()> {
        let store = self.repo.store();
        let names = store.list_fresh("packs/")?;
        let packs = Mutex::new(HashMap::new());
        let damaged = Mutex::new(Vec::new());
        in_parallel(self.threads, CHUNK, &names, &|| false, &|names| {
            self.options.go_on()?;
            for object in names {
                let opened =
                    pack::open(store, object).and_then(|opened| Ok((opened, store.size(object)?)));
                match opened {
                    Ok((opened, size)) => {
                        let mut sum = Sum::default();
                        for (id, location) in &opened.entries {
                            sum.add(*id, location);
                        }
                        let footer = Some(sum);
                        lock(&packs).insert(opened.id, PackFile { size, footer });
                    }
                    // Pruned meanwhile.
                    Err(error) if error.is_not_found() => {}
                    Err(error) => {
                        let id = object.rsplit('/').next().and_then(|id| id.parse().ok());
                        // Of one that was cut so that its size cannot be told nothing can be read.
                        let size = match store.size(object) {
                            Err(Error::Corrupt { .. }) => Ok(0),
                            other => other,
                        };
                        let (object, what) = as_damage(error)?;
                        if let (Some(id), Ok(size)) = (id, size) {
                            lock(&packs).insert(id, PackFile { size, footer: None });
                        }
                        lock(&damaged).push((id, object, what));
                    }
                }
            }
            Ok(())
        })?;
        structure.packs = packs.into_inner().unwrap_or_default();
        for (id, object, what) in damaged.into_inner().unwrap_or_default() {
            let ids = Vec::new();
            match id {
                Some(id) => {
                    let pack = Unreadable { object, what, ids };
                    structure.unreadable.insert(id, pack);
                }
                None => self.damage(object, &what, Hurts::new()),
            }
        }
        Ok(())
    }

    /// Goes through the index and the ids of the maps side by side.
    fn compare(&mut self, audit: &Audit, maps: &Maps, structure: &mut Structure) -> Result<()> {
        let mut sums: HashMap<ObjectId, Sum> = HashMap::new();
        let mut gone: HashMap<ObjectId, Vec<BlockId>> = HashMap::new();
        let mut entries = audit.entries()?;
        let mut next = entries.next()?;
        let mut parts = Parts::new(maps);
        while let Some((part, ids)) = parts.next()? {
            self.options.go_on()?;
            structure.blocks += ids.len() as u64;
            let mut wanted = ids.into_iter().peekable();
            while let Some((id, location)) = next.filter(|(id, _)| parts.of(*id) <= part) {
                while let Some(absent) = wanted.next_if(|wanted| *wanted < id) {
                    self.absent(absent, structure)?;
                }
                wanted.next_if_eq(&id);
                structure.entries += 1;
                if let Some(pack) = structure.unreadable.get_mut(&location.pack) {
                    pack.ids.push(id);
                }
                match structure.packs.get(&location.pack) {
                    None => gone.entry(location.pack).or_default().push(id),
                    Some(file) if location.end() > file.size => {
                        let what = "it lies beyond the end of the pack";
                        self.found(found(id, location.pack, what));
                    }
                    Some(PackFile { footer: None, .. }) => structure.loose.push((id, location)),
                    Some(_) => sums.entry(location.pack).or_default().add(id, &location),
                }
                next = entries.next()?;
            }
            for absent in wanted {
                self.absent(absent, structure)?;
            }
        }
        for (pack, ids) in gone {
            if self.repo.is_missing(pack)? {
                for id in ids {
                    self.found(missing(id, pack));
                }
            }
        }
        let differing: Vec<ObjectId> = sums
            .into_iter()
            .filter(|(pack, sum)| {
                let file = structure.packs.get(pack);
                file.and_then(|file| file.footer) != Some(*sum)
            })
            .map(|(pack, _)| pack)
            .collect();
        for packs in differing.chunks(FOOTERS) {
            self.compare_in_detail(audit, packs, structure)?;
        }
        Ok(())
    }

    /// A bad place, unless that is known already.
    pub(super) fn found(&mut self, bad: Bad) {
        if !self.quarantine.has(bad.id, bad.pack) {
            self.found.push(bad);
        }
    }

    /// A block that no sound index run has: a damaged one may.
    fn absent(&mut self, id: BlockId, structure: &Structure) -> Result<()> {
        match self.repo.index().locate_stored(id) {
            Ok(location) if structure.packs.contains_key(&location.pack) => {}
            Ok(location) => {
                if self.repo.is_missing(location.pack)? {
                    self.found(missing(id, location.pack));
                }
            }
            Err(error) => {
                self.lost.insert(id, as_damage(error)?);
                self.absent.insert(id);
            }
        }
        Ok(())
    }

    /// Finds the places that the index has and the packs do not list.
    fn compare_in_detail(
        &mut self,
        audit: &Audit,
        packs: &[ObjectId],
        structure: &mut Structure,
    ) -> Result<()> {
        let mut listed: HashMap<ObjectId, HashSet<(BlockId, u32)>> = HashMap::new();
        for id in packs {
            match pack::open(self.repo.store(), &pack::name(*id)) {
                Ok(opened) => {
                    let entries = opened.entries.iter();
                    let entries = entries.map(|(id, location)| (*id, location.offset));
                    listed.insert(*id, entries.collect());
                }
                Err(Error::NotFound { .. } | Error::Corrupt { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let mut entries = audit.entries()?;
        while let Some((id, location)) = entries.next()? {
            if let Some(listed) = listed.get(&location.pack)
                && !listed.contains(&(id, location.offset))
            {
                structure.loose.push((id, location));
            }
        }
        Ok(())
    }

    /// Reads the places that nothing vouches for.
    pub(super) fn loose(&mut self, structure: &Structure) -> Result<()> {
        let mut places = structure.loose.clone();
        places.retain(|(id, location)| !self.quarantine.has(*id, location.pack));
        places.sort_unstable_by_key(|(_, location)| (location.pack, location.offset));
        let (repo, options) = (self.repo, self.options);
        let bytes = places.iter().map(|(_, location)| location.length());
        options.begin("read what no list vouches for", bytes.sum());
        let bad = Mutex::new(Vec::new());
        in_parallel(self.threads, LOOSE, &places, &|| false, &|places| {
            for one in places.chunk_by(|(_, a), (_, b)| a.pack == b.pack) {
                match Places::new(repo, Some(options)).read(one) {
                    Ok(mut more) => lock(&bad).append(&mut more),
                    // Pruned meanwhile.
                    Err(Error::NotFound { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })?;
        self.found.append(&mut bad.into_inner().unwrap_or_default());
        Ok(())
    }
}
