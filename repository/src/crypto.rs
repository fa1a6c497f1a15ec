//! AES-256-GCM as this format uses it: in place, the tag apart. Which key and what it is bound to is decided elsewhere.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

use crate::error::Error;
use crate::limits::TAG_BYTES;

/// A key ready for use.
pub(crate) fn key(bytes: &[u8; 32]) -> Result<LessSafeKey, Error> {
    let unbound = UnboundKey::new(&AES_256_GCM, bytes)
        .map_err(|_| Error::Bug("an AES key of 32 bytes".into()))?;
    Ok(LessSafeKey::new(unbound))
}

/// Seals `buffer` in place and returns its tag. A nonce is used once with a key.
pub(crate) fn seal_with(
    key: &LessSafeKey,
    nonce: [u8; 12],
    bound_to: &[u8],
    buffer: &mut [u8],
) -> Result<[u8; TAG_BYTES], Error> {
    let tag = key
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(nonce),
            Aad::from(bound_to),
            buffer,
        )
        .map_err(|_| Error::Bug("AES-GCM refuses to seal".into()))?;
    tag.as_ref().try_into().map_err(|_| Error::Bug("an AES-GCM tag of 16 bytes".into()))
}

/// Opens `buffer` (text and tag) in place; `None` when anything was changed. The plain text is the first part.
pub(crate) fn open_with<'b>(
    key: &LessSafeKey,
    nonce: [u8; 12],
    bound_to: &[u8],
    buffer: &'b mut [u8],
) -> Option<&'b mut [u8]> {
    key.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::from(bound_to), buffer).ok()
}

/// [`seal_with`] for a key that is used once.
pub(crate) fn seal(
    key_bytes: &[u8; 32],
    nonce: [u8; 12],
    bound_to: &[u8],
    buffer: &mut [u8],
) -> Result<[u8; TAG_BYTES], Error> {
    seal_with(&key(key_bytes)?, nonce, bound_to, buffer)
}

/// [`open_with`] for a key that is used once.
pub(crate) fn open<'b>(
    key_bytes: &[u8; 32],
    nonce: [u8; 12],
    bound_to: &[u8],
    buffer: &'b mut [u8],
) -> Option<&'b [u8]> {
    open_with(&key(key_bytes).ok()?, nonce, bound_to, buffer).map(|opened| &*opened)
}
