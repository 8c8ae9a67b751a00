//! Numbers that are measured: whole ones as fractions and back.

/// As a fraction; beyond 2^53 the last digits are nobody's loss.
#[expect(
    clippy::cast_precision_loss,
    reason = "measurements are not that exact"
)]
pub(super) fn real(value: u64) -> f64 {
    value as f64
}

/// As a whole number, 0 for what is less.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "out of range it saturates"
)]
pub(super) fn whole(value: f64) -> u64 {
    value as u64
}
