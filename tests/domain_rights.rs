//! Who may do what with a domain: a user with no more than access to libvirt, what others see of our files, and a user with
//! domains of his own (`qemu:///session`).
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]
#![expect(clippy::print_stdout, reason = "a line a point for who reads the log")]

mod domain_common;
mod vm_common;

use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::PoisonError;

use domain_common::{ALONE, Lab};
use forerun_rig::block::RawFile;
use forerun_rig::guest::{Disk, Program};
use forerun_rig::stamp::{Verdict, check};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use vm_common::{MIB, WAIT, wait_for};

const NOBODY: u32 = 65534;

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

/// A program as `nobody`, who has a home.
fn nobody(lab: &Lab, program: &Path) -> Command {
    let mut command = lab.domain.lock().command(Path::new("setpriv"));
    let id = NOBODY.to_string();
    command
        .args(["--reuid", &id, "--regid", &id, "--clear-groups"])
        .arg(program)
        .env("HOME", lab.path("nobody"))
        .env("XDG_RUNTIME_DIR", lab.path("nobody/run"))
        .env_remove("XDG_CONFIG_HOME")
        .env_remove("XDG_CACHE_HOME")
        .env_remove("XDG_STATE_HOME");
    command
}

/// Runs a command as `nobody`, who may use libvirt's socket and owns a repository and a host state.
fn as_nobody(lab: &Lab, words: &[&str]) -> (Option<i32>, Value) {
    let uri = lab.domain.lock().uri();
    as_nobody_at(lab, &uri, words)
}

fn as_nobody_at(lab: &Lab, uri: &str, words: &[&str]) -> (Option<i32>, Value) {
    let mut command = nobody(lab, &lab.path("forerun"));
    command
        .env("LIBVIRT_DEFAULT_URI", uri)
        .env("FORERUN_REPO", lab.path("nobody/repository"))
        .env("FORERUN_NO_LOAD_CONTROL", "1")
        .env_remove("FORERUN_STATE_DIR");
    let output = command.args(words).arg("--json").output().unwrap();
    let json = serde_json::from_slice(&output.stdout).unwrap_or(Value::Null);
    (output.status.code(), json)
}

#[test]
fn a_user_of_libvirt_looks_and_is_told_what_more_it_takes() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = Lab::boot_with("rights", |builder| {
        let stamp = "--span 4 --rate 60 /dev/vda";
        builder
            .disk(Disk::qcow2("vda", 8 * MIB))
            .program(Program::Stamp(stamp.to_owned()))
    });
    let name = lab.name();
    let own = lab.path("nobody");
    for directory in [&own, &own.join("run")] {
        std::fs::create_dir(directory).unwrap();
        chown(directory, Some(NOBODY), Some(NOBODY)).unwrap();
    }
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
    // Without root, where the XDG base directories have it.
    assert_eq!(mode(&own.join(".local/state/forerun")), 0o700);

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

    of_a_user_s_own(&mut lab);
}

/// libvirt's daemon of a user, and the domains under it. Dropped, they end.
struct Session<'a> {
    lab: &'a Lab,
    daemon: Child,
}

impl<'a> Session<'a> {
    const URI: &'static str = "qemu:///session";

    fn start(lab: &'a Lab) -> Self {
        let config = lab.path("nobody/.config");
        let libvirt = config.join("libvirt");
        std::fs::create_dir_all(&libvirt).unwrap();
        let text = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\n";
        std::fs::write(libvirt.join("qemu.conf"), text).unwrap();
        for directory in [&config, &libvirt] {
            chown(directory, Some(NOBODY), Some(NOBODY)).unwrap();
        }
        let log = std::fs::File::create(lab.path("session.log")).unwrap();
        let daemon = nobody(lab, Path::new("libvirtd"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let session = Self { lab, daemon };
        wait_for("the user's libvirtd does not come up", || {
            session.virsh(&["list"]).is_ok()
        });
        session
    }

    fn virsh(&self, words: &[&str]) -> Result<String, String> {
        let output = nobody(self.lab, Path::new("virsh"))
            .args(["--connect", Self::URI])
            .args(words)
            .output()
            .unwrap();
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(String::from_utf8_lossy(&output.stderr).into_owned())
        }
    }

    fn forerun(&self, words: &[&str]) -> Value {
        let (code, said) = as_nobody_at(self.lab, Self::URI, words);
        assert!(matches!(code, Some(0 | 3)), "{words:?}: {code:?} {said:#}");
        said
    }

    fn point(&self, words: &[&str]) -> String {
        let said = self.forerun(&[&["backup", "own"], words].concat());
        let id = said["targets"][0]["point"]["id"].as_str();
        id.unwrap_or_else(|| panic!("{said:#}")).to_owned()
    }

    fn step_of(&self, point: &str) -> u64 {
        let to = self.lab.path("nobody/restored");
        std::fs::remove_dir_all(&to).ok();
        let shown = to.display().to_string();
        self.forerun(&["restore", point, "--output", &shown]);
        match check(&[&RawFile::open(&to.join("vda.raw")).unwrap()]).unwrap() {
            Verdict::Exact(step) => step,
            other => panic!("{point}: {other:?}"),
        }
    }

    /// Starts a domain and waits until its guest stamps.
    fn boot(&self, domain: &str, log: &Path) {
        std::fs::write(log, b"").unwrap();
        chown(log, Some(NOBODY), Some(NOBODY)).unwrap();
        self.virsh(&["start", domain]).unwrap();
        let begun = std::time::Instant::now();
        while !std::fs::read_to_string(log)
            .unwrap()
            .contains("stamp: running")
        {
            assert!(begun.elapsed() < WAIT, "the guest does not come up");
            forerun::clock::sleep(std::time::Duration::from_millis(50));
        }
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        for domain in ["own", "other"] {
            self.virsh(&["destroy", domain]).ok();
        }
        self.daemon.kill().ok();
        self.daemon.wait().ok();
    }
}

/// A user's own domain, under the user's own libvirtd, without any right beyond.
fn of_a_user_s_own(lab: &mut Lab) {
    lab.domain.destroy().unwrap();
    // The same guest, in a directory of the user's.
    let place = lab.path("nobody/vm");
    std::fs::create_dir(&place).unwrap();
    let files: [PathBuf; 3] = ["vmlinuz", "initrd", "vda.qcow2"].map(|name| place.join(name));
    for name in ["vmlinuz", "initrd"] {
        std::fs::copy(lab.path(name), place.join(name)).unwrap();
    }
    let size = (8 * MIB).to_string();
    let made = Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2"])
        .arg(&files[2])
        .arg(size)
        .status();
    assert!(made.unwrap().success());
    for path in files.iter().chain([&place]) {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
    let xml = std::fs::read_to_string(lab.path(&format!("{}.xml", lab.name()))).unwrap();
    let name = format!("<name>{}</name>", lab.name());
    let xml = xml.replace(&name, "<name>own</name>").replace(
        lab.path("").to_str().unwrap().trim_end_matches('/'),
        place.to_str().unwrap(),
    );
    let definition = lab.path("nobody/own.xml");
    std::fs::write(&definition, xml).unwrap();
    let log = place.join("serial.log");

    let session = Session::start(lab);
    session
        .virsh(&["define", definition.to_str().unwrap()])
        .unwrap();
    session.boot("own", &log);
    let mut last = 0;
    for words in [
        &["--freeze", "fleece"][..],
        &["--freeze", "fleece"],
        &["--freeze", "snapshot"],
    ] {
        let step = session.step_of(&session.point(words));
        assert!(step > last, "{step} after {last}");
        println!("a user's own domain, {words:?}: write {step}");
        last = step;
    }
    let disks = session.virsh(&["domblklist", "own"]).unwrap();
    assert!(!disks.contains("overlay"), "{disks}");
    session.virsh(&["destroy", "own"]).unwrap();
    let point = session.point(&[]);
    assert!(session.step_of(&point) >= last);

    let to = lab.path("nobody/defined").display().to_string();
    let define = [
        "restore", &point, "--define", "--name", "other", "--output", &to,
    ];
    let made = session.forerun(&define);
    assert_eq!(made["domain"]["defined"], true, "{made:#}");
    assert_eq!(made["warnings"], Value::Array(Vec::new()), "{made:#}");
    // Not where the original writes.
    let log = log.with_extension("log.other");
    session.boot("other", &log);
    assert!(
        std::fs::read_to_string(&log)
            .unwrap()
            .contains("resume after seq"),
        "the guest begins anew"
    );
}
