//! A guest under QEMU: Debian's cloud kernel, a busybox initramfs with the rig's programs, disks as the test wants them.
//!
//! Always TCG. In its directory a guest has the monitor socket of the tool under test (`qmp.sock`), another one that
//! belongs to the rig, the serial console as a log and as a socket for shell commands, and on demand a real guest agent.
//! A [`Guest`] that is dropped kills its QEMU.

mod cpio;
mod disk;
mod domain;
mod initramfs;
mod kernel;
mod libvirtd;
mod machine;
mod system;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};

pub use disk::{Bus, Disk, Format};
pub use domain::Domain;
pub use kernel::cache_dir;
pub use libvirtd::Libvirtd;
pub use machine::Machine;
use machine::machine_args;
pub(crate) use machine::machine_without_guest;
pub use system::SystemFile;

/// How long a boot may take; a starved machine is slow.
const BOOT: Duration = Duration::from_secs(240);
/// What the init prints when modules, ports and mounts are there.
const UP: &str = "GUEST-UP";

/// What runs in the guest once it is up. Programs run in the background: the console stays free for [`Guest::sh`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// Nothing.
    Idle,
    /// `rig-guest stamp` with these words, devices included.
    Stamp(String),
    /// `rig-guest vclock` with these words, devices included.
    Vclock(String),
    /// Any busybox shell script.
    Script(String),
}

impl Program {
    fn script(&self) -> String {
        match self {
            Self::Idle => String::new(),
            Self::Stamp(words) => format!("rig-guest stamp {words}\n"),
            Self::Vclock(words) => format!("rig-guest vclock {words}\n"),
            Self::Script(script) => format!("{script}\n"),
        }
    }
}

/// What a guest is made of.
#[derive(Debug, Clone)]
pub struct Builder {
    dir: PathBuf,
    vcpus: u32,
    memory_mib: u32,
    disks: Vec<Disk>,
    program: Program,
    agent: bool,
    system: Option<Vec<SystemFile>>,
    mounts: Vec<(String, String)>,
    uuid: Option<String>,
    extra: Vec<String>,
    binary: PathBuf,
    uefi: bool,
    tpm: bool,
    devices: String,
    mac: Option<String>,
    tree: Option<PathBuf>,
}

impl Builder {
    /// Puts the files of a directory into the root of the guest. Of a domain, kernel and initramfs then go to QEMU past
    /// libvirt: tools would save something so large with the VM, time and again.
    #[must_use]
    pub fn tree(mut self, root: &Path) -> Self {
        self.tree = Some(root.into());
        self
    }

    /// Of a domain: with UEFI firmware and variables of its own.
    #[must_use]
    pub fn uefi(mut self) -> Self {
        self.uefi = true;
        self
    }

    /// Of a domain: with an emulated TPM.
    #[must_use]
    pub fn tpm(mut self) -> Self {
        self.tpm = true;
        self
    }

    /// Of a domain: with these elements of libvirt's `<devices>`, too.
    #[must_use]
    pub fn devices(mut self, xml: &str) -> Self {
        self.devices.push_str(xml);
        self
    }

    /// Of a domain: with a network interface of this address.
    #[must_use]
    pub fn interface(mut self, mac: &str) -> Self {
        self.mac = Some(mac.into());
        self
    }

    /// Virtual CPUs, 1 unless set.
    #[must_use]
    pub fn vcpus(mut self, vcpus: u32) -> Self {
        self.vcpus = vcpus;
        self
    }

    /// Memory, 192 MiB unless set.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Adds a disk; in the guest they are `/dev/vda`, `/dev/vdb`... in this order.
    #[must_use]
    pub fn disk(mut self, disk: Disk) -> Self {
        self.disks.push(disk);
        self
    }

    /// What runs in it.
    #[must_use]
    pub fn program(mut self, program: Program) -> Self {
        self.program = program;
        self
    }

    /// Runs Debian's `qemu-ga` in the guest; its socket is [`Guest::agent_socket`].
    #[must_use]
    pub fn agent(mut self, agent: bool) -> Self {
        self.agent = agent;
        self
    }

    /// Mounts an ext4 file system of a device (see [`Disk::ext4`]) at a path before the program starts.
    #[must_use]
    pub fn mount(mut self, device: &str, path: &str) -> Self {
        self.mounts.push((device.into(), path.into()));
        self
    }

    /// The VM's UUID; QEMU reports zeroes without one.
    #[must_use]
    pub fn uuid(mut self, uuid: &str) -> Self {
        self.uuid = Some(uuid.into());
        self
    }

    /// More words for QEMU's command line.
    #[must_use]
    pub fn extra<'a>(mut self, words: impl IntoIterator<Item = &'a str>) -> Self {
        self.extra.extend(words.into_iter().map(String::from));
        self
    }

    /// Another QEMU binary.
    #[must_use]
    pub fn binary(mut self, path: &Path) -> Self {
        self.binary = path.into();
        self
    }

    /// Creates what is missing (disks, initramfs, kernel), boots, and waits until the guest is up.
    pub fn boot(self) -> Result<Guest> {
        fs::create_dir_all(&self.dir)?;
        for disk in &self.disks {
            disk.create(&self.dir)?;
        }
        let kernel = kernel::kernel()?;
        let initrd = self.dir.join("initrd");
        initramfs::write(
            &initrd,
            &kernel,
            &self.run_script(),
            self.agent,
            self.tree.as_deref(),
        )?;
        let mut args = machine_args(&self.dir, self.vcpus, self.memory_mib);
        args.extend(["-kernel".into(), kernel.image().display().to_string()]);
        args.extend(["-initrd".into(), initrd.display().to_string()]);
        args.extend(["-append".into(), "console=ttyS0 quiet panic=-1".into()]);
        for disk in &self.disks {
            args.extend(disk.args(&self.dir));
        }
        if self.agent {
            let socket = self.dir.join("agent.sock");
            args.extend([
                "-device".into(),
                "virtio-serial-pci,id=rig-serial".into(),
                "-chardev".into(),
            ]);
            args.push(format!(
                "socket,id=agent,path={},server=on,wait=off",
                socket.display()
            ));
            args.extend([
                "-device".into(),
                "virtserialport,chardev=agent,name=org.qemu.guest_agent.0".into(),
            ]);
        }
        if let Some(uuid) = &self.uuid {
            args.extend(["-uuid".into(), uuid.clone()]);
        }
        args.extend(self.extra.iter().cloned());
        let machine = Machine::start(self.dir, self.binary, args)?;
        let mut guest = Guest {
            machine,
            disks: self.disks,
            agent: self.agent,
            next_shell: 0,
        };
        guest.wait_for(UP, BOOT)?;
        Ok(guest)
    }

    fn run_script(&self) -> String {
        if let Some(files) = &self.system {
            return system::switch_script(files);
        }
        let mut script = String::new();
        for (device, path) in &self.mounts {
            let mount = format!("mkdir -p {path} && mount -t ext4 {device} {path}");
            script.push_str(&mount);
            script.push_str(" || echo RIG-MOUNT-FAILED\n");
        }
        if self.agent {
            script.push_str(
                "qemu-ga -d -m virtio-serial -p /dev/virtio-ports/org.qemu.guest_agent.0 -f /run/qga.pid -t /run -l /run/qga.log\n",
            );
        }
        format!(
            "{script}echo \"{UP} $(uname -r) blk: $(ls /sys/block | tr '\\n' ' ')\"\n{{\n{}:\n}} &\n",
            self.program.script()
        )
    }
}

/// The whole lines of a console's log.
fn whole_lines(log: &Path) -> Result<Vec<String>> {
    let log = String::from_utf8_lossy(&fs::read(log)?).into_owned();
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    Ok(whole
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect())
}

/// The first whole line with this text.
fn line_with(log: &Path, text: &str) -> Result<Option<String>> {
    let lines = whole_lines(log)?;
    Ok(lines.into_iter().find(|line| line.contains(text)))
}

/// The last whole line with this text.
fn last_line(log: &Path, text: &str) -> Result<Option<String>> {
    let lines = whole_lines(log)?;
    Ok(lines.into_iter().rev().find(|line| line.contains(text)))
}

/// A running guest.
#[derive(Debug)]
pub struct Guest {
    machine: Machine,
    disks: Vec<Disk>,
    agent: bool,
    next_shell: u64,
}

impl std::ops::Deref for Guest {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.machine
    }
}

impl std::ops::DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }
}

impl Guest {
    /// A guest whose files are in a directory. Socket paths must stay below 100 bytes.
    pub fn builder(dir: &Path) -> Builder {
        Builder {
            dir: dir.into(),
            vcpus: 1,
            memory_mib: 192,
            disks: Vec::new(),
            program: Program::Idle,
            agent: false,
            system: None,
            mounts: Vec::new(),
            uuid: None,
            extra: Vec::new(),
            binary: "qemu-system-x86_64".into(),
            uefi: false,
            tpm: false,
            devices: String::new(),
            mac: None,
            tree: None,
        }
    }

    /// Its disks, in the guest's order.
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// The image file of a disk.
    pub fn image(&self, id: &str) -> Result<PathBuf> {
        let disk = self.disks.iter().find(|disk| disk.id() == id);
        Ok(disk
            .ok_or_else(|| anyhow!("no disk {id}"))?
            .path(self.machine.dir()))
    }

    /// The guest agent's socket, when the guest has one.
    pub fn agent_socket(&self) -> Option<PathBuf> {
        self.agent.then(|| self.machine.dir().join("agent.sock"))
    }

    /// Starts it again from the same command line and waits until it is up.
    pub fn restart(&mut self) -> Result<()> {
        self.machine.restart()?;
        self.wait_for(UP, BOOT).map(drop)
    }

    /// Waits for a line with this text on the console of the present boot and returns it.
    pub fn wait_for(&mut self, text: &str, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        loop {
            let log = self.machine.serial_log();
            if let Some(line) = line_with(&log, text)? {
                return Ok(line);
            }
            let log = fs::read_to_string(&log).unwrap_or_default();
            if !self.machine.is_alive() {
                bail!(
                    "QEMU ended before the guest said {text}: {}{log}",
                    self.machine.stderr()
                );
            }
            if Instant::now() > deadline {
                bail!("the guest did not say {text} within {timeout:?}: {log}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The last whole line with this text on the console so far.
    pub fn last_line(&self, text: &str) -> Result<Option<String>> {
        last_line(&self.machine.serial_log(), text)
    }

    /// Runs a shell line in the guest. Returns its exit status and what the console showed meanwhile.
    pub fn sh(&mut self, line: &str, timeout: Duration) -> Result<(i32, String)> {
        self.next_shell += 1;
        let (begin, end) = (
            format!("RIG-BEGIN {}", self.next_shell),
            format!("RIG-END {} ", self.next_shell),
        );
        let mut stream = UnixStream::connect(self.machine.dir().join("console.sock"))?;
        writeln!(stream, "{} {line}", self.next_shell)?;
        let deadline = Instant::now() + timeout;
        let mut text = String::new();
        loop {
            let found = text.find(&end).map(|at| (at, &text[at + end.len()..]));
            if let Some((at, rest)) = found
                && let Some((status, _)) = rest.split_once('\n')
            {
                let from = text.find(&begin).map_or(0, |start| start + begin.len());
                let said = text
                    .get(from..at)
                    .unwrap_or_default()
                    .trim()
                    .replace('\r', "");
                return Ok((status.trim().parse().context("an exit status")?, said));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("the guest's shell did not finish {line} within {timeout:?}: {text}");
            }
            stream.set_read_timeout(Some(left))?;
            let mut chunk = [0; 4096];
            match stream.read(&mut chunk) {
                Ok(0) => bail!("the console is gone: {text}"),
                Ok(count) => text.push_str(&String::from_utf8_lossy(&chunk[..count])),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("read the console"),
            }
        }
    }
}
