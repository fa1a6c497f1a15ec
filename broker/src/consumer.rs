//! Receiving from one queue.

use crate::{Delivery, memory, rabbit};

/// Receives from one queue until it is stopped, dropped, or its broker closed.
///
/// Messages that were fetched and not yet returned by [`next`](Self::next) go back to the queue when the consumer
/// ends; deliveries in hand stay valid.
#[derive(Debug)]
pub struct Consumer {
    twin: Twin,
}

#[derive(Debug)]
enum Twin {
    Memory(memory::Consumer),
    Rabbit(rabbit::Consumer),
}

impl Consumer {
    pub(crate) fn memory(consumer: memory::Consumer) -> Self {
        Self { twin: Twin::Memory(consumer) }
    }

    pub(crate) fn rabbit(consumer: rabbit::Consumer) -> Self {
        Self { twin: Twin::Rabbit(consumer) }
    }

    /// The next message; `None` only after [`Broker::close`](crate::Broker::close). Safe to drop and call again.
    pub async fn next(&mut self) -> Option<Delivery> {
        match &mut self.twin {
            Twin::Memory(consumer) => consumer.next().await,
            Twin::Rabbit(consumer) => consumer.next().await,
        }
    }

    /// Ends it, and returns when what was fetched is back in the queue (or the broker did not answer in time).
    pub async fn stop(self) {
        match self.twin {
            Twin::Memory(consumer) => drop(consumer),
            Twin::Rabbit(consumer) => consumer.stop().await,
        }
    }
}
