//! The freeze harness itself: the right order of actions is exact, and the wrong one is seen to be wrong.

#![expect(clippy::unwrap_used, reason = "helpers of tests, too")]

use forerun_rig::freeze::{self, Cell, Method, Order, Outcome, Via};

/// Paced so that every moment dirties blocks that were clean: what the order of actions decides about.
fn run(method: Method, order: Order, points: u32) -> Outcome {
    let mut cell = Cell::new(method, order, Via::Exports, points);
    (cell.run, cell.rate) = (4, 500);
    let mut lines = Vec::new();
    let outcome = freeze::run(&cell, &mut |line| lines.push(line.to_owned())).unwrap();
    assert!(outcome.alive, "{lines:?}");
    outcome
}

#[test]
fn the_right_order_is_exact() {
    for method in [Method::Fleece, Method::Snapshot] {
        let outcome = run(method, Order::Right, 20);
        assert_eq!(outcome.inexact(), 0, "{method:?} {outcome}");
        assert!(outcome.points() > 10, "{method:?} {outcome}");
    }
}

#[test]
fn the_wrong_order_is_seen() {
    // 68 of 75 points in one run of this.
    let outcome = run(Method::Snapshot, Order::Wrong, 20);
    assert!(outcome.inexact() > 0, "{outcome}");
}
