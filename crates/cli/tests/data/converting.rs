//! convert: formats, resuming after a kill, locks, and bad input.

use std::fs;
use std::path::Path;

use crate::support::{content, kill_in_the_middle, lines, phalanx, refused, text};

/// Pages as JSON lines, each of four lines of text.
fn pages(count: usize) -> String {
    let mut json = String::new();
    for page in 0..count {
        let body = lines(page, 4);
        let line = serde_json::json!({ "id": page, "page": { "body": body } });
        json.push_str(&format!("{line}\n"));
    }
    json
}

#[test]
fn text_is_converted_by_file_line_and_paragraph() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    fs::write(at("in/a.txt"), "one line\nanother\n\n\nlast one\n").unwrap();
    fs::write(at("in/b.txt"), "\n\nin b\n").unwrap();
    for (document, expected) in [("file", 2), ("line", 4), ("blank-line", 3)] {
        let out = at(document);
        let args = ["data", "convert", "--input", text(&at("in")), "--output", text(&out)]
            .map(str::to_owned);
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        args.extend(["--vocab-size", "64", "--document", document, "--json"]);
        let json = phalanx(&args).json();
        assert_eq!((&json["documents"], &json["reused"]), (&expected.into(), &false.into()));
        let again = phalanx(&args).json();
        assert_eq!((&again["reused"], &again["fingerprint"]), (&true.into(), &json["fingerprint"]));
        phalanx(&["data", "verify", text(&out)]).good();
    }
}

#[test]
fn json_lines_are_documents_and_bad_ones_are_named_or_counted() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let mut json = pages(500);
    json.push_str("{\"page\":{\"body\":7}}\nnonsense\n\n");
    json.push_str(&pages(3));
    fs::write(at("pages.jsonl"), &json).unwrap();
    let (input, output) = (at("pages.jsonl"), at("out"));
    let base = ["data", "convert", "--input", text(&input), "--output", text(&output)];
    let with = |more: &[&'static str]| [&base[..], &["--vocab-size", "300"], more].concat();

    refused(&with(&[]), 65, "pages.jsonl, line 1: it has no field `text`");
    let field = ["--field", "page.body"];
    refused(&with(&field), 65, "line 501: its field `page.body` is a number, not a string");
    assert!(!output.exists());
    let made = phalanx(&with(&["--field", "page.body", "--skip-bad-lines", "--json"])).json();
    assert_eq!((&made["documents"], &made["skipped_lines"]), (&503.into(), &2.into()));
    let shown = phalanx(&["data", "inspect", text(&output), "--sample", "1"]).good();
    assert!(shown.contains("token 0: the king loves"), "{shown}");

    // The same name, another conversion.
    refused(&with(&["--field", "id"]), 65, "is there already and holds something else");
}

#[test]
fn a_conversion_that_was_killed_goes_on_and_gives_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    for (file, pages_of) in [("a.jsonl", 9000), ("b.jsonl", 12_000)] {
        fs::write(at("in").join(file), pages(pages_of)).unwrap();
    }
    fs::write(at("in/text.txt"), lines(3, 60_000).replace("5.\n", "5.\n \n")).unwrap();
    let (json, plain) = (at("in"), at("in/text.txt"));
    let cases: [(&str, &Path, &[&str]); 2] = [
        ("jsonl", &json, &["--field", "page.body", "--format", "jsonl"]),
        ("paragraphs", &plain, &["--document", "blank-line"]),
    ];
    for (name, input, more) in cases {
        let (whole, cut) = (at(&format!("{name}-whole")), at(&format!("{name}-cut")));
        let args = |output: &Path| -> Vec<String> {
            let base = ["data", "convert", "--input", text(input), "--output", text(output)];
            let shards = ["--shard-bytes", "30000", "--vocab-size", "300", "--json"];
            [&base[..], more, &shards].concat().iter().map(ToString::to_string).collect()
        };
        let run =
            |list: &[String]| phalanx(&list.iter().map(String::as_str).collect::<Vec<_>>()).json();
        let expected = run(&args(&whole));
        assert!(expected["shards"].as_u64().unwrap() > 10, "{expected}");

        let killed = args(&cut);
        let killed: Vec<&str> = killed.iter().map(String::as_str).collect();
        let journal = at(&format!(".{name}-cut.partial")).join("conversion.jsonl");
        assert!(kill_in_the_middle(&killed, &journal), "it ended before it was killed");
        assert!(!cut.exists(), "nothing that is taken for data");
        let made = run(&args(&cut));
        assert!(made["resumed_shards"].as_u64().unwrap() >= 2, "{made}");
        assert_eq!(made["fingerprint"], expected["fingerprint"]);
        let (left, right) = (content(&whole), content(&cut));
        assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
        for (file, bytes) in &left {
            assert!(*bytes == right[file], "{file} differs");
        }
        phalanx(&["data", "verify", text(&cut)]).good();
    }
}

#[test]
fn half_of_another_conversion_is_not_mixed_with_this_one() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("a.txt"), lines(1, 80_000)).unwrap();
    let (input, output) = (at("a.txt"), at("out"));
    let base = ["data", "convert", "--input", text(&input), "--output", text(&output)];
    let more = ["--document", "line", "--shard-bytes", "20000", "--vocab-size"];
    let first = [&base[..], &more, &["300"]].concat();
    let journal = at(".out.partial/conversion.jsonl");
    assert!(kill_in_the_middle(&first, &journal), "it ended before it was killed");
    let second = [&base[..], &more, &["400"]].concat();
    // Nothing of this conversion is kept, so nothing is said of what stays; and so if somebody else is at it, or it cannot begin.
    let silent = |args: &[&str], code: i32, part: &str| {
        let ended = phalanx(args);
        assert_eq!(ended.code, Some(code), "{ended:?}");
        assert!(ended.err.contains(part) && !ended.err.contains("shards"), "{}", ended.err);
    };
    silent(&second, 65, "half done: repeat that command");
    let held = fs::File::open(at(".out.lock")).unwrap();
    held.try_lock().unwrap();
    silent(&first, 75, ".out.lock");
    drop(held);
    silent(&[&first[..], &["--end-token", "</s>"]].concat(), 64, "this is for --tokenizer");
    silent(&[&first[..], &["--tokenizer", "x"]].concat(), 64, "cannot be used with");
    let none = at("none.txt");
    let elsewhere = ["data", "convert", "--input", text(&none), "--output", text(&output)];
    silent(&elsewhere, 65, "there is nothing to convert");
    // Of this one some is, and it ends with an error: the journal cannot be renamed over a folder.
    fs::create_dir(at(".out.partial/conversion.new")).unwrap();
    let ended = phalanx(&first);
    let said =
        ended.err.contains("finished shards stay in") && ended.err.contains("the same command");
    assert!(ended.code == Some(74) && said, "{ended:?}");
    fs::remove_dir(at(".out.partial/conversion.new")).unwrap();
    let restarted = [&second[..], &["--restart", "--json"]].concat();
    let json = phalanx(&restarted).json();
    assert_eq!(json["resumed_shards"], 0);
    assert!(!journal.exists(), "the hidden folder is gone");
}

#[test]
fn of_two_converters_with_one_output_the_second_fails() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::write(at("a.txt"), lines(1, 100)).unwrap();
    let (input, output) = (at("a.txt"), at("out"));
    let held = fs::File::create(at(".out.lock")).unwrap();
    held.try_lock().unwrap();
    let args = ["data", "convert", "--input", text(&input), "--output", text(&output)];
    refused(&args, 75, ".out.lock");
    assert!(!output.exists());
    drop(held);
    phalanx(&args).good();
}

#[test]
fn bad_input_is_one_message_and_a_code() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    fs::create_dir(at("empty")).unwrap();
    fs::create_dir(at("mixed")).unwrap();
    fs::write(at("mixed/a.txt"), "words").unwrap();
    fs::write(at("mixed/b.jsonl"), "{}").unwrap();
    fs::write(at("a.txt"), "some words\n").unwrap();
    fs::write(at("latin1.txt"), b"caf\xe9").unwrap();
    fs::write(at("blank.txt"), " \n").unwrap();
    fs::write(at("tokenizer.json"), "{\"version\":\"1.0\"}").unwrap();
    fs::create_dir(at("full")).unwrap();
    fs::write(at("full/mine"), "precious").unwrap();
    let convert = |input: &str, more: &[&str], code: i32, part: &str| {
        let (input, output) = (at(input), at("out"));
        let base = ["data", "convert", "--input", &input, "--output", &output];
        refused(&[&base[..], more].concat(), code, part);
    };
    convert("none", &[], 65, "there is nothing to convert");
    convert("empty", &[], 65, "files that end in: txt, jsonl, ndjson");
    convert("mixed", &[], 64, "say which with --format");
    convert("latin1.txt", &[], 65, "is not UTF-8 at byte 3");
    convert("blank.txt", &[], 65, "has no words");
    convert("a.txt", &["--tokenizer", &at("tokenizer.json")], 65, "cannot read the tokenizer");
    convert("a.txt", &["--tokenizer", &at("none.json")], 74, "cannot open");
    convert("a.txt", &["--vocab-size", "10"], 64, "at least 64 entries");
    convert("a.txt", &["--vocab-size", "100", "--tokenizer", "x"], 64, "cannot be used with");
    convert("a.txt", &["--output", &at("full")], 64, "cannot be used multiple times");
    convert("a.txt", &["--end-token", "</s>"], 64, "this is for --tokenizer");
    convert("a.txt", &["--shard-bytes", "0"], 64, "at least one byte");
    convert("a.txt", &["--format", "jsonl"], 65, "line 1: it is not JSON");
    convert("a.txt", &["--format", "pdf"], 64, "possible values");
    let full = at("full");
    let input = at("a.txt");
    let args = ["data", "convert", "--input", &input, "--output", &full];
    refused(&args, 65, "holds something else");
    assert_eq!(fs::read(at("full/mine")).unwrap(), b"precious");
    assert_eq!(phalanx(&["data", "convert"]).code, Some(64));
}
