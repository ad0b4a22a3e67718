//! A store for the threads of one process: tests, and groups whose ranks are threads.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::table::{check_key, KeyTable};
use super::{Store, StoreError};

#[derive(Debug, Default)]
struct Shared {
    table: Mutex<KeyTable>,
    changed: Condvar,
}

/// A [`Store`] in this process's memory.
///
/// A clone is another handle to the same contents, with a [`cancel`](Store::cancel) of its own.
///
/// # Example
///
/// ```
/// use std::time::{Duration, Instant};
/// use phalanx_rendezvous::{MemoryStore, Store};
///
/// let store = MemoryStore::new();
/// let other = store.clone();
/// std::thread::spawn(move || other.set("address", b"10.0.0.1:4000"));
/// let value = store.get("address", Instant::now() + Duration::from_secs(5))?;
/// assert_eq!(value, b"10.0.0.1:4000");
/// # Ok::<(), phalanx_rendezvous::StoreError>(())
/// ```
#[derive(Debug, Default)]
pub struct MemoryStore {
    shared: Arc<Shared>,
    cancelled: AtomicBool,
}

impl MemoryStore {
    /// An empty store.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    fn table(&self) -> MutexGuard<'_, KeyTable> {
        // Every operation of Table leaves it whole, so a panic of another thread harms nothing.
        self.shared.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changing<R>(&self, change: impl FnOnce(&mut KeyTable) -> R) -> R {
        let result = change(&mut self.table());
        self.shared.changed.notify_all();
        result
    }
}

impl Clone for MemoryStore {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared), cancelled: AtomicBool::new(false) }
    }
}

impl Store for MemoryStore {
    fn set(&self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        self.changing(|table| table.set(key, value))
    }

    fn get(&self, key: &str, deadline: Instant) -> Result<Vec<u8>, StoreError> {
        check_key(key)?;
        let start = Instant::now();
        let mut table = self.table();
        loop {
            if let Some(value) = table.get(key) {
                return Ok(value.to_vec());
            }
            if self.cancelled.load(Ordering::Acquire) {
                return Err(StoreError::Cancelled { key: key.to_owned() });
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(StoreError::Timeout { key: key.to_owned(), waited: start.elapsed() });
            }
            table = self
                .shared
                .changed
                .wait_timeout(table, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    fn add(&self, key: &str, delta: i64) -> Result<i64, StoreError> {
        self.changing(|table| table.add(key, delta))
    }

    fn compare_set(
        &self,
        key: &str,
        expected: Option<&[u8]>,
        desired: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        self.changing(|table| table.compare_set(key, expected, desired))
    }

    fn delete(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.table().delete(key))
    }

    fn check(&self, keys: &[&str]) -> Result<bool, StoreError> {
        Ok(self.table().has_all(keys))
    }

    fn list(&self, prefix: &str) -> Result<Vec<String>, StoreError> {
        Ok(self.table().list(prefix))
    }

    fn cancel(&self) {
        // Under the lock: a waiter that has just seen `false` is asleep by the time we notify.
        let table = self.table();
        self.cancelled.store(true, Ordering::Release);
        drop(table);
        self.shared.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    #[test]
    fn a_get_waits_for_the_set_of_another_thread() {
        let store = MemoryStore::new();
        let waiter = store.clone();
        let thread = thread::spawn(move || waiter.get("k", soon()));
        store.set("k", b"v").unwrap();
        assert_eq!(thread.join().unwrap().unwrap(), b"v");
    }

    #[test]
    fn a_get_without_a_set_times_out_naming_the_key() {
        let store = MemoryStore::new();
        let error = store.get("ranks/3", Instant::now() + Duration::from_millis(20)).unwrap_err();
        assert!(error.to_string().contains("ranks/3"), "{error}");
    }

    #[test]
    fn cancel_ends_the_waits_of_its_own_handle_only() {
        let store = MemoryStore::new();
        let cancelled = Arc::new(store.clone());
        let waiter = Arc::clone(&cancelled);
        let thread = thread::spawn(move || waiter.get("k", soon()));
        cancelled.cancel();
        assert!(matches!(thread.join().unwrap(), Err(StoreError::Cancelled { .. })));
        store.set("k", b"v").unwrap();
        assert_eq!(store.get("k", soon()).unwrap(), b"v");
    }

    #[test]
    fn counters_of_many_threads_lose_nothing() {
        let store = MemoryStore::new();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..250).for_each(|_| assert!(store.add("n", 1).unwrap() > 0)));
            }
        });
        assert_eq!(store.add("n", 0).unwrap(), 1000);
    }
}
