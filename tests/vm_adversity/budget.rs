//! Independent runs on one host: they share passes, freezes and one rate, and one that dies or is stopped anywhere is no
//! hindrance to the others.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use forerun::budget::{Doing, Overview};

use crate::lab::{Lab, MIB, Ran, Running, Still, drive, random_image, until};

/// A VM with one disk of noise.
struct Vm {
    still: Still,
    name: String,
    bytes: Vec<u8>,
}

fn vms(lab: &Lab, count: usize, size: u64) -> Vec<Vm> {
    let vm = |number: usize| {
        let name = format!("vm-{number}");
        let directory = lab.path().join(&name);
        std::fs::create_dir(&directory).unwrap();
        let (image, bytes) = random_image(&directory, "a.qcow2", "qcow2", size);
        Vm {
            still: Still::start(&directory, &[drive("vda", &image, "qcow2")]),
            name,
            bytes,
        }
    };
    (0..count).map(vm).collect()
}

fn state(lab: &Lab) -> PathBuf {
    lab.path().join("state")
}

fn begin(lab: &Lab, vm: &Vm, fault: &str, more: &[&str]) -> Running {
    let target = vm.still.target();
    let words = [&["backup", &*target, "--as", &*vm.name], more].concat();
    let mut command = lab.command(&words);
    if !fault.is_empty() {
        command.env("FORERUN_FAULT", fault);
    }
    Running::spawn(command)
}

/// The most that copied and that froze at once while these ran, and how they ended.
fn watch(lab: &Lab, mut runs: Vec<Running>) -> (usize, usize, Vec<Ran>) {
    let (mut copied, mut froze) = (0, 0);
    until("the runs end", || {
        let seen = Overview::of(&state(lab));
        let count = |doing| {
            let does = seen.members().iter().filter(|member| member.doing == doing);
            does.count()
        };
        copied = copied.max(count(Doing::Copies));
        froze = froze.max(count(Doing::Freezes));
        std::thread::sleep(Duration::from_millis(5));
        !runs.iter_mut().any(Running::is_running)
    });
    (copied, froze, runs.into_iter().map(Running::end).collect())
}

#[test]
fn independent_runs_share_passes_freezes_and_one_rate() {
    const SIZE: u64 = 16 * MIB;
    let lab = Lab::new();
    let mut vms = vms(&lab, 5, SIZE);
    let host = ["--host-rate", "16MiB/s", "--max-residual", "1MiB"];
    let begun = Instant::now();
    let runs: Vec<Running> = vms.iter().map(|vm| begin(&lab, vm, "", &host)).collect();
    until("status tells of the others", || {
        let target = vms[1].still.target();
        let seen = lab.forerun(&["status", &target, "--as", "vm-1"]);
        let members = seen.json["host"]["members"].as_array().unwrap();
        members.len() > 2 && seen.json["host"]["rate_limit"] == 16 * MIB
    });
    let (copied, froze, ended) = watch(&lab, runs);
    let took = begun.elapsed();
    eprintln!("{copied} copied and {froze} froze at once, {took:?}");
    assert_eq!((copied, froze), (2, 1));
    for (ran, vm) in ended.into_iter().zip(&mut vms) {
        let ran = ran.done();
        assert!(ran.at("/targets/0/point/waited_ms").is_u64());
        lab.same(&ran.point(), &[("vda", &vm.bytes)]);
        vm.still.is_clean();
    }
    assert_eq!(Overview::of(&state(&lab)).members().len(), 0);
}

#[test]
fn all_together_are_no_faster_than_the_rate_of_the_host() {
    const SIZE: u64 = 16 * MIB;
    const RATE: u64 = 12 * MIB;
    let lab = Lab::new();
    let mut vms = vms(&lab, 4, SIZE);
    let begun = Instant::now();
    let rate = format!("{RATE}B/s");
    let host = ["--host-rate", &*rate, "--host-passes", "4"];
    let runs = vms.iter().map(|vm| begin(&lab, vm, "", &host)).collect();
    // What QEMU has read by the measure of its own requests.
    let (_, _, ended) = watch(&lab, runs);
    let took = begun.elapsed().as_secs_f64();
    let mut read = 0;
    for (ran, vm) in ended.into_iter().zip(&mut vms) {
        let ran = ran.done();
        read += ran.precopied() + ran.residual();
        lab.same(&ran.point(), &[("vda", &vm.bytes)]);
    }
    #[expect(clippy::cast_precision_loss, reason = "a measure")]
    let speed = read as f64 / took / RATE as f64;
    eprintln!(
        "{} MiB in {took:.1} s: {:.1} % of the rate",
        read / MIB,
        speed * 100.0
    );
    assert!(read >= 4 * SIZE);
    // A burst of a tenth of a second.
    assert!(speed <= 1.0 + 0.1 / took, "{speed}");
}

#[test]
fn a_run_on_several_makes_its_points_at_the_due_time_and_one_that_fails_fails_alone() {
    let lab = Lab::new();
    let mut vms: Vec<(Still, Vec<u8>)> = (0..3)
        .map(|number| {
            let directory = lab.path().join(number.to_string());
            std::fs::create_dir(&directory).unwrap();
            let (image, bytes) = random_image(&directory, "a.qcow2", "qcow2", 4 * MIB);
            let uuid = format!("0f0e0d0c-0b0a-4908-8706-05040302010{number}");
            let words = [drive("vda", &image, "qcow2"), vec!["-uuid".into(), uuid]];
            (Still::start(&directory, &words), bytes)
        })
        .collect();
    let targets: Vec<String> = vms.iter().map(|(still, _)| still.target()).collect();
    let nowhere = format!("qmp:{}", lab.path().join("nowhere").display());
    let due = jiff::Timestamp::now() + Duration::from_secs(8);
    let ran = lab.forerun(&[
        "run",
        &targets[0],
        &nowhere,
        &targets[1],
        &targets[2],
        "--at",
        &due.to_string(),
    ]);
    let errors = ran.json["errors"].as_array().unwrap();
    assert_eq!(errors.len(), 1, "{}", ran.json);
    assert!(errors[0].to_string().contains("nowhere"), "{}", ran.json);
    let made = ran.json["targets"].as_array().unwrap();
    assert_eq!(made.len(), 3, "{}", ran.json);
    for ((target, made), (still, bytes)) in targets.iter().zip(made).zip(&mut vms) {
        assert_eq!(made["target"], **target);
        let point = &made["point"];
        let instant: jiff::Timestamp = point["instant"].as_str().unwrap().parse().unwrap();
        let window = point["window_ms"].as_u64().unwrap();
        eprintln!("{target}: at {instant}, due {due}, window {window} ms");
        assert!(instant >= due, "{point}");
        assert!(
            point["bytes"]["precopied"].as_u64().unwrap() >= 4 * MIB,
            "{point}"
        );
        lab.same(point["id"].as_str().unwrap(), &[("vda", bytes)]);
        still.is_clean();
    }
}

/// Changes something on each disk.
#[cfg(feature = "fault-injection")]
fn change(vms: &mut [Vm], byte: u8) {
    for vm in vms {
        vm.still.io("vda", &format!("write -P {byte} 0 1M"));
        vm.bytes[..usize::try_from(MIB).unwrap()].fill(byte);
    }
}

/// What has live passes even of so little, and time to meet others in each state.
#[cfg(feature = "fault-injection")]
const SLOW: [&str; 8] = [
    "--host-passes",
    "1",
    "--host-rate",
    "2MiB/s",
    "--max-residual",
    "64KiB",
    "--pre-freeze",
    "sleep 0.5",
];

/// They made their points, late perhaps.
#[cfg(feature = "fault-injection")]
fn made_points(lab: &Lab, what: &str, ended: Vec<Ran>, vms: &[Vm]) {
    for (ran, vm) in ended.into_iter().zip(vms) {
        assert!(
            [0, 3, 4].contains(&ran.code),
            "{what}: {} {}",
            ran.words,
            ran.json
        );
        lab.same(&ran.point(), &[("vda", &vm.bytes)]);
    }
}

#[cfg(feature = "fault-injection")]
#[test]
fn one_that_dies_anywhere_is_no_hindrance() {
    let lab = Lab::new();
    let mut vms = vms(&lab, 3, 2 * MIB);
    // Where it dies, when it begins, and whether it has a pass before its freeze.
    let cases = [
        ("budget:locked:copies#1", None, true),
        ("budget:did:copies#1", None, true),
        ("budget:rate#3", None, true),
        ("budget:locked:idle#1", None, true),
        ("budget:did:idle#1", None, true),
        ("budget:locked:waits#1", Some(Doing::Copies), true),
        ("budget:did:waits#1", Some(Doing::Copies), true),
        (
            "budget:locked:waits-to-freeze#1",
            Some(Doing::Freezes),
            false,
        ),
        ("budget:did:waits-to-freeze#1", Some(Doing::Freezes), false),
        ("budget:locked:freezes#1", None, false),
        ("budget:did:freezes#1", None, false),
        ("qmp:transaction:answered#1", None, false),
    ];
    for (round, (fault, when, passes)) in cases.into_iter().enumerate() {
        change(&mut vms, u8::try_from(round).unwrap() + 1);
        let words = if passes { &SLOW[..] } else { &SLOW[..4] };
        let kill = format!("kill@{fault}");
        let begun = Instant::now();
        let mut runs: Vec<Running> = Vec::new();
        if when.is_none() {
            runs.push(begin(&lab, &vms[0], &kill, words));
        }
        runs.extend(vms[1..].iter().map(|vm| begin(&lab, vm, "", &SLOW)));
        if let Some(when) = when {
            until("the others are there", || {
                let seen = Overview::of(&state(&lab));
                seen.members().iter().any(|member| member.doing == when)
            });
            runs.insert(0, begin(&lab, &vms[0], &kill, words));
        }
        let (copied, froze, mut ended) = watch(&lab, runs);
        let took = begun.elapsed();
        let died = ended.remove(0);
        eprintln!("{kill}: {took:?}");
        assert_eq!(died.code, -1, "{kill}: {} {}", died.words, died.json);
        assert!(copied <= 1 && froze <= 1, "{kill}: {copied} {froze}");
        assert!(took < Duration::from_secs(40), "{kill}: {took:?}");
        made_points(&lab, &kill, ended, &vms[1..]);
        let target = vms[0].still.target();
        let again = lab
            .forerun(&["backup", &target, "--as", &vms[0].name])
            .done();
        lab.same(&again.point(), &[("vda", &vms[0].bytes)]);
        vms[0].still.is_clean();
    }
}

#[cfg(feature = "fault-injection")]
#[test]
fn one_that_is_stopped_is_not_waited_for() {
    let lab = Lab::new();
    let mut vms = vms(&lab, 3, 2 * MIB);
    for (round, (fault, words)) in [
        ("budget:locked:copies#1", "has held its lock"),
        ("budget:rate#1", ""),
    ]
    .into_iter()
    .enumerate()
    {
        change(&mut vms, u8::try_from(round).unwrap() + 1);
        let stop = format!("stop@{fault}");
        let begun = Instant::now();
        let stopped = begin(&lab, &vms[0], &stop, &SLOW);
        until("it is stopped", || {
            let stat = format!("/proc/{}/stat", stopped.pid().as_raw_nonzero());
            std::fs::read_to_string(stat).is_ok_and(|stat| stat.contains(") T "))
        });
        let runs: Vec<Running> = vms[1..]
            .iter()
            .map(|vm| begin(&lab, vm, "", &SLOW))
            .collect();
        let ended: Vec<Ran> = runs.into_iter().map(Running::end).collect();
        let took = begun.elapsed();
        eprintln!("{stop}: {took:?}");
        for ran in &ended {
            assert!(ran.words.contains(words), "{stop}: {}", ran.words);
        }
        assert!(took < Duration::from_secs(60), "{stop}: {took:?}");
        made_points(&lab, &stop, ended, &vms[1..]);
        stopped.signal(rustix::process::Signal::CONT);
        made_points(&lab, &stop, vec![stopped.end()], &vms[..1]);
    }
}
