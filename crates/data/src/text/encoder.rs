//! Text to tokens with any `tokenizer.json`.
//!
//! The `tokenizers` crate keeps track of where each token came from, which costs most of its time
//! and which nobody asks for here. Tokenizers of BERT's kind ([`crate::text::split`]) and
//! byte-level ones ([`crate::text::byte_level`]) are therefore split into words on their own, and
//! the crate's model is asked only for words that are new; all others go through the crate. Tests
//! compare the two.

use tokenizers::models::wordpiece::WordPiece;
use tokenizers::{ModelWrapper, NormalizerWrapper, PreTokenizerWrapper, Tokenizer};

use super::byte_level::ByteLevel;
use super::cut::{piece_len, CutRule};
use super::split::{caught, for_each, normalizer, tokenizer_error};
use super::word_pieces::WordPieces;
use super::words::{TokenAppender, TokenCaches};
use crate::error::{Error, Result};

/// Turns text into tokens. Special tokens that stand in the text are text.
pub(crate) struct Encoder {
    way: EncoderKind,
    memory: TokenCaches,
}

enum EncoderKind {
    /// BERT's words, then WordPiece.
    Words { model: Box<WordPieces>, lowercase: bool },
    /// Pieces of text, then their bytes.
    Bytes(Box<ByteLevel>),
    /// Whatever the file says.
    Any(Box<Tokenizer>),
}

impl Encoder {
    /// WordPiece on BERT's words, for the rayon pool that this is called in.
    pub(crate) fn words(model: WordPiece, lowercase: bool) -> Self {
        let model = Box::new(WordPieces::new(model));
        Encoder { way: EncoderKind::Words { model, lowercase }, memory: TokenCaches::new() }
    }

    /// The fastest way to do what a tokenizer does, for the rayon pool that this is called in.
    pub(crate) fn new(tokenizer: Tokenizer) -> Result<Self> {
        caught("use the tokenizer", || Self::of(tokenizer))
    }

    fn of(tokenizer: Tokenizer) -> Result<Self> {
        if let Some((model, lowercase)) = as_words(&tokenizer) {
            return Ok(Encoder::words(model, lowercase));
        }
        if only_special_added(&tokenizer) {
            if let Some(bytes) = ByteLevel::of(&tokenizer)? {
                return Ok(Encoder {
                    way: EncoderKind::Bytes(Box::new(bytes)),
                    memory: TokenCaches::new(),
                });
            }
        }
        Ok(Encoder {
            way: EncoderKind::Any(Box::new(whole(tokenizer)?)),
            memory: TokenCaches::new(),
        })
    }

    /// Where a document may be cut so that tokens do not depend on it.
    pub(crate) fn cut(&self) -> CutRule {
        match &self.way {
            EncoderKind::Words { .. } => CutRule::Space,
            EncoderKind::Bytes(_) | EncoderKind::Any(_) => CutRule::Piece,
        }
    }

    /// Appends the tokens of a text, which may begin in the middle of a document.
    pub(crate) fn encode(&self, text: &str, is_inside: bool, tokens: &mut Vec<u32>) -> Result<()> {
        caught("tokenise text", || self.encode_any(text, is_inside, tokens))
    }

    fn encode_any(&self, text: &str, is_inside: bool, tokens: &mut Vec<u32>) -> Result<()> {
        match &self.way {
            EncoderKind::Words { model, lowercase } => {
                let mut known = self.memory.of_this_thread();
                let encode = |word: &str| model.encode(word);
                for_each(text, *lowercase, TokenAppender { known: &mut known, tokens, encode })
            }
            EncoderKind::Bytes(bytes) => {
                let mut known = self.memory.of_this_thread();
                bytes.encode(text, is_inside, &mut known, tokens)
            }
            EncoderKind::Any(tokenizer) => pieces(text).try_for_each(|piece| {
                let encoding = tokenizer.encode_fast(piece, false);
                let encoding = encoding.map_err(tokenizer_error("tokenise text"))?;
                tokens.extend_from_slice(encoding.get_ids());
                Ok(())
            }),
        }
    }
}

/// What the `tokenizers` crate encodes at once.
fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        // Always at a character.
        let len = piece_len(rest.as_bytes()).unwrap_or(rest.len());
        let (piece, later) = rest.split_at(len);
        rest = later;
        (!piece.is_empty()).then_some(piece)
    })
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let way = match &self.way {
            EncoderKind::Words { lowercase, .. } => format!("words, lowercase {lowercase}"),
            EncoderKind::Bytes(_) => "bytes".to_owned(),
            EncoderKind::Any(_) => "any".to_owned(),
        };
        f.debug_struct("Encoder").field("way", &way).finish_non_exhaustive()
    }
}

/// Reads a `tokenizer.json`.
pub(crate) fn read(json: &[u8]) -> Result<Tokenizer> {
    let action = "read the tokenizer";
    caught(action, || Tokenizer::from_bytes(json).map_err(tokenizer_error(action)))
}

/// The smallest vocabulary size that holds every id.
pub(crate) fn vocab_size(tokenizer: &Tokenizer) -> Result<u32> {
    let largest = tokenizer.get_vocab(true).into_values().max();
    largest.and_then(|id| id.checked_add(1)).ok_or_else(|| Error::Tokenizer {
        action: "use the tokenizer",
        message: "it has no vocabulary".to_owned(),
    })
}

/// Without what belongs to batches and not to text: cut to a length, padding.
fn whole(mut tokenizer: Tokenizer) -> Result<Tokenizer> {
    tokenizer.with_truncation(None).map_err(tokenizer_error("use the tokenizer"))?;
    tokenizer.with_padding(None);
    tokenizer.set_encode_special_tokens(true);
    Ok(tokenizer)
}

/// Whether a tokenizer is one of BERT's: all parts must be as [`crate::text::split`] has them.
fn as_words(tokenizer: &Tokenizer) -> Option<(WordPiece, bool)> {
    let Some(NormalizerWrapper::BertNormalizer(bert)) = tokenizer.get_normalizer() else {
        return None;
    };
    let ours = normalizer(bert.lowercase);
    // An explicit value that says what follows from `lowercase` anyway is the same.
    let strips = bert.strip_accents.unwrap_or(bert.lowercase) == bert.lowercase;
    let same = bert.clean_text == ours.clean_text
        && bert.handle_chinese_chars == ours.handle_chinese_chars
        && strips;
    let splits =
        matches!(tokenizer.get_pre_tokenizer(), Some(PreTokenizerWrapper::BertPreTokenizer(_)));
    match tokenizer.get_model() {
        ModelWrapper::WordPiece(model) if same && splits && only_special_added(tokenizer) => {
            Some((model.clone(), bert.lowercase))
        }
        _ => None,
    }
}

/// Whether no token was added that is to be found in text.
fn only_special_added(tokenizer: &Tokenizer) -> bool {
    tokenizer.get_added_tokens_decoder().values().all(|token| token.special)
}

/// Reads a tokenizer and encodes some text with it, as the converter does. Gives whether there are
/// tokens.
#[cfg(feature = "testing")]
pub(crate) fn fuzzed(json: &[u8]) -> bool {
    let encode = || {
        let tokenizer = read(json)?;
        drop(super::special::find(None, |name| tokenizer.token_to_id(name)));
        vocab_size(&tokenizer)?;
        let (encoder, mut tokens) = (Encoder::new(tokenizer)?, Vec::new());
        for text in ["", "the king's sword, 12 ", "\u{e9}t\u{e9} \u{4e2d} <s>[MASK]\n\n\0"] {
            encoder.encode(text, false, &mut tokens)?;
            encoder.encode(text, true, &mut tokens)?;
        }
        Ok::<bool, Error>(!tokens.is_empty())
    };
    encode().unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;
    use tokenizers::models::bpe::{BpeTrainer, BPE};
    use tokenizers::models::TrainerWrapper;
    use tokenizers::normalizers::unicode::NFC;
    use tokenizers::pre_tokenizers::byte_level::ByteLevel as ByteLevelPart;
    use tokenizers::pre_tokenizers::sequence::Sequence;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{AddedToken, SplitDelimiterBehavior};

    use super::super::cut::small_pieces;
    use super::*;

    const TEXT: &str =
        "The king's sword, it's said, wasn't hers; they'd 1234 reasons & 56 more…\n\n\
        \tIndented lines\r\nend   here. Ünïcödé «Wörter», 中文字 мир 12,345.67 (a+b)==c; // x\n";

    /// What is different about tokenizers of this kind.
    #[derive(Clone, Copy)]
    #[expect(clippy::struct_excessive_bools, reason = "switches of the crate's own types")]
    struct Kind {
        name: &'static str,
        expressions: &'static [&'static str],
        /// What `ByteLevel` does before it takes bytes.
        prefix_space: bool,
        own_expression: bool,
        nfc: bool,
        ignore_merges: bool,
    }

    const GPT2: Kind = Kind {
        name: "GPT-2",
        expressions: &[],
        prefix_space: false,
        own_expression: true,
        nfc: false,
        ignore_merges: false,
    };
    const SPLIT: Kind = Kind { own_expression: false, ..GPT2 };
    const KINDS: [Kind; 6] = [
        GPT2,
        Kind { name: "RoBERTa", prefix_space: true, ..GPT2 },
        Kind {
            name: "Llama 3",
            expressions: &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            ignore_merges: true,
            ..SPLIT
        },
        Kind {
            name: "Qwen 2",
            expressions: &[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ],
            nfc: true,
            ..SPLIT
        },
        Kind {
            name: "several",
            expressions: &[r"\p{N}{1,3}", r"[一-龥]+", r"\s?\p{L}+|\s+"],
            ..SPLIT
        },
        Kind { name: "digits, then GPT-2", expressions: &[r"\p{N}"], own_expression: true, ..GPT2 },
    ];

    fn tokenizer(kind: Kind) -> Tokenizer {
        let mut parts: Vec<PreTokenizerWrapper> = Vec::new();
        for expression in kind.expressions {
            let pattern = SplitPattern::Regex((*expression).to_owned());
            parts
                .push(Split::new(pattern, SplitDelimiterBehavior::Isolated, false).unwrap().into());
        }
        let bytes = ByteLevelPart::new(kind.prefix_space, true, kind.own_expression);
        let mut tokenizer =
            Tokenizer::new(BPE::builder().ignore_merges(kind.ignore_merges).build().unwrap());
        if parts.is_empty() {
            tokenizer.with_pre_tokenizer(Some(bytes));
        } else {
            parts.push(bytes.into());
            tokenizer.with_pre_tokenizer(Some(Sequence::new(parts)));
        }
        if kind.nfc {
            tokenizer.with_normalizer(Some(NFC));
        }
        let mut trainer: TrainerWrapper = BpeTrainer::builder()
            .vocab_size(420)
            .show_progress(false)
            .initial_alphabet(ByteLevelPart::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from("<|endoftext|>", true)])
            .build()
            .into();
        tokenizer.train(&mut trainer, [TEXT.repeat(3)].iter()).unwrap();
        // As it is read from a file.
        whole(read(tokenizer.to_string(false).unwrap().as_bytes()).unwrap()).unwrap()
    }

    static ALL: LazyLock<Vec<(Kind, Tokenizer, Encoder)>> = LazyLock::new(|| {
        let all = KINDS.into_iter().map(|kind| {
            let theirs = tokenizer(kind);
            (kind, theirs.clone(), Encoder::new(theirs).unwrap())
        });
        all.collect()
    });

    fn same(text: &str) {
        for (kind, theirs, ours) in &*ALL {
            let expected = theirs.encode(text, false).unwrap();
            let mut tokens = Vec::new();
            ours.encode(text, false, &mut tokens).unwrap();
            assert_eq!(tokens, expected.get_ids(), "{} of {text:?}", kind.name);
        }
    }

    #[test]
    fn tokenizers_of_every_kind_take_the_fast_way_and_merge() {
        for (kind, theirs, ours) in &*ALL {
            assert!(matches!(ours.way, EncoderKind::Bytes(_)), "{}", kind.name);
            let tokens = theirs.encode(TEXT, false).unwrap().get_ids().len();
            assert!(tokens * 3 / 2 < TEXT.len(), "{}: {tokens} tokens", kind.name);
        }
        same(TEXT);
        same("");
        same("text with <|endoftext|> in it");
    }

    #[test]
    fn tokenizers_that_draw_lots_or_find_words_of_their_own_take_the_slow_way() {
        let is_slow =
            |theirs: Tokenizer| matches!(Encoder::new(theirs).unwrap().way, EncoderKind::Any(_));
        let mut added = tokenizer(GPT2);
        added.add_tokens(&[AddedToken::from("king", false)]);
        assert!(is_slow(added));
        let mut stretched = tokenizer(GPT2);
        let ModelWrapper::BPE(mut model) = stretched.get_model().clone() else { panic!("BPE") };
        model.dropout = Some(0.1);
        stretched.with_model(model);
        assert!(is_slow(stretched));
        let mut removed = tokenizer(GPT2);
        let split = Split::new(" ", SplitDelimiterBehavior::Removed, false).unwrap();
        let bytes = ByteLevelPart::new(false, true, false);
        removed.with_pre_tokenizer(Some(Sequence::new(vec![split.into(), bytes.into()])));
        assert!(is_slow(removed));
    }

    /// Letters and a few words; others are unknown.
    static WORDS: LazyLock<Encoder> = LazyLock::new(|| {
        let mut vocab = serde_json::Map::new();
        let letters = ('a'..='z').flat_map(|one| [format!("{one}"), format!("##{one}")]);
        let few = ["[UNK]", "the", "king", "##s", "'", ",", "中"].map(str::to_owned);
        for token in few.into_iter().chain(letters) {
            let id = vocab.len();
            vocab.entry(token).or_insert(id.into());
        }
        let json = serde_json::json!({
            "version": "1.0",
            "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true,
                "strip_accents": null, "lowercase": true},
            "pre_tokenizer": {"type": "BertPreTokenizer"},
            "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
                "max_input_chars_per_word": 100, "vocab": vocab},
        });
        let encoder = Encoder::new(read(json.to_string().as_bytes()).unwrap()).unwrap();
        assert!(matches!(encoder.way, EncoderKind::Words { .. }));
        encoder
    });

    /// Kinds whose first pattern is known.
    const CERTAIN: usize = 4;

    fn same_in_pieces(text: &str, piece_bytes: usize) -> usize {
        let pieces = small_pieces(text, piece_bytes);
        assert_eq!(pieces.concat(), text);
        let all = ALL[..CERTAIN].iter().map(|(kind, _, ours)| (kind.name, ours));
        for (name, ours) in all.chain([("BERT", &*WORDS)]) {
            let (mut whole, mut joined) = (Vec::new(), Vec::new());
            ours.encode(text, false, &mut whole).unwrap();
            for (number, piece) in pieces.iter().enumerate() {
                ours.encode(piece, number > 0, &mut joined).unwrap();
            }
            assert_eq!(joined, whole, "{name} of {pieces:?}");
        }
        pieces.len()
    }

    #[test]
    fn pieces_are_as_many_as_there_are_boundaries() {
        assert_eq!(same_in_pieces("the king said\nwords  are \u{3000}\u{3000}words", 1), 6);
        assert_eq!(same_in_pieces("\u{3000}\u{3000}中文\n\u{3000}\u{3000}中文", 1), 3);
        assert_eq!(same_in_pieces("oneword\r\n\r\n", 1), 1);
        assert!(same_in_pieces(TEXT, 8) > 15);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn any_text_has_the_same_tokens_in_pieces_of_any_size(
            text in "([ -~]|\\PC|[\t\n\r\x00-\x7f]|[éßΣς́ 　\u{85}\u{a0}\u{2028}\u{200b}\u{feff}\u{301}\u{328}\u{1100}\u{1161}한中，。½²ſ😀👩\u{200d}]|'[sStTrRvVmMlLdDeE]{1,2}|[ \n\r\t　]{1,9}|(\r\n){1,2} {0,9}|\n　{0,3}|[0-9]{1,5}|(the|king|words) ?){0,60}",
            piece_bytes in 1..40_usize,
        ) {
            same_in_pieces(&text, piece_bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        #[test]
        fn any_text_has_the_tokens_of_the_tokenizers_crate(
            text in "([ -~\\t\\n\\r\\x00-\\x7f]|\\PC|[äéßİΣς́ 　\u{85}\u{a0}\u{2028}\u{301}\u{328}½²ſK한가]|'[sStTrRvVmMlLdDeEſ]{1,2}|[ \\n\\r\\t]{1,4}|[0-9]{1,5}|(the|king|words){1,3}|<\\|endoftext\\|>){0,40}",
        ) {
            same(&text);
        }
    }
}
