//! A QEMU process: started, watched, killed and started again from the same command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Disk;
use crate::qmp::Qmp;

pub(super) fn machine_args(dir: &Path, vcpus: u32, memory_mib: u32) -> Vec<String> {
    let socket = |name: &str| format!("unix:{},server=on,wait=off", dir.join(name).display());
    [
        "-machine",
        "q35",
        "-accel",
        "tcg",
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-name",
        "rig",
        "-smp",
        &vcpus.to_string(),
        "-m",
        &memory_mib.to_string(),
        "-qmp",
        &socket("qmp.sock"),
        "-qmp",
        &socket("rig.sock"),
        "-serial",
        "chardev:console",
    ]
    .map(String::from)
    .to_vec()
}

/// A QEMU process and the rig's own monitor of it.
#[derive(Debug)]
pub struct Machine {
    dir: PathBuf,
    binary: PathBuf,
    args: Vec<String>,
    child: Child,
    monitor: Qmp,
    boots: u32,
}

impl Machine {
    pub(super) fn start(dir: PathBuf, binary: PathBuf, args: Vec<String>) -> Result<Self> {
        let (child, monitor) = spawn(&dir, &binary, &args, 1)?;
        Ok(Self {
            dir,
            binary,
            args,
            child,
            monitor,
            boots: 1,
        })
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The monitor socket that is left to the tool under test.
    pub fn qmp_socket(&self) -> PathBuf {
        self.dir.join("qmp.sock")
    }

    /// The rig's own monitor.
    pub fn monitor(&mut self) -> &mut Qmp {
        &mut self.monitor
    }

    /// The process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether QEMU still runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGKILL, as a host would that loses its power.
    pub fn kill9(&mut self) -> Result<()> {
        if self.is_alive() {
            self.child.kill()?;
        }
        self.child.wait()?;
        Ok(())
    }

    /// Ends QEMU in good order, as SIGTERM does: bitmaps are saved.
    pub fn shutdown(&mut self) -> Result<()> {
        if self.is_alive() {
            // QEMU may close the socket before its reply is out.
            let _gone = self.monitor.execute("quit", json!({}));
        }
        self.wait_exit(Duration::from_secs(30))
    }

    /// Waits until QEMU has ended by itself.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        while self.is_alive() {
            if Instant::now() > deadline {
                bail!("QEMU did not end within {timeout:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Starts QEMU again from the same command line.
    pub fn restart(&mut self) -> Result<()> {
        self.kill9()?;
        self.boots += 1;
        (self.child, self.monitor) = spawn(&self.dir, &self.binary, &self.args, self.boots)?;
        Ok(())
    }

    /// The console's log of the present boot.
    pub fn serial_log(&self) -> PathBuf {
        serial_log(&self.dir, self.boots)
    }

    /// What QEMU itself has said.
    pub fn stderr(&self) -> String {
        fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already.
        let _gone = self.child.kill();
        let _gone = self.child.wait();
    }
}

fn serial_log(dir: &Path, boot: u32) -> PathBuf {
    dir.join(format!("serial-{boot}.log"))
}

fn spawn(dir: &Path, binary: &Path, args: &[String], boot: u32) -> Result<(Child, Qmp)> {
    let log = serial_log(dir, boot);
    let console = dir.join("console.sock");
    let chardev = format!(
        "socket,id=console,path={},server=on,wait=off,logfile={}",
        console.display(),
        log.display()
    );
    fs::write(&log, b"")?;
    let stderr = fs::File::options()
        .create(true)
        .append(true)
        .open(dir.join("qemu.log"))?;
    let mut child = Command::new(binary)
        .args(["-chardev", &chardev])
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .with_context(|| format!("start {}", binary.display()))?;
    match Qmp::connect(&dir.join("rig.sock"), Duration::from_secs(30)) {
        Ok(monitor) => Ok((child, monitor)),
        Err(error) => {
            let _gone = child.kill();
            let _gone = child.wait();
            let said = fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
            Err(error.context(format!("QEMU did not start: {said}")))
        }
    }
}

/// A QEMU that runs its firmware only: its disks are there for devices and exports.
pub(crate) fn machine_without_guest(dir: &Path, disks: &[Disk]) -> Result<Machine> {
    fs::create_dir_all(dir)?;
    let mut args = machine_args(dir, 1, 64);
    for disk in disks {
        disk.create(dir)?;
        args.extend(disk.args(dir));
    }
    Machine::start(dir.into(), "qemu-system-x86_64".into(), args)
}
