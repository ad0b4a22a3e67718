//! Words to tokens, remembered: language repeats itself, so that most words are looked up.

#![expect(clippy::disallowed_types, reason = "the map is only looked up, never iterated")]

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::error::Result;
use crate::text::split::for_each;

/// Words that a thread remembers; text with more different ones starts over.
const WORDS_MAX: usize = 1 << 20;

/// Tokens of words, one map for each thread of a pool, so that nobody waits.
#[derive(Debug)]
pub(crate) struct Memory(Vec<Mutex<Known>>);

/// What one thread remembers.
#[derive(Debug, Default)]
pub(crate) struct Known(HashMap<Box<str>, Box<[u32]>>);

impl Memory {
    /// For the rayon pool that this is called in.
    pub(crate) fn new() -> Self {
        Memory((0..rayon::current_num_threads()).map(|_| Mutex::default()).collect())
    }

    /// What the calling thread remembers.
    pub(crate) fn of_this_thread(&self) -> MutexGuard<'_, Known> {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.0.len();
        let mut known = self.0[thread].lock().unwrap_or_else(PoisonError::into_inner);
        if known.0.len() > WORDS_MAX {
            known.0.clear();
        }
        known
    }
}

impl Known {
    /// Appends the tokens of a word, asking `encode` if it is new.
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
        self.0.insert(word.into(), ids.into());
        Ok(())
    }
}

/// How often each word occurs.
#[derive(Debug, Default)]
pub(crate) struct Counts(HashMap<String, u64>);

impl Counts {
    pub(crate) fn add(&mut self, text: &str, lowercase: bool) -> Result<()> {
        for_each(text, lowercase, |word| {
            match self.0.get_mut(word) {
                Some(count) => *count += 1,
                None => drop(self.0.insert(word.to_owned(), 1)),
            }
            Ok(())
        })
    }

    /// In no order: it is lost again in the sum.
    pub(crate) fn into_parts(self) -> impl Iterator<Item = (String, u64)> {
        self.0.into_iter()
    }
}
