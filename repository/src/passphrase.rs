//! From a passphrase to a key: Argon2id (RFC 9106), with costs that stand beside the sealed key.
//!
//! A key file is random and needs none of this. A passphrase can be guessed by whoever has a copy of the repository, as
//! fast as his machines go; what a guess costs is decided when the passphrase is added.

use argon2::{Algorithm, Argon2, Block, Params, Version};
use secrecy::{ExposeSecret as _, SecretString};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize as _, Zeroizing};

use crate::{chance, hex};

/// What one guess of a passphrase costs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuessCost {
    /// Memory, KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Parts of it that can be filled side by side. This program fills them one after the other, so more than one
    /// helps only those who guess.
    pub lanes: u32,
}

impl Default for GuessCost {
    /// Four times the memory of RFC 9106's choice for machines with little of it: a fraction of a second here, and paid
    /// once for each opening.
    fn default() -> Self {
        Self { memory_kib: 256 << 10, passes: 3, lanes: 1 }
    }
}

/// What a reader pays at most: an object that asks for more is damaged or hostile. 1 GiB.
pub(crate) const MEMORY_KIB_MAX: u32 = 1 << 20;
/// See [`MEMORY_KIB_MAX`]; together some ten seconds.
pub(crate) const PASSES_MAX: u32 = 16;
/// See [`MEMORY_KIB_MAX`].
pub(crate) const LANES_MAX: u32 = 16;
/// Cheaper than this is told by a check: RFC 9106's choice for machines with little memory.
pub(crate) const RECOMMENDED: GuessCost = GuessCost { memory_kib: 64 << 10, passes: 3, lanes: 4 };
/// Of a new passphrase: shorter ones are guessed, whatever a guess costs.
pub(crate) const CHARACTERS_MIN: usize = 12;
const ALGORITHM: &str = "argon2id";

/// How one passphrase becomes a key, as it stands in a key object.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stretching {
    algorithm: String,
    memory_kib: u32,
    passes: u32,
    lanes: u32,
    /// 16 bytes, hexadecimal.
    salt: String,
}

impl Stretching {
    /// With a fresh salt.
    pub(crate) fn new(cost: GuessCost) -> Self {
        let GuessCost { memory_kib, passes, lanes } = cost;
        let salt = hex::encode(&chance::random::<16>());
        Self { algorithm: ALGORITHM.to_owned(), memory_kib, passes, lanes, salt }
    }

    pub(crate) fn cost(&self) -> GuessCost {
        GuessCost { memory_kib: self.memory_kib, passes: self.passes, lanes: self.lanes }
    }

    /// The salt, if all of this is within the format's limits; else what is not.
    pub(crate) fn check(&self) -> Result<[u8; 16], String> {
        if self.algorithm != ALGORITHM {
            return Err(format!("{:?} is not known to this program", self.algorithm));
        }
        if !(1..=LANES_MAX).contains(&self.lanes) {
            return Err(format!("{} lanes: 1 to {LANES_MAX}", self.lanes));
        }
        if !(8 * self.lanes..=MEMORY_KIB_MAX).contains(&self.memory_kib) {
            let least = 8 * self.lanes;
            return Err(format!("{} KiB of memory: {least} to {MEMORY_KIB_MAX}", self.memory_kib));
        }
        if !(1..=PASSES_MAX).contains(&self.passes) {
            return Err(format!("{} passes: 1 to {PASSES_MAX}", self.passes));
        }
        hex::decode(&self.salt).ok_or_else(|| "its salt is not 32 hexadecimal digits".to_owned())
    }

    /// The key. Takes its time and memory: not for a thread that others wait for.
    pub(crate) fn stretch(&self, passphrase: &SecretString) -> Result<Zeroizing<[u8; 32]>, String> {
        let salt = self.check()?;
        let mut key = Zeroizing::new([0; 32]);
        let params = Params::new(self.memory_kib, self.passes, self.lanes, Some(key.len()))
            .map_err(|error| error.to_string())?;
        let mut memory: Vec<Block> = Vec::new();
        memory
            .try_reserve_exact(params.block_count())
            .map_err(|_| format!("there is no room for its {} KiB of memory", self.memory_kib))?;
        memory.resize(params.block_count(), Block::default());
        let stretched = Argon2::new(Algorithm::Argon2id, Version::V0x13, params)
            .hash_password_into_with_memory(
                passphrase.expose_secret().as_bytes(),
                &salt,
                &mut *key,
                &mut memory,
            );
        memory.zeroize();
        stretched.map_err(|error| error.to_string())?;
        Ok(key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cheap() -> Stretching {
        let salt = "000102030405060708090a0b0c0d0e0f".to_owned();
        let algorithm = ALGORITHM.to_owned();
        Stretching { algorithm, memory_kib: 64, passes: 3, lanes: 2, salt }
    }

    /// The same as `argon2.low_level.hash_secret_raw(b"correct horse", bytes(range(16)), 3, 64, 2, 32, Type.ID)` of the
    /// reference implementation's binding for Python.
    #[test]
    fn a_passphrase_becomes_the_key_that_the_reference_implementation_makes_of_it() {
        let key = cheap().stretch(&SecretString::from("correct horse")).unwrap();
        assert_eq!(
            hex::encode(&*key),
            "20afd2eda971d75513038ad373070dd2c85315f3c4d58f2f444632cfa5c40af1"
        );
    }

    #[test]
    fn what_would_cost_a_reader_too_much_is_refused_before_it_is_paid() {
        let wrong = |change: fn(&mut Stretching)| {
            let mut stretching = cheap();
            change(&mut stretching);
            stretching.stretch(&SecretString::from("x")).unwrap_err()
        };
        for (why, expected) in [
            (wrong(|s| s.memory_kib = MEMORY_KIB_MAX + 1), "1048577 KiB of memory: 16 to 1048576"),
            (wrong(|s| s.memory_kib = u32::MAX), "4294967295 KiB of memory: 16 to 1048576"),
            (wrong(|s| s.memory_kib = 15), "15 KiB of memory: 16 to 1048576"),
            (wrong(|s| s.passes = 0), "0 passes: 1 to 16"),
            (wrong(|s| s.passes = 17), "17 passes: 1 to 16"),
            (wrong(|s| s.lanes = 0), "0 lanes: 1 to 16"),
            (wrong(|s| s.lanes = u32::MAX), "4294967295 lanes: 1 to 16"),
            (wrong(|s| s.algorithm = "argon2i".into()), "\"argon2i\" is not known to this program"),
            (wrong(|s| s.salt.push('0')), "its salt is not 32 hexadecimal digits"),
        ] {
            assert_eq!(why, expected);
        }
        for good in [GuessCost::default(), RECOMMENDED] {
            Stretching::new(good).check().unwrap();
        }
    }
}
