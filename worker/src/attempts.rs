//! The attempts of this life of the worker: what runs, under which token, and what was already seen.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, PoisonError};

use proto::message::RunningAttempt;
use proto::{Action, AttemptId, Code, Failure};

use crate::context::JobContext;

/// How many past grants are remembered, so that a repeated grant does not run a second time.
const REMEMBERED_MAX: usize = 10_000;

/// The table. One per worker.
#[derive(Debug, Default)]
pub(crate) struct Attempts {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    running: HashMap<AttemptId, (u64, JobContext)>,
    seen: VecDeque<(AttemptId, u64)>,
}

impl Attempts {
    /// Registers a grant. `false` when this grant was already seen in this life.
    pub(crate) fn begin(&self, attempt: AttemptId, token: u64, cx: JobContext) -> bool {
        let mut inner = self.lock();
        if inner.seen.contains(&(attempt, token)) {
            return false;
        }
        inner.seen.push_back((attempt, token));
        if inner.seen.len() > REMEMBERED_MAX {
            inner.seen.pop_front();
        }
        inner.running.insert(attempt, (token, cx));
        true
    }

    /// Whether this grant was already seen.
    pub(crate) fn has_seen(&self, attempt: AttemptId, token: u64) -> bool {
        self.lock().seen.contains(&(attempt, token))
    }

    /// Takes an ended attempt out.
    pub(crate) fn end(&self, attempt: AttemptId) {
        self.lock().running.remove(&attempt);
    }

    /// For the pulse.
    pub(crate) fn running(&self) -> Vec<RunningAttempt> {
        let inner = self.lock();
        let row = |(attempt, (token, cx)): (&AttemptId, &(u64, JobContext))| RunningAttempt {
            attempt: *attempt,
            token: *token,
            progress: cx.current_progress(),
        };
        inner.running.iter().map(row).collect()
    }

    /// Stops an attempt if it still runs under this token.
    pub(crate) fn cancel(&self, attempt: AttemptId, token: u64) {
        if let Some((held, cx)) = self.lock().running.get(&attempt)
            && *held == token
        {
            cx.stop(Failure::new(Code::Cancelled, Action::Abandon, "the job was cancelled"));
        }
    }

    /// Stops everything that runs, for the reason given by `reason`.
    pub(crate) fn stop_all(&self, reason: &Failure) {
        for (_, cx) in self.lock().running.values() {
            cx.stop(reason.clone());
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
