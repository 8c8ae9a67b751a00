//! libvirt domains: every recovery point is exactly the state after one of the guest's writes, whatever happens to the
//! domain and to libvirt between and during the passes.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(clippy::print_stdout, reason = "numbers for who reads the log")]

mod domain_common;
mod vm_common;

use domain_common::{DISKS, Lab};
use vm_common::{Ended, MIB};

fn shown(what: &str, step: u64, backup: &Ended) {
    let report = &backup.json["targets"][0]["point"];
    println!(
        "{what}: write {step}, freeze {} ms, released {} ms, residual {} KiB",
        report["freeze_ms"],
        report["released_ms"],
        report["bytes"]["residual"].as_u64().unwrap() >> 10,
    );
}

#[test]
fn every_point_of_a_domain_is_the_state_after_one_write() {
    let mut lab = Lab::boot("exact", 16 * MIB, "--trim --span 8");
    let mut last = 0;
    for round in 0..4 {
        if round > 0 {
            lab.precopy(&["--once"]).done();
            lab.is_clean();
        }
        let backup = lab.backup(&[]).done();
        lab.is_clean();
        assert!(backup.rescanned().is_empty(), "{backup:#?}");
        let step = lab.step_of(&backup.point());
        assert!(step > last, "{step} after {last}");
        shown("running", step, &backup);
        last = step;
    }
    lab.run(&["verify"]).code(0);
    lab.progresses();
}
