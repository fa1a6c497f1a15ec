//! Slots: room for running jobs. Urgent jobs have some of their own, so a person never waits behind the night's work.

use std::sync::{Arc, Mutex, PoisonError};

use proto::Lane;
use proto::message::Slots as Free;
use tokio::sync::Notify;

/// The slots of a worker. Cloning shares them.
#[derive(Debug, Clone)]
pub(crate) struct Slots {
    free: Arc<Mutex<Free>>,
    changed: Arc<Notify>,
}

/// A taken slot; dropping it gives it back.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Slots,
    from: Lane,
}

impl Slots {
    pub(crate) fn new(routine: u32, urgent: u32) -> Self {
        let free = Free { urgent_free: urgent, routine_free: routine };
        Self { free: Arc::new(Mutex::new(free)), changed: Arc::new(Notify::new()) }
    }

    /// Takes a slot for a job of this lane: an urgent job prefers the urgent slots and may use a routine one.
    pub(crate) fn take(&self, lane: Lane) -> Option<Slot> {
        let mut free = self.lock();
        let from = match lane {
            Lane::Urgent if free.urgent_free > 0 => Lane::Urgent,
            Lane::Urgent | Lane::Routine if free.routine_free > 0 => Lane::Routine,
            Lane::Urgent | Lane::Routine => return None,
        };
        *count(&mut free, from) -= 1;
        drop(free);
        Some(Slot { slots: self.clone(), from })
    }

    /// How many are free.
    pub(crate) fn free(&self) -> Free {
        *self.lock()
    }

    /// Resolves when a slot was given back since the last call.
    pub(crate) async fn given_back(&self) {
        self.changed.notified().await;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn count(free: &mut Free, lane: Lane) -> &mut u32 {
    match lane {
        Lane::Urgent => &mut free.urgent_free,
        Lane::Routine => &mut free.routine_free,
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        *count(&mut self.slots.lock(), self.from) += 1;
        self.slots.changed.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn routine_work_never_takes_the_urgent_slot() {
        let slots = Slots::new(1, 1);
        let routine = slots.take(Lane::Routine).unwrap();
        assert!(slots.take(Lane::Routine).is_none());
        let urgent = slots.take(Lane::Urgent).unwrap();
        assert!(slots.take(Lane::Urgent).is_none());
        drop(routine);
        let second = slots.take(Lane::Urgent).unwrap();
        drop((urgent, second));
        assert_eq!(slots.free(), Free { urgent_free: 1, routine_free: 1 });
    }
}
