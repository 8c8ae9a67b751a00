//! Making a rotation: intent first, then `add` on all disks, and only when that has succeeded `disable`. Never the other
//! way round, never both in one transaction (one that fails is rolled back without a drain and loses writes), never undone.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Result;

use super::name;
use super::track::{Record, Rotation, Seen, State, Tracked, plan};
use crate::qmp::Process;

/// The bitmaps of the chosen disks, wherever they live. Disks are named by their keys.
pub trait Port {
    /// Looks at all chosen disks anew.
    fn seen(&mut self) -> Result<Vec<Seen>>;
    /// Adds one recording bitmap to each of these disks, all or none.
    fn add(&mut self, bitmaps: &[(String, String)]) -> Result<()>;
    /// Disables bitmaps.
    fn disable(&mut self, bitmaps: &[(String, String)]) -> Result<()>;
    /// Removes bitmaps that are there.
    fn remove(&mut self, bitmaps: &[(String, String)]) -> Result<()>;
}

/// The durable journal of a session.
pub trait Journal {
    /// Makes a record durable before it returns.
    fn append(&mut self, record: &Record) -> Result<()>;
}

/// What a rotation is made of.
#[derive(Debug, Clone)]
pub struct Settings<'a> {
    /// The newest point of each disk, as if it were tracked.
    pub bases: &'a BTreeMap<String, Tracked>,
    /// Bytes a bit, the repository's block size.
    pub granularity: u32,
    /// The first 8 hex digits of the repository's id.
    pub repository: &'a str,
    /// The QEMU process that is asked.
    pub process: &'a Process,
}

/// Writes down the intent of the next rotation; what it will add and disable is then the caller's to do. Before that, a
/// rotation that was cut off between its two commands is finished, and what a dead QEMU left inconsistent is removed.
pub fn intend(
    state: &mut State,
    port: &mut dyn Port,
    journal: &mut dyn Journal,
    settings: &Settings<'_>,
    freeze: bool,
) -> Result<Rotation> {
    let mut seen = port.seen()?;
    let half = half_rotated(state, &seen);
    if !half.is_empty() {
        port.disable(&half)?;
        seen = port.seen()?;
    }
    let rotation = plan(
        state,
        settings.bases,
        &seen,
        settings.granularity,
        settings.repository,
        settings.process,
        freeze,
    );
    journal.append(&rotation.record)?;
    state.apply(&rotation.record);
    let broken: Vec<(String, String)> = seen
        .iter()
        .flat_map(|disk| disk.bitmaps.iter().map(|bitmap| (disk.key.clone(), bitmap)))
        .filter(|(_, bitmap)| {
            bitmap.inconsistent && name::belongs_to(&bitmap.name, settings.repository)
        })
        .map(|(key, bitmap)| (key, bitmap.name.clone()))
        .collect();
    if !broken.is_empty() {
        port.remove(&broken)?;
    }
    Ok(rotation)
}

/// Rotates: afterwards the new bitmaps record and all older ones are frozen.
pub fn rotate(
    state: &mut State,
    port: &mut dyn Port,
    journal: &mut dyn Journal,
    settings: &Settings<'_>,
) -> Result<Rotation> {
    let rotation = intend(state, port, journal, settings, false)?;
    port.add(&rotation.add)?;
    if !rotation.disable.is_empty() {
        port.disable(&rotation.disable)?;
    }
    Ok(rotation)
}

/// Strikes from the journal, then removes, everything that these disks needed up to an epoch: all of it is safe.
pub fn strike(
    state: &mut State,
    port: &mut dyn Port,
    journal: &mut dyn Journal,
    disks: &[String],
    up_to: u64,
) -> Result<()> {
    let record = Record::Strike {
        up_to,
        disks: disks.to_vec(),
    };
    journal.append(&record)?;
    state.apply(&record);
    sweep(state, port)?;
    Ok(())
}

/// As [`strike`], for single pending bitmaps of each disk.
pub fn strike_idle(
    state: &mut State,
    port: &mut dyn Port,
    journal: &mut dyn Journal,
    disks: Vec<(String, Vec<u64>)>,
) -> Result<()> {
    let record = Record::Idle { disks };
    journal.append(&record)?;
    state.apply(&record);
    sweep(state, port)
}

/// Removes what is no longer needed and still there.
pub fn sweep(state: &mut State, port: &mut dyn Port) -> Result<()> {
    let seen = port.seen()?;
    let needed = state.disks.values().flat_map(Tracked::names);
    let needed: BTreeSet<&str> = needed.map(|named| named.name.as_str()).collect();
    let retired: BTreeSet<&str> = state
        .retired
        .iter()
        .map(|(_, name)| name.as_str())
        .filter(|name| !needed.contains(name))
        .collect();
    // By the name alone, which no two bitmaps share: the disk may go by another key now.
    let mut there = Vec::new();
    for disk in &seen {
        let bitmaps = disk.bitmaps.iter().filter(|bitmap| !bitmap.busy);
        let gone = bitmaps.filter(|bitmap| retired.contains(bitmap.name.as_str()));
        there.extend(gone.map(|bitmap| (disk.key.clone(), bitmap.name.clone())));
    }
    if !there.is_empty() {
        port.remove(&there)?;
    }
    // What is busy now, or of a disk that is away, is looked for again next time.
    let gone: BTreeSet<String> = there.into_iter().map(|(_, name)| name).collect();
    state.retired.retain(|(_, name)| !gone.contains(name));
    Ok(())
}

/// Bitmaps older than a newest one that is there, and recording still.
fn half_rotated(state: &State, seen: &[Seen]) -> Vec<(String, String)> {
    let mut half = Vec::new();
    for disk in seen {
        let Some(tracked) = state.disks.get(&disk.key) else {
            continue;
        };
        let has = |name: &str| disk.bitmaps.iter().find(|bitmap| bitmap.name == name);
        let Some(new) = &tracked.new else { continue };
        if !has(&new.name).is_some_and(|bitmap| bitmap.recording && !bitmap.inconsistent) {
            continue;
        }
        if let Some(last) = tracked.needed.last()
            && has(&last.name).is_some_and(|bitmap| bitmap.recording && !bitmap.inconsistent)
        {
            half.push((disk.key.clone(), last.name.clone()));
        }
    }
    half
}
