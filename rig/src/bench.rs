//! The domain that `scripts/bench-guest.sh` measures: two qcow2 disks in iothreads, a shell and a way out for its load's
//! log on virtio ports, and two more QMP sockets, one for the tool that wants its own and one for the one who watches.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Result, anyhow};
use serde_json::{Value, json};

use crate::guest::{Disk, Domain, Guest, Libvirtd, Program};

const NAME: &str = "bench";
const UUID: &str = "6f1c0c43-3d1a-4f6e-9d3e-2f52a5f0be58";
/// What fio and its libraries take of it is in memory, too.
const MEMORY_MIB: u32 = 640;
/// Runs the lines that come through one port, `ID COMMAND`, and answers `RIG-END ID STATUS` after what they print. The
/// port ends whenever its other side goes away.
const SHELL: &str = "ports=/dev/virtio-ports
while true; do
	if exec 3<>$ports/rig.sh; then
		while read -r id line <&3; do
			(eval \"$line\") >/run/said 2>&1 </dev/null
			status=$?
			{ cat /run/said; echo \"RIG-END $id $status\"; } >&3
		done
		exec 3>&-
	fi
	sleep 0.2
done";

/// The domain, defined and off, and its libvirtd. Dropped, both end.
#[derive(Debug)]
pub struct Bench {
    dir: PathBuf,
    domain: Domain,
}

impl Bench {
    /// Makes both in a directory, which everybody may write to: QEMU makes its sockets there.
    pub fn define(dir: &Path, tree: &Path, size: u64, vcpus: u32) -> Result<Self> {
        let home = dir.join("lv");
        fs::create_dir_all(&home)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o777))?;
        let libvirtd = Arc::new(Mutex::new(Libvirtd::start(&home)?));
        let socket = |name: &str| format!("path={},server=on,wait=off", dir.join(name).display());
        let words = [
            "-qmp".into(),
            format!("unix:{}", socket("peer.sock").replace("path=", "")),
            "-qmp".into(),
            format!("unix:{}", socket("watch.sock").replace("path=", "")),
            "-device".into(),
            "virtio-serial-pci,id=rig,bus=pcie.0,addr=0x10".into(),
            "-chardev".into(),
            format!("socket,id=rigsh,{}", socket("sh.sock")),
            "-device".into(),
            "virtserialport,bus=rig.0,chardev=rigsh,name=rig.sh".into(),
            "-chardev".into(),
            format!("file,id=rigout,path={}", dir.join("out").display()),
            "-device".into(),
            "virtserialport,bus=rig.0,chardev=rigout,name=rig.out".into(),
        ];
        let domain = Guest::builder(dir)
            .uuid(UUID)
            .vcpus(vcpus)
            .memory_mib(MEMORY_MIB)
            .disk(Disk::qcow2("vda", size).iothread(true))
            .disk(Disk::qcow2("vdb", size / 2).iothread(true))
            .tree(tree)
            .program(Program::Script(SHELL.into()))
            .extra(words.iter().map(String::as_str))
            .define(libvirtd, NAME)?;
        Ok(Self {
            dir: dir.into(),
            domain,
        })
    }

    /// Where its parts are, for the script.
    pub fn places(&self) -> Result<Value> {
        let libvirtd = self.domain.lock();
        let place = |name: &str| self.dir.join(name).display().to_string();
        Ok(json!({
            "name": NAME, "uri": libvirtd.uri(), "namespace": libvirtd.namespace(),
            "pid_file": libvirtd.home().join(format!("run/qemu/{NAME}.pid")).to_str()
                .ok_or_else(|| anyhow!("{} is no text", self.dir.display()))?,
            "shell": place("sh.sock"), "out": place("out"), "peer": place("peer.sock"), "watch": place("watch.sock"),
            "console": place("serial.log"), "vda": place("vda.qcow2"), "vdb": place("vdb.qcow2"),
        }))
    }
}
