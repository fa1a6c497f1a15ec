//! Notes: the small objects people may read: a line of JSON, then a line with its authentication code.
//!
//! `config`, `identity`, `intent`, `verdict`, `forget`, pins, the lists of condemned packs. The code is keyed and covers the
//! object's own name, so a note cannot be changed, nor moved to where it would mean something else.

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::hex;
use crate::key::Keys;

/// The bytes of a note for the object `key`.
pub(crate) fn write(keys: &Keys, key: &str, note: &impl Serialize) -> Result<Bytes, Error> {
    let mut bytes =
        serde_json::to_vec(note).map_err(|error| Error::Bug(format!("write {key}: {error}")))?;
    let code = keys.note_code(key, &bytes);
    bytes.push(b'\n');
    bytes.extend_from_slice(hex::encode(code.as_bytes()).as_bytes());
    bytes.push(b'\n');
    Ok(bytes.into())
}

/// Reads a note and checks its code first.
pub(crate) fn read<T: DeserializeOwned>(keys: &Keys, key: &str, bytes: &[u8]) -> Result<T, Error> {
    let (line, code) = split(key, bytes)?;
    // blake3::Hash compares in constant time.
    if keys.note_code(key, line) != blake3::Hash::from_bytes(code) {
        return Err(Error::damaged(key, "its authentication code does not fit"));
    }
    parse(key, line)
}

/// Reads a note without a key: for the fields that say which key is needed.
pub(crate) fn read_unchecked<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, Error> {
    parse(key, split(key, bytes)?.0)
}

fn split<'a>(key: &str, bytes: &'a [u8]) -> Result<(&'a [u8], [u8; 32]), Error> {
    let shape =
        || Error::damaged(key, "it is not a line of JSON and a line of 64 hexadecimal digits");
    let text = bytes.strip_suffix(b"\n").ok_or_else(shape)?;
    let end = text.iter().rposition(|&byte| byte == b'\n').ok_or_else(shape)?;
    let code =
        std::str::from_utf8(&text[end + 1..]).ok().and_then(hex::decode).ok_or_else(shape)?;
    Ok((&text[..end], code))
}

fn parse<T: DeserializeOwned>(key: &str, line: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(line).map_err(|error| Error::damaged(key, error.to_string()))
}
