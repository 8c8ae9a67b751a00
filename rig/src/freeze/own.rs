//! Freezes by the rig's own monitor commands, so that the wrong order of actions can be shown as well as the right one.
//!
//! Bitmap `e` is live. A point is
//!
//! ```text
//! maybe  add e+1 on all; disable e on all (two commands); read half of e's blocks from the live disks, the rest stays pending
//! freeze transaction [add e+1 on all, snapshot of all, disable e on all]       (or the wrong order)
//! read   e and what is pending, from the scratch or the frozen base, into the mirror
//! release cancel the jobs, or commit and pivot; remove the old bitmaps
//! ```
//!
//! The mirror is the pair of images that is checked. Bitmaps are never cleared: each one has a new name.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::stage::Stage;
use super::{Cell, Freezer, Method, Order, Point};
use crate::guest::Disk;
use crate::nbd::{Extent, Nbd};
use crate::qmp::Qmp;

/// The size of a block in bitmaps and in the residual.
const BLOCK: u64 = 65536;
/// The residual must be read within this time, or the point is given up.
const DEADLINE: Duration = Duration::from_secs(10);
/// Jobs and exports must end within this time.
const END: Duration = Duration::from_secs(120);
/// Reads in flight.
const DEPTH: usize = 8;
/// Writes a second of each host writer while an overlay is committed.
const COMMIT_RATE: u32 = 300;

pub(super) struct ByRig {
    method: Method,
    order: Order,
    disks: Vec<Disk>,
    socket: PathBuf,
    rate: u32,
    mirror: [Vec<u8>; 2],
    /// Blocks that are not safe, whatever the live bitmap says; all of them at first.
    pending: [Vec<bool>; 2],
    epoch: u64,
}

impl ByRig {
    pub(super) fn new(stage: &mut Stage, cell: &Cell) -> Result<Self> {
        let (socket, started) = stage.nbd_socket();
        let disks = stage.disks.clone();
        let qmp = stage.machine().monitor();
        if !started {
            let address = json!({"type": "unix", "data": {"path": socket.display().to_string()}});
            qmp.execute(
                "nbd-server-start",
                json!({"addr": address, "max-connections": 0}),
            )?;
        }
        let size = usize::try_from(cell.disk_size)?;
        let blocks = usize::try_from(cell.disk_size.div_ceil(BLOCK))?;
        let (mirror, pending) = (
            [vec![0; size], vec![0; size]],
            [vec![true; blocks], vec![true; blocks]],
        );
        let (method, order, rate) = (cell.method, cell.order, cell.rate);
        let freezer = Self {
            method,
            order,
            disks,
            socket,
            rate,
            mirror,
            pending,
            epoch: 0,
        };
        qmp.transaction(freezer.add_bitmaps(0))?;
        Ok(freezer)
    }

    fn add_bitmaps(&self, epoch: u64) -> Vec<(&'static str, Value)> {
        let add = |disk: &Disk| {
            let bitmap =
                json!({"node": disk.node_name(), "name": bitmap(epoch), "granularity": BLOCK});
            ("block-dirty-bitmap-add", bitmap)
        };
        self.disks.iter().map(add).collect()
    }

    fn disable_bitmaps(&self, epoch: u64) -> Vec<(&'static str, Value)> {
        let disable = |disk: &Disk| {
            (
                "block-dirty-bitmap-disable",
                json!({"node": disk.node_name(), "name": bitmap(epoch)}),
            )
        };
        self.disks.iter().map(disable).collect()
    }

    fn remove_bitmaps(&self, qmp: &mut Qmp, epoch: u64) -> Result<()> {
        for disk in &self.disks {
            let bitmap = json!({"node": disk.node_name(), "name": bitmap(epoch)});
            qmp.execute("block-dirty-bitmap-remove", bitmap)?;
        }
        Ok(())
    }

    /// Exports a node with the bitmap of an epoch, reads what `choose` picks into the mirror, and ends the export again.
    /// The bitmap's blocks are pending from here on, those that were read are not.
    fn copy(
        &mut self,
        qmp: &mut Qmp,
        which: usize,
        node: &str,
        epoch: u64,
        choose: &dyn Fn(usize) -> bool,
    ) -> Result<Option<u64>> {
        let disk = &self.disks[which];
        let export = format!("rig-read-{}", disk.id());
        qmp.execute(
            "block-export-add",
            json!({
                "type": "nbd", "id": export, "name": export, "node-name": node,
                "bitmaps": [{"node": disk.node_name(), "name": bitmap(epoch)}],
            }),
        )?;
        let copied = self.read(which, &export, epoch, choose);
        end_export(qmp, &export)?;
        match copied {
            Err(error) if is_timeout(&error) => Ok(None),
            other => other,
        }
    }

    /// `None` when the server did not answer within the deadline.
    fn read(
        &mut self,
        which: usize,
        export: &str,
        epoch: u64,
        choose: &dyn Fn(usize) -> bool,
    ) -> Result<Option<u64>> {
        let context = format!("qemu:dirty-bitmap:{}", bitmap(epoch));
        let mut nbd = Nbd::connect(&self.socket, export, &[&context], DEADLINE)?;
        let pending = &mut self.pending[which];
        for (extent, flags) in nbd.block_status()?.concat() {
            if flags & 1 != 0 {
                let (first, last) = (
                    extent.offset / BLOCK,
                    (extent.offset + extent.len).div_ceil(BLOCK),
                );
                pending[usize::try_from(first)?..usize::try_from(last)?].fill(true);
            }
        }
        let chosen: Vec<usize> = (0..pending.len())
            .filter(|block| pending[*block] && choose(*block))
            .collect();
        let extents = extents(&chosen);
        let mirror = &mut self.mirror[which];
        let mut copied = 0;
        let started = Instant::now();
        nbd.read_extents(&extents, DEPTH, &mut |offset, data| {
            let start = usize::try_from(offset).unwrap_or(usize::MAX);
            mirror[start..start + data.len()].copy_from_slice(data);
            copied += data.len() as u64;
        })?;
        if started.elapsed() > DEADLINE {
            return Ok(None);
        }
        for block in chosen {
            pending[block] = false;
        }
        Ok(Some(copied))
    }

    /// Copies half of what is dirty from the live disks.
    fn live_pass(&mut self, qmp: &mut Qmp, number: u32) -> Result<()> {
        let old = self.epoch;
        self.epoch += 1;
        qmp.transaction(self.add_bitmaps(self.epoch))?;
        qmp.transaction(self.disable_bitmaps(old))?;
        let odd = number as usize / 2 % 2;
        for which in 0..self.disks.len() {
            let node = self.disks[which].node_name();
            self.copy(qmp, which, &node, old, &|block| block % 2 == odd)?;
        }
        self.remove_bitmaps(qmp, old)
    }

    fn freeze_actions(
        &self,
        snapshots: Vec<(&'static str, Value)>,
        old: u64,
    ) -> Vec<(&'static str, Value)> {
        let mut actions = self.add_bitmaps(old + 1);
        match self.order {
            Order::Right => {
                actions.extend(snapshots);
                actions.extend(self.disable_bitmaps(old));
            }
            Order::Wrong => {
                actions.extend(self.disable_bitmaps(old));
                actions.extend(snapshots);
            }
        }
        actions
    }

    /// Adds an empty qcow2 image over each disk; `backing` says whether its node is its backing from the start.
    fn add_images(
        &self,
        qmp: &mut Qmp,
        stage_dir: &std::path::Path,
        number: u32,
        backing: bool,
    ) -> Result<()> {
        for disk in &self.disks {
            let template = stage_dir.join("empty.qcow2");
            if !template.exists() {
                let mut create = std::process::Command::new("qemu-img");
                create
                    .args(["create", "-q", "-f", "qcow2"])
                    .arg(&template)
                    .arg(disk.size().to_string());
                if !create.status()?.success() {
                    bail!("no {}", template.display());
                }
            }
            let path = stage_dir.join(format!("{}-{number}.over", disk.id()));
            std::fs::copy(&template, &path)?;
            // Closing a scratch would flush it: seconds of a busy disk for data that nobody wants.
            let cache = json!({"direct": false, "no-flush": backing});
            let file =
                json!({"driver": "file", "filename": path.display().to_string(), "cache": cache});
            let backing = if backing {
                json!(disk.node_name())
            } else {
                Value::Null
            };
            let node = json!({
                "driver": "qcow2", "node-name": over(disk), "file": file, "backing": backing, "cache": cache,
            });
            qmp.execute("blockdev-add", node)?;
            // QEMU has it open: nothing is left behind whatever happens.
            std::fs::remove_file(&path)?;
        }
        Ok(())
    }

    fn remove_images(&self, qmp: &mut Qmp) -> Result<()> {
        for disk in &self.disks {
            qmp.execute("blockdev-del", json!({"node-name": over(disk)}))?;
        }
        Ok(())
    }

    fn snapshot_actions(&self) -> Vec<(&'static str, Value)> {
        let action = |disk: &Disk| match self.method {
            Method::Fleece => {
                let target = json!({
                    "job-id": job(disk), "device": disk.node_name(), "target": over(disk), "sync": "none",
                });
                ("blockdev-backup", target)
            }
            Method::Snapshot => (
                "blockdev-snapshot",
                json!({"node": disk.node_name(), "overlay": over(disk)}),
            ),
        };
        self.disks.iter().map(action).collect()
    }

    /// Reads everything that is not safe from the frozen nodes.
    fn residual(&mut self, qmp: &mut Qmp, old: u64) -> Result<Option<u64>> {
        let mut residual = Some(0);
        for which in 0..self.disks.len() {
            let disk = &self.disks[which];
            let node = match self.method {
                Method::Fleece => over(disk),
                Method::Snapshot => disk.node_name(),
            };
            let copied = self.copy(qmp, which, &node, old, &|_| true)?;
            residual = residual.zip(copied).map(|(sum, copied)| sum + copied);
        }
        Ok(residual)
    }

    fn release(&self, qmp: &mut Qmp) -> Result<()> {
        for disk in &self.disks {
            match self.method {
                Method::Fleece => {
                    qmp.execute("block-job-cancel", json!({"device": job(disk)}))?;
                    await_end(qmp, &job(disk), "BLOCK_JOB_CANCELLED")?;
                }
                Method::Snapshot => {
                    let top = json!({"job-id": job(disk), "device": over(disk)});
                    qmp.execute("block-commit", top)?;
                    await_end(qmp, &job(disk), "BLOCK_JOB_READY")?;
                    qmp.execute("job-complete", json!({"id": job(disk)}))?;
                    await_end(qmp, &job(disk), "BLOCK_JOB_COMPLETED")?;
                }
            }
        }
        Ok(())
    }

    fn jobs_run(&self, qmp: &mut Qmp) -> Result<bool> {
        let jobs = qmp.execute("query-jobs", json!({}))?;
        // A drain elsewhere in QEMU pauses a job for a moment; it is there and copies before writes all the same.
        let is_there = |found: &Value| {
            ["running", "paused"]
                .iter()
                .any(|status| found["status"] == json!(status))
        };
        let runs = |disk: &Disk| {
            let mut jobs = jobs.as_array().into_iter().flatten();
            jobs.any(|found| found["id"] == json!(job(disk)) && is_there(found))
        };
        Ok(self.method == Method::Snapshot || self.disks.iter().all(runs))
    }
}

impl Freezer for ByRig {
    fn point(&mut self, stage: &mut Stage, number: u32) -> Result<Option<Point>> {
        if number % 2 == 1 {
            self.live_pass(stage.machine().monitor(), number)?;
        }
        let dir = stage.dir().to_owned();
        self.add_images(
            stage.machine().monitor(),
            &dir,
            number,
            self.method == Method::Fleece,
        )?;
        let old = self.epoch;
        self.epoch += 1;
        let actions = self.freeze_actions(self.snapshot_actions(), old);
        let completed = stage.completed();
        let started = Instant::now();
        stage.machine().monitor().transaction(actions)?;
        let transaction = started.elapsed();
        let bounds = stage.bounds(completed);
        let qmp = stage.machine().monitor();
        let residual = self.residual(qmp, old)?;
        if !self.jobs_run(qmp)? {
            bail!(
                "a job ended by itself: {}",
                qmp.execute("query-jobs", json!({}))?
            );
        }
        if self.method == Method::Snapshot {
            stage.set_rate(COMMIT_RATE);
        }
        self.release(stage.machine().monitor())?;
        let released = started.elapsed();
        stage.set_rate(self.rate);
        let qmp = stage.machine().monitor();
        self.remove_images(qmp)?;
        self.remove_bitmaps(qmp, old)?;
        qmp.take_events();
        let images = self.mirror.clone();
        Ok(residual.map(|residual| Point {
            images,
            transaction,
            released,
            residual,
            bounds,
        }))
    }
}

fn is_timeout(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<std::io::Error>();
    error.is_some_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
}

fn bitmap(epoch: u64) -> String {
    format!("rig-{epoch}")
}

fn over(disk: &Disk) -> String {
    format!("rig-over-{}", disk.id())
}

fn job(disk: &Disk) -> String {
    format!("rig-job-{}", disk.id())
}

/// Runs of blocks as ranges of bytes.
fn extents(blocks: &[usize]) -> Vec<Extent> {
    let mut extents: Vec<Extent> = Vec::new();
    for block in blocks {
        let offset = *block as u64 * BLOCK;
        match extents.last_mut() {
            Some(last) if last.offset + last.len == offset => last.len += BLOCK,
            _ => extents.push(Extent { offset, len: BLOCK }),
        }
    }
    extents
}

/// QEMU may not have seen our disconnect yet, and the deletion completes after its reply.
fn end_export(qmp: &mut Qmp, export: &str) -> Result<()> {
    let deadline = Instant::now() + END;
    let mut mode = "safe";
    while let Err(error) = qmp.execute("block-export-del", json!({"id": export, "mode": mode})) {
        if Instant::now() > deadline {
            return Err(error);
        }
        if Instant::now() + END / 2 > deadline {
            mode = "hard";
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    let deleted = |event: &Value| {
        event["event"] == json!("BLOCK_EXPORT_DELETED") && event["data"]["id"] == json!(export)
    };
    qmp.wait_event(&deleted, END).map(drop)
}

/// Waits for an event of a job; another end than the expected one is a failure.
fn await_end(qmp: &mut Qmp, job: &str, expected: &str) -> Result<()> {
    let ends = [
        "BLOCK_JOB_CANCELLED",
        "BLOCK_JOB_COMPLETED",
        "BLOCK_JOB_READY",
    ];
    let of_job = |event: &Value| {
        event["data"]["device"] == json!(job) && ends.iter().any(|end| event["event"] == json!(end))
    };
    let event = qmp
        .wait_event(&of_job, END)
        .with_context(|| format!("wait for {expected} of {job}"))?;
    if event["event"] != json!(expected) || event["data"].get("error").is_some() {
        bail!("{expected} of {job} expected: {event}");
    }
    Ok(())
}
