//! libvirt domains through their life: whatever libvirt or the operator does with a domain between or during passes, every
//! point is exactly the state after one write of the guest, and only what could not be followed is read in full.
//!
//! A selection runs in the gate; `FORERUN_LIFE_ALL=1` runs every row.
#![cfg(all(feature = "libvirt", feature = "fault-injection"))]
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test fails by it, and needs no durable writes"
)]
#![expect(clippy::print_stdout, reason = "a line a row for who reads the log")]

#[path = "../domain_common/mod.rs"]
mod domain_common;
mod ends;
mod life;
mod migration;
mod operator;
mod snapshots;
#[path = "../vm_common/mod.rs"]
mod vm_common;
