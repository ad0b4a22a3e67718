//! Compiles the shim against the libtorch that `torch-sys` uses and passes its folder on.

use std::env;
use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=shim");
    let lib = PathBuf::from(env::var("DEP_TCH_LIBTORCH_LIB").map_err(|_missing| {
        "torch-sys did not say where libtorch is: run scripts/setup.sh, or set LIBTORCH"
    })?);
    let include = lib.parent().ok_or("libtorch's lib folder has no parent")?.join("include");
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .warnings(false) // libtorch's own headers warn
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        // As libtorch was built: classes of its headers have other members without it.
        .define("NDEBUG", None)
        .files(["shim/ddp_shim.cc", "shim/ddp_autograd.cc"])
        .compile("phalanx_ddp_shim");
    // torch-sys links libtorch_cpu and libc10 for the whole program; this gives our own tests and
    // examples their run-time path. Dependents read DEP_PHALANX_DDP_SHIM_LIBTORCH_LIB for theirs.
    println!("cargo:rustc-link-arg=-Wl,-rpath,{}", lib.display());
    println!("cargo:libtorch_lib={}", lib.display());
    Ok(())
}
