//! QEMU dies, or ends in good order, and is started again from the same command line: the next point is exact, and the
//! report says which disks had to be read in full, and why.
#![cfg(feature = "fault-injection")]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]

mod vm_common;

use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use forerun_rig::block::RawFile;
use forerun_rig::stamp::{Verdict, check};
use serde_json::json;
use vm_common::{Lab, MIB, WAIT, wait_for};

/// The step right after the freeze's transaction.
const FROZEN: &str = "qmp:transaction:answered#1";

fn lab() -> Lab {
    let mut lab = Lab::boot_in_memory(16 * MIB, "--trim --span 8 --rate 500");
    lab.backup(&[]).done();
    lab
}

/// Starts QEMU again and makes a point; returns the disks that were read in full with the reasons.
fn next_point(lab: &mut Lab, method: &str) -> Vec<(String, String)> {
    lab.guest.restart().unwrap();
    let resumed = lab.guest.wait_for("stamp: resume after seq", WAIT).unwrap();
    let resumed = resumed.split_whitespace().nth(4).unwrap();
    let resumed: u64 = resumed.trim_end_matches(',').parse().unwrap();
    lab.guest.wait_for("stamp: running", WAIT).unwrap();
    lab.progresses();
    let backup = lab.backup(&["--freeze", method]).done();
    lab.is_clean();
    let step = lab.step_of(&backup.point());
    assert!(step > resumed, "{step}, resumed after {resumed}");
    let rescanned: Vec<(String, String)> = backup.rescanned().into_iter().collect();
    rescanned
}

fn keys(rescanned: &[(String, String)]) -> Vec<&str> {
    rescanned.iter().map(|(key, _)| key.as_str()).collect()
}

#[test]
fn after_any_end_of_qemu_the_next_point_is_exact() {
    let mut lab = lab();
    let target = lab.target.clone();

    // In good order: what is stored in the image goes on.
    lab.guest.shutdown().unwrap();
    let rescanned = next_point(&mut lab, "fleece");
    assert_eq!(keys(&rescanned), ["vdb"]);
    assert!(rescanned[0].1.contains("gone"), "{rescanned:?}");

    // Idle: bitmaps that were not stored are gone with it, all of them.
    lab.guest.kill9().unwrap();
    let rescanned = next_point(&mut lab, "snapshot");
    assert_eq!(keys(&rescanned), ["vda", "vdb"]);
    assert!(rescanned.iter().all(|(_, why)| !why.is_empty()));

    // Twice in good order after a death: nothing inconsistent stays behind.
    lab.guest.shutdown().unwrap();
    assert_eq!(keys(&next_point(&mut lab, "fleece")), ["vdb"]);

    // During a batch.
    let run = lab.start(
        &[
            "precopy",
            &target,
            "--rate",
            "64KiB/s",
            "--converge",
            "1KiB",
        ],
        "",
    );
    wait_for("no batch began", || {
        !lab.ask("query-block-exports").is_empty()
    });
    lab.guest.kill9().unwrap();
    let ended = run.end();
    assert_eq!(ended.status.code(), Some(1), "{ended:#?}");
    assert_eq!(keys(&next_point(&mut lab, "fleece")), ["vda", "vdb"]);

    // During a freeze, with the run and its guard: as the host's end would.
    for method in ["fleece", "snapshot"] {
        let words = ["backup", &target, "--quiesce", "never", "--freeze", method];
        lab.start(&words, &format!("kill-with-guard@{FROZEN}"))
            .end();
        assert_eq!(lab.steps().len(), 1);
        if method == "fleece" {
            lab.guest.kill9().unwrap();
            assert_eq!(keys(&next_point(&mut lab, method)), ["vda", "vdb"]);
        }
    }
    // The overlays hold what the guest wrote since, and how their bases looked was not yet known.
    lab.progresses();
    end_flushed(&mut lab);
    lab.recover().code(7);
    lab.run(&["verify"]).code(0);
}

/// QEMU dies after it has written everything out: a guest that never flushes may lose the rest of an image's tables.
fn end_flushed(lab: &mut Lab) {
    lab.guest.monitor().execute("stop", json!({})).unwrap();
    lab.guest.kill9().unwrap();
}

/// A run and its guard that died once its overlays are in place and journalled, then QEMU too.
fn dead_overlays(lab: &mut Lab) -> Vec<PathBuf> {
    let target = lab.target.clone();
    let words = [
        "backup",
        &target,
        "--quiesce",
        "never",
        "--freeze",
        "snapshot",
    ];
    lab.start(&words, "kill-with-guard@qmp:block-export-add:before#1")
        .end();
    assert_eq!(lab.steps().len(), 1);
    lab.progresses();
    end_flushed(lab);
    let state = lab.state();
    let overlays = lab
        .host_state()
        .into_iter()
        .filter(|name| name.ends_with(".overlay"));
    let overlays: Vec<PathBuf> = overlays.map(|name| state.join(name)).collect();
    assert_eq!(overlays.len(), 2);
    overlays
}

fn newest_step(lab: &Lab) -> u64 {
    let raw = lab.path("vda.check");
    let status = std::process::Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args([lab.guest.image("vda").unwrap(), raw.clone()])
        .status();
    assert!(status.unwrap().success());
    let images = [raw, lab.guest.image("vdb").unwrap()].map(|path| RawFile::open(&path).unwrap());
    match check(&[&images[0], &images[1]]).unwrap() {
        Verdict::Exact(step) => step,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_overlay_of_a_dead_qemu_is_committed_onto_a_base_that_nobody_touched() {
    let mut lab = lab();
    let before = lab.writes();
    dead_overlays(&mut lab);
    lab.recover().code(0);
    assert_eq!(lab.host_state(), Vec::<String>::new());
    // Everything that the guest wrote before the end is there, on both disks.
    let step = newest_step(&lab);
    assert!(step > before / 2, "{step}");
    lab.recover().code(0);
    // The snapshot stored the image's bitmaps, and the commit was recorded in them.
    assert_eq!(keys(&next_point(&mut lab, "fleece")), ["vdb"]);
}

#[test]
fn an_overlay_whose_base_was_touched_stays_as_it_is() {
    let mut lab = lab();
    let overlays = dead_overlays(&mut lab);
    let base = lab.guest.image("vdb").unwrap();
    let file = std::fs::File::options()
        .read(true)
        .write(true)
        .open(&base)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    file.write_all_at(&byte, 0).unwrap();
    drop(file);
    let files: Vec<Vec<u8>> = overlays
        .iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect();
    let image = std::fs::read(&base).unwrap();
    for _ in 0..2 {
        lab.recover().code(7);
        // Neither of them, or the disks would be of two instants.
        same(&overlays, &files);
        assert!(std::fs::read(&base).unwrap() == image);
    }
    // Nor does a run touch them once the VM is on again.
    lab.guest.restart().unwrap();
    lab.backup(&[]).code(7);
    lab.recover().code(7);
    same(&overlays, &files);
}

fn same(paths: &[PathBuf], contents: &[Vec<u8>]) {
    for (path, content) in paths.iter().zip(contents) {
        assert!(
            &std::fs::read(path).unwrap() == content,
            "{}",
            path.display()
        );
    }
}
