//! The program dies around an external snapshot of a libvirt domain: the guest's writes are never lost, the overlay is committed, and
//! the next run goes on from there.
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(clippy::unwrap_used, reason = "a test fails by it")]
#![expect(
    clippy::print_stdout,
    reason = "what was read in full, for who reads the log"
)]

mod domain_common;
mod vm_common;

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use domain_common::Lab;
use forerun_rig::guest::{Disk, Program};
use vm_common::{MIB, wait_for};

const SNAPSHOT: [&str; 2] = ["--freeze", "snapshot"];

impl Lab {
    /// A backup that dies at a step.
    fn dies(&mut self, fault: &str) {
        let name = self.name();
        let words = ["backup", &name, SNAPSHOT[0], SNAPSHOT[1]];
        let ended = self.start(&words, fault).end();
        assert_eq!(ended.status.signal(), Some(9), "{fault}: {ended:#?}");
    }

    /// The overlays of ours that are there.
    fn overlays(&self) -> Vec<String> {
        let image = self.domain.image("vda").unwrap();
        let files = std::fs::read_dir(image.parent().unwrap()).unwrap();
        let names = files.map(|file| file.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains(".overlay")).collect()
    }

    /// Whether libvirt has the domain on an overlay.
    fn on_overlay(&self) -> bool {
        let name = self.name();
        let listed = self.domain.virsh(&["domblklist", &name]).unwrap();
        listed.contains(".overlay")
    }

    /// A point that is exact, later than `last`, and of which these disks were read in full.
    fn goes_on(&mut self, last: u64, rescanned: &[&str], words: &[&str]) -> u64 {
        let backup = self.backup(words).done();
        self.is_clean();
        assert_eq!(self.overlays(), Vec::<String>::new());
        assert!(!self.on_overlay());
        let found = backup.rescanned();
        assert_eq!(found.keys().collect::<Vec<_>>(), rescanned, "{found:?}");
        let step = self.step_of(&backup.point());
        assert!(step > last, "{step} after {last}");
        step
    }
}

#[test]
fn an_overlay_that_libvirt_knows_of_outlives_everybody() {
    let mut lab = Lab::boot("snap", 16 * MIB, "--trim --span 4 --rate 300");
    let name = lab.name();
    let mut last = lab.goes_on(0, &[], &[]);

    // Never put in place: rubbish.
    lab.dies("kill-with-guard@snapshot:before#1");
    assert_eq!(lab.overlays().len(), 3);
    assert!(!lab.on_overlay());
    lab.run(&["recover", &name]).code(0);
    last = lab.goes_on(last, &[], &SNAPSHOT);

    // In place; the guard commits it.
    lab.dies("kill@snapshot:answered#1");
    wait_for("the guard does not commit", || lab.overlays().is_empty());
    last = lab.goes_on(last, &[], &[]);

    // In place, and nobody there: the next command commits it.
    lab.dies("kill-with-guard@snapshot:answered#1");
    assert!(lab.on_overlay());
    lab.progresses();
    last = lab.goes_on(last, &[], &SNAPSHOT);

    // libvirt commits no overlay by a name that is not in the chain, and "the active one" is never taken in its place.
    lab.dies("kill-with-guard@snapshot:answered#1");
    let mut ours = lab.overlays();
    ours.sort();
    let ours = lab.path(ours.last().unwrap()).display().to_string();
    let commit = |lab: &Lab, disk: &str, top: &str| {
        let name = lab.domain.name();
        let words = [
            "blockcommit",
            name,
            disk,
            "--active",
            "--shallow",
            "--top",
            top,
        ];
        let refused = lab.domain.virsh(&words).unwrap_err().to_string();
        println!("{disk} {top}: {refused}");
        assert!(
            refused.contains("could not find image") && refused.contains(top),
            "{refused}"
        );
        let jobs = lab.ask("query-jobs");
        assert!(jobs.is_empty(), "{jobs:?}");
    };
    commit(&lab, "vda", "/not/there");
    // An operator is faster with one disk: its file is what is left.
    let pivot = ["blockcommit", &name, "vdb", "--active", "--pivot", "--wait"];
    lab.domain.virsh(&pivot).unwrap();
    commit(&lab, "vdb", &ours);
    assert_eq!(lab.overlays().len(), 3);
    lab.progresses();
    let recovered = lab.run(&["recover", &name]).code(0);
    assert!(
        recovered.json.to_string().contains("overlay of disk"),
        "{recovered:#?}"
    );
    last = lab.goes_on(last, &[], &SNAPSHOT);

    // The domain ends on it, and starts again from it: nothing that the guest wrote is lost.
    lab.dies("kill-with-guard@snapshot:answered#1");
    lab.progresses();
    lab.domain.destroy().unwrap();
    assert!(lab.on_overlay());
    let refused = lab.run(&["recover", &name]).code(7);
    assert!(
        refused.json.to_string().contains("start the domain"),
        "{refused:#?}"
    );
    lab.backup(&[]).code(7);
    let resumed = lab.start_again();
    assert!(resumed > last, "{resumed} after {last}");
    let recovered = lab.run(&["recover", &name]).code(0);
    assert!(
        recovered.json.to_string().contains("overlay"),
        "{recovered:#?}"
    );
    let backup = lab.backup(&[]).done();
    println!("after a start on the overlay: {:?}", backup.rescanned());
    let step = lab.step_of(&backup.point());
    assert!(step > resumed, "{step} after {resumed}");
    assert_eq!(lab.overlays(), Vec::<String>::new());
    lab.run(&["verify"]).code(0);
}

#[test]
fn an_operators_snapshot_while_ours_waits_for_its_time_is_what_ours_is_over() {
    let mut lab = Lab::boot_with("between", |builder| {
        let program = Program::Stamp("--span 4 --rate 200 /dev/vda".to_owned());
        builder.disk(Disk::raw("vda", 16 * MIB)).program(program)
    });
    let name = lab.name();
    lab.backup(&[]).done();
    let due = jiff::Timestamp::now() + Duration::from_secs(4);
    let due = due.to_string();
    let words = ["run", &name, "--at", &due, SNAPSHOT[0], SNAPSHOT[1]];
    let run = lab.start(&words, "");
    wait_for("nothing is prepared", || !lab.overlays().is_empty());
    let snapshot = ["snapshot-create-as", &name, "operators", "--disk-only"];
    lab.domain
        .virsh(&[&snapshot[..], &["--no-metadata", "--atomic"]].concat())
        .unwrap();
    // One whose header names the image under the operator's would lead past what the guest writes now.
    let made = run.end().done();
    let warnings = made.json["warnings"].to_string();
    assert!(warnings.contains("`vda` got an overlay"), "{made:#?}");
    assert!(lab.step_on(&made.point(), &["vda"]) > 0);
    let listed = lab.domain.virsh(&["domblklist", &name]).unwrap();
    assert!(listed.contains("vda.operators"), "{listed}");
    lab.progresses();
    lab.is_clean();
    assert_eq!(lab.overlays(), Vec::<String>::new());
}
