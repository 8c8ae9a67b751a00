//! The command line: `clap` types and nothing else.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::backup::Quiesce;
use crate::target::Target;
use crate::units::{parse_duration, parse_rate, parse_size};

/// Backs up running KVM/QEMU virtual machines ahead of schedule.
///
/// Between backups it follows the blocks that the guest changes and copies them while the host has room; when the backup
/// is due it takes a snapshot of all disks at one instant, copies the little that is left, and lets go.
#[derive(Debug, Parser)]
#[command(name = "forerun", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,

    /// One JSON document on stdout, also on failure.
    #[arg(long, global = true)]
    pub json: bool,

    /// Only errors.
    #[arg(short, long, global = true)]
    pub quiet: bool,

    /// More words; twice: the monitor's conversation.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make a new repository.
    Init {
        /// Its directory: missing or empty.
        repo: PathBuf,
        /// The unit of storage and tracking, a power of two from 64KiB to 1MiB; for ever.
        #[arg(long, default_value = "64KiB", value_parser = parse_size)]
        block_size: u64,
    },
    /// Show a VM's disks, how each can be followed, and what stands in the way.
    Inspect(TargetArgs),
    /// Start following a VM's changes (`precopy` and `backup` do it too).
    Track(RepoTargetArgs),
    /// Show the changed extents since the last point.
    Changed(RepoTargetArgs),
    /// Copy changes ahead, live, without a snapshot.
    Precopy {
        #[command(flatten)]
        #[allow(missing_docs)]
        target: RepoTargetArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        pace: PaceArgs,
        /// One pass only.
        #[arg(long, conflicts_with_all = ["until", "converge"])]
        once: bool,
        /// Go on until this time: HH:MM, or a date with a time.
        #[arg(long)]
        until: Option<String>,
        /// Go on until no more than this is left.
        #[arg(long, value_parser = parse_size)]
        converge: Option<u64>,
    },
    /// Make a recovery point now.
    Backup {
        #[command(flatten)]
        #[allow(missing_docs)]
        target: RepoTargetArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        pace: PaceArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        freeze: FreezeArgs,
    },
    /// Copy ahead until a time, then make a recovery point.
    Run {
        #[command(flatten)]
        #[allow(missing_docs)]
        target: RepoTargetArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        pace: PaceArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        freeze: FreezeArgs,
        /// When the backup is due: HH:MM (its next occurrence), or a date with a time.
        #[arg(long)]
        at: String,
    },
    /// Show what is not copied yet, the session, and what was left behind.
    Status(RepoTargetArgs),
    /// List the recovery points.
    List {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// Only those of this target.
        target: Option<String>,
    },
    /// Show a recovery point.
    Show {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
        point: String,
    },
    /// Show which extents differ between two points.
    Diff {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The one.
        a: String,
        /// The other.
        b: String,
    },
    /// Read and re-hash everything that points need.
    Verify {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// Only these points.
        points: Vec<String>,
        /// Stop after this time.
        #[arg(long, value_parser = parse_duration)]
        max_duration: Option<Duration>,
    },
    /// Write a point's disks to new images.
    Restore {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
        point: String,
        /// All disks, as files in this directory.
        #[arg(long, required_unless_present = "disk", conflicts_with = "disk")]
        output: Option<PathBuf>,
        /// One disk to this file or device: `vda=/path`. May be repeated.
        #[arg(long)]
        disk: Vec<String>,
        /// The image format.
        #[arg(long, value_enum, default_value_t = Format::Raw)]
        format: Format,
        /// Overwrite what is there.
        #[arg(long)]
        force: bool,
    },
    /// Forget points: by a policy, or by name. Their space comes back with `prune`.
    Forget {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        forget: ForgetArgs,
    },
    /// Keep a point whatever a policy says.
    Pin {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
        point: String,
        /// Why; `list` and `show` tell it.
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
    },
    /// Leave a point to the policy again.
    Unpin {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
        point: String,
    },
    /// Remove this repository's bitmaps from a VM.
    Untrack(RepoTargetArgs),
    /// Take back whatever a dead run left in a VM.
    Recover {
        #[command(flatten)]
        #[allow(missing_docs)]
        target: TargetArgs,
        /// Also what no journal lists, of this repository's runs.
        #[arg(long, env = "FORERUN_REPO")]
        repo: Option<PathBuf>,
    },
    /// Give up a target's unfinished session; its published points stay.
    DropSession {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The target's key or one of its spellings.
        target: String,
    },
    /// The process that frees a guest for a dead run.
    #[command(hide = true)]
    Guard {
        /// What the run has in the VM.
        #[arg(long)]
        journal: PathBuf,
        /// After so long the run counts as hung.
        #[arg(long)]
        deadline_ms: u64,
        /// The run's process id.
        #[arg(long)]
        main: i32,
        /// The hypervisor of the domain that it holds.
        #[arg(long, requires = "domain")]
        connect: Option<String>,
        /// That domain.
        #[arg(long)]
        domain: Option<String>,
    },
}

/// Where the repository is.
#[derive(Debug, Args)]
pub struct RepoArgs {
    /// The repository.
    #[arg(long, env = "FORERUN_REPO")]
    pub repo: PathBuf,
}

/// Which points to forget, or what to keep of them.
#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// The targets whose points the policy is for: a key or one of its spellings.
    #[arg(conflicts_with_all = ["all_targets", "point"])]
    pub targets: Vec<String>,
    /// The policy is for all targets, each by itself.
    #[arg(long, conflicts_with = "point")]
    pub all_targets: bool,
    /// These points, and no policy. A damaged one by its full id.
    #[arg(long, num_args = 1.., value_name = "POINT")]
    pub point: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub keep: KeepArgs,
    /// Whose days, weeks, months and years count: `UTC`, `Europe/Berlin`; by default the host's.
    #[arg(long, value_name = "ZONE", conflicts_with = "point")]
    pub tz: Option<String>,
    /// Also the last good point of a target; a policy never takes it.
    #[arg(long, conflicts_with = "keep")]
    pub allow_last: bool,
    /// Only say what would be done.
    #[arg(long)]
    pub dry_run: bool,
}

/// How many points to keep of a target: all that any of these keeps.
#[derive(Debug, Args)]
#[group(id = "keep", multiple = true, conflicts_with = "point")]
pub struct KeepArgs {
    /// The newest ones.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_last: Option<u32>,
    /// The newest one of each of the last N hours that have one.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_hourly: Option<u32>,
    /// Of days.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_daily: Option<u32>,
    /// Of weeks, Monday to Sunday.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_weekly: Option<u32>,
    /// Of months.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_monthly: Option<u32>,
    /// Of years.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub keep_yearly: Option<u32>,
    /// All that are no more than this older than the target's newest: 36h, 14d, 8w.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    pub keep_within: Option<Duration>,
}

/// Which VM.
#[derive(Debug, Args)]
pub struct TargetArgs {
    /// A libvirt domain by its name or UUID, qmp:SOCKET of a running QEMU without libvirt, or disk:PATH of an image of a VM that is off. disk:DISK=PATH says which of the VM's
    /// disks the image is (`disk:vda=/images/web.qcow2`); with the VM's UUID or name as `--as`, backups go on from those
    /// made while it ran. An image is held for at most 10 s at a time (`--deadline`), so that the VM can start.
    pub target: Target,
    /// The hypervisor of domains; by default as virsh has it (`LIBVIRT_DEFAULT_URI`, then `qemu:///system` for root). It must
    /// be on this host.
    #[arg(long, value_name = "URI")]
    pub connect: Option<String>,
    /// The name of a target without a UUID, the same wherever it runs; of an image, the UUID of its VM will do, too.
    #[arg(long = "as", value_name = "NAME")]
    pub name: Option<String>,
    /// Only these disks.
    #[arg(long, value_name = "DISK")]
    pub include: Vec<String>,
    /// Not these disks.
    #[arg(long, value_name = "DISK")]
    pub exclude: Vec<String>,
    /// Store a disk that QEMU decrypts as plain text.
    #[arg(long)]
    pub allow_plaintext: bool,
}

/// Which VM and which repository.
#[derive(Debug, Args)]
pub struct RepoTargetArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub target: TargetArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub repo: RepoArgs,
}

/// How fast to copy live.
#[derive(Debug, Args)]
pub struct PaceArgs {
    /// Read at most this much a second: 100MiB/s.
    #[arg(long, value_parser = parse_rate)]
    pub rate: Option<u64>,
    /// Keep at most so many requests in flight.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub in_flight: u8,
}

/// How to freeze.
#[derive(Debug, Args)]
pub struct FreezeArgs {
    /// The block snapshot: a fleecing job into a scratch, or an overlay that is committed back.
    #[arg(long = "freeze", value_enum, default_value_t = FreezeMethod::Fleece)]
    pub method: FreezeMethod,
    /// Freeze the guest's file systems around the instant.
    #[arg(long, value_enum, default_value_t = Quiesce::Auto)]
    pub quiesce: Quiesce,
    /// How long the guest's file systems may take to freeze.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub freeze_timeout: Duration,
    /// The guest agent's socket; a domain's is known.
    #[arg(long, value_name = "SOCKET")]
    pub agent: Option<PathBuf>,
    /// Where scratches, overlays and the spool go; by default in the host state directory.
    #[arg(long, value_name = "DIR")]
    pub scratch: Option<PathBuf>,
    /// What each disk's scratch may take, instead of the computed limit.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub scratch_reserve: Option<u64>,
    /// How long the snapshot may be held.
    #[arg(long, default_value = "10s", value_parser = parse_duration)]
    pub deadline: Duration,
}

/// The methods of freezing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FreezeMethod {
    /// Image fleecing.
    Fleece,
    /// External snapshot.
    Snapshot,
}

/// The formats of restored images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Sparse raw.
    Raw,
    /// qcow2 version 3.
    Qcow2,
}

impl Command {
    /// Whether a signal must not end it before the VM is released; the others are ended by one at once.
    #[must_use]
    pub fn holds_a_vm(&self) -> bool {
        matches!(
            self,
            Self::Track(_)
                | Self::Changed(_)
                | Self::Precopy { .. }
                | Self::Backup { .. }
                | Self::Run { .. }
        )
    }

    /// The command's name, for reports.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Init { .. } => "init",
            Self::Inspect(_) => "inspect",
            Self::Track(_) => "track",
            Self::Changed(_) => "changed",
            Self::Precopy { .. } => "precopy",
            Self::Backup { .. } => "backup",
            Self::Run { .. } => "run",
            Self::Status(_) => "status",
            Self::List { .. } => "list",
            Self::Show { .. } => "show",
            Self::Diff { .. } => "diff",
            Self::Verify { .. } => "verify",
            Self::Restore { .. } => "restore",
            Self::Forget { .. } => "forget",
            Self::Pin { .. } => "pin",
            Self::Unpin { .. } => "unpin",
            Self::Untrack(_) => "untrack",
            Self::Recover { .. } => "recover",
            Self::DropSession { .. } => "drop-session",
            Self::Guard { .. } => "guard",
        }
    }
}
