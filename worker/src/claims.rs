//! Claims that wait for their answer.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use proto::message::{Denial, Grant, Nonce};
use tokio::sync::oneshot;

/// The coordinator's answer to a claim.
#[derive(Debug)]
pub(crate) enum Answer {
    Grant(Box<Grant>),
    Denial(Denial),
}

/// Claims by nonce. One per worker.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    waiting: Mutex<HashMap<Nonce, oneshot::Sender<Answer>>>,
}

/// Waits for one answer; dropping it forgets the claim, and an answer that comes later finds nobody.
#[derive(Debug)]
pub(crate) struct Waiting<'a> {
    claims: &'a Claims,
    nonce: Nonce,
    pub(crate) answer: oneshot::Receiver<Answer>,
}

impl Claims {
    /// Registers a claim before it is sent.
    pub(crate) fn expect(&self, nonce: Nonce) -> Waiting<'_> {
        let (sender, answer) = oneshot::channel();
        self.lock().insert(nonce.clone(), sender);
        Waiting { claims: self, nonce, answer }
    }

    /// Hands an answer to its claim; gives it back when nobody waits for it any more.
    pub(crate) fn answer(&self, nonce: &Nonce, answer: Answer) -> Result<(), Answer> {
        match self.lock().remove(nonce) {
            Some(sender) => sender.send(answer),
            None => Err(answer),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Nonce, oneshot::Sender<Answer>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.claims.lock().remove(&self.nonce);
    }
}
