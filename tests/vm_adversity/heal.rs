//! Stored data rots while the VM still has it: it is found, named, and stored anew by the next backup, for the old points too.

use std::fs;
use std::path::{Path, PathBuf};

use forerun::image::BlockId;

use crate::lab::{Lab, MIB, Model, Ran, Still, drive, random_image};

const BLOCK: u64 = 64 << 10;

/// The id of a block in a repository that is not encrypted.
fn id_of(plain: &[u8]) -> BlockId {
    BlockId::from_bytes(<sha2::Sha256 as sha2::Digest>::digest(plain).into())
}

fn packs(lab: &Lab) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(lab.repo().join("packs")).unwrap() {
        let directory = fs::read_dir(entry.unwrap().path()).unwrap();
        found.extend(directory.map(|entry| entry.unwrap().path()));
    }
    found.sort();
    found
}

/// Flips a byte of the first block of a pack; gives where a disk with this content has the block.
fn rot(pack: &Path, disk: &[u8]) -> u64 {
    let mut bytes = fs::read(pack).unwrap();
    let id = BlockId::from_bytes(bytes[24..56].try_into().unwrap());
    bytes[16 + 52 + 1000] ^= 1;
    fs::write(pack, bytes).unwrap();
    let mut blocks = (0..).zip(disk.chunks(65536));
    let (number, _) = blocks
        .find(|(_, plain)| id_of(plain) == id)
        .expect("the disk has it");
    let number: u64 = number;
    number * BLOCK
}

/// Which points `verify` says are hurt.
fn hurt(ran: &Ran, points: &[&str]) -> Vec<bool> {
    let damage = ran.at("/verify/damage").to_string();
    points.iter().map(|point| damage.contains(point)).collect()
}

#[test]
fn what_rots_in_the_repository_is_stored_anew_while_the_vm_has_it() {
    let lab = Lab::new();
    let (image, content) = random_image(lab.path(), "a.qcow2", "qcow2", 6 * MIB);
    let mut disk = Model(content);
    let mut vm = Still::start(lab.path(), &[drive("vda", &image, "qcow2")]);
    let target = vm.target();
    let backup = ["backup", &*target, "--as", "vm"];
    let first = lab.forerun(&backup).ended(0).point();
    let old = Model(disk.0.clone());
    lab.forerun(&["verify"]).ended(0);

    // One byte of one block.
    rot(&packs(&lab)[0], &disk.0);
    let ran = lab.forerun(&["verify"]);
    assert_eq!(ran.code, 5, "{}", ran.json);
    assert_eq!(hurt(&ran, &[&first]), [true]);
    let ran = lab.forerun(&backup).ended(0);
    assert_eq!(
        ran.residual(),
        BLOCK,
        "only what is damaged is read: {}",
        ran.json
    );
    let second = ran.rescanned(&[]).point();
    let ran = lab.forerun(&["verify"]).ended(0);
    assert_eq!(ran.at("/verify/healed"), 1);
    lab.forerun(&["check"]).ended(0);
    for point in [&first, &second] {
        lab.same(point, &[("vda", &disk.0)]);
    }
    // It is not read once more.
    assert_eq!(lab.forerun(&backup).ended(0).residual(), 0);

    // A block that the session has copied ahead, and not yet published.
    let before = packs(&lab);
    disk.write(&mut vm, "vda", 4 * MIB, BLOCK, 0x21);
    lab.forerun(&["precopy", &target, "--as", "vm", "--once"])
        .ended(0);
    let mut new = packs(&lab);
    new.retain(|pack| !before.contains(pack));
    assert_eq!(new.len(), 1);
    let mut bytes = fs::read(&new[0]).unwrap();
    bytes[16 + 52] ^= 1;
    fs::write(&new[0], bytes).unwrap();
    assert_eq!(lab.forerun(&["verify"]).code, 5);
    let third = lab.forerun(&backup).ended(0).point();
    lab.forerun(&["verify"]).ended(0);
    lab.same(&third, &[("vda", &disk.0)]);

    // A block that the VM has no more: the old points stay hurt, the new one is not.
    let last = packs(&lab)
        .into_iter()
        .find(|pack| before.contains(pack) && fs::metadata(pack).unwrap().len() > 2 * MIB)
        .unwrap();
    let mut bytes = fs::read(&last).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 1;
    fs::write(&last, bytes).unwrap();
    let ran = lab.forerun(&["verify"]);
    assert_eq!(ran.code, 5);
    assert_eq!(hurt(&ran, &[&first, &second, &third]), [true; 3]);
    for offset in (0..6 * MIB).step_by(64 << 10) {
        disk.fill(offset, BLOCK, 0x42);
    }
    vm.io("vda", &format!("write -P {} 0 {}", 0x42, 6 * MIB));
    let fourth = lab.forerun(&backup).ended(0).point();
    let ran = lab.forerun(&["verify"]);
    assert_eq!(ran.code, 5);
    assert_eq!(hurt(&ran, &[&first, &third, &fourth]), [true, true, false]);
    lab.same(&fourth, &[("vda", &disk.0)]);

    // A whole pack is gone, with the VM's old content back on its disk.
    fs::remove_file(&last).unwrap();
    assert_eq!(lab.forerun(&["check"]).code, 5);
    for (number, block) in (0..).zip(old.0.chunks(65536)) {
        let path = lab.path().join("block");
        fs::write(&path, block).unwrap();
        let offset: u64 = number * BLOCK;
        vm.io(
            "vda",
            &format!("write -s {} {offset} {BLOCK}", path.display()),
        );
    }
    let fifth = lab.forerun(&backup).done().point();
    lab.forerun(&["verify"]).ended(0);
    for point in [&first, &second, &fifth] {
        lab.same(point, &[("vda", &old.0)]);
    }
}
