//! What an operator does with libvirt beside a pass: it succeeds at once or within the seconds of a batch, and the point
//! after it is exact.

use std::fs;
use std::time::Duration;

use forerun::clock;

use crate::domain_common::Lab;
use crate::life::{ALL, ANY, Life, all};
use crate::vm_common::MIB;

/// Begins libvirt's own backup of all disks.
fn backup_begin(lab: &Lab) {
    let job = lab.path("job.xml");
    let disks = ALL.map(|disk| {
        format!("<disk name='{disk}' backup='yes' type='file'><scratch file='/var/lib/libvirt/qemu/{disk}.scratch'/></disk>")
    });
    let text = format!(
        "<domainbackup mode='pull'><server transport='unix' socket='/var/lib/libvirt/qemu/pull.sock'/><disks>{}</disks></domainbackup>",
        disks.concat()
    );
    fs::write(&job, text).unwrap();
    lab.operator(&[
        "backup-begin",
        lab.domain.name(),
        &job.display().to_string(),
    ]);
}

fn backup_end(lab: &Lab) {
    lab.operator(&["domjobabort", lab.domain.name()]);
}

fn checkpoint(lab: &Lab) {
    let file = lab.path("checkpoint.xml");
    let text = "<domaincheckpoint><name>operators</name><disks><disk name='vda'/><disk name='sda'/>\
                <disk name='vdb' checkpoint='no'/></disks></domaincheckpoint>";
    fs::write(&file, text).unwrap();
    lab.operator(&[
        "checkpoint-create",
        lab.domain.name(),
        &file.display().to_string(),
    ]);
    lab.operator(&["checkpoint-delete", lab.domain.name(), "operators"]);
}

fn snapshot(lab: &Lab) {
    lab.operator(&[
        "snapshot-create-as",
        lab.domain.name(),
        "--disk-only",
        "--no-metadata",
        "--atomic",
    ]);
}

fn commit(lab: &Lab) {
    for disk in ALL {
        lab.operator(&[
            "blockcommit",
            lab.domain.name(),
            disk,
            "--active",
            "--pivot",
            "--wait",
        ]);
    }
    for overlay in overlays(lab) {
        fs::remove_file(overlay).unwrap();
    }
}

/// What snapshots have left beside the images.
fn overlays(lab: &Lab) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(lab.path(""))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    entries
        .filter(|path| {
            let name = path.file_name().unwrap().to_str().unwrap();
            let own = ["vda.qcow2", "vdb.raw", "sda.qcow2"].contains(&name);
            !own && ["vda.", "vdb.", "sda."]
                .iter()
                .any(|disk| name.starts_with(disk))
        })
        .collect()
}

/// Copies a disk to another image and pivots to it.
fn copy(lab: &Lab, disk: &str, file: &str, format: &str) {
    let path = lab.path(file).display().to_string();
    lab.operator(&[
        "blockcopy",
        lab.domain.name(),
        disk,
        "--dest",
        &path,
        "--format",
        format,
        "--wait",
        "--pivot",
        "--transient-job",
    ]);
}

fn resize(lab: &Lab, disk: &str, mib: u64) {
    lab.operator(&["blockresize", lab.domain.name(), disk, &format!("{mib}M")]);
}

fn plug(lab: &Lab) {
    let file = lab.path("vdc.qcow2");
    if !file.exists() {
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(&file)
            .arg((8 * MIB).to_string())
            .status()
            .unwrap();
        assert!(made.success());
        let io = std::process::Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 0x5a 1M 2M"])
            .arg(&file)
            .output()
            .unwrap();
        assert!(io.status.success(), "{io:?}");
    }
    lab.operator(&[
        "attach-disk",
        lab.domain.name(),
        &file.display().to_string(),
        "vdc",
        "--driver",
        "qemu",
        "--subdriver",
        "qcow2",
        "--live",
    ]);
}

fn unplug(lab: &Lab) {
    lab.operator(&["detach-disk", lab.domain.name(), "vdc", "--live"]);
    crate::vm_common::wait_for("the disk does not go", || {
        !lab.domain
            .virsh(&["domblklist", lab.domain.name()])
            .unwrap()
            .contains("vdc")
    });
    // Nothing of it stays in QEMU, so that it may be attached again.
    crate::vm_common::wait_for("its image stays open in QEMU", || {
        !lab.ask("query-named-block-nodes")
            .iter()
            .any(|node| node.to_string().contains("vdc.qcow2"))
    });
}

/// The plugged disk as it is in the newest restored point.
fn has_plugged(lab: &Lab) {
    let bytes = fs::read(lab.path("restored/vdc.raw")).unwrap();
    assert_eq!(bytes.len() as u64, 8 * MIB);
    let within = |at: usize| (1 << 20..3 << 20).contains(&at);
    assert!(
        bytes
            .iter()
            .enumerate()
            .all(|(at, byte)| *byte == if within(at) { 0x5a } else { 0 })
    );
}

#[test]
fn an_operator_works_beside_a_pass() {
    let mut life = Life::begin("operator");
    life.during("backup-begin during a pass", &[], |lab| {
        backup_begin(lab);
        backup_end(lab);
    });
    // Ours waits for the operator's, and puts nothing into the VM meanwhile.
    backup_begin(&life.lab);
    let name = life.name();
    let run = life.lab.start(&["backup", &name], "");
    clock::sleep(Duration::from_secs(2));
    let jobs = life.lab.ask("query-jobs");
    assert!(!jobs.is_empty(), "the operator's own has ended");
    assert!(!serde_json::json!(jobs).to_string().contains("forerun-"));
    backup_end(&life.lab);
    let backup = run.end().done();
    life.is_exact("after libvirt's own backup", &backup, &[]);
    // libvirt deletes the node that is left at the pivot.
    life.during("blockcopy during a pass", &["vda"], |lab| {
        copy(lab, "vda", "vda2.qcow2", "qcow2");
    });
    life.during("a disk plugged during a pass", &[], |lab| plug(lab));
    has_plugged(&life.lab);
    life.during("a disk unplugged during a pass", &[], |lab| unplug(lab));
    life.lab.is_clean();

    if all() {
        life.between("a disk plugged again between", &["vdc"], |lab| plug(lab));
        has_plugged(&life.lab);
        life.between("a disk unplugged between", &[], |lab| unplug(lab));
        backup_begin(&life.lab);
        life.lab.backup(&[]).code(6);
        backup_end(&life.lab);
        life.during("blockresize during a pass", &["vda"], |lab| {
            resize(lab, "vda", 20);
        });
        life.during("snapshot and commit during a pass", &ANY, |lab| {
            snapshot(lab);
            commit(lab);
        });
        life.during("checkpoint during a pass", &[], |lab| checkpoint(lab));
        life.between("checkpoint between", &[], |lab| checkpoint(lab));
        life.between("backup-begin between", &[], |lab| {
            backup_begin(lab);
            backup_end(lab);
        });
        life.between("blockresize between", &["vdb"], |lab| {
            resize(lab, "vdb", 20);
        });
        life.during("blockresize of a raw disk during a pass", &["vdb"], |lab| {
            resize(lab, "vdb", 24);
        });
    }
    life.lab.run(&["verify"]).code(0);
}

#[test]
fn chains_change_between_points() {
    if !all() {
        return;
    }
    let mut life = Life::begin("chains");
    life.between("snapshot between", &ALL, |lab| snapshot(lab));
    life.exact("on the overlay", &[], &[]);
    life.between("commit between", &ALL, |lab| commit(lab));
    life.exact("on the base again", &[], &[]);
    life.between("blockcopy to qcow2 between", &["vda"], |lab| {
        copy(lab, "vda", "vda2.qcow2", "qcow2");
    });
    life.exact("on the copy", &[], &[]);
    life.between("blockcopy to raw between", &["sda"], |lab| {
        copy(lab, "sda", "sda2.raw", "raw");
    });
    life.exact("on the raw copy", &[], &[]);
    life.during("blockcopy during a pass", &ANY, |lab| {
        copy(lab, "vda", "vda3.qcow2", "qcow2");
    });
    life.during("snapshot during a pass", &ANY, |lab| snapshot(lab));
    life.during("commit during a pass", &ANY, |lab| commit(lab));
    life.lab.run(&["verify"]).code(0);
}
