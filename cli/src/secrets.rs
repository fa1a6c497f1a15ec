//! Resolves references to secrets. The values stay in `SecretString` and never reach a log or an error text.

use std::io::{BufRead, Read};
use std::process::{Command, Stdio};

use proto::{Action, Code, Failure, SecretRef};
use secrecy::SecretString;
use zeroize::Zeroizing;

/// A secret is a line or a key file, never more than this.
const SECRET_MAX_BYTES: usize = 64 << 10;
const EMPTY_OR_LONG: &str = "it is empty or far too long";

/// Reads the secret a reference points to.
pub(crate) fn resolve(reference: &SecretRef) -> Result<SecretString, Failure> {
    let fail = |why: String| unreadable(&format!("the secret {reference}"), &why);
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
    checked(&text).ok_or_else(|| fail(EMPTY_OR_LONG.to_owned()))
}

/// Reads a secret to the end of `source`; `what` names it in errors.
pub(crate) fn read(what: &str, source: impl Read) -> Result<SecretString, Failure> {
    let mut text = String::new();
    source
        .take(SECRET_MAX_BYTES as u64 + 1)
        .read_to_string(&mut text)
        .map_err(|error| unreadable(what, &error.to_string()))?;
    checked(&text).ok_or_else(|| unreadable(what, EMPTY_OR_LONG))
}

/// Reads a secret that is one line of `source`, and nothing behind it.
pub(crate) fn read_line(what: &str, source: impl BufRead) -> Result<SecretString, Failure> {
    let mut text = Zeroizing::new(String::new());
    source
        .take(SECRET_MAX_BYTES as u64 + 1)
        .read_line(&mut text)
        .map_err(|error| unreadable(what, &error.to_string()))?;
    checked(&text).ok_or_else(|| unreadable(what, EMPTY_OR_LONG))
}

fn unreadable(what: &str, why: &str) -> Failure {
    let message = format!("failed to read {what}: {why}");
    Failure::new(Code::ConfigInvalid, Action::FixConfig, message)
        .with_hint("Check that it exists and that this user may read it.")
}

/// A secret without the end of its line.
fn checked(text: &str) -> Option<SecretString> {
    let text = text.strip_suffix('\n').unwrap_or(text);
    let text = text.strip_suffix('\r').unwrap_or(text);
    let fits = !text.is_empty() && text.len() <= SECRET_MAX_BYTES;
    fits.then(|| SecretString::from(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use secrecy::ExposeSecret as _;

    use super::*;

    #[test]
    fn a_line_is_read_and_what_is_behind_it_is_left() {
        let mut source = &b"correct horse\nnext\n"[..];
        assert_eq!(read_line("it", &mut source).unwrap().expose_secret(), "correct horse");
        assert_eq!(read_line("it", &mut source).unwrap().expose_secret(), "next");
        let failure = read_line("it", &mut source).unwrap_err();
        assert_eq!(failure.message, "failed to read it: it is empty or far too long");
    }

    #[test]
    fn a_secret_ends_with_its_line_and_is_never_empty() {
        let token = read("the token", &b"abc\r\n"[..]).unwrap();
        assert_eq!(token.expose_secret(), "abc");
        for wrong in [b"\n".to_vec(), vec![b'x'; SECRET_MAX_BYTES + 1], vec![0xff]] {
            let failure = read("the token", &wrong[..]).unwrap_err();
            assert!(failure.message.starts_with("failed to read the token: "), "{failure}");
        }
    }
}
