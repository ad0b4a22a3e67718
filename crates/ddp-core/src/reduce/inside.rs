//! Errors that arise inside a backward, outside of our hooks: in a custom function, or in a
//! recomputation. libtorch ends that backward with their text. The reducers that it would have
//! reached are told here, so that the other ranks hear of it at once, and
//! [`Ddp::backward`](crate::Ddp::backward) returns the error with its type.

use std::sync::{Arc, Mutex, Weak};

use super::{witness, Reducer};
use crate::{shim, Error};

/// Reducers, as a node of the graph remembers them.
pub(crate) type Reducers = Vec<Weak<Mutex<Reducer>>>;

/// Those of this thread: the one that trains.
pub(crate) fn of_this_thread() -> Reducers {
    witness::reducers().iter().map(Arc::downgrade).collect()
}

/// Ends the running backward of those of `reducers` that it reaches, and returns the text for libtorch.
pub(crate) fn fail_running(reducers: &Reducers, error: Error) -> String {
    let text = error.to_string();
    let mut error = Some(error);
    for shared in reducers.iter().filter_map(Weak::upgrade) {
        let Ok(mut reducer) = shared.lock() else { continue };
        if reducer.is_reached() {
            if let Some(Error::Comm(_)) = &error {
                // Of another group than the reducer's: those who wait in this one have not heard of it.
                reducer.store.group.abort(&text);
            }
            reducer.fail(error.take().unwrap_or_else(|| Error::Closure(text.clone().into())));
        }
    }
    text
}

impl Reducer {
    /// Whether the backward that is running has brought gradients, or will.
    fn is_reached(&self) -> bool {
        let Some(run) = self.run.as_ref().filter(|run| run.is_running() && !run.is_over) else {
            return false;
        };
        let parameters: Vec<_> = self.store.model.parameters().map(|named| &named.tensor).collect();
        run.is_open || shim::graph_reaches(&parameters).is_ok_and(|reached| reached.contains(&true))
    }
}
