//! A bitmap that does not hold what was written: the next point is wrong and nothing else notices. The audit does.

use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::Value;

use crate::lab::{KIB, Lab, MIB, Model, Still, bitmaps, drive, random_image};

#[test]
fn an_audit_finds_what_a_bitmap_missed_and_the_next_point_is_exact() {
    let lab = Lab::new();
    let (image, content) = random_image(lab.path(), "a.qcow2", "qcow2", 8 * MIB);
    let mut disk = Model(content);
    let mut vm = Still::start(lab.path(), &[drive("vda", &image, "qcow2")]);
    let target = vm.target();
    let backup = || lab.forerun(&["backup", &target, "--as", "vm"]);
    let audit = |more: &[&str]| {
        let mut words = vec!["audit", &*target, "--as", "vm"];
        words.extend(more);
        lab.forerun(&words)
    };
    let first = backup().ended(0).point();
    let second = backup().ended(0).point();
    let ran = audit(&[]).ended(0);
    assert_eq!(ran.at("/targets/0/audit/checked"), 8 * MIB);
    assert_eq!(ran.at("/targets/0/audit/complete"), true);
    // A share goes on where the last one ended.
    for _ in 0..4 {
        let ran = audit(&["--share", "25%"]).ended(0);
        assert_eq!(ran.at("/targets/0/audit/checked"), 2 * MIB);
    }

    // What the guest writes before and meanwhile is no finding.
    disk.write(&mut vm, "vda", 3 * MIB, 128 * KIB, 0x31);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for offset in (0..MIB).step_by(256 << 10) {
                    vm.io("vda", &format!("write -P 7 {offset} 65536"));
                }
            }
        });
        let ran = audit(&[]);
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
        ran.ended(0);
    });
    for offset in (0..MIB).step_by(256 << 10) {
        disk.fill(offset, 64 * KIB, 7);
    }
    let third = backup().ended(0).point();
    lab.same(&third, &[("vda", &disk.0)]);

    // The guest writes, and the bitmap forgets it.
    let before = Model(disk.0.clone());
    disk.write(&mut vm, "vda", 5 * MIB, 128 * KIB, 0x55);
    for (name, recording) in bitmaps(&mut vm.monitor, "vda-node") {
        if recording {
            vm.bitmap("clear", "vda-node", &name);
        }
    }
    let wrong = backup().ended(0).point();
    lab.same(&wrong, &[("vda", &before.0)]);

    let ran = audit(&[]).ended(3).warned("its bitmap cannot be believed");
    let found = ran.at("/targets/0/audit/findings/0");
    assert_eq!(found["disk"], "vda");
    assert_eq!(found["blocks"], 2);
    assert_eq!(found["extents"][0]["offset"], 5 * MIB);
    let suspects = found["suspects"].as_array().unwrap();
    let named = |point: &String| suspects.contains(&Value::from(point.as_str()));
    // Proved by the first, and taken over by all that came after.
    assert!(named(&wrong) && named(&third) && named(&second), "{found}");
    assert!(!named(&first), "{found}");

    let ran = backup().done();
    let healed = ran.point();
    ran.rescanned(&[(
        "vda",
        "the audit found 2 changed blocks that its bitmap did not hold",
    )]);
    lab.same(&healed, &[("vda", &disk.0)]);
    audit(&[]).ended(0);
    // It is incremental again.
    disk.write(&mut vm, "vda", MIB, 64 * KIB, 0x12);
    let ran = backup().ended(0);
    assert!(ran.residual() <= 128 * KIB, "{}", ran.json);
    let last = ran.rescanned(&[]).point();
    lab.same(&last, &[("vda", &disk.0)]);
    vm.is_clean();
}

#[test]
fn a_run_that_has_time_audits_and_its_point_is_exact_although_a_bitmap_lied() {
    let lab = Lab::new();
    let (image, content) = random_image(lab.path(), "a.qcow2", "qcow2", 8 * MIB);
    let mut disk = Model(content);
    let mut vm = Still::start(lab.path(), &[drive("vda", &image, "qcow2")]);
    let target = vm.target();
    lab.forerun(&["backup", &target, "--as", "vm"]).ended(0);
    disk.write(&mut vm, "vda", 5 * MIB, 128 * KIB, 0x55);
    for (name, recording) in bitmaps(&mut vm.monitor, "vda-node") {
        if recording {
            vm.bitmap("clear", "vda-node", &name);
        }
    }
    let due = (jiff::Timestamp::now() + std::time::Duration::from_secs(45)).to_string();
    let ran = lab.forerun(&[
        "run", &target, "--as", "vm", "--at", &due, "--audit", "100%",
    ]);
    let ran = ran.ended(3).warned("its bitmap cannot be believed");
    lab.same(&ran.point(), &[("vda", &disk.0)]);
    vm.is_clean();
}
