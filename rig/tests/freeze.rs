//! The freeze harness itself: the right order of actions is exact, and the wrong one is seen to be wrong.

#![expect(clippy::unwrap_used, reason = "helpers of tests, too")]

use forerun_rig::freeze::{self, Cell, Method, Order, Outcome, Via};

/// Paced so that every moment dirties blocks that were clean: what the order of actions decides about. On a slow machine a
/// rate dirties everything between two points, and then no order can lose a write.
fn run(method: Method, order: Order, points: u32, rate: u32) -> Outcome {
    let mut cell = Cell::new(method, order, Via::Exports, points);
    (cell.run, cell.rate) = (4, rate);
    let mut lines = Vec::new();
    let outcome = freeze::run(&cell, &mut |line| lines.push(line.to_owned())).unwrap();
    assert!(outcome.alive, "{lines:?}");
    outcome
}

/// One after the other, so that they do not starve each other.
#[test]
fn the_right_order_is_exact_and_the_wrong_one_is_seen() {
    for method in [Method::Fleece, Method::Snapshot] {
        let outcome = run(method, Order::Right, 20, 500);
        assert_eq!(outcome.inexact(), 0, "{method:?} {outcome}");
        assert!(outcome.points() > 10, "{method:?} {outcome}");
    }
    // Nine of ten points at a rate that leaves clean blocks.
    let seen = [150, 300, 80, 150, 500, 80].into_iter().any(|rate| {
        let outcome = run(Method::Snapshot, Order::Wrong, 20, rate);
        outcome.inexact() > 0
    });
    assert!(seen, "the wrong order looks right");
}
