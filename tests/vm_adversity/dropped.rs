//! A session that is given up: what it had withdrawn from the newest point stays withdrawn, and its bitmaps go.

use std::fs;

use rustix::process::Signal;

use crate::lab::{Lab, MIB, Model, Still, bitmaps, drive, image, until};

struct One {
    lab: Lab,
    vm: Still,
    model: Model,
}

impl One {
    /// A qcow2 disk with a point.
    fn new() -> Self {
        let lab = Lab::new();
        let a = image(lab.path(), "a.qcow2", "qcow2", 16 * MIB);
        let vm = Still::start(lab.path(), &[drive("vda", &a, "qcow2")]);
        let model = Model::zeros(16 * MIB);
        let mut one = Self { lab, vm, model };
        one.write(0, 0x11);
        one.backup().rescanned(&[]);
        one
    }

    fn write(&mut self, at: u64, byte: u8) {
        self.model.write(&mut self.vm, "vda", at * MIB, MIB, byte);
    }

    fn backup(&mut self) -> crate::lab::Ran {
        let words = ["backup", &self.vm.target(), "--as", "vm"];
        let ran = self.lab.forerun(&words).ended(0);
        self.lab.same(&ran.point(), &[("vda", &self.model.0)]);
        self.vm.is_clean();
        ran
    }

    fn bitmaps(&mut self) -> Vec<(String, bool)> {
        bitmaps(&mut self.vm.monitor, "vda-node")
    }

    /// A session that a signal ends, with a bitmap that it still needs.
    fn session(&mut self) {
        let target = self.vm.target();
        let words = ["precopy", &target, "--as", "vm", "--rate", "256KiB/s"];
        let before = self.bitmaps().len();
        let run = self.lab.begin(&words);
        until("a rotation", || {
            let now = bitmaps(&mut self.vm.monitor, "vda-node");
            now.len() > before && now.iter().any(|(_, records)| !records)
        });
        run.signal(Signal::TERM);
        run.end().failed(130, "interrupted", "kept");
    }
}

#[test]
fn a_bitmap_that_a_dropped_session_withdrew_is_never_believed_again() {
    for damaged in [false, true] {
        let mut one = One::new();
        let based = one.bitmaps().pop().unwrap().0;
        one.write(1, 0x12);
        one.session();
        // Only the session's bitmap holds this.
        one.write(2, 0x13);
        if damaged {
            let sessions = one.lab.repo().join("sessions");
            let session = fs::read_dir(sessions).unwrap().next().unwrap().unwrap();
            let record = session.path().join("00000001-record");
            fs::write(record, "{}").unwrap();
        } else {
            one.lab.forerun(&["drop-session", "vm"]).ended(0);
            // Again, without a point in between.
            one.session();
        }
        one.lab.forerun(&["drop-session", "vm"]).ended(0);
        one.lab
            .forerun(&["drop-session", "vm"])
            .failed(1, "no session", "there are no sessions");
        for (name, records) in one.bitmaps() {
            if name == based && !records {
                one.vm.bitmap("enable", "vda-node", &name);
            }
        }
        one.write(3, 0x14);
        one.backup()
            .rescanned(&[("vda", "no bitmap has followed it")]);
        let left = one.bitmaps();
        // Of a damaged session nobody knows the names.
        let most = if damaged { 2 } else { 1 };
        assert!(left.len() <= most, "{left:?}");
        // The point took it over: nothing is left of the dropped sessions.
        let sessions = fs::read_dir(one.lab.repo().join("sessions")).unwrap();
        assert_eq!(sessions.count(), 0);
        one.write(4, 0x15);
        one.backup().rescanned(&[]);
    }
}

#[test]
fn a_vm_that_is_reached_loses_the_bitmaps_of_a_dropped_session_at_once() {
    let mut one = One::new();
    one.write(1, 0x12);
    one.session();
    assert!(one.bitmaps().len() >= 2);
    let target = one.vm.target();
    let ran = one
        .lab
        .forerun(&["drop-session", &target, "--as", "vm"])
        .ended(0);
    let removed = ran.at("/targets/0/removed").as_array().unwrap().len();
    assert!(removed >= 2, "{}", ran.json);
    assert_eq!(one.bitmaps(), []);
    one.backup()
        .rescanned(&[("vda", "no bitmap has followed it")]);
    one.write(4, 0x15);
    one.backup().rescanned(&[]);
}
