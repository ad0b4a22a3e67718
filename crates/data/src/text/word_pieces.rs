//! `WordPiece` without what costs most of the crate's time: strings that are built for every part
//! of a word that is looked up.
//!
//! From its start a word is cut into the longest entries of the vocabulary. Entries that continue a
//! word are kept without their mark, and no part is looked up that is longer than all of them.
//! Words that are no pieces are left to the crate.
//! Source: `tokenizers` 0.22, `models/wordpiece/mod.rs`.

use tokenizers::models::wordpiece::WordPiece;
use tokenizers::Model;

use super::split::tokenizer_error;
use super::words::FastMap;
use crate::error::Result;

/// The pieces of words.
#[derive(Debug)]
pub(super) struct WordPieces {
    model: WordPiece,
    first: Entries,
    later: Entries,
}

/// Entries that stand at one kind of place.
#[derive(Debug, Default)]
struct Entries {
    ids: FastMap<Box<str>, u32>,
    bytes_max: usize,
}

impl Entries {
    fn add(&mut self, entry: &str, id: u32) {
        self.bytes_max = self.bytes_max.max(entry.len());
        self.ids.insert(entry.into(), id);
    }

    /// The longest entry that a text begins with: its length and id.
    fn longest(&self, text: &str) -> Option<(usize, u32)> {
        let mut len = text.floor_char_boundary(self.bytes_max);
        while len > 0 {
            if let Some(&id) = self.ids.get(&text[..len]) {
                return Some((len, id));
            }
            len = text.floor_char_boundary(len - 1);
        }
        None
    }
}

impl WordPieces {
    pub(super) fn new(model: WordPiece) -> Self {
        let (mut first, mut later) = (Entries::default(), Entries::default());
        for (entry, id) in model.get_vocab() {
            first.add(&entry, id);
            if let Some(rest) = entry.strip_prefix(&*model.continuing_subword_prefix) {
                later.add(rest, id);
            }
        }
        WordPieces { model, first, later }
    }

    /// The ids of a word.
    pub(super) fn encode(&self, word: &str) -> Result<Vec<u32>> {
        if let Some(ids) = self.pieces(word) {
            return Ok(ids);
        }
        let tokens = self.model.tokenize(word).map_err(tokenizer_error("tokenise text"))?;
        Ok(tokens.into_iter().map(|token| token.id).collect())
    }

    /// The ids of a word that is not too long and all pieces.
    fn pieces(&self, word: &str) -> Option<Vec<u32>> {
        let chars_max = self.model.max_input_chars_per_word;
        // Bytes are no fewer than characters.
        if word.len() > chars_max && word.chars().count() > chars_max {
            return None;
        }
        let (mut ids, mut rest) = (Vec::new(), word);
        while !rest.is_empty() {
            let entries = if ids.is_empty() { &self.first } else { &self.later };
            let (len, id) = entries.longest(rest)?;
            ids.push(id);
            rest = &rest[len..];
        }
        Some(ids)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;

    fn pieces(prefix: &str) -> WordPieces {
        let of_word = ["a", "b", "ab", "abba", "é", "éa", "文字", "##", "##b", "#", "", "x"];
        let later =
            ["a", "b", "ba", "bab", "é", "字", "aéa", ""].map(|one| format!("{prefix}{one}"));
        let mut vocab = ahash::AHashMap::from([("[UNK]".to_owned(), 0)]);
        for entry in of_word.map(str::to_owned).into_iter().chain(later) {
            let id = u32::try_from(vocab.len()).unwrap();
            vocab.entry(entry).or_insert(id);
        }
        let model = WordPiece::builder().vocab(vocab).max_input_chars_per_word(9);
        let model = model.continuing_subword_prefix(prefix.to_owned());
        WordPieces::new(model.build().unwrap())
    }

    static ALL: LazyLock<[WordPieces; 3]> = LazyLock::new(|| ["##", "", "é"].map(pieces));

    proptest! {
        #[test]
        fn any_word_has_the_pieces_of_the_tokenizers_crate(word in "[ab#éx文字]{0,11}") {
            for ours in &*ALL {
                let theirs = ours.model.tokenize(&word).unwrap();
                let expected: Vec<u32> = theirs.into_iter().map(|token| token.id).collect();
                prop_assert_eq!(ours.encode(&word).unwrap(), expected);
            }
        }
    }

    #[test]
    fn most_words_do_not_need_the_crate() {
        let ours = &ALL[0];
        assert_eq!(ours.pieces("abbabab").map(|ids| ids.len()), Some(2));
        assert_eq!((ours.pieces("文"), ours.pieces("abbaabbaab")), (None, None));
        assert_eq!(ours.encode("文").unwrap(), [0]);
    }
}
