//! The README is a page, every document is in the index, and links lead somewhere.

use std::fs;
use std::path::PathBuf;

use super::{read, relative, root};

/// What a stranger reads first is a page.
const README_LINES_MAX: usize = 170;

#[test]
fn the_readme_is_short_and_all_documents_are_in_the_index() {
    let lines = read(&root().join("README.md")).lines().count();
    assert!(lines <= README_LINES_MAX, "README.md has {lines} lines: what is longer is a guide");
    let index = read(&root().join("docs/README.md"));
    let missing: Vec<_> = documents_in("docs")
        .into_iter()
        .filter_map(|file| file.file_name().map(|name| name.to_string_lossy().into_owned()))
        .filter(|name| name != "README.md" && !index.contains(&format!("({name})")))
        .collect();
    assert!(missing.is_empty(), "docs/README.md lists no {missing:#?}");
}

#[test]
fn links_between_documents_lead_somewhere() {
    let mut broken = Vec::new();
    for file in documents_in("").into_iter().chain(documents_in("docs")) {
        let folder = file.parent().unwrap_or(root());
        for target in read(&file).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let path = target.split('#').next().unwrap_or_default();
            let elsewhere = path.is_empty() || path.contains("://");
            if !elsewhere && !folder.join(path).exists() {
                broken.push(format!("{}: {target}", relative(&file)));
            }
        }
    }
    assert!(broken.is_empty(), "no such files: {broken:#?}");
}

/// The Markdown files that lie in a folder of ours itself.
fn documents_in(folder: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(root().join(folder)).into_iter().flatten().flatten();
    let mut files: Vec<_> = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "md"))
        .collect();
    files.sort();
    assert!(!files.is_empty(), "no documents in {folder:?}");
    files
}
