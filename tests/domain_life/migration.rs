//! Live migration between two daemons of one machine, with shared storage, and back during a pass.

use forerun_rig::guest::Libvirtd;

use crate::domain_common::{Lab, home};
use crate::life::{ANY, Life, all};

/// Migrates to the other daemon, which is then the one that the lab talks to.
fn migrate(lab: &Lab, other: &mut Libvirtd) {
    let uri = other.uri();
    lab.operator(&[
        "migrate",
        "--live",
        "--unsafe",
        "--persistent",
        lab.domain.name(),
        &uri,
        "--migrateuri",
        "tcp://127.0.0.1",
    ]);
    std::mem::swap(&mut *lab.domain.lock(), other);
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
    let run = life.slow_pass();
    migrate(&life.lab, &mut other);
    let ended = run.end();
    println!("migrated during a pass: {ended:#?}");
    assert!(matches!(ended.status.code(), Some(1 | 6 | 7)), "{ended:#?}");
    life.lab.progresses();
    life.exact("migrated during a pass", &[], &ANY);
    life.exact("back again", &[], &[]);
    life.lab.is_clean();
    // What the other end knows of the domain is not this one.
    other.virsh(&["undefine", &name]).unwrap();
    life.lab.run(&["verify"]).code(0);
}
