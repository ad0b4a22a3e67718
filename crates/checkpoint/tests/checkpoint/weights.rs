//! Files of weights: written as others read them, and read whoever wrote them.

use std::path::Path;

use phalanx_checkpoint::fs::Real;
use phalanx_checkpoint::{
    diff, write_weights, write_weights_file, Alone, Dtype, Error, Extent, Folder, Opened, Saver,
    SaverOptions, Selected, Snapshot, Tensors, Weights, WeightsOptions, What,
};

use crate::support::{check, save, Memory};

fn write(path: &Path, tensors: &dyn Tensors, options: &WeightsOptions) -> Vec<String> {
    let files = write_weights(&Real, path, tensors, options).expect("write");
    let names = files.iter().filter_map(|file| file.file_name());
    names.map(|name| name.to_string_lossy().into_owned()).collect()
}

#[test]
fn one_file_has_the_name_that_it_is_given_and_makes_no_folder() {
    let folder = tempfile::tempdir().unwrap();
    let bytes = [1, 2, 3, 4, 5, 6];
    let mut snapshot = Snapshot::new();
    snapshot.whole("w", Dtype::U8, &[2, 3], &bytes);
    let file = folder.path().join("weights.bin");
    write_weights_file(&Real, &file, &snapshot, None).unwrap();
    assert_eq!(Weights::open(&file).unwrap().read_whole("w").unwrap(), bytes);
    let nowhere = folder.path().join("missing/weights.bin");
    let error = write_weights_file(&Real, &nowhere, &snapshot, None).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(!folder.path().join("missing").exists());
}

#[test]
fn a_checkpoint_becomes_one_file_or_several_and_stays_the_same() {
    let folder = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(folder.path().join("ckpt"), SaverOptions::default()).unwrap();
    save(&mut saver, &mut Alone, 3);
    let opened = Opened::open(folder.path().join("ckpt")).unwrap();
    let one = folder.path().join("one");
    assert_eq!(write(&one, opened.tensors(), &WeightsOptions::default()), ["model.safetensors"]);
    check(&Weights::open(&one).unwrap(), 3);
    check(&Weights::open(one.join("model.safetensors")).unwrap(), 3);

    let options = WeightsOptions { shard_bytes_max: 500, ..WeightsOptions::default() };
    let many = folder.path().join("many");
    let files = write(&many, opened.tensors(), &options);
    assert!(
        files.len() > 3 && files[0] == format!("model-00001-of-{:05}.safetensors", files.len() - 1)
    );
    check(&Weights::open(&many).unwrap(), 3);
    let again = Weights::open(many.join("model.safetensors.index.json")).unwrap();
    check(&again, 3);
    assert!(diff(&again, opened.tensors()).unwrap().is_empty());
    assert!(matches!(write_weights(&Real, &many, &again, &options), Err(Error::Exists { .. })));

    // What a crash leaves that came before the index.
    std::fs::remove_file(many.join("model.safetensors.index.json")).unwrap();
    let error = Weights::open(&many).unwrap_err().to_string();
    assert!(error.contains("parts of weights and no model.safetensors.index.json"), "{error}");

    let model = Selected::new(opened.tensors(), "model/");
    let file = folder.path().join("model-only.safetensors");
    assert_eq!(write(&file, &model, &options), ["model-only.safetensors"]);
    let names = Weights::open(&file).unwrap();
    assert_eq!(names.names(), ["bias", "conv", "empty", "steps", "w"]);
    let bytes = std::fs::read(&file).unwrap();
    let (_, theirs) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(theirs.metadata().as_ref().unwrap()["format"], "pt");
    assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
    let left = std::fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(left, 4, "no partial file is left");
}

#[test]
fn floating_point_tensors_are_converted_and_others_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let (floats, numbers) = ([1.5_f32, -2.25, 1e-3].map(f32::to_le_bytes).concat(), [7; 8]);
    let mut snapshot = Snapshot::new();
    snapshot.whole("w", Dtype::F32, &[3], &floats);
    snapshot.whole("n", Dtype::I64, &[1], &numbers);
    let options = WeightsOptions { dtype: Some(Dtype::BF16), ..WeightsOptions::default() };
    write(folder.path(), &snapshot, &options);
    let weights = Weights::open(folder.path()).unwrap();
    assert_eq!(weights.spec("w").unwrap().dtype, Dtype::BF16);
    let expected: Vec<u8> =
        [1.5, -2.25, 1e-3].iter().flat_map(|x| half::bf16::from_f32(*x).to_le_bytes()).collect();
    assert_eq!(weights.read_whole("w").unwrap(), expected);
    assert_eq!(weights.read_whole("n").unwrap(), numbers);
    let found = diff(&weights, &snapshot).unwrap();
    assert_eq!(found.len(), 1);
    assert!(matches!(&found[0].what, What::Spec { left: (Dtype::BF16, _), .. }));
}

#[test]
fn boxes_of_weights_are_read_and_differences_named() {
    let folder = tempfile::tempdir().unwrap();
    let (left, right): (Vec<u8>, Vec<u8>) =
        ((0..12).collect(), (0..12).map(|n| n / 5 * 5).collect());
    let (mut one, mut other) = (Snapshot::new(), Snapshot::new());
    one.whole("a", Dtype::U8, &[3, 4], &left);
    one.whole("b", Dtype::U8, &[12], &left);
    other.whole("a", Dtype::U8, &[3, 4], &right);
    other.whole("c", Dtype::U8, &[12], &left);
    write(folder.path(), &one, &WeightsOptions::default());
    let weights = Weights::open(folder.path()).unwrap();
    let mut out = [0; 4];
    weights.read("a", &Extent::new(&[1, 1], &[2, 2]), &mut out).unwrap();
    assert_eq!(out, [5, 6, 9, 10]);
    let found: Vec<_> =
        diff(&weights, &other).unwrap().into_iter().map(|found| (found.name, found.what)).collect();
    let expected = [
        ("a".to_owned(), What::Elements { count: 9, max: 4.0 }),
        ("b".to_owned(), What::OnlyLeft),
        ("c".to_owned(), What::OnlyRight),
    ];
    assert_eq!(found, expected);
}

#[test]
fn files_that_are_no_weights_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    assert!(matches!(Opened::open(at("nothing")), Err(Error::NotFound { .. })));
    assert!(matches!(Opened::open(folder.path()), Err(Error::NotFound { .. })));
    let cases: [(&str, Vec<u8>, &str); 5] = [
        ("short.safetensors", vec![1, 2], "too few for a header"),
        (
            "long.safetensors",
            [(1_u64 << 63).to_le_bytes(), [0; 8]].concat(),
            "claims 9223372036854775808",
        ),
        ("text.safetensors", [2_u64.to_le_bytes().to_vec(), b"[]".to_vec()].concat(), "its header"),
        ("bad.index.json", b"{\"weight_map\":{\"w\":\"../w\"}}".to_vec(), "not a plain file name"),
        ("worse.index.json", b"{\"weight_map\":7}".to_vec(), "invalid type"),
    ];
    for (name, bytes, expected) in cases {
        std::fs::write(at(name), bytes).unwrap();
        let error = Weights::open(at(name)).unwrap_err();
        assert!(error.to_string().contains(expected) && error.is_damage(), "{name}: {error}");
    }
    let memory = Memory::new(1, 0, 1);
    write(&at("w.safetensors"), &memory.snapshot(), &WeightsOptions::default());
    let index = "{\"weight_map\":{\"model/w\":\"w.safetensors\",\"gone\":\"w.safetensors\"}}";
    std::fs::write(at("lost.index.json"), index).unwrap();
    let error = Weights::open(at("lost.index.json")).unwrap_err().to_string();
    assert!(error.contains("`gone` is not in w.safetensors"), "{error}");
    let part = "{\"metadata\":{},\"weight_map\":{\"model/w\":\"w.safetensors\"}}";
    std::fs::write(at("some.index.json"), part).unwrap();
    assert_eq!(Weights::open(at("some.index.json")).unwrap().names(), ["model/w"]);
}

#[test]
fn headers_changed_anywhere_never_panic() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("w.safetensors");
    let memory = Memory::new(1, 0, 1);
    write(&path, &memory.snapshot(), &WeightsOptions::default());
    let good = std::fs::read(&path).unwrap();
    for n in 0..2000_usize {
        // A new file each time: some file systems flush one that is written over.
        std::fs::remove_file(&path).unwrap();
        let mut bad = good.clone();
        // The text of the header ends long before the page does.
        let at = n * 7 % 1200;
        bad[at] = b"[]{},:\"0-9\0"[n * 31 % 11];
        std::fs::write(&path, &bad).unwrap();
        if let Ok(weights) = Weights::open(&path) {
            weights.names().into_iter().for_each(|name| drop(weights.read_whole(name)));
        }
    }
}

#[test]
fn the_newest_of_a_folder_is_what_the_folder_opens_as() {
    let folder = tempfile::tempdir().unwrap();
    let mut saver = Saver::new(folder.path(), SaverOptions::default()).unwrap();
    save(&mut saver, &mut Alone, 3);
    save(&mut saver, &mut Alone, 4);
    let opened = Opened::open(folder.path()).unwrap();
    assert_eq!(opened.checkpoint().unwrap().step(), 4);
    assert_eq!(Folder::new(folder.path()).list().unwrap().len(), 2);
}
