//! How to freeze, as options.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::HookArgs;
use crate::backup::Quiesce;
use crate::units::{parse_duration, parse_size};

/// How to freeze.
#[derive(Debug, Args)]
pub struct FreezeArgs {
    /// The block snapshot: a fleecing job into a scratch, or an overlay that is committed back. Without it `fleece`, but not
    /// where the guest would feel the errors of its disk or of a full scratch.
    #[arg(long = "freeze", value_enum)]
    pub method: Option<FreezeMethod>,
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
    /// How long the overlay of `--freeze snapshot` may take to be committed back.
    #[arg(long, default_value = "10m", value_parser = parse_duration)]
    pub commit_deadline: Duration,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub hooks: HookArgs,
}

/// The methods of freezing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FreezeMethod {
    /// Image fleecing.
    Fleece,
    /// External snapshot.
    Snapshot,
}
