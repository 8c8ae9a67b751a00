//! The two ioctls of a block device that the standard library has no words for. The only unsafe code of the rig.
#![allow(
    unsafe_code,
    reason = "an ioctl's argument type cannot be checked by the compiler"
)]

use std::fs::File;
use std::io;

use rustix::ioctl::{Opcode, Setter, ioctl, opcode};

const BLKDISCARD: Opcode = opcode::none(0x12, 119);
const BLKZEROOUT: Opcode = opcode::none(0x12, 127);

/// `BLKZEROOUT`: the range reads as zeroes afterwards.
pub(crate) fn zero_out(device: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: the kernel reads two u64 (start, length) behind the pointer, which is what this array is.
    unsafe {
        let request = Setter::<BLKZEROOUT, [u64; 2]>::new([offset, len]);
        Ok(ioctl(device, request)?)
    }
}

/// `BLKDISCARD`: the range's content does not matter any more.
pub(crate) fn discard(device: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: as above.
    unsafe {
        let request = Setter::<BLKDISCARD, [u64; 2]>::new([offset, len]);
        Ok(ioctl(device, request)?)
    }
}
