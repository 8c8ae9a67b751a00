//! `forerun` backs up running KVM/QEMU virtual machines so that almost nothing is left to do when the backup is due.

pub mod backup;
pub mod bitmap;
pub mod cli;
pub mod clock;
pub mod commands;
pub mod copy;
pub mod exit;
pub mod fault;
pub mod guard;
pub mod hoststate;
pub mod image;
pub mod nbd;
mod offline;
pub mod progress;
pub mod qmp;
pub mod report;
pub mod restore;
pub mod schedule;
pub mod session;
pub mod settle;
pub mod target;
pub mod throttle;
pub mod units;
pub mod vm;
