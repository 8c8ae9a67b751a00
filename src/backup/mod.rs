//! The main job, as phases that follow each other: track, copy ahead, freeze, residual, release, commit.
//!
//! ```text
//! rotate --> batches of a pass (live) --> ... --> freeze --> spool --> release --> store --> commit --> sweep
//!            nothing of ours stays in the VM                 a guard watches       the point is published
//!            between two batches
//! ```
//!
//! [`Runner`] owns what the phases share. Each phase is a file: `pass`, `freeze`, `commit`.

mod ahead;
mod audit;
mod batch;
mod changed;
mod commit;
mod configuration;
pub mod connect;
mod freeze;
mod give_way;
mod learned;
mod pass;
mod reading;
mod spool;
mod together;
mod turn;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Result;
use jiff::Timestamp;
use serde::Serialize;

pub use audit::{AuditReport, Finding};
pub use changed::Changed;
pub use commit::{Point, PointFile};
pub use configuration::checksum;
pub use learned::{Learned, Note};
pub use together::{Common, Seat, seats};

use crate::bitmap::blocks::BlockSet;
use crate::bitmap::dirty::Proofs;
use crate::bitmap::rotate::{self, Settings};
use crate::bitmap::track::{Named, Rotation};
use crate::budget::{self, Share};
use crate::clock::{self, Deadline};
use crate::copy::CopyDisk;
use crate::exit::{Failure, Kind};
use crate::hooks::{self, Hooks};
use crate::hoststate::{self, Lock};
use crate::image::{MapReader, Repository};
use crate::load::Load;
use crate::load::config::Config as LoadConfig;
use crate::plan::{Debt, Heat, Limits, Order, Outlook, Patience};
use crate::progress::Progress;
use crate::qmp::freeze::Method;
use crate::qmp::graph::Bitmap;
use crate::qmp::names::RunName;
use crate::qmp::socket::start_time;
use crate::session::{Session, base_map};
use crate::throttle::Throttle;
use crate::vm::{Hold, Vm};
use turn::Turned;

/// How long a monitor that somebody else uses is waited for.
const BUSY_WAIT: Duration = Duration::from_secs(60);

/// How long a QEMU that hung up, or that is about to, may take to end.
const END_WAIT: Duration = Duration::from_secs(5);
/// How long a domain that ended may take to be started again before its images are opened: that would keep it from starting.
const START_WAIT: Duration = Duration::from_secs(10);

/// So much residual is not worth a live pass before the freeze.
const SMALL: u64 = 64 << 20;

/// Whether blocks were condemned between their look-up and their proof: they are to be read and stored anew.
fn is_condemned(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(crate::image::Error::Condemned { .. })
    )
}

/// How often in a row a prune may come in between.
const CONDEMNED_TRIES: u32 = 20;

fn is_busy(error: &anyhow::Error) -> bool {
    matches!(
        error.downcast_ref(),
        Some(crate::qmp::Error::Busy { .. } | crate::qmp::Error::DomainBusy { .. })
    )
}

/// Whether the connection to the monitor broke while the VM itself is there.
fn is_lost(error: &anyhow::Error) -> bool {
    let lost = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(crate::qmp::Error::Lost { .. }))
    };
    error.chain().any(lost)
}

/// Whether the connection to QEMU ended.
fn is_cut_off(error: &anyhow::Error) -> bool {
    let closed = |cause: &(dyn std::error::Error + 'static)| {
        matches!(cause.downcast_ref(), Some(crate::qmp::Error::Closed))
    };
    error.chain().any(closed)
}

/// Whether QEMU or its NBD server said it, or no longer did. One that is ending takes its exports away first.
fn is_of_qemu(error: &anyhow::Error) -> bool {
    error
        .chain()
        .any(|cause| cause.is::<crate::qmp::Error>() || cause.is::<crate::nbd::Error>())
}

/// When to quiesce the guest's file systems around the freeze.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Quiesce {
    /// When the agent answers.
    Auto,
    /// Or fail.
    Always,
    /// Not at all.
    Never,
}

/// How a run goes about it.
#[derive(Debug, Clone)]
pub struct Options {
    /// What sets the pace of passes.
    pub load: LoadConfig,
    /// Where the repository is, for its disk's load.
    pub repository: Option<PathBuf>,
    /// How the block snapshot is taken.
    pub method: Method,
    /// It was asked for by name.
    pub method_named: bool,
    /// Whether the guest is quiesced.
    pub quiesce: Quiesce,
    /// How long the guest's file systems may take to freeze.
    pub freeze_timeout: Duration,
    /// What the host's operator has run around the instant.
    pub hooks: Hooks,
    /// The guest agent's socket.
    pub agent: Option<PathBuf>,
    /// Where scratches, overlays and spools go.
    pub scratch: Option<PathBuf>,
    /// The limit of each disk's scratch, instead of the computed one.
    pub scratch_reserve: Option<u64>,
    /// How long the guest may be held at the freeze.
    pub deadline: Duration,
    /// How long an overlay may take to be committed back.
    pub commit_deadline: Duration,
    /// What the run is called in messages of those who wait for it.
    pub doing: String,
    /// What the window and the residual may be.
    pub limits: Limits,
    /// Where it must choose, the schedule goes before the guest's ease.
    pub hard: bool,
    /// Raised while the schedule would be missed and `hard` is set: whoever holds the pace down for the guest's sake gives way.
    pub urgent: Arc<AtomicBool>,
    /// The share of the clean blocks that is audited in a day, in percent.
    pub audit: Option<f64>,
    /// What all runs of this host may do together; without it this one takes no part in that.
    pub host: Option<budget::Limits>,
}

/// What was copied, by what it was good for. Bytes of disks.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Bytes {
    /// Copied live, before the freeze.
    pub precopied: u64,
    /// Of these, copied for nothing: overwritten later.
    pub superseded: u64,
    /// Copied from the snapshot.
    pub residual: u64,
    /// Newly stored, after deduplication and compression.
    pub stored: u64,
}

/// What a disk in doubt is reported with.
#[derive(Debug, Clone, Serialize)]
pub struct Rescan {
    /// The disk.
    pub disk: String,
    /// Why.
    pub reason: String,
}

/// A disk of a run.
struct RunDisk {
    key: String,
    size: u64,
    /// Blocks that are not safe with respect to every disabled bitmap and the whole-disk marker; what the live bitmap
    /// holds comes on top. `None` until it was read from the bitmaps.
    open: Option<BlockSet>,
    /// Blocks that have been copied in this session.
    proved: BlockSet,
    /// The proofs against the pending bitmaps, read ahead for the next time that `open` is worked out.
    proofs: Option<Proofs>,
    /// Blocks that are damaged in the repository, read ahead as well.
    unsound: Option<BlockSet>,
    /// Pending epochs that turned out to be of no use any more.
    idle: Vec<u64>,
    /// How often its blocks were found changed.
    heat: Option<Heat>,
    /// The open blocks by temperature, worked out with them.
    order: Option<Order>,
}

impl RunDisk {
    /// How many open blocks are left for later.
    fn postponed(&self) -> u64 {
        match (&self.order, &self.open) {
            (Some(order), Some(open)) => order.postponed(open),
            _ => 0,
        }
    }

    /// The open blocks in the order in which they are copied.
    fn sweeps(&self) -> Vec<BlockSet> {
        match (&self.order, &self.open) {
            (Some(order), Some(open)) => order.sweeps(open).into(),
            (None, Some(open)) => vec![open.clone()],
            _ => Vec::new(),
        }
    }

    /// Whether all is copied but what is left for later.
    fn is_done(&self) -> bool {
        let open = self.open.as_ref();
        open.is_some_and(|open| open.count() == self.postponed())
    }
}

/// One run of a repository on a target.
pub struct Runner {
    vm: Vm,
    repo: Repository,
    run: RunName,
    session: Session,
    options: Options,
    throttle: Arc<Throttle>,
    load: Mutex<Load>,
    progress: Arc<Progress>,
    interrupted: Arc<AtomicBool>,
    disks: Vec<RunDisk>,
    copy_disks: Vec<CopyDisk>,
    /// What this run copied.
    pub bytes: Bytes,
    /// What the operator should know.
    pub warnings: Vec<String>,
    /// The wall clock when the first look was taken, and the guest's writes then.
    writes: Option<(Instant, u64)>,
    passes: u64,
    begun: Timestamp,
    /// What a pass may leave for later.
    patience: Patience,
    /// What changed a moment ago is left for the next pass, since one comes.
    cooling: bool,
    /// How many passes in a row have brought little.
    dull: u32,
    /// Until then it is copied ahead, and nothing is in a hurry.
    ahead_until: Option<Deadline>,
    /// When what passes copy has to be there, and what that was when the pass was begun.
    schedule: Option<(Deadline, u64)>,
    /// Within a pass: since when it is measured how fast it goes, waits included, and what it copied since.
    measured: (Instant, u64),
    /// When the last two rotations were made, and the first one.
    rotated: [Option<Instant>; 2],
    first_rotated: Option<Instant>,
    /// What was measured of the target.
    learned: Learned,
    /// The instant is not before this time.
    not_before: Option<Timestamp>,
    /// What was expected of the freeze before it.
    predicted: Option<Outlook>,
    /// Why the guest is not quiesced.
    not_quiesced: Option<String>,
    /// The hook that comes after the thaw, while it runs.
    post_thaw: Option<hooks::Running>,
    /// Where the targets of a common instant meet.
    seat: Option<Seat>,
    /// This run's part in the host's budget.
    share: Option<Arc<Share>>,
    /// Its place among those that freeze, and how long it waited for such places.
    place: Option<Turned>,
    waited: Duration,
    _lock: Lock,
}

impl Runner {
    /// Begins a run: at most one of a repository on a target.
    pub fn begin(
        vm: Vm,
        repo: Repository,
        options: Options,
        progress: Arc<Progress>,
        interrupted: Arc<AtomicBool>,
    ) -> Result<Self> {
        let short = repo.id().short();
        let lock = vm.state.lock_run(&short, &options.doing)?;
        let learned = Learned::recall(&vm.state, &short);
        let mut session = Session::open(&repo, &vm.key)?;
        session.remove_committed()?;
        session.settle()?;
        let mut load = Load::new(&vm.key, options.load.clone(), options.repository.as_deref());
        load.heed(Arc::clone(&options.urgent));
        let share = options.host.map(|limits| {
            let spelled = vm.target.to_string();
            Share::join(&hoststate::root(), &spelled, &vm.key, &short, limits)
        });
        Ok(Self {
            run: RunName::new(&short),
            throttle: load.throttle(),
            load: Mutex::new(load),
            vm,
            repo,
            session,
            options,
            progress,
            interrupted,
            disks: Vec::new(),
            copy_disks: Vec::new(),
            bytes: Bytes::default(),
            warnings: Vec::new(),
            writes: None,
            passes: 0,
            begun: clock::utc_now(),
            patience: Patience::None,
            cooling: false,
            dull: 0,
            ahead_until: None,
            schedule: None,
            measured: (clock::now(), 0),
            rotated: [None; 2],
            first_rotated: None,
            learned,
            not_before: None,
            predicted: None,
            not_quiesced: None,
            post_thaw: None,
            seat: None,
            share,
            place: None,
            waited: Duration::ZERO,
            _lock: lock,
        })
    }

    /// Makes the next backup one of several at a common instant.
    pub fn join(&mut self, seat: Seat) {
        if let Some(share) = &self.share {
            share.tell(|me| me.group = Some(seat.group_name()));
        }
        self.seat = Some(seat);
    }

    /// Fails when a signal has asked for the end.
    fn check_interrupt(&self) -> Result<()> {
        if self.interrupted.load(Ordering::Relaxed) {
            let hint = "what was copied is kept: the next run goes on from there";
            return Err(Failure::hinted(Kind::Interrupted, "interrupted", hint));
        }
        Ok(())
    }

    /// Whether an error is that of a domain whose QEMU ended under our hands. It is there, on or off, all the same: after
    /// some time in which it may be started again the work goes on.
    fn domain_ended(&self, error: &anyhow::Error) -> Result<bool> {
        let (Some(domain), Some(process)) = (&self.vm.domain, &self.session.state.process) else {
            return Ok(false);
        };
        if process.pid == 0 || !is_of_qemu(error) {
            return Ok(false);
        }
        let ended = Deadline::after(END_WAIT);
        while start_time(process.pid) == Some(process.start) {
            if ended.passed() {
                return Ok(false);
            }
            self.pause(Duration::from_millis(50))?;
        }
        tracing::warn!("{error:#}: the domain ended");
        let started = Deadline::after(START_WAIT);
        while !domain.active()? && !started.passed() {
            self.pause(Duration::from_millis(500))?;
        }
        Ok(true)
    }

    fn hold(&mut self) -> Result<Hold> {
        let mut hold = self.hold_when_free()?;
        hold.granularity = u32::from(self.repo.block_size());
        for what in std::mem::take(&mut hold.recovered) {
            self.warnings.push(format!(
                "took back what an earlier run left in the VM: {what}"
            ));
        }
        for agent in &hold.unthawed {
            let warning = freeze::unthawed(agent);
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
        self.warnings.append(&mut hold.failed_hooks);
        self.space(&mut hold);
        hold.look()?;
        Ok(hold)
    }

    /// Takes the target, giving way to whoever else uses its monitor.
    fn hold_when_free(&self) -> Result<Hold> {
        let deadline = Deadline::after(BUSY_WAIT);
        loop {
            match self.vm.hold(&self.run, &self.options.doing) {
                Err(error) if is_busy(&error) && !deadline.passed() => {
                    self.check_interrupt()?;
                    clock::sleep(Duration::from_millis(500));
                }
                held => return held,
            }
        }
    }

    /// Rotates the bitmaps, or for a freeze writes down the intent to, and takes in what that says of the disks.
    fn rotate(&mut self, hold: &mut Hold, freeze: bool) -> Result<Rotation> {
        let process = hold.process();
        let repository = self.repo.id().short();
        self.ground(hold)?;
        let bases = self.session.bases.clone();
        let settings = Settings {
            bases: &bases,
            granularity: u32::from(self.repo.block_size()),
            repository: &repository,
            process: &process,
        };
        let rotation = self.session.track(|state, journal| {
            if freeze {
                rotate::intend(state, hold, journal, &settings, true)
            } else {
                rotate::rotate(state, hold, journal, &settings)
            }
        })?;
        self.rotated = [Some(clock::now()), self.rotated[0]];
        self.first_rotated = self.first_rotated.or(self.rotated[0]);
        hold.look()?;
        self.take_in_disks(hold)?;
        Ok(rotation)
    }

    /// Makes sure of what the disks build on, before anything is written down that relies on it.
    fn ground(&mut self, hold: &Hold) -> Result<()> {
        let keys: Vec<String> = hold.disks().iter().map(|disk| disk.key.clone()).collect();
        self.session.ground(&keys)
    }

    /// Makes the run's disks those of the newest rotation that were chosen.
    fn take_in_disks(&mut self, hold: &Hold) -> Result<()> {
        let block_size = self.repo.block_size();
        let mut disks = Vec::new();
        let mut copy_disks = Vec::new();
        let mut before: Vec<RunDisk> = std::mem::take(&mut self.disks);
        for found in hold.disks() {
            let Some(tracked) = self.session.state.rotated(&found.key) else {
                continue;
            };
            let blocks = block_size.blocks(tracked.size);
            let at = before
                .iter()
                .position(|disk| disk.key == tracked.key && disk.size == tracked.size);
            disks.push(at.map_or_else(
                || RunDisk {
                    key: tracked.key.clone(),
                    size: tracked.size,
                    open: None,
                    proved: BlockSet::new(blocks),
                    proofs: None,
                    unsound: None,
                    idle: Vec::new(),
                    heat: None,
                    order: None,
                },
                |at| before.swap_remove(at),
            ));
            let base = match &tracked.base {
                Some(base) => Some(MapReader::open(&self.repo, &base_map(base)?)?),
                None => None,
            };
            copy_disks.push(CopyDisk {
                key: tracked.key.clone(),
                size: tracked.size,
                base_size: tracked.base.as_ref().map_or(0, |base| base.size),
                base,
            });
        }
        self.disks = disks;
        self.copy_disks = copy_disks;
        Ok(())
    }

    /// How many bytes the next freeze would find, from the counts that QEMU lists: an upper bound, since some of them are
    /// safe already.
    fn estimate(&self, hold: &Hold) -> u64 {
        self.debt(hold).total()
    }

    /// What is not copied yet, by what QEMU lists and what the last pass knew.
    fn debt(&self, hold: &Hold) -> Debt {
        let block_size = self.repo.block_size().bytes();
        let mut debt = Debt::default();
        for disk in hold.disks() {
            debt.size += disk.size;
            let tracked = self.session.state.disks.get(&disk.key);
            let tracked = tracked.or_else(|| self.session.bases.get(&disk.key));
            let Some(tracked) = tracked else {
                debt.whole += disk.size;
                continue;
            };
            let found = |named: &Named| disk.bitmaps.iter().find(|has| has.name == named.name);
            let (live, frozen): (Vec<&Bitmap>, Vec<&Bitmap>) = tracked
                .names()
                .filter_map(found)
                .partition(|bitmap| bitmap.recording);
            let count =
                |bitmaps: &[&Bitmap]| bitmaps.iter().map(|bitmap| bitmap.count).sum::<u64>();
            let known = self.disks.iter().find(|known| known.key == disk.key);
            let open = known.and_then(|known| Some((known, known.open.as_ref()?)));
            match open {
                _ if live.is_empty() => debt.whole += disk.size,
                Some((known, open)) => {
                    debt.live += count(&live).min(disk.size);
                    debt.open += (open.count() * block_size).min(disk.size);
                    debt.postponed += known.postponed() * block_size;
                }
                None if tracked.whole.is_some() => debt.whole += disk.size,
                None => {
                    let live = count(&live).min(disk.size);
                    debt.live += live;
                    debt.open += count(&frozen).min(disk.size - live);
                }
            }
        }
        debt
    }

    /// The disks that are read in full, with the reasons; a first copy is none.
    #[must_use]
    pub fn rescans(&self) -> Vec<Rescan> {
        let disks = self.session.state.disks.values();
        disks
            .filter_map(|disk| {
                Some(Rescan {
                    disk: disk.key.clone(),
                    reason: disk.rescanned()?,
                })
            })
            .collect()
    }

    /// Starts following the disks, and no more. Says whether anything had to be done.
    pub fn track(&mut self) -> Result<bool> {
        let mut hold = self.hold()?;
        let state = &self.session.state;
        let followed = hold.disks().iter().all(|disk| {
            let known = match state.disks.get(&disk.key) {
                Some(tracked) => Some((tracked, state.confirmed(tracked))),
                None => self.session.bases.get(&disk.key).map(|base| (base, true)),
            };
            known.is_some_and(|(tracked, confirmed)| {
                crate::bitmap::track::trust(tracked, confirmed, &crate::vm::seen(disk)).is_ok()
            })
        });
        if !followed {
            self.rotate(&mut hold, false)?;
        }
        for disk in hold.disks() {
            if let Some(why) = &disk.transient {
                self.warnings.push(format!(
                    "disk `{}` is followed only while this QEMU runs: {why}",
                    disk.key
                ));
            } else {
                self.warnings.push(format!(
                    "disk `{}`: reverting to an internal snapshot fails while bitmaps are on it; `forerun untrack` removes them",
                    disk.key
                ));
            }
        }
        Ok(!followed)
    }
}
