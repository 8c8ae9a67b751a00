//! What goes into the controller, and what comes out.

use std::time::Duration;

use serde::Serialize;

use super::baseline::{Cpus, Requests};

/// What was seen in an interval, all of it of the same kind: copying or pausing.
#[derive(Debug, Clone, Copy)]
pub struct Sample {
    /// How long it was.
    pub span: Duration,
    /// What we did in it.
    pub doing: Doing,
    /// Bytes that we read.
    pub copied: u64,
    /// The share of it in which we waited for the repository.
    pub stalled: f64,
    /// The guest's requests. Seldom looked at, so with an interval of its own.
    pub guest: Guest,
    /// The guest's CPUs.
    pub cpus: Option<Cpus>,
    /// The host.
    pub host: Host,
}

/// What we did in an interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Doing {
    /// Read.
    Copying,
    /// Nothing.
    Pausing,
    /// Neither for certain: it counts for nothing.
    Between,
}

/// What is known of the guest's requests.
#[derive(Debug, Clone, Copy)]
pub enum Guest {
    /// There is no guest: the VM is off.
    Off,
    /// It cannot be told.
    Unknown,
    /// Nothing new.
    NotNow,
    /// These, in an interval that ends now.
    Seen {
        /// Its requests.
        requests: Requests,
        /// How long the interval was.
        span: Duration,
        /// What we did in it.
        doing: Doing,
    },
}

/// The host in an interval: shares of its time. `None` is not known.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Host {
    /// Somebody waited for I/O.
    pub io_pressure: Option<f64>,
    /// Somebody waited for a CPU.
    pub cpu_pressure: Option<f64>,
    /// Somebody waited for memory.
    pub memory_pressure: Option<f64>,
    /// The CPUs' use by others than this process.
    pub cpu: Option<f64>,
    /// The busiest disk of the images and the repository.
    pub disk_use: Option<f64>,
}

/// The time, as the controller sees it.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    /// Since some beginning.
    pub at: Duration,
    /// Minute of the local day.
    pub minute: u16,
}

/// Why the pace is not full speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cause {
    /// The guest waits longer for its disks.
    Latency,
    /// It has done so for too much of the last minute.
    Delay,
    /// The guest waits longer for its CPUs.
    Vcpu,
    /// Others on the host wait for I/O.
    IoPressure,
    /// Somebody waits for memory.
    MemoryPressure,
    /// Others use the host's CPUs.
    Cpu,
    /// Others use the disks.
    DiskUse,
    /// The operator's hours.
    BusyHours,
    /// The operator's rate.
    Rate,
    /// There is time.
    Schedule,
    /// A pause to see what is without us.
    Measuring,
    /// It is coming back to full speed.
    Rising,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decision {
    /// Bytes a second; `None` for as fast as it goes, 0 for a stop.
    pub rate: Option<u64>,
    /// Requests in flight.
    pub in_flight: usize,
    /// Why it is not full speed.
    pub cause: Option<Cause>,
    /// What was seen, divided by what is allowed, where that is the cause.
    pub score: f64,
}

impl Decision {
    /// Whether nothing is to be read.
    #[must_use]
    pub fn stops(&self) -> bool {
        self.rate == Some(0)
    }
}
