//! `SIGBUS` inside one of our maps: the missing page is replaced by zeros, and the map is marked.
//!
//! The handler looks the address up in a list of slots without a lock. Slots are never freed, only
//! used again; a slot's sequence number is odd while it is being written. A slot that changes while
//! the handler looks at it is not the one that it looks for: that one belongs to a map that a
//! thread reads right now, so it is not being written.
//!
//! Anything else goes to the handler that was there before, or has the default effect, which ends
//! the process.
#![expect(unsafe_code, reason = "signal handlers, and pages that are mapped in them")]

use std::io;
use std::sync::atomic::{fence, AtomicBool, AtomicPtr, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use libc::{c_int, c_void, siginfo_t};

const SLOTS: usize = 64;

/// A guarded range of addresses.
#[derive(Debug)]
struct GuardSlot {
    sequence: AtomicUsize,
    start: AtomicUsize,
    /// 0: not in use.
    end: AtomicUsize,
    is_cut_off: AtomicBool,
}

/// Some slots; lists of them grow at the end.
struct GuardSlots {
    slots: [GuardSlot; SLOTS],
    next: AtomicPtr<GuardSlots>,
}

static FIRST: GuardSlots = GuardSlots::new();
static FREE: Mutex<Vec<&'static GuardSlot>> = Mutex::new(Vec::new());
static IS_FIRST_TAKEN: AtomicBool = AtomicBool::new(false);
static HANDLER: OnceLock<Result<libc::sigaction, c_int>> = OnceLock::new();
static PAGE_BYTES: AtomicUsize = AtomicUsize::new(4096);

/// Keeps a range guarded until it is dropped.
#[derive(Debug)]
pub(super) struct MapGuard(&'static GuardSlot);

impl MapGuard {
    /// Whether a page of the range was missing.
    #[inline]
    pub(super) fn is_cut_off(&self) -> bool {
        self.0.is_cut_off.load(Ordering::Acquire)
    }
}

impl Drop for MapGuard {
    fn drop(&mut self) {
        self.0.set(0, 0);
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.0);
    }
}

/// Guards the memory of a map. Must be dropped before it is unmapped.
pub(super) fn guard(map: &[u8]) -> io::Result<MapGuard> {
    HANDLER.get_or_init(install).map_err(io::Error::from_raw_os_error)?;
    let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
    if free.is_empty() {
        if IS_FIRST_TAKEN.swap(true, Ordering::Relaxed) {
            free.extend(&append().slots);
        } else {
            free.extend(&FIRST.slots);
        }
    }
    let slot = free.pop().ok_or_else(|| io::Error::other("no slot to guard a map with"))?;
    let start = map.as_ptr().addr();
    slot.set(start, start + map.len().next_multiple_of(page_bytes()));
    Ok(MapGuard(slot))
}

pub(super) fn page_bytes() -> usize {
    PAGE_BYTES.load(Ordering::Relaxed)
}

impl GuardSlot {
    const fn new() -> Self {
        GuardSlot {
            sequence: AtomicUsize::new(0),
            start: AtomicUsize::new(0),
            end: AtomicUsize::new(0),
            is_cut_off: AtomicBool::new(false),
        }
    }

    /// Only called by who owns the slot.
    fn set(&self, start: usize, end: usize) {
        let sequence = self.sequence.load(Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(1), Ordering::Relaxed);
        fence(Ordering::Release);
        self.start.store(start, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
        self.is_cut_off.store(false, Ordering::Relaxed);
        self.sequence.store(sequence.wrapping_add(2), Ordering::Release);
    }

    fn holds(&self, address: usize) -> bool {
        let before = self.sequence.load(Ordering::Acquire);
        let (start, end) = (self.start.load(Ordering::Relaxed), self.end.load(Ordering::Relaxed));
        fence(Ordering::Acquire);
        let after = self.sequence.load(Ordering::Relaxed);
        before == after && before.is_multiple_of(2) && (start..end).contains(&address)
    }
}

impl GuardSlots {
    const fn new() -> Self {
        GuardSlots {
            slots: [const { GuardSlot::new() }; SLOTS],
            next: AtomicPtr::new(std::ptr::null_mut()),
        }
    }
}

/// More slots at the end of the list, for ever: the handler may look at them at any time. Called
/// under the lock of `FREE`.
fn append() -> &'static GuardSlots {
    let more: &'static GuardSlots = Box::leak(Box::new(GuardSlots::new()));
    let mut last = &FIRST;
    while let Some(next) = next(last) {
        last = next;
    }
    last.next.store(std::ptr::from_ref(more).cast_mut(), Ordering::Release);
    more
}

fn next(slots: &GuardSlots) -> Option<&'static GuardSlots> {
    // SAFETY: `next` is null or was made from a leaked reference, which nobody writes to but
    // through atomics.
    unsafe { slots.next.load(Ordering::Acquire).as_ref() }
}

/// Puts our handler before the one that is there, which it gives.
fn install() -> Result<libc::sigaction, c_int> {
    // SAFETY: asks for a number.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    PAGE_BYTES.store(usize::try_from(page).unwrap_or(4096), Ordering::Relaxed);
    // SAFETY: a structure of numbers and an optional function, for which zeros are a value.
    let mut previous: libc::sigaction = unsafe { std::mem::zeroed() };
    let mut ours = previous;
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_bus_error;
    ours.sa_sigaction = handler as usize;
    // The thread may be short of stack; the standard library gives its threads a second one.
    ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: both point to structures that live through the call; the handler has the signature
    // that SA_SIGINFO asks for.
    let status = unsafe { libc::sigaction(libc::SIGBUS, &raw const ours, &raw mut previous) };
    if status != 0 {
        return Err(io::Error::last_os_error().raw_os_error().unwrap_or(0));
    }
    Ok(previous)
}

extern "C" fn on_bus_error(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a structure that is valid until we return.
    let Some(about) = (unsafe { info.as_ref() }) else { return };
    let is_fault = about.si_code > 0;
    if is_fault {
        // SAFETY: faults have an address.
        let address = unsafe { about.si_addr() }.addr();
        if let Some(slot) = slot_of(address) {
            if put_zeros(address) {
                slot.is_cut_off.store(true, Ordering::Release);
                return;
            }
        }
    }
    pass_on(signal, info, context, is_fault);
}

fn slot_of(address: usize) -> Option<&'static GuardSlot> {
    let mut slots = Some(&FIRST);
    while let Some(some) = slots {
        if let Some(slot) = some.slots.iter().find(|slot| slot.holds(address)) {
            return Some(slot);
        }
        slots = next(some);
    }
    None
}

/// Maps zeros over the page of an address.
fn put_zeros(address: usize) -> bool {
    let page = page_bytes();
    let start = std::ptr::without_provenance_mut(address / page * page);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
    // SAFETY: the page lies in a map of ours that is being read, so it is not being unmapped;
    // readers take it for plain bytes. `mmap` is a plain system call: it may be made in a handler.
    let at = unsafe { libc::mmap(start, page, libc::PROT_READ, flags, -1, 0) };
    at != libc::MAP_FAILED
}

/// Does what would have happened without us.
fn pass_on(signal: c_int, info: *mut siginfo_t, context: *mut c_void, is_fault: bool) {
    let previous = match HANDLER.get() {
        Some(Ok(previous)) => *previous,
        // A signal between the system call that installed us and the end of `install`.
        // SAFETY: a structure of numbers and an optional function: zeros are the default effect.
        _ => unsafe { std::mem::zeroed() },
    };
    match previous.sa_sigaction {
        libc::SIG_IGN if !is_fault => {}
        libc::SIG_DFL | libc::SIG_IGN => {
            // SAFETY: a structure of numbers and an optional function: zeros are the default
            // effect.
            let default: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: points to a structure that lives through the call; may be called in a
            // handler.
            unsafe { libc::sigaction(signal, &raw const default, std::ptr::null_mut()) };
            if !is_fault {
                // A fault comes again by itself when we return; what was sent must be sent again.
                // SAFETY: may be called in a handler.
                unsafe { libc::raise(signal) };
            }
        }
        handler if previous.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: who installed it with SA_SIGINFO gave a function of this signature.
            let handler = unsafe {
                std::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(
                    handler,
                )
            };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: who installed it without SA_SIGINFO gave a function of this signature.
            let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
            handler(signal);
        }
    }
}
