//! A libvirt domain whose disks hold the state after some write, under a private libvirtd, and the program beside it.

#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "a test fails by it, and no test file uses all of this"
)]

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use forerun_rig::block::{Image, RawFile};
use forerun_rig::guest::{Bus, Disk, Domain, Guest, Libvirtd, Program};
use forerun_rig::stamp::{Verdict, check};
use serde_json::{Value, json};

use crate::vm_common::{Ended, Started, UUID, WAIT, wait_for};

/// The one libvirtd of this process's tests; it goes with the last of them.
static SHARED: Mutex<Weak<Mutex<Libvirtd>>> = Mutex::new(Weak::new());

/// Where files go: into memory where there is room for them, else to the temporary directory.
pub(crate) fn base() -> PathBuf {
    let memory = Path::new("/dev/shm");
    let room =
        rustix::fs::statvfs(memory).is_ok_and(|stat| stat.f_bavail * stat.f_frsize > 2 << 30);
    if room {
        memory.to_path_buf()
    } else {
        std::env::temp_dir()
    }
}

/// The private libvirtd's directory.
pub(crate) fn home() -> PathBuf {
    base().join(format!("forerun-libvirt-{}", std::process::id()))
}

/// Held by a test that ends the daemon under the feet of others.
pub(crate) static ALONE: Mutex<()> = Mutex::new(());

/// The libvirtd, with a directory of its own.
pub(crate) fn libvirtd() -> Arc<Mutex<Libvirtd>> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(running) = shared.upgrade() {
        return running;
    }
    let home = home();
    std::fs::remove_dir_all(&home).ok();
    std::fs::create_dir(&home).unwrap();
    std::fs::set_permissions(&home, PermissionsExt::from_mode(0o755)).unwrap();
    let started = Arc::new(Mutex::new(Libvirtd::start(&home).unwrap()));
    *shared = Arc::downgrade(&started);
    started
}

/// A domain, a repository and a host state of their own.
pub(crate) struct Lab {
    pub(crate) domain: Domain,
    pub(crate) repo: PathBuf,
    libvirtd: Arc<Mutex<Libvirtd>>,
    uuid: String,
    directory: tempfile::TempDir,
    runs: u32,
}

impl Lab {
    /// A domain of this name that stamps its three disks, with more words for the stamper.
    pub(crate) fn boot(name: &str, size: u64, words: &str) -> Self {
        Self::boot_with(name, |builder| {
            let program = Program::Stamp(format!("{words} /dev/vda /dev/vdb /dev/sda"));
            builder
                .disk(Disk::qcow2("vda", size).iothread(true))
                .disk(Disk::raw("vdb", size))
                .disk(Disk::qcow2("sda", size).bus(Bus::Scsi))
                .program(program)
        })
    }

    pub(crate) fn boot_with(
        name: &str,
        build: impl FnOnce(forerun_rig::guest::Builder) -> forerun_rig::guest::Builder,
    ) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("dom")
            .tempdir_in(base())
            .unwrap();
        // QEMU's user passes through.
        std::fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o755)).unwrap();
        let libvirtd = libvirtd();
        // Names come and go with the tests; so do UUIDs.
        let mut uuid = UUID.to_owned();
        let digit = name.bytes().fold(0_u32, |sum, byte| sum + u32::from(byte)) % 100;
        uuid.replace_range(..2, &format!("{digit:02}"));
        let guest = build(Guest::builder(directory.path()).uuid(&uuid));
        let domain = guest.domain(Arc::clone(&libvirtd), name).unwrap();
        let repo = directory.path().join("repository");
        let mut lab = Self {
            domain,
            repo: repo.clone(),
            libvirtd,
            uuid,
            directory,
            runs: 0,
        };
        lab.run(&["init", &repo.display().to_string()]).done();
        lab.domain.wait_for("stamp: running", WAIT).unwrap();
        lab.progresses();
        lab
    }

    pub(crate) fn name(&self) -> String {
        self.domain.name().to_owned()
    }

    pub(crate) fn uuid(&self) -> &str {
        &self.uuid
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Begins a command; `fault` is what `FORERUN_FAULT` says, or nothing.
    pub(crate) fn start(&mut self, words: &[&str], fault: &str) -> Started {
        self.runs += 1;
        let stdout = self.path(&format!("run-{}.json", self.runs));
        let stderr = self.path(&format!("run-{}.log", self.runs));
        let log = self.path("steps");
        std::fs::remove_file(&log).ok();
        let libvirtd = self.domain.lock();
        let mut command = libvirtd.command(Path::new(env!("CARGO_BIN_EXE_forerun")));
        command
            .env("LIBVIRT_DEFAULT_URI", libvirtd.uri())
            .env("FORERUN_REPO", &self.repo)
            .env("FORERUN_STATE_DIR", self.path("state"))
            // What the machine of the tests is busy with is not theirs.
            .env("FORERUN_NO_LOAD_CONTROL", "1")
            .env_remove("FORERUN_FAULT")
            .env("FORERUN_FAULT_LOG", log);
        drop(libvirtd);
        if !fault.is_empty() {
            command.env("FORERUN_FAULT", fault);
        }
        Started::spawn(command, words, stdout, stderr)
    }

    /// Runs a command to its end.
    pub(crate) fn run(&mut self, words: &[&str]) -> Ended {
        self.start(words, "").end()
    }

    /// The steps that the last run has logged.
    pub(crate) fn steps(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("steps")).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    pub(crate) fn backup(&mut self, more: &[&str]) -> Ended {
        let name = self.name();
        self.run(&[&["backup", name.as_str()], more].concat())
    }

    pub(crate) fn precopy(&mut self, more: &[&str]) -> Ended {
        let name = self.name();
        self.run(&[&["precopy", name.as_str()], more].concat())
    }

    /// Restores a point and says after which write its disks are, exactly.
    pub(crate) fn step_of(&mut self, point: &str) -> u64 {
        self.step_on(point, &["vda", "vdb", "sda"])
    }

    /// As [`step_of`](Self::step_of), with these disks in the stamper's order.
    pub(crate) fn step_on(&mut self, point: &str, disks: &[&str]) -> u64 {
        let output = self.path("restored");
        std::fs::remove_dir_all(&output).ok();
        self.run(&["restore", point, "--output", &output.display().to_string()])
            .done();
        let images: Vec<RawFile> = disks
            .iter()
            .map(|id| RawFile::open(&output.join(format!("{id}.raw"))).unwrap())
            .collect();
        let views: Vec<&dyn Image> = images.iter().map(|image| image as &dyn Image).collect();
        match check(&views).unwrap() {
            Verdict::Exact(step) => step,
            other => panic!("point {point}: {other:?}"),
        }
    }

    pub(crate) fn ask(&self, command: &str) -> Vec<Value> {
        let answer = self.domain.execute(command, &json!({})).unwrap();
        answer.as_array().cloned().unwrap()
    }

    /// Everything of ours in the VM but bitmaps, and in the domain's own directory.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for job in self.ask("query-jobs") {
            left.push(format!("job {job}"));
        }
        for export in self.ask("query-block-exports") {
            left.push(format!("export {export}"));
        }
        for node in self.ask("query-named-block-nodes") {
            let name = node["node-name"].as_str().unwrap();
            if name.starts_with("forerun-") {
                left.push(format!("node {name}"));
            }
        }
        let place = self.domain.lock().home().join("lib/qemu");
        for domain in std::fs::read_dir(place).unwrap() {
            let path = domain.unwrap().path();
            let own = path.file_name().unwrap().to_str().unwrap();
            if own.ends_with(&format!("-{}", self.domain.name())) {
                let files = std::fs::read_dir(&path).unwrap();
                let files = files.map(|file| file.unwrap().file_name().into_string().unwrap());
                left.extend(
                    files.filter(|name| name != "monitor.sock" && name != "master-key.aes"),
                );
            }
        }
        left
    }

    /// Nothing of ours is in the VM but bitmaps, no NBD server runs, and the host state is locks only.
    pub(crate) fn is_clean(&self) {
        assert_eq!(self.leftovers(), Vec::<String>::new());
        // Refused in one way with a server, in another without.
        let node = self.ask("query-named-block-nodes")[0]["node-name"].clone();
        let arguments =
            json!({ "type": "nbd", "id": "probe", "name": "x".repeat(4097), "node-name": node });
        let refused = self
            .domain
            .execute("block-export-add", &arguments)
            .unwrap_err();
        assert!(refused.to_string().contains("not running"), "{refused}");
        assert_eq!(self.host_state(), Vec::<String>::new());
    }

    /// What the host state holds besides locks.
    pub(crate) fn host_state(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.path("state").join(&self.uuid)) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| Path::new(name).extension().is_none_or(|ext| ext != "lock"))
            .collect()
    }

    /// The guest runs, and goes on writing on its disks.
    pub(crate) fn progresses(&self) {
        let writes = || {
            let stats = self.ask("query-blockstats");
            let writes = |device: &Value| device["stats"]["wr_operations"].as_u64().unwrap();
            stats.iter().map(writes).sum::<u64>()
        };
        let state = self
            .domain
            .virsh(&["domstate", self.domain.name()])
            .unwrap();
        assert_eq!(state.trim(), "running");
        let before = writes();
        wait_for("the guest writes no more", || writes() > before + 4);
    }

    /// Starts the domain again and waits for its stamper; returns the write after which it went on.
    pub(crate) fn start_again(&mut self) -> u64 {
        self.domain.start().unwrap();
        let resumed = self
            .domain
            .wait_for("stamp: resume after seq", WAIT)
            .unwrap();
        let resumed = resumed.split_whitespace().nth(4).unwrap();
        let resumed = resumed.trim_end_matches(',').parse().unwrap();
        self.domain.wait_for("stamp: running", WAIT).unwrap();
        self.progresses();
        resumed
    }
}
