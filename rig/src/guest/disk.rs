//! A disk of a test VM: its image, its block nodes and its device.
//!
//! Node names are `<id>-node` (format) and `<id>-file` (protocol) unless set; the device's id is the disk's.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// qcow2, version 3.
    Qcow2,
    /// Raw, behind a `raw` node.
    Raw,
}

/// How a disk is attached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Bus {
    /// `virtio-blk-pci`.
    VirtioBlk,
    /// `scsi-hd` on a `virtio-scsi-pci` of its own.
    Scsi,
    /// `nvme`.
    Nvme,
    /// Not at all: only the block node is there.
    None,
    /// Any device by its driver name; `drive` and `id` are added.
    Other(String),
}

/// A disk; the image is created at the guest's first boot unless it is there.
#[derive(Debug, Clone)]
pub struct Disk {
    id: String,
    format: Format,
    size: u64,
    bus: Bus,
    iothread: bool,
    serial: Option<String>,
    node: Option<String>,
    image: Option<PathBuf>,
    ext4: bool,
    backing: Option<PathBuf>,
    device: Vec<(String, Value)>,
    blockdev: Vec<(String, Value)>,
}

impl Disk {
    /// A qcow2 disk on virtio-blk.
    pub fn qcow2(id: &str, size: u64) -> Self {
        Self::new(id, Format::Qcow2, size)
    }

    /// A raw disk on virtio-blk.
    pub fn raw(id: &str, size: u64) -> Self {
        Self::new(id, Format::Raw, size)
    }

    fn new(id: &str, format: Format, size: u64) -> Self {
        Self {
            id: id.into(),
            format,
            size,
            bus: Bus::VirtioBlk,
            iothread: false,
            serial: None,
            node: None,
            image: None,
            ext4: false,
            backing: None,
            device: Vec::new(),
            blockdev: Vec::new(),
        }
    }

    /// How it is attached.
    #[must_use]
    pub fn bus(mut self, bus: Bus) -> Self {
        self.bus = bus;
        self
    }

    /// Gives it an iothread of its own, named `io-<id>`.
    #[must_use]
    pub fn iothread(mut self, iothread: bool) -> Self {
        self.iothread = iothread;
        self
    }

    /// The device's serial number.
    #[must_use]
    pub fn serial(mut self, serial: &str) -> Self {
        self.serial = Some(serial.into());
        self
    }

    /// Another name of the format node.
    #[must_use]
    pub fn node(mut self, node: &str) -> Self {
        self.node = Some(node.into());
        self
    }

    /// Another image file than `<id>.qcow2` or `<id>.raw` in the guest's directory.
    #[must_use]
    pub fn image(mut self, path: &Path) -> Self {
        self.image = Some(path.into());
        self
    }

    /// Makes a fresh image with an ext4 file system on the whole disk.
    #[must_use]
    pub fn ext4(mut self) -> Self {
        self.ext4 = true;
        self
    }

    /// Makes a fresh qcow2 image over a backing file of its own format.
    #[must_use]
    pub fn backing(mut self, path: &Path) -> Self {
        self.backing = Some(path.into());
        self
    }

    /// Another property of the device.
    #[must_use]
    pub fn device_property(mut self, name: &str, value: Value) -> Self {
        self.device.push((name.into(), value));
        self
    }

    /// Another option of the format node.
    #[must_use]
    pub fn node_option(mut self, name: &str, value: Value) -> Self {
        self.blockdev.push((name.into(), value));
        self
    }

    /// The disk's and its device's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The device's serial number, if it was given one.
    pub fn serial_number(&self) -> Option<&str> {
        self.serial.as_deref()
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Its format.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The name of its format node.
    pub fn node_name(&self) -> String {
        self.node
            .clone()
            .unwrap_or_else(|| format!("{}-node", self.id))
    }

    /// How it is attached.
    pub fn bus_kind(&self) -> &Bus {
        &self.bus
    }

    /// The name of its iothread, if it has one.
    pub fn iothread_name(&self) -> Option<String> {
        self.iothread.then(|| format!("io-{}", self.id))
    }

    fn driver(&self) -> &'static str {
        match self.format {
            Format::Qcow2 => "qcow2",
            Format::Raw => "raw",
        }
    }

    /// Where its image is, for a guest of this directory.
    pub fn path(&self, dir: &Path) -> PathBuf {
        self.image
            .clone()
            .unwrap_or_else(|| dir.join(format!("{}.{}", self.id, self.driver())))
    }

    pub(crate) fn create(&self, dir: &Path) -> Result<()> {
        let path = self.path(dir);
        if path.exists() {
            return Ok(());
        }
        if !self.ext4 {
            let mut command = Command::new("qemu-img");
            command.args(["create", "-q", "-f", self.driver()]);
            if let Some(backing) = &self.backing {
                command.arg("-b").arg(backing).args(["-F", "qcow2"]);
            }
            return run(command.arg(&path).arg(self.size.to_string()));
        }
        let raw = path.with_extension("ext4");
        File::create(&raw)?.set_len(self.size)?;
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&raw))?;
        run(Command::new("qemu-img")
            .args(["convert", "-O", self.driver()])
            .arg(&raw)
            .arg(&path))?;
        Ok(std::fs::remove_file(raw)?)
    }

    pub(crate) fn args(&self, dir: &Path) -> Vec<String> {
        let mut args = Vec::new();
        if let Some(iothread) = self.iothread_name() {
            args.extend(["-object".into(), format!("iothread,id={iothread}")]);
        }
        let file = json!({
            "driver": "file", "node-name": format!("{}-file", self.id), "discard": "unmap",
            "filename": self.path(dir).display().to_string(),
        });
        let mut node = json!({
            "driver": self.driver(), "node-name": self.node_name(), "discard": "unmap", "file": file,
        });
        for (name, value) in &self.blockdev {
            node[name] = value.clone();
        }
        args.extend(["-blockdev".into(), node.to_string()]);
        args.extend(self.device_args());
        args
    }

    fn device_args(&self) -> Vec<String> {
        let mut args = Vec::new();
        let mut device = json!({"id": self.id, "drive": self.node_name()});
        let mut iothread = self.iothread_name();
        match &self.bus {
            Bus::None => return args,
            Bus::VirtioBlk => device["driver"] = json!("virtio-blk-pci"),
            Bus::Nvme => {
                device["driver"] = json!("nvme");
                device["serial"] = json!(self.id);
                iothread = None;
            }
            Bus::Other(driver) => device["driver"] = json!(driver),
            Bus::Scsi => {
                let mut controller =
                    json!({"driver": "virtio-scsi-pci", "id": format!("{}-hba", self.id)});
                if let Some(iothread) = iothread.take() {
                    controller["iothread"] = json!(iothread);
                }
                args.extend(["-device".into(), controller.to_string()]);
                device["driver"] = json!("scsi-hd");
                device["bus"] = json!(format!("{}-hba.0", self.id));
            }
        }
        if let Some(iothread) = iothread {
            device["iothread"] = json!(iothread);
        }
        if let Some(serial) = &self.serial {
            device["serial"] = json!(serial);
        }
        for (name, value) in &self.device {
            device[name] = value.clone();
        }
        args.extend(["-device".into(), device.to_string()]);
        args
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
