//! Right files, to begin with.

use super::{seal, SPECIAL};
use crate::batches::DType;
use crate::cast::{to_u64, to_usize};
use crate::fingerprint::Fingerprint;
use crate::format::header::{encode, encode_sealed, Tensor};
use crate::format::{json, TokenIndex, TokenShard};
use crate::records::{Field, RecordIndex, RecordShard};

fn tensor(name: &str, dtype: &'static str, shape: &[usize], element_bytes: usize) -> Tensor {
    Tensor { name: name.to_owned(), dtype, shape: shape.to_vec(), element_bytes }
}

/// A shard of these tensors and their data.
fn shard(mut tensors: Vec<Tensor>, data: &[u8]) -> Vec<u8> {
    let mut file = encode_sealed(&mut tensors, &[], to_u64(data.len()));
    file.extend_from_slice(data);
    let sums = tensors.last().map_or(0, |tensor| tensor.shape.iter().product::<usize>() * 4);
    file.resize(file.len() + sums, 0);
    seal(&mut file).map_or_else(Vec::new, |_| file)
}

/// Documents of 50 tokens.
fn tokens_of(element_bytes: usize, documents: u32) -> Vec<u8> {
    let token = |at: u32| (5 + at / 50 % 400).to_le_bytes();
    let count = documents * 50;
    let mut data: Vec<u8> =
        (0..count).flat_map(|at| token(at).into_iter().take(element_bytes)).collect();
    let ends = 0..=u64::from(documents);
    data.extend(ends.flat_map(|document| (document * 50).to_le_bytes()));
    let dtype = if element_bytes == 2 { "U16" } else { "U32" };
    let [tokens, offsets] = [count, documents + 1].map(|count| to_usize(u64::from(count)));
    let tensors = vec![
        tensor("tokens", dtype, &[tokens], element_bytes),
        tensor("doc_offsets", "U64", &[offsets], 8),
    ];
    shard(tensors, &data)
}

pub(super) fn tokens() -> Vec<u8> {
    tokens_of(2, 40)
}

pub(super) fn token_shard() -> Vec<Vec<u8>> {
    vec![tokens(), tokens_of(4, 40)]
}

/// The index of a folder of so many documents, and its one shard.
pub(super) fn token_folder(documents: u32) -> (Vec<u8>, Vec<u8>) {
    let mut shard = tokens_of(2, documents);
    let crc32c = seal(&mut shard).unwrap_or_default();
    let entry = TokenShard {
        file: "tokens-00000.safetensors".to_owned(),
        file_bytes: to_u64(shard.len()),
        token_count: u64::from(documents) * 50,
        document_count: u64::from(documents),
        crc32c,
    };
    (json::to_bytes(&TokenIndex::new(500, SPECIAL, Fingerprint(1), 7, vec![entry])), shard)
}

pub(super) fn token_index() -> Vec<Vec<u8>> {
    vec![token_folder(40).0]
}

pub(super) fn fields() -> Vec<Field> {
    vec![
        Field::fixed("label", DType::I64, []),
        Field::fixed("good", DType::Bool, [2]),
        Field::variable("sound", DType::I16),
    ]
}

/// 30 records, whose sounds have from 0 to 29 elements.
pub(super) fn records() -> Vec<u8> {
    let mut data: Vec<u8> = (0..30_i64).flat_map(i64::to_le_bytes).collect();
    let mut ends = vec![0_u64];
    for record in 0..30 {
        ends.push(ends[record] + to_u64(record));
    }
    data.extend(ends.iter().flat_map(|end| end.to_le_bytes()));
    data.extend((0..435_i16).flat_map(i16::to_le_bytes));
    data.extend([1, 0].repeat(30));
    let tensors = vec![
        tensor("label", "I64", &[30], 8),
        tensor("sound.offsets", "U64", &[31], 8),
        tensor("sound", "I16", &[435], 2),
        tensor("good", "BOOL", &[30, 2], 1),
    ];
    shard(tensors, &data)
}

pub(super) fn record_shard() -> Vec<Vec<u8>> {
    vec![records()]
}

pub(super) fn record_index() -> Vec<Vec<u8>> {
    let mut file = records();
    let crc32c = seal(&mut file).unwrap_or_default();
    let entry = RecordShard {
        file: "records-00000.safetensors".to_owned(),
        file_bytes: to_u64(file.len()),
        record_count: 30,
        crc32c,
        longest: vec![1 << 20; fields().len()],
    };
    vec![json::to_bytes(&RecordIndex::new(fields(), vec![entry]))]
}

/// A list with the first block of a file.
pub(super) fn damage_of(fingerprint: Fingerprint, file: &str) -> Vec<u8> {
    format!(
        r#"{{"format": "phalanx-damage", "version": 1, "fingerprint": "{fingerprint}", "blocks": [{{"file": "{file}", "block": 0}}]}}"#
    )
    .into_bytes()
}

pub(super) fn damage_list() -> Vec<Vec<u8>> {
    let mut lists = Vec::new();
    for (index, file) in
        [(token_index(), "tokens-00000.safetensors"), (record_index(), "records-00000.safetensors")]
    {
        let json: serde_json::Value = serde_json::from_slice(&index[0]).unwrap_or_default();
        let fingerprint = json["fingerprint"].as_str().and_then(|text| text.parse().ok());
        let fingerprint = fingerprint.unwrap_or(Fingerprint(0));
        lists.push(damage_of(fingerprint, file));
        let lost = format!(r#", "lost": ["{file}"]}}"#);
        let mut with_lost = damage_of(fingerprint, file);
        with_lost.pop();
        with_lost.extend(lost.bytes());
        lists.push(with_lost);
    }
    lists
}

/// Two documents, one behind the other and with something between them.
pub(super) fn megatron_index() -> Vec<Vec<u8>> {
    let one = |code: u8, second: i64| {
        let mut idx = b"MMIDIDX\0\0".to_vec();
        idx.extend(1_u64.to_le_bytes());
        idx.push(code);
        idx.extend([2_u64, 3].iter().flat_map(|count| count.to_le_bytes()));
        idx.extend([1500_i32, 500].iter().flat_map(|length| length.to_le_bytes()));
        idx.extend([0, second].iter().flat_map(|offset| offset.to_le_bytes()));
        idx.extend([0_i64, 1, 2].iter().flat_map(|first| first.to_le_bytes()));
        idx
    };
    vec![one(8, 3000), one(8, 3500), one(1, 1500)]
}

pub(super) fn fixed_batches() -> Vec<Vec<u8>> {
    let names = ["attention_mask", "input_ids", "labels"];
    let tensors: Vec<Tensor> = names.iter().map(|name| tensor(name, "I64", &[8, 16], 8)).collect();
    let mut file = encode(&tensors, &[]);
    file.extend([0_i64, 1].repeat(64).iter().flat_map(|value| value.to_le_bytes()));
    file.extend((0..256_i64).flat_map(i64::to_le_bytes));
    vec![file]
}

pub(super) fn tokenizer() -> Vec<Vec<u8>> {
    let pieces = r###"{"version": "1.0", "model": {"type": "WordPiece", "continuing_subword_prefix": "##",
        "vocab": {"[CLS]": 0, "run": 1, "##ning": 2, "\u00e9": 3}}}"###;
    let unigram = r#"{"model": {"vocab": [["<unk>", 0.0], ["run", -1.0], ["ning", -2.5]], "type": "Unigram"}}"#;
    vec![pieces.into(), unigram.into()]
}

/// Of BERT's kind, byte-level, and one that no way of our own is for.
pub(super) fn converter_tokenizer() -> Vec<Vec<u8>> {
    let words = r###"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{"id": 1, "content": "[SEP]",
        "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null, "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100,
        "vocab": {"[UNK]": 0, "[SEP]": 1, "the": 2, "k": 3, "##ing": 4, "s": 5}}}"###;
    let bytes = r#"{"version": "1.0", "truncation": {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 4}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"},
        "added_tokens": [], "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": "\\p{L}+|\\s+|[^\\s]"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true},
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
        "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
        "vocab": {"t": 0, "h": 1, "e": 2, "th": 3, "the": 4, "Ġ": 5, "<|endoftext|>": 6}, "merges": [["t", "h"], ["th", "e"]]}}"#;
    let other = r#"{"version": "1.0", "truncation": null, "padding": null, "added_tokens": [{"id": 0, "content": "<unk>",
        "single_word": false, "lstrip": true, "rstrip": false, "normalized": true, "special": false}],
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]},
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": true},
        "post_processor": null, "decoder": null, "model": {"type": "Unigram", "unk_id": 0, "byte_fallback": false,
        "vocab": [["<unk>", 0.0], ["▁the", -1.0], ["k", -2.5], ["ing", -3.0], ["s", -3.5], ["</s>", 0.0]]}}"#;
    vec![words.into(), bytes.into(), other.into()]
}

/// What the converter of arrays reads: tensors that agree in their rows, and a shard of records,
/// which is such a file as well.
pub(super) fn arrays() -> Vec<Vec<u8>> {
    let tensors = [
        tensor("label", "I64", &[20], 8),
        tensor("image", "U8", &[20, 3, 4], 1),
        tensor("good", "BOOL", &[20, 1], 1),
    ];
    let mut file = encode(&tensors, &[]);
    file.extend((0..20_i64).flat_map(i64::to_le_bytes));
    file.extend([7_u8; 240].iter().chain(&[1; 20]));
    let fixed = vec![tensor("label", "F32", &[30, 2], 4), tensor("id", "U16", &[30], 2)];
    vec![file, shard(fixed, &[3; 300])]
}

pub(super) fn loader_state() -> Vec<Vec<u8>> {
    let plain = r#"{"epoch":1,"next_sample":64,"seed":7,"data":"0123456789abcdef"}"#;
    let full = r#"{"epoch":1,"next_global_sample":64,"seed":7,"order":"b16x4","buckets":"8x32","version":1,"fingerprint":"0123456789abcdef"}"#;
    vec![plain.into(), full.into()]
}

pub(super) fn journal() -> Vec<Vec<u8>> {
    let head = r#"{"format":"phalanx-conversion","version":1,"key":"0000000000000007"}"#;
    let line = r#"{"shard":{"file":"tokens-00000.safetensors","file_bytes":9,"token_count":5,"document_count":1,"crc32c":[1,2]},"next":{"file":0,"offset":100,"line":3},"counts":{"skipped_lines":0,"unknown_tokens":0}}"#;
    vec![format!("{head}\n{line}\n{line}\n").into()]
}

pub(super) fn json_line() -> Vec<Vec<u8>> {
    let nested = r#"{"id": [1, 2.5e3, null, true], "page": {"body": "a \u00e9\n", "n": {}}, "text": "it was a dark"}"#;
    vec![nested.into(), br#"{"text": ""}"#.to_vec()]
}

/// Two bytes of a status, then the field that says which bytes come.
#[cfg(feature = "http")]
pub(super) fn http_answer() -> Vec<Vec<u8>> {
    let one = |status: u16, field: &str| [&status.to_le_bytes(), field.as_bytes()].concat();
    vec![one(206, "bytes 5-9/20"), one(416, "bytes */0"), one(503, "")]
}
