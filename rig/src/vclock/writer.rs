//! The writers: threads that write at their own pace and share what each has completed.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::check::Scan;
use super::{Layout, index};
use crate::block::{BlockDevice, Page, SLOT};

/// What all writers of a run share.
#[derive(Debug)]
pub struct Shared {
    layout: Layout,
    completed: Vec<AtomicU64>,
    submitted: Vec<AtomicU64>,
    stop: AtomicBool,
    /// Writes a second of each writer; 0 for as fast as it goes.
    rate: AtomicU32,
    longest_us: AtomicU64,
}

impl Shared {
    /// For writers that have not written yet.
    pub fn new(layout: Layout, rate: u32) -> Self {
        let counters = || (0..layout.writers()).map(|_| AtomicU64::new(0)).collect();
        Self {
            layout,
            completed: counters(),
            submitted: counters(),
            stop: AtomicBool::new(false),
            rate: AtomicU32::new(rate),
            longest_us: AtomicU64::new(0),
        }
    }

    /// How many writes each writer has completed.
    pub fn completed(&self) -> Vec<u64> {
        self.completed
            .iter()
            .map(|count| count.load(Ordering::SeqCst))
            .collect()
    }

    /// How many writes each writer has submitted.
    pub fn submitted(&self) -> Vec<u64> {
        self.submitted
            .iter()
            .map(|count| count.load(Ordering::SeqCst))
            .collect()
    }

    /// Asks the writers to end after their present write.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
    }

    /// Changes the pace of every writer; 0 for as fast as it goes.
    pub fn set_rate(&self, rate: u32) {
        self.rate.store(rate, Ordering::SeqCst);
    }

    /// The longest write since the last call.
    pub fn take_longest(&self) -> Duration {
        Duration::from_micros(self.longest_us.swap(0, Ordering::SeqCst))
    }

    /// One writer, until [`Shared::stop`] or an error.
    pub fn run_writer(&self, writer: u64, device: &mut dyn BlockDevice) -> io::Result<()> {
        let me = index(writer);
        let mut clock = vec![0; self.completed.len()];
        let mut k = self.completed[me].load(Ordering::SeqCst);
        while !self.stop.load(Ordering::SeqCst) {
            k += 1;
            for (seen, completed) in clock.iter_mut().zip(&self.completed) {
                *seen = completed.load(Ordering::SeqCst);
            }
            let page = self.layout.page(writer, k, &clock);
            self.submitted[me].store(k, Ordering::SeqCst);
            let started = Instant::now();
            device.write(self.layout.slot(writer, k), &page)?;
            self.completed[me].store(k, Ordering::SeqCst);
            let took = started.elapsed();
            let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
            self.longest_us.fetch_max(us, Ordering::SeqCst);
            let rate = self.rate.load(Ordering::SeqCst);
            if rate > 0 {
                std::thread::sleep((Duration::from_secs(1) / rate).saturating_sub(took));
            }
        }
        Ok(())
    }

    /// Finds where the writers of an earlier run stopped. What they left must show one instant.
    pub fn resume(&self, devices: &mut [Box<dyn BlockDevice>]) -> io::Result<u64> {
        let mut scan = Scan::new();
        let mut page = Page::default();
        for (disk, device) in (0..).zip(devices.iter_mut()) {
            let mut found = Vec::new();
            for slot in 0..device.size() / SLOT {
                device.read(slot, &mut page)?;
                found.push(scan.look(&page, disk, slot));
            }
            scan.found.push(found);
        }
        if scan.layout.is_some_and(|layout| layout != self.layout) {
            return Err(io::Error::other(
                "the disks hold the writes of another layout",
            ));
        }
        let report = scan.judge(devices.len() as u64);
        if let Some(violation) = report.violations.first() {
            return Err(io::Error::other(format!(
                "the disks are not of one instant: {violation}"
            )));
        }
        for (newest, (completed, submitted)) in report
            .newest
            .iter()
            .zip(self.completed.iter().zip(&self.submitted))
        {
            completed.store(*newest, Ordering::SeqCst);
            submitted.store(*newest, Ordering::SeqCst);
        }
        Ok(report.newest.iter().sum())
    }
}

/// Runs all writers of a run in this process; `devices` gives a device of a disk for each writer. A line about once a second.
pub fn run(
    shared: &Shared,
    open: &dyn Fn(u64) -> io::Result<Box<dyn BlockDevice>>,
    limit: Option<Duration>,
    say: &mut dyn FnMut(&str),
) -> io::Result<()> {
    let layout = shared.layout;
    let mut disks = (0..layout.disks)
        .map(open)
        .collect::<io::Result<Vec<_>>>()?;
    let resumed = shared.resume(&mut disks)?;
    let mut devices = (0..layout.writers())
        .map(|writer| open(layout.disk(writer)))
        .collect::<io::Result<Vec<_>>>()?;
    say(&format!(
        "vclock: running after {resumed} writes, {layout:?}"
    ));
    let started = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(&mut devices)
            .map(|(writer, device)| {
                scope.spawn(move || {
                    let result = shared.run_writer(writer, device.as_mut());
                    shared.stop();
                    result
                })
            })
            .collect();
        let mut longest = Duration::ZERO;
        while !shared.stop.load(Ordering::SeqCst)
            && limit.is_none_or(|limit| started.elapsed() < limit)
        {
            std::thread::sleep(Duration::from_secs(1));
            let last = shared.take_longest();
            longest = longest.max(last);
            say(&format!(
                "vclock: t={} writes={} last_max_us={} max_us={}",
                started.elapsed().as_secs(),
                shared.completed().iter().sum::<u64>(),
                last.as_micros(),
                longest.as_micros()
            ));
        }
        shared.stop();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .map_err(|_| io::Error::other("a writer panicked"))?
        })
    })
}
