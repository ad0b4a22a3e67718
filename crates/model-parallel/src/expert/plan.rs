//! Which token goes to which expert, and in which row: pure.
//!
//! Rows are ordered by expert and, for each, by the token's position. What an expert takes no more of is dropped in order of position: the first
//! tokens stay, whether it was their first choice or a later one.

/// Rows for experts, made of choices of tokens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// By row: the choice (token · k + number of the choice) that it is for.
    pub(super) choice_of_row: Vec<i64>,
    /// By choice: its row, or the number of rows where it was dropped.
    pub(super) row_of_choice: Vec<i64>,
    /// By expert: its rows.
    pub(super) counts: Vec<i64>,
    /// By expert: the choices that it got no row for.
    pub(super) dropped: Vec<i64>,
}

impl Plan {
    /// `experts` by choice; of each expert at most `capacity` rows.
    pub(super) fn new(experts: &[i64], expert_count: usize, capacity: Option<i64>) -> Self {
        let mut chosen = vec![Vec::new(); expert_count];
        let mut dropped = vec![0; expert_count];
        for (choice, &expert) in (0_i64..).zip(experts) {
            let expert = usize::try_from(expert).unwrap_or(0);
            let rows: &mut Vec<i64> = &mut chosen[expert];
            if capacity.is_some_and(|capacity| length(rows) >= capacity) {
                dropped[expert] += 1;
            } else {
                rows.push(choice);
            }
        }
        let counts = chosen.iter().map(|rows| length(rows)).collect();
        let choice_of_row = chosen.concat();
        let mut row_of_choice = vec![length(&choice_of_row); experts.len()];
        for (row, &choice) in (0_i64..).zip(&choice_of_row) {
            row_of_choice[usize::try_from(choice).unwrap_or(0)] = row;
        }
        Self { choice_of_row, row_of_choice, counts, dropped }
    }
}

fn length<T>(list: &[T]) -> i64 {
    i64::try_from(list.len()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn index(number: i64) -> usize {
        usize::try_from(number).expect("not negative")
    }

    /// All assignments of so many choices to so many experts.
    fn assignments(choices: usize, experts: i64) -> Vec<Vec<i64>> {
        (0..choices).fold(vec![Vec::new()], |all, _| {
            let longer = |so_far: &Vec<i64>| {
                let so_far = so_far.clone();
                (0..experts).map(move |expert| [so_far.as_slice(), &[expert]].concat())
            };
            all.iter().flat_map(longer).collect()
        })
    }

    #[test]
    fn every_choice_has_one_row_or_is_dropped_behind_those_that_stay() {
        for choices in 0..=6 {
            for chosen in assignments(choices, 3) {
                for capacity in [None, Some(0), Some(1), Some(2), Some(6)] {
                    let plan = Plan::new(&chosen, 3, capacity);
                    let rows = plan.choice_of_row.len();
                    assert_eq!(plan.counts.iter().sum::<i64>(), length(&plan.choice_of_row));
                    let expert = |row: usize| chosen[index(plan.choice_of_row[row])];
                    // By expert and then by position.
                    let order = |row: usize| (expert(row), plan.choice_of_row[row]);
                    assert!((1..rows).all(|row| order(row - 1) < order(row)));
                    for (choice, &row) in plan.row_of_choice.iter().enumerate() {
                        let of_expert = |e: &&i64| **e == chosen[choice];
                        let before: Vec<_> = chosen[..choice].iter().filter(of_expert).collect();
                        let stays = capacity.is_none_or(|capacity| length(&before) < capacity);
                        assert_eq!(index(row) < rows, stays);
                        if stays {
                            assert_eq!(index(plan.choice_of_row[index(row)]), choice);
                        }
                    }
                    for number in 0..3 {
                        let all: Vec<_> = chosen.iter().filter(|e| **e == number).collect();
                        let at = index(number);
                        assert_eq!(plan.counts[at] + plan.dropped[at], length(&all));
                    }
                }
            }
        }
    }
}
