//! What all runs of a host may do together, as options.

use clap::Args;

use crate::budget::Limits;
use crate::units::parse_rate;

/// What all runs on this host may do together, in whichever processes. Of what each is told the strictest counts for all.
#[derive(Debug, Clone, Args)]
pub struct HostArgs {
    /// All runs on this host together read at most this much a second, residuals and audits included.
    #[arg(long, value_name = "RATE", env = "FORERUN_HOST_RATE", value_parser = parse_rate)]
    pub host_rate: Option<u64>,
    /// So many of them copy at a time; the others wait for their turn.
    #[arg(
        long, value_name = "N", env = "FORERUN_HOST_PASSES", default_value_t = Limits::default().passes,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub host_passes: u32,
    /// So many of them freeze at a time; those of `--together` count as one.
    #[arg(
        long, value_name = "N", default_value_t = Limits::default().freezes,
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub host_freezes: u32,
}

impl HostArgs {
    /// As limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            rate: self.host_rate,
            passes: self.host_passes,
            freezes: self.host_freezes,
        }
    }
}
