//! NBD exports for the length of a batch or a freeze: the server on a listening socket that we made and passed (so that
//! QEMU needs no right to create one; a domain's QEMU makes it in the domain's own directory), one read-only export a disk, each with the disabled bitmaps that are to be read.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use qapi::qmp;
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use super::command::{call, call_within, transaction};
use super::names::{Part, RunName};
use super::release::Leftover;
use super::{Error, Monitor, REPLY_TIMEOUT, Result};
use crate::unix_path::ShortPath;

/// The longest string of the NBD protocol ("Values", string length).
const NBD_NAME_LIMIT: usize = 4096;

/// The unit of a node's length.
const SECTOR: u64 = 512;

/// How the names of our sockets end: `<repository>-<run>.nbd`, short enough for a socket's path.
pub(super) const SOCKET: &str = ".nbd";

/// A disk's export to make.
#[derive(Debug, Clone)]
pub struct Export {
    /// The disk's number in this run.
    pub disk: usize,
    /// The node to read.
    pub node: String,
    /// The bitmaps to read with it, each as (the node that has it, its name). Copies of them are exported, see [`add`].
    pub bitmaps: Vec<(String, String)>,
    /// The node's size in bytes.
    pub size: u64,
    /// Bytes a bit of theirs.
    pub granularity: u32,
}

/// Where a run's NBD server listens.
#[derive(Debug, Clone)]
pub struct Listening {
    /// The socket's path.
    pub socket: PathBuf,
    /// The name that its descriptor is passed under.
    pub listener: String,
}

impl Listening {
    /// The place for a run's socket: where QEMU may make one, else in a directory that only we can enter.
    #[must_use]
    pub fn place(monitor: &dyn Monitor, directory: &Path, run: &RunName) -> Self {
        let directory = monitor.place().unwrap_or(directory);
        let listener = run.part(Part::Listener, 0);
        Self {
            socket: directory.join(format!("{}-{}{SOCKET}", run.repository, run.run)),
            listener,
        }
    }

    /// What must be journalled before [`start`](Self::start).
    #[must_use]
    pub fn leftover(&self) -> Leftover {
        Leftover::Server {
            socket: self.socket.clone(),
            listener: self.listener.clone(),
        }
    }

    /// Starts the VM's NBD server on it. QEMU refuses when it has one running.
    pub fn start(&self, monitor: &mut dyn Monitor) -> Result<()> {
        let io = |what: &str, source| Error::Io {
            what: format!("{what} {}", self.socket.display()),
            source,
        };
        let short =
            ShortPath::of(&self.socket).map_err(|error| io("open the directory of", error))?;
        // A dead run of the same name cannot be; a stale socket of a failed start can.
        std::fs::remove_file(&self.socket).ok();
        if monitor.place().is_some() {
            let address = json!({ "type": "unix", "data": { "path": self.socket } });
            return call::<qmp::nbd_server_start>(monitor, json!({ "addr": address })).map(drop);
        }
        let listener = UnixListener::bind(short.path()).map_err(|error| io("listen on", error))?;
        let passed = json!({ "fdname": self.listener });
        let address =
            match call_within::<qmp::getfd>(monitor, passed, Some(listener.as_fd()), REPLY_TIMEOUT)
            {
                Ok(_) => json!({ "type": "fd", "data": { "str": self.listener } }),
                // `qemu-storage-daemon` takes no descriptors; ours is our own child and may make the socket itself.
                Err(Error::Command { class, .. }) if class == "CommandNotFound" => {
                    std::fs::remove_file(&self.socket).ok();
                    json!({ "type": "unix", "data": { "path": self.socket } })
                }
                Err(error) => return Err(error),
            };
        call::<qmp::nbd_server_start>(monitor, json!({ "addr": address })).map(drop)
    }
}

/// The export's id and the name that an NBD client asks for.
#[must_use]
pub fn export_id(run: &RunName, disk: usize) -> String {
    run.part(Part::Export, disk)
}

/// What must be journalled before [`add`]: the export, and with bitmaps the node that holds what it shows of them.
pub fn leftovers(run: &RunName, disk: usize, bitmaps: bool) -> impl Iterator<Item = Leftover> {
    let export = Leftover::Export {
        id: export_id(run, disk),
    };
    let holder = bitmaps.then(|| Leftover::Node {
        name: run.part(Part::Holder, disk),
    });
    std::iter::once(export).chain(holder)
}

/// Adds one export.
///
/// What it shows of the bitmaps are copies on a node of our own, that no other is above or below. A bitmap in use must be on
/// no node of the guest's: QEMU 10.0.2 ends (`bdrv_release_dirty_bitmap_locked: Assertion !bdrv_dirty_bitmap_busy(bitmap)
/// failed`) when it gives that node's image away, for a save or a migration, or when the node is deleted, by a pivot to a copy
/// or to the image that an overlay was committed to.
pub fn add(monitor: &mut dyn Monitor, run: &RunName, export: &Export) -> Result<()> {
    let id = export_id(run, export.disk);
    let mut arguments = json!({
        "type": "nbd", "id": id, "name": id, "node-name": export.node, "writable": false,
    });
    if !export.bitmaps.is_empty() {
        let holder = run.part(Part::Holder, export.disk);
        // A node's length is in sectors, and bitmaps are merged with those of the same length only.
        let node = json!({
            "driver": "null-co", "node-name": holder,
            "size": export.size.next_multiple_of(SECTOR),
        });
        call::<qmp::blockdev_add>(monitor, node)?;
        let mut copies = Vec::new();
        let mut exported = Vec::new();
        for (node, name) in &export.bitmaps {
            copies.push(json!({ "type": "block-dirty-bitmap-add", "data": {
                "node": holder, "name": name, "granularity": export.granularity, "disabled": true,
            }}));
            copies.push(json!({ "type": "block-dirty-bitmap-merge", "data": {
                "node": holder, "target": name, "bitmaps": [{ "node": node, "name": name }],
            }}));
            exported.push(json!({ "node": holder, "name": name }));
        }
        transaction(monitor, &copies)?;
        arguments["bitmaps"] = exported.into();
    }
    call::<qmp::block_export_add>(monitor, arguments).map(drop)
}

/// Whether the VM's NBD server runs, whoever's it is. There is no query for it: an export under a name that is too long
/// for the protocol is refused either way, and for another reason when there is no server. `None` when the answer is
/// neither of the two that are known.
pub fn server_runs(monitor: &mut dyn Monitor, node: &str) -> Result<Option<bool>> {
    let arguments = json!({
        "type": "nbd", "id": "forerun-probe", "name": "x".repeat(NBD_NAME_LIMIT + 1),
        "node-name": node, "writable": false,
    });
    match call::<qmp::block_export_add>(monitor, arguments) {
        Err(Error::Command { description, .. }) if description.contains("not running") => {
            Ok(Some(false))
        }
        Err(Error::Command { description, .. }) if description.contains("too long") => {
            Ok(Some(true))
        }
        Err(Error::Command { .. }) => Ok(None),
        Err(error) => Err(error),
        Ok(_) => {
            let arguments = json!({ "id": "forerun-probe", "mode": "hard" });
            call::<qmp::block_export_del>(monitor, arguments)?;
            Ok(Some(true))
        }
    }
}

/// Opens a file without a name in a directory, for a scratch or a spool: nothing is left when everybody dies.
pub fn unnamed_file(directory: &Path) -> std::io::Result<File> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(
        directory,
        flags,
        Mode::RUSR | Mode::WUSR,
    )?))
}

/// Makes a file that only QEMU's user can open: the owner of the directory that is QEMU's own.
pub(super) fn file_for_qemu(path: &Path, monitor: &dyn Monitor) -> std::io::Result<File> {
    use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    if let Some(place) = monitor.place() {
        let owner = std::fs::metadata(place)?;
        std::os::unix::fs::fchown(&file, Some(owner.uid()), Some(owner.gid()))?;
    }
    Ok(file)
}
