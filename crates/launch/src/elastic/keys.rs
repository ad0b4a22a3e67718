//! Where in node 0's store the launchers of an elastic job put what. Pure.

/// How many statuses there are.
pub(super) const TOLD_COUNT: &str = "launch/told-count";
/// The number of the newest order.
pub(super) const NEWEST: &str = "launch/newest";
/// What node 0 was launched with.
pub(super) const TERMS: &str = "launch/terms";

/// A status, in the order in which they came.
pub(super) fn told(number: i64) -> String {
    format!("launch/told/{number}")
}

pub(super) fn order(number: u64) -> String {
    format!("launch/order/{number}")
}

/// How many launchers a node has had.
pub(super) fn life(node: usize) -> String {
    format!("launch/life/{node}")
}

/// The port of the store of a generation's ranks.
pub(super) fn port(generation: u32) -> String {
    format!("launch/port/{generation}")
}

/// What was the matter with the ranks of a generation; the first to say so counts.
pub(crate) fn failure(generation: u32) -> String {
    format!("launch/failure/{generation}")
}

/// What a value says, which one of us has written.
pub(super) fn number<T: std::str::FromStr + Default>(value: &[u8]) -> T {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or_default()
}
