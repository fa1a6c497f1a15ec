//! What ended a server behind the end of its backup, by all that it said: the WAL that it replayed there, this machine, or neither.
//!
//! WAL is blamed only where the copy was whole, the server was still replaying, and nothing else explains its end: good WAL that
//! counts as broken takes the recovery point back, and orders a backup that nobody needs.

use super::CONSISTENT;
use crate::Error;
use crate::unfit;

/// What a server says when it has replayed all that it wanted to.
const REPLAYED: &str = "redo done at";
/// A page that WAL changes and the copy does not have, said when the end of the backup is reached.
const INVALID_PAGES: &str = "WAL contains references to invalid pages";
/// It came to the end of the WAL first.
const MISSED: &str = "recovery ended before configured recovery target";
/// Somebody asked the server to end.
const STOPPED: [&str; 3] = [
    "received smart shutdown request",
    "received fast shutdown request",
    "received immediate shutdown request",
];

/// What ended a server while it replayed WAL behind the end of its backup; `None` where it was none of that.
pub(super) fn in_replay(what: &str, log: &str, output: impl FnOnce() -> String) -> Option<Error> {
    if !log.contains(CONSISTENT) || log.contains(INVALID_PAGES) || unfit::unfit(log).is_some() {
        return None;
    }
    let is_missed = log.contains(MISSED);
    let replay = || Error::Replay { what: what.to_owned(), output: output(), is_missed };
    if is_missed {
        return Some(replay());
    }
    if log.contains(REPLAYED) {
        return None;
    }
    let stopped = STOPPED.iter().find(|request| log.contains(**request));
    Some(stopped.map_or_else(replay, |request| Error::SandboxUnfit {
        what: unfit::KILLED.to_owned(),
        evidence: (*request).to_owned(),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STARTS: &str = "LOG:  starting archive recovery\nLOG:  redo starts at 0/2000028\n";
    const WHOLE: &str = "LOG:  consistent recovery state reached at 0/2000138\n\
                         LOG:  restored log file \"000000010000000000000003\" from archive\n";
    const DONE: &str = "LOG:  redo done at 0/30000D8 system usage: CPU: user: 0.00 s, system: 0.00 s, elapsed: 0.02 s\n";

    /// What such a log says of WAL.
    #[derive(Debug, PartialEq, Eq)]
    enum Says {
        Broken,
        Missed,
        Machine(String),
        Nothing,
    }

    fn says(log: &[&str]) -> Says {
        let log = log.concat();
        match in_replay("it ended with exit code 1", &log, || "its last lines".to_owned()) {
            None => Says::Nothing,
            Some(Error::Replay { what, output, is_missed }) => {
                assert_eq!(
                    (what.as_str(), output.as_str()),
                    ("it ended with exit code 1", "its last lines")
                );
                if is_missed { Says::Missed } else { Says::Broken }
            }
            Some(Error::SandboxUnfit { what, evidence }) => {
                assert_eq!(what, unfit::KILLED);
                Says::Machine(evidence)
            }
            Some(other) => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_server_that_gave_up_behind_a_whole_copy_says_that_wal_is_broken() {
        for last in [
            "PANIC:  invalid max offset number\nCONTEXT:  WAL redo at 0/3000110 for Heap/INSERT: off 3 flags 0x00\n\
             LOG:  startup process (PID 17) was terminated by signal 6: Aborted\n",
            "FATAL:  could not restore file \"000000010000000000000004\" from archive: child process exited with exit code 200\n\
             LOG:  startup process (PID 17) exited with exit code 1\n",
            "LOG:  startup process (PID 17) was terminated by signal 11: Segmentation fault\n",
        ] {
            assert_eq!(says(&[STARTS, WHOLE, last]), Says::Broken, "{last}");
            assert_eq!(says(&[STARTS, last]), Says::Nothing, "within the backup: {last}");
        }
    }

    #[test]
    fn the_end_of_the_log_before_the_target_is_told_as_that() {
        let missed = "FATAL:  recovery ended before configured recovery target was reached\n";
        let damaged = "LOG:  incorrect resource manager data checksum in record at 0/30000D8\n";
        // The server replayed all that it could read, and says so first.
        assert_eq!(says(&[STARTS, WHOLE, damaged, DONE, missed]), Says::Missed);
        assert_eq!(says(&[STARTS, DONE, missed]), Says::Nothing, "within the backup");
    }

    #[test]
    fn what_ends_a_server_that_has_replayed_everything_is_not_the_wal() {
        let opened = "LOG:  selected new timeline ID: 2\nLOG:  archive recovery complete\n";
        for last in
            ["", "LOG:  received fast shutdown request\n", "PANIC:  could not find redo location\n"]
        {
            assert_eq!(says(&[STARTS, WHOLE, DONE, opened, last]), Says::Nothing, "{last}");
        }
    }

    #[test]
    fn a_server_that_somebody_stopped_in_the_middle_of_replay_says_nothing_of_wal() {
        for request in STOPPED {
            let stopped = format!("LOG:  {request}\nLOG:  database system is shut down\n");
            let machine = Says::Machine(request.to_owned());
            assert_eq!(says(&[STARTS, WHOLE, &stopped]), machine);
            assert_eq!(says(&[STARTS, &stopped]), Says::Nothing, "within the backup");
        }
    }

    #[test]
    fn pages_that_the_copy_lacks_and_what_the_machine_lacks_are_not_the_wals() {
        for last in [
            "WARNING:  page 3 of relation base/5/16384 does not exist\nPANIC:  WAL contains references to invalid pages\n",
            "FATAL:  could not extend file \"base/5/16384\": No space left on device\n",
            "LOG:  startup process (PID 17) was terminated by signal 9: Killed\n",
        ] {
            assert_eq!(says(&[STARTS, WHOLE, last]), Says::Nothing, "{last}");
        }
    }
}
