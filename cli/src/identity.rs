//! Who a worker is: its key, and the coordinator's word for it. Kept in its state directory.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use proto::envelope::{Certificate, Credentials, PublicKey, Signed, SigningKey};
use proto::{Action, Code, Failure};
use serde::{Deserialize, Serialize};

use crate::commands::write_secret;

/// What is in the file.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Stored {
    seed: String,
    certificate: Signed<Certificate>,
    coordinator_key: PublicKey,
}

/// Where a worker's identity is.
pub(crate) fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("identity.json")
}

/// Keeps an identity. Replaces an older one.
pub(crate) fn store(
    state_dir: &Path,
    seed: &[u8; 32],
    certificate: Signed<Certificate>,
    coordinator_key: PublicKey,
) -> Result<(), Failure> {
    let stored = Stored { seed: BASE64.encode(seed), certificate, coordinator_key };
    let text = serde_json::to_string_pretty(&stored).expect("an identity is plain JSON");
    let (new, place) = (state_dir.join("identity.json.new"), path(state_dir));
    let failed = |error: std::io::Error| {
        let message = format!("failed to write {}: {error}", place.display());
        Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
            .with_hint("The worker's state_dir must be a directory its user may write to.")
    };
    std::fs::create_dir_all(state_dir).map_err(failed)?;
    match std::fs::remove_file(&new) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(failed(error)),
        _ => {}
    }
    write_secret(&new, text.as_bytes())?;
    std::fs::rename(&new, &place).map_err(failed)
}

/// Reads an identity.
pub(crate) fn load(state_dir: &Path) -> Result<Credentials, Failure> {
    let place = path(state_dir);
    let refused = |what: String| {
        Failure::new(Code::ConfigInvalid, Action::FixConfig, format!("{}: {what}", place.display()))
            .with_hint(
                "Enroll this worker: pgmuster worker enroll --config FILE --enroll-token FILE.",
            )
    };
    let text = std::fs::read_to_string(&place).map_err(|error| refused(error.to_string()))?;
    let stored: Stored =
        serde_json::from_str(&text).map_err(|_| refused("it is not an identity".to_owned()))?;
    let seed = seed(&stored.seed).ok_or_else(|| refused("its key is damaged".to_owned()))?;
    let key = SigningKey::from_seed(&seed);
    Credentials::new(key, stored.certificate, stored.coordinator_key)
        .map_err(|error| refused(format!("failed to {error}")))
}

/// The 32 bytes of a key written as base64.
pub(crate) fn seed(text: &str) -> Option<[u8; 32]> {
    BASE64.decode(text.trim()).ok()?.try_into().ok()
}

/// A key's 32 bytes as text.
pub(crate) fn seed_text(seed: &[u8; 32]) -> String {
    BASE64.encode(seed)
}
