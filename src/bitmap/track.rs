//! The state of a target's tracking: what the journal says, whether the VM agrees, and what a rotation must write down.
//!
//! The journal's [`Record`]s are written before what they announce is done. A rotation names the new bitmap of every
//! disk, and everything older that the disk still needs, so the newest rotation alone, with the strikes after it, is the
//! whole state:
//!
//! ```text
//! needed   [ p1  p2  p3 ]  new          p1..p2 disabled; p3 recorded until this rotation and is disabled by it;
//!                                       new records from this rotation on
//! ```
//!
//! After a crash the VM may be before the rotation (new absent, p3 recording), between its two commands (both recording)
//! or after it. [`trust`] accepts exactly these; anything else, for whatever reason, is a doubt, and a disk in doubt is
//! read in full.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::dirty::MOST_PENDING;
use super::name;
use crate::qmp::Process;
use crate::qmp::graph::Bitmap;

/// A bitmap as the journal names it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Named {
    /// The rotation that began it.
    pub epoch: u64,
    /// Its name.
    pub name: String,
}

/// The point that a disk's session builds on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// The recovery point's id.
    pub point: String,
    /// The disk's size in it, bytes.
    pub size: u64,
    /// Its map, as the repository refers to it.
    pub map: Value,
}

/// A disk as it is tracked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tracked {
    /// The disk's key.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// The chain of images that it was.
    pub identity: Value,
    /// Whether its bitmaps are stored in the image.
    pub persistent: bool,
    /// Bytes a bit.
    pub granularity: u32,
    /// What it builds on.
    pub base: Option<Base>,
    /// The older bitmaps that it still needs, oldest first; the last one recorded until `new` came.
    pub needed: Vec<Named>,
    /// The bitmap of the newest rotation.
    pub new: Option<Named>,
    /// "All of this disk is unsafe as of this epoch."
    pub whole: Option<u64>,
    /// Why it is read in full, when it is.
    pub doubt: Option<String>,
}

/// What the journal holds besides the segments of proved blocks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "kebab-case")]
pub enum Record {
    /// Points that disks are about to build on: their maps are kept from now on.
    Bases {
        /// Their ids.
        points: Vec<String>,
    },
    /// A rotation that is about to be made.
    Rotation {
        /// Its number; every proof of a later read carries it.
        epoch: u64,
        /// The QEMU process that it is made in.
        process: Process,
        /// Every disk of the target.
        disks: Vec<Tracked>,
        /// It is a freeze.
        freeze: bool,
        /// Bitmaps of a base that this rotation found wanting, as (disk, name).
        retired: Vec<(String, String)>,
    },
    /// Pending bitmaps all of whose blocks are safe although others' are not, by disk and epoch.
    Idle {
        /// Each disk with the epochs of the bitmaps that may go.
        disks: Vec<(String, Vec<u64>)>,
    },
    /// Bitmaps that are no longer needed and may be removed, by disk.
    Strike {
        /// The epoch up to which all of the disk's bitmaps, and its whole-disk marker, are struck.
        up_to: u64,
        /// The disks.
        disks: Vec<String>,
    },
    /// A disk that could not be read.
    Unreadable {
        /// Its key.
        disk: String,
    },
}

/// The state that the records add up to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct State {
    /// The newest rotation, 0 before the first.
    pub epoch: u64,
    /// The QEMU process of that rotation.
    pub process: Option<Process>,
    /// The disks, by key.
    pub disks: BTreeMap<String, Tracked>,
    /// The newest rotation certainly happened: something after it could not have without.
    pub confirmed: bool,
    /// Bitmaps that were needed once and may still be in the VM, by disk.
    pub retired: Vec<(String, String)>,
    /// Disks that could not be read, and have not been read in full since.
    pub unreadable: BTreeSet<String>,
}

impl State {
    /// Takes in the next record of the journal.
    pub fn apply(&mut self, record: &Record) {
        match record {
            Record::Bases { .. } => {}
            Record::Rotation {
                epoch,
                process,
                disks,
                retired,
                ..
            } => {
                self.retired.extend(retired.iter().cloned());
                let keep = |key: &str, name: &str| {
                    disks
                        .iter()
                        .any(|disk| disk.key == key && disk.names().any(|has| has.name == name))
                };
                for old in self.disks.values() {
                    for named in old.names().filter(|named| !keep(&old.key, &named.name)) {
                        self.retired.push((old.key.clone(), named.name.clone()));
                    }
                }
                self.epoch = *epoch;
                self.process = Some(process.clone());
                self.disks = disks
                    .iter()
                    .map(|disk| (disk.key.clone(), disk.clone()))
                    .collect();
                self.confirmed = false;
            }
            Record::Idle { disks } => {
                self.confirmed = true;
                for (key, epochs) in disks {
                    let Some(disk) = self.disks.get_mut(key) else {
                        continue;
                    };
                    let (gone, kept): (Vec<Named>, Vec<Named>) = disk
                        .needed
                        .drain(..)
                        .partition(|named| epochs.contains(&named.epoch));
                    disk.needed = kept;
                    self.retired
                        .extend(gone.into_iter().map(|named| (key.clone(), named.name)));
                }
            }
            Record::Strike { up_to, disks } => {
                self.confirmed = true;
                for key in disks {
                    let Some(disk) = self.disks.get_mut(key) else {
                        continue;
                    };
                    let (gone, kept): (Vec<Named>, Vec<Named>) = disk
                        .needed
                        .drain(..)
                        .partition(|named| named.epoch <= *up_to);
                    disk.needed = kept;
                    self.retired
                        .extend(gone.into_iter().map(|named| (key.clone(), named.name)));
                    disk.whole = disk.whole.filter(|epoch| *epoch > *up_to);
                    // What could not be read was unsafe until now.
                    self.unreadable.remove(key);
                }
            }
            Record::Unreadable { disk } => {
                self.unreadable.insert(disk.clone());
            }
        }
    }

    /// A disk that the newest rotation rotated: only of such a disk is the newest epoch live. One that was left out, or that
    /// came in between, is not to be read in it.
    #[must_use]
    pub fn rotated(&self, key: &str) -> Option<&Tracked> {
        let disk = self.disks.get(key)?;
        (disk.new.as_ref()?.epoch == self.epoch).then_some(disk)
    }

    /// Whether the newest rotation of a disk certainly happened. A disk that the newest one left out was not part of what
    /// confirms it.
    #[must_use]
    pub fn confirmed(&self, disk: &Tracked) -> bool {
        let newest = disk.new.as_ref().map(|new| new.epoch);
        self.confirmed && newest == Some(self.epoch)
    }

    /// The bitmaps, by disk, that nothing needs once a point of these disks is published, but for those that are `known`
    /// to be so: what was needed before, and all that the session has of a disk that is not in the point.
    #[must_use]
    pub fn outlived(
        &self,
        point: &[String],
        known: &BTreeSet<(String, String)>,
    ) -> Vec<(String, String)> {
        let mut outlived: BTreeSet<(String, String)> = self.retired.iter().cloned().collect();
        for disk in self.disks.values() {
            let live = disk.new.iter().filter(|_| !point.contains(&disk.key));
            for named in disk.needed.iter().chain(live) {
                outlived.insert((disk.key.clone(), named.name.clone()));
            }
        }
        outlived.difference(known).cloned().collect()
    }

    /// Takes in that a point of these disks is published: what it outlived is only to be removed.
    pub fn publish(&mut self, point: &[String]) {
        self.retired = self.outlived(point, &BTreeSet::new());
        self.disks.retain(|key, _| point.contains(key));
        for disk in self.disks.values_mut() {
            disk.needed.clear();
        }
    }

    /// The bitmaps of a disk did not hold what had changed: none of them is of use, and the next rotation begins anew.
    pub fn disbelieve(&mut self, key: &str, why: String) {
        if let Some(disk) = self.disks.get_mut(key) {
            let names: Vec<String> = disk.names().map(|named| named.name.clone()).collect();
            disk.needed.clear();
            disk.new = None;
            disk.doubt = Some(why);
            let gone = names.into_iter().map(|name| (key.to_owned(), name));
            self.retired.extend(gone);
        }
    }

    /// Takes in that blocks were proved in an epoch.
    pub fn apply_proof(&mut self, epoch: u64) {
        self.confirmed |= epoch >= self.epoch;
    }
}

/// How the reason begins why a disk is read in full whose bitmap did not hold what had changed.
pub const AUDIT_FOUND: &str = "the audit found";

/// Why a disk is read in full whose base went before anything could build on it.
const FORGOTTEN: &str = "the point that it builds on was forgotten meanwhile";

impl Tracked {
    /// The point that a disk would build on is gone: nothing of it is of use.
    pub fn forsake(&mut self) {
        self.base = None;
        self.needed.clear();
        self.new = None;
        self.doubt = Some(FORGOTTEN.to_owned());
    }

    /// Why it is read in full, when that is worth telling: a first copy is not.
    #[must_use]
    pub fn rescanned(&self) -> Option<String> {
        let told =
            |why: &String| self.base.is_some() || why == FORGOTTEN || why.starts_with(AUDIT_FOUND);
        self.doubt.clone().filter(told)
    }

    /// All bitmaps that the disk may have, oldest first.
    pub fn names(&self) -> impl Iterator<Item = &Named> {
        self.needed.iter().chain(&self.new)
    }

    /// The epochs against which proofs count: the needed bitmaps and the whole-disk marker.
    #[must_use]
    pub fn pending_epochs(&self) -> Vec<u64> {
        self.needed
            .iter()
            .map(|named| named.epoch)
            .chain(self.whole)
            .collect()
    }
}

/// Takes the bitmap from bases that a later point has retired: a session has rotated on since, and what it knew went with
/// it. Such a base is only to be compared with.
pub fn withdraw(bases: &mut BTreeMap<String, Tracked>, retired: &[(String, String)]) {
    for (key, base) in bases {
        base.new = base.new.take().filter(|new| {
            !retired
                .iter()
                .any(|(disk, name)| disk == key && *name == new.name)
        });
    }
}

/// Takes from bases, and from what is to be removed, the bitmaps of other repositories. A repository that was copied as files and
/// was then given an id of its own has points that name them: they still follow the other's points, and are the other's to
/// rotate and to remove.
pub fn disown(
    bases: &mut BTreeMap<String, Tracked>,
    retired: &mut Vec<(String, String)>,
    repository: &str,
) {
    for base in bases.values_mut() {
        let new = base.new.take();
        base.new = new.filter(|new| name::belongs_to(&new.name, repository));
    }
    retired.retain(|(_, name)| name::belongs_to(name, repository));
}

/// A disk as it was just found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Its key.
    pub key: String,
    /// Bytes.
    pub size: u64,
    /// Its chain of images.
    pub identity: Value,
    /// Whether a bitmap can be stored in its image.
    pub persistent: bool,
    /// The bitmaps that are on it.
    pub bitmaps: Vec<Bitmap>,
}

/// Whether a tracked disk can go on from what is in the VM: the bitmaps that it needs, oldest first, the last one live.
/// An `Err` says why not, in words for the operator.
pub fn trust(disk: &Tracked, confirmed: bool, seen: &Seen) -> Result<Vec<Named>, String> {
    if let (None, Some(why)) = (disk.names().next(), &disk.doubt) {
        return Err(why.clone());
    }
    if disk.size != seen.size {
        return Err(format!(
            "it was resized from {} to {} bytes",
            disk.size, seen.size
        ));
    }
    if disk.needed.is_empty() && disk.new.is_none() {
        return Err("no bitmap has followed it".to_owned());
    }
    if disk.identity != seen.identity {
        return Err(
            "its image is not the one recorded (file, inode, header or backing)".to_owned(),
        );
    }
    let find = |named: &Named| seen.bitmaps.iter().find(|bitmap| bitmap.name == named.name);
    let mut chain = disk.needed.clone();
    match &disk.new {
        Some(new) if find(new).is_some() => chain.push(new.clone()),
        Some(new) if confirmed => return Err(format!("its live bitmap {} is gone", new.name)),
        _ => {}
    }
    let Some((live, pending)) = chain.split_last() else {
        return Err("no bitmap has followed it".to_owned());
    };
    for named in &chain {
        let bitmap = find(named).ok_or_else(|| format!("its bitmap {} is gone", named.name))?;
        if bitmap.inconsistent {
            return Err(format!(
                "its bitmap {} was left inconsistent by a QEMU that died",
                named.name
            ));
        }
        if bitmap.granularity != disk.granularity {
            return Err(format!("its bitmap {} has another granularity", named.name));
        }
    }
    if !find(live).is_some_and(|bitmap| bitmap.recording) {
        return Err(format!("its live bitmap {} does not record", live.name));
    }
    if let Some(later) = later(disk, seen) {
        return Err(format!(
            "it has a later bitmap, {later}, of a point or session that is gone"
        ));
    }
    // A rotation that was cut off between its two commands leaves the one before the newest recording, no other.
    let rotated = disk.new.as_ref() == Some(live);
    let older = if rotated {
        pending.len().saturating_sub(1)
    } else {
        pending.len()
    };
    for named in pending.iter().take(older) {
        if find(named).is_some_and(|bitmap| bitmap.recording) {
            return Err(format!("its pending bitmap {} records", named.name));
        }
    }
    Ok(chain)
}

/// A bitmap of the same repository that came after all that are known of a disk. Whoever made it disabled those before, and a point or
/// session that said so is gone (the newest point was forgotten): that one of them records again, by whatever hand, proves nothing.
fn later<'a>(disk: &Tracked, seen: &'a Seen) -> Option<&'a str> {
    let newest = disk.names().max_by_key(|named| named.epoch)?;
    let repository = name::repository(&newest.name)?;
    let names = seen.bitmaps.iter().map(|bitmap| bitmap.name.as_str());
    let mut later = names
        .filter(|name| name::epoch(name, repository).is_some_and(|epoch| epoch > newest.epoch));
    later.next()
}

/// What a rotation will do, from what is known and seen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    /// The record to make durable first.
    pub record: Record,
    /// Disks and the bitmap to add to each, in one transaction.
    pub add: Vec<(String, String)>,
    /// Disks and bitmaps that still record, to be disabled once the new ones are in.
    pub disable: Vec<(String, String)>,
}

/// A disk that is left out of a rotation keeps its place in the session. What is known of its newest bitmap is kept too: one
/// that certainly came is needed from now on, since there may be proofs that count on it.
fn left_out(state: &State, disk: &Tracked) -> Tracked {
    let mut kept = disk.clone();
    if state.confirmed(disk) {
        kept.needed.extend(kept.new.take());
    }
    kept
}

/// Runs that are cut off leave a pending bitmap each; more than can be ranked is as good as none.
fn few_enough(chain: Vec<Named>) -> Result<Vec<Named>, String> {
    // One more is the whole-disk marker.
    if chain.len() < MOST_PENDING {
        return Ok(chain);
    }
    Err(format!("{} bitmaps are pending on it", chain.len()))
}

/// Plans the next rotation of these disks. `bases` has the newest point of each disk, as if it were tracked, for disks
/// that the session does not know.
#[must_use]
pub fn plan(
    state: &State,
    bases: &BTreeMap<String, Tracked>,
    seen: &[Seen],
    granularity: u32,
    repository: &str,
    process: &Process,
    freeze: bool,
) -> Rotation {
    let newest = bases
        .values()
        .flat_map(Tracked::names)
        .map(|named| named.epoch)
        .max();
    // After those, too, that only the disks still know of.
    let on_disks = seen
        .iter()
        .flat_map(|disk| &disk.bitmaps)
        .filter_map(|bitmap| name::epoch(&bitmap.name, repository))
        .max();
    let epoch = state.epoch.max(newest.max(on_disks).unwrap_or(0)) + 1;
    let mut add = Vec::new();
    let mut disable = Vec::new();
    let mut retired = Vec::new();
    let seen_keys = |key: &String| seen.iter().any(|disk| &disk.key == key);
    let mut disks: Vec<Tracked> = state
        .disks
        .values()
        .filter(|disk| !seen_keys(&disk.key))
        .map(|disk| left_out(state, disk))
        .collect();
    for disk in seen {
        let known = state.disks.get(&disk.key);
        let (before, confirmed) = match known {
            Some(tracked) => (Some(tracked), state.confirmed(tracked)),
            None => (bases.get(&disk.key), true),
        };
        let trusted = match before {
            Some(tracked) => trust(tracked, confirmed, disk).and_then(few_enough),
            None => Err("first copy".to_owned()),
        };
        let new = Named {
            epoch,
            name: name::new(repository, epoch),
        };
        add.push((disk.key.clone(), new.name.clone()));
        let base = before.and_then(|tracked| tracked.base.clone());
        let (needed, whole, doubt) = match trusted {
            Ok(chain) => {
                for named in &chain {
                    if disk
                        .bitmaps
                        .iter()
                        .any(|has| has.name == named.name && has.recording)
                    {
                        disable.push((disk.key.clone(), named.name.clone()));
                    }
                }
                (
                    chain,
                    before.and_then(|t| t.whole),
                    before.and_then(|t| t.doubt.clone()),
                )
            }
            Err(why) => {
                if let (None, Some(wanting)) = (known, before) {
                    let names = wanting
                        .names()
                        .map(|named| (disk.key.clone(), named.name.clone()));
                    retired.extend(names);
                }
                (Vec::new(), Some(epoch - 1), Some(why))
            }
        };
        disks.push(Tracked {
            key: disk.key.clone(),
            size: disk.size,
            identity: disk.identity.clone(),
            persistent: disk.persistent,
            granularity,
            base,
            needed,
            new: Some(new),
            whole,
            doubt,
        });
    }
    let record = Record::Rotation {
        epoch,
        process: process.clone(),
        disks,
        freeze,
        retired,
    };
    Rotation {
        record,
        add,
        disable,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by it")]
mod tests {
    use super::*;
    use serde_json::json;

    const REPOSITORY: &str = "0123abcd";

    fn bitmap(name: &str, recording: bool) -> Bitmap {
        Bitmap {
            name: name.to_owned(),
            recording,
            persistent: true,
            inconsistent: false,
            busy: false,
            granularity: 65536,
            count: 0,
        }
    }

    fn seen(bitmaps: Vec<Bitmap>) -> Seen {
        Seen {
            key: "vda".to_owned(),
            size: 1 << 20,
            identity: json!(["image"]),
            persistent: true,
            bitmaps,
        }
    }

    /// The disk as the point says that stayed, whose bitmap is of epoch 3.
    fn base() -> Tracked {
        Tracked {
            key: "vda".to_owned(),
            size: 1 << 20,
            identity: json!(["image"]),
            persistent: true,
            granularity: 65536,
            base: None,
            needed: Vec::new(),
            new: Some(Named {
                epoch: 3,
                name: name::new(REPOSITORY, 3),
            }),
            whole: None,
            doubt: None,
        }
    }

    #[test]
    fn a_bitmap_of_an_older_point_is_no_base_once_a_newer_point_was_forgotten() {
        let base = base();
        let old = base.new.clone().unwrap().name;
        let forgotten = name::new(REPOSITORY, 5);
        assert!(trust(&base, true, &seen(vec![bitmap(&old, true)])).is_ok());
        // As the newer point left them: it does not record.
        let left = seen(vec![bitmap(&old, false), bitmap(&forgotten, true)]);
        assert!(
            trust(&base, true, &left)
                .unwrap_err()
                .contains("does not record")
        );
        // Somebody enabled it again: what was written meanwhile is not in it.
        for newer_records in [true, false] {
            let bitmaps = vec![bitmap(&old, true), bitmap(&forgotten, newer_records)];
            let why = trust(&base, true, &seen(bitmaps)).unwrap_err();
            assert!(why.contains(&forgotten), "{why}");
        }
        // Another repository's are no matter.
        let other = bitmap(&name::new("0123abce", 9), true);
        assert!(trust(&base, true, &seen(vec![bitmap(&old, true), other])).is_ok());

        // The next rotation comes after what is on the disk, so that the point after it is believed.
        let bases = BTreeMap::from([("vda".to_owned(), base)]);
        let there = seen(vec![bitmap(&old, false), bitmap(&forgotten, true)]);
        let process = Process { pid: 1, start: 1 };
        let state = State::default();
        let planned = plan(
            &state,
            &bases,
            std::slice::from_ref(&there),
            65536,
            REPOSITORY,
            &process,
            true,
        );
        let Record::Rotation { epoch, disks, .. } = &planned.record else {
            panic!("{planned:?}");
        };
        assert_eq!(*epoch, 6);
        let mut next = disks[0].clone();
        assert_eq!((next.needed.len(), next.whole), (0, Some(5)));
        let new = next.new.clone().unwrap().name;
        next.whole = None;
        let after = seen(vec![bitmap(&forgotten, true), bitmap(&new, true)]);
        assert!(trust(&next, true, &after).is_ok());
    }
}
