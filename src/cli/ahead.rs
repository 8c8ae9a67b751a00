//! What can be asked of copying ahead: limits of a backup, what to expect of it, the audit.

use std::time::Duration;

use clap::Args;

use super::{PaceArgs, RepoTargetArgs};
use crate::plan::Limits;
use crate::plan::outlook::OnMiss;
use crate::units::{parse_duration, parse_share, parse_size};

/// What a backup may cost.
#[derive(Debug, Clone, Args)]
pub struct LimitArgs {
    /// How long the backup may take, from due until the guest is free of it.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub max_window: Option<Duration>,
    /// How much the freeze may find to copy.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_residual: Option<u64>,
    /// What to do when these limits cannot be held; it ends with 4 in both cases.
    #[arg(long, value_enum, default_value_t = OnMiss::Backup)]
    pub on_miss: OnMiss,
}

impl LimitArgs {
    /// As limits.
    #[must_use]
    pub fn limits(&self) -> Limits {
        Limits {
            window: self.max_window,
            residual: self.max_residual,
            on_miss: self.on_miss,
        }
    }
}

/// What `status` is asked.
#[derive(Debug, Args)]
pub struct StatusArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub target: RepoTargetArgs,
    /// When the backup is due: HH:MM, or a date with a time. By default what a live `run` was told, else now.
    #[arg(long)]
    pub at: Option<String>,
    /// Ends with 4 when the window would be longer.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub max_window: Option<Duration>,
    /// Ends with 4 when the residual would be larger.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_residual: Option<u64>,
}

/// What `audit` is asked.
#[derive(Debug, Args)]
pub struct AuditArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub target: RepoTargetArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub pace: PaceArgs,
    /// Only this share of every disk; by default all of it.
    #[arg(long, value_name = "PERCENT", value_parser = parse_share)]
    pub share: Option<f64>,
    /// Begin nothing after this time.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub max_duration: Option<Duration>,
}

/// A share, or 0 for nothing.
pub(super) fn parse_share_or_none(text: &str) -> Result<f64, String> {
    match text.trim() {
        "0" | "0%" => Ok(0.0),
        share => parse_share(share),
    }
}
