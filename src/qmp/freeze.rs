//! The freeze: one `transaction` over all disks that puts a block snapshot in place and rotates the bitmaps, in the one
//! order of actions that makes both of the same instant.
//!
//! ```text
//! transaction  [ add e+1 on all disks | snapshot of all disks          | disable e on all disks ]
//!                bitmap actions do      drains the guest's I/O, from      still drained: every write that the
//!                not drain              here to the end                   snapshot holds is in e, later ones in e+1
//! ```
//!
//! A write between the first action and the drain is in both bitmaps, which costs a block and loses nothing. The other
//! order loses writes. When the transaction fails it is rolled back inside its drain and nothing has happened.
//!
//! Two kinds of block snapshot: [`Method::Fleece`], a `blockdev-backup sync=none` job a disk into a scratch file (QEMU
//! docs/interop/live-block-operations, "image fleecing"), and [`Method::Snapshot`], an external snapshot that is
//! committed back at once.
//!
//! A VM's manager takes its own snapshot, in a transaction of its own. The bitmaps are rotated as for a pass right before:
//! what is written between the two is in e+1, so e+1 belongs to the residual, too, and stays the newest bitmap. It costs the
//! next point these blocks again, and loses nothing: the base cannot be written to from the snapshot until the commit, and
//! what the commit writes is recorded in e+1.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use qapi::qmp;
use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::command::{
    action_add_bitmap, action_disable_bitmap, call, call_within, jobs, text, transaction,
};
use super::graph::Graph;
use super::managed::{Managed, Manager, Source};
use super::names::{Part, RunName};
use super::overlay::{FileVersion, Overlay};
use super::release::Leftover;
use super::{Error, Monitor, REPLY_TIMEOUT, Result, export};
use crate::clock::{self, Deadline};

/// How the block snapshot is taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Image fleecing: old data is copied before the guest overwrites it, into a scratch that is thrown away.
    Fleece,
    /// An external snapshot: new data goes to an overlay that is committed back.
    Snapshot,
}

/// A disk to freeze.
#[derive(Debug, Clone)]
pub struct FreezeDisk {
    /// Its number in this run.
    pub index: usize,
    /// Its key, for messages.
    pub key: String,
    /// The node that its bitmaps are on.
    pub node: String,
    /// Its size in bytes.
    pub size: u64,
    /// The image that the node is stored in, as QEMU was told, and its format.
    pub image: (String, String),
    /// The file under the node, as QEMU was told.
    pub file: String,
    /// The driver of that file's node: `file` or `host_device`.
    pub protocol: String,
    /// Whether it is opened with `O_DIRECT`.
    pub direct: bool,
    /// Our bitmaps that still record: they end at this instant.
    pub ending: Vec<String>,
    /// The bitmap that begins.
    pub beginning: String,
    /// Bytes a bit.
    pub granularity: u32,
    /// Whether it is stored in the image.
    pub persistent: bool,
    /// How many bytes its scratch may take.
    pub scratch_limit: u64,
    /// Where an overlay of the VM's manager goes.
    pub overlay_directory: PathBuf,
}

/// A freeze that is set up, and everything of it that is in the VM.
#[derive(Debug)]
pub struct Freeze {
    method: Method,
    run: RunName,
    disks: Vec<FreezeDisk>,
    scratches: Vec<File>,
    directory: PathBuf,
    /// QEMU opens scratches by their paths; they are unlinked as soon as it has.
    by_path: bool,
    commit_deadline: Duration,
    /// Who takes the snapshot, where that is not ours to do.
    manager: Option<Box<dyn Manager>>,
}

impl Freeze {
    /// A freeze of these disks with scratch or overlay files in `directory`; nothing is made yet. `commit_deadline` is how
    /// long an overlay may take to be committed back.
    #[must_use]
    pub fn new(
        method: Method,
        run: RunName,
        disks: Vec<FreezeDisk>,
        directory: PathBuf,
        commit_deadline: Duration,
        monitor: &dyn Monitor,
    ) -> Self {
        Self {
            by_path: method == Method::Fleece && monitor.place().is_some(),
            method,
            run,
            disks,
            scratches: Vec::new(),
            directory,
            commit_deadline,
            manager: match method {
                Method::Fleece => None,
                Method::Snapshot => monitor.manager(),
            },
        }
    }

    /// Whether the VM's manager takes the snapshot. Then the bitmaps that begin with it belong to the residual, too.
    #[must_use]
    pub fn managed(&self) -> bool {
        self.manager.is_some()
    }

    fn file_name(&self, disk: &FreezeDisk, ending: &str) -> String {
        let prefix = super::names::PREFIX;
        format!("{prefix}{}-{}.{ending}", self.run.run, disk.index)
    }

    /// The overlay of a disk, beside its image unless a directory was named: libvirt lets QEMU open it there, and it must
    /// outlive the domain's own directory.
    fn managed_overlay(&self, disk: &FreezeDisk) -> Managed {
        Managed {
            disk: disk.key.clone(),
            file: disk.overlay_directory.join(self.file_name(disk, "overlay")),
            deadline_ms: u64::try_from(self.commit_deadline.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// What must be journalled before [`prepare`](Self::prepare).
    #[must_use]
    pub fn leftovers(&self) -> Vec<Leftover> {
        let mut left = Vec::new();
        for disk in &self.disks {
            let name = |part| self.run.part(part, disk.index);
            if self.managed() {
                left.push(Leftover::Managed(self.managed_overlay(disk)));
                left.extend(export::leftovers(&self.run, disk.index, true));
                continue;
            }
            left.push(Leftover::Job {
                id: name(Part::Create),
            });
            match self.method {
                Method::Fleece => left.push(Leftover::Job {
                    id: name(Part::Job),
                }),
                Method::Snapshot => left.push(Leftover::Overlay(self.overlay(disk))),
            }
            left.extend(export::leftovers(&self.run, disk.index, true));
            left.push(Leftover::Node {
                name: name(Part::Scratch),
            });
            left.push(Leftover::Node {
                name: name(Part::File),
            });
            left.push(Leftover::FdSet {
                id: self.fd_set(disk.index),
            });
            if self.by_path {
                left.push(Leftover::File {
                    path: self.scratch_path(disk),
                });
            }
        }
        left
    }

    fn overlay(&self, disk: &FreezeDisk) -> Overlay {
        let name = |part| self.run.part(part, disk.index);
        Overlay {
            disk: disk.key.clone(),
            base: disk.node.clone(),
            node: name(Part::Scratch),
            job: name(Part::Job),
            file: self.directory.join(self.file_name(disk, "overlay")),
            base_file: disk.image.0.clone(),
            base_version: None,
            committing: false,
            deadline_ms: u64::try_from(self.commit_deadline.as_millis()).unwrap_or(u64::MAX),
        }
    }

    /// A number that no other run's descriptor sets have: 21 bits of the run's random name, then 10 of the disk. QEMU
    /// takes up to 31.
    fn fd_set(&self, index: usize) -> i64 {
        let run = i64::from_str_radix(&self.run.run, 16).unwrap_or(0) & 0x1f_ffff;
        (run << 10) + i64::try_from(index & 0x3ff).unwrap_or(0)
    }

    /// Makes the scratch or overlay of each disk and adds their nodes. The guest does not notice.
    pub fn prepare(&mut self, monitor: &mut dyn Monitor) -> Result<()> {
        if self.managed() {
            return self.disks.iter().try_for_each(|disk| {
                let overlay = self.managed_overlay(disk);
                make_overlay(&overlay.file, disk)
            });
        }
        for index in 0..self.disks.len() {
            let disk = self.disks[index].clone();
            if self.method == Method::Snapshot {
                self.probe_reopen(monitor, &disk)?;
            }
            let file = self.make_file(&disk, monitor)?;
            self.scratches.push(file);
            self.open_in_qemu(monitor, &disk)?;
            let name = |part| self.run.part(part, disk.index);
            let mut options =
                json!({ "driver": "qcow2", "file": name(Part::File), "size": disk.size });
            if self.method == Method::Snapshot {
                options["backing-file"] = disk.image.0.clone().into();
                options["backing-fmt"] = disk.image.1.clone().into();
            }
            Self::format(monitor, &name(Part::Create), &options)?;
            if self.method == Method::Fleece {
                self.reserve(&disk, &self.scratches[self.scratches.len() - 1])?;
            }
            let backing = match self.method {
                Method::Fleece => Value::from(disk.node.clone()),
                Method::Snapshot => Value::Null,
            };
            call::<qmp::blockdev_add>(
                monitor,
                json!({
                    "driver": "qcow2", "node-name": name(Part::Scratch),
                    "file": name(Part::File), "backing": backing,
                    // Rubbish need not reach the disk; an overlay must.
                    "cache": { "no-flush": self.method == Method::Fleece },
                }),
            )?;
        }
        Ok(())
    }

    /// Adds the node of the newest scratch's file: by a passed descriptor, or by a path that is gone right after.
    fn open_in_qemu(&self, monitor: &mut dyn Monitor, disk: &FreezeDisk) -> Result<()> {
        let node = self.run.part(Part::File, disk.index);
        let path = self.scratch_path(disk);
        let filename = if self.by_path {
            path.display().to_string()
        } else {
            let set = self.fd_set(disk.index);
            let passed = json!({ "fdset-id": set, "opaque": node });
            let file = self.scratches.last().map(AsFd::as_fd);
            call_within::<qmp::add_fd>(monitor, passed, file, REPLY_TIMEOUT)?;
            format!("/dev/fdset/{set}")
        };
        call::<qmp::blockdev_add>(
            monitor,
            json!({
                "driver": "file", "node-name": node, "locking": "off", "filename": filename,
                // A scratch is rubbish when the host dies; what a guest has flushed into an overlay is not.
                "cache": { "no-flush": self.method == Method::Fleece },
            }),
        )?;
        if self.by_path {
            std::fs::remove_file(&path).map_err(|source| Error::Io {
                what: format!("unlink {}", path.display()),
                source,
            })?;
        }
        Ok(())
    }

    fn scratch_path(&self, disk: &FreezeDisk) -> PathBuf {
        self.directory.join(self.file_name(disk, "scratch"))
    }

    /// The commit of an overlay makes QEMU open the base's file for writing once more, by its name. Where that fails (a
    /// relative name after `-daemonize`, a file that a QEMU of fewer rights was given by descriptor) the base's bitmaps
    /// stay read-only and every later write of the guest fails. So it is tried beforehand.
    fn probe_reopen(&self, monitor: &mut dyn Monitor, disk: &FreezeDisk) -> Result<()> {
        let node = self.run.part(Part::File, disk.index);
        let mut probe = json!({
            "driver": disk.protocol, "node-name": node, "filename": disk.file, "locking": "off",
        });
        // As the disk has it: a file system may refuse the one and allow the other.
        probe["cache"] = json!({ "direct": disk.direct });
        match call::<qmp::blockdev_add>(monitor, probe) {
            Ok(_) => {
                call::<qmp::blockdev_del>(monitor, json!({ "node-name": node }))?;
                Ok(())
            }
            Err(Error::Command { description, .. }) => Err(Error::CannotReopen {
                disk: disk.key.clone(),
                image: disk.file.clone(),
                why: description,
            }),
            Err(error) => Err(error),
        }
    }

    fn make_file(&self, disk: &FreezeDisk, monitor: &dyn Monitor) -> Result<File> {
        let io = |what: &str, source| Error::Io {
            what: format!(
                "{what} in {} for disk {}",
                self.directory.display(),
                disk.key
            ),
            source,
        };
        if self.method == Method::Snapshot {
            use std::os::unix::fs::OpenOptionsExt;
            return std::fs::OpenOptions::new()
                .read(true)
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(self.overlay(disk).file)
                .map_err(|error| io("create an overlay", error));
        }
        let made = if self.by_path {
            export::file_for_qemu(&self.scratch_path(disk), monitor)
        } else {
            export::unnamed_file(&self.directory)
        };
        let file = made.map_err(|error| io("create a scratch", error))?;
        self.reserve(disk, &file)?;
        Ok(file)
    }

    /// Preallocates a scratch and keeps its size. Formatting truncates it and loses what was preallocated.
    fn reserve(&self, disk: &FreezeDisk, file: &File) -> Result<()> {
        match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, disk.scratch_limit) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(Error::Io {
                what: format!(
                    "preallocate a scratch in {} for disk {}",
                    self.directory.display(),
                    disk.key
                ),
                source: error.into(),
            }),
        }
    }

    fn format(monitor: &mut dyn Monitor, job: &str, options: &Value) -> Result<()> {
        call::<qmp::blockdev_create>(monitor, json!({ "job-id": job, "options": options }))?;
        let deadline = Deadline::after(REPLY_TIMEOUT);
        loop {
            let status = jobs(monitor)?
                .into_iter()
                .find(|found| text(found, "id") == job);
            match status {
                Some(found) if text(&found, "status") == "concluded" => {
                    call::<qmp::job_dismiss>(monitor, json!({ "id": job }))?;
                    return match text(&found, "error") {
                        "" => Ok(()),
                        error => Err(Error::Command {
                            command: "blockdev-create".to_owned(),
                            class: "GenericError".to_owned(),
                            description: error.to_owned(),
                        }),
                    };
                }
                None => return Err(Error::Protocol(format!("job {job} vanished"))),
                Some(_) if deadline.passed() => {
                    let seconds = REPLY_TIMEOUT.as_secs();
                    return Err(Error::Timeout {
                        command: "blockdev-create".to_owned(),
                        seconds,
                    });
                }
                Some(_) => clock::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// What an operator has done since the overlays were made, so that they do not fit any more. On one of the old size the guest's
    /// writes to what came on top would fail, and what was cut off would come back with the commit; and one names in its header what
    /// is under it. A scratch is above its disk, and QEMU refuses all this.
    pub fn unfit(&self, monitor: &mut dyn Monitor) -> Result<Option<String>> {
        if self.method == Method::Fleece {
            return Ok(None);
        }
        let graph = Graph::read(monitor)?;
        for disk in &self.disks {
            let node = graph.node(&disk.node);
            let size = node.and_then(|node| node.pointer("/image/virtual-size")?.as_u64());
            if size.is_some_and(|size| size != disk.size) {
                return Ok(Some(format!("disk `{}` was resized", disk.key)));
            }
            let mut names = graph.names();
            if names.any(|above| graph.backing(above) == Some(disk.node.as_str())) {
                return Ok(Some(format!("disk `{}` got an overlay", disk.key)));
            }
        }
        Ok(None)
    }

    /// The instant: all disks at once, or nothing. Returns how long the transaction took.
    pub fn transact(&self, monitor: &mut dyn Monitor) -> Result<Duration> {
        let mut actions = Vec::new();
        for disk in &self.disks {
            let FreezeDisk {
                node,
                beginning,
                granularity,
                persistent,
                ..
            } = disk;
            actions.push(action_add_bitmap(
                node,
                beginning,
                *granularity,
                *persistent,
            ));
        }
        let disable = self.disks.iter().flat_map(|disk| {
            let ending = disk.ending.iter();
            ending.map(|name| action_disable_bitmap(&disk.node, name))
        });
        let overlays: Vec<Managed> = self
            .disks
            .iter()
            .map(|disk| self.managed_overlay(disk))
            .collect();
        if let Some(manager) = &self.manager {
            // Two commands, never one: see `bitmap::rotate`.
            let disable: Vec<Value> = disable.collect();
            transaction(monitor, &actions)?;
            transaction(monitor, &disable)?;
            let begin = clock::now();
            crate::fault::step("snapshot:before");
            manager.snapshot(&overlays)?;
            crate::fault::step("snapshot:answered");
            return Ok(clock::now() - begin);
        }
        for disk in &self.disks {
            let name = |part| self.run.part(part, disk.index);
            actions.push(match self.method {
                // Never `on-cbw-error=break-snapshot`: the job goes on running then, and the scratch answers with live data
                // where it could not keep the old.
                Method::Fleece => {
                    let data = json!({
                        "job-id": name(Part::Job), "device": disk.node, "target": name(Part::Scratch),
                        "sync": "none", "filter-node-name": name(Part::Filter),
                    });
                    json!({ "type": "blockdev-backup", "data": data })
                }
                Method::Snapshot => json!({ "type": "blockdev-snapshot", "data": {
                    "node": disk.node, "overlay": name(Part::Scratch),
                }}),
            });
        }
        actions.extend(disable);
        let begin = clock::now();
        transaction(monitor, &actions)?;
        Ok(clock::now() - begin)
    }

    /// The node whose data is the snapshot of the `index`-th disk of this freeze.
    #[must_use]
    pub fn frozen_node(&self, index: usize) -> String {
        let disk = &self.disks[index];
        match self.method {
            Method::Fleece => self.run.part(Part::Scratch, disk.index),
            Method::Snapshot => disk.node.clone(),
        }
    }

    /// The disks, in the order that they were given in.
    #[must_use]
    pub fn disks(&self) -> &[FreezeDisk] {
        &self.disks
    }

    /// How.
    #[must_use]
    pub fn method(&self) -> Method {
        self.method
    }

    /// The first disk whose scratch has used more than half of its limit: time to give up.
    #[must_use]
    pub fn filling(&self) -> Option<&FreezeDisk> {
        let pairs = self.disks.iter().zip(&self.scratches);
        pairs
            .filter(|_| self.method == Method::Fleece)
            .find(|(disk, file)| {
                file.metadata()
                    .is_ok_and(|meta| meta.len() > disk.scratch_limit / 2)
            })
            .map(|(disk, _)| disk)
    }

    /// Bytes that the scratches or overlays have taken.
    #[must_use]
    pub fn scratch_used(&self) -> u64 {
        if self.managed() {
            let files = self.disks.iter().map(|disk| self.managed_overlay(disk));
            return files
                .filter_map(|overlay| Some(overlay.file.metadata().ok()?.len()))
                .sum();
        }
        self.scratches
            .iter()
            .filter_map(|file| Some(file.metadata().ok()?.len()))
            .sum()
    }

    /// Whether every fleecing job still runs: only then was what the scratch answered the snapshot. A scratch outlives its
    /// job and goes on answering, with live data.
    pub fn still_holds(&self, monitor: &mut dyn Monitor) -> Result<bool> {
        if let Some(manager) = &self.manager {
            return self.managed_holds(&**manager, monitor);
        }
        if self.method == Method::Snapshot {
            let graph = Graph::read(monitor)?;
            return Ok(self.disks.iter().all(|disk| {
                let overlay = self.run.part(Part::Scratch, disk.index);
                graph.backing(&overlay) == Some(disk.node.as_str()) && graph.has_parents(&overlay)
            }));
        }
        let jobs = jobs(monitor)?;
        Ok(self.disks.iter().all(|disk| {
            let id = self.run.part(Part::Job, disk.index);
            // A job is `paused` for a moment while another change of the graph drains: it holds all the same.
            jobs.iter().any(|job| {
                text(job, "id") == id && matches!(text(job, "status"), "running" | "paused")
            })
        }))
    }

    /// Whether every disk is on our overlay, its base under it, and nobody has begun to commit it.
    fn managed_holds(&self, manager: &dyn Manager, monitor: &mut dyn Monitor) -> Result<bool> {
        for disk in &self.disks {
            let ours = Source::Path(Some(self.managed_overlay(disk).file));
            if manager.sources(&disk.key)?.first() != Some(&ours)
                || manager.job(&disk.key)?.is_some()
            {
                return Ok(false);
            }
        }
        let graph = Graph::read(monitor)?;
        Ok(self.disks.iter().all(|disk| {
            let mut nodes = graph.names();
            nodes.any(|node| {
                graph.backing(node) == Some(disk.node.as_str()) && graph.has_parents(node)
            })
        }))
    }

    /// The overlays with how their bases look now, to be journalled once they are in place.
    #[must_use]
    pub fn overlays_in_place(&self, graph_root: &Path) -> Vec<Overlay> {
        self.disks
            .iter()
            .map(|disk| {
                let mut overlay = self.overlay(disk);
                let path = graph_root.join(overlay.base_file.trim_start_matches('/'));
                overlay.base_version = FileVersion::of(&path);
                overlay
            })
            .collect()
    }
}

/// Makes the file of an overlay. Its header names the image under it, which is not opened.
fn make_overlay(file: &Path, disk: &FreezeDisk) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let io = |source| Error::Io {
        what: format!("create the overlay {} of disk {}", file.display(), disk.key),
        source,
    };
    // For the owner alone, which qemu-img leaves so.
    std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(file)
        .map_err(io)?;
    let (image, format) = &disk.image;
    let format = match format.as_str() {
        // A raw image without a node for its format.
        "file" | "host_device" => "raw",
        format => format,
    };
    let made = Command::new("qemu-img")
        .args([
            "create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", image,
        ])
        .arg(file)
        .arg(disk.size.to_string())
        .stdin(Stdio::null())
        .output()
        .map_err(io)?;
    if made.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&made.stderr).trim().to_owned();
    Err(io(std::io::Error::other(words)))
}
