//! Ranks that meet over MPI: who they are, where each one is, and the way to a store with a fresh job
//! token. No address has to be known beforehand.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::ffi::{Communicator, MpiError};
use super::{address, library};
use crate::environment::{self, JobToken, Launcher, StoreHost, World, LOOPBACK};
use crate::error::{Error, Result};
use crate::rendezvous::{
    random_bytes, Credentials, RendezvousError, Store, StoreClient, StoreServer,
};

const NOTE_BYTES: usize = 512;
const TOKEN_AT: usize = 0;
const RUN_AT: usize = 32;
const PORT_AT: usize = 40;
/// The host's name, or, where the port is 0, what went wrong: its length and text.
const TEXT_AT: usize = 42;

/// Where a rank is.
#[derive(Debug, Clone)]
struct Placement {
    local_rank: usize,
    local_world_size: usize,
    node_rank: usize,
    node_count: usize,
}

/// What rank 0 tells everybody.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Note {
    token: [u8; 32],
    run: [u8; 8],
    port: u16,
    text: String,
}

impl Note {
    fn encode(&self) -> [u8; NOTE_BYTES] {
        let mut bytes = [0; NOTE_BYTES];
        bytes[TOKEN_AT..RUN_AT].copy_from_slice(&self.token);
        bytes[RUN_AT..PORT_AT].copy_from_slice(&self.run);
        bytes[PORT_AT..TEXT_AT].copy_from_slice(&self.port.to_le_bytes());
        let mut length = self.text.len().min(NOTE_BYTES - TEXT_AT - 2);
        while !self.text.is_char_boundary(length) {
            length -= 1;
        }
        let end = TEXT_AT + 2 + length;
        let head = u16::try_from(length).unwrap_or(0).to_le_bytes();
        bytes[TEXT_AT..TEXT_AT + 2].copy_from_slice(&head);
        bytes[TEXT_AT + 2..end].copy_from_slice(&self.text.as_bytes()[..length]);
        bytes
    }

    fn decode(bytes: &[u8; NOTE_BYTES]) -> Self {
        let (mut token, mut run) = ([0; 32], [0; 8]);
        token.copy_from_slice(&bytes[TOKEN_AT..RUN_AT]);
        run.copy_from_slice(&bytes[RUN_AT..PORT_AT]);
        let number = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let end = TEXT_AT + 2 + usize::from(number(TEXT_AT));
        let text = bytes.get(TEXT_AT + 2..end).unwrap_or_default();
        let text = String::from_utf8_lossy(text).into_owned();
        Self { token, run, port: number(PORT_AT), text }
    }

    fn credentials(&self) -> Credentials {
        Credentials {
            run_id: self.run_id(),
            restart_count: 0,
            job_token: JobToken::from_bytes(self.token),
        }
    }

    fn run_id(&self) -> String {
        format!("mpi-{:016x}", u64::from_le_bytes(self.run))
    }
}

/// The world of an MPI job, and a store in which its ranks can meet. Rank 0 hosts the store on a free
/// port and tells the others over MPI, with a fresh job token; MPI also says which ranks share a
/// machine. Collective over all ranks of the job: MPI is initialised where it is not.
pub(crate) fn meet_over_mpi(timeout: Duration) -> Result<(World, Arc<dyn Store>)> {
    let deadline = Instant::now() + timeout.min(crate::deadline::LONGEST);
    let (host_link, data_checks) = (environment::host_link()?, environment::data_checks()?);
    let launched = environment::launched();
    let library = library::get(deadline)?;
    let (rank, world_size, all) = (library.rank, library.size, library.world);
    same_place(launched, rank, world_size, &library.version)?;
    let set_up = || library.set_up(rank, deadline, || None, move || placement(all, rank));
    let place = set_up()?;
    let hosted = (rank == 0).then(|| host(&place));
    let (mut bytes, server) = match hosted {
        None => ([0; NOTE_BYTES], None),
        Some(Ok((note, server))) => (note.encode(), Some(server)),
        Some(Err(error)) => {
            let note = Note { token: [0; 32], run: [0; 8], port: 0, text: error.to_string() };
            (note.encode(), None)
        }
    };
    let told = library.set_up(
        rank,
        deadline,
        || None,
        move || {
            all.tell(&mut bytes)?;
            Ok(bytes)
        },
    )?;
    let note = Note::decode(&told);
    if note.port == 0 {
        let what = format!("rank 0 could not host the store: {}", note.text);
        return Err(Error::World { rank, what });
    }
    let client = StoreClient::connect(&note.text, note.port, note.credentials(), deadline)?;
    let store: Arc<dyn Store> = match server {
        None => Arc::new(client),
        Some(server) => crate::rendezvous::hosted(client, server),
    };
    let world = World {
        rank,
        world_size,
        local_rank: place.local_rank,
        local_world_size: place.local_world_size,
        node_rank: place.node_rank,
        node_count: place.node_count,
        run_id: note.run_id(),
        job_token: JobToken::from_bytes(note.token),
        master_addr: note.text,
        master_port: note.port,
        restart_count: 0,
        store_host: if rank == 0 { StoreHost::ThisRank } else { StoreHost::Elsewhere },
        launcher: launched.map_or(Launcher::OpenMpi, |(launcher, ..)| launcher),
        host_link,
        data_checks,
    };
    Ok((world, store))
}

/// A library that does not know its launcher makes a job of one of each process.
fn same_place(
    launched: Option<(Launcher, usize, usize)>,
    rank: usize,
    world_size: usize,
    library: &str,
) -> Result<()> {
    let Some((_, told_rank, told_size)) = launched else { return Ok(()) };
    if (told_rank, told_size) == (rank, world_size) {
        return Ok(());
    }
    let what = format!(
        "the launcher started this process as rank {told_rank} of {told_size}, and MPI ({library}) takes it for rank \
         {rank} of {world_size}: start it with the mpirun of the MPI library that it was built with, or build it with the \
         launcher's (MPICC)"
    );
    Err(Error::NoBackend { backend: "mpi", what })
}

/// Which ranks share a machine is MPI's own knowledge; nodes are numbered by their first rank.
fn placement(all: Communicator, rank: usize) -> Result<Placement, MpiError> {
    let machine = all.machine()?;
    let (local_rank, local_world_size) = (machine.rank()?, machine.size()?);
    let first = machine.gather(rank as u64)?.into_iter().min().unwrap_or(0);
    machine.free()?;
    let mut nodes = all.gather(first)?;
    nodes.sort_unstable();
    nodes.dedup();
    let node_rank = nodes.iter().position(|node| *node == first).unwrap_or(0);
    Ok(Placement { local_rank, local_world_size, node_rank, node_count: nodes.len() })
}

/// Starts the store where the others can reach it.
fn host(place: &Placement) -> Result<(Note, StoreServer)> {
    let host =
        if place.node_count == 1 { LOOPBACK.to_owned() } else { address::own()?.to_string() };
    let (token, run) = (random_bytes::<32>()?, random_bytes::<8>()?);
    let note = Note { token, run, port: 0, text: host };
    let ip: IpAddr = note.text.parse().unwrap_or(IpAddr::from([127, 0, 0, 1]));
    let port = environment::store_port()?;
    let start = |at| StoreServer::start(SocketAddr::new(ip, at), note.credentials());
    let own = std::process::id();
    let server = match start(port) {
        // An earlier group of this process has it; the note tells the port anyway.
        Err(RendezvousError::PortInUse { owner: Some((pid, _)), .. }) if pid == own => start(0),
        started => started,
    }?;
    Ok((Note { port: server.address().port(), ..note }, server))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_launcher_of_another_mpi_is_noticed() {
        let launched = Some((Launcher::Pmi, 1, 2));
        assert!(same_place(launched, 1, 2, "MPICH").is_ok() && same_place(None, 0, 1, "x").is_ok());
        let text = same_place(launched, 0, 1, "Open MPI v4").unwrap_err().to_string();
        assert!(text.contains("rank 1 of 2") && text.contains("Open MPI v4"), "{text}");
    }

    #[test]
    fn a_note_survives_its_way() {
        let note = Note { token: [7; 32], run: [1; 8], port: 4711, text: "192.0.2.1".to_owned() };
        assert_eq!(Note::decode(&note.encode()), note);
        let long = Note { text: "é".repeat(400), ..note };
        assert_eq!(Note::decode(&long.encode()).text, "é".repeat(234));
        assert_eq!(Note::decode(&[255; NOTE_BYTES]).text, "", "a length that lies");
    }
}
