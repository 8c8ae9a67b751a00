//! A target in our hands: for the length of a batch or a freeze, under its lock, with its monitor, after whatever a dead
//! run left in it has been taken back.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use qapi::qmp;
use rustix::fs::Access;
use serde_json::json;

use crate::bitmap::rotate::Port;
use crate::bitmap::track::Seen;
use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::hoststate::{self, Found, Journal, Lock, TargetState};
use crate::libvirt::Domain;
use crate::offline::{self, Daemon, Memory};
use crate::qmp::agent::{Address, THAW_FOR};
use crate::qmp::command::{
    action_add_bitmap, action_disable_bitmap, action_remove_bitmap, call, transaction,
};
use crate::qmp::graph::{Disk, Graph};
use crate::qmp::machine::{self, Known, LeftOut, Machine};
use crate::qmp::names::{PREFIX, RunName};
use crate::qmp::release::Leftover;
use crate::qmp::socket::QmpSocket;
use crate::qmp::{Monitor, Process};
use crate::settle::{self, TakenBack};
use crate::target::{Choice, Chosen, Image, Target, key_without_uuid};

/// How long the agent of a dead run is asked for a thaw before the command goes on with its own work.
const THAW_PATIENCE: Duration = Duration::from_secs(4);
/// How long a chain of images that libvirt is changing is waited for.
const CHAIN_WAIT: Duration = Duration::from_secs(3);
/// How long we wait for another run's batch on the same target.
const LOCK_WAIT: Duration = Duration::from_secs(30);
/// What was seen so shortly ago is not looked at again.
const JUST_NOW: Duration = Duration::from_millis(100);
/// Run states in which the disks are not this QEMU's to read.
const NOT_ITS_OWN: [&str; 3] = ["postmigrate", "inmigrate", "finish-migrate"];

/// The run state of a domain that is off and will go on from a managed save.
pub const SAVED: &str = "saved";

/// A target that was found.
#[derive(Debug, Clone)]
pub struct Vm {
    /// As it was spelled.
    pub target: Target,
    /// What it is known by.
    pub key: String,
    /// This host's state of it.
    pub state: TargetState,
    /// Which of its disks.
    pub choice: Choice,
    /// The libvirt domain that it is.
    pub domain: Option<Domain>,
    /// Of images that hold no bitmaps.
    memory: Arc<Mutex<Memory>>,
    /// What is not asked for at each look.
    known: Arc<Mutex<Known>>,
    /// Whether it was off when it was last held.
    off: Arc<AtomicBool>,
}

impl Vm {
    /// Finds a target and its key. `connect` is the URI of the hypervisor of domains.
    pub fn find(
        target: &Target,
        connect: Option<&str>,
        given: Option<&str>,
        choice: Choice,
    ) -> Result<Self> {
        let mut domain = None;
        let key = match target {
            Target::Qmp(socket) => {
                let mut monitor = match QmpSocket::connect(socket) {
                    Err(error @ crate::qmp::Error::Busy { .. }) => {
                        return Err(hoststate::holder_of(&target.to_string())
                            .map_or_else(|| error.into(), Into::into));
                    }
                    connected => connected?,
                };
                match machine::uuid(&mut monitor)? {
                    Some(uuid) => uuid,
                    None => key_without_uuid(socket, given)?,
                }
            }
            Target::Disk(image) => {
                std::fs::metadata(&image.path)
                    .with_context(|| format!("cannot open {}", image.path.display()))?;
                key_without_uuid(&image.path, given)?
            }
            Target::Name(name) if name.contains('/') => {
                return Err(Failure::hinted(
                    Kind::Usage,
                    format!("`{name}` is no target that can be reached"),
                    format!(
                        "name it `qmp:{name}` when it is a QMP socket, `disk:{name}` when it is an image of a VM that is off"
                    ),
                ));
            }
            Target::Name(name) => {
                let found = Domain::find(connect, name)?;
                domain.insert(found).uuid().to_owned()
            }
        };
        let state = TargetState::open(&key)?;
        Ok(Self {
            target: target.clone(),
            key,
            state,
            choice,
            domain,
            memory: Arc::default(),
            known: Arc::default(),
            off: Arc::new(AtomicBool::new(matches!(target, Target::Disk(_)))),
        })
    }

    /// Takes the target: lock, monitor, and what a dead run left is taken back.
    pub fn hold(&self, run: &RunName, doing: &str) -> Result<Hold> {
        let doing = format!("{doing} {}", self.target);
        let lock = self.state.lock_target(&doing, LOCK_WAIT)?;
        let mut recovered = Vec::new();
        let mut unthawed = Vec::new();
        let mut failed_hooks = Vec::new();
        let mut take_back = |journal: &mut Journal, monitor: Option<&mut dyn Monitor>| {
            let manager = self.domain.as_ref().map(Domain::manager);
            let taken = settle::take_back(journal, monitor, manager.as_deref(), THAW_PATIENCE)?;
            recovered.extend(taken.removed);
            unthawed.extend(taken.unthawed);
            failed_hooks.extend(taken.failed_hooks);
            anyhow::Ok(())
        };
        if let Some(domain) = &self.domain
            && !domain.active()?
        {
            refuse_migrated(domain)?;
            // An overlay is the domain's own QEMU's to commit: its images are not opened before that.
            for mut journal in self.state.journals()? {
                if journal
                    .left()
                    .iter()
                    .any(|left| matches!(left, Leftover::Managed(_)))
                {
                    take_back(&mut journal, None)?;
                }
            }
        }
        let (mut monitor, off) = self.connect(run)?;
        self.state.remove_unwritten()?;
        for mut journal in self.state.journals()? {
            take_back(&mut journal, Some(&mut monitor))?;
        }
        if !recovered.is_empty() {
            tracing::warn!(?recovered, "took back what a dead run left in the VM");
        }
        let journal = self.state.journal(
            &run.run,
            self.monitor_path(),
            self.found(),
            monitor.process(),
        );
        let mut memory = None;
        if let Some(off) = &off {
            for disk in off.daemon.machine(&mut monitor)?.disks {
                let image = off.images.iter().find(|image| image.key() == disk.key);
                if let (Some(image), Some(_)) = (image, &disk.transient) {
                    let mut kept = self.memory.lock().unwrap_or_else(PoisonError::into_inner);
                    kept.resume(&disk, &image.path, &mut monitor)?;
                    memory = Some(Arc::clone(&self.memory));
                }
            }
        }
        self.off.store(off.is_some(), Ordering::Relaxed);
        let known = Arc::clone(&self.known);
        if self.domain.is_none() {
            known
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .forget_devices();
        }
        Ok(Hold {
            monitor,
            journal,
            lock,
            recovered,
            unthawed,
            failed_hooks,
            seen: None,
            looked: None,
            known,
            used: Vec::new(),
            choice: self.choice.clone(),
            granularity: 0,
            memory,
            off,
            domain: self.domain.clone(),
        })
    }

    /// The monitor of the VM, or of a private helper over the images of one that is off.
    fn connect(&self, run: &RunName) -> Result<(Box<dyn Monitor>, Option<Off>)> {
        let open = |images: Vec<Image>, left_out| {
            let (monitor, daemon) = Daemon::open(&images, &self.state, &run.run)?;
            let monitor: Box<dyn Monitor> = Box::new(monitor);
            let off = Off {
                daemon,
                images,
                left_out,
                saved: false,
            };
            anyhow::Ok((monitor, off))
        };
        let domain = match (&self.target, &self.domain) {
            (Target::Qmp(socket), _) => return Ok((Box::new(QmpSocket::connect(socket)?), None)),
            (Target::Disk(image), _) => {
                let (monitor, off) = open(vec![image.clone()], Vec::new())?;
                return Ok((monitor, Some(off)));
            }
            (Target::Name(_), Some(domain)) => domain,
            (Target::Name(name), None) => {
                anyhow::bail!("`{name}` is no target that can be reached")
            }
        };
        let deadline = Deadline::after(LOCK_WAIT);
        loop {
            let connected = if domain.active()? {
                match domain.monitor() {
                    Ok(monitor) => return Ok((monitor, None)),
                    Err(error) => Err(anyhow::Error::from(error)),
                }
            } else {
                refuse_migrated(domain)?;
                let (images, left_out) = domain.images()?;
                open(images, left_out).and_then(|(monitor, mut off)| {
                    // It cannot be started or saved while its images are held.
                    off.saved = domain.is_saved()?;
                    Ok((monitor, Some(off)))
                })
            };
            match connected {
                // It was started or ended just now.
                Err(error) if starts_or_ends(&error) && !deadline.passed() => {
                    tracing::info!("{error:#}: looking again");
                    clock::sleep(Duration::from_millis(250));
                }
                connected => return connected,
            }
        }
    }

    fn found(&self) -> Found {
        match &self.domain {
            Some(domain) => Found {
                target: domain.name().to_owned(),
                connect: Some(domain.uri().to_owned()),
            },
            None => Found {
                target: self.target.to_string(),
                connect: None,
            },
        }
    }

    fn monitor_path(&self) -> &Path {
        match &self.target {
            Target::Qmp(path) => path,
            Target::Disk(image) => &image.path,
            Target::Name(_) => Path::new(""),
        }
    }

    /// Whether the VM is off, or was when it was last held.
    #[must_use]
    pub fn offline(&self) -> bool {
        self.off.load(Ordering::Relaxed)
    }
}

/// Not every shared storage knows that the other host has the images of a domain that went there.
fn refuse_migrated(domain: &Domain) -> Result<()> {
    if domain.has_migrated()? {
        let domain = domain.name().to_owned();
        return Err(crate::qmp::Error::Migrated { domain }.into());
    }
    Ok(())
}

/// Whether an error may be that of a domain that was just started or ended: its images are locked, or its QEMU is gone.
fn starts_or_ends(error: &anyhow::Error) -> bool {
    let locked = matches!(
        error.downcast_ref(),
        Some(Failure {
            kind: Kind::Busy,
            ..
        })
    );
    locked || matches!(error.downcast_ref(), Some(crate::qmp::Error::Closed))
}

/// A VM that is off, held: nobody else can open its images.
#[derive(Debug)]
struct Off {
    daemon: Daemon,
    images: Vec<Image>,
    left_out: Vec<LeftOut>,
    /// Its guest sleeps: its memory is in a managed save.
    saved: bool,
}

/// A target in our hands. Dropped, the lock and the connection go; what is in the VM is the journal's to take back.
#[derive(Debug)]
pub struct Hold {
    /// The monitor.
    pub monitor: Box<dyn Monitor>,
    /// What we have in the VM.
    pub journal: Journal,
    /// What was left by dead runs and has been taken back.
    pub recovered: Vec<String>,
    /// Agents of dead runs that do not say that their guests are thawed; every command asks them again.
    pub unthawed: Vec<Address>,
    /// Hooks of dead runs that had to be run and failed.
    pub failed_hooks: Vec<String>,
    seen: Option<(Machine, Chosen)>,
    /// When that was, while nothing has been done to the bitmaps since.
    looked: Option<Instant>,
    known: Arc<Mutex<Known>>,
    /// The nodes of disks that were chosen at any look.
    used: Vec<String>,
    choice: Choice,
    /// Bytes a bit of the bitmaps that are added.
    pub granularity: u32,
    memory: Option<Arc<Mutex<Memory>>>,
    off: Option<Off>,
    domain: Option<Domain>,
    /// The target's lock; the last to go, when an image's helper has let go of the image.
    pub lock: Lock,
}

impl Hold {
    /// What the VM is and has, just now.
    pub fn machine(&mut self) -> Result<Machine> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let mut machine = match &self.off {
            None => machine::identify(&mut self.monitor, &mut known)?,
            Some(off) => {
                let mut machine = off.daemon.machine(&mut self.monitor)?;
                machine.left_out.clone_from(&off.left_out);
                if off.saved {
                    SAVED.clone_into(&mut machine.state);
                }
                machine
            }
        };
        if let Some(domain) = &self.domain {
            if self.off.is_none() {
                // While libvirt changes a chain, its XML and QEMU differ for a moment.
                let deadline = Deadline::after(CHAIN_WAIT);
                while !domain.describe(&mut machine)? && !deadline.passed() {
                    clock::sleep(Duration::from_millis(200));
                    machine = machine::identify(&mut self.monitor, &mut known)?;
                }
            }
            machine.name = Some(domain.name().to_owned());
            machine.uuid = Some(domain.uuid().to_owned());
        }
        Ok(machine)
    }

    /// Whether sockets and scratches can be made where a domain's QEMU opens them; before anything is put into the VM.
    pub fn may_share_files(&self) -> Result<()> {
        let Some(place) = self.monitor.place() else {
            return Ok(());
        };
        let needed = Access::READ_OK | Access::WRITE_OK | Access::EXEC_OK;
        rustix::fs::access(place, needed).map_err(|error| {
            Failure::hinted(
                Kind::Attention,
                format!(
                    "{}, where the domain's QEMU may open sockets and files, cannot be entered: {}",
                    place.display(),
                    std::io::Error::from(error)
                ),
                "run forerun as root: access to libvirt alone lets you `inspect` and `track` a domain, not read its disks. A domain of your own (`qemu:///session`) needs no root",
            )
        })
    }

    /// Looks at the VM anew and applies the choice of disks.
    pub fn look(&mut self) -> Result<(&Machine, &Chosen)> {
        let machine = self.machine()?;
        if NOT_ITS_OWN.contains(&machine.state.as_str()) {
            return Err(Failure::hinted(
                Kind::Attention,
                format!(
                    "the VM is in state `{}`: its disks are not its own",
                    machine.state
                ),
                "back up the VM at the other end of the migration",
            ));
        }
        let chosen = self.choice.apply(&machine)?;
        for disk in &chosen.disks {
            if !self.used.contains(&disk.node) {
                self.used.push(disk.node.clone());
            }
        }
        self.looked = Some(clock::now());
        let kept = self.seen.insert((machine, chosen));
        Ok((&kept.0, &kept.1))
    }

    /// The VM as it was last seen.
    pub fn machine_seen(&self) -> Result<&Machine> {
        let seen = self.seen.as_ref().map(|(machine, _)| machine);
        seen.context("the VM was not looked at")
    }

    /// The chosen disks as they were last seen.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        self.seen.as_ref().map_or(&[], |(_, chosen)| &chosen.disks)
    }

    /// Takes back all that the journal lists, in the VM and on the file system.
    pub fn release(&mut self) -> Result<TakenBack> {
        let manager = self.domain.as_ref().map(Domain::manager);
        let monitor = Some(&mut self.monitor as &mut dyn Monitor);
        let taken = settle::take_back(&mut self.journal, monitor, manager.as_deref(), THAW_FOR)?;
        if self.domain.is_some()
            && self.off.is_none()
            && let Err(error) = self.close_unplugged()
        {
            tracing::warn!(%error, "cannot see whether a disk was unplugged");
        }
        Ok(taken)
    }

    /// Closes the images of disks that were unplugged while we read them: libvirt could not, forgets them, and they could not
    /// be plugged again.
    fn close_unplugged(&mut self) -> crate::qmp::Result<()> {
        let graph = Graph::read(&mut self.monitor)?;
        for node in std::mem::take(&mut self.used) {
            if graph.node(&node).is_none() || graph.has_parents(&node) {
                continue;
            }
            let below = graph.below(&node);
            for node in std::iter::once(&node).chain(&below) {
                // One that is in use stays; libvirt may be at it, too.
                match call::<qmp::blockdev_del>(&mut self.monitor, json!({ "node-name": node })) {
                    Err(error) if !error.refused() => return Err(error),
                    Err(_) => break,
                    Ok(_) => tracing::info!(node, "closed an unplugged disk's image"),
                }
            }
        }
        Ok(())
    }

    /// The ids of the jobs that were there at the last look and are not ours.
    #[must_use]
    pub fn foreign_jobs(&self) -> Vec<&str> {
        let jobs = self.seen.iter().flat_map(|(machine, _)| &machine.jobs);
        jobs.map(|job| job.id.as_str())
            .filter(|id| !id.starts_with(PREFIX))
            .collect()
    }

    /// A chosen disk by its key.
    pub fn disk(&self, key: &str) -> Result<&Disk> {
        self.disks()
            .iter()
            .find(|disk| disk.key == key)
            .with_context(|| format!("disk `{key}` is no longer there"))
    }

    /// The process that answers: an image's helper changes from batch to batch and says nothing of the VM.
    #[must_use]
    pub fn process(&self) -> Process {
        match self.off {
            Some(_) => Process { pid: 0, start: 0 },
            None => self.monitor.process().clone(),
        }
    }

    fn act(
        &mut self,
        bitmaps: &[(String, String)],
        action: impl Fn(&Disk, &str) -> serde_json::Value,
    ) -> Result<()> {
        let actions = bitmaps
            .iter()
            .map(|(key, name)| Ok(action(self.disk(key)?, name)))
            .collect::<Result<Vec<_>>>()?;
        self.looked = None;
        transaction(&mut self.monitor, &actions)?;
        if let Some(memory) = self.memory.clone() {
            self.look()?;
            let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
            memory.keep(self.disks());
        }
        Ok(())
    }

    /// Whether what is proved now still counts in a later hold. A device without bitmaps has nothing that would tell.
    pub fn lasting(&self) -> Result<bool> {
        let Some(off) = &self.off else {
            return Ok(true);
        };
        for disk in self.disks().iter().filter(|disk| disk.transient.is_some()) {
            let image = off.images.iter().find(|image| image.key() == disk.key);
            if let Some(image) = image
                && offline::is_device(&image.path)?
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether nobody has written to images without bitmaps of a VM that is off since the hold began.
    #[must_use]
    pub fn unchanged(&self) -> bool {
        self.memory.as_ref().is_none_or(|memory| {
            let memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
            memory.unchanged()
        })
    }
}

/// What a disk was, for later comparison.
#[must_use]
pub fn seen(disk: &Disk) -> Seen {
    Seen {
        key: disk.key.clone(),
        size: disk.size,
        identity: serde_json::to_value(&disk.chain).unwrap_or_default(),
        persistent: disk.transient.is_none(),
        bitmaps: disk.bitmaps.clone(),
    }
}

impl Port for Hold {
    fn seen(&mut self) -> Result<Vec<Seen>> {
        // What was seen a moment ago may change as well in the moment until it is acted on.
        if self.looked.is_none_or(|at| clock::now() - at > JUST_NOW) {
            self.look()?;
        }
        Ok(self.disks().iter().map(seen).collect())
    }

    fn add(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        let granularity = self.granularity;
        self.act(bitmaps, |disk, name| {
            action_add_bitmap(&disk.node, name, granularity, disk.transient.is_none())
        })
    }

    fn disable(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        self.act(bitmaps, |disk, name| {
            action_disable_bitmap(&disk.node, name)
        })
    }

    fn remove(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        self.act(bitmaps, |disk, name| action_remove_bitmap(&disk.node, name))
    }
}
