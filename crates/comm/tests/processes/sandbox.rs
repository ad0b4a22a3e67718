//! Ranks in a sandbox that refuses memory without a name.
#![expect(unsafe_code, reason = "a filter of system calls")]

use std::time::Duration;

use phalanx_comm::{Group, GroupOptions, Sum, Work};

use crate::support::Ranks;

/// From here on `memfd_create` is unknown to this thread and those that it starts.
fn without_memfd() {
    const LOAD_NUMBER: u16 = 0x20;
    const IS_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    let line = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let number = u32::try_from(libc::SYS_memfd_create).expect("a number");
    let unknown = libc::SECCOMP_RET_ERRNO | u32::try_from(libc::ENOSYS).expect("small");
    let mut lines = [
        line(LOAD_NUMBER, 0, 0, 0),
        line(IS_EQUAL, 0, 1, number),
        line(RETURN, 0, 0, unknown),
        line(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: 4, filter: lines.as_mut_ptr() };
    // SAFETY: takes numbers alone.
    let fixed = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    let filter = std::ptr::from_ref(&program);
    // SAFETY: the program and its lines live through the call, which copies them.
    let set = unsafe { libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, filter) };
    assert_eq!((fixed, set), (0, 0), "{}", std::io::Error::last_os_error());
    let refused = rustix::fs::memfd_create("trial", rustix::fs::MemfdFlags::CLOEXEC);
    assert_eq!(refused.err(), Some(rustix::io::Errno::NOSYS));
}

/// What a rank does.
pub(crate) fn rank() {
    without_memfd();
    let options = GroupOptions { timeout: Duration::from_secs(20), ..GroupOptions::default() };
    let mut group = Group::from_environment(options).expect("the ranks meet");
    let ranks = group.world_size();
    let region = group.allocate::<f32>(10_000).expect("memory");
    region.write(0, &[1.0; 10_000]);
    group.all_reduce(region.full(), Sum).and_then(Work::wait).expect("a sum");
    assert!(region.read(0..10_000).iter().all(|sum| *sum == ranks as f32));
    let mut slice = [group.rank() as f32; 100];
    group.broadcast(&mut slice[..], ranks - 1).and_then(Work::wait).expect("a broadcast");
    assert_eq!(slice, [(ranks - 1) as f32; 100]);
    phalanx_comm::recorder::memory().expect("a file does as well");
    println!("all right");
}

#[test]
fn ranks_without_shared_memory_talk_over_tcp() {
    for world in [1, 3] {
        for ended in Ranks::start("sandbox", world, "auto").finish(Duration::from_secs(60)) {
            let good = ended.status.success() && ended.output.contains("all right");
            assert!(good, "{world} ranks: {}", ended.output);
        }
    }
}
