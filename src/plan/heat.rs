//! How often each block changes, a byte a block, and the order of copying that follows from it.
//!
//! A rotation freezes a bitmap of what changed since the one before; every block in it counts once more. The first count says
//! nothing of a second change, since most blocks that change do so once. Of `k` looks, `d` seconds apart, that found a block
//! changed `n - 1` times the chance of a change within `d` is about `(n - 1) / k`, and a copy is worth making when it probably
//! still holds `h` seconds later, at the due time:
//!
//! ```text
//! P(no change within h) = (1 - (n - 1) / k) ^ (h / d)  >=  HOLDS      <=>      n - 1  <=  k (1 - HOLDS ^ (d / h))
//! ```
//!
//! What (nearly) every look finds changed may change at any speed above what looks can tell: it is hot whatever `h` is.

use std::time::Duration;

use crate::bitmap::blocks::BlockSet;
use crate::units::BlockRun;

/// After so long the counts, and the time that they are of, are halved: what changed a day ago says less.
const MEMORY: f64 = 86_400.0;
/// The least time ahead that is asked about.
const LEAST_AHEAD: f64 = 1.0;
/// How probable it must be that a copy holds.
const HOLDS: f64 = 2.0 / 3.0;
/// A look at so many times the usual time is none.
const LONG_LOOK: f64 = 4.0;
/// After so many seconds what was seen says less.
const LONG_AGO: f64 = 3600.0;
/// The share of the looks that is nearly all of them.
const NEARLY_ALL: f64 = 0.9;
/// So many pending bitmaps of a disk, and nothing is left for later: they can go only when all their blocks are safe.
const MOST_PENDING: usize = 24;

const MAGIC: &[u8; 8] = b"frheat2\0";
const HEADER: usize = 8 + 5 * 8;

/// How often the blocks of a disk were found changed.
#[derive(Debug, Clone, PartialEq)]
pub struct Heat {
    counts: Vec<u8>,
    /// Seconds that the counts are of, and how many looks.
    observed: f64,
    looks: f64,
    /// When they were last taken, in seconds of the wall clock.
    last: Option<f64>,
    /// Seconds between the last two looks.
    interval: f64,
    /// The newest bitmap that is counted.
    epoch: u64,
    full: bool,
}

impl Heat {
    /// Nothing is known of a disk of this many blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        Self {
            counts: vec![0; usize::try_from(blocks).unwrap_or(0)],
            observed: 0.0,
            looks: 0.0,
            last: None,
            interval: 0.0,
            epoch: 0,
            full: false,
        }
    }

    /// How many blocks the disk has.
    #[must_use]
    pub fn blocks(&self) -> u64 {
        self.counts.len() as u64
    }

    /// The newest bitmap that is counted.
    #[must_use]
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// These blocks are in a bitmap that was not counted yet.
    pub fn found(&mut self, run: BlockRun) {
        let end = usize::try_from(run.end())
            .unwrap_or(usize::MAX)
            .min(self.counts.len());
        let first = usize::try_from(run.first).unwrap_or(usize::MAX).min(end);
        for count in &mut self.counts[first..end] {
            *count = count.saturating_add(1);
            self.full |= *count == u8::MAX;
        }
    }

    /// All bitmaps up to `epoch`, `looks` of them, are counted as of `now`; they are of the last `watched` seconds, but for the
    /// first one, which may be of a longer time.
    pub fn looked(&mut self, epoch: u64, looks: u32, now: f64, watched: f64) {
        // The wall clock may be set back.
        let passed = self.last.map(|last| (now - last).max(0.0));
        let gap = passed.map_or(f64::INFINITY, |passed| passed - watched);
        let (within, time) = if gap <= 0.0 {
            (looks, passed.unwrap_or(0.0))
        } else {
            (looks.saturating_sub(1), watched)
        };
        self.looks += f64::from(within);
        self.observed += time;
        self.interval = time;
        // A time out of all proportion says only that the block changed at all.
        let apart = self.observed / self.looks.max(1.0);
        if gap > 0.0 && gap.is_finite() && (apart <= 0.0 || gap <= apart * LONG_LOOK) {
            self.looks += 1.0;
            self.observed += gap;
            self.interval += gap;
        }
        self.last = Some(now);
        self.epoch = epoch;
        if self.full || self.observed > MEMORY {
            self.age();
        }
    }

    /// Halves what was counted long before `now`, so that what comes counts more.
    pub fn recalled(&mut self, now: f64) {
        if self.last.is_some_and(|last| now - last > LONG_AGO) {
            self.age();
        }
    }

    fn age(&mut self) {
        self.full = false;
        self.observed /= 2.0;
        self.looks /= 2.0;
        for count in &mut self.counts {
            *count /= 2;
        }
    }

    /// From how many counts on a copy would probably not hold for so long; without a time, until the next look.
    #[must_use]
    pub fn limit(&self, ahead: Option<Duration>) -> u8 {
        let ahead = ahead.map_or(self.interval, |ahead| ahead.as_secs_f64());
        let apart = self.observed / self.looks.max(1.0);
        let holds = self.looks * (1.0 - HOLDS.powf(apart / ahead.max(LEAST_AHEAD)));
        let nearly_all = ((self.looks - 1.0) * NEARLY_ALL).ceil().max(1.0);
        // At most 255 by then, and not negative.
        #[allow(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "clamped"
        )]
        let limit = (1.0 + (holds.floor() + 1.0).min(nearly_all)).clamp(2.0, 255.0) as u8;
        limit
    }

    /// The blocks of a set that were counted at least so often.
    #[must_use]
    pub fn at_least(&self, count: u8, among: &BlockSet) -> BlockSet {
        let mut found = BlockSet::new(among.blocks());
        for run in among.runs() {
            let end = usize::try_from(run.end())
                .unwrap_or(usize::MAX)
                .min(self.counts.len());
            let mut at = usize::try_from(run.first).unwrap_or(usize::MAX).min(end);
            while at < end {
                let hot = self.counts[at] >= count;
                let same = self.counts[at..end]
                    .iter()
                    .take_while(|other| (**other >= count) == hot)
                    .count();
                if hot {
                    found.insert(BlockRun {
                        first: at as u64,
                        count: same as u64,
                    });
                }
                at += same;
            }
        }
        found
    }

    /// As bytes to keep.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.epoch.to_le_bytes());
        bytes.extend(self.observed.to_le_bytes());
        bytes.extend(self.looks.to_le_bytes());
        bytes.extend(self.interval.to_le_bytes());
        bytes.extend(self.last.unwrap_or(-1.0).to_le_bytes());
        bytes.extend(lz4_flex::block::compress_prepend_size(&self.counts));
        let sum = crc32fast::hash(&bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    /// What was kept, if it is whole and of a disk of this many blocks.
    #[must_use]
    pub fn decode(bytes: &[u8], blocks: u64) -> Option<Self> {
        let (content, sum) = bytes.split_at_checked(bytes.len().checked_sub(4)?)?;
        if crc32fast::hash(content).to_le_bytes() != sum || !content.starts_with(MAGIC) {
            return None;
        }
        let word = |at: usize| {
            let bytes = content.get(8 + at * 8..16 + at * 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let number = |at: usize| Some(f64::from_bits(word(at)?)).filter(|it| it.is_finite());
        // The size is looked at before anything of that size is made.
        let size = u32::from_le_bytes(content.get(HEADER..HEADER + 4)?.try_into().ok()?);
        if u64::from(size) != blocks {
            return None;
        }
        let counts = lz4_flex::block::decompress_size_prepended(&content[HEADER..]).ok()?;
        Some(Self {
            epoch: word(0)?,
            observed: number(1)?.max(0.0),
            looks: number(2)?.max(0.0),
            interval: number(3)?.max(0.0),
            last: number(4).filter(|last| *last >= 0.0),
            full: false,
            counts,
        })
    }
}

/// What a pass may leave for later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Patience {
    /// Nothing: all that is open is copied.
    #[default]
    None,
    /// Blocks that will probably have changed again by then; without a time, by the next pass.
    Until(Option<Duration>),
}

/// The open blocks of a disk by temperature. Cold ones are all others.
#[derive(Debug, Clone)]
pub struct Order {
    /// Changed more than once: copied after the cold ones.
    pub warm: BlockSet,
    /// Changing now: last.
    pub hot: BlockSet,
    /// The hot ones are not copied at all in this pass.
    pub later: bool,
}

impl Order {
    /// Sorts the open blocks. `fresh` are those that changed within the last seconds: whether they go on changing is known at
    /// the next look.
    #[must_use]
    pub fn of(
        open: &BlockSet,
        heat: &Heat,
        fresh: Option<&BlockSet>,
        patience: Patience,
        pending: usize,
    ) -> Self {
        let ahead = match patience {
            Patience::None => None,
            Patience::Until(ahead) => ahead,
        };
        let mut hot = heat.at_least(heat.limit(ahead), open);
        if let Some(fresh) = fresh {
            let mut fresh = fresh.clone();
            fresh.intersect(open);
            hot.union(&fresh);
        }
        let mut warm = heat.at_least(2, open);
        warm.subtract(&hot);
        Self {
            warm,
            hot,
            later: patience != Patience::None && pending < MOST_PENDING,
        }
    }

    /// The sweeps of a pass over the open blocks: few and each in order, coldest first.
    #[must_use]
    pub fn sweeps(&self, open: &BlockSet) -> [BlockSet; 3] {
        let mut cold = open.clone();
        cold.subtract(&self.warm);
        cold.subtract(&self.hot);
        let mut warm = self.warm.clone();
        warm.intersect(open);
        let hot = if self.later {
            BlockSet::new(open.blocks())
        } else {
            let mut hot = self.hot.clone();
            hot.intersect(open);
            hot
        };
        [cold, warm, hot]
    }

    /// How many of the open blocks are left for later.
    #[must_use]
    pub fn postponed(&self, open: &BlockSet) -> u64 {
        if !self.later {
            return 0;
        }
        let mut hot = self.hot.clone();
        hot.intersect(open);
        hot.count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, count: u64) -> BlockRun {
        BlockRun { first, count }
    }

    /// A disk of 100 blocks: 10 that change all the time, the rest once, by turns, in looks of 10 s.
    fn busy(looks: u64) -> Heat {
        let mut heat = Heat::new(100);
        heat.looked(1, 0, 1000.0, 0.0);
        for look in 0..looks {
            heat.found(run(0, 10));
            heat.found(run(10 + look % 90, 1));
            #[allow(clippy::cast_precision_loss, reason = "small")]
            let seconds = 10.0 * (look + 1) as f64;
            heat.looked(2 + look, 1, 1000.0 + seconds, seconds);
        }
        heat
    }

    #[test]
    fn cold_blocks_come_first_and_hot_ones_wait_for_as_long_as_the_due_time_is_far() {
        let heat = busy(6);
        let open = BlockSet::full(100);
        let far = Patience::Until(Some(Duration::from_secs(60)));
        let order = Order::of(&open, &heat, None, far, 1);
        assert_eq!(order.postponed(&open), 10);
        let [cold, warm, hot] = order.sweeps(&open);
        assert_eq!((cold.count(), warm.count(), hot.count()), (90, 0, 0));
        // However near it is: what every look finds changed may change at any speed.
        let near = Patience::Until(Some(Duration::from_secs(1)));
        assert_eq!(Order::of(&open, &heat, None, near, 1).postponed(&open), 10);
        // What half of them do holds for a second, mostly.
        let mut half = busy(6);
        for look in 7..13 {
            half.looked(
                1 + look,
                1,
                1000.0 + 10.0 * f64::from(u32::try_from(look).unwrap()),
                120.0,
            );
        }
        assert_eq!(Order::of(&open, &half, None, far, 1).postponed(&open), 10);
        let order = Order::of(&open, &half, None, near, 1);
        assert_eq!(order.postponed(&open), 0);
        let [_, warm, _] = order.sweeps(&open);
        assert_eq!(warm.count(), 10);
        // When all is asked for, hot blocks are the last sweep.
        let all = Order::of(&open, &heat, None, Patience::None, 1);
        assert_eq!(all.postponed(&open), 0);
        let counts = all.sweeps(&open).map(|sweep| sweep.count());
        assert_eq!(counts.iter().sum::<u64>(), 100);
        assert_eq!(counts[0], 90);
    }

    #[test]
    fn what_changed_once_is_never_left_for_later() {
        let mut heat = Heat::new(100);
        heat.looked(1, 0, 0.0, 0.0);
        heat.found(run(0, 100));
        heat.looked(2, 1, 10.0, 10.0);
        let open = BlockSet::full(100);
        let long = Patience::Until(Some(Duration::from_secs(36_000)));
        let order = Order::of(&open, &heat, None, long, 1);
        assert_eq!(order.postponed(&open), 0);
        // But what changed within the last seconds cools first.
        let mut fresh = BlockSet::new(100);
        fresh.insert(run(40, 5));
        let order = Order::of(&open, &heat, Some(&fresh), Patience::Until(None), 1);
        assert_eq!(order.postponed(&open), 5);
        // With too many bitmaps pending all must be copied, or they could never go.
        let many = Order::of(
            &open,
            &heat,
            Some(&fresh),
            Patience::Until(None),
            MOST_PENDING,
        );
        assert_eq!(many.postponed(&open), 0);
    }

    #[test]
    fn a_day_between_two_runs_hides_nothing_of_what_a_minute_shows() {
        let mut heat = Heat::new(100);
        heat.looked(1, 0, 0.0, 0.0);
        // All changed in the day; ten blocks in each of four looks since.
        heat.recalled(86_400.0);
        heat.found(run(0, 100));
        for _ in 0..4 {
            heat.found(run(0, 10));
        }
        heat.looked(6, 5, 86_412.0, 12.0);
        let open = BlockSet::full(100);
        for ahead in [1, 10, 1000] {
            let ahead = Patience::Until(Some(Duration::from_secs(ahead)));
            assert_eq!(Order::of(&open, &heat, None, ahead, 1).postponed(&open), 10);
        }
        // Where runs always come a day apart, the days are the looks.
        let mut days = Heat::new(100);
        for day in 0..6 {
            days.found(run(0, 10));
            days.looked(
                1 + day,
                1,
                100_000.0 * f64::from(u32::try_from(day).unwrap()),
                0.5,
            );
        }
        let order = Order::of(&open, &days, None, Patience::Until(None), 1);
        assert_eq!(order.postponed(&open), 10);
    }

    #[test]
    fn counts_age_and_never_run_over() {
        let heat = busy(600);
        let open = BlockSet::full(100);
        assert!(heat.observed < 6000.0, "halved with the counts");
        // The rate is the same as before the halvings.
        let order = Order::of(
            &open,
            &heat,
            None,
            Patience::Until(Some(Duration::from_secs(60))),
            1,
        );
        assert_eq!(order.postponed(&open), 10);
    }

    #[test]
    fn what_was_kept_is_what_comes_back_or_nothing_is() {
        let heat = busy(20);
        let bytes = heat.encode();
        assert_eq!(Heat::decode(&bytes, 100), Some(heat));
        assert_eq!(Heat::decode(&bytes, 101), None);
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert_eq!(Heat::decode(&bad, 100), None, "byte {at}");
            assert_eq!(Heat::decode(&bytes[..at], 100), None);
        }
    }
}
