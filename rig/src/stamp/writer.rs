//! The program itself: one write at a time, and the return after a restart.

use std::io;
use std::time::{Duration, Instant};

use super::check::{Scan, State};
use super::{Action, Plan, index};
use crate::block::{BlockDevice, Page, SLOT, SLOTS_PER_BLOCK};

/// How the program runs.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Seed of a fresh stream.
    pub seed: u64,
    /// Uses at most so many bytes of each disk.
    pub span: Option<u64>,
    /// Zeroes and discards now and then.
    pub trim: bool,
    /// Steps a second at most.
    pub rate: Option<u32>,
    /// Ends after so many steps of this run.
    pub steps: Option<u64>,
}

struct Devices<'a>(&'a mut [Box<dyn BlockDevice>]);

impl Devices<'_> {
    /// Reads all disks as the checker does.
    fn scan(&mut self) -> io::Result<Scan> {
        let mut scan = Scan::default();
        let mut page = Page::default();
        for (disk, device) in self.0.iter_mut().enumerate() {
            let mut found = Vec::new();
            for slot in 0..device.size() / SLOT {
                device.read(slot, &mut page)?;
                found.push(scan.look(&page, disk as u64, slot));
            }
            scan.found.push(found);
        }
        Ok(scan)
    }

    fn act(&mut self, plan: &Plan, step: u64) -> io::Result<()> {
        let device = &mut self.0[index(plan.disk(step))];
        match plan.action(step) {
            Action::Write(slot) => device.write(slot, &plan.page(step, slot)),
            Action::Zero(slot) => device.zero(slot, SLOTS_PER_BLOCK),
            Action::Discard(slot) => device.discard(slot, SLOTS_PER_BLOCK),
        }
    }

    /// Brings the disks to the state after a step; returns how many slots were not.
    fn repair(&mut self, plan: Plan, scan: &Scan) -> io::Result<usize> {
        let state = State::at(plan, scan.newest)?;
        let mut repaired = 0;
        for (disk, found) in scan.found.iter().enumerate() {
            for (slot, &found) in found.iter().enumerate() {
                let expected = state.disks[disk].get(slot).copied().unwrap_or_default();
                if expected.accepts(found) {
                    continue;
                }
                repaired += 1;
                let slot = slot as u64;
                let page = match expected.step {
                    0 => Page::default(),
                    step => plan.page(step, slot),
                };
                self.0[disk].write(slot, &page)?;
            }
        }
        Ok(repaired)
    }
}

/// Runs the program; `say` gets a line at the start, about once a second, and at the end.
pub fn run(
    devices: &mut [Box<dyn BlockDevice>],
    options: &Options,
    say: &mut dyn FnMut(&str),
) -> io::Result<u64> {
    let sizes: Vec<u64> = devices.iter().map(|device| device.size()).collect();
    let mut devices = Devices(devices);
    let scan = devices.scan()?;
    let fresh = Plan::new(options.seed, &sizes, options.span, options.trim)?;
    let plan = scan.plan.unwrap_or(fresh);
    let mut step = scan.newest;
    if step > 0 {
        let repaired = devices.repair(plan, &scan)?;
        say(&format!(
            "stamp: resume after seq {step}, repaired {repaired}"
        ));
    }
    say(&format!(
        "stamp: running seq {step} slots {} disks {}",
        plan.slots, plan.disks
    ));
    let (started, first) = (Instant::now(), step);
    let mut spoken = started;
    while options.steps.is_none_or(|steps| step - first < steps) {
        step += 1;
        devices.act(&plan, step)?;
        if spoken.elapsed() >= Duration::from_secs(1) {
            spoken = Instant::now();
            say(&format!(
                "stamp: seq {step} t={}",
                started.elapsed().as_secs()
            ));
        }
        if let Some(rate) = options.rate {
            let due =
                started + Duration::from_secs(1) * u32::try_from(step - first).unwrap_or(0) / rate;
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
        }
    }
    for device in devices.0.iter_mut() {
        device.flush()?;
    }
    say(&format!("stamp: done seq {step}"));
    Ok(step)
}
