//! The images of a VM that is off: a private `qemu-storage-daemon` over them for the length of a hold, and what carries a
//! proof from one hold to the next where an image holds no bitmaps.
//!
//! ```text
//! hold 1          bitmaps live in the daemon      nothing holds the image       hold 2
//! [ open, read ]  ------------------------------  [ a VM may start and write ]  [ open: same version? add the same names ]
//! ```
//!
//! A raw image's bitmaps die with the daemon. The file's version (inode, size, times) tells whether anybody wrote in
//! between: if not, bitmaps of the same names are added again, and empty is what they were. A version counts only when
//! its times are [`SETTLED`] old, so that a later write cannot leave it as it is. A device has no version: it can only be
//! read in one hold.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::hoststate::TargetState;
use crate::qmp::Monitor;
use crate::qmp::command::{action_add_bitmap, action_disable_bitmap, transaction};
use crate::qmp::graph::{Bitmap, Disk, Graph};
use crate::qmp::machine::Machine;
use crate::qmp::overlay::FileVersion;
use crate::qmp::socket::QmpSocket;
use crate::spawn;
use crate::target::Image;

/// How long the daemon may take to start.
const START_WAIT: Duration = Duration::from_secs(20);
/// Times younger than this may be those of a later write, too: file systems count in up to 2 s.
const SETTLED: Duration = Duration::from_secs(2);
/// How long an image that somebody just wrote to is waited for.
const SETTLE_WAIT: Duration = Duration::from_secs(10);

/// A private `qemu-storage-daemon` over images. It holds their locks while it lives.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    socket: PathBuf,
    images: Vec<Image>,
}

/// An image's node in the daemon.
fn node(index: usize) -> String {
    format!("forerun-image-{index}")
}

impl Daemon {
    /// Opens images for reading and, for their bitmaps, writing.
    pub(crate) fn open(
        images: &[Image],
        state: &TargetState,
        run: &str,
    ) -> Result<(QmpSocket, Self)> {
        let socket = state.directory().join(format!("{run}.qsd"));
        std::fs::remove_file(&socket).ok();
        // A comma in a value is written twice (QEMU docs, "Options parsing").
        let shown = socket.display().to_string().replace(',', ",,");
        let chardev = format!("socket,id=qmp,server=on,wait=off,path={shown}");
        let mut command = dying_with_us("qemu-storage-daemon");
        command.args(["--chardev", &chardev, "--monitor", "chardev=qmp"]);
        for (index, image) in images.iter().enumerate() {
            for blockdev in blockdevs(index, image)? {
                command.arg("--blockdev").arg(blockdev.to_string());
            }
        }
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        let one_at_a_time = spawn::alone();
        let child = command.spawn();
        drop(one_at_a_time);
        let mut daemon = Self {
            child: child.context("start qemu-storage-daemon")?,
            socket,
            images: images.to_vec(),
        };
        let deadline = Deadline::after(START_WAIT);
        loop {
            match QmpSocket::connect(&daemon.socket) {
                Ok(monitor) => return Ok((monitor, daemon)),
                // The monitor comes up before the images are opened: one that is refused ends the daemon.
                Err(_) if daemon.child.try_wait()?.is_some() => {
                    return Err(refused(images, &mut daemon.child));
                }
                Err(error) if deadline.passed() => return Err(error.into()),
                Err(_) => clock::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// The images as if they were a VM with these disks.
    pub(crate) fn machine(&self, monitor: &mut dyn Monitor) -> Result<Machine> {
        let graph = Graph::read(monitor)?;
        let mut disks = Vec::new();
        for (index, image) in self.images.iter().enumerate() {
            let key = image.key();
            let mut disk = graph
                .disk(&key, &node(index), Vec::new())
                .map_err(|why| Failure::plain(Kind::Attention, why))?;
            disk.qdev = key;
            "image".clone_into(&mut disk.device);
            disks.push(disk);
        }
        disks.sort_by(|a, b| a.key.cmp(&b.key));
        Ok(Machine {
            uuid: None,
            name: None,
            state: "off".to_owned(),
            version: String::new(),
            process: monitor.process().clone(),
            disks,
            left_out: Vec::new(),
            jobs: Vec::new(),
            exports: Vec::new(),
        })
    }
}

/// The nodes of an image: its data, and what holds its lock.
fn blockdevs(index: usize, image: &Image) -> Result<[serde_json::Value; 2]> {
    let path = &image.path;
    let format = match &image.format {
        Some(format) => format.as_str(),
        None => image_format(path)?,
    };
    let device = is_device(path)?;
    if format == "raw" {
        // Not under the image's lock, which keeps the VM from starting.
        settled(path)?;
    }
    let protocol = if device { "host_device" } else { "file" };
    let data = serde_json::json!({
        "driver": format, "node-name": node(index), "read-only": false,
        "file": { "driver": protocol, "filename": path, "locking": "on" },
    });
    // A raw node that nobody uses locks nothing; this one keeps writers out, and is refused where there is one.
    let lock = serde_json::json!({
        "driver": "blkdebug", "node-name": format!("forerun-lock-{index}"), "image": node(index),
        "take-child-perms": ["write"], "unshare-child-perms": ["write"],
    });
    Ok([data, lock])
}

/// Whether an image is a device.
pub(crate) fn is_device(path: &Path) -> Result<bool> {
    let meta =
        std::fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(!meta.is_file())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        // SIGTERM lets it store the bitmaps and close the image.
        if matches!(self.child.try_wait(), Ok(None))
            && rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok()
        {
            self.child.wait().ok();
        }
        std::fs::remove_file(&self.socket).ok();
    }
}

/// A command that gets SIGTERM when we die (prctl(2), `PR_SET_PDEATHSIG`, by setpriv(1) of util-linux): a daemon that
/// outlived us would keep the image's lock, and the VM from starting.
fn dying_with_us(program: &str) -> Command {
    let there = Command::new("setpriv")
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status();
    if !there.is_ok_and(|status| status.success()) {
        return Command::new(program);
    }
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--", program]);
    command
}

fn refused(images: &[Image], child: &mut Child) -> anyhow::Error {
    use std::io::Read;
    let mut words = String::new();
    if let Some(stderr) = &mut child.stderr {
        stderr.read_to_string(&mut words).ok();
    }
    let paths: Vec<String> = images
        .iter()
        .map(|image| image.path.display().to_string())
        .collect();
    let message = format!("cannot open {}: {}", paths.join(", "), words.trim());
    if words.contains("lock") {
        return Failure::hinted(
            Kind::Busy,
            message,
            "a running VM uses the image: name the domain, or the VM by its `qmp:SOCKET`",
        );
    }
    Failure::plain(Kind::Failed, message)
}

/// The format of an image: `qcow2` by its magic (QEMU docs/interop/qcow2, "Header"), else `raw`.
pub(crate) fn image_format(path: &Path) -> Result<&'static str> {
    use std::io::Read;
    let mut magic = [0; 4];
    let mut file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(match file.read_exact(&mut magic) {
        Ok(()) if &magic == b"QFI\xfb" => "qcow2",
        _ => "raw",
    })
}

/// The bitmaps of images that hold none, as they were in the last hold, and the images' versions then.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    images: BTreeMap<String, Kept>,
}

#[derive(Debug, Default)]
struct Kept {
    path: PathBuf,
    version: Option<FileVersion>,
    bitmaps: Vec<Bitmap>,
}

impl Memory {
    /// The begin of a hold: puts the bitmaps of the last one back on a disk when nobody has written since.
    pub(crate) fn resume(
        &mut self,
        disk: &Disk,
        path: &Path,
        monitor: &mut dyn Monitor,
    ) -> Result<()> {
        let kept = self.images.entry(disk.key.clone()).or_default();
        let version = settled(path)?;
        if version.is_none() || version != kept.version || kept.path != path {
            *kept = Kept {
                path: path.to_path_buf(),
                version,
                bitmaps: Vec::new(),
            };
            return Ok(());
        }
        let mut actions = Vec::new();
        for bitmap in &kept.bitmaps {
            actions.push(action_add_bitmap(
                &disk.node,
                &bitmap.name,
                bitmap.granularity,
                false,
            ));
            if !bitmap.recording {
                actions.push(action_disable_bitmap(&disk.node, &bitmap.name));
            }
        }
        transaction(monitor, &actions)?;
        Ok(())
    }

    /// What the bitmaps of these disks are now.
    pub(crate) fn keep(&mut self, disks: &[Disk]) {
        for disk in disks {
            if let Some(kept) = self.images.get_mut(&disk.key) {
                kept.bitmaps.clone_from(&disk.bitmaps);
            }
        }
    }

    /// Whether nobody has written to the images since the hold began.
    pub(crate) fn unchanged(&self) -> bool {
        self.images
            .values()
            .all(|kept| kept.version.is_none() || FileVersion::of(&kept.path) == kept.version)
    }
}

/// The version of an image once its times are old enough to tell; `None` when it has none.
fn settled(path: &Path) -> Result<Option<FileVersion>> {
    let deadline = Deadline::after(SETTLE_WAIT);
    loop {
        let Some(version) = FileVersion::of(path) else {
            return Ok(None);
        };
        let now = clock::utc_now().as_nanosecond();
        let young = |(seconds, nanos): (i64, i64)| {
            let time = i128::from(seconds) * 1_000_000_000 + i128::from(nanos);
            (now - time).unsigned_abs() < SETTLED.as_nanos()
        };
        if !young(version.modified) && !young(version.changed) {
            return Ok(Some(version));
        }
        if deadline.passed() {
            return Err(Failure::hinted(
                Kind::Busy,
                format!("{} is being written to", path.display()),
                "end who writes to it; a running VM is named as a domain or by its `qmp:SOCKET`",
            ));
        }
        clock::sleep(Duration::from_millis(100));
    }
}
