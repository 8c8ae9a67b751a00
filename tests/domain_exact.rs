//! A libvirt domain: every recovery point is exactly the state after one of the guest's writes, on, off, and after a death.
#![cfg(feature = "libvirt")]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]
#![expect(clippy::print_stdout, reason = "numbers for who reads the log")]

mod domain_common;
mod vm_common;

use std::sync::PoisonError;

use domain_common::{ALONE, Lab};
use vm_common::{Ended, MIB};

/// Disks of a domain; each with its bus and format in `domain_common`.
const ALL: [&str; 3] = ["sda", "vda", "vdb"];

/// A point is exact, later than the one before, and of these disks read in full.
fn exact(lab: &mut Lab, what: &str, backup: &Ended, last: &mut u64, rescanned: &[&str]) {
    let report = &backup.json["targets"][0]["point"];
    let found = backup.rescanned();
    assert_eq!(
        found.keys().collect::<Vec<_>>(),
        rescanned,
        "{what}: {found:?}"
    );
    let step = lab.step_of(&backup.point());
    assert!(step >= *last, "{what}: {step} after {last}");
    println!(
        "{what}: write {step}, freeze {} ms, released {} ms, residual {} KiB",
        report["freeze_ms"],
        report["released_ms"],
        report["bytes"]["residual"].as_u64().unwrap() >> 10,
    );
    *last = step;
}

#[test]
fn a_domain_is_backed_up_exactly_on_and_off() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mut lab = Lab::boot("exact", 16 * MIB, "--trim --span 8 --rate 300");
    let (name, uuid) = (lab.name(), lab.uuid().to_owned());
    let mut last = 0;
    let first = lab.backup(&[]).done();
    lab.is_clean();
    exact(&mut lab, "first", &first, &mut last, &[]);
    for round in 0..2 {
        lab.precopy(&["--once"]).done();
        lab.is_clean();
        // The same target by another spelling.
        let spelled = if round == 0 { &uuid } else { &name };
        let backup = lab.run(&["backup", spelled]).done();
        lab.is_clean();
        exact(&mut lab, "running", &backup, &mut last, &[]);
    }
    lab.precopy(&["--once"]).done();
    let backup = lab.backup(&["--freeze", "snapshot"]).done();
    lab.is_clean();
    exact(&mut lab, "snapshot", &backup, &mut last, &[]);
    let backup = lab.backup(&[]).done();
    lab.is_clean();
    exact(&mut lab, "after a snapshot", &backup, &mut last, &[]);

    // What the operator sees.
    let seen = lab.run(&["inspect", &name]).done();
    let disks = seen.json["targets"][0]["machine"]["disks"]
        .as_array()
        .unwrap()
        .clone();
    let keys: Vec<&str> = disks
        .iter()
        .map(|disk| disk["key"].as_str().unwrap())
        .collect();
    assert_eq!(keys, ALL);
    let listed = lab.run(&["inspect"]).done();
    assert!(listed.json.to_string().contains(&uuid), "{listed:#?}");
    let status = lab.run(&["status", "ex?ct"]).done();
    assert_eq!(status.json["targets"][0]["key"], uuid.as_str());
    lab.run(&["status", "nothing-*"]).code(2);
    lab.run(&["status", "nothing"]).code(2);
    lab.run(&["status", &name, "--connect", "qemu+ssh://elsewhere/system"])
        .code(2);

    // Off: the images by themselves. A raw image holds no bitmaps.
    lab.domain.destroy().unwrap();
    let off = lab.backup(&[]).done();
    assert_eq!(off.json["targets"][0]["point"]["quiesce"], "offline");
    exact(&mut lab, "off", &off, &mut last, &["vdb"]);

    // On again: what is stored in the images goes on.
    let resumed = lab.start_again();
    let backup = lab.run(&["backup", "--all"]).done();
    lab.is_clean();
    exact(&mut lab, "on again", &backup, &mut last, &["vdb"]);
    assert!(last > resumed);

    // A death of QEMU loses what was not stored.
    lab.domain.kill9().unwrap();
    lab.start_again();
    let backup = lab.backup(&[]).done();
    exact(&mut lab, "after a death", &backup, &mut last, &ALL);
    let untracked = lab.run(&["untrack", &name]).done();
    assert_eq!(
        untracked.json["targets"][0]["removed"]
            .as_array()
            .unwrap()
            .len(),
        3
    );
    lab.run(&["verify"]).code(0);
    lab.progresses();
}
