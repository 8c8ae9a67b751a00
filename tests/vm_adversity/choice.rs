//! Which disks, and targets that cannot be reached.

use std::time::Instant;

use forerun_rig::qmp::Qmp;
use serde_json::json;

use crate::lab::{Lab, MIB, Still, WAIT, drive, image, noise};

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|&word| word.to_owned()).collect()
}

fn node(id: &str, image: &std::path::Path, more: &str) -> String {
    format!(
        r#"{{"driver":"qcow2","node-name":"{id}-node","file":{{"driver":"file","filename":"{}"}}{more}}}"#,
        image.display()
    )
}

#[test]
fn what_cannot_be_backed_up_is_refused_by_name() {
    let lab = Lab::new();
    let new = |name: &str| image(lab.path(), name, "qcow2", 4 * MIB);
    let no_id = node("b", &new("b"), "");
    let shared = node("c", &new("c"), "");
    let read_only = node("d", &new("d"), r#","read-only":true"#);
    let removable = node("e", &new("e"), r#","read-only":true"#);
    let persistent = format!(
        "memory-backend-file,id=pm,mem-path={},size=16M,share=on",
        lab.path().join("pm").display()
    );
    let vm = Still::start(
        lab.path(),
        &[
            drive("vda", &new("a"), "qcow2"),
            words(&[
                "-blockdev",
                &no_id,
                "-device",
                "virtio-blk-pci,drive=b-node",
            ]),
            words(&["-blockdev", &shared]),
            words(&["-device", "virtio-blk-pci,id=vdc,drive=c-node,share-rw=on"]),
            words(&["-blockdev", &read_only]),
            words(&["-device", "virtio-blk-pci,id=vdd,drive=d-node"]),
            words(&["-blockdev", &removable, "-device", "virtio-scsi-pci"]),
            words(&["-device", "scsi-cd,id=cd,drive=e-node"]),
            words(&["-machine", "nvdimm=on", "-m", "64,slots=1,maxmem=128M"]),
            words(&["-object", &persistent]),
            words(&["-device", "nvdimm,id=nv0,memdev=pm"]),
        ],
    );
    let target = vm.target();
    let ran = lab.forerun(&["inspect", &target, "--as", "vm"]).ended(7);
    let left = ran.at("/targets/0/machine/left_out").as_array().unwrap();
    let find = |device: &str| {
        let found = left.iter().find(|it| {
            let name = it["device"].as_str().unwrap();
            name.split('/').any(|part| part.starts_with(device))
        });
        found.unwrap_or_else(|| panic!("{device}: {left:?}"))
    };
    let anonymous = find("device[");
    for (left, reason, refused) in [
        (anonymous, "give it one", true),
        (find("vdc"), "share-rw", true),
        (find("vdd"), "read-only", false),
        (find("cd"), "", false),
        (find("nv0"), "persistent memory", true),
    ] {
        assert!(left["reason"].as_str().unwrap().contains(reason), "{left}");
        assert_eq!(left["refused"], refused, "{left}");
    }
    let disks = ran.at("/targets/0/machine/disks").as_array().unwrap();
    assert_eq!(disks.len(), 1, "{disks:?}");

    let backup = ["backup", &target, "--as", "vm"];
    lab.forerun(&backup)
        .failed(7, "cannot be backed up", "--exclude");
    // By the names that are shown.
    let (no_id, shared) = (
        anonymous["device"].as_str().unwrap().to_owned(),
        find("vdc")["device"].as_str().unwrap().to_owned(),
    );
    let memory = [&backup[..], &["--exclude", "nv0"]].concat();
    let one = [&memory[..], &["--exclude", &no_id]].concat();
    lab.forerun(&one).failed(7, "share-rw", "--exclude");
    let both = [&one[..], &["--exclude", &shared]].concat();
    let ran = lab.forerun(&both).ended(0);
    assert_eq!(ran.at("/targets/0/point/disks/0/key"), "vda");
    // And it is said what a restore is without.
    let list = lab.forerun(&["list"]).ended(0);
    let without = list.at("/points/0/without").as_array().unwrap();
    for name in [&no_id, &shared, "nv0"] {
        assert!(without.iter().any(|it| it == name), "{name}: {without:?}");
    }
    assert_eq!(without.len(), 3, "{without:?}");
    let only = [&backup[..], &["--include", "vda"]].concat();
    lab.forerun(&only).ended(0);
    for option in ["--include", "--exclude"] {
        let unknown = [&backup[..], &[option, "vdz"]].concat();
        lab.forerun(&unknown).failed(2, "no disk `vdz`", "vda");
    }
}

#[test]
fn a_target_that_cannot_be_reached_is_told_soon() {
    let lab = Lab::new();
    let a = image(lab.path(), "a", "qcow2", 4 * MIB);
    let vm = Still::start(lab.path(), &[drive("vda", &a, "qcow2")]);
    let target = vm.target();
    let other = Qmp::connect(&lab.path().join("qmp.sock"), WAIT).unwrap();
    let begin = Instant::now();
    lab.forerun(&["backup", &target, "--as", "vm"])
        .failed(6, "qmp.sock", "a socket of its own");
    let took = begin.elapsed().as_secs();
    assert!((4..12).contains(&took), "{took} s");
    drop(other);
    lab.forerun(&["backup", &target, "--as", "vm"]).ended(0);
    vm.quit();
    for command in ["backup", "inspect", "track", "status"] {
        lab.forerun(&[command, &target, "--as", "vm"])
            .failed(1, "qmp.sock", "is the VM running");
        // Another place than this machine's libvirt, which may be there.
        let words = [
            command,
            "web-1",
            "--connect",
            "qemu:///system?socket=/nowhere",
        ];
        let (code, what) = if cfg!(feature = "libvirt") {
            (1, "/nowhere")
        } else {
            (2, "web-1")
        };
        lab.forerun(&words).failed(code, what, "qmp:SOCKET");
    }
    lab.forerun(&["backup", "disk:/nowhere/x.qcow2", "--as", "vm"])
        .failed(1, "/nowhere/x.qcow2", "");
}

#[test]
fn a_disk_with_read_errors_is_not_fleeced_unless_that_is_asked_for() {
    let lab = Lab::new();
    let a = lab.path().join("a.raw");
    let bytes = noise(24 * MIB);
    std::fs::write(&a, &bytes).unwrap();
    let bad =
        json!({ "event": "none", "iotype": "read", "errno": 5, "sector": (8 * MIB + 65536) / 512 });
    let node = json!({ "driver": "raw", "node-name": "vda-node", "file": {
        "driver": "blkdebug", "inject-error": [bad],
        "image": { "driver": "file", "filename": a },
    }});
    let device = ["-device", "virtio-blk-pci,id=vda,drive=vda-node"];
    let drives = [words(&["-blockdev", &node.to_string()]), words(&device)];
    let mut vm = Still::start(lab.path(), &drives);
    let target = vm.target();
    let backup = ["backup", &target, "--as", "vm"];
    lab.forerun(&["precopy", &target, "--as", "vm"])
        .failed(1, "read disk `vda`", "");
    // It is remembered from run to run.
    for _ in 0..2 {
        lab.forerun(&backup)
            .failed(7, "disk `vda` could not be read", "--freeze fleece");
    }
    lab.forerun(&[&backup[..], &["--freeze", "fleece"]].concat())
        .failed(1, "read disk `vda`", "");
    vm.is_clean();
    vm.quit();
    // Repaired; only a read of all of it shows that.
    let vm = Still::start(lab.path(), &[drive("vda", &a, "raw")]);
    lab.forerun(&backup)
        .failed(7, "could not be read", "precopy");
    lab.forerun(&["precopy", &target, "--as", "vm"]).ended(0);
    let ran = lab.forerun(&backup).ended(0);
    lab.same(&ran.point(), &[("vda", &bytes)]);
    drop(vm);
}

#[test]
fn a_disk_that_reports_write_errors_is_not_fleeced_unless_that_is_asked_for() {
    let lab = Lab::new();
    let a = image(lab.path(), "a", "qcow2", 4 * MIB);
    let mut words = drive("vda", &a, "qcow2");
    words.last_mut().unwrap().push_str(",werror=report");
    let mut vm = Still::start(lab.path(), &[words]);
    vm.io("vda", "write -P 5 0 1M");
    let target = vm.target();
    let backup = ["backup", &target, "--as", "vm"];
    lab.forerun(&backup)
        .failed(7, "werror=report", "--freeze fleece");
    for method in ["snapshot", "fleece"] {
        lab.forerun(&[&backup[..], &["--freeze", method]].concat())
            .ended(0);
        vm.is_clean();
    }
}
