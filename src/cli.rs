//! The command line: `clap` types and nothing else.

mod ahead;
mod command;
mod freeze;
mod host;
mod instant;
mod load;
mod restore;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
pub use freeze::{FreezeArgs, FreezeMethod};
pub use host::HostArgs;
pub use load::LoadArgs;

use self::ahead::parse_share_or_none;
pub use self::ahead::{AuditArgs, LimitArgs, StatusArgs};
pub use self::instant::{HookArgs, MoreArgs};
pub use self::restore::RestoreArgs;
use crate::exit::{Failure, Kind};
use crate::image::Compression;
use crate::target::{Target, absolute_name};
use crate::units::{parse_duration, parse_rate, parse_share, parse_size};

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

    /// Only warnings and errors.
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
    Init(InitArgs),
    /// List and change the keys of an encrypted repository.
    Key {
        #[command(subcommand)]
        #[allow(missing_docs)]
        command: KeyCommand,
    },
    /// Show a VM's disks, how each can be followed, and what stands in the way; without a target, all domains of the host.
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
        /// With `--until`: re-read this share of the unchanged blocks a day in idle time, and compare; 0 for none.
        #[arg(long, value_name = "PERCENT", default_value = "0.5%", value_parser = parse_share_or_none)]
        audit: f64,
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
        #[command(flatten)]
        #[allow(missing_docs)]
        limits: LimitArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        more: MoreArgs,
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
        #[command(flatten)]
        #[allow(missing_docs)]
        more: MoreArgs,
        /// When the backup is due: HH:MM (its next occurrence), or a date with a time.
        #[arg(long)]
        at: String,
        #[command(flatten)]
        #[allow(missing_docs)]
        limits: LimitArgs,
        /// When it must choose between the guest's ease and the due time, the due time goes first. An explicit `--rate` holds
        /// all the same.
        #[arg(long)]
        hard: bool,
        /// Re-read this share of the unchanged blocks a day in idle time, and compare; 0 for none.
        #[arg(long, value_name = "PERCENT", default_value = "0.5%", value_parser = parse_share_or_none)]
        audit: f64,
    },
    /// Show what the load of a VM and its host is, and which pace it leaves for copying.
    Load {
        #[command(flatten)]
        #[allow(missing_docs)]
        target: TargetArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        load: LoadArgs,
        /// The repository, for the load of its disk.
        #[arg(long, env = "FORERUN_REPO")]
        repo: Option<PathBuf>,
        /// Between two samples.
        #[arg(long, default_value = "1s", value_parser = parse_duration)]
        interval: Duration,
        /// How many samples; without it 10, or on a terminal until it is interrupted.
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
        count: Option<u32>,
    },
    /// Show what is not copied yet and how fast that grows, what is to be expected of the backup, and what was left behind.
    Status(StatusArgs),
    /// Re-read unchanged blocks and compare them with what is stored, to find out whether a bitmap has missed changes.
    ///
    /// Goes on where the last one ended. A disk whose bitmap has missed a change is read in full by the next backup, and the
    /// points that may be wrong are named.
    Audit(AuditArgs),
    /// List the recovery points.
    List {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// Only those of this target.
        #[arg(value_parser = absolute_name)]
        target: Option<String>,
    },
    /// Show a recovery point.
    Show {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
        #[arg(value_parser = absolute_name)]
        point: String,
    },
    /// Show which extents differ between two points.
    Diff {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The one.
        #[arg(value_parser = absolute_name)]
        a: String,
        /// The other.
        #[arg(value_parser = absolute_name)]
        b: String,
    },
    /// Show what points cost: what they refer to, and what would be freed without them.
    Stats {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// Only this target, or this point.
        #[arg(value_parser = absolute_name)]
        of: Option<String>,
    },
    /// Read and re-hash everything that is stored, or what these points need.
    ///
    /// Everything goes pack by pack, those not checked for longest first; where one run ends the next goes on. Blocks that
    /// are bad go into quarantine: the next backup stores them anew if the VM still has them.
    Verify {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// Only these points.
        #[arg(value_parser = absolute_name)]
        points: Vec<String>,
        /// Begin nothing after this time.
        #[arg(long, value_parser = parse_duration)]
        max_duration: Option<Duration>,
        /// Only this share of what is stored: with 10% a week everything is read in ten weeks.
        #[arg(long, value_name = "PERCENT", value_parser = parse_share, conflicts_with = "points")]
        share: Option<f64>,
        /// Only what was not checked for so long.
        #[arg(long, value_name = "DURATION", value_parser = parse_duration, conflicts_with = "points")]
        older_than: Option<Duration>,
        /// Read at most this much a second: 100MiB/s.
        #[arg(long, value_parser = parse_rate)]
        rate: Option<u64>,
    },
    /// Check, fast and without reading blocks, that everything that points need is where it should be.
    Check {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// Only these points.
        #[arg(value_parser = absolute_name)]
        points: Vec<String>,
    },
    /// Write a point's disks to new images.
    Restore(RestoreArgs),
    /// Delete what no point, session or reader sees any more, also where newer points build on it. Backups go on meanwhile.
    Prune(PruneArgs),
    /// Forget points: by a policy, or by name. The space of what only they show comes back with `prune`.
    Forget {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        #[command(flatten)]
        #[allow(missing_docs)]
        forget: ForgetArgs,
    },
    /// Copy points to a second repository; only what that one lacks is read.
    Copy {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
        #[arg(value_name = "POINT", required_unless_present = "all", conflicts_with = "all", value_parser = absolute_name)]
        points: Vec<String>,
        /// All points.
        #[arg(long)]
        all: bool,
        /// Of these targets only. May be repeated.
        #[arg(long, requires = "all", value_parser = absolute_name)]
        target: Vec<String>,
        #[command(flatten)]
        #[allow(missing_docs)]
        to: ToArgs,
        /// Read at most this much a second: 100MiB/s.
        #[arg(long, value_parser = parse_rate)]
        rate: Option<u64>,
    },
    /// Keep a point whatever a policy says.
    Pin {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
        #[arg(value_parser = absolute_name)]
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
        #[arg(value_parser = absolute_name)]
        point: String,
    },
    /// Put right what can be put right.
    Repair {
        #[command(subcommand)]
        #[allow(missing_docs)]
        what: Repair,
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
        /// The target's key or one of its spellings. As qmp:SOCKET, its bitmaps are removed from the VM at once.
        target: Target,
        /// The name of a target without a UUID.
        #[arg(long = "as", value_name = "NAME")]
        name: Option<String>,
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

/// A new repository.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Its directory: missing or empty.
    pub repo: PathBuf,
    /// The unit of storage and tracking, a power of two from 64KiB to 1MiB; for ever.
    #[arg(long, default_value = "64KiB", value_parser = parse_size)]
    pub block_size: u64,
    /// What new blocks are compressed with: lz4, zstd, zstd:LEVEL (-7 to 19) or none.
    #[arg(long, value_name = "CODEC", default_value_t)]
    pub compression: Compression,
    /// Encrypt everything, so that only a passphrase or a key file opens it.
    #[arg(long)]
    pub encrypt: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub secret: SecretArgs,
    /// A word for the key, shown by `key list`.
    #[arg(long, default_value = "", requires = "encrypt")]
    pub label: String,
}

/// The commands on keys.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// List the keys; it takes none.
    List {
        /// The repository.
        #[arg(long, env = "FORERUN_REPO")]
        repo: PathBuf,
    },
    /// Let another passphrase or key file open the repository, too.
    Add(NewKeyArgs),
    /// Replace the key that is given by another passphrase or key file.
    Change(NewKeyArgs),
    /// Take away what a passphrase or key file opens; never the last one.
    Remove {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// The key's id, the beginning of it, or its label.
        key: String,
    },
    /// Write a new key file, which only its owner can read.
    Generate {
        /// The file: it must not exist.
        file: PathBuf,
    },
}

/// The repository, and what shall open it, too.
#[derive(Debug, Args)]
pub struct NewKeyArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub repo: RepoArgs,
    /// The new key file.
    #[arg(long, value_name = "FILE", conflicts_with = "new_passphrase_file")]
    pub new_key_file: Option<PathBuf>,
    /// The new passphrase is the first line of this file; without either it is asked for on a terminal.
    #[arg(long, value_name = "FILE")]
    pub new_passphrase_file: Option<PathBuf>,
    /// A word for the new key.
    #[arg(long)]
    pub label: Option<String>,
}

/// What can be put right.
#[derive(Debug, Subcommand)]
pub enum Repair {
    /// Make the index of the blocks anew from the packs.
    Index(RepoArgs),
    /// Give a repository that was copied as files an id of its own: else its bitmaps and the original's have one owner. The
    /// next backup into it reads disks in full.
    NewId {
        #[command(flatten)]
        #[allow(missing_docs)]
        repo: RepoArgs,
        /// Give up the sessions that were copied with it.
        #[arg(long)]
        drop_sessions: bool,
    },
}

/// Where the repository is.
#[derive(Debug, Clone, Args)]
pub struct RepoArgs {
    /// The repository.
    #[arg(long, env = "FORERUN_REPO")]
    pub repo: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub secret: SecretArgs,
}

/// The second repository.
#[derive(Debug, Args)]
pub struct ToArgs {
    /// The second repository.
    #[arg(long, value_name = "REPO2")]
    pub to: PathBuf,
    /// Its key file, when it is encrypted; without either option its passphrase is asked for on a terminal.
    #[arg(long, value_name = "FILE", conflicts_with = "to_passphrase_file")]
    pub to_key_file: Option<PathBuf>,
    /// The first line of this file is its passphrase.
    #[arg(long, value_name = "FILE")]
    pub to_passphrase_file: Option<PathBuf>,
}

/// What opens an encrypted repository. Without either, the environment is asked, then the terminal.
#[derive(Debug, Clone, Args)]
pub struct SecretArgs {
    /// The key file of an encrypted repository (or `FORERUN_KEY_FILE`).
    #[arg(long, value_name = "FILE", conflicts_with = "passphrase_file")]
    pub key_file: Option<PathBuf>,
    /// Its passphrase is the first line of this file (or `FORERUN_PASSPHRASE_FILE`).
    #[arg(long, value_name = "FILE")]
    pub passphrase_file: Option<PathBuf>,
}

/// Which points to forget, or what to keep of them.
#[derive(Debug, Args)]
pub struct ForgetArgs {
    /// The targets whose points the policy is for: a key or one of its spellings.
    #[arg(conflicts_with_all = ["all_targets", "point"], value_parser = absolute_name)]
    pub targets: Vec<String>,
    /// The policy is for all targets, each by itself.
    #[arg(long, conflicts_with = "point")]
    pub all_targets: bool,
    /// These points, and no policy. A damaged one by its full id.
    #[arg(long, num_args = 1.., value_name = "POINT", value_parser = absolute_name)]
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

/// What to prune.
#[derive(Debug, Args)]
pub struct PruneArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub repo: RepoArgs,
    /// Only say what would go.
    #[arg(long)]
    pub dry_run: bool,
    /// Copy at most this much out of packs that are mostly dead.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_repack: Option<u64>,
}

/// Which VM.
#[derive(Debug, Clone, Args)]
pub struct TargetArgs {
    /// A libvirt domain by its name or UUID (`'web-*'` for several), qmp:SOCKET of a running QEMU without libvirt, or disk:PATH
    /// of an image of a VM that is off. disk:DISK=PATH says which of the VM's disks the image is (`disk:vda=/images/web.qcow2`); with the VM's UUID or name as `--as`, backups go on from those
    /// made while it ran. An image is held for at most 10 s at a time (`--deadline`), so that the VM can start.
    pub target: Option<Target>,
    /// All domains of the host: one after the other, by `run` at the same time.
    #[arg(long, conflicts_with = "target")]
    pub all: bool,
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
    /// Store a disk that QEMU decrypts as plain text; an encrypted repository takes it without.
    #[arg(long)]
    pub allow_plaintext: bool,
}

/// Which VM and which repository.
#[derive(Debug, Clone, Args)]
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
    /// Read at most this much a second, however much room there is: 100MiB/s.
    #[arg(long, value_parser = parse_rate)]
    pub rate: Option<u64>,
    /// Keep at most so many requests in flight.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub in_flight: u8,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub load: LoadArgs,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub host: HostArgs,
    /// What new blocks are compressed with, instead of what `init` said: lz4, zstd, zstd:LEVEL or none.
    #[arg(long, value_name = "CODEC")]
    pub compression: Option<Compression>,
}

/// The formats of restored images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Sparse raw.
    Raw,
    /// qcow2 version 3.
    Qcow2,
}

/// What a missing argument is, in words.
const MISSING: [(&str, &str); 6] = [
    ("--repo", "the repository, or set FORERUN_REPO"),
    ("--to", "the second repository, to copy to"),
    (
        "--output",
        "the directory for all disks, or `--disk DISK=PATH` for one",
    ),
    (
        "<POINT>...",
        "the points to copy, each by the beginning of its id or as TARGET@latest, or `--all`",
    ),
    (
        "<POINT>",
        "the beginning of a point's id, TARGET@latest or TARGET@2026-11-22T02:00",
    ),
    (
        "<TARGET>",
        "a libvirt domain, qmp:SOCKET of a running QEMU, or disk:PATH of an image of a VM that is off",
    ),
];

impl Cli {
    /// Reads the command line; of what is missing it says what it is.
    #[must_use]
    pub fn read() -> Self {
        Self::try_parse().unwrap_or_else(|error| explained(error).exit())
    }
}

fn explained(mut error: clap::Error) -> clap::Error {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    if error.kind() != ErrorKind::MissingRequiredArgument {
        return error;
    }
    if let Some(ContextValue::Strings(missing)) = error.get(ContextKind::InvalidArg) {
        let explain = |argument: &String| {
            let known = MISSING.iter().find(|(name, _)| argument.starts_with(name));
            known.map_or(argument.clone(), |(_, what)| format!("{argument}: {what}"))
        };
        let missing = missing.iter().map(explain).collect();
        error.insert(ContextKind::InvalidArg, ContextValue::Strings(missing));
    }
    error
}

impl TargetArgs {
    /// The one target that was named.
    pub fn named(&self) -> anyhow::Result<&Target> {
        let hint = "name a domain, qmp:SOCKET or disk:PATH; `--all` is for precopy, backup, run, status, inspect, load and audit";
        let nothing = || Failure::hinted(Kind::Usage, "no target is named", hint);
        self.target.as_ref().ok_or_else(nothing)
    }
}
