//! Gives our own tests and examples the run-time path of libtorch and passes its folder on:
//! a crate that depends on phalanx reads `DEP_PHALANX_LIBTORCH_LIB` in its build script.

use std::env;

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    // Absent without the feature `torch`: then nothing here links libtorch.
    if let Ok(lib) = env::var("DEP_PHALANX_DDP_SHIM_LIBTORCH_LIB") {
        println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
        println!("cargo:libtorch_lib={lib}");
    }
}
