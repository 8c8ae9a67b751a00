//! Giving way: an idle guest is copied at full speed, one that reads is not disturbed for long, and what is seen is told.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use forerun_rig::qmp::Qmp;
use serde_json::json;

use crate::lab::{Lab, MIB, Ran, Running, Still, WAIT, drive, io, random_image, throttled_drive};

/// Thresholds of the host that a machine under test cannot pass: what it is busy with is not the test's.
const HOST: [&str; 8] = [
    "--max-cpu",
    "100%",
    "--max-io-pressure",
    "100%",
    "--max-memory-pressure",
    "100%",
    "--max-disk",
    "100%",
];

/// Runs a command that looks at the load.
fn watching(lab: &Lab, words: &[&str]) -> Ran {
    let mut command = lab.command(&[words, &HOST].concat());
    command.env_remove("FORERUN_NO_LOAD_CONTROL");
    command.env("FORERUN_LOG", "forerun::load=debug");
    Running::spawn(command).end()
}

/// Reads of 64 KiB as the guest's device would, some fifty a second; `aio_read` is what QEMU counts.
fn read(mut monitor: Qmp, ended: &AtomicBool) {
    let mut block: u64 = 0;
    while !ended.load(Ordering::Relaxed) {
        block = (block * 7 + 3) % 512;
        io(
            &mut monitor,
            "vda",
            &format!("aio_read -q {} 64k", block << 16),
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_idle_guest_is_copied_at_full_speed() {
    let lab = Lab::new();
    let (image, _) = random_image(lab.path(), "a.qcow2", "qcow2", 96 * MIB);
    let vm = Still::start(lab.path(), &[drive("vda", &image, "qcow2")]);
    let target = vm.target();
    let ran = watching(&lab, &["precopy", &target, "--as", "vm", "--once"]).done();
    let load = ran.at("/targets/0/load");
    for reason in load["reasons"].as_object().unwrap().keys() {
        assert!(["rising", "measuring"].contains(&&**reason), "{load}");
    }
    assert!(load["slowed_ms"].as_u64().unwrap() < 1500, "{load}");
    assert_eq!(ran.at("/targets/0/residual"), 0);
}

#[test]
fn a_guest_that_reads_is_given_way_to() {
    let lab = Lab::new();
    let (image, _) = random_image(lab.path(), "a.qcow2", "qcow2", 192 * MIB);
    let vm = Still::start(
        lab.path(),
        &[throttled_drive(
            "vda",
            &image,
            &json!({ "bps-total": 20 * MIB }),
        )],
    );
    let target = vm.target();
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let monitor = Qmp::connect(&lab.path().join("more.sock"), WAIT).unwrap();
        let reader = scope.spawn(|| read(monitor, &ended));
        std::thread::sleep(Duration::from_secs(1));
        let seen = watching(
            &lab,
            &[
                "load",
                &target,
                "--as",
                "vm",
                "--count",
                "2",
                "--interval",
                "800ms",
            ],
        );
        let until = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(8);
        let begun = Instant::now();
        let ran = watching(
            &lab,
            &[
                "precopy",
                &target,
                "--as",
                "vm",
                "--until",
                &until.to_string(),
            ],
        );
        let took = begun.elapsed();
        // Told that the time goes before the guest's ease, it no longer gives way: so much would not be copied otherwise.
        let due = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(8);
        let words = [
            "run",
            &*target,
            "--as",
            "vm",
            "--hard",
            "--at",
            &due.to_string(),
        ];
        let hard = watching(&lab, &words);
        ended.store(true, Ordering::Relaxed);
        reader.join().unwrap();
        let ran = ran.done();

        // What it sees.
        let seen = seen.done();
        let sample = seen.at("/targets/0/samples/1");
        assert!(sample["guest"]["reads"].as_f64().unwrap() > 2.0, "{sample}");
        assert!(sample["baseline_ms"].as_f64().unwrap() > 0.0, "{sample}");
        assert!(sample["decision"]["words"].is_string(), "{sample}");

        // What it does: the guest's reads wait behind ours, so ours end.
        let load = ran.at("/targets/0/load");
        let reasons = load["reasons"].as_object().unwrap();
        let millis = |reason: &str| {
            reasons
                .get(reason)
                .and_then(serde_json::Value::as_u64)
                .unwrap_or(0)
        };
        let gave_way = millis("latency") + millis("delay");
        assert!(gave_way > 1000, "{load} {}", ran.words);
        assert!(load["mean_rate"].as_u64().unwrap() < 15 * MIB, "{load}");
        assert!(
            ran.at("/targets/0/residual").as_u64().unwrap() > 64 * MIB,
            "{}",
            ran.json
        );
        assert!(
            took < Duration::from_secs(30),
            "a pause ends with the time: {took:?}"
        );

        let point = hard.at("/targets/0/point");
        let copied = |pointer: &str| point.pointer(pointer).unwrap().as_u64().unwrap();
        let before = ran.at("/targets/0/bytes/precopied").as_u64().unwrap();
        let ahead = copied("/bytes/precopied") - before;
        assert!(
            ahead > 64 * MIB && ahead > before,
            "{before}: {}",
            hard.json
        );
        let residual = copied("/bytes/residual");
        assert!(residual < 32 * MIB, "{}", hard.json);
    });
}
