//! What every test here needs: the binary under test in a place of its own, a QEMU without a guest, what its disks must
//! hold, and the comparison with what a point restores.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use forerun_rig::qmp::Qmp;
use serde_json::{Value, json};

pub(crate) const KIB: u64 = 1 << 10;
pub(crate) const MIB: u64 = 1 << 20;
/// How long something may take on a machine that is starved.
pub(crate) const WAIT: Duration = Duration::from_secs(120);

/// A directory with a repository and host state.
pub(crate) struct Lab {
    pub(crate) dir: tempfile::TempDir,
    repo: PathBuf,
}

/// How a run of the binary ended.
#[derive(Debug)]
pub(crate) struct Ran {
    pub(crate) code: i32,
    pub(crate) json: Value,
    pub(crate) words: String,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let lab = Self::empty();
        lab.forerun(&["init", lab.repo.to_str().unwrap()]).ended(0);
        lab
    }

    fn empty() -> Self {
        let dir = tempfile::Builder::new().prefix("adv").tempdir().unwrap();
        let repo = dir.path().join("repo");
        Self { dir, repo }
    }

    /// With the repository in a place that exists.
    pub(crate) fn with_repository(place: impl FnOnce(&Path) -> PathBuf) -> Self {
        let mut lab = Self::empty();
        lab.repo = place(lab.path());
        lab.forerun(&["init", lab.repo.to_str().unwrap()]).ended(0);
        lab
    }

    /// The same host, another repository.
    pub(crate) fn other_repository(&self) -> PathBuf {
        let repo = self.path().join("other");
        self.forerun(&["init", repo.to_str().unwrap()]).ended(0);
        repo
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn repo(&self) -> &Path {
        &self.repo
    }

    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forerun"));
        command
            .args(words)
            .arg("--json")
            .env("FORERUN_REPO", &self.repo)
            .env("FORERUN_STATE_DIR", self.path().join("state"))
            // What the machine of the tests is busy with is not theirs.
            .env("FORERUN_NO_LOAD_CONTROL", "1")
            .stdin(Stdio::null());
        command
    }

    pub(crate) fn forerun(&self, words: &[&str]) -> Ran {
        Ran::of(&self.command(words).output().unwrap())
    }

    /// Begins a command; [`Running::end`] waits for it.
    pub(crate) fn begin(&self, words: &[&str]) -> Running {
        Running::spawn(self.command(words))
    }

    /// Restores a disk of a point as raw and gives its bytes.
    pub(crate) fn restored(&self, point: &str, disk: &str) -> Vec<u8> {
        let path = self.path().join("restored.raw");
        fs::remove_file(&path).ok();
        let to = format!("{disk}={}", path.display());
        self.forerun(&["restore", point, "--disk", &to]).ended(0);
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        bytes
    }

    /// Restores all disks of a point as raw into a new directory.
    pub(crate) fn restore_all(&self, point: &str) -> PathBuf {
        let path = self.path().join(format!("restored-{point}"));
        self.forerun(&["restore", point, "--output", path.to_str().unwrap()])
            .ended(0);
        path
    }

    /// The point's disks are bit for bit these.
    pub(crate) fn same(&self, point: &str, disks: &[(&str, &[u8])]) {
        for (disk, expected) in disks {
            compare(disk, &self.restored(point, disk), expected);
        }
    }
}

pub(crate) fn compare(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "size of {what}");
    let wrong: Vec<usize> = found
        .chunks(65536)
        .zip(expected.chunks(65536))
        .enumerate()
        .filter(|(_, (a, b))| a != b)
        .map(|(block, _)| block)
        .collect();
    assert!(wrong.is_empty(), "{what}: wrong blocks {wrong:?}");
}

/// A command that runs; killed when it is dropped.
pub(crate) struct Running(Option<Child>);

impl Running {
    pub(crate) fn spawn(mut command: Command) -> Self {
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        Self(Some(command.spawn().unwrap()))
    }

    pub(crate) fn pid(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(self.0.as_ref().unwrap())
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(self.pid(), signal).unwrap();
    }

    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.0.as_mut().unwrap().try_wait(), Ok(None))
    }

    pub(crate) fn end(mut self) -> Ran {
        Ran::of(&self.0.take().unwrap().wait_with_output().unwrap())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            child.kill().ok();
            child.wait().ok();
        }
    }
}

impl Ran {
    fn of(output: &Output) -> Self {
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        let text = String::from_utf8_lossy(&output.stdout);
        Self {
            code: output.status.code().unwrap_or(-1),
            json: serde_json::from_str(&text).unwrap_or(Value::Null),
            words,
        }
    }

    /// It ended with this code, and said so in one JSON document.
    pub(crate) fn ended(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{} {}", self.words, self.json);
        assert_eq!(self.json["schema"], 1, "{}", self.words);
        let errors = self.json["errors"].as_array().unwrap().len();
        assert_eq!(errors == 0, matches!(code, 0 | 3 | 7), "{}", self.json);
        self
    }

    /// Done, with or without warnings.
    pub(crate) fn done(self) -> Self {
        let code = if self.code == 3 { 3 } else { 0 };
        self.ended(code)
    }

    /// It failed with this code, this in its error's message and this in its hint.
    pub(crate) fn failed(self, code: i32, message: &str, hint: &str) -> Self {
        assert_eq!(self.code, code, "{} {}", self.words, self.json);
        let error = &self.json["errors"][0];
        let text = |key: &str| error[key].as_str().unwrap_or_default();
        assert!(text("message").contains(message), "{}", self.json);
        assert!(text("hint").contains(hint), "{}", self.json);
        assert!(self.words.contains(message), "{}", self.words);
        self
    }

    pub(crate) fn point(&self) -> String {
        self.json["targets"][0]["point"]["id"]
            .as_str()
            .unwrap_or_else(|| panic!("no point: {} {}", self.words, self.json))
            .to_owned()
    }

    pub(crate) fn at(&self, pointer: &str) -> &Value {
        self.json
            .pointer(pointer)
            .unwrap_or_else(|| panic!("no {pointer}: {}", self.json))
    }

    pub(crate) fn residual(&self) -> u64 {
        self.at("/targets/0/point/bytes/residual").as_u64().unwrap()
    }

    pub(crate) fn precopied(&self) -> u64 {
        self.at("/targets/0/point/bytes/precopied")
            .as_u64()
            .unwrap()
    }

    /// Exactly these disks were read in full, each for a reason with this text.
    pub(crate) fn rescanned(self, disks: &[(&str, &str)]) -> Self {
        let found = self.at("/targets/0/point/rescanned").as_array().unwrap();
        let names: Vec<&str> = found.iter().filter_map(|it| it["disk"].as_str()).collect();
        let expected: Vec<&str> = disks.iter().map(|(disk, _)| *disk).collect();
        assert_eq!(names, expected, "{}", self.json);
        for (it, (_, reason)) in found.iter().zip(disks) {
            assert!(it["reason"].as_str().unwrap().contains(reason), "{it}");
        }
        self
    }

    pub(crate) fn warned(self, text: &str) -> Self {
        let warnings = self.at("/warnings").as_array().unwrap();
        let there = |it: &Value| it.as_str().is_some_and(|words| words.contains(text));
        assert!(warnings.iter().any(there), "{}", self.json);
        assert!(self.words.contains(text), "{}", self.words);
        self
    }
}

/// A QEMU that never starts its CPU: what is on its disks is what the test writes through them.
pub(crate) struct Still {
    pub(crate) dir: PathBuf,
    child: Child,
    pub(crate) monitor: Qmp,
}

/// Words for a disk of a [`Still`]: image, format, device.
pub(crate) fn drive(id: &str, image: &Path, format: &str) -> Vec<String> {
    vec![
        "-blockdev".into(),
        node(id, image, format).to_string(),
        "-device".into(),
        format!("virtio-blk-pci,id={id},drive={id}-node"),
    ]
}

pub(crate) fn node(id: &str, image: &Path, format: &str) -> Value {
    json!({
        "driver": format, "node-name": format!("{id}-node"), "discard": "unmap",
        "file": { "driver": "file", "filename": image, "discard": "unmap" },
    })
}

/// A qcow2 disk whose file answers reads at this rate only, so that a freeze takes its time.
pub(crate) fn slow_drive(id: &str, image: &Path, bytes_a_second: u64) -> Vec<String> {
    throttled_drive(id, image, &json!({ "bps-read": bytes_a_second }))
}

/// A qcow2 disk whose file has these limits (QEMU's `ThrottleLimits`), whoever asks.
pub(crate) fn throttled_drive(id: &str, image: &Path, limits: &Value) -> Vec<String> {
    let group = json!({
        "qom-type": "throttle-group", "id": format!("{id}-slow"), "limits": limits,
    });
    let node = json!({
        "driver": "qcow2", "node-name": format!("{id}-node"), "discard": "unmap",
        "file": {
            "driver": "throttle", "node-name": format!("{id}-slow"), "throttle-group": format!("{id}-slow"),
            "file": { "driver": "file", "filename": image },
        },
    });
    vec![
        "-object".into(),
        group.to_string(),
        "-blockdev".into(),
        node.to_string(),
        "-device".into(),
        format!("virtio-blk-pci,id={id},drive={id}-node"),
    ]
}

pub(crate) fn qemu_img(words: &[&str]) {
    let output = Command::new("qemu-img").args(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "qemu-img {words:?}: {said}");
}

/// A new image.
pub(crate) fn image(dir: &Path, name: &str, format: &str, size: u64) -> PathBuf {
    let path = dir.join(name);
    qemu_img(&[
        "create",
        "-q",
        "-f",
        format,
        path.to_str().unwrap(),
        &size.to_string(),
    ]);
    path
}

/// A new image of bytes that do not compress.
pub(crate) fn random_image(dir: &Path, name: &str, format: &str, size: u64) -> (PathBuf, Vec<u8>) {
    let bytes = noise(size);
    let (raw, path) = (dir.join(format!("{name}.noise")), dir.join(name));
    fs::write(&raw, &bytes).unwrap();
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        format,
        raw.to_str().unwrap(),
        path.to_str().unwrap(),
    ]);
    fs::remove_file(raw).unwrap();
    (path, bytes)
}

pub(crate) fn noise(size: u64) -> Vec<u8> {
    use std::io::Read;
    let mut bytes = vec![0; usize::try_from(size).unwrap()];
    let mut random = fs::File::open("/dev/urandom").unwrap();
    random.read_exact(&mut bytes).unwrap();
    bytes
}

impl Still {
    pub(crate) fn start(dir: &Path, words: &[Vec<String>]) -> Self {
        let socket = |name: &str| format!("unix:{},server=on,wait=off", dir.join(name).display());
        for name in ["qmp.sock", "rig.sock", "more.sock"] {
            fs::remove_file(dir.join(name)).ok();
        }
        let log = fs::File::create(dir.join("qemu.log")).unwrap();
        let child = Command::new("qemu-system-x86_64")
            .args("-machine q35 -accel tcg -nodefaults -no-user-config -display none -S".split(' '))
            .args(["-m", "64", "-qmp", &socket("qmp.sock")])
            .args(["-qmp", &socket("rig.sock")])
            .args(["-qmp", &socket("more.sock")])
            .args(words.concat())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let monitor = Qmp::connect(&dir.join("rig.sock"), WAIT).unwrap_or_else(|error| {
            let said = fs::read_to_string(dir.join("qemu.log")).unwrap_or_default();
            panic!("{error:#}: {said}")
        });
        Self {
            dir: dir.to_owned(),
            child,
            monitor,
        }
    }

    pub(crate) fn target(&self) -> String {
        format!("qmp:{}", self.dir.join("qmp.sock").display())
    }

    /// Runs a command of `qemu-io` on a disk as its device would.
    pub(crate) fn io(&mut self, disk: &str, line: &str) {
        io(&mut self.monitor, disk, line);
    }

    /// Ends it in good order.
    pub(crate) fn quit(mut self) {
        self.monitor.execute("quit", json!({})).ok();
        self.child.wait().unwrap();
    }

    /// Nothing of ours is in it but bitmaps, and none of its disks is held.
    pub(crate) fn is_clean(&mut self) {
        is_clean(&mut self.monitor);
    }

    /// A bitmap command.
    pub(crate) fn bitmap(&mut self, command: &str, node: &str, name: &str) {
        let what = json!({ "node": node, "name": name });
        self.monitor
            .execute(&format!("block-dirty-bitmap-{command}"), what)
            .unwrap();
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

pub(crate) fn io(monitor: &mut Qmp, disk: &str, line: &str) {
    let part = if disk.starts_with("vd") {
        "/virtio-backend"
    } else {
        ""
    };
    let said = monitor
        .human(&format!(
            "qemu-io -d /machine/peripheral/{disk}{part} \"{line}\""
        ))
        .unwrap();
    // What it did it says on QEMU's own output.
    assert!(said.trim().is_empty(), "qemu-io {line} on {disk}: {said}");
}

pub(crate) fn bitmaps(monitor: &mut Qmp, node: &str) -> Vec<(String, bool)> {
    let nodes = monitor
        .execute("query-named-block-nodes", json!({ "flat": true }))
        .unwrap();
    let node = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|it| it["node-name"] == node);
    let found = node.and_then(|node| node["dirty-bitmaps"].as_array());
    found
        .into_iter()
        .flatten()
        .filter_map(|it| Some((it["name"].as_str()?.to_owned(), it["recording"] == true)))
        .collect()
}

pub(crate) fn is_clean(monitor: &mut Qmp) {
    let nodes = monitor
        .execute("query-named-block-nodes", json!({ "flat": true }))
        .unwrap();
    for node in nodes.as_array().unwrap() {
        let name = node["node-name"].as_str().unwrap();
        assert!(!name.starts_with("forerun"), "node {name} stays");
    }
    for query in ["query-jobs", "query-block-exports"] {
        let found = monitor.execute(query, json!({})).unwrap();
        for it in found.as_array().unwrap() {
            let id = it["id"].as_str().unwrap();
            assert!(!id.starts_with("forerun"), "{query}: {id} stays");
        }
    }
}

/// Looks until it is so.
pub(crate) fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + WAIT;
    while !so() {
        assert!(Instant::now() < deadline, "{what}: not within {WAIT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Our fleecing jobs that run.
pub(crate) fn our_jobs(monitor: &mut Qmp) -> Vec<String> {
    let jobs = monitor.execute("query-jobs", json!({})).unwrap();
    jobs.as_array()
        .unwrap()
        .iter()
        .filter(|job| job["status"] == "running" && job["type"] == "backup")
        .filter_map(|job| job["id"].as_str().map(str::to_owned))
        .filter(|id| id.starts_with("forerun"))
        .collect()
}

/// What a disk must hold.
pub(crate) struct Model(pub(crate) Vec<u8>);

impl Model {
    pub(crate) fn zeros(size: u64) -> Self {
        Self(vec![0; usize::try_from(size).unwrap()])
    }

    pub(crate) fn fill(&mut self, offset: u64, length: u64, byte: u8) {
        let at = |value: u64| usize::try_from(value).unwrap();
        self.0[at(offset)..at(offset + length)].fill(byte);
    }

    /// Writes a pattern here and to the disk.
    pub(crate) fn write(&mut self, vm: &mut Still, disk: &str, offset: u64, length: u64, byte: u8) {
        vm.io(disk, &format!("write -P {byte} {offset} {length}"));
        self.fill(offset, length, byte);
    }
}

/// A small file system of its own, in memory; it goes with the value.
pub(crate) struct Tmpfs(PathBuf);

impl Tmpfs {
    pub(crate) fn mount(path: &Path, size: u64) -> Self {
        fs::create_dir_all(path).unwrap();
        mount(path, &format!("size={size},mode=0700"), &[]);
        Self(path.to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn grow(&self, size: u64) {
        mount(&self.0, &format!("remount,size={size}"), &[]);
    }

    /// Leaves no byte free.
    pub(crate) fn fill(&self) {
        use std::io::Write;
        let mut file = fs::File::create(self.0.join("ballast")).unwrap();
        while file.write_all(&[1; 16384]).is_ok() {}
        while file.write_all(&[1; 4096]).is_ok() {}
    }

    pub(crate) fn empty(&self) {
        fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

fn mount(path: &Path, options: &str, more: &[&str]) {
    let output = Command::new("mount")
        .args(["-t", "tmpfs", "-o", options])
        .args(more)
        .arg("forerun-test")
        .arg(path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "this test mounts a tmpfs and needs to be root: {said}"
    );
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().ok();
    }
}
