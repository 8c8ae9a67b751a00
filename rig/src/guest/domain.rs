//! A guest as a libvirt domain: the rig's kernel, initramfs and programs, with disks as libvirt attaches them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use super::{
    BOOT, Builder, Bus, Disk, Format, Libvirtd, UP, initramfs, kernel, last_line, line_with, system,
};

/// OVMF, as Debian's package has it.
const FIRMWARE: &str = "<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE_4M.fd</loader><nvram template='/usr/share/OVMF/OVMF_VARS_4M.fd'/>";

/// A guest under libvirt. Dropped, it is destroyed.
#[derive(Debug)]
pub struct Domain {
    libvirtd: std::sync::Arc<std::sync::Mutex<Libvirtd>>,
    name: String,
    dir: PathBuf,
    disks: Vec<Disk>,
}

const CMDLINE: &str = "console=ttyS0 quiet panic=-1 no_timer_check";
/// Of the elements that libvirt hands to QEMU unread; a name, nothing that is fetched.
const QEMU_NAMESPACE: &str = concat!("http", "://libvirt.org/schemas/domain/qemu/1.0");

impl Builder {
    /// Defines the guest as a domain, starts it, and waits until it is up. A disk's id is its target's `dev`, which
    /// says its bus, too: `vda` is on virtio-blk, `sda` on virtio-scsi. Another bus is one of libvirt's names.
    pub fn domain(
        self,
        libvirtd: std::sync::Arc<std::sync::Mutex<Libvirtd>>,
        name: &str,
    ) -> Result<Domain> {
        let mut domain = self.define(libvirtd, name)?;
        domain.start()?;
        Ok(domain)
    }

    /// Defines the guest as a domain and leaves it off.
    pub fn define(
        self,
        libvirtd: std::sync::Arc<std::sync::Mutex<Libvirtd>>,
        name: &str,
    ) -> Result<Domain> {
        fs::create_dir_all(&self.dir)?;
        if self.system.is_some() {
            system::create_root(&self.dir, &self.disks)?;
        }
        for disk in &self.disks {
            disk.create(&self.dir)?;
        }
        let kernel = kernel::kernel()?;
        // libvirt gives what it boots to QEMU's user: never the cache's own file.
        fs::copy(kernel.image(), self.dir.join("vmlinuz"))?;
        initramfs::write(
            &self.dir.join("initrd"),
            &kernel,
            &self.run_script(),
            self.agent && self.system.is_none(),
            self.tree.as_deref(),
        )?;
        let file = self.dir.join(format!("{name}.xml"));
        fs::write(&file, self.xml(name))?;
        let domain = Domain {
            libvirtd,
            name: name.into(),
            dir: self.dir,
            disks: self.disks,
        };
        domain.virsh(&["define", &file.display().to_string()])?;
        Ok(domain)
    }

    fn xml(&self, name: &str) -> String {
        let dir = self.dir.display();
        let disks: Vec<String> = self
            .disks
            .iter()
            .map(|disk| disk_xml(disk, &self.dir))
            .collect();
        let agent = if self.agent {
            "<channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        } else {
            ""
        };
        let uuid = self
            .uuid
            .as_deref()
            .map(|uuid| format!("<uuid>{uuid}</uuid>"));
        let firmware = if self.uefi { FIRMWARE } else { "" };
        let (kernel, initrd) = (format!("{dir}/vmlinuz"), format!("{dir}/initrd"));
        let mut words = self.extra.clone();
        let boot = if self.tree.is_some() {
            let more = ["-kernel", &kernel, "-initrd", &initrd, "-append", CMDLINE];
            words.extend(more.map(String::from));
            String::new()
        } else {
            format!(
                "<kernel>{kernel}</kernel><initrd>{initrd}</initrd>\n<cmdline>{CMDLINE}</cmdline>"
            )
        };
        let tpm = if self.tpm {
            "<tpm model='tpm-crb'><backend type='emulator' version='2.0'/></tpm>"
        } else {
            ""
        };
        let interface = self.mac.as_deref().map(|mac| {
            format!(
                "<interface type='user'><mac address='{mac}'/><model type='virtio'/></interface>"
            )
        });
        format!(
            "<domain type='qemu'><name>{name}</name>{uuid}<memory unit='MiB'>{memory}</memory><vcpu>{vcpus}</vcpu>
<iothreads>2</iothreads>
<os><type arch='x86_64' machine='q35'>hvm</type>{firmware}{boot}</os><features><acpi/></features><cpu mode='maximum'/>
<on_reboot>restart</on_reboot><on_crash>destroy</on_crash>
<devices><emulator>{binary}</emulator>
{disks}
<controller type='scsi' index='0' model='virtio-scsi'><driver iothread='2'/></controller>
<serial type='file'><source path='{dir}/serial.log'/></serial>
{agent}{tpm}{interface}{more}<memballoon model='none'/></devices>{words}</domain>
",
            uuid = uuid.unwrap_or_default(),
            interface = interface.unwrap_or_default(),
            more = self.devices,
            memory = self.memory_mib,
            vcpus = self.vcpus,
            binary = emulator(&self.binary),
            disks = disks.join("\n"),
            words = words_xml(&words),
        )
    }
}

/// More words for QEMU's command line, past libvirt.
fn words_xml(words: &[String]) -> String {
    if words.is_empty() {
        return String::new();
    }
    let words: Vec<String> = words
        .iter()
        .map(|word| format!("<qemu:arg value='{word}'/>"))
        .collect();
    let words = words.concat();
    format!("<qemu:commandline xmlns:qemu='{QEMU_NAMESPACE}'>{words}</qemu:commandline>")
}

/// libvirt wants an absolute path.
fn emulator(binary: &Path) -> String {
    if binary.is_absolute() {
        return binary.display().to_string();
    }
    Path::new("/usr/bin").join(binary).display().to_string()
}

fn disk_xml(disk: &Disk, dir: &Path) -> String {
    let (bus, iothread) = match (disk.bus_kind(), disk.iothread_name()) {
        (Bus::Scsi, _) => ("scsi", ""),
        (Bus::Other(bus), _) => (bus.as_str(), ""),
        (_, Some(_)) => ("virtio", " iothread='1'"),
        (_, None) => ("virtio", ""),
    };
    let format = match disk.format() {
        Format::Qcow2 => "qcow2",
        Format::Raw => "raw",
    };
    let serial = disk.serial_number();
    let serial = serial.map(|serial| format!("<serial>{serial}</serial>"));
    let serial = serial.unwrap_or_default();
    format!(
        "<disk type='file' device='disk'><driver name='qemu' type='{format}' discard='unmap'{iothread}/><source file='{}'/><target dev='{}' bus='{bus}'/>{serial}</disk>",
        disk.path(dir).display(),
        disk.id()
    )
}

impl Domain {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The image file of a disk.
    pub fn image(&self, id: &str) -> Result<PathBuf> {
        let disk = self.disks.iter().find(|disk| disk.id() == id);
        Ok(disk.ok_or_else(|| anyhow!("no disk {id}"))?.path(&self.dir))
    }

    /// Starts it and waits until the guest is up.
    pub fn start(&mut self) -> Result<()> {
        let log = self.dir.join("serial.log");
        fs::write(&log, b"")?;
        self.virsh(&["start", &self.name])?;
        self.wait_for(UP, BOOT).map(drop)
    }

    /// Ends it in good order, as libvirt's `destroy` does: SIGTERM first, so bitmaps are stored.
    pub fn destroy(&mut self) -> Result<()> {
        self.virsh(&["destroy", &self.name]).map(drop)
    }

    /// SIGKILL for its QEMU.
    pub fn kill9(&mut self) -> Result<()> {
        let pid = self.pid().context("the domain does not run")?;
        let pid = rustix::process::Pid::from_raw(i32::try_from(pid)?).context("a process id")?;
        rustix::process::kill_process(pid, rustix::process::Signal::KILL)?;
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.virsh(&["domstate", &self.name])?.contains("shut off") {
            if Instant::now() > deadline {
                bail!("libvirt does not notice the end of {}", self.name);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// The process of its QEMU.
    pub fn pid(&self) -> Option<u32> {
        self.lock().qemu(&self.name)
    }

    /// Runs virsh.
    pub fn virsh(&self, words: &[&str]) -> Result<String> {
        self.lock().virsh(words)
    }

    /// Runs a command of its monitor, behind libvirt's back.
    pub fn execute(&self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments }).to_string();
        let answer = self.virsh(&["qemu-monitor-command", &self.name, &request])?;
        let mut answer: Value = serde_json::from_str(&answer)?;
        match answer.get_mut("return") {
            Some(value) => Ok(value.take()),
            None => bail!("{command}: {answer}"),
        }
    }

    /// Waits for a line with this text on the console of the present boot and returns it.
    pub fn wait_for(&self, text: &str, timeout: Duration) -> Result<String> {
        self.wait_for_on("serial.log", text, timeout)
    }

    /// As [`Self::wait_for`], on a console that a file of its directory is.
    pub fn wait_for_on(&self, console: &str, text: &str, timeout: Duration) -> Result<String> {
        let deadline = Instant::now() + timeout;
        let log = self.dir.join(console);
        loop {
            if let Some(line) = line_with(&log, text)? {
                return Ok(line);
            }
            if Instant::now() > deadline {
                let said = fs::read_to_string(&log).unwrap_or_default();
                bail!("the guest did not say {text} within {timeout:?}: {said}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The last whole line with this text on the console so far.
    pub fn last_line(&self, text: &str) -> Result<Option<String>> {
        last_line(&self.dir.join("serial.log"), text)
    }

    /// The daemon, for this moment.
    pub fn lock(&self) -> std::sync::MutexGuard<'_, Libvirtd> {
        self.libvirtd
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // It may be off already.
        let _off = self.virsh(&["destroy", &self.name]);
        let _gone = self.virsh(&["undefine", &self.name]);
    }
}
