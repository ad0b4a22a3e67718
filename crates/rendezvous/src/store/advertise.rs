//! Finding rank 0's store through the `TCPStore` of torchrun's agent.
//!
//! The agent's store outlives its workers, and nobody cleans it: under `--max-restarts` it still holds the keys of the
//! attempts before. So no key is trusted for its name:
//!
//! 1. Rank `r` writes a fresh random nonce under `phalanx/<run>/hello/<r>`.
//! 2. Rank 0 hosts a store on a free port, reads the nonces, and answers each under
//!    `phalanx/<run>/welcome/<r>/<nonce>`: address, a number of this attempt, and the attempt's secret. A nonce that
//!    changes (the one before was a left-over) is answered again.
//! 3. Rank `r` connects there, which proves the secret both ways, and says in *that* store that it has arrived.
//! 4. When all have, rank 0 deletes the keys.
//!
//! Only a rank 0 that lives now can answer a nonce made now.
//!
//! # Security
//!
//! The agent's store has no authentication: who reaches its port can read the secret. It keeps other attempts and
//! other jobs out, and nobody who means harm. With `PHALANX_JOB_TOKEN` the secret is the user's and does not travel.
//!
//! # Cost
//!
//! Four round trips of each rank; rank 0 asks for the nonces of all who are absent, every 5 to 100 ms.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use super::join::{listen_address, Hosted};
use super::{
    random_bytes, Credentials, RendezvousError, Store, StoreClient, StoreError, StoreServer,
    TcpStoreClient,
};
use crate::environment::{JobToken, World};

const LOOK_FIRST: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_millis(100);
const PROGRESS_EVERY: Duration = Duration::from_secs(10);
/// An address that was welcomed answers in this time, or it was that of an attempt that is over: then a new nonce goes out.
const CONNECT_MAX: Duration = Duration::from_secs(10);
const ARRIVED: &str = "phalanx/arrived/";

/// Meets the others through the agent's store: hosts ours in rank 0, connects to it in the others.
pub(super) fn meet(world: &World, deadline: Instant) -> Result<Arc<dyn Store>, RendezvousError> {
    // It listens on all interfaces: loopback will do on one machine, whatever name the machine has.
    let (host, port) = world.store_address();
    let agent = TcpStoreClient::connect(host, port, deadline)?;
    let meeting = AgentMeeting { world, agent, deadline };
    if world.rank == 0 {
        meeting.host()
    } else {
        meeting.find()
    }
}

struct AgentMeeting<'m> {
    world: &'m World,
    agent: TcpStoreClient,
    deadline: Instant,
}

impl AgentMeeting<'_> {
    fn host(mut self) -> Result<Arc<dyn Store>, RendezvousError> {
        let world = self.world;
        let attempt: [u8; 8] = random_bytes()?;
        let attempt = hex(&attempt);
        let is_given = !world.job_token.is_derived();
        let job_token = if is_given { world.job_token.clone() } else { JobToken::generate()? };
        let credentials = credentials(world, &attempt, job_token.clone());
        // The agent of node 0 runs where MASTER_ADDR leads, and so does rank 0.
        let (host, _) = world.store_address();
        let any_port = listen_address(host, 0, self.deadline)?;
        let server = StoreServer::start(any_port, credentials.clone())?;
        let address = server.address();
        let welcome =
            Welcome { address, attempt, job_token: (!is_given).then_some(job_token) }.encode();
        let ip = address.ip().to_string();
        let client = StoreClient::connect(&ip, address.port(), credentials, self.deadline)?;
        self.welcome_all(&client, welcome.as_bytes())?;
        Ok(Arc::new(Hosted::new(client, server)))
    }

    /// Answers nonces until every rank has arrived in our store.
    fn welcome_all(&mut self, ours: &StoreClient, welcome: &[u8]) -> Result<(), RendezvousError> {
        let start = Instant::now();
        let world_size = self.world.world_size;
        let mut answered: BTreeMap<usize, String> = BTreeMap::new();
        let mut rest = LOOK_FIRST;
        let mut next_progress = start + PROGRESS_EVERY;
        loop {
            let arrived = ours.list(ARRIVED)?;
            let missing: Vec<usize> =
                (1..world_size).filter(|rank| !arrived.contains(&arrived_key(*rank))).collect();
            if missing.is_empty() {
                break;
            }
            let mut is_news = false;
            for &rank in &missing {
                is_news |= self.answer(rank, &mut answered, welcome)?;
            }
            let now = Instant::now();
            if now >= self.deadline {
                return Err(RendezvousError::MissingRanks {
                    what: "rank 0's store".to_owned(),
                    joined: world_size - missing.len(),
                    missing,
                    expected: world_size,
                    waited: start.elapsed(),
                });
            }
            if now >= next_progress {
                let joined = world_size - missing.len();
                let missing = super::error::list_text(&missing);
                tracing::info!("waiting for ranks {missing} (joined {joined}/{world_size})");
                next_progress = now + PROGRESS_EVERY;
            }
            rest = if is_news { LOOK_FIRST } else { (rest * 2).min(LOOK_MAX) };
            thread::park_timeout(rest.min(self.deadline - now));
        }
        // Of all ranks, also those that came before they were looked for: nothing is left for the next attempt.
        for rank in 1..world_size {
            self.agent.delete(&self.hello_key(rank), self.deadline)?;
        }
        for (rank, nonce) in &answered {
            self.agent.delete(&self.welcome_key(*rank, nonce), self.deadline)?;
        }
        Ok(())
    }

    /// Answers `rank` if it has a nonce that was not answered; says whether it had.
    fn answer(
        &mut self,
        rank: usize,
        answered: &mut BTreeMap<usize, String>,
        welcome: &[u8],
    ) -> Result<bool, RendezvousError> {
        let hello = self.hello_key(rank);
        if !self.agent.check(&[&hello], self.deadline)? {
            return Ok(false);
        }
        let nonce = self.agent.get(&hello, self.deadline)?;
        let nonce = String::from_utf8_lossy(&nonce).into_owned();
        // What is no nonce of ours would make a key that nobody waits for, of any length.
        if !is_nonce(&nonce) || answered.get(&rank) == Some(&nonce) {
            return Ok(false);
        }
        self.agent.set(&self.welcome_key(rank, &nonce), welcome, self.deadline)?;
        if let Some(stale) = answered.insert(rank, nonce) {
            self.agent.delete(&self.welcome_key(rank, &stale), self.deadline)?;
        }
        Ok(true)
    }

    fn find(mut self) -> Result<Arc<dyn Store>, RendezvousError> {
        let start = Instant::now();
        loop {
            let welcome = self.ask(start)?;
            let token = welcome.job_token.unwrap_or_else(|| self.world.job_token.clone());
            // A secret of the user's own is not replaced by what an open store says.
            let token = if self.world.job_token.is_derived() {
                token
            } else {
                self.world.job_token.clone()
            };
            let credentials = credentials(self.world, &welcome.attempt, token);
            let until = self.deadline.min(Instant::now() + CONNECT_MAX);
            let (ip, port) = (welcome.address.ip().to_string(), welcome.address.port());
            match StoreClient::connect(&ip, port, credentials, until) {
                Ok(client) => {
                    client.set(&arrived_key(self.world.rank), b"")?;
                    return Ok(Arc::new(client));
                }
                Err(error) if until < self.deadline && may_be_over(&error) => {
                    tracing::info!(
                        "rank 0's store is not where it was said to be, asking again: {error}"
                    );
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Sends a fresh nonce and waits for its answer.
    fn ask(&mut self, start: Instant) -> Result<Welcome, RendezvousError> {
        let nonce: [u8; 16] = random_bytes()?;
        let nonce = hex(&nonce);
        let rank = self.world.rank;
        self.agent.set(&self.hello_key(rank), nonce.as_bytes(), self.deadline)?;
        let key = self.welcome_key(rank, &nonce);
        let answer = self.agent.get(&key, self.deadline).map_err(|error| match error {
            StoreError::Timeout { .. } => RendezvousError::MissingRanks {
                what: "rank 0's store".to_owned(),
                missing: vec![0],
                joined: self.world.world_size - 1,
                expected: self.world.world_size,
                waited: start.elapsed(),
            },
            other => other.into(),
        })?;
        Welcome::decode(&answer).ok_or_else(|| {
            let what = "a welcome that cannot be read".to_owned();
            let (host, port) = (&self.world.master_addr, self.world.master_port);
            StoreError::Protocol { address: format!("{host}:{port}"), what }.into()
        })
    }

    fn hello_key(&self, rank: usize) -> String {
        format!("phalanx/{}/hello/{rank}", self.world.run_id)
    }

    fn welcome_key(&self, rank: usize, nonce: &str) -> String {
        format!("phalanx/{}/welcome/{rank}/{nonce}", self.world.run_id)
    }
}

/// Errors that a welcome of an attempt that is over explains.
const fn may_be_over(error: &RendezvousError) -> bool {
    matches!(
        error,
        RendezvousError::NobodyListens { .. }
            | RendezvousError::Unreachable { .. }
            | RendezvousError::NotAStore { .. }
            | RendezvousError::WrongRun { .. }
    )
}

fn arrived_key(rank: usize) -> String {
    format!("{ARRIVED}{rank}")
}

/// Nodes count their restarts by themselves, so attempts are told apart by their number.
fn credentials(world: &World, attempt: &str, job_token: JobToken) -> Credentials {
    Credentials { run_id: format!("{}.{attempt}", world.run_id), restart_count: 0, job_token }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn is_nonce(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Where rank 0's store is, and what opens it.
#[derive(Debug, PartialEq, Eq)]
struct Welcome {
    address: SocketAddr,
    attempt: String,
    /// Absent when every rank was given it.
    job_token: Option<JobToken>,
}

impl Welcome {
    fn encode(&self) -> String {
        let token = self.job_token.as_ref().map_or_else(|| "given".to_owned(), JobToken::to_hex);
        format!("phalanx-1 {} {} {token}", self.address, self.attempt)
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let text = std::str::from_utf8(bytes).ok()?;
        let mut words = text.split(' ');
        if words.next() != Some("phalanx-1") {
            return None;
        }
        let address = words.next()?.parse().ok()?;
        let attempt = words.next().filter(|word| word.len() == 16)?.to_owned();
        let job_token = match words.next()? {
            "given" => None,
            token => Some(JobToken::from_hex(token)?),
        };
        words.next().is_none().then_some(Self { address, attempt, job_token })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_welcome_is_read_as_it_was_written_and_nothing_else_is() {
        for job_token in [None, Some(JobToken::derive(&["x"]))] {
            let attempt = "0123456789abcdef".to_owned();
            let address = "[::1]:4000".parse().unwrap();
            let welcome = Welcome { address, attempt, job_token };
            let text = welcome.encode();
            assert_eq!(Welcome::decode(text.as_bytes()), Some(welcome));
            for wrong in [&text[1..], &text[..text.len() - 1], &format!("{text} more")] {
                assert_eq!(Welcome::decode(wrong.as_bytes()), None, "{wrong}");
            }
        }
        assert_eq!(Welcome::decode(&[0xFF]), None);
    }

    #[test]
    fn nonces_have_one_form() {
        assert!(is_nonce(&hex(&[0xA7; 16])));
        for wrong in ["", "abc", &"g".repeat(32), &"a".repeat(33)] {
            assert!(!is_nonce(wrong), "{wrong}");
        }
    }
}
