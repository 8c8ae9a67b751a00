//! The chunks of one read, put together: each byte of the request must arrive exactly once.
//!
//! ```text
//! request    |--------------------------------|      offset .. offset + length
//! data            |=====|
//! hole                  |.........|
//! covered         [---------------]                  sorted ranges, neighbours merged
//! refused      |====|       an overlap     |====|    a chunk out of range; what is missing at the end
//! ```
//!
//! Pure: it says where the bytes go, the reader moves them. Offsets inside are relative to the request.
//! Source: the NBD protocol document, "Structured reply types" (the rules for `NBD_CMD_READ`).
#![deny(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing
)]

use std::ops::Range;

use super::{error::Error, wire::Failure};
use crate::units::Extent;

/// Pieces out of order that are remembered before a server is called broken.
const MAX_FRAGMENTS: usize = 1024;
/// Holes that are remembered for the consumer; more are only zeroed.
const MAX_HOLES: usize = 1024;
/// Error chunks of one request.
const MAX_FAILURES: usize = 64;

/// One read in flight.
#[derive(Debug)]
pub(super) struct Reassembly {
    extent: Extent,
    covered: Vec<Range<u64>>,
    holes: Vec<Range<u64>>,
    hole_bytes: u64,
    failure: Option<Failure>,
    failures: usize,
}

/// A read whose last chunk has come.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// All bytes are in place; the holes, absolute and merged, were zeroed.
    Data { holes: Vec<Extent> },
    /// All of it is one hole, nothing was written to the buffer.
    Zeros,
    /// The server could not read it.
    Failed(Failure),
}

impl Reassembly {
    pub(super) fn new(extent: Extent) -> Self {
        Self {
            extent,
            covered: Vec::new(),
            holes: Vec::new(),
            hole_bytes: 0,
            failure: None,
            failures: 0,
        }
    }

    /// Where the `length` bytes of a data chunk for `offset` go.
    pub(super) fn data(&mut self, offset: u64, length: u32) -> Result<Range<usize>, Error> {
        let range = self.cover(offset, length)?;
        in_memory(&range)
    }

    /// Which bytes a hole chunk zeroes; none, when it is the whole request.
    pub(super) fn hole(&mut self, offset: u64, length: u32) -> Result<Range<usize>, Error> {
        let range = self.cover(offset, length)?;
        self.hole_bytes = self.hole_bytes.saturating_add(u64::from(length));
        let room = self.holes.len() < MAX_HOLES;
        match self.holes.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ if room => self.holes.push(range.clone()),
            _ => {}
        }
        if u64::from(length) == self.extent.length {
            return Ok(0..0);
        }
        in_memory(&range)
    }

    /// An error chunk; `offset` is where in the export, when it says.
    pub(super) fn failed(&mut self, failure: Failure, offset: Option<u64>) -> Result<(), Error> {
        if let Some(offset) = offset
            && self.relative(offset, 1).is_none()
        {
            return Err(self.outside(offset, 1));
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures > MAX_FAILURES {
            return Err(Error::Protocol(format!(
                "more than {MAX_FAILURES} errors for one request"
            )));
        }
        self.failure.get_or_insert(failure);
        Ok(())
    }

    /// After the chunk that says it is the last.
    pub(super) fn finish(self) -> Result<Outcome, Error> {
        if let Some(failure) = self.failure {
            return Ok(Outcome::Failed(failure));
        }
        let all = 0..self.extent.length;
        if !matches!(self.covered.as_slice(), [range] if *range == all) {
            return Err(Error::Protocol(format!(
                "a read of {} bytes at offset {:#x} was answered in part",
                self.extent.length, self.extent.offset
            )));
        }
        if self.hole_bytes == self.extent.length {
            return Ok(Outcome::Zeros);
        }
        let base = self.extent.offset;
        let holes = self.holes.into_iter().map(|hole| Extent {
            offset: base.saturating_add(hole.start),
            length: hole.end.saturating_sub(hole.start),
        });
        Ok(Outcome::Data {
            holes: holes.collect(),
        })
    }

    fn relative(&self, offset: u64, length: u32) -> Option<Range<u64>> {
        let start = offset.checked_sub(self.extent.offset)?;
        let end = start.checked_add(u64::from(length))?;
        (end <= self.extent.length && length > 0).then_some(start..end)
    }

    fn outside(&self, offset: u64, length: u32) -> Error {
        Error::Protocol(format!(
            "a chunk of {length} bytes at offset {offset:#x} for a read of {} bytes at offset {:#x}",
            self.extent.length, self.extent.offset
        ))
    }

    fn cover(&mut self, offset: u64, length: u32) -> Result<Range<u64>, Error> {
        let range = self
            .relative(offset, length)
            .ok_or_else(|| self.outside(offset, length))?;
        // The first range that does not end before this one: its neighbour to the left, or what is behind.
        let at = self.covered.partition_point(|had| had.end < range.start);
        let mut joined = range.clone();
        let mut taken = 0usize;
        for had in self.covered.iter().skip(at).take(2) {
            if had.start < range.end && range.start < had.end {
                return Err(Error::Protocol(format!(
                    "a chunk of {length} bytes at offset {offset:#x} came twice"
                )));
            }
            if had.start <= range.end {
                joined = joined.start.min(had.start)..joined.end.max(had.end);
                taken = taken.saturating_add(1);
            }
        }
        self.covered
            .splice(at..at.saturating_add(taken), [joined])
            .for_each(drop);
        if self.covered.len() > MAX_FRAGMENTS {
            return Err(Error::Protocol(format!(
                "more than {MAX_FRAGMENTS} scattered chunks for one request"
            )));
        }
        Ok(range)
    }
}

fn in_memory(range: &Range<u64>) -> Result<Range<usize>, Error> {
    let index = |at: u64| {
        usize::try_from(at).map_err(|_| Error::protocol("a chunk does not fit in memory"))
    };
    Ok(index(range.start)?..index(range.end)?)
}

#[cfg(test)]
#[path = "reassembly_tests.rs"]
mod tests;
