//! For tests: ports for ranks that are processes.

use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::sync::{Mutex, PoisonError};

/// Where free ports are looked for: below the range that the kernel hands out by itself (from 32768), so
/// that no connection made meanwhile can take one before the program under test binds it.
const PORTS: std::ops::Range<u16> = 18_000..30_000;

/// The first of `count` ports in a row that nobody listens on. No other test of this machine gets them
/// while this process lives, in whatever process it runs.
///
/// # Panics
///
/// When there are none.
#[expect(clippy::expect_used, reason = "a test without a port has failed")]
pub fn free_ports(count: u16) -> u16 {
    /// What this process has reserved.
    static RESERVED: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());
    // The kernel forgets an abstract name with the process that has bound it.
    let reserve = |port: u16| {
        let address = SocketAddr::from_abstract_name(format!("phalanx-test-port-{port}"));
        let reserved = UnixListener::bind_addr(&address.expect("a short name")).ok()?;
        TcpListener::bind(("0.0.0.0", port)).is_ok().then_some(reserved)
    };
    // Not always the same first: what an earlier test has left behind may still dial its port.
    let start = u16::try_from(std::process::id() % 1000).expect("below 1000") * 10;
    let (before, after) = (PORTS.start..PORTS.start + start, PORTS.start + start..PORTS.end);
    for first in after.step_by(usize::from(count)).chain(before.step_by(usize::from(count))) {
        let all: Option<Vec<UnixListener>> = (first..first + count).map(reserve).collect();
        if let Some(all) = all {
            RESERVED.lock().unwrap_or_else(PoisonError::into_inner).extend(all);
            return first;
        }
    }
    panic!("no {count} free ports in {PORTS:?}");
}

/// A port for `MASTER_PORT`: the next one is free too, where a launcher has a store on the first.
///
/// # Panics
///
/// When there is none.
pub fn free_port() -> u16 {
    free_ports(2)
}
