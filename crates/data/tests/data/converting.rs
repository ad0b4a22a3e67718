//! Converted text holds the tokens that the `tokenizers` crate gives.

use std::fs;
use std::path::Path;

use phalanx_data::convert::{convert, ConvertOptions, Document, Vocabulary};
use phalanx_data::progress::Silent;
use phalanx_data::{
    Access, CausalText, Documents, Error, MaskedText, Masking, Scratch, TokenStream,
};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BpeTrainer, BPE};
use tokenizers::models::wordpiece::{WordPiece, WordPieceTrainer};
use tokenizers::models::TrainerWrapper;
use tokenizers::normalizers::BertNormalizer;
use tokenizers::pre_tokenizers::bert::BertPreTokenizer;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{AddedToken, Tokenizer};

use crate::support::write_text;

/// Text with what tokenizers stumble over.
fn documents() -> Vec<String> {
    let folder = tempfile::tempdir().expect("a folder");
    write_text(folder.path(), 1, 2000);
    let text = fs::read_to_string(folder.path().join("play-0.txt")).expect("the text");
    let mut all: Vec<String> = text.lines().map(str::to_owned).collect();
    all.extend(
        [
            "Ünïcödé «words» 中文 and   many   spaces\u{a0}x ",
            "  don't we'll I'm they've he'd 'tis 12,345.67 a1b2 <|endoftext|> [SEP] [MASK]",
            "tab\tand\u{3000}wide  !? ... --- \u{1F600}\u{1F600} e\u{301}",
            "x",
        ]
        .map(str::to_owned),
    );
    all
}

fn added(names: &[&str]) -> Vec<AddedToken> {
    names.iter().map(|name| AddedToken::from(*name, true)).collect()
}

/// A tokenizer of GPT-2's kind.
fn byte_level(words: &[String]) -> Tokenizer {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let pre = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(pre)).with_decoder(Some(ByteLevelDecoder::default()));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(600)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(added(&["<|endoftext|>"]))
        .build()
        .into();
    tokenizer.train(&mut trainer, words.iter()).expect("train");
    tokenizer
}

/// A tokenizer of BERT's kind.
fn bert(words: &[String], lowercase: bool) -> Tokenizer {
    let model = WordPiece::builder().unk_token("[UNK]".to_owned()).build().expect("a model");
    let mut tokenizer = Tokenizer::new(model);
    tokenizer
        .with_normalizer(Some(BertNormalizer::new(true, true, None, lowercase)))
        .with_pre_tokenizer(Some(BertPreTokenizer));
    let mut trainer: TrainerWrapper = WordPieceTrainer::builder()
        .vocab_size(500)
        .show_progress(false)
        .special_tokens(added(&["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]))
        .build()
        .into();
    tokenizer.train(&mut trainer, words.iter()).expect("train");
    tokenizer
}

/// A tokenizer of Llama's kind: no spaces, an unknown token.
fn metaspace(words: &[String]) -> Tokenizer {
    let model = BPE::builder().unk_token("<unk>".to_owned()).build().expect("a model");
    let mut tokenizer = Tokenizer::new(model);
    tokenizer.with_pre_tokenizer(Some(Metaspace::new('▁', PrependScheme::Always, true)));
    let mut trainer: TrainerWrapper = BpeTrainer::builder()
        .vocab_size(400)
        .show_progress(false)
        .special_tokens(added(&["<unk>", "<s>", "</s>"]))
        .build()
        .into();
    tokenizer.train(&mut trainer, words.iter()).expect("train");
    tokenizer
}

fn options(tokenizer: &Path, document: Document) -> ConvertOptions {
    let vocabulary = Vocabulary::File(tokenizer.to_path_buf());
    ConvertOptions { vocabulary, document, shard_bytes: 20_000, ..Default::default() }
}

fn tokens(folder: &Path) -> (TokenStream, Vec<i64>) {
    let stream = TokenStream::open(folder, Access::Read).expect("open");
    let mut all = vec![0; usize::try_from(stream.token_count()).expect("few")];
    stream.read(0, &mut all, &mut Scratch::default(), &"all").expect("read");
    (stream, all)
}

#[test]
fn any_tokenizer_gives_the_tokens_of_the_tokenizers_crate() {
    let words = documents();
    let all = [
        ("gpt", byte_level(&words), "<|endoftext|>"),
        ("bert", bert(&words, true), "[SEP]"),
        ("cased", bert(&words, false), "[SEP]"),
        ("llama", metaspace(&words), "</s>"),
    ];
    for (name, mut tokenizer, end) in all {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        tokenizer.save(at("tokenizer.json"), false).unwrap();
        fs::write(at("a.txt"), words.join("\n")).unwrap();
        // What is said in the text is text.
        tokenizer.set_encode_special_tokens(true);
        let end = tokenizer.token_to_id(end).unwrap();
        let mut expected = Vec::new();
        for document in &words {
            let encoding = tokenizer.encode(document.as_str(), false).unwrap();
            expected.extend(encoding.get_ids().iter().chain([&end]).map(|&id| i64::from(id)));
        }
        let options = options(&at("tokenizer.json"), Document::Line);
        let made = convert(&[at("a.txt")], &at("out"), &options, &Silent).unwrap();
        let (stream, found) = tokens(&at("out"));
        assert_eq!(found.len(), expected.len(), "{name}");
        assert!(found == expected, "{name}: tokens differ");
        assert_eq!(made.index.document_count, words.len() as u64);
        assert!(made.index.shards.len() > 1, "{name}: several shards");
        assert_eq!(stream.index().special.document_end(), Some(end));
        assert_eq!(stream.index(), &made.index);
    }
}

#[test]
fn a_long_document_in_pieces_has_the_tokens_of_the_whole() {
    let words = documents();
    let mut tokenizer = byte_level(&words);
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    tokenizer.save(at("tokenizer.json"), false).unwrap();
    tokenizer.set_encode_special_tokens(true);
    let text = words.join("\n").repeat(8);
    assert!(text.len() > 600_000, "several pieces");
    fs::write(at("a.txt"), &text).unwrap();
    let line = serde_json::json!({ "text": text });
    fs::write(at("a.jsonl"), format!("{line}\n")).unwrap();
    let mut expected: Vec<i64> = tokenizer
        .encode(text.as_str(), false)
        .unwrap()
        .get_ids()
        .iter()
        .map(|&id| id.into())
        .collect();
    expected.push(i64::from(tokenizer.token_to_id("<|endoftext|>").unwrap()));
    for input in ["a.txt", "a.jsonl"] {
        let out = at(&format!("{input}-out"));
        let options = options(&at("tokenizer.json"), Document::File);
        convert(&[at(input)], &out, &options, &Silent).unwrap();
        assert!(tokens(&out).1 == expected, "{input}");
    }
}

#[test]
fn a_vocabulary_without_masks_is_for_training_on_the_next_token() {
    let words = documents();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    byte_level(&words).save(at("tokenizer.json"), false).unwrap();
    fs::write(at("a.txt"), words.join("\n")).unwrap();
    let options = options(&at("tokenizer.json"), Document::Line);
    let made = convert(&[at("a.txt")], &at("out"), &options, &Silent).unwrap();
    assert_eq!((made.index.special.mask, made.index.special.sep), (None, None));
    let text = fs::read_to_string(at("out/index.json")).unwrap();
    assert!(text.contains("\"eos\"") && !text.contains("\"mask\""), "{text}");
    let error = MaskedText::open(&at("out"), 32, Masking::default(), Access::Read).unwrap_err();
    assert!(matches!(error, Error::InvalidOption { .. }), "{error}");
    assert!(error.to_string().contains("train on the next token"), "{error}");
    CausalText::open(&at("out"), 32, Documents::Apart, Access::Read).unwrap();
}

#[test]
fn the_number_of_threads_does_not_show() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 5, 3000);
    let inputs = [folder.path().to_path_buf()];
    let mut seen = Vec::new();
    for threads in [1, 2, 5] {
        let out = tempfile::tempdir().unwrap();
        let vocabulary = Vocabulary::Train { vocab_size: 300, min_frequency: 2, lowercase: true };
        let threads = std::num::NonZeroUsize::new(threads);
        let document = Document::Line;
        let options = ConvertOptions { vocabulary, threads, document, ..Default::default() };
        let made = convert(&inputs, &out.path().join("out"), &options, &Silent).unwrap();
        seen.push(made.index.fingerprint);
    }
    assert!(seen.iter().all(|one| *one == seen[0]), "{seen:?}");
}
