//! NBD exports for the length of a batch or a freeze: the server on a listening socket that we made and passed (so that
//! QEMU needs no right to create one), one read-only export a disk, each with the disabled bitmaps that are to be read.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use qapi::qmp;
use rustix::fs::{Mode, OFlags};
use serde_json::json;

use super::command::{call, call_within};
use super::names::{Part, RunName};
use super::release::Leftover;
use super::{Error, Monitor, REPLY_TIMEOUT, Result};

/// A disk's export to make.
#[derive(Debug, Clone)]
pub struct Export {
    /// The disk's number in this run.
    pub disk: usize,
    /// The node to read.
    pub node: String,
    /// The bitmaps to read with it, each as (the node that has it, its name).
    pub bitmaps: Vec<(String, String)>,
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
    /// The place for a run's socket, in a directory that only we can enter.
    #[must_use]
    pub fn place(directory: &Path, run: &RunName) -> Self {
        let listener = run.part(Part::Listener, 0);
        Self {
            socket: directory.join(format!("{}.nbd", run.run)),
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
        let directory = self.socket.parent().unwrap_or(Path::new("/"));
        let name = self.socket.file_name().unwrap_or_default();
        // A socket's address is at most 107 bytes; the directory's descriptor makes any path short.
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory: OwnedFd = rustix::fs::open(directory, flags, Mode::empty())
            .map_err(|error| io("open the directory of", error.into()))?;
        let short = Path::new("/proc/self/fd")
            .join(directory.as_raw_fd().to_string())
            .join(name);
        // A dead run of the same name cannot be; a stale socket of a failed start can.
        std::fs::remove_file(&short).ok();
        let listener = UnixListener::bind(&short).map_err(|error| io("listen on", error))?;
        let passed = json!({ "fdname": self.listener });
        let taken =
            call_within::<qmp::getfd>(monitor, passed, Some(listener.as_fd()), REPLY_TIMEOUT);
        let address = match taken {
            Ok(_) => json!({ "type": "fd", "data": { "str": self.listener } }),
            // `qemu-storage-daemon` takes no descriptors; ours has our own rights and makes the socket itself.
            Err(Error::Command { class, .. }) if class == "CommandNotFound" => {
                std::fs::remove_file(&short).ok();
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

/// Adds one export.
pub fn add(monitor: &mut dyn Monitor, run: &RunName, export: &Export) -> Result<()> {
    let id = export_id(run, export.disk);
    let bitmaps: Vec<_> = export
        .bitmaps
        .iter()
        .map(|(node, name)| json!({ "node": node, "name": name }))
        .collect();
    let mut arguments = json!({
        "type": "nbd", "id": id, "name": id, "node-name": export.node, "writable": false,
    });
    if !bitmaps.is_empty() {
        arguments["bitmaps"] = bitmaps.into();
    }
    call::<qmp::block_export_add>(monitor, arguments).map(drop)
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
