//! A web server that answers range requests as a test says.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use phalanx_data::source::{HttpFolder, HttpOptions};

/// What a server does with a request.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Answer {
    Good,
    Status(u16),
    /// Half of the body, then the connection is closed.
    Cut,
    /// The connection is closed at once.
    Close,
    /// Nothing, for a second.
    Silence,
    /// Another version.
    Etag(&'static str),
    Whole,
    /// Bytes that are no HTTP.
    Garbage,
    WrongRange,
}

type Script = dyn Fn(usize, &str) -> Answer + Send + Sync;

pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    pub(crate) requests: Arc<AtomicUsize>,
    pub(crate) connections: Arc<AtomicUsize>,
    pub(crate) is_over: Arc<AtomicBool>,
    pub(crate) accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves the files of a folder; `script` is asked with the number of the request and the file's name.
    pub(crate) fn start(
        folder: PathBuf,
        script: impl Fn(usize, &str) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (requests, connections) =
            (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let is_over = Arc::<AtomicBool>::default();
        let script: Arc<Script> = Arc::new(script);
        let (r, c, o) = (Arc::clone(&requests), Arc::clone(&connections), Arc::clone(&is_over));
        let accepting = std::thread::spawn(move || {
            let mut serving = Vec::new();
            for stream in listener.incoming() {
                if o.load(Ordering::SeqCst) {
                    break;
                }
                c.fetch_add(1, Ordering::SeqCst);
                let (folder, script) = (folder.clone(), Arc::clone(&script));
                let (requests, is_over) = (Arc::clone(&r), Arc::clone(&o));
                serving.push(std::thread::spawn(move || {
                    drop(serve(&stream.unwrap(), &folder, &*script, &requests, &is_over));
                }));
            }
            for thread in serving {
                thread.join().unwrap();
            }
        });
        Server { address, requests, connections, is_over, accepting: Some(accepting) }
    }

    /// No attempt is cut off: tests count them.
    pub(crate) fn folder(&self, timeout: Duration) -> HttpFolder {
        self.folder_of_attempts(timeout, timeout)
    }

    pub(crate) fn folder_of_attempts(
        &self,
        timeout: Duration,
        attempt_timeout: Duration,
    ) -> HttpFolder {
        let options = HttpOptions { timeout, attempt_timeout, ..Default::default() };
        HttpFolder::new(&format!("http://{}/data/", self.address), options).unwrap()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::SeqCst);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.accepting.take() {
            thread.join().unwrap();
        }
    }
}

/// Requests of one connection, until it is closed or the server ends.
fn serve(
    mut stream: &TcpStream,
    folder: &std::path::Path,
    script: &Script,
    requests: &AtomicUsize,
    is_over: &AtomicBool,
) -> std::io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(50)))?;
    let mut lines = BufReader::new(stream);
    loop {
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            match lines.read_line(&mut head) {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(_) if is_over.load(Ordering::SeqCst) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error),
            }
        }
        let number = requests.fetch_add(1, Ordering::SeqCst);
        let name = head.split(' ').nth(1).unwrap().strip_prefix("/data/").unwrap().to_owned();
        let answer = script(number, &name);
        let Ok(bytes) = std::fs::read(folder.join(&name)) else {
            stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")?;
            continue;
        };
        let lower = head.to_ascii_lowercase();
        let range = lower.split("range: bytes=").nth(1).unwrap().split("\r\n").next().unwrap();
        let (first, last) = range.split_once('-').unwrap();
        let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
        let last = last.min(bytes.len().saturating_sub(1));
        let etag = if let Answer::Etag(etag) = answer { etag } else { "\"1\"" };
        match answer {
            Answer::Status(status) => {
                write!(stream, "HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n")?;
            }
            Answer::Close => return Ok(()),
            Answer::Garbage => {
                stream.write_all(&[0x16, 0x03, b'\r', b'\n', b'\r', b'\n'])?;
                return Ok(());
            }
            Answer::Silence => std::thread::park_timeout(Duration::from_secs(1)),
            Answer::Whole => {
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", bytes.len())?;
                stream.write_all(&bytes)?;
            }
            _ if bytes.is_empty() => {
                stream.write_all(b"HTTP/1.1 416 X\r\nContent-Range: bytes */0\r\nETag: \"1\"\r\nContent-Length: 0\r\n\r\n")?;
            }
            Answer::Good | Answer::Cut | Answer::Etag(_) | Answer::WrongRange => {
                let body = &bytes[first..=last];
                let said = if answer == Answer::WrongRange { first + 1 } else { first };
                write!(
                    stream,
                    "HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\nContent-Range: bytes {said}-{last}/{}\r\nETag: {etag}\r\n\r\n",
                    body.len(),
                    bytes.len()
                )?;
                if answer == Answer::Cut {
                    stream.write_all(&body[..body.len() / 2])?;
                    return Ok(());
                }
                stream.write_all(body)?;
            }
        }
    }
}
