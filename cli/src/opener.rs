//! What opens a repository, as it was typed: a key file or a passphrase, by reference, so that neither stands in the list
//! of processes or in a shell's history.

use std::path::Path;

use proto::{Action, Code, Failure, SecretRef};
use repository::{KeyFile, Unlock};
use secrecy::{ExposeSecret as _, SecretString};

use crate::args::{MaybeOpenerArgs, OpenerArgs};
use crate::secrets;

/// A secret that may open a repository.
#[derive(Debug)]
pub(crate) enum Opener {
    KeyFile(KeyFile),
    Passphrase(SecretString),
}

impl Opener {
    /// Reads the one that was typed.
    pub(crate) fn read(args: &OpenerArgs) -> Result<Self, Failure> {
        Self::of(args.key.as_deref(), args.passphrase.as_deref())
            .ok_or_else(|| Failure::bug("a repository is opened by either --key or --passphrase"))?
    }

    /// The same where none may have been typed.
    pub(crate) fn read_if_any(args: &MaybeOpenerArgs) -> Result<Option<Self>, Failure> {
        Self::of(args.key.as_deref(), args.passphrase.as_deref()).transpose()
    }

    /// The one that was typed, where it may be missing.
    pub(crate) fn of(key: Option<&Path>, reference: Option<&str>) -> Option<Result<Self, Failure>> {
        match (key, reference) {
            (Some(key), _) => Some(key_file(key).map(Self::KeyFile)),
            (None, Some(reference)) => Some(passphrase(reference).map(Self::Passphrase)),
            (None, None) => None,
        }
    }

    /// The key in a file.
    pub(crate) fn file(key: &Path) -> Result<Self, Failure> {
        key_file(key).map(Self::KeyFile)
    }

    pub(crate) fn unlock(&self) -> Unlock<'_> {
        match self {
            Self::KeyFile(key) => Unlock::KeyFile(key),
            Self::Passphrase(passphrase) => Unlock::Passphrase(passphrase),
        }
    }
}

fn wrong(message: String, hint: &str) -> Failure {
    Failure::new(Code::KeyWrong, Action::FixConfig, message).with_hint(hint)
}

/// A path; or a reference, for what is not a file.
fn key_file(key: &Path) -> Result<KeyFile, Failure> {
    let reference = key.to_str().and_then(|text| text.parse().ok());
    let reference = reference.unwrap_or_else(|| SecretRef::File(key.display().to_string()));
    let text = secrets::resolve(&reference)?;
    text.expose_secret().parse().map_err(|error| {
        wrong(
            format!("{}: failed to {error}", key.display()),
            "Give the key file that was written when the key was made, or type it in from its recovery sheet.",
        )
    })
}

/// The passphrase a reference leads to; `-` is a line of standard input.
pub(crate) fn passphrase(reference: &str) -> Result<SecretString, Failure> {
    let passphrase = if reference == "-" {
        secrets::read_line("the passphrase", std::io::stdin().lock())?
    } else {
        // What was typed is not repeated: it may be the passphrase.
        let reference = reference.parse::<SecretRef>().map_err(|error| {
            let message = format!("the passphrase: failed to {error}");
            Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
                .with_hint(
                    "Say where it is: file:/path, env:NAME, exec:/program, or - to type it as a line of standard input.",
                )
        })?;
        secrets::resolve(&reference)?
    };
    if passphrase.expose_secret().parse::<KeyFile>().is_ok() {
        return Err(wrong(
            "the passphrase is a key file".to_owned(),
            "Give a key file with --key; as a passphrase it opens nothing.",
        ));
    }
    Ok(passphrase)
}
