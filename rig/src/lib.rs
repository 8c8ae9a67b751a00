//! The test rig of `forerun`: guests under QEMU, programs that stamp their disks, and checkers that prove what an image is.
//!
//! It shares no code with `forerun`, so that what it says about a backup is an independent opinion.
//!
//! ```text
//! block    pages and devices            stamp    ordered writes; "the state after write N"
//! nbd      a small client               vclock   concurrent writes; "one instant"
//! qmp      a raw monitor client         guest    a VM with an initramfs    exports  a QEMU without a guest
//! bench    a domain to measure, its console and its load's log on sockets and files of their own
//! freeze   how exact the orders of a freeze are, our own or the product's                    demo     the demo's guest
//! ```
//!
//! Without the feature `host` only what runs inside a guest is built (`rig-guest`).

#[cfg(feature = "host")]
pub mod bench;
pub mod block;
#[cfg(feature = "host")]
pub mod demo;
#[cfg(feature = "host")]
pub mod exports;
#[cfg(feature = "host")]
pub mod freeze;
#[cfg(feature = "host")]
pub mod guest;
mod ioctl;
#[cfg(feature = "host")]
pub mod nbd;
#[cfg(feature = "host")]
pub mod qmp;
pub mod stamp;
pub mod vclock;

#[cfg(test)]
mod testing;
