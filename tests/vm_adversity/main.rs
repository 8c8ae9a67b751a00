//! What may happen to a VM, its host and its images while it is backed up: every event of the list of promises, with the
//! exit code, the report's words and the restored images bit for bit. Needs QEMU; some tests need to be root.
#![allow(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::print_stderr,
    reason = "a test's files need not be durable, and a test may panic and say what it measured"
)]

mod agent;
mod ahead;
mod audit;
mod budget;
mod changes;
mod choice;
mod dropped;
mod foreign;
mod heal;
mod journal;
mod lab;
mod load;
mod offline;
mod overlay;
mod restore;
mod space;
