//! Restores that cannot end well are refused before a byte is written, and what was damaged never looks restored.

use std::fs;
use std::process::Command;

use crate::lab::{Lab, MIB, Still, compare, drive, qemu_img, random_image};

#[test]
fn a_restore_is_planned_before_it_writes_and_leaves_no_wrong_image() {
    let lab = Lab::new();
    let (a, vda) = random_image(lab.path(), "a.qcow2", "qcow2", 6 * MIB);
    let (b, vdb) = random_image(lab.path(), "b.raw", "raw", 3 * MIB);
    let words = [drive("vda", &a, "qcow2"), drive("vdb", &b, "raw")];
    let vm = Still::start(lab.path(), &words);
    let ran = lab
        .forerun(&["backup", &vm.target(), "--as", "vm"])
        .ended(0);
    let point = ran.point();
    lab.same(&point, &[("vda", &vda), ("vdb", &vdb)]);
    let path = |name: &str| lab.path().join(name);
    let to = |disk: &str, name: &str| format!("{disk}={}", path(name).display());
    let restore = |words: &[&str]| lab.forerun(&[&["restore", &point], words].concat());

    // One that exists: neither it nor the other is touched.
    fs::write(path("here"), b"precious").unwrap();
    let (new, here) = (to("vda", "new"), to("vdb", "here"));
    restore(&["--disk", &new, "--disk", &here]).failed(1, "exists already", "--force");
    assert_eq!(fs::read(path("here")).unwrap(), b"precious");
    assert!(!path("new").exists());
    restore(&["--disk", &to("vdz", "new")]).failed(2, "no disk `vdz`", "vda, vdb");
    assert!(!path("new").exists());
    // One path for two, however it is spelled.
    let spelled = format!("vdb={}/state/../new", lab.path().display());
    for other in [to("vdb", "new"), spelled] {
        restore(&["--disk", &new, "--disk", &other]).failed(2, "two disks would go to", "");
        assert!(!path("new").exists());
    }
    restore(&["--disk", &format!("vda={}", lab.path().display())]).failed(2, "no file", "");
    // The VM's own image, which it has open.
    restore(&["--force", "--disk", &format!("vda={}", a.display())]).failed(
        6,
        "is in use",
        "stop the VM",
    );

    // Both formats hold the same; one disk only.
    restore(&["--disk", &to("vdb", "b.qcow2-back"), "--format", "qcow2"]).ended(0);
    let (image, raw) = (path("b.qcow2-back"), path("b-back"));
    let (image, raw) = (image.to_str().unwrap(), raw.to_str().unwrap());
    qemu_img(&["check", "-q", image]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", image, raw]);
    compare("qcow2", &fs::read(raw).unwrap(), &vdb);
    let all = lab.restore_all(&point);
    compare("vda", &fs::read(all.join("vda.raw")).unwrap(), &vda);
    compare("vdb", &fs::read(all.join("vdb.raw")).unwrap(), &vdb);

    // An object is gone.
    let pack = largest(&lab.repo().join("packs"));
    fs::remove_file(&pack).unwrap();
    for format in ["raw", "qcow2"] {
        let words = ["--disk", &new, "--format", format];
        let ran = restore(&words).failed(5, "vda", "verify");
        let name = pack.file_name().unwrap().to_str().unwrap();
        assert!(ran.words.contains(name), "{}", ran.words);
        assert!(!path("new").exists(), "{format}: a wrong image");
    }
    let ran = lab.forerun(&["verify"]);
    assert_eq!(ran.code, 5, "{}", ran.json);
    assert!(ran.json.to_string().contains(&point), "{}", ran.json);
}

fn largest(directory: &std::path::Path) -> std::path::PathBuf {
    let mut found = Vec::new();
    let mut look = vec![directory.to_owned()];
    while let Some(directory) = look.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                look.push(path);
            } else {
                found.push((fs::metadata(&path).unwrap().len(), path));
            }
        }
    }
    found.into_iter().max().unwrap().1
}

/// A loop device over a file of its own; it goes with the value.
struct Loop(String);

impl Loop {
    fn over(file: &std::path::Path) -> Self {
        let words = ["--find", "--show"];
        let output = Command::new("losetup").args(words).arg(file).output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "needs loop devices: {said}");
        Self(String::from_utf8(output.stdout).unwrap().trim().to_owned())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup").args(["-d", &self.0]).status().ok();
    }
}

/// A mounted file system; unmounted with the value.
struct Mounted<'a>(&'a str);

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        Command::new("umount").arg(self.0).status().ok();
    }
}

#[test]
fn a_block_device_is_written_whole_and_only_when_nobody_uses_it() {
    let lab = Lab::new();
    let (a, mut vda) = random_image(lab.path(), "a.qcow2", "qcow2", 6 * MIB);
    let mut vm = Still::start(lab.path(), &[drive("vda", &a, "qcow2")]);
    vm.io("vda", "write -z 1m 2m");
    vda[1 << 20..3 << 20].fill(0);
    let words = ["backup", &vm.target(), "--as", "vm"];
    let point = lab.forerun(&words).ended(0).point();
    let restore = |to: &str, more: &[&str]| {
        let to = format!("vda={to}");
        lab.forerun(&[&["restore", &point, "--disk", &to], more].concat())
    };
    let backed = |name: &str, size: usize| {
        let path = lab.path().join(name);
        fs::write(&path, vec![0xee; size]).unwrap();
        path
    };

    let small = backed("small", (6 << 20) - 4096);
    {
        let device = Loop::over(&small);
        restore(&device.0, &["--force"]).failed(1, "needs 6 MiB", "");
    }
    assert!(fs::read(&small).unwrap().iter().all(|byte| *byte == 0xee));

    let large = backed("large", 8 << 20);
    let device = Loop::over(&large);
    restore(&device.0, &[]).failed(1, "exists already", "--force");
    restore(&device.0, &["--force", "--format", "qcow2"]).failed(2, "restore it as raw", "");
    assert!(fs::read(&large).unwrap().iter().all(|byte| *byte == 0xee));
    let made = Command::new("mkfs.ext4").args(["-q", &device.0]).status();
    assert!(made.unwrap().success());
    let place = lab.path().join("mounted");
    fs::create_dir(&place).unwrap();
    let place = place.to_str().unwrap();
    let mounted = Command::new("mount").args([&device.0, place]).status();
    assert!(mounted.unwrap().success());
    let mounted = Mounted(place);
    restore(&device.0, &["--force"]).failed(6, "is in use", "unmount");
    drop(mounted);

    fs::write(&device.0, vec![0xee; 8 << 20]).unwrap();
    restore(&device.0, &["--force"]).ended(0);
    let found = fs::read(&device.0).unwrap();
    compare("device", &found[..6 << 20], &vda);
    // What lies behind the disk is somebody else's.
    assert!(found[6 << 20..].iter().all(|byte| *byte == 0xee));
}
