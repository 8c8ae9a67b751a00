//! The residual on its way into the spool, and whether what was read was the snapshot.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use serde_json::Value;

use super::GivenUp;
use crate::backup::connect::{Drained, connect};
use crate::backup::pass::{Unread, pending_names};
use crate::backup::reading::Reading;
use crate::backup::spool::Spool;
use crate::backup::{RunDisk, Runner};
use crate::bitmap::blocks::BlockSet;
use crate::clock::Deadline;
use crate::nbd::{Endpoint, ReadOptions};
use crate::qmp::export::{self, Export, Listening};
use crate::qmp::freeze::{Freeze, Method};
use crate::qmp::machine::Machine;
use crate::qmp::names::PREFIX;
use crate::units::BlockSize;
use crate::vm::{Hold, seen};

impl Runner {
    pub(super) fn spool_residual(
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
                Err(_) if deadline.passed() => {
                    result = Err(self.why_given_up(freeze));
                    break;
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let failure = std::cell::RefCell::new(None);
        // A point is worth more than the rate of the host: by it the residual may take half of its time.
        let patience = Deadline::after(deadline.left() / 2);
        let hurried = AtomicBool::new(false);
        if result.is_ok() {
            let interrupted = &self.interrupted;
            let reading = Reading {
                block_size: self.repo.block_size(),
                options: residual_options(self.repo.block_size()),
                permit: &|bytes| {
                    let keep_on = || {
                        !deadline.passed()
                            && freeze.filling().is_none()
                            && !interrupted.load(Ordering::Relaxed)
                    };
                    if !self.wait_for_rate(bytes, &|| keep_on() && !patience.passed()) {
                        hurried.fetch_or(patience.passed(), Ordering::Relaxed);
                    }
                    if keep_on() {
                        ControlFlow::Continue(())
                    } else {
                        ControlFlow::Break(())
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
                        result = Err(self.why_given_up(freeze));
                        break;
                    }
                    Err(_) if deadline.passed() => {
                        result = Err(self.why_given_up(freeze));
                        break;
                    }
                    Err(error) => {
                        result = Err(error).with_context(|| Unread(disk.key.clone()));
                        break;
                    }
                }
            }
        }
        self.disks = disks;
        if hurried.into_inner() && self.rate_of_all().is_some() {
            self.warnings.push(
                "the residual was too much for `--host-rate` within `--deadline`: its last part was read faster"
                    .to_owned(),
            );
        }
        if let Some(error) = failure.into_inner() {
            return Err(error);
        }
        // A polite end is not waited for while the guest is held; the exports are deleted anyway.
        drop(clients);
        result
    }

    pub(super) fn why_given_up(&self, freeze: &Freeze) -> anyhow::Error {
        if let Err(interrupted) = self.check_interrupt() {
            return interrupted;
        }
        if let Some(disk) = freeze.filling() {
            let message = format!("half of the scratch of disk `{}` is used", disk.key);
            return GivenUp(message).into();
        }
        let held = self.options.deadline;
        GivenUp(format!(
            "the residual was not read within {} s",
            held.as_secs()
        ))
        .into()
    }

    pub(super) fn open_residual(
        &self,
        hold: &mut Hold,
        freeze: &Freeze,
        listening: &Listening,
        index: usize,
        disk: &mut RunDisk,
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
        let frozen = &freeze.disks()[index];
        let node = frozen.node.clone();
        // Of what was written between the rotation and a snapshot of the VM's manager.
        let beginning = freeze.managed().then(|| frozen.beginning.clone());
        let export = Export {
            disk: index,
            node: freeze.frozen_node(index),
            size: frozen.size,
            granularity: frozen.granularity,
            bitmaps: bitmaps
                .iter()
                .map(|(_, name)| name)
                .chain(&beginning)
                .map(|name| (node.clone(), name.clone()))
                .collect(),
        };
        export::add(&mut hold.monitor, &self.run, &export)?;
        let id = export::export_id(&self.run, index);
        let mut endpoint = Endpoint::new(&listening.socket, id)
            .allocation()
            .timeout(self.options.deadline);
        for name in bitmaps.iter().map(|(_, name)| name).chain(&beginning) {
            endpoint = endpoint.bitmap(name);
        }
        let mut client = connect(&mut hold.monitor, &endpoint).map_err(|error| {
            if error.is::<Drained>() {
                GivenUp(error.to_string()).into()
            } else {
                error
            }
        })?;
        client.set_deadline(Some(deadline));
        let (mut open, newest) = match disk.open.take() {
            None => (self.load(&tracked, disk, &mut client)?, Vec::new()),
            Some(open) => (open, bitmaps),
        };
        let block_size = self.repo.block_size();
        let whole = crate::units::Extent {
            offset: 0,
            length: disk.size,
        };
        for name in newest.iter().map(|(_, name)| name).chain(&beginning) {
            client.dirty_extents(name, whole, &mut |extent| {
                open.insert(block_size.cover(extent));
                ControlFlow::Continue(())
            })?;
        }
        disk.open = Some(open);
        Ok(client)
    }

    /// A spool is valid only if, after the last reply, every job still runs and the disks are what they were.
    pub(super) fn check_valid(
        &self,
        hold: &mut Hold,
        freeze: &Freeze,
        before: &Machine,
    ) -> Result<()> {
        if !freeze.still_holds(&mut hold.monitor)? {
            return Err(GivenUp("the block snapshot was ended by somebody else".to_owned()).into());
        }
        let running = |state: &str| {
            matches!(
                state,
                "running" | "io-error" | "paused" | "prelaunch" | "suspended"
            )
        };
        let after = match hold.look() {
            Ok((machine, _)) => machine.clone(),
            Err(error) => {
                return Err(GivenUp(format!("the VM changed meanwhile: {error:#}")).into());
            }
        };
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
}

/// The residual is read as fast as the host's rate allows, if that is fast enough, whatever the pace of passes; but a request of a scratch holds up the guest's
/// writes to its range, so they stay small.
fn residual_options(block_size: BlockSize) -> ReadOptions {
    let request_bytes = (256 << 10).max(u32::from(block_size));
    ReadOptions {
        request_bytes,
        depth: 32,
        spare_buffers: 32,
        holes: false,
    }
}

/// Whether a file is an overlay of ours that a manager was told to make.
fn is_overlay(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    name.starts_with(PREFIX) && name.ends_with(".overlay")
}

/// With a snapshot in place the disk's node is the overlay; what is under it must be what was.
fn chain_under(identity: &Value, method: Method) -> Value {
    let mut layers = identity.as_array().cloned().unwrap_or_default();
    let ours = |layer: &Value| {
        layer
            .get("filename")
            .and_then(Value::as_str)
            .is_some_and(|name| name.starts_with("/dev/fdset/") || is_overlay(name))
    };
    if method == Method::Snapshot && layers.len() > 1 && layers.first().is_some_and(ours) {
        layers.remove(0);
    }
    Value::Array(layers)
}
