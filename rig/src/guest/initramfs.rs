//! The first (and only) root of a guest: busybox, modules, the rig's program, maybe the agent, and an init script.
//!
//! The common part is cached by its content; the script of one guest is a second archive behind it, which the kernel
//! unpacks over the first.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::kernel::{Kernel, agent_root, cache_dir, guest_program, lock};

/// What disks, ports and ext4 need of a kernel that has them as modules.
const MODULES: [&str; 12] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_scsi",
    "sd_mod",
    "nvme",
    "ahci",
    "virtio_console",
    "virtio_rng",
    "crc32c_generic",
    "libcrc32c",
    "ext4",
    "crc32c_intel",
];

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs run /run
ln -s /run /var/run
for module in $(cat /lib/modules/order); do
	insmod /lib/modules/$module 2>/dev/null || echo "RIG-NO-MODULE $module"
done
mkdir -p /dev/virtio-ports
for port in /sys/class/virtio-ports/*; do
	[ -e $port/name ] && ln -s ../${port##*/} /dev/virtio-ports/$(cat $port/name)
done
echo 1 >/proc/sys/kernel/printk
stty -echo 2>/dev/null
. /rig/run
while true; do
	while read -r id line; do
		echo "RIG-BEGIN $id"
		(eval "$line") 2>&1 </dev/null
		echo "RIG-END $id $?"
	done
	sleep 1
done
"#;

/// Writes a guest's initramfs.
pub(super) fn write(
    path: &Path,
    kernel: &Kernel,
    run_script: &str,
    agent: bool,
    tree: Option<&Path>,
) -> Result<()> {
    let mut bytes = fs::read(common(kernel, agent)?)?;
    let mut own = Archive::default();
    own.file("rig/run", 0o755, run_script.as_bytes());
    if let Some(root) = tree {
        add_tree(&mut own, root, root)?;
    }
    bytes.extend(own.finish());
    fs::write(path, bytes).with_context(|| format!("write {}", path.display()))
}

fn common(kernel: &Kernel, agent: bool) -> Result<PathBuf> {
    let program = fs::read(guest_program()?)?;
    let busybox = fs::read("/bin/busybox").or_else(|_| fs::read("/usr/bin/busybox"));
    let busybox = busybox.context("busybox-static is not installed")?;
    let agent = agent.then(agent_root).transpose()?;
    let _one_at_a_time = lock()?;
    let mut hasher = DefaultHasher::new();
    (
        &program,
        &busybox,
        agent.is_some(),
        INIT,
        MODULES,
        kernel.image(),
    )
        .hash(&mut hasher);
    let path = cache_dir().join(format!("initramfs-{:016x}", hasher.finish()));
    if path.exists() {
        return Ok(path);
    }
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "run", "tmp", "mnt", "var", "root"] {
        archive.directory(directory);
    }
    archive.char_device("dev/console", 5, 1);
    archive.file("init", 0o755, INIT.as_bytes());
    archive.file("bin/busybox", 0o755, &busybox);
    archive.symlink("bin/sh", "busybox");
    archive.file("bin/rig-guest", 0o755, &program);
    let mut order = String::new();
    for (name, data) in kernel.modules(&MODULES)? {
        order.push_str(&name);
        order.push('\n');
        archive.file(&format!("lib/modules/{name}"), 0o644, &data);
    }
    archive.file("lib/modules/order", 0o644, order.as_bytes());
    if let Some(root) = agent {
        add_tree(&mut archive, &root, &root)?;
    }
    let part = path.with_extension("part");
    fs::write(&part, archive.finish())?;
    fs::rename(&part, &path)?;
    Ok(path)
}

fn add_tree(archive: &mut Archive, root: &Path, dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            add_tree(archive, root, &path)?;
        } else {
            let name = path.strip_prefix(root)?.to_string_lossy().into_owned();
            archive.file(&name, 0o755, &fs::read(&path)?);
        }
    }
    Ok(())
}
