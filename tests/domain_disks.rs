//! The kinds of disks that libvirt gives a domain, beside each other in one: each is backed up exactly, in full and then
//! by what changed, or refused with a reason.
#![cfg(feature = "libvirt")]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]
#![expect(clippy::print_stdout, reason = "a line a disk for who reads the log")]

mod domain_common;
mod vm_common;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::PoisonError;
use std::time::Duration;

use domain_common::{ALONE, Lab};
use forerun_rig::guest::{Bus, Disk, Program};
use serde_json::{Value, json};
use vm_common::{MIB, WAIT, wait_for};

const SIZE: u64 = 8 * MIB;

fn run(program: &str, words: &[&str]) -> String {
    let output = Command::new(program).args(words).output().unwrap();
    assert!(output.status.success(), "{program} {words:?}: {output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

/// A loop device; it goes with this.
struct Loop(String);

impl Loop {
    fn over(path: &Path) -> Self {
        run("truncate", &["-s", "12M", path.to_str().unwrap()]);
        Self(run(
            "losetup",
            &["--find", "--show", path.to_str().unwrap()],
        ))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Command::new("losetup")
            .args(["--detach", &self.0])
            .status()
            .ok();
    }
}

/// A server of a network disk; it ends with this.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

/// Runs a shell line in the guest and gives what it printed.
fn in_guest(lab: &Lab, line: &str) -> String {
    let ask = |request: &Value| -> Value {
        let words = [
            "qemu-agent-command",
            lab.domain.name(),
            &request.to_string(),
        ];
        serde_json::from_str(&lab.domain.virsh(&words).unwrap()).unwrap()
    };
    let begun = ask(&json!({ "execute": "guest-exec", "arguments": {
        "path": "/bin/sh", "arg": ["-c", line], "capture-output": true,
    }}));
    let pid = begun["return"]["pid"].clone();
    let mut said = Value::Null;
    wait_for(line, || {
        said = ask(&json!({ "execute": "guest-exec-status", "arguments": { "pid": pid } }));
        said["return"]["exited"] == true
    });
    assert_eq!(said["return"]["exitcode"], 0, "{line}: {said}");
    let out = said["return"]["out-data"].as_str().unwrap_or_default();
    let decoded = Command::new("sh")
        .args(["-c", "printf %s \"$1\" | base64 -d", "sh", out])
        .output()
        .unwrap();
    String::from_utf8(decoded.stdout).unwrap()
}

/// What the guest reads from its disks.
fn sums(lab: &Lab, disks: &[&str]) -> BTreeMap<String, String> {
    let sum = |disk: &&str| {
        let said = in_guest(lab, &format!("sha256sum /dev/by-{disk}"));
        (
            (*disk).to_owned(),
            said.split_whitespace().next().unwrap().to_owned(),
        )
    };
    disks.iter().map(sum).collect()
}

fn write(lab: &Lab, disks: &[&str], at: u64) {
    for disk in disks {
        let write = "dd if=/dev/urandom bs=64k conv=fsync,notrunc";
        in_guest(
            lab,
            &format!("{write} of=/dev/by-{disk} count=9 seek={at} 2>&1"),
        );
    }
}

/// Backs up and compares with what the guest reads.
fn exact(lab: &mut Lab, what: &str, disks: &[&str], more: &[&str]) {
    let expected = sums(lab, disks);
    let backup = lab.backup(more).done();
    assert!(backup.rescanned().is_empty(), "{what}: {backup:#?}");
    let output = lab.path("restored");
    std::fs::remove_dir_all(&output).ok();
    lab.run(&[
        "restore",
        &backup.point(),
        "--output",
        output.to_str().unwrap(),
    ])
    .done();
    for (disk, sum) in &expected {
        let file = output.join(format!("{disk}.raw"));
        let found = run("sha256sum", &[file.to_str().unwrap()]);
        assert_eq!(
            found.split_whitespace().next().unwrap(),
            sum,
            "{what}: {disk}"
        );
    }
    let sata = std::fs::read(output.join("sdb.raw"));
    if let Ok(bytes) = sata {
        let within = |at: usize| (1 << 20..4 << 20).contains(&at);
        let right = |(at, byte): (usize, &u8)| *byte == if within(at) { 9 } else { 0 };
        assert!(bytes.iter().enumerate().all(right), "{what}: sdb");
    }
    println!(
        "{what}: {} disks exact, residual {}",
        disks.len(),
        backup.json["targets"][0]["point"]["bytes"]["residual"]
    );
    lab.is_clean();
}

/// Disks whose key libvirt has, and the formats of their images.
const LUKS: [&str; 2] = ["sdi", "sdj"];
const SECRET: &str = "5ec2e700-0000-4000-8000-000000000001";
/// Where the repository is encrypted.
const KEY: &str = "repository-key";

/// Attaches disks that QEMU decrypts with a secret of libvirt's.
fn attach_encrypted(lab: &Lab) {
    let file = |name: &str| lab.path(name).display().to_string();
    let (secret, value) = (file("secret.xml"), file("secret"));
    let text = format!("<secret private='yes'><uuid>{SECRET}</uuid></secret>");
    std::fs::write(&secret, text).unwrap();
    std::fs::write(&value, "of the disks").unwrap();
    lab.domain.virsh(&["secret-define", &secret]).unwrap();
    let set = ["secret-set-value", SECRET, "--file", &value, "--plain"];
    lab.domain.virsh(&set).unwrap();
    let size = SIZE.to_string();
    for (disk, format, prefix) in [(LUKS[0], "luks", ""), (LUKS[1], "qcow2", "encrypt.")] {
        let image = file(&format!("{disk}.image"));
        let key = format!("secret,id=key,file={value}");
        let of_qcow2 = if format == "qcow2" {
            "encrypt.format=luks,"
        } else {
            ""
        };
        let options = format!("{of_qcow2}{prefix}key-secret=key,{prefix}iter-time=10");
        run(
            "qemu-img",
            &[
                "create", "-q", "--object", &key, "-f", format, "-o", &options, &image, &size,
            ],
        );
        let format = if format == "luks" { "raw" } else { format };
        let xml = lab.path(&format!("{disk}.xml"));
        let text = format!(
            "<disk type='file'><driver name='qemu' type='{format}'/>\
             <source file='{image}'><encryption format='luks'><secret type='passphrase' uuid='{SECRET}'/></encryption></source>\
             <target dev='{disk}' bus='scsi'/><serial>{disk}</serial></disk>"
        );
        std::fs::write(&xml, text).unwrap();
        let xml = xml.display().to_string();
        let attach = [
            "attach-device",
            lab.domain.name(),
            &xml,
            "--live",
            "--config",
        ];
        lab.domain.virsh(&attach).unwrap();
    }
}

/// A repository that is encrypted holds such disks unasked; gives the point.
fn encrypted_repository(lab: &mut Lab, written: &[&str]) -> String {
    let (key, repo) = (lab.path(KEY).display().to_string(), lab.path("encrypted"));
    lab.run(&["key", "generate", &key]).done();
    let shown = repo.display().to_string();
    lab.run(&["init", &shown, "--encrypt", "--key-file", &key])
        .done();
    lab.repo = repo;
    let expected = sums(lab, written);
    let backup = lab.backup(&["--key-file", &key]).done().point();
    let output = lab.path("restored");
    std::fs::remove_dir_all(&output).ok();
    let shown = output.display().to_string();
    lab.run(&["restore", &backup, "--output", &shown, "--key-file", &key])
        .done();
    for disk in LUKS {
        let file = output.join(format!("{disk}.raw"));
        let found = run("sha256sum", &[file.to_str().unwrap()]);
        assert!(found.starts_with(&expected[disk]), "{disk}");
    }
    lab.repo = lab.path("repository");
    backup
}

/// The restored domain's disks are plain, and it is said.
fn restored_without_the_secret(lab: &mut Lab, point: &str) {
    let (key, to) = (lab.path(KEY).display().to_string(), lab.path("defined"));
    let shown = to.display().to_string();
    lab.repo = lab.path("encrypted");
    let define = ["--define", "--name", "plain", "--output", &shown];
    let restore = ["restore", point, "--key-file", &key];
    let made = lab.run(&[&restore[..], &define].concat()).done();
    lab.repo = lab.path("repository");
    let warnings = made.json["warnings"].to_string();
    for disk in LUKS {
        let told = format!("disk {disk} was encrypted by QEMU; the restored image is not");
        assert!(warnings.contains(&told), "{warnings}");
    }
    let defined = lab.domain.virsh(&["dumpxml", "plain", "--inactive"]);
    let defined = defined.unwrap();
    assert!(!defined.contains("encryption"), "{defined}");
    for (disk, format) in [("sdi", "raw"), ("sdj", "qcow2")] {
        let image = to.join(format!("{disk}.{format}")).display().to_string();
        assert!(defined.contains(&image), "{defined}");
        let plain = to.join("plain.raw").display().to_string();
        run(
            "qemu-img",
            &["convert", "-f", format, "-O", "raw", &image, &plain],
        );
        let raw = lab.path(&format!("restored/{disk}.raw"));
        assert_eq!(
            std::fs::read(plain).unwrap(),
            std::fs::read(raw).unwrap(),
            "{disk}"
        );
    }
    lab.domain.virsh(&["undefine", "plain"]).unwrap();
    std::fs::remove_dir_all(to).unwrap();
}

#[test]
#[allow(clippy::too_many_lines, reason = "one domain, told in order")]
fn every_kind_of_disk_is_exact_or_refused_with_a_reason() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    // The guest's kernel has no driver for SATA: what is on that disk was there before.
    let before = tempfile::Builder::new()
        .suffix(".qcow2")
        .tempfile_in(domain_common::base())
        .unwrap();
    let sata = before.path().to_str().unwrap().to_owned();
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &sata, &SIZE.to_string()],
    );
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 1M 3M", &sata]);
    let mut lab = Lab::boot_with("disks", |builder| {
        builder
            .disk(Disk::qcow2("vda", SIZE).iothread(true))
            .disk(Disk::qcow2("sda", SIZE).bus(Bus::Scsi).serial("sda"))
            .disk(
                // libvirt puts it on the machine's own controller by its letter.
                Disk::qcow2("sdb", SIZE)
                    .bus(Bus::Other("sata".to_owned()))
                    .image(before.path())
                    .serial("sdb"),
            )
            .agent(true)
            .program(Program::Script("while true; do echo x; dd if=/dev/zero of=/dev/vda bs=4k count=4 conv=fsync,notrunc 2>/dev/null; sleep 1; done >/dev/null & echo stamp: running".to_owned()))
    });
    let name = lab.name();
    wait_for("the agent never connects", || {
        lab.domain
            .virsh(&["qemu-agent-command", &name, r#"{"execute":"guest-ping"}"#])
            .is_ok()
    });
    let file = |lab: &Lab, name: &str| lab.path(name).display().to_string();
    let size = SIZE.to_string();

    // What is under them.
    let raw_device = Loop::over(&lab.path("loop-raw"));
    let qcow2_device = Loop::over(&lab.path("loop-qcow2"));
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &qcow2_device.0, &size],
    );
    let (data, with_data) = (file(&lab, "data.raw"), file(&lab, "with-data.qcow2"));
    let options = format!("data_file={data},data_file_raw=on");
    run(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-o", &options, &with_data, &size,
        ],
    );
    let (base, middle, top) = (
        file(&lab, "base.qcow2"),
        file(&lab, "middle.qcow2"),
        file(&lab, "top.qcow2"),
    );
    run("qemu-img", &["create", "-q", "-f", "qcow2", &base, &size]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 7 0 3M", &base]);
    run(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &middle,
        ],
    );
    run(
        "qemu-io",
        &["-f", "qcow2", "-c", "write -P 8 1M 1M", &middle],
    );
    run(
        "qemu-img",
        &[
            "create", "-q", "-f", "qcow2", "-b", &middle, "-F", "qcow2", &top,
        ],
    );
    let (far, socket) = (file(&lab, "far.raw"), file(&lab, "far.sock"));
    run("truncate", &["-s", &size, &far]);
    let served = Command::new("qemu-nbd")
        .args([
            "-f", "raw", "-x", "far", "-t", "-e", "8", "-k", &socket, &far,
        ])
        .spawn()
        .unwrap();
    let _served = Server(served);
    wait_for("qemu-nbd does not listen", || Path::new(&socket).exists());
    run("chmod", &["777", &socket]);
    let throttled = file(&lab, "throttled.qcow2");
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &throttled, &size],
    );

    let driver = |format: &str| format!("<driver name='qemu' type='{format}'/>");
    let disks = [
        (
            "sdc",
            "block, raw",
            format!(
                "<disk type='block'>{}<source dev='{}'/>",
                driver("raw"),
                raw_device.0
            ),
        ),
        (
            "sdd",
            "block, qcow2",
            format!(
                "<disk type='block'>{}<source dev='{}'/>",
                driver("qcow2"),
                qcow2_device.0
            ),
        ),
        (
            "sde",
            "qcow2 with a data file",
            format!(
                "<disk type='file'>{}<source file='{with_data}'/>",
                driver("qcow2")
            ),
        ),
        (
            "sdf",
            "qcow2 over two others",
            format!(
                "<disk type='file'>{}<source file='{top}'/>",
                driver("qcow2")
            ),
        ),
        (
            "sdg",
            "network, nbd",
            format!(
                "<disk type='network'>{}<source protocol='nbd' name='far'><host transport='unix' socket='{socket}'/></source>",
                driver("raw")
            ),
        ),
        (
            "sdh",
            "throttled",
            format!(
                "<disk type='file'>{}<source file='{throttled}'/><throttlefilters><throttlefilter group='slow'/></throttlefilters>",
                driver("qcow2")
            ),
        ),
    ];
    lab.domain
        .virsh(&[
            "domthrottlegroupset",
            &name,
            "slow",
            "--total-iops-sec",
            "5000",
            "--live",
        ])
        .unwrap();
    lab.domain
        .virsh(&[
            "domthrottlegroupset",
            &name,
            "slow",
            "--total-iops-sec",
            "5000",
            "--config",
        ])
        .unwrap();
    for (disk, what, xml) in &disks {
        let path = lab.path(&format!("{disk}.xml"));
        std::fs::write(
            &path,
            format!("{xml}<target dev='{disk}' bus='scsi'/><serial>{disk}</serial></disk>"),
        )
        .unwrap();
        let plugged = lab.domain.virsh(&[
            "attach-device",
            &name,
            path.to_str().unwrap(),
            "--live",
            "--config",
        ]);
        println!("{disk}, {what}: {plugged:?}");
        plugged.unwrap();
    }
    let plain = ["sda", "sdc", "sdd", "sde", "sdf", "sdg", "sdh"];
    let written = [&plain[..], &LUKS].concat();
    attach_encrypted(&lab);
    // Linux names them as it finds them; they are told by their serial numbers.
    let list = "for d in /sys/block/sd*; do s=$(tr -cd a-z <$d/device/vpd_pg80); ln -sf /dev/${d##*/} /dev/by-$s; echo by-$s; done";
    let begun = std::time::Instant::now();
    loop {
        let listed = in_guest(&lab, list);
        if written
            .iter()
            .all(|disk| listed.contains(&format!("by-{disk}")))
        {
            break;
        }
        assert!(begun.elapsed() < WAIT, "the guest sees {listed}");
        forerun::clock::sleep(Duration::from_millis(500));
    }
    // vda is written to all the time: only the others are compared.
    write(&lab, &written, 3);
    // What QEMU decrypts is not stored in plain text unasked.
    let refused = lab.backup(&[]).code(7).json["errors"].to_string();
    assert!(
        refused.contains("`sdi` is encrypted") && refused.contains("--allow-plaintext"),
        "{refused}"
    );
    exact(&mut lab, "in full", &written, &["--allow-plaintext"]);
    let place = file(&lab, "scratch");
    std::fs::create_dir(&place).unwrap();
    run("chmod", &["711", &place]);
    for freeze in ["fleece", "snapshot"] {
        let at = if freeze == "fleece" { 20 } else { 50 };
        write(&lab, &written, at);
        // Beside a device there is no place for an overlay.
        let words = ["--allow-plaintext", "--freeze", freeze, "--scratch", &place];
        exact(
            &mut lab,
            &format!("what changed, {freeze}"),
            &written,
            &words,
        );
    }
    write(&lab, &written, 80);
    let backup = encrypted_repository(&mut lab, &written);
    restored_without_the_secret(&mut lab, &backup);

    // Off: what cannot be opened is refused, by name and with the reason.
    lab.domain.destroy().unwrap();
    let refused = lab.backup(&[]).code(7);
    let said = refused.json["errors"].to_string();
    assert!(
        said.contains("`sdg`") && said.contains("type `network`"),
        "{said}"
    );
    let refused = lab.backup(&["--exclude", "sdg"]).code(7);
    let said = refused.json["errors"].to_string();
    assert!(
        said.contains("`sdi`") && said.contains("only while the domain runs"),
        "{said}"
    );
    let chosen = ["--exclude", "sdg", "--exclude", "sdi", "--exclude", "sdj"];
    let off = lab.backup(&chosen).done();
    let rescanned: Vec<String> = off.rescanned().into_keys().collect();
    assert_eq!(rescanned, ["sdc"], "{off:#?}");
}
