//! What the host tells: pressure stall information, the CPUs' use, the disks under the images and the repository. All of it
//! from `/proc` and `/sys`; what is not there is not known, which is not zero.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

use super::control::Host;
use super::number::real;
use crate::clock;

/// What was read so recently is what is now: several controllers share it.
const SAME: Duration = Duration::from_millis(50);

/// A block device: `(major, minor)`.
pub type Device = (u32, u32);

/// The host's counters at an instant. They only grow.
#[derive(Debug, Clone)]
pub struct Counters {
    at: Instant,
    /// Microseconds of stalls: I/O, CPU, memory.
    pressure: [Option<u64>; 3],
    /// Ticks of all CPUs: idle, and all.
    ticks: Option<(u64, u64)>,
    /// How many CPUs there are.
    cpus: u64,
    /// This process's CPU time, nanoseconds.
    own: u64,
    /// Busy milliseconds of each device.
    busy: Vec<(Device, u64)>,
}

impl Counters {
    /// Reads them.
    #[must_use]
    pub fn read() -> Self {
        let stall = |name| {
            let text = fs::read_to_string(format!("/proc/pressure/{name}")).ok()?;
            stalled(&text)
        };
        let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
        let own = clock_gettime(ClockId::ProcessCPUTime);
        let disks = fs::read_to_string("/proc/diskstats").unwrap_or_default();
        Self {
            at: clock::now(),
            pressure: [stall("io"), stall("cpu"), stall("memory")],
            ticks: ticks(&stat),
            cpus: stat
                .lines()
                .filter(|line| line.starts_with("cpu") && !line.starts_with("cpu "))
                .count() as u64,
            own: u64::try_from(own.tv_sec).unwrap_or(0) * 1_000_000_000
                + u64::try_from(own.tv_nsec).unwrap_or(0),
            busy: disks.lines().filter_map(busy).collect(),
        }
    }

    /// Those of now, for everybody who asks at about the same time.
    #[must_use]
    pub fn shared() -> Self {
        static LAST: OnceLock<Mutex<Option<Counters>>> = OnceLock::new();
        let last = LAST.get_or_init(Mutex::default);
        let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some(counters) if clock::now() - counters.at < SAME => counters.clone(),
            _ => last.insert(Self::read()).clone(),
        }
    }

    /// When they were read.
    #[must_use]
    pub fn at(&self) -> Instant {
        self.at
    }

    /// What this kernel does not tell.
    #[must_use]
    pub fn unknown(&self) -> Vec<&'static str> {
        let names = ["I/O pressure", "CPU pressure", "memory pressure"];
        let stalls = names.into_iter().zip(&self.pressure);
        let mut unknown: Vec<_> = stalls
            .filter_map(|(name, stall)| stall.is_none().then_some(name))
            .collect();
        if self.ticks.is_none() {
            unknown.push("CPU use");
        }
        unknown
    }

    /// How long after `earlier` they were read.
    #[must_use]
    pub fn span_since(&self, earlier: &Self) -> Duration {
        self.at.saturating_duration_since(earlier.at)
    }

    /// What the host was like between an earlier look and this one.
    #[must_use]
    pub fn since(&self, earlier: &Self, devices: &BTreeSet<Device>) -> Host {
        let span = self.span_since(earlier).as_secs_f64();
        if span <= 0.0 {
            return Host::default();
        }
        let share = |index: usize| {
            let stalled = self.pressure[index]?.checked_sub(earlier.pressure[index]?)?;
            Some((real(stalled) / 1e6 / span).min(1.0))
        };
        let cpu = || {
            let ((idle, all), (idle_then, all_then)) = (self.ticks?, earlier.ticks?);
            let all = all.checked_sub(all_then).filter(|all| *all > 0)?;
            let used = 1.0 - real(idle.checked_sub(idle_then)?) / real(all);
            let own = real(self.own.saturating_sub(earlier.own)) / 1e9 / span;
            Some((used - own / real(self.cpus.max(1))).clamp(0.0, 1.0))
        };
        let disk_use = devices.iter().filter_map(|device| {
            let of = |counters: &Self| {
                let found = counters.busy.iter().find(|(known, _)| known == device)?;
                Some(found.1)
            };
            let busy = of(self)?.checked_sub(of(earlier)?)?;
            Some((real(busy) / 1e3 / span).min(1.0))
        });
        Host {
            io_pressure: share(0),
            cpu_pressure: share(1),
            memory_pressure: share(2),
            cpu: cpu(),
            disk_use: disk_use.max_by(f64::total_cmp),
        }
    }
}

/// The total of the `some` line, microseconds.
fn stalled(text: &str) -> Option<u64> {
    let some = text.lines().find(|line| line.starts_with("some"))?;
    some.split_once("total=")?.1.trim().parse().ok()
}

/// Idle ticks, waiting for I/O included, and all ticks. A guest's time is in the user's already.
fn ticks(stat: &str) -> Option<(u64, u64)> {
    let line = stat.lines().find(|line| line.starts_with("cpu "))?;
    let fields: Vec<u64> = line
        .split_ascii_whitespace()
        .skip(1)
        .take(8)
        .map_while(|field| field.parse().ok())
        .collect();
    let idle = fields.get(3)? + fields.get(4)?;
    Some((idle, fields.iter().sum()))
}

/// A device and its busy milliseconds, from a line of `/proc/diskstats`.
fn busy(line: &str) -> Option<(Device, u64)> {
    let mut fields = line.split_ascii_whitespace();
    let device = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some((device, fields.nth(10)?.parse().ok()?))
}

/// The whole disk under a file, or that a device is (part of); `None` for what is on no block device, such as NFS.
#[must_use]
pub fn device_of(path: &Path) -> Option<Device> {
    let meta = fs::metadata(path).ok()?;
    let number = if meta.file_type().is_block_device() {
        meta.rdev()
    } else {
        meta.dev()
    };
    let device = (rustix::fs::major(number), rustix::fs::minor(number));
    if device.0 == 0 {
        return None;
    }
    Some(whole(device).unwrap_or(device))
}

/// The disk that a partition is part of.
fn whole((major, minor): Device) -> Option<Device> {
    let place = PathBuf::from(format!("/sys/dev/block/{major}:{minor}"));
    if !place.join("partition").exists() {
        return None;
    }
    let place = fs::canonicalize(place).ok()?;
    let text = fs::read_to_string(place.parent()?.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_s_lines_are_read() {
        let pressure = "some avg10=1.5 avg60=0.0 avg300=0.0 total=1042590837\nfull avg10=0.0 avg60=0.0 avg300=0.0 total=7\n";
        assert_eq!(stalled(pressure), Some(1_042_590_837));
        let stat = "cpu  100 0 50 800 20 1 2 3 40 0\ncpu0 1 2 3\n";
        assert_eq!(ticks(stat), Some((820, 976)));
        let line = " 254       0 vda 2188180 62795 75986474 32969526 5427606 551753 996854120 13519778 0 1551780 47200794 1178372";
        assert_eq!(busy(line), Some(((254, 0), 1_551_780)));
        assert_eq!(stalled(""), None);
        assert_eq!(ticks("cpu  1 2"), None);
        assert_eq!(busy("7 0 loop0"), None);
    }

    #[test]
    fn what_is_missing_is_not_known_and_what_is_there_is_a_share() {
        let earlier = Counters {
            at: clock::now(),
            pressure: [Some(1_000_000), None, None],
            ticks: Some((100, 1000)),
            cpus: 2,
            own: 0,
            busy: vec![((8, 0), 100), ((8, 16), 0)],
        };
        let later = Counters {
            at: earlier.at + Duration::from_secs(1),
            pressure: [Some(1_250_000), Some(5), None],
            ticks: Some((150, 1200)),
            own: 500_000_000,
            busy: vec![((8, 0), 600), ((8, 16), 900)],
            ..earlier.clone()
        };
        let host = later.since(&earlier, &BTreeSet::from([(8, 0), (9, 0)]));
        let near = |found: Option<f64>, value: f64| (found.unwrap() - value).abs() < 1e-9;
        assert!(near(host.io_pressure, 0.25), "{host:?}");
        assert_eq!((host.cpu_pressure, host.memory_pressure), (None, None));
        // Three quarters are used, a quarter of all by this process.
        assert!(near(host.cpu, 0.5), "{host:?}");
        assert!(near(host.disk_use, 0.5), "{host:?}");
        let none = later.since(&earlier, &BTreeSet::new());
        assert_eq!(none.disk_use, None);
    }

    #[test]
    fn a_file_is_on_a_disk_that_the_kernel_lists() {
        if let Some(device) = device_of(Path::new(env!("CARGO_MANIFEST_DIR"))) {
            let busy = Counters::read().busy;
            assert!(busy.iter().any(|(known, _)| *known == device), "{device:?}");
        }
        assert_eq!(device_of(Path::new("/proc/stat")), None);
    }
}
