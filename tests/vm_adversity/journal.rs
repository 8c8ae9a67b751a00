//! What a dead run left is taken back whatever became of its journal, and of others'.

use std::fs;
use std::path::PathBuf;

use rustix::process::Signal;
use serde_json::json;

use crate::lab::{Lab, MIB, Still, random_image, slow_drive, until};

/// A VM with a run that died in the middle of a batch, and the journal of that run.
fn left_behind(lab: &Lab, name: &str) -> (Still, PathBuf) {
    let dir = lab.path().join(name);
    fs::create_dir(&dir).unwrap();
    let (image, _) = random_image(&dir, "a.qcow2", "qcow2", 24 * MIB);
    let mut vm = Still::start(&dir, &[slow_drive("vda", &image, 10 * MIB)]);
    let run = lab.begin(&["precopy", &vm.target(), "--as", name]);
    until("a batch", || has_export(&mut vm));
    run.signal(Signal::KILL);
    run.end();
    let state = fs::read_dir(lab.path().join("state").join(name)).unwrap();
    let mut files = state.map(|entry| entry.unwrap().path());
    let journal = files.find(|path| path.extension().is_some_and(|it| it == "journal"));
    (vm, journal.unwrap())
}

fn has_export(vm: &mut Still) -> bool {
    let exports = vm.monitor.execute("query-block-exports", json!({}));
    !exports.unwrap().as_array().unwrap().is_empty()
}

#[test]
fn a_journal_that_is_damaged_or_lost_keeps_nobody_from_being_recovered() {
    let lab = Lab::new();
    let (mut a, journal) = left_behind(&lab, "a");
    let (mut b, _) = left_behind(&lab, "b");
    fs::write(&journal, "{").unwrap();

    // The other VM is freed all the same, and that something is wrong is told.
    lab.forerun(&["recover"])
        .failed(7, "cannot be understood", "--repo");
    b.is_clean();
    lab.forerun(&["backup", &b.target(), "--as", "b"]).done();
    assert!(has_export(&mut a));

    // As the hint says: the server goes, too, or it would stand in the way of every later command.
    fs::remove_file(&journal).unwrap();
    lab.forerun(&["recover", &a.target(), "--as", "a"]).ended(0);
    a.is_clean();
    lab.forerun(&["backup", &a.target(), "--as", "a"]).done();
}
