//! Pure files stay pure: what they decide depends on their arguments alone.

use std::path::Path;

#[test]
fn pure_files_use_no_clock_thread_file_environment_or_log() {
    let pure = [
        "permutation",
        "random",
        "sampler",
        "blocks",
        "mixing",
        "quality",
        "slice",
        "masking",
        "fingerprint",
        "state",
    ];
    let foreign =
        ["std::time", "std::thread", "std::fs", "std::env", "std::net", "std::sync", "tracing"];
    for name in pure {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/{name}.rs"));
        let source = std::fs::read_to_string(&path).expect("the file is there");
        let code = source.split("#[cfg(test)]").next().unwrap_or_default();
        for word in foreign {
            // Sharing a table is no side effect.
            let code = code.replace("use std::sync::Arc;", "");
            assert!(!code.contains(word), "{} uses {word}", path.display());
        }
    }
}
