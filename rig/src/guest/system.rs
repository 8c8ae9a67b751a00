//! A guest with a distribution's own systemd and agent, instead of the rig's init: the rig's kernel and initramfs load the
//! modules, put files into the root disk, and hand over to it.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Builder, Disk, UP, kernel};

/// A file that is put into the root before the system starts.
#[derive(Debug, Clone)]
pub struct SystemFile {
    path: String,
    text: String,
}

impl SystemFile {
    /// A file with these lines, that may be executed.
    pub fn new(path: &str, text: &str) -> Self {
        Self {
            path: path.into(),
            text: text.into(),
        }
    }
}

/// What stands in the way of a fast start, and of the console.
const MASKED: [&str; 8] = [
    "serial-getty@ttyS0.service",
    "getty@tty1.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "systemd-networkd.service",
    "systemd-timesyncd.service",
    "systemd-random-seed.service",
    "e2scrub_all.timer",
];
/// Says on the console that the system is up.
const UP_UNIT: &str = "[Unit]
After=basic.target qemu-guest-agent.service
[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo \"UP $(uname -r)\" >/dev/console'
";

impl Builder {
    /// Runs a system with systemd, whose root is the first disk; its size must hold 384 MiB. These files come on top.
    #[must_use]
    pub fn system(mut self, files: impl IntoIterator<Item = SystemFile>) -> Self {
        self.system = Some(files.into_iter().collect());
        self
    }
}

/// Makes the root disk's image.
pub(super) fn create_root(dir: &Path, disks: &[Disk]) -> Result<()> {
    let root = disks.first().context("a system without a disk")?;
    let path = root.path(dir);
    if path.exists() {
        return Ok(());
    }
    let output = Command::new("qemu-img")
        .args(["convert", "-O", "qcow2"])
        .arg(kernel::system_root()?)
        .arg(&path)
        .output()
        .context("run qemu-img")?;
    if !output.status.success() {
        bail!("qemu-img: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// What the initramfs's init does instead of going on by itself.
pub(super) fn switch_script(files: &[SystemFile]) -> String {
    let units = "/etc/systemd/system";
    let mut script = String::from("mount -t ext4 /dev/vda /mnt || echo RIG-MOUNT-FAILED\n");
    let up = SystemFile::new(
        &format!("{units}/rig-up.service"),
        &UP_UNIT.replace("UP ", &format!("{UP} ")),
    );
    let wants = SystemFile::new(
        &format!("{units}/multi-user.target.d/rig-up.conf"),
        "[Unit]\nWants=rig-up.service\n",
    );
    let id = SystemFile::new("/etc/machine-id", "00112233445566778899aabbccddeeff\n");
    for file in files.iter().chain([&up, &wants, &id]) {
        let path = format!("/mnt{}", file.path);
        let text = &file.text;
        let put = format!("p={path}; mkdir -p ${{p%/*}}; cat >$p <<'RIG-END'\n{text}RIG-END\n");
        script.push_str(&put);
        script.push_str("chmod 755 $p\n");
    }
    let masked = MASKED.join(" ");
    let mask = format!("for unit in {masked}; do ln -sf /dev/null /mnt{units}/$unit; done\n");
    script.push_str(&mask);
    script.push_str("for place in dev proc sys run; do mount -o move /$place /mnt/$place; done\n");
    script.push_str("exec switch_root /mnt /sbin/init\n");
    script
}
