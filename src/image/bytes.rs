//! Reading and writing the little-endian fields of the binary objects. Reading never goes past the end: every step gives
//! `None` when the bytes are used up, and lengths are compared with what is there before anything is allocated.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

/// A position in bytes that came from outside.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self { rest: bytes }
    }

    /// The next `length` bytes.
    pub(super) fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(length)?;
        self.rest = rest;
        Some(taken)
    }

    /// The next bytes as an array.
    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    pub(super) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_le_bytes)
    }

    pub(super) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    pub(super) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// A `u32` that counts bytes or items in memory.
    pub(super) fn length(&mut self) -> Option<usize> {
        self.u32().and_then(|length| usize::try_from(length).ok())
    }

    /// How many bytes are left.
    pub(super) fn left(&self) -> usize {
        self.rest.len()
    }

    /// `Some` when every byte was used: what is left over is damage too.
    pub(super) fn end(self) -> Option<()> {
        self.rest.is_empty().then_some(())
    }
}

/// A length in memory as the `u64` of the format; `usize` has at most 64 bits on every platform Rust knows.
pub(super) fn wide(length: usize) -> u64 {
    u64::try_from(length).unwrap_or(u64::MAX)
}

/// A length of the format as one in memory; what does not fit cannot be allocated either.
pub(super) fn narrow(length: u64) -> usize {
    usize::try_from(length).unwrap_or(usize::MAX)
}

/// Whether all bytes are zero. Comparing the bytes with themselves one further on runs at the speed of `memcmp`, and stops
/// at the first difference.
pub(super) fn all_zero(bytes: &[u8]) -> bool {
    match bytes.split_first() {
        None => true,
        Some((first, rest)) => {
            *first == 0
                && bytes
                    .get(..rest.len())
                    .is_some_and(|shifted| shifted == rest)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_never_goes_past_the_end() {
        let mut cursor = Cursor::new(&[1, 0, 0, 0, 9]);
        assert_eq!(cursor.u32(), Some(1));
        assert_eq!(cursor.u64(), None);
        assert!(cursor.end().is_none());
        assert_eq!(cursor.take(1), Some(&[9][..]));
        assert!(cursor.end().is_some());
    }

    #[test]
    fn one_set_bit_anywhere_is_not_zero() {
        for length in [0_usize, 1, 2, 17, 512] {
            let mut bytes = vec![0; length];
            assert!(all_zero(&bytes));
            for position in 0..length {
                bytes[position] = 1;
                assert!(!all_zero(&bytes), "{position} of {length}");
                bytes[position] = 0;
            }
        }
    }
}
