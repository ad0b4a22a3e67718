//! Files of a web server, by range requests over connections that are kept.
//!
//! A file is pinned when it is opened: its size and, as far as the server tells, its `ETag` and
//! time of change. An answer that differs is an error. What is cut off or refused for the moment is
//! asked for again, from where it ended, after a growing pause, until the deadline.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ureq::http::Response;
use ureq::{Agent, Body};

use super::answer::{part, size_of_unsatisfied, ContentRange, Refusal};
use super::{tls, Folder, Source};
use crate::cast::{to_u64, to_usize};
use crate::error::{Error, Result};

const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(5);
const REDIRECTS_MAX: u32 = 5;

/// How patient requests are.
#[derive(Clone, Debug)]
pub struct HttpOptions {
    /// For one read, with all its attempts.
    pub timeout: Duration,
    /// For a connection to be made, for an answer to begin, and for each further piece of it.
    pub attempt_timeout: Duration,
    /// Certificates of authorities of your own, as PEM files of one or more each: servers of
    /// `https://` whose certificates they have signed are trusted, besides those that Mozilla's
    /// list of authorities vouches for.
    pub root_certificates: Vec<PathBuf>,
}

impl Default for HttpOptions {
    fn default() -> Self {
        HttpOptions {
            timeout: Duration::from_mins(1),
            attempt_timeout: Duration::from_secs(10),
            root_certificates: Vec::new(),
        }
    }
}

/// A folder on a web server that supports range requests. No proxy is used.
///
/// Each read is one request. A [`CachedFolder`](crate::source::CachedFolder) around it fetches
/// blocks of 1 MiB once and keeps them on this machine.
#[derive(Debug)]
pub struct HttpFolder {
    address: PathBuf,
    agent: Agent,
    timeout: Duration,
}

impl HttpFolder {
    /// The folder at `address` (`http://…` or `https://…`). Nothing is asked yet.
    ///
    /// # Errors
    /// [`Error::InvalidOption`] for another kind of address, and for a file of certificates that
    /// holds none. [`Error::Io`] for one that cannot be read.
    pub fn new(address: &str, options: HttpOptions) -> Result<Self> {
        let HttpOptions { timeout, attempt_timeout, root_certificates } = options;
        let is_web = ["http://", "https://"].iter().any(|scheme| address.starts_with(scheme));
        if !is_web || address.contains(['?', '#']) || address.contains(char::is_whitespace) {
            let reason = "it must be http://… or https://…, without spaces, ? and #";
            return Err(Error::option("address", address, reason));
        }
        let limit = Some(attempt_timeout);
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(REDIRECTS_MAX)
            .proxy(None)
            .tls_config(tls::config(&root_certificates)?)
            .accept_encoding("identity")
            .user_agent(concat!("phalanx-data/", env!("CARGO_PKG_VERSION")))
            .timeout_connect(limit)
            .timeout_recv_response(limit)
            .timeout_per_read(limit)
            .build();
        let agent = Agent::new_with_config(config);
        Ok(HttpFolder { address: PathBuf::from(address.trim_end_matches('/')), agent, timeout })
    }
}

impl Folder for HttpFolder {
    fn name(&self) -> &Path {
        &self.address
    }

    fn open(&self, name: &str) -> Result<Arc<dyn Source>> {
        let mut url = format!("{}/", self.address.display());
        for byte in name.bytes() {
            match byte {
                b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' => {
                    url.push(char::from(byte));
                }
                _ => url.push_str(&format!("%{byte:02X}")),
            }
        }
        let mut file = HttpFile {
            name: PathBuf::from(&url),
            url,
            agent: self.agent.clone(),
            timeout: self.timeout,
            size: 0,
            version: Version::default(),
        };
        (file.size, file.version) = file.with_retries(HttpFile::look)?;
        Ok(Arc::new(file))
    }
}

/// What a server says of a file's version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Version {
    etag: Option<String>,
    modified: Option<String>,
}

impl Version {
    fn of(answer: &Response<Body>) -> Self {
        Version { etag: field(answer, "etag"), modified: field(answer, "last-modified") }
    }
}

fn field(answer: &Response<Body>, name: &str) -> Option<String> {
    answer.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned)
}

#[derive(Debug)]
struct HttpFile {
    name: PathBuf,
    url: String,
    agent: Agent,
    timeout: Duration,
    size: u64,
    version: Version,
}

impl HttpFile {
    /// Size and version: from the answer to a request for the first byte.
    fn look(&self, limit: Duration) -> std::result::Result<(u64, Version), Refusal> {
        let answer = self.ask(0, 1, limit)?;
        let range = field(&answer, "content-range");
        let version = Version::of(&answer);
        if answer.status().as_u16() == 416 {
            if let Some(0) = range.as_deref().and_then(size_of_unsatisfied) {
                return Ok((0, version));
            }
        }
        let found = part(answer.status().as_u16(), range.as_deref(), 0, 1)?;
        take(answer, &mut [0]).1?;
        Ok((found.total, version))
    }

    fn ask(
        &self,
        start: u64,
        end: u64,
        limit: Duration,
    ) -> std::result::Result<Response<Body>, Refusal> {
        let request =
            self.agent.get(&self.url).header("Range", format!("bytes={start}-{}", end - 1));
        let request = request.config().timeout_global(Some(limit)).build();
        request.call().map_err(|error| match error {
            ureq::Error::BadUri(_) | ureq::Error::Tls(_) | ureq::Error::TooManyRedirects => {
                Refusal::Never(error.to_string())
            }
            error => tls::refusal(&error).unwrap_or_else(|| Refusal::Later(error.to_string())),
        })
    }

    /// Reads what it can of a range: how many bytes, and what ended it.
    fn fetch(
        &self,
        offset: u64,
        out: &mut [u8],
        limit: Duration,
    ) -> (usize, std::result::Result<(), Refusal>) {
        let end = offset + to_u64(out.len());
        let checked = self.ask(offset, end, limit).and_then(|answer| {
            let range = field(&answer, "content-range");
            let found = part(answer.status().as_u16(), range.as_deref(), offset, end)?;
            self.compare(&answer, found)?;
            Ok((answer, found))
        });
        match checked {
            Ok((answer, found)) => take(answer, &mut out[..to_usize(found.len)]),
            Err(refusal) => (0, Err(refusal)),
        }
    }

    fn compare(
        &self,
        answer: &Response<Body>,
        found: ContentRange,
    ) -> std::result::Result<(), Refusal> {
        if found.total != self.size {
            let (now, then) = (found.total, self.size);
            return Err(Refusal::Changed(format!("it has {now} bytes, it had {then}")));
        }
        let version = Version::of(answer);
        if version != self.version {
            let then = &self.version;
            return Err(Refusal::Changed(format!("its version is {version:?}, it was {then:?}")));
        }
        if let Some(coding) = field(answer, "content-encoding").filter(|name| name != "identity") {
            return Err(Refusal::Never(format!("the server sends it as {coding}: turn that off")));
        }
        Ok(())
    }

    /// Tries until it works, cannot work, or the time is over. An attempt is given the time that is
    /// left.
    fn with_retries<T>(
        &self,
        mut attempt: impl FnMut(&Self, Duration) -> std::result::Result<T, Refusal>,
    ) -> Result<T> {
        let started = Instant::now();
        let (mut pause, mut attempts) = (PAUSE_MIN, 0_u32);
        loop {
            let left = self.timeout.saturating_sub(started.elapsed());
            attempts += 1;
            let url = self.url.clone();
            let last = match attempt(self, left.max(Duration::from_millis(1))) {
                Ok(value) => return Ok(value),
                Err(Refusal::Never(reason)) => return Err(Error::Http { url, reason }),
                Err(Refusal::Changed(reason)) => return Err(Error::Changed { url, reason }),
                // As a file system says it, so that `Folder::find` knows.
                Err(Refusal::Absent(reason)) => {
                    let cause = std::io::Error::new(std::io::ErrorKind::NotFound, reason);
                    return Err(Error::Io { action: "read", path: self.name.clone(), cause });
                }
                Err(Refusal::Later(reason)) => reason,
            };
            if started.elapsed() + pause >= self.timeout {
                let waited = self.timeout;
                let reason = format!(
                    "{attempts} attempts within {waited:?}, the last: {last}; check the server, or raise HttpOptions::timeout"
                );
                return Err(Error::Http { url, reason });
            }
            wait(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

impl Source for HttpFile {
    fn name(&self) -> &Path {
        &self.name
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn version(&self) -> Option<String> {
        let Version { etag, modified } = &self.version;
        // What is compared weakly may be other bytes.
        let strong = etag.as_ref().filter(|etag| !etag.starts_with("W/"));
        strong.or(modified.as_ref()).cloned()
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset.checked_add(to_u64(out.len())).filter(|&end| end <= self.size);
        if end.is_none() {
            let expected = offset.saturating_add(to_u64(out.len()));
            return Err(Error::WrongSize { path: self.name.clone(), expected, actual: self.size });
        }
        let mut done = 0;
        self.with_retries(|file, limit| {
            let started = Instant::now();
            while done < out.len() {
                let left = limit.saturating_sub(started.elapsed());
                if left.is_zero() {
                    return Err(Refusal::Later(format!("{done} bytes came in {limit:?}")));
                }
                let left = left.max(Duration::from_millis(1));
                let (len, ended) = file.fetch(offset + to_u64(done), &mut out[done..], left);
                done += len;
                ended?;
            }
            Ok(())
        })
    }
}

/// Reads a body of exactly so many bytes: how many came, and why not all. At its end the connection
/// is free again.
fn take(answer: Response<Body>, out: &mut [u8]) -> (usize, std::result::Result<(), Refusal>) {
    let mut body = answer.into_body().into_reader();
    let mut done = 0;
    while done < out.len() {
        match body.read(&mut out[done..]) {
            Ok(0) => {
                let reason = format!("the answer ended {} bytes early", out.len() - done);
                return (done, Err(Refusal::Later(reason)));
            }
            Ok(len) => done += len,
            Err(cause) if cause.kind() == std::io::ErrorKind::Interrupted => {}
            Err(cause) => return (done, Err(Refusal::Later(cause.to_string()))),
        }
    }
    match body.read(&mut [0]) {
        Ok(0) | Err(_) => (done, Ok(())),
        Ok(_) => (done, Err(Refusal::Never("the answer is longer than it said".to_owned()))),
    }
}

/// Waits for the whole pause: nothing wakes a reading thread earlier.
fn wait(pause: Duration) {
    let until = Instant::now() + pause;
    while let Some(left) = until.checked_duration_since(Instant::now()).filter(|d| !d.is_zero()) {
        std::thread::park_timeout(left);
    }
}
