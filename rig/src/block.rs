//! 4 KiB blocks as the stamp programs write them, and the devices that they write them to.
//!
//! Units: a *slot* is a 4 KiB block by number, an *offset* is in bytes. A [`Page`] is aligned to its size, as `O_DIRECT`
//! wants it. Words are little endian u64; the last word of a written page is a checksum of all others.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags};

/// Bytes of a slot.
pub const SLOT: u64 = 4096;
/// Slots of 64 KiB, the granularity that bitmaps are usually kept at.
pub const SLOTS_PER_BLOCK: u64 = 16;
/// Words of a page.
pub const WORDS: usize = 512;

/// One aligned page.
#[derive(Clone)]
#[repr(C, align(4096))]
pub struct Page(
    /// Its bytes.
    pub [u8; 4096],
);

impl Default for Page {
    fn default() -> Self {
        Self([0; 4096])
    }
}

impl Page {
    /// The word at an index.
    pub fn word(&self, index: usize) -> u64 {
        word(&self.0, index)
    }

    /// Sets the word at an index.
    pub fn set_word(&mut self, index: usize, value: u64) {
        self.0[index * 8..index * 8 + 8].copy_from_slice(&value.to_le_bytes());
    }

    /// Fills the words from `from` on with noise that no compression shrinks, and sets the checksum.
    pub fn seal(&mut self, from: usize, noise: u64) {
        let mut state = noise | 1;
        for index in from..WORDS - 1 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            self.set_word(index, state);
        }
        let sum = checksum(&self.0);
        self.set_word(WORDS - 1, sum);
    }
}

/// The word at an index of a page's bytes.
pub fn word(bytes: &[u8], index: usize) -> u64 {
    let mut raw = [0; 8];
    raw.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
    u64::from_le_bytes(raw)
}

/// Whether the page's checksum holds.
pub fn is_sealed(bytes: &[u8]) -> bool {
    word(bytes, WORDS - 1) == checksum(bytes)
}

/// Whether the bytes are all zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    bytes.chunks_exact(8).all(|chunk| chunk == [0; 8])
}

/// Four independent multiplicative lanes over all words but the last.
fn checksum(bytes: &[u8]) -> u64 {
    const MULTIPLIER: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut lanes = [1_u64, 2, 3, 4];
    for index in 0..WORDS - 1 {
        let lane = &mut lanes[index & 3];
        *lane = (*lane ^ word(bytes, index))
            .wrapping_mul(MULTIPLIER)
            .rotate_left(29);
    }
    lanes.iter().fold(0, |sum, lane| mix(sum ^ lane))
}

/// A 64-bit finalizer: every bit of the result depends on every bit of the input.
pub fn mix(mut x: u64) -> u64 {
    x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Something that pages are written to, one request at a time.
pub trait BlockDevice: Send {
    /// Its size in bytes.
    fn size(&self) -> u64;
    /// Reads the page of a slot.
    fn read(&mut self, slot: u64, page: &mut Page) -> io::Result<()>;
    /// Writes the page of a slot; when it returns the write is complete, not necessarily durable.
    fn write(&mut self, slot: u64, page: &Page) -> io::Result<()>;
    /// Writes zeroes over a range of slots.
    fn zero(&mut self, slot: u64, count: u64) -> io::Result<()>;
    /// Discards a range of slots: what is read from them afterwards is the old content or zeroes.
    fn discard(&mut self, slot: u64, count: u64) -> io::Result<()>;
    /// Makes everything durable.
    fn flush(&mut self) -> io::Result<()>;
}

/// A block device or file, opened `O_DIRECT`.
#[derive(Debug)]
pub struct DirectDevice {
    file: File,
    size: u64,
    is_block_device: bool,
}

impl DirectDevice {
    /// Opens it for reading and writing.
    pub fn open(path: &Path) -> io::Result<Self> {
        use std::io::Seek;
        use std::os::unix::fs::FileTypeExt;
        let flags = OFlags::RDWR | OFlags::DIRECT | OFlags::CLOEXEC;
        let mut file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
        let size = file.seek(io::SeekFrom::End(0))?;
        let is_block_device = file.metadata()?.file_type().is_block_device();
        Ok(Self {
            file,
            size,
            is_block_device,
        })
    }
}

impl BlockDevice for DirectDevice {
    fn size(&self) -> u64 {
        self.size
    }

    fn read(&mut self, slot: u64, page: &mut Page) -> io::Result<()> {
        self.file.read_exact_at(&mut page.0, slot * SLOT)
    }

    fn write(&mut self, slot: u64, page: &Page) -> io::Result<()> {
        self.file.write_all_at(&page.0, slot * SLOT)
    }

    fn zero(&mut self, slot: u64, count: u64) -> io::Result<()> {
        if self.is_block_device {
            return crate::ioctl::zero_out(&self.file, slot * SLOT, count * SLOT);
        }
        (slot..slot + count).try_for_each(|slot| self.write(slot, &Page::default()))
    }

    fn discard(&mut self, slot: u64, count: u64) -> io::Result<()> {
        if self.is_block_device {
            return crate::ioctl::discard(&self.file, slot * SLOT, count * SLOT);
        }
        self.zero(slot, count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// What the checkers read: a whole image, by slot.
pub trait Image {
    /// How many whole slots it has.
    fn slots(&self) -> u64;
    /// Reads one slot into `page`.
    fn slot(&self, slot: u64, page: &mut Page) -> io::Result<()>;
}

impl Image for Vec<u8> {
    fn slots(&self) -> u64 {
        self.len() as u64 / SLOT
    }

    fn slot(&self, slot: u64, page: &mut Page) -> io::Result<()> {
        let start = usize::try_from(slot * SLOT).map_err(io::Error::other)?;
        page.0.copy_from_slice(&self[start..start + 4096]);
        Ok(())
    }
}

/// A raw image file.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
}

impl RawFile {
    /// Opens it for reading. A qcow2 image is refused: convert it first.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let mut magic = [0; 4];
        if size >= 4 {
            file.read_exact_at(&mut magic, 0)?;
        }
        if &magic == b"QFI\xfb" {
            let message = format!("{} is a qcow2 image, not a raw one", path.display());
            return Err(io::Error::other(message));
        }
        Ok(Self { file, size })
    }
}

impl Image for RawFile {
    fn slots(&self) -> u64 {
        self.size / SLOT
    }

    fn slot(&self, slot: u64, page: &mut Page) -> io::Result<()> {
        self.file.read_exact_at(&mut page.0, slot * SLOT)
    }
}
