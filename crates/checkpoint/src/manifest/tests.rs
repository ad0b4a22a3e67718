//! What a manifest takes, and what it refuses.

use std::path::Path;

use serde_json::json;

use super::*;

/// A manifest of one tensor in two files.
fn good() -> Value {
    let piece = |file: usize, start: u64| json!({ "file": file, "offset": 4096, "box": { "start": [start, 0], "len": [2, 3] } });
    let file = |name: &str| json!({ "name": name, "bytes": 4096 + 24, "crc32c": "00000000" });
    json!({
        "format": FORMAT, "version": 1, "step": 7, "world_size": 2, "block_bytes": 1_048_576,
        "files": [file("a"), file("b")],
        "tensors": [{ "name": "w", "dtype": "F32", "shape": [4, 3], "pieces": [piece(0, 0), piece(1, 2)] }],
        "values": { "epoch": 3 }, "rank_values": [null, [1, 2]],
    })
}

/// The text of a manifest with a right seal.
fn sealed(content: &str) -> Vec<u8> {
    let content = content.trim_end().strip_suffix('}').unwrap_or(content);
    [content.as_bytes(), seal(content.as_bytes()).as_bytes()].concat()
}

fn decode(value: &Value) -> Result<Manifest> {
    Manifest::decode(&sealed(&value.to_string()), Path::new("m"))
}

#[test]
fn a_manifest_is_text_and_back() {
    let manifest = decode(&good()).unwrap();
    let text = manifest.encode().unwrap();
    let again = Manifest::decode(&text, Path::new("m")).unwrap();
    assert_eq!(again.encode().unwrap(), text);
    assert_eq!(again.tensor("w").unwrap().shape, [4, 3]);
    assert!(again.tensor("v").is_none());
    assert_eq!(parse_values(&again.values, "values").unwrap(), json!({ "epoch": 3 }));
    let as_json: Value = serde_json::from_slice(&text).unwrap();
    assert!(as_json["manifest_crc32c"].is_string(), "anybody can read it");
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_manifest_is_noticed() {
    let text = sealed(&good().to_string());
    for bit in 0..text.len() * 8 {
        let mut flipped = text.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::decode(&flipped, Path::new("m")).is_err(), "bit {bit}");
    }
    for len in 0..text.len() {
        assert!(Manifest::decode(&text[..len], Path::new("m")).is_err(), "cut at {len}");
    }
}

#[test]
fn a_manifest_that_contradicts_itself_is_refused() {
    let huge = json!(1_u64 << 63);
    let cases: &[(&str, Value, &str)] = &[
        ("/version", json!(2), "expected phalanx-checkpoint 1"),
        ("/block_bytes", json!(0), "blocks have 0 bytes"),
        ("/world_size", json!(3), "2 ranks have values, expected 3"),
        ("/files/0/bytes", huge.clone(), "checksums, expected"),
        ("/files/1/bytes", json!(u64::MAX), "overflow"),
        ("/files/0/bytes", json!(-1), "invalid value"),
        ("/files/0/name", json!("../a"), "plain file name"),
        ("/files/0/name", json!("b"), "not in order"),
        ("/files/0/crc32c", json!("0000"), "eight digits"),
        ("/tensors/0/shape", json!([huge, 4]), "too large"),
        ("/tensors/0/shape", json!([4]), "no box of shape"),
        ("/tensors/0/dtype", json!("F31"), "unknown variant"),
        ("/tensors/0/pieces/0/file", json!(2), "outside of its file"),
        ("/tensors/0/pieces/0/offset", huge.clone(), "outside of its file"),
        ("/tensors/0/pieces/0/offset", json!(4000), "end belong to no tensor"),
        ("/tensors/0/pieces/1/box/start", json!([1, 0]), "pieces overlap"),
        ("/tensors/0/pieces/1/box/len", json!([1, 3]), "3 elements lie nowhere"),
        ("/tensors/0/pieces/1/box/len", json!([huge, 3]), "no box of shape"),
        ("/tensors/0/pieces/1/box", json!({ "start": [0, 0] }), "missing field"),
        ("/step", json!("x"), "invalid type"),
    ];
    for (pointer, value, expected) in cases {
        let mut bad = good();
        *bad.pointer_mut(pointer).unwrap() = value.clone();
        let error = decode(&bad).unwrap_err().to_string();
        assert!(error.contains(expected), "{pointer} {value}: `{expected}` in {error}");
    }
    let mut more = good();
    more["more"] = json!(1);
    assert!(decode(&more).unwrap_err().to_string().contains("unknown field"));
}

#[test]
fn depth_and_length_of_values_have_limits() {
    let deep = "[".repeat(1 << 20) + &"]".repeat(1 << 20);
    let text = good().to_string().replace(r#"{"epoch":3}"#, &deep);
    let manifest = Manifest::decode(&sealed(&text), Path::new("m")).unwrap();
    assert!(parse_values(&manifest.values, "values").is_err(), "it stays text");
    let deep = good().to_string().replace("[4,3]", &deep);
    assert!(Manifest::decode(&sealed(&deep), Path::new("m")).is_err());
    let long = format!("[{}0]", "0,".repeat(4 << 20));
    let long = RawValue::from_string(long).unwrap();
    let error = parse_values(&long, "values of rank 3").unwrap_err().to_string();
    assert!(error.contains("values of rank 3: 4194305 values are too many"), "{error}");
}
