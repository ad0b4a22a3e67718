//! How two sets of tensors, or two trees of values, differ.

use serde_json::Value;

use crate::numbers::Difference;
use crate::plan::byte_count;
use crate::tensors::{portions, Spec, Tensors};
use crate::{Dtype, Result};

/// Bytes of each side that are compared at once.
const PORTION_BYTES: u64 = 8 << 20;

/// A tensor that is not the same on both sides.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorDifference {
    /// Its name.
    pub name: String,
    /// What differs.
    pub what: What,
}

/// What differs about a tensor.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum What {
    /// The right side does not have it.
    OnlyLeft,
    /// The left side does not have it.
    OnlyRight,
    /// Element types or shapes differ.
    Spec {
        /// On the left.
        left: (Dtype, Vec<u64>),
        /// On the right.
        right: (Dtype, Vec<u64>),
    },
    /// Elements differ, compared bit by bit.
    Elements {
        /// How many.
        count: u64,
        /// The largest absolute difference; not a number where one side is not.
        max: f64,
    },
}

/// The tensors that differ, sorted by name. Reads both sides, 8 MiB at a time.
///
/// # Errors
/// Whatever reading gives.
pub fn diff(left: &dyn Tensors, right: &dyn Tensors) -> Result<Vec<TensorDifference>> {
    let mut names = left.names();
    names.extend(right.names());
    names.sort_unstable();
    names.dedup();
    let mut differences = Vec::new();
    for name in names {
        let what = match (left.spec(name), right.spec(name)) {
            (Some(mine), Some(other)) if mine == other => elements(left, right, name, mine)?,
            (Some(mine), Some(other)) => {
                Some(What::Spec { left: owned(mine), right: owned(other) })
            }
            (Some(_), None) => Some(What::OnlyLeft),
            (None, Some(_)) => Some(What::OnlyRight),
            (None, None) => None,
        };
        differences.extend(what.map(|what| TensorDifference { name: name.to_owned(), what }));
    }
    Ok(differences)
}

fn owned(spec: Spec<'_>) -> (Dtype, Vec<u64>) {
    (spec.dtype, spec.shape.to_vec())
}

fn elements(
    left: &dyn Tensors,
    right: &dyn Tensors,
    name: &str,
    spec: Spec<'_>,
) -> Result<Option<What>> {
    let (mut a, mut b) = (Vec::new(), Vec::new());
    let mut found = Difference::default();
    for extent in portions(spec, PORTION_BYTES) {
        let bytes = crate::cast::to_usize(byte_count(&extent, spec.dtype));
        a.resize(bytes, 0);
        b.resize(bytes, 0);
        left.read(name, &extent, &mut a)?;
        right.read(name, &extent, &mut b)?;
        found.add(&a, &b, spec.dtype);
    }
    let Difference { count, max } = found;
    Ok((count > 0).then_some(What::Elements { count, max }))
}

/// The places at which two trees of values differ, as JSON pointers with both values: `/epoch: 3, 4`.
pub fn diff_values(left: &Value, right: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare(left, right, "", &mut found);
    found
}

fn compare(left: &Value, right: &Value, at: &str, found: &mut Vec<String>) {
    let none = Value::Null;
    match (left, right) {
        (Value::Object(a), Value::Object(b)) => {
            let mut keys: Vec<&String> = a.keys().chain(b.keys()).collect();
            keys.sort();
            keys.dedup();
            for key in keys {
                let (mine, other) = (a.get(key).unwrap_or(&none), b.get(key).unwrap_or(&none));
                compare(mine, other, &format!("{at}/{key}"), found);
            }
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            for (n, (mine, other)) in a.iter().zip(b).enumerate() {
                compare(mine, other, &format!("{at}/{n}"), found);
            }
        }
        (a, b) if a == b => {}
        (a, b) => found.push(format!("{at}: {a}, {b}")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_that_differ_are_named_by_their_place() {
        let left = json!({ "epoch": 3, "lr": { "at": [1, 2] }, "same": "x" });
        let right = json!({ "epoch": 4, "lr": { "at": [1, 3] }, "same": "x", "more": true });
        let expected = ["/epoch: 3, 4", "/lr/at/1: 2, 3", "/more: null, true"];
        assert_eq!(diff_values(&left, &right), expected);
    }
}
