//! Internal snapshots, domains that were saved, and domains that are off while somebody starts them.

use std::path::Path;
use std::time::Instant;

use forerun::clock;
use serde_json::Value;

use crate::domain_common::Lab;
use crate::life::{ANY, Life, all};
use crate::vm_common::{Ended, wait_for};

/// Two qcow2 disks: libvirt takes no internal snapshot of a raw one.
const DISKS: [&str; 2] = ["vda", "sda"];
const BOTH: [&str; 2] = ["sda", "vda"];

fn warned(ended: &Ended, words: &str) {
    let warnings = ended.json.to_string();
    assert!(warnings.contains(words), "{words}: {ended:#?}");
}

fn lines(ended: &Ended) -> String {
    ended.json["warnings"].to_string() + &ended.json["errors"].to_string()
}

/// Bitmaps of ours in the images of a domain that is off, by the names that `qemu-img` tells.
fn stored(lab: &Lab, disk: &str) -> Vec<String> {
    let output = std::process::Command::new("qemu-img")
        .args(["info", "--output=json", "-U"])
        .arg(lab.path(&format!("{disk}.qcow2")))
        .output()
        .unwrap();
    let info: Value = serde_json::from_slice(&output.stdout).unwrap();
    let bitmaps = info.pointer("/format-specific/data/bitmaps");
    let bitmaps = bitmaps
        .and_then(Value::as_array)
        .cloned()
        .unwrap_or_default();
    bitmaps
        .iter()
        .map(|bitmap| bitmap["name"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn internal_snapshots_come_and_are_reverted_to() {
    if !all() {
        return;
    }
    let mut life = Life::with("internal", &DISKS);
    let name = life.name();
    // The bitmaps that are there go on; new ones are no longer stored.
    life.between("internal snapshot between", &[], |lab| {
        lab.operator(&["snapshot-create-as", lab.domain.name(), "one"]);
    });
    life.exact("with an internal snapshot", &[], &[]);
    let tracked = life.lab.run(&["track", &name]).done();
    println!("track: {tracked:#?}");
    warned(&tracked, "internal snapshots");
    // None is stored any more: nothing stands in the way, and libvirt begins another QEMU.
    life.virsh(&["snapshot-revert", &name, "one"]);
    life.lab.progresses();
    life.rewound();
    life.exact("reverted", &[], &BOTH);
    life.virsh(&["snapshot-delete", &name, "one"]);
    life.exact("the snapshot deleted", &[], &[]);
    life.exact("stored again", &[], &[]);

    // Stored ones make QEMU refuse, and libvirt then leaves the domain off, until they are gone.
    life.virsh(&["snapshot-create-as", &name, "two"]);
    let refused = life.lab.domain.virsh(&["snapshot-revert", &name, "two"]);
    let refused = refused.unwrap_err().to_string();
    assert!(refused.contains("active dirty bitmaps"), "{refused}");
    assert_eq!(life.lab.state(), "shut off");
    life.lab.run(&["untrack", &name]).done();
    let left = [stored(&life.lab, "vda"), stored(&life.lab, "sda")];
    assert!(left.iter().all(Vec::is_empty), "{left:?}");
    life.virsh(&["snapshot-revert", &name, "two"]);
    life.lab.progresses();
    life.rewound();
    life.exact("reverted after untrack", &[], &BOTH);
    life.virsh(&["snapshot-delete", &name, "two"]);
    life.during("internal snapshot during a pass", &ANY, |lab| {
        lab.operator(&["snapshot-create-as", lab.domain.name(), "three"]);
    });
    life.lab.run(&["verify"]).code(0);
}

#[test]
fn a_domain_is_off_saved_or_started_under_our_hands() {
    let mut life = Life::begin("off");
    let name = life.name();
    life.lab.precopy(&["--once"]).done();
    life.virsh(&["managedsave", &name]);
    assert_eq!(life.lab.state(), "shut off");
    let before = [stored(&life.lab, "vda"), stored(&life.lab, "sda")];
    assert!(before.iter().all(|names| !names.is_empty()), "{before:?}");
    // Its disks are those of a guest in the middle of its work, whose memory is elsewhere.
    let saved = life.exact("off with a managed save", &[], &["vdb"]);
    let point = &saved.json["targets"][0]["point"];
    assert_eq!(point["quiesce"], "crash-consistent", "{saved:#?}");
    warned(&saved, "managed save");
    let seen = life.lab.run(&["inspect", &name]).done();
    assert_eq!(
        seen.json["targets"][0]["machine"]["state"], "saved",
        "{seen:#?}"
    );
    life.virsh(&["start", &name]);
    life.lab.progresses();
    life.exact("started from its managed save", &[], &["vdb"]);
    life.lab.is_clean();

    if !all() {
        return;
    }
    // Started while a pass over its images is under way.
    life.lab.domain.destroy().unwrap();
    let run = life
        .lab
        .start(&["precopy", &name, "--once", "--rate", "1MiB/s"], "");
    wait_for("nothing holds the images", || {
        life.lab
            .host_state()
            .iter()
            .any(|file| Path::new(file).extension().is_some_and(|ext| ext == "qsd"))
    });
    clock::sleep(std::time::Duration::from_millis(500));
    let begun = Instant::now();
    let first = life.lab.domain.virsh(&["start", &name]);
    println!("start under a pass: {first:?}");
    if first.is_err() {
        life.lab.operator(&["start", &name]);
    }
    println!("started after {} ms", begun.elapsed().as_millis());
    let ended = run.end();
    println!("the pass: {:?} {}", ended.status, lines(&ended));
    assert!(matches!(ended.status.code(), Some(0 | 3)), "{ended:#?}");
    life.lab.progresses();
    life.exact("started under a pass", &[], &["vdb"]);
    life.lab.is_clean();
    life.lab.run(&["verify"]).code(0);
}
