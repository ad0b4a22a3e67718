//! Words to tokens, remembered: language repeats itself, so that most words are looked up. And
//! words counted.

#![expect(clippy::disallowed_types, reason = "maps are looked up, or lose their order in a sum")]

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rayon::prelude::*;

use super::split::{for_each, of_piece, WordVisitor};
use super::vocabulary::WordCounts;
use crate::error::Result;

/// Words that a thread remembers; text with more different ones starts over. Some 30 MiB.
const WORDS_MAX: usize = 1 << 18;

/// The same of pieces that are not ASCII and have to be split into words: less than the words,
/// which they are also made of.
const PIECES_MAX: usize = 1 << 16;

/// Longer ones are rather numbers, codes and the like, which do not come again.
const WORD_BYTES_MAX: usize = 64;

/// A map that is asked for every word of the text; text that makes its keys collide slows down
/// nobody but its owner.
pub(super) type FastMap<K, V> = HashMap<K, V, ahash::RandomState>;

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
pub(crate) struct TokenCaches(PerThread<TokenCache>);

/// What one thread remembers.
#[derive(Debug, Default)]
pub(crate) struct TokenCache {
    words: FastMap<Box<str>, Box<[u32]>>,
    pieces: FastMap<Box<str>, Box<[u32]>>,
}

impl TokenCaches {
    /// For the rayon pool that this is called in.
    pub(crate) fn new() -> Self {
        TokenCaches(PerThread::new())
    }

    /// What the calling thread remembers.
    pub(crate) fn of_this_thread(&self) -> MutexGuard<'_, TokenCache> {
        self.0.of_this_thread()
    }
}

impl TokenCache {
    /// Appends the tokens of a word, asking `encode` if it is new.
    #[inline]
    pub(crate) fn push(
        &mut self,
        word: &str,
        tokens: &mut Vec<u32>,
        encode: impl FnOnce(&str) -> Result<Vec<u32>>,
    ) -> Result<()> {
        if let Some(known) = self.words.get(word) {
            tokens.extend_from_slice(known);
            return Ok(());
        }
        let ids = encode(word)?;
        tokens.extend_from_slice(&ids);
        if word.len() <= WORD_BYTES_MAX {
            if self.words.len() >= WORDS_MAX {
                self.words.clear();
            }
            self.words.insert(word.into(), ids.into());
        }
        Ok(())
    }
}

/// Appends the tokens of words; `encode` is asked for new ones.
pub(crate) struct TokenAppender<'a, F> {
    pub(crate) known: &'a mut TokenCache,
    pub(crate) tokens: &'a mut Vec<u32>,
    pub(crate) encode: F,
}

impl<F: Fn(&str) -> Result<Vec<u32>>> WordVisitor for TokenAppender<'_, F> {
    #[inline]
    fn word(&mut self, word: &str) -> Result<()> {
        self.known.push(word, self.tokens, &self.encode)
    }

    fn piece(&mut self, piece: &str, lowercase: bool) -> Result<()> {
        if let Some(known) = self.known.pieces.get(piece) {
            self.tokens.extend_from_slice(known);
            return Ok(());
        }
        let before = self.tokens.len();
        of_piece(piece, lowercase, |word| self.word(word))?;
        if piece.len() <= WORD_BYTES_MAX {
            if self.known.pieces.len() >= PIECES_MAX {
                self.known.pieces.clear();
            }
            self.known.pieces.insert(piece.into(), self.tokens[before..].into());
        }
        Ok(())
    }
}

/// How often each word occurs, counted by all threads.
#[derive(Debug)]
pub(crate) struct Counter(PerThread<ThreadWordCounts>);

/// What one thread has counted.
#[derive(Debug, Default)]
pub(crate) struct ThreadWordCounts {
    words: FastMap<Box<str>, u64>,
    /// Pieces that are not ASCII, whose words are not counted yet.
    pieces: FastMap<Box<str>, u64>,
}

impl Counter {
    /// For the rayon pool that this is called in.
    pub(crate) fn new() -> Self {
        Counter(PerThread::new())
    }

    /// What the calling thread counts.
    pub(crate) fn of_this_thread(&self) -> MutexGuard<'_, ThreadWordCounts> {
        self.0.of_this_thread()
    }

    /// The sum of all threads, which does not depend on who counted what; `lowercase` is that of
    /// the words.
    pub(crate) fn into_total(self, lowercase: bool) -> Result<WordCounts> {
        let mut all: Vec<(Box<str>, u64)> = Vec::new();
        for mut part in self.0.into_parts() {
            part.split_pieces(lowercase)?;
            all.extend(part.words);
        }
        // Sorted words become a tree in one pass.
        all.par_sort_unstable();
        all.dedup_by(|(word, count), (before, sum)| {
            let is_same = word == before;
            *sum += if is_same { *count } else { 0 };
            is_same
        });
        Ok(all.into_iter().map(|(word, count)| (word.into(), count)).collect())
    }
}

impl ThreadWordCounts {
    pub(crate) fn add(&mut self, text: &str, lowercase: bool) -> Result<()> {
        for_each(text, lowercase, &mut *self)
    }

    fn split_pieces(&mut self, lowercase: bool) -> Result<()> {
        for (piece, count) in std::mem::take(&mut self.pieces) {
            of_piece(&piece, lowercase, |word| {
                add(&mut self.words, word, count);
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl WordVisitor for &mut ThreadWordCounts {
    #[inline]
    fn word(&mut self, word: &str) -> Result<()> {
        add(&mut self.words, word, 1);
        Ok(())
    }

    fn piece(&mut self, piece: &str, lowercase: bool) -> Result<()> {
        if piece.len() > WORD_BYTES_MAX {
            return of_piece(piece, lowercase, |word| self.word(word));
        }
        add(&mut self.pieces, piece, 1);
        if self.pieces.len() >= PIECES_MAX {
            self.split_pieces(lowercase)?;
        }
        Ok(())
    }
}

fn add(counts: &mut FastMap<Box<str>, u64>, word: &str, more: u64) {
    match counts.get_mut(word) {
        Some(count) => *count += more,
        None => drop(counts.insert(word.into(), more)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_remembered_is_bounded() {
        let (mut known, mut tokens) = (TokenCache::default(), Vec::new());
        let long = "x".repeat(WORD_BYTES_MAX + 1);
        for word in ["a", "a", &long, &long] {
            known
                .push(word, &mut tokens, |word| Ok(vec![u32::try_from(word.len()).unwrap()]))
                .unwrap();
        }
        assert_eq!((tokens.as_slice(), known.words.len()), (&[1, 1, 65, 65][..], 1));
        for number in 0..=WORDS_MAX {
            known.push(&number.to_string(), &mut tokens, |_| Ok(vec![7])).unwrap();
        }
        assert!(known.words.len() <= WORDS_MAX, "{}", known.words.len());
        assert_eq!(tokens.len(), 4 + WORDS_MAX + 1);
    }

    /// Pieces that are not ASCII: known, new, more than are remembered, and some too long for that.
    fn foreign() -> String {
        let more = |number: usize| if number.is_multiple_of(500) { "Ёлка ß1 " } else { "" };
        let some = (0..PIECES_MAX + 1000).map(|number| format!("ä{number} {}", more(number)));
        let long = format!("{} {0}", "Öl,".repeat(WORD_BYTES_MAX));
        some.chain([long]).collect()
    }

    #[test]
    fn words_of_remembered_pieces_are_the_words_of_the_text() {
        let text = foreign();
        let (mut known, mut tokens, mut expected) = (TokenCache::default(), Vec::new(), Vec::new());
        let encode = |word: &str| Ok(word.bytes().map(u32::from).collect::<Vec<u32>>());
        for_each(&text, true, TokenAppender { known: &mut known, tokens: &mut tokens, encode })
            .unwrap();
        for_each(&text, true, |word: &str| {
            expected.extend(word.bytes().map(u32::from));
            Ok(())
        })
        .unwrap();
        assert!(tokens == expected && known.pieces.len() < PIECES_MAX);
    }

    #[test]
    fn words_of_counted_pieces_are_counted_as_often_as_they_stand_in_the_text() {
        let text = foreign();
        let counter = Counter::new();
        let mut expected = WordCounts::new();
        for part in [&text[..], "ß3 Ёлка the the", &text] {
            counter.of_this_thread().add(part, true).unwrap();
            for_each(part, true, |word: &str| {
                *expected.entry(word.to_owned()).or_default() += 1;
                Ok(())
            })
            .unwrap();
        }
        let total = counter.into_total(true).unwrap();
        assert!(total == expected && total["елка"] == 2 * 134 + 1, "{}", total["елка"]);
    }
}
