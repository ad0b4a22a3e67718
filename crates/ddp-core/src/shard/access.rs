//! How an operation on parameters that are not in memory finds who gathers them.
//!
//! libtorch calls a thread's record callback for each operation with its inputs, also on the
//! threads that run this thread's backward; the shim passes on those whose inputs include a shell
//! without memory.
#![expect(unsafe_code, reason = "gate: a list of tokens as the shim passes it")]

use std::cell::Cell;
use std::collections::BTreeMap;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};

use crate::reduce::{Reducer, Shared};
use crate::shim::Accesses;
use crate::Result;

/// Bits of a token that say which bucket; the others say whose.
pub(super) const BUCKET_BITS: u32 = 24;

/// By a gatherer's number: whose it is.
static OWNERS: Mutex<BTreeMap<u64, Weak<Mutex<Reducer>>>> = Mutex::new(BTreeMap::new());

thread_local! {
    /// Once they are there they stay as long as the thread: an operation without shells costs little.
    static ACCESSES: Cell<Option<ManuallyDrop<Accesses>>> = const { Cell::new(None) };
    static IS_UNSEEN: Cell<bool> = const { Cell::new(false) };
}

fn owners() -> MutexGuard<'static, BTreeMap<u64, Weak<Mutex<Reducer>>>> {
    OWNERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// From here on this thread's operations find the gatherer with this number.
pub(crate) fn register(id: u64, owner: &Weak<Mutex<Reducer>>) -> Result<()> {
    let mut owners = owners();
    owners.retain(|_, known| known.strong_count() > 0);
    owners.insert(id, Weak::clone(owner));
    drop(owners);
    let present = ACCESSES.take();
    let accesses = match present {
        Some(present) => present,
        None => ManuallyDrop::new(Accesses::add(on_access)?),
    };
    ACCESSES.set(Some(accesses));
    Ok(())
}

/// Runs `body`, whose operations need no parameters.
pub(crate) fn unseen<T>(body: impl FnOnce() -> T) -> T {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            IS_UNSEEN.set(self.0);
        }
    }
    let _restore = Restore(IS_UNSEEN.replace(true));
    body()
}

extern "C" fn on_access(tokens: *const u64, count: usize) {
    if count == 0 || IS_UNSEEN.get() {
        return;
    }
    // SAFETY: the shim passes `count` tokens that live as long as the call.
    let tokens = unsafe { std::slice::from_raw_parts(tokens, count) };
    if std::panic::catch_unwind(|| bring(tokens)).is_err() {
        tracing::error!("a panic while parameters were gathered");
    }
}

/// By gatherer: its buckets.
type Wanted = Vec<(u64, Vec<usize>)>;

fn bring(tokens: &[u64]) {
    let mut wanted: BTreeMap<u64, Vec<usize>> = BTreeMap::new();
    for token in tokens {
        let bucket = usize::try_from(token & ((1 << BUCKET_BITS) - 1)).unwrap_or(usize::MAX);
        let of = wanted.entry(token >> BUCKET_BITS).or_default();
        if !of.contains(&bucket) {
            of.push(bucket);
        }
    }
    // A model has a gatherer of parameters and one of what does not train: an operation on both needs them at once.
    let mut by_owner: Vec<(Shared, Wanted)> = Vec::new();
    for (id, buckets) in wanted {
        let found = owners().get(&id).and_then(Weak::upgrade);
        let Some(owner) = found else { continue };
        match by_owner.iter_mut().find(|(other, _)| Arc::ptr_eq(other, &owner)) {
            Some((_, all)) => all.push((id, buckets)),
            None => by_owner.push((owner, vec![(id, buckets)])),
        }
    }
    for (owner, buckets) in by_owner {
        let mut owner = match owner.try_lock() {
            Ok(owner) => owner,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            // Without memory the operation fails, and that is told.
            Err(TryLockError::WouldBlock) => continue,
        };
        owner.store.bring_for_operation(&buckets);
    }
}
