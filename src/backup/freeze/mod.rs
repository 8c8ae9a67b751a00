//! The freeze and what hangs on it: quiesce, the one transaction, thaw, the residual into the spool, release. The guest is
//! held for as long as this takes, so nothing here hashes, compresses or waits for the repository.

mod offline;
mod quiesce;
mod residual;
mod room;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use serde::Serialize;
use serde_json::{Value, json};

use super::ahead::PREPARE;
use super::configuration::Configuration;
use super::pass::{start_server, while_going};
use super::spool::Spool;
use super::{Quiesce, Runner, is_cut_off, is_lost};
use crate::bitmap::track::Rotation;
use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::guard::Guard;
use crate::hooks::When;
use crate::qmp::agent::Address;
use crate::qmp::export::Listening;
use crate::qmp::freeze::{Freeze, FreezeDisk, Method};
use crate::qmp::machine::Machine;
use crate::qmp::release::{Leftover, Released};
use crate::qmp::{self, Monitor as _};
use crate::settle;
use crate::vm::Hold;

/// What the guard waits beyond the deadline before it ends a hanging run.
const GUARD_GRACE: Duration = Duration::from_secs(5);
/// How long others' block jobs are waited for.
const JOBS_WAIT: Duration = Duration::from_secs(30);
/// What a guard allows for thawing a guest whose agent hangs.
const THAW_GUARD: Duration = Duration::from_secs(150);

/// How the instant came about, and what it cost the guest.
#[derive(Debug, Clone, Serialize)]
pub(in crate::backup) struct Cut {
    /// When.
    #[serde(skip)]
    pub(in crate::backup) at: Timestamp,
    /// The transaction, milliseconds.
    pub(in crate::backup) freeze_ms: u64,
    /// From the transaction to the guest released, milliseconds.
    pub(in crate::backup) released_ms: u64,
    /// How long the guest's file systems were frozen, milliseconds.
    pub(in crate::backup) quiesced_ms: Option<u64>,
    /// How many file systems were frozen, where they were frozen at the instant.
    pub(in crate::backup) file_systems: Option<u64>,
    /// Bytes that the scratches took.
    pub(in crate::backup) scratch_bytes: u64,
    /// Whether the file systems were at rest: still frozen after the transaction, or of a guest that was shut down.
    #[serde(skip)]
    pub(in crate::backup) quiesced: bool,
}

/// The residual of all disks at one instant.
pub(in crate::backup) struct Residual {
    pub(in crate::backup) instant: Cut,
    pub(in crate::backup) spool: Spool,
    pub(in crate::backup) machine: Value,
    /// What of the VM is to be held besides its disks.
    pub(in crate::backup) configuration: Option<Configuration>,
}

/// A freeze that was given up; nothing is lost and another may be tried.
#[derive(Debug, thiserror::Error)]
#[error("the freeze was given up: {0}")]
pub(in crate::backup) struct GivenUp(pub(in crate::backup) String);

/// The guest's file systems could not be frozen, before anything else had happened.
#[derive(Debug, thiserror::Error)]
#[error("the guest is not quiesced: {0}")]
struct NotQuiesced(String);

impl Runner {
    /// Freezes all disks at one instant and brings their residual in.
    pub(in crate::backup) fn freeze(&mut self) -> Result<Residual> {
        let together = self.seat.is_some() && !self.vm.offline();
        match self.try_freeze() {
            Err(error) if together => Err(left_out(error)),
            Err(error)
                if self.options.quiesce == Quiesce::Auto
                    && error.downcast_ref::<NotQuiesced>().is_some() =>
            {
                self.fall_back(&format!("{error:#}"));
                self.options.quiesce = Quiesce::Never;
                self.try_freeze()
            }
            Err(error) if is_lost(&error) || self.domain_ended(&error)? => {
                Err(GivenUp(format!("{error:#}")).into())
            }
            done => done,
        }
    }

    fn try_freeze(&mut self) -> Result<Residual> {
        self.wait_until_due(PREPARE)?;
        let mut hold = self.hold_without_jobs()?;
        hold.may_share_files()?;
        let mut guard = None;
        let mut result = self.freeze_held(&mut hold, &mut guard);
        if let Err(error) = &result {
            // The other targets of a common instant go on at once.
            self.seat = None;
            self.place = None;
            let nodes = |hold: &Hold| -> Vec<(String, String, u64)> {
                let disks = hold.disks().iter();
                disks
                    .map(|disk| (disk.key.clone(), disk.node.clone(), disk.size))
                    .collect()
            };
            let before = nodes(&hold);
            // Whatever was put into the VM comes out; the error that is reported is the first one. An overlay that is not
            // committed in its time stays in the journal: another wait of the same length would be no better.
            if matches!(error.downcast_ref(), Some(qmp::Error::NotConverged { .. })) {
                self.dismiss(guard);
            } else {
                self.release_failed(&mut hold, guard);
            }
            self.end_post_thaw();
            for disk in &mut self.disks {
                disk.open = None;
                disk.unsound = None;
            }
            // What failed may have failed for a disk that has gone, or has another size now.
            if !error.is::<GivenUp>() {
                if hold.look().is_err() {
                    result = result.map_err(while_going);
                } else if nodes(&hold) != before {
                    let why = format!("a disk came, went or was resized: {error:#}");
                    result = Err(GivenUp(why).into());
                }
            }
        }
        self.note_unreadable(result)
    }

    /// Dismisses the guard after the release; one that died before is no harm any more.
    fn dismiss(&mut self, guard: Option<Guard>) {
        if let Some(Err(error)) = guard.map(Guard::dismiss) {
            self.warnings.push(format!(
                "the guard was gone before its dismissal: {error:#}"
            ));
        }
    }

    /// Releases the VM after a freeze that failed. The guard watches until that is done: let go before, it would talk on
    /// the same connection.
    fn release_failed(&mut self, hold: &mut Hold, mut guard: Option<Guard>) {
        let has = |wanted: fn(&Leftover) -> bool| hold.journal.left().iter().any(wanted);
        let quiesced = has(|item| matches!(item, Leftover::Frozen { .. }));
        let allowed = if has(|item| matches!(item, Leftover::Overlay(_) | Leftover::Managed(_))) {
            // Its commit takes as long as it takes.
            guard.as_mut().map(Guard::lift_deadline)
        } else if !quiesced && hold.journal.hook().is_none() {
            None
        } else {
            // A guest whose agent hangs takes longer to thaw than the guard would allow us for the rest, and so may a hook.
            let time = THAW_GUARD + self.options.hooks.timeout;
            guard.as_mut().map(|guard| guard.allow(time))
        };
        if let Some(Err(error)) = allowed {
            tracing::warn!("{error:#}");
        }
        match hold.release() {
            Ok(done) => {
                self.note_resumed(done.removed.iter().any(|what| what == settle::RESUMED));
                for agent in done.unthawed {
                    self.warnings.push(unthawed(&agent));
                }
                self.warnings.extend(done.failed_hooks);
                self.dismiss(guard);
            }
            // Nothing of it is left but files, which the next command on the target removes.
            Err(error) if is_cut_off(&error) => tracing::warn!("{error:#}: the VM ended"),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "the VM could not be released");
                self.warnings.push(format!(
                    "the VM could not be released: {error:#}; run `forerun recover`"
                ));
            }
        }
    }

    fn note_resumed(&mut self, resumed: bool) {
        if resumed {
            self.warnings
                .push("the VM was stopped by a full scratch and was let go on".to_owned());
        }
    }

    /// The target, once no block job of somebody else is on its disks: QEMU takes no second one.
    fn hold_without_jobs(&mut self) -> Result<Hold> {
        let deadline = Deadline::after(JOBS_WAIT);
        loop {
            let hold = self.hold()?;
            let busy = hold
                .disks()
                .iter()
                .find(|disk| !disk.foreign_filters.is_empty())
                .map(|disk| disk.key.clone());
            let Some(disk) = busy else { return Ok(hold) };
            let jobs = hold.foreign_jobs().join("`, `");
            drop(hold);
            if deadline.passed() {
                return Err(Failure::hinted(
                    Kind::Busy,
                    format!("somebody else's block job is on disk `{disk}`: `{jobs}`"),
                    "wait for its end or cancel it, then run the command again",
                ));
            }
            self.pause(Duration::from_millis(250))?;
        }
    }

    fn freeze_held(&mut self, hold: &mut Hold, guard: &mut Option<Guard>) -> Result<Residual> {
        if self.vm.offline() {
            // A VM that is off has no instant to agree on.
            self.seat = None;
            self.wait_prepared()?;
            self.turn_to_freeze(&mut || Ok(()))?;
            let read = self.read_offline(hold);
            self.place = None;
            return read;
        }
        self.refuse_risky(hold)?;
        let directory = self.scratch_directory();
        let was_running = hold.machine_seen()?.state == "running";
        let mut configuration = self.configuration();
        let rotation = self.intend_freeze(hold)?;
        // What the rotation was planned with is what must still be there at the end.
        let before = hold.machine_seen()?.clone();
        let mut disks = self.freeze_disks(hold, &rotation)?;
        self.place_overlays(hold, &mut disks)?;
        let scratches = self.scratches_go_to(hold);
        self.check_space(hold, &disks, &scratches)?;
        let mut freeze = Freeze::new(
            self.options.method,
            self.run.clone(),
            disks,
            scratches,
            self.options.commit_deadline,
            &hold.monitor,
        );
        let listening = Listening::place(&hold.monitor, self.vm.state.directory(), &self.run);
        let mut left = freeze.leftovers();
        left.push(listening.leftover());
        if was_running {
            left.push(Leftover::Running);
        }
        let agent = self.agent(hold)?;
        if let Some((_, address)) = &agent {
            let agent = address.clone();
            left.insert(0, Leftover::Frozen { agent });
        }
        hold.journal.set_hook(self.options.hooks.of(When::PostThaw));
        hold.journal.write(left)?;
        // The server may have to be waited for: that comes before anything that stands in an operator's way.
        start_server(&listening, hold)?;
        freeze.prepare(&mut hold.monitor)?;
        let mut spool = Spool::new(&directory)?;
        let (monitor, journal) = (&hold.monitor, hold.journal.path());
        let time = self.until_the_cut();
        *guard = Some(Guard::start(monitor, journal, &hold.lock, time)?);
        let (mut instant, begin) = self.cut(hold, &freeze, agent, guard)?;
        if let Some(configuration) = &mut configuration {
            configuration.take();
        }
        // The guest has said that it is thawed: no release needs to ask it again.
        let left = hold.journal.left().iter();
        let left = left
            .filter(|item| !matches!(item, Leftover::Frozen { .. }))
            .cloned()
            .collect();
        hold.journal.forget(left);
        let deadline = Deadline::after(self.options.deadline);
        if freeze.method() == Method::Snapshot {
            Self::journal_overlays(hold, &freeze);
        }
        self.spool_residual(hold, &freeze, &listening, deadline, &mut spool)?;
        self.check_valid(hold, &freeze, &before)?;
        if freeze.method() == Method::Snapshot
            && let Some(guard) = guard.as_mut()
        {
            guard.lift_deadline()?;
        }
        instant.scratch_bytes = freeze.scratch_used();
        let mut released = Released::default();
        hold.journal.free_guest(&mut hold.monitor, &mut released)?;
        let freed = clock::now();
        hold.journal
            .release_rest(&mut hold.monitor, &mut released)?;
        // An overlay is the guest's until it is committed; a scratch is gone with its job.
        let freed = match freeze.method() {
            Method::Fleece => freed,
            Method::Snapshot => clock::now(),
        };
        instant.released_ms = instant.freeze_ms + millis(freed - begin);
        self.place = None;
        self.warnings.append(&mut released.slow);
        self.note_resumed(released.resumed);
        self.dismiss(guard.take());
        self.end_post_thaw();
        hold.journal.close()?;
        let machine = machine_record(&before);
        Ok(Residual {
            instant,
            spool,
            machine,
            configuration,
        })
    }

    fn intend_freeze(&mut self, hold: &mut Hold) -> Result<Rotation> {
        let known: Vec<(String, Option<u64>)> = self
            .session
            .state
            .disks
            .values()
            .map(|disk| (disk.key.clone(), disk.whole))
            .collect();
        let rotation = self.rotate(hold, true)?;
        if hold.disks().len() != self.disks.len() {
            return Err(GivenUp("a disk came or went".to_owned()).into());
        }
        // A disk that came into doubt only now is read whole: its open blocks are to be worked out anew, and live where
        // there are many.
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
                if disk.size > super::SMALL {
                    let why = format!("disk `{}` must be read in full first", disk.key);
                    return Err(GivenUp(why).into());
                }
            }
        }
        // The repository is read now, not while the guest is held.
        let lost = self.repo.lost_blocks()?;
        for index in 0..self.disks.len() {
            let tracked = self.tracked(&self.disks[index].key)?;
            let unsound = self
                .session
                .unsound(&tracked, &lost, self.repo.block_size())?;
            if let Some(open) = &mut self.disks[index].open {
                open.union(&unsound);
            } else if unsound.count() * self.repo.block_size().bytes() > crate::backup::SMALL {
                return Err(GivenUp(format!(
                    "{} blocks of disk `{}` are damaged in the repository and must be read again first",
                    unsound.count(),
                    tracked.key
                ))
                .into());
            } else {
                self.disks[index].unsound = Some(unsound);
            }
            if self.disks[index].open.is_none() {
                let (proofs, proved) = self.session.proofs(&tracked, self.repo.block_size())?;
                self.disks[index].proofs = Some(proofs);
                self.disks[index].proved = proved;
            }
        }
        Ok(rotation)
    }

    fn freeze_disks(&self, hold: &mut Hold, rotation: &Rotation) -> Result<Vec<FreezeDisk>> {
        let named = |list: &[(String, String)], key: &str| -> Vec<String> {
            list.iter()
                .filter(|(disk, _)| disk == key)
                .map(|(_, name)| name.clone())
                .collect()
        };
        let writes = if self.vm.offline() {
            0
        } else {
            self.writes_per_second(hold)?
        };
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
                    overlay_directory: PathBuf::new(),
                })
            })
            .collect()
    }

    /// How the overlays' bases look now that they are frozen, for `recover` after a death of QEMU.
    fn journal_overlays(hold: &mut Hold, freeze: &Freeze) {
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
        // On a full file system the guest is freed all the same.
        if let Err(error) = hold.journal.write(left) {
            tracing::warn!(%error, "cannot note how the bases look");
        }
    }
}

/// Why a target has no part in the common instant: a later one of its own is not what was asked for.
fn left_out(error: anyhow::Error) -> anyhow::Error {
    if error.downcast_ref::<GivenUp>().is_none() && error.downcast_ref::<NotQuiesced>().is_none() {
        return error;
    }
    Failure::hinted(
        Kind::Missed,
        format!("left out of the common instant: {error:#}"),
        "run the command again, or back this target up by itself",
    )
}

/// What is said of a guest that may be frozen still.
pub(in crate::backup) fn unthawed(agent: &Address) -> String {
    format!(
        "the guest agent {agent} does not say that the guest's file systems are thawed; every command on this target asks again, and so does `forerun recover`"
    )
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

/// What a point keeps of the machine's configuration.
fn machine_record(machine: &Machine) -> Value {
    json!({
        "name": machine.name, "uuid": machine.uuid, "state": machine.state, "qemu": machine.version,
        "left_out": machine.left_out,
        "disks": machine.disks.iter().map(|disk| json!({
            "key": disk.key, "device": disk.device, "chain": disk.chain, "filters": disk.filters,
            "lazy_refcounts": disk.lazy_refcounts,
        })).collect::<Vec<_>>(),
    })
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
