//! The freeze and what hangs on it: quiesce, the one transaction, thaw, the residual into the spool, release. The guest is
//! held for as long as this takes, so nothing here hashes, compresses or waits for the repository.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use qapi::qmp as commands;
use serde::Serialize;
use serde_json::{Value, json};

use super::pass::{Reading, pending_names, start_server};
use super::spool::Spool;
use super::{Quiesce, Runner};
use crate::bitmap::blocks::BlockSet;
use crate::bitmap::rotate::{self, Settings};
use crate::bitmap::track::Rotation;
use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::guard::Guard;
use crate::nbd::Endpoint;
use crate::qmp::Monitor as _;
use crate::qmp::agent::{self, Agent, Status};
use crate::qmp::command::list;
use crate::qmp::export::{self, Export, Listening};
use crate::qmp::freeze::{Freeze, FreezeDisk, Method};
use crate::qmp::graph::Machine;
use crate::qmp::release::{Leftover, Released};
use crate::units::Bytes;
use crate::vm::{Hold, seen};

/// The least that a scratch is given.
const SCRATCH_LEAST: u64 = 1 << 30;
/// What the guard waits beyond the deadline before it ends a hanging run.
const GUARD_GRACE: Duration = Duration::from_secs(5);
/// How long the guest's file systems may take to freeze.
const QUIESCE: Duration = Duration::from_secs(10);
/// How long somebody else's freeze is waited for.
const FROZEN_WAIT: Duration = Duration::from_secs(30);

/// How the instant came about, and what it cost the guest.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Cut {
    /// When.
    #[serde(skip)]
    pub(super) at: Timestamp,
    /// The transaction, milliseconds.
    pub(super) freeze_ms: u64,
    /// From the transaction to the guest released, milliseconds.
    pub(super) released_ms: u64,
    /// How long the guest's file systems were frozen, milliseconds.
    pub(super) quiesced_ms: Option<u64>,
    /// Bytes that the scratches took.
    pub(super) scratch_bytes: u64,
    /// Whether the file systems were still frozen after the transaction.
    #[serde(skip)]
    pub(super) quiesced: bool,
}

/// The residual of all disks at one instant.
pub(super) struct Residual {
    pub(super) instant: Cut,
    pub(super) spool: Spool,
    pub(super) machine: Value,
}

/// A freeze that was given up; nothing is lost and another may be tried.
#[derive(Debug, thiserror::Error)]
#[error("the freeze was given up: {0}")]
pub(super) struct GivenUp(pub(super) String);

impl Runner {
    /// Freezes all disks at one instant and brings their residual in.
    pub(super) fn freeze(&mut self) -> Result<Residual> {
        let mut hold = self.hold()?;
        let result = self.freeze_held(&mut hold);
        if result.is_err() {
            // Whatever was put into the VM comes out; the error that is reported is the first one.
            if let Err(error) = hold.release() {
                tracing::error!(error = format!("{error:#}"), "the VM could not be released");
                self.warnings.push(format!(
                    "the VM could not be released: {error:#}; run `forerun recover`"
                ));
            }
            for disk in &mut self.disks {
                disk.open = None;
            }
        }
        result
    }

    fn freeze_held(&mut self, hold: &mut Hold) -> Result<Residual> {
        if self.vm.offline() {
            return self.read_offline(hold);
        }
        self.refuse_risky(hold)?;
        let directory = self.scratch_directory();
        let was_running = hold.look()?.0.state == "running";
        let rotation = self.intend_freeze(hold)?;
        let before = hold.look()?.0.clone();
        let disks = self.freeze_disks(hold, &rotation)?;
        self.check_space(hold, &disks, &directory)?;
        let mut freeze = Freeze::new(
            self.options.method,
            self.run.clone(),
            disks,
            directory.clone(),
        );
        let listening = Listening::place(self.vm.state.directory(), &self.run);
        let mut left = freeze.leftovers();
        left.push(listening.leftover());
        if was_running {
            left.push(Leftover::Running);
        }
        let agent = self.agent()?;
        if let Some((_, socket)) = &agent {
            left.insert(
                0,
                Leftover::Frozen {
                    agent: socket.clone(),
                },
            );
        }
        hold.journal.write(left)?;
        freeze.prepare(&mut hold.monitor)?;
        start_server(&listening, hold)?;
        let mut spool = Spool::new(&directory)?;
        let guard_after = self.options.deadline + GUARD_GRACE + QUIESCE;
        let guard = Guard::start(&hold.monitor, hold.journal.path(), &hold.lock, guard_after)?;
        let mut instant = self.cut(hold, &freeze, agent)?;
        let begin = clock::now();
        let deadline = Deadline::after(self.options.deadline);
        if freeze.method() == Method::Snapshot {
            Self::journal_overlays(hold, &freeze)?;
        }
        self.spool_residual(hold, &freeze, &listening, deadline, &mut spool)?;
        self.check_valid(hold, &freeze, &before)?;
        instant.scratch_bytes = freeze.scratch_used();
        let mut released = Released::default();
        hold.journal.free_guest(&mut hold.monitor, &mut released)?;
        if freeze.method() == Method::Snapshot {
            hold.journal
                .release_rest(&mut hold.monitor, &mut released)?;
        }
        instant.released_ms = instant.freeze_ms + millis(clock::now() - begin);
        hold.journal
            .release_rest(&mut hold.monitor, &mut released)?;
        if released.resumed {
            self.warnings
                .push("the VM was stopped by a full scratch and was let go on".to_owned());
        }
        guard.dismiss()?;
        hold.journal.close()?;
        let machine = machine_record(&before);
        Ok(Residual {
            instant,
            spool,
            machine,
        })
    }

    fn intend_freeze(&mut self, hold: &mut Hold) -> Result<Rotation> {
        let process = hold.process();
        let repository = self.repo.id().short();
        let bases = self.session.bases.clone();
        let settings = Settings {
            bases: &bases,
            granularity: u32::from(self.repo.block_size()),
            repository: &repository,
            process: &process,
        };
        let known: Vec<(String, Option<u64>)> = self
            .session
            .state
            .disks
            .values()
            .map(|disk| (disk.key.clone(), disk.whole))
            .collect();
        let mut state = std::mem::take(&mut self.session.state);
        let intended = rotate::intend(&mut state, hold, &mut self.session, &settings, true);
        self.session.state = state;
        let rotation = intended?;
        hold.look()?;
        self.take_in_disks(hold)?;
        // A disk that came into doubt only now is read whole: its open blocks are to be worked out anew.
        for disk in &mut self.disks {
            let now = self
                .session
                .state
                .disks
                .get(&disk.key)
                .and_then(|tracked| tracked.whole);
            let before = known
                .iter()
                .find(|(key, _)| key == &disk.key)
                .and_then(|(_, whole)| *whole);
            if now != before {
                disk.open = None;
            }
        }
        Ok(rotation)
    }

    fn freeze_disks(&self, hold: &Hold, rotation: &Rotation) -> Result<Vec<FreezeDisk>> {
        let named = |list: &[(String, String)], key: &str| -> Vec<String> {
            list.iter()
                .filter(|(disk, _)| disk == key)
                .map(|(_, name)| name.clone())
                .collect()
        };
        let writes = self.writes_per_second(hold);
        self.disks
            .iter()
            .enumerate()
            .map(|(index, disk)| {
                let found = hold.disk(&disk.key)?;
                let beginning = named(&rotation.add, &disk.key)
                    .pop()
                    .with_context(|| format!("no bitmap is planned for disk `{}`", disk.key))?;
                Ok(FreezeDisk {
                    index,
                    key: disk.key.clone(),
                    node: found.node.clone(),
                    size: disk.size,
                    image: found
                        .chain
                        .first()
                        .map(|layer| (absolute(hold, &layer.filename), layer.driver.clone()))
                        .unwrap_or_default(),
                    file: found
                        .chain
                        .first()
                        .map(|layer| layer.filename.clone())
                        .unwrap_or_default(),
                    protocol: found
                        .chain
                        .first()
                        .map(|layer| layer.protocol.clone())
                        .unwrap_or_default(),
                    direct: found.direct,
                    ending: named(&rotation.disable, &disk.key),
                    beginning,
                    granularity: u32::from(self.repo.block_size()),
                    persistent: found.transient.is_none(),
                    scratch_limit: self.scratch_limit(disk.size, writes),
                })
            })
            .collect()
    }

    /// At least 1 GiB, or what the guest's writes could fill until the deadline; never more than the disk can.
    fn scratch_limit(&self, size: u64, writes_per_second: u64) -> u64 {
        if let Some(reserve) = self.options.scratch_reserve {
            return reserve;
        }
        let seconds = self.options.deadline.as_secs().max(1);
        let could = writes_per_second
            .saturating_mul(seconds)
            .saturating_mul(64 << 10);
        // A scratch holds the disk and its own tables at most; half of the limit is the end.
        let most = (size + size / 64 + (4 << 20)) * 2;
        could.max(SCRATCH_LEAST).min(most)
    }

    fn writes_per_second(&self, hold: &Hold) -> u64 {
        let Some((since, before)) = self.writes else {
            return 0;
        };
        let _ = hold;
        let seconds = (clock::now() - since).as_secs_f64().max(0.1);
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "an estimate"
        )]
        let rate = (before as f64 / seconds) as u64;
        rate
    }

    fn scratch_directory(&self) -> PathBuf {
        self.options
            .scratch
            .clone()
            .unwrap_or_else(|| self.vm.state.directory().to_path_buf())
    }

    /// A freeze is not begun where the scratches and the spool have no room, or would leave their file system less than a
    /// tenth free: the guest's own images may grow there.
    fn check_space(&self, hold: &Hold, disks: &[FreezeDisk], directory: &PathBuf) -> Result<()> {
        let stat = rustix::fs::statvfs(directory)
            .with_context(|| format!("look at {}", directory.display()))?;
        let free = stat.f_bavail * stat.f_frsize;
        let tenth = stat.f_blocks * stat.f_frsize / 10;
        let spool = self.estimate(hold);
        let scratch: u64 = match self.options.method {
            Method::Fleece => disks.iter().map(|disk| disk.scratch_limit).sum(),
            Method::Snapshot => 0,
        };
        if free < scratch + spool + tenth {
            return Err(Failure::hinted(
                Kind::NoSpace,
                format!(
                    "{} has {} free; the freeze needs {} for scratches and {} for the residual, and leaves a tenth ({}) free",
                    directory.display(),
                    Bytes(free),
                    Bytes(scratch),
                    Bytes(spool),
                    Bytes(tenth)
                ),
                "name a larger place with `--scratch DIR`, or a smaller limit with `--scratch-reserve`",
            ));
        }
        Ok(())
    }

    /// A scratch that fails would be felt by a guest whose device reports write errors.
    fn refuse_risky(&self, hold: &Hold) -> Result<()> {
        if self.options.method != Method::Fleece || self.options.scratch_reserve.is_some() {
            return Ok(());
        }
        match hold.disks().iter().find(|disk| disk.werror == "report") {
            None => Ok(()),
            Some(disk) => Err(Failure::hinted(
                Kind::Attention,
                format!(
                    "disk `{}` reports write errors to the guest (werror=report), so a full scratch would be its error",
                    disk.key
                ),
                "use `--freeze snapshot`, or accept the risk with a limit of your own, `--scratch-reserve SIZE`",
            )),
        }
    }

    /// The agent, when the guest is to be quiesced and nobody else has it frozen.
    fn agent(&mut self) -> Result<Option<(Agent, PathBuf)>> {
        let wanted = self.options.quiesce;
        let socket = match (&self.options.agent, wanted) {
            (_, Quiesce::Never) | (None, Quiesce::Auto) => return Ok(None),
            (None, Quiesce::Always) => {
                let message = "the guest is to be quiesced, but no agent is named";
                return Err(Failure::hinted(
                    Kind::Usage,
                    message,
                    "name its socket with `--agent SOCKET`",
                ));
            }
            (Some(socket), _) => socket.clone(),
        };
        let deadline = Deadline::after(FROZEN_WAIT);
        loop {
            let status = Agent::connect(&socket).and_then(|mut agent| Ok((agent.status()?, agent)));
            match status {
                Ok((Status::Thawed, agent)) => return Ok(Some((agent, socket))),
                Ok((Status::Frozen, _)) if deadline.passed() => {
                    let message = "the guest's file systems are frozen by somebody else";
                    return Err(Failure::hinted(
                        Kind::Busy,
                        message,
                        "thaw them, or wait for the one who froze them",
                    ));
                }
                Ok((Status::Frozen, _)) => clock::sleep(Duration::from_millis(500)),
                Err(error) if wanted == Quiesce::Auto => {
                    self.warnings.push(format!(
                        "the guest agent does not answer, so the guest is not quiesced: {error}"
                    ));
                    return Ok(None);
                }
                Err(error) => return Err(error).context("the guest agent does not answer"),
            }
        }
    }

    /// The instant itself.
    fn cut(
        &mut self,
        hold: &mut Hold,
        freeze: &Freeze,
        agent: Option<(Agent, PathBuf)>,
    ) -> Result<Cut> {
        let frozen_at = clock::now();
        let mut agent = self.quiesce(agent)?;
        let cut = freeze.transact(&mut hold.monitor);
        let at = clock::utc_now();
        let mut quiesced = false;
        let mut quiesced_ms = None;
        if let Some((agent, socket)) = &mut agent {
            quiesced = cut.is_ok() && agent.status().is_ok_and(|status| status == Status::Frozen);
            let thawed = agent.thaw(QUIESCE).and_then(|_| agent.status());
            if !thawed.is_ok_and(|status| status == Status::Thawed) {
                agent::thaw_until_thawed(socket).context("the guest's file systems stay frozen")?;
            }
            quiesced_ms = Some(millis(clock::now() - frozen_at));
        }
        let took = cut.context("the freeze")?;
        if agent.is_some() && !quiesced {
            let message = "the guest thawed its file systems before the instant";
            if self.options.quiesce == Quiesce::Always {
                return Err(Failure::plain(Kind::Failed, message));
            }
            self.warnings.push(message.to_owned());
        }
        Ok(Cut {
            at,
            freeze_ms: millis(took),
            released_ms: 0,
            quiesced_ms,
            scratch_bytes: 0,
            quiesced,
        })
    }

    fn quiesce(&mut self, agent: Option<(Agent, PathBuf)>) -> Result<Option<(Agent, PathBuf)>> {
        let Some((mut agent, socket)) = agent else {
            return Ok(None);
        };
        match agent.freeze(QUIESCE) {
            Ok(_) => Ok(Some((agent, socket))),
            Err(error) => {
                drop(agent);
                // A freeze that did not answer may be executed yet.
                let thawed = agent::thaw_until_thawed(&socket);
                if self.options.quiesce == Quiesce::Always {
                    return Err(error).context("freeze the guest's file systems");
                }
                self.warnings
                    .push(format!("the guest is not quiesced: {error}"));
                if let Err(error) = thawed {
                    self.warnings.push(format!(
                        "the guest agent does not say that its file systems are thawed: {error}"
                    ));
                }
                Ok(None)
            }
        }
    }

    /// How the overlays' bases look now that they are frozen, for `recover` after a death of QEMU.
    fn journal_overlays(hold: &mut Hold, freeze: &Freeze) -> Result<()> {
        let root = PathBuf::from(format!("/proc/{}/root", hold.monitor.process().pid));
        let overlays = freeze.overlays_in_place(&root);
        let left = hold.journal.left().iter().map(|item| match item {
            Leftover::Overlay(old) => {
                let found = overlays.iter().find(|new| new.node == old.node);
                found.map_or_else(|| item.clone(), |new| Leftover::Overlay(new.clone()))
            }
            other => other.clone(),
        });
        let left = left.collect();
        hold.journal.write(left)?;
        Ok(())
    }

    fn spool_residual(
        &mut self,
        hold: &mut Hold,
        freeze: &Freeze,
        listening: &Listening,
        deadline: Deadline,
        spool: &mut Spool,
    ) -> Result<()> {
        let mut disks = std::mem::take(&mut self.disks);
        let mut result = Ok(());
        let mut clients = Vec::new();
        for (index, disk) in disks.iter_mut().enumerate() {
            let opened = self.open_residual(hold, freeze, listening, index, disk, deadline);
            match opened {
                Ok(client) => clients.push(client),
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let failure = std::cell::RefCell::new(None);
        if result.is_ok() {
            let interrupted = &self.interrupted;
            let reading = Reading {
                block_size: self.repo.block_size(),
                options: self.read_options(),
                permit: &|_| {
                    if deadline.passed()
                        || freeze.filling().is_some()
                        || interrupted.load(Ordering::Relaxed)
                    {
                        ControlFlow::Break(())
                    } else {
                        ControlFlow::Continue(())
                    }
                },
            };
            for (index, (disk, client)) in disks.iter().zip(&mut clients).enumerate() {
                let open = disk
                    .open
                    .as_ref()
                    .map_or_else(|| BlockSet::new(0), Clone::clone);
                let mut give = |piece: crate::copy::Piece| match spool.put(
                    piece.disk,
                    piece.extent,
                    piece.data.as_deref().map(|data| &**data),
                ) {
                    Ok(()) => ControlFlow::Continue(()),
                    Err(error) => {
                        *failure.borrow_mut() = Some(error);
                        ControlFlow::Break(())
                    }
                };
                let ended = reading.read_open(client, index, disk.size, &open, &mut give);
                match ended {
                    Ok(ControlFlow::Continue(())) => {}
                    Ok(ControlFlow::Break(())) => {
                        result = Err(self.why_given_up(freeze, deadline));
                        break;
                    }
                    Err(error) => {
                        result = Err(error)
                            .with_context(|| format!("read the residual of disk `{}`", disk.key));
                        break;
                    }
                }
            }
        }
        self.disks = disks;
        if let Some(error) = failure.into_inner() {
            return Err(error);
        }
        result?;
        for client in clients {
            client.disconnect()?;
        }
        Ok(())
    }

    fn why_given_up(&self, freeze: &Freeze, deadline: Deadline) -> anyhow::Error {
        if let Err(interrupted) = self.check_interrupt() {
            return interrupted;
        }
        if let Some(disk) = freeze.filling() {
            let message = format!("half of the scratch of disk `{}` is used", disk.key);
            return GivenUp(message).into();
        }
        let held = self.options.deadline;
        debug_assert!(deadline.passed());
        GivenUp(format!(
            "the residual was not read within {} s",
            held.as_secs()
        ))
        .into()
    }

    fn open_residual(
        &self,
        hold: &mut Hold,
        freeze: &Freeze,
        listening: &Listening,
        index: usize,
        disk: &mut super::RunDisk,
        deadline: Deadline,
    ) -> Result<crate::nbd::Client> {
        let tracked = self.tracked(&disk.key)?;
        // What was worked out before the freeze holds; the bitmap that ended with it comes on top.
        let bitmaps = match &disk.open {
            Some(_) => tracked
                .needed
                .last()
                .map(|named| (named.epoch, named.name.clone()))
                .into_iter()
                .collect(),
            None => pending_names(&tracked),
        };
        let node = freeze.disks()[index].node.clone();
        let export = Export {
            disk: index,
            node: freeze.frozen_node(index),
            bitmaps: bitmaps
                .iter()
                .map(|(_, name)| (node.clone(), name.clone()))
                .collect(),
        };
        export::add(&mut hold.monitor, &self.run, &export)?;
        let id = export::export_id(&self.run, index);
        let mut endpoint = Endpoint::new(&listening.socket, id)
            .allocation()
            .timeout(self.options.deadline);
        for (_, name) in &bitmaps {
            endpoint = endpoint.bitmap(name);
        }
        let mut client = endpoint.connect()?;
        client.set_deadline(Some(deadline));
        match &mut disk.open {
            None => disk.open = Some(self.load(&tracked, disk, &mut client)?),
            Some(open) => {
                let block_size = self.repo.block_size();
                let whole = crate::units::Extent {
                    offset: 0,
                    length: disk.size,
                };
                for (_, name) in &bitmaps {
                    client.dirty_extents(name, whole, &mut |extent| {
                        open.insert(block_size.cover(extent));
                        ControlFlow::Continue(())
                    })?;
                }
            }
        }
        Ok(client)
    }

    /// A spool is valid only if, after the last reply, every job still runs and the disks are what they were.
    fn check_valid(&self, hold: &mut Hold, freeze: &Freeze, before: &Machine) -> Result<()> {
        if !freeze.still_holds(&mut hold.monitor)? {
            return Err(GivenUp("the block snapshot was ended by somebody else".to_owned()).into());
        }
        let running = |state: &str| {
            matches!(
                state,
                "running" | "io-error" | "paused" | "prelaunch" | "suspended"
            )
        };
        let after = hold.look()?.0.clone();
        for disk in &self.disks {
            let pick = |machine: &Machine| {
                let found = machine
                    .disks
                    .iter()
                    .find(|found| found.key == disk.key)
                    .map(seen);
                found.map(|found| (found.size, chain_under(&found.identity, freeze.method())))
            };
            // It is as the rotation wrote it down that the disk was read, which was a moment before `before`.
            let tracked = self.tracked(&disk.key)?;
            let wanted = chain_under(&tracked.identity, freeze.method());
            if pick(before) != pick(&after) || pick(&after) != Some((tracked.size, wanted)) {
                return Err(GivenUp(format!("disk `{}` changed meanwhile", disk.key)).into());
            }
        }
        if before.disks.len() != after.disks.len() || hold.disks().len() != self.disks.len() {
            return Err(GivenUp("a disk came or went meanwhile".to_owned()).into());
        }
        if running(&before.state) != running(&after.state) {
            return Err(GivenUp(format!(
                "the VM went from `{}` to `{}`",
                before.state, after.state
            ))
            .into());
        }
        Ok(())
    }

    /// The residual of an image of a VM that is off: its lock is held, so it is its own snapshot.
    fn read_offline(&mut self, hold: &mut Hold) -> Result<Residual> {
        let before = hold.look()?.0.clone();
        let rotation = self.intend_freeze(hold)?;
        rotate::Port::add(hold, &rotation.add)?;
        if !rotation.disable.is_empty() {
            rotate::Port::disable(hold, &rotation.disable)?;
        }
        hold.look()?;
        let at = clock::utc_now();
        let begin = clock::now();
        let directory = self.scratch_directory();
        let mut spool = Spool::new(&directory)?;
        let listening = Listening::place(self.vm.state.directory(), &self.run);
        let mut left = vec![listening.leftover()];
        left.extend((0..self.disks.len()).map(|disk| Leftover::Export {
            id: export::export_id(&self.run, disk),
        }));
        hold.journal.write(left)?;
        start_server(&listening, hold)?;
        let disks = self.freeze_disks(hold, &rotation)?;
        let freeze = Freeze::new(Method::Snapshot, self.run.clone(), disks, directory);
        let deadline = Deadline::after(self.options.deadline);
        self.spool_residual(hold, &freeze, &listening, deadline, &mut spool)?;
        hold.release()?;
        let released_ms = millis(clock::now() - begin);
        let instant = Cut {
            at,
            freeze_ms: 0,
            released_ms,
            quiesced_ms: None,
            scratch_bytes: 0,
            quiesced: false,
        };
        Ok(Residual {
            instant,
            spool,
            machine: machine_record(&before),
        })
    }

    /// Counts the guest's writes since the first look, for the size of the scratches.
    pub(super) fn sample_writes(&mut self, hold: &mut Hold) -> Result<()> {
        if self.vm.offline() {
            return Ok(());
        }
        let stats = list::<commands::query_blockstats>(&mut hold.monitor, json!({}))?;
        let writes: u64 = stats
            .iter()
            .filter_map(|device| device.pointer("/stats/wr_operations")?.as_u64())
            .sum();
        if self.writes.is_none() {
            self.writes = Some((clock::now(), writes));
        }
        Ok(())
    }
}

/// A path of QEMU's without regard to its working directory.
fn absolute(hold: &Hold, filename: &str) -> String {
    if filename.starts_with('/') || filename.contains(':') {
        return filename.to_owned();
    }
    let cwd = std::fs::read_link(format!("/proc/{}/cwd", hold.monitor.process().pid));
    cwd.map_or(filename.to_owned(), |cwd| {
        cwd.join(filename).display().to_string()
    })
}

/// With a snapshot in place the disk's node is the overlay; what is under it must be what was.
fn chain_under(identity: &Value, method: Method) -> Value {
    let mut layers = identity.as_array().cloned().unwrap_or_default();
    let ours = |layer: &Value| {
        layer
            .get("filename")
            .and_then(Value::as_str)
            .is_some_and(|name| name.starts_with("/dev/fdset/"))
    };
    if method == Method::Snapshot && layers.len() > 1 && layers.first().is_some_and(ours) {
        layers.remove(0);
    }
    Value::Array(layers)
}

/// What a point keeps of the machine's configuration.
fn machine_record(machine: &Machine) -> Value {
    json!({
        "name": machine.name, "uuid": machine.uuid, "state": machine.state, "qemu": machine.version,
        "left_out": machine.left_out,
        "disks": machine.disks.iter().map(|disk| json!({
            "key": disk.key, "device": disk.device, "chain": disk.chain, "filters": disk.filters,
        })).collect::<Vec<_>>(),
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
