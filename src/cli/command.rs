//! What is to be known of a command beside its options.

use super::Command;

impl Command {
    /// Whether a signal must not end it at once: a VM is released first, and what is long ends where the next one goes on best, and
    /// lets go of its locks and leases. The others are ended by one at once.
    #[must_use]
    pub fn ends_in_order(&self) -> bool {
        matches!(
            self,
            Self::Track(_)
                | Self::Changed(_)
                | Self::Precopy { .. }
                | Self::Backup { .. }
                | Self::Run { .. }
                | Self::Load { .. }
                | Self::Audit(_)
                | Self::Prune(_)
                | Self::Verify { .. }
                | Self::Check { .. }
                | Self::Copy { .. }
                | Self::Restore { .. }
        )
    }

    /// The command's name, for reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Init(_) => "init",
            Self::Key { .. } => "key",
            Self::Inspect(_) => "inspect",
            Self::Track(_) => "track",
            Self::Changed(_) => "changed",
            Self::Precopy { .. } => "precopy",
            Self::Backup { .. } => "backup",
            Self::Run { .. } => "run",
            Self::Load { .. } => "load",
            Self::Status(_) => "status",
            Self::Audit(_) => "audit",
            Self::List { .. } => "list",
            Self::Show { .. } => "show",
            Self::Diff { .. } => "diff",
            Self::Stats { .. } => "stats",
            Self::Verify { .. } => "verify",
            Self::Check { .. } => "check",
            Self::Restore { .. } => "restore",
            Self::Prune(_) => "prune",
            Self::Copy { .. } => "copy",
            Self::Forget { .. } => "forget",
            Self::Pin { .. } => "pin",
            Self::Unpin { .. } => "unpin",
            Self::Repair { .. } => "repair",
            Self::Untrack(_) => "untrack",
            Self::Recover { .. } => "recover",
            Self::DropSession { .. } => "drop-session",
            Self::Guard { .. } => "guard",
        }
    }
}
