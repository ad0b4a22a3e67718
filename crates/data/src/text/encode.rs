//! Text to tokens on all threads, in the order of the text.

#![expect(clippy::disallowed_types, reason = "the map is only looked up, never iterated")]

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use rayon::prelude::*;
use tokenizers::models::wordpiece::WordPiece;
use tokenizers::Model;

use super::chunk::Chunks;
use super::source::TextFile;
use super::vocabulary::WordCounts;
use super::words::{for_each, tokenizer_error};
use crate::cast::to_u64;
use crate::error::Result;
use crate::progress::{Event, Progress, Stage};

/// Chunks in flight for each thread: enough that a slow one does not make the others wait, few enough to bound memory.
const CHUNKS_PER_THREAD: usize = 16;

/// Words that a thread remembers; text with more different ones starts over.
const WORDS_MAX: usize = 1 << 20;

/// Counts the words of all files. Must run in a rayon pool.
pub(super) fn count_words(
    files: &[TextFile],
    lowercase: bool,
    progress: &dyn Progress,
) -> Result<WordCounts> {
    let mut total = WordCounts::new();
    for file in files {
        in_parallel(file, |chunks| {
            let counts = chunks
                .par_iter()
                .map(|chunk| {
                    let counts = count_chunk(chunk, lowercase);
                    advance(progress, Stage::Counting, chunk);
                    counts
                })
                .collect::<Result<Vec<_>>>()?;
            for (word, count) in counts.into_iter().flatten() {
                *total.entry(word).or_default() += count;
            }
            Ok(())
        })?;
    }
    Ok(total)
}

fn count_chunk(chunk: &str, lowercase: bool) -> Result<Vec<(String, u64)>> {
    let mut counts: HashMap<String, u64> = HashMap::new();
    for_each(chunk, lowercase, |word| {
        match counts.get_mut(word) {
            Some(count) => *count += 1,
            None => drop(counts.insert(word.to_owned(), 1)),
        }
        Ok(())
    })?;
    // The order is lost again in the sum.
    Ok(counts.into_iter().collect())
}

/// Turns words into tokens, and remembers them.
#[derive(Debug)]
pub(super) struct Encoder<'a> {
    model: &'a WordPiece,
    lowercase: bool,
    /// One for each thread of the pool, so that nobody waits.
    caches: Vec<Mutex<HashMap<String, Vec<u32>>>>,
}

impl<'a> Encoder<'a> {
    /// An encoder for the rayon pool that this is called in.
    pub(super) fn new(model: &'a WordPiece, lowercase: bool) -> Self {
        let caches = (0..rayon::current_num_threads()).map(|_| Mutex::default()).collect();
        Encoder { model, lowercase, caches }
    }

    /// Encodes a file and hands its tokens on, part after part, in order.
    pub(super) fn file(
        &self,
        file: &TextFile,
        progress: &dyn Progress,
        mut write: impl FnMut(&[u32]) -> Result<()>,
    ) -> Result<()> {
        in_parallel(file, |chunks| {
            let tokens = chunks
                .par_iter()
                .map(|chunk| {
                    let tokens = self.chunk(chunk);
                    advance(progress, Stage::Encoding, chunk);
                    tokens
                })
                .collect::<Result<Vec<_>>>()?;
            tokens.iter().try_for_each(|part| write(part))
        })
    }

    fn chunk(&self, chunk: &str) -> Result<Vec<u32>> {
        let thread = rayon::current_thread_index().unwrap_or(0) % self.caches.len();
        let mut cache = self.caches[thread].lock().unwrap_or_else(PoisonError::into_inner);
        if cache.len() > WORDS_MAX {
            cache.clear();
        }
        // English has some five letters a word and one token a word.
        let mut tokens = Vec::with_capacity(chunk.len() / 4);
        for_each(chunk, self.lowercase, |word| {
            if let Some(known) = cache.get(word) {
                tokens.extend_from_slice(known);
                return Ok(());
            }
            let pieces = self.model.tokenize(word).map_err(tokenizer_error("tokenise text"))?;
            let ids: Vec<u32> = pieces.into_iter().map(|piece| piece.id).collect();
            tokens.extend_from_slice(&ids);
            cache.insert(word.to_owned(), ids);
            Ok(())
        })?;
        Ok(tokens)
    }
}

/// Reads a file and hands out as many chunks at once as keep all threads busy.
fn in_parallel(file: &TextFile, mut work: impl FnMut(&[String]) -> Result<()>) -> Result<()> {
    let at_once = rayon::current_num_threads() * CHUNKS_PER_THREAD;
    let mut chunks = Chunks::open(&file.path)?;
    let mut waiting = Vec::with_capacity(at_once);
    while let Some(chunk) = chunks.next()? {
        waiting.push(chunk);
        if waiting.len() == at_once {
            work(&waiting)?;
            waiting.clear();
        }
    }
    work(&waiting)
}

fn advance(progress: &dyn Progress, stage: Stage, chunk: &str) {
    progress.report(Event::Advance { stage, bytes: to_u64(chunk.len()) });
}
