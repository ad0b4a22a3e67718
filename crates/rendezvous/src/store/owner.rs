//! Who listens on a port: read from `/proc`, for error messages.
//!
//! Source: `proc(5)`: `/proc/net/tcp` and `tcp6` give the socket's inode, `/proc/PID/fd` who has it open.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// State `TCP_LISTEN` in `/proc/net/tcp`.
const LISTEN: &str = "0A";

/// An error message waits no longer for the name in it: a machine may have 100 000 open files.
const SEARCH_MAX: Duration = Duration::from_millis(80);

/// Process id and program name of the listener on `port`; `None` when it is another user's or in another namespace, or
/// was not found in time.
pub(super) fn of_port(port: u16) -> Option<(u32, String)> {
    let sockets: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
        .iter()
        .filter_map(|path| fs::read_to_string(path).ok())
        .flat_map(|table| listening_inodes(&table, port))
        .map(|inode| format!("socket:[{inode}]"))
        .collect();
    if sockets.is_empty() {
        return None;
    }
    let start = Instant::now();
    let in_time = |_: &fs::DirEntry| start.elapsed() < SEARCH_MAX;
    fs::read_dir("/proc").ok()?.flatten().take_while(in_time).find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        has_one_open(&entry.path(), &sockets).then(|| {
            let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            (pid, name.trim().to_owned())
        })
    })
}

fn has_one_open(process: &Path, sockets: &[String]) -> bool {
    let Ok(files) = fs::read_dir(process.join("fd")) else { return false };
    files.flatten().any(|file| {
        fs::read_link(file.path())
            .is_ok_and(|target| sockets.iter().any(|socket| target.as_os_str() == socket.as_str()))
    })
}

/// Inodes of the sockets that listen on `port`, from the text of `/proc/net/tcp`.
fn listening_inodes(table: &str, port: u16) -> Vec<String> {
    let port = format!("{port:04X}");
    let inode = |line: &str| {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let (_, local_port) = fields.get(1)?.rsplit_once(':')?;
        let listens = *fields.get(3)? == LISTEN && local_port == port;
        listens.then(|| fields.get(9).map(ToString::to_string))?
    };
    table.lines().skip(1).filter_map(inode).collect()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn the_listener_of_this_process_is_found() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (pid, name) = of_port(listener.local_addr().unwrap().port()).unwrap();
        assert_eq!(pid, std::process::id());
        assert!(!name.is_empty());
    }

    #[test]
    fn only_listening_sockets_of_the_port_count() {
        let table = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n\
            0: 0100007F:733C 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 12345 1 0 100 0 0 10 0\n\
            1: 0100007F:733C 0100007F:9999 01 00000000:00000000 00:00000000 00000000     0        0 777 1 0 100 0 0 10 0\n\
            2: 0100007F:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 888 1 0 100 0 0 10 0\n";
        assert_eq!(listening_inodes(table, 0x733C), ["12345"]);
        assert_eq!(listening_inodes("garbage\n\n x y", 1), Vec::<String>::new());
    }
}
