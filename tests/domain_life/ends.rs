//! A domain that ends, is saved, is started again, and libvirt's daemon.

use std::time::Duration;

use forerun::clock;

use crate::domain_common::Lab;
use crate::life::{ALL, Life, all};
use crate::vm_common::{Ended, wait_for};

/// Bitmaps of images that cannot hold them die with QEMU.
const RAW: [&str; 1] = ["vdb"];

fn restart_daemon(lab: &Lab) {
    lab.domain.lock().stop_daemon().unwrap();
    clock::sleep(Duration::from_millis(300));
    lab.domain.lock().start_daemon().unwrap();
}

/// A QEMU that is killed leaves images without what of their metadata was still in its memory: a point of them is what they
/// are, all of it read anew.
fn is_the_images(life: &mut Life, backup: &Ended) {
    let rescanned: Vec<String> = backup.rescanned().into_keys().collect();
    assert_eq!(rescanned, ALL, "{backup:#?}");
    let output = life.lab.path("restored");
    std::fs::remove_dir_all(&output).ok();
    let words = [
        "restore",
        &backup.point(),
        "--output",
        output.to_str().unwrap(),
    ];
    life.lab.run(&words).done();
    for (disk, format) in [("vda", "qcow2"), ("vdb", "raw"), ("sda", "qcow2")] {
        let compared = std::process::Command::new("qemu-img")
            .args(["compare", "-f", "raw", "-F", format])
            .arg(output.join(format!("{disk}.raw")))
            .arg(life.lab.path(&format!("{disk}.{format}")))
            .output()
            .unwrap();
        assert!(compared.status.success(), "{disk}: {compared:?}");
    }
}

#[test]
fn a_domain_ends_and_begins_in_every_way() {
    if !all() {
        return;
    }
    let mut life = Life::begin("ends");
    life.between("guest reset", &[], |lab| {
        lab.reboots(|lab| drop(lab.domain.virsh(&["reset", lab.domain.name()]).unwrap()));
    });
    life.between("libvirtd restarted", &[], |lab| restart_daemon(lab));

    life.between("managedsave, then start", &RAW, |lab| {
        lab.domain
            .virsh(&["managedsave", lab.domain.name()])
            .unwrap();
        lab.domain.virsh(&["start", lab.domain.name()]).unwrap();
        lab.progresses();
    });
    life.between("guest poweroff", &RAW, |lab| {
        lab.in_guest("/bin/busybox", &["poweroff", "-f"]);
        lab.becomes("shut off");
        lab.start_again();
    });
    life.between("QEMU killed, bitmaps in the file", &ALL, |lab| {
        lab.domain.destroy().unwrap();
        lab.start_again();
        lab.domain.kill9().unwrap();
        lab.start_again();
    });
    life.between("virsh shutdown by the agent", &RAW, |lab| {
        lab.in_guest("/bin/busybox", &["true"]);
        lab.domain
            .virsh(&["shutdown", lab.domain.name(), "--mode", "agent"])
            .unwrap();
        lab.becomes("shut off");
        lab.start_again();
    });
    life.between("guest reboot", &[], |lab| {
        lab.reboots(|lab| lab.in_guest("/bin/busybox", &["reboot", "-f"]));
    });
    life.between("destroy, then start", &RAW, |lab| {
        lab.domain.destroy().unwrap();
        lab.start_again();
    });
    life.between("save, then restore", &RAW, |lab| {
        let file = lab.path("saved").display().to_string();
        lab.domain
            .virsh(&["save", lab.domain.name(), &file])
            .unwrap();
        lab.domain.virsh(&["restore", &file]).unwrap();
        lab.progresses();
    });
    life.between("QEMU killed, bitmaps not in the file", &ALL, |lab| {
        lab.domain.kill9().unwrap();
        lab.start_again();
    });
    life.lab.run(&["verify"]).code(0);
}

#[test]
fn a_domain_ends_within_a_pass_and_within_a_freeze() {
    let mut life = Life::begin("within");
    let name = life.name();
    // The guest is stopped by the operator: it stays so.
    life.lab.precopy(&["--once"]).done();
    life.virsh(&["suspend", &name]);
    life.exact("paused", &[], &[]);
    life.exact("paused still", &[], &[]);
    life.lab.is_clean();
    assert_eq!(life.lab.state(), "paused");
    life.virsh(&["resume", &name]);
    life.writes();
    life.exact("resumed", &[], &[]);

    life.during("libvirtd restarted during a pass", &[], |lab| {
        restart_daemon(lab);
    });
    if all() {
        life.during("guest reset during a pass", &[], |lab| {
            lab.reboots(|lab| drop(lab.domain.virsh(&["reset", lab.domain.name()]).unwrap()));
        });
        // It ends within a batch: the pass goes on from the images, or from the QEMU that comes next.
        life.during("destroyed during a pass, off", &RAW, |lab| {
            lab.domain.destroy().unwrap();
        });
        assert_eq!(life.lab.state(), "shut off");
        life.start();
        life.exact("on again", &[], &RAW);
        life.during("destroyed and started during a pass", &RAW, |lab| {
            lab.domain.destroy().unwrap();
            lab.start_again();
        });
    }
    // QEMU gives its images away while bitmaps are exported.
    life.during("saved and restored during a pass", &RAW, |lab| {
        let file = lab.path("saved").display().to_string();
        lab.operator(&["save", lab.domain.name(), &file]);
        lab.operator(&["restore", &file]);
    });
    life.writes();
    let run = life
        .lab
        .start(&["backup", &name], "stop@qmp:block-export-add:answered#3");
    let lab = &life.lab;
    wait_for("no freeze", || !lab.steps().is_empty());
    let file = lab.path("saved").display().to_string();
    let saved = lab.domain.virsh(&["save", &name, &file]);
    println!("save during a freeze: {saved:?}");
    if saved.is_ok() {
        lab.domain.virsh(&["restore", &file]).unwrap();
    }
    assert_eq!(lab.state(), "running", "{}", lab.qemu_log());
    let pid = rustix::process::Pid::from_child(&run.child);
    rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
    println!("saved during a freeze: {:#?}", run.end());
    let rescanned: &[&str] = if saved.is_ok() { &RAW } else { &[] };
    life.exact("saved during a freeze", &[], rescanned);
    // QEMU dies within a batch.
    let run = life.slow_pass();
    life.lab.domain.kill9().unwrap();
    let ended = run.end();
    println!("killed during a pass: {ended:#?}");
    life.start();
    life.exact("QEMU killed during a pass", &[], &ALL);
    life.lab.is_clean();

    // Within a freeze, right after its transaction.
    let ends: &[&str] = if all() {
        &["destroy", "kill"]
    } else {
        &["kill"]
    };
    for end in ends {
        life.writes();
        let run = life
            .lab
            .start(&["backup", &name], "stop@qmp:transaction:answered#1");
        let lab = &life.lab;
        wait_for("no freeze", || !lab.steps().is_empty());
        if *end == "destroy" {
            life.lab.domain.destroy().unwrap();
        } else {
            life.lab.domain.kill9().unwrap();
        }
        let pid = rustix::process::Pid::from_child(&run.child);
        rustix::process::kill_process(pid, rustix::process::Signal::CONT).unwrap();
        let ended = run.end();
        println!("{end} during a freeze: {ended:#?}");
        // A point of the domain that is off reads all of it, and is what the next one goes on from.
        let made = ended.json["targets"][0]["point"]["id"].is_string();
        if made {
            if *end == "kill" {
                is_the_images(&mut life, &ended);
            } else {
                life.is_exact(&format!("{end} during a freeze, a point"), &ended, &RAW);
            }
        }
        life.start();
        let rescanned: &[&str] = if *end == "kill" && !made { &ALL } else { &RAW };
        life.exact(&format!("{end} during a freeze"), &[], rescanned);
        life.lab.is_clean();
    }
    life.lab.run(&["verify"]).code(0);
}
