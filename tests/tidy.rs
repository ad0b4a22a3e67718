//! Holds the invariants of `ARCHITECTURE.md` that no compiler checks, by reading the sources:
//! pure files stay pure, one module reads the environment, every file with `unsafe` is a declared
//! gate, the C++ boundary is declared alike on both sides, files stay short, the README shows
//! the example that is built, and documents can be found.
//!
//! It needs nothing but the standard library, so that it also runs without libtorch:
//! `rustc --edition 2021 --test tests/tidy.rs -o /tmp/tidy && /tmp/tidy`.

#[path = "tidy/documents.rs"]
mod documents;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Files and folders that decide without a clock, a thread, a socket, a device, an environment or
/// a log. One that is moved or removed must be moved or removed here as well.
const PURE: &[&str] = &[
    "crates/checkpoint/src/content.rs",
    "crates/checkpoint/src/cover.rs",
    "crates/checkpoint/src/extent.rs",
    "crates/checkpoint/src/flat.rs",
    "crates/checkpoint/src/folder/keep.rs",
    "crates/checkpoint/src/folder/names.rs",
    "crates/checkpoint/src/header.rs",
    "crates/checkpoint/src/manifest/check.rs",
    "crates/checkpoint/src/numbers.rs",
    "crates/checkpoint/src/plan.rs",
    "crates/checkpoint/src/saver/phase.rs",
    "crates/checkpoint/src/shard.rs",
    "crates/comm/src/algorithm",
    "crates/comm/src/control/intake.rs",
    "crates/comm/src/control/resume.rs",
    "crates/comm/src/checksum",
    "crates/comm/src/fingerprint.rs",
    "crates/comm/src/kernel",
    "crates/comm/src/recorder/lineup.rs",
    "crates/comm/src/recorder/record.rs",
    "crates/comm/src/slots/header.rs",
    "crates/data/src/fingerprint.rs",
    "crates/data/src/format/layout.rs",
    "crates/data/src/loader/agreement.rs",
    "crates/data/src/loader/holes.rs",
    "crates/data/src/loader/state.rs",
    "crates/data/src/loader/wait_shares.rs",
    "crates/data/src/order",
    "crates/data/src/random.rs",
    "crates/data/src/samples/masking.rs",
    "crates/data/src/source/answer.rs",
    "crates/data/src/source/filesystem.rs",
    "crates/data/src/text/cut.rs",
    "crates/ddp-core/src/checkpoint/inventory.rs",
    "crates/ddp-core/src/checkpoint/neighbours.rs",
    "crates/ddp-core/src/hooks/int8/blocks.rs",
    "crates/ddp-core/src/hooks/power_sgd/low_rank.rs",
    "crates/ddp-core/src/hooks/power_sgd/matrices.rs",
    "crates/ddp-core/src/hooks/top_k/select.rs",
    "crates/ddp-core/src/optim/groups.rs",
    "crates/ddp-core/src/optim/piece.rs",
    "crates/ddp-core/src/optim/waves.rs",
    "crates/ddp-core/src/part/boxes.rs",
    "crates/ddp-core/src/part/table.rs",
    "crates/ddp-core/src/reduce/ready.rs",
    "crates/ddp-core/src/reduce/statistics.rs",
    "crates/ddp-core/src/schedule.rs",
    "crates/ddp-core/src/shard/trace.rs",
    "crates/ddp-core/src/store/exact.rs",
    "crates/ddp-core/src/store/plan.rs",
    "crates/launch/src/hosts/file.rs",
    "crates/launch/src/lines.rs",
    "crates/launch/src/elastic/keys.rs",
    "crates/launch/src/membership",
    "crates/launch/src/plan.rs",
    "crates/launch/src/restart.rs",
    "crates/model-parallel/src/mesh",
    "crates/model-parallel/src/pipeline/schedule",
    "crates/model-parallel/src/context/pieces.rs",
    "crates/model-parallel/src/expert/plan.rs",
    "crates/model-parallel/src/tensor/cut.rs",
    "crates/model-parallel/src/tensor/rows.rs",
    "crates/rendezvous/src/store/frame.rs",
    "crates/rendezvous/src/store/handshake.rs",
    "crates/rendezvous/src/store/table.rs",
    "crates/rendezvous/src/store/tcp_store/message.rs",
];

/// What a pure file must not name. `std::time::Duration` is a value and may be used.
const IMPURE: &[&str] = &[
    "Instant",
    "SystemTime",
    "std::thread",
    "std::net",
    "std::env",
    "std::fs",
    "std::process",
    "std::os",
    "std::sync::mpsc",
    "Mutex",
    "Condvar",
    "tracing",
    "tch",
    "torch_sys",
    "cudarc",
    "rustix",
    "libc",
    "rand",
];

/// Where library code may read or change the environment.
const ENVIRONMENT: &[&str] = &["crates/rendezvous/src/environment"];

/// Where library code may look at the time of day.
const TIME_OF_DAY: &[&str] = &[
    "crates/cli/src/flight.rs",
    "crates/data/src/convert/input.rs",
    "crates/data/src/source/cache.rs",
    "crates/launch/src/error_file.rs",
];

/// Crates in rooms: the folders and files at the root of their sources know each other without a
/// circle, and at most so many names are re-exported at the root.
const ROOMS: &[(&str, usize)] = &[("crates/comm/src", 35), ("crates/data/src", 20)];

/// The backends of `comm`: each a folder that could be deleted.
const BACKENDS: &[&str] = &["host", "mpi", "nccl"];

/// Longest file; one that needs more is two ideas.
const LINES_MAX: usize = 500;

const GATE: &str = "#![expect(unsafe_code, reason = \"";

#[test]
fn pure_files_name_nothing_impure() {
    let mut found = Vec::new();
    for entry in PURE {
        let files = sources_under(&root().join(entry));
        assert!(!files.is_empty(), "{entry} is listed as pure and does not exist: update PURE");
        for file in files {
            let code = without_tests(&code_of(&read(&file)));
            for (number, line) in code.lines().enumerate() {
                for word in IMPURE.iter().filter(|word| names(line, word)) {
                    found.push(format!("{}:{}: {word}", relative(&file), number + 1));
                }
            }
        }
    }
    assert!(found.is_empty(), "pure files must decide by their arguments alone: {found:#?}");
}

#[test]
fn only_the_environment_module_reads_the_environment() {
    let calls = ["var", "var_os", "vars", "vars_os", "set_var", "remove_var"];
    let mut found = Vec::new();
    for file in library_sources() {
        let name = relative(&file);
        if ENVIRONMENT.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        let code = without_tests(&code_of(&read(&file)));
        for (number, line) in code.lines().enumerate() {
            if calls.iter().any(|call| names(line, &format!("env::{call}"))) {
                found.push(format!("{name}:{}", number + 1));
            }
        }
    }
    assert!(found.is_empty(), "read it in {ENVIRONMENT:?} and pass the value on: {found:#?}");
}

/// A clock that somebody sets makes nobody late (F30): what is waited for and who lives is decided by clocks that only go forward. Labels,
/// ages of files and names of the moment may have the time of day.
#[test]
fn the_time_of_day_decides_nothing() {
    let mut found = Vec::new();
    for file in library_sources() {
        let name = relative(&file);
        if TIME_OF_DAY.iter().any(|allowed| name.starts_with(allowed)) {
            continue;
        }
        let code = without_tests(&code_of(&read(&file)));
        for (number, line) in code.lines().enumerate() {
            if ["SystemTime", "UNIX_EPOCH", "ClockId::Realtime"]
                .iter()
                .any(|word| names(line, word))
            {
                found.push(format!("{name}:{}", number + 1));
            }
        }
    }
    assert!(found.is_empty(), "take Instant, or the monotonic clock: {found:#?}");
}

#[test]
fn every_file_with_unsafe_opens_as_a_gate() {
    let files = sources_under(root());
    assert!(files.len() > 5, "found only {files:?}");
    let bad: Vec<_> = files
        .iter()
        .filter(|file| {
            let text = read(file);
            code_of(&text).lines().any(|line| names(line, "unsafe")) && !text.contains(GATE)
        })
        .map(|file| relative(file))
        .collect();
    assert!(bad.is_empty(), "unsafe outside of a gate module ({GATE}…): {bad:#?}");
}

#[test]
fn the_shim_is_declared_alike_in_c_and_rust() {
    let header = code_of(&read(&root().join("crates/ddp-core/shim/ddp_shim.h")));
    let ffi = code_of(&read(&root().join("crates/ddp-core/src/shim/ffi.rs")));
    let in_c = shim_functions(&header, "");
    let in_rust = shim_functions(&ffi, "fn ");
    assert!(!in_c.is_empty(), "no function found in ddp_shim.h");
    assert_eq!(in_c, in_rust, "name → number of parameters; left ddp_shim.h, right ffi.rs");
}

#[test]
fn files_are_short() {
    let long: Vec<_> = sources_under(root())
        .iter()
        .map(|file| (relative(file), read(file).lines().count()))
        .filter(|(_, lines)| *lines > LINES_MAX)
        .collect();
    assert!(long.is_empty(), "cut along an idea: {long:#?}");
}

#[test]
fn no_circle_goes_across_the_rooms_of_a_crate() {
    for (crate_root, _) in ROOMS {
        let mut rooms = rooms_under(&root().join(crate_root));
        assert!(rooms.len() > 1, "{crate_root} has no rooms: update ROOMS");
        // What needs nobody who is left is no part of a circle.
        while let Some(free) =
            rooms.iter().find(|(_, needs)| needs.is_empty()).map(|one| one.0.clone())
        {
            rooms.remove(&free);
            for needs in rooms.values_mut() {
                needs.remove(&free);
            }
        }
        assert!(rooms.is_empty(), "a circle is among these of {crate_root}: {rooms:#?}");
    }
}

#[test]
fn no_backend_knows_another_and_the_group_knows_none() {
    let mut found = Vec::new();
    for backend in BACKENDS {
        let own = format!("crates/comm/src/backend/{backend}");
        assert!(root().join(&own).is_dir(), "{own} is no backend: update BACKENDS");
        let paths = [format!("backend::{backend}::"), format!("super::{backend}::")];
        for file in sources_under(&root().join("crates/comm/src")) {
            let code = without_tests(&code_of(&read(&file)));
            if !relative(&file).starts_with(&own) && paths.iter().any(|path| code.contains(path)) {
                found.push(format!("{} names {backend}", relative(&file)));
            }
        }
    }
    assert!(found.is_empty(), "what all backends need lies beside them: {found:#?}");
}

#[test]
fn the_roots_of_crates_re_export_what_most_programs_need() {
    for (crate_root, names_max) in ROOMS {
        let code = code_of(&read(&root().join(crate_root).join("lib.rs")));
        let exports = code.split("pub use ").skip(1).filter_map(|rest| rest.split(';').next());
        let names: usize =
            exports.map(|list| list.split(',').filter(|name| name.trim() != "}").count()).sum();
        assert!(names <= *names_max, "{crate_root} re-exports {names} names of {names_max}");
    }
}

#[test]
fn the_readme_shows_the_example_that_is_built() {
    let example = read(&root().join("examples/minimal.rs"));
    assert!(example.lines().count() <= 40, "minimal.rs is to fit on a screen");
    let readme = read(&root().join("README.md"));
    let shown = readme.split("```rust").skip(1).filter_map(|block| {
        let (_, rest) = block.split_once('\n')?;
        rest.split_once("```").map(|(code, _)| code)
    });
    assert!(
        shown.into_iter().any(|code| code.trim() == example.trim()),
        "README.md must show examples/minimal.rs as it is"
    );
}

#[test]
fn the_scanner_sees_code_and_nothing_else() {
    let text = "a(\"unsafe \\\" \"); // unsafe\n/* unsafe /* nested */ unsafe */ b('\"', 'x);\nr#\"unsafe\"# c";
    let code = code_of(text);
    assert_eq!(code.lines().count(), 3);
    assert!(!code.contains("unsafe"), "{code}");
    for kept in ["a(", "b(", "'x);", "c"] {
        assert!(code.contains(kept), "{kept} is missing in {code}");
    }
    assert!(names("use std::env::var;", "env::var") && !names("env::var_os()", "env::var"));
}

fn root() -> &'static Path {
    Path::new(option_env!("CARGO_MANIFEST_DIR").unwrap_or("."))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path)
        .unwrap_or_else(|error| panic!("cannot read {}: {error}", path.display()))
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).display().to_string()
}

/// The Rust and C++ sources in a folder of ours (or the one file), sorted.
fn sources_under(start: &Path) -> Vec<PathBuf> {
    if start.is_file() {
        return vec![start.to_path_buf()];
    }
    let mut files = Vec::new();
    let mut folders = vec![start.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            let hidden = name.to_string_lossy().starts_with('.');
            if path.is_dir() && !path.is_symlink() {
                if !hidden && name != "target" && name != "third_party" {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|end| end == "rs" || end == "cc" || end == "h") {
                files.push(path);
            }
        }
    }
    files.sort();
    files
}

/// The folders and files at the root of a crate's sources, but for `lib.rs`, and which others each
/// of them names.
fn rooms_under(crate_root: &Path) -> BTreeMap<String, BTreeSet<String>> {
    let mut rooms: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for file in sources_under(crate_root) {
        let within = file.strip_prefix(crate_root).unwrap_or(&file);
        let room = within.iter().next().unwrap_or_default().to_string_lossy().into_owned();
        let code = without_tests(&code_of(&read(&file)));
        let paths = code.split("crate::").skip(1);
        let names_room = |path: &str| path.starts_with(|c: char| c.is_lowercase());
        assert!(paths.clone().all(names_room), "name the room of each import: {}", relative(&file));
        let first = |path: &str| {
            path.split(|c: char| !c.is_alphanumeric() && c != '_').next().map(str::to_owned)
        };
        let needs = rooms.entry(room.trim_end_matches(".rs").to_owned()).or_default();
        needs.extend(paths.filter_map(first));
    }
    rooms.remove("lib");
    let names: Vec<String> = rooms.keys().cloned().collect();
    for (own, needs) in &mut rooms {
        needs.retain(|name| name != own && names.contains(name));
    }
    rooms
}

fn library_sources() -> Vec<PathBuf> {
    let files: Vec<_> = sources_under(root())
        .into_iter()
        .filter(|file| {
            let name = relative(file);
            let in_library = name.starts_with("src/") || name.contains("/src/");
            in_library && !name.starts_with("src/bin/") && !name.starts_with("tests/")
        })
        .collect();
    assert!(files.len() >= 5, "the five crates have sources: {files:?}");
    files
}

/// Whether a line has this path as whole words: `env::var` is not in `env::var_os`.
fn names(line: &str, path: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(path)
        .any(|(at, _)| !line[..at].ends_with(word) && !line[at + path.len()..].starts_with(word))
}

/// Everything before a module of unit tests at the end of the file.
fn without_tests(code: &str) -> String {
    code.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_string()
}

/// The functions that begin with `ddp_`, with their numbers of parameters.
fn shim_functions(code: &str, keyword: &str) -> BTreeMap<String, usize> {
    let mut functions = BTreeMap::new();
    for (at, _) in code.match_indices("ddp_") {
        let before = &code[..at];
        if before.ends_with(|c: char| c.is_alphanumeric() || c == '_') || !before.ends_with(keyword)
        {
            continue;
        }
        let rest = &code[at..];
        let name_len = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        if rest[name_len..].starts_with('(') {
            functions.insert(rest[..name_len].to_string(), parameter_count(&rest[name_len + 1..]));
        }
    }
    functions
}

/// Counts what stands between here and the closing parenthesis.
fn parameter_count(text: &str) -> usize {
    let mut depth = 0;
    let mut list = String::new();
    for c in text.chars() {
        match c {
            '(' => depth += 1,
            ')' if depth == 0 => break,
            ')' => depth -= 1,
            _ if depth == 0 => list.push(c),
            _ => {}
        }
    }
    list.split(',').filter(|one| !matches!(one.trim(), "" | "void")).count()
}

/// Source text without comments, strings and characters; the lines stay where they were.
fn code_of(text: &str) -> String {
    let mut code = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let skipped = skip(rest);
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(rest[..skipped].chars().filter(|c| *c == '\n'));
            rest = &rest[skipped..];
        }
    }
    code
}

/// How many bytes of a comment or a literal stand here; 0 if there is none.
fn skip(text: &str) -> usize {
    let until = |end: &str, from: usize| {
        text[from..].find(end).map_or(text.len(), |at| from + at + end.len())
    };
    if text.starts_with("//") {
        return text.find('\n').unwrap_or(text.len());
    }
    if text.starts_with("/*") {
        return block_comment(text);
    }
    if text.starts_with("r\"") {
        return until("\"", 2);
    }
    if text.starts_with("r#\"") {
        return until("\"#", 3);
    }
    if text.starts_with('"') {
        return quoted(text);
    }
    let mut chars = text.chars();
    match (chars.next(), chars.next(), chars.next()) {
        (Some('\''), Some('\\'), _) => until("'", 3),
        (Some('\''), Some(c), Some('\'')) => 2 + c.len_utf8(),
        _ => 0,
    }
}

fn block_comment(text: &str) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        let pair = text.as_bytes().get(at..at + 2);
        if pair == Some(b"/*") {
            depth += 1;
            at += 2;
        } else if pair == Some(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += 1;
        }
    }
    text.len()
}

fn quoted(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}
