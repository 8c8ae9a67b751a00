//! What is asked of the instant of a backup beyond its freeze: hooks, and several targets together.

use std::time::Duration;

use clap::Args;

use crate::hooks::Hooks;
use crate::target::Target;
use crate::units::parse_duration;

/// What is run on the host around the instant, each by `/bin/sh -c`.
///
/// They see `FORERUN_HOOK`, `FORERUN_TARGET`, `FORERUN_KEY` (the target's), `FORERUN_REPO` and `FORERUN_QUIESCE`.
#[derive(Debug, Clone, Args)]
pub struct HookArgs {
    /// Run before the guest's file systems are frozen; when it fails, no point is made (exit 7).
    #[arg(long, value_name = "COMMAND")]
    pub pre_freeze: Option<String>,
    /// Run after they are thawed, however the freeze ended, and perhaps twice when forerun was killed in between.
    #[arg(long, value_name = "COMMAND")]
    pub post_thaw: Option<String>,
    /// Run when the backup of a target has ended, well or not: `FORERUN_STATUS`, `FORERUN_EXIT`, `FORERUN_POINT` and
    /// `FORERUN_CONSISTENCY` say how.
    #[arg(long, value_name = "COMMAND")]
    pub post_backup: Option<String>,
    /// How long each hook may take; then its process group is killed.
    #[arg(long, default_value = "60s", value_parser = parse_duration)]
    pub hook_timeout: Duration,
}

impl HookArgs {
    /// The hooks of a run that are told these things.
    #[must_use]
    pub fn hooks(&self, told: Vec<(String, String)>) -> Hooks {
        Hooks {
            pre_freeze: self.pre_freeze.clone(),
            post_thaw: self.post_thaw.clone(),
            post_backup: self.post_backup.clone(),
            timeout: self.hook_timeout,
            told,
        }
    }
}

/// Several targets in one command.
#[derive(Debug, Clone, Args)]
pub struct MoreArgs {
    /// More targets, patterns of domains among them.
    #[arg(value_name = "TARGET", conflicts_with = "all")]
    pub more: Vec<Target>,
    /// Make the points of all targets at one instant: all guests are frozen before the first snapshot is taken, and thawed
    /// after the last. A target that fails or is late is left out.
    #[arg(long)]
    pub together: bool,
}
