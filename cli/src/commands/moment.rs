//! The moment a restore goes to, from what was typed.

use std::path::Path;

use proto::job::ProofTarget;
use proto::{Action, Code, Failure, Recovery, RecoveryTarget, SecretRef, TargetAction, Timeline};
use worker::recovering::{self, FetchFrom, Fetching};

use crate::args::{AtTarget, OpenerArgs, Restore};
use crate::environment;

/// What was typed, with the clock and the zone of whoever typed it.
pub(crate) fn wanted(args: &Restore) -> Result<Option<Recovery>, Failure> {
    let invalid = |what: String| Failure::new(Code::RequestInvalid, Action::FixConfig, what);
    let moment = &args.moment;
    let target = match &moment.to {
        Some(text) => RecoveryTarget::read(text, &environment::now()).map_err(|error| {
            invalid(format!("failed to {error}"))
                .with_hint("pgmuster help restore lists the ways to write a moment.")
        })?,
        None if moment.standby => RecoveryTarget::Latest,
        None => {
            proto::check_archiving(moment.keep_archiving, false).map_err(|what| {
                invalid(what.to_owned()).with_hint(
                    "--to latest replays all that is archived and opens on a new timeline, --to immediate does so at the end of the backup.",
                )
            })?;
            let given = [
                ("--timeline", moment.timeline.is_some()),
                ("--before", moment.before),
                ("--action", moment.action.is_some()),
                ("--start", moment.start),
                ("--port", moment.port.is_some()),
            ];
            return match given.iter().find(|(_, given)| *given) {
                Some((option, _)) => Err(invalid(format!("{option} needs --to")).with_hint(
                    "--to immediate is the end of the backup, --to latest the end of the WAL.",
                )),
                None => Ok(None),
            };
        }
    };
    let recovery = Recovery {
        timeline: moment.timeline.map(Timeline),
        before: moment.before,
        action: match moment.action {
            None | Some(AtTarget::Promote) => TargetAction::Promote,
            Some(AtTarget::Pause) => TargetAction::Pause,
            Some(AtTarget::Shutdown) => TargetAction::Shutdown,
        },
        standby: moment.standby,
        start: moment.start,
        keep_archiving: moment.keep_archiving,
        port: moment.port,
        ..Recovery::to(target)
    };
    recovery.check().map_err(|what| {
        invalid(what.to_owned()).with_hint("pgmuster help restore says what goes with what.")
    })?;
    Ok(Some(recovery))
}

/// To which moment a proof goes, from what was typed.
pub(crate) fn of_proof(text: &str) -> Result<ProofTarget, Failure> {
    if text.trim() == "random" {
        return Ok(ProofTarget::Random);
    }
    RecoveryTarget::read(text, &environment::now()).map(ProofTarget::At).map_err(|error| {
        Failure::new(Code::RequestInvalid, Action::FixConfig, format!("failed to {error}"))
            .with_hint("Or write random: any position that can be reached.")
    })
}

/// How the restored server will call this program.
pub(crate) fn fetching(url: &str, opener: &OpenerArgs) -> Result<Fetching, Failure> {
    let opener = match (&opener.key, &opener.passphrase) {
        (Some(key), _) => ["--key".to_owned(), lasting(key)?],
        (None, Some(reference)) if reference != "-" => {
            ["--passphrase".to_owned(), reference.clone()]
        }
        _ => {
            let what = "the restored server needs the passphrase, too, and cannot be asked for it";
            return Err(Failure::new(Code::RequestInvalid, Action::FixConfig, what).with_hint(
                "Name where it is: --passphrase file:/path, readable for the server's user.",
            ));
        }
    };
    let from = FetchFrom::Repository(url.to_owned(), opener);
    Ok(Fetching { program: recovering::this_program()?, from })
}

/// A key's reference that means the same in another directory.
fn lasting(key: &Path) -> Result<String, Failure> {
    if let Some(text) = key.to_str()
        && text.parse::<SecretRef>().is_ok()
    {
        return Ok(text.to_owned());
    }
    let absolute = std::path::absolute(key).map_err(|error| {
        let what = format!("{}: {error}", key.display());
        Failure::new(Code::RequestInvalid, Action::FixConfig, what)
    })?;
    Ok(absolute.display().to_string())
}
