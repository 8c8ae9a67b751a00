//! Twenty guests on one host: `run` on all of them in one process, all together at one instant, and twenty processes of which
//! one is killed. Every point is exact, and the host's budget holds all the time.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::print_stdout, reason = "numbers for who reads the log")]

mod vm_common;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use forerun::budget::{Doing, Limits, Overview, Share};
use forerun::clock;
use forerun_rig::block::RawFile;
use forerun_rig::guest::{Disk, Guest, Program};
use forerun_rig::stamp::{Verdict, check};
use serde_json::Value;
use vm_common::{Ended, MIB, Started, WAIT, wait_for};

const GUESTS: usize = 20;
/// What all runs together may read in a second: less than what the guests change.
const RATE: u64 = 8 * MIB;
const PASSES: usize = 2;
/// How long they copy ahead.
const AHEAD: Duration = Duration::from_secs(20);
/// Boots at a time.
const BOOTS: usize = 4;
/// What QEMU may read beyond the rate in a while: requests that were in flight, the guests' own, and a burst.
const BESIDES: u64 = 4 * MIB;

struct Lab {
    guests: Vec<Guest>,
    directory: tempfile::TempDir,
    runs: u32,
}

impl Lab {
    fn boot() -> Self {
        let directory = tempfile::Builder::new().prefix("twenty").tempdir().unwrap();
        let next = Mutex::new((0..GUESTS).collect::<Vec<_>>());
        let booted = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for _ in 0..BOOTS {
                scope.spawn(|| {
                    loop {
                        let Some(number) = next.lock().unwrap().pop() else {
                            break;
                        };
                        let guest = guest(&directory.path().join(number.to_string()), number);
                        booted.lock().unwrap().push((number, guest));
                    }
                });
            }
        });
        let mut booted = booted.into_inner().unwrap();
        booted.sort_by_key(|(number, _)| *number);
        let mut lab = Self {
            guests: booted.into_iter().map(|(_, guest)| guest).collect(),
            directory,
            runs: 0,
        };
        let repo = lab.repo().display().to_string();
        lab.begin(&["init", &repo]).end().done();
        lab
    }

    fn repo(&self) -> PathBuf {
        self.directory.path().join("repository")
    }

    fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    fn targets(&self) -> Vec<String> {
        let target = |guest: &Guest| format!("qmp:{}", guest.qmp_socket().display());
        self.guests.iter().map(target).collect()
    }

    fn begin(&mut self, words: &[&str]) -> Started {
        self.runs += 1;
        let path = |ending: &str| {
            self.directory
                .path()
                .join(format!("run-{}.{ending}", self.runs))
        };
        let mut command = Command::new(env!("CARGO_BIN_EXE_forerun"));
        command
            .env("FORERUN_REPO", self.repo())
            .env("FORERUN_STATE_DIR", self.state())
            // What the machine of the tests is busy with is not theirs.
            .env("FORERUN_NO_LOAD_CONTROL", "1")
            .env("FORERUN_HOST_RATE", RATE.to_string())
            .env("FORERUN_HOST_PASSES", PASSES.to_string());
        Started::spawn(command, words, path("json"), path("log"))
    }

    /// The guest's disk is as after one of its writes in a point of it.
    fn step_of(&mut self, point: &str) -> u64 {
        let output = self.directory.path().join("restored");
        std::fs::remove_dir_all(&output).ok();
        self.begin(&["restore", point, "--output", &output.display().to_string()])
            .end()
            .done();
        let image = RawFile::open(&output.join("vda.raw")).unwrap();
        match check(&[&image]).unwrap() {
            Verdict::Exact(step) => step,
            other => panic!("point {point}: {other:?}"),
        }
    }

    /// The points of these targets of a run are exact.
    fn exact(&mut self, ended: &Ended, targets: &[String]) {
        for target in targets {
            let id = point(ended, target)["id"].as_str();
            let id = id
                .unwrap_or_else(|| panic!("no point of {target}: {ended:#?}"))
                .to_owned();
            assert!(self.step_of(&id) > 0, "{target}");
        }
    }

    fn pids(&self) -> Vec<u32> {
        self.guests.iter().map(|guest| guest.pid()).collect()
    }
}

fn guest(directory: &Path, number: usize) -> Guest {
    let mut guest = Guest::builder(directory)
        .memory_mib(80)
        .disk(Disk::qcow2("vda", 8 * MIB))
        .uuid(&format!("0f0e0d0c-0b0a-4908-8706-0504030201{number:02x}"))
        .program(Program::Stamp("--rate 15 /dev/vda".to_owned()))
        .boot()
        .unwrap();
    guest.wait_for("stamp: running", WAIT).unwrap();
    guest
}

fn point<'a>(ended: &'a Ended, target: &str) -> &'a Value {
    let targets = ended.json["targets"].as_array().unwrap();
    let found = targets.iter().find(|entry| entry["target"] == target);
    found.map_or(&Value::Null, |entry| &entry["point"])
}

/// What was seen of the host while something ran.
#[derive(Debug, Default)]
struct Seen {
    copied: usize,
    froze: usize,
    members: usize,
    /// Bytes that the QEMUs had read, by time.
    read: Vec<(Duration, u64)>,
}

impl Seen {
    #[expect(clippy::cast_precision_loss, reason = "a measure")]
    fn within_the_rate(&self) {
        assert!(self.beyond() <= BESIDES as f64, "{} beyond", self.beyond());
    }

    /// The most that was read in any while before the due time, beyond the rate. After it QEMU also reads what guests overwrite
    /// while they are held, which is not ours to hold back.
    #[expect(clippy::cast_precision_loss, reason = "a measure")]
    fn beyond(&self) -> f64 {
        let mut most = f64::MIN;
        let ahead = |(at, _): &&(Duration, u64)| *at < AHEAD.saturating_sub(Duration::from_secs(2));
        let read: Vec<_> = self.read.iter().take_while(ahead).collect();
        for (at, (from, before)) in read.iter().enumerate() {
            for (to, after) in &read[at..] {
                let allowed = to.saturating_sub(*from).as_secs_f64() * RATE as f64;
                most = most.max((after - before) as f64 - allowed);
            }
        }
        most
    }
}

fn read_by(pids: &[u32]) -> u64 {
    let one = |pid: &u32| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
        let line = text.lines().find_map(|line| line.strip_prefix("rchar: "));
        line.and_then(|count| count.parse::<u64>().ok())
            .unwrap_or(0)
    };
    pids.iter().map(one).sum()
}

/// Looks at the host until a run is over.
fn watch<T>(lab: &Lab, run: impl FnOnce() -> T) -> (Seen, T) {
    let over = AtomicBool::new(false);
    let (state, pids) = (lab.state(), lab.pids());
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let begun = clock::now();
            let mut seen = Seen::default();
            let mut next = Duration::ZERO;
            while !over.load(Ordering::Relaxed) {
                let members = Overview::of(&state);
                let count = |doing| {
                    let does = members.members().iter().filter(|one| one.doing == doing);
                    does.count()
                };
                seen.copied = seen.copied.max(count(Doing::Copies));
                seen.froze = seen.froze.max(count(Doing::Freezes));
                seen.members = seen.members.max(members.members().len());
                let now = clock::now() - begun;
                if now >= next {
                    seen.read.push((now, read_by(&pids)));
                    next = now + Duration::from_millis(250);
                }
                clock::sleep(Duration::from_millis(10));
            }
            seen
        });
        let ended = run();
        over.store(true, Ordering::Relaxed);
        (looks.join().unwrap(), ended)
    })
}

#[expect(clippy::cast_precision_loss, reason = "numbers for who reads them")]
fn tell(what: &str, seen: &Seen, begun: Instant) {
    let read = seen.read.last().map_or(0, |last| last.1 - seen.read[0].1);
    let took = (clock::now() - begun).as_secs_f64();
    println!(
        "{what}: {took:.1} s, at most {} copied and {} froze at once of {} members, {} MiB read ({:.1} MiB/s), at most {:.2} MiB beyond the rate",
        seen.copied,
        seen.froze,
        seen.members,
        read / MIB,
        read as f64 / MIB as f64 / took,
        seen.beyond() / MIB as f64,
    );
    assert!(seen.copied <= PASSES, "{what}: {}", seen.copied);
}

fn soon() -> String {
    (clock::utc_now() + AHEAD).to_string()
}

#[test]
#[ignore = "twenty guests take minutes to boot on a small machine"]
fn twenty_guests_share_one_host() {
    let begun = clock::now();
    let mut lab = Lab::boot();
    let targets = lab.targets();
    println!("{GUESTS} guests in {:.1?}", clock::now() - begun);

    let begun = clock::now();
    let due = soon();
    let all: Vec<&str> = targets.iter().map(String::as_str).collect();
    let words = [&["run"][..], &all, &["--at", &due, "--quiesce", "never"]].concat();
    let started = lab.begin(&words);
    let (seen, ended) = watch(&lab, || started.end());
    tell("one process", &seen, begun);
    seen.within_the_rate();
    assert_eq!(seen.members, GUESTS);
    assert_eq!(seen.froze, 1);
    within_the_rate(&ended, begun);
    let ended = ended.done();
    let order: Vec<&str> = ended.json["targets"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|one| one["target"].as_str())
        .collect();
    assert_eq!(order, all);
    windows(&ended);
    lab.exact(&ended, &targets);

    let begun = clock::now();
    let words = [&["backup"][..], &all, &["--together", "--quiesce", "never"]].concat();
    let started = lab.begin(&words);
    let (seen, ended) = watch(&lab, || started.end());
    // All guests are held at once: half of the time of a freeze is not enough for all residuals by the rate.
    tell("together", &seen, begun);
    let together = &ended.json["together"];
    assert_eq!(together["targets"].as_array().unwrap().len(), GUESTS);
    println!(
        "together: {} targets within {} ms",
        GUESTS, together["spread_ms"]
    );
    windows(&ended);
    lab.exact(&ended, &targets);

    let begun = clock::now();
    let due = soon();
    let mut runs: Vec<Started> = Vec::new();
    for target in &targets {
        let words = ["run", target, "--at", &due, "--quiesce", "never"];
        runs.push(lab.begin(&words));
    }
    let state = lab.state();
    let (seen, ended) = watch(&lab, || {
        // One that copies is killed.
        let mut killed = None;
        wait_for("nobody copies", || {
            let copies = |at: &usize| {
                let seen = Overview::of(&state);
                let mut members = seen.members().iter();
                members.any(|one| one.doing == Doing::Copies && one.target == targets[*at])
            };
            killed = (0..GUESTS).find(copies);
            killed.is_some() && clock::now() - begun > Duration::from_secs(5)
        });
        let killed = killed.unwrap();
        let mut dead = runs.remove(killed);
        dead.child.kill().unwrap();
        dead.child.wait().unwrap();
        (
            killed,
            runs.into_iter().map(Started::end).collect::<Vec<_>>(),
        )
    });
    tell("twenty processes, one killed", &seen, begun);
    seen.within_the_rate();
    let (killed, ended) = ended;
    let others: Vec<&String> = targets
        .iter()
        .enumerate()
        .filter(|(at, _)| *at != killed)
        .map(|(_, target)| target)
        .collect();
    for (run, target) in ended.into_iter().zip(others) {
        lab.exact(&run.done(), std::slice::from_ref(target));
    }
    let again = lab
        .begin(&["backup", &targets[killed], "--quiesce", "never"])
        .end()
        .done();
    lab.exact(&again, &targets[killed..=killed]);
    assert_eq!(Overview::of(&lab.state()).members().len(), 0);
}

/// All that the points say was read fits into the time that it took, by the rate.
#[expect(clippy::cast_precision_loss, reason = "a measure")]
fn within_the_rate(ended: &Ended, begun: Instant) {
    let took = (clock::now() - begun).as_secs_f64();
    let bytes = |name: &str| -> u64 {
        let targets = ended.json["targets"].as_array().unwrap().iter();
        let bytes = targets.filter_map(|one| one["point"]["bytes"][name].as_u64());
        bytes.sum()
    };
    let (ahead, residual) = (bytes("precopied"), bytes("residual"));
    println!(
        "  {} MiB ahead, residuals of {} MiB",
        ahead / MIB,
        residual / MIB
    );
    // A burst of a tenth of a second, and the last request.
    let most = (took + 0.1) * RATE as f64 + MIB as f64;
    assert!(
        (ahead + residual) as f64 <= most,
        "{} in {took} s",
        ahead + residual
    );
}

/// Windows and waits of the points of a run.
fn windows(ended: &Ended) {
    let of = |name: &str| {
        let mut all: Vec<u64> = ended.json["targets"]
            .as_array()
            .unwrap()
            .iter()
            .filter_map(|one| one["point"][name].as_u64())
            .collect();
        all.sort_unstable();
        format!(
            "{name} {} / {} / {}",
            all[0],
            all[all.len() / 2],
            all[all.len() - 1]
        )
    };
    println!(
        "  least, median, most: {}, {}, {}",
        of("window_ms"),
        of("waited_ms"),
        of("released_ms")
    );
}

#[test]
#[ignore = "a measurement"]
fn figures() {
    let root = tempfile::tempdir().unwrap();
    let limits = Limits {
        rate: Some(1 << 50),
        ..Limits::default()
    };
    let names: Vec<String> = (0..GUESTS).map(|number| format!("vm-{number}")).collect();
    let join = |name: &String| Share::join(root.path(), name, name, "r", limits);
    let members: Vec<_> = names.iter().map(join).collect();
    let rounds = 10_000;
    let begin = clock::now();
    for _ in 0..rounds {
        members[0].tell(|_| {});
    }
    let look = (clock::now() - begin) / rounds;
    let begin = clock::now();
    for _ in 0..rounds {
        assert!(members[0].wait(1, &|| true));
    }
    let request = (clock::now() - begin) / rounds;
    println!("a look at {GUESTS} members takes {look:?}, a request of the rate {request:?}");
}
