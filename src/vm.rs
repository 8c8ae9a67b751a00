//! A target in our hands: for the length of a batch or a freeze, under its lock, with its monitor, after whatever a dead
//! run left in it has been taken back.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::bitmap::rotate::Port;
use crate::bitmap::track::Seen;
use crate::clock::{self, Deadline};
use crate::exit::{Failure, Kind};
use crate::hoststate::{Journal, Lock, TargetState};
use crate::qmp::command::{
    action_add_bitmap, action_disable_bitmap, action_remove_bitmap, transaction,
};
use crate::qmp::graph::{self, Disk, Graph, Machine};
use crate::qmp::names::RunName;
use crate::qmp::socket::QmpSocket;
use crate::qmp::{Monitor, Process};
use crate::settle;
use crate::target::{Choice, Chosen, Target, key_without_uuid};

/// How long we wait for another run's batch on the same target.
const LOCK_WAIT: Duration = Duration::from_secs(30);
/// Run states in which the disks are not this QEMU's to read.
const NOT_ITS_OWN: [&str; 3] = ["postmigrate", "inmigrate", "finish-migrate"];

/// A target that was found.
#[derive(Debug, Clone)]
pub struct Vm {
    /// As it was spelled.
    pub target: Target,
    /// What it is known by.
    pub key: String,
    /// This host's state of it.
    pub state: TargetState,
    /// Which of its disks.
    pub choice: Choice,
}

impl Vm {
    /// Finds a target and its key.
    pub fn find(target: &Target, given: Option<&str>, choice: Choice) -> Result<Self> {
        let key = match target {
            Target::Qmp(socket) => {
                let mut monitor = QmpSocket::connect(socket)?;
                match graph::uuid(&mut monitor)? {
                    Some(uuid) => uuid,
                    None => key_without_uuid(socket, given)?,
                }
            }
            Target::Disk(path) => {
                std::fs::metadata(path)
                    .with_context(|| format!("cannot open {}", path.display()))?;
                key_without_uuid(path, given)?
            }
            Target::Name(name) => {
                return Err(Failure::hinted(
                    Kind::Usage,
                    format!("`{name}` is no target that can be reached"),
                    "name it `qmp:SOCKET`, or `disk:PATH` for an image of a VM that is off",
                ));
            }
        };
        let state = TargetState::open(&key)?;
        Ok(Self {
            target: target.clone(),
            key,
            state,
            choice,
        })
    }

    /// Takes the target: lock, monitor, and what a dead run left is taken back.
    pub fn hold(&self, run: &RunName, doing: &str) -> Result<Hold> {
        let lock = self.state.lock_target(doing, LOCK_WAIT)?;
        let (mut monitor, daemon) = match &self.target {
            Target::Qmp(socket) => (QmpSocket::connect(socket)?, None),
            Target::Disk(path) => {
                let (monitor, daemon) = Daemon::open(path, &self.state, &run.run)?;
                (monitor, Some(daemon))
            }
            Target::Name(name) => anyhow::bail!("`{name}` is no target that can be reached"),
        };
        let mut recovered = Vec::new();
        for mut journal in self.state.journals()? {
            recovered.extend(settle::take_back(&mut journal, Some(&mut monitor))?);
        }
        if !recovered.is_empty() {
            tracing::warn!(?recovered, "took back what a dead run left in the VM");
        }
        let journal = self
            .state
            .journal(&run.run, self.monitor_path(), monitor.process());
        Ok(Hold {
            monitor,
            journal,
            lock,
            recovered,
            seen: None,
            choice: self.choice.clone(),
            granularity: 0,
            daemon,
        })
    }

    fn monitor_path(&self) -> &Path {
        match &self.target {
            Target::Qmp(path) | Target::Disk(path) => path,
            Target::Name(_) => Path::new(""),
        }
    }

    /// Whether the VM is off.
    #[must_use]
    pub fn offline(&self) -> bool {
        matches!(self.target, Target::Disk(_))
    }
}

/// A target in our hands. Dropped, the lock and the connection go; what is in the VM is the journal's to take back.
#[derive(Debug)]
pub struct Hold {
    /// The monitor.
    pub monitor: QmpSocket,
    /// What we have in the VM.
    pub journal: Journal,
    /// The target's lock.
    pub lock: Lock,
    /// What was left by dead runs and has been taken back.
    pub recovered: Vec<String>,
    seen: Option<(Machine, Chosen)>,
    choice: Choice,
    /// Bytes a bit of the bitmaps that are added.
    pub granularity: u32,
    daemon: Option<Daemon>,
}

impl Hold {
    /// What the VM is and has, just now.
    pub fn machine(&mut self) -> Result<Machine> {
        match &self.daemon {
            None => Ok(graph::identify(&mut self.monitor)?),
            Some(daemon) => daemon.machine(&mut self.monitor),
        }
    }

    /// Looks at the VM anew and applies the choice of disks.
    pub fn look(&mut self) -> Result<(&Machine, &Chosen)> {
        let machine = self.machine()?;
        if NOT_ITS_OWN.contains(&machine.state.as_str()) {
            return Err(Failure::hinted(
                Kind::Attention,
                format!(
                    "the VM is in state `{}`: its disks are not its own",
                    machine.state
                ),
                "back up the VM at the other end of the migration",
            ));
        }
        let chosen = self.choice.apply(&machine)?;
        let kept = self.seen.insert((machine, chosen));
        Ok((&kept.0, &kept.1))
    }

    /// The VM as it was last seen.
    pub fn machine_seen(&self) -> Result<&Machine> {
        let seen = self.seen.as_ref().map(|(machine, _)| machine);
        seen.context("the VM was not looked at")
    }

    /// The chosen disks as they were last seen.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        self.seen.as_ref().map_or(&[], |(_, chosen)| &chosen.disks)
    }

    /// Takes back all that the journal lists, in the VM and on the file system.
    pub fn release(&mut self) -> Result<()> {
        settle::take_back(&mut self.journal, Some(&mut self.monitor)).map(drop)
    }

    /// A chosen disk by its key.
    pub fn disk(&self, key: &str) -> Result<&Disk> {
        self.disks()
            .iter()
            .find(|disk| disk.key == key)
            .with_context(|| format!("disk `{key}` is no longer there"))
    }

    /// The process that answers: an image's helper changes from batch to batch and says nothing of the VM.
    #[must_use]
    pub fn process(&self) -> Process {
        match self.daemon {
            Some(_) => Process { pid: 0, start: 0 },
            None => self.monitor.process().clone(),
        }
    }

    fn act(
        &mut self,
        bitmaps: &[(String, String)],
        action: impl Fn(&Disk, &str) -> serde_json::Value,
    ) -> Result<()> {
        let actions = bitmaps
            .iter()
            .map(|(key, name)| Ok(action(self.disk(key)?, name)))
            .collect::<Result<Vec<_>>>()?;
        transaction(&mut self.monitor, &actions)?;
        Ok(())
    }
}

/// What a disk was, for later comparison.
#[must_use]
pub fn seen(disk: &Disk) -> Seen {
    Seen {
        key: disk.key.clone(),
        size: disk.size,
        identity: serde_json::to_value(&disk.chain).unwrap_or_default(),
        persistent: disk.transient.is_none(),
        bitmaps: disk.bitmaps.clone(),
    }
}

impl Port for Hold {
    fn seen(&mut self) -> Result<Vec<Seen>> {
        self.look()?;
        Ok(self.disks().iter().map(seen).collect())
    }

    fn add(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        let granularity = self.granularity;
        self.act(bitmaps, |disk, name| {
            action_add_bitmap(&disk.node, name, granularity, disk.transient.is_none())
        })
    }

    fn disable(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        self.act(bitmaps, |disk, name| {
            action_disable_bitmap(&disk.node, name)
        })
    }

    fn remove(&mut self, bitmaps: &[(String, String)]) -> Result<()> {
        self.act(bitmaps, |disk, name| action_remove_bitmap(&disk.node, name))
    }
}

/// A private `qemu-storage-daemon` over an image of a VM that is off. It holds the image's lock while it lives.
#[derive(Debug)]
struct Daemon {
    child: Child,
    socket: PathBuf,
    key: String,
}

/// The image's node in the helper.
const OFFLINE_NODE: &str = "forerun-image";

impl Daemon {
    fn open(path: &Path, state: &TargetState, run: &str) -> Result<(QmpSocket, Self)> {
        let format = image_format(path)?;
        let socket = state.directory().join(format!("{run}.qsd"));
        std::fs::remove_file(&socket).ok();
        let protocol = if std::fs::metadata(path)?.is_file() {
            "file"
        } else {
            "host_device"
        };
        let node = serde_json::json!({
            "driver": format, "node-name": OFFLINE_NODE, "read-only": false,
            "file": { "driver": protocol, "filename": path, "locking": "on" },
        });
        let chardev = format!("socket,id=qmp,server=on,wait=off,path={}", socket.display());
        let mut command = Command::new("qemu-storage-daemon");
        command
            .args([
                "--chardev",
                &chardev.replace(",,", ","),
                "--monitor",
                "chardev=qmp",
            ])
            .arg("--blockdev")
            .arg(node.to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0);
        let mut child = command.spawn().context("start qemu-storage-daemon")?;
        let deadline = Deadline::after(Duration::from_secs(20));
        while !socket.exists() {
            if child.try_wait()?.is_some() {
                return Err(refused_image(path, child));
            }
            anyhow::ensure!(!deadline.passed(), "qemu-storage-daemon does not start");
            clock::sleep(Duration::from_millis(2));
        }
        let key = path
            .file_stem()
            .map_or_else(|| "disk".into(), |stem| stem.to_string_lossy());
        let daemon = Self {
            child,
            socket,
            key: key.into_owned(),
        };
        let monitor = QmpSocket::connect(&daemon.socket)?;
        Ok((monitor, daemon))
    }

    fn machine(&self, monitor: &mut QmpSocket) -> Result<Machine> {
        let graph = Graph::read(monitor)?;
        let mut disk = graph
            .disk(&self.key, OFFLINE_NODE, Vec::new())
            .map_err(|why| Failure::plain(Kind::Attention, why))?;
        disk.qdev.clone_from(&self.key);
        "image".clone_into(&mut disk.device);
        Ok(Machine {
            uuid: None,
            name: None,
            state: "off".to_owned(),
            version: String::new(),
            process: monitor.process().clone(),
            disks: vec![disk],
            left_out: Vec::new(),
            jobs: Vec::new(),
            exports: Vec::new(),
        })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        // SIGTERM lets it store the bitmaps and close the image.
        if rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok() {
            self.child.wait().ok();
        }
        std::fs::remove_file(&self.socket).ok();
    }
}

fn refused_image(path: &Path, child: Child) -> anyhow::Error {
    let output = child
        .wait_with_output()
        .map(|out| out.stderr)
        .unwrap_or_default();
    let words = String::from_utf8_lossy(&output).trim().to_owned();
    let message = format!("cannot open {}: {words}", path.display());
    if words.contains("lock") {
        return Failure::hinted(
            Kind::Busy,
            message,
            "a running VM uses the image: name the VM by its `qmp:SOCKET`",
        );
    }
    Failure::plain(Kind::Failed, message)
}

/// The format of an image: `qcow2` by its magic (QEMU docs/interop/qcow2, "Header"), else `raw`.
fn image_format(path: &Path) -> Result<&'static str> {
    use std::io::Read;
    let mut magic = [0; 4];
    let mut file =
        std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(match file.read_exact(&mut magic) {
        Ok(()) if &magic == b"QFI\xfb" => "qcow2",
        _ => "raw",
    })
}
