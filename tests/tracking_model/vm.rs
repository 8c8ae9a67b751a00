//! A VM as the tracking sees it: disks whose blocks hold version numbers, and bitmaps with QEMU's semantics.
//!
//! A write begins, lands and completes at three moments; a bitmap that records then is marked when it completes. Blocks are
//! bits of a `u64`, so a disk has at most 60 of them.

use forerun::bitmap::track::Seen;
use forerun::qmp::graph::Bitmap as Listed;
use serde_json::json;

/// Bytes of a block and of a bit.
pub(crate) const BLOCK: u32 = 64 << 10;
/// The most blocks that a disk is ever resized to.
const MOST: usize = 60;
/// Versions from here on are what a torn block reads as: never the same twice.
const TORN: u32 = 1 << 30;

#[derive(Debug, Clone)]
#[expect(clippy::struct_excessive_bools, reason = "so has QEMU")]
pub(crate) struct Bitmap {
    pub(crate) name: String,
    pub(crate) recording: bool,
    pub(crate) inconsistent: bool,
    pub(crate) persistent: bool,
    /// It is in the image, not only in this QEMU's memory.
    stored: bool,
    pub(crate) bits: u64,
    /// An operator has disabled or enabled it.
    by_hand: bool,
}

#[derive(Debug, Clone)]
pub(crate) struct Image {
    /// What a look at the file would tell it by.
    file: u64,
    pub(crate) persistent: bool,
    pub(crate) content: Vec<u32>,
    pub(crate) bitmaps: Vec<Bitmap>,
    /// Sizes it ever had: shrinking and growing back leaves no trace, a known limit.
    sizes: Vec<usize>,
    /// An operator has removed a bitmap.
    removed: bool,
}

#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) key: String,
    pub(crate) image: usize,
    pub(crate) plugged: bool,
    /// When something last happened to it after which a rescan is no surprise.
    pub(crate) disturbed: u64,
}

/// A write in flight.
#[derive(Debug)]
struct Write {
    image: usize,
    first: usize,
    count: usize,
    value: u32,
    landed: bool,
}

#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) images: Vec<Image>,
    pub(crate) slots: Vec<Slot>,
    pub(crate) process: u64,
    writes: Vec<Write>,
    /// Copies of older states, by image.
    copies: Vec<Option<Image>>,
    /// The worst case: no look at a file tells it from another.
    blind: bool,
    /// The block snapshot's jobs run.
    pub(crate) snapshot: bool,
    pub(crate) time: u64,
    versions: u32,
    files: u64,
    /// Images were exchanged or disks were away: bitmaps of ours may be where we cannot look.
    pub(crate) moved: bool,
}

/// What the guest or an operator does.
#[derive(Debug, Clone)]
pub(crate) enum Act {
    /// A whole write.
    Write(Range, Value),
    /// A write that stays in flight, and whether its data is there at once.
    Begin(Range, Value, bool),
    /// The data of a write in flight gets there.
    Land(u8),
    /// A write in flight completes.
    Complete(u8),
    /// QEMU dies.
    Kill,
    /// The VM is shut down and started.
    Restart,
    Resize(u8, u8),
    /// Two disks are put in each other's place, of a VM that runs or is off.
    Swap(u8, u8),
    /// A copy is kept: of the image when off, or, running, as a host's crash would leave it.
    Copy(u8, bool),
    /// An image is replaced by the copy, bitmaps and all.
    Rollback(u8),
    /// The second becomes a copy of the first.
    Clone(u8, u8),
    /// A disk is unplugged or plugged.
    Plug(u8),
    HandRemove(u8, u8),
    HandDisable(u8, u8),
    HandEnable(u8, u8),
    HandAdd(u8),
    /// The block snapshot is ended by somebody else.
    EndSnapshot,
}

/// Blocks of a disk.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Range {
    pub(crate) disk: u8,
    pub(crate) first: u8,
    pub(crate) count: u8,
}

/// What is written.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Value {
    New,
    Zero,
    /// What is there already.
    Same,
    /// One of a few values that come again and again.
    Old(u8),
}

impl Vm {
    pub(crate) fn new(disks: &[(u8, bool)], blind: bool) -> Self {
        let mut images = Vec::new();
        let mut slots = Vec::new();
        for (number, (blocks, persistent)) in disks.iter().enumerate() {
            let blocks = usize::from(*blocks);
            images.push(Image {
                file: number as u64,
                persistent: *persistent,
                content: (0..blocks).map(|block| (block % 3) as u32).collect(),
                bitmaps: Vec::new(),
                sizes: vec![blocks],
                removed: false,
            });
            slots.push(Slot {
                key: format!("vd{}", char::from(b'a' + number as u8)),
                image: number,
                plugged: true,
                disturbed: 0,
            });
        }
        Self {
            copies: vec![None; images.len()],
            files: images.len() as u64,
            images,
            slots,
            process: 1,
            writes: Vec::new(),
            blind,
            snapshot: false,
            time: 1,
            versions: 100,
            moved: false,
        }
    }

    pub(crate) fn slot(&self, key: &str) -> usize {
        self.slots.iter().position(|slot| slot.key == key).unwrap()
    }

    pub(crate) fn seen(&self, slot: usize) -> Seen {
        let slot = &self.slots[slot];
        let image = &self.images[slot.image];
        let bitmaps = image.bitmaps.iter().map(|bitmap| Listed {
            name: bitmap.name.clone(),
            recording: bitmap.recording,
            persistent: bitmap.persistent,
            inconsistent: bitmap.inconsistent,
            busy: false,
            granularity: BLOCK,
            count: u64::from(bitmap.bits.count_ones()) * u64::from(BLOCK),
        });
        Seen {
            key: slot.key.clone(),
            size: image.content.len() as u64 * u64::from(BLOCK),
            identity: json!([if self.blind { 0 } else { image.file }]),
            persistent: image.persistent,
            bitmaps: bitmaps.collect(),
        }
    }

    /// What a read of a block answers just now.
    pub(crate) fn read(&mut self, image: usize, block: usize) -> u32 {
        let torn = self.writes.iter().any(|write| {
            let within = write.first..write.first + write.count;
            write.image == image && !write.landed && within.contains(&block)
        });
        if torn && self.versions.is_multiple_of(2) {
            self.versions += 1;
            return TORN + self.versions;
        }
        let content = &self.images[image].content;
        content.get(block).copied().unwrap_or(TORN)
    }

    pub(crate) fn add(&mut self, image: usize, name: &str) {
        let image = &mut self.images[image];
        image.bitmaps.push(Bitmap {
            name: name.to_owned(),
            recording: true,
            inconsistent: false,
            persistent: image.persistent,
            stored: false,
            bits: 0,
            by_hand: false,
        });
    }

    /// All writes in flight of an image complete.
    pub(crate) fn drain(&mut self, image: usize) {
        while let Some(index) = self.writes.iter().position(|write| write.image == image) {
            self.complete(index);
        }
    }

    fn land(&mut self, index: usize) {
        let write = &mut self.writes[index];
        if !write.landed {
            write.landed = true;
            let (first, count) = (write.first, write.count);
            self.images[write.image].content[first..first + count].fill(write.value);
        }
    }

    fn complete(&mut self, index: usize) {
        self.land(index);
        let write = self.writes.swap_remove(index);
        let bits = (u64::MAX >> (64 - write.count)) << write.first;
        for bitmap in &mut self.images[write.image].bitmaps {
            if bitmap.recording {
                bitmap.bits |= bits;
            }
        }
    }

    fn begin(&mut self, range: Range, value: Value) -> Option<usize> {
        let slot = &self.slots[usize::from(range.disk) % self.slots.len()];
        if !slot.plugged {
            return None;
        }
        let image = slot.image;
        let blocks = self.images[image].content.len();
        let first = usize::from(range.first) % blocks;
        let count = usize::from(range.count).min(blocks - first).max(1);
        self.versions += 1;
        let value = match value {
            Value::New => self.versions,
            Value::Zero => 0,
            Value::Same => self.images[image].content[first],
            Value::Old(value) => u32::from(value),
        };
        self.writes.push(Write {
            image,
            first,
            count,
            value,
            landed: false,
        });
        Some(self.writes.len() - 1)
    }

    /// A clean close: transient bitmaps go, the others are in the image.
    fn close(&mut self, image: usize) {
        self.drain(image);
        let image = &mut self.images[image];
        image.bitmaps.retain(|bitmap| bitmap.persistent);
        for bitmap in &mut image.bitmaps {
            bitmap.stored = true;
        }
    }

    fn restart(&mut self) {
        for image in 0..self.images.len() {
            self.close(image);
        }
        for slot in 0..self.slots.len() {
            if !self.images[self.slots[slot].image].persistent {
                self.disturb(slot);
            }
        }
        self.process += 1;
    }

    /// What a host's crash leaves of the bitmaps.
    fn crashed(image: &mut Image) {
        image.bitmaps.retain(|bitmap| bitmap.stored);
        for bitmap in &mut image.bitmaps {
            bitmap.inconsistent = true;
            bitmap.recording = false;
        }
    }

    fn disturb(&mut self, slot: usize) {
        self.slots[slot].disturbed = self.time;
    }

    /// Does it. What makes no sense just now is passed over; by hand nothing is done within a batch or a freeze.
    pub(crate) fn act(&mut self, act: &Act, held: bool) {
        self.time += 1;
        let count = self.slots.len();
        let pick = |disk: u8| usize::from(disk) % count;
        match *act {
            Act::Write(range, value) => {
                if let Some(index) = self.begin(range, value) {
                    self.complete(index);
                }
            }
            Act::Begin(range, value, landed) => {
                if let Some(index) = self.begin(range, value)
                    && landed
                {
                    self.land(index);
                }
            }
            Act::Land(_) | Act::Complete(_) if self.writes.is_empty() => {}
            Act::Land(write) => self.land(usize::from(write) % self.writes.len()),
            Act::Complete(write) => self.complete(usize::from(write) % self.writes.len()),
            Act::Kill => {
                self.writes.clear();
                for slot in 0..count {
                    if self.slots[slot].plugged {
                        Self::crashed(&mut self.images[self.slots[slot].image]);
                        self.disturb(slot);
                    }
                }
                self.process += 1;
            }
            Act::Restart => self.restart(),
            Act::Resize(disk, blocks) => self.resize(pick(disk), usize::from(blocks)),
            Act::Swap(a, b) => self.swap(pick(a), pick(b)),
            Act::Copy(disk, running) => self.copy(pick(disk), running),
            Act::Rollback(disk) => {
                let slot = pick(disk);
                let image = self.slots[slot].image;
                if let Some(copy) = self.copies[image].clone() {
                    self.moved = true;
                    self.restart();
                    self.images[image] = copy;
                    self.disturb(slot);
                }
            }
            Act::Clone(from, to) => {
                let (from, to) = (pick(from), pick(to));
                if from != to {
                    self.moved = true;
                    self.restart();
                    let mut copy = self.images[self.slots[from].image].clone();
                    copy.file = self.files;
                    self.files += 1;
                    let image = self.slots[to].image;
                    self.images[image] = copy;
                    self.disturb(to);
                }
            }
            Act::Plug(disk) => self.plug(pick(disk)),
            Act::HandAdd(disk) if !held => {
                let name = format!("forerun-feedf00d-7-{:016x}", self.time);
                self.add(self.slots[pick(disk)].image, &name);
            }
            Act::HandRemove(disk, bitmap)
            | Act::HandDisable(disk, bitmap)
            | Act::HandEnable(disk, bitmap)
                if !held =>
            {
                self.by_hand(act, pick(disk), usize::from(bitmap));
            }
            Act::EndSnapshot => self.snapshot = false,
            _ => {}
        }
    }

    fn resize(&mut self, slot: usize, wanted: usize) {
        let index = self.slots[slot].image;
        self.drain(index);
        let image = &mut self.images[index];
        let blocks = 4 + wanted % (MOST - 4);
        if image.sizes.contains(&blocks) {
            return;
        }
        image.sizes.push(blocks);
        image.content.resize(blocks, 0);
        for bitmap in &mut image.bitmaps {
            bitmap.bits &= u64::MAX >> (64 - blocks);
        }
        self.disturb(slot);
    }

    fn swap(&mut self, a: usize, b: usize) {
        if a == b {
            return;
        }
        self.moved = true;
        for slot in [a, b] {
            self.close(self.slots[slot].image);
            self.disturb(slot);
        }
        let image = self.slots[a].image;
        self.slots[a].image = self.slots[b].image;
        self.slots[b].image = image;
    }

    fn copy(&mut self, slot: usize, running: bool) {
        let image = self.slots[slot].image;
        if !running {
            self.restart();
        }
        let mut copy = self.images[image].clone();
        if running {
            Self::crashed(&mut copy);
        }
        self.copies[image] = Some(copy);
    }

    fn plug(&mut self, slot: usize) {
        self.moved = true;
        let image = self.slots[slot].image;
        if self.slots[slot].plugged {
            self.close(image);
        }
        if !self.images[image].persistent {
            self.disturb(slot);
        }
        self.slots[slot].plugged = !self.slots[slot].plugged;
    }

    /// A removal together with an enabling would imitate a rotation that was cut off, and an enabling after a disabling
    /// leaves no trace: neither can be told from the bitmaps.
    fn by_hand(&mut self, act: &Act, slot: usize, bitmap: usize) {
        let image = &mut self.images[self.slots[slot].image];
        if image.bitmaps.is_empty() {
            return;
        }
        let bitmap = bitmap % image.bitmaps.len();
        match act {
            Act::HandRemove(..) if !image.bitmaps.iter().any(|bitmap| bitmap.by_hand) => {
                image.bitmaps.remove(bitmap);
                image.removed = true;
            }
            Act::HandDisable(..) => {
                image.bitmaps[bitmap].recording = false;
                image.bitmaps[bitmap].by_hand = true;
            }
            Act::HandEnable(..) if !image.removed => {
                let bitmap = &mut image.bitmaps[bitmap];
                if !bitmap.by_hand && !bitmap.inconsistent {
                    bitmap.recording = true;
                    bitmap.by_hand = true;
                }
            }
            _ => {}
        }
        self.disturb(slot);
    }
}
