//! What a set of chunks may look like, and every order of every cut against a plain model.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

use proptest::prelude::*;

use super::*;

const BASE: u64 = 0x1000;

fn read(length: u64) -> Reassembly {
    Reassembly::new(Extent {
        offset: BASE,
        length,
    })
}

fn failure(errno: u32) -> Failure {
    Failure {
        errno,
        message: String::new(),
    }
}

#[test]
fn chunks_come_in_any_order() {
    let mut read = read(100);
    assert_eq!(read.data(BASE + 50, 50).unwrap(), 50..100);
    assert_eq!(read.hole(BASE, 20).unwrap(), 0..20);
    assert_eq!(read.data(BASE + 20, 30).unwrap(), 20..50);
    let holes = vec![Extent {
        offset: BASE,
        length: 20,
    }];
    assert_eq!(read.finish().unwrap(), Outcome::Data { holes });
}

#[test]
fn one_hole_over_everything_touches_no_buffer() {
    let mut read = read(100);
    assert_eq!(read.hole(BASE, 100).unwrap(), 0..0);
    assert_eq!(read.finish().unwrap(), Outcome::Zeros);
}

#[test]
fn overlaps_gaps_and_strays_are_refused() {
    for (offset, length, what) in [
        (BASE + 10, 1, "again"),
        (BASE, 11, "over the start"),
        (BASE + 19, 5, "over the end"),
        (BASE + 5, 30, "around"),
        (BASE - 1, 2, "before the request"),
        (BASE + 99, 2, "behind the request"),
        (u64::MAX, 1, "far away"),
        (BASE + 30, 0, "nothing"),
    ] {
        let mut read = read(100);
        read.data(BASE + 10, 10).unwrap();
        assert!(read.data(offset, length).is_err(), "{what}");
    }
    let mut gap = read(100);
    gap.data(BASE, 50).unwrap();
    gap.data(BASE + 51, 49).unwrap();
    assert!(gap.finish().is_err());
    assert!(read(1).finish().is_err());
}

#[test]
fn the_first_error_counts_and_excuses_what_is_missing() {
    let mut read = read(100);
    read.data(BASE, 50).unwrap();
    read.failed(failure(5), Some(BASE + 50)).unwrap();
    read.failed(failure(12), None).unwrap();
    assert_eq!(read.finish().unwrap(), Outcome::Failed(failure(5)));
}

#[test]
fn errors_out_of_range_or_without_end_are_refused() {
    assert!(read(100).failed(failure(5), Some(BASE + 100)).is_err());
    let mut read = read(100);
    assert!((0..=MAX_FAILURES).any(|_| read.failed(failure(5), None).is_err()));
}

#[test]
fn scattered_chunks_have_a_limit() {
    let mut read = read(1 << 20);
    let refused = (0..1u64 << 19).position(|at| read.data(BASE + 2 * at, 1).is_err());
    assert_eq!(refused, Some(MAX_FRAGMENTS));
}

proptest! {
    #[test]
    fn any_chunks_are_accepted_exactly_when_a_byte_map_says_so(
        length in 1u64..40,
        chunks in prop::collection::vec((0u64..48, 0u32..24, any::<bool>()), 0..12),
    ) {
        let mut read = read(length);
        let mut model = vec![0u8; usize::try_from(length).unwrap()];
        for (start, size, is_hole) in chunks {
            let range = usize::try_from(start).unwrap()..usize::try_from(start + u64::from(size)).unwrap();
            let good = size > 0 && model.get(range.clone()).is_some_and(|bytes| bytes.iter().all(|byte| *byte == 0));
            let answer = if is_hole { read.hole(BASE + start, size) } else { read.data(BASE + start, size) };
            prop_assert_eq!(answer.is_ok(), good);
            if !good {
                return Ok(());
            }
            model[range].fill(if is_hole { 2 } else { 1 });
        }
        let whole = model.iter().all(|byte| *byte != 0);
        let zeros = model.iter().all(|byte| *byte == 2);
        match read.finish() {
            Ok(Outcome::Zeros) => prop_assert!(zeros),
            Ok(Outcome::Data { holes }) => {
                prop_assert!(whole && !zeros);
                let bytes: u64 = holes.iter().map(|hole| hole.length).sum();
                prop_assert_eq!(bytes, model.iter().map(|byte| u64::from(*byte == 2)).sum::<u64>());
            }
            Ok(Outcome::Failed(_)) => prop_assert!(false),
            Err(_) => prop_assert!(!whole),
        }
    }

    #[test]
    fn every_order_of_every_cut_covers_the_request(
        cuts in prop::collection::vec(1u32..50, 1..20),
        order in any::<prop::sample::Index>(),
        reversed: bool,
    ) {
        let mut pieces = Vec::new();
        let mut at = 0;
        for cut in cuts {
            pieces.push((BASE + at, cut));
            at += u64::from(cut);
        }
        let middle = order.index(pieces.len());
        pieces.rotate_left(middle);
        if reversed {
            pieces.reverse();
        }
        let mut read = read(at);
        for (offset, length) in pieces {
            read.data(offset, length).unwrap();
        }
        prop_assert_eq!(read.finish().unwrap(), Outcome::Data { holes: Vec::new() });
    }
}
