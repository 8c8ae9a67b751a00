//! Images of VMs that are off.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::lab::{KIB, Lab, MIB, Model, Still, drive, image, qemu_img, random_image, until};

/// Writes to an image as somebody would who has it open for a moment.
fn qemu_io(format: &str, path: &std::path::Path, line: &str) {
    let output = Command::new("qemu-io")
        .args(["-f", format, "-c", line])
        .arg(path)
        .output()
        .unwrap();
    assert!(output.status.success(), "qemu-io {line}: {output:?}");
}

#[test]
fn an_image_goes_on_from_its_bitmap_on_and_off() {
    let lab = Lab::new();
    let a = image(lab.path(), "web.qcow2", "qcow2", 16 * MIB);
    let mut model = Model::zeros(16 * MIB);
    let off = format!("disk:vda={}", a.display());
    let backup = |target: &str| lab.forerun(&["backup", target, "--as", "web"]).ended(0);
    let mut change = |at: u64, byte: u8| {
        qemu_io("qcow2", &a, &format!("write -P {byte} {at} 1M"));
        model.fill(at, MIB, byte);
        model.0.clone()
    };
    change(0, 0x10);
    let held = change(4 * MIB, 0x11);
    let ran = backup(&off).rescanned(&[]);
    assert_eq!(ran.at("/targets/0/point/quiesce"), "offline");
    lab.same(&ran.point(), &[("vda", &held)]);

    let held = change(6 * MIB, 0x12);
    let ran = backup(&off).rescanned(&[]);
    assert!(ran.residual() <= MIB + 64 * KIB, "{}", ran.json);
    lab.same(&ran.point(), &[("vda", &held)]);

    // The same disk in its VM, and off again.
    let mut vm = Still::start(lab.path(), &[drive("vda", &a, "qcow2")]);
    model.0 = held;
    model.write(&mut vm, "vda", 8 * MIB, MIB, 0x13);
    let ran = backup(&vm.target()).rescanned(&[]);
    assert!(ran.residual() <= MIB + 64 * KIB, "{}", ran.json);
    lab.same(&ran.point(), &[("vda", &model.0)]);
    lab.forerun(&["backup", &off, "--as", "web"])
        .failed(6, "lock", "qmp:SOCKET");
    model.write(&mut vm, "vda", 9 * MIB, MIB, 0x14);
    vm.quit();
    let ran = backup(&off).rescanned(&[]);
    assert!(ran.residual() <= MIB + 64 * KIB, "{}", ran.json);
    lab.same(&ran.point(), &[("vda", &model.0)]);
    let listed = lab.forerun(&["list", "web"]).ended(0);
    let points = listed.json.to_string().matches("crash-consistent").count();
    assert_eq!(points, 1, "four points of one target: {}", listed.json);

    // Without a name of its own the disk is called as its file.
    let ran = lab
        .forerun(&["backup", &format!("disk:{}", a.display())])
        .ended(0);
    assert_eq!(ran.at("/targets/0/point/disks/0/key"), "web");
}

#[test]
fn a_raw_image_is_read_in_short_holds() {
    let lab = Lab::new();
    let (a, mut bytes) = random_image(lab.path(), "a.raw", "raw", 96 * MIB);
    let off = format!("disk:vda={}", a.display());
    let words = ["backup", &off, "--as", "web", "--rate", "12MiB/s"];
    let state = lab.path().join("state/web");
    let daemon = || {
        let entries = fs::read_dir(&state).unwrap();
        let name = |entry: std::io::Result<fs::DirEntry>| entry.unwrap().file_name();
        entries
            .map(name)
            .any(|name| name.to_string_lossy().ends_with(".qsd"))
    };
    let mut run = lab.begin(&words);
    // While it runs, nobody holds the image again and again: a VM that starts waits for seconds at most.
    let (mut had, mut lost) = (0, Instant::now());
    let mut longest = Duration::ZERO;
    let mut held = false;
    while run.is_running() {
        let holds = lab.path().join("state/web").exists() && daemon();
        if held && !holds {
            had += 1;
        }
        if !holds {
            lost = Instant::now();
        }
        held = holds;
        longest = longest.max(lost.elapsed());
        std::thread::sleep(Duration::from_millis(1));
    }
    let ran = run.end().ended(0).rescanned(&[]);
    assert!(had >= 3, "in {had} holds");
    assert!(longest < Duration::from_secs(10), "{longest:?}");
    // Proofs of one hold count in the next: nothing is read again at the end.
    assert!(ran.precopied() >= 96 * MIB, "{}", ran.json);
    assert!(ran.residual() <= MIB, "{}", ran.json);
    lab.same(&ran.point(), &[("vda", &bytes)]);

    // Somebody writes while nobody holds it: what was read before counts no more.
    let mut run = lab.begin(&words);
    until("a hold", daemon);
    std::thread::sleep(Duration::from_secs(4));
    let file = fs::File::options().write(true).open(&a).unwrap();
    file.write_all_at(&[0x5a; 4096], 0).unwrap();
    bytes[..4096].fill(0x5a);
    assert!(run.is_running());
    let ran = run.end().done();
    let reason = ran.at("/targets/0/point/rescanned/0/reason").to_string();
    assert!(reason.contains("bitmap"), "{reason}");
    lab.same(&ran.point(), &[("vda", &bytes)]);
}

#[test]
fn a_small_raw_image_and_one_that_a_vm_uses() {
    let lab = Lab::new();
    let (a, bytes) = random_image(lab.path(), "a.raw", "raw", 3 * MIB + 4096);
    let off = format!("disk:vda={}", a.display());
    let ran = lab.forerun(&["backup", &off, "--as", "web"]).ended(0);
    lab.same(&ran.point(), &[("vda", &bytes)]);
    let ran = lab.forerun(&["backup", &off, "--as", "web"]).ended(0);
    let ran = ran.rescanned(&[("vda", "no bitmap has followed it")]);
    lab.same(&ran.point(), &[("vda", &bytes)]);
    assert!(ran.at("/targets/0/point/bytes/stored").as_u64() < Some(MIB));
    let vm = Still::start(lab.path(), &[drive("vda", &a, "raw")]);
    lab.forerun(&["backup", &off, "--as", "web"])
        .failed(6, "lock", "qmp:SOCKET");
    vm.quit();
    qemu_img(&["info", a.to_str().unwrap()]);
}

#[test]
fn an_image_is_copied_ahead_without_being_watched() {
    let lab = Lab::new();
    let a = image(lab.path(), "web.qcow2", "qcow2", 64 * MIB);
    let off = format!("disk:vda={}", a.display());
    lab.forerun(&["backup", &off, "--as", "web"]).ended(0);
    qemu_io("qcow2", &a, "write -P 7 0 32M");
    // Of as much time a part would be for watching what changes.
    let due = jiff::Timestamp::now() + Duration::from_secs(20);
    let words = ["run", &off, "--as", "web", "--at", &due.to_string(), "-vv"];
    let ran = lab.forerun(&words).ended(0);
    let copied = ran.at("/targets/0/point/bytes/precopied");
    assert_eq!(copied.as_u64(), Some(32 * MIB), "{}", ran.json);
    // Each step opens the image anew.
    let steps = ran.words.matches("ahead step=").count();
    assert!((1..40).contains(&steps), "{steps} steps: {}", ran.words);
    let held = [vec![7; 32 << 20], vec![0; 32 << 20]].concat();
    lab.same(&ran.point(), &[("vda", &held)]);
}
