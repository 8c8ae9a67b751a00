//! The parsing of status, the cutting of requests and what the cursors make of answers.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::as_conversions,
    clippy::indexing_slicing,
    reason = "a test may panic"
)]

use proptest::prelude::*;

use super::*;

fn payload(id: u32, extents: &[(u32, u32)]) -> Vec<u8> {
    let mut out = id.to_be_bytes().to_vec();
    for (length, flags) in extents {
        out.extend(length.to_be_bytes());
        out.extend(flags.to_be_bytes());
    }
    out
}

#[test]
fn only_the_last_extent_may_end_behind_the_request() {
    let good = [(512, 0), (4096, 1)];
    assert_eq!(
        parse_status(&payload(3, &good), 1024).unwrap(),
        (3, good.to_vec())
    );
    for (extents, what) in [
        (&[][..], "nothing"),
        (&[(0, 0)], "an empty extent"),
        (&[(512, 0), (0, 0)], "an empty extent at the end"),
        (&[(1024, 0), (512, 0)], "an extent behind the request"),
        (&[(u32::MAX, 0), (u32::MAX, 0)], "far too much"),
    ] {
        assert!(parse_status(&payload(3, extents), 1024).is_err(), "{what}");
    }
    assert!(parse_status(&[0; 11], 1024).is_err());
}

#[test]
fn requests_are_aligned_bounded_and_within_the_export() {
    for (from, end, block, size, expected) in [
        (0, 100, 512, 1 << 20, (0, 512)),
        (700, 1100, 512, 1 << 20, (512, 1024)),
        (0, 1000, 512, 1000, (0, 1000)),
        (0, 1 << 40, 4096, 1 << 40, (0, MAX_STATUS)),
        (1 << 39, 1 << 40, 65536, 1 << 40, (1 << 39, MAX_STATUS)),
    ] {
        let request = aligned_request(from, end, block, size).unwrap();
        assert_eq!((request.offset, request.length), expected);
    }
}

/// Feeds answers to one cursor and gives what it says.
fn told(from: u64, end: u64, answers: &[(u64, &[(u32, u32)])]) -> Vec<(u64, u64, u32)> {
    let mut out = Vec::new();
    let mut track = Track {
        name: "c",
        id: 1,
        cursor: from,
        end,
        merged: Merged::default(),
    };
    let mut push = |extent: Extent, flags| out.push((extent.offset, extent.length, flags));
    for (offset, extents) in answers {
        let _ = track.advance(*offset, extents, &mut |status| {
            push(status.extent, status.flags);
            ControlFlow::Continue(())
        });
    }
    if let Some((extent, flags)) = track.merged.take() {
        push(extent, flags);
    }
    out
}

#[test]
fn answers_are_clipped_and_neighbours_merged() {
    assert_eq!(
        told(
            700,
            3000,
            &[(512, &[(512, 1), (512, 1), (512, 0)]), (2048, &[(4096, 0)])]
        ),
        [(700, 836, 1), (1536, 1464, 0)]
    );
    assert_eq!(
        told(
            0,
            4096,
            &[(0, &[(2048, 1)]), (1024, &[(1024, 1), (2048, 0)])]
        ),
        [(0, 2048, 1), (2048, 2048, 0)],
        "what is told again is cut off"
    );
}

proptest! {
    #[test]
    fn hostile_status_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..200), requested: u32) {
        if let Ok((_, extents)) = parse_status(&bytes, requested) {
            prop_assert!(extents.len() <= bytes.len() / 8);
        }
    }

    #[test]
    fn what_a_cursor_says_is_in_order_and_without_gaps(
        from in 0u64..5000,
        length in 1u64..20_000,
        answers in prop::collection::vec(prop::collection::vec((1u32..3000, 0u32..3), 1..6), 1..6),
    ) {
        let end = from + length;
        let mut offset = from / 512 * 512;
        let mut fed = Vec::new();
        for answer in &answers {
            fed.push((offset, answer.as_slice()));
            offset += answer.iter().map(|(length, _)| u64::from(*length)).sum::<u64>();
        }
        let mut at = from;
        let mut last = None;
        for (start, length, flags) in told(from, end, &fed) {
            prop_assert_eq!(start, at);
            prop_assert!(length > 0 && last != Some(flags));
            at += length;
            last = Some(flags);
        }
        prop_assert!(at <= end);
    }
}
