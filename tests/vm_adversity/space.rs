//! File systems that are full: the scratch's and the repository's. The guest never feels either for long.

use forerun_rig::guest::{Disk, Guest, Program};
use rustix::process::Signal;
use serde_json::json;

use crate::foreign::{exact, goes_on};
use crate::lab::{
    KIB, Lab, MIB, Still, Tmpfs, WAIT, drive, is_clean, our_jobs, random_image, until,
};

/// A stamping guest whose first disk answers reads slowly, so that a freeze takes its time.
fn slow_guest(dir: &std::path::Path, disks: &[&str], bytes_a_second: u64) -> Guest {
    let group = json!({
        "qom-type": "throttle-group", "id": "slow",
        "limits": { "bps-read": bytes_a_second },
    });
    let file = json!({
        "driver": "throttle", "throttle-group": "slow",
        "file": { "driver": "file", "filename": dir.join("vda.qcow2") },
    });
    let mut guest = Guest::builder(dir).extra(["-object", &group.to_string()]);
    for (index, disk) in disks.iter().enumerate() {
        let made = Disk::qcow2(disk, 32 * MIB);
        guest = guest.disk(if index == 0 {
            made.node_option("file", file.clone())
        } else {
            made
        });
    }
    let devices: Vec<String> = disks.iter().map(|disk| format!("/dev/{disk}")).collect();
    let stamp = format!("--span 8 --rate 600 {}", devices.join(" "));
    let mut guest = guest.program(Program::Stamp(stamp)).boot().unwrap();
    guest.wait_for("stamp: seq ", WAIT).unwrap();
    guest
}

fn dir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("rig").tempdir().unwrap()
}

#[test]
fn a_scratch_without_room_is_not_begun_and_one_that_fills_is_given_up_at_half() {
    let (dir, lab) = (dir(), Lab::new());
    let mut guest = slow_guest(dir.path(), &["vda", "vdb"], 3 * MIB);
    let target = format!("qmp:{}", guest.qmp_socket().display());
    let small = Tmpfs::mount(&lab.path().join("small"), 4 * MIB);
    let backup = ["backup", &target, "--as", "vm"];
    let place = ["--scratch", small.path().to_str().unwrap()];
    lab.forerun(&[&backup[..], &place].concat())
        .failed(8, "free", "--scratch");
    lab.forerun(&[&backup[..], &place, &["--freeze", "snapshot"]].concat())
        .failed(8, "for overlays", "--scratch");
    is_clean(guest.monitor());
    // An empty scratch takes 256 KiB: the guest's first block makes it more than half, and the residual takes seconds.
    let reserve = ["--scratch-reserve", "640KiB"];
    lab.forerun(&[&backup[..], &reserve].concat())
        .failed(4, "half of the scratch of disk", "--scratch-reserve")
        .warned("trying again after another pass");
    is_clean(guest.monitor());
    goes_on(&mut guest);
    let ran = lab.forerun(&backup).done().rescanned(&[]);
    exact(&lab.restore_all(&ran.point()));
    goes_on(&mut guest);
}

#[test]
fn a_vm_that_a_full_scratch_stopped_goes_on_and_the_report_says_so() {
    let (dir, lab) = (dir(), Lab::new());
    let mut guest = slow_guest(dir.path(), &["vda", "vdb"], 3 * MIB);
    let target = format!("qmp:{}", guest.qmp_socket().display());
    let scratch = Tmpfs::mount(&lab.path().join("scratch"), 128 * MIB);
    let place = scratch.path().to_str().unwrap();
    let words = ["backup", &target, "--as", "vm", "--scratch", place];
    let run = lab.begin(&[&words[..], &["--scratch-reserve", "2MiB"]].concat());
    until("a fleecing job", || !our_jobs(guest.monitor()).is_empty());
    // Nobody watches the scratch for a while, and nothing is left on its file system.
    run.signal(Signal::STOP);
    scratch.fill();
    until("the VM stopped by its scratch", || {
        let status = guest.monitor().execute("query-status", json!({})).unwrap();
        status["status"] == "io-error"
    });
    run.signal(Signal::CONT);
    until("the VM let go on", || {
        let status = guest.monitor().execute("query-status", json!({})).unwrap();
        status["status"] == "running"
    });
    scratch.empty();
    let ran = run.end();
    assert!(matches!(ran.code, 3 | 4), "{ran:?}");
    let ran = ran.warned("stopped by a full scratch and was let go on");
    is_clean(guest.monitor());
    goes_on(&mut guest);
    if ran.code == 3 {
        exact(&lab.restore_all(&ran.point()));
    }
    let ran = lab.forerun(&["backup", &target, "--as", "vm"]).done();
    exact(&lab.restore_all(&ran.rescanned(&[]).point()));
}

#[test]
fn what_is_preallocated_for_a_scratch_stays_so() {
    let lab = Lab::new();
    let (a, _) = random_image(lab.path(), "a.qcow2", "qcow2", 16 * MIB);
    let words = crate::lab::slow_drive("vda", &a, 4 * MIB);
    let mut vm = Still::start(lab.path(), &[words]);
    let scratch = Tmpfs::mount(&lab.path().join("scratch"), 96 * MIB);
    let free = || {
        let stat = rustix::fs::statvfs(scratch.path()).unwrap();
        stat.f_bavail * stat.f_frsize
    };
    let before = free();
    let place = scratch.path().to_str().unwrap().to_owned();
    let target = vm.target();
    let words = ["backup", &target, "--as", "vm", "--scratch", &place];
    let run = lab.begin(&[&words[..], &["--scratch-reserve", "32MiB"]].concat());
    until("a fleecing job", || !our_jobs(&mut vm.monitor).is_empty());
    assert!(before - free() >= 32 * MIB, "{}", before - free());
    run.end().ended(0);
    assert_eq!(free(), before, "nothing is left");
}

#[test]
fn a_full_repository_is_told_and_the_session_goes_on_when_there_is_room() {
    let place = std::cell::RefCell::new(None);
    let lab = Lab::with_repository(|dir| {
        let mounted = Tmpfs::mount(&dir.join("room"), 12 * MIB);
        let repo = mounted.path().join("repo");
        *place.borrow_mut() = Some(mounted);
        repo
    });
    let place = place.into_inner().unwrap();
    // More than a first freeze takes without a live pass, so that both fail once.
    let (a, bytes) = random_image(lab.path(), "a.qcow2", "qcow2", 80 * MIB);
    let mut vm = Still::start(lab.path(), &[drive("vda", &a, "qcow2")]);
    let target = vm.target();
    let backup = ["backup", &target, "--as", "vm"];
    for _ in 0..2 {
        lab.forerun(&backup)
            .failed(8, "pack", "free space in the repository");
        vm.is_clean();
    }
    place.grow(60 * MIB);
    lab.forerun(&backup)
        .failed(8, "pack", "free space in the repository");
    vm.is_clean();
    vm.io("vda", "write -P 65 1m 64k");
    let mut model = crate::lab::Model(bytes);
    model.fill(MIB, 64 * KIB, 65);
    place.grow(256 * MIB);
    let ran = lab.forerun(&backup).ended(0).rescanned(&[]);
    lab.same(&ran.point(), &[("vda", &model.0)]);
    let used = {
        let stat = rustix::fs::statvfs(place.path()).unwrap();
        (stat.f_blocks - stat.f_bavail) * stat.f_frsize
    };
    assert!(
        used < 200 * MIB,
        "what the failed runs wrote is used: {used}"
    );
}

#[test]
fn a_full_state_directory_is_told_before_anything_is_in_the_vm() {
    let lab = Lab::new();
    let (a, bytes) = random_image(lab.path(), "a.qcow2", "qcow2", 8 * MIB);
    let state = Tmpfs::mount(&lab.path().join("state"), MIB);
    let mut vm = Still::start(lab.path(), &[drive("vda", &a, "qcow2")]);
    let target = vm.target();
    let scratch = lab.path().to_str().unwrap();
    let backup = ["backup", &target, "--as", "vm", "--scratch", scratch];
    lab.forerun(&["track", &target, "--as", "vm"]).done();
    state.fill();
    let shown = state.path().to_str().unwrap();
    let files = || std::fs::read_dir(state.path().join("vm")).unwrap().count();
    let before = files();
    for words in [
        &backup[..],
        &[&backup[..], &["--freeze", "snapshot"]].concat(),
        &["precopy", &target, "--as", "vm"],
    ] {
        lab.forerun(words).failed(8, shown, "host state directory");
        vm.is_clean();
        assert_eq!(files(), before);
    }
    // What makes nothing needs no room.
    for command in ["inspect", "status", "recover"] {
        lab.forerun(&[command, &target, "--as", "vm"]).ended(0);
    }
    state.empty();
    let ran = lab.forerun(&backup).ended(0).rescanned(&[]);
    lab.same(&ran.point(), &[("vda", &bytes)]);
}
