//! The agent of this launcher and its connection to the coordinator: what it says, and what it hears.
//!
//! Two threads wait for the store of node 0, so that the launcher's loop does not: one tells the agent's status, now and
//! then and when there is news, one waits for orders. What the agent then wants lies ready for the loop, which is woken.

use std::collections::VecDeque;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use phalanx_rendezvous::{Store, StoreClient, StoreError};
use rustix::event::{poll, PollFd, PollFlags};

use super::keys;
use crate::error::{system, LaunchError};
use crate::membership::{decode_order, encode_status, Action, Agent, Condition, Times, Wish};
use crate::process::timespec_until;

/// A wait for an order is renewed this often; a cancelled one ends at once.
const ORDER_WAIT: Duration = Duration::from_secs(60);
/// After an error of the store the next attempt waits so long.
const RETRY: Duration = Duration::from_millis(200);
/// The ranks of a node that is cut off have ended by [`Times::fence_after`]; the launcher itself hopes a while longer.
const GONE_AFTER: Duration = Duration::from_secs(10);

/// This launcher's agent and the threads that speak for it.
#[derive(Debug)]
pub(crate) struct Link {
    shared: Arc<Shared>,
    store: Arc<StoreClient>,
    /// Readable when there is something to do.
    wake: UnixStream,
    /// Lets the status be told now; `None`: no more.
    poke: Option<Sender<()>>,
    /// Closed when the last status has been told.
    told: Receiver<()>,
}

#[derive(Debug)]
struct Shared {
    agent: Mutex<Agent>,
    wanted: Mutex<VecDeque<Action>>,
    /// What is to be put down before the next status, which may refer to it: keys and values.
    announced: Mutex<VecDeque<(String, String)>>,
    waker: UnixStream,
    begun: Instant,
    node: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    fn now(&self) -> Duration {
        self.begun.elapsed()
    }

    /// Lays down what the agent wants, but for telling, which its thread does: whether there was that, too.
    fn want(&self, actions: Vec<Action>) -> bool {
        let (tell, others): (Vec<_>, Vec<_>) =
            actions.into_iter().partition(|action| *action == Action::Tell);
        if !others.is_empty() {
            lock(&self.wanted).extend(others);
            // A full socket wakes as well.
            if let Err(error) = (&self.waker).write(&[0]) {
                tracing::debug!(%error, "the launcher is awake already");
            }
        }
        !tell.is_empty()
    }
}

impl Link {
    /// Joins the job as `node`, which starts `ranks` ranks.
    pub(crate) fn join(
        store: Arc<StoreClient>,
        node: usize,
        ranks: usize,
        times: Times,
        deadline: Instant,
    ) -> Result<Self, LaunchError> {
        let life = store.add(&keys::life(node), 1)?;
        let life = u64::try_from(life).unwrap_or(0);
        let newest: u64 = keys::number(&store.get(keys::NEWEST, deadline)?);
        let (wake, waker) = UnixStream::pair().map_err(system("socketpair"))?;
        for end in [&wake, &waker] {
            end.set_nonblocking(true).map_err(system("fcntl"))?;
        }
        let agent = Agent::new(node, life, ranks, times.fence_after, Duration::ZERO);
        let shared = Arc::new(Shared {
            agent: Mutex::new(agent),
            wanted: Mutex::default(),
            announced: Mutex::default(),
            waker,
            begun: Instant::now(),
            node,
        });
        let (poke, pokes) = mpsc::channel();
        let (alive, told) = mpsc::channel();
        let start = |name: &str, body: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.to_owned());
            thread.spawn(body).map(drop).map_err(system("start a thread"))
        };
        let (ours, client) = (Arc::clone(&shared), Arc::clone(&store));
        let tell_all = move || {
            tell(&ours, &client, &pokes, times.beat);
            drop::<Sender<()>>(alive);
        };
        start("status of this node", Box::new(tell_all))?;
        let (hearer, store_too, poke_too) = (Arc::clone(&shared), Arc::clone(&store), poke.clone());
        let hear_all = move || hear(&hearer, &store_too, &poke_too, newest.max(1));
        start("orders for this node", Box::new(hear_all))?;
        Ok(Self { shared, store, wake, poke: Some(poke), told })
    }

    /// Becomes readable when there is something to do.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }

    /// Waits until there is something to do, or for this long.
    pub(crate) fn wait(&self, limit: Duration) {
        let mut fds = [PollFd::new(&self.wake, PollFlags::IN)];
        let until = Instant::now() + limit;
        if let Err(errno) = poll(&mut fds, Some(&timespec_until(until))) {
            tracing::debug!(%errno, "the wait for an order ends early");
        }
    }

    /// What is to be done next.
    pub(crate) fn next_action(&self) -> Option<Action> {
        let mut bytes = [0; 64];
        while (&self.wake).read(&mut bytes).is_ok_and(|count| count == bytes.len()) {}
        let now = self.shared.now();
        let late = lock(&self.shared.agent).tick(now);
        self.want(late);
        lock(&self.shared.wanted).pop_front()
    }

    fn want(&self, actions: Vec<Action>) {
        if self.shared.want(actions) {
            self.tell_now();
        }
    }

    fn tell_now(&self) {
        if self.poke.as_ref().is_none_or(|poke| poke.send(()).is_err()) {
            tracing::debug!("nobody tells the status of this node any more");
        }
    }

    /// Says what is the matter with this node's ranks of a generation; the first node to say so counts. It is there
    /// before anybody hears that they have failed.
    pub(crate) fn announce(&self, generation: u32, text: &str) {
        lock(&self.shared.announced).push_back((keys::failure(generation), text.to_owned()));
    }

    /// Says how the ranks of this node ended.
    pub(crate) fn ended(&self, condition: Condition) {
        let now = self.shared.now();
        let actions = lock(&self.shared.agent).ended(condition, now);
        self.want(actions);
    }

    /// Says what the user of this launcher wants.
    pub(crate) fn wish(&self, wish: Wish) {
        let actions = lock(&self.shared.agent).wish(wish);
        self.want(actions);
    }

    /// Whether node 0 has not been heard of for so long that nobody hopes any more.
    pub(crate) fn is_gone(&self) -> bool {
        lock(&self.shared.agent).silence(self.shared.now()) >= GONE_AFTER
    }

    /// Whether node 0 has not been heard of for so long that the ranks must not run.
    pub(crate) fn is_cut_off(&self) -> bool {
        lock(&self.shared.agent).is_cut_off(self.shared.now())
    }

    /// The connection to node 0's store.
    pub(crate) const fn store(&self) -> &Arc<StoreClient> {
        &self.store
    }

    /// The number of this node.
    pub(crate) fn node(&self) -> usize {
        self.shared.node
    }

    /// Tells the status a last time, and waits a short while until it has arrived.
    pub(crate) fn leave(mut self, limit: Duration) {
        self.tell_now();
        self.poke = None;
        // The thread of the orders holds another end of the queue.
        self.store.cancel();
        if self.told.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) {
            tracing::debug!(node = self.node(), "the last status has not arrived at node 0");
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.store.cancel();
    }
}

/// Tells the status every `beat` and at each poke, until nobody can poke any more.
fn tell(shared: &Shared, store: &StoreClient, pokes: &Receiver<()>, beat: Duration) {
    loop {
        let status = lock(&shared.agent).status();
        let sent = shared.now();
        match announce_all(shared, store).and_then(|()| deliver(store, &encode_status(&status))) {
            Ok(newest) => {
                lock(&shared.agent).arrived(sent, newest);
                let now = shared.now();
                let actions = lock(&shared.agent).tick(now);
                shared.want(actions);
            }
            Err(error) => tracing::debug!(%error, "node 0 has not heard the status of this node"),
        }
        if pokes.recv_timeout(beat) == Err(RecvTimeoutError::Disconnected) {
            return;
        }
    }
}

/// Puts down what was announced before the status was made.
fn announce_all(shared: &Shared, store: &StoreClient) -> Result<(), StoreError> {
    loop {
        let Some((key, value)) = lock(&shared.announced).front().cloned() else { return Ok(()) };
        store.compare_set(&key, None, value.as_bytes())?;
        lock(&shared.announced).pop_front();
    }
}

/// Puts a status down; returns the number of the newest order.
fn deliver(store: &StoreClient, status: &str) -> Result<u64, StoreError> {
    let number = store.add(keys::TOLD_COUNT, 1)?;
    store.set(&keys::told(number), status.as_bytes())?;
    let deadline = Instant::now() + ORDER_WAIT;
    Ok(keys::number(&store.get(keys::NEWEST, deadline)?))
}

/// Hears the orders from number `first` on, until the store's handle is cancelled.
fn hear(shared: &Shared, store: &StoreClient, poke: &Sender<()>, first: u64) {
    let mut number = first;
    loop {
        match store.get(&keys::order(number), Instant::now() + ORDER_WAIT) {
            Ok(bytes) => {
                number += 1;
                let Some(order) = decode_order(&bytes) else {
                    tracing::error!("node 0 has sent an order that cannot be read");
                    continue;
                };
                let now = shared.now();
                let actions = lock(&shared.agent).obey(Arc::new(order), now);
                if shared.want(actions) && poke.send(()).is_err() {
                    return;
                }
            }
            Err(StoreError::Timeout { .. }) => {}
            Err(StoreError::Cancelled { .. }) => return,
            Err(error) => {
                tracing::debug!(%error, "no orders from node 0");
                thread::park_timeout(RETRY);
            }
        }
    }
}
