//! Moving averages of what is observed over intervals of any length.

use std::time::Duration;

/// A moving mean that forgets exponentially: after its time constant, old values count for 37 %. How long the intervals are
/// does not matter: a value that holds for a second counts as much as ten of a tenth.
#[derive(Debug, Clone, Copy)]
pub struct Average {
    constant: f64,
    sum: f64,
    weight: f64,
}

impl Average {
    /// With this time constant, and nothing observed.
    #[must_use]
    pub fn new(constant: Duration) -> Self {
        Self {
            constant: constant.as_secs_f64(),
            sum: 0.0,
            weight: 0.0,
        }
    }

    /// A value that held for so long, until now.
    pub fn observe(&mut self, value: f64, span: Duration) {
        let keep = (-span.as_secs_f64() / self.constant).exp();
        self.sum = self.sum * keep + value * (1.0 - keep);
        self.weight = self.weight * keep + (1.0 - keep);
    }

    /// The mean of what was observed; `None` when nothing was.
    #[must_use]
    pub fn mean(&self) -> Option<f64> {
        (self.weight > 0.0).then(|| self.sum / self.weight)
    }

    /// The mean with all time before the first value taken as zero: what an integral over the time constant came to.
    #[must_use]
    pub fn integral(&self) -> f64 {
        self.sum
    }

    /// Seconds of evidence in it, at most the time constant.
    #[must_use]
    pub fn evidence(&self) -> f64 {
        self.weight * self.constant
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        (self.sum, self.weight) = (0.0, 0.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lengths_of_the_intervals_do_not_matter() {
        let mut once = Average::new(Duration::from_secs(2));
        let mut often = Average::new(Duration::from_secs(2));
        for value in [1.0, 5.0, 2.0] {
            once.observe(value, Duration::from_secs(1));
            for millis in [100, 300, 50, 550] {
                often.observe(value, Duration::from_millis(millis));
            }
        }
        let (once, often) = (once.mean().unwrap(), often.mean().unwrap());
        assert!((once - often).abs() < 1e-9, "{once} {often}");
    }

    #[test]
    fn a_first_value_counts_in_full_and_an_old_one_is_forgotten() {
        let mut average = Average::new(Duration::from_secs(2));
        assert_eq!(average.mean(), None);
        average.observe(7.0, Duration::from_millis(10));
        assert!((average.mean().unwrap() - 7.0).abs() < 1e-9);
        average.observe(1.0, Duration::from_secs(20));
        assert!((average.mean().unwrap() - 1.0).abs() < 0.001);
    }
}
