//! Resolves references to secrets. The values stay in `SecretString` and never reach a log or an error text.

use std::process::{Command, Stdio};

use proto::{Action, Code, Failure, SecretRef};
use secrecy::SecretString;

/// A secret is a line or a key file, never more than this.
const SECRET_MAX_BYTES: usize = 64 << 10;

/// Reads the secret a reference points to.
pub(crate) fn resolve(reference: &SecretRef) -> Result<SecretString, Failure> {
    let fail = |why: String| {
        Failure::new(
            Code::ConfigInvalid,
            Action::FixConfig,
            format!("failed to read the secret {reference}: {why}"),
        )
        .with_hint("Check that it exists and that this user may read it.")
    };
    let text = match reference {
        SecretRef::File(path) => {
            let size = std::fs::metadata(path).map_err(|error| fail(error.to_string()))?.len();
            if usize::try_from(size).is_ok_and(|size| size > SECRET_MAX_BYTES) {
                return Err(fail(format!("it has {size} bytes, which is no secret")));
            }
            std::fs::read_to_string(path).map_err(|error| fail(error.to_string()))?
        }
        SecretRef::Env(name) => crate::environment::variable(name)
            .ok_or_else(|| fail("the variable is not set".to_owned()))?,
        SecretRef::Exec(words) => {
            let (program, arguments) =
                words.split_first().ok_or_else(|| fail("there is no program".to_owned()))?;
            let output = Command::new(program)
                .args(arguments)
                .stdin(Stdio::null())
                .stderr(Stdio::inherit())
                .output()
                .map_err(|error| fail(error.to_string()))?;
            if !output.status.success() {
                return Err(fail(format!("the program ended with {}", output.status)));
            }
            String::from_utf8(output.stdout).map_err(|_| fail("it is not UTF-8".to_owned()))?
        }
    };
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    if text.is_empty() || text.len() > SECRET_MAX_BYTES {
        return Err(fail("it is empty or far too long".to_owned()));
    }
    Ok(SecretString::from(text.to_owned()))
}
