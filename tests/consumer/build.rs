//! The run-time path of libtorch, so that the program starts without `LD_LIBRARY_PATH`.

fn main() {
    let lib = std::env::var("DEP_PHALANX_LIBTORCH_LIB").expect("phalanx passes it on");
    println!("cargo:rustc-link-arg=-Wl,-rpath,{lib}");
}
