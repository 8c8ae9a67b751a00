//! A whole domain: UEFI variables, TPM state, boot files and definition are in the point beside the disks, and a restore with
//! `--define` gives a domain that boots, as another VM or as the same.
#![cfg(feature = "libvirt")]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]

mod domain_common;
mod vm_common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::PoisonError;
use std::time::Duration;

use domain_common::{ALONE, Lab, home};
use forerun_rig::block::RawFile;
use forerun_rig::guest::{Disk, Program};
use forerun_rig::stamp::{Verdict, check};
use serde_json::{Value, json};
use vm_common::{MIB, WAIT, wait_for};

/// How long firmware and kernel may take on a starved machine without KVM.
const BOOT: Duration = Duration::from_secs(400);

const MAC: &str = "52:54:00:aa:bb:cc";

fn lab(name: &str) -> Lab {
    Lab::boot_with(name, |builder| {
        let program = Program::Stamp("--span 8 --rate 100 /dev/vda /dev/vdb".to_owned());
        builder
            .disk(Disk::qcow2("vda", 16 * MIB).iothread(true))
            .disk(Disk::raw("vdb", 16 * MIB))
            .program(program)
            .memory_mib(256)
            .agent(true)
            .uefi()
            .tpm()
            .interface(MAC)
    })
}

/// The state of the TPM of a UUID, by libvirt's own place for it.
fn tpm(uuid: &str) -> PathBuf {
    home().join(format!("lib/swtpm/{uuid}/tpm2/tpm2-00.permall"))
}

fn show(lab: &Lab, domain: &str) -> String {
    lab.domain
        .virsh(&["dumpxml", domain, "--inactive"])
        .unwrap()
}

fn text<'a>(xml: &'a str, before: &str, after: &str) -> &'a str {
    let rest = xml.split_once(before).unwrap().1;
    rest.split_once(after).unwrap().0
}

/// The guest's agent answers.
fn answers(lab: &Lab, domain: &str) {
    let ping = ["qemu-agent-command", domain, r#"{"execute":"guest-ping"}"#];
    wait_for("the agent does not answer", || {
        lab.domain.virsh(&ping).is_ok()
    });
}

/// Starts a restored domain: the guest comes up and goes on with its stamps. Its console is the original's file.
fn boots(lab: &Lab, domain: &str) {
    std::fs::write(lab.path("serial.log"), b"").unwrap();
    lab.domain.virsh(&["start", domain]).unwrap();
    lab.domain
        .wait_for("stamp: resume after seq", BOOT)
        .unwrap();
    lab.domain.wait_for("stamp: running", WAIT).unwrap();
    answers(lab, domain);
    lab.domain.virsh(&["destroy", domain]).unwrap();
}

/// The two images of a directory are after one write.
fn exact(directory: &Path) -> u64 {
    let raw = directory.join("vda.as-raw");
    let convert = Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .arg(directory.join("vda.qcow2"))
        .arg(&raw)
        .status();
    assert!(convert.unwrap().success());
    let images = [raw.clone(), directory.join("vdb.raw")].map(|path| RawFile::open(&path).unwrap());
    std::fs::remove_file(raw).unwrap();
    match check(&[&images[0], &images[1]]).unwrap() {
        Verdict::Exact(step) => step,
        other => panic!("{other:?}"),
    }
}

/// The names of a point's files.
fn names(files: &Value) -> Vec<&str> {
    let files = files.as_array().unwrap().iter();
    let mut names: Vec<&str> = files.map(|file| file["name"].as_str().unwrap()).collect();
    names.sort_unstable();
    names
}

#[test]
fn a_whole_domain_comes_back_as_another_and_as_the_same() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = lab("whole");
    let (name, uuid) = (lab.name(), lab.uuid().to_owned());
    answers(&lab, &name);
    let backup = lab.backup(&[]).done();
    lab.is_clean();
    let point = backup.point();
    let files = [
        "domain-live.xml",
        "domain.xml",
        "initrd",
        "kernel",
        "nvram",
        "tpm2-00.permall",
    ];
    assert_eq!(names(&backup.json["targets"][0]["point"]["files"]), files);
    let shown = lab.run(&["show", &point]).done();
    assert_eq!(names(&shown.json["point"]["files"]), files);
    assert_eq!(shown.json["point"]["disks"].as_array().unwrap().len(), 2);
    let domain = &shown.json["point"]["machine"]["domain"];
    assert_eq!(domain["persistent"], true);
    assert_eq!(domain["loader"]["path"], "/usr/share/OVMF/OVMF_CODE_4M.fd");
    assert_eq!(domain["loader"]["sha256"].as_str().unwrap().len(), 64);

    // As it was at the backup.
    let nvram = std::fs::read(home().join(format!("lib/qemu/nvram/{name}_VARS.fd"))).unwrap();
    let state = std::fs::read(tpm(&uuid)).unwrap();
    assert!(nvram.len() > 4096 && state.len() > 100);

    // Beside each other, without libvirt.
    let plain = lab.path("plain");
    let to = plain.display().to_string();
    lab.run(&["restore", &point, "--output", &to]).done();
    assert_eq!(std::fs::read(plain.join("nvram")).unwrap(), nvram);
    assert_eq!(std::fs::read(plain.join("tpm2-00.permall")).unwrap(), state);
    let xml = std::fs::read_to_string(plain.join("domain.xml")).unwrap();
    assert_eq!(xml.trim_end(), show(&lab, &name).trim_end());
    std::fs::remove_dir_all(&plain).unwrap();
    lab.run(&["restore", &point, "--output", &to, "--disk-only"])
        .done();
    assert_eq!(std::fs::read_dir(&plain).unwrap().count(), 2);

    // Refused before a byte is written.
    let clone = lab.path("clone");
    let to = clone.display().to_string();
    let define = ["restore", &point, "--define", "--output", &to];
    let refused = lab.run(&define).code(1);
    assert!(refused.json.to_string().contains("--name"), "{refused:#?}");
    lab.run(&[&define[..], &["--name", "x", "--same-identity"]].concat())
        .code(1);
    assert!(!clone.exists());

    // Another VM.
    lab.domain.destroy().unwrap();
    let made = lab.run(&[&define[..], &["--name", "twin"]].concat()).done();
    let twin = show(&lab, "twin");
    let other = text(&twin, "<uuid>", "</uuid>");
    assert_eq!(made.json["domain"]["uuid"], other);
    assert_ne!(other, uuid);
    assert!(!twin.contains(MAC), "{twin}");
    assert_eq!(twin.matches("<mac address='52:54:00:").count(), 1);
    for file in ["vda.qcow2", "vdb.raw", "nvram", "kernel", "initrd"] {
        assert!(twin.contains(&format!("{to}/{file}")), "{file}: {twin}");
    }
    assert_eq!(std::fs::read(clone.join("nvram")).unwrap(), nvram);
    assert_eq!(std::fs::read(tpm(other)).unwrap(), state);
    let first = exact(&clone);
    assert!(first > 0);
    boots(&lab, "twin");
    assert!(exact(&clone) > first);

    // What runs is as it was; a point of it while it is off has no live definition.
    let off = lab.backup(&[]).done();
    let files = ["domain.xml", "initrd", "kernel", "nvram", "tpm2-00.permall"];
    assert_eq!(names(&off.json["targets"][0]["point"]["files"]), files);
    let point = off.point();
    let before = show(&lab, &name);
    lab.domain.virsh(&["undefine", "twin", "--nvram"]).unwrap();
    lab.domain.virsh(&["undefine", &name, "--nvram"]).unwrap();
    assert!(!tpm(&uuid).exists());

    // The same VM.
    let again = lab.path("again");
    let to = again.display().to_string();
    let define = [
        "restore",
        &point,
        "--define",
        "--same-identity",
        "--output",
        &to,
    ];
    let made = lab.run(&define).done();
    assert_eq!(made.json["domain"]["uuid"], uuid.as_str());
    let after = show(&lab, &name);
    assert!(after.contains(MAC), "{after}");
    assert_eq!(
        text(&after, "<uuid>", "</uuid>"),
        text(&before, "<uuid>", "</uuid>")
    );
    assert!(exact(&again) > first);
    boots(&lab, &name);

    lab.domain.virsh(&["undefine", &name, "--nvram"]).unwrap();
    not_taken(&mut lab, &point);
    lab.run(&["verify"]).code(0);
}

/// A definition that libvirt does not take: all is there, and the way on is told.
fn not_taken(lab: &mut Lab, point: &str) {
    let bad = lab.path("bad");
    let to = bad.display().to_string();
    let define = [
        "restore", point, "--define", "--output", &to, "--name", "a/b",
    ];
    let refused = lab.run(&define).code(1);
    assert!(refused.json.to_string().contains("virsh"), "{refused:#?}");
    assert!(bad.join("domain.xml").exists() && bad.join("vdb.raw").exists());
    assert_eq!(refused.json["domain"]["defined"], json!(false));
}
