//! Words to tokens, remembered: language repeats itself, so that most words are looked up. And words counted.

#![expect(clippy::disallowed_types, reason = "maps are looked up, or lose their order in a sum")]

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::text::split::for_each;
use crate::text::vocabulary::WordCounts;

/// Words that a thread remembers; text with more different ones starts over. Some 30 MiB.
const WORDS_MAX: usize = 1 << 18;

/// Longer ones are rather numbers, codes and the like, which do not come again.
const WORD_BYTES_MAX: usize = 64;

/// A map that is asked for every word of the text; text that makes its keys collide slows down nobody but its owner.
type Map<K, V> = HashMap<K, V, ahash::RandomState>;

/// Something for each thread of a pool, so that nobody waits.
#[derive(Debug)]
struct PerThread<T>(Vec<Mutex<T>>);

impl<T: Default> PerThread<T> {
    /// For the rayon pool that this is called in.
    fn new() -> Self {
        PerThread((0..rayon::current_num_threads()).map(|_| Mutex::default()).collect())
    }

    fn of_this_thread(&self) -> MutexGuard<'_, T> {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.0.len();
        self.0[thread].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn into_parts(self) -> impl Iterator<Item = T> {
        self.0.into_iter().map(|part| part.into_inner().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Tokens of words.
#[derive(Debug)]
pub(crate) struct Memory(PerThread<Known>);

/// What one thread remembers.
#[derive(Debug, Default)]
pub(crate) struct Known(Map<Box<str>, Box<[u32]>>);

impl Memory {
    /// For the rayon pool that this is called in.
    pub(crate) fn new() -> Self {
        Memory(PerThread::new())
    }

    /// What the calling thread remembers.
    pub(crate) fn of_this_thread(&self) -> MutexGuard<'_, Known> {
        self.0.of_this_thread()
    }
}

impl Known {
    /// Appends the tokens of a word, asking `encode` if it is new.
    #[inline]
    pub(crate) fn push(
        &mut self,
        word: &str,
        tokens: &mut Vec<u32>,
        encode: impl FnOnce(&str) -> Result<Vec<u32>>,
    ) -> Result<()> {
        if let Some(known) = self.0.get(word) {
            tokens.extend_from_slice(known);
            return Ok(());
        }
        let ids = encode(word)?;
        tokens.extend_from_slice(&ids);
        if word.len() <= WORD_BYTES_MAX {
            if self.0.len() >= WORDS_MAX {
                self.0.clear();
            }
            self.0.insert(word.into(), ids.into());
        }
        Ok(())
    }
}

/// How often each word occurs, counted by all threads.
#[derive(Debug)]
pub(crate) struct Counter(PerThread<Counts>);

/// What one thread has counted.
#[derive(Debug, Default)]
pub(crate) struct Counts(Map<Box<str>, u64>);

impl Counter {
    /// For the rayon pool that this is called in.
    pub(crate) fn new() -> Self {
        Counter(PerThread::new())
    }

    /// What the calling thread counts.
    pub(crate) fn of_this_thread(&self) -> MutexGuard<'_, Counts> {
        self.0.of_this_thread()
    }

    /// The sum of all threads, which does not depend on who counted what.
    pub(crate) fn into_total(self) -> WordCounts {
        let mut total = WordCounts::new();
        for (word, count) in self.0.into_parts().flat_map(|part| part.0) {
            *total.entry(word.into()).or_default() += count;
        }
        total
    }
}

impl Counts {
    pub(crate) fn add(&mut self, text: &str, lowercase: bool) -> Result<()> {
        for_each(text, lowercase, |word| {
            match self.0.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(self.0.insert(word.into(), 1)),
            }
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut known, mut tokens) = (Known::default(), Vec::new());
        let long = "x".repeat(WORD_BYTES_MAX + 1);
        for word in ["a", "a", &long, &long] {
            known
                .push(word, &mut tokens, |word| Ok(vec![u32::try_from(word.len()).unwrap()]))
                .unwrap();
        }
        assert_eq!((tokens.as_slice(), known.0.len()), (&[1, 1, 65, 65][..], 1));
        for number in 0..=WORDS_MAX {
            known.push(&number.to_string(), &mut tokens, |_| Ok(vec![7])).unwrap();
        }
        assert!(known.0.len() <= WORDS_MAX, "{}", known.0.len());
        assert_eq!(tokens.len(), 4 + WORDS_MAX + 1);
    }
}
