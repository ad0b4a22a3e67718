//! Each binary fuzzes the target of its own name.
#![no_main]

use std::sync::OnceLock;

use libfuzzer_sys::fuzz_target;
use phalanx_data::fuzzing::{Target, TARGETS};

fn target() -> Target {
    static TARGET: OnceLock<Target> = OnceLock::new();
    let name = env!("CARGO_BIN_NAME");
    *TARGET.get_or_init(|| {
        *TARGETS.iter().find(|target| target.name == name).expect("a target has this name")
    })
}

fuzz_target!(|bytes: &[u8]| {
    for case in (target().cases)(bytes) {
        (case.read)();
    }
});
