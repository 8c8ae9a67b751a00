//! How the bytes of a block are made shorter, and back.
//!
//! The contexts and buffers of the codecs belong to the threads that use them: nothing large is allocated for a block.
#![cfg_attr(
    not(test),
    deny(
        clippy::arithmetic_side_effects,
        clippy::as_conversions,
        clippy::indexing_slicing
    )
)]

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use lz4_flex::block::{compress_into, decompress_into, get_maximum_output_size};
use serde::{Deserialize, Serialize};
use zstd::bulk::{Compressor, Decompressor};

/// How the bytes of a block are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// As they are.
    Raw,
    /// LZ4 block format.
    Lz4,
    /// A Zstandard frame.
    Zstd,
}

impl Codec {
    pub(super) fn to_byte(self) -> u8 {
        match self {
            Self::Raw => 0,
            Self::Lz4 => 1,
            Self::Zstd => 2,
        }
    }

    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Raw),
            1 => Some(Self::Lz4),
            2 => Some(Self::Zstd),
            _ => None,
        }
    }

    /// Puts what `stored` holds into `plain`, which has exactly its length: more is an error before it is written.
    pub(super) fn decompress(self, stored: &[u8], plain: &mut [u8]) -> Result<(), &'static str> {
        let failed = "it does not decompress";
        let length = match self {
            Self::Raw if stored.len() == plain.len() => {
                plain.copy_from_slice(stored);
                stored.len()
            }
            Self::Raw => return Err("its stored length is wrong"),
            Self::Lz4 => decompress_into(stored, plain).map_err(|_| failed)?,
            Self::Zstd => ZSTD_IN
                .with_borrow_mut(|context| {
                    let context = match context {
                        Some(context) => context,
                        none => none.insert(Decompressor::new()?),
                    };
                    context.decompress_to_buffer(stored, plain)
                })
                .map_err(|_| failed)?,
        };
        if length == plain.len() {
            Ok(())
        } else {
            Err("it decompresses to another length")
        }
    }
}

/// What new blocks are compressed with. Every repository reads all of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Compression {
    /// Stored as they are.
    None,
    /// LZ4: faster than any disk.
    #[default]
    Lz4,
    /// Zstandard at this level.
    Zstd(ZstdLevel),
}

/// A level from -7 (fastest) to 19 (smallest).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZstdLevel(i8);

impl Default for ZstdLevel {
    fn default() -> Self {
        Self(3)
    }
}

thread_local! {
    static LZ4_OUT: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    static ZSTD_OUT: RefCell<Option<ZstdOut>> = const { RefCell::new(None) };
    static ZSTD_IN: RefCell<Option<Decompressor<'static>>> = const { RefCell::new(None) };
}

struct ZstdOut {
    context: Compressor<'static>,
    level: ZstdLevel,
    buffer: Vec<u8>,
}

impl Compression {
    /// Hands `take` the shorter form of a block, or the block as it is when there is none.
    pub(super) fn compress<T>(self, plain: &[u8], take: impl FnOnce(Codec, &[u8]) -> T) -> T {
        match self {
            Self::None => take(Codec::Raw, plain),
            Self::Lz4 => LZ4_OUT.with_borrow_mut(|buffer| {
                buffer.resize(get_maximum_output_size(plain.len()), 0);
                let length = compress_into(plain, buffer).ok();
                let packed = length.and_then(|length| buffer.get(..length));
                take_shorter(Codec::Lz4, packed, plain, take)
            }),
            Self::Zstd(level) => ZSTD_OUT.with_borrow_mut(|out| {
                let packed = zstd_out(out, level).and_then(|out| out.compress(plain));
                take_shorter(Codec::Zstd, packed, plain, take)
            }),
        }
    }
}

/// The thread's context, set to the level.
fn zstd_out(out: &mut Option<ZstdOut>, level: ZstdLevel) -> Option<&mut ZstdOut> {
    let out = match out {
        Some(out) => out,
        none => none.insert(ZstdOut {
            context: Compressor::new(level.0.into()).ok()?,
            level,
            buffer: Vec::new(),
        }),
    };
    if out.level != level {
        out.context.set_compression_level(level.0.into()).ok()?;
        out.level = level;
    }
    Some(out)
}

impl ZstdOut {
    fn compress(&mut self, plain: &[u8]) -> Option<&[u8]> {
        // What is not shorter is of no use: there is no need for the room it would take.
        self.buffer.resize(plain.len(), 0);
        let length = self
            .context
            .compress_to_buffer(plain, self.buffer.as_mut_slice())
            .ok()?;
        self.buffer.get(..length)
    }
}

fn take_shorter<T>(
    codec: Codec,
    packed: Option<&[u8]>,
    plain: &[u8],
    take: impl FnOnce(Codec, &[u8]) -> T,
) -> T {
    match packed {
        Some(packed) if packed.len() < plain.len() => take(codec, packed),
        _ => take(Codec::Raw, plain),
    }
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown =
            || format!("`{text}` is no compression: say lz4, zstd, zstd:LEVEL (-7 to 19) or none");
        match text.split_once(':') {
            None => match text {
                "none" => Ok(Self::None),
                "lz4" => Ok(Self::Lz4),
                "zstd" => Ok(Self::Zstd(ZstdLevel::default())),
                _ => Err(unknown()),
            },
            Some(("zstd", level)) => match level.parse() {
                Ok(level @ (-7..=-1 | 1..=19)) => Ok(Self::Zstd(ZstdLevel(level))),
                _ => Err(unknown()),
            },
            Some(_) => Err(unknown()),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{}", level.0),
        }
    }
}

impl TryFrom<String> for Compression {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Compression> for String {
    fn from(compression: Compression) -> Self {
        compression.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all() -> impl Iterator<Item = Compression> {
        ["none", "lz4", "zstd:-7", "zstd", "zstd:1", "zstd:19"]
            .into_iter()
            .map(|text| text.parse().unwrap())
    }

    #[test]
    fn what_is_compressed_comes_back_whatever_the_thread_did_before() {
        let text: Vec<u8> = b"the same words again, "
            .iter()
            .copied()
            .cycle()
            .take(9_000)
            .collect();
        let random = super::super::ids::random::<300>().unwrap();
        for compression in all().chain(all()) {
            for plain in [&text[..], &random[..], &text[..1], &text[..70]] {
                let (codec, stored) =
                    compression.compress(plain, |codec, stored| (codec, stored.to_vec()));
                assert!(stored.len() < plain.len() || codec == Codec::Raw);
                assert_eq!(Codec::from_byte(codec.to_byte()), Some(codec));
                let mut back = vec![0; plain.len()];
                codec.decompress(&stored, &mut back).unwrap();
                assert_eq!(back, plain);
                // A bomb, and less than was promised.
                let mut short = vec![0; plain.len() - 1];
                assert!(codec.decompress(&stored, &mut short).is_err());
                let mut long = vec![0; plain.len() + 1];
                assert!(codec.decompress(&stored, &mut long).is_err());
            }
            let shorter = compression.compress(&text, |_, stored| stored.len()) < text.len();
            assert_eq!(shorter, compression != Compression::None, "{compression}");
        }
    }

    #[test]
    fn a_compression_is_read_as_it_is_written() {
        for compression in all() {
            assert_eq!(compression.to_string().parse(), Ok(compression));
        }
        assert_eq!("zstd".parse(), Ok(Compression::Zstd(ZstdLevel(3))));
        for bad in [
            "", "lz5", "zstd:", "zstd:0", "zstd:20", "zstd:-8", "lz4:1", "zstd:300",
        ] {
            assert!(bad.parse::<Compression>().is_err(), "{bad}");
        }
    }
}
