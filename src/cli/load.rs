//! What copying may do to guests and host, as options.

use clap::Args;

use super::PaceArgs;
use crate::load::config::{BusyHours, Config, Urgency};
use crate::units::parse_share;

/// What copying live may do to the guest and the host.
#[derive(Debug, Args)]
pub struct LoadArgs {
    /// How much longer the guest may wait for its disks and its CPUs because of us.
    #[arg(long, value_name = "PERCENT", default_value = "10%", value_parser = parse_share)]
    pub max_latency_increase: f64,
    /// In which share of the time others may wait for I/O; 100% is no limit, here and below.
    #[arg(long, value_name = "PERCENT", default_value = "20%", value_parser = parse_share)]
    pub max_io_pressure: f64,
    /// In which share of the time somebody may wait for memory.
    #[arg(long, value_name = "PERCENT", default_value = "10%", value_parser = parse_share)]
    pub max_memory_pressure: f64,
    /// How much of the host's CPUs others, guests included, may use; beyond it only a trickle is copied.
    #[arg(long, value_name = "PERCENT", default_value = "80%", value_parser = parse_share)]
    pub max_cpu: f64,
    /// In which share of the time others may keep the disks busy; beyond it only a trickle is copied.
    #[arg(long, value_name = "PERCENT", default_value = "90%", value_parser = parse_share)]
    pub max_disk: f64,
    /// A rate for some hours of every day, local time: 08:00-18:00=20MiB/s. May cross midnight and be repeated; 0 is a pause.
    #[arg(long, value_name = "FROM-TO=RATE")]
    pub busy_hours: Vec<BusyHours>,
    /// Do not look at the load: copy at `--rate`, or as fast as it goes.
    #[arg(
        long,
        env = "FORERUN_NO_LOAD_CONTROL",
        action = clap::ArgAction::SetTrue,
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub no_load_control: bool,
}

impl LoadArgs {
    /// As the controller takes it.
    #[must_use]
    pub fn config(&self, pace: Option<&PaceArgs>) -> Config {
        let default = Config::default();
        Config {
            control: !self.no_load_control,
            rate: pace.and_then(|pace| pace.rate),
            in_flight: pace.map_or(default.in_flight, |pace| usize::from(pace.in_flight)),
            latency_increase: self.max_latency_increase / 100.0,
            io_pressure: self.max_io_pressure / 100.0,
            memory_pressure: self.max_memory_pressure / 100.0,
            cpu: self.max_cpu / 100.0,
            disk_use: self.max_disk / 100.0,
            busy_hours: self.busy_hours.clone(),
            urgency: Urgency::Usual,
            needed: None,
        }
    }
}
