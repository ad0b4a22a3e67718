//! What a checkpoint's values have of each part of a model: brought together, and each part's own found again.
//!
//! One rank of each part tells what it has: those that are first among the ranks with the same part.

use serde::{Deserialize, Serialize};

use super::training::Values;
use crate::optim::saved::Numbers;
use crate::store::Store;
use crate::{Error, Result};

/// What a part tells.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Told {
    /// The rank of the model.
    rank: usize,
    ready_order: Option<Vec<String>>,
    optimizer: Option<Numbers>,
}

/// Makes one of the values of all parts. Collective where there are any.
pub(super) fn merge(store: &mut Store, values: &mut Values) -> Result<()> {
    let is_first = store.group.rank() == 0;
    let Some(part) = &mut store.part else { return Ok(()) };
    let mine = Told {
        rank: part.model.rank(),
        ready_order: values.ready_order.take(),
        optimizer: values.optimizer.clone(),
    };
    let tells = if is_first { serde_json::to_vec(&mine) } else { Ok(Vec::new()) };
    let tells = tells.map_err(Error::closure)?;
    let told = part.world.tagged("values of the parts").all_gather_bytes(&tells)?;
    let told = told.iter().filter(|text| !text.is_empty());
    let told = told.map(|text| serde_json::from_slice(text));
    let mut told: Vec<Told> = told.collect::<Result<_, _>>().map_err(Error::closure)?;
    told.sort_by_key(|one| one.rank);
    for numbers in told.iter().filter_map(|one| one.optimizer.as_ref()) {
        if let Some(all) = &mut values.optimizer {
            all.take_in(numbers);
        }
    }
    values.ready_order = order(told.into_iter().map(|one| one.ready_order));
    Ok(())
}

/// The order in which gradients of the whole model become ready: those of the last layers first. None where a part has none. Pure.
fn order(of_parts: impl DoubleEndedIterator<Item = Option<Vec<String>>>) -> Option<Vec<String>> {
    let mut all: Vec<String> = Vec::new();
    let mut known = std::collections::BTreeSet::new();
    for names in of_parts.rev() {
        all.extend(names?.into_iter().filter(|name| known.insert(name.clone())));
    }
    Some(all)
}

/// This part's own of the order of the whole model.
pub(super) fn own_order(store: &Store, order: &[String]) -> Vec<String> {
    let is_own = |name: &&String| {
        store.part.is_none() || store.model.parameters().any(|named| named.name == **name)
    };
    order.iter().filter(is_own).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_layers_come_first_and_each_name_once() {
        let names = |list: &[&str]| Some(list.iter().map(|&name| name.to_owned()).collect());
        let parts = [names(&["b", "a"]), names(&["b", "a"]), names(&["d", "c", "a"])];
        assert_eq!(order(parts.into_iter()), names(&["d", "c", "a", "b"]));
        assert_eq!(order([names(&["a"]), None].into_iter()), None);
    }
}
