//! Others at work on the same VM: an operator who cancels, copies or exports, and a second command.

use std::fs;
use std::time::{Duration, Instant};

use forerun_rig::block::RawFile;
use forerun_rig::guest::{Disk, Guest, Program};
use forerun_rig::stamp;
use serde_json::json;

use crate::lab::{
    Lab, MIB, Model, Still, WAIT, drive, image, is_clean, our_jobs, random_image, slow_drive, until,
};

/// Cancels our jobs as soon as they run.
fn cancel(vm: &mut Still) {
    let mut jobs = Vec::new();
    until("a fleecing job", || {
        jobs = our_jobs(&mut vm.monitor);
        !jobs.is_empty()
    });
    for job in jobs {
        let what = json!({ "device": job, "force": true });
        vm.monitor.execute("block-job-cancel", what).unwrap();
    }
}

#[test]
fn a_fleecing_job_that_somebody_cancels_voids_its_spool() {
    let lab = Lab::new();
    let (a, bytes) = random_image(lab.path(), "a.qcow2", "qcow2", 24 * MIB);
    let mut vm = Still::start(lab.path(), &[slow_drive("vda", &a, 10 * MIB)]);
    let mut model = Model(bytes);
    let run = lab.begin(&["backup", &vm.target(), "--as", "vm"]);
    cancel(&mut vm);
    // The scratch goes on answering, with the live disk: it must not be believed.
    let before = model.0.clone();
    model.write(&mut vm, "vda", 0, MIB, 0x21);
    model.write(&mut vm, "vda", 23 * MIB, MIB, 0x22);
    let ran = run.end().ended(3).warned("ended by somebody else");
    vm.is_clean();
    let found = lab.restored(&ran.point(), "vda");
    assert!(
        found == before || found == model.0,
        "the point is of no instant"
    );
    // And the next one builds on what is true.
    model.write(&mut vm, "vda", 12 * MIB, MIB, 0x23);
    let ran = lab
        .forerun(&["backup", &vm.target(), "--as", "vm"])
        .ended(0)
        .rescanned(&[]);
    lab.same(&ran.point(), &[("vda", &model.0)]);
}

#[test]
fn a_freeze_that_is_cancelled_again_and_again_is_given_up() {
    let lab = Lab::new();
    let (a, bytes) = random_image(lab.path(), "a.qcow2", "qcow2", 24 * MIB);
    let mut vm = Still::start(lab.path(), &[slow_drive("vda", &a, 10 * MIB)]);
    let mut model = Model(bytes);
    let mut run = lab.begin(&["backup", &vm.target(), "--as", "vm"]);
    let mut byte = 0;
    let mut cancelled = 0;
    let deadline = Instant::now() + WAIT;
    while run.is_running() && Instant::now() < deadline {
        for job in our_jobs(&mut vm.monitor) {
            // It may have ended already.
            let what = json!({ "device": job, "force": true });
            if vm.monitor.execute("block-job-cancel", what).is_ok() {
                cancelled += 1;
            }
            // Enough to be read at the next freeze, too.
            byte += 1;
            model.write(&mut vm, "vda", 0, 8 * MIB, byte);
        }
    }
    let ran = run.end();
    assert!(cancelled > 0);
    vm.is_clean();
    if ran.code == 4 {
        ran.failed(4, "ended by somebody else, 3 times", "--deadline");
    } else {
        // One was too quick for us; then it is exact.
        let found = lab.restored(&ran.ended(3).point(), "vda");
        assert_eq!(found[8 << 20..], model.0[8 << 20..]);
        assert!(found[..8 << 20].iter().all(|it| *it == found[0]));
    }
    let ran = lab
        .forerun(&["backup", &vm.target(), "--as", "vm"])
        .ended(0)
        .rescanned(&[]);
    lab.same(&ran.point(), &[("vda", &model.0)]);
}

/// A copy of a disk that the operator makes, so slowly that it does not end.
fn operators_job(vm: &mut Still, kind: &str) {
    let node = json!({ "driver": "null-co", "node-name": "operator-node", "size": 24 * MIB });
    vm.monitor.execute("blockdev-add", node).unwrap();
    let job = json!({
        "job-id": "operator", "device": "vda-node", "target": "operator-node", "sync": "full", "speed": 4096,
    });
    vm.monitor.execute(kind, job).unwrap();
}

fn operators_server(vm: &mut Still) {
    let path = vm.dir.join("operator.nbd").display().to_string();
    let address = json!({ "type": "unix", "data": { "path": path } });
    vm.monitor
        .execute("nbd-server-start", json!({ "addr": address }))
        .unwrap();
    let export =
        json!({ "type": "nbd", "id": "operator", "name": "operator", "node-name": "vda-node" });
    vm.monitor.execute("block-export-add", export).unwrap();
}

struct One {
    lab: Lab,
    vm: Still,
    model: Model,
}

impl One {
    fn new() -> Self {
        let lab = Lab::new();
        let a = image(lab.path(), "a.qcow2", "qcow2", 24 * MIB);
        let vm = Still::start(lab.path(), &[drive("vda", &a, "qcow2")]);
        let model = Model::zeros(24 * MIB);
        let mut one = Self { lab, vm, model };
        one.write(0, 0x31);
        one
    }

    fn write(&mut self, at: u64, byte: u8) {
        self.model.write(&mut self.vm, "vda", at * MIB, MIB, byte);
    }

    fn backup(&self) -> [String; 4] {
        ["backup", &self.vm.target(), "--as", "vm"].map(str::to_owned)
    }

    /// A backup that waits until the operator has ended what is there.
    fn waits_for(&mut self, end: impl FnOnce(&mut Still)) {
        let words = self.backup();
        let mut run = self.lab.begin(&words.each_ref().map(String::as_str));
        std::thread::sleep(Duration::from_secs(4));
        assert!(run.is_running(), "it does not wait: {:?}", run.end());
        self.write(2, 0x32);
        end(&mut self.vm);
        let ran = run.end().ended(0);
        self.lab.same(&ran.point(), &[("vda", &self.model.0)]);
        self.vm.is_clean();
    }

    /// A backup that gives up with these words, and lets the operator's thing be.
    fn gives_up(&mut self, message: &str, hint: &str, query: &str) {
        let words = self.backup();
        let begin = Instant::now();
        let ran = self.lab.forerun(&words.each_ref().map(String::as_str));
        ran.failed(6, message, hint);
        assert!(begin.elapsed() < Duration::from_secs(60));
        self.vm.is_clean();
        let there = self.vm.monitor.execute(query, json!({})).unwrap();
        assert!(there.to_string().contains("operator"), "{there}");
    }
}

#[test]
fn somebody_elses_block_job_is_waited_for() {
    for kind in ["blockdev-backup", "blockdev-mirror"] {
        let mut one = One::new();
        operators_job(&mut one.vm, kind);
        one.waits_for(|vm| {
            let what = json!({ "device": "operator", "force": true });
            vm.monitor.execute("block-job-cancel", what).unwrap();
        });
    }
}

#[test]
fn a_block_job_that_does_not_end_is_busy() {
    let mut one = One::new();
    operators_job(&mut one.vm, "blockdev-backup");
    one.gives_up(
        "block job is on disk `vda`: `operator`",
        "cancel it",
        "query-jobs",
    );
}

#[test]
fn somebody_elses_nbd_server_is_waited_for_and_stays() {
    let mut one = One::new();
    operators_server(&mut one.vm);
    one.gives_up(
        "NBD server is in use by somebody else",
        "backup job or export",
        "query-block-exports",
    );
    one.waits_for(|vm| {
        vm.monitor.execute("nbd-server-stop", json!({})).unwrap();
    });
}

#[test]
fn two_commands_on_one_target_work_one_at_a_time() {
    let dir = tempfile::Builder::new().prefix("rig").tempdir().unwrap();
    let lab = Lab::new();
    let mut guest = Guest::builder(dir.path())
        .disk(Disk::qcow2("vda", 24 * MIB).iothread(true))
        .disk(Disk::raw("vdb", 24 * MIB))
        .program(Program::Stamp("--trim --span 16 /dev/vda /dev/vdb".into()))
        .uuid("8d4bd2e0-7a5c-4b0e-9d4a-0c51f3a0a001")
        .boot()
        .unwrap();
    guest.wait_for("stamp: seq ", WAIT).unwrap();
    let target = format!("qmp:{}", guest.qmp_socket().display());
    // In one repository the second one is told who works.
    let slow = lab.begin(&["precopy", &target, "--rate", "1MiB/s"]);
    let state = lab
        .path()
        .join("state/8d4bd2e0-7a5c-4b0e-9d4a-0c51f3a0a001");
    let held = || {
        fs::read_dir(&state).is_ok_and(|mut entries| {
            entries.any(|entry| {
                let name = entry.unwrap().file_name();
                name.to_string_lossy().starts_with("run-")
            })
        })
    };
    until("the first run", held);
    let pid = slow.pid().as_raw_nonzero().to_string();
    lab.forerun(&["backup", &target])
        .failed(6, "is held by `forerun precopy` (pid ", "wait for it")
        .failed(6, &pid, "");
    slow.signal(rustix::process::Signal::INT);
    slow.end().failed(130, "interrupted", "kept");
    // In two repositories both are made, and both are exact.
    let other = lab.other_repository();
    let mut runs = Vec::new();
    for repo in [lab.repo(), &other] {
        let mut command = lab.command(&["backup", &target]);
        command.env("FORERUN_REPO", repo);
        command.stdout(std::process::Stdio::piped());
        command.stderr(std::process::Stdio::piped());
        runs.push((repo, command.spawn().unwrap()));
    }
    for (repo, child) in runs {
        let output = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(0 | 3)), "{said}");
        let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let point = json["targets"][0]["point"]["id"].as_str().unwrap();
        let to = lab.path().join("both");
        let words = ["restore", point, "--output", to.to_str().unwrap()];
        let restored = lab
            .command(&words)
            .env("FORERUN_REPO", repo)
            .output()
            .unwrap();
        assert!(restored.status.success(), "{restored:?}");
        exact(&to);
        fs::remove_dir_all(to).unwrap();
    }
    is_clean(guest.monitor());
    goes_on(&mut guest);
}

#[test]
fn who_holds_the_monitor_is_told_when_it_is_a_command_of_ours() {
    let lab = Lab::new();
    let (a, bytes) = random_image(lab.path(), "a.qcow2", "qcow2", 24 * MIB);
    let mut vm = Still::start(lab.path(), &[slow_drive("vda", &a, 2 * MIB)]);
    let target = vm.target();
    let words = ["backup", &target, "--as", "vm", "--deadline", "60s"];
    let run = lab.begin(&words);
    until("a fleecing job", || !our_jobs(&mut vm.monitor).is_empty());
    let pid = run.pid().as_raw_nonzero().to_string();
    lab.forerun(&["status", &target, "--as", "vm"])
        .failed(6, "is held by `forerun backup qmp:", "wait for it")
        .failed(6, &format!("(pid {pid})"), "");
    let ran = run.end().ended(0);
    lab.same(&ran.point(), &[("vda", &bytes)]);
}

/// The restored pair is of one instant.
pub(crate) fn exact(directory: &std::path::Path) {
    let open = |name: &str| RawFile::open(&directory.join(name)).unwrap();
    let (a, b) = (open("vda.raw"), open("vdb.raw"));
    let verdict = stamp::check(&[&a, &b]).unwrap();
    assert!(
        matches!(verdict, stamp::Verdict::Exact(step) if step > 0),
        "{verdict:?}"
    );
}

/// The guest runs and its stamps go on.
pub(crate) fn goes_on(guest: &mut Guest) {
    let status = guest.monitor().execute("query-status", json!({})).unwrap();
    assert_eq!(status["status"], "running");
    let seq = |guest: &Guest| guest.last_line("stamp: seq ").unwrap();
    let before = seq(guest);
    until("the guest's next stamp", || seq(guest) != before);
}
