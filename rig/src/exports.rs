//! A QEMU without a guest system, whose disks are written from the host over writable NBD exports.
//!
//! The disks have devices, so that `query-block` shows them, with `share-rw=on`, since a device otherwise keeps all other
//! writers off its node. The firmware runs: it brings the devices up, and only then does a node move into its device's
//! iothread. An export in an iothread is made with `fixed-iothread`; without it a node could leave the iothread again, and
//! QEMU 10.0 aborts when a backup job starts on such a node.

use std::io;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use crate::block::BlockDevice;
use crate::guest::{Disk, Machine, machine_without_guest};
use crate::nbd::Nbd;

/// A write that takes longer than this is a failure of the rig.
const WRITE: Duration = Duration::from_secs(120);
/// How long the firmware may take to bring the devices up.
const FIRMWARE: Duration = Duration::from_secs(60);

/// A QEMU and its exports, named as the disks.
#[derive(Debug)]
pub struct NbdRig {
    machine: Machine,
    disks: Vec<Disk>,
}

impl NbdRig {
    /// Starts it in a directory.
    pub fn start(dir: &Path, disks: Vec<Disk>) -> Result<Self> {
        let disks: Vec<Disk> = disks
            .into_iter()
            .map(|disk| disk.device_property("share-rw", json!(true)))
            .collect();
        let machine = machine_without_guest(dir, &disks)?;
        let mut rig = Self { machine, disks };
        let socket = rig.nbd_socket().display().to_string();
        let address = json!({"type": "unix", "data": {"path": socket}});
        rig.machine.monitor().execute(
            "nbd-server-start",
            json!({"addr": address, "max-connections": 0}),
        )?;
        for disk in rig.disks.clone() {
            rig.export(&disk)?;
        }
        Ok(rig)
    }

    fn export(&mut self, disk: &Disk) -> Result<()> {
        let mut export = json!({
            "type": "nbd", "id": format!("rig-write-{}", disk.id()), "name": disk.id(),
            "node-name": disk.node_name(), "writable": true,
        });
        if let Some(iothread) = disk.iothread_name() {
            export["iothread"] = json!(iothread);
            export["fixed-iothread"] = json!(true);
        }
        let deadline = Instant::now() + FIRMWARE;
        loop {
            match self
                .machine
                .monitor()
                .execute("block-export-add", export.clone())
            {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(error) if format!("{error:#}").contains("iothread") => {
                    std::thread::sleep(Duration::from_millis(50));
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// The socket of the NBD server.
    pub fn nbd_socket(&self) -> PathBuf {
        self.machine.dir().join("nbd.sock")
    }

    /// Its disks.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The process and its monitor.
    pub fn into_machine(self) -> Machine {
        self.machine
    }
}

impl Deref for NbdRig {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl DerefMut for NbdRig {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

/// A writable connection to an export.
pub fn connect(socket: &Path, export: &str) -> io::Result<Box<dyn BlockDevice>> {
    Ok(Box::new(Nbd::connect(socket, export, &[], WRITE)?))
}
