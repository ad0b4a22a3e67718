//! CUDA from a program that was built without it: libtorch registers its CUDA support when the library is
//! loaded, so it is loaded at run time, where there is a driver.
#![expect(unsafe_code, reason = "gate: loads libtorch_cuda")]

use std::mem::ManuallyDrop;
use std::sync::OnceLock;

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

/// What came of looking for CUDA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cuda {
    /// The driver and libtorch's CUDA support are there, with this many devices.
    Available {
        /// GPUs that this process sees.
        device_count: i64,
    },
    /// There is no NVIDIA driver on this machine.
    NoDriver,
    /// There is a driver, but libtorch's CUDA libraries are not to be found.
    NoLibtorchCuda {
        /// What the loader said.
        message: String,
    },
}

/// Loads libtorch's CUDA support if a driver is there. Call it before anything else of tch (`tch::Cuda`, a seed, a
/// tensor): libtorch asks once in its life whether there is CUDA, and an answer from before stays. Call it before a
/// [`Group`](phalanx_comm::Group) as well, so that both use the libnccl that libtorch brings. Later calls return the first answer.
///
/// `libtorch_cuda.so` is looked for as the loader does (`LD_LIBRARY_PATH`, the program's run-time path):
/// put the `torch/lib` folder of the full wheel there, or run `scripts/setup.sh --cuda`.
pub fn load_cuda() -> &'static Cuda {
    static ANSWER: OnceLock<Cuda> = OnceLock::new();
    ANSWER.get_or_init(load)
}

fn load() -> Cuda {
    // tch::Cuda must not be asked first: libtorch would remember that there is none.
    if open("libcuda.so.1", RTLD_NOW).is_err() {
        return Cuda::NoDriver;
    }
    match open("libtorch_cuda.so", RTLD_NOW | RTLD_GLOBAL) {
        Err(error) => Cuda::NoLibtorchCuda { message: error.to_string() },
        Ok(()) => Cuda::Available { device_count: tch::Cuda::device_count() },
    }
}

/// Opens a library and keeps it open: its registrations must not go away.
fn open(name: &str, flags: i32) -> Result<(), libloading::Error> {
    // SAFETY: both libraries are meant to be loaded this way; their initialisers only register themselves.
    let library = unsafe { Library::open(Some(name), flags) }?;
    _ = ManuallyDrop::new(library);
    Ok(())
}
