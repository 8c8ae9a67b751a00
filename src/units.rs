//! Byte ranges, the block size and the arithmetic between bytes and blocks, and sizes as people write them.
//!
//! Offsets and lengths are bytes in `u64`; a block number is `offset / block size`. The last block of a disk may be
//! shorter than a block:
//!
//! ```text
//! disk      |0......|64K....|128K...|..|          size = 200 KiB
//! block      0       1       2       3            blocks(size) = 4, length_of(3) = 8 KiB
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

/// A range of bytes of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Extent {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl Extent {
    /// The first byte after it.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + self.length
    }
}

/// A run of blocks, by number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockRun {
    /// First block.
    pub first: u64,
    /// Number of blocks.
    pub count: u64,
}

impl BlockRun {
    /// The first block after it.
    #[must_use]
    pub fn end(self) -> u64 {
        self.first + self.count
    }
}

/// The unit of storage and the granularity of the bitmaps: a power of two from 64 KiB to 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct BlockSize(u32);

impl BlockSize {
    /// 64 KiB.
    pub const DEFAULT: Self = Self(64 << 10);
    /// The largest block a repository may have.
    pub const MAX: u32 = 1 << 20;

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        u64::from(self.0)
    }

    /// In bytes, for the sizes of buffers.
    #[must_use]
    pub fn as_usize(self) -> usize {
        self.0 as usize
    }

    /// How many blocks a disk of `size` bytes has, its last one perhaps short.
    #[must_use]
    pub fn blocks(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }

    /// The bytes of block `block` on a disk of `size` bytes.
    #[must_use]
    pub fn extent(self, block: u64, size: u64) -> Extent {
        let offset = block * self.bytes();
        Extent {
            offset,
            length: self.bytes().min(size.saturating_sub(offset)),
        }
    }

    /// The bytes of a run of blocks on a disk of `size` bytes.
    #[must_use]
    pub fn run_extent(self, run: BlockRun, size: u64) -> Extent {
        let offset = run.first * self.bytes();
        Extent {
            offset,
            length: (run.count * self.bytes()).min(size.saturating_sub(offset)),
        }
    }

    /// Every block that an extent touches.
    #[must_use]
    pub fn cover(self, extent: Extent) -> BlockRun {
        let first = extent.offset / self.bytes();
        if extent.length == 0 {
            return BlockRun { first, count: 0 };
        }
        BlockRun {
            first,
            count: extent.end().div_ceil(self.bytes()) - first,
        }
    }
}

impl TryFrom<u32> for BlockSize {
    type Error = String;

    fn try_from(bytes: u32) -> Result<Self, String> {
        if bytes.is_power_of_two() && (Self::DEFAULT.0..=Self::MAX).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(format!(
                "block size {bytes} is not a power of two from 65536 to 1048576"
            ))
        }
    }
}

impl From<BlockSize> for u32 {
    fn from(size: BlockSize) -> Self {
        size.0
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Bytes(self.bytes()))
    }
}

/// A number of bytes as people read it: `1.5 GiB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    #[expect(clippy::cast_precision_loss, reason = "one decimal is shown")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
        if self.0 < 1024 {
            return write!(f, "{} B", self.0);
        }
        let mut value = self.0 as f64 / 1024.0;
        let mut unit = 0;
        while value >= 1024.0 && unit + 1 < UNITS.len() {
            value /= 1024.0;
            unit += 1;
        }
        if value.fract() == 0.0 {
            write!(f, "{value:.0} {}", UNITS[unit])
        } else {
            write!(f, "{value:.1} {}", UNITS[unit])
        }
    }
}

/// Reads a size as people write it: `65536`, `64KiB`, `64K`, `1.5GiB`; units are powers of 1024.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit() && c != '.')
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kib" => 10,
        "m" | "mib" => 20,
        "g" | "gib" => 30,
        "t" | "tib" => 40,
        _ => {
            return Err(format!(
                "`{text}` is not a size: use bytes or KiB, MiB, GiB, TiB"
            ));
        }
    };
    let bad = || format!("`{text}` is not a size such as 64KiB or 1.5GiB");
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(1 << shift).ok_or_else(bad);
    }
    let (whole, fraction) = number.split_once('.').ok_or_else(bad)?;
    if fraction.is_empty() || fraction.len() > 9 {
        return Err(bad());
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().map_err(|_| bad())?
    };
    let digits: u64 = fraction.parse().map_err(|_| bad())?;
    let scale = 10u64.pow(u32::try_from(fraction.len()).map_err(|_| bad())?);
    let part = u128::from(digits) * (1u128 << shift) / u128::from(scale);
    whole
        .checked_mul(1 << shift)
        .and_then(|bytes| bytes.checked_add(u64::try_from(part).ok()?))
        .ok_or_else(bad)
}

/// Reads a rate as people write it: a size with a unit, with or without `/s`.
pub fn parse_rate(text: &str) -> Result<u64, String> {
    let size = text.trim().trim_end_matches("/s");
    // Mebibytes to one who writes 100.
    if size != "0" && size.ends_with(|last: char| last.is_ascii_digit()) {
        return Err(format!(
            "`{text}` of what? say {size}MiB/s, {size}KiB/s or {size}B/s"
        ));
    }
    match parse_size(size)? {
        0 => Err("with a rate of 0 nothing would ever be read".to_owned()),
        rate => Ok(rate),
    }
}

/// Reads a share in percent: `10%`, `2.5`.
pub fn parse_share(text: &str) -> Result<f64, String> {
    let number = text.trim().trim_end_matches('%').trim().parse();
    let share = number.ok().filter(|share| *share > 0.0 && *share <= 100.0);
    share.ok_or_else(|| format!("`{text}` is not a share such as 10% or 2.5%"))
}

/// Reads a duration as people write it: `30s`, `5m`, `2h`, `1d`, `2w`, `250ms`.
pub fn parse_duration(text: &str) -> Result<std::time::Duration, String> {
    let text = text.trim();
    let split = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let bad = || format!("`{text}` is not a duration such as 250ms, 30s, 5m, 2h, 14d or 8w");
    let number: u64 = number.parse().map_err(|_| bad())?;
    let millis = match unit.trim() {
        // Seconds to one who writes 30, days to one who writes 14.
        "" => {
            return Err(format!(
                "`{text}` of what? say {number}d for days, {number}h for hours, {number}m for minutes or {number}s for seconds"
            ));
        }
        "ms" => 1,
        "s" => 1000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        "w" => 604_800_000,
        _ => return Err(bad()),
    };
    number
        .checked_mul(millis)
        .map(std::time::Duration::from_millis)
        .ok_or_else(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_read_as_written_and_shown_as_read() {
        for (text, bytes) in [
            ("0", 0),
            ("65536", 65536),
            ("64KiB", 65536),
            ("1.5GiB", 3 << 29),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for text in ["", "x", "1X", "1.", "-1", "99999999999999T", "1.1.1"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        assert_eq!(parse_share("10%"), Ok(10.0));
        assert_eq!(parse_share("0.5"), Ok(0.5));
        for text in ["0%", "101%", "-1", "nan", "%", ""] {
            assert!(parse_share(text).is_err(), "{text}");
        }
        assert_eq!(Bytes(3 << 29).to_string(), "1.5 GiB");
        assert_eq!(parse_rate("100MiB/s"), Ok(100 << 20));
        assert!(parse_rate("0").is_err() && parse_rate("0.0MiB/s").is_err());
        assert_eq!(parse_rate("8388608B/s"), Ok(8 << 20));
        for text in ["100", "100/s", "1.5"] {
            assert!(parse_rate(text).unwrap_err().contains("MiB/s"), "{text}");
        }
    }

    #[test]
    fn a_duration_has_a_unit() {
        for (text, seconds) in [("30s", 30), ("5m", 300), ("12h", 43200), ("1d", 86400)] {
            let duration = std::time::Duration::from_secs(seconds);
            assert_eq!(parse_duration(text), Ok(duration));
        }
        let refused = parse_duration("1").unwrap_err();
        assert!(refused.contains("say 1d for days, 1h"), "{refused}");
        for text in ["", "d", "1y", "-1d", "99999999999999999d"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_last_block_may_be_short() {
        let size = BlockSize::DEFAULT;
        assert_eq!(size.blocks(200 << 10), 4);
        assert_eq!(
            size.extent(3, 200 << 10),
            Extent {
                offset: 192 << 10,
                length: 8 << 10
            }
        );
        assert_eq!(
            size.cover(Extent {
                offset: 65535,
                length: 2
            }),
            BlockRun { first: 0, count: 2 }
        );
        assert_eq!(
            size.cover(Extent {
                offset: 65536,
                length: 0
            })
            .count,
            0
        );
    }
}
