//! Signed messages: the exact bytes, who signed them, and the signature.
//!
//! Ed25519 (RFC 8032). The bytes that were received are verified first and parsed afterwards; nothing is ever
//! serialised again to be verified. Each type of content has a context of its own inside the signed bytes, so that a
//! signed claim can never pass for a signed report.

use aws_lc_rs::signature::{self, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::message::{Beacon, ClaimMessage, Control, Pulse, Report};
use crate::proof::Proof;
use crate::{SiteName, WorkerName};

/// The largest payload that is looked at, bytes.
pub const PAYLOAD_MAX_BYTES: usize = 4 << 20;

/// Why a signed message is not believed.
#[derive(Debug, thiserror::Error)]
pub enum EnvelopeError {
    /// The signature does not match bytes and key.
    #[error("verify the signature of a {context}")]
    Signature {
        /// What it claimed to be.
        context: &'static str,
    },
    /// No certificate, or one that this coordinator did not issue.
    #[error("verify the certificate of a worker: {reason}")]
    Certificate {
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The signed bytes are not what they should be.
    #[error("parse a signed {context}")]
    Parse {
        /// What it claimed to be.
        context: &'static str,
        /// Where it went wrong.
        #[source]
        source: serde_json::Error,
    },
    /// Larger than [`PAYLOAD_MAX_BYTES`].
    #[error("accept a payload of {bytes} bytes")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
    /// The text is no key.
    #[error("read a key: 32 bytes of base64 are expected")]
    Key,
}

/// Content that can be signed; the context keeps one type from passing for another.
pub trait Signable: Serialize + DeserializeOwned {
    /// Part of the signed bytes.
    const CONTEXT: &'static str;
}

impl Signable for ClaimMessage {
    const CONTEXT: &'static str = "claim";
}
impl Signable for Control {
    const CONTEXT: &'static str = "control";
}
impl Signable for Beacon {
    const CONTEXT: &'static str = "beacon";
}
impl Signable for Pulse {
    const CONTEXT: &'static str = "pulse";
}
impl Signable for Report {
    const CONTEXT: &'static str = "report";
}
impl Signable for Proof {
    const CONTEXT: &'static str = "proof";
}
impl Signable for Certificate {
    const CONTEXT: &'static str = "certificate";
}

/// A private signing key. Its `Debug` shows the public half only.
pub struct SigningKey {
    pair: Ed25519KeyPair,
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").field("public", &self.public().to_string()).finish()
    }
}

impl SigningKey {
    /// The key of this seed: 32 bytes of good randomness, to be kept secret.
    pub fn from_seed(seed: &[u8; 32]) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(seed)
            .expect("every 32 bytes are a seed of an Ed25519 key");
        Self { pair }
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let mut bytes = [0; 32];
        bytes.copy_from_slice(self.pair.public_key().as_ref());
        PublicKey(bytes)
    }

    /// Signs as itself: for content whose reader knows the key.
    pub fn sign<T: Signable>(&self, content: &T) -> Signed<T> {
        self.sign_with(content, None)
    }

    fn sign_with<T: Signable>(
        &self,
        content: &T,
        certificate: Option<Box<Signed<Certificate>>>,
    ) -> Signed<T> {
        let payload = serde_json::to_string(content).expect("protocol types serialise to JSON");
        let signature = self.pair.sign(&signed_bytes(T::CONTEXT, &payload));
        Signed {
            payload,
            signature: BASE64.encode(signature.as_ref()),
            certificate,
            content: std::marker::PhantomData,
        }
    }
}

fn signed_bytes(context: &str, payload: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(context.len() + payload.len() + 16);
    bytes.extend_from_slice(b"pgmuster/1/");
    bytes.extend_from_slice(context.as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(payload.as_bytes());
    bytes
}

/// A public key, written as base64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PublicKey([u8; 32]);

impl std::fmt::Display for PublicKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&BASE64.encode(self.0))
    }
}

impl std::str::FromStr for PublicKey {
    type Err = EnvelopeError;

    fn from_str(text: &str) -> Result<Self, EnvelopeError> {
        let bytes = BASE64.decode(text.trim()).map_err(|_| EnvelopeError::Key)?;
        bytes.try_into().map(Self).map_err(|_| EnvelopeError::Key)
    }
}

impl Serialize for PublicKey {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for PublicKey {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// Bytes and their signature. The content can only be reached by verifying.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(bound = "")]
pub struct Signed<T> {
    payload: String,
    signature: String,
    /// Who the signer is, when the reader knows only the coordinator's key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    certificate: Option<Box<Signed<Certificate>>>,
    #[serde(skip)]
    content: std::marker::PhantomData<T>,
}

impl<T: Signable> Signed<T> {
    /// The content, whoever signed it: only for readers whom a forgery can make more careful and nothing else.
    pub fn unverified(&self) -> Result<T, EnvelopeError> {
        if self.payload.len() > PAYLOAD_MAX_BYTES {
            return Err(EnvelopeError::TooLarge { bytes: self.payload.len() });
        }
        serde_json::from_str(&self.payload)
            .map_err(|source| EnvelopeError::Parse { context: T::CONTEXT, source })
    }

    /// The content, if `key` signed exactly these bytes.
    pub fn verify(&self, key: &PublicKey) -> Result<T, EnvelopeError> {
        if self.payload.len() > PAYLOAD_MAX_BYTES {
            return Err(EnvelopeError::TooLarge { bytes: self.payload.len() });
        }
        let invalid = || EnvelopeError::Signature { context: T::CONTEXT };
        let signature = BASE64.decode(&self.signature).map_err(|_| invalid())?;
        UnparsedPublicKey::new(&signature::ED25519, key.0)
            .verify(&signed_bytes(T::CONTEXT, &self.payload), &signature)
            .map_err(|_| invalid())?;
        serde_json::from_str(&self.payload)
            .map_err(|source| EnvelopeError::Parse { context: T::CONTEXT, source })
    }

    /// The content, if whoever its certificate names signed exactly these bytes: it is as it was signed. Not who signed it:
    /// that needs the coordinator's key.
    pub fn verify_unchanged(&self) -> Result<T, EnvelopeError> {
        let certificate = self
            .certificate
            .as_deref()
            .ok_or(EnvelopeError::Certificate { reason: "there is none" })?
            .unverified()?;
        self.verify(&certificate.key)
    }

    /// The content and its sender, if the sender's certificate was issued by `coordinator`.
    pub fn verify_certified(
        &self,
        coordinator: &PublicKey,
    ) -> Result<(T, Certificate), EnvelopeError> {
        let certificate = self
            .certificate
            .as_deref()
            .ok_or(EnvelopeError::Certificate { reason: "there is none" })?
            .verify(coordinator)
            .map_err(|_| EnvelopeError::Certificate {
                reason: "this coordinator did not issue it",
            })?;
        let content = self.verify(&certificate.key)?;
        Ok((content, certificate))
    }
}

/// A coordinator's word that a key is a worker's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The worker.
    pub worker: WorkerName,
    /// Its site.
    pub site: SiteName,
    /// Its public key.
    pub key: PublicKey,
    /// Coordinator's clock.
    pub issued_at_ms: i64,
}

/// What a worker signs with: its key and the coordinator's word for it.
#[derive(Debug)]
pub struct Credentials {
    key: SigningKey,
    certificate: Signed<Certificate>,
    coordinator: PublicKey,
    identity: Certificate,
}

impl Credentials {
    /// Checks that the certificate is for this key and by this coordinator.
    pub fn new(
        key: SigningKey,
        certificate: Signed<Certificate>,
        coordinator: PublicKey,
    ) -> Result<Self, EnvelopeError> {
        let identity =
            certificate.verify(&coordinator).map_err(|_| EnvelopeError::Certificate {
                reason: "the coordinator whose key is pinned did not issue it",
            })?;
        if identity.key != key.public() {
            return Err(EnvelopeError::Certificate { reason: "it is for another key" });
        }
        Ok(Self { key, certificate, coordinator, identity })
    }

    /// Who this is.
    pub fn identity(&self) -> &Certificate {
        &self.identity
    }

    /// The pinned key.
    pub fn coordinator(&self) -> &PublicKey {
        &self.coordinator
    }

    /// Signs, with the certificate attached.
    pub fn sign<T: Signable>(&self, content: &T) -> Signed<T> {
        self.key.sign_with(content, Some(Box::new(self.certificate.clone())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{Beacon, Revoked};
    use crate::{AttemptId, BootId};

    fn beacon() -> Beacon {
        Beacon {
            schema: 1,
            epoch: 7,
            boot: BootId::mint(1, [1; 10]),
            at_ms: 2,
            revoked: vec![Revoked { attempt: AttemptId::mint(1, [2; 10]), token: 3 }],
        }
    }

    #[test]
    fn only_the_signer_and_only_these_bytes_verify() {
        let key = SigningKey::from_seed(&[1; 32]);
        let signed = key.sign(&beacon());
        assert_eq!(signed.verify(&key.public()).unwrap(), beacon());
        assert!(signed.verify(&SigningKey::from_seed(&[2; 32]).public()).is_err());
        let mut altered = signed.clone();
        altered.payload = altered.payload.replace("\"epoch\":7", "\"epoch\":8");
        assert_ne!(altered.payload, signed.payload);
        assert!(matches!(altered.verify(&key.public()), Err(EnvelopeError::Signature { .. })));
    }

    #[test]
    fn one_type_cannot_pass_for_another() {
        let key = SigningKey::from_seed(&[1; 32]);
        let text = serde_json::to_string(&key.sign(&beacon())).unwrap();
        let other: Signed<Pulse> = serde_json::from_str(&text).unwrap();
        assert!(matches!(other.verify(&key.public()), Err(EnvelopeError::Signature { .. })));
    }

    #[test]
    fn a_certificate_by_another_coordinator_or_for_another_key_is_refused() {
        let coordinator = SigningKey::from_seed(&[1; 32]);
        let stranger = SigningKey::from_seed(&[9; 32]);
        let worker = || SigningKey::from_seed(&[2; 32]);
        let certificate = Certificate {
            worker: "w1".parse().unwrap(),
            site: "fra1".parse().unwrap(),
            key: worker().public(),
            issued_at_ms: 1,
        };
        let good = coordinator.sign(&certificate);
        let credentials = Credentials::new(worker(), good.clone(), coordinator.public()).unwrap();
        let signed = credentials.sign(&beacon());
        let (content, sender) = signed.verify_certified(&coordinator.public()).unwrap();
        assert_eq!((content, sender), (beacon(), certificate.clone()));
        assert!(signed.verify_certified(&stranger.public()).is_err());
        assert!(Credentials::new(stranger, good, coordinator.public()).is_err());
        let forged = SigningKey::from_seed(&[9; 32]).sign(&certificate);
        assert!(Credentials::new(worker(), forged, coordinator.public()).is_err());
        let bare = worker().sign(&beacon());
        assert!(bare.verify_certified(&coordinator.public()).is_err());

        // Whether it is as it was signed can be told without the coordinator's key.
        assert_eq!(signed.verify_unchanged().unwrap(), beacon());
        let mut altered = signed;
        altered.payload = altered.payload.replace("\"epoch\":7", "\"epoch\":8");
        assert!(matches!(altered.verify_unchanged(), Err(EnvelopeError::Signature { .. })));
        assert!(bare.verify_unchanged().is_err());
    }
}
