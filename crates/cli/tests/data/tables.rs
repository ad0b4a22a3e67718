//! Parquet and Arrow files, with the feature `parquet` and without it.

use crate::support::{refused, text};

#[cfg(not(feature = "parquet"))]
#[test]
fn without_the_feature_tables_are_refused_with_what_to_do() {
    use std::fs;

    let folder = tempfile::tempdir().unwrap();
    let (input, output) = (folder.path().join("a.parquet"), folder.path().join("out"));
    fs::write(&input, b"PAR1").unwrap();
    let args = ["data", "convert", "--input", text(&input), "--output", text(&output)];
    refused(&args, 64, "--features parquet");
    refused(&[&args[..], &["--columns", "x"]].concat(), 64, "--features parquet");
    assert!(!output.exists());
}

#[cfg(feature = "parquet")]
#[test]
fn tables_become_tokens_and_records() {
    use crate::support::phalanx;

    let folder = tempfile::tempdir().unwrap();
    // 500 rows that pyarrow 26 has written: `body` strings, `label` I64 from 0.
    let input = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/small.parquet");
    let (tokens, records) = (folder.path().join("tokens"), folder.path().join("records"));
    let args = ["data", "convert", "--input", input, "--json", "--quiet", "--output"];
    refused(&[&args[..], &[text(&tokens)]].concat(), 65, "no column `text`; it has: body, label");
    let as_tokens = phalanx(&[&args[..], &[text(&tokens), "--field", "body"]].concat()).json();
    assert_eq!(as_tokens["documents"], 500);
    let made = phalanx(&[&args[..], &[text(&records), "--columns", "label,body"]].concat()).json();
    assert_eq!(made["records"], 500);
    let shown = phalanx(&["data", "inspect", text(&records), "--sample", "3"]).good();
    for part in ["label I64 []", "body U8 of any length", "record 2: label 1 elements 02"] {
        assert!(shown.contains(part), "{part} in:\n{shown}");
    }
}
