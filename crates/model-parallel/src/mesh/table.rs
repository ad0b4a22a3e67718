//! Meshes and placements as small tables.

use std::fmt;

use super::{Axes, Axis, Mesh, Placement};

/// Ranks that a line of the table shows.
const SHOWN_MAX: usize = 8;

/// A line for each axis: its size, how many groups it has, and rank 0's.
impl fmt::Display for Mesh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<12}  {:>5}  {:>6}  first group", "axis", "ranks", "groups")?;
        for axis in Axis::ALL {
            let groups = Axes::of(&[axis]).map(|axes| self.groups(axes)).unwrap_or_default();
            let first = groups.first().map(|group| listed(group)).unwrap_or_default();
            let size = self.shape().size(axis);
            write!(f, "\n{axis:<12}  {size:>5}  {:>6}  {first}", groups.len())?;
        }
        Ok(())
    }
}

/// A line for each axis: its size, how many groups it has and how many of them cross nodes, and the slowest link they use.
impl fmt::Display for Placement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<12}  {:>5}  {:>6}  {:>8}  link", "axis", "ranks", "groups", "crossing")?;
        for placed in self.axes() {
            let (axis, size, link) = (placed.axis, placed.size, placed.link.as_deref());
            let (groups, crossing) = (placed.group_count, placed.crossing_count);
            let link = link.unwrap_or("none");
            write!(f, "\n{axis:<12}  {size:>5}  {groups:>6}  {crossing:>8}  {link}")?;
        }
        Ok(())
    }
}

fn listed(ranks: &[usize]) -> String {
    let shown: Vec<String> = ranks.iter().take(SHOWN_MAX).map(ToString::to_string).collect();
    match ranks.last() {
        Some(last) if ranks.len() > SHOWN_MAX => format!("{} … {last}", shown.join(" ")),
        _ => shown.join(" "),
    }
}
