//! How threads that work together end early: the first failure is kept, everybody else just stops.

use std::future::Future;
use std::sync::{Mutex, PoisonError};

use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use crate::error::Error;

#[derive(Debug)]
pub(crate) struct Stop {
    token: CancellationToken,
    first: Mutex<Option<Error>>,
    runtime: Handle,
}

impl Stop {
    /// Stops when `parent` is cancelled, never the other way round.
    pub(crate) fn new(parent: &CancellationToken, runtime: Handle) -> Self {
        Self { token: parent.child_token(), first: Mutex::default(), runtime }
    }

    pub(crate) fn token(&self) -> &CancellationToken {
        &self.token
    }

    pub(crate) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    /// Ends everything. What others report after being stopped is not news.
    pub(crate) fn fail(&self, error: Error) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let news = !matches!(error, Error::Cancelled);
        if news && first.is_none() {
            *first = Some(error);
        }
        self.token.cancel();
    }

    /// The failure that ended everything.
    pub(crate) fn cause(&self) -> Error {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.take().unwrap_or(Error::Cancelled)
    }

    pub(crate) fn check(&self) -> Result<(), Error> {
        if self.token.is_cancelled() { Err(Error::Cancelled) } else { Ok(()) }
    }

    /// Waits on a thread of our own for something of the runtime's, or for the end.
    pub(crate) fn wait<T>(
        &self,
        future: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        self.runtime.block_on(async {
            tokio::select! {
                biased;
                () = self.token.cancelled() => Err(Error::Cancelled),
                done = future => done,
            }
        })
    }
}
