//! Converted text holds the tokens that the `tokenizers` crate gives.

use std::fs;
use std::path::Path;

use phalanx_data::batches::Scratch;
use phalanx_data::convert::{convert, BadLines, ConvertOptions, Document, Vocabulary};
use phalanx_data::format::{TokenStream, Tokens};
use phalanx_data::progress::Silent;
use phalanx_data::samples::Documents;
use phalanx_data::text::Detokenizer;
use phalanx_data::{Access, CausalText, Error, MaskedText, Masking};
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

/// A tokenizer of GPT-2's kind, or with a space in front of each text as `RoBERTa` has it.
fn byte_level(words: &[String], add_prefix_space: bool) -> Tokenizer {
    let mut tokenizer = Tokenizer::new(BPE::default());
    let pre = ByteLevel::new(add_prefix_space, true, true);
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
        ("gpt", byte_level(&words, false), "<|endoftext|>"),
        ("roberta", byte_level(&words, true), "<|endoftext|>"),
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
    let lines = words.join("\n").repeat(9);
    // Without spaces between words, and indented as Chinese is: wide spaces.
    let wide = "\u{3000}\u{3000}中文字中文e\u{301}中文，字。\n".repeat(16_000);
    let windows = lines.replace('\n', "\r\n    ");
    let all = [
        (byte_level(&words, false), "<|endoftext|>"),
        (byte_level(&words, true), "<|endoftext|>"),
        (bert(&words, true), "[SEP]"),
    ];
    for (number, (mut tokenizer, end)) in all.into_iter().enumerate() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        tokenizer.save(at("tokenizer.json"), false).unwrap();
        tokenizer.set_encode_special_tokens(true);
        for (name, text) in [("lines", &lines), ("wide", &wide), ("windows", &windows)] {
            assert!(text.len() > 600_000, "several pieces");
            let encoding = tokenizer.encode(text.as_str(), false).unwrap();
            let end = tokenizer.token_to_id(end).unwrap();
            let expected: Vec<i64> =
                encoding.get_ids().iter().chain([&end]).map(|&id| id.into()).collect();
            fs::write(at("a.txt"), text).unwrap();
            let line = serde_json::json!({ "text": text });
            fs::write(at("a.jsonl"), format!("{line}\n")).unwrap();
            for (input, document) in [
                ("a.txt", Document::File),
                ("a.txt", Document::BlankLine),
                ("a.jsonl", Document::File),
            ] {
                let out = at(&format!("{name}-{input}-{document:?}"));
                let options = options(&at("tokenizer.json"), document);
                convert(&[at(input)], &out, &options, &Silent).unwrap();
                assert!(tokens(&out).1 == expected, "{name} {input} {document:?} {number}");
            }
        }
    }
}

#[test]
fn a_vocabulary_without_masks_is_for_training_on_the_next_token() {
    let words = documents();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    byte_level(&words, false).save(at("tokenizer.json"), false).unwrap();
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

#[test]
fn a_tokenizer_that_cannot_be_read_is_named_whatever_the_library_does_over_it() {
    let folder = tempfile::tempdir().unwrap();
    write_text(folder.path(), 1, 10);
    let text = [folder.path().join("play-0.txt")];
    let tokenizer = folder.path().join("tokenizer.json");
    // No JSON; nothing of its kind; and cut off within a part, over which the library panics.
    for json in ["{", "{}", r#"{"version": "1.0", "decoder": {"type": "ByteLevel""#] {
        fs::write(&tokenizer, json).unwrap();
        let output = folder.path().join("out");
        let options = options(&tokenizer, Document::File);
        let error = convert(&text, &output, &options, &Silent).unwrap_err().to_string();
        let expected = format!("cannot read the tokenizer: {}: ", tokenizer.display());
        assert!(error.starts_with(&expected), "{json}: {error}");
        // The same of a folder that was prepared with it; `{}` there means none.
        if json != "{}" {
            let error = Detokenizer::open(folder.path()).unwrap_err().to_string();
            assert!(error.starts_with(&expected), "{json}: {error}");
        }
    }
}

/// A line of JSON whose text has that number, or one that is not UTF-8.
fn json_line(number: u64, is_good: bool) -> Vec<u8> {
    let line = format!("{{\"text\":\"scene {number} of the king and queen, \u{fc}ber\"}}\n");
    let bad = |byte| if byte == 0xbc { 0xff } else { byte };
    line.bytes().map(|byte| if is_good { byte } else { bad(byte) }).collect()
}

#[test]
fn a_line_that_is_not_utf8_is_left_out_alone_wherever_blocks_are_cut() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    bert(&documents(), true).save(at("tokenizer.json"), false).unwrap();
    // Several blocks; the last line has no end.
    let is_bad = |number: u64| number.is_multiple_of(997) || number == 4_999;
    let write = |name: &str, wanted: &dyn Fn(u64) -> bool| {
        let numbers = (1..5_000).filter(|&number| wanted(number));
        let lines: Vec<u8> =
            numbers.flat_map(|number| json_line(number, !is_bad(number))).collect();
        fs::write(at(name), lines.trim_ascii_end()).unwrap();
        lines
    };
    let lines = write("bad.jsonl", &|_| true);
    write("good.jsonl", &|number| !is_bad(number));
    let run = |input: &str, output: &str, bad_lines, threads| {
        let threads = std::num::NonZeroUsize::new(threads);
        let options = options(&at("tokenizer.json"), Document::File);
        let options = ConvertOptions { bad_lines, threads, ..options };
        convert(&[at(input)], &at(output), &options, &Silent)
    };
    run("good.jsonl", "good", BadLines::Refuse, 1).unwrap();
    for threads in [1, 3] {
        let error = run("bad.jsonl", "refused", BadLines::Refuse, threads).unwrap_err();
        let offset = lines.iter().position(|&byte| byte == 0xff).unwrap() - 1;
        let (path, reason) =
            (at("bad.jsonl"), format!("it is not UTF-8 at byte {offset} of the file"));
        let expected = format!("{}, line 997: {reason}; correct the line", path.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
        let output = format!("skipped-{threads}");
        let made = run("bad.jsonl", &output, BadLines::Skip, threads).unwrap();
        assert_eq!((made.skipped_lines, made.index.document_count), (6, 4_993));
        assert!(tokens(&at(&output)).1 == tokens(&at("good")).1, "the other lines are as before");
    }
    // The vocabulary is trained on the other lines too.
    let vocabulary = Vocabulary::Train { vocab_size: 300, min_frequency: 2, lowercase: true };
    let options = ConvertOptions { vocabulary, bad_lines: BadLines::Skip, ..Default::default() };
    let trained = |input: &str, output: &str| {
        convert(&[at(input)], &at(output), &options, &Silent).unwrap().index.fingerprint
    };
    assert_eq!(trained("bad.jsonl", "trained"), trained("good.jsonl", "trained-good"));
}
