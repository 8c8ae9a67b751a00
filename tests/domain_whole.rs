//! A whole domain: UEFI variables, TPM state, boot files and definition are in the point beside the disks, and a restore with
//! `--define` gives a domain that boots, as another VM or as the same. Passwords of consoles are in encrypted repositories only.
#![cfg(feature = "libvirt")]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]

mod domain_common;
mod vm_common;

use std::os::unix::fs::PermissionsExt;
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
/// Of the console.
const PASSWORD: &str = "s3cr3t-w";
/// How an operator may have made an image: nothing of it is the default.
const OPTIONS: &str =
    "cluster_size=32k,extended_l2=on,lazy_refcounts=on,refcount_bits=32,compression_type=zstd";

fn lab(name: &str, image: &Path) -> Lab {
    Lab::boot_with(name, |builder| {
        let program = Program::Stamp("--span 8 --rate 100 /dev/vda /dev/vdb".to_owned());
        let console = format!(
            "<graphics type='vnc' port='-1' listen='127.0.0.1' passwd='{PASSWORD}'/><video><model type='none'/></video>"
        );
        builder
            .devices(&console)
            .disk(Disk::qcow2("vda", 16 * MIB).image(image).iothread(true))
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

/// Starts a restored domain: the guest comes up and goes on with its stamps, as its console's file has it.
fn boots(lab: &Lab, domain: &str, console: &str) {
    std::fs::write(lab.path(console), b"").unwrap();
    lab.domain.virsh(&["start", domain]).unwrap();
    for (words, within) in [("stamp: resume after seq", BOOT), ("stamp: running", WAIT)] {
        lab.domain.wait_for_on(console, words, within).unwrap();
    }
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
    let image = image_with_options();
    let mut lab = lab("whole", image.path());
    let (name, uuid) = (lab.name(), lab.uuid().to_owned());
    answers(&lab, &name);
    let backup = lab.backup(&["-vv"]).done();
    lab.is_clean();
    let warnings = backup.json["warnings"].to_string();
    assert!(warnings.contains("without its passwords"), "{warnings}");
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

    beside_each_other(&mut lab, &point, (&nvram, &state));
    let kept = kept_in_an_encrypted_repository(&mut lab);

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
    assert!(twin.contains("type='vnc'"), "{twin}");
    let warnings = made.json["warnings"].to_string();
    assert!(warnings.contains("without its passwords"), "{warnings}");
    assert_eq!(
        options(&clone.join("vda.qcow2")),
        options(image.path()),
        "of the restored image"
    );
    assert_eq!(std::fs::read(clone.join("nvram")).unwrap(), nvram);
    assert_eq!(std::fs::read(tpm(other)).unwrap(), state);
    let first = exact(&clone);
    assert!(first > 0);
    // Not where the original writes.
    boots(&lab, "twin", "serial.log.twin");
    assert!(exact(&clone) > first);

    // What runs is as it was; a point of it while it is off has no live definition.
    let off = lab.backup(&[]).done();
    let files = ["domain.xml", "initrd", "kernel", "nvram", "tpm2-00.permall"];
    assert_eq!(names(&off.json["targets"][0]["point"]["files"]), files);
    let point = off.point();
    let before = show(&lab, &name);
    lab.domain.virsh(&["undefine", "twin", "--nvram"]).unwrap();
    with_its_password(&mut lab, &kept);
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
    boots(&lab, &name, "serial.log");

    lab.domain.virsh(&["undefine", &name, "--nvram"]).unwrap();
    not_taken(&mut lab, &point);
    lab.run(&["verify"]).code(0);
}

/// An image that an operator made in a way of his own.
fn image_with_options() -> tempfile::NamedTempFile {
    let image = tempfile::Builder::new()
        .suffix(".qcow2")
        .tempfile_in(domain_common::base())
        .unwrap();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", OPTIONS])
        .arg(image.path())
        .arg((16 * MIB).to_string())
        .status();
    assert!(made.unwrap().success());
    image
}

/// The files of a point without libvirt.
fn beside_each_other(lab: &mut Lab, point: &str, (nvram, state): (&Vec<u8>, &Vec<u8>)) {
    let name = lab.name();
    let plain = lab.path("plain");
    let to = plain.display().to_string();
    lab.run(&["restore", point, "--output", &to]).done();
    assert_eq!(std::fs::read(plain.join("nvram")).unwrap(), *nvram);
    assert_eq!(
        std::fs::read(plain.join("tpm2-00.permall")).unwrap(),
        *state
    );
    let xml = std::fs::read_to_string(plain.join("domain.xml")).unwrap();
    assert_eq!(xml.trim_end(), show(lab, &name).trim_end());
    // A password has nothing to do in a repository that whoever has it can read.
    assert!(xml.contains("type='vnc'"), "{xml}");
    is_told_nowhere(lab, &plain);
    std::fs::remove_dir_all(&plain).unwrap();
    lab.run(&["restore", point, "--output", &to, "--disk-only"])
        .done();
    assert_eq!(std::fs::read_dir(&plain).unwrap().count(), 2);
}

/// How an image was made.
fn options(image: &Path) -> Value {
    let output = Command::new("qemu-img")
        .args(["info", "-U", "--output=json"])
        .arg(image)
        .output()
        .unwrap();
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let mut said = info["format-specific"]["data"].clone();
    let said = said.as_object_mut().unwrap();
    said.remove("bitmaps");
    said.remove("corrupt");
    assert_eq!(said["extended-l2"], true, "{info}");
    assert_eq!(said["lazy-refcounts"], true, "{info}");
    json!([info["cluster-size"], said])
}

/// All files under a directory.
fn files(directory: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// The password is in no report, no log, no state and none of these restored files.
fn is_told_nowhere(lab: &Lab, restored: &Path) {
    let is_run = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.starts_with("run-")
    };
    let mut all: Vec<PathBuf> = files(&lab.path("")).into_iter().filter(is_run).collect();
    assert!(all.len() > 4, "{all:?}");
    all.extend(files(&lab.path("state")));
    all.extend(files(restored));
    for file in all {
        let bytes = std::fs::read(&file).unwrap();
        let found = bytes
            .windows(PASSWORD.len())
            .any(|part| part == PASSWORD.as_bytes());
        assert!(!found, "the password is in {}", file.display());
    }
}

/// A point in another repository, which is encrypted.
struct Kept {
    repo: PathBuf,
    key: String,
    point: String,
}

fn kept_in_an_encrypted_repository(lab: &mut Lab) -> Kept {
    let (repo, key) = (lab.path("encrypted"), lab.path("key").display().to_string());
    let shown = repo.display().to_string();
    lab.run(&["key", "generate", &key]).done();
    lab.run(&["init", &shown, "--encrypt", "--key-file", &key])
        .done();
    let first = std::mem::replace(&mut lab.repo, repo.clone());
    let backup = lab.backup(&["-vv", "--key-file", &key]).done();
    let warnings = backup.json["warnings"].to_string();
    assert!(!warnings.contains("password"), "{warnings}");
    let point = backup.point();
    lab.run(&["show", &point, "-vv", "--key-file", &key]).done();
    // Neither the repository nor what is told of it says it.
    is_told_nowhere(lab, &repo);
    // In a copy that is not encrypted it is for the owner alone, as all there.
    let copy = lab.path("copy");
    let copied = copy.display().to_string();
    lab.run(&["init", &copied]).done();
    lab.run(&["copy", &point, "--to", &copied, "--key-file", &key])
        .code(0);
    for file in files(&copy) {
        let mode = std::fs::metadata(&file).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "{}", file.display());
    }
    let mode = std::fs::metadata(&copy).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0);
    lab.repo = first;
    Kept { repo, key, point }
}

/// The restored domain has its password, which is its owner's alone to read.
fn with_its_password(lab: &mut Lab, kept: &Kept) {
    let to = lab.path("kept");
    let shown = to.display().to_string();
    let first = std::mem::replace(&mut lab.repo, kept.repo.clone());
    let restore = ["restore", &kept.point, "--key-file", &kept.key];
    let define = ["--define", "--name", "kept", "--output", &shown];
    let made = lab.run(&[&restore[..], &define].concat()).code(0);
    assert_eq!(made.json["warnings"], json!([]), "{made:#?}");
    lab.repo = first;
    let secure = ["dumpxml", "kept", "--inactive", "--security-info"];
    let defined = lab.domain.virsh(&secure).unwrap();
    assert!(
        defined.contains(&format!("passwd='{PASSWORD}'")),
        "{defined}"
    );
    let beside = to.join("domain.xml");
    let meta = std::fs::metadata(&beside).unwrap();
    assert_eq!(meta.permissions().mode() & 0o777, 0o600);
    assert!(
        std::fs::read_to_string(beside).unwrap().contains(PASSWORD),
        "of the definition beside the disks"
    );
    assert!(options(&to.join("vda.qcow2")).is_array());
    lab.domain.virsh(&["undefine", "kept", "--nvram"]).unwrap();
    std::fs::remove_dir_all(to).unwrap();
}

/// A definition that libvirt does not take: all is there, and the way on is told.
fn not_taken(lab: &mut Lab, point: &str) {
    let bad = lab.path("bad");
    let to = bad.display().to_string();
    let define = |lab: &mut Lab, name: &str| {
        lab.run(&[
            "restore", point, "--define", "--output", &to, "--name", name,
        ])
    };
    // What can be known beforehand is told before a byte is written.
    define(lab, "a/b").code(2);
    assert!(!bad.exists());
    // No file of the definition can be called so.
    let refused = define(lab, &"n".repeat(252)).code(1);
    assert!(refused.json.to_string().contains("virsh"), "{refused:#?}");
    assert!(bad.join("domain.xml").exists() && bad.join("vdb.raw").exists());
    assert_eq!(refused.json["domain"]["defined"], json!(false));
}
