//! Copying ahead of a time: a set that is rewritten all the time is not copied again and again, limits are held or the miss is
//! told, and what was expected is told with what came.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;

use crate::lab::{Lab, MIB, Running, Still, drive, image, noise, until};

const HOT: u64 = 16 * MIB;
const ONCE: u64 = 256 * MIB;

/// Rewrites the first bytes of a disk until told to stop; gives the last pattern.
fn rewrite(vm: &mut Still, bytes: u64, stop: &AtomicBool, written: &AtomicU64) -> u8 {
    let mut pattern = 1u8;
    while !stop.load(Ordering::Relaxed) {
        pattern = pattern.wrapping_add(1).max(1);
        for offset in (0..bytes).step_by(4 << 20) {
            let length = (4 << 20).min(bytes - offset);
            vm.io("vda", &format!("write -P {pattern} {offset} {length}"));
            std::thread::sleep(Duration::from_millis(20));
        }
        written.fetch_add(1, Ordering::Relaxed);
    }
    pattern
}

/// Does something while a guest rewrites the first bytes of its disk.
fn while_rewriting<T>(vm: &mut Still, bytes: u64, act: impl FnOnce() -> T) -> (T, u8) {
    let (stop, written) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| rewrite(vm, bytes, &stop, &written));
        until("the guest writes", || written.load(Ordering::Relaxed) > 0);
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(act));
        stop.store(true, Ordering::Relaxed);
        let pattern = writer.join().unwrap();
        match done {
            Ok(done) => (done, pattern),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

fn number(value: &Value, pointer: &str) -> u64 {
    let found = value.pointer(pointer).and_then(Value::as_u64);
    found.unwrap_or_else(|| panic!("no {pointer}: {value}"))
}

#[test]
fn a_set_that_is_always_rewritten_is_left_for_the_freeze() {
    let lab = Lab::new();
    let size = HOT + ONCE;
    let image = image(lab.path(), "a.qcow2", "qcow2", size);
    let mut vm = Still::start(lab.path(), &[drive("vda", &image, "qcow2")]);
    let target = vm.target();
    lab.forerun(&["backup", &target, "--as", "vm"]).ended(0);
    let once = noise(ONCE);
    let file = lab.path().join("once");
    std::fs::write(&file, &once).unwrap();
    vm.io("vda", &format!("write -s {} {HOT} {ONCE}", file.display()));
    std::fs::remove_file(&file).unwrap();

    let due = jiff::Timestamp::now() + Duration::from_secs(14);
    let words = ["run", &target, "--as", "vm", "--at", &due.to_string()];
    let (ran, _) = while_rewriting(&mut vm, HOT, || {
        let running: Running = lab.begin(&words);
        // Somebody looks meanwhile: the run's own time is known.
        let mut seen = Value::Null;
        until("the run is noted", || {
            let status = lab.forerun(&["status", &target, "--as", "vm"]);
            seen = status.json["targets"][0].clone();
            seen["running"] == true
        });
        assert_eq!(seen["due"].as_str(), Some(&*due.to_string()), "{seen}");
        assert!(number(&seen, "/residual/predicted") < size, "{seen}");
        running.end()
    });
    assert!(jiff::Timestamp::now() >= due);
    let point = ran.at("/targets/0/point");
    let instant: jiff::Timestamp = point["instant"].as_str().unwrap().parse().unwrap();
    assert!(instant >= due, "frozen before its time: {instant}");
    let (precopied, superseded) = (
        number(point, "/bytes/precopied"),
        number(point, "/bytes/superseded"),
    );
    let share = superseded * 1000 / precopied;
    eprintln!(
        "precopied {} MiB, superseded {} MiB ({}.{} %), residual {} MiB (expected {} MiB), window {} ms (expected {} ms)",
        precopied / MIB,
        superseded / MIB,
        share / 10,
        share % 10,
        number(point, "/residual/actual") / MIB,
        number(point, "/residual/predicted") / MIB,
        number(point, "/window/actual_ms"),
        number(point, "/window/predicted_ms"),
    );
    assert!(precopied >= ONCE, "{point}");
    assert!(share <= 250, "{point}");
    assert!(number(point, "/residual/actual") <= 2 * HOT, "{point}");
    // What was written once is in the point; the rest is of one of the patterns.
    let id = ran.point();
    let restored = lab.restored(&id, "vda");
    assert!(restored[usize::try_from(HOT).unwrap()..] == once[..]);
    vm.is_clean();
}

#[test]
fn a_limit_that_cannot_be_held_ends_with_4_and_with_skip_there_is_no_point() {
    let lab = Lab::new();
    let image = image(lab.path(), "a.qcow2", "qcow2", 64 * MIB);
    let mut vm = Still::start(lab.path(), &[drive("vda", &image, "qcow2")]);
    let target = vm.target();
    let backup = |more: &[&str]| {
        let mut words = vec!["backup", &*target, "--as", "vm"];
        words.extend(more);
        lab.forerun(&words)
    };
    let points = || {
        let list = lab.forerun(&["list"]).ended(0);
        list.at("/points").as_array().unwrap().len()
    };
    let held = backup(&["--max-window", "60s", "--max-residual", "1GiB"]).done();
    assert_eq!(held.at("/targets/0/point/missed"), &Value::Null);
    assert_eq!(points(), 1);
    // No freeze takes as little as this.
    backup(&["--max-window", "1ms", "--on-miss", "skip"]).failed(4, "no point is made", "earlier");
    assert_eq!(points(), 1);
    let missed = backup(&["--max-window", "1ms"]);
    assert_eq!(missed.code, 4, "{}", missed.json);
    assert!(missed.at("/targets/0/point/missed").is_string());
    assert_eq!(points(), 2);

    // A guest that rewrites more than the residual may be.
    let limit = ["--max-residual", "64KiB"];
    let ((skipped, made), _) = while_rewriting(&mut vm, 8 * MIB, || {
        let skipped = backup(&[limit[0], limit[1], "--on-miss", "skip"]);
        (skipped, backup(&limit))
    });
    skipped.failed(4, "no point is made", "guest writes less");
    assert_eq!(made.code, 4, "{}", made.json);
    let missed = made.at("/targets/0/point/missed").as_str().unwrap();
    assert!(missed.contains("residual"), "{missed}");
    assert_eq!(points(), 3);

    // `status` says so before.
    vm.io("vda", &format!("write -P 9 0 {}", 4 * MIB));
    let status = |more: &[&str]| {
        let mut words = vec!["status", &*target, "--as", "vm"];
        words.extend(more);
        lab.forerun(&words)
    };
    let ran = status(&["--max-residual", "1MiB", "--at", "03:00"]);
    assert_eq!(ran.code, 4, "{}", ran.json);
    let seen = &ran.json["targets"][0];
    assert!(
        seen["miss"].is_string() && number(seen, "/dirty") >= 4 * MIB,
        "{seen}"
    );
    assert!(
        seen["due"].is_string() && seen["running"] == false,
        "{seen}"
    );
    status(&["--max-residual", "1TiB"]).ended(0);
    vm.is_clean();
}
