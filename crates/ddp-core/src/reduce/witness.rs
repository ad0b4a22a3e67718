//! Notices each backward of a thread, also one that reaches no wrapped parameter: a model that was
//! changed may have lost the hooks by which its backward would be noticed otherwise.
//!
//! libtorch calls a thread's record callback for each node that a backward runs; the shim passes on
//! the first of each backward, and the reducers of the thread are told.

use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, Weak};

use super::Reducer;
use crate::shim;
use crate::Result;

#[derive(Default)]
struct Registry {
    reducers: Vec<Weak<Mutex<Reducer>>>,
    /// Removed by the last `Ddp` of the thread, never by the end of the thread: libtorch's own state may be
    /// gone by then.
    witness: Option<ManuallyDrop<shim::Witness>>,
}

thread_local! {
    static REGISTRY: RefCell<Registry> = RefCell::default();
}

/// Tells the reducer of this thread's backwards.
pub(super) fn register(shared: &Arc<Mutex<Reducer>>) -> Result<()> {
    REGISTRY.with_borrow_mut(|registry| {
        if registry.witness.is_none() {
            registry.witness = Some(ManuallyDrop::new(shim::Witness::add(on_backward)?));
        }
        registry.reducers.push(Arc::downgrade(shared));
        Ok(())
    })
}

/// Forgets the reducer, if it is this thread's.
pub(super) fn unregister(shared: &Arc<Mutex<Reducer>>) {
    // At the end of a thread there may be nothing to borrow.
    _ = REGISTRY.try_with(|registry| {
        let Ok(mut registry) = registry.try_borrow_mut() else { return };
        registry.reducers.retain(|weak| {
            weak.strong_count() > 0 && !std::ptr::eq(weak.as_ptr(), Arc::as_ptr(shared))
        });
        if registry.reducers.is_empty() {
            drop(registry.witness.take().map(ManuallyDrop::into_inner));
        }
    });
}

/// The reducers made on this thread, in the order in which they were made: the same on every rank.
pub(super) fn reducers() -> Vec<Arc<Mutex<Reducer>>> {
    REGISTRY
        .try_with(|registry| registry.borrow().reducers.iter().filter_map(Weak::upgrade).collect())
        .unwrap_or_default()
}

extern "C" fn on_backward() {
    let told = std::panic::catch_unwind(|| {
        for shared in reducers() {
            super::on_beginning(&shared);
        }
    });
    if told.is_err() {
        tracing::error!("a panic while the beginning of a backward was noted");
    }
}
