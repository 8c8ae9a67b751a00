//! The overlay of `--freeze snapshot` on its way back: a guest that writes faster than it is committed, and disks that are
//! unplugged meanwhile. What the guest wrote is never thrown away.

use std::fs;
use std::path::Path;
use std::time::Duration;

use forerun_rig::guest::{Disk, Guest, Program};
use forerun_rig::qmp::Qmp;
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::foreign::{exact, goes_on};
use crate::lab::{
    KIB, Lab, MIB, Model, Still, WAIT, compare, drive, image, is_clean, noise, qemu_img, until,
};

/// The rates of the group that a slow disk's file is in.
fn limit(monitor: &mut Qmp, read: u64, write: u64) {
    let limits = json!({ "bps-read": read, "bps-write": write });
    let what = json!({ "path": "/objects/slow", "property": "limits", "value": limits });
    monitor.execute("qom-set", what).unwrap();
}

fn group() -> [String; 2] {
    let group = json!({ "qom-type": "throttle-group", "id": "slow" });
    ["-object".to_owned(), group.to_string()]
}

/// A file that answers at the group's rates.
fn slow_file(path: &Path) -> Value {
    json!({
        "driver": "throttle", "throttle-group": "slow",
        "file": { "driver": "file", "filename": path },
    })
}

/// Our commits that run.
fn commits(monitor: &mut Qmp) -> usize {
    let jobs = monitor.execute("query-jobs", json!({})).unwrap();
    let jobs = jobs.as_array().unwrap().iter();
    jobs.filter(|job| job["type"] == "commit").count()
}

#[test]
fn a_commit_that_does_not_keep_up_is_told_and_recover_ends_it_later() {
    let dir = tempfile::Builder::new().prefix("rig").tempdir().unwrap();
    let lab = Lab::new();
    let file = slow_file(&dir.path().join("vda.qcow2"));
    let mut guest = Guest::builder(dir.path())
        .extra(group().each_ref().map(String::as_str))
        .disk(Disk::qcow2("vda", 32 * MIB).node_option("file", file))
        .disk(Disk::raw("vdb", 32 * MIB))
        .program(Program::Stamp(
            "--span 8 --rate 600 /dev/vda /dev/vdb".into(),
        ))
        .boot()
        .unwrap();
    guest.wait_for("stamp: seq ", WAIT).unwrap();
    let target = format!("qmp:{}", guest.qmp_socket().display());
    let backup = ["backup", &target, "--as", "vm", "--freeze", "snapshot"];
    let recover = ["recover", &target, "--as", "vm"];
    limit(guest.monitor(), 0, 512 * KIB);
    lab.forerun(&[&backup[..], &["--commit-deadline", "4s"]].concat())
        .failed(7, "faster than its overlay", "forerun recover");
    // The guest is on the overlay, and feels nothing.
    goes_on(&mut guest);
    lab.forerun(&recover)
        .failed(7, "faster than its overlay", "do not stop the VM");
    limit(guest.monitor(), 0, 0);
    let mut ran = lab.forerun(&recover);
    // A starved host is slow, too.
    until("the commit", || {
        let ended = ran.code == 0;
        if !ended {
            ran = lab.forerun(&recover);
        }
        ended
    });
    let ran = ran.ended(0);
    let removed = ran.at("/targets/0/removed").to_string();
    assert!(removed.contains("overlay of disk vda"), "{removed}");
    is_clean(guest.monitor());
    goes_on(&mut guest);
    // One that is slow, and ends.
    limit(guest.monitor(), 0, 512 * KIB);
    let run = lab.begin(&[&backup[..], &["--commit-deadline", "60s"]].concat());
    until("a commit", || commits(guest.monitor()) > 0);
    std::thread::sleep(Duration::from_secs(4));
    limit(guest.monitor(), 0, 0);
    let ran = run.end().ended(3).warned("was not committed after");
    exact(&lab.restore_all(&ran.point()));
    is_clean(guest.monitor());
    goes_on(&mut guest);
}

/// A VM of a disk that stays and one whose device goes at once when it is asked to.
struct Plugged {
    lab: Lab,
    vm: Still,
    model: Model,
}

impl Plugged {
    fn new() -> Self {
        let lab = Lab::new();
        let a = image(lab.path(), "a.qcow2", "qcow2", 4 * MIB);
        let c = lab.path().join("c.raw");
        let bytes = noise(24 * MIB);
        fs::write(&c, &bytes).unwrap();
        let node = json!({ "driver": "raw", "node-name": "sdc-node", "file": slow_file(&c) });
        let words = |words: &[&str]| words.iter().map(|&word| word.to_owned()).collect();
        let vm = Still::start(
            lab.path(),
            &[
                drive("vda", &a, "qcow2"),
                group().to_vec(),
                words(&["-device", "virtio-scsi-pci,id=hba"]),
                words(&["-blockdev", &node.to_string()]),
                words(&["-device", "scsi-hd,id=sdc,drive=sdc-node,bus=hba.0"]),
            ],
        );
        let model = Model(bytes);
        Self { lab, vm, model }
    }

    fn backup(&self) -> [String; 6] {
        let target = self.vm.target();
        ["backup", &target, "--as", "vm", "--freeze", "snapshot"].map(str::to_owned)
    }

    fn on_overlay(&mut self) -> bool {
        let all = self.vm.monitor.execute("query-block", json!({})).unwrap();
        let all = all.as_array().unwrap().iter();
        all.filter(|it| it["qdev"] == "sdc").any(|it| {
            let node = it["inserted"]["node-name"].as_str();
            node.is_some_and(|node| node.starts_with("forerun-"))
        })
    }

    fn unplug(&mut self) {
        self.vm
            .monitor
            .execute("device_del", json!({ "id": "sdc" }))
            .unwrap();
        let gone = |event: &Value| event["data"]["device"] == "sdc";
        self.vm.monitor.wait_event(&gone, WAIT).unwrap();
    }

    /// All that was written is in the image.
    fn holds_all(mut self) {
        self.vm.is_clean();
        let what = json!({ "node-name": "sdc-node" });
        self.vm.monitor.execute("blockdev-del", what).unwrap();
        let image = self.lab.path().join("c.raw");
        let raw = self.lab.path().join("whole.raw");
        let (image, whole) = (image.to_str().unwrap(), raw.to_str().unwrap());
        qemu_img(&["convert", "-f", "raw", "-O", "raw", image, whole]);
        compare("the unplugged disk", &fs::read(raw).unwrap(), &self.model.0);
        let left = fs::read_dir(self.lab.path().join("state/vm")).unwrap();
        let left: Vec<_> = left.map(|entry| entry.unwrap().file_name()).collect();
        let ended = |name: &std::ffi::OsString| {
            let name = name.to_string_lossy();
            !name.ends_with(".overlay") && !name.ends_with(".journal")
        };
        assert!(left.iter().all(ended), "{left:?}");
    }
}

#[test]
fn what_was_written_to_a_disk_that_was_unplugged_on_its_overlay_is_kept() {
    let mut it = Plugged::new();
    limit(&mut it.vm.monitor, 8 * MIB, 0);
    let words = it.backup();
    let run = it.lab.begin(&words.each_ref().map(String::as_str));
    until("an overlay", || it.on_overlay());
    run.signal(Signal::STOP);
    it.model.write(&mut it.vm, "sdc", MIB, 2 * MIB, 0x5a);
    it.unplug();
    run.signal(Signal::CONT);
    // The other disk is backed up.
    run.end().ended(3).warned("the freeze was given up");
    it.holds_all();
}

#[test]
fn a_disk_may_be_unplugged_while_its_overlay_is_committed() {
    let mut it = Plugged::new();
    let words = it.backup();
    limit(&mut it.vm.monitor, 8 * MIB, 256 * KIB);
    let run = it.lab.begin(&words.each_ref().map(String::as_str));
    until("an overlay", || it.on_overlay());
    it.model.write(&mut it.vm, "sdc", MIB, MIB, 0x5b);
    until("a commit", || commits(&mut it.vm.monitor) > 0);
    it.unplug();
    limit(&mut it.vm.monitor, 0, 0);
    run.end().done();
    it.holds_all();
}
