//! Deadlines are sums of moments and limits.

use std::time::Duration;

/// The longest time limit, a year: a longer one is as good, and the clock cannot count to all of them.
pub(crate) const LONGEST: Duration = Duration::from_secs(365 * 24 * 3600);
