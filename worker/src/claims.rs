//! Claims that wait for their answer.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use proto::message::{Denial, Grant, Nonce};
use tokio::sync::oneshot;

/// How many answered claims are remembered, so that a repeated answer is known as an echo.
const REMEMBERED_MAX: usize = 1_000;

/// The coordinator's answer to a claim.
#[derive(Debug)]
pub(crate) enum Answer {
    Grant(Box<Grant>),
    Denial(Denial),
}

/// What became of an answer.
#[derive(Debug)]
pub(crate) enum Handed {
    /// Its claim has it.
    Delivered,
    /// Its claim had it before: the coordinator answers each repetition of a claim.
    Echo,
    /// Nobody waits for it any more.
    Late(Answer),
}

/// Claims by nonce. One per worker.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    waiting: HashMap<Nonce, oneshot::Sender<Answer>>,
    answered: VecDeque<Nonce>,
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
        self.lock().waiting.insert(nonce.clone(), sender);
        Waiting { claims: self, nonce, answer }
    }

    /// Hands an answer to its claim.
    pub(crate) fn answer(&self, nonce: &Nonce, answer: Answer) -> Handed {
        let mut inner = self.lock();
        if let Some(sender) = inner.waiting.remove(nonce) {
            return match sender.send(answer) {
                Ok(()) => {
                    inner.answered.push_back(nonce.clone());
                    if inner.answered.len() > REMEMBERED_MAX {
                        inner.answered.pop_front();
                    }
                    Handed::Delivered
                }
                Err(answer) => Handed::Late(answer),
            };
        }
        if inner.answered.contains(nonce) { Handed::Echo } else { Handed::Late(answer) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting<'_> {
    /// The answer, if it came at the last moment. Afterwards it is late.
    pub(crate) fn last_look(&mut self) -> Option<Answer> {
        self.answer.close();
        self.answer.try_recv().ok()
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.claims.lock().waiting.remove(&self.nonce);
    }
}

#[cfg(test)]
mod tests {
    use proto::message::DenialReason;
    use proto::{AttemptId, BootId};

    use super::*;

    fn denial(nonce: &Nonce) -> Answer {
        Answer::Denial(Denial {
            schema: 1,
            attempt: AttemptId::mint(1, [1; 10]),
            worker: "w1".parse().unwrap(),
            boot: BootId::mint(1, [2; 10]),
            nonce: nonce.clone(),
            reason: DenialReason::Taken,
        })
    }

    #[test]
    fn a_second_answer_is_an_echo_and_one_for_nobody_is_late() {
        let (claims, nonce) = (Claims::default(), Nonce("a".to_owned()));
        let mut waiting = claims.expect(nonce.clone());
        assert!(matches!(claims.answer(&nonce, denial(&nonce)), Handed::Delivered));
        // The claim has not looked yet, and the same answer comes again.
        assert!(matches!(claims.answer(&nonce, denial(&nonce)), Handed::Echo));
        assert!(waiting.last_look().is_some());
        drop(waiting);
        assert!(matches!(claims.answer(&nonce, denial(&nonce)), Handed::Echo));
        let other = Nonce("b".to_owned());
        drop(claims.expect(other.clone()));
        assert!(matches!(claims.answer(&other, denial(&other)), Handed::Late(_)));
    }
}
