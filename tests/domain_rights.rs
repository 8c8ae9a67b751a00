//! Who may do what with a domain: a user with no more than access to libvirt, and what others see of our files.
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]

mod domain_common;
mod vm_common;

use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::PoisonError;

use domain_common::{ALONE, Lab};
use forerun_rig::guest::{Disk, Program};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vm_common::{MIB, wait_for};

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// Runs a command as `nobody`, who may use libvirt's socket and owns a repository and a host state.
fn as_nobody(lab: &Lab, words: &[&str]) -> (Option<i32>, Value) {
    let libvirtd = lab.domain.lock();
    let mut command = libvirtd.command(Path::new("setpriv"));
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(lab.path("forerun"))
        .env("LIBVIRT_DEFAULT_URI", libvirtd.uri())
        .env("HOME", lab.path("nobody"))
        .env("FORERUN_REPO", lab.path("nobody/repository"))
        .env("FORERUN_STATE_DIR", lab.path("nobody/state"));
    drop(libvirtd);
    let output = command.args(words).arg("--json").output().unwrap();
    let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code(), json)
}

#[test]
fn a_user_of_libvirt_looks_and_is_told_what_more_it_takes() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = Lab::boot_with("rights", |builder| {
        let script = "echo stamp: running; while true; do dd if=/dev/urandom of=/dev/vda bs=4k count=8 conv=notrunc,fsync 2>/dev/null; done";
        builder
            .disk(Disk::qcow2("vda", 8 * MIB))
            .program(Program::Script(script.to_owned()))
    });
    let name = lab.name();
    let own = lab.path("nobody");
    std::fs::create_dir(&own).unwrap();
    std::os::unix::fs::chown(&own, Some(65534), Some(65534)).unwrap();
    // The program's own directory may be closed to others.
    std::fs::copy(env!("CARGO_BIN_EXE_forerun"), lab.path("forerun")).unwrap();
    let socket = lab.domain.lock().home().join("sock/libvirt-sock");
    // As `unix_sock_group` does for the group's members.
    std::fs::set_permissions(socket, PermissionsExt::from_mode(0o777)).unwrap();

    let repository = own.join("repository").display().to_string();
    assert_eq!(as_nobody(&lab, &["init", &repository]).0, Some(0));
    let (code, seen) = as_nobody(&lab, &["inspect", &name]);
    assert_eq!(code, Some(0), "{seen}");
    assert_eq!(seen["targets"][0]["machine"]["disks"][0]["key"], "vda");
    for command in ["precopy", "backup"] {
        let (code, said) = as_nobody(&lab, &[command, &name]);
        assert_eq!(code, Some(7), "{command}: {said}");
        let error = &said["errors"][0];
        let message = error["message"].as_str().unwrap();
        assert!(
            message.contains("domain-") && message.contains("ermission denied"),
            "{said}"
        );
        assert!(
            error["hint"].as_str().unwrap().contains("as root"),
            "{said}"
        );
    }
    // Nothing was put into the VM for it, and root goes on.
    lab.is_clean();
    let bitmaps = lab.ask("query-named-block-nodes");
    assert!(!Value::from(bitmaps).to_string().contains("\"forerun-"));
    assert_eq!(mode(&own.join("state")), 0o700);

    // What root makes is nobody else's to read.
    lab.backup(&[]).done();
    let run = lab.start(&["backup", &name], "stop@qmp:blockdev-add:before#1");
    wait_for("no scratch is made", || !lab.steps().is_empty());
    let state = lab.path("state").join(lab.uuid());
    assert_eq!(mode(&state), 0o700);
    for file in std::fs::read_dir(&state).unwrap() {
        assert_eq!(mode(&file.unwrap().path()), 0o600);
    }
    let place = lab.domain.lock().home().join("lib/qemu");
    let mut scratches = 0;
    for directory in std::fs::read_dir(place).unwrap() {
        let directory = directory.unwrap().path();
        for file in std::fs::read_dir(&directory).into_iter().flatten() {
            let path = file.unwrap().path();
            if path.extension().is_some_and(|ending| ending == "scratch") {
                scratches += 1;
                assert_eq!(mode(&path), 0o600);
                // It is QEMU's to open.
                let owner = std::fs::metadata(&directory).unwrap().uid();
                assert_eq!(std::fs::metadata(&path).unwrap().uid(), owner);
            }
        }
    }
    assert_eq!(scratches, 1);
    kill_process(Pid::from_child(&run.child), Signal::CONT).unwrap();
    run.end().done();
    lab.is_clean();
}
