//! The options of `restore`.

use std::path::PathBuf;

use clap::Args;

use super::{Format, RepoArgs};
use crate::target::absolute_name;

/// What to restore, and to where.
#[expect(clippy::struct_excessive_bools, reason = "switches of a command line")]
#[derive(Debug, Args)]
pub struct RestoreArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub repo: RepoArgs,
    /// The beginning of an id, TARGET@latest or TARGET@2026-11-22T02:00.
    #[arg(value_parser = absolute_name)]
    pub point: String,
    /// All disks, as files in this directory, and beside them what else of the VM is held.
    #[arg(long, required_unless_present = "disk")]
    pub output: Option<PathBuf>,
    /// One disk to this file or device: `vda=/path`. May be repeated.
    #[arg(long)]
    pub disk: Vec<String>,
    /// The image format. By default, qcow2 for a `--disk` whose file is a qcow2 image or is called `.qcow2`, else raw; with
    /// `--define` the one that the disk had.
    #[arg(long, value_enum)]
    pub format: Option<Format>,
    /// Overwrite what is there.
    #[arg(long)]
    pub force: bool,
    /// Only the disks.
    #[arg(long)]
    pub disk_only: bool,
    /// Define the libvirt domain, with the restored disks and a UUID and MAC addresses of its own.
    #[arg(long, requires = "output", conflicts_with = "disk_only")]
    pub define: bool,
    /// The domain's new name.
    #[arg(long, requires = "define")]
    pub name: Option<String>,
    /// Define the domain with the UUID and the MAC addresses that it had: for the VM itself, not for a second one.
    #[arg(long, requires = "define")]
    pub same_identity: bool,
    /// The hypervisor to define the domain at; by default as virsh has it.
    #[arg(long, value_name = "URI", requires = "define")]
    pub connect: Option<String>,
}
