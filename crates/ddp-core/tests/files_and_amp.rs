//! Weights files and autocast.

mod support;

use phalanx_ddp_core::{amp, checkpoint, Error};
use support::Model;
use tch::{Device, Kind, Tensor};

#[test]
fn what_is_saved_is_loaded() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let model = Model::new(3);
    checkpoint::save_safetensors(&path, &model.sorted()).unwrap();
    let other = Model::new(99);
    assert_ne!(other.bits(), model.bits());
    let unknown = checkpoint::load_safetensors(&path, &other.vs).unwrap();
    assert!(unknown.is_empty());
    assert_eq!(other.bits(), model.bits());
    assert_eq!(names(folder.path()), ["model.safetensors"], "no partial file is left");
}

/// What is in a folder.
fn names(folder: &std::path::Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.expect("an entry").file_name();
    entries.map(|entry| name(entry).into_string().expect("UTF-8")).collect()
}

#[test]
fn writers_of_one_file_at_once_leave_one_whole_file_of_an_ordinary_mode() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let models: Vec<Model> = (0..4).map(Model::new).collect();
    let bits: Vec<_> = models.iter().map(Model::bits).collect();
    let writers = models.into_iter().map(|model| {
        let path = path.clone();
        std::thread::spawn(move || {
            for _ in 0..25 {
                checkpoint::save_safetensors(&path, &model.sorted()).unwrap();
                let read = Model::new(99);
                checkpoint::load_safetensors(&path, &read.vs).unwrap();
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.join().unwrap();
    }
    assert_eq!(names(folder.path()), ["model.safetensors"]);
    let read = Model::new(99);
    checkpoint::load_safetensors(&path, &read.vs).unwrap();
    assert!(bits.contains(&read.bits()), "the file is a mixture");
    let plain = folder.path().join("plain");
    let mode = |of: &std::path::Path| std::fs::metadata(of).unwrap().permissions().mode();
    std::fs::write(&plain, b"").unwrap();
    assert_eq!(mode(&path), mode(&plain));
}

#[test]
fn a_save_that_fails_leaves_the_old_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    std::fs::create_dir(&path).unwrap();
    let error = checkpoint::save_safetensors(&path, &Model::new(3).sorted()).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert_eq!(names(folder.path()), ["model.safetensors"]);
    assert!(path.is_dir());
}

#[test]
fn weights_of_another_model_are_refused_before_anything_changes() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let tensors = vec![
        ("one.bias".to_owned(), Tensor::ones([5], (Kind::Float, Device::Cpu))),
        ("stranger".to_owned(), Tensor::ones([1], (Kind::Float, Device::Cpu))),
    ];
    checkpoint::save_safetensors(&path, &tensors).unwrap();
    let model = Model::new(3);
    let before = model.bits();
    let error = checkpoint::load_safetensors(&path, &model.vs).unwrap_err();
    assert!(matches!(error, Error::WeightsMismatch { .. }));
    let text = error.to_string();
    assert!(text.contains("one.bias: [5], the model has [131]"), "{text}");
    assert!(text.contains("two.weight: missing, the model has [33, 131]"), "{text}");
    assert_eq!(model.bits(), before);
}

#[test]
fn files_that_are_not_weights_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.safetensors");
    let model = Model::new(3);
    assert!(matches!(checkpoint::load_safetensors(&path, &model.vs), Err(Error::Io { .. })));
    for bytes in [&b""[..], b"hello", &[255; 64], b"\x02\0\0\0\0\0\0\0{}trailing"] {
        std::fs::write(&path, bytes).unwrap();
        let error = checkpoint::load_safetensors(&path, &model.vs).unwrap_err();
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
    let nowhere = folder.path().join("missing/model.safetensors");
    let error = checkpoint::save_safetensors(&nowhere, &model.sorted()).unwrap_err();
    assert!(error.to_string().starts_with("writing"), "{error}");
}

#[test]
fn autocast_narrows_matrix_products_inside_and_only_inside() {
    let a = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
    let product = || a.matmul(&a).kind();
    assert_eq!(product(), Kind::Float);
    assert_eq!(amp::autocast(Device::Cpu, Kind::BFloat16, product).unwrap(), Kind::BFloat16);
    assert_eq!(product(), Kind::Float);
    let nested = amp::autocast(Device::Cpu, Kind::BFloat16, || {
        let inner = amp::autocast(Device::Cpu, Kind::Half, product).unwrap();
        (inner, product())
    });
    assert_eq!(nested.unwrap(), (Kind::Half, Kind::BFloat16));
    assert!(amp::autocast(Device::Cpu, Kind::Int64, product).is_err());
    assert_eq!(product(), Kind::Float);
}
