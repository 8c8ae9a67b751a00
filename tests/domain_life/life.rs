//! A domain whose life is told row by row.

use std::fs;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use forerun::clock;
use forerun_rig::guest::{Bus, Disk, Program};

use crate::domain_common::{ALONE, Lab};
use crate::vm_common::{Ended, MIB, Started, WAIT, wait_for};

/// How long an operator tries again what a batch of ours stands in the way of.
const OPERATOR: Duration = Duration::from_secs(15);
/// All disks.
pub(crate) const ALL: [&str; 3] = ["sda", "vda", "vdb"];
/// What was followed and what was not depends on when a look fell.
pub(crate) const ANY: [&str; 1] = ["*"];
/// A pass of a few batches.
pub(crate) const SLOW: [&str; 2] = ["--rate", "8MiB/s"];

/// Whether all rows are asked for.
pub(crate) fn all() -> bool {
    std::env::var_os("FORERUN_LIFE_ALL").is_some_and(|all| all == "1")
}

/// A domain, its stamped disks, and the newest write that a point held.
pub(crate) struct Life {
    pub(crate) lab: Lab,
    /// The stamped disks in the stamper's order.
    disks: Vec<&'static str>,
    last: u64,
    rows: u32,
    _alone: MutexGuard<'static, ()>,
}

impl Life {
    /// A domain of `vda` (qcow2, iothread), `vdb` (raw) and `sda` (qcow2, virtio-scsi), with a guest agent that may end the
    /// guest, and its first point.
    pub(crate) fn begin(name: &str) -> Self {
        Self::with(name, &["vda", "vdb", "sda"])
    }

    pub(crate) fn with(name: &str, disks: &[&'static str]) -> Self {
        let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
        let lab = Lab::boot_with(name, |mut builder| {
            for disk in disks {
                builder = builder.disk(match *disk {
                    "sda" => Disk::qcow2("sda", 16 * MIB).bus(Bus::Scsi),
                    "vdb" => Disk::raw("vdb", 16 * MIB),
                    other => Disk::qcow2(other, 16 * MIB).iothread(true),
                });
            }
            let devices: Vec<String> = disks.iter().map(|disk| format!("/dev/{disk}")).collect();
            let script = format!(
                "mkdir -p /sbin; printf '#!/bin/sh\\ncase \"$*\" in *-r*) reboot -f;; esac\\npoweroff -f\\n' >/sbin/shutdown; \
                 chmod +x /sbin/shutdown; rig-guest stamp --trim --span 8 --rate 300 {}",
                devices.join(" ")
            );
            builder.agent(true).program(Program::Script(script))
        });
        let mut life = Self {
            lab,
            disks: disks.to_vec(),
            last: 0,
            rows: 0,
            _alone: alone,
        };
        life.exact("the first point", &[], &[]);
        life
    }

    pub(crate) fn name(&self) -> String {
        self.lab.name()
    }

    pub(crate) fn virsh(&self, words: &[&str]) -> String {
        self.lab.domain.virsh(words).unwrap()
    }

    /// Makes a point: exact, not older than the one before, and of exactly these disks read in full.
    pub(crate) fn exact(&mut self, what: &str, more: &[&str], rescanned: &[&str]) -> Ended {
        let begun = Instant::now();
        let backup = self.lab.backup(more).done();
        self.is_exact(what, &backup, rescanned);
        println!("ROW {what}: {} ms", begun.elapsed().as_millis());
        backup
    }

    /// What [`exact`](Self::exact) says of a backup that was made.
    pub(crate) fn is_exact(&mut self, what: &str, backup: &Ended, rescanned: &[&str]) {
        let found = backup.rescanned();
        let log = self.lab.qemu_log();
        assert!(!log.contains("Assertion"), "{what}: QEMU ended: {log}");
        let disks = self.disks.clone();
        let step = self.lab.step_on(&backup.point(), &disks);
        assert!(step >= self.last, "{what}: {step} after {}", self.last);
        let keys: Vec<&str> = found.keys().map(String::as_str).collect();
        assert!(rescanned == ANY || keys == rescanned, "{what}: {backup:#?}");
        self.last = step;
        self.rows += 1;
        println!("ROW {what}: write {step}, rescanned {found:?}");
    }

    /// The guest writes: there is something for the next pass.
    pub(crate) fn writes(&self) {
        self.lab.progresses();
    }

    /// An event between a pass and the point.
    pub(crate) fn between(
        &mut self,
        what: &str,
        rescanned: &[&str],
        event: impl FnOnce(&mut Lab),
    ) -> Ended {
        self.lab.precopy(&["--once"]).done();
        self.lab.is_clean();
        event(&mut self.lab);
        self.exact(what, &[], rescanned)
    }

    /// Begins a pass of several batches over all that the guest writes, and comes back in the middle of its first one.
    pub(crate) fn slow_pass(&mut self) -> Started {
        self.pass(&SLOW)
    }

    /// As [`slow_pass`](Self::slow_pass), with other words for its pace.
    pub(crate) fn pass(&mut self, pace: &[&str]) -> Started {
        // What is known to be hot is left for the freeze, and of a pass nothing would be left.
        fs::remove_dir_all(self.lab.path("state/learned")).ok();
        // The guest touches all of what it stamps.
        clock::sleep(Duration::from_secs(2));
        let name = self.name();
        let run = self
            .lab
            .start(&[&["precopy", &name, "--once"], pace].concat(), "");
        let lab = &self.lab;
        wait_for("no batch began", || {
            // Each look is a process on a machine that has other things to do.
            clock::sleep(Duration::from_millis(30));
            lab.exporting()
        });
        run
    }

    /// An event during a pass, at once within a batch; the pass ends well, and the point after it is exact.
    pub(crate) fn during(
        &mut self,
        what: &str,
        rescanned: &[&str],
        event: impl FnOnce(&mut Lab),
    ) -> Ended {
        let mut run = self.slow_pass();
        event(&mut self.lab);
        let still = run.child.try_wait().unwrap().is_none();
        let ended = run.end();
        assert!(
            matches!(ended.status.code(), Some(0 | 3)),
            "{what}: {ended:#?}"
        );
        println!(
            "ROW {what}: the pass {} when it had happened",
            if still { "went on" } else { "had ended" }
        );
        self.exact(what, &[], rescanned)
    }

    /// The guest went back in time: later points may be of older writes.
    pub(crate) fn rewound(&mut self) {
        self.last = 0;
    }

    /// Starts the domain that is off; its guest goes on with what it finds.
    pub(crate) fn start(&mut self) {
        let resumed = self.lab.start_again();
        println!("resumed after {resumed}");
    }
}

impl Lab {
    /// Whether a batch or a freeze is in the VM.
    pub(crate) fn exporting(&self) -> bool {
        let exports = self
            .domain
            .execute("query-block-exports", &serde_json::json!({}));
        exports.is_ok_and(|exports| exports.as_array().is_some_and(|list| !list.is_empty()))
    }

    pub(crate) fn state(&self) -> String {
        self.domain
            .virsh(&["domstate", self.domain.name()])
            .unwrap()
            .trim()
            .to_owned()
    }

    pub(crate) fn becomes(&self, state: &str) {
        wait_for(&format!("the domain is never {state}"), || {
            clock::sleep(Duration::from_millis(50));
            self.state() == state
        });
    }

    /// A command of the operator, tried again while it is refused, as a person would.
    pub(crate) fn operator(&self, words: &[&str]) -> String {
        let begun = Instant::now();
        let mut tries = 0;
        loop {
            tries += 1;
            match self.domain.virsh(words) {
                Ok(said) => {
                    println!(
                        "    {} at try {tries} after {} ms",
                        words[0],
                        begun.elapsed().as_millis()
                    );
                    return said;
                }
                Err(error) => {
                    assert!(
                        begun.elapsed() < OPERATOR,
                        "{words:?}: {error}; QEMU: {}",
                        self.qemu_log()
                    );
                    if tries == 1 {
                        println!(
                            "    {} refused: {}",
                            words[0],
                            error.to_string().lines().last().unwrap_or_default()
                        );
                    }
                    clock::sleep(Duration::from_millis(200));
                }
            }
        }
    }

    /// The end of what libvirt logged of the domain's QEMU.
    pub(crate) fn qemu_log(&self) -> String {
        let log = self
            .domain
            .lock()
            .home()
            .join(format!("log/qemu/{}.log", self.domain.name()));
        let log = std::fs::read_to_string(log).unwrap_or_default();
        log[log.len().saturating_sub(2000)..].to_owned()
    }

    /// Runs a command in the guest through its agent.
    pub(crate) fn in_guest(&self, path: &str, words: &[&str]) {
        let ping = r#"{"execute":"guest-ping"}"#;
        wait_for("the agent never answers", || {
            self.domain
                .virsh(&["qemu-agent-command", self.domain.name(), ping])
                .is_ok()
        });
        let ask = serde_json::json!({ "execute": "guest-exec", "arguments": { "path": path, "arg": words } });
        self.domain
            .virsh(&["qemu-agent-command", self.domain.name(), &ask.to_string()])
            .ok();
    }

    /// How often the guest has come up on the console of this QEMU.
    pub(crate) fn boots(&self) -> usize {
        let log = std::fs::read(self.path("serial.log")).unwrap();
        String::from_utf8_lossy(&log)
            .matches("stamp: running")
            .count()
    }

    /// The guest comes up once more.
    pub(crate) fn reboots(&self, event: impl FnOnce(&Self)) {
        let before = self.boots();
        event(self);
        let begun = Instant::now();
        wait_for("the guest does not come up again", || self.boots() > before);
        assert!(begun.elapsed() < WAIT);
        self.progresses();
    }
}
