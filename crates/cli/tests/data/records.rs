//! Records: arrays are converted, shown, checked and timed.

use std::fs;
use std::path::Path;

use phalanx_data::records::{ColumnValue, Field, RecordWriter};
use phalanx_data::DType;

use crate::support::{content, damage, kill_in_the_middle, phalanx, refused, text};

fn records(target: &Path) {
    let fields = vec![Field::fixed("x", DType::I64, [4]), Field::variable("y", DType::U8)];
    let mut writer = RecordWriter::create(target, fields, 3000).expect("create");
    for record in 0..400_i64 {
        let length = usize::try_from(record % 5).expect("small");
        let x = [record, record + 1, record + 2, record + 3];
        let y = vec![7_u8; length];
        let values = [ColumnValue::of(&x), ColumnValue::of(&y)];
        writer.push(&values).expect("push");
    }
    writer.finish().expect("finish");
}

#[test]
fn records_are_shown_checked_and_timed() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("records");
    records(&target);
    let path = text(&target);
    let shown = phalanx(&["data", "inspect", path, "--sample", "2"]).good();
    for part in [
        "phalanx-records 2",
        "records      400\n",
        "x I64 [4]",
        "y U8 of any length",
        "record 1: y 1 elements 07\n",
    ] {
        assert!(shown.contains(part), "{part} in:\n{shown}");
    }
    let json = phalanx(&["data", "inspect", path, "--json"]).json();
    assert_eq!((&json["records"], &json["fields"][1]["shape"]), (&400.into(), &"variable".into()));
    assert!(phalanx(&["data", "verify", path]).good().contains("all good"));
    let timed = phalanx(&["data", "bench", path, "--seconds", "0.1", "--json"]).json();
    assert!(timed["records_per_second"].as_f64().unwrap() > 100.0, "{timed}");

    damage(&target.join("records-00001.safetensors"), 4200);
    let found = phalanx(&["data", "verify", path]);
    assert_eq!(found.code, Some(65));
    assert!(found.out.contains("records-00001.safetensors is damaged"), "{}", found.out);
}

#[test]
fn arrays_become_records() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    records(&at("records"));
    // A shard is itself a file of arrays; the variable field's offsets have another length than its values.
    let shard = at("records").join("records-00000.safetensors");
    let output = at("out");
    let args = ["data", "convert", "--input", text(&shard), "--output", text(&output)];
    refused(&args, 65, "rows, as the other tensors");
    assert!(!output.exists());

    let fields = vec![Field::fixed("x", DType::F32, [2]), Field::fixed("y", DType::U8, [])];
    let mut writer = RecordWriter::create(&at("fixed"), fields, 1 << 20).unwrap();
    for _ in 0..50 {
        writer.push(&[ColumnValue::of(&[1.0_f32, 2.0]), ColumnValue::of(&[3_u8])]).unwrap();
    }
    writer.finish().unwrap();
    let input = at("arrays.safetensors");
    fs::copy(at("fixed").join("records-00000.safetensors"), &input).unwrap();
    let json = ["data", "convert", "--input", text(&input), "--output", text(&output), "--json"];
    let made = phalanx(&json);
    assert!(
        made.err.contains("data: writing records (") && !made.err.contains("token"),
        "{made:?}"
    );
    assert_eq!(made.json()["records"], 50);
    let shown = phalanx(&["data", "inspect", text(&output)]).good();
    assert!(shown.contains("x F32 [2]") && shown.contains("y U8 []"), "{shown}");
    refused(&args[..4], 64, "--output");
}

#[test]
fn arrays_of_which_a_killed_run_converted_some_give_the_same_bytes() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("in")).unwrap();
    for (name, count) in [("a.safetensors", 90_000_u32), ("b.safetensors", 60_000)] {
        let fields = vec![Field::fixed("x", DType::U32, [20])];
        let mut writer = RecordWriter::create(&at("made"), fields, 1 << 30).unwrap();
        for record in 0..count {
            let row: [u32; 20] =
                std::array::from_fn(|place| record ^ u32::try_from(place).unwrap());
            writer.push(&[ColumnValue::of(&row)]).unwrap();
        }
        writer.finish().unwrap();
        fs::rename(at("made/records-00000.safetensors"), at("in").join(name)).unwrap();
        fs::remove_dir_all(at("made")).unwrap();
    }
    let (input, whole, cut) = (at("in"), at("whole"), at("cut"));
    let args = |output| {
        let base = ["data", "convert", "--format", "safetensors", "--input", text(&input)];
        [&base[..], &["--shard-bytes", "50000", "--json", "--output", output]].concat()
    };
    let expected = phalanx(&args(text(&whole))).json();
    assert_eq!((&expected["records"], &expected["resumed_shards"]), (&150_000.into(), &0.into()));
    let journal = at(".cut.partial/conversion.jsonl");
    assert!(kill_in_the_middle(&args(text(&cut)), &journal), "it ended before it was killed");
    assert!(!cut.exists(), "nothing that is taken for data");
    let mut other = args(text(&cut));
    other.iter_mut().filter(|part| **part == "50000").for_each(|part| *part = "70000");
    refused(&other, 65, "half done: repeat that command");
    let one_thread = [&args(text(&cut))[..], &["--threads", "1"]].concat();
    let made = phalanx(&one_thread).json();
    assert!(made["resumed_shards"].as_u64().unwrap() >= 2, "{made}");
    assert!(content(&whole) == content(&cut), "the same bytes");
    assert!(phalanx(&["data", "verify", text(&cut)]).good().contains("all good"));
    assert_eq!(phalanx(&one_thread).json()["reused"], true);
    refused(&[&args("x")[..], &["--tokenizer", "t.json"]].concat(), 64, "it is for text");
}
