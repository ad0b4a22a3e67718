//! Pure: which rows of a product are multiplied at once, and which of these products are exchanged at once.
//!
//! A product of many rows is made of a few smaller ones, of runs of rows that depend on its shape alone. An exchange is of one of them or of several
//! neighbours; while it goes on, the next are multiplied. How many exchanges there are is the group's affair, and so changes no bit.

use std::ops::Range;

/// Rows of a run begin at multiples of so many where there are enough: at addresses that are aligned as those of a whole are.
const ALIGNED: i64 = 16;

/// How a product is cut into rows, so that what other ranks need of some of them travels while the next are multiplied.
///
/// # Determinism
/// The same bits for any `exchanges_max`, on backends that sum in rank order (all but NCCL).
///
/// # Example
/// ```
/// use phalanx_model_parallel::tensor::Chunks;
///
/// // Beside a GPU or on several nodes an exchange runs beside the next product; ranks that share a processor have nothing to do meanwhile.
/// assert_eq!(Chunks::of((2, 1), false).exchanges_max, 1);
/// assert!(Chunks::of((2, 2), false).exchanges_max > 1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// Rows that are multiplied at once, at least: fewer rows are one product.
    pub rows_min: i64,
    /// Products that one is made of, at most.
    pub products_max: i64,
    /// Exchanges that they are shared among, at most.
    pub exchanges_max: i64,
}

impl Chunks {
    /// One product, one exchange.
    pub const ONE: Self = Self { rows_min: 1, products_max: 1, exchanges_max: 1 };

    /// For a group of so many ranks on so many nodes, with its tensors on GPUs or not.
    ///
    /// Products are of 512 rows and more, of which a processor's or a GPU's kernel makes as much of its time as of many. There are four of them at most: all but the
    /// last exchange are hidden then, at the price of three messages more.
    #[must_use]
    pub fn of((ranks, nodes): (usize, usize), on_gpus: bool) -> Self {
        if ranks <= 1 {
            return Self::ONE;
        }
        let exchanges_max = if on_gpus || nodes > 1 { 4 } else { 1 };
        Self { rows_min: 512, products_max: 4, exchanges_max }
    }
}

/// A product's rows, `[batch, parts, tokens]`: each of the parts is another rank's where tokens are cut, and all of them are in each run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Rows {
    /// The dimension that is cut: 0 or 2.
    pub(super) dim: i64,
    /// The runs that are multiplied at once, by the exchange that they belong to.
    pub(super) exchanges: Vec<Vec<Range<i64>>>,
}

impl Rows {
    pub(super) fn new([batch, parts, tokens]: [i64; 3], chunks: Chunks) -> Self {
        let rows = batch * parts * tokens;
        let wanted = (rows / chunks.rows_min.max(1)).clamp(1, chunks.products_max.max(1));
        // Whole sequences lie one behind the other; parts of each of several do not.
        let (dim, len, step) = match batch >= wanted {
            true => (0, batch, 1),
            false if tokens / wanted >= ALIGNED => (2, tokens, ALIGNED),
            false => (2, tokens, 1),
        };
        let count = wanted.min(len).max(1);
        let ends = |at: i64| if at == count { len } else { at * len / count / step * step };
        let run = |at: i64| ends(at)..ends(at + 1);
        let groups = chunks.exchanges_max.clamp(1, count);
        let first = |group: i64| group * count / groups;
        let group = |number: i64| (first(number)..first(number + 1)).map(run).collect();
        Self { dim, exchanges: (0..groups).map(group).collect() }
    }

    /// From the first of these runs to the last.
    pub(super) fn over(runs: &[Range<i64>]) -> Range<i64> {
        let start = runs.first().map_or(0, |run| run.start);
        start..runs.last().map_or(start, |run| run.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exchanges_run_beside_products_on_gpus_and_between_nodes_alone() {
        for ranks in 1..=8 {
            for nodes in 1..=ranks {
                for on_gpus in [false, true] {
                    let chunks = Chunks::of((ranks, nodes), on_gpus);
                    let is_beside = chunks.exchanges_max > 1;
                    assert_eq!(is_beside, ranks > 1 && (on_gpus || nodes > 1), "{chunks:?}");
                    assert_eq!(chunks.products_max > 1, ranks > 1);
                }
            }
        }
    }

    /// Every shape up to 5 × 3 × 70: each row once and in order, runs that do not depend on the exchanges, none of them empty, and as many as wanted where there is room.
    #[test]
    fn every_row_is_in_one_run_whatever_is_exchanged_at_once() {
        let sizes = [0, 1, 2, 3, 5, 16, 31, 48, 64, 70];
        for (batch, parts) in [(0, 1), (1, 1), (1, 2), (2, 2), (3, 1), (4, 3), (5, 2)] {
            for tokens in sizes {
                for rows_min in [1, 3, 16] {
                    for products_max in 1..=5 {
                        let shape = [batch, parts, tokens];
                        let rows = |exchanges_max| {
                            Rows::new(shape, Chunks { rows_min, products_max, exchanges_max })
                        };
                        check(shape, (rows_min, products_max), rows);
                    }
                }
            }
        }
    }

    fn counted(count: usize) -> i64 {
        i64::try_from(count).expect("few")
    }

    fn check(shape: [i64; 3], (rows_min, products_max): (i64, i64), rows: impl Fn(i64) -> Rows) {
        let runs = |exchanges_max| rows(exchanges_max).exchanges.concat();
        let all = runs(1);
        assert_eq!(rows(1).exchanges.len(), 1);
        let dim = usize::try_from(rows(1).dim).expect("0 or 2");
        assert_eq!(
            all.iter().cloned().flatten().collect::<Vec<_>>(),
            Vec::from_iter(0..shape[dim])
        );
        let [batch, parts, tokens] = shape;
        let wanted = (batch * parts * tokens / rows_min).clamp(1, products_max);
        assert_eq!(counted(all.len()), wanted.min(shape[dim]).max(1), "{shape:?}");
        assert!(shape[dim] == 0 || all.iter().all(|run| !run.is_empty()), "{shape:?}: {all:?}");
        for exchanges_max in 1..=6 {
            assert_eq!(runs(exchanges_max), all);
            let found = rows(exchanges_max);
            assert_eq!(counted(found.exchanges.len()), exchanges_max.min(counted(all.len())));
            for exchange in &found.exchanges {
                assert!(!exchange.is_empty());
                let over = Rows::over(exchange);
                assert_eq!(
                    counted(exchange.iter().cloned().flatten().count()),
                    over.end - over.start
                );
            }
        }
    }

    #[test]
    fn long_runs_begin_where_a_whole_is_aligned() {
        let chunks = Chunks { rows_min: 1, products_max: 3, exchanges_max: 3 };
        assert_eq!(Rows::new([1, 2, 100], chunks).exchanges.concat(), [0..32, 32..64, 64..100]);
        assert_eq!(Rows::new([1, 2, 10], chunks).exchanges.concat(), [0..3, 3..6, 6..10]);
        assert_eq!(Rows::new([4, 2, 100], chunks).exchanges.concat(), [0..1, 1..2, 2..4]);
    }
}
