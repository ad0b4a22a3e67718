//! What this launcher puts into node 0's store when something has failed: by a thread, for a store that does not answer
//! must not keep the launcher from its ranks.

use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use phalanx_rendezvous::{Store, StoreClient, StoreError};

use crate::error::{system, LaunchError};

/// A launcher that ends waits so long for what it has said last to arrive.
const FLUSH_MAX: Duration = Duration::from_secs(2);

/// An entry of the store.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
    /// The first entry counts; else the last.
    pub(crate) is_first: bool,
}

/// A thread that delivers messages in their order, until one cannot be.
#[derive(Debug)]
pub(crate) struct Messenger {
    queue: Option<Sender<Message>>,
    /// Closed when the thread has ended.
    ended: Receiver<()>,
}

impl Messenger {
    pub(crate) fn start(store: Arc<StoreClient>) -> Result<Self, LaunchError> {
        let (queue, messages) = mpsc::channel();
        let (alive, ended) = mpsc::channel();
        thread::Builder::new()
            .name("news for other nodes".to_owned())
            .spawn(move || {
                let failed = messages.iter().find_map(|message| deliver(&store, &message).err());
                if let Some(error) = failed {
                    tracing::debug!(%error, "the other nodes cannot be told more");
                }
                drop::<Sender<()>>(alive);
            })
            .map_err(system("start a thread"))?;
        Ok(Self { queue: Some(queue), ended })
    }

    /// Does not wait. After a message that could not be delivered the others are dropped: they would fare no better.
    pub(crate) fn send(&self, message: Message) {
        if let Some(queue) = &self.queue {
            drop(queue.send(message));
        }
    }

    /// Waits a short while until all has been delivered; it is the end of the messenger.
    pub(crate) fn flush(&mut self) {
        self.queue = None;
        if self.ended.recv_timeout(FLUSH_MAX) == Err(RecvTimeoutError::Timeout) {
            tracing::debug!("what was said last has not arrived at node 0");
        }
    }
}

fn deliver(
    store: &StoreClient,
    Message { key, value, is_first }: &Message,
) -> Result<(), StoreError> {
    if *is_first {
        store.compare_set(key, None, value).map(drop)
    } else {
        store.set(key, value)
    }
}
