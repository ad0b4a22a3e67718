//! Each binary fuzzes the target of its own name.
#![no_main]

use std::sync::{Mutex, OnceLock, PoisonError};

use libfuzzer_sys::fuzz_target;
use phalanx_data::fuzzing::{FuzzTarget, TARGETS};

/// What the last panic said.
static LAST_PANIC: Mutex<String> = Mutex::new(String::new());

fn target() -> FuzzTarget {
    static TARGET: OnceLock<FuzzTarget> = OnceLock::new();
    let name = env!("CARGO_BIN_NAME");
    *TARGET.get_or_init(|| {
        // The fuzzer ends at any panic, but the converters catch those of libraries: only one that is not caught counts.
        std::panic::set_hook(Box::new(|about| {
            *LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner) = about.to_string();
        }));
        *TARGETS.iter().find(|target| target.name == name).expect("a target has this name")
    })
}

fuzz_target!(|bytes: &[u8]| {
    let read = || (target().cases)(bytes).iter().for_each(|case| {
        (case.read)();
    });
    if std::panic::catch_unwind(read).is_err() {
        eprintln!("{}", LAST_PANIC.lock().unwrap_or_else(PoisonError::into_inner));
        std::process::abort();
    }
});
