//! libnccl, found and loaded at run time: nothing of it is needed to build or to start.
//!
//! Types are those of cudarc's `nccl::sys`. Its loader is not used: it looks for `libnccl.so` (the
//! run-time packages have `libnccl.so.2` alone) and panics where a version lacks a function.
#![expect(unsafe_code, reason = "gate: the functions of a foreign library")]

use std::ffi::{c_char, c_int, c_void, CStr};
use std::sync::OnceLock;

use cudarc::nccl::sys::{cudaStream_t, ncclComm_t, ncclConfig_t, ncclUniqueId};
use libloading::Library;

/// Result codes (`nccl.h`): as numbers, for a library may know more of them than we do.
pub(crate) const SUCCESS: c_int = 0;
pub(crate) const IN_PROGRESS: c_int = 7;

/// The oldest version whose communicators initialise without blocking and split.
const OLDEST: i32 = 21_800;

macro_rules! functions {
    (
        required { $($name:ident = $symbol:literal ($($argument:ty),*);)* }
        optional { $($maybe:ident = $maybe_symbol:literal ($($maybe_argument:ty),*);)* }
    ) => {
        /// The functions of a loaded libnccl; all return a result code.
        #[derive(Debug)]
        pub(crate) struct Functions {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> c_int,)*
            $(pub(crate) $maybe: Option<unsafe extern "C" fn($($maybe_argument),*) -> c_int>,)*
            error_string: unsafe extern "C" fn(c_int) -> *const c_char,
            last_error: unsafe extern "C" fn(ncclComm_t) -> *const c_char,
        }

        impl Functions {
            /// # Safety
            ///
            /// `library` is an NCCL 2, and stays loaded as long as the functions are used.
            unsafe fn of(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    // SAFETY: the types are those of nccl.h, by the caller's word about the library.
                    $($name: *unsafe { library.get($symbol) }?,)*
                    // SAFETY: as above.
                    $($maybe: unsafe { library.get($maybe_symbol) }.ok().map(|symbol| *symbol),)*
                    // SAFETY: as above.
                    error_string: *unsafe { library.get(b"ncclGetErrorString\0") }?,
                    // SAFETY: as above.
                    last_error: *unsafe { library.get(b"ncclGetLastError\0") }?,
                })
            }
        }
    };
}

functions! {
    required {
        get_version = b"ncclGetVersion\0" (*mut c_int);
        get_unique_id = b"ncclGetUniqueId\0" (*mut ncclUniqueId);
        init_rank_config = b"ncclCommInitRankConfig\0"
            (*mut ncclComm_t, c_int, ncclUniqueId, c_int, *mut ncclConfig_t);
        split = b"ncclCommSplit\0"
            (ncclComm_t, c_int, c_int, *mut ncclComm_t, *mut ncclConfig_t);
        finalize = b"ncclCommFinalize\0" (ncclComm_t);
        destroy = b"ncclCommDestroy\0" (ncclComm_t);
        abort = b"ncclCommAbort\0" (ncclComm_t);
        get_async_error = b"ncclCommGetAsyncError\0" (ncclComm_t, *mut c_int);
        all_reduce = b"ncclAllReduce\0"
            (*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t);
        reduce = b"ncclReduce\0"
            (*const c_void, *mut c_void, usize, c_int, c_int, c_int, ncclComm_t, cudaStream_t);
        reduce_scatter = b"ncclReduceScatter\0"
            (*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t);
        broadcast = b"ncclBroadcast\0"
            (*const c_void, *mut c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t);
        all_gather = b"ncclAllGather\0"
            (*const c_void, *mut c_void, usize, c_int, ncclComm_t, cudaStream_t);
        send = b"ncclSend\0" (*const c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t);
        receive = b"ncclRecv\0" (*mut c_void, usize, c_int, c_int, ncclComm_t, cudaStream_t);
        group_start = b"ncclGroupStart\0" ();
        group_end = b"ncclGroupEnd\0" ();
        create_scaled_sum = b"ncclRedOpCreatePreMulSum\0"
            (*mut c_int, *mut c_void, c_int, c_int, ncclComm_t);
        destroy_sum = b"ncclRedOpDestroy\0" (c_int, ncclComm_t);
    }
    optional {
        mem_alloc = b"ncclMemAlloc\0" (*mut *mut c_void, usize);
        mem_free = b"ncclMemFree\0" (*mut c_void);
        register = b"ncclCommRegister\0" (ncclComm_t, *mut c_void, usize, *mut *mut c_void);
        deregister = b"ncclCommDeregister\0" (ncclComm_t, *mut c_void);
    }
}

/// A loaded libnccl.
#[derive(Debug)]
pub(crate) struct Nccl {
    pub(crate) functions: Functions,
    /// As `ncclGetVersion` says: 22809 is 2.28.9.
    version: i32,
    // Last: dropped after what points into it. In fact never: it lives in a static.
    _library: Library,
}

impl Nccl {
    /// The process's libnccl. `path` names a file; else the loader looks for `libnccl.so.2`, and finds
    /// the one that libtorch has loaded already. The first call decides.
    ///
    /// # Errors
    ///
    /// What is missing and how to get it.
    pub(crate) fn get(path: Option<&str>) -> Result<&'static Self, String> {
        static LOADED: OnceLock<Result<Nccl, String>> = OnceLock::new();
        LOADED.get_or_init(|| Self::load(path)).as_ref().map_err(Clone::clone)
    }

    fn load(path: Option<&str>) -> Result<Self, String> {
        let names = path.map_or_else(|| vec!["libnccl.so.2", "libnccl.so"], |path| vec![path]);
        let mut said = Vec::new();
        let open = |name: &&str| {
            // SAFETY: NCCL's initialisers register nothing and start nothing.
            unsafe { Library::new(*name) }.map_err(|error| said.push(reason(&error))).ok()
        };
        let library = names.iter().find_map(open).ok_or_else(|| {
            format!(
                "libnccl.so.2 cannot be loaded ({}): install NCCL 2.18 or newer (package libnccl2, or \
                 PyPI's nvidia-nccl-cu13) and put its folder on LD_LIBRARY_PATH, or name the file in \
                 PHALANX_NCCL_LIBRARY",
                said.join("; ")
            )
        })?;
        // SAFETY: a library of this name has nccl.h's functions; it is kept beside them.
        let functions = unsafe { Functions::of(&library) }
            .map_err(|error| format!("this libnccl is too old or is another library: {error}"))?;
        let mut version = 0;
        // SAFETY: writes one number.
        let code = unsafe { (functions.get_version)(&raw mut version) };
        let nccl = Self { functions, version, _library: library };
        if code != SUCCESS {
            return Err(format!("ncclGetVersion: {}", nccl.describe(code)));
        }
        if version < OLDEST {
            return Err(format!("NCCL {} is too old: 2.18 or newer is needed", nccl.version()));
        }
        Ok(nccl)
    }

    /// The version: 2.28.9.
    pub(crate) fn version(&self) -> String {
        let number = self.version;
        format!("{}.{}.{}", number / 10_000, number / 100 % 100, number % 100)
    }

    pub(crate) fn version_number(&self) -> i32 {
        self.version
    }

    /// What a result code means, in NCCL's words.
    pub(crate) fn describe(&self, code: c_int) -> String {
        // SAFETY: returns a static string for every code.
        let text = unsafe { (self.functions.error_string)(code) };
        text_of(text).unwrap_or_else(|| format!("error {code}"))
    }

    /// The newest message of this process: more than the code says.
    pub(crate) fn last_error(&self) -> Option<String> {
        // SAFETY: takes no communicator; returns a buffer of the library.
        let text = unsafe { (self.functions.last_error)(std::ptr::null_mut()) };
        text_of(text).filter(|text| !text.trim().is_empty())
    }

    /// A result code as an error text: code, last message, likely causes.
    pub(crate) fn explain(&self, code: c_int) -> String {
        let mut text = format!("{} (code {code})", self.describe(code));
        if let Some(last) = self.last_error() {
            text.push_str(&format!("; NCCL says: {}", last.trim()));
        }
        text.push_str("; ");
        text.push_str(advice(code));
        text
    }

    /// A fresh id for a communicator.
    pub(crate) fn unique_id(&self) -> Result<ncclUniqueId, String> {
        let mut id = ncclUniqueId { internal: [0; 128] };
        // SAFETY: writes the id.
        let code = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        if code == SUCCESS {
            Ok(id)
        } else {
            Err(self.explain(code))
        }
    }
}

/// The loader's own words, which name the file.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

fn text_of(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: NCCL's strings end with a zero and outlive this call.
    Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// The likely causes of a result code, and what to change.
fn advice(code: c_int) -> &'static str {
    match code {
        1 => "a CUDA call failed: look for an earlier CUDA error, free GPU memory (nvidia-smi), and see dmesg for Xid messages",
        2 => "a call of the operating system failed: check the network interface (NCCL_SOCKET_IFNAME), the size of /dev/shm, and the locked-memory limit (ulimit -l) for InfiniBand; NCCL_DEBUG=WARN says which call",
        3 => "an internal check of NCCL failed: run with NCCL_DEBUG=INFO, and use one NCCL version on all ranks",
        4 => "an argument is invalid: that is a bug of phalanx, or memory of another device was passed",
        5 => "NCCL was used wrongly: two ranks on one GPU, or ranks that disagree about the call",
        6 => "a peer is gone or unreachable: the cause is in the output of another rank, or in the network (NCCL_DEBUG=INFO, NCCL_IB_HCA, NCCL_IB_TIMEOUT)",
        _ => "run with NCCL_DEBUG=INFO for details",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The library that the environment names, that `scripts/setup.sh --test-extras` has fetched, or that the loader finds.
    fn real() -> Option<&'static Nccl> {
        let fetched =
            concat!(env!("CARGO_MANIFEST_DIR"), "/../../third_party/nccl/lib/libnccl.so.2");
        let fetched = std::path::Path::new(fetched).exists().then(|| fetched.to_owned());
        let path = crate::environment::nccl_library().or(fetched);
        match Nccl::get(path.as_deref()) {
            Ok(nccl) => Some(nccl),
            Err(error) => {
                assert!(!crate::environment::is_required("nccl"), "{error}");
                eprintln!("SKIPPED: no libnccl (scripts/setup.sh --test-extras): {error}");
                None
            }
        }
    }

    #[test]
    fn a_missing_library_says_what_to_install() {
        let error = Nccl::load(Some("/nonexistent/libnccl.so.2")).unwrap_err();
        assert!(
            error.contains("LD_LIBRARY_PATH") && error.contains("PHALANX_NCCL_LIBRARY"),
            "{error}"
        );
    }

    #[test]
    fn another_library_is_refused() {
        let error = Nccl::load(Some("libc.so.6")).unwrap_err();
        assert!(error.contains("another library"), "{error}");
    }

    /// The real library works without a GPU this far. Says so where it is not installed.
    #[test]
    fn the_real_library_gives_version_id_and_texts() {
        let Some(nccl) = real() else { return };
        assert!(nccl.version_number() >= OLDEST, "{}", nccl.version());
        assert!(nccl.version().starts_with("2."), "{}", nccl.version());
        let (first, second) = (nccl.unique_id().unwrap(), nccl.unique_id().unwrap());
        assert_ne!(first.internal, second.internal, "ids are unique");
        assert!(nccl.describe(4).starts_with("invalid argument"), "{}", nccl.describe(4));
        let text = nccl.explain(6);
        assert!(text.contains("remote process") && text.contains("NCCL_IB_HCA"), "{text}");
    }

    /// Without a GPU a communicator fails with what NCCL says, in time.
    #[test]
    fn a_communicator_without_a_gpu_is_an_error() {
        if crate::gpu::device_count("nccl").is_ok() {
            return eprintln!("SKIPPED: this machine has a GPU");
        }
        let Some(nccl) = real() else { return };
        let id = nccl.unique_id().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
        let error = crate::backend::nccl::communicator::Communicator::join(
            nccl,
            id,
            0,
            1,
            deadline,
            &|| false,
        );
        let error = error.expect_err("there is no GPU");
        assert_eq!(error.call, "ncclCommInitRankConfig");
        assert!(error.what.contains("CUDA"), "{}", error.what);
        crate::backend::nccl::communicator::abort_all(nccl, "the end of a test");
    }

    #[test]
    fn every_code_has_advice() {
        for code in 0..9 {
            assert!(!advice(code).is_empty());
        }
    }
}
