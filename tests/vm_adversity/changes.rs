//! What changes on the disks and under them between two backups.

use std::fs;
use std::path::PathBuf;

use serde_json::json;

use crate::lab::{
    KIB, Lab, MIB, Model, Still, WAIT, bitmaps, compare, drive, image, io, node, qemu_img, until,
};
use rustix::process::Signal;

/// A VM with a qcow2 disk `vda` and a raw disk `vdb`, both with a pattern, and what they hold.
struct Pair {
    lab: Lab,
    vm: Option<Still>,
    images: [PathBuf; 2],
    vda: Model,
    vdb: Model,
}

impl Pair {
    fn new() -> Self {
        let lab = Lab::new();
        let images = [
            image(lab.path(), "a.qcow2", "qcow2", 16 * MIB),
            image(lab.path(), "b.raw", "raw", 16 * MIB),
        ];
        let mut pair = Self {
            lab,
            vm: None,
            images,
            vda: Model::zeros(16 * MIB),
            vdb: Model::zeros(16 * MIB),
        };
        pair.boot();
        pair.write("vda", 0, 4 * MIB, 0x11);
        pair.write("vdb", 0, 4 * MIB, 0x22);
        pair
    }

    fn boot(&mut self) {
        self.vm = None;
        let words = [
            drive("vda", &self.images[0], "qcow2"),
            drive("vdb", &self.images[1], "raw"),
        ];
        self.vm = Some(Still::start(self.lab.path(), &words));
    }

    fn vm(&mut self) -> &mut Still {
        self.vm.as_mut().unwrap()
    }

    fn quit(&mut self) {
        self.vm.take().unwrap().quit();
    }

    fn write(&mut self, disk: &str, offset: u64, length: u64, byte: u8) {
        let model = if disk == "vda" {
            &mut self.vda
        } else {
            &mut self.vdb
        };
        model.write(self.vm.as_mut().unwrap(), disk, offset, length, byte);
    }

    /// Backs up: exact, and exactly these disks were read in full.
    fn backup(&mut self, rescanned: &[(&str, &str)]) -> String {
        let words = ["backup", &self.vm().target(), "--as", "pair"];
        let ran = self.lab.forerun(&words).ended(0).rescanned(rescanned);
        let point = ran.point();
        self.lab
            .same(&point, &[("vda", &self.vda.0), ("vdb", &self.vdb.0)]);
        self.vm().is_clean();
        point
    }
}

#[test]
fn zeroed_and_discarded_blocks_come_back_as_zeros() {
    let mut pair = Pair::new();
    let first = pair.backup(&[]);
    let (old_a, old_b) = (pair.vda.0.clone(), pair.vdb.0.clone());
    for disk in ["vda", "vdb"] {
        for line in [
            "write -z 0 256k",
            "write -z -u 256k 256k",
            "discard 512k 256k",
            // Not whole blocks.
            "write -z 836k 8k",
            "discard 1088k 4k",
        ] {
            pair.vm().io(disk, line);
        }
        let model = if disk == "vda" {
            &mut pair.vda
        } else {
            &mut pair.vdb
        };
        model.fill(0, 768 * KIB, 0);
        model.fill(836 * KIB, 8 * KIB, 0);
        if disk == "vdb" {
            // A qcow2 image keeps what is less than a cluster.
            model.fill(1088 * KIB, 4 * KIB, 0);
        }
        // Discarded and written again.
        pair.vm().io(disk, "discard 2m 1m");
        let model = if disk == "vda" {
            &mut pair.vda
        } else {
            &mut pair.vdb
        };
        model.fill(2 * MIB, MIB, 0);
        pair.write(disk, 2 * MIB + 96 * KIB, 32 * KIB, 0x33);
    }
    let second = pair.backup(&[]);
    pair.lab.same(&first, &[("vda", &old_a), ("vdb", &old_b)]);

    // Over an image that holds other things, larger than the disk, too.
    for format in ["raw", "qcow2"] {
        let over = pair.lab.path().join("over");
        fs::write(&over, vec![0xee; 20 << 20]).unwrap();
        let to = format!("vda={}", over.display());
        let words = ["restore", &second, "--disk", &to, "--format", format];
        pair.lab
            .forerun(&words)
            .failed(1, "exists already", "--force");
        assert_eq!(fs::metadata(&over).unwrap().len(), 20 << 20);
        pair.lab
            .forerun(&[&words[..], &["--force"]].concat())
            .ended(if format == "raw" { 0 } else { 3 });
        let raw = pair.lab.path().join("over.raw");
        let (over, raw) = (over.to_str().unwrap(), raw.to_str().unwrap());
        qemu_img(&["convert", "-f", format, "-O", "raw", over, raw]);
        compare(format, &fs::read(raw).unwrap(), &pair.vda.0);
    }
}

#[test]
fn a_disk_may_come_and_go_between_backups() {
    let mut pair = Pair::new();
    pair.quit();
    let c = image(pair.lab.path(), "c.qcow2", "qcow2", 8 * MIB);
    let words = [
        drive("vda", &pair.images[0], "qcow2"),
        drive("vdb", &pair.images[1], "raw"),
        vec!["-device".into(), "virtio-scsi-pci,id=hba".into()],
    ];
    pair.vm = Some(Still::start(pair.lab.path(), &words));
    pair.backup(&[]);
    let mut sdc = Model::zeros(8 * MIB);
    for round in 1..=2 {
        let vm = pair.vm();
        vm.monitor
            .execute("blockdev-add", node("sdc", &c, "qcow2"))
            .unwrap();
        let device =
            json!({ "driver": "scsi-hd", "id": "sdc", "drive": "sdc-node", "bus": "hba.0" });
        vm.monitor.execute("device_add", device).unwrap();
        sdc.write(
            vm,
            "sdc",
            round * MIB,
            MIB,
            0x40 + u8::try_from(round).unwrap(),
        );
        pair.write("vda", 5 * MIB, 64 * KIB, u8::try_from(round).unwrap());
        // The others stay incremental; the second time the new disk does, too.
        let words = ["backup", &pair.vm().target(), "--as", "pair"];
        let ran = pair.lab.forerun(&words).ended(0).rescanned(&[]);
        assert_eq!(
            ran.at("/targets/0/point/disks").as_array().unwrap().len(),
            3
        );
        let most = if round == 1 { 2 * MIB } else { MIB + 64 * KIB };
        assert!(ran.residual() <= most, "{}", ran.json);
        let disks = [
            ("vda", &pair.vda.0[..]),
            ("vdb", &pair.vdb.0),
            ("sdc", &sdc.0),
        ];
        pair.lab.same(&ran.point(), &disks);
        let vm = pair.vm();
        vm.monitor
            .execute("device_del", json!({ "id": "sdc" }))
            .unwrap();
        let gone = |event: &serde_json::Value| event["data"]["device"] == "sdc";
        vm.monitor.wait_event(&gone, WAIT).unwrap();
        vm.monitor
            .execute("blockdev-del", json!({ "node-name": "sdc-node" }))
            .unwrap();
        pair.write("vda", 6 * MIB, 64 * KIB, u8::try_from(round).unwrap());
        pair.backup(&[]);
    }
}

#[test]
fn a_disk_that_grew_is_read_in_full_and_no_other() {
    let mut pair = Pair::new();
    pair.backup(&[]);
    pair.vm()
        .monitor
        .execute(
            "block_resize",
            json!({ "node-name": "vda-node", "size": 24 * MIB }),
        )
        .unwrap();
    pair.vda.0.resize(24 << 20, 0);
    pair.write("vda", 20 * MIB, MIB, 0x44);
    pair.write("vdb", 8 * MIB, 128 * KIB, 0x45);
    pair.backup(&[("vda", "resized")]);
    pair.write("vda", 23 * MIB, MIB, 0x46);
    pair.backup(&[]);
}

#[test]
fn exchanged_and_rolled_back_images_are_found_out() {
    let mut pair = Pair::new();
    let kept = pair.lab.path().join("kept.qcow2");
    pair.backup(&[]);
    pair.quit();
    fs::copy(&pair.images[0], &kept).unwrap();
    let old = pair.vda.0.clone();
    pair.boot();
    // A raw disk's bitmaps end with its QEMU.
    pair.write("vda", MIB, MIB, 0x51);
    pair.backup(&[("vdb", "is gone")]);
    // The older copy, in the same file: not even the inode tells.
    pair.quit();
    fs::copy(&kept, &pair.images[0]).unwrap();
    pair.vda.0 = old;
    pair.boot();
    pair.backup(&[("vda", "is gone"), ("vdb", "is gone")]);
}

#[test]
fn two_disks_of_one_size_that_change_places_are_found_out() {
    let lab = Lab::new();
    let a = image(lab.path(), "a.qcow2", "qcow2", 8 * MIB);
    let b = image(lab.path(), "b.qcow2", "qcow2", 8 * MIB);
    let (mut one, mut two) = (Model::zeros(8 * MIB), Model::zeros(8 * MIB));
    let words = [drive("vda", &a, "qcow2"), drive("vdb", &b, "qcow2")];
    let mut vm = Still::start(lab.path(), &words);
    one.write(&mut vm, "vda", 0, MIB, 0x61);
    two.write(&mut vm, "vdb", 0, 2 * MIB, 0x62);
    let backup = |vm: &Still| {
        lab.forerun(&["backup", &vm.target(), "--as", "pair"])
            .ended(0)
    };
    let ran = backup(&vm);
    lab.same(&ran.point(), &[("vda", &one.0), ("vdb", &two.0)]);
    vm.quit();
    // The names stay, the files change places.
    let other = lab.path().join("x");
    fs::rename(&a, &other).unwrap();
    fs::rename(&b, &a).unwrap();
    fs::rename(&other, &b).unwrap();
    let vm = Still::start(lab.path(), &words);
    let why = "not the one recorded";
    let ran = backup(&vm).rescanned(&[("vda", why), ("vdb", why)]);
    lab.same(&ran.point(), &[("vda", &two.0), ("vdb", &one.0)]);
    vm.quit();
    // The command line changes, the files stay.
    let words = [drive("vda", &b, "qcow2"), drive("vdb", &a, "qcow2")];
    let mut vm = Still::start(lab.path(), &words);
    let ran = backup(&vm).rescanned(&[("vda", why), ("vdb", why)]);
    lab.same(&ran.point(), &[("vda", &one.0), ("vdb", &two.0)]);
    // The old bitmaps went, although the disks that they are on have other names now.
    for node in ["vda-node", "vdb-node"] {
        let left = bitmaps(&mut vm.monitor, node);
        assert_eq!(left.len(), 1, "{node}: {left:?}");
    }
}

/// The names of `vda`'s bitmaps that begin with our prefix, and whether they record.
fn ours(vm: &mut Still) -> Vec<(String, bool)> {
    let all = bitmaps(&mut vm.monitor, "vda-node");
    all.into_iter()
        .filter(|(name, _)| name.starts_with("forerun-"))
        .collect()
}

#[test]
fn a_live_bitmap_that_somebody_removed_or_disabled_is_not_trusted() {
    let mut pair = Pair::new();
    pair.backup(&[]);
    for (command, why) in [("remove", "is gone"), ("disable", "does not record")] {
        let live = ours(pair.vm()).pop().unwrap().0;
        pair.write("vda", 0, 64 * KIB, 0x71);
        pair.vm().bitmap(command, "vda-node", &live);
        // Nobody saw this one.
        pair.write("vda", 7 * MIB, 64 * KIB, 0x72);
        pair.write("vdb", 7 * MIB, 64 * KIB, 0x73);
        pair.backup(&[("vda", why)]);
        pair.write("vda", 9 * MIB, 64 * KIB, 0x74);
        pair.backup(&[]);
    }
}

#[test]
fn a_pending_bitmap_that_somebody_removed_or_enabled_is_not_trusted() {
    for (command, why) in [("remove", Some("is gone")), ("enable", None)] {
        let mut pair = Pair::new();
        pair.backup(&[]);
        pair.write("vda", 0, 4 * MIB, 0x75);
        // A pass that is interrupted leaves the bitmap that it copies by.
        let words = ["precopy", &pair.vm().target(), "--as", "pair"];
        let slow = [&words[..], &["--rate", "256KiB/s"]].concat();
        let run = pair.lab.begin(&slow);
        until("a pending bitmap", || {
            ours(pair.vm()).iter().any(|(_, records)| !records)
        });
        run.signal(Signal::TERM);
        run.end().failed(130, "interrupted", "kept");
        pair.vm().is_clean();
        let pending = ours(pair.vm())
            .into_iter()
            .find(|(_, records)| !records)
            .unwrap()
            .0;
        pair.vm().bitmap(command, "vda-node", &pending);
        pair.write("vda", 10 * MIB, 128 * KIB, 0x76);
        let expected: Vec<_> = why.map(|why| ("vda", why)).into_iter().collect();
        pair.backup(&expected);
    }
}

#[test]
fn bitmaps_of_others_are_kept_and_never_trusted() {
    let mut pair = Pair::new();
    let repository = fs::read_to_string(pair.lab.repo().join("config")).unwrap();
    pair.backup(&[]);
    let live = ours(pair.vm()).pop().unwrap().0;
    // One of somebody else, one that looks like another repository's, one like a later epoch of ours.
    let own = live.split('-').nth(1).unwrap().to_owned();
    assert!(repository.contains(&own), "{live} {repository}");
    let strange = format!("forerun-{own}-9-0123456789abcdef");
    let foreign = ["operator", "forerun-00000000-1-0123456789abcdef", &strange];
    for name in foreign {
        pair.vm().bitmap("add", "vda-node", name);
    }
    pair.write("vda", 11 * MIB, 64 * KIB, 0x77);
    // Whoever made the strange one may have disabled ours meanwhile; once is enough, ours are later then.
    pair.backup(&[("vda", "later bitmap")]);
    pair.backup(&[]);
    for name in foreign {
        let there = bitmaps(&mut pair.vm().monitor, "vda-node");
        assert!(there.contains(&(name.to_owned(), true)), "{name}");
    }
    // The live one makes place for the strange one: it is not taken for it.
    let live = ours(pair.vm())
        .into_iter()
        .map(|(name, _)| name)
        .find(|name| !foreign.contains(&name.as_str()))
        .unwrap();
    pair.vm().bitmap("remove", "vda-node", &live);
    io(&mut pair.vm().monitor, "vda", "write -P 0x78 12m 64k");
    pair.vda.fill(12 * MIB, 64 * KIB, 0x78);
    pair.backup(&[("vda", "is gone")]);
    let words = ["untrack", &pair.vm().target(), "--as", "pair"];
    pair.lab.forerun(&words).ended(0);
    let left = bitmaps(&mut pair.vm().monitor, "vda-node");
    let mut left: Vec<&str> = left.iter().map(|(name, _)| name.as_str()).collect();
    left.sort_unstable_by_key(|name| name.starts_with("forerun"));
    assert_eq!(left, &foreign[..2], "untrack takes this repository's only");
}

/// The size of the disk `vdb`, as its device sees it.
fn size(vm: &mut Still) -> u64 {
    let disks = vm.monitor.execute("query-block", json!({})).unwrap();
    let mut disks = disks.as_array().unwrap().iter();
    let vdb = disks.find(|disk| disk["qdev"].as_str().unwrap().contains("vdb"));
    let size = &vdb.unwrap()["inserted"]["image"]["virtual-size"];
    size.as_u64().unwrap()
}

#[test]
fn a_disk_that_is_resized_while_a_snapshot_is_prepared_keeps_its_new_size() {
    let mut pair = Pair::new();
    for now in [24 * MIB, 8 * MIB] {
        let target = pair.vm().target();
        let due = jiff::Timestamp::now() + std::time::Duration::from_secs(5);
        let due = due.to_string();
        let words = ["run", &target, "--as", "vm", "--at", &due];
        let mut run = pair
            .lab
            .begin(&[&words[..], &["--freeze", "snapshot"]].concat());
        let vm = pair.vm();
        until("the freeze is prepared", || {
            let nodes = vm.monitor.execute("query-named-block-nodes", json!({}));
            nodes.unwrap().to_string().contains("-s1\"")
        });
        let resize = json!({ "node-name": "vdb-node", "size": now });
        vm.monitor.execute("block_resize", resize).unwrap();
        while run.is_running() {
            assert_eq!(size(vm), now, "on an overlay of another size");
        }
        let ran = run.end().ended(3).warned("`vdb` was resized");
        pair.vdb.0.resize(usize::try_from(now).unwrap(), 0);
        let [vda, vdb] = [&pair.vda, &pair.vdb].map(|model| &*model.0);
        pair.lab.same(&ran.point(), &[("vda", vda), ("vdb", vdb)]);
        assert_eq!(size(pair.vm()), now);
        pair.vm().is_clean();
    }
}
