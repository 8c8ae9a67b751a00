//! A real process that is killed at every step of its writes to a real directory. Needs `--features fault-injection`; without
//! it there are no steps to die at.
#![cfg(feature = "fault-injection")]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    reason = "a test fails by it, and the disks here are small"
)]

mod image_common;

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use forerun::image::{InitOptions, Repository, Session, VerifyOptions};
use image_common::{BLOCK, KEY, backup, restore};

const REPOSITORY: &str = "FORERUN_TEST_REPOSITORY";

fn disk(round: u8) -> Vec<u8> {
    let mut disk = vec![0; 2 * BLOCK + 10];
    disk[0] = 1;
    disk[BLOCK + 7] = round;
    disk
}

/// The process that is killed: a second backup.
#[test]
fn child() {
    let Ok(path) = std::env::var(REPOSITORY) else {
        return;
    };
    let repo = Repository::open(Path::new(&path)).unwrap();
    let last = repo.points().unwrap().points.pop().unwrap();
    backup(&repo, &disk(2), &[1].into(), Some(&last)).unwrap();
}

fn run_child(path: &Path, fault: &str, log: &Path) -> std::process::ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "child"])
        .env(REPOSITORY, path)
        .env("FORERUN_FAULT", fault)
        .env("FORERUN_FAULT_LOG", log)
        .stdout(std::process::Stdio::null())
        .status()
        .unwrap()
}

fn prepared(directory: &Path) {
    let repo = Repository::init(directory, InitOptions::default()).unwrap();
    backup(&repo, &disk(1), &(0..3).collect(), None).unwrap();
}

#[test]
fn killed_at_any_step_it_loses_no_point_and_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("steps");
    let path = directory.path().join("counted");
    prepared(&path);
    assert!(run_child(&path, "count", &log).success());
    let steps = std::fs::read_to_string(&log).unwrap();
    let count = steps.lines().count();
    assert!(count > 40, "{steps}");
    for at in 1..=count {
        let path = directory.path().join(format!("killed-{at}"));
        prepared(&path);
        let status = run_child(&path, &format!("kill@{at}"), &log);
        assert_eq!(status.signal(), Some(9), "step {at}");
        let step = steps.lines().nth(at - 1).unwrap();

        let repo = Repository::open(&path).unwrap();
        assert_eq!(
            std::fs::read_dir(path.join("tmp")).unwrap().count(),
            0,
            "{step}"
        );
        let points = repo.points().unwrap();
        assert!(points.damaged.is_empty(), "{step}");
        let first = &points.points[0];
        assert!(
            restore(&repo, &first.disks[0]).unwrap() == disk(1),
            "{step}"
        );
        if let Some(second) = points.points.get(1) {
            if let Some(session) = Session::find(&repo, KEY).unwrap() {
                assert_eq!(session.id(), second.session);
                session.remove().unwrap();
            }
        } else {
            backup(&repo, &disk(2), &[1].into(), Some(first)).unwrap();
        }
        let points = repo.points().unwrap().points;
        assert_eq!(points.len(), 2, "{step}");
        assert!(
            restore(&repo, &points[1].disks[0]).unwrap() == disk(2),
            "{step}"
        );
        let report = repo.verify(&VerifyOptions::default()).unwrap();
        assert!(report.damage.is_empty(), "{step}: {report:?}");
        assert!(repo.store().list("sessions/").unwrap().is_empty(), "{step}");
    }
}
