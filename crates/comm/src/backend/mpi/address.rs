//! This machine's address, as the other machines see it.

use std::net::{IpAddr, Ipv4Addr, UdpSocket};
use std::time::{Duration, Instant};

use crate::rendezvous::{listen_address, RendezvousError};

/// How long this machine's own name is looked for.
const RESOLVE: Duration = Duration::from_secs(5);
/// Nobody's: where a packet for the outside would go (RFC 5737).
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

/// `MASTER_ADDR` where it is set, else the address of this machine's name, that of the way out, or that of the first
/// network it is in.
pub(super) fn own() -> Result<IpAddr, RendezvousError> {
    let given = crate::environment::master_addr();
    let is_given = given.is_some();
    let name =
        given.unwrap_or_else(|| rustix::system::uname().nodename().to_string_lossy().into_owned());
    match listen_address(&name, 0, Instant::now() + RESOLVE) {
        Ok(address) => Ok(address.ip()),
        Err(error) if is_given => Err(error),
        Err(error) => {
            let routes = std::fs::read_to_string("/proc/net/route").unwrap_or_default();
            let mut ways = std::iter::once(OUTSIDE).chain(neighbours(&routes));
            ways.find_map(towards).ok_or(error)
        }
    }
}

/// The address with which this machine speaks to `peer`. Nothing is sent: connecting a datagram socket only
/// chooses the way.
fn towards(peer: Ipv4Addr) -> Option<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).ok()?;
    socket.connect((peer, 9)).ok()?;
    Some(socket.local_addr().ok()?.ip()).filter(|address| !address.is_loopback())
}

/// An address in each network of the kernel's table (`proc_pid_net(5)`: hexadecimal, in the machine's own order of bytes).
fn neighbours(routes: &str) -> impl Iterator<Item = Ipv4Addr> + use<'_> {
    routes.lines().skip(1).filter_map(|line| {
        let mut fields = line.split_whitespace();
        let (interface, destination) = (fields.next()?, fields.next()?);
        let network = u32::from_be(u32::from_str_radix(destination, 16).ok()?);
        (interface != "lo" && network != 0).then(|| Ipv4Addr::from(network | 1))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_are_read_from_the_kernels_table() {
        let head = "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\n";
        let network = u32::from(Ipv4Addr::new(10, 99, 0, 0)).to_be();
        let table = format!("{head}eth0\t00000000\t0100630A\t0003\neth0\t{network:08X}\t0\nlo\t{network:08X}\t0\nx\n");
        let found: Vec<Ipv4Addr> = neighbours(&table).collect();
        assert_eq!(found, [Ipv4Addr::new(10, 99, 0, 1)]);
        assert_eq!(neighbours("").count(), 0);
    }
}
