//! Bytes that arrive wrong may be right where they lie: a cache, a proxy or a line changed them. So whatever is found
//! damaged is read once more before it is called so. Objects are never changed: the second reading has the last word.

use std::future::Future;

use crate::error::Error;

/// Reads; what is damaged, or speaks of a version that this program does not know, once more.
pub(crate) async fn again<T, F>(read: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    match read().await {
        Err(first @ (Error::Damaged { .. } | Error::KeyObject { .. } | Error::Version { .. })) => {
            let second = read().await;
            if second.is_ok() {
                told(&first);
            }
            second
        }
        first => first,
    }
}

/// A damage that was none is told: it comes from somewhere.
pub(crate) fn told(error: &Error) {
    tracing::warn!(
        "What was read again is right; the first time it arrived changed: failed to {error}"
    );
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    #[tokio::test]
    async fn only_what_is_damaged_is_read_again_and_only_once() {
        for (damaged, missing, reads, is_ok) in
            [(0, false, 1, true), (1, false, 2, true), (9, false, 2, false), (0, true, 1, false)]
        {
            let asked = AtomicU32::new(0);
            let read = again(|| async {
                if missing {
                    asked.fetch_add(1, Ordering::SeqCst);
                    return Err(Error::Missing { key: "pack".into() });
                }
                match asked.fetch_add(1, Ordering::SeqCst) {
                    nth if nth < damaged => Err(Error::damaged("pack", "a bit is wrong")),
                    _ => Ok(()),
                }
            });
            assert_eq!((read.await.is_ok(), asked.into_inner()), (is_ok, reads));
        }
    }
}
