//! What the guest writes.

use std::fs;

use serde_json::json;

use super::{NAMES, World};
use crate::history::{Fill, SECTOR, Write};
use crate::lab::until;

impl World {
    /// One write through a disk's device; it has ended, or it is the newest of some that are in flight together.
    pub(super) fn write(&mut self) {
        let write = self.next_write();
        let Write {
            disk,
            sector,
            count,
            fill,
        } = write;
        if self.flying.len() > 8 || self.flying.iter().any(|it| it.overlaps(&write)) {
            self.land();
        }
        let at = format!("{} {}", sector * SECTOR, count * SECTOR);
        let line = match fill {
            Fill::Stamp(_) => {
                let pattern = self.lab.path().join("pattern");
                fs::write(&pattern, write.bytes()).unwrap();
                format!("write -q -s {} {at}", pattern.display())
            }
            Fill::Byte(byte) => {
                self.flying.push(write);
                self.launched[disk] += 1;
                format!("aio_write -q -P {byte} {at}")
            }
            Fill::Zero => {
                let whole = sector.is_multiple_of(128) && count.is_multiple_of(128);
                let covered = self.covered || self.images[disk].base.is_some();
                // A filter or an overlay may leave what was there: QEMU discards nothing below a node without `discard`.
                if whole && !covered && self.writer.one_in(2) {
                    format!("discard -q {at}")
                } else {
                    let kind = self.writer.of(&["write -q -z", "write -q -z -u"]);
                    format!("{kind} {at}")
                }
            }
        };
        self.vm.as_mut().unwrap().io(NAMES[disk], &line);
        self.history.push(write);
    }

    /// Waits until all writes have ended. Not by `aio_flush`, which drains all disks: QEMU 10.0 was seen to spin in that for as
    /// long as a freeze's export had a client that waited for an answer.
    pub(super) fn land(&mut self) {
        let vm = self.vm.as_mut().unwrap();
        let launched = self.launched;
        until("the writes' ends", || {
            let all = vm.monitor.execute("query-blockstats", json!({})).unwrap();
            let all = all.as_array().unwrap();
            NAMES.iter().zip(launched).all(|(name, count)| {
                let path = format!("/machine/peripheral/{name}/virtio-backend");
                let mut its = all.iter().filter(|it| it["qdev"] == path.as_str());
                // Only those that are not waited for are counted here.
                its.next().unwrap()["stats"]["wr_operations"] == count
            })
        });
        self.flying.clear();
    }

    fn next_write(&mut self) -> Write {
        let dice = &mut self.writer;
        let disk = dice.index(NAMES.len());
        let sectors = self.history.now[disk].len() / SECTOR;
        let number = self.history.total() as u64 + 1;
        let (granule, mut count) = match dice.below(10) {
            0..3 => (1, 1),
            3..6 => (1, 1 + dice.index(16)),
            6..8 => (8, 8 * (1 + dice.index(32))),
            _ => (128, 128 * (1 + dice.index(4))),
        };
        // Most of what is written is written again and again.
        let (start, span) = if dice.one_in(4) {
            (0, sectors)
        } else {
            (sectors / 8 * (disk + 2), sectors / 16)
        };
        let sector = (start + dice.index(span)) / granule * granule;
        count = count.min(sectors - sector);
        let fill = match dice.below(10) {
            0..5 => Fill::Stamp(number),
            5..8 => Fill::Byte(u8::try_from(1 + number % 255).unwrap()),
            _ => Fill::Zero,
        };
        Write {
            disk,
            sector,
            count,
            fill,
        }
    }
}
