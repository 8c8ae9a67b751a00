//! Live migration between two daemons of one machine, with shared storage, and back during a pass.

use forerun_rig::guest::Libvirtd;
use rustix::process::{Pid, Signal, kill_process};

use crate::domain_common::{Lab, home};
use crate::life::{ANY, Life, all};
use crate::vm_common::{Ended, wait_for};

fn words<'a>(name: &'a str, uri: &'a str) -> [&'a str; 8] {
    let to = ["--migrateuri", "tcp://127.0.0.1"];
    let [at, address] = to;
    [
        "migrate",
        "--live",
        "--unsafe",
        "--persistent",
        name,
        uri,
        at,
        address,
    ]
}

/// Migrates to the other daemon, which is then the one that the lab talks to.
fn migrate(lab: &Lab, other: &mut Libvirtd) {
    let uri = other.uri();
    lab.operator(&words(lab.domain.name(), &uri));
    std::mem::swap(&mut *lab.domain.lock(), other);
}

/// A migration that begins within a freeze: the guest runs on at one of the ends, the run ends by itself, and the next
/// point is exact.
fn within_a_freeze(life: &mut Life, other: &mut Libvirtd, method: &str, step: &str) {
    let what = format!("migrated during a freeze, {method}");
    let name = life.name();
    life.writes();
    let run = life.lab.start(
        &["backup", &name, "--freeze", method],
        &format!("stop@{step}"),
    );
    let lab = &life.lab;
    wait_for("no freeze", || !lab.steps().is_empty());
    let uri = other.uri();
    let migrated = lab.domain.virsh(&words(&name, &uri));
    println!("ROW {what}: {migrated:?}");
    let pid = Pid::from_child(&run.child);
    kill_process(pid, Signal::CONT).unwrap();
    let ended = run.end();
    if migrated.is_ok() {
        // Nothing at this end is touched any more.
        has_gone(&mut life.lab, &ended);
        life.lab.run(&["recover", &name]).code(7);
        std::mem::swap(&mut *life.lab.domain.lock(), other);
    } else {
        life.is_exact(&format!("{what}, a point"), &ended.done(), &ANY);
    }
    life.lab.progresses();
    life.lab.run(&["recover", &name]).code(0);
    let disks = life.virsh(&["domblklist", &name]);
    assert!(!disks.contains("overlay"), "{disks}");
    life.exact(&format!("{what}, then"), &[], &ANY);
    life.lab.is_clean();
}

/// The run, and one after it, say where the domain is and open none of its images.
fn has_gone(lab: &mut Lab, ended: &Ended) {
    let after = lab.backup(&[]);
    // The run may have looked in the last moment of the migration.
    let words = ["migrat", "has migrated to another host"];
    for (ended, words) in [ended, &after].into_iter().zip(words) {
        assert_eq!(ended.status.code(), Some(7), "{ended:#?}");
        let said = ended.json["errors"].to_string();
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn a_domain_migrates_with_its_bitmaps() {
    if !all() {
        return;
    }
    let mut life = Life::begin("migrate");
    let name = life.name();
    let second = home().with_extension("2");
    std::fs::create_dir(&second).unwrap();
    std::fs::set_permissions(&second, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut other = Libvirtd::start(&second).unwrap();
    life.between("migrated between", &["vdb"], |lab| migrate(lab, &mut other));
    life.exact("at the other end", &[], &[]);

    // Back, during a pass at the end that it leaves: it is off there, and its images are in use.
    let run = life.pass(&["--rate", "2MiB/s"]);
    migrate(&life.lab, &mut other);
    let ended = run.end();
    std::mem::swap(&mut *life.lab.domain.lock(), &mut other);
    has_gone(&mut life.lab, &ended);
    std::mem::swap(&mut *life.lab.domain.lock(), &mut other);
    life.lab.progresses();
    life.exact("migrated during a pass", &[], &ANY);
    life.exact("back again", &[], &[]);
    life.lab.is_clean();

    for (method, step) in [
        ("fleece", "qmp:transaction:answered#1"),
        ("snapshot", "snapshot:answered#1"),
    ] {
        within_a_freeze(&mut life, &mut other, method, step);
    }
    // What the other end knows of the domain is not this one.
    other.virsh(&["undefine", &name]).unwrap();
    life.lab.run(&["verify"]).code(0);
}
