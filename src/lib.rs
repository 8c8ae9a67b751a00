//! `forerun` backs up running KVM/QEMU virtual machines so that almost nothing is left to do when the backup is due.

pub mod bitmap;
pub mod clock;
pub mod fault;
pub mod image;
pub mod nbd;
pub mod qmp;
pub mod units;
