//! What the disks of a VM hold after each of its writes, and after which of them a set of restored disks is.
//!
//! Writes are one series. Every one of them leaves bytes of its own, so that no state comes twice.

use std::fmt::Write as _;
use std::hash::Hasher;

use forerun_rig::block::mix;

/// What disks are written and compared by.
pub(crate) const SECTOR: usize = 512;
/// Sectors of a block that is compared as a whole first, and told of.
const BLOCK: usize = 64 << 10;

/// What a write leaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Zeroes: a write of zeroes, or a discard of whole clusters.
    Zero,
    /// This byte everywhere.
    Byte(u8),
    /// The write's number, each sector's place, and noise.
    Stamp(u64),
}

/// One write.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Write {
    pub(crate) disk: usize,
    pub(crate) sector: usize,
    pub(crate) count: usize,
    pub(crate) fill: Fill,
}

impl Write {
    pub(crate) fn bytes(&self) -> Vec<u8> {
        let length = self.count * SECTOR;
        match self.fill {
            Fill::Zero => vec![0; length],
            Fill::Byte(byte) => vec![byte; length],
            Fill::Stamp(number) => self.stamped(number),
        }
    }

    fn stamped(&self, number: u64) -> Vec<u8> {
        let noise: Vec<u8> = (0..64_u64)
            .flat_map(|word| mix(number ^ word << 40).to_le_bytes())
            .collect();
        let mut bytes = noise.repeat(self.count);
        for (at, sector) in bytes.chunks_exact_mut(SECTOR).enumerate() {
            sector[..8].copy_from_slice(&number.to_le_bytes());
            sector[8..16].copy_from_slice(&((self.sector + at) as u64).to_le_bytes());
        }
        bytes
    }

    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        self.disk == other.disk
            && self.sector < other.sector + other.count
            && other.sector < self.sector + self.count
    }

    fn apply(&self, disks: &mut [Vec<u8>]) {
        let start = self.sector * SECTOR;
        disks[self.disk][start..start + self.count * SECTOR].copy_from_slice(&self.bytes());
    }
}

/// All writes, the disks at a mark among them, and the disks now.
pub(crate) struct History {
    base: Vec<Vec<u8>>,
    pub(crate) now: Vec<Vec<u8>>,
    writes: Vec<Write>,
    /// How many there were at the mark.
    marked: usize,
}

impl History {
    pub(crate) fn new(sizes: &[usize]) -> Self {
        let disks: Vec<Vec<u8>> = sizes.iter().map(|size| vec![0; *size]).collect();
        Self {
            base: disks.clone(),
            now: disks,
            writes: Vec::new(),
            marked: 0,
        }
    }

    pub(crate) fn push(&mut self, write: Write) {
        write.apply(&mut self.now);
        self.writes.push(write);
    }

    /// Writes since the mark.
    pub(crate) fn since(&self) -> usize {
        self.writes.len() - self.marked
    }

    /// All writes there were.
    pub(crate) fn total(&self) -> usize {
        self.writes.len()
    }

    /// From here on.
    pub(crate) fn mark(&mut self) {
        for write in &self.writes[self.marked..] {
            write.apply(&mut self.base);
        }
        self.marked = self.writes.len();
    }

    /// What a disk holds after an end that not every write outlived.
    pub(crate) fn adopt(&mut self, disk: usize, bytes: Vec<u8>) {
        assert_eq!(bytes.len(), self.now[disk].len());
        self.mark();
        self.base[disk].clone_from(&bytes);
        self.now[disk] = bytes;
    }

    /// After how many of the writes since the mark, at least `earliest`, all of these disks are; or what differs from the
    /// state that comes nearest.
    pub(crate) fn cut(&self, found: &[(usize, Vec<u8>)], earliest: usize) -> Result<usize, String> {
        for (disk, bytes) in found {
            if bytes.len() != self.base[*disk].len() {
                return Err(format!("disk {disk} has {} bytes", bytes.len()));
            }
        }
        let mut state = self.base.clone();
        let mut wrong: Vec<Vec<bool>> = state
            .iter()
            .map(|disk| vec![false; disk.len() / SECTOR])
            .collect();
        let mut count = 0;
        for (disk, bytes) in found {
            for at in differing(&state[*disk], bytes) {
                wrong[*disk][at] = true;
                count += 1;
            }
        }
        let mut nearest = (usize::MAX, 0);
        let writes = &self.writes[self.marked..];
        for done in 0..=writes.len() {
            if done > 0 {
                let write = &writes[done - 1];
                write.apply(&mut state);
                let bytes = found.iter().find(|(disk, _)| *disk == write.disk);
                for at in write.sector..write.sector + write.count {
                    let Some((disk, bytes)) = bytes else { break };
                    let is =
                        state[*disk][at * SECTOR..][..SECTOR] != bytes[at * SECTOR..][..SECTOR];
                    let was = std::mem::replace(&mut wrong[*disk][at], is);
                    count = count + usize::from(is) - usize::from(was);
                }
            }
            if done >= earliest {
                if count == 0 {
                    return Ok(done);
                }
                nearest = nearest.min((count, done));
            }
        }
        Err(self.told(found, nearest.1))
    }

    /// What differs from the state after so many writes.
    pub(crate) fn told(&self, found: &[(usize, Vec<u8>)], done: usize) -> String {
        let mut state = self.base.clone();
        self.writes[self.marked..][..done]
            .iter()
            .for_each(|write| write.apply(&mut state));
        let mut text = format!(
            "nearest after write {done} of {} since {}:",
            self.since(),
            self.marked
        );
        for (disk, bytes) in found {
            let sectors = differing(&state[*disk], bytes);
            let mut blocks: Vec<usize> = sectors.iter().map(|at| at * SECTOR / BLOCK).collect();
            blocks.dedup();
            write!(
                text,
                "\n disk {disk}: {} sectors in 64 KiB blocks {blocks:?}",
                sectors.len()
            )
            .unwrap();
            for at in sectors.iter().take(12) {
                let head = |bytes: &[u8]| bytes[at * SECTOR..][..16].to_vec();
                write!(
                    text,
                    "\n  sector {at}: expected {:02x?}, found {:02x?}",
                    head(&state[*disk]),
                    head(bytes)
                )
                .unwrap();
                let touching = self.writes.iter().enumerate().filter(|(_, write)| {
                    write.disk == *disk && (write.sector..write.sector + write.count).contains(at)
                });
                for (number, write) in touching.rev().take(8) {
                    write!(text, "\n   write {}: {write:?}", number + 1).unwrap();
                }
            }
        }
        text
    }
}

/// The sectors that differ.
pub(crate) fn differing(a: &[u8], b: &[u8]) -> Vec<usize> {
    let mut sectors = Vec::new();
    for (block, (a, b)) in a.chunks(BLOCK).zip(b.chunks(BLOCK)).enumerate() {
        if a == b {
            continue;
        }
        let pairs = a.chunks(SECTOR).zip(b.chunks(SECTOR)).enumerate();
        let differ = pairs.filter(|(_, (a, b))| a != b);
        sectors.extend(differ.map(|(at, _)| block * (BLOCK / SECTOR) + at));
    }
    sectors
}

/// What a disk is told from others by, block by block.
pub(crate) fn digests(bytes: &[u8]) -> Vec<u64> {
    let digest = |block: &[u8]| {
        let mut hasher = std::hash::DefaultHasher::new();
        hasher.write(block);
        hasher.finish()
    };
    bytes.chunks(BLOCK).map(digest).collect()
}

#[test]
fn a_cut_is_told_from_what_is_none() {
    let mut history = History::new(&[1 << 20, 1 << 20]);
    let stamp = |number: u64, disk: usize, sector: usize| Write {
        disk,
        sector,
        count: 3,
        fill: Fill::Stamp(number),
    };
    history.push(stamp(1, 0, 7));
    history.mark();
    let mut states = vec![history.now.clone()];
    for number in 2..20_u64 {
        let at = usize::try_from(number).unwrap();
        history.push(stamp(number, at % 2, at * 5 % 16));
        states.push(history.now.clone());
    }
    let pair = |a: usize, b: usize| vec![(0, states[a][0].clone()), (1, states[b][1].clone())];
    for done in 0..states.len() {
        assert_eq!(history.cut(&pair(done, done), 0), Ok(done));
        assert!(history.cut(&pair(done, done), done + 1).is_err());
    }
    // Two disks of two instants, an old sector, a foreign one.
    assert!(history.cut(&pair(3, 8), 0).is_err());
    let mut torn = pair(9, 9);
    torn[1].1[..1 << 16].copy_from_slice(&states[2][1][..1 << 16]);
    assert!(history.cut(&torn, 0).is_err());
    let mut flipped = pair(9, 9);
    flipped[0].1[(1 << 20) - 1] ^= 1;
    let told = history.cut(&flipped, 0).unwrap_err();
    assert!(
        told.contains("nearest after write 9 of 18 since 1"),
        "{told}"
    );
    assert!(
        told.contains("disk 0: 1 sectors in 64 KiB blocks [15]"),
        "{told}"
    );
}
