//! QEMU's ends, its starts, and what an operator does to its images.

use std::fs;
use std::time::Instant;

use serde_json::{Value, json};

use super::{NAMES, World};
use crate::history::{Fill, SECTOR, Write, differing};
use crate::lab::{Still, WAIT, drive, qemu_img, until};

impl World {
    /// Starts QEMU over the images.
    pub(super) fn start(&mut self) {
        let drives: Vec<Vec<String>> = NAMES
            .iter()
            .zip(&self.images)
            .map(|(name, image)| drive(name, &image.path, image.format))
            .collect();
        self.vm = Some(Still::start(self.lab.path(), &drives));
        self.covered = false;
        self.launched = [0; 2];
    }

    /// QEMU's own words: a write that failed is no write.
    fn no_write_failed(&self) {
        let said = fs::read_to_string(self.lab.path().join("qemu.log")).unwrap();
        assert!(!said.contains("failed"), "QEMU: {said}");
    }

    /// The guest's writes end, and are durable.
    fn settle(&mut self) {
        self.land();
        for name in NAMES {
            self.vm.as_mut().unwrap().io(name, "flush");
        }
    }

    /// What a disk's image holds while QEMU is off.
    fn content(&self, disk: usize) -> Vec<u8> {
        let raw = self.lab.path().join("content.raw");
        let (image, to) = (&self.images[disk], raw.to_str().unwrap());
        let path = image.path.to_str().unwrap();
        qemu_img(&["convert", "-f", image.format, "-O", "raw", path, to]);
        let bytes = fs::read(&raw).unwrap();
        fs::remove_file(raw).unwrap();
        bytes
    }

    /// The images hold every write: what QEMU and what puts overlays back promise, and what the model stands on.
    fn holds_all(&mut self, when: &str) {
        self.history.mark();
        for disk in 0..NAMES.len() {
            let found = [(disk, self.content(disk))];
            if let Err(wrong) = self.history.cut(&found, 0) {
                panic!("{when} the image of disk {disk} does not hold what was written: {wrong}");
            }
        }
    }

    /// QEMU ends in good order; perhaps a backup of its images, and writes to them; it starts again.
    pub(super) fn restart(&mut self) {
        if self.killed {
            self.recover();
        }
        self.settle();
        self.vm.take().unwrap().quit();
        self.counts.restarts += 1;
        self.no_write_failed();
        self.holds_all("after a shutdown");
        self.log.push("restart".into());
        for (disk, name) in NAMES.iter().enumerate() {
            if self.plan.one_in(4) && self.images[disk].base.is_none() {
                let target = format!("disk:{name}={}", self.images[disk].path.display());
                self.history.mark();
                let ran = self.done(&["backup", &target, "--as", "vm"]);
                self.collect(0, Some(&ran.point()));
            }
            if self.plan.one_in(4) {
                self.write_offline(disk);
            }
        }
        self.start();
    }

    /// Somebody writes to the image while it is off.
    fn write_offline(&mut self, disk: usize) {
        let sectors = self.history.now[disk].len() / SECTOR;
        let count = 1 + self.plan.index(200);
        let write = Write {
            disk,
            sector: self.plan.index(sectors - count),
            count,
            fill: Fill::Byte(1 + u8::try_from(self.plan.below(255)).unwrap()),
        };
        let Fill::Byte(byte) = write.fill else { return };
        let (offset, length) = (write.sector * SECTOR, count * SECTOR);
        let output = std::process::Command::new("qemu-io")
            .args(["-f", self.images[disk].format, "-c"])
            .arg(format!("write -q -P {byte} {offset} {length}"))
            .arg(&self.images[disk].path)
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        self.log.push(format!(" offline {write:?}"));
        self.history.push(write);
    }

    /// QEMU is killed while nothing is done, mostly with all writes flushed.
    pub(super) fn power_cut(&mut self) {
        if self.killed {
            self.recover();
        }
        let flushed = !self.plan.one_in(3);
        if flushed {
            self.settle();
        }
        self.vm = None;
        self.flying.clear();
        self.log.push(format!("power cut, flushed: {flushed}"));
        if flushed {
            self.holds_all("after a flush and a kill");
        }
        self.after_its_end();
    }

    /// QEMU was killed: what its images hold now is what there is.
    pub(super) fn after_its_end(&mut self) -> bool {
        self.counts.ended += 1;
        self.no_write_failed();
        if self.covered {
            let target = self.target();
            let words = ["recover", &target, "--as", "vm"];
            let mut ran = self.lab.forerun(&words);
            let begin = Instant::now();
            while ran.code == 6 && begin.elapsed() < WAIT {
                ran = self.lab.forerun(&words);
            }
            self.log.push(format!("recover: {} {}", ran.code, ran.json));
            if ran.code == 7 {
                // An overlay that cannot be put back for certain is the operator's.
                return false;
            }
            ran.done();
            self.killed = false;
        }
        for disk in 0..NAMES.len() {
            let content = self.content(disk);
            let lost = differing(&self.history.now[disk], &content).len();
            self.log.push(format!(" disk {disk} lost {lost} sectors"));
            self.history.adopt(disk, content);
        }
        self.newest = None;
        self.start();
        true
    }

    /// An operator's external snapshot of a disk, or its commit.
    pub(super) fn operator(&mut self) {
        if self.killed {
            self.recover();
        }
        let disk = self.plan.index(NAMES.len());
        let node = self.active(disk);
        let vm = self.vm.as_mut().unwrap();
        let image = &mut self.images[disk];
        self.log.push(format!(
            "operator on disk {disk}: {node}, back: {}",
            image.base.is_some()
        ));
        let Some((path, format)) = image.base.take() else {
            let name = format!("op-{}", self.log.len());
            let path = self.lab.path().join(&name);
            let snapshot = json!({
                "node-name": node, "snapshot-file": path, "snapshot-node-name": name, "format": "qcow2",
            });
            vm.monitor
                .execute("blockdev-snapshot-sync", snapshot)
                .unwrap();
            let base = std::mem::replace(&mut image.path, path);
            image.base = Some((base, std::mem::replace(&mut image.format, "qcow2")));
            return;
        };
        let job = json!({ "job-id": "operator", "device": node });
        vm.monitor.execute("block-commit", job).unwrap();
        let ready = |event: &Value| {
            event["event"] == "BLOCK_JOB_READY" && event["data"]["device"] == "operator"
        };
        vm.monitor.wait_event(&ready, WAIT).unwrap();
        vm.monitor
            .execute("job-complete", json!({ "id": "operator" }))
            .unwrap();
        until("the operator's commit", || {
            let jobs = vm.monitor.execute("query-jobs", json!({})).unwrap();
            jobs.as_array().unwrap().is_empty()
        });
        // A node that QEMU was started with stays, and would go on holding the base.
        if node == format!("{}-node", NAMES[disk]) {
            let what = json!({ "node-name": node });
            vm.monitor.execute("blockdev-del", what).unwrap();
        }
        fs::remove_file(&image.path).unwrap();
        (image.path, image.format) = (path, format);
    }

    /// The node that a disk's device writes to.
    fn active(&mut self, disk: usize) -> String {
        let vm = self.vm.as_mut().unwrap();
        let all = vm.monitor.execute("query-block", json!({})).unwrap();
        let path = format!("/machine/peripheral/{}/virtio-backend", NAMES[disk]);
        let all = all.as_array().unwrap().iter();
        let mut its = all.filter(|it| it["qdev"] == path.as_str());
        let node = &its.next().unwrap()["inserted"]["node-name"];
        node.as_str().unwrap().to_owned()
    }
}
