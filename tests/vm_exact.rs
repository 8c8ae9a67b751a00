//! A guest that writes as fast as it can: every recovery point is exactly the state after one of its writes.
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod vm_common;

use vm_common::{Lab, MIB};

/// Rounds of six points.
const ROUNDS: usize = 4;

#[test]
fn every_point_is_the_state_after_one_write_on_both_disks() {
    let mut lab = Lab::boot(24 * MIB, "--trim --span 16");
    let (fine, coarse) = (lab.repo.clone(), lab.path("coarse"));
    lab.init(&coarse, "256KiB");
    let mut last = 0;
    let mut points = 0;
    for round in 0..ROUNDS {
        for (number, method) in ["fleece", "snapshot"].into_iter().enumerate() {
            for (ahead, repo) in [(false, &fine), (true, &fine), (number % 2 == 0, &coarse)] {
                lab.repo.clone_from(repo);
                let rate: &[&str] = if round == 1 {
                    &["--rate", "20MiB/s"]
                } else {
                    &[]
                };
                if ahead {
                    let more = [&["--once"], rate].concat();
                    lab.precopy(&more).done();
                    lab.is_clean();
                }
                let more = [&["--freeze", method], rate].concat();
                let backup = lab.backup(&more).done();
                lab.is_clean();
                let step = lab.step_of(&backup.point());
                assert!(step > last, "{step} after {last}: {backup:#?}");
                let report = &backup.json["targets"][0]["point"];
                println!(
                    "{method} ahead={ahead} {}: write {step}, freeze {} ms, released {} ms, residual {} KiB",
                    repo.file_name().unwrap().display(),
                    report["freeze_ms"],
                    report["released_ms"],
                    report["bytes"]["residual"].as_u64().unwrap() >> 10,
                );
                last = step;
                points += 1;
            }
        }
    }
    assert!(points >= 20);
    for (repo, made) in [(&fine, ROUNDS * 4), (&coarse, ROUNDS * 2)] {
        lab.repo.clone_from(repo);
        assert_eq!(lab.points().len(), made);
        lab.run(&["verify"]).code(0);
    }
    lab.progresses();
}
