//! `forerun` backs up running KVM/QEMU virtual machines so that almost nothing is left to do when the backup is due.
//!
//! Between backups QEMU's dirty bitmaps say what the guest changes, and it is copied live, ahead of schedule. When the
//! backup is due, one QMP transaction takes a block snapshot of all disks at one instant; the little that is left is read
//! from it, and the guest is let go. `docs/architecture.md` has the pictures; here is the map, in reading order.
//!
//! ```text
//! the program       main -> commands -> report          cli: what can be asked; exit: how it may end
//! the main job      backup: pass -> freeze -> commit    session: the next point while it is incomplete
//! its tools         copy: hash, compare, compress       throttle, progress, schedule
//! beside others     budget: passes, freezes and one rate for all runs of a host
//! what next         plan: order, prediction, when a pass pays
//! a VM in hand      target -> vm, offline -> hoststate  guard, settle: what if we die; hooks
//! what changed      bitmap: names, trust, rotation, proofs
//! QEMU              qmp: monitor, graph, exports, freeze, agent, release
//! domains           libvirt: found, described, and their monitors
//! the data plane    nbd: an NBD client
//! the repository    image: packs, index, maps, points, sessions
//! the way back      restore                              replicate: to a second repository
//! the ground        units, clock, fault, spawn, unix_path
//! ```
//!
//! What must hold, and what most of the code is about:
//!
//! - a write of the guest is in the snapshot or in a bitmap that the next point needs ([`bitmap`], [`qmp::freeze`]);
//! - what is in a VM is in a journal from before it was made until after it is gone ([`hoststate`], [`qmp::release`]);
//! - while the guest is held nothing waits for the repository ([`backup`]);
//! - what an object refers to is durable before the object is ([`image`]);
//! - no byte is restored that does not hash to what its point says ([`restore`]).
//!
//! Imports point one way: `image` and `nbd` know nothing of VMs, `qmp` nothing of repositories, `bitmap` nothing of either's
//! data. `tests/tidy.rs` holds the arrows.

// The store of the crash tests is written against the library from outside, and serves tests inside too.
#[cfg(test)]
extern crate self as forerun;

pub mod backup;
pub mod bitmap;
pub mod budget;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod copy;
pub mod exit;
pub mod fault;
pub mod guard;
pub mod hooks;
pub mod hoststate;
pub mod image;
#[cfg(feature = "libvirt")]
pub mod libvirt;
#[cfg(not(feature = "libvirt"))]
#[path = "libvirt/absent.rs"]
pub mod libvirt;
pub mod load;
pub mod nbd;
mod offline;
mod owner;
pub mod plan;
pub mod progress;
mod prompt;
pub mod qmp;
pub mod replicate;
pub mod report;
pub mod restore;
pub mod schedule;
pub mod session;
pub mod settle;
mod spawn;
pub mod target;
pub mod throttle;
pub mod units;
pub mod unix_path;
pub mod vm;
