//! The contents of a store: pure, so that the memory store and the server cannot differ.

use std::collections::BTreeMap;
use std::ops::Bound;

use super::StoreError;

/// Longest key, in bytes (PyTorch's limit).
pub(crate) const KEY_BYTES_MAX: usize = 8 << 10;
/// Longest value, in bytes (PyTorch's limit).
pub(crate) const VALUE_BYTES_MAX: usize = 8 << 20;
/// All keys and values together, in bytes: the store carries addresses, and its host has other work for its memory.
pub(crate) const STORE_BYTES_MAX: usize = 256 << 20;

/// The keys and their values, in key order.
#[derive(Debug, Default)]
pub(crate) struct KeyTable {
    entries: BTreeMap<String, Vec<u8>>,
    bytes: usize,
}

/// Checks the limits before anything is stored or sent.
pub(crate) fn check_key(key: &str) -> Result<(), StoreError> {
    if key.len() > KEY_BYTES_MAX {
        return Err(StoreError::KeyTooLong { bytes: key.len(), max: KEY_BYTES_MAX });
    }
    Ok(())
}

/// As [`check_key`], with the value that goes with it.
pub(crate) fn check_entry(key: &str, value: &[u8]) -> Result<(), StoreError> {
    check_key(key)?;
    if value.len() > VALUE_BYTES_MAX {
        return Err(StoreError::ValueTooLong {
            key: key.to_owned(),
            bytes: value.len(),
            max: VALUE_BYTES_MAX,
        });
    }
    Ok(())
}

impl KeyTable {
    pub(crate) fn set(&mut self, key: &str, value: &[u8]) -> Result<(), StoreError> {
        check_entry(key, value)?;
        let old = self.entries.get(key).map_or(0, |old| key.len() + old.len());
        let bytes = self.bytes - old + key.len() + value.len();
        if bytes > STORE_BYTES_MAX {
            return Err(StoreError::Full { max: STORE_BYTES_MAX });
        }
        self.bytes = bytes;
        self.entries.insert(key.to_owned(), value.to_vec());
        Ok(())
    }

    pub(crate) fn get(&self, key: &str) -> Option<&[u8]> {
        self.entries.get(key).map(Vec::as_slice)
    }

    pub(crate) fn add(&mut self, key: &str, delta: i64) -> Result<i64, StoreError> {
        let not_a_counter = || StoreError::NotACounter { key: key.to_owned() };
        let old = match self.get(key) {
            None => 0,
            Some(text) => std::str::from_utf8(text)
                .ok()
                .and_then(|text| text.parse::<i64>().ok())
                .ok_or_else(not_a_counter)?,
        };
        let new = old.checked_add(delta).ok_or_else(not_a_counter)?;
        self.set(key, new.to_string().as_bytes())?;
        Ok(new)
    }

    pub(crate) fn compare_set(
        &mut self,
        key: &str,
        expected: Option<&[u8]>,
        desired: &[u8],
    ) -> Result<Option<Vec<u8>>, StoreError> {
        check_entry(key, desired)?;
        if self.get(key) == expected {
            self.set(key, desired)?;
        }
        Ok(self.get(key).map(<[u8]>::to_vec))
    }

    pub(crate) fn delete(&mut self, key: &str) -> bool {
        match self.entries.remove(key) {
            Some(old) => {
                self.bytes -= key.len() + old.len();
                true
            }
            None => false,
        }
    }

    pub(crate) fn has_all(&self, keys: &[&str]) -> bool {
        keys.iter().all(|&key| self.entries.contains_key(key))
    }

    pub(crate) fn list(&self, prefix: &str) -> Vec<String> {
        self.entries
            .range::<str, _>((Bound::Included(prefix), Bound::Unbounded))
            .map(|(key, _)| key)
            .take_while(|key| key.starts_with(prefix))
            .cloned()
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_start_at_zero_and_read_as_decimal_text() {
        let mut table = KeyTable::default();
        assert_eq!(table.add("n", 5).unwrap(), 5);
        assert_eq!(table.add("n", -7).unwrap(), -2);
        assert_eq!(table.get("n"), Some(&b"-2"[..]));
    }

    #[test]
    fn add_refuses_what_is_not_a_counter_and_what_overflows() {
        let mut table = KeyTable::default();
        table.set("text", b"hello").unwrap();
        assert!(matches!(table.add("text", 1), Err(StoreError::NotACounter { .. })));
        table.set("big", i64::MAX.to_string().as_bytes()).unwrap();
        assert!(matches!(table.add("big", 1), Err(StoreError::NotACounter { .. })));
        assert_eq!(table.get("text"), Some(&b"hello"[..]));
    }

    #[test]
    fn compare_set_writes_only_on_a_match() {
        let mut table = KeyTable::default();
        assert_eq!(table.compare_set("k", Some(b"x"), b"a").unwrap(), None);
        assert_eq!(table.compare_set("k", None, b"a").unwrap(), Some(b"a".to_vec()));
        assert_eq!(table.compare_set("k", None, b"b").unwrap(), Some(b"a".to_vec()));
        assert_eq!(table.compare_set("k", Some(b"a"), b"c").unwrap(), Some(b"c".to_vec()));
    }

    #[test]
    fn limits_are_errors_and_leave_the_table_as_it_was() {
        let mut table = KeyTable::default();
        let long_key = "k".repeat(KEY_BYTES_MAX + 1);
        assert!(matches!(table.set(&long_key, b""), Err(StoreError::KeyTooLong { .. })));
        let long_value = vec![0; VALUE_BYTES_MAX + 1];
        assert!(matches!(table.set("k", &long_value), Err(StoreError::ValueTooLong { .. })));
        assert!(table.list("").is_empty());
    }

    #[test]
    fn the_sum_of_all_entries_is_bounded_and_deleting_makes_room() {
        let mut table = KeyTable::default();
        let value = vec![0; VALUE_BYTES_MAX];
        let mut stored = 0;
        while table.set(&format!("{stored:04}"), &value).is_ok() {
            stored += 1;
        }
        assert_eq!(stored, (STORE_BYTES_MAX - 1) / (VALUE_BYTES_MAX + 4));
        assert!(table.delete("0000"));
        table.set("next", &value).unwrap();
    }

    #[test]
    fn list_gives_the_keys_of_one_prefix_in_order() {
        let mut table = KeyTable::default();
        for key in ["b/2", "a/1", "b/10", "c"] {
            table.set(key, b"").unwrap();
        }
        assert_eq!(table.list("b/"), ["b/10", "b/2"]);
        assert_eq!(table.list("").len(), 4);
        assert!(table.has_all(&["c", "a/1"]));
        assert!(!table.has_all(&["c", "d"]));
    }
}
