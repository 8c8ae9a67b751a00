//! A pass: from one rotation to the next, the open blocks of all disks are read live, in batches of a few seconds. Between
//! two batches nothing of ours is in the VM but bitmaps.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};

use super::batch::End;
use super::connect::{Drained, connect};
use super::learned::wall_seconds;
use super::reading::Reading;
use super::{CONDEMNED_TRIES, RunDisk, Runner, is_condemned, is_lost};
use crate::bitmap::blocks::BlockSet;
use crate::bitmap::dirty::idle;
use crate::bitmap::rotate::{self, Journal as _};
use crate::bitmap::track::{self, Record, Tracked};
use crate::clock::{self, Deadline};
use crate::copy::{self, Copied, CopyDisk, Manner, Piece, Proof};
use crate::exit::{Failure, Kind};
use crate::image::Content;
use crate::nbd::{Client, Endpoint, ReadOptions};
use crate::plan::{Order, ahead};
use crate::qmp::export::{self, Export, Listening};
use crate::session::Read;
use crate::units::{BlockRun, BlockSize, Extent};
use crate::vm::{Hold, seen};

/// Between a broken connection and the next try.
const AFTER_LOSS: Duration = Duration::from_millis(500);
/// How often in a row a batch is begun anew since QEMU did not answer after a connection.
const DRAINED_TRIES: u32 = 5;
/// How often a domain may end within a pass.
const ENDS: u32 = 3;
/// Bytes of pieces that were read and wait, or are worked on.
const SPARE: usize = 16 << 20;
/// Up to this pace a block is read at a time, bytes a second: a guest's request that comes then waits for a short one.
const SLOW: u64 = 64 << 20;
/// How long others' use of the NBD server is waited for.
const SERVER_WAIT: Duration = Duration::from_secs(30);

/// So long a repository may keep a batch waiting before the VM is let go.
const STALLED: Duration = Duration::from_secs(5);
/// More pending bitmaps than this are thinned out.
const MANY_PENDING: usize = 16;

/// The VM was not what it had been when a batch ended.
#[derive(Debug, thiserror::Error)]
#[error("the VM changed within a batch: {0}")]
struct Astray(String);

/// QEMU answers reads with errors once its images are given away: that says nothing of a disk.
#[derive(Debug, thiserror::Error)]
#[error("the VM is ending, or going elsewhere")]
struct Going;

/// A disk whose blocks could not be read.
#[derive(Debug, thiserror::Error)]
#[error("read disk `{0}`")]
pub(super) struct Unread(pub(super) String);

/// What failed while the VM could not be looked at any more.
pub(super) fn while_going(error: anyhow::Error) -> anyhow::Error {
    if error.is::<Unread>() {
        error.context(Going)
    } else {
        error
    }
}

/// Why a pass ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PassEnd {
    /// Every block that it had to read is safe.
    Complete,
    /// Its time was up.
    OutOfTime,
}

impl Runner {
    /// One pass: rotates, then copies what the older bitmaps hold. `until` ends it early; what it proved stays. Where the
    /// connection to the monitor broke while the VM is still there, or a domain ended, it is begun anew, as after a death.
    pub fn pass(&mut self, until: Option<Deadline>) -> Result<PassEnd> {
        let mut ends = 0;
        loop {
            match self.try_pass(until) {
                Err(error) if is_lost(&error) => {
                    tracing::warn!("{error:#}: the pass is begun anew");
                    self.pause(AFTER_LOSS)?;
                }
                Err(error) if ends < ENDS && self.domain_ended(&error)? => ends += 1,
                done => return done,
            }
        }
    }

    fn try_pass(&mut self, until: Option<Deadline>) -> Result<PassEnd> {
        self.passes += 1;
        let pass = self.session.next_pass();
        let mut rotated = false;
        let (mut condemned, mut drained) = (0, 0);
        self.measured = (clock::now(), 0);
        loop {
            self.check_interrupt()?;
            let Some(place) = self.turn_to_copy(until)? else {
                self.keep_learned();
                return Ok(PassEnd::OutOfTime);
            };
            let mut hold = self.hold()?;
            self.predict(&hold);
            hold.may_share_files()?;
            if !hold.lasting()? {
                return Err(Failure::hinted(
                    Kind::Attention,
                    "a device of a VM that is off cannot be copied in parts: nothing tells whether it changes between two of them",
                    "back it up while the VM runs, or with `backup --deadline` long enough to read it at once",
                ));
            }
            if rotated && let Some(why) = self.astray(&hold, self.disks.len()) {
                tracing::info!(%why, "the VM changed between two batches: rotating anew");
                rotated = false;
            }
            if !rotated {
                self.rotate(&mut hold, false)?;
                for disk in &mut self.disks {
                    disk.open = None;
                }
                rotated = true;
            }
            let begun = clock::now();
            match self.batch(hold, pass, until) {
                Err(error) if error.is::<Drained>() && drained < DRAINED_TRIES => {
                    tracing::info!("{error:#}: the batch is begun anew");
                    drained += 1;
                    continue;
                }
                Err(error) if error.is::<Astray>() => {
                    tracing::info!("{error:#}: nothing of this batch counts, rotating anew");
                    rotated = false;
                    continue;
                }
                Err(error) if is_condemned(&error) && condemned < CONDEMNED_TRIES => {
                    tracing::info!("{error:#}: a part of this batch is read again");
                    condemned += 1;
                    continue;
                }
                done => self.note_unreadable(done)?,
            }
            (condemned, drained) = (0, 0);
            drop(place);
            self.strike_idle()?;
            if self.disks.iter().all(RunDisk::is_done) {
                self.strike()?;
                self.keep_learned();
                return Ok(PassEnd::Complete);
            }
            let between = self.between_batches(clock::now() - begun);
            clock::sleep(until.map_or(between, |until| between.min(until.left())));
            self.give_way(until)?;
            if until.is_some_and(Deadline::passed) {
                self.keep_learned();
                return Ok(PassEnd::OutOfTime);
            }
        }
    }

    /// Why the newest rotation cannot be gone on with, when it cannot.
    pub(super) fn astray(&self, hold: &Hold, disks: usize) -> Option<String> {
        if self.session.state.process.as_ref() != Some(&hold.process()) {
            return Some("another QEMU process".to_owned());
        }
        if hold.disks().len() != disks {
            return Some("a disk came or went".to_owned());
        }
        hold.disks().iter().find_map(|disk| {
            let Some(tracked) = self.session.state.disks.get(&disk.key) else {
                return Some(format!("disk {} is new", disk.key));
            };
            let found = seen(disk);
            match track::trust(tracked, true, &found) {
                Err(why) => Some(format!("disk {}: {why}", disk.key)),
                Ok(_) => tracked.needed.iter().find_map(|named| {
                    let has = found
                        .bitmaps
                        .iter()
                        .find(|bitmap| bitmap.name == named.name);
                    has.is_some_and(|bitmap| bitmap.recording)
                        .then(|| format!("disk {}: bitmap {} records", disk.key, named.name))
                }),
            }
        })
    }

    /// One batch: exports, reads for a few seconds, release; then everything durable.
    fn batch(&mut self, mut hold: Hold, pass: u64, until: Option<Deadline>) -> Result<()> {
        let epoch = self.session.state.epoch;
        let listening = Listening::place(&hold.monitor, self.vm.state.directory(), &self.run);
        let mut disks = std::mem::take(&mut self.disks);
        let copy_disks = std::mem::take(&mut self.copy_disks);
        let label = format!("pass {pass}");
        let session = self.session.id().context("a pass without a session")?;
        let this = &*self;
        let manner = Manner {
            patience: Some(STALLED),
            quiet: self.schedule.is_some() && self.options.load.control,
        };
        let done = copy::copy(
            &this.repo,
            &copy_disks,
            (session, &label),
            &this.progress.done,
            manner,
            |give| {
                let read = this.export_and_read(
                    &mut hold,
                    &mut disks,
                    &copy_disks,
                    &listening,
                    until,
                    give,
                );
                this.space(&mut hold);
                // What was read is what the bitmaps are about only if the disks are still what they were: an export follows
                // to an overlay that somebody puts on. And what failed may have failed for a disk that has gone.
                let looked = hold.look().map(drop);
                let same = match looked {
                    Err(error) => read.map_err(while_going).and(Err(error)),
                    Ok(()) => match this.astray(&hold, disks.len()) {
                        Some(why) => Err(Astray(why).into()),
                        None => read,
                    },
                };
                let released = hold.release();
                drop(hold);
                same?;
                released.map(drop)
            },
        );
        let before = self.bytes.precopied;
        let kept = done.and_then(|((), copied)| self.keep(&mut disks, copied, epoch));
        self.measure_copy(self.bytes.precopied - before);
        self.disks = disks;
        self.copy_disks = copy_disks;
        kept
    }

    /// A batch copied so much. What went as slowly as it could tells nothing.
    fn measure_copy(&mut self, bytes: u64) {
        let (since, before) = self.measured;
        let (now, bytes) = (clock::now(), before + bytes);
        let leisurely = self.schedule.is_some() && self.watch().has_time();
        let told = leisurely || self.learned.speeds.copied(bytes, now - since);
        self.measured = if told { (now, 0) } else { (since, bytes) };
    }

    /// Remembers a disk that has blocks that cannot be read: a fleecing job would have to read them before the guest may
    /// overwrite them.
    pub(super) fn note_unreadable<T>(&mut self, done: Result<T>) -> Result<T> {
        let Err(error) = &done else { return done };
        let failed = |cause: &(dyn std::error::Error + 'static)| {
            let answer = cause.downcast_ref::<crate::nbd::Error>();
            answer.and_then(crate::nbd::Error::server_errno).is_some()
        };
        if let Some(Unread(disk)) = error.downcast_ref()
            && error.chain().any(failed)
            && !error.is::<Going>()
            && !self.session.state.unreadable.contains(disk)
        {
            let record = Record::Unreadable { disk: disk.clone() };
            self.session.append(&record)?;
            self.session.state.apply(&record);
        }
        done
    }

    /// Journals proofs and takes the proved blocks out of what is open.
    fn keep(&mut self, disks: &mut [RunDisk], copied: Copied, epoch: u64) -> Result<()> {
        let block_size = self.repo.block_size();
        self.bytes.stored += copied.stored;
        let mut condemned = None;
        for (disk, mut proofs) in disks.iter_mut().zip(copied.proofs) {
            proofs.sort_unstable_by_key(|(run, _)| run.first);
            let read = read_of(&proofs, &disk.proved, block_size);
            let since = copied.generation;
            match self.session.prove(&disk.key, epoch, &proofs, read, since) {
                Ok(()) => {}
                // The blocks of this disk stay open.
                Err(error) if is_condemned(&error) => {
                    condemned = Some(error);
                    continue;
                }
                Err(error) => return Err(error),
            }
            self.bytes.precopied += read.read;
            self.bytes.superseded += read.again;
            for (run, _) in &proofs {
                if let Some(open) = &mut disk.open {
                    open.remove(*run);
                }
                disk.proved.insert(*run);
            }
        }
        condemned.map_or(Ok(()), Err)
    }

    fn export_and_read(
        &self,
        hold: &mut Hold,
        disks: &mut [RunDisk],
        copy_disks: &[CopyDisk],
        listening: &Listening,
        until: Option<Deadline>,
        give: &mut dyn FnMut(Piece) -> ControlFlow<()>,
    ) -> Result<()> {
        let end = End::of(&self.vm.state, until);
        let bitmaps = disks.iter().any(|disk| disk.open.is_none());
        self.serve(hold, listening, disks.len(), bitmaps)?;
        let off = self.vm.offline();
        let machine = hold.machine_seen()?.clone();
        self.watch().need(self.needed_pace(disks));
        self.watch().begin(&mut hold.monitor, &machine, off);
        let mut clients = self.connect_all(hold, listening, disks)?;
        self.watch().prepared(&mut hold.monitor);
        let total: u64 = disks.iter().filter_map(|disk| self.open_bytes(disk)).sum();
        self.progress.total.store(
            self.progress
                .done
                .load(Ordering::Relaxed)
                .saturating_add(total),
            Ordering::Relaxed,
        );
        let interrupted = &self.interrupted;
        let monitor = Mutex::new(&mut hold.monitor);
        let look = || {
            let mut load = self.watch();
            if load.is_due() {
                let mut monitor = monitor.lock().unwrap_or_else(PoisonError::into_inner);
                load.within(&mut **monitor);
            }
        };
        let options = self.read_options();
        let go_on = || {
            look();
            let pace = self.throttle.pace();
            // With far fewer requests in flight than it has, a batch gives way to one that begins anew.
            let fits = pace.rate != Some(0) && pace.in_flight * 2 > options.depth;
            let go_on =
                fits && !end.has_come(self.longest_batch()) && !interrupted.load(Ordering::Relaxed);
            go_on && !self.yields()
        };
        let reading = Reading {
            block_size: self.repo.block_size(),
            options,
            permit: &|bytes| {
                if self.throttle.wait(bytes, &go_on) && self.wait_for_rate(bytes, &go_on) {
                    self.watch().copied(bytes);
                    ControlFlow::Continue(())
                } else {
                    ControlFlow::Break(())
                }
            },
        };
        let give = &mut |piece: Piece| {
            let begun = clock::now();
            let taken = give(piece);
            self.watch().stalled(clock::now() - begun);
            taken
        };
        // Each temperature of all disks before the next one.
        let sweeps: Vec<Vec<BlockSet>> = disks.iter().map(RunDisk::sweeps).collect();
        'reading: for sweep in 0..sweeps.iter().map(Vec::len).max().unwrap_or(0) {
            for (index, (disk, client)) in disks.iter().zip(&mut clients).enumerate() {
                let Some(open) = sweeps[index].get(sweep).filter(|open| !open.is_empty()) else {
                    continue;
                };
                let ended = reading
                    .read_open(client, index, copy_disks[index].size, open, give)
                    .with_context(|| Unread(disk.key.clone()))?;
                if ended.is_break() {
                    break 'reading;
                }
            }
        }
        for client in clients {
            client.disconnect()?;
        }
        self.watch().end(&mut hold.monitor);
        Ok(())
    }

    /// How fast the schedule needs it, while there is one.
    fn needed_pace(&self, disks: &[RunDisk]) -> Option<u64> {
        let (due, at_first) = self.schedule?;
        let known: Option<Vec<u64>> = disks.iter().map(|disk| self.open_bytes(disk)).collect();
        let useful = known.map_or(at_first, |open| open.iter().sum());
        let fit = self.learned.change.fit();
        Some(ahead::pace(due.left(), useful, fit, self.turns()))
    }

    /// What a pass is to read of a disk, where that is known.
    fn open_bytes(&self, disk: &RunDisk) -> Option<u64> {
        let open = disk.open.as_ref()?.count();
        Some((open - disk.postponed()) * self.repo.block_size().bytes())
    }

    /// Starts the VM's NBD server, and journals what is going to be put into the VM for an export of every disk, with bitmaps
    /// or without any.
    pub(super) fn serve(
        &self,
        hold: &mut Hold,
        listening: &Listening,
        disks: usize,
        bitmaps: bool,
    ) -> Result<()> {
        let mut left = vec![listening.leftover()];
        left.extend((0..disks).flat_map(|disk| export::leftovers(&self.run, disk, bitmaps)));
        hold.journal.write(left)?;
        start_server(listening, hold)
    }

    /// Connects to an export of every disk, and works out what is open where that is not known.
    pub(super) fn connect_all(
        &self,
        hold: &mut Hold,
        listening: &Listening,
        disks: &mut [RunDisk],
    ) -> Result<Vec<Client>> {
        let mut clients = Vec::new();
        for (index, disk) in disks.iter_mut().enumerate() {
            let tracked = self.tracked(&disk.key)?;
            let bitmaps = if disk.open.is_some() {
                Vec::new()
            } else {
                pending_names(&tracked)
            };
            let mut client = self.connect(hold, listening, index, &disk.key, &bitmaps)?;
            if disk.open.is_none() {
                if disk.heat.is_none() {
                    let blocks = self.repo.block_size().blocks(disk.size);
                    let heat = self.recall_heat(blocks, &disk.key, tracked.new.as_ref());
                    disk.heat = Some(heat);
                }
                disk.open = Some(self.load(&tracked, disk, &mut client)?);
            }
            clients.push(client);
        }
        Ok(clients)
    }

    /// Adds the export of a disk with bitmaps and connects to it.
    pub(super) fn connect(
        &self,
        hold: &mut Hold,
        listening: &Listening,
        index: usize,
        key: &str,
        bitmaps: &[(u64, String)],
    ) -> Result<Client> {
        let disk = hold.disk(key)?;
        let (node, size) = (disk.node.clone(), disk.size);
        let export = Export {
            disk: index,
            bitmaps: bitmaps
                .iter()
                .map(|(_, name)| (node.clone(), name.clone()))
                .collect(),
            node,
            size,
            granularity: u32::from(self.repo.block_size()),
        };
        export::add(&mut hold.monitor, &self.run, &export)?;
        let id = export::export_id(&self.run, index);
        let mut endpoint = Endpoint::new(&listening.socket, id).allocation();
        for (_, name) in bitmaps {
            endpoint = endpoint.bitmap(name);
        }
        connect(&mut hold.monitor, &endpoint)
    }

    pub(super) fn read_options(&self) -> ReadOptions {
        let pace = self.throttle.pace();
        let at_most = match pace.rate {
            Some(rate) if rate <= SLOW => 0,
            _ => 256 << 10,
        };
        let request_bytes = u32::from(self.repo.block_size()).max(at_most);
        // Hole chunks are not asked for: QEMU drops the connection on a read error when they are.
        ReadOptions {
            request_bytes,
            depth: pace.in_flight,
            spare_buffers: SPARE / request_bytes as usize,
            holes: false,
        }
    }

    pub(super) fn tracked(&self, key: &str) -> Result<Tracked> {
        let tracked = self.session.state.disks.get(key);
        tracked
            .cloned()
            .with_context(|| format!("disk `{key}` is not tracked"))
    }

    /// Works out the open blocks of a disk from its pending bitmaps, its marker and its proofs.
    pub(super) fn load(
        &self,
        tracked: &Tracked,
        disk: &mut RunDisk,
        client: &mut Client,
    ) -> Result<BlockSet> {
        let block_size = self.repo.block_size();
        let blocks = block_size.blocks(tracked.size);
        let proofs = if let Some(proofs) = disk.proofs.take() {
            proofs
        } else {
            let (proofs, proved) = self.session.proofs(tracked, block_size)?;
            disk.proved = proved;
            proofs
        };
        let unsound = if let Some(unsound) = disk.unsound.take() {
            unsound
        } else {
            let lost = self.repo.lost_blocks()?;
            self.session.unsound(tracked, &lost, block_size)?
        };
        let mut open = BlockSet::new(blocks);
        if let Some(epoch) = tracked.whole {
            let all = BlockRun {
                first: 0,
                count: blocks,
            };
            proofs.unsafe_of(epoch, all, &mut open);
        }
        let whole = Extent {
            offset: 0,
            length: tracked.size,
        };
        disk.idle.clear();
        let newest = tracked.needed.last().map(|named| named.epoch);
        let mut fresh = self.recently_rotated().then(|| BlockSet::new(blocks));
        let mut looks = 0;
        for (epoch, name) in pending_names(tracked) {
            let before = open.count();
            let mut found = 0;
            let mut heat = disk.heat.as_mut().filter(|heat| epoch > heat.epoch());
            looks += u32::from(heat.is_some());
            let mut fresh = fresh.as_mut().filter(|_| newest == Some(epoch));
            client.dirty_extents(&name, whole, &mut |extent| {
                let run = block_size.cover(extent);
                found += proofs.unsafe_of(epoch, run, &mut open);
                if let Some(heat) = &mut heat {
                    heat.found(run);
                }
                if let Some(fresh) = &mut fresh {
                    fresh.insert(run);
                }
                ControlFlow::Continue(())
            })?;
            if idle(
                found,
                open.count() > before,
                tracked.needed.len(),
                MANY_PENDING,
            ) {
                disk.idle.push(epoch);
            }
        }
        if !unsound.is_empty() {
            tracing::info!(
                disk = disk.key,
                blocks = unsound.count(),
                "blocks that are damaged in the repository are read again"
            );
            open.union(&unsound);
        }
        disk.order = None;
        if let Some(heat) = &mut disk.heat {
            if let Some(newest) = newest.filter(|newest| *newest > heat.epoch()) {
                let watched = self.watching_since().unwrap_or_default();
                heat.looked(newest, looks, wall_seconds(), watched.as_secs_f64());
            }
            let pending = tracked.needed.len();
            disk.order = Some(Order::of(
                &open,
                heat,
                fresh.as_ref(),
                self.patience,
                pending,
            ));
        }
        Ok(open)
    }

    /// Strikes the pending bitmaps that turned out to be of no use, so that passes that never end do not pile them up.
    fn strike_idle(&mut self) -> Result<()> {
        let idle: Vec<(String, Vec<u64>)> = self
            .disks
            .iter_mut()
            .filter(|disk| !disk.idle.is_empty())
            .filter(|disk| disk.open.as_ref().is_some_and(|open| !open.is_empty()))
            .map(|disk| (disk.key.clone(), std::mem::take(&mut disk.idle)))
            .collect();
        if idle.is_empty() {
            return Ok(());
        }
        let mut hold = self.hold()?;
        self.session
            .track(|state, journal| rotate::strike_idle(state, &mut hold, journal, idle))
    }

    /// Of the disks all of whose blocks are safe, everything older than the newest rotation: strikes it and removes it from
    /// the VM.
    pub(super) fn strike(&mut self) -> Result<()> {
        let epoch = self.session.state.epoch;
        let disks: Vec<String> = self
            .disks
            .iter()
            .filter(|disk| disk.open.as_ref().is_some_and(BlockSet::is_empty))
            .filter(|disk| {
                let tracked = self.session.state.disks.get(&disk.key);
                tracked.is_some_and(|tracked| !tracked.pending_epochs().is_empty())
            })
            .map(|disk| disk.key.clone())
            .collect();
        if disks.is_empty() {
            return Ok(());
        }
        let mut hold = self.hold()?;
        self.session
            .track(|state, journal| rotate::strike(state, &mut hold, journal, &disks, epoch - 1))
    }
}

/// The pending bitmaps of a disk with their epochs.
pub(super) fn pending_names(tracked: &Tracked) -> Vec<(u64, String)> {
    tracked
        .needed
        .iter()
        .map(|named| (named.epoch, named.name.clone()))
        .collect()
}

/// How much was read for proofs: all but the long runs of zeros that the block status told.
pub(super) fn read_of(proofs: &[Proof], proved: &BlockSet, block_size: BlockSize) -> Read {
    let read = proofs
        .iter()
        .filter(|(run, content)| *content != Content::Zero || run.count == 1);
    let mut sum = Read::default();
    for (run, _) in read {
        sum.read += run.count * block_size.bytes();
        sum.again += proved.count_in(*run) * block_size.bytes();
    }
    sum
}

/// Starts the VM's NBD server, waiting while somebody else's runs.
pub(super) fn start_server(listening: &Listening, hold: &mut Hold) -> Result<()> {
    let deadline = Deadline::after(SERVER_WAIT);
    loop {
        match listening.start(&mut hold.monitor) {
            Err(crate::qmp::Error::Command { description, .. })
                if description.contains("already running") =>
            {
                if deadline.passed() {
                    return Err(Failure::hinted(
                        Kind::Busy,
                        "the VM's NBD server is in use by somebody else",
                        "end their backup job or export, then run the command again",
                    ));
                }
                clock::sleep(Duration::from_millis(200));
            }
            started => return Ok(started?),
        }
    }
}
