//! A guest whose two disks hold the state after some write, and the program under test beside it.

#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "a test fails by it, and no test file uses all of this"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use forerun::clock::{self, Deadline};
use forerun_rig::block::RawFile;
use forerun_rig::guest::{Disk, Guest, Program};
use forerun_rig::stamp::{Verdict, check};
use serde_json::{Value, json};

pub(crate) const MIB: u64 = 1 << 20;
/// Patience with a starved machine; nothing here takes long by itself.
pub(crate) const WAIT: Duration = Duration::from_secs(120);
/// The VM's UUID, and so the target's key.
pub(crate) const UUID: &str = "0f0e0d0c-0b0a-4908-8706-050403020100";

/// A guest, a repository and a host state of their own.
pub(crate) struct Lab {
    pub(crate) guest: Guest,
    pub(crate) target: String,
    pub(crate) repo: PathBuf,
    directory: tempfile::TempDir,
    runs: u32,
}

/// A run of the program that has begun.
pub(crate) struct Started {
    pub(crate) child: Child,
    words: Vec<String>,
    stdout: PathBuf,
    stderr: PathBuf,
}

/// A run of the program that has ended.
#[derive(Debug)]
pub(crate) struct Ended {
    words: Vec<String>,
    pub(crate) status: ExitStatus,
    pub(crate) json: Value,
    stderr: String,
}

impl Lab {
    /// A guest that stamps `vda` (qcow2) and `vdb` (raw), with more words for the stamper.
    pub(crate) fn boot(size: u64, words: &str) -> Self {
        Self::boot_in(&std::env::temp_dir(), size, words)
    }

    /// As [`boot`](Self::boot), with all files in memory where the host has room for them: tests of hundreds of runs would
    /// wait for the disk most of the time.
    pub(crate) fn boot_in_memory(size: u64, words: &str) -> Self {
        let memory = Path::new("/dev/shm");
        let room =
            rustix::fs::statvfs(memory).is_ok_and(|stat| stat.f_bavail * stat.f_frsize > 2 << 30);
        let directory = if room {
            memory.to_path_buf()
        } else {
            std::env::temp_dir()
        };
        Self::boot_in(&directory, size, words)
    }

    fn boot_in(directory: &Path, size: u64, words: &str) -> Self {
        let directory = tempfile::Builder::new()
            .prefix("vm")
            .tempdir_in(directory)
            .unwrap();
        let guest = Guest::builder(directory.path())
            .disk(Disk::qcow2("vda", size))
            .disk(Disk::raw("vdb", size))
            .uuid(UUID)
            .program(Program::Stamp(format!("{words} /dev/vda /dev/vdb")))
            .boot()
            .unwrap();
        let target = format!("qmp:{}", guest.qmp_socket().display());
        let repo = directory.path().join("repository");
        let mut lab = Self {
            guest,
            target,
            repo: repo.clone(),
            directory,
            runs: 0,
        };
        lab.init(&repo, "64KiB");
        lab.guest.wait_for("stamp: running", WAIT).unwrap();
        lab.progresses();
        lab
    }

    pub(crate) fn init(&mut self, repo: &Path, block_size: &str) {
        let path = repo.display().to_string();
        self.run(&["init", &path, "--block-size", block_size])
            .done();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The host state of the target.
    pub(crate) fn state(&self) -> PathBuf {
        self.path("state").join(UUID)
    }

    /// Begins a command; `fault` is what `FORERUN_FAULT` says, or nothing.
    pub(crate) fn start(&mut self, words: &[&str], fault: &str) -> Started {
        self.runs += 1;
        let stdout = self.path(&format!("run-{}.json", self.runs));
        let stderr = self.path(&format!("run-{}.log", self.runs));
        let log = self.path("steps");
        std::fs::remove_file(&log).ok();
        let mut command = Command::new(env!("CARGO_BIN_EXE_forerun"));
        command
            .env("FORERUN_REPO", &self.repo)
            .env("FORERUN_STATE_DIR", self.path("state"))
            // What the machine of the tests is busy with is not theirs.
            .env("FORERUN_NO_LOAD_CONTROL", "1")
            .env_remove("FORERUN_FAULT")
            .env("FORERUN_FAULT_LOG", log);
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
        let target = self.target.clone();
        let mut words = vec!["backup", target.as_str(), "--quiesce", "never"];
        words.extend(more);
        self.run(&words)
    }

    pub(crate) fn precopy(&mut self, more: &[&str]) -> Ended {
        let target = self.target.clone();
        let mut words = vec!["precopy", target.as_str()];
        words.extend(more);
        self.run(&words)
    }

    pub(crate) fn recover(&mut self) -> Ended {
        let target = self.target.clone();
        self.run(&["recover", &target])
    }

    /// Restores a point and says after which write its two disks are, exactly.
    pub(crate) fn step_of(&mut self, point: &str) -> u64 {
        let output = self.path("restored");
        std::fs::remove_dir_all(&output).ok();
        self.run(&["restore", point, "--output", &output.display().to_string()])
            .done();
        let images: Vec<RawFile> = ["vda", "vdb"]
            .iter()
            .map(|id| RawFile::open(&output.join(format!("{id}.raw"))).unwrap())
            .collect();
        match check(&[&images[0], &images[1]]).unwrap() {
            Verdict::Exact(step) => step,
            other => panic!("point {point}: {other:?}"),
        }
    }

    /// How many points are published, by the files of the repository.
    pub(crate) fn published(&self) -> usize {
        std::fs::read_dir(self.repo.join("points")).unwrap().count()
    }

    /// All points' ids, oldest first.
    pub(crate) fn points(&mut self) -> Vec<String> {
        let list = self.run(&["list"]).done();
        let points = list.json["points"].as_array().cloned();
        let points = points.unwrap_or_else(|| panic!("no points in {}", list.json));
        let id = |point: &Value| point["id"].as_str().unwrap().to_owned();
        points.iter().map(id).collect()
    }

    pub(crate) fn ask(&mut self, command: &str) -> Vec<Value> {
        let answer = self.guest.monitor().execute(command, json!({})).unwrap();
        answer.as_array().cloned().unwrap()
    }

    /// Everything of ours in the VM but bitmaps.
    pub(crate) fn leftovers(&mut self) -> Vec<String> {
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
        for set in self.ask("query-fdsets") {
            left.push(format!("descriptors {set}"));
        }
        left
    }

    /// Nothing of ours is in the VM but bitmaps, no NBD server runs, and the host state is locks only.
    pub(crate) fn is_clean(&mut self) {
        assert_eq!(self.leftovers(), Vec::<String>::new());
        let socket = self.path("probe.nbd").display().to_string();
        let address = json!({ "addr": { "type": "unix", "data": { "path": socket } } });
        let monitor = self.guest.monitor();
        monitor.execute("nbd-server-start", address).unwrap();
        monitor.execute("nbd-server-stop", json!({})).unwrap();
        assert_eq!(self.host_state(), Vec::<String>::new());
    }

    /// What the host state holds besides locks.
    pub(crate) fn host_state(&self) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.state()) else {
            return Vec::new();
        };
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names
            .filter(|name| Path::new(name).extension().is_none_or(|ext| ext != "lock"))
            .collect()
    }

    /// How many writes the guest has made on its disks.
    pub(crate) fn writes(&mut self) -> u64 {
        let stats = self.ask("query-blockstats");
        let writes = |device: &Value| device["stats"]["wr_operations"].as_u64().unwrap();
        stats.iter().map(writes).sum()
    }

    /// The guest runs, and goes on writing on both disks.
    pub(crate) fn progresses(&mut self) {
        let status = self.guest.monitor().execute("query-status", json!({}));
        assert_eq!(status.unwrap()["status"], "running");
        let before = self.writes();
        let what = "the guest writes no more";
        wait_for(what, || self.writes() > before + 4);
    }

    /// Dirty bitmaps by node.
    pub(crate) fn bitmaps(&mut self) -> BTreeMap<String, usize> {
        let nodes = self.ask("query-named-block-nodes");
        let count = |node: &Value| node["dirty-bitmaps"].as_array().map_or(0, Vec::len);
        let name = |node: &Value| node["node-name"].as_str().unwrap().to_owned();
        nodes
            .iter()
            .map(|node| (name(node), count(node)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}

impl Started {
    pub(crate) fn spawn(
        mut command: Command,
        words: &[&str],
        stdout: PathBuf,
        stderr: PathBuf,
    ) -> Self {
        command
            .args(words)
            .arg("--json")
            .stdin(Stdio::null())
            .stdout(File::create(&stdout).unwrap())
            .stderr(File::create(&stderr).unwrap());
        Self {
            child: command.spawn().unwrap(),
            words: words.iter().map(|word| (*word).to_owned()).collect(),
            stdout,
            stderr,
        }
    }

    /// Waits for its end; one that hangs is a failure.
    pub(crate) fn end(mut self) -> Ended {
        let deadline = Deadline::after(WAIT);
        let status = loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            if deadline.passed() {
                self.child.kill().ok();
                panic!("{:?} hangs: {}", self.words, read(&self.stderr));
            }
            clock::sleep(Duration::from_millis(1));
        };
        Ended {
            json: serde_json::from_str(&read(&self.stdout)).unwrap_or(Value::Null),
            stderr: read(&self.stderr),
            words: self.words,
            status,
        }
    }

    pub(crate) fn said(&self) -> String {
        read(&self.stderr)
    }
}

impl Ended {
    /// It did what it was asked, perhaps with warnings.
    pub(crate) fn done(self) -> Self {
        assert!(matches!(self.status.code(), Some(0 | 3)), "{self:#?}");
        self
    }

    /// It ended with this code.
    pub(crate) fn code(self, code: i32) -> Self {
        assert_eq!(self.status.code(), Some(code), "{self:#?}");
        self
    }

    /// The id of the point that it made.
    pub(crate) fn point(&self) -> String {
        let id = self.json["targets"][0]["point"]["id"].as_str();
        id.unwrap_or_else(|| panic!("no point: {self:#?}"))
            .to_owned()
    }

    /// Which disks it read in full, and why.
    pub(crate) fn rescanned(&self) -> BTreeMap<String, String> {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let disks = self.json["targets"][0]["point"]["rescanned"].as_array();
        let disks = disks
            .unwrap_or_else(|| panic!("no point: {self:#?}"))
            .iter();
        disks
            .map(|disk| (text(&disk["disk"]), text(&disk["reason"])))
            .collect()
    }
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// Looks again and again until something is so; returns how long that took.
pub(crate) fn wait_for(what: &str, mut so: impl FnMut() -> bool) -> Duration {
    let begin = clock::now();
    let deadline = Deadline::after(WAIT);
    while !so() {
        assert!(!deadline.passed(), "{what}");
        clock::sleep(Duration::from_millis(1));
    }
    clock::now() - begin
}
